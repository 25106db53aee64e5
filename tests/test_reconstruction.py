import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.config import read_config
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.reconstruction import measure_repetition_noise
from braindecode_vis.pipeline.runs import open_run
from tests.generation.hub_models import write_sdxl


def make_trials(ids, values):
    trials = pd.DataFrame(
        {"subject": "01", "session": "1", "run": "1", "stimulus_id": ids, "repetition": 0, "split": "train"}
    )
    data = np.asarray(values, np.float32)
    return Responses(data, ("trial", "voxel"), trials, "a.u.", {"voxel": np.arange(data.shape[1])})


def predict(trials):
    return Embeddings(2 * trials.as_matrix(), list(trials.stimulus_ids), "space")


def test_noise_is_that_of_one_repetition_whatever_their_number():
    rng = np.random.default_rng(0)
    ids = np.repeat([f"image{i}" for i in range(600)], 3)
    images = np.repeat(rng.normal(size=(600, 2)), 3, axis=0)
    noise = measure_repetition_noise(
        predict, make_trials(ids, images + 0.5 * rng.normal(size=(1800, 2))), n_train=3, n_test=40
    )
    assert (noise.n_train, noise.n_test) == (3, 40)
    np.testing.assert_allclose((noise.deviations**2).mean(axis=0), 1.0, rtol=0.1)  # (2 x 0.5) ** 2


def test_images_shown_once_say_nothing():
    trials = make_trials(["a", "b", "c"], np.ones((3, 2)))
    assert measure_repetition_noise(predict, trials, n_train=1, n_test=1) is None
    some = make_trials(["a", "b", "a", "c"], [[1.0, 0], [9, 9], [3, 0], [7, 7]])
    noise = measure_repetition_noise(predict, some, n_train=2, n_test=1)
    np.testing.assert_allclose(np.abs(noise.deviations), [[2**1.5, 0], [2**1.5, 0]], rtol=1e-6)
    assert noise.deviations.sum() == pytest.approx(0)


@pytest.mark.slow
def test_a_caption_leads_the_image_of_its_trial(tmp_path):
    """Through SDXL's classes with random weights: other captions, other images; an audit makes the same ones."""
    sdxl, adapter = write_sdxl(tmp_path)
    tower = "{embed_dim: 32, vision_cfg: {layers: 2, width: 32, head_width: 16}, text_cfg: {layers: 1, width: 32}}"
    small = [
        "dataset={kind: synthetic_digits, n_train: 40, n_test: 8, n_voxels: 30}",
        "evaluation.features=null",
    ]
    few = ["evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]
    target = f"target={{kind: openclip, architecture: ViT-H-14, weights: random, model_args: {tower}}}"
    weights = f"weights: {sdxl}, ip_adapter: {adapter}"
    generator = f"generator={{kind: sdxl_turbo, {weights}, image_size: 16, steps: 1, device: cpu}}"
    made = {}
    for word in ("a", "b"):
        bank = tmp_path / f"{word}.csv"
        ids = pipeline.preprocess(
            open_run(read_config("synthetic_digits", small), tmp_path / "ids")
        ).stimuli.ids
        bank.write_text("\n".join(["id,caption", *(f"{name},{word}" for name in ids)]))
        captions = f"reconstruction.captions=[{{kind: nearest, bank: {bank}}}]"
        config = read_config(
            "synthetic_digits", [*small, *few, target, generator, captions, "reconstruction.prompt=nearest"]
        )
        run = open_run(config, tmp_path / f"run-{word}")
        pipeline.run_all(run)
        made[word] = np.asarray(pipeline.reconstruct(run).images["decoded"])
        assert pipeline.reconstruct(run).captions["decoded"]["nearest"] == [[word]] * 8
        assert audit_run(run.folder.path, refit=True).leaks == ()
    assert (made["a"] != made["b"]).any(axis=(1, 2, 3)).all()
    learnt = (
        f"encoder={{kind: network, network: {{kind: residual_mlp, hidden: 8, n_blocks: 1}}, captions: {bank}, "
        "objectives: [{kind: mse}, {kind: captioning, width: 8}], epochs: 20, device: cpu}"
    )
    asked = ["reconstruction.captions=[{kind: brain}]", "reconstruction.prompt=brain"]
    run = open_run(
        read_config("synthetic_digits", [*small, *few, target, generator, learnt, *asked]), tmp_path / "brain"
    )
    pipeline.run_all(run)
    found = pipeline.reconstruct(run).captions
    assert set(found["decoded"]) == {"brain"}
    assert not found["oracle"]  # a true embedding is no response
    assert audit_run(run.folder.path, refit=True).leaks == ()
