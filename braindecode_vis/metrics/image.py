"""Image metrics: pixel correlation, mean squared error and SSIM, one value per image.

Every metric is named with its protocol. ``@native`` compares images at the size they have. ``@425`` is the
protocol of the natural-image literature: both images are resized to 256 x 256, then to 425 x 425 (bilinear,
antialiased, as torchvision does). SSIM is taken on grey images with Gaussian weights (sigma 1.5, population
covariance, data range 1), as current scikit-image computes it; ``ssim_legacy`` treats the columns of the grey
image as channels, which is what scikit-image up to 0.18 did when called with ``multichannel=True``, and serves
only to reproduce older numbers.

References
----------
Wang et al. (2004), Image quality assessment: from error visibility to structural similarity,
doi:10.1109/TIP.2003.819861. Scotti et al. (2024), MindEye2, arXiv:2403.11207 (the @425 protocol).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from braindecode_vis.checks import DataError, check_option

GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # of scikit-image's rgb2gray (ITU-R BT.709)
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # a window of 11 pixels: 3.5 sigma, rounded
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for a data range of 1
#: An image whose pixels (0 to 1) spread less than this is constant up to rounding: one grey level of 255 in a
#: single pixel of a 425 x 425 RGB image spreads five times more.
CONSTANT_SPREAD = 1e-6
BATCH_VALUES = 1 << 16  # numbers per batch: half a megabyte in double precision stays in the cache
SLAB = 32  # rows filtered by one matrix product


def compute_image_metric(name: str, truth: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Return the metric `name` for every pair of images.

    Parameters
    ----------
    name
        One of `IMAGE_METRICS`: ``pixcorr``, ``mse``, ``ssim`` or ``ssim_legacy`` with ``@native`` or ``@425``.
    truth, decoded : arrays of shape (n_images, height, width[, 1 or 3])
        uint8, or float between 0 and 1. Row i of both is the same item. Sizes may differ under ``@425`` only.

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
    >>> compute_image_metric("pixcorr@native", images, 1 - images).round(6)
    array([-1., -1.])
    """
    check_option("image metric", name, IMAGE_METRICS)
    compare = _COMPARISONS[name.split("@")[0]]
    size = None if name.endswith("@native") else 425
    grey = name.startswith("ssim")  # resizing is linear, so grey may come first: a third of the work
    values = np.empty(len(truth))
    for rows, left, right in _pairs(truth, decoded, size=size, grey=grey):
        values[rows] = compare(left, right)
    return values


