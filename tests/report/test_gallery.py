"""The rule that picks items, the bound on thumbnails, and the composed picture."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.checks import DataError
from braindecode_vis.report import gallery as g


def make_gallery(n=30, side=8, **changes):
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    mean = np.broadcast_to(seen.mean(0).astype(np.uint8), seen.shape)
    content = {
        "ids": [f"s{i:03}" for i in range(n)],
        "concepts": [f"c{i % 3}" for i in range(n)],
        "seen": seen,
        "rows": {"reconstructed": seen[::-1].copy(), "mean image": mean},
        "score": rng.permutation(n) / n,
        "metric": "pixcorr",
    }
    return g.GalleryContent(**(content | changes))


def decode(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB"))


@pytest.mark.parametrize("n", [3, 4, 10, 11, 12, 200])
@pytest.mark.parametrize("n_each", [1, 3, 4])
def test_best_median_and_worst_never_overlap(n, n_each):
    score = np.random.default_rng(n).permutation(n).astype(float)
    picks = g.select_items(score, n_each)
    rows = np.concatenate(list(picks.values()))
    assert len(set(rows.tolist())) == len(rows) == 3 * min(n_each, n // 3)
    assert score[picks["best"]].min() > score[picks["median"]].max() > score[picks["median"]].min() - 1
    assert score[picks["median"]].min() > score[picks["worst"]].max()
    centre = np.median(score)
    assert abs(score[picks["median"]].mean() - centre) <= 1


def test_low_scores_can_be_the_good_ones():
    picks = g.select_items([3.0, 1.0, 2.0], 1, higher_is_better=False)
    assert {name: rows.tolist() for name, rows in picks.items()} == {"best": [1], "median": [2], "worst": [0]}
    assert make_gallery(metric="mse").higher_is_better is False
    assert make_gallery(metric="pixcorr").higher_is_better is True


def test_items_without_a_score_are_never_picked():
    picks = g.select_items([np.nan, 0.5, 0.1, np.inf, 0.9], 4)
    assert {name: rows.tolist() for name, rows in picks.items()} == {"best": [4], "median": [1], "worst": [2]}
    assert "2 items have no score" in g.describe_rule(make_gallery(5, score=[np.nan, 0.5, 0.1, np.nan, 0.9]))


def test_fewer_than_three_items_are_all_shown():
    assert g.select_items([0.1, 0.3], 4)["all"].tolist() == [1, 0]
    assert g.select_items([np.nan], 4)["all"].tolist() == [0]


def test_ties_keep_the_given_order():
    assert g.select_items(np.ones(9), 2)["best"].tolist() == [0, 1]


def test_small_images_are_embedded_exactly():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    for exact in (image, np.repeat(image[..., :1], 3, axis=2)):
        assert (decode(g.encode_thumbnail(exact)) == exact).all()


def test_large_images_shrink_to_the_bound():
    image = np.zeros((300, 600, 3), np.uint8)
    assert decode(g.encode_thumbnail(image, 256)).shape == (128, 256, 3)


def test_every_item_is_carried_where_it_fits_and_equal_images_once():
    content = make_gallery(20)
    thumbnails = g.make_thumbnails(content)
    assert thumbnails.items.tolist() == list(range(20))
    assert thumbnails.cells.shape == (20, 3)
    assert len(set(thumbnails.cells[:, 2].tolist())) == 1
    assert (
        len(thumbnails.images) == len(set(thumbnails.images)) == 21
    )  # the reconstructions are the seen, reversed
    for at in (0, 7, 19):
        assert (decode(thumbnails.images[thumbnails.cells[at, 0]]) == content.seen[at]).all()


@pytest.mark.parametrize("bound", [{"max_thumbnails": 90}, {"max_bytes": 20_000}])
def test_a_bounded_gallery_is_spread_from_best_to_worst(bound):
    content = make_gallery(400)
    thumbnails = g.make_thumbnails(content, **bound)
    picked = np.concatenate(list(content.select_items().values()))
    assert set(picked) <= set(thumbnails.items.tolist())
    assert 13 <= len(thumbnails.items) <= 30
    assert sum(map(len, thumbnails.images)) <= bound.get("max_bytes", 10**9) * 1.01
    places = np.flatnonzero(np.isin(content.sort_items(), thumbnails.items))
    assert np.diff(places).max() < 400 / 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": [1.0]}, "score has 1 entries"),
        ({"concepts": ["a"]}, "concepts has 1 entries"),
        ({"details": {"rank": [1]}}, "rank has 1 entries"),
        ({"rows": {"reconstructed": np.zeros((30, 8, 8, 3))}}, "'reconstructed' must be uint8"),
        ({"rows": {"reconstructed": np.zeros((29, 8, 8, 3), np.uint8)}}, "'reconstructed' must be uint8"),
        ({"rows": {"seen": np.zeros((30, 8, 8, 3), np.uint8)}}, "given as `seen`"),
        ({"ids": ["same"] * 30}, "must be unique"),
        ({"n_each": 0}, "at least 1"),
        ({"filter_by": ["subject"]}, "lacks the column"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        make_gallery(**changes)


def test_an_empty_gallery_is_refused():
    with pytest.raises(DataError, match="at least one item"):
        make_gallery(ids=[])


def test_grid_shows_the_picked_images(tmp_path):
    content = make_gallery(30, side=8)
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
    content = make_gallery()
    assert g.make_gallery_grid(content, rows=["seen"]).shape[0] < g.make_gallery_grid(content).shape[0]
    with pytest.raises(DataError, match="lacks"):
        g.make_gallery_grid(content, rows=["oracle"])
