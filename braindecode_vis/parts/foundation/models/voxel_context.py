"""Voxel weights of a person from a context of pictures and responses, and their linear inversion.

Stage 1 of in-context decoding. Each voxel is a linear model of image vectors, ``response = weights @ vector + bias``
plus noise, as in BrainCoDec; its own estimator (BraInCoRL) is not public, and ridge weights stand in for it. The
penalty is learnt across people: the covariance of weights and how much of a voxel's response is signal come from the
voxels of training people, and each new voxel averages over those shares by their evidence in its context. The inversion
is the posterior mean of the image under these weights, their uncertainty, and noise that voxels share.

A context is kept as sums, centred within each recording, so that later trials of a person can be added.

References
----------
Yu et al. (2026), BrainCoDec, arXiv:2604.08537. MacKay (1992), evidence, doi:10.1162/neco.1992.4.3.415.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

#: Shares of signal in the variance of a voxel that are weighed against each other.
SHARES = np.array([0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99])
_ROUNDS = 4  # of expectation and maximisation for the prior; the shares hardly move later
_MOST_ROWS = 256  # of a context from which noise that voxels share is measured
# Weight of the measured covariance of noise beside a diagonal one; 0.15 to 0.3 find the same on phantoms.
_SHARED_NOISE = 0.2


@dataclass(frozen=True)
class VoxelContext:
    """What a person has shown of its voxels: sums over pictures and responses.

    Parameters
    ----------
    n : float
        Trials.
    vector_mean : array of shape (n_features,)
        Of image vectors, in the latest recording.
    response_mean : array of shape (n_voxels,)
        Of responses, in the latest recording.
    gram : array of shape (n_features, n_features)
        Products of centred image vectors.
    products : array of shape (n_features, n_voxels)
        Of these and centred responses.
    power : array of shape (n_voxels,)
        Sum of squares of centred responses.
    vectors, responses : arrays of shape (n_rows, n_features) and (n_rows, n_voxels)
        Some centred trials, by which noise is measured; float32, as they are most of the numbers.
    """

    n: float
    vector_mean: np.ndarray
    response_mean: np.ndarray
    gram: np.ndarray
    products: np.ndarray
    power: np.ndarray
    vectors: np.ndarray
    responses: np.ndarray

    def add(self, later: VoxelContext) -> VoxelContext:
        """Return both contexts as one, with the means of the later one."""
        rows = _MOST_ROWS - len(later.vectors)
        return replace(
            later,
            n=self.n + later.n,
            gram=self.gram + later.gram,
            products=self.products + later.products,
            power=self.power + later.power,
            vectors=np.concatenate([later.vectors, self.vectors[:rows]]),
            responses=np.concatenate([later.responses, self.responses[:rows]]),
        )

    def count_as(self, n: float) -> VoxelContext:
        """Return sums of the size of `n` trials."""
        share = n / self.n
        return replace(
            self, n=n, gram=share * self.gram, products=share * self.products, power=share * self.power
        )

    def lean_on(self, others: VoxelContext) -> VoxelContext:
        """Return this context together with one of others, whose means count by its trials, too."""
        own = self.n / (self.n + others.n)
        return replace(
            others.add(self),
            vector_mean=own * self.vector_mean + (1 - own) * others.vector_mean,
            response_mean=own * self.response_mean + (1 - own) * others.response_mean,
        )


def make_context(vectors: np.ndarray, responses: np.ndarray) -> VoxelContext:
    """Return the sums of a recording.

    Parameters
    ----------
    vectors : array of shape (n_trials, n_features)
        Image vectors.
    responses : array of shape (n_trials, n_voxels)
    """
    vector_mean, response_mean = vectors.mean(axis=0), responses.mean(axis=0, dtype=np.float64)
    shown, seen = vectors - vector_mean, responses - response_mean
    rows = np.linspace(0, len(shown) - 1, min(len(shown), _MOST_ROWS)).round().astype(int)
    return VoxelContext(
        float(len(shown)), vector_mean, response_mean, shown.T @ shown, shown.T @ seen, np.square(seen).sum(axis=0),
        shown[rows].astype(np.float32), seen[rows].astype(np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class VoxelPrior:
    """What training people say of the voxels of anybody.

    Parameters
    ----------
    images : array of shape (n_features, n_features)
        Covariance of image vectors.
    weights : array of shape (n_features, n_features)
        Second moment of the weights of a voxel without noise, whose response to these images has the variance 1.
    shares : array of shape (len(SHARES),)
        How frequent voxels of each share of signal are.
    """

    images: np.ndarray
    weights: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True)
class VoxelModel:
    """Linear models of the voxels of one person, in units of its z-scored responses.

    Parameters
    ----------
    mean, std : arrays of shape (n_voxels,)
        Of its responses.
    weights : array of shape (n_voxels, n_features)
    bias : array of shape (n_voxels,)
    signal : array of shape (n_voxels,)
        Expected share of signal in the variance.
    reader : array of shape (n_voxels, n_features)
        From z-scored responses less the bias to the posterior mean of the image.
    """

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    signal: np.ndarray
    reader: np.ndarray

    def scale(self, responses: np.ndarray) -> np.ndarray:
        """Return z-scored responses, float32 of shape (n_trials, n_voxels)."""
        return np.asarray((responses - self.mean) / self.std, dtype=np.float32)

    def invert(self, scaled: np.ndarray) -> np.ndarray:
        """Return the image vectors that linear models and noise make most likely, shape (n_trials, n_features)."""
        return np.asarray((scaled - self.bias) @ self.reader)


@dataclass(frozen=True)
class _Weights:
    """Weights of the voxels of a context, and what is not known of them."""

    std: np.ndarray
    weights: np.ndarray  # (n_voxels, n_features)
    shares: np.ndarray  # (n_shares, n_voxels), probabilities
    noise: np.ndarray  # (n_voxels,), with that of the weights
    uncertainty: np.ndarray  # (n_features, n_features), summed over voxels


def _estimate(prior: VoxelPrior, context: VoxelContext) -> _Weights:
    """Average ridge weights over shares of signal, each of which is a penalty, by their evidence."""
    std = np.sqrt(context.power / context.n)
    std = np.where(std > 0, std, 1.0)
    sizes, directions = np.linalg.eigh(prior.weights)
    root = directions * np.sqrt(sizes.clip(0))  # root @ root.T are the weights of the prior
    power, basis = np.linalg.eigh(root.T @ context.gram @ root)
    power = power.clip(0)
    basis = root @ basis  # (n_features, n_directions), in which the context measures each by itself
    measured = basis.T @ (context.products / std)
    seen = power > 1e-9 * max(float(power.max()), 1e-30)
    explained = np.where(seen[:, None], measured**2 / np.where(seen, power, 1)[:, None], 0)
    rest = (context.n - explained.sum(axis=0)).clip(1e-6 * context.n)
    n_rest = max(context.n - 1 - int(seen.sum()), 0)
    evidence = np.empty((len(SHARES), len(std)))
    for row, share in enumerate(SHARES):
        spread = share * power + 1 - share
        evidence[row] = -0.5 * (
            np.log(spread[seen]).sum() + (explained / spread[:, None]).sum(axis=0)
            + n_rest * np.log(1 - share) + rest / (1 - share)
        )  # fmt: skip
    evidence += np.log(prior.shares)[:, None]
    shares = np.exp(evidence - evidence.max(axis=0))
    shares /= shares.sum(axis=0)
    spread = SHARES[:, None] * power + 1 - SHARES[:, None]  # (n_shares, n_directions)
    weights = ((SHARES[:, None] / spread).T @ shares * measured).T @ basis.T
    unknown = (SHARES[:, None] * (1 - SHARES[:, None]) / spread).T @ shares  # (n_directions, n_voxels)
    sizes = np.einsum("fd,fg,gd->d", basis, prior.images, basis, optimize=True)
    return _Weights(
        std, weights, shares, (1 - SHARES) @ shares + sizes @ unknown, (basis * unknown.sum(axis=1)) @ basis.T
    )


def learn_prior(images: np.ndarray, people: Sequence[VoxelContext]) -> VoxelPrior:
    """Learn from the contexts of training people what voxels are like.

    Parameters
    ----------
    images : array of shape (n_features, n_features)
        Covariance of image vectors.
    people
        One context a person.
    """
    n = len(images)
    prior = VoxelPrior(images, np.eye(n) / np.trace(images), np.full(len(SHARES), 1 / len(SHARES)))
    for _ in range(_ROUNDS):
        moment, counts = np.zeros((n, n)), np.ones(len(SHARES))
        for context in people:
            found = _estimate(prior, context)
            moment += found.weights.T @ found.weights + found.uncertainty
            counts += found.shares.sum(axis=1)
        prior = VoxelPrior(images, moment / np.trace(moment @ images), counts / counts.sum())
    return prior


def model_voxels(prior: VoxelPrior, context: VoxelContext) -> VoxelModel:
    """Return the voxels of a person as its context and the prior make them likely."""
    found = _estimate(prior, context)
    scaled = found.weights / np.sqrt(found.noise)[:, None]
    # Noise that voxels share, from what the models leave of some trials: (1 - s) I + s R'R / m, inverted by Woodbury.
    left = context.responses / found.std - context.vectors @ found.weights.T
    size = np.sqrt(np.square(left).mean(axis=0))
    left /= np.where(size > 0, size, 1.0)
    own, m = 1 - _SHARED_NOISE, len(left)
    inner = own * m / _SHARED_NOISE * np.eye(m) + left @ left.T
    whitened = (scaled - left.T @ np.linalg.solve(inner, left @ scaled)) / own
    precision = np.linalg.inv(prior.images) + scaled.T @ whitened
    reader = np.linalg.solve((precision + precision.T) / 2, whitened.T).T / np.sqrt(found.noise)[:, None]
    return VoxelModel(
        context.response_mean, found.std, found.weights, -found.weights @ context.vector_mean,
        SHARES @ found.shares, reader,
    )  # fmt: skip


def draw_voxels(prior: VoxelPrior, n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return weights of voxels of nobody, shape (n, n_features), and the standard deviation of the noise of each.

    Parameters
    ----------
    prior
        Whose covariance they have.
    n
        How many.
    generator
        Where they come from.
    """
    share = generator.choice(SHARES, n, p=prior.shares)
    sizes, directions = np.linalg.eigh(prior.weights)
    drawn = generator.standard_normal((n, len(sizes))) @ (directions * np.sqrt(sizes.clip(0))).T
    return np.sqrt(share)[:, None] * drawn, np.sqrt(1 - share)
