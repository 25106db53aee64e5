import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.registry import list_inside, validate_component
from braindecode_vis.preprocessing.alignment import fit_zscore
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.splits import (
    Fold,
    GroupKFoldSplitConfig,
    KFoldSplitConfig,
    LeaveOneGroupOutConfig,
    LeaveOneSubjectOutConfig,
    PublishedSplitConfig,
    Split,
    make_inner_folds,
)


def make_trials(n_images=20, n_repeats=3):
    ids = np.repeat([f"image{i:02d}" for i in range(n_images)], n_repeats)
    return pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "stimulus_id": ids,
            "repetition": np.tile(np.arange(n_repeats), n_images),
            "split": np.where(np.arange(len(ids)) < 45, "train", "test"),
        }
    )  # fmt: skip


def make_concepts(trials):
    return np.array(["even" if int(i[-1]) % 2 == 0 else "odd" for i in trials["stimulus_id"]], dtype=object)


def test_folds_cover_every_trial_once_and_keep_images_and_classes_together():
    trials = make_trials()
    concepts = make_concepts(trials)
    split = KFoldSplitConfig(n_folds=5).make(trials, concepts, seed=0)
    tested = np.concatenate([fold.test for fold in split.folds])
    assert sorted(tested) == list(range(len(trials)))
    for fold in split.folds:
        assert (concepts[fold.test] == "even").sum() == (concepts[fold.test] == "odd").sum()
    assert split.protocol == "stratified 5-fold over 20 images (seed 0)"
    back = Split.from_json(split.as_json(), trials)
    np.testing.assert_array_equal(back.folds[2].train, split.folds[2].train)


def test_folds_by_name_are_those_of_other_data_with_these_images():
    trials = make_trials()
    some = trials[trials["stimulus_id"].isin(trials["stimulus_id"].unique()[5:])][::-1].reset_index(drop=True)
    config = KFoldSplitConfig(n_folds=3, stratify=False, by_name=True)

    def tested(table, **options):
        folds = config.make(table, make_concepts(table), seed=0, **options).folds
        return [set(table["stimulus_id"].iloc[fold.test]) for fold in folds]

    assert [fold & set(some["stimulus_id"]) for fold in tested(trials)] == tested(some)
    with pytest.raises(ValidationError, match="set stratify to false"):
        KFoldSplitConfig(by_name=True)
    with pytest.raises(ConfigError, match="needs trials that show images"):
        tested(trials, knows_images=False)
    config = config.model_copy(update={"n_folds": 20})
    with pytest.raises(ConfigError, match="no name of the 20 images falls into fold"):
        tested(trials)


def test_the_published_split_is_taken_from_the_table():
    trials = make_trials()
    split = PublishedSplitConfig().make(trials, make_concepts(trials), seed=0)
    assert (len(split.folds[0].train), len(split.folds[0].test)) == (45, 15)
    with pytest.raises(ConfigError, match="declares no train/test split"):
        PublishedSplitConfig().make(trials.assign(split="all"), make_concepts(trials), seed=0)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([([0, 1, 2], [2, 3])], "has trial 2 in both training and test"),
        ([([0, 1], [2, 3])], r"1 image\(s\) in both training and test, first 'image00'"),
        ([([0, 1, 2], [3, 4]), ([0, 1, 2], [4, 5])], "tests trial 4 a second time"),
        ([([0, 1, 2], [])], "3 training and 0 test trials"),
    ],
)
def test_a_leaking_split_refuses_to_exist(folds, message):
    built = tuple(Fold(np.array(train, int), np.array(test, int)) for train, test in folds)
    with pytest.raises(DataError, match=message):
        Split("planted", built, make_trials())


def test_more_folds_than_images_is_an_error():
    trials = make_trials(n_images=4)
    with pytest.raises(
        ConfigError, match=r"n_folds is 10, but there are only 4 images; set it to at most that many"
    ):
        KFoldSplitConfig(n_folds=10).make(trials, make_concepts(trials), seed=0)


def test_inner_folds_never_part_an_image():
    ids = make_trials()["stimulus_id"].to_numpy(dtype=object)
    for fold in make_inner_folds(ids, n_folds=4, generator=np.random.default_rng(0)):
        assert not set(ids[fold.train]) & set(ids[fold.test])
        assert len(fold.train) + len(fold.test) == len(ids)


