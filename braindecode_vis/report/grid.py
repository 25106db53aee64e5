"""A gallery as one picture: rows of methods, columns of picked items, as PNG for screens and PDF for papers.

Owns the layout. The same layout is drawn twice: into pixels with Pillow, and into a PDF with text that
can be searched and images at their own resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.checks import check_columns, check_option
from braindecode_vis.base.stimuli import Images
from braindecode_vis.report.figures import THEMES, Theme, ThemeName
from braindecode_vis.report.gallery import GalleryContent, describe_rule
from braindecode_vis.report.page_gallery import PIXELATED_BELOW
from braindecode_vis.report.words import count_decimals, describe_metric, format_number

CAPTION_LINES = 4
FORMATS = ("png", "pdf")
ASCENT = 0.928  # of DejaVu Sans, in units of its size


@dataclass(frozen=True)
class _Words:
    x: float
    y: float
    text: str
    size: float
    colour: str
    anchor: Literal["la", "lm", "ls", "ma"]
    bold: bool = False


@dataclass
class _Layout:
    """What is where, in pixels from the upper left corner."""

    width: int
    height: int
    background: str
    images: list[tuple[np.ndarray, int, int, int, int]] = field(default_factory=list)
    words: list[_Words] = field(default_factory=list)


def make_gallery_grid(
    gallery: GalleryContent,
    path: str | Path | None = None,
    *,
    cell_px: int = 96,
    theme: ThemeName = "light",
    rows: Sequence[str] | None = None,
) -> np.ndarray:
    """Compose the picked items as one picture, with labels, scores and captions.

    Parameters
    ----------
    gallery
        Images, scores and the rules that pick items. Below each image is its own score, where it is known; below
        each column every metric of the first method.
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
    layout = _lay_out(gallery, cell_px, THEMES[theme], rows)
    canvas = _paint_pixels(layout)
    if path is not None and Path(path).suffix.lower() == ".pdf":
        _paint_pdf(layout, Path(path))
    elif path is not None:
        canvas.save(path)
    return np.asarray(canvas)


def export_gallery(
    content: GalleryContent,
    path: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
    cell_px: int = 128,
    theme: ThemeName = "light",
    rows: Sequence[str] | None = None,
) -> list[Path]:
    """Write a gallery as PNG and PDF, side by side.

    Parameters
    ----------
    content
        What to show.
    path
        File name; its suffix, if it is that of a known format, is replaced by the one of each format. The folder is
        made if needed.
    formats
        ``png``, ``pdf`` or both.
    cell_px, theme, rows
        As for `make_gallery_grid`.

    Returns
    -------
    paths
        The files written, in the order of `formats`.

    Raises
    ------
    ConfigError
        If a format is unknown.
    DataError
        If a row is unknown.
    """
    for name in formats:
        check_option("format of a gallery", name, FORMATS)
    target = Path(path)
    stem = target.with_suffix("") if target.suffix.lower().lstrip(".") in FORMATS else target
    stem.parent.mkdir(parents=True, exist_ok=True)
    layout = _lay_out(content, cell_px, THEMES[theme], rows)
    paths = []
    for name in formats:
        written = stem.with_name(f"{stem.name}.{name}")
        if name == "pdf":
            _paint_pdf(layout, written)
        else:
            _paint_pixels(layout).save(written)
        paths.append(written)
    return paths


# ---- layout
def _lay_out(gallery: GalleryContent, cell_px: int, colours: Theme, rows: Sequence[str] | None) -> _Layout:
    images = gallery.all_rows()
    if rows is not None:
        check_columns(images, rows, what="the gallery")
        images = {label: images[label] for label in rows}
    grid = _Grid(gallery, images, gallery.select_items(), cell_px, colours)
    layout = _Layout(grid.width, grid.height, colours.background)
    layout.words += grid.write_labels()
    x = grid.left
    for name, items in grid.picks.items():
        layout.words.append(
            _Words(x, grid.margin, name.capitalize(), 13 * grid.unit, colours.ink, "la", bold=True)
        )
        for item in map(int, items):
            for label, row in images.items():
                layout.images.append((np.asarray(row[item]), x, grid.tops[label], cell_px, grid.cell_h))
            layout.words += grid.write_column(item, x)
            x += cell_px + grid.gap
        x += grid.block_gap - grid.gap
    return layout


