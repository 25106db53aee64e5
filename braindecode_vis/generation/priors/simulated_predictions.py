"""What a diffusion prior is conditioned on while it learns: real predictions, or simulated ones.

Out-of-fold predictions exist for the images that were shown; a prior can learn from many more, in one of two ways, by
what is known of the brain encoder.

`PredictionError` learns from out-of-fold pairs how a prediction depends on its target, and
draws predictions for any image. A linear encoder shrinks toward the mean, so noise added to the bare target would give
conditions that are too long and too good; here the prediction is gain * target + noise, with

- one gain for each principal component of the training targets (regression of the prediction on the target), and
- noise with the covariance of the residuals of that regression, drawn as Gaussian mixtures of a few residual rows, so
  that no covariance matrix is formed or inverted and token sequences of any length are possible.

Second moments of such conditions are those of the predictions; that their dependence is linear and the noise the same
for every image are assumptions.

`Direction.simulate` needs no brain. An encoder passes on some principal components of an embedding, more of the leading
ones, and adds noise of its own; how many, how strongly and how much is drawn anew for every image, so that one prior
serves encoders that it has never met and must judge from the prediction itself how far to trust it. Lengths carry
nothing: encoders that minimise a squared error shrink predictions, those trained by contrast give them unit length.
That profiles of real encoders lie in the family drawn here is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.arrays import normalise_rows

MOST_ROWS = 20_000  # rows that the principal components are computed from
N_MIXED = 8  # residual rows in one draw of noise
FEWEST_PASSED = 6.0  # components that the narrowest encoder passes on
GAINS = (0.1, 10.0)  # of the passed components, relative to the noise


@dataclass(frozen=True)
class ConditionSource:
    """Standardised rows that a diffusion prior learns from: targets, and a condition for each.

    Parameters
    ----------
    targets : float array of shape (n, ...)
    conditions : float array of shape (n, ...), optional
        Real predictions, row by row.
    simulate
        Without them: draws predictions of targets anew every time, ``simulate(targets, generator)``.
    """

    targets: np.ndarray
    conditions: np.ndarray | None = None
    simulate: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of rows in one epoch."""
        return len(self.targets)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return conditions and targets of the given rows."""
        targets = self.targets[rows]
        if self.simulate is not None:
            return self.simulate(targets, generator), targets
        assert self.conditions is not None
        return self.conditions[rows], targets


@dataclass(frozen=True)
class PredictionError:
    """How predictions depend on targets; see the module.

    Parameters
    ----------
    basis : float array of shape (n_features, n_features)
        Principal axes of the targets in its columns, shared by all tokens.
    target_mean, predicted_mean : float arrays of shape (n_tokens, n_features)
    gain : float array of shape (n_tokens, n_features)
        One gain per token and principal component, not below 0.
    residuals : float array of shape (n_pairs, n_tokens, n_features)
        What the gains leave unexplained.
    """

    basis: np.ndarray
    target_mean: np.ndarray
    predicted_mean: np.ndarray
    gain: np.ndarray
    residuals: np.ndarray

    def predict_mean(self, targets: np.ndarray) -> np.ndarray:
        """Return the expected prediction of each target, in the shape of `targets`."""
        tokens = _as_tokens(targets)
        components = ((tokens - self.target_mean) @ self.basis) * self.gain
        return (components @ self.basis.T + self.predicted_mean).reshape(targets.shape).astype(np.float32)

    def draw(self, targets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return one simulated prediction per target, in the shape of `targets`.

        Parameters
        ----------
        targets : float array of shape (n, n_features) or (n, n_tokens, n_features)
        generator
            Chooses and weighs the residual rows.
        """
        # A Gaussian mixture of residual rows has their covariance, whatever the number of features.
        noise = np.zeros((len(targets), *self.residuals.shape[1:]), np.float32)
        for _ in range(N_MIXED):
            rows = generator.integers(len(self.residuals), size=len(targets))
            weights = generator.standard_normal(len(targets), dtype=np.float32) / np.sqrt(N_MIXED)
            noise += weights.astype(np.float32)[:, None, None] * self.residuals[rows]
        return self.predict_mean(targets) + noise.reshape(targets.shape)


