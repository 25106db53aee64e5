"""Few-shot curves: others help where brains are alike, and what cannot be compared is named."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.roles import build
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.encoders.average import AverageConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.analyses.few_shot import FewShotConfig, find_trial_seconds, set_alignment
from braindecode_vis.parts.analyses.study import Study
from braindecode_vis.preprocessing.array_file import KeptParts
from braindecode_vis.preprocessing.common_space import name_alignment
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.splits import LeaveOneSubjectOutConfig, PublishedSplitConfig
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import make_parcel_study
from tests.preprocessing.test_common_space import make_world
from tests.training.toy_task import make_config


def make_brains(*, split=None, config=None, **options):
    """Return a study of three subjects with voxels of their own, whose responses have one geometry."""
    options = {"rotated": True, "n_unseen": 16, "noise": 3.0, "n_test": 30, **options}
    responses, bank = make_world(**options)
    trials = responses.trials.assign(onset=4.0 * np.arange(responses.n_trials))
    responses = responses.with_trials(trials)
    folds = (split or PublishedSplitConfig()).make(trials, trials["concept"].to_numpy(), seed=0).folds
    table = pd.DataFrame({"stimulus_id": bank.ids, "concept": "c", "path": "", "sha256": bank.ids})
    config = config or RidgeConfig(alphas=(10.0,))
    return Study(
        responses=responses, stimuli=StimulusSet(table, pixels=np.zeros((len(bank), 2, 2, 3), np.uint8)), folds=folds,
        banks=[bank] * len(folds), pick=lambda rows, part: average_repetitions(responses, rows),
        build=lambda number: config.build(seed=number), trained=lambda number: None, centre="mean",
        protocol="planted", seed=0, n_bootstrap=100, n_permutations=100,
    )  # fmt: skip


def test_members_of_an_average_are_aligned_alike():
    """Members kept an alignment of their own, and a curve of features in common was none."""
    ridge = {"kind": "ridge", "subject_alignment": "procrustes"}
    average = AverageConfig.model_validate({"members": [ridge, {"kind": "ridge"}]})
    encoder = build(BrainEncoder, average, seed=0)
    for asked in ("none", "hyperalignment"):
        set_alignment(encoder, asked)
        assert {name_alignment(m.config.subject_alignment) for m in encoder.members} == {asked}
    average = AverageConfig.model_validate({"members": [ridge, {"kind": "linear_gaussian"}]})
    with pytest.raises(ConfigError, match="LinearGaussianEncoder has no setting subject_alignment"):
        set_alignment(build(BrainEncoder, average, seed=0), "hyperalignment")


def test_a_few_trials_beside_those_of_others_beat_a_few_alone(tmp_path):
    study = replace(make_brains(), kept=KeptParts(tmp_path))
    config = replace_constants(FewShotConfig, n_components=8, n_draws=2)(
        metric="top1", methods=("scratch", "anatomical", "hyperalignment"), numbers=(0, 12, 60)
    )
    found = config.compute(study)
    table = found.table.set_index(["method", "trials"])
    assert table.loc[("hyperalignment", 12), "difference_low"] > 0
    assert table.loc[("hyperalignment", 12), "value"] > 0.2 > 3 * table.loc[("scratch", 12), "chance"]
    assert table.loc[("scratch", 60), "value"] > table.loc[("scratch", 12), "value"]
    assert table.loc[("scratch", 12), "minutes"] == pytest.approx(12 * 4 / 60)
    assert table["n_draws"].tolist() == [2, 1, 2, 1]
    assert (
        "few-shot: hyperalignment of all by training images, 12 training"
        in table.loc[("hyperalignment", 12), "protocol"]
    )
    assert "anatomical with 0 trials: every subject has different voxels" in found.summary
    assert {score.protocol for score in found.scores} == set(table["protocol"])
    assert render_plot(found.plots[0].draw)
    # What was measured is kept, and gives the same table.
    again = config.compute(
        replace(study, build=lambda number: pytest.fail("fitted again"), kept=KeptParts(tmp_path))
    )
    pd.testing.assert_frame_equal(found.table, again.table)


def test_features_in_common_need_no_trial_of_a_new_subject():
    study = make_parcel_study(
        {"Vis": 1.0, "Default": 0.0}, subjects=("01", "02", "03"), noise=2.0, n_train=32
    )
    found = FewShotConfig(methods=("scratch", "anatomical", "fine_tuned"), numbers=(0, 8)).compute(study)
    table = found.table.set_index(["method", "trials"])
    assert table.loc[("anatomical", 0), "value"] > 0.8
    assert table.loc[("fine_tuned", 8), "value"] > table.loc[("scratch", 8), "value"]
    assert "zero-shot: no trial of the subject" in table.loc[("anatomical", 0), "protocol"]
    assert np.isnan(table["minutes"]).all()
    assert "minutes" not in found.plots[0].alt


def test_folds_that_leave_subjects_out_give_the_same_newcomers_and_no_signal_is_chance():
    config = replace_constants(FewShotConfig, n_components=8, n_draws=1)(
        methods=("scratch", "procrustes"), numbers=(20,)
    )
    split = LeaveOneSubjectOutConfig(own_trials=3)
    tables = [config.compute(make_brains(split=s, snr=0.0, n_train=40)).table for s in (None, split)]
    pd.testing.assert_frame_equal(tables[0][["method", "trials", "n"]], tables[1][["method", "trials", "n"]])
    for table in tables:
        assert ((table["ci_low"] < 0.5) & (table["ci_high"] > 0.5)).all()


@pytest.mark.slow
def test_the_layer_of_a_new_subject_is_tuned_alone():
    """MindEye2's protocol: the shared part of the others stays, and one layer is learnt from the new subject."""
    network = {"kind": "shared_space", "shared": 16}
    config = make_config(network=network, epochs=25)
    study = make_brains(config=config, noise=1.0)
    found = replace_constants(FewShotConfig, n_draws=1)(
        metric="top1", methods=("scratch", "fine_tuned"), numbers=(30,)
    ).compute(study)
    table = found.table.set_index("method")
    assert table.loc["fine_tuned", "value"] > 3 / 30
    assert "Left out" not in found.summary


