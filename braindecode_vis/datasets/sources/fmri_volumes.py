"""NIfTI files of many volumes, read through a mask in one pass: one volume at a time, never the whole file.

Owns the stream (uncompressed, or gzip through ISA-L if the package `isal` is installed), the selection of the mask's
voxels, and the tables that name the numbers of a label image: FreeSurfer's colour tables (``.ctab``), Schaefer's
``_order.txt`` and nilearn's ``.tsv`` have a number and a name at the start of each line. The values are those of
``nibabel.load(path).get_fdata()[mask].T``, without its float64 copy of the file.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.base.remote import RemotePath, borrow_head, open_head

_GZIP_MAGIC = b"\x1f\x8b"
# A micrometre: the rounding error of float32 for a position in the head.
_AFFINE_MM = 1e-3


@dataclass(frozen=True)
class VolumeHeader:
    """Content of the header of a NIfTI file.

    Parameters
    ----------
    path
        The file, for messages.
    shape : (x, y, z)
    n_volumes
        1 for a 3-D file.
    affine : array of shape (4, 4)
    dtype
        Type of the stored numbers, with their byte order.
    slope, inter
        Scaling from stored numbers to values; 1 and 0 if the header does not give them.
    offset
        First byte of the data, after decompression.
    t_r
        Step of the fourth axis in the header, 0 if unknown.
    time_unit
        Unit of the step, with nibabel's names: ``sec``, ``msec``, ``usec``, or ``unknown``.
    """

    path: Path
    shape: tuple[int, int, int]
    n_volumes: int
    affine: np.ndarray
    dtype: np.dtype
    slope: float
    inter: float
    offset: int
    t_r: float
    time_unit: str


def read_volume_header(path: Path) -> VolumeHeader:
    """Read the header of a NIfTI file, compressed or not.

    Raises
    ------
    DataError
        If the file is missing, is not NIfTI, or has neither three nor four axes.
    """
    import nibabel

    if not path.is_file():
        raise DataError(f"{path} does not exist; fetch it, or correct the root.")
    with refuse_damage(f"{path} cannot be read as NIfTI"), borrow_head(path) as head:
        image: Any = nibabel.load(head)
        header = image.header
        slope, inter = image.dataobj.slope, image.dataobj.inter
        offset, dtype = int(image.dataobj.offset), np.dtype(image.dataobj.dtype)
    shape = tuple(int(n) for n in image.shape)
    # Some writers add empty axes after the fourth.
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4):
        raise DataError(
            f"{path} has the shape {shape}; three axes, or four with the trials last, are expected."
        )
    zooms, unit = header.get_zooms(), "unknown"
    with suppress(AttributeError, KeyError):  # of other formats, and a number that names no unit
        unit = header.get_xyzt_units()[1]
    return VolumeHeader(
        path, (shape[0], shape[1], shape[2]), shape[3] if len(shape) == 4 else 1, np.asarray(image.affine, float),
        dtype, float(slope), float(inter), offset, float(zooms[3]) if len(zooms) > 3 else 0.0, unit,
    )  # fmt: skip


def check_same_space(header: VolumeHeader, shape: tuple[int, ...], affine: np.ndarray, *, what: str) -> None:
    """Raise `DataError` unless a file has the grid of `what` (a mask, another run)."""
    if header.shape != tuple(shape):
        raise DataError(
            f"{header.path} has volumes of {header.shape}, but {what} has {tuple(shape)}: they are of different "
            "subjects or resolutions."
        )
    # Masks are often stored with a float32 affine, so differences of a micrometre are ignored.
    if not np.allclose(header.affine, affine, atol=_AFFINE_MM):
        worst = float(np.abs(header.affine - affine).max())
        raise DataError(
            f"the affine of {header.path} differs from that of {what} by up to {worst:.4g}: they are in "
            "different spaces although their shapes agree; take both from the same folder, or resample one."
        )


class MaskedVolumes:
    """Reads trials of one file through a mask, in ascending order.

    Parameters
    ----------
    header
        Header of the file.
    mask : bool array of shape (x, y, z)
        Voxels to return, in C order.
    divide_by
        Divisor of the values.

    Examples
    --------
    ``MaskedVolumes(read_volume_header(path), mask)(0, 10)`` gives float32 of shape (10, n_voxels).
    """

    def __init__(self, header: VolumeHeader, mask: np.ndarray, *, divide_by: float = 1.0) -> None:
        self.header, self.divide_by = header, divide_by
        # The file is in Fortran order; its own flat indices avoid a transposed copy of each volume.
        self.flat = np.ravel_multi_index(np.nonzero(mask), mask.shape, order="F").astype(np.intp)
        self.file: IO[bytes] | None = None
        self.position = 0

    @property
    def n_voxels(self) -> int:
        """Number of voxels in the mask."""
        return len(self.flat)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return volumes `start` to `stop` as float32 of shape (stop - start, n_voxels)."""
        header = self.header
        stored = np.empty((stop - start, self.n_voxels), header.dtype)
        volume = np.empty(int(np.prod(header.shape)), header.dtype)
        self._seek(start)
        for row in range(stop - start):
            self._fill(volume)
            # A mode other than "raise" lets take write into `out` without a buffer; the indices are known to fit.
            np.take(volume, self.flat, out=stored[row], mode="clip")
        if self.position == header.n_volumes:
            self.close()
        return self._scale(stored)

    def _scale(self, stored: np.ndarray) -> np.ndarray:
        # In double precision, as in nibabel; without a slope no float64 copy is needed.
        if self.header.slope != 1 or self.header.inter != 0:
            wide = stored.astype(np.float64) * self.header.slope + self.header.inter
            return (wide / self.divide_by).astype(np.float32)
        values = stored.astype(np.float32)
        if self.divide_by != 1:
            values /= np.float32(self.divide_by)
        return values

    def _seek(self, start: int) -> None:
        # A compressed stream goes only forward; to go back, start again.
        if self.file is None or start < self.position:
            self.close()
            self.file = open_stream(self.header.path)
            self._skip(self.header.offset)
        size = int(np.prod(self.header.shape)) * self.header.dtype.itemsize
        self._skip((start - self.position) * size)
        self.position = start

    def _skip(self, n_bytes: int) -> None:
        assert self.file is not None
        with self._explain():
            while n_bytes:
                # In pieces, since the skipped part may have gigabytes.
                piece = len(self.file.read(min(n_bytes, 1 << 20)))
                if not piece:
                    raise EOFError
                n_bytes -= piece

    def _fill(self, volume: np.ndarray) -> None:
        assert self.file is not None
        rest = volume.view(np.uint8).data
        with self._explain():
            while rest:
                n = self.file.readinto(rest)  # type: ignore[attr-defined]
                if not n:
                    raise EOFError
                rest = rest[n:]
        self.position += 1

    def _explain(self) -> _Damage:
        return _Damage(self)

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self.file is not None:
            self.file.close()
        self.file, self.position = None, 0


