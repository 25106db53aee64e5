"""What is played as a stream, in this process: nothing is lost but what a fault takes away, and that is reported."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.live import replay
from braindecode_vis.parts.live.opening import open_source
from braindecode_vis.parts.live.replay import (
    Faults,
    Playback,
    ReplaySource,
    deliver,
    open_phantom,
    open_playback,
    read_faults,
)
from braindecode_vis.parts.live.sources import find_triggers
from braindecode_vis.parts.live.stream_roles import StreamInfo, StreamSource
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom

SFREQ = 250.0
N_SAMPLES = 1013  # no multiple of a chunk


def make_playback(n_samples=N_SAMPLES, step=100):
    values = np.arange(n_samples, dtype=float)

    def blocks():
        for start in range(0, n_samples, 300):
            stop = min(start + 300, n_samples)
            markers = [(at, f"image {at}") for at in range(0, n_samples, step) if start <= at < stop]
            yield np.stack([values[start:stop], -values[start:stop]]), markers

    info = StreamInfo("counting", "eeg", ("up", "down"), SFREQ, "V", "every hundredth")
    return Playback(info, ("eeg", "eeg"), blocks, n_samples)


def read_all(source):
    info = source.connect()
    samples, times, markers, notes = [np.empty((len(info.ch_names), 0))], [np.empty(0)], [], []
    while not (chunk := source.read(1.0)).ended:
        samples.append(chunk.samples)
        times.append(chunk.times)
        markers += chunk.markers
        notes += chunk.notes
    source.close()
    source.close()
    return np.concatenate(samples, axis=1), np.concatenate(times), markers, notes


@pytest.mark.parametrize("chunk", [1, 20, 64, 5000])
def test_every_sample_and_marker_comes_once(chunk):
    source = ReplaySource(make_playback(), chunk=chunk)
    assert isinstance(source, StreamSource)
    samples, times, markers, notes = read_all(source)
    assert samples[0].tolist() == list(range(N_SAMPLES))
    assert not notes
    assert np.allclose(times, np.arange(N_SAMPLES) / SFREQ)
    assert [(m.time, m.value) for m in markers] == [
        (at / SFREQ, f"image {at}") for at in range(0, N_SAMPLES, 100)
    ]


def test_a_recording_is_played_again_without_a_gap():
    source = ReplaySource(make_playback(), repeat=True)
    source.connect()
    chunks = [source.read(1.0) for _ in range(110)]
    times = np.concatenate([chunk.times for chunk in chunks])
    assert np.allclose(np.diff(times), 1 / SFREQ)
    assert len(times) > 2 * N_SAMPLES
    markers = [m for chunk in chunks for m in chunk.markers]
    assert markers[11].value == "image 0"
    assert markers[11].time == N_SAMPLES / SFREQ


def test_lost_chunks_are_told_and_seen_in_the_times():
    faults = Faults(drop=0.2, drift_ppm=1000, pauses=((1.0, 0.5),), seed=3)
    samples, times, markers, notes = read_all(ReplaySource(make_playback(), faults=faults))
    # The amplifier is faster than it says, so that each time is a little earlier; what is there is in its place.
    assert np.allclose(times, samples[0] / (SFREQ * 1.001))
    n_lost = N_SAMPLES - samples.shape[1]
    told = [int(note.split(": ")[-1].split()[0]) for note in notes]
    assert sum(told) == n_lost > 130
    assert any(note.startswith("the stream was interrupted for 0.5 s") for note in notes)
    assert len(markers) == 11  # those of the pause, too
    again = read_all(ReplaySource(make_playback(), faults=faults))
    assert np.array_equal(again[0], samples)
    assert again[3] == notes


def test_late_chunks_come_together_and_lose_nothing():
    samples, times, _, notes = read_all(ReplaySource(make_playback(), faults=Faults(jitter_ms=200)))
    assert samples[0].tolist() == list(range(N_SAMPLES))
    assert not notes
    assert np.allclose(np.diff(times), 1 / SFREQ)


def test_a_loose_electrode_carries_mains():
    samples, times, _, _ = read_all(ReplaySource(make_playback(), faults=read_faults(lose=["down@2"])))
    assert np.array_equal(samples[0], np.arange(N_SAMPLES))
    loose = times >= 2
    assert np.array_equal(samples[1, ~loose], -np.arange(loose.argmax()))
    assert np.abs(samples[1, loose]).max() < 1e-3


def test_real_speed_is_kept_and_a_short_wait_ends_empty(monkeypatch):
    """By a clock that waiting alone moves, a little further than it was asked for, as real ones do."""
    clock = SimpleNamespace(now=10.0)

    def sleep(seconds):
        clock.now += seconds + 1e-6

    monkeypatch.setattr(replay, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    source = ReplaySource(make_playback(), chunk=50, speed=4.0)
    source.connect()
    assert source.read(0.001).samples.shape == (2, 0)
    assert clock.now == pytest.approx(10.001, abs=1e-5)
    chunk = source.read(1.0)
    assert chunk.samples.shape[1] == 50
    assert clock.now == pytest.approx(10 + 49 / SFREQ / 4, abs=1e-5)
    assert chunk.arrived == pytest.approx(clock.now, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"drop": 1.5}, "between 0 and 1"),
        ({"lose": ["Oz"]}, "must be CHANNEL@S"),
        ({"pause": ["long@3"]}, "5@60 for five seconds"),
    ],
)
def test_faults_that_cannot_be_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read_faults(**words)


def test_a_channel_that_is_not_there_cannot_be_lost():
    with pytest.raises(ConfigError, match=r"'Oz' cannot be lost: the stream has up, down"):
        ReplaySource(make_playback(), faults=Faults(lose=(("Oz", 1.0),))).connect()


def test_triggers_are_changes_to_something():
    assert find_triggers(np.array([7, 7, 0, 0, 7, 8, 0]), 7) == [(4, "7"), (5, "8")]


def test_recordings_of_every_format_are_played(shared):
    held = {
        "readers/mne/test.edf": (138, 512.0, 3072, 5),
        "readers/mne/test.bdf": (72, 2048.0, 2048, 1),
        "readers/mne/test.vhdr": (26, 1000.0, 7900, 13),
        "readers/mne/test_ctf_comp_raw.fif": (274, 480.0, 241, 1),
        "readers/eeglab/sub-S1_ses-01_task-Experiment_run-01_eeg.set": (15, 256.0, 15360, 55),
        "muse_n170/recordings/data_2017-09-13-15.30.01.csv.gz": (4, 256.0, 30732, 197),
    }
    for name, (n_channels, sfreq, n_samples, n_markers) in held.items():
        source = open_source("replay", str(shared / "data" / name), chunk=500)
        samples, _, markers, _ = read_all(source)
        assert samples.shape == (n_channels, n_samples), name
        assert len(markers) == n_markers, name
        assert source.playback.info.sfreq == sfreq
        assert np.abs(samples).max() < 1  # volt or tesla, with the offsets of electrodes


def test_what_cannot_be_played_is_said(tmp_path, shared):
    (tmp_path / "notes.txt").write_text("no recording")
    with pytest.raises(DataError, match=r"notes\.txt cannot be opened"):
        open_playback(tmp_path / "notes.txt")
    with pytest.raises(DataError, match=r"nowhere\.edf does not exist"):
        open_playback(tmp_path / "nowhere.edf")
    with pytest.raises(DataError, match=r"no events table test_events\.tsv beside|no events table"):
        open_playback(shared / "data/readers/mne/test.edf", column="image")
    with pytest.raises(ConfigError, match="--root, --subject, --set and --recording"):
        open_playback(shared / "data/readers/mne/test.edf", recording=1)


def test_an_events_table_beside_a_recording_says_what_was_shown(tmp_path, shared):
    held = shared / "data/readers/mne/test.edf"
    path = tmp_path / "sub-01_task-images_eeg.edf"
    path.symlink_to(held)
    table = tmp_path / "sub-01_task-images_events.tsv"
    table.write_text("onset\tduration\tstim_file\tvalue\n1.0\t0.1\tsets/cat.jpg\t7\n2.5\t0.1\tn/a\t8\n")
    playback = open_playback(path)
    assert playback.info.markers == "sub-01_task-images_events.tsv, stim_file"
    assert [m for _, markers in playback.blocks() for m in markers] == [(512, "cat")]
    chosen = open_playback(path, column="value")
    assert [m for _, markers in chosen.blocks() for m in markers] == [(512, "7"), (1280, "8")]
    with pytest.raises(DataError, match="has the columns onset, duration, stim_file, value"):
        open_playback(path, column="picture")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Put a phantom of two subjects and three pictures there that makes no signal, and note what is asked of it."""
    noted = SimpleNamespace(people=[], shown=[])
    table = pd.DataFrame({"stimulus_id": ["a", "b", "c"], "split": ["train", "test", "test"]})
    size = replace(SIZES["things-eeg2"]["tiny"], n_subjects=2)
    truth = SimpleNamespace(
        root=tmp_path, folder=tmp_path, format="things-eeg2", size=size, config=PhantomConfig(),
        read_stimuli=lambda: table,
    )  # fmt: skip

    def simulate(person, system, shown, duration_s, *, name):
        noted.shown = list(islice(shown, 8))
        yield np.ones((2, 5), np.float32), [(3, noted.shown[0][1])]

    for name, value in {
        "truth.read_truth": lambda folder: truth,
        "drive.compute_drive": lambda *words, **options: None,
        "brain.make_person": lambda config, number, drive: noted.people.append(number),
        "meeg_signal.simulate_endless": simulate,
    }.items():
        monkeypatch.setattr(f"braindecode_vis.parts.phantom.{name}", value)
    return noted


