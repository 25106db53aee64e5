"""Pickled dictionaries with one large array, written without having the array in memory.

Owns the bytes of the files that authors made with ``np.save(path, a_dict)``, ``pickle.dump(a_dict)`` and
``torch.save(a_dict)``. A dictionary is pickled with a gap for the payload of its `PendingArray`, so that the caller can
write the payload piece by piece (`numpy.ndarray.__reduce__` would first copy all of it). The modules have the names of
NumPy 1, which wrote the published files.

No pickle is read here.

References
----------
.. [1] Python documentation, `pickletools`: the opcodes. Frames are optional, and none are written here.
"""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Container = Literal["npy", "pickle"]


@dataclass(frozen=True)
class PendingArray:
    """An array of known shape and type whose numbers are written later, in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        """Size of the payload."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class _Hole:
    """The payload of a `PendingArray`: its length is in the stream, its bytes are not."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes


class _Global:
    """A function named in the stream by module and name. Callable, as pickle requires."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        raise NotImplementedError


_RECONSTRUCT = _Global("numpy.core.multiarray", "_reconstruct")


# Its methods can be overridden, unlike those of the C one; type stubs do not list them.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """The pure-Python pickler without frames, with gaps and with NumPy 1 names."""

    def __init__(self, buffer: io.BytesIO, protocol: int) -> None:
        super().__init__(buffer, protocol=protocol)
        self.buffer = buffer
        self.hole: int | None = None

    def dump(self, obj: Any) -> None:
        self.write(pickle.PROTO + struct.pack("<B", self.proto))
        self.save(obj)
        self.write(pickle.STOP)

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if type(obj) in (np.ndarray, PendingArray) and self.memo.get(id(obj)) is None:
            if isinstance(obj, PendingArray):
                state: tuple[Any, ...] = (1, obj.shape, obj.dtype, False, _Hole(obj.n_bytes))
            else:
                state = obj.__reduce__()[2]
            # A new (0,) every time, as in NumPy: a shared one would be written as a back reference.
            self.save_reduce(_RECONSTRUCT, (np.ndarray, np.empty(0).shape, b"b"), state, obj=obj)
        elif isinstance(obj, _Global) and self.memo.get(id(obj)) is None:
            self._save_name(obj)
        elif isinstance(obj, _Hole):
            self._save_hole(obj)
        else:
            super().save(obj, save_persistent_id)

    def _save_name(self, obj: _Global) -> None:
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def _save_hole(self, obj: _Hole) -> None:
        if self.hole is not None:
            raise ValueError("one pickle can leave one array pending.")
        if obj.n_bytes < 256:
            self.write(pickle.SHORT_BINBYTES + struct.pack("<B", obj.n_bytes))
        elif obj.n_bytes <= 0xFFFFFFFF:
            self.write(pickle.BINBYTES + struct.pack("<I", obj.n_bytes))
        else:  # Protocol 3 has no word for this size; readers of protocol 4 accept it anywhere.
            self.write(pickle.BINBYTES8 + struct.pack("<Q", obj.n_bytes))
        self.hole = self.buffer.tell()
        self.memoize(obj)


def split_pickle(content: Any, *, container: Container, protocol: int) -> tuple[bytes, bytes]:
    """Return the bytes before and after the payload of the `PendingArray` in `content`.

    Parameters
    ----------
    content : dict
        Dictionary to pickle. Without a `PendingArray` the second part is empty.
    container
        ``npy`` puts the dictionary in a 0-d object array after a NumPy header, as `numpy.save` does;
        ``pickle`` writes the bare dictionary.
    protocol
        3, as NumPy 1 used, or 4.

    Examples
    --------
    >>> head, tail = split_pickle({"x": PendingArray((2,), np.dtype("<f8"))}, container="pickle", protocol=4)
    >>> pickle.loads(head + np.array([1.0, 2.0]).tobytes() + tail)["x"].tolist()
    [1.0, 2.0]
    """
    buffer = io.BytesIO()
    if container == "npy":
        np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
        box = np.empty((), dtype=object)
        box[()] = content
        content = box
    pickler = _Pickler(buffer, protocol=protocol)
    pickler.dump(content)
    data = buffer.getvalue()
    hole = len(data) if pickler.hole is None else pickler.hole
    return data[:hole], data[hole:]
