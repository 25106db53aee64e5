"""Arrays that are written step by step: a ``.npy`` file row by row, and finished parts of a result."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Progress
from braindecode_vis.base.locks import LEASE, BeingMade, hold_lease
from braindecode_vis.base.store import hash_json, replace_atomically

_FLOAT16_MAX = 65504.0  # larger values would become infinite without a word


class ArrayFile:
    """A ``.npy`` file that is written and read row by row, without a memory map that would count as memory.

    Parameters
    ----------
    path
        The file; its folder is made if needed.
    shape, dtype
        Of the array.
    continues
        Whether the rows of an earlier process are kept, if the file exists and has this shape.

    Attributes
    ----------
    is_continued : bool
        Whether rows of an earlier process were kept.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype, *, continues: bool = False
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        path.parent.mkdir(parents=True, exist_ok=True)
        header = io.BytesIO()
        _write_header(header, shape, dtype)
        self.offset = header.tell()
        self.row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        self.n_bytes = self.offset + shape[0] * self.row_bytes
        self.is_continued = continues and path.is_file() and path.stat().st_size == self.n_bytes
        self.file = path.open("r+b" if self.is_continued else "w+b", buffering=0)
        self.is_continued = self.is_continued and self.file.read(self.offset) == header.getvalue()
        if not self.is_continued:
            self.file.seek(0)
            self.file.truncate(0)
            self.file.write(header.getvalue())
            self.file.truncate(
                self.n_bytes
            )  # the length at once: a full disk is seen early, holes read as zeros

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and keep it."""
        self.file.close()

    def sync(self) -> None:
        """Wait until everything is on the disk, so that records made afterwards are right."""
        os.fsync(self.file.fileno())

    def shrink(self, n_rows: int) -> None:
        """Keep the first `n_rows` rows only."""
        self.shape = (n_rows, *self.shape[1:])
        self.n_bytes = self.offset + n_rows * self.row_bytes
        self.file.seek(0)
        _write_header(self.file, self.shape, self.dtype)
        # NumPy leaves room for the number of rows to grow, so that a smaller one fits as well.
        assert self.file.tell() == self.offset
        self.file.truncate(self.n_bytes)

    def reshape(self, shape: tuple[int, ...]) -> None:
        """Give the values of the file another shape of the same size."""
        self.file.seek(0)
        _write_header(self.file, shape, self.dtype)
        assert self.file.tell() == self.offset

    def write(self, start: int, block: np.ndarray) -> None:
        """Write rows from `start` on."""
        if self.dtype == np.float16 and (np.abs(block).max(initial=0) > _FLOAT16_MAX):
            raise DataError("a response is too large for float16; set dtype to float32.")
        self.file.seek(self.offset + start * self.row_bytes)
        rest = np.ascontiguousarray(block, dtype=self.dtype).reshape(-1).view(np.uint8).data
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"{self.path} could not be written ({error.strerror}); free some space."
            ) from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` as float32.

        Raises
        ------
        DataError
            If the file ends before them.
        """
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        self.file.seek(self.offset + start * self.row_bytes)
        while view:
            if not (n_read := self.file.readinto(view)):
                raise DataError(f"{self.path} was cut short by another process; run the same command again.")
            view = view[n_read:]
        return out.astype(np.float32, copy=False)


def _write_header(file: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class KeptParts:
    """Finished parts of an unfinished result, so that a killed process can be continued.

    Parameters
    ----------
    folder
        Named by a digest of everything that determines the result, and removed once it is finished; created on first
        use. None keeps nothing.
    shared
        Whether other processes make parts at the same time; see `claim`.
    """

    def __init__(self, folder: Path | None = None, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self._n_groups = 0

    def number_group(self) -> int:
        """Return the number of a group of parts; groups are numbered in the order of the calls."""
        self._n_groups += 1
        return self._n_groups

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of a part; None if it is missing or damaged, so that it is computed again."""
        if not self.holds(name):
            return None
        try:
            with np.load(self._find(name), allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def holds(self, name: str) -> bool:
        """Say whether a part exists."""
        return self.folder is not None and self._find(name).is_file()

    def write(self, name: str, **arrays: Any) -> None:
        """Keep the arrays of a part, numbers and text."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self._find(name)) as temporary:
            np.savez(temporary, **arrays)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Yield whether this process should make a part; False if another process is making it."""
        if self.folder is None or not self.shared:
            yield True
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._find(name)
        with ExitStack() as stack:
            try:
                lease = path.with_name(f"{LEASE}{path.name}")
                stack.enter_context(hold_lease(lease, path.is_file, lambda sentence: None, waits=False))
                mine = True
            except BeingMade:
                mine = False
            yield mine

    def clear(self) -> None:
        """Remove all parts, before the data that they describe are changed."""
        for path in self.folder.glob("part-*.npz") if self.folder is not None else ():
            path.unlink()

    def _find(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{hash_json(name)}.npz"  # names are of any characters


def tell_kept(progress: Progress | None, found: Sequence[Mapping[str, Any] | None]) -> None:
    """Say how many sessions an earlier call has finished, if it has."""
    n = sum(packed is not None for packed in found)
    if n and progress is not None:
        progress(0, 0, f"{n} of {len(found)} sessions are kept from an earlier call")
