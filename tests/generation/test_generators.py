import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.embeddings.pixels import PcaConfig, PixelsConfig
from braindecode_vis.generation import inversion
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.inversion import (
    ClassMeanGenerator,
    LatentsConfig,
    MeanImageGenerator,
    NearestConfig,
    stretch_contrast,
)
from braindecode_vis.generation.priors.closed_form import IdentityPriorConfig


def make_data(target=None, n=20, noise=0.0):
    target = target or PixelsConfig()
    generator = np.random.default_rng(0)
    grey = np.zeros((n, 12, 12), np.uint8)
    for row in range(n):
        top, left = generator.integers(1, 6, size=2)
        grey[row, top : top + 5, left : left + 5] = 200 if row % 2 else 255
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    ids = [f"image{i}" for i in range(n)]
    table = pd.DataFrame(
        {
            "stimulus_id": ids,
            "concept": ["bright", "dim"] * (n // 2),
            "path": "",
            "sha256": list(map(hash_pixels, pixels)),
        }
    )
    encoder = target.build().fit(pixels)
    bank = Embeddings(encoder.encode(pixels), ids, encoder.space)
    blurred = 0.5 * bank.vectors + 0.25 + generator.normal(scale=noise, size=bank.vectors.shape)
    return GeneratorData(
        encoder,
        bank,
        StimulusSet(table, pixels=pixels),
        Embeddings(blurred.astype(np.float32), ids, encoder.space),
    )


@pytest.mark.parametrize("target", [PixelsConfig(), PcaConfig(n_components=19)])
def test_the_inverse_of_the_target_returns_the_training_images(target):
    data = make_data(target)
    images = LatentsConfig().build(data).generate(data.embeddings, seed=0)
    assert np.abs(images.astype(int) - data.stimuli.pixels).max() <= 1  # rounding to whole grey values


def test_contrast_is_learnt_from_out_of_fold_predictions():
    """The planted predictions have half the contrast; threshold and gain must undo it."""
    data = make_data(noise=0.02)
    generator = LatentsConfig(contrast="ssim").build(data)
    assert generator.describe()["threshold"] in (0.25, 0.3)
    assert generator.describe()["gain"] == 2.0
    assert LatentsConfig().build(data).describe() == {"threshold": 0.0, "gain": 1.0}


def test_contrast_without_predictions_is_refused():
    data = make_data()
    bare = GeneratorData(data.image_encoder, data.embeddings, data.stimuli)
    with pytest.raises(ConfigError, match="no out-of-fold predictions"):
        LatentsConfig(contrast="ssim").build(bare)


def test_stretching_keeps_order_and_range():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    stretched = stretch_contrast(ramp, 0.2, 2.0).ravel().astype(int)
    assert (np.diff(stretched) >= 0).all()
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert stretch_contrast(ramp, 0.0, 1.0) is ramp


def test_nearest_copies_the_training_image():
    data = make_data()
    noisy = data.embeddings.vectors + np.random.default_rng(1).normal(scale=0.01, size=(20, 144))
    generator = NearestConfig().build(data)
    images = generator.generate(Embeddings(noisy, data.embeddings.ids, data.embeddings.space), seed=0)
    np.testing.assert_array_equal(images, data.stimuli.pixels)


def test_controls_are_what_they_are_called():
    data = make_data()
    mean = MeanImageGenerator(data).generate(data.embeddings, seed=0)
    np.testing.assert_array_equal(mean[0], np.round(data.stimuli.pixels.mean(0)).astype(np.uint8))
    assert (mean == mean[0]).all()
    classes = ClassMeanGenerator(data)
    prototypes = Embeddings(classes.centroids, ["a", "b"], data.embeddings.space)
    assert classes.classify(prototypes).tolist() == ["bright", "dim"]
    expected = np.round(data.stimuli.pixels[1::2].mean(0)).astype(np.uint8)
    np.testing.assert_array_equal(classes.generate(prototypes, seed=0)[1], expected)


def test_only_images_that_are_shown_are_read(monkeypatch):
    """`reconstruct` by `nearest` decoded all 16 540 training pictures of THINGS-EEG2 to show 200: 69 s of 72."""
    data, read = make_data(n=40), []
    original = StimulusSet.read_image
    monkeypatch.setattr(
        StimulusSet, "read_image", lambda self, name: read.append(name) or original(self, name)
    )
    monkeypatch.setattr(inversion, "MOST_AVERAGED", 8)
    asked = data.embeddings.select([f"image{n}" for n in (3, 1, 3)])
    images = NearestConfig().build(data).generate(asked, seed=0)
    np.testing.assert_array_equal(images, data.stimuli.pixels[[3, 1, 3]])
    assert sorted(set(read)) == ["image0", "image1", "image3"]  # the first says the size of all
    read.clear()
    mean = MeanImageGenerator(data).generate(asked, seed=0)[0]
    spread = [0, 5, 11, 16, 22, 27, 33, 39]
    assert read == [f"image{n}" for n in spread]
    np.testing.assert_array_equal(mean, np.round(data.stimuli.pixels[spread].mean(0)).astype(np.uint8))
    read.clear()
    ClassMeanGenerator(data).generate(asked, seed=0)
    assert read == [f"image{n}" for n in range(1, 40, 2)]  # of the decoded class alone


def test_a_foreign_space_is_refused():
    data = make_data()
    foreign = Embeddings(np.ones((1, 144), np.float32), ["image0"], "clip")
    assert not LatentsConfig().build(data).accepts("clip")
    with pytest.raises(ConfigError, match="inverts 'pixels/12x12x1', not 'clip'"):
        LatentsConfig().build(data).generate(foreign, seed=0)
    with pytest.raises(DataError, match="cannot be compared"):
        NearestConfig().build(data).generate(foreign, seed=0)


def test_the_identity_prior_repeats_its_input_draw_by_draw():
    rows = Embeddings(np.arange(4.0).reshape(2, 2), ["a", "b"], "toy")
    drawn = IdentityPriorConfig().build().fit(rows, rows).sample(rows, n_draws=2, seed=0)
    assert drawn.ids.tolist() == ["a", "a", "b", "b"]
    np.testing.assert_array_equal(drawn.vectors, [[0, 1], [0, 1], [2, 3], [2, 3]])
