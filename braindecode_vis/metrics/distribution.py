"""How far apart are two clouds of embeddings? One number for two sets, however their rows are paired.

A prior should bring predictions to where image embeddings lie; these distances say whether it does. Both depend on the
number of rows, so compare values of equal numbers only, and read them beside the distance between two halves of the
true embeddings.

References
----------
Gretton et al. (2012), A kernel two-sample test, JMLR 13 (MMD, median heuristic); Heusel et al. (2017), FID,
arXiv:1706.08500 (Frechet distance of two Gaussians).
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.arrays import Embeddings, check_same_space
from braindecode_vis.checks import DataError

MOST_FOR_MEDIAN = 2000  # pooled rows whose distances the median is taken over


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
    x, y = _as_rows(left, right)
    width = find_bandwidth(np.concatenate([x, y])) if bandwidth is None else float(bandwidth)
    if width <= 0:
        raise DataError(f"the kernel width is {width}: all rows of {left.space!r} are equal.")
    n, m = len(x), len(y)
    within_left = (_sum_kernel(x, x, width) - n) / (n * (n - 1))
    within_right = (_sum_kernel(y, y, width) - m) / (m * (m - 1))
    return within_left + within_right - 2 * _sum_kernel(x, y, width) / (n * m)


def find_bandwidth(rows: np.ndarray) -> float:
    """Return the median distance between two different rows of an array of shape (n_rows, n_features)."""
    from scipy.spatial.distance import pdist

    step = -(-len(rows) // MOST_FOR_MEDIAN)
    return float(np.median(pdist(rows[::step])))


def compute_frechet(left: Embeddings, right: Embeddings) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of rows.

    |mean difference|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), with covariances of n - 1. The trace of the root is the sum
    of the singular values of one centred set times the other, which is exact and cheap when there are fewer rows than
    features. With few rows the distance is biased upward, equally for sets of equal size and spread.

    Parameters
    ----------
    left, right : Embeddings
        In one space, at least two rows each; ids do not matter.

    Raises
    ------
    DataError
        If the spaces differ or a set is too small.

    Examples
    --------
    >>> import numpy as np
    >>> one = Embeddings(np.array([[0.0], [2.0]]), ["a", "b"], "toy")
    >>> two = Embeddings(np.array([[3.0], [5.0]]), ["a", "b"], "toy")
    >>> round(compute_frechet(one, two), 6)
    9.0
    """
    x, y = _as_rows(left, right)
    shift = x.mean(axis=0) - y.mean(axis=0)
    a = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    if min(len(x), len(y)) > x.shape[1]:
        a, b = (
            np.linalg.qr(a, mode="r"),
            np.linalg.qr(b, mode="r"),
        )  # same covariance, (n_features, n_features)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(0.0, shift @ shift + (a**2).sum() + (b**2).sum() - 2 * root))


def _as_rows(left: Embeddings, right: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    check_same_space(left, right)
    for rows in (left, right):
        if len(rows) < 2:
            raise DataError(f"a distribution in {rows.space!r} cannot be told from {len(rows)} row(s).")
    return left.flat().astype(np.float64), right.flat().astype(np.float64)


def _sum_kernel(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Return the sum of the Gaussian kernel over all pairs, in blocks of bounded size."""
    from scipy.spatial.distance import cdist

    block, total = max(1, (1 << 22) // len(y)), 0.0
    for start in range(0, len(x), block):
        squared = cdist(x[start : start + block], y, "sqeuclidean")
        total += float(np.exp(-squared / (2 * width**2)).sum())
    return total
