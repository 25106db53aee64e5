import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders import category_decoders as categories
from braindecode_vis.encoders.category_decoders import (
    LdaConfig,
    LogisticConfig,
    find_first_rows,
    find_window,
    make_label_folds,
)
from tests.references import assert_close


def make_trials(n_classes=2, n_trials=120, signal=1.0, seed=0, n_runs=4):
    generator = np.random.default_rng(seed)
    codes = np.arange(n_trials) % n_classes
    data = 1e-6 * generator.normal(size=(n_trials, 3, 8))
    data += 1e-6 * signal * generator.normal(size=(n_classes, 3, 8))[codes]
    names = np.array(["face", "house", "shoe"], dtype=object)[codes]
    runs = [f"{1 + r:02d}" for r in (np.arange(n_trials) * n_runs // n_trials)]
    trials = pd.DataFrame(
        {
            "subject": "01",
            "session": "01",
            "run": runs,
            "stimulus_id": names,
            "repetition": 0,
            "split": "train",
        }
    )
    return Responses(data.astype(np.float32), ("trial", "channel", "time"), trials, "V"), names


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    ("config", "model"),
    [
        (LdaConfig(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")),
        (LogisticConfig(c=(0.1,)), LogisticRegression(C=0.1, max_iter=5000)),
    ],
    ids=["lda", "logistic"],
)
def test_decisions_equal_scikit_learn_and_survive_the_disk(tmp_path, config, model, n_classes):
    responses, labels = make_trials(n_classes)
    train, test = responses.select(np.arange(90)), responses.select(np.arange(90, 120))
    decoder = config.build(seed=0).fit(train, labels[:90])
    reference = make_pipeline(StandardScaler(), model).fit(
        train.as_matrix().astype(np.float64), labels[:90].astype(str)
    )
    expected = reference.predict_proba(test.as_matrix().astype(np.float64))
    assert decoder.classes == tuple(reference.classes_)
    # Only rounding differs: both are double precision.
    assert_close(decoder.decision(test), expected)
    decoder.write(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    back = config.read(tmp_path)
    # Matrix products round by how their operands lie in memory.
    np.testing.assert_allclose(back.decision(test), decoder.decision(test), rtol=1e-12)
    assert back.classes == decoder.classes


@pytest.mark.parametrize(
    ("n", "n_features", "n_classes"), [(240, 30, 2), (60, 200, 3), (12, 50, 2), (20, 1, 2), (300, 40, 8)]
)
def test_lda_is_that_of_scikit_learn_with_few_trials_and_many(n, n_features, n_classes):
    """Both are double precision; a class has two trials at the least, some features are constant."""
    generator = np.random.default_rng(0)
    codes = np.arange(n) % n_classes
    data = 5 + generator.normal(size=(n, n_features)) * generator.uniform(0.1, 10, n_features)
    data[:, : 1 + n_features // 10] += codes[:, None]
    if n_features > 4:
        data[:, 3] = 7
    labels = np.array(list("abcdefgh"))[codes]
    trials = pd.DataFrame({"subject": "01", "session": "01", "run": "01", "stimulus_id": labels, "repetition": 0,
                           "split": "train"})  # fmt: skip
    data = data.astype(np.float32)
    decoder = LdaConfig().build(seed=0).fit(Responses(data, ("trial", "voxel"), trials, "z"), labels)
    model = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    model.fit(data.astype(float), labels)
    np.testing.assert_allclose(decoder.fitted.weights, model[1].coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(decoder.fitted.offset, model[1].intercept_, rtol=1e-7, atol=1e-9)


def test_decoding_follows_the_signal():
    for signal, low, high in ((0.0, 0.3, 0.7), (1.5, 0.95, 1.01)):
        responses, labels = make_trials(signal=signal, seed=3)
        decoder = LdaConfig().build(seed=0).fit(responses.select(np.arange(80)), labels[:80])
        decided = np.array(decoder.classes)[
            decoder.decision(responses.select(np.arange(80, 120))).argmax(axis=1)
        ]
        assert low <= (decided == labels[80:]).mean() <= high


def test_the_penalty_is_chosen_by_leaving_training_runs_out():
    responses, labels = make_trials(signal=0.2, n_trials=80)
    config = LogisticConfig(c=(1e-4, 1e-1, 10.0))
    decoder = config.build(seed=0).fit(responses, labels)
    runs = responses.trials["run"].to_numpy()
    data = responses.as_matrix().astype(np.float64)
    losses = []
    for c in config.c:
        own = []
        for run in np.unique(runs):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
            model.fit(data[runs != run], labels[runs != run].astype(str))
            seen = model.predict_proba(data[runs == run])
            own.extend(
                -np.log(seen[np.arange(len(seen)), np.searchsorted(model.classes_, labels[runs == run])])
            )
        losses.append(np.mean(own))
    assert [row["c"] for row in decoder.fitted.choices] == list(config.c)
    np.testing.assert_allclose([row["log_loss"] for row in decoder.fitted.choices], losses, rtol=1e-9)
    best = config.c[int(np.argmin(losses))]
    fixed = LogisticConfig(c=(best,)).build(seed=0).fit(responses, labels)
    np.testing.assert_array_equal(fixed.decision(responses), decoder.decision(responses))


def make_table(**columns):
    n = len(next(iter(columns.values())))
    table = {"subject": "01", "session": "01", "run": "01"} | columns
    return pd.DataFrame({name: np.broadcast_to(values, n).astype(str) for name, values in table.items()})


PEOPLE = np.repeat(np.arange(8), 6)
MANY = np.arange(48)


@pytest.mark.parametrize(
    ("labels", "columns", "whole", "n_folds"),
    [
        (MANY % 2, {"run": MANY // 12}, MANY // 12, 4),  # fewer runs than folds: each in turn
        (MANY % 2, {"run": MANY // 6}, MANY // 6, 5),
        (MANY % 2, {"run": MANY // 6, "group": MANY // 24}, MANY // 24, 2),  # days of several runs
        (
            MANY // 3 % 2,
            {"run": MANY // 12, "group": MANY // 3},
            MANY // 12,
            4,
        ),  # blocks of one class within runs
        (PEOPLE % 2, {"subject": PEOPLE, "run": MANY % 2}, PEOPLE, 5),
        (MANY % 2, {"subject": PEOPLE, "run": MANY // 2 % 3}, PEOPLE * 3 + MANY // 2 % 3, 5),
        (PEOPLE % 2, {"group": PEOPLE, "run": MANY % 2}, PEOPLE, 5),  # runs of the same numbers in everybody
        (MANY % 2, {"group": MANY // 6}, MANY // 6, 5),  # one run, as where none is told: its groups
        (MANY % 2, {"run": MANY // 12, "group": MANY // 3 % 2}, MANY // 12, 4),  # groups that all runs share
        (MANY % 2, {}, MANY, 5),  # one run: trials
        (MANY // 12, {"run": MANY // 12}, MANY, 5),  # every class in a run of its own: trials
    ],
)
def test_inner_folds_leave_out_what_would_be_recognised(labels, columns, whole, n_folds):
    named = np.array([f"c{label}" for label in labels])
    folds = make_label_folds(named, make_table(**columns or {"run": np.zeros(48, int)}), 5)
    assert len(folds) == n_folds
    for fold in folds:
        assert not set(whole[fold.train].tolist()) & set(whole[fold.test].tolist())
        assert set(named[fold.test]) <= set(named[fold.train])
        assert len(set(named[fold.train])) > 1
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == MANY.tolist()


def test_subjects_too_few_to_leave_out_choose_no_penalty():
    """One person of each class is left: whatever was chosen within them would be chosen to recognise them."""
    responses, _ = make_trials()
    who = np.arange(120) // 60
    responses = responses.with_trials(responses.trials.assign(subject=who.astype(str), run="01"))
    labels = np.array(["face", "house"], dtype=object)[who]
    assert make_label_folds(labels.astype(str), responses.trials, 5) == []
    decoder = LogisticConfig().build(seed=0).fit(responses, labels)
    assert decoder.fitted.choices == []
    strongest = LogisticConfig(c=(1e-4,)).build(seed=0).fit(responses, labels)
    np.testing.assert_array_equal(decoder.decision(responses), strongest.decision(responses))


def test_many_features_are_fitted_in_the_span_of_the_trials():
    """The solver stops by its own tolerance, hence the difference."""
    generator = np.random.default_rng(0)
    responses, labels = make_trials(n_classes=3, n_trials=60)
    wide = generator.normal(size=(60, 400)).astype(np.float32)
    responses = Responses(wide, ("trial", "voxel"), responses.trials, "z")
    decoder = LogisticConfig(c=(0.1,)).build(seed=0).fit(responses, labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    expected = model.fit(wide.astype(float), labels.astype(str)).predict_proba(wide.astype(float))
    np.testing.assert_allclose(decoder.decision(responses), expected, atol=1e-3)


def test_held_out_trials_move_nothing_that_was_fitted():
    responses, labels = make_trials()
    poisoned = responses.data.copy()
    poisoned[90:] = 1e3
    other = Responses(poisoned, responses.dims, responses.trials, "V")
    rows = np.arange(90)
    for config in (LdaConfig(), LogisticConfig(c=(0.01, 1.0))):
        left = config.build(seed=0).fit(responses.select(rows), labels[:90]).fitted
        right = config.build(seed=0).fit(other.select(rows), labels[:90]).fitted
        np.testing.assert_array_equal(left.weights, right.weights)
        np.testing.assert_array_equal(left.mean, right.mean)


def test_a_constant_feature_changes_nothing():
    responses, labels = make_trials()
    flat = np.concatenate([responses.data, np.full((120, 1, 8), 7e-6, np.float32)], axis=1)
    more = Responses(flat, responses.dims, responses.trials, "V")
    left = LogisticConfig().build(seed=0).fit(responses, labels).decision(responses)
    right = LogisticConfig().build(seed=0).fit(more, labels).decision(more)
    np.testing.assert_allclose(left, right, atol=1e-6)  # the solver stops by its own tolerance


def test_misuse_is_told_in_words(tmp_path, monkeypatch):
    responses, labels = make_trials()
    with pytest.raises(DataError, match="one label per trial: 120 trials came with labels of shape"):
        LdaConfig().build(seed=0).fit(responses, labels[:5])
    with pytest.raises(DataError, match="all trials are 'face'"):
        LdaConfig().build(seed=0).fit(responses, np.full(120, "face"))
    with pytest.raises(DataError, match="lda decoder has not been fitted"):
        LdaConfig().build(seed=0).decision(responses)
    with pytest.raises(ConfigError, match="at least one value"):
        LogisticConfig(c=()).build(seed=0)
    monkeypatch.setattr(categories, "_MAX_ITER", 1)
    with pytest.raises(ConfigError, match="did not converge in 1 steps"):
        LogisticConfig(c=(100.0,)).build(seed=0).fit(responses, labels)
    decoder = LdaConfig().build(seed=0).fit(responses, labels)
    fewer = Responses(responses.data[:, :2], responses.dims, responses.trials, "V")
    with pytest.raises(DataError, match="fitted on 24 features, but these responses have 16"):
        decoder.decision(fewer)
    decoder.write(tmp_path)
    with pytest.raises(DataError, match="of kind 'lda', not 'logistic'"):
        LogisticConfig().read(tmp_path)
    monkeypatch.setattr(categories, "_MAX_LDA_FEATURES", 10)
    with pytest.raises(ConfigError, match="to at most 10 features"):
        LdaConfig().build(seed=0).fit(responses, labels)


def make_volumes(n_runs=6, n_volumes=6, seed=0):
    """Blocks of two classes whose pattern is there only in the volumes from 5 s on; before, it is another class's."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(size=(3, 12))
    rows, data = [], []
    for run in range(n_runs):
        for block, code in enumerate(rng.permutation([0, 1, 2, 0, 1, 2])):
            for volume in range(n_volumes):
                rows.append((f"{run:02d}", 20.0 * block, "abc"[code], 2.5 * volume))
                shown = code if volume >= 2 else (code + 1) % 3
                data.append(0.5 * patterns[shown] + rng.normal(size=12))
    trials = pd.DataFrame(rows, columns=["run", "onset", "stimulus_id", "time"])
    trials = trials.assign(subject="01", session="01", repetition=0, split="train", duration=12.5)
    labels = trials["stimulus_id"].to_numpy(dtype=object)
    return Responses(np.array(data, np.float32), ("trial", "voxel"), trials, "z"), labels


def test_volumes_of_a_trial_are_decided_together_in_the_window_that_inner_folds_prefer(tmp_path):
    responses, labels = make_volumes()
    train, test = np.arange(180), np.arange(180, 216)
    config = LogisticConfig(c=(0.01, 0.1), pool=True, windows=((0, 0), (0, -7.5), (5, 2.5)))
    decoder = config.build(seed=0).fit(responses.select(train), labels[train])
    assert decoder.fitted.window == (5, 2.5)
    assert len(decoder.fitted.choices) == 6
    tested = responses.select(test)
    decided = decoder.decision(tested)
    first = find_first_rows(tested.trials)
    assert first.tolist() == list(range(0, 36, 6))
    for start in first:  # all rows of a block agree
        np.testing.assert_array_equal(decided[start : start + 6], np.tile(decided[start], (6, 1)))
    hits = np.array(decoder.classes)[decided[first].argmax(axis=1)] == labels[test][first]
    assert hits.mean() > 0.8
    # By hand: volumes from the third on teach, and their log probabilities are averaged.
    inside = responses.trials["time"].to_numpy() >= 5
    c = min((row for row in decoder.fitted.choices if row["start"] == 5), key=lambda row: row["log_loss"])[
        "c"
    ]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
    model.fit(
        responses.as_matrix()[train][inside[train]].astype(float), labels[train][inside[train]].astype(str)
    )
    logs = model.predict_log_proba(tested.as_matrix()[2:6].astype(float)).mean(axis=0)
    np.testing.assert_allclose(decided[0], np.exp(logs) / np.exp(logs).sum(), atol=1e-6)
    decoder.write(tmp_path)
    np.testing.assert_array_equal(config.read(tmp_path).decision(tested), decided)


def test_a_window_is_chosen_without_the_tested_run():
    responses, labels = make_volumes()
    poisoned = responses.data.copy()
    poisoned[180:] = 1e3
    other = Responses(poisoned, responses.dims, responses.trials, "z")
    config = LogisticConfig(c=(0.01, 0.1), pool=True, windows=((0, 0), (5, 2.5)))
    rows = np.arange(180)
    left, right = (config.build(seed=0).fit(r.select(rows), labels[rows]).fitted for r in (responses, other))
    assert (left.window, left.choices) == (right.window, right.choices)
    np.testing.assert_array_equal(left.weights, right.weights)


def test_pooling_misused_is_told_in_words():
    responses, labels = make_volumes()
    with pytest.raises(ValidationError, match="need pool: true"):
        LogisticConfig(windows=((0, 0),))
    with pytest.raises(ConfigError, match="have no volume from 30 s"):
        LogisticConfig(pool=True, windows=((30, 40),)).build(seed=0).fit(responses, labels)
    plain, names = make_trials()
    decoder = LdaConfig(pool=True).build(seed=0).fit(plain, names)
    with pytest.raises(DataError, match=r"is missing the column\(s\) onset"):
        decoder.decision(plain)


def test_a_window_begins_after_the_onset_and_ends_after_the_offset():
    """Its beginning is in it and its end is not, whatever the rounding of times."""
    times = np.array([3.0, 4.0 - 1e-9, 5.0, 6.0, 7.0 - 1e-9, 8.0])
    trials = pd.DataFrame(
        {"subject": "1", "session": "1", "run": "1", "onset": np.repeat([0.0, 20.0], 6), "time": np.tile(times, 2),
         "duration": np.repeat([3.0, 1.0], 6)}
    )  # fmt: skip
    inside = find_window(trials, (4.0, 4.0))
    assert inside[:6].tolist() == [False, True, True, True, False, False]
    assert inside[6:].tolist() == [False, True, False, False, False, False]
    assert find_window(trials, None).all()
    with pytest.raises(
        ConfigError, match="1 trials have no volume from 6 s after their onset to 4 s after their offset"
    ):
        find_window(trials, (6.0, 4.0))


@pytest.mark.parametrize(
    ("config", "n_fits"),
    [
        (LdaConfig(), 1),
        (LogisticConfig(c=(1.0,)), 1),
        (LogisticConfig(c=(0.1, 1.0), n_inner_folds=3), 1 + 2 * 3),
        (LogisticConfig(c=(0.1, 1.0, 10.0), n_inner_folds=4), 1 + 3 * 4),
    ],
)
def test_fits_are_counted_with_those_of_inner_folds(config, n_fits):
    assert config.build(seed=0).n_small_fits == n_fits
