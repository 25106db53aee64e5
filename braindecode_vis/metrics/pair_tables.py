"""Tables of one value per (prediction, candidate): what a metric would be if each candidate were the true one.

Owns the tables that `braindecode_vis.metrics.uncertainty.permutation_test` permutes. The entry of the true candidate is
the metric itself, with the same rule for ties. Knows no permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.metrics.identification import TIE_TOLERANCE, compute_win_probability

Labels = Sequence[object] | np.ndarray


class Order(NamedTuple):
    """How many columns of its row each cell beats, and how many beat it; int arrays of the shape of the scores."""

    n_below: np.ndarray
    n_above: np.ndarray


def make_top_k_table(scores: np.ndarray | Order, k: int) -> np.ndarray:
    """Return 1 where a column ranks among the `k` best of its row, ties lost.

    Parameters
    ----------
    scores : array of shape (n_predictions, n_stimuli)
        Similarities, higher is better; or their order, as `count_order` gives it.
    k
        How many candidates may be named.

    Returns
    -------
    float array of shape (n_predictions, n_stimuli)
        Zeros and ones.
    """
    n_below = _find_order(scores).n_below
    return (n_below.shape[1] - n_below <= k).astype(float)


def make_rank_table(scores: np.ndarray | Order) -> np.ndarray:
    """Return the rank of each column in its row of `scores`, 1 is best, ties sharing the mean rank."""
    n_below, n_above = _find_order(scores)
    return (n_below.shape[1] - n_below + n_above + 1) / 2


def make_reciprocal_rank_table(scores: np.ndarray | Order) -> np.ndarray:
    """Return 1 / rank of each column in its row of `scores`, ties sharing the mean rank."""
    return 1.0 / make_rank_table(scores)


def make_k_way_table(scores: np.ndarray | Order, k: int) -> np.ndarray:
    """Return the exact probability that each column beats k - 1 random others of its row, ties shared.

    Examples
    --------
    >>> make_k_way_table(np.array([[3.0, 2.0, 1.0]]), 2)
    array([[1. , 0.5, 0. ]])
    >>> make_k_way_table(np.zeros((1, 3)), 3).round(6)
    array([[0.333333, 0.333333, 0.333333]])
    """
    n_below, n_above = _find_order(scores)
    size = n_below.shape[1]
    if not 2 <= k <= size:
        raise DataError(f"{k}-way accuracy needs 2 to {size} alternatives in a gallery of {size}.")
    wins = compute_win_probability(np.arange(size)[::-1], np.full(size, size - 1), k)  # by number above
    total = np.concatenate([[0.0], np.cumsum(wins)])
    n_same = size - n_below - n_above  # the column itself and what is tied with it
    shared = (total[n_above + n_same] - total[n_above]) / n_same
    return np.where(n_same > 1, shared, wins[n_above])


def make_two_way_table(scores: np.ndarray, *, groups: Labels | None = None) -> np.ndarray:
    """Return for each cell the fraction of other columns that it beats in its row, ties lost.

    Parameters
    ----------
    scores : array of shape (n_predictions, n_stimuli)
        Similarities, higher is better.
    groups : sequence of length n_stimuli, optional
        Class of each column; a column is then compared with columns of its own class only.

    Returns
    -------
    float array of shape (n_predictions, n_stimuli)
        Two-way identification of each prediction if each stimulus were its ground truth.
    """
    return make_identification_table(scores, 2, groups=groups)


def make_identification_table(scores: np.ndarray, n: int, *, groups: Labels | None = None) -> np.ndarray:
    """Return n-way identification: the probability that each cell beats n - 1 random other columns, ties lost.

    Parameters
    ----------
    scores, groups
        As for `make_two_way_table`.
    n
        Number of alternatives.

    Raises
    ------
    DataError
        If a class has fewer than n stimuli.
    """
    names = np.zeros(scores.shape[1], int) if groups is None else [str(label) for label in groups]
    codes = np.unique(np.asarray(names), return_inverse=True)[1]
    if len(codes) != scores.shape[1]:
        raise DataError(f"{scores.shape[1]} items came with {len(codes)} group labels.")
    table = np.empty(scores.shape)
    for code in np.unique(codes):
        columns = np.flatnonzero(codes == code)
        if len(columns) < n:
            lack = "no distractor" if n == 2 else f"{len(columns) - 1} distractors, not {n - 1},"
            raise DataError(f"stimulus {columns[0]} has {lack} in its class; drop it from this score.")
        n_below = count_order(scores[:, columns]).n_below
        table[:, columns] = compute_win_probability(n_below, np.full(n_below.shape, len(columns) - 1), n)
    return table


def count_order(scores: np.ndarray) -> Order:
    """Return how many columns of its row each cell beats, and how many beat it; for several tables of one matrix."""
    scores = scores.astype(np.float64)  # the tolerance is lost in single precision
    n_below, n_above = np.empty(scores.shape, int), np.empty(scores.shape, int)
    for row, values in enumerate(scores):
        ordered = np.sort(values)
        n_below[row] = np.searchsorted(ordered, values - TIE_TOLERANCE, side="left")
        n_above[row] = len(values) - np.searchsorted(ordered, values + TIE_TOLERANCE, side="right")
    return Order(n_below, n_above)


def _find_order(scores: np.ndarray | Order) -> Order:
    return scores if isinstance(scores, Order) else count_order(scores)
