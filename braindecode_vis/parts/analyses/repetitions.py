"""How many repetitions are needed: retrieval against the number of averaged test trials.

Owns the curve for the encoder of the run, which stays as it was trained. For each number, repetitions of every test
image are drawn without replacement and averaged, several times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.measure import (
    FoldValues,
    Measured,
    Meter,
    RetrievalAnalysis,
    average_draws,
    check_retrieval,
    describe_result,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.report.drawing import draw_curve, mark_chance
from braindecode_vis.scoring.metrics.metric_registry import find_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RepetitionsConfig(RetrievalAnalysis):
    """Average few and many repetitions of the test images.

    Parameters
    ----------
    numbers
        Numbers of repetitions; empty takes 1, 2, 4, 8... and all. Numbers that some image does not have are left out.
    """

    kind: Literal["repetitions"] = "repetitions"
    numbers: tuple[int, ...] = ()

    #: Random choices of repetitions per number.
    n_draws: ClassVar[int] = 10
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_draws"})

    def compute(self, study: Study) -> Findings:
        """Draw, average and rank."""
        check_retrieval(study, self.kind)
        sizes = [len(group) for fold in study.folds for group in _list_groups(study, fold.test)]
        most = min(sizes)
        if most < 2:
            raise DataError(
                "some test images were shown only once, so repetitions cannot be averaged; choose a "
                "split or subjects "
                "whose test images were all repeated."
            )
        powers = [2**p for p in range(most.bit_length())]
        numbers = [n for n in self.numbers if 1 <= n <= most] or sorted({*powers, most})
        meter = Meter(study, self.metric)
        rows, trials = [], 0
        with study.progress("repetitions", len(numbers)) as advance:
            for n in numbers:
                # All repetitions of every image can be drawn in one way only.
                draws = 1 if n == most == max(sizes) else self.n_draws
                measured = [self._measure(study, meter, n, draw) for draw in range(draws)]
                mean = average_draws(measured)
                trials = len(mean.values)
                rows.append({"repetitions": n, "n_draws": draws, **mean.as_row(study)})
                advance(1)
        table = pd.DataFrame(rows)

        def draw_plot(figure: Figure) -> None:
            axes = figure.subplots()
            mark_chance(axes, float(table["chance"].iloc[0]))
            draw_curve(axes, table["repetitions"], table, label=self.metric)
            axes.plot(table["repetitions"], table["value"], "o", ms=4, color="C0")
            if most > 4:
                axes.set_xscale("log", base=2)
                axes.set_xticks(table["repetitions"], [str(n) for n in table["repetitions"]])
            axes.set_xlabel("averaged repetitions")
            axes.set_ylabel(find_metric(self.metric).label)
            axes.legend(loc="upper left")

        first, last = table.iloc[0], table.iloc[-1]
        found = (
            f"With {first['repetitions']:.0f} repetition(s) {describe_result(first, self.metric)}; with "
            f"{last['repetitions']:.0f} {describe_result(last, self.metric)}."
        )
        how = f"Repetitions of {trials} test images were drawn and averaged; the encoder is that of the run."
        caption = f"{self.metric} by number of averaged repetitions, mean over draws, with 95 % intervals."
        return Findings(
            "Repetitions", f"{how} {found}", table, (Plot("repetitions", caption, found, draw_plot),)
        )

    def _measure(self, study: Study, meter: Meter, n: int, draw: int) -> Measured:
        parts: list[FoldValues] = []
        for number, fold in enumerate(study.folds):
            generator = make_generator(study.seed, "repetitions", n, draw, number)
            # Sorted, since recordings on the disk are read in order.
            rows = np.sort(_draw_rows(study, fold.test, n, generator))
            test = average_repetitions(study.responses, rows)
            parts.append(meter.measure_fold(number, test, study.trained(number)))
        return meter.join(parts)


def _list_groups(study: Study, rows: np.ndarray) -> list[np.ndarray]:
    """Return the trials of each subject and image (and task), as `average_repetitions` puts them together."""
    trials = study.responses.trials.iloc[rows]
    # What was seen and what was imagined of one image are not repetitions of each other.
    keys = ["subject", "stimulus_id", *(["task"] if "task" in trials else [])]
    codes = trials.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    return [rows[codes == code] for code in range(codes.max() + 1)]


def _draw_rows(study: Study, rows: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    return np.concatenate([generator.choice(g, n, replace=False) for g in _list_groups(study, rows)])
