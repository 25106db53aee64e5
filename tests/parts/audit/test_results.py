"""What comes after the fit is computed again: forged numbers are found though every digest was made again."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.cli import app
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.conditional import ConditionalEncoder
from braindecode_vis.parts.audit.choices import check_epochs
from braindecode_vis.parts.audit.fits import check_refit
from braindecode_vis.parts.audit.material import check_captions
from braindecode_vis.parts.audit.recompute import RecomputedRun, open_recomputed
from braindecode_vis.parts.audit.results import (
    check_embedded,
    check_fits,
    check_images,
    check_out_of_fold,
    check_predictions,
    check_ranks,
)
from braindecode_vis.parts.audit.run import STEPS, audit_run
from braindecode_vis.parts.audit.scores import _compare_ceilings, check_report, check_scores
from braindecode_vis.parts.audit.synthetic_trials import check_synthetic_again
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.runs import open_run

QUICK = [
    "dataset.n_train=60", "dataset.n_test=20", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "encoder.alphas=[1,10,100]",
]  # fmt: skip
ALL = dict.fromkeys(("chain", "data", "fit", "choice", "prediction", "material", "score"), "recomputed")
#: Without ``--refit``, which alone preprocesses again.
QUICKLY = {**ALL, "data": "by record"}


def make_run(folder, *overrides, config="synthetic_digits"):
    run = open_run(read_config(config, [*QUICK, *overrides]), folder)
    pipeline.report(run)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The prior learns from predictions out of fold."""
    return make_run(
        tmp_path_factory.mktemp("results") / "clean", "target={kind: pca, n_components: 5}",
        "prior={kind: spread}",
    )  # fmt: skip


@pytest.fixture
def copied(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "run"))


def find_artifact(folder, stage):
    (path,) = (folder / "stages" / stage).glob("*")
    return path


def reseal(folder):
    """Give every artifact, and the scores and the page of a whole run, the digests of what lies there now."""
    for path in folder.glob(f"stages/*/*/{store.PROVENANCE}"):
        record = json.loads(path.read_text())
        store.write_provenance(path, {**record, "files": store.describe_files(path.parent)})
    if (folder / "report.html").exists():
        with store.record_results(folder, "scores.json", "scores.parquet", "report.html"):
            pass


def test_each_run_of_a_sweep_is_audited_and_one_without_scores_is_not_taken_for_another(copied, tmp_path):
    sweep, evaluated = tmp_path / "sweep", find_artifact(copied, "evaluate")
    rows = [
        {**row, "fingerprint": evaluated.name} for row in json.loads((evaluated / "scores.json").read_text())
    ]
    for name in ("first", "second", "unfinished"):
        (sweep / name).mkdir(parents=True)
        shutil.copy(copied / "config.yaml", sweep / name)
        (sweep / name / "stages").symlink_to("../stages")
        if name != "unfinished":
            (sweep / name / "scores.json").write_text(json.dumps(rows))
    (copied / "stages").rename(sweep / "stages")
    done = CliRunner().invoke(app, ["audit", str(sweep), "--json"])
    assert [Path(found["run_folder"]).name for found in json.loads(done.stdout)["audits"]] == [
        "first",
        "second",
    ]
    told = str(done.exception)
    assert told.startswith("1 of 3 runs")
    assert "unfinished shares its stages" in told
    with pytest.raises(DataError, match="holds 3 runs; give one of them"):
        audit_run(sweep)


def change_array(path, change):
    array = np.load(path)
    np.save(path, change(array).astype(array.dtype))


def take_step(folder, step, **options):
    """Make one check of those that compute again; return the run, which knows how it was verified, and the findings."""
    run = open_audited(folder, **options)
    with tempfile.TemporaryDirectory() as temporary:
        return run, step(run, open_recomputed(run, Path(temporary)))


# --- clean runs --------------------------------------------------------------------------------------------


def test_every_part_of_a_clean_run_is_verified_by_recomputing(clean):
    before = {path: path.stat().st_mtime_ns for path in clean.rglob("*")}
    audit = audit_run(clean)
    assert not audit.leaks, audit.leaks
    assert not [item for item in audit.findings if "again" in item.message and item.level == "warning"]
    assert {item.part: item.how for item in audit.list_status()} == QUICKLY
    assert {path: path.stat().st_mtime_ns for path in clean.rglob("*")} == before


def test_a_fit_that_poisoned_trials_gave_to_the_last_bit_is_not_made_once_more(clean, monkeypatch):
    monkeypatch.setattr(RecomputedRun, "compute", None)
    run = open_audited(clean, thorough=True)
    assert [item.level for item in check_refit(run)] == ["ok"]
    with tempfile.TemporaryDirectory() as temporary:
        assert check_fits(run, open_recomputed(run, Path(temporary))) == []
    assert {(item.part, item.how) for item in run.verified} == {
        ("fit", "recomputed"),
        ("choice", "recomputed"),
    }


