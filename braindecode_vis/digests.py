"""Digests of whole files, and the cache that saves reading an unchanged file again.

A digest is xxh3 of 128 bits over every byte: it finds what disks, transfers and people change, and reads as fast as
the disk does. It is no proof against a forger; published checksums are sha256 (`braindecode_vis.store.hash_file`).

What was hashed once is remembered by path, size, modification time, change time and inode, in the process and in small
files below the user's cache folder. The change time cannot be set back by a copy or ``touch``, so that a file rewritten
in place is hashed again whatever its modification time says. A cache that is damaged, locked or gone costs time and
nothing else; any process may write it, and the last one wins.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from braindecode_vis.checks import DataError
from braindecode_vis.memory import describe_bytes

#: Read at once: large enough for the read-ahead of network disks, small enough for the cache of a processor.
_BLOCK_BYTES = 1 << 23
#: From here on, threads and a wait until times tell writes apart cost nothing beside the reading.
_LARGE_BYTES = 1 << 25
#: Two writes within a tick of the kernel's clock have the same times; some file systems count seconds.
_TICK_NS, _COARSE_NS = 50_000_000, 2_500_000_000
_SECONDS_UNTIL_TOLD = 3.0
#: Bounds of the cache: folders, and files of one folder.
_MAX_FOLDERS, _MAX_FILES = 4096, 20_000


class FileIdentity(NamedTuple):
    """What changes when a file does: size in bytes, both times in ns, and the inode."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class _Known:
    identity: FileIdentity
    digest: str
    read_here: bool  # in this process, and not believed from the cache
    settled: bool  # any later write must show in the times


@dataclass(frozen=True)
class VerifiedFiles:
    """How many files and bytes stand behind what a process used, and how many of them it has read for that."""

    n_files: int
    n_bytes: int
    n_files_read: int
    n_bytes_read: int

    def describe(self) -> str:
        """Return it in words.

        Examples
        --------
        >>> VerifiedFiles(3, 5_000_000, 1, 2_000_000).describe()
        'verified 3 files, 5 MB: read 1 file, 2 MB; the others have the size, times and inode of when they were read'
        """
        text = f"verified {_count(self.n_files)}, {describe_bytes(self.n_bytes)}"
        if self.n_files_read == self.n_files:
            return f"{text}: read them all"
        rest = "have the size, times and inode of when they were read"
        if not self.n_files_read:
            return f"{text}: all {rest}"
        return f"{text}: read {_count(self.n_files_read)}, {describe_bytes(self.n_bytes_read)}; the others {rest}"


def _count(n: int) -> str:
    return f"{n} file" if n == 1 else f"{n} files"


#: Of this process, by absolute path: what is known, and what was used (size in bytes, and whether it was read here).
_KNOWN: dict[Path, _Known] = {}
_USED: dict[Path, tuple[int, bool]] = {}
#: Shows progress of one long reading: is given words, and returns a context as `Listener.watch` does.
Watch = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)
_ANEW: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def hash_anew(anew: bool = True) -> Iterator[None]:
    """Read every file that is used within the block, whatever was remembered before it.

    Parameters
    ----------
    anew
        Whether to; for options that are passed on.
    """
    if not anew:
        yield
        return
    _KNOWN.clear()
    _USED.clear()
    token = _ANEW.set(True)
    try:
        yield
    finally:
        _ANEW.reset(token)


