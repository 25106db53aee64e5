"""Two processes in one run folder: one waits and shares, or is refused; a killed one blocks nobody."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from typer.testing import CliRunner

import braindecode_vis as bdv
from braindecode_vis.base import locks
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.locks import HOLDER, hold_folder
from braindecode_vis.cli import app
from braindecode_vis.config import read_config
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.studies.compare import compare_runs, read_items
from braindecode_vis.pipeline import run_all, train
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.runs import SilentListener, open_run, read_scores

#: Holds a folder for settings until it is told to go on.
HOLD = """
import sys
from pathlib import Path
from braindecode_vis.base.locks import hold_folder

sys.argv[0] = "braindecode-vis"
with hold_folder(Path(sys.argv[1]), sys.argv[2], print):
    print("holding", flush=True)
    sys.stdin.readline()
"""
QUICK = [
    "dataset.n_train=40",
    "dataset.n_test=20",
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
]


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds `tmp_path` with the settings ``a``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "a"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_other_settings_are_refused_and_the_same_wait_until_the_holder_is_gone(tmp_path, holder):
    with (
        pytest.raises(
            ConfigError, match=rf"is in use by process {holder.pid} of this machine \(since .*: .*other sett"
        ),
        hold_folder(tmp_path, "b", print),
    ):
        pass
    refused = CliRunner().invoke(app, ["preprocess", "synthetic_digits", "--out", str(tmp_path)])
    assert isinstance(refused.exception, ConfigError)
    assert "choose another folder with --out" in str(refused.exception)
    rng = np.random.default_rng(0)
    data = bdv.from_arrays(rng.random((8, 5)), images=rng.random((8, 4, 4)))
    with pytest.raises(ConfigError, match=r"which runs other settings; .* another folder as out"):
        bdv.decode(data, split=2, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", HOLDER]
    told = []
    threading.Timer(1.0, lambda: holder.send_signal(signal.SIGKILL)).start()
    with hold_folder(tmp_path, "a", told.append), hold_folder(tmp_path, "a", print):  # a stage within a stage
        assert holder.wait() == -signal.SIGKILL
    assert told[0].startswith(f"waiting for process {holder.pid} of this machine")
    assert told[0].endswith("with the same settings; its results are shared")
    assert len(told) == 1  # a line a minute
    assert not (tmp_path / HOLDER).exists()


def test_only_a_lock_whose_holder_cannot_be_seen_may_be_deleted(tmp_path, holder, monkeypatch):
    """Whoever waited for a process that was at work beside him was advised to delete its lock, if it was gone."""
    note = json.loads((tmp_path / HOLDER).read_text())
    told = []
    for elsewhere in ({**note, "host": "another"}, {}):
        (tmp_path / HOLDER).write_text(json.dumps(elsewhere))

        def tell(text):
            told.append(text)
            raise KeyboardInterrupt  # it would wait

        with pytest.raises(KeyboardInterrupt), hold_folder(tmp_path, "a", tell):
            pass
    assert told[0].startswith(f"waiting for process {holder.pid} on another (since ")
    assert told[1].startswith("waiting for another process, which works in ")
    assert all(text.endswith(f"(if it is gone, delete {tmp_path / '.lock'})") for text in told)


def test_the_note_of_a_process_that_is_gone_refuses_nobody(tmp_path, monkeypatch):
    """It lies there until the next holder has written its own."""
    locks._write_holder(tmp_path, "a")
    assert locks._read_holder(tmp_path)["pid"] == os.getpid()
    monkeypatch.setattr(locks, "is_alive", lambda pid: False)
    assert locks._read_holder(tmp_path) == {}
    (tmp_path / HOLDER).write_text("[")
    assert locks._read_holder(tmp_path) == {}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_locks_are_refused_the_work_goes_on_with_a_warning(tmp_path, monkeypatch, command_line, number):
    """NFS without its lock service ended every command with a traceback; ENOSYS is Lustre mounted without locks."""
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    words = ["run", "synthetic_digits", "--out", tmp_path / "run"]
    words += [part for text in QUICK for part in ("--set", text)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        done = command_line(*words)
    assert done.returncode == 0, done.stderr
    if number == errno.ENOSYS:
        assert "falling back to SoftFileLock" in "".join(str(warning.message) for warning in caught)
        assert "refuses locks" not in done.stderr
    else:
        assert done.stderr.count("warning: ") == 1
        assert (
            f"warning: the file system of {tmp_path / 'run'} refuses locks ({os.strerror(number)}), so a second "
            "process there is not noticed; run only one command at a time in the folder.\n"
        ) in done.stderr
    assert not (tmp_path / "run" / HOLDER).exists()


def test_other_errors_of_the_lock_are_not_taken_for_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.EIO, "")))
    with pytest.raises(OSError, match="Errno 5"), hold_folder(tmp_path, "a", print):
        pass


def start(folder, *more):
    command = [sys.executable, "-m", "braindecode_vis", "run", "synthetic_digits", "--out", str(folder)]
    command += [part for text in (*QUICK, *more) for part in ("--set", text)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_readers_of_a_folder_that_is_written_see_a_whole_run_or_are_told(tmp_path):
    """Two processes run it, one with other settings is refused, and everybody else reads meanwhile."""
    folder = tmp_path / "run"
    whole = tmp_path / "whole"
    run_all(open_run(read_config("synthetic_digits", QUICK), whole))
    first = start(folder)
    while not (folder / HOLDER).is_file() and first.poll() is None:
        time.sleep(0.02)
    second, other = start(folder), start(folder, "seed=5")
    seen = set()
    while any(process.poll() is None for process in (first, second, other)):
        for read in (
            audit_run,
            open_finished,
            read_scores,
            lambda path: compare_runs([whole, path], n_boot=20),
        ):
            if read.__name__ == "<lambda>" and not (folder / "scores.json").is_file():
                continue  # it would compute what is missing
            try:
                read(folder)
                seen.add("read")
            except BraindecodeVisError as error:
                seen.add(str(error))
    errors = [process.communicate()[1] for process in (first, second, other)]
    assert [process.returncode for process in (first, second, other)] == [0, 0, 2], errors
    assert "waiting for process" in errors[1]
    assert "computed" not in errors[1]
    assert "which runs other settings" in errors[2]
    assert "Traceback" not in "".join(errors)
    assert "read" in seen
    assert not [sentence for sentence in seen if "\n" in sentence]
    assert not list(folder.rglob(".tmp-*"))
    assert read_scores(folder) == read_scores(whole)
    assert isinstance(open_finished(folder).listener, SilentListener)
    assert Path(folder / "config.yaml").read_text()


def test_a_folder_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    """Somebody else's results on a shared disk; what is missing in them is not computed."""
    rng = np.random.default_rng(0)
    pictures = rng.random((12, 4, 4))
    data = bdv.from_arrays(pictures.reshape(12, -1) @ rng.random((16, 9)), images=pictures)
    quick = {"evaluation.n_bootstrap": 100, "evaluation.n_permutations": 100}
    scores = bdv.decode(data, split=3, out=tmp_path / "run", settings=quick).scores
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(os, "access", lambda *_: False)
    run = bdv.open_run(tmp_path / "run")
    assert run.scores.equals(scores)
    assert len(read_items(tmp_path / "run"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(DataError, match="cannot be written, but its stage train must be computed"):
        train(open_run(read_config(tmp_path / "run", ["encoder.alphas=[3]"]), tmp_path / "run", reading=True))
