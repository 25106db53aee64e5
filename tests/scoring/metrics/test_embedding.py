"""Distances of embeddings equal scipy and their definitions."""

import numpy as np
import pytest
from scipy.spatial import distance

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics.embedding import (
    compute_mmd,
    correlation_distance,
    find_bandwidth,
    tabulate_correlation_distance,
)
from tests.references import CLOSE, assert_close


def test_values_equal_scipy():
    rng = np.random.default_rng(0)
    predicted, target = rng.standard_normal((2, 5, 2, 5)).astype(np.float32)  # tokens are flattened
    pairs = [
        (p.ravel().astype(float), q.ravel().astype(float)) for p, q in zip(predicted, target, strict=True)
    ]
    # Double precision in both: rounding only.
    correlations = [distance.correlation(*p) for p in pairs]
    assert_close(correlation_distance(predicted, target), correlations)
    table = tabulate_correlation_distance(predicted, target)
    assert_close(np.diagonal(table), correlations)


def test_a_constant_vector_is_uninformative():
    target = np.array([[1.0, 2, 4]])
    assert correlation_distance(np.full((1, 3), 0.1), target)[0] == 1


def make_rows(n, d, *, seed, shift=0.0, scale=1.0):
    rows = shift + scale * np.random.default_rng(seed).normal(size=(n, d))
    return Embeddings(rows.astype(np.float32), [f"i{k}" for k in range(n)], "toy")


def slow_mmd(x, y, width):
    """The definition, pair by pair."""

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * width**2))

    xx = np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(len(y)) for j in range(len(y)) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    return xx + yy - 2 * xy


def test_mmd_is_the_mean_over_pairs():
    left, right = make_rows(9, 4, seed=0), make_rows(7, 4, seed=1, shift=0.5)
    x, y = left.vectors.astype(float), right.vectors.astype(float)
    assert compute_mmd(left, right, bandwidth=1.3) == pytest.approx(slow_mmd(x, y, 1.3), rel=CLOSE)
    pooled = np.concatenate([x, y])
    distances = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(16) for j in range(i)]
    assert find_bandwidth(pooled) == pytest.approx(np.median(distances))
    assert compute_mmd(left, right) == pytest.approx(slow_mmd(x, y, np.median(distances)), rel=CLOSE)


def test_it_grows_with_the_shift_and_ignores_the_pairing():
    """Predictions shrunk to half their spread are far, however well each is placed."""
    base = make_rows(300, 5, seed=0)
    mmd = [compute_mmd(base, make_rows(300, 5, seed=1, shift=s)) for s in (0.0, 0.3, 1.0)]
    assert abs(mmd[0]) < 0.01 < mmd[1] < mmd[2]
    shuffled = Embeddings(base.vectors[::-1].copy(), base.ids, "toy")
    assert compute_mmd(shuffled, base) == pytest.approx(compute_mmd(base, base), rel=CLOSE)
    assert compute_mmd(Embeddings(base.vectors * 0.5, base.ids, "toy"), base) > 0.02


def test_what_cannot_be_compared_is_refused():
    base = make_rows(5, 3, seed=0)
    with pytest.raises(DataError, match="cannot be compared"):
        compute_mmd(base, Embeddings(base.vectors, base.ids, "other"))
    with pytest.raises(DataError, match="cannot be compared by 1 row"):
        compute_mmd(base, Embeddings(base.vectors[:1], ["a"], "toy"))
    flat = Embeddings(np.ones((3, 2), np.float32), ["a", "b", "c"], "toy")
    with pytest.raises(DataError, match="all rows of 'toy' are equal"):
        compute_mmd(flat, flat)
