"""The audit passes clean runs and catches what is planted in others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.cli import app
from braindecode_vis.config import read_config
from braindecode_vis.datasets import synthetic_digits
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.leaks.findings import Audit, Verified
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.selection import SelectionConfig, fit_selection

QUICK = [
    "dataset.n_train=60", "dataset.n_test=20", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "encoder.alphas=[1,10,100]",
]  # fmt: skip
N_TRAIN = 60


def make_run(folder, *overrides):
    """Run until the images are ranked, which is as far as an audit looks into."""
    run = open_run(read_config("synthetic_digits", [*QUICK, *overrides]), folder)
    pipeline.retrieve(run)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("audit") / "clean", "target={kind: pca, n_components: 5}",
        "selection.encoding={n_best: 12}",
    )  # fmt: skip


@pytest.fixture
def copied(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "run"))


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Return a function that runs on data which `change` has spoilt, the fingerprints of all stages being right."""
    make = synthetic_digits.make_synthetic_digits

    def run_with(change, *overrides):
        monkeypatch.setattr(
            synthetic_digits, "make_synthetic_digits", lambda config, seed: change(*make(config, seed=seed))
        )
        return make_run(tmp_path / "planted", *overrides)

    return run_with


def find(audit, check, level="leak"):
    return [item for item in audit.findings if item.check == check and item.level == level]


def only_leak(audit, check):
    """Return the leaks of one check, having made sure that there are no others."""
    assert {item.check for item in audit.leaks} == {check}, audit.leaks
    return audit.leaks


def find_artifact(folder, stage):
    (path,) = (folder / "stages" / stage).iterdir()
    return path


def reseal(artifact):
    """Write the digests of changed files, as one would who wants the change to go unseen."""
    record = store.read_json(artifact / store.PROVENANCE)
    record["files"] = store.describe_files(artifact)
    store.write_provenance(artifact / store.PROVENANCE, record)


def centre_by_queries(folder, number):
    """Write similarities of a fold as if predictions and images were centred by the predictions."""
    run = open_run(read_config(folder), folder)
    predicted = pipeline.retrieve(run).folds[number].predicted
    bank = pipeline.embed(run)[number if len(pipeline.embed(run)) > 1 else 0].embeddings
    mean = predicted.flat().mean(axis=0)
    queries, truth = predicted.flat() - mean, bank.select(list(predicted.ids)).flat() - mean
    norms = np.linalg.norm(queries, axis=1) * np.linalg.norm(truth, axis=1)
    path = find_artifact(folder, "retrieve") / f"fold{number:02d}" / "true_similarities.npy"
    np.save(path, (queries * truth).sum(axis=1) / norms)


# --- clean runs -------------------------------------------------------------------------------------------


def test_a_clean_run_passes_and_is_left_as_it_is(clean):
    before = {path: store.hash_file(path) for path in clean.rglob("*") if path.is_file()}
    audit = audit_run(clean, refit=True)
    assert not audit.leaks
    assert {item.check for item in audit.list_level("ok")} >= {
        "chain", "image", "pixels", "copies", "split", "used-trials", "standardising", "whitening", "encoder-inputs",
        "features", "targets", "choices", "model-selection", "design", "transductive", "refit",
    }  # fmt: skip
    assert before == {path: store.hash_file(path) for path in clean.rglob("*") if path.is_file()}


def test_folds_over_images_pass(tmp_path):
    folder = make_run(
        tmp_path / "run", "split={kind: kfold, n_folds: 3}", "target={kind: pca, n_components: 5}"
    )
    audit = audit_run(folder, refit=True)
    assert not audit.leaks
    assert find(audit, "validation", "ok")[0].message == "no network was trained."
    # Of three folds one was not written and the last one is centred by its test queries.
    artifact = find_artifact(folder, "retrieve")
    (artifact / "fold01" / "true_similarities.npy").unlink()
    centre_by_queries(folder, 2)
    reseal(artifact)
    (told,) = find(audit_run(folder), "centre", "transductive")
    assert told.where == "fold 2"


