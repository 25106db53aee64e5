"""What the command says when a signal or the system ends it: one sentence, and a folder from which it goes on."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from braindecode_vis.cli.failures import describe_failure, stop_cleanly
from tests.test_cli import SMALL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_cleanly(tmp_path, number):
    """Clusters send SIGTERM, which once ended the process on the spot and left temporary folders behind."""
    network = "encoder={kind: network, epochs: 100000, batch_size: 16, checkpoint_seconds: 0}"
    command = [sys.executable, "-m", "braindecode_vis", "train", "synthetic_digits", "--out", tmp_path]
    command += [*SMALL, "--set", network]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("work/*/checkpoint.safetensors")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == (
        f"error: stopped by {number.name}; finished stages are kept: run the same command again, and it goes on from "
        "there."
    )
    assert not list(tmp_path.rglob(".tmp-*"))
    # From here a second call goes on, as after the power was cut (tests/test_pipeline.py).
    assert list(tmp_path.glob("work/*/checkpoint.safetensors"))


def test_a_repeated_sigterm_leaves_time_for_cleaning_up_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_cleanly() as stops:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.exit_code == 143
        stops.since -= 60  # the first was lost on its way
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_ignored_stays_ignored():
    """``nohup`` starts programs so that they outlive their terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_cleanly() as stops:
            os.kill(os.getpid(), signal.SIGINT)
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


def test_a_fault_of_ours_keeps_its_traceback():
    assert describe_failure(KeyError("name")) == ""
    assert describe_failure(OSError("something")) == ""
