"""Makes a corpus from sources, and adds to it.

Owns which of the runs that were found are new, how their samples are brought to the form of the corpus, and the order
of the work. Runs are mixed and packed into shards, each of which appears by one rename: a kill loses the shard that was
being written and nothing else, and what was added before is not read again. One run is in memory at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from braindecode_vis.base.checks import ConfigError, DataError, check_columns, check_file, refuse_damage
from braindecode_vis.base.contracts import Progress, count_steps
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.processes import open_processes
from braindecode_vis.base.store import RunFolder, hash_json, list_differences, write_json
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig, FmriChannels
from braindecode_vis.datasets.corpus.manifest import (
    MANIFEST,
    RUNS,
    VALUES,
    CorpusManifest,
    Source,
    forget_states,
    list_states,
    name_subject,
    read_manifest,
    read_rows,
    sketch_run,
    take_up_shards,
    write_manifest,
)
from braindecode_vis.datasets.corpus.recordings import Channels, Excluded, SeriesRun
from braindecode_vis.preprocessing.array_file import ArrayFile

_VERSION = 2
#: Of the windowed sinc, in samples of the slower of both rates, on each side.
_REACH = 8
#: Kaiser's window: 80 dB.
_BETA = 8.0
#: Largest share of the runs of an addition that may turn out unreadable; a single one always may.
_MAX_UNREADABLE = 0.05


class Sources(Protocol):
    """What finds recordings; a module of the package for each modality, and a stand-in in tests."""

    def read_channels(self, config: CorpusConfig, roots: Sequence[Path]) -> Channels:
        """Return the channels of a corpus that is begun with these roots."""
        ...

    def find_runs(self, root: Path, config: CorpusConfig) -> tuple[list[SeriesRun], list[Excluded]]:
        """Return the runs below a root, and what was left out."""
        ...


class PackageSources:
    """The finders of this package."""

    def read_channels(self, config: CorpusConfig, roots: Sequence[Path]) -> Channels:
        """Return the channels of a corpus that is begun with these roots."""
        if isinstance(config.channels, FmriChannels):
            from braindecode_vis.parts.foundation.corpus.fmri_sources import read_fmri_channels

            return read_fmri_channels(config.channels)
        from braindecode_vis.parts.foundation.corpus.meeg_sources import read_meeg_channels

        return read_meeg_channels(config.channels, roots)

    def find_runs(self, root: Path, config: CorpusConfig) -> tuple[list[SeriesRun], list[Excluded]]:
        """Return the runs below a root, and what was left out."""
        if isinstance(config.channels, FmriChannels):
            from braindecode_vis.parts.foundation.corpus.fmri_sources import find_fmri_runs

            return find_fmri_runs(root, config)
        from braindecode_vis.parts.foundation.corpus.meeg_sources import find_meeg_runs

        return find_meeg_runs(root, config)


@dataclass(frozen=True)
class NewRun:
    """A run that is to be stored: its id, the digest of its files and the size it will have."""

    run: SeriesRun
    run_id: str
    files: str
    n_bytes: int


@dataclass(frozen=True)
class CorpusAddition:
    """What an addition did, or would do.

    Parameters
    ----------
    n_found, n_known, n_copies, n_changed
        Runs that were found; that were there before; that are of the same files as another one; whose files have
        changed, and which were read again.
    n_new, n_people, hours, n_bytes
        What came to the corpus: runs, persons, hours, and bytes on disk.
    excluded
        What was left out.
    seconds
        How long it took.
    digest
        Of the corpus afterwards.
    """

    n_found: int
    n_known: int
    n_copies: int
    n_changed: int
    n_new: int
    n_people: int
    hours: float
    n_bytes: int
    excluded: tuple[Excluded, ...]
    seconds: float
    digest: str = ""


def add_sources(
    folder: Path,
    roots: Sequence[Path],
    config: CorpusConfig,
    *,
    people: Mapping[str, str] | None = None,
    hold_out: Sequence[str] = (),
    jobs: int = 1,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
    sources: Sources | None = None,
) -> CorpusAddition:
    """Add the runs of some roots to a corpus, which is made if there is none.

    Parameters
    ----------
    folder
        Of the corpus.
    roots
        Folders of data sets; none only brings persons and the hold-out up to date.
    config
        Settings; those of a corpus that is there, or the same with another size of shards or share to hold out.
    people
        Person of each subject, as `read_people` returns them.
    hold_out
        Persons or subjects to hold out beside those that are drawn.
    jobs
        Processes that prepare shards side by side.
    progress
        Called with the number of runs done, of all and words.
    tell
        Called with sentences on what should be known.
    sources
        What finds the runs.

    Raises
    ------
    ConfigError
        If the settings are not those of the corpus, or a person to hold out is unknown.
    DataError
        If a run is not of this corpus, or too many cannot be read.
    """
    started = time.monotonic()
    folder = folder.expanduser().absolute()
    sources = sources or PackageSources()
    if not roots:
        read_manifest(folder)  # says that there is none
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the corpus {folder} cannot be made ({error.strerror}).") from error
    with hold_folder(folder, hash_json(config.hashed_fields()), tell):
        manifest, kept = _begin(folder, roots, config, sources), list_states(folder)
        if manifest.shards and roots:
            _compare_atlas(manifest, sources.read_channels(manifest.config, roots), tell)
        found = _find_all(roots, manifest, sources, progress)
        before = _Before.read(folder, manifest)
        sorted_out = _sort_out(found, manifest, before)
        everyone = {(row["source"], row["site"], row["subject"]) for row in before.rows}
        everyone |= {(run.source, run.site, run.subject) for _, runs, _ in found for run in runs}
        manifest = replace(
            sorted_out.manifest, given={**manifest.given, **match_people(people or {}, everyone)}
        )
        manifest = _hold_out(manifest, before, hold_out, tell)
        manifest = _note_sources(manifest, roots, found, sorted_out.excluded, is_whole=not sorted_out.new)
        write_manifest(folder, manifest)
        if sorted_out.n_changed:
            tell(
                f"{sorted_out.n_changed} recordings have changed since they were added; they are read "
                "again and replace the stored data"
            )
        n_stored = len(before.rows)
        advance = count_steps(progress, len(sorted_out.new))
        failed: list[Excluded] = []
        first = 1 + max((int(shard.name.partition("-")[0]) for shard in manifest.shards), default=-1)
        groups = {f"{first + n:05d}": group for n, group in enumerate(pack(sorted_out.new, config.shard_mb))}
        for unreadable in _write_shards(folder, roots, groups, manifest, sources, jobs, advance):
            failed += unreadable
            manifest = take_up_shards(folder, manifest)
            write_manifest(folder, manifest)
            if len(failed) > max(1, _MAX_UNREADABLE * len(sorted_out.new)):
                raise DataError(
                    f"{len(failed)} of {len(sorted_out.new)} new runs cannot be read; of {failed[0].path}: "
                    f"{failed[0].reason}; finished parts are kept, so repair or remove these files and "
                    "run the same command again."
                )
        rows = read_rows(folder, manifest.shards)
        manifest = link_copies(manifest, rows, sorted_out.copies)
        manifest = _note_sources(manifest, roots, found, [*sorted_out.excluded, *failed], is_whole=True)
        manifest = _tell_merged(manifest, before, tell)
        digest = write_manifest(folder, manifest)
        forget_states(folder, kept | {digest})
    names = manifest.name_people()
    counts = [
        len({names[name_subject(row["source"], row["subject"])] for row in part})
        for part in (rows, before.rows)
    ]
    rows = rows[n_stored:]
    return CorpusAddition(
        n_found=sum(len(runs) for _, runs, _ in found), n_known=sorted_out.n_known, n_copies=len(sorted_out.copies),
        n_changed=sorted_out.n_changed, n_new=len(rows),
        n_people=counts[0] - counts[1],
        hours=sum(row["n_times"] * row["interval_s"] for row in rows) / 3600,
        n_bytes=sum(shard.n_bytes for shard in manifest.shards) - before.n_bytes,
        excluded=(*sorted_out.excluded, *failed), seconds=time.monotonic() - started, digest=digest,
    )  # fmt: skip


@dataclass(frozen=True)
class AdditionEstimate:
    """What an addition would take, by a few runs that were prepared and not kept.

    Parameters
    ----------
    n_found, n_new, n_subjects, hours
        Runs that were found; of these, those by a name that the corpus does not have; their subjects and hours.
    n_bytes
        On disk.
    seconds
        With one process.
    n_measured, measured_hours
        Runs that were prepared, and their hours.
    excluded
        What would be left out.
    """

    n_found: int
    n_new: int
    n_subjects: int
    hours: float
    n_bytes: float
    seconds: float
    n_measured: int
    measured_hours: float
    excluded: tuple[Excluded, ...]

    def scale(self, value: float, hours: float) -> float:
        """Return what `value`, which is of all hours, is of some hours."""
        return value / self.hours * hours if self.hours else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **{name: value for name, value in vars(self).items() if name != "excluded"},
            "bytes_of_10000_hours": self.scale(self.n_bytes, 10_000),
            "seconds_of_10000_hours": self.scale(self.seconds, 10_000),
            "excluded": [{"path": str(entry.path), "reason": entry.reason} for entry in self.excluded],
        }


def estimate_addition(
    folder: Path,
    roots: Sequence[Path],
    config: CorpusConfig,
    *,
    budget_s: float = 20.0,
    progress: Progress | None = None,
    sources: Sources | None = None,
) -> AdditionEstimate:
    """Say what `add_sources` would do, and how long it would take; nothing is written.

    Runs of each source are prepared in turn, evenly spaced ones first, until the time is up; each source counts by its
    own hours. Reading from a disk that does not hold the files in memory may take longer than here.

    Parameters
    ----------
    folder, roots, config, sources
        As for `add_sources`.
    budget_s
        Seconds that may be measured, about; one run of each source at least.
    """
    folder = folder.expanduser().absolute()
    manifest = _begin(folder, roots, config, sources := sources or PackageSources())
    found = _find_all(roots, manifest, sources, progress)
    stored = {row["run_id"] for row in read_rows(folder, manifest.shards)}
    excluded = [entry for _, _, left_out in found for entry in left_out]
    by_source: dict[str, list[SeriesRun]] = {}
    for _, runs, _ in found:
        for run in runs:
            if reason := check_run(run, manifest):
                excluded.append(Excluded(run.files[0], reason))
            elif name_run(run) not in stored:
                by_source.setdefault(run.source, []).append(run)
    # From both ends to the middle: the first, the last, the one between, and so on.
    waiting = {name: _spread(runs) for name, runs in by_source.items()}
    spent: dict[str, list[tuple[float, float, float]]] = {
        name: [] for name in by_source
    }  # seconds, hours, bytes
    started = time.monotonic()
    while any(waiting.values()):
        for name, runs in waiting.items():
            if not runs or (spent[name] and time.monotonic() - started > budget_s):
                waiting[name] = []
                continue
            run, begun = runs.pop(0), time.monotonic()
            digest_files({str(path): path for path in run.files}, read=True)
            try:
                values, _ = prepare_run(run, manifest.config)
            except DataError as error:
                excluded.append(Excluded(run.files[0], str(error).rstrip(".")))
                by_source[name] = [other for other in by_source[name] if other is not run]
                continue
            spent[name].append((time.monotonic() - begun, _count_hours([run]), float(values.nbytes)))
            if progress is not None:
                n = sum(map(len, spent.values()))
                progress(n, n + sum(map(len, waiting.values())), name_run(run))
    n_measured = sum(map(len, spent.values()))
    hours = {name: _count_hours(runs) for name, runs in by_source.items()}
    # The first run of a source loads libraries, so that it tells nothing of time where there are others.
    per_hour = {
        name: (
            sum(s for s, _, _ in taken[1:] or taken) / sum(h for _, h, _ in taken[1:] or taken),
            sum(b for _, _, b in taken) / sum(h for _, h, _ in taken),
        )
        for name, taken in spent.items()
        if taken
    }
    new = [run for runs in by_source.values() for run in runs]
    return AdditionEstimate(
        n_found=sum(len(runs) for _, runs, _ in found), n_new=len(new),
        n_subjects=len({name_subject(run.source, run.subject) for run in new}), hours=sum(hours.values()),
        n_bytes=sum(per_hour[name][1] * hours[name] for name in per_hour),
        seconds=sum(per_hour[name][0] * hours[name] for name in per_hour), n_measured=n_measured,
        measured_hours=sum(h for taken in spent.values() for _, h, _ in taken), excluded=tuple(excluded),
    )  # fmt: skip


def _count_hours(runs: Sequence[SeriesRun]) -> float:
    return sum(run.n_times * run.interval_s for run in runs) / 3600


def _spread(runs: Sequence[SeriesRun]) -> list[SeriesRun]:
    """Return runs so that any number of the first ones is spread over all."""
    n = len(runs)
    # numbers in the order of their reversed bits
    bits = max(1, (n - 1).bit_length())
    order = sorted(range(1 << bits), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [runs[i] for i in order if i < n]


def match_people(people: Mapping[str, str], everyone: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """Return the person of each subject, of whom a table may say the source or the site; the others are kept for later.

    Parameters
    ----------
    people
        As `read_people` returns them.
    everyone
        Source, site and subject of those who are known.
    """
    found = dict(people)
    for source, site, subject in everyone:
        person = people.get(name_subject(source, subject), people.get(name_subject(site, subject)))
        if person is not None:
            found[name_subject(source, subject)] = person
    return found


def read_people(path: Path) -> dict[str, str]:
    """Read a table of who is the same person: columns subject, person, and source or site; tabs or commas between them.

    Raises
    ------
    DataError
        If it is not such a table, or gives a subject two persons.
    """
    import pandas as pd

    check_file(path, what="the table of people", hint="correct --people")
    with refuse_damage(f"the table of people {path} cannot be read", ValueError):
        separator = "," if path.suffix == ".csv" else "\t"
        rows = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    place = "site" if "site" in rows.columns and "source" not in rows.columns else "source"
    check_columns(rows.columns, (place, "subject", "person"), what=f"the table of people {path}")
    people: dict[str, str] = {}
    for source, subject, person in zip(rows[place], rows["subject"], rows["person"], strict=True):
        name = name_subject(source.strip(), subject.strip().removeprefix("sub-"))
        if not person.strip():
            raise DataError(
                f"the table of people {path} has no person for {name}; fill it in, or leave the row out."
            )
        if people.setdefault(name, person.strip()) != person.strip():
            raise DataError(
                f"the table of people {path} calls {name} both {people[name]!r} and {person.strip()!r}; leave one."
            )
    return people


# --- what is new -------------------------------------------------------------------------------------------

_Found = list[tuple[Path, list[SeriesRun], list[Excluded]]]


@dataclass(frozen=True)
class _Before:
    """What a corpus held when an addition began."""

    rows: list[dict[str, Any]]
    trained: set[str]  # subjects with runs whose person was not held out
    n_bytes: int

    @classmethod
    def read(cls, folder: Path, manifest: CorpusManifest) -> _Before:
        rows = read_rows(folder, manifest.shards)
        names, held = manifest.name_people(), manifest.find_held_out()
        stored = {name_subject(row["source"], row["subject"]) for row in rows}
        return cls(
            rows, {subject for subject in stored if names[subject] not in held},
            sum(shard.n_bytes for shard in manifest.shards),
        )  # fmt: skip


@dataclass(frozen=True)
class _SortedOut:
    manifest: CorpusManifest
    new: list[NewRun]
    excluded: list[Excluded]
    copies: list[tuple[str, str]]  # digest of the files, and the subject who has them too
    n_known: int
    n_changed: int


def _begin(folder: Path, roots: Sequence[Path], config: CorpusConfig, sources: Sources) -> CorpusManifest:
    """Return the manifest of a corpus that is there, with what a killed call had finished, or of a new one."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        known, asked = manifest.config.hashed_fields(), config.hashed_fields()
        if known != asked:
            key, old, new = next(list_differences(known, asked))
            raise ConfigError(
                f"the corpus {folder} was made with {key} {old!r}, not {new!r}, and a corpus has one "
                "value for all of it; leave that setting out, or make another corpus."
            )
        return take_up_shards(folder, replace(manifest, config=config))
    config = config.replace_paths(lambda path: path.expanduser().absolute())
    channels = sources.read_channels(config, roots)
    if len(set(channels.names)) != len(channels.names) or not channels.names:
        raise DataError("a corpus needs at least one channel, and each channel only once.")
    modality: Any = "fmri"
    if not isinstance(config.channels, FmriChannels):
        modality = config.channels.modality
        named = config.channels.model_copy(update={"names": channels.names})
        config = config.model_copy(update={"channels": named})
    return CorpusManifest(config, channels, modality)