def test_an_unfinished_artifact_is_no_part_of_a_run(copied):
    for stage in ("preprocess", "train", "retrieve"):
        artifact = find_artifact(copied, stage)
        shutil.copytree(artifact, artifact.with_name(f".{artifact.name}.tmp"))
    audit = audit_run(copied)
    assert not audit.leaks
    assert "ranks" in {item.check for item in audit.list_level("ok")}


def test_whoever_gives_no_run_is_told(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        audit_run(tmp_path)


def test_the_command_exits_with_2_after_the_findings(clean, copied):
    runner = CliRunner()
    done = runner.invoke(app, ["audit", str(clean), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["n_leaks"] == 0
    (find_artifact(copied, "train") / "log.jsonl").write_text('{"epoch": 0, "test_top1": 0.2}\n')
    reseal(find_artifact(copied, "train"))
    done = runner.invoke(app, ["audit", str(copied), "--json"])
    found = json.loads(done.stdout)
    assert found["n_leaks"] == 1
    assert next(f["where"] for f in found["findings"] if f["level"] == "leak").endswith("log.jsonl")
    assert isinstance(done.exception, DataError)  # which `main` prints as one sentence, with exit code 2
    assert "1 leak in" in str(done.exception)
    assert "test_top1" in runner.invoke(app, ["audit", str(copied)], env={"COLUMNS": "200"}).stdout


# --- planted in the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, level", [(slice(None), "leak"), (slice(N_TRAIN), "ok")])
def test_z_scores_of_all_trials_are_told_from_those_of_training_trials(planted, rows, level):
    def change(responses, stimuli):
        data = responses.data.astype(float)
        data = (data - data[rows].mean(axis=0)) / data[rows].std(axis=0)
        return replace(responses, data=data.astype(np.float32), unit="z"), stimuli

    audit = audit_run(planted(change))
    assert len(find(audit, "standardising", level)) == 1
    assert len(audit.leaks) == (level == "leak")


def test_rows_that_use_the_test_queries_together_are_named(tmp_path):
    folder = make_run(tmp_path / "run", "evaluation.protocols=[transductive]")
    pipeline.evaluate(open_run(read_config(folder), folder))
    audit = audit_run(folder)
    (found,) = find(audit, "transductive", "transductive")
    assert found.message.startswith("rows named @transductive-")
    assert not audit.leaks


@pytest.mark.parametrize("rows, level", [(slice(None), "leak"), (slice(N_TRAIN), "ok")])
def test_whitening_by_all_trials_is_told_from_that_by_training_trials(planted, rows, level):
    def change(responses, stimuli):
        data = responses.data.astype(float)
        values, vectors = np.linalg.eigh(np.cov(data[rows].T))
        data = (data - data[N_TRAIN:].mean(axis=0)) @ (vectors / np.sqrt(values)) @ vectors.T
        return replace(responses, data=data.astype(np.float32)), stimuli

    audit = audit_run(planted(change))
    assert len(find(audit, "whitening", level)) == 1
    assert "uncorrelated" in find(audit, "whitening", level)[0].message


def test_one_picture_under_two_ids_is_found_even_if_the_table_denies_it(planted):
    def change(responses, stimuli):
        pixels = stimuli.pixels.copy()
        pixels[N_TRAIN + 3] = pixels[7]
        table = stimuli.table.copy()
        table.loc[table.index != N_TRAIN + 3, "sha256"] = [
            hash_pixels(image) for row, image in enumerate(pixels) if row != N_TRAIN + 3
        ]
        return responses, StimulusSet(table, pixels=pixels)

    (leak,) = only_leak(audit_run(planted(change)), "pixels")
    assert "1 picture(s)" in leak.message
    assert leak.message.count("digit_") == 2
    assert leak.where == "fold 0"


def test_one_trial_in_two_rows_is_found(planted):
    def change(responses, stimuli):
        data = responses.data.copy()
        data[N_TRAIN + 2] = data[11]
        return replace(responses, data=data), stimuli

    (leak,) = only_leak(audit_run(planted(change)), "copies")
    assert "rows 11 (" in leak.message
    assert f"and {N_TRAIN + 2} (" in leak.message


def put_into_blocks(responses, stimuli, *, n_runs):
    """Give each concept a run of its own, or shuffle the runs of trials."""
    codes = pd.factorize(responses.trials["concept"])[0]
    shuffled = np.random.default_rng(0).permutation(codes) if n_runs == "shuffled" else codes
    return responses.with_trials(responses.trials.assign(run=[f"{c:02d}" for c in shuffled])), stimuli


def test_a_block_design_is_a_warning(planted):
    audit = audit_run(planted(lambda r, s: put_into_blocks(r, s, n_runs="one per concept")))
    assert not audit.leaks
    warnings = find(audit, "design", "warning")
    assert any("block design" in item.message and "V 1.00" in item.message for item in warnings)
    assert any("in one run only" in item.message for item in warnings)


def test_concepts_that_are_spread_over_runs_are_no_block_design(planted):
    audit = audit_run(planted(lambda r, s: put_into_blocks(r, s, n_runs="shuffled")))
    assert not find(audit, "design", "warning")


# --- planted in the files ---------------------------------------------------------------------------------


def test_settings_that_were_changed_afterwards_break_the_chain(copied):
    artifact = find_artifact(copied, "train")
    record = store.read_json(artifact / store.PROVENANCE)
    record["fields"]["encoder"]["alphas"] = [1.0]
    store.write_provenance(artifact / store.PROVENANCE, record)
    assert "tampered" in find(audit_run(copied), "chain")[0].message


def test_a_changed_file_breaks_the_chain(copied):
    path = find_artifact(copied, "preprocess") / "stimuli" / "stimuli.json"
    path.write_text(path.read_text() + " ")
    assert "stimuli.json" in only_leak(audit_run(copied), "chain")[0].message


def test_an_exchanged_artifact_breaks_the_chain(copied):
    artifact = find_artifact(copied, "preprocess")
    record = store.read_json(artifact / store.PROVENANCE)
    record["fields"]["seed"] = 5
    name = store.compute_fingerprint("preprocess", record["version"], record["fields"], {})
    store.write_provenance(artifact / store.PROVENANCE, {**record, "fingerprint": name})
    artifact.rename(artifact.with_name(name))
    found = find(audit_run(copied), "chain")
    assert any("there is no preprocess" in item.message for item in found)


def edit_split(copied, edit):
    artifact = find_artifact(copied, "preprocess")
    record = store.read_json(artifact / "split.json")
    edit(record)
    store.write_json(artifact / "split.json", record)
    reseal(artifact)
    return audit_run(copied)


def test_a_test_trial_that_teaches_is_found(copied):
    audit = edit_split(copied, lambda split: split["folds"][0]["train"].append(N_TRAIN + 4))
    assert f"first row {N_TRAIN + 4}" in only_leak(audit, "trials")[0].message


def test_a_test_trial_that_moved_to_training_is_found(copied):
    def edit(split):
        split["folds"][0]["test"].remove(N_TRAIN + 4)
        split["folds"][0]["train"].append(N_TRAIN + 4)

    audit = edit_split(copied, edit)
    assert f"first row {N_TRAIN + 4}" in find(audit, "split")[0].message
    assert "learnt from 60 trials, but the fold has 61" in find(audit, "used-trials")[0].message


def test_a_split_that_declares_too_much_is_not_believed(copied):
    audit = edit_split(copied, lambda split: split["by"].append("concept"))
    (leak,) = only_leak(audit, "concept")
    assert "must not share any concept" in leak.message
    audit = edit_split(
        copied, lambda split: split.update(by=["image"], protocol="zero-shot over new concepts")
    )
    assert "zero-shot" in only_leak(audit, "concept")[0].message


def open_clean(folder):
    run = open_run(read_config(folder), folder)
    return run, pipeline.preprocess(run), pipeline.embed(run)[0]


def test_an_encoder_of_all_trials_is_found_by_its_statistics_and_by_a_refit(copied):
    run, prepared, bank = open_clean(copied)
    fold = pipeline.train(run)[0]
    responses = fold.selection.apply(prepared.responses)
    config = run.config.encoder
    encoder = config.build(seed=derive_seed(run.config.seed, "train", 0))
    encoder.fit(responses, bank.embeddings.select(list(responses.stimulus_ids)))
    encoder.write(fold.artifact.path)
    reseal(fold.artifact.path)
    audit = audit_run(copied, refit=True)
    assert "but those of training and test trials" in find(audit, "encoder-inputs")[0].message
    assert "ridge.safetensors differs from a fit on the training trials" in find(audit, "refit")[0].message


def test_an_encoder_of_unknown_trials_is_not_said_to_know_the_test(copied):
    path = find_artifact(copied, "train") / "ridge.safetensors"
    arrays = load_file(path)
    save_file({**arrays, "feature_mean": arrays["feature_mean"] + arrays["feature_std"]}, path)
    reseal(path.parent)
    (leak,) = find(audit_run(copied), "encoder-inputs")
    assert "not those of its training trials (off by 1 SD)" in leak.message


def test_features_that_all_trials_chose_are_found(copied):
    run, prepared, bank = open_clean(copied)
    config = SelectionConfig.model_validate(run.config.selection.model_dump())
    selection = fit_selection(
        config, prepared.responses, bank.embeddings, seed=derive_seed(run.config.seed, "selection")
    )
    artifact = find_artifact(copied, "train")
    selection.write(artifact / "selection")
    reseal(artifact)
    assert "training and test trials together choose" in find(audit_run(copied), "features")[0].message


def test_a_target_space_of_all_images_is_found(copied):
    _, prepared, bank = open_clean(copied)
    encoder = bank.encoder.config.build().fit(prepared.stimuli.iterate_images())
    artifact = find_artifact(copied, "embed")
    encoder.write(artifact)
    vectors = encoder.encode(prepared.stimuli.iterate_images())
    store.write_embeddings(artifact, Embeddings(vectors, prepared.stimuli.ids, encoder.space))
    reseal(artifact)
    assert "training and test images together" in find(audit_run(copied), "targets")[0].message


def test_a_penalty_that_the_inner_folds_did_not_choose_is_found(copied):
    artifact = find_artifact(copied, "train")
    content = store.read_json(artifact / "ridge.json")
    worst = max(content["choices"], key=lambda choice: choice["mse"])["alpha"]
    store.write_json(artifact / "ridge.json", {**content, "alpha": worst})
    reseal(artifact)
    audit = audit_run(copied)
    assert {item.check for item in audit.leaks} == {
        "choices",
        "fits",
    }  # and it is not what a fit chooses again
    assert f"penalty {worst:g}" in find(audit, "choices")[0].message


@pytest.mark.parametrize(
    "name, line, found",
    [
        ("work/train00/training.jsonl", '{"epoch": 3, "validation_top5": 0.3, "test_top5": 0.4}', True),
        ("work/train00/training.jsonl", '{"epoch": 3, "validation_top5": 0.3, "latest": 1}', False),
        ("logs/curve.csv", "epoch,train loss,test/accuracy", True),
        ("logs/out.log", "epoch 3 best_test_acc=0.4", True),
    ],
)
def test_logs_with_test_scores_are_found(copied, name, line, found):
    path = copied / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line + "\n")
    assert bool(find(audit_run(copied), "model-selection")) is found


def test_one_run_of_a_sweep_is_a_warning(copied):
    (copied.parent / "sweep.csv").write_text("run\n")
    assert "sweep" in find(audit_run(copied), "model-selection", "warning")[0].message


def test_similarities_centred_by_test_queries_are_transductive(copied):
    centre_by_queries(copied, 0)
    reseal(find_artifact(copied, "retrieve"))
    audit = audit_run(copied)
    only_leak(audit, "ranks")  # the run did not centre so, by its settings
    assert "test queries" in find(audit, "centre", "transductive")[0].message


def test_a_part_is_as_well_verified_as_the_worst_of_what_was_said_of_it():
    said = (
        Verified("fit", "recomputed", "means"), Verified("fit", "by record", "weights", "pass --refit"),
        Verified("chain", "recomputed", "names"),
    )  # fmt: skip
    status = {item.part: item for item in Audit(Path(), (), said).list_status()}
    assert [status[part].how for part in ("chain", "fit", "score")] == [
        "recomputed",
        "by record",
        "not verified",
    ]
    assert status["fit"].describe() == "recomputed: means; by record: weights (pass --refit)"
    assert Audit(Path(), (), said).as_json()["verified"]["fit"]["others"][0]["reason"] == "pass --refit"
