"""Image metrics: pixel correlation, mean squared error and SSIM, one value per image.

Every metric has three protocols. ``native`` compares images at the size they have. ``425`` is that of the natural-image
literature: both images are resized to 256 x 256, then to 425 x 425 (bilinear, antialiased, as torchvision since 0.17
does). ``425-legacy`` does so without antialiasing, as ``Resize`` of torchvision up to 0.16 treated tensors; MindEye2
pins that version, so its numbers are of this kind. The two differ where an image has more than 256 pixels. SSIM
is taken on grey images with Gaussian weights (sigma 1.5, population covariance, data range 1), as current scikit-image
computes it; ``ssim_legacy`` treats the columns of the grey image as channels, which is what scikit-image up to 0.18 did
when called with ``multichannel=True``, and serves only to reproduce older numbers. Seen images repeat over subjects and
controls over rows: an `ImageTable` holds each distinct one once, so that a network meets it one time only.

References
----------
Wang et al. (2004), Image quality assessment: from error visibility to structural similarity,
doi:10.1109/TIP.2003.819861. Scotti et al. (2024), MindEye2, arXiv:2403.11207 (the @425 protocol).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np

from braindecode_vis.checks import DataError, check_option

Protocol = Literal["native", "425", "425-legacy"]
Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]
GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # of scikit-image's rgb2gray (ITU-R BT.709)
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # a window of 11 pixels: 3.5 sigma, rounded
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for a data range of 1
#: An image whose pixels (0 to 1) spread less than this is constant up to rounding: one grey level of 255 in a
#: single pixel of a 425 x 425 RGB image spreads five times more.
CONSTANT_SPREAD = 1e-6
BATCH_VALUES = 1 << 16  # numbers per batch: half a megabyte in double precision stays in the cache
SLAB = 32  # rows filtered by one matrix product


def compute_image_metric(
    name: str, truth: np.ndarray, decoded: np.ndarray, *, protocol: Protocol = "native"
) -> np.ndarray:
    """Return the metric `name` for every pair of images.

    Parameters
    ----------
    name
        ``pixcorr``, ``mse``, ``ssim`` or ``ssim_legacy``. A constant image has no pixel correlation with anything; it
        is scored 0, so that a generator of blank images lowers the mean instead of leaving it.
    truth, decoded : arrays of shape (n_images, height, width[, 1 or 3])
        uint8, or float between 0 and 1. Row i of both is the same item. Sizes may differ, but not under ``native``.
    protocol
        ``native``, ``425`` or ``425-legacy``.

    Returns
    -------
    float array of shape (n_images,)
        One finite value per pair.

    Raises
    ------
    ConfigError
        If the name is unknown.
    DataError
        If shapes, types or ranges do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((2, 28, 28))
    >>> compute_image_metric("pixcorr", images, 1 - images).round(6)
    array([-1., -1.])
    """
    compare, grey = _find_comparison(name, protocol)
    values = np.empty(len(truth))
    for rows, left, right in _pairs(truth, decoded, protocol=protocol, grey=grey):
        values[rows] = compare(left, right)
    return values


def tabulate_image_metric(
    name: str, truth: np.ndarray, decoded: np.ndarray, *, protocol: Protocol = "native"
) -> np.ndarray:
    """Return the metric `name` of every decoded image beside every true one.

    Parameters
    ----------
    name, truth, decoded, protocol
        As for `compute_image_metric`, with any numbers of images.

    Returns
    -------
    float array of shape (n_decoded, n_truth)
        Equal to `compute_image_metric` of each pair. Each image is prepared once, and of SSIM only the products are
        filtered pair by pair, which is three times as fast.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((3, 12, 12))
    >>> tabulate_image_metric("ssim", images, images).argmax(axis=1)
    array([0, 1, 2])
    """
    compare, grey = _find_comparison(name, protocol)
    left, right = (_prepare(images, protocol=protocol, grey=grey) for images in (truth, decoded))
    if left.shape[1:3] != right.shape[1:3]:
        raise DataError(f"images of {left.shape[1:3]} and {right.shape[1:3]} pixels cannot be compared.")
    if name == "ssim":
        return _tabulate_ssim(left[..., 0], right[..., 0])
    table = np.empty((len(right), len(left)))
    for column, image in enumerate(left):
        table[:, column] = compare(*np.broadcast_arrays(image, right))
    return table


def prepare_images(images: np.ndarray, *, what: str = "images") -> np.ndarray:
    """Return images as float64 of shape (n_images, height, width, 1 or 3) between 0 and 1.

    Parameters
    ----------
    images : array of shape (n_images, height, width[, 1 or 3])
        uint8 (divided by 255), or float between 0 and 1.
    what
        Name in the message.

    Raises
    ------
    DataError
        If the shape, the type or the range is another one, or a value is not finite.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise DataError(
            f"{what} must have the shape (n_images, height, width) or (n_images, height, width, 1 or 3), "
            f"not {images.shape}."
        )
    if images.dtype == np.uint8:
        return images / 255.0
    if images.dtype.kind != "f":
        raise DataError(f"{what} must be uint8, or float between 0 and 1, not {images.dtype}.")
    values = images.astype(np.float64)
    # Not (inside) rather than (outside): a NaN is neither. Single-precision rounding may leave the range.
    lowest, highest = values.min(axis=(1, 2, 3)), values.max(axis=(1, 2, 3))
    bad = np.flatnonzero(~((lowest >= -1e-6) & (highest <= 1 + 1e-6)))
    if bad.size:
        raise DataError(
            f"{bad.size} of the {what} hold values outside 0 to 1 or NaN, first in row {bad[0]}: "
            "clip them where they are made, or pass uint8."
        )
    return values


