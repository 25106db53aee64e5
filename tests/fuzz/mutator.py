"""Seeded damage to one file: what disks, downloads, editors, spreadsheets and bad will do to it.

`mutate` draws one kind of damage that fits the file and carries it out. Everything is drawn from the generator that
is passed, so that a case can be made again from its seed.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TEXT = (".csv", ".tsv", ".json", ".yaml", ".txt", ".vhdr", ".vmrk", ".ctab", ".html", "")
_TABLES = (".csv", ".tsv")
_HDF5 = (".h5", ".hdf5")

_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 1e30, 1e308, 1e-320, float("nan"), float("inf"),
    0.5, "", "nan", "NaN", "inf", "-", "é", "日本", "a" * 5000, "../../etc/passwd", "/", ".", "\u202e", "=1+1",
    "null", "1e400", "0x10", "1_000", [], {}, [None], [[1, 2], [3]], {"kind": "nothing"}, {"a": {"b": {"c": []}}},
)  # fmt: skip
_MAGIC = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00",
    b"\x89HDF\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(60), b"\x1f\x8b\x08\x00" + bytes(30), b"%PDF-1.7\n",
    b"<!DOCTYPE html><html><body>Sign in to download</body></html>", b"version https://git-lfs.github.com/spec/v1\n",
    b"\x93NUMPY\x01\x00\xff\xff", b"\x80\x04\x95" + bytes(40), b"\xff\xd8\xff\xe0" + bytes(20), b"PAR1" + bytes(20),
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What was done to a file, in words; `readable` if the file may be a valid one with other content afterwards."""

    kind: str
    what: str
    readable: bool = False


def mutate(path: Path, rng: np.random.Generator) -> Damage:
    """Damage a file in place, or put something else there.

    Parameters
    ----------
    path
        The file; a copy of its own, never a hard link.
    rng
        Where every choice comes from.
    """
    kinds = list(_BYTES.items()) + list(_PLACES.items())
    own: list[tuple[str, Callable[..., Damage | None]]] = []
    if path.suffix in TEXT:
        own += list(_TEXTS.items())
    own += [(kind, change) for kind, (suffixes, change) in _FORMATS.items() if path.suffix in suffixes]
    # What knows the format goes deeper into a reader than bytes do.
    for _ in range(20):
        kind, change = _pick(rng, own if own and rng.random() < 0.5 else kinds)
        if damage := change(path, rng):
            return Damage(kind, damage.what, damage.readable)
    return Damage("empty", _write(path, b"").what)


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _write(path: Path, content: bytes, what: str = "emptied", *, readable: bool = False) -> Damage:
    path.write_bytes(content)
    return Damage("", what, readable)