class _Grid:
    """Sizes and words of one grid; all lengths in pixels."""

    def __init__(
        self,
        gallery: GalleryContent,
        images: dict[str, Images],
        picks: dict[str, np.ndarray],
        cell_px: int,
        colours: Theme,
    ) -> None:
        self.gallery, self.images, self.picks = gallery, images, picks
        self.cell_px, self.colours = cell_px, colours
        self.unit = unit = max(
            1.0, cell_px / 96
        )  # text grows with large images and stays readable beside small ones
        self.text, self.small, self.line = 12 * unit, 10 * unit, round(13 * unit)
        self.gap, self.margin, self.block_gap = round(4 * unit), round(18 * unit), round(22 * unit)
        self.cell_h = max(1, round(cell_px * gallery.seen.shape[1] / gallery.seen.shape[2]))
        # Below the images only where several rows have a score; else it stands once, below the column.
        own = gallery.metrics[gallery.metric]
        self.own_scores = {label: own[label] for label in images if label in own} if len(own) > 1 else {}
        self.columns = {metric: gallery.average_draws(metric) for metric in gallery.metrics}
        shown = [int(item) for items in picks.values() for item in items]
        self.captions = {
            (label, item): _wrap(gallery.find_caption(label, item), cell_px, self.small)
            for label in images
            for item in shown
        }
        self.rule = describe_rule(gallery, short=True)
        self._measure_rows(shown)
        self._measure_page(len(shown))

    def _measure_rows(self, shown: list[int]) -> None:
        self.tops: dict[str, int] = {}
        y = self.margin + round(40 * self.unit)
        for label in self.images:
            self.tops[label] = y
            # Captions differ in length, and every column must have its rows at the same height.
            lines = (label in self.own_scores) + max(len(self.captions[label, item]) for item in shown)
            y += self.cell_h + self.gap + lines * self.line
        self.foot = y

    def _measure_page(self, n_columns: int) -> None:
        labels = [_say(label) for label in self.images] + [describe_metric(m).label for m in self.columns]
        self.left = self.margin + round(max(_measure(label, self.text) for label in labels) + 12 * self.unit)
        gaps = self.block_gap * (len(self.picks) - 1) - self.gap * len(self.picks)
        right = self.left + n_columns * (self.cell_px + self.gap) + gaps
        # The rule may be longer than a narrow gallery is wide.
        self.width = max(right, round(self.margin + _measure(self.rule, self.text))) + self.margin
        self.height = self.foot + round((17 * len(self.columns) + 34) * self.unit) + self.margin

    def write_labels(self) -> list[_Words]:
        """Return the words at the left and the rule below."""
        muted, words = self.colours.muted, []
        for label, y in self.tops.items():
            words.append(_Words(self.margin, y + self.cell_h / 2, _say(label), self.text, muted, "lm"))
        for number, metric in enumerate(self.columns):
            colour, label = (muted if number else self.colours.accent), describe_metric(metric).label
            words.append(_Words(self.margin, self._place_metric(number), label, self.text, colour, "la"))
        words.append(_Words(self.margin, self.height - self.margin, self.rule, self.text, muted, "ls"))
        return words

    def write_column(self, item: int, x: int) -> list[_Words]:
        """Return concept, scores and captions of one item, centred in its column."""
        centre, muted, accent = x + self.cell_px / 2, self.colours.muted, self.colours.accent
        concept = _shorten(_say(str(self.gallery.concepts[item])), self.cell_px, self.small)
        words = [_Words(centre, self.margin + 20 * self.unit, concept, self.small, muted, "ma")]
        for label, top in self.tops.items():
            y = top + self.cell_h + self.unit
            if label in self.own_scores:
                value = _write(self.own_scores[label], item, self.gallery.score)
                words.append(_Words(centre, y, value, self.small, accent, "ma"))
                y += self.line
            for number, text in enumerate(self.captions[label, item]):
                words.append(_Words(centre, y + number * self.line, text, self.small, muted, "ma"))
        for number, values in enumerate(self.columns.values()):
            colour = self.colours.ink if number else accent
            value = _write(values, item, values)
            words.append(_Words(centre, self._place_metric(number), value, self.text, colour, "ma"))
        return words

    def _place_metric(self, number: int) -> float:
        return self.foot + (3 + 17 * number) * self.unit


