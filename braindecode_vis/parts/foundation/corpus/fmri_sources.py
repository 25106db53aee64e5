"""Runs of fMRI for a corpus: any recording without events, as a cleaned time series of the parcels of one atlas.

Owns the order of the steps: a run is read in the form that the atlas fits, averaged over parcels, freed of drifts,
confounds and volumes that moved; and what a run is left out for. Parcels come first, as regression treats every voxel
alike: the mean of cleaned voxels is the cleaned mean, and no run is ever in memory at the size of its voxels.

References
----------
Power et al. (2012), doi:10.1016/j.neuroimage.2011.10.018: framewise displacement. Power et al. (2014),
doi:10.1016/j.neuroimage.2013.08.048: scrubbing. Lindquist et al. (2019), doi:10.1002/hbm.24528: one regression for
confounds and filter, as in nilearn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.base.remote import bring
from braindecode_vis.datasets.bids.fmri_files import (
    find_t_r,
    read_confounds,
    read_header,
    read_numbers,
    read_table,
)
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig, FmriChannels, FmriCleaningConfig
from braindecode_vis.datasets.corpus.recordings import (
    Channels,
    Excluded,
    SeriesRun,
    SourceCard,
    read_source_card,
)
from braindecode_vis.datasets.sources.bold_source import ConfoundsConfig, check_grid
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, VolumeHeader, read_volume
from braindecode_vis.parts.foundation.corpus.atlases import CorpusAtlas, Placement, read_corpus_atlas
from braindecode_vis.parts.foundation.corpus.fmri_layouts import NAME_KEYS, SeriesImage, find_fmri_images
from braindecode_vis.preprocessing.glm import make_drifts

_BLOCK, _PLACES = 64, 4096  # volumes, or grayordinates of all volumes, in memory at once
# Nobody has sampled a whole brain faster, and slower series do not hold what is learnt; milliseconds lie above.
_T_R_S = (0.1, 20.0)
_CUTOFF_S = 128.0  # of fMRIPrep's cosines
_HINT = "correct the sidecar, or repair the header"
_INDEX_COLUMNS = ("", "index", "time", "frame", "volume", "unnamed: 0")


def read_fmri_channels(config: FmriChannels) -> Channels:
    """Return the parcels of a corpus; see `atlases.read_corpus_atlas` for what is refused."""
    return read_corpus_atlas(config).channels


def find_fmri_runs(root: Path, config: CorpusConfig) -> tuple[list[SeriesRun], list[Excluded]]:
    """Return the runs below a root, unread, and those that are left out.

    Headers, sidecars, masks and tables of confounds are read; of the samples a first volume at most.

    Parameters
    ----------
    root
        BIDS derivatives (fMRIPrep, XCP-D), with or without events; a folder of the HCP; or tables of parcels with
        sidecars. A run that is there in several forms is taken in the first that the atlas fits: parcels, then
        grayordinates, volumes, surfaces.
    config
        Settings of the corpus, whose channels are those of fMRI.

    Raises
    ------
    DataError
        If the root holds no run, or none that can be used; the message says why of the first.
    """
    channels = config.channels
    assert isinstance(channels, FmriChannels)
    root = root.expanduser()
    card, atlas = read_source_card(root), read_corpus_atlas(channels)
    groups, excluded = find_fmri_images(root)
    runs: list[SeriesRun] = []
    for images in groups:
        try:
            runs.append(_open_run(images, card, atlas, channels))
        except DataError as error:
            excluded.append(Excluded(images[0].files[0], str(error).removesuffix(".")))
    if not runs and excluded:
        first = excluded[0]
        raise DataError(
            f"none of the {len(excluded)} runs of {root} can be used; {first.path}: {first.reason}."
        )
    if not runs:
        raise DataError(
            f"{root} holds no time series of fMRI: no sub-*_bold.nii.gz, .dtseries.nii, .ptseries.nii or .func.gii, no "
            "sub-*_timeseries.tsv, .csv or .npy, and no SUBJECT/MNINonLinear/Results."
        )
    return runs, excluded


def _open_run(
    images: list[SeriesImage], card: SourceCard, atlas: CorpusAtlas, config: FmriChannels
) -> SeriesRun:
    image, opened = _choose_form(images, atlas, config)
    run = image.run
    header = opened.t_r
    rate = run.sidecar.get("SamplingFrequency")
    # Tables have no header; BIDS gives their rate in place of a repetition time.
    if not header and isinstance(rate, int | float) and rate > 0:
        header = 1 / rate
    t_r = find_t_r(run, header, None, hint=_HINT)
    if not _T_R_S[0] <= t_r <= _T_R_S[1]:
        raise DataError(
            f"{run.where} has a repetition time of {t_r:g} s, which is impossible for a scanner; BIDS "
            f"uses seconds, so {_HINT}."
        )
    censored = _find_censored(image, opened.n_volumes)
    plan = _plan_cleaning(image, censored, t_r, config.cleaning)
    entities = run.entities
    names = atlas.channels.names
    files = (
        *image.files,
        *(p for p in (run.confounds, image.motion, image.outliers, run.mask) if p is not None),
    )
    return SeriesRun(
        source=card.name,
        subject=entities["sub"],
        session=entities.get("ses", ""),
        run=entities.get("run", ""),
        task=entities.get("task", ""),
        site=card.find_site(entities["sub"]),
        files=files,
        modality="fmri",
        channels=names,
        missing=tuple(name for name, gone in zip(names, opened.missing, strict=True) if gone),
        n_times=plan.n_times,
        interval_s=t_r,
        motion_mm=plan.motion_mm,
        licence=card.licence,
        read=_Reader(image.without_sidecar(), names, opened, plan, t_r, config.cleaning),
        scrubbed=plan.scrubbed,
    )


@dataclass(frozen=True)
class _Reader:
    """Reads and cleans one run.

    There is one for each of many thousand runs, so that it only knows how to read, and tables are read again.
    """

    image: SeriesImage
    names: tuple[str, ...]
    opened: _Opened
    plan: _Plan
    t_r: float
    config: FmriCleaningConfig

    def __call__(self) -> np.ndarray:
        where = self.image.run.where
        series = self.plan.expand(self.opened.read())
        out = np.full((self.plan.n_times, series.shape[1]), np.nan, np.float32)
        there = ~self.opened.missing
        block = series[:, there].astype(np.float64)
        if not np.isfinite(block).all():
            volume, column = np.argwhere(~np.isfinite(block))[0]
            raise DataError(
                f"{where} is not finite in the parcel {np.array(self.names)[there][column]}, volume {volume + 1}; "
                "fetch it again, or correct its mask."
            )
        confounds = _find_confounds(self.image, len(series), self.t_r, self.config.confounds)
        cleaned = clean_series(block, confounds, self.plan, self.t_r, self.config, where=where)
        # What never changes is left at rounding noise by a regression, which a scaling would blow up.
        cleaned[:, block.max(axis=0) == block.min(axis=0)] = 0
        out[:, there] = cleaned
        return out


# --- forms ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A form of a run that the atlas fits.

    Parameters
    ----------
    n_volumes
        In the file.
    t_r
        Of its header in s, 0 if it says none.
    missing : bool array of shape (n_channels,)
        Parcels without enough places in it.
    read
        Returns the parcels, float32 of shape (n_volumes, n_channels), NaN where missing.
    """

    n_volumes: int
    t_r: float
    missing: np.ndarray
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Places:
    """The placement of an atlas, which many runs share, and what of it one run has."""

    place: Placement
    missing: np.ndarray
    min_coverage: float

    @property
    def least(self) -> np.ndarray:
        """How many places each parcel needs, shape (n_channels,)."""
        return self.min_coverage * self.place.sizes

    def find_labels(self, inside: np.ndarray | None = None) -> np.ndarray:
        """Return the labels without those of missing parcels and those that are not `inside`."""
        labels = np.where(np.concatenate([[False], ~self.missing])[self.place.labels], self.place.labels, 0)
        return labels if inside is None else np.where(inside, labels, 0)


