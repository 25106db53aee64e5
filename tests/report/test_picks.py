"""The rules that pick items, and the words for them."""

import numpy as np
import pytest

from braindecode_vis.report.gallery import describe_rule, select_items
from tests.report.material import make_noise_gallery


@pytest.mark.parametrize("n", [3, 4, 10, 11, 12, 200])
@pytest.mark.parametrize("n_each", [1, 3, 4])
def test_best_median_and_worst_never_overlap(n, n_each):
    score = np.random.default_rng(n).permutation(n).astype(float)
    picks = select_items(score, n_each)
    rows = np.concatenate(list(picks.values()))
    assert len(set(rows.tolist())) == len(rows) == 3 * min(n_each, n // 3)
    assert score[picks["best"]].min() > score[picks["median"]].max() > score[picks["median"]].min() - 1
    assert score[picks["median"]].min() > score[picks["worst"]].max()
    centre = np.median(score)
    assert abs(score[picks["median"]].mean() - centre) <= 1


def test_low_scores_can_be_the_good_ones():
    picks = select_items([3.0, 1.0, 2.0], 1, higher_is_better=False)
    assert {name: rows.tolist() for name, rows in picks.items()} == {"best": [1], "median": [2], "worst": [0]}
    assert make_noise_gallery(metric="mse").higher_is_better is False
    assert make_noise_gallery(metric="pixcorr").higher_is_better is True


def test_items_without_a_score_are_never_picked():
    picks = select_items([np.nan, 0.5, 0.1, np.inf, 0.9], 4)
    assert {name: rows.tolist() for name, rows in picks.items()} == {"best": [4], "median": [1], "worst": [2]}
    assert "2 items have no score" in describe_rule(
        make_noise_gallery(5, score=[np.nan, 0.5, 0.1, np.nan, 0.9])
    )


def test_fewer_than_three_items_are_all_shown():
    assert select_items([0.1, 0.3], 4)["all"].tolist() == [1, 0]
    assert select_items([np.nan], 4)["all"].tolist() == [0]


def test_ties_keep_the_given_order():
    assert select_items(np.ones(9), 2)["best"].tolist() == [0, 1]


def test_quantiles_reach_from_best_to_worst_at_equal_steps():
    score = np.random.default_rng(0).permutation(101) / 100
    picks = select_items(score, 5, blocks=["quantiles"])["quantiles"]
    assert score[picks].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert len(select_items([0.1, 0.2, 0.3], 9, blocks=["quantiles"])["quantiles"]) == 3


def test_a_random_block_follows_its_seed_alone():
    """The draw takes places in the sorted list, so that neither names nor the order of the rows move it."""
    score = np.random.default_rng(1).permutation(200) / 200
    draws = [score[select_items(score, 6, blocks=["random"], seed=seed)["random"]] for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert not (draws[0] == draws[2]).all()
    order = np.random.default_rng(2).permutation(200)
    assert (score[order][select_items(score[order], 6, blocks=["random"])["random"]] == draws[0]).all()
    assert (np.diff(draws[0]) < 0).all()
    many = np.concatenate([select_items(score, 6, blocks=["random"], seed=s)["random"] for s in range(200)])
    assert abs(score[many].mean() - 0.5) < 0.05


def test_the_rule_is_told_for_every_block():
    text = describe_rule(make_noise_gallery(n_each=3, blocks=["quantiles", "random"], seed=7))
    assert (
        "3 at evenly spaced quantiles from best to worst and 3 drawn at random with seed 7 are shown" in text
    )
    assert "30 items" in text
    assert "not by hand" in text
    short = describe_rule(make_noise_gallery(), short=True)
    assert short == "Of 30 items sorted by pixel correlation: 4 best, 4 around the median, 4 worst."
