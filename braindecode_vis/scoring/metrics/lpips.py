"""LPIPS: how far apart two images are in the layers of a network, weighted by human ratings.

Feature maps of torchvision's AlexNet or VGG-16 are brought to length one at every place; their squared difference is
weighted by one learned number per channel, averaged over places and added over five layers (version 0.1 of the
published weights). Images are resized to 256 x 256 and enter between -1 and 1; that size is a choice of ours.

References
----------
Zhang et al. (2018), The unreasonable effectiveness of deep features as a perceptual metric, arXiv:1801.03924.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.stimuli import Images
from braindecode_vis.embeddings.weights import read_state
from braindecode_vis.scoring.metrics.feature_networks import FIRST_SIDE, load_trunk, normalise, resize_twice

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
