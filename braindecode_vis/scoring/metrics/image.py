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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np

from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.stimuli import ImageRows, Images, join_pictures

Protocol = Literal["native", "425", "425-legacy"]
Compare = Callable[..., np.ndarray]
GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # of scikit-image's rgb2gray (ITU-R BT.709)
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # a window of 11 pixels: 3.5 sigma, rounded
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for a data range of 1
# Variances are taken about it, since squares of bright values would round them away.
_MIDDLE = np.float32(0.5)
#: An image whose pixels (0 to 1) spread less than this is constant up to rounding: one grey level of 255 in a
#: single pixel of a 425 x 425 RGB image spreads five times more.
CONSTANT_SPREAD = 1e-6
BATCH_VALUES = 1 << 16  # numbers per batch: half a megabyte in double precision stays in the cache
SLAB = 16  # rows filtered by one matrix product
SSIM_ROWS = 104  # of the map of SSIM that are computed at once
MOST_COPIED = 1000  # images of pairs that are taken from their arrays at once
HELD = 4  # seen images that are held prepared, 0.8 MB each
SMALL, LARGE = 256, 425  # pixels: images are resized to the first, then to the second
#: Products of as many pixels of -128 to 127 add up to 2^24 at most, so that single precision holds every sum exactly.
EXACT_PIXELS = 1024
LEAST_VARIED = 0.02  # share of the mean square that a variance must be to be found as a difference
#: Pixels from which on an image is compared in single precision, in half the time; values differ by about 1e-6.
SINGLE_PRECISION = 128**2


