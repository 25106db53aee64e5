"""Sessions on disk while they run: readable after a kill, never overwritten, and decoded offline afterwards."""

import errno
import json
import os
import signal
import time

import mne
import mne_bids
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_responses
from braindecode_vis.config import read_config
from braindecode_vis.datasets.bids.live_recording import is_live_recording, make_live_dataset
from braindecode_vis.datasets.bids.meeg_dataset import BidsMeegConfig
from braindecode_vis.datasets.bids.meeg_files import list_boundaries
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.parts.live import recording
from braindecode_vis.parts.live.opening import open_session
from braindecode_vis.parts.live.recording import BidsRecorder, recover
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, Marker, StreamInfo
from braindecode_vis.parts.phantom.formats import bids_eeg
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.new_trials import read_new
from braindecode_vis.pipeline.predicting import predict
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.meeg import write_meeg
from tests.parts.live.scripted import ChunkSource, cut_chunks
from tests.parts.live.small_run import CH_NAMES, EXTRA, IDS, draw_pictures, draw_recording

SFREQ, NAMES = 200.0, ("TRIGGER", "O2", "O1", "Pz")
INFO = StreamInfo("amplifier", "eeg", NAMES, SFREQ, "uV")


def make_chunks(n=400, size=30, gap=None, values=None):
    """Microvolts in chunks; after sample `gap` a second is lost."""
    values = np.random.default_rng(0).normal(size=(len(NAMES), n)) * 20 if values is None else values
    times = 10 + np.arange(n) / SFREQ
    if gap is not None:
        times[gap:] += 1
    markers = [Marker(times[40], "ant"), Marker(times[200] + 1e-3, "bee"), Marker(times[-1] + 5, "late")]
    for start in range(0, n, size):
        part = slice(start, start + size)
        # Markers come before, with and after their samples.
        mine = (
            tuple(m for m in markers if times[max(0, start - size)] <= m.time < times[part][-1])
            if start != 60
            else ()
        )
        yield Chunk(values[:, part], times[part], mine if start in (30, 210) else ())
    yield Chunk(np.empty((len(NAMES), 0)), np.empty(0), (markers[-1],))


def record(root, chunks=None, info=INFO, end=True, **options):
    told = []
    options = {
        "order": ("O1", "O2", "Pz"),
        "notify": lambda text, level: told.append((level, text)),
    } | options
    recorder = BidsRecorder(root, **options)
    recorder.begin(info, {"protocol": "p"})
    for chunk in make_chunks() if chunks is None else chunks:
        recorder.hear(chunk)
    if end:
        recorder.end({"n": 1})
    return recorder, told


def read(root, run="01"):
    path = mne_bids.BIDSPath(root=root, subject="live", session="live", task="live", run=run, datatype="eeg")
    return mne_bids.read_raw_bids(path, verbose="error")


@pytest.mark.filterwarnings("ignore:.*electrodes.tsv:RuntimeWarning")
def test_a_session_is_a_bids_recording_at_every_moment(tmp_path):
    """Also before its end, as after a kill: nothing is closed here, and half a sample is at the end."""
    values = np.random.default_rng(0).normal(size=(len(NAMES), 400)) * 20
    recorder, told = record(tmp_path, make_chunks(values=values, gap=300), end=False)
    with recorder.path.with_suffix(".eeg").open("ab") as file:
        file.write(b"\0\0\0")
    raw = read(tmp_path)
    assert raw.ch_names == ["O1", "O2", "Pz", "TRIGGER"]
    assert raw.get_channel_types() == ["eeg", "eeg", "eeg", "stim"]
    np.testing.assert_allclose(raw.get_data(picks="eeg") * 1e6, values[[2, 1, 3]], rtol=1e-6, atol=1e-9)
    events = pd.read_csv(next(tmp_path.rglob("*_events.tsv")), sep="\t")
    assert events["stim_file"].fillna("").tolist() == ["ant.png", "bee.png", ""]
    assert events["sample"].tolist() == [40, 200, 300]
    np.testing.assert_allclose(events["onset"], [0.2, 1.0, 1.5])
    # With the sidecars and without, the join is known.
    for found in (raw, mne.io.read_raw(recorder.path, verbose="error")):
        assert list_boundaries(found) == (300,)
    assert "is recorded in" in told[0][1]
    recorder.end({})
    log = [json.loads(line) for line in next(tmp_path.rglob("*_log.jsonl")).read_text().splitlines()]
    assert "was in a gap" in log[0]["text"]


