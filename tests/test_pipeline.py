"""The whole sentence on the synthetic digits, which need no files."""

import json
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.arrays import SCORE_KEYS
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import hash_pixels
from braindecode_vis.config import read_config
from braindecode_vis.datasets import synthetic_digits
from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
from braindecode_vis.pipeline.decoding import name_retrieval
from braindecode_vis.pipeline.learning import pick_test_trials
from braindecode_vis.pipeline.preparing import check_learnt
from braindecode_vis.pipeline.reconstruction import describe_same_draws
from braindecode_vis.pipeline.runs import SilentListener, open_run, read_run_scores, read_scores
from braindecode_vis.pipeline.scoring import describe_choices, make_scoring_task
from braindecode_vis.pipeline.summary import count_trials, describe_ceilings, describe_result
from braindecode_vis.preprocessing.splits import Fold
from tests.killing import Nursery

SMALL = [
    "dataset.n_train=120",
    "dataset.n_test=24",
    "evaluation.n_bootstrap=500",
    "evaluation.n_permutations=500",
]


def make_run(folder, *overrides, source="synthetic_digits"):
    return open_run(read_config(source, [*SMALL, *overrides]), folder)


def find(rows, metric, method="decoded"):
    (row,) = [row for row in rows if row["metric"] == metric and row["method"] == method]
    return row


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, pipeline.run_all(make_run(folder))


def test_a_run_leaves_its_scores_report_and_provenance(finished):
    folder, rows = finished
    assert json.loads((folder / "scores.json").read_text()) == rows
    table = pd.read_parquet(folder / "scores.parquet")
    assert list(table.columns) == list(SCORE_KEYS)
    assert table["value"].tolist() == [row["value"] for row in rows]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {"config", "seed", "versions", "git_revision", "inputs", "stages", "command"} <= provenance.keys()
    assert {"preprocess", "embed", "train fold00", "retrieve", "reconstruct"} == provenance["stages"].keys()
    page = (folder / "report.html").read_text()
    assert 'src="http' not in page
    assert "Two-way identification" in page
    top1 = next(row for row in rows if (row["metric"], row["method"]) == ("top1", "decoded"))
    hits = round(24 * top1["value"])
    assert f"the seen image is first of 24 in {hits} of 24 cases ({100 * top1['value']:.0f} %" in page
    assert "guessing: 1." in page
    assert "1 subject; 144 trials kept (24 tested), the data set does not say how many were dropped." in page
    differences = json.loads((folder / "differences.json").read_text())
    named = {(row["metric"], row["control"]) for row in differences}
    assert {("pixcorr", "mean_image"), ("pixcorr", "nearest"), ("mse", "class_mean")} <= named
    assert "none: the trials have no order and no duration" in page


def test_every_score_can_be_read_on_its_own(finished):
    _, rows = finished
    for row in rows:
        assert row["n_queries"] == 24
        assert row["chance"] is not None
        assert "published split (120 train / 24 test trials)" in row["protocol"]
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert len(row["fingerprint"]) == 16


def test_images_that_the_run_has_embedded_are_not_encoded_again(tmp_path):
    """Encoding seen and copied pictures again took 29 of the 54 s of an `evaluate` of 1000 images."""
    changes = ["target={kind: pixels}", "generator={kind: nearest}", "evaluation.features={kind: pixels}"]
    task, _ = make_scoring_task(make_run(tmp_path, *changes))
    known, encode = task.known_features, task.feature_encoder.encode
    for images in (task.seen, task.images["decoded"], task.images["oracle"]):
        np.testing.assert_allclose(encode(images), [known[hash_pixels(image)] for image in images], atol=1e-6)
    other = make_scoring_task(make_run(tmp_path, "target={kind: pca}", *changes[1:]))[0]
    assert not other.known_features  # the run has embedded them by something else