def compute_image_metric(
    name: str, truth: Images, decoded: Images, *, protocol: Protocol = "native"
) -> np.ndarray:
    """Return the metric `name` for every pair of images.

    Parameters
    ----------
    name
        ``pixcorr``, ``mse``, ``ssim`` or ``ssim_legacy``. A constant image has no pixel correlation with anything; it
        is scored 0, so that a generator of blank images lowers the mean instead of leaving it.
    truth, decoded : arrays of shape (n_images, height, width[, 1 or 3]), or `ImageRows`
        uint8, or float between 0 and 1. Row i of both is the same item. Sizes may differ, but not under ``native``. Of
        rows that are read from files, few are in memory at a time.
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
    return compute_image_metrics((name,), truth, decoded, protocol=protocol)[name]


def compute_image_metrics(
    names: Sequence[str], truth: Images, decoded: Images, *, protocol: Protocol = "native"
) -> dict[str, np.ndarray]:
    """Return several metrics for every pair of images, each of which is resized once for all of them.

    Parameters
    ----------
    names
        As the name of `compute_image_metric`; the rest is as there, too.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((2, 28, 28))
    >>> {name: values.tolist() for name, values in compute_image_metrics(("mse", "ssim"), images, images).items()}
    {'mse': [0.0, 0.0], 'ssim': [1.0, 1.0]}
    """
    compares, scratch = {name: _find_comparison(name, protocol) for name in names}, _Scratch()
    values = {name: np.empty(len(truth)) for name in names}
    for rows, left, right in _pairs(truth, decoded, names, protocol, scratch):
        for name, compare in compares.items():
            values[name][rows] = compare(left, right, scratch, protocol != "native")
    return values


def compute_metrics_of_pairs(
    names: Sequence[str],
    seen: Images,
    rounds: Sequence[Images],
    pairs: np.ndarray,
    *,
    protocol: Protocol = "native",
) -> dict[str, np.ndarray]:
    """Return several metrics of pairs of images of several rounds and seen ones, each resized as seldom as possible.

    Parameters
    ----------
    names, protocol
        As for `compute_image_metrics`.
    seen : array of shape (n_seen, height, width[, 1 or 3]), or `ImageRows`
        A few of them are held prepared.
    rounds
        Arrays of shape (n_images, height, width[, 1 or 3]), or `ImageRows`: draws of one method, or of several.
    pairs : int array of shape (n_pairs, 3)
        Round, image in it and seen image. Those that share an image should follow each other.

    Returns
    -------
    dict
        Name to a float array of shape (n_pairs,), equal to `compute_image_metrics` of each.

    Examples
    --------
    >>> images = np.random.default_rng(0).random((3, 28, 28))
    >>> compute_metrics_of_pairs(("ssim",), images, [1 - images, images], np.array([[1, 0, 0], [1, 2, 2]]))
    {'ssim': array([1., 1.])}
    """
    values = {name: np.empty(len(pairs)) for name in names}
    if protocol == "native":  # nothing is resized
        for number, made in enumerate(rounds):
            own = np.flatnonzero(pairs[:, 0] == number)
            for places in np.array_split(own, len(own) // MOST_COPIED + 1):
                _, rows, columns = pairs[places].T
                for name, found in compute_image_metrics(names, seen[columns], made[rows]).items():
                    values[name][places] = found
        return values
    compares, scratch = {name: _find_comparison(name, protocol) for name in names}, _Scratch()
    dtype, held = _choose_precision(seen, protocol), dict[int, np.ndarray]()

    def prepare_seen(column: int) -> np.ndarray:
        # The last one used goes to the end; the first one is forgotten.
        planes = held.pop(column, None)
        if planes is None:
            one = seen[column : column + 1]
            planes = _prepare(one, names, protocol, dtype, scratch, what="seen images").copy(order="K")
        held[column] = planes
        if len(held) > HELD:
            held.pop(next(iter(held)))
        return planes

    last, right = (-1, -1), np.empty(0)
    for place, (number, row, column) in enumerate(pairs.tolist()):
        left = prepare_seen(column)
        if (number, row) != last:
            one = rounds[number][row : row + 1]
            right = _prepare(one, names, protocol, dtype, scratch, what="decoded images")
            last = number, row
        pair = (left, right) if left.shape == right.shape else np.broadcast_arrays(left, right)
        for name, compare in compares.items():
            values[name][place] = compare(*pair, scratch, True)[0]
    return values


def tabulate_image_metric(
    name: str, truth: Images, decoded: Images, *, protocol: Protocol = "native"
) -> np.ndarray:
    """Return the metric `name` of every decoded image beside every true one.

    Parameters
    ----------
    name, truth, decoded, protocol
        As for `compute_image_metric`, with any numbers of images.

    Returns
    -------
    float array of shape (n_decoded, n_truth)
        Equal to `compute_image_metric` of each pair, SSIM to 1e-5 (1e-4 where all of both images is white): it
        is computed in single precision. Each image is prepared once, and of SSIM only the products are filtered pair by
        pair, which is eight times as fast.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).random((3, 12, 12))
    >>> tabulate_image_metric("ssim", images, images).argmax(axis=1)
    array([0, 1, 2])
    """
    compare, resized = _find_comparison(name, protocol), protocol != "native"
    dtype = np.float32 if name == "ssim" else _choose_precision(truth, protocol)
    left, right = (_prepare(images, (name,), protocol, dtype, _Scratch()) for images in (truth, decoded))
    if left.shape[2:] != right.shape[2:]:
        raise DataError(f"images of {left.shape[2:]} and {right.shape[2:]} pixels cannot be compared.")
    if name == "ssim":
        return _tabulate_ssim(*(_enlarge(x[:, 0]) if resized else x[:, 0] - _MIDDLE for x in (left, right)))
    table, scratch = np.empty((len(right), len(left))), _Scratch()
    for column, image in enumerate(left):
        table[:, column] = compare(*np.broadcast_arrays(image, right), scratch, resized)
    return table


def tabulate_pixels(decoded: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixel correlation and the mean squared error of every decoded image beside every true one.

    Both follow from sums of products of whole numbers, which are exact; so images that tie do so to the last bit.

    Parameters
    ----------
    decoded, truth : uint8 arrays of shape (n_decoded, height, width[, 1 or 3]) and (n_truth, height, width[, 1 or 3])

    Returns
    -------
    correlations, errors : float arrays of shape (n_decoded, n_truth)
        ``pixcorr`` and ``mse`` of each pair, as `compute_image_metric` gives them. A constant image correlates 0.

    Examples
    --------
    >>> images = np.array([[[0, 255]], [[255, 0]], [[9, 9]]], np.uint8)
    >>> correlations, errors = tabulate_pixels(images, images[:2])
    >>> correlations.tolist(), errors[:2].tolist()
    ([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]])
    """
    if decoded.shape[1:] != truth.shape[1:] or (decoded.dtype, truth.dtype) != (np.uint8, np.uint8):
        raise DataError(
            f"images to tabulate must be uint8 and of one shape, not {decoded.dtype} of {decoded.shape[1:]} and "
            f"{truth.dtype} of {truth.shape[1:]}."
        )
    flats = [images.reshape(len(images), -1) for images in (decoded, truth)]
    n_pixels = flats[0].shape[1]
    products = np.zeros((len(decoded), len(truth)))
    sums, squares = ([np.zeros(len(flat)) for flat in flats] for _ in range(2))
    for start in range(0, n_pixels, EXACT_PIXELS):
        parts = [np.subtract(flat[:, start : start + EXACT_PIXELS], 128, dtype=np.float32) for flat in flats]
        products += parts[0] @ parts[1].T
        for side, part in enumerate(parts):
            sums[side] += part.sum(axis=1)
            squares[side] += np.einsum("ij,ij->i", part, part)
    spreads = [np.sqrt(n_pixels * square - total**2) for total, square in zip(sums, squares, strict=True)]
    norms = np.outer(*spreads)
    correlations = np.zeros_like(norms)
    np.divide(n_pixels * products - np.outer(*sums), norms, out=correlations, where=norms > 0)
    errors = (squares[0][:, None] - 2 * products + squares[1]) / (255**2 * n_pixels)
    return np.clip(correlations, -1.0, 1.0), errors


