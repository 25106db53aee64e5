"""Resuming an interrupted call, refusing what cannot be, and the streams underneath."""

import dataclasses
import os
import resource
import shutil
import subprocess
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.phantom import (
    SIZES,
    PhantomConfig,
    PhantomSize,
    change_size,
    check_space,
    estimate_phantom,
    make_phantom,
    make_sensor_system,
    read_truth,
)
from braindecode_vis.parts.phantom.build import Ledger
from braindecode_vis.parts.phantom.format_plan import TRUTH
from braindecode_vis.parts.phantom.meeg_signal import cut_epochs, make_lowpass
from tests.parts.phantom.tiny import embed

CONFIG = PhantomConfig(snr=0.3)


def refuse(stimuli):
    raise AssertionError("the images were embedded a second time")


def list_files(root):
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


SMALL = PhantomSize(1, 4, 2, 2, 1, 1, 2, 32, n_runs=1, voxel_mm=10, n_imagery=2, imagery_repetitions=1)


def make_small(root, **options):
    arguments = {"size": SMALL, "config": CONFIG, "embed": embed} | options
    return make_phantom("god", root, **arguments)


def test_same_call_gives_the_same_bytes(tmp_path):
    make_small(tmp_path / "a")
    make_small(tmp_path / "b")
    first, second = list_files(tmp_path / "a"), list_files(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name
    make_small(tmp_path / "c", config=PhantomConfig(snr=0.3, seed=1))
    assert (tmp_path / "c" / "Subject1.h5").read_bytes() != first["Subject1.h5"].read_bytes()


@pytest.mark.parametrize(
    ("name", "n_test"),
    [
        ("things-fmri", 2),
        pytest.param("things-meg", 2, marks=pytest.mark.further),
        pytest.param("nod-eeg", 3, marks=pytest.mark.further),
    ],
)
def test_several_processes_write_the_same_bytes(tmp_path, name, n_test):
    """All have units that read what others wrote: epochs are cut from raw runs, tables from volumes."""
    arguments = {"size": SIZES[name]["tiny"], "config": CONFIG, "embed": embed}
    told = []
    make_phantom(name, tmp_path / "one", **arguments)
    make_phantom(name, tmp_path / "two", **arguments, jobs=2, advance=told.append)
    assert sum(told) == estimate_phantom(name, SIZES[name]["tiny"]).n_steps
    first, second = list_files(tmp_path / "one"), list_files(tmp_path / "two")
    assert first.keys() == second.keys()
    for file, path in first.items():
        assert path.read_bytes() == second[file].read_bytes(), file
    # A continued call leaves finished files alone.
    assert make_phantom(name, tmp_path / "one", **arguments | {"embed": refuse}, jobs=2).n_test == n_test


def test_a_finished_phantom_is_left_alone(tmp_path):
    before = make_small(tmp_path)
    stamps = {name: path.stat().st_mtime_ns for name, path in list_files(tmp_path).items()}
    said = []
    assert make_small(tmp_path, embed=refuse, describe=said.append) == before
    assert {name: path.stat().st_mtime_ns for name, path in list_files(tmp_path).items()} == stamps
    assert not [text for text in said if "subject" in text]


def test_images_are_handed_over_before_they_are_embedded(tmp_path):
    """So that a caller may embed them while the recording is simulated."""
    seen = []

    def embed_and_note(stimuli):
        seen.append(("embedded", stimuli.table["sha256"].tolist()))
        return embed(stimuli)

    def note(stimuli):
        assert all((tmp_path / path).is_file() for path in stimuli.table["path"])
        seen.append(("drawn", stimuli.table["sha256"].tolist()))

    make_small(tmp_path, embed=embed_and_note, drawn=note)
    (drawn, hashes), (embedded, same) = seen
    assert (drawn, embedded) == ("drawn", "embedded")
    assert hashes == same


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("name", ["god", "things-fmri"])
def test_an_interrupted_call_goes_on(tmp_path, name):
    """Stopped at every tenth step in turn, the data set ends up as if nothing had happened."""
    arguments = {"size": SIZES[name]["tiny"], "config": CONFIG, "embed": embed}
    root, whole = tmp_path / "interrupted", tmp_path / "whole"
    make_phantom(name, whole, **arguments)
    n_steps = estimate_phantom(name, SIZES[name]["tiny"]).n_steps
    for last in range(9, n_steps, 17):
        told = []

        def stop(n, told=told, last=last):
            told.append(n)
            if sum(told) > last:
                raise Interrupted

        with pytest.raises(Interrupted):
            make_phantom(name, root, **arguments, advance=stop)
        assert not (root / TRUTH / "phantom.json").exists()
        with pytest.raises(DataError, match="no finished phantom"):
            read_truth(root)
    make_phantom(name, root, **arguments)
    for file, path in list_files(whole).items():
        assert path.read_bytes() == (root / file).read_bytes(), file


def test_a_damaged_file_is_written_again(tmp_path):
    make_small(tmp_path)
    path = tmp_path / "Subject1.h5"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    make_small(tmp_path, embed=refuse)
    assert path.read_bytes() == content


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    """A call killed while it wrote left its half-written files beside the data for ever, gigabytes at full size."""
    make_small(tmp_path)
    whole = set(list_files(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    for owner, name in ((dead.pid, "Subject1.h5"), (os.getpid(), "scratch/spool.npy"), (1, "Subject1.h5")):
        path = tmp_path / f".tmp-{owner}-{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    make_small(tmp_path, embed=refuse)
    assert set(list_files(tmp_path)) == whole | {".tmp-1-Subject1.h5"}  # process 1 lives


def test_betas_beyond_the_format_are_refused_before_they_are_written(tmp_path):
    """NSD's int16 end at 109 %: the main sessions failed half-way, the imagery file would have wrapped around."""
    with pytest.raises(ConfigError, match="ratio of 50, trials of subject 01 reach about"):
        make_phantom(
            "nsd", tmp_path / "x", size=SIZES["nsd"]["tiny"], config=PhantomConfig(snr=50.0), embed=embed
        )
    assert not list(tmp_path.rglob("betas*"))


def test_a_smaller_test_has_fewer_imagined_images():
    """The command has no option for imagined images, so a smaller test of NSD or GOD could not be asked for."""
    tiny = SIZES["nsd"]["tiny"]
    for n_test, n_imagery in ((6, 6), (5, 3), (2, 0)):
        changed = change_size("nsd", tiny, n_test_concepts=n_test)
        assert (changed.n_imagery, changed.imagery_repetitions) == (n_imagery, 16 if n_imagery else 0)
        assert change_size("god", SIZES["god"]["tiny"], n_test_concepts=n_test).n_imagery == min(4, n_test)
        for name in ("nsd", "god"):
            estimate_phantom(
                name, change_size(name, SIZES[name]["tiny"], n_test_concepts=n_test, n_sessions=1)
            )
    assert change_size("nsd", tiny, n_test_concepts=3, n_imagery=6).n_imagery == 6  # refused later, in words
    assert change_size("bids-eeg", SIZES["bids-eeg"]["tiny"], n_test_concepts=2).n_imagery is None


def test_another_phantom_in_the_same_folder_is_refused(tmp_path):
    make_small(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"config\.snr is 0\.3 there, not 0\.5"):
        make_small(tmp_path / "a", config=PhantomConfig(snr=0.5))
    with pytest.raises(ConfigError, match=r"size\.voxel_mm is 10 there, not 9"):
        make_small(tmp_path / "a", size=SMALL.replace(voxel_mm=9))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no phantom"):
        make_small(tmp_path)
    with pytest.raises(ConfigError, match="is below a file"):
        make_small(tmp_path / "thesis.txt" / "chapter")


def test_ledger_forgets_files_that_are_gone(tmp_path):
    ledger = Ledger(tmp_path / "x", {"format": "god"})
    path = tmp_path / "x" / "file"
    path.write_text("1")
    ledger.record("unit", [path])
    assert Ledger(tmp_path / "x", {"format": "god"}).is_finished("unit")
    path.unlink()
    assert not ledger.is_finished("unit")


@pytest.mark.parametrize("name, changes, message", [
    ("things-eeg2", {"n_sessions": 1, "train_repetitions": 1}, "n_sessions must be even"),
    ("things-eeg2", {"n_sessions": 4, "train_repetitions": 1}, "do not divide into 2"),
    ("things-eeg2", {"test_repetitions": 3}, "do not divide into 2"),
    ("things-eeg2", {"n_train_concepts": 9000}, "there are 7920 phantom concepts"),
    ("things-eeg2", {"voxel_mm": 4}, "has no such number"),
    ("things-eeg2", {"image_size": 8}, "at least 16"),
    ("things-eeg2", {"n_test_concepts": 1}, "at least 2 test concepts"),
    ("things-meg", {"n_sessions": 3}, "must be equal"),
    ("things-meg", {"n_runs": 50}, "cannot exceed"),
    ("nsd", {"n_sessions": 5}, "do not divide into 5"),
    ("nsd", {"test_repetitions": 2}, "equally often"),
    ("nsd", {"n_imagery": 4}, "multiple of 3"),
    ("god", {"n_imagery": 40}, "0 to 4 imagined"),
    ("god", {"n_sessions": 2}, "must be 1"),
    ("things-fmri", {"voxel_mm": 1}, "from 1.7 to 12"),
    ("bids-eeg", {"n_runs": None}, "at least 1, not None"),
    ("bids-fmri", {"n_runs": 1000}, "cannot exceed"),
])  # fmt: skip
def test_impossible_sizes_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        estimate_phantom(name, SIZES[name]["tiny"].replace(**changes))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'things-eeg2'"):
        estimate_phantom("things-eeg", SMALL)
    with pytest.raises(ConfigError, match="did you mean 'n_sessions'"):
        SMALL.replace(n_session=1)


def test_a_limit_on_file_sizes_is_seen_before_it_starts(tmp_path):
    """Under ``ulimit -f 20`` images were drawn and embedded for minutes before the first large file could not grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_480, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"may not grow past 20 kB here, .* raise the limit with ulimit -f"
        ):
            check_space(tmp_path, estimate_phantom("god", SMALL))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_seen_before_it_starts(tmp_path, monkeypatch):
    estimate = dataclasses.replace(estimate_phantom("god", SMALL), n_bytes=1 << 60)
    with pytest.raises(DataError, match=r"1152921504\.61 GB more in .* free; choose a smaller size"):
        check_space(tmp_path / "new" / "folder", estimate)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(DataError, match=r"about 0\.\d MB more in .* the disk has 0\.1 MB free"):
        check_space(tmp_path, estimate_phantom("god", SMALL))
    monkeypatch.undo()
    check_space(tmp_path, estimate_phantom("god", SMALL))


def test_an_encoder_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match="one finite vector for each of the 10 images"):
        make_small(tmp_path, embed=lambda stimuli: np.zeros((3, 5)))


# --- streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_block", [7, 64, 1000])
def test_epochs_cut_from_a_stream_are_those_of_the_whole_recording(n_block):
    data = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    blocks = [data[:, i : i + n_block] for i in range(0, 1000, n_block)]
    starts = np.array([30, 31, 200, 200, 890])
    for epoch, start in zip(cut_epochs(blocks, starts, 50), starts, strict=True):
        np.testing.assert_array_equal(epoch, data[:, start : start + 50])
    taps = make_lowpass(200.0, 40.0, 2)
    filtered = np.stack([np.convolve(row, taps, mode="same") for row in data])
    for epoch, start in zip(cut_epochs(blocks, starts, 25, decim=2, taps=taps), starts, strict=True):
        np.testing.assert_allclose(epoch, filtered[:, start : start + 50 : 2], atol=1e-5)


@pytest.mark.parametrize("start, message", [(-3, "before its recording"), (60, "beyond the end")])
def test_epochs_outside_their_recording_are_refused(start, message):
    with pytest.raises(DataError, match=message):
        list(cut_epochs([np.zeros((2, 100))], np.array([start]), 50))


def test_memory_does_not_grow_with_the_recording(tmp_path):
    size = SIZES["things-eeg2"]["tiny"].replace(n_train_concepts=2, n_test_concepts=2)

    def peak(n_repetitions):
        root = tmp_path / str(n_repetitions)
        tracemalloc.start()
        make_phantom(
            "things-eeg2", root, size=size.replace(test_repetitions=n_repetitions), config=CONFIG, embed=embed
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, (root / "sub-01/ses-01/raw_eeg_test.npy").stat().st_size

    make_sensor_system("eeg63")  # made once in a process, and slow to trace
    short, long = peak(90), peak(150)
    assert long[1] - short[1] > 6e6
    assert long[0] - short[0] < 3e6
