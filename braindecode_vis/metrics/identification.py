"""Identification: whether a decoded image or feature matches its own ground truth better than others.

Works on pixels and on features of any network alike. The similarity is the Pearson correlation of the flattened
rows, the distractors are other *ground-truth* items, and a tie is a failure. Everything follows from one score
matrix with decoded items as rows and ground-truth items as columns; the true match lies on the diagonal.

References
----------
Scotti et al. (2023), MindEye, arXiv:2305.18274 (two-way identification as used for NSD).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from braindecode_vis.checks import ConfigError, DataError, check_finite

#: Correlations closer than this are tied; above the rounding of double precision.
TIE_TOLERANCE = 1e-10


def two_way_identification(
    truth: np.ndarray,
    decoded: np.ndarray,
    *,
    groups: Sequence[object] | np.ndarray | None = None,
    ids: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """Return for each decoded item the fraction of distractors that its own ground truth beats.

    Parameters
    ----------
    truth : array of shape (n_items, ...)
        Pixels or features of the ground truth.
    decoded : array of shape (n_items, ...) or (n_items, n_draws, ...)
        The same of the decoded items. Several draws are scored one round at a time and the rounds averaged; they
        are never pooled, because copies of an item would act as ties.
    groups : sequence of length n_items, optional
        Class of each item. Distractors then come from the item's own class: within-class identification.
    ids : sequence of length n_items, optional
        Stimulus of each row, where one stimulus has several: its other rows are no distractors.

    Returns
    -------
    float array of shape (n_items,)
        Between 0 and 1, chance 0.5; their mean is the two-way identification accuracy.

    Raises
    ------
    DataError
        If the shapes do not fit, a value is not finite, or an item has no distractor.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((4, 8, 8))
    >>> two_way_identification(images, images)
    array([1., 1., 1., 1.])
    """
    return n_way_identification(truth, decoded, 2, groups=groups, ids=ids)


def n_way_identification(
    truth: np.ndarray,
    decoded: np.ndarray,
    n: int,
    *,
    groups: Sequence[object] | np.ndarray | None = None,
    ids: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """Return the exact probability that the ground truth beats n - 1 random distractors.

    An item that beats W of its M distractors wins with probability C(W, n - 1) / C(M, n - 1). Parameters as for
    `two_way_identification`; chance is 1 / n.

    Raises
    ------
    ConfigError
        If n is below 2 or an item has fewer than n - 1 distractors.
    """
    rounds = _split_draws(truth, decoded)
    return np.mean(
        [identify_from_scores(compute_correlations(one, truth), n, groups=groups, ids=ids) for one in rounds],
        axis=0,
    )


def identify_from_scores(
    scores: np.ndarray,
    n: int = 2,
    *,
    groups: Sequence[object] | np.ndarray | None = None,
    ids: Sequence[object] | np.ndarray | None = None,
) -> np.ndarray:
    """Return n-way identification from a score matrix with the true matches on the diagonal.

    Parameters
    ----------
    scores : array of shape (n_items, n_items)
        Similarity of each decoded item (row) to each ground-truth item (column); higher is better.
    n, groups, ids
        As for `n_way_identification`.

    Returns
    -------
    float array of shape (n_items,)
        Probability of identification.
    """
    check_square(scores)
    allowed = _find_distractors(len(scores), groups, ids)
    n_distractors = allowed.sum(axis=1)
    if n < 2 or n_distractors.min() < n - 1:
        raise ConfigError(
            f"{n}-way identification needs n >= 2 and n - 1 distractors for every item, but item "
            f"{int(n_distractors.argmin())} has {int(n_distractors.min())}."
        )
    beaten = scores < np.diagonal(scores)[:, None] - TIE_TOLERANCE
    return compute_win_probability((beaten & allowed).sum(axis=1), n_distractors, n)


def compute_win_probability(n_beaten: np.ndarray, n_distractors: np.ndarray, n: int) -> np.ndarray:
    """Return C(n_beaten, n - 1) / C(n_distractors, n - 1) as a running product, which never overflows."""
    wins, total = np.broadcast_arrays(
        np.asarray(n_beaten, dtype=float), np.asarray(n_distractors, dtype=float)
    )
    probability = np.ones(wins.shape)
    for i in range(n - 1):
        probability *= np.maximum(wins - i, 0.0) / (total - i)
    return probability


def decode_identity(
    decoded: np.ndarray, candidates: np.ndarray, names: Sequence[str] | np.ndarray
) -> np.ndarray:
    """Return the name of the candidate that correlates best with each decoded item.

    With all seen images as candidates this is the decoded identity; with one template per class it is the
    decoded class. Among equal candidates the first is returned.

    Parameters
    ----------
    decoded : array of shape (n_items, ...)
        Pixels or features.
    candidates : array of shape (n_candidates, ...)
        The same of the candidates.
    names : sequence of length n_candidates
        What to call them.

    Returns
    -------
    array of shape (n_items,)
        A name per decoded item.
    """
    if len(names) != len(candidates):
        raise DataError(f"{len(candidates)} candidates came with {len(names)} names.")
    scores = compute_correlations(decoded, candidates)
    best = scores.max(axis=1, keepdims=True)
    return np.asarray(names)[np.argmax(scores >= best - TIE_TOLERANCE, axis=1)]


def classification_accuracy(
    decoded: Sequence[object] | np.ndarray, truth: Sequence[object] | np.ndarray
) -> np.ndarray:
    """Return 1 where the decoded label is the true one and 0 elsewhere; shape (n_items,).

    Examples
    --------
    >>> classification_accuracy(["six", "nine"], ["six", "six"])
    array([1., 0.])
    """
    if len(decoded) != len(truth) or not len(truth):
        raise DataError(f"{len(decoded)} decoded labels cannot be compared with {len(truth)} true ones.")
    return np.array([a == b for a, b in zip(decoded, truth, strict=True)], dtype=float)


def compute_correlations(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of every row of `left` with every row of `right`.

    A constant row correlates 0 with everything: it carries no information, and NaN would hide it.

    Parameters
    ----------
    left : array of shape (n_left, ...)
        Pixels or features; rows are flattened.
    right : array of shape (n_right, ...)
        The same.

    Returns
    -------
    float array of shape (n_left, n_right)
        Correlations.
    """
    if left.shape[1:] != right.shape[1:] or not len(left) or not len(right):
        raise DataError(f"rows of shape {left.shape} and {right.shape} cannot be correlated.")
    return np.clip(standardize_rows(left) @ standardize_rows(right).T, -1.0, 1.0)