@pytest.mark.filterwarnings("ignore:.*electrodes.tsv:RuntimeWarning")
def test_a_recording_is_stopped_and_started_and_holds_notes(tmp_path):
    recorder, told = record(tmp_path, [], end=False, waits=True)
    chunks = list(make_chunks(n=399))
    recorder.hear(chunks[0])
    recorder.note("before it started")  # nothing to write it to
    assert not list(tmp_path.rglob("*_eeg.eeg"))
    for number, part in enumerate((chunks[:7], chunks[7:]), 1):
        recorder.start()
        recorder.start()  # a second click changes nothing
        for chunk in part:
            recorder.hear(chunk)
        recorder.note(f"note\t{number}")
        recorder.stop()
        recorder.stop()
    assert [read(tmp_path, run).n_times for run in ("01", "02")] == [210, 189]
    notes = [pd.read_csv(path, sep="\t") for path in sorted(tmp_path.rglob("*_notes.tsv"))]
    assert [table["note"].tolist() for table in notes] == [["note 1"], ["note 2"]]
    assert [table["onset"].tolist() for table in notes] == [[1.045], [0.94]]  # of the newest sample
    assert pd.to_datetime(notes[0]["written"]).notna().all()
    assert [text for _, text in told if text.startswith("Note")] == [
        "Note at 1.0 s of the recording: note 1",
        "Note at 0.9 s of the recording: note 2",
    ]
    assert sum("has stopped" in text for _, text in told) == 2