def _compare_atlas(manifest: CorpusManifest, now: Channels, tell: Callable[[str], None]) -> None:
    """Raise `ConfigError` if the files that define the channels are of others by now; report other files of them."""
    if now.names != manifest.channels.names:
        raise ConfigError(
            f"the corpus has {len(manifest.channels.names)} channels, first "
            f"{manifest.channels.names[0]}, but its settings now give {len(now.names)}, first "
            f"{now.names[0]}: use the original atlas, or make another corpus."
        )
    if now.digest != manifest.channels.digest:
        tell(
            "the files of the atlas differ from those at the start of the corpus, but have the same "
            "names; they must contain the same regions"
        )


def _find_all(
    roots: Sequence[Path], manifest: CorpusManifest, sources: Sources, progress: Progress | None
) -> _Found:
    found: _Found = []
    for root in roots:
        root = root.expanduser().absolute()
        if not root.is_dir():
            raise DataError(f"the source {root} is no folder; correct --add.")
        if progress is not None:
            progress(0, 0, f"looking through {root}")
        found.append((root, *sources.find_runs(root, manifest.config)))
    return found


def name_run(run: SeriesRun) -> str:
    """Return the id of a run: its data set, subject, session and first file."""
    return "/".join(filter(None, [run.source, run.subject, run.session, run.files[0].name]))


