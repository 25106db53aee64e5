"""The branches of a run: their own fits over the same trials, known to fingerprints, report and audit."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.config import check_files, read_config
from braindecode_vis.generation.hub_config import VersatileDiffusionConfig
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline import decoding
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.metrics.image import compute_image_metric
from tests.generation.hub_models import write_versatile
from tests.parts.audit.test_results import QUICK

TARGET = "{kind: taesd, weights: random, image_size: 32, device: cpu}"
LOW = f"reconstruction.low_level={{target: {TARGET}}}"


def make_run(folder, *overrides):
    return open_run(read_config("synthetic_digits", [*QUICK, *overrides]), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("low") / "run"
    pipeline.run_all(make_run(folder, LOW))
    return folder


def list_artifacts(folder, stage):
    return sorted(path for path in (folder / "stages" / stage).iterdir())


def find_low_fit(folder):
    (made,) = list_artifacts(folder, "reconstruct")
    name = store.read_json(made / store.PROVENANCE)["upstream"]["low_level0"]
    (path,) = [path for path in list_artifacts(folder, "train") if path.name.endswith(name)]
    return path


def test_the_branch_leaves_the_configuration_of_the_run_alone(finished):
    """The branch once prepared the data again as a run of its own, and its settings stood in config.yaml."""
    config = read_config(str(finished / "config.yaml"))
    assert config.target.kind == "pixels"
    assert config.reconstruction.low_level.target.kind == "taesd"


def test_reconstructions_name_the_fits_of_the_branch(finished):
    record = store.read_json(find_low_fit(finished) / store.PROVENANCE)
    assert record["upstream"]["embed"] in {path.name for path in list_artifacts(finished, "embed")}
    assert len(list_artifacts(finished, "retrieve")) == 1  # the branch ranks nothing
    stages = store.read_json(finished / "provenance.json")["stages"]
    assert stages["low-level train fold00"]["fingerprint"] == record["fingerprint"]
    assert "low-level embed" in stages
    page = (finished / "report.html").read_text()
    assert "ridge to taesd/sd/random-0" in page
    assert "0.75 of the high-level image" in page


@pytest.mark.parametrize("generator", ["own", pytest.param("nearest", marks=pytest.mark.further)])
def test_principal_components_are_latents_that_need_no_weights(generator, tmp_path):
    """A copied training image can be blended too; there was no place for its images."""
    low = "reconstruction.low_level={target: {kind: pca, n_components: 12}}"
    more = [] if generator == "own" else ["generator.kind=nearest"]
    run = make_run(tmp_path / "run", low, "evaluation.n_bootstrap=100", *more)
    with pytest.warns(
        Notice, match="stand-ins: low level by pca in place of latents of a published autoencoder"
    ):
        rows = pipeline.run_all(run)
    assert {"low_level", "high_level", "decoded"} <= {row["method"] for row in rows}
    assert "ridge to pca" in (tmp_path / "run" / "report.html").read_text()
    assert not audit_run(tmp_path / "run").leaks


def test_rows_of_the_branch_are_those_of_the_encoder(finished, monkeypatch):
    """An encoder with a gallery per subject has its rows sorted by subject; the branch must follow it, not its own."""
    run = make_run(finished, LOW)

    def draw():
        drawn = decoding.make_low_level(run, 0)
        return drawn.make(range(drawn.n_images))["low_level"]

    plain = draw()
    reverse = lambda encoder, trials: trials.select(np.arange(trials.n_trials)[::-1])  # noqa: E731
    monkeypatch.setattr(decoding, "order_by_gallery", reverse)
    assert (draw()[::-1] == plain).all()


def test_the_audit_judges_the_branch_too(finished):
    audit = audit_run(finished, refit=True)
    assert not audit.leaks
    assert "low-level" in {item.check for item in audit.list_level("ok")}
    assert any("target mean is that" in item.message for item in audit.list_level("ok"))


def test_the_audit_finds_latents_of_test_images_in_the_branch(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    fit = find_low_fit(folder)
    bank = store.read_embeddings(
        folder / "stages" / "embed" / store.read_json(fit / store.PROVENANCE)["upstream"]["embed"]
    )
    tensors = load_file(fit / "ridge.safetensors")
    tensors["target_mean"] = bank.flat().mean(axis=0)
    save_file(tensors, fit / "ridge.safetensors")
    record = store.read_json(fit / store.PROVENANCE)
    record["files"] = store.describe_files(fit)
    store.write_provenance(fit / store.PROVENANCE, record)
    leaks = audit_run(folder).leaks
    assert {leak.check for leak in leaks} == {"target-means", "fits"}
    (leak,) = [leak for leak in leaks if leak.where == "low-level branch fold 0"]
    assert leak.check == "target-means"
    assert "but that of training and test images" in leak.message
    (fit / "ridge.safetensors").write_bytes((fit / "ridge.safetensors").read_bytes()[:3000])
    assert any("weights cannot be read" in leak.message for leak in audit_run(folder).leaks)
    shutil.rmtree(fit)
    assert any("train fold00" in leak.message for leak in audit_run(folder).leaks)


def test_weights_that_are_cut_short_are_found_before_anything_is_trained(tmp_path):
    """They were found when the first image was decoded, after the encoder had been trained for hours."""
    (tmp_path / "taesd_encoder.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "taesd_decoder.safetensors").write_bytes(b"")
    low = f"reconstruction.low_level={{target: {{kind: taesd, weights: {tmp_path}}}}}"
    config = read_config("synthetic_digits", [low])
    with pytest.raises(DataError, match=r"taesd_encoder\.safetensors is no intact safetensors file"):
        check_files(config)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    with pytest.raises(DataError, match="is missing a half of the tiny autoencoder"):
        check_files(config)
    missing = read_config("synthetic_digits", ["reconstruction.low_level={target: {kind: taesd}}"])
    with pytest.raises(ConfigError, match=r"reconstruction\.low_level\.target\.weights needs taesd"):
        check_files(missing)


def test_a_branch_of_other_sizes_is_judged(tmp_path):
    """The audit read the target's settings without the word random, which sizes need, and ended in a traceback."""
    sizes = "{block_out_channels: [8, 8, 8, 8], layers_per_block: 1, norm_num_groups: 4}"
    target = f"{{kind: vae, weights: random, image_size: 32, device: cpu, model_args: {sizes}}}"
    run = make_run(tmp_path / "run", f"reconstruction.low_level={{target: {target}}}")
    pipeline.reconstruct(run)
    assert not audit_run(tmp_path / "run").leaks


