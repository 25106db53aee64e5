"""Which process makes an artifact, so that others that need it wait for it instead of making it too.

A lease is a small file beside the artifact. Whoever makes the artifact holds the system's lock on it (`flock`) and
writes a number there every few seconds. The lock ends with its process, however that ends, and is what counts on one
machine and where the file system passes locks on, as NFS 4 does. Where locks stay on their node (NFS mounted with
`nolock`, Lustre with `localflock`, BeeGFS) or are refused, the number counts: as long as it changes, somebody works.
A holder whose number stands still is taken for dead, even if the lock is still held, as it is after a node of NFS 3 was
switched off. Only changes are compared, over the time of whoever waits, so that clocks need not agree.

A lease saves work and guards nothing: an artifact appears by one rename, so that two processes that both believe to
hold a lease each make the same artifact and the first one is kept.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
_REFUSED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_BYTES = 400
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
_HELD = threading.local()


class BeingMade(Exception):
    """Another process makes what was asked for, and this one does not wait."""


def is_alive(pid: int) -> bool:
    """Say whether a process of this machine is running."""
    try:
        os.kill(pid, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lock_file(number: int, *, shared: bool = False) -> bool | None:
    """Take the system's lock on an open file without waiting.

    Parameters
    ----------
    number
        Descriptor of the file.
    shared
        Whether others may hold it so at the same time.

    Returns
    -------
    locked
        False if others hold it; None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise
    return True


@contextmanager
def hold_lease(
    path: Path, is_made: Callable[[], bool], tell: Callable[[str], None], *, waits: bool = True
) -> Iterator[None]:
    """Hold a lease while the context lasts; another holder is waited for, or until what it makes is there.

    Parameters
    ----------
    path
        The file; its folder must be there.
    is_made
        Whether what the lease is for is there; asked again after waiting by whoever enters.
    tell
        Called with a sentence when the waiting begins, and once a minute.
    waits
        Whether to wait.

    Raises
    ------
    BeingMade
        If another process holds it and `waits` is false.
    """
    held: set[Path] = getattr(_HELD, "paths", set())
    _HELD.paths = held
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
    """Say whether a process seems to make what a lease is for."""
    try:
        with hold_lease(path, lambda: False, lambda sentence: None, waits=False):
            return False
    except BeingMade:
        return True


def _acquire(path: Path, is_made: Callable[[], bool], tell: Callable[[str], None], waits: bool) -> int | None:
    """Return an open file that holds the lease; None where no lease can be had, or what it is for is there."""
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
                    tell(f"waiting for {describe_holder(holder)}{job}, which makes it")
        finally:
            if number >= 0:
                os.close(number)
        if last is not None:
            if is_made():
                return None
            time.sleep(_POLL_S)


def _has_ended(holder: dict[str, Any], locked: bool | None) -> bool:
    """Say whether a holder of this machine is gone; its lock on this machine says so, or else its number."""
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
    """Return who holds a lease or a lock, in words; nothing may be known of it."""
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
