"""Averaging the repetitions of an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from braindecode_vis.arrays import Responses


def average_repetitions(responses: Responses, rows: np.ndarray | None = None) -> Responses:
    """Average the trials of each subject and stimulus, in order of first appearance.

    Where the trial table has a column `task`, what was seen is not averaged with what was imagined.
    Trials are read group by group, so only the averages are held in memory.

    Parameters
    ----------
    responses
        Trials, possibly memory-mapped.
    rows : int array, optional
        The trials that take part; all by default.

    Returns
    -------
    Responses
        One float32 trial per subject and stimulus (and task); `repetition` becomes the number of trials averaged.
    """
    rows = np.arange(responses.n_trials) if rows is None else np.asarray(rows)
    trials = responses.trials.iloc[rows]
    keys = ["subject", "stimulus_id", *(["task"] if "task" in trials else [])]
    groups = trials.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    if n_groups == len(groups):
        return responses.select(rows)
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(n_groups))
    counts = np.diff(np.append(starts, len(groups)))
    data = np.empty((n_groups, *responses.data.shape[1:]), dtype=np.float32)
    for group, (start, count) in enumerate(zip(starts, counts, strict=True)):
        members = np.sort(rows[order[start : start + count]])
        data[group] = responses.data[members].mean(axis=0, dtype=np.float64)
    averaged = trials.iloc[order[starts]].reset_index(drop=True)
    averaged["repetition"] = counts
    return replace(responses, data=data, trials=averaged)
