"""Digests of whole files, and a cache that avoids reading an unchanged file again.

A digest is xxh3 with 128 bits over every byte. It detects changes by disks, transfers and people, and is as fast as
reading the disk. It does not protect against deliberate forgery; published checksums are sha256
(`braindecode_vis.base.store.hash_file`), and weights are identified by sha256, which is remembered too.

What was hashed once is remembered by path, size, modification time, change time and inode, in the process and in small
files below the user's cache folder. The change time cannot be set back by a copy or ``touch``, so that a file rewritten
in place is hashed again, even if its modification time is unchanged. A damaged, locked or missing cache only costs
time; any process may write it, and the last one wins.

A file on a server is not downloaded for its digest: the version that the server reports (ETag, or time, and size) is
used in place of the bytes, and `VerifiedFiles` reports this.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.locks import find_cache_folder
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.remote import RemotePath, describe_reading, forget_listings

#: Read at once: large enough for the read-ahead of network disks, small enough for the cache of a processor.
_BLOCK_BYTES = 1 << 23
#: From here on, threads and a wait until times tell writes apart cost nothing beside the reading.
_LARGE_BYTES = 1 << 25
#: Two writes within a tick of the kernel's clock have the same times; some file systems count seconds.
_TICK_NS, _COARSE_NS = 50_000_000, 2_500_000_000
_SECONDS_UNTIL_TOLD = 3.0
#: Bounds of the cache: folders, and files of one folder beyond those that a process uses.
_MAX_FOLDERS, _MAX_FILES = 4096, 20_000


class FileIdentity(NamedTuple):
    """Properties that change when a file changes: size in bytes, both times in ns, and the inode."""

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
    sha256: str = ""  # where it was asked for


@dataclass(frozen=True)
class VerifiedFiles:
    """How many files and bytes a process used, and how many of them it has read itself.

    Files on servers (`n_remote`) are counted separately: their bytes were not read, the server was asked for their
    version.
    """

    n_files: int
    n_bytes: int
    n_files_read: int
    n_bytes_read: int
    n_remote: int = 0

    def describe(self) -> str:
        """Return it in words.

        Examples
        --------
        >>> VerifiedFiles(3, 5_000_000, 1, 2_000_000).describe()
        'verified 3 files, 5 MB: read 1 file, 2 MB; the others have the size, times and inode of when they were read'
        """
        here = f"{_count(self.n_files)}, {describe_bytes(self.n_bytes)}"
        rest = "have the size, times and inode of when they were read"
        if self.n_files_read == self.n_files:
            here = f"{here}: read them all"
        elif not self.n_files_read:
            here = f"{here}: all {rest}"
        else:
            read = f"{_count(self.n_files_read)}, {describe_bytes(self.n_bytes_read)}"
            here = f"{here}: read {read}; the others {rest}"
        there = f"{_count(self.n_remote)} on servers by what they say of them: ETag or time, and size"
        if not self.n_remote:
            return f"verified {here}"
        return f"verified {here}; and {there}" if self.n_files else f"verified {there}"


def _count(n: int) -> str:
    return f"{n} file" if n == 1 else f"{n} files"


#: Of this process, by absolute path: what is known, and what was used (size in bytes, and whether it was read here).
#: Texts and no `Path`: of tens of thousands of pictures, these take longer to make than the files to look at.
_KNOWN: dict[str, _Known] = {}
_USED: dict[str, tuple[int, bool]] = {}
_REMOTE: set[str] = set()  # addresses whose version was asked for
_SOUND: dict[str, dict[str, FileIdentity]] = {}  # by folder: files that were found as its record says
#: Shows progress of one long reading: is given words, and returns a context as `Listener.watch` does.
Watch = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)
_ANEW: ContextVar[bool] = ContextVar("anew", default=False)


@contextmanager
def hash_anew(anew: bool = True) -> Iterator[None]:
    """Read every file that is used within the block, even if its digest is remembered.

    Parameters
    ----------
    anew
        Whether to read them; for options that are passed on.
    """
    if not anew:
        yield
        return
    _KNOWN.clear()
    _USED.clear()
    _REMOTE.clear()
    _SOUND.clear()
    forget_listings()
    token = _ANEW.set(True)
    try:
        yield
    finally:
        _ANEW.reset(token)


@contextmanager
def show_hashing(watch: Watch) -> Iterator[None]:
    """Show within the block the progress of reading that takes more than a few seconds."""
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
        Whether this process must have read the bytes itself, once; otherwise the cache is trusted for a file whose
        size, times and inode are those of the time when it was hashed.

    Raises
    ------
    DataError
        If it does not exist or is not a file.
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
        Whether the files were just written and will get their final names later, see `follow_rename`: then only this
        process remembers them, not the cache.
    """
    remote = {name: path for name, path in paths.items() if isinstance(path, RemotePath)}
    told = dict(zip(remote, _ask_versions(list(remote.values())), strict=True))
    places = {name: _locate(path) for name, path in paths.items() if name not in remote}
    found = _know(_group(places.values()), read=read, moves=moves)
    return {name: told[name] if name in told else found[places[name]].digest for name in paths}


