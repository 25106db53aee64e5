"""Scales of embeddings, value by value and along principal components."""

import numpy as np

from braindecode_vis.generation.priors.scales import find_bounds, fit_components, fit_scale, turn_rows


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


def test_scales_undo_what_they_apply():
    """Spreads far from 1, one per value: dividing where one should multiply cannot pass."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 3, 4)) * np.array([0.01, 1.0, 30.0, 500.0]) + np.array(
        [5.0, -3.0, 0.0, 100.0]
    )
    scale = fit_scale(rows)
    np.testing.assert_allclose(scale.mean, rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(scale.std, rows.std(axis=0), rtol=1e-5)
    applied = scale.apply(rows)
    np.testing.assert_allclose(applied.std(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(applied.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scale.undo(applied), rows, rtol=1e-4, atol=1e-3)
    flat = rng.normal(size=(200, 4)) * [0.5, 1.0, 10.0, 100.0] + 7
    components = fit_components(flat, 4)
    np.testing.assert_allclose(components.undo(components.apply(flat)), flat, atol=1e-3)
    # The first components alone give what is nearest with so many.
    np.testing.assert_allclose(components.undo(components.apply(flat)[:, :2])[:, 2:], flat[:, 2:], atol=1.0)
    np.testing.assert_allclose(components.shares[:2], [1, 0.01], rtol=0.3)


def test_a_value_that_never_varies_keeps_its_size():
    steps = np.linspace(-1, 1, 40)
    # A deviation counts above a millionth of the largest one and of the value's own mean: the rounding of float32.
    rows = np.stack(
        [np.full(40, 3.0), steps, 0.5e-6 * steps, 2e-6 * steps, 10 + 3e-6 * steps, 10 + 5e-5 * steps], axis=1
    )
    std = fit_scale(rows).std
    np.testing.assert_array_equal(std[[0, 2, 4]], 1)
    np.testing.assert_allclose(std[[1, 3, 5]], rows.std(axis=0)[[1, 3, 5]], rtol=1e-5)


def test_bounds_lie_a_tenth_of_the_range_beyond_each_value():
    np.testing.assert_allclose(
        find_bounds(np.array([[0.0, 5.0], [10.0, 5.0], [4.0, 25.0]])), [[-1, 3], [11, 27]]
    )


def test_rows_turn_from_their_own_direction_to_the_goal():
    rows, goals = np.array([[3.0, 0.0]]), np.array([[0.0, 0.5]])
    for pull, expected in (
        (0.0, [1, 0]),
        (1.0, [0, 1]),
        (0.5, [0.5**0.5, 0.5**0.5]),
        (0.2, [4 / 17**0.5, 1 / 17**0.5]),
    ):
        np.testing.assert_allclose(turn_rows(rows, goals, pull)[0], expected, rtol=1e-6)


def test_a_scale_is_found_in_double_precision():
    """Sums of 20 000 values about 1000 lose a deviation of 0.01 in single precision."""
    rows = (1000 + 0.01 * np.random.default_rng(0).normal(size=(20_000, 3))).astype(np.float32)
    scale = fit_scale(rows)
    np.testing.assert_allclose(scale.std, rows.astype(np.float64).std(axis=0), rtol=1e-6)  # kept as float32
    np.testing.assert_allclose(scale.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-6)
