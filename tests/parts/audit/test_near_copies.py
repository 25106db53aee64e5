"""Copies but for noise, gain, a grey level or compression are found among trials and pictures; alike ones are not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.drawn.images import render_batch
from braindecode_vis.datasets.trial_values import find_copied_trials
from braindecode_vis.pipeline.leaks.likeness import LARGEST_DISTANCE, find_copies, find_like_pictures

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


def add_noise(trial, share):
    return trial + share * trial.std() * np.random.default_rng(1).normal(size=trial.shape)


def take_half(trial, other):
    is_taken = np.random.default_rng(2).permutation(trial.size) < trial.size // 2
    return np.where(is_taken.reshape(trial.shape), trial, other)


TRIAL_CHANGES = {
    "noise of a tenth": lambda trial, other: add_noise(trial, 0.1),
    "negated": lambda trial, other: -trial,
    "negated, scaled, with noise": lambda trial, other: add_noise(-3 * trial, 0.05),
    "half of its values": take_half,
    "the first half": lambda trial, other: np.r_[trial[: trial.size // 2], other[trial.size // 2 :]],
}


@pytest.mark.parametrize("change", TRIAL_CHANGES)
@pytest.mark.parametrize(("size", "rank"), [(300, 60), (3000, 80)])
def test_a_changed_copy_of_a_trial_is_found(change, size, rank):
    X = make_trials(400, size, rank)
    X[390] = TRIAL_CHANGES[change](X[7], X[390])
    assert find_copied_trials(X, np.arange(380, 400)) == [(7, 390)]
    assert find_copied_trials(X) == [(7, 390)]


def test_counts_and_silent_halves_are_no_copies_of_halves():
    """Many trials share small counts, and two may have the same channels switched off."""
    generator = np.random.default_rng(0)
    assert find_copied_trials(generator.poisson(2, (300, 200)).astype(np.float32)) == []
    X = make_trials(60, 300, 60)
    X[[4, 41], :200] = 0
    assert find_copied_trials(X) == []


def test_real_trials_are_no_copies_and_their_changed_copies_are_found(shared):
    """The range that docs/AUDIT.md states, of real spike counts and fMRI; 724,350 pairs without a false alarm."""
    from scipy.io import loadmat

    spikes, fmri = (
        shared / "data" / name for name in ("v4_photographs/v4_201025.npz", "digits69/digit69_28x28.mat")
    )
    if not (spikes.is_file() and fmri.is_file()):
        pytest.skip("the recordings of v4_photographs and digits69 in ../shared/data are not here")
    found = loadmat(fmri)
    for X in (np.load(spikes)["X"], np.concatenate([found["fmriTrn"], found["fmriTest"]]).astype(np.float32)):
        assert find_copied_trials(X) == []
        n = len(X)
        for change in ("noise of a tenth", "negated", "negated, scaled, with noise"):
            made = TRIAL_CHANGES[change](X[5], X[5])
            assert find_copied_trials(np.concatenate([X, made[None]]), np.array([n])) == [(5, n)]


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


def crop(image, left, right, top, bottom):
    """Return the picture without some pixels of its sides, at its size."""
    height, width = image.shape[:2]
    small = np.ascontiguousarray(image[top : height - bottom, left : width - right])
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


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
    "strong compression": lambda image: compress(image, 20),
    "upside down": lambda image: image[::-1].copy(),
    "a quarter turn": lambda image: np.rot90(image).copy(),
    "grey": lambda image: np.asarray(Image.fromarray(image).convert("L").convert("RGB")),
    "a margin of 4 px": lambda image: crop(image, 4, 4, 4, 4),
    "one side and a corner": lambda image: crop(image, 4, 0, 1, 3),
    "all together": lambda image: compress(
        np.asarray(Image.fromarray(crop(image[::-1, ::-1], 1, 4, 3, 2)).convert("L").convert("RGB")), 30
    ),
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
    pairs = find_like_pictures(stimuli, list(stimuli.ids), {"p120", "p004"}).pairs
    assert [pair[:2] for pair in pairs] == [("p017", "p120")]
    assert ("mirror" in pairs[0][2]) == (change == "mirroring")


@pytest.mark.parametrize(
    ("name", "session"),
    [
        ("v4_photographs", "v4_201025"),
        pytest.param("v4_photographs", "v4_210325", marks=pytest.mark.further),
    ],
)
def test_real_photographs_are_no_copies_and_their_changed_copies_are_found(shared, name, session):
    """The range that docs/AUDIT.md states: 719,400 and 204,480 pairs without a false alarm, copies nearly all found."""
    path = shared / "data" / name / f"{session}.npz"
    if not path.is_file():
        pytest.skip(f"the photographs of {name} in ../shared/data are not here")
    photographs = np.load(path)["images"]
    stimuli = name_pictures(photographs)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids)) == ([], LARGEST_DISTANCE)
    n = len(photographs)
    for change in ("strong compression", "mirroring", "a quarter turn", "a margin of 4 px", "all together"):
        copies = np.stack([CHANGES[change](image) for image in photographs[::20]])
        stimuli = name_pictures(np.concatenate([photographs, copies]))
        pairs = find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[n:])).pairs
        wanted = set(zip(stimuli.ids[:n:20], stimuli.ids[n:], strict=True))
        assert {pair[:2] for pair in pairs} <= wanted
        assert len(pairs) >= 0.95 * len(wanted), change


def test_test_pictures_that_are_not_there_have_no_copies(pictures):
    """Training pictures may be there alone; nothing is compared then."""
    there = name_pictures(pictures)
    assert find_like_pictures(there, list(there.ids), set()).pairs == []
    table = there.table.assign(path=["", *there.ids[1:]])
    stimuli = StimulusSet(table, root=Path("nowhere"))
    assert find_copies(stimuli, there.ids[:1], [("other", pictures[0])]) == []


def test_pictures_whose_coefficients_differ_in_sign_alone_are_no_copies():
    """The numbers by which pictures are looked up are equal then, as those of mirrored ones are."""
    from scipy.fft import dctn, idctn

    generator = np.random.default_rng(0)
    coefficients = dctn(generator.normal(size=(32, 32)))
    signs = generator.choice([-1, 1], (2, 32, 32))
    stack = np.stack([idctn(coefficients * sign) for sign in signs])
    stack = np.repeat(np.clip(128 + 30 * stack, 0, 255).astype(np.uint8)[..., None], 3, axis=3)
    assert find_like_pictures(name_pictures(stack), ["p000", "p001"], {"p001"}).pairs == []


def test_one_shape_in_two_colours_is_two_pictures(pictures):
    """Its grey copy is one; nobody knows which of the two it was made from."""
    red, blue = (pictures[17].copy() for _ in range(2))
    red[..., 2] //= 4
    blue[..., 0] //= 4
    stimuli = name_pictures(np.concatenate([pictures[:17], pictures[18:], red[None], blue[None]]))
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[-1:])).pairs == []


def test_pictures_that_mirror_each_other_by_design_are_no_copies():
    """Gratings of every orientation: each has its mirror image among them, so mirroring says nothing here."""
    y, x = np.mgrid[:64, :64] - 31.5
    turns = np.arange(24) * np.pi / 24 + np.pi / 48
    stack = np.stack([128 + 100 * np.sin(0.5 * (x * np.cos(turn) + y * np.sin(turn))) for turn in turns])
    stimuli = name_pictures(np.repeat(stack.astype(np.uint8)[..., None], 3, axis=3))
    found = find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[::6]))
    assert found.pairs == []
    assert found.limit < LARGEST_DISTANCE


def test_pictures_of_one_concept_are_no_copies(pictures):
    stimuli = name_pictures(pictures)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids)).pairs == []


@pytest.mark.further
def test_handwritten_digits_are_no_copies():
    """The 1797 of scikit-learn have 8 x 8 pixels; the nearest two of one class differ by few of them."""
    from sklearn.datasets import load_digits

    digits = np.repeat((load_digits().images * 15).astype(np.uint8)[..., None], 3, axis=3)
    stimuli = name_pictures(digits)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[::9])).pairs == []


def test_gratings_and_plain_pictures_are_no_copies():
    """What differs in fine detail alone has one thumbnail; what has no detail has none."""
    y, x = np.mgrid[:128, :128]
    window = 127 * np.exp(-((x - 50) ** 2 + (y - 70) ** 2) / 900)
    gratings = [128 + 100 * (window / 127) + 20 * np.sin(x * a + y * b) for a in (1, 2, 3) for b in (0, 1.5)]
    plain = [np.full((128, 128), level) for level in (100, 101, 200)]
    stack = np.repeat(np.clip(np.stack([*gratings, *plain]), 0, 255).astype(np.uint8)[..., None], 3, axis=3)
    stimuli = name_pictures(stack)
    assert find_like_pictures(stimuli, list(stimuli.ids), set(stimuli.ids[::2])).pairs == []
