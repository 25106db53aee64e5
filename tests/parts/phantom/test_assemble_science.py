"""What was planted can be found again in the files, and no more than that."""

import h5py
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.parts.phantom import PhantomConfig, PhantomSize, make_phantom
from braindecode_vis.parts.phantom.phantom_config import NoiseConfig
from tests.parts.phantom.tiny import embed

EPOCHS = PhantomSize(1, 40, 3, 20, 2, 2, 16, 32, n_runs=1, pause_s=0.5)
RAW = PhantomSize(1, 4, 2, 8, 2, 2, 60, 32, n_runs=1, pause_s=0.5)
BETAS = PhantomSize(1, 50, 6, 10, 6, 1, 6, 32, n_runs=1, n_catch=1, voxel_mm=8)


def fit_ridge(data, targets, alpha):
    """Return a map from features to centred targets, by the dual form."""
    mean, spread = data.mean(axis=0), data.std(axis=0)
    scaled = (data - mean) / spread
    weights = scaled.T @ np.linalg.solve(
        scaled @ scaled.T + alpha * np.eye(len(data)), targets - targets.mean(axis=0)
    )
    return lambda new: (new - mean) / spread @ weights


def score_top1(predicted, gallery):
    gallery = gallery - gallery.mean(axis=0)
    similar = predicted @ gallery.T / np.linalg.norm(gallery, axis=1)
    return (similar.argmax(axis=1) == np.arange(len(gallery))).mean()


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """Decode the semantic drive from the authors' epochs at some signal-to-noise ratio."""
    made = {}

    def run(snr, n_test=16, n_train=2, share=1):
        if snr not in made:
            root = tmp_path_factory.mktemp("snr") / str(snr)
            truth = make_phantom(
                "things-eeg2-official", root, size=EPOCHS, config=PhantomConfig(snr=snr), embed=embed
            )
            parts = [
                np.load(root / "sub-01" / f"preprocessed_eeg_{part}.npy", allow_pickle=True).item()[
                    "preprocessed_eeg_data"
                ]
                for part in ("training", "test")
            ]
            made[snr] = (*parts, np.load(truth.folder / "drive_semantic.npy"))
        train, test, drive = made[snr]
        n_images = len(train)
        rows = np.arange(0, n_images, share)
        data = train[rows, :n_train, :, 20:70].mean(axis=1).reshape(len(rows), -1)
        predict = fit_ridge(data, drive[rows], alpha=3000.0)
        # Every group of repetitions is a query of its own, so that few repetitions give no noisier a score.
        scores = [
            score_top1(predict(part.mean(axis=1).reshape(len(test), -1)), drive[n_images:])
            for part in np.split(test[:, :, :, 20:70], 16 // n_test, axis=1)
        ]
        return float(np.mean(scores))

    return run


def test_without_signal_nothing_is_decoded(decode):
    # 16 x 20 queries at a chance of 1/20: three standard errors.
    assert decode(0.0, n_test=1) == pytest.approx(1 / 20, abs=3 * np.sqrt(0.05 * 0.95 / 320))


@pytest.mark.further
def test_accuracy_rises_with_signal_repetitions_and_training(decode):
    assert decode(0.0, n_test=2) < decode(0.1, n_test=2) < decode(1.0, n_test=2)
    assert decode(0.1, n_test=1) < decode(0.1, n_test=4) <= decode(0.1, n_test=16)
    assert decode(0.1, n_test=4, share=8) < decode(0.1, n_test=4, share=1)
    assert decode(0.1, n_test=16) > 0.3


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Averages of two halves of the repetitions of each test image, from the raw files; (2, image, channel, time)."""
    root = tmp_path_factory.mktemp("raw") / "phantom"
    # Blinks and drift would need a preprocessing of their own.
    noise = NoiseConfig(blinks_per_minute=0, drift=0)
    truth = make_phantom(
        "things-eeg2", root, size=RAW, config=PhantomConfig(snr=3.0, noise=noise), embed=embed
    )
    total, counts = np.zeros((2, 8, 63, 400)), np.zeros((2, 8, 1, 1))
    for session in (1, 2):
        content = np.load(
            root / "sub-01" / f"ses-{session:02d}" / "raw_eeg_test.npy", allow_pickle=True
        ).item()
        data = content["raw_eeg_data"]
        samples = np.flatnonzero((data[-1] > 0) & (data[-1] < 99999))
        for number, sample in enumerate(samples):
            image = int(data[-1, sample]) - 1
            total[number % 2, image] += data[:-1, sample - 100 : sample + 300]
            counts[number % 2, image] += 1
    return truth, content["ch_names"][:-1], total / counts


def measure_information(halves):
    """Return what both halves say of the images alike, (n_channels, n_times); noise has no part in it."""
    centred = halves - halves.mean(axis=1, keepdims=True)
    return (centred[0] * centred[1]).mean(axis=0)


def test_onset_latency_is_the_planted_one(raw):
    truth, _, halves = raw
    power = measure_information(halves).mean(axis=0)
    times = np.arange(-100, 300) / 1000
    # The response rises with the square of time: the fourth root of its power is a line that starts at the onset.
    root = np.clip(power, 0, None) ** 0.25
    top = root[(times > 0) & (times < 0.15)].max()
    first = int(np.argmax((times > 0) & (root > 0.6 * top)))
    rising = slice(first - 8, first + 8)
    slope, level = np.polyfit(times[rising], root[rising], 1)
    assert -level / slope == pytest.approx(truth.subjects[0]["onset_s"], abs=0.012)
    assert np.abs(power[(times > 0) & (times < 0.03)]).max() < 0.1 * power.max()


def test_occipital_channels_carry_early_information(raw):
    _, names, halves = raw
    information = measure_information(halves)
    early = information[:, 160:210].mean(axis=1)  # 60 to 110 ms
    back = np.array([name.startswith(("O", "PO")) for name in names])
    assert early[back].mean() > 3 * np.abs(early[~back].mean())
    assert names[int(early.argmax())].startswith(("O", "PO"))


def test_planted_networks_rank_first(tmp_path):
    truth = make_phantom(
        "things-fmri", tmp_path / "x", size=BETAS, config=PhantomConfig(snr=0.5), embed=embed
    )
    folder = truth.root / "betas_csv"
    stimuli = pd.read_csv(folder / "sub-01_StimulusMetadata.csv")
    with h5py.File(folder / "sub-01_ResponseData.h5") as file:
        betas = file["ResponseData/block0_values"][()].T
    networks = pd.read_csv(truth.folder / "voxels.tsv", sep="\t")["network"].to_numpy()
    drive = np.load(truth.folder / "drive_semantic.npy")
    row_of = pd.Series(np.arange(len(drive)), index=truth.read_stimuli()["stimulus_id"] + ".jpg")
    targets = drive[row_of.loc[stimuli["stimulus"]]]
    test = (stimuli["trial_type"] == "test").to_numpy() | (stimuli["session"] == 6).to_numpy()
    score = {}
    for name in np.unique(networks):
        voxels = np.flatnonzero(networks == name)
        voxels = np.random.default_rng(0).permutation(voxels)[:60]  # as many from each
        predicted = fit_ridge(betas[~test][:, voxels], targets[~test], alpha=100.0)(betas[test][:, voxels])
        score[name] = np.corrcoef(predicted.ravel(), targets[test].ravel())[0, 1]
    ranked = sorted(score, key=score.get, reverse=True)
    assert ranked[:3] == ["visual", "default", "dorsal_attention"]
    for name in ("limbic", "somatomotor"):
        assert abs(score[name]) < 0.1
