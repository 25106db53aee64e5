"""Reads millions of images, shard by shard: folders, tars, tables, HDF5, and drawn images of the phantom.

Owns what a shard is, how its images are named and read in order from any place on, and the errors of a single image.
A shard is a file, or a block of pictures of a folder. Nothing is unpacked, and no more than a few images are in memory.
Tars are those of WebDataset, tables those of Hugging Face (parquet, or arrow as ``save_to_disk`` writes it). Knows no
encoder and no bank.

The package webdataset has no index to resume from and stops at an image that cannot be read; datasets takes four times
the memory and reads no HDF5.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import xxhash

from braindecode_vis.base.checks import ConfigError, DataError, suggest
from braindecode_vis.base.digests import digest_file, digest_files
from braindecode_vis.datasets.drawn.images import N_MAX_CONCEPTS, make_concepts, render_scene
from braindecode_vis.datasets.own_data import IMAGE_SUFFIXES

PHANTOM = "phantom:"
BLOCK = 1024  # pictures of a folder that are one shard
_ROWS = 64  # of a table that are read at a time
_ENDINGS = {
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
    "table": (".parquet", ".arrow"),
    "hdf5": (".h5", ".hdf5"),
}


class BrokenImageError(DataError):
    """One image that cannot be decoded; the others of its shard can."""


@dataclass(frozen=True)
class SourceImage:
    """One image before it is decoded.

    Parameters
    ----------
    id
        Its name, unlike that of any other image of the source.
    where
        Where it lies, in words: member and shard.
    read
        Returns the bytes of an image file, or pixels.
    """

    id: str
    where: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class ImageShard:
    """A file, or a block of a folder.

    Parameters
    ----------
    name
        Below the folder of the source.
    stamp
        Another text after the file was written again.
    """

    name: str
    stamp: str


class ImageSource(Protocol):
    """Images in shards, in one fixed order."""

    def describe(self) -> dict[str, Any]:
        """Return what decides which images these are, apart from the shards."""

    def list_shards(self) -> list[ImageShard]:
        """Return all shards without reading them."""

    def name_images(self, shard: str) -> Sequence[str]:
        """Return the id of each image of a shard, in order, without reading the images."""

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield images of a shard in order."""


def load_image(item: SourceImage) -> tuple[np.ndarray, int]:
    """Return an image as uint8 of shape (height, width, 3), and a digest of what was stored.

    Raises
    ------
    BrokenImageError
        If it cannot be decoded, naming where it lies.
    """
    from PIL import Image

    try:
        content = item.read()
        if isinstance(content, np.ndarray):
            pixels = np.ascontiguousarray(content)
            return pixels, digest_image(pixels)
        if not content:
            raise ValueError("it is empty")
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB")), digest_image(content)
    # Pillow raises whatever its plugins stumble over.
    except (
        OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError
    ) as error:  # fmt: skip
        why = "no format that Pillow knows" if "cannot identify" in str(error) else str(error)
        raise BrokenImageError(f"the image {item.where} cannot be decoded ({why})") from error


def digest_image(content: bytes | np.ndarray) -> int:
    """Return 64 bits of what is stored of an image."""
    return xxhash.xxh3_64_intdigest(
        np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
    )