def test_controls_bound_the_system(finished):
    _, rows = finished
    decoded = find(rows, "pixcorr")["value"]
    assert find(rows, "pixcorr", "mean_image")["value"] < decoded < find(rows, "pixcorr", "oracle")["value"]
    assert find(rows, "pixcorr", "oracle")["value"] > 0.999
    assert find(rows, "two_way_identification", "shuffled")["value"] == pytest.approx(
        0.5, abs=0.2
    )  # 24 items
    assert find(rows, "two_way_identification")["p_value"] < 0.01


def test_nothing_is_computed_twice_and_the_reason_is_told(finished):
    folder, rows = finished

    class Listener(SilentListener):
        told = []

        def finished(self, stage, artifact, seconds):
            self.told.append((stage, artifact.reused, artifact.reason))

    before = (folder / "report.html").stat().st_mtime_ns
    again = open_run(read_config("synthetic_digits", SMALL), folder, Listener())
    assert pipeline.run_all(again) == rows
    assert all(reused for _, reused, _ in Listener.told)
    assert (folder / "report.html").stat().st_mtime_ns == before

    Listener.told.clear()
    changed = read_config("synthetic_digits", [*SMALL, "encoder.alphas=[100, 1000]"])
    pipeline.run_all(open_run(changed, folder, Listener()))
    told = {stage: (reused, reason) for stage, reused, reason in Listener.told}
    assert told["embed"][0]
    assert not told["train fold00"][0]
    assert told["train fold00"][1].startswith("encoder.alphas:")
    assert told["retrieve"][1] == "train0 changed"


def test_same_seed_same_numbers_and_another_none_yet(finished, tmp_path):
    _, rows = finished
    assert pipeline.run_all(make_run(tmp_path / "again")) == rows
    assert read_run_scores(make_run(tmp_path / "again")) == rows
    assert read_run_scores(make_run(tmp_path / "again", "seed=7")) == []


def test_at_snr_zero_the_system_is_at_chance(tmp_path):
    rows = pipeline.run_all(make_run(tmp_path, "dataset.snr=0"))
    for metric in ("top5", "two_way_identification", "4_way"):
        row = find(rows, metric)
        assert row["ci_low"] <= row["chance"] <= row["ci_high"], row
    assert find(rows, "two_way_identification")["p_value"] > 0.01


def test_at_high_snr_the_system_is_near_one(tmp_path):
    rows = pipeline.run_all(make_run(tmp_path, "dataset.snr=1000", "dataset.n_train=400"))
    assert find(rows, "top1")["value"] > 0.9
    assert find(rows, "pixcorr")["value"] > 0.95


@pytest.mark.parametrize(
    "overrides",
    [
        ["split={kind: kfold, n_folds: 3}", "target={kind: pca, n_components: 10}"],
        ["split={kind: kfold, n_folds: 3}"],
        ["target={kind: pca, n_components: 10}", "generator={kind: nearest}"],
        ["generator={kind: latents, contrast: none}", "repeats={train: single, test: single}"],
        ["encoder={kind: network, epochs: 8, batch_size: 32}"],
    ],
    ids=["a space per fold", "a space for all folds", "nearest", "single trials", "network"],
)
def test_other_components_run(tmp_path, overrides):
    rows = pipeline.run_all(make_run(tmp_path, *overrides))
    expected = 144 if "kfold" in overrides[0] else 24
    top = find(rows, "top1")
    assert top["n_queries"] == expected
    assert top["gallery_size"] == (48 if expected == 144 else expected)  # of the fold
    assert find(rows, "two_way_identification")["value"] > 0.6


