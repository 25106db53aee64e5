"""Locks: only one process works in a run folder at a time, and only one makes an artifact while others wait.

The lock of a folder (`hold_folder`) is a system lock (`flock`, through filelock). It is released when its process ends,
for any reason, and works across machines if the file system supports it, as NFS 4 does. Without system locks, filelock
marks the file itself. If locks are refused, as on NFS without its lock service, a warning says so and the work
continues, since finished results appear by renames. A note beside the lock says who holds it: processes with the same
settings wait and share the results, others are refused. Readers take no lock.

A lease (`hold_lease`) is a small file beside the artifact. The process that makes the artifact holds a system lock on
it and writes a number into it every few seconds. The lock decides on one machine and if the file system shares locks
between machines. If locks stay on their node (NFS mounted with `nolock`, Lustre with `localflock`, BeeGFS) or are
refused, the number decides: while it changes, the process is working. A holder whose number does not change is treated
as dead, even if the lock is still held, as happens after a node of NFS 3 is switched off. Only changes are compared,
over the time of the waiting process, so that clocks need not agree.

A lease only avoids double work. An artifact appears by one rename, so if two processes both hold a lease, each makes
the same artifact and the first one is kept.

filelock's `SoftFileLease` was tried instead. It waits forever for a lease that a kill or a power cut left empty,
cannot show the job of a holder, makes another node wait for one lease length in both cases above, and compares clocks
before its release 4.1. With these features added, the code was not shorter.

All processes of a user share one cache folder (`find_cache_folder`).
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from braindecode_vis.base.checks import ConfigError, Notice

try:
    import fcntl
except ImportError:  # Windows: the numbers alone count there
    fcntl = None  # type: ignore[assignment]

#: Begins the name of a lease; hidden, so that no listing of artifacts shows it.
LEASE = ".lease-"
#: How often a holder writes that it works.
BEAT_S = 5.0
#: How long a number must stand still where nobody holds the lock, and where somebody does: numerical libraries may
#: keep a thread from writing for a while.
_STILL_S, _SILENT_S = 3 * BEAT_S, 120.0
_POLL_S = 0.2
_SECONDS_A_LINE = 60.0
_REFUSED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_BYTES = 400
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
#: Files of a folder that is held: the lock, and who holds it; left behind by a process that was killed, and then of no
#: meaning.
LOCK, HOLDER = ".lock", ".lock-holder.json"
#: Folders that this process holds: a stage asks within a stage, perhaps in another thread.
_FOLDERS: set[Path] = set()
#: Those of them that no other process can hold.
_LOCKED: set[Path] = set()
#: Leases that this thread holds.
_LEASES = threading.local()


class BeingMade(Exception):
    """Another process is making the requested artifact, and this one does not wait."""


def is_alive(pid: int) -> bool:
    """Say whether a process of this machine is running; one that has ended may still be listed (a zombie)."""
    try:
        os.kill(pid, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # Whoever started it has not asked for its end yet, and the first process of a container may never do so.
    with suppress(OSError, ValueError, IndexError):  # where the system says so
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def lock_file(number: int, *, shared: bool = False) -> bool | None:
    """Take the system lock on an open file without waiting.

    Parameters
    ----------
    number
        Descriptor of the file.
    shared
        Whether other processes may hold a shared lock at the same time.

    Returns
    -------
    locked
        False if others hold it; None if there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Two more than filelock passes on: it marks the file itself where locks do not exist.
        if error.errno in (*_REFUSED, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


@contextmanager
def hold_lease(
    path: Path, is_made: Callable[[], bool], tell: Callable[[str], None], *, waits: bool = True
) -> Iterator[None]:
    """Hold a lease while the context lasts; wait until another holder has ended or the artifact exists.

    Parameters
    ----------
    path
        The file; its folder must exist.
    is_made
        Function that says whether the artifact exists; called again after waiting.
    tell
        Function that gets a sentence when the waiting begins, and once a minute.
    waits
        Whether to wait.

    Raises
    ------
    BeingMade
        If another process holds it and `waits` is false.
    """
    held: set[Path] = getattr(_LEASES, "paths", set())
    _LEASES.paths = held
    if path in held:
        yield
        return
    number = _acquire(path, is_made, tell, waits)
    if number is None:
        yield
        return
    held.add(path)
    ended = threading.Event()
    _write_beat(number, 0)
    beating = threading.Thread(target=_beat, args=(number, ended), daemon=True, name="lease")
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        held.discard(path)
        with suppress(OSError):  # one that was taken for dead finds the file of whoever followed
            if os.fstat(number).st_ino == path.stat().st_ino:
                path.unlink()
        os.close(number)  # after the file is gone, so that whoever opens it meets a holder or a new file


def is_leased(path: Path) -> bool:
    """Say whether a process seems to be making the artifact of a lease."""
    try:
        with hold_lease(path, lambda: False, lambda sentence: None, waits=False):
            return False
    except BeingMade:
        return True


def _acquire(path: Path, is_made: Callable[[], bool], tell: Callable[[str], None], waits: bool) -> int | None:
    """Return an open file that holds the lease; None if no lease is possible, or if the artifact exists."""
    seen, since, last = b"", time.monotonic(), None
    while True:
        try:
            number = os.open(path, _FLAGS, 0o666)
        except OSError as error:
            # Of another user, who lets nobody write: both may make it. A link, in a folder that came from elsewhere,
            # may lead to any file.
            if isinstance(error, PermissionError | IsADirectoryError) or error.errno == errno.ELOOP:
                return None
            raise
        try:
            locked = lock_file(number)
            with suppress(FileNotFoundError):
                if os.fstat(number).st_ino != path.stat().st_ino:
                    raise FileNotFoundError
                said = os.pread(number, _BYTES, 0)
                holder = _read(said)
                if said != seen:
                    seen, since = said, time.monotonic()
                still = time.monotonic() - since
                if locked is not False and (not holder or _has_ended(holder, locked) or still > _STILL_S):
                    kept, number = number, -1
                    return kept
                if still > _SILENT_S:
                    path.unlink()
                    continue
                if not waits:
                    raise BeingMade
                if last is None or time.monotonic() - last >= _SECONDS_A_LINE:
                    last = time.monotonic()
                    job = f" (job {str(holder['job'])[:80]})" if holder.get("job") else ""
                    tell(f"waiting for {describe_holder(holder)}{job}, which is making it")
        finally:
            if number >= 0:
                os.close(number)
        if last is not None:
            if is_made():
                return None
            time.sleep(_POLL_S)


def _has_ended(holder: dict[str, Any], locked: bool | None) -> bool:
    """Say whether a holder on this machine has ended, by its lock or else by its process number."""
    return holder["host"] == platform.node() and (locked is True or not is_alive(holder["pid"]))


def _read(said: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(said)
    except ValueError:
        return {}
    right = (
        isinstance(holder, dict) and isinstance(holder.get("host"), str) and type(holder.get("pid")) is int
    )
    return holder if right else {}


def describe_holder(holder: dict[str, Any]) -> str:
    """Describe who holds a lease or a lock, even if nothing is known about it."""
    if not holder:
        return "another process"
    here = " of this machine" if holder["host"] == platform.node() else f" on {holder['host']}"
    return f"process {holder['pid']}{here}"


def _beat(number: int, ended: threading.Event) -> None:
    n = 0
    while not ended.wait(BEAT_S):
        n += 1
        _write_beat(number, n)


def _write_beat(number: int, n: int) -> None:
    about = {
        "host": platform.node(),
        "pid": os.getpid(),
        "job": os.environ.get("BRAINDECODE_VIS_JOB", "")[:80],
        "beat": n,
    }
    with suppress(OSError):  # a full disk takes no lease from anyone
        os.pwrite(number, json.dumps(about).ljust(_BYTES)[:_BYTES].encode(), 0)
        os.fsync(number)  # another node of NFS sees it from then on


def is_locked(folder: Path) -> bool:
    """Return whether this process has locked a folder: only then may a file there be changed in place."""
    return folder.resolve() in _LOCKED


@contextmanager
def hold_folder(folder: Path, settings: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a run folder while the context lasts; wait for another process with the same settings.

    Parameters
    ----------
    folder
        Run folder, which must exist.
    settings
        Digest of the settings that determine the results.
    tell
        Function that gets a sentence when the waiting begins, and once a minute.

    Raises
    ------
    ConfigError
        If a process with other settings works there.

    Warns
    -----
    Notice
        If the file system refuses locks: the folder is then not held.
    """
    import filelock

    key = folder.resolve()
    if key in _FOLDERS:
        yield
        return
    lock = filelock.FileLock(folder / LOCK)
    last: float | None = None
    before: dict[str, Any] = {}
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            holder = _read_holder(folder)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            warnings.warn(
                f"the file system of {folder} refuses locks ({os.strerror(error.errno)}), so a second "
                "process there is not noticed; run only one command at a time in the folder.",
                Notice,
                stacklevel=3,
            )
            break
        # Seen twice, since for a moment the note may still be that of a process that was killed.
        if holder and holder == before and holder["settings"] != settings:
            raise ConfigError(
                f"{folder} is in use by {_describe(holder)}, which runs other settings; wait until it has ended, or "
                "choose another folder with --out."
            )
        known = not holder or holder["settings"] == settings
        before = holder
        if known and (last is None or time.monotonic() - last >= _SECONDS_A_LINE):
            last = time.monotonic()
            # One that runs on this machine holds the lock rightly, and two would write if the file were deleted.
            seen = bool(holder) and holder["host"] == platform.node()
            tell(
                f"waiting for {_describe(holder)}, which works in {folder} with the same settings; its "
                f"results are shared{'' if seen else f' (if it is gone, delete {folder / LOCK})'}"
            )
        time.sleep(_POLL_S)
    _FOLDERS.add(key)
    if lock.is_locked:
        _LOCKED.add(key)
    try:
        _write_holder(folder, settings)
        yield
    finally:
        _FOLDERS.discard(key)
        _LOCKED.discard(key)
        with suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _write_holder(folder: Path, settings: str) -> None:
    about: dict[str, Any] = {
        "host": platform.node(), "pid": os.getpid(), "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": describe_command(), "settings": settings,
    }  # fmt: skip
    # A new file, never what lies there: a link in a folder that came from elsewhere may lead to any file. Where locks
    # are refused, two may write at once, and one note is enough.
    (folder / HOLDER).unlink(missing_ok=True)
    with suppress(FileExistsError), (folder / HOLDER).open("x") as note:
        json.dump(about, note, indent=2)


def describe_command() -> str:
    """Return the command line of this process as a user would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["braindecode-vis" if name in ("__main__.py", "-c") else name, *sys.argv[1:]])


def _read_holder(folder: Path) -> dict[str, Any]:
    """Return who holds the lock; empty if the note is damaged, or if its process has ended."""
    try:
        about = json.loads((folder / HOLDER).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    keys = ("host", "pid", "since", "command", "settings")
    if not isinstance(about, dict) or not all(key in about for key in keys):
        return {}
    gone = about["host"] == platform.node() and not (isinstance(about["pid"], int) and is_alive(about["pid"]))
    return {} if gone else about


def _describe(holder: dict[str, Any]) -> str:
    since = f" (since {holder['since']}: {holder['command']})" if holder else ""
    return f"{describe_holder(holder)}{since}"


def find_cache_folder() -> Path:
    """Return the user's cache folder: ``$BRAINDECODE_VIS_CACHE``, or ``braindecode_vis`` in ``$XDG_CACHE_HOME``.

    Without either, ``~/.cache/braindecode_vis``. It holds image embeddings, digests and files of servers; all of it can
    be made again.
    """
    chosen = os.environ.get("BRAINDECODE_VIS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "braindecode_vis"
