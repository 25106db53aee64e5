"""Multivariate noise normalisation: channels are decorrelated with the noise covariance of the training trials.

The covariance of every epoch (or time point) is shrunk after Ledoit and Wolf on standardised channels, averaged over
the repetitions of an image, then over images, and its inverse square root whitens all trials of the session. Every
formula is batched; sums are in float64. The caller passes only training trials. Does not depend on files or data sets.

References
----------
.. [1] Guggenmos, Sterzer, Cichy (2018). Multivariate pattern analysis for MEG. NeuroImage 173, 434-447.
   doi:10.1016/j.neuroimage.2018.02.044
.. [2] Ledoit, Wolf (2004). A well-conditioned estimator for large-dimensional covariance matrices. Journal of
   Multivariate Analysis 88, 365-411. doi:10.1016/S0047-259X(03)00096-4
.. [3] Song et al. (2024), arXiv:2308.13234: per session, from training trials only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_option

_BLOCK_BYTES = 2 << 20  # stays in the second-level cache


@dataclass(frozen=True)
class Whitener:
    """The inverse square root of a noise covariance.

    Parameters
    ----------
    covariance : float64 array of shape (n_channels, n_channels)
        In the squared unit of the data.
    matrix : float32 array of shape (n_channels, n_channels)
        Symmetric.
    """

    covariance: np.ndarray
    matrix: np.ndarray

    def apply(self, epochs: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return whitened epochs, float32 of shape (n_epochs, n_channels, n_times), or of the channels `rows` alone."""
        matrix = self.matrix if rows is None else self.matrix[rows]
        return np.matmul(matrix, np.asarray(epochs, dtype=np.float32))


