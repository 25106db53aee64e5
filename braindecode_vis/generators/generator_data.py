"""What a generator may be built from: the image encoder of its space and the training images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.contracts import NOTHING_LENT, Context
from braindecode_vis.stimuli import StimulusSet, resize_image

LARGEST_SIDE = 128  # pixels: 16 540 photographs of THINGS are 0.8 GB then, and 12 GB at 500 pixels


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
    """

    image_encoder: Any
    embeddings: Embeddings
    stimuli: StimulusSet
    predicted: Embeddings | None = None
    noise: RepetitionNoise | None = None
    context: Context = NOTHING_LENT

    @cached_property
    def images(self) -> np.ndarray:
        """All training images in the order of `embeddings`, uint8 of shape (n, height, width, 3).

        Images of one size up to `LARGEST_SIDE` are kept as they are; others become squares of that side, so that
        tens of thousands of photographs fit into memory.
        """
        height, width = self.image_size
        images = np.empty((len(self.embeddings), height, width, 3), dtype=np.uint8)
        for row, stimulus_id in enumerate(self.embeddings.ids):
            images[row] = resize_image(self.stimuli.read_image(stimulus_id), height, width)
        return images

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of `images`; the first image says the size of all."""
        height, width = self.stimuli.read_image(self.embeddings.ids[0]).shape[:2]
        return (LARGEST_SIDE, LARGEST_SIDE) if max(height, width) > LARGEST_SIDE else (height, width)

    @cached_property
    def concepts(self) -> np.ndarray:
        """Concept of each row of `embeddings`."""
        return self.stimuli.concepts_of(self.embeddings.ids)
