"""Scales of rows: what brings embeddings to mean 0 and variance 1, and back; always of training data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.arrays import normalise_rows


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each value of a row; a value that never varies has deviation 1."""

    mean: np.ndarray
    std: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 rows with mean 0 and variance 1 where `rows` are those of the fit."""
        return ((rows - self.mean) / self.std).astype(np.float32)

    def undo(self, rows: np.ndarray) -> np.ndarray:
        """Return what `apply` was given."""
        return (rows * self.std + self.mean).astype(np.float32)


def fit_scale(rows: np.ndarray) -> Scale:
    """Return the scale of rows of shape (n_rows, ...)."""
    mean, std = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    # Rounding leaves a tiny deviation where a value never varies; dividing by it would blow the noise of float32 up.
    constant = std <= 1e-6 * np.maximum(np.abs(mean), std.max() if std.size else 0.0)
    return Scale(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))


def find_bounds(rows: np.ndarray) -> np.ndarray:
    """Return least and greatest value of each place, a tenth of the range beyond, of shape (2, ...)."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    margin = 0.1 * (high - low)
    return np.stack([low - margin, high + margin]).astype(np.float32)


def turn_rows(rows: np.ndarray, goals: np.ndarray, pull: float) -> np.ndarray:
    """Return directions of length 1 between those of `rows` (pull 0) and of `goals` (1), both (n, n_features)."""
    return normalise_rows((1 - pull) * normalise_rows(rows) + pull * normalise_rows(goals))
