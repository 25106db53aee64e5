"""Identification: whether a prediction matches its own ground truth better than that of other items.

Everything starts from one similarity matrix, predictions in rows and candidates in columns. A table made of it says
what a metric would be if each candidate were the true one: `braindecode_vis.scoring.uncertainty.permutation_test`
permutes such tables, and the entry of the true candidate is the metric itself, with the same rule for ties. Works on
pixels and on features of any network alike, as the Pearson correlation of flattened rows; distractors are other
*ground-truth* items. Knows no permutation.

References
----------
Scotti et al. (2023), MindEye, arXiv:2305.18274 (two-way identification as used for NSD).
Arvesen (1969), Jackknifing U-statistics, doi:10.1214/aoms/1177697287.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from braindecode_vis.base.checks import DataError, check_finite

#: Similarities closer than this are tied; above the rounding of double precision.
TIE_TOLERANCE = 1e-10
Labels = Sequence[object] | np.ndarray


def two_way_identification(
    truth: np.ndarray, decoded: np.ndarray, *, groups: Labels | None = None
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
    return n_way_identification(truth, decoded, 2, groups=groups)


def n_way_identification(
    truth: np.ndarray, decoded: np.ndarray, n: int, *, groups: Labels | None = None
) -> np.ndarray:
    """Return the exact probability that the ground truth beats n - 1 random distractors.

    An item that beats W of its M distractors wins with probability C(W, n - 1) / C(M, n - 1). Parameters as for
    `two_way_identification`; chance is 1 / n.
    """
    if len(truth) != len(decoded):
        raise DataError(f"{len(truth)} ground-truth items cannot be paired with {len(decoded)} decoded ones.")
    several = decoded.ndim == truth.ndim + 1 and decoded.shape[1] > 0
    if decoded.ndim != truth.ndim and not several:
        raise DataError(
            f"decoded items of shape {decoded.shape} do not fit ground truth of shape {truth.shape}; several "
            "draws belong in the second dimension."
        )
    # A draw is a round of its own: pooled, the copies of an item would act as its distractors.
    rounds = np.moveaxis(decoded, 1, 0) if several else decoded[None]  # (n_draws, n_items, ...)
    tables = [make_identification_table(compute_correlations(one, truth), n, groups=groups) for one in rounds]
    return np.mean([np.diagonal(table) for table in tables], axis=0)


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


def centre_correlations(
    correlations: np.ndarray, spreads: np.ndarray, seen: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return correlations after a mean of some seen items was taken off both sides, without their features.

    Parameters
    ----------
    correlations : array of shape (n_items, n_seen)
        Pearson correlations of all items with the seen ones.
    spreads : array of shape (n_items,)
        Length of the features of each item after their own mean was taken off.
    seen : int array of shape (n_seen,)
        Which items were seen.
    weights : array of shape (n_seen,)
        Weights of the mean, which sum to one.

    Examples
    --------
    >>> items = np.random.default_rng(0).normal(size=(6, 40))
    >>> centred = items - items.mean(axis=1, keepdims=True)
    >>> found = centre_correlations(
    ...     np.corrcoef(items)[:, :4], np.linalg.norm(centred, axis=1), np.arange(4), np.array([0.5, 0.5, 0, 0]))
    >>> mean = items[:2].mean(axis=0)
    >>> bool(np.allclose(found, compute_correlations(items - mean, items[:4] - mean)))
    True
    """
    products = correlations * spreads[:, None] * spreads[seen]  # (n_items, n_seen)
    by_mean = products @ weights
    mean = by_mean[seen] @ weights
    lengths = spreads**2 - 2 * by_mean + mean
    # What rounding leaves of equal features has no direction.
    lengths = np.sqrt(np.where(lengths > 1e-12 * (spreads**2 + mean), lengths, np.inf))
    centred = products - by_mean[:, None] - by_mean[seen] + mean
    return np.clip(centred / lengths[:, None] / lengths[seen], -1.0, 1.0)


def standardize_rows(rows: np.ndarray) -> np.ndarray:
    """Return flattened float64 rows with mean 0 and norm 1; a constant row becomes 0."""
    check_finite(rows, what="features to compare", row_names=range(len(rows)), unit="item")
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    varied = norm > 1e-12 * np.linalg.norm(flat, axis=1, keepdims=True)  # more than the rounding of the mean
    return np.divide(centred, norm, out=np.zeros_like(centred), where=varied)


# --- tables that can be permuted ----------------------------------------------------------------------------------


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
    # (size,) by number above; a cumulative sum gives the mean over the places that tied columns share.
    wins = compute_win_probability(np.arange(size)[::-1], np.full(size, size - 1), k)  # by number above
    total = np.concatenate([[0.0], np.cumsum(wins)])
    n_same = size - n_below - n_above  # the column itself and what is tied with it
    shared = (total[n_above + n_same] - total[n_above]) / n_same
    return np.where(n_same > 1, shared, wins[n_above])


