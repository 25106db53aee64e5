"""Generators on stock pipelines of diffusers: SDXL-Turbo with an IP-Adapter, Stable Diffusion unCLIP and Kandinsky 2.2.

Owns how each pipeline is loaded and called, and the loop that turns embeddings into images row by row reproducibly:
every row has its own noise, so that neither batch size nor neighbours change an image. SDXL-Turbo is the second stage
of ATM: the pipeline is the unchanged one of diffusers, the predicted embedding takes the place of the adapter's image
embedding, and the prompt is empty. The other two were trained on image embeddings themselves. Settings and weights are
the business of `hub_config`; a fourth pipeline, on token sequences, is in `token_unclip`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import choose_device
from braindecode_vis.generators.adapters import Adapter
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.generators.hub_config import read_parts
from braindecode_vis.seeds import derive_seed, make_torch_generator
from braindecode_vis.stimuli import resize_image

#: An image of CLIP's mean colour, uint8 of shape (224, 224, 3): rows of zeros after CLIP's normalisation.
CLIP_GREY = np.full((224, 224, 3), (123, 117, 104), np.uint8)


@dataclass(frozen=True)
class HubOptions:
    """What every pipeline is given; see `HubConfig` for each entry."""

    steps: int
    guidance: float
    image_size: int | None
    device: str = "auto"
    precision: str = "auto"

    @property
    def torch_device(self) -> str:
        """``cuda`` or ``cpu``."""
        return choose_device(self.device, setting="generator.device")

    @property
    def torch_dtype(self) -> Any:
        """Arithmetic of the networks."""
        import torch

        if self.precision == "auto":
            return torch.float16 if self.torch_device == "cuda" else torch.float32
        return getattr(torch, self.precision)


@dataclass(frozen=True)
class HubBatch:
    """What a pipeline draws at once.

    Parameters
    ----------
    conditions : float32 array of shape (n, *condition_shape)
        One row per image.
    generators
        Of the noise of each row.
    negative : float array of shape (1, *condition_shape), optional
        Embedding of the pipeline's `absent_image`, where guidance needs it.
    initial, strength
        Images that denoising starts from, if any, and the share of the schedule that is run from them.
    prompts
        Text of each row, in place of the one that is set for all.
    """

    conditions: np.ndarray
    generators: list[Any]
    negative: np.ndarray | None = None
    initial: list[np.ndarray] | None = None
    strength: float = 0.5
    prompts: list[str] | None = None


class HubPipeline(Protocol):
    """A loaded pipeline, as `HubGenerator` calls it."""

    #: Image whose embedding guidance leads away from; None where the pipeline has a way of its own.
    absent_image: np.ndarray | None

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Shape of one row that the network is conditioned on."""
        ...

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        ...


