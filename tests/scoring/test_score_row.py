"""A score row carries its interval, chance and n, and no value is without them."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import SCORE_KEYS
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring.metrics.identification import two_way_identification
from braindecode_vis.scoring.metrics.metric_registry import compute_chance
from braindecode_vis.scoring.score_row import make_score
from braindecode_vis.scoring.uncertainty import wilson_interval


def _score(values, metric="two_way_identification", **kwargs):
    given = {
        "method": "decoded",
        "protocol": "toy",
        "subject": "01",
        "split": "test",
        "seed": 0,
        "n_boot": 500,
    }
    return make_score(np.asarray(values), metric=metric, **(given | kwargs))


@pytest.mark.parametrize(
    ("metric", "size", "chance"),
    [
        ("two_way_identification@pixels", None, 0.5),
        ("two_way_identification_within_class", None, 0.5),
        ("10_way_identification", None, 0.1),
        ("50_way", None, 0.02),
        ("top5", 200, 0.025),
        ("top5", 3, 1.0),
        ("median_rank", 200, 100.5),
        ("relative_median_rank", None, 0.5),
        ("mean_reciprocal_rank", 2, 0.75),
    ],
)
def test_chance_follows_from_the_definition(metric, size, chance):
    assert compute_chance(metric, gallery_size=size) == pytest.approx(chance)


def test_chance_is_never_guessed():
    with pytest.raises(ConfigError, match="depends on the data"):
        _score([0.5, 0.6], "pixcorr@native")
    assert _score([0.5, 0.6], "pixcorr@native", chance=0.41).chance == 0.41
    assert _score([0.5, 0.6], "mse@native", chance=None).chance is None
    with pytest.raises(ConfigError, match="needs the gallery size"):
        compute_chance("top1")
    with pytest.raises(ConfigError, match="did you mean 'median_rank'"):
        compute_chance("median_ranks", gallery_size=3)


def test_small_counts_and_unanimous_hits_get_wilson():
    few = _score([1.0] * 9 + [0.0], "top1", gallery_size=10)
    assert (few.ci_low, few.ci_high) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # published example
    unanimous = _score(np.ones(100))
    assert unanimous.ci_low == wilson_interval(100, 100).low < 1
    # Five trials of each of 20 images are no more evidence than the images are.
    repeated = _score(np.ones(100), stimulus_ids=np.repeat(np.arange(20), 5))
    assert (repeated.ci_low, repeated.resampled) == (wilson_interval(20, 20).low, "images (Wilson)")
    fractions = _score(np.linspace(0, 1, 21))
    assert fractions.ci_low > 0.3
    perfect = _score(np.zeros(10), "mse@native", chance=0.05)  # an error of zero is no proportion
    assert (perfect.ci_low, perfect.ci_high) == (0, 0)


def test_repeated_stimuli_widen_the_interval_and_one_stimulus_has_none():
    values = np.repeat([1.0, 0, 1, 0, 0, 1, 1, 1], 10)
    alone = _score(values)
    together = _score(values, stimulus_ids=np.repeat(np.arange(8), 10))
    assert together.ci_high - together.ci_low > 2 * (alone.ci_high - alone.ci_low)
    assert _score([0.3]).ci_low is None
    assert _score(values, stimulus_ids=["a"] * 80).ci_low is None
    subjects = np.repeat(["01", "02"], [60, 20])
    by_subject = _score(values, subjects=subjects)
    assert by_subject.value == pytest.approx((values[:60].mean() + values[60:].mean()) / 2)


def test_a_median_has_its_own_interval():
    score = _score(np.arange(1.0, 100), "median_rank", statistic="median", gallery_size=100)
    assert score.value == 50
    assert score.ci_low < 50 < score.ci_high


def test_no_signal_scores_within_its_interval_of_chance():
    """At 95 % about 1 in 20 misses; of 60 data sets without signal no more than 9 may (4 standard deviations)."""
    missed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        score = _score(two_way_identification(rng.random((80, 30)), rng.random((80, 30))), seed=seed)
        missed += not score.ci_low <= score.chance <= score.ci_high
    assert missed <= 9


def test_rows_have_the_fixed_columns():
    assert tuple(_score([0.2, 0.9]).as_row()) == SCORE_KEYS


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [[0.1], [0.2]]])
def test_no_value_without_finite_items(values):
    with pytest.raises(DataError, match="one finite value per item"):
        _score(values)


@pytest.mark.parametrize(
    ("unit", "values", "subjects", "words"),
    [
        ("image", [0.1, 0.5, 0.4], None, "images"),
        ("image", [0.0, 1.0, 1.0], None, "images (Wilson)"),
        ("group", [0.1, 0.5, 0.4], None, "3 groups (t, logit)"),
        ("group", [0.1, 0.5], None, "no interval: 2 groups, and an interval over groups needs at least 3"),
        ("image", [0.1], None, "no interval: one image"),
        ("trial", [0.1, 0.5, 0.4], ["1", "2", "3"], "3 subjects, each with its own trials (crossed, logit)"),
        ("group", [0.1, 0.5, 0.4], ["1", "2", "3"], "3 subjects, each with its own groups (crossed, logit)"),
        ("subject", [0.1, 0.5, 0.4, 0.2], ["1", "1", "2", "3"], "3 subjects (t)"),
        (
            "image",
            [0.1, 0.5],
            ["1", "2"],
            "no interval: 2 subjects, and an interval over subjects needs at least 3",
        ),
    ],
)
def test_a_score_says_what_was_resampled(unit, values, subjects, words):
    """What is few by nature is counted, since an interval of three runs says less than one of three hundred images."""
    score = _score(values, subjects=subjects, unit=unit)
    assert score.resampled == words


def test_one_hit_more_than_a_control_is_no_clear_win():
    """As a share of hits, a single difference of ten had a lower limit above 0, and the control passed for beaten."""
    one = [1.0] + [0.0] * 9
    assert _score(one).ci_low > 0
    assert _score(one, differs=True).ci_low == 0
    three = [1.0] + [0.0] * 29
    subjects = ["1"] * 10 + ["2"] * 10 + ["3"] * 10
    assert _score(three, subjects=subjects, differs=True).ci_low < 0
