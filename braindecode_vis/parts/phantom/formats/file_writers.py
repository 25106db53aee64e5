"""Common writers of the formats: small text files, compressed NIfTI volumes, and checks of the streams.

Every file appears only when it is complete. A volume file is written volume by volume from a stream.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import replace_atomically

HEADER_BYTES = 352  # of NIfTI-1 with an empty extension
# Noise hardly compresses: the fastest level costs a few percent of the size and saves most of the computing time.
_COMPRESS_LEVEL = 1


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(text.encode())
    return path


def write_json_file(path: Path, value: Any) -> Path:
    """Write a sidecar with the indentation that BIDS data sets use."""
    return write_text(path, json.dumps(value, indent=4) + "\n")


def write_tsv(path: Path, table: pd.DataFrame, *, missing: str = "n/a") -> Path:
    """Write a tab-separated table; missing values become `missing`."""
    return write_text(path, table.to_csv(sep="\t", index=False, na_rep=missing, lineterminator="\n"))


def write_csv(path: Path, table: pd.DataFrame, *, header: bool = True, index: bool = False) -> Path:
    """Write a comma-separated table; missing values stay empty."""
    return write_text(path, table.to_csv(header=header, index=index, lineterminator="\n"))


def check_block(block: np.ndarray, shape: Sequence[int | None], *, what: str) -> np.ndarray:
    """Return `block` as an array, or raise `DataError` if its shape or its numbers are not usable.

    Parameters
    ----------
    block : array
        One piece of a stream.
    shape
        Expected size of each axis; None leaves an axis free.
    what
        Name of the stream, for the message.

    Raises
    ------
    DataError
        If the shape differs or a value is not finite.
    """
    array = np.asarray(block)
    fits = array.ndim == len(shape) and all(
        s is None or s == n for s, n in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise DataError(f"{what} must come in pieces of shape ({expected}), but one has {array.shape}.")
    # One sum finds any NaN or infinity without a temporary array of the size of the block.
    with np.errstate(over="ignore", invalid="ignore"):
        bad = array.dtype.kind == "f" and not np.isfinite(np.sum(array, dtype=np.float64))
    if bad and not np.isfinite(array).all():
        raise DataError(f"{what} holds a non-finite value; a recording on disk must not.")
    return array


def check_count(found: int, expected: int, *, what: str, unit: str) -> None:
    """Raise `DataError` unless a stream had the length in its header."""
    if found != expected:
        raise DataError(f"{what} was announced with {expected} {unit}, but {found} were received.")


def write_volumes(
    path: Path,
    volumes: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_volumes: int,
    affine: np.ndarray,
    dtype: np.dtype | type | str = np.float32,
    t_r: float = 1.0,
    has_gaps: bool = False,
) -> Path:
    """Write a 4-D ``.nii.gz`` from a stream of volumes; one volume is in memory at a time.

    Parameters
    ----------
    volumes : iterable of arrays of shape (x, y, z)
        Cast to `dtype` without scaling; scale and round before.
    n_volumes
        Number of volumes. The header contains it and is written first.
    affine : array of shape (4, 4)
        Voxel indices to millimetres.
    t_r
        Step of the fourth axis (s).
    has_gaps
        Whether voxels may be NaN, as in the betas of some data sets.

    Raises
    ------
    DataError
        If a volume has another shape or holds a non-finite value, or if the count differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replace_atomically(path) as temporary, temporary.open("wb") as raw:
        # No name and no time in the gzip header: the same volumes give the same bytes.
        with gzip.GzipFile("", "wb", compresslevel=_COMPRESS_LEVEL, fileobj=raw, mtime=0) as file:
            file.write(_make_header((*shape, n_volumes), affine, dtype, t_r))
            for volume in volumes:
                array = volume if has_gaps else check_block(volume, shape, what=f"the volumes of {path.name}")
                file.write(np.asarray(array, dtype=np.dtype(dtype).newbyteorder("<")).tobytes(order="F"))
                count += 1
        check_count(count, n_volumes, what=path.name, unit="volumes")
    return path


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray) -> Path:
    """Write one 3-D ``.nii.gz`` in the array's own type (booleans as uint8)."""
    array = np.asarray(volume)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    check_block(array, (None, None, None), what=path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _make_header(array.shape, affine, array.dtype, None)
    content += array.astype(array.dtype.newbyteorder("<")).tobytes(order="F")
    with replace_atomically(path) as temporary:
        temporary.write_bytes(gzip.compress(content, _COMPRESS_LEVEL, mtime=0))
    return path


def _make_header(
    shape: tuple[int, ...], affine: np.ndarray, dtype: np.dtype | type | str, t_r: float | None
) -> bytes:
    from nibabel import Nifti1Header

    header = Nifti1Header(endianness="<")
    header.set_data_shape(shape)
    header.set_data_dtype(np.dtype(dtype))
    header.set_xyzt_units("mm", "sec")
    # Both forms, since readers use one or the other.
    header.set_qform(affine, code="aligned")
    header.set_sform(affine, code="aligned")
    if t_r is not None:
        header.set_zooms((*header.get_zooms()[:3], t_r))
    header["vox_offset"] = HEADER_BYTES
    header["magic"] = b"n+1"
    # Numbers are stored without scaling.
    header["scl_slope"], header["scl_inter"] = 1, 0
    return header.binaryblock + b"\0\0\0\0"
