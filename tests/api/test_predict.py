"""A finished run on new recordings: its own predictions to the bit, any gallery, one sentence for what does not fit."""

import json
from contextlib import contextmanager
from dataclasses import replace

import mne
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.datasets.things_eeg2.dataset import ALL63
from braindecode_vis.embeddings.image_bank import embed_parts, finish_bank, plan_bank
from braindecode_vis.embeddings.image_sources import open_images
from braindecode_vis.embeddings.pixels import EngineeredEncoder
from braindecode_vis.pipeline import prediction_files
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.new_trials import read_new
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.meeg import write_meeg
from tests.datasets.test_things_eeg2 import write_images, write_raw

pytestmark = pytest.mark.whole

FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "evaluation.features": None}
CHANNELS = ALL63[-40:]  # enough that the files are not taken for ones that were cut short
N_PICTURES, N_REPEATS, N_FEATURES = 30, 3, 40


def make_experiment(seed=0, noise=0.3, shape=(N_FEATURES,)):
    """Trials that are a fixed linear map of their picture, with noise of the seed."""
    draw = np.random.default_rng(7)
    # Of few components, so that the training pictures span the others.
    mixed = draw.normal(size=(N_PICTURES, 6)) @ draw.normal(size=(6, 144))
    pictures = (1 / (1 + np.exp(-mixed / 2))).reshape(N_PICTURES, 12, 12)
    weights = np.random.default_rng(8).normal(size=(144, int(np.prod(shape))))
    shown = np.repeat(np.arange(N_PICTURES), N_REPEATS)
    X = pictures.reshape(N_PICTURES, -1)[shown] @ weights
    X = X + noise * np.random.default_rng(seed).normal(size=X.shape)
    return X.reshape(-1, *shape).astype(np.float32), pictures, shown


def declare(shown):
    return np.where(shown < 22, "train", "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    return bdv.decode(data, out=tmp_path_factory.mktemp("run"), settings=FEW)


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown)
    return bdv.decode(data, split=3, out=tmp_path_factory.mktemp("folded"), settings=FEW)


def pick_test(X, shown):
    rows = declare(shown) == "test"
    return X[rows], shown[rows]


def assert_own(found, run, fold=0):
    """Predictions of the run's own test trials are what the run has stored, bit for bit."""
    np.testing.assert_array_equal(found.embeddings.vectors, run.predictions_of_fold(fold).vectors)
    assert found.embeddings.space == run.predictions_of_fold(fold).space


# --- its own test trials ----------------------------------------------------------------------------------


def test_ridge_gives_its_own_predictions_ranks_and_images(run):
    X, _, shown = make_experiment()
    X, shown = pick_test(X, shown)
    found = run.predict(X, shown=shown)
    assert_own(found, run)
    np.testing.assert_array_equal(found.ranks["rank"], run.ranks["rank"])
    np.testing.assert_array_equal(found.reconstructions, run.reconstructions["decoded"])
    assert set(found.scores["split"]) == {"new trials, new pictures"}
    assert found.notes == ("No subject was given: using 01, the subject of the run.",)
    scores = found.scores.set_index(["metric", "method"])["value"]
    own = run.scores.set_index(["metric", "method"])["value"]
    for metric in ("top1", "2_way", "mean_rank", "pixcorr", "ssim"):
        assert scores[metric, "decoded"] == own[metric, "decoded"]


def test_a_network_gives_its_own_predictions(tmp_path):
    X, pictures, shown = make_experiment(shape=(5, 40))
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown), ch_names=list("abcde"))
    encoder = {"kind": "network", "network": {"kind": "eegproject"}, "epochs": 2, "device": "cpu"}
    own = bdv.decode(data, encoder=encoder, out=tmp_path / "run", settings=FEW)
    found = own.predict(*pick_test(X, shown)[:1], shown=pick_test(X, shown)[1])
    assert_own(found, own)
    np.testing.assert_array_equal(found.reconstructions, own.reconstructions["decoded"])
    with pytest.raises(DataError, match="5 channels x 40 times, but these have 4 channels x 40 times"):
        own.predict(X[:, :4])


