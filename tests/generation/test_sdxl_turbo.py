import json
import shutil

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import ImageGenerator
from braindecode_vis.embeddings.transformers_models import TransformersConfig
from braindecode_vis.generation.adapters import AdapterConfig, fit_adapter
from braindecode_vis.generation.hub_config import (
    SdAdapterConfig,
    SdxlTurboConfig,
    check_pipeline,
    digest_folder,
)
from tests.generation import hub_models as models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return models.write_sdxl(tmp_path_factory.mktemp("sdxl"))


def make_config(folders, **changes):
    weights, adapter = folders
    return SdxlTurboConfig(weights=weights, ip_adapter=adapter, image_size=32, device="cpu", **changes)


@pytest.fixture(scope="module")
def generator(folders):
    return make_config(folders, batch_size=3).build(models.make_data())


def pick(data, n):
    rows = data.embeddings
    return Embeddings(rows.vectors[:n], rows.ids[:n], rows.space)


def test_a_saved_folder_makes_images_that_follow_embedding_and_seed(generator):
    rows = pick(models.make_data(), 2)
    assert isinstance(generator, ImageGenerator)
    images = generator.generate(rows, seed=0)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, generator.generate(rows, seed=0))
    assert np.abs(images.astype(int) - generator.generate(rows, seed=1)).max() > 5
    swapped = Embeddings(rows.vectors[::-1].copy(), rows.ids, rows.space)
    assert (
        np.abs(images.astype(int) - generator.generate(swapped, seed=0)).max() > 0
    )  # same noise, other brain


def test_batches_change_nothing(folders, generator):
    """Each row of a batch must meet its own embedding and its own noise; diffusers alone mixes them up."""
    rows = pick(models.make_data(), 4)
    alone = make_config(folders, batch_size=1).build(models.make_data()).generate(rows, seed=0)
    together = generator.generate(rows, seed=0)
    # Convolutions of other batch sizes round differently: one grey value.
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_scale_zero_ignores_the_embedding(folders):
    data = models.make_data()
    off = make_config(folders, scale=0.0).build(data)
    rows = pick(data, 1)
    other = Embeddings(rows.vectors + 5, rows.ids, rows.space)
    np.testing.assert_array_equal(off.generate(rows, seed=0), off.generate(other, seed=0))


def test_guidance_runs_with_an_absent_image(folders, generator):
    rows = pick(models.make_data(), 2)
    guided = make_config(folders, guidance=3.0).build(models.make_data()).generate(rows, seed=0)
    assert guided.shape == (2, 32, 32, 3)
    assert np.abs(guided.astype(int) - generator.generate(rows, seed=0)).max() > 0


def test_a_prompt_leads_the_image_too(folders, generator):
    rows = pick(models.make_data(), 1)
    led = make_config(folders, prompt="a b a b").build(models.make_data()).generate(rows, seed=0)
    assert np.abs(led.astype(int) - generator.generate(rows, seed=0)).max() > 0
    named = make_config(folders, condition_spaces=("imported/*",))
    assert named.build(models.make_data(space="imported/mine")).accepts("imported/mine")
    with pytest.raises(ConfigError, match="is conditioned on imported"):
        named.build(models.make_data())


def test_every_row_has_its_own_prompt_or_a_sentence_says_why_not(folders, generator):
    rows = pick(models.make_data(), 2)
    plain = generator.generate(rows, seed=0).astype(int)
    led = generator.generate(rows, seed=0, prompts=["", "a b a b"])
    assert np.abs(led[0] - plain[0]).max() <= 1  # the text of its neighbour does not reach it
    assert np.abs(led[1] - plain[1]).max() > 1
    with pytest.raises(DataError, match="2 embeddings came with 1 prompts"):
        generator.generate(rows, seed=0, prompts=["a"])
    with pytest.raises(DataError, match=r"the prompt of row 1 \(i1\) has \d+ word pieces.* reads only 77"):
        generator.generate(rows, seed=0, prompts=["", "a b " * 80])
    fixed = make_config(folders, prompt="a").build(models.make_data())
    with pytest.raises(ConfigError, match="every trial has its own prompt"):
        fixed.generate(rows, seed=0, prompts=["a", "b"])
    with pytest.raises(DataError, match=r"generator\.prompt has \d+ word pieces"):
        make_config(folders, prompt="a b " * 80).build(models.make_data()).generate(rows, seed=0)


