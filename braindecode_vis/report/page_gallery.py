"""The gallery of a report for its templates and its script: selected items, and a bounded table of all items.

Owns what the page carries of a gallery, how an image becomes text, and how many items fit. Where they do not all fit,
thumbnails shrink first and items are left out last, evenly over the score. The script filters, sorts and opens items
from this alone; images in full size lie in a folder beside the page, and a page without it shows thumbnails.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.stimuli import ImageRows, Images, is_grey
from braindecode_vis.report.gallery import SEEN, GalleryContent, describe_rule
from braindecode_vis.report.words import (
    count_decimals,
    describe_metric,
    format_number,
    write_within_sentence,
)

_BLOCK_TITLES: Mapping[str, str] = {
    "best": "Best", "median": "Median", "worst": "Worst", "quantiles": "From best to worst",
    "random": "Drawn at random", "all": "Items",
}  # fmt: skip
STRIP_PX = 112
N_FIRST = 4  # items that stand beside the result, above everything else


def view_gallery(
    gallery: GalleryContent, thumbnails: GalleryThumbnails | None = None, folder: str = ""
) -> dict[str, Any]:
    """Return the picked items block by block, and what the script needs of every carried item.

    Parameters
    ----------
    gallery
        What is shown.
    thumbnails
        Of the gallery, if they were made before.
    folder
        Name of the folder beside the page that `write_full_images` fills.
    """
    rows = gallery.all_rows()
    thumbnails = thumbnails or make_thumbnails(gallery)
    position = {int(item): i for i, item in enumerate(thumbnails.items)}
    blocks = [
        {
            "name": _BLOCK_TITLES[name],
            "items": [_view_pick(gallery, rows, int(item), position) for item in items],
        }
        for name, items in gallery.select_items().items()
    ]
    first = [_view_pick(gallery, rows, int(item), position) for item in gallery.spread_items(N_FIRST)]
    return {
        "first": first if len(rows) > 1 else [],
        "labels": list(rows),
        "pixelated": [max(images.shape[1:3]) < PIXELATED_BELOW for images in rows.values()],
        "blocks": blocks,
        "rule": describe_rule(gallery),
        "metric": write_within_sentence(describe_metric(gallery.metric).label),
        "aspect": f"{gallery.seen.shape[2]} / {gallery.seen.shape[1]}",
        "n": len(gallery),
        "n_carried": len(thumbnails.items),
        "data": view_browser(gallery, thumbnails, folder),
    }


def _view_pick(
    gallery: GalleryContent, rows: Mapping[str, Images], item: int, position: Mapping[int, int]
) -> dict[str, Any]:
    return {
        "id": gallery.ids[item],
        "concept": gallery.concepts[item],
        "score": gallery.format_score(item),
        "at": position[item],
        "images": [encode_thumbnail(np.asarray(images[item]), STRIP_PX) for images in rows.values()],
    }


def view_browser(gallery: GalleryContent, thumbnails: GalleryThumbnails, folder: str = "") -> dict[str, Any]:
    """Return what the page's script needs to show, filter and sort the carried items.

    Every item holds one table of numbers, a line per row of the gallery that has any and a column per metric; its
    first line is the system under test.
    """
    lines = _list_lines(gallery)
    return {
        "rows": list(gallery.all_rows()),
        "metrics": [_view_metric(gallery, metric) for metric in gallery.metrics],
        "lines": [label for label, _ in lines],
        "filters": list(gallery.filter_by),
        "images": thumbnails.images,
        "full": {number: f"{folder}/{_name_file(number)}" for number in thumbnails.full} if folder else {},
        "items": [
            {
                "id": str(gallery.ids[i]),
                "concept": str(gallery.concepts[i]),
                "cells": thumbnails.cells[at].tolist(),
                "values": [
                    # Five digits are more than the page shows, and JSON has no NaN.
                    [float(f"{values[i]:.5g}") if np.isfinite(values[i]) else None for values in line]
                    for _, line in lines
                ],
                "captions": [gallery.find_caption(label, i) for label in gallery.all_rows()]
                if gallery.captions
                else [],
                "details": {str(key): format_number(column[i]) for key, column in gallery.details.items()},
            }
            for at, i in enumerate(map(int, thumbnails.items))
        ],
    }


def _list_lines(gallery: GalleryContent) -> list[tuple[str, Sequence[np.ndarray]]]:
    """Return label and values per metric of each line of an item's table, the system under test first."""
    first, nothing = next(iter(gallery.rows), SEEN), np.full(len(gallery), np.nan)
    draws = gallery.count_draws(first) if first in gallery.rows else 1
    label = f"{first} (mean of {draws} draws)" if draws > 1 else first
    lines: list[tuple[str, Sequence[np.ndarray]]] = [
        (label, [gallery.average_draws(metric) for metric in gallery.metrics])
    ]
    names = dict.fromkeys(name for known in gallery.metrics.values() for name in known if name != first)
    # In the order of the gallery's rows, then what has numbers but no images.
    ordered = [name for name in gallery.all_rows() if name in names]
    for name in [*ordered, *[name for name in names if name not in ordered]]:
        lines.append((name, [known.get(name, nothing) for known in gallery.metrics.values()]))
    return lines


def _view_metric(gallery: GalleryContent, metric: str) -> dict[str, Any]:
    note = describe_metric(metric)
    better = (1 if gallery.higher_is_better else -1) if metric == gallery.metric else note.direction
    known = [v for row in gallery.metrics[metric].values() for v in row[np.isfinite(row)]]
    return {
        "label": note.label,
        "better": better,
        "decimals": count_decimals(known),
    }


