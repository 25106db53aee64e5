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

from braindecode_vis.priors.scales import Scale

MOST_COMPONENTS = 128
FEWEST_PASSED = 6.0  # components that the narrowest encoder passes on
GAINS = (0.1, 10.0)  # of the passed components, relative to the noise


@dataclass(frozen=True)
class Direction(Scale):
    """Direction of a row from the mean, with the length that rows have on average, in deviations of each value."""

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return float32 rows of that one length, in the units of `Scale.apply`."""
        away = (rows - self.mean).astype(np.float64)
        norms = np.linalg.norm(away.reshape(len(away), -1), axis=1)
        lengths = np.maximum(norms, 1e-12).reshape(-1, *[1] * (away.ndim - 1))
        return (away / lengths * np.linalg.norm(self.std) / self.std).astype(np.float32)


@dataclass(frozen=True)
class SimulatedEncoders:
    """Draws what unknown encoders might predict of images.

    Parameters
    ----------
    direction
        Of the images' space.
    basis : float array of shape (n_components, n_features)
        Leading principal axes of the images.
    deviation : float array of shape (n_components,)
        Standard deviation along each, descending.
    """

    direction: Direction
    basis: np.ndarray
    deviation: np.ndarray

    def draw(self, vectors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return one simulated prediction per image, as a standardised direction.

        Parameters
        ----------
        vectors : float array of shape (n, n_features)
            Embeddings.
        generator
            Draws the encoders and their noise.
        """
        n, k = len(vectors), len(self.deviation)
        known = (vectors - self.direction.mean) @ self.basis.T / self.deviation
        n_passed, strong, weak, edge, colour = generator.random((5, n, 1))
        n_passed = FEWEST_PASSED * (max(k, FEWEST_PASSED) / FEWEST_PASSED) ** n_passed
        low, high = np.log(GAINS)
        gain = np.exp(low + (high - low) * strong)
        steepness = 1 + 5 * edge
        passed = 1 / (1 + (np.arange(1, k + 1) / n_passed) ** steepness)
        gains = gain * (weak**2 + (1 - weak**2) * passed) * np.exp(0.25 * generator.standard_normal((n, k)))
        # Between noise as images vary (0) and noise with more of the small components, or fewer.
        tilt = (self.deviation / self.deviation[0]) ** -(0.6 * colour - 0.2)
        predicted = (gains * known + tilt * generator.standard_normal((n, k))) * self.deviation
        return self.direction.apply(predicted @ self.basis + self.direction.mean)


def fit_simulated_encoders(vectors: np.ndarray, direction: Direction) -> SimulatedEncoders:
    """Return encoders for the space of some images.

    Parameters
    ----------
    vectors : float array of shape (n_images, n_features)
    direction
        Mean and deviations of the images.
    """
    from sklearn.decomposition import PCA

    n_components = min(MOST_COMPONENTS, len(vectors) - 1, vectors.shape[1])
    pca = PCA(n_components, random_state=0).fit(vectors)
    deviation = np.sqrt(pca.explained_variance_)
    kept = deviation > 1e-6 * deviation[0]
    return SimulatedEncoders(
        direction, pca.components_[kept].astype(np.float32), deviation[kept].astype(np.float32)
    )


@dataclass(frozen=True)
class DirectionSource:
    """Images, with simulated predictions that are drawn anew every time.

    Parameters
    ----------
    targets : float array of shape (n, n_features)
        Standardised embeddings.
    scale
        That standardised them.
    encoders
        Simulate the predictions.
    """

    targets: np.ndarray
    scale: Scale
    encoders: SimulatedEncoders

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return simulated predictions of the given rows, and the rows."""
        targets = self.targets[rows]
        return self.encoders.draw(self.scale.undo(targets), generator), targets