def test_an_initial_image_is_kept_the_more_the_lower_the_strength(generator):
    rows = pick(models.make_data(), 2)
    dark, bright = (np.full((2, 9, 9, 3), value, np.uint8) for value in (10, 245))

    def difference(strength):
        made = [generator.generate(rows, seed=0, initial=i, strength=strength) for i in (dark, bright)]
        return np.abs(made[1].astype(int) - made[0]).mean()

    assert difference(0.25) > difference(1.0) * 1.5
    assert generator.generate(rows, seed=0, initial=dark).shape == (2, 32, 32, 3)
    with pytest.raises(ConfigError, match="leaves no step to run"):
        generator.generate(rows, seed=0, initial=dark, strength=0.1)
    with pytest.raises(DataError, match="2 embeddings came with 1 initial"):
        generator.generate(rows, seed=0, initial=dark[:1])


def test_the_wrong_space_or_size_is_refused(folders, generator):
    data = models.make_data()
    with pytest.raises(ConfigError, match="not 'clip'"):
        generator.generate(Embeddings(data.embeddings.vectors, data.embeddings.ids, "clip"), seed=0)
    with pytest.raises(ConfigError, match=r"is conditioned on openclip/ViT-H-14.*, not on 'timm/dino'"):
        make_config(folders).build(models.make_data(space="timm/dino"))
    unit = "openclip/ViT-H-14/random-0/output/own/unit/x"  # the adapter wants the raw length
    with pytest.raises(ConfigError, match="own/raw"):
        make_config(folders).build(models.make_data(space=unit))
    wide = models.make_data(shape=(48,))
    with pytest.raises(ConfigError, match=r"rows of shape \(32,\), but .* has \(48,\)"):
        make_config(folders).build(wide).generate(wide.embeddings, seed=0)


def test_without_weights_one_sentence_says_which_folder(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"no weights: set generator.weights to .*stabilityai/sdxl-turbo"):
        SdxlTurboConfig().find_folder()
    with pytest.raises(ConfigError, match=r"no IP-Adapter: set generator.ip_adapter to .*vit-h.safetensors"):
        SdxlTurboConfig(weights=folders[0]).find_adapter()
    with pytest.raises(ConfigError, match="does not exist"):
        SdxlTurboConfig(weights=tmp_path / "nowhere").find_folder()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as StableDiffusionXLPipeline"):
        make_config((tmp_path / "empty", folders[1])).load()


def test_a_pipeline_of_which_a_shard_is_missing_is_not_taken_from_the_cache(folders, tmp_path, monkeypatch):
    """Any safetensors file of a part passed for all of its weights, so that a broken download was read, and failed."""
    folder = shutil.copytree(folders[0], tmp_path / "cached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: str(folder))
    assert SdxlTurboConfig().find_folder() == folder
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    listed = {"weight_map": dict(zip(("a", "b"), shards, strict=True))}
    weights.rename(weights.with_name(shards[0]))
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listed))
    # An index of pickles, which are never fetched, asks for nothing.
    weights.with_name("diffusion_pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin"}}')
    with pytest.raises(DataError, match=f"is missing unet/{shards[1]}"):
        check_pipeline(folder)
    with pytest.raises(ConfigError, match=r"no weights: set generator.weights .*--allow-download"):
        SdxlTurboConfig().find_folder()
    weights.with_name(shards[1]).write_bytes(b"")
    assert SdxlTurboConfig().find_folder() == folder
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ConfigError, match="no weights"):
        SdxlTurboConfig().find_folder()