def _choose_form(
    images: list[SeriesImage], atlas: CorpusAtlas, config: FmriChannels
) -> tuple[SeriesImage, _Opened]:
    """Return the first form of a run that the atlas fits; `DataError` with what stood against the best if none does."""
    openers = {
        "ptseries": _open_ptseries,
        "table": _open_table,
        "dtseries": _open_dtseries,
        "volume": _open_volume,
        "surface": _open_surface,
    }
    wanted = [i for i in images if config.space in (None, i.space) or i.kind in ("ptseries", "table")]
    if not wanted:
        there = ", ".join(sorted({image.space for image in images}))
        raise DataError(f"it exists in the space {there}, not in {config.space}; set channels.space")
    reasons = []
    best: tuple[SeriesImage, _Opened] | None = None
    for image in wanted:
        if best is not None and image.kind != best[0].kind:
            break
        try:
            opened = openers[image.kind](image, atlas, config)
        except DataError as error:
            reasons.append(str(error))
            continue
        if opened.missing.all():
            reasons.append("no parcel of the atlas holds a voxel of it: the atlas lies in another space")
            continue
        # There may be a table for each of many atlases, some of which share names.
        if best is None or opened.missing.sum() < best[1].missing.sum():
            best = image, opened
        if image.kind not in ("ptseries", "table") or not best[1].missing.any():
            break
    if best is not None:
        return best
    raise DataError(reasons[0] if len(set(reasons)) == 1 else "; ".join(dict.fromkeys(reasons)))


