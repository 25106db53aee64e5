"""Parts of a trial: windows of time, and sets of channels, parcels or voxels.

Owns cutting responses, or setting everything else to zero for encoders whose input must keep its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.preprocessing.voxel_geometry import select_features, select_own_features

Outside = Literal["cut", "zero"]
Features = np.ndarray | Mapping[str, np.ndarray]


class TimedAnalysis(Analysis):
    """An analysis of a span of time.

    Parameters
    ----------
    tmin, tmax
        Windows are between these times, in s; None is the end of the trial. Windows before the onset show whether
        chance holds.
    """

    tmin: float | None = None
    tmax: float | None = None


class ShortWindows(TimedAnalysis):
    """An analysis in short windows that slide over the trial.

    Parameters
    ----------
    width, step
        Width and step of the windows in s (a choice of ours, for event-related potentials).
    """

    width: float = Field(default=0.04, gt=0)
    step: float = Field(default=0.02, gt=0)


class CutAnalysis(Analysis):
    """An analysis that fits and tests encoders on a part of each trial.

    Parameters
    ----------
    outside
        ``cut`` leaves out what lies outside of the part; ``zero`` sets it to zero, for networks that need one size.
    """

    outside: Outside = "cut"


@dataclass(frozen=True)
class Window:
    """Samples ``first`` up to, without, ``last``; they cover `start` to `stop` in s, the last sample's duration
    included.
    """

    first: int
    last: int
    start: float
    stop: float

    @property
    def centre(self) -> float:
        """Middle of the window in s."""
        return (self.start + self.stop) / 2


def read_times(responses: Responses) -> tuple[np.ndarray, float]:
    """Return the times in s and the interval between them.

    Raises
    ------
    DataError
        If trials have no time axis, or fewer than two samples.
    """
    if "time" not in responses.dims or "times" not in responses.coords:
        raise DataError(
            f"this analysis needs trials with a time axis, but these have {', '.join(responses.dims[1:])}; it is made "
            "for EEG, MEG and fMRI time courses."
        )
    times = np.asarray(responses.coords["times"], float)
    if len(times) < 2:
        raise DataError("this analysis needs at least two samples in time.")
    return times, float(np.median(np.diff(times)))


def make_sliding_windows(
    responses: Responses, width: float, step: float, tmin: float | None, tmax: float | None
) -> list[Window]:
    """Return windows of equal numbers of samples.

    Parameters
    ----------
    width, step
        In s; rounded to samples, at least one.
    tmin, tmax
        The windows lie inside; None is the end of the trial.
    """
    times, interval = read_times(responses)
    n_width, n_step = max(1, round(width / interval)), max(1, round(step / interval))
    first, last = _find_range(times, interval, tmin, tmax)
    if last - first < n_width:
        raise ConfigError(
            f"windows of {width:g} s do not fit into {times[first]:g} to {times[last - 1]:g} s; choose a smaller width."
        )
    return [_make_window(times, interval, n, n + n_width) for n in range(first, last - n_width + 1, n_step)]


def match_window(responses: Responses, window: Window | None) -> Responses | None:
    """Return the samples of another recording in the time of a window; None if it has none there.

    A recording without time, or with samples further apart than the window is long (volumes), stays whole.
    """
    if window is None or "time" not in responses.dims:
        return responses
    times, interval = read_times(responses)
    if interval > window.stop - window.start:
        return responses
    # A sample lasts until the next one.
    first, last = np.searchsorted(times + interval / 2, [window.start, window.stop]).tolist()
    return None if first == last else cut_window(responses, _make_window(times, interval, first, last))


def make_growing_windows(responses: Responses, step: float, start: float, tmax: float | None) -> list[Window]:
    """Return windows that all begin at `start` and end one `step` later each."""
    times, interval = read_times(responses)
    n_step = max(1, round(step / interval))
    first, last = _find_range(times, interval, start, tmax)
    return [_make_window(times, interval, first, n) for n in range(first + n_step, last + 1, n_step)]


def _find_range(
    times: np.ndarray, interval: float, tmin: float | None, tmax: float | None
) -> tuple[int, int]:
    slack = 1e-6 * interval  # times are sums of rounded intervals
    inside = np.ones(len(times), bool)
    if tmin is not None:
        inside &= times >= tmin - slack
    if tmax is not None:
        # A sample lasts until the next one, so it ends one interval after its time.
        inside &= times + interval <= tmax + interval / 2 + slack
    if not inside.any():
        raise ConfigError(
            f"no sample lies between {tmin} and {tmax} s; trials have {times[0]:g} to {times[-1]:g} s."
        )
    found = np.flatnonzero(inside)
    return int(found[0]), int(found[-1]) + 1


def _make_window(times: np.ndarray, interval: float, first: int, last: int) -> Window:
    return Window(first, last, float(times[first]), float(times[last - 1] + interval))


def cut_window(responses: Responses, window: Window, outside: Outside = "cut") -> Responses:
    """Return the samples of a window; with ``zero``, the whole trial with all other samples set to zero.

    Parameters
    ----------
    outside
        ``zero`` keeps the shape, for networks that are made for one length.
    """
    axis = responses.dims.index("time")
    index = (*[slice(None)] * axis, slice(window.first, window.last))  # only these are read from the disk
    inside = np.asarray(responses.data[index])
    if outside == "zero":
        data = np.zeros(responses.data.shape, inside.dtype)
        data[index] = inside
        return replace(responses, data=data)
    times = np.asarray(responses.coords["times"])[window.first : window.last]
    return replace(responses, data=inside, coords={**responses.coords, "times": times})


def keep_features(responses: Responses, keep: Features, outside: Outside = "cut") -> Responses:
    """Return some channels, parcels or voxels; with ``zero``, all of them with the others set to zero.

    Parameters
    ----------
    keep
        Boolean, one entry per feature; or one such array per subject where subjects have voxels of their own.
    """
    if isinstance(keep, Mapping):
        return _keep_own(responses, keep, outside)
    if outside == "zero":
        shape = (1, len(keep), *[1] * (responses.data.ndim - 2))  # against (n_trials, n_features, ...)
        return replace(responses, data=np.asarray(responses.data) * keep.reshape(shape))
    return select_features(responses, keep)


def _keep_own(responses: Responses, keep: Mapping[str, np.ndarray], outside: Outside) -> Responses:
    if outside == "cut":
        return select_own_features(responses, keep)
    counts, data = count_own_voxels(responses), np.array(responses.data)
    subjects = responses.trials["subject"].astype(str).to_numpy()
    for subject, chosen in keep.items():
        lost = np.flatnonzero(~chosen)
        data[np.ix_(subjects == subject, lost)] = 0
        assert len(chosen) == counts[subject]
    return replace(responses, data=data)