@pytest.mark.further
def test_a_network_learns_latents_by_l1_and_is_judged(tmp_path):
    network = "{kind: latent_decoder}"
    encoder = f"{{kind: network, network: {network}, objectives: [{{kind: l1}}], epochs: 2, device: cpu}}"
    low = f"reconstruction.low_level={{target: {TARGET}, encoder: {encoder}}}"
    run = make_run(tmp_path / "run", low)
    made = pipeline.reconstruct(run).images
    assert made["low_level"].shape[:-3] == made["decoded"].shape[:-3]
    assert (made["low_level"].size, made["decoded"].size) == (
        (32, 32),
        (8, 8),
    )  # each in the size that it was made in
    audit = audit_run(tmp_path / "run")
    assert not audit.leaks
    fit = find_low_fit(tmp_path / "run")
    tensors = load_file(fit / "network.safetensors")
    tensors["model.target_scale.centre"] = tensors["model.target_scale.centre"] + 1
    save_file(tensors, fit / "network.safetensors")
    assert {(leak.check, leak.where) for leak in audit_run(tmp_path / "run").leaks} >= {
        ("target-means", "low-level branch fold 0")
    }


@pytest.mark.slow
@pytest.mark.shared
def test_photographs_keep_their_size_on_the_way_through_the_branch(shared, tmp_path):
    """Real weights, real photographs: crops of 512 pixels come back from predicted latents with 512 pixels."""
    from skimage import data

    corners = (0.0, 0.25, 0.5)  # of what is left over beside the crop
    crops, ids, splits = [], [], []
    for name in ("astronaut", "coffee", "rocket"):
        photograph = getattr(data, name)()
        side = int(0.8 * min(photograph.shape[:2]))
        for number, corner in enumerate(corners):
            top, left = (int(corner * (n - side)) for n in photograph.shape[:2])
            crops.append(resize_image(photograph[top : top + side, left : left + side], 512, 512))
            ids.append(f"{name}{number}")
            splits.append("test" if corner == 0.25 else "train")
    pictures = np.stack(crops)
    coarse = pictures.reshape(len(pictures), 8, 64, 8, 64, 3).mean(axis=(2, 4)).reshape(len(pictures), -1)
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(root / "data.npy", (coarse + rng.normal(0, 2, coarse.shape)).astype(np.float32))
    pd.DataFrame({"stimulus_id": ids, "split": splits}).to_csv(root / "trials.csv", index=False)
    for name, picture in zip(ids, pictures, strict=True):
        Image.fromarray(picture).save(root / "images" / f"{name}.png")
    target = f"{{kind: taesd, weights: {shared / 'weights'}, image_size: 512, device: cpu}}"
    low = f"reconstruction.low_level={{target: {target}}}"
    config = read_config(
        "arrays_ridge", ["split={kind: published}", "target={kind: pixels, size: 16}", low], root=root
    )
    run = open_run(config, tmp_path / "run")
    drawn = decoding.make_low_level(run, 0)
    (decoded,) = drawn.make(range(drawn.n_images)).values()
    rows = decoding.retrieve(run).folds[0].predicted.ids
    assert decoded.shape == (3, 512, 512, 3)
    truth = pictures[[ids.index(str(i)) for i in rows]]
    own, other = (compute_image_metric("pixcorr", decoded, np.roll(truth, n, axis=0)) for n in (0, 1))
    assert (own > 0.5).all()
    assert (own > other + 0.1).all()
    # Not an enlarged thumbnail: edges of the photographs are finer than an eighth of the side would hold.
    step = np.abs(np.diff(decoded.astype(float), axis=2)).max(axis=(1, 2, 3))
    assert (step > 40).all()


