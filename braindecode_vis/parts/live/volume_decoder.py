"""Decisions while a scan runs: single-trial responses from the volumes so far, in the form in which a run learnt.

Responses are those of the run's own preprocessing, made from the volumes that are there: a live response equals the one
that `braindecode_vis.preprocessing.bold` makes of a scan that ended with the same volume.

References
----------
Mumford, Turner, Ashby, Poldrack (2012), doi:10.1016/j.neuroimage.2011.08.076: each trial against the sum of the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json
from braindecode_vis.datasets.bids.fmri_dataset import BoldSettings
from braindecode_vis.datasets.sources.bold_source import GlmByVoxelConfig, GlmConfig, WindowConfig
from braindecode_vis.parts.live.evidence import Evidence
from braindecode_vis.parts.live.judge import Judge, MarkerDecoder
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Marker, StreamInfo
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.preprocessing.bold import find_windows
from braindecode_vis.preprocessing.glm import fit_trials, make_drifts, make_nuisance_basis, make_regressors
from braindecode_vis.preprocessing.parcellation import average_parcels
from braindecode_vis.preprocessing.voxel_geometry import read_geometry

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
            If no volume of the window is there, or the trial cannot be distinguished from the others.
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


# --- decisions --------------------------------------------------------------------------------------------


@dataclass
class _Trial:
    """A marker whose volumes are not all there."""

    marker: Marker
    last: int


class VolumeDecoder(MarkerDecoder):
    """Decodes a scan while it runs with a finished run of fMRI; a `StreamDecoder`.

    A run whose responses are windows averages the same windows. A run of a model of the response estimates each trial
    against the sum of the others (LSS), `settle` s after its picture was gone: also where the run put all trials into
    one model (LSA) or modelled the noise as autoregressive, which needs the whole scan.

    Parameters
    ----------
    run
        A finished run, or its folder.
    gallery, fold, subject, session, n_top
        As in `Judge`.
    events
        Markers that show an image, and its id: a mapping or a file of such pairs. By default every marker does.
    repetitions
        Whether the evidence of markers of the same value adds up.
    settle
        For a model of the response: how long after the offset of a picture its trial is decided, in s.
    duration
        How long a picture is shown, in s; by default the median of the run's trials.
    reconstruct
        Whether images are made; each comes later, as a second `Decision` of the same number.
    """

    def __init__(
        self,
        run: FinishedRun | str | Path,
        *,
        gallery: Any = None,
        fold: int | None = None,
        subject: str | None = None,
        session: str = "live",
        events: Mapping[str, str] | str | Path | None = None,
        n_top: int = 5,
        repetitions: bool = False,
        settle: float = 10.0,
        duration: float | None = None,
        reconstruct: bool = False,
    ) -> None:
        judge = Judge(run, gallery, fold, subject, session, n_top)
        own = judge.own
        if own.dims[1] not in ("voxel", "parcel"):
            raise ConfigError(
                f"{judge.run.folder.path} learnt from trials of {' x '.join(own.dims[1:])}, not from voxels; choose a "
                "run of fMRI."
            )
        super().__init__(judge, events, repetitions=repetitions, reconstruct=reconstruct)
        self._settle = settle
        several = own.coords.get("subjects")
        self.geometry = read_geometry(own, self.judge.subject if several else None)
        if self.geometry.mask is None:
            raise DataError(
                f"{self.run.folder.path} has no voxel positions (a surface, or betas without a mask), so "
                "no scan can be decoded; make a run of volumes with a mask."
            )
        dataset = self.run.config.dataset
        model = getattr(dataset, "model", None)
        # A scan that is not over has no model of its voxels; the shared part of the model is a fixed response.
        self.model: GlmConfig | WindowConfig = (
            model if isinstance(model, GlmConfig | WindowConfig) else GlmConfig()
        )
        self.notes = _describe_differences(dataset, self.model)
        meta = read_json(preprocess(self.run).artifact.path / "responses" / "meta.json").get("provenance", {})
        found = meta.get("t_r")
        self.t_r: float | None = (
            float(found) if isinstance(found, int | float) else getattr(dataset, "t_r", None)
        )
        shown = float(own.trials["duration"].median()) if "duration" in own.trials else 1.0
        self.duration = shown if duration is None else duration

    def open(self, info: StreamInfo) -> Sequence[str]:
        """Get ready for a scan; see `StreamDecoder`.

        Raises
        ------
        DataError
            If it is no fMRI, or has another repetition time than the run.
        """
        if info.modality != "fmri":
            raise DataError(
                f"the stream {info.name} is {info.modality.upper()}, but the run uses fMRI; choose another."
            )
        t_r = 1 / info.sfreq
        if self.t_r is not None and abs(t_r / self.t_r - 1) > 1e-3:
            raise DataError(
                f"the stream {info.name} has a repetition time of {t_r:g} s, but the run learnt from {self.t_r:g} s."
            )
        self._info, self.scan = info, ScanSoFar(self.model, t_r, self._settle)
        if isinstance(self.model, GlmConfig):
            # What it needs takes seconds to import, which the first trial should not wait for.
            make_regressors(
                _make_trials([0.0], [self.duration]), t_r * np.arange(20), hrf_model=self.model.hrf_model
            )
        self._trials: list[_Trial] = []
        self._onsets: list[tuple[float, float]] = []
        self._seen: set[tuple[str, int]] = set()
        notes = [*self.notes]
        if self.t_r is None:
            notes.append(f"The run has no repetition time; that of the scan is {t_r:g} s.")
        if not info.markers:
            notes.append(
                "No events were given: nothing is decoded until markers come; give a table of events with --markers."
            )
        return [*notes, *self._begin(Evidence(), averages=True)]

    def feed(self, chunk: Chunk) -> Iterable[Decision | str]:
        """Take volumes in, and yield decisions and sentences; see `StreamDecoder`."""
        arrived = chunk.arrived or time.perf_counter()
        yield from self._take_finished()
        yield from self._take_markers(chunk.markers)
        for column, when in enumerate(chunk.times):
            volume = np.asarray(chunk.samples)[:, column]
            if len(volume) != self.geometry.n_voxels:
                raise DataError(
                    f"the stream {self._info.name} sent {len(volume)} voxels, but the run has "
                    f"{self.geometry.n_voxels}; read the volumes through the mask of the run."
                )
            number = round(float(when) / self.scan.t_r)
            if not np.isfinite(volume).all():
                yield f"Volume {number + 1} has values that are not numbers; it is left out."
                continue
            if self.scan.numbers and number <= self.scan.numbers[-1]:
                yield f"A volume of {when:g} s came after one of {self.scan.t_r * self.scan.numbers[-1]:g} s; left out."
                continue
            self.scan.add(volume, number)
        yield from self._decide_ready(arrived)

    def flush(self) -> Iterable[Decision | str]:
        """The scan is over: name every trial whose volumes never came."""
        there = self.scan.numbers[-1] if self.scan.numbers else -1
        for trial in self._trials:
            yield self._lose(
                trial.marker, f"end: the scan ended {trial.last - there} volumes before its last one"
            )
        self._trials = []
        yield from self._finish_images()

    def _take_markers(self, markers: Sequence[Marker]) -> Iterator[Decision | str]:
        for marker in markers:
            value = str(marker.value).strip()
            if self._events is not None and value not in self._events:
                yield from self._tell_once(
                    f"The marker {value!r} is not among the events, so it is not decoded."
                )
                continue
            key = value, round(marker.time * 1000)
            if key in self._seen:
                yield from self._tell_once(
                    f"The marker {value!r} at {marker.time:g} s came twice; it is decoded once."
                )
                continue
            self._seen.add(key)
            if self._find_shown(value) is None:
                yield from self._tell_once(
                    f"The marker {value!r} has no picture in the gallery, or one of a calibration block: "
                    "such markers are decoded, but not scored.",
                    "no picture",
                )
            last = self.scan.find_last(marker.time, self.duration)
            if last < 0 or not np.isfinite(marker.time):
                yield self._lose(marker, "start: its window opens before the scan")
                continue
            self._onsets.append((float(marker.time), self.duration))
            self._trials.append(_Trial(marker, last))

    def _decide_ready(self, arrived: float) -> Iterator[Decision | str]:
        there = self.scan.numbers[-1] if self.scan.numbers else -1
        ready = [trial for trial in self._trials if trial.last <= there]
        self._trials = [trial for trial in self._trials if trial.last > there]
        for trial in ready:
            began = time.perf_counter()
            others = [one for one in self._onsets if one[0] != trial.marker.time]
            try:
                rows, notes = self.scan.estimate(trial.marker.time, self.duration, others)
            except DataError as error:
                yield self._lose(trial.marker, f"volumes: {error}")
                continue
            yield from self._decide_trial(
                self.shape_response(rows), trial.marker, onset=trial.marker.time, notes=notes, began=began,
                arrived=arrived,
            )  # fmt: skip

    def shape_response(self, rows: np.ndarray) -> np.ndarray:
        """Return a response of `ScanSoFar.estimate` as the run stored its own, before it was standardised."""
        keeps_times = isinstance(self.model, WindowConfig) and self.model.keep == "times"
        block = rows.T[None] if keeps_times else rows  # (1, n_voxels, n_times) or (n_rows, n_voxels)
        if self.geometry.parcels is not None:
            block = average_parcels(block, self.geometry.parcels)
        missing = self.judge.own.data.shape[1] - block.shape[1]
        return np.pad(block, [(0, 0), (0, missing), *[(0, 0)] * (block.ndim - 2)]) if missing > 0 else block

    def describe(self) -> Mapping[str, Any]:
        """Return the facts of this session; see `StreamDecoder`."""
        model = self.model
        words = (
            f"each trial against the sum of the others, {self._settle:g} s after its picture"
            if isinstance(model, GlmConfig)
            else f"window from {model.start:g} s after the onset to {model.stop:g} s after the {model.until}"
        )
        return {
            **self.judge.describe("single trials", f"{words}, from the volumes so far"),
            "stream": self._info.name, "modality": "fmri", "sfreq": self._info.sfreq,
            "stream_sfreq": self._info.sfreq, "t_r": self.scan.t_r, "tmin": 0.0, "tmax": 0.0, "n_times": 1,
            "n_voxels": self.geometry.n_voxels, "ch_names": [], "ch_pos": None, "delay_ms": 0.0, "every": None,
            "repetitions": self._repetitions, "reconstructs": self._reconstructor is not None, "interpolated": [],
        }  # fmt: skip


def _describe_differences(dataset: Any, model: GlmConfig | WindowConfig) -> list[str]:
    """Return sentences on what the run did to its scans that cannot be done to one that is not over."""
    notes = []
    if not isinstance(dataset, BoldSettings):
        notes.append(
            "The responses of the run were not estimated by this package; here each trial is estimated "
            "against the sum of the others, in percent of the mean, from the volumes so far."
        )
    elif isinstance(dataset.model, GlmByVoxelConfig):
        notes.append(
            "The run chose response function, noise components and ridge penalty of each voxel; here every voxel has "
            "the canonical response, and each trial is fitted against the sum of the others."
        )
    elif isinstance(model, GlmConfig):
        if model.trials == "lsa":
            notes.append(
                "The run fitted all trials of a scan in one model; here each trial is fitted against the "
                "sum of the others."
            )
        if model.noise_model == "ar1":
            notes.append("The run modelled autoregressive noise; here noise is assumed to be white.")
    confounds = getattr(dataset, "confounds", None)
    if confounds is not None and (confounds.strategy or confounds.columns):
        notes.append(
            "The run regressed out confounds, but a running scan has none; only drifts are regressed out here."
        )
    if isinstance(dataset, BoldSettings):
        notes.append(
            "Drifts and the scale of a voxel are computed from the volumes so far; in the run they come "
            "from whole scans."
        )
    return notes
