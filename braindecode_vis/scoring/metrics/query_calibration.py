"""Transductive calibration of retrieval: the unlabelled test queries, all together, correct their own similarities.

Owns the corrections that papers apply at the test: centring and per-dimension standardising of the queries, CSLS,
SATTC's whitening with adaptive CSLS, and SCORE's rotation onto the gallery. None of them sees which image belongs to
which query, and all of them see all queries at once, so that one prediction by itself cannot be made this way: every
score made of them is named ``@transductive-...`` and is in a column of its own, never for the run. Pairing
queries and gallery one to one (Sinkhorn, Hungarian) uses more than that and is not offered.

References
----------
Lample et al. (2018), ICLR, arXiv:1710.04087 (CSLS). Huang et al. (2026), SATTC, CVPR, arXiv:2603.20738, whose code is
QunjieHuang/SATTC-CVPR2026@0cdfd1b (MIT licence); its structural expert (+.9 of top-1, -.4 of top-5 there) is left out.
SCORE (2026), arXiv:2608.19134, without public code. Schoenemann (1966), doi:10.1007/BF02289451 (the rotation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space, normalise_rows
from braindecode_vis.base.checks import DataError

#: Fewest queries of one subject from which statistics are taken.
FEWEST_QUERIES = 10
K = 10  # neighbours of CSLS, as in SCORE; SAGE has 3
#: SATTC's settings: shrinkage of queries and gallery; base, bounds and exponent of the neighbours of rows and columns.
SHRINK_QUERIES, SHRINK_GALLERY = 0.6, 0.5
ROW_BASE, ROW_BOUNDS = 12, (5, 20)
COLUMN_BASE, COLUMN_BOUNDS, COLUMN_POWER, COLUMN_TOP = 12, (8, 24), 1.2, 20
#: Share of landmarks that two halves of the features must agree on before the rotation is used; see `rotate_onto`.
FEWEST_AGREED = 0.1
IDENTITY_PULL = 0.1


def compute_cosines(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return the cosine of every pair of rows, float64 of shape (n_queries, n_gallery); zero rows give zero."""
    return normalise_rows(queries) @ normalise_rows(gallery).T


def centre_queries(queries: np.ndarray) -> np.ndarray:
    """Return the queries, shape (n, d), without their own mean."""
    return queries - queries.mean(axis=0)


def match_moments(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return the queries with mean and standard deviation of the gallery in each dimension.

    Parameters
    ----------
    queries, gallery : arrays of shape (n_queries, d) and (n_gallery, d)

    Examples
    --------
    >>> match_moments(np.array([[0.0], [2.0]]), np.array([[5.0], [15.0]])).ravel()
    array([ 5., 15.])
    """
    spread = queries.std(axis=0)
    # a dimension in which all queries agree says nothing, and takes the gallery's mean
    scale = np.divide(gallery.std(axis=0), spread, out=np.zeros_like(spread), where=spread > 0)
    return (queries - queries.mean(axis=0)) * scale + gallery.mean(axis=0)


def whiten(vectors: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return ``((1 - s) C + s (tr C / d) I)^(-1/2) (x - mean)`` of unit length, with the covariance C of the rows.

    Parameters
    ----------
    vectors : array of shape (n, d)
    shrinkage
        s, above 0 where there are fewer rows than dimensions.
    """
    centred = vectors - vectors.mean(axis=0)
    covariance = centred.T @ centred / max(1, len(vectors) - 1)
    d = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)
    values, axes = np.linalg.eigh(shrunk)
    return normalise_rows(centred @ (axes / np.sqrt(np.maximum(values, 1e-6))) @ axes.T)


def compute_csls(similarity: np.ndarray, k: int = K) -> np.ndarray:
    """Return ``2 S_ij - r_i - r_j``, with r the mean of the `k` largest similarities of a row, and of a column.

    Parameters
    ----------
    similarity : array of shape (n_queries, n_gallery)
    k
        Neighbours, at most as many as there are.

    Examples
    --------
    >>> compute_csls(np.eye(2), k=1)
    array([[ 0., -2.],
           [-2.,  0.]])
    """
    rows, columns = (_mean_of_largest(s, np.full(len(s), k)) for s in (similarity, similarity.T))
    return 2 * similarity - rows[:, None] - columns[None]


