import json
import os
import shutil
import struct
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.datasets.array_folder import load_array


def produce(folder, fields, compute, version=1, upstream=None):
    return folder.produce("train", version=version, fields=fields, upstream=upstream or {}, compute=compute)


def write_result(path):
    (path / "result.txt").write_text("42")


def test_a_finished_artifact_is_reused_and_a_changed_one_is_explained(tmp_path):
    folder = store.RunFolder(tmp_path / "run")
    first = produce(folder, {"alpha": 1, "nested": {"k": 2}}, write_result)
    again = produce(folder, {"alpha": 1, "nested": {"k": 2}}, lambda path: pytest.fail("computed twice"))
    changed = produce(folder, {"alpha": 1, "nested": {"k": 3}}, write_result)
    bumped = produce(folder, {"alpha": 1, "nested": {"k": 3}}, write_result, version=2)
    assert not first.reused
    assert first.reason == "not computed before"
    assert again.reused
    assert again.path == first.path
    assert changed.reason == "nested.k: 2 -> 3"
    assert "version 1 -> 2" in bumped.reason
    assert len({first.fingerprint, changed.fingerprint, bumped.fingerprint}) == 3


@pytest.fixture
def pictures(monkeypatch):
    """Return what writes 4 kB of pictures, which are large here."""
    monkeypatch.setattr(store, "_LARGE_BYTES", 4096)
    content = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)

    def write(path):
        (path / "stimuli").mkdir()
        np.save(path / "stimuli" / "pixels.npy", content)

    return write


def test_runs_beside_each_other_keep_their_pictures_once(tmp_path, pictures, monkeypatch):
    """Every run of a subject of NSD held its own copy of 5.4 GB of pictures."""
    first = produce(store.RunFolder(tmp_path / "a"), {"x": 1}, pictures)
    second = produce(store.RunFolder(tmp_path / "b"), {"x": 2}, pictures)
    third = produce(store.RunFolder(tmp_path / "b"), {"x": 3}, pictures)
    files = [made.path / "stimuli" / "pixels.npy" for made in (first, second, third)]
    assert len({file.stat().st_ino for file in files}) == 1
    assert produce(store.RunFolder(tmp_path / "b"), {"x": 2}, pictures).reused
    assert not store.list_added(second.path)
    shutil.rmtree(tmp_path / "a")
    assert produce(store.RunFolder(tmp_path / "b"), {"x": 2}, pictures).reused
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    fourth = produce(store.RunFolder(tmp_path / "c"), {"x": 1}, pictures)
    assert (fourth.path / "stimuli" / "pixels.npy").stat().st_ino != files[1].stat().st_ino
    assert sorted(path.name for path in (fourth.path / "stimuli").iterdir()) == ["pixels.npy"]


def test_a_symbolic_link_in_another_run_is_left_alone(tmp_path, pictures):
    """The new file was replaced by a link to the link, which led nowhere from the new place."""
    first = produce(store.RunFolder(tmp_path / "a"), {"x": 1}, pictures).path / "stimuli" / "pixels.npy"
    first.rename(tmp_path / "archived.npy")
    first.symlink_to("../../../../../archived.npy")
    made = produce(store.RunFolder(tmp_path / "b"), {"x": 2}, pictures).path / "stimuli" / "pixels.npy"
    assert not made.is_symlink()
    assert made.read_bytes() == (tmp_path / "archived.npy").read_bytes()


def test_a_neighbour_on_a_dead_mount_costs_no_result(tmp_path, pictures, monkeypatch):
    def fail(*_):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(store.RunFolder, "_share_large", fail)
    assert (produce(store.RunFolder(tmp_path / "a"), {}, pictures).path / "stimuli" / "pixels.npy").is_file()


def test_a_picture_that_is_changed_in_one_run_is_missed_in_the_other(tmp_path, pictures):
    """Linked files share their bytes; the record of each run knows what they were."""
    made = [produce(store.RunFolder(tmp_path / name), {}, pictures).path for name in "ab"]
    before = (made[1] / "stimuli" / "pixels.npy").read_bytes()
    with (made[0] / "stimuli" / "pixels.npy").open("r+b") as file:
        file.seek(200)
        file.write(b"changed")
    for path in made:
        assert "pixels.npy was missing or changed" in store.find_damage(path)
    again = produce(store.RunFolder(tmp_path / "b"), {}, pictures)
    assert not again.reused
    assert (again.path / "stimuli" / "pixels.npy").read_bytes() == before
    assert store.find_damage(made[0])  # what was changed is linked to by nobody
    assert not produce(store.RunFolder(tmp_path / "a"), {}, pictures).reused
    assert len({(path / "stimuli" / "pixels.npy").stat().st_ino for path in made}) == 1


def test_a_failed_computation_leaves_nothing_behind(tmp_path):
    folder = store.RunFolder(tmp_path)

    def fail(path):
        write_result(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"the disk is full: train .* run the same command again"):
        produce(folder, {}, fail)
    assert list((tmp_path / "stages" / "train").iterdir()) == []


def test_the_leftovers_of_a_killed_process_are_removed_and_never_read(tmp_path):
    folder = store.RunFolder(tmp_path)
    dead = tmp_path / "stages" / "train" / f".tmp--0123456789abcdef-{store._HOST}-99999999"
    alive = dead.with_name(f".tmp--fedcba9876543210-{store._HOST}-{os.getppid()}")
    elsewhere = dead.with_name(".tmp--fedcba9876543210-otherhost-99999999")
    for path in (dead, alive, elsewhere):
        path.mkdir(parents=True)
        (path / store.PROVENANCE).write_text("{")
    assert produce(folder, {}, write_result).reason == "not computed before"
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_an_artifact_that_another_process_finished_first_is_taken(tmp_path):
    folder = store.RunFolder(tmp_path)

    def compute(path):
        write_result(path)
        final = path.parent / store.compute_fingerprint("train", 1, {}, {})
        final.mkdir()
        (final / "theirs.txt").touch()

    assert (produce(folder, {}, compute).path / "theirs.txt").exists()


