"""Columns chosen inside a cut: by its training trials, as many as it has, and applied to whatever is asked."""

from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.analyses.generalization import TimeGeneralizationConfig
from braindecode_vis.parts.analyses.measure import compute_hits
from braindecode_vis.parts.analyses.regions import NetworkAblationConfig
from braindecode_vis.parts.analyses.study import ChoosingEncoder, choose_features, fit_picked, show_chosen
from braindecode_vis.parts.analyses.windows import SlidingWindowConfig
from braindecode_vis.preprocessing.selection import SelectionConfig
from tests.parts.analyses.planted import make_epochs_study, make_parcel_study, refit_and_rank


def choose_in(study, seen=None, **options):
    """Return the study with a choice of columns; `seen` collects the trials of every choice."""
    config = SelectionConfig.model_validate(options)

    def choose(number, change):
        train = study.responses.select(study.folds[number].train)
        train = train if change is None else change(train)
        if seen is not None:
            seen.append(train)
        targets = study.banks[number].select(list(dict.fromkeys(train.stimulus_ids)))
        return choose_features(config, train, targets, seed=0)

    return replace(study, choose=choose)


def test_every_window_chooses_by_its_own_training_trials():
    seen = []
    study = choose_in(make_epochs_study(onset=0.1, noise=1.0), seen, encoding={"n_best": 4})
    found = SlidingWindowConfig(metric="two_way", width=0.1, step=0.1).compute(study)
    assert len(seen) == len(found.table)
    assert {train.data.shape[2] for train in seen} == {10}
    assert all((train.trials["split"] == "train").all() for train in seen)
    assert found.table["value"].iloc[-1] > 0.8
    last = study.choose(0, lambda responses: responses).keep[""]
    assert np.flatnonzero(last).tolist() == [12, 13, 14, 15]  # where the response was planted


def test_test_trials_change_no_choice():
    study = make_epochs_study(noise=2.0)
    spoilt = np.array(study.responses.data)
    spoilt[study.folds[0].test] *= 1e3
    other = replace(study, responses=replace(study.responses, data=spoilt))
    options = {"encoding": {"n_best": 3}}
    chosen = [choose_in(s, **options).choose(0, None).keep[""] for s in (study, other)]
    np.testing.assert_array_equal(*chosen)


def test_a_part_with_fewer_columns_than_are_kept_keeps_them_all():
    study = choose_in(make_parcel_study({"Vis": 1.0, "Default": 0.0}, noise=2.0), encoding={"n_best": 10})
    found = NetworkAblationConfig(n_random=0).compute(study).table.set_index(["group", "mode"])
    assert found.loc[("Vis", "only"), "value"] > 0.8 > found.loc[("Default", "only"), "value"]
    zeroed = (
        NetworkAblationConfig(n_random=0, outside="zero").compute(study).table.set_index(["group", "mode"])
    )
    assert zeroed.loc[("Vis", "only"), "value"] > 0.8 > zeroed.loc[("Default", "only"), "value"]


def test_a_window_without_a_column_above_the_threshold_keeps_its_best_one():
    study = choose_in(make_epochs_study(onset=0.1, noise=1.0), encoding={"threshold": 0.3})
    found = SlidingWindowConfig(metric="two_way", width=0.1, step=0.1).compute(study).table
    assert found["value"].iloc[0] < 0.8 < found["value"].iloc[-1]
    plain = SelectionConfig.model_validate({"encoding": {"n_best": 2}})
    with pytest.raises(ConfigError, match="needs the embeddings"):
        choose_features(plain, study.responses.select(np.arange(2)), None, seed=0)


def test_generalisation_tests_other_windows_with_the_columns_of_training():
    study = choose_in(make_epochs_study(onset=0.1, noise=1.0), encoding={"n_best": 4})
    found = TimeGeneralizationConfig(width=0.1, step=0.1).compute(study).table
    assert found["value"].iloc[-1] > 0.8


def test_the_chosen_encoder_is_otherwise_the_encoder():
    study = choose_in(make_parcel_study({"Vis": 1.0, "Default": 0.0}), encoding={"n_best": 6})
    encoder = fit_picked(study, 0, study.pick(study.folds[0].train, "train"), None)
    assert isinstance(encoder, ChoosingEncoder)
    assert encoder.map_targets is not None
    with pytest.raises(AttributeError):
        _ = encoder.nothing_like_it
    test = study.pick(study.folds[0].test, "test")
    inner, shown, keep = show_chosen(encoder, test)
    assert shown.data.shape[1] == keep.sum() == 6
    np.testing.assert_array_equal(inner.predict(shown).vectors, encoder.predict(test).vectors)
    assert show_chosen(inner, test)[1:] == (test, None)
    assert compute_hits(refit_and_rank(study)[0], "2_way").mean() > 0.9
