"""Run folders: finished results, their inputs, and whether they are complete.

Defines fingerprints, provenance, atomic writes and the files of responses, stimuli and embeddings: arrays are ``.npy``
(memory-mapped on reading), tables ``.parquet``, text ``.json`` and ``.yaml``. No pickle is ever written or
read. A finished artifact is a folder that holds ``provenance.json``; it appears by one rename, so that a
killed process leaves no incomplete result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis import __version__
from braindecode_vis.base import digests
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import NUMPY_ERRORS, DataError
from braindecode_vis.base.locks import LEASE, describe_command, hold_lease, is_alive, is_leased
from braindecode_vis.base.memory import profile_step
from braindecode_vis.base.remote import revive
from braindecode_vis.base.stimuli import StimulusSet

PROVENANCE = "provenance.json"
_TEMPORARY = ".tmp-"
_MOVES = ".moves.json"
#: Files from here on are kept once by runs that lie beside each other.
_LARGE_BYTES = 1 << 25
#: In the names of temporary folders: on a shared disk, a process of another machine may have the same number.
_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "here"
#: Libraries whose version may change a number; kept in the provenance, out of the fingerprint.
_VERSIONED = (
    "numpy", "scipy", "scikit-learn", "torch", "timm", "mne", "nilearn", "diffusers", "open_clip_torch",
)  # fmt: skip


def compute_fingerprint(
    stage: str, version: int, fields: Mapping[str, Any], upstream: Mapping[str, str]
) -> str:
    """Return 16 hex digits that identify the result of a stage.

    Parameters
    ----------
    stage
        Name of the stage.
    version
        Version of the stage's code; increase it by hand when its result changes.
    fields
        Plain values that determine the result (configuration and seed; never device, paths or workers).
    upstream
        Fingerprints of the artifacts that the stage reads.
    """
    return hash_json({"stage": stage, "version": version, "fields": fields, "upstream": upstream})


def hash_json(value: Any) -> str:
    """Return 16 hex digits of plain values; a value that JSON cannot hold is a TypeError."""
    # Sorted and without spaces, so that equal settings have one text; a new key changes every fingerprint that has it.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_refuse)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} cannot enter a fingerprint: {value!r}")


def hash_file(path: Path, *, block_bytes: int = 1 << 22) -> str:
    """Return the sha256 of a file, read in blocks, as in published checksums and identities of pictures."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; correct the setting that names it, or fetch it.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(block_bytes):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A finished result of one stage on disk."""

    path: Path
    fingerprint: str
    reused: bool
    reason: str