@pytest.mark.parametrize(
    ("options", "rows", "pace"),
    [
        ({}, {1, 2}, 0.2),
        ({"soa": 0.5}, {1, 2}, 0.5),
        ({"split": "train", "soa": 1.5}, {0}, 1.5),
        ({"split": "all", "subject": 2, "seed": 4}, {0, 1, 2}, 0.2),
    ],
)
def test_a_phantom_sees_the_pictures_of_a_split_at_the_pace(options, rows, pace, asked, tmp_path):
    playback = open_phantom(tmp_path, **options)
    ((samples, markers),) = playback.blocks()
    assert asked.people == [options.get("subject", 1) - 1]
    np.testing.assert_allclose([at for at, _ in asked.shown], 1 + pace * np.arange(8))
    shown = [row for _, row in asked.shown]
    whole = 8 // len(rows) * len(rows)
    assert all(
        set(shown[n : n + len(rows)]) == rows for n in range(0, whole, len(rows))
    )  # each before any again
    assert len(rows) == 1 or all(np.diff(shown))  # two in a row would be one long picture
    assert markers == [(3, "abc"[shown[0]])]
    assert (samples == 1e6).all()  # microvolt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subject": 0}, "has 2 subject"), ({"subject": 3}, "has 2 subject"),
        ({"split": "valid"}, "no image of the split 'valid'"), ({"soa": 1e-4}, "cannot follow each other"),
    ],
)  # fmt: skip
def test_what_a_phantom_has_not_is_said(options, words, asked, tmp_path):
    with pytest.raises(ConfigError, match=words):
        open_phantom(tmp_path, **options)


