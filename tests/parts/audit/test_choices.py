"""Choices are made again: what inner folds said, what networks score on held-out images, and networks themselves."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.config import read_config
from braindecode_vis.parts.audit import choices
from braindecode_vis.parts.audit.choices import describe_advantage
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.leaks.findings import Verified
from braindecode_vis.pipeline.leaks.run_files import Record
from braindecode_vis.pipeline.learning import predict_out_of_fold
from braindecode_vis.pipeline.runs import open_run
from tests.parts.audit.test_audit import QUICK, find, find_artifact, reseal

NETWORK = (
    "encoder={kind: network, network: {kind: residual_mlp, hidden: 32, n_blocks: 1}, epochs: 12, "
    "selection: {kind: early_stopping, patience: 3, hold_out: 0.2}}"
)

AUTO = (
    "encoder={kind: auto, budget: 100, n_inner_folds: 3, candidates: [{kind: ridge, alphas: [1, 10]}, "
    "{kind: ridge, alphas: [1.0e+6]}]}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a finished training of each encoder."""
    folders = {}
    for name, changes in {
        "ridge": ["encoder.alphas=[1,10,100]", "encoder.n_features=[6,12,null]"],
        "network": [NETWORK],
        "auto": [AUTO],
    }.items():
        folders[name] = tmp_path_factory.mktemp("choices") / name
        overrides = [*QUICK[:-1], "target={kind: pixels, size: 8}", *changes]
        predict_out_of_fold(open_run(read_config("synthetic_digits", overrides), folders[name]))
    return folders


@pytest.fixture
def copy(made, tmp_path):
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def edit(folder, name, change):
    artifact = find_artifact(folder, "train")
    content = store.read_json(artifact / name)
    store.write_json(artifact / name, change(content) or content)
    reseal(artifact)
    return folder


def get_status(audit, part):
    return next(item for item in audit.list_status() if item.part == part)


def test_choices_of_ridge_are_made_again_without_being_asked(made):
    audit = audit_run(made["ridge"])
    assert not audit.leaks
    assert get_status(audit, "choice").how == "recomputed"
    assert "weights" in get_status(audit, "fit").recomputed


def test_the_encoder_that_was_chosen_among_several_is_chosen_again(made):
    audit = audit_run(made["auto"], refit=True)
    assert not audit.leaks
    assert "encoder, by inner folds" in get_status(audit, "choice").recomputed
    assert "encoders and penalties are the best" in str(find(audit, "choices", level="ok"))


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (lambda record: record.update(chosen=1 - record["chosen"]), "choices", "is in use, but the inner folds chose"),
        (lambda record: record["candidates"][0].update(mean=0.99), "choices", "the inner score of ridge is 0.99, but"),
        (
            lambda record: record["candidates"][1].update(left_out="it would have taken long", by="budget"),
            "choices", "the inner score of ridge is",
        ),
    ],
)  # fmt: skip
def test_a_rewritten_choice_among_encoders_is_found(copy, change, check, words):
    leaks = find(audit_run(edit(copy("auto"), "auto.json", change)), check)
    assert any(words in leak.message for leak in leaks)


def test_a_rewritten_error_of_an_inner_fold_is_found(copy):
    def change(content):
        content["choices"][0]["mse"] *= 1.01

    (leak,) = find(audit_run(edit(copy("ridge"), "ridge.json", change)), "fits")
    assert "ridge.json" in leak.message


def test_a_number_of_features_that_the_inner_folds_did_not_choose_is_found(copy):
    def change(content):
        sizes = {choice["n_features"] for choice in content["choices"]} - {None, content["n_kept"]}
        best = min(content["choices"], key=lambda choice: choice["mse"])
        best["n_features"] = sizes.pop()

    assert find(audit_run(edit(copy("ridge"), "ridge.json", change)), "choices")


def test_out_of_fold_predictions_that_know_their_image_are_found(copy):
    folder = copy("ridge")
    artifact = find_artifact(folder, "out_of_fold")
    kept = store.read_embeddings(artifact)
    bank = store.read_embeddings(find_artifact(folder, "embed")).select(list(kept.ids))
    np.save(artifact / "vectors.npy", 0.9 * kept.vectors + 0.1 * bank.vectors)
    reseal(artifact)
    (leak,) = find(audit_run(folder), "out-of-fold")
    assert "one of a fit that has not seen it" in leak.message


def test_a_network_is_trained_again_and_its_validation_is_that_of_the_best_epoch(made):
    audit = audit_run(made["network"], refit=True)
    assert not audit.leaks
    assert get_status(audit, "fit").how == get_status(audit, "choice").how == "recomputed"


def test_weights_of_another_epoch_than_validation_chose_are_found(made, tmp_path):
    """The curve is right, the weights are the last ones: what the best epoch on the test would leave behind."""
    overrides = [
        *QUICK[:-1],
        "target={kind: pixels, size: 8}",
        NETWORK.replace("early_stopping, patience: 3", "last"),
    ]
    other = tmp_path / "other"
    pipeline.train(open_run(read_config("synthetic_digits", [*overrides, "encoder.epochs=2"]), other))
    folder = Path(shutil.copytree(made["network"], tmp_path / "run"))
    artifact = find_artifact(folder, "train")
    shutil.copy(find_artifact(other, "train") / "network.safetensors", artifact / "network.safetensors")
    reseal(artifact)
    (leak,) = find(audit_run(folder), "validation")
    assert "weights" in leak.message


