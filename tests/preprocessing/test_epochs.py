"""Cutting, decimating, scaling and the noise ceiling, against MNE and slow obvious formulas."""

from dataclasses import replace
from pathlib import Path

import mne
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Recording, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochPlan
from braindecode_vis.preprocessing import scaling
from braindecode_vis.preprocessing.epochs import (
    _find_usual_steps,
    cut_epochs,
    cut_stretch,
    export_epochs,
    find_decimation,
    find_steps,
    make_antialias_filter,
)
from braindecode_vis.preprocessing.noise_ceiling import compute_epochs_ceiling
from braindecode_vis.preprocessing.scaling import fit_channel_zscore, fit_robust_scaler
from tests.references import assert_close


def make_band_limited(n_channels, n_samples, sfreq=1000.0, high=80.0, seed=0):
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal((n_channels, n_samples)))
    spectrum[:, np.fft.rfftfreq(n_samples, 1 / sfreq) > high] = 0
    return np.fft.irfft(spectrum, n_samples)


def make_responses(data, ids, **columns):
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": ids, "repetition": 0, "split": "test"}
    ).assign(**columns)
    coords = {"ch_names": ["O1", "Oz", "O2"][: data.shape[1]], "sfreq": 100.0, "modality": "eeg",
              "times": np.arange(data.shape[2]) / 100,
              "ch_pos": np.array([[-0.03, -0.1, 0], [0, -0.11, 0], [0.03, -0.1, 0]])[: data.shape[1]]}  # fmt: skip
    return Responses(data, ("trial", "channel", "time"), trials, "V", coords)


@pytest.mark.parametrize("decim", [1, 2, 4, 10])
def test_cutting_equals_filtering_everything_and_taking_samples(decim):
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((3, 2000))
    starts = np.array([0, 7, 333, 1500 - decim, 501])
    taps = make_antialias_filter(decim)
    half = len(taps) // 2
    padded = np.pad(signal, ((0, 0), (half, half)), mode="edge")
    smooth = np.stack([np.convolve(row, taps, mode="valid") for row in padded])
    found = cut_epochs(signal, starts, n_times=50, decim=decim)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], smooth[:, start : start + 50 * decim : decim], atol=2e-6)


def test_timing_is_exact_on_every_sample():
    """Onsets off the grid of the lower rate move nothing: a fast sine comes out with the phase of its onset."""
    sfreq, rate, frequency = 1000, 250, 60.0
    signal = np.sin(2 * np.pi * frequency * np.arange(4000) / sfreq)[None]
    starts = np.array([1000, 1001, 1002, 1003, 2017])
    found = cut_epochs(signal, starts, n_times=100, decim=4)[:, 0]
    times = starts[:, None] / sfreq + np.arange(100) / rate
    np.testing.assert_allclose(found, np.sin(2 * np.pi * frequency * times), atol=2e-3)


@pytest.mark.parametrize("tmax, late", [(0.999, 0), (1.0, 1)])
def test_same_as_mne_inside_the_band(tmax, late):
    """MNE pads each epoch to a power of two and rounds what it removes again.

    The usual epoch of 1201 samples comes out 1 ms later than its times say; one of 1200 samples does not. Away from
    the ends, which its FFT bends, both agree to 0.2 % of the spread. Ours keep the times exactly.
    """
    data = make_band_limited(2, 20_000)
    raw = mne.io.RawArray(data, mne.create_info(2, 1000.0, "eeg"), verbose="error")
    onsets = np.arange(1003, 18_000, 1111)
    events = np.stack([onsets, np.zeros_like(onsets), np.ones_like(onsets)], axis=1)
    reference = mne.Epochs(raw, events, tmin=-0.2, tmax=tmax, baseline=None, preload=True, verbose="error")
    reference.resample(250, verbose="error")
    assert_close(reference.times, -0.2 + np.arange(300) / 250)
    found = cut_epochs(data, onsets - 200 + late, n_times=300, decim=4)
    difference = (found - reference.get_data(verbose="error"))[..., 30:270]
    assert np.sqrt(np.mean(difference**2)) < 2e-3 * data.std()


