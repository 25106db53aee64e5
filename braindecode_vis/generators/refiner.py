"""Paint images from predicted pixels with a small network that is trained on the training images alone.

A prediction of least squared error is a conditional mean, with grey margins wherever the image was uncertain. The
refiner learns to undo that inside a generative model of its own: an image is a deformed training image, and its
prediction is simulated with the gains and residuals that out-of-fold predictions of the training trials show. The
network inverts that model for the loss that counts, mostly structural similarity, so it returns one image and not a
draw. The test split is never seen, and a reconstruction is no copy of a training image.

References
----------
Zhao et al. (2017), losses for image restoration, doi:10.1109/TCI.2016.2644865 (structural similarity as a loss).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from torch import nn

MOST_FEATURES = 4096  # pixels times colours, whose principal axes are computed
SMALLEST_SIDE = 12  # pixels, for the window of the loss and two halvings


class RefinerConfig(Settings):
    """Refine predicted pixels; only the target ``pixels`` is accepted.

    Parameters
    ----------
    structure_weight
        Share of the structural dissimilarity in the loss; the rest is ten times the squared error.
    deformation
        Strength of the random deformations of the training images. At 1 the linear map departs from the identity by
        0.07, the shift and the smooth displacement by 3.6 and 4.3 percent of half the side (standard deviations).
    width
        Channels of the network at full resolution.
    steps, batch_size, learning_rate
        Training of each network, with AdamW and one cycle of the learning rate.
    n_networks
        Networks from different seeds whose images are averaged.
    seed
        Of weights, deformations and simulated predictions.
    """

    kind: Literal["refiner"] = "refiner"
    structure_weight: float = Field(default=0.9, ge=0, le=1)
    deformation: float = Field(default=1.0, ge=0)
    width: int = Field(default=8, ge=2, multiple_of=2)
    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    n_networks: int = Field(default=3, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images."""
        return target_kind == "pixels"

    def build(self, data: GeneratorData) -> RefinerGenerator:
        """Return the generator, trained on the training data.

        Networks that lie finished in the checkpoint folder of the data's context are taken from there.

        Raises
        ------
        ConfigError
            If the target is not made of pixels, or of too few or too many, or if out-of-fold predictions are missing.
        """
        shape = getattr(data.image_encoder, "shape", None)
        if shape is None:
            raise ConfigError(
                f"the generator 'refiner' paints pixels, but the target space is {data.image_encoder.space!r}; "
                "set target.kind to pixels."
            )
        if min(shape[:2]) < SMALLEST_SIDE or int(np.prod(shape)) > MOST_FEATURES:
            raise ConfigError(
                f"the generator 'refiner' takes {SMALLEST_SIDE} pixels a side or more and {MOST_FEATURES} values an "
                f"image or fewer, not {' x '.join(map(str, shape))}; change target.size or target.colour."
            )
        if data.predicted is None or len(data.predicted) < 3:
            raise ConfigError(
                "the generator 'refiner' learns from out-of-fold predictions of training trials, and this encoder "
                "gives too few; set encoder.selection.hold_out above 0, or choose ridge."
            )
        from braindecode_vis.generators.refiner_training import train_refiners

        pairs = data.predicted
        networks, losses = train_refiners(
            self,
            data.embeddings.flat().reshape(-1, *shape),
            pairs.flat().reshape(-1, *shape),
            data.embeddings.select(list(pairs.ids)).flat().reshape(-1, *shape),
            context=data.context,
        )
        return RefinerGenerator(data.image_encoder, networks, losses)


class RefinerGenerator:
    """Trained networks whose mean image is shown."""

    def __init__(self, encoder: Any, networks: list[nn.Module], losses: list[float]) -> None:
        self.encoder, self.networks, self.losses = encoder, networks, losses

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the pixels the networks were trained on."""
        return space == self.encoder.space

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random after training."""
        if not self.accepts(embeddings.space):
            raise ConfigError(
                f"the generator 'refiner' refines {self.encoder.space!r}, not {embeddings.space!r}."
            )
        from braindecode_vis.generators.refiner_training import refine

        values = embeddings.flat().reshape(-1, *self.encoder.shape)
        return self.encoder.decode(refine(self.networks, values).reshape(len(values), -1))

    def describe(self) -> dict[str, Any]:
        """Return the loss of each network at the end of its training."""
        return {"losses": self.losses}