class RunFolder:
    """One folder that holds every artifact of a run, and the rules for writing there.

    Parameters
    ----------
    path
        Folder of the run; created on first use.
    writable
        Whether anything will be written; a folder that is only read is not created or tested.

    Raises
    ------
    DataError
        If the folder cannot be made or written to.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path, self.writable = path.expanduser().absolute(), writable
        self._in_use: dict[Path, None] = {}  # in their order
        if not writable:
            return
        self._refuse_foreign_link()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Permissions alone do not tell: a disk may be read-only, or full of inodes.
            with replace_atomically(self.path / "probe", replaces=False) as probe:
                probe.touch()
        except OSError as error:
            raise DataError(
                f"the run folder {self.path} cannot be written ({error.strerror}); choose another with --out."
            ) from error

    def _refuse_foreign_link(self) -> None:
        """Raise `DataError` if the stages are a link, except to the stages of a sweep or of a run beside this one."""
        stages = self.path / "stages"
        if not stages.is_symlink():
            return
        target, beside = stages.resolve(), self.path.resolve().parent
        if beside not in (target.parent, target.parent.parent) or target.name != "stages":
            raise DataError(
                f"{stages} is a link to {target}, where the results of another program may lie; remove the link, or "
                f"link to the stages of a run in {beside}."
            )

    def produce(
        self,
        stage: str,
        *,
        version: int,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        compute: Callable[[Path], Mapping[str, Any] | None],
        unit: str = "",
        alone: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        tell: Callable[[str], None] = lambda sentence: None,
        waits: bool = True,
    ) -> Artifact:
        """Reuse the artifact of this fingerprint, or compute it into a temporary folder and rename it.

        Of several processes that ask for it at once, one computes it; see `locks`.

        Parameters
        ----------
        stage, version, fields, upstream
            As for `compute_fingerprint`.
        compute
            Function that writes its files into the given folder; its result is kept in the provenance.
        unit
            Part of the stage that is finished on its own, for example a fold.
        alone
            Context that is held around the lease and the computing; always in this order, so that no two processes wait
            for each other.
        tell
            Function that gets a sentence while this process waits for another one.
        waits
            Whether to wait for another process that computes it.

        Raises
        ------
        DataError
            If it cannot be computed or written.
        locks.BeingMade
            If another process computes it and `waits` is false.
        """
        fingerprint = compute_fingerprint(stage, version, fields, upstream)
        parent = self.path / "stages" / stage
        final = parent / "-".join(filter(None, [unit, fingerprint]))
        artifact, damage = self._reuse(final, fingerprint)
        if artifact is not None:
            return artifact
        self.verify()
        reason = damage or self._explain(parent, unit, version, fields, upstream)
        if not self.writable:
            raise DataError(
                f"{self.path} cannot be written, but its stage {stage} must be computed ({reason}); copy "
                "the folder to a place where you may write."
            )
        try:
            parent.mkdir(parents=True, exist_ok=True)
            broken = bool(damage)
            with (
                alone(),
                hold_lease(
                    parent / f"{LEASE}{final.name}", lambda: final.exists() and not broken, tell, waits=waits
                ),
            ):
                made, damage = self._reuse(final, fingerprint)
                if made is not None:
                    return made
                about = {
                    "stage": stage, "unit": unit, "version": version, "fingerprint": fingerprint,
                    "fields": fields, "upstream": upstream,
                }  # fmt: skip
                return self._make(final, about, compute, damage, reason)
        except Exception as error:
            if is_disk_full(error, parent):
                raise DataError(
                    f"the disk is full: {stage} could not be written below {self.path}; finished stages are kept, so "
                    "make room or choose another folder with --out, then run the same command again."
                ) from error
            raise

    def _reuse(self, final: Path, fingerprint: str) -> tuple[Artifact | None, str]:
        """Return an artifact that exists and is unchanged, or None and what is wrong with it."""
        # Checked each time it is reused: a changed file would otherwise speak for settings that did not make it.
        damage = find_damage(final) if final.exists() else ""
        if added := list_added(final):
            raise DataError(
                f"{final / added[0]} is not a file of the run; move it elsewhere, then run the same command again."
            )
        if not final.exists() or damage:
            return None, damage
        written = read_json(final / PROVENANCE)["created"]
        self._in_use[final] = None
        lease = final.with_name(f"{LEASE}{final.name}")
        if self.writable and lease.exists():  # killed after the artifact was there
            is_leased(lease)
        return Artifact(final, fingerprint, True, f"nothing it depends on has changed since {written}"), ""

    def _make(
        self,
        final: Path,
        about: Mapping[str, Any],
        compute: Callable[[Path], Mapping[str, Any] | None],
        damage: str,
        reason: str,
    ) -> Artifact:
        """Compute an artifact into a temporary folder and rename it."""
        parent = final.parent
        stage, unit, fingerprint = (about[name] for name in ("stage", "unit", "fingerprint"))
        _remove_stale(parent, unit)
        temporary = parent / f"{_TEMPORARY}{unit}-{fingerprint}-{_HOST}-{os.getpid()}"
        temporary.mkdir()
        try:
            with profile_step() as taken:
                extra = compute(temporary) or {}
            record = {
                **about, **extra,
                **collect_provenance(), "seconds": taken.pop("seconds"), "profile": taken,
                "files": describe_files(temporary, moves=True),
            }  # fmt: skip
            write_provenance(temporary / PROVENANCE, record)
            with contextlib.suppress(OSError):  # a neighbour on a dead mount costs no result
                self._share_large(stage, temporary, record["files"])
            # Before the rename: after a power cut, a folder with its final name must hold what it says.
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    mode = 0o666 & ~_read_umask()
                    # Components from outside may write for their owner alone; a mode that is set changes times.
                    if stat.S_IMODE(path.stat().st_mode) != mode:
                        # A link may lead to the file of another user.
                        with contextlib.suppress(PermissionError):
                            path.chmod(mode)
            damaged = parent / f"{_TEMPORARY}damaged-{unit}-{fingerprint}-{_HOST}-{os.getpid()}"
            if damage:  # out of the way first: a rename never replaces a folder that holds something
                with contextlib.suppress(FileNotFoundError):
                    final.rename(damaged)
                    shutil.rmtree(damaged, ignore_errors=True)
            try:
                temporary.rename(final)
                digests.follow_rename(temporary, final)
            except OSError as error:
                # Another process finished the same artifact first; its bytes are as good as ours.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._in_use[final] = None
        return Artifact(final, fingerprint, False, reason)

    def has(
        self,
        stage: str,
        *,
        version: int,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        unit: str = "",
    ) -> bool:
        """Say whether `produce` with the same arguments would reuse an artifact."""
        name = "-".join(filter(None, [unit, compute_fingerprint(stage, version, fields, upstream)]))
        final = self.path / "stages" / stage / name
        return final.exists() and not find_damage(final)

    def _share_large(self, stage: str, folder: Path, files: Mapping[str, list[Any]]) -> None:
        """Replace large files by hard links to equal files of this run or of a neighbouring one, if the disk supports
        links.

        An edit of one of them changes all; the digest in each record then shows it.
        """
        large = {
            (size, digest): folder / name for name, (size, digest) in files.items() if size >= _LARGE_BYTES
        }
        same: dict[tuple[int, str], list[Path]] = {}
        for path in self.path.parent.glob(f"*/stages/{stage}/[!.]*/{PROVENANCE}") if large else ():
            # Neighbours are damaged, deleted meanwhile, of somebody else, or on another disk: then the copy stays.
            with contextlib.suppress(OSError, DataError, TypeError):
                for name, (size, digest) in read_provenance(path).get("files", {}).items():
                    if (size, digest) in large and ".." not in name:
                        same.setdefault((size, digest), []).append(path.parent / name)
        for key, others in same.items():
            for other in others:
                with contextlib.suppress(OSError, DataError):
                    if _link(other, large[key], key[1], names=others):
                        break

    def take(self, final: Path) -> None:
        """Count a finished, verified artifact among those that this process uses."""
        self._in_use[final] = None

    def verify(self, *, read: bool = True) -> None:
        """Compare all artifacts that this process has reused, written or found with their digests.

        Parameters
        ----------
        read
            Whether all bytes must have been read by this process, once, as before anything is computed from them;
            otherwise files are read whose size, times or inode have changed.

        Raises
        ------
        DataError
            If a file has changed since it was written.
        """
        for final in self._in_use:
            if damage := find_damage(final, read=read):
                raise DataError(
                    f"the stage {final.parent.name} of {self.path} is damaged: {damage} since it was opened; run "
                    f"braindecode-vis run {self.path} again."
                )

    def list_profiles(self) -> list[dict[str, Any]]:
        """Return time and memory of each artifact that this process has reused, written or found, in order of creation.

        A row has `stage`, `created`, `seconds`, and the values of `memory.profile_step`; without these if an earlier
        version made the artifact.
        """
        records = [read_provenance(final / PROVENANCE) for final in self._in_use]
        return [
            {
                "stage": f"{record['stage']} {record['unit']}".strip(),
                **{key: record[key] for key in ("created", "seconds")},
                **record.get("profile", {}),
            }
            for record in sorted(records, key=lambda record: str(record["created"]))
        ]

    def find(
        self, stage: str, *, fields: Mapping[str, Any], upstream: Mapping[str, str], unit: str = ""
    ) -> Artifact:
        """Return a finished artifact of any code version without computing anything.

        Parameters
        ----------
        stage, fields, upstream, unit
            As for `produce`.

        Raises
        ------
        DataError
            If it is missing or damaged.
        """
        found = []
        for path in sorted((self.path / "stages" / stage).glob(f"*/{PROVENANCE}")):
            if path.parent.name.startswith(_TEMPORARY):
                continue
            record = read_provenance(path)
            same = (record.get("unit"), record.get("fields"), record.get("upstream"))
            if same == (unit, json_plain(fields), dict(upstream)):
                found.append((str(record["created"]), path.parent, str(record["fingerprint"])))
        name = f"{stage} {unit}".strip()
        if not found:
            raise DataError(
                f"{self.path} is unfinished: its stage {name} is missing, or was made with other settings or weights; "
                f"finish it first with braindecode-vis run {self.path}."
            )
        _, final, fingerprint = max(found)
        damage = find_damage(final, read=True)
        if not damage and (added := list_added(final)):
            damage = f"{final / added[0]} is not a file of the run; move it elsewhere"
        if damage:
            raise DataError(
                f"the stage {name} of {self.path} is damaged: {damage}; run braindecode-vis run {self.path} again."
            )
        self._in_use[final] = None
        return Artifact(final, fingerprint, True, "found")

    def _explain(
        self, parent: Path, unit: str, version: int, fields: Mapping[str, Any], upstream: Mapping[str, str]
    ) -> str:
        """Describe why nothing could be reused."""
        records = []
        for path in parent.glob(f"*/{PROVENANCE}"):
            if path.parent.name.startswith(_TEMPORARY):
                continue
            with contextlib.suppress(DataError):  # a damaged neighbour explains nothing and stops nothing
                record = read_provenance(path)
                if {"version", "fields", "upstream"} <= record.keys():
                    records += [record] * (record.get("unit") == unit)
        if not records:
            return "not computed before"
        last = max(records, key=lambda record: str(record.get("created", "")))
        if last["version"] != version:
            return f"the code of this stage changed (version {last['version']} -> {version})"
        differences = sorted(
            list_differences(last["fields"], json_plain(fields)), key=lambda found: found[0].split(".")
        )
        changed = [f"{key}: {old} -> {new}" for key, old, new in differences]
        changed += [f"{name} changed" for name in upstream if last["upstream"].get(name) != upstream[name]]
        return "; ".join(changed[:3]) or "its inputs changed"


def _link(other: Path, ours: Path, digest: str, *, names: list[Path]) -> bool:
    """Replace a file by a link to an equal file, which may have further names; return whether it worked."""
    about = other.lstat()
    # A symbolic link may lead out of what the run owns, and a hard link to it would be one as well.
    if not stat.S_ISREG(about.st_mode) or about.st_uid != ours.stat().st_uid:
        return False
    if digests.digest_file(other) != digest:
        return False
    link = ours.with_name(f"{_TEMPORARY}link")
    before = digests.identify_file(other)
    os.link(other, link)
    if link.lstat().st_ino != about.st_ino:  # replaced meanwhile
        link.unlink()
        return False
    link.replace(ours)
    digests.follow_link(before, [other, *names], ours)
    return True


#: Left behind by file managers.
_CLUTTER = ("Thumbs.db", "desktop.ini")


def describe_files(folder: Path, *, moves: bool = False) -> dict[str, list[Any]]:
    """Return size and digest of each file of an artifact by its path in it; for `moves` see `digests.digest_files`."""
    files = {path.relative_to(folder).as_posix(): path for path in _list_files(folder)}
    found = digests.digest_files(files, moves=moves)
    return {name: [path.stat().st_size, found[name]] for name, path in files.items()}


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / PROVENANCE)


def find_damage(final: Path, *, read: bool = False) -> str:
    """Describe what is wrong with a finished artifact, or return an empty text.

    Artifacts of earlier versions have a sha256 of files up to 1 MiB; of larger files only the size is known.

    Parameters
    ----------
    final
        Folder of the artifact.
    read
        Whether this process must have read all bytes itself, once; see `digests.digest_file`.
    """
    if not read and digests.is_sound(final):  # stages ask hundreds of times
        return ""
    digests.keep_sound(final, None)
    place = final / PROVENANCE
    try:
        told = digests.identify_settled([place])
        record, is_sealed = _parse_record(place.read_bytes(), place)
        files = record.get("files", {})
        record["created"]
    except (OSError, DataError, KeyError):
        return f"its {PROVENANCE} was missing or damaged"
    full = {}
    for name, (size, digest) in files.items():
        path = final / name
        try:
            there = path.is_file() and path.stat().st_size == size
        except OSError:  # a name that no file can have
            return f"its {PROVENANCE} was missing or damaged"
        if not there or (digest is not None and len(digest) == 64 and hash_file(path) != digest):
            return f"its file {name} was missing or changed"
        if digest is not None and len(digest) != 64:
            full[name] = (path, digest)
    paths = {name: path for name, (path, _) in full.items()}
    identities = digests.identify_settled(paths.values())
    found = digests.digest_files(paths, read=read)
    for name, (_, digest) in full.items():
        if found[name] != digest:
            return f"its file {name} was missing or changed"
    # Last: a file that can be named says more.
    if full and not is_sealed:
        return f"its {PROVENANCE} was changed"
    if told and identities is not None and len(full) == len(files):
        digests.keep_sound(final, told | identities)
    return ""


@lru_cache(maxsize=128)  # a training of many folds looks at every record before each of them
def _parse_record(content: bytes, path: Path) -> tuple[dict[str, Any], bool]:
    """Return the record in these bytes, for reading only, and whether its own digest is right."""
    record = _check_record(_parse_json(content, path), path)
    return record, record.get("seal") == _compute_seal(record)


def list_added(final: Path) -> list[str]:
    """Return the files of a finished artifact that are not in its record; hidden files and clutter do not count."""
    try:
        files = read_provenance(final / PROVENANCE)["files"]
    except (OSError, DataError, KeyError):
        return []  # damaged, which is told otherwise, or of a version that kept no list
    names = (path.relative_to(final) for path in _list_files(final) if path.name not in _CLUTTER)
    return [
        name.as_posix()
        for name in names
        if name.as_posix() not in files and not any(part.startswith(".") for part in name.parts)
    ]


def list_differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield differences of plain values: the key, joined by dots, and both values; None for a missing value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from list_differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def _remove_stale(parent: Path, unit: str) -> None:
    """Remove temporary folders whose process has ended; those of other machines on a shared disk are kept."""
    for path in parent.glob(f"{_TEMPORARY}*-{_HOST}-*"):
        pid = path.name.rsplit("-", 1)[-1]
        if not (pid.isdigit() and is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)
        # Of this process, but of an earlier try that did not come to its end, as in a notebook.
        elif int(pid) == os.getpid() and path.name.startswith(f"{_TEMPORARY}{unit}-"):
            shutil.rmtree(path, ignore_errors=True)


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Say whether an error means that the disk is full; not every library passes on the system's error number."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(
        error
    ):
        return True
    # HDF5 and parquet writers raise their own errors, or one without a number, when a write comes back short.
    short_write = isinstance(error, OSError) and error.errno is None
    return short_write and shutil.disk_usage(folder).free < 1 << 20


@contextlib.contextmanager
def replace_atomically(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to `path` if the block succeeds.

    The suffix is kept, since several writers choose their format by it.

    Parameters
    ----------
    path
        The file.
    replaces
        False removes the temporary file instead.
    """
    _sweep_once(path.parent, os.getpid())
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{_HOST}-{path.name}")
    try:
        yield temporary
        if replaces:
            temporary.chmod(0o666 & ~_read_umask())  # safetensors writes for its owner alone
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty temporary folder in `parent`; it and folders of killed processes are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(parent, os.getpid())
    folder = parent / f"{_TEMPORARY}{os.getpid()}-{_HOST}-{name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        _undo_moves(folder)
        shutil.rmtree(folder, ignore_errors=True)