def check_run(run: SeriesRun, manifest: CorpusManifest) -> str:
    """Return why a run is left out, or an empty text.

    Raises
    ------
    DataError
        If it is of another modality or other channels, or lacks some that it must have.
    """
    where, config = run.files[0], manifest.config
    if run.modality != manifest.modality:
        raise DataError(
            f"{where} is {run.modality}, but the corpus is of {manifest.modality}; make another for it."
        )
    if run.channels != manifest.channels.names:
        raise DataError(
            f"{where} is mapped to {len(run.channels)} channels, but the corpus has "
            f"{len(manifest.channels.names)} with other names; use the original atlas or names."
        )
    if run.missing and config.missing == "refuse":
        raise DataError(
            f"{where} is missing {len(run.missing)} of {len(run.channels)} channels, first "
            f"{run.missing[0]}; set missing=mask to add it with these channels marked as missing."
        )
    if len(run.missing) > config.max_missing * len(run.channels):
        return (
            f"it is missing {len(run.missing)} of {len(run.channels)} channels, more than max_missing="
            f"{config.max_missing:g} allows"
        )
    duration = run.n_times * run.interval_s
    if duration < config.min_duration_s:
        return f"it lasts {duration:g} s, less than min_duration_s={config.min_duration_s:g}"
    return ""


