"""SDXL unCLIP on token sequences, as MindEye2 uses it: the tokens of an image encoder in place of the text.

There is no stock pipeline for it, so the stock networks (UNet2DConditionModel, AutoencoderKL) are driven here by a
stock scheduler. What the folder must hold, all in the format of diffusers:

- ``unet/``: a UNet2DConditionModel with ``cross_attention_dim`` equal to the size of one token (1664 for ViT-bigG/14).
  If it has an ``addition_embed_type``, that is ``text_time`` with room for four numbers and no text
  (``projection_class_embeddings_input_dim`` = 4 x ``addition_time_embed_dim``, 1024 = 4 x 256 in MindEye2): height and
  width of the training images, and top and left of the crop;
- ``vae/``: the AutoencoderKL of SDXL; its ``scaling_factor`` is used;
- ``scheduler/``: a scheduler's settings, Euler for MindEye2.

MindEye2 publishes a checkpoint of another code base; it must be converted to this layout first, which is not done here.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207; Podell et al. (2023), SDXL, arXiv:2307.01952.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.checks import DataError
from braindecode_vis.generators.hub import HubConfig, load_pipeline, resize_initial


class TokenUnclipConfig(HubConfig):
    """SDXL unCLIP on 256 tokens of OpenCLIP ViT-bigG/14 (1664 values each, after the last norm, not projected).

    Steps and guidance are as remembered from MindEye2's configuration (unverified); the three settings below are those
    of its sampling function.

    Parameters
    ----------
    n_tokens
        Length of the sequence that the network was trained with; it cannot be told from the weights.
    unconditional
        What guidance leads away from: tokens of Gaussian ``noise``, as in MindEye2, or ``zeros``.
    offset_noise
        Strength of a constant per image and channel-free shift of the starting noise.
    brightness
        ``mindeye2`` shows the decoder's values v in -1..1 as 0.8 v + 0.2, ``plain`` as 0.5 v + 0.5.
    original_size
        Side that the network is told its training image had.
    """

    kind: Literal["token_unclip"] = "token_unclip"
    n_tokens: int = Field(default=256, ge=1)
    unconditional: Literal["noise", "zeros"] = "noise"
    offset_noise: float = Field(default=0.04, ge=0)
    brightness: Literal["mindeye2", "plain"] = "mindeye2"
    original_size: int = Field(default=768, ge=1)
    condition_spaces: tuple[str, ...] = ("openclip/ViT-bigG-14/*/output/patches/raw/*",)
    steps: int = Field(default=38, ge=1)
    guidance: float = Field(default=5.0, ge=0)
    image_size: int | None = Field(default=768, ge=8, multiple_of=8)

    supports_initial: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.guidance <= 1:
            self.refuse_unused("unconditional", because="guidance of 1 or less leads away from nothing")
        return self

    def load(self) -> TokenUnclip:
        """Return networks and scheduler."""
        return load_networks(self.find_folder(), self)

    def find_condition_shape(self, pipeline: TokenUnclip) -> tuple[int, ...]:
        """Return number and size of the tokens."""
        return (self.n_tokens, int(pipeline.unet.config.cross_attention_dim))

    def draw(self, pipeline: TokenUnclip, conditions: np.ndarray, **how: Any) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch

        with torch.inference_mode():
            latents = draw_latents(
                pipeline, torch.from_numpy(conditions), self, generators=how["generators"],
                initial=how["initial"], strength=how["strength"],
            )  # fmt: skip
            scaled = latents / pipeline.vae.config.scaling_factor
            values = pipeline.vae.decode(scaled.to(pipeline.vae.dtype)).sample.float()
        gain, shift = (0.8, 0.2) if self.brightness == "mindeye2" else (0.5, 0.5)
        return (values * gain + shift).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


class TokenUnclip:
    """The three parts of a token-conditioned unCLIP."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any) -> None:
        self.unet, self.vae, self.scheduler = unet, vae, scheduler

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_networks(folder: Path, config: TokenUnclipConfig) -> TokenUnclip:
    """Return the parts of a folder laid out as the module says.

    Raises
    ------
    DataError
        If a part is missing or its sizes are not those of a token unCLIP.
    """
    import diffusers

    for part in ("unet", "vae", "scheduler"):
        if not (folder / part).is_dir():
            raise DataError(
                f"{folder} lacks the folder {part}; it must hold unet, vae and scheduler of diffusers."
            )
    unet = load_pipeline(diffusers.UNet2DConditionModel.from_pretrained, folder / "unet", config)
    exact = config.model_copy(
        update={"precision": "float32"}
    )  # SDXL's autoencoder overflows in half precision
    vae = load_pipeline(diffusers.AutoencoderKL.from_pretrained, folder / "vae", exact)
    about = folder / "scheduler" / "scheduler_config.json"
    try:
        settings = json.loads(about.read_text(encoding="utf-8"))
        scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{about} does not describe a scheduler ({type(error).__name__}); copy the whole folder again."
        ) from error
    kind = unet.config.addition_embed_type
    if kind is not None:
        room = unet.config.projection_class_embeddings_input_dim / unet.config.addition_time_embed_dim
        if kind != "text_time" or room != 4:
            raise DataError(
                f"{folder / 'unet'} is told more than sizes and crops (addition_embed_type {kind}, room for {room:g} "
                "numbers instead of 4): it is no token unCLIP, but perhaps an SDXL that needs a text."
            )
    return TokenUnclip(unet.eval(), vae.eval(), scheduler)


