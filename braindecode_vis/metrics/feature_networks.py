"""The networks behind the feature rows of the metric suite, with the input and the layer that each row is read from.

Owns, for each network, the size that images are brought to, the normalisation, the layers and the file of weights.
Images of any size are first resized to 256 x 256 and then to the row's own size (bilinear, antialiased), without a
crop. Weights are local files: what has none is not computed.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207: the rows. Krizhevsky et al. (2012); Szegedy et al. (2016),
arXiv:1512.00567; Radford et al. (2021), arXiv:2103.00020; Tan and Le (2019), arXiv:1905.11946; Caron et al. (2020),
SwAV, arXiv:2006.09882; Fu et al. (2023), DreamSim, arXiv:2306.09344.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.checks import ConfigError
from braindecode_vis.devices import choose_device
from braindecode_vis.embeddings.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Triple
from braindecode_vis.embeddings.weights import load_state, read_state

Comparison = Literal["two_way", "distance"]
#: What extracts features: images of shape (n, 3, side, side), normalised, to one (n, n_features) tensor per space.
Extract = Callable[[Any], "dict[str, Any]"]

FIRST_SIDE = 256  # pixels; every image, whatever its size, is brought here first
_DREAMSIM_FILES = (
    "dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar", "clip_vitb16_pretrain.pth.tar", "ensemble_lora",
)  # fmt: skip


@dataclass(frozen=True)
class NetworkFacts:
    """What the suite needs to know of a network before it is loaded.

    Parameters
    ----------
    spaces
        Names of the feature spaces that one pass gives.
    comparison
        ``two_way`` identification, or the mean correlation ``distance`` of pairs.
    side
        Pixels of the square that enters.
    mean, std
        Of the three colours in 0..1.
    needs
        Which file holds the weights.
    load
        Returns the network's `Extract` from that file, on the given device.
    """

    spaces: tuple[str, ...]
    comparison: Comparison
    side: int
    needs: str
    load: Callable[[Path, str], Extract]
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def prepare(self, images: np.ndarray, device: str) -> Any:
        """Return a float32 tensor of shape (n_images, 3, side, side), resized twice and normalised."""
        return normalise(resize_twice(images, self.side, device), self.mean, self.std)


def resize_twice(images: np.ndarray, side: int, device: str = "cpu") -> Any:
    """Return images between 0 and 1, resized to 256 and then to `side`, as (n_images, 3, side, side) in float32.

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3)
    side
        Pixels of the result.
    device
        Where it is computed.
    """
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    for size in (FIRST_SIDE, side):
        if planes.shape[-2:] != (size, size):
            planes = torch.nn.functional.interpolate(
                planes, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
    return planes


def normalise(planes: Any, mean: Triple, std: Triple) -> Any:
    """Return (planes - mean) / std, colour by colour."""
    import torch

    shift, scale = (torch.tensor(v, device=planes.device).view(3, 1, 1) for v in (mean, std))
    return (planes - shift) / scale


# --- the networks -----------------------------------------------------------------------------------------


def _receive(network: Any, path: Path, device: str, *, what: str, drop: tuple[str, ...] = ()) -> Any:
    """Return the network with the weights of the file, in evaluation mode; tensors under `drop` are left."""
    import torch

    state = read_state(path)
    for name in network.state_dict():  # files older than this counter lack it, and nothing reads it here
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=torch.int64))
    network = network.to_empty(device="cpu")
    load_state(network, state, path=path, what=what, ignore=lambda name: name.startswith(drop))
    return network.eval().requires_grad_(False).to(device)


def build_empty(architecture: str, **arguments: Any) -> Any:
    """Return a network of torchvision without memory for its weights."""
    import torch
    import torchvision

    with torch.device("meta"):
        return torchvision.models.get_model(architecture, weights=None, **arguments)


def load_trunk(architecture: str, path: Path, device: str) -> Any:
    """Return the convolutions of torchvision's AlexNet or VGG as a `torch.nn.Sequential`, with their weights."""
    network = build_empty(architecture)
    network.classifier = None
    _receive(network, path, device, what=f"torchvision's {architecture}", drop=("classifier.",))
    for layer in network.features:
        if hasattr(layer, "inplace"):
            layer.inplace = False  # or the maps read before it would change
    return network.features