@pytest.mark.parametrize("part, step", STEPS, ids=[step.__name__ for _, step in STEPS])
def test_no_step_finds_anything_in_a_clean_run(clean, part, step):
    run, found = take_step(clean, step)
    assert {item.level for item in found} <= {"ok"}, found
    assert {item.how for item in run.verified} <= {QUICKLY[part]}
    # What these look at is not in this run.
    absent = (check_epochs, check_captions, check_synthetic_again)
    assert part in {item.part for item in run.verified} or step in absent


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("split={kind: kfold, n_folds: 3}",), marks=pytest.mark.further),
        (
            "prior={kind: spread}",
            "generator={kind: nearest}",
            "repeats.test=single",
            "retrieval.centre=zscore",
        ),
        ("encoder={kind: lda}", "split={kind: kfold, n_folds: 3}"),
        ("encoder={kind: network_categories, epochs: 1, device: cpu}", "split={kind: kfold, n_folds: 2}"),
    ],
    ids=["folds", "prior", "classes", "network of classes"],
)
def test_other_clean_runs_pass_too(tmp_path, overrides):
    audit = audit_run(make_run(tmp_path / "run", *overrides))
    assert not audit.leaks, audit.leaks
    assert not [item for item in audit.findings if "again" in item.message and item.level == "warning"]


# --- forged ones -------------------------------------------------------------------------------------------


def mix_with_truth(folder):
    """Mix 5 % of the truth into the predictions, ranks being those of what comes out."""
    retrieved = find_artifact(folder, "retrieve") / "fold00"
    bank = store.read_embeddings(find_artifact(folder, "embed"))
    stored = store.read_embeddings(retrieved)
    truth = bank.select(list(stored.ids)).vectors
    change_array(retrieved / "vectors.npy", lambda vectors: 0.95 * vectors + 0.05 * truth)


def forge_ranks(folder):
    retrieved = find_artifact(folder, "retrieve")
    for name in ("n_above", "n_tied"):
        change_array(
            retrieved / "fold00" / f"{name}.npy", lambda array: np.where(np.arange(len(array)) == 3, 0, array)
        )
    made = pd.read_parquet(retrieved / "ranks.parquet")
    made.loc[3, ["rank", "worst_rank"]] = 1
    made.to_parquet(retrieved / "ranks.parquet", index=False)


def forge_scores(folder):
    """Raise one score by a hundredth, in both copies and in the page's table."""
    evaluated = find_artifact(folder, "evaluate")
    for path in (evaluated / "scores.json", folder / "scores.json"):
        rows = json.loads(path.read_text())
        for row in rows:
            if row["metric"] == "pixcorr" and row["method"] == "decoded":
                row["value"] += 0.01
        store.write_json(path, rows)
    pd.DataFrame(rows).to_parquet(folder / "scores.parquet", index=False)


def forge_items(folder):
    path = find_artifact(folder, "evaluate") / "items.parquet"
    pd.read_parquet(path).assign(pixcorr=1.0).to_parquet(path, index=False)


def forge_table(folder):
    table = pd.read_parquet(folder / "scores.parquet")
    table.loc[table["metric"] == "top1", "value"] = 1.0
    table.to_parquet(folder / "scores.parquet", index=False)


def forge_page(folder):
    path = folder / "report.html"
    page = path.read_text(encoding="utf-8")
    start = page.index('<section id="scores"')
    changed = re.sub(r'(class="num value">)[^<]+', r"\g<1>0.987", page[start:], count=1)
    path.write_text(page[:start] + changed, encoding="utf-8")


def replace_images(folder):
    """Put what was seen, or what the generator makes of it, in the place of every fourth decoded image."""
    images = find_artifact(folder, "reconstruct")
    rows = pd.read_parquet(images / "rows.parquet")
    chosen = np.arange(len(rows)) % 4 == 0
    if "decoded_id" in rows:  # a copy of a training image is named
        rows.loc[chosen, "decoded_id"] = rows.loc[chosen, "stimulus_id"]
        rows.to_parquet(images / "rows.parquet", index=False)
        return
    oracle, stored = np.load(images / "oracle.npy"), np.load(images / "decoded.npy")
    np.save(images / "decoded.npy", np.where(chosen[:, None, None, None], oracle, stored))


def replace_seen(folder):
    """Show a training image in the place of what was seen."""
    path = find_artifact(folder, "reconstruct") / "images.json"
    index = json.loads(path.read_text())
    index["methods"]["seen"]["ids"] = "nearest_id"
    store.write_json(path, index)


