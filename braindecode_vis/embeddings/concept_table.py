"""Published dimensions of concepts as a target: a file with a row of numbers for each concept, such as those of THINGS.

Owns the layouts of such files and matching their rows with stimuli. Nothing is learnt and no image is looked at. How
well each dimension is decoded is the business of `braindecode_vis.scoring.target_scores`.

References
----------
Hebart et al. (2020), Nature Human Behaviour, doi:10.1038/s41562-020-00951-3: 49 dimensions. Hebart et al. (2023),
eLife, doi:10.7554/eLife.82580: 66 dimensions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError, check_file, check_unique
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.attribute_table import KEYS, TargetParts, describe_missing
from braindecode_vis.embeddings.caption_bank import read_text
from braindecode_vis.embeddings.text import refuse_pictures


class ConceptTableConfig(ImageEncoderSettings):
    """Numbers of concepts (or images) from a file as a target, decoded and scored dimension by dimension.

    Parameters
    ----------
    file
        ``.csv`` or ``.tsv`` with the column ``concept`` (or ``id``) and a column of numbers for each dimension; or an
        array without names, ``.npy`` or numbers in a ``.txt``, as the 49 and the 66 dimensions of THINGS are published.
    concepts
        For an array, a text file with the concept of each row, one per line.
    dimensions
        For an array, a text file with the name of each dimension, one per line; by default they are numbered.
    """

    kind: Literal["concept_table"] = "concept_table"
    file: Path
    concepts: Path | None = None
    dimensions: Path | None = None

    not_hashed: ClassVar[frozenset[str]] = frozenset({"file", "concepts", "dimensions"})

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        named = self.file.suffix.lower() in (".csv", ".tsv")
        if named and (self.concepts is not None or self.dimensions is not None):
            raise ValueError(
                "concepts and dimensions are for arrays, but a table has names in its header; leave them out"
            )
        if not named and self.file.suffix.lower() not in (".npy", ".txt"):
            raise ValueError(
                f"file is {self.file.name}, and must be a .csv or .tsv with names, or a .npy or .txt"
            )
        if not named and self.concepts is None:
            raise ValueError(f"{self.file.name} holds no names; give the concept of each row with concepts")
        return self

    def check_files(self) -> None:
        """Raise `DataError` unless the table can be read."""
        read_concept_table(self)

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the files."""
        return {**super().hashed_fields(), "files_digest": self._digest()}

    def _digest(self) -> str:
        files = [self.file, self.concepts, self.dimensions]
        for path in files:
            if path is not None:
                check_file(path.expanduser(), what="the file of the target", hint="correct target.file")
        return hash_json([None if path is None else hash_once(path.expanduser()) for path in files])

    def name_space(self) -> str:
        """Return the name of the space, with the digest of the files."""
        return f"concept_table/{self.file.stem}/files={self._digest()[:12]}"

    def list_parts(self, stimuli: StimulusSet) -> TargetParts:
        """Return the names of the dimensions; see `attributes.TargetParts`."""
        return TargetParts(read_concept_table(self).names)

    def build(self) -> ConceptTableEncoder:
        """Return the encoder; the file is read when the stimuli come."""
        return ConceptTableEncoder(self)


@dataclass(frozen=True)
class ConceptTable:
    """Numbers by concept.

    Parameters
    ----------
    key
        ``concept``, or ``id`` where rows are of images.
    names
        Dimensions.
    values
        float32 of shape (n_rows, n_dimensions).
    rows
        Row of each concept.
    """

    key: str
    names: tuple[str, ...]
    values: np.ndarray
    rows: dict[str, int]


