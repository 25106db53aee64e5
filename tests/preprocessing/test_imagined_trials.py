from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.preprocessing.splits import Fold, split_imagined_trials


def make_trials(tasks=("training", "training", "test", "imagery")):
    return pd.DataFrame({"stimulus_id": ["a", "b", "c", "idea"], "task": tasks})


def make_stimuli(root=Path()):
    table = pd.DataFrame({"stimulus_id": ["a", "b", "c", "idea"], "concept": list("abcc")})
    return StimulusSet(table.assign(path=["a.png", "b.png", "c.png", ""], sha256=list("abcd")), root)


def test_imagined_trials_are_parted_from_those_that_show_a_picture():
    folds, imagined = split_imagined_trials(
        make_trials(), make_stimuli(), [Fold(np.array([0, 1]), np.array([2, 3]))]
    )
    assert folds[0].test.tolist() == [2]
    assert imagined[0].tolist() == [3]
    assert make_stimuli().select_pictured().ids.tolist() == ["a", "b", "c"]


def test_pictures_that_are_not_at_hand_part_nothing():
    fold = Fold(np.array([0, 1]), np.array([2, 3]))
    folds, imagined = split_imagined_trials(make_trials(), make_stimuli(None), [fold])
    assert folds[0] is fold
    assert len(imagined[0]) == 0
    assert len(make_stimuli(None).select_pictured()) == 4


def test_only_imagery_that_is_tested_may_lack_its_picture():
    fold = Fold(np.array([0, 1]), np.array([2, 3]))
    with pytest.raises(DataError, match="'idea' of trial 3 has no picture"):
        split_imagined_trials(make_trials(["training", "training", "test", "test"]), make_stimuli(), [fold])
    with pytest.raises(DataError, match="'idea' of trial 3 has no picture"):
        split_imagined_trials(make_trials().drop(columns="task"), make_stimuli(), [fold])
    with pytest.raises(DataError, match="fold 0 trains on 1 trials without a picture"):
        split_imagined_trials(make_trials(), make_stimuli(), [Fold(np.array([0, 1, 3]), np.array([2]))])
