"""Prepares images for a pretrained network: the validation transform, never the training one.

Owns resize, centre crop and normalisation as one value with a name, so that two spaces that differ in nothing but the
transform have different names. Random crops and flips do not exist here: targets must be the same every time. Also
holds the thread pool that prepares images ahead of the network. Knows no network.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

Resize = Literal["shortest", "squash", "longest"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Triple = tuple[float, float, float]
T = TypeVar("T")

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
_NORMS = {
    (IMAGENET_MEAN, IMAGENET_STD): "imagenet",
    (CLIP_MEAN, CLIP_STD): "clip",
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)): "half",
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)): "none",
}


@dataclass(frozen=True)
class Transform:
    """Resize, centre crop, normalise.

    Parameters
    ----------
    size
        Side of the square that the network takes, pixels.
    resize_to
        Side that the resize aims at; None takes `size`.
    resize
        ``shortest`` brings the shorter side to `resize_to` and keeps the aspect, ``squash`` brings both sides there,
        ``longest`` brings the longer side there and pads.
    interpolation
        Of the antialiased resize.
    mean, std
        Of the three colours in 0..1.
    fill
        Grey value of the padding, 0 to 255.
    first_side
        The shorter side is brought there before everything else (bilinear); None leaves the image as it is. A second
        resize does not undo the first.
    """

    size: int
    resize_to: int | None = None
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    fill: int = 0
    first_side: int | None = None

    @property
    def name(self) -> str:
        """Everything above in one word."""
        norm = _NORMS.get((self.mean, self.std))
        if norm is None:
            norm = (
                "mean" + ",".join(f"{v:g}" for v in self.mean) + "std" + ",".join(f"{v:g}" for v in self.std)
            )
        parts = [
            f"{self.resize}{self.resize_to or self.size}",
            self.interpolation,
            f"centre{self.size}",
            norm,
        ]
        parts += [f"fill{self.fill}"] * bool(self.fill)
        return "-".join([f"first{self.first_side}"] * bool(self.first_side) + parts)

    def resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        """Return the uint8 square of shape (size, size, 3).

        Parameters
        ----------
        image : uint8 array of shape (height, width, 3)
        """
        if self.first_side is not None:
            height, width = image.shape[:2]
            image = _resize(image, _aim_shortest(height, width, self.first_side), "bilinear")
        image = _resize(image, self._aim(*image.shape[:2]), self.interpolation)
        return crop_or_pad(image, self.size, self.fill)

    def _aim(self, height: int, width: int) -> tuple[int, int]:
        side = self.resize_to or self.size
        if self.resize == "squash":
            return side, side
        if self.resize == "longest":
            ratio = max(height, width) / side
            return round(height / ratio), round(width / ratio)
        return _aim_shortest(height, width, side)

    def normalise(self, batch: Any) -> Any:
        """Return a float32 tensor of shape (n, 3, size, size), on the device of the batch.

        Parameters
        ----------
        batch : uint8 tensor of shape (n, size, size, 3)
        """
        import torch

        # A permuted (n, h, w, 3) block is what torch calls channels-last: nothing is copied.
        values = batch.permute(0, 3, 1, 2).float()
        mean = torch.tensor(self.mean, device=batch.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(3, 1, 1)
        # (v / 255 - mean) / std in two passes over the batch instead of four.
        return values.mul_(1 / (255 * std)).sub_(mean / std)


def _aim_shortest(height: int, width: int, side: int) -> tuple[int, int]:
    # The longer side is cut, not rounded, as torchvision does.
    if width <= height:
        return int(side * height / width), side
    return side, int(side * width / height)


def _resize(image: np.ndarray, shape: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    if shape == image.shape[:2]:
        return image
    from PIL import Image

    method = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(shape[::-1], method))


def crop_or_pad(image: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    """Return the centre square of side `size`; a side that is too short is padded with `fill`."""
    missing = [max(0, size - side) for side in image.shape[:2]]
    if any(missing):
        widths = [(gap // 2, gap - gap // 2) for gap in missing]
        image = np.pad(image, [*widths, (0, 0)], constant_values=fill)
    top, left = (
        round((side - size) / 2) for side in image.shape[:2]
    )  # torchvision rounds halves as Python does
    return image[top : top + size, left : left + size]


def floor_crop(size: int, crop_fraction: float) -> int:
    """Return the side to resize to, so that a crop of `size` keeps `crop_fraction` of it (timm's rule)."""
    return math.floor(size / crop_fraction)


def map_ahead(
    function: Callable[[Any], T], items: Iterable[Any], *, workers: int, ahead: int = 64
) -> Iterator[T]:
    """Yield ``function(item)`` in order, computed by threads up to `ahead` items in advance.

    Decoding and resizing an image leave the interpreter lock, so threads are enough. The order never depends on the
    number of threads; an exception arrives at the item that caused it.

    Parameters
    ----------
    function
        Called once per item.
    items
        Read lazily from the calling thread.
    workers
        Number of threads; 0 computes in the calling thread.
    ahead
        Most results in flight: the bound on memory.

    Examples
    --------
    >>> list(map_ahead(lambda x: x * x, range(4), workers=2))
    [0, 1, 4, 9]
    """
    if workers == 0:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(workers)
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:  # waiting for the oldest keeps the order and bounds the memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # the caller may stop early, or an item may fail
