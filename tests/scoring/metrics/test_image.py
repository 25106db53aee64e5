"""Image metrics equal numpy, scikit-image and torchvision, one pair at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring.metrics import image
from tests import references
from tests.references import CLOSE, assert_close


def _images(n, size, channels, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)


REFERENCES = {
    "pixcorr": references.pearson, "mse": lambda x, y: np.mean((x - y) ** 2), "ssim": references.ssim,
    "ssim_legacy": lambda x, y: references.ssim(x, y, legacy=True),
}  # fmt: skip


@pytest.mark.parametrize("metric", REFERENCES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [11, 28, 120])
def test_native_metrics_equal_the_references(size, channels, metric):
    truth, decoded = _images(4, size, channels), _images(4, size, channels, seed=1) // 2
    expected = [REFERENCES[metric](x, y) for x, y in zip(truth / 255, decoded / 255, strict=True)]
    # Double precision in both: rounding only.
    got = image.compute_image_metric(metric, truth, decoded)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("metric", ["pixcorr", "mse", "ssim"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sizes", [(28, 40), (300, 425)])  # made larger alone; made smaller first
def test_425_metrics_equal_the_references(sizes, channels, metric):
    truth, decoded = _images(2, sizes[0], channels), _images(2, sizes[1], channels, seed=1)
    pairs = zip(references.resize_425(truth / 255), references.resize_425(decoded / 255), strict=True)
    got = image.compute_image_metric(metric, truth, decoded, protocol="425")
    # In single precision beside double.
    np.testing.assert_allclose(got, [REFERENCES[metric](x, y) for x, y in pairs], rtol=0, atol=1e-6)


def test_legacy_425_takes_samples_where_425_averages():
    """torchvision up to 0.16 did not antialias tensors, and MindEye2 pins it.

    A side of 512 becomes 256 by the mean of two neighbours, written out here, instead of a triangle over four. Noise of
    512 pixels, with more noise added: PixCorr .707 instead of .706, SSIM .692 instead of .736.
    """
    rng = np.random.default_rng(0)
    truth = rng.random((1, 512, 512, 3))
    decoded = (truth + rng.random((1, 512, 512, 3))) / 2
    halves = [x.reshape(1, 256, 2, 256, 2, 3).mean((2, 4)) for x in (truth, decoded)]
    for name in ("pixcorr", "ssim"):
        legacy = image.compute_image_metric(name, truth, decoded, protocol="425-legacy")
        # From 256 to 425 pixels nothing is left out, so that both ways are one.
        np.testing.assert_allclose(
            legacy, image.compute_image_metric(name, *halves, protocol="425"), atol=1e-6
        )
        pair = [references.resize_425(x, antialias=False)[0] for x in (truth, decoded)]
        expected = references.pearson(*pair) if name == "pixcorr" else references.ssim(*pair)
        np.testing.assert_allclose(legacy, expected, atol=1e-6)
        table = image.tabulate_image_metric(name, truth, decoded, protocol="425-legacy")
        np.testing.assert_allclose(table.ravel(), legacy, atol=1e-6)
    now = image.compute_image_metric("ssim", truth, decoded, protocol="425")
    assert now - legacy > 0.02
    small = _images(2, 28, 3) / 255
    both = [image.compute_image_metric("mse", small, 1 - small, protocol=p) for p in ("425", "425-legacy")]
    assert_close(*both)


@pytest.mark.parametrize("protocol", ["native", "425", "425-legacy"])
@pytest.mark.parametrize("name", ["pixcorr", "mse", "ssim", "ssim_legacy"])
def test_every_metric_of_an_image_with_itself_is_perfect(name, protocol):
    images = _images(2, 28, 3)
    expected = 0 if name == "mse" else 1
    found = image.compute_image_metric(name, images, images, protocol=protocol)
    assert_close(found, expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_metrics_are_symmetric_and_do_not_depend_on_the_batch(seed, dtype):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 5, 12, 14)).astype(dtype)
    for name in ("pixcorr", "mse", "ssim"):
        values = image.compute_image_metric(name, a, b)
        assert_close(values, image.compute_image_metric(name, b, a))
        alone = [image.compute_image_metric(name, a[i : i + 1], b[i : i + 1])[0] for i in range(5)]
        assert_close(values, alone)


def test_batches_are_bounded(monkeypatch):
    truth, decoded = _images(7, 16, 3), _images(7, 16, 3, seed=1)
    whole = image.compute_image_metric("ssim", truth, decoded)
    monkeypatch.setattr(image, "BATCH_VALUES", 16 * 16 * 3 * 2)
    assert_close(image.compute_image_metric("ssim", truth, decoded), whole)


@pytest.mark.parametrize("protocol", ["native", "425"])
def test_a_constant_image_correlates_zero(protocol):
    """0.1 is not exact in binary, and resizing a constant leaves rounding: neither may count as contrast."""
    constant = np.full((1, 28, 28, 3), 0.1)
    other = np.random.default_rng(0).random((1, 28, 28, 3))
    assert image.compute_image_metric("pixcorr", other, constant, protocol=protocol)[0] == 0
    assert image.compute_image_metric("pixcorr", constant, constant, protocol=protocol)[0] == 0
    one_level = np.full((1, 28, 28, 3), 100, dtype=np.uint8)
    one_level[0, 3, 3, 0] = 101
    assert image.compute_image_metric("pixcorr", one_level, one_level)[0] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(20, 20, 3), (7, 9), (64, 64, 3), (120, 130, 3)])
def test_tables_of_pixels_are_exact(shape):
    """Whole numbers are multiplied in single precision, in blocks whose sums it holds: nothing may be rounded away.

    The extremes 0 and 255 make the largest sums. A single pixel of one level more is contrast; none is not.
    """
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (4, *shape), dtype=np.uint8)
    decoded = np.concatenate([255 - truth, truth[:1], np.zeros((3, *shape), np.uint8)])
    decoded[-1], decoded[-2].flat[3] = 255, 1
    correlations, errors = image.tabulate_pixels(decoded, truth)
    a, b = (x.reshape(len(x), -1).astype(object) for x in (decoded, truth))  # Python's integers: any size
    n = a.shape[1]
    np.testing.assert_array_equal(
        errors, [[float(((x - y) ** 2).sum()) / (255**2 * n) for y in b] for x in a]
    )
    for row, x in enumerate(a):
        for column, y in enumerate(b):
            spread = [n * int((z * z).sum()) - int(z.sum()) ** 2 for z in (x, y)]
            covariance = n * int((x * y).sum()) - int(x.sum()) * int(y.sum())
            expected = covariance / np.sqrt(float(spread[0]) * float(spread[1])) if all(spread) else 0.0
            assert correlations[row, column] == pytest.approx(expected, rel=CLOSE)
    assert not correlations[[-1, -3]].any()
    assert correlations[-2].all()
    with pytest.raises(DataError, match="uint8 and of one shape"):
        image.tabulate_pixels(decoded, truth[:, 1:])
    with pytest.raises(DataError, match="uint8 and of one shape"):
        image.tabulate_pixels(decoded / 255, truth)


def test_grey_meets_rgb():
    grey = _images(2, 16, 1)
    rgb = np.repeat(grey, 3, axis=3)
    np.testing.assert_allclose(image.compute_image_metric("pixcorr", grey, rgb), 1)
    assert_close(image.compute_image_metric("ssim", grey[..., 0], rgb), 1, scale=1)  # grey weights add to 1


def test_bad_images_are_named():
    good = _images(2, 16, 3)
    with pytest.raises(ConfigError, match="did you mean 'ssim'"):
        image.compute_image_metric("sim", good, good)
    with pytest.raises(DataError, match="first in row 1"):
        image.compute_image_metric("mse", good, np.stack([good[0] / 255, good[1] * 1.0]))
    broken = good / 255
    broken[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN, first in row 1"):
        image.compute_image_metric("pixcorr", good, broken)
    with pytest.raises(DataError, match="must be uint8"):
        image.compute_image_metric("mse", good, good.astype(int))
    with pytest.raises(DataError, match="cannot be paired"):
        image.compute_image_metric("mse", good, good[:1])
    with pytest.raises(DataError, match="native size"):
        image.compute_image_metric("mse", good, _images(2, 12, 3))
    with pytest.raises(DataError, match="at least 11 x 11"):
        image.compute_image_metric("ssim", good[:, :10, :10], good[:, :10, :10])
    for narrow in (good[:, :10], good[:, :, :10]):
        for compute in (image.compute_image_metric, image.tabulate_image_metric):
            with pytest.raises(DataError, match="at least 11 x 11"):
                compute("ssim", narrow, narrow)
    with pytest.raises(DataError, match="must have the shape"):
        image.compute_image_metric("mse", good[0, 0], good[0, 0])


@pytest.mark.parametrize(
    "name, protocol",
    [
        ("ssim", "native"),
        ("ssim_legacy", "native"),
        ("pixcorr", "native"),
        ("mse", "native"),
        ("ssim", "425"),
    ],
)
def test_a_table_of_pairs_equals_the_pairs(name, protocol):
    truth, decoded = _images(3, 20, 3), _images(4, 20, 3, seed=1)
    decoded[0] = truth[1]
    table = image.tabulate_image_metric(name, truth, decoded, protocol=protocol)
    for column in range(3):
        same = np.repeat(truth[column : column + 1], 4, axis=0)
        expected = image.compute_image_metric(name, same, decoded, protocol=protocol)
        # Rounding only: of single precision at 425 pixels and in any table of SSIM.
        atol = 1e-12 if protocol == "native" and name != "ssim" else 1e-6
        np.testing.assert_allclose(table[:, column], expected, rtol=0, atol=atol)
    with pytest.raises(DataError):
        image.tabulate_image_metric("ssim", truth, decoded[:, :15])


@pytest.mark.parametrize("protocol", ["native", "425"])
def test_pairs_of_several_rounds_equal_single_comparisons(protocol, monkeypatch):
    seen, rounds = _images(3, 20, 3), [_images(5, 20, 3, seed=1), _images(5, 20, 3, seed=2)]
    own, following = np.array([0, 2, 1, 2, 0]), np.array([1, 0, 2, 0, 1])
    names, calls, prepare = ("pixcorr", "mse", "ssim"), [], image._prepare
    monkeypatch.setattr(image, "_prepare", lambda *a, **k: (calls.append(k["what"]), prepare(*a, **k))[1])
    monkeypatch.setattr(image, "MOST_COPIED", 4)
    pairs = np.array([(n, row, side[row]) for row in range(5) for n in range(2) for side in (own, following)])
    values = image.compute_metrics_of_pairs(names, seen, rounds, pairs, protocol=protocol)
    if protocol == "425":  # each once, however many stand beside it
        assert (calls.count("seen images"), calls.count("decoded images")) == (3, 10)
    made = np.stack([rounds[number][row] for number, row, _ in pairs])
    expected = image.compute_image_metrics(names, seen[pairs[:, 2]], made, protocol=protocol)
    for name in names:
        np.testing.assert_array_equal(values[name], expected[name])


@pytest.mark.parametrize("ground", [0, 255])
@pytest.mark.parametrize("size", [28, 130])  # pairs are compared in double precision; in single
def test_ssim_of_flat_grounds_in_single_precision(size, ground):
    """Where both images were black, terms near 0 came from products about the middle: off by 1e-4, and above 1."""
    truth = np.full((3, size, size, 3), ground, np.uint8)
    truth[1:, 8:14, 8:14] = _images(2, 6, 3)
    mean = np.repeat(truth.mean(axis=0, keepdims=True).astype(np.uint8), 3, axis=0)
    expected = [references.ssim(x, y) for x, y in zip(truth / 255, mean / 255, strict=True)]
    table = image.tabulate_image_metric("ssim", truth, mean)
    np.testing.assert_allclose(np.diag(table), expected, rtol=0, atol=1e-5)
    pairs = image.compute_image_metric("ssim", truth, mean)
    np.testing.assert_allclose(pairs, expected, rtol=0, atol=2e-6)
    assert np.diag(image.tabulate_image_metric("ssim", truth, truth)).max() <= 1 + 3e-7