def draw_latents(
    parts: TokenUnclip,
    tokens: Any,
    config: TokenUnclipConfig,
    *,
    generators: Any,
    initial: Any,
    strength: float,
) -> Any:
    """Return denoised latents of shape (n, channels, height, width) for tokens of shape (n, n_tokens, n_features)."""
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    unet, scheduler, n = parts.unet, parts.scheduler, len(tokens)
    device, dtype = unet.device, unet.dtype
    side = (config.image_size or 768) // parts.vae_scale_factor
    shape = (n, int(unet.config.in_channels), side, side)
    noise = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
    shift = randn_tensor((n, 1, 1, 1), generator=generators, device=device, dtype=torch.float32)
    noise = noise + config.offset_noise * shift
    absent = randn_tensor(tuple(tokens.shape), generator=generators, device=device, dtype=torch.float32)
    if config.unconditional == "zeros":
        absent = torch.zeros_like(absent)
    scheduler.set_timesteps(config.steps, device=device)
    timesteps = scheduler.timesteps
    if initial is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        first = len(timesteps) - int(config.steps * strength) * scheduler.order
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        start = encode_initial(parts, resize_initial(initial, config.image_size or 768))
        latents = scheduler.add_noise(start, noise, timesteps[:1].repeat(n))
    guided = config.guidance > 1
    context = torch.cat([absent, tokens.to(device)]) if guided else tokens.to(device)
    extra = _describe_size(unet, config, len(context))
    for timestep in timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        output = unet(
            inputs.to(dtype), timestep, encoder_hidden_states=context.to(dtype), added_cond_kwargs=extra
        ).sample.float()
        if guided:
            without, with_tokens = output.chunk(2)
            output = without + config.guidance * (with_tokens - without)
        takes = {"generator": generators} if _takes_generator(scheduler) else {}
        latents = scheduler.step(output, timestep, latents, **takes).prev_sample
    return latents


def encode_initial(parts: TokenUnclip, images: np.ndarray) -> Any:
    """Return scaled latents of float images in 0..1, at the mean of the autoencoder's posterior."""
    import torch

    values = torch.from_numpy(images).permute(0, 3, 1, 2).to(parts.vae.device, parts.vae.dtype) * 2 - 1
    return parts.vae.encode(values).latent_dist.mode().float() * parts.vae.config.scaling_factor


def _describe_size(unet: Any, config: TokenUnclipConfig, n: int) -> dict[str, Any] | None:
    """Return what the network is told of size and crop: no text, and four numbers per image."""
    import torch

    if unet.config.addition_embed_type is None:
        return None
    sizes = torch.tensor([[config.original_size, config.original_size, 0, 0]] * n, device=unet.device)
    text = torch.zeros(n, 0, device=unet.device, dtype=unet.dtype)
    return {"text_embeds": text, "time_ids": sizes.to(unet.dtype)}


def _takes_generator(scheduler: Any) -> bool:
    import inspect

    return "generator" in inspect.signature(scheduler.step).parameters
