"""Matches the rows of predictions with the rows of targets by id, never by a guess.

Owns the ways in which ids are given (for both sides, for one of them, by position, by file name), repetitions, targets
that were saved once per trial, labels and one-hot rows, and reconstructions beside stimuli.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError, check_finite, check_unique, suggest
from braindecode_vis.base.stimuli import ImageRows, read_image_size
from braindecode_vis.datasets.own_data import UNSTATED
from braindecode_vis.parts.studies.output_files import ABOUT, Given, name_values, read_ids

LARGEST_SIDE = 256  # pixels; published tables bring images to 256 before anything else
_DRAW = re.compile(r"(.+?)[_/](?:draw|sample|seed)?[_-]?(\d+)")


@dataclass(frozen=True)
class OutputRows:
    """What is known of the rows of one side.

    Parameters
    ----------
    table : DataFrame of n_rows rows
        Columns `subject`, `session`, `run` (``unstated`` if nothing is said), and perhaps `stimulus_id`, `concept` and
        `group`.
    """

    table: pd.DataFrame

    @classmethod
    def make(cls, table: pd.DataFrame, n: int) -> OutputRows:
        """Return rows with the columns that may be missing."""
        known = table[[c for c in table if c in ABOUT]] if len(table) else pd.DataFrame(index=range(n))
        # Unstated rows share one label, so that they count as one subject and not as many.
        missing = [c for c in ("subject", "session", "run") if c not in known]
        return cls(known.assign(**dict.fromkeys(missing, UNSTATED)).astype(object).reset_index(drop=True))

    @property
    def has_ids(self) -> bool:
        """Whether rows have ids already."""
        return "stimulus_id" in self.table

    @property
    def ids(self) -> np.ndarray:
        """Id of each row, shape (n_rows,)."""
        return self.table["stimulus_id"].to_numpy(dtype=object)

    @property
    def has_concepts(self) -> bool:
        """Whether it is known what each row shows."""
        return "concept" in self.table

    @property
    def concepts(self) -> np.ndarray:
        """Concept of each row; an image without one is its own."""
        return self.table["concept"].to_numpy(dtype=object) if self.has_concepts else self.ids

    @property
    def are_repeated(self) -> bool:
        """Whether a subject has several rows of one item."""
        return bool(self.table.duplicated(["subject", "stimulus_id"]).any())

    def look_up_concepts(self, ids: np.ndarray) -> np.ndarray:
        """Return the concept of each of these ids."""
        known = dict(zip(self.ids.tolist(), self.concepts.tolist(), strict=True))
        return np.array([known[i] for i in ids.tolist()], dtype=object)

    def with_ids(self, ids: Any) -> OutputRows:
        """Return the same rows under these ids."""
        return OutputRows(self.table.assign(stimulus_id=np.asarray(ids, dtype=object)))

    def select(self, index: np.ndarray) -> OutputRows:
        """Return some rows, in this order."""
        return OutputRows(self.table.iloc[index].reset_index(drop=True))


def name_rows(given: Given, source: Any, what: str, *, other: int | None = None) -> OutputRows:
    """Return what is known of the rows of one side.

    Parameters
    ----------
    given
        The side.
    source
        Ids that were given apart, or None.
    what
        Its role in messages.
    other
        Length of the other axis of a matrix: ids of that number show that it is transposed.
    """
    n = len(given)
    if source is None:
        return OutputRows.make(given.about, n)
    # Only ids that fit the other axis and not this one prove that the matrix is turned.
    if other is not None and other != n:
        found = None
        try:
            read_ids(source, other, what)
            found = other
        except DataError:
            pass
        if found is not None:
            raise DataError(
                f"{what} have {n} rows and {other} columns for {other} ids: they look transposed; rows are predictions."
            )
    table = read_ids(source, n, what)
    further = given.about[[c for c in given.about if c not in table]]
    return OutputRows.make(pd.concat([table, further.reset_index(drop=True)], axis=1), n)


def match_rows(rows: OutputRows, gallery: OutputRows) -> tuple[OutputRows, OutputRows, list[str]]:
    """Return both sides with ids, and how they came to them.

    Parameters
    ----------
    rows, gallery
        Predictions, and targets or columns of a matrix.

    Raises
    ------
    ConfigError, DataError
        If nothing says which row belongs to which, or an id is not in the gallery.
    """
    rows, gallery, notes = _find_ids(rows, gallery)
    if rows.has_concepts and not gallery.has_concepts:
        known = dict(zip(rows.ids.tolist(), rows.concepts.tolist(), strict=True))
        gallery = OutputRows(gallery.table.assign(concept=[known.get(i, i) for i in gallery.ids.tolist()]))
    return rows, gallery, notes


def _find_ids(rows: OutputRows, gallery: OutputRows) -> tuple[OutputRows, OutputRows, list[str]]:
    n, size = len(rows.table), len(gallery.table)
    if rows.has_ids and gallery.has_ids:
        check_known(rows.ids, gallery.ids)
        return rows, gallery, []
    if not rows.has_ids and n != size:
        raise DataError(
            f"{n} predictions and {size} targets: without ids, row k belongs to row k; give the id of the true item of "
            "each prediction as ids, and those of the targets as target_ids."
        )
    if gallery.has_ids:
        return rows.with_ids(gallery.ids), gallery, ["The predictions follow the order of the targets."]
    if not rows.has_ids:
        names = [str(k) for k in range(n)]
        return (
            rows.with_ids(names),
            gallery.with_ids(names),
            ["Row k of the predictions belongs to row k of the targets."],
        )
    places = [str(k) for k in range(size)]
    # Ids such as "0", "1" may be names or row numbers; a permutation of all of them could be either, so it is
    # refused.
    counts_rows = set(rows.ids.tolist()) <= set(places)
    if n == size and len(set(rows.ids.tolist())) == n:
        if counts_rows and rows.ids.tolist() != places:
            raise ConfigError(
                "the ids are the row numbers of the targets in another order: they could be ids of both "
                "sides, or the target of each prediction; give target_ids too."
            )
        return rows, gallery.with_ids(rows.ids), ["The ids apply to the rows of both sides."]
    if counts_rows:
        return rows, gallery.with_ids(places), ["The ids are numbers of the targets' rows, from 0."]
    if rows.ids[0].isdigit() and {str(k + 1) for k in range(size)} >= set(rows.ids.tolist()):
        raise DataError(
            f"the ids run from 1 to {size}, but rows of the targets are counted from 0; give target_ids."
        )
    raise DataError(
        f"the {size} targets have no ids, so the ids of the predictions cannot be matched; give target_ids."
    )


def check_known(ids: np.ndarray, known: np.ndarray) -> None:
    """Raise `DataError` if an id is not among the known ones, with the likely reason."""
    there = set(known.tolist())
    missing = [i for i in ids.tolist() if i not in there]
    if not missing:
        return
    # A hint only: ids that look alike are never matched.
    plain = {_simplify(i): i for i in there}
    near = plain.get(_simplify(missing[0]))
    hint = f" (is it {near!r}?)" if near else suggest(missing[0], list(known[:2000]))
    raise DataError(
        f"{len(set(missing))} of {len(set(ids.tolist()))} ids of the predictions are not among the {len(there)} of the "
        f"targets, first {missing[0]!r}{hint}; use the same names for both."
    )


def _simplify(name: str) -> str:
    """Return an id without folder, suffix and leading zeros, which are what two lists most often differ in."""
    plain = Path(name).stem if re.search(r"\.[A-Za-z]+$", name) else Path(name).name
    return plain.lstrip("0").lower() or "0"


# --- embeddings ---------------------------------------------------------------------------------------------------


def expand_repetitions(
    given: Given, true: Given, ids: Any
) -> tuple[np.ndarray, np.ndarray, OutputRows, list[str]]:
    """Return predictions and targets as rows of one shape, with repetitions in an axis of their own made rows.

    Parameters
    ----------
    given, true
        Predictions of shape (n_images, n_repetitions, ...) or (n_rows, ...), targets of shape (n_targets, ...).
    ids
        Of the predictions' first axis.

    Returns
    -------
    vectors, values
        Predictions and targets.
    rows
        Of the predictions.
    notes
    """
    vectors, values = given.values, true.values
    assert vectors is not None
    assert values is not None
    # Targets (n_targets, 1, ...) of a saved batch axis become (n_targets, ...).
    if values.ndim == vectors.ndim + 1 and values.shape[1] == 1:
        values = values[:, 0]
    rows = name_rows(given, ids, "the predictions", other=vectors.shape[1] if vectors.ndim == 2 else None)
    if vectors.ndim != values.ndim + 1 or vectors.shape[2:] != values.shape[1:]:
        return vectors, values, rows, []
    n, n_repetitions = vectors.shape[:2]
    if n_repetitions == 1:
        return vectors[:, 0], values, rows, []
    if not rows.has_ids:
        rows = rows.with_ids(_name_by_position(n, len(values), true))
    index = np.repeat(np.arange(n), n_repetitions)
    flat = vectors.reshape(-1, *vectors.shape[2:])  # (n_images * n_repetitions, ...)
    return (
        flat,
        values,
        rows.select(index),
        [f"{n_repetitions} repetitions of each of {n} images, one row each."],
    )


def _name_by_position(n: int, size: int, true: Given) -> Any:
    if n != size:
        raise DataError(f"{n} predictions and {size} targets: without ids, row k belongs to row k; give ids.")
    return [str(k) for k in range(n)] if true.ids is None else true.ids


def merge_equal_targets(
    values: np.ndarray, gallery: OutputRows, rows: OutputRows
) -> tuple[np.ndarray, OutputRows, OutputRows, list[str]]:
    """Return targets with one row per item, where they were saved once per prediction.

    Rows of one id must be equal. Without ids, equal rows are one item: two copies in a gallery would tie, and a tie is
    lost.

    Parameters
    ----------
    values : array of shape (n_targets, ...)
    gallery, rows
        Of targets and predictions.
    """
    n = len(values)
    if not gallery.has_ids and rows.has_ids and n == len(rows.ids) and len(set(rows.ids.tolist())) < n:
        gallery = gallery.with_ids(rows.ids)
    # Rows are compared as bytes; above 128 M values that would copy too much, and equal rows stay apart.
    content = [np.ascontiguousarray(row).tobytes() for row in values] if values.size < 1 << 27 else None
    if gallery.has_ids:
        if len(set(gallery.ids.tolist())) == n:
            return values, gallery, rows, []
        first = pd.Series(gallery.ids).drop_duplicates().index.to_numpy()
        place = {name: row for row, name in zip(first.tolist(), gallery.ids[first].tolist(), strict=True)}
        # Half precision and other machines round differently, so copies need not be equal to the bit.
        for row, name in enumerate(gallery.ids.tolist()):
            if not np.allclose(values[row], values[place[name]], rtol=1e-4, atol=1e-6):
                raise DataError(
                    f"the targets have two different rows for {name!r}; keep or average one row per item first."
                )
        if not rows.has_ids and len(rows.table) == n:
            rows = rows.with_ids(gallery.ids)
    elif content is not None and not rows.has_ids and len(set(content)) < n == len(rows.table):
        codes, _ = pd.factorize(np.array(content, dtype=object))
        first = pd.Series(codes).drop_duplicates().index.to_numpy()
        rows, gallery = rows.with_ids([str(c) for c in codes]), gallery.with_ids([str(c) for c in codes])
    else:
        return values, gallery, rows, []
    if len(first) < 2:
        raise DataError("all targets are equal, so they cannot be distinguished.")
    note = f"The targets repeat: {n} rows are {len(first)} different ones, each taken once."
    return np.asarray(values[first]), gallery.select(first), rows, [note]


def check_transposed(given: Given, true: Given) -> None:
    """Raise `DataError` if predictions and targets fit together once one of them is turned."""
    assert given.values is not None
    assert true.values is not None
    shape, theirs = given.values.shape, true.values.shape
    if len(shape) == len(theirs) == 2 and shape[1] != theirs[1] and shape[0] == theirs[1]:
        raise DataError(
            f"predictions of shape {shape} beside targets of shape {theirs} look transposed; rows are predictions and "
            "columns are features."
        )


# --- classes ------------------------------------------------------------------------------------------------------


def is_one_hot(values: np.ndarray) -> bool:
    """Return whether every row holds a single 1 among zeros.

    Examples
    --------
    >>> is_one_hot(np.eye(3)), is_one_hot(np.ones((3, 3)))
    (True, False)
    """
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "biuf":
        return False
    for part in (values[:100], values):  # most arrays are none within a few rows
        block = np.asarray(part)
        if not (((block == 0) | (block == 1)).all() and (block.sum(axis=1) == 1).all()):
            return False
    return True


def find_classes(
    given: Given, true: Given, ids: Any, target_ids: Any
) -> tuple[np.ndarray, list[str], np.ndarray, OutputRows, list[str]]:
    """Return a score per class, the classes, the true labels, and what is known of the trials.

    Parameters
    ----------
    given, true
        Decided labels or scores per class, and true labels or one-hot rows.
    ids
        Of the trials; labels of a table with ids are brought into their order.
    target_ids
        Names of the classes, in the order of the columns.
    """
    values, truth = given.values, true.values
    assert values is not None
    assert truth is not None
    n, notes = len(values), []
    if len(truth) != n:
        turned = values.ndim == 2 and values.shape[1] == len(truth)
        hint = (
            "; they look transposed: rows are trials, columns classes"
            if turned
            else "; one label per trial is needed"
        )
        raise DataError(f"predictions of {n} rows and {len(truth)} true labels{hint}.")
    rows = name_rows(given, ids, "the predictions")
    if true.ids is not None and rows.has_ids:
        check_unique(true.ids.tolist(), what="ids of the true labels")
        check_known(rows.ids, true.ids)
        truth = truth[pd.Index(true.ids).get_indexer(pd.Index(rows.ids))]
        notes.append("True labels were put into the order of the predictions by id.")
    if not rows.has_ids:
        rows = rows.with_ids(true.ids if true.ids is not None else [str(k) for k in range(n)])
    if given.is_labels:
        if truth.ndim != 1:
            raise DataError("decoded labels need one true label each, not one-hot rows.")
        decided, labels = name_values(values), name_values(truth)
        classes = sorted(set(decided.tolist()) | set(labels.tolist()), key=_sort_key)
        if not set(decided.tolist()) & set(labels.tolist()):
            raise DataError(
                f"no decoded label is among the true labels (first {decided[0]!r} and {labels[0]!r}); "
                "use the same class names."
            )
        place = {name: k for k, name in enumerate(classes)}
        # A decided label is a score of 1 for its class and 0 for all others: (n_trials, n_classes).
        decisions = np.zeros((n, len(classes)), np.float32)
        decisions[np.arange(n), [place[name] for name in decided.tolist()]] = 1
        return decisions, classes, labels, rows, notes
    if values.ndim != 2:
        raise DataError(
            f"scores of classes have a row per trial and a column per class, not the shape {values.shape}."
        )
    check_finite(values, what="the scores of the classes", row_names=rows.ids, hint="")
    n_classes = values.shape[1]
    if truth.ndim > 1 and truth.shape[1:] != (n_classes,):
        raise DataError(
            f"true classes are one label per trial or one of {n_classes} columns, not of shape {truth.shape}."
        )
    if target_ids is not None:
        classes = read_ids(target_ids, n_classes, "the classes")["stimulus_id"].tolist()
        check_unique(classes, what="names of classes")
    elif truth.ndim == 2:
        classes = [str(k) for k in range(n_classes)]
    else:
        classes = _name_columns(name_values(truth), n_classes, notes)
    if truth.ndim == 2:
        if not is_one_hot(truth):
            raise DataError("true classes are one label per trial, or rows with a single 1.")
        labels = np.array(classes, dtype=object)[truth.argmax(axis=1)]
    else:
        labels = name_values(truth)
        if unknown := sorted(set(labels.tolist()) - set(classes), key=_sort_key):
            # Numbers beside names count the columns.
            if not set(unknown) <= {str(k) for k in range(n_classes)} or len(unknown) < len(
                set(labels.tolist())
            ):
                raise DataError(f"the true label {unknown[0]!r} is not among the {n_classes} classes.")
            labels = np.array(classes, dtype=object)[labels.astype(int)]
    return values, classes, labels, rows, notes


def _name_columns(labels: np.ndarray, n_classes: int, notes: list[str]) -> list[str]:
    names = sorted(set(labels.tolist()), key=_sort_key)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        numbers = [int(name) for name in names]
        if min(numbers) >= 0 and max(numbers) < n_classes:
            return [str(k) for k in range(n_classes)]
        # Counted from 1, every label would name its neighbour's column, and accuracy fall to chance without a word.
        if min(numbers) >= 1 and max(numbers) == n_classes:
            raise DataError(
                f"labels run to {n_classes}, but columns are counted from 0 to {n_classes - 1}; give the label of each "
                "column as target_ids."
            )
    # Not with fewer names than columns: the order of those that never occur is unknown.
    if len(names) == n_classes:
        notes.append(
            "The columns are taken as the labels in alphabetical order, as scikit-learn sorts classes."
        )
        return sorted(names)
    raise DataError(
        f"{n_classes} columns and {len(names)} different labels, first {names[0]!r}: name the class of each column as "
        "target_ids."
    )


def _sort_key(name: str) -> tuple[int, str]:
    return (int(name), "") if re.fullmatch(r"\d{1,15}", name) else (1 << 60, name)


# --- images -------------------------------------------------------------------------------------------------------


def find_images(
    given: Given, true: Given, ids: Any, size: int | None
) -> tuple[ImageRows, ImageRows, tuple[int, int], OutputRows, list[str]]:
    """Return seen and decoded images, which are read when they are asked for, matched by the names of the files.

    Parameters
    ----------
    given, true
        Folders of reconstructions and of stimuli. ``ID_0.png``, ``ID_1.png`` or ``ID/0.png`` are draws of one image.
    ids
        Which stimuli were tested; by default all of them must have a reconstruction.
    size
        As in `score`.

    Returns
    -------
    seen
        One image per row.
    made
        One image or several draws per row.
    size
        Height and width at which they are compared where a metric names no size of its own.
    rows
    notes
    """
    assert given.pictures is not None
    assert true.pictures is not None
    stimuli = true.pictures
    table = None if ids is None else read_ids_of_images(ids, stimuli)
    wanted = list(stimuli) if table is None else table["stimulus_id"].tolist()
    draws = _find_draws(given.pictures, stimuli, set(wanted))
    # Scoring only what was made would let a system choose its own test images.
    missing = [name for name in wanted if name not in draws]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} stimuli have no reconstruction, first {missing[0]!r}: a "
            "part of a test set is a different test set; add them, or give the tested ones as ids."
        )
    counts = {name: len(draws[name]) for name in wanted}
    # Scores are averaged over rounds of draws, and each round needs every image.
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise DataError(
            f"{few!r} has {counts[few]} reconstruction(s) and {many!r} has {counts[many]}; all stimuli "
            "need the same number."
        )
    if len(wanted) < 2:
        raise DataError("identification needs at least two images; give more.")
    files = [path for name in wanted for path in draws[name]]
    index = np.arange(len(files)).reshape(len(wanted), -1)
    made = ImageRows(files, index[:, 0] if index.shape[1] == 1 else index)
    seen = ImageRows([stimuli[name] for name in wanted], np.arange(len(wanted)))
    shape, notes = _choose_size(files, seen.source, size)
    if table is None or "concept" not in table:
        parents = [stimuli[name].parent.name for name in wanted]
        # Folders of concepts hold several images; one folder for all says nothing.
        concepts = parents if len(set(parents)) > 1 else wanted
        table = pd.DataFrame({"stimulus_id": wanted} if table is None else table).assign(concept=concepts)
    return seen, made, shape, OutputRows.make(table, len(wanted)), notes


def read_ids_of_images(source: Any, stimuli: Mapping[str, Path]) -> pd.DataFrame:
    """Return the table of tested stimuli, whose number is its own."""
    from braindecode_vis.parts.studies.output_files import read_given

    given = read_given(source, "the ids of the tested stimuli")
    n = len(given.about) if given.ids is not None else len(given)
    table = read_ids(source, n, "the tested stimuli")
    check_unique(table["stimulus_id"].tolist(), what="ids of tested stimuli")
    names = [_drop_suffix(name) if name not in stimuli else name for name in table["stimulus_id"]]
    check_known(np.array(names, dtype=object), np.array(list(stimuli), dtype=object))
    return table.assign(stimulus_id=names)


def _drop_suffix(name: str) -> str:
    return re.sub(r"\.(png|jpe?g|bmp|tiff?|webp|gif)$", "", name, flags=re.IGNORECASE)


def _find_draws(
    pictures: Mapping[str, Path], stimuli: Mapping[str, Path], wanted: set[str]
) -> dict[str, list[Path]]:
    """Return the reconstructions of each stimulus, in the order of their numbers."""
    numbered: dict[str, list[tuple[int, Path]]] = {}
    lost = []
    for name, path in pictures.items():
        found = _DRAW.fullmatch(name)
        # A stimulus may itself be called like a draw (cat_2), so whole names go first.
        if name in stimuli:
            numbered.setdefault(name, []).append((-1, path))
        elif found and found[1] in stimuli:
            numbered.setdefault(found[1], []).append((int(found[2]), path))
        else:
            lost.append(name)
    if lost:
        near = {_simplify(i): i for i in stimuli}.get(_simplify(lost[0]))
        hint = f" (is it {near!r}?)" if near else suggest(lost[0], list(stimuli)[:2000])
        raise DataError(
            f"{len(lost)} of {len(pictures)} reconstructions have no stimulus of the same name, first "
            f"{lost[0]!r}{hint}; name them like the stimuli."
        )
    return {name: [path for _, path in sorted(found)] for name, found in numbered.items() if name in wanted}


def _choose_size(
    made: Sequence[Path], seen: Sequence[Path], size: int | None
) -> tuple[tuple[int, int], list[str]]:
    """Return height and width at which images are compared, and what is changed for it."""
    of_made, of_seen = ({read_image_size(path) for path in files} for files in (made, seen))
    if size is not None:
        if not 4 <= size <= 1024:
            raise ConfigError(f"size is {size}, but must be between 4 and 1024 pixels.")
        shape = (size, size)
    elif (
        len(of_made) == 1
        and max(next(iter(of_made))) <= LARGEST_SIDE
        and (of_made == of_seen or len({*next(iter(of_made))}) == 1)
    ):
        shape = next(iter(of_made))
    else:
        shape = (LARGEST_SIDE, LARGEST_SIDE)
    changed = [
        f"{what} of {_say_sizes(sizes)}"
        for what, sizes in (("reconstructions", of_made), ("stimuli", of_seen))
        if sizes != {shape}
    ]
    if not changed:
        return shape, []
    return shape, [
        f"Resized to {shape[0]} x {shape[1]} pixels (centre square, Lanczos): {' and '.join(changed)}; metrics at 425 "
        "pixels and in features read them in full."
    ]


def _say_sizes(sizes: set[tuple[int, int]]) -> str:
    if len(sizes) == 1:
        height, width = next(iter(sizes))
        return f"{height} x {width}"
    return f"{len(sizes)} different sizes"
