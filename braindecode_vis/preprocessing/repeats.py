"""Picking trials and averaging the repetitions of an image, without copying what does not fit in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Responses, TrialRows

#: Picked trials of more bytes than this stay in their file, and averages of more than this are taken when asked for.
MAX_COPIED_BYTES = 64 << 20
MAX_AVERAGED_BYTES = 1 << 30


def pick_rows(responses: Responses, rows: np.ndarray) -> Responses:
    """Return the given trials, in this order, as they are.

    Trials that lie in a file and are many are not copied: neighbouring ones become a slice of the memory map, others
    `TrialRows` of it.

    Parameters
    ----------
    responses
        Trials, possibly memory-mapped.
    rows : int array
        Row numbers.
    """
    rows = np.asarray(rows)
    n_bytes = len(rows) * (responses.data.nbytes // max(1, len(responses.data)))
    if not _lies_in_file(responses.data) or n_bytes <= MAX_COPIED_BYTES:
        return responses.select(rows)
    data: Any
    if isinstance(responses.data, TrialRows):
        data = _take(responses.data, rows)
    elif (np.diff(rows) == 1).all():
        data = responses.data[rows[0] : rows[-1] + 1]
    else:
        data = TrialRows(responses.data, rows)
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    return Responses.from_checked(data, responses.dims, trials, responses.unit, responses.coords)


def average_repetitions(responses: Responses, rows: np.ndarray | None = None) -> Responses:
    """Average the trials of each subject and stimulus, in order of first appearance.

    Where the trial table has a column `task`, what was seen is not averaged with what was imagined.
    Trials are read group by group, so only the averages are held in memory; where they would take more than 1 GiB,
    they are `TrialRows`, averaged whenever they are read.

    Parameters
    ----------
    responses
        Trials, possibly memory-mapped.
    rows : int array, optional
        The trials that take part; all by default.

    Returns
    -------
    Responses
        One float32 trial per subject and stimulus (and task); `repetition` becomes the number of trials averaged, and
        the column `n_averaged` tells how many repetitions each is the mean of. Nothing changes where none is repeated.
    """
    rows = np.arange(responses.n_trials) if rows is None else np.asarray(rows)
    trials = responses.trials.iloc[rows]
    keys = ["subject", "stimulus_id", *(["task"] if "task" in trials else [])]
    groups = trials.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    # Nothing is repeated, so nothing is copied.
    if n_groups == len(groups):
        return pick_rows(responses, rows)
    # Trials of a group lie together in `order`, in the order of the file: starts[g] is where group g begins.
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(n_groups))
    counts = np.diff(np.append(starts, len(groups)))
    averaged = trials.iloc[order[starts]].reset_index(drop=True)
    averaged["repetition"] = counts
    behind = responses.n_averaged[rows][order]
    averaged["n_averaged"] = np.add.reduceat(behind, starts).astype(int)
    source: Any = responses.data
    if isinstance(source, TrialRows) and source.starts is None:  # one step from the file, not two
        source, rows = source.data, source.rows[rows]
    lazy: Any = TrialRows(source, rows[order], starts)
    if lazy.nbytes > MAX_AVERAGED_BYTES and _lies_in_file(responses.data):
        return Responses.from_checked(lazy, responses.dims, averaged, responses.unit, responses.coords)
    return replace(responses, data=np.asarray(lazy), trials=averaged)


def _take(data: TrialRows, numbers: np.ndarray) -> TrialRows:
    """Return some trials of trials that are read on demand, read from the same file."""
    if data.starts is None:
        return TrialRows(data.data, data.rows[numbers])
    ends = np.append(data.starts[1:], len(data.rows))
    parts = [data.rows[data.starts[n] : ends[n]] for n in numbers.tolist()]
    starts = np.cumsum([0, *[len(part) for part in parts[:-1]]])
    return TrialRows(data.data, np.concatenate(parts), starts)


def _lies_in_file(data: np.ndarray | TrialRows) -> bool:
    if isinstance(data, TrialRows):
        return _lies_in_file(data.data)
    return isinstance(data, np.memmap)
