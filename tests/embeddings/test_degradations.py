import numpy as np
import pytest
from skimage import data

from braindecode_vis.checks import DataError
from braindecode_vis.embeddings.degradations import (
    NEUROBRIDGE,
    Degradation,
    UncertaintyRule,
    ViewsConfig,
    blur_fovea,
    blur_gaussian,
    degrade,
    find_sigma,
    lower_resolution,
    make_mosaic,
)
from braindecode_vis.embeddings.pixels import EngineeredConfig, PixelsConfig

PHOTO = data.chelsea()[:224, :224]
ENGINE = EngineeredConfig(size=32)


@pytest.mark.parametrize("kind", ["none", "blur", "fovea", "noise", "resolution", "mosaic"])
@pytest.mark.parametrize("shape", [(224, 224), (90, 131)])
def test_every_view_keeps_the_shape_and_is_the_same_every_time(kind, shape):
    image = PHOTO[: shape[0], : shape[1]]
    view = degrade(image, Degradation(kind=kind))
    assert view.dtype == np.uint8
    assert view.shape == image.shape
    np.testing.assert_array_equal(view, degrade(image, Degradation(kind=kind)))
    assert (kind == "none") == np.array_equal(view, image)
    blank = np.full_like(image, 200)
    if kind != "noise":
        np.testing.assert_array_equal(degrade(blank, Degradation(kind=kind)), blank)


def test_the_blur_is_gaussian_of_the_stated_width():
    impulse = np.zeros((224, 224, 3), np.uint8)
    impulse[:, 112] = 255  # a line, whose profile is the kernel
    profile = blur_gaussian(impulse, 51)[112, :, 0].astype(float)
    sigma = find_sigma(51)
    assert sigma == pytest.approx(8.0)  # OpenCV's rule for 51 pixels
    expected = 255 * np.exp(-((np.arange(224) - 112) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    assert np.abs(profile - expected).max() <= 1.5  # rounding and the cut at 25 pixels
    small = blur_gaussian(impulse[::2, ::2], 51)[56, :, 0].astype(float)
    assert small.max() == pytest.approx(2 * profile.max(), abs=2)  # half the width on half the image


def test_the_fovea_is_sharp_and_the_corners_are_blurred():
    view, blurred = blur_fovea(PHOTO, 51).astype(float), blur_gaussian(PHOTO, 51).astype(float)
    distance = np.abs(view - PHOTO).mean(-1)
    assert distance[107:117, 107:117].mean() < 0.25 * np.abs(blurred - PHOTO)[107:117, 107:117].mean()
    np.testing.assert_allclose(
        view[0, 0], np.exp(-3) * PHOTO[0, 0] + (1 - np.exp(-3)) * blurred[0, 0], atol=1
    )
    levels = (Degradation(kind="fovea", amount=amount) for amount in (45, 57))  # the outer two of UBP
    sharper, softer = (np.abs(degrade(PHOTO, level).astype(float) - PHOTO).mean() for level in levels)
    assert sharper < softer


def test_low_resolution_and_mosaic():
    assert len(np.unique(make_mosaic(PHOTO, 56).reshape(-1, 3), axis=0)) == 16  # four by four squares
    square = PHOTO[:56, :56]
    np.testing.assert_array_equal(
        make_mosaic(PHOTO, 56)[:56, :56], np.round(square.mean((0, 1))) + 0 * square
    )
    fine = np.abs(np.diff(PHOTO.astype(float), axis=0)).mean()
    assert np.abs(np.diff(lower_resolution(PHOTO, 8).astype(float), axis=0)).mean() < 0.5 * fine


def test_noise_has_the_stated_size_and_differs_between_images():
    grey = np.full((100, 100, 3), 128, np.uint8)
    noisy = degrade(grey, Degradation(kind="noise", amount=0.1)).astype(float)
    assert noisy.std() == pytest.approx(25.5, rel=0.02)
    other = degrade(grey + 1, Degradation(kind="noise", amount=0.1)).astype(float)
    assert abs(np.corrcoef(noisy.ravel(), other.ravel())[0, 1]) < 0.05
    assert not np.array_equal(noisy, degrade(grey, Degradation(kind="noise", amount=0.1), seed=1))


def test_views_are_averaged_or_stacked():
    images = [PHOTO[:64, :80], PHOTO[50:120, 20:90]]
    each = [ENGINE.build().encode([degrade(image, view) for image in images]) for view in NEUROBRIDGE]
    averaged = ViewsConfig(encoder=ENGINE).build()
    stacked = ViewsConfig(encoder=ENGINE, combine="stacked").build()
    np.testing.assert_allclose(averaged.encode(images), np.mean(each, axis=0), atol=1e-6)
    np.testing.assert_array_equal(stacked.encode(images), np.stack(each, axis=1))
    assert averaged.space.endswith("/views=blur15+noise0.0980392+resolution10+mosaic5-seed0-averaged")
    assert averaged.space != stacked.space


def test_the_encoder_of_the_views_is_checked():
    with pytest.raises(ValueError, match="encoder"):
        ViewsConfig(encoder=PixelsConfig())
    tokens = ViewsConfig(encoder=ENGINE, combine="stacked").build()
    with pytest.raises(DataError, match="token sequences cannot be stacked"):
        tokens._combine(np.zeros((4, 5, 3)))


def test_easy_images_get_less_blur_and_hard_ones_more():
    rng = np.random.default_rng(0)
    ids = [f"i{n}" for n in range(200)]
    values = rng.normal(0.3, 0.02, 200)
    values[7], values[9] = 0.9, -0.4
    rule = UncertaintyRule()
    rule.update(ids, values)
    chosen = rule.choose([*ids, "never scored"])
    assert (chosen[7], chosen[9], chosen[-1]) == (0, 2, 1)
    assert (chosen == 1).mean() > 0.9
    assert rule.average["i7"] == pytest.approx(0.9)
    rule.update(["i7"], [0.1])
    assert rule.average["i7"] == pytest.approx(0.7 * 0.9 + 0.3 * 0.1)
    assert rule.choose(["i7"]).tolist() == [1]  # one image has no distribution


def test_the_tails_hold_five_percent():
    ids = [str(n) for n in range(20000)]
    rule = UncertaintyRule()
    rule.update(ids, np.random.default_rng(1).standard_normal(20000))
    assert (rule.choose(ids) != 1).mean() == pytest.approx(0.05, abs=0.005)


def test_the_seed_of_the_noise_is_part_of_the_space():
    noisy = (Degradation(kind="noise", amount=0.3),)
    one, other = (ViewsConfig(encoder=ENGINE, views=noisy, noise_seed=seed).build() for seed in (0, 1))
    assert one.space != other.space
    assert np.abs(one.encode([PHOTO[:64, :80]]) - other.encode([PHOTO[:64, :80]])).max() > 0