def test_a_prior_may_know_the_images_of_another_run_but_no_tested_one(finished, tmp_path):
    (bank,) = (finished[0] / "stages" / "embed").iterdir()
    run = make_run(tmp_path, f"prior={{kind: neighbours, images: {bank}}}")
    artifact = pipeline.reconstruct(run).artifact
    (chosen,) = store.read_json(artifact.path / store.PROVENANCE)["chosen"]
    assert chosen["prior"] == {"n_images": 120}  # of 144


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ("{kind: identity}", []),
        ("{kind: neighbours}", ["images from embeddings 50 % of the way to the prior's"]),
        ("{kind: diffusion, select: best_of}", ["images from the best of 16 draws"]),
        (
            "{kind: diffusion, select: mean, candidates: 4, pull: 0.25}",
            ["images from the mean of 4 draws", "images from embeddings 25 % of the way to the prior's"],
        ),
    ],
)
def test_the_protocol_names_what_a_prior_does_beside_one_draw(tmp_path, prior, words):
    assert describe_choices(make_run(tmp_path, f"prior={prior}").config) == words


def test_a_common_gallery_needs_a_common_space(tmp_path):
    overrides = [
        "split={kind: kfold, n_folds: 3}",
        "target={kind: pca, n_components: 10}",
        "retrieval.gallery=all",
    ]
    with pytest.raises(DataError, match=r"set retrieval\.gallery to fold"):
        pipeline.retrieve(make_run(tmp_path, *overrides))


def test_poisoned_test_trials_change_no_fitted_statistic(tmp_path):
    """Multiplying the responses of the test trials by a thousand must leave every trained weight as it was."""
    clean = pipeline.train(make_run(tmp_path / "clean"))[0].encoder.fitted
    poisoned_run = make_run(tmp_path / "poisoned")
    prepared = pipeline.preprocess(poisoned_run)
    data = np.array(prepared.responses.data)
    data[120:] *= 1000
    poisoned_run.seen["preprocess"] = replace(prepared, responses=replace(prepared.responses, data=data))
    poisoned = pipeline.train(poisoned_run)[0].encoder.fitted
    np.testing.assert_array_equal(poisoned.weights, clean.weights)
    np.testing.assert_array_equal(poisoned.zscore.mean, clean.zscore.mean)
    assert poisoned.choices == clean.choices


def test_columns_are_chosen_on_training_trials_and_kept_beside_the_encoder(tmp_path):
    run = make_run(tmp_path, "selection.encoding={n_best: 20}", "encoder.alphas=[10]")
    (fold,) = pipeline.train(run)
    assert fold.selection is not None
    (chosen,) = fold.selection.keep.values()
    assert chosen.sum() == 20
    assert pick_test_trials(run, 0).data.shape[1] == 20
    assert find(pipeline.run_all(run), "top1")["value"] > 0.3
    again = make_run(tmp_path, "selection.encoding={n_best: 20}", "encoder.alphas=[10]")
    np.testing.assert_array_equal(pipeline.train(again)[0].selection.keep[""], chosen)


@pytest.mark.further
def test_one_image_a_fold_has_a_null_of_refits(tmp_path):
    """With a single test image in a fold, nothing can be swapped inside it: images are relabelled before folding."""
    overrides = [
        "dataset.n_train=20",
        "dataset.n_test=4",
        "split={kind: kfold, n_folds: 24, stratify: false}",
    ]
    run = make_run(tmp_path, *overrides, "encoder.alphas=[100]", "evaluation.n_permutations=100")
    rows = pipeline.run_all(run)
    assert find(rows, "mean_rank")["p_value"] < 0.05
    top1 = find(rows, "top1")
    assert "which holds training images of each fold, so that ranks lie below chance" in top1["protocol"]
    assert " refits on relabelled images in retrieval" in top1["protocol"]
    assert top1["chance"] < 1 / 24
    identified = find(rows, "two_way_identification")
    assert identified["p_value"] is None
    assert identified["ci_low"] > 0.5
    assert any("every fold tests one image" in words for words in run.seen["not computed"])


def test_a_collapsed_encoder_scores_at_chance(tmp_path):
    rows = pipeline.run_all(make_run(tmp_path, "encoder.alphas=[1.0e30]"))
    assert find(rows, "2_way")["value"] == pytest.approx(0.5)
    assert find(rows, "top1")["value"] == 0