@contextmanager
def show_hashing(watch: Watch) -> Iterator[None]:
    """Show within the block how far a reading has come that takes more than a few seconds."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def digest_file(path: Path, *, read: bool = False) -> str:
    """Return 32 hex digits of all bytes of a file.

    Parameters
    ----------
    path
        A file.
    read
        Whether this process must have read the bytes itself, once; otherwise the cache is believed for a file whose
        size, times and inode are those of the time when it was hashed.

    Raises
    ------
    DataError
        If it does not exist or is no file.
    """
    return digest_files({"": path}, read=read)[""]


def digest_files(paths: Mapping[str, Path], *, read: bool = False, moves: bool = False) -> dict[str, str]:
    """Return the digest of each file under its name; large files are read side by side.

    Parameters
    ----------
    paths
        Name to file.
    read
        As for `digest_file`.
    moves
        Whether they were just written and will get their final names, see `follow_rename`: known to this process, and
        not yet to the cache.
    """
    read = read or _ANEW.get()
    found: dict[str, str] = {}
    unknown: dict[str, tuple[Path, FileIdentity]] = {}
    caches: dict[Path, dict[str, _Known]] = {}
    for name, path in paths.items():
        place = path.expanduser().absolute()
        identity = identify_file(place)
        known = _KNOWN.get(place)
        if known is None or known.identity != identity:
            folder = place.parent
            if folder not in caches:
                caches[folder] = {} if read else _read_cache(folder)
            known = caches[folder].get(place.name)
        if known is None or known.identity != identity or not known.settled or (read and not known.read_here):
            unknown[name] = (place, identity)
        else:
            _KNOWN[place] = known
            found[name] = known.digest
    for place, known in _hash_all(dict(unknown.values())).items():
        _KNOWN[place] = known
    found |= {name: _KNOWN[place].digest for name, (place, _) in unknown.items()}
    if not moves:
        _write_caches(place for place, _ in unknown.values())
        for place in (path.expanduser().absolute() for path in paths.values()):
            _USED[place] = (_KNOWN[place].identity.size, _KNOWN[place].read_here)
    return {name: found[name] for name in paths}


def follow_rename(before: Path, now: Path) -> None:
    """Carry what is known of the files below a folder to the name that the folder has by now."""
    before, now = before.absolute(), now.absolute()
    moved = {place: now / place.relative_to(before) for place in _KNOWN if before in place.parents}
    for old, new in moved.items():
        _KNOWN[new] = _KNOWN.pop(old)
    _write_caches(moved.values())


def identify_file(path: Path) -> FileIdentity:
    """Return what changes when a file does; `DataError` if it does not exist or is no file."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct the setting that names it, or fetch it.")
    about = path.stat()
    return FileIdentity(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


def count_verified() -> VerifiedFiles:
    """Return what this process has verified so far, each file once."""
    used = list(_USED.values())
    here = [size for size, read in used if read]
    return VerifiedFiles(len(used), sum(size for size, _ in used), len(here), sum(here))


def find_cache_folder() -> Path:
    """Return the user's cache folder: ``$BRAINDECODE_VIS_CACHE``, or ``braindecode_vis`` in ``$XDG_CACHE_HOME``.

    Without either, ``~/.cache/braindecode_vis``. It holds image embeddings and digests; all of it can be made again.
    """
    chosen = os.environ.get("BRAINDECODE_VIS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "braindecode_vis"


# --- reading ------------------------------------------------------------------------------------------------


class _Progress:
    """Tells how far a reading has come, once it takes longer than a few seconds."""

    def __init__(self, total: int, stack: ExitStack) -> None:
        self.total, self.done, self.stack = total, 0, stack
        self.started = time.monotonic()
        self.show: Callable[[int, int, str], None] | None = None
        self.watch = _WATCH.get()

    def tell(self) -> None:
        """Show the bytes read so far; called by the thread that opened the display."""
        if self.watch is None or time.monotonic() - self.started < _SECONDS_UNTIL_TOLD:
            return
        if self.show is None:
            self.show = self.stack.enter_context(self.watch("verifying files:"))
        words = f"{describe_bytes(self.done)} of {describe_bytes(self.total)}"
        self.show(self.done, self.total, words)


def _hash_all(files: Mapping[Path, FileIdentity]) -> dict[Path, _Known]:
    """Read files and return what is known of each, with several threads where there is much to read."""
    total = sum(identity.size for identity in files.values())
    with ExitStack() as stack:
        progress = _Progress(total, stack)
        if len(files) < 2 or total < _LARGE_BYTES:
            return {place: _hash_one(place, progress, alone=True) for place in files}
        # xxhash and reading leave the interpreter to others; disks rarely gain from more than a few readers.
        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1, len(files)))
        stack.callback(pool.shutdown, cancel_futures=True)  # an interrupt waits for no further file
        tasks = {place: pool.submit(_hash_one, place, progress, alone=False) for place in files}
        found = {}
        for place, task in tasks.items():
            while not task.done() and progress.watch is not None:
                with suppress(TimeoutError):
                    task.exception(timeout=0.5)
                progress.tell()
            found[place] = task.result()
        return found