def _open_volume(image: SeriesImage, atlas: CorpusAtlas, config: FmriChannels) -> _Opened:
    header = read_header(image.files[0])
    # The millimetres of one brain are none of a template's, however well the numbers overlap.
    in_template = image.space.startswith("MNI")
    try:
        place = atlas.place_volume(header.shape, header.affine, resample=config.resample and in_template)
    except DataError as error:
        what = f"in the space {image.space}" if image.space != "native" else "in the space of the scanner"
        lost = "" if in_template or not config.resample else "; only images in MNI space are resampled"
        raise DataError(f"{image.files[0].name} is {what}: {str(error).removesuffix('.')}{lost}") from error
    inside = _find_inside(header, image.run.mask)
    missing = place.find_missing(config.min_coverage, inside)
    reader = _VolumeReader(header, image.run.mask, _Places(place, missing, config.min_coverage))
    return _Opened(header.n_volumes, header.t_r, missing, reader)


def _find_inside(header: VolumeHeader, mask: Path | None) -> np.ndarray:
    """Return the voxels that the mask of a run holds, or its first volume."""
    if mask is not None:
        values, affine = read_volume(mask)
        check_grid(
            header.shape, header.affine, values.shape, affine, what=str(header.path), than="its brain mask"
        )
        return np.asarray(values > 0)
    reader = MaskedVolumes(header, np.ones(header.shape, bool))
    first = reader(0, 1).reshape(header.shape)
    reader.close()
    return np.asarray(np.isfinite(first) & (first != 0))


@dataclass(frozen=True)
class _VolumeReader:
    header: VolumeHeader
    mask: Path | None
    places: _Places

    def __call__(self) -> np.ndarray:
        labels = self.places.find_labels(_find_inside(self.header, self.mask))
        reader = MaskedVolumes(self.header, labels > 0)
        n = self.header.n_volumes
        blocks = (reader(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))
        return _average(blocks, labels[labels > 0], self.places.least)


def _open_dtseries(image: SeriesImage, atlas: CorpusAtlas, config: FmriChannels) -> _Opened:
    path = image.files[0]
    _, series, axis = _open_cifti(path, "BrainModelAxis")
    place = atlas.place_grayordinates(axis)
    missing = place.find_missing(config.min_coverage)
    reader = _CiftiReader(path, _Places(place, missing, config.min_coverage))
    return _Opened(len(series), float(series.step), missing, reader)


@dataclass(frozen=True)
class _CiftiReader:
    path: Path
    places: _Places

    def __call__(self) -> np.ndarray:
        import nibabel

        labels, least = self.places.find_labels(), self.places.least
        with refuse_damage(f"{self.path} cannot be read"):
            data = nibabel.load(bring(self.path)).dataobj  # type: ignore[attr-defined]
            total, changing = np.zeros((len(least), data.shape[0])), np.zeros_like(labels)
            # All volumes of a grayordinate follow each other in the file.
            for start in range(0, data.shape[1], _PLACES):
                here = slice(start, start + _PLACES)
                block = np.asarray(data[:, here]).T.astype(np.float64)
                # Not equal, so that what is no number is kept and told.
                changing[here] = np.where(block.max(axis=1) != block.min(axis=1), labels[here], 0)
                total += _make_sums(changing[here], len(least)) @ block
        return _divide(total, labels, changing, least)


