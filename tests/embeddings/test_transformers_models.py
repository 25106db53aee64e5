"""Folders of transformers, and InternViT in its authors' names, against the libraries themselves."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.embeddings import timm_models
from braindecode_vis.embeddings.layer_readout import read_layers
from braindecode_vis.embeddings.transformers_models import (
    TransformersConfig,
    _build,
    describe_tower,
    rename_intern_config,
    rename_intern_weights,
)

IMAGE = np.random.default_rng(1).integers(0, 256, size=(90, 70, 3), dtype=np.uint8)
VITS = {"depth": 3, "embed_dim": 32, "num_heads": 2}
TINY_HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 28}, "do_center_crop": True, "resample": 3, "do_normalize": True,
    "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def save_hf(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


@pytest.mark.parametrize("architecture", ["clip", "siglip", "dinov2_with_registers", "dinov3_vit", "vit"])
def test_transformers_folders_give_what_transformers_gives(architecture, tmp_path):

    torch.manual_seed(0)
    model = _build(architecture, dict(TINY_HF)).eval()
    if architecture == "clip":  # people hold the folder of both towers
        from transformers import CLIPConfig, CLIPModel

        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        whole = CLIPModel(CLIPConfig(vision_config=TINY_HF, text_config=text, projection_dim=16)).eval()
        save_hf(whole, tmp_path)
        expected = lambda x: whole.get_image_features(pixel_values=x)  # noqa: E731
    else:
        save_hf(model, tmp_path)
        expected = describe_tower(model, architecture).forward
    config = TransformersConfig(weights=tmp_path)
    tower, inputs = config.make_tower(), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        target = expected(inputs)
        target = getattr(target, "pooler_output", target)
        torch.testing.assert_close(tower.forward(inputs), target)
        if architecture == "siglip":
            pooled = read_layers(tower, inputs, layers=["output"], pooling="attention")
            torch.testing.assert_close(pooled, target)
        else:
            tokens = tower.network(pixel_values=inputs, output_hidden_states=True).hidden_states
            torch.testing.assert_close(read_layers(tower, inputs, layers=[0], pooling="cls"), tokens[1][:, 0])
    assert config.build().encode([IMAGE]).shape == (1, target.shape[1])
    assert config.build().space.endswith("shortest28-bicubic-centre28-half")


def test_a_target_of_dinov2_is_what_neuralbench_and_the_challenge_compute(tmp_path):
    """Of 41 states of a network of 40 blocks they take number int(.6667 * 40), and average all 257 tokens.

    The state after block 26 is that of our layer 25, without the final norm. Images are resized to 518 first and then
    as the folder says, to 256 and 224. From the same pixels the vectors are equal to single precision; the processor
    resizes with torchvision, we with Pillow, whose grey values differ by one here and there.
    """
    from PIL import Image
    from transformers import BitImageProcessor

    torch.manual_seed(0)
    sizes = {
        **TINY_HF,
        "hidden_size": 16,
        "num_hidden_layers": 40,
        "image_size": 518,
        "intermediate_size": 16,
    }
    model = _build("dinov2", sizes).eval()
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    processor.save_pretrained(tmp_path)
    image = np.kron(np.random.default_rng(1).integers(0, 256, (9, 12, 3)), np.ones((30, 30, 1))).astype(
        np.uint8
    )
    first = Image.fromarray(image).resize((int(518 * 360 / 270), 518), Image.Resampling.BILINEAR)
    pixels = processor(first, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    expected = states[int(0.6667 * (len(states) - 1))].mean(dim=1)
    assert (len(states), states[0].shape[1], int(0.6667 * 40)) == (41, 257, 26)
    config = TransformersConfig(weights=tmp_path, layer=25, pooling="mean_all", first_resize=518)
    with torch.no_grad():
        own = read_layers(config.make_tower(), pixels, layers=[25], pooling="mean_all")
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    found = config.build().encode([image])
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)
    assert "layer=25/mean_all/raw/first518-shortest256-bicubic-centre224-imagenet" in config.build().space
    # Neither the patches alone nor the transform without its first resize gives that.
    for other in ({"pooling": "mean"}, {"first_resize": None}):
        there = config.model_copy(update=other).build().encode([image])
        assert np.abs(there - expected.numpy()).max() > 5e-4, other


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    """Transformers would draw it at random and only log that it did."""

    save_hf(_build("dinov2", dict(TINY_HF)), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 tensor\(s\) are missing.*layernorm\.weight"):
        TransformersConfig(weights=tmp_path).make_tower()
    with pytest.raises(ConfigError, match=r"target\.architecture is clip, but .* holds a dinov2"):
        _ = TransformersConfig(weights=tmp_path, architecture="clip").family
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no preprocessor_config\.json"):
        _ = TransformersConfig(weights=tmp_path).build().space


def test_intern_vit_in_its_authors_names_agrees_with_timm(tmp_path):
    """The 6B model needs the code of its authors elsewhere; timm has an independent copy of the 300M one."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_intern300m_patch14_448", num_classes=0, img_size=28, **VITS).eval()
    names = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
             "patch_embed.proj": "embeddings.patch_embedding", "blocks.": "encoder.layers.",
             "ls1.gamma": "ls1", "ls2.gamma": "ls2"}  # fmt: skip
    state = {}
    for key, value in network.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value.clone()
    save_file(state, tmp_path / "model.safetensors")
    description = {
        "model_type": "intern_vit_6b", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128,
        "num_hidden_layers": 3, "image_size": 28, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
        "norm_type": "layer_norm", "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tower, inputs = TransformersConfig(weights=tmp_path).make_tower(), torch.rand(2, 3, 28, 28)
    theirs = timm_models.describe_tower(network)
    with torch.no_grad():
        for layer in (0, -1):
            ours = read_layers(tower, inputs, layers=[layer], pooling="tokens")
            torch.testing.assert_close(ours, read_layers(theirs, inputs, layers=[layer], pooling="tokens"))


def test_intern_vit_with_normed_queries(tmp_path):
    """The 6B model has root-mean-square norms, no bias in qkv, and norms over all heads of queries and keys."""

    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1,
              "image_size": 28, "patch_size": 14, "qkv_bias": False, "qk_normalization": True,
              "norm_type": "rms_norm", "hidden_act": "gelu"}  # fmt: skip

    network = _build("internvl", rename_intern_config(config))
    own = network.state_dict()
    qkv = torch.cat([own[f"encoder.layer.0.attention.{part}_proj.weight"] for part in "qkv"])
    original = {"encoder.layers.0.attn.qkv.weight": qkv, "encoder.layers.0.attn.q_norm.weight": torch.ones(16),
                "encoder.layers.0.norm1.weight": torch.ones(16)}  # fmt: skip
    renamed = rename_intern_weights(
        {f"vision_model.{k}": v for k, v in original.items()} | {"language.x": qkv}
    )
    assert set(renamed) <= set(own)
    torch.testing.assert_close(
        renamed["encoder.layer.0.attention.k_proj.weight"], own["encoder.layer.0.attention.k_proj.weight"]
    )