def prepare_images(
    images: np.ndarray, *, what: str = "images", dtype: Any = np.float64, out: np.ndarray | None = None
) -> np.ndarray:
    """Return images as numbers of shape (n_images, height, width, 1 or 3) between 0 and 1.

    Parameters
    ----------
    images : array of shape (n_images, height, width[, 1 or 3])
        uint8 (divided by 255), or float between 0 and 1.
    what
        Name in the message.
    dtype
        Of the result.
    out
        Array for the result of uint8 images, with as many values.

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
        values = np.empty(images.shape, dtype) if out is None else out.reshape(images.shape)
        values[...] = images  # a division that converts would take twice as long
        return np.divide(values, 255, out=values)
    if images.dtype.kind != "f":
        raise DataError(f"{what} must be uint8, or float between 0 and 1, not {images.dtype}.")
    values = images.astype(dtype)
    # Not (inside) rather than (outside): a NaN is neither. Single-precision rounding may leave the range.
    lowest, highest = values.min(axis=(1, 2, 3)), values.max(axis=(1, 2, 3))
    bad = np.flatnonzero(~((lowest >= -1e-6) & (highest <= 1 + 1e-6)))
    if bad.size:
        raise DataError(
            f"{bad.size} of the {what} hold values outside 0 to 1 or NaN, first in row {bad[0]}: "
            "clip them, or pass uint8."
        )
    return values


class _Scratch(dict[str, np.ndarray]):
    """Arrays that the next images use again: of large ones, fresh memory costs as much as the arithmetic."""

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array of that name, whose values are anything."""
        size = math.prod(shape)
        if name not in self or self[name].size < size or self[name].dtype != dtype:
            self[name] = np.empty(size, dtype)
        return self[name][:size].reshape(shape)


def _find_comparison(name: str, protocol: Protocol) -> Compare:
    """Return the comparison of prepared pairs."""
    check_option("image metric", name, _COMPARISONS)
    check_option("protocol of an image metric", protocol, get_args(Protocol))
    return _COMPARISONS[name]