def forge_inner_errors(folder):
    path = find_artifact(folder, "train") / "ridge.json"
    content = json.loads(path.read_text())
    best = min(content["choices"], key=lambda choice: choice["mse"])
    best["mse"] *= 0.9
    store.write_json(path, content)


def forge_out_of_fold(folder):
    path = find_artifact(folder, "out_of_fold") / "vectors.npy"
    change_array(path, lambda vectors: 0.9 * vectors)


def forge_targets(folder):
    """Put predictions in the place of the target embeddings of tested images."""
    embedded = find_artifact(folder, "embed")
    stored = store.read_embeddings(find_artifact(folder, "retrieve") / "fold00")
    places = {
        str(name): row for row, name in enumerate(json.loads((embedded / "ids.json").read_text())["ids"])
    }
    vectors = np.load(embedded / "vectors.npy")
    for row, name in enumerate(stored.ids):
        vectors[places[str(name)]] = stored.vectors[row]
    np.save(embedded / "vectors.npy", vectors)


def shuffle_again(folder):
    """Shuffle the decoded images in another order than that of the seed."""
    path = find_artifact(folder, "reconstruct") / "rows.parquet"
    rows = pd.read_parquet(path)
    rows["shuffled_row"] = rows["shuffled_row"].to_numpy()[::-1]
    rows.to_parquet(path, index=False)


FORGED = [
    (mix_with_truth, check_predictions), (forge_ranks, check_ranks), (forge_scores, check_scores),
    (forge_items, check_scores), (forge_table, check_scores), (forge_page, check_report),
    (replace_images, check_images), (replace_seen, check_images), (forge_inner_errors, check_fits),
    (forge_out_of_fold, check_out_of_fold), (forge_targets, check_embedded), (shuffle_again, check_images),
]  # fmt: skip


@pytest.mark.parametrize(("forge", "step"), FORGED)
def test_what_was_forged_is_found_by_its_step_though_digests_were_made_again(copied, forge, step):
    forge(copied)
    reseal(copied)
    assert step in [one for _, one in STEPS]
    _, found = take_step(copied, step)
    assert {item.level for item in found} == {"leak"}
    assert all("tampered" in item.message for item in found)


def test_words_of_another_version_are_no_forgery(copied):
    """How a score words its protocol may change; its numbers may not."""
    evaluated = find_artifact(copied, "evaluate")
    for path in (evaluated / "scores.json", copied / "scores.json"):
        rows = json.loads(path.read_text())
        store.write_json(path, [{**row, "protocol": "as it was called once"} for row in rows])
    rows = [{**row, "protocol": "as it was called once"} for row in rows]
    pd.DataFrame(rows).to_parquet(copied / "scores.parquet", index=False)
    reseal(copied)
    _, (found,) = take_step(copied, check_scores)
    assert (found.level, "as it was called once" in found.message) == ("warning", True)


@pytest.mark.parametrize(("thorough", "n"), [(False, 7), (True, 80)])
def test_so_many_images_are_embedded_again(clean, monkeypatch, thorough, n):
    monkeypatch.setattr("braindecode_vis.parts.audit.results.MOST_EMBEDDED", 7)
    run, _ = take_step(clean, check_embedded, thorough=thorough)
    assert [item.what for item in run.verified] == [f"target embeddings of {n} image(s)"]


def test_dear_scores_alone_are_left_to_the_record(copied, monkeypatch):
    """With one metric that looks through a network the others are scored again, single items included."""
    monkeypatch.setattr("braindecode_vis.parts.audit.scores._score_cheaply", lambda again: False)
    evaluated = find_artifact(copied, "evaluate")
    rows = json.loads((evaluated / "scores.json").read_text())

    def look():
        reseal(copied)
        run, found = take_step(copied, check_scores)
        return [item.level for item in found], {(item.how, item.what) for item in run.verified}

    assert look() == (["ok"], {("recomputed", f"{len(rows)} scores")})
    for path in (evaluated / "scores.json", copied / "scores.json"):
        told = json.loads(path.read_text())
        told.append({**told[0], "metric": "two_way_identification@net", "noise_ceiling": None})
        store.write_json(path, told)
    pd.DataFrame(told).to_parquet(copied / "scores.parquet", index=False)
    levels, verified = look()
    assert (levels, ("by record", "scores of 1 metric(s): two_way_identification@net") in verified) == (
        ["ok"],
        True,
    )
    forge_items(copied)
    assert look()[0] == ["leak"]