class HubGenerator:
    """A pipeline with published weights as an image generator.

    Parameters
    ----------
    data
        Its embeddings name the target space.
    load
        Returns the pipeline; called when the first image is asked for.
    options
        Steps and guidance are looked at here.
    kind
        Name of the generator in messages.
    condition_spaces
        Patterns of the spaces that the network takes as they are.
    supports_initial, supports_prompts
        Whether the pipeline can start from an image, and whether it reads texts.
    batch_size
        Rows that are drawn together; changes nothing but rounding.
    adapter
        A fitted map to the condition.

    Raises
    ------
    ConfigError
        If the condition is none that the network was trained with, as far as names tell.
    """

    def __init__(
        self,
        data: GeneratorData,
        load: Callable[[], HubPipeline],
        options: HubOptions,
        *,
        kind: str,
        condition_spaces: Sequence[str],
        supports_initial: bool = False,
        supports_prompts: bool = False,
        batch_size: int = 4,
        adapter: Adapter | None = None,
    ) -> None:
        self.kind, self.options, self.batch_size = kind, options, batch_size
        self.supports_initial, self.supports_prompts, self.adapter = (
            supports_initial,
            supports_prompts,
            adapter,
        )
        self.space = data.embeddings.space
        self.condition_space = adapter.space if adapter else self.space
        if not any(fnmatchcase(self.condition_space, pattern) for pattern in condition_spaces):
            raise ConfigError(
                f"the generator {kind!r} is conditioned on {' or '.join(condition_spaces)}, not on "
                f"{self.condition_space!r}; choose that target, set generator.adapter, or name the space in "
                "generator.condition_spaces if it is the same."
            )
        self._condition_encoder = adapter.encoder if adapter else data.image_encoder
        self._load = load
        self._pipeline: HubPipeline | None = None

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.space

    def load(self) -> HubPipeline:
        """Return the pipeline, loaded once."""
        if self._pipeline is None:
            self._pipeline = self._load()
        return self._pipeline

    def generate(
        self,
        embeddings: Embeddings,
        *,
        seed: int,
        initial: np.ndarray | None = None,
        strength: float = 0.5,
        prompts: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3).

        Parameters
        ----------
        embeddings
            In the target space.
        seed
            Every row's noise follows from it and the row's number.
        initial : uint8 array of shape (n_rows, height, width, 3), optional
            Images that denoising starts from instead of pure noise, of any size.
        strength
            Share of the schedule that is run from the initial image: 1 forgets it, small values keep it.
        prompts
            Text of each row, which leads its image besides the embedding.

        Raises
        ------
        ConfigError
            If space, size or options do not fit this generator.
        DataError
            If a prompt has more word pieces than the network reads.
        """
        pipeline = self.load()
        conditions = self._find_conditions(embeddings, pipeline.condition_shape)
        if initial is not None:
            self._check_initial(initial, len(embeddings), strength)
        if self.supports_prompts or prompts is not None:
            self._check_prompts(pipeline, embeddings.ids, prompts)
        negative = None
        if pipeline.absent_image is not None and self.options.guidance > 1:
            negative = self._condition_encoder.encode([pipeline.absent_image])
        made = []
        for start in range(0, len(conditions), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(conditions)))
            with warnings.catch_warnings():  # schedulers of diffusers hand tensors to NumPy in the old way
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                generators = [make_torch_generator(derive_seed(seed, "hub"), "row", row) for row in rows]
                starts = None if initial is None else list(initial[rows.start : rows.stop])
                part = conditions[rows.start : rows.stop]
                texts = None if prompts is None else list(prompts[rows.start : rows.stop])
                images = pipeline.draw(HubBatch(part, generators, negative, starts, strength, texts))
            made.append(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
        if not made:
            raise DataError("there is no embedding to make an image from.")
        return np.concatenate(made)

    def _find_conditions(self, embeddings: Embeddings, wanted: tuple[int, ...]) -> np.ndarray:
        if not self.accepts(embeddings.space):
            raise ConfigError(
                f"the generator {self.kind!r} was built for {self.space!r}, not {embeddings.space!r}."
            )
        rows = embeddings.vectors if self.adapter is None else self.adapter.apply(embeddings)
        if rows.shape[1:] != wanted:
            raise ConfigError(
                f"the generator {self.kind!r} is conditioned on rows of shape {wanted}, but "
                f"{self.condition_space!r} has {rows.shape[1:]}; choose the target that the weights were trained "
                "with, or set generator.adapter."
            )
        return np.ascontiguousarray(rows, dtype=np.float32)

    def _check_initial(self, initial: np.ndarray, n: int, strength: float) -> None:
        if not self.supports_initial:
            raise ConfigError(
                f"the generator {self.kind!r} takes no initial image; mix the images' pixels instead."
            )
        if len(initial) != n:
            raise DataError(f"{n} embeddings came with {len(initial)} initial images.")
        if not 0 < strength <= 1 or int(self.options.steps * strength) < 1:
            raise ConfigError(
                f"strength {strength} of {self.options.steps} steps leaves no step to run; it must lie in 0..1 and "
                "give one step."
            )

    def _check_prompts(self, pipeline: Any, ids: np.ndarray, prompts: Sequence[str] | None) -> None:
        """Refuse texts that the pipeline would ignore or cut, which diffusers does with a warning."""
        if not self.supports_prompts:
            raise ConfigError(
                f"the generator {self.kind!r} reads no text; choose sdxl_turbo or unclip, or leave the prompts out."
            )
        if prompts is None:
            check_prompts(pipeline.pipeline, {"generator.prompt": pipeline.prompt})
            return
        if len(prompts) != len(ids):
            raise DataError(f"{len(ids)} embeddings came with {len(prompts)} prompts.")
        if pipeline.prompt:
            raise ConfigError(
                f"generator.prompt is {pipeline.prompt!r}, but every trial has a prompt of its own; leave it empty."
            )
        texts = zip(ids, prompts, strict=True)
        check_prompts(
            pipeline.pipeline, {f"the prompt of row {n} ({i})": t for n, (i, t) in enumerate(texts)}
        )

    def describe(self) -> dict[str, Any]:
        """Return what the adapter chose on the training images."""
        return {} if self.adapter is None else {"adapter": self.adapter.describe()}

    def write(self, folder: Path) -> None:
        """Write the adapter, if there is one; the weights of the network are published."""
        if self.adapter is not None:
            self.adapter.write(folder)


# --- pipelines ------------------------------------------------------------------------------------------


class SdxlTurbo:
    """SDXL-Turbo led by an image embedding through an IP-Adapter.

    With an initial image the image-to-image pipeline runs on the same networks, as in ATM's low-level branch.

    Parameters
    ----------
    folder, adapter
        The pipeline, and the adapter's safetensors file.
    options
        Steps, guidance and arithmetic.
    scale
        Weight of the adapter's cross-attention.
    prompt
        Text that leads the image besides the embedding.
    """

    absent_image = None

    def __init__(
        self, folder: Path, adapter: Path, options: HubOptions, *, scale: float, prompt: str
    ) -> None:
        from diffusers import StableDiffusionXLPipeline
        from diffusers.utils import logging
        from safetensors import SafetensorError

        self.options, self.prompt, self.adapter = options, prompt, adapter
        self.pipeline = load_pipeline(StableDiffusionXLPipeline.from_pretrained, folder, options)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # that the adapter's image encoder is not loaded is meant
        try:
            self.pipeline.load_ip_adapter(
                str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None,
                local_files_only=True,
            )  # fmt: skip
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{adapter} is no IP-Adapter for {folder} ({first}); bring ip-adapter_sdxl_vit-h.safetensors."
            ) from error
        finally:
            logging.set_verbosity(level)
        self.pipeline.set_ip_adapter_scale(scale)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Size of the adapter's image embedding."""
        from diffusers.models.embeddings import ImageProjection

        layer = self.pipeline.unet.encoder_hid_proj.image_projection_layers[0]
        if not isinstance(layer, ImageProjection):
            raise ConfigError(
                f"{self.adapter} has a {type(layer).__name__}, which takes hidden states and no embedding; bring "
                "ip-adapter_sdxl_vit-h.safetensors."
            )
        return (int(layer.image_embeds.in_features),)

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch
        from diffusers import StableDiffusionXLImg2ImgPipeline

        pipeline: Any = self.pipeline
        n = len(batch.conditions)
        # (n, 1, n_features): one image per prompt
        embeds = torch.from_numpy(batch.conditions)[:, None].to(pipeline.device, pipeline.unet.dtype)
        if self.options.guidance > 1:  # the adapter was trained with zeros as its absent image
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        side = self.options.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        more: dict[str, Any] = {"height": side, "width": side}
        if batch.initial is not None:
            kind: Any = StableDiffusionXLImg2ImgPipeline
            pipeline = kind(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            more = {"image": resize_initial(batch.initial, side), "strength": batch.strength}
        # Given embeddings, diffusers repeats them all for every prompt, which suits one image only; here each prompt
        # of the batch has its own.
        pipeline.prepare_ip_adapter_image_embeds = lambda *args, **kwargs: [embeds]
        try:
            made = pipeline(
                prompt=batch.prompts or [self.prompt] * n, ip_adapter_image_embeds=[embeds],
                num_inference_steps=self.options.steps, guidance_scale=self.options.guidance,
                generator=batch.generators, output_type="np", **more,
            )  # fmt: skip
        finally:
            del pipeline.prepare_ip_adapter_image_embeds
        return made.images


class StableUnclip:
    """Stable Diffusion 2.1 unCLIP.

    Parameters
    ----------
    folder
        The pipeline.
    options
        Steps, guidance and arithmetic.
    noise_level
        Noise on the embedding, a step of the pipeline's own schedule.
    prompt
        Text that leads the image besides the embedding.
    """

    absent_image = None

    def __init__(self, folder: Path, options: HubOptions, *, noise_level: int, prompt: str) -> None:
        from diffusers import StableUnCLIPImg2ImgPipeline

        self.options, self.noise_level, self.prompt = options, noise_level, prompt
        self.pipeline = load_pipeline(StableUnCLIPImg2ImgPipeline.from_pretrained, folder, options)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Size of the embedding; the network sees it beside its noise level of equal size."""
        return (int(self.pipeline.unet.config.projection_class_embeddings_input_dim) // 2,)

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3); initial images are not taken."""
        import torch

        pipeline, side = self.pipeline, self.options.image_size
        return pipeline(
            prompt=batch.prompts or [self.prompt] * len(batch.conditions),
            image_embeds=torch.from_numpy(batch.conditions).to(pipeline.device, pipeline.unet.dtype),
            noise_level=self.noise_level, num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance, height=side, width=side, generator=batch.generators,
            output_type="np",
        ).images  # fmt: skip


class Kandinsky:
    """The decoder of Kandinsky 2.2, whose guidance leads away from the embedding of a grey image.

    Parameters
    ----------
    folder
        The pipeline.
    options
        Steps, guidance and arithmetic.
    """

    absent_image = CLIP_GREY

    def __init__(self, folder: Path, options: HubOptions) -> None:
        from diffusers import KandinskyV22Pipeline

        self.options = options
        self.pipeline = load_pipeline(KandinskyV22Pipeline.from_pretrained, folder, options)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Size of the embedding."""
        return (int(self.pipeline.unet.config.encoder_hid_dim),)

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch
        from diffusers import KandinskyV22Img2ImgPipeline

        pipeline: Any = self.pipeline
        side = self.options.image_size or 512

        def move(rows: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(rows)).to(pipeline.device, pipeline.unet.dtype)

        more: dict[str, Any] = {}
        if batch.initial is not None:
            kind: Any = KandinskyV22Img2ImgPipeline
            pipeline = kind(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            # As PIL images, whose range no version of the pipeline mistakes.
            more = {
                "image": pipeline.numpy_to_pil(resize_initial(batch.initial, side)),
                "strength": batch.strength,
            }
        n, absent = len(batch.conditions), batch.negative
        absent = np.zeros_like(batch.conditions) if absent is None else np.repeat(absent, n, axis=0)
        return pipeline(
            image_embeds=move(batch.conditions), negative_image_embeds=move(absent),
            num_inference_steps=self.options.steps, guidance_scale=self.options.guidance, height=side,
            width=side, generator=batch.generators, output_type="np", **more,
        ).images  # fmt: skip


def check_prompts(pipeline: Any, prompts: Mapping[str, str]) -> None:
    """Raise `DataError` if a text has more word pieces than a text encoder of a pipeline of diffusers reads.

    Parameters
    ----------
    pipeline
        Of diffusers.
    prompts
        Texts by what they are called in the message.
    """
    for number in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        if tokenizer is None:
            continue
        # Some folders say no length of the tokenizer's; the positions of its network bound it then.
        positions = getattr(pipeline, f"text_encoder{number}").config.max_position_embeddings
        window = min(int(tokenizer.model_max_length), int(positions))
        for name, text in prompts.items():
            if (length := len(tokenizer(text, truncation=False).input_ids)) > window:
                raise DataError(
                    f"{name} has {length} word pieces, start and end included, and the text encoder reads {window}; "
                    f"shorten it: {text[:60]!r}."
                )


def load_pipeline(make: Callable[..., Any], folder: Path, options: HubOptions) -> Any:
    """Return a pipeline or network of diffusers from a folder, quiet and on its device.

    Only safetensors are read, and no file is fetched.

    Raises
    ------
    DataError
        If the folder does not hold it.
    """
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    _refuse_other_libraries(folder)
    try:
        with warnings.catch_warnings():  # the option's old name is the one that all supported versions know
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            loaded: Any = make(
                str(folder), torch_dtype=options.torch_dtype, local_files_only=True, use_safetensors=True,
                variant=_find_variant(folder),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        owner: Any = getattr(make, "__self__", make)  # the class whose `from_pretrained` it is
        raise DataError(
            f"{folder} cannot be read as {owner.__name__} ({first}); copy the whole folder."
        ) from error
    whole: Any = DiffusionPipeline
    if isinstance(loaded, whole):  # and not one network of it
        loaded.set_progress_bar_config(disable=True)
    return loaded.to(options.torch_device)


def _find_variant(folder: Path) -> str | None:
    """Return ``fp16`` where a folder holds weights in half precision alone, as SDXL-Turbo is fetched."""
    names = [path.name for path in folder.rglob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _refuse_other_libraries(folder: Path) -> None:
    """Raise `DataError` if the index of a pipeline names modules that diffusers would import."""
    from diffusers import pipelines

    for name, library in read_parts(folder).items():
        if library not in ("diffusers", "transformers") and not hasattr(pipelines, library):
            raise DataError(
                f"{folder / 'model_index.json'} asks for code of the module {library!r} ({name}), which is not run; "
                "bring a folder whose parts are those of diffusers and transformers."
            )


def resize_initial(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Return initial images as floats in 0..1 of shape (n, side, side, 3)."""
    return np.stack([resize_image(image, side, side) for image in images]).astype(np.float32) / 255
