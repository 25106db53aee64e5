"""Several rows of one trial: which of its volumes count, and one decision from all of them.

Owns what makes a trial of rows that are single volumes (same subject, session, run and onset), the window around it,
and the pooling of probabilities. Each volume of a block is a noisy sample of the same state; learning from all of them
and averaging their log probabilities uses more of the data than averaging the volumes first.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError, check_columns

_TRIAL = ("subject", "session", "run", "onset")


def number_trials(trials: pd.DataFrame) -> np.ndarray:
    """Return the number of the trial that each row belongs to, from 0 in order of appearance, shape (n_rows,).

    Raises
    ------
    DataError
        If the table does not say when a trial began.
    """
    check_columns(trials.columns, _TRIAL, what="the trial table, whose volumes are to be pooled,")
    return trials.groupby(list(_TRIAL), sort=False).ngroup().to_numpy()


def find_first_rows(trials: pd.DataFrame) -> np.ndarray:
    """Return the first row of each trial, ascending, shape (n_trials,)."""
    return np.unique(number_trials(trials), return_index=True)[1]


def find_window(trials: pd.DataFrame, window: tuple[float, float] | None) -> np.ndarray:
    """Return which rows lie in a window, bool of shape (n_rows,).

    Parameters
    ----------
    trials
        With the columns `time` (s after the onset) and `duration` (s).
    window
        Its beginning, in s after the onset, and its end (excluded), in s after the offset; None takes every row.

    Raises
    ------
    ConfigError
        If some trial has no volume in the window.
    """
    if window is None:
        return np.ones(len(trials), bool)
    check_columns(trials.columns, ("time", "duration"), what="the trial table, whose volumes are chosen,")
    times, ends = trials["time"].to_numpy(float), trials["duration"].to_numpy(float) + window[1]
    inside = (times >= window[0] - 1e-6) & (times < ends - 1e-6)
    number = number_trials(trials)
    empty = int((np.bincount(number, weights=inside) == 0).sum()) if len(number) else 0
    if empty:
        raise ConfigError(
            f"{empty} trials have no volume from {window[0]:g} s after their onset to {window[1]:g} s after their "
            "offset; keep more volumes with dataset.model.start and stop, or change encoder.windows."
        )
    return inside


def pool_rows(probabilities: np.ndarray, trials: pd.DataFrame, inside: np.ndarray) -> np.ndarray:
    """Return for each row the probabilities of its trial: the normalised geometric mean of those of its rows.

    Parameters
    ----------
    probabilities : array of shape (n_rows, n_classes)
    trials
        One row per row.
    inside : bool array of shape (n_rows,)
        Rows that count.

    Raises
    ------
    DataError
        If no row of a trial counts.

    Examples
    --------
    >>> table = pd.DataFrame({"subject": "1", "session": "1", "run": "1", "onset": [0.0, 0.0]})
    >>> pool_rows(np.array([[0.5, 0.5], [0.9, 0.1]]), table, np.array([True, True])).round(2).tolist()
    [[0.75, 0.25], [0.75, 0.25]]
    """
    number = number_trials(trials)
    logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    total = np.zeros((number.max() + 1, probabilities.shape[1]))
    np.add.at(total, number[inside], logs[inside])
    counts = np.bincount(number[inside], minlength=len(total))
    if not counts.all():
        raise DataError(f"{int((counts == 0).sum())} trials have no row to be decided from.")
    mean = total / counts[:, None]
    pooled = np.exp(mean - mean.max(axis=1, keepdims=True))
    return (pooled / pooled.sum(axis=1, keepdims=True))[number]
