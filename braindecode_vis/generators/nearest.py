"""Show the training image whose embedding is nearest to the prediction.

As a generator it makes plain what memorisation looks like: a reconstruction that does not beat it has copied.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from braindecode_vis.arrays import Embeddings, check_same_space
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.settings import Settings


class NearestConfig(Settings):
    """Copy the nearest training image; every space is accepted."""

    kind: Literal["nearest"] = "nearest"

    copies_training_images: ClassVar[bool] = True

    def accepts(self, target_kind: str) -> bool:
        """Every target will do."""
        return True

    def build(self, data: GeneratorData) -> NearestGenerator:
        """Return the generator."""
        return NearestGenerator(data)


class NearestGenerator:
    """The nearest training image by cosine similarity of mean-centred embeddings."""

    def __init__(self, data: GeneratorData) -> None:
        self.data = data

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.data.embeddings.space

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random here."""
        return self.data.images[self.find_nearest(embeddings)]

    def find_nearest(self, embeddings: Embeddings) -> np.ndarray:
        """Return the row of the nearest training embedding for each prediction, shape (n_rows,)."""
        check_same_space(embeddings, self.data.embeddings)
        bank = self.data.embeddings.flat()
        mean = bank.mean(axis=0)
        return np.argmax(_normalise(embeddings.flat() - mean) @ _normalise(bank - mean).T, axis=1)


def _normalise(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)
