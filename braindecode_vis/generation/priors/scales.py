"""Scales of embeddings: value by value, or along principal components; always fitted on training data.

Both kinds bring rows to mean 0 and variance 1 (`apply`) and back (`undo`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.arrays import normalise_rows


@dataclass(frozen=True)
class RowScale:
    """Mean and standard deviation of each value of a row; a value that never varies has deviation 1."""

    mean: np.ndarray
    std: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 rows with mean 0 and variance 1 where `rows` are those of the fit."""
        return ((rows - self.mean) / self.std).astype(np.float32)

    def undo(self, rows: np.ndarray) -> np.ndarray:
        """Return what `apply` was given."""
        return (rows * self.std + self.mean).astype(np.float32)


def fit_scale(rows: np.ndarray) -> RowScale:
    """Return the scale of rows of shape (n_rows, ...)."""
    mean, std = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    # Rounding leaves a tiny deviation where a value never varies; dividing by it would blow the noise of float32 up.
    constant = std <= 1e-6 * np.maximum(np.abs(mean), std.max() if std.size else 0.0)
    return RowScale(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))


@dataclass(frozen=True)
class PrincipalComponents:
    """Leading principal components of rows, in their deviations; what lies beyond them is the mean afterwards.

    Parameters
    ----------
    mean : float32 array of shape (n_features,)
    basis : float32 array of shape (n_components, n_features)
        Orthonormal axes, the one of largest variance first.
    std : float32 array of shape (n_components,)
        Standard deviation along each, descending.
    """

    mean: np.ndarray
    basis: np.ndarray
    std: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Variance of each component relative to the largest, shape (n_components,)."""
        return (self.std / self.std.max()) ** 2

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 components of shape (n, n_components) with variance 1 where `rows` are those of the fit."""
        return (((rows - self.mean) @ self.basis.T) / self.std).astype(np.float32)

    def undo(self, components: np.ndarray) -> np.ndarray:
        """Return rows of shape (n, n_features) from the first components of each, of shape (n, at most all)."""
        n = components.shape[1]
        return ((components * self.std[:n]) @ self.basis[:n] + self.mean).astype(np.float32)


def fit_components(
    rows: np.ndarray, n_components: int, *, most_rows: int | None = None
) -> PrincipalComponents:
    """Return the leading principal components of embeddings; fewer where rows or features are fewer.

    Parameters
    ----------
    rows : float array of shape (n, n_features)
    n_components
        At most so many; components without variance are left out.
    most_rows
        At most so many rows, evenly spaced, are looked at; None looks at all.
    """
    from sklearn.decomposition import PCA

    step = 1 if most_rows is None else -(-len(rows) // most_rows)
    rows = rows[::step].astype(np.float32)
    if np.ptp(rows, axis=0).max() == 0:  # no component at all; one is kept that says nothing
        return PrincipalComponents(rows[0], np.zeros((1, rows.shape[1]), np.float32), np.ones(1, np.float32))
    # The mean takes one degree of freedom, so that n rows have n - 1 components at most.
    pca = PCA(min(n_components, rows.shape[1], len(rows) - 1), random_state=0).fit(rows)
    deviation = np.sqrt(pca.explained_variance_)
    kept = deviation > 1e-3 * deviation.max()  # below, a deviation is the rounding of float32
    return PrincipalComponents(
        pca.mean_.astype(np.float32),
        pca.components_[kept].astype(np.float32),
        deviation[kept].astype(np.float32),
    )


def find_bounds(rows: np.ndarray) -> np.ndarray:
    """Return least and greatest value of each place, a tenth of the range beyond, of shape (2, ...)."""
    # A tenth beyond: training images are a sample, and others reach a little farther.
    low, high = rows.min(axis=0), rows.max(axis=0)
    margin = 0.1 * (high - low)
    return np.stack([low - margin, high + margin]).astype(np.float32)


def turn_rows(rows: np.ndarray, goals: np.ndarray, pull: float) -> np.ndarray:
    """Return directions of length 1 between those of `rows` (pull 0) and of `goals` (1), both (n, n_features)."""
    return normalise_rows((1 - pull) * normalise_rows(rows) + pull * normalise_rows(goals))
