"""Conditions for a diffusion prior that needs no brain: directions that images lie in, seen through simulated encoders.

A brain encoder passes on some principal components of an embedding, more of the leading ones, and adds noise of its
own. How many, how strongly and how much is drawn anew for every image, so that one prior serves encoders that it has
never met; it must judge from the prediction itself how far to trust it. Lengths carry nothing: encoders that minimise
a squared error shrink predictions, those trained by contrast give them unit length. That profiles of real encoders
lie in the family drawn here is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.arrays import normalise_rows

FEWEST_PASSED = 6.0  # components that the narrowest encoder passes on
GAINS = (0.1, 10.0)  # of the passed components, relative to the noise


@dataclass(frozen=True)
class ComponentScale:
    """Leading principal components of rows, in their deviations; what lies beyond them is the mean afterwards.

    Parameters
    ----------
    mean : float array of shape (n_features,)
    basis : float array of shape (n_components, n_features)
        Orthonormal axes, the one of largest variance first.
    std : float array of shape (n_components,)
        Standard deviation along each.
    """

    mean: np.ndarray
    basis: np.ndarray
    std: np.ndarray

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 components of shape (n, n_components) with variance 1 where `rows` are those of the fit."""
        return ((rows - self.mean) @ self.basis.T / self.std).astype(np.float32)

    def undo(self, components: np.ndarray) -> np.ndarray:
        """Return rows of shape (n, n_features)."""
        return ((components * self.std) @ self.basis + self.mean).astype(np.float32)


@dataclass(frozen=True)
class Direction(ComponentScale):
    """Components of the direction of a row from the mean, with the length that rows have on average."""

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 components of rows of that one length."""
        return self.standardise((rows - self.mean) @ self.basis.T)

    def standardise(self, away: np.ndarray) -> np.ndarray:
        """Return components of that length, in deviations, of components that are not in deviations."""
        return (normalise_rows(away) * np.linalg.norm(self.std) / self.std).astype(np.float32)


def fit_components(rows: np.ndarray, n_components: int) -> ComponentScale:
    """Return the leading components of rows of shape (n, n_features), fewer where the rows vary in fewer."""
    from sklearn.decomposition import PCA

    pca = PCA(min(n_components, len(rows) - 1, rows.shape[1]), random_state=0).fit(rows)
    deviation = np.sqrt(pca.explained_variance_)
    kept = deviation > 1e-3 * deviation[0]
    basis, deviation = pca.components_[kept].astype(np.float32), deviation[kept].astype(np.float32)
    return ComponentScale(pca.mean_.astype(np.float32), basis, deviation)


@dataclass(frozen=True)
class DirectionSource:
    """Images, with predictions by simulated encoders that are drawn anew every time.

    Parameters
    ----------
    targets : float array of shape (n, n_components)
        Components of the images in deviations.
    direction
        Of their space.
    """

    targets: np.ndarray
    direction: Direction

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return simulated predictions of the given rows, as directions, and the rows."""
        targets, deviation = self.targets[rows], self.direction.std
        n, k = targets.shape
        width, strong, weak, edge, colour = generator.random((5, n, 1))
        n_passed = FEWEST_PASSED * (max(k, FEWEST_PASSED) / FEWEST_PASSED) ** width
        low, high = np.log(GAINS)
        passed = 1 / (1 + (np.arange(1, k + 1) / n_passed) ** (1 + 5 * edge))
        gains = np.exp(low + (high - low) * strong) * (weak**2 + (1 - weak**2) * passed)
        gains = gains * np.exp(0.25 * generator.standard_normal((n, k)))
        # Noise varies as images do, or has more of the small components, or fewer.
        tilt = (deviation / deviation[0]) ** (0.2 - 0.6 * colour)
        predicted = (gains * targets + tilt * generator.standard_normal((n, k))) * deviation
        return self.direction.standardise(predicted), targets
