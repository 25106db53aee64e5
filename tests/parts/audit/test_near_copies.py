"""Copies but for noise, gain, a grey level or compression are found among trials and pictures; alike ones are not."""

import io

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.drawn.images import render_batch
from braindecode_vis.datasets.trial_values import find_copied_trials
from braindecode_vis.pipeline.leaks.split_overlap import find_like_pictures

# --- trials -------------------------------------------------------------------------------------------------


def make_trials(n, size, rank, *, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(n, rank)) @ generator.normal(size=(rank, size))).astype(np.float32)


@pytest.mark.parametrize(("n", "size", "rank"), [(80, 24, 24), (80, 24, 6), (80, 5, 5), (200, 3000, 20)])
@pytest.mark.parametrize("noise", [1e-6, 1e-3])
def test_a_copy_with_noise_is_found_however_few_values_a_trial_has(n, size, rank, noise):
    X = make_trials(n, size, rank)
    assert find_copied_trials(X, np.arange(n - 20, n)) == []
    X[-3] = 1.5 * (X[5] + noise * X[5].std() * np.random.default_rng(1).normal(size=size))
    assert find_copied_trials(X, np.arange(n - 20, n)) == [(5, n - 3)]


def test_copies_among_rows_that_nobody_asked_about_are_left_out():
    X = make_trials(60, 300, 40)
    X[7] = X[3] * (1 + 1e-6)
    X[8] = X[4] + 1e-6
    assert find_copied_trials(X, np.array([8, 50])) == [(4, 8)]


def test_all_trials_are_compared_with_all_also_across_blocks():
    X = make_trials(1100, 300, 40)
    for copy, first in ((1090, 5), (1095, 1030), (7, 3)):
        X[copy] = X[first] * (1 + 1e-6)
    assert find_copied_trials(X) == [(3, 7), (5, 1090), (1030, 1095)]


def test_more_trials_than_all_pairs_of_which_could_be_compared_are_compared_with_the_tested(monkeypatch):
    monkeypatch.setattr("braindecode_vis.datasets.trial_values.MAX_CORRELATED", 100)
    X = make_trials(300, 200, 50)
    X[250] = X[20] * 1.0001
    assert find_copied_trials(X) == []
    assert find_copied_trials(X, np.arange(240, 300)) == [(20, 250)]


def test_silent_trials_and_trials_of_one_bad_channel_are_no_copies():
    X = make_trials(60, 400, 60).reshape(60, 20, 20)
    X[[3, 40]] = 0
    X[[4, 41]] = 7.0
    X[[5, 42], 2] = 1e6 * np.linspace(1, 2, 20)  # an electrode that came off, twice in the same way
    assert find_copied_trials(X, np.arange(30, 60)) == []


def test_many_trials_that_are_alike_for_want_of_signal_take_no_time():
    """Pairs that must be looked at one by one are bounded, whatever the data."""
    X = np.zeros((900, 40), np.float32)
    X[:, 11] = np.random.default_rng(0).random(900) + 1
    X[:300] = make_trials(300, 40, 30)
    assert isinstance(find_copied_trials(X, np.arange(400, 900)), list)


# --- pictures -----------------------------------------------------------------------------------------------


def compress(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


CHANGES = {
    "a grey level": lambda image: np.clip(image.astype(int) + 1, 0, 255).astype(np.uint8),
    "noise": lambda image: np.clip(image + np.random.default_rng(0).normal(0, 2, image.shape), 0, 255).astype(
        np.uint8
    ),
    "compression": lambda image: compress(image, 75),
    "brightness": lambda image: (0.9 * image + 10).astype(np.uint8),
    "another size": lambda image: np.asarray(
        Image.fromarray(image).resize((180, 180), Image.Resampling.LANCZOS).resize(image.shape[:2])
    ),
    "mirroring": lambda image: image[:, ::-1].copy(),
}


@pytest.fixture(scope="module")
def pictures():
    """Of 40 concepts of the phantom, three pictures each."""
    return render_batch(np.repeat(np.arange(40), 3), np.tile(np.arange(3), 40), size=112, seed=0)


def name_pictures(pictures):
    return StimulusSet.from_pixels(pictures, [f"p{n:03d}" for n in range(len(pictures))])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_of_a_picture_is_found(pictures, change):
    copied = np.concatenate([pictures, CHANGES[change](pictures[17])[None]])
    stimuli = name_pictures(copied)
    pairs = find_like_pictures(stimuli, list(stimuli.ids), {"p120", "p004"})
    assert [pair[:2] for pair in pairs] == [("p017", "p120")]
    assert ("mirror" in pairs[0][2]) == (change == "mirroring")


def test_pictures_of_one_concept_are_no_copies(pictures):
    stimuli = name_pictures(pictures)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids)) == []


def test_handwritten_digits_are_no_copies():
    """The 1797 of scikit-learn have 8 x 8 pixels; the nearest two of one class differ by few of them."""
    from sklearn.datasets import load_digits

    digits = np.repeat((load_digits().images * 15).astype(np.uint8)[..., None], 3, axis=3)
    stimuli = name_pictures(digits)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[::9])) == []


def test_gratings_and_plain_pictures_are_no_copies():
    """What differs in fine detail alone has one thumbnail; what has no detail has none."""
    y, x = np.mgrid[:128, :128]
    window = 127 * np.exp(-((x - 50) ** 2 + (y - 70) ** 2) / 900)
    gratings = [128 + 100 * (window / 127) + 20 * np.sin(x * a + y * b) for a in (1, 2, 3) for b in (0, 1.5)]
    plain = [np.full((128, 128), level) for level in (100, 101, 200)]
    stack = np.repeat(np.clip(np.stack([*gratings, *plain]), 0, 255).astype(np.uint8)[..., None], 3, axis=3)
    stimuli = name_pictures(stack)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[::2])) == []
