import numpy as np

from braindecode_vis.generation.priors.simulated_predictions import fit_prediction_error


def make_pairs(n, *, seed=0, d=5):
    """A linear encoder that shrinks and whose errors are correlated."""
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    mix = rng.normal(size=(d, d))
    predicted = 0.4 * (targets - 3) + 0.7 * rng.normal(size=(n, d)) @ mix + 1
    return predicted, targets


def test_simulated_predictions_have_the_moments_of_real_ones():
    predicted, targets = make_pairs(4000)
    error = fit_prediction_error(predicted, targets)
    drawn = error.draw(targets.astype(np.float32), np.random.default_rng(1))
    scale = np.abs(np.cov(predicted.T)).max()
    np.testing.assert_allclose(drawn.mean(0), predicted.mean(0), atol=0.12)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(predicted.T), atol=0.07 * scale)
    joint = np.cov(drawn.T, targets.T)[:5, 5:]
    wanted = np.cov(predicted.T, targets.T)[:5, 5:]
    np.testing.assert_allclose(joint, wanted, atol=0.07 * np.abs(wanted).max())


def test_the_gain_is_found_and_bare_noise_would_be_wrong():
    predicted, targets = make_pairs(4000)
    error = fit_prediction_error(predicted, targets)
    np.testing.assert_allclose(error.gain[0, 1:], 0.4, atol=0.1)  # the least component is mostly noise
    # Target plus noise of the error's covariance has more variance than any prediction.
    naive = np.cov(targets.T).trace() + np.cov((predicted - targets).T).trace()
    assert naive > 1.5 * np.cov(predicted.T).trace()


def test_new_images_tokens_and_few_pairs():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(12, 3, 20)).astype(np.float32)  # fewer pairs than features
    error = fit_prediction_error(0.5 * targets + 1, targets)
    new = rng.normal(size=(7, 3, 20)).astype(np.float32)
    drawn = error.draw(new, np.random.default_rng(1))
    assert drawn.shape == (7, 3, 20)
    assert np.isfinite(drawn).all()
    np.testing.assert_allclose(error.predict_mean(targets), 0.5 * targets + 1, atol=0.02)
    np.testing.assert_array_equal(drawn, error.draw(new, np.random.default_rng(1)))


def test_a_component_that_never_varies_has_no_gain():
    targets = np.random.default_rng(0).normal(size=(50, 3))
    targets[:, 1] = 2.0
    error = fit_prediction_error(targets + 0.1, targets)
    assert np.isfinite(error.gain).all()
    assert (error.gain == 0).sum() == 1


def test_what_an_encoder_says_of_every_image_alike_is_no_gain():
    """Neither the mean of predictions nor that of targets has a part in how one follows the other."""
    targets = np.random.default_rng(0).normal(size=(400, 4)) * [1, 2, 3, 4] + 7
    error = fit_prediction_error(0.25 * targets + 40, targets)
    np.testing.assert_allclose(error.gain, 0.25, rtol=1e-3)  # in single precision
    np.testing.assert_allclose(error.residuals, 0, atol=1e-4)
    np.testing.assert_allclose(error.predict_mean(targets.astype(np.float32)), 0.25 * targets + 40, rtol=1e-4)