class _Damage:
    """Turns the errors of a damaged stream into one sentence."""

    def __init__(self, volumes: MaskedVolumes) -> None:
        self.volumes = volumes

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, EOFError | zlib.error | OSError):
            header, reached = self.volumes.header, self.volumes.position
            # The stream is damaged already; closing it may fail for the same reason.
            with suppress(Exception):
                self.volumes.close()
            raise DataError(
                f"{header.path} is truncated or damaged: it ends in volume {reached} of {header.n_volumes}; copy or "
                "fetch it again."
            ) from error


def open_stream(path: Path) -> IO[bytes]:
    """Open a file for reading; if it starts like gzip, decompress it with the fastest available gunzip."""
    with open_head(path) as file:
        compressed = file.read(2) == _GZIP_MAGIC
    return find_gunzip()[1](path) if compressed else open_head(path)


def find_gunzip() -> tuple[str, Callable[[Path], IO[bytes]]]:
    """Return the name of the fastest available gunzip, and the function that opens a file with it."""
    try:
        from isal import igzip_threaded
    except ImportError:
        return "zlib", partial(_open_gzip, gzip.open)
    # One thread decompresses the next part while this one selects voxels.
    return "isal", partial(_open_gzip, partial(igzip_threaded.open, mode="rb", threads=1))


def _open_gzip(open_it: Callable[[Any], Any], path: Path) -> IO[bytes]:
    """Open a compressed file; for a large one on a server, reading the first volumes does not download all of it."""
    if not isinstance(path, RemotePath):
        return cast(IO[bytes], open_it(path))
    source = open_head(path)
    file = open_it(source)
    # Both libraries do not close files that they did not open themselves.
    if isinstance(file, gzip.GzipFile):
        file.myfileobj = source  # type: ignore[assignment]
    else:
        file.raw.closefd = True
    return cast(IO[bytes], file)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return one volume, of shape (x, y, z), and its affine.

    Raises
    ------
    DataError
        If the file holds several volumes.
    """
    header = read_volume_header(path)
    if header.n_volumes != 1:
        raise DataError(f"{path} holds {header.n_volumes} volumes; one is expected.")
    # Through the same reader as runs, so that messages about damage are the same.
    values = MaskedVolumes(header, np.ones(header.shape, bool))(0, 1)[0]
    return values.reshape(header.shape), header.affine


def read_label_table(path: Path) -> dict[int, str]:
    """Read a table with a number and a name at the start of each line.

    ``#`` starts a comment; the first line may be a header.

    Raises
    ------
    DataError
        If a line has neither form.
    """
    if not path.is_file():
        raise DataError(f"the label table {path} does not exist; correct its path.")
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        words = re.split(r"[\t, ]+", line.strip())
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if len(words) < 2 or not words[0].lstrip("-").isdigit():
            # A header has no number.
            if number == 0:
                continue
            raise DataError(f"line {number + 1} of {path} is not a number and a name: {line.strip()[:60]!r}.")
        names[int(words[0])] = words[1]
    return names
