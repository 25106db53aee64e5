"""Fetching of data sets: missing files of a manifest's parts are downloaded in parallel, verified and unpacked.

Owns the plan (which files, from where, how large), the record of verified files, and unpacking. If a call is stopped,
nothing is lost: complete files keep their names, others continue from their ``.part``.
"""

from __future__ import annotations

import json
import lzma
import os
import queue
import re
import shutil
import stat
import tarfile
import threading
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any

from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.digests import find_cache_folder
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.store import is_disk_full, replace_atomically
from braindecode_vis.datasets.hosts import check_inside, describe_place, list_files
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Manifest,
    ManifestPart,
    describe_source,
    find_label,
)
from braindecode_vis.datasets.transfer import (
    PART,
    Progress,
    RemoteFile,
    StoppedError,
    TransferError,
    ask,
    has_checksum,
    transfer,
)

#: What was verified, below the root: an unchanged file is not read again.
RECORD = ".fetched.json"
_RECORD_S = 2.0  # between two writings of it
_UNANSWERED = 3  # files in a row for which nobody answered, after which a host is left alone
LOCK = ".fetched.lock"
#: Of a host's own list, this many addresses are asked by `check_addresses`: that it lists them is an answer already.
_ASKED_OF_A_LIST = 3


def find_data_folder(name: str) -> Path:
    """Return the folder of a data set for which no folder was given.

    Below ``$BRAINDECODE_VIS_DATA``, or ``datasets`` in the user's cache.
    """
    above = os.environ.get("BRAINDECODE_VIS_DATA")
    return (Path(above).expanduser() if above else find_cache_folder() / "datasets") / name


