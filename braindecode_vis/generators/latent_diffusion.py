"""Turn embeddings into 64-pixel images with a small latent diffusion model that the package brings.

Owns the configuration, the weights file and the generator: standardise an embedding, sample a latent that suits it,
decode the latent. Like any second stage it has been trained on images alone and never sees a brain. The packaged
weights were trained on 17 408 images of the phantom in a short run and are not good yet: the oracle shows background,
layout and often the colour of an unseen concept, rarely its shape or texture (``weights/latent_diffusion.json`` has the
command, the seed and the scores, ``latent_diffusion.log.jsonl`` the log). They paint nothing but what the phantom
shows. Train more, or on other stimuli, with `braindecode_vis.generators.diffusion_training.train_generator`.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.generators.material import TrainingMaterial
from braindecode_vis.settings import Settings
from braindecode_vis.store import hash_file, replace_atomically

if TYPE_CHECKING:
    import torch

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "latent_diffusion.safetensors"
PACKAGED_TARGET = "efficientnet-lite0"
_HEADER = "latent_diffusion"


class LatentDiffusionConfig(Settings):
    """Sample images from the embedded latent diffusion model.

    Parameters
    ----------
    weights
        A file that `train_generator` made; None takes the packaged one, for the target efficientnet-lite0. The file's
        hash enters the fingerprint.
    sampler, steps
        ``ddim`` or ``dpm-solver++``, and how many steps; 20 to 25 are enough for a second-order solver
        (arXiv:2211.01095).
    guidance
        Strength of classifier-free guidance; 1 is none.
    condition_noise
        Noise mixed into the embedding before sampling, 0 to 1, as in training: more leaves more to the model's own
        knowledge of images.
    batch_size, device
        How it runs, not what it computes.
    """

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    weights: Path | None = None
    sampler: Literal["ddim", "dpm-solver++"] = "dpm-solver++"
    steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=2.0, ge=0)
    condition_noise: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int = Field(default=64, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_sha256": _hash_weights(self.find_weights())}

    def find_weights(self) -> Path:
        """Return the path of the weights in use."""
        return PACKAGED_WEIGHTS if self.weights is None else self.weights.expanduser()

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images.

        Weights of the user's own may belong to any target; `build` compares the spaces themselves.
        """
        return self.weights is not None or target_kind == PACKAGED_TARGET

    def build(self, material: TrainingMaterial) -> LatentDiffusionGenerator:
        """Return the generator.

        Raises
        ------
        ConfigError
            If the weights were trained on another space than the target's.
        """
        generator = LatentDiffusionGenerator(self)
        generator.check_space(material.image_encoder.space)
        return generator


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says about itself.

    Parameters
    ----------
    space
        Name of the embedding space that conditions the model.
    n_features
        Length of an embedding.
    image_size
        Height and width of the images in pixels.
    autoencoder, denoiser
        Sizes of the two networks.
    training
        Source of the images, seed, steps and settings.
    """

    space: str
    n_features: int
    image_size: int
    autoencoder: dict[str, int]
    denoiser: dict[str, int]
    training: dict[str, Any]


class LatentDiffusionGenerator:
    """A trained autoencoder and denoiser; images are reproducible from the seed, row by row.

    The networks are read when the first image is asked for.
    """

    def __init__(self, config: LatentDiffusionConfig) -> None:
        self.config = config
        self.path = config.find_weights()
        self.header = read_header(self.path)

    def accepts(self, space: str) -> bool:
        """Say whether `space` is the one that the weights were trained on."""
        return space == self.header.space

    def check_space(self, space: str) -> None:
        """Raise `ConfigError` that names both spaces unless `space` is that of the weights."""
        if not self.accepts(space):
            raise ConfigError(
                f"the generator 'latent_diffusion' has weights for the space {self.header.space!r}, not for "
                f"{space!r}; choose that target, or train weights on this space and name them in generator.weights."
            )

    def describe(self) -> dict[str, Any]:
        """Return which weights are in use."""
        return {"weights_sha256": _hash_weights(self.path), "weights_space": self.header.space}

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, image_size, image_size, 3).

        A row's noise depends on the seed and its position alone, so equal embeddings in different rows give different
        draws, and the batch size changes nothing beyond rounding.

        Raises
        ------
        ConfigError
            If the embeddings are of another space than the weights.
        """
        import torch

        from braindecode_vis.generators.autoencoder import unscale_images

        self.check_space(embeddings.space)
        if len(embeddings) == 0:
            side = self.header.image_size
            return np.empty((0, side, side, 3), np.uint8)
        model = load_model(self.path, pick_device(self.config.device))
        values = torch.from_numpy(embeddings.flat())
        images = []
        with torch.inference_mode():
            for start in range(0, len(values), self.config.batch_size):
                rows = range(start, min(start + self.config.batch_size, len(values)))
                latents = self._sample(model, values[rows.start : rows.stop], rows, seed)
                images.append(unscale_images(model.autoencoder.decode(latents)).cpu().numpy())
        return np.concatenate(images)

    def _sample(self, model: Model, values: torch.Tensor, rows: range, seed: int) -> torch.Tensor:
        """Return the sampled latents of some rows."""
        import torch

        from braindecode_vis.generators.denoiser import add_condition_noise
        from braindecode_vis.generators.sampling import guide, sample_latents
        from braindecode_vis.seeds import make_torch_generator

        condition = model.standardise(values.to(model.mean.device))
        generators = [make_torch_generator(seed, "latent_diffusion", row) for row in rows]
        noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators]).to(condition)
        if self.config.condition_noise > 0:
            mixed = torch.stack([torch.randn(condition.shape[1], generator=g) for g in generators]).to(
                condition
            )
            strengths = torch.full((len(rows),), self.config.condition_noise).to(condition)
            condition = add_condition_noise(condition, strengths, torch.zeros_like(strengths), mixed)
        keep = torch.ones(len(rows), dtype=torch.bool, device=condition.device)

        def predict(latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            if self.config.guidance == 1:
                return model.denoiser(latents, times, condition, keep)
            both = model.denoiser(
                latents.repeat(2, 1, 1, 1), times.repeat(2), condition.repeat(2, 1), torch.cat([keep, ~keep])
            )
            conditional, unconditional = both.chunk(2)
            return guide(conditional, unconditional, self.config.guidance)

        return sample_latents(predict, noise, sampler=self.config.sampler, n_steps=self.config.steps)


@dataclass(frozen=True)
class Model:
    """The networks of a weights file in evaluation mode, and the statistics of its embeddings."""

    autoencoder: Any
    denoiser: Any
    mean: torch.Tensor
    scale: torch.Tensor
    latent_shape: tuple[int, int, int]

    def standardise(self, values: torch.Tensor) -> torch.Tensor:
        """Return embeddings with the mean and deviation of the training images removed."""
        return (values - self.mean) / self.scale


def build_networks(header: WeightsHeader) -> tuple[Any, Any]:
    """Return the autoencoder and the denoiser that a header describes, with fresh weights."""
    from braindecode_vis.generators.autoencoder import DOWNSAMPLING, Autoencoder
    from braindecode_vis.generators.denoiser import Denoiser

    denoiser = Denoiser(
        n_features=header.n_features,
        n_latent_channels=header.autoencoder["n_latent_channels"],
        latent_size=header.image_size // DOWNSAMPLING,
        **header.denoiser,
    )
    return Autoencoder(**header.autoencoder), denoiser


def write_weights(path: Path, header: WeightsHeader, tensors: dict[str, torch.Tensor]) -> None:
    """Write a weights file in half precision, under its name only when it is complete."""
    import torch
    from safetensors.torch import save_file

    half = {name: tensor.detach().cpu().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    with replace_atomically(path) as temporary:
        save_file(half, temporary, metadata={_HEADER: json.dumps(asdict(header), sort_keys=True)})


def read_header(path: Path) -> WeightsHeader:
    """Read what a weights file says about itself, without its tensors.

    Raises
    ------
    ConfigError
        If there is no such file.
    DataError
        If it was not made by `train_generator`.
    """
    if not path.is_file():
        raise ConfigError(
            f"generator.weights names {path}, which is not a file; train weights with train_generator, or leave the "
            "setting out for the packaged ones."
        )
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(min(length, 1 << 22)))
        return WeightsHeader(**json.loads(content["__metadata__"][_HEADER]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a weights file of the generator 'latent_diffusion' ({type(error).__name__}); name one that "
            "train_generator made."
        ) from error


@lru_cache(maxsize=2)
def load_model(path: Path, device: str) -> Model:
    """Read a weights file into networks on a device.

    Raises
    ------
    DataError
        If tensors are missing or of another shape than the header says.
    """
    from safetensors.torch import load_file

    header = read_header(path)
    autoencoder, denoiser = build_networks(header)
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        mean, scale = tensors.pop("embedding.mean"), tensors.pop("embedding.scale")
        for name, network in (("autoencoder", autoencoder), ("denoiser", denoiser)):
            own = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            network.load_state_dict(own)
            network.eval().requires_grad_(False).to(device)
    except (RuntimeError, KeyError) as error:
        raise DataError(
            f"the tensors of {path} do not fit its header ({error}); train the weights again."
        ) from error
    side = header.image_size // 8
    shape = (header.autoencoder["n_latent_channels"], side, side)
    return Model(autoencoder, denoiser, mean.to(device), scale.to(device), shape)


@lru_cache(maxsize=8)
def _hash_weights(path: Path) -> str:
    read_header(path)
    return hash_file(path)


def pick_device(device: str) -> str:
    """Return ``cpu`` or ``cuda``; ``auto`` takes the GPU if there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("generator.device is cuda, but torch sees no GPU here; use auto or cpu.")
    return device
