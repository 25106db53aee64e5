"""THINGS-EEG2 phantom, preprocessed: the four published forms."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from braindecode_vis.checks import DataError
from braindecode_vis.phantom.writers import things_eeg2_derived as derived

SIZES = {"n_images": 4, "n_repetitions": 2, "ch_names": ["O1", "O2", "Oz"]}


@pytest.fixture
def epochs():
    return np.random.default_rng(0).standard_normal((4, 2, 3, 250))


def test_official_form_is_a_0d_array(tmp_path, epochs):
    path = derived.write_official(tmp_path, 1, "test", iter(epochs[..., :100]), **SIZES)
    assert path == tmp_path / "sub-01" / "preprocessed_eeg_test.npy"
    loaded = np.load(path, allow_pickle=True)
    assert loaded.shape == ()
    content = loaded.item()
    np.testing.assert_array_equal(content["preprocessed_eeg_data"], epochs[..., :100])
    np.testing.assert_allclose(content["times"][[0, -1]], [-0.2, 0.79])
    assert len(content["times"]) == 100


def test_250_hz_form_is_a_bare_pickle_with_300_times(tmp_path, epochs):
    path = derived.write_250hz(tmp_path, 1, "training", iter(epochs), **SIZES)
    content = np.load(path, allow_pickle=True)
    assert isinstance(content, dict)  # NumPy falls back to pickle: no `.item()`
    assert path.read_bytes()[:2] == b"\x80\x04"
    np.testing.assert_array_equal(content["preprocessed_eeg_data"], epochs)
    assert content["preprocessed_eeg_data"].dtype == np.float64
    assert len(content["times"]) == 300
    assert content["times"][50] == 0
    assert pickle.loads(path.read_bytes()).keys() == content.keys()


def test_ubp_form_needs_full_unpickling(tmp_path, epochs):
    sessions = np.array([[0, 1]] * 4)
    path = derived.write_ubp(
        tmp_path, 3, "training", iter(epochs), images=[f"train_images/{i}.jpg" for i in range(4)],
        labels=[0, 0, 1, 1], texts=["ant", "ant", "bee", "bee"], sessions=sessions, ch_names=SIZES["ch_names"],
    )  # fmt: skip
    assert path == tmp_path / "Preprocessed_data_250Hz_whiten" / "sub-03" / "train.pt"
    content = torch.load(path, weights_only=False)
    np.testing.assert_array_equal(content["eeg"], epochs.astype(np.float16))
    assert content["eeg"].dtype == np.float16
    assert content["img"].tolist()[2] == ["train_images/2.jpg"] * 2
    assert content["text"].tolist()[3] == ["bee", "bee"]
    assert content["label"].tolist()[0] == [0, 0]
    np.testing.assert_array_equal(content["session"], sessions)
    assert len(content["times"]) == 300
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the protocol, before the refusal
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)


def test_ubp_refuses_what_float16_cannot_hold(tmp_path, epochs):
    with np.errstate(over="ignore"), pytest.raises(DataError, match="whiten them first"):
        derived.write_ubp(
            tmp_path, 3, "test", iter(epochs * 1e6), images=["a"] * 4, labels=[0] * 4, texts=["a"] * 4,
            sessions=np.zeros((4, 2)), ch_names=SIZES["ch_names"],
        )  # fmt: skip


def test_neurobridge_form_is_plain(tmp_path, epochs):
    path = derived.write_neurobridge(
        tmp_path,
        1,
        "training",
        iter(epochs),
        n_concepts=2,
        n_exemplars=2,
        n_repetitions=2,
        ch_names=["a", "b", "c"],
    )
    array = np.load(path, allow_pickle=False)
    np.testing.assert_array_equal(array, epochs.astype(np.float32).reshape(2, 2, 2, 3, 250))
    info = json.loads((path.parent / "info.json").read_text())
    assert info["ch_names"] == ["a", "b", "c"]
    assert info["baseline_duration"] == 0.2
    features = np.random.default_rng(0).standard_normal((2, 2, 7)).astype(np.float32)
    path = derived.write_neurobridge_features(tmp_path, "ViT", "training", features)
    assert path == tmp_path / "image_feature" / "ViT" / "image_train.npy"
    np.testing.assert_array_equal(np.load(path), features)


def test_too_few_epochs_leave_no_file(tmp_path, epochs):
    with pytest.raises(DataError, match="announced with 4 images, but 3 came"):
        derived.write_250hz(tmp_path, 1, "test", iter(epochs[:3]), **SIZES)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_estimate(tmp_path, epochs):
    path = derived.write_250hz(tmp_path, 1, "test", iter(epochs), **SIZES)
    assert abs(path.stat().st_size - derived.estimate_epochs_bytes(4, 2, 3, 250)) < 4000
