import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.generation.token_unclip import TokenUnclipConfig
from tests.constants import replace_constants
from tests.generation import hub_models as models

TOKENS = "openclip/ViT-bigG-14/random-0/output/patches/raw/x"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return models.write_token_unclip(tmp_path_factory.mktemp("generators") / "tokens")


def make(written, **changes):
    common = {"weights": written, "device": "cpu", "steps": 2, "batch_size": 2, "image_size": 32} | changes
    config = replace_constants(TokenUnclipConfig, n_tokens=5)(**common)
    return config, models.make_data(shape=(5, models.SIZE), space=TOKENS)


def test_a_saved_folder_makes_images_that_follow_embedding_and_seed(written):
    config, data = make(written)
    generator = config.build(data)
    rows = Embeddings(data.embeddings.vectors[:3], data.embeddings.ids[:3], data.embeddings.space)
    images = generator.generate(rows, seed=0)
    assert images.shape == (3, config.image_size, config.image_size, 3)
    np.testing.assert_array_equal(images, generator.generate(rows, seed=0))
    assert np.abs(images.astype(int) - generator.generate(rows, seed=1)).max() > 5
    swapped = Embeddings(rows.vectors[::-1].copy(), rows.ids, rows.space)
    assert np.abs(images.astype(int) - generator.generate(swapped, seed=0)).max() > 0
    alone = make(written, batch_size=1)[0].build(data).generate(rows, seed=0)
    assert np.abs(alone.astype(int) - images).max() <= 1  # rounding


def test_without_guidance_the_plain_prediction_is_used(written):
    config, data = make(written, guidance=1.0)
    rows = Embeddings(data.embeddings.vectors[:2], data.embeddings.ids[:2], data.embeddings.space)
    plain = config.build(data).generate(rows, seed=0)
    guided = make(written)[0].build(data).generate(rows, seed=0)
    assert plain.shape == guided.shape
    assert np.abs(plain.astype(int) - guided).max() > 0


def test_an_initial_image_leaves_its_brightness(written):
    config, data = make(written, steps=4)
    generator = config.build(data)
    rows = Embeddings(data.embeddings.vectors[:1], data.embeddings.ids[:1], data.embeddings.space)
    start = [np.full((1, 8, 8, 3), value, np.uint8) for value in (5, 250)]

    def difference(strength):
        made = [generator.generate(rows, seed=0, initial=i, strength=strength) for i in start]
        return np.abs(made[1].astype(int) - made[0]).mean()

    assert difference(0.25) > difference(1.0)


def test_a_generator_without_a_text_encoder_refuses_prompts(written):
    config, data = make(written)
    with pytest.raises(ConfigError, match="'token_unclip' reads no text"):
        config.build(data).generate(data.embeddings, seed=0, prompts=["a"] * len(data.embeddings))


@pytest.mark.parametrize(("name", "value"), [("OFFSET_NOISE", 1.0), ("ORIGINAL_SIZE", 64)])
def test_the_shift_of_the_noise_and_the_size_that_is_named_reach_the_image(name, value, written, monkeypatch):
    config, data = make(written)
    rows = Embeddings(data.embeddings.vectors[:1], ["i0"], data.embeddings.space)
    base = config.build(data).generate(rows, seed=0).astype(int)
    monkeypatch.setattr(f"braindecode_vis.generation.token_unclip.{name}", value)
    assert np.abs(base - config.build(data).generate(rows, seed=0)).max() > 0


def test_the_layout_of_a_token_unclip_is_checked(written, tmp_path):
    with pytest.raises(DataError, match="is missing the folder unet"):
        TokenUnclipConfig(weights=tmp_path, device="cpu").load()
    models.write_token_unclip(tmp_path, room=10)  # as SDXL itself, whose text is pooled
    with pytest.raises(DataError, match="room for 10 numbers instead of 4"):
        TokenUnclipConfig(weights=tmp_path, device="cpu").load()
    _, data = make(written)
    config = replace_constants(TokenUnclipConfig, n_tokens=6)(weights=written, device="cpu")
    with pytest.raises(ConfigError, match=r"rows of shape \(6, 32\), but .* has \(5, 32\)"):
        config.build(data).generate(data.embeddings, seed=0)