def _open_ptseries(image: SeriesImage, atlas: CorpusAtlas, config: FmriChannels) -> _Opened:
    path = image.files[0]
    _, series, axis = _open_cifti(path, "ParcelsAxis")
    try:
        found = atlas.match_names([str(name) for name in axis.name])
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    return _Opened(len(series), float(series.step), found < 0, _ParcelReader(path, found))


def _open_cifti(path: Path, columns: str) -> tuple[Any, Any, Any]:
    """Return a CIFTI file of time series, its axis of time, and that of its columns."""
    import nibabel

    with refuse_damage(f"{path} cannot be read as CIFTI"):
        image: Any = nibabel.load(bring(path))
        series, axis = image.header.get_axis(0), image.header.get_axis(1)
    if type(series).__name__ != "SeriesAxis" or type(axis).__name__ != columns:
        raise DataError(
            f"{path} has the axes {type(series).__name__} and {type(axis).__name__}; SeriesAxis and {columns} are "
            "expected of its name"
        )
    if series.unit != "SECOND":
        raise DataError(f"the rows of {path} count {series.unit.lower()}, not seconds: it is no time series")
    return image, series, axis


@dataclass(frozen=True)
class _ParcelReader:
    """Reads the columns of parcellated data, CIFTI or table; those before a channel is missing are -1."""

    path: Path
    columns: np.ndarray
    names: tuple[str, ...] = ()
    header: bool = True

    def __call__(self) -> np.ndarray:
        import nibabel
        import pandas as pd

        path = self.path
        with refuse_damage(f"{path} cannot be read"):
            if path.name.endswith(".nii"):
                values = np.asarray(nibabel.load(bring(path)).dataobj, np.float32)  # type: ignore[attr-defined]
            elif path.suffix == ".npy":
                values = np.load(bring(path), allow_pickle=False)
            else:
                used = [self.names[i] for i in self.columns if i >= 0]
                table = pd.read_csv(
                    bring(path), sep="\t" if path.suffix == ".tsv" else ",", header=0 if self.header else None,
                    names=list(self.names), usecols=used, na_values=["n/a"], dtype=np.float32,
                )  # fmt: skip
                values = table.reindex(columns=list(self.names)).to_numpy(np.float32)
        out = np.array(values[:, np.maximum(self.columns, 0)], np.float32)
        out[:, self.columns < 0] = np.nan
        return out


def _open_table(image: SeriesImage, atlas: CorpusAtlas, config: FmriChannels) -> _Opened:
    path, sidecar = image.files[0], image.run.sidecar
    told = next((sidecar[key] for key in NAME_KEYS if isinstance(sidecar.get(key), list)), None)
    header, gone = True, np.zeros(0, bool)
    if path.suffix == ".npy":
        with refuse_damage(f"{path} cannot be read as an array"):
            shape = np.load(bring(path), mmap_mode="r", allow_pickle=False).shape
        if len(shape) != 2:
            raise DataError(f"{path.name} has the shape {shape}; (volumes, parcels) is expected")
        n_volumes, names = shape[0], tuple(str(number) for number in range(1, shape[1] + 1))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        with refuse_damage(f"{path} cannot be read", OSError, UnicodeDecodeError), bring(path).open() as file:
            cells = file.readline().strip("\r\n").split(separator)
            first = file.readline().strip("\r\n").split(separator)
            n_volumes = 2 + sum(1 for line in file if line.strip())
        if len(first) != len(cells):
            raise DataError(
                f"{path.name} has {len(cells)} columns in its first line and {len(first)} in its second"
            )
        header = not all(_is_number(cell) for cell in cells) or _counts_up(cells)
        n_volumes -= header
        names = (
            tuple(cell.strip().strip('"') for cell in cells)
            if header
            else tuple(map(str, range(1, len(cells) + 1)))
        )
        # What a run does not cover has no value in any line.
        gone = np.array([not _is_number(cell) for cell in first])
    if told is not None and (path.suffix == ".npy" or not header):
        if len(told) != len(names):
            raise DataError(
                f"{path.name} has {len(names)} columns, but its sidecar names {len(told)} parcels"
            )
        names = tuple(map(str, told))
    used = [i for i, name in enumerate(names) if not (header and name.lower() in _INDEX_COLUMNS)]
    try:
        found = atlas.match_names([names[i] for i in used])
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    columns = np.where(found >= 0, np.array(used)[np.maximum(found, 0)], -1)
    if gone.any():
        columns = np.where((columns >= 0) & ~gone[np.maximum(columns, 0)], columns, -1)
    return _Opened(n_volumes, 0.0, columns < 0, _ParcelReader(path, columns, atlas.share(names), header))


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _counts_up(cells: list[str]) -> bool:
    """Whether the first line of a table numbers its columns, which no volume does."""
    return len(cells) > 1 and cells in ([str(i + start) for i in range(len(cells))] for start in (0, 1))