def _find_comparison(name: str, protocol: Protocol) -> tuple[Compare, bool]:
    """Return the comparison of prepared pairs, and whether they become grey."""
    check_option("image metric", name, _COMPARISONS)
    check_option("protocol of an image metric", protocol, get_args(Protocol))
    # Resizing is linear, so grey may come before it: a third of the work.
    return _COMPARISONS[name], name.startswith("ssim")


def _pairs(
    truth: np.ndarray, decoded: np.ndarray, *, protocol: Protocol, grey: bool
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield row ranges and prepared image pairs, in batches of bounded memory."""
    if len(truth) != len(decoded):
        raise DataError(f"{len(truth)} seen images cannot be paired with {len(decoded)} decoded ones.")
    if protocol == "native" and truth.shape[1:3] != decoded.shape[1:3]:
        raise DataError(
            f"seen images of {truth.shape[1:3]} pixels cannot meet decoded ones of {decoded.shape[1:3]} "
            "at their native size; resize them or use the protocol '425'."
        )
    # At least the prepared size, so that enlarged thumbnails do not fill the memory.
    size = 0 if protocol == "native" else 425
    per_image = max(math.prod(truth.shape[1:]), math.prod(decoded.shape[1:]), 3 * size**2, 1)
    step = max(1, BATCH_VALUES // per_image)
    for start in range(0, len(truth), step):
        rows = slice(start, min(start + step, len(truth)))
        left = prepare_images(truth[rows], what="seen images")
        right = prepare_images(decoded[rows], what="decoded images")
        if grey:
            left, right = _to_grey(left), _to_grey(right)
        left, right = _resize(left, protocol), _resize(right, protocol)
        if left.shape != right.shape:  # a grey image beside an RGB one
            left, right = np.broadcast_arrays(left, right)
        yield rows, left, right


def _prepare(images: np.ndarray, *, protocol: Protocol, grey: bool) -> np.ndarray:
    """Return all images as a metric compares them."""
    ready = prepare_images(images)
    return _resize(_to_grey(ready) if grey else ready, protocol)


def _to_grey(images: np.ndarray) -> np.ndarray:
    """Return images of shape (n_images, height, width, 1)."""
    if images.shape[3] == 1:
        return images
    return (images @ np.array(GREY_WEIGHTS))[..., None]


def _resize(images: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Resize to 256 x 256 and then to 425 x 425, bilinear; ``native`` leaves the images."""
    if protocol == "native":
        return images
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    for size in (256, 425):
        planes = torch.nn.functional.interpolate(
            planes, size=(size, size), mode="bilinear", antialias=protocol == "425", align_corners=False
        )
    return planes.numpy().transpose(0, 2, 3, 1)


def _compare_pixcorr(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    a = left.reshape(len(left), -1)
    b = right.reshape(len(right), -1)
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    spread_a, spread_b = (np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1]) for x in (a, b))
    varied = (spread_a > CONSTANT_SPREAD) & (spread_b > CONSTANT_SPREAD)
    covariance = np.einsum("ij,ij->i", a, b) / a.shape[1]
    values = np.zeros(len(a))  # for constant images, which carry no information
    np.divide(covariance, spread_a * spread_b, out=values, where=varied)
    return np.clip(values, -1.0, 1.0)


