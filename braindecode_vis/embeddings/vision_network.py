"""The one image encoder behind every pretrained network: batches in, vectors of a named space out.

Owns batching, device, arithmetic, the order of images and the name of the space. Images are prepared by threads while
the network works on the batch before, so that the loop costs little more than the bare network. Which network, which
weights and which transform is the configuration's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.devices import autocast, choose_device, repeatable_convolutions
from braindecode_vis.embeddings.layer_readout import OUTPUT, Tower, read_layers
from braindecode_vis.embeddings.transforms import Transform, map_ahead
from braindecode_vis.embeddings.weights import NetworkConfig


class NetworkEncoder:
    """A frozen pretrained network as an image encoder.

    Parameters
    ----------
    config
        One of the pretrained kinds.
    """

    def __init__(self, config: NetworkConfig) -> None:
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
        return self.config.normalise

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
            "unit" if config.normalise else "raw",
            self.transform.name,
        ]
        return "/".join(parts + [config.precision] * (config.precision != "float32"))

    def load(self) -> Tower:
        """Return the network, loaded once and moved to its device."""
        if self._tower is None:
            import torch

            self._tower = self.config.make_tower()
            self._tower.network.to(
                choose_device(self.config.device, setting="target.device"), memory_format=torch.channels_last
            )
        return self._tower

    def fit(self, images: Iterable[np.ndarray]) -> NetworkEncoder:
        """Return self: the network is pretrained and never sees a training image."""
        return self

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
        if config.normalise:
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
            return np.concatenate(rows) if len(rows) > 1 else rows[0]
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
            inputs = self.transform.normalise(batch.to(device, non_blocking=True))
            return self.forward(inputs).float().cpu().numpy()

    def write(self, folder: Path) -> None:
        """Nothing is fitted, so nothing is written."""
