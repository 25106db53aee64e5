"""Choices of networks are made again: scores on held-out images, and trainings; test_plants forges whole runs."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.config import read_config
from braindecode_vis.parts.audit import choices
from braindecode_vis.parts.audit.choices import describe_advantage
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.leaks.findings import Verified
from braindecode_vis.pipeline.leaks.run_files import Record
from braindecode_vis.pipeline.learning import predict_out_of_fold
from braindecode_vis.pipeline.runs import open_run
from tests.parts.audit.small_runs import find
from tests.parts.audit.test_audit import QUICK, find_artifact, reseal

AUTO = (
    "encoder={kind: auto, budget: 100, n_inner_folds: 3, candidates: [{kind: ridge, alphas: [1, 10]}, "
    "{kind: ridge, alphas: [1.0e+6]}]}"
)


@pytest.fixture(scope="module")
def auto(tmp_path_factory):
    """Return a run whose encoder was chosen among two."""
    folder = tmp_path_factory.mktemp("choices") / "auto"
    overrides = [*QUICK[:-1], "target={kind: pixels, size: 8}", AUTO]
    predict_out_of_fold(open_run(read_config("synthetic_digits", overrides), folder))
    return folder


def test_the_encoder_that_was_chosen_among_several_is_chosen_again(auto):
    audit = audit_run(auto, refit=True)
    assert not audit.leaks
    choice = next(item for item in audit.list_status() if item.part == "choice")
    assert "encoder, by inner folds" in choice.recomputed
    assert "encoders and penalties are the best" in str(find(audit, "choices", level="ok"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(chosen=1 - record["chosen"]), "is in use, but the inner folds chose"),
        (lambda record: record["candidates"][0].update(mean=0.99), "the inner score of ridge is 0.99, but"),
        (
            lambda record: record["candidates"][1].update(left_out="it would have taken long", by="budget"),
            "the inner score of ridge is",
        ),
    ],
)
def test_a_rewritten_choice_among_encoders_is_found(auto, change, words, tmp_path):
    folder = Path(shutil.copytree(auto, tmp_path / "run"))
    artifact = find_artifact(folder, "train")
    record = store.read_json(artifact / "auto.json")
    change(record)
    store.write_json(artifact / "auto.json", record)
    reseal(artifact)
    assert any(words in leak.message for leak in find(audit_run(folder), "choices"))


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
