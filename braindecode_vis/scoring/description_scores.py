"""Retrieval by description: candidates are texts in place of images, and both rankings together.

Owns how two rankings of one gallery are fused, how the weight of texts is chosen on training images, and the rows of
the table of scores. Queries, images and texts come in one space; how texts get there is the business of
`braindecode_vis.embeddings.image_descriptions`.

References
----------
Cormack, Clarke and Buettcher (2009), Reciprocal rank fusion, doi:10.1145/1571941.1572114. LexiCLIP, whose code is not
public: captions take the place of images in the gallery.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.scoring.gallery_scores import score_values
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.retrieval import Retrieval, compute_similarity, rank_similarities
from braindecode_vis.scoring.units import Units

TOP = (1, 5)
DAMPING = 60  # of reciprocal ranks, as in the paper
WEIGHTS = np.round(np.linspace(0, 1, 21), 2)
FEWEST_HELD_OUT = 10  # images on which a weight can be chosen
_BLOCK = 512
IMAGES, TEXTS, BY_RANKS, WEIGHTED = "images", "descriptions", "fused-ranks", "fused-weighted"
BY_HEAD = "sentences"


@dataclass(frozen=True)
class DescriptionTask:
    """Queries of one part of a fold, and the same gallery twice.

    Parameters
    ----------
    queries : Embeddings of n_queries rows
        Predictions as they are compared.
    texts : Embeddings of n_gallery rows
        Descriptions of the candidates.
    images : Embeddings of n_gallery rows, optional
        The candidates themselves, in the order of `texts`; None if the target knows texts alone.
    true : Embeddings, optional
        Embeddings of the images of the queries, what a perfect decoder would predict.
    weight
        Of texts in the weighted fusion; None leaves it out.
    sentences : pair of Embeddings, optional
        What a network predicts in the space of a sentence encoder, in the order of `queries`, and the vectors that this
        gives of the descriptions, in the order of `texts`.
    """

    queries: Embeddings
    texts: Embeddings
    images: Embeddings | None = None
    true: Embeddings | None = None
    weight: float | None = None
    sentences: tuple[Embeddings, Embeddings] | None = None


def fuse_ranks(*similarities: np.ndarray) -> np.ndarray:
    """Return the sum of reciprocal ranks, each damped by 60, of several rankings; equal similarities share their ranks.

    Parameters
    ----------
    similarities : arrays of shape (n_queries, n_gallery)

    Examples
    --------
    >>> fuse_ranks(np.array([[0.9, 0.1, 0.5]]), np.array([[0.2, 0.1, 0.8]])).round(4).tolist()
    [[0.0325, 0.0317, 0.0325]]
    """
    from scipy.stats import rankdata

    total: np.ndarray = sum(1 / (DAMPING + rankdata(-table, axis=1)) for table in similarities)
    # Sums in another order differ in the last bit, and equal candidates must tie.
    return total.round(12)


def fuse_weighted(images: np.ndarray, texts: np.ndarray, weight: float) -> np.ndarray:
    """Return the weighted sum of two rankings, each standardised over the gallery of every query.

    Parameters
    ----------
    images, texts : arrays of shape (n_queries, n_gallery)
        Similarities.
    weight
        Of `texts`, from 0 to 1; 0 and 1 leave the order of one of them.

    Examples
    --------
    >>> fuse_weighted(np.array([[1.0, 2, 3]]), np.array([[30.0, 20, 10]]), 0.25).argmax()
    np.int64(2)
    """
    fused: np.ndarray = (1 - weight) * _standardise(images) + weight * _standardise(texts)
    return fused


def _standardise(table: np.ndarray) -> np.ndarray:
    table = table.astype(np.float64)
    table = table - table.mean(axis=1, keepdims=True)
    spread = table.std(axis=1, keepdims=True)
    return table / np.where(spread > 0, spread, 1.0)


def choose_weight(images: np.ndarray, texts: np.ndarray, truth: np.ndarray) -> float:
    """Return the weight of texts with the highest mean reciprocal rank, among equals the nearest to one half.

    Parameters
    ----------
    images, texts : arrays of shape (n_queries, n_gallery)
        Similarities of held-out training trials to their images, and to descriptions of these.
    truth : int array of shape (n_queries,)
        Column of the true image.
    """
    found = []
    for weight in WEIGHTS:
        fused = fuse_weighted(images, texts, float(weight))
        own = np.take_along_axis(fused, truth[:, None], axis=1)
        above, tied = (fused > own).sum(axis=1), (fused == own).sum(axis=1) - 1
        found.append((float((1 / (1 + above + tied / 2)).mean()), -abs(float(weight) - 0.5)))
    return float(WEIGHTS[max(range(len(found)), key=found.__getitem__)])


def rank_by_descriptions(task: DescriptionTask) -> Iterator[tuple[str, Retrieval]]:
    """Yield the name of each ranking, and the ranks of a block of queries in it, block by block."""
    for start in range(0, len(task.queries), _BLOCK):
        rows = slice(start, start + _BLOCK)
        queries = task.queries.take(rows)
        for name, table in _tabulate(queries, task, rows).items():
            yield name, rank_similarities(table, queries.ids, task.texts.ids, n_top=0)


def _tabulate(queries: Embeddings, task: DescriptionTask, rows: slice) -> dict[str, np.ndarray]:
    texts, by_head = compute_similarity(queries, task.texts), {}
    if task.sentences is not None:
        said, known = task.sentences
        by_head[BY_HEAD] = compute_similarity(said.take(rows), known)
    if task.images is None:
        return {TEXTS: texts, **by_head}
    images = compute_similarity(queries, task.images)
    found = by_head | {IMAGES: images, TEXTS: texts, BY_RANKS: fuse_ranks(images, texts)}
    if task.weight is not None:
        found[WEIGHTED] = fuse_weighted(images, texts, task.weight)
    return found


def score_descriptions(
    tasks: Sequence[DescriptionTask],
    subjects: np.ndarray,
    *,
    protocol: str,
    split: str,
    seed: int,
    n_bootstrap: int,
    units: Units | None = None,
    over_folds: bool = False,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Return scores of retrieval by images, by descriptions and by both, and what each of the latter adds to images.

    Parameters
    ----------
    tasks
        Parts whose queries, in this order, are the rows below.
    subjects : array of shape (n_rows,)
        Subject of each query.
    protocol, split, seed, n_bootstrap, units, over_folds
        As in `scoring_task.ScoringTask`.

    Returns
    -------
    scores
        ``top1@images``, ``top1@descriptions``, ``top1@fused-ranks``, ``top1@fused-weighted`` and further metrics;
        ``top1@sentences`` is that of descriptions by the network's own head into a sentence space. Of method
        ``oracle``: what the true embeddings would find among descriptions, a ceiling of the texts.
    differences
        Paired differences to retrieval by images, with intervals; see `scoring_task.ScoredGroup.compare`.
    """
    ids = np.concatenate([task.queries.ids.astype(str) for task in tasks])
    sizes = np.concatenate([np.full(len(task.queries), len(task.texts)) for task in tasks])
    tabulate = partial(
        score_values, subjects=subjects, ids=ids, sizes=sizes, units=units, protocol=protocol, split=split, seed=seed,
        n_bootstrap=n_bootstrap, over_folds=over_folds,
    )  # fmt: skip
    values: dict[str, list[np.ndarray]] = {}
    oracle: dict[str, list[np.ndarray]] = {}
    names = [f"top{k}" for k in TOP if k < sizes.min()]
    names += ["2_way"] if sizes.min() > 1 else []
    for task in tasks:
        perfect = (
            None
            if task.true is None
            else DescriptionTask(task.true.select(list(task.queries.ids)), task.texts)
        )
        for held, one in ((values, task), (oracle, perfect)):
            for label, ranked in () if one is None else rank_by_descriptions(one):
                for name in names:
                    metric, n, *_ = find_metric(name)
                    assert metric.compare is not None
                    held.setdefault(f"{name}@{label}", []).append(metric.compare(ranked, n).astype(float))
    every = {name: np.concatenate(parts) for name, parts in values.items()}
    scores = tabulate(every)
    perfect_every = {name: np.concatenate(parts) for name, parts in oracle.items()}
    scores += tabulate(perfect_every, method="oracle")
    differences = []
    for name in names if f"{names[0]}@{IMAGES}" in every else ():
        for label in (TEXTS, BY_HEAD, BY_RANKS, WEIGHTED):
            if f"{name}@{label}" in every:
                gain = every[f"{name}@{label}"] - every[f"{name}@{IMAGES}"]
                differences += [
                    {
                        "metric": f"{name}@{label}", "control": IMAGES, "subject": row.subject, "split": split,
                        "difference": row.value, "ci_low": row.ci_low, "ci_high": row.ci_high,
                    }
                    for row in tabulate({f"gain_{name}@{label}": gain}, has_chance=False)
                ]  # fmt: skip
    return scores, differences
