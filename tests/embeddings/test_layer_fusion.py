"""Several image encoders stacked to one target."""

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.embeddings.layer_fusion import LayersConfig, LayersEncoder
from braindecode_vis.embeddings.pixels import EngineeredConfig
from braindecode_vis.embeddings.timm_models import TimmConfig

IMAGES = list(np.random.default_rng(0).integers(0, 256, size=(12, 32, 32, 3), dtype=np.uint8))


def make_vit(width, layer):
    return TimmConfig(
        architecture="vit_tiny_patch16_224.augreg_in21k", weights="random", image_size=32, workers=0, pooling="mean",
        layer=layer, model_args={"depth": 2, "embed_dim": width, "num_heads": 2},
    )  # fmt: skip


def test_members_of_one_size_are_stacked(tmp_path):
    config = LayersConfig(members=(make_vit(16, 0), make_vit(16, 1)))
    encoder = config.build().fit(IMAGES)
    assert isinstance(encoder.space, str)
    assert not config.fitted_on_training_images
    found = encoder.encode(IMAGES)
    for place, member in enumerate(config.members):
        np.testing.assert_array_equal(found[:, place], member.build().encode(IMAGES))
    encoder.write(tmp_path)
    assert config.read(tmp_path).space == encoder.space
    assert encoder.space != LayersConfig(members=config.members[::-1]).build().space


@pytest.mark.parametrize("n_train", [12, 40])  # fewer images than features, and more
def test_other_sizes_are_brought_to_principal_components(n_train, tmp_path):
    rng = np.random.default_rng(1)
    vectors = [
        rng.standard_normal((n_train, width)) @ rng.standard_normal((width, width)) for width in (20, 30)
    ]
    config = LayersConfig(members=(make_vit(16, 0), make_vit(24, 1)), size=4)
    assert config.fitted_on_training_images
    encoder = LayersEncoder(config)
    with pytest.raises(DataError, match="not been fitted"):
        encoder.encode(IMAGES)
    encoder.fit_vectors(vectors)
    stacked = encoder.stack(vectors)
    assert stacked.shape == (n_train, 2, 4)
    for place, own in enumerate(vectors):
        expected = PCA(4, svd_solver="full").fit_transform(own)
        np.testing.assert_allclose(abs(stacked[:, place]), abs(expected), rtol=1e-3, atol=1e-3)
    encoder.write(tmp_path)
    read = config.read(tmp_path)
    np.testing.assert_array_equal(read.stack(vectors), stacked)
    assert read.space == encoder.space


def test_embed_learns_from_training_images_only():
    table = pd.DataFrame(
        {"stimulus_id": [f"i{n}" for n in range(12)], "concept": "c", "path": "memory",
         "sha256": [hash_pixels(image) for image in IMAGES]}
    )  # fmt: skip
    stimuli = StimulusSet(table, pixels=np.stack(IMAGES))
    config = LayersConfig(members=(make_vit(16, 0), make_vit(24, 1)), size=3)
    train, calls = list(stimuli.ids[:8]), []

    def embed_member(member, spoil=0.0):
        calls.append(member)
        vectors = member.encode(IMAGES)
        vectors[8:] += spoil
        return Embeddings(vectors, stimuli.ids, member.space)

    encoder, spoilt = config.build(), config.build()
    bank = encoder.embed(stimuli, train, embed_member)
    assert len(calls) == 2
    np.testing.assert_allclose(
        bank.vectors, config.build().fit(IMAGES[:8]).encode(IMAGES), rtol=1e-4, atol=1e-4
    )
    other = spoilt.embed(stimuli, train, lambda member: embed_member(member, 5.0))
    assert bank.space == other.space == encoder.space
    np.testing.assert_array_equal(bank.vectors[:8], other.vectors[:8])


def test_what_does_not_stack_is_refused():
    with pytest.raises(DataError, match=r"16, 24 features; set target\.size"):
        LayersConfig(members=(make_vit(16, 0), make_vit(24, 0))).build().encode(IMAGES)
    tokens = make_vit(16, 0).model_copy(update={"pooling": "patches"})
    with pytest.raises(DataError, match="gives 4 tokens per image"):
        LayersConfig(members=(make_vit(16, 0), tokens)).build().encode(IMAGES)
    with pytest.raises(DataError, match="have 11 components; set it to 11 or less"):
        LayersConfig(members=(make_vit(16, 0), EngineeredConfig()), size=12).build().fit(IMAGES)
