import numpy as np
import pytest
from sklearn.decomposition import PCA

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings import pixels
from braindecode_vis.embeddings.pixels import PcaConfig, PixelsConfig

IMAGES = np.random.default_rng(0).integers(0, 256, size=(12, 6, 6, 3), dtype=np.uint8)
GREY = np.repeat(IMAGES[..., :1], 3, axis=-1)


@pytest.mark.parametrize("colour", [False, True])
def test_pixels_come_back_exactly(colour):
    images = IMAGES if colour else GREY
    encoder = PixelsConfig(colour=colour).build().fit(images)
    np.testing.assert_array_equal(encoder.decode(encoder.encode(images)), images)
    assert encoder.space == f"pixels/6x6x{3 if colour else 1}"


@pytest.mark.parametrize("n_bytes", [1, 5 * 6 * 6 * 3 * 4, 1 << 20])
def test_vectors_are_the_same_however_many_lie_in_one_array(n_bytes, monkeypatch):
    """Small arrays between the buffers of a decoder cost 60 kB a file: a gigabyte for 16 740 pictures."""
    monkeypatch.setattr(pixels, "_BLOCK_BYTES", n_bytes)
    encoder = PixelsConfig(colour=True).build().fit(IMAGES)
    wanted = IMAGES.reshape(12, -1).astype(np.float32) / 255
    np.testing.assert_array_equal(encoder.encode(IMAGES), wanted)
    assert encoder.encode([]).shape == (0, 108)


def test_images_of_another_size_need_a_resize():
    encoder = PixelsConfig().build().fit(GREY)
    with pytest.raises(DataError, match=r"cannot enter the space 'pixels/6x6x1'; resize it"):
        encoder.encode([np.zeros((5, 6, 3), np.uint8)])
    small = PixelsConfig(size=4).build().fit(GREY)
    assert small.encode([*GREY, np.zeros((5, 6, 3), np.uint8)]).shape == (13, 16)


def test_values_outside_the_range_are_clipped():
    encoder = PixelsConfig().build().fit(GREY)
    decoded = encoder.decode(np.array([[-1.0] * 18 + [2.0] * 18]))
    assert (decoded[0, :3] == 0).all()
    assert (decoded[0, 3:] == 255).all()


def test_components_are_those_of_scikit_learn_and_survive_the_disk(tmp_path):
    encoder = PcaConfig(n_components=4).build().fit(GREY)
    reference = PCA(n_components=4, svd_solver="full").fit(GREY[..., 0].reshape(12, -1) / 255)
    np.testing.assert_allclose(
        encoder.encode(GREY), reference.transform(GREY[..., 0].reshape(12, -1) / 255), atol=1e-5
    )  # single precision
    encoder.write(tmp_path)
    back = PcaConfig(n_components=4).read(tmp_path)
    assert back.space == encoder.space
    np.testing.assert_array_equal(back.encode(GREY), encoder.encode(GREY))


def test_two_fits_are_two_spaces():
    config = PcaConfig(n_components=3)
    assert config.build().fit(GREY[:6]).space != config.build().fit(GREY[6:]).space


def test_all_components_lose_nothing_of_the_training_images():
    encoder = PcaConfig(n_components=99).build().fit(GREY)
    assert encoder.encode(GREY).shape == (12, 11)
    difference = encoder.decode(encoder.encode(GREY)).astype(int) - GREY
    assert np.abs(difference).max() <= 1  # rounding to whole grey values


def test_an_unfitted_encoder_says_so():
    with pytest.raises(DataError, match="have not been fitted"):
        _ = PcaConfig().build().space
    with pytest.raises(DataError, match="no principal component"):
        PcaConfig().build().fit(GREY[:1])
    with pytest.raises(DataError, match="at least one training image"):
        PixelsConfig().build().fit([])
