"""Generators on stock pipelines of diffusers: SDXL-Turbo and Stable Diffusion with an IP-Adapter.

Owns how each pipeline is loaded and called, and the loop that turns embeddings into images row by row reproducibly:
every row has its own noise, so that neither batch size nor neighbours change an image. SDXL-Turbo is the second stage
of ATM: the pipeline is the unchanged one of diffusers, the predicted embedding takes the place of the adapter's image
embedding, and the prompt is empty. Stable Diffusion 1.5 takes tokens of an image in the same way, and tokens of a text
in the place of a prompt. The other two were trained on image embeddings themselves. Settings and weights are the
business of `hub_config`; pipelines that diffusers does not have as they are needed here are in `token_unclip` and
`versatile_diffusion`.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, check_installed
from braindecode_vis.base.contracts import ImageGenerator
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.memory import find_memory, is_out_of_memory
from braindecode_vis.base.seeds import derive_seed, make_torch_generator
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.generation.adapters import Adapter
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.priors.sampling import guide

MOST_AT_ONCE = 16  # images; larger batches are hardly faster
#: An image of CLIP's mean colour, uint8 of shape (224, 224, 3): rows of zeros after CLIP's normalisation.
CLIP_GREY = np.full((224, 224, 3), (123, 117, 104), np.uint8)
#: Images that are asked for at a time where memory decides how many of them are drawn at once.
AUTO_ROWS = 16


@dataclass(frozen=True)
class HubOptions:
    """What every pipeline is given; see `HubConfig` for each entry."""

    steps: int
    guidance: float
    image_size: int | None
    device: str = "auto"
    precision: str = "auto"
    offload: str = "none"

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
    texts, absent_text : float arrays of shape (n, *text_shape) and (1, *text_shape), optional
        Tokens of a text of each row, and those that guidance leads away from.
    """

    conditions: np.ndarray
    generators: list[Any]
    negative: np.ndarray | None = None
    initial: list[np.ndarray] | None = None
    strength: float = 0.5
    prompts: list[str] | None = None
    texts: np.ndarray | None = None
    absent_text: np.ndarray | None = None


