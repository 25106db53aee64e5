"""Layouts: one description of the files of a public data set and their content.

A `Layout` is part of the reader of a data set. The reader opens its files, `check` compares every file with it, and
the phantom writes the same files from arrays. Paths, keys, axes, types and codes are therefore written in one place.
Owns MATLAB 5 and 7.3, HDF5, ``.npy`` and zip archives of pictures. Contains nothing about a particular data set.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_columns, check_file, check_option, refuse_damage
from braindecode_vis.base.remote import open_hdf5
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.manifests import CheckFinding, look_at

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["mat5", "mat73", "hdf5", "npy", "pictures", "csv", "tsv", "other"]
_MATLAB_BYTES = 512  # of text and version before the HDF5 of a MATLAB file
_FIELD = re.compile(r"\{(\w+)(:\w+)?\}")


@dataclass(frozen=True)
class Array:
    """One array of a file.

    Parameters
    ----------
    axes
        Name of each axis. Axes with the same name have the same length in a file; a field of the key, as in ``voxel
        {subject}``, allows different lengths.
    dtype
        Published type; files with another kind of number are read unchanged.
    codes
        Meaning of its numbers, if they are codes; other numbers are refused.
    optional
        Whether it may be missing in a file.
    """

    axes: tuple[str, ...]
    dtype: str = "float64"
    codes: Mapping[int, str] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class File:
    """One kind of file of a data set.

    Parameters
    ----------
    path
        Path below the root; ``{subject}`` is replaced by the caller's `subject`, also in the keys of `arrays`, and
        ``{subject:02d}`` for a number of two digits.
    form
        Format; for an ``other`` file, such as a volume, only the path is used, and it is read and written elsewhere.
    what, hint
        Description of the file, and what to do if it is missing, for messages.
    arrays
        Arrays by key. A ``.npy`` has one, whose key is only in the layout.
    columns
        Columns of a table that the reader needs.
    member
        Name of a picture in an archive, from its `number`, which starts at 1.
    """

    path: str
    form: Form
    what: str
    hint: str
    arrays: Mapping[str, Array] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    member: str = "{number:04d}.jpg"

    def find(self, key: str) -> Array | None:
        """Return the description of the array that a file calls `key`."""
        for name, array in self.arrays.items():
            if (labels := _match(name, key)) is not None:
                return replace(array, axes=tuple(_fill(axis, labels) for axis in array.axes))
        return None


class Layout:
    """The files of a data set by short names; see the module.

    Examples
    --------
    >>> file = File("{session}.npy", "npy", "the counts", "fetch them", {"counts": Array(("neuron", "picture"))})
    >>> Layout(counts=file).place(Path("data"), "counts", session="210325").as_posix()
    'data/210325.npy'
    """

    def __init__(self, **files: File) -> None:
        self.files = files

    def place(self, root: Path, name: str, **labels: Any) -> Path:
        """Return the path of a file, whether it exists or not."""
        return root / self.files[name].path.format(**labels)

    def find(self, root: Path, name: str, *, hint: str = "", **labels: Any) -> Path:
        """Return the path of an existing file; `DataError` names a missing file, its place, and what to do."""
        file = self.files[name]
        return check_file(self.place(root, name, **labels), what=file.what, hint=hint or file.hint)

    def list_files(self, root: Path, name: str, **labels: Any) -> list[tuple[Path, dict[str, str]]]:
        """Return every file of this kind below `root` that has `labels`, and its other labels; sorted by path."""
        path = _fill(self.files[name].path, labels)
        found = sorted(root.glob(_FIELD.sub("*", path)))
        matches = [(entry, _match(path, entry.relative_to(root).as_posix())) for entry in found]
        return [(entry, match) for entry, match in matches if match is not None]

    def list_labels(self, root: Path, name: str, **labels: Any) -> list[dict[str, str]]:
        """Return only the labels of these files."""
        return [found for _, found in self.list_files(root, name, **labels)]

    def check_labels(self, root: Path, name: str, **labels: Any) -> None:
        """Raise `ConfigError` if files of this kind exist, but none has the label that a setting requests."""
        for label, value in labels.items():
            there = [found[label] for found in self.list_labels(root, name)]
            check_option(f"dataset.{label}", value, there or [value])

    @contextmanager
    def open(self, path: Path, name: str, *, hint: str = "copy or fetch it again") -> Iterator[OpenFile]:
        """Open one file that `find` returned, for reading; `hint` advises what to do if it is damaged.

        Raises
        ------
        DataError
            If it is damaged.
        """
        import h5py
        from scipy.io import loadmat

        file = self.files[name]
        kind = "MATLAB" if file.form.startswith("mat") else file.form.upper()
        what = f"{path} cannot be read as a {kind} file"
        content: Any
        with refuse_damage(what, hint=hint):
            # A copy that was saved in another version of MATLAB's format is read too.
            if file.form == "hdf5" or (file.form.startswith("mat") and h5py.is_hdf5(path)):
                content = open_hdf5(path)
            elif file.form.startswith("mat"):
                content = loadmat(path)
            else:
                content = dict.fromkeys(file.arrays, np.load(path, mmap_mode="r", allow_pickle=False))
        try:
            yield OpenFile(path, file, content)
        finally:
            if isinstance(content, h5py.File):
                content.close()

    def read(self, root: Path, name: str, key: str, **labels: Any) -> np.ndarray:
        """Return one whole array of a file."""
        with self.open(self.find(root, name, **labels), name) as file:
            return file.read(key)

    def read_table(self, path: Path, name: str, **options: Any) -> pd.DataFrame:
        """Return a table whose path `find` returned; `DataError` if it is not a table, or a needed column is missing.

        Parameters
        ----------
        **options
            Arguments of `pandas.read_csv`.
        """
        import pandas as pd

        with refuse_damage(f"{path} is no table", ValueError):
            table = pd.read_csv(path, sep="\t" if self.files[name].form == "tsv" else ",", **options)
        check_columns(table.columns, self.files[name].columns, what=str(path))
        return table

    def read_pictures(self, root: Path, name: str, **labels: Any) -> np.ndarray:
        """Return the pictures of an archive in the order of their names, uint8 of shape (n, height, width, 3).

        Raises
        ------
        DataError
            If the archive is damaged, holds no picture, or pictures of several sizes.
        """
        from PIL import Image

        path = self.find(root, name, **labels)
        with (
            refuse_damage(f"{path} cannot be read as an archive of pictures"),
            zipfile.ZipFile(path) as archive,
        ):
            # Some archives contain a folder, and members have any order.
            members = [m for m in archive.namelist() if re.search(r"\.(jpe?g|png)$", m, re.IGNORECASE)]
            members = sorted((m for m in members if "__MACOSX" not in m), key=lambda m: m.rpartition("/")[2])
            images = [np.asarray(Image.open(io.BytesIO(archive.read(m))).convert("RGB")) for m in members]
        if len({image.shape for image in images}) != 1:
            raise DataError(f"{path} holds {len(images)} pictures that are not of one size; fetch it again.")
        return np.stack(images)

    def check(self, root: Path, names: Sequence[str] = (), **labels: Any) -> Iterator[CheckFinding]:
        """Yield a finding on each file: whether it exists, and holds the arrays of the layout.

        Parameters
        ----------
        names
            Kinds of files that are needed; every kind by default.
        """

        def look(name: str) -> str:
            path = self.find(root, name, **labels)
            if self.files[name].form == "pictures":
                return f"{len(self.read_pictures(root, name, **labels))} pictures"
            if self.files[name].form in ("csv", "tsv"):
                return f"{len(self.read_table(path, name))} rows"
            if self.files[name].form == "other":
                return "there"
            with self.open(path, name) as file:
                return file.describe(labels)

        for name in names or self.files:
            yield look_at(self.files[name].path.format(**labels), look, name)

    def write(
        self,
        root: Path,
        name: str,
        arrays: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
        **labels: Any,
    ) -> Path:
        """Write one file: every array of the layout, in its type; the lengths of axes must agree.

        Arrays of HDF5 are written one by one, so the pairs of a generator need not fit into memory.

        Raises
        ------
        DataError
            If an array is missing, is not in the layout, or does not fit the others.
        """
        path, file = self.place(root, name, **labels), self.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = _check_arrays(path, file, arrays.items() if isinstance(arrays, Mapping) else arrays)
        with replace_atomically(path) as temporary:
            _WRITERS[file.form](temporary, pairs)
        return path

    def write_pictures(self, root: Path, name: str, files: Iterable[Path], **labels: Any) -> Path:
        """Write an archive of picture files, in their order."""
        path = self.place(root, name, **labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for number, source in enumerate(files, start=1):
                member = self.files[name].member.format(number=number)
                # A fixed date, so that the same pictures give the same bytes.
                archive.writestr(zipfile.ZipInfo(member), source.read_bytes())
        return path


class OpenFile:
    """Reads the arrays of one open file; `Layout.open` makes it.

    Axes are in the order of the layout, not in that of the library: h5py reverses those of MATLAB.
    """

    def __init__(self, path: Path, file: File, content: Any) -> None:
        self.path, self.file, self.content = path, file, content
        self._reversed = file.form.startswith("mat") and not isinstance(content, dict)
        self._lengths: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def find(self, name: str) -> list[tuple[str, dict[str, str]]]:
        """Return every key that fits `name` of the layout, and the values of its fields."""
        keys: list[str] = []
        with refuse_damage(f"{self.path} is truncated or damaged"):
            if isinstance(self.content, dict):
                keys += self.content
            else:  # groups of HDF5 lie within each other
                self.content.visit(keys.append)
        return [(key, labels) for key in keys if (labels := _match(name, key)) is not None]

    def _look_up(self, key: str) -> tuple[Array, Any]:
        """Return the description of an array, and its object in the file."""
        array = self.file.find(key)
        if array is None or key not in self.content:
            raise DataError(
                f"{self.path} is missing the variable {key}; it is not {self.file.what} as published: {self.file.hint}."
            )
        return array, self.content[key]

    def measure(self, key: str) -> dict[str, int]:
        """Return the length of each axis of an array.

        Raises
        ------
        DataError
            If it is missing, has other axes, or another length than an array before it.
        """
        array, stored = self._look_up(key)
        # A group of HDF5, a cell of MATLAB or text.
        if getattr(stored, "dtype", np.dtype(object)).kind not in "biufc":
            raise DataError(f"{self.path}: {key} has no numbers; it is not {self.file.what} as published.")
        shape = stored.shape
        return _check_axes(self.path, key, array, shape[::-1] if self._reversed else shape, self._lengths)

    def read(
        self, key: str, *, first: str = "", part: Mapping[str, slice | np.ndarray] | None = None
    ) -> np.ndarray:
        """Return an array.

        Parameters
        ----------
        first
            Axis that comes first in the result; the order of the layout by default.
        part
            Indices to read along single axes, ascending; by default all.

        Raises
        ------
        DataError
            As in `measure`, if the file is truncated, or a number is not one of the codes.
        """
        lengths = self.measure(key)
        array, stored = self._look_up(key)
        index = tuple((part or {}).get(axis, slice(None)) for axis in array.axes)
        # In MATLAB, a vector is a matrix with one row or column.
        index += (slice(None),) * (stored.ndim - len(index))
        with refuse_damage(f"{self.path} is truncated or damaged", OSError):
            values = stored[index[::-1]].T if self._reversed else stored[index]
        if len(lengths) == 1:
            values = np.ravel(values)
        unknown = set(np.unique(values).tolist()) - set(array.codes) if array.codes else ()
        if unknown:
            raise DataError(
                f"{self.path}: {key} holds the code {min(unknown):g}; {min(array.codes)} to {max(array.codes)} are "
                "known."
            )
        return np.asarray(np.moveaxis(values, array.axes.index(first), 0) if first else values)

    def describe(self, labels: Mapping[str, Any]) -> str:
        """Measure every array of the layout for `labels`, and return a text with the lengths of their axes."""
        for name, array in self.file.arrays.items():
            wanted = _fill(name, labels)
            found = [key for key, _ in self.find(wanted)]
            for key in found or ([] if array.optional else [wanted]):
                self.measure(key)
        return ", ".join(f"{n} x {axis}" for axis, n in self._lengths.items())


def _fill(template: str, labels: Mapping[str, Any]) -> str:
    """Return a template in which the known fields are filled in; the others stay."""
    return _FIELD.sub(
        lambda field: f"{{0{field[2] or ''}}}".format(labels[field[1]]) if field[1] in labels else field[0],
        template,
    )


def _match(template: str, text: str) -> dict[str, str] | None:
    """Return the value of each ``{field}`` of a template in a text; None if the text does not fit."""
    pattern, end, seen = "", 0, set[str]()
    for found in _FIELD.finditer(template):
        name = found[1]
        pattern += re.escape(template[end : found.start()])
        value = r"\d+" if found[2] else "[^/]+"
        # A field that occurs twice has the same value both times.
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{value})"
        seen.add(name)
        end = found.end()
    match = re.fullmatch(pattern + re.escape(template[end:]), text)
    return None if match is None else match.groupdict()


def _check_axes(
    path: Path, key: str, array: Array, shape: tuple[int, ...], lengths: dict[str, int]
) -> dict[str, int]:
    """Return the length of each axis; it must agree with `lengths`, and new ones are added there."""
    if len(array.axes) == 1 and len(shape) == 2 and 1 in shape:
        shape = (shape[0] * shape[1],)
    if len(shape) != len(array.axes):
        raise DataError(f"{path}: {key} has the shape {shape}, but should be {' x '.join(array.axes)}.")
    own = dict(zip(array.axes, map(int, shape), strict=True))
    for axis, n in own.items():
        if lengths.setdefault(axis, n) != n:
            raise DataError(
                f"{path}: {key} has the length {n} along {axis}, another array {lengths[axis]}; fetch it again."
            )
    return own


def _check_arrays(
    path: Path, file: File, arrays: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays in the types of the layout; `DataError` if one does not fit, or is missing in the end."""
    lengths: dict[str, int] = {}
    missing = {key for key, array in file.arrays.items() if not array.optional}
    for key, value in arrays:
        if (array := file.find(key)) is None:
            raise DataError(f"{path.name} has no array {key}; its layout names {', '.join(file.arrays)}.")
        typed = np.asarray(value, array.dtype)
        _check_axes(path, key, array, typed.shape, lengths)
        missing = {name for name in missing if _match(name, key) is None}
        yield key, typed
    if missing:
        raise DataError(f"{path.name} cannot be written without {', '.join(sorted(missing))}.")


