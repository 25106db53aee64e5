"""What a generator may be built from: the image encoder of its space and the training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.stimuli import StimulusSet, resize_image

LARGEST_SIDE = 128  # pixels


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


@dataclass
class Workshop:
    """What a generator that trains for long is lent: a folder that outlives a killed run, and someone to tell.

    Parameters
    ----------
    workspace
        Folder of finished parts; without one, none is kept.
    progress
        Called with steps done, steps in all, and words on how it goes.
    """

    workspace: Path | None = None
    progress: Callable[[int, int, str], None] | None = None

    def take(self, name: str) -> Workshop:
        """Return a part of the workshop for one of several trainings, for example a fold."""
        progress = self.progress
        return Workshop(
            None if self.workspace is None else self.workspace / name,
            None if progress is None else lambda done, total, text: progress(done, total, f"{name}, {text}"),
        )


def open_workshop(generator: Any) -> Workshop | None:
    """Return an empty workshop for a generator (its configuration) that uses one; None for any other."""
    return Workshop() if getattr(generator, "uses_workshop", False) else None


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
    workshop
        For generators that train for long.
    """

    image_encoder: Any
    embeddings: Embeddings
    stimuli: StimulusSet
    predicted: Embeddings | None = None
    noise: RepetitionNoise | None = None
    workshop: Workshop | None = None

    @cached_property
    def images(self) -> np.ndarray:
        """All training images in the order of `embeddings`, uint8 of shape (n, height, width, 3).

        Images of one size up to `LARGEST_SIDE` are kept as they are; others become squares of that side, so that
        tens of thousands of photographs fit into memory.
        """
        first = self.stimuli.read_image(self.embeddings.ids[0])
        height, width = first.shape[:2]
        if max(height, width) > LARGEST_SIDE:
            height = width = LARGEST_SIDE
        images = np.empty((len(self.embeddings), height, width, 3), dtype=np.uint8)
        for row, stimulus_id in enumerate(self.embeddings.ids):
            images[row] = resize_image(self.stimuli.read_image(stimulus_id), height, width)
        return images

    @cached_property
    def concepts(self) -> np.ndarray:
        """Concept of each row of `embeddings`."""
        return self.stimuli.concepts_of(self.embeddings.ids)
