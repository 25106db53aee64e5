"""Thumbnails: the bounded set of small images that a page carries.

Owns how an image becomes text, and how many items fit. Where they do not all fit, thumbnails shrink first and items
are left out last, evenly over the score.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from braindecode_vis.report.gallery import GalleryContent

PIXELATED_BELOW = 96  # images smaller than this are enlarged in crisp squares, not blurred
EXACT_BELOW = 48  # images smaller than this are kept without loss
SHRINKS = (1.0, 0.75, 0.5)


def encode_thumbnail(image: np.ndarray, max_px: int = 256) -> str:
    """Return an image as a ``data:`` address: small ones as exact PNG, others as WebP of at most `max_px`.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
        The image.
    max_px
        Longest side in pixels.

    Returns
    -------
    address
        Text for the ``src`` of an image element.
    """
    from PIL import Image

    pixels = np.ascontiguousarray(image)
    grey = bool((pixels[..., :1] == pixels).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    buffer = io.BytesIO()
    if max(picture.size) < EXACT_BELOW:
        picture.save(buffer, "PNG", compress_level=9)
        kind = "png"
    else:
        picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
        picture.convert("RGB").save(buffer, "WEBP", quality=82, method=2)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class GalleryThumbnails:
    """The bounded part of a gallery that a page carries.

    Parameters
    ----------
    items
        Item numbers that are carried, in the given order of the gallery.
    images
        Distinct images as ``data:`` addresses.
    cells : int array of shape (n_carried, n_rows)
        Which of `images` each carried item shows in each row, the seen row first.
    """

    items: np.ndarray
    images: Sequence[str]
    cells: np.ndarray


def make_thumbnails(
    gallery: GalleryContent,
    *,
    max_thumbnails: int = 6000,
    max_bytes: int = 6_000_000,
    max_px: int = 160,
) -> GalleryThumbnails:
    """Encode the thumbnails of as many items as fit, spread evenly from the best to the worst score.

    Parameters
    ----------
    gallery
        What to encode. The items that the rules of the gallery pick are always carried.
    max_thumbnails
        Most thumbnails in all (items times rows).
    max_bytes
        Most bytes of text for distinct images; an image that several cells share counts once.
    max_px
        Longest side of a thumbnail in pixels; up to half of that where more items fit then.

    Returns
    -------
    thumbnails
        What fits.
    """
    picked = np.unique(np.concatenate(list(gallery.select_items().values())))
    rows = list(gallery.all_rows().values())
    sample = _spread(gallery, 16)
    for shrink in SHRINKS:
        encoded: dict[tuple[int, int], str] = {}
        side = round(max_px * shrink)
        fits = int(max_bytes / (_encode(rows, sample, side, encoded) / len(sample)))
        if fits >= len(gallery):
            break
    count = min(len(gallery), max(len(picked), min(max_thumbnails // len(rows), fits)))
    while True:
        items = np.union1d(picked, _spread(gallery, count if count == len(gallery) else count - len(picked)))
        size = _encode(rows, items, side, encoded)
        if size <= max_bytes or count == len(picked):
            break
        count = max(len(picked), int(count * 0.95 * max_bytes / size))
    numbers: dict[str, int] = {}
    cells = [
        [numbers.setdefault(encoded[item, row], len(numbers)) for row in range(len(rows))] for item in items
    ]
    return GalleryThumbnails(items, list(numbers), np.array(cells, dtype=int))


def _spread(gallery: GalleryContent, count: int) -> np.ndarray:
    order = gallery.sort_items()
    return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]


def _encode(
    rows: list[np.ndarray], items: np.ndarray, max_px: int, encoded: dict[tuple[int, int], str]
) -> int:
    """Fill `encoded` for these items and return the bytes of their distinct images."""
    for item in map(int, items):
        for number, images in enumerate(rows):
            if (item, number) not in encoded:
                encoded[item, number] = encode_thumbnail(np.asarray(images[item]), max_px)
    return sum(map(len, {encoded[int(item), number] for item in items for number in range(len(rows))}))
