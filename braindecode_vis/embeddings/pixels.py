"""Targets that need no network: pixels, their principal components, and classical features of colour and texture.

Pixels and components can be turned back into images, which makes them the plainest route to a reconstruction. The
components are fitted on training images only, and their digest is part of the space's name, so that vectors of two fits
are never compared.

The classical features are six descriptions of an image at one fixed size, computed with scikit-image: colour, edges,
texture and spatial frequency. They are the baseline that a pretrained target has to beat, and they say what of a
retrieval score low-level vision explains. Every family is brought to length one, so that no family outweighs another
in a cosine; a family that is zero (the edges of a blank image) stays zero.

References
----------
Dalal and Triggs (2005), CVPR (HOG); Ojala et al. (2002), IEEE TPAMI 24 (LBP); Haralick et al. (1973), IEEE SMC 3
(GLCM); Jones and Palmer (1987), J. Neurophysiology 58 (Gabor energy).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import (
    FittedImageEncoder,
    ImageEncoder,
    ImageEncoderSettings,
    fit_and_embed,
)
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.stimuli import StimulusSet, crop_square, resize_image
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.embeddings.transforms import map_ahead

Feature = Literal["colour", "hog", "lbp", "glcm", "gabor", "fft"]
#: Weights of red, green and blue in the luminance, those of ITU-R BT.601, as in PIL.
LUMINANCE = np.array([0.299, 0.587, 0.114])
_GRID = 4  # texture and energy are pooled in 4 x 4 fields
_N_WAVELENGTHS, _N_ORIENTATIONS = 4, 6


class PixelsConfig(ImageEncoderSettings):
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

    def build(self) -> PixelEncoder:
        """Return the encoder."""
        return PixelEncoder(self)


#: Of the vectors that are kept in one array.
_BLOCK_BYTES = 1 << 20


class PixelEncoder(ImageEncoder):
    """Images as vectors of their own grey or colour values."""

    decodes = True

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
        # Many small arrays that stay between the buffers of a decoder cost 60 kB of memory for each file.
        blocks: list[np.ndarray] = []
        number = -1
        for number, image in enumerate(images):
            pixels = prepare_pixels(image, self.config.size, self.config.colour)
            if self.shape is not None and pixels.shape != self.shape:
                raise DataError(
                    f"an image of size {pixels.shape} cannot enter the space {self.space!r}; "
                    "resize it, or run with target.size, which resizes all images."
                )
            n_together = max(1, _BLOCK_BYTES // pixels.nbytes)
            if number % n_together == 0:
                blocks.append(np.empty((n_together, pixels.size), np.float32))
            blocks[-1][number % n_together] = pixels.ravel()
        if not blocks:
            return np.empty((0, int(np.prod(self.shape or (0,)))), np.float32)
        return np.concatenate(blocks)[: number + 1]

    def embed(self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Any) -> Embeddings:
        """Encode all images; pixels are too cheap for the embedding cache. See `contracts.ImageEncoder.embed`."""
        return fit_and_embed(self, stimuli, training_ids)

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return uint8 RGB images of shape (n, height, width, 3); values outside 0..1 are clipped."""
        if self.shape is None:
            raise DataError("the pixel space has no size before images were seen; fit it on training images.")
        images = np.clip(vectors.reshape(-1, *self.shape), 0.0, 1.0)  # n, height, width, colours
        images = np.round(images * 255).astype(np.uint8)
        return images if self.shape[-1] == 3 else np.repeat(images, 3, axis=-1)

    def write(self, folder: Path) -> None:
        """Write the image size."""
        write_json(folder / "pixels.json", {"shape": self.shape})

    def read(self, folder: Path) -> PixelEncoder:
        """Read what `write` wrote."""
        shape = read_json(folder / "pixels.json")["shape"]
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        return self


def prepare_pixels(image: np.ndarray, size: int | None, colour: bool) -> np.ndarray:
    """Return a float32 image of shape (height, width, 3 or 1) in 0..1."""
    if size is not None and image.shape[:2] != (size, size):
        from PIL import Image

        resized = Image.fromarray(np.ascontiguousarray(crop_square(image))).resize(
            (size, size), Image.Resampling.LANCZOS
        )
        image = np.asarray(resized)
    values = image.astype(np.float32) / 255.0
    if colour:
        return values
    return (values @ LUMINANCE.astype(np.float32))[..., None]


class PcaConfig(ImageEncoderSettings):
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


@dataclass(frozen=True)
class PcaFit:
    """Mean image of shape (n_pixels,), components of shape (n_components, n_pixels), and the image shape."""

    mean: np.ndarray
    components: np.ndarray
    shape: tuple[int, int, int]


