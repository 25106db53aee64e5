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
    steps
        Training steps of each network, with AdamW and one cycle of the learning rate.
    """

    kind: Literal["refiner"] = "refiner"
    steps: int = Field(default=600, ge=1)

    batch_size: ClassVar[int] = 32
    learning_rate: ClassVar[float] = 3e-3
    #: Share of the structural dissimilarity in the loss; the rest is ten times the squared error.
    structure_weight: ClassVar[float] = 0.9
    #: Strength of the random deformations of the training images. At 1 the linear map departs from the identity
    #: by 0.07, the shift and the smooth displacement by 3.6 and 4.3 percent of half the side (standard
    #: deviations).
    deformation: ClassVar[float] = 1.0
    #: Channels of the network at full resolution.
    width: ClassVar[int] = 8
    #: Networks from different seeds whose images are averaged.
    n_networks: ClassVar[int] = 3
    #: Of weights, deformations and simulated predictions.
    seed: ClassVar[int] = 0
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "batch_size", "learning_rate", "structure_weight", "deformation", "width", "n_networks", "seed",
    })  # fmt: skip

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
        from braindecode_vis.generation.refiner import read_refiner

        return read_refiner(folder, data.image_encoder, width=self.width)
