"""The image encoder for every pretrained network, and the settings that all their kinds share.

Owns batching, device, arithmetic, the order of images and the name of the space. Images are prepared by threads while
the network works on the batch before, so that the loop costs little more than the bare network. Which network, which
weights and which transform each kind says in a file of its own (`openclip`, `timm_models`, `torchvision_models`,
`transformers_models`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.contracts import ImageEncoder
from braindecode_vis.base.devices import autocast, choose_device, repeatable_convolutions
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.layer_readout import (
    OUTPUT,
    Layer,
    Pooling,
    Tower,
    check_choice,
    read_layers,
)
from braindecode_vis.embeddings.transforms import Transform, map_ahead
from braindecode_vis.embeddings.weights import WeightedSettings, hash_weights


class VisionNetworkConfig(WeightedSettings):
    """Settings that all pretrained image networks share; each kind adds its architecture.

    Parameters
    ----------
    layer
        ``output`` is what follows the last block and the final norm. A whole number counts blocks from 0 (from the end
        if negative), a fraction in 0..1 is a depth, any other text names a module. A tuple gives one vector per layer.
    pooling
        How the tokens or places of a feature map are pooled into one vector; see `layer_readout.pool_tokens`. ``own``
        is the network's own pooled output.
    project
        Apply the final norm and output projection of the network (a CLIP network) to the tokens, as some generators
        need.
    normalise
        Normalise every vector to length one; otherwise the network's own length is kept. ``class`` divides all tokens
        of an image by the length of its class token, as Versatile Diffusion needs them.
    precision
        Number precision inside the network. The vectors are in single precision.
    batch_size
        Settings of the computation that do not change its result.
    """

    layer: Layer | tuple[Layer, ...] = OUTPUT
    pooling: Pooling = "own"
    project: bool = False
    normalise: bool | Literal["class"] = False
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _check_layer(self) -> Self:
        for layer in self.layers:
            check_choice(layer, self.pooling, self.project)
        if isinstance(self.layer, tuple) and (not self.layer or self.pooling in ("tokens", "patches")):
            raise ValueError(f"pooling {self.pooling!r} takes one layer, not {list(self.layer)}")
        if self.normalise == "class" and self.pooling != "tokens":
            raise ValueError(
                f"normalise class needs tokens, but pooling is {self.pooling}; set pooling to tokens"
            )
        return self

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers to read, always as a tuple."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    @property
    def family(self) -> str:
        """Library and architecture, the first part of the space's name."""
        raise NotImplementedError

    def make_transform(self) -> Transform:
        """Return the validation transform."""
        raise NotImplementedError

    def make_tower(self) -> Tower:
        """Return the network with its weights, in evaluation mode and frozen."""
        raise NotImplementedError

    def build(self) -> VisionNetworkEncoder:
        """Return the encoder; the network is loaded when the first image comes."""
        return VisionNetworkEncoder(self)

    def check_files(self) -> None:
        """Raise `ConfigError` unless there are weights or they may be downloaded."""
        if not (self.allow_download or may_download()):
            self.find_weights()

    @property
    def digest(self) -> str:
        """Name of the weights: the hash of their bytes, or the seed of random ones, which is 0."""
        path = self.find_weights()
        # The same file in another architecture is another encoder.
        suffix = f"-{hash_json(self.model_args)[:8]}" if self.model_args else ""
        return ("random-0" if path is None else hash_weights(path)) + suffix

    @property
    def revision(self) -> int:
        """Number of the reading, raised where the same settings once gave other vectors.

        2 where several layers are read in one pass and one is a module by name: a ReLU behind it worked in place.
        """
        return (
            2
            if len(self.layers) > 1 and any(isinstance(one, str) and one != OUTPUT for one in self.layers)
            else 1
        )

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields, the digest of the weights, and the revision from the second on."""
        fields = {**super().hashed_fields(), "weights_digest": self.digest}
        return fields if self.revision == 1 else {**fields, "revision": self.revision}


class VisionNetworkEncoder(ImageEncoder):
    """A frozen pretrained network as an image encoder.

    Parameters
    ----------
    config
        One of the pretrained kinds.
    """

    def __init__(self, config: VisionNetworkConfig) -> None:
        self.config = config
        self._tower: Tower | None = None
        self._transform: Transform | None = None
        self._space: str | None = None

    @property
    def transform(self) -> Transform:
        """The validation transform."""
        if self._transform is None:
            self._transform = self.config.make_transform()
        return self._transform

    @property
    def normalised(self) -> bool:
        """Whether every vector has length one."""
        return self.config.normalise is True

    @property
    def space(self) -> str:
        """Name with architecture, digest of the weights, layer, pooling, length and transform."""
        if self._space is None:  # finding and hashing weights is done once
            self._space = self._name_space()
        return self._space

    def _name_space(self) -> str:
        config, digest = self.config, self.config.digest
        layer = "+".join(map(str, config.layers))
        parts = [
            config.family,
            digest if digest.startswith("random") else f"weights={digest[:12]}",
            layer if layer == OUTPUT else f"layer={layer}",
            config.pooling + "-projected" * config.project,
            {False: "raw", True: "unit", "class": "class-unit"}[config.normalise],
            self.transform.name,
        ]
        parts += [config.precision] * (config.precision != "float32")
        return "/".join(parts + [f"revision={config.revision}"] * (config.revision > 1))

    def load(self) -> Tower:
        """Return the network, loaded once and moved to its device."""
        if self._tower is None:
            import torch

            self._tower = self.config.make_tower()
            self._tower.network.to(
                choose_device(self.config.device, setting="target.device"), memory_format=torch.channels_last
            )
        return self._tower

    def forward(self, inputs: Any) -> Any:
        """Return the vectors of transformed images, keeping the graph: for networks that are trained through.

        Parameters
        ----------
        inputs : float tensor of shape (n, 3, side, side)
            Normalised images on the network's device.
        """
        config = self.config
        vectors = read_layers(
            self.load(), inputs, layers=config.layers, pooling=config.pooling, project=config.project
        )
        if config.normalise == "class":
            if not self.load().has_class:
                raise ConfigError(
                    "target.normalise is class, but this network has no class token; choose a CLIP or DINO network."
                )
            vectors = vectors / vectors[:, :1].norm(dim=-1, keepdim=True).clamp_min(1e-12)
        elif config.normalise:
            # A vector of zeros stays one, instead of becoming NaN.
            vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return vectors

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features) or (n_images, n_tokens, n_features).

        Parameters
        ----------
        images
            uint8 arrays of shape (height, width, 3), of any size.
        """
        import torch

        rows = [self._encode_batch(torch.from_numpy(batch)) for batch in self._prepare(images)]
        if rows:
            return np.concatenate(rows) if len(rows) > 1 else rows[0]  # one batch needs no copy
        # No image: the shape of a row is found by encoding a grey one.
        grey = torch.full((1, self.transform.size, self.transform.size, 3), 128, dtype=torch.uint8)
        return self._encode_batch(grey)[:0]

    def _prepare(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        ready = map_ahead(
            self.transform.resize_and_crop, images,
            workers=self.config.workers, ahead=2 * self.config.batch_size,
        )  # fmt: skip
        while chunk := list(islice(ready, self.config.batch_size)):
            yield np.stack(chunk)

    def _encode_batch(self, batch: Any) -> np.ndarray:
        import torch

        device = choose_device(self.config.device, setting="target.device")
        dtype = getattr(torch, self.config.precision)
        with (
            torch.inference_mode(),
            autocast(device, dtype),
            repeatable_convolutions(),
        ):
            # Bytes travel to the GPU and become floats there, a quarter of the traffic.
            inputs = self.transform.normalise(batch.to(device, non_blocking=True))
            return self.forward(inputs).float().cpu().numpy()
