"""Dictionaries that NumPy or pickle wrote, read without running any code that they name.

Owns a restricted reader: it returns only built-in containers, numbers, text and NumPy arrays; every other name in a
pickle is an error. A large array is never loaded: its position in the file is noted, and pieces of it are read from
there. A short file cannot use much memory: the number of its objects, their repetitions, their depth and the shapes of
arrays are bounded by its own size.

References
----------
.. [1] Python documentation, `pickle`: "Restricting Globals"; `pickletools`: the opcodes.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, refuse_damage
from braindecode_vis.base.remote import bring, open_head

# An array below a mebibyte is cheaper to keep in memory than to read from the file.
LARGE_BYTES = 1 << 20
_NPY_MAGIC = b"\x93NUMPY"
# Numbers, text and objects; structured and void types could contain anything.
_KINDS = "biufcSUO"
# Published files nest three or four containers.
_MAX_DEPTH = 32
# A value takes at least one byte, and a repeated one two; the rest is for values that NumPy shares.
_VALUES_PER_BYTE = 4
# Bytes of an array are stored once, and copied at most twice when they are read (as text, then as an array).
_COPIES = 4
_MAX_VALUES = 50_000_000
_MAX_BYTES = np.iinfo(np.int64).max


@dataclass(frozen=True)
class FileArray:
    """A C-ordered array somewhere in a file; nothing is read until a piece is requested."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of the first axis."""
        row = math.prod(self.shape[1:])
        count = max(0, stop - start) * row
        with self.path.open("rb") as file:
            flat = np.fromfile(
                file, self.dtype, count, offset=self.offset + start * row * self.dtype.itemsize
            )
        if len(flat) != count:
            raise DataError(f"{self.path} ends in the middle of its data; copy or fetch it again.")
        return flat.reshape(-1, *self.shape[1:])

    def read_columns(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return columns `start` to `stop` of the given rows of a matrix, shape (len(rows), stop - start)."""
        out = np.empty((len(rows), stop - start), self.dtype)
        n_columns, size = self.shape[1], self.dtype.itemsize
        # Every row is read at a different position, and a buffer would read more than needed.
        with self.path.open("rb", buffering=0) as file:
            for target, row in zip(out, rows.tolist(), strict=True):
                file.seek(self.offset + (row * n_columns + start) * size)
                view = memoryview(target).cast("B")
                if file.readinto(view) != len(view):
                    raise DataError(f"{self.path} ends in the middle of its data; copy or fetch it again.")
        return out


def sniff(path: Path) -> str:
    """Return the form of a file by its first bytes: ``npy``, ``npy-pickle``, ``pickle``, ``zip``, ``unknown``."""
    with open_head(path) as file:
        start = file.read(8)
        if start.startswith(_NPY_MAGIC):
            return "npy-pickle" if _read_header(file, path)[2].hasobject else "npy"
    # Since protocol 2 a pickle begins with the opcode PROTO and its version.
    if start[:1] == b"\x80" and start[1:2] and start[1] <= pickle.HIGHEST_PROTOCOL:
        return "pickle"
    return "zip" if start[:4] == b"PK\x03\x04" else "unknown"


def _read_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    file.seek(0)
    # Any error: for a text of ten thousand brackets, NumPy's parsers fail in tokenizer, recursion or memory.
    with refuse_damage(f"{path} has a damaged NumPy header"):
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return read[version](file)


def open_npy(path: Path) -> FileArray:
    """Return the array of a plain ``.npy`` file without reading it."""
    with open_head(path) as file:
        shape, fortran, dtype = _read_header(file, path)
        offset = file.tell()
    if dtype.hasobject:
        raise DataError(
            f"{path} contains Python objects, but a plain array is published; get it from its publisher."
        )
    if dtype.kind not in "fiub" or not shape:
        raise DataError(
            f"{path} holds {dtype} of shape {shape} but rows of numbers are published; copy or fetch it again."
        )
    return _make_file_array(path, offset, shape, dtype, fortran, path.stat().st_size - offset)


def _make_file_array(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, fortran: bool, n_bytes: int
) -> FileArray:
    needed = _count_items(shape, dtype, path) * dtype.itemsize
    if needed > n_bytes:
        raise DataError(
            f"{path} is truncated: it holds {n_bytes} of {needed} bytes of an array of shape {shape}; copy or fetch "
            "it again."
        )
    # The values of a row would not be contiguous; no published file has this form.
    if fortran and len(shape) > 1:
        raise DataError(f"{path} holds a large array in Fortran order, which the published file does not.")
    return FileArray(path, offset, tuple(shape), dtype)


def _count_items(shape: tuple[Any, ...], dtype: np.dtype, path: Path) -> int:
    """Return the number of items of an array; an impossible shape is an error."""
    if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > _MAX_DEPTH:
        raise DataError(f"{path} is damaged: an array in it has an impossible shape; copy or fetch it again.")
    # Zeros are left out: NumPy also multiplies the other lengths, and overflows.
    if dtype.itemsize == 0 or math.prod(size for size in shape if size) * dtype.itemsize > _MAX_BYTES:
        raise DataError(f"{path} is damaged: an array in it has no possible size; copy or fetch it again.")
    return math.prod(shape)


def read_pickled_dict(path: Path) -> dict[str, Any]:
    """Read a dictionary saved with `numpy.save` or `pickle.dump`.

    Raises
    ------
    DataError
        As in `read_pickled`, or if the file does not hold a dictionary.
    """
    content = read_pickled(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, but a dictionary is published.")
    return {str(key): value for key, value in content.items()}


def read_pickled(path: Path, *, offset: int = 0, large_bytes: int | None = None) -> Any:
    """Read containers, numbers, text and arrays saved with `numpy.save` or `pickle.dump`.

    Parameters
    ----------
    path
        The file.
    offset
        Position of a pickle in the file, for formats that contain one.
    large_bytes
        Arrays of at least this size (1 MiB by default) come as `FileArray`, smaller ones as arrays.

    Raises
    ------
    DataError
        If the file is truncated or damaged, names code to run, or would need far more memory than its size.
    """
    with path.open("rb") as file:
        if offset:
            file.seek(offset)
        elif sniff(path) == "npy-pickle":
            _read_header(file, path)
        try:
            reader = _Reader(file, path, large_bytes)
            content = reader.finish(reader.load())
        except DataError:
            raise
        except (EOFError, pickle.UnpicklingError, struct.error) as error:
            raise DataError(
                f"{path} is truncated or damaged ({_shorten(error)}): its pickle ends after "
                f"{path.stat().st_size} bytes; copy or fetch it again."
            ) from error
        except Exception as error:  # damaged bytes lead the reader anywhere
            raise DataError(f"{path} is damaged ({_shorten(error)}); fetch it again.") from error
    if isinstance(content, np.ndarray) and content.shape == ():
        content = content.item()
    return content


def _shorten(error: Exception) -> str:
    """Return the first words of an error: it may contain the text of a damaged file."""
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__


class _Payload:
    """Bytes that stay in the file."""

    def __init__(self, offset: int, size: int) -> None:
        self.offset, self.size = offset, size


class _Dtype:
    """A dtype that a pickle describes; it is built only if it is a plain one."""

    def __init__(self, code: Any, *_: Any) -> None:
        # Only text: the text of nested lists can be endless.
        if not isinstance(code, str):
            raise pickle.UnpicklingError("a type of array is not named by text")
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|", "=") else "|"
        if state[2] is not None or state[3] is not None:
            raise pickle.UnpicklingError("structured arrays are not read")

    def resolve(self) -> np.dtype:
        if self.code[:1] not in _KINDS:
            raise pickle.UnpicklingError(f"arrays of type {self.code!r} are not read")
        if self.code.startswith("O"):
            return np.dtype(object)
        return np.dtype((self.order if self.order in "<>" else "") + self.code)


class _Array:
    """An array that a pickle describes."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = tuple(state)


# Its methods can be replaced, unlike those of the C one; type stubs do not list them.
_PythonUnpickler: Any = pickle._Unpickler


class _Reader(_PythonUnpickler):
    """The pure-Python unpickler that leaves large payloads in the file and allows only arrays."""

    # A copy, so that the dispatch of the standard library stays as it is.
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: IO[bytes], path: Path, large_bytes: int | None = None) -> None:
        # Python 2 wrote bytes as text; latin1 does not change them.
        super().__init__(file, encoding="latin1")
        self.file, self.path = file, path
        self.large_bytes = LARGE_BYTES if large_bytes is None else large_bytes
        self.n_bytes = path.stat().st_size
        self._file_read = self._read_bounded
        self.values_left = min(_VALUES_PER_BYTE * self.n_bytes, _MAX_VALUES)
        self.bytes_left = _COPIES * self.n_bytes

    def _read_bounded(self, size: int) -> bytes:
        # A damaged length may be terabytes, and Python would allocate the memory first.
        if size > self.n_bytes:
            raise EOFError(f"a value of {size} bytes")
        return self.file.read(size)

    def _spend(self, values: int = 0, size: int = 0) -> None:
        """Count the built objects, and stop if a file repeats its content far beyond its size."""
        self.values_left -= values
        self.bytes_left -= size
        if self.values_left < 0 or self.bytes_left < 0:
            raise DataError(
                f"{self.path} has {self.n_bytes} bytes but repeats its content without end when it is read, which no "
                "published file does; it was not opened. Get the file from its publisher."
            )

    def finish(self, value: Any, depth: int = 0) -> Any:
        """Replace the descriptions of arrays by the arrays."""
        if depth > _MAX_DEPTH:
            raise DataError(
                f"{self.path} nests more than {_MAX_DEPTH} containers, which no published file does; it was not "
                "opened. Get the file from its publisher."
            )
        self._spend(values=1)
        if isinstance(value, _Array):
            if value.state is None:
                return np.empty(0)
            shape, described, fortran, payload = value.state[1:5]
            return self._build(shape, described, fortran, payload, depth)
        if isinstance(value, dict):
            return {key: self.finish(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.finish(item, depth + 1) for item in value)
        return value

    def _build(self, shape: Any, described: Any, fortran: Any, payload: Any, depth: int) -> Any:
        dtype, shape = described.resolve(), tuple(shape)
        if isinstance(payload, _Payload):
            return _make_file_array(self.path, payload.offset, shape, dtype, bool(fortran), payload.size)
        n_items = _count_items(shape, dtype, self.path)
        if dtype.hasobject:
            if len(payload) != n_items:
                raise pickle.UnpicklingError(f"an array of {n_items} objects has {len(payload)}")
            array = np.empty(n_items, dtype=object)
            for index, item in enumerate(payload):
                array[index] = self.finish(item, depth + 1)
            return array.reshape(shape)  # NumPy lists objects in C order, whatever the flag says
        if not isinstance(payload, bytes | bytearray):  # bytes(10**12) would be a terabyte of zeros
            raise pickle.UnpicklingError("an array has no bytes")
        self._spend(size=len(payload))
        array = np.frombuffer(bytes(payload), dtype).copy()
        return array.reshape(shape, order="F" if fortran else "C")

    def load_frame(self) -> None:
        self.read(8)  # frames are a hint for buffering

    def _load_payload(self, form: str) -> None:
        (size,) = struct.unpack(form, self.read(struct.calcsize(form)))
        offset = self.file.tell()
        # Checked before reading: a damaged length may be terabytes.
        if offset + size > self.n_bytes:
            raise DataError(
                f"{self.path} is truncated: {self.n_bytes - offset} of {size} bytes of its data are there; "
                "copy or fetch it again."
            )
        if size < self.large_bytes:
            self.append(self.read(size))
        else:
            self.file.seek(size, 1)
            self.append(_Payload(offset, size))

    def load_binbytes(self) -> None:
        self._load_payload("<I")

    def load_binbytes8(self) -> None:
        self._load_payload("<Q")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def _check_keys(self, keys: list[Any]) -> None:
        # The hash of a tuple visits all nested values, again for every reference to the same one.
        if not all(key is None or type(key) in (str, int, float, bool, bytes) for key in keys):
            raise pickle.UnpicklingError("a key of a dictionary is neither text nor a number")

    def load_build(self) -> None:
        # BUILD calls `__setstate__` of the object on the stack: only our two descriptions are allowed there.
        if not isinstance(self.stack[-2], _Array | _Dtype):
            self._refuse()
        super().load_build()

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses an instruction that no published file needs")

    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    # Each of these calls code, fetches objects from elsewhere or hashes its content (sets); arrays, numbers and text
    # need none of them.
    for _code in (pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX,
                  pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
                  pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):  # fmt: skip
        dispatch[_code[0]] = _refuse
    del _code

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 moved its modules, and files of both versions exist.
        place = module.replace("numpy._core", "numpy.core")
        known = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy.core.numeric", "_frombuffer"): self._from_buffer,
            ("numpy.core.multiarray", "scalar"): self._make_scalar,
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): self._encode,
        }
        if (place, name) not in known:
            raise DataError(
                f"{self.path} asks to run {f'{module}.{name}'[:100]} when it is opened, which no published file needs; "
                "it was not opened. Get the file from its publisher."
            )
        return known[place, name]

    def _from_buffer(
        self, payload: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any
    ) -> _Array:
        array = _Array()
        array.state = (1, shape, dtype, order == "F", payload)
        return array

    def _make_scalar(self, dtype: _Dtype, data: Any = b"") -> Any:
        found = np.frombuffer(data, dtype.resolve())
        if len(found) != 1:
            raise pickle.UnpicklingError(f"a number is written as {len(found)}")
        return found[0]

    def _encode(self, text: Any, _: Any = "latin1") -> bytes:
        self._spend(size=len(text))
        return bytes(text.encode("latin1"))


