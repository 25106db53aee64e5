"""The choice among encoders: by training trials alone, within a budget, and the winner in every role."""

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.contracts import BrainEncoder, CategoryDecoder, Context
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.roles import build, list_encoders, read
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.config.source import validate_config
from braindecode_vis.training import auto
from braindecode_vis.training.auto import FILE, AutoConfig
from tests.encoders.test_linear_gaussian import make_trials

RIDGE = {"kind": "ridge", "alphas": [1, 100]}
GAUSSIAN = {"kind": "linear_gaussian", "n_components": 2}
NETWORK = {
    "kind": "network", "network": {"kind": "eegproject", "width": 32, "dropout": 0}, "epochs": 30, "device": "cpu",
    "objectives": [{"kind": "mse"}], "optimiser": {"lr": 3e-3}, "selection": {"kind": "last", "hold_out": 0},
}  # fmt: skip
SMALL = {"candidates": [RIDGE, GAUSSIAN], "budget": None, "n_inner_folds": 3}


def make(settings, **kwargs):
    return build(BrainEncoder, AutoConfig.model_validate({**SMALL, **settings}), seed=3, **kwargs)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"candidates": "best"}, "'best' is not a list of encoders; use images, classes, or a list of encoders"),
        ({"candidates": ["ridge"]}, "candidates"),
        ({"candidates": [{"kind": "auto"}]}, "unknown kind 'auto' in encoder.candidates.0.kind"),
        ({"candidates": [{"kind": "ridge"}, {"kind": "lda"}]}, "some name classes and others do not"),
        ({"candidates": [{"kind": "logistic", "pool": True}, {"kind": "lda"}]}, "some pool volumes and others do not"),
        ({"candidates": []}, "candidates"),
        ({"budget": 0}, "encoder.budget is 0"),
        ({"n_inner_folds": 1}, "encoder.n_inner_folds is 1"),
        ({"folds": 3}, "unknown key encoder.folds"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ConfigError) as error:
        validate_config(
            {"name": "x", "dataset": {"kind": "synthetic_digits"}, "encoder": {"kind": "auto", **settings}},
            where="test",
        )
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_word_stands_for_a_list_that_enters_the_fingerprint():
    config = AutoConfig()
    kinds = [one["kind"] for one in config.hashed_fields()["candidates"]]
    assert kinds == ["ridge", "linear_gaussian", "network", "average"]
    assert config == AutoConfig(candidates="images")
    classes = AutoConfig(candidates="classes")
    assert classes.decodes_categories
    assert not config.decodes_categories
    assert not config.may_know_likelihood
    assert AutoConfig(candidates=[GAUSSIAN]).may_know_likelihood
    assert [one.kind for one in list_encoders(config)][-2:] == [
        "ridge",
        "network",
    ]  # those of the average too


def test_the_winner_is_what_it_would_be_alone_and_survives_the_disk(tmp_path):
    responses, targets = make_trials(60, 2, seed=1)
    encoder = make({})
    encoder.fit(responses, targets)
    record = encoder.record
    alone = build(BrainEncoder, encoder.config.candidates[record["chosen"]], seed=3)
    alone.fit(responses, targets)
    encoder.write(tmp_path)
    stored = read(BrainEncoder, encoder.config, tmp_path)
    for one in (encoder, stored):
        np.testing.assert_array_equal(one.predict(responses).vectors, alone.predict(responses).vectors)
        out = [each.predict_out_of_fold(responses, targets).vectors for each in (one, alone)]
        np.testing.assert_array_equal(*out)
        assert (one.likelihood is None) == (alone.likelihood is None)
        assert one.map_labels(responses, responses, []) is None
    assert stored.record == read_json(tmp_path / FILE) == record
    assert record["n_units"] == 60
    assert all(one["ci_low"] < one["mean"] < one["ci_high"] for one in record["candidates"])
    with pytest.raises(DataError, match="no encoder has been chosen yet"):
        make({}).write(tmp_path)


def test_what_is_adapted_keeps_the_record(tmp_path):
    responses, targets = make_trials(40, 2, seed=1)
    encoder = make({"candidates": [RIDGE]})
    encoder.fit(responses, targets)
    assert encoder.adaptation.is_quick
    module, inputs = encoder.as_module(responses)  # what a program is exported from
    np.testing.assert_allclose(
        module(*inputs.values()).detach().numpy(), encoder.predict(responses).vectors, rtol=1e-4, atol=1e-5
    )
    adapted = encoder.adaptation.adapt(responses, targets)
    adapted.write(tmp_path)
    found = read(BrainEncoder, encoder.config, tmp_path).predict(responses).vectors
    np.testing.assert_array_equal(found, adapted.predict(responses).vectors)


def test_the_first_within_one_standard_error_wins():
    """Ten scores; the second is best, the first is behind by less than the noise, or by more."""
    rng = np.random.default_rng(0)
    best, noise = rng.random(10), rng.normal(size=10)
    for lost, winner in ((0.01, 0), (2.0, 1)):
        behind = best - lost + noise - noise.mean()
        tried = [{"kind": "any", "scores": list(scores), "left_out": ""} for scores in (behind, best)]
        assert auto.choose_candidate(tried)["chosen"] == winner