class HubPipeline(Protocol):
    """A loaded pipeline, as `HubGenerator` calls it."""

    #: Image whose embedding guidance leads away from; None if the pipeline has a way of its own.
    absent_image: np.ndarray | None

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Shape of one row that the network is conditioned on."""
        ...

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        ...


class HubGenerator(ImageGenerator):
    """A pipeline with published weights as an image generator.

    Parameters
    ----------
    data
        Its embeddings name the target space.
    config
        A `HubConfig`: its kind, the spaces that its network takes, what it supports, and how the pipeline is loaded
        and run. It is loaded when the first image is asked for.
    adapter
        A fitted map to the condition.

    Raises
    ------
    ConfigError
        If the condition is none that the network was trained with, as far as names show.
    """

    def __init__(self, data: GeneratorData, config: Any, adapter: Adapter | None = None) -> None:
        kind, condition_spaces = str(type(config).model_fields["kind"].default), config.condition_spaces
        self.kind, self.options, self.batch_size = kind, config.options, config.batch_size
        self.supports_initial, self.supports_prompts = config.supports_initial, config.supports_prompts
        self.adapter, text_spaces = adapter, config.text_spaces
        self.space = data.embeddings.space
        self.condition_space = adapter.space if adapter else self.space
        if not any(fnmatchcase(self.condition_space, pattern) for pattern in condition_spaces):
            raise ConfigError(
                f"the generator {kind!r} is conditioned on {' or '.join(condition_spaces)}, not on "
                f"{self.condition_space!r}; choose this target, set generator.adapter, or name the space in "
                "generator.condition_spaces if it is the same."
            )
        self._condition_encoder = adapter.encoder if adapter else data.image_encoder
        self._text_encoder, self.needs_texts = data.text_encoder, config.needs_texts
        self.text_space = None if data.texts is None else data.texts.space
        if self.text_space is not None and not any(fnmatchcase(self.text_space, p) for p in text_spaces):
            wanted = " or ".join(text_spaces) or "no text"
            raise ConfigError(
                f"the generator {kind!r} takes {wanted}, not tokens of {self.text_space!r}; correct "
                "reconstruction.text.target (output hidden for Stable Diffusion, projected for Versatile Diffusion)."
            )
        self._load: Callable[[], HubPipeline] = config.load
        self._pipeline: HubPipeline | None = None
        self._negative: np.ndarray | None = None  # what guidance leads away from, encoded once
        self._absent_text: np.ndarray | None = None
        self._size: int | None = None  # of a batch, once it is known what fits

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.space

    @property
    def rows_at_once(self) -> int:  # type: ignore[override]
        """A batch: what is finished when a process is killed is known by batches."""
        return AUTO_ROWS if self.batch_size == "auto" else self.batch_size

    @property
    def image_size(self) -> tuple[int, int] | None:  # type: ignore[override]
        """Height and width, where the settings name them."""
        side = self.options.image_size
        return None if side is None else (side, side)

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
        first_row: int = 0,
        initial: np.ndarray | None = None,
        strength: float = 0.5,
        prompts: Sequence[str] | None = None,
        texts: Embeddings | None = None,
    ) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3).

        Parameters
        ----------
        embeddings
            In the target space.
        seed
            Every row's noise follows from it and the row's number.
        first_row
            Number of the first row, where these are a part of many.
        initial : uint8 array of shape (n_rows, height, width, 3), optional
            Images that denoising starts from instead of pure noise, of any size.
        strength
            Share of the schedule that is run from the initial image: 1 forgets it, small values keep it.
        prompts
            Text of each row, which leads its image besides the embedding.
        texts
            Tokens of a text of each row, which take the place of a prompt.

        Raises
        ------
        ConfigError
            If space, size or options do not fit this generator.
        DataError
            If a prompt has more word pieces than the network reads, or an image comes out black or not finite.
        """
        pipeline = self.load()
        conditions = self._find_conditions(embeddings, pipeline.condition_shape)
        if initial is not None:
            self._check_initial(initial, len(embeddings), strength)
        if self.supports_prompts or prompts is not None:
            self._check_prompts(pipeline, embeddings.ids, prompts)
        self._check_texts(pipeline, texts, len(embeddings))
        if self._negative is None and pipeline.absent_image is not None and self.options.guidance > 1:
            self._negative = self._condition_encoder.encode([pipeline.absent_image])
        if self._absent_text is None and texts is not None and self.options.guidance > 1:
            self._absent_text = self._text_encoder.encode_texts([""])
        if self._size is None:
            auto = self.batch_size == "auto"
            self._size = choose_batch_size(pipeline, self.options) if auto else int(self.batch_size)
        made: list[np.ndarray] = []
        start = 0
        while start < len(conditions):
            rows = range(start, min(start + self._size, len(conditions)))
            with warnings.catch_warnings():  # schedulers of diffusers hand tensors to NumPy in the old way
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                generators = [
                    make_torch_generator(derive_seed(seed, "hub"), "row", first_row + row) for row in rows
                ]
                starts = None if initial is None else list(initial[rows.start : rows.stop])
                part = conditions[rows.start : rows.stop]
                led = None if prompts is None else list(prompts[rows.start : rows.stop])
                tokens = (
                    None if texts is None else np.asarray(texts.vectors[rows.start : rows.stop], np.float32)
                )
                absent = None if texts is None else self._absent_text
                batch = HubBatch(part, generators, self._negative, starts, strength, led, tokens, absent)
                try:
                    images = pipeline.draw(batch)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._size = self._shrink(len(part), error)  # the same rows again, fewer at once
                    continue
            self._check_images(images, embeddings.ids[rows.start : rows.stop], first_row + start)
            made.append(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
            start = rows.stop
        if not made:
            raise DataError("there is no embedding from which to make an image.")
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
                f"strength {strength} of {self.options.steps} steps leaves no step to run; it must be "
                "between 0 and 1 and give at least one step."
            )

    def _check_texts(self, pipeline: Any, texts: Embeddings | None, n: int) -> None:
        if texts is None:
            if self.needs_texts:
                raise ConfigError(
                    f"the generator {self.kind!r} also needs tokens of a text, but got none; set reconstruction.text."
                )
            return
        if self.text_space is None or texts.space != self.text_space:
            raise ConfigError(
                f"the generator {self.kind!r} was built for {self.text_space or 'no text'}, not for tokens of "
                f"{texts.space!r}."
            )
        wanted = pipeline.text_shape
        if texts.vectors.shape != (n, *wanted):
            raise ConfigError(
                f"the generator {self.kind!r} takes tokens of shape {(n, *wanted)}, but {texts.space!r} gave "
                f"{texts.vectors.shape}; choose the text tower that the network was trained with."
            )

    def _shrink(self, size: int, error: BaseException) -> int:
        """Return a smaller size of a batch after one that did not fit, or say what else would help."""
        if self.batch_size == "auto" and size > 1:
            return size // 2
        raise ConfigError(
            f"{size} image(s) of the generator {self.kind!r} together do not fit into the memory "
            f"({str(error).strip().splitlines()[0][:100]}); set generator.batch_size to auto or less, "
            "or generator.offload to model or sequential."
        ) from error

    def _check_images(self, images: np.ndarray, ids: np.ndarray, start: int) -> None:
        """Refuse images that are not what the network has drawn, by the name of their trial."""
        for number, image in enumerate(images):
            trial = f"row {start + number} ({ids[number]})"
            if not np.isfinite(image).all():
                raise DataError(
                    f"the generator {self.kind!r} gave an image of {trial} that is not finite: its latents overflowed "
                    f"in {str(self.options.torch_dtype).removeprefix('torch.')}; set generator.precision to bfloat16 "
                    "or float32."
                )
            if image.max() <= 0:
                raise DataError(
                    f"the generator {self.kind!r} gave a black image of {trial}: a safety checker "
                    "replaced it, or its latents overflowed; use a folder without a safety checker, or "
                    "set generator.precision to "
                    "float32."
                )

    def _check_prompts(self, pipeline: Any, ids: np.ndarray, prompts: Sequence[str] | None) -> None:
        """Refuse texts that the pipeline would ignore or cut, which diffusers does with a warning."""
        if not self.supports_prompts:
            raise ConfigError(
                f"the generator {self.kind!r} reads no text; choose sdxl_turbo, sd_ip_adapter or token_unclip (with "
                "refine), or leave the prompts out."
            )
        if prompts is None:
            check_prompts(pipeline.pipeline, {"generator.prompt": pipeline.prompt})
            return
        if len(prompts) != len(ids):
            raise DataError(f"{len(ids)} embeddings came with {len(prompts)} prompts.")
        if pipeline.prompt:
            raise ConfigError(
                f"generator.prompt is {pipeline.prompt!r}, but every trial has its own prompt; leave "
                "generator.prompt empty."
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


#: Pipelines that take an IP-Adapter: from noise, and from an image on the same networks.
ADAPTED = {
    "sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "sd": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
}


class AdaptedDiffusion:
    """Stable Diffusion led by an image through an IP-Adapter, and by a prompt or by tokens of a text.

    With an initial image the image-to-image pipeline runs on the same networks, as in ATM's low-level branch.

    Parameters
    ----------
    folder, adapter
        The pipeline, and the adapter's safetensors file.
    options
        Steps, guidance and arithmetic.
    family
        A key of `ADAPTED`. Of Stable Diffusion 1 the safety checker is not loaded, which would black out images, and
        the schedule is that of DDIM.
    scale, text_scale
        Weights of the cross-attentions to the image and to the text; the adapter was trained with 1 and 1.
    prompt
        Text that guides the image in addition to the embedding.
    n_tokens
        Of an image, for adapters of tokens; None takes adapters of one embedding alone.
    """

    def __init__(
        self,
        folder: Path,
        adapter: Path,
        options: HubOptions,
        *,
        family: Literal["sdxl", "sd"],
        scale: float,
        prompt: str,
        text_scale: float = 1.0,
        n_tokens: int | None = None,
    ) -> None:
        import diffusers
        import torch
        from diffusers.utils import logging
        from safetensors import SafetensorError

        self.options, self.prompt, self.adapter, self.n_tokens = options, prompt, adapter, n_tokens
        own, self._from_image = (getattr(diffusers, name) for name in ADAPTED[family])
        more = {"safety_checker": None, "requires_safety_checker": False} if family == "sd" else {}
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # that no safety checker and no image encoder are loaded is meant
        try:
            self.pipeline = load_pipeline(own.from_pretrained, folder, options, **more)
            if family == "sd":
                settings = self.pipeline.scheduler.config
                self.pipeline.scheduler = diffusers.DDIMScheduler.from_config(settings, clip_sample=False)
            self.pipeline.load_ip_adapter(
                str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None,
                local_files_only=True,
            )  # fmt: skip
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            wanted = "ip-adapter_sdxl_vit-h" if family == "sdxl" else "ip-adapter-plus_sd15"
            raise DataError(
                f"{adapter} is no IP-Adapter for {folder} ({first}); use {wanted}.safetensors."
            ) from error
        finally:
            logging.set_verbosity(level)
        self.pipeline.set_ip_adapter_scale(scale)
        if text_scale != 1:
            # The values of a text pass this one matrix, without a bias, so that its attention is scaled with them.
            with torch.no_grad():
                for name, module in self.pipeline.unet.named_modules():
                    if name.endswith("attn2"):
                        module.to_v.weight.mul_(text_scale)
        place(self.pipeline, options)

    @property
    def absent_image(self) -> np.ndarray | None:
        """Adapters of tokens were trained with those of a grey image as absent, those of an embedding with zeros."""
        return CLIP_GREY if len(self.condition_shape) == 2 else None

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Size of the adapter's image embedding, or number and size of its tokens."""
        from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection

        layer = self.pipeline.unet.encoder_hid_proj.image_projection_layers[0]
        if isinstance(layer, IPAdapterPlusImageProjection) and self.n_tokens is not None:
            return (self.n_tokens, int(layer.proj_in.in_features))
        if not isinstance(layer, ImageProjection):
            raise ConfigError(
                f"{self.adapter} has a {type(layer).__name__}, which takes hidden states, not an "
                "embedding; use ip-adapter_sdxl_vit-h.safetensors."
            )
        return (int(layer.image_embeds.in_features),)

    @property
    def text_shape(self) -> tuple[int, ...]:
        """Number and size of the tokens of a text."""
        config = self.pipeline.text_encoder.config
        return (int(config.max_position_embeddings), int(config.hidden_size))

    def draw(self, batch: HubBatch) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3)."""
        import torch

        pipeline: Any = self.pipeline
        n, guided = len(batch.conditions), self.options.guidance > 1

        def move(rows: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(rows)).to(
                self.options.torch_device, pipeline.unet.dtype
            )

        # (n, 1, *condition_shape): one image per prompt
        embeds = move(batch.conditions)[:, None]
        if guided:
            absent = np.zeros_like(batch.conditions[:1]) if batch.negative is None else batch.negative
            embeds = torch.cat([move(np.repeat(absent, n, axis=0))[:, None], embeds])
        side = self.options.image_size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        more: dict[str, Any] = {"height": side, "width": side}
        if batch.initial is not None:
            check_scheduler(pipeline.scheduler, ("add_noise",), "a start from an image")
            pipeline = self._from_image(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
            if self.options.offload != "none":
                place(pipeline, self.options)
            more = {"image": resize_initial(batch.initial, side), "strength": batch.strength}
        if batch.texts is None:
            more["prompt"] = batch.prompts or [self.prompt] * n
        else:
            more["prompt_embeds"] = move(batch.texts)
            if guided and batch.absent_text is not None:
                more["negative_prompt_embeds"] = move(np.repeat(batch.absent_text, n, axis=0))
        # Given embeddings, diffusers repeats them all for every prompt, which suits one image only; here each prompt
        # of the batch has its own.
        pipeline.prepare_ip_adapter_image_embeds = lambda *args, **kwargs: [embeds]
        try:
            made = pipeline(
                ip_adapter_image_embeds=[embeds], num_inference_steps=self.options.steps,
                guidance_scale=self.options.guidance, generator=batch.generators, output_type="np", **more,
            )  # fmt: skip
        finally:
            del pipeline.prepare_ip_adapter_image_embeds
        return made.images


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
                    f"{name} has {length} word pieces, start and end included, but the text encoder "
                    f"reads only {window}; shorten it: {text[:60]!r}."
                )


def load_pipeline(make: Callable[..., Any], folder: Path, options: HubOptions, **more: Any) -> Any:
    """Return a pipeline or network of diffusers from a folder, quiet and on the CPU; `place` moves it.

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
                variant=_find_variant(folder), **more,
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
    return loaded


