"""Generalisation over time: what is learnt at one time and tested at another.

Owns the matrix of retrieval by training window and test window. A diagonal band means a chain of different patterns, a
square one pattern that stays. One encoder is fitted per training window and tested in all windows.

References
----------
King and Dehaene (2014), doi:10.1016/j.tics.2014.01.002.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.analyses.curves import check_windows
from braindecode_vis.parts.analyses.cuts import Outside, TimedAnalysis, cut_window, make_sliding_windows
from braindecode_vis.parts.analyses.measure import (
    FoldValues,
    Meter,
    RetrievalMetric,
    check_retrieval,
    describe_limits,
    find_best,
    refit,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.report.drawing import draw_matrix
from braindecode_vis.scoring.uncertainty import compute_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TimeGeneralizationConfig(TimedAnalysis):
    """Train in one window, test in another.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    width, step
        Width and step of the windows in s (a choice of ours).
    """

    kind: Literal["time_generalization"] = "time_generalization"
    metric: RetrievalMetric = "two_way"
    width: float = Field(default=0.05, gt=0)
    step: float = Field(default=0.05, gt=0)

    #: Level, corrected for all cells by the largest standardised value of each permutation.
    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alpha"})

    def compute(self, study: Study) -> Findings:
        """Fit once per training window and test in all windows."""
        check_retrieval(study, self.kind)
        windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
        check_windows(windows)
        cut: Outside = "cut"
        meter, n = Meter(study, self.metric), len(windows)
        cells: dict[tuple[int, int], list[FoldValues]] = {(i, j): [] for i in range(n) for j in range(n)}
        with refit(study, meter, "generalisation over time", range(n)) as measure:
            for number, fold in enumerate(study.folds):
                train, test = study.pick(fold.train, "train"), study.pick(fold.test, "test")
                # Cut once for all training windows.
                tests = [cut_window(test, window, cut) for window in windows]
                for i, window in enumerate(windows):
                    change = partial(cut_window, window=window, outside=cut)
                    for j, found in enumerate(measure(number, i, train, change, tests)):
                        cells[i, j].append(found)
        rows, largest, z = [], np.full(study.n_permutations, -np.inf), np.zeros((n, n))
        for (i, j), folds in cells.items():
            measured = meter.join(folds)
            if measured.null is None:
                raise DataError(
                    "the images of this test set cannot be permuted (one image, or more than 2000)."
                )
            spread = max(float(measured.null.std()), 1e-12)
            centred = (measured.null - measured.null.mean()) / spread
            z[i, j] = (measured.observed - measured.null.mean()) / spread
            # The largest cell of each permutation corrects for all cells; one cell has one scale.
            largest = np.maximum(largest, centred)
            rows.append(
                {
                    "train_start": windows[i].start, "train_stop": windows[i].stop, "test_start": windows[j].start,
                    "test_stop": windows[j].stop, **measured.as_row(study),
                }
            )  # fmt: skip
            cells[i, j] = []  # its null is no longer needed
        table = pd.DataFrame(rows)
        table["p_corrected"] = compute_p_value(np.array([z[cell] for cell in cells]), largest)
        table["significant"] = table["p_corrected"] <= self.alpha
        return self._report(table, [w.centre for w in windows])

    def _report(self, table: pd.DataFrame, centres: list[float]) -> Findings:
        n = len(centres)
        values = table["value"].to_numpy(float).reshape(n, n)
        marked = table["significant"].to_numpy().reshape(n, n)
        half = (centres[1] - centres[0]) / 2
        # Pixels are centred on the windows, so the picture reaches half a step beyond the first and the last.
        edge = [(centres[0] - half) * 1000, (centres[-1] + half) * 1000]
        off = marked & ~np.eye(n, dtype=bool)
        chance = float(table["chance"].iloc[0])

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            extent: Any = (*edge, *edge)
            reach = max(float(np.abs(values - chance).max()), 1e-3)
            draw_matrix(
                figure, axes, values, label=self.metric, extent=extent, origin="lower",
                limits=(chance - reach, chance + reach),
            )  # fmt: skip
            if 0 < marked.sum() < marked.size:
                grid = np.asarray(centres) * 1000
                axes.contour(grid, grid, marked.astype(float), levels=[0.5], colors=["C2"], linewidths=1)
            axes.plot(edge, edge, color="C4", lw=0.6)
            axes.set_xlabel("tested at (ms)")
            axes.set_ylabel("trained at (ms)")

        best = find_best(table)
        found = (
            f"{self.metric} is highest, {best['value']:.3f} ({describe_limits(best, what='')}, chance "
            f"{chance:.3f}), when trained at {(best['train_start'] + best['train_stop']) * 500:.0f} ms and tested at "
            f"{(best['test_start'] + best['test_stop']) * 500:.0f} ms. {int(np.diag(marked).sum())} of {n} cells on "
            f"the diagonal and {int(off.sum())} of {n * (n - 1)} off it are significant, corrected for all cells."
        )
        how = f"An encoder was fitted in each of {n} windows of {self.width * 1000:.0f} ms and tested in all of them."
        caption = (
            f"{self.metric} by time of training (rows) and of testing (columns). Outlined cells are significant after "
            "correction for all cells; the colours are centred on chance."
        )
        plot = Plot("time_generalization", caption, found, draw, (5.4, 4.4))
        return Findings("Generalisation over time", f"{how} {found}", table, (plot,))