class PcaEncoder(FittedImageEncoder):
    """Projection on the principal components of the training images."""

    decodes = True

    def __init__(self, config: PcaConfig) -> None:
        self.config = config
        self.fitted: PcaFit | None = None

    def _pixels(self, shape: tuple[int, int, int] | None = None) -> PixelEncoder:
        return PixelEncoder(PixelsConfig(size=self.config.size, colour=self.config.colour), shape=shape)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one vector that becomes an image; fewer training images have fewer components."""
        return (self.config.n_components,)

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
        n = min(self.config.n_components, len(values) - 1, values.shape[1])  # the mean takes one dimension
        if n < 1:
            raise DataError(
                f"{len(values)} training image(s) have no principal component; at least two are needed."
            )
        # The solver centres a copy, and keeps two sets of singular vectors.
        side = min(values.shape)
        check_memory(
            values.nbytes * 3 + values.itemsize * (3 * side**2),
            what=f"principal components of {len(values)} images of {values.shape[1]} pixel values",
            reduce="the number or the size of the images, or choose another target.kind",
        )
        pca = PCA(n_components=n, svd_solver="full").fit(values)  # the randomised solver depends on a seed
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
        fit = self._require_fit()
        tensors = {
            "mean": fit.mean,
            "components": np.ascontiguousarray(fit.components),
            "shape": np.array(fit.shape),
        }
        write_tensors(folder / "pca.safetensors", tensors)

    def read(self, folder: Path) -> PcaEncoder:
        """Read what `write` wrote."""
        tensors = load_tensors(folder / "pca.safetensors")
        height, width, colours = (int(v) for v in tensors["shape"])
        self.fitted = PcaFit(tensors["mean"], tensors["components"], (height, width, colours))
        return self


class EngineeredConfig(ImageEncoderSettings):
    """Classical features without a network: colour, edges, texture and spatial frequency.

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

    not_hashed: ClassVar[frozenset[str]] = frozenset({"workers"})

    def build(self) -> EngineeredEncoder:
        """Return the encoder."""
        return EngineeredEncoder(self)


class EngineeredEncoder(ImageEncoder):
    """Classical features as an image encoder."""

    def __init__(self, config: EngineeredConfig) -> None:
        self.config = config

    @property
    def space(self) -> str:
        """Name with the families and the size."""
        return f"engineered/{'+'.join(self.config.features)}/each-unit/centre{self.config.size}-lanczos"

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
        # Rounding keeps constant images constant: the three weights do not add up to one exactly.
        grey = np.round(square @ LUMINANCE) / 255
        parts = [_COMPUTE[name](square, grey) for name in self.config.features]
        return np.concatenate([_make_unit(part) for part in parts]).astype(np.float32)


def _make_unit(values: np.ndarray) -> np.ndarray:
    norm = float(np.linalg.norm(values))
    return values / norm if norm > 1e-12 else np.zeros_like(values)  # a blank image has no edges


def compute_colour_histogram(image: np.ndarray, n_bins: int = 8) -> np.ndarray:
    """Return the joint histogram of red, green and blue, shape (n_bins ** 3,), summing to one.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
    """
    bins = (image.reshape(-1, 3).astype(np.int64) * n_bins) >> 8  # pixels, colours; 0 to n_bins - 1
    index = (bins[:, 0] * n_bins + bins[:, 1]) * n_bins + bins[:, 2]
    return np.bincount(index, minlength=n_bins**3) / len(index)


def compute_hog(grey: np.ndarray) -> np.ndarray:
    """Return histograms of oriented gradients in 8 x 8 cells, 9 orientations, blocks of 2 x 2 cells."""
    from skimage.feature import hog

    cell = grey.shape[0] // 8  # 8 x 8 cells whatever the size
    return hog(grey, orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(2, 2))


def compute_lbp(grey: np.ndarray) -> np.ndarray:
    """Return histograms of uniform local binary patterns at radii 1 and 2, in 4 x 4 fields."""
    from skimage.feature import local_binary_pattern

    levels = np.round(grey * 255).astype(np.uint8)
    parts = []
    for radius in (1, 2):
        codes = local_binary_pattern(levels, 8 * radius, radius, method="uniform").astype(np.int64)
        n_codes = 8 * radius + 2  # uniform patterns of 8 * radius points, and one code for all others
        parts += [np.bincount(field.ravel(), minlength=n_codes) / field.size for field in _split(codes)]
    return np.concatenate(parts)


def _split(values: np.ndarray) -> list[np.ndarray]:
    rows = np.array_split(values, _GRID, axis=0)
    return [field for row in rows for field in np.array_split(row, _GRID, axis=1)]


def compute_glcm(grey: np.ndarray) -> np.ndarray:
    """Return contrast, homogeneity, energy and correlation of grey levels at distances 1, 2, 4 and four angles."""
    from skimage.feature import graycomatrix, graycoprops

    levels = np.minimum((grey * 16).astype(np.uint8), 15)  # 16 levels keep the matrices from being sparse
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
    # The filters are products in the frequency domain: one transform of the image serves all of them.
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
        frequency = 4.0 * 2**scale / size  # cycles per pixel; 4, 8, 16 and 32 per image
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
    # Amplitudes fall as one over the frequency; without the logarithm the lowest band would be all there is.
    amplitude = np.log1p(np.abs(np.fft.fft2(grey - grey.mean())))
    index = _bin_spectrum(size, n_bands, n_angles)
    inside = index >= 0
    total = np.bincount(index[inside], weights=amplitude[inside], minlength=n_bands * n_angles)
    count = np.bincount(index[inside], minlength=n_bands * n_angles)
    return total / np.maximum(count, 1)  # low bands of few angles may be empty


@lru_cache(maxsize=4)
def _bin_spectrum(size: int, n_bands: int, n_angles: int) -> np.ndarray:
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius = np.hypot(fx, fy) * size
    edges = np.geomspace(1, size / 2, n_bands + 1)  # cycles per image, up to Nyquist
    band = np.searchsorted(edges, radius, side="right") - 1
    # A real image's spectrum is symmetric, hence half a turn.
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
