"""Latents of diffusion autoencoders as target spaces, and their decoding to images.

Owns AutoencoderKL (Stable Diffusion, SDXL) and the tiny autoencoder TAESD. A latent is scaled as the diffusion model
sees it, always and in both directions, and the name of the space says so. An image passes through the centre of the
distribution that the encoder gives, so that nothing is random.

References
----------
Rombach et al. (2022), CVPR, arXiv:2112.10752; TAESD: https://github.com/madebyollin/taesd.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.contracts import ImageEncoder
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.stimuli import crop_square, resize_image
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.published import get_snapshot, name_repository
from braindecode_vis.embeddings.transforms import map_ahead
from braindecode_vis.embeddings.weights import (
    WeightedSettings,
    check_intact,
    hash_weights,
    load_state,
    read_state,
)

LatentModel = Literal["sd", "sdxl"]
SCALING = {"sd": 0.18215, "sdxl": 0.13025}  # brings latents to variance one (Rombach et al., appendix G)
_REPOSITORIES = {
    ("vae", "sd"): "stabilityai/sd-vae-ft-mse",
    ("vae", "sdxl"): "madebyollin/sdxl-vae-fp16-fix",
    ("taesd", "sd"): "madebyollin/taesd",
    ("taesd", "sdxl"): "madebyollin/taesdxl",
}


class LatentConfig(WeightedSettings):
    """Settings that both kinds of autoencoders share.

    Parameters
    ----------
    latents
        Type of latents: of Stable Diffusion 1 and 2 (``sd``) or of SDXL. They are not interchangeable.
    image_size
        Side of the square that an image becomes, pixels; a multiple of 8. Small sizes cost sharpness.
    batch_size
        Settings of the computation that do not change its result.
    """

    latents: LatentModel = "sd"
    image_size: int = Field(default=256, ge=32, multiple_of=8)
    batch_size: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check_random(self) -> Self:
        if self.model_args and self.weights != "random":
            raise ValueError("model_args describes random weights; a file says its own sizes")
        channels = self.model_args.get("latent_channels", 4)
        if not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"model_args.latent_channels is {channels!r}, but should be a whole number from 1"
            )
        return self

    @property
    def _kind(self) -> str:
        return str(type(self).model_fields["kind"].default)

    def describe_weights(self) -> str:
        """Say which file holds the weights."""
        place = self.name_source()
        if self._kind == "taesd":
            stem = "taesd" if self.latents == "sd" else "taesdxl"
            return f"a folder with {stem}_encoder.safetensors and {stem}_decoder.safetensors, or of {place}"
        return f"diffusion_pytorch_model.safetensors (or its folder) of {place}"

    def name_source(self) -> str:
        """Say which repository is fetched."""
        return name_repository(_REPOSITORIES[self._kind, self.latents])

    def download(self, cached: bool = False) -> Path:
        """Return the published folder in the hub's cache, fetched unless it is `cached`."""
        patterns = ["config.json", "diffusion_pytorch_model.safetensors"]
        repository = _REPOSITORIES[self._kind, self.latents]
        return get_snapshot(repository, patterns, cached=cached)

    def find_parts(self) -> list[Path]:
        """Return the files or folders that the weights are read from."""
        path = self.find_weights()
        return [] if path is None else [path]

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless every file of the weights is there and whole."""
        if self.allow_download or may_download():
            return
        for part in self.find_parts():
            check_intact(part)

    @property
    def digest(self) -> str:
        """Name of the weights: the hash of their bytes, or the seed of random ones."""
        changes = f"-{hash_json(self.model_args)[:8]}" if self.model_args else ""
        if self.find_weights() is None:
            return f"random-0{changes}"
        digests = [*map(hash_weights, self.find_parts()), *self._digest_sizes()]
        return digests[0] if len(digests) == 1 else hash_json(digests)

    def _digest_sizes(self) -> list[str]:
        """Return a hash of what a file beside the weights says of the network, where it changes the latents."""
        return []

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_digest": self.digest}

    def make_network(self) -> tuple[Any, float, float]:
        """Return the autoencoder, the factor and the shift of its latents."""
        raise NotImplementedError

    def _make(self, kind: Any, sizes: dict[str, Any]) -> Any:
        """Return an untrained network of these sizes and `model_args`."""
        try:
            with seeded(0):
                return kind(**(sizes | self.model_args))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            source = "target.model_args" if self.model_args else f"config.json of {self.weights}"
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{source} does not describe an {kind.__name__} ({first}); correct it."
            ) from error

    def build(self) -> LatentEncoder:
        """Return the encoder; the network is loaded when the first image comes."""
        return LatentEncoder(self)


class AutoencoderKLConfig(LatentConfig):
    """Latents of the autoencoder of Stable Diffusion or SDXL, at the mean of the posterior."""

    packages: ClassVar[tuple[str, ...]] = ("diffusers",)

    kind: Literal["vae"] = "vae"

    def _digest_sizes(self) -> list[str]:
        path = self.find_weights()
        if path is None or not (path / "config.json").is_file():
            return []
        return [hash_json(_read_sizes(path / "config.json"))]  # groups and shift change every latent

    def make_network(self) -> tuple[Any, float, float]:
        """Return the autoencoder, the factor and the shift of its latents."""
        from diffusers import AutoencoderKL

        path = self.find_weights()
        sizes: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "sample_size": 512, "scaling_factor": SCALING[self.latents],
        }  # fmt: skip
        if path is not None and path.is_dir() and (path / "config.json").is_file():
            sizes |= _read_sizes(path / "config.json")
            if sizes["latent_channels"] != 4:
                raise DataError(
                    f"{path} has {sizes['latent_channels']} latent channels, but {self.latents} has 4; "
                    f"use {self.describe_weights()}."
                )
            if not math.isclose(sizes["scaling_factor"], SCALING[self.latents], abs_tol=1e-6):
                raise DataError(
                    f"{path} scales its latents by {sizes['scaling_factor']}, those of {self.latents} by "
                    f"{SCALING[self.latents]}; correct target.latents or use {self.describe_weights()}."
                )
        network = self._make(AutoencoderKL, sizes)
        if path is not None:
            load_state(network, rename_kl(read_state(path), network), path=path, what="an AutoencoderKL")
            _check_finite(network, path)
        return network, float(network.config.scaling_factor), float(network.config.shift_factor or 0)


class TinyAutoencoderConfig(LatentConfig):
    """Latents of the tiny autoencoder, similar to those of the large one at a hundredth of the cost.

    The weights are a folder with the two files of the original release (``taesd_encoder``, ``taesd_decoder``; for SDXL
    ``taesdxl_...``), or a folder or file of diffusers.
    """

    packages: ClassVar[tuple[str, ...]] = ("diffusers",)

    kind: Literal["taesd"] = "taesd"

    def find_parts(self) -> list[Path]:
        """Return the two halves of the original release, or the one file of diffusers."""
        path = self.find_weights()
        if path is None or path.is_file():
            return [] if path is None else [path]
        stem = "taesd" if self.latents == "sd" else "taesdxl"
        halves = [sorted(path.glob(f"{stem}_{half}.*")) for half in ("encoder", "decoder")]
        if all(halves):
            return [files[-1] for files in halves]
        if any(path.glob("taesd*coder.*")):
            raise DataError(
                f"{path} is missing a half of the tiny autoencoder; use {self.describe_weights()}."
            )
        return [path]

    def make_network(self) -> tuple[Any, float, float]:
        """Return the autoencoder; its latents are scaled already."""
        from diffusers import AutoencoderTiny

        network = self._make(AutoencoderTiny, {"latent_channels": 4})
        parts = self.find_parts()
        if parts:
            state: dict[str, Any] = {}
            for part in parts:
                state |= rename_tiny(read_state(part), part)
            whole = parts[0] if len(parts) == 1 else parts[0].parent
            load_state(network, state, path=whole, what="an AutoencoderTiny")
            _check_finite(network, whole)
        return network, 1.0, 0.0  # trained on scaled latents


def rename_tiny(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return one half of the original TAESD release under the names of diffusers.

    The decoder is one index lower there: layer 0 of the original clamps the latent and has no parameters.
    """
    if any(name.startswith(("encoder.", "decoder.")) for name in state):
        return state
    is_decoder = "decoder" in path.name
    renamed = {}
    for name, value in state.items():
        index, _, rest = name.partition(".")
        if not index.isdecimal():
            renamed[name] = value  # named as too much when the network is filled
            continue
        half = f"decoder.layers.{int(index) - 1}" if is_decoder else f"encoder.layers.{index}"
        renamed[f"{half}.{rest}"] = value
    return renamed