def tabulate_image_metric(name: str, truth: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Return the metric `name` of every decoded image beside every true one.

    Parameters
    ----------
    name, truth, decoded
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
    >>> tabulate_image_metric("ssim@native", images, images).argmax(axis=1)
    array([0, 1, 2])
    """
    check_option("image metric", name, IMAGE_METRICS)
    size, grey = None if name.endswith("@native") else 425, name.startswith("ssim")
    left, right = (_prepare(images, size=size, grey=grey) for images in (truth, decoded))
    if left.shape[1:3] != right.shape[1:3]:
        raise DataError(f"images of {left.shape[1:3]} and {right.shape[1:3]} pixels cannot be compared.")
    if name.startswith("ssim@"):
        return _tabulate_ssim(left[..., 0], right[..., 0])
    compare = _COMPARISONS[name.split("@")[0]]
    table = np.empty((len(right), len(left)))
    for column, image in enumerate(left):
        table[:, column] = compare(*np.broadcast_arrays(image, right))
    return table


def pixcorr(truth: np.ndarray, decoded: np.ndarray, *, protocol: str = "native") -> np.ndarray:
    """Return the Pearson correlation of all pixel values of each pair; shape (n_images,).

    A constant image has no correlation with anything. It is scored 0, the value of an image that carries no
    information, so that a generator that returns blank images lowers the mean instead of leaving it.
    See `compute_image_metric` for the parameters.
    """
    return compute_image_metric(f"pixcorr@{protocol}", truth, decoded)


def mse(truth: np.ndarray, decoded: np.ndarray, *, protocol: str = "native") -> np.ndarray:
    """Return the mean squared difference of pixel values between 0 and 1 of each pair; shape (n_images,).

    See `compute_image_metric` for the parameters.
    """
    return compute_image_metric(f"mse@{protocol}", truth, decoded)


def ssim(
    truth: np.ndarray, decoded: np.ndarray, *, protocol: str = "native", legacy: bool = False
) -> np.ndarray:
    """Return the structural similarity of the grey images of each pair; shape (n_images,).

    Parameters
    ----------
    truth, decoded
        As for `compute_image_metric`, at least 11 pixels in each direction.
    protocol
        ``native`` or ``425``.
    legacy
        Take the columns of the image as channels, as old code did by mistake. Never compare with the other.
    """
    return compute_image_metric(f"ssim{'_legacy' if legacy else ''}@{protocol}", truth, decoded)


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


def _pairs(
    truth: np.ndarray, decoded: np.ndarray, *, size: int | None, grey: bool
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield row ranges and prepared image pairs, in batches of bounded memory."""
    if len(truth) != len(decoded):
        raise DataError(f"{len(truth)} seen images cannot be paired with {len(decoded)} decoded ones.")
    if size is None and truth.shape[1:3] != decoded.shape[1:3]:
        raise DataError(
            f"seen images of {truth.shape[1:3]} pixels cannot meet decoded ones of {decoded.shape[1:3]} "
            "at their native size; resize them or use the protocol '425'."
        )
    per_image = max(math.prod(truth.shape[1:]), math.prod(decoded.shape[1:]), 3 * (size or 0) ** 2, 1)
    step = max(1, BATCH_VALUES // per_image)
    for start in range(0, len(truth), step):
        rows = slice(start, min(start + step, len(truth)))
        left = prepare_images(truth[rows], what="seen images")
        right = prepare_images(decoded[rows], what="decoded images")
        if grey:
            left, right = _to_grey(left), _to_grey(right)
        if size is not None:
            left, right = _resize(_resize(left, 256), size), _resize(_resize(right, 256), size)
        if left.shape != right.shape:  # a grey image beside an RGB one
            left, right = np.broadcast_arrays(left, right)
        yield rows, left, right


def _prepare(images: np.ndarray, *, size: int | None, grey: bool) -> np.ndarray:
    """Return all images as a metric compares them."""
    ready = prepare_images(images)
    ready = _to_grey(ready) if grey else ready
    return ready if size is None else _resize(_resize(ready, 256), size)


def _to_grey(images: np.ndarray) -> np.ndarray:
    """Return images of shape (n_images, height, width, 1)."""
    if images.shape[3] == 1:
        return images
    return (images @ np.array(GREY_WEIGHTS))[..., None]


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize to (size, size), bilinear and antialiased."""
    import torch

    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    resized = torch.nn.functional.interpolate(
        planes, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.numpy().transpose(0, 2, 3, 1)


def _compare_pixcorr(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    a = left.reshape(len(left), -1)
    b = right.reshape(len(right), -1)
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    spread_a, spread_b = (np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1]) for x in (a, b))
    varied = (spread_a > CONSTANT_SPREAD) & (spread_b > CONSTANT_SPREAD)
    covariance = np.einsum("ij,ij->i", a, b) / a.shape[1]
    values = np.zeros(len(a))
    np.divide(covariance, spread_a * spread_b, out=values, where=varied)
    return np.clip(values, -1.0, 1.0)


def _compare_mse(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.mean((left - right) ** 2, axis=(1, 2, 3))


def _compare_ssim(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return _ssim_map(left[..., 0], right[..., 0], axes=(1, 2)).mean(axis=(1, 2))


def _compare_ssim_legacy(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return _ssim_map(left[..., 0], right[..., 0], axes=(1,)).mean(axis=(1, 2))


def _ssim_map(x: np.ndarray, y: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the SSIM at every position whose window lies inside the image."""
    if min(x.shape[axis] for axis in axes) <= 2 * SSIM_RADIUS:
        raise DataError(f"SSIM needs images of at least 11 x 11 pixels, not {x.shape[1:]}.")
    mean_x, mean_y, square, product = (_blur(z, axes) for z in (x, y, x * x + y * y, x * y))
    both = mean_x * mean_y
    squares = mean_x * mean_x + mean_y * mean_y
    # Only the sum of the two variances enters, so four filtered images do instead of five.
    numerator = (2 * both + SSIM_C1) * (2 * (product - both) + SSIM_C2)
    return numerator / ((squares + SSIM_C1) * (square - squares + SSIM_C2))


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
    band = np.zeros((SLAB, SLAB + 2 * SSIM_RADIUS))
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


_COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pixcorr": _compare_pixcorr,
    "mse": _compare_mse,
    "ssim": _compare_ssim,
    "ssim_legacy": _compare_ssim_legacy,
}
#: Names that `compute_image_metric` knows.
IMAGE_METRICS = tuple(f"{name}@{protocol}" for name in _COMPARISONS for protocol in ("native", "425"))
