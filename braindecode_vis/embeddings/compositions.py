"""Reads tests of composition from a user's table: the content of an image, and the same parts in another combination.

Owns the table of such tests: texts in which words changed places, and images that show the same parts. What a decoder
makes of them is the business of `braindecode_vis.scoring.protocol_scores`.

References
----------
Yuksekgonul et al. (2023), ARO, arXiv:2210.01936.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import DataError, check_columns, check_file, check_installed
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import Settings
from braindecode_vis.embeddings.caption_bank import read_text
from braindecode_vis.embeddings.sentence_encoder import find_sentence_folder, hash_sentence_encoder


class CompositionConfig(Settings):
    """Tests of composition for the protocol of that name.

    Parameters
    ----------
    file
        CSV file with the column ``id`` (a tested image) and ``caption`` and ``swapped`` (its caption, and the same
        words for another scene), ``partner`` (the id of a tested image with the same parts), or all three; ``kind``
        says what was exchanged. The phantom writes one (``phantom_truth/composition.csv``). Several rows of one image
        are several tests.
    encoder
        How texts are mapped into the space of the decoder. None takes the encoder's own head for sentences (objectives
        `composition` and `sentence_contrast`), or else the text encoder of the target, and leaves texts out if there is
        neither. ``minilm``, or the folder of a sentence encoder, is a ridge regression from the sentence vectors of the
        captions of training images, which the file then has too.
    """

    file: Path
    encoder: Literal["minilm"] | Path | None = Field(default=None, union_mode="left_to_right")

    not_hashed: ClassVar[frozenset[str]] = frozenset({"file", "encoder"})

    @property
    def folder(self) -> Path | None:
        """Folder of the sentence encoder; None without one."""
        if self.encoder is None:
            return None
        return find_sentence_folder(self.encoder, "evaluation.composition.encoder")

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the tests can be read and there are weights."""
        read_compositions(self.file.expanduser())
        if self.folder is not None:
            check_installed("transformers", "evaluation.composition.encoder")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the digests of the tests and of the sentence encoder."""
        encoder = None if self.folder is None else hash_sentence_encoder(self.folder)
        return {
            **super().hashed_fields(),
            "file_digest": hash_once(self.file.expanduser()),
            "encoder": encoder,
        }


@dataclass(frozen=True)
class CompositionTest:
    """One test of one image.

    Parameters
    ----------
    name
        Id of the image.
    kind
        What changed places; empty if the table does not say.
    caption, swapped
        What it shows, and the same words of another scene; empty without texts.
    partner
        Id of the image of the same parts; empty without.
    """

    name: str
    kind: str = ""
    caption: str = ""
    swapped: str = ""
    partner: str = ""

    @property
    def pair(self) -> str:
        """Name of what image and partner, or caption and swapped caption, have in common."""
        return " | ".join(sorted([self.name, self.partner] if self.partner else [self.caption, self.swapped]))


def read_compositions(path: Path) -> list[CompositionTest]:
    """Return the tests of a table; see `CompositionConfig`.

    Raises
    ------
    DataError
        If columns or cells are missing, a row says nothing else than its image, or its two sides are the same.
    """
    what = f"the tests of composition {path}"
    check_file(
        path, what="the file of evaluation.composition", hint="give a CSV file with id, caption, swapped"
    )
    reader = csv.DictReader(io.StringIO(read_text(path, what=what), newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"{what} are no CSV file after line {reader.line_num} ({error}); save it again."
        ) from error
    check_columns(columns, ["id"], what=what)
    if not {"caption", "swapped"} <= set(columns) and "partner" not in columns:
        raise DataError(
            f"{what} have the columns {', '.join(columns)}; they need caption and swapped (texts), or partner (images)."
        )
    tests = []
    for line, row in rows:
        if None in row:
            raise DataError(
                f"{path} has more fields than columns in line {line}; put captions with commas into quotes."
            )
        name, kind, caption, swapped, partner = (
            (row.get(key) or "").strip() for key in ("id", "kind", "caption", "swapped", "partner")
        )
        if not name or bool(caption) != bool(swapped) or not (caption or partner):
            raise DataError(
                f"{path} is missing an id, one of caption and swapped, or both of them and a partner in line {line}; "
                "fill it in or drop the line."
            )
        if (caption and caption == swapped) or name == partner:
            raise DataError(
                f"{path} compares {name!r} with itself in line {line}; its two sides must differ."
            )
        tests.append(CompositionTest(name, kind, caption, swapped, partner))
    if not tests:
        raise DataError(f"{what} hold no row.")
    return tests


def pick_tests(tests: Sequence[CompositionTest], ids: Sequence[str], *, path: Path) -> list[CompositionTest]:
    """Return the tests of tested images, in the order of the table.

    Raises
    ------
    DataError
        If there is none, or the partner of a tested image is not tested.
    """
    tested = set(ids)
    picked = [test for test in tests if test.name in tested]
    if not picked:
        raise DataError(
            f"{path} names none of the {len(tested)} tested images (its first is {tests[0].name!r}, the first tested "
            f"one {sorted(tested)[0]!r}); it belongs to another data set."
        )
    for test in picked:
        if test.partner and test.partner not in tested:
            raise DataError(
                f"{path} compares {test.name!r} with {test.partner!r}, which is not among the {len(tested)} tested "
                "images; correct the id or leave it empty."
            )
    return picked
