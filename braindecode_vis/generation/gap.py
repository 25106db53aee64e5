"""Corrects the difference between the training vectors of a caption decoder and its inputs: a mean, and noise.

Owns the correction of that gap (CLOSE): both sides are brought to length one around their own mean, and while the
decoder learns, its vectors get noise as large as the differences between predictions and truth were on training trials
that the encoder was not fitted on. Knows nothing of captions or networks.

References
----------
Gu et al. (2023), CLOSE, arXiv:2211.09778; Liang et al. (2022), Mind the gap, arXiv:2203.02053.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.settings import Settings
from braindecode_vis.embeddings.text import make_unit

#: Differences that noise with their covariance is drawn from; more say little of it and cost a product each batch.
MOST_DIFFERENCES = 2048


class GapConfig(Settings):
    """How training vectors are matched to decoded vectors (CLOSE).

    Parameters
    ----------
    shift
        Subtract the mean of each side; for predictions, the mean over training trials on which the encoder was not
        fitted.
    noise
        Noise on the vectors while the decoder learns: as strong for every feature (``isotropic``, as in CLOSE), with
        the ``covariance`` of the differences between predictions and truth, or ``none``.
    sigma
        Standard deviation of isotropic noise for each feature of a unit vector (CLOSE: 0.04 to 0.12 of 768 features);
        None measures it on predictions of training trials on which the encoder was not fitted.
    scale
        Factor for measured noise; CLOSE uses 3 with the covariance.
    """

    shift: bool = True
    noise: Literal["isotropic", "covariance", "none"] = "isotropic"
    sigma: float | None = Field(default=None, gt=0)
    scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.noise != "isotropic":
            self.refuse_unused("sigma", because=f"noise is {self.noise}")
        if self.noise == "none" or self.sigma is not None:
            self.refuse_unused("scale", because="it is a factor for measured noise")
        return self

    @property
    def needs_predictions(self) -> bool:
        """Whether something is measured on predictions."""
        return self.shift or (self.noise != "none" and self.sigma is None)


@dataclass(frozen=True)
class Gap:
    """A fitted correction.

    Parameters
    ----------
    learnt_mean, served_mean : float32 arrays of shape (n_tokens, n_features)
        What is taken off vectors that are learnt from, and off those that are decoded; zeros without a shift.
    noise : float32 array of shape (n_draws, n_tokens, n_features) or (1, 1, 1)
        Rows whose sum with independent normal weights is the noise; one number for noise that is alike everywhere.
    """

    learnt_mean: np.ndarray
    served_mean: np.ndarray
    noise: np.ndarray

    def prepare(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors that are learnt from, centred and each of length one, before any noise.

        Parameters
        ----------
        vectors : array of shape (n, n_tokens, n_features)
        """
        return make_unit(vectors - self.learnt_mean)

    def disturb(self, vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return prepared vectors with noise, each of length one again.

        Parameters
        ----------
        vectors : array of shape (n, n_tokens, n_features)
            From `prepare`.
        rng
            Draws the noise.
        """
        if not self.noise.any():
            return vectors
        if self.noise.size == 1:
            drawn = self.noise * rng.standard_normal(vectors.shape, dtype=np.float32)
        else:
            weights = rng.standard_normal((len(vectors), len(self.noise)), dtype=np.float32)
            drawn = np.tensordot(weights, self.noise, axes=1)  # (n, n_tokens, n_features)
        return make_unit(vectors + drawn)

    def serve(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors that are decoded, centred and each of length one; arguments as of `prepare`."""
        return make_unit(vectors - self.served_mean)


def fit_gap(
    config: GapConfig,
    learnt: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray] | None,
) -> Gap:
    """Return the correction for vectors that are learnt from.

    With unit vectors b of predictions and v of their truths, each around its own mean where ``shift`` is set, isotropic
    noise has the standard deviation sqrt(mean (b - v)²) over pairs and features, and noise with the covariance that of
    b - v.

    Parameters
    ----------
    config
        What is corrected, and how.
    learnt : array of shape (n, n_tokens, n_features)
        All vectors that are learnt from, for their mean.
    pairs : two arrays of shape (n_pairs, n_tokens, n_features), or None
        Predictions and truths, row by row; needed where `config.needs_predictions`.

    Examples
    --------
    >>> true = np.eye(4)[:, None]
    >>> gap = fit_gap(GapConfig(), true, (true + 1, true))
    >>> bool(np.allclose(gap.serve(true + 1), gap.prepare(true))), float(gap.noise.max())
    (True, 0.0)
    """
    zero = np.zeros(learnt.shape[1:], np.float32)
    learnt_mean = _average(learnt) if config.shift else zero
    served_mean = _average(pairs[0]) if config.shift and pairs is not None else zero.copy()
    gap = Gap(learnt_mean, served_mean, np.zeros((1, 1, 1), np.float32))
    if config.noise == "none":
        return gap
    if config.sigma is not None:
        return Gap(learnt_mean, served_mean, np.full((1, 1, 1), config.sigma, np.float32))
    assert pairs is not None
    differences = (gap.serve(pairs[0]) - gap.prepare(pairs[1])).astype(np.float64)
    if config.noise == "isotropic":
        sigma = config.scale * np.sqrt((differences**2).mean())
        return Gap(learnt_mean, served_mean, np.full((1, 1, 1), sigma, np.float32))
    # Spread over the rows: they come trial after trial, and the first ones may be of few images.
    rows = np.linspace(0, len(differences) - 1, min(len(differences), MOST_DIFFERENCES)).astype(np.intp)
    chosen = differences[rows] - differences[rows].mean(axis=0)
    # z @ chosen / sqrt(n - 1) has the covariance of the differences, with no matrix of features by features.
    rows_of_noise = config.scale * chosen / np.sqrt(max(len(chosen) - 1, 1))
    return Gap(learnt_mean, served_mean, rows_of_noise.astype(np.float32))


def _average(vectors: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float64), dtype=np.float32)