def place(loaded: Any, options: HubOptions) -> Any:
    """Return a pipeline or network of diffusers on its device, or with the offload that was asked for.

    Parameters
    ----------
    loaded
        A pipeline, or one network of it.
    options
        Where it runs, and how it saves memory.

    Raises
    ------
    ConfigError
        If it has no part that an option speaks of, or nothing that it could be moved from.
    """
    device = options.torch_device
    if options.offload == "none":
        return loaded.to(device)
    check_offload(options.offload, device)
    import accelerate

    if hasattr(loaded, f"enable_{options.offload}_cpu_offload"):
        getattr(loaded, f"enable_{options.offload}_cpu_offload")(device=device)
    elif options.offload == "sequential":
        accelerate.cpu_offload(loaded, device)
    else:
        accelerate.cpu_offload_with_hook(loaded, device)
    return loaded


def read_scheduler(folder: Path, kind: Any = None) -> Any:
    """Return the scheduler that a folder describes in ``scheduler/``.

    Parameters
    ----------
    folder
        Of a pipeline.
    kind
        Class to make of the settings; None takes the one that they name.

    Raises
    ------
    DataError
        If the settings are damaged, or name a scheduler without the methods that are needed here.
    """
    import diffusers

    about = folder / "scheduler" / "scheduler_config.json"
    try:
        settings = json.loads(about.read_text(encoding="utf-8"))
        # Latents are not images in -1..1, though DDIM cuts them so unless it is told.
        settings |= {} if kind is None else {"clip_sample": False}
        scheduler = (kind or getattr(diffusers, settings["_class_name"])).from_config(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{about} does not describe a scheduler ({type(error).__name__}); copy the whole folder again."
        ) from error
    check_scheduler(scheduler, ("set_timesteps", "scale_model_input", "step"), "denoising")
    return scheduler


