"""Features that need no training: colour, edges, texture and spatial frequency.

Owns six classical descriptions of an image, computed with scikit-image at one fixed size. They are the baseline that a
pretrained target has to beat, and they say what of a retrieval score low-level vision explains. Every family is
brought to length one, so that no family outweighs another in a cosine; a family that is zero (the edges of a blank
image) stays zero.

References
----------
Dalal and Triggs (2005), CVPR (HOG); Ojala et al. (2002), IEEE TPAMI 24 (LBP); Haralick et al. (1973), IEEE SMC 3
(GLCM); Jones and Palmer (1987), J. Neurophysiology 58 (Gabor energy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.embeddings.transforms import map_ahead
from braindecode_vis.settings import Settings
from braindecode_vis.stimuli import crop_square, resize_image

Feature = Literal["colour", "hog", "lbp", "glcm", "gabor", "fft"]
_GRID = 4  # texture and energy are pooled in 4 x 4 fields
_N_WAVELENGTHS, _N_ORIENTATIONS = 4, 6


class EngineeredConfig(Settings):
    """Classical features side by side.

    Parameters
    ----------
    features
        Which families: histogram of colours, oriented gradients, local binary patterns, grey-level co-occurrence,
        Gabor energy, spectrum by frequency and orientation.
    size
        Side of the square that an image becomes first, pixels.
    workers
        Threads; how it runs, not what it computes.
    """

    kind: Literal["engineered"] = "engineered"
    features: tuple[Feature, ...] = Field(
        default=("colour", "hog", "lbp", "glcm", "gabor", "fft"), min_length=1
    )
    size: int = Field(default=128, ge=32, multiple_of=8)
    workers: int = Field(default=2, ge=0)

    fitted_on_training_images: ClassVar[bool] = False
    not_hashed: ClassVar[frozenset[str]] = frozenset({"workers"})

    def build(self) -> EngineeredEncoder:
        """Return the encoder."""
        return EngineeredEncoder(self)

    def read(self, folder: Path) -> EngineeredEncoder:
        """Return the encoder; it has no fitted state."""
        return self.build()


class EngineeredEncoder:
    """Classical features as an image encoder."""

    def __init__(self, config: EngineeredConfig) -> None:
        self.config = config

    @property
    def space(self) -> str:
        """Name with the families and the size."""
        return f"engineered/{'+'.join(self.config.features)}/each-unit/centre{self.config.size}-lanczos"

    def fit(self, images: Iterable[np.ndarray]) -> EngineeredEncoder:
        """Return self: nothing is learnt."""
        return self

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features)."""
        rows = list(map_ahead(self.describe, images, workers=self.config.workers, ahead=16))
        if rows:
            return np.stack(rows)
        width = len(self.describe(np.zeros((self.config.size, self.config.size, 3), np.uint8)))
        return np.empty((0, width), np.float32)

    def describe(self, image: np.ndarray) -> np.ndarray:
        """Return the features of one uint8 image of shape (height, width, 3)."""
        square = resize_image(crop_square(image), self.config.size, self.config.size)
        # ITU-R BT.601, as PIL; the last step keeps constant images constant.
        grey = np.round(square @ np.array([0.299, 0.587, 0.114])) / 255
        parts = [_COMPUTE[name](square, grey) for name in self.config.features]
        return np.concatenate([_make_unit(part) for part in parts]).astype(np.float32)

    def write(self, folder: Path) -> None:
        """Nothing is fitted, so nothing is written."""


def _make_unit(values: np.ndarray) -> np.ndarray:
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1e-12 else np.zeros_like(values)


def compute_colour_histogram(image: np.ndarray, n_bins: int = 8) -> np.ndarray:
    """Return the joint histogram of red, green and blue, shape (n_bins ** 3,), summing to one.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
    """
    bins = (image.reshape(-1, 3).astype(np.int64) * n_bins) >> 8
    index = (bins[:, 0] * n_bins + bins[:, 1]) * n_bins + bins[:, 2]
    return np.bincount(index, minlength=n_bins**3) / len(index)


def compute_hog(grey: np.ndarray) -> np.ndarray:
    """Return histograms of oriented gradients in 8 x 8 cells, 9 orientations, blocks of 2 x 2 cells."""
    from skimage.feature import hog

    cell = grey.shape[0] // 8
    return hog(grey, orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(2, 2))


