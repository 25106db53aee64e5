"""Generators that were trained on image embeddings themselves: Stable Diffusion unCLIP and the Kandinsky 2.2 decoder.

Both are unchanged pipelines of diffusers that take `image_embeds`. The one on token sequences is in `token_unclip`.

References
----------
Ramesh et al. (2022), unCLIP, arXiv:2204.06125; Rombach et al. (2022), arXiv:2112.10752; Razzhigaev et al. (2023),
Kandinsky, arXiv:2310.03502.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.generators.hub import HubConfig, load_pipeline, resize_initial

#: Mean colour of CLIP's training images: an image of it is a row of zeros after CLIP's normalisation.
CLIP_GREY = (123, 117, 104)


class UnclipConfig(HubConfig):
    """Stable Diffusion 2.1 unCLIP, conditioned on one CLIP image embedding.

    The ``-h`` weights take OpenCLIP ViT-H/14 (laion2b, 1024 values), the ``-l`` weights OpenAI's ViT-L/14 (768), both
    projected and not normalised. Guidance and steps are those of the pipeline.

    Parameters
    ----------
    noise_level
        Noise on the embedding, as a step of the pipeline's own schedule: decoded embeddings are less sure than those of
        images, and the network has been told the level in training.
    prompt
        Text that leads the image besides the embedding.
    """

    kind: Literal["unclip"] = "unclip"
    noise_level: int = Field(default=0, ge=0, lt=1000)
    prompt: str = ""
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-H-14/*/output/own/raw/*",
        "openclip/ViT-L-14-quickgelu/*/output/own/raw/*",
        "transformers/clip/*/output/own/raw/*",
    )
    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=10.0, ge=0)

    repository: ClassVar[str] = "stabilityai/stable-diffusion-2-1-unclip"

    def load(self) -> Any:
        """Return the pipeline."""
        from diffusers import StableUnCLIPImg2ImgPipeline

        return load_pipeline(StableUnCLIPImg2ImgPipeline.from_pretrained, self.find_folder(), self)

    def find_condition_shape(self, pipeline: Any) -> tuple[int, ...]:
        """Return the size of the embedding; the network sees it beside its noise level of equal size."""
        return (int(pipeline.unet.config.projection_class_embeddings_input_dim) // 2,)

    def draw(self, pipeline: Any, conditions: np.ndarray, **how: Any) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch

        side = self.image_size
        return pipeline(
            prompt=[self.prompt] * len(conditions),
            image_embeds=torch.from_numpy(conditions).to(pipeline.device, pipeline.unet.dtype),
            noise_level=self.noise_level, num_inference_steps=self.steps, guidance_scale=self.guidance,
            height=side, width=side, generator=how["generators"], output_type="np",
        ).images  # fmt: skip


class KandinskyConfig(HubConfig):
    """The decoder of Kandinsky 2.2, conditioned on one embedding of CLIP ViT-bigG/14 (1280 values, not normalised).

    Guidance leads away from the embedding of an image of CLIP's mean colour, which the condition's encoder computes.
    """

    kind: Literal["kandinsky"] = "kandinsky"
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-bigG-14/*/output/own/raw/*",
        "transformers/clip/*/output/own/raw/*",
    )
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=4.0, ge=0)
    image_size: int | None = Field(default=512, ge=64, multiple_of=64)

    repository: ClassVar[str] = "kandinsky-community/kandinsky-2-2-decoder"
    supports_initial: ClassVar[bool] = True

    def load(self) -> Any:
        """Return the text-to-image pipeline."""
        from diffusers import KandinskyV22Pipeline

        return load_pipeline(KandinskyV22Pipeline.from_pretrained, self.find_folder(), self)

    def find_condition_shape(self, pipeline: Any) -> tuple[int, ...]:
        """Return the size of the embedding."""
        return (int(pipeline.unet.config.encoder_hid_dim),)

    def make_negative(self, encoder: Any) -> np.ndarray:
        """Return the embedding of a grey image, shape (1, n_features)."""
        return encoder.encode([np.full((224, 224, 3), CLIP_GREY, np.uint8)])

    def draw(self, pipeline: Any, conditions: np.ndarray, **how: Any) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch
        from diffusers import KandinskyV22Img2ImgPipeline

        def move(rows: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(rows)).to(pipeline.device, pipeline.unet.dtype)

        negative, side = how["negative"], self.image_size or 512
        options: dict[str, Any] = {}
        if how["initial"] is not None:
            pipeline = KandinskyV22Img2ImgPipeline(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            # As PIL images, whose range no version of the pipeline mistakes.
            start = pipeline.numpy_to_pil(resize_initial(how["initial"], side))
            options = {"image": start, "strength": how["strength"]}
        return pipeline(
            image_embeds=move(conditions),
            negative_image_embeds=move(
                np.zeros_like(conditions) if negative is None else np.repeat(negative, len(conditions), axis=0)
            ),
            num_inference_steps=self.steps, guidance_scale=self.guidance, height=side, width=side,
            generator=how["generators"], output_type="np", **options,
        ).images  # fmt: skip
