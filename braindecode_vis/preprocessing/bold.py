"""fMRI time series to single-trial responses, streamed run by run.

Defines the order of the steps: volumes are read one after the other and masked immediately, drifts and confounds are
regressed out, each voxel is scaled, and a model or a window gives one response per trial. The next steps (standardising
with training trials, parcels, writing) are those of all fMRI data sets. Only one masked run is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    GlmConfig,
    WindowConfig,
)
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, VolumeHeader
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.glm import (
    fit_trials,
    fit_trials_ar1,
    make_drifts,
    make_nuisance_basis,
    make_regressors,
    remove_nuisance,
)
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.signal_damage import DamageWatch, make_watch, settle_missing

_BLOCK_VOXELS = 8192
_BLOCK_VOLUMES = 16
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
    return write_fmri_source(
        make_betas(source, watch),
        folder,
        progress=progress,
        learnt=learnt,
        transductive=transductive,
        watch=watch,
        parts=parts,
    )


def make_betas(source: BoldSource, watch: DamageWatch | None = None) -> FmriSource:
    """Return single-trial responses that are computed when they are read; `watch` then checks the volumes."""
    source = leave_out_late_trials(source)
    geometry = source.geometry if not isinstance(source.geometry, str) else find_geometry(source)
    constant: dict[str, int] = {}
    parts = []
    for run in source.runs:
        own = geometry if isinstance(geometry, Geometry) else geometry[run.subject]
        trials, rows = _plan_rows(run, source.model)
        reader = _RunReader(run, own, source, rows, constant, watch or DamageWatch())
        parts.append(BetasPart(trials, run.files, own.n_voxels, reader, is_computed=True))
    times = _find_times(source)
    # A scan that is decoded while it runs must have the repetition time of the run.
    steps = sorted({run.t_r for run in source.runs})
    notes = {
        "constant_voxels_by_run": constant,
        "t_r": steps[0] if len(steps) == 1 else steps,
        **source.notes,
    }
    unit = _UNITS[source.model.clean.scaling]
    return FmriSource(
        tuple(parts), source.stimuli, source.plan, unit, geometry, times, source.read_image, notes
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
    if isinstance(model, GlmConfig):
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


def _plan_rows(run: BoldRun, model: GlmConfig | WindowConfig) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Return the trial table of the store, and the volumes that each row averages (none for a model)."""
    if isinstance(model, GlmConfig):
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
                try:
                    fit = fit_trials_ar1 if model.noise_model == "ar1" else fit_trials
                    out[:, here] = fit(block, regressors, basis, method=model.trials)
                except DataError as error:
                    raise DataError(f"{run.where}: {error}") from error
            elif len(shape) == 3:
                # (n_times of the window, n_voxels) -> (n_trials, n_voxels, n_times)
                out[:, here] = np.stack([block[window].T for window in self.windows])
            else:
                out[:, here] = np.stack([block[window].mean(axis=0) for window in self.windows])
        return out

    def _check_constant(self, series: np.ndarray) -> None:
        n = int((series.max(axis=0) == series.min(axis=0)).sum())
        if n > self.source.max_constant * series.shape[1]:
            raise DataError(
                f"{self.run.where}: {n} of the {series.shape[1]} voxels of the mask never change, above the bound of "
                f"{self.source.max_constant:.0%}: the mask reaches outside the image; set dataset.mask to varying."
            )
        if n:
            self.constant[self.run.image.name] = n


def _make_basis(run: BoldRun, model: GlmConfig | WindowConfig) -> np.ndarray:
    """Return the nuisance regressors of a run: drifts, confounds and, in a model, events that are not trials."""
    clean = model.clean
    drifts = make_drifts(run.frame_times, drift=clean.drift, cutoff=clean.cutoff, order=clean.order)
    pieces = [drifts, run.confounds]
    # Events that are no trials (blanks, responses) have responses of their own, one regressor a kind.
    if isinstance(model, GlmConfig):
        for _, events in run.others.groupby("trial_type"):
            pieces.append(
                make_regressors(events, run.frame_times, hrf_model=model.hrf_model).sum(axis=1, keepdims=True)
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
    # Scanner units are positive and far from zero, so such a mean is no baseline.
    low = ~is_constant & (mean <= series.std(axis=0))
    if low.sum() > 0.05 * max(1, (~is_constant).sum()):
        raise DataError(
            f"{where}: {int(low.sum())} voxels have a mean at or below their variation, so a percentage of it means "
            "nothing: the images were standardised before, or the mask holds air; set dataset.model.clean.scaling to "
            "zscore or none, or choose a tighter mask."
        )
    usable = ~is_constant & ~low
    return np.where(usable, 100 * rest / np.where(usable, mean, 1), 0)


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
