"""Scales of embeddings, value by value and along principal components."""

import numpy as np

from braindecode_vis.priors.scales import fit_components


def test_components_have_unit_variance_and_no_correlation():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 6)) + 5
    components = fit_components(vectors.astype(np.float16), 4)
    found = components.apply(vectors)
    np.testing.assert_allclose(np.cov(found.T), np.eye(4), atol=0.01)
    np.testing.assert_allclose(components.basis @ components.basis.T, np.eye(4), atol=1e-5)
    assert components.shares[0] == 1
    assert np.all(np.diff(components.shares) < 0)


def test_there_are_no_more_components_than_the_embeddings_allow():
    rng = np.random.default_rng(0)
    assert fit_components(rng.normal(size=(5, 20)), 320).basis.shape == (4, 20)
    flat = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 9))
    assert fit_components(flat, 320).basis.shape == (2, 9)
    equal = fit_components(np.ones((4, 3)), 2)
    np.testing.assert_array_equal(equal.apply(np.ones((2, 3))), np.zeros((2, 1)))


def test_only_evenly_spaced_rows_are_looked_at():
    n = 400
    vectors = np.zeros((2 * n, 2), np.float32)
    vectors[::2] = np.random.default_rng(0).normal(size=(n, 2))
    vectors[1::2] = 1e6
    assert fit_components(vectors, 2, most_rows=n).std.max() < 2
