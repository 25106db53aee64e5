"""What generators with published weights share: folder or hub by consent, space and size of the condition, batches.

Owns the settings of all of them, finding their folders, and the loop that turns embeddings into images row by row
reproducibly: every row has its own noise, so that neither batch size nor neighbours change an image. Which pipeline of
diffusers is loaded and how it is called is each kind's business. Nothing is downloaded unless that was allowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import choose_device
from braindecode_vis.generators.adapters import Adapter, AdapterConfig
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.seeds import derive_seed, make_torch_generator
from braindecode_vis.settings import Settings
from braindecode_vis.stimuli import resize_image
from braindecode_vis.store import hash_json, hash_sampled


class HubConfig(Settings):
    """Settings of every generator with published weights.

    Parameters
    ----------
    weights
        Folder of the pipeline in the format of diffusers, as `save_pretrained` writes it. None needs `allow_download`.
    allow_download
        Fetch the published folder from the hub.
    condition_spaces
        Patterns (``*`` stands for anything) of the spaces whose embeddings the network takes as they are. Embeddings of
        another space need an adapter; of the right space but another size, they are refused.
    adapter
        Maps another target space to the condition, fitted on training images; see `adapters`.
    steps, guidance
        Denoising steps, and scale of classifier-free guidance (1 and below: none).
    image_size
        Side of the images, pixels; None takes the network's own.
    precision
        ``auto`` is half precision on a GPU and single precision on a CPU.
    batch_size, device
        How it runs, not what it computes.
    """

    weights: Path | None = None
    allow_download: bool = False
    condition_spaces: tuple[str, ...] = ()
    adapter: AdapterConfig | None = None
    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    image_size: int | None = Field(default=None, ge=8, multiple_of=8)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(default=4, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    repository: ClassVar[str] = ""
    supports_initial: ClassVar[bool] = False
    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "allow_download", "batch_size", "device"})

    def accepts(self, target_kind: str) -> bool:
        """Say whether a target of this kind may do; its space is checked when the generator is built."""
        return self.adapter is not None or target_kind in ("openclip", "transformers", "views", "imported")

    def find_folder(self) -> Path:
        """Return the folder of the pipeline."""
        kind = type(self).model_fields["kind"].default
        return find_folder(self.weights, self.allow_download, self.repository, f"generator {kind}")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_digest": digest_folder(self.find_folder())}

    def load(self) -> Any:
        """Return the pipeline on its device."""
        raise NotImplementedError

    def find_condition_shape(self, pipeline: Any) -> tuple[int, ...]:
        """Return the shape of one row that the pipeline is conditioned on."""
        raise NotImplementedError

    def draw(self, pipeline: Any, conditions: np.ndarray, **how: Any) -> np.ndarray:
        """Return float images in 0..1 of shape (n, height, width, 3); see `HubGenerator.generate`."""
        raise NotImplementedError

    def make_negative(self, encoder: Any) -> np.ndarray | None:
        """Return the condition that guidance leads away from, where the image encoder must give it."""
        return None

    def build(self, data: GeneratorData) -> HubGenerator:
        """Return the generator, its adapter fitted on the training data."""
        return HubGenerator(self, data)

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


class HubGenerator:
    """A stock pipeline as an image generator.

    Parameters
    ----------
    config
        One of the kinds with published weights.
    data
        Its embeddings name the target space; an adapter is fitted on it.
    """

    def __init__(self, config: HubConfig, data: GeneratorData) -> None:
        self.config = config
        self.space = data.embeddings.space
        self.adapter: Adapter | None = None
        if config.adapter is not None:
            self.adapter = config.adapter.fit(data)
        check_space(self._condition_space, config)
        self._condition_encoder = self.adapter.encoder if self.adapter else data.image_encoder
        self._pipeline: Any = None

    @property
    def _condition_space(self) -> str:
        return self.adapter.space if self.adapter else self.space

    @property
    def supports_initial(self) -> bool:
        """Whether `generate` takes initial images."""
        return self.config.supports_initial

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.space

    def load(self) -> Any:
        """Return the pipeline, loaded once."""
        if self._pipeline is None:
            self._pipeline = self.config.load()
        return self._pipeline

    def generate(
        self,
        embeddings: Embeddings,
        *,
        seed: int,
        initial: np.ndarray | None = None,
        strength: float = 0.5,
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

        Raises
        ------
        ConfigError
            If space, size or options do not fit this generator.
        """
        config, pipeline = self.config, self.load()
        conditions = self._find_conditions(embeddings, config.find_condition_shape(pipeline))
        if initial is not None:
            _check_initial(config, initial, len(embeddings), strength)
        negative = config.make_negative(self._condition_encoder) if config.guidance > 1 else None
        made = []
        for start in range(0, len(conditions), config.batch_size):
            rows = range(start, min(start + config.batch_size, len(conditions)))
            with warnings.catch_warnings():  # schedulers of diffusers hand tensors to NumPy in the old way
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                images = config.draw(
                    pipeline, conditions[rows.start : rows.stop],
                    generators=[make_torch_generator(derive_seed(seed, "hub"), "row", row) for row in rows],
                    initial=None if initial is None else list(initial[rows.start : rows.stop]),
                    strength=strength, negative=negative,
                )  # fmt: skip
            made.append(np.round(np.clip(images, 0, 1) * 255).astype(np.uint8))
        if not made:
            raise DataError("there is no embedding to make an image from.")
        return np.concatenate(made)

    def _find_conditions(self, embeddings: Embeddings, wanted: tuple[int, ...]) -> np.ndarray:
        if not self.accepts(embeddings.space):
            raise ConfigError(
                f"the generator {self.config.kind!r} was built for {self.space!r}, not {embeddings.space!r}."  # type: ignore[attr-defined]
            )
        rows = embeddings.vectors if self.adapter is None else self.adapter.apply(embeddings)
        if rows.shape[1:] != wanted:
            raise ConfigError(
                f"the generator {self.config.kind!r} is conditioned on rows of shape {wanted}, but "  # type: ignore[attr-defined]
                f"{self._condition_space!r} has {rows.shape[1:]}; choose the target that the weights were trained "
                "with, or set generator.adapter."
            )
        return np.ascontiguousarray(rows, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """Return what the adapter chose on the training images."""
        return {} if self.adapter is None else {"adapter": self.adapter.describe()}


def _check_initial(config: HubConfig, initial: np.ndarray, n: int, strength: float) -> None:
    kind = type(config).model_fields["kind"].default
    if not config.supports_initial:
        raise ConfigError(f"the generator {kind!r} takes no initial image; mix the images' pixels instead.")
    if len(initial) != n:
        raise DataError(f"{n} embeddings came with {len(initial)} initial images.")
    if not 0 < strength <= 1 or int(config.steps * strength) < 1:
        raise ConfigError(
            f"strength {strength} of {config.steps} steps leaves no step to run; it must lie in 0..1 and give one step."
        )


def check_space(space: str, config: HubConfig) -> None:
    """Raise `ConfigError` unless embeddings of `space` are what the network was trained with, as far as names tell."""
    if any(fnmatchcase(space, pattern) for pattern in config.condition_spaces):
        return
    kind = type(config).model_fields["kind"].default
    raise ConfigError(
        f"the generator {kind!r} is conditioned on {' or '.join(config.condition_spaces)}, not on {space!r}; choose "
        "that target, set generator.adapter, or name the space in generator.condition_spaces if it is the same."
    )


def find_folder(weights: Path | None, allow_download: bool, repository: str, what: str) -> Path:
    """Return the folder of a model: the one given, or the published one if it may be fetched.

    Parameters
    ----------
    weights
        A folder, or None.
    allow_download
        Whether `repository` may be fetched into the hub's own cache.
    repository
        ``owner/name`` on the hub; empty if there is none in this format.
    what
        Name of the model in the message.

    Raises
    ------
    ConfigError
        Saying in one sentence which folder to bring.
    """
    place = (
        f"huggingface.co/{repository}" if repository else "its authors, converted to the format of diffusers"
    )
    if weights is not None:
        folder = Path(weights).expanduser()
        if folder.exists():
            return folder
        raise ConfigError(
            f"the {what} should read {folder}, which does not exist; give a folder that holds {place}."
        )
    if not allow_download or not repository:
        fetch = ", or let it be fetched with generator.allow_download=true" if repository else ""
        raise ConfigError(
            f"the {what} has no weights: set generator.weights to a folder that holds {place}{fetch}."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the client has many ways to say that the network is gone
        raise ConfigError(
            f"the {what} could not be fetched ({type(error).__name__}); bring a folder that holds {place} on another "
            "way and name it with generator.weights."
        ) from error


def digest_folder(folder: Path) -> str:
    """Return the digest of a folder's settings and weights; large files are sampled."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    kept = [f for f in files if f.is_file() and f.suffix in (".json", ".safetensors", ".txt")]
    return hash_json({str(f.relative_to(folder)) if f != folder else f.name: hash_sampled(f) for f in kept})


def load_pipeline(make: Callable[..., Any], folder: Path, config: HubConfig) -> Any:
    """Return a pipeline of diffusers from a folder, quiet and on its device.

    Only safetensors are read, and no file is fetched.

    Raises
    ------
    DataError
        If the folder does not hold the pipeline.
    """
    from safetensors import SafetensorError

    try:
        with (
            warnings.catch_warnings()
        ):  # the old name of the option is the one that all supported versions know
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = make(
                str(folder), torch_dtype=config.torch_dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{folder} cannot be read as {_name(make)} ({first}); copy the whole folder."
        ) from error
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config.torch_device)


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__self__", make).__name__


def resize_initial(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Return initial images as floats in 0..1 of shape (n, side, side, 3)."""
    return np.stack([resize_image(image, side, side) for image in images]).astype(np.float32) / 255
