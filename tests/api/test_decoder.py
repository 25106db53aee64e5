"""The decoder object: an estimator by scikit-learn's rules that takes arrays, epochs and responses."""

import json
import pickle
import sys
from types import SimpleNamespace

import mne
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import braindecode_vis as bdv

RIDGE = {"kind": "ridge", "alphas": [1.0]}


def make_experiment(seed=0, n=60, noise=0.3):
    rng = np.random.default_rng(seed)
    pictures = rng.random((n, 6, 6))
    X = pictures.reshape(n, -1) @ np.random.default_rng(1).normal(size=(36, 50))
    return (X + noise * rng.normal(size=X.shape)).astype(np.float32), pictures


def make_epochs(X, sfreq=50.0, names=None, event_id=None):
    n_trials, n_channels, _ = X.shape
    info = mne.create_info(names or [f"E{n}" for n in range(n_channels)], sfreq, "eeg")
    codes = (
        np.ones(n_trials, int)
        if event_id is None
        else np.tile(sorted(event_id.values()), n_trials)[:n_trials]
    )
    events = np.c_[np.arange(n_trials), np.zeros(n_trials, int), codes]
    return mne.EpochsArray(X, info, events, event_id=event_id, verbose="error")


@pytest.fixture(scope="module")
def fitted():
    X, pictures = make_experiment()
    return bdv.Decoder(encoder=RIDGE).fit(X[:40], pictures[:40])


def test_fit_predict_retrieve_reconstruct(fitted):
    X, pictures = make_experiment()
    assert fitted.predict(X[40:]).shape == (20, 36)
    assert fitted.score(X[40:], pictures[40:]) > 0.5
    found = fitted.retrieve(X[40:], gallery=pictures[40:], k=3)
    first = found[found["place"] == 1]
    assert (first["picture"].astype(int).to_numpy() == np.arange(20)).mean() > 0.5
    assert fitted.reconstruct(X[40:]).shape == (20, 6, 6, 3)
    assert set(fitted.retrieve(X[40:], k=1)["place"]) == {1}


def test_trials_are_described(tmp_path):
    """That captions are those of a run is in test_predict."""
    X, pictures = make_experiment(n=24)
    shown = [f"p{n}" for n in range(24)]
    bank = tmp_path / "bank.csv"
    bank.write_text("\n".join(["id,caption", *(f"{name},picture number {name}" for name in shown)]))
    coca = {"kind": "coca", "epochs": 1, "width": 8, "depth": 2, "n_queries": 1, "device": "cpu"}
    captions = [{**each, "bank": str(bank)} for each in ({"kind": "nearest"}, coca)]
    decoder = bdv.Decoder(encoder=RIDGE, prior="spread", captions=captions)
    decoder.fit(X[:16], shown[:16], images=dict(zip(shown[:16], pictures[:16], strict=True)))
    made = decoder.caption(X[16:])
    assert made.groupby("source").size().to_dict() == {"nearest-caption": 8, "coca": 8}
    nearest = decoder.retrieve(X[16:], k=1)["picture"]
    assert made["caption"].tolist()[:8] == [f"picture number {name}" for name in nearest]
    pd.testing.assert_frame_equal(bdv.Decoder.load(decoder.save(tmp_path / "d")).caption(X[16:]), made)
    bdv.Decoder.load(decoder.save(tmp_path / "d", include_pictures=False)).predict(X)
    assert not (tmp_path / "d/captions").exists()  # they name what the pictures show
    for wrong, sentence in (
        (None, "has no captions"), ({"kind": "nearest"}, "bank"), (captions[:1] * 2, "more than once"),
    ):  # fmt: skip
        with pytest.raises(bdv.ConfigError, match=sentence):
            decoder.set_params(captions=wrong).caption(X)
    with pytest.raises(bdv.ConfigError, match="lda learns classes"):
        bdv.Decoder(encoder="lda", captions=captions).fit(X, ["a", "b"] * 12)