def move_together(scratch: Path, last: str) -> None:
    """Move all files of a folder of `open_scratch` beside it, `last` at the end: if it exists, the others do too.

    If the process is stopped in between, the moved files are removed: by itself, or, if it was killed, by the next
    process that writes there.
    """
    files = sorted(scratch.iterdir(), key=lambda file: (file.name == last, file.name))
    # By inode, which a rename keeps: what somebody else puts there meanwhile is not ours.
    moved = {file.name: file.stat().st_ino for file in files if file.name != last}
    (scratch / _MOVES).write_text(json.dumps({"last": last, "moved": moved}))
    for file in files:
        file.rename(scratch.parent / file.name)


def _undo_moves(scratch: Path) -> None:
    """Remove the files that an unfinished `move_together` had moved out of a folder."""
    try:
        moves = json.loads((scratch / _MOVES).read_text())
    except (OSError, ValueError):
        return  # nothing was moved
    if not (scratch / moves["last"]).exists():
        return
    for name, inode in moves["moved"].items():
        path = scratch.parent / name
        if path.is_file() and path.stat().st_ino == inode:
            path.unlink()


@lru_cache(maxsize=4096)
def _sweep_once(folder: Path, process: int) -> None:
    """Remove files of killed processes of this machine in a folder; done once, as it may hold thousands of files."""
    for path in folder.glob(f"{_TEMPORARY}*-{_HOST}-*"):
        owner = re.match(rf"{re.escape(_TEMPORARY)}(\d+)-{_HOST}-", path.name)
        if owner is None or int(owner[1]) == process or is_alive(int(owner[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            _undo_moves(path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_UMASK = threading.Lock()


@cache
def _read_umask() -> int:
    with _UMASK:  # of two threads, one could take the other's 0 for the mask, and leave it so
        mask = os.umask(0)  # there is no way to read it without setting it
        os.umask(mask)
    return mask


def json_plain(value: Any) -> Any:
    """Return `value` as it comes back from JSON."""
    return json.loads(json.dumps(value, default=_encode))


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, a list with one entry a line; `DataError` for NaN, since JSON has no such number."""
    dump = partial(json.dumps, default=_encode, allow_nan=False)
    try:
        # With an indent, Python's slow encoder writes: scores take eight times as long.
        text = (
            "[\n" + ",\n".join(map(dump, value)) + "\n]"
            if value and isinstance(value, list)
            else dump(value, indent=1)
        )
    except ValueError as error:
        raise DataError(
            f"{path} cannot be written ({error}): the input holds NaN where a number is needed; run "
            "braindecode-vis check to look for damaged files."
        ) from error
    with replace_atomically(path) as temporary:
        temporary.write_text(text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays of numpy or tensors of torch as safetensors, atomically, with permissions of the umask.

    The library itself writes files that only their owner may read.
    """
    library = "numpy" if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()) else "torch"
    save_file = importlib.import_module(f"safetensors.{library}").save_file
    with replace_atomically(path) as temporary:
        save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))


def load_tensors(path: Path, library: Literal["numpy", "torch"] = "numpy") -> dict[str, Any]:
    """Return the arrays of a safetensors file, of numpy or of torch.

    Raises
    ------
    OSError
        If the file is missing or may not be read; in the second case the library itself would say that it is missing.
    """
    path.open("rb").close()
    found: dict[str, Any] = importlib.import_module(f"safetensors.{library}").load_file(path)
    return found


def open_tensors(path: Path, framework: Literal["np", "pt"] = "np") -> Any:
    """Open a safetensors file as `safetensors.safe_open`; errors are those of `load_tensors`."""
    from safetensors import safe_open

    path.open("rb").close()
    return safe_open(path, framework=framework)


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is a `DataError` that says which one to delete, and so is one that holds NaN."""
    return _parse_json(path.read_bytes(), path)


def _parse_json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not text, numbers or nesting without end
        raise DataError(f"{path} is damaged ({error}); delete it and run again.") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is not a number")  # Python's reader lets it pass


#: Forms of what stands in the record of an artifact.
_RECORD_FORMS = {
    "fields": dict, "upstream": dict, "files": dict, "created": str, "fingerprint": str, "stage": str, "unit": str,
}  # fmt: skip


def read_provenance(path: Path) -> dict[str, Any]:
    """Read the record of an artifact; a damaged record, or entries of a wrong type, are a `DataError`."""
    return _check_record(read_json(path), path)


def _check_record(record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{path} is damaged (it holds no record); delete it and run again.")
    for name, form in _RECORD_FORMS.items():
        if name in record and not isinstance(record[name], form):
            raise DataError(f"{path} is damaged ({name} is no {form.__name__}); delete it and run again.")
    for about in record.get("files", {}).values():
        if not (isinstance(about, list) and len(about) == 2 and isinstance(about[1], str | None)):
            raise DataError(f"{path} is damaged (files without size and digest); delete it and run again.")
    return record


def write_provenance(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with its own digest, so that a changed record is detected."""
    plain = json_plain(dict(record))
    write_json(path, {**plain, "seal": _compute_seal(plain)})


def _compute_seal(record: Mapping[str, Any]) -> str:
    return hash_json({key: value for key, value in record.items() if key != "seal"})


@contextlib.contextmanager
def record_results(folder: Path, *names: str, about: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Record size and digest of result files at the top of a run folder, which are written within the block.

    During the block nothing is recorded, so that a killed process leaves no record of files that do not exist.

    Parameters
    ----------
    folder
        The run folder.
    names
        Names of the files.
    about
        New content of the rest of the record, written when the block has ended.
    """
    path = folder / PROVENANCE
    record = _read_results(folder)
    files = {name: about for name, about in record.get("files", {}).items() if name not in names}
    if files != record.get("files", {}):
        write_provenance(path, {**record, "files": files})
    yield
    files |= {
        name: [(folder / name).stat().st_size, digests.digest_file(folder / name, read=True)]
        for name in names
    }
    write_provenance(path, {**(_read_results(folder) if about is None else about), "files": files})


def _read_results(folder: Path) -> dict[str, Any]:
    try:
        record = read_provenance(folder / PROVENANCE)
    except (OSError, DataError):
        return {}
    return record if record.get("seal") in (None, _compute_seal(record)) else {}


def find_changed_results(folder: Path) -> list[str]:
    """Return the files at the top of a run folder that were changed after the run; missing files are left out.

    Runs of earlier versions recorded none.
    """
    try:
        record = read_provenance(folder / PROVENANCE)
    except OSError:
        return []
    except DataError:
        return [PROVENANCE]
    files = {name: about for name, about in record.get("files", {}).items() if (folder / name).is_file()}
    found = digests.digest_files({name: folder / name for name in files})
    changed = [name for name, about in files.items() if about[1] != found[name]]
    return changed + [PROVENANCE] * (files != {} and record.get("seal") != _compute_seal(record))


def collect_provenance() -> dict[str, Any]:
    """Return user, time and versions: everything about a result except its inputs."""
    return {
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "versions": collect_versions(),
        "git_revision": read_git_revision(),
        "platform": f"{platform.system()} {platform.machine()}",
        "command": describe_command(),
    }


@cache
def collect_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries whose results may differ."""
    versions = {"python": platform.python_version(), "braindecode_vis": __version__}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def read_git_revision() -> str | None:
    """Return the commit of the checkout that the package runs from, marked if it is dirty; None outside one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        revision = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() or None


def write_responses(folder: Path, responses: Responses) -> None:
    """Write responses as ``data.npy``, ``trials.parquet``, ``meta.json`` and one ``.npy`` per array coordinate.

    Examples
    --------
    They can be read without this package::

        data = numpy.load("responses/data.npy", mmap_mode="r")
        trials = pandas.read_parquet("responses/trials.parquet")
        meta = json.load(open("responses/meta.json"))
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "data.npy", responses.data, allow_pickle=False)
    # The index is dropped, as rows are known by their place: row i of the table is row i of the data.
    responses.trials.to_parquet(folder / "trials.parquet", index=False)
    plain: dict[str, Any] = {}
    arrays: list[str] = []
    for key, value in responses.coords.items():
        # Text and mixed values go into the JSON: as an array they could only be pickled.
        if isinstance(value, np.ndarray) and value.dtype != object:
            np.save(folder / f"coord_{key}.npy", value, allow_pickle=False)
            arrays.append(key)
        else:
            plain[key] = value
    write_json(
        folder / "meta.json",
        {"dims": list(responses.dims), "unit": responses.unit, "coords": plain, "array_coords": arrays},
    )


def read_responses(folder: Path) -> Responses:
    """Read what `write_responses` wrote; the data stay on disk as a memory map and are not scanned again."""
    import pandas as pd

    meta = read_json(folder / "meta.json")
    coords = dict(meta["coords"])
    for key in meta["array_coords"]:
        coords[key] = np.load(folder / f"coord_{key}.npy", allow_pickle=False)
    return Responses.from_checked(
        data=_open_array(folder / "data.npy"),
        dims=tuple(meta["dims"]),
        trials=pd.read_parquet(folder / "trials.parquet"),
        unit=meta["unit"],
        coords=coords,
    )


def _open_array(path: Path) -> np.ndarray:
    """Return a memory map of an array; a damaged file is a `DataError` that says which artifact to delete."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except NUMPY_ERRORS as error:
        raise DataError(
            f"{path} is damaged ({error}); delete the folder of its stage and run again."
        ) from error


def write_stimuli(folder: Path, stimuli: StimulusSet) -> None:
    """Write the stimulus table, and the pixels if the set holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    stimuli.table.to_parquet(folder / "stimuli.parquet", index=False)
    if stimuli.pixels is not None:
        np.save(folder / "pixels.npy", stimuli.pixels, allow_pickle=False)
    write_json(folder / "stimuli.json", {"root": None if stimuli.root is None else str(stimuli.root)})


def read_stimuli(folder: Path) -> StimulusSet:
    """Read what `write_stimuli` wrote."""
    import pandas as pd

    root = read_json(folder / "stimuli.json")["root"]
    pixels = folder / "pixels.npy"
    return StimulusSet(
        table=pd.read_parquet(folder / "stimuli.parquet"),
        root=None if root is None else revive(root),
        pixels=_open_array(pixels) if pixels.exists() else None,
    )


def write_embeddings(folder: Path, embeddings: Embeddings) -> None:
    """Write embeddings as ``vectors.npy``, ``ids.json`` and the name of their space."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", np.asarray(embeddings.vectors), allow_pickle=False)
    write_json(folder / "ids.json", {"space": embeddings.space, "ids": list(embeddings.ids)})


def read_embeddings(folder: Path) -> Embeddings:
    """Read what `write_embeddings` wrote; the vectors stay on disk as a memory map."""
    meta = read_json(folder / "ids.json")
    vectors = _open_array(folder / "vectors.npy")
    return Embeddings(vectors, np.asarray(meta["ids"], dtype=object), meta["space"])
