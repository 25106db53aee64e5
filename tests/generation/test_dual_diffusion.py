"""Generators that are led by an image and a text at once, what saves memory, and what comes out broken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.generation import hub, versatile_diffusion
from braindecode_vis.generation.hub import CLIP_GREY, HubOptions, check_scheduler, choose_batch_size
from braindecode_vis.generation.hub_config import (
    SdAdapterConfig,
    VersatileDiffusionConfig,
)
from tests.constants import replace_constants
from tests.generation import hub_models as models

PLUS = "openclip/ViT-H-14/random-0/layer=-2/tokens/raw/x"
PROJECTED = "openclip/ViT-L-14-quickgelu/random-0/output/tokens-projected/class-unit/x"
COMMON = {"steps": 2, "image_size": 32, "device": "cpu", "batch_size": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    return {
        "sd_ip_adapter": models.write_sd(folder / "sd"),
        "versatile_diffusion": models.write_versatile(folder / "vd"),
    }


def make(kind, written, **changes):
    """Return settings and data of a generator; texts of Versatile Diffusion are shorter than 77, for speed."""
    if kind == "sd_ip_adapter":
        weights, adapter = written[kind]
        small = replace_constants(SdAdapterConfig, n_tokens=5)
        config = small(**({"weights": weights, "ip_adapter": adapter} | COMMON | changes))
        return config, models.make_dual_data(PLUS, "clip_text/x/random-0/hidden/y")
    small = replace_constants(VersatileDiffusionConfig, n_tokens=5, n_text_tokens=7)
    config = small(**({"weights": written[kind]} | COMMON | changes))
    return config, models.make_dual_data(PROJECTED, "clip_text/x/random-0/projected/y", n_text_tokens=7)


def pick(rows, n):
    return Embeddings(rows.vectors[:n], rows.ids[:n], rows.space)


KINDS = pytest.mark.parametrize("kind", ["sd_ip_adapter", "versatile_diffusion"])


@KINDS
def test_images_follow_both_conditions_and_the_start(kind, written):
    config, data = make(kind, written)
    generator = config.build(data)
    rows, texts = pick(data.embeddings, 3), pick(data.texts, 3)
    images = generator.generate(rows, seed=0, texts=texts).astype(int)
    assert images.shape == (3, 32, 32, 3)
    alone = make(kind, written, batch_size=1)[0].build(data)
    assert np.abs(alone.generate(rows, seed=0, texts=texts) - images).max() <= 1  # rounding
    other = Embeddings(texts.vectors[::-1].copy(), texts.ids, texts.space)
    by_text = np.abs(generator.generate(rows, seed=0, texts=other) - images)
    assert by_text[0].max() > 0
    assert by_text[1].max() <= 1  # its own text is the same
    swapped = Embeddings(rows.vectors[::-1].copy(), rows.ids, rows.space)
    assert np.abs(generator.generate(swapped, seed=0, texts=texts) - images)[0].max() > 0
    # Guidance led away from an empty text and an absent image, each encoded once for a call.
    assert data.text_encoder.seen[0] == ""
    absent = data.image_encoder.seen[0]
    assert (absent == (CLIP_GREY if kind == "sd_ip_adapter" else 0)).all()

    dark, bright = (np.full((1, 8, 8, 3), value, np.uint8) for value in (5, 250))
    one = {"texts": pick(texts, 1), "seed": 0}
    generator = make(kind, written, steps=4)[0].build(data)

    def difference(strength):
        made = [
            generator.generate(pick(rows, 1), initial=i, strength=strength, **one) for i in (dark, bright)
        ]
        return np.abs(made[1].astype(int) - made[0]).mean()

    assert difference(0.25) > difference(1.0)


def test_the_share_of_the_text_is_that_of_its_attention(written):
    """With no share the text says nothing, and with all of it the image nothing."""
    rows = {}
    for share in (0.0, 1.0):
        config, data = make("versatile_diffusion", written, text_share=share)
        data = data if share else replace(data, texts=None)
        changed = Embeddings(data.embeddings.vectors[1:2], ["i0"], data.embeddings.space)
        more = {"texts": pick(data.texts, 1)} if share else {}
        generator = config.build(data)
        rows[share] = [
            generator.generate(each, seed=0, **more) for each in (pick(data.embeddings, 1), changed)
        ]
    assert (rows[1.0][0] == rows[1.0][1]).all()
    assert (rows[0.0][0] != rows[0.0][1]).any()
    assert VersatileDiffusionConfig(text_share=0.4).needs_texts
    assert not VersatileDiffusionConfig(text_share=0).supports_texts


def test_weights_of_image_and_text_scale_their_attentions(written):
    config, data = make("sd_ip_adapter", written, text_scale=0.0)
    rows, texts = pick(data.embeddings, 1), pick(data.texts, 1)
    other = Embeddings(texts.vectors + 3, texts.ids, texts.space)
    generator = config.build(data)
    np.testing.assert_array_equal(
        generator.generate(rows, seed=0, texts=texts), generator.generate(rows, seed=0, texts=other)
    )
    off = make("sd_ip_adapter", written, scale=0.0)[0].build(data)
    moved = Embeddings(rows.vectors + 3, rows.ids, rows.space)
    np.testing.assert_array_equal(
        off.generate(rows, seed=0, texts=texts), off.generate(moved, seed=0, texts=texts)
    )


def test_tokens_of_an_empty_prompt_are_those_of_the_pipeline_itself(written):
    """A prompt that is encoded by the pipeline, and its tokens handed over, give the same image."""
    config, data = make("sd_ip_adapter", written)
    generator = config.build(data)
    pipeline = generator.load().pipeline
    with torch.no_grad():
        tokens, empty = (
            pipeline.encode_prompt(text, "cpu", 1, False)[0].numpy() for text in ("a b a", "")
        )  # fmt: skip
    rows = pick(data.embeddings, 1)
    data.text_encoder.encode_texts = lambda texts: empty
    given = generator.generate(rows, seed=0, texts=Embeddings(tokens, rows.ids, data.texts.space))
    np.testing.assert_array_equal(given, generator.generate(rows, seed=0, prompts=["a b a"]))


def test_an_adapter_of_one_embedding_is_taken_too(tmp_path):
    weights, adapter = models.write_sd(tmp_path, tokens=False)
    config = SdAdapterConfig(weights=weights, ip_adapter=adapter, **COMMON)
    data = models.make_data()
    assert config.build(data).generate(pick(data.embeddings, 1), seed=0).shape == (1, 32, 32, 3)


@KINDS
def test_texts_that_do_not_fit_are_refused(kind, written):
    config, data = make(kind, written)
    wrong = replace(data, texts=Embeddings(data.texts.vectors, data.texts.ids, "clip_text/x/pooled/y"))
    with pytest.raises(ConfigError, match="not tokens of 'clip_text/x/pooled/y'"):
        config.build(wrong)
    generator, rows = config.build(data), pick(data.embeddings, 2)
    short = Embeddings(data.texts.vectors[:2, :3], rows.ids, data.texts.space)
    with pytest.raises(ConfigError, match="takes tokens of shape"):
        generator.generate(rows, seed=0, texts=short)
    with pytest.raises(ConfigError, match="not for tokens of 'else'"):
        generator.generate(rows, seed=0, texts=Embeddings(data.texts.vectors[:2], rows.ids, "else"))
    if kind == "versatile_diffusion":
        with pytest.raises(ConfigError, match="needs tokens of a text, but got none"):
            generator.generate(rows, seed=0)


def test_versatile_diffusion_says_what_is_gone_or_missing(written, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="is missing the folder image_unet"):
        VersatileDiffusionConfig(weights=tmp_path, device="cpu").load()

    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(versatile_diffusion, "import_module", gone)
    with pytest.raises(
        ConfigError, match=r"no longer has Versatile Diffusion.*set generator.kind to sd_ip_adapter"
    ):
        make("versatile_diffusion", written)[0].load()


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("sd_ip_adapter", {"offload": "model"}),
        ("versatile_diffusion", {"offload": "model"}),
    ],
)  # fmt: skip
def test_what_saves_memory_changes_no_image(kind, option, written, monkeypatch):
    """Networks are moved to the processor itself, which stands for the GPU."""
    monkeypatch.setattr(hub, "check_offload", lambda offload, device: None)
    rows, images = None, []
    for changes in ({}, option):
        config, data = make(kind, written, **changes)
        rows, generator = pick(data.embeddings, 2), config.build(data)
        initial = np.full((2, 8, 8, 3), 90, np.uint8)
        for more in ({}, {"initial": initial, "strength": 0.5}, {}):
            images.append(generator.generate(rows, seed=0, texts=pick(data.texts, 2), **more).astype(int))
    for plain, saved in zip(images[:3], images[3:], strict=True):
        assert np.abs(plain - saved).max() <= 1
    fields = [make(kind, written, **changes)[0].hashed_fields() for changes in ({}, option)]
    assert fields[0] == fields[1]


@KINDS
def test_layers_are_moved_one_by_one_where_that_is_asked(kind, written, monkeypatch):
    """By diffusers' own call, which cannot run without a GPU; single networks by accelerate's."""
    import accelerate
    from diffusers import DiffusionPipeline

    moved = []
    monkeypatch.setattr(hub, "check_offload", lambda offload, device: None)
    monkeypatch.setattr(
        DiffusionPipeline,
        "enable_sequential_cpu_offload",
        lambda self, device: moved.append(type(self).__name__),
    )
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda network, device: moved.append(type(network).__name__)
    )
    make(kind, written, offload="sequential")[0].load()
    names = {
        "sd_ip_adapter": "StableDiffusionPipeline",
        "versatile_diffusion": "VersatileDiffusionDualGuidedPipeline",
    }
    assert moved == [names[kind]]
    hub.place(torch.nn.Linear(1, 1), HubOptions(2, 1.0, 32, "cpu", offload="sequential"))
    assert moved[1:] == ["Linear"]


def test_offload_without_a_gpu_is_one_sentence(written):
    config = make("sd_ip_adapter", written, offload="model")[0]
    with pytest.raises(ConfigError, match=r"generator\.offload is model, .* there is no GPU here"):
        config.check_files()


def test_batches_shrink_until_they_fit(written, monkeypatch):
    config, data = make("versatile_diffusion", written, batch_size="auto")
    generator, rows = config.build(data), pick(data.embeddings, 5)
    whole = generator.generate(rows, seed=0, texts=pick(data.texts, 5)).astype(int)
    pipeline, sizes = generator.load(), []
    draw = pipeline.draw

    def run_out(batch):
        sizes.append(len(batch.conditions))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(batch)

    monkeypatch.setattr(pipeline, "draw", run_out)
    limit = 2
    again = generator.generate(rows, seed=0, texts=pick(data.texts, 5))
    assert np.abs(again - whole).max() <= 1
    assert sizes[-3:] == [2, 2, 1]
    limit = 0
    with pytest.raises(ConfigError, match=r"1 image\(s\) of the generator .* set generator\.batch_size"):
        generator.generate(rows, seed=0, texts=pick(data.texts, 5))
    assert 1 <= choose_batch_size(pipeline, HubOptions(2, 1.0, 512, "cpu")) <= 16
    monkeypatch.setattr(hub, "find_memory", lambda: None)
    assert choose_batch_size(pipeline, HubOptions(2, 1.0, 512, "cpu")) == 1


# --- what comes out broken --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "is not finite: its latents overflowed in float32"), (0, "black")]
)
def test_a_broken_image_is_named_with_its_trial(written, monkeypatch, value, words):
    config, data = make("versatile_diffusion", written)
    generator = config.build(data)
    images = np.full((2, 32, 32, 3), 0.5)
    images[1] = value

    monkeypatch.setattr(generator.load(), "draw", lambda batch: images[: len(batch.conditions)])
    with pytest.raises(DataError, match=rf"row 1 \(i1\).*{words}|{words}.* of row 1 \(i1\)"):
        generator.generate(pick(data.embeddings, 3), seed=0, texts=pick(data.texts, 3))


def test_a_scheduler_that_lacks_a_method_is_named(tmp_path):
    folder = models.write_token_unclip(tmp_path)
    about = folder / "scheduler" / "scheduler_config.json"
    about.write_text(json.dumps({"_class_name": "VQDiffusionScheduler", "num_vec_classes": 8}))
    with pytest.raises(
        DataError, match="VQDiffusionScheduler has no scale_model_input, which denoising needs"
    ):
        hub.read_scheduler(folder)
    with pytest.raises(DataError, match="has no add_noise, which a start"):
        check_scheduler(object(), ("add_noise",), "a start from an image")


def test_missing_weights_are_named_with_their_size():
    with pytest.raises(
        ConfigError, match=r"stable-diffusion-v1-5 \(.* GB; braindecode-vis weights fetch sd15\)"
    ):
        SdAdapterConfig().find_folder()
    with pytest.raises(ConfigError, match=r"ip-adapter-plus_sd15\.safetensors"):
        SdAdapterConfig().find_adapter()
