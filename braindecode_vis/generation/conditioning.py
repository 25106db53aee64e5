"""What the embedded generator is conditioned on: components of an image embedding, and the reliability of each.

An embedding is described by its leading principal components, scaled to unit variance over the training images of the
generator. Beside each component stands its reliability, the share of its variance that is known: 1 for the embedding of
an image, 0 where nothing is known, in between for what was decoded from a brain. The value is then the best linear
estimate, whose variance is the reliability itself. Training draws both at random, so that one network serves true
embeddings, decoded ones and none at all (which is what classifier-free guidance compares with).

`fit_uncertainty` finds the reliabilities of a brain encoder on its training trials. Components are judged one by one;
that their errors are independent and Gaussian is an assumption. The idea of giving the network the noise of its
condition comes from cascaded diffusion (Ho et al. 2022, arXiv:2106.15282); one reliability per component is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from braindecode_vis.generation.generator_data import RepetitionNoise
    from braindecode_vis.generation.priors.scales import PrincipalComponents


def draw_reliability(
    shares: torch.Tensor, n: int, generator: torch.Generator, *, certain: float, hidden: float
) -> torch.Tensor:
    """Return reliabilities of n training conditions, of shape (n, n_components) between 0 and 1.

    A share `certain` of the rows is known fully and a share `hidden` not at all. The others get noise of a random
    strength that falls on all components alike, or the more on those of small variance, with a scatter of its own for
    each component.
    """
    import torch

    # Per row: how strong the noise is, how much more it falls on small components, and which kind of row it is.
    draws = torch.rand(3, n, 1, generator=generator)
    scatter = 0.5 * torch.randn(n, len(shares), generator=generator)
    strength = (-1.5 + 3.5 * draws[0]) * np.log(
        10
    )  # noise to signal from 0.03 to 100, evenly in its logarithm
    reliability = torch.sigmoid(1.5 * draws[1] * shares.log() - strength + scatter)
    reliability = torch.where(draws[2] < certain, torch.ones(()), reliability)
    # Rows without any condition are what guidance compares with.
    return torch.where(draws[2] >= 1 - hidden, torch.zeros(()), reliability)


def blur(components: torch.Tensor, reliability: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return best linear estimates of components of unit variance that are known with the given reliability.

    Parameters
    ----------
    components, reliability, noise : tensors of shape (n, n_components)
        The noise has unit variance.
    """
    return reliability * components + (reliability * (1 - reliability)).sqrt() * noise


@dataclass(frozen=True)
class Uncertainty:
    """How predicted components become best estimates, and how reliable these are.

    Parameters
    ----------
    predicted_mean, target_mean : float arrays of shape (n_components,)
        Over the training trials.
    slope : float array of shape (n_components,)
        Of the true component on the predicted one.
    reliability : float array of shape (n_components,)
        Share of the variance that the prediction explains.
    """

    predicted_mean: np.ndarray
    target_mean: np.ndarray
    slope: np.ndarray
    reliability: np.ndarray

    def estimate(self, predicted: np.ndarray) -> np.ndarray:
        """Return the best estimates of predicted components, both of shape (n, n_components)."""
        return self.target_mean + self.slope * (predicted - self.predicted_mean)


def fit_uncertainty(
    predicted: np.ndarray, true: np.ndarray, noise: RepetitionNoise | None, components: PrincipalComponents
) -> Uncertainty:
    """Learn from predictions of training trials how far each component can be trusted in a test trial.

    Test trials are often averages of more repetitions than training trials. What part of a prediction's variance is
    noise of single repetitions is measured on repetitions of training images, and counted as often as it remains.

    Parameters
    ----------
    predicted, true : float arrays of shape (n_trials, n_components)
        Predictions by an encoder that has not learnt from the trial, and the components of its image.
    noise
        Deviations of single repetitions; None takes test trials to be as noisy as training trials.
    components
        Turns the deviations into components.
    """
    left, right = predicted - predicted.mean(axis=0), true - true.mean(axis=0)
    n = len(left)
    variance, target = (left**2).mean(axis=0), (right**2).mean(axis=0)
    # A negative covariance is chance: no encoder predicts the opposite of what was seen.
    covariance = np.maximum((left * right).mean(axis=0), 0)
    if noise is not None:
        single = ((noise.deviations @ components.basis.T / components.std) ** 2).mean(axis=0)
        # At least what is correlated with the image stays.
        signal = np.maximum(variance - single / noise.n_train, covariance**2 / np.maximum(target, 1e-12))
        variance = signal + single / noise.n_test
    # A component that never varies, in the images or in what is predicted, is not known at all.
    variance, target = np.maximum(variance, 1e-12), np.maximum(target, 1e-12)
    explained = covariance**2 / (variance * target)
    # By chance alone a correlation of n pairs has a square of 1 / n.
    kept = np.clip(explained - 1 / n, 0, 0.99)
    # The slope of the regression, shrunk as much as its explained variance was.
    slope = covariance / variance * np.where(explained > 0, kept / np.maximum(explained, 1e-12), 0)
    return Uncertainty(predicted.mean(axis=0), true.mean(axis=0), slope, kept)
