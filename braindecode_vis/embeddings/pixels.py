"""Pixels and their principal components as target spaces.

Both can be turned back into images, which makes them the plainest route to a reconstruction. The components
are fitted on training images only, and their digest is part of the space's name, so that vectors of two fits
never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.checks import DataError
from braindecode_vis.settings import Settings
from braindecode_vis.stimuli import crop_square


class PixelsConfig(Settings):
    """Grey or colour values in 0..1 as the target.

    Parameters
    ----------
    size
        Height and width after an antialiased resize; None keeps the size of the images.
    colour
        Keep the three colours instead of their luminance.
    """

    kind: Literal["pixels"] = "pixels"
    size: int | None = Field(default=None, ge=2)
    colour: bool = False

    fitted_on_training_images: ClassVar[bool] = False

    def build(self) -> PixelEncoder:
        """Return the encoder."""
        return PixelEncoder(self)

    def read(self, folder: Path) -> PixelEncoder:
        """Return the encoder whose image size was written into `folder`."""
        return PixelEncoder.read(self, folder)


class PixelEncoder:
    """Images as vectors of their own grey or colour values."""

    def __init__(self, config: PixelsConfig, *, shape: tuple[int, int, int] | None = None) -> None:
        self.config = config
        self.shape = shape

    @property
    def space(self) -> str:
        """Name with height, width and number of colours."""
        if self.shape is None:
            raise DataError("the pixel space has no size before images were seen; fit it on training images.")
        return "pixels/" + "x".join(map(str, self.shape))

    def fit(self, images: Iterable[np.ndarray]) -> PixelEncoder:
        """Take the image size from the first training image."""
        first = next(iter(images), None)
        if first is None:
            raise DataError("the pixel space needs at least one training image.")
        self.shape = prepare_pixels(first, self.config.size, self.config.colour).shape
        return self

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, height * width * colours) in 0..1."""
        rows = []
        for image in images:
            pixels = prepare_pixels(image, self.config.size, self.config.colour)
            if self.shape is not None and pixels.shape != self.shape:
                raise DataError(
                    f"an image of size {pixels.shape} cannot enter the space {self.space!r}; "
                    "set target.size to bring all images to one size."
                )
            rows.append(pixels.ravel())
        return np.stack(rows) if rows else np.empty((0, int(np.prod(self.shape or (0,)))), np.float32)

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return uint8 RGB images of shape (n, height, width, 3); values outside 0..1 are clipped."""
        if self.shape is None:
            raise DataError("the pixel space has no size before images were seen; fit it on training images.")
        images = np.clip(vectors.reshape(-1, *self.shape), 0.0, 1.0)
        images = np.round(images * 255).astype(np.uint8)
        return images if self.shape[-1] == 3 else np.repeat(images, 3, axis=-1)

    def write(self, folder: Path) -> None:
        """Write the image size."""
        from braindecode_vis.store import write_json

        write_json(folder / "pixels.json", {"shape": self.shape})

    @classmethod
    def read(cls, config: PixelsConfig, folder: Path) -> PixelEncoder:
        """Read what `write` wrote."""
        from braindecode_vis.store import read_json

        shape = read_json(folder / "pixels.json")["shape"]
        return cls(config, shape=(int(shape[0]), int(shape[1]), int(shape[2])))


def prepare_pixels(image: np.ndarray, size: int | None, colour: bool) -> np.ndarray:
    """Return a float32 image of shape (height, width, 3 or 1) in 0..1.

    Luminance weights are those of ITU-R BT.601, as in PIL.
    """
    if size is not None and image.shape[:2] != (size, size):
        from PIL import Image

        resized = Image.fromarray(np.ascontiguousarray(crop_square(image))).resize(
            (size, size), Image.Resampling.LANCZOS
        )
        image = np.asarray(resized)
    values = image.astype(np.float32) / 255.0
    if colour:
        return values
    return (values @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


class PcaConfig(Settings):
    """Leading principal components of the training images.

    Parameters
    ----------
    n_components
        Number of components; at most the number of training images minus one is used.
    size, colour
        As for the pixel space that the components are taken of.
    """

    kind: Literal["pca"] = "pca"
    n_components: int = Field(default=30, ge=1)
    size: int | None = Field(default=None, ge=2)
    colour: bool = False

    fitted_on_training_images: ClassVar[bool] = True

    def build(self) -> PcaEncoder:
        """Return the unfitted encoder."""
        return PcaEncoder(self)

    def read(self, folder: Path) -> PcaEncoder:
        """Return the fitted encoder that was written into `folder`."""
        return PcaEncoder.read(self, folder)


@dataclass(frozen=True)
class PcaFit:
    """Mean image of shape (n_pixels,), components of shape (n_components, n_pixels), and the image shape."""

    mean: np.ndarray
    components: np.ndarray
    shape: tuple[int, int, int]


class PcaEncoder:
    """Projection on the principal components of the training images."""

    def __init__(self, config: PcaConfig, *, fitted: PcaFit | None = None) -> None:
        self.config = config
        self.fitted = fitted

    def _pixels(self, shape: tuple[int, int, int] | None = None) -> PixelEncoder:
        return PixelEncoder(PixelsConfig(size=self.config.size, colour=self.config.colour), shape=shape)

    def _require_fit(self) -> PcaFit:
        if self.fitted is None:
            raise DataError("the principal components have not been fitted; run embed first.")
        return self.fitted

    @property
    def space(self) -> str:
        """Name with the number of components and a digest of the fit."""
        fit = self._require_fit()
        digest = hashlib.sha256(fit.mean.tobytes() + fit.components.tobytes()).hexdigest()[:12]
        size = "x".join(map(str, fit.shape))
        return f"pca/{len(fit.components)}-of-pixels/{size}/fit={digest}"

    def fit(self, images: Iterable[np.ndarray]) -> PcaEncoder:
        """Compute mean and components of the training images."""
        from sklearn.decomposition import PCA

        listed = list(images)
        pixels = self._pixels().fit(listed)
        values = pixels.encode(listed)
        n = min(self.config.n_components, len(values) - 1, values.shape[1])
        if n < 1:
            raise DataError(
                f"{len(values)} training image(s) have no principal component; two are the least."
            )
        pca = PCA(n_components=n, svd_solver="full").fit(values)
        shape = pixels.shape
        assert shape is not None
        self.fitted = PcaFit(pca.mean_.astype(np.float32), pca.components_.astype(np.float32), shape)
        return self

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_components)."""
        fit = self._require_fit()
        return (self._pixels(fit.shape).encode(images) - fit.mean) @ fit.components.T

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return the uint8 RGB images of shape (n, height, width, 3) that the components add up to."""
        fit = self._require_fit()
        return self._pixels(fit.shape).decode(vectors @ fit.components + fit.mean)

    def write(self, folder: Path) -> None:
        """Write mean and components as safetensors."""
        from safetensors.numpy import save_file

        fit = self._require_fit()
        tensors = {
            "mean": fit.mean,
            "components": np.ascontiguousarray(fit.components),
            "shape": np.array(fit.shape),
        }
        save_file(tensors, folder / "pca.safetensors")

    @classmethod
    def read(cls, config: PcaConfig, folder: Path) -> PcaEncoder:
        """Read what `write` wrote."""
        from safetensors.numpy import load_file

        tensors = load_file(folder / "pca.safetensors")
        height, width, colours = (int(v) for v in tensors["shape"])
        return cls(config, fitted=PcaFit(tensors["mean"], tensors["components"], (height, width, colours)))