def test_a_coarse_target_does_not_make_the_task_easier(tmp_path):
    coarse = pipeline.reconstruct(make_run(tmp_path, "target.size=4"))
    assert coarse.seen.shape[1:3] == (8, 8)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """A process that has imported what commands need, and forks."""
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


def kill_when_it_appears(nursery, words, folder, pattern):
    """Start a command and kill it with SIGKILL as soon as its folder has a certain file; whether it was caught."""
    pid, code = nursery.start(words, folder.with_name("cache")), None
    while (code := nursery.poll(pid)) is None:
        if list(folder.glob(pattern)):
            os.kill(pid, signal.SIGKILL)
            code = nursery.wait(pid)
            break
        time.sleep(0.0005)
    return code == -signal.SIGKILL


@pytest.mark.further
def test_a_run_killed_in_every_stage_ends_like_an_uninterrupted_one(finished, tmp_path, nursery):
    _, rows = finished
    out = tmp_path / "run"
    words = ["run", "synthetic_digits", "--out", out, *(part for text in SMALL for part in ("--set", text))]
    killed = [
        kill_when_it_appears(nursery, words, out, f"stages/{stage}/.tmp-*") for stage in pipeline.STAGES[:-1]
    ]
    assert sum(killed) >= 4  # a stage can be too quick to be caught
    assert nursery.run(words, tmp_path / "cache") == 0, nursery.said
    assert read_scores(out) == rows
    assert not list(out.rglob(".tmp-*"))


def test_a_network_killed_in_its_training_goes_on_where_it_was(tmp_path, nursery):
    network = "{kind: network, epochs: 6, batch_size: 16, checkpoint_seconds: 0}"
    overrides = [*SMALL, f"encoder={network}"]
    whole = make_run(tmp_path / "whole", overrides[-1])
    expected = pipeline.retrieve(whole).folds[0].predicted.vectors
    out = tmp_path / "killed"
    words = [
        "retrieve",
        "synthetic_digits",
        "--out",
        out,
        *(part for text in overrides for part in ("--set", text)),
    ]
    assert kill_when_it_appears(nursery, words, out, "work/*/checkpoint.safetensors"), nursery.said
    assert list(out.glob("work/*/checkpoint.safetensors"))
    resumed = make_run(out, overrides[-1])
    np.testing.assert_array_equal(pipeline.retrieve(resumed).folds[0].predicted.vectors, expected)
    assert not (out / "work").exists()


@pytest.mark.shared
def test_digits69_reaches_its_numbers(shared, tmp_path):
    """The bars of a plain ridge on the published split: 0.787, 0.0385 and 0.93."""
    config = read_config("digits69_ridge", root=shared / "data/digits69")
    rows = pipeline.run_all(open_run(config, tmp_path))
    assert find(rows, "pixcorr")["value"] >= 0.787
    assert find(rows, "mse")["value"] <= 0.0385
    assert find(rows, "two_way_identification")["value"] >= 0.93
    assert find(rows, "pixcorr", "mean_image")["value"] == pytest.approx(0.655, abs=0.002)
    assert find(rows, "mse", "mean_image")["value"] == pytest.approx(0.0547, abs=2e-4)
    assert find(rows, "accuracy")["value"] == 1.0


@pytest.mark.further
@pytest.mark.shared
def test_digits69_ten_folds_reach_their_numbers(shared, tmp_path):
    config = read_config("digits69_ridge_10fold", root=shared / "data/digits69")
    rows = pipeline.run_all(open_run(config, tmp_path))
    assert find(rows, "pixcorr")["value"] >= 0.74
    assert find(rows, "pixcorr")["ci_low"] > find(rows, "pixcorr", "class_mean")["value"]
    within = find(rows, "two_way_identification_within_class")
    assert within["value"] >= 0.80
    assert within["ci_low"] > 0.5


