"""Exact p-values equal enumeration in words and agree with drawn ones."""

import itertools

import numpy as np
import pytest

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.metrics import exact
from braindecode_vis.metrics.uncertainty import permutation_test


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("groups", [None, list("aabbb")])
def test_every_assignment_is_looked_at(alternative, groups):
    table = np.random.default_rng(0).integers(0, 3, (5, 5)).astype(float)  # ties happen
    found = exact.exact_permutation_test(table, groups=groups, alternative=alternative)
    null = [
        np.mean([table[i, order[i]] for i in range(5)])
        for order in itertools.permutations(range(5))
        if groups is None or all(groups[i] == groups[order[i]] for i in range(5))
    ]
    assert len(found.null) == len(null) == exact.count_assignments(5, groups=groups)
    np.testing.assert_allclose(np.sort(found.null), np.sort(null))
    observed, centre = np.trace(table) / 5, np.mean(null)
    extreme = {
        "greater": [v >= observed - 1e-9 for v in null],
        "less": [v <= observed + 1e-9 for v in null],
        "two-sided": [abs(v - centre) >= abs(observed - centre) - 1e-9 for v in null],
    }[alternative]
    assert found.p_value == pytest.approx(np.mean(extreme))
    drawn = permutation_test(table, groups=groups, alternative=alternative, n_permutations=20_000)
    assert drawn.p_value == pytest.approx(found.p_value, abs=0.015)  # four standard errors
    assert drawn.null_mean == pytest.approx(found.null_mean)


def test_signs_are_flipped_in_every_way():
    values = np.array([0.5, 1.5, -0.25, 2.0, 1.0])
    sums = [np.dot(signs, values) for signs in itertools.product([1, -1], repeat=5)]
    for alternative, extreme in (
        ("greater", [s >= values.sum() - 1e-9 for s in sums]),
        ("two-sided", [abs(s) >= abs(values.sum()) - 1e-9 for s in sums]),
    ):
        assert exact.exact_sign_flip(values, alternative=alternative) == pytest.approx(np.mean(extreme))


def test_too_many_items_are_refused():
    with pytest.raises(ConfigError, match="3628800 assignments"):
        exact.exact_permutation_test(np.eye(10))
    assert exact.exact_permutation_test(np.eye(10), groups=list("aaaaabbbbb")).p_value == 1 / 14400
    with pytest.raises(ConfigError, match="21 units"):
        exact.exact_sign_flip(np.ones(21))
    with pytest.raises(DataError, match="one row and one column"):
        exact.exact_permutation_test(np.ones((2, 3)))