def test_the_table_is_not_blamed_for_scores_that_were_forged(copied):
    """The untouched scores.parquet was called tampered, since it was compared with the forged scores.json."""
    table = (copied / "scores.parquet").read_bytes()
    path = copied / "scores.json"
    rows = json.loads(path.read_text())
    store.write_json(path, [{**row, "value": row["value"] + 0.01} for row in rows])
    reseal(copied)
    assert [item.where for item in audit_run(copied).leaks] == ["scores.json"]
    forge_scores(copied)
    (copied / "scores.parquet").write_bytes(table)
    reseal(copied)
    assert "scores.parquet" not in {item.where for item in audit_run(copied).leaks}


def test_a_page_that_is_gone_is_told(copied):
    """The audit said nothing of a report that the run had written and somebody removed."""
    (copied / "report.html").unlink()
    _, (found,) = take_step(copied, check_report)
    assert (found.level, "is missing" in found.message) == ("warning", True)


def test_a_page_that_was_changed_is_found_by_its_digest(copied):
    forge_page(copied)
    (leak,) = audit_run(copied).leaks
    assert (leak.check, leak.where) == ("chain", "report.html")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("stages/evaluate/*/scores.json", "[]"),
        ("stages/evaluate/*/scores.json", '[{"metric": NaN}]'),
        ("stages/evaluate/*/scores.json", '"a text"'),
        ("stages/retrieve/*/fold00/retrieval.json", "{}"),
        ("stages/retrieve/*/fold00/retrieval.json", '{"query_ids": "text", "gallery_ids": 3}'),
        ("stages/reconstruct/*/rows.parquet", "no table"),
        ("scores.parquet", "no table"),
        ("report.html", ""),
        ("provenance.json", "[1, 2]"),
    ],
)
def test_damaged_files_are_findings_and_no_traceback(copied, name, content):
    (path,) = copied.glob(name)
    path.write_text(content)
    assert [item for item in audit_run(copied).findings if item.level in ("leak", "warning")]


@pytest.mark.slow
def test_a_target_of_attributes_is_scored_and_audited(tmp_path):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    table = pd.DataFrame({"concept": names, "round": [1, 0, 0, 1, 0, 0, 1, 0, 1, 1], "even": [1, 0] * 5})
    table.to_csv(tmp_path / "table.csv", index=False)
    target = f"{{kind: conditional, attributes: {tmp_path}/table.csv, base: {{kind: pixels}}}}"
    folder = make_run(
        tmp_path / "run", f"target={target}", "generator={kind: nearest}", "prior={kind: identity}"
    )
    scores = json.loads((folder / "scores.json").read_text())
    metric = "balanced_accuracy"
    found = {row["metric"]: row for row in scores if row["method"] == "decoded" and metric in row["metric"]}
    assert {f"{metric}@round", f"{metric}@even"} <= set(found)
    assert found[f"{metric}@round"]["value"] > found[f"{metric}@round"]["chance"] + 0.2
    assert found[f"{metric}@round"]["resampled"].endswith(" concepts (t)")
    audit = audit_run(folder)
    assert [item.message for item in audit.leaks] == []


@pytest.mark.slow
def test_heads_that_saw_tested_images_are_found(tmp_path, monkeypatch):
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    table = pd.DataFrame({"concept": names, "round": [1, 0, 0, 1, 0, 0, 1, 0, 1, 1]})
    table.to_csv(tmp_path / "table.csv", index=False)
    honest = ConditionalEncoder.embed

    def embed_leaky(self, stimuli, training_ids, embed_cached):
        return honest(self, stimuli, stimuli.ids, embed_cached)

    with monkeypatch.context() as leaky:
        leaky.setattr(ConditionalEncoder, "embed", embed_leaky)
        folder = make_run(
            tmp_path / "run",
            f"target={{kind: conditional, attributes: {tmp_path}/table.csv, base: {{kind: pixels}}}}",
            "generator={kind: nearest}", "prior={kind: identity}",
        )  # fmt: skip
    found = audit_run(folder, refit=True)
    assert any("target embedding" in item.message for item in found.leaks)


@pytest.mark.parametrize(
    ("metric", "is_measured"),
    [
        ("brain_correlation", True), ("brain_correlation@V1", True), ("top1", False), ("ssim@425", False),
    ],
)  # fmt: skip
def test_ceilings_that_a_run_measures_are_compared(metric, is_measured):
    told = [{"metric": "top5", "noise_ceiling": 0.9}, {"metric": metric, "noise_ceiling": 0.5}]
    made = [{"metric": "top5", "noise_ceiling": 0.8}, {"metric": metric, "noise_ceiling": 0.6}]
    words = f"the ceiling of {metric} is 0.5, and 0.6 when it is measured again"
    assert _compare_ceilings(told, made) == (words if is_measured else "")
    assert _compare_ceilings(told, told) == ""
