"""The audit passes clean runs and catches what is planted in others; test_plants has the table of what is planted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.cli import app
from braindecode_vis.config import read_config
from braindecode_vis.datasets import synthetic_digits
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.leaks.findings import Audit, Verified
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.runs import open_run
from tests.parts.audit.small_runs import find
from tests.parts.audit.test_results import QUICK, find_artifact

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


def reseal(artifact):
    """Write the digests of changed files, so that the change goes unseen."""
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


# --- what no small run of the tests beside this one has -----------------------------------------------------


def test_rows_that_use_the_test_queries_together_are_named(tmp_path):
    folder = make_run(tmp_path / "run", "evaluation.protocols=[transductive]")
    pipeline.evaluate(open_run(read_config(folder), folder))
    audit = audit_run(folder)
    (found,) = find(audit, "transductive", "transductive")
    assert found.message.startswith("rows named @transductive-")
    assert not audit.leaks


def test_one_picture_under_two_ids_is_found_even_if_the_table_denies_it(monkeypatch, tmp_path):
    make = synthetic_digits.make_synthetic_digits

    def make_with_a_copy(config, seed):
        responses, stimuli = make(config, seed=seed)
        pixels, table = stimuli.pixels.copy(), stimuli.table.copy()
        pixels[N_TRAIN + 3] = pixels[7]
        table.loc[table.index != N_TRAIN + 3, "sha256"] = [
            hash_pixels(image) for row, image in enumerate(pixels) if row != N_TRAIN + 3
        ]
        return responses, StimulusSet(table, pixels=pixels)

    monkeypatch.setattr(synthetic_digits, "make_synthetic_digits", make_with_a_copy)
    (leak,) = audit_run(make_run(tmp_path / "run")).leaks
    assert (leak.check, leak.where) == ("pixels", "fold 0")
    assert "1 picture(s)" in leak.message
    assert leak.message.count("digit_") == 2


def test_an_exchanged_artifact_breaks_the_chain(copied):
    artifact = find_artifact(copied, "preprocess")
    record = store.read_json(artifact / store.PROVENANCE)
    record["fields"]["seed"] = 5
    name = store.compute_fingerprint("preprocess", record["version"], record["fields"], {})
    store.write_provenance(artifact / store.PROVENANCE, {**record, "fingerprint": name})
    artifact.rename(artifact.with_name(name))
    found = find(audit_run(copied), "chain")
    assert any("there is no preprocess" in item.message for item in found)


def test_a_part_is_as_well_verified_as_the_worst_of_what_was_said_of_it():
    said = (
        Verified("fit", "recomputed", "means"), Verified("fit", "by record", "weights", "add --refit"),
        Verified("chain", "recomputed", "names"),
    )  # fmt: skip
    status = {item.part: item for item in Audit(Path(), (), said).list_status()}
    assert [status[part].how for part in ("chain", "fit", "score")] == [
        "recomputed",
        "by record",
        "not verified",
    ]
    assert status["fit"].describe() == "recomputed: means; by record: weights (add --refit)"
    assert Audit(Path(), (), said).as_json()["verified"]["fit"]["others"][0]["reason"] == "add --refit"


@pytest.mark.shared
def test_real_runs_of_faces_and_houses_pass(shared, tmp_path):
    root = shared / "data" / "muse_n170"
    run = open_run(read_config("muse_n170", ["dataset.sfreq=32"], root=root), tmp_path)
    pipeline.train(run)
    audit = audit_run(tmp_path, refit=True)
    assert not audit.leaks
    assert not audit.list_level("transductive")
    assert "not known" in find(audit, "pixels", "ok")[0].message
    assert "no run is in both training and test" in find(audit, "run", "ok")[0].message
    artifact = open_audited(tmp_path).trained[1].path
    record = store.read_json(artifact / store.PROVENANCE)
    store.write_provenance(artifact / store.PROVENANCE, {**record, "n_trials": record["n_trials"] + 1})
    assert find(audit_run(tmp_path), "used-trials", "leak")[0].where == "fold 1"
