"""Predictions of training trials: made for what learns from them, once, and the same as right after the fit."""

import json
import shutil

import numpy as np
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base import roles, store
from braindecode_vis.base.contracts import Context, GeneratorSettings, PriorSettings
from braindecode_vis.base.registry import find_component
from braindecode_vis.config import read_config
from braindecode_vis.encoders.ridge import RidgeEncoder
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.learning import needs_predictions, pick_training, predict_out_of_fold
from braindecode_vis.pipeline.runs import open_run
from tests.parts.audit.test_results import find_artifact, reseal

SMALL = [
    "dataset.n_train=60", "dataset.n_test=12", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "target={kind: pixels, size: 12}",
]  # fmt: skip
RIDGE = "encoder={kind: ridge, alphas: [1, 100], n_features: [6, 12, null]}"
NETWORK = (
    "encoder={kind: network, network: {kind: residual_mlp, hidden: 16, n_blocks: 1}, epochs: 2, batch_size: 16, "
    "device: cpu, %s}"
)
SPREAD = "prior={kind: spread}"


def make_run(folder, *overrides):
    return open_run(read_config("synthetic_digits", [*SMALL, *overrides]), folder)


def list_made(folder):
    return sorted(path.name for path in folder.glob("stages/out_of_fold/*"))


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ("generator={kind: latents}", False),
        ("generator={kind: latents, contrast: ssim}", True),
        ("generator={kind: refiner}", True),
        ("prior={kind: mean}", False),
        ("prior={kind: neighbours}", False),
        (SPREAD, True),
    ],
)
def test_they_are_made_for_what_learns_from_them(tmp_path, settings, needed):
    assert needs_predictions(make_run(tmp_path, settings)) is needed


@pytest.mark.parametrize("prior, needed", [("mean", False), ("identity", True)])
def test_a_generator_that_weighs_predictions_needs_them_where_no_prior_draws(prior, needed):
    """Weights of a generator are files, so that its settings are here without a run."""
    generator = roles.complete(
        GeneratorSettings, find_component("generator", "latent_diffusion").model_construct()
    )
    settings = roles.complete(PriorSettings, find_component("prior", prior)())
    assert roles.need_predictions(settings, generator) is needed


def test_a_run_that_reads_none_makes_none(tmp_path, monkeypatch):
    """They cost as much as the fit, and every training made them."""

    def refuse(*_):
        raise AssertionError("nothing reads them")

    monkeypatch.setattr(RidgeEncoder, "predict_out_of_fold", refuse)
    pipeline.report(make_run(tmp_path))
    assert list_made(tmp_path) == []
    assert "predicted" in (material := store.read_json(next(tmp_path.rglob("material.json"))))
    assert material["predicted"] == []
    audit = audit_run(tmp_path, refit=True)
    assert not audit.leaks
    assert any("no predictions out of fold" in item.what for item in audit.verified)


def test_they_are_made_once_and_again_where_they_were_lost(tmp_path, monkeypatch):
    calls = []
    predict = RidgeEncoder.predict_out_of_fold
    monkeypatch.setattr(
        RidgeEncoder, "predict_out_of_fold", lambda self, *args: (calls.append(1), predict(self, *args))[1]
    )
    pipeline.train(make_run(tmp_path, SPREAD))
    assert (len(calls), list_made(tmp_path)) == (0, [])
    pipeline.report(make_run(tmp_path, SPREAD))
    (name,) = list_made(tmp_path)
    pipeline.report(make_run(tmp_path, SPREAD))
    # Another prior learns from the same.
    pipeline.reconstruct(make_run(tmp_path, SPREAD, "seed=0", "generator={kind: latents, contrast: ssim}"))
    assert (len(calls), list_made(tmp_path)) == (1, [name])
    record = store.read_json(find_artifact(tmp_path, "train") / store.PROVENANCE)
    assert store.read_json(next(tmp_path.glob("stages/out_of_fold/*/provenance.json")))["upstream"] == {
        "train": record["fingerprint"]
    }
    stages = store.read_json(tmp_path / store.PROVENANCE)["stages"]
    assert stages["out_of_fold fold00"]["fingerprint"] in name
    before = np.load(find_artifact(tmp_path, "out_of_fold") / "vectors.npy")
    shutil.rmtree(tmp_path / "stages" / "out_of_fold")
    pipeline.report(make_run(tmp_path, SPREAD))
    assert (len(calls), list_made(tmp_path)) == (2, [name])
    np.testing.assert_array_equal(np.load(find_artifact(tmp_path, "out_of_fold") / "vectors.npy"), before)


