"""Trials of imagery whose stimulus has no picture: a category, a word, or a picture that is not shown again.

Owns which test trials these are. They have no row in the bank of image embeddings and no image to compare a
reconstruction with, so retrieval and reconstruction leave them out; the analysis `imagery` identifies them. A trial
that is not of imagery must have shown a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.stimuli import StimulusSet

IMAGERY_TASK = "imagery"  # the value of the trial column `task` that every data set uses


def part_imagined(
    trials: pd.DataFrame, stimuli: StimulusSet, folds: Sequence[Fold]
) -> tuple[tuple[Fold, ...], tuple[np.ndarray, ...]]:
    """Part the test trials of every fold into those that show a picture and those that imagine without one.

    Parameters
    ----------
    trials
        The trial table.
    stimuli
        The images. Where none of them are at hand, nothing is parted.
    folds
        Rows of `trials`.

    Returns
    -------
    folds
        The same folds, tested on trials with a picture; the test part of a fold may be empty.
    imagined
        Rows of the other test trials of each fold.

    Raises
    ------
    DataError
        If a trial without a picture is not of the task `imagery`, or is trained on.
    """
    nothing = np.array([], dtype=int)
    if stimuli.has_picture.all() or not stimuli.has_pixels:
        return tuple(folds), tuple(nothing for _ in folds)
    ids = trials["stimulus_id"].to_numpy(dtype=object)
    bare = ~stimuli.has_picture[stimuli.find_rows(ids)]
    tasks = trials["task"].astype(str).to_numpy() if "task" in trials else np.full(len(trials), "")
    wrong = np.flatnonzero(bare & (tasks != IMAGERY_TASK))
    if len(wrong):
        raise DataError(
            f"the stimulus {ids[wrong[0]]!r} of trial {wrong[0]} has no picture; only test trials whose column task "
            f"says {IMAGERY_TASK} may do without. Add its image, or leave the trial out."
        )
    for number, fold in enumerate(folds):
        learnt = fold.train[bare[fold.train]]
        if len(learnt):
            raise DataError(
                f"fold {number} trains on {len(learnt)} trials without a picture, first {ids[learnt[0]]!r}; choose a "
                "split that only tests imagery, for example split.kind published."
            )
    return (
        tuple(Fold(fold.train, fold.test[~bare[fold.test]]) for fold in folds),
        tuple(fold.test[bare[fold.test]] for fold in folds),
    )
