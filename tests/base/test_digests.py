"""Digests of whole files: what is remembered, and that no changed file of a run passes unseen."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis import pipeline
from braindecode_vis.base import digests, store
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.config import read_config
from braindecode_vis.datasets.bids.fmri_files import hash_image_folder
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.parts.studies.compare import compare_runs
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.leaks.quick import FIRST, make_checks
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.runs import SilentListener, open_run, read_scores
from tests.parts.phantom.tiny import embed

STAGES = ("preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate")
SMALL = [
    "dataset.n_train=40", "dataset.n_test=12", "dataset.n_voxels=20", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "encoder.alphas=[1,10]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _new_process(monkeypatch, tmp_path):
    """Let every test begin as a new process does, with an empty cache."""
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path / "cache"))
    forget()


def forget():
    digests._KNOWN.clear()
    digests._USED.clear()
    digests._SOUND.clear()


def write_old(path, content):
    """Write a file and wait until its times differ from those of a later write."""
    path.write_bytes(content)
    time.sleep(0.06)
    return path


def count_reads(monkeypatch):
    read, hash_one = [], digests._hash_one
    monkeypatch.setattr(
        digests,
        "_hash_one",
        lambda place, *rest, **more: read.append(Path(place)) or hash_one(place, *rest, **more),
    )
    return read


# --- the cache ------------------------------------------------------------------------------------------------


def test_an_unchanged_file_is_read_once_and_by_whoever_wants_to_have_read_it(tmp_path, monkeypatch):
    path = write_old(tmp_path / "a.bin", b"abc")
    read = count_reads(monkeypatch)
    first = digests.digest_file(path)
    assert digests.digest_file(path) == first
    assert len(read) == 1
    forget()  # another process believes the cache, unless it needs the bytes
    assert digests.digest_file(path) == first
    assert len(read) == 1
    assert digests.digest_file(path, read=True) == first
    assert digests.digest_file(path, read=True) == first
    assert len(read) == 2
    with digests.hash_anew():
        assert digests.digest_file(path) == first
        assert digests.digest_file(path) == first
    assert len(read) == 3


def test_a_file_rewritten_in_place_under_its_old_time_is_read_again(tmp_path):
    path = write_old(tmp_path / "a.bin", b"abc")
    before, about = digests.digest_file(path), path.stat()
    with path.open("r+b") as file:
        file.write(b"abd")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_mtime_ns == about.st_mtime_ns
    assert digests.digest_file(path) != before
    forget()
    assert digests.digest_file(path) != before


@pytest.mark.parametrize("year", [1960, 1975, 2100])
def test_a_file_of_any_time_is_read_once(tmp_path, monkeypatch, year):
    """A file from the future was read by every command, as if it were being written."""
    path = write_old(tmp_path / "a.bin", b"abc")
    seconds = datetime(year, 1, 1, 0, 0, 0, 123456, tzinfo=UTC).timestamp()
    os.utime(path, (seconds, seconds))
    time.sleep(0.06)  # setting the time is a change, too
    read = count_reads(monkeypatch)
    before = digests.digest_file(path)
    forget()
    assert digests.digest_file(path) == before
    assert len(read) == 1
    path.write_bytes(b"abd")
    os.utime(path, (seconds, seconds))
    assert digests.digest_file(path) != before


def test_a_file_that_was_written_a_moment_ago_is_not_remembered(tmp_path):
    """Two writes within one tick of the kernel's clock have the same times."""
    path = tmp_path / "a.bin"
    for content in range(50):
        path.write_bytes(bytes([content]))
        found = digests.digest_file(path)
        path.write_bytes(bytes([content + 100]))
        assert digests.digest_file(path) != found