def _open_surface(image: SeriesImage, atlas: CorpusAtlas, config: FmriChannels) -> _Opened:
    left, right = image.files
    if not right.is_file():
        raise DataError(f"{left.name} has no right hemisphere beside it ({right.name}); fetch it")
    hemispheres = [_read_gifti(path) for path in image.files]
    if len(hemispheres[0][0]) != len(hemispheres[1][0]):
        raise DataError(
            f"{left.name} has {len(hemispheres[0][0])} volumes, its right hemisphere {len(hemispheres[1][0])}"
        )
    sizes = (hemispheres[0][0].shape[1], hemispheres[1][0].shape[1])
    place: Placement = atlas.place_surface(sizes)
    missing = place.find_missing(config.min_coverage, _covers(hemispheres))
    steps = {step for _, step in hemispheres}
    if len(steps) > 1:
        raise DataError(
            f"{left.name} and its right hemisphere have the time steps {sorted(steps)} s; {_HINT}"
        )
    reader = _SurfaceReader((left, right), _Places(place, missing, config.min_coverage))
    return _Opened(len(hemispheres[0][0]), steps.pop(), missing, reader)


def _covers(hemispheres: list[tuple[np.ndarray, float]]) -> np.ndarray:
    first = np.concatenate([values[0] for values, _ in hemispheres])
    return np.asarray(np.isfinite(first) & (first != 0))


@dataclass(frozen=True)
class _SurfaceReader:
    files: tuple[Path, Path]
    places: _Places

    def __call__(self) -> np.ndarray:
        hemispheres = [_read_gifti(path) for path in self.files]
        both = np.concatenate([values for values, _ in hemispheres], axis=1)
        return _average([both], self.places.find_labels(_covers(hemispheres)), self.places.least)


def _read_gifti(path: Path) -> tuple[np.ndarray, float]:
    """Return the vertices of a hemisphere, float32 of shape (n_volumes, n_vertices), and its time step in s or 0."""
    import nibabel

    with refuse_damage(f"{path} cannot be read as GIFTI"):
        image: Any = nibabel.load(bring(path))
        arrays = [np.asarray(array.data, np.float32) for array in image.darrays]
        # FreeSurfer keeps all volumes in one array, others one in each.
        values = arrays[0].T if len(arrays) == 1 and arrays[0].ndim == 2 else np.stack(arrays)
        told = image.meta.get("TimeStep") or image.darrays[0].meta.get("TimeStep") or 0
        step = float(told)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(f"{path} holds no time series: its arrays give the shape {values.shape}")
    # FreeSurfer writes milliseconds, nibabel and Workbench seconds.
    return values, step / 1000 if step > 50 else step