# --- thumbnails ----------------------------------------------------------------------------------------------------


PIXELATED_BELOW = 96  # images smaller than this are enlarged in crisp squares, not blurred
EXACT_BELOW = 48  # images smaller than this are kept without loss
SHRINKS = (1.0, 0.75, 0.5, 0.4)
MOST_FULL = 2000  # images in full size beside a page: about 100 MB at 512 pixels


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
    grey = is_grey(pixels)  # a third of the bytes, and the same picture
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    buffer = io.BytesIO()
    if max(picture.size) < EXACT_BELOW:
        picture.save(buffer, "PNG", compress_level=9)
        kind = "png"
    else:
        picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
        picture.convert("RGB").save(buffer, "WEBP", quality=74, method=4)
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
    full : dict
        Number of a distinct image that is larger than its thumbnail, to the item and the row that show it.
    """

    items: np.ndarray
    images: Sequence[str]
    cells: np.ndarray
    full: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def make_thumbnails(
    gallery: GalleryContent,
    *,
    max_thumbnails: int = 6000,
    max_bytes: int | None = None,
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
        Most bytes of text for distinct images; an image that several cells share counts once. By default 1.3 million
        for up to 200 items, so that their page stays below 2 MB, and up to 6 million in proportion for more.
    max_px
        Longest side of a thumbnail in pixels; down to two fifths of that where more items fit then.

    Returns
    -------
    thumbnails
        What fits.
    """
    if max_bytes is None:
        max_bytes = min(6_000_000, max(1_300_000, 6_500 * len(gallery)))
    # What the rules show is always carried, whatever else has to be left out.
    shown = [*gallery.select_items().values(), gallery.spread_items(N_FIRST)]
    picked = np.unique(np.concatenate(shown))
    rows = list(gallery.all_rows().values())
    sample = gallery.spread_items(16)  # how large thumbnails are is found out from a few
    for shrink in SHRINKS:
        encoded: dict[tuple[int, int], str] = {}
        known: dict[Any, tuple[str, bool]] = {}
        large: set[tuple[int, int]] = set()
        side = round(max_px * shrink)
        fits = int(max_bytes / (_encode(rows, sample, side, encoded, known, large) / len(sample)))
        if fits >= len(gallery):
            break
    # A few items do not tell which pictures others show again (shuffled ones), so all are tried where it may be enough.
    fits = len(gallery) if fits * 1.5 >= len(gallery) else fits
    count = min(len(gallery), max(len(picked), min(max_thumbnails // len(rows), fits)))
    while True:
        spread = gallery.spread_items(count if count == len(gallery) else count - len(picked))
        items = np.union1d(picked, spread)
        size = _encode(rows, items, side, encoded, known, large)
        if size <= max_bytes or count == len(picked):
            break
        # The sample was an estimate: 5 % less than proportional, so that this ends soon.
        count = max(len(picked), int(count * 0.95 * max_bytes / size))
    numbers: dict[str, int] = {}  # a control shows one image in many cells, which is written once
    cells = [
        [numbers.setdefault(encoded[item, row], len(numbers)) for row in range(len(rows))] for item in items
    ]
    full: dict[int, tuple[int, int]] = {}
    # What the rules show first, then the others, as many as there is room for beside the page.
    for item in [*picked, *np.setdiff1d(items, picked)]:
        for row in range(len(rows)):
            number = numbers[encoded[int(item), row]]
            if (int(item), row) in large and number not in full and len(full) < MOST_FULL:
                full[number] = (int(item), row)
    return GalleryThumbnails(items, list(numbers), np.array(cells, dtype=int), full)


def write_full_images(folder: Path, gallery: GalleryContent, thumbnails: GalleryThumbnails) -> None:
    """Write the images that are larger than their thumbnails as JPEG into a folder; those of an earlier page go.

    Parameters
    ----------
    folder
        Made if there is such an image.
    gallery, thumbnails
        What the page shows.
    """
    from PIL import Image

    for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].jpg") if folder.is_dir() else ():
        path.unlink()
    if not thumbnails.full:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(gallery.all_rows().values())
    for number, (item, row) in thumbnails.full.items():
        picture = Image.fromarray(np.ascontiguousarray(rows[row][item]))
        picture.save(folder / _name_file(number), "JPEG", quality=85)


def _name_file(number: int) -> str:
    return f"{number:05d}.jpg"


def _encode(
    rows: list[Images],
    items: np.ndarray,
    max_px: int,
    encoded: dict[tuple[int, int], str],
    known: dict[Any, tuple[str, bool]],
    large: set[tuple[int, int]],
) -> int:
    """Fill `encoded` for these items and return the bytes of their distinct images.

    `known` holds the thumbnail of each distinct picture, by its name or digest, and whether the picture is larger;
    `large` holds the cells of such pictures.
    """
    for item in map(int, items):
        for number, images in enumerate(rows):
            if (item, number) in encoded:
                continue
            # Controls show the same picture in many cells, and each is read and compressed once.
            if isinstance(images, ImageRows):
                key: Any = images.name_picture(int(images.index[item]))
            else:
                image = np.ascontiguousarray(images[item])
                key = (hashlib.sha1(image.data, usedforsecurity=False).digest(), image.shape)
            if key not in known:
                image = images[item]
                known[key] = (encode_thumbnail(image, max_px), max(image.shape[:2]) > max_px)
            encoded[item, number], is_large = known[key]
            if is_large:
                large.add((item, number))
    return sum(map(len, {encoded[int(item), number] for item in items for number in range(len(rows))}))