@pytest.mark.parametrize(
    ("prior", "generator"),
    [
        ({"kind": "spread"}, "latents"),
        ("identity", {"kind": "refiner", "steps": 5}),
        (
            {
                "kind": "diffusion", "epochs": 2, "min_steps": 2, "widths": [16, 8], "time_features": 8, "steps": 5,
                "device": "cpu",
            },
            "latents",
        ),
    ],
    ids=["spread", "refiner", "diffusion"],
)  # fmt: skip
def test_stored_priors_and_generators_make_the_same_images(tmp_path, monkeypatch, prior, generator):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    own = bdv.decode(data, prior=prior, generator=generator, out=tmp_path, settings=FEW)

    def refuse(*args, **kwargs):
        raise AssertionError("something was fitted again")

    for name in ("prior_training.fit_network", "closed_form.SpreadPrior.fit"):
        monkeypatch.setattr(f"braindecode_vis.generation.priors.{name}", refuse)
    monkeypatch.setattr("braindecode_vis.generation.refiner.train_refiners", refuse)
    X, shown = pick_test(X, shown)
    np.testing.assert_array_equal(own.predict(X, shown=shown).reconstructions, own.reconstructions["decoded"])


def test_new_trials_are_described_as_those_of_the_run_were(tmp_path):
    X, pictures, shown = make_experiment(shape=(4, 10))
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    bank = tmp_path / "bank.csv"
    ids = data.stimuli.ids
    bank.write_text("\n".join(["id,caption", *(f"{i},picture number {i}" for i in ids)]))
    coca = {
        "kind": "coca",
        "bank": str(bank),
        "epochs": 2,
        "width": 8,
        "depth": 2,
        "n_queries": 1,
    }
    settings = {
        **FEW, "evaluation.captions": {"bank": str(bank)}, "reconstruction.n_draws": 2,
        "reconstruction.captions": [
            {"kind": "nearest", "bank": str(bank)}, {**coca, "device": "cpu"}, {"kind": "brain", "n_beams": 2},
        ],
    }  # fmt: skip
    captioning = {"kind": "captioning", "width": 8, "n_queries": 1}
    encoder = {
        "kind": "network", "network": {"kind": "eegproject", "width": 8}, "captions": str(bank), "device": "cpu",
        "objectives": [{"kind": "mse"}, captioning], "epochs": 3, "selection": {"kind": "last", "hold_out": 0.2},
    }  # fmt: skip
    own = bdv.decode(data, encoder=encoder, prior="spread", out=tmp_path / "run", settings=settings)
    X, shown = pick_test(X, shown)
    found = own.predict(X, shown=shown)
    made = own.captions
    numbers = {"coca": 16, "nearest-caption": 8, "brain": 8, "seen": 8}
    assert made.groupby("source").size().to_dict() == numbers
    pd.testing.assert_frame_equal(found.captions, made[made["source"] != "seen"].reset_index(drop=True))
    means = np.stack([X[shown == name].mean(axis=0) for name in pd.unique(shown)])
    alone = bdv.Decoder.from_run(own).caption(means)  # one draw
    first = made[(made["source"] != "seen") & (made["draw"] == 0)].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, first)
    folder = found.save(tmp_path / "out")
    assert len(pd.read_csv(folder / "captions.csv")) == 32
    assert "picture number" in (folder / "predict.html").read_text()


