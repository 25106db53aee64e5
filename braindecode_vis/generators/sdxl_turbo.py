"""SDXL-Turbo led by an image embedding through an IP-Adapter: the second stage of ATM, on stock diffusers.

The pipeline is the unchanged one of diffusers; the predicted embedding takes the place of the adapter's image
embedding, and the prompt is empty. With an initial image the image-to-image pipeline runs on the same networks, as in
ATM's low-level branch.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721; Ye et al. (2023), IP-Adapter, arXiv:2308.06721; Sauer et al. (2023),
SDXL-Turbo, arXiv:2311.17042.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.generators.hub import (
    HubConfig,
    digest_folder,
    find_folder,
    load_pipeline,
    resize_initial,
)

_ADAPTER_REPOSITORY = "h94/IP-Adapter"
_ADAPTER_FILE = "sdxl_models/ip-adapter_sdxl_vit-h.safetensors"


class SdxlTurboConfig(HubConfig):
    """SDXL-Turbo with the ViT-H IP-Adapter (ATM: 4 steps, guidance 0, adapter scale 1, 512 pixels, empty prompt).

    The condition is the projected image embedding of OpenCLIP ViT-H/14 (laion2b), 1024 values, not normalised.

    Parameters
    ----------
    weights
        Folder of stabilityai/sdxl-turbo, or of any SDXL.
    ip_adapter
        The adapter's safetensors file, or the folder of h94/IP-Adapter. None needs `allow_download`.
    scale
        Weight of the adapter's cross-attention.
    prompt
        Text that leads the image besides the embedding.
    """

    kind: Literal["sdxl_turbo"] = "sdxl_turbo"
    ip_adapter: Path | None = None
    scale: float = Field(default=1.0, ge=0)
    prompt: str = ""
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-H-14/*/output/own/raw/*",
        "transformers/clip/*/output/own/raw/*",
    )
    steps: int = Field(default=4, ge=1)
    guidance: float = Field(default=0.0, ge=0)
    image_size: int | None = Field(default=512, ge=8, multiple_of=8)

    repository: ClassVar[str] = "stabilityai/sdxl-turbo"
    supports_initial: ClassVar[bool] = True
    not_hashed: ClassVar[frozenset[str]] = HubConfig.not_hashed | {"ip_adapter"}

    def find_adapter(self) -> Path:
        """Return the adapter's file."""
        found = find_folder(self.ip_adapter, False, "", "IP-Adapter") if self.ip_adapter else None
        if found is None and self.allow_download:
            from huggingface_hub import hf_hub_download

            try:
                found = Path(hf_hub_download(_ADAPTER_REPOSITORY, _ADAPTER_FILE))
            except Exception as error:  # as in `find_folder`
                raise ConfigError(
                    f"the IP-Adapter could not be fetched ({type(error).__name__}); bring {_ADAPTER_FILE} of "
                    f"huggingface.co/{_ADAPTER_REPOSITORY} and name it with generator.ip_adapter."
                ) from error
        if found is None:
            raise ConfigError(
                f"the generator sdxl_turbo has no IP-Adapter: set generator.ip_adapter to {_ADAPTER_FILE} of "
                f"huggingface.co/{_ADAPTER_REPOSITORY}, or let it be fetched with generator.allow_download=true."
            )
        file = found / _ADAPTER_FILE if found.is_dir() else found
        if not file.is_file() or file.suffix != ".safetensors":
            raise ConfigError(f"generator.ip_adapter should be a safetensors file, but {file} is none.")
        return file

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of both sets of weights."""
        return {**super().hashed_fields(), "ip_adapter_digest": digest_folder(self.find_adapter())}

    def load(self) -> Any:
        """Return the text-to-image pipeline with its adapter."""
        from diffusers import StableDiffusionXLPipeline
        from diffusers.utils import logging
        from safetensors import SafetensorError

        file = self.find_adapter()
        pipeline = load_pipeline(StableDiffusionXLPipeline.from_pretrained, self.find_folder(), self)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # that the adapter's image encoder is not loaded is meant
        try:
            pipeline.load_ip_adapter(
                str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None,
                local_files_only=True,
            )  # fmt: skip
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{file} is no IP-Adapter for {self.find_folder()} ({first}); bring {_ADAPTER_FILE}."
            ) from error
        finally:
            logging.set_verbosity(level)
        pipeline.set_ip_adapter_scale(self.scale)
        return pipeline

    def find_condition_shape(self, pipeline: Any) -> tuple[int, ...]:
        """Return the size of the adapter's image embedding."""
        from diffusers.models.embeddings import ImageProjection

        layer = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
        if not isinstance(layer, ImageProjection):
            raise ConfigError(
                f"this IP-Adapter has a {type(layer).__name__}, which takes hidden states and no embedding; bring "
                f"{_ADAPTER_FILE}."
            )
        return (int(layer.image_embeds.in_features),)

    def draw(self, pipeline: Any, conditions: np.ndarray, **how: Any) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch
        from diffusers import StableDiffusionXLImg2ImgPipeline

        n, initial = len(conditions), how["initial"]
        embeds = torch.from_numpy(conditions)[:, None].to(pipeline.device, pipeline.unet.dtype)
        if self.guidance > 1:  # the adapter was trained with zeros as its absent image
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        side = self.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        options: dict[str, Any] = {"height": side, "width": side}
        if initial is not None:
            pipeline = _as_image_to_image(pipeline, StableDiffusionXLImg2ImgPipeline)
            options = {"image": resize_initial(initial, side), "strength": how["strength"]}
        # Given embeddings, diffusers repeats them all for every prompt, which suits one image only; here each prompt
        # of the batch has its own.
        pipeline.prepare_ip_adapter_image_embeds = lambda *args, **kwargs: [embeds]
        try:
            made = pipeline(
                prompt=[self.prompt] * n, ip_adapter_image_embeds=[embeds], num_inference_steps=self.steps,
                guidance_scale=self.guidance, generator=how["generators"], output_type="np", **options,
            )  # fmt: skip
        finally:
            del pipeline.prepare_ip_adapter_image_embeds
        return made.images


def _as_image_to_image(pipeline: Any, kind: Any) -> Any:
    """Return the image-to-image pipeline on the same networks."""
    turned = kind(**pipeline.components)
    turned.set_progress_bar_config(disable=True)
    return turned
