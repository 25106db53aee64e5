"""THINGS-EEG2 phantom, raw: read back with NumPy and MNE, traps included."""

import io
import pickle
import tracemalloc

import mne
import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.phantom.formats import things_eeg2_format
from braindecode_vis.parts.phantom.formats.pickles import PendingArray, split_pickle

CHANNELS = ["Oz", "O1", "Pz"]


@pytest.fixture(scope="module")
def design():
    return things_eeg2_format.make_things_eeg2_design(6, 10, 4, n_sessions=4, seed=3, test_repetitions=5)


def iterate_blocks(data, n=1000):
    for start in range(0, data.shape[1], n):
        yield data[:, start : start + n]


def write_session(root, part, data, partition="training"):
    return things_eeg2_format.write_raw(
        root, 1, 2, partition, iterate_blocks(data), part.events, n_samples=part.n_samples, ch_names=CHANNELS
    )


@pytest.fixture(scope="module")
def raw_data(design):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, design[1].training.n_samples)) * 1e-5).astype(np.float32)


def test_four_sessions_give_every_image_its_repetitions(design):
    training = [s.training.events.query("not is_target") for s in design]
    for events in training:
        counts = events["condition"].value_counts()
        assert len(counts) == 30
        assert (counts == 2).all()
    total = sum(events["condition"].value_counts().reindex(range(60), fill_value=0) for events in training)
    assert (total == 4).all()
    repetitions = {(c, r) for e in training for c, r in zip(e["condition"], e["repetition"], strict=True)}
    assert repetitions == {(c, r) for c in range(60) for r in range(4)}
    tests = [s.test.events.query("not is_target") for s in design]
    assert all((events["condition"].value_counts() == 5).all() for events in tests)
    assert set(tests[3]["repetition"]) == set(range(15, 20))


def test_images_follow_each_other_every_200_ms_in_sequences_of_20(design):
    events = design[0].training.events
    within = events.groupby("sequence")["sample"].diff().dropna()
    assert (within == 200).all()
    assert events.groupby("sequence").size().max() == 20
    between = events.groupby("sequence")["sample"].agg(["first", "last"])
    pauses = between["first"].to_numpy()[1:] - between["last"].to_numpy()[:-1]
    assert pauses.min() > 1500
    assert events["sample"].is_monotonic_increasing


def test_targets_are_six_percent_and_coded_99999():
    events = things_eeg2_format.make_things_eeg2_design(100, 10, 20)[0].training.events
    assert abs(events["is_target"].mean() - 0.06) < 0.002
    assert (events.loc[events["is_target"], "code"] == 99999).all()
    assert (
        events.loc[~events["is_target"], "code"] == events.loc[~events["is_target"], "condition"] + 1
    ).all()


def test_no_image_follows_itself():
    for session in things_eeg2_format.make_things_eeg2_design(2, 10, 2, seed=1):
        for part in (session.training, session.test):
            shown = part.events.query("not is_target")["condition"].to_numpy()
            assert (shown[1:] != shown[:-1]).all()


def test_recordings_are_joined_without_a_mark(design):
    part = design[0].training
    assert len(part.recording_samples) == min(5, part.events["sequence"].nunique())
    for events, length in part.iterate_recordings():
        assert events["sample"].min() == 2000
        assert length - events["sample"].max() >= 2000
        np.testing.assert_allclose(events["onset"] * 1000, events["sample"])
    assert sum(len(events) for events, _ in part.iterate_recordings()) == len(part.events)


def test_a_full_session_lasts_as_long_as_a_real_one():
    """The published training file of one session has 5 450 560 samples."""
    design = things_eeg2_format.make_things_eeg2_design(n_sessions=1)
    assert abs(design[0].training.n_samples / 5_450_560 - 1) < 0.03


def test_design_refuses_sizes_that_do_not_work():
    with pytest.raises(ConfigError, match="positive sizes"):
        things_eeg2_format.make_things_eeg2_design(0)