def _load_alexnet(path: Path, device: str) -> Extract:
    features = load_trunk("alexnet", path, device)

    def extract(inputs: Any) -> dict[str, Any]:
        second = features[:5](inputs)  # up to and with features.4
        return {"alexnet-2": second, "alexnet-5": features[5:12](second)}

    return extract


def _load_pooled(
    space: str, architecture: str, what: str, drop: tuple[str, ...], arguments: Mapping[str, Any]
) -> Callable[[Path, str], Extract]:
    """Return a loader of a network whose pooled features are what enters its classifier."""

    def load(path: Path, device: str) -> Extract:
        from torch import nn

        network = build_empty(architecture, **arguments)
        head = "classifier" if hasattr(network, "classifier") else "fc"
        setattr(network, head, nn.Identity())
        network = _receive(network, path, device, what=what, drop=(f"{head}.", *drop))
        return lambda inputs: {space: network(inputs)}

    return load


def _load_clip(path: Path, device: str) -> Extract:
    from braindecode_vis.embeddings.openclip import OpenClipConfig

    # OpenAI's network has the activation called QuickGELU; the plain architecture would take the same tensors.
    config = OpenClipConfig(architecture="ViT-L-14-quickgelu", pretrained="openai", weights=path)
    tower = config.make_tower()
    tower.network.eval().requires_grad_(False).to(device)
    return lambda inputs: {"clip-vit-l-14": tower.forward(inputs)}


def _load_dreamsim(path: Path, device: str) -> Extract:
    missing = [name for name in _DREAMSIM_FILES if not (path / name).exists()]
    if missing:
        raise ConfigError(
            f"{path} lacks {missing[0]} of DreamSim's ensemble; unpack dreamsim_ensemble_checkpoint.zip there."
        )
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ConfigError("DreamSim needs its package: pip install dreamsim.") from error
    network, _ = dreamsim(pretrained=True, device=device, cache_dir=str(path), dreamsim_type="ensemble")
    # The package centres and scales each embedding, so its cosine distance is the correlation distance.
    return lambda inputs: {"dreamsim": network.embed(inputs)}


NETWORKS: dict[str, NetworkFacts] = {
    "alexnet": NetworkFacts(
        ("alexnet-2", "alexnet-5"), "two_way", 256,
        "torchvision's alexnet IMAGENET1K_V1, alexnet-owt-7be5be79.pth", _load_alexnet,
    ),
    "inception": NetworkFacts(
        ("inception-v3",), "two_way", 342, "torchvision's inception_v3 IMAGENET1K_V1, inception_v3_google-0cc3c7bd.pth",
        _load_pooled(
            "inception-v3", "inception_v3", "torchvision's inception_v3", ("AuxLogits.",),
            {"transform_input": True, "aux_logits": False, "init_weights": False},
        ),
    ),
    "clip": NetworkFacts(
        ("clip-vit-l-14",), "two_way", 224,
        "OpenAI's CLIP ViT-L/14, open_clip_model.safetensors of timm/vit_large_patch14_clip_224.openai",
        _load_clip, CLIP_MEAN, CLIP_STD,
    ),
    "efficientnet_b1": NetworkFacts(
        ("efficientnet-b1",), "distance", 255,
        "torchvision's efficientnet_b1 IMAGENET1K_V2, efficientnet_b1-c27df63c.pth",
        _load_pooled("efficientnet-b1", "efficientnet_b1", "torchvision's efficientnet_b1", (), {}),
    ),
    "swav": NetworkFacts(
        ("swav-resnet50",), "distance", 224, "facebookresearch/swav's ResNet-50, swav_800ep_pretrain.pth.tar",
        _load_pooled("swav-resnet50", "resnet50", "SwAV's ResNet-50", ("projection_head.", "prototypes."), {}),
    ),
    "dreamsim": NetworkFacts(
        ("dreamsim",), "distance", 224, "the package dreamsim and the folder of its unpacked ensemble checkpoint",
        _load_dreamsim, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0),
    ),
}  # fmt: skip


def load_network(name: str, path: Path, device: str = "auto") -> Extract:
    """Return the features of a network of `NETWORKS` as a function of its prepared input.

    Parameters
    ----------
    name
        A key of `NETWORKS`.
    path
        File (or folder) with its weights.
    device
        ``auto``, ``cpu`` or ``cuda``.
    """
    return NETWORKS[name].load(path, choose_device(device, setting="device"))
