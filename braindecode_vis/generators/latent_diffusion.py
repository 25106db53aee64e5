"""Turn embeddings into 64-pixel images with a small latent diffusion model that the package brings.

Owns the configuration, the weights file and the generator: reduce an embedding to components, sample latents that suit
it, decode them, keep the best of some candidates. Like any second stage it has been trained on images alone and never
sees a brain; what a brain encoder's predictions are worth is learnt from training trials when the generator is built.
``weights/latent_diffusion.json`` has the command, the seed and the scores of the packaged weights, which paint nothing
but what the phantom shows. Train on other stimuli with ``braindecode-vis train-generator``.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.embeddings.weights import check_intact
from braindecode_vis.generators.conditions import Components, Uncertainty, fit_uncertainty
from braindecode_vis.generators.material import TrainingMaterial
from braindecode_vis.settings import Settings
from braindecode_vis.store import hash_file, replace_atomically

if TYPE_CHECKING:
    import torch

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "latent_diffusion.safetensors"
PACKAGED_TARGET = "efficientnet-lite0"
_HEADER = "latent_diffusion"
_IMAGES = "images.components"
#: Of the images that a weights file brings along: at most so many, so many components, in parts of a deviation.
N_KNOWN, N_KNOWN_COMPONENTS, CODE = 4096, 64, 16


class LatentDiffusionConfig(Settings):
    """Sample images from the embedded latent diffusion model.

    Parameters
    ----------
    weights
        A file that `train_generator` made; None takes the packaged one, for the target efficientnet-lite0. The file's
        hash enters the fingerprint.
    sampler, steps
        ``ddim`` or ``dpm-solver++``, and how many steps; 10 to 25 are enough for a second-order solver
        (arXiv:2211.01095).
    guidance
        Strength of classifier-free guidance; 1 is none.
    candidates
        Images sampled per embedding. The one whose own embedding is most like the one that was asked for is kept, so
        that scores in the target's space are better than those in others; 1 keeps the only one.
    batch_size, device
        How it runs, not what it computes.
    """

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    weights: Path | None = None
    sampler: Literal["ddim", "dpm-solver++"] = "dpm-solver++"
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0)
    candidates: int = Field(default=8, ge=1, le=256)
    batch_size: int = Field(default=64, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})
    #: Asks the pipeline for the noise of single repetitions.
    weighs_predictions: ClassVar[bool] = True
    #: A prior may ask for images with ``prior.images: generator``.
    knows_images: ClassVar[bool] = True

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_sha256": _hash_weights(self.find_weights())}

    def find_weights(self) -> Path:
        """Return the path of the weights in use."""
        return PACKAGED_WEIGHTS if self.weights is None else self.weights.expanduser()

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the weights are there and whole."""
        read_header(self.find_weights())
        check_intact(self.find_weights())

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
        generator = LatentDiffusionGenerator(self, material=material)
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

    Parameters
    ----------
    config
        Weights and sampling.
    material
        Its image encoder compares candidates; its predictions say how far a brain encoder can be trusted.
    uncertainty
        Of the embeddings that are given; None takes them to be embeddings of images.
    """

    def __init__(
        self,
        config: LatentDiffusionConfig,
        *,
        material: TrainingMaterial | None = None,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        if config.candidates > 1 and material is None:
            raise ConfigError(
                "generator.candidates above 1 needs an image encoder to compare them; give the training material."
            )
        self.config = config
        self.material = material
        self.uncertainty = uncertainty
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

    def read_known_images(self) -> Embeddings:
        """Return embeddings of a sample of the images that the weights were trained on, to `N_KNOWN_COMPONENTS`.

        Raises
        ------
        ConfigError
            If the weights were made before they brought any.
        """
        from safetensors import safe_open

        model = load_model(self.path, pick_device(self.config.device))
        with safe_open(self.path, framework="np") as file:
            if _IMAGES not in file.keys():  # noqa: SIM118 (no mapping)
                raise ConfigError(
                    f"{self.path} holds none of the images that it was trained on; train the weights again, or set "
                    "prior.images to training or to a folder of embeddings."
                )
            codes = file.get_tensor(_IMAGES).astype(np.float32)
        vectors = model.components.restore(codes / CODE)
        names = [f"{self.header.training['source']} {row}" for row in range(len(codes))]
        return Embeddings(vectors.astype(np.float32), names, self.header.space)

    def describe(self) -> dict[str, Any]:
        """Return which weights are in use, and how reliable the predictions are taken to be."""
        about = {"weights_sha256": _hash_weights(self.path), "weights_space": self.header.space}
        if self._of_predictions is None:
            return about
        shares = load_model(self.path, pick_device(self.config.device)).components.shares
        return {
            **about,
            "explained_variance": float(np.average(self._of_predictions.reliability, weights=shares)),
        }

    def for_predictions(self) -> LatentDiffusionGenerator:
        """Return the generator of what a brain encoder predicts: it trusts each component as far as it is reliable.

        Without out-of-fold predictions in the space of the weights nothing is known of that, and predictions are
        taken as embeddings of images are.
        """
        if self._of_predictions is None:
            return self
        return LatentDiffusionGenerator(self.config, material=self.material, uncertainty=self._of_predictions)

    @cached_property
    def _of_predictions(self) -> Uncertainty | None:
        material = self.material
        if material is None or material.predicted is None or not len(material.predicted):
            return None
        if not self.accepts(material.predicted.space):
            return None
        components = load_model(self.path, pick_device(self.config.device)).components
        true = material.embeddings.select(list(material.predicted.ids))
        return fit_uncertainty(
            components.apply(material.predicted.flat()),
            components.apply(true.flat()),
            material.noise,
            components,
        )

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, image_size, image_size, 3).

        A row's noise depends on the seed and its position alone, so equal embeddings in different rows give different
        draws, and the batch size changes nothing beyond rounding.

        Raises
        ------
        ConfigError
            If the embeddings are of another space than the weights.
        """
        self.check_space(embeddings.space)
        side = self.header.image_size
        images = np.empty((len(embeddings), side, side, 3), np.uint8)
        if len(embeddings) == 0:
            return images
        model = load_model(self.path, pick_device(self.config.device))
        estimate = model.components.apply(embeddings.flat())
        reliability = np.ones_like(estimate)
        if self.uncertainty is not None:
            estimate = self.uncertainty.estimate(estimate)
            reliability[:] = self.uncertainty.reliability
        n_rows = max(1, self.config.batch_size // self.config.candidates)
        for start in range(0, len(images), n_rows):
            rows = np.arange(start, min(start + n_rows, len(images)))
            made = self._sample(model, estimate[rows], reliability[rows], rows, seed)
            best = self._find_best(model, made, estimate[rows])
            images[rows] = made[np.arange(len(rows)), best]
        return images

    def _find_best(self, model: Model, made: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        """Return, for each row, which candidate's embedding has the largest cosine with the estimate about the mean."""
        n_rows, n_candidates = made.shape[:2]
        if n_candidates == 1:
            return np.zeros(n_rows, int)
        encoder = self.material.image_encoder  # type: ignore[union-attr]
        vectors = np.asarray(encoder.encode(made.reshape(-1, *made.shape[2:])), np.float32)
        found = model.components.apply(vectors.reshape(len(vectors), -1)).reshape(n_rows, n_candidates, -1)
        found *= model.components.scale
        wanted = estimate * model.components.scale
        lengths = np.linalg.norm(found, axis=2) + 1e-12
        return np.argmax(np.einsum("nck,nk->nc", found, wanted) / lengths, axis=1)

    def _sample(
        self, model: Model, estimate: np.ndarray, reliability: np.ndarray, rows: np.ndarray, seed: int
    ) -> np.ndarray:
        """Return the candidates of some rows, uint8 of shape (n_rows, candidates, side, side, 3)."""
        import torch

        from braindecode_vis.generators.autoencoder import unscale_images
        from braindecode_vis.generators.sampling import guide, sample_latents
        from braindecode_vis.seeds import make_torch_generator

        n_candidates, guidance, device = self.config.candidates, self.config.guidance, model.device
        noises = []
        for row in rows:
            generator = make_torch_generator(seed, "latent_diffusion", int(row))
            noises += [torch.randn(model.latent_shape, generator=generator) for _ in range(n_candidates)]
        told, known = (
            torch.from_numpy(part.astype(np.float32)).repeat_interleave(n_candidates, dim=0).to(device)
            for part in (estimate, reliability)
        )

        def predict(latents: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            if guidance == 1:
                return model.denoiser(latents, times, told, known)
            nothing = torch.zeros_like(told)
            both = model.denoiser(
                latents.repeat(2, 1, 1, 1),
                times.repeat(2),
                torch.cat([told, nothing]),
                torch.cat([known, nothing]),
            )
            conditional, unconditional = both.chunk(2)
            return guide(conditional, unconditional, guidance)

        with torch.inference_mode():
            noise = torch.stack(noises).to(device)
            latents = sample_latents(predict, noise, sampler=self.config.sampler, n_steps=self.config.steps)
            images = unscale_images(model.autoencoder.decode(latents)).cpu().numpy()
        return images.reshape(len(rows), n_candidates, *images.shape[1:])


@dataclass(frozen=True)
class Model:
    """The networks of a weights file in evaluation mode, and the components of its embeddings."""

    autoencoder: Any
    denoiser: Any
    components: Components
    latent_shape: tuple[int, int, int]
    device: str


def build_networks(header: WeightsHeader) -> tuple[Any, Any]:
    """Return the autoencoder and the denoiser that a header describes, with fresh weights."""
    from braindecode_vis.generators.autoencoder import DOWNSAMPLING, Autoencoder
    from braindecode_vis.generators.denoiser import Denoiser

    denoiser = Denoiser(
        n_latent_channels=header.autoencoder["n_latent_channels"],
        latent_size=header.image_size // DOWNSAMPLING,
        **header.denoiser,
    )
    return Autoencoder(**header.autoencoder), denoiser


def encode_known_images(components: Components, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensor that keeps a sample of images in a weights file, one byte per component.

    Parameters
    ----------
    components
        Of the generator.
    vectors : float array of shape (n_images, n_features)
        Evenly spaced rows are taken, at most `N_KNOWN`.
    """
    rows = vectors[:: -(-len(vectors) // N_KNOWN)].astype(np.float32)
    found = components.apply(rows)[:, :N_KNOWN_COMPONENTS]
    return {_IMAGES: np.clip(np.rint(found * CODE), -127, 127).astype(np.int8)}


def write_weights(path: Path, header: WeightsHeader, tensors: dict[str, torch.Tensor]) -> None:
    """Write a weights file in half precision, whole numbers as they are, under its name only when it is complete."""
    import torch
    from safetensors.torch import save_file

    half = {
        name: (tensor.to(torch.float16) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        autoencoder, denoiser = build_networks(header)
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        parts = [tensors.pop(f"embedding.{name}").numpy() for name in ("mean", "basis", "scale")]
        for name, network in (("autoencoder", autoencoder), ("denoiser", denoiser)):
            own = {
                key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
            }
            network.load_state_dict(own)
            network.eval().requires_grad_(False).to(device)
    except SafetensorError as error:
        raise DataError(f"{path} is cut short or damaged ({error}); fetch it again.") from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold what this version of the generator needs ({error}); train the weights again."
        ) from error
    side = header.image_size // 8
    shape = (header.autoencoder["n_latent_channels"], side, side)
    return Model(autoencoder, denoiser, Components(*parts), shape, device)


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