def test_scores_of_an_empty_folder_are_none(tmp_path):
    assert read_scores(tmp_path) == []
    assert store.RunFolder(tmp_path).path == tmp_path


def test_captions_responses_and_ceilings_are_switches_of_the_run(tmp_path):
    """What can be computed becomes rows; what lacks weights or repetitions is said in the report, not left out."""
    run = make_run(tmp_path / "bare")
    lines = [
        f"{i},a drawing of {c}"
        for i, c in pipeline.preprocess(run).stimuli.table[["stimulus_id", "concept"]].values
    ]
    (tmp_path / "bank.csv").write_text("\n".join(["id,caption", *lines]))
    overrides = [
        f"evaluation.captions={{bank: {tmp_path / 'bank.csv'}, device: cpu}}",
        "evaluation.brain={features: {kind: pixels}}",
        "evaluation.noise_ceiling=ncsnr",
        "reconstruction.n_draws=2",
        f"reconstruction.captions=[{{kind: coca, bank: {tmp_path / 'bank.csv'}, epochs: 6, width: 16, depth: 2, "
        "n_queries: 2, learning_rate: 1.0e-2, batch_size: 16, device: cpu}]",
    ]  # fmt: skip
    rows = pipeline.run_all(make_run(tmp_path / "run", *overrides))
    assert 0.2 < find(rows, "rouge1@coca")["value"] <= 1
    assert find(rows, "rouge1@coca", "oracle")["n_queries"] == find(rows, "rouge1@coca")["n_queries"]
    caption, oracle = (find(rows, "rouge1@nearest-caption", method) for method in ("decoded", "oracle"))
    assert caption["chance"] < caption["value"] <= 1
    assert oracle["value"] >= caption["value"] - 0.1
    brain, seen = (find(rows, "brain_correlation@all", method) for method in ("decoded", "seen"))
    assert abs(brain["chance"]) < 0.1 < brain["ci_low"]
    assert seen["value"] > 0.3
    assert caption["p_value"] < 0.05
    assert brain["p_value"] < 0.05
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("noise ceiling of the responses (ncsnr) not computed", "sentence_similarity not computed"):
        assert text in page
    assert "a drawing of" in page
    assert " (coca) | a drawing of" in page
    assert pipeline.run_all(make_run(tmp_path / "run", *overrides)) == rows


def test_noise_ceilings_are_a_section_of_the_report():
    rows = [{"subject": "01", "columns": 3, "ceiling": 0.4}]
    (section,) = describe_ceilings(rows)
    assert "Noise ceiling" in section.title
    assert describe_ceilings(None) == describe_ceilings([]) == []


@pytest.mark.parametrize("overrides", [(), ("reconstruction.n_draws=3", "evaluation.best_of=true")])
def test_a_single_test_image_is_scored_for_what_it_can_tell(tmp_path, monkeypatch, overrides):
    """The report compared it with "all 1 candidate images", and showed the image itself as that of a shuffled brain."""
    make = synthetic_digits.make_synthetic_digits

    def make_one(config, *, seed):
        responses, stimuli = make(config, seed=seed)
        return responses.select(np.arange(config.n_train + 1)), stimuli

    monkeypatch.setattr(synthetic_digits, "make_synthetic_digits", make_one)
    run = make_run(tmp_path / "run", *overrides)
    rows = pipeline.run_all(run)
    assert all(np.isfinite(row["value"]) for row in rows)
    assert find(rows, "pixcorr")["chance"] is None
    assert not any("identification" in row["metric"] for row in rows)
    assert "shuffled" not in pipeline.reconstruct(run).images
    assert find(rows, "mean_rank")["protocol"].count("gallery of 1 exact test image;") == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "There is one candidate image" in page
    assert "there is only one test image; its rank is always 1" in page
    for wrong in ("all 1 ", "1 queries", "1 items", "1 exact test images"):
        assert wrong not in page


