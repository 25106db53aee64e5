"""Settings of the refiner, which makes images from predicted pixels; importable without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import GeneratorSettings
from braindecode_vis.generation.generator_data import GeneratorData

if TYPE_CHECKING:
    from braindecode_vis.generation.refiner import RefinerGenerator


class RefinerConfig(GeneratorSettings):
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

    needs_predictions: ClassVar[bool] = True

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images."""
        return target_kind == "pixels"

    def build(self, data: GeneratorData) -> RefinerGenerator:
        """Return the generator, trained on the training data; see `fit_refiner`."""
        from braindecode_vis.generation.refiner import RefinerRecipe, fit_refiner

        return fit_refiner(
            data,
            RefinerRecipe(
                self.structure_weight, self.deformation, self.width, self.steps, self.batch_size,
                self.learning_rate, self.n_networks, self.seed,
            ),
        )  # fmt: skip

    def read(self, folder: Path, data: GeneratorData) -> RefinerGenerator:
        """Return the trained generator that was written into `folder`."""
        from braindecode_vis.generation.refiner import RefinerGenerator

        return RefinerGenerator.read(folder, data.image_encoder, width=self.width)