def test_what_is_not_fetched_is_not_missed(tmp_path, monkeypatch):
    """Stable Diffusion 1.5 lists a safety checker, which is not fetched: the fetched folder passed for a broken one."""
    kinds = ("UNet2DConditionModel", "StableDiffusionSafetyChecker")
    parts = {"unet": ["diffusers", kinds[0]], "safety_checker": ["stable_diffusion", kinds[1]]}
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: str(tmp_path))
    assert SdAdapterConfig().find_folder() == tmp_path
    with pytest.raises(DataError, match="is missing safety_checker"):
        check_pipeline(tmp_path)


def test_a_folder_in_half_precision_alone_is_read(folders, generator, tmp_path):
    """As it is fetched; diffusers looked for files of the plain names, and said that there were none."""
    folder = shutil.copytree(folders[0], tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    check_pipeline(folder)
    rows = pick(models.make_data(), 1)
    half = make_config((folder, folders[1])).build(models.make_data())
    np.testing.assert_array_equal(half.generate(rows, seed=0), generator.generate(rows, seed=0))


def test_the_fingerprint_follows_the_weights_and_not_their_place(folders, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(folders[1].read_bytes())
    fields = make_config(folders).hashed_fields()
    moved = make_config((folders[0], copy)).hashed_fields()
    assert {"weights_digest", "ip_adapter_digest"} <= set(fields)
    assert not {"weights", "ip_adapter", "device", "batch_size"} & set(fields)
    assert fields["weights_digest"] == moved["weights_digest"]
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x7f")
    assert digest_folder(copy) != digest_folder(folders[1])


def test_another_target_goes_through_a_ridge_adapter(folders):
    """A space the adapter never saw: images are embedded with the generator's encoder, and a map is fitted."""
    encoder = TransformersConfig(
        weights="random", architecture="clip", device="cpu",
        model_args={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "image_size": 32, "patch_size": 16, "projection_dim": models.SIZE},
    )  # fmt: skip
    data = models.make_data(30, shape=(20,), space="timm/dino/raw")
    generator = make_config(folders, adapter=AdapterConfig(encoder=encoder)).build(data)
    assert generator.accepts("timm/dino/raw")
    images = generator.generate(pick(data, 2), seed=0)
    assert images.shape == (2, 32, 32, 3)
    assert generator.describe()["adapter"]["explained_left_out"] < 1
    assert make_config(folders, adapter=AdapterConfig(encoder=encoder)).accepts("timm")
    assert not make_config(folders).accepts("timm")


def test_the_adapter_is_ridge_with_the_penalty_of_least_left_out_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 6)) + 2
    y = x @ rng.normal(size=(6, 4)) + 1.5 * rng.normal(size=(25, 4))
    ids = [f"i{k}" for k in range(25)]
    alphas = (0.01, 0.3, 3.0, 100.0)
    adapter = fit_adapter(Embeddings(x, ids, "a"), Embeddings(y, ids, "b"), alphas=alphas)

    def solve(rows, values, penalty):
        return np.linalg.solve(rows.T @ rows + penalty * np.eye(6), rows.T @ values)

    xc, yc = x - x.mean(0), y - y.mean(0)
    unit = (np.linalg.svd(xc, compute_uv=False) ** 2).mean()
    errors = []
    for alpha in alphas:
        left_out = [
            yc[k] - xc[k] @ solve(np.delete(xc, k, 0), np.delete(yc, k, 0), alpha * unit) for k in range(25)
        ]
        errors.append((np.array(left_out) ** 2).sum())
    best = int(np.argmin(errors))
    assert adapter.alpha == alphas[best]
    assert adapter.explained == pytest.approx(1 - errors[best] / (yc**2).sum(), rel=1e-5)
    np.testing.assert_allclose(adapter.weights, solve(xc, yc, alphas[best] * unit), rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match="not 'c'"):
        adapter.apply(Embeddings(x, ids, "c"))


@pytest.mark.parametrize("name", ["sdxl/text_encoder/model.safetensors", "adapter.safetensors"])
def test_files_that_are_cut_short_are_one_sentence(tmp_path, name):
    copy = models.write_sdxl(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:500])
    data = models.make_data()
    with pytest.raises(DataError, match=r"cannot be read as|is no IP-Adapter for"):
        make_config(copy).build(data).generate(pick(data, 1), seed=0)
