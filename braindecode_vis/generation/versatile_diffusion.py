"""Versatile Diffusion led by tokens of an image and of a text at once, as Brain-Diffuser and Benchetrit et al. use it.

Its class is one of diffusers' deprecated pipelines; where it is gone, one sentence says so. It is used to join the two
networks into one with an attention to each condition, and no more: it has no way to start from an image, and its own
encoders are not loaded, since the conditions are predicted. What the folder must hold, in the format of diffusers:

- ``image_unet/`` and ``text_unet/``, or an ``image_unet/`` that is joined already (``dual_cross_attention``);
- ``vae/``: the AutoencoderKL of Stable Diffusion 1;
- ``scheduler/``: a scheduler's settings, which become those of DDIM.

References
----------
Xu et al. (2023), Versatile Diffusion, arXiv:2211.08332; Ozcelik and VanRullen (2023), Brain-Diffuser, arXiv:2303.05334;
Benchetrit, Banville and King (2023), arXiv:2310.19812.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.generation.hub import (
    HubBatch,
    HubOptions,
    denoise,
    load_pipeline,
    place,
    read_scheduler,
    resize_initial,
)


class VersatileDiffusion:
    """The networks of Versatile Diffusion; see `VersatileDiffusionConfig` for the settings.

    Parameters
    ----------
    folder
        Laid out as the module says.
    options
        Steps, guidance and arithmetic.
    n_tokens, n_text_tokens, text_share
        As in `VersatileDiffusionConfig`.

    Raises
    ------
    ConfigError
        If diffusers no longer has the class.
    DataError
        If a part is missing.
    """

    #: Guidance leads away from a black image and an empty text.
    absent_image = np.zeros((224, 224, 3), np.uint8)

    def __init__(
        self, folder: Path, options: HubOptions, *, n_tokens: int, n_text_tokens: int, text_share: float
    ) -> None:
        import diffusers
        from diffusers.models import DualTransformer2DModel

        self.options, self.n_tokens, self.n_text_tokens = options, n_tokens, n_text_tokens
        pipeline_class, text_class = find_classes()
        for part in ("image_unet", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise DataError(
                    f"{folder} is missing the folder {part}; it must hold image_unet, text_unet, vae and scheduler of "
                    "diffusers."
                )
        image_unet = load_pipeline(
            diffusers.UNet2DConditionModel.from_pretrained, folder / "image_unet", options
        )
        text_unet = None
        if not image_unet.config.dual_cross_attention:
            if not (folder / "text_unet").is_dir():
                raise DataError(
                    f"{folder} is missing the folder text_unet, and image_unet has no attention to a text."
                )
            text_unet = load_pipeline(text_class.from_pretrained, folder / "text_unet", options)
        vae = load_pipeline(diffusers.AutoencoderKL.from_pretrained, folder / "vae", options)
        scheduler = read_scheduler(folder, diffusers.DDIMScheduler)
        # The parts that encode a picture and a text are left out: what they would give is predicted.
        self.pipeline = pipeline_class(
            tokenizer=None, image_feature_extractor=None, text_encoder=None, image_encoder=None,
            image_unet=image_unet, text_unet=text_unet, vae=vae, scheduler=scheduler,
        )  # fmt: skip
        self.pipeline.remove_unused_weights()
        self.unet, self.vae, self.scheduler = image_unet.eval(), vae.eval(), scheduler
        for module in self.unet.modules():
            if isinstance(module, DualTransformer2DModel):
                # The first transformer of a pair reads images, and texts stand first in the sequence.
                module.mix_ratio, module.condition_lengths = text_share, [n_text_tokens, n_tokens]
                module.transformer_index_for_condition = [1, 0]
                # The blocks of diffusers 0.42 hand it a mask that it has no place for.
                module.forward = partial(_forget_masks, module.forward)  # type: ignore[method-assign]
        place(self.pipeline, options)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Number and size of the tokens of an image."""
        return (self.n_tokens, self._n_features)

    @property
    def text_shape(self) -> tuple[int, ...]:
        """Number and size of the tokens of a text."""
        return (self.n_text_tokens, self._n_features)

    @property
    def _n_features(self) -> int:
        return int(self.unet.config.cross_attention_dim)

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        unet, vae, options = self.unet, self.vae, self.options
        n, device, guided = len(batch.conditions), options.torch_device, options.guidance > 1
        nothing = np.zeros((n, *self.text_shape), np.float32)  # its share is 0, where there is no text

        def join(texts: np.ndarray | None, images: np.ndarray | None) -> Any:
            """Return tokens of shape (n, n_text_tokens + n_tokens, n_features)."""
            parts = [
                np.zeros((n, *shape), np.float32) if part is None else np.repeat(part, n // len(part), axis=0)
                for part, shape in ((texts, self.text_shape), (images, self.condition_shape))
            ]
            return torch.from_numpy(np.concatenate(parts, axis=1)).to(device, unet.dtype)

        context = join(nothing if batch.texts is None else batch.texts, batch.conditions)
        if guided:
            context = torch.cat([join(batch.absent_text, batch.negative), context])
        side = options.image_size or 512
        shape = (
            n,
            int(unet.config.in_channels),
            *[side // 2 ** (len(vae.config.block_out_channels) - 1)] * 2,
        )
        noise = randn_tensor(
            shape, generator=batch.generators, device=torch.device(device), dtype=torch.float32
        )
        with torch.inference_mode():
            start = None
            if batch.initial is not None:
                values = torch.from_numpy(resize_initial(batch.initial, side)).permute(0, 3, 1, 2) * 2 - 1
                start = vae.encode(values.to(device, vae.dtype)).latent_dist.mode().float()
                start = start * vae.config.scaling_factor
            latents = denoise(
                self.scheduler, noise, options, batch, start=start,
                predict=lambda inputs, timestep: unet(
                    inputs.to(unet.dtype), timestep, encoder_hidden_states=context
                ).sample,
            )  # fmt: skip
            values = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        self.pipeline.maybe_free_model_hooks()
        return (values / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _forget_masks(forward: Any, *args: Any, attention_mask: Any = None, **more: Any) -> Any:
    masks = (attention_mask, more.pop("encoder_attention_mask", None))
    assert all(mask is None for mask in masks)
    return forward(*args, **more)


def find_classes() -> tuple[Any, Any]:
    """Return the pipeline of diffusers and the class of its text network.

    Raises
    ------
    ConfigError
        If the installed diffusers no longer has them.
    """
    import diffusers

    for place_of in ("pipelines.deprecated.versatile_diffusion", "pipelines.versatile_diffusion"):
        try:
            package = import_module(f"diffusers.{place_of}")
            network = import_module(f"diffusers.{place_of}.modeling_text_unet")
            return package.VersatileDiffusionDualGuidedPipeline, network.UNetFlatConditionModel
        except (ImportError, AttributeError):
            continue
    raise ConfigError(
        f"diffusers {diffusers.__version__} no longer has Versatile Diffusion, which was deprecated; set "
        "generator.kind to sd_ip_adapter, or install diffusers 0.42."
    )