def open_images(text: str, *, column: str | None = None, id_column: str | None = None) -> ImageSource:
    """Return the images that a text names.

    Parameters
    ----------
    text
        A folder of pictures; a tar, parquet, arrow or HDF5 file, a folder of such files or a pattern such as
        ``shards/{0000..0099}.tar`` or ``data/*.parquet``; or ``phantom:N`` with ``,size=64,seed=0`` behind it.
    column
        Column of tables, or data set of HDF5 files, that holds the images; found where there is only one.
    id_column
        Column or data set that holds their ids; file and row by default.

    Raises
    ------
    ConfigError
        If `column` or `id_column` is given for what has no columns, or the text is no source.
    DataError
        If nothing is there.
    """
    if text.startswith(PHANTOM):
        _refuse_columns(column, id_column, "phantom images")
        return _read_phantom_text(text)
    top, files, pictures = _find_files(text)
    if not files:
        _refuse_columns(column, id_column, "a folder of pictures")
        return FolderImages(top, pictures)
    kinds = {_find_kind(file) for file in files}
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        raise ConfigError(f"{text} names single pictures; give their folder instead.")
    if len(kinds) > 1 or None in kinds:
        known = ", ".join(ending for endings in _ENDINGS.values() for ending in endings)
        raise ConfigError(
            f"{text} holds {'files of several kinds' if None not in kinds else 'what holds no images'}; give files of "
            f"one kind ({known}), a folder of them, or a folder of pictures."
        )
    named = {file.relative_to(top).as_posix(): file for file in files}
    if kinds == {"tar"}:
        _refuse_columns(column, id_column, "tars, whose members have names,")
        return TarImages(named)
    if kinds == {"table"}:
        return TableImages(named, column, id_column)
    return Hdf5Images(named, column, id_column)


def digest_images(text: str) -> str:
    """Return a digest of the images that a text names, for fingerprints: of the bytes of their files.

    Parameters
    ----------
    text
        As for `open_images`; drawn images are known by their text, a finished bank of ``embed --images`` by the digests
        in its manifest.
    """
    if text.startswith(PHANTOM):
        _read_phantom_text(text)  # refuses what is none
        return text
    manifest = Path(text).expanduser() / "manifest.json"
    if manifest.is_file():
        return digest_file(manifest)
    top, files, pictures = _find_files(text)
    there = {file.relative_to(top).as_posix(): file for file in files or pictures if file.is_file()}
    lines = "\n".join(f"{name}\0{digest}" for name, digest in sorted(digest_files(there).items()))
    return xxhash.xxh3_128_hexdigest(lines.encode("utf-8", "surrogateescape"))


def _refuse_columns(column: str | None, id_column: str | None, what: str) -> None:
    for option, value in (("--column", column), ("--id-column", id_column)):
        if value is not None:
            raise ConfigError(f"{option} applies to tables and HDF5 files, not to {what}; leave it out.")


def _find_kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for kind, endings in _ENDINGS.items() if name.endswith(endings)), None)


def _find_files(text: str) -> tuple[Path, list[Path], list[Path]]:
    """Return the folder that names start from, the files, and what is named like a picture of a folder without any."""
    path = Path(text).expanduser().absolute()
    if path.is_file():
        return path.parent, [path], []
    found: list[Path] = []
    if path.is_dir():
        pictures = []
        for file in path.rglob("*"):  # once: a million pictures take seconds
            if _find_kind(file) and file.is_file():
                found.append(file)
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                pictures.append(file)
        found.sort()
        if found and pictures:
            raise ConfigError(
                f"{text} holds pictures ({pictures[0].name}) and files of pictures ({found[0].name}); "
                "choose one kind, for example with a pattern."
            )
        return path, found, pictures
    spread = [Path(each).expanduser().absolute() for each in _expand_braces(text)]
    for each in spread:
        if any(sign in str(each) for sign in "*?["):
            first = next(n for n, part in enumerate(each.parts) if any(sign in part for sign in "*?["))
            base = Path(*each.parts[:first])
            found += sorted(file for file in base.glob(str(Path(*each.parts[first:]))) if file.is_file())
        elif each.is_file():
            found.append(each)
        elif len(spread) > 1:
            raise DataError(f"the shard {each} of {text} is missing; fetch it, or give fewer shards.")
    if not found:
        raise DataError(f"{text} does not exist; give a folder or files of images, or phantom:N.")
    parents = [set(file.parents) for file in found]
    top = max(set.intersection(*parents), key=lambda parent: len(parent.parts))
    return top, list(dict.fromkeys(found)), []