def test_runs_of_versions_that_kept_no_fits_are_fitted_again(tmp_path):
    """Fits were not kept before; the same pairs and the same seed give the same prior."""
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    own = bdv.decode(data, prior="spread", out=tmp_path, settings=FEW)
    expected = own.reconstructions["decoded"]
    (stage,) = (tmp_path / "stages" / "reconstruct").glob("[!.]*")
    record = store.read_json(stage / store.PROVENANCE)
    record["files"] = {name: about for name, about in record["files"].items() if "fits" not in name}
    store.write_provenance(stage / store.PROVENANCE, record)
    for path in sorted((stage / "fits").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    X, shown = pick_test(X, shown)
    np.testing.assert_array_equal(own.predict(X, shown=shown).reconstructions, expected)


def test_nothing_is_written_into_the_run_and_its_recording_is_not_needed(tmp_path):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    bdv.decode(data, out=tmp_path / "run", settings=FEW)
    (tmp_path / "run" / "data").rename(tmp_path / "elsewhere")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    opened = bdv.open_run(tmp_path / "run")
    assert len(opened.predict(X[:4]).retrieved) == 4 * 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- raw recordings with whitening ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eeg(tmp_path_factory):
    """A run on two raw sessions of subject 1, whitened and scaled; subject 2 lies in a root of its own."""
    folder = tmp_path_factory.mktemp("eeg")
    for name, subject in (("old", 1), ("new", 2)):
        write_images(folder / name)
        write_raw(folder / name, subject, CHANNELS)
    config = read_config(
        "things_eeg2",
        [
            f"dataset.channels=[{', '.join(CHANNELS)}]", "dataset.subjects=[1]", "dataset.sessions=[1, 2]",
            "dataset.scaling={method: robust}",
            "target={kind: pixels, size: 4}", "encoder={kind: ridge, alphas: [10.0]}", "generator={kind: latents}",
            "evaluation.n_permutations=100", "evaluation.n_bootstrap=100",
        ],
        root=folder / "old",
    )  # fmt: skip
    pipeline.run_all(open_run(config, folder / "run"))
    return folder, bdv.open_run(folder / "run")


def test_the_root_of_the_training_gives_the_runs_own_predictions(eeg):
    folder, own = eeg
    found = own.predict(folder / "old", split="test")
    assert_own(found, own)
    np.testing.assert_array_equal(found.reconstructions, own.reconstructions["decoded"])
    np.testing.assert_array_equal(found.ranks["rank"], own.ranks["rank"])
    assert any(
        "subject 01, session 02: whitened and scaled by this session's own" in note for note in found.notes
    )


def test_a_new_subject_is_whitened_by_what_the_run_knows(eeg, tmp_path, command_line):
    folder, _ = eeg
    done = command_line(
        "predict", folder / "run", "--on", folder / "new", "--set", "dataset.subjects=[2]", "--split", "test",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["n_trials"] == 3
    assert "new subject: using mean statistics over 2 sessions of other subjects" in said["notes"][0]
    assert not said["transductive"]
    page = (tmp_path / "out" / "predict.html").read_text()
    assert 'src="http' not in page
    assert said["fingerprint"] in page
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "predictions", "retrieved.csv", "ranks.csv", "images", "provenance.json", "scores.json", "trials.csv",
    }  # fmt: skip
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 3
    assert len(store.read_embeddings(tmp_path / "out" / "predictions")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


def test_its_own_whitening_only_when_asked_and_then_named(eeg):
    folder, own = eeg
    new = bdv.load("things_eeg2", root=folder / "new", subjects=[2])
    plain, anew = own.predict(new), own.predict(new, whiten_new=True)
    assert "transductive" not in plain.protocol
    assert "transductive: statistics of the new trials themselves" in anew.protocol
    assert "Transductive" in anew.report().read_text()
    assert not np.allclose(plain.embeddings.vectors, anew.embeddings.vectors)
    # Of one root, the training trials give the statistics of its test trials: those that the run has learnt itself.
    tested = own.predict(folder / "old", split="test", whiten_new=True)
    assert_own(tested, own)
    assert "transductive" not in tested.protocol
    assert tested.notes[0] == (
        "Whitening and scaling were learnt from the new trials that are declared as train."
    )
    assert "transductive" in own.predict(folder / "old", split="train", whiten_new=True).protocol
    in_memory = own.predict(read_unwhitened(folder), split="test", whiten_new=True)
    # Noise that is estimated from a block in float32 is less exact than that of the stream.
    scale = np.abs(tested.embeddings.vectors).max()
    np.testing.assert_allclose(
        in_memory.embeddings.vectors, tested.embeddings.vectors, rtol=0, atol=1e-3 * scale
    )
    # Trials without a subject are those of the run's only one; each session keeps the statistics that it has learnt.
    unnamed = read_unwhitened(folder)
    unnamed = unnamed.with_trials(unnamed.trials.assign(subject="unstated"))
    again = own.predict(unnamed, split="test", whiten_new=True)
    np.testing.assert_array_equal(again.embeddings.vectors, in_memory.embeddings.vectors)
    with pytest.raises(ConfigError, match="the run decodes things_eeg2, so it cannot read synthetic_digits"):
        own.predict(bdv.load("synthetic_digits"))


def read_unwhitened(folder):
    """All trials of the run, before they are whitened and scaled."""
    raw = read_config(folder / "run", ["dataset.mvnn=none", "dataset.scaling=null"]).dataset
    work = folder / "unwhitened"
    if not work.is_dir():
        write_meeg(raw, work)
    return store.read_responses(work / "responses")


def make_epochs(folder, *, ch_names=CHANNELS, sfreq=250.0, n_times=250, tmin=0.0):
    """Test trials of the run, unwhitened, as somebody would cut them."""
    responses = read_unwhitened(folder)
    rows = np.flatnonzero((responses.trials["split"] == "test").to_numpy())
    data = np.asarray(responses.data[rows])[:, : len(ch_names), :n_times].astype(np.float64)
    info = mne.create_info(list(ch_names), sfreq, "eeg")
    epochs = mne.EpochsArray(data, info, tmin=tmin, verbose="error")
    epochs.metadata = responses.trials.iloc[rows][["stimulus_id", "subject", "session"]].reset_index(
        drop=True
    )
    return epochs


def test_epochs_in_volt_are_whitened_and_arrays_must_say_whether_they_are(eeg):
    folder, own = eeg
    epochs = make_epochs(folder)
    assert_own(own.predict(epochs), own)
    with pytest.raises(DataError, match="state their unit"):
        own.predict(epochs.get_data(copy=True))
    raw = own.predict(
        epochs.get_data(copy=True), prepared=False, shown=epochs.metadata["stimulus_id"],
        session=epochs.metadata["session"],
    )  # fmt: skip
    assert_own(raw, own)
    test = own.predict(make_responses(own), shown=None)
    assert_own(test, own)


def make_responses(own):
    """The run's own test trials as it has stored them."""
    prepared = pipeline.preprocess(open_finished(own.folder))
    return prepared.responses.select(prepared.folds[0].test)


def test_other_channels_rates_windows_and_units_are_one_sentence(eeg):
    folder, own = eeg
    with pytest.raises(DataError, match="have another order: the run has FC6, FT8"):
        own.predict(make_epochs(folder, ch_names=CHANNELS[::-1]))
    with pytest.raises(DataError, match="are missing O2"):
        own.predict(make_epochs(folder, ch_names=CHANNELS[:-1]))
    with pytest.raises(DataError, match="sampling rate of 200 Hz, but those of the run have 250 Hz"):
        own.predict(make_epochs(folder, sfreq=200.0))
    with pytest.raises(DataError, match=r"from 0\.5 to 1\.496 s, those of the run from 0 to"):
        own.predict(make_epochs(folder, tmin=0.5))
    stored = make_responses(own)
    with pytest.raises(DataError, match="in microvolt, but the recordings of the run were in V"):
        own.predict(replace(stored, unit="microvolt"))
    with pytest.raises(ConfigError, match="only dataset"):
        read_new(open_finished(own.folder), folder / "new", folder / "w", overrides=["seed=3"])


def test_a_subject_that_a_network_does_not_know(tmp_path):
    X, pictures, shown = make_experiment(shape=(5, 40))
    data = bdv.from_arrays(
        X, images=pictures, shown=shown, split=declare(shown), ch_names=list("abcde"),
        subject=np.where(np.arange(len(X)) % 3 == 2, "B", "A"),
    )  # fmt: skip
    network = {"kind": "network", "epochs": 1, "device": "cpu", "subject_alignment": "zscore"}
    own = bdv.decode(data, encoder={**network, "network": {"kind": "eegproject"}}, out=tmp_path, settings=FEW)
    assert own.predict(X, subject="A").transductive is False
    found = own.predict(X)  # neither A nor B was stated
    assert "transductive" in found.protocol
    assert any("aligned subject unstated by the new trials themselves" in note for note in found.notes)


# --- galleries, folders, folds ----------------------------------------------------------------------------


def test_pictures_that_were_in_no_data_set_are_searched(run, tmp_path):
    X, pictures, _ = make_experiment(seed=5)
    gallery = {f"mine {n}": picture for n, picture in enumerate(pictures[22:])}
    found = run.predict(X[66:], gallery=gallery, k=3)
    assert list(found.retrieved.columns) == ["trial", "place", "picture", "similarity"]
    first = found.retrieved.query("place == 1")["picture"].tolist()
    assert np.mean([name == f"mine {n // N_REPEATS}" for n, name in enumerate(first)]) > 0.9
    assert not len(found.ranks)
    assert not len(found.scores)
    assert found.gallery(n_items=3).axes
    (tmp_path / "pictures").mkdir()
    for name, picture in gallery.items():
        Image.fromarray(np.uint8(255 * picture)).save(tmp_path / "pictures" / f"{name}.png")
    again = run.predict(X[66:], gallery=tmp_path / "pictures", k=3)
    assert again.retrieved["picture"].tolist() == found.retrieved["picture"].tolist()
    # A bank of them, which is mapped as it is read.
    source, encoder = open_images(str(tmp_path / "pictures")), pipeline.embed(run._run)[0].encoder
    plan = plan_bank(tmp_path / "bank", source, encoder, dtype="float32")
    embed_parts(plan, source, encoder, plan.parts)
    finish_bank(plan)
    banked = run.predict(X[66:], gallery=tmp_path / "bank", k=3)
    np.testing.assert_allclose(banked.retrieved["similarity"], again.retrieved["similarity"], atol=1e-6)
    assert banked.retrieved["picture"].tolist() == again.retrieved["picture"].tolist()
    banked.save(tmp_path / "saved")


def test_pictures_are_embedded_once_and_read_no_more_than_needed(tmp_path, monkeypatch):
    """They used to be embedded by each call, and read again one by one for images that nobody asked for."""
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown))
    run = bdv.decode(data, target="engineered", out=tmp_path / "run", settings=FEW)
    gallery = {f"mine {n}": picture[::-1] for n, picture in enumerate(pictures[:8])}
    encode, encoded = EngineeredEncoder.encode, []
    monkeypatch.setattr(
        EngineeredEncoder, "encode", lambda self, images: encoded.append(1) or encode(self, images)
    )
    first, again = (run.predict(X[:24], gallery=gallery).retrieved for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    assert len(encoded) == 1
    known = run.predict(X, shown=shown)
    known._decode = None  # as without images
    monkeypatch.setattr(prediction_files, "_find_seen", None)
    assert len(known.scores)


def test_true_pictures_are_scored_apart_from_those_of_the_training(run):
    X, _, shown = make_experiment(seed=3)
    found = run.predict(X, shown=shown)
    splits = set(found.scores["split"])
    assert splits == {"new trials", "new trials, new pictures", "new trials, pictures of the training"}
    assert found.scores["chance"].notna().any()


@pytest.mark.parametrize("form", ["arrays", "written", "file", "table"])
def test_a_folder_of_arrays_needs_no_table(run, tmp_path, form):
    X, pictures, shown = make_experiment(seed=2)
    X, shown = pick_test(X, shown)
    on = tmp_path
    if form == "written":
        data = bdv.from_arrays(X, images=dict(enumerate(pictures)), shown=shown)
        data.save(tmp_path)
    else:
        np.save(tmp_path / "data.npy", X)
        on = tmp_path / "data.npy" if form == "file" else tmp_path
    if form == "table":  # some trials know what they showed
        ids = [str(i) if i < 26 else "" for i in shown]
        pd.DataFrame({"stimulus_id": ids}).to_csv(tmp_path / "trials.csv", index=False)
    found = run.predict(on)
    n = {"arrays": 24, "file": 24, "written": 8, "table": 4 + 12}[form]
    assert len(found) == n
    assert len(found.ranks) == {"arrays": 0, "file": 0, "written": 8, "table": 4}[form]
    expected = run.predict(X, shown=shown) if form == "written" else run.predict(X)
    if form != "table":
        np.testing.assert_array_equal(found.embeddings.vectors, expected.embeddings.vectors)


def test_several_folds_give_their_mean_and_one_can_be_chosen(folded):
    X, _, shown = make_experiment()
    ids = folded.predictions_of_fold(1).ids
    rows = np.isin(shown.astype(str), ids.astype(str))
    one, mean = folded.predict(X[rows], shown=shown[rows], fold=1), folded.predict(X[rows], shown=shown[rows])
    order = [list(one.embeddings.ids).index(i) for i in ids]
    np.testing.assert_array_equal(one.embeddings.vectors[order], folded.predictions_of_fold(1).vectors)
    every = [folded.predict(X[rows], shown=shown[rows], fold=n).embeddings.vectors for n in range(3)]
    np.testing.assert_allclose(mean.embeddings.vectors, np.mean(every, axis=0), atol=1e-6)
    assert "mean of 3 folds" in mean.protocol
    assert any("mean over the 3 folds" in note for note in mean.notes)
    with pytest.raises(ConfigError, match="the folds 0 to 2, not 3"):
        folded.predict(X, fold=3)


def test_folds_with_spaces_of_their_own_have_no_mean(tmp_path):
    X, pictures, shown = make_experiment()
    data = bdv.from_arrays(X, images=pictures, shown=shown)
    own = bdv.decode(
        data, target={"kind": "pca", "n_components": 5}, split=2, out=tmp_path,
        settings={**FEW, "retrieval.gallery": "fold"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="choose one with fold=0"):
        own.predict(X)
    assert len(own.predict(X, fold=1)) == len(X)


def test_classes_are_decoded_without_a_gallery(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array(["cat", "dog"])[np.arange(60) % 2]
    X = rng.normal(size=(60, 10)) + 2 * (labels == "dog")[:, None]
    own = bdv.decode(
        bdv.from_arrays(X, labels=labels, run=np.arange(60) // 20), out=tmp_path / "run", settings=FEW
    )
    new = rng.normal(size=(20, 10)) + 2 * (np.arange(20) < 10)[:, None]
    found = own.predict(new, out=tmp_path / "out")
    assert (found.classes["class"][:10] == "dog").mean() > 0.8
    assert list(found.classes.columns) == ["trial", "class", "cat", "dog"]
    assert (tmp_path / "out" / "classes.csv").is_file()
    with pytest.raises(ConfigError, match="decodes categories and finds no pictures"):
        own.predict(new, gallery=np.zeros((3, 4, 4)))
    with pytest.raises(ConfigError, match="see classes"):
        _ = found.retrieved
    told = bdv.from_arrays(new, labels=np.where(np.arange(20) < 10, "dog", "cat"))
    scored = own.predict(told).scores.set_index(["metric", "method"])
    assert scored.loc[("accuracy", "decoded"), "value"] > 0.8
    assert not any(hasattr(found, name) for name in ("embeddings", "retrieved", "reconstructions"))
    assert not any(hasattr(own, name) for name in ("predictions", "ranks", "reconstructions"))
    named = own.predict(new, shown=["dog"] * 10 + ["horse"] * 10).scores  # of the known class alone
    assert set(named["n_queries"]) == {10}
    with pytest.warns(UserWarning, match=r"\('horse'\) contains no class \(classes cat, dog\)"):
        own.predict(new, shown="horse")


# --- what does not fit ------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_each(run, tmp_path):
    X, _, _ = make_experiment()
    holed = X.copy()
    holed[3, 2] = np.nan
    with pytest.raises(DataError, match="40 features, but these have 39 features"):
        run.predict(X[:, :39])
    with pytest.raises(DataError, match="non-finite value"):
        run.predict(holed)
    with pytest.raises(DataError, match="not dict"):
        run.predict({"a": 1})
    with pytest.raises(DataError, match="shown has 2 entries, but X has 90 trials"):
        run.predict(X, shown=["a", "b"])
    with pytest.raises(DataError, match="holds no picture"):
        run.predict(X, gallery=np.zeros((0, 4, 4)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        run.predict(X, gallery=tmp_path / "empty")
    with pytest.raises(DataError, match="the gallery is in the space 'clip', but the run predicts 'pixels"):
        run.predict(X, gallery=bdv.Embeddings(np.zeros((2, 144), np.float32), ["a", "b"], "clip"))
    with pytest.raises(ConfigError, match="no whitening to compute"):
        run.predict(X, whiten_new=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds other files"):
        run.predict(X, out=tmp_path / "full")
    found = run.predict(X[:5], out=tmp_path / "out")
    found.save(tmp_path / "out")  # the same again is no other content
    with pytest.raises(DataError, match="holds predictions of other trials"):
        run.predict(X[5:9], out=tmp_path / "out")


@pytest.mark.parametrize("k", [0, -1, "a", 2.5, True])
def test_k_is_a_number_of_pictures(run, k):
    with pytest.raises(ConfigError, match="but must be a whole number of pictures, 1 or more"):
        run.predict(make_experiment()[0], k=k)


def test_tables_and_tensors_are_arrays(run):
    import torch

    X = make_experiment()[0][:4]
    expected = run.predict(X).embeddings.vectors
    table = pd.DataFrame(X)
    for same in (table, table.astype(object), torch.tensor(X), X.tolist()):
        np.testing.assert_array_equal(run.predict(same).embeddings.vectors, expected)
    with pytest.raises(DataError, match="the column 'who' of X holds 'a'; drop it"):
        run.predict(table.assign(who="a"))


def test_cleaning_that_was_not_kept_is_said(eeg, monkeypatch):
    """Trials in memory were whitened like the run's, but not cleaned like them, without a word."""
    from types import SimpleNamespace

    from braindecode_vis.pipeline import new_trials

    assert new_trials.describe_cleaning(SimpleNamespace(ica=None)) == ""
    said = new_trials.describe_cleaning(SimpleNamespace(ica=1, autoreject=1))
    assert "removed components of the eyes (ICA) and artefacts (autoreject)" in said
    monkeypatch.setattr(new_trials, "describe_cleaning", lambda dataset: said)
    folder, own = eeg
    notes = own.predict(make_epochs(folder)).notes
    assert any("give the raw recording with whiten_new=True" in note for note in notes)


def test_cleaning_is_said_where_nothing_was_whitened(run, monkeypatch):
    """A run that cleaned its recordings and learnt nothing else took any trials without a word."""
    from braindecode_vis.pipeline import new_trials

    monkeypatch.setattr(new_trials, "describe_cleaning", lambda dataset: "cleaned")
    X, _, _ = make_experiment()
    assert "cleaned" in run.predict(X[:2]).notes
    assert "cleaned" not in run.predict(X[:2], prepared=True).notes


def test_ids_that_the_gallery_lacks_are_said(run):
    """Tables were empty without a word."""
    X, pictures, _ = make_experiment()
    with pytest.warns(UserWarning, match="contains no picture of the gallery"):
        found = run.predict(X[:4], shown=["q", "q", "w", "e"])
    assert len(found) == 3  # equal ids are repetitions all the same
    assert "contains no picture of the gallery" in found.notes[-1]
    with pytest.raises(DataError, match="the gallery holds one picture; give at least two"):
        run.predict(X[:4], gallery=pictures[:1])
    with pytest.raises(ConfigError, match="the fold is 'a', but must be a number from 0 to 0"):
        run.predict(X[:4], fold="a")


def test_what_a_folder_holds_is_never_lost(run, tmp_path):
    X, pictures, shown = make_experiment()
    found = run.predict(X[:5], out=tmp_path / "out")
    (tmp_path / "out" / "letter.txt").write_text("dear")
    data = bdv.from_arrays(X, images=pictures, shown=shown)
    for write in (
        lambda: found.save(tmp_path / "out"),
        lambda: bdv.decode(data, out=tmp_path / "out"),
        lambda: data.save(tmp_path / "out"),
        lambda: bdv.Decoder(encoder="lda").fit(X, shown).save(tmp_path / "out"),
    ):
        with pytest.raises(DataError, match=r"holds (other )?files.*choose a"):
            write()
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"
    with pytest.raises(DataError, match="it is a file"):
        bdv.decode(data, out=tmp_path / "out" / "letter.txt")


def test_a_set_that_is_read_from_no_folder_has_no_other_root(tmp_path, command_line):
    """The configuration of the run was blamed: "unknown key dataset.root", which nobody had written."""
    few = [
        "dataset.n_train=40",
        "dataset.n_test=10",
        *(f"{key}={value}" for key, value in FEW.items() if value),
    ]
    pipeline.evaluate(open_run(read_config("synthetic_digits", few), tmp_path / "run"))
    (tmp_path / "new").mkdir()
    done = command_line("predict", tmp_path / "run", "--on", tmp_path / "new", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path / 'new'} holds no trials, and synthetic_digits, which the run decodes, reads no "
        "folder; --on takes a folder of arrays or a file of trials.\n",
    )
    done = command_line("run", "synthetic_digits", "--root", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (
        2, "error: the data set synthetic_digits needs no folder; leave --root out.\n"
    )  # fmt: skip


def test_unfinished_runs_and_wrong_folders_on_the_command_line(run, tmp_path, command_line):
    X, pictures, shown = make_experiment()
    np.save(tmp_path / "new.npy", X[:3])
    bdv.from_arrays(X, images=pictures, shown=shown, split=declare(shown)).save(tmp_path / "data")
    config = read_config("arrays_ridge", ["split={kind: published}"], root=tmp_path / "data")
    pipeline.preprocess(open_run(config, tmp_path / "half"))

    def call(folder, *more):
        return command_line("predict", folder, "--on", tmp_path / "new.npy", "--out", tmp_path / "out", *more)

    for folder, words in ((tmp_path, "is not a run folder"), (tmp_path / "half", "is unfinished: its stage")):
        done = call(folder)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    done = call(run.folder, "--gallery", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "nothing does not exist" in done.stderr
    done = call(run.folder)
    assert done.returncode == 0, done.stderr
    assert "3 trials predicted" in done.stdout


# --- a gallery of descriptions ----------------------------------------------------------------------------


def test_a_gallery_needs_no_pictures(run, folded, tmp_path):
    """Candidates are known by what a file says of them; the words are learnt from those of training pictures."""
    X, pictures, shown = make_experiment()
    ids = [str(n) for n in range(N_PICTURES)]
    parts = pictures.reshape(N_PICTURES, 4, 3, 4, 3).mean(axis=(2, 4)).reshape(N_PICTURES, -1)
    bright = parts > parts.mean(axis=0)
    texts = [" ".join(f"part{'abcdefghijklmnop'[n]}" for n in np.flatnonzero(row)) for row in bright]
    pd.DataFrame({"id": ids, "caption": texts}).to_csv(tmp_path / "texts.csv", index=False)
    X, shown = pick_test(X, shown)
    found = run.predict(X, shown=shown, gallery=tmp_path / "texts.csv")
    assert_own(found, run)
    assert found.candidates.stimuli is None
    first = found.retrieved.iloc[0]
    assert first["description"] == dict(zip(ids, texts, strict=True))[first["picture"]]
    scores = found.scores[found.scores["method"] == "decoded"].set_index("metric")
    assert scores.loc["2_way@descriptions", "value"] > 0.8
    assert scores.loc["top1@descriptions", "gallery_size"] == N_PICTURES
    assert "gallery of 30 descriptions (texts.csv), by a regression from words" in found.protocol
    assert (folded.predict(X, shown=shown, gallery=tmp_path / "texts.csv").ranks["rank"] <= 30).all()
    pd.DataFrame({"id": ids[22:], "caption": texts[22:]}).to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(
        DataError, match=r"0 training images are described, too few .* describe training images too"
    ):
        run.predict(X, gallery=tmp_path / "new.csv")
    with pytest.raises(DataError, match=r"the gallery .* does not exist; .* or a CSV of captions"):
        run.predict(X, gallery=tmp_path / "none.csv")


# --- many trials ------------------------------------------------------------------------------------------


def test_the_first_trials_are_predicted_as_among_all(run, folded):
    X, _, shown = make_experiment()
    X, shown = pick_test(X, shown)
    every, first = run.predict(X, shown=shown), run.predict(X, shown=shown, limit=3)
    assert len(every) > len(first) == 3
    # Processors may add up products of three rows in another order than those of all.
    np.testing.assert_allclose(first.embeddings.vectors, every.embeddings.vectors[:3], rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(first.retrieved, every.retrieved[every.retrieved["trial"] < 3])
    pd.testing.assert_frame_equal(first.ranks, every.ranks[every.ranks["trial"] < 3])
    np.testing.assert_array_equal(first.reconstructions, np.asarray(every.reconstructions)[:3])
    assert (
        f"Only the first 3 of {len(every)} trials were predicted; the gallery is that of all." in first.notes
    )
    assert run.predict(X, limit=10_000).notes == run.predict(X).notes
    for wrong in (0, -1, True, 1.5, "3"):
        with pytest.raises(ConfigError, match="but must be a whole number of trials, 1 or more"):
            run.predict(X, limit=wrong)


def test_the_command_says_first_how_many_trials_there_are(run, tmp_path, command_line):
    X, _, shown = make_experiment()
    X, shown = pick_test(X, shown)
    folder = tmp_path / "new"
    folder.mkdir()
    np.save(folder / "data.npy", X)
    pd.DataFrame({"stimulus_id": [str(n) for n in shown]}).to_csv(folder / "trials.csv", index=False)
    out = tmp_path / "out"
    done = command_line("predict", run.folder, "--on", folder, "--out", out, "--limit", 2, "--no-images")
    assert done.returncode == 0, done.stderr
    assert f"predict: the first 2 of 8 trials (averages of {len(X)})" in done.stderr
    assert not (out / "images").exists()
    assert len(pd.read_csv(out / "trials.csv")) == 2
    assert "2 trials predicted" in done.stdout


def test_long_drawing_says_its_time_after_two_batches(monkeypatch):
    """The first batch is not counted: it also loads the generator."""
    from braindecode_vis.pipeline import reconstruction
    from braindecode_vis.pipeline.image_files import DrawnImages

    now, said = [0.0], []
    monkeypatch.setattr(reconstruction.time, "monotonic", lambda: now[0])

    class Listener:
        @contextmanager
        def progress(self, description, total):
            said.append((description, total))
            yield lambda n: None

        @contextmanager
        def watch(self, description):
            yield lambda done, total, text: said.append(text)

    def make(rows):
        now[0] += 2.0 if rows.start else 60.0
        return {"decoded": np.zeros((len(rows), 2, 2, 3), np.uint8)}

    drawn = DrawnImages(("decoded",), 100, 4, make)
    reconstruction.draw_decoded(lambda shown: drawn, 1, None, Listener())
    assert said == [("reconstructing", 100), "100 images take about 46 s, measured on 4 of them"]