class ConceptTableEncoder(ImageEncoder):
    """Rows of a table in the place of an image encoder's vectors."""

    def __init__(self, config: ConceptTableConfig) -> None:
        self.config = config

    @property
    def space(self) -> str:
        """Name with file and digest."""
        return self.config.name_space()

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Refuse: the concept of a picture is not known."""
        raise refuse_pictures("concept_table", "knows concepts")

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Callable[..., Any]
    ) -> Embeddings:
        """Return the row of each stimulus's concept; see `contracts.ImageEncoder.embed`.

        Raises
        ------
        DataError
            If a concept has no row, or no dimension varies among the training images.
        """
        table = read_concept_table(self.config)
        names = (stimuli.ids if table.key == "id" else stimuli.concepts_of(stimuli.ids)).astype(str)
        file = f"the rows of {self.config.file}"
        if missing := describe_missing(names.tolist(), table.rows, table.key, what=file):
            raise DataError(missing)
        vectors = table.values[[table.rows[name] for name in names]]
        trained = vectors[stimuli.find_rows(training_ids)]
        if not np.ptp(trained, axis=0).any():
            raise DataError(
                f"no dimension of {self.config.file} varies among the {len(trained)} training images, so that nothing "
                "can be learnt; train on images of several concepts."
            )
        return Embeddings(vectors, np.asarray(stimuli.ids, dtype=object), self.space)


def read_concept_table(config: ConceptTableConfig) -> ConceptTable:
    """Return the numbers that the settings of a target name.

    Raises
    ------
    DataError
        If a file is missing or damaged, names repeat or are too few, or a value is no number.
    """
    path = config.file.expanduser()
    check_file(path, what="the table of concepts", hint="correct target.file")
    if config.concepts is None:
        return _read_named(path)
    rows = _read_names(config.concepts, "target.concepts")
    try:
        values = (
            np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else np.loadtxt(path, ndmin=2)
        )
        values = np.asarray(values, dtype=np.float32)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no array of numbers ({error}); use the published file.") from error
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(f"{path} has the shape {values.shape}; a row for each concept is expected.")
    names = (
        [f"dimension {number}" for number in range(1, values.shape[1] + 1)]
        if config.dimensions is None
        else _read_names(config.dimensions, "target.dimensions")
    )
    for listed, n, what in ((rows, values.shape[0], "concepts"), (names, values.shape[1], "dimensions")):
        if len(listed) != n:
            raise DataError(
                f"target.{what} names {len(listed)} {what}, but {path} has {n}; the two files belong to "
                "different releases."
            )
    return _check_table("concept", names, rows, values, path)


def _read_names(path: Path, setting: str) -> list[str]:
    check_file(path.expanduser(), what=f"the file of {setting}", hint="write one name per line")
    lines = read_text(path.expanduser(), what=f"the file of {setting}").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_named(path: Path) -> ConceptTable:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        text = io.StringIO(read_text(path, what="the table of concepts"), newline="")
        lines = [[cell.strip() for cell in row] for row in csv.reader(text, delimiter=delimiter, strict=True)]
    except csv.Error as error:
        raise DataError(f"{path} is no table ({error}); save it again.") from error
    lines = [row for row in lines if any(row)]
    columns = lines[0] if lines else []
    keys = [name for name in KEYS if name in columns]
    if len(keys) != 1 or len(columns) < 2 or len(lines) < 2:
        raise DataError(
            f"{path} needs one column concept (or id), columns of numbers and a row for each concept; it has "
            f"{len(lines[1:])} rows and the columns {', '.join(columns) or 'none'}."
        )
    place = columns.index(keys[0])
    values = np.empty((len(lines) - 1, len(columns) - 1), np.float32)
    for number, row in enumerate(lines[1:]):
        try:
            if len(row) != len(columns):
                raise ValueError(f"{len(row)} fields instead of {len(columns)}")
            values[number] = [float(cell) for position, cell in enumerate(row) if position != place]
        except ValueError as error:
            name = row[place] if place < len(row) else f"row {number + 1}"
            raise DataError(
                f"{path} does not hold a number for every dimension of {name!r} ({error}); fill it in."
            ) from error
    rows = [row[place] for row in lines[1:]]
    return _check_table(keys[0], [name for name in columns if name != keys[0]], rows, values, path)


def _check_table(key: str, names: list[str], rows: list[str], values: np.ndarray, path: Path) -> ConceptTable:
    check_unique(names, what=f"the dimensions of {path}")
    check_unique(rows, what=f"the rows of {path}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(f"{path} has no number for {names[column]!r} of {rows[row]!r}; fill it in.")
    return ConceptTable(key, tuple(names), values, {name: number for number, name in enumerate(rows)})