def standardize_rows(rows: np.ndarray) -> np.ndarray:
    """Return flattened float64 rows with mean 0 and norm 1; a constant row becomes 0."""
    check_finite(rows, what="features to compare", row_names=range(len(rows)), unit="item")
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    varied = norm > 1e-12 * np.linalg.norm(flat, axis=1, keepdims=True)  # more than the rounding of the mean
    return np.divide(centred, norm, out=np.zeros_like(centred), where=varied)


def check_square(scores: np.ndarray) -> None:
    """Raise `DataError` unless `scores` is a finite square matrix."""
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise DataError(
            f"a score matrix must have one row per decoded and one column per true item, got {scores.shape}."
        )
    check_finite(scores, what="the score matrix", row_names=range(len(scores)), unit="item")


def _split_draws(truth: np.ndarray, decoded: np.ndarray) -> list[np.ndarray]:
    if len(truth) != len(decoded):
        raise DataError(f"{len(truth)} ground-truth items cannot be paired with {len(decoded)} decoded ones.")
    if decoded.ndim == truth.ndim:
        return [decoded]
    if decoded.ndim != truth.ndim + 1 or not decoded.shape[1]:
        raise DataError(
            f"decoded items of shape {decoded.shape} do not fit ground truth of shape {truth.shape}; several "
            "draws belong in the second dimension."
        )
    return [decoded[:, draw] for draw in range(decoded.shape[1])]


def _find_distractors(
    n_items: int,
    groups: Sequence[object] | np.ndarray | None,
    ids: Sequence[object] | np.ndarray | None,
) -> np.ndarray:
    """Return a boolean matrix that says whether column i may be a distractor of row j."""
    allowed = ~np.eye(n_items, dtype=bool)
    for name, labels, same in (("group", groups, True), ("id", ids, False)):
        if labels is None:
            continue
        if len(labels) != n_items:
            raise DataError(f"{n_items} items came with {len(labels)} {name}s.")
        codes = np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
        allowed &= (codes[:, None] == codes[None, :]) == same
    alone = np.flatnonzero(~allowed.any(axis=1))
    if alone.size:
        raise DataError(
            f"{alone.size} item(s) have no distractor, first item {alone[0]}: drop them, or do not restrict "
            "distractors to the own group."
        )
    return allowed
