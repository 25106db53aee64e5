"""fMRI time series to single-trial responses, streamed run by run.

Defines the order of the steps: volumes are read one after the other and masked immediately, drifts and confounds are
regressed out, each voxel is scaled, and a model or a window gives one response per trial. The next steps (standardising
with training trials, parcels, writing) are those of all fMRI data sets. Only one masked run is in memory at a time. A
model that is chosen by voxel reads the runs of a person twice: once into a temporary file, to choose, and once to
estimate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Progress
from braindecode_vis.datasets.sources.betas_source import (
    BetasPart,
    FmriSource,
    Geometry,
    count_repetitions,
    join_geometries,
)
from braindecode_vis.datasets.sources.bold_source import (
    BoldRun,
    BoldSource,
    CleanConfig,
    GlmByVoxelConfig,
    GlmConfig,
    ModelConfig,
    WindowConfig,
)
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, VolumeHeader
from braindecode_vis.preprocessing.array_file import KeptParts
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.glm import (
    fit_trials,
    fit_trials_ar1,
    make_drifts,
    make_nuisance_basis,
    make_regressors,
    remove_nuisance,
)
from braindecode_vis.preprocessing.glm_by_voxel import (
    RunModel,
    VoxelChoices,
    choose_by_voxel,
    estimate_by_choices,
)
from braindecode_vis.preprocessing.learnt_statistics import CHOICES, LearntStatistics
from braindecode_vis.preprocessing.signal_damage import DamageWatch, make_watch, settle_missing

_BLOCK_VOXELS = 8192
_BLOCK_VOLUMES = 16
_PERCENT_ONLY = "set dataset.model.kind to glm with clean.scaling zscore or none"
_UNITS = {"percent": "percent signal change", "zscore": "z", "none": "scanner units"}


@runtime_checkable
class BoldDataset(Protocol):
    """A data set configuration that describes time series."""

    def open_bold(self) -> BoldSource:
        """Return the lazy source."""
        ...


def write_bold(
    config: BoldDataset,
    folder: Path,
    *,
    progress: Progress | None = None,
    learnt: LearntStatistics | None = None,
    transductive: bool = False,
    geometry: Geometry | Mapping[str, Geometry] | None = None,
    parts: Path | None = None,
) -> dict[str, Any]:
    """Read a data set of time series and write responses and stimuli below `folder`.

    Parameters
    ----------
    config
        Configuration of the data set.
    folder
        Folder for ``responses`` and ``stimuli``; created if needed.
    progress
        As in `write_fmri`.
    learnt, transductive
        As in `write_fmri`.
    geometry
        Voxels of a finished run, used instead of a mask from these images.
    parts
        As in `write_fmri`.

    Returns
    -------
    summary
        As `write_fmri_source` gives it.

    Raises
    ------
    DataError
        If an image is damaged, a voxel is not finite, or a trial cannot be estimated; the message names the run.
    """
    source = config.open_bold()
    if geometry is not None and isinstance(source.geometry, str):
        source = replace(source, geometry=geometry)
    watch = make_watch(config)
    settle_missing(config, source.runs, watch)
    betas = make_betas(source, watch, folder=folder, parts=parts, learnt=learnt)
    summary = write_fmri_source(
        betas,
        folder,
        progress=progress,
        learnt=learnt,
        transductive=transductive,
        watch=watch,
        parts=parts,
    )
    for subject, read in {part.group[0]: part.read for part in betas.parts}.items():
        if isinstance(read, _RunReader) and read.person is not None:
            # For new scans of the person.
            read.person.choices.write(folder / "responses" / f"{CHOICES}{subject}.npz")
    return summary


def make_betas(
    source: BoldSource,
    watch: DamageWatch | None = None,
    *,
    folder: Path | None = None,
    parts: Path | None = None,
    learnt: LearntStatistics | None = None,
) -> FmriSource:
    """Return single-trial responses that are computed when they are read.

    Parameters
    ----------
    source
        Describes the runs.
    watch
        Checks the volumes.
    folder
        Holds temporary files; by default the system's own place.
    parts, learnt
        As in `write_bold`.
    """
    source = leave_out_late_trials(source)
    geometry = source.geometry if not isinstance(source.geometry, str) else find_geometry(source)
    constant: dict[str, int] = {}
    pieces, readers = [], []
    for run in source.runs:
        own = geometry if isinstance(geometry, Geometry) else geometry[run.subject]
        trials, rows = _plan_rows(run, source.model)
        readers.append(_RunReader(run, own, source, rows, constant, watch or DamageWatch()))
        pieces.append(BetasPart(trials, run.files, own.n_voxels, readers[-1], is_computed=True))
    about: dict[str, Any] = {}
    if isinstance(source.model, GlmByVoxelConfig):
        about = _choose_later(readers, source.model, folder, KeptParts(parts), learnt)
        about["warnings"] = [*source.notes.get("warnings", ()), *about["warnings"]]
    times = _find_times(source)
    # A scan that is decoded while it runs must have the repetition time of the run.
    steps = sorted({run.t_r for run in source.runs})
    notes = {
        "constant_voxels_by_run": constant,
        "t_r": steps[0] if len(steps) == 1 else steps,
        **source.notes,
        **about,
    }
    scaling = "percent" if isinstance(source.model, GlmByVoxelConfig) else source.model.clean.scaling
    unit = _UNITS[scaling]
    return FmriSource(
        tuple(pieces), source.stimuli, source.plan, unit, geometry, times, source.read_image, notes
    )


# --- rows -------------------------------------------------------------------------------------------------


def leave_out_late_trials(source: BoldSource) -> BoldSource:
    """Return the source without trials whose window extends beyond their run; a model has no windows.

    Raises
    ------
    DataError
        If they are more than `max_dropped` of all trials; the message names the first of them.
    """
    model = source.model
    if not isinstance(model, WindowConfig):
        return source
    lost = [
        [
            n
            for n, window in enumerate(find_windows(run.trials, run.frame_times, run.t_r, model))
            if window is None
        ]
        for run in source.runs
    ]
    n_lost, n_trials = sum(map(len, lost)), sum(len(run.trials) for run in source.runs)
    if not n_lost:
        return source
    # Sets of fewer than a hundred trials may lose one too.
    if n_lost > (max(1.0, model.max_dropped * n_trials) if model.max_dropped else 0):
        run, rows = next((run, rows) for run, rows in zip(source.runs, lost, strict=True) if rows)
        trial = run.trials.iloc[rows[0]]
        raise DataError(
            f"{run.where}: {len(rows)} of {len(run.trials)} trials have no volume in their window or "
            f"extend beyond the run, first {trial['stimulus_id']} at {trial['onset']:g} s, whose window opens at "
            f"{trial['onset'] + model.start:g} s; the run lasts from {run.frame_times[0]:g} to "
            f"{run.frame_times[-1]:g} s. In all runs these are {n_lost} of {n_trials} trials, more than "
            f"dataset.model.max_dropped ({model.max_dropped:g}): shift or shorten the window with dataset.model.start "
            "and dataset.model.stop, or increase dataset.model.max_dropped."
        )
    kept = [
        run.trials.drop(index=run.trials.index[rows]).reset_index(drop=True)
        for run, rows in zip(source.runs, lost, strict=True)
    ]
    runs = [
        replace(run, trials=trials)
        for run, trials in zip(source.runs, count_repetitions(kept), strict=True)
        if len(trials)
    ]
    told = {run.image.name: len(rows) for run, rows in zip(source.runs, lost, strict=True) if rows}
    protocol = f"{n_lost} of {n_trials} trials left out, whose window reaches beyond their run"
    if "protocol" in source.notes:
        protocol = f"{source.notes['protocol']}; {protocol}"
    notes = {**source.notes, "protocol": protocol, "late_trials_left_out": told}
    return replace(source, runs=tuple(runs), notes=notes)


def _plan_rows(run: BoldRun, model: ModelConfig) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Return the trial table of the store, and the volumes that each row averages (none for a model)."""
    if not isinstance(model, WindowConfig):
        return run.trials, []
    found = find_windows(run.trials, run.frame_times, run.t_r, model)
    windows = [window for window in found if window is not None]
    if model.keep != "volumes":
        return run.trials, windows
    counts = [len(window) for window in windows]
    trials = run.trials.loc[np.repeat(np.arange(len(run.trials)), counts)].reset_index(drop=True)
    volumes = np.concatenate(windows)
    after = run.frame_times[volumes] - trials["onset"].to_numpy(float)
    return trials.assign(volume=volumes, time=after), [np.array([volume]) for volume in volumes]