def test_a_clip_network_reads_descriptions_itself(fitted, tmp_path, monkeypatch):
    """Of pictures that were never shown: nothing of them is learnt."""
    X, pictures = make_experiment()
    path = tmp_path / "texts.csv"
    path.write_text("id,caption\nx,4\ny,5\n")
    with pytest.raises(bdv.DataError, match="describe training images too"):
        fitted.retrieve(X[:8], gallery=path)
    meant = {"4": pictures[4].ravel(), "5": pictures[5].ravel()}
    tower = SimpleNamespace(encode=lambda texts: np.stack([meant.get(t, pictures[0].ravel()) for t in texts]))
    monkeypatch.setattr("braindecode_vis.embeddings.text.open_clip_texts", lambda target: tower)
    found = fitted.retrieve(X[4:6], gallery=path, k=1)
    assert found["picture"].tolist() == ["x", "y"]


def test_it_is_an_estimator():
    X, pictures = make_experiment()
    decoder = bdv.Decoder(encoder=RIDGE)
    assert clone(decoder).get_params() == decoder.get_params()
    assert cross_val_score(decoder, X, pictures, cv=3).mean() > 0.3
    chain = make_pipeline(StandardScaler(), bdv.Decoder(encoder=RIDGE)).fit(X[:40], pictures[:40])
    assert chain.score(X[40:], pictures[40:]) > 0.4
    grid = {"encoder": [{"kind": "ridge", "alphas": [alpha]} for alpha in (1.0, 1e6)]}
    best = GridSearchCV(decoder, grid, cv=3).fit(X, pictures).best_params_
    assert best["encoder"]["alphas"] == [1.0]
    with pytest.raises(NotFittedError):
        bdv.Decoder().predict(X)


@pytest.mark.parametrize("encoder", ["lda", pytest.param("logistic", marks=pytest.mark.further)])
def test_scikit_learns_own_checks(encoder):
    """Decoders of classes follow its conventions, but for the type of one exception."""
    known = {"check_dtype_object": "objects that are no numbers raise a ValueError instead of a TypeError"}
    results = check_estimator(
        bdv.Decoder(encoder=encoder), on_skip=None, on_fail="raise", expected_failed_checks=known
    )
    assert len(results) > 35


def test_a_decoder_can_be_pickled(fitted):
    X, _ = make_experiment()
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    assert not hasattr(pickle.loads(pickle.dumps(bdv.Decoder())), "_fitted")


def test_labels_keep_their_type_and_order():
    rng = np.random.default_rng(0)
    y = np.tile([2, 10], 20)
    X = rng.normal(size=(40, 5)) + (y == 10)[:, None] * 3
    decoder = bdv.Decoder(encoder="lda").fit(X, y)
    assert decoder.classes_.tolist() == [2, 10]
    assert (decoder.predict(X) == y).mean() > 0.9
    assert (decoder.predict_proba(X)[:, 1] > 0.5)[y == 10].mean() > 0.9
    assert cross_val_score(bdv.Decoder(encoder="lda"), X, y, cv=3, scoring="roc_auc").mean() > 0.9


