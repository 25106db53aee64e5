"""The same parts bound otherwise: tests of composition that a user brings, and captions with words exchanged.

Owns the table of such tests: texts in which words changed places, and images that show the same parts. What a decoder
makes of them is the business of `braindecode_vis.scoring.protocol_scores`.

References
----------
Yuksekgonul et al. (2023), ARO, arXiv:2210.01936.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import DataError, check_columns, check_file, check_installed
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import NeededWeights, Settings
from braindecode_vis.embeddings.attribute_table import AttributeTable
from braindecode_vis.embeddings.caption_bank import read_text
from braindecode_vis.embeddings.sentence_encoder import (
    find_sentence_folder,
    hash_sentence_encoder,
    list_sentence_weights,
)


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

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder, if there is one."""
        return list_sentence_weights(self.encoder, "encoder")

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


# --- captions with parts exchanged -----------------------------------------------------------------------------
# Captions with exchanged words or relations: the same words describe another scene.
#
# Two rules, without any network: two words of one group (colours, sizes, people) change places, and what stands on
# both sides of a relation (``to the left of``, ``on``, ``behind``) does. ARO and NegCLIP pick words by a tagger of
# parts of speech instead; the groups here are short English lists, or the values of attributes that a user
# brings.
#
# References: Yuksekgonul, M. et al. (2023). When and why vision-language models behave like bags-of-words, and what
# to do about it. arXiv:2210.01936


#: Words of which each can stand in the place of another of its line.
ENGLISH = tuple(
    tuple(line.split())
    for line in (
        "red orange yellow green lime turquoise blue purple violet pink magenta brown beige white black grey gray "
        "golden silver",
        "large small big little huge tiny tall short long",
        "plain striped checked dotted zigzag plaid patterned",
        "wooden metal plastic glass stone leather paper",
        "old new young",
        "open closed",
        "empty full",
        "dark light bright",
        "wet dry",
        "one two three four five six",
        "man woman boy girl child baby person",
        "men women boys girls children people",
        "dog cat horse cow sheep bird elephant giraffe zebra bear",
    )
)
_RELATIONS = (
    r"(?:to|on) the (?:left|right) of|left of|right of|above|below|underneath|under|beneath|on top of|in front of"
    r"|behind|inside|on|in|over"
)
_RELATION = re.compile(rf"\b(?:{_RELATIONS})\b", re.IGNORECASE)
_END = re.compile(rf"[,.;:!?()]|\b(?:{_RELATIONS})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Swap:
    """The captions of an image after one exchange.

    Parameters
    ----------
    kind
        ``words`` or ``relations``.
    texts
        All captions of the image; those that lack the words are as they were.
    """

    kind: str
    texts: tuple[str, ...]


def find_groups(table: AttributeTable) -> tuple[tuple[str, ...], ...]:
    """Return the values of attributes as groups of words; attributes that share a value are one group."""
    groups: list[set[str]] = []
    for values in table.values.values():
        own = {value.replace("_", " ").lower() for value in values}
        for other in [group for group in groups if group & own]:
            groups.remove(other)
            own |= other
        groups.append(own)
    return tuple(tuple(sorted(group)) for group in groups if len(group) > 1)


def swap_captions(
    captions: Sequence[str], groups: Sequence[Collection[str]] = ENGLISH, *, limit: int | None = None
) -> list[Swap]:
    """Return the exchanges that the captions of one image allow, words before relations.

    What comes out as the image's captions were is left out.

    Parameters
    ----------
    captions
        Of one image.
    groups
        Words, or several in a row, that can take each other's place.
    limit
        At most so many; all if None.

    Examples
    --------
    >>> [swap.texts[0] for swap in swap_captions(["a red cube to the left of an orange ball"])]
    ['an orange cube to the left of a red ball', 'an orange ball to the left of a red cube']
    """
    found: list[Swap] = []
    for group in groups:
        pattern = re.compile(
            rf"\b(?:{'|'.join(map(re.escape, sorted(group, key=len, reverse=True)))})\b", re.I
        )
        words = dict.fromkeys(m.group().lower() for text in captions for m in pattern.finditer(text))
        for one, other in combinations(words, 2):
            if any({one, other} <= {m.group().lower() for m in pattern.finditer(text)} for text in captions):
                found.append(
                    Swap("words", tuple(_exchange_words(text, pattern, one, other) for text in captions))
                )
    for row, text in enumerate(captions):
        for turned in _turn_relations(text):
            found.append(Swap("relations", (*captions[:row], turned, *captions[row + 1 :])))
    known = {tuple(captions)}
    kept = []
    for swap in found:
        if swap.texts not in known and not set(swap.texts) <= set(captions):
            known.add(swap.texts)
            kept.append(swap)
    return kept[:limit]


def _exchange_words(text: str, pattern: re.Pattern[str], one: str, other: str) -> str:
    """Return a text in which two words change places, or the text itself if one of them is not in it."""
    found = [m for m in pattern.finditer(text) if m.group().lower() in (one, other)]
    if len({m.group().lower() for m in found}) < 2:
        return text
    out, end = "", 0
    for match in found:
        new = other if match.group().lower() == one else one
        out += _fit_article(text[end : match.start()], new)
        out += new.capitalize() if match.group()[0].isupper() else new
        end = match.end()
    return out + text[end:]


def _fit_article(before: str, word: str) -> str:
    """Return what stands before a word with the article that the word asks for."""
    article = re.search(r"\b([Aa])n?(\s+)$", before)
    if article is None:
        return before
    return (
        before[: article.start()] + article.group(1) + ("n" if word[0] in "aeiou" else "") + article.group(2)
    )


def _turn_relations(text: str) -> list[str]:
    """Return the text with both sides of each of its relations exchanged."""
    turned = []
    for match in _RELATION.finditer(text):
        ends = [m.end() for m in _END.finditer(text, 0, match.start())]
        start = ends[-1] if ends else 0
        after = _END.search(text, match.end())
        stop = len(text) if after is None else after.start()
        left, right = text[start : match.start()], text[match.end() : stop]
        # Something must stand on both sides that could be a thing.
        if len(left.strip()) < 2 or len(right.strip()) < 2:
            continue
        first, second = _fit_case(right.strip(), left.strip())
        lead, tail = left[: len(left) - len(left.lstrip())], right[len(right.rstrip()) :]
        turned.append(f"{text[:start]}{lead}{first} {match.group()} {second}{tail}{text[stop:]}")
    return turned


def _fit_case(first: str, second: str) -> tuple[str, str]:
    """Return two parts of a sentence, now in this order, with the capital letter where it was."""
    if second[0].isupper() and first[0].islower():
        return first[0].upper() + first[1:], second[0].lower() + second[1:]
    return first, second