@pytest.mark.parametrize(
    "encoder",
    [RIDGE, NETWORK % "out_of_fold: 2", NETWORK % "selection: {kind: last, hold_out: 0.2}"],
    ids=["ridge", "refits", "held out"],
)
def test_they_are_those_that_the_encoder_gives_right_after_its_fit(tmp_path, encoder):
    """They are made from what lies in the run folder: ridge had not kept the seed that draws its folds."""
    run = make_run(tmp_path, encoder, "seed=5", "selection.encoding={n_best: 16}")
    part = predict_out_of_fold(run)[0]
    responses, targets = pick_training(run, 0)
    encoder = pipeline.preparing.build_encoder(run, 0, Context())
    expected = encoder.fit(responses, targets).predict_out_of_fold(responses, targets)
    assert part.predicted.ids.tolist() == expected.ids.tolist()
    assert part.predicted.space == expected.space
    np.testing.assert_array_equal(part.predicted.vectors, expected.vectors)


def test_runs_of_earlier_versions_keep_them_with_the_fit(tmp_path):
    pipeline.report(make_run(tmp_path, SPREAD))
    made = find_artifact(tmp_path, "out_of_fold")
    kept = store.read_embeddings(made)
    store.write_embeddings(find_artifact(tmp_path, "train") / "out_of_fold", kept)
    shutil.rmtree(made.parent)
    fitted = find_artifact(tmp_path, "train") / store.PROVENANCE
    store.write_provenance(fitted, {**json.loads(fitted.read_text()), "version": 2})
    path = find_artifact(tmp_path, "reconstruct") / store.PROVENANCE
    record = json.loads(path.read_text())
    del record["upstream"]["out_of_fold0"]
    store.write_provenance(path, record)
    reseal(tmp_path)
    run = open_finished(tmp_path)
    assert pipeline.reconstruct(run).artifact.path == path.parent
    np.testing.assert_array_equal(predict_out_of_fold(run)[0].predicted.vectors, kept.vectors)


@pytest.mark.parametrize("share, found", [(0.0, False), (0.5, True)])
def test_refits_that_know_their_images_are_found(tmp_path, share, found):
    """Other weights are no proof, as another machine has others; to be nearer to the own image than they are is one."""
    pipeline.report(make_run(tmp_path, SPREAD, NETWORK % "out_of_fold: 2"))
    made = find_artifact(tmp_path, "out_of_fold")
    kept = store.read_embeddings(made)
    truth = store.read_embeddings(find_artifact(tmp_path, "embed")).select(list(kept.ids)).vectors
    noise = np.random.default_rng(0).normal(scale=0.1, size=truth.shape) * (share == 0)
    vectors = (1 - share) * kept.vectors + share * truth + noise
    np.save(made / "vectors.npy", vectors.astype(np.float32))
    reseal(tmp_path)
    audit = audit_run(tmp_path, refit=True)
    assert any(item.check == "out-of-fold" for item in audit.leaks) is found
    assert any("as on another machine" in item.reason for item in audit.verified) is not found


def test_predictions_that_images_were_made_with_are_missed(tmp_path):
    pipeline.report(make_run(tmp_path, SPREAD))
    shutil.rmtree(tmp_path / "stages" / "out_of_fold")
    assert any("out_of_fold fold00" in text for text in open_audited(tmp_path).missing)
    assert any(item.check == "chain" for item in audit_run(tmp_path).leaks)