def _write_npy(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a name
        for _, value in arrays:
            np.save(file, value, allow_pickle=False)


def _write_hdf5(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in arrays:
            file.create_dataset(key, data=value)


def write_mat5(path: Path, content: Mapping[str, Any], **options: Any) -> None:
    """Write a MATLAB file whose bytes do not depend on the time; `options` are those of `scipy.io.savemat`."""
    from scipy.io import savemat

    with path.open("wb") as file:
        savemat(file, dict(content), **options)
    with path.open("r+b") as file:  # the free text of the header holds the time
        file.write(b"MATLAB 5.0 MAT-file, Platform: MACI64, phantom".ljust(116))


def _write_mat5(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    write_mat5(path, dict(arrays), do_compression=True, oned_as="column")


def _write_mat73(path: Path, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write HDF5 with reversed axes after MATLAB's header of 512 bytes."""
    import h5py

    with h5py.File(path, "w", userblock_size=_MATLAB_BYTES) as file:
        for key, value in arrays:
            dataset = file.create_dataset(key, data=(value[:, None] if value.ndim == 1 else value).T)
            dataset.attrs["MATLAB_class"] = np.bytes_("single" if value.dtype == np.float32 else "double")
    with path.open("r+b") as file:
        text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, phantom HDF5 schema 1.00 ."
        # Text, then the version and the mark of the byte order, as MATLAB writes them.
        file.write(text.ljust(116) + b"\0" * 8 + b"\x00\x02IM")


_WRITERS = {"mat5": _write_mat5, "mat73": _write_mat73, "hdf5": _write_hdf5, "npy": _write_npy}