def _sort_out(found: _Found, manifest: CorpusManifest, before: _Before) -> _SortedOut:
    """Say which runs are new, by the digests of their files."""
    excluded = [entry for _, _, left_out in found for entry in left_out]
    runs: list[SeriesRun] = []
    for _, found_runs, _ in found:
        for run in found_runs:
            if reason := check_run(run, manifest):
                excluded.append(Excluded(run.files[0], reason))
            else:
                runs.append(run)
    paths = {str(path): path for run in runs for path in run.files}
    digests = digest_files(paths)
    # What was stored last of each, since a recording may change and be put back.
    stored = {row["run_id"]: row for row in before.rows}
    owners = {row["files"]: name_subject(row["source"], row["subject"]) for row in stored.values()}
    copies: list[tuple[str, str]] = []
    subjects = dict.fromkeys(manifest.subjects)
    new: dict[str, NewRun] = {}
    n_changed = n_known = 0
    for run in runs:
        files = hash_json([digests[str(path)] for path in run.files])
        subject, run_id = name_subject(run.source, run.subject), name_run(run)
        subjects[subject] = None
        row = stored.get(run_id)
        is_same = row is not None and row["files"] == files
        # The interval may come from a sidecar, which is none of the files.
        recorded_s = run.interval_s if row is None else row.get("recorded_s", run.interval_s)
        if is_same and math.isclose(recorded_s, run.interval_s, rel_tol=1e-6):
            n_known += 1
        elif files in owners and not is_same:
            copies.append((files, subject))
        elif run_id in new:
            raise DataError(
                f"{run.files[0]} and {new[run_id].run.files[0]} are different recordings with the same "
                f"name ({run_id}); give their data sets different names in dataset_description.json, or "
                "add one of them."
            )
        else:
            n_changed += row is not None
            owners[files] = subject
            new[run_id] = NewRun(run, run_id, files, _count_bytes(run, manifest.config))
    # Mixed, so that a few shards at a time hold many persons and sites.
    order = sorted(new.values(), key=lambda entry: xxhash.xxh3_128_hexdigest(entry.run_id.encode()))
    manifest = link_copies(replace(manifest, subjects=tuple(subjects)), before.rows, copies)
    return _SortedOut(manifest, order, excluded, copies, n_known, n_changed)


