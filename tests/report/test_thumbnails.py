"""The thumbnails that a page carries, and their bound."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.stimuli import ImageRows
from braindecode_vis.report import page_gallery as t
from braindecode_vis.report.page import render_report
from tests.report.material import make_content, make_gallery, make_noise_gallery


def decode(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB"))


def test_small_images_are_embedded_exactly():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    for exact in (image, np.repeat(image[..., :1], 3, axis=2)):
        assert (decode(t.encode_thumbnail(exact)) == exact).all()


def test_large_images_shrink_to_the_bound():
    image = np.zeros((300, 600, 3), np.uint8)
    assert decode(t.encode_thumbnail(image, 256)).shape == (128, 256, 3)


def test_every_item_is_carried_where_it_fits_and_equal_images_once():
    content = make_noise_gallery(20)
    thumbnails = t.make_thumbnails(content)
    assert thumbnails.items.tolist() == list(range(20))
    assert thumbnails.cells.shape == (20, 3)
    assert len(set(thumbnails.cells[:, 2].tolist())) == 1
    assert (
        len(thumbnails.images) == len(set(thumbnails.images)) == 21
    )  # the reconstructions are the seen, reversed
    for at in (0, 7, 19):
        assert (decode(thumbnails.images[thumbnails.cells[at, 0]]) == content.seen[at]).all()


def test_each_picture_is_read_once_whatever_rows_show_it(monkeypatch):
    """Controls show the pictures of others: a page of 600 items read 5000 and compressed 1400."""
    content, read = make_noise_gallery(20), []
    pictures = np.random.default_rng(0).integers(0, 256, (20, 60, 60, 3), dtype=np.uint8)
    seen = ImageRows.of(pictures)
    shuffled = replace(seen, index=seen.index[::-1])
    plain = ImageRows.read
    monkeypatch.setattr(ImageRows, "read", lambda rows, place: read.append(place) or plain(rows, place))
    shown = replace(content, seen=seen, rows={"decoded": seen, "shuffled": shuffled}, metrics={})
    read.clear()
    thumbnails = t.make_thumbnails(shown)
    assert sorted(read) == list(range(20))
    assert len(thumbnails.images) == 20
    assert (thumbnails.cells[:, 2] == thumbnails.cells[::-1, 0]).all()


@pytest.mark.parametrize("bound", [{"max_thumbnails": 90}, {"max_bytes": 20_000}])
def test_a_bounded_gallery_is_spread_from_best_to_worst(bound):
    content = make_noise_gallery(400)
    thumbnails = t.make_thumbnails(content, **bound)
    picked = np.concatenate(list(content.select_items().values()))
    assert set(picked) <= set(thumbnails.items.tolist())
    assert 13 <= len(thumbnails.items) <= 30
    assert sum(map(len, thumbnails.images)) <= bound.get("max_bytes", 10**9) * 1.01
    places = np.flatnonzero(np.isin(content.sort_items(), thumbnails.items))
    assert np.diff(places).max() < 400 / 4


def test_thumbnails_shrink_before_items_are_left_out():
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 200, 200, 3), dtype=np.uint8)
    content = make_noise_gallery(60, seen=images[0], rows={"reconstructed": images[1]})
    assert len(t.make_thumbnails(content, max_px=160).items) == 60
    bound = sum(map(len, t.make_thumbnails(content, max_px=80).images))
    bounded = t.make_thumbnails(content, max_px=160, max_bytes=round(bound * 1.05))
    assert len(bounded.items) == 60
    assert decode(bounded.images[0]).shape == (80, 80, 3)


@pytest.mark.further
def test_two_hundred_natural_pictures_with_all_controls_stay_below_two_megabytes():
    """The page of a THINGS-EEG2 subject was up to 7 MB, which no mail takes."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 200, 9, 9, 3), dtype=np.uint8)
    made = [[np.asarray(Image.fromarray(one).resize((200, 200))) for one in row] for row in coarse]
    stacks = np.array(made)  # (n_rows, 200, 200, 200, 3)
    rows = {f"row {n}": stacks[n] for n in range(1, 5)}
    rows |= {"mean image": np.broadcast_to(stacks[5, :1], stacks[5].shape), "shuffled": stacks[1][::-1]}
    content = make_gallery(200, 8, seen=stacks[0], rows=rows)
    page = render_report(make_content(gallery=content))
    assert len(page) < 2_000_000
    assert "Every one of the 200 items" in page