def test_provenance_says_how_a_result_was_made(tmp_path):
    artifact = produce(store.RunFolder(tmp_path), {"alpha": 1}, lambda path: {"inputs": {"a.mat": "00ff"}})
    record = json.loads((artifact.path / store.PROVENANCE).read_text())
    assert record["fields"] == {"alpha": 1}
    assert record["inputs"] == {"a.mat": "00ff"}
    assert record["profile"]["cpu_seconds"] >= 0
    assert {"numpy", "python", "braindecode_vis"} <= record["versions"].keys()
    assert record["fingerprint"] == artifact.fingerprint
    assert record["created"].endswith("UTC")


def test_a_fingerprint_takes_plain_values_only():
    with pytest.raises(TypeError, match="cannot enter a fingerprint"):
        store.compute_fingerprint("train", 1, {"alpha": np.float32(1)}, {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"run folder .*file/run cannot be written .* --out"):
        store.RunFolder(tmp_path / "file" / "run")


def test_atomic_replacement_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "scores.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(DataError, match="the input holds NaN where a number is needed"):
        store.write_json(path, {"a": float("nan")})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_files_are_as_readable_as_any_other(tmp_path):
    """Safetensors writes for the owner alone, which locks a laboratory out of its weights."""
    plain = tmp_path / "plain"
    plain.touch()
    with store.replace_atomically(tmp_path / "weights.safetensors") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "weights.safetensors").stat().st_mode == plain.stat().st_mode


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        store.read_json(tmp_path / "meta.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_json_with_no_number_is_named(tmp_path, number):
    """What is never written was read: a NaN in a run's own scores went into tables and averages."""
    (tmp_path / "scores.json").write_text(f'[{{"value": {number}}}]')
    with pytest.raises(
        DataError, match=rf"scores\.json is damaged \(it holds {number}, which is not a number\)"
    ):
        store.read_json(tmp_path / "scores.json")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_responses_come_back_as_they_were_and_open_without_us(tmp_path, dtype):
    trials = pd.DataFrame(
        {
            "subject": "01", "session": ["01", "02"], "run": "01", "stimulus_id": ["a", "b"], "repetition": [0, 1],
            "split": ["train", "test"], "concept": ["x", "y"],
        }
    )  # fmt: skip
    coords = {"ch_names": ["O1", "O2", "Oz"], "times": np.linspace(0, 1, 4), "sfreq": 250.0}
    data = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    responses = Responses(data, ("trial", "channel", "time"), trials, "V", coords)
    store.write_responses(tmp_path / "r", responses)
    back = store.read_responses(tmp_path / "r")
    assert isinstance(back.data, np.memmap)
    assert back.data.dtype == dtype
    np.testing.assert_array_equal(back.data, data)
    pd.testing.assert_frame_equal(back.trials, trials)
    assert back.coords["ch_names"] == coords["ch_names"]
    np.testing.assert_array_equal(back.coords["times"], coords["times"])
    np.testing.assert_array_equal(np.load(tmp_path / "r" / "data.npy"), data)


def test_embeddings_and_stimuli_come_back_as_they_were(tmp_path):
    bank = Embeddings(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), ["a", "b", "c"], "toy")
    store.write_embeddings(tmp_path / "e", bank)
    back = store.read_embeddings(tmp_path / "e")
    np.testing.assert_array_equal(back.vectors, bank.vectors)
    assert (list(back.ids), back.space) == (["a", "b", "c"], "toy")

    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1] += 7
    table = pd.DataFrame(
        {
            "stimulus_id": ["a", "b"],
            "concept": "x",
            "path": "p",
            "sha256": [hash_pixels(image) for image in pixels],
        }
    )
    store.write_stimuli(tmp_path / "s", StimulusSet(table, pixels=pixels))
    again = store.read_stimuli(tmp_path / "s")
    np.testing.assert_array_equal(again.read_image("b"), pixels[1])
    with pytest.raises(DataError, match="'z' is not in the stimulus table of 2 images"):
        again.read_image("z")
    with pytest.raises(DataError, match="not available"):
        replace(again, pixels=None).read_image("a")


def test_stages_may_be_a_link_to_a_run_beside_it_alone(tmp_path):
    """A run folder from somebody else could otherwise write into any folder of its user."""
    for name in ("sweep/stages", "sweep/a", "sweep/b/stages", "elsewhere/stages"):
        (tmp_path / name).mkdir(parents=True)
    link = tmp_path / "sweep" / "a" / "stages"
    for target, allowed in (("../stages", True), ("../b/stages", True), ("../../elsewhere/stages", False)):
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
        if allowed:
            store.RunFolder(link.parent)
        else:
            with pytest.raises(DataError, match=r"stages is a link to .*; remove the link, or link to"):
                store.RunFolder(link.parent)
        store.RunFolder(link.parent, writable=False)  # to look is allowed


@pytest.mark.parametrize("shape", ["(True, 6)", "(6, ", "'ab'", "(2, -3)"])
def test_a_header_of_numpy_that_is_damaged_is_one_sentence(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    path = tmp_path / "data.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(24))
    for read in (store._open_array, lambda file: load_array(file, "responses")):
        with pytest.raises(DataError, match=r"data\.npy (is damaged|cannot be read)"):
            read(path)
