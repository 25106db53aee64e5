"""Latents of the packaged autoencoder, as a target: colour and layout without weights of a hub.

Owns the target kind ``packaged_latents``: the autoencoder of the embedded generator (`weights_file`) in the place of
Stable Diffusion's, so that the low-level branch of ATM or MindEye2 can be run and judged offline. Encoding, decoding
and scaling are those of `embeddings.autoencoders`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from braindecode_vis.base.contracts import ImageEncoderSettings
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.embeddings.autoencoders import LatentEncoder
from braindecode_vis.embeddings.weights import check_intact, describe_needed
from braindecode_vis.generation.weights_file import PACKAGED_WEIGHTS, hash_weights, load_model, read_header

#: An image is so many times as high as a map of its latent.
_REDUCTION = 8


class PackagedLatentsConfig(ImageEncoderSettings, DeviceSettings):
    """Latents of the packaged autoencoder: eight maps of 8 x 8 for an image of 64 pixels.

    A substitute for ``vae`` and ``taesd`` if their weights are not available; its images are as small and blurred as
    those of the embedded generator, and no other model uses its latents.
    """

    packages: ClassVar[tuple[str, ...]] = ()

    kind: Literal["packaged_latents"] = "packaged_latents"

    batch_size: ClassVar[int] = 64
    workers: ClassVar[int] = 2
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"batch_size", "workers"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"batch_size", "workers", "device"})

    @property
    def image_size(self) -> int:
        """Side of the square that an image becomes, pixels."""
        return read_header(PACKAGED_WEIGHTS).image_size

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_digest": hash_weights(PACKAGED_WEIGHTS)}

    def list_weights(self) -> list[NeededWeights]:
        """Return the file of the package."""
        return [
            describe_needed(None, "kind", PACKAGED_WEIGHTS, what="two networks and images of this package")
        ]

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the weights are there and whole."""
        read_header(PACKAGED_WEIGHTS)
        check_intact(PACKAGED_WEIGHTS)

    def make_network(self) -> tuple[Any, float, float]:
        """Return the autoencoder in the form of those of diffusers, and the factor and the shift of its latents."""
        device = choose_device(self.device, setting="target.device")
        return _Autoencoder(load_model(PACKAGED_WEIGHTS, device).autoencoder), 1.0, 0.0

    def build(self) -> PackagedLatentsEncoder:
        """Return the encoder; the network is loaded when the first image comes."""
        return PackagedLatentsEncoder(self)


class _Autoencoder:
    """Answers as an autoencoder of diffusers does."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def eval(self) -> _Autoencoder:
        return self

    def requires_grad_(self, _: bool) -> _Autoencoder:
        return self

    def to(self, device: str) -> _Autoencoder:
        self.network.to(device)
        return self

    def encode(self, images: Any) -> Any:
        return SimpleNamespace(latents=self.network.encode(images))

    def decode(self, latents: Any) -> Any:
        return SimpleNamespace(sample=self.network.decode(latents))


class PackagedLatentsEncoder(LatentEncoder):
    """The packaged autoencoder as an image encoder that can be inverted."""

    config: Any

    def __init__(self, config: PackagedLatentsConfig) -> None:
        self.config = config
        self._loaded = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        header = read_header(PACKAGED_WEIGHTS)
        side = header.image_size // _REDUCTION
        return (header.autoencoder["n_latent_channels"], side, side)

    @property
    def space(self) -> str:
        """Name with weights, latent shape and image size."""
        shape = "x".join(map(str, self.latent_shape))
        weights = hash_weights(PACKAGED_WEIGHTS)[:12]
        return f"packaged_latents/weights={weights}/{shape}/centre{self.config.image_size}-lanczos"