def compute_adaptive_csls(similarity: np.ndarray) -> np.ndarray:
    """Return CSLS with more neighbours where it is dense, as SATTC has it.

    A row's density is the mean of its 10 largest similarities, a column's how often it is among the 20 largest of a
    row. The number of neighbours is 12 times the density over its median (to the power of 1.2 for columns), rounded, 5
    to 20 in rows and 8 to 24 in columns.

    Parameters
    ----------
    similarity : array of shape (n_queries, n_gallery)
    """
    n_queries, n_gallery = similarity.shape
    density = _mean_of_largest(similarity, np.full(n_queries, K))
    middle = np.sort(density)[(n_queries - 1) // 2]  # torch's median is the lower of two
    k_row = np.round(ROW_BASE * np.maximum(density / (middle + 1e-9), 1e-6)).clip(*ROW_BOUNDS)
    top = np.argpartition(-similarity, min(COLUMN_TOP, n_gallery) - 1, axis=1)[:, :COLUMN_TOP]
    often = np.bincount(top.ravel(), minlength=n_gallery) / n_queries
    scale = np.maximum(often / (np.median(often) + 1e-9), 1e-6) ** COLUMN_POWER
    k_column = np.round(COLUMN_BASE * scale).clip(*COLUMN_BOUNDS)
    rows = _mean_of_largest(similarity, k_row)
    columns = _mean_of_largest(similarity.T, k_column)
    return 2 * similarity - rows[:, None] - columns[None]


def _mean_of_largest(similarity: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return the mean of the k[i] largest values of each row, shape (n_rows,)."""
    sums = np.cumsum(-np.sort(-similarity, axis=1), axis=1)
    k = np.minimum(k, similarity.shape[1]).astype(int)
    return np.take_along_axis(sums, k[:, None] - 1, axis=1)[:, 0] / k


@dataclass(frozen=True)
class Rotation:
    """Queries rotated onto the gallery, or not.

    Parameters
    ----------
    queries : array of shape (n_queries, d)
        Rotated ones, or those that came in where the landmarks did not deserve it.
    n_landmarks
        Mutual nearest neighbours under CSLS.
    agreement
        Share of them that two halves of the dimensions find alike.
    used
        Whether the agreement reached the gate.
    """

    queries: np.ndarray
    n_landmarks: int
    agreement: float
    used: bool


def rotate_onto(queries: np.ndarray, gallery: np.ndarray, *, gate: float = FEWEST_AGREED) -> Rotation:
    """Rotate the queries so that mutual nearest neighbours coincide best (SCORE).

    Landmarks are the pairs that are each other's nearest under CSLS. Each weighs by how far its image is ahead of the
    next, at least 1e-6. With X and Y the landmarks less their weighted means and W the weights,
    ``U D V' = X' W Y + .1 ||X' W Y||_2 I`` gives the rotation ``U V'``; the second term pulls it to the identity.

    A rotation onto wrong landmarks makes everything worse, and how many are right cannot be seen without labels: half
    of all queries have a mutual neighbour by chance. So the rotation is used only if enough landmarks are found alike
    by even and odd dimensions, a choice of ours (SCORE gates on their accuracy, which takes labels). In simulated
    galleries of 200 images and 64 or 256 dimensions, turned by several angles, an agreement of .08 to .12 came with
    64 % right landmarks and a gain of .08 in top-1; below .03, with 12 to 23 % right ones, the mean gain was not
    above zero.

    Parameters
    ----------
    queries, gallery : arrays of shape (n_queries, d) and (n_gallery, d)
        Queries have the gallery's moments already; see `match_moments`.
    gate
        Least agreement.
    """
    similarity = compute_csls(compute_cosines(queries, gallery))
    best, rows = similarity.argmax(axis=1), find_mutual(similarity)
    agreement = measure_agreement(queries, gallery, rows, best[rows])
    if len(rows) < 2 or agreement < gate:
        return Rotation(queries, len(rows), agreement, False)
    two = -np.sort(-similarity[rows], axis=1)[:, :2]
    weight = np.maximum(two[:, 0] - two[:, 1], 1e-6)
    weight = weight / weight.sum()
    x, y = queries[rows], gallery[best[rows]]
    mean_x, mean_y = weight @ x, weight @ y
    cross = (x - mean_x).T @ (weight[:, None] * (y - mean_y))
    pulled = cross + IDENTITY_PULL * np.linalg.norm(cross, 2) * np.eye(len(cross))
    left, _, right = np.linalg.svd(pulled)
    return Rotation((queries - mean_x) @ (left @ right) + mean_y, len(rows), agreement, True)


def find_mutual(similarity: np.ndarray) -> np.ndarray:
    """Return the rows whose best column has them as its best row."""
    best = similarity.argmax(axis=1)
    return np.flatnonzero(similarity.argmax(axis=0)[best] == np.arange(len(best)))


def measure_agreement(
    queries: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> float:
    """Return the share of pairs that are nearest under CSLS by the even and by the odd dimensions alone."""
    if not len(rows):
        return 0.0
    halves = [
        compute_csls(compute_cosines(queries[:, i::2], gallery[:, i::2])).argmax(axis=1) for i in (0, 1)
    ]
    return float(np.mean((halves[0][rows] == columns) & (halves[1][rows] == columns)))


@dataclass(frozen=True)
class Calibrated:
    """Similarities of one set of queries after each correction.

    Parameters
    ----------
    similarities
        Name of the correction to an array of shape (n_queries, n_gallery).
    rotation
        What became of the rotation.
    """

    similarities: dict[str, np.ndarray]
    rotation: Rotation


def calibrate(queries: Embeddings, gallery: Embeddings) -> Calibrated:
    """Return similarities after each correction.

    Parameters
    ----------
    queries
        All test queries of one subject, and of one only: each correction takes their statistics.
    gallery
        Candidates in the same space.

    Returns
    -------
    Calibrated
        ``centred`` (mean of the queries taken off), ``standardised`` (mean and spread of the gallery in each
        dimension), ``csls`` (of the plain cosines), ``sattc`` (both sides whitened, then adaptive CSLS) and ``score``
        (standardised, rotated if the gate allows it, then CSLS).

    Raises
    ------
    DataError
        If there are too few queries for statistics of their own.
    """
    check_same_space(queries, gallery)
    if len(queries) < FEWEST_QUERIES:
        raise DataError(
            f"transductive calibration needs at least {FEWEST_QUERIES} test queries of a subject, but "
            f"there are {len(queries)}; leave the protocol out."
        )
    left, right = (np.asarray(x.flat(), dtype=np.float64) for x in (queries, gallery))
    moved = match_moments(left, right)
    rotation = rotate_onto(moved, right)
    white = compute_cosines(whiten(left, SHRINK_QUERIES), whiten(right, SHRINK_GALLERY))
    spread = white.std()
    white = (white - white.mean()) / (spread if spread > 0 else 1.0)
    return Calibrated(
        {
            "centred": compute_cosines(centre_queries(left), right),
            "standardised": compute_cosines(moved, right),
            "csls": compute_csls(compute_cosines(left, right)),
            "sattc": compute_adaptive_csls(white),
            "score": compute_csls(compute_cosines(rotation.queries, right)),
        },
        rotation,
    )
