"""Finds one picture under two ids with other pixels: compressed, grey, mirrored, turned, cropped, or several of these.

Each picture is read once, at low resolution, and becomes a grey thumbnail and 64 numbers that mirroring does not
change: the roots of the sizes of its lowest cosine coefficients. Only pictures with nearly the same numbers are
compared further: one is mirrored and cropped until it fits the other best, and what remains different is measured in
the whole picture, in its detail, and in its colours. Reading grows with the number of pictures, and so does comparing
where a fixed number is tested; memory is 1.3 kB a picture. How far each change may go, and how many false alarms there
are: ``docs/AUDIT.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from braindecode_vis.base.stimuli import StimulusSet, resize_image

SMALL, FINE = 32, 64  # pixels a side of thumbnails that are kept, and of those that are compared in the end
LEAST_CONTRAST = 2.0  # standard deviation of a thumbnail in grey levels; less has no shape to be compared
_KEPT = 8  # cosine coefficients a side
#: 1 - cosine of the 64 numbers of two pictures that are compared further, and how many of the nearest are. Copies have
#: .09 and less, most of them .02, and are among the nearest two of 1200 photographs.
_FAR, _MOST = 0.1, 5
#: Correlation of two thumbnails before and after they are fitted to each other; copies have .64 and .95, and more.
_LEAST_BEFORE, _LEAST_AFTER = 0.4, 0.94
#: 1 - correlation of two fitted pictures, and of their detail: copies that were compressed to quality 20, cropped by 4
#: of 112 pixels, mirrored and grey have .05 and less; different photographs .056 (one background behind two objects)
#: and more.
LARGEST_DISTANCE = 0.05
#: Share of training pictures that may have a copy among themselves; the next ones say how near different pictures are.
_COPIED, _SAMPLE = 0.05, 256
_LARGEST_MARGIN = 0.1  # of a side that is cropped
MOST_OTHERS = 5000  # pictures from elsewhere that are compared with those of the test
_THREADS = 8  # that read pictures; Pillow decodes side by side
_MOST_READ = 20_000  # pairs that are read again; the nearest of more
_HOW = (
    ("", ", its mirror image", ", upside down", ", turned by a half"),
    (", mirrored and turned", ", turned by a quarter", ", turned by a quarter", ", mirrored and turned"),
)


class LikePictures(NamedTuple):
    """Pairs of pictures that are one, and how near two pictures of this set must be to be called so.

    Parameters
    ----------
    pairs
        Two ids, and in words how they differ beyond small changes.
    limit
        Of 1 - correlation; below `LARGEST_DISTANCE` where training pictures are like each other.
    """

    pairs: list[tuple[str, str, str]]
    limit: float


class _Pairs(NamedTuple):
    """Rows of two pictures each, shape (n_pairs,), and how the second is brought over the first."""

    first: np.ndarray
    second: np.ndarray
    turned: np.ndarray  # whether its axes are exchanged
    flips: np.ndarray  # 1 for left and right, 2 for up and down, 3 for both
    margins: np.ndarray  # share that is cropped left, right, top and bottom, (n_pairs, 4)
    correlation: np.ndarray

    def take(self, key: np.ndarray) -> _Pairs:
        return _Pairs(*(column[key] for column in self))


def find_like_pictures(stimuli: StimulusSet, shown: Sequence[str], tested: set[str]) -> LikePictures:
    """Find pairs of ids whose pictures are one.

    Two pictures are one if they differ by far less than training pictures do, which are different ones.

    Parameters
    ----------
    stimuli
        Holds the pictures; each is read once, and once more where its thumbnail is like another.
    shown
        Ids that are compared.
    tested
        Those of which at least one must be in a pair.
    """
    thumbnails = np.empty((len(shown), SMALL, SMALL), np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(shown), 256 * _THREADS):  # as many as iterate_images brings at once
            rows = np.arange(start, min(start + 256 * _THREADS, len(shown)))
            list(pool.map(partial(_fill, thumbnails, stimuli, shown), np.array_split(rows, _THREADS)))
    features = _compute_features(thumbnails)
    is_tested = np.array([name in tested for name in shown])
    usual = np.flatnonzero(~is_tested) if (~is_tested).sum() > 3 else np.arange(len(shown))
    sample = usual[np.unique(np.linspace(0, len(usual) - 1, min(len(usual), _SAMPLE)).astype(int))]
    distances = np.ones(len(shown))
    for pairs, found, _ in _measure(stimuli, shown, thumbnails, _find_near(features, sample, usual)):
        # Equal pictures do not say how near different ones are; gratings that mirror each other do.
        is_other = (found > 1e-4) | pairs.turned | (pairs.flips > 0)
        np.minimum.at(distances, pairs.first[is_other], found[is_other])
    limit = min(LARGEST_DISTANCE, float(np.quantile(distances[sample], _COPIED)) / 4)
    like: dict[tuple[int, int], int] = {}
    near = _find_near(features, np.flatnonzero(is_tested), np.arange(len(shown)))
    for pairs, found, is_coloured in _measure(stimuli, shown, thumbnails, near):
        for k in np.flatnonzero((found < limit) & is_coloured):
            one, other = sorted((int(pairs.first[k]), int(pairs.second[k])))
            like.setdefault((one, other), 4 * int(pairs.turned[k]) + int(pairs.flips[k]))
    named = [
        (shown[one], shown[other], _HOW[how // 4][how % 4]) for (one, other), how in sorted(like.items())
    ]
    return LikePictures(named, limit)


def _fill(thumbnails: np.ndarray, stimuli: StimulusSet, shown: Sequence[str], rows: np.ndarray) -> None:
    images = stimuli.iterate_images([shown[row] for row in rows], at_least=SMALL + SMALL // 2)
    for row, image in zip(rows, images, strict=True):
        thumbnails[row] = _shrink(image, SMALL, "L")


def _shrink(image: np.ndarray, side: int, mode: str) -> np.ndarray:
    """Return the whole picture as a square of another mode of Pillow, uint8."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image)).convert(mode)
    # Symmetric, so that a mirrored picture becomes the mirrored thumbnail.
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0))


