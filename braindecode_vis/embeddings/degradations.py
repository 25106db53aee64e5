"""Degraded views of an image (blur, fovea, noise, low resolution, mosaic) as targets.

Owns blurs, noise, low resolution and mosaic as plain functions, their average or their stack as a target space, and
the rule that chooses the blur of each image by how well it is retrieved. Every view is a function of the image and the
settings alone, so a view is the same in every batch and on every day.

References
----------
UBP: Wu et al. (2025), CVPR, arXiv:2503.04207: foveal blur, its three levels and the rule that chooses among them; as
in HaitaoWuTJU/Uncertainty-aware-Blur-Prior@89d8b83.
NeuroBridge (AAAI 2026), arXiv:2511.06836: the average over blur, noise, low resolution and mosaic; amounts as in
feroooooo/NeuroBridge@6144203:extract_feature.py, not the defaults of its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.base.registry import Component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import hash_pixels

#: Kernels are given for an image whose shorter side has this many pixels, and grow with the image.
REFERENCE_SIDE = 224

#: Encoders whose images can be degraded: pretrained ones of one network.
VIEWED_KINDS = (
    "openclip", "timm", "torchvision", "transformers", "efficientnet-lite0", "engineered", "vae", "taesd",
)  # fmt: skip
ViewedEncoderConfig = Annotated[Any, Component("target", only=VIEWED_KINDS)]


class Degradation(Settings):
    """One way to remove detail from an image.

    Parameters
    ----------
    kind
        ``none`` leaves the image; ``blur`` is Gaussian; ``fovea`` blends it with its blur, half of each in the centre
        and nearly the blur alone in the corners; ``noise`` adds Gaussian noise; ``resolution`` makes it smaller and
        large again; ``mosaic`` gives each square the colour at its middle.
    amount
        Width of the kernel in pixels of a 224-pixel image (blur, fovea: odd numbers such as 45), standard deviation in
        0..1 (noise), factor (resolution: 2 halves it), side of the squares in pixels of a 224-pixel image (mosaic).
        None takes 15, 45, 25/255, 10 and 5, as the released code of UBP and NeuroBridge runs.
    """

    kind: Literal["none", "blur", "fovea", "noise", "resolution", "mosaic"]
    amount: float | None = Field(default=None, gt=0)

    @property
    def value(self) -> float:
        """The amount in use."""
        return _DEFAULTS[self.kind] if self.amount is None else self.amount

    @property
    def name(self) -> str:
        """Kind and amount in one word."""
        return self.kind if self.kind == "none" else f"{self.kind}{self.value:g}{_MARKS.get(self.kind, '')}"


_DEFAULTS = {"none": 0.0, "blur": 15.0, "fovea": 45.0, "noise": 25 / 255, "resolution": 10.0, "mosaic": 5.0}
# Earlier versions had a sharp centre and averaged squares: the marks keep their embeddings apart from today's.
_MARKS = {"fovea": "h", "mosaic": "p"}
_NOISE_SEED = 0  # root of the noise of all images
#: The four views whose features NeuroBridge averages.
NEUROBRIDGE = tuple(Degradation(kind=kind) for kind in ("blur", "noise", "resolution", "mosaic"))


def degrade(image: np.ndarray, degradation: Degradation, *, seed: int = 0) -> np.ndarray:
    """Return the degraded uint8 image, of the same shape.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
    degradation
        What to do to it.
    seed
        Root of the noise; the noise of an image also depends on its pixels, never on its place in a batch.
    """
    if degradation.kind == "none":
        return image
    if degradation.kind == "noise":
        # Seeded by the pixels: the same noise in every batch, order and run.
        rng = make_generator(seed, "noise", hash_pixels(image))
        return add_noise(image, degradation.value, rng)
    return _APPLY[degradation.kind](image, degradation.value)


def find_sigma(kernel: float) -> float:
    """Return the standard deviation that goes with a Gaussian kernel of this width, both in pixels (OpenCV's rule)."""
    return 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8


def blur_gaussian(image: np.ndarray, kernel: float = 15) -> np.ndarray:
    """Return the image blurred by a Gaussian `kernel` pixels wide (at a shorter side of 224)."""
    from scipy.ndimage import gaussian_filter

    scale = min(image.shape[:2]) / REFERENCE_SIDE
    radius = max(1, round((kernel - 1) / 2 * scale))
    sigma = max(find_sigma(kernel) * scale, 1e-3)  # tiny images would ask for a kernel of no width
    blurred = gaussian_filter(
        # Colours are not mixed; mirrored edges are OpenCV's default border.
        image.astype(np.float32),
        (sigma, sigma, 0),
        mode="mirror",
        radius=(radius, radius, 0),
    )
    return _as_image(blurred)


def blur_fovea(image: np.ndarray, kernel: float = 45) -> np.ndarray:
    """Return the image half blurred at its centre and blurred towards its corners.

    The image enters with the weight exp(-3 d / L) / 2, where d is the distance from the pixel ``(height // 2,
    width // 2)`` and L that of the last pixel.
    """
    weight = _make_fovea(*image.shape[:2])[..., None]  # height, width, 1
    return _as_image(weight * image + (1 - weight) * blur_gaussian(image, kernel))


@lru_cache(maxsize=8)
def _make_fovea(height: int, width: int) -> np.ndarray:
    row, column = height // 2, width // 2
    distance = np.hypot(np.arange(height)[:, None] - row, np.arange(width)[None] - column)  # height, width
    reach = max(np.hypot(height - row - 1, width - column - 1), 1)
    # UBP: the sharp image has at most half of the weight, and falls off by exp(-3) at the corners
    return (0.5 * np.exp(-3 * np.minimum(1, distance / reach))).astype(np.float32)


def add_noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Return the image with Gaussian noise of this standard deviation in 0..1, clipped."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return _as_image(image + 255 * deviation * noise)


def lower_resolution(image: np.ndarray, factor: float = 10) -> np.ndarray:
    """Return the image shrunk by `factor` and enlarged again, both bilinear and antialiased."""
    from PIL import Image

    height, width = image.shape[:2]
    small = (max(1, int(width / factor)), max(1, int(height / factor)))
    method = Image.Resampling.BILINEAR
    shrunk = Image.fromarray(np.ascontiguousarray(image)).resize(small, method)
    return np.asarray(shrunk.resize((width, height), method))


def make_mosaic(image: np.ndarray, square: float = 5) -> np.ndarray:
    """Return the image as squares of one colour each, `square` pixels wide (at a shorter side of 224).

    The colour is that of the four pixels around the middle of the square, linearly weighted, as OpenCV makes an image
    smaller without antialiasing; a rest of the side that holds no whole square is spread over all of them.
    """
    side = max(1, round(square * min(image.shape[:2]) / REFERENCE_SIDE))
    values = image.astype(np.float64)
    for axis, length in enumerate(image.shape[:2]):
        n_squares = max(1, length // side)
        middle = (np.arange(n_squares) + 0.5) * length / n_squares - 0.5
        before = np.floor(middle).astype(int)
        weight = (middle - before).reshape([-1 if a == axis else 1 for a in range(3)])
        low, high = (values.take(i, axis) for i in (before, np.minimum(before + 1, length - 1)))
        sampled = (1 - weight) * low + weight * high
        values = sampled.take(np.arange(length) * n_squares // length, axis)
    return _as_image(values)


def _as_image(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


_APPLY: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "blur": blur_gaussian,
    "fovea": blur_fovea,
    "resolution": lower_resolution,
    "mosaic": make_mosaic,
}


class FirstResize(Settings):
    """Preparation of an image before it is degraded, so that kernels have the same meaning for all images.

    Parameters
    ----------
    side
        Both sides are resized to this many pixels, whatever the aspect ratio (224 in UBP and NeuroBridge).
    interpolation
        Interpolation of the antialiased resize: ``bilinear`` in UBP, ``bicubic`` in NeuroBridge.
    jpeg_quality
        The small image is saved as JPEG of this quality and read again, which UBP does (75, Pillow's default); null
        does not.
    """

    side: int = Field(default=REFERENCE_SIDE, ge=16)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)

    @property
    def name(self) -> str:
        """Everything above in one word."""
        jpeg = "" if self.jpeg_quality is None else f"-jpeg{self.jpeg_quality}"
        return f"squash{self.side}-{self.interpolation}{jpeg}"

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the small image, uint8 of shape (side, side, 3)."""
        from io import BytesIO

        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(image))
        picture = picture.resize((self.side, self.side), Image.Resampling[self.interpolation.upper()])
        if self.jpeg_quality is not None:
            held = BytesIO()
            picture.save(held, "JPEG", quality=self.jpeg_quality)
            picture = Image.open(held)
        return np.asarray(picture)


class ViewsConfig(ImageEncoderSettings):
    """Degraded views of every image, through one encoder.

    Parameters
    ----------
    encoder
        The image encoder.
    views
        Degradations; by default the four of NeuroBridge.
    first
        Resize of every image before it is degraded; null degrades images at their own size.
    combine
        ``averaged`` gives the mean embedding over the views. ``stacked`` keeps one vector per view as the token axis,
        for training that chooses one (``encoder.view_choice``).
    """

    kind: Literal["views"] = "views"
    encoder: ViewedEncoderConfig
    views: tuple[Degradation, ...] = Field(default=NEUROBRIDGE, min_length=1)
    # In the fingerprint whatever its value: what fovea and mosaic are changed when it came.
    first: FirstResize | None = None
    combine: Literal["averaged", "stacked"] = "averaged"

    removed_settings: ClassVar[Mapping[str, Any]] = {"noise_seed": _NOISE_SEED}

    def build(self) -> ViewsEncoder:
        """Return the encoder."""
        return ViewsEncoder(self)


class ViewsEncoder(ImageEncoder):
    """An image encoder that sees several degraded views of each image."""

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config
        self.encoder: Any = config.encoder.build()

    @property
    def space(self) -> str:
        """Name of the encoder's space with the views."""
        names = "+".join(view.name for view in self.config.views)
        noisy = f"-seed{_NOISE_SEED}" if any(view.kind == "noise" for view in self.config.views) else ""
        first = "" if self.config.first is None else f"{self.config.first.name}-"
        return f"{self.encoder.space}/views={first}{names}{noisy}-{self.config.combine}"

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features), or (n_images, n_views, n_features) if stacked."""
        iterator, rows = iter(images), []
        step = getattr(self.config.encoder, "batch_size", 16)
        while chunk := list(islice(iterator, step)):
            if self.config.first is not None:
                chunk = [self.config.first.apply(image) for image in chunk]
            # All views of an image lie next to each other, so that `_combine` can part them by counting.
            views = (degrade(im, v, seed=_NOISE_SEED) for im in chunk for v in self.config.views)
            rows.append(self._combine(self.encoder.encode(views)))
        return np.concatenate(rows) if rows else self._combine(self.encoder.encode([]))

    def _combine(self, vectors: np.ndarray) -> np.ndarray:
        grouped = vectors.reshape(-1, len(self.config.views), *vectors.shape[1:])  # images, views, features
        if self.config.combine == "averaged":
            return grouped.mean(axis=1)
        if grouped.ndim > 3:
            raise DataError("views of token sequences cannot be stacked; average them or pool the tokens.")
        return grouped


#: Similarity of an image that no batch has shown yet (UBP).
START = 1.0


class UncertaintyRule:
    """Chooses how much an image is blurred by how well the brain's answer to it is matched.

    A moving average keeps the similarity of each image to its prediction, on the scale of the contrast's logits and
    from 1 at the start, and a Gaussian is fitted to the averages of a batch. An image whose newest similarity lies
    above the upper tail is easy and gets the first view (less blur), one below the lower tail the last (more blur),
    every other one the middle view; so does an image that was never scored, as in a test gallery.

    Examples
    --------
    >>> rule = UncertaintyRule()
    >>> rule.update(["a", "b"], [0.5, 0.1])
    >>> rule.choose(["a", "b", "never scored"]).tolist()  # averages start at 1, and both lie far below
    [2, 2, 1]
    """

    #: As in UBP: weight of the newest similarity in the moving average, and probability of both tails together.
    momentum, tail = 0.3, 0.05

    def __init__(self) -> None:
        self.average: dict[str, float] = {}
        self.view: dict[str, int] = {}

    def update(self, ids: Sequence[str], similarities: Sequence[float] | np.ndarray) -> None:
        """Take in the similarity between each training image of a batch and its prediction."""
        from scipy.stats import norm

        newest = np.asarray(similarities, dtype=np.float64)
        before = np.array([self.average.get(i, START) for i in ids])
        averages = (1 - self.momentum) * before + self.momentum * newest
        deviation = averages.std(ddof=1) if len(averages) > 1 else 0.0
        reach = norm.ppf(1 - self.tail / 2) * deviation  # half of the tail on each side
        views = np.ones(len(newest), dtype=np.int64)  # 1 is the usual blur
        if deviation > 0:
            views[newest > averages.mean() + reach] = 0
            views[newest < averages.mean() - reach] = 2
        for stimulus_id, average, view in zip(ids, averages, views, strict=True):
            self.average[stimulus_id], self.view[stimulus_id] = float(average), int(view)

    def choose(self, ids: Sequence[str]) -> np.ndarray:
        """Return the view of each image: 0 for less blur, 1 for the usual, 2 for more."""
        return np.array([self.view.get(i, 1) for i in ids], dtype=np.int64)