def compute_lbp(grey: np.ndarray) -> np.ndarray:
    """Return histograms of uniform local binary patterns at radii 1 and 2, in 4 x 4 fields."""
    from skimage.feature import local_binary_pattern

    levels = np.round(grey * 255).astype(np.uint8)
    parts = []
    for radius in (1, 2):
        codes = local_binary_pattern(levels, 8 * radius, radius, method="uniform").astype(np.int64)
        n_codes = 8 * radius + 2
        parts += [np.bincount(field.ravel(), minlength=n_codes) / field.size for field in _split(codes)]
    return np.concatenate(parts)


def _split(values: np.ndarray) -> list[np.ndarray]:
    rows = np.array_split(values, _GRID, axis=0)
    return [field for row in rows for field in np.array_split(row, _GRID, axis=1)]


def compute_glcm(grey: np.ndarray) -> np.ndarray:
    """Return contrast, homogeneity, energy and correlation of grey levels at distances 1, 2, 4 and four angles."""
    from skimage.feature import graycomatrix, graycoprops

    levels = np.minimum((grey * 16).astype(np.uint8), 15)
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    matrix = graycomatrix(levels, [1, 2, 4], angles, levels=16, symmetric=True, normed=True)
    # The correlation of a constant image has no value; scikit-image says 1. Contrast is scaled into 0..1.
    scale = {"contrast": 15.0**2, "homogeneity": 1.0, "energy": 1.0, "correlation": 1.0}
    return np.concatenate([graycoprops(matrix, name).ravel() / s for name, s in scale.items()])


def compute_gabor_energy(grey: np.ndarray) -> np.ndarray:
    """Return the mean energy of quadrature Gabor filters in 4 x 4 fields.

    Four wavelengths (1/4 to 1/32 of the side) by six orientations, one octave wide, without response to brightness.
    """
    spectrum = np.fft.fft2(grey - grey.mean())
    parts = []
    for response in _make_gabor_bank(grey.shape[0]):
        energy = np.abs(np.fft.ifft2(spectrum * response))
        parts += [field.mean() for field in _split(energy)]
    return np.asarray(parts)


@lru_cache(maxsize=4)
def _make_gabor_bank(size: int) -> tuple[np.ndarray, ...]:
    """Return the transfer functions; they see one half of the plane, so a filtered image is complex."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    bank = []
    for scale in range(_N_WAVELENGTHS):
        frequency = 4.0 * 2**scale / size
        for step in range(_N_ORIENTATIONS):
            angle = np.pi * step / _N_ORIENTATIONS
            along = fx * np.cos(angle) + fy * np.sin(angle) - frequency
            across = fy * np.cos(angle) - fx * np.sin(angle)
            sigma = frequency / 3  # one octave at half height
            bank.append(np.exp(-(along**2 + across**2) / (2 * sigma**2)))
    return tuple(bank)


def compute_spectrum(grey: np.ndarray, n_bands: int = 8, n_angles: int = 8) -> np.ndarray:
    """Return the mean log amplitude by spatial frequency (octave-spaced) and orientation."""
    size = grey.shape[0]
    amplitude = np.log1p(np.abs(np.fft.fft2(grey - grey.mean())))
    index = _bin_spectrum(size, n_bands, n_angles)
    inside = index >= 0
    total = np.bincount(index[inside], weights=amplitude[inside], minlength=n_bands * n_angles)
    count = np.bincount(index[inside], minlength=n_bands * n_angles)
    return total / np.maximum(count, 1)


@lru_cache(maxsize=4)
def _bin_spectrum(size: int, n_bands: int, n_angles: int) -> np.ndarray:
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius = np.hypot(fx, fy) * size
    edges = np.geomspace(1, size / 2, n_bands + 1)
    band = np.searchsorted(edges, radius, side="right") - 1
    angle = np.floor(np.mod(np.arctan2(fy, fx), np.pi) / np.pi * n_angles).astype(np.int64) % n_angles
    return np.where((radius >= 1) & (band < n_bands), band * n_angles + angle, -1)


_COMPUTE: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "colour": lambda image, grey: compute_colour_histogram(image),
    "hog": lambda image, grey: compute_hog(grey),
    "lbp": lambda image, grey: compute_lbp(grey),
    "glcm": lambda image, grey: compute_glcm(grey),
    "gabor": lambda image, grey: compute_gabor_energy(grey),
    "fft": lambda image, grey: compute_spectrum(grey),
}
