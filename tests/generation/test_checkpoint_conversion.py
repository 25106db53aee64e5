"""A checkpoint with sgm's names becomes a folder of diffusers that makes the same images."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.generation import checkpoint_conversion
from braindecode_vis.generation.checkpoint_conversion import AUTOENCODER, UNET, convert_folder, convert_unclip
from braindecode_vis.generation.token_unclip import TokenUnclipConfig
from tests.constants import replace_constants
from tests.generation import hub_models as models

N_BLOCKS = 2  # resnets of each level, as in SDXL
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def name_as_sgm(name, attends_up):
    """Return sgm's name of a tensor of diffusers: blocks are numbered through, a level has two and a change of size."""
    stem, _, end = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{end}"
    m = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)\.(\w+)$", name)
    side, level, kind, number, rest = m[1], int(m[2] or 0), m[3], int(m[4]), m[5]
    if side == "mid_block":
        place = f"middle_block.{1 if kind == 'attentions' else 2 * number}"
    elif side == "down_blocks":
        start = 1 + level * (N_BLOCKS + 1)
        place = f"input_blocks.{start + (N_BLOCKS if kind == 'downsamplers' else number)}.{int(kind == 'attentions')}"
    else:
        last = kind == "upsamplers"
        inner = 1 + attends_up[level] if last else int(kind == "attentions")
        place = f"output_blocks.{level * (N_BLOCKS + 1) + (N_BLOCKS if last else number)}.{inner}"
    rest = {"resnets": RESNET.get(rest), "downsamplers": "op"}.get(kind, rest)
    return f"{place}.{rest}.{end}"


def name_as_ldm(name, n_levels=2):
    """Return the original name of a tensor of the autoencoder."""
    turned = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{n_levels - 1 - int(m[1])}", name)
    for new, old in (
        ("down_blocks", "down"), (".resnets.", ".block."), ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"), ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"), ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"), ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"), ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ):  # fmt: skip
        turned = turned.replace(new, old)
    return AUTOENCODER + turned


@pytest.fixture(scope="module")
def networks():
    """A small SDXL unCLIP: three levels, the first without attention, heads of 8 features."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32, 64), layers_per_block=N_BLOCKS, sample_size=16, cross_attention_dim=models.SIZE,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(4, 4, 8),
            transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=32,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
            up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=2, scaling_factor=0.13025,
        )  # fmt: skip
    return unet, vae


@pytest.fixture(scope="module")
def checkpoint(networks, tmp_path_factory):
    unet, vae = networks
    state = {UNET + name_as_sgm(name, [1, 1, 0]): value for name, value in unet.state_dict().items()}
    for name, value in vae.state_dict().items():
        old = name_as_ldm(name)
        # The first release had convolutions of one pixel for its attention.
        matrix = "attn_1" in old and "norm" not in old and value.ndim == 2
        state[old] = value[:, :, None, None] if matrix else value
    state["conditioner.embedders.0.model.visual.proj"] = torch.zeros(3, 3)
    path = tmp_path_factory.mktemp("sgm") / "unclip.ckpt"
    torch.save({"state_dict": state, "global_step": 110000}, path)
    return path


def test_names_and_sizes_are_those_that_the_library_finds(checkpoint):
    """Diffusers converts networks of this kind as well, given their settings."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = {name.removeprefix(UNET): value for name, value in state.items() if name.startswith(UNET)}
    settings = checkpoint_conversion.describe_unet(own, checkpoint, head_size=8)
    made = checkpoint_conversion.rename_unet(own, checkpoint)
    theirs = convert_ldm_unet_checkpoint(dict(state), {**settings, "class_embed_type": None})
    assert set(made) == set(theirs)
    assert all(torch.equal(made[name], theirs[name]) for name in made)