def convert_trusted(
    script: str, path: Path, scratch: Path | None, name: str, *options: Any, trusted: bool, why: str
) -> tuple[Path, dict[str, Any]]:
    """Convert a file whose opening may run code, if the user trusts it, in a separate process.

    Parameters
    ----------
    script
        Program that takes `path`, a folder and the `options`, and writes arrays and ``info.json`` into the folder.
    scratch, name
        Parent and name of the folder.
    trusted
        Whether the user trusts the file, by ``dataset.trust_pickle``.
    why
        Sentence that names the file and the code that it could run.

    Returns
    -------
    folder, info
        Folder of the arrays, and the content of ``info.json``.

    Raises
    ------
    ConfigError
        If the file is not trusted, or there is no scratch folder.
    DataError
        If it is damaged.
    """
    if not trusted:
        raise ConfigError(
            f"{why}; if you trust where it comes from, say so for this call: pass --set dataset.trust_pickle=true (a "
            "configuration file or a run folder cannot), and it is converted once, in a separate process."
        )
    if scratch is None:
        raise ConfigError(f"{path} must be converted before it is read; give it a scratch folder.")
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    # Isolated (-I): no user site and no PYTHON* variables, and code of the file does not run in this process.
    arguments = [str(bring(path.absolute())), str(folder.absolute()), *map(str, options)]
    command = [sys.executable, "-I", "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{path} cannot be converted ({lines[-1]}); copy or fetch it again.")
    return folder, json.loads((folder / "info.json").read_text())