def _ask_versions(paths: Sequence[RemotePath]) -> list[str]:
    """Return a digest of each file's version on the server; a server whose listing has no sizes is asked for each."""
    if not paths:
        return []
    if paths[0].parts[0] == "s3:":  # its lists tell the version
        told = list(map(_describe_reading, paths))
    else:
        with ThreadPoolExecutor(16) as pool:
            told = list(pool.map(_describe_reading, paths))
    _REMOTE.update(map(str, paths))
    return [xxhash.xxh3_128_hexdigest(f"remote, {text}".encode()) for text in told]


def _describe_reading(path: RemotePath) -> str:
    try:
        return describe_reading(path)
    except OSError:
        raise DataError(f"{path} does not exist; correct the setting that names it.") from None


def digest_folder(folder: Path, names: Sequence[str]) -> str:
    """Return one digest of the names and bytes of some files below a folder, of which there may be tens of thousands.

    They are remembered together, so that a later call only needs the properties of each file.

    Parameters
    ----------
    folder
        The folder.
    names
        Paths relative to it, in an order that does not depend on the disk. An entry that is not a file, such as a link
        to a file that was not fetched, counts by its name.
    """
    digest = xxhash.xxh3_128()
    if isinstance(folder, RemotePath):
        versions = _ask_versions([folder / name for name in names])
        for name, version in zip(names, versions, strict=True):
            digest.update(f"{name}\0{version}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
    top = _locate(folder)
    found = _know({top: [name for name in names if os.path.isfile(f"{top}/{name}")]})  # noqa: PTH113 (speed)
    for name in names:
        known = found.get(f"{top}/{name}")
        digest.update(f"{name}\0{known.digest if known else ''}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def hash_once(path: Path) -> str:
    """Return the sha256 of a file, remembered like its digest; weights of many gigabytes are identified by it.

    Raises
    ------
    DataError
        If it does not exist or is not a file.
    """
    place = _locate(path)
    return _know(_group([place]), sha256=True)[place].sha256


def remember_digest(settings: Any, name: str) -> None:
    """Write the digest of the file at the path ``NAME`` into the setting ``NAME_digest``, if the file exists.

    Raises
    ------
    ValueError
        If the settings hold another digest, or a digest without a file.
    """
    key = f"{name}_digest"
    path, known = getattr(settings, name), getattr(settings, key)
    if path is None and known is not None:
        raise ValueError(f"{key} is the digest of the file in {name}, but {name} is not given")
    if path is None or not (path := path.expanduser()).is_file():
        return
    digest = hash_once(path)
    if known not in (None, digest):
        raise ValueError(
            f"the content of {path} has the digest {digest}, but {key} is {known}: it is another file, "
            "or it changed; put the file back, move it away (fitted components do not need it), or "
            f"leave {key} out to train again"
        )
    settings.__dict__[key] = digest  # the model is frozen for everybody else


def _locate(path: Path) -> str:
    return path.expanduser().absolute().as_posix()


def _know(
    folders: Mapping[str, Sequence[str]], *, read: bool = False, moves: bool = False, sha256: bool = False
) -> dict[str, _Known]:
    """Return what is known about files by their absolute paths; unknown files are read first.

    Parameters
    ----------
    folders
        Folder of a cache to the names of its files relative to the folder.
    read, moves
        As for `digest_files`.
    sha256
        Whether the sha256 is needed too.
    """
    read = read or _ANEW.get()
    found: dict[str, _Known] = {}
    unknown: dict[str, int] = {}  # and its size
    cached_in: dict[str, str] = {}
    for folder, names in folders.items():
        cache: dict[str, _Known] | None = {} if read else None
        for name in names:
            place = f"{folder}/{name}"
            identity, known = identify_file(place), _KNOWN.get(place)
            if known is None or known.identity != identity or (sha256 and not known.sha256):
                cache = _read_cache(folder) if cache is None else cache
                known = cache.get(name, known)
            if (
                known is None or known.identity != identity or not known.settled
                or (read and not known.read_here) or (sha256 and not known.sha256)
            ):  # fmt: skip
                unknown[place], cached_in[place] = identity.size, folder
            else:
                found[place] = known
    found |= _hash_all(unknown, sha256=sha256)
    _KNOWN.update(found)
    if not moves:
        _write_caches(cached_in, keep=found)
        _USED.update((place, (known.identity.size, known.read_here)) for place, known in found.items())
    return found


def _group(places: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of files by the folder that they lie in."""
    grouped: dict[str, list[str]] = {}
    for place in dict.fromkeys(places):
        folder, _, name = place.rpartition("/")
        grouped.setdefault(folder, []).append(name)
    return grouped


def follow_rename(before: Path, now: Path) -> None:
    """Transfer what is known about the files below a folder to its new name."""
    old, new = f"{_locate(before)}/", f"{_locate(now)}/"
    moved = {place: new + place.removeprefix(old) for place in _KNOWN if place.startswith(old)}
    for place, there in moved.items():
        _KNOWN[there] = _KNOWN.pop(place)
    _write_caches({place: place.rpartition("/")[0] for place in moved.values()})


def follow_link(before: FileIdentity, names: Iterable[Path], link: Path) -> None:
    """Keep what is known about a file after a new link has changed its change time, under all its names.

    Otherwise other runs would read it again. A file that was changed after it was hashed is read again: its change time
    before the link, or its modification time now, is different.

    Parameters
    ----------
    before
        Identity of the file just before the link was made.
    names
        Names of the file; names of other files are ignored.
    link
        The new one.
    """
    now = identify_file(link)
    if now != before._replace(ctime_ns=now.ctime_ns):
        return
    _wait_until_settled(_locate(link))
    if _count_unsettled(link.stat(), time.time_ns()) > 0:
        return  # of a file system that counts seconds: another write could leave the times as they are
    moved: dict[str, str] = {}
    for name in names:
        place = _locate(name)
        folder = place.rpartition("/")[0]
        known = _KNOWN.get(place)
        if known is None or known.identity != before:
            known = _read_cache(folder).get(name.name)
        with suppress(DataError):  # the file is gone
            if known and known.settled and known.identity == before and identify_file(place) == now:
                _KNOWN[place] = _KNOWN[_locate(link)] = replace(known, identity=now)
                moved[place] = folder
    _write_caches(moved)


def identify_file(path: Path | str) -> FileIdentity:
    """Return the identity of a file; `DataError` if it does not exist or is not a file."""
    with suppress(OSError, ValueError):
        about = os.stat(path)  # noqa: PTH116 (speed)
        if stat.S_ISREG(about.st_mode):
            return _identify(about)
    Path(path).is_file()  # raises what says more, such as that the folder may not be entered
    raise DataError(f"{path} does not exist; correct the setting that names it, or fetch it.")


def _identify(about: os.stat_result) -> FileIdentity:
    return FileIdentity(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


def identify_settled(paths: Iterable[Path]) -> dict[str, FileIdentity] | None:
    """Return the identity of each file by its path; None if a write now could leave the times of one unchanged."""
    now_ns, found = time.time_ns(), {}
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            return None
        if _count_unsettled(about, now_ns) > 0:
            return None
        found[str(path)] = _identify(about)
    return found


def keep_sound(folder: Path, files: Mapping[str, FileIdentity] | None) -> None:
    """Remember that a folder is as its record says while its files have these identities, taken before the check.

    None forgets it. Windows has no time of change that an edit could not set back, so nothing is remembered there.
    """
    if files is None:
        _SOUND.pop(str(folder), None)
    elif os.name != "nt":
        _SOUND[str(folder)] = dict(files)


def is_sound(folder: Path) -> bool:
    """Say whether all files that `keep_sound` was given for a folder have the same size, times and inode."""
    files = _SOUND.get(str(folder))
    with suppress(DataError, OSError):
        return files is not None and all(identify_file(place) == then for place, then in files.items())
    return False


def count_verified() -> VerifiedFiles:
    """Return the files that this process has verified so far, each counted once."""
    used = list(_USED.values())
    here = [size for size, read in used if read]
    return VerifiedFiles(len(used), sum(size for size, _ in used), len(here), sum(here), len(_REMOTE))


# --- reading ------------------------------------------------------------------------------------------------


class _Progress:
    """Shows the progress of reading that takes longer than a few seconds."""

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


def _hash_all(files: Mapping[str, int], *, sha256: bool) -> dict[str, _Known]:
    """Read files of given sizes and return what is known about each; uses threads for many bytes."""
    total = sum(files.values())
    with ExitStack() as stack:
        progress = _Progress(total, stack)
        if len(files) < 2 or total < _LARGE_BYTES:
            return {place: _hash_one(place, progress, alone=True, sha256=sha256) for place in files}
        # xxhash and reading leave the interpreter to others; disks rarely gain from more than a few readers.
        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1, len(files)))
        stack.callback(pool.shutdown, cancel_futures=True)  # an interrupt waits for no further file
        tasks = {
            place: pool.submit(_hash_one, place, progress, alone=False, sha256=sha256) for place in files
        }
        found = {}
        for place, task in tasks.items():
            while not task.done() and progress.watch is not None:
                with suppress(TimeoutError):
                    task.exception(timeout=0.5)
                progress.tell()
            found[place] = task.result()
        return found


def _hash_one(place: str, progress: _Progress, *, alone: bool, sha256: bool) -> _Known:
    if Path(place).stat().st_size >= _LARGE_BYTES:
        _wait_until_settled(place)
    started, digest = time.time_ns(), xxhash.xxh3_128()
    published = hashlib.sha256() if sha256 else None
    with Path(place).open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        block = memoryview(bytearray(min(_BLOCK_BYTES, before.st_size + 1)))
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while n := file.readinto(block):
            digest.update(block[:n])
            if published is not None:
                published.update(block[:n])
            progress.done += n
            if alone:
                progress.tell()
        after = os.fstat(file.fileno())
    identity, same = (
        FileIdentity(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        for about in (after, before)
    )
    settled = identity == same and _count_unsettled(after, started) <= 0
    return _Known(identity, digest.hexdigest(), True, settled, published.hexdigest() if published else "")


def _count_unsettled(about: os.stat_result, now_ns: int) -> int:
    """Return for how many ns another write could leave the times of a file unchanged; 0 or less if none."""
    coarse = about.st_mtime_ns % 1_000_000_000 == 0 and about.st_ctime_ns % 1_000_000_000 == 0
    # Any program may set a modification time, also one of the future. The change time is the disk's own, and every
    # write moves it; Windows has the time of creation in its place, and disks that count seconds may copy the other.
    written = max(about.st_mtime_ns, about.st_ctime_ns) if coarse or os.name == "nt" else about.st_ctime_ns
    return written + (_COARSE_NS if coarse else _TICK_NS) - now_ns


def _wait_until_settled(place: str) -> None:
    left = _count_unsettled(Path(place).stat(), time.time_ns())
    if 0 < left <= _TICK_NS:
        time.sleep(left / 1e9)


# --- the cache: one file for each folder that files lie in or were digested together in, replaced as a whole ----


def _find_cache(folder: str) -> Path:
    return find_cache_folder() / "digests" / f"{xxhash.xxh3_128_hexdigest(os.fsencode(folder))}.json"


def _read_cache(folder: str) -> dict[str, _Known]:
    """Return what is remembered about the files of a folder; nothing if the cache cannot be read or is damaged."""
    try:
        content = json.loads(_find_cache(folder).read_text())
        if content["check"] != _seal(folder, content["files"]):
            return {}
        return {
            name: _Known(FileIdentity(*numbers), digest, read_here=False, settled=True, sha256=sha256)
            for name, (digest, sha256, *numbers) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        return {}


def _seal(folder: str, files: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([folder, files], sort_keys=True).encode())


def _write_caches(places: Mapping[str, str], *, keep: Container[str] = ()) -> None:
    """Remember the files that were just hashed, each in the cache of a folder above it.

    Entries that another process writes at the same time may be lost, and in a large cache all entries outside `keep`.
    """
    folders: dict[str, dict[str, _Known]] = {}
    for place, folder in places.items():
        if _KNOWN[place].settled:
            folders.setdefault(folder, {})[place[len(folder) + 1 :]] = _KNOWN[place]
    for folder, new in folders.items():
        kept = {name: known for name, known in _read_cache(folder).items() if name not in new}
        if len(kept) + len(new) > _MAX_FILES:
            kept = {name: known for name, known in kept.items() if f"{folder}/{name}" in keep}
        files = {name: [k.digest, k.sha256, *k.identity] for name, k in (kept | new).items()}
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
        bound_cache(find_cache_folder() / "digests", _MAX_FOLDERS)


def bound_cache(folder: Path, n_most: int) -> None:
    """Remove the oldest files of a cache folder if there are more than `n_most`."""
    with suppress(OSError):
        names = os.listdir(folder)  # noqa: PTH208 (speed)
        if len(names) > n_most:
            kept = sorted((folder / name for name in names), key=lambda path: path.stat().st_mtime)
            for path in kept[: n_most // 2]:
                path.unlink(missing_ok=True)