@pytest.mark.parametrize("damage", ["garbage", "other digest", "list", "folder", "unwritable"])
def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path, damage, monkeypatch):
    path = write_old(tmp_path / "a.bin", b"abc")
    digest = digests.digest_file(path)
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    if damage == "other digest":
        kept.write_text(kept.read_text().replace(digest, digest[::-1]))
    elif damage == "folder":
        kept.unlink()
        kept.mkdir()
    elif damage == "unwritable":
        (tmp_path / "file").touch()
        monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path / "file" / "cache"))
    else:
        kept.write_text({"garbage": "\x00{", "list": "[1]"}[damage])
    forget()
    assert digests.digest_file(path) == digest


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_MAX_FOLDERS", 4)
    monkeypatch.setattr(digests, "_MAX_FILES", 3)
    for number in range(6):
        (tmp_path / f"f{number}").mkdir()
        write_old(tmp_path / f"f{number}" / "x", b"x")
        digests.digest_file(tmp_path / f"f{number}" / "x")
    assert len(list((tmp_path / "cache" / "digests").iterdir())) <= 4
    files = {str(n): tmp_path / "f0" / str(n) for n in range(5)}
    for path in files.values():
        path.write_text("x")
    time.sleep(0.06)
    for name, path in files.items():
        digests.digest_files({name: path})
    assert len(digests._read_cache(str(tmp_path / "f0"))) <= 3


def test_processes_that_hash_at_the_same_time_agree(tmp_path):
    files = [write_old(tmp_path / f"{n}.bin", bytes([n]) * 1000) for n in range(8)]
    code = (
        "import sys, pathlib; from braindecode_vis.base import digests\n"
        "print([digests.digest_file(pathlib.Path(p)) for p in sys.argv[1:] for _ in range(3)])"
    )
    command = [sys.executable, "-c", code, *map(str, files)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate()[0] for process in running}
    assert len(answers) == 1
    assert answers == {f"{[digests.digest_file(p) for p in files for _ in range(3)]}\n"}


def test_large_files_are_read_side_by_side_and_progress_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_LARGE_BYTES", 1000)
    monkeypatch.setattr(digests, "_SECONDS_UNTIL_TOLD", 0.0)
    told = []
    listener = SilentListener()
    monkeypatch.setattr(listener, "watch", lambda words: _watch(told, words))
    files = {str(n): tmp_path / str(n) for n in range(4)}
    for n, path in enumerate(files.values()):
        path.write_bytes(bytes([n]) * 2000)
    with digests.show_hashing(listener.watch):
        together = digests.digest_files(files)
        forget()
        assert digests.digest_file(files["2"], read=True) == together["2"]
    assert len(set(together.values())) == 4
    assert told[-1] == "verifying files: 2 kB of 2 kB"


def _watch(told, words):
    from contextlib import nullcontext

    return nullcontext(lambda done, total, text: told.append(f"{words} {text}"))


def test_a_sha256_is_remembered_beside_the_digest(tmp_path, monkeypatch):
    """Weights of gigabytes were hashed again by every command that asked for a fingerprint."""
    path = write_old(tmp_path / "weights.bin", b"abc")
    digest = digests.digest_file(path)
    read = count_reads(monkeypatch)
    wanted = store.hash_file(path)
    for _ in range(2):
        assert digests.hash_once(path) == wanted
        assert digests.digest_file(path) == digest
        forget()
    assert len(read) == 1
    with digests.hash_anew():
        assert digests.hash_once(path) == wanted
    assert len(read) == 2
    write_old(path, b"abd")
    assert digests.hash_once(path) == store.hash_file(path) != wanted


