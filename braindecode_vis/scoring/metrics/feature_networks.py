"""The networks behind the feature rows of the metric suite: input and layer of each row, and LPIPS.

Owns, for each network, the size that images are brought to, the normalisation, the layers and the file of weights, and
the correlation of every decoded image with every seen one in its features, each image encoded once.
Images of any size are first resized to 256 x 256 and then to the row's own size (bilinear, antialiased), without a
crop. Weights are local files: what has none is not computed.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207: the rows. Krizhevsky et al. (2012); Szegedy et al. (2016),
arXiv:1512.00567; Radford et al. (2021), arXiv:2103.00020; Tan and Le (2019), arXiv:1905.11946; Caron et al. (2020),
SwAV, arXiv:2006.09882; Fu et al. (2023), DreamSim, arXiv:2306.09344.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import choose_device, repeatable_convolutions
from braindecode_vis.base.stimuli import ImageRows, Images
from braindecode_vis.embeddings.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Triple
from braindecode_vis.embeddings.weights import load_state, read_state, weights_only

Comparison = Literal["two_way", "distance"]
#: What extracts features: images of shape (n, 3, side, side), normalised, to one (n, n_features) tensor per space.
Extract = Callable[[Any], "dict[str, Any]"]

LARGEST_IN_MEMORY = 1 << 30  # bytes of seen features; beyond, they lie in a temporary file
FEATURE_CHUNK = 1 << 14  # features that are correlated at a time in double precision
BLOCK = 256  # decoded images whose features are held at a time
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

    def prepare(self, images: Images, device: str) -> Any:
        """Return a float32 tensor of shape (n_images, 3, side, side), resized twice and normalised."""
        return normalise(resize_twice(images, self.side, device), self.mean, self.std)


def resize_twice(images: Images, side: int, device: str = "cpu") -> Any:
    """Return images between 0 and 1, resized to 256 and then to `side`, as (n_images, 3, side, side) in float32.

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3), or `ImageRows` of any sizes
    side
        Pixels of the result.
    device
        Where it is computed.
    """
    import torch

    # Images that are read from files may differ in size, until they have the first one.
    given = [image[None] for image in images] if isinstance(images, ImageRows) else [images]
    first = []
    for part in given:
        planes = torch.from_numpy(np.ascontiguousarray(part)).to(device).permute(0, 3, 1, 2).float() / 255
        first.append(_resize(planes, FIRST_SIDE))
    return _resize(torch.cat(first), side)


def _resize(planes: Any, side: int) -> Any:
    import torch

    if planes.shape[-2:] == (side, side):
        return planes
    return torch.nn.functional.interpolate(
        planes, size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )


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
            f"{path} is missing {missing[0]} of DreamSim's ensemble; unpack dreamsim_ensemble_checkpoint.zip there."
        )
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ConfigError("DreamSim needs its package: pip install dreamsim.") from error
    with weights_only():
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


# --- correlations in their features -------------------------------------------------------------------------------


def correlate_with_seen(
    images: Images,
    seen: np.ndarray,
    facts: NetworkFacts,
    extract: Extract,
    *,
    device: str = "cpu",
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
    spreads: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return the Pearson correlation of every image with every seen one in each space of a network.

    Every image goes through the network once. Features of the seen images are kept (in a temporary file where they
    are many), those of the others are let go batch by batch; correlations are taken in double precision.

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3), or `ImageRows`
        Distinct images.
    seen : int array of shape (n_seen,)
        Which of them were shown.
    facts, extract
        The network.
    device, batch_size
        How it runs.
    advance
        Called with the number of images done.
    spreads
        Is given, if it is there, the length of the features of each image after their own mean was taken off, shape
        (n_images,), for `identification.centre_correlations`.

    Returns
    -------
    dict
        Space to a float64 array of shape (n_images, n_seen); a constant feature vector correlates 0.
    """
    others = np.setdiff1d(np.arange(len(images)), seen)
    kept: dict[str, np.ndarray] = {}
    for rows, features in _extract(images[seen], facts, extract, device, batch_size):
        for space, values in features.items():
            if space not in kept:
                kept[space] = _allocate((len(seen), values.shape[1]))
            kept[space][rows] = values
        advance(rows.stop - rows.start)
    result = {space: np.empty((len(images), len(seen))) for space in kept}
    spreads = {} if spreads is None else spreads
    spreads |= {space: np.empty(len(images)) for space in kept}
    for space, values in kept.items():
        result[space][seen], spreads[space][seen] = _correlate(values, values)
    # Blocks of many batches, so that the features that are kept are read few times.
    block = max(batch_size, BLOCK)
    for start in range(0, len(others), block):
        rows_of_block = others[start : start + block]
        parts: dict[str, list[np.ndarray]] = {space: [] for space in kept}
        for rows, features in _extract(images[rows_of_block], facts, extract, device, batch_size):
            for space, values in features.items():
                parts[space].append(values)
            advance(rows.stop - rows.start)
        for space, values in kept.items():
            found = _correlate(np.concatenate(parts[space]), values)
            result[space][rows_of_block], spreads[space][rows_of_block] = found
    return result


