"""Captions with exchanged words or relations: the same words describe another scene.

Two rules, without any network: two words of one group (colours, sizes, people) change places, and what stands on both
sides of a relation (``to the left of``, ``on``, ``behind``) does. ARO and NegCLIP pick words by a tagger of parts of
speech instead [1]_; the groups here are short English lists, or the values of attributes that a user brings.

References
----------
.. [1] Yuksekgonul, M. et al. (2023). When and why vision-language models behave like bags-of-words, and what to do
   about it. arXiv:2210.01936
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

from braindecode_vis.embeddings.attribute_table import AttributeTable

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
