"""Whose statistics are these? Fits of "mean 0, spread 1" and "identity covariance", from training trials or from all.

Data that were standardised with the trials of a set have exactly mean 0 and standard deviation 1 over that set, and
over no other. So the stored numbers tell who taught, whatever the record says. Owns that arithmetic; knows no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

#: Root mean square distance from mean 0 and spread 1 that counts as standardised; float16 stays well below it, and raw
#: data come this close by chance only with more than a hundred thousand trials.
TOLERANCE = 2e-3
#: One fit is the better one if it is this many times closer.
CLOSER = 4.0
#: Training trials this close to mean 0 and spread 1 taught, whoever else fits: groups that are standardised one by one
#: are so together as well, up to rounding.
EXACT = 5e-5
_BLOCK_BYTES = 32 << 20
_LARGEST_SUMS = 1 << 29  # bytes

Verdict = Literal["none", "train", "all", "own"]


@dataclass(frozen=True)
class Fit:
    """How far a set of trials is from being standardised by a part of itself.

    Parameters
    ----------
    grouping
        What was standardised at a time: ``everything``, ``subject``, ``session`` or ``run``.
    train
        Distance for the training trials of each group.
    everything
        Distance for all trials of groups that hold training and test trials; infinite if there is none.
    own
        Distance for groups of test trials alone.
    """

    grouping: str
    train: float
    everything: float
    own: float

    @property
    def verdict(self) -> Verdict:
        """Who taught: ``all`` (test trials too), ``train``, ``own`` (both, each group by itself), or ``none``."""
        if self.everything < TOLERANCE and self.everything * CLOSER < self.train and self.train > EXACT:
            return "all"
        if self.train < TOLERANCE:
            return "own" if self.own < TOLERANCE else "train"
        return "none"


def iterate_rows(data: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ascending row numbers and their trials, float64 of shape (n, n_features, n_samples)."""
    rows = np.sort(rows)
    size = max(1, _BLOCK_BYTES // max(1, 8 * int(np.prod(data.shape[1:]))))
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        block = np.asarray(data[chunk], dtype=np.float64)
        yield chunk, block.reshape(len(chunk), data.shape[1], -1)


def fit_standardised(data: np.ndarray, groups: np.ndarray, is_train: np.ndarray, grouping: str) -> Fit | None:
    """Measure how well "mean 0, standard deviation 1" holds, feature by feature.

    Parameters
    ----------
    data : array of shape (n_trials, n_features[, n_times])
        Times are samples of their feature.
    groups : array of shape (n_trials,)
        What is standardised at a time.
    is_train : bool array of shape (n_trials,)
        Trials that may teach.

    Returns
    -------
    Fit, or None where the sums would not fit into memory or no group has a training trial.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    n_features = data.shape[1]
    if 2 * len(names) * n_features * 16 > _LARGEST_SUMS or not is_train.any():
        return None
    cells = 2 * codes + is_train
    count = np.zeros(2 * len(names))
    total, squares = np.zeros((2, 2 * len(names), n_features))
    for chunk, block in iterate_rows(data, np.arange(len(data))):
        for cell in np.unique(cells[chunk]):
            own = block[cells[chunk] == cell]
            count[cell] += own.shape[0] * own.shape[2]
            total[cell] += own.sum(axis=(0, 2))
            squares[cell] += np.einsum("ijk,ijk->j", own, own)
    has_test, has_train = count[0::2] > 0, count[1::2] > 0
    both = has_test & has_train
    merged = [sums[0::2] + sums[1::2] for sums in (count, total, squares)]
    return Fit(
        grouping,
        _distance(count[1::2][has_train], total[1::2][has_train], squares[1::2][has_train]),
        _distance(*(sums[both] for sums in merged)),
        _distance(*(sums[has_test & ~has_train] for sums in merged)),
    )


def _distance(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> float:
    """Return the root mean square of the means and of the deviations of the spreads from one."""
    kept = count > 1
    if not kept.any():
        return np.inf
    mean = total[kept] / count[kept, None]
    spread = np.sqrt(np.maximum(squares[kept] / count[kept, None] - mean**2, 0))
    varies = spread > 1e-6  # constant features become 0, and filled-up ones are
    if not varies.any():
        return np.inf
    return float(np.sqrt(0.5 * (np.square(mean[varies]).mean() + np.square(spread[varies] - 1).mean())))


def fit_whitened(data: np.ndarray, groups: np.ndarray, is_train: np.ndarray, grouping: str) -> Fit | None:
    """Measure how well "identity covariance" holds over the samples of each group; as `fit_standardised`.

    Returns None where there are too many features for the matrices, or fewer samples than features.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    n_features = data.shape[1]
    if 2 * len(names) * n_features**2 * 8 > _LARGEST_SUMS or n_features < 2 or not is_train.any():
        return None
    cells = 2 * codes + is_train
    sums = np.zeros((2 * len(names), n_features + 1, n_features + 1))
    for chunk, block in iterate_rows(data, np.arange(len(data))):
        for cell in np.unique(cells[chunk]):
            samples = block[cells[chunk] == cell].transpose(1, 0, 2).reshape(n_features, -1)
            samples = np.vstack([samples, np.ones(samples.shape[1])])
            sums[cell] += samples @ samples.T
    count = sums[:, -1, -1]
    has_test, has_train = count[0::2] > 0, count[1::2] > 0
    merged = sums[0::2] + sums[1::2]
    fits = (sums[1::2][has_train], merged[has_test & has_train], merged[has_test & ~has_train])
    return Fit(grouping, *(_distance_from_identity(part) for part in fits))


def _distance_from_identity(sums: np.ndarray) -> float:
    """Return the largest distance over groups; each matrix holds products, sums in the last row, and the count."""
    worst = 0.0 if len(sums) else np.inf
    for matrix in sums:
        n, n_features = matrix[-1, -1], len(matrix) - 1
        if n <= n_features:
            return np.inf
        mean = matrix[-1, :-1] / n
        covariance = matrix[:-1, :-1] / n - np.outer(mean, mean)
        off = [covariance * factor - np.eye(n_features) for factor in (1.0, n / (n - 1))]  # either divisor
        worst = max(worst, min(float(np.sqrt(np.square(part).mean())) for part in off))
    return worst


def compute_column_moments(data: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every column of the flattened trials, in float64 and in two passes."""
    width = int(np.prod(data.shape[1:]))
    mean, squares = np.zeros(width), np.zeros(width)
    for chunk, block in iterate_rows(data, rows):
        mean += block.reshape(len(chunk), -1).sum(axis=0)
    mean /= max(1, len(rows))
    for chunk, block in iterate_rows(data, rows):
        squares += np.square(block.reshape(len(chunk), -1) - mean).sum(axis=0)
    return mean, np.sqrt(squares / max(1, len(rows)))
