"""Cleaning of continuous recordings: against MNE on the whole recording, across joins, and without leaks."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mne
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import read_responses
from braindecode_vis.datasets.sources.cleaning_options import (
    AutorejectConfig,
    CleaningOptions,
    IcaConfig,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    EpochPlan,
    MeegSource,
    Sensors,
    add_cleaning,
)
from braindecode_vis.preprocessing import artefacts
from braindecode_vis.preprocessing.artefacts import fit_eye_projection
from braindecode_vis.preprocessing.cleaning import filter_file
from braindecode_vis.preprocessing.epochs import Piece
from braindecode_vis.preprocessing.meeg import write_source

NAMES = ("Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "Oz", "O2", "Pz")
STORED = ("O1", "Oz", "O2", "Pz")
IDS = [f"image{n}" for n in range(12)]
SFREQ = 250.0
PLAN = EpochPlan(sfreq=250.0, mvnn="none", baseline=None, max_dropped=0.2)


def make_events(n_sequences=6, pause=1500):
    """Training sequences first, then test sequences."""
    samples, at = [], 900
    for _ in range(n_sequences):
        samples.extend(at + 50 * np.arange(10))
        at += 500 + pause
    ids = np.repeat(IDS, len(samples) // len(IDS))
    return pd.DataFrame(
        {
            "onset": np.array(samples) / SFREQ, "sample": samples, "stimulus_id": ids, "concept": ids,
            "split": np.where(np.isin(ids, IDS[-3:]), "test", "train"),
            "repetition": pd.Series(ids).groupby(ids).cumcount(),
        }
    )  # fmt: skip


def make_signal(n_samples, n_channels=12, seed=0):
    rng = np.random.default_rng(seed)
    mixing = np.eye(n_channels) + 0.2 * rng.standard_normal((n_channels, n_channels))
    drift = np.sin(np.arange(n_samples) / 4000)
    return 1e-5 * (mixing @ rng.laplace(size=(n_channels, n_samples))) + 2e-3 + 1e-4 * drift


def make_source(signal, events, *, bads=(), boundaries=(), session="01"):
    rows = [NAMES.index(name) for name in STORED]
    recording = Recording("01", session, "01", "eeg", (Path(f"{session}.vhdr"),), events, frozenset(IDS))
    part = ContinuousPart(
        recording, STORED, SFREQ, signal.shape[1], lambda a, b: signal[rows, a:b],
        Sensors(NAMES, lambda a, b: signal[:, a:b].copy()), tuple(bads), tuple(boundaries),
    )  # fmt: skip
    stimuli = StimulusSet(pd.DataFrame({"stimulus_id": IDS, "concept": IDS, "path": "", "sha256": "0"}))
    return MeegSource("eeg", (part,), stimuli, PLAN, "V")


def write(source, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    if options:
        source = add_cleaning(source, CleaningOptions(**options))
    write_source(source, folder, scratch=folder / "scratch")
    assert not list((folder / "scratch").glob("*")) if (folder / "scratch").exists() else True
    return read_responses(folder / "responses")


@pytest.fixture
def events():
    return make_events()


@pytest.fixture
def signal(events):
    return make_signal(int(events["sample"].max()) + 1500)


def cut(raw, events):
    rows = [raw.ch_names.index(name) for name in STORED]
    data = raw.get_data()[rows]
    return np.stack([data[:, at : at + 250] for at in events["sample"]])


def clean_whole(raw, *, bads=(), interpolate=False, reference=None, notch=(), l_freq=None, h_freq=None):
    """The usual steps in this order, as MNE does them on a recording in memory."""
    raw = raw.copy()  # an array given to MNE is not copied
    raw.info["bads"] = list(bads)
    if interpolate:
        raw.interpolate_bads(verbose="error")
    if reference is not None:
        raw.set_eeg_reference(reference if isinstance(reference, str) else list(reference), verbose="error")
    if notch:
        raw.notch_filter(list(notch), verbose="error")
    if l_freq is not None or h_freq is not None:
        raw.filter(l_freq, h_freq, verbose="error")
    return raw


@pytest.mark.parametrize(
    "options, usual",
    [
        ({"l_freq": 0.5, "h_freq": 40.0}, {"l_freq": 0.5, "h_freq": 40.0}),
        ({"h_freq": 30.0}, {"h_freq": 30.0}),
        ({"notch": (50.0, 100.0)}, {"notch": (50.0, 100.0)}),
        ({"reference": "average"}, {"reference": "average"}),
        ({"reference": ("C3", "C4")}, {"reference": ("C3", "C4")}),
        ({"bads": ("Oz", "F3"), "bad_channels": "interpolate"}, {"bads": ("Oz", "F3"), "interpolate": True}),
        (
            {"bads": ("Oz",), "bad_channels": "interpolate", "reference": "average", "l_freq": 1.0},
            {"bads": ("Oz",), "interpolate": True, "reference": "average", "l_freq": 1.0},
        ),
    ],
)
def test_each_step_equals_mne_on_the_whole_recording(tmp_path, signal, events, options, usual):
    """MNE works on all electrodes in memory; here four are stored and the rest only enters reference and repair."""
    info = mne.create_info(list(NAMES), SFREQ, "eeg")
    info.set_montage(
        next(n for n in ("colin27_1005", "standard_1005") if n in mne.channels.get_builtin_montages())
    )
    expected = cut(clean_whole(mne.io.RawArray(signal, info, verbose="error"), **usual), events)
    found = write(make_source(signal, events), tmp_path, **options)
    plain = write(make_source(signal, events), tmp_path / "plain")
    scale = np.abs(plain.data - plain.data.mean()).max()
    np.testing.assert_allclose(found.data, expected, rtol=0, atol=2e-5 * scale)
    assert np.abs(found.data - plain.data).max() > 1e-3 * scale
    meta = json.loads((tmp_path / "responses" / "meta.json").read_text())
    assert meta["provenance"]["cleaning"]["l_freq"] == options.get("l_freq")


def test_a_marked_bad_channel_stays_out_of_the_average(tmp_path, signal, events):
    signal[NAMES.index("F3")] += 1e-2 * np.random.default_rng(3).standard_normal(signal.shape[1])
    found = write(make_source(signal, events, bads=("F3",)), tmp_path, reference="average")
    good = [row for row, name in enumerate(NAMES) if name != "F3"]
    expected = signal - signal[good].mean(axis=0)
    at = int(events["sample"][5])
    np.testing.assert_allclose(found.data[5], expected[-4:, at : at + 250], atol=1e-8)


def test_dropped_channels_leave_every_recording(tmp_path, signal, events):
    first, second = make_source(signal, events), make_source(signal, events, bads=("O1",), session="02")
    source = replace(first, parts=(*first.parts, *second.parts), ch_pos=np.arange(12.0).reshape(4, 3))
    found = write(source, tmp_path, bads=("Pz",), bad_channels="drop")
    assert found.coords["ch_names"] == ["Oz", "O2"]
    np.testing.assert_array_equal(found.coords["ch_pos"], [[3, 4, 5], [6, 7, 8]])
    whole = write(first, tmp_path / "whole")
    np.testing.assert_array_equal(found.data[: len(events)], whole.data[:, [1, 2]])
    with pytest.raises(ConfigError, match="every channel is bad"):
        write(source, tmp_path / "b", bads=STORED, bad_channels="drop")


@pytest.mark.parametrize("marked", [True, False])
def test_no_filter_crosses_a_join(tmp_path, signal, events, marked):
    """What follows a join does not change one bit before it, whether the file marks it or the jump is found."""
    seam = int(events["sample"][29]) + 900
    joined = signal.copy()
    joined[:, seam:] += 0.02
    boundaries = (seam,) if marked else ()
    first = write(
        make_source(joined, events, boundaries=boundaries), tmp_path / "a", l_freq=0.5, notch=(50.0,)
    )
    other = joined.copy()
    other[:, seam:] = 0.07 + 5 * signal[:, seam:]
    second = write(
        make_source(other, events, boundaries=boundaries), tmp_path / "b", l_freq=0.5, notch=(50.0,)
    )
    assert first.n_trials == second.n_trials == len(events)
    np.testing.assert_array_equal(first.data[:30], second.data[:30])
    assert np.abs(first.data[:30]).max() < 2e-4  # the step of 20 mV rang nowhere
    after = mne.filter.filter_data(
        mne.filter.notch_filter(joined[:, seam:], SFREQ, [50.0], verbose="error"),
        SFREQ,
        0.5,
        None,
        verbose="error",
    )
    at = int(events["sample"][40]) - seam
    np.testing.assert_allclose(second.data[40] / 5, after[-4:, at : at + 250], atol=1e-8)


def test_a_stretch_shorter_than_the_filter_is_named(tmp_path, signal, events):
    seam = int(events["sample"][9]) + 400
    with pytest.raises(
        DataError, match=r"from 0.0 to 7.0 s between joins is shorter than a filter of 33.0 s"
    ):
        write(make_source(signal, events, boundaries=(seam,)), tmp_path, l_freq=0.1)


def test_a_trial_on_the_first_sample_of_a_short_stretch_is_no_less_one(tmp_path, signal, events):
    part = make_source(signal, events).parts[0]
    np.save(tmp_path / "raw.npy", signal[:4].astype(np.float32))
    at = int(events["sample"][0])
    trials = events[:1].reset_index(drop=True)
    piece = Piece(part, trials, trials[:0], np.arange(10) / SFREQ, np.zeros((1, 2), int), np.empty(0, int))
    with pytest.raises(DataError, match="between joins is shorter than a filter"):
        filter_file(tmp_path / "raw.npy", piece, np.array([at, at + 100]), (), 0.1, None)


def test_bad_samples_are_named_before_a_filter_spreads_them(tmp_path, signal, events):
    flat = signal.copy()
    flat[NAMES.index("Oz")] = 1.0
    with pytest.raises(
        DataError,
        match=r"channel\(s\) Oz are flat in the whole recording; name them in "
        r"dataset.bads",
    ):
        write(make_source(flat, events), tmp_path / "a", reference="average")
    signal[NAMES.index("C3"), 100] = np.nan
    with pytest.raises(DataError, match=r"channel C3 is not finite at 0.400 s"):
        write(make_source(signal, events), tmp_path / "b", reference="average")
    # Unused there, and repaired there.
    write(make_source(signal, events), tmp_path / "c", l_freq=1.0)
    fixed = write(make_source(flat, events), tmp_path / "d", bads=("Oz",), bad_channels="interpolate")
    assert fixed.data[:, 1].std() > 1e-6


@pytest.mark.parametrize(("method", "dtype"), [("robust", "float16"), ("zscore", "float32")])
def test_scaling_learns_from_training_trials(tmp_path, signal, events, method, dtype):
    last = int(events.loc[events["split"] == "train", "sample"].max()) + 300
    poisoned = signal.copy()
    poisoned[:, last + 100 :] *= 50
    events.loc[events["split"] == "test", "sample"] += 400
    signal, poisoned = (np.pad(x, ((0, 0), (0, 400)), mode="edge") for x in (signal, poisoned))
    sources = [make_source(x, events) for x in (signal, poisoned)]
    sources = [replace(s, plan=replace(s.plan, dtype=dtype)) for s in sources]
    scaling = {"method": method, "clamp": 3.0}
    clean, dirty = (write(s, tmp_path / str(n), scaling=scaling) for n, s in enumerate(sources))
    train = (clean.trials["split"] == "train").to_numpy()
    np.testing.assert_array_equal(clean.coords["scaling_scale"], dirty.coords["scaling_scale"])
    np.testing.assert_array_equal(clean.data[train], dirty.data[train])
    assert np.abs(dirty.data[~train]).max() == 3
    assert clean.data.dtype == np.dtype(dtype)
    assert clean.unit == {"robust": "IQR", "zscore": "z"}[method]
    volts = write(make_source(signal, events), tmp_path / "volts")
    values = volts.data[train].astype(np.float64).transpose(1, 0, 2).reshape(4, -1)
    low, middle, high = np.percentile(values, [25, 50, 75], axis=1)
    centre, scale = (middle, high - low) if method == "robust" else (values.mean(1), values.std(1))
    expected = np.clip((volts.data - centre[:, None]) / scale[:, None], -3, 3)
    np.testing.assert_allclose(clean.data, expected, atol=2e-3)
    assert clean.coords["scaling_groups"] == [["01"]]


def test_scaling_per_session_needs_training_trials_there(tmp_path, signal, events):
    first = make_source(signal, events)
    second = make_source(3 * signal, events, session="02")
    both = replace(first, parts=(*first.parts, *second.parts))
    found = write(both, tmp_path, scaling={"method": "zscore", "clamp": None, "per": "session"})
    n = len(events)
    np.testing.assert_allclose(found.data[:n], found.data[n:], atol=1e-4)
    tests = events.assign(split="test")
    lacking = replace(first, parts=(*first.parts, *make_source(signal, tests, session="02").parts))
    with pytest.raises(DataError, match="subject 01 session 02 has no training trial to scale by"):
        write(lacking, tmp_path / "b", scaling={"per": "session"})


def test_published_epochs_can_be_scaled_and_nothing_else(tmp_path, events):
    data = np.random.default_rng(0).standard_normal((len(events), 4, 30)) * 7
    trials = events.assign(subject="01", session="n/a", run="n/a").drop(columns=["sample", "onset"])
    part = EpochedPart(trials, (Path("x.npy"),), STORED, np.arange(30) / 100, lambda a, b: data[a:b])
    source = replace(make_source(np.zeros((12, 10)), events), parts=(part,), unit="whitened")
    found = write(source, tmp_path, scaling="zscore")
    train = (trials["split"] == "train").to_numpy()
    assert found.data[train].std() == pytest.approx(1, abs=1e-3)
    for options in (
        {"l_freq": 1.0}, {"h_freq": 9.0}, {"notch": (50.0,)}, {"reference": "average"}, {"ica": True},
        {"autoreject": True}, {"bads": ("Oz",), "bad_channels": "drop"}, {"bad_channels": "interpolate"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"only dataset.scaling applies to them"):
            add_cleaning(source, CleaningOptions(**options))


def test_options_that_cannot_be_are_refused(signal, events):
    source = make_source(signal, events)
    for options, message in (
        ({"h_freq": 125.0}, "filters must stay below 125 Hz, not 125"),
        ({"reference": ("Fp11",)}, r"dataset.reference names the channel 'Fp11'.*did you mean 'Fp1'"),
        ({"bads": ("T9",), "bad_channels": "drop"}, "dataset.bads names the channel 'T9'"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_cleaning(source, CleaningOptions(**options))
    for name, value in (("reference", "average"), ("ica", {}), ("autoreject", {})):
        with pytest.raises(ConfigError, match=f"dataset.{name} applies to EEG, but .* is MEG"):
            add_cleaning(replace(source, modality="meg"), CleaningOptions(**{name: value}))
    for options, message in (
        ({"bads": ("Oz",)}, "bad_channels is keep"), ({"l_freq": 40, "h_freq": 1}, "must be below h_freq"),
        ({"causal": True, "h_freq": 40}, "causal applies to a high-pass or a notch"),
        ({"notch": (0,)}, "above 0 Hz"), ({"scaling": "minmax"}, "robust"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=message):
            CleaningOptions(**options)


def test_options_enter_the_fingerprint():
    fields = CleaningOptions(ica=True, scaling="robust").hashed_fields()
    # Runs from before causal filters could be asked for keep theirs.
    assert set(fields) == set(CleaningOptions.model_fields) - {"causal"}
    assert CleaningOptions(l_freq=1.0, causal=True).hashed_fields()["causal"]
    assert fields["scaling"] == {"method": "robust", "clamp": 20.0, "per": "subject"}
    assert fields["ica"]["method"] == "fastica"


# --- independent components -------------------------------------------------------------------------------


def add_blinks(signal, seed=1):
    """Blinks of 150 microvolt at the forehead, a fifth of it at the back."""
    rng = np.random.default_rng(seed)
    blinks = np.zeros(signal.shape[1])
    for at in rng.integers(0, signal.shape[1] - 100, signal.shape[1] // 300):
        blinks[at : at + 60] += np.hanning(60)
    spread = np.array([1, 1, 0.6, 0.6, 0.3, 0.3, 0.2, 0.2, 0.15, 0.2, 0.15, 0.2])
    return signal + 1.5e-4 * spread[:, None] * blinks, blinks


@pytest.mark.parametrize("method", ["fastica", "picard"])
def test_components_of_the_eyes_are_removed(tmp_path, signal, events, method):
    if method == "picard":
        pytest.importorskip("picard")
    dirty, blinks = add_blinks(signal)
    with_eyes = write(make_source(dirty, events), tmp_path / "a", l_freq=1.0)
    cleaned = write(make_source(dirty, events), tmp_path / "b", l_freq=1.0, ica={"method": method})
    course = np.stack([blinks[at : at + 250] for at in events["sample"]])
    course -= course.mean()

    def follow(data):
        return np.abs(np.corrcoef(data[:, 1].ravel(), course.ravel())[0, 1])

    assert follow(with_eyes.data) > 0.3
    assert follow(cleaned.data) < 0.1
    found = json.loads((tmp_path / "b" / "responses" / "meta.json").read_text())["provenance"]["found"]
    assert found["01.vhdr"]["eye_components"] >= 1
    again = write(make_source(dirty, events), tmp_path / "c", l_freq=1.0, ica={"method": method})
    np.testing.assert_array_equal(cleaned.data, again.data)


def test_components_do_not_see_test_trials(tmp_path, events, monkeypatch):
    """Test sequences are joined on behind a marked seam, so that not even a filter reaches back."""
    seam = int(events.loc[events["split"] == "train", "sample"].max()) + 1000
    events.loc[events["split"] == "test", "sample"] += 2000
    dirty, _ = add_blinks(make_signal(int(events["sample"].max()) + 1500))
    poisoned = dirty.copy()
    poisoned[:, seam:] *= np.linspace(1, 30, 12)[:, None]
    monkeypatch.setattr(IcaConfig, "max_samples", 20000)
    options = {"ica": True}
    clean = write(make_source(dirty, events, boundaries=(seam,)), tmp_path / "a", **options)
    worse = write(make_source(poisoned, events, boundaries=(seam,)), tmp_path / "b", **options)
    train = (clean.trials["split"] == "train").to_numpy()
    np.testing.assert_array_equal(clean.data[train], worse.data[train])
    with pytest.raises(DataError, match=r"no training trial to fit dataset.ica"):
        write(make_source(dirty, events.assign(split="test")), tmp_path / "c", ica=True)


def test_without_electrodes_near_the_eyes_others_must_be_named(tmp_path, signal, events):
    source = make_source(signal, events, bads=("Fp1", "Fp2"))
    with pytest.raises(ConfigError, match="none of Fp1, Fpz"):
        write(source, tmp_path, ica=True)
    write(source, tmp_path / "b", ica={"eyes": ("F3",)})


def test_the_projection_is_what_mne_applies(signal):
    dirty, _ = add_blinks(signal)
    high = mne.filter.filter_data(dirty, SFREQ, 1.0, None, verbose="error")
    sensors = Sensors(NAMES, lambda a, b: high[:, a:b])
    config = CleaningOptions(ica=True).ica
    mixing, shift, found = fit_eye_projection(high, sensors, ("Fp1", "Fp2"), config, "here")
    assert found == {"eye_components": 1, "components": 11, "converged": True}
    assert np.linalg.matrix_rank(mixing, tol=1e-6) == len(NAMES) - 1
    assert np.abs(shift).max() < 1e-6


# --- autoreject -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_trials_are_repaired_or_left_out(tmp_path, signal, events, monkeypatch):
    pytest.importorskip("autoreject")
    broken = signal.copy()
    at = int(events["sample"][12])
    broken[:, at + 20 : at + 40] += 1e-2 * np.random.default_rng(0).standard_normal((12, 20))
    quick = {"n_interpolate": (1,), "consensus": (0.5,), "n_folds": 2, "max_trials": 20}
    for name, value in quick.items():
        monkeypatch.setattr(AutorejectConfig, name, value)
    found = write(make_source(broken, events), tmp_path / "a", l_freq=1.0, autoreject=True)
    dropped = json.loads((tmp_path / "a" / "responses" / "meta.json").read_text())["provenance"]["dropped"]
    assert {d["reason"] for d in dropped} == {"rejected by autoreject"}
    assert found.n_trials == len(events) - len(dropped)
    assert len(np.load(tmp_path / "a" / "responses" / "data.npy")) == found.n_trials
    assert np.abs(found.data).max() < 1e-3
    assert set(events["sample"]) - set(found.trials["sample"]) >= {at}
    with pytest.raises(DataError, match=r"autoreject leaves out \d+ of 60 trials"):
        write(
            make_source(broken, events),
            tmp_path / "c",
            l_freq=1.0,
            autoreject={"max_rejected": 0.001},
        )


@pytest.mark.parametrize("reject", ["all", "train", "none"])
def test_autoreject_leaves_out_the_trials_that_are_asked_for(tmp_path, signal, events, monkeypatch, reject):
    """With a stand-in that finds every fourth trial bad, and a channel of every third in need of repair."""
    seen = []

    class Fitted:
        def get_reject_log(self, block):
            numbers = len(seen) + np.arange(len(block))
            seen.extend(numbers)
            labels = np.zeros(block.shape[:2])
            labels[numbers % 3 == 0, 1] = 2
            return SimpleNamespace(bad_epochs=numbers % 4 == 0, labels=labels)

    monkeypatch.setattr(artefacts, "fit_autoreject", lambda *_: (Fitted(), None))
    monkeypatch.setattr(artefacts, "_make_epochs", lambda block, info: block)
    plain = write(make_source(signal, events), tmp_path / "plain")
    found = write(
        make_source(signal, events), tmp_path / "a", autoreject={"reject": reject, "max_rejected": 0.9}
    )
    number = np.arange(len(events))
    is_train = events["split"].to_numpy() == "train"
    drop = (number % 4 == 0) & {"all": True, "train": is_train, "none": False}[reject]
    assert found.trials["sample"].tolist() == events["sample"][~drop].tolist()
    changed = np.abs(found.data - plain.data[~drop]).max(axis=2) > 1e-3 * plain.data.std()  # not by rounding
    np.testing.assert_array_equal(changed[:, 1], number[~drop] % 3 == 0)
    assert not np.delete(changed, 1, axis=1).any()


def test_missing_packages_are_named(tmp_path, signal, events, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "autoreject", None)
    monkeypatch.setitem(__import__("sys").modules, "picard", None)
    with pytest.raises(ConfigError, match=r"pip install 'braindecode_vis\[eeg\]'"):
        write(make_source(signal, events), tmp_path / "a", autoreject=True)
    with pytest.raises(ConfigError, match=r"dataset\.ica\.method picard needs python-picard"):
        write(make_source(signal, events), tmp_path / "b", ica={"method": "picard"})


def test_components_are_fitted_on_samples_of_training_trials_that_no_test_trial_uses():
    trials = pd.DataFrame({"sample": [2, 20, 26, 55], "split": ["train", "train", "test", "train"]})
    trials = trials.assign(onset=trials["sample"] / 100, repetition=1, stimulus_id=IDS[:4], concept=IDS[:4])
    recording = Recording("01", "01", "01", "eeg", (Path("01.vhdr"),), trials, frozenset(IDS))
    part = ContinuousPart(recording, NAMES, 100.0, 60, lambda start, stop: np.empty((0, 0)))
    bounds, nothing = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.int64)
    piece = Piece(part, trials, trials[:0], np.empty(0), bounds, nothing)
    plan = replace(PLAN, tmin=-0.05, tmax=0.1, window=(0.0, 0.1))
    # five samples before an onset and ten after: 0 to 11, 15 to 29 without 21 to 35, and 50 to the end
    found = np.flatnonzero(artefacts._mark_training_samples(piece, plan))
    np.testing.assert_array_equal(found, [*range(12), *range(15, 21), *range(50, 60)])
