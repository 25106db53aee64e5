"""Metrics that compare captions with reference captions.

Owns ROUGE-1 and ROUGE-L, the exact-match part of METEOR, and similarity by `embeddings.sentence_encoder`. Words are
runs of letters and digits, lower case, without stemming. METEOR as published also matches stems and synonyms of
WordNet; ``meteor_exact`` does not, so it is lower and has a name of its own. With several references the best counts.
Captions are read by `braindecode_vis.embeddings.caption_bank`, and decoded by `braindecode_vis.generation.captions`.

References
----------
Lin (2004), ROUGE, ACL W04-1013. Banerjee and Lavie (2005), METEOR, ACL W05-0909; parameters (0.9, 3, 0.5) of Lavie and
Agarwal (2007), ACL W07-0734.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings.sentence_encoder import SentenceEncoder

METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.9, 3.0, 0.5  # Lavie and Agarwal (2007), fitted to English


# --- words in common ------------------------------------------------------------------------------------------


def tokenize(text: str) -> list[str]:
    """Return the words of a text.

    Examples
    --------
    >>> tokenize("A dog's 2nd bone.")
    ['a', 'dog', 's', '2nd', 'bone']
    """
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_1(reference: str, candidate: str) -> float:
    """Return the F1 of words in common, each as often as both have it.

    Examples
    --------
    >>> rouge_1("a dog on the grass", "the dog") == 2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5)
    True
    """
    left, right = tokenize(reference), tokenize(candidate)
    return _f1(sum((Counter(left) & Counter(right)).values()), len(left), len(right))


def rouge_l(reference: str, candidate: str) -> float:
    """Return the F1 of the longest common subsequence of words.

    Examples
    --------
    >>> round(rouge_l("a cat and a dog", "a dog and a cat"), 3)
    0.6
    """
    left, right = tokenize(reference), tokenize(candidate)
    return _f1(_measure_subsequence(left, right), len(left), len(right))


def meteor_exact(reference: str, candidate: str) -> float:
    """Return METEOR with exact matches only.

    With m matched words, P = m / words of the candidate and R = m / words of the reference, the score is
    P R / (0.9 P + 0.1 R) times 1 - 0.5 (chunks / m)^3, where a chunk is a run of matched words adjacent in both. Words
    are matched by taking the longest common run again and again, which matches as many words as can be and keeps chunks
    few (not always fewest).

    Examples
    --------
    >>> meteor_exact("a black cat", "a black cat") == 1 - 0.5 / 27
    True
    """
    left, right = tokenize(reference), tokenize(candidate)
    n_matches, n_chunks = _match_runs(left, right)
    if not n_matches:
        return 0.0
    precision, recall = n_matches / len(right), n_matches / len(left)
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    return mean * (1 - METEOR_GAMMA * (n_chunks / n_matches) ** METEOR_BETA)


def _f1(n_common: int, n_left: int, n_right: int) -> float:
    if not n_common:
        return 0.0
    precision, recall = n_common / n_right, n_common / n_left
    return 2 * precision * recall / (precision + recall)


def _measure_subsequence(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)  # one row of the table of lengths is enough, filled in place
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _match_runs(left: list[str], right: list[str]) -> tuple[int, int]:
    """Return matched words and chunks, taking the longest run of unmatched words common to both first."""
    free_left, free_right = [True] * len(left), [True] * len(right)
    places: list[tuple[int, int]] = []
    while True:
        best, ends = 0, (0, 0)
        lengths = [0] * (len(right) + 1)
        for i, word in enumerate(left):
            before = lengths
            lengths = [0] * (len(right) + 1)
            for j, other in enumerate(right):
                if word == other and free_left[i] and free_right[j]:
                    lengths[j + 1] = before[j] + 1
                    if lengths[j + 1] > best:
                        best, ends = lengths[j + 1], (i, j)
        if not best:
            break
        for step in range(best):
            free_left[ends[0] - step] = free_right[ends[1] - step] = False
            places.append((ends[0] - step, ends[1] - step))
    places.sort(key=lambda place: place[1])  # in the order of the candidate, chunks are runs of both
    breaks = sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in pairwise(places))
    return len(places), breaks + bool(places)


# --- scores -------------------------------------------------------------------------------------------------------

_WORD_METRICS: dict[str, Callable[[str, str], float]] = {
    "rouge1": rouge_1,
    "rougeL": rouge_l,
    "meteor_exact": meteor_exact,
}


def compute_caption_metrics(
    references: Sequence[Sequence[str]], candidates: Sequence[str], *, encoder: SentenceEncoder | None = None
) -> dict[str, np.ndarray]:
    """Return each caption metric for each candidate, the best over its references.

    Parameters
    ----------
    references : sequence of length n_items
        One or several captions of what was seen.
    candidates : sequence of length n_items
        The decoded caption.
    encoder
        Adds ``sentence_similarity``, the cosine of sentence vectors.

    Returns
    -------
    dict
        ``rouge1``, ``rougeL``, ``meteor_exact`` and perhaps ``sentence_similarity`` to an array of shape (n_items,).

    Raises
    ------
    DataError
        If the numbers differ or an item has no reference.
    """
    if len(references) != len(candidates) or not len(candidates) or not all(len(r) for r in references):
        raise DataError(
            f"{len(candidates)} captions cannot be compared with {len(references)} lists of references; every item "
            "needs at least one."
        )
    values = {
        name: np.array(
            [
                max(metric(r, text) for r in several)
                for several, text in zip(references, candidates, strict=True)
            ]
        )
        for name, metric in _WORD_METRICS.items()
    }
    if encoder is not None:
        flat = [text for several in references for text in several]
        owner = np.repeat(np.arange(len(references)), [len(several) for several in references])
        left, right = encoder.encode(flat), encoder.encode(candidates)
        cosines = np.einsum("ij,ij->i", left.astype(np.float64), right[owner].astype(np.float64))
        best = np.full(len(candidates), -np.inf)  # the closest of several references counts, as for words
        np.maximum.at(best, owner, cosines)
        values["sentence_similarity"] = best
    return values


def tabulate_captions(
    references: Sequence[Sequence[str]],
    candidates: Sequence[str],
    *,
    wanted: np.ndarray | None = None,
    encoder: SentenceEncoder | None = None,
) -> dict[str, np.ndarray]:
    """Return what each caption metric would be if each stimulus were the one that was seen.

    Parameters
    ----------
    references : sequence of length n_stimuli
        One or several captions of each stimulus.
    candidates : sequence of length n_items
        The decoded caption; equal ones are compared once.
    wanted : bool array of shape (n_items, n_stimuli), optional
        Which pairs are needed; the others may be 0.
    encoder
        As for `compute_caption_metrics`.

    Returns
    -------
    dict
        The metrics of `compute_caption_metrics` to arrays of shape (n_items, n_stimuli).

    Examples
    --------
    >>> tabulate_captions([["a red car"], ["a cat"]], ["a car"])["rouge1"].tolist()
    [[0.8, 0.5]]
    """
    texts, place = np.unique(np.asarray(candidates, dtype=str), return_inverse=True)
    asked = np.ones((len(candidates), len(references)), bool) if wanted is None else wanted
    pairs = np.zeros((len(texts), len(references)), bool)  # what any item with that text asks for
    np.logical_or.at(pairs, place, asked)
    tables = {name: np.zeros(pairs.shape) for name in _WORD_METRICS}
    for text, stimulus in zip(*np.nonzero(pairs), strict=True):
        for name, metric in _WORD_METRICS.items():
            tables[name][text, stimulus] = max(metric(r, texts[text]) for r in references[stimulus])
    if encoder is not None:
        flat = [text for several in references for text in several]
        starts = np.cumsum([0, *(len(several) for several in references)])[:-1]
        left, right = (encoder.encode(list(some)).astype(np.float64) for some in (texts, flat))
        # (n_texts, n_references), then the closest reference of each stimulus.
        tables["sentence_similarity"] = np.maximum.reduceat(left @ right.T, starts, axis=1)
    return {name: table[place] for name, table in tables.items()}