def test_averaging_equals_a_plain_loop():
    trials = make_trials().sample(frac=1, random_state=0).reset_index(drop=True)
    data = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    averaged = average_repetitions(Responses(data, ("trial", "voxel"), trials, "z"))
    assert averaged.n_trials == 20
    for row, name in enumerate(averaged.stimulus_ids):
        expected = data[(trials["stimulus_id"] == name).to_numpy()].mean(0)
        np.testing.assert_allclose(
            averaged.data[row], expected, rtol=1e-6, atol=1e-7
        )  # order of a float32 sum
    assert (averaged.trials["repetition"] == 3).all()


def test_zscore_is_that_of_the_training_rows():
    data = 1e6 + np.random.default_rng(0).normal(size=(50, 3))
    data[:, 2] = 5
    scaled = fit_zscore(data).apply(data)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=0.05)  # the mean is kept in single precision
    np.testing.assert_allclose(scaled[:, :2].std(0), 1, rtol=1e-3)
    assert (scaled[:, 2] == 0).all()


def test_what_was_seen_is_not_averaged_with_what_was_imagined():
    """The imagery session shows and asks for the same stimuli; both were averaged into one response."""
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "1", "run": "1", "stimulus_id": ["a", "a", "a", "b"],
            "repetition": 0, "split": "test", "task": ["vision", "imagery", "vision", "vision"],
        }
    )  # fmt: skip
    data = np.array([[1.0], [10.0], [3.0], [5.0]], np.float32)
    averaged = average_repetitions(Responses(data, ("trial", "voxel"), trials, "z"))
    assert averaged.data[:, 0].tolist() == [2.0, 10.0, 5.0]
    assert averaged.trials["task"].tolist() == ["vision", "imagery", "vision"]


def test_leave_one_subject_out_meets_neither_the_person_nor_the_image():
    trials = pd.concat([make_trials().assign(subject=name) for name in ("01", "02", "03")], ignore_index=True)
    split = LeaveOneSubjectOutConfig().make(trials, make_concepts(trials), seed=0)
    assert len(split.folds) == 3
    for fold, name in zip(split.folds, ("01", "02", "03"), strict=True):
        assert set(trials["subject"].iloc[fold.test]) == {name}
        assert set(trials["subject"].iloc[fold.train]) == {"01", "02", "03"} - {name}
        assert (trials["split"].iloc[fold.train] == "train").all()
        assert (trials["split"].iloc[fold.test] == "test").all()
    with pytest.raises(ConfigError, match="needs two subjects, but only subject 01"):
        LeaveOneSubjectOutConfig().make(make_trials(), make_concepts(make_trials()), seed=0)
    leaking = trials.assign(stimulus_id="same")
    with pytest.raises(DataError, match=r"has 1 image\(s\) in both training and test"):
        LeaveOneSubjectOutConfig().make(leaking, make_concepts(trials), seed=0)


def make_zero_shot():
    """Four training and two test concepts of two images, in two sessions."""
    names = [f"{concept}_{n}" for concept in ("cat", "cup", "key", "owl", "bee", "fan") for n in (1, 2)]
    trials = pd.DataFrame(
        {
            "subject": "01", "session": np.repeat(["01", "02"], 12), "run": "01", "stimulus_id": names * 2,
            "repetition": np.repeat([0, 1], 12), "split": np.where(np.arange(24) % 12 < 8, "train", "test"),
        }
    )  # fmt: skip
    return trials, trials["stimulus_id"].str[:3].to_numpy(dtype=object)


def test_a_published_split_says_what_its_sides_do_not_share():
    trials, concepts = make_zero_shot()
    split = PublishedSplitConfig(require=("concept",)).make(trials, concepts, seed=0)
    assert split.by == ("image", "concept")
    record = split.as_json()
    assert record["by"] == ["image", "concept"]
    assert Split.from_json(record, trials, concepts).by == ("image", "concept")
    assert Split.from_json(record, trials).by == ("image",)  # nobody knows the concepts there
    later = trials.assign(split=np.where(trials["session"] == "01", "train", "test"))
    later["stimulus_id"] += later["session"]
    assert PublishedSplitConfig().make(later, concepts, seed=0).by == (
        "image",
        "repetition",
        "session",
        "run",
    )
    assert "require" not in PublishedSplitConfig(require=("concept",)).hashed_fields()


@pytest.mark.parametrize("side", ["concept", "session", "run", "subject", "repetition"])
def test_what_is_required_and_not_so_is_refused(side):
    trials, concepts = make_zero_shot()
    concepts[-1] = "cat"
    with pytest.raises(
        DataError, match=rf"\d {side}\(s\) in both training and test, first .*: split by {side}"
    ):
        PublishedSplitConfig(require=(side,)).make(trials, concepts, seed=0)


