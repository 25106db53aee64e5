"""Decisions while a scan runs: single-trial responses from the volumes so far, in the form in which a run learnt.

Responses are those of the run's own preprocessing, made from the volumes that are there: a live response equals the one
that `braindecode_vis.preprocessing.bold` makes of a scan that ended with the same volume.

References
----------
Mumford, Turner, Ashby, Poldrack (2012), doi:10.1016/j.neuroimage.2011.08.076: each trial against the sum of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.bold_source import GlmConfig, WindowConfig
from braindecode_vis.preprocessing.bold import find_windows
from braindecode_vis.preprocessing.glm import fit_trials, make_drifts, make_nuisance_basis, make_regressors

# --- responses from the volumes so far --------------------------------------------------------------------

_BLOCK = 64  # volumes that lie in one array


@dataclass
class ScanSoFar:
    """The volumes of one scan so far, and single-trial responses from them.

    Volumes are kept, less the first one, as single-precision blocks. A response is one weighted sum of them: the
    weights are what the run's own functions of `braindecode_vis.preprocessing` make of a scan of this length (drifts
    taken out, then the mean of a window or one model of the trial against the sum of the others), and the scale of a
    voxel is that of the volumes so far.

    Parameters
    ----------
    model
        Of the run.
    t_r
        Repetition time in s.
    settle
        For a model of the response: how long after the offset of the trial it is estimated, in s.
    start_s
        When, after the start of a volume, its samples count as taken (s).
    """

    model: GlmConfig | WindowConfig
    t_r: float
    settle: float = 10.0
    start_s: float = 0.0
    numbers: list[int] = field(default_factory=list)
    _blocks: list[np.ndarray] = field(default_factory=list, repr=False)
    _first: np.ndarray | None = field(default=None, repr=False)
    _power: np.ndarray | None = field(default=None, repr=False)

    def add(self, volume: np.ndarray, number: int) -> None:
        """Take a volume of shape (n_voxels,) in; `number` counts from 0 and leaves out those that are missing."""
        values = np.asarray(volume, np.float32)
        if self._first is None:
            self._first, self._power = values.copy(), np.zeros(len(values))
        if len(self.numbers) % _BLOCK == 0:
            self._blocks.append(np.empty((_BLOCK, len(values)), np.float32))
        row = self._blocks[-1][len(self.numbers) % _BLOCK]
        # A voxel is about a thousand and moves by a few: without the first volume, single precision is enough.
        np.subtract(values, self._first, out=row)
        assert self._power is not None
        self._power += np.square(row, dtype=np.float64)
        self.numbers.append(number)

    def find_last(self, onset: float, duration: float) -> int:
        """Return the number of the last volume that the response to a trial needs."""
        if isinstance(self.model, GlmConfig):
            return max(0, int(np.ceil((onset + duration + self.settle - self.start_s) / self.t_r - 1e-6)))
        until = onset + duration + max(self.model.stop, self.model.start) + 4 * self.t_r
        times = self.start_s + self.t_r * np.arange(max(2, int(until / self.t_r) + 4))
        window = find_windows(_make_trials([onset], [duration]), times, self.t_r, self.model)[0]
        return -1 if window is None else int(window[-1])

    def estimate(
        self, onset: float, duration: float, others: Iterable[tuple[float, float]] = ()
    ) -> tuple[np.ndarray, list[str]]:
        """Return the response to a trial, and sentences on volumes that it had to do without.

        Parameters
        ----------
        onset, duration
            Of the trial, in s.
        others
            Onsets and durations of all other trials of the scan that are known.

        Returns
        -------
        response : float32 array of shape (n_rows, n_voxels)
            One row; for a window that keeps its volumes, one for each of them.

        Raises
        ------
        DataError
            If no volume of the window is there, or the trial cannot be told from the others.
        """
        assert self._first is not None
        assert self._power is not None
        numbers = np.array(self.numbers)
        times = self.start_s + self.t_r * np.arange(numbers[-1] + 1)
        clean, notes = self.model.clean, list[str]()
        drifts = make_drifts(times, drift=clean.drift, cutoff=clean.cutoff, order=clean.order)
        basis = make_nuisance_basis(drifts[numbers])  # (n_there, rank)
        if isinstance(self.model, GlmConfig):
            weights = self._weigh_model(onset, duration, others, times, basis)
        else:
            weights, notes = self._weigh_window(onset, duration, times)
        if len(numbers) <= numbers[-1] and isinstance(self.model, GlmConfig):
            notes.append(f"{numbers[-1] + 1 - len(numbers)} volumes of the scan are missing.")
        weights = weights - (weights @ basis) @ basis.T
        # All sums over volumes in one pass: the response, the mean, and what the drifts explain.
        mean = np.full((1, len(numbers)), 1 / len(numbers))
        rows = [weights, mean, basis.T] if clean.scaling == "zscore" else [weights, mean]
        sums = self._sum_volumes(np.concatenate(rows))
        response, shift = sums[: len(weights)].astype(np.float64), sums[len(weights)].astype(np.float64)
        level = self._first + shift
        is_constant = self._power == 0
        if clean.scaling == "zscore":
            explained = np.square(sums[len(weights) + 1 :], dtype=np.float64).sum(axis=0)
            scale = np.sqrt(np.maximum(self._power - explained, 0) / len(numbers))
            usable = ~is_constant & (scale > 1e-9 * np.abs(level))
            response /= np.where(usable, scale, 1)
        elif clean.scaling == "percent":
            spread = np.sqrt(np.maximum(self._power / len(numbers) - shift**2, 0))
            usable = ~is_constant & (level > spread)
            response *= 100 / np.where(usable, level, 1)
        else:
            usable = ~is_constant
        return np.where(usable, response, 0).astype(np.float32), notes

    def _sum_volumes(self, weights: np.ndarray) -> np.ndarray:
        """Return weighted sums over the volumes so far: (n_rows, n_volumes) to (n_rows, n_voxels)."""
        weights = weights.astype(np.float32)
        total = np.zeros((len(weights), self._blocks[0].shape[1]), np.float32)
        for number, block in enumerate(self._blocks):
            here = weights[:, number * _BLOCK : (number + 1) * _BLOCK]
            total += here @ block[: here.shape[1]]
        return total

    def _weigh_window(self, onset: float, duration: float, times: np.ndarray) -> tuple[np.ndarray, list[str]]:
        assert isinstance(self.model, WindowConfig)
        window = find_windows(_make_trials([onset], [duration]), times, self.t_r, self.model)[0]
        place = {number: row for row, number in enumerate(self.numbers)}
        wanted = [] if window is None else window.tolist()
        there = [place[number] for number in wanted if number in place]
        if not there or (self.model.keep == "times" and len(there) < len(wanted)):
            raise DataError(
                f"{len(wanted) - len(there)} of the {len(wanted)} volumes of its window are missing."
            )
        notes = (
            [f"{len(wanted) - len(there)} volumes of its window are missing."]
            if len(there) < len(wanted)
            else []
        )
        single = np.zeros((len(there), len(self.numbers)))
        single[np.arange(len(there)), there] = 1
        return single.mean(axis=0, keepdims=True) if self.model.keep == "mean" else single, notes

    def _weigh_model(
        self,
        onset: float,
        duration: float,
        others: Iterable[tuple[float, float]],
        times: np.ndarray,
        basis: np.ndarray,
    ) -> np.ndarray:
        assert isinstance(self.model, GlmConfig)
        known = [(start, long) for start, long in others if start < times[-1]]
        own = make_regressors(_make_trials([onset], [duration]), times, hrf_model=self.model.hrf_model)
        courses = [own]
        if known:
            rest = _make_trials(*zip(*known, strict=True))
            courses.append(_add_regressors(rest, times, self.model.hrf_model))
        regressors = np.concatenate(courses, axis=1)[self.numbers]
        # A trial whose response has hardly begun in the others' regressor is no reason to fail.
        power = np.square(regressors).sum(axis=0)
        if len(courses) > 1 and power[1] < 1e-6 * power[0]:
            regressors = regressors[:, :1]
        elif len(courses) > 1:
            # Hundreds of others dwarf the one; its amplitude does not depend on their scale.
            regressors[:, 1] *= np.sqrt(power[0] / power[1])
        return fit_trials(np.eye(len(self.numbers)), regressors, basis, method="lss")[:1]


def _make_trials(onsets: Iterable[float], durations: Iterable[float]) -> pd.DataFrame:
    return pd.DataFrame({"onset": list(onsets), "duration": list(durations)}, dtype=float)


def _add_regressors(trials: pd.DataFrame, times: np.ndarray, hrf_model: str) -> np.ndarray:
    """Return the sum of the expected courses of trials, shape (n_volumes, 1), in one convolution."""
    from nilearn.glm.first_level import compute_regressor

    condition = np.stack([trials["onset"], trials["duration"], np.ones(len(trials))])
    return np.asarray(compute_regressor(condition, hrf_model, times)[0][:, :1])