def test_a_folder_of_pictures_has_one_digest_and_one_file_in_the_cache(tmp_path, monkeypatch):
    """A picture of the same size had the same name in the fingerprint, and a rerun reused what was made of the old."""
    folder = tmp_path / "images"
    for name in ("a/1.jpg", "a/2.JPG", "b/1.png", "b/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    time.sleep(0.06)
    first = hash_image_folder(folder)
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 1
    forget()
    read = count_reads(monkeypatch)
    monkeypatch.setattr(digests, "_MAX_FILES", 1)  # a large folder is remembered whole nevertheless
    assert hash_image_folder(folder) == first
    assert not read
    write_old(folder / "a/1.jpg", b"A/1.jpg")
    changed = hash_image_folder(folder)
    forget()
    assert hash_image_folder(folder) == changed != first
    assert [path.name for path in read] == ["1.jpg"]
    (folder / "b/1.png").unlink()
    (folder / "b/1.png").symlink_to("nowhere")  # not fetched; whoever needs it says so
    assert hash_image_folder(folder) not in (first, changed)
    (folder / "a/1.jpg").write_bytes(b"a/1.jpg")
    (folder / "b/1.png").unlink()
    (folder / "b/1.png").write_bytes(b"b/1.png")
    assert hash_image_folder(folder) == first


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("things_fmri", "things-fmri"),
        ("things_eeg2", "things-eeg2-250hz"),
        pytest.param("god", "god", marks=pytest.mark.further),
        pytest.param("bold5000_betas", "bold5000-betas", marks=pytest.mark.further),
        pytest.param("things_eeg2", "things-eeg2-official", marks=pytest.mark.further),
    ],
)
def test_a_changed_picture_of_a_data_set_is_told(tmp_path, command_line, kind, form):
    """Pictures were known by names and sizes, or not at all: one byte changed, and a rerun said "reused"."""
    make_phantom(form, tmp_path / "in", size=SIZES[form]["tiny"], config=PhantomConfig(snr=0.3), embed=embed)
    command = ("preprocess", kind, "--root", tmp_path / "in", "--out", tmp_path / "run")
    pictures = [path for path in (tmp_path / "in").rglob("*.[jp][pn]g") if "phantom_truth" not in path.parts]
    dataset = read_config(kind, root=tmp_path / "in").dataset
    before = dataset.hash_inputs()
    if kind == "god":  # the whole way, which is one for all data sets
        assert command_line(*command).returncode == 0
        assert "reused" in command_line(*command).stderr
    flip_bit(pictures[len(pictures) // 2])
    after = dataset.hash_inputs()
    (changed,) = [name for name in before if before[name] != after[name]]
    assert "images" in changed
    if kind == "god":
        done = command_line(*command)
        assert "reused" not in done.stderr
        assert "images" in done.stderr


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests") / "run"
    pipeline.run_all(open_run(read_config("synthetic_digits", SMALL), folder))
    return folder


@pytest.fixture
def copied(clean, tmp_path):
    return Path(shutil.copytree(clean, tmp_path / "run"))


def find_artifact(folder, stage):
    (path,) = (folder / "stages" / stage).glob("[!.]*")
    return path


def pick_file(artifact):
    """Return the largest file of an artifact."""
    files = [path for path in artifact.rglob("*") if path.is_file() and path.name != store.PROVENANCE]
    return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose(path):
    path.unlink()


def add(path):
    (path.parent / "extra.npy").write_bytes(b"x")


def change_record(path):
    record = next(
        folder / store.PROVENANCE for folder in path.parents if (folder / store.PROVENANCE).exists()
    )
    record.write_text(record.read_text().replace('"seconds": ', '"seconds": 1'))


class Told(SilentListener):
    """Keeps the reason of each stage."""

    def __init__(self):
        self.reasons = {}

    def finished(self, stage, artifact, seconds):
        self.reasons[stage.split()[0]] = artifact.reason


@pytest.mark.parametrize("change", [flip_bit, lose, add, change_record])
@pytest.mark.parametrize("stage", STAGES)
def test_no_changed_file_of_any_stage_is_read(copied, stage, change):
    change(pick_file(find_artifact(copied, stage)))
    with pytest.raises(DataError, match=rf"the stage {stage}.* is damaged: .* braindecode-vis run"):
        pipeline.evaluate(open_finished(copied))
    if (stage, change) == (STAGES[0], flip_bit):
        found = audit_run(copied).leaks
    else:  # what the audit begins with; all of it takes as long as the rest of the test
        found = make_checks(open_audited(copied, thorough=False, seed=0), FIRST, part="chain")
    told = [item.message for item in found if (item.check, item.level) == ("chain", "leak")]
    assert any(message.startswith(f"tampered: {stage}") for message in told)


def test_a_run_computes_what_was_changed_again_and_says_why(copied):
    before = read_scores(copied)
    for stage in STAGES:
        flip_bit(pick_file(find_artifact(copied, stage)))
    told = Told()
    assert pipeline.run_all(open_run(read_config(copied), copied, told)) == before
    assert {reason.split(" was ")[1] for reason in told.reasons.values()} == {"missing or changed"}
    assert told.reasons.keys() == set(STAGES)
    assert not audit_run(copied).leaks


def test_a_file_that_somebody_put_into_a_stage_is_kept(copied):
    note = find_artifact(copied, "train") / "note.txt"
    note.write_text("mine")
    with pytest.raises(DataError, match=r"note\.txt is not a file of the run; move it elsewhere"):
        pipeline.run_all(open_run(read_config(copied), copied))
    assert note.read_text() == "mine"
    note.rename(note.with_name(".note.txt"))  # hidden files are those of editors and disks
    pipeline.run_all(open_run(read_config(copied), copied))


def test_an_unchanged_run_is_not_read_again(copied, monkeypatch):
    time.sleep(0.06)
    pipeline.run_all(open_run(read_config(copied), copied))
    forget()
    read = count_reads(monkeypatch)
    told = Told()
    pipeline.run_all(open_run(read_config(copied), copied, told))
    assert all(reason.startswith("nothing it depends on has changed") for reason in told.reasons.values())
    assert not [place for place in read if "stages" in place.parts]
    assert "the size, times and inode" in digests.count_verified().describe()
    with digests.hash_anew():
        pipeline.run_all(open_run(read_config(copied), copied))
    assert [place for place in read if "stages" in place.parts]


def test_bits_that_a_disk_lost_are_found_before_anything_is_computed_from_them(copied):
    """The times of such a file are as they were, so that its stage is reused until its bytes are needed."""
    damaged = pick_file(find_artifact(copied, "preprocess"))
    time.sleep(0.06)
    content, about = damaged.read_bytes(), damaged.stat()
    digests.digest_file(damaged)
    flip_bit(damaged)
    known = digests._KNOWN[str(damaged)]
    identity = digests.identify_file(damaged)
    digests._KNOWN[str(damaged)] = digests._Known(identity, known.digest, read_here=False, settled=True)
    assert (damaged.stat().st_size, content == damaged.read_bytes()) == (about.st_size, False)
    shutil.rmtree(find_artifact(copied, "train"))
    with pytest.raises(DataError, match=r"the stage preprocess .* was missing or changed"):
        pipeline.run_all(open_run(read_config(copied), copied))


def test_a_run_that_is_open_in_python_sees_a_later_change(copied):
    run = bdv.open_run(copied)
    rows = np.array(run.predictions.vectors)
    path = find_artifact(copied, "retrieve") / "fold00" / "vectors.npy"
    stored = np.load(path, mmap_mode="r+")
    stored[:] = rows[::-1]
    stored.flush()
    with pytest.raises(DataError, match=r"the stage retrieve .* was missing or changed since it was opened"):
        run.predictions_of_fold(0)


@pytest.mark.parametrize("about", [5, None, [], [1], ["size", 7], {"a": 1}])
def test_a_record_whose_files_have_no_size_and_digest_is_damaged_and_no_traceback(tmp_path, about):
    """`audit` and `run` ended in a TypeError where a record said a number or a text in place of size and digest."""
    store.write_json(tmp_path / store.PROVENANCE, {"created": "now", "files": {"scores.json": about}})
    (tmp_path / "scores.json").write_text("[]")
    assert "damaged" in store.find_damage(tmp_path)
    assert store.find_changed_results(tmp_path) == [store.PROVENANCE]


@pytest.mark.parametrize("name", ["scores.json", "scores.parquet", "report.html", "provenance.json"])
def test_changed_results_at_the_top_are_found(copied, name):
    assert store.find_changed_results(copied) == []
    if name == "provenance.json":
        (copied / name).write_text((copied / name).read_text().replace('"seed": 0', '"seed": 1'))
    else:
        (copied / name).write_bytes(b"[]")
    assert store.find_changed_results(copied) == [name]
    found = make_checks(open_audited(copied, thorough=False, seed=0), FIRST, part="chain")
    assert name in [item.where for item in found if item.level == "leak"]
    if name == "scores.json":
        with pytest.raises(DataError, match=r"scores\.json was changed after the run"):
            read_scores(copied)
    pipeline.run_all(open_run(read_config(copied), copied))
    assert store.find_changed_results(copied) == []


def test_the_command_says_what_it_verified(copied, command_line):
    done = command_line("run", copied)
    assert done.returncode == 0
    assert "verified " in done.stdout
    assert " files, " in done.stdout
    flip_bit(pick_file(find_artifact(copied, "train")))
    done = command_line("run", copied, "--verify")
    assert "was missing or changed" in done.stderr
    assert "read them all" in done.stdout


def lose_bits(path):
    """Change a file whose size, times and inode show nothing, as a disk does, after this process had read it."""
    digest = digests.digest_file(path)
    flip_bit(path)
    identity = digests.identify_file(path)
    digests._KNOWN[str(path)] = digests._Known(identity, digest, read_here=True, settled=True)


@pytest.mark.parametrize(
    "verb",
    ["report", *(pytest.param(verb, marks=pytest.mark.further) for verb in ("audit", "predict", "analyze"))],
)
def test_verify_reads_again_what_was_read_before(copied, tmp_path, verb, command_line):
    stage = "preprocess" if verb == "predict" else "evaluate"
    trials = tmp_path / "trials.npy"
    np.save(trials, np.zeros((3, 20)))
    words = {
        "predict": [copied, "--on", trials, "--out", tmp_path / "new"],
        "analyze": [copied, "--analysis", "hubness"],
    }
    if verb == "analyze":
        command_line(verb, *words[verb])
        stage = "analyze"
    lose_bits(pick_file(find_artifact(copied, stage)))
    command = [verb, *words.get(verb, [copied])]
    told = command_line(*command)
    done = command_line(*command, "--verify")
    # What can compute does so and says why; what reads refuses.
    assert done.returncode == (0 if verb in ("report", "analyze") else 2)
    said = [" ".join((each.stdout + each.stderr).split()) for each in (told, done)]
    assert ["was missing or changed" in words for words in said] == [False, True]


def test_verify_in_python_reads_every_file(copied):
    bdv.open_run(copied, verify=True)
    damaged = pick_file(find_artifact(copied, "retrieve"))
    lose_bits(damaged)
    bdv.open_run(copied)
    with pytest.raises(DataError, match=rf"stage retrieve .* {damaged.name} was missing or changed; delete"):
        bdv.open_run(copied, verify=True)
    shutil.rmtree(find_artifact(copied, "retrieve"))
    lose_bits(copied / "report.html")
    with pytest.raises(DataError, match=r"report\.html was changed after the run"):
        bdv.open_run(copied, verify=True)


def test_decode_computes_again_what_verify_finds(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, size=(20, 4, 4, 3), dtype=np.uint8)
    made = bdv.from_arrays(rng.normal(size=(20, 30)), images=pictures)
    few = {"evaluation": {"n_bootstrap": 100, "n_permutations": 100}}
    bdv.decode(made, out=tmp_path / "run", settings=few)
    told = Told()
    lose_bits(pick_file(find_artifact(tmp_path / "run", "preprocess")))
    bdv.decode(made, out=tmp_path / "run", settings=few, listener=told)
    assert told.reasons["preprocess"].startswith("nothing it depends on has changed")
    bdv.decode(made, out=tmp_path / "run", settings=few, listener=told, verify=True)
    assert told.reasons["preprocess"].endswith("was missing or changed")


@pytest.mark.parametrize("name", ["provenance.json", "data"])
def test_a_folder_that_was_found_sound_is_read_again_once_a_file_has_changed(tmp_path, monkeypatch, name):
    (tmp_path / "data").write_text("1.0")
    store.write_provenance(
        tmp_path / "provenance.json", {"created": "now", "files": store.describe_files(tmp_path)}
    )
    time.sleep(0.1)  # until a later write shows in the times
    assert store.find_damage(tmp_path) == ""
    with monkeypatch.context() as patch:
        patch.setattr(store, "_parse_record", None)
        assert store.find_damage(tmp_path) == ""  # by size, times and inode alone
    path = tmp_path / name
    before = path.stat()
    path.write_text(path.read_text().replace("1.0", "2.0").replace("now", "new"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"its {'file ' * (name == 'data')}{name} was" in store.find_damage(tmp_path)


def test_damage_that_reading_found_is_not_forgotten(tmp_path, monkeypatch):
    """What a disk lost changes neither size nor times; nor is a folder that may no longer be entered a traceback."""
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "data").write_text("1.0")
    store.write_provenance(
        folder / "provenance.json", {"created": "now", "files": store.describe_files(folder)}
    )
    time.sleep(0.1)
    assert store.find_damage(folder) == ""
    flip_bit(folder / "data")
    digests.keep_sound(folder, digests.identify_settled([folder / "provenance.json"]))
    assert store.find_damage(folder) == ""
    assert "data was missing or changed" in store.find_damage(folder, read=True)
    assert "data was missing or changed" in store.find_damage(folder)
    digests.keep_sound(folder, digests.identify_settled([folder / "provenance.json"]))
    monkeypatch.setattr(digests, "identify_file", _refuse)
    monkeypatch.setattr(store.Path, "read_bytes", _refuse)
    assert store.find_damage(folder) == "its provenance.json was missing or damaged"


def _refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_files_of_earlier_versions_are_known_by_what_was_recorded_of_them(copied):
    artifact = find_artifact(copied, "train")
    record = store.read_json(artifact / store.PROVENANCE)
    record.pop("seal")
    names = list(record["files"])
    for name in names:
        record["files"][name][1] = store.hash_file(artifact / name) if name != names[0] else None
    store.write_json(artifact / store.PROVENANCE, record)
    assert store.find_damage(artifact) == ""
    told = audit_run(copied)
    assert not told.leaks
    assert "known by size only" in next(item.message for item in told.findings if item.check == "chain")
    flip_bit(artifact / names[1])
    assert names[1] in store.find_damage(artifact)


def test_zeros_in_the_middle_of_a_recording_make_a_new_run_and_a_finding(tmp_path):
    """Sixty-four samples of 4 KiB were all that was hashed of a recording, and 98 % of a raw file went unseen."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(60, 2000)).astype(np.float32)  # 480 kB
    pictures = rng.integers(0, 255, size=(20, 8, 8, 3), dtype=np.uint8)
    split = ["train"] * 45 + ["test"] * 15
    made = bdv.from_arrays(data, images=pictures, shown=np.repeat(np.arange(20), 3), split=split)
    out = tmp_path / "run"
    few = {"evaluation.n_bootstrap": 100, "evaluation.n_permutations": 100, "encoder.alphas": [10.0]}
    bdv.decode(made, out=out, settings=few)
    assert [item.level for item in audit_run(out).findings if item.check == "recordings"] == ["ok"]
    source = max((out / "data").rglob("*.npy"), key=lambda path: path.stat().st_size)
    content = bytearray(source.read_bytes())
    content[250_000:253_000] = bytes(3_000)  # between two of the blocks that were looked at
    source.write_bytes(content)
    (found,) = [item for item in audit_run(out).findings if item.check == "recordings"]
    assert found.level == "warning"
    assert "differ from those of the run" in found.message
    told = Told()
    pipeline.preprocess(open_run(read_config(out), out, told))
    assert told.reasons["preprocess"].startswith("inputs.")
    (out / "data").rename(tmp_path / "gone")
    (found,) = [item for item in audit_run(out).findings if item.check == "recordings"]
    assert found.message.startswith("not checkable")


def test_a_comparison_says_what_it_had_to_compute(copied, tmp_path):
    """`compare` repaired a damaged run without a word."""
    other = tmp_path / "other"
    pipeline.run_all(open_run(read_config("synthetic_digits", [*SMALL, "encoder.alphas=[3]"]), other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_runs([other, copied], n_boot=20)
    flip_bit(pick_file(find_artifact(copied, "evaluate")))
    told = r"was computed for the comparison: evaluate \(its file .* was missing or changed\)"
    with pytest.warns(Notice, match=told):
        compare_runs([other, copied], n_boot=20)


def test_a_damaged_analysis_is_named(copied, command_line):
    """The report left it out without a word."""
    assert command_line("analyze", copied, "--analysis", "hubness").returncode == 0
    flip_bit(pick_file(find_artifact(copied, "analyze")))
    done = command_line("report", copied)
    assert done.returncode == 0
    assert "is damaged (its file" in " ".join(done.stderr.split())


@pytest.fixture
def linked(tmp_path, monkeypatch):
    """Return the pictures of three runs beside each other, of which the third has just linked to the others."""
    monkeypatch.setattr(store, "_LARGE_BYTES", 4096)
    monkeypatch.setattr(digests, "_LARGE_BYTES", 4096)  # from here on a reading waits until times tell
    content = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)

    def make(name):
        forget()
        return store.RunFolder(tmp_path / name).produce(
            "preprocess", version=1, fields={"run": name}, upstream={},
            compute=lambda folder: np.save(folder / "pixels.npy", content),
        ).path / "pixels.npy"  # fmt: skip

    return [make(name) for name in "abc"]


def test_a_new_link_sends_nobody_back_to_the_bytes(linked, monkeypatch):
    """A link changes the change time of the file, so that every run beside a new one read its large files once more."""
    assert len({path.stat().st_ino for path in linked}) == 1
    forget()
    read = count_reads(monkeypatch)
    assert [store.find_damage(path.parent) for path in linked] == ["", "", ""]
    assert [path for path in read if path.suffix == ".npy"] == []
    assert digests.digest_file(linked[0], read=True) == digests.digest_file(linked[1])
    assert read == [linked[0]]


def test_a_file_that_is_changed_in_place_is_noticed_under_each_of_its_links(linked):
    flip_bit(linked[1])
    forget()
    for path in linked:
        assert "pixels.npy was missing or changed" in store.find_damage(path.parent)


@pytest.mark.parametrize("when", ["before", "after", "silently"])
def test_what_is_known_does_not_follow_a_link_to_other_bytes(tmp_path, when):
    """Whoever writes between the look at a file and the link, or around it, is found by one of the times."""
    path, link = write_old(tmp_path / "file", b"one"), tmp_path / "link"
    digest, before = digests.digest_file(path), digests.identify_file(path)
    if when != "after":
        path.write_bytes(b"two")
    if when == "silently":  # as a copy that keeps times
        os.utime(path, ns=(before.mtime_ns, before.mtime_ns))
        before = digests.identify_file(path)
    os.link(path, link)
    if when == "after":
        path.write_bytes(b"two")
    digests.follow_link(before, [path], link)
    assert digests.digest_file(path) != digest
    assert digests.digest_file(link) != digest
