"""One contract over every registered image encoder, at a tiny size with random weights."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml

from braindecode_vis.base import roles
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.embeddings import published
from braindecode_vis.embeddings.autoencoders import AutoencoderKLConfig, TinyAutoencoderConfig
from braindecode_vis.embeddings.degradations import Degradation, ViewedEncoderConfig, ViewsConfig
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.embeddings.imported import ImportedConfig
from braindecode_vis.embeddings.layer_fusion import LayersConfig
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.pixels import EngineeredConfig, PcaConfig, PixelsConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig
from braindecode_vis.embeddings.transformers_models import TransformersConfig

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, size=(40 + 3 * i, 52 - 2 * i, 3), dtype=np.uint8) for i in range(5)]
TINY_CLIP = {"embed_dim": 16, "vision_cfg": {"layers": 3, "width": 64, "image_size": 64, "patch_size": 16}}
TINY_KL = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
TINY_TAESD = {
    "encoder_block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "num_encoder_blocks": [1, 1, 1, 1],
    "num_decoder_blocks": [1, 1, 1, 1],
}
TINY_HF = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

ENCODERS = [
    PixelsConfig(size=8),
    PcaConfig(size=8, n_components=3),
    EfficientNetConfig(),
    EngineeredConfig(size=32),
    OpenClipConfig(architecture="ViT-B-32", weights="random", model_args=TINY_CLIP),
    TimmConfig(
        architecture="vit_small_patch14_reg4_dinov2.lvd142m", weights="random", image_size=28, layer=0.6,
        pooling="cls+mean", model_args={"depth": 3, "embed_dim": 32, "num_heads": 2},
    ),
    TorchvisionConfig(architecture="squeezenet1_1", weights="random", normalise=True),
    TransformersConfig(architecture="clip", weights="random", model_args=TINY_HF, pooling="tokens", project=True),
    AutoencoderKLConfig(weights="random", image_size=32, model_args=TINY_KL),
    TinyAutoencoderConfig(weights="random", image_size=32, model_args=TINY_TAESD),
    ViewsConfig(
        encoder=EngineeredConfig(size=32),
        views=(Degradation(kind="noise"), Degradation(kind="mosaic")),
        combine="stacked",
    ),
]  # fmt: skip
each_encoder = pytest.mark.parametrize("config", ENCODERS, ids=lambda c: c.kind)


@pytest.mark.parametrize(
    "config",
    [
        *ENCODERS,
        LayersConfig(members=(ENCODERS[5], ENCODERS[8])),
        ImportedConfig(layout="nice", files=Path("features"), network="clip-vit-l-14"),
    ],
    ids=lambda c: c.kind,
)
def test_settings_come_back_from_json(config):
    """``weights: random`` once came back as the path of a file of that name."""
    assert type(config).model_validate_json(config.model_dump_json()) == config


def build(config):
    """Return the encoder with the whole of its role, fitted if it learns anything."""
    return roles.build(ImageEncoder, config).fit(IMAGES)


def test_every_kind_is_here():
    _, viewed = get_args(ViewedEncoderConfig)
    assert {c.kind for c in ENCODERS} == {*viewed.kinds, "pixels", "pca", "views"}


@each_encoder
def test_the_contract(config, tmp_path):
    """Shape, name, determinism, independence of the batch, and a place on disk."""
    encoder = build(config)
    assert isinstance(encoder.space, str)
    vectors = encoder.encode(iter(IMAGES))
    assert vectors.dtype == np.float32
    assert vectors.ndim in (2, 3)
    assert len(vectors) == len(IMAGES)
    assert np.isfinite(vectors).all()
    assert np.ptp(vectors, axis=0).max() > 0  # images differ

    again = build(config)
    assert again.space == encoder.space
    np.testing.assert_array_equal(again.encode(IMAGES), vectors)
    one_by_one = np.concatenate([encoder.encode([image]) for image in IMAGES])
    # Other kernels for other batch sizes: rounding of single precision.
    np.testing.assert_allclose(one_by_one, vectors, atol=2e-4 * np.abs(vectors).max())
    assert encoder.encode([]).shape == (0, *vectors.shape[1:])

    encoder.write(tmp_path)
    settings = roles.complete(ImageEncoderSettings, config)
    read = roles.read(ImageEncoder, settings, tmp_path)
    assert read.space == encoder.space
    np.testing.assert_array_equal(read.encode(IMAGES[:2]), encoder.encode(IMAGES[:2]))


@each_encoder
def test_the_fingerprint_says_what_is_computed_and_not_how(config):
    fields = config.hashed_fields()
    assert not {"batch_size", "device", "workers", "weights", "allow_download"} & set(fields)
    if hasattr(config, "batch_size"):
        other = config.model_copy(update={"batch_size": 1})
        assert other.hashed_fields() == fields
        assert build(other).space == build(config).space


@each_encoder
def test_blank_images_stay_finite(config):
    """Normalising a uniform image by its own spread would give NaN."""
    encoder = build(config)
    blank = [np.zeros((40, 52, 3), np.uint8), np.full((52, 40, 3), 255, np.uint8)]
    assert np.isfinite(encoder.encode(blank)).all()


@pytest.mark.parametrize(
    "config", [c for c in ENCODERS if hasattr(c, "allow_download")], ids=lambda c: c.kind
)
def test_without_weights_one_sentence_says_which_file_to_bring(config):
    content = config.model_dump() | {"weights": None, "model_args": {}}
    with pytest.raises(
        ConfigError, match=r"no weights were given: set target\.weights to the path of .+"
    ) as caught:
        _ = type(config).model_validate(content).build().space
    assert "--allow-download" in str(caught.value) or config.kind in ("openclip", "transformers")
    with pytest.raises(ConfigError, match="does not exist; give the path of"):
        _ = type(config).model_validate(content | {"weights": "/absent/file.safetensors"}).build().space


@each_encoder
def test_a_configuration_survives_its_yaml(config):
    content = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert type(config).model_validate(content) == config


DOWNLOADS = [
    (OpenClipConfig(architecture="ViT-H-14", pretrained="laion2b_s32b_b79k", allow_download=True),
     "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    (TimmConfig(allow_download=True), "timm/vit_base_patch14_dinov2.lvd142m"),
    (TorchvisionConfig(architecture="vgg19", allow_download=True), "vgg19-dcbb9e9d.pth"),
    (TransformersConfig(repository="openai/clip-vit-large-patch14", allow_download=True),
     "openai/clip-vit-large-patch14"),
    (AutoencoderKLConfig(latents="sdxl", allow_download=True), "madebyollin/sdxl-vae-fp16-fix"),
    (TinyAutoencoderConfig(allow_download=True), "madebyollin/taesd"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "place"), DOWNLOADS, ids=[c.kind for c, _ in DOWNLOADS])
def test_a_download_asks_the_right_place(config, place, monkeypatch, tmp_path):
    """No network here: the libraries' own clients are replaced by one that notes what it was asked for."""
    import huggingface_hub
    import open_clip.pretrained
    import torch

    asked = []

    def fetch(*names, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError("nothing was fetched before")
        asked.append(" ".join(map(str, names)))
        return str(tmp_path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(published, "check_published", lambda *_: None)
    for module, name in [(huggingface_hub, "hf_hub_download"), (huggingface_hub, "snapshot_download"),
                         (open_clip.pretrained, "download_pretrained_from_hf"),
                         (torch.hub, "download_url_to_file")]:  # fmt: skip
        monkeypatch.setattr(module, name, fetch)
    config.find_weights()
    assert len(asked) == 1
    assert place in asked[0]


def test_gradients_flow_only_where_asked():
    import torch

    encoder = ENCODERS[4].build()
    network = encoder.load().network
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    inputs = torch.rand(2, 3, 64, 64, requires_grad=True)
    encoder.forward(inputs).sum().backward()
    assert inputs.grad is not None
    assert float(inputs.grad.abs().sum()) > 0
    network.requires_grad_(True)  # a caller that adapts the tower asks for it
    encoder.forward(inputs).sum().backward()
    assert network.proj.grad is not None
    encoder.encode(IMAGES[:1])  # works below inference mode all the same


def test_unit_vectors_are_unit_and_say_so():
    raw = ENCODERS[4].build()
    unit = ENCODERS[4].model_copy(update={"normalise": True}).build()
    assert (raw.normalised, unit.normalised) == (False, True)
    assert "/raw/" in raw.space
    assert "/unit/" in unit.space
    vectors = unit.encode(IMAGES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    expected = raw.encode(IMAGES)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_low_precision_is_near_and_has_another_name():
    whole = ENCODERS[4].build()
    half = ENCODERS[4].model_copy(update={"precision": "bfloat16"}).build()
    assert half.space == f"{whole.space}/bfloat16"
    difference = np.abs(half.encode(IMAGES) - whole.encode(IMAGES)).max()
    assert 0 < difference < 0.05 * np.abs(whole.encode(IMAGES)).max()  # eight bits of mantissa


def test_threads_change_nothing():
    none = ENCODERS[4].model_copy(update={"workers": 0, "batch_size": 2}).build()
    many = ENCODERS[4].model_copy(update={"workers": 3, "batch_size": 2}).build()
    np.testing.assert_array_equal(none.encode(IMAGES), many.encode(IMAGES))