@pytest.mark.parametrize("sfreq", [1000.0, 256.0])
def test_mne_resamples_by_any_ratio(sfreq):
    """NeuralBench takes 120 Hz, which no whole number gives of 1000 or 256; nothing beyond the epoch is read."""
    plan = EpochPlan(sfreq=120.0, tmin=-0.2, tmax=0.8, window=(-0.2, 0.8), resampling="mne")
    n, onset = round(3 * sfreq), round(sfreq)
    signal = np.cumsum(np.random.default_rng(0).standard_normal((2, n)), axis=1)
    read = []

    def take(start, stop):
        read.append((start, stop))
        return signal[:, start:stop]

    block, _, _ = cut_stretch(take, np.array([onset]), (0, n), sfreq, plan)
    low, high = round(-0.2 * sfreq), round(0.8 * sfreq)
    assert read == [(onset + low, onset + high + 1)]
    assert block.shape == (1, 2, 120)
    own = signal[None, :, onset + low : onset + high + 1]
    epochs = mne.EpochsArray(
        own - own[..., : 1 - low].mean(axis=-1, keepdims=True), mne.create_info(2, sfreq), tmin=low / sfreq,
        verbose="error",
    )  # fmt: skip
    expected = epochs.resample(120, verbose="error").get_data()
    np.testing.assert_allclose(block[0], expected[0, :, :120], rtol=1e-4, atol=1e-3)  # single precision
    with pytest.raises(ConfigError, match=r"set dataset\.resampling to mne"):
        cut_stretch(take, np.array([onset]), (0, n), sfreq, replace(plan, resampling="exact"))


def test_aliases_are_below_a_thousandth():
    taps = make_antialias_filter(4)
    response = np.abs(np.fft.rfft(taps, 20_000))
    frequency = np.fft.rfftfreq(20_000, 1e-3)
    assert np.abs(response[frequency <= 100] - 1).max() < 1.5e-3
    assert response[frequency >= 150].max() < 1.5e-3
    assert taps.sum() == pytest.approx(1)


def test_only_whole_factors():
    assert find_decimation(512.0, 128.0) == 4
    with pytest.raises(ConfigError, match="choose sfreq among 100, 125, 200, 250"):
        find_decimation(1000.0, 240.0)


def test_a_join_is_a_jump_of_most_channels():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((8, 1000))
    signal[:, 400:] += 60 * rng.choice([-1, 1], 8)[:, None]
    signal[:2, 700:] += 500  # one electrode pops: no join
    typical = np.median(np.abs(np.diff(signal, axis=1)), axis=1)
    assert find_steps(signal, typical).tolist() == [400]


def test_usual_steps_are_those_of_ten_seconds_from_the_first_event():
    """Whether a step is a join is judged by a stretch with events, whatever was recorded before it or long after it."""
    sfreq, first = 100.0, 500
    steps = np.full((2, 4000), 9.0)
    # More than half of ten seconds are quiet, and less than half of eleven.
    steps[:, first : first + 530] = [[1.0], [2.0]]
    signal = np.cumsum(steps * np.resize([1, -1], steps.shape[1]), axis=1)
    events = pd.DataFrame(
        {"onset": [5.0, 30.0], "stimulus_id": ["a", "b"], "sample": [first, 3000], "repetition": 0, "split": "train",
         "concept": ["a", "b"]}
    )  # fmt: skip
    recording = Recording("1", "1", "1", "eeg", (Path("a"),), events)
    part = ContinuousPart(recording, ("A", "B"), sfreq, 4000, lambda start, stop: signal[:, start:stop])
    np.testing.assert_allclose(_find_usual_steps(part), [1, 2])