def test_a_saved_decoder_gives_the_same_bits(fitted, tmp_path):
    X, _ = make_experiment()
    again = bdv.Decoder.load(fitted.save(str(tmp_path / "decoder")))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    np.testing.assert_array_equal(again.reconstruct(X[:5]), fitted.reconstruct(X[:5]))
    assert again.get_params() == fitted.get_params()
    with pytest.raises(bdv.DataError, match="holds no decoder"):
        bdv.Decoder.load(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(bdv.DataError, match="are no decoder"):
        fitted.save(tmp_path)
    assert (tmp_path / "mine.txt").is_file()


def test_classes_from_arrays_and_epochs():
    rng = np.random.default_rng(0)
    labels = np.tile(["face", "house"], 40)
    X = rng.normal(size=(80, 4, 10)) + (labels == "face")[:, None, None]
    decoder = bdv.Decoder(encoder="lda").fit(X[:60], labels[:60])
    assert decoder.classes_.tolist() == ["face", "house"]
    assert decoder.score(X[60:], labels[60:]) > 0.9
    np.testing.assert_allclose(decoder.predict_proba(X).sum(axis=1), 1)
    epochs = make_epochs(X, event_id={"face": 1, "house": 2})
    other = bdv.Decoder(encoder="lda").fit(epochs[:60], labels[:60])
    assert (other.predict(epochs[60:]) == decoder.predict(X[60:])).all()
    with pytest.raises(bdv.ConfigError, match="makes no images"):
        decoder.reconstruct(X)


def test_a_network_by_its_name(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.random((24, 6, 6))
    X = rng.normal(size=(24, 5, 40)).astype(np.float32)
    settings = {"kind": "network", "network": {"kind": "eegproject"}, "epochs": 1, "device": "cpu"}
    decoder = bdv.Decoder(encoder=settings, target="pixels").fit(X, pictures)
    assert decoder.predict(X).shape == (24, 36)
    again = bdv.Decoder.load(decoder.save(tmp_path / "d"))
    np.testing.assert_array_equal(again.predict(X), decoder.predict(X))
    assert bdv.Decoder(encoder="eegproject")._read_encoder()["network"] == {"kind": "eegproject"}


def test_a_prior_learns_from_predictions_of_held_out_trials():
    X, pictures = make_experiment()
    decoder = bdv.Decoder(encoder=RIDGE, prior="spread").fit(X[:40], pictures[:40])
    assert decoder.reconstruct(X[40:]).shape == (20, 6, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, X, p: d.predict(X[:, :-1]), "X has 49 features, but Decoder is expecting 50"),
        (lambda d, X, p: d.predict(np.full((2, 50), np.nan)), "non-finite"),
        (lambda d, X, p: d.predict([[1.0, 2.0], [1.0]]), "different lengths"),
        (lambda d, X, p: clone(d).fit(X), "fit and score need"),
        (lambda d, X, p: clone(d).fit(X, ["face"] * 60), "which is not a picture file"),
        (lambda d, X, p: clone(d).fit(X, np.arange(60)), "y holds no pictures"),
        (lambda d, X, p: clone(d).fit(X, p[:-1]), "60 trials|59 entries"),
        (lambda d, X, p: clone(d).fit(X, [*p[:-1], p[0][1:]]), "the pictures have 2 different sizes"),
        (lambda d, X, p: clone(d).fit(X, p * 300), "must be between 0 and 1"),
        (lambda d, X, p: d.retrieve(X, gallery=[]), "no picture"),
        (lambda d, X, p: d.predict_proba(X), "only decoders of classes"),
        (lambda d, X, p: d.retrieve(X, k=0), "k is 0, but must be a whole number"),
        (lambda d, X, p: d.predict("X.npy"), "must be an array of trials, .*, not str"),
        (lambda d, X, p: d.predict(None), "not NoneType"),
        (
            lambda d, X, p: bdv.Decoder("lda").fit(X, p),
            "lda learns one class per trial: y should be a 1d array",
        ),
        (lambda d, X, p: bdv.Decoder("lda").fit(X, np.arange(60) % 2, images=p), "leave images out"),
        (lambda d, X, p: bdv.Decoder(target="pixel").fit(X, p), "pixels"),
        (
            lambda d, X, p: bdv.Decoder(encoder=RIDGE, generator="sdxl_turbo").fit(X, p).reconstruct(X),
            "generator",
        ),
    ],
)
def test_bad_input_is_one_sentence(fitted, call, message):
    X, pictures = make_experiment()
    with pytest.raises(bdv.BraindecodeVisError, match=message):
        call(fitted, X, pictures)


def test_other_channels_are_noticed():
    rng = np.random.default_rng(0)
    X, labels = rng.normal(size=(20, 3, 10)), np.tile(["a", "b"], 10)
    decoder = bdv.Decoder(encoder="lda").fit(make_epochs(X), labels)
    with pytest.raises(bdv.DataError, match="other names, or another order"):
        decoder.predict(make_epochs(X, names=["E2", "E1", "E0"]))


def test_epochs_go_through_cross_validation():
    """scikit-learn picks trials of Epochs one by one into a list, which was taken for an array of four axes."""
    rng = np.random.default_rng(0)
    y = np.tile(["face", "house"], 20)
    X = rng.normal(size=(40, 3, 6)) + 2.0 * (y == "face")[:, None, None]
    epochs, lda = make_epochs(X, event_id={"face": 1, "house": 2}), bdv.Decoder(encoder="lda")
    found = cross_val_score(lda, epochs, y, cv=4, error_score="raise")
    np.testing.assert_array_equal(found, cross_val_score(lda, epochs.get_data(), y, cv=4))
    search = GridSearchCV(lda, {"encoder": ["lda", "logistic"]}, cv=2).fit(epochs, y)
    assert (search.predict(epochs) == y).mean() > 0.9
    with pytest.raises(bdv.DataError, match="different channels or times"):
        lda.fit([epochs[0], make_epochs(X[:1], names=["a", "b", "c"])], y[:2])