def link_copies(
    manifest: CorpusManifest, rows: Sequence[Mapping[str, Any]], copies: Sequence[tuple[str, str]]
) -> CorpusManifest:
    """Return the manifest with subjects joined who have files of a run that is stored.

    Files that could not be read join nobody: many persons may have the same empty one.
    """
    owners = {row["files"]: name_subject(row["source"], row["subject"]) for row in rows}
    links = dict.fromkeys(manifest.links)
    for files, subject in copies:
        if owners.get(files, subject) != subject:
            links[owners[files], subject] = None
    return replace(manifest, links=tuple(links))


def _count_bytes(run: SeriesRun, config: CorpusConfig) -> int:
    n_times = count_resampled(run.n_times, run.interval_s, find_interval(run, config))
    return n_times * (len(run.channels) - len(run.missing)) * np.dtype(config.dtype).itemsize


def pack(runs: Sequence[NewRun], shard_mb: float) -> Iterator[list[NewRun]]:
    """Yield neighbours that fill a shard; a longer run is one by itself."""
    group: list[NewRun] = []
    n_bytes = 0
    for run in runs:
        if group and n_bytes + run.n_bytes > shard_mb * 1e6:
            yield group
            group, n_bytes = [], 0
        group.append(run)
        n_bytes += run.n_bytes
    if group:
        yield group