def test_raw_file_reads_back_bit_exact(tmp_path, design, raw_data):
    part = design[1].training
    path = write_session(tmp_path, part, raw_data)
    assert path == tmp_path / "sub-01" / "ses-02" / "raw_eeg_training.npy"
    content = np.load(path, allow_pickle=True).item()
    assert list(content) == ["raw_eeg_data", "ch_names", "ch_types", "sfreq", "highpass", "lowpass"]
    data = content["raw_eeg_data"]
    assert data.dtype == np.float64
    assert data.flags.c_contiguous
    np.testing.assert_array_equal(data[:3].astype(np.float32), raw_data)
    assert content["ch_names"] == [*CHANNELS, "stim"]
    assert (content["sfreq"], content["highpass"], content["lowpass"]) == (1000, 0.01, 100)
    raw = mne.io.RawArray(
        data, mne.create_info(content["ch_names"], content["sfreq"], content["ch_types"]), verbose="error"
    )
    found = mne.find_events(raw, stim_channel="stim", verbose="error")
    np.testing.assert_array_equal(found[:, 0], part.events["sample"])
    np.testing.assert_array_equal(found[:, 2], part.events["code"])
    assert np.count_nonzero(data[-1]) == len(part.events)
    assert abs(path.stat().st_size - things_eeg2_format.estimate_raw_bytes(part.n_samples, 3)) < 1000


def test_file_has_the_bytes_that_numpy_would_write(tmp_path, design, raw_data):
    """Published files were written by NumPy 1: protocol 3, and the old name of its module."""
    part = design[1].training
    path = write_session(tmp_path, part, raw_data)
    content = np.load(path, allow_pickle=True)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    expected = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert path.read_bytes() == buffer.getvalue() + expected


def test_same_input_gives_same_bytes_and_no_leftovers(tmp_path, design, raw_data):
    part = design[1].training
    first = write_session(tmp_path / "a", part, raw_data).read_bytes()
    assert first == write_session(tmp_path / "b", part, raw_data).read_bytes()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["raw_eeg_training.npy"] * 2


@pytest.mark.parametrize(
    "change", [lambda x: x[:, :-1], lambda x: np.pad(x, ((0, 0), (0, 5))), lambda x: x[:2]]
)
def test_blocks_that_do_not_fit_leave_no_file(tmp_path, design, raw_data, change):
    with pytest.raises(DataError, match=r"subject 1, session 2|shape"):
        write_session(tmp_path, design[1].training, change(raw_data))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_nan_is_refused(tmp_path, design, raw_data):
    broken = raw_data.copy()
    broken[1, 5] = np.nan
    with pytest.raises(DataError, match="non-finite"):
        write_session(tmp_path, design[1].training, broken)


def test_memory_does_not_grow_with_the_recording(tmp_path):
    events = things_eeg2_format.make_things_eeg2_design(1, 1, 1, 1)[0].test.events.head(3)
    block = np.zeros((63, 1000), dtype=np.float32)
    peaks = []
    for n_blocks in (20, 200):
        tracemalloc.start()
        things_eeg2_format.write_raw(
            tmp_path, 1, 1, "test", (block for _ in range(n_blocks)), events,
            n_samples=1000 * n_blocks, ch_names=[f"c{i}" for i in range(63)],
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 4 * 63 * 1000 * 8  # a few blocks, where the file holds 102 MB
    assert (tmp_path / "sub-01" / "ses-01" / "raw_eeg_test.npy").stat().st_size > 100e6


def test_image_metadata_and_folders(tmp_path):
    training = things_eeg2_format.make_image_table("training", ["zebra", "ant"], 3, things_numbers=[90, 7])
    test = things_eeg2_format.make_image_table("test", ["moth"], things_numbers=[40])
    assert training["path"].iloc[0] == "training_images/00001_ant/ant_01b.jpg"
    assert test["path"].tolist() == ["test_images/00001_moth/moth_01b.jpg"]  # numbered from 1 again
    path = things_eeg2_format.write_image_metadata(tmp_path, training, test)
    content = np.load(path, allow_pickle=True).item()
    assert content["train_img_concepts"] == ["00001_ant"] * 3 + ["00002_zebra"] * 3
    assert content["train_img_concepts_THINGS"] == ["00007_ant"] * 3 + ["00090_zebra"] * 3
    assert content["test_img_files"] == ["moth_01b.jpg"]
    # Codes count from 1: code c is entry c - 1.
    assert content["train_img_files"][training["code"].iloc[4] - 1] == training["file"].iloc[4]


def test_payloads_above_4_gib_get_a_long_length():
    head, _ = split_pickle({"x": PendingArray((1 << 30,), np.dtype("<f8"))}, container="npy", protocol=3)
    assert head.endswith(pickle.BINBYTES8 + (8 << 30).to_bytes(8, "little"))


def test_estimate_of_a_full_person_matches_the_published_size():
    """About 2.8 GB for a training file."""
    design = things_eeg2_format.make_things_eeg2_design()
    assert things_eeg2_format.estimate_raw_bytes(design[0].training.n_samples) == pytest.approx(
        2.8e9, rel=0.03
    )
