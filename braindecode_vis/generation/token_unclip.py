"""SDXL unCLIP on token sequences, as MindEye2 uses it: the tokens of an image encoder in place of the text.

There is no stock pipeline for it, so the stock networks (UNet2DConditionModel, AutoencoderKL) are driven here by a
stock scheduler. What the folder must hold, all in the format of diffusers:

- ``unet/``: a UNet2DConditionModel with ``cross_attention_dim`` equal to the size of one token (1664 for ViT-bigG/14).
  If it has an ``addition_embed_type``, that is ``text_time`` with room for four numbers and no text
  (``projection_class_embeddings_input_dim`` = 4 x ``addition_time_embed_dim``, 1024 = 4 x 256 in MindEye2): height and
  width of the training images, and top and left of the crop;
- ``vae/``: the AutoencoderKL of SDXL; its ``scaling_factor`` is used;
- ``scheduler/``: a scheduler's settings, Euler for MindEye2.

MindEye2 publishes a checkpoint of another code base; ``braindecode-vis weights convert`` writes it in this layout.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207; Podell et al. (2023), SDXL, arXiv:2307.01952.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.settings import NeededWeights, Settings
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.embeddings.weights import PublishedFiles
from braindecode_vis.generation.hub import (
    HubBatch,
    HubOptions,
    denoise,
    load_pipeline,
    place,
    read_scheduler,
    resize_initial,
)
from braindecode_vis.generation.hub_config import HubConfig, describe_folder, digest_folder, find_folder

NOT_WANTED = (
    "painting, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, deformed, ugly, blurry, bad "
    "anatomy, bad proportions, extra limbs, cloned face, skinny, glitchy, double torso, extra arms, extra hands, "
    "mangled fingers, missing lips, ugly face, distorted face, extra legs, anime"
)
#: Strength of the shift of the starting noise, one number per image for all channels.
OFFSET_NOISE = 0.04
#: Side in pixels that the network is to take its training image to have had.
ORIGINAL_SIZE = 768


class RefineConfig(Settings):
    """A second pass of SDXL over the images, guided by a text of each trial (MindEye2).

    The texts are those of ``reconstruction.prompt``. Numbers are those of MindEye2's notebook: 12 of 25 steps, guidance
    5, images that were 256 pixels large in between.

    Parameters
    ----------
    weights
        Folder of an SDXL in the format of diffusers; MindEye2 takes zavychromaxl_v30, which is published as one file.
    steps, guidance
        Denoising steps, of which half are run, and the scale of guidance.
    prompt
        Text for trials without their own text.
    """

    weights: Path | None = None
    steps: int = Field(default=25, ge=2)
    guidance: float = Field(default=5.0, ge=0)
    prompt: str = ""

    #: Share of the steps that is run.
    strength: ClassVar[float] = 0.5
    #: What guidance leads away from.
    negative_prompt: ClassVar[str] = NOT_WANTED
    #: Side that images are reduced to first, pixels.
    start_size: ClassVar[int] = 256
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"strength", "negative_prompt", "start_size"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights"})

    def find_folder(self) -> Path:
        """Return the folder of the SDXL."""
        return find_folder(self.weights, False, self._published)

    def list_weights(self) -> list[NeededWeights]:
        """Return the folder of the SDXL."""
        return [self._published.describe("weights", self.weights)]

    @property
    def _published(self) -> PublishedFiles:
        return replace(
            describe_folder("", "refinement of the generator token_unclip"),
            refusal="the refinement of the generator token_unclip has no weights: set generator.refine.weights to a "
            "folder that holds an SDXL in the format of diffusers (6.9 GB in half precision), or generator.refine to "
            "null",
        )

    def check_files(self) -> None:
        """Raise `ConfigError` unless the folder is there."""
        self.find_folder()

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_digest": digest_folder(self.find_folder())}


class TokenUnclipConfig(HubConfig):
    """SDXL unCLIP on 256 tokens of OpenCLIP ViT-bigG/14 (1664 values each, after the last norm, not projected).

    Guidance is that of MindEye2's configuration; of the steps its sampling function takes 38, the configuration says
    50. The noise that guidance leads away from, the shift of the starting noise and the brightness are those of that
    function, too. `token_unclip` says what the folder must hold. No revision or hash of the published checkpoint is
    known here, so none is pinned: note which one was converted.

    Parameters
    ----------
    refine
        A second pass by SDXL, guided by a text of each trial; none by default.
    """

    kind: Literal["token_unclip"] = "token_unclip"
    refine: RefineConfig | None = None
    condition_spaces: tuple[str, ...] = ("openclip/ViT-bigG-14/*/output/patches/raw/*",)
    steps: int = Field(default=38, ge=1)
    guidance: float = Field(default=5.0, ge=0)
    image_size: int | None = Field(default=768, ge=8, multiple_of=8)

    #: Length of the sequence that MindEye2's network was trained with.
    n_tokens: ClassVar[int] = 256
    model: ClassVar[str | None] = "mindeye2_unclip"
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_tokens"})
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "unconditional": "noise",
        "offset_noise": OFFSET_NOISE,
        "brightness": "mindeye2",
        "original_size": ORIGINAL_SIZE,
    }

    supports_initial: ClassVar[bool] = True
    hashed_if_set: ClassVar[frozenset[str]] = HubConfig.hashed_if_set | {"refine"}

    @property
    def supports_prompts(self) -> bool:  # type: ignore[override]
        """Whether there is a second pass, which reads them."""
        return self.refine is not None

    def describe_choices(self) -> list[str]:
        """Return what makes its images those of another protocol."""
        if self.refine is None:
            return []
        run = int(self.refine.steps * self.refine.strength)
        return [
            f"images refined by SDXL, {run} of {self.refine.steps} steps at guidance {self.refine.guidance:g}"
        ]

    def load(self) -> Any:
        """Return networks and scheduler."""
        return TokenUnclip(self.find_folder(), self.options, n_tokens=self.n_tokens, refine=self.refine)


class TokenUnclip:
    """The three parts of a token-conditioned unCLIP; see `TokenUnclipConfig` for the settings.

    Parameters
    ----------
    folder
        Laid out as the module says.
    options
        Steps, guidance and arithmetic.
    n_tokens, refine
        As in `TokenUnclipConfig`.

    Raises
    ------
    DataError
        If a part is missing or its sizes are not those of a token unCLIP.
    """

    absent_image = None

    def __init__(
        self,
        folder: Path,
        options: HubOptions,
        *,
        n_tokens: int,
        refine: RefineConfig | None = None,
    ) -> None:
        import diffusers

        self.options, self.n_tokens = options, n_tokens
        for part in ("unet", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise DataError(
                    f"{folder} is missing the folder {part}; it must hold unet, vae and scheduler of diffusers."
                )
        unet = load_pipeline(diffusers.UNet2DConditionModel.from_pretrained, folder / "unet", options)
        # SDXL's autoencoder overflows in half precision.
        exact = replace(options, precision="float32")
        vae = load_pipeline(diffusers.AutoencoderKL.from_pretrained, folder / "vae", exact)
        self.scheduler = read_scheduler(folder)
        kind = unet.config.addition_embed_type
        if kind is not None:
            room = unet.config.projection_class_embeddings_input_dim / unet.config.addition_time_embed_dim
            if kind != "text_time" or room != 4:
                raise DataError(
                    f"{folder / 'unet'} takes more than sizes and crops (addition_embed_type {kind}, room for "
                    f"{room:g} numbers instead of 4): it is not a token unCLIP, but perhaps an SDXL that "
                    "needs a text."
                )
        self.unet, self.vae = place(unet.eval(), options), place(vae.eval(), exact)
        self.refiner = None if refine is None else Refinement(refine, options)
        if self.refiner is not None:
            self.pipeline, self.prompt = self.refiner.pipeline, self.refiner.settings.prompt

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Number and size of the tokens."""
        return (self.n_tokens, int(self.unet.config.cross_attention_dim))

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch

        with torch.inference_mode():
            latents = self._draw_latents(batch)
            scaled = latents / self.vae.config.scaling_factor
            values = self.vae.decode(scaled.to(self.vae.dtype)).sample.float()
        # Brighter than the 0.5 v + 0.5 of diffusers, as MindEye2 shows its images.
        images = (values * 0.8 + 0.2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return images if self.refiner is None else self.refiner.draw(images, batch)

    def _draw_latents(self, batch: HubBatch) -> Any:
        """Return denoised latents of shape (n, channels, height, width)."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        unet, options, generators = self.unet, self.options, batch.generators
        tokens = torch.from_numpy(batch.conditions)  # (n, n_tokens, n_features)
        n = len(tokens)
        device, dtype = torch.device(options.torch_device), unet.dtype
        size = options.image_size or 768
        side = size // 2 ** (len(self.vae.config.block_out_channels) - 1)  # of a latent
        shape = (n, int(unet.config.in_channels), side, side)
        noise = randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)
        shift = randn_tensor((n, 1, 1, 1), generator=generators, device=device, dtype=torch.float32)
        noise = noise + OFFSET_NOISE * shift
        # What guidance leads away from; drawn without guidance too, so that both share their noise.
        absent = randn_tensor(tuple(tokens.shape), generator=generators, device=device, dtype=torch.float32)
        start = None
        if batch.initial is not None:
            start = self._encode_initial(resize_initial(batch.initial, size))
        guided = options.guidance > 1
        context = torch.cat([absent, tokens.to(device)]) if guided else tokens.to(device)
        about_size = None
        if unet.config.addition_embed_type is not None:
            # No text, and four numbers per image: height and width, top and left of the crop.
            sizes = torch.tensor([[ORIGINAL_SIZE, ORIGINAL_SIZE, 0, 0]] * len(context), device=device)
            text = torch.zeros(len(context), 0, device=device, dtype=dtype)
            about_size = {"text_embeds": text, "time_ids": sizes.to(dtype)}

        def predict(inputs: Any, timestep: Any) -> Any:
            return unet(
                inputs.to(dtype),
                timestep,
                encoder_hidden_states=context.to(dtype),
                added_cond_kwargs=about_size,
            ).sample

        return denoise(self.scheduler, noise, options, batch, predict=predict, start=start)

    def _encode_initial(self, images: np.ndarray) -> Any:
        """Return scaled latents of float images in 0..1, at the mean of the autoencoder's posterior."""
        import torch

        values = (
            torch.from_numpy(images).permute(0, 3, 1, 2).to(self.options.torch_device, self.vae.dtype) * 2 - 1
        )
        return self.vae.encode(values).latent_dist.mode().float() * self.vae.config.scaling_factor


class Refinement:
    """SDXL, started from made images and led by a text; see `RefineConfig`.

    Parameters
    ----------
    settings
        Weights, steps and texts.
    options
        Those of the generator, for device and arithmetic.
    """

    def __init__(self, settings: RefineConfig, options: HubOptions) -> None:
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

        self.settings, self.options = settings, options
        load: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained
        self.pipeline = load_pipeline(load, settings.find_folder(), options)
        # The last step of each stretch of the schedule, as sgm's discretisation takes it.
        config = self.pipeline.scheduler.config
        self.pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
        place(self.pipeline, options)

    def draw(self, images: np.ndarray, batch: HubBatch) -> np.ndarray:
        """Return refined images, float of the shape of `images` (n, side, side, 3); the noise continues from theirs."""
        n, side, settings = len(images), images.shape[1], self.settings
        made = np.round(images * 255).astype(np.uint8)
        made = np.stack([resize_image(image, settings.start_size, settings.start_size) for image in made])
        more: dict[str, Any] = {}
        if settings.guidance > 1:
            more = {"negative_prompt": [settings.negative_prompt] * n}
        return self.pipeline(
            prompt=batch.prompts or [settings.prompt] * n, image=resize_initial(list(made), side),
            strength=settings.strength, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
            # As the notebook tells it: of images of 768 pixels, to be shown in 1024.
            original_size=(768, 768), target_size=(1024, 1024), generator=batch.generators, output_type="np", **more,
        ).images  # fmt: skip
