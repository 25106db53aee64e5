"""Synthetic responses: no test trial, test image or held-out image behind them, and the audit knows where one is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from braindecode_vis import pipeline
from braindecode_vis.api.decoding_run import DecodingRun
from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.config.models import SyntheticConfig
from braindecode_vis.embeddings.image_bank import embed_parts, finish_bank, plan_bank
from braindecode_vis.embeddings.image_sources import open_images
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.foundation.models.universal_encoder import UniversalEncoder
from braindecode_vis.pipeline import learning, preparing, synthetic
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.pipeline.scoring import describe_choices
from braindecode_vis.pipeline.synthetic import PREFIX, synthesise_fold, synthesise_into
from braindecode_vis.preprocessing.splits import make_inner_folds

SMALL = [
    "dataset.n_train=60", "dataset.n_test=12", "dataset.n_voxels=20", "target={kind: pixels, size: 8}",
    "evaluation.n_bootstrap=100", "evaluation.n_permutations=100", "synthetic.model={alphas: [0.1, 1.0]}",
    "synthetic.images=phantom:40,size=16", "synthetic.share=0.25",
]  # fmt: skip


def open_small(folder, *changes):
    return open_run(read_config("synthetic_digits", [*SMALL, *changes]), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = open_small(tmp_path_factory.mktemp("synthetic"))
    pipeline.train(run)
    return run


def poison(run):
    """Give every trial and every image of the test absurd values, after everything was read."""
    prepared = preparing.preprocess(run)
    test = prepared.folds[0].test
    data, pixels = np.array(prepared.responses.data), np.array(prepared.stimuli.pixels)
    data[test] = 1e6
    shown = prepared.stimuli.find_rows(prepared.responses.stimulus_ids[test])
    pixels[shown] = np.random.default_rng(0).integers(0, 255, pixels[shown].shape)
    run.seen["preprocess"] = replace(
        prepared, responses=replace(prepared.responses, data=data),
        stimuli=StimulusSet(prepared.stimuli.table, pixels=pixels),
    )  # fmt: skip


def test_training_takes_the_share_and_says_so(trained):
    made = synthesise_fold(trained, 0)
    assert made.responses.n_trials == 20  # a quarter of 80
    assert made.responses.is_synthetic.all()
    assert all(name.startswith(PREFIX) for name in made.responses.stimulus_ids)
    record = store.read_provenance(pipeline.train(trained)[0].artifact.path / store.PROVENANCE)
    assert record["n_trials"] == 80
    assert record["upstream"]["synthesise"] == made.artifact.fingerprint
    (words,) = describe_choices(trained.config)[-1:]
    assert words.startswith("trained with 25% synthetic responses")
    assert "phantom:40,size=16" in words
    plain = open_small(trained.folder.path, "synthetic=null")
    assert not any("synthetic" in word for word in describe_choices(plain.config))
    # Predictions out of fold are those of real trials, and so are all that is tested.
    assert not learning.pick_training(trained, 0)[0].is_synthetic.any()


def test_neither_test_trials_nor_test_images_move_a_synthetic_trial(trained, tmp_path):
    other = open_small(tmp_path / "other")
    preparing.preprocess(other)
    poison(other)
    first, second = synthesise_fold(trained, 0), synthesise_fold(other, 0)
    np.testing.assert_array_equal(first.responses.data, second.responses.data)
    np.testing.assert_array_equal(first.targets.vectors, second.targets.vectors)


def test_noise_is_that_of_the_residuals_or_none(trained, tmp_path):
    def draw(noise, **changes):
        folder = tmp_path / f"{noise}{len(changes)}"
        synthesise_into(trained, "phantom:40,size=16", folder, noise=noise)
        return store.read_responses(folder / "responses"), store.read_json(folder / "record.json")

    (noisy, record), (clean, _) = draw("residual"), draw("none")
    assert noisy.n_trials == clean.n_trials == 40
    spread = (np.asarray(noisy.data) - np.asarray(clean.data)).std()
    real = learning.pick_training(trained, 0)[0]
    explained = record["inner_explained"]["01"]
    assert spread == pytest.approx(np.asarray(real.data).std() * np.sqrt(1 - explained), rel=0.15)
    assert record["fitted_on"] == "only training trials of the fold"
    with pytest.raises(ConfigError, match="exists; choose another"):
        draw("none")
    with pytest.raises(ConfigError, match="residual, none"):
        synthesise_into(trained, "phantom:4", tmp_path / "x", noise="white")
    asked = SyntheticConfig(images="phantom:5,size=16", noise="none", share=0.5)
    config = trained.config.model_copy(update={"synthetic": asked})
    other = replace(trained, config=config, seen={"preprocess": preparing.preprocess(trained)})
    with pytest.raises(DataError, match="which would repeat without noise"):
        synthesise_fold(other, 0)


def test_a_run_in_python_encodes_and_synthesises(trained, tmp_path):
    run = DecodingRun(trained)
    table = run.encode({"n_resamples": 100, "noise_ceiling": None})
    assert len(table) == 20
    assert table["value"].mean() > 0.3
    assert table.attrs["scores"][0]["metric"] == "encoding_correlation@all"
    assert all(path.is_file() for path in table.attrs["files"])
    with pytest.raises(ConfigError, match="widht"):
        run.encode({"widht": 1})
    made = run.synthesise("phantom:5,size=16", tmp_path / "made", noise="none")
    assert made.data.shape == (5, 20)


def test_images_that_were_shown_are_left_out(trained, tmp_path):
    from PIL import Image

    stimuli = preparing.preprocess(trained).stimuli
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for place, name in enumerate(stimuli.ids[[0, 70]]):  # one of training, one of the test
        Image.fromarray(stimuli.read_image(name)).save(pictures / f"copy{place}.png")
    large = Image.fromarray(stimuli.read_image(stimuli.ids[71])).resize((64, 64), Image.Resampling.BICUBIC)
    large.save(pictures / "larger.png")
    turned = Image.fromarray(stimuli.read_image(stimuli.ids[69])[::-1]).resize((64, 64))
    turned.save(pictures / "upside_down.png")
    for place in range(3):
        noise = np.random.default_rng(place).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"new{place}.png")
    folder, sentences = synthesise_into(trained, str(pictures), tmp_path / "made", noise="none")
    assert sorted(store.read_responses(folder / "responses").stimulus_ids) == [
        f"{PREFIX}new{n}" for n in range(3)
    ]
    assert "4 images were left out" in sentences[1]
    # Without noise no image comes twice: others take the place of those that are left out.
    asked = SyntheticConfig(images=str(pictures), noise="none", share=0.05)
    config = trained.config.model_copy(update={"synthetic": asked})
    other = open_run(config, tmp_path / "other")
    made = synthesise_fold(other, 0).responses
    assert sorted(made.stimulus_ids) == [f"{PREFIX}new{n}" for n in range(3)]
    for path in pictures.glob("new*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no image that was not shown"):
        synthesise_into(trained, str(pictures), tmp_path / "none")
    with pytest.raises(DataError, match="every image of the data set that is available was shown"):
        synthesise_into(trained, "unseen", tmp_path / "none")


def test_a_bank_gives_other_images_for_those_that_were_shown(trained, tmp_path):
    """Without noise no image comes twice, and images that were shown leave no gap."""
    from PIL import Image

    stimuli, encoder = preparing.preprocess(trained).stimuli, preparing.embed_fold(trained, 0).encoder
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in stimuli.ids[:6]:
        Image.fromarray(stimuli.read_image(name)).save(pictures / f"{name}.png")
    for place in range(4):
        noise = np.random.default_rng(place).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"new{place}.png")
    source = open_images(str(pictures))
    plan = plan_bank(tmp_path / "bank", source, encoder, dtype="float32")
    embed_parts(plan, source, encoder, plan.parts)
    finish_bank(plan)
    asked = SyntheticConfig(images=str(tmp_path / "bank"), noise="none", share=4 / 64)
    run = open_run(trained.config.model_copy(update={"synthetic": asked}), tmp_path / "run")
    made = synthesise_fold(run, 0)
    assert sorted(made.responses.stimulus_ids) == [f"{PREFIX}new{n}" for n in range(4)]
    assert store.read_provenance(made.artifact.path / store.PROVENANCE)["left_out"]["shown (embedding)"] == 6


def test_inner_folds_test_real_trials_alone():
    ids = np.array([f"i{n}" for n in range(20)] + ["synthetic/a", "synthetic/b"], dtype=object)
    always = np.arange(22) >= 20
    folds = make_inner_folds(ids, n_folds=4, generator=make_generator(0, "x"), always=always)
    without = make_inner_folds(ids[:20], n_folds=4, generator=make_generator(0, "x"))
    for fold, plain in zip(folds, without, strict=True):
        np.testing.assert_array_equal(fold.test, plain.test)
        np.testing.assert_array_equal(fold.train, np.r_[plain.train, 20, 21])


@pytest.mark.slow
def test_a_network_validates_on_real_trials_that_the_model_has_not_seen(tmp_path):
    network = "encoder={kind: network, network: {kind: residual_mlp, hidden: 8, n_blocks: 1}, epochs: 1, device: cpu}"
    run = open_small(tmp_path, network, "dataset.n_train=40")
    (fold,) = pipeline.train(run)
    held = store.read_json(fold.artifact.path / "network.json")["held_out"]
    assert held
    assert not any(name.startswith(PREFIX) for name in held)
    made = synthesise_fold(run, 0)
    record = store.read_provenance(made.artifact.path / store.PROVENANCE)
    learnt = sorted(set(learning.pick_training(run, 0)[0].stimulus_ids) - set(held))
    assert record["n_held_out"] == len(held)
    assert record["n_real"] == len(learnt)
    assert record["trained_on"] == store.hash_json(learnt)
    audit = audit_run(run.folder.path)
    assert not [finding for finding in audit.findings if finding.level == "leak"]


def test_the_audit_proves_it_and_finds_what_was_planted(trained, tmp_path):
    audit = audit_run(trained.folder.path, refit=True)
    assert not [finding for finding in audit.findings if finding.level == "leak"]
    assert [finding.level for finding in audit.findings if finding.check == "synthetic"] == ["ok"]
    fits = {item.what: item.how for item in audit.verified if item.part == "fit"}
    assert fits["synthetic trials"] == "recomputed"
    folder = tmp_path / "planted"
    shutil.copytree(trained.folder.path, folder)
    (made,) = (folder / "stages" / "synthesise").iterdir()
    data = np.load(made / "responses" / "data.npy")
    np.save(made / "responses" / "data.npy", data + 0.5)  # as if other trials had taken part
    content = json.loads((made / "images.json").read_text())
    tested = preparing.preprocess(trained).stimuli.table["sha256"].iloc[-1]
    content["images"][0][1] = tested
    (made / "images.json").write_text(json.dumps(content))
    found = [
        item.message
        for item in audit_run(folder).findings
        if item.check == "synthetic" and item.level == "leak"
    ]
    assert any("shown by their pixels" in text for text in found)
    assert any("of what an encoding model of the training trials alone expects" in text for text in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("encoder.kind=linear_gaussian", "synthetic responses are drawn from a linear model"),
        ("synthetic.share=1", "synthetic.share"),
        ("synthetic.noise=white", "synthetic.noise"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        read_config("synthetic_digits", [*SMALL, change])


def test_the_verb_maps_and_synthesises(command_line, tmp_path):
    out = tmp_path / "run"
    few = [word for change in SMALL[:6] for word in ("--set", change)]
    asked = ("encode", "synthetic_digits", "--out", out, *few, "--set", "encode.n_resamples=100")
    done = command_line(*asked)
    assert done.returncode == 0, done.stderr
    assert "report: none" in done.stdout
    assert "subject 01, all: " in done.stdout
    content = json.loads(command_line(*asked, "--json").stdout)
    assert content["scores"][0]["metric"] == "encoding_correlation@all"
    assert content["scores"][0]["value"] > 0.3
    assert any(name.endswith("encoding_sub-01.npz") for name in content["files"])
    done = command_line("encode", out, "--synthesise", "phantom:5,size=16", "--to", tmp_path / "made")
    assert "5 synthetic responses to 5 images" in done.stdout
    assert store.read_responses(tmp_path / "made" / "responses").data.shape == (5, 20)
    for words, given in (
        ("--to applies only with --synthesise", ("--to", tmp_path / "other")),
        ("needs an output folder", ("--synthesise", "phantom:5")),
        ("does not exist", ("--synthesise", tmp_path / "absent", "--to", tmp_path / "other")),
        (
            "the run has the folds 0 to 0",
            ("--synthesise", "phantom:5", "--to", tmp_path / "o", "--fold", "1"),
        ),
    ):
        done = command_line("encode", out, *given)
        assert done.returncode == 2
        assert words in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.further
def test_copies_of_test_pictures_among_new_ones_are_found(tmp_path, monkeypatch):
    """By the audit in a run of a version that drew the trials without looking for pictures that are upside down."""
    from PIL import Image

    prepared = preparing.preprocess(open_small(tmp_path / "bare"))
    tested = prepared.responses.stimulus_ids[prepared.folds[0].test]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for place in range(12):
        noise = np.random.default_rng(place).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{place}.png")
    settings = [f"synthetic.images={pictures}", "synthetic.share=0.15"]
    pipeline.train(open_small(tmp_path / "honest", *settings))
    for name in tested[:4]:
        picture = Image.fromarray(prepared.stimuli.read_image(name)[::-1]).resize((32, 32))
        picture.save(pictures / f"new {name}.png")
    monkeypatch.setattr(synthetic, "_find_copies", lambda *given: {})
    pipeline.train(open_small(tmp_path / "planted", *settings, "synthetic.share=0.25"))
    leaks = [list(audit_run(tmp_path / name).leaks) for name in ("honest", "planted")]
    assert leaks[0] == []
    (leak,) = leaks[1]
    assert leak.check == "synthetic"
    assert "4 picture(s) of synthetic trials are copies of test pictures" in leak.message
    assert "upside down" in leak.message


def test_a_run_is_read_and_audited_after_its_pictures_are_gone(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for place in range(8):
        noise = np.random.default_rng(place).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{place}.png")
    run = open_small(tmp_path / "run", f"synthetic.images={pictures}")
    (before,) = pipeline.train(run)
    shutil.rmtree(pictures)
    (after,) = pipeline.train(open_finished(run.folder.path))
    assert after.artifact.path == before.artifact.path
    audit = audit_run(run.folder.path)
    assert not [finding for finding in audit.findings if finding.level == "leak"]
    reasons = [item.reason for item in audit.verified if item.what == "synthetic trials"]
    assert any("does not exist" in reason for reason in reasons)
    with pytest.raises(DataError, match="does not exist"):
        pipeline.train(open_small(tmp_path / "run", f"synthetic.images={pictures}", "synthetic.share=0.3"))


CLUSTERS = (
    "{kind: voxel_clusters, n_tokens: 1, n_clusters: 4, width: 16, depth: 1, n_heads: 2, code_size: 8, code_width: 16, "
    "code_updates: 200}"
)


@pytest.mark.further
def test_the_network_of_the_encoder_predicts_responses_of_all_subjects(tmp_path, monkeypatch):
    """The audit fits the universal encoder anew and must come to the same numbers; the training takes it as it is."""
    changes = [
        "dataset.n_train=60", "dataset.n_test=12", "dataset.n_voxels=20", "target={kind: pixels, size: 8}",
        "evaluation.n_bootstrap=100", "evaluation.n_permutations=100", "synthetic.images=phantom:40,size=16",
        "synthetic.share=0.25", "synthetic.by=network", "synthetic.noise=none",
        f"encoder={{kind: network, epochs: 1, network: {CLUSTERS}}}",
    ]  # fmt: skip
    run = open_run(read_config("synthetic_digits", changes), tmp_path / "run")
    made = synthesise_fold(run, 0)
    real = preparing.preprocess(run).responses
    assert made.responses.data.shape[1:] == real.data.shape[1:]
    # Predictions are in the unit of the trials.
    assert 0 < made.responses.data.std() < 1.5 * np.asarray(real.data).std()
    assert "by the network; noise none" in describe_choices(run.config)[-1]
    with monkeypatch.context() as once:

        def fit(*asked, **options):
            raise AssertionError("the universal encoder was fitted twice")

        once.setattr(UniversalEncoder, "fit", fit)
        (trained,) = pipeline.train(run)
    network = trained.encoder.fitted.model.whole_network
    kept = store.load_tensors(made.fitted / "universal.safetensors", library="torch")
    (own,) = [value for name, value in kept.items() if name.startswith("codes of ")]
    torch.testing.assert_close(network.subjects[0].place, own, rtol=0, atol=0)
    # Of other voxels, or of other subjects, nothing is taken over.
    assert network.universal.read(made.fitted, {"01": len(own) + 1}) is None
    audit = audit_run(run.folder.path, refit=True)
    assert not [str(leak) for leak in audit.leaks]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("synthetic.noise=residual", "noise residual needs a ridge, but by is network; set noise to none"),
        (
            "synthetic.features=[{kind: pixels, size: 4}]",
            "features is .* but it has no effect: the network reads",
        ),
        (
            "encoder={kind: ridge}",
            "synthetic.by is network, but the encoder has no network that predicts responses",
        ),
        (
            "encoder={kind: network}",
            "synthetic.by is network, but the encoder has no network that predicts responses",
        ),
    ],
)
def test_what_a_network_cannot_predict_is_said(change, sentence):
    asked = [
        "synthetic.images=phantom:40,size=16", "synthetic.by=network", "synthetic.noise=none",
        f"encoder={{kind: network, network: {CLUSTERS}}}",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=sentence):
        read_config("synthetic_digits", [*asked, change])
