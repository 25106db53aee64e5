import numpy as np
import pandas as pd
import pytest

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.pipeline.reconstruction import measure_repetition_noise


def make_trials(ids, values):
    trials = pd.DataFrame(
        {"subject": "01", "session": "1", "run": "1", "stimulus_id": ids, "repetition": 0, "split": "train"}
    )
    data = np.asarray(values, np.float32)
    return Responses(data, ("trial", "voxel"), trials, "a.u.", {"voxel": np.arange(data.shape[1])})


def predict(trials):
    return Embeddings(2 * trials.as_matrix(), list(trials.stimulus_ids), "space")


def test_noise_is_that_of_one_repetition_whatever_their_number():
    rng = np.random.default_rng(0)
    ids = np.repeat([f"image{i}" for i in range(600)], 3)
    images = np.repeat(rng.normal(size=(600, 2)), 3, axis=0)
    noise = measure_repetition_noise(
        predict, make_trials(ids, images + 0.5 * rng.normal(size=(1800, 2))), n_train=3, n_test=40
    )
    assert (noise.n_train, noise.n_test) == (3, 40)
    np.testing.assert_allclose((noise.deviations**2).mean(axis=0), 1.0, rtol=0.1)  # (2 x 0.5) ** 2


def test_images_shown_once_say_nothing():
    trials = make_trials(["a", "b", "c"], np.ones((3, 2)))
    assert measure_repetition_noise(predict, trials, n_train=1, n_test=1) is None
    some = make_trials(["a", "b", "a", "c"], [[1.0, 0], [9, 9], [3, 0], [7, 7]])
    noise = measure_repetition_noise(predict, some, n_train=2, n_test=1)
    np.testing.assert_allclose(np.abs(noise.deviations), [[2**1.5, 0], [2**1.5, 0]], rtol=1e-6)
    assert noise.deviations.sum() == pytest.approx(0)