def test_a_converted_checkpoint_makes_the_images_of_its_networks(networks, checkpoint, tmp_path, monkeypatch):
    from diffusers import EulerDiscreteScheduler

    unet, vae = networks
    direct, converted, halved = (tmp_path / name for name in ("direct", "converted", "halved"))
    unet.save_pretrained(direct / "unet")
    vae.save_pretrained(direct / "vae")
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    ).save_pretrained(direct / "scheduler")
    told = []
    monkeypatch.setattr(checkpoint_conversion, "LARGEST_PART", 200_000)
    convert_unclip(checkpoint, converted, head_size=8, tell=told.append)
    assert len(list((converted / "unet").glob("*.safetensors"))) > 2  # in parts
    assert "tensors of the network" in told[0]
    data = models.make_data(
        shape=(5, models.SIZE), space="openclip/ViT-bigG-14/random-0/output/patches/raw/x"
    )
    rows = Embeddings(data.embeddings.vectors[:2], data.embeddings.ids[:2], data.embeddings.space)
    config = replace_constants(TokenUnclipConfig, n_tokens=5)
    options = {"image_size": 16, "steps": 3, "device": "cpu"}
    images = [
        config(weights=folder, **options).build(data).generate(rows, seed=0) for folder in (direct, converted)
    ]
    np.testing.assert_array_equal(*images)
    convert_unclip(checkpoint, halved, head_size=8, half=True)
    half = config(weights=halved, **options).build(data).generate(rows, seed=0)
    assert np.abs(half.astype(int) - images[0]).max() <= 6  # weights of half precision
    with pytest.raises(ConfigError, match="holds a network already"):
        convert_unclip(checkpoint, halved)


def test_what_is_no_such_checkpoint_is_one_sentence(checkpoint, tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"state_dict": {"a": Code()}}, tmp_path / "code.ckpt")
    with pytest.raises(DataError, match="does not hold plain tensors"):
        convert_unclip(tmp_path / "code.ckpt", tmp_path / "a")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"has no tensors named model\.diffusion_model"):
        convert_unclip(tmp_path / "other.safetensors", tmp_path / "a")
    with pytest.raises(ConfigError, match="is not a file"):
        convert_unclip(tmp_path / "nothing.ckpt", tmp_path / "a")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({**state, UNET + "input_blocks.1.0.strange.weight": torch.zeros(1)}, tmp_path / "more.ckpt")
    with pytest.raises(
        DataError, match=r"has input_blocks\.1\.0\.strange\.weight, which is not in an SDXL unCLIP"
    ):
        convert_unclip(tmp_path / "more.ckpt", tmp_path / "a", head_size=8)
    torch.save(
        {name: value for name, value in state.items() if "time_embed.2" not in name}, tmp_path / "less.ckpt"
    )
    with pytest.raises(DataError, match=r"does not hold the whole network: time_embedding\.linear_2"):
        convert_unclip(tmp_path / "less.ckpt", tmp_path / "a", head_size=8)
    with pytest.raises(DataError, match="cannot be divided into heads of 48 features"):
        convert_unclip(checkpoint, tmp_path / "a", head_size=48)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_torch_files_becomes_one_of_safetensors(tmp_path):
    folder = models.write_versatile(tmp_path / "vd")
    from safetensors.torch import load_file

    weights = folder / "text_unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    named = convert_folder(folder, tmp_path / "safe")
    assert named == ["text_unet/diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "safe" / "text_unet" / "config.json").is_file()
    with pytest.raises(ConfigError, match="exists already"):
        convert_folder(folder, tmp_path / "safe")
    with pytest.raises(DataError, match="holds no torch files"):
        convert_folder(tmp_path / "safe", tmp_path / "again")
    others = sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors"))
    assert others  # what is safetensors already goes along
    assert all((tmp_path / "safe" / path).read_bytes() == (folder / path).read_bytes() for path in others)
    torch.save({"step": 3}, folder / "vae" / "odd.bin")
    with pytest.raises(DataError, match="holds no tensors by name"):
        convert_folder(folder, tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safe", "vd"]  # nothing half done
    (folder / "vae" / "odd.bin").rename(folder / "vae" / "model-00001-of-00002.bin")
    with pytest.raises(DataError, match="one part of weights in several files"):
        convert_folder(folder, tmp_path / "half")