# --- who is held out ---------------------------------------------------------------------------------------


def _hold_out(
    manifest: CorpusManifest, before: _Before, named: Sequence[str], tell: Callable[[str], None]
) -> CorpusManifest:
    """Return the manifest with persons held out among those who came new, and those who are named.

    Of each data set its share is held out, and of all of them at least one person; who was trained on before is never
    drawn. The draw is by a hash of the person, so that corpora of the same sources hold out the same persons.
    """
    names = manifest.name_people()
    held = set(manifest.held_out)
    members: dict[str, list[str]] = {}
    for subject, person in names.items():
        members.setdefault(person, []).append(subject)
    for word in named:
        chosen = members.get(word) or [s for s in names if s == word or s.rpartition("/")[2] == word]
        if not chosen:
            raise ConfigError(
                f"no person and no subject of the corpus is called {word!r}; name one as the table of the corpus does, "
                "SOURCE/SUBJECT."
            )
        if len({names[subject] for subject in chosen}) > 1:
            raise ConfigError(
                f"{len(chosen)} persons are called {word!r}, first {chosen[0]}; name one as SOURCE/SUBJECT."
            )
        held.update(members[names[chosen[0]]])
    share = manifest.config.held_out
    trained = {names[subject] for subject in before.trained}
    by_source: dict[str, list[str]] = {}
    for person, subjects in members.items():
        by_source.setdefault(subjects[0].rpartition("/")[0], []).append(person)
    is_held = {person for person, subjects in members.items() if held & set(subjects)}

    def draw(persons: Sequence[str], n: int) -> None:
        free = [p for p in persons if p not in is_held and p not in trained]
        n_missing = n - sum(p in is_held for p in persons)
        for person in sorted(free, key=lambda p: xxhash.xxh3_64_hexdigest(p.encode()))[: max(0, n_missing)]:
            is_held.add(person)
            held.update(members[person])

    for persons in by_source.values():
        # a half rounds up, as half of the data sets of five people should hold out one at a tenth
        draw(persons, math.floor(share * len(persons) + 0.5))
    if share > 0 and len(members) > 1 and not is_held:
        draw(list(members), 1)
    return replace(manifest, held_out=frozenset(held))


def _tell_merged(manifest: CorpusManifest, before: _Before, tell: Callable[[str], None]) -> CorpusManifest:
    """Report persons who were trained on and are held out from now on; return the manifest with all their names."""
    names, held = manifest.name_people(), manifest.find_held_out()
    seen = sorted({names[subject] for subject in before.trained if names[subject] in held})
    if seen:
        tell(
            f"{', '.join(seen[:3])}{f' and {len(seen) - 3} more' if len(seen) > 3 else ''} "
            f"{'was' if len(seen) == 1 else 'were'} trained on and held out from now on, by name or as the same person "
            "as one held out: a network that was pretrained on the earlier corpus has seen them"
        )
    return replace(manifest, held_out=frozenset(s for s in manifest.subjects if names[s] in held))


def _note_sources(
    manifest: CorpusManifest,
    roots: Sequence[Path],
    found: _Found,
    excluded: Sequence[Excluded],
    *,
    is_whole: bool,
) -> CorpusManifest:
    """Return the manifest with the roots of this addition, each once."""
    sources = {source.root: source for source in manifest.sources}
    for root, runs, _ in found:
        mine = [(str(e.path), e.reason) for e in excluded if e.path.is_relative_to(root)]
        known = sources.get(str(root))
        sources[str(root)] = Source(
            names=tuple(sorted({run.source for run in runs})), root=str(root),
            added=known.added if known else datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            n_runs=len(runs), excluded=tuple(mine), is_whole=is_whole,
        )  # fmt: skip
    return replace(manifest, sources=tuple(sources.values()))


# --- samples -----------------------------------------------------------------------------------------------


def find_interval(run: SeriesRun, config: CorpusConfig) -> float:
    """Return the interval that a run is stored with (s)."""
    is_resampled = isinstance(config.channels, FmriChannels) and config.time == "resample"
    return config.interval_s if is_resampled else run.interval_s