def make_identification_table(
    scores: np.ndarray | Order, n: int, *, groups: Labels | None = None
) -> np.ndarray:
    """Return n-way identification: the probability that each cell beats n - 1 random other columns, ties lost.

    Parameters
    ----------
    scores : array of shape (n_predictions, n_stimuli)
        Similarities, higher is better; or, without `groups`, their order, as `count_order` gives it.
    n
        Number of alternatives; 2 gives the fraction of other columns that a cell beats.
    groups : sequence of length n_stimuli, optional
        Class of each column; a column is then compared with columns of its own class only.

    Raises
    ------
    DataError
        If a class has fewer than n stimuli.
    """
    if isinstance(scores, Order) and groups is not None:
        raise DataError(
            "identification within groups needs the similarities, not only the ranks in the whole row."
        )
    shape = (scores.n_below if isinstance(scores, Order) else scores).shape
    names = np.zeros(shape[1], int) if groups is None else [str(label) for label in groups]
    codes = np.unique(np.asarray(names), return_inverse=True)[1]
    if len(codes) != shape[1]:
        raise DataError(f"{shape[1]} items came with {len(codes)} group labels.")
    table = np.empty(shape)
    for code in np.unique(codes):
        columns = np.flatnonzero(codes == code)
        if len(columns) < n:
            lack = "no distractor" if n == 2 else f"{len(columns) - 1} distractors, not {n - 1},"
            raise DataError(f"stimulus {columns[0]} has {lack} in its class; drop it from this score.")
        n_below = (scores if isinstance(scores, Order) else count_order(scores[:, columns])).n_below
        # Looked up by the number beaten: a table has far fewer of those than cells.
        beaten = np.arange(len(columns))
        table[:, columns] = compute_win_probability(beaten, np.full(len(columns), len(columns) - 1), n)[
            n_below
        ]
    return table


def leave_out_images(
    scores: Sequence[np.ndarray | Order],
    truths: Sequence[np.ndarray],
    names: Sequence[Labels],
    n: int,
    *,
    groups: Sequence[Labels | None] | None = None,
    ties: Literal["shared", "against"] = "against",
) -> np.ndarray:
    """Return n-way identification without each image in turn, which leaves as query and as distractor.

    Two predictions that share a distractor are not independent, so that a bootstrap of queries is too narrow; how far
    the score moves without an image shows how sure it is (see `uncertainty.jackknife_interval`).

    Parameters
    ----------
    scores : per gallery, array of shape (n_predictions, n_stimuli)
        Similarities, higher is better; or their order, as `count_order` gives it.
    truths : per gallery, int array of shape (n_predictions,)
        True column of each row.
    names : per gallery, sequence of length n_stimuli
        Image of each column; one image may be in several galleries.
    n
        Number of alternatives.
    groups : per gallery, sequence of length n_stimuli or None
        Class of each column; distractors are of the own class only.
    ties
        ``against`` as in `make_identification_table`, ``shared`` as in `make_k_way_table`.

    Returns
    -------
    float array of shape (n_images,)
        One value for each image that some row shows. A prediction without n - 1 distractors left does not count; NaN
        where that leaves none.

    Examples
    --------
    >>> similarity = np.array([[0.9, 0.2, 0.4, 0.1], [0.3, 0.5, 0.6, 0.2], [0.1, 0.4, 0.7, 0.3], [0.2, 0.5, 0.1, 0.4]])
    >>> leave_out_images([similarity], [np.arange(4)], [list("abcd")], 2).round(6).tolist()
    [0.666667, 1.0, 0.833333, 0.833333]
    """
    shown = np.unique(
        np.concatenate([np.asarray(own).astype(str)[truth] for own, truth in zip(names, truths, strict=True)])
    )
    listed = [None] * len(scores) if groups is None else groups
    sums = [
        sum_without_each(given, truth, n, groups=classes, ties=ties)
        for given, truth, classes in zip(scores, truths, listed, strict=True)
    ]
    return join_left_out(sums, names, shown)


def sum_without_each(
    scores: np.ndarray | Order,
    truth: np.ndarray,
    n: int,
    *,
    groups: Labels | None = None,
    ties: Literal["shared", "against"] = "against",
) -> np.ndarray:
    """Return the sum of n-way identification in one gallery, without each image in turn; see `leave_out_images`.

    Returns
    -------
    float array of shape (2, n_stimuli + 1)
        Sum over rows, and how many rows have a value: first with all images, then without each column.
    """
    truth = np.asarray(truth)
    values, known, before = _leave_out_columns(scores, truth, n, groups, ties)
    # All rows but those of the image itself, whose entry in its own column is their score with all columns.
    n_columns, has_score = values.shape[1], np.isfinite(before)
    without = values.sum(axis=0) - np.bincount(truth, np.nan_to_num(before), minlength=n_columns)
    n_rows = known.sum(axis=0) - np.bincount(truth, has_score, minlength=n_columns)
    return np.stack([np.append(np.nansum(before), without), np.append(has_score.sum(), n_rows)])