def _span(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """Return start and length of a block: of a few bytes, or of up to all."""
    length = max(1, int(size * 2.0 ** -rng.uniform(0, 12)))
    return int(rng.integers(max(1, size - length + 1))), length


# --- bytes ----------------------------------------------------------------------------------------------------


def _truncate(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    keep = len(content) - _span(rng, len(content))[1] if content else 0
    # A table or a list that ends earlier is another one, and every decoder takes a JPEG without its end mark for whole.
    is_text, is_jpeg = path.suffix in TEXT, path.suffix.lower() in (".jpg", ".jpeg")
    readable = is_text or (is_jpeg and len(content) - keep <= 2)
    return _write(path, content[:keep], f"cut to {keep} of {len(content)} bytes", readable=readable)


def _empty(path: Path, rng: np.random.Generator) -> Damage | None:
    return _write(path, b"", readable=path.suffix in TEXT)


def _zero(path: Path, rng: np.random.Generator) -> Damage | None:
    content = bytearray(path.read_bytes())
    start, length = _span(rng, len(content))
    content[start : start + length] = bytes(len(content[start : start + length]))
    # Preprocessing tells of nothing that is held for less than 50 ms, or in single channels of single trials.
    short = length < max(4096, len(content) // 100)
    return _write(path, bytes(content), f"{length} of {len(content)} bytes zero from {start}", readable=short)


def _flip(path: Path, rng: np.random.Generator) -> Damage | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    # Headers decide most, and are short.
    place = int(rng.integers(min(len(content), 400 if rng.random() < 0.5 else len(content))))
    content[place] ^= 1 << int(rng.integers(8))
    return _write(path, bytes(content), f"bit of byte {place} flipped", readable=True)


def _noise(path: Path, rng: np.random.Generator) -> Damage | None:
    content = bytearray(path.read_bytes())
    start, length = _span(rng, len(content))
    content[start : start + length] = rng.bytes(len(content[start : start + length]))
    return _write(path, bytes(content), f"{length} random bytes from {start}", readable=True)


def _swap(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    if len(content) < 8:
        return None
    length = max(1, _span(rng, len(content) // 2)[1])
    first = int(rng.integers(len(content) - 2 * length + 1))
    second = int(rng.integers(first + length, len(content) - length + 1))
    mixed = b"".join(
        (
            content[:first],
            content[second : second + length],
            content[first + length : second],
            content[first : first + length],
            content[second + length :],
        )
    )
    return _write(path, mixed, f"{length} bytes at {first} and {second} swapped", readable=True)


def _repeat(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    start, length = _span(rng, len(content))
    mixed = content[: start + length] + content[start:]
    return _write(path, mixed, f"{length} bytes from {start} twice", readable=True)


def _reverse(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    start, length = _span(rng, len(content))
    mixed = content[:start] + content[start : start + length][::-1] + content[start + length :]
    return _write(path, mixed, f"{length} bytes from {start} reversed", readable=True)


def _append(path: Path, rng: np.random.Generator) -> Damage | None:
    tail = _pick(rng, [bytes(1), bytes(4096), rng.bytes(100), b"\n", b"\n\n<html>"])
    return _write(path, path.read_bytes() + tail, f"{len(tail)} bytes appended", readable=True)


def _retype(path: Path, rng: np.random.Generator) -> Damage | None:
    content = _pick(rng, [*_MAGIC, rng.bytes(500)])
    return _write(path, content, f"another type of file: {content[:12]!r}", readable=path.suffix in TEXT)


_BYTES: dict[str, Callable[[Path, np.random.Generator], Damage | None]] = {
    "truncate": _truncate, "empty": _empty, "zero": _zero, "flip": _flip, "noise": _noise, "swap": _swap,
    "repeat": _repeat, "reverse": _reverse, "append": _append, "retype": _retype,
}  # fmt: skip


# --- what stands in the place of the file ---------------------------------------------------------------------


def _remove(path: Path, rng: np.random.Generator) -> Damage | None:
    path.unlink()
    return Damage("", "removed", True)


def _rename(path: Path, rng: np.random.Generator) -> Damage | None:
    stem = _pick(
        rng, ["é", "a b", "日本", "." + path.stem, path.stem + " (1)", "x" * 200, path.stem.upper() + "_"]
    )
    path.rename(path.with_name(stem + path.suffix))
    return Damage("", f"renamed to {stem[:20]}{path.suffix}", True)


def _dangle(path: Path, rng: np.random.Generator) -> Damage | None:
    path.unlink()
    path.symlink_to("../.git/annex/objects/Xx/Yy/MD5E-s100--0/MD5E-s100--0")
    return Damage("", "a link to nothing")


def _loop(path: Path, rng: np.random.Generator) -> Damage | None:
    path.unlink()
    path.symlink_to(path.name)
    return Damage("", "a link to itself")


def _folder(path: Path, rng: np.random.Generator) -> Damage | None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "a.txt").write_text("a\n")
    return Damage("", "a folder")


def _lock(path: Path, rng: np.random.Generator) -> Damage | None:
    if os.geteuid() == 0:  # who may read everything
        return None
    path.chmod(0)
    return Damage("", "no permission to read")


_PLACES: dict[str, Callable[[Path, np.random.Generator], Damage | None]] = {
    "remove": _remove, "rename": _rename, "dangling link": _dangle, "link loop": _loop, "folder": _folder,
    "no permission": _lock,
}  # fmt: skip


# --- text -----------------------------------------------------------------------------------------------------


def _encode(path: Path, rng: np.random.Generator) -> Damage | None:
    text = path.read_bytes().decode("utf-8", "replace")
    name, content = _pick(
        rng,
        [
            ("a byte order mark", b"\xef\xbb\xbf" + text.encode()),
            ("CRLF", text.replace("\n", "\r\n").encode()),
            ("CR", text.replace("\n", "\r").encode()),
            ("UTF-16", text.encode("utf-16")),
            ("Latin-1", (text[:40] + "é" + text[40:]).encode("latin-1", "replace")),
            ("a NUL", text[:20].encode() + b"\0" + text[20:].encode()),
            ("no end of line", text.rstrip("\n").encode()),
            ("blank lines", ("\n\n" + text.replace("\n", "\n\n")).encode()),
        ],
    )
    return _write(path, content, f"written with {name}", readable=True)


def _edit_line(path: Path, rng: np.random.Generator) -> Damage | None:
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return None
    place = int(rng.integers(len(lines))) if rng.random() < 0.7 else 0
    what = _pick(rng, ["dropped", "doubled", "moved to the end", "doubled many times"])
    line = lines.pop(place)
    put = {"dropped": [], "doubled": [line, line], "moved to the end": [], "doubled many times": [line] * 50}
    lines[place:place] = put[what]
    lines += [line] if what == "moved to the end" else []
    return _write(path, b"".join(lines), f"line {place} {what}", readable=True)


_TEXTS: dict[str, Callable[[Path, np.random.Generator], Damage | None]] = {
    "encoding": _encode,
    "lines": _edit_line,
}


def _edit_table(path: Path, rng: np.random.Generator) -> Damage | None:
    mark = "\t" if path.suffix == ".tsv" else ","
    rows = [line.split(mark) for line in path.read_text(errors="replace").splitlines()]
    if not rows or not rows[0]:
        return None
    row, column = int(rng.integers(len(rows))), int(rng.integers(len(rows[0])))
    what = _pick(rng, ["value", "value", "value", "column dropped", "column named", "column filled", "mark"])
    value = str(_pick(rng, _STRANGE))
    if what == "value" and column < len(rows[row]):
        rows[row][column] = value
    elif what == "column dropped":
        rows = [entries[:column] + entries[column + 1 :] for entries in rows]
    elif what == "column named":
        rows[0][column] = value
    elif what == "column filled":
        rows[1:] = [[*entries[:column], value, *entries[column + 1 :]] for entries in rows[1:]]
    elif what == "mark":
        mark = _pick(rng, [";", " ", "|"])
    text = "\n".join(mark.join(entries) for entries in rows) + "\n"
    return _write(
        path,
        text.encode("utf-8", "surrogatepass"),
        f"{what} {value[:20]!r} at row {row}, column {column}",
        readable=True,
    )


def _edit_tree(path: Path, rng: np.random.Generator) -> Damage | None:
    is_json = path.suffix == ".json"
    try:
        content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError):
        return None
    if rng.random() < 0.1:
        deep = _pick(rng, ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, _LAUGHS])
        return _write(path, deep.encode(), f"{deep[:6]!r} many times", readable=False)
    places = list(_walk(content))
    if not places:
        return _write(path, json.dumps(_pick(rng, _STRANGE)).encode(), "another value", readable=True)
    holder, key = _pick(rng, places)
    what, value = _pick(rng, ["deleted", "replaced", "replaced", "replaced", "added"]), _pick(rng, _STRANGE)
    if what == "replaced":
        holder[key] = value
    elif what == "deleted":
        del holder[key]
    elif isinstance(holder, dict):
        holder[str(key) + "_"] = value
    else:
        holder.append(value)
    text = json.dumps(content) if is_json else yaml.safe_dump(content, allow_unicode=True)
    return _write(
        path, text.encode("utf-8", "surrogatepass"), f"{key} {what} by {value!r:.30}", readable=True
    )


#: Nine lines of YAML that name a thousand million words.
_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


def _walk(content: Any) -> Any:
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _walk(content[key])


# --- arrays ---------------------------------------------------------------------------------------------------


def _edit_header(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    if content[:6] != b"\x93NUMPY":
        return None
    (length,) = struct.unpack("<H", content[8:10])
    header, data = content[10 : 10 + length].decode("latin-1"), content[10 + length :]
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # objects
        return None
    shape = list(array.shape) or [1]
    shapes = [
        [2**40], [2**62, 4], [*shape, 2**31], [shape[0] * 2, *shape[1:]], [0, *shape[1:]], [-1, *shape[1:]],
        [shape[0] // 2, *shape[1:]], shape[::-1], [int(np.prod(shape))], [*shape, 1], [],
    ]  # fmt: skip
    kinds = [
        "|O",
        "<f2",
        ">f8",
        "<c16",
        "|S5",
        "<U3",
        "<M8[s]",
        "|b1",
        "<i8",
        "|V4",
        "[('a', '<f4')]",
        "<f16",
    ]
    if rng.random() < 0.5:
        what = f"shape {tuple(_pick(rng, shapes))}"
        header = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {what[6:]}, }}"
    else:
        what = f"type {_pick(rng, kinds)}"
        name = what[5:] if what.startswith("type [") else f"'{what[5:]}'"
        header = f"{{'descr': {name}, 'fortran_order': False, 'shape': {array.shape}, }}"
    text = (header + " " * ((-len(header) - 11) % 64) + "\n").encode("latin-1")
    # The same bytes under another type or order are other numbers, which nobody can tell from true ones.
    same = len(array) and array.nbytes >= np.prod(shape) and "|O" not in what
    return _write(path, content[:8] + struct.pack("<H", len(text)) + text + data, what, readable=bool(same))


def _edit_array(path: Path, rng: np.random.Generator) -> Damage | None:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        return None
    if not array.size:
        return None
    changed, what = _change_values(array, rng)
    np.save(path, changed, allow_pickle=True)
    return Damage("", what, True)


def _change_values(array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Return an array with other values or of another form, and what was done."""
    flat = np.array(array, copy=True)
    start, length = _span(rng, flat.size)
    options = ["reversed", "constant", "object", "cut", "longer", "flat", "other type", "text"]
    options += ["nan", "inf", "1e30"] * (flat.dtype.kind == "f")
    what = _pick(rng, options)
    if what in ("nan", "inf", "1e30", "constant"):
        view = flat.reshape(-1)
        view[start : start + length] = view[start] if what == "constant" else np.float64(what)
        return flat, f"{length} values {what}"
    made: dict[str, Callable[[], np.ndarray]] = {
        "reversed": lambda: flat[::-1] if flat.ndim else flat,
        "object": lambda: flat.astype(object),
        "cut": lambda: flat[: len(flat) // 2] if flat.ndim else flat,
        "longer": lambda: np.concatenate([flat, flat]) if flat.ndim else flat,
        "flat": lambda: flat.reshape(-1),
        "other type": lambda: flat.astype(
            _pick(rng, ["float16", "float64", ">f4", "int8", "complex64", "bool"])
        ),
        "text": lambda: flat.astype("U8"),
    }
    with np.errstate(all="ignore"):
        try:
            return made[what](), what
        except (ValueError, TypeError):
            return flat[::-1] if flat.ndim else flat, "reversed"


def _edit_hdf5(path: Path, rng: np.random.Generator) -> Damage | None:
    import h5py

    try:
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            if not names:
                return None
            name = _pick(rng, names)
            item = file[name]
            if rng.random() < 0.3 or not isinstance(item, h5py.Dataset) or not item.size:
                del file[name]
                return Damage("", f"{name} deleted", True)
            values = item[()]
            if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
                del file[name]
                file[name] = _pick(rng, [1.5, "text", np.zeros((2, 3)), b"\xff"])
                return Damage("", f"{name} replaced", True)
            changed, what = _change_values(values, rng)
            del file[name]
            file[name] = changed.astype("S8") if changed.dtype.kind in "OU" else changed
            return Damage("", f"{name}: {what}", True)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):
        return None


def _edit_parquet(path: Path, rng: np.random.Generator) -> Damage | None:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError):
        return None
    if table.empty:
        return None
    column = _pick(rng, list(table.columns))
    what = _pick(rng, ["dropped", "reversed", "cut", "value", "doubled", "none", "renamed"])
    if what == "dropped":
        table = table.drop(columns=column)
    elif what == "reversed":
        table[column] = table[column].to_numpy()[::-1]
    elif what == "cut":
        table = table.iloc[: len(table) // 2]
    elif what == "doubled":
        table = pd.concat([table, table], ignore_index=True)
    elif what == "renamed":
        table = table.rename(columns={column: "é"})
    else:
        table[column] = None if what == "none" else str(_pick(rng, _STRANGE))
    table.to_parquet(path, index=False)
    return Damage("", f"column {column} {what}", True)


def _edit_gzip(path: Path, rng: np.random.Generator) -> Damage | None:
    """Damage what is packed, and pack it again: the checksum is right then."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, ValueError):
        return None
    inner = path.with_name(path.name + ".inner")
    inner.write_bytes(content)
    kind, change = _pick(rng, list(_BYTES.items()))
    damage = change(inner, rng)
    if damage is None:
        inner.unlink()
        return None
    if rng.random() < 0.3 and len(content) > 60 and content[344:347] in (b"n+1", b"ni1"):
        header = bytearray(content)
        place = _pick(rng, [40, 42, 48, 50, 70, 72, 108, 112, 116])  # sizes, type, offset, scaling of NIfTI-1
        header[place : place + 2] = struct.pack("<h", int(_pick(rng, [-1, 0, 1, 32767, 64, 512])))
        inner.write_bytes(bytes(header))
        kind, damage = "header", Damage("", f"header at {place}", True)
    path.write_bytes(gzip.compress(inner.read_bytes(), mtime=0))
    inner.unlink()
    return Damage("", f"packed again, {kind}: {damage.what}", damage.readable)


def _edit_length(path: Path, rng: np.random.Generator) -> Damage | None:
    content = path.read_bytes()
    if len(content) < 16:
        return None
    length = int(_pick(rng, [0, 1, 2**63 - 1, 2**64 - 1, len(content), 10**9]))
    return _write(path, struct.pack("<Q", length) + content[8:], f"header of {length} bytes")


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path, np.random.Generator], Damage | None]]] = {
    "table": (_TABLES, _edit_table),
    "tree": ((".json", ".yaml"), _edit_tree),
    "array header": ((".npy",), _edit_header),
    "array values": ((".npy",), _edit_array),
    "HDF5 entry": (_HDF5, _edit_hdf5),
    "parquet": ((".parquet",), _edit_parquet),
    "packed": ((".gz",), _edit_gzip),
    "length": ((".safetensors",), _edit_length),
}
