"""Words for numbers and metrics."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.report import words
from braindecode_vis.scoring.score_row import format_p_value


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"), (float("nan"), "–"), (math.inf, "–"), (np.float32("nan"), "–"),
        (0.787123, "0.787"), (0.1, "0.10"), (0.005, "0.005"), (0.0385, "0.0385"), (1.0, "1.00"), (0.0, "0.00"),
        (-0.25, "−0.25"),
        (-0.0, "0.00"), (100.5, "100.5"), (1e-7, "1.0e-07"), (12345.6, "12,346"),
        (3092, "3,092"), (np.int64(5), "5"), (True, "yes"), ("MIT", "MIT"),
    ],
)  # fmt: skip
def test_numbers_have_sensible_digits(value, text):
    assert words.format_number(value) == text


def test_a_group_shares_its_decimals():
    decimals = words.count_decimals([1.0, 0.655, None])
    assert [words.format_number(v, decimals) for v in (1.0, 0.655)] == ["1.000", "0.655"]
    assert words.format_number(-0.0001, 2) == "0.00"


@pytest.mark.parametrize("value, text", [(0.0, "< 0.001"), (0.04, "0.040"), (0.5, "0.50"), (None, "–")])
def test_a_p_value_is_never_zero(value, text):
    assert format_p_value(value) == text
    in_words = {"–": "no p", "< 0.001": "p < 0.001"}.get(text, f"p = {text}")
    assert format_p_value(value, in_words=True) == in_words


def test_one_function_writes_every_p_value():
    """Some places printed 0.0005 with three decimals, which is 0.000, and others 0.00033."""
    own = r"""(\bp_[a-z]+|\.p)["'\]]*:\.\d"""
    sources = Path(words.__file__).parents[1].rglob("*.py")
    assert [path for path in sources if re.search(own, path.read_text())] == []


@pytest.mark.parametrize(
    "metric, label, direction",
    [
        ("pixcorr@28", "Pixel correlation (28)", 1),
        ("mse", "Mean squared error", -1),
        ("top10", "Top-10 accuracy", 1),
        ("median_rank", "Median rank", -1),
        ("two_way_identification_within_class", "Within-class two-way identification in pixels", 1),
        ("two_way_identification@pixels", "Two-way identification in pixels", 1),
        ("two_way_identification@clip", "Two-way identification in features of clip", 1),
        ("2_way", "Two-way identification in the embedding", 1),
        ("auc", "AUC", 1),
        ("50-way", "50-way identification in the embedding", 1),
        ("rank", "Rank", -1),
        ("strange_new_score", "Strange new score", 0),
    ],
)
def test_known_metrics_have_words_and_a_direction(metric, label, direction):
    note = words.describe_metric(metric)
    assert (note.label, note.direction) == (label, direction)


def test_given_words_win():
    mine = words.MetricNote("Mine", "", -1)
    assert words.describe_metric("ssim@28", {"ssim": mine}) == mine


def test_the_best_of_several_draws_has_a_name_of_its_own():
    note = words.describe_metric("best_of_3_mse@28")
    assert note.label == "Best of 3 draws: Mean squared error (28)"
    assert note.direction == -1
    assert "chosen with the seen image" in note.meaning


AUTO = {"kind": "auto", "candidates": [{"kind": "ridge", "alphas": [2.0]}, {"kind": "linear_gaussian"}]}


@pytest.mark.parametrize(
    "encoder, fitted, expected",
    [
        ({"kind": "network", "network": {"kind": "eegnet"}, "epochs": 1000}, None, "EEGNet, 1000 epochs"),
        ({"kind": "network", "network": {"kind": "braindecode", "model": "Deep4Net"}}, None, "Deep4Net"),
        ({"kind": "ridge", "alphas": [1000.0]}, None, "ridge, penalty 1,000"),
        ({"kind": "ridge", "alphas": [1.0, 2.0]}, None, "ridge, penalty chosen among 2"),
        ({"kind": "ridge", "alphas": [1.0, 316.23]}, {"alpha": 316.2278}, "ridge, penalty 316"),
        ({"kind": "ridge"}, {"alpha": [1.0, 2.0]}, "ridge"),  # a penalty for each target
        (AUTO, None, "one of 2 encoders, chosen by inner folds (ridge, penalty 2; linear Gaussian model)"),
        (AUTO, {"chosen": [1, 1]}, "linear Gaussian model; chosen among 2 encoders by inner folds"),
        (
            AUTO,
            {"chosen": [1, 0, 1]},
            "ridge, penalty 2 in 1 of 3 folds; linear Gaussian model in 2 of 3 folds; "
            "chosen among 2 encoders by inner folds",
        ),
        ({"kind": "my_package.mine:OwnConfig"}, None, "OwnConfig"),
        ({}, None, ""),
    ],
)
def test_a_method_is_named_by_what_it_is(encoder, fitted, expected):
    """Cards and tables said `network`, whatever network it was and however long it was trained."""
    assert words.describe_encoder(encoder, fitted) == expected


@pytest.mark.parametrize(
    "objectives, expected",
    [
        ([{"kind": "clip"}], "ATM-S"),  # as it was called before
        ([{"kind": "clip", "weight": 0.5, "phase": [0.0, 1.0]}], "ATM-S"),
        ([{"kind": "mmd", "weight": 1.0}], "ATM-S, objective mmd"),
        (
            [{"kind": "clip", "weight": 1.0}, {"kind": "mmd", "weight": 0.9, "weight_end": 0.5}],
            "ATM-S, objectives clip + 0.9 to 0.5 mmd",
        ),
        (
            [{"kind": "bimixco", "phase": [0, 0.33]}, {"kind": "soft_clip", "weight": 2, "phase": [0.33, 1]}],
            "ATM-S, objectives bimixco (0 to 33 %) + 2 soft_clip (33 to 100 %)",
        ),
        ("damaged", "ATM-S"),
    ],
)
def test_a_method_is_named_by_its_objectives(objectives, expected):
    """A board showed three objectives under one name."""
    encoder = {"kind": "network", "network": {"kind": "atm_s"}, "objectives": objectives}
    assert words.describe_encoder(encoder) == expected
    both = {"kind": "average", "members": [encoder, {"kind": "ridge"}]}
    assert words.describe_objectives(both) == expected.partition(", ")[2]
