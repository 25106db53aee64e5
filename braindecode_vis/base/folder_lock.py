"""One process at a time works in a run folder; others with the same settings wait and share, others are refused.

The lock is the system's own (`flock`, through filelock): it ends with the process that holds it, however that ends,
and holds across machines where the file system passes it on, as NFS 4 does. Where there is none, filelock marks the
file itself; where it is refused, as NFS without its lock service does, a warning says so and the work goes on, since
what is finished appears by renames. Beside it lies a note on who holds it, for whoever waits. Readers take no lock.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from braindecode_vis.base import leases, store
from braindecode_vis.base.checks import ConfigError, Notice

LOCK = ".lock"
#: Who holds the lock; left behind by a process that was killed, and then of no meaning.
HOLDER = ".lock-holder.json"
_POLL_S = 0.25
_SECONDS_A_LINE = 60.0
_REFUSED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
#: Folders that this process holds: a stage asks within a stage, perhaps in another thread.
_HELD: set[Path] = set()
#: Those of them that no other process can hold.
_LOCKED: set[Path] = set()


def is_locked(folder: Path) -> bool:
    """Return whether no other process can work in a folder: only then may a file there be written in place."""
    return folder.resolve() in _LOCKED


@contextmanager
def hold_folder(folder: Path, settings: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a run folder while the context lasts; wait for another process with the same settings.

    Parameters
    ----------
    folder
        Run folder, which is there.
    settings
        Digest of what decides the results that are written.
    tell
        Called with a sentence when the waiting begins, and once a minute.

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
    if key in _HELD:
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
                f"the file system of {folder} refuses locks ({os.strerror(error.errno)}), so a second process there "
                "goes unnoticed; let one command at a time work in the folder.",
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
                f"waiting for {_describe(holder)}, which works in {folder} with the same settings; what it makes is "
                f"shared{'' if seen else f' (if it is gone, delete {folder / LOCK})'}"
            )
        time.sleep(_POLL_S)
    _HELD.add(key)
    if lock.is_locked:
        _LOCKED.add(key)
    try:
        _write_holder(folder, settings)
        yield
    finally:
        _HELD.discard(key)
        _LOCKED.discard(key)
        with suppress(OSError):
            (folder / HOLDER).unlink()
        lock.release()


def _write_holder(folder: Path, settings: str) -> None:
    about: dict[str, Any] = {
        "host": platform.node(), "pid": os.getpid(), "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": store.describe_command(), "settings": settings,
    }  # fmt: skip
    store.write_json(folder / HOLDER, about)


def _read_holder(folder: Path) -> dict[str, Any]:
    """Return who holds the lock; empty if the note is damaged, or of a process that is gone."""
    try:
        about = json.loads((folder / HOLDER).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    keys = ("host", "pid", "since", "command", "settings")
    if not isinstance(about, dict) or not all(key in about for key in keys):
        return {}
    gone = about["host"] == platform.node() and not (
        isinstance(about["pid"], int) and leases.is_alive(about["pid"])
    )
    return {} if gone else about


def _describe(holder: dict[str, Any]) -> str:
    since = f" (since {holder['since']}: {holder['command']})" if holder else ""
    return f"{leases.describe_holder(holder)}{since}"
