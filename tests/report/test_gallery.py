"""The content of a gallery: what fits together, several draws of a method, metrics of items and rows."""

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.report import gallery
from tests.report.material import make_noise_gallery, make_rich_gallery


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
        ({"filter_by": ["subject"]}, "is missing the column"),
        ({"captions": {"reconstructed": ["a"]}}, "captions of reconstructed has 1 entries"),
        ({"captions": {"oracle": ["a"] * 30}}, "rows of the gallery"),
        ({"metrics": {"mse": [1.0]}}, r"mse of 'reconstructed' must have the shape \(30,\)"),
        ({"metrics": {"mse": {"oracle": [1.0] * 30}}}, "rows of the gallery"),
        ({"blocks": []}, "at least one block"),
        (
            {
                "rows": {
                    "a": np.zeros((30, 2, 8, 8, 3), np.uint8),
                    "a draw 1": np.zeros((30, 8, 8, 3), np.uint8),
                }
            },
            "unique",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        make_noise_gallery(**changes)


def test_an_empty_gallery_is_refused():
    with pytest.raises(DataError, match="at least one item"):
        make_noise_gallery(ids=[])


def test_an_unknown_block_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="quantiles"):
        make_noise_gallery(blocks=["quantile"])


def test_several_draws_become_rows_in_order():
    content = make_rich_gallery(6, 8, n_draws=2)
    rows = content.all_rows()
    assert list(rows) == [
        "seen", "decoded draw 1", "decoded draw 2", "low_level", "fused", "oracle", "nearest", "shuffled",
    ]  # fmt: skip
    assert (rows["decoded draw 2"] == content.rows["decoded"][:, 1]).all()
    assert list(make_rich_gallery(6, 8, n_draws=1).all_rows())[1] == "decoded"


def test_metrics_of_draws_are_averaged_and_the_score_stays_as_given():
    rng = np.random.default_rng(0)
    mse = rng.random((6, 2))
    content = make_rich_gallery(
        6, 8, n_draws=2, metrics={"mse": {"decoded": mse}, "pixcorr": rng.random((6, 2))}
    )
    assert content.average_draws("mse") == pytest.approx(mse.mean(1))
    assert content.metrics["mse"]["decoded draw 2"] == pytest.approx(mse[:, 1])
    assert (content.average_draws("pixcorr") == content.score).all()
    assert next(iter(content.metrics)) == "pixcorr"


def test_a_caption_stands_at_its_first_draw():
    content = make_rich_gallery(6, 8)
    assert content.find_caption("seen", 2) == "a figure with a ring, number 2"
    assert content.find_caption("decoded draw 1", 2).endswith("number 2")
    assert content.find_caption("decoded draw 2", 2) == content.find_caption("oracle", 2) == ""


def test_rows_are_ordered_system_first_controls_last():
    names = ["shuffled", "mean_image", "mystery", "nearest", "oracle", "fused", "low_level", "decoded"]
    expected = ["decoded", "low_level", "fused", "mystery", "oracle", "nearest", "mean_image", "shuffled"]
    assert gallery.order_rows(names) == expected


def test_rows_show_first_draws_of_the_system_and_one_of_each_control():
    draws = np.arange(2 * 5, dtype=np.uint8).reshape(2, 5, 1, 1, 1) * np.ones((1, 1, 4, 4, 3), np.uint8)
    rows = gallery.arrange_rows(
        {"seen": draws[:, 0], "shuffled": draws, "oracle": draws[:, 1], "decoded": draws}
    )
    assert {name: stack.shape[:-3] for name, stack in rows.items()} == {
        "decoded": (2, 3), "oracle": (2,), "shuffled": (2,),
    }  # fmt: skip
    assert list(rows) == ["decoded", "oracle", "shuffled"]
    assert rows["decoded"][1, :, 0, 0, 0].tolist() == [5, 6, 7]
    assert rows["shuffled"][:, 0, 0, 0].tolist() == [0, 5]