def _pairs(
    truth: Images, decoded: Images, names: Sequence[str], protocol: Protocol, scratch: _Scratch
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield row ranges and prepared image pairs, in batches of bounded memory."""
    if len(truth) != len(decoded):
        raise DataError(f"{len(truth)} seen images cannot be paired with {len(decoded)} decoded ones.")
    if protocol == "native" and truth.shape[1:3] != decoded.shape[1:3]:
        raise DataError(
            f"seen images of {truth.shape[1:3]} pixels cannot be compared with decoded ones of "
            f"{decoded.shape[1:3]} at their native size; resize them or use the protocol '425'."
        )
    # At least the prepared size, so that enlarged thumbnails do not fill the memory.
    size = 0 if protocol == "native" else LARGE
    per_image = max(math.prod(truth.shape[1:]), math.prod(decoded.shape[1:]), 3 * size**2, 1)
    step, dtype = max(1, BATCH_VALUES // per_image), _choose_precision(truth, protocol)
    for start in range(0, len(truth), step):
        rows = slice(start, min(start + step, len(truth)))
        left = _prepare(truth[rows], names, protocol, dtype, scratch, what="seen images")
        right = _prepare(decoded[rows], names, protocol, dtype, scratch, what="decoded images")
        if left.shape != right.shape:  # a grey image beside an RGB one
            left, right = np.broadcast_arrays(left, right)
        yield rows, left, right


def _choose_precision(truth: Images, protocol: Protocol) -> Any:
    large = protocol != "native" or math.prod(truth.shape[1:3]) >= SINGLE_PRECISION
    return np.float32 if large else np.float64


def _prepare(
    images: Images,
    names: Sequence[str],
    protocol: Protocol,
    dtype: Any,
    scratch: _Scratch,
    *,
    what: str = "images",
) -> np.ndarray:
    """Return all images as metrics compare them, (n_images, 1 or 3, height, width).

    Unless the protocol is native, they are resized to 256 pixels and come as R x' R' of `_make_matrix`, (n_images, 1 or
    3, 256 of the width, 256 of the height): products of these are those of 425 pixels. x is then the image less 1/2. In
    memory, colours then lie within the lines of the width.
    """
    if len(images) > 1 and (isinstance(images, ImageRows) or protocol != "native"):
        # One by one: at its own size an image may take many times what is compared of it.
        rows = [slice(row, row + 1) for row in range(len(images))]
        return np.concatenate(
            [_prepare(images[row], names, protocol, dtype, scratch, what=what).copy() for row in rows]
        )
    images = np.asarray(images)
    place = "both" if protocol != "native" else what  # what is not returned may lie in one place: the cache
    grey_alone = all(name.startswith("ssim") for name in names)
    is_plain = images.ndim == 4 and images.shape[3] in (1, 3) and images.size > 0
    if protocol != "native" and is_plain and images.dtype == np.uint8:
        lines = _resize_bytes(images[0], protocol, dtype, scratch, place, grey=grey_alone)
        lines = _filter(lines, 1, str(protocol), scratch, f"{what}, axis 2")
        return lines.reshape(1, SMALL, -1, SMALL).transpose(0, 2, 1, 3)
    values = prepare_images(images, what=what, dtype=dtype, out=scratch.take(place, images.shape, dtype))
    if protocol != "native":  # of a constant, the resize leaves what it is
        values -= _MIDDLE
    n_images, height, width, n_planes = values.shape
    if n_planes == 3 and grey_alone:  # resizing is linear: it may come later
        values, n_planes = _take_grey(values.reshape(-1, 3), scratch, f"grey of {place}"), 1
    if protocol != "native":
        # Turned by the first product, each axis is filtered by what stands on its left, which is quicker.
        lines = _filter(
            values.reshape(n_images, height, -1), 1, str(protocol), scratch, f"{place}, axis 1", turn=True
        )
        lines = lines.reshape(n_images, width, -1)  # (n_images, width, n_planes * 256)
        lines = _filter(lines, 1, str(protocol), scratch, f"{what}, axis 2")
        return lines.reshape(n_images, SMALL, n_planes, SMALL).transpose(0, 2, 1, 3)
    planes = values.reshape(n_images, height, width, n_planes).transpose(0, 3, 1, 2)
    if n_planes == 3:
        scratch.take(f"planes of {place}", planes.shape, dtype)[...] = planes
        planes = scratch.take(f"planes of {place}", planes.shape, dtype)
    return planes


def _resize_bytes(
    image: np.ndarray, protocol: Protocol, dtype: Any, scratch: _Scratch, place: str, *, grey: bool
) -> np.ndarray:
    """Return the first product of `_prepare` for a uint8 image, turned: (1, width, n_planes * 256).

    Each slab takes its rows from the bytes, so that the image never leaves the cache as numbers four times as large.
    """
    height, width, n_planes = image.shape
    n_rows, slabs = _make_slabs(f"{protocol} of bytes", height, 1, dtype)
    grey &= n_planes == 3
    made = scratch.take(f"{place}, axis 1", (width * (1 if grey else n_planes), n_rows), dtype)
    for into, rows, part in slabs:
        lines = scratch.take(place, image[rows].shape, dtype)
        lines[...] = image[rows]
        lines -= 127.5
        if grey:  # resizing is linear: it may come later
            lines = _take_grey(lines.reshape(-1, 3), scratch, f"grey of {place}")
        np.matmul(lines.reshape(part.shape[1], -1).T, part.T, out=made[:, into])
    return made.reshape(1, width, -1)


def _take_grey(colours: np.ndarray, scratch: _Scratch, name: str) -> np.ndarray:
    """Return the weighted sum over the last axis of (n, 3), shape (n,)."""
    out = scratch.take(name, colours.shape[:1], colours.dtype)
    return np.matmul(colours, np.array(GREY_WEIGHTS, colours.dtype), out=out)


def _sum_planes(planes: np.ndarray, scratch: _Scratch, name: str) -> np.ndarray:
    """Return the grey of (n_images, 1 or 3, height, width), shape (n_images, height, width)."""
    if planes.shape[1] == 1:
        return planes[:, 0]
    shape, dtype = (len(planes), *planes.shape[2:]), planes.dtype
    total, part = scratch.take(name, shape, dtype), scratch.take("colour", shape, dtype)
    np.multiply(planes[:, 0], dtype.type(GREY_WEIGHTS[0]), out=total)
    for colour in (1, 2):
        total += np.multiply(planes[:, colour], dtype.type(GREY_WEIGHTS[colour]), out=part)
    return total


def _compare_pixcorr(left: np.ndarray, right: np.ndarray, scratch: _Scratch, resized: bool) -> np.ndarray:
    pair = [left, right]
    # An image of ones: each axis of 425 pixels has become R times ones of 256.
    across, down = (_make_level() if resized else np.ones(n) for n in left.shape[2:])
    n_pixels = left.shape[1] * (LARGE**2 if resized else math.prod(left.shape[2:]))
    means = [(x @ down.astype(x.dtype)).sum(axis=1) @ across / n_pixels for x in pair]

    def multiply() -> list[np.ndarray]:
        a, b = pair
        # Row by row in single precision, the rows in double: a whole image would lose the sixth digit in its sum.
        return [_multiply(x, y) / n_pixels for x, y in ((a, a), (b, b), (a, b))]

    squares_a, squares_b, products = multiply()
    found = [squares_a - means[0] ** 2, squares_b - means[1] ** 2, products - means[0] * means[1]]
    # Of an image that hardly varies, the difference would be rounding: its mean is taken from its pixels.
    if min((found[0] - LEAST_VARIED * squares_a).min(), (found[1] - LEAST_VARIED * squares_b).min()) <= 0:
        ones = np.outer(across, down).astype(left.dtype)
        pair = [
            x - mean.astype(x.dtype)[:, None, None, None] * ones for x, mean in zip(pair, means, strict=True)
        ]
        found = multiply()
    return _correlate(*found)


def _multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sum of products of two (n_images, n_planes, height, width), shape (n_images,)."""
    return np.vecdot(left, right).sum(axis=(1, 2), dtype=np.float64)


def _correlate(variance_a: np.ndarray, variance_b: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    # Rounding may leave a small negative number for a constant image.
    spread_a, spread_b = (np.sqrt(np.maximum(value, 0)) for value in (variance_a, variance_b))
    varied = (spread_a > CONSTANT_SPREAD) & (spread_b > CONSTANT_SPREAD)
    values = np.zeros(len(covariance))  # for constant images, which carry no information
    np.divide(covariance, spread_a * spread_b, out=values, where=varied)
    return np.clip(values, -1.0, 1.0)


def _compare_mse(left: np.ndarray, right: np.ndarray, scratch: _Scratch, resized: bool) -> np.ndarray:
    error = left - right
    n_pixels = left.shape[1] * (LARGE**2 if resized else math.prod(left.shape[2:]))
    return _multiply(error, error) / n_pixels


def _compare_ssim(
    left: np.ndarray, right: np.ndarray, scratch: _Scratch, resized: bool, *, axes: tuple[int, ...] = (1, 2)
) -> np.ndarray:
    """Return the mean SSIM over the positions whose window, which extends along `axes`, lies inside the image.

    With s = x + y and d = x - y, twice the sum of variances is var(s) + var(d), four times the covariance var(s) -
    var(d), and so it is with squared means. Equal images have d = 0, so that theirs is 1 to the last bit.
    """
    n_images, _, *size = left.shape
    x, y = (_sum_planes(z, scratch, f"grey of {z_name}") for z, z_name in ((left, "left"), (right, "right")))
    fields = scratch.take("fields", (2, n_images, *size), left.dtype)
    np.add(x, y, out=fields[0])
    np.subtract(x, y, out=fields[1])
    if not resized:
        fields[0] -= 1  # about the middle, so that squares of bright values do not round the variance away
    fields = fields.reshape(-1, *size)  # (2 * n_images, height, width)
    if resized and axes != (1, 2):
        fields, resized = _enlarge(fields).transpose(0, 2, 1), False
    if resized:  # the mean of the enlarged image is one product with the small one
        # Of what is done with, the memory is used again, which is in the cache: of the images' first products here.
        wide = _filter(fields, 2, "enlarge", scratch, "both, axis 1")
        means = _filter(fields, 2, "enlarge, blur", scratch, "means")
        n_rows = LARGE
    else:
        if min(fields.shape[axis] for axis in axes) <= 2 * SSIM_RADIUS:
            raise DataError(f"SSIM needs images of at least 11 x 11 pixels, not {fields.shape[1:]}.")
        wide, n_rows = fields, fields.shape[1]
        means = _filter(fields, 2, "blur", scratch, "means") if 2 in axes else fields
    n_rows, total = n_rows - 2 * SSIM_RADIUS, np.zeros(n_images)
    for start in range(0, n_rows, SSIM_ROWS):  # so many rows of all that is computed stay in the cache
        rows = (start, min(start + SSIM_ROWS, n_rows))
        seen = (start, rows[1] + 2 * SSIM_RADIUS)  # by the windows of these
        if resized:
            part = _filter(wide, 1, "enlarge", scratch, "part", rows=seen)
            mean = _filter(means, 1, "enlarge, blur", scratch, "mean", rows=rows)
        else:
            part = wide[:, slice(*seen)]
            mean = _filter(means[:, slice(*seen)], 1, "blur", scratch, "mean")
        squares = np.multiply(part, part, out=scratch.take("part", part.shape, part.dtype))
        blurred = _blur(squares, axes, scratch)
        (mean_s, mean_d), (var_s, var_d) = (x.reshape(2, n_images, *x.shape[1:]) for x in (mean, blurred))
        square = np.multiply(mean_s, mean_s, out=scratch.take("square", mean_s.shape, mean_s.dtype))
        var_s -= square
        var_s += 2 * SSIM_C2
        var_d -= np.multiply(mean_d, mean_d, out=mean_d)
        # The levels of black are near 0: from squares about the middle, little would be left of them beside C1.
        mean_s += 1
        mean_s *= mean_s
        mean_s += 2 * SSIM_C1
        value = np.subtract(var_s, var_d, out=square)
        var_s += var_d
        value *= np.subtract(mean_s, mean_d, out=var_d)
        mean_s += mean_d
        value /= np.multiply(var_s, mean_s, out=var_s)
        total += value.sum(axis=2).sum(axis=1, dtype=np.float64)
    return total / (n_rows * value.shape[2])


def _tabulate_ssim(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the SSIM of every image of `right` with every one of `left`, grey less 1/2, (n, height, width)."""
    if min(left.shape[1:]) <= 2 * SSIM_RADIUS:
        raise DataError(f"SSIM needs images of at least 11 x 11 pixels, not {left.shape[1:]}.")
    means = [_blur(images, (1, 2)) for images in (left, right)]
    variances = [
        _blur(images * images, (1, 2)) - mean * mean
        for images, mean in zip((left, right), means, strict=True)
    ]
    levels = [mean + _MIDDLE for mean in means]
    squares = [level * level for level in levels]
    variances[1] += np.float32(SSIM_C2)
    squares[1] += np.float32(SSIM_C1)
    table, scratch = np.empty((len(right), len(left))), _Scratch()
    # Means and variances are those of single images; only the products are filtered pair by pair.
    step, ones = max(1, 2 * BATCH_VALUES // left[0].size), np.ones(means[0].shape[2], np.float32)
    for column in range(len(left)):
        doubled, twice_mean, twice_level = (2 * x[column] for x in (left, means[0], levels[0]))
        for start in range(0, len(right), step):
            rows = slice(start, start + step)
            product = scratch.take("product", right[rows].shape, right.dtype)
            covariance = _blur(np.multiply(right[rows], doubled, out=product), (1, 2), scratch)
            numerator = scratch.take("numerator", covariance.shape, covariance.dtype)
            covariance -= np.multiply(means[1][rows], twice_mean, out=numerator)
            covariance += np.float32(SSIM_C2)
            # Not from the products about the middle: of those, little is left beside C1 where both are black.
            np.multiply(levels[1][rows], twice_level, out=numerator)
            numerator += np.float32(SSIM_C1)
            numerator *= covariance
            numerator /= np.add(squares[1][rows], squares[0][column], out=covariance)
            numerator /= np.add(variances[1][rows], variances[0][column], out=covariance)
            table[rows, column] = (numerator @ ones).sum(axis=1, dtype=np.float64)
    return table / math.prod(numerator.shape[1:])


def _blur(images: np.ndarray, axes: tuple[int, ...], scratch: _Scratch | None = None) -> np.ndarray:
    """Filter (n_images, height, width) with the Gaussian window along `axes`, keeping full windows only."""
    for axis in sorted(axes):  # the first axis first: fewer rows are left for the dearer filter along them
        images = _filter(images, axis, "blur", scratch, "blurred" if axis == 1 else "part")
    return images


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Return what `_prepare` made of images, (n_images, 256, 256), at 425 pixels, still less 1/2."""
    return _filter(_filter(images, 2, "enlarge"), 1, "enlarge")


def _filter(
    images: np.ndarray,
    axis: int,
    kind: str,
    scratch: _Scratch | None = None,
    name: str = "",
    *,
    rows: tuple[int, int] | None = None,
    turn: bool = False,
) -> np.ndarray:
    """Multiply (n_images, height, width) along an axis, 1 or 2, with the banded matrix of `_make_matrix`.

    A slab of rows is filtered by one product with a part of the matrix, which beats a loop over pixels. The result lies
    in `scratch` under `name`, if there is one; of the matrix, `rows` from the first up to the second will do. Along the
    first axis it may come turned, (n_images, width, n_rows), as the product writes it.
    """
    n_rows, slabs = _make_slabs(kind, images.shape[axis], axis, images.dtype, rows)
    n_images, height, width = images.shape
    shape = (n_images, n_rows, width) if axis == 1 else (n_images, height, n_rows)
    shape = (n_images, width, n_rows) if turn else shape
    made = np.empty(shape, images.dtype) if scratch is None else scratch.take(name, shape, images.dtype)
    if turn:
        for into, columns, part in slabs:
            np.matmul(images[:, columns].transpose(0, 2, 1), part.T, out=made[:, :, into])
        return made
    if axis == 1:
        for into, columns, part in slabs:
            np.matmul(part, images[:, columns], out=made[:, into])
        return made
    flat, flat_made = np.ascontiguousarray(images).reshape(-1, width), made.reshape(-1, n_rows)
    for into, columns, part in slabs:
        np.matmul(flat[:, columns], part, out=flat_made[:, into])
    return made


@lru_cache(maxsize=64)
def _make_slabs(
    kind: str, n: int, axis: int, dtype: Any, rows: tuple[int, int] | None = None
) -> tuple[int, list[tuple[slice, slice, np.ndarray]]]:
    """Return the rows of a matrix, and its slabs: which rows, the columns that count in them, and these values.

    Values for the last axis, 2, are transposed.
    """
    matrix, slabs = _make_matrix(kind, n)[slice(*rows or (None,))], []
    step = SLAB if axis == 1 or kind.startswith("425") else 2 * SLAB  # wide bands are worth narrow slabs
    for start in range(0, len(matrix), step):
        into = slice(start, min(start + step, len(matrix)))
        used = np.flatnonzero(matrix[into].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        part = matrix[into, columns] if axis == 1 else matrix[into, columns].T
        slabs.append((into, columns, np.ascontiguousarray(part, dtype)))
    return len(matrix), slabs


def _make_matrix(kind: str, n: int) -> np.ndarray:
    """Return what an axis of n pixels is multiplied with.

    ``blur`` is the window of SSIM; ``425`` and ``425-legacy`` resize to 256 pixels, with and without antialiasing, and
    multiply with R; from there ``enlarge`` goes on to 425, and ``enlarge, blur`` to the window's means. With U the
    resize of an axis from 256 pixels to 425, R' R is U' U. The product of two images is <U x U', U y U'>, which is
    <R x R', R y R'>: it takes no enlarged image.
    """
    if kind == "blur":
        offsets = np.arange(n)[None] - np.arange(n - 2 * SSIM_RADIUS)[:, None] - SSIM_RADIUS
        weights = np.where(np.abs(offsets) <= SSIM_RADIUS, np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2), 0.0)
        return weights / weights.sum(axis=1, keepdims=True)
    enlarge = _make_resize(SMALL, LARGE)
    root = np.linalg.cholesky(enlarge.T @ enlarge).T  # two numbers a row
    if kind.startswith("425"):
        protocol, *bytes_ = kind.split(" of ")
        return root @ _make_resize(n, SMALL, antialias=protocol == "425") / (255 if bytes_ else 1)
    enlarge = np.linalg.solve(root.T, enlarge.T).T
    enlarge[np.abs(enlarge) < 1e-8] = 0  # what is left decays by four with each pixel: a band again
    return _make_matrix("blur", LARGE) @ enlarge if kind == "enlarge, blur" else enlarge


@lru_cache(maxsize=1)
def _make_level() -> np.ndarray:
    """Return R times ones, shape (256,), whose sum of squares is 425."""
    enlarge = _make_resize(SMALL, LARGE)
    return np.linalg.cholesky(enlarge.T @ enlarge).T.sum(axis=1)


def _make_resize(n: int, size: int, *, antialias: bool = True) -> np.ndarray:
    """Return the bilinear resize of torch from n pixels to `size`."""
    centres = (np.arange(size) + 0.5) * n / size - 0.5
    # Antialiasing widens the triangle of the interpolation to the pixels that become one.
    width = max(1.0, n / size) if antialias else 1.0
    weights = np.maximum(0.0, 1 - np.abs(np.arange(n)[None] - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


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
    images
        The n_distinct images in the order of first use, the seen ones first: a uint8 array of shape (n_distinct,
        height, width, 3), or rows that are read when they are asked for.
    seen : int array of shape (n_rows,)
        Distinct image that each row saw.
    made : dict
        Method to an int array of shape (n_draws, n_rows).
    """

    images: Images
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


def split_rounds(images: Images) -> Sequence[Any]:
    """Return images as one round of (n_rows, height, width, 3) per draw, without a copy.

    Parameters
    ----------
    images : array of shape (n_rows, height, width, 3) or (n_rows, n_draws, height, width, 3), or `ImageRows`
    """
    if isinstance(images, ImageRows):
        return [images] if images.ndim == 4 else [images[:, draw] for draw in range(images.index.shape[1])]
    return [images] if images.ndim == 4 else list(np.moveaxis(images, 1, 0))


def check_stack(images: Images, seen: Images, method: str) -> None:
    """Raise `DataError` unless the images of a method, one or several per row, have the shape of the seen ones.

    Rows that are read from files may differ in size.
    """
    if isinstance(images, ImageRows) or isinstance(seen, ImageRows):
        if len(images) != len(seen) or images.ndim not in (4, 5):
            raise DataError(f"{len(images)} images of {method!r} came with {len(seen)} seen ones.")
        return
    several = (len(seen), *images.shape[1:2], *seen.shape[1:])
    if images.shape not in (seen.shape, several) or 0 in images.shape:
        raise DataError(
            f"images of {method!r} have the shape {images.shape}, but must have that of the seen ones, "
            f"{seen.shape}, with the draws in the second dimension if there are several."
        )
    if images.dtype != np.uint8 or seen.dtype != np.uint8:
        raise DataError(f"images to compare must be uint8, not {images.dtype} ({method!r}) and {seen.dtype}.")


def make_image_table(seen: Images, made: Mapping[str, Images], *, reads: bool = True) -> ImageTable:
    """Collect the distinct images of a comparison.

    Parameters
    ----------
    seen : uint8 array of shape (n_rows, height, width, 3), or `ImageRows`
    made
        Method to uint8 images of the same shape, or of shape (n_rows, n_draws, height, width, 3), or `ImageRows`.
    reads
        Whether images in files are read to find equal ones; otherwise those of one place in one file are equal.

    Raises
    ------
    DataError
        If a shape does not fit.
    """
    known: dict[Hashable, int] = {}
    named: dict[tuple[Any, ...], int] = {}
    pictures: list[tuple[ImageRows, int]] = []

    def number(rows: ImageRows, place: int) -> int:
        name = rows.name_picture(place)
        if name in named:  # the same place of the same file, which need not be read again
            return named[name]
        digest: Hashable = name
        if reads or type(rows.source) is np.ndarray:
            # The content decides and not the place: the same picture is shown to several subjects.
            image = rows.read(place)
            digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest() + bytes(
                str(image.shape), "ascii"
            )
        if digest not in known:
            known[digest] = len(known)
            pictures.append((rows, place))
        return named.setdefault(name, known[digest])

    given = {name: ImageRows.of(stack) for name, stack in made.items()}
    shown = ImageRows.of(seen)
    for method, stack in made.items():
        check_stack(stack, seen, method)
    column = np.array([number(shown, int(place)) for place in shown.index])
    places = {
        method: np.array([[number(rows, int(place)) for place in one.index] for one in split_rounds(rows)])
        for method, rows in given.items()
    }
    images = join_pictures(pictures)
    in_memory = reads and not any(isinstance(stack, ImageRows) for stack in (seen, *made.values()))
    return ImageTable(np.asarray(images) if in_memory else images, column, places)