def denoise(
    scheduler: Any,
    noise: Any,
    options: HubOptions,
    batch: HubBatch,
    *,
    predict: Callable[[Any, Any], Any],
    start: Any = None,
) -> Any:
    """Return denoised latents of shape (n, channels, height, width).

    Parameters
    ----------
    scheduler
        Of diffusers.
    noise : float tensor of shape (n, channels, height, width)
        Of unit variance.
    options
        Steps and guidance.
    batch
        Its generators, and its strength with `start`.
    predict
        What the network says of scaled latents at a timestep. With guidance, of twice as many: without the condition
        first.
    start
        Latents of initial images; None starts from the noise.
    """
    import torch

    scheduler.set_timesteps(options.steps, device=noise.device)
    timesteps, guided = scheduler.timesteps, options.guidance > 1
    if start is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        check_scheduler(scheduler, ("add_noise",), "a start from an image")
        first = len(timesteps) - int(options.steps * batch.strength) * scheduler.order
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):  # not all of diffusers' schedulers know it
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(start, noise, timesteps[:1].repeat(len(noise)))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    for timestep in timesteps:
        output = predict(
            scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep), timestep
        ).float()
        if guided:
            without, with_condition = output.chunk(2)
            output = guide(with_condition, without, options.guidance)
        more = {"generator": batch.generators} if takes_generator else {}
        latents = scheduler.step(output, timestep, latents, **more).prev_sample
    return latents