def test_a_record_that_was_tampered_with_or_is_old(tmp_path):
    trials, concepts = make_zero_shot()
    record = PublishedSplitConfig().make(trials, concepts, seed=0).as_json()
    assert Split.from_json({**record, "by": "stimulus_id"}, trials).by == ("image",)
    with pytest.raises(DataError, match=r"2 session\(s\) in both training and test"):
        Split.from_json({**record, "by": ["image", "session"]}, trials)
    with pytest.raises(DataError, match=r"concept\(s\) in both training and test"):
        Split.from_json(record, trials, np.full(24, "cat"))
    with pytest.raises(DataError, match="is by 'galaxy', which is unknown"):
        Split.from_json({**record, "by": ["galaxy"]}, trials)
    with pytest.raises(DataError, match="no column concept"):
        Split("x", (Fold(np.arange(8), np.arange(8, 12)),), trials, ("concept",))


def test_two_groups_are_enough_to_leave_one_out():
    trials = make_trials().assign(group=np.arange(len(make_trials())) % 2)
    split = LeaveOneGroupOutConfig().make(trials, make_concepts(trials), seed=0)
    assert split.protocol.startswith("leave one group out (2 groups)")
    with pytest.raises(ConfigError, match="needs two groups"):
        LeaveOneGroupOutConfig().make(trials.assign(group=0), make_concepts(trials), seed=0)


@pytest.mark.parametrize("config", [LeaveOneGroupOutConfig, GroupKFoldSplitConfig])
@pytest.mark.parametrize("images", [False, True])
def test_images_of_tested_groups_leave_the_training_where_that_is_asked(config, images):
    """Each session shows four of six images: the others' trials of the tested four must go, and no others."""
    shown = {"a": [0, 1, 2, 3], "b": [2, 3, 4, 5], "c": [0, 1, 4, 5]}
    trials = pd.DataFrame(
        [
            {"subject": "01", "session": session, "run": "01", "stimulus_id": f"image{k}", "repetition": 0}
            for session, ids in shown.items() for k in ids
        ]
    ).assign(split="all")  # fmt: skip
    options = {"n_folds": 3} if config is GroupKFoldSplitConfig else {}
    split = config(by="session", images=images, **options).make(trials, make_concepts(trials), seed=0)
    assert len(split.folds) == 3
    ids, sessions = trials["stimulus_id"].to_numpy(), trials["session"].to_numpy()
    for fold in split.folds:
        (session,) = set(sessions[fold.test])
        assert len(fold.test) == 4
        tested = set(ids[fold.test]) if images else set()
        expected = [k for k in range(12) if sessions[k] != session and ids[k] not in tested]
        assert fold.train.tolist() == expected
    assert ("their images left out of the training" in split.protocol) == images
    same = trials.assign(stimulus_id="image1")
    if images:
        with pytest.raises(ConfigError, match="every session shows the same images"):
            config(by="session", images=True, **options).make(same, make_concepts(same), seed=0)


@pytest.mark.parametrize("kind", sorted(list_inside("split")))
def test_a_split_that_tests_declared_training_trials_says_so(kind):
    """What is learnt before the split, from declared training trials, would know what it tests."""
    trials = make_trials()
    trials = trials.assign(
        subject=np.where(trials["repetition"] == 1, "02", "01"),
        run=[f"{row // 3 % 2}" for row in range(len(trials))],
        group=[f"g{row % 4}" for row in range(len(trials))],
    )
    needed = {"group_kfold": {"n_folds": 2}, "kfold": {"n_folds": 2}}.get(kind, {})
    config = validate_component("split", {"kind": kind, **needed})
    folds = config.make(trials, make_concepts(trials), seed=0).folds
    is_declared = (trials["split"] == "train").to_numpy()
    assert config.tests_training_trials == any(is_declared[fold.test].any() for fold in folds)
    assert config.is_declared == all((is_declared[fold.train].all() and len(folds) == 1) for fold in folds)


def test_groups_go_to_five_folds_unless_another_number_is_named():
    trials = make_trials(n_images=12).assign(session=np.repeat(list("abcdef"), 6))
    concepts = make_concepts(trials)
    for options, n_folds in (({}, 5), ({"n_folds": 2}, 2)):
        split = GroupKFoldSplitConfig(by="session", **options).make(trials, concepts, seed=0)
        assert len(split.folds) == n_folds
    with pytest.raises(ConfigError, match="n_folds is 5, but there are only 4 sessions"):
        GroupKFoldSplitConfig(by="session").make(trials[:24], concepts[:24], seed=0)