def _expand_braces(text: str) -> list[str]:
    """Return the texts that ``{000..010}`` and ``{a,b}`` stand for, as a shell would.

    Examples
    --------
    >>> _expand_braces("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        return [text]
    low, high, listed = found.groups()
    words = (
        listed.split(",")
        if listed
        else [str(n).zfill(len(low) if low[0] == "0" else 1) for n in range(int(low), int(high) + 1)]
    )
    return [
        each for word in words for each in _expand_braces(text[: found.start()] + word + text[found.end() :])
    ]


def _give(content: bytes | np.ndarray) -> bytes | np.ndarray:
    return content


def _stamp(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size}:{about.st_mtime_ns}"


def _list_shards(files: Mapping[str, Path]) -> list[ImageShard]:
    return [ImageShard(name, _stamp(path)) for name, path in files.items()]


def _strip(name: str) -> str:
    """Return the name of a file without what its format ends in."""
    lower = name.lower()
    endings = (ending for endings in _ENDINGS.values() for ending in endings if lower.endswith(ending))
    return name[: -max(map(len, endings), default=0)]


# --- pictures ---------------------------------------------------------------------------------------------


class FolderImages:
    """Pictures below a folder, by name; a shard is a block of them."""

    def __init__(self, top: Path, pictures: Sequence[Path]) -> None:
        self.top = top
        self._files = sorted(file.relative_to(top).as_posix() for file in pictures if file.is_file())
        if not self._files:
            raise DataError(
                f"{top} holds neither pictures ({', '.join(IMAGE_SUFFIXES)}) nor files of them "
                f"({', '.join(ending for endings in _ENDINGS.values() for ending in endings)})."
            )
        stems = [str(PurePosixPath(name).with_suffix("")) for name in self._files]
        # owl.png beside owl.jpg
        self._ids = stems if len(set(stems)) == len(stems) else self._files

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "folder"}

    def list_shards(self) -> list[ImageShard]:
        """Return blocks of pictures; their stamp holds size and time of each."""
        shards = []
        for number, start in enumerate(range(0, len(self._files), BLOCK)):
            digest = xxhash.xxh3_64()
            for name in self._files[start : start + BLOCK]:
                digest.update(f"{name}\0{_stamp(self.top / name)}\n".encode("utf-8", "surrogateescape"))
            shards.append(ImageShard(f"block-{number:06d}", digest.hexdigest()))
        return shards

    def name_images(self, shard: str) -> Sequence[str]:
        """Return paths without their suffix, or with it where two pictures differ by that alone."""
        start = BLOCK * int(shard.removeprefix("block-"))
        return self._ids[start : start + BLOCK]

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield pictures; their files are read where they are decoded."""
        first = BLOCK * int(shard.removeprefix("block-"))
        for row in range(first + start, first + stop):
            path = self.top / self._files[row]
            yield SourceImage(self._ids[row], str(path), path.read_bytes)


class TarImages:
    """Pictures in tars; every member whose name ends like an image is one."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        # Of one tar: its parts are read one after the other.
        self._index = lru_cache(maxsize=1)(self._read_index)

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "tar"}

    def list_shards(self) -> list[ImageShard]:
        """Return the tars."""
        return _list_shards(self._files)

    def name_images(self, shard: str) -> Sequence[str]:
        """Return the names of the members without their suffix."""
        return [str(PurePosixPath(name).with_suffix("")) for name, _, _ in self._index(shard)]

    def _read_index(self, shard: str) -> list[tuple[str, int, int]]:
        """Return name, place and size of each image of a tar."""
        path, found = self._files[shard], []
        try:
            with _open_raw(path) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else a million of them would stay in memory
                    if member.isfile() and PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                        found.append((member.name, member.offset_data, member.size))
        except (tarfile.TarError, OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"the tar {path} is damaged ({error}); fetch it again.") from error
        if not found:
            raise DataError(
                f"the tar {path} holds no image: none of its members ends in {', '.join(IMAGE_SUFFIXES)}; leave it out."
            )
        return found

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield members in the order of the tar."""
        path = self._files[shard]
        with _open_raw(path) as raw:
            for name, place, size in self._index(shard)[start:stop]:
                raw.seek(place)
                content = raw.read(size)
                if len(content) < size:
                    raise DataError(f"the tar {path} ends in the middle of {name}; fetch it again.")
                yield SourceImage(
                    str(PurePosixPath(name).with_suffix("")), f"{name} of {path}", partial(_give, content)
                )


