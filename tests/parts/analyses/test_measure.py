"""Intervals of what analyses measure."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.parts.analyses.measure import Meter, measure_changes
from braindecode_vis.parts.analyses.study import rank_trials
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.scoring.metrics.identification import leave_out_images
from braindecode_vis.scoring.retrieval import compute_similarity
from braindecode_vis.scoring.uncertainty import FOLD_FACTOR, jackknife_interval
from tests.parts.analyses.planted import make_epochs_study


def find_left_out(study, n):
    """Return n-way identification without each image, from the similarities of every fold."""
    tables, truths, names = [], [], []
    for number, fold in enumerate(study.folds):
        test = study.pick(fold.test, "test")
        queries, gallery, _ = rank_trials(study, number, test, study.trained(number))
        tables.append(compute_similarity(queries, gallery))
        truths.append(pd.Index(gallery.ids).get_indexer(pd.Index(queries.ids)))
        names.append(gallery.ids)
    return leave_out_images(tables, truths, names, n, ties="shared")


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize(("metric", "n"), [("two_way", 2), ("4_way", 4)])
def test_identification_has_the_jackknife(metric, n, averaged):
    """A bootstrap of predictions covered .69 to .92 near the ends: predictions that share a distractor go together."""
    study = make_epochs_study(gain=0.3, noise=3.0, averaged=averaged, n_permutations=20)
    found = measure_changes(study, {"all": None}, metric)["all"]
    row, expected = found.as_row(study), jackknife_interval(found.value, find_left_out(study, n))
    assert 0 < row["value"] < 1
    np.testing.assert_allclose([row["ci_low"], row["ci_high"]], [expected.low, expected.high], rtol=1e-9)
    assert row["resampled"] == "images (jackknife)"


def test_folds_widen_the_jackknife_and_each_image_leaves_its_own_fold():
    study = make_epochs_study(gain=0.3, noise=3.0, n_permutations=20)
    train, test = study.folds[0].train, study.folds[0].test
    halves = np.array_split(test, 2)
    study = study.__class__(
        **{**vars(study), "folds": [Fold(train, half) for half in halves], "banks": study.banks * 2}
    )
    found = measure_changes(study, {"all": None}, "two_way")["all"]
    expected = jackknife_interval(found.value, find_left_out(study, 2), widen=FOLD_FACTOR)
    row = found.as_row(study)
    np.testing.assert_allclose([row["ci_low"], row["ci_high"]], [expected.low, expected.high], rtol=1e-9)
    assert row["resampled"] == "images (jackknife), widened by sqrt 2 after folds"


def test_hits_and_several_subjects_keep_their_intervals():
    one = make_epochs_study(gain=0.3, noise=3.0, n_permutations=20)
    assert "jackknife" not in measure_changes(one, {"all": None}, "top1")["all"].as_row(one)["resampled"]
    three = make_epochs_study(gain=0.3, noise=3.0, n_permutations=20, subjects=("01", "02", "03"))
    row = measure_changes(three, {"all": None}, "two_way")["all"].as_row(three)
    assert "jackknife" not in row["resampled"]
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_an_interrupted_analysis_goes_on_with_the_same_interval():
    study = make_epochs_study(gain=0.3, noise=3.0, n_permutations=20)
    meter, test = Meter(study, "two_way"), study.pick(study.folds[0].test, "test")
    made = meter.measure_fold(0, test, study.trained(0))
    kept = {
        name: np.stack([getattr(made, name)])
        for name in ("values", "chance", "table_sum", "null", "left_out")
    }
    again = Meter(study, "two_way").restore(test, kept, 0)
    assert Meter.join([again]).as_row(study) == Meter.join([made]).as_row(study)
