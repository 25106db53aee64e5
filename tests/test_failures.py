"""What the command says when a signal or the system ends it: one sentence, and a folder from which it goes on."""

import errno
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from braindecode_vis import cli
from braindecode_vis.base.checks import DataError, check_file, describe_unfetched, refuse_damage
from braindecode_vis.base.store import find_damage, read_json, read_provenance
from braindecode_vis.cli import main
from braindecode_vis.cli.failures import describe_failure, stop_cleanly
from tests.test_cli import SMALL

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_training_cleanly(tmp_path, number):
    """Clusters send SIGTERM, which once ended the process on the spot and left temporary folders behind."""
    network = "encoder={kind: network, epochs: 100000, batch_size: 16, checkpoint_seconds: 0}"
    command = [sys.executable, "-m", "braindecode_vis", "train", "synthetic_digits", "--out", tmp_path]
    command += [*SMALL, "--set", network]
    # A suite that a shell runs in the background ignores Ctrl-C, and so would what it starts.
    listens = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **listens)
    while process.poll() is None and not list(tmp_path.glob("work/*/checkpoint.safetensors")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == (
        f"error: stopped by {number.name}; finished work is kept: run the same command again to continue."
    )
    assert not list(tmp_path.rglob(".tmp-*"))
    # From here a second call goes on, as after the power was cut (tests/test_pipeline.py).
    assert list(tmp_path.glob("work/*/checkpoint.safetensors"))


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("phantom", "finished work is kept: run the same command again to continue."),
        ("score", "unfinished work is not kept: run the same command again to start from the beginning."),
    ],
)
def test_the_end_by_a_signal_promises_what_the_verb_keeps(command_line, monkeypatch, verb, words):
    """Every verb spoke of finished stages that it goes on from: also those that have none, or keep nothing."""
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGTERM))
    done = command_line(verb)
    assert done.returncode == 143
    assert done.stderr == f"error: stopped by SIGTERM; {words}\n"

    def fail():
        raise OSError(errno.ENOSPC, "", "/disk/file")

    monkeypatch.setattr(cli, "app", fail)
    assert ("kept" in command_line(verb).stderr) == (verb == "phantom")

    def run_out(*_args, **_options):
        raise MemoryError

    monkeypatch.undo()
    monkeypatch.setattr(
        type(cli.app), "__call__", run_out
    )  # the options of a verb are read from the app itself
    monkeypatch.setattr("braindecode_vis.base.devices.leave", sys.exit)
    ended = command_line(verb)
    assert ended.returncode == 2
    assert "memory ran out" in ended.stderr
    assert ("kept" in ended.stderr) == (verb == "phantom")


def test_verbs_that_start_anew_are_verbs():
    assert not cli._STARTING_ANEW - cli._VERBS.keys()


