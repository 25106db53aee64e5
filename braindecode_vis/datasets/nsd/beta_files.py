"""Betas of NSD on disk (NIfTI, HDF5, surfaces of fsaverage), and the masks and regions through which they are read.

Owns the three forms of one session, each read through a mask. Volumes are int16, percent signal change times 300; files
whose values were already divided (or should have been and were not) are recognised by their size and refused.

Also owns the region files of the functional volume and of fsaverage. They are -1 outside the cortex, 0 outside all
regions, and 1, 2, 3... in regions: a voxel belongs to ``nsdgeneral`` only if its value is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_option, is_there, refuse_damage
from braindecode_vis.base.remote import open_hdf5, open_head
from braindecode_vis.datasets.layout import File, Layout
from braindecode_vis.datasets.sources.betas_source import Geometry, Roi
from braindecode_vis.datasets.sources.fmri_volumes import (
    MaskedVolumes,
    check_same_space,
    open_stream,
    read_label_table,
    read_volume,
    read_volume_header,
)

Space = Literal["func1pt8mm", "fsaverage"]
Version = Literal["betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR"]
VOLUME_SPACE: Space = "func1pt8mm"
BETA_VERSIONS: tuple[Version, ...] = get_args(Version)
BETAS_FOLDER = "nsddata_betas"
SESSION_NAME = "betas_session{session:02d}"
"""Name of the betas of a session, without the suffix (it depends on their form)."""
UNIT = "percent signal change"
LAYOUT = Layout(
    brainmask=File(
        "nsddata/ppdata/subj{subject:02d}/func1pt8mm/brainmask.nii.gz", "other", "the brain mask of NSD",
        "fetch it, or choose another dataset.mask (cortex, nsdgeneral)",
    ),
    # A set of regions in the functional volume, and the meaning of its labels.
    regions=File(
        "nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi/{roi}.nii.gz", "other", "a set of regions of NSD",
        "fetch the folder roi of the subject",
    ),
    names=File(
        "nsddata/freesurfer/subj{subject:02d}/label/{roi}.mgz.ctab", "other", "a colour table of NSD",
        "fetch it from the bucket",
    ),
)  # fmt: skip
# Single-trial betas are a few percent; times 300 they are several hundred.
_LARGEST_PERCENT = 30.0
# Trials whose size is checked, which needs their decompression.
_SCALE_TRIALS = 5
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
Read = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class SessionFile:
    """One session on disk.

    Parameters
    ----------
    session
        From 1.
    paths
        One volume file, or the left and right surface.
    form
        Form that the first bytes show.
    """

    session: int
    paths: tuple[Path, ...]
    form: Literal["nifti", "hdf5", "mgh"]


class MissingSessionsError(DataError):
    """Files of some sessions are missing; `there` are the numbers of the others, `n_asked` counts all."""

    def __init__(self, words: str, there: tuple[int, ...] = (), n_asked: int = 0) -> None:
        super().__init__(words)
        self.there, self.n_asked = there, n_asked


def find_beta_folder(root: Path, subject: int, space: Space, version: str) -> Path:
    """Return the folder of one subject's betas.

    Raises
    ------
    DataError
        If it does not exist; the message lists the existing ones.
    """
    place = Path(f"ppdata/subj{subject:02d}") / space / version
    for base in (root / BETAS_FOLDER, root):
        if (base / place).is_dir():
            return base / place
    there = sorted(
        "/".join(path.parts[-3:])
        for base in (f"{BETAS_FOLDER}/", "")
        for path in root.glob(f"{base}ppdata/*/*/*betas*")
    )
    raise DataError(
        f"{root / BETAS_FOLDER / place} does not exist; "
        + (f"there are {', '.join(there[:6])}" if there else "no betas are below the root")
        + ": fetch them, or correct dataset.root, subject, space or betas."
    )


def find_sessions(folder: Path, sessions: list[int], space: Space) -> list[SessionFile]:
    """Return the files of the given sessions.

    Raises
    ------
    MissingSessionsError
        If some are missing; all of them are named.
    """
    found, missing = [], []
    for session in sessions:
        item = _find_session(folder, session, space)
        if item is None:
            missing.append(f"{session:02d}")
        else:
            found.append(item)
    # All are named at once, so that a user need not fetch one session after the other.
    if missing:
        raise MissingSessionsError(
            f"{len(missing)} of {len(sessions)} sessions are missing in {folder}: {', '.join(missing)}. Fetch them, "
            "or list the sessions to use with --set dataset.sessions=[...] (or a number, for the first ones).",
            tuple(item.session for item in found),
            len(sessions),
        )
    return found


def _find_session(folder: Path, session: int, space: Space) -> SessionFile | None:
    if space == "fsaverage":
        paths = tuple(folder / f"{side}.{SESSION_NAME.format(session=session)}.mgh" for side in ("lh", "rh"))
        return SessionFile(session, paths, "mgh") if all(p.is_file() for p in paths) else None
    # By content, since a file may have been renamed.
    for end in ("nii.gz", "nii", "hdf5", "h5"):
        path = folder / f"{SESSION_NAME.format(session=session)}.{end}"
        if is_there(path):
            return recognise_volume(path, session)
    return None


def recognise_volume(path: Path, session: int) -> SessionFile:
    """Return a file of betas in the functional volume, with the form that its first bytes show."""
    with open_head(path) as file:
        form: Literal["nifti", "hdf5"] = "hdf5" if file.read(8) == _HDF5_MAGIC else "nifti"
    return SessionFile(session, (path,), form)


def open_volume_session(
    item: SessionFile, mask: np.ndarray, affine: np.ndarray, n_trials: int, *, divide_by: float
) -> Read:
    """Return the reader of a session in the functional volume.

    Parameters
    ----------
    mask : bool array of shape (x, y, z)
    affine : array of shape (4, 4)
        Affine of the mask.
    n_trials
        Number of trials that the design lists.
    divide_by
        300 for the published files.

    Raises
    ------
    DataError
        If grid or number of trials differ, or the values have another scale than `divide_by` implies.
    """
    path = item.paths[0]
    reader: MaskedHdf5 | MaskedVolumes
    if item.form == "hdf5":
        reader = MaskedHdf5(path, mask, divide_by=divide_by)
        n_found = reader.n_volumes
    else:
        header = read_volume_header(path)
        check_same_space(header, mask.shape, affine, what="the mask")
        reader = MaskedVolumes(header, mask, divide_by=divide_by)
        n_found = header.n_volumes
    check_trial_count(path, n_found, n_trials)
    sample = reader.peek() if isinstance(reader, MaskedHdf5) else read_sample(reader, n_trials)
    reader.close()
    check_scale(sample, divide_by, path)
    return reader


def check_trial_count(path: Path, n_found: int, n_trials: int) -> None:
    """Raise `DataError` unless a file has as many betas as the design has trials."""
    if n_found != n_trials:
        fewer = "fewer" if n_trials < n_found else "more"
        raise DataError(
            f"the design has {fewer} trials ({n_trials}) for this session than {path} has betas "
            f"({n_found}): betas cannot be paired with images reliably; use the design that belongs to "
            f"these betas, or fetch both "
            "again."
        )


def read_sample(read: Read, n_trials: int) -> np.ndarray:
    """Return a few trials: the first ones, since a compressed file is read from its beginning.

    A single trial may be unusual (a subject moved); the median over several is not affected by it.
    """
    return read(0, min(_SCALE_TRIALS, n_trials))


def check_scale(percent: np.ndarray, divide_by: float, path: Path) -> None:
    """Raise `DataError` if betas, after division, are not of the size of percent signal change.

    Parameters
    ----------
    percent
        Some betas, divided by `divide_by`.
    """
    sizes = np.abs(percent[np.isfinite(percent) & (percent != 0)])
    if not sizes.size:
        return
    typical = float(np.median(sizes))
    # Betas in percent are a few units, and several hundred after multiplication by 300: the two cannot be confused.
    if divide_by > 1 and typical * divide_by < _LARGEST_PERCENT:
        raise DataError(
            f"the betas in {path} were already divided by 300: they are typically "
            f"{typical * divide_by:.3g} as stored, but several hundred in the published int16 files. "
            "Fetch the originals, or set dataset.divide_by=1."
        )
    if typical > _LARGEST_PERCENT:
        raise DataError(
            f"the betas in {path} are typically {typical:.3g} after division by {divide_by:g}, which no percent "
            "signal change is: they are still multiplied by 300; set dataset.divide_by=300."
        )


class MaskedHdf5:
    """Reads the HDF5 form, whose chunks hold all trials of a voxel: a session is read once, by slices, as int16."""

    def __init__(self, path: Path, mask: np.ndarray, *, divide_by: float) -> None:
        self.path, self.mask, self.divide_by = path, mask, divide_by
        self.held: np.ndarray | None = None
        with (
            refuse_damage(
                f"{path} holds no readable /betas",
                OSError,
                KeyError,
                hint="it is truncated, copy or fetch it again",
            ),
            open_hdf5(path) as file,
        ):
            shape = file["betas"].shape
        # (trials, z, y, x) without the trials and in reverse order is (x, y, z).
        if shape[:0:-1] != mask.shape:
            raise DataError(
                f"/betas of {path} has the shape {shape}; as MATLAB writes it, Python sees (trials, z, y, x), here "
                f"(trials, {', '.join(map(str, mask.shape[::-1]))}): the mask is of another subject or resolution."
            )
        self.n_volumes = int(shape[0])

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials `start` to `stop` as float32 of shape (stop - start, n_voxels)."""
        if self.held is None:
            # A session as int16 (750 trials of some 15 000 voxels) takes 23 MB; reading by trials would open every
            # chunk each time.
            self.held = self._gather()
        values = self.held[start:stop].astype(np.float32)
        if self.divide_by != 1:
            values /= np.float32(self.divide_by)
        if stop == self.n_volumes:
            self.close()
        return values

    def _gather(self) -> np.ndarray:
        with open_hdf5(self.path) as file:
            betas = file["betas"]
            out = np.empty((self.n_volumes, int(self.mask.sum())), betas.dtype)
            # Number of each voxel among those of the mask, in C order.
            number = np.cumsum(self.mask.ravel()).reshape(self.mask.shape) - 1
            # Slice by slice, the smallest box around the mask: chunks hold all trials of a voxel, so reading voxel by
            # voxel would open each chunk many times.
            for z in np.flatnonzero(self.mask.any(axis=(0, 1))):
                x, y = np.nonzero(self.mask[:, :, z])
                low, high = y.min(), y.max() + 1
                left, right = x.min(), x.max() + 1
                piece = betas[:, z, low:high, left:right]
                # piece: (n_trials, rows, columns) of the box; picked voxels: (n_trials, n_voxels of the slice).
                out[:, number[x, y, z]] = piece[:, y - low, x - left]
        return out

    def peek(self) -> np.ndarray:
        """Return the betas of one column of voxels that the mask crosses, divided."""
        x, y, z = (axis[len(axis) // 2] for axis in np.nonzero(self.mask))
        with open_hdf5(self.path) as file:
            return file["betas"][:, z, y, x].astype(np.float32) / np.float32(self.divide_by)

    def close(self) -> None:
        """Free the stored values."""
        self.held = None


# FreeSurfer's MGH: a head of 284 bytes, then big-endian numbers in Fortran order.
_MGH_HEADER_BYTES = 284
_MGH_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2"}


class SurfaceBetas:
    """Reads the left and right surface of a session; vertices of the right hemisphere follow those of the left."""

    def __init__(self, paths: tuple[Path, ...], *, divide_by: float) -> None:
        self.paths, self.divide_by = paths, divide_by
        heads = [_read_mgh_header(path) for path in paths]
        shapes = [shape for shape, _ in heads]
        if any(s[1:3] != (1, 1) for s in shapes) or shapes[0][3] != shapes[1][3]:
            raise DataError(
                f"{paths[0]} and {paths[1].name} have the shapes {shapes}; (vertices, 1, 1, trials) is expected."
            )
        self.dtypes = [dtype for _, dtype in heads]
        self.n_vertices = (shapes[0][0], shapes[1][0])
        self.n_volumes = shapes[0][3]
        self.vertices: np.ndarray | None = None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials `start` to `stop` as float32 of shape (stop - start, n_vertices)."""
        pieces = []
        for path, dtype, n in zip(self.paths, self.dtypes, self.n_vertices, strict=True):
            offset = _MGH_HEADER_BYTES + start * n * dtype.itemsize
            # Fortran order of (vertices, 1, 1, trials) is trial after trial, each with all its vertices.
            flat = np.fromfile(path, dtype, (stop - start) * n, offset=offset)
            pieces.append(flat.reshape(stop - start, n).astype(np.float32))
        values = np.concatenate(pieces, axis=1)
        if self.vertices is not None:
            values = values[:, self.vertices]
        return values / np.float32(self.divide_by)


def _read_mgh_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of an uncompressed MGH file; nibabel would leave it open."""
    head = np.fromfile(path, ">i4", 6) if path.stat().st_size >= _MGH_HEADER_BYTES else np.zeros(6, int)
    if head[0] != 1 or int(head[5]) not in _MGH_TYPES:
        raise DataError(f"{path} is not an MGH file; copy or fetch it again.")
    shape, dtype = tuple(int(n) for n in head[1:5]), np.dtype(_MGH_TYPES[int(head[5])])
    needed = _MGH_HEADER_BYTES + int(np.prod(shape)) * dtype.itemsize
    if path.stat().st_size < needed:
        raise DataError(
            f"{path} is truncated: {path.stat().st_size} of {needed} bytes; copy or fetch it again."
        )
    return shape, dtype


ROI_SETS = (
    "nsdgeneral", "prf-visualrois", "prf-eccrois", "streams", "floc-bodies", "floc-faces", "floc-places",
    "floc-words", "Kastner2015", "HCP_MMP1", "corticalsulc", "MTL", "thalamus",
)  # fmt: skip
"""The sets of regions in the functional volume."""


@dataclass(frozen=True)
class Regions:
    """The region files of one subject, or of fsaverage.

    Parameters
    ----------
    files
        Files of each set: one volume, or the left and right surface.
    tables
        Folders of the colour tables that name the labels, searched in this order.
    """

    files: dict[str, tuple[Path, ...]]
    tables: tuple[Path, ...]

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the labels of a set, (x, y, z) or (n_vertices,), and the affine of a volume."""
        check_option("the set of regions", name, self.files)
        paths = self.files[name]
        if len(paths) == 1:
            values, affine = read_volume(paths[0])
            return np.rint(values).astype(np.int16), affine
        # Left before right, as the betas are joined.
        sides = [_read_surface(path) for path in paths]
        return np.rint(np.concatenate(sides)).astype(np.int16), None

    def read_names(self, name: str) -> dict[int, str]:
        """Return the meaning of the labels of a set; empty if there is no table."""
        table = self.find_table(name)
        if table is None:
            return {}
        return {label: text for label, text in read_label_table(table).items() if label > 0}

    def find_table(self, name: str) -> Path | None:
        """Return the colour table of a set, or None if none was fetched."""
        files = (f"{name}.mgz.ctab", f"lh.{name}.mgz.ctab", f"{name}.ctab")
        places = [folder / file for folder in self.tables for file in files]
        return next((path for path in places if is_there(path)), None)


def _read_surface(path: Path) -> np.ndarray:
    """Return the labels of one hemisphere; read here, since nibabel would leave the file open."""
    import nibabel

    with refuse_damage(f"{path} cannot be read as MGH"), open_stream(path) as file:
        return np.asarray(nibabel.MGHImage.from_bytes(file.read()).dataobj).reshape(-1)


def find_regions(root: Path, subject: int, space: str) -> Regions:
    """Return the region files below the root; sets of one hemisphere are left to their joint file."""
    if space == "fsaverage":
        folder = root / "nsddata/freesurfer/fsaverage/label"
        files: dict[str, tuple[Path, ...]] = {}
        for left in sorted(folder.glob("lh.*.mg[hz]")):
            right = left.with_name("rh." + left.name[3:])
            if is_there(right):
                files[left.name[3:].rsplit(".", 1)[0]] = (left, right)
        return Regions(files, (folder, root / "nsddata/templates"))
    folder = LAYOUT.place(root, "regions", subject=subject, roi="*").parent
    volumes = sorted(folder.glob("*.nii.gz")) + sorted(folder.glob("*.nii"))
    names = {path.name.removesuffix(".gz").removesuffix(".nii"): path for path in volumes}
    joint: dict[str, tuple[Path, ...]] = {
        name: (path,) for name, path in names.items() if not name.startswith(("lh.", "rh."))
    }
    # The labels mean the same in every subject and on fsaverage; some users fetched only the folder of fsaverage.
    own = LAYOUT.place(root, "names", subject=subject, roi="*").parent
    return Regions(joint, (own, root / "nsddata/freesurfer/fsaverage/label", root / "nsddata/templates"))


def parse_mask(text: str) -> tuple[str, tuple[str, ...]]:
    """Split ``set:region,region`` into the set and its regions.

    Examples
    --------
    >>> parse_mask("streams:ventral,lateral"), parse_mask("nsdgeneral")
    (('streams', ('ventral', 'lateral')), ('nsdgeneral', ()))
    """
    name, _, rest = text.partition(":")
    return name, tuple(filter(None, (word.strip() for word in rest.split(","))))


def find_mask(
    regions: Regions, root: Path, subject: int, mask: str, mask_file: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of the functional volume, (x, y, z), and its affine.

    Parameters
    ----------
    mask
        ``brain``, ``cortex``, a set of regions, or a set and its regions.
    mask_file
        The user's own mask, instead of `mask`: voxels above 0.
    """
    if mask_file is not None:
        values, affine = read_volume(mask_file.expanduser())
        return _check_mask(values > 0, str(mask_file)), affine
    if mask == "brain":
        path = LAYOUT.find(root, "brainmask", subject=subject)
        values, affine = read_volume(path)
        return _check_mask(values > 0, str(path)), affine
    keep, found = choose_labels(regions, mask)
    if found is None:
        raise DataError(f"the regions for {mask} are surfaces, not volumes.")
    return _check_mask(keep, mask), found


def choose_labels(regions: Regions, mask: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the mask of a set of regions, or of some of its regions.

    Raises
    ------
    ConfigError, DataError
        If a set or region does not exist, or ``nsdgeneral`` holds anything but -1, 0 and 1.
    """
    name, wanted = parse_mask(mask)
    if not regions.files:
        raise DataError(
            f"no region files were found for dataset.mask={mask}; fetch the folder roi of the subject."
        )
    if name == "cortex":
        labels, affine = regions.read("nsdgeneral")
        # Values in the cortex are 0 or 1; outside they are -1.
        return labels >= 0, affine
    if name not in regions.files:
        check_option("dataset.mask", name, ["brain", "cortex", *regions.files])
    labels, affine = regions.read(name)
    if name == "nsdgeneral":
        unknown = set(np.unique(labels).tolist()) - {-1, 0, 1}
        if unknown:
            raise DataError(
                f"{regions.files[name][0]} holds the label {unknown.pop()}; nsdgeneral is -1 outside the cortex, 0 "
                "in it, and 1 in the region: this is another file."
            )
        return labels == 1, affine
    if not wanted:
        return labels > 0, affine
    names = regions.read_names(name)
    known = {str(label): int(label) for label in np.unique(labels) if label > 0}
    # A region may be given by its number or by its name.
    known |= {text: label for label, text in names.items()}
    for region in wanted:
        if region not in known and not names and not region.isdigit():
            raise ConfigError(
                f"dataset.mask names the region {region!r} of {name}, but its number is in no colour "
                f"table: fetch nsddata/freesurfer/{regions.tables[0].parent.name}/label/{name}.mgz.ctab "
                "(a few kB) from the "
                f"bucket of NSD, or give regions by number ({', '.join(list(known)[:12])}), as in "
                f"dataset.mask={name}:{','.join(list(known)[:2])}."
            )
        check_option(f"the region of {name} in dataset.mask", region, known)
    return np.isin(labels, [known[region] for region in wanted]), affine


def _check_mask(mask: np.ndarray, what: str) -> np.ndarray:
    if not mask.any():
        raise ConfigError(f"the mask {what} is empty.")
    return mask


def make_volume_geometry(
    regions: Regions, mask: np.ndarray, affine: np.ndarray, sets: Sequence[str] | None, maps: dict[str, Path]
) -> Geometry:
    """Return the geometry of a mask with the sets of regions and published maps.

    Parameters
    ----------
    sets
        Names of the sets; by default the known ones that exist.
    maps
        Volumes of one number per voxel.

    Raises
    ------
    DataError
        If a file has another grid than the mask.
    """
    rois = _read_rois(regions, mask, sets, lambda path: _check_grid(path, mask, affine))
    numbers = {}
    for name, path in maps.items():
        _check_grid(path, mask, affine)
        # Voxels without signal have none (NaN).
        numbers[name] = np.nan_to_num(read_volume(path)[0][mask])
    return Geometry.from_mask(mask, affine, rois, numbers)


def make_surface_geometry(
    regions: Regions, keep: np.ndarray, n_vertices: tuple[int, int], sets: Sequence[str] | None
) -> Geometry:
    """Return the geometry of the vertices of fsaverage that `keep` picks, shape (n_vertices of both sides,)."""
    rois = _read_rois(regions, keep, sets, lambda path: None)
    return Geometry(np.flatnonzero(keep), rois=rois, surface="fsaverage", n_vertices=n_vertices)


def _check_grid(path: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    check_same_space(read_volume_header(path), mask.shape, affine, what="the mask")


def _read_rois(
    regions: Regions, mask: np.ndarray, sets: Sequence[str] | None, check: Callable[[Path], None]
) -> dict[str, Roi]:
    if sets is None:
        # Files with other names are the user's own, read only if they are requested.
        sets = [name for name in ROI_SETS if name in regions.files]
    rois = {}
    for name in sets:
        if ":" in name:
            raise ConfigError(
                f"dataset.rois names whole sets of regions; to keep those of {name}, set dataset.mask={name}."
            )
        check_option("the set of regions in dataset.rois", name, regions.files)
        for path in regions.files[name]:
            check(path)
        labels, _ = regions.read(name)
        if labels.shape != mask.shape:
            raise DataError(f"the regions {name} have the shape {labels.shape}, the mask {mask.shape}.")
        rois[name] = Roi(labels[mask], regions.read_names(name))
    return rois