@dataclass(frozen=True)
class Plan:
    """Files to fetch.

    Parameters
    ----------
    manifest, root
        The data set, and the folder to fill.
    parts
        Chosen parts that are fetched.
    by_hand
        Chosen parts that only the user can download.
    files
        All files of `parts`.
    missing
        Files that do not exist with their published size, and the number of missing bytes, None if unknown.
    locked
        Chosen parts whose terms are not accepted; only a plan made with `only_look` has some.
    unlisted
        Chosen parts whose host did not list their files, with the reason; only a plan made with `only_look` has some.
    """

    manifest: Manifest
    root: Path
    parts: tuple[ManifestPart, ...]
    by_hand: tuple[ManifestPart, ...]
    files: tuple[RemoteFile, ...]
    missing: dict[str, int | None]
    locked: tuple[ManifestPart, ...] = ()
    unlisted: dict[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """Return a line for each part, and one on the missing files and the free space of the disk."""
        lines = []
        for part in self.parts:
            files = [file for file in self.files if file.part == part.name]
            place = f"from {describe_place(part)} ({part.mark} address): {part.what}"
            if part.name in self.unlisted:
                size = part.count_bytes()
                amount = "size unknown" if size is None else describe_bytes(size) + " with all subjects"
                lines.append(
                    f"{part.name}: files like {', '.join(part.patterns)}, {amount}, {place}; its host lists them, but "
                    f"{self.unlisted[part.name]}"
                )
            else:
                lines.append(f"{part.name}: {describe_files(files)} {place}")
        lines += [f"{part.name}: by hand: {part.gate}" for part in self.by_hand]
        if self.locked:
            lines.append(
                f"{_describe_terms(self.manifest, self.locked)}. A fetch needs --accept-terms for that"
            )
        lacking = [size for size in self.missing.values() if size is not None]
        unknown = len(self.missing) - len(lacking)
        amounts = [describe_bytes(sum(lacking))] if lacking or not (unknown or self.unlisted) else []
        amounts += [f"{unknown} file{'' if unknown == 1 else 's'} of unknown size"] if unknown else []
        amounts += (
            [f"what {_join(self.unlisted)} hold{'' if len(self.unlisted) > 1 else 's'}"]
            if self.unlisted
            else []
        )
        free = shutil.disk_usage(_find_parent(self.root)).free
        lines.append(
            f"to fetch: {_join(amounts)}, {len(self.missing)} of {len(self.files)} files; "
            f"{describe_bytes(free)} free below {self.root}"
        )
        return lines

    def check_space(self) -> None:
        """Raise `DataError` if the disk has less free space than the missing files need."""
        free = shutil.disk_usage(_find_parent(self.root)).free
        needed = sum(size or 0 for size in self.missing.values())
        if needed > free:
            raise DataError(
                f"{self.manifest.name} needs {describe_bytes(needed)} more, but the disk of {self.root} has "
                f"{describe_bytes(free)} free; make room, choose another place with --root, or less with --subject "
                "and --parts."
            )


def make_plan(
    manifest: Manifest, root: Path, *, subjects: Sequence[str] | None = None, parts: Sequence[str] | None = None,
    accept_terms: bool = False, only_look: bool = False, only: Mapping[str, Sequence[str] | None] | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of a fetch; hosts are asked for lists that the manifest does not have.

    Parameters
    ----------
    manifest
        Description of the data set.
    root
        Folder to fill.
    subjects
        Subjects whose files are fetched; all by default.
    parts
        Names of the parts; by default those that are needed to read the data set, ``all`` for all of them.
    accept_terms
        Whether the user has accepted the terms of the parts that have terms.
    only_look
        Whether nothing will be fetched: missing consent to terms, and lists that a host did not give, are then reported
        and not errors.
    only
        Sessions and regions (the keys of `ENTITIES`) to which files that name one are limited; all by default.

    Raises
    ------
    ConfigError
        If there is no such part, subject, session or region.
    DataError
        If nothing can be fetched, terms were not accepted, or a host does not answer.
    """
    for option, names in (("--subject", subjects), ("--parts", parts)):
        if names is not None and not names:
            raise ConfigError(f"{option} is empty; give names, or leave it out for all needed parts.")
    chosen = _pick_parts(manifest, parts)
    by_hand = tuple(part for part in chosen if part.access == "by_hand")
    open_parts = tuple(part for part in chosen if part.access != "by_hand")
    if not open_parts:
        how = [f"{part.name}: {part.gate}" for part in by_hand]
        if not how and manifest.source is None:
            own = "its files are your own; give their folder with --root"
            why = own if manifest.needs_files else "it is made when it is read"
            raise DataError(f"{manifest.name} has nothing to fetch: {why}.")
        how = how or [describe_source(manifest)]
        raise DataError(
            f"{manifest.name} has nothing to fetch from here; download it yourself: {'; '.join(how)}"
        )
    _check_subjects(manifest, open_parts, subjects)
    locked = tuple(part for part in open_parts if part.access == "terms" and not accept_terms)
    if locked and not only_look:
        free = ",".join(part.name for part in open_parts if part.access == "open")
        without = f"; without these, pass --parts {free}" if free else ""
        raise DataError(
            f"{_describe_terms(manifest, locked)}. Do that, and then pass --accept-terms{without}."
        )
    root = root.expanduser().absolute()
    files: dict[str, RemoteFile] = {}
    unlisted: dict[str, str] = {}
    silent: dict[tuple[str, str], str] = {}
    for part in open_parts:
        listed: list[RemoteFile] = []
        try:
            if (part.host, part.place) in silent:
                raise TransferError(silent[part.host, part.place])
            listed = list_files(part, subjects)
        except TransferError as error:
            if not only_look:
                raise DataError(
                    f"the part {part.name} of {manifest.name} cannot be listed: {error}."
                ) from error
            unlisted[part.name] = str(error)
            if error.silent:  # its other parts would wait as long
                silent[part.host, part.place] = str(error)
        # Two parts may hold the same file from two hosts; it is downloaded for the first chosen one.
        for file in listed:
            files.setdefault(file.path, file)
    for option, names in (only or {}).items():
        if names is not None:
            files = _pick_entities(manifest, files, option, names, is_complete=not unlisted)
    record = _Record(root)
    missing = {file.path: _count_missing(file, root, record) for file in files.values()}
    lacking = {path: size for path, size in missing.items() if size != 0}
    return Plan(manifest, root, open_parts, by_hand, tuple(files.values()), lacking, locked, unlisted)


def _describe_terms(manifest: Manifest, parts: Sequence[ManifestPart]) -> str:
    names, come = _join(part.name for part in parts), "comes" if len(parts) == 1 else "come"
    what = "; ".join(dict.fromkeys(part.gate.strip().rstrip(".") for part in parts))
    return f"{names} of {manifest.name} {come} under terms ({manifest.licence.strip().rstrip('.')}): {what}"


def _join(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _pick_parts(manifest: Manifest, names: Sequence[str] | None) -> list[ManifestPart]:
    if names is None:
        return [part for part in manifest.parts if part.default]
    known = [part.name for part in manifest.parts]
    for name in names:
        check_option("--parts", name, [*known, "all"])
    return [part for part in manifest.parts if "all" in names or part.name in names]


def _check_subjects(
    manifest: Manifest, parts: Sequence[ManifestPart], subjects: Sequence[str] | None
) -> None:
    there = list(dict.fromkeys(subject for part in parts for subject in part.list_subjects()))
    for subject in subjects or ():
        if not there:
            raise ConfigError(f"the files of {manifest.name} are not kept by subject; leave --subject out.")
        if find_label(subject, there) not in there:
            raise ConfigError(
                f"--subject names {subject}, but {manifest.name} has the subjects {', '.join(there)}."
            )


ENTITIES = {"session": "ses", "region": "label"}
"""Entity of file names behind each option that limits what is fetched."""


def _pick_entities(
    manifest: Manifest,
    files: Mapping[str, RemoteFile],
    option: str,
    names: Sequence[str],
    *,
    is_complete: bool,
) -> dict[str, RemoteFile]:
    """Return the files of some sessions or regions, and those that name none; hyphens in names do not count."""
    found = {path: re.search(rf"(?:^|[/_]){ENTITIES[option]}-([a-zA-Z0-9+-]+)", path) for path in files}
    labels = {path: match and match[1].replace("-", "") for path, match in found.items()}
    there = sorted({label for label in labels.values() if label})
    wanted = [find_label(name.replace("-", ""), there) for name in names]
    lost = [name for name in wanted if name not in there]
    if not names or (lost and is_complete):
        known = ", ".join(there) or "none"
        raise ConfigError(
            f"--{option} names {lost[0] if lost else 'none'}; {manifest.name} has the {option}s {known}."
        )
    # Without the list of a host, the patterns of the manifest still exclude some names.
    patterns = [pattern for part in manifest.parts for pattern in part.patterns]
    forms = sorted(
        {form for pattern in patterns for form in re.findall(f"{ENTITIES[option]}-([^/_]+)", pattern)}
    )
    for name in lost:
        # A user may write 1 for 01.
        if forms and not any(fnmatchcase(text, form) for form in forms for text in (name, name.zfill(2))):
            like = _join(f"{ENTITIES[option]}-{form}" for form in forms)
            raise ConfigError(f"--{option} names {name}; {manifest.name} has only files like {like}.")
    return {path: file for path, file in files.items() if labels[path] in (None, *wanted)}


def describe_files(files: Sequence[RemoteFile]) -> str:
    """Return number and total size of files, as far as they are known."""
    sizes = [file.bytes for file in files]
    known = sum(size for size in sizes if size is not None)
    more = " or more" if None in sizes and known else ""
    amount = "size unknown" if None in sizes and not known else describe_bytes(known) + more
    return f"{len(files)} file{'' if len(files) == 1 else 's'}, {amount}"


def _find_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _count_missing(file: RemoteFile, root: Path, record: _Record) -> int | None:
    """Return the number of missing bytes of a file, None if unknown."""
    if record.knows(file):
        return 0
    size = len(file.text.encode()) if file.text is not None else file.bytes
    for path in (root / file.path, root / f"{file.path}{PART}"):
        with suppress(OSError):
            there = path.stat().st_size
            if path.suffix != PART:
                return 0 if size in (there, None) else size
            return None if size is None else max(0, size - there) or None
    return size


# --- the record of verified files ----------------------------------------------------------------------


class _Record:
    """Record of verified files, by size and modification time, so that the next call need not read them."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / RECORD
        self._lock, self._written = threading.Lock(), 0.0
        self.files: dict[str, dict[str, Any]] = {}
        # Without the record, files are read again, and unpacked archives are downloaded again.
        with suppress(OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            held = json.loads(self.path.read_text())["files"]
            self.files = {
                path: row for path, row in held.items() if isinstance(row.get("unpacked", {}), dict)
            }

    def knows(self, file: RemoteFile) -> bool:
        """Return whether a file, or its unpacked content, is unchanged since it was verified."""
        row = self.files.get(file.path, {})
        if row.get("checksum") != file.checksum or (file.unpack is not None) != ("unpacked" in row):
            return False
        held = row.get("unpacked", {file.path: [row.get("bytes"), row.get("mtime_ns")]})
        try:
            return bool(held) and all(
                [(found := (self.root / path).stat()).st_size, found.st_mtime_ns] == told
                for path, told in held.items()
            )
        except (OSError, ValueError):  # a damaged record may name what is no path
            return False

    def add(self, file: RemoteFile, unpacked: Sequence[str] | None = None) -> None:
        """Record a file, or its unpacked content."""
        row: dict[str, Any] = {"checksum": file.checksum}
        if unpacked is None:
            found = (self.root / file.path).stat()
            row |= {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
        else:
            states = {path: (self.root / path).stat() for path in unpacked}
            row["unpacked"] = {path: [found.st_size, found.st_mtime_ns] for path, found in states.items()}
        with self._lock:
            self.files[file.path] = row
            if time.monotonic() - self._written > _RECORD_S:
                self._write()

    def write(self) -> None:
        """Write the record."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        # Without the record, the next call reads the files.
        with suppress(OSError), replace_atomically(self.path) as temporary:
            temporary.write_text(json.dumps({"files": self.files}))


# --- fetching ---------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """State that the threads of one call share."""

    plan: Plan
    record: _Record
    progress: Progress | None
    stop: threading.Event = field(default_factory=threading.Event)
    full: str = ""  # why nothing more can be written
    findings: dict[str, CheckFinding] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)  # hosts: files in a row that nobody answered for

    def find_silence(self, file: RemoteFile) -> str:
        """Return why a file is not requested: without a network, each of thousands of requests would time out."""
        host = _find_host(file)
        if self.silent.get(host, 0) < _UNANSWERED:
            return ""
        return f"not requested, because {host} does not answer; check the network and fetch again"

    def note(self, file: RemoteFile, *, silent: bool) -> None:
        """Record whether the host of a file answered."""
        host = _find_host(file)
        self.silent[host] = self.silent.get(host, 0) + 1 if silent else 0


def _find_host(file: RemoteFile) -> str:
    return urllib.parse.urlsplit(file.urls[0]).netloc if file.urls else ""


def fetch(plan: Plan, *, jobs: int = 4, progress: Progress | None = None) -> list[CheckFinding]:
    """Download the missing files.

    A correct file is not changed; a wrong one is replaced after its download was verified. A failed file does not stop
    the others, unless the disk is full.

    Parameters
    ----------
    plan
        From `make_plan`.
    jobs
        Number of parallel downloads.
    progress
        Called from several threads with the file, the bytes it has so far, and its size if known.

    Returns
    -------
    findings
        One per file: present, fetched, or the reason for the failure and what to do.

    Raises
    ------
    DataError
        If the root cannot be written, or the disk is too small.
    """
    try:
        plan.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{plan.root} cannot be made ({error.strerror}); choose another --root.") from error
    plan.check_space()
    work = _Work(plan, _Record(plan.root), progress)

    def bring(file: RemoteFile) -> None:
        with suppress(StoppedError):
            work.findings[file.path] = _bring(file, work)

    with _hold(plan.root):
        # Read within the lock, so that the entries of another call are not lost.
        work.record = _Record(plan.root)
        try:
            _do_side_by_side(plan.files, bring, jobs, work.stop)
        finally:
            work.record.write()
    return [work.findings[file.path] for file in plan.files]


@contextmanager
def _hold(root: Path) -> Iterator[None]:
    """Let only one call at a time fill a folder: two would write the same parts and overwrite each other's record."""
    import filelock

    lock = filelock.FileLock(root / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise DataError(
            f"{root} is in use by another fetch; wait until it has ended and fetch again: finished "
            "downloads are not repeated."
        ) from error
    except (
        OSError
    ):  # nothing can be locked there, and perhaps nothing written: what is there is looked at all the same
        pass
    try:
        yield
    finally:
        lock.release()


def refuse_failures(findings: list[CheckFinding], what: str) -> None:
    """Raise `DataError` that names the first failed finding, if there is one."""
    wrong = [finding for finding in findings if not finding.ok]
    if wrong:
        message = wrong[0].message.rstrip(".")
        raise DataError(f"{len(wrong)} of {len(findings)} {what}; first: {wrong[0].item}: {message}.")


def check_addresses(plan: Plan, *, jobs: int = 4) -> list[CheckFinding]:
    """Test whether the address of every file answers; nothing is fetched.

    For a part that its host listed, only the first few are tested.
    """
    listed = {part.name for part in plan.parts if part.patterns}
    count: dict[str, int] = {}
    asked = []
    for file in plan.files:
        count[file.part] = count.get(file.part, 0) + 1
        if file.text is None and (file.part not in listed or count[file.part] <= _ASKED_OF_A_LIST):
            asked.append(file)
    findings: dict[str, CheckFinding] = {}
    places = [(part, plan.unlisted[part.name]) for part in plan.parts if part.name in plan.unlisted]
    work = _Work(plan, _Record(plan.root), None)

    def look(file: RemoteFile) -> None:
        ok, words = False, work.find_silence(file)
        if not words:
            ok, words = ask(file)
            work.note(file, silent=words.startswith("does not answer"))
        findings[file.path] = CheckFinding(file.urls[0] if file.urls else file.path, ok, words)

    _do_side_by_side(asked, look, jobs, threading.Event())
    silent = [CheckFinding(f"{part.name} at {describe_place(part)}", False, why) for part, why in places]
    return [findings[file.path] for file in asked] + silent


def _do_side_by_side(
    files: Sequence[RemoteFile], do: Callable[[RemoteFile], None], jobs: int, stop: threading.Event
) -> None:
    """Call `do` with each file, `jobs` at once; an error of one of them, or Ctrl-C, ends all of them.

    The threads are daemons, so that a silent server does not delay the end of the program.
    """
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    errors: list[BaseException] = []
    for file in files:
        waiting.put(file)

    def serve() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                try:
                    do(waiting.get_nowait())
                except queue.Empty:
                    raise
                except BaseException as error:
                    errors.append(error)
                    stop.set()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(max(1, min(jobs, len(files))))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(timeout=1.0)
        raise
    if errors:
        raise errors[0]


def _bring(file: RemoteFile, work: _Work) -> CheckFinding:
    target = work.plan.root / file.path
    if work.full:
        return CheckFinding(file.path, False, f"not fetched, since {work.full}")
    try:
        if work.record.knows(file):
            return CheckFinding(file.path, True, "already there, as it was verified before")
        done = "already there"
        if not _is_right(file, target):
            if not file.urls and file.text is None:
                source = describe_source(work.plan.manifest)
                return CheckFinding(
                    file.path,
                    False,
                    f"has no address to download from; download it yourself: {source}, as {target}",
                )
            if file.urls and (silence := work.find_silence(file)):
                return CheckFinding(file.path, False, silence)
            transfer(file, target, progress=work.progress, stop=work.stop)
            work.note(file, silent=False)
            done = f"fetched {describe_bytes(target.stat().st_size)}"
        if file.checksum:
            done += f", {file.checksum.partition(':')[0]} as published"
        unpacked = None
        if file.unpack is not None:
            unpacked = unpack(target, work.plan.root, file.unpack)
            target.unlink()
            done += f", unpacked {len(unpacked)} files"
        work.record.add(file, unpacked)
        return CheckFinding(file.path, True, done)
    except TransferError as error:
        work.note(file, silent=error.silent)
        return CheckFinding(file.path, False, str(error))
    except OSError as error:
        # A full disk is an error for all further files too; other errors concern only this file.
        if not is_disk_full(error, work.plan.root):
            return CheckFinding(file.path, False, f"{target} cannot be written ({error})")
        work.full = f"the disk of {work.plan.root} is full"
        return CheckFinding(file.path, False, f"{work.full}; make room and fetch again to continue")


def _is_right(file: RemoteFile, target: Path) -> bool:
    if not target.is_file():
        return False
    if file.text is not None:
        return target.read_bytes() == file.text.encode()
    if file.bytes is not None and target.stat().st_size != file.bytes:
        return False
    return not file.checksum or has_checksum(target, file.checksum)


# --- archives ---------------------------------------------------------------------------------------------


def unpack(archive: Path, root: Path, into: str) -> list[str]:
    """Unpack a zip or tar below a folder of the root, and return the paths of its files below the root.

    A folder of the same name in the archive is not repeated. Each file gets its name when it is complete.

    Raises
    ------
    TransferError
        If the archive is damaged, locked, larger than the disk, or holds links or files outside the folder.
    """
    try:
        with archive.open("rb") as file:
            is_zip = zipfile.is_zipfile(file)
        members = list(_read_zip(archive) if is_zip else _read_tar(archive))
    except _DAMAGE as error:
        raise _describe_damage(error, f"{archive} cannot be unpacked") from error
    free = shutil.disk_usage(root).free
    needed = sum(size for _, size, _ in members)
    if needed > free:
        raise TransferError(
            f"{archive} unpacks to {describe_bytes(needed)}, but {describe_bytes(free)} are free; make "
            f"room and fetch again; the archive is not downloaded again"
        )
    own = f"{PurePosixPath(into).name}/"
    doubled = into != "." and all(name.startswith(own) for name, _, _ in members)
    places = []
    for name, _, open_member in members:
        place = (PurePosixPath(into) / (name.removeprefix(own) if doubled else name)).as_posix()
        target = root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                replace_atomically(target) as temporary,
                open_member() as source,
                temporary.open("wb") as file,
            ):
                shutil.copyfileobj(source, file, 1 << 20)
        except NotImplementedError as error:
            raise TransferError(
                f"{archive} uses a compression for {name} that Python does not support ({error}); unpack "
                "it yourself below "
                f"{root / into}"
            ) from error
        except _DAMAGE as error:
            raise _describe_damage(error, f"{archive} is damaged at {name}") from error
        places.append(place)
    return places


# Each archive format has its own errors, among them `OSError` without a number.
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


def _describe_damage(error: Exception, what: str) -> Exception:
    """Return the error to raise for an archive that cannot be read; an error of the disk is not changed."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return TransferError(f"{what} ({' '.join(str(error).split())}); remove it and fetch again")


_Member = tuple[str, int, Callable[[], IO[bytes]]]


def _read_zip(path: Path) -> Iterator[_Member]:
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():
        if member.is_dir() or _is_clutter(member.filename):
            continue
        _check_member(path, member.filename, link=stat.S_ISLNK(member.external_attr >> 16))
        if member.flag_bits & 1:
            raise TransferError(
                f"{path} is locked with a password; unpack it yourself with the password that its terms give"
            )
        yield member.filename, member.file_size, lambda member=member: archive.open(member)  # type: ignore[misc]


def _read_tar(path: Path) -> Iterator[_Member]:
    archive = tarfile.open(path)  # noqa: SIM115  read as long as its members are
    for member in archive:
        if member.isdir() or _is_clutter(member.name):
            continue
        _check_member(path, member.name, link=not member.isreg())
        yield member.name.removeprefix("./"), member.size, lambda member=member: archive.extractfile(member)  # type: ignore[misc]


def _is_clutter(name: str) -> bool:
    """Return whether a member was added to the archive by macOS."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._")


def _check_member(path: Path, name: str, *, link: bool) -> None:
    if link:
        raise TransferError(f"{path} holds the link {name!r}, which is not unpacked; unpack it yourself")
    try:
        check_inside(name)
    except DataError as error:
        raise TransferError(
            f"{path} holds {name!r}, which would be outside its folder; unpack it yourself"
        ) from error
