"""Noise normalisation against scikit-learn, and the proof that test trials teach nothing."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.whitening import (
    CovarianceSum,
    compute_condition_weights,
    fit_mvnn,
    make_whitener,
    sum_shrunk_covariances,
)


def shrink_as_scikit_learn(samples):
    """Covariance of (n_samples, n_channels) as its discriminant analysis does with ``shrinkage="auto"``."""
    scale = samples.std(axis=0)
    scale[scale == 0] = 1
    return ledoit_wolf((samples - samples.mean(axis=0)) / scale)[0] * np.outer(scale, scale)


def make_epochs(n, n_channels=12, n_times=60, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_channels, n_channels))
    return (np.einsum("ij,ejt->eit", mixing, rng.standard_normal((n, n_channels, n_times))) * 1e-6).astype(
        np.float32
    )


@pytest.mark.parametrize("n_samples", [2, 5, 12, 13, 60])
def test_batched_shrinkage_equals_scikit_learn(n_samples):
    """Float32 products of numbers near 1e-6: five digits of the largest entry."""
    batch = make_epochs(7, n_times=n_samples) + np.float32(3e-6)
    weights = np.linspace(0.5, 1.5, 7)
    expected = sum(
        w * shrink_as_scikit_learn(x.T.astype(np.float64)) for w, x in zip(weights, batch, strict=True)
    )
    found = sum_shrunk_covariances(batch, weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_flat_channel_is_treated_as_in_scikit_learn():
    batch = make_epochs(3)
    batch[1, 4] = 2e-6
    expected = sum(shrink_as_scikit_learn(x.T.astype(np.float64)) for x in batch)
    found = sum_shrunk_covariances(batch, np.ones(3))
    others = [c for c in range(12) if c != 4]
    np.testing.assert_allclose(
        found[np.ix_(others, others)], expected[np.ix_(others, others)], atol=2e-6 * expected[0, 0]
    )


@pytest.mark.parametrize("variant", ["epochs", "time"])
def test_average_is_over_repetitions_then_images(variant):
    epochs = make_epochs(5)
    conditions = np.array(["b", "a", "b", "a", "a"])
    parts = []
    for name in ("a", "b"):
        data = epochs[conditions == name].astype(np.float64)
        sets = data if variant == "epochs" else data.transpose(2, 1, 0)
        parts.append(np.mean([shrink_as_scikit_learn(x.T) for x in sets], axis=0))
    expected = np.mean(parts, axis=0)
    whitener = fit_mvnn(epochs, conditions, variant=variant)
    np.testing.assert_allclose(whitener.covariance, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_whitened_noise_has_unit_covariance():
    epochs = make_epochs(40, n_channels=3, n_times=1500)
    whitener = fit_mvnn(epochs, np.arange(40) // 2)
    white = whitener.apply(epochs)
    assert white.dtype == np.float32
    # Shrinkage of 1500 samples over 3 channels leaves little of the correlation.
    np.testing.assert_allclose(np.cov(white.transpose(1, 0, 2).reshape(3, -1)), np.eye(3), atol=0.05)
    np.testing.assert_array_equal(whitener.apply(epochs, np.array([2, 0])), white[:, [2, 0]])
    root = whitener.matrix.astype(np.float64)
    np.testing.assert_allclose(root @ whitener.covariance @ root, np.eye(3), atol=1e-5)


def test_blocks_do_not_change_the_sum():
    epochs = make_epochs(50)
    weights = compute_condition_weights(np.arange(50) // 3)
    whole, pieces = CovarianceSum(12), CovarianceSum(12)
    whole.add(epochs, weights)
    for start in range(0, 50, 7):
        pieces.add(epochs[start : start + 7], weights[start : start + 7])
    np.testing.assert_allclose(whole.finish(), pieces.finish(), rtol=1e-5)


def test_singular_noise_is_refused():
    epochs = make_epochs(20)
    covariance = np.cov(epochs.transpose(1, 0, 2).reshape(12, -1))
    covariance[3] = covariance[:, 3] = 0
    with pytest.raises(DataError, match="12 channels is singular"):
        make_whitener(covariance)


def test_one_repetition_is_not_enough_for_the_time_variant():
    with pytest.raises(DataError, match="at least two repetitions"):
        fit_mvnn(make_epochs(4), np.arange(4), variant="time")
    with pytest.raises(DataError, match="no training trial"):
        CovarianceSum(3).finish()
