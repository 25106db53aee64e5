"""Averaging the repetitions of an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from braindecode_vis.arrays import Responses


def average_repetitions(responses: Responses) -> Responses:
    """Average the trials of each subject and stimulus, in order of first appearance.

    Returns
    -------
    Responses
        One trial per subject and stimulus; `repetition` becomes the number of trials averaged.
    """
    keys = responses.trials.groupby(["subject", "stimulus_id"], sort=False).ngroup().to_numpy()
    n_groups = int(keys.max()) + 1 if len(keys) else 0
    if n_groups == len(keys):
        return responses
    order = np.argsort(keys, kind="stable")
    starts = np.searchsorted(keys[order], np.arange(n_groups))
    counts = np.diff(np.append(starts, len(keys)))
    data = np.empty((n_groups, *responses.data.shape[1:]), dtype=np.float32)
    for group, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows = np.sort(order[start : start + count])
        data[group] = responses.data[rows].mean(axis=0, dtype=np.float64)
    trials = responses.trials.iloc[order[starts]].reset_index(drop=True)
    trials["repetition"] = counts
    return replace(responses, data=data, trials=trials)