def test_settings_of_a_network_stand_one_level_down():
    X, pictures = make_experiment(n=8)
    with pytest.raises(bdv.ConfigError, match=r"'network': \{'kind': 'eegproject'\}"):
        bdv.Decoder(encoder={"kind": "eegproject", "epochs": 2}).fit(X, pictures)


BRIGHTNESS = """
from typing import Literal

import numpy as np

from braindecode_vis.base.settings import Settings


class Brightness:
    space = "brightness"

    def encode(self, images):
        return np.array([[image.mean()] for image in images], dtype=np.float32)


class BrightnessConfig(Settings):
    kind: Literal["brightness"] = "brightness"

    def build(self):
        return Brightness()
"""


def test_epochs_and_pictures_teach_what_their_array_teaches():
    """Labels of events are not looked at: the pictures come from y."""
    X, pictures = make_experiment(n=12)
    epochs = make_epochs(X.reshape(12, 5, 10))
    decoder = bdv.Decoder(encoder=RIDGE)
    found = decoder.fit(epochs, pictures).predict(epochs)
    assert list(decoder._coords["ch_names"]) == ["E0", "E1", "E2", "E3", "E4"]
    np.testing.assert_array_equal(decoder.fit(epochs.get_data(), pictures).predict(epochs.get_data()), found)


def test_a_target_of_ones_own_needs_no_consent_beside_its_name(tmp_path, monkeypatch):
    """Who writes the name into a call trusts the code; a file that names it is asked about."""
    (tmp_path / "own_brightness.py").write_text(BRIGHTNESS)
    monkeypatch.syspath_prepend(tmp_path)
    X, pictures = make_experiment(n=8)
    decoder = bdv.Decoder(encoder=RIDGE, target="own_brightness:BrightnessConfig", generator="nearest")
    assert decoder.fit(X, pictures).predict(X).shape == (8, 1)
    folder = decoder.save(tmp_path / "d")
    monkeypatch.delitem(sys.modules, "own_brightness")  # as in another process
    with pytest.raises(bdv.ConfigError, match=r"own_brightness:BrightnessConfig.*which only you can allow"):
        bdv.Decoder.load(folder)


def test_what_earlier_versions_did_not_write_of_a_decoder_has_a_default(fitted, tmp_path):
    """And `read_decoder` predicts with it as before."""
    folder = fitted.save(tmp_path / "d")
    record = json.loads((folder / "decoder.json").read_text())
    for name in ("typical", "subjects", "facts"):
        del record[name]
    (folder / "decoder.json").write_text(json.dumps(record))
    found = bdv.Decoder.load(folder)
    assert (found._typical, found._subjects) == ((0.0, 1.0), ())
    X, _ = make_experiment()
    np.testing.assert_array_equal(found.predict(X[40:]), fitted.predict(X[40:]))


def test_auto_tries_decoders_of_classes_where_labels_are_given(tmp_path):
    """It asked for ``candidates: classes`` before."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["face", "house"], 12)
    X = (labels == "face")[:, None] + 0.3 * rng.normal(size=(24, 4))
    fitted = bdv.Decoder(encoder="auto").fit(X, labels)
    assert fitted.score(X, labels) > 0.9
    for given in (labels.tolist(), bdv.from_arrays(X, labels=labels)):
        again = bdv.Decoder(encoder="auto").fit(
            X if isinstance(given, list) else given, given if isinstance(given, list) else None
        )
        np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    loaded = bdv.Decoder.load(fitted.save(tmp_path / "decoder"))
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    pictures = rng.random((24, 4, 4))
    auto = {"kind": "auto", "candidates": [RIDGE]}
    assert bdv.Decoder(encoder=auto).fit(X, pictures).predict(X).shape[0] == 24
