"""Retrieval against time: windows that grow from the onset of the image, and windows that slide.

Owns two analyses that fit an encoder of the run's configuration anew in every window. Where a window ends, the brain
has had that much time; what the encoder cannot read in a short window is not shown to be absent from the brain.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721 (growing windows and windows of 100 ms); Benchetrit et al. (2024),
arXiv:2310.19812 (sliding windows, MEG).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from braindecode_vis.parts.analyses.curves import Curve, check_windows, make_curve, report_curve
from braindecode_vis.parts.analyses.cuts import (
    CutAnalysis,
    Outside,
    TimedAnalysis,
    Window,
    cut_window,
    make_growing_windows,
    make_sliding_windows,
)
from braindecode_vis.parts.analyses.measure import RetrievalAnalysis, check_retrieval, measure_changes
from braindecode_vis.parts.analyses.study import Findings, Study


class GrowingWindowConfig(RetrievalAnalysis, CutAnalysis):
    """Decode from the onset of the image up to a later and later sample (ATM).

    Parameters
    ----------
    start
        Start of all windows, in s.
    step
        By how much each window is longer than the one before, in s (a choice of ours).
    tmax
        Latest end of the last window, in s; None is the end of the trial.
    """

    kind: Literal["growing_window"] = "growing_window"
    start: float = 0.0
    step: float = Field(default=0.05, gt=0)
    tmax: float | None = None

    #: Level of the cluster test.
    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alpha"})

    def compute(self, study: Study) -> Findings:
        """Fit and test one encoder per window."""
        windows = make_growing_windows(study.responses, self.step, self.start, self.tmax)
        curve = decode_windows(study, windows, self.metric, self.outside, self.alpha, self.kind)
        how = (
            f"An encoder was fitted and tested on windows that begin at {self.start * 1000:z.0f} ms and grow."
        )
        return report_curve(
            study, curve, self.metric, name=self.kind, title="Growing window", how=how, by_end=True
        )


class SlidingWindowConfig(RetrievalAnalysis, TimedAnalysis, CutAnalysis):
    """Decode from a short window that slides over the trial (ATM, Benchetrit et al.).

    Parameters
    ----------
    width
        Of the window, s; 100 ms as in ATM.
    step
        Between windows, s (a choice of ours); the latency of an onset is not finer than this.
    """

    kind: Literal["sliding_window"] = "sliding_window"
    width: float = Field(default=0.1, gt=0)
    step: float = Field(default=0.02, gt=0)

    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alpha"})

    def compute(self, study: Study) -> Findings:
        """Fit and test one encoder per window."""
        windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
        curve = decode_windows(study, windows, self.metric, self.outside, self.alpha, self.kind)
        how = f"An encoder was fitted and tested in each of {len(windows)} windows of {self.width * 1000:.0f} ms."
        return report_curve(
            study, curve, self.metric, name=self.kind, title="Sliding window", how=how, by_end=False
        )


def decode_windows(
    study: Study, windows: Sequence[Window], metric: str, outside: Outside, alpha: float, kind: str
) -> Curve:
    """Fit and test in every window, and test the curve."""
    check_retrieval(study, kind)
    check_windows(windows)
    # One encoder per window and fold; all windows see the same permutations, so that the curve is tested as a whole.
    changes = {n: partial(cut_window, window=window, outside=outside) for n, window in enumerate(windows)}
    measured = measure_changes(study, changes, metric, what=kind.replace("_", " "))
    return make_curve(study, windows, [measured[n] for n in changes], alpha=alpha)
