"""Scores of the columns of one subject's training trials, by which columns are chosen.

Owns how the trials of one subject become a matrix, and what a time axis means for a column's score: the mean over its
times. Knows nothing of how many columns are kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.preprocessing.reliability import (
    Measure,
    compute_encoding_scores,
    compute_ncsnr,
    compute_split_half,
)


def pick_subject(responses: Responses, subject: str, n_own: int | None) -> Responses:
    """Return the trials of one subject as a matrix of its own columns (with a time axis, of columns times times).

    Parameters
    ----------
    n_own
        Its number of columns where rows are padded; None takes all.
    """
    rows = np.flatnonzero(responses.trials["subject"].astype(str).to_numpy() == subject)
    data = responses.data if len(rows) == responses.n_trials else responses.data[rows]
    data = data[:, :n_own].reshape(len(rows), -1)
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    n_times = int(np.prod(responses.data.shape[2:]))
    return Responses.from_checked(data, ("trial", "voxel"), trials, responses.unit, {"n_times": n_times})


def score_reliability(person: Responses, measure: Measure, *, n_splits: int, seed: int) -> np.ndarray:
    """Return the reliability of each column, shape (n_columns,)."""
    if measure == "ncsnr":
        return _mean_over_times(compute_ncsnr(person).ncsnr, person)
    found = compute_split_half(person, n_splits=n_splits, seed=seed)
    return _mean_over_times(found.correlation, person)


def score_encoding(
    person: Responses, features: Embeddings, *, alphas: tuple[float, ...], n_folds: int, seed: int
) -> np.ndarray:
    """Return the cross-validated correlation of each column with its prediction from images, shape (n_columns,)."""
    scores = compute_encoding_scores(person, features, alphas=alphas, n_folds=n_folds, seed=seed)
    return _mean_over_times(scores, person)


def pick_unique(targets: Embeddings) -> Embeddings:
    """Return one row per image."""
    _, first = np.unique(targets.ids.astype(str), return_index=True)
    return replace(targets, vectors=targets.vectors[first], ids=targets.ids[first])


def _mean_over_times(scores: np.ndarray, person: Responses) -> np.ndarray:
    return scores.reshape(-1, int(person.coords["n_times"])).mean(axis=1)