def find_windows(
    trials: pd.DataFrame, times: np.ndarray, t_r: float, model: WindowConfig
) -> list[np.ndarray | None]:
    """Return the volumes in the window of each trial; None if the window reaches beyond the run.

    Parameters
    ----------
    trials
        `onset` and `duration` in s.
    times : array of shape (n_volumes,)
        Of the volumes, in s.
    t_r
        Repetition time in s.
    """
    onsets = trials["onset"].to_numpy(float)
    if model.keep == "times":
        # The first volume at or after the window opens; times that are equal but for rounding count as equal.
        n, first = _count_times(t_r, model), np.searchsorted(times, onsets + model.start - 1e-6)
        fits = (onsets + model.start >= times[0] - 0.5 * t_r) & (first + n <= len(times))
        return [np.arange(start, start + n) if fit else None for start, fit in zip(first, fits, strict=True)]
    ends = onsets + model.stop
    if model.until == "offset":
        ends = ends + trials["duration"].to_numpy(float)
    windows = [
        np.flatnonzero((times >= low - 1e-6) & (times < high - 1e-6))
        for low, high in zip(onsets + model.start, ends, strict=True)
    ]
    return [window if len(window) else None for window in windows]


def _count_times(t_r: float, model: WindowConfig) -> int:
    return max(1, round((model.stop - model.start) / t_r))


