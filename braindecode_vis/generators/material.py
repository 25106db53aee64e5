"""What a generator may be built from: the image encoder of its space and the training images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.stimuli import StimulusSet


@dataclass(frozen=True)
class TrainingMaterial:
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
    """

    image_encoder: Any
    embeddings: Embeddings
    stimuli: StimulusSet
    predicted: Embeddings | None = None

    @cached_property
    def images(self) -> np.ndarray:
        """All training images in the order of `embeddings`, uint8 of shape (n, height, width, 3)."""
        images = [self.stimuli.read_image(i) for i in self.embeddings.ids]
        shapes = {image.shape for image in images}
        if len(shapes) != 1:
            raise DataError(
                f"training images have {len(shapes)} different sizes, but this generator averages or copies "
                "them; bring them to one size first."
            )
        return np.stack(images)

    @cached_property
    def concepts(self) -> np.ndarray:
        """Concept of each row of `embeddings`."""
        return self.stimuli.concepts_of(self.embeddings.ids)