def _read_sizes(path: Path) -> dict[str, Any]:
    """Return what a ``config.json`` of diffusers says of its network."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        sizes = {key: value for key, value in stored.items() if not key.startswith("_")}
        if "scaling_factor" in sizes:
            sizes["scaling_factor"] = float(sizes["scaling_factor"])
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}); copy the whole folder again."
        ) from error
    return sizes


def _check_finite(network: Any, path: Path) -> None:
    import torch

    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{path} holds weights that are no finite numbers, first {name}; fetch it again.")


def rename_kl(state: dict[str, Any], network: Any) -> dict[str, Any]:
    """Return the tensors of an AutoencoderKL under the names of diffusers; the original release has others."""
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    if "encoder.down.0.block.0.norm1.weight" in state:  # the original release
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        return convert_ldm_vae_checkpoint(state, network.config)
    # diffusers renamed its attention layers since the first files were published.
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, value in state.items():
        if ".attentions." in name:
            for before, after in old.items():
                name = name.replace(before, after)
        renamed[name] = value
    return renamed


class LatentEncoder(ImageEncoder):
    """An autoencoder as an image encoder that can be inverted."""

    decodes = True

    def __init__(self, config: LatentConfig) -> None:
        self.config = config
        self._loaded: tuple[Any, float, float] | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self.config.image_size // 8  # three halvings
        return (int(self.config.model_args.get("latent_channels", 4)), side, side)

    @property
    def space(self) -> str:
        """Name with autoencoder, weights, image size, latent shape and scale."""
        config, digest = self.config, self.config.digest
        weights = digest if digest.startswith("random") else f"weights={digest[:12]}"
        shape = "x".join(map(str, self.latent_shape))
        return f"{config._kind}/{config.latents}/{weights}/{shape}/scaled/centre{config.image_size}-lanczos"

    def load(self) -> Any:
        """Return the autoencoder, loaded once and moved to its device."""
        if self._loaded is None:
            network, factor, shift = self.config.make_network()
            network.eval().requires_grad_(False).to(
                choose_device(self.config.device, setting="target.device")
            )
            self._loaded = network, factor, shift
        return self._loaded[0]

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, channels * height * width), in that order."""
        import torch

        network, device, rows = self.load(), choose_device(self.config.device, setting="target.device"), []
        with torch.inference_mode():
            for batch in self._prepare(images):
                inputs = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
                rows.append(self.scale(self._encode_tensor(network, inputs)).flatten(1).cpu().numpy())
        return np.concatenate(rows) if rows else np.empty((0, int(np.prod(self.latent_shape))), np.float32)

    @staticmethod
    def _encode_tensor(network: Any, inputs: Any) -> Any:
        output = network.encode(inputs)
        # The tiny one gives latents, the other a distribution, whose mode is its mean: nothing is drawn.
        return output.latents if hasattr(output, "latents") else output.latent_dist.mode()

    def scale(self, latents: Any) -> Any:
        """Return raw latents as the diffusion model sees them."""
        self.load()
        assert self._loaded is not None
        return (latents - self._loaded[2]) * self._loaded[1]

    def _prepare(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        side = self.config.image_size

        def prepare(image: np.ndarray) -> np.ndarray:
            return resize_image(crop_square(image), side, side)

        ahead = 2 * self.config.batch_size
        ready = map_ahead(prepare, images, workers=self.config.workers, ahead=ahead)
        while chunk := list(islice(ready, self.config.batch_size)):
            yield np.stack(chunk)

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return uint8 RGB images of shape (n, image_size, image_size, 3).

        Parameters
        ----------
        vectors : float array of shape (n, channels * height * width)
            Scaled latents, as `encode` gives them.
        """
        import torch

        network, device = self.load(), choose_device(self.config.device, setting="target.device")
        assert self._loaded is not None
        side, step, images = self.config.image_size, self.config.batch_size, []
        latents = np.array(vectors, dtype=np.float32).reshape(-1, *self.latent_shape)  # torch wants to own it
        with torch.inference_mode():
            for start in range(0, len(latents), step):
                batch = torch.from_numpy(latents[start : start + step]).to(device)
                decoded = network.decode(
                    batch / self._loaded[1] + self._loaded[2]
                ).sample  # n, 3, side, side; -1 to 1
                values = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                images.append(values.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images) if images else np.empty((0, side, side, 3), np.uint8)
