"""Labels that belong to whole people: patients and controls, left out one by one."""

import warnings

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.pipeline import categories

pytestmark = pytest.mark.whole

FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}


def make_people(n=8, n_trials=4, effect=5.0, labels=None, seed=3):
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(n), n_trials)
    patient = np.arange(n) % 2 if labels is None else np.asarray(labels)
    X = rng.normal(size=(len(who), 6)) + rng.normal(size=(n, 6))[who]
    X[:, 0] += effect * patient[who]
    return X.astype(np.float32), np.array(["control", "patient", "sibling"])[patient][who], who


def decode(X, labels, *, split, encoder="lda", settings=None, **columns):
    data = bdv.from_arrays(
        X, labels=labels, **{name: np.asarray(v).astype(str) for name, v in columns.items()}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return bdv.decode(data, split=split, encoder=encoder, settings={**FEW, **(settings or {})})


def find(run, metric, subject="all", method="decoded"):
    rows = run.scores.query("metric == @metric and subject == @subject and method == @method")
    return rows.iloc[0]


@pytest.mark.further
def test_people_given_as_subjects_and_as_groups_have_the_same_scores():
    """As subjects, chance was the score and p 1; as the column group, .500 and .0016 of the same decisions."""
    X, labels, who = make_people()
    subjects = decode(X, labels, split="leave-one-subject-out", subject=who)
    groups = decode(X, labels, split="leave-one-group-out", group=who)
    hits = subjects.items["label"] == subjects.items["decoded"]
    assert find(subjects, "accuracy").value == pytest.approx(hits.mean())
    for metric in ("accuracy", "balanced_accuracy", "auc"):
        one, other = find(subjects, metric), find(groups, metric, "01")
        numbers = ["value", "chance", "p_value", "ci_low", "ci_high", "n_queries"]
        assert one[numbers].tolist() == pytest.approx(other[numbers].tolist())
        assert one.p_value < 0.05
        assert one.resampled == "8 subjects (t), widened by sqrt 2 after folds"
        assert other.resampled == "8 groups (t), widened by sqrt 2 after folds"
        assert "in all 70 ways, decoders fitted again: no p below 0.029" in one.protocol
    assert find(subjects, "accuracy").chance < 0.5  # who is left out is missed on one side
    assert 0.4 < find(subjects, "auc").chance < 0.6
    assert "16 pairs" in find(subjects, "auc").protocol
    assert subjects.hints == []
    assert "labels of whole subjects exchanged" in subjects.report().read_text()
    assert set(subjects.audit()["level"]) <= {"ok", "warning", "transductive"}


def test_a_person_alone_has_no_class_to_be_balanced():
    X, labels, who = make_people(n=6)
    run = decode(X, labels, split="leave-one-subject-out", subject=who)
    for person in "012345":
        row = find(run, "accuracy", person)
        assert row.value == find(run, "balanced_accuracy", person).value
        assert row.resampled == "trials (Wilson), widened by sqrt 2 after folds"
        assert 0 < row.chance < 1
        assert row.p_value >= 0.1 - 1e-9


def test_few_people_are_told_what_p_they_allow():
    X, labels, who = make_people(n=6)
    run = decode(X, labels, split="leave-one-subject-out", subject=who)
    assert find(run, "accuracy").p_value == pytest.approx(0.1)
    (hint,) = run.hints
    assert "gives no p below 0.1" in hint
    assert "four subjects of each of two classes" in hint


@pytest.mark.parametrize(
    ("n", "labels", "words"),
    [
        (2, None, r"only one subject has the class 'control'.*\(2 subjects in all\)"),
        (
            5,
            [0, 0, 0, 0, 1],
            "only one subject has the class 'patient'.*each class needs two subjects",
        ),
        (4, [1, 1, 1, 1], "all trials are 'patient'"),
    ],
)
def test_too_few_people_are_one_sentence(n, labels, words):
    X, names, who = make_people(n=n, labels=labels)
    with pytest.raises(DataError, match=words):
        decode(X, names, split="leave-one-subject-out", subject=who)


def test_groups_as_many_as_trials_are_told():
    X, labels, who = make_people(n=6, n_trials=1)
    run = decode(X, labels, split="leave-one-group-out", group=who)
    assert find(run, "accuracy", "01").resampled in ("6 groups (t), widened by sqrt 2 after folds", "")
    assert any("each of the 6 groups has one trial" in hint for hint in run.hints)
    people = decode(X, labels, split="leave-one-subject-out", subject=who)
    assert not any("has one trial" in hint for hint in people.hints)


def test_three_classes_have_no_area():
    X, labels, who = make_people(n=6, labels=[0, 0, 1, 1, 2, 2])
    run = decode(X, labels, split="leave-one-subject-out", subject=who)
    assert set(run.scores["metric"]) == {"accuracy", "balanced_accuracy"}
    assert "in all 90 ways" in find(run, "accuracy").protocol


def test_a_published_split_of_people_needs_no_refit():
    """Its test says nothing of its training: labels of the tested are exchanged, and C(6, 3) = 20."""
    X, labels, who = make_people(n=12)
    data = bdv.from_arrays(
        X, labels=labels, subject=who.astype(str), split=np.where(who < 6, "train", "test")
    )
    run = bdv.decode(data, split="published", encoder="lda", settings=FEW)
    row = find(run, "auc")
    assert "in all 20 ways, decisions kept, without refits: no p below 0.05" in row.protocol
    assert row.chance == pytest.approx(0.5)
    assert find(run, "accuracy").resampled == "6 subjects (t)"


def test_blocks_of_several_people_change_labels_within_each():
    """Every person has blocks of both classes: labels stay within the person, and subjects are averaged."""
    X, _, who = make_people(n=2, n_trials=8)
    block = np.tile(np.repeat(np.arange(4), 2), 2)
    labels = np.array(["a", "b"])[block % 2]
    X[:, 0] += 8 * (block % 2)
    group = [f"{w}{b}" for w, b in zip(who, block, strict=True)]
    run = decode(X, labels, split="leave-one-group-out", group=group, subject=who)
    row = find(run, "accuracy")
    assert "labels of whole groups exchanged in all 36 ways" in row.protocol  # 6 in each, and none across
    assert 2 / 36 - 1e-9 <= row.p_value < 0.15
    assert row.value == pytest.approx(np.mean([find(run, "accuracy", str(n)).value for n in range(2)]))


def test_a_decoder_that_is_dear_to_fit_is_not_fitted_again(monkeypatch):
    monkeypatch.setattr("braindecode_vis.encoders.category_decoders.LinearCategoryDecoder.n_small_fits", 0)
    X, labels, who = make_people()
    run = decode(X, labels, split="leave-one-subject-out", subject=who)
    row = find(run, "auc")
    assert "decisions kept, without refits: no p below 0.014" in row.protocol
    assert "decisions of subjects left out by different decoders compared" in row.protocol
    assert row.chance == pytest.approx(0.5)
    assert row.p_value <= 0.05


def test_the_cost_of_refits_is_told_beforehand(monkeypatch):
    monkeypatch.setattr(categories, "LEAST_TOLD", 0.0)
    monkeypatch.setattr(categories, "FEWEST_TOLD", 100)
    X, labels, who = make_people(n=6)
    data = bdv.from_arrays(X, labels=labels, subject=who.astype(str))
    with pytest.warns(Notice, match=r"exchanged 9 times, and lda is fitted 150 times: about \d+ s"):
        bdv.decode(data, split="leave-one-subject-out", settings=FEW)


def test_labels_that_vary_within_people_are_scored_as_before():
    X, _, who = make_people()
    labels = np.array(["a", "b"])[np.arange(len(who)) % 2]
    run = decode(X, labels, split="leave-one-subject-out", subject=who)
    assert not run.scores["protocol"].str.contains("exchanged").any()
    assert find(run, "accuracy").resampled == "8 subjects (t), widened by sqrt 2 after folds"


def test_a_network_keeps_its_decisions():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(4), 4)
    labels = np.array(["a", "b"])[who % 2]
    X = rng.normal(size=(16, 4, 40)).astype(np.float32)
    encoder = {"kind": "network_categories", "epochs": 1, "network": {"kind": "eegproject", "width": 8}}
    run = decode(X, labels, split="leave-one-subject-out", encoder=encoder, subject=who)
    assert "in all 6 ways, decisions kept, without refits: no p below 0.17" in find(run, "accuracy").protocol
