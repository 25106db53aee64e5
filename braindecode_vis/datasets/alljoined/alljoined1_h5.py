"""The HDF5 files of Alljoined1: a pandas table with an array in each row, read in place and without running anything.

pandas and PyTables would unpickle the column of arrays, and whatever hides in the attributes, and need five times the
size of the file. Here the pickle is found in the file (an HDF5 global heap), the restricted reader notes where each
array lies, and an epoch is read from there. Compressed blocks of numbers are unpacked with blosc2.

References
----------
The HDF Group, "HDF5 File Format Specification", III.E: the global heap.
pandas, `DataFrame.to_hdf`: the fixed format.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.safe_pickle import FileArray, read_pickled

MAGIC = b"\x89HDF\r\n\x1a\n"
_ARRAY_COLUMNS = ("eeg", "EEG")
_DEFLATE, _SHUFFLE, _BLOSC = 1, 2, 32001  # registered numbers of HDF5 filters
_SMALL_BYTES = 1024


@dataclass(frozen=True)
class TableFile:
    """What one file holds.

    Parameters
    ----------
    numbers : DataFrame
        Its columns of numbers.
    arrays
        The array of each row, in the file.
    """

    path: Path
    numbers: pd.DataFrame
    arrays: list[FileArray]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the arrays of rows `start` to `stop`, stacked."""
        return np.stack([array.read_rows(0, array.shape[0]) for array in self.arrays[start:stop]])


def open_table(path: Path, shape: tuple[int, int]) -> TableFile:
    """Read the numbers of a table and find its arrays.

    Parameters
    ----------
    path
        The file.
    shape
        Channels and samples that each array must have.

    Raises
    ------
    DataError
        If the file is damaged, holds no such table, or its pickle names code to run.
    ConfigError
        If blosc2, which unpacks it, is not installed.
    """
    import h5py

    numbers: dict[str, np.ndarray] = {}
    objects: np.ndarray | None = None
    try:
        with h5py.File(path, "r") as file:
            group = _find_frame(file, path)
            for number in range(int(group.attrs["nblocks"])):
                names = [name.decode() for name in _read_plain(group[f"block{number}_items"], path).tolist()]
                values = group[f"block{number}_values"]
                if not values.dtype.hasobject:
                    numbers |= dict(zip(names, _read_plain(values, path).T, strict=True))
                    continue
                found = [name for name in names if name in _ARRAY_COLUMNS]
                if found:
                    content = read_pickled(path, offset=_find_bytes(values, path), large_bytes=_SMALL_BYTES)
                    objects = np.asarray(content, dtype=object).reshape(-1, len(names))[
                        :, names.index(found[0])
                    ]
    except (OSError, RuntimeError, KeyError, ValueError, AttributeError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); fetch it again.") from error
    if objects is None:
        raise DataError(f"{path} has no column eeg, only {', '.join(numbers)}; it is another file.")
    return TableFile(path, pd.DataFrame(numbers), _check_arrays(objects, shape, path))


def _check_arrays(objects: np.ndarray, shape: tuple[int, int], path: Path) -> list[FileArray]:
    for number, array in enumerate(objects):
        if not isinstance(array, FileArray) or array.shape != shape or array.dtype.kind != "f":
            found = getattr(array, "shape", type(array).__name__)
            raise DataError(
                f"{path}: row {number} should hold {shape[0]} channels of {shape[1]} samples, but holds {found}."
            )
    return list(objects)


def _find_frame(file: Any, path: Path) -> Any:
    groups = [group for group in file.values() if _text(group.attrs.get("pandas_type")) == "frame"]
    if len(groups) != 1:
        raise DataError(
            f"{path} should hold one pandas table in the fixed format, but holds {len(groups)}; it is another file."
        )
    return groups[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _list_filters(dataset: Any, path: Path) -> list[int]:
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    unknown = [number for number in filters if number not in (_DEFLATE, _SHUFFLE, _BLOSC)]
    if unknown:
        raise DataError(
            f"{path} is packed with the HDF5 filter {unknown[0]}, where blosc ({_BLOSC}) is published."
        )
    return filters


def _unpack_blosc(chunk: bytes, path: Path) -> bytes:
    try:
        import blosc2
    except ImportError as error:
        raise ConfigError(
            f"{path} is a pandas HDF5 table packed with blosc; reading it needs blosc2, which comes with PyTables: "
            "pip install tables."
        ) from error
    return bytes(blosc2.decompress(chunk))


def _read_chunk(dataset: Any, offset: tuple[int, ...], path: Path) -> bytes:
    """Return one chunk of a dataset after undoing its filters."""
    mask, chunk = dataset.id.read_direct_chunk(offset)
    for place, number in reversed(list(enumerate(_list_filters(dataset, path)))):
        if mask >> place & 1:  # left out for this chunk
            continue
        if number == _BLOSC:
            chunk = _unpack_blosc(chunk, path)
        elif number == _DEFLATE:
            chunk = zlib.decompress(chunk)
        else:
            n_bytes = dataset.id.get_type().get_size()
            chunk = np.frombuffer(chunk, np.uint8).reshape(n_bytes, -1).T.tobytes()
    return bytes(chunk)


def _read_plain(dataset: Any, path: Path) -> np.ndarray:
    """Return a dataset of numbers or text."""
    if dataset.dtype.hasobject:
        raise DataError(f"{path} holds {dataset.name} in a form that no published file has; fetch it again.")
    if _BLOSC not in _list_filters(dataset, path):
        return np.asarray(dataset[()])
    out = np.zeros(dataset.shape, dataset.dtype)
    for number in range(dataset.id.get_num_chunks()):
        start = dataset.id.get_chunk_info(number).chunk_offset
        block = np.frombuffer(_read_chunk(dataset, start, path), dataset.dtype).reshape(dataset.chunks)
        place = tuple(
            slice(a, min(a + c, n)) for a, c, n in zip(start, dataset.chunks, out.shape, strict=True)
        )
        out[place] = block[tuple(slice(0, s.stop - s.start) for s in place)]
    return out


def _find_bytes(dataset: Any, path: Path) -> int:
    """Return the place in the file of the only row of a dataset of variable length.

    Such a row is stored as length, address of a collection and number in it; the collection lists its objects.
    """
    if dataset.shape != (1,) or dataset.file.userblock_size:
        raise DataError(f"{path} holds {dataset.name} in a form that no published file has; fetch it again.")
    _, address, wanted = struct.unpack("<IQI", _read_chunk(dataset, (0,), path)[:16])
    with path.open("rb") as file:
        file.seek(address)
        head = file.read(16)
        size = struct.unpack("<Q", head[8:])[0]
        place = address + 16
        while head[:4] == b"GCOL" and place < address + size:
            file.seek(place)
            index, _, _, n_bytes = struct.unpack("<HHIQ", file.read(16))
            if index == wanted:
                return int(place + 16)
            place += 16 + -(-n_bytes // 8) * 8
    raise DataError(f"{path} is damaged: it lacks the bytes of {dataset.name}; fetch it again.")