def make_whitener(covariance: np.ndarray) -> Whitener:
    """Return the whitener of a covariance.

    Raises
    ------
    DataError
        If the covariance is singular, as after an average reference or with a channel that was copied.

    Examples
    --------
    >>> make_whitener(np.diag([4.0, 9.0])).matrix.diagonal().astype(float).round(3).tolist()
    [0.5, 0.333]
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    # Written so that NaN fails, too.
    if not values[0] > 1e-10 * values[-1]:
        raise DataError(
            f"the noise covariance of {len(values)} channels is singular (eigenvalues {values[0]:.2g} to "
            f"{values[-1]:.2g}): a channel is flat, or is a combination of others; leave one out or set mvnn to none."
        )
    # The symmetric root: whitened channels stay as close to the measured ones as whitening allows.
    root = vectors / np.sqrt(values) @ vectors.T
    return Whitener(np.asarray(covariance, dtype=np.float64), root.astype(np.float32))


def fit_mvnn(
    epochs: np.ndarray, conditions: np.ndarray, *, variant: Literal["epochs", "time"] = "epochs"
) -> Whitener:
    """Fit the whitener of one session.

    Parameters
    ----------
    epochs : array of shape (n_epochs, n_channels, n_times)
        Training trials of one session.
    conditions : array of shape (n_epochs,)
        Which image each epoch shows.
    variant
        ``epochs``: covariance over the times of each epoch. ``time``: covariance over the repetitions of an image at
        each time, which needs at least two.
    """
    check_option("the MVNN variant", variant, ("epochs", "time"))
    total = CovarianceSum(epochs.shape[1])
    if variant == "epochs":
        total.add(epochs, compute_condition_weights(conditions))
        return make_whitener(total.finish())
    order = np.argsort(conditions, kind="stable")
    starts = np.flatnonzero(np.r_[True, conditions[order][1:] != conditions[order][:-1]])
    for rows in np.split(order, starts[1:]):
        total.add_condition(epochs[rows])
    return make_whitener(total.finish())


def compute_condition_weights(conditions: np.ndarray) -> np.ndarray:
    """Return the weight of each epoch such that every condition weighs one, shape (n_epochs,).

    Examples
    --------
    >>> compute_condition_weights(np.array(["a", "b", "a"])).tolist()
    [0.5, 1.0, 0.5]
    """
    _, codes, counts = np.unique(conditions, return_inverse=True, return_counts=True)
    return 1.0 / counts[codes]


class CovarianceSum:
    """A running average of shrunk covariances, fed block by block.

    Parameters
    ----------
    n_channels
        Size of the matrices.
    """

    def __init__(self, n_channels: int) -> None:
        self.total = np.zeros((n_channels, n_channels))
        self.weight = 0.0

    def add(self, epochs: np.ndarray, weights: np.ndarray) -> None:
        """Add the covariance over time of each epoch, shape (n_epochs, n_channels, n_times)."""
        # Small blocks: the batched products below then run from the cache.
        block = max(1, _BLOCK_BYTES // max(1, epochs[:1].nbytes))
        for start in range(0, len(epochs), block):
            piece = np.asarray(epochs[start : start + block], dtype=np.float32)
            self.total += sum_shrunk_covariances(piece, weights[start : start + block])
        self.weight += float(np.sum(weights))

    def add_condition(self, epochs: np.ndarray) -> None:
        """Add the covariance over the repetitions of one image, averaged over times, with weight one.

        Parameters
        ----------
        epochs : array of shape (n_repetitions, n_channels, n_times)
        """
        if len(epochs) < 2:
            raise DataError(
                "noise normalisation over time points needs at least two repetitions of every training image in a "
                "session; set mvnn to epochs."
            )
        # (repetition, channel, time) -> (time, channel, repetition)
        by_time = np.ascontiguousarray(np.transpose(epochs, (2, 1, 0)), dtype=np.float32)
        self.total += sum_shrunk_covariances(by_time, np.full(len(by_time), 1 / len(by_time)))
        self.weight += 1.0

    def finish(self) -> np.ndarray:
        """Return the average covariance, float64 of shape (n_channels, n_channels)."""
        if self.weight == 0:
            raise DataError("no training trial was given to the noise normalisation; set mvnn to none.")
        return self.total / self.weight


def sum_shrunk_covariances(batch: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted sum of the Ledoit-Wolf covariances of many small data sets.

    As published, channels are standardised before shrinkage and scaled back after it, which is what scikit-learn's
    discriminant analysis does with ``shrinkage="auto"``.

    Parameters
    ----------
    batch : float32 array of shape (n_sets, n_channels, n_samples)
        The mean over samples is removed here.
    weights : array of shape (n_sets,)

    Returns
    -------
    total : float64 array of shape (n_channels, n_channels)
    """
    n_sets, n_channels, n_samples = batch.shape
    mean = batch.mean(axis=-1, keepdims=True)
    centred = batch - mean
    squares = centred * centred
    variance = squares.mean(axis=-1)  # (set, channel)
    # A flat channel has no variance to standardise by.
    is_flat = variance <= 1e-12 * np.maximum(1e-30, np.square(mean[..., 0]))
    variance = np.where(is_flat, 0, variance)
    inverse = np.where(is_flat, 1.0, 1.0 / np.where(is_flat, 1.0, variance)).astype(np.float32)
    # Power of each sample over standardised channels: (set, 1, channel) x (set, channel, sample) -> (set, sample)
    power = np.matmul(inverse[:, None, :], squares)[:, 0]
    if n_samples > n_channels:
        covariances = np.matmul(centred, centred.transpose(0, 2, 1)) / np.float32(n_samples)
        scaled = np.matmul(np.square(covariances), inverse[..., None])[..., 0]
        frobenius = (scaled * inverse).sum(axis=-1, dtype=np.float64)
    else:  # fewer samples than channels: the small Gram matrix has the same norm
        gram = np.matmul((centred * inverse[..., None]).transpose(0, 2, 1), centred)
        frobenius = np.square(gram).sum(axis=(1, 2), dtype=np.float64) / n_samples**2
    trace = (variance * inverse).sum(axis=-1, dtype=np.float64)
    shrinkage = _compute_shrinkage(power, frobenius, trace, n_channels)
    keep = np.asarray(weights, dtype=np.float64) * (1 - shrinkage)
    if n_samples > n_channels:
        flat = covariances.reshape(n_sets, -1)
        total = (keep.astype(np.float32) @ flat).astype(np.float64).reshape(n_channels, n_channels)
    else:
        scale = np.sqrt(keep / n_samples).astype(np.float32)
        # (set, channel, sample) -> (channel, set * sample)
        tall = (centred * scale[:, None, None]).transpose(1, 0, 2).reshape(n_channels, -1)
        total = (tall @ tall.T).astype(np.float64)
    rest = np.asarray(weights, dtype=np.float64) * shrinkage * trace / n_channels
    scale_back = np.where(is_flat, 1.0, variance)  # a flat channel is left as it is, like in scikit-learn
    # The target is the identity on standardised channels, so each channel gets its own variance back.
    total[np.diag_indices(n_channels)] += rest @ scale_back.astype(np.float64)
    return total


def _compute_shrinkage(
    power: np.ndarray, frobenius: np.ndarray, trace: np.ndarray, n_channels: int
) -> np.ndarray:
    """Return the weight of the scaled identity for each set, after Ledoit and Wolf (2004)."""
    n_samples = power.shape[-1]
    fourth = np.square(power.astype(np.float64)).sum(axis=-1)
    beta = (fourth / n_samples - frobenius) / (n_channels * n_samples)
    delta = (frobenius - trace**2 / n_channels) / n_channels
    # Shrinkage beyond the target itself would turn the covariance around.
    beta = np.minimum(beta, delta)
    return np.where(beta > 0, beta / np.where(delta > 0, delta, 1.0), 0.0)