def join_left_out(sums: Sequence[np.ndarray], names: Sequence[Labels], shown: Labels) -> np.ndarray:
    """Return the mean over all galleries without each of the images `shown`; NaN where no row is left.

    Parameters
    ----------
    sums : per gallery, array of shape (2, n_stimuli + 1)
        As `sum_without_each` gives them.
    names : per gallery, sequence of length n_stimuli
        Image of each column.
    shown
        Images that are left out in turn. One that is no candidate in a gallery changes nothing there.
    """
    totals = np.zeros((2, len(shown)))
    for own, columns in zip(sums, names, strict=True):
        place = {str(name): column + 1 for column, name in enumerate(columns)}
        totals += own[:, [place.get(str(name), 0) for name in shown]]
    return np.divide(totals[0], totals[1], out=np.full(len(shown), np.nan), where=totals[1] > 0)


def _leave_out_columns(
    scores: np.ndarray | Order, truth: np.ndarray, n: int, groups: Labels | None, ties: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each row's score without each column, whether it has one, and its score with all columns (NaN: none)."""
    # What beats more columns, and is beaten by fewer, is the more similar one.
    keys = scores.n_below - scores.n_above if isinstance(scores, Order) else scores.astype(np.float64)
    own = np.take_along_axis(keys, truth[:, None], axis=1)
    slack = 0 if isinstance(scores, Order) else TIE_TOLERANCE
    codes = (
        np.zeros(keys.shape[1], int)
        if groups is None
        else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    )
    rival = codes[None] == codes[truth][:, None]  # (n_rows, n_columns)
    rival[np.arange(len(truth)), truth] = False
    below, above = rival & (keys < own - slack), rival & (keys > own + slack)
    tied = rival & ~below & ~above
    n_below, n_tied, n_rivals = below.sum(axis=1), tied.sum(axis=1), rival.sum(axis=1)

    def score(fewer_below: int, fewer_tied: int, fewer: int) -> np.ndarray:
        """Return the score of each row with fewer rivals; NaN where there are not enough of them."""
        lost = n_rivals - fewer
        least = np.maximum(n_below - fewer_below, 0)
        most = least + (np.maximum(n_tied - fewer_tied, 0) if ties == "shared" else 0)
        found = np.full(len(truth), np.nan)
        enough = lost >= n - 1
        found[enough] = compute_win_probability(least[enough], lost[enough], n)
        for row in np.flatnonzero(enough & (most > least)):  # tied candidates share their places
            places = np.arange(least[row], most[row] + 1)
            found[row] = compute_win_probability(places, np.full(len(places), lost[row]), n).mean()
        return found

    values = np.broadcast_to(score(0, 0, 0)[:, None], keys.shape).copy()
    for which, without in ((below, score(1, 0, 1)), (tied, score(0, 1, 1)), (above, score(0, 0, 1))):
        values = np.where(which, without[:, None], values)
    return np.nan_to_num(values), np.isfinite(values), score(0, 0, 0)


def count_order(scores: np.ndarray) -> Order:
    """Return how many columns of its row each cell beats, and how many beat it; for several tables of one matrix."""
    scores = scores.astype(np.float64)  # the tolerance is lost in single precision
    n_columns = scores.shape[1]
    places = np.argsort(scores, axis=1)
    ordered = np.take_along_axis(scores, places, axis=1)
    n_below, n_above = np.empty(scores.shape, int), np.empty(scores.shape, int)
    np.put_along_axis(n_below, places, np.arange(n_columns)[None], axis=1)
    np.subtract(n_columns - 1, n_below, out=n_above)
    # Where all are further apart than twice the tolerance, which is beyond rounding, the order says all.
    apart = ordered[:, 1:] > ordered[:, :-1] + 2 * TIE_TOLERANCE
    for row in np.flatnonzero(~apart.all(axis=1)):
        values = scores[row]
        n_below[row] = np.searchsorted(ordered[row], values - TIE_TOLERANCE, side="left")
        n_above[row] = n_columns - np.searchsorted(ordered[row], values + TIE_TOLERANCE, side="right")
    return Order(n_below, n_above)


def _find_order(scores: np.ndarray | Order) -> Order:
    return scores if isinstance(scores, Order) else count_order(scores)


def compute_win_probability(n_beaten: np.ndarray, n_distractors: np.ndarray, n: int) -> np.ndarray:
    """Return C(n_beaten, n - 1) / C(n_distractors, n - 1) as a running product, which never overflows."""
    wins, total = np.broadcast_arrays(
        np.asarray(n_beaten, dtype=float), np.asarray(n_distractors, dtype=float)
    )
    probability = np.ones(wins.shape)
    # Without replacement: each distractor drawn leaves one fewer to beat and one fewer to draw.
    for i in range(n - 1):
        probability *= np.maximum(wins - i, 0.0) / (total - i)
    return probability
