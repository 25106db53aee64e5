import numpy as np
import pytest
import torch

from braindecode_vis.generation.generator_data import RepetitionNoise
from braindecode_vis.generation.latent_diffusion_networks import blur, draw_reliability, fit_uncertainty
from braindecode_vis.generation.priors.scales import PrincipalComponents

PLAIN = PrincipalComponents(np.zeros(3, np.float32), np.eye(3, dtype=np.float32), np.ones(3, np.float32))


def test_blurred_components_are_best_linear_estimates():
    generator = torch.Generator().manual_seed(0)
    true, noise = (torch.randn(40_000, 3, generator=generator) for _ in range(2))
    reliability = torch.tensor([0.1, 0.5, 1.0]).expand(40_000, 3)
    estimate = blur(true, reliability, noise)
    torch.testing.assert_close(estimate.var(dim=0), reliability[0], atol=0.02, rtol=0)
    slope = (estimate * true).mean(dim=0) / estimate.square().mean(dim=0)
    torch.testing.assert_close(slope, torch.ones(3), atol=0.03, rtol=0)
    torch.testing.assert_close(estimate[:, 2], true[:, 2])
    assert not blur(true, torch.zeros_like(true), noise).any()


def test_training_conditions_are_certain_hidden_and_in_between_as_often_as_asked():
    shares = torch.tensor([1.0, 0.1, 0.01])
    generator = torch.Generator().manual_seed(0)
    drawn = draw_reliability(shares, 20_000, generator, certain=0.5, hidden=0.1)
    assert drawn.shape == (20_000, 3)
    assert (drawn == 1).all(dim=1).float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert (drawn == 0).all(dim=1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    between = drawn[((drawn > 0) & (drawn < 1)).any(dim=1)].mean(dim=0)
    assert between[0] > between[1] > between[2] > 0.05


def simulate(rng, n, strength, n_repetitions):
    """Components, and predictions that are half as long and have noise of single repetitions on them."""
    true = rng.normal(size=(n, 3))
    noise = rng.normal(size=(n_repetitions, n, 3)) * strength
    return true, 0.5 * true + noise, noise


def test_uncertainty_of_test_trials_counts_their_repetitions():
    """Learnt on averages of 2, used on averages of 20: estimates must be unbiased and as reliable as stated."""
    rng = np.random.default_rng(0)
    strength = np.array([0.2, 1.0, 4.0])
    true, single, _ = simulate(rng, 30_000, strength, 2)
    deviations = ((single - single.mean(axis=0)) * np.sqrt(2)).reshape(-1, 3)
    noise = RepetitionNoise(deviations.astype(np.float32), n_train=2, n_test=20)
    uncertainty = fit_uncertainty(single.mean(axis=0), true, noise, PLAIN)

    expected = 0.25 / (0.25 + strength**2 / 20)
    np.testing.assert_allclose(uncertainty.reliability, expected, atol=0.03)
    true, single, _ = simulate(rng, 30_000, strength, 20)
    estimate = uncertainty.estimate(single.mean(axis=0))
    slope = (estimate * true).mean(axis=0) / (estimate**2).mean(axis=0)
    np.testing.assert_allclose(slope, 1, atol=0.06)
    np.testing.assert_allclose((estimate**2).mean(axis=0), expected, atol=0.05)


def test_predictions_without_information_have_no_reliability():
    rng = np.random.default_rng(0)
    n_positive = 0
    for _ in range(20):
        uncertainty = fit_uncertainty(rng.normal(size=(200, 3)), rng.normal(size=(200, 3)), None, PLAIN)
        assert uncertainty.reliability.max() < 0.06
        n_positive += int((uncertainty.reliability > 0).sum())
    assert n_positive < 30  # of 60; a correlation is positive and above chance by luck in 16 of 100
    constant = fit_uncertainty(np.zeros((10, 3)), rng.normal(size=(10, 3)), None, PLAIN)
    assert not constant.reliability.any()
    assert np.isfinite(constant.estimate(np.ones((2, 3)))).all()
