"""Low-rank changes of a frozen image network (LoRA), learnt through the contrast with the brain.

A weight W of the network is used as W + s B A, with B zero at the start, so that the first step sees the frozen
network. The sum is put in W's place for the length of one forward pass. Own code instead of the package peft, because
the weights of attention here are plain parameters of the libraries' modules (open_clip's attention never calls a
linear layer), because the moving averages of a training must share one frozen network, and because peft would be one
more heavy dependency for forty lines. The price is the gradient of each changed W, one product more than LoRA needs.

The network stays in evaluation mode and outside of the trained module: checkpoints and fitted encoders hold A and B,
never the network.

References
----------
Hu et al. (2022), LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import autocast
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.layer_readout import OUTPUT, resolve_layer
from braindecode_vis.embeddings.transforms import map_ahead
from braindecode_vis.training.image_config import ImageTowerConfig, TunableTarget

ImageSource = StimulusSet | Callable[[Sequence[str]], Iterable[np.ndarray]]
Shapes = dict[str, tuple[int, int]]
#: open_clip's output projection, a parameter of its own that is multiplied from the right: (n_in, n_out).
PROJECTION = "proj"
#: Ends of the names of matrices that hold query, key and value below one another, in open_clip and timm.
JOINT = ("in_proj_weight", "qkv.weight")


class _Reader(nn.Module):
    """A network whose forward pass reads the layer of its settings."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = encoder.load().network

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward(self.encoder.transform.normalise(images))


class FrozenTower:
    """An image network that is loaded when it is first needed, and shared by every copy of a model.

    Parameters
    ----------
    target
        Its settings.
    """

    def __init__(self, target: TunableTarget) -> None:
        self.encoder = target.build()
        self._reader: _Reader | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTower:
        return self

    def load(self) -> _Reader:
        """Return the network as a module from uint8 squares to the vectors of its layer."""
        if self._reader is None:
            with torch.inference_mode(False):  # its weights must be able to take part in training later
                self._reader = _Reader(self.encoder)
        return self._reader

    def find_weights(self, config: ImageTowerConfig) -> Shapes:
        """Return name and shape of every weight that changes; see `ImageTowerConfig`.

        Raises
        ------
        ConfigError
            If there is no such block or no such weight.
        """
        tower = self.encoder.load()
        # By identity: weights may be plain parameters of modules that share a type.
        names = {id(p): name for name, p in tower.network.named_parameters()}
        found: Shapes = {}
        self._check_reads_output(config)
        for number in self._choose_blocks(config, len(tower.blocks)):
            for path, module in tower.blocks[number].named_modules():
                # timm and open_clip both call their attention attn.
                if config.modules == "attention" and "attn" not in path:
                    continue
                for weight in module.parameters(recurse=False):
                    if isinstance(module, nn.Linear | nn.MultiheadAttention) and weight.ndim == 2:
                        found[names[id(weight)]] = (weight.shape[0], weight.shape[1])
        if config.modules == "tower":
            projection = dict(tower.network.named_parameters()).get(PROJECTION)
            if projection is not None:
                found[PROJECTION] = (projection.shape[0], projection.shape[1])
        if not found:
            raise ConfigError(
                f"encoder.image_tower finds no linear weight of {config.modules} in {config.target.family}; set "
                "encoder.image_tower.modules to all, or choose a transformer."
            )
        return found

    @staticmethod
    def _check_reads_output(config: ImageTowerConfig) -> None:
        if config.modules == "tower" and list(config.target.layers) != [OUTPUT]:
            raise ConfigError(
                "encoder.image_tower.modules is tower, whose last map comes after the output, but the "
                f"target reads the layer {config.target.layer!r}; set modules to all, or target.layer to output."
            )

    def _choose_blocks(self, config: ImageTowerConfig, n_blocks: int) -> list[int]:
        if config.layers is not None:
            for number in config.layers:
                if not -n_blocks <= number < n_blocks:
                    raise ConfigError(
                        f"encoder.image_tower.layers names {number}, but {config.target.family} has the blocks 0 to "
                        f"{n_blocks - 1}."
                    )
            return sorted({number % n_blocks for number in config.layers})
        read = config.target.layers
        if all(isinstance(layer, int | float) for layer in read):
            # Blocks behind the layer that is read would learn nothing.
            n_blocks = max(resolve_layer(layer, n_blocks) for layer in read) + 1
        return list(range(n_blocks))


@lru_cache(maxsize=1)
def _open_tower(kind: Any, settings: str, digest: str) -> FrozenTower:
    # Not from JSON at once: in that mode the word "random" would be taken for a path of weights.
    return FrozenTower(kind.model_validate(json.loads(settings)))


def open_tower(target: TunableTarget) -> FrozenTower:
    """Return the frozen network of these settings; the last one is kept, so that refits load it once."""
    kind: Any = type(target)
    return _open_tower(kind, target.model_dump_json(), target.digest)