def _hash_one(place: Path, progress: _Progress, *, alone: bool) -> _Known:
    if place.stat().st_size >= _LARGE_BYTES:
        _wait_until_settled(place)
    started, digest = time.time_ns(), xxhash.xxh3_128()
    with place.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        block = memoryview(bytearray(min(_BLOCK_BYTES, before.st_size + 1)))
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while n := file.readinto(block):
            digest.update(block[:n])
            progress.done += n
            if alone:
                progress.tell()
        after = os.fstat(file.fileno())
    identity, same = (
        FileIdentity(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        for about in (after, before)
    )
    return _Known(
        identity, digest.hexdigest(), True, identity == same and _count_unsettled(after, started) <= 0
    )


def _count_unsettled(about: os.stat_result, now_ns: int) -> int:
    """Return the ns during which another write could leave the times of a file as they are; 0 or less if none."""
    coarse = about.st_mtime_ns % 1_000_000_000 == 0 and about.st_ctime_ns % 1_000_000_000 == 0
    return max(about.st_mtime_ns, about.st_ctime_ns) + (_COARSE_NS if coarse else _TICK_NS) - now_ns


def _wait_until_settled(place: Path) -> None:
    left = _count_unsettled(place.stat(), time.time_ns())
    if 0 < left <= _TICK_NS:
        time.sleep(left / 1e9)


# --- the cache: one small file for each folder that files lie in, replaced as a whole --------------------------


def _find_cache(folder: Path) -> Path:
    return find_cache_folder() / "digests" / f"{xxhash.xxh3_128_hexdigest(bytes(folder))}.json"


def _read_cache(folder: Path) -> dict[str, _Known]:
    """Return what is remembered of the files of a folder; nothing where the cache cannot be read or is damaged."""
    try:
        content = json.loads(_find_cache(folder).read_text())
        if content["check"] != _seal(folder, content["files"]):
            return {}
        return {
            name: _Known(FileIdentity(*numbers), digest, read_here=False, settled=True)
            for name, (digest, *numbers) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        return {}


def _seal(folder: Path, files: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([str(folder), files], sort_keys=True).encode())


def _write_caches(places: Iterable[Path]) -> None:
    """Remember the files that were just hashed; what another process writes at the same time may be lost."""
    folders: dict[Path, dict[str, _Known]] = {}
    for place in places:
        if _KNOWN[place].settled:
            folders.setdefault(place.parent, {})[place.name] = _KNOWN[place]
    for folder, new in folders.items():
        kept = {name: known for name, known in _read_cache(folder).items() if name not in new}
        if len(kept) + len(new) > _MAX_FILES:
            kept = {}
        files = {name: [known.digest, *known.identity] for name, known in (kept | new).items()}
        path = _find_cache(folder)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with suppress(OSError, RuntimeError):  # read-only, full, or no home folder: hashed again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps({"check": _seal(folder, files), "files": files}))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    if folders:
        _bound_cache()


def _bound_cache() -> None:
    """Remove the folders that were not hashed for longest, once there are too many."""
    with suppress(OSError, RuntimeError):
        kept = list((find_cache_folder() / "digests").iterdir())
        if len(kept) > _MAX_FOLDERS:
            kept.sort(key=lambda path: path.stat().st_mtime)
            for path in kept[: _MAX_FOLDERS // 2]:
                path.unlink(missing_ok=True)