def check_offload(offload: str, device: str) -> None:
    """Raise `ConfigError` if networks are to wait in the CPU's memory for a GPU that is not there."""
    if offload == "none":
        return
    if device == "cpu":
        raise ConfigError(
            f"generator.offload is {offload}, which moves networks to a GPU and back, but there is no "
            "GPU here (device cpu); leave it out."
        )
    check_installed("accelerate", "generator.offload")


def check_scheduler(scheduler: Any, methods: Sequence[str], what: str) -> None:
    """Raise `DataError` if a scheduler of diffusers lacks a method that is needed."""
    if lacking := [name for name in methods if not callable(getattr(scheduler, name, None))]:
        raise DataError(
            f"the scheduler {type(scheduler).__name__} has no {lacking[0]}, which {what} needs; put the "
            "settings of another scheduler (DDIMScheduler, EulerDiscreteScheduler) into "
            "scheduler/scheduler_config.json."
        )


def choose_batch_size(pipeline: Any, options: HubOptions) -> int:
    """Return how many images are drawn at once: a guess from the free memory, which is halved where it does not fit.

    Parameters
    ----------
    pipeline
        Already in its place.
    options
        Size and arithmetic of the images.
    """
    import torch

    side = options.image_size or 768
    # The decoder's widest feature map at full resolution, 256 channels, four times.
    each = 4 * 256 * side**2 * torch.finfo(options.torch_dtype).bits / 8
    if options.torch_device == "cuda":
        free = float(torch.cuda.mem_get_info()[0])
    else:
        limit = find_memory()
        free = limit.free if limit is not None else 0.0
    return int(min(max(0.8 * free // each, 1), MOST_AT_ONCE))


def _find_variant(folder: Path) -> str | None:
    """Return ``fp16`` where a folder holds weights in half precision alone, as SDXL-Turbo is fetched."""
    names = [path.name for path in folder.rglob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def read_parts(folder: Path) -> dict[str, str]:
    """Return the library of each part that the index of a pipeline lists; nothing where there is no such index."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return {}
    entries = index.items() if isinstance(index, dict) else ()
    return {name: str(entry[0]) for name, entry in entries if isinstance(entry, list) and entry and entry[0]}


def _refuse_other_libraries(folder: Path) -> None:
    """Raise `DataError` if the index of a pipeline names modules that diffusers would import."""
    from diffusers import pipelines

    for name, library in read_parts(folder).items():
        if library not in ("diffusers", "transformers") and not hasattr(pipelines, library):
            raise DataError(
                f"{folder / 'model_index.json'} needs code of the module {library!r} ({name}), which is "
                "not allowed; use a folder with parts of diffusers and transformers only."
            )


def resize_initial(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Return initial images as floats in 0..1 of shape (n, side, side, 3)."""
    return np.stack([resize_image(image, side, side) for image in images]).astype(np.float32) / 255
