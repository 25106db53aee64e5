"""What a diffusion prior is conditioned on while it learns: real predictions, or targets made as uncertain as those.

Out-of-fold predictions exist for the images that were shown; a generator can be trained on many more. `PredictionError`
learns from the out-of-fold pairs how a prediction depends on its target, and draws predictions for any image. A linear
encoder shrinks toward the mean, so noise added to the bare target would give conditions that are too long and too good;
here the prediction is gain * target + noise, with

- one gain for each principal component of the training targets (regression of the prediction on the target), and
- noise with the covariance of the residuals of that regression, drawn as Gaussian mixtures of a few residual rows, so
  that no covariance matrix is formed or inverted and token sequences of any length are possible.

Second moments of such conditions are those of the predictions; that their dependence is linear and the noise the same
for every image are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_ROWS = 20_000  # rows that the principal components are computed from
N_MIXED = 8  # residual rows in one draw of noise


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
