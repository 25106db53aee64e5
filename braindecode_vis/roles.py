"""The four roles of the pipeline, as protocols of one or two methods.

A component plays a role by having its methods; nothing is inherited or registered. `pipeline` speaks to roles
only, so a new encoder or generator needs no change there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen vision network, or a statistic fitted on training images, that turns images into vectors."""

    @property
    def space(self) -> str:
        """Name of the space: encoder, weights, layer and transform."""
        ...

    def fit(self, images: Iterable[np.ndarray]) -> Self:
        """Learn from training images (uint8, (height, width, 3) each); pretrained encoders return self."""
        ...

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features)."""
        ...


@runtime_checkable
class BrainEncoder(Protocol):
    """Maps responses to image embeddings. Ridge and networks alike."""

    def fit(self, responses: Responses, targets: Embeddings) -> Self:
        """Learn from training trials; `targets` has one row per trial, in the same order."""
        ...

    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial."""
        ...

    def write(self, directory: Path) -> None:
        """Write the fitted state into `directory` without pickle."""
        ...


@runtime_checkable
class Prior(Protocol):
    """Moves predicted embeddings toward the distribution of image embeddings."""

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> Self:
        """Learn from training pairs, and from the embeddings of images that were not shown where that helps.

        A prior whose settings say ``needs_predictions = False`` does without predictions.
        """
        ...

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return `n_draws` embeddings per row, draws of one row next to each other."""
        ...


@runtime_checkable
class ImageGenerator(Protocol):
    """Turns embeddings into images."""

    def accepts(self, space: str) -> bool:
        """Say whether embeddings of this space can be turned into images."""
        ...

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3)."""
        ...
