"""What the embedded generator is told of an image: components of its embedding, and how far each of them is known.

An embedding is described by its leading principal components, scaled to unit variance over the training images of the
generator. Beside each component stands its reliability, the share of its variance that is known: 1 for the embedding of
an image, 0 where nothing is known, in between for what was decoded from a brain. The value is then the best linear
estimate, whose variance is the reliability itself. Training draws both at random, so that one network serves true
embeddings, decoded ones and none at all (which is what classifier-free guidance compares with).

`fit_uncertainty` finds the reliabilities of a brain encoder on its training trials. Components are judged one by one;
that their errors are independent and Gaussian is an assumption. The idea of telling the network how noisy its condition
is comes from cascaded diffusion (Ho et al. 2022, arXiv:2106.15282); one reliability per component is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from braindecode_vis.generators.generator_data import RepetitionNoise

MOST_ROWS = 20_480  # rows that the principal components are computed from


@dataclass(frozen=True)
class Components:
    """Principal components of embeddings, scaled to unit variance.

    Parameters
    ----------
    mean : float32 array of shape (n_features,)
    basis : float32 array of shape (n_features, n_components)
        Orthonormal axes, the one of largest variance first.
    scale : float32 array of shape (n_components,)
        Standard deviation along each axis, descending.
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Variance of each component relative to the largest, shape (n_components,)."""
        return (self.scale / self.scale.max()) ** 2

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Return components of shape (n, n_components) of vectors of shape (n, n_features)."""
        return ((vectors - self.mean) @ self.basis) / self.scale

    def restore(self, components: np.ndarray) -> np.ndarray:
        """Return vectors of shape (n, n_features) from the first components of each, of shape (n, at most all)."""
        n = components.shape[1]
        return self.mean + (components * self.scale[:n]) @ self.basis[:, :n].T


def fit_components(vectors: np.ndarray, n_components: int) -> Components:
    """Return the leading principal components of embeddings; fewer where rows or features are fewer.

    Parameters
    ----------
    vectors : float array of shape (n, n_features)
        At most `MOST_ROWS` rows, evenly spaced, are looked at.
    n_components
        How many are wanted.
    """
    from sklearn.decomposition import PCA

    rows = vectors[:: -(-len(vectors) // MOST_ROWS)].astype(np.float32)
    if np.ptp(rows, axis=0).max() == 0:  # no component at all; one is kept that says nothing
        return Components(rows[0], np.zeros((rows.shape[1], 1), np.float32), np.ones(1, np.float32))
    pca = PCA(min(n_components, rows.shape[1], len(rows) - 1), random_state=0).fit(rows)
    scale = np.sqrt(pca.explained_variance_)
    kept = scale > 1e-3 * scale.max()
    return Components(
        pca.mean_.astype(np.float32),
        pca.components_.T[:, kept].astype(np.float32),
        scale[kept].astype(np.float32),
    )


def draw_reliability(
    shares: torch.Tensor, n: int, generator: torch.Generator, *, certain: float, hidden: float
) -> torch.Tensor:
    """Return reliabilities of n training conditions, of shape (n, n_components) between 0 and 1.

    A share `certain` of the rows is known fully and a share `hidden` not at all. The others get noise of a random
    strength that falls on all components alike, or the more on those of small variance, with a scatter of its own for
    each component.
    """
    import torch

    draws = torch.rand(3, n, 1, generator=generator)
    scatter = 0.5 * torch.randn(n, len(shares), generator=generator)
    strength = (-1.5 + 3.5 * draws[0]) * np.log(10)
    reliability = torch.sigmoid(1.5 * draws[1] * shares.log() - strength + scatter)
    reliability = torch.where(draws[2] < certain, torch.ones(()), reliability)
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
    predicted: np.ndarray, true: np.ndarray, noise: RepetitionNoise | None, components: Components
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
    covariance = np.maximum((left * right).mean(axis=0), 0)
    if noise is not None:
        single = ((noise.deviations @ components.basis / components.scale) ** 2).mean(axis=0)
        # At least what is correlated with the image stays.
        signal = np.maximum(variance - single / noise.n_train, covariance**2 / np.maximum(target, 1e-12))
        variance = signal + single / noise.n_test
    variance, target = np.maximum(variance, 1e-12), np.maximum(target, 1e-12)
    explained = covariance**2 / (variance * target)
    # By chance alone a correlation of n pairs has a square of 1 / n.
    kept = np.clip(explained - 1 / n, 0, 0.99)
    slope = covariance / variance * np.where(explained > 0, kept / np.maximum(explained, 1e-12), 0)
    return Uncertainty(predicted.mean(axis=0), true.mean(axis=0), slope, kept)
