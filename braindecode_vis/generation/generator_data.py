"""Data for building a generator: the image encoder of its space and the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.contracts import NOTHING_LENT, Context
from braindecode_vis.base.stimuli import ImageRows, StimulusSet, resize_image


@dataclass(frozen=True)
class RepetitionNoise:
    """How predictions of the same image differ from repetition to repetition, in the training trials.

    Parameters
    ----------
    deviations : float array of shape (n_trials, n_features)
        Predictions of single repetitions minus their mean over the image, scaled to the variance of one repetition.
    n_train, n_test
        Repetitions behind one training trial and one test trial (harmonic means).
    """

    deviations: np.ndarray
    n_train: float
    n_test: float


@dataclass(frozen=True)
class GeneratorData:
    """Images and embeddings of the training split; the test split is never in here.

    Parameters
    ----------
    image_encoder
        The encoder of the target space, fitted if it needs fitting.
    embeddings
        One row per training image.
    stimuli
        The training images, in any order.
    predicted
        Out-of-fold predictions of the training trials, if the brain encoder gives them.
    noise
        Noise of single repetitions, for generators that weigh predictions by their reliability.
    context
        What the pipeline lends a generator that trains for long: a folder for finished parts, and a call for progress.
    text_encoder, texts
        The encoder of the tokens of texts, and those of each training image; None without a text branch.
    size
        Height and width that images are brought to where they differ; by default those of the first.
    """

    image_encoder: Any
    embeddings: Embeddings
    stimuli: StimulusSet
    predicted: Embeddings | None = None
    noise: RepetitionNoise | None = None
    context: Context = NOTHING_LENT
    text_encoder: Any = None
    texts: Embeddings | None = None
    size: tuple[int, int] | None = None

    def show_images(self, rows: Sequence[int] | np.ndarray) -> ImageRows:
        """Return training images by their rows in `embeddings`, each in its own size and read when it is asked for."""
        ids = [str(name) for name in self.embeddings.ids[np.asarray(rows, dtype=np.intp)]]
        return ImageRows(self.stimuli, self.stimuli.find_rows(ids))

    def read_images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return training images by their rows in `embeddings`, uint8 of shape (n_rows, height, width, 3).

        Images of another size than `image_size` are brought to it (see `resize_image`). Each is read once, however
        often it is asked for: what is shown is a small part of tens of thousands of photographs.
        """
        distinct, places = np.unique(np.asarray(rows, dtype=np.intp), return_inverse=True)
        height, width = self.image_size
        images = np.empty((len(distinct), height, width, 3), dtype=np.uint8)
        for image, row in zip(images, distinct, strict=True):
            image[...] = self._read_image(row)
        return images[places]

    def average_images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the rounded mean of training images, uint8 of shape (height, width, 3); one is read at a time."""
        total = np.zeros((*self.image_size, 3), dtype=np.int64)
        for row in rows:
            total += self._read_image(row)
        return np.round(total / len(rows)).astype(np.uint8)

    def _read_image(self, row: int) -> np.ndarray:
        return resize_image(self.stimuli.read_image(self.embeddings.ids[row]), *self.image_size)

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what `read_images` returns: `size`, or those of the first image."""
        height, width = self.size or self.stimuli.read_image(self.embeddings.ids[0]).shape[:2]
        return height, width

    @cached_property
    def concepts(self) -> np.ndarray:
        """Concept of each row of `embeddings`."""
        return self.stimuli.concepts_of(self.embeddings.ids)