def prepare_run(run: SeriesRun, config: CorpusConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the samples of a run as they are stored, and its missing channels.

    Returns
    -------
    values : array of shape (n_times, n_present)
        At the interval of the corpus, scaled.
    missing
        Channels that the run does not have, and those that never change.

    Raises
    ------
    DataError
        If the samples are not what the run was said to have, or not finite.
    """
    n_bytes = 3 * 4 * run.n_times * len(run.channels)
    check_memory(n_bytes, what=f"the run {run.files[0]}", reduce="cut it into shorter files")
    data = np.asarray(run.read(), dtype=np.float32)
    if data.shape != (run.n_times, len(run.channels)):
        raise DataError(
            f"it gave {data.shape[0]} samples of {data.shape[-1]} channels in place of {run.n_times} of "
            f"{len(run.channels)}"
        )
    present = np.array([name not in set(run.missing) for name in run.channels])
    data = data[:, present]
    bad = ~np.isfinite(data).all(axis=0)
    if bad.any():
        raise DataError(
            f"it has values that are not numbers in {bad.sum()} channels, first "
            f"{np.array(run.channels)[present][bad][0]}"
        )
    # A share of its size, so that rounding is no change.
    span, size = np.ptp(data, axis=0), np.abs(data).max(axis=0, initial=0)
    varies = span > 1e-6 * size
    present[present] = varies
    missing = tuple(name for name, there in zip(run.channels, present, strict=True) if not there)
    if len(missing) > config.max_missing * len(run.channels):
        raise DataError(
            f"it is missing {len(missing)} of {len(run.channels)} channels, of which {len(missing) - len(run.missing)} "
            "never change"
        )
    if missing and config.missing == "refuse":
        raise DataError(f"its channel {missing[0]} never changes")
    data = resample_series(data[:, varies], run.interval_s, find_interval(run, config))
    if config.scaling == "zscore":
        data = data - data.mean(axis=0, dtype=np.float64)
        std = data.std(axis=0, dtype=np.float64)
        if not (std > 0).all():
            raise DataError("it has a channel that does not change at the interval of the corpus")
        data = data / std
    # A spike of more than 65504 standard deviations would need four billion samples.
    return data.astype(config.dtype), missing


def count_resampled(n_times: int, interval_s: float, new_interval_s: float) -> int:
    """Return the number of samples after resampling: those that lie within the recording.

    Examples
    --------
    >>> count_resampled(100, 0.72, 2.0), count_resampled(100, 2.0, 2.0)
    (36, 100)
    """
    if math.isclose(interval_s, new_interval_s, rel_tol=1e-6):
        return n_times
    return math.floor((n_times - 1) * interval_s / new_interval_s + 1e-6) + 1


def resample_series(data: np.ndarray, interval_s: float, new_interval_s: float) -> np.ndarray:
    """Bring time series to another interval: a windowed sinc, which takes out what the new rate cannot hold.

    Any ratio of the intervals is exact, unlike that of a polyphase filter. At both ends the weights that are left are
    scaled to a sum of one.

    Parameters
    ----------
    data : array of shape (n_times, n_channels)
    interval_s, new_interval_s
        Time between two samples before and after (s); the first sample stays where it is.

    Returns
    -------
    array of shape (n_new_times, n_channels), float32

    Examples
    --------
    >>> t = np.arange(200) * 0.72
    >>> slow = resample_series(np.sin(2 * np.pi * 0.05 * t)[:, None], 0.72, 2.0)[:, 0]
    >>> bool(np.abs(slow - np.sin(2 * np.pi * 0.05 * 2.0 * np.arange(len(slow))))[8:-8].max() < 1e-3)
    True
    """
    if math.isclose(interval_s, new_interval_s, rel_tol=1e-6):
        return np.asarray(data, np.float32)
    n_new = count_resampled(len(data), interval_s, new_interval_s)
    ratio = new_interval_s / interval_s
    centres = np.arange(n_new) * ratio  # of the new samples, counted in old ones
    slower = max(1.0, ratio)
    reach = math.ceil(_REACH * slower)
    first = np.floor(centres).astype(int) - reach
    out = np.zeros((n_new, data.shape[1]))
    total = np.zeros((n_new, 1))
    for offset in range(2 * reach + 2):
        index = first + offset
        distance = (index - centres) / slower
        weights = np.sinc(distance) * _kaiser(distance / (reach / slower))
        weights[(index < 0) | (index >= len(data))] = 0
        out += weights[:, None] * data[np.clip(index, 0, len(data) - 1)]
        total += weights[:, None]
    return (out / total).astype(np.float32)


def _kaiser(place: np.ndarray) -> np.ndarray:
    inside = np.clip(1 - place**2, 0, None)
    return np.where(np.abs(place) <= 1, np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA), 0.0)


# --- shards ------------------------------------------------------------------------------------------------


def _write_shards(
    folder: Path,
    roots: Sequence[Path],
    groups: Mapping[str, Sequence[NewRun]],
    manifest: CorpusManifest,
    sources: Sources,
    jobs: int,
    advance: Callable[[int, str], None],
) -> Iterator[list[Excluded]]:
    """Write shards, in this process or in several, and yield what could not be read of each once it is there."""
    if jobs == 1 or len(groups) < 2:
        for number, group in groups.items():
            yield write_shard(folder, number, group, manifest, advance)
        return
    # What reads a run cannot be sent to another process, so that each finds the runs for itself.
    about = (folder, [root.expanduser().absolute() for root in roots], manifest, sources)
    after = "Finished shards are kept: run the same command again, with fewer --jobs if memory ran out."
    with open_processes(min(jobs, len(groups)), "prepare runs", after, _find_ours, about) as pool:
        tasks = {
            pool.submit(_write_in_process, number, [(e.run_id, e.files, e.n_bytes) for e in group]): group
            for number, group in groups.items()
        }
        for task in as_completed(tasks):
            advance(len(tasks[task]), f"{len(tasks[task])} runs of a shard")
            yield task.result()


#: Of a process that writes shards: the corpus, its manifest and the runs by their ids.
_OURS: dict[str, Any] = {}


def _find_ours(folder: Path, roots: Sequence[Path], manifest: CorpusManifest, sources: Sources) -> None:
    runs = [run for _, found, _ in _find_all(roots, manifest, sources, None) for run in found]
    _OURS.update(folder=folder, manifest=manifest, runs={name_run(run): run for run in runs})


def _write_in_process(number: str, group: Sequence[tuple[str, str, int]]) -> list[Excluded]:
    runs = [NewRun(_OURS["runs"][run_id], run_id, files, n_bytes) for run_id, files, n_bytes in group]
    return write_shard(_OURS["folder"], number, runs, _OURS["manifest"])


class _NothingToWriteError(Exception):
    """No run of a shard could be read."""


def write_shard(
    folder: Path,
    number: str,
    group: Sequence[NewRun],
    manifest: CorpusManifest,
    advance: Callable[[int, str], None] = lambda n, text: None,
) -> list[Excluded]:
    """Write a shard, unless it is there, and return the runs that cannot be read."""
    config = manifest.config
    failed: list[Excluded] = []

    def compute(scratch: Path) -> None:
        rows: list[dict[str, Any]] = []
        n_values, dtype = 0, np.dtype(config.dtype)
        shape = (sum(entry.n_bytes for entry in group) // dtype.itemsize,)
        with ArrayFile(scratch / VALUES, shape, dtype) as file:
            for entry in group:
                run = entry.run
                try:
                    values, missing = prepare_run(run, config)
                except DataError as error:
                    failed.append(Excluded(run.files[0], str(error).rstrip(".")))
                    advance(1, f"left out {entry.run_id}")
                    continue
                digest = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).data)
                rows.append(_describe_run(entry, values, missing, n_values, digest, config))
                file.write(n_values, values)
                n_values += values.size
                advance(1, entry.run_id)
            file.shrink(n_values)
        if not rows:
            raise _NothingToWriteError
        write_json(scratch / RUNS, rows)

    with suppress(_NothingToWriteError):
        RunFolder(folder).produce(
            "shard", version=_VERSION, fields={"config": config.hashed_fields(), "channels": manifest.channels.digest},
            upstream={entry.run_id: entry.files for entry in group}, compute=compute, unit=number,
        )  # fmt: skip
    return failed


def _describe_run(
    entry: NewRun, values: np.ndarray, missing: tuple[str, ...], start: int, digest: str, config: CorpusConfig
) -> dict[str, Any]:
    run = entry.run
    return {
        "run_id": entry.run_id, "source": run.source, "subject": run.subject, "session": run.session, "run": run.run,
        "task": run.task, "site": run.site, "licence": run.licence, "n_times": len(values),
        "interval_s": find_interval(run, config), "recorded_s": run.interval_s,
        "motion_mm": run.motion_mm, "scrubbed": run.scrubbed,
        "start": start, "missing": missing, "files": entry.files, "digest": digest, "sketch": sketch_run(values),
    }  # fmt: skip