def test_draws_that_are_all_the_same_are_named(tmp_path):
    """Several draws of a prior and a generator without noise looked like certainty."""

    class Listener(SilentListener):
        told = []

        def watch(self, description):
            return nullcontext(lambda done, total, text: self.told.append(text))

    config = read_config("synthetic_digits", [*SMALL, "reconstruction.n_draws=2", "prior.kind=spread"])
    pipeline.run_all(open_run(config, tmp_path / "run", Listener()))
    sentence = "the 2 draws of every image are identical: neither the prior spread nor the generator latents"
    assert any(text.startswith(sentence) for text in Listener.told)
    assert sentence in (tmp_path / "run" / "report.html").read_text()
    noise = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 3), dtype=np.uint8)
    assert describe_same_draws(config, noise) == ""
    assert describe_same_draws(config, noise[:, :1]) == describe_same_draws(config, noise[:, 0]) == ""


def test_whitening_by_trials_that_a_fold_tests_is_refused_once_the_split_is_known():
    """Without images leave-one-subject-out tests all trials of a subject, which had been whitened with themselves."""
    trials = pd.DataFrame({"split": ["train", "train", "test"]})
    config = SimpleNamespace(
        dataset=ThingsEeg2Config(mvnn="epochs"),
        split=SimpleNamespace(kind="leave_one_subject_out"),
    )
    check_learnt(config, SimpleNamespace(folds=[Fold(np.array([0, 1]), np.array([2]))]), trials)
    with pytest.raises(
        ConfigError, match=r"dataset\.mvnn learns from trials .* 'leave_one_subject_out' tests"
    ):
        check_learnt(config, SimpleNamespace(folds=[Fold(np.array([0]), np.array([1, 2]))]), trials)


def test_the_page_of_categories_says_how_often_the_class_is_named(tmp_path):
    trials = pd.DataFrame({"subject": ["01"] * 4})
    responses = SimpleNamespace(
        dims=("trial", "channel", "time"), data=np.zeros((4, 3, 2)), coords={}, trials=trials
    )
    artifact = store.Artifact(tmp_path, "0", True, "")
    prepared = SimpleNamespace(
        artifact=artifact, responses=responses, folds=(Fold(np.arange(2), np.arange(2, 4)),)
    )
    items = pd.DataFrame({"label": ["a", "b", "b", "a"], "decoded": ["a", "b", "a", "a"]})
    row = {"method": "decoded", "split": "test", "metric": "accuracy", "subject": "01", "value": 0.75}
    row |= {"ci_low": None, "ci_high": None, "chance": 0.5}
    assert describe_result(prepared, [row], items) == (
        "From 3-channel recordings, the class that was seen, one of 2, is named in 3 of 4 trials (75 %); guessing: 2."
    )
    said = "1 subject; 4 trials kept (2 tested), "
    assert count_trials(prepared) == f"{said}the data set does not say how many were dropped."
    (tmp_path / "responses").mkdir()
    noted = {"provenance": {"dropped": [{}, {}], "n_targets_dropped": 3}}
    store.write_json(tmp_path / "responses" / "meta.json", noted)
    assert count_trials(prepared) == f"{said}5 dropped."


@pytest.mark.parametrize(
    ("split", "gallery"),
    [
        ("{kind: published}", "auto"),
        ("{kind: kfold, n_folds: 3}", "fold"),  # eight images in each
        ("{kind: kfold, n_folds: 6}", "auto"),  # four: those of all folds, as before
    ],
)
def test_what_a_gallery_is_by_default_enters_the_fingerprint_where_it_is_new(tmp_path, split, gallery):
    """One published split keeps its artifacts; folds that ranked among all images by default get others."""
    few = ["dataset.n_train=20", "dataset.n_test=4", "encoder.alphas=[10]"]
    run = make_run(tmp_path, *few, f"split={split}")
    assert name_retrieval(run)[0]["retrieval"]["gallery"] == gallery