def _find_times(source: BoldSource) -> np.ndarray | None:
    model = source.model
    if not isinstance(model, WindowConfig) or model.keep != "times":
        return None
    steps = {run.t_r for run in source.runs}
    if len(steps) > 1:
        raise DataError(f"runs with the repetition times {sorted(steps)} s have no common time axis.")
    t_r = steps.pop()
    return model.start + t_r * np.arange(_count_times(t_r, model))


# --- one run ----------------------------------------------------------------------------------------------


@dataclass
class _RunReader:
    """Computes the responses of a run when the first ones are needed, and releases them after the last."""

    run: BoldRun
    geometry: Geometry
    source: BoldSource
    windows: list[np.ndarray]
    constant: dict[str, int]
    watch: DamageWatch
    person: _Person | None = field(default=None, repr=False)
    values: np.ndarray | None = field(default=None, repr=False)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if self.values is None:
            self.values = self._compute()
        block = self.values[start:stop]
        if stop >= len(self.values):  # parts are read once, in order
            self.values = None
        return block

    def _compute(self) -> np.ndarray:
        run, model = self.run, self.source.model
        assert self.geometry.mask is not None
        series = read_series(run, self.geometry.mask)
        look_at_volumes(run, series, self.watch)
        self._check_constant(series)
        if self.person is not None:
            centred, _ = self.centre(series)
            return estimate_by_choices(centred, self.design, self.person.choices)
        assert not isinstance(model, GlmByVoxelConfig)
        basis = _make_basis(run, model)
        regressors = None
        if isinstance(model, GlmConfig):
            regressors = make_regressors(run.trials, run.frame_times, hrf_model=model.hrf_model)
        n_rows = len(run.trials) if regressors is not None else len(self.windows)
        shape: tuple[int, ...] = (n_rows, series.shape[1])
        if isinstance(model, WindowConfig) and model.keep == "times":
            shape = (*shape, len(self.windows[0]))
        out = np.empty(shape, np.float32)
        # float64 for the fit, a few thousand voxels at a time: the run itself stays float32.
        for start in range(0, series.shape[1], _BLOCK_VOXELS):
            here = slice(start, start + _BLOCK_VOXELS)
            block = clean_series(series[:, here].astype(np.float64), basis, model.clean, where=run.where)
            if regressors is not None:
                assert isinstance(model, GlmConfig)
                with _naming(run):
                    fit = fit_trials_ar1 if model.noise_model == "ar1" else fit_trials
                    out[:, here] = fit(block, regressors, basis, method=model.trials)
            elif len(shape) == 3:
                # (n_times of the window, n_voxels) -> (n_trials, n_voxels, n_times)
                out[:, here] = np.stack([block[window].T for window in self.windows])
            else:
                out[:, here] = np.stack([block[window].mean(axis=0) for window in self.windows])
        return out

    @cached_property
    def design(self) -> RunModel:
        """What a model that is chosen by voxel knows of the run."""
        run, model = self.run, self.source.model
        with _naming(run):
            return RunModel.make(
                run.trials, run.frame_times, _make_drifts(run, model), _make_basis(run, model)
            )

    def centre(self, series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return series of the run less the mean of each voxel, which replaces them, and that mean, 0 if unusable."""
        mean = series.mean(axis=0, dtype=np.float64)
        is_constant = series.max(axis=0) == series.min(axis=0)
        series -= mean.astype(np.float32)
        usable = _find_usable(mean, series.std(axis=0), is_constant, self.run.where, _PERCENT_ONLY)
        return series, np.where(usable, mean, 0)

    def _check_constant(self, series: np.ndarray) -> None:
        n = int((series.max(axis=0) == series.min(axis=0)).sum())
        if n > self.source.max_constant * series.shape[1]:
            raise DataError(
                f"{self.run.where}: {n} of the {series.shape[1]} voxels of the mask never change, above the bound of "
                f"{self.source.max_constant:.0%}: the mask reaches outside the image; set dataset.mask to varying."
            )
        if n:
            self.constant[self.run.image.name] = n


@dataclass
class _Person:
    """The runs of one person, over which a model is chosen for each voxel when the first responses are needed.

    Parameters
    ----------
    readers
        Of the runs from which it is chosen.
    denoise, ridge
        As in `choose_by_voxel`.
    name
        Label of the person.
    folder
        Holds the series while the model is chosen.
    kept
        Keeps the choices for a call that continues after a kill.
    """

    readers: Sequence[_RunReader]
    denoise: bool
    ridge: bool
    name: str
    folder: Path | None
    kept: KeptParts

    @cached_property
    def choices(self) -> VoxelChoices:
        """What was chosen; it is computed once."""
        name = f"choices {self.name}"
        if (found := self.kept.read(name)) is not None:
            return VoxelChoices.from_arrays(found)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            choices = self._choose(Path(scratch))
        self.kept.write(name, **vars(choices))
        return choices

    def _choose(self, scratch: Path) -> VoxelChoices:
        files, models = [], [reader.design for reader in self.readers]
        total = np.zeros(self.readers[0].geometry.n_voxels)
        usable = np.ones(len(total), bool)
        n_volumes = sum(reader.run.n_volumes for reader in self.readers)
        for number, reader in enumerate(self.readers):
            assert reader.geometry.mask is not None
            series, mean = reader.centre(read_series(reader.run, reader.geometry.mask))
            total += mean * (len(series) / n_volumes)
            usable &= mean != 0
            np.save(scratch / f"{number}.npy", series, allow_pickle=False)
            files.append(np.load(scratch / f"{number}.npy", mmap_mode="r", allow_pickle=False))
        mean = np.where(usable, total, 0).astype(np.float32)
        with _naming(self.readers[0].run):
            return choose_by_voxel(
                models,
                lambda number, voxels: files[number][:, voxels],
                mean,
                denoise=self.denoise,
                ridge=self.ridge,
            )


def _choose_later(
    readers: Sequence[_RunReader],
    model: GlmByVoxelConfig,
    folder: Path | None,
    kept: KeptParts,
    learnt: LearntStatistics | None,
) -> dict[str, Any]:
    """Give each reader the person whose model it estimates with, and return notes for readers of the store."""
    tests = {id(reader): (reader.run.trials["split"] == "test").any() for reader in readers}
    if model.per_split and not any(tests.values()):
        raise DataError(
            "dataset.model.per_split keeps the choice of the model inside training runs, but the data set declares no "
            "test trial, so every run is a training run; declare test trials (for example with dataset.test_sessions), "
            "or set it to false."
        )
    warnings = []
    for subject in dict.fromkeys(reader.run.subject for reader in readers):
        own = [reader for reader in readers if reader.run.subject == subject]
        chosen = [reader for reader in own if not (model.per_split and tests[id(reader)])]
        if not chosen:
            raise DataError(
                f"subject {subject} has test trials in all {len(own)} runs, so dataset.model.per_split leaves none to "
                "choose from; set it to false, or declare whole runs or sessions as test."
            )
        person = _Person(chosen, model.denoise, model.ridge, subject, folder, kept)
        known = learnt.choices.get(subject) if learnt is not None else None
        n_voxels, told = own[0].geometry.n_voxels, "estimated with a model that these scans themselves chose"
        if known is not None and len(known.mean) == n_voxels:
            person.choices = known
            told = "estimated with the model that the run chose for each voxel"
        elif (model.denoise or model.ridge) and not _repeats(chosen):
            person.denoise = person.ridge = False
            warnings.append(
                f"Subject {subject}: no picture recurs in another {'training ' if model.per_split else ''}run, so "
                "noise components and ridge penalties cannot be chosen; estimates have only the response function of "
                "each voxel."
            )
        if learnt is not None:
            learnt.used[f"subject {subject}"] = told
        for reader in own:
            reader.person = person
    runs = "runs without test trials" if model.per_split else "all runs of a person, test trials included"
    return {"estimates": f"single-trial estimates by models chosen by voxel in {runs}", "warnings": warnings}


def _repeats(readers: Sequence[_RunReader]) -> bool:
    shown = pd.concat([pd.Series(reader.run.trials["stimulus_id"].unique()) for reader in readers])
    return bool(shown.duplicated().any())


@contextmanager
def _naming(run: BoldRun) -> Iterator[None]:
    """Put the run in front of the sentence of an error."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{run.where}: {error}") from error