# --- the text branch ------------------------------------------------------------------------------------------


CLIP = (
    "kind: openclip, architecture: ViT-B-32-quickgelu, weights: random, device: cpu, model_args: {embed_dim: 32, "
    "vision_cfg: {layers: 1, width: 64, image_size: 32, patch_size: 16}, text_cfg: {layers: 1, width: 32, heads: 2}}"
)
DUAL = [
    f"target={{{CLIP}, pooling: tokens, project: true, normalise: class}}",
    f"reconstruction.text.target={{kind: clip_text, output: projected, tower: {{{CLIP}}}}}",
    f"reconstruction.low_level={{target: {TARGET}, fusion: {{mode: initial, strength: 0.75}}}}",
    "reconstruction.text.prior={kind: moments}", "reconstruction.low_level.prior={kind: moments}",
    "prior={kind: moments}", "dataset.n_train=40", "dataset.n_test=5",
]  # fmt: skip


@pytest.mark.further
def test_three_encoders_lead_one_generator_to_the_end(tmp_path, monkeypatch):
    """Benchetrit et al.: tokens of image and text and latents, each rescaled by its own training statistics."""
    monkeypatch.setattr(VersatileDiffusionConfig, "n_tokens", 5)
    weights = write_versatile(tmp_path / "weights")
    generator = (
        f"generator={{kind: versatile_diffusion, weights: {weights}, condition_spaces: ['openclip/*'], "
        "steps: 4, image_size: 32, device: cpu, batch_size: 5}"
    )
    folder = tmp_path / "run"
    run = make_run(folder, *DUAL, generator)
    pipeline.run_all(run)
    (made,) = list_artifacts(folder, "reconstruct")
    record = store.read_json(made / store.PROVENANCE)
    names = {"low_level0", "low_level_out_of_fold0", "text0", "text_out_of_fold0", "out_of_fold0"}
    assert names <= set(record["upstream"])
    images = decoding.reconstruct(run)
    assert {"decoded", "high_level", "low_level", "oracle", "mean_embedding"} <= set(images.images)
    # Predictions leave the branch with the spread of the training images, of which the test trials know nothing.
    texts = decoding.make_texts(run, 0)
    branch = decoding.open_branch(run, "text")
    trials = decoding._pick_trials(run, 0)
    alone = decoding.predict_branch(run, branch, 0, trials.select(np.array([2])))
    np.testing.assert_allclose(alone.vectors[0], texts.predicted.vectors[2], atol=1e-5)
    stages = store.read_json(folder / "provenance.json")["stages"]
    assert {"text embed", "text train fold00", "low-level train fold00"} <= set(stages)
    audit = audit_run(folder)
    assert not audit.leaks
    assert {"low-level", "text"} <= {item.check for item in audit.list_level("ok")}


def test_a_text_branch_and_its_generator_go_together():
    text = "reconstruction.text={target: {kind: clip_text}}"
    with pytest.raises(
        ConfigError, match=r"which the generator 'latents' does not take; choose sd_ip_adapter"
    ):
        read_config("synthetic_digits", [text])
    with pytest.raises(ConfigError, match=r"also needs tokens of a text: set reconstruction\.text"):
        read_config("synthetic_digits", ["generator={kind: versatile_diffusion}", "target={kind: openclip}"])
    with pytest.raises(ConfigError, match=r"target\.kind clip_text embeds texts"):
        read_config("synthetic_digits", ["generator={kind: nearest}", "target={kind: clip_text}"])
    with pytest.raises(ConfigError, match="the tokens that a prompt would give"):
        read_config(
            "synthetic_digits",
            ["generator={kind: sd_ip_adapter, prompt: a cat}", "target={kind: openclip}", text],
        )