@pytest.mark.filterwarnings("ignore:.*electrodes.tsv:RuntimeWarning")
def test_an_earlier_recording_stays_as_it_is(tmp_path):
    record(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*run-01*") if path.is_file()}
    recorder, _ = record(tmp_path)
    assert "run-02" in recorder.path.name
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(read(tmp_path, "02").annotations)
    assert (tmp_path / "participants.tsv").read_text().split() == ["participant_id", "sub-live"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        record(tmp_path / "other")
    (tmp_path / "other" / "thesis.txt").rename(tmp_path / "other" / "dataset_description.json")
    with pytest.raises(DataError, match="not recorded live"):
        record(tmp_path / "other")
    with pytest.raises(ConfigError, match="letters and digits"):
        BidsRecorder(tmp_path, subject="a b")


def test_a_full_disk_ends_the_recording_and_not_the_session(tmp_path, monkeypatch):
    write, n = recording._write_whole, []

    def fail(file, data):
        n.append(1)
        if len(n) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(recording, "_write_whole", fail)
    recorder, told = record(tmp_path)
    assert len(n) == 4
    assert told[-1][0] == "error"
    assert "No space left on device" in told[-1][1]
    assert not recorder.is_recording
    assert mne.io.read_raw(recorder.path, verbose="error").n_times == 90


def test_decisions_and_sentences_are_kept_line_by_line(tmp_path):
    recorder, _ = record(tmp_path, end=False)
    vector = np.array([0.1, 1 / 3], np.float32)
    recorder.decide(
        Decision(
            0, 10.2, "ant", "ant", embedding=vector, top=("ant",), similarity=np.ones(1), epoch=np.ones(5)
        )
    )
    recorder.tell("a gap", "warning")
    lines = next(tmp_path.rglob("*_decisions.jsonl")).read_text().splitlines()
    found = json.loads(lines[0])
    assert np.array_equal(np.float32(found["embedding"]), vector)
    assert found["top"] == ["ant"]
    assert "epoch" not in found
    assert "a gap" in next(tmp_path.rglob("*_log.jsonl")).read_text()
    recorder.close()
    assert json.loads(next(tmp_path.rglob("*_facts.json")).read_text())["decoder"] == {"protocol": "p"}


@pytest.mark.parametrize("killed", [False, True])
def test_meg_becomes_fif_at_the_end_or_when_it_is_recovered(tmp_path, killed):
    values = np.random.default_rng(0).normal(size=(len(NAMES), 400)) * 1e-13
    info = StreamInfo("helmet", "meg", NAMES, SFREQ, "T")
    recorder, _ = record(tmp_path, make_chunks(values=values, gap=300), info, end=not killed)
    recorder.close()
    path = recover(tmp_path)[0] if killed else recorder.path
    raw = mne.io.read_raw(path, verbose="error")
    np.testing.assert_allclose(raw.get_data(picks="mag"), values[[2, 1, 3]], rtol=1e-6)
    assert sorted(raw.annotations.description) == ["EDGE boundary", "ant", "bee"]
    assert not list(tmp_path.rglob("*.f32*"))


def test_volumes_become_a_nifti_file_that_grows(tmp_path):
    import nibabel

    mask = np.zeros((4, 3, 2), bool)
    mask[1:3] = True
    values = np.random.default_rng(0).normal(size=(int(mask.sum()), 5)).astype(np.float32)
    info = StreamInfo("folder", "fmri", (), 0.5)
    chunks = [
        Chunk(values[:, [n]], np.array([2.0 * n]), (Marker(3.5, "ant"),) if n == 3 else ())
        for n in (0, 1, 3, 4)
    ]
    recorder, _ = record(tmp_path, chunks, info, geometry=Geometry.from_mask(mask, np.eye(4)), end=False)
    image = nibabel.load(recorder.path)
    recorder.close()
    # The volume that is missing is the one before, so that times keep their place.
    np.testing.assert_array_equal(image.get_fdata()[mask], values[:, [0, 1, 1, 3, 4]])
    assert image.header.get_zooms()[3] == 2
    events = pd.read_csv(next(tmp_path.rglob("*_events.tsv")), sep="\t")
    assert events["onset"].tolist() == [3.5]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_process_leaves_what_it_had_heard(tmp_path):
    if not (child := os.fork()):
        recorder = BidsRecorder(tmp_path)
        recorder.begin(StreamInfo("a", "eeg", ("O1", "O2"), 100.0, "V"), {})
        for n in range(100_000):
            recorder.hear(Chunk(np.full((2, 5), n * 1e-6), (5 * n + np.arange(5)) / 100))
        os._exit(0)
    while not (found := list(tmp_path.rglob("*.eeg"))) or found[0].stat().st_size < 40 * 100:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raw = mne.io.read_raw(next(tmp_path.rglob("*.vhdr")), verbose="error")
    assert raw.n_times >= 500
    np.testing.assert_allclose(
        raw.get_data()[1, ::5], np.arange(len(raw.get_data()[1, ::5])) * 1e-6, rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*electrodes.tsv:RuntimeWarning")
def test_trials_of_the_recording_are_those_of_the_stream(tmp_path):
    """Cut with the settings of a run from what a session has recorded, and by hand from what was sent."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(NAMES), 3000)) * 2e-5
    samples = np.arange(400, 2600, 200)
    markers = [Marker(5 + s / SFREQ, ["ant", "bee", "cat.x"][n % 3]) for n, s in enumerate(samples)]
    info = StreamInfo("a", "eeg", NAMES, SFREQ, "V")
    chunks = cut_chunks(values, 5 + np.arange(3000) / SFREQ, markers)
    record(tmp_path / "live", chunks, info, order=("O2", "O1", "Pz"))
    raw = mne.io.RawArray(
        values, mne.create_info(list(NAMES), SFREQ, ["stim", "eeg", "eeg", "eeg"]), verbose="error"
    )
    expected = [raw.get_data(picks=["O2", "O1", "Pz"])[:, s : s + 40] for s in samples]
    own = BidsMeegConfig(
        root=tmp_path, tmin=0.0, tmax=0.3, window=(0.0, 0.2), baseline=None, scaling=None, mvnn="none"
    )
    coords = {"modality": "eeg", "sfreq": SFREQ, "ch_names": ["O2", "O1", "Pz"]}
    assert is_live_recording(tmp_path / "live")
    config = make_live_dataset(own, tmp_path / "live", coords)
    write_meeg(config, tmp_path / "work")
    found = read_responses(tmp_path / "work" / "responses")
    np.testing.assert_allclose(found.data, expected, rtol=1e-5, atol=2e-11)  # float32
    assert found.stimulus_ids[:3].tolist() == ["ant", "bee", "cat.x"]
    with pytest.raises(ConfigError, match="tmin cannot be set"):
        make_live_dataset(own, tmp_path / "live", coords, {"tmin": 0.1})


@pytest.fixture(scope="module")
def bids_run(tmp_path_factory):
    """A run on BIDS whose trials are whitened and resampled, without filters."""
    root = tmp_path_factory.mktemp("bids")
    bids_eeg.write_dataset(root, pd.DataFrame({"participant_id": ["sub-01"]}))
    (root / "stimuli").mkdir()
    for name, image in zip(IDS, draw_pictures(), strict=True):
        Image.fromarray(image).save(root / "stimuli" / f"{name}.png")
    for seed in (0, 1):
        signal, onsets, shown = draw_recording(seed)
        events = pd.DataFrame({"sample": onsets, "value": shown + 1, "stimulus_id": np.array(IDS)[shown]})
        events["stim_file"] = events["stimulus_id"] + ".png"
        events["split"] = np.where(shown < 18, "train", "test")
        bids_eeg.write_recording(
            root, "01", [signal], events, n_samples=signal.shape[1], ch_names=(*CH_NAMES, EXTRA), sfreq=500.0,
            session=f"0{seed + 1}",
        )  # fmt: skip
    config = read_config(
        "bids_meeg_ridge",
        [
            "dataset.sfreq=250", "dataset.tmin=-0.1", "dataset.tmax=0.5", "dataset.window=[0.0, 0.5]",
            "dataset.mvnn=epochs", f"dataset.picks=[{', '.join(CH_NAMES)}]", "target={kind: pixels, size: 4}",
            "encoder={kind: ridge, alphas: [100.0]}", "generator={kind: latents}", "evaluation.features=null",
            "repeats.test=single",
        ],
        root=root,
    )  # fmt: skip
    train(open_run(config, root / "run"))
    return open_finished(root / "run")


@pytest.mark.filterwarnings("ignore:.*electrodes.tsv:RuntimeWarning")
def test_offline_predictions_of_a_recording_are_the_live_decisions(bids_run, tmp_path):
    """Also with a gap, channels in another order and under other names, in microvolts, and a trigger among them."""
    signal, onsets, shown = draw_recording(5)
    times = 100 + np.arange(signal.shape[1]) / 500
    times[onsets[20] + 50 :] += 3  # a gap within an epoch
    names = ["TRIGGER", *(f"EEG {name}" for name in (*CH_NAMES[::-1], EXTRA))]
    values = np.concatenate([signal[:1] * 0, signal[:8][::-1], signal[8:]]) * 1e6
    markers = [Marker(times[at], IDS[n]) for at, n in zip(onsets, shown, strict=True)]
    recorder = BidsRecorder.for_run(bids_run, tmp_path / "kept")
    heard = []
    listener = Listener()
    listener.decide = heard.append
    source = ChunkSource(
        StreamInfo("a", "eeg", tuple(names), 500.0, "uV"), cut_chunks(values, times, markers, size=33)
    )
    summary = open_session(bids_run, source, listeners=[recorder, listener]).run()
    assert summary["n_lost"] == 1  # the epoch across the gap
    offline = predict(bids_run, read_new(bids_run, tmp_path / "kept", tmp_path / "work"))
    live = [d for d in heard if not d.lost]
    assert offline.embeddings.ids.tolist() == [d.marker for d in live]
    found = np.stack([d.embedding for d in live])
    np.testing.assert_allclose(found, offline.embeddings.vectors, atol=1e-5 * np.abs(found).max())
    ranks = [d.rank for d in live if d.rank is not None]
    assert len(ranks) > 10
    assert offline.ranks["rank"].tolist() == ranks