def _extract(
    images: Images, facts: NetworkFacts, extract: Extract, device: str, batch_size: int
) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    import torch

    for start in range(0, len(images), batch_size):
        rows = slice(start, min(start + batch_size, len(images)))
        with torch.inference_mode(), repeatable_convolutions():
            features = extract(facts.prepare(images[rows], device))
        yield rows, {space: value.flatten(1).float().cpu().numpy() for space, value in features.items()}


def _allocate(shape: tuple[int, int]) -> np.ndarray:
    if shape[0] * shape[1] * 4 <= LARGEST_IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the closed, nameless file
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def _correlate(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return correlations of float32 rows and the lengths of those on the left, centred.

    They are multiplied in double precision, chunk by chunk of features.
    """
    means = [rows.mean(axis=1, dtype=np.float64)[:, None] for rows in (left, right)]
    product = np.zeros((len(left), len(right)))
    squares = [np.zeros(len(left)), np.zeros(len(right))]
    lengths = [np.zeros(len(left)), np.zeros(len(right))]
    for start in range(0, left.shape[1], FEATURE_CHUNK):
        chunk = slice(start, start + FEATURE_CHUNK)
        centred = []
        for number, rows in enumerate((left, right)):
            raw = rows[:, chunk].astype(np.float64)
            lengths[number] += np.einsum("ij,ij->i", raw, raw)
            raw -= means[number]
            squares[number] += np.einsum("ij,ij->i", raw, raw)
            centred.append(raw)
        product += centred[0] @ centred[1].T
    for number, axis in enumerate((1, 0)):
        norm = np.sqrt(squares[number])
        if not np.isfinite(norm).all():
            raise DataError("a network gave features that are not finite; check its weights and the images.")
        varied = norm > 1e-12 * np.sqrt(lengths[number])
        scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=varied)
        product *= np.expand_dims(scale, axis)
    return np.clip(product, -1.0, 1.0), np.sqrt(squares[0])


# --- LPIPS -----------------------------------------------------------------------------------------------------
# LPIPS: how far apart two images are in the layers of a network, weighted by human ratings.
#
# Feature maps of torchvision's AlexNet or VGG-16 are brought to length one at every place; their squared difference
# is weighted by one learned number per channel, averaged over places and added over five layers (version 0.1 of the
# published weights). Images are resized to 256 x 256 and enter between -1 and 1; that size is a choice of ours.
#
# References: Zhang et al. (2018), The unreasonable effectiveness of deep features as a perceptual metric,
# arXiv:1801.03924.


#: Layers of ``features`` after which a map is read, and the name of the weights in the package ``lpips``.
LAYERS = {"alexnet": (1, 4, 7, 9, 11), "vgg16": (3, 8, 15, 22, 29)}
_FILES = {"alexnet": "alex.pth", "vgg16": "vgg.pth"}
# Of images between -1 and 1: the ImageNet statistics as the authors rounded them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST_NORM = 1e-10  # of the authors' code, against a division by zero where a map is dark


def find_linear_weights(network: str) -> Path | None:
    """Return the published channel weights that the package ``lpips`` ships, if it is installed."""
    spec = find_spec("lpips")
    for location in list(spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / "weights" / "v0.1" / _FILES[network]
        if path.is_file():
            return path
    return None


class Lpips:
    """The distance with its two files of weights.

    Parameters
    ----------
    network
        ``alexnet`` or ``vgg16``.
    trunk
        File with torchvision's IMAGENET1K_V1 weights of that network.
    linear
        File with the published channel weights (``lin0.model.1.weight`` and so on).
    device
        ``auto``, ``cpu`` or ``cuda``.
    """

    def __init__(self, network: str, trunk: Path, linear: Path, *, device: str = "cpu") -> None:
        self.network, self.device = network, choose_device(device, setting="device")
        features = load_trunk(network, trunk, self.device)
        starts = (0, *[layer + 1 for layer in LAYERS[network][:-1]])
        self.slices = [
            features[start : stop + 1] for start, stop in zip(starts, LAYERS[network], strict=True)
        ]
        self.weights = self._read_linear(linear)

    def _read_linear(self, path: Path) -> list[Any]:
        state, weights = read_state(path), []
        for number, layers in enumerate(self.slices):
            channels = [layer.out_channels for layer in layers if hasattr(layer, "out_channels")][-1]
            name = f"lin{number}.model.1.weight"
            if name not in state or state[name].numel() != channels:
                raise DataError(
                    f"{path} does not hold LPIPS weights of {self.network}: {name} with {channels} channels is "
                    f"missing; use v0.1/{_FILES[self.network]} of the package lpips."
                )
            weights.append(state[name].float().flatten().to(self.device))
        return weights

    def extract(self, images: Images) -> list[Any]:
        """Return the normalised map of each layer, shape (n_images, n_channels, height, width).

        Parameters
        ----------
        images : uint8 array of shape (n_images, height, width, 3)
        """
        # (n_images, 3, 256, 256) between -1 and 1.
        values = normalise(2 * resize_twice(images, FIRST_SIDE, self.device) - 1, _SHIFT, _SCALE)
        maps = []
        for layers in self.slices:
            values = layers(values)
            maps.append(values / (values.square().sum(dim=1, keepdim=True).sqrt() + SMALLEST_NORM))
        return maps

    def compare(self, left: list[Any], right: list[Any]) -> Any:
        """Return the distance of each pair of maps, shape (n_pairs,)."""
        total = 0.0
        for a, b, weight in zip(left, right, self.weights, strict=True):
            places = (
                (a - b).square().mean(dim=(2, 3))
            )  # (n_pairs, n_channels): the mean and the weights commute
            total = total + places @ weight
        return total

    def compute_pairs(
        self,
        images: Images,
        pairs: np.ndarray,
        *,
        batch_size: int = 8,
        advance: Callable[[int], None] = lambda n: None,
    ) -> np.ndarray:
        """Return the distance of each pair of images; an image of several pairs in a batch is encoded once.

        Parameters
        ----------
        images : uint8 array of shape (n_images, height, width, 3)
        pairs : int array of shape (n_pairs, 2)
            Rows of `images`.
        batch_size
            Images that go through the network together.
        advance
            Called with the number of pairs done.

        Returns
        -------
        float array of shape (n_pairs,)
            0 for equal images, larger for images that look less alike.
        """
        import torch

        values = np.empty(len(pairs))
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # pairs of one image lie together
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                used, place = np.unique(pairs[rows], return_inverse=True)
                ends = torch.from_numpy(place.reshape(-1, 2)).to(self.device)
                maps = self.extract(images[used])
                left, right = ([layer[ends[:, side]] for layer in maps] for side in (0, 1))
                values[rows] = self.compare(left, right).double().cpu().numpy()
                advance(len(rows))
        return values
