"""Baseline reconstructions: the nearest training image, the mean image and the mean image of the decoded class.

`MeanImageGenerator` ignores the prediction; `ClassMeanGenerator` uses it only to name a class. For stimuli that look
alike, such as digits, both reach high pixel correlations. `NearestGenerator` copies the nearest training image, which
makes plain what memorisation looks like: a reconstruction that does not beat it has copied. It is a generator of its
own as well.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space, normalise_rows
from braindecode_vis.base.contracts import GeneratorSettings, ImageGenerator
from braindecode_vis.generation.generator_data import GeneratorData

#: Training images behind the mean image. To decode 16 540 photographs for it takes a minute, and moves a grey level by
#: about one (a spread of 60 over the root of 2048).
MOST_AVERAGED = 2048


class MeanImageGenerator(ImageGenerator):
    """The mean training image, whatever the brain did.

    Of more than `MOST_AVERAGED` images, so many are averaged, evenly spread over the training split.
    """

    def __init__(self, data: GeneratorData) -> None:
        n_images = len(data.embeddings)
        self.mean = data.average_images(
            np.linspace(0, n_images - 1, min(n_images, MOST_AVERAGED)).astype(int)
        )

    def accepts(self, space: str) -> bool:
        """Every space will do."""
        return True

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return the mean image once per row, uint8 of shape (n_rows, height, width, 3)."""
        return np.repeat(self.mean[None], len(embeddings), axis=0)


class ClassMeanGenerator(ImageGenerator):
    """The mean training image of the class whose mean embedding is nearest to the prediction."""

    def __init__(self, data: GeneratorData) -> None:
        self.data = data
        self.classes = sorted(
            set(data.concepts)
        )  # a fixed order, so that ties go to the same class every time
        vectors = data.embeddings.flat()
        rows = [data.concepts == name for name in self.classes]
        self.centroids = np.stack([vectors[row].mean(axis=0) for row in rows])  # (n_classes, n_features)

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.data.embeddings.space

    def classify(self, embeddings: Embeddings) -> np.ndarray:
        """Return the name of the nearest class for each prediction, shape (n_rows,)."""
        check_same_space(embeddings, self.data.embeddings)
        values = embeddings.flat()
        # |a - b|^2 written out: the differences themselves would be n_rows x n_classes x n_features values.
        squared = (
            (values**2).sum(axis=1)[:, None]
            - 2 * values @ self.centroids.T
            + (self.centroids**2).sum(axis=1)[None]
        )  # (n_rows, n_classes)
        return np.array(self.classes, dtype=object)[np.argmin(squared, axis=1)]

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return the mean image of the decoded class per row, uint8 of shape (n_rows, height, width, 3)."""
        # Of the decoded classes alone: most images need not be read.
        names, places = np.unique(self.classify(embeddings), return_inverse=True)
        return np.stack([self.average(name) for name in names])[places]

    def average(self, name: str) -> np.ndarray:
        """Return the mean image of a class, uint8 of shape (height, width, 3)."""
        return self.data.average_images(np.flatnonzero(self.data.concepts == name))


class NearestConfig(GeneratorSettings):
    """Copy the nearest training image; works with every space."""

    kind: Literal["nearest"] = "nearest"

    copies_training_images: ClassVar[bool] = True

    def accepts(self, target_kind: str) -> bool:
        """Every target will do."""
        return True

    def build(self, data: GeneratorData) -> NearestGenerator:
        """Return the generator."""
        return NearestGenerator(data)


class NearestGenerator(ImageGenerator):
    """The training image whose embedding is nearest to the prediction, by the cosine after the training mean."""

    def __init__(self, data: GeneratorData) -> None:
        self.data = data

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.data.embeddings.space

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random here."""
        return self.data.read_images(self.find_nearest(embeddings))

    def find_copies(self, embeddings: Embeddings) -> np.ndarray:
        """Return the row of the training image that each row copies; see `find_nearest`."""
        return self.find_nearest(embeddings)

    def find_nearest(self, embeddings: Embeddings) -> np.ndarray:
        """Return the row of the nearest training embedding for each prediction, shape (n_rows,)."""
        check_same_space(embeddings, self.data.embeddings)
        bank = self.data.embeddings.flat()
        mean = bank.mean(axis=0)
        similarity = (
            normalise_rows(embeddings.flat() - mean) @ normalise_rows(bank - mean).T
        )  # (n_rows, n_images)
        return np.argmax(similarity, axis=1)