def _open_raw(path: Path) -> Any:
    name = path.name.lower()
    if name.endswith((".gz", ".tgz")):
        return gzip.open(path)
    if name.endswith(".bz2"):
        return bz2.open(path)
    return lzma.open(path) if name.endswith(".xz") else path.open("rb")


# --- tables and arrays ------------------------------------------------------------------------------------


class TableImages:
    """Image bytes in parquet or arrow files: a binary column, or a struct with a field ``bytes``."""

    def __init__(self, files: Mapping[str, Path], column: str | None, id_column: str | None) -> None:
        self._files, first = files, next(iter(files.values()))
        schema = self._read_schema(first)
        images = [field.name for field in schema if _holds_images(field.type)]
        if column is None and len(images) != 1:
            held = f"several ({', '.join(images)})" if images else f"none ({', '.join(schema.names)})"
            raise ConfigError(
                f"one column of images was expected in {first}, which has {held}; name it with --column."
            )
        self.column, self.id_column = column or images[0], id_column

    def describe(self) -> dict[str, Any]:
        """Return kind and columns."""
        return {"kind": "table", "column": self.column, "id_column": self.id_column}

    def list_shards(self) -> list[ImageShard]:
        """Return the files."""
        return _list_shards(self._files)

    def _read_schema(self, path: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if path.suffix.lower() == ".parquet":
                return pq.read_schema(path)
            with pa.memory_map(str(path)) as file:
                return _open_arrow(file).schema
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({_shorten(error)}); fetch it again.") from error

    def _check_columns(self, path: Path) -> None:
        schema = self._read_schema(path)
        for option, name in (("--column", self.column), ("--id-column", self.id_column)):
            if name is not None and name not in schema.names:
                raise ConfigError(
                    f"{path} has no column {name!r}{suggest(name, schema.names)}; it has {', '.join(schema.names)}: "
                    f"name one with {option}."
                )
        if not _holds_images(schema.field(self.column).type):
            raise ConfigError(
                f"the column {self.column!r} of {path} holds {schema.field(self.column).type}, not bytes of images; "
                "name another with --column."
            )

    def name_images(self, shard: str) -> Sequence[str]:
        """Return the ids of the column of ids, or file and row."""
        path = self._files[shard]
        self._check_columns(path)
        if self.id_column is not None:
            batches = self._iterate(path, 0, [self.id_column])
            return [str(value) for _, batch in batches for value in batch.column(0).to_pylist()]
        n = _count_rows(path)
        return [f"{_strip(shard)}/{row}" for row in range(n)]

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield rows of a file."""
        path = self._files[shard]
        for first, batch in self._iterate(path, start, [self.column, *filter(None, [self.id_column])]):
            values = batch.column(0).to_pylist()
            names = batch.column(batch.num_columns - 1).to_pylist() if self.id_column else None
            for offset, value in enumerate(values):
                row = first + offset
                if row >= stop:
                    return
                if row < start:
                    continue
                content = value.get("bytes") if isinstance(value, dict) else value
                if content is None and isinstance(value, dict) and value.get("path"):
                    # Tables that were not told to hold their images name files beside them.
                    beside = path.parent / value["path"]
                    content = beside.read_bytes() if beside.is_file() else None
                name = f"{_strip(shard)}/{row}" if names is None else str(names[offset])
                yield SourceImage(name, f"in row {row} of {path}", partial(_give, content or b""))

    def _iterate(self, path: Path, start: int, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Yield rows in batches with the number of their first row, from one that holds `start` on."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = list(dict.fromkeys(columns))  # images and ids may be one
        try:
            if path.suffix.lower() == ".parquet":
                with pq.ParquetFile(path) as file:
                    sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
                    ends = list(itertools.accumulate(sizes))
                    first = next((n for n, end in enumerate(ends) if end > start), len(ends))
                    row = ends[first - 1] if first else 0
                    groups = list(range(first, len(ends)))
                    for batch in file.iter_batches(_ROWS, row_groups=groups, columns=columns):
                        yield row, batch.select(columns)
                        row += batch.num_rows
                return
            with pa.memory_map(str(path)) as mapped:
                row = 0
                for batch in _iterate_arrow(_open_arrow(mapped)):
                    for place in range(0, batch.num_rows, _ROWS):
                        part = batch.slice(place, _ROWS)
                        if row + part.num_rows > start:
                            yield row, part.select(columns)
                        row += part.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({_shorten(error)}); fetch it again.") from error


def _open_arrow(file: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(file)
    except pa.ArrowInvalid:  # the format with an index at its end
        file.seek(0)
        return pa.ipc.open_file(file)


def _iterate_arrow(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
    else:
        yield from reader


def _count_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with pa.memory_map(str(path)) as mapped:
        return sum(batch.num_rows for batch in _iterate_arrow(_open_arrow(mapped)))


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _shorten(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


class Hdf5Images:
    """Images in HDF5: pixels in bytes, shape (n, height, width, 3), or image files as bytes in a data set of one axis.

    In the way of NSD, whose 73 000 images are one data set ``imgBrick``.
    """

    def __init__(self, files: Mapping[str, Path], column: str | None, id_column: str | None) -> None:
        self._files, first = files, next(iter(files.values()))
        with _open_hdf5(first) as file:
            known = _list_datasets(file)
            images = [name for name, data in known.items() if _is_image_data(data)]
        if column is None and len(images) != 1:
            held = (
                f"several ({', '.join(images)})" if images else f"none ({', '.join(known) or 'no data set'})"
            )
            raise ConfigError(
                f"one data set of images (bytes of shape n x height x width x 3, or image files) was expected in "
                f"{first}, which has {held}; name it with --column."
            )
        self.column, self.id_column = column or images[0], id_column

    def describe(self) -> dict[str, Any]:
        """Return kind and data sets."""
        return {"kind": "hdf5", "column": self.column, "id_column": self.id_column}

    def list_shards(self) -> list[ImageShard]:
        """Return the files."""
        return _list_shards(self._files)

    def name_images(self, shard: str) -> Sequence[str]:
        """Return the ids of the data set of ids, or file and row."""
        path = self._files[shard]
        with _open_hdf5(path) as file:
            known = _list_datasets(file)
            for option, name in (("--column", self.column), ("--id-column", self.id_column)):
                if name is not None and name not in known:
                    raise ConfigError(
                        f"{path} has no data set {name!r}{suggest(name, list(known))}; it has "
                        f"{', '.join(known) or 'none'}: name one with {option}."
                    )
            data = known[self.column]
            if not _is_image_data(data):
                raise ConfigError(
                    f"the data set {self.column!r} of {path} holds {data.dtype} of shape {data.shape}, not images; "
                    "name another with --column."
                )
            if self.id_column is None:
                return [f"{_strip(shard)}/{row}" for row in range(len(data))]
            ids = known[self.id_column]
            if ids.shape != data.shape[:1]:
                raise DataError(
                    f"{path} has {len(data)} images and ids of shape {ids.shape} in {self.id_column!r}; name a data "
                    "set of one id an image with --id-column."
                )
            values = ids[:]
        return _as_texts(values)

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield rows; a few are read at a time."""
        path, names = self._files[shard], None
        with _open_hdf5(path) as file:
            data = file[self.column]
            if self.id_column is not None:
                names = _as_texts(file[self.id_column][start:stop])
            # No more than 16 MB at a time, of images of any size.
            step = max(1, min(_ROWS, (16 << 20) // max(1, int(np.prod(data.shape[1:])))))
            for first in range(start, stop, step):
                block = data[first : min(first + step, stop)]
                for row, value in enumerate(block, first):
                    name = f"{_strip(shard)}/{row}" if names is None else names[row - start]
                    content = value if data.ndim == 4 else bytes(value)
                    yield SourceImage(name, f"in row {row} of {path}", partial(_give, content))


def _as_texts(values: np.ndarray) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()]


def _open_hdf5(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is damaged ({_shorten(error)}); fetch it again.") from error


def _list_datasets(file: Any) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def _is_image_data(data: Any) -> bool:
    import h5py

    if data.ndim == 4:
        return bool(data.dtype == np.uint8 and data.shape[-1] == 3)
    held = h5py.check_vlen_dtype(data.dtype)
    return data.ndim == 1 and held is not None and np.dtype(held) == np.uint8


# --- the phantom ------------------------------------------------------------------------------------------


class PhantomImages:
    """Images of the phantom, drawn when they are read: each concept once, then each again from another view."""

    def __init__(self, n_images: int, size: int, seed: int) -> None:
        self.n_images, self.size, self.seed = n_images, size, seed

    def describe(self) -> dict[str, Any]:
        """Return number, size and seed."""
        return {"kind": "phantom", "n_images": self.n_images, "size": self.size, "seed": self.seed}

    def list_shards(self) -> list[ImageShard]:
        """Return one shard."""
        return [ImageShard("phantom", "")]

    def _name_concepts(self) -> list[str]:
        return _name_concepts(self.seed, min(self.n_images, N_MAX_CONCEPTS))

    def _name(self, row: int, names: Sequence[str]) -> str:
        exemplar, concept = divmod(row, N_MAX_CONCEPTS)
        # As in the data sets of a phantom with this seed, where the same name is the same image.
        return f"{names[concept]}_{exemplar + 1:02d}{'s' if exemplar else 'b'}"

    def name_images(self, shard: str) -> Sequence[str]:
        """Return names of concepts with the number of the exemplar."""
        names = self._name_concepts()
        return [self._name(row, names) for row in range(self.n_images)]

    def read(self, shard: str, start: int, stop: int) -> Iterator[SourceImage]:
        """Yield images that are drawn when they are decoded."""
        names = self._name_concepts()
        for row in range(start, stop):
            exemplar, concept = divmod(row, N_MAX_CONCEPTS)
            name = self._name(row, names)
            yield SourceImage(
                name, name,
                partial(render_scene, concept, exemplar, size=self.size, seed=self.seed),
            )  # fmt: skip


@lru_cache(maxsize=2)
def _name_concepts(seed: int, n_concepts: int) -> list[str]:
    names: list[str] = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    return names


def _read_phantom_text(text: str) -> PhantomImages:
    number, *more = text.removeprefix(PHANTOM).split(",")
    values = {"size": 64, "seed": 0}
    for each in more:
        key, _, value = each.partition("=")
        if key not in values or not value.isdigit():
            raise ConfigError(
                f"{each!r} of {text} is no size=PIXELS and no seed=NUMBER; write phantom:1000,size=64."
            )
        values[key] = int(value)
    if not number.isdigit() or not int(number):
        raise ConfigError(f"{text} has no number of images; write for example phantom:1000000,size=64.")
    if values["size"] < 16:
        raise ConfigError(f"phantom images have 16 pixels or more, not {values['size']}.")
    return PhantomImages(int(number), values["size"], values["seed"])