def test_all_trials_of_an_image_stay_in_one_inner_fold():
    responses, targets = make_trials(30, 3, seed=1)
    ids = responses.stimulus_ids
    for fold in make({})._make_folds(responses, targets):
        assert not set(ids[fold.train]) & set(ids[fold.test])
    three = np.isin(ids, np.unique(ids)[:3])
    few = responses.select(np.flatnonzero(three))
    with pytest.raises(
        DataError, match=r"needs at least four training images .* show 3; set encoder.kind to ridge"
    ):
        make({}).fit(few, targets)


def test_a_small_budget_runs_the_first_alone_and_says_so():
    responses, targets = make_trials(40, 2, seed=1)
    encoder = make({"budget": 1e-9})
    encoder.fit(responses, targets)
    first, second = encoder.record["candidates"]
    assert encoder.record["chosen"] == 0
    assert (second["by"], second["left_out"]) == ("budget", "the budget of 1e-09 s was spent")
    assert first["mean"] > 0.5
    assert "mean" not in second


def test_a_candidate_is_left_out_by_its_first_fold(monkeypatch):
    """A clock that counts ten seconds a look: the second has no time left for its other folds."""
    responses, targets = make_trials(40, 2, seed=1)
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(auto.time, "perf_counter", lambda: next(ticks))
    encoder = make({"budget": 80})
    encoder.fit(responses, targets)
    assert encoder.record["candidates"][1]["left_out"].startswith("it would have taken about 40 s of ")
    encoder = make({"budget": 1000})
    encoder.fit(responses, targets)
    assert not encoder.record["candidates"][1]["left_out"]


def test_a_fit_from_a_record_repeats_what_time_decided(tmp_path):
    """Also one that goes on after a kill: what was tried already is not tried again."""
    responses, targets = make_trials(40, 2, seed=1)
    encoder = make({"budget": 1e-9})
    encoder.fit(responses, targets)
    encoder.write(tmp_path)
    again = make({"budget": 1e-9})
    again.config = AutoConfig.model_validate(SMALL)  # all the time in the world
    again.bind(Context(earlier=tmp_path))
    again.fit(responses, targets)
    kept = [{k: v for k, v in one.items() if k != "seconds"} for one in again.record["candidates"]]
    assert kept == [{k: v for k, v in one.items() if k != "seconds"} for one in encoder.record["candidates"]]
    scores = {"kind": "ridge", "scores": [0.5, 0.25, 1.0], "left_out": "", "by": "", "seconds": 7.0}
    (tmp_path / "work").mkdir()
    write_json(
        tmp_path / "work" / FILE, [scores, {**scores, "scores": None, "left_out": "late", "by": "budget"}]
    )
    resumed = make({})
    resumed.bind(Context(checkpoints=tmp_path / "work"))
    resumed.fit(responses, targets)
    assert resumed.record["candidates"][0]["seconds"] == 7
    assert resumed.record["candidates"][1]["left_out"] == "late"


def test_a_candidate_that_cannot_be_fitted_is_left_out_with_its_reason():
    responses, targets = make_trials(40, 2, seed=1)
    wrong = {"kind": "network", "network": {"kind": "residual_mlp", "hidden": 8}, "epochs": 1}  # no voxels
    encoder = make({"candidates": [wrong, RIDGE]})
    encoder.fit(responses, targets)
    assert encoder.record["chosen"] == 1
    assert encoder.record["candidates"][0]["by"] == "data"
    with pytest.raises(DataError, match="no candidate of the encoder auto can be fitted; network: "):
        make({"candidates": [wrong]}).fit(responses, targets)


def test_what_is_too_little_is_one_sentence_with_the_setting_that_helps():
    """Advice named a setting of auto in the place of the candidate's, and a subject for each image was a traceback."""
    responses, targets = make_trials(6, 1, seed=1)
    with pytest.raises(DataError, match=r"set encoder\.candidates\.0\.n_inner_folds to 4"):
        make({"candidates": [RIDGE]}).fit(responses, targets)
    responses, targets = make_trials(12, 1, seed=1)
    others = responses.with_trials(responses.trials.assign(subject=responses.stimulus_ids.astype(str)))
    with pytest.raises(DataError, match=r"no inner fold leaves out two of the same subject"):
        make({}).fit(others, targets)
    # Two images are of one subject, and one fold leaves both out.
    test = make({})._make_folds(responses, targets)[0].test[:2]
    subjects = responses.stimulus_ids.astype(object)
    subjects[test] = "one"
    pair = responses.with_trials(responses.trials.assign(subject=subjects))
    encoder = make({"candidates": [RIDGE]})
    encoder.fit(pair, targets)
    assert encoder.record["n_units"] == 2


def test_noise_chooses_and_scores_at_chance():
    responses, targets = make_trials(60, 1, seed=1)
    noise = Embeddings(
        np.random.default_rng(0).normal(size=targets.vectors.shape).astype(np.float32), targets.ids, "x"
    )
    encoder = make({})
    encoder.fit(responses, noise)
    for one in encoder.record["candidates"]:
        # Four standard errors of 60 images, whose scores spread as those of a uniform rank do.
        assert abs(one["mean"] - 0.5) < 4 * np.sqrt(1 / 12 / 60)