@pytest.fixture
def listens():
    """Ctrl-C is listened to; a shell starts what it runs in the background without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens")
def test_a_repeated_sigterm_leaves_time_for_cleaning_up_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_cleanly() as stops:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stops.exit_code == 143
        stops.since -= 60  # the first was lost on its way
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_lost_in_a_callback_comes_again(capsys):
    """Python swallows errors of weak references' callbacks, printed a traceback, and the run went on."""

    class Thing:
        pass

    with stop_cleanly() as stops:
        thing = Thing()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
    assert kept() is None
    assert stops.exit_code == 143
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored():
    """``nohup`` starts programs so that they outlive their terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_cleanly() as stops:
            signal.raise_signal(signal.SIGINT)
        assert not stops.received
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_of_reading_does_not_speak_of_the_output(number):
    """A recording that may not be read was answered with "choose another folder with --out"."""
    said = describe_failure(OSError(number, os.strerror(number), "/data/sub-01.edf"))
    assert "at /data/sub-01.edf" in said
    assert "--out" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_an_error_of_writing_does(number):
    assert "choose another folder with --out" in describe_failure(
        OSError(number, os.strerror(number), "/run/a")
    )


def test_numpy_hides_the_number_of_the_system():
    """Beyond a limit on file sizes NumPy raises an OSError that says how much was written, and no number."""
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="written") as raised:
        np.zeros(1 << 20).tofile(full)
    assert raised.value.errno is None
    assert "choose another folder with --out" in describe_failure(raised.value)


def test_safetensors_says_the_number_of_the_system_in_its_text(tmp_path):
    """A checkpoint beyond a limit on file sizes ended in a traceback of SafetensorError."""
    from safetensors.numpy import save_file

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        said = _raise_in(lambda path: save_file({"x": np.zeros(10_000)}, path), tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.startswith("the file grew past the size limit; finished work is kept")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    """An output below a file ended in a traceback of FileExistsError."""
    path = tmp_path / "file"
    path.touch()
    said = _raise_in(lambda path: path.mkdir(parents=True, exist_ok=True), path)
    assert said.startswith(f"there is a file where a folder belongs at {path}; choose another place")


def test_a_fault_of_ours_keeps_its_traceback():
    assert describe_failure(KeyError("name")) == ""
    assert describe_failure(OSError("something")) == ""


def test_what_a_reader_of_data_sets_stumbles_over_names_its_file(tmp_path):
    """A file may hold anything, and what nobody thought of came out as a traceback."""
    path = tmp_path / "events.tsv"
    path.touch()
    reader: dict = {"__name__": "braindecode_vis.datasets.some.files"}
    exec("def read(path):\n    return {}['onset'] + 1", reader)
    said = _raise_in(reader["read"], path)
    assert said.startswith(
        f"{path} does not hold what datasets.some.files expects (KeyError: 'onset'); copy or fetch"
    )
    assert said.endswith("if it is whole, report this with the traceback of --debug.")
    reader["__name__"] = "braindecode_vis.preprocessing.epochs"
    assert "does not hold what preprocessing.epochs expects" in _raise_in(reader["read"], path)
    exec("def fault(path):\n    assert not path", reader)
    assert _raise_in(reader["fault"], path) == ""
    reader["__name__"] = "braindecode_vis.preprocessing.array_file"  # writes files of ours
    assert _raise_in(reader["read"], path) == ""
    reader["__name__"] = "braindecode_vis.encoders.ridge"
    assert _raise_in(reader["read"], path) == ""


def _raise_in(read, path):
    """Return the sentence for what a reader raises on a file, as the command would say it."""
    try:
        read(path)
    except Exception as error:
        return describe_failure(error)
    raise AssertionError(f"{path} was read")


def _read_gzip(path):
    with gzip.open(path) as file:
        file.read()


def _read_hdf5(path):
    import h5py

    with h5py.File(path) as file:
        file["a dataset"][()]


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (gzip.compress(b"0" * 5000)[:20], _read_gzip),
        (b"no gzip", _read_gzip),
        (gzip.compress(bytes(range(250)) * 9)[:-4] + b"xxxx", _read_gzip),
        (b"a,b\n1,2,3\n4\n5,6,7,8,9\n", lambda path: pd.read_csv(path)),
        (b"", lambda path: pd.read_csv(path)),
        (b"\xff\xfe\x00a", lambda path: path.read_text(encoding="utf-8")),
        (b"{", lambda path: json.loads(path.read_text())),
        (b"no HDF5", _read_hdf5),
        (b"no safetensors", lambda path: load_file(path)),
    ],
    ids=[
        "cut gzip",
        "no gzip",
        "gzip checksum",
        "ragged table",
        "empty table",
        "no text",
        "no JSON",
        "no HDF5",
        "no safetensors",
    ],
)
def test_damaged_files_are_one_sentence_that_names_them(tmp_path, content, read):
    """gzip, pandas, text and HDF5 each raise their own errors, most of them without the name of the file."""
    path = tmp_path / "damaged"
    path.write_bytes(content)
    said = _raise_in(read, path)
    assert said.startswith(f"{path} cannot be read (")
    assert said.endswith("; copy or fetch it again.")


def test_a_missing_entry_of_an_hdf5_file_is_one_of_the_file(tmp_path):
    import h5py

    h5py.File(tmp_path / "x.h5", "w").close()
    assert f"{tmp_path / 'x.h5'} cannot be read (KeyError" in _raise_in(_read_hdf5, tmp_path / "x.h5")


def test_content_of_datalad_that_was_not_fetched(tmp_path):
    """Such a data set is made of links to nothing; readers call them missing, and so did we."""
    (tmp_path / "sub-01").symlink_to("../.git/annex/objects/aa/bb")
    link = tmp_path / "eeg.edf"
    link.symlink_to(".git/annex/objects/MD5E-s39")
    remedy = f"fetch it with: datalad get {link}"
    assert remedy in _raise_in(lambda path: path.read_bytes(), link)
    with pytest.raises(DataError, match=re.escape(remedy)):
        check_file(link, what="the recording", hint="fetch it")
    with pytest.raises(DataError, match=re.escape(remedy)), refuse_damage(f"{link} cannot be read as EDF"):
        raise FileNotFoundError("no such file")
    assert f"datalad get {tmp_path / 'sub-01'}" in _raise_in(
        lambda path: path.read_bytes(), tmp_path / "sub-01/a"
    )
    assert describe_unfetched(tmp_path / "absent") == ""


def test_a_reader_that_quotes_the_whole_file_is_cut_short():
    """A file of markers without line ends came back as a sentence of all its markers."""
    with pytest.raises(DataError) as raised, refuse_damage("x.vmrk cannot be read"):
        raise ValueError("no such line: " + "Mk1=Stimulus,S 1 " * 500)
    assert len(str(raised.value)) < 500
    assert str(raised.value).endswith("...); copy or fetch it again.")


def test_a_word_without_end_is_cut_short(command_line):
    """A damaged cell of a table holds thousands of characters, all of which stood in the sentence."""
    done = command_line("run", "synthetic_digits", "--set", f"seed={'y' * 5000}")
    assert done.returncode == 2
    assert f"{'y' * 190}...{'y' * 50}" in done.stderr
    assert len(done.stderr) < 600


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    said = _raise_in(lambda path: path.read_bytes(), tmp_path)
    assert said.startswith(f"there is a folder where a file belongs at {tmp_path}")


def test_the_end_of_a_damaged_file_is_not_the_end_of_what_is_typed(tmp_path, monkeypatch, capsys):
    """typer turned EOFError into "Aborted!" and exit code 1."""
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"0" * 5000)[:20])
    monkeypatch.setattr("braindecode_vis.cli.show.print_json", lambda _: _read_gzip(path))
    monkeypatch.setattr("braindecode_vis.cli.discover.print_json", lambda _: _read_gzip(path))
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", "datasets", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: {path} cannot be read (EOFError" in capsys.readouterr().err


def test_damaged_records_of_a_run(tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.json is damaged"):
        read_json(deep)
    for content in ({"files": "text", "created": ""}, {"files": ["a"], "created": ""}, ["a"], "text", None):
        (tmp_path / "provenance.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"provenance\.json is damaged"):
            read_provenance(tmp_path / "provenance.json")
        assert find_damage(tmp_path) == "its provenance.json was missing or damaged"


def test_a_folder_in_place_of_a_table_is_told_before_runs_are_compared(tmp_path, command_line):
    """The sentence once named a temporary file beside the folder, after minutes of comparing."""
    done = command_line("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path} is a folder; give a CSV file with --out."
