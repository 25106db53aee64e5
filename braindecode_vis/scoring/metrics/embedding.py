"""Distances between embeddings: of each prediction to its target, and between two clouds of embeddings.

The correlation distance is one value per row and compares rows in order, so whoever calls it matches rows by stimulus
id. The maximum mean discrepancy is one number for two sets, however their rows are paired: a prior should bring
predictions to where image embeddings lie, and it says whether that happened. Compare only values of equal numbers of
rows, beside the value of two halves of the true embeddings.

References
----------
Gretton et al. (2012), A kernel two-sample test, JMLR 13 (MMD, median heuristic).
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics.identification import compute_correlations, standardize_rows

MOST_FOR_MEDIAN = 2000  # pooled rows whose distances the median is taken over


def correlation_distance(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return 1 - Pearson correlation of each prediction with its target.

    Parameters
    ----------
    predicted, target : arrays of shape (n_rows, ...)
        Row by row the same stimulus, in one space; rows are flattened.

    Returns
    -------
    float array of shape (n_rows,)
        Between 0 (best) and 2. A constant vector has no correlation and the distance 1 of an uninformative one.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.array([[0.0, 1, 2], [5, 3, 1]])
    >>> correlation_distance(rows, rows).round(6)
    array([0., 0.])
    """
    return 1.0 - np.clip(
        np.einsum("ij,ij->i", standardize_rows(predicted), standardize_rows(target)), -1.0, 1.0
    )


def tabulate_correlation_distance(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return `correlation_distance` of every prediction to every target, shape (n_predicted, n_target)."""
    return 1.0 - compute_correlations(predicted, target)


def compute_mmd(left: Embeddings, right: Embeddings, *, bandwidth: float | None = None) -> float:
    """Return the squared maximum mean discrepancy of two sets of rows under a Gaussian kernel.

    The unbiased estimate: near zero for two samples of one distribution, and below zero by chance.

    Parameters
    ----------
    left, right : Embeddings
        In one space, at least two rows each; ids do not matter.
    bandwidth
        Standard deviation of the kernel exp(-d^2 / (2 bandwidth^2)). None takes the median distance between two
        different rows of the pooled sets (of 2000 rows evenly spaced through them, if there are more).

    Raises
    ------
    DataError
        If the spaces differ, a set is too small, or all rows are equal.

    Examples
    --------
    >>> import numpy as np
    >>> near = Embeddings(np.array([[0.0], [1.0]]), ["a", "b"], "toy")
    >>> far = Embeddings(np.array([[9.0], [10.0]]), ["a", "b"], "toy")
    >>> compute_mmd(near, far) > 0.5 > 0 > compute_mmd(near, near)
    True
    """
    check_same_space(left, right)
    for rows in (left, right):
        if len(rows) < 2:
            raise DataError(f"a distribution in {rows.space!r} cannot be compared by {len(rows)} row(s).")
    x, y = left.flat().astype(np.float64), right.flat().astype(np.float64)
    width = find_bandwidth(np.concatenate([x, y])) if bandwidth is None else float(bandwidth)
    if width <= 0:
        raise DataError(f"the kernel width is {width}: all rows of {left.space!r} are equal.")
    n, m = len(x), len(y)
    # Unbiased: a row is not compared with itself, whose kernel is 1.
    within_left = (_sum_kernel(x, x, width) - n) / (n * (n - 1))
    within_right = (_sum_kernel(y, y, width) - m) / (m * (m - 1))
    return within_left + within_right - 2 * _sum_kernel(x, y, width) / (n * m)


def find_bandwidth(rows: np.ndarray) -> float:
    """Return the median distance between two different rows of an array of shape (n_rows, n_features)."""
    from scipy.spatial.distance import pdist

    step = -(-len(rows) // MOST_FOR_MEDIAN)  # two million distances are enough for a median
    return float(np.median(pdist(rows[::step])))


def _sum_kernel(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Return the sum of the Gaussian kernel over all pairs, in blocks of bounded size."""
    from scipy.spatial.distance import cdist

    block, total = max(1, (1 << 22) // len(y)), 0.0  # 32 MB of distances at a time
    for start in range(0, len(x), block):
        squared = cdist(x[start : start + block], y, "sqeuclidean")
        total += float(np.exp(-squared / (2 * width**2)).sum())
    return total