def fit_prediction_error(predicted: np.ndarray, targets: np.ndarray) -> PredictionError:
    """Learn from out-of-fold pairs how predictions depend on targets.

    Parameters
    ----------
    predicted, targets : float arrays of shape (n_pairs, n_features) or (n_pairs, n_tokens, n_features)
        Row by row a prediction and the embedding of its image.
    """
    left, right = _as_tokens(predicted).astype(np.float64), _as_tokens(targets).astype(np.float64)
    predicted_mean, target_mean = left.mean(axis=0), right.mean(axis=0)
    centred = right - target_mean
    rows = centred.reshape(-1, centred.shape[-1])
    rows = rows[:: max(1, len(rows) // MOST_ROWS)]
    # One basis for all tokens: a basis for each would be n_tokens matrices of n_features squared.
    _, basis = np.linalg.eigh(rows.T @ rows)
    components, answers = centred @ basis, (left - predicted_mean) @ basis
    variance = (components**2).mean(axis=0)
    covariance = (components * answers).mean(axis=0)
    # Components without variance (more features than images) carry no gain, rather than the quotient of two zeros.
    floor = 1e-8 * max(float(variance.mean()), np.finfo(np.float64).tiny)
    gain = np.where(variance > floor, np.maximum(covariance, 0) / np.maximum(variance, floor), 0.0)
    residuals = left - predicted_mean - (components * gain) @ basis.T
    # Degrees of freedom: one mean and one gain were fitted per feature.
    n = len(residuals)
    residuals *= np.sqrt(n / max(n - 2, 1))
    return PredictionError(
        basis.astype(np.float32), target_mean.astype(np.float32), predicted_mean.astype(np.float32),
        gain.astype(np.float32), residuals.astype(np.float32),
    )  # fmt: skip


def _as_tokens(values: np.ndarray) -> np.ndarray:
    return values[:, None] if values.ndim == 2 else values


@dataclass(frozen=True)
class Direction:
    """Components of the direction of a row from the mean, with the length that rows have on average.

    Parameters
    ----------
    mean, basis, std
        Those of the `PrincipalComponents` of training images, or a mean of the run's own images.
    """

    mean: np.ndarray
    basis: np.ndarray
    std: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 components of shape (n, n_components), in deviations, of rows of that one length."""
        return self.standardise((rows - self.mean) @ self.basis.T)

    def standardise(self, away: np.ndarray) -> np.ndarray:
        """Return components of that length, in deviations, of components that are not in deviations."""
        return (normalise_rows(away) * np.linalg.norm(self.std) / self.std).astype(np.float32)

    def simulate(self, targets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return predictions of images by encoders that are drawn anew for each, as directions.

        Parameters
        ----------
        targets : float array of shape (n, n_components)
            Components of the images in deviations.
        generator
            Draws the encoders and their noise.
        """
        n, k = targets.shape
        width, strong, weak, edge, colour = generator.random((5, n, 1))
        n_passed = FEWEST_PASSED * (max(k, FEWEST_PASSED) / FEWEST_PASSED) ** width
        low, high = np.log(GAINS)
        # A low pass over the components: how many pass, and how sharp its edge is, is drawn.
        passed = 1 / (1 + (np.arange(1, k + 1) / n_passed) ** (1 + 5 * edge))
        gains = np.exp(low + (high - low) * strong) * (weak**2 + (1 - weak**2) * passed)
        # No encoder follows the curve exactly.
        gains = gains * np.exp(0.25 * generator.standard_normal((n, k)))
        # Noise varies as images do, or has more of the small components, or fewer.
        tilt = (self.std / self.std[0]) ** (0.2 - 0.6 * colour)
        predicted = (gains * targets + tilt * generator.standard_normal((n, k))) * self.std
        return self.standardise(predicted)
