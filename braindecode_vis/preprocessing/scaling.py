"""Standardisation whose statistics come from training trials only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZScore:
    """Mean and standard deviation of each feature of the training trials.

    Parameters
    ----------
    mean, std : float32 arrays of shape (n_features,)
        Constant features have `std` 1, so that they become 0 and stay finite.
    """

    mean: np.ndarray
    std: np.ndarray

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Return ``(data - mean) / std`` as float32 of the same shape (n_trials, n_features)."""
        return ((data - self.mean) / self.std).astype(np.float32)


def fit_zscore(data: np.ndarray) -> ZScore:
    """Compute the statistics of training trials, shape (n_trials, n_features).

    Sums run in float64: voxel values can sit on a baseline a thousand times their variation.
    """
    mean = data.mean(axis=0, dtype=np.float64)
    std = data.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    return ZScore(mean.astype(np.float32), std.astype(np.float32))