def test_a_planted_product_is_found_by_the_network():
    """Targets are products of two responses each, of which no linear model knows anything."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 4)).astype(np.float32)
    data = bdv.from_arrays(X, images=rng.random((200, 2, 2)))
    targets = Embeddings(
        np.stack([X[:, 0] * X[:, 1], X[:, 2] * X[:, 3]], 1), data.responses.stimulus_ids, "x"
    )
    encoder = make({"candidates": [RIDGE, NETWORK], "n_inner_folds": 2})
    encoder.fit(data.responses, targets)
    linear, network = encoder.record["candidates"]
    assert encoder.record["chosen"] == 1
    assert linear["ci_low"] < 0.6 < network["ci_low"]


# --- classes ------------------------------------------------------------------------------------------------------


def test_decoders_of_classes_are_chosen_among_too(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(["face", "house"], 40)
    X = rng.normal(size=(80, 6)) + (labels == "face")[:, None]
    run = np.tile(np.arange(4), 20)
    data = bdv.from_arrays(X, labels=labels, run=run)
    config = validate_component("encoder", {"kind": "auto", "candidates": "classes", "budget": None})
    decoder = build(CategoryDecoder, config, seed=0)
    decoder.fit(data.responses, labels)
    decoder.write(tmp_path)
    stored = read(CategoryDecoder, config, tmp_path)
    np.testing.assert_array_equal(stored.decision(data.responses), decoder.decision(data.responses))
    assert stored.classes == ("face", "house")
    assert decoder.record["n_units"] == 80
    assert all(one["mean"] > 0.8 for one in decoder.record["candidates"])


# --- whole runs ---------------------------------------------------------------------------------------------------


def decode_digits(X, pictures, out=None, **settings):
    split = np.array(["train"] * 40 + ["test"] * 20)
    data = bdv.from_arrays(X, images=pictures, split=split)
    encoder = {"kind": "auto", **SMALL, **settings}
    return bdv.decode(data, encoder=encoder, split="published", out=out)


@pytest.fixture(scope="module")
def planted():
    rng = np.random.default_rng(0)
    pictures = rng.random((60, 4, 4))
    return pictures.reshape(60, -1) @ rng.normal(size=(16, 30)) + 0.5 * rng.normal(size=(60, 30)), pictures


def find_record(run):
    return read_json(next(run.folder.glob(f"stages/train/*/{FILE}")))


def test_a_poisoned_test_split_changes_nothing_in_the_choice(planted):
    X, pictures = planted
    poisoned, other = X.copy(), pictures.copy()
    poisoned[40:], other[40:] = 1e3 * (1 + np.arange(30) % 7), 1 - pictures[40:]
    records = [find_record(decode_digits(*one)) for one in ((X, pictures), (poisoned, other))]
    for record in records:
        record.pop("seconds")
        for one in record["candidates"]:
            one.pop("seconds")
    assert records[0] == records[1]


def test_a_run_is_resumed_predicts_and_is_exported(planted, tmp_path):
    X, pictures = planted
    run = decode_digits(X, pictures, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Choice of the encoder" in page
    assert "chosen among 2 encoders by inner folds" in page
    # The hint once named encoder.alphas, which auto does not have.
    assert any("extend encoder.candidates.0.alphas" in hint for hint in run.hints)
    again = decode_digits(X, pictures, tmp_path / "run")
    assert again.scores.equals(run.scores)
    found = run.predict(X[40:])
    assert len(found.embeddings) == 20
    path = run.export("encoder", "safetensors", tmp_path / "model")
    assert "A `ridge` encoder" in (path / "README.md").read_text()  # once: a `auto` encoder


def test_a_name_alone_chooses_the_list_by_what_the_data_know():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 20)
    data = bdv.from_arrays(rng.normal(size=(40, 3)) + (labels == "a")[:, None], labels=labels)
    run = bdv.decode(data, encoder="auto", split=2, settings={"encoder.n_inner_folds": 2})
    assert [one["kind"] for one in find_record(run)["candidates"]] == ["lda", "logistic"]
    assert "Choice of the encoder" in (run.folder / "report.html").read_text()


def test_the_report_tells_what_a_branch_chose():
    """The page named a branch's encoder `auto`, and the candidates of the run's own encoder alone."""
    rng = np.random.default_rng(0)
    pictures = rng.random((40, 16, 16))
    X = pictures.reshape(40, -1) @ rng.normal(size=(256, 20))
    data = bdv.from_arrays(X, images=pictures, split=np.array(["train"] * 30 + ["test"] * 10))
    low_level = {"target": {"kind": "pca"}, "encoder": {"kind": "auto", **SMALL}}
    settings = {"reconstruction.low_level": low_level}
    with pytest.warns(Notice, match="stand-ins"):
        run = bdv.decode(data, encoder=RIDGE, split="published", settings=settings)
    assert "Choice of the encoder (low level branch)" in (run.folder / "report.html").read_text()