def _make_drifts(run: BoldRun, model: ModelConfig) -> np.ndarray:
    if isinstance(model, GlmByVoxelConfig):
        # GLMsingle's rule: half as many degrees as the run has minutes, halves rounded up.
        order = int(np.floor(run.n_volumes * run.t_r / 120 + 0.5))
        return make_drifts(run.frame_times, drift="polynomial", order=order)
    clean = model.clean
    return make_drifts(run.frame_times, drift=clean.drift, cutoff=clean.cutoff, order=clean.order)


def _make_basis(run: BoldRun, model: ModelConfig) -> np.ndarray:
    """Return the nuisance regressors of a run: drifts, confounds and, in a model, events that are not trials."""
    pieces = [_make_drifts(run, model), run.confounds]
    # Events that are no trials (blanks, responses) have responses of their own, one regressor a kind.
    if not isinstance(model, WindowConfig):
        hrf_model = model.hrf_model if isinstance(model, GlmConfig) else "glover"
        for _, events in run.others.groupby("trial_type"):
            pieces.append(
                make_regressors(events, run.frame_times, hrf_model=hrf_model).sum(axis=1, keepdims=True)
            )
    basis = make_nuisance_basis(np.concatenate(pieces, axis=1))
    if basis.shape[1] > 0.8 * run.n_volumes:
        raise DataError(
            f"{run.where}: {basis.shape[1]} drifts and confounds are too many for {run.n_volumes} volumes; use fewer."
        )
    return basis