def _average(blocks: Iterable[np.ndarray], labels: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return the mean of each parcel over its places, shape (n_volumes, n_channels), NaN where there are none.

    A place that never changes was not covered by the scanner.

    Parameters
    ----------
    blocks
        Arrays of shape (n_block, n_places) that follow each other in time.
    labels : array of shape (n_places,)
        As in `Placement`.
    least : array of shape (n_channels,)
        How many places each parcel needs; one with fewer that change is 0, as what never changes.
    """
    sums, parts = _make_sums(labels, len(least)), []
    low, high = np.full(len(labels), np.inf, np.float32), np.full(len(labels), -np.inf, np.float32)
    for block in blocks:
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        # Places first: a sparse product runs through its right side by rows. (n_channels, n_block)
        parts.append(sums @ np.ascontiguousarray(block.T, np.float64))
    return _divide(np.concatenate(parts, axis=1), labels, np.where(low != high, labels, 0), least)


def _divide(total: np.ndarray, labels: np.ndarray, changing: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return means of sums, (n_channels, n_volumes) to float32 of shape (n_volumes, n_channels)."""
    n = len(least)
    counts = np.bincount(changing, minlength=n + 1)[1:]
    out = (total / np.maximum(counts, 1)[:, None]).T.astype(np.float32)
    out[:, counts < least] = 0
    out[:, np.bincount(labels, minlength=n + 1)[1:] == 0] = np.nan
    return out


def _make_sums(labels: np.ndarray, n_channels: int) -> Any:
    """Return the matrix of shape (n_channels, n_places) that adds up the places of each parcel."""
    from scipy.sparse import csr_array

    places = np.flatnonzero(labels)
    ones = np.ones(len(places))
    return csr_array((ones, (labels[places] - 1, places)), shape=(n_channels, len(labels)))


# --- cleaning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is taken out of a run.

    Parameters
    ----------
    start
        Volumes before the steady state, which are cut.
    censored, moved : bool array of shape (n_volumes,)
        Volumes that the file no longer holds, and those that are scrubbed, the former included.
    n_times, motion_mm, scrubbed
        As in `SeriesRun`.
    """

    start: int
    censored: np.ndarray
    moved: np.ndarray
    n_times: int
    motion_mm: float | None
    scrubbed: float

    def expand(self, series: np.ndarray) -> np.ndarray:
        """Return the volumes of a file at their times, zero where it has none: (n_volumes, n_channels)."""
        out = np.zeros((len(self.censored), series.shape[1]), series.dtype)
        out[~self.censored] = series
        return out


def _find_censored(image: SeriesImage, n_volumes: int) -> np.ndarray:
    """Return which volumes of a run were cut from its file before, bool of shape (n_volumes of the run,).

    In one of its modes XCP-D leaves out the volumes that moved, and its tables of motion keep them.
    """
    none = np.zeros(n_volumes, bool)
    if image.outliers is None or image.run.confounds is not None:
        return none
    table = read_table(image.outliers)
    if "framewise_displacement" not in table.columns or len(table) == n_volumes:
        return none
    found = read_numbers(table, "framewise_displacement", image.outliers) > 0
    return found if int((~found).sum()) == n_volumes else none


def _plan_cleaning(image: SeriesImage, censored: np.ndarray, t_r: float, config: FmriCleaningConfig) -> _Plan:
    """Read the tables of a run; `DataError` if they do not belong to it, or it moved too much."""
    run, n_volumes = image.run, len(censored)
    if censored.any() and config.scrubbing == "none":
        raise DataError(
            f"{int(censored.sum())} volumes with motion were cut out before, so its volumes are not "
            "evenly spaced; set channels.cleaning.scrubbing to interpolate or cut"
        )
    displacement, dvars, start = _read_motion(image, n_volumes)
    mean = None if displacement is None else float(displacement[start:].mean())
    if mean is not None and config.max_motion_mm is not None and mean > config.max_motion_mm:
        raise DataError(
            f"its mean framewise displacement is {mean:.2f} mm, above channels.cleaning.max_motion_mm "
            f"({config.max_motion_mm:g})"
        )
    moved = censored.copy()
    if config.scrubbing != "none":
        if displacement is not None:
            moved |= displacement > config.scrub_mm
        if dvars is not None and config.scrub_dvars is not None:
            moved |= dvars > config.scrub_dvars
        moved[start:] = close_gaps(moved[start:], config.scrub_segment)
        share = float(moved[start:].mean())
        if share > config.max_scrubbed:
            raise DataError(
                f"{share:.0%} of its volumes have motion, above channels.cleaning.max_scrubbed "
                f"({config.max_scrubbed:.0%})"
            )
    confounds = _find_confounds(image, n_volumes, t_r, config.confounds)
    kept = ~moved[start:]
    n_free = int(kept.sum()) - confounds.shape[1] - config.detrend
    if n_free < 0.2 * kept.sum():
        raise DataError(
            f"{confounds.shape[1]} confounds are too many for its {int(kept.sum())} volumes; use fewer with "
            "channels.cleaning.confounds"
        )
    if config.h_freq is not None and config.h_freq >= 0.5 / t_r:
        raise DataError(
            f"channels.cleaning.h_freq {config.h_freq:g} Hz is not below half of its rate, {0.5 / t_r:.3g} Hz "
            f"({run.where})"
        )
    n_times = int(kept.sum()) if config.scrubbing == "cut" else len(kept)
    return _Plan(start, censored, moved, n_times, mean, float((~kept).mean()))


def _read_motion(image: SeriesImage, n_volumes: int) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """Return framewise displacement in mm, standardised DVARS (or None), and the volumes before the steady state."""
    path = image.run.confounds or image.motion
    if path is None:
        return None, None, 0
    if path.suffix == ".txt":
        moves = _read_movement(path)
        _check_rows(path, len(moves), n_volumes)
        return compute_displacement(moves), None, 0
    series = (("framewise_displacement", "FramewiseDisplacement"), ("std_dvars", "stdDVARS"))
    used = ("non_steady_state_outlier", "NonSteadyStateOutlier", *series[0], *series[1])
    table = read_table(path, lambda column: column.startswith(used))
    if not len(table.columns):
        table = read_table(path)
    _check_rows(path, len(table), n_volumes)
    found: list[np.ndarray | None] = []
    for names in series:
        name = next((name for name in names if name in table.columns), None)
        if name is None:
            found.append(None)
            continue
        # The first volume has nothing before it.
        column = table.assign(**{name: [table[name].iloc[0] or "0", *table[name].iloc[1:]]})
        found.append(read_numbers(column, name, path))
    early = [c for c in table.columns if c.startswith(used[:2])]
    flagged = [int(np.flatnonzero(read_numbers(table, column, path) > 0).max(initial=-1)) for column in early]
    start = max(flagged, default=-1) + 1
    if start > n_volumes // 2:
        raise DataError(
            f"{path.name} marks the volume {start} as before the steady state; it is of another run"
        )
    return found[0], found[1], start


def _check_rows(path: Path, n_rows: int, n_volumes: int) -> None:
    if n_rows != n_volumes:
        raise DataError(
            f"{path.name} has {n_rows} rows, but the run {n_volumes} volumes: they are of different runs"
        )


def _read_movement(path: Path) -> np.ndarray:
    """Return the six parameters in ``Movement_Regressors.txt``: mm, and rad in place of its degrees."""
    with refuse_damage(f"{path} is no table of numbers", ValueError, OSError):
        values = np.loadtxt(bring(path), ndmin=2)
    if values.shape[1] not in (6, 12) or not np.isfinite(values).all():
        raise DataError(f"{path} has {values.shape[1]} columns; 6 or 12 finite ones are expected of the HCP")
    return np.concatenate([values[:, :3], np.deg2rad(values[:, 3:6])], axis=1)


def compute_displacement(moves: np.ndarray) -> np.ndarray:
    """Return the framewise displacement of Power et al. (2012) in mm, 0 for the first volume.

    Parameters
    ----------
    moves : array of shape (n_volumes, 6)
        Translations in mm, then rotations in rad, which turn a sphere of 50 mm.

    Examples
    --------
    >>> compute_displacement(np.array([[0.0] * 6, [0.1, 0, 0, 0.002, 0, 0]])).round(3).tolist()
    [0.0, 0.2]
    """
    steps = np.abs(np.diff(moves, axis=0, prepend=moves[:1]))
    return np.asarray(steps[:, :3].sum(axis=1) + 50 * steps[:, 3:].sum(axis=1))


def close_gaps(moved: np.ndarray, shortest: int) -> np.ndarray:
    """Return the scrubbed volumes and all stretches of fewer than `shortest` volumes between them or at the ends.

    Examples
    --------
    >>> close_gaps(np.array([0, 0, 1, 0, 1, 0, 0, 0], bool), 3).astype(int).tolist()
    [1, 1, 1, 1, 1, 0, 0, 0]
    """
    if not moved.any():
        return moved
    edges = np.flatnonzero(np.diff(np.concatenate([[True], moved, [True]]).astype(int)))
    out = moved.copy()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first < shortest:
            out[first:last] = True
    return out


def _find_confounds(image: SeriesImage, n_volumes: int, t_r: float, config: ConfoundsConfig) -> np.ndarray:
    """Return what is regressed out of a run, shape (n_volumes, n_confounds)."""
    none = np.zeros((n_volumes, 0))
    if image.cleaned or not (config.strategy or config.columns):
        return none
    if image.run.confounds is not None:
        values, _ = read_confounds(image.run, config)
        return none if values is None else values
    # The HCP has no table of confounds, but motion, and drifts follow from the length of the run.
    if image.motion is not None and image.motion.suffix == ".txt":
        pieces = [none]
        if "motion" in config.strategy:
            pieces.append(expand_motion(_read_movement(image.motion), config.motion))
        if "high_pass" in config.strategy:
            pieces.append(make_drifts(t_r * np.arange(n_volumes), drift="cosine", cutoff=_CUTOFF_S)[:, 1:])
        return np.concatenate(pieces, axis=1)
    if image.kind in ("volume", "surface"):
        raise DataError(
            "there is no table of confounds beside it; fetch it, or set channels.cleaning.confounds.strategy=[]"
        )
    return none


def expand_motion(moves: np.ndarray, how: str) -> np.ndarray:
    """Return motion and what nilearn's `load_confounds` adds to it, shape (n_volumes, 6, 12 or 24).

    Parameters
    ----------
    moves : array of shape (n_volumes, 6)
    how
        ``basic``; with ``derivatives``; with squares (``power2``); or with both and squared derivatives (``full``).
    """
    steps = np.diff(moves, axis=0, prepend=moves[:1])
    added = {
        "basic": [],
        "derivatives": [steps],
        "power2": [moves**2],
        "full": [steps, moves**2, steps**2],
    }[how]
    return np.concatenate([moves, *added], axis=1)


def clean_series(
    series: np.ndarray,
    confounds: np.ndarray,
    plan: _Plan,
    t_r: float,
    config: FmriCleaningConfig,
    *,
    where: str,
) -> np.ndarray:
    """Return a run without drift, confounds and volumes that moved.

    The regression is fitted on the volumes that are kept. A scrubbed volume gets the line between its neighbours.

    Parameters
    ----------
    series : float64 array of shape (n_volumes, n_parcels)
    confounds : array of shape (n_volumes, n_confounds)

    Returns
    -------
    array of shape (n_times, n_parcels), float32
    """
    from nilearn import signal

    series, confounds = series[plan.start :], confounds[plan.start :]
    kept = np.flatnonzero(~plan.moved[plan.start :])
    filtered = config.l_freq is not None or config.h_freq is not None
    with refuse_damage(f"nilearn cannot clean {where}", hint=""), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cleaned = signal.clean(
            series,
            detrend=config.detrend,
            standardize=None,
            sample_mask=None if len(kept) == len(series) else kept,
            confounds=confounds if confounds.shape[1] else None,
            filter="butterworth" if filtered else False,
            low_pass=config.h_freq,
            high_pass=config.l_freq,
            t_r=t_r,
        )
    if len(kept) == len(series) or config.scrubbing == "cut":
        return np.asarray(cleaned, np.float32)
    # Indices of the kept neighbours of each volume, and its place between them.
    times = np.arange(len(series))
    after = np.clip(np.searchsorted(kept, times), 0, len(kept) - 1)
    before = np.maximum(after - (kept[after] > times), 0)
    gap = kept[after] - kept[before]
    share = np.clip((times - kept[before]) / np.maximum(gap, 1), 0, 1)[:, None]
    return np.asarray((1 - share) * cleaned[before] + share * cleaned[after], np.float32)