def _compute_features(thumbnails: np.ndarray) -> np.ndarray:
    """Return numbers that mirroring does not change, of unit length, shape (n_pictures, 64); 0 of plain pictures.

    Mirroring changes the sign of every second cosine coefficient, and exchanging the axes transposes them.
    """
    from scipy.fft import dctn

    features = np.zeros((len(thumbnails), _KEPT, _KEPT), np.float32)
    for start in range(0, len(thumbnails), 1024):
        block = thumbnails[start : start + 1024].astype(np.float32)
        found = np.sqrt(np.abs(dctn(block, axes=(1, 2), norm="ortho")[:, :_KEPT, :_KEPT]))
        found[:, 0, 0] = 0  # its brightness
        norms = np.linalg.norm(found, axis=(1, 2), keepdims=True)
        plain = block.std(axis=(1, 2), keepdims=True) < LEAST_CONTRAST
        features[start : start + 1024] = np.where(plain, 0, found / np.maximum(norms, 1e-6))
    return features


def _find_near(features: np.ndarray, rows: np.ndarray, others: np.ndarray) -> _Pairs:
    """Return for each of some rows the few others of nearly the same numbers, as they are and with exchanged axes."""
    none = np.zeros(0, int)
    found = [(none, none, none.astype(bool))]
    gallery = features[others].reshape(len(others), -1)
    for turned in (False, True):
        asked = features.transpose(0, 2, 1) if turned else features
        for start in range(0, len(rows), 128):
            some = rows[start : start + 128]
            close = asked[some].reshape(len(some), -1) @ gallery.T  # (n_some, n_others)
            i, j = np.nonzero(close > 1 - _FAR)
            is_other = some[i] != others[j]
            i, j = i[is_other], j[is_other]
            order = np.lexsort((-close[i, j], i))
            i, j = i[order], j[order]
            nearest = np.arange(len(i)) - np.searchsorted(i, i) < _MOST
            found.append((some[i[nearest]], others[j[nearest]], np.full(nearest.sum(), turned)))
    first, second, is_turned = (np.concatenate(column) for column in zip(*found, strict=True))
    n = len(first)
    return _Pairs(first, second, is_turned, np.zeros(n, int), np.zeros((n, 4), np.float32), np.zeros(n))


