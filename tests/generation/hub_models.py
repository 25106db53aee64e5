"""Tiny untrained networks of the very classes that the published generators have, written as folders."""

import json
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import save_file

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.generation.generator_data import GeneratorData

SIZE = 32  # of every condition


def make_data(n=12, *, shape=(SIZE,), space="openclip/ViT-H-14/random-0/output/own/raw/x", encoder=None):
    """Random images, and embeddings that are a linear function of their colours."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(n, 4, 4, 3)).astype(np.uint8)
    colours = pixels.reshape(n, -1).astype(np.float32) / 255
    vectors = (colours @ rng.normal(size=(48, int(np.prod(shape))))).reshape(n, *shape).astype(np.float32)
    ids = [f"i{k}" for k in range(n)]
    return GeneratorData(
        encoder, Embeddings(vectors, ids, space), StimulusSet.from_pixels(pixels, ids, ["c"] * len(ids))
    )


def write_tokenizer(folder):
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    vocab = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def make_text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=32, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=1, vocab_size=6, projection_dim=32, hidden_act="gelu",
    )  # fmt: skip


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def write_sdxl(folder):
    """SDXL's networks, and an IP-Adapter for them that takes embeddings of `SIZE` values."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80, cross_attention_dim=64,
        )  # fmt: skip
        tokenizer = write_tokenizer(folder / "words")
        pipeline = StableDiffusionXLPipeline(
            unet=unet, vae=make_vae(), tokenizer=tokenizer, tokenizer_2=tokenizer,
            text_encoder=CLIPTextModel(make_text_config()),
            text_encoder_2=CLIPTextModelWithProjection(make_text_config()),
            scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
        )  # fmt: skip
        pipeline.save_pretrained(folder / "sdxl")
        save_file(make_ip_adapter(unet), folder / "adapter.safetensors")
    return folder / "sdxl", folder / "adapter.safetensors"


def make_ip_adapter(unet, *, n_tokens=4):
    """Return the tensors of an IP-Adapter in the published layout: a projection, and keys and values by layer."""
    width = unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": torch.randn(n_tokens * width, SIZE) * 0.3,
        "image_proj.proj.bias": torch.zeros(n_tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for number, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn1.processor"):
            continue
        assert processor is not None
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for part in "kv":
            inner = layer.to_k.out_features
            state[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(inner, width) * 0.3
    return state


def write_sd(folder, *, tokens=True):
    """Stable Diffusion 1's networks, and an IP-Adapter of tokens or of one embedding."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, cross_attention_dim=SIZE,
        )  # fmt: skip
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        )
        StableDiffusionPipeline(
            unet=unet, vae=make_vae(), tokenizer=write_tokenizer(folder / "words"),
            text_encoder=CLIPTextModel(make_text_config()), scheduler=scheduler, safety_checker=None,
            feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        ).save_pretrained(folder / "sd")  # fmt: skip
        state = make_token_projection() if tokens else {
            "image_proj.proj.weight": torch.randn(4 * SIZE, SIZE) * 0.2, "image_proj.proj.bias": torch.zeros(4 * SIZE),
            "image_proj.norm.weight": torch.ones(SIZE), "image_proj.norm.bias": torch.zeros(SIZE),
        }  # fmt: skip
        names = [name for name in unet.attn_processors if "attn2" in name]
        for place, name in enumerate(names):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for part in ("k", "v"):
                state[f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight"] = torch.randn(width, SIZE) * 0.3
    save_file(state, folder / "adapter.safetensors")
    return folder / "sd", folder / "adapter.safetensors"


def make_token_projection():
    """The resampler of ip-adapter-plus under the names of its authors: 4 queries, 4 layers, two heads of 64."""
    state = {"latents": torch.randn(1, 4, SIZE)}
    for name in ("proj_in", "proj_out"):
        state |= {f"{name}.weight": torch.randn(SIZE, SIZE) * 0.2, f"{name}.bias": torch.zeros(SIZE)}
    shapes = {
        "0.to_q": (128, SIZE), "0.to_kv": (256, SIZE), "0.to_out": (SIZE, 128), "1.1": (4 * SIZE, SIZE),
        "1.3": (SIZE, 4 * SIZE),
    }  # fmt: skip
    for layer in range(4):
        state |= {f"layers.{layer}.{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    norms = ["norm_out", *(f"layers.{n}.{name}" for n in range(4) for name in ("0.norm1", "0.norm2", "1.0"))]
    for name in norms:
        state |= {f"{name}.weight": torch.ones(SIZE), f"{name}.bias": torch.zeros(SIZE)}
    return {f"image_proj.{name}": value for name, value in state.items()}


def write_versatile(folder):
    """Versatile Diffusion's two networks, as its repository keeps them, without what encodes pictures and texts."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from braindecode_vis.generation.versatile_diffusion import find_classes

    same = {
        "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16,
        "norm_num_groups": 4, "cross_attention_dim": SIZE, "attention_head_dim": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **same,
        ).save_pretrained(folder / "image_unet")  # fmt: skip
        find_classes()[1](
            down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
            up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"), **same,
        ).save_pretrained(folder / "text_unet")  # fmt: skip
        make_vae().save_pretrained(folder / "vae")
        DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        ).save_pretrained(folder / "scheduler")  # fmt: skip
    return folder


class EmptyText:
    """Stands for the encoder of texts: says what it was asked to read."""

    def __init__(self, n_tokens=77):
        self.seen, self.n_tokens = [], n_tokens

    def encode_texts(self, texts):
        self.seen += list(texts)
        return np.zeros((len(texts), self.n_tokens, SIZE), np.float32)


class GreyEncoder:
    """Stands for the condition's encoder: says what it was asked to embed."""

    def __init__(self, shape=(SIZE,)):
        self.seen, self.shape = [], shape

    def encode(self, images):
        self.seen += list(images)
        return np.zeros((len(images), *self.shape), np.float32)


def make_dual_data(space, text_space, *, n_tokens=5, n_text_tokens=77):
    """Tokens of images and of texts, and stand-ins for what encodes them."""
    data = make_data(shape=(n_tokens, SIZE), space=space, encoder=GreyEncoder((n_tokens, SIZE)))
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(len(data.embeddings), n_text_tokens, SIZE)).astype(np.float32)
    texts = Embeddings(tokens, data.embeddings.ids, text_space)
    return replace(data, text_encoder=EmptyText(n_text_tokens), texts=texts)


def write_token_unclip(folder, *, told=True, room=4):
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    extra = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": room * 8,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
            use_linear_projection=True, cross_attention_dim=SIZE, **(extra if told else {}),
        ).save_pretrained(folder / "unet")  # fmt: skip
        make_vae().save_pretrained(folder / "vae")
        EulerDiscreteScheduler(timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return folder