def test_what_few_shot_cannot_do_is_said():
    alone = make_parcel_study({"Vis": 1.0}, n_train=12)
    with pytest.raises(DataError, match="training trials of other subjects than 01"):
        FewShotConfig().compute(alone)
    both = make_parcel_study({"Vis": 1.0}, n_train=12, subjects=("01", "02"))
    with pytest.raises(ConfigError, match=r"selection\.reliability"):
        FewShotConfig().compute(replace(both, choose=lambda number, change: object()))
    with pytest.raises(
        DataError, match="no method for a new subject works with this run: every subject has different voxels"
    ):
        FewShotConfig(methods=("anatomical",), numbers=(0,)).compute(make_brains())
    with pytest.raises(ValueError, match="one is -1"):
        FewShotConfig(numbers=(-1,))


def test_seconds_per_trial_come_from_onsets_within_runs():
    trials = pd.DataFrame(
        {"subject": "a", "session": "1", "run": ["1"] * 3 + ["2"] * 2, "onset": [1, 3, 7, 100, 102.0]}
    )
    assert find_trial_seconds(trials) == pytest.approx(8 / 3)
    assert np.isnan(find_trial_seconds(trials.drop(columns="onset")))


def test_numbers_that_nobody_has_are_refused_or_named_and_not_replaced():
    study = make_brains()
    with pytest.raises(ConfigError, match="one subject has 60 training trials"):
        FewShotConfig(methods=("scratch",), numbers=(100, 5000)).compute(study)
    with pytest.raises(ConfigError, match="only 0, which needs the method anatomical"):
        FewShotConfig(methods=("scratch",), numbers=(0,)).compute(study)
    found = replace_constants(FewShotConfig, n_draws=1)(methods=("scratch",), numbers=(12, 5000)).compute(
        study
    )
    assert "Left out: 5000 trials: one subject has 60." in found.summary


def test_voxels_of_one_brain_are_not_those_of_another():
    """Two subjects with voxels of their own: a ridge of one took the voxels of the other for the same."""
    study = make_brains()
    responses = study.responses.select(np.flatnonzero(study.responses.trials["subject"].isin(["a", "b"])))
    folds = LeaveOneSubjectOutConfig().make(
        responses.trials, responses.trials["concept"].to_numpy(dtype=object), seed=0
    ).folds  # fmt: skip
    study = replace(
        study, responses=responses, folds=folds, banks=list(study.banks) * 2,
        pick=lambda rows, part: average_repetitions(responses, rows),
    )  # fmt: skip
    found = replace_constants(FewShotConfig, n_draws=1)(
        methods=("scratch", "fine_tuned"), numbers=(12,)
    ).compute(study)
    assert found.table["method"].tolist() == ["scratch"]
    assert "fine_tuned with 12 trials: this ridge was fitted on voxels of subject" in found.summary
    train, test = responses.select(folds[0].train), responses.select(folds[0].test)
    ridge = RidgeConfig(alphas=(10.0,)).build(seed=0)
    ridge.fit(train, study.banks[0].select(list(train.stimulus_ids)))
    with pytest.raises(DataError, match="but a have different voxels"):
        ridge.predict(test)


def test_who_was_pretrained_on_is_not_new():
    study = replace(make_brains(), protocol="planted; encoder pretrained without labels on training trials")
    with pytest.raises(ConfigError, match="pretrains its encoder on their training trials"):
        FewShotConfig(methods=("scratch",), numbers=(12,)).compute(study)


def test_pairs_of_a_new_subject_are_the_context_of_what_the_others_taught(monkeypatch):
    """Brains of different geometry, of which ridge knows no more than the few trials of the new subject."""
    quick = {"kind": "in_context", "simulated_steps": 0, "people_steps": 0}
    monkeypatch.setattr(
        "braindecode_vis.parts.analyses.few_shot.validate_component",
        lambda role, _: validate_component(role, quick),
    )
    study = make_brains(rotated=False, noise=2.0, n_train=120)
    config = replace_constants(FewShotConfig, n_draws=1)(methods=("scratch", "in_context"), numbers=(0, 16))
    found = config.compute(study)
    table = found.table.set_index(["method", "trials"])
    assert table.loc[("in_context", 16), "value"] > table.loc[("scratch", 16), "value"]
    assert "16 training trials of the subject as context" in table.loc[("in_context", 16), "protocol"]
    assert "in_context with 0 trials: in_context has no context of subject a" in found.summary
    # Where features correspond, the others are the context of a subject without trials.
    common = make_parcel_study(
        {"Vis": 1.0, "Default": 0.0}, subjects=("01", "02", "03"), noise=2.0, n_train=32
    )
    found = FewShotConfig(methods=("in_context",), numbers=(0, 8)).compute(common).table.set_index("trials")
    assert found.loc[0, "value"] > 0.8
    assert found.loc[8, "value"] > 0.8