def clean_series(series: np.ndarray, basis: np.ndarray, clean: CleanConfig, *, where: str) -> np.ndarray:
    """Remove drifts and confounds from time series and scale them.

    Parameters
    ----------
    series : float64 array of shape (n_volumes, n_voxels)
    basis : array of shape (n_volumes, rank)
        Orthonormal; holds the constant.
    clean
        How to scale. A percentage refers to the voxel's mean over the run.
    where
        Which run, for messages.

    Returns
    -------
    cleaned : float64 array of shape (n_volumes, n_voxels)
        Constant voxels are 0.
    """
    mean = series.mean(axis=0)
    is_constant = series.max(axis=0) == series.min(axis=0)
    rest = remove_nuisance(series, basis)
    if clean.scaling == "none":
        return np.where(is_constant, 0, rest)
    if clean.scaling == "zscore":
        scale = rest.std(axis=0)
        unusable = is_constant | (scale <= 1e-9 * np.abs(mean))
        return np.where(unusable, 0, rest / np.where(unusable, 1, scale))
    advice = "set dataset.model.clean.scaling to zscore or none"
    usable = _find_usable(mean, series.std(axis=0), is_constant, where, advice)
    return np.where(usable, 100 * rest / np.where(usable, mean, 1), 0)


def _find_usable(
    mean: np.ndarray, spread: np.ndarray, is_constant: np.ndarray, where: str, advice: str
) -> np.ndarray:
    """Return which voxels have a mean that percentages can refer to."""
    # Scanner units are positive and far from zero, so such a mean is no baseline.
    low = ~is_constant & (mean <= spread)
    if low.sum() > 0.05 * max(1, (~is_constant).sum()):
        raise DataError(
            f"{where}: {int(low.sum())} voxels have a mean at or below their variation, so a percentage of it means "
            f"nothing: the images were standardised before, or the mask holds air; {advice}, or choose a tighter mask."
        )
    return ~is_constant & ~low