class AdaptedTower(nn.Module):
    """A frozen image network with learned low-rank changes; its parameters are A (`down`) and B (`up`) alone.

    Parameters
    ----------
    config
        The settings.
    shapes
        Names and shapes of the weights that change, if known; without them the network is loaded to find out.
    """

    def __init__(self, config: ImageTowerConfig, shapes: Shapes | None = None) -> None:
        super().__init__()
        self.config = config
        self.frozen = open_tower(config.target)
        self.shapes = self.frozen.find_weights(config) if shapes is None else shapes
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, shape in self.shapes.items():
            n_parts = self._count_parts(name)
            n_out, n_in = shape if name != PROJECTION else (shape[1], shape[0])
            for _ in range(n_parts):
                # A random, B zero, so that the product is zero at the start.
                down = torch.empty(config.rank, n_in)
                if config.start == "gaussian":
                    nn.init.normal_(down, std=1 / config.rank)
                else:
                    nn.init.kaiming_uniform_(down, a=5**0.5)
                self.down.append(nn.Parameter(down))
                self.up.append(nn.Parameter(torch.zeros(n_out // n_parts, config.rank)))

    def _count_parts(self, name: str) -> int:
        """Return how many changes a weight has, one below the other."""
        return 3 if self.config.modules == "tower" and name.endswith(JOINT) else 1

    def merge(self) -> dict[str, Tensor]:
        """Return the changed weights of the network by name, with their gradient to A and B."""
        weights = dict(self._load().network.named_parameters())
        merged, pairs = {}, iter(zip(self.down, self.up, strict=True))
        with autocast(self.down[0].device):
            for name in self.shapes:
                # (n_out, rank) @ (rank, n_in); the gradient goes to A and B, not to W
                parts = [up @ down for down, up in islice(pairs, self._count_parts(name))]
                change = torch.cat(parts) if len(parts) > 1 else parts[0]
                change = change.T if name == PROJECTION else change
                merged[name] = weights[name].detach() + self.config.scale * change
        return merged

    def _load(self) -> _Reader:
        reader = self.frozen.load()
        device = self.down[0].device
        if next(reader.parameters()).device != device:
            reader.to(device)
        return reader

    def forward(self, images: Tensor) -> Tensor:
        """Return flat float32 vectors of shape (n, n_features) of uint8 squares of shape (n, side, side, 3)."""
        reader, merged = self._load(), self.merge()
        names, weights = [f"network.{name}" for name in merged], list(merged.values())
        # the arithmetic of the frozen network's own settings
        dtype = getattr(torch, self.config.target.precision)

        def run(chunk: Tensor, *weights: Tensor) -> Tensor:
            with autocast(chunk.device, dtype):
                vectors = functional_call(reader, dict(zip(names, weights, strict=True)), (chunk,))
            return vectors.float().flatten(1)

        chunks = images.split(self.config.images_together)
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([run(chunk, *weights) for chunk in chunks])
        again: Any = checkpoint  # nothing random happens in the network
        return torch.cat(
            [again(run, chunk, *weights, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        )

    def prepare(self, images: ImageSource, ids: Sequence[str]) -> np.ndarray:
        """Return the uint8 squares that enter the network, shape (n, side, side, 3), of the images with these ids."""
        crop = self.frozen.encoder.transform.resize_and_crop
        workers = self.config.target.workers  # threads, which decode image files as well
        if isinstance(images, StimulusSet):
            found = list(map_ahead(lambda i: crop(images.read_image(i)), ids, workers=workers))
        else:
            found = list(map_ahead(crop, images(ids), workers=workers))
        if len(found) != len(ids):
            raise DataError(f"{len(ids)} images were requested, but encoder.images gave {len(found)}.")
        return np.stack(found)

    @torch.no_grad()
    def embed(self, images: ImageSource, ids: Sequence[str]) -> np.ndarray:
        """Return float32 vectors of shape (n, n_features) of the images with these ids, by the tuned network."""
        device, rows, left = self.down[0].device, [], iter(ids)
        while some := list(islice(left, self.config.images_together)):
            squares = torch.from_numpy(self.prepare(images, some)).to(device)
            rows.append(self(squares).cpu().numpy())
        return np.concatenate(rows)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return A and B as a group for the optimiser."""
        return [{"params": [*self.down, *self.up], "lr_scale": self.config.lr_scale}]


def check_same_target(config: ImageTowerConfig, space: str) -> None:
    """Raise `ConfigError` unless the targets are vectors of the network that is tuned."""
    own = open_tower(config.target).encoder.space
    if own != space:
        raise ConfigError(
            f"encoder.image_tower tunes the network of {own!r}, but the targets are those of {space!r}; "
            "only the network that computes the targets can be tuned, so set target and "
            "encoder.image_tower.target to the same network."
        )