def test_a_validation_curve_that_was_rewritten_is_found(copy):
    def change(content):
        for entry in content["history"]:
            entry["validation_loss"] *= 0.5

    (leak,) = find(audit_run(edit(copy("network"), "network.json", change)), "validation")
    assert "weights are not those of epoch" in leak.message


def test_held_out_images_are_scored_at_the_place_of_the_chosen_epoch_in_the_training(monkeypatch, tmp_path):
    """Objectives whose weight changes along the training give another loss at another place."""
    history = [{"validation_loss": loss} for loss in (3.0, 1.0, 2.0)]
    store.write_json(tmp_path / "network.json", {"held_out": ["i1"], "history": history})
    encoder = {"epochs": 8, "selection": {"kind": "early_stopping", "monitor": "loss"}}
    seen = []

    def score(responses, targets, *, rows, progress):
        seen.append(progress)
        return {"validation_loss": 1.0, "n_validation_images": 1}

    network = SimpleNamespace(hold_out=lambda responses, rows: ([0], [1]), score_held_out=score)
    responses = SimpleNamespace(stimulus_ids=np.array(["i0", "i1"], dtype=object), n_trials=2)
    monkeypatch.setattr(choices.learning, "pick_training", lambda again, number: (responses, None))
    monkeypatch.setattr(choices.learning, "train", lambda again: [SimpleNamespace(encoder=network)])
    run = SimpleNamespace(
        trained=[Record(tmp_path, {"fields": {"encoder": encoder}})], state=lambda *words: None
    )
    again = SimpleNamespace(
        config=SimpleNamespace(decodes_categories=False),
        encoder=SimpleNamespace(trains_in_processes=True, reads_text=False),
    )
    (found,) = choices.check_epochs(run, again)
    assert (found.level, seen) == ("ok", [2 / 8])


@pytest.mark.parametrize(
    ("weights", "how"),
    [(["recomputed"], "recomputed"), (["recomputed", "by record"], "by record"), ([], "by record")],
)
def test_epochs_of_networks_that_held_nothing_out_are_known_once_they_are_trained_again(
    monkeypatch, tmp_path, weights, how
):
    """Of a network of classes the audit said that no check looked at its choices, also after it was trained again."""
    store.write_json(tmp_path / "network.json", {"held_out": [], "history": [{"loss": 1.0}]})
    monkeypatch.setattr(choices.learning, "train", lambda again: [None])
    told = []
    run = SimpleNamespace(
        trained=[Record(tmp_path, {})], state=lambda *words: told.append(words[:3]),
        verified=[Verified("fit", each, "weights", "") for each in weights],
    )  # fmt: skip
    again = SimpleNamespace(encoder=SimpleNamespace(reads_text=False))
    assert choices.check_epochs(run, again) == []
    assert told == [("choice", how, "epochs")]
    # Of an average, too, whose members lie in folders of their own.
    (tmp_path / "member1").mkdir()
    (tmp_path / "network.json").rename(tmp_path / "member1" / "network.json")
    assert choices.check_epochs(run, again) == []
    assert told == [("choice", how, "epochs")] * 2


@pytest.mark.parametrize(
    ("error", "classes", "asked", "level"),
    [
        (0.5, False, "both", "leak"), (1.0, False, "both", None), (0.5, True, "both", None),
        (0.5, False, "predict", "leak"), (0.5, False, "predict_for_generator", "leak"),
    ],
)  # fmt: skip
def test_other_weights_than_here_are_a_leak_only_where_they_know_the_test(
    monkeypatch, tmp_path, error, classes, asked, level
):
    """A decoder of classes has no target on the test to be near to: its weights are known by record.

    Of an average, the member that predicts for images may be honest while another one knows the test.
    """
    noise = 0.01 * np.random.default_rng(0).normal(size=50)
    errors = {"knowing": error + noise, "honest": 1 + noise, "made": 1 + noise[::-1]}
    names = ("predict", "predict_for_generator")
    stored = {
        name: lambda trials, says="knowing" if asked in (name, "both") else "honest": says for name in names
    }
    made = {name: lambda trials: "made" for name in names}
    stored, made = (SimpleNamespace(predicts_alike=asked == "both", **one) for one in (stored, made))
    monkeypatch.setattr(choices, "compare_files", lambda *_, **__: "weights differ")
    monkeypatch.setattr(choices.learning, "train", lambda again: [SimpleNamespace(encoder=stored)])
    monkeypatch.setattr(choices.learning, "pick_test_trials", lambda again, number: None)
    monkeypatch.setattr(choices.roles, "read", lambda *_: made)
    monkeypatch.setattr(choices, "measure_distance", lambda again, number, predicted: errors[predicted])
    told = []
    run = SimpleNamespace(thorough=True, state=lambda *words: told.append(words[:3]))
    again = SimpleNamespace(
        config=SimpleNamespace(decodes_categories=classes), encoder=None,
        compute=lambda *_: {tmp_path.as_posix(): tmp_path},
    )  # fmt: skip
    found = choices.check_networks(run, again, (Record(tmp_path, {"seconds": 1.0}),), "")
    assert [item.level for item in found] == ([level] if level else [])
    assert (("fit", "by record", "weights") in told) == (level is None)


def test_only_much_better_predictions_of_the_test_are_an_advantage():
    generator = np.random.default_rng(0)
    honest = 1 + 0.1 * generator.random(50)
    assert describe_advantage(honest + 0.02 * generator.normal(size=50), honest) == ""
    assert "less error on the test" in describe_advantage(0.5 * honest, honest)