# --- volumes ----------------------------------------------------------------------------------------------


def iterate_volumes(header: VolumeHeader) -> Iterator[np.ndarray]:
    """Yield the volumes of a file one by one, float32 of shape (x, y, z), scaled by the header."""
    read = MaskedVolumes(header, np.ones(header.shape, bool))
    for start in range(header.n_volumes):
        yield read(start, start + 1).reshape(header.shape)


def read_series(run: BoldRun, mask: np.ndarray) -> np.ndarray:
    """Return the time series of the voxels of `mask` in C order, float32 of shape (n_volumes, n_voxels).

    Raises
    ------
    DataError
        If a value is not finite.
    """
    read = MaskedVolumes(run.header, mask)
    series = np.empty((run.n_volumes, read.n_voxels), np.float32)
    for start in range(0, run.n_volumes, _BLOCK_VOLUMES):
        stop = min(start + _BLOCK_VOLUMES, run.n_volumes)
        series[start:stop] = read(start, stop)
    finite = np.isfinite(series).all(axis=0)
    if not finite.all():
        raise DataError(
            f"{run.where}: {int((~finite).sum())} voxels of the mask are not finite; "
            "set dataset.mask to varying, or fetch the file again."
        )
    return series


def look_at_volumes(run: BoldRun, series: np.ndarray, watch: DamageWatch) -> None:
    """Look for volumes of a run, shape (n_volumes, n_voxels), that hold one value or are copies of others."""
    names = [f"volume {number + 1}" for number in range(len(series))]
    seen = watch.open_rows(run.where, f"{run.subject} {run.image}", names, rows="volumes")
    seen.add(series)
    seen.finish(lambda row: f"number {row + 1} at {run.frame_times[row]:g} s")


def find_geometry(source: BoldSource) -> Geometry | Mapping[str, Geometry]:
    """Return a mask computed from the images themselves.

    Raises
    ------
    DataError
        If no voxel is left.
    """
    masks: dict[str, np.ndarray] = {}
    affines: dict[str, np.ndarray] = {}
    for run in source.runs:
        subject = run.subject
        if source.geometry == "varying":
            low, high = np.full(run.shape, np.inf, np.float32), np.full(run.shape, -np.inf, np.float32)
            for volume in iterate_volumes(run.header):
                low, high = np.minimum(low, volume), np.maximum(high, volume)
            found = np.isfinite(low) & np.isfinite(high) & (high > low)
        else:
            found = _find_brain(run)
        # A voxel must be usable in every run, or its responses would end halfway.
        masks[subject] = masks[subject] & found if subject in masks else found
        affines[subject] = run.affine
        if not masks[subject].any():
            raise DataError(f"{run.where} leaves no voxel in the mask {source.geometry!r}; give a mask file.")
    return join_geometries({name: Geometry.from_mask(mask, affines[name]) for name, mask in masks.items()})


def _find_brain(run: BoldRun) -> np.ndarray:
    import nibabel
    from nilearn.masking import compute_epi_mask

    total = np.zeros(run.shape)
    for volume in iterate_volumes(run.header):
        total += volume
    try:
        mask = compute_epi_mask(nibabel.Nifti1Image(total / run.n_volumes, run.affine))
    except Exception as error:  # nilearn finds no brain in too small or too odd an image
        raise DataError(
            f"{run.where}: nilearn finds no brain in the mean image ({error}); set dataset.mask to varying or a file."
        ) from error
    return np.asarray(mask.dataobj) > 0
