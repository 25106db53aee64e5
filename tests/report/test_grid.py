"""The gallery as one picture: what it shows, where, and in which formats."""

import re
import zlib

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.report import grid as g
from tests.report.material import make_noise_gallery, make_rich_gallery


def test_grid_shows_the_picked_images(tmp_path):
    content = make_noise_gallery(30, side=8)
    for suffix in ("png", "pdf"):
        picture = g.make_gallery_grid(content, tmp_path / f"grid.{suffix}", cell_px=96, theme="dark")
        assert (tmp_path / f"grid.{suffix}").stat().st_size > 1000
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert (np.asarray(Image.open(tmp_path / "grid.png")) == picture).all()
    best = content.seen[content.select_items()["best"][0]]
    enlarged = np.kron(best, np.ones((12, 12, 1), np.uint8))
    windows = np.lib.stride_tricks.sliding_window_view(picture[:200], (96, 96, 3))[:, :, 0]
    corners = windows[..., 0, 0, :] == enlarged[0, 0]
    assert any((windows[y, x] == enlarged).all() for y, x in np.argwhere(corners.all(-1)))


def test_grid_of_chosen_rows():
    content = make_noise_gallery()
    assert g.make_gallery_grid(content, rows=["seen"]).shape[0] < g.make_gallery_grid(content).shape[0]
    with pytest.raises(DataError, match="is missing"):
        g.make_gallery_grid(content, rows=["oracle"])


def find_words(layout, text):
    return [w for w in layout.words if w.text == text]


def test_every_row_score_and_caption_has_its_place():
    content = make_rich_gallery(12, 16, n_each=2)
    layout = g._lay_out(content, 96, g.THEMES["light"], None)
    assert len(layout.images) == 6 * 9
    for label in (
        "seen",
        "decoded draw 3",
        "low level",
        "shuffled",
        "Pixel correlation",
        "Mean squared error",
    ):
        assert len(find_words(layout, label)) == 1, label
    best = int(content.select_items()["best"][0])
    assert find_words(layout, g.format_number(0.1 * (1 - content.score[best]), 4))
    own = g.format_number(float(content.metrics["pixcorr"]["decoded draw 2"][best]), 3)
    below = next(w for w in find_words(layout, own))
    _, x, y, width, height = layout.images[2]
    assert x < below.x < x + width
    assert y + height <= below.y < y + height + 20
    assert any(w.text.startswith("a figure") for w in layout.words)
    assert all(0 <= w.x <= layout.width and 0 <= w.y <= layout.height for w in layout.words)


def test_long_captions_end_with_an_ellipsis():
    lines = g._wrap("one two three four five six seven eight nine ten eleven twelve", 60, 10)
    assert len(lines) == g.CAPTION_LINES
    assert lines[-1].endswith("…")
    assert all(g._measure(line, 10) <= 60 for line in lines)
    assert g._wrap("", 60, 10) == []
    assert g._wrap("Donaudampfschifffahrtsgesellschaft", 60, 10)[0].endswith("…")


def test_export_writes_png_and_pdf_with_text_and_equal_bytes(tmp_path):
    content = make_rich_gallery(9, 16, n_each=1)
    paths = g.export_gallery(content, tmp_path / "new" / "figure.png")
    assert [path.name for path in paths] == ["figure.png", "figure.pdf"]
    with Image.open(paths[0]) as picture:
        assert picture.width > 500
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in g.export_gallery(content, tmp_path / "new" / "figure")] == first
    streams = re.findall(rb"stream\r?\n(.*?)endstream", first[1], re.S)
    images = first[1].count(b"/Subtype /Image")
    assert images >= 3 * 9
    assert b"/FontFile2" in first[1]  # text stays text
    assert any(b"Tj" in zlib.decompress(s) or b"TJ" in zlib.decompress(s) for s in streams if s[:1] == b"x")
    (only,) = g.export_gallery(content, tmp_path / "v1.2", formats=["pdf"])
    assert only.name == "v1.2.pdf"
    with pytest.raises(ConfigError, match="format of a gallery"):
        g.export_gallery(content, tmp_path / "x", formats=["svg"])