def test_a_token_unclip_that_is_told_no_size(tmp_path):
    config, data = make(models.write_token_unclip(tmp_path, told=False))
    rows = Embeddings(data.embeddings.vectors[:1], ["i0"], data.embeddings.space)
    assert config.build(data).generate(rows, seed=0).shape == (1, 32, 32, 3)


def test_it_says_what_to_bring(written):
    with pytest.raises(
        ConfigError, match=r"generator token_unclip has no weights: set generator\.weights to"
    ):
        TokenUnclipConfig(allow_download=True).find_folder()
    with pytest.raises(ConfigError, match="is conditioned on"):
        make(written)[0].build(models.make_data(shape=(5, models.SIZE), space="timm/dino"))


def test_a_space_that_is_named_is_taken_as_it_is(written):
    """Such as vectors that were computed elsewhere with the very network of the condition."""
    data = models.make_data(shape=(5, models.SIZE), space="imported/mine")
    with pytest.raises(
        ConfigError, match=r"not on 'imported/mine'.* name the space in generator\.condition_spaces"
    ):
        make(written)[0].build(data)
    generator = make(written, condition_spaces=("other", "imported/*"))[0].build(data)
    rows = Embeddings(data.embeddings.vectors[:1], ["i0"], data.embeddings.space)
    assert generator.accepts("imported/mine")
    assert len(generator.generate(rows, seed=0)) == 1


def test_a_damaged_scheduler_is_one_sentence(tmp_path):
    folder = models.write_token_unclip(tmp_path)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class')
    config, data = make(folder)
    with pytest.raises(DataError, match="does not describe a scheduler"):
        config.build(data).generate(data.embeddings, seed=0)


def test_a_second_pass_follows_the_text_of_each_trial(written, tmp_path):
    """MindEye2's end: SDXL goes on from the images, led by the caption that was decoded for each."""
    from diffusers import StableDiffusionXLPipeline

    sdxl = models.write_sdxl(tmp_path)[0]
    assert StableDiffusionXLPipeline.__name__ in (sdxl / "model_index.json").read_text()
    refine = {"weights": sdxl, "steps": 4}
    config, data = make(written, refine=refine)
    plain = make(written)[0]
    assert config.supports_prompts
    assert not plain.supports_prompts
    assert "refine" not in plain.hashed_fields()
    assert config.describe_choices() == ["images refined by SDXL, 2 of 4 steps at guidance 5"]
    rows = Embeddings(data.embeddings.vectors[:2], data.embeddings.ids[:2], data.embeddings.space)
    generator = config.build(data)
    first = generator.generate(rows, seed=0, prompts=["a", "a"]).astype(int)
    led = generator.generate(rows, seed=0, prompts=["a", "a b b b"])
    assert np.abs(led[0] - first[0]).max() <= 1
    assert np.abs(led[1] - first[1]).max() > 0
    assert np.abs(plain.build(data).generate(rows, seed=0) - first).max() > 1
    alone = make(written, refine=refine, batch_size=1)[0].build(data)
    assert np.abs(alone.generate(rows, seed=0, prompts=["a", "a"]) - first).max() <= 1
    with pytest.raises(DataError, match=r"the prompt of row 0 \(i0\) has \d+ word pieces"):
        generator.generate(rows, seed=0, prompts=["a b " * 80, ""])
    with pytest.raises(ConfigError, match=r"should read .*nowhere, which does not exist"):
        make(written, refine={"weights": tmp_path / "nowhere"})[0].refine.check_files()
    with pytest.raises(ConfigError, match=r"set generator\.refine\.weights to a folder"):
        make(written, refine={})[0].hashed_fields()
