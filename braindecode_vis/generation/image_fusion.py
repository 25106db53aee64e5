"""Two reconstructions of one image become one: content from the high-level branch, colour and layout from the low.

The low-level image comes from predicted latents of an autoencoder and is blurred but in place; the high-level one
is sharp but free. Either their pixels are mixed with a stated weight, as MindEye2 (0.75 high-level) and ATM's 2026 code
do, or the low-level image is where the high-level generator's denoising starts, at a stated strength (ATM: 0.5). What
went in is always returned beside what came out, so that tables can show what the fusion adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import GeneratorSettings, ImageGenerator
from braindecode_vis.base.roles import complete
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import resize_image


class ImageFusionConfig(Settings):
    """How the low-level branch is used.

    Parameters
    ----------
    mode
        ``pixels`` mixes the images; ``initial`` starts the generator from the low-level image; ``both`` does both.
    weight
        Share of the high-level image in the mixture, 0 to 1 (MindEye2: 0.75).
    strength
        Share of the generator's schedule that is run from the low-level image (ATM: 0.5).
    """

    mode: Literal["pixels", "initial", "both"] = "pixels"
    weight: float = Field(default=0.75, ge=0, le=1)
    strength: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.mode == "pixels":
            self.refuse_unused("strength", because="mode pixels mixes images by weight")
        if self.mode == "initial":
            self.refuse_unused(
                "weight", because="mode initial starts the generator from the image at strength"
            )
        return self

    def describe(self) -> str:
        """Return mode and numbers in words."""
        mixed = f"{self.weight:g} of the high-level image"
        started = f"denoised from it at strength {self.strength:g}"
        return {"pixels": mixed, "initial": started, "both": f"{started}, then {mixed}"}[self.mode]

    def check_generator(self, settings: Any) -> None:
        """Raise `ConfigError` if a generator of these settings cannot start from an image where that is asked for."""
        generator = complete(GeneratorSettings, settings)
        self._check_start(generator.supports_initial)
        # A start from an image skips the first part of the schedule; rounding down may leave nothing.
        steps = generator.n_steps
        if self.mode != "pixels" and steps is not None and int(steps * self.strength) < 1:
            raise ConfigError(
                f"low_level.fusion.strength {self.strength:g} of {steps} generator.steps leaves no step to run from "
                f"the low-level image; set strength to at least {1 / steps:g}, or more steps."
            )

    def _check_start(self, supported: bool) -> None:
        if self.mode != "pixels" and not supported:
            raise ConfigError(
                f"low_level.fusion.mode is {self.mode}, but the generator takes no initial image; use pixels, or a "
                "generator of kind sdxl_turbo, sd_ip_adapter, versatile_diffusion or token_unclip."
            )


def fuse_branches(
    generator: Any,
    embeddings: Embeddings,
    low: np.ndarray,
    config: ImageFusionConfig,
    *,
    seed: int,
    prompts: Sequence[str] | None = None,
    texts: Embeddings | None = None,
    **place: int,
) -> dict[str, np.ndarray]:
    """Return the fused images and the two that went in.

    Parameters
    ----------
    generator
        The high-level generator.
    embeddings
        What it is given, one row per image.
    low : uint8 array of shape (n_rows, height, width, 3)
        Low-level images, row by row of the same trials.
    config
        How they are fused.
    seed
        For the generator; both of its runs share their noise.
    prompts
        Text of each row that leads its image, for generators that read texts.
    texts
        Tokens of a text of each row, for generators that take them.
    **place
        ``first_row`` for a generator that is given a part of the rows.

    Returns
    -------
    dict of uint8 arrays of shape (n_rows, height, width, 3)
        ``decoded`` (fused), ``high_level`` (without any low-level image) and ``low_level``.
    """
    if len(low) != len(embeddings):
        raise DataError(f"{len(embeddings)} embeddings came with {len(low)} low-level images.")
    config._check_start(complete(ImageGenerator, generator).supports_initial)
    # Always made, whatever the mode, so that tables can show what the low-level branch adds.
    given: dict[str, Any] = {"prompts": prompts, "texts": texts, **place}
    more = {name: value for name, value in given.items() if value is not None}
    high = generator.generate(embeddings, seed=seed, **more)
    fused = high
    if config.mode in ("initial", "both"):
        fused = generator.generate(embeddings, seed=seed, initial=low, strength=config.strength, **more)
    if config.mode in ("pixels", "both"):
        fused = mix_images(fused, low, config.weight)
    return {"decoded": fused, "high_level": high, "low_level": low}


def mix_images(high: np.ndarray, low: np.ndarray, weight: float) -> np.ndarray:
    """Return weight * high + (1 - weight) * low, in the size of `high`.

    Parameters
    ----------
    high, low : uint8 arrays of shape (n, height, width, 3)
        Of any two sizes.
    weight
        Share of `high`.

    Examples
    --------
    >>> import numpy as np
    >>> mix_images(np.full((1, 2, 2, 3), 200, np.uint8), np.zeros((1, 1, 1, 3), np.uint8), 0.75)[0, 0, 0]
    array([150, 150, 150], dtype=uint8)
    """
    height, width = high.shape[1:3]
    # The low-level image gives way: enlarging it costs nothing, as it is blurred already.
    small = np.stack([resize_image(image, height, width) for image in low])
    mixed = weight * high.astype(np.float32) + (1 - weight) * small.astype(np.float32)
    return np.round(mixed).astype(np.uint8)
