"""Reads attributes of images or concepts from a user's table: shape, colour, background, animacy.

Owns reading the file and finding the row of each image. Values are texts, an empty cell is unknown. What is learnt from
them is the business of `braindecode_vis.embeddings.conditional` and of objectives.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_file, check_unique, suggest
from braindecode_vis.embeddings.caption_bank import read_text

KEYS = ("id", "concept")
UNKNOWN = -1


@dataclass(frozen=True)
class AttributeTable:
    """Attributes by image or by concept.

    Parameters
    ----------
    key
        What a row is of: the ``id`` of an image, or a ``concept``.
    names
        Attributes in the order of the file.
    values
        Distinct values of each attribute, sorted; a code is a position among them.
    codes
        int64 of shape (n_rows, n_attributes), -1 where a value is unknown.
    rows
        Row of each id or concept.
    """

    key: Literal["id", "concept"]
    names: tuple[str, ...]
    values: dict[str, tuple[str, ...]]
    codes: np.ndarray
    rows: dict[str, int]

    def codes_of(self, ids: Sequence[str], concepts: Sequence[str] | None) -> np.ndarray:
        """Return the codes of images, int64 of shape (n_images, n_attributes), -1 where row or value is missing.

        Parameters
        ----------
        ids, concepts
            Of the images, in their order; only those of the table's key are looked at, so that concepts may be None
            where the table is of ids.
        """
        found = np.array(
            [self.rows.get(name, UNKNOWN) for name in self._choose(ids, concepts)], dtype=np.int64
        )
        codes = np.full((len(found), len(self.names)), UNKNOWN, dtype=np.int64)
        codes[found >= 0] = self.codes[found[found >= 0]]
        return codes

    def describe_missing(self, ids: Sequence[str], concepts: Sequence[str] | None, *, what: str) -> str:
        """Return one sentence about images without a row, an empty text if all have one.

        Parameters
        ----------
        ids, concepts
            As for `codes_of`.
        what
            The table in words, for example ``the attributes FILE``.
        """
        return describe_missing(self._choose(ids, concepts), self.rows, self.key, what=what)

    def find(self, name: str, *, what: str = "the table") -> int:
        """Return the position of an attribute; `what` is the table in words.

        Raises
        ------
        DataError
            If the table has no such attribute.
        """
        if name not in self.names:
            raise DataError(
                f"there is no attribute {name!r} in {what}, which has {', '.join(self.names)}"
                f"{suggest(name, self.names)}."
            )
        return self.names.index(name)

    def choose(self, names: Sequence[str], *, what: str = "the table") -> AttributeTable:
        """Return a table of some attributes, in the order of `names`; see `find`."""
        columns = [self.find(name, what=what) for name in names]
        values = {name: self.values[name] for name in names}
        return AttributeTable(self.key, tuple(names), values, self.codes[:, columns], self.rows)

    def _choose(self, ids: Sequence[str], concepts: Sequence[str] | None) -> list[str]:
        if self.key == "concept" and concepts is None:
            raise DataError(
                "the attributes are of concepts, but the images have no concept; use a table with the column id."
            )
        return [str(name) for name in (ids if self.key == "id" or concepts is None else concepts)]


def describe_missing(wanted: Sequence[str], known: Collection[str], key: str, *, what: str) -> str:
    """Return one sentence about entries without a row in a table, an empty text if all have one.

    Parameters
    ----------
    wanted
        Names of images or concepts.
    known
        Names of the rows, in their order.
    key
        ``id`` or ``concept``: which of the two they are.
    what
        The table in words, in the plural.
    """
    distinct = sorted(set(wanted))
    missing = [name for name in distinct if name not in known]
    if not missing:
        return ""
    kind = "images" if key == "id" else "concepts"
    if len(missing) == len(distinct):
        return (
            f"{what} have none of the {len(distinct)} {kind} (needed {missing[0]!r}, their first is "
            f"{next(iter(known))!r}); they belong to another data set."
        )
    return f"{what} have none for {len(missing)} of {len(distinct)} {kind}, first {missing[0]!r}; add them."


def read_attributes(path: Path) -> AttributeTable:
    """Return the attributes of a table with the column ``id`` or ``concept`` and a column for each attribute.

    Parameters
    ----------
    path
        CSV file in UTF-8, or in UTF-16 with its mark. Values are texts; blanks around them do not count, and an empty
        cell is unknown.

    Raises
    ------
    DataError
        If the file or its key is missing, a row comes twice or is too long, or an attribute has no value at all.
    """
    what = f"the attributes {path}"
    check_file(path, what="the table of attributes", hint="give a CSV file with the column id or concept")
    reader = csv.reader(io.StringIO(read_text(path, what="the table of attributes"), newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{what} are no CSV file after line {reader.line_num} ({error}); close its quotes and save it again."
        ) from error
    lines = [(number, row) for number, row in lines if any(row)]
    columns = lines[0][1] if lines else []
    keys = [name for name in KEYS if name in columns]
    if len(keys) != 1:
        raise DataError(
            f"{what} need one column id (of images) or concept, and have {', '.join(filter(None, columns)) or 'none'}"
            f"{'; drop one of the two' if keys else ''}."
        )
    if "" in columns:
        raise DataError(f"{what} have no name for column {columns.index('') + 1}; name it or drop it.")
    check_unique(columns, what=f"the columns of {what}")
    key = columns.index(keys[0])
    names = tuple(name for name in columns if name != keys[0])
    if not names or len(lines) < 2:
        raise DataError(f"{what} hold no {'attribute beside ' + keys[0] if not names else 'row'}.")
    for number, row in lines[1:]:
        if len(row) != len(columns):
            raise DataError(
                f"{what} have {len(row)} fields in line {number}, but {len(columns)} columns; put values with commas "
                "into quotes."
            )
        if not row[key]:
            raise DataError(
                f"{what} are missing the {keys[0]} in line {number}; fill it in or drop the line."
            )
    table = [row for _, row in lines[1:]]
    check_unique([row[key] for row in table], what=f"the column {keys[0]} of {what}")
    values, codes = {}, np.full((len(table), len(names)), UNKNOWN, dtype=np.int64)
    for position, name in enumerate(names):
        column = [row[columns.index(name)] for row in table]
        values[name] = tuple(sorted(set(column) - {""}))
        if not values[name]:
            raise DataError(f"{what} have no value of {name!r} in any row; fill the column in or drop it.")
        numbers = {value: number for number, value in enumerate(values[name])}
        codes[:, position] = [numbers.get(value, UNKNOWN) for value in column]
    rows = {row[key]: number for number, row in enumerate(table)}
    return AttributeTable("id" if keys[0] == "id" else "concept", names, values, codes, rows)
