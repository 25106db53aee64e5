"""The control of the design: finds what order and duration give away, and nothing else; never sees a response."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
from braindecode_vis.scoring.design_control import PENALTY, predict_from_design, tabulate_design
from braindecode_vis.scoring.retrieval import compute_ranks
from braindecode_vis.scoring.score_table import compute_scores
from tests.scoring.test_score_table import find, make_task


def make_trials(n_runs=4, n_trials=20, *, blocked=False, **columns):
    rng = np.random.default_rng(0)
    parts = []
    for run in range(n_runs):
        classes = (
            np.repeat(["a", "b"], n_trials // 2) if blocked else rng.permutation(["a", "b"] * (n_trials // 2))
        )
        onset = 2.0 * np.arange(n_trials)
        parts.append(
            pd.DataFrame(
                {"subject": "01", "session": "01", "run": str(run), "concept": classes, "onset": onset}
            )
        )
    return pd.concat(parts, ignore_index=True).assign(**columns)


def decode(trials, tested_run="3"):
    """Return the share of trials of a run that the design names rightly, taught by the other runs."""
    design, _ = tabulate_design(trials)
    codes = (trials["concept"] == "b").to_numpy(int)
    test = (trials["run"] == tested_run).to_numpy()
    decisions = predict_from_design(design[~test], codes[~test], np.eye(2), design[test])
    return (decisions.argmax(axis=1) == codes[test]).mean()


def test_blocks_are_found_and_a_random_order_is_not():
    """Half a run of one class, half of the other: whoever knows the clock needs no brain."""
    assert decode(make_trials(blocked=True)) == 1.0
    assert 0.2 < decode(make_trials(n_trials=60)) < 0.8


def test_a_duration_of_each_class_gives_it_away():
    trials = make_trials()
    told = trials.assign(duration=np.where(trials["concept"] == "a", 0.5, 0.6))
    assert tabulate_design(told)[1] == ["run", "place in the run", "duration"]  # the gaps are all alike
    assert decode(told) == 1.0


@pytest.mark.parametrize("rows", ["one of each", "no order"])
def test_nothing_is_made_of_a_table_that_holds_no_design(rows):
    """The order of rows is that of a file, often sorted by class, and says nothing of presentation."""
    trials = make_trials(n_runs=1, blocked=True).drop(columns="onset")
    if rows == "one of each":
        trials = trials.assign(duration=0.5)
    design, variables = tabulate_design(trials)
    assert variables == []
    assert design.shape == (len(trials), 0)


def test_places_are_counted_within_a_run_whatever_the_order_of_rows():
    trials = make_trials()
    shuffled = trials.sample(frac=1, random_state=1)
    design, _ = tabulate_design(trials)
    again, _ = tabulate_design(shuffled)
    assert np.allclose(again, design[shuffled.index])


def test_trials_without_a_run_or_an_onset_are_no_error():
    """A table whose cells of `run` were empty ended evaluate with "Cannot convert non-finite values"."""
    trials = make_trials()
    empty = trials.assign(run=trials["run"].mask(trials["run"] == "0"))
    assert np.allclose(tabulate_design(empty)[0], tabulate_design(trials)[0])
    lacking = trials.assign(onset=trials["onset"].astype("Int64").mask(trials.index == 3))
    assert tabulate_design(lacking)[1] == ["run"]


def test_ridge_is_that_of_the_formula():
    rng = np.random.default_rng(1)
    train, test, targets = rng.normal(size=(30, 4)), rng.normal(size=(5, 4)), rng.normal(size=(6, 2, 3))
    shown = rng.integers(0, 6, 30)
    z = (train - train.mean(0)) / train.std(0)
    y = targets[shown].reshape(30, -1)
    weights = np.linalg.inv(z.T @ z + PENALTY * np.eye(4)) @ z.T @ (y - y.mean(0))
    expected = (test - train.mean(0)) / train.std(0) @ weights + y.mean(0)
    found = predict_from_design(train, shown, targets, test)
    assert found.shape == (5, 2, 3)
    assert np.allclose(found.reshape(5, -1), expected, atol=1e-5)


def test_its_ranks_are_scored_beside_those_of_the_brain_with_a_paired_difference():
    task = make_task()
    queries, gallery, _ = task.retrievals[0]
    best = compute_ranks(gallery.select(list(queries.ids)), gallery, device="cpu")
    differences = []
    scores, items = compute_scores(replace(task, design=[best]), differences=differences)
    assert find(scores, "top1", "design").value == 1.0
    assert find(scores, "top1", "design").chance == find(scores, "top1").chance
    row = next(row for row in differences if (row["metric"], row["control"]) == ("top1", "design"))
    assert row["difference"] == pytest.approx(find(scores, "top1").value - 1)
    assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    plain, plain_items = compute_scores(task)
    assert [s for s in scores if s.method != "design"] == plain
    pd.testing.assert_frame_equal(items, plain_items)
    # Neither the ceiling nor a shuffle is a rival, and a median has no difference per item.
    assert {row["control"] for row in differences} == {"design"}
    assert "median_rank" not in {row["metric"] for row in differences}


def test_a_decoder_that_gives_the_mean_image_does_not_beat_it():
    """Its SSIM came from a table in single precision, that of the control from pairs in double: a win by 1e-4."""
    seen = np.zeros((8, 40, 40, 3), np.uint8)
    seen[:, 12:28, 12:28] = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3))
    mean = np.repeat(seen.mean(axis=0, keepdims=True).astype(np.uint8), 8, axis=0)
    differences = []
    compute_scores(
        make_task(seen=seen, images={"decoded": mean, "mean_image": mean}), differences=differences
    )
    found = {row["metric"]: row for row in differences if row["control"] == "mean_image"}
    for metric in ("pixcorr", "mse", "ssim"):
        assert (found[metric]["difference"], found[metric]["ci_low"], found[metric]["ci_high"]) == (0, 0, 0)


def test_classes_are_compared_in_the_same_resamples():
    """The interval of a difference is narrower than two intervals side by side, since the trials are the same."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(["a", "b"], 40)).astype(object)
    right = np.eye(2)[(labels == "b").astype(int)]
    noisy = np.where(rng.random((80, 1)) < 0.7, right, 1 - right)
    task = CategoryTask(
        decisions=noisy, classes=("a", "b"), labels=labels, runs=np.repeat(["1", "2"], 40).astype(object),
        subjects=np.repeat("01", 80).astype(object), protocol="toy", split="test", seed=0, n_bootstrap=500,
        n_permutations=200, design=noisy,
    )  # fmt: skip
    differences = []
    scores, _ = compute_category_scores(task, differences=differences)
    assert {(row["difference"], row["ci_low"], row["ci_high"]) for row in differences} == {(0.0, 0.0, 0.0)}
    plain, _ = compute_category_scores(replace(task, design=None))
    assert [s for s in scores if s.method != "design"] == plain
