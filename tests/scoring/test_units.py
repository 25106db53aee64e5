"""Intervals resample what belongs together, nulls exchange whole blocks, and every row says what was resampled."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.config.models import EvaluationConfig
from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
from braindecode_vis.scoring.score_row import make_score
from braindecode_vis.scoring.score_table import compute_scores
from braindecode_vis.scoring.units import Units, find_exchangeable, find_units, make_labels
from tests.scoring.test_score_table import find, make_task

N_BLOCKS, N_VOLUMES = 24, 12


def make_blocks(seed, *, effect=0.0, n_subjects=1, **changes):
    """Decisions on single volumes: noise of a block is shared by its volumes, as drift and haemodynamics make it."""
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(N_BLOCKS * n_subjects), N_VOLUMES)
    labels = blocks % 2
    shared = rng.normal(size=blocks.max() + 1)[blocks]
    decision = effect * (2 * labels - 1) + shared + 0.3 * rng.normal(size=len(blocks))
    names = np.array(["face", "house"], dtype=object)
    content = {
        "decisions": np.stack([-decision, decision], axis=1), "classes": ("face", "house"),
        "labels": names[labels], "runs": (blocks // 8).astype(str).astype(object),
        "subjects": np.array([f"{b // N_BLOCKS:02d}" for b in blocks], dtype=object),
        "protocol": "toy", "split": "test", "seed": 0, "n_bootstrap": 400, "n_permutations": 200,
    }  # fmt: skip
    return replace(CategoryTask(**content), **changes), Units("group", blocks.astype(str).astype(object))


def get(scores, metric="accuracy", method="decoded", subject=None):
    (score,) = [
        s for s in scores
        if (s.metric, s.method) == (metric, method) and subject in (None, s.subject)
    ]  # fmt: skip
    return score


def get_width(score):
    return score.ci_high - score.ci_low


def test_volumes_of_a_block_make_intervals_far_too_narrow_and_noise_significant():
    """Measured on real fMRI: the interval of volumes was 2.2 times too narrow; here as well, and it misses chance.

    A null of single volumes calls noise significant; one of blocks keeps its level.
    """
    misses, significant = {"volumes": 0, "blocks": 0}, {"volumes": 0, "blocks": 0}
    ratios = []
    for seed in range(60):
        task, units = make_blocks(seed)
        found = {
            "volumes": get(compute_category_scores(task)[0]),
            "blocks": get(compute_category_scores(replace(task, units=units))[0]),
        }
        volumes, blocks = found.values()
        assert volumes.value == blocks.value
        assert (volumes.resampled, blocks.resampled) == ("trials", "24 groups (t)")
        ratios.append(get_width(blocks) / get_width(volumes))
        for name, score in found.items():
            misses[name] += seed < 40 and not score.ci_low <= 0.5 <= score.ci_high
            significant[name] += score.p_value <= 0.05
    assert np.median(ratios) > 2
    assert misses["volumes"] > 12  # of 40, instead of 2
    assert misses["blocks"] <= 7  # 5 % of 40 and three standard deviations of a binomial
    assert significant["volumes"] > 15
    assert significant["blocks"] <= 8  # 3 of 60 expected, three standard deviations above


@pytest.mark.parametrize("nested", [True, False])
def test_an_effect_is_found_with_blocks(nested):
    task, units = make_blocks(0, effect=1.5)
    if not nested:
        task = replace(task, runs=np.full(len(task.runs), "1", dtype=object))
    scores, _ = compute_category_scores(replace(task, units=units))
    for metric in ("accuracy", "balanced_accuracy", "auc"):
        score = get(scores, metric)
        assert score.p_value < 0.05
        if nested and metric == "auc":  # in each of the three runs all pairs are in order
            assert (score.value, score.resampled) == (1.0, "no interval: all values are equal")
            continue
        assert 0.5 < score.ci_low <= score.value <= score.ci_high
        assert score.resampled == "24 groups (t)"
    # The weighted pairs of the bootstrap give, with every unit drawn once, the area itself.
    reference = compute_category_scores(task)[0]
    assert get(scores, "auc").value == get(reference, "auc").value


def test_groups_that_hold_every_class_are_permuted_within():
    """A person is a group; what sets persons apart is in every permutation, and cannot become significant."""
    rng = np.random.default_rng(0)
    task, units = make_blocks(0)
    labels = rng.integers(0, 2, len(task.labels))
    # People differ in how often they see a house and in their offset: a decoder of persons.
    people = np.arange(len(labels)) // N_VOLUMES
    labels = (rng.random(len(labels)) < np.where(people % 2, 0.8, 0.2)).astype(int)
    decision = np.where(people % 2, 1.0, -1.0) + 0.1 * rng.normal(size=len(labels))
    task = replace(
        task, labels=np.array(["face", "house"], dtype=object)[labels],
        decisions=np.stack([-decision, decision], axis=1), runs=np.full(len(labels), "1", dtype=object),
    )  # fmt: skip
    alone, within = (compute_category_scores(t)[0] for t in (task, replace(task, units=units)))
    assert get(alone).p_value < 0.01
    assert get(within).p_value > 0.05
    assert get(within).chance > 0.7


def test_several_subjects_have_the_t_interval_of_their_means():
    task, units = make_blocks(0, effect=1.0, n_subjects=4)
    scores, _ = compute_category_scores(task)
    pooled = get(scores, subject="all")
    assert pooled.resampled == "4 subjects (t)"
    values = np.array([get(scores, subject=f"{n:02d}").value for n in range(4)])
    assert pooled.value == pytest.approx(values.mean())
    half = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (pooled.ci_low, pooled.ci_high) == pytest.approx((values.mean() - half, values.mean() + half))
    for own in (units, Units("subject", task.subjects)):  # whatever lies within a subject is in its mean
        grouped = get(compute_category_scores(replace(task, units=own))[0], subject="all")
        assert (grouped.ci_low, grouped.ci_high) == (pooled.ci_low, pooled.ci_high)


# --- images -----------------------------------------------------------------------------------------------


def test_rows_of_images_say_what_was_resampled():
    task = make_task()
    scores, _ = compute_scores(task)
    assert find(scores, "pixcorr").resampled == "images"
    assert find(scores, "top1").resampled == "images (Wilson)"
    assert "shuffle" in find(scores, "pixcorr", "shuffled").resampled
    pooled, _ = compute_scores(make_task(subjects=("01", "02", "03")))
    assert find(pooled, "pixcorr", subject="all").resampled == "3 subjects and 8 images (crossed)"
    assert (
        find(pooled, "median_rank", subject="all").resampled == "3 subjects and 8 images (crossed, Woodruff)"
    )
    two = find(compute_scores(make_task(subjects=("01", "02")))[0], "pixcorr", subject="all")
    assert (two.ci_low, two.ci_high) == (None, None)
    assert two.resampled == "no interval: 2 subjects, and an interval over subjects needs at least 3"
    groups = Units("group", np.array(list("aabbccdd"), dtype=object))
    grouped, _ = compute_scores(replace(task, units=groups))
    assert find(grouped, "pixcorr").resampled == "4 groups (t)"
    assert find(grouped, "pixcorr").value == find(scores, "pixcorr").value
    assert find(grouped, "pixcorr").p_value > find(scores, "pixcorr").p_value  # 16 permutations are left


def test_groups_widen_the_interval_of_images():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    values = rng.normal(size=20)[groups] + 0.2 * rng.normal(size=200)
    common = {
        "metric": "pixcorr", "method": "decoded", "protocol": "toy", "subject": "01", "split": "test", "seed": 0,
        "chance": 0.0, "n_boot": 1000,
    }  # fmt: skip
    single = make_score(values, **common)
    drawn = make_score(values, stimulus_ids=groups, unit="group", **common)
    assert get_width(drawn) > 2 * get_width(single)
    assert drawn.resampled == "20 groups (t)"
    people = np.repeat(["a", "b", "c", "d"], 50)
    whole = make_score(values, stimulus_ids=groups, unit="subject", subjects=people, **common)
    assert whole.resampled == "4 subjects (t)"


def test_stimuli_are_exchanged_where_units_allow_it():
    stimuli = np.array(list("abcdabcd"))
    crossed = Units("group", np.repeat(["x", "y"], 4).astype(object))
    assert find_exchangeable(stimuli, crossed) is None  # every group has every image
    nested = Units("group", np.array(list("xxyyxxyy"), dtype=object))
    assert find_exchangeable(stimuli, nested) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert find_exchangeable(stimuli, None) is None
    assert find_exchangeable(stimuli, Units("trial", np.arange(8).astype(object))) is None


def make_table(groups, n=4):
    return pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "repetition": 0, "split": "test",
            "stimulus_id": [f"s{i % n}" for i in range(len(groups))], "group": groups,
        }
    )  # fmt: skip


def test_groups_are_taken_from_the_table():
    trials = make_table(list("aabb"))
    units, note = find_units(trials, trials, "auto")
    assert (units.unit, units.labels.tolist(), note) == ("group", ["a", "a", "b", "b"], "")
    assert find_units(trials.drop(columns="group"), trials.drop(columns="group"), "auto") == (None, "")
    assert find_units(trials, trials, "image") == (None, "")
    with pytest.raises(ConfigError, match="no column group"):
        find_units(trials.drop(columns="group"), trials.drop(columns="group"), "group")


def test_groups_that_share_an_average_are_one_unit():
    trials = make_table(list("aabbaabb"))  # both repetitions of an image in one group
    items = trials.iloc[:4]
    units, _ = find_units(items, trials, "auto")
    assert len(set(units.labels)) == 2
    crossed = make_table(list("aaaabbbb"))  # every average is over both groups
    units, note = find_units(crossed.iloc[:4], crossed, "auto")
    assert units is None
    assert "set repeats.test to single" in note
    with pytest.raises(ConfigError, match=r"repeats.test to single"):
        find_units(crossed.iloc[:4], crossed, "group")


def test_the_default_leaves_fingerprints_alone():
    assert "resample" not in EvaluationConfig().hashed_fields()
    assert EvaluationConfig(resample="group").hashed_fields()["resample"] == "group"


def test_units_of_analyses_are_those_that_the_trials_have():
    trials = pd.DataFrame(
        {"subject": list("xxyy"), "session": list("1212"), "run": "1", "stimulus_id": list("abab")}
    )
    for resample in ("image", "auto", "group"):
        assert make_labels(trials, resample, averaged=False) is None
    unit, find = make_labels(trials, "session", averaged=False)
    assert (unit, len(set(find(trials).tolist()))) == ("session", 4)  # of each subject
    unit, find = make_labels(trials.assign(group=list("ppqq")), "auto", averaged=False)
    assert (unit, len(set(find(trials.assign(group=list("ppqq"))).tolist()))) == ("group", 2)
