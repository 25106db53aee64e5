"""Streaming of EEG and MEG into the store: against a slow recipe, across joins, and without leaks."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.covariance import ledoit_wolf

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import read_responses, read_stimuli
from braindecode_vis.datasets.sources.cleaning_options import (
    AutorejectConfig,
    Cleaning,
    IcaConfig,
    ScalingConfig,
)
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart, EpochPlan, MeegSource
from braindecode_vis.preprocessing import meeg
from braindecode_vis.preprocessing.epochs import make_antialias_filter
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.meeg import write_source
from braindecode_vis.preprocessing.noise_ceiling import compute_epochs_ceiling, read_epochs_ceiling

CHANNELS = ("O1", "Oz", "O2", "Pz")
IDS = [f"image{n}" for n in range(12)]


def make_stimuli():
    return StimulusSet(pd.DataFrame({"stimulus_id": IDS, "concept": IDS, "path": "none", "sha256": "0"}))


def make_events(seed=0, n_sequences=6):
    """Sequences of ten images at 5 Hz, pauses of 2 s and an odd number of samples between them."""
    rng = np.random.default_rng(seed)
    samples, at = [], 1501
    for _ in range(n_sequences):
        samples.extend(at + 200 * np.arange(10))
        at += 2000 + int(rng.integers(2000, 2400))
    ids = np.resize(IDS, len(samples))
    is_test = np.isin(ids, IDS[-3:])
    return pd.DataFrame(
        {
            "onset": np.array(samples) / 1000, "sample": samples, "stimulus_id": ids, "concept": ids,
            "split": np.where(is_test, "test", "train"), "repetition": np.arange(len(ids)) // len(IDS),
        }
    )  # fmt: skip


def make_signal(n_samples, seed=0):
    """Correlated noise of some microvolts on a large offset and a drift."""
    rng = np.random.default_rng(seed)
    smooth = np.stack(
        [np.convolve(row, np.ones(15) / 15, "same") for row in rng.standard_normal((4, n_samples))]
    )
    mixing = np.eye(4) + 0.5
    return 1e-5 * (mixing @ smooth) + 1e-3 * np.arange(1, 5)[:, None] + 1e-8 * np.arange(n_samples)


def make_part(signal, events, session="01", subject="01"):
    recording = Recording(
        subject, session, "01", "eeg", (Path(f"ses-{session}/raw.npy"),), events, frozenset(IDS)
    )
    return ContinuousPart(
        recording, CHANNELS, 1000.0, signal.shape[1], lambda start, stop: signal[:, start:stop]
    )


def make_source(*parts, **plan):
    return MeegSource("eeg", parts, make_stimuli(), EpochPlan(**plan), "V")


def write(source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    summary = write_source(source, folder, scratch=folder / "scratch")
    return read_responses(folder / "responses"), summary


def cut_slowly(signal, events, tmin=-0.2, n_times=250, first=0, decim=4):
    """One epoch at a time, by the definition of filter and baseline."""
    taps = make_antialias_filter(decim)
    half = len(taps) // 2
    epochs = []
    for at in events["sample"]:
        wide = signal[:, at + first - half : at + first + n_times * decim + half]
        smooth = np.stack([np.convolve(row, taps, "valid") for row in wide])[:, ::decim][:, :n_times]
        base = signal[:, at + round(tmin * 1000) : at + 1].mean(axis=1, keepdims=True)
        epochs.append(smooth - base)
    return np.array(epochs)


def compute_covariance_slowly(epochs, ids):
    by_id = {}
    for epoch, name in zip(epochs, ids, strict=True):
        scale = epoch.std(axis=1)
        z = (epoch - epoch.mean(axis=1, keepdims=True)) / scale[:, None]
        by_id.setdefault(name, []).append(ledoit_wolf(z.T)[0] * np.outer(scale, scale))
    return np.mean([np.mean(parts, axis=0) for parts in by_id.values()], axis=0)


@pytest.fixture
def events():
    return make_events()


@pytest.fixture
def signal(events):
    return make_signal(int(events["sample"].max()) + 2500)


def test_trials_equal_the_slow_recipe(tmp_path, signal, events):
    """Float32 against float64: the offset of 4 mV is gone before digits could be lost."""
    responses, summary = write(make_source(make_part(signal, events), mvnn="none"), tmp_path)
    expected = cut_slowly(signal, events)
    np.testing.assert_allclose(responses.data, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert responses.unit == "V"
    assert summary["n_trials"] == len(events)
    np.testing.assert_allclose(responses.coords["times"], np.arange(250) / 250)
    assert responses.coords["sfreq"] == 250
    assert responses.trials["onset"].tolist() == events["onset"].tolist()
    assert np.linalg.norm(responses.coords["ch_pos"], axis=1) == pytest.approx(0.11, abs=0.03)  # metres
    assert len(read_stimuli(tmp_path / "stimuli")) == len(IDS)


def test_whitening_equals_the_slow_recipe_session_by_session(tmp_path, signal, events):
    other = make_events(1)
    second = 3 * make_signal(int(other["sample"].max()) + 2500, 1)
    source = make_source(make_part(signal, events), make_part(second, other, "02"))
    responses, _ = write(source, tmp_path)
    assert responses.unit == "whitened"
    for data, table, session in ((signal, events, "01"), (second, other, "02")):
        epochs = cut_slowly(data, table)
        train = (table["split"] == "train").to_numpy()
        covariance = compute_covariance_slowly(epochs[train], table["stimulus_id"][train])
        values, vectors = np.linalg.eigh(covariance)
        expected = np.einsum("ij,ejt->eit", vectors / np.sqrt(values) @ vectors.T, epochs)
        found = responses.data[(responses.trials["session"] == session).to_numpy()]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert responses.coords["whitening_sessions"] == [["01", "01"], ["01", "02"]]
    assert responses.coords["whitening"].shape == (2, 4, 4)


@pytest.mark.parametrize("variant", ["epochs", "time"])
def test_poisoned_test_trials_change_no_bit_of_the_training_trials(tmp_path, signal, events, variant):
    """Test images get sequences of their own, and these are overwritten with large numbers."""
    events = events.sort_values("split", key=lambda s: s == "test", kind="stable", ignore_index=True)
    events["sample"] = np.sort(events["sample"])
    last_train = events.loc[events["split"] == "train", "sample"].max() + 1100
    events.loc[events["split"] == "test", "sample"] += 2000
    events["onset"] = events["sample"] / 1000
    signal = np.pad(signal, ((0, 0), (0, 4000)), mode="reflect")
    poisoned = signal.copy()
    poisoned[:, last_train:] += (
        np.random.default_rng(5).standard_normal(poisoned[:, last_train:].shape) * 1e-2
    )
    clean, _ = write(make_source(make_part(signal, events), mvnn=variant), tmp_path / "a")
    dirty, _ = write(make_source(make_part(poisoned, events), mvnn=variant), tmp_path / "b")
    train = (clean.trials["split"] == "train").to_numpy()
    np.testing.assert_array_equal(clean.coords["whitening"], dirty.coords["whitening"])
    np.testing.assert_array_equal(clean.data[train], dirty.data[train])
    assert np.abs(dirty.data[~train]).max() > 100


def test_float16_is_whitened_before_it_is_rounded(tmp_path, signal, events):
    source = make_source(make_part(signal, events))
    whole, _ = write(source, tmp_path / "a")
    half, _ = write(replace(source, plan=replace(source.plan, dtype="float16")), tmp_path / "b")
    assert half.data.dtype == np.float16
    np.testing.assert_allclose(half.data, whole.data, rtol=1e-3, atol=1e-6)
    assert not (tmp_path / "b" / "scratch" / "session.npy").exists()
    with pytest.raises(ConfigError, match="float16 cannot hold responses in V"):
        write(replace(source, plan=EpochPlan(dtype="float16", mvnn="none")), tmp_path / "c")


def test_no_sample_beyond_a_join_is_used(tmp_path, signal, events):
    """The second recording is joined 1.01 s after an event, inside the reach of the filter but not of the epoch."""
    at = int(events["sample"][29]) + 1010
    assert events["sample"][30] - at > 300
    joined = signal.copy()
    joined[:, at:] += 0.02
    first, _ = write(make_source(make_part(joined, events), mvnn="none"), tmp_path / "a")
    joined[:, at:] -= 0.05
    second, _ = write(make_source(make_part(joined, events), mvnn="none"), tmp_path / "b")
    np.testing.assert_array_equal(first.data[:30], second.data[:30])
    plain, _ = write(make_source(make_part(signal, events), mvnn="none"), tmp_path / "c")
    np.testing.assert_allclose(first.data[:30], plain.data[:30], atol=2e-5)
    assert np.abs(first.data[29]).max() < 1e-4  # 20 mV rang nowhere


def test_an_epoch_across_a_join_is_dropped_within_the_bound(tmp_path, signal, events):
    at = int(events["sample"][29]) + 600
    signal[:, at:] += 0.02
    source = make_source(make_part(signal, events), mvnn="none", max_dropped=0.1)
    responses, summary = write(source, tmp_path)
    # The join falls 0.6 s after the last image and 0.8 s after the one before; the third to last ends just before.
    assert summary["n_dropped"] == 2
    meta = json.loads((tmp_path / "responses" / "meta.json").read_text())
    assert {d["reason"] for d in meta["provenance"]["dropped"]} == {"contains a jump"}
    assert responses.n_trials == len(events) - 2
    with pytest.raises(DataError, match=r"subject 01, session 01, file ses-01/raw.npy: 2 of 60 epochs.*jump"):
        write(make_source(make_part(signal, events), mvnn="none"), tmp_path / "b")


def test_an_epoch_that_leaves_the_file_is_named(tmp_path, signal, events):
    source = make_source(make_part(signal[:, : events["sample"].max() + 500], events), mvnn="none")
    with pytest.raises(DataError, match=r"3 extend outside the file"):
        write(source, tmp_path)


def test_an_epoch_may_begin_on_the_first_sample_of_the_file(tmp_path, signal, events):
    for before, kept in ((200, 60), (199, 59)):
        cut = int(events["sample"][0]) - before  # an epoch begins 0.2 s before its image
        moved = events.assign(sample=events["sample"] - cut)
        source = make_source(make_part(signal[:, cut:], moved), mvnn="none", max_dropped=0.1)
        assert write(source, tmp_path / str(before))[0].n_trials == kept


def test_a_nan_is_named_by_channel_trial_and_time(tmp_path, signal, events):
    signal[2, events["sample"][17] + 30] = np.nan
    with pytest.raises(
        DataError, match=r"session 01, file .*channel O2 is not finite in the trial of image0 at 6.241 s"
    ):
        write(make_source(make_part(signal, events)), tmp_path)


def test_a_flat_channel_is_named(tmp_path, signal, events):
    signal[1] = 3e-6
    with pytest.raises(DataError, match=r"session 01, file ses-01/raw.npy: the channel\(s\) Oz are flat"):
        write(make_source(make_part(signal, events)), tmp_path)


def test_unknown_channels_have_no_position(tmp_path, signal, events):
    part = replace(make_part(signal, events), ch_names=("E1", "E2", "E3", "E4"))
    with pytest.raises(DataError, match=r"E1, E2, E3, E4 .* not in the 10-05 system"):
        write(make_source(part), tmp_path)
    with pytest.raises(DataError, match="has other channels than"):
        make_source(part, make_part(signal, events, "02"))


def test_published_epochs_pass_through(tmp_path):
    data = np.random.default_rng(0).standard_normal((24, 4, 60)).astype(np.float16)
    trials = pd.DataFrame(
        {"subject": "01", "session": "n/a", "run": "n/a", "stimulus_id": np.repeat(IDS, 2), "concept": "c",
         "repetition": np.tile([0, 1], 12), "split": "train"}
    )  # fmt: skip
    times = -0.2 + np.arange(60) / 100
    part = EpochedPart(trials, (Path("x.npy"),), CHANNELS, times, lambda start, stop: data[start:stop])
    source = replace(make_source(part, sfreq=100.0), unit="whitened")
    responses, _ = write(source, tmp_path)
    np.testing.assert_array_equal(responses.data, data[..., 20:])
    assert responses.coords["times"][0] == pytest.approx(0)
    assert responses.coords["sfreq"] == 100


def test_the_store_opens_with_three_lines(tmp_path, signal, events):
    write(make_source(make_part(signal, events)), tmp_path)
    data = np.load(tmp_path / "responses" / "data.npy", mmap_mode="r")
    trials = pd.read_parquet(tmp_path / "responses" / "trials.parquet")
    meta = json.loads((tmp_path / "responses" / "meta.json").read_text())
    assert data.shape == (len(trials), len(meta["coords"]["ch_names"]), 250)
    assert meta["provenance"]["plan"]["mvnn"] == "epochs"
    assert meta["provenance"]["files"] == ["ses-01/raw.npy"]


def test_memory_does_not_grow_with_the_recording(tmp_path):
    peaks = []
    for n in (20, 60):
        events = make_events(n_sequences=n)
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((4, 60_000)) * 1e-5
        part = make_part(np.empty((4, int(events["sample"].max()) + 2500)), events)
        part = replace(part, read=lambda start, stop, x=noise: x[:, np.arange(start, stop) % x.shape[1]])
        tracemalloc.start()
        write(make_source(part), tmp_path / str(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(("mvnn", "passes"), [("none", 1), ("epochs", 2)])
def test_progress_counts_every_trial_once_a_pass(tmp_path, signal, events, mvnn, passes):
    """The bar had no total, and with whitening stood still until the second pass."""
    told = []
    source = make_source(make_part(signal, events), mvnn=mvnn)
    progress = lambda done, total, text: told.append((done, total))  # noqa: E731
    write_source(source, tmp_path, scratch=tmp_path / "scratch", progress=progress)
    assert told[0][0] <= source.n_trials
    assert told[-1] == (passes * source.n_trials,) * 2


def test_a_full_disk_is_noticed_before_writing(tmp_path, signal, events, monkeypatch):
    monkeypatch.setattr(meeg.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="choose another place"):
        write(make_source(make_part(signal, events)), tmp_path)


@pytest.mark.parametrize(
    "dtype, scaling, n_bytes", [("float32", False, 4), ("float16", False, 2), ("float16", True, 6)]
)
def test_the_disk_must_hold_every_trial_and_no_more(tmp_path, monkeypatch, dtype, scaling, n_bytes):
    """Scaled trials in float16 lie in float32 beside themselves for a while."""
    plan = EpochPlan(dtype=dtype, cleaning=Cleaning(scaling=ScalingConfig() if scaling else None))
    needed = 7 * 3 * 50 * n_bytes
    for free in (needed, needed - 1):
        monkeypatch.setattr(
            meeg.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free})()
        )
        if free == needed:
            meeg._check_space(tmp_path, (7, 3, 50), plan)
        else:
            with pytest.raises(DataError, match="7 trials need"):
                meeg._check_space(tmp_path, (7, 3, 50), plan)


@pytest.mark.parametrize("cleaning", [{"ica": IcaConfig()}, {"autoreject": AutorejectConfig()}])
def test_what_is_learnt_of_a_session_and_not_kept_is_not_applied_to_another(
    tmp_path, signal, events, cleaning
):
    """Each of the two alone was let through."""
    write(make_source(make_part(signal, events)), tmp_path / "run")
    learnt = LearntStatistics.read(tmp_path / "run" / "responses")
    source = make_source(make_part(signal, events), cleaning=Cleaning(**cleaning))
    with pytest.raises(ConfigError, match="learnt from each session and not kept"):
        write_source(source, tmp_path, scratch=tmp_path / "scratch", learnt=learnt)


def test_new_trials_have_the_unit_of_what_was_learnt(tmp_path, signal, events):
    """Whitened trials beside new ones in volts would be compared number by number."""
    for mvnn, unit in (("epochs", "whitened"), ("none", "V")):
        first, _ = write(make_source(make_part(signal, events), mvnn=mvnn), tmp_path / mvnn)
        learnt = LearntStatistics.read(tmp_path / mvnn / "responses")
        assert first.unit == unit
        source = make_source(make_part(signal, events), mvnn=mvnn)
        (tmp_path / mvnn / "new").mkdir()
        write_source(source, tmp_path / mvnn / "new", scratch=tmp_path / mvnn / "scratch", learnt=learnt)
        again = read_responses(tmp_path / mvnn / "new" / "responses")
        assert again.unit == unit
        np.testing.assert_array_equal(again.data, first.data)


@pytest.mark.parametrize(
    "plan, message",
    [({"window": (0.0, 2.0)}, "kept window"), ({"baseline": (-0.5, 0.0)}, "baseline from -0.5")],
)
def test_impossible_plans_are_refused(plan, message):
    with pytest.raises(ConfigError, match=message):
        EpochPlan(**plan)


def test_the_noise_ceiling_lies_beside_the_trials(tmp_path, signal, events):
    """Training images have a response of their own on Oz, test images have none."""
    rng = np.random.default_rng(7)
    for name, rows in events.groupby("stimulus_id").indices.items():
        if name not in IDS[-3:]:
            shape = 1e-4 * rng.standard_normal()
            for at in events["sample"].to_numpy()[rows]:
                signal[1, at + 50 : at + 100] += shape
    responses, _ = write(make_source(make_part(signal, events), mvnn="none"), tmp_path)
    train = read_epochs_ceiling(tmp_path / "responses", split="train")
    assert (train.subject, train.n_images, train.n_repetitions) == ("01", 9, pytest.approx(5))
    assert train.ceiling.shape == (4, 250)
    assert train.ceiling[1, 14:24].min() > 0.9
    assert train.ceiling[0].mean() < 0.8
    rows = np.flatnonzero((responses.trials["split"] == "train").to_numpy())
    expected = compute_epochs_ceiling(responses.select(rows))
    np.testing.assert_allclose(train.ceiling, expected.ceiling, atol=1e-6)
    np.testing.assert_allclose(train.low, expected.low, atol=1e-6)
    # Of the three test images no share is known.
    with pytest.raises(DataError, match=r"0 noise ceilings of the test .* it has those of subject 01 train"):
        read_epochs_ceiling(tmp_path / "responses", subject="01")
    single = events.drop_duplicates("stimulus_id").reset_index(drop=True)
    write(make_source(make_part(signal, single), mvnn="none"), tmp_path / "single")
    with pytest.raises(DataError, match="has no noise ceiling: fewer than four images are repeated"):
        read_epochs_ceiling(tmp_path / "single" / "responses")


def test_one_sample_is_not_called_flat(tmp_path):
    trials = pd.DataFrame(
        {"subject": "01", "session": "n/a", "run": "n/a", "stimulus_id": IDS[:1], "concept": "c",
         "repetition": 0, "split": "train"}
    )  # fmt: skip
    part = EpochedPart(
        trials,
        (Path("x.npy"),),
        CHANNELS,
        np.array([0.1]),
        lambda start, stop: np.ones((1, 4, 1), np.float32),
    )
    source = replace(make_source(part, sfreq=100.0), unit="whitened")
    responses, _ = write(source, tmp_path)
    assert responses.data.tolist() == [[[1.0]] * 4]


def test_a_join_that_the_file_marks_bounds_the_epochs(tmp_path, signal, events):
    at = int(events["sample"][29]) + 600
    part = replace(make_part(signal, events), boundaries=(at,))
    _, summary = write(make_source(part, mvnn="none", max_dropped=0.1), tmp_path)
    assert summary["n_dropped"] == 2
