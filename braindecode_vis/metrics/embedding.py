"""Embedding metrics: how close is a predicted embedding to that of the seen image? One value per prediction.

Predictions and targets meet by stimulus id inside one space, never by position.
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.arrays import Embeddings, check_same_space
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.identification import standardize_rows


def correlation_distance(predicted: Embeddings, target: Embeddings) -> np.ndarray:
    """Return 1 - Pearson correlation between each prediction and the target of its stimulus.

    Parameters
    ----------
    predicted : Embeddings of n_rows rows
        Several rows may share a stimulus id.
    target : Embeddings
        One row per stimulus id.

    Returns
    -------
    float array of shape (n_rows,)
        Between 0 (best) and 2. A constant vector has no correlation and the distance 1 of an uninformative one.

    Raises
    ------
    DataError
        If the spaces differ or a target is missing.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Embeddings(np.array([[0.0, 1, 2], [5, 3, 1]]), ["a", "b"], "toy")
    >>> correlation_distance(rows, rows).round(6)
    array([0., 0.])
    """
    left, right = _align(predicted, target)
    return 1.0 - np.clip(np.einsum("ij,ij->i", standardize_rows(left), standardize_rows(right)), -1.0, 1.0)


def cosine_to_target(predicted: Embeddings, target: Embeddings) -> np.ndarray:
    """Return the cosine similarity between each prediction and the target of its stimulus.

    Parameters
    ----------
    predicted, target
        As for `correlation_distance`.

    Returns
    -------
    float array of shape (n_rows,)
        Between -1 and 1 (best).

    Raises
    ------
    DataError
        If the spaces differ, a target is missing or a vector is zero.
    """
    left, right = _align(predicted, target)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    bad = np.flatnonzero(norms == 0)
    if bad.size:
        raise DataError(
            f"{bad.size} embedding(s) in space {target.space!r} are zero, first for stimulus "
            f"{predicted.ids[bad[0]]!r}: cosine similarity is not defined."
        )
    return np.clip(np.einsum("ij,ij->i", left, right) / norms, -1.0, 1.0)


def _align(predicted: Embeddings, target: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64 matrices of shape (n_rows, n_tokens * n_features), row by row the same stimulus."""
    check_same_space(predicted, target)
    matched = target.select(list(predicted.ids))
    return predicted.flat().astype(np.float64), matched.flat().astype(np.float64)
