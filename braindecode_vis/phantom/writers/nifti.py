"""Compressed NIfTI images, written volume by volume."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from braindecode_vis.phantom.writers.tables import check_block, check_count
from braindecode_vis.store import replace_atomically

HEADER_BYTES = 352
# Noise hardly compresses: the fastest level costs a few percent of the size and saves most of the time.
_COMPRESS_LEVEL = 1


def write_volumes(
    path: Path,
    volumes: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_volumes: int,
    affine: np.ndarray,
    dtype: np.dtype | type | str = np.float32,
    t_r: float = 1.0,
) -> Path:
    """Write a 4-D ``.nii.gz`` from a stream of volumes; one volume is in memory at a time.

    Parameters
    ----------
    volumes : iterable of arrays of shape (x, y, z)
        Cast to `dtype` as they are; scale and round before.
    n_volumes
        How many will come. The header is written first and holds it.
    affine : array of shape (4, 4)
        Voxel indices to millimetres.
    t_r
        Step of the fourth axis (s).

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
                array = check_block(volume, shape, what=f"the volumes of {path.name}")
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
    header.set_qform(affine, code="aligned")
    header.set_sform(affine, code="aligned")
    if t_r is not None:
        header.set_zooms((*header.get_zooms()[:3], t_r))
    header["vox_offset"] = HEADER_BYTES
    header["magic"] = b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    return header.binaryblock + b"\0\0\0\0"