def _write(values: np.ndarray, item: int, scale: np.ndarray) -> str:
    return format_number(float(values[item]), count_decimals(scale))


def _say(name: str) -> str:
    return name.replace("_", " ")


def _measure(text: str, size: float) -> float:
    return float(_read_font(round(size)).getlength(text))


def _shorten(text: str, width: float, size: float) -> str:
    """Return the text, cut with an ellipsis where it is wider than `width` pixels."""
    if _measure(text, size) <= width:
        return text
    while text and _measure(f"{text}…", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Return the text in at most `CAPTION_LINES` lines of `width` pixels."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < CAPTION_LINES:
        if len(lines) == CAPTION_LINES - 1:
            return [*lines, _shorten(" ".join(words), width, size)]
        n = 1
        while n < len(words) and _measure(" ".join(words[: n + 1]), size) <= width:
            n += 1
        lines.append(_shorten(" ".join(words[:n]), width, size))
        words = words[n:]
    return lines


# ---- painting
def _paint_pixels(layout: _Layout) -> Any:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (layout.width, layout.height), layout.background)
    draw = ImageDraw.Draw(canvas)
    for image, x, y, width, height in layout.images:
        left, top, width, height = _contain(image, x, y, width, height)
        canvas.paste(_fit(image, width, height), (left, top))
    for w in layout.words:
        draw.text((w.x, w.y), w.text, w.colour, _read_font(round(w.size), bold=w.bold), anchor=w.anchor)
    return canvas


def _paint_pdf(layout: _Layout, path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    align: dict[str, tuple[Any, Any]] = {
        "la": ("left", "baseline"), "lm": ("left", "center"), "ls": ("left", "baseline"), "ma": ("center", "baseline"),
    }  # fmt: skip
    # Fonts are embedded as outlines that can be searched (42), images at their own resolution.
    with matplotlib.rc_context(
        {
            "pdf.fonttype": 42,
            "font.family": "DejaVu Sans",
            "text.parse_math": False,
            "image.composite_image": False,
        }
    ):
        figure = Figure((layout.width / 96, layout.height / 96), dpi=96, facecolor=layout.background)
        FigureCanvasPdf(figure)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        for image, x, y, width, height in layout.images:
            # A PDF keeps the pixels as they are; its viewer scales them.
            how = "none" if max(image.shape[:2]) >= PIXELATED_BELOW else "nearest"
            x, y, width, height = _contain(image, x, y, width, height)
            ax.imshow(image, extent=(x, x + width, y + height, y), interpolation=how, aspect="auto")
        for w in layout.words:
            horizontal, vertical = align[w.anchor]
            style: dict[str, Any] = {
                "ha": horizontal,
                "va": vertical,
                "weight": "bold" if w.bold else "normal",
            }
            drop = (
                ASCENT * round(w.size) if w.anchor in ("la", "ma") else 0.0
            )  # Pillow hangs text from its ascender
            ax.text(w.x, w.y + drop, w.text, fontsize=round(w.size) * 0.75, color=w.colour, **style)
        ax.set_xlim(0, layout.width)
        ax.set_ylim(layout.height, 0)
        figure.savefig(path, format="pdf", metadata={"CreationDate": None}, facecolor=layout.background)


def _contain(image: np.ndarray, x: int, y: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return where an image is within its cell, in its own aspect: that of the seen image may be another one."""
    high, wide = image.shape[:2]
    if abs(width * high - height * wide) < max(high, wide):  # but for rounding
        return x, y, width, height
    scale = min(width / wide, height / high)
    inner = max(1, round(wide * scale)), max(1, round(high * scale))
    return x + (width - inner[0]) // 2, y + (height - inner[1]) // 2, *inner


def _fit(image: np.ndarray, width: int, height: int) -> Any:
    from PIL import Image

    # Digits of 28 pixels are shown in squares; a smooth enlargement would invent what is not there.
    small = max(image.shape[:2]) < PIXELATED_BELOW and image.shape[1] <= width
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(image)).resize((width, height), how)


@functools.cache
def _read_font(size: int, *, bold: bool = False) -> Any:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
