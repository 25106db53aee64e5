import numpy as np
import pandas as pd
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.embeddings.bank import embed_stimuli
from braindecode_vis.embeddings.efficientnet import (
    EfficientNetConfig,
    find_packaged_weights,
    load_network,
    make_network,
    prepare_image,
)


def test_the_packaged_weights_know_a_cat_and_an_espresso():
    from skimage import data

    classes = EfficientNetConfig().build().classify([data.chelsea(), data.coffee()]).argmax(1)
    assert classes.tolist() == [285, 967]  # Egyptian cat, espresso


def test_features_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, size=(5, 64, 48, 3), dtype=np.uint8)
    whole = EfficientNetConfig(batch_size=5).build().encode(images)
    single = EfficientNetConfig(batch_size=2).build().encode(images)
    assert whole.shape == (5, 1280)
    np.testing.assert_allclose(whole, single, atol=1e-4)  # other kernels for other batch sizes


def test_patches_average_to_the_pooled_features():
    images = np.random.default_rng(0).integers(0, 256, size=(2, 64, 48, 3), dtype=np.uint8)
    pooled, halves, local = (EfficientNetConfig(grid=grid).build() for grid in (1, 2, 7))
    patches = local.encode(images)
    assert patches.shape == (2, 49, 1280)
    np.testing.assert_allclose(patches.mean(1), pooled.encode(images), atol=1e-5)
    corner = patches.reshape(2, 7, 7, 1280)[:, :4, 3:].mean(
        (1, 2)
    )  # upper right, with the middle row and column
    np.testing.assert_allclose(halves.encode(images)[:, 1], corner, atol=1e-5)
    np.testing.assert_array_equal(local.classify(images), pooled.classify(images))
    assert local.space != pooled.space
    assert "grid" not in pooled.config.hashed_fields()


def test_convolutions_that_pad_their_input_change_no_number():
    """A kernel with a row and a column of zeros before it took the place of a padded copy of the input."""
    state = torch.load(find_packaged_weights(), map_location="cpu", weights_only=True)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = (
            network(images) for network in (make_network(state), load_network(find_packaged_weights()))
        )
    # The products are the same; another processor may sum them in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_is_another_space_close_to_the_first():
    from skimage import data

    images = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket()]
    exact, rounded = EfficientNetConfig().build(), EfficientNetConfig(precision="bfloat16").build()
    wanted, found = exact.encode(images), rounded.encode(images)
    assert rounded.space == f"{exact.space}/bfloat16"
    assert found.dtype == np.float32
    # Maps are rounded to eight bits after each layer: 0.05 of a vector's length was measured, 0.08 at most.
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)
    assert not np.array_equal(found, wanted)


def test_the_transform_is_the_declared_one():
    prepared = prepare_image(np.full((300, 224, 3), 255, np.uint8))
    assert prepared.shape == (3, 224, 224)
    assert prepared.max() == prepared.min() == 1.0


def test_wrong_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match="which is not a file"):
        _ = EfficientNetConfig(weights=tmp_path / "absent.pth").build().space
    (tmp_path / "bad.pth").write_bytes(b"not a state dict")
    with pytest.raises(DataError, match="does not hold the weights of tf_efficientnet_lite0"):
        EfficientNetConfig(weights=tmp_path / "bad.pth").build().encode([np.zeros((8, 8, 3), np.uint8)])


class CountingEncoder:
    space = "counting"

    def __init__(self):
        self.seen = 0

    def fit(self, images):
        return self

    def encode(self, images):
        rows = [image.astype(np.float32).mean((0, 1)) for image in images]
        self.seen += len(rows)
        return np.stack(rows)


def make_stimuli(n):
    pixels = np.random.default_rng(1).integers(0, 256, size=(n, 4, 4, 3), dtype=np.uint8)
    ids = [f"image{i}" for i in range(n)]
    hashes = [hash_pixels(image) for image in pixels]
    return StimulusSet(
        pd.DataFrame({"stimulus_id": ids, "concept": "x", "path": "", "sha256": hashes}), pixels=pixels
    )


def test_a_bank_computes_each_image_once(tmp_path, monkeypatch):
    monkeypatch.setattr("braindecode_vis.embeddings.bank.CHUNK", 4)
    stimuli, encoder = make_stimuli(10), CountingEncoder()
    first = embed_stimuli(encoder, stimuli.select(["image1", "image5"]), cache=tmp_path)
    assert encoder.seen == 2
    whole = embed_stimuli(encoder, stimuli, cache=tmp_path)
    assert encoder.seen == 10
    again = embed_stimuli(encoder, stimuli, cache=tmp_path)
    assert encoder.seen == 10
    np.testing.assert_array_equal(whole.vectors, stimuli.pixels.astype(np.float32).mean((1, 2)))
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    np.testing.assert_array_equal(first.vectors, whole.select(["image1", "image5"]).vectors)


def test_an_interrupted_bank_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("braindecode_vis.embeddings.bank.CHUNK", 4)
    stimuli, encoder = make_stimuli(10), CountingEncoder()

    def stop(n):
        if encoder.seen >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_stimuli(encoder, stimuli, cache=tmp_path, advance=stop)
    embed_stimuli(encoder, stimuli, cache=tmp_path)
    assert encoder.seen == 10


def test_a_block_gives_its_own_maps_cell_by_cell():
    images = np.random.default_rng(0).integers(0, 256, size=(2, 64, 48, 3), dtype=np.uint8)
    network = load_network(find_packaged_weights())
    kept = []
    hook = network.blocks[2].register_forward_hook(lambda module, taken, given: kept.append(given))
    EfficientNetConfig().build().encode(images)
    hook.remove()
    maps = kept[0].numpy()  # n, 40, 28, 28
    levels = EfficientNetConfig(block=2, grid=4).build()
    vectors = levels.encode(images)
    assert vectors.shape == (2, 40 * 16)
    cells = maps.reshape(2, 40, 4, 7, 4, 7).mean((3, 5))
    np.testing.assert_allclose(vectors, cells.reshape(2, -1), atol=1e-5)
    assert levels.encode([]).shape == (0, 640)
    assert levels.space != EfficientNetConfig(block=2).build().space
