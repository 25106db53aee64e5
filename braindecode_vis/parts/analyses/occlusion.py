"""Which input the encoder of the run uses, by hiding parts: channels, parcels or time windows of test trials.

Owns occlusion, which works with any encoder and fits nothing: one part of the test trials is replaced by its mean over
training trials, and the loss of the score is the part's importance. Redundant parts can be hidden one at a time without
loss, so a small loss is no proof that a part holds nothing; compare with analyses that fit anew.

References
----------
Zeiler and Fergus (2014), arXiv:1311.2901.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.parts.analyses.analysis_figures import make_maps
from braindecode_vis.parts.analyses.cuts import make_sliding_windows
from braindecode_vis.parts.analyses.measure import (
    FoldValues,
    Measured,
    Meter,
    RetrievalMetric,
    add_holm,
    bound_difference,
    check_retrieval,
    describe_limits,
    find_best,
)
from braindecode_vis.parts.analyses.patterns import list_columns
from braindecode_vis.parts.analyses.study import Attachment, Findings, Plot, Study
from braindecode_vis.preprocessing.alignment import check_common_features
from braindecode_vis.report.drawing import draw_bars, draw_curve, mark_stimulus
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.score_row import format_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = tuple[str, str, Callable[[np.ndarray], Any]]  # kind, name, and the index of what is hidden


class OcclusionConfig(Analysis):
    """Hide one part of the test trials after the other.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    over
        ``columns`` (channels, parcels or blocks of voxels) and ``time`` (windows).
    width
        Width of the hidden windows in s (a choice of ours).
    """

    kind: Literal["occlusion"] = "occlusion"
    metric: RetrievalMetric = "two_way"
    over: tuple[Literal["columns", "time"], ...] = Field(default=("columns", "time"), min_length=1)
    width: float = Field(default=0.1, gt=0)

    #: Columns beyond this number are hidden in as many blocks of neighbours in the order of the data.
    max_columns: ClassVar[int] = 128
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_columns"})

    def compute(self, study: Study) -> Findings:
        """Predict with the run's encoders, with and without each part."""
        check_retrieval(study, self.kind)
        parts = self._list_parts(study)
        meter = Meter(study, self.metric)
        whole: list[FoldValues] = []
        hidden: dict[tuple[str, str], list[FoldValues]] = {(kind, name): [] for kind, name, _ in parts}
        with study.progress("occlusion", len(parts) * len(study.folds)) as advance:
            for number, fold in enumerate(study.folds):
                test, encoder = study.pick(fold.test, "test"), study.trained(number)
                train = study.pick(fold.train, "train")
                fill = _compute_mean(train)  # of training trials: the test split tells the encoder nothing
                whole.append(meter.measure_fold(number, test, encoder))
                data = np.asarray(test.data)  # read once: parts are hidden in copies
                for kind, name, find in parts:
                    changed = data.copy()
                    index = find(changed)
                    changed[index] = np.broadcast_to(fill, changed.shape)[index]
                    altered = replace(test, data=changed)
                    hidden[kind, name].append(meter.measure_fold(number, altered, encoder, permute=False))
                    advance(1)
        joined = meter.join(whole)
        rows = [_make_row(study, key, meter.join(folds), joined) for key, folds in hidden.items()]
        return self._report(study, add_holm(pd.DataFrame(rows), "part"), joined)

    def _list_parts(self, study: Study) -> list[Part]:
        responses, parts = study.responses, []
        if "columns" in self.over:
            check_common_features(responses, what="hiding columns")
            names = list_columns(responses)
            blocks = np.array_split(np.arange(len(names)), min(self.max_columns, len(names)))
            for block in blocks:
                name = names[block[0]] if len(block) == 1 else f"{names[block[0]]} to {names[block[-1]]}"
                parts.append(("columns", name, _make_index(1, block)))
        if "time" in self.over and study.has_time:  # windows that touch and do not overlap
            axis = responses.dims.index("time")
            for window in make_sliding_windows(responses, self.width, self.width, None, None):
                samples = np.arange(window.first, window.last)
                parts.append(("time", f"{window.start:.4f}", _make_index(axis, samples)))
        if not parts:
            raise ConfigError("trials have no time axis that could be hidden; set over to columns.")
        return parts

    def _report(self, study: Study, table: pd.DataFrame, whole: Measured) -> Findings:
        kinds = [k for k in ("columns", "time") if (table["part"] == k).any()]

        def draw(figure: Figure) -> None:
            panels = figure.subplots(1, len(kinds), squeeze=False)[0]
            for axes, kind in zip(panels, kinds, strict=True):
                own = table[table["part"] == kind]
                if kind == "time":
                    mark_stimulus(axes)
                    draw_curve(axes, (own["name"].astype(float) + self.width / 2) * 1000, own)
                    axes.axhline(0, color="C2", lw=1, ls="--")
                    axes.set_xlabel("middle of the hidden window (ms)")
                    axes.set_ylabel(f"loss of {find_metric(self.metric).label}")
                else:
                    top = own.sort_values("value", ascending=False).head(20)
                    draw_bars(axes, top, top["name"].tolist())
                    axes.set_xlabel(f"loss of {find_metric(self.metric).label}")

        words = []
        for kind in kinds:
            own = table[table["part"] == kind]
            best = find_best(own)
            what = f"{float(best['name']) * 1000:z.0f} ms on" if kind == "time" else str(best["name"])
            p = format_p_value(best["p_holm"], in_words=True)
            words.append(
                f"hiding {what} costs most {kind if kind == 'time' else study.responses.dims[1]}-wise: "
                f"{best['value']:.3f} ({describe_limits(best, what='')}, {p} by Holm over {len(own)} parts)"
            )
        found = f"Of {self.metric} {whole.value:.3f} (chance {whole.chance:.3f}), " + "; ".join(words) + "."
        how = "One part of the test trials at a time was replaced by its mean over training trials."
        caption = "Loss of the score when a part is hidden, with 95 % intervals; the 20 largest for columns."
        size = (7.4, 5.0 if "columns" in kinds else 3.4)
        plot = Plot("occlusion", caption, found, draw, size)
        return Findings("Occlusion", f"{how} {found}", table, (plot,), files=self._make_files(study, table))

    def _make_files(self, study: Study, table: pd.DataFrame) -> tuple[Attachment, ...]:
        """Return a map of the loss; columns that were hidden together have the same."""
        own = table[table["part"] == "columns"]
        if own.empty:
            return ()
        n = study.responses.data.shape[1]
        # The same split as in `_list_parts`, so that each block's loss is spread over its own features.
        sizes = [len(block) for block in np.array_split(np.arange(n), len(own))]
        values = np.repeat(own["value"].to_numpy(float), sizes)
        together = f", of {max(sizes)} neighbours in the table together" if max(sizes) > 1 else ""
        caption = f"Loss of {self.metric} when a {study.responses.dims[1]} is hidden{together}."
        return make_maps(study.responses, values, "loss", caption)


def _make_index(axis: int, numbers: np.ndarray) -> Callable[[np.ndarray], Any]:
    def find(data: np.ndarray) -> Any:
        return (*[slice(None)] * axis, numbers, *[slice(None)] * (data.ndim - axis - 1))

    return find


def _compute_mean(responses: Responses, block: int = 512) -> np.ndarray:
    """Return the mean trial, read block by block."""
    total = np.zeros(responses.data.shape[1:])
    for start in range(0, responses.n_trials, block):
        total += np.asarray(responses.data[start : start + block]).sum(axis=0, dtype=np.float64)
    return total / responses.n_trials


def _make_row(study: Study, key: tuple[str, str], hidden: Measured, whole: Measured) -> dict[str, Any]:
    low, high, p, words = bound_difference(whole.compare(study, hidden.values))
    return {
        "part": key[0], "name": key[1], "value": whole.value - hidden.value,
        "ci_low": low, "ci_high": high, "chance": 0.0, "n": len(hidden.values), "p_value": p, "score": hidden.value,
        "resampled": words,
    }  # fmt: skip