def _compare_mse(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.mean((left - right) ** 2, axis=(1, 2, 3))


def _compare_ssim(left: np.ndarray, right: np.ndarray, *, axes: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """Return the mean SSIM over the positions whose window, which extends along `axes`, lies inside the image."""
    x, y = left[..., 0], right[..., 0]  # (n_images, height, width)
    if min(x.shape[axis] for axis in axes) <= 2 * SSIM_RADIUS:
        raise DataError(f"SSIM needs images of at least 11 x 11 pixels, not {x.shape[1:]}.")
    mean_x, mean_y, square, product = (_blur(z, axes) for z in (x, y, x * x + y * y, x * y))
    both = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    # Only the sum of the two variances enters, so four filtered images do instead of five.
    numerator = (2 * both + SSIM_C1) * (2 * (product - both) + SSIM_C2)
    return (numerator / ((squares + SSIM_C1) * (square - squares + SSIM_C2))).mean(axis=(1, 2))


def _tabulate_ssim(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the SSIM of every image of `right` with every one of `left`, grey images of shape (n, height, width)."""
    if min(left.shape[1:]) <= 2 * SSIM_RADIUS:
        raise DataError(f"SSIM needs images of at least 11 x 11 pixels, not {left.shape[1:]}.")
    axes = (1, 2)
    means = [_blur(images, axes) for images in (left, right)]
    squares = [mean * mean for mean in means]
    variances = [
        _blur(images * images, axes) - square for images, square in zip((left, right), squares, strict=True)
    ]
    table = np.empty((len(right), len(left)))
    # Means and variances are those of single images; only the products are filtered pair by pair.
    step = max(1, 4 * BATCH_VALUES // left[0].size)
    for column in range(len(left)):
        for start in range(0, len(right), step):
            rows = slice(start, start + step)
            both = means[1][rows] * means[0][column]
            covariance = _blur(right[rows] * left[column], axes) - both
            numerator = (2 * both + SSIM_C1) * (2 * covariance + SSIM_C2)
            numerator /= squares[1][rows] + squares[0][column] + SSIM_C1
            numerator /= variances[1][rows] + variances[0][column] + SSIM_C2
            table[rows, column] = numerator.mean(axis=axes)
    return table


def _blur(images: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Filter (n_images, height, width) with the Gaussian window along `axes`, keeping full windows only.

    A slab of rows is filtered by one product with a banded matrix, which beats a loop over pixels.
    """
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    window = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window /= window.sum()
    band = np.zeros((SLAB, SLAB + 2 * SSIM_RADIUS))  # row i weighs pixels i to i + 10
    for row in range(SLAB):
        band[row, row : row + len(window)] = window
    for axis in sorted(axes, reverse=True):  # the last axis first: it is contiguous
        n = images.shape[axis] - 2 * SSIM_RADIUS
        slabs = []
        for start in range(0, n, SLAB):
            rows = min(SLAB, n - start)
            matrix = band[:rows, : rows + 2 * SSIM_RADIUS]
            stop = start + rows + 2 * SSIM_RADIUS
            if axis == 1:
                slabs.append(matrix @ images[:, start:stop])
            else:
                flat = images[:, :, start:stop].reshape(-1, stop - start)
                slabs.append((flat @ matrix.T).reshape(*images.shape[:2], rows))
        images = slabs[0] if len(slabs) == 1 else np.concatenate(slabs, axis=axis)
    return images


_COMPARISONS: dict[str, Compare] = {
    "pixcorr": _compare_pixcorr,
    "mse": _compare_mse,
    "ssim": _compare_ssim,
    "ssim_legacy": partial(_compare_ssim, axes=(1,)),
}


# --- every distinct image once --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTable:
    """Every distinct image of a comparison once, and where each of them is used.

    Parameters
    ----------
    images : uint8 array of shape (n_distinct, height, width, 3)
        In the order of first use, the seen ones first.
    seen : int array of shape (n_rows,)
        Distinct image that each row saw.
    made : dict
        Method to an int array of shape (n_draws, n_rows).
    """

    images: np.ndarray
    seen: np.ndarray
    made: Mapping[str, np.ndarray]

    @cached_property
    def shown(self) -> np.ndarray:
        """The distinct images that were seen, ascending."""
        return np.unique(self.seen)

    @property
    def column(self) -> np.ndarray:
        """Entry of `shown` that each row saw, shape (n_rows,)."""
        return np.searchsorted(self.shown, self.seen)


def split_rounds(images: np.ndarray) -> np.ndarray:
    """Return images as (n_draws, n_rows, height, width, 3), one round per draw, without a copy.

    Parameters
    ----------
    images : array of shape (n_rows, height, width, 3) or (n_rows, n_draws, height, width, 3)
    """
    return images[None] if images.ndim == 4 else np.moveaxis(images, 1, 0)


def check_stack(images: np.ndarray, seen: np.ndarray, method: str) -> None:
    """Raise `DataError` unless the images of a method, one or several per row, have the shape of the seen ones."""
    several = (len(seen), *images.shape[1:2], *seen.shape[1:])
    if images.shape not in (seen.shape, several) or 0 in images.shape:
        raise DataError(
            f"images of {method!r} have the shape {images.shape}, but must have that of the seen ones, "
            f"{seen.shape}, with the draws in the second dimension if there are several."
        )
    if images.dtype != np.uint8 or seen.dtype != np.uint8:
        raise DataError(f"images to compare must be uint8, not {images.dtype} ({method!r}) and {seen.dtype}.")


def make_image_table(seen: np.ndarray, made: Mapping[str, np.ndarray]) -> ImageTable:
    """Collect the distinct images of a comparison.

    Parameters
    ----------
    seen : uint8 array of shape (n_rows, height, width, 3)
    made
        Method to uint8 images of the same shape, or of shape (n_rows, n_draws, height, width, 3).

    Raises
    ------
    DataError
        If a shape does not fit.
    """
    known: dict[bytes, int] = {}
    images: list[np.ndarray] = []

    def number(image: np.ndarray) -> int:
        # The content decides and not the place: the same picture is shown to several subjects.
        digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
        if digest not in known:
            known[digest] = len(known)
            images.append(image)
        return known[digest]

    shown = np.array([number(image) for image in seen])
    places = {}
    for method, stack in made.items():
        check_stack(stack, seen, method)
        places[method] = np.array([[number(image) for image in one] for one in split_rounds(stack)])
    return ImageTable(np.stack(images), shown, places)