@pytest.mark.slow
def test_a_phantom_is_played_from_its_files_and_lives_on_without_end(tmp_path, command_line):
    """The recordings of a data set by its configuration, and the same subject looking at new pictures."""
    root = tmp_path / "phantom"
    config = PhantomConfig(snr=0.3)
    rng = np.random.default_rng(0)
    truth = make_phantom(
        "things-eeg2", root, size=SIZES["things-eeg2"]["tiny"], config=config,
        embed=lambda stimuli: rng.standard_normal((len(stimuli), 8)),
    )  # fmt: skip
    test = set(truth.read_stimuli().query("split == 'test'")["stimulus_id"])
    played = open_playback("things_eeg2_ridge", root=root, recording=1)
    shown = [marker for _, markers in played.blocks() for marker in markers]
    assert {value for _, value in shown} == test
    assert (len(played.info.ch_names), played.info.sfreq, played.info.unit) == (63, 1000.0, "V")

    source = open_source("phantom", str(root), seed=4)
    info = source.connect()
    chunks = [source.read(1.0) for _ in range(300)]  # 6 s
    samples = np.concatenate([chunk.samples for chunk in chunks], axis=1)
    markers = [marker for chunk in chunks for marker in chunk.markers]
    assert (info.unit, samples.shape) == ("uV", (63, 6000))
    assert 5 < np.median(samples.std(axis=1)) < 50  # microvolt
    assert {marker.value for marker in markers} == test
    assert np.allclose([marker.time for marker in markers], 1 + 0.2 * np.arange(len(markers)))
    again = open_source("phantom", str(root), seed=4)
    again.connect()
    assert np.array_equal(again.read(1.0).samples, chunks[0].samples)

    for words, said in (
        (["--root", tmp_path], "holds no finished phantom"),
        (["--run", tmp_path], "is not a run folder"),
        ([], "give either the folder of a phantom (--root) or a run on a phantom (--run)"),
        (["--root", root, "--subject", "3"], "has 1 subject(s), not a number 3"),
        (["--root", root, "--repeat"], "--repeat has no effect on a phantom"),
        (["--root", root, "--lose", "Oz"], "--lose is 'Oz', but must be CHANNEL@S"),
    ):
        told = command_line("stream", "phantom", *words)
        assert told.returncode == 2
        assert said in told.stderr


@pytest.mark.parametrize(("options", "n_samples"), [({}, N_SAMPLES), ({"repeat": True}, 200 * 50)])
def test_what_is_played_ends_unless_it_is_repeated(options, n_samples):
    delivered = list(islice(deliver(make_playback(), chunk=50, **options), 200))
    assert sum(each.samples.shape[1] for each in delivered) <= n_samples
    assert (len(delivered) < 200) == (not options)
