"""Tiny untrained networks of the very classes that the published generators have, written as folders."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from braindecode_vis.arrays import Embeddings
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.stimuli import StimulusSet

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


def write_unclip(folder):
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16),
            attention_head_dim=(2, 4), class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * SIZE, cross_attention_dim=32, layers_per_block=1,
            use_linear_projection=True,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=8, projection_dim=SIZE, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            intermediate_size=8, patch_size=8,
        )  # fmt: skip
        StableUnCLIPImg2ImgPipeline(
            feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
            image_encoder=CLIPVisionModelWithProjection(vision),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=SIZE),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=write_tokenizer(folder / "words"), text_encoder=CLIPTextModel(make_text_config()), unet=unet,
            scheduler=DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1),
            vae=make_vae(),
        ).save_pretrained(folder / "unclip")  # fmt: skip
    return folder / "unclip"


def write_kandinsky(folder):
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=8, addition_embed_type="image", block_out_channels=(32, 64),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1, encoder_hid_dim=SIZE,
            encoder_hid_dim_type="image_proj", cross_attention_dim=32, attention_head_dim=4,
            resnet_time_scale_shift="scale_shift", class_embed_type=None,
        )  # fmt: skip
        movq = VQModel(
            block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
            up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], vq_embed_dim=4,
        )  # fmt: skip
        scheduler = DDPMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range"
        )
        KandinskyV22Pipeline(unet=unet, movq=movq, scheduler=scheduler).save_pretrained(folder / "kandinsky")
    return folder / "kandinsky"


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
