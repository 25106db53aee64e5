import numpy as np
import pytest
from scipy.linalg import sqrtm

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.distribution import compute_frechet, compute_mmd, find_bandwidth


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
    assert compute_mmd(left, right, bandwidth=1.3) == pytest.approx(slow_mmd(x, y, 1.3), abs=1e-12)
    pooled = np.concatenate([x, y])
    distances = [np.linalg.norm(pooled[i] - pooled[j]) for i in range(16) for j in range(i)]
    assert find_bandwidth(pooled) == pytest.approx(np.median(distances))
    assert compute_mmd(left, right) == pytest.approx(slow_mmd(x, y, np.median(distances)), abs=1e-12)


@pytest.mark.parametrize("n", [6, 40])  # fewer and more rows than features
def test_frechet_is_the_formula_with_a_matrix_root(n):
    left, right = make_rows(n, 8, seed=0), make_rows(n + 3, 8, seed=1, shift=0.3, scale=1.7)
    x, y = left.vectors.astype(float), right.vectors.astype(float)
    c1, c2 = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(c1 @ c2 + 1e-12 * np.eye(8)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)
    assert compute_frechet(left, right) == pytest.approx(expected, rel=1e-4)


def test_both_grow_with_the_shift_and_vanish_without():
    base = make_rows(300, 5, seed=0)
    mmd = [compute_mmd(base, make_rows(300, 5, seed=1, shift=s)) for s in (0.0, 0.3, 1.0)]
    frechet = [compute_frechet(base, make_rows(300, 5, seed=1, shift=s)) for s in (0.0, 0.3, 1.0)]
    assert abs(mmd[0]) < 0.01 < mmd[1] < mmd[2]
    assert frechet[0] < 0.2 < frechet[1] < frechet[2]
    assert frechet[2] == pytest.approx(5 * 1.0**2, rel=0.1)  # the squared distance of the means
    assert compute_frechet(base, base) == pytest.approx(0, abs=1e-8)


def test_pairing_and_shrinkage():
    """Order does not matter; predictions shrunk to half their spread are far, however well each is placed."""
    base = make_rows(200, 5, seed=0)
    shuffled = Embeddings(base.vectors[::-1].copy(), base.ids, "toy")
    assert compute_frechet(shuffled, base) == pytest.approx(0, abs=1e-8)
    shrunk = Embeddings(base.vectors * 0.5, base.ids, "toy")
    assert compute_frechet(shrunk, base) == pytest.approx(0.25 * np.cov(base.vectors.T).trace(), rel=0.05)
    assert compute_mmd(shrunk, base) > 0.02


def test_what_cannot_be_compared_is_refused():
    base = make_rows(5, 3, seed=0)
    with pytest.raises(DataError, match="cannot meet"):
        compute_mmd(base, Embeddings(base.vectors, base.ids, "other"))
    with pytest.raises(DataError, match="cannot be told from 1 row"):
        compute_frechet(base, Embeddings(base.vectors[:1], ["a"], "toy"))
    flat = Embeddings(np.ones((3, 2), np.float32), ["a", "b", "c"], "toy")
    with pytest.raises(DataError, match="all rows of 'toy' are equal"):
        compute_mmd(flat, flat)