def _measure(
    stimuli: StimulusSet, shown: Sequence[str], thumbnails: np.ndarray, near: _Pairs
) -> Iterable[tuple[_Pairs, np.ndarray, np.ndarray]]:
    """Yield pairs that are like each other as thumbnails, their distance, and whether they agree in their colours."""
    kept = []
    for start in range(0, len(near.first), 256):
        pairs = near.take(np.arange(start, min(start + 256, len(near.first))))
        kept.append(_fit_thumbnails(thumbnails, pairs))
    if not kept:
        return
    pairs = _Pairs(*(np.concatenate(column) for column in zip(*kept, strict=True)))
    pairs = pairs.take(np.argsort(-pairs.correlation, kind="stable")[:_MOST_READ])
    for start in range(0, len(pairs.first), 128):
        some = pairs.take(np.arange(start, min(start + 128, len(pairs.first))))
        used, places = np.unique(np.concatenate([some.first, some.second]), return_inverse=True)
        read = stimuli.iterate_images([shown[row] for row in used], at_least=FINE + FINE // 2)
        fine = np.stack([_shrink(image, FINE, "YCbCr") for image in read]).astype(np.float32)
        one, other = fine[places[: len(some.first)]], fine[places[len(some.first) :]]
        other = _bring(other, some.turned, some.flips)
        margins = _fit_margins(one[..., 0], other[..., 0], some.margins, n_steps=4)
        fitted = np.stack([_crop(other[..., plane], margins) for plane in range(3)], axis=-1)
        yield some, _compute_distance(one[..., 0], fitted[..., 0]), _agree_in_colour(one, fitted)


def _fit_thumbnails(thumbnails: np.ndarray, pairs: _Pairs) -> _Pairs:
    """Return those pairs that are like each other once the second is mirrored and cropped."""
    one = thumbnails[pairs.first].astype(np.float32)
    other = _bring(thumbnails[pairs.second].astype(np.float32), pairs.turned, pairs.flips)
    each = [_bring(other, np.zeros(len(one), bool), np.full(len(one), flips)) for flips in range(4)]
    before = np.stack([_correlate(one, flipped) for flipped in each])
    pairs = pairs._replace(flips=before.argmax(axis=0))
    kept = np.flatnonzero(before.max(axis=0) > _LEAST_BEFORE)
    pairs, one, other = pairs.take(kept), one[kept], np.stack(each)[pairs.flips[kept], kept]
    margins = _fit_margins(one, other, pairs.margins, n_steps=8)
    pairs = pairs._replace(margins=margins, correlation=_correlate(one, _crop(other, margins)))
    return pairs.take(pairs.correlation > _LEAST_AFTER)


def _bring(images: np.ndarray, turned: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Return each image with its axes exchanged, or not, and then mirrored."""
    made = np.where(_spread(turned, images), images.swapaxes(1, 2), images)
    made = np.where(_spread(flips % 2 == 1, images), made[:, :, ::-1], made)
    return np.where(_spread(flips >= 2, images), made[:, ::-1], made)


def _spread(values: np.ndarray, images: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _fit_margins(one: np.ndarray, other: np.ndarray, margins: np.ndarray, *, n_steps: int) -> np.ndarray:
    """Return the margins to crop of the other images, so that they fit the first in least squares, by Gauss-Newton.

    Parameters
    ----------
    one, other : float32 arrays of shape (n_pairs, side, side)
    margins : float32 array of shape (n_pairs, 4)
        To begin with.
    n_steps
        Number of steps.
    """
    n, side = one.shape[:2]
    one = _standardise(one)
    place = (np.arange(side, dtype=np.float32) + 0.5) / side
    for _ in range(n_steps):
        made = _standardise(_crop(other, margins))
        # Of a pixel at the share u of a side, a margin before it moves 1 - u as far, and one behind it u as far back.
        down, right = (np.gradient(made, axis=axis) * side for axis in (1, 2))
        up = place[:, None]
        columns = [right * (1 - place), -right * place, down * (1 - up), -down * up, made, np.ones_like(made)]
        design = np.stack(columns, axis=1).reshape(n, 6, side * side)
        gram = design @ design.transpose(0, 2, 1)
        gram += np.eye(6, dtype=np.float32) * (1e-3 / 6 * np.trace(gram, axis1=1, axis2=2))[:, None, None]
        step = np.linalg.solve(gram, design @ (one - made).reshape(n, side * side, 1))[:, :4, 0]
        margins = np.clip(margins + np.clip(step, -0.03, 0.03), -_LARGEST_MARGIN, _LARGEST_MARGIN)
    return margins.astype(np.float32)


def _crop(images: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Return images without their margins at the same size; beyond the edge, its pixels are repeated."""
    side = images.shape[1]
    place = (np.arange(side, dtype=np.float32) + 0.5) / side
    weights = []
    for first, last in (margins[:, :2].T, margins[:, 2:].T):
        at = (first[:, None] + (1 - first - last)[:, None] * place) * side - 0.5
        apart = np.abs(np.clip(at, 0, side - 1)[:, :, None] - np.arange(side))
        weights.append(np.maximum(0, 1 - apart).astype(np.float32))  # (n_images, side, side)
    return np.asarray(weights[1] @ images @ weights[0].transpose(0, 2, 1))


def _compute_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return 1 - the correlation of the pictures or of their detail, whichever is less, shape (n_pairs,)."""
    inner = slice(8, -8)  # what may have been cropped lies outside
    found = [_correlate(one[:, inner, inner], other[:, inner, inner])]
    detail = [image - image.reshape(len(image), 8, 8, 8, 8).mean(axis=(2, 4)).repeat(8, 1).repeat(8, 2)
              for image in (one, other)]  # fmt: skip
    found.append(_correlate(*(image[:, inner, inner] for image in detail)))
    return np.asarray(np.maximum(0, 1 - np.minimum(*found)))


def _agree_in_colour(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Say of each pair whether one is grey, or both have like colours, shape (n_pairs,)."""
    first, second = (image[..., 1:] - 128 for image in (one, other))
    sizes = [np.square(colour).mean(axis=(1, 2, 3)) for colour in (first, second)]
    apart = np.square(first - second).mean(axis=(1, 2, 3))
    return np.asarray((np.minimum(*sizes) < 9) | (apart < 0.5 * (sizes[0] + sizes[1])))


def _standardise(images: np.ndarray) -> np.ndarray:
    images = images - images.mean(axis=(1, 2), keepdims=True)
    return np.asarray(images / np.maximum(np.sqrt(np.square(images).mean(axis=(1, 2), keepdims=True)), 1e-6))


def _correlate(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((_standardise(one) * _standardise(other)).mean(axis=(1, 2)))


def find_copies(
    stimuli: StimulusSet, tested: Iterable[str], others: Iterable[tuple[str, np.ndarray]]
) -> list[tuple[str, str, str]]:
    """Find test pictures among pictures from elsewhere, with the same or other pixels; see `find_like_pictures`.

    Parameters
    ----------
    stimuli
        Holds the test pictures.
    tested
        Their ids; those that have no picture are passed over.
    others
        Names and pixels, of which the first `MOST_OTHERS` are compared.

    Returns
    -------
    list of tuple
        Name of the other picture, id of the test picture, and how they differ beyond small changes.
    """
    pictured, side = set(stimuli.select_pictured().ids.tolist()), FINE + FINE // 2
    asked = [name for name in dict.fromkeys(tested) if name in pictured]
    kept = [resize_image(image, side, side) for image in stimuli.iterate_images(asked, at_least=side)]
    given = [(name, resize_image(image, side, side)) for name, image in islice(others, MOST_OTHERS)]
    if not asked or not given:
        return []
    names = [f"test {name}" for name in asked] + [f"other {name}" for name, _ in given]
    whole = StimulusSet.from_pixels(np.stack([*kept, *(image for _, image in given)]), names)
    pairs = find_like_pictures(whole, names, set(names[: len(asked)])).pairs
    found = [(*sorted(pair[:2]), pair[2]) for pair in pairs if pair[0].split()[0] != pair[1].split()[0]]
    return [(other.removeprefix("other "), test.removeprefix("test "), how) for other, test, how in found]
