"""Betas of NSD on disk: NIfTI and HDF5 volumes, and surfaces of fsaverage.

Owns the three forms of one session, each read through a mask. Volumes are int16, percent signal change times 300; files
that were divided before (or that should have been and were not) are recognised by their size and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, check_same_space, read_volume_header

Space = Literal["func1pt8mm", "fsaverage"]
Version = Literal["betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR"]
UNIT = "percent signal change"
# Single-trial betas are a few percent; times 300 they are several hundred.
_LARGEST_PERCENT = 30.0
# Trials whose size is looked at, at the cost of their decompression.
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
        What the first bytes say it is.
    """

    session: int
    paths: tuple[Path, ...]
    form: Literal["nifti", "hdf5", "mgh"]


def find_beta_folder(root: Path, subject: int, space: Space, version: str) -> Path:
    """Return the folder of one subject's betas.

    Raises
    ------
    DataError
        If it is not there; the message says which ones are.
    """
    place = Path(f"ppdata/subj{subject:02d}") / space / version
    for base in (root / "nsddata_betas", root):
        if (base / place).is_dir():
            return base / place
    there = sorted(
        "/".join(path.parts[-3:])
        for base in ("nsddata_betas/", "")
        for path in root.glob(f"{base}ppdata/*/*/*betas*")
    )
    raise DataError(
        f"{root / 'nsddata_betas' / place} does not exist; "
        + (f"there are {', '.join(there[:6])}" if there else "no betas are below the root")
        + ": fetch them, or correct dataset.root, subject, space or betas."
    )


def find_sessions(folder: Path, sessions: list[int], space: Space) -> list[SessionFile]:
    """Return the files of the given sessions.

    Raises
    ------
    DataError
        If some are missing; all of them are named.
    """
    found, missing = [], []
    for session in sessions:
        item = _find_session(folder, session, space)
        if item is None:
            missing.append(f"{session:02d}")
        else:
            found.append(item)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(sessions)} sessions are missing in {folder}: {', '.join(missing)}. Fetch them, "
            "or list "
            "the sessions to use with --set dataset.sessions=[...] (or a number, for the first ones)."
        )
    return found


def _find_session(folder: Path, session: int, space: Space) -> SessionFile | None:
    if space == "fsaverage":
        paths = tuple(folder / f"{side}.betas_session{session:02d}.mgh" for side in ("lh", "rh"))
        return SessionFile(session, paths, "mgh") if all(p.is_file() for p in paths) else None
    for end in ("nii.gz", "nii", "hdf5", "h5"):
        path = folder / f"betas_session{session:02d}.{end}"
        if path.is_file():
            with path.open("rb") as file:
                form: Literal["nifti", "hdf5"] = "hdf5" if file.read(8) == _HDF5_MAGIC else "nifti"
            return SessionFile(session, (path,), form)
    return None


def open_volume_session(
    item: SessionFile, mask: np.ndarray, affine: np.ndarray, n_trials: int, *, divide_by: float
) -> Read:
    """Return the reader of a session in the functional volume.

    Parameters
    ----------
    mask : bool array of shape (x, y, z)
    affine : array of shape (4, 4)
        Of the mask.
    n_trials
        That the design lists.
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
            f"the design has {fewer} trials ({n_trials}) for this session than {path} has betas ({n_found}): no beta "
            "could "
            "be paired with its image for sure; use the design that belongs to these betas, or fetch both again."
        )


def read_sample(read: Read, n_trials: int) -> np.ndarray:
    """Return a few trials: the first ones, since a compressed file is read from its beginning.

    A single trial may be odd (a subject who moved); the median over several is not moved by it.
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
    if divide_by > 1 and typical * divide_by < _LARGEST_PERCENT:
        raise DataError(
            f"the betas in {path} were already divided by 300: they are typically {typical * divide_by:.3g} as "
            "stored, where the published int16 files have several hundred. Fetch the originals, or say so with "
            "dataset.divide_by=1."
        )
    if typical > _LARGEST_PERCENT:
        raise DataError(
            f"the betas in {path} are typically {typical:.3g} after division by {divide_by:g}, which no percent "
            "signal change is: they are still multiplied by 300; set dataset.divide_by=300."
        )


class MaskedHdf5:
    """Reads the HDF5 form, whose chunks hold all trials of a voxel: gathered once, slice by slice, as int16."""

    def __init__(self, path: Path, mask: np.ndarray, *, divide_by: float) -> None:
        import h5py

        self.path, self.mask, self.divide_by = path, mask, divide_by
        self.held: np.ndarray | None = None
        try:
            with h5py.File(path, "r") as file:
                shape = file["betas"].shape
        except (OSError, KeyError) as error:
            raise DataError(
                f"{path} holds no readable /betas ({error}); it is truncated, copy or fetch it again."
            ) from error
        if shape[:0:-1] != mask.shape:
            raise DataError(
                f"/betas of {path} has the shape {shape}; as MATLAB writes it, Python sees (trials, z, y, x), here "
                f"(trials, {', '.join(map(str, mask.shape[::-1]))}): the mask is of another subject or resolution."
            )
        self.n_volumes = int(shape[0])

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials `start` to `stop` as float32 of shape (stop - start, n_voxels)."""
        if self.held is None:
            self.held = self._gather()
        values = self.held[start:stop].astype(np.float32)
        if self.divide_by != 1:
            values /= np.float32(self.divide_by)
        if stop == self.n_volumes:
            self.close()
        return values

    def _gather(self) -> np.ndarray:
        import h5py

        with h5py.File(self.path, "r") as file:
            betas = file["betas"]
            out = np.empty((self.n_volumes, int(self.mask.sum())), betas.dtype)
            # Number of each voxel among the mask's, in C order.
            number = np.cumsum(self.mask.ravel()).reshape(self.mask.shape) - 1
            for z in np.flatnonzero(self.mask.any(axis=(0, 1))):
                x, y = np.nonzero(self.mask[:, :, z])
                low, high = y.min(), y.max() + 1
                left, right = x.min(), x.max() + 1
                piece = betas[:, z, low:high, left:right]
                out[:, number[x, y, z]] = piece[:, y - low, x - left]
        return out

    def peek(self) -> np.ndarray:
        """Return the betas of one column of voxels that the mask crosses, divided."""
        import h5py

        x, y, z = (axis[len(axis) // 2] for axis in np.nonzero(self.mask))
        with h5py.File(self.path, "r") as file:
            return file["betas"][:, z, y, x].astype(np.float32) / np.float32(self.divide_by)

    def close(self) -> None:
        """Free what is held."""
        self.held = None


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
        raise DataError(f"{path} is no MGH file; copy or fetch it again.")
    shape, dtype = tuple(int(n) for n in head[1:5]), np.dtype(_MGH_TYPES[int(head[5])])
    needed = _MGH_HEADER_BYTES + int(np.prod(shape)) * dtype.itemsize
    if path.stat().st_size < needed:
        raise DataError(
            f"{path} is truncated: {path.stat().st_size} of {needed} bytes; copy or fetch it again."
        )
    return shape, dtype
