"""Galleries: seen images beside what was made of the brain's answer, chosen by rule.

Owns the content of a gallery, the rule that picks its best, median and worst items (never a hand), the
bounded set of thumbnails that a page carries, and the same picture as one PNG. Knows nothing of pages or
metrics: the score of each item is given.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.checks import DataError, check_columns, check_unique
from braindecode_vis.report.figures import (
    THEMES,
    ThemeName,
    count_decimals,
    describe_metric,
    format_number,
    write_within_sentence,
)

SEEN = "seen"
PIXELATED_BELOW = 96  # images smaller than this are enlarged in crisp squares, not blurred


@dataclass(frozen=True)
class GalleryContent:
    """Images of the same items, row by row, with one score per item.

    Parameters
    ----------
    ids : sequence of length n_items
        Stimulus id of each item; unique.
    concepts : sequence of length n_items
        What each item depicts.
    seen : uint8 array of shape (n_items, height, width, 3)
        The images that were on the screen; may be a memory map.
    rows
        Label to uint8 images of shape (n_items, height, width, 3), in the order they are shown. The first is
        the system under test, for example ``reconstructed``; controls follow. Sizes may differ between rows.
    score : array of shape (n_items,)
        Score of the first row for each item; NaN where it is not defined.
    metric
        Name of the score.
    higher_is_better
        Whether a high score is a good one; by default what is known of the metric, otherwise true.
    details
        Further facts on each item (rank, subject, caption, ...): label to a sequence of length n_items.
    filter_by
        Labels of `details` that the page offers as filters, beside the concept.
    row_notes
        Label to one sentence on what the row shows; well-known labels have one already.
    n_each
        Number of best, of median and of worst items.

    Raises
    ------
    DataError
        If lengths, types or shapes do not fit together.
    """

    ids: Sequence[str]
    concepts: Sequence[str]
    seen: np.ndarray
    rows: Mapping[str, np.ndarray]
    score: np.ndarray
    metric: str
    higher_is_better: bool | None = None
    details: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    filter_by: Sequence[str] = ()
    row_notes: Mapping[str, str] = field(default_factory=dict)
    n_each: int = 4

    def __post_init__(self) -> None:
        score = np.asarray(self.score, dtype=float)
        object.__setattr__(self, "score", np.where(np.isfinite(score), score, np.nan))
        if self.higher_is_better is None:
            object.__setattr__(self, "higher_is_better", describe_metric(self.metric).direction >= 0)
        n = len(self.ids)
        if n == 0:
            raise DataError("a gallery needs at least one item.")
        if self.n_each < 1:
            raise DataError(f"a gallery shows at least 1 item of each kind, not {self.n_each}.")
        check_unique(list(self.ids), what="stimulus_id of the gallery")
        columns: list[tuple[str, Any]] = [("concepts", self.concepts), ("score", self.score)]
        for name, column in [*columns, *self.details.items()]:
            if len(column) != n:
                raise DataError(f"the gallery has {n} items, but its {name} has {len(column)} entries.")
        if SEEN in self.rows:
            raise DataError(f"the gallery row {SEEN!r} is given as `seen`, not among the other rows.")
        for label, images in self.all_rows().items():
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != n:
                raise DataError(
                    f"the gallery row {label!r} must be uint8 of shape ({n}, height, width, 3), "
                    f"not {images.dtype} of shape {images.shape}."
                )
        check_columns(self.details, self.filter_by, what="the details of the gallery")

    def __len__(self) -> int:
        return len(self.ids)

    def all_rows(self) -> dict[str, np.ndarray]:
        """Return label to images, the seen ones first."""
        return {SEEN: self.seen, **self.rows}

    def format_score(self, item: int) -> str:
        """Return the score of an item as text, with as many decimals as every other item."""
        return format_number(float(self.score[item]), self._decimals)

    @functools.cached_property
    def _decimals(self) -> int:
        return count_decimals(self.score)

    def sort_items(self) -> np.ndarray:
        """Return item numbers from best to worst score; items without a score come last."""
        key = -self.score if self.higher_is_better else self.score
        return np.argsort(key, kind="stable")  # NaN sorts last

    def select_items(self) -> dict[str, np.ndarray]:
        """Return the item numbers that the rule picks, as `select_items` does."""
        return select_items(self.score, self.n_each, higher_is_better=bool(self.higher_is_better))


def select_items(score: Any, n_each: int = 4, *, higher_is_better: bool = True) -> dict[str, np.ndarray]:
    """Pick the best, the median and the worst items by their score, and nothing else.

    Parameters
    ----------
    score : array of shape (n_items,)
        NaN marks an item without a score, which is never picked.
    n_each
        Items of each kind; fewer if three kinds of that many would overlap.
    higher_is_better
        Whether a high score is a good one.

    Returns
    -------
    picks
        ``best``, ``median`` and ``worst`` to item numbers, each from better to worse, without overlap. With
        fewer than three scored items, ``all`` to all of them. Ties keep the given order.

    Examples
    --------
    >>> picks = select_items([0.1, 0.9, 0.5, 0.4, 0.8], 1)
    >>> {name: rows.tolist() for name, rows in picks.items()}
    {'best': [1], 'median': [2], 'worst': [0]}
    """
    values = np.asarray(score, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    order = np.argsort(-values if higher_is_better else values, kind="stable")
    scored = order[: int(np.isfinite(values).sum())]
    if len(scored) < 3:
        return {"all": order[: 3 * n_each]}
    k = min(n_each, len(scored) // 3)
    start = (len(scored) - k) // 2
    return {"best": scored[:k], "median": scored[start : start + k], "worst": scored[-k:]}


# ---- thumbnails
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
    if max(picture.size) < PIXELATED_BELOW:
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
    max_bytes: int = 8_000_000,
    max_px: int = 160,
) -> GalleryThumbnails:
    """Encode the thumbnails of as many items as fit, spread evenly from the best to the worst score.

    Parameters
    ----------
    gallery
        What to encode. The items that the rule of the gallery picks are always carried.
    max_thumbnails
        Most thumbnails in all (items times rows).
    max_bytes
        Most bytes of text for distinct images; an image that several cells share counts once.
    max_px
        Longest side of a thumbnail in pixels.

    Returns
    -------
    thumbnails
        What fits.
    """
    picked = np.concatenate(list(gallery.select_items().values()))
    rows = list(gallery.all_rows().values())
    encoded: dict[tuple[int, int], str] = {}
    sample = _spread(gallery, 16)
    per_item = _encode(rows, sample, max_px, encoded) / len(sample)
    fits = min(max_thumbnails // len(rows), int(max_bytes / per_item))
    count = min(len(gallery), max(len(picked), fits))
    while True:
        items = np.union1d(picked, _spread(gallery, count if count == len(gallery) else count - len(picked)))
        size = _encode(rows, items, max_px, encoded)
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


# ---- one picture
def make_gallery_grid(
    gallery: GalleryContent,
    path: str | Path | None = None,
    *,
    cell_px: int = 96,
    theme: ThemeName = "light",
    rows: Sequence[str] | None = None,
) -> np.ndarray:
    """Compose the best, median and worst items as one picture, with labels and the score of each item.

    Parameters
    ----------
    gallery
        Images, scores and the number of items of each kind.
    path
        Where to write the picture; the suffix chooses the format (``.png``, ``.webp``, ``.pdf``). Not written
        by default.
    cell_px
        Width of one image in pixels; small images are enlarged in crisp squares.
    theme
        ``light`` or ``dark``.
    rows
        Labels of the rows to show, in this order; all of them by default.

    Returns
    -------
    picture : uint8 array of shape (height, width, 3)
        The picture.

    Raises
    ------
    DataError
        If a row is unknown.
    """
    from PIL import Image, ImageDraw

    colours, images = THEMES[theme], gallery.all_rows()
    if rows is not None:
        check_columns(images, rows, what="the gallery")
        images = {label: images[label] for label in rows}
    picks = gallery.select_items()
    unit = max(1.0, cell_px / 96)
    text, bold = _read_font(round(12 * unit)), _read_font(round(13 * unit), bold=True)
    cell_h = max(1, round(cell_px * gallery.seen.shape[1] / gallery.seen.shape[2]))
    gap, margin, block_gap = round(4 * unit), round(18 * unit), round(22 * unit)
    left = margin + round(max(text.getlength(label.replace("_", " ")) for label in images) + 12 * unit)
    top = margin + round(24 * unit)
    n_columns = sum(map(len, picks.values()))
    width = left + n_columns * (cell_px + gap) - gap * len(picks) + block_gap * (len(picks) - 1) + margin
    foot = top + len(images) * (cell_h + gap)
    canvas = Image.new("RGB", (width, foot + round(52 * unit) + margin), colours.background)
    draw = ImageDraw.Draw(canvas)
    for r, label in enumerate(images):
        draw.text(
            (margin, top + r * (cell_h + gap) + cell_h / 2),
            label.replace("_", " "),
            colours.muted,
            text,
            anchor="lm",
        )
    x = left
    for name, items in picks.items():
        draw.text((x, margin), name.capitalize(), colours.ink, bold)
        for item in items:
            for r, row in enumerate(images.values()):
                cell = _fit(np.asarray(row[item]), cell_px, cell_h)
                canvas.paste(cell, (x, top + r * (cell_h + gap)))
            score = gallery.format_score(item)
            draw.text((x + cell_px / 2, foot + 3 * unit), score, colours.accent, text, anchor="ma")
            x += cell_px + gap
        x += block_gap - gap
    draw.text(
        (margin, canvas.height - margin), describe_rule(gallery, short=True), colours.muted, text, anchor="ls"
    )
    if path is not None:
        canvas.save(path)
    return np.asarray(canvas)


def describe_rule(gallery: GalleryContent, *, short: bool = False) -> str:
    """Return the sentence that says how the shown items were picked."""
    picks, label = gallery.select_items(), write_within_sentence(describe_metric(gallery.metric).label)
    k, n = len(next(iter(picks.values()))), len(gallery)
    if "all" in picks:
        rule = f"All items, best {label} first." if k == n else f"The first {k} of {n} items."
    elif short:
        return f"Picked by {label} alone: {k} best, {k} median, {k} worst of {n:,}."
    else:
        rule = (
            f"All {n:,} items are sorted by {label}; the {k} best, the {k} around the median and the {k} "
            "worst are shown. The rule alone picks them, never a person."
        )
    unscored = int((~np.isfinite(gallery.score)).sum())
    return rule + (f" {unscored:,} items have no score and are not picked." if unscored and not short else "")


def _fit(image: np.ndarray, width: int, height: int) -> Any:
    from PIL import Image

    small = max(image.shape[:2]) < PIXELATED_BELOW and image.shape[1] <= width
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), how)


def _read_font(size: int, *, bold: bool = False) -> Any:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
