"""Corrections equal statsmodels-free definitions, and the maximum statistic holds the family-wise level."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from braindecode_vis.checks import DataError
from braindecode_vis.metrics import multiplicity as mult


def test_holm_equals_the_definition_test_by_test():
    p = np.random.default_rng(0).uniform(0, 0.2, 9)
    found = mult.correct_holm(p)
    for i in range(9):
        smaller = [j for j in range(9) if p[j] <= p[i]]
        expected = max(min(1, p[j] * sum(p[k] >= p[j] for k in range(9))) for j in smaller)
        assert found[i] == pytest.approx(expected)
    assert (found >= p).all()


def test_benjamini_hochberg_equals_scipy():
    for n in (1, 2, 30):
        p = np.random.default_rng(n).uniform(0, 1, n)
        np.testing.assert_allclose(mult.correct_benjamini_hochberg(p), false_discovery_control(p))


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_the_maximum_bounds_any_false_claim(alternative):
    rng = np.random.default_rng(1)
    shared = 0.7  # correlated tests, as time points are
    claims = 0
    for _ in range(400):
        draw = np.sqrt(shared) * rng.standard_normal((200, 1)) + np.sqrt(1 - shared) * rng.standard_normal(
            (200, 8)
        )
        p = mult.correct_by_maximum(draw[0], draw[1:], alternative=alternative)
        claims += p.min() <= 0.05
    # 400 runs at 5 %: four standard errors are 0.044.
    assert 0.01 < claims / 400 < 0.05 + 0.044


def test_bad_input_is_refused():
    for wrong in (np.array([0.1, 1.2]), np.array([0.1, np.nan]), np.zeros((2, 2))):
        with pytest.raises(DataError, match="between 0 and 1"):
            mult.correct_holm(wrong)
    with pytest.raises(DataError, match="n_permutations, n_tests"):
        mult.correct_by_maximum(np.zeros(3), np.zeros((5, 2)))
    with pytest.raises(DataError, match="not finite"):
        mult.correct_by_maximum(np.array([np.nan]), np.zeros((5, 1)))
