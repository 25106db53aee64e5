"""Semantic accuracy equals the mean over every draw of classes, and its random estimate."""

import itertools

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring.metrics.suite import compute_semantic_table, make_win_table, name_semantic_metric


@pytest.mark.parametrize("n, top_k", [(2, 1), (3, 1), (4, 2), (6, 1)])
def test_it_equals_the_mean_over_every_draw(n, top_k):
    rng = np.random.default_rng(0)
    seen, made = rng.standard_normal((3, 6)), rng.integers(0, 4, (5, 6)).astype(float)  # ties happen
    found = compute_semantic_table(seen, made, n, top_k=top_k)
    for i, j in itertools.product(range(5), range(3)):
        label = int(np.argmax(seen[j]))
        others = [c for c in range(6) if c != label]
        hits = [
            sum(made[i, c] >= made[i, label] for c in drawn) < top_k
            for drawn in itertools.combinations(others, n - 1)
        ]
        assert found[i, j] == pytest.approx(np.mean(hits))


def test_published_draws_scatter_around_it():
    rng = np.random.default_rng(1)
    seen, made = rng.standard_normal((1, 1000)), rng.standard_normal((1, 1000))
    made[0, seen.argmax()] = 1.8
    label, hits = int(seen.argmax()), []
    for _ in range(2000):
        drawn = rng.choice(np.delete(np.arange(1000), label), 49, replace=False)
        hits.append(made[0, label] > made[0, drawn].max())
    exact = compute_semantic_table(seen, made, 50)[0, 0]
    assert np.mean(hits) == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 2000))


def test_a_classifier_that_sees_nothing_is_at_chance():
    assert make_win_table(1000, 50, 1).mean() == pytest.approx(1 / 50)
    assert make_win_table(20, 5, 2).mean() == pytest.approx(2 / 5)
    assert name_semantic_metric(50, 1, "x") == "50_way_top1_semantic_accuracy@x"


def test_impossible_numbers_are_refused():
    logits = np.zeros((2, 4))
    for n, top_k in ((5, 1), (1, 1), (3, 3)):
        with pytest.raises(ConfigError, match="semantic accuracy"):
            compute_semantic_table(logits, logits, n, top_k=top_k)
    with pytest.raises(DataError, match="cannot be compared"):
        compute_semantic_table(logits, np.zeros((2, 5)), 2)
