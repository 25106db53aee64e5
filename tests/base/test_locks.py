"""Of processes that need one artifact at once, one makes it; a holder that is gone holds nobody up."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import filelock
import pytest

from braindecode_vis.base import locks
from braindecode_vis.base.locks import BeingMade, hold_lease, is_leased
from braindecode_vis.base.store import RunFolder


def take(path, waits=True, said=None):
    return hold_lease(path, lambda: False, [].append if said is None else said.append, waits=waits)


def write_holder(path, host="elsewhere", pid=1, beat=0, job=""):
    path.touch()
    with path.open("r+b") as file:  # in place, as a holder does
        file.write(json.dumps({"host": host, "pid": pid, "beat": beat, "job": job}).ljust(400).encode())


def test_two_that_ask_at_once_make_an_artifact_once(tmp_path):
    made, found, said, waiting = [], [], [], threading.Semaphore(0)

    def compute(folder):
        made.append(folder)
        for _ in range(2):  # until the two others say that they wait; who makes it twice waits in vain
            waiting.acquire(timeout=2)
        (folder / "number.txt").write_text("1")

    def ask():
        folder = RunFolder(tmp_path)
        tell = lambda words: (said.append(words), waiting.release())  # noqa: E731
        asked = {"version": 1, "fields": {}, "upstream": {}, "compute": compute, "tell": tell}
        found.append(folder.produce("train", **asked))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(artifact.reused for artifact in found) == [False, True, True]
    # Whoever asks between the lock and the first beat does not know yet whose it is.
    assert said[0].startswith(
        (f"waiting for process {os.getpid()} of this machine", "waiting for another process")
    )
    assert not list((tmp_path / "stages").rglob(".*"))
    killed = found[0].path.with_name(f".lease-{found[0].path.name}")
    killed.touch()
    ask()
    assert not killed.exists()


def test_who_does_not_wait_goes_on_with_something_else(tmp_path):
    path = tmp_path / ".lease-a"
    with take(path):
        with take(path):  # a stage may ask for itself again
            pass
        found = []
        thread = threading.Thread(target=lambda: found.append(is_leased(path)))
        thread.start()
        thread.join()
        assert found == [True]
    assert not is_leased(path)
    assert not path.exists()


def test_a_holder_that_was_killed_is_followed_at_once(tmp_path):
    path = tmp_path / ".lease-a"
    code = (
        "import sys, time, pathlib\nfrom braindecode_vis.base.locks import hold_lease\n"
        "with hold_lease(pathlib.Path(sys.argv[1]), lambda: False, print):\n print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(BeingMade), take(path, waits=False):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with take(path, waits=False):
        pass


def test_a_link_in_the_place_of_a_lease_is_not_followed(tmp_path):
    """A run folder that came from somebody else had its links written to."""
    own, path = tmp_path / "own.txt", tmp_path / ".lease-a"
    own.write_text("mine")
    path.symlink_to(own)
    with take(path):
        pass
    (tmp_path / ".lease-b").mkdir()
    with take(tmp_path / ".lease-b"):
        pass
    assert own.read_text() == "mine"
    assert path.is_symlink()


@pytest.fixture
def clock(monkeypatch):
    """A clock that waiting alone moves; `beat` is called after each wait."""
    made = SimpleNamespace(now=0.0, beat=lambda: None)

    def sleep(seconds):
        made.now += seconds
        made.beat()

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=sleep))
    return made


def test_where_locks_stay_on_their_node_the_number_counts(tmp_path, clock):
    """No lock is held here, and no time of the file counts: whether the number changes is all."""
    path, said = tmp_path / ".lease-a", []
    write_holder(path, job="train-0")
    os.utime(path, (2e9, 2e9))  # the other clock is years ahead

    def beat():
        if clock.now < 30:
            write_holder(path, beat=int(clock.now / locks.BEAT_S), job="train-0")

    clock.beat = beat
    with take(path, said=said):
        assert (
            25 + locks._STILL_S < clock.now < 26 + locks._STILL_S
        )  # the number changed at 25 s for the last time
    assert said == ["waiting for process 1 on elsewhere (job train-0), which is making it"]


def test_a_lock_that_a_dead_node_still_holds_is_left_behind(tmp_path, clock):
    path = tmp_path / ".lease-a"
    with path.open("w+b") as other:
        locks.fcntl.flock(other, locks.fcntl.LOCK_EX)
        write_holder(path)
        with take(path):
            assert locks._SILENT_S < clock.now < locks._SILENT_S + 1
    assert not path.exists()


def test_filelock_waits_for_ever_for_a_lease_that_a_kill_left_empty(tmp_path):
    """Why our leases stay, as the header of `locks` says; if this fails, filelock's may be tried again."""
    lease = getattr(filelock, "SoftFileLease", None)
    if lease is None:
        pytest.skip("filelock before 3.30 has no leases")
    path = tmp_path / ".lease-a"
    path.touch()
    with pytest.raises(filelock.Timeout):
        lease(path, lease_duration=0.05).acquire(timeout=0.5)
    with take(path, waits=False):
        pass


def test_a_disk_without_locks_has_leases_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    path = tmp_path / ".lease-a"
    with take(path):
        monkeypatch.setattr(locks._LEASES, "paths", set())
        assert is_leased(path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    write_holder(path, host=locks.platform.node(), pid=dead.pid)
    with take(path, waits=False):
        pass


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system lists no states of processes")  # noqa: PTH110
def test_a_process_that_was_killed_has_ended_before_its_parent_asks(tmp_path):
    """What a killed worker had begun stayed for ever where another worker made the same before the kill was noticed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "print('there', flush=True); input()"], stdin=-1, stdout=-1
    )
    assert holder.stdout.readline() == b"there\n"
    assert locks.is_alive(holder.pid)
    assert locks.is_alive(1)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays listed
    os.kill(holder.pid, 0)
    assert not locks.is_alive(holder.pid)
    holder.communicate()
    assert not locks.is_alive(holder.pid)