def test_scaling_is_fitted_on_the_named_rows_alone():
    """Test trials are overwritten with large numbers, and no statistic changes by a bit."""
    rng = np.random.default_rng(0)
    data = (rng.standard_normal((40, 3, 20)) * [[1], [5], [0.1]] + [[100], [0], [-3]]).astype(np.float32)
    train = np.arange(0, 40, 2)
    poisoned = data.copy()
    poisoned[1::2] = 1e6
    for fit in (fit_channel_zscore, fit_robust_scaler):
        before, after = fit(data, train), fit(poisoned, train)
        for name in before.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    z = fit_channel_zscore(data, train)
    np.testing.assert_allclose(z.mean[:, 0], data[train].mean(axis=(0, 2), dtype=float), rtol=1e-6)
    np.testing.assert_allclose(z.std[:, 0], data[train].std(axis=(0, 2), dtype=float), rtol=1e-5)
    scaled = z.apply(data[train])
    np.testing.assert_allclose(scaled.mean(axis=(0, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=(0, 2)), 1, atol=1e-4)


def test_statistics_do_not_need_the_data_in_memory(monkeypatch):
    data = np.random.default_rng(0).standard_normal((50, 3, 20)).astype(np.float32)
    whole = fit_channel_zscore(data, np.arange(50))
    monkeypatch.setattr(scaling, "_CHANNEL_BLOCK_BYTES", 1000)
    pieces = fit_channel_zscore(data, np.arange(50))
    np.testing.assert_allclose(whole.mean, pieces.mean, atol=1e-7)
    np.testing.assert_allclose(whole.std, pieces.std, rtol=1e-6)
    with pytest.raises(DataError, match="at least one training trial"):
        fit_channel_zscore(data, np.array([], dtype=int))


def test_robust_scaler_clamps():
    data = np.random.default_rng(0).standard_normal((30, 2, 50)).astype(np.float32)
    data[0, 0, 0] = 1e4
    scaler = fit_robust_scaler(data, np.arange(30), clamp=5.0)
    scaled = scaler.apply(data)
    assert scaled.max() == 5
    np.testing.assert_allclose(np.median(scaled, axis=(0, 2)), 0, atol=0.01)
    assert fit_robust_scaler(data, np.arange(30), clamp=None).apply(data).max() > 1000


@pytest.mark.parametrize("snr", [0.0, 0.5])
def test_noise_ceiling_is_the_correlation_with_the_truth(snr):
    """A perfect model is the true pattern; its correlation with the average is what the ceiling promises."""
    rng = np.random.default_rng(0)
    n_images, n_repetitions = 300, 8
    truth = rng.standard_normal((n_images, 2, 3)) * np.sqrt(snr)
    data = np.repeat(truth, n_repetitions, axis=0) + rng.standard_normal((n_images * n_repetitions, 2, 3))
    ids = np.repeat([f"i{n}" for n in range(n_images)], n_repetitions)
    found = compute_epochs_ceiling(make_responses(data.astype(np.float32), ids))
    assert found.ceiling.shape == (2, 3)
    assert found.mean.shape == found.low.shape == (3,)
    share = snr * 8 / (snr * 8 + 1)
    # The share of 300 images is known to .08 without signal, and to .015 with it.
    np.testing.assert_allclose(found.share, share, atol=0.25 if snr == 0 else 0.05)
    spare = found.high - found.low  # six intervals of .95, so twice as wide on each side
    assert ((found.low - spare < share) & (share < found.high + spare)).all()
    np.testing.assert_allclose(found.mean, np.sqrt(np.maximum(found.share.mean(axis=0), 0)), rtol=1e-6)


def test_noise_ceiling_needs_repetitions():
    data = np.zeros((4, 2, 3), np.float32)
    with pytest.raises(DataError, match="is repeated"):
        compute_epochs_ceiling(make_responses(data, list("abcd")))


def test_export_to_mne():
    data = np.random.default_rng(0).standard_normal((4, 3, 20)).astype(np.float32)
    exported = export_epochs(
        make_responses(data, ["b", "a", "b", "c"], split=["train", "train", "test", "test"])
    )
    np.testing.assert_array_equal(exported.get_data(), data)
    assert exported.ch_names == ["O1", "Oz", "O2"]
    assert exported.event_id == {"a": 1, "b": 2, "c": 3}
    assert len(exported["split == 'train'"]) == 2
    assert len(exported["b"]) == 2
    np.testing.assert_allclose(exported.times, np.arange(20) / 100)
    np.testing.assert_allclose(exported.info["chs"][1]["loc"][:3], [0, -0.11, 0])
    trials = make_responses(data, list("abcd")).trials
    voxels = Responses(data.reshape(4, -1), ("trial", "voxel"), trials, "z")
    with pytest.raises(DataError, match="channels and times"):
        export_epochs(voxels)


@pytest.mark.parametrize("decim", [1, 2])
@pytest.mark.parametrize(("first", "behind", "is_inside"), [(0, 0, True), (-1, 0, False), (0, 1, False)])
def test_epochs_may_end_with_the_signal_and_not_behind_it(decim, first, behind, is_inside):
    signal = np.arange(40.0)[None]
    starts = np.array([first, 39 - 4 * decim + behind])  # five times
    if is_inside:
        assert cut_epochs(signal, starts, n_times=5, decim=decim).shape == (2, 1, 5)
    else:
        with pytest.raises(DataError, match="do not lie inside a signal of 40 samples"):
            cut_epochs(signal, starts, n_times=5, decim=decim)
