import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.pipeline.categories import tabulate_confusions, tabulate_runs
from braindecode_vis.pipeline.reconstruction import derange
from braindecode_vis.preprocessing.splits import LeaveOneRunOutConfig
from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores


def make_task(n=300, effect=1.0, n_classes=2, seed=0, **changes):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_classes, n)
    decisions = generator.normal(size=(n, n_classes))
    decisions[np.arange(n), labels] += effect
    names = tuple("abcdefgh"[:n_classes])
    content = {
        "decisions": decisions, "classes": names, "labels": np.array(names, dtype=object)[labels],
        "runs": np.array([f"{i % 6}" for i in range(n)], dtype=object), "subjects": np.full(n, "01", dtype=object),
        "protocol": "toy", "split": "test", "seed": 0, "n_bootstrap": 500, "n_permutations": 500,
    }  # fmt: skip
    return CategoryTask(**{**content, **changes}), labels


def find(scores, metric, method="decoded"):
    (score,) = [s for s in scores if s.metric == metric and s.method == method]
    return score


def test_scores_are_those_of_scikit_learn():
    task, labels = make_task()
    scores, items = compute_category_scores(task)
    decided = task.decisions.argmax(1)
    assert find(scores, "accuracy").value == pytest.approx((decided == labels).mean())
    assert find(scores, "balanced_accuracy").value == pytest.approx(balanced_accuracy_score(labels, decided))
    margin = task.decisions[:, 1] - task.decisions[:, 0]
    expected = np.mean([roc_auc_score(labels[task.runs == r], margin[task.runs == r]) for r in "012345"])
    assert find(scores, "auc").value == pytest.approx(expected)
    assert find(scores, "auc").ci_low < expected < find(scores, "auc").ci_high
    assert find(scores, "auc").p_value == pytest.approx(1 / 501)
    assert (items["decoded"] == np.array(["a", "b"])[decided]).all()


def test_many_classes_have_no_auc_and_chance_follows_the_labels():
    scores, _ = compute_category_scores(make_task(n_classes=8, effect=2.0)[0])
    assert {score.metric for score in scores} == {"accuracy", "balanced_accuracy"}
    assert find(scores, "accuracy").chance == pytest.approx(
        1 / 8, abs=0.03
    )  # 500 permutations, uneven classes


@pytest.mark.further
def test_without_an_effect_the_test_keeps_its_level():
    """200 experiments of noise: about 5 % may be significant; 3 binomial SDs around that."""
    p_values = [
        find(
            compute_category_scores(make_task(effect=0, seed=seed, n_permutations=99, n_bootstrap=20)[0])[0],
            "auc",
        ).p_value
        for seed in range(200)
    ]
    assert np.mean(np.array(p_values) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_a_drift_between_runs_is_not_decoded():
    """A decoder that knows the run only: labels are unbalanced over runs, yet the null is permuted within them."""
    generator = np.random.default_rng(0)
    runs = np.repeat(np.arange(6), 50)
    labels = (generator.random(300) < np.where(runs < 3, 0.8, 0.2)).astype(int)
    decisions = np.stack([runs >= 3, runs < 3], axis=1) + 0.01 * generator.normal(size=(300, 2))
    names = np.array(["a", "b"], dtype=object)
    task, _ = make_task(decisions=decisions, labels=names[labels], runs=runs.astype(str).astype(object))
    score = find(compute_category_scores(task)[0], "accuracy")
    assert score.value > 0.7
    assert score.p_value > 0.05


def test_an_unknown_class_is_named():
    with pytest.raises(DataError, match="class 'z' was tested but never trained on"):
        make_task(labels=np.full(300, "z", dtype=object))


def test_few_trials_get_a_wilson_interval():
    score = find(compute_category_scores(make_task(n=12, effect=9.0)[0])[0], "accuracy")
    assert score.value == 1.0
    assert 0.7 < score.ci_low < 0.8


def test_trials_that_are_all_hits_have_no_certain_interval():
    """Resamples of 300 hits are 300 hits; a rate of misses of one in a hundred would show as many."""
    scores, _ = compute_category_scores(make_task(effect=50.0)[0])
    accuracy = find(scores, "accuracy")
    assert (accuracy.value, accuracy.resampled) == (1.0, "trials (Wilson)")
    assert accuracy.ci_low == pytest.approx(
        1 / (1 + 1.959964**2 / 300), rel=1e-6
    )  # Wilson's closed form at n hits
    for metric in ("balanced_accuracy", "auc"):
        found = find(scores, metric)
        assert (found.ci_low, found.ci_high, found.resampled) == (
            None,
            None,
            "no interval: all values are equal",
        )


def test_tables_for_the_report():
    items = pd.DataFrame(
        {
            "label": ["a", "a", "b", "b"],
            "decoded": ["a", "b", "b", "b"],
            "run": ["1", "2", "1", "2"],
            "subject": "01",
        }
    )
    confusions = tabulate_confusions(items)
    assert confusions["a"].tolist() == [50.0, 0.0]
    assert confusions["b"].tolist() == [50.0, 100.0]
    assert tabulate_runs(items)["accuracy"].tolist() == [1.0, 0.5]


def test_leaving_a_run_out_stays_within_the_subject():
    trials = pd.DataFrame(
        {
            "subject": np.repeat(["01", "02"], 6), "session": "1", "run": np.tile(["1", "2", "3"], 4),
            "stimulus_id": "face", "repetition": 0, "split": "all",
        }
    )  # fmt: skip
    split = LeaveOneRunOutConfig().make(trials, np.array(["face"] * 12), seed=0)
    assert len(split.folds) == 6
    for fold in split.folds:
        assert trials.iloc[np.concatenate([fold.train, fold.test])]["subject"].nunique() == 1
        assert trials.iloc[fold.test]["run"].nunique() == 1
    with pytest.raises(ConfigError, match="subject 01 has one run only"):
        LeaveOneRunOutConfig().make(trials.assign(run="1"), np.array(["face"] * 12), seed=0)


@pytest.mark.parametrize("n_repeats", [1, 3])
def test_a_deranged_row_shows_another_image(n_repeats):
    ids = np.repeat([f"image{i}" for i in range(7)], n_repeats).astype(object)
    order = derange(ids, np.random.default_rng(0))
    assert (ids[order] != ids).all()
    assert set(ids[order]) == set(ids)


def test_decoders_of_several_folds_have_wider_intervals_and_nulls():
    """Decisions of noise by decoders that learnt from each other's trials were called better than chance in .10."""
    plain, wide = (
        compute_category_scores(make_task(n=80, effect=0.3, over_folds=over)[0])[0] for over in (False, True)
    )
    for metric in ("accuracy", "balanced_accuracy", "auc"):
        one, other = find(plain, metric), find(wide, metric)
        assert (one.value, one.chance) == (other.value, other.chance)
        assert other.p_value >= one.p_value  # exchanging two labels changes no hit, or two
        assert metric != "auc" or other.p_value > one.p_value
        assert other.ci_low - other.value == pytest.approx(2**0.5 * (one.ci_low - one.value))
        assert other.resampled == f"{one.resampled}, widened by sqrt 2 after folds"
        words = "p-values: labels are permuted without refits, the null widened by sqrt 2 (conservative)"
        assert other.protocol == f"{one.protocol}; {words}"
