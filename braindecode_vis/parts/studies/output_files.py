"""Reads saved outputs of any system: embeddings, matrices, labels, folders of images, and tables of ids.

Owns which files are read and how, and how a value becomes an id. It does not know what is scored. Nothing in a file can
run: pickles are refused, and tensors are read with weights only. Large arrays stay on disk as memory maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError, check_finite, refuse_damage, suggest
from braindecode_vis.datasets.array_folder import read_trial_table
from braindecode_vis.datasets.own_data import index_pictures
from braindecode_vis.embeddings.imported import open_arrays

ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".pt", ".pth", ".safetensors")
TABLES = (".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".json")
#: Columns that say what a row is; all others of a table are its values.
ABOUT = ("stimulus_id", "concept", "subject", "session", "run", "group", "repetition")
#: What the one column of labels may be called in a table of several.
_LABELS = ("label", "class", "concept", "category")
_PICKLES = (".pkl", ".pickle", ".joblib", ".p")


@dataclass(frozen=True)
class Given:
    """What one file, folder or argument holds.

    Parameters
    ----------
    name
        What it is called in messages: its path, or what the argument is.
    values : array, optional
        Numbers of shape (n_rows, ...), or one label per row, shape (n_rows,).
    about : DataFrame of n_rows rows
        Columns of `ABOUT` that came with it; perhaps none.
    pictures
        Files of a folder of images by their id.
    """

    name: str
    values: np.ndarray | None = None
    about: pd.DataFrame = field(default_factory=pd.DataFrame)
    pictures: Mapping[str, Path] | None = None

    def __len__(self) -> int:
        return len(self.values) if self.values is not None else len(self.pictures or ())

    @property
    def ids(self) -> np.ndarray | None:
        """Id of each row where the file brings them along."""
        return self.about["stimulus_id"].to_numpy(dtype=object) if "stimulus_id" in self.about else None

    @property
    def is_labels(self) -> bool:
        """Whether there is one value per row, a name or a whole number."""
        return self.values is not None and self.values.ndim == 1


def read_given(source: Any, what: str) -> Given:
    """Return what a path or an argument holds.

    Parameters
    ----------
    source
        A path, with ``::NAME`` behind it for one array of several; an array or tensor, `Embeddings`, a table, a list.
    what
        Its role in messages, for example ``the predictions``.

    Raises
    ------
    DataError
        If there is nothing, or nothing that can be read safely.
    """
    if not isinstance(source, str | Path):
        return _take(source, what)
    path, name = _split_name(source)
    if not path.exists():
        raise DataError(f"{what} were not found at {path}; check the path.")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in ARRAYS:
        with open_arrays(path) as arrays:
            return Given(str(path), _check_kind(_choose(arrays, path, name), str(path)))
    if path.suffix.lower() in TABLES:
        return _part_table(read_trial_table(path), str(path), name)
    if path.suffix.lower() in TEXTS:
        return Given(str(path), _read_text(path))
    why = (
        "a pickle can run code when it is opened; save the array as .npy, .npz or .safetensors"
        if path.suffix.lower() in _PICKLES
        else f"known are folders of images and {', '.join((*ARRAYS, *TABLES, *TEXTS))}"
    )
    raise DataError(f"{path} is not read: {why}.")


def read_ids(source: Any, n: int, what: str) -> pd.DataFrame:
    """Return a table with `stimulus_id` as text, and what else is known of the rows.

    Parameters
    ----------
    source
        A list, array or table, or a file of one: text with an id a line, CSV, parquet, ``.npy``, JSON.
    n
        Number of rows that it must have.
    what
        What the rows belong to, for messages.
    """
    given = read_given(source, f"the ids of {what}")
    if given.pictures is not None:
        table = pd.DataFrame({"stimulus_id": list(given.pictures)})
    else:
        table = given.about.copy()
        if given.ids is None:
            if given.values is None or given.values.ndim != 1:
                raise DataError(
                    f"{given.name} must hold one id per row, or a table with the column stimulus_id, for {what}."
                )
            table["stimulus_id"] = name_values(given.values)
    if len(table) != n:
        raise DataError(f"{what} have {n} rows, but {len(table)} are in {given.name}.")
    return table.reset_index(drop=True)


def name_values(values: Any) -> np.ndarray:
    """Return ids or labels as text: a whole number has no decimals, whatever type it was saved in.

    Examples
    --------
    >>> name_values(np.array([3.0, 12.0])).tolist(), name_values([b"dog", "cat "]).tolist()
    (['3', '12'], ['dog', 'cat'])
    """
    array = np.asarray(values)
    if array.dtype.kind == "f":
        check_finite(array, what="the labels or ids", row_names=range(len(array)))
        if (array != np.round(array)).any():
            raise DataError(
                f"{float(array[array != np.round(array)][0]):g} is neither an id nor a label; these must "
                "be whole numbers or names."
            )
        array = array.astype(np.int64)
    names = [v.decode() if isinstance(v, bytes) else str(v).strip() for v in array.tolist()]
    return np.array(names, dtype=object)


def _split_name(source: str | Path) -> tuple[Path, str | None]:
    path, mark, name = str(source).rpartition("::")
    return (Path(path).expanduser(), name) if mark else (Path(source).expanduser(), None)


def _take(source: Any, what: str) -> Given:
    if isinstance(source, Embeddings):
        return Given(what, source.vectors, pd.DataFrame({"stimulus_id": name_values(source.ids)}))
    if isinstance(source, pd.DataFrame):
        return _part_table(source.reset_index(drop=True), what, None)
    # numpy has no bfloat16, hence the detour over float32 below.
    if hasattr(source, "detach"):  # a tensor of torch, which need not be imported for this
        source = source.detach().cpu()
        source = (source.float() if "bfloat16" in str(source.dtype) else source).numpy()
    if isinstance(source, Sequence | np.ndarray | pd.Series):
        try:
            return Given(what, _check_kind(np.asarray(source), what))
        except ValueError as error:
            raise DataError(f"{what} have rows of different lengths; make one array of them.") from error
    raise DataError(f"{what} are {type(source).__name__}; give a path, an array, a table or a list.")


def _open_folder(folder: Path) -> Given:
    for place in (folder, folder / "predictions"):  # the latter in what the verb predict writes
        if (place / "vectors.npy").is_file() and (place / "ids.json").is_file():
            found = store.read_embeddings(place)
            return Given(str(folder), found.vectors, pd.DataFrame({"stimulus_id": name_values(found.ids)}))
    files, _, ids = index_pictures(folder)
    return Given(str(folder), pictures=dict(zip(ids, files, strict=True)))


def _choose(arrays: Mapping[str, Any], path: Path, name: str | None) -> Any:
    """Return the array of a file that is asked for, or its only one."""
    if not arrays:
        raise DataError(
            f"{path} holds no array or tensor; save plain arrays, without lists or folders in them."
        )
    if name is None and len(arrays) > 1:
        shapes = ", ".join(f"{key} {tuple(item.shape)}" for key, item in list(arrays.items())[:8])
        raise DataError(
            f"{path} holds {len(arrays)} arrays ({shapes}); choose one, as in {path.name}::{next(iter(arrays))}."
        )
    if name is not None and name not in arrays:
        raise DataError(
            f"{path} holds no array {name!r}{suggest(name, list(arrays))}; it holds {', '.join(arrays)}."
        )
    found = arrays[name if name is not None else next(iter(arrays))]
    return found if isinstance(found, np.ndarray) else found[()]  # HDF5 has no array after its file is closed


def _check_kind(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "biufSUO":
        raise DataError(f"values of type {values.dtype} in {name}; numbers or text are expected.")
    if values.dtype.kind == "O":
        if values.ndim != 1 or not all(isinstance(v, str | bytes | int | np.integer) for v in values):
            raise DataError(f"objects instead of numbers in {name}; save a plain array.")
    if values.ndim == 0 or not values.size:
        raise DataError(f"there is nothing in {name}.")
    return values


def _read_text(path: Path) -> np.ndarray:
    with refuse_damage(
        f"{path} cannot be read as text in UTF-8", UnicodeDecodeError, OSError, hint="save it again"
    ):
        if path.suffix.lower() == ".json":
            content = store.read_json(path)
            names = content.get("ids", content) if isinstance(content, dict) else content
            if not isinstance(names, list) or not all(isinstance(v, str | int) for v in names):
                raise DataError(
                    f"{path} must hold a list of names or numbers, or a mapping with the list ids."
                )
            return np.array([str(v) for v in names], dtype=object)
        # utf-8-sig takes away the mark that Windows editors put before the first id.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    # Empty lines at the end are harmless; one in between would shift every id below it.
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise DataError(f"line {lines.index('') + 1} of {path} is empty; one name per line is expected.")
    if not lines:
        raise DataError(f"{path} is empty.")
    return np.array(lines, dtype=object)


def _part_table(table: pd.DataFrame, name: str, column: str | None) -> Given:
    """Return the values of a table and what it says of its rows."""
    if not len(table):
        raise DataError(f"{name} has no row.")
    # Of two columns of ids, the one with our name counts.
    table = table.rename(columns={"id": "stimulus_id"} if "stimulus_id" not in table else {})
    table.columns = [str(c) for c in table.columns]
    about = table[[c for c in ABOUT if c in table]].copy()
    for key in about:
        if about[key].isna().any():
            raise DataError(
                f"the column {key} of {name} is empty in row {int(np.flatnonzero(about[key].isna())[0])}."
            )
        about[key] = name_values(about[key].to_numpy())
    rest = [c for c in table if c not in ABOUT]
    if column is not None:
        if column not in table:
            known = [str(c) for c in table]
            raise DataError(
                f"{name} has no column {column!r}{suggest(column, known)}; it has {', '.join(known)}."
            )
        return Given(name, table[column].to_numpy(), about)
    labels = [c for c in _LABELS if c in table]
    numbers = [c for c in rest if table[c].dtype.kind in "fiub"]
    if len(rest) == 1 and rest[0] not in numbers and _holds_vectors(table[rest[0]]):
        lengths = {len(row) for row in table[rest[0]]}
        if len(lengths) > 1:
            raise DataError(f"the rows of the column {rest[0]} of {name} have different lengths.")
        return Given(name, np.stack([np.asarray(row) for row in table[rest[0]]]), about)
    # One column of numbers beside labels is a score or a counter, several are features or scores per class.
    if len(rest) == 1 or (labels and len(numbers) < 2):
        return Given(name, table[(labels or rest)[0]].to_numpy(), about)
    if not rest:
        return Given(name, None if not labels else table[labels[0]].to_numpy(), about)
    if len(numbers) < len(rest):
        odd = [c for c in rest if c not in numbers]
        raise DataError(
            f"{name} has the column {odd[0]!r}, which is not a number; other known columns are "
            f"{', '.join(ABOUT)}; or choose one column, as in {Path(name).name}::{rest[0]}."
        )
    return Given(name, table[rest].to_numpy(), about)


def _holds_vectors(column: pd.Series) -> bool:
    return bool(column.map(lambda v: isinstance(v, np.ndarray | list)).all())
