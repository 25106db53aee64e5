"""The manifest of a corpus: settings and channels, shards and their runs, persons, and who is held out.

Owns ``corpus.json`` and the table of runs in each shard. Earlier states of the manifest are kept beside it, by their
digest, so that a pretraining continues with the corpus with which it began. Reads no samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.settings import describe_validation_error
from braindecode_vis.base.store import PROVENANCE, hash_json, read_json, read_provenance, write_json
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.datasets.corpus.recordings import Channels, Modality

MANIFEST = "corpus.json"
VALUES, RUNS = "values.npy", "runs.json"
_EARLIER = "earlier"
#: Values of a run that are kept to know it again, and their correlation from which on two runs are one recording:
#: noise of a tenth leaves .989; different recordings have .6 and less.
N_SKETCHED, COPY_CORRELATION = 64, 0.98
_FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A finished file of samples: its name, size (bytes of ``values.npy``) and the digests of its two files."""

    name: str
    n_bytes: int
    values: str
    runs: str


@dataclass(frozen=True)
class Source:
    """A root that was added: name of its data sets, its folder, and what was left out (file and reason).

    `is_whole` is false while its runs are written, and stays false if the writing was stopped.
    """

    names: tuple[str, ...]
    root: str
    added: str
    n_runs: int
    excluded: tuple[tuple[str, str], ...] = ()
    is_whole: bool = True


@dataclass(frozen=True)
class CorpusManifest:
    """The state of a corpus.

    Parameters
    ----------
    config, channels, modality
        Fixed when the first source was added.
    sources
        In the order of adding.
    subjects
        All subjects that were ever found, named by `name_subject`, in the order of adding.
    given
        Person of each subject, from tables of the user.
    links
        Pairs of subjects with the same recording.
    held_out
        Subjects whose person is held out.
    unused
        Runs that are stored but not read, as ``SHARD/RUN_ID``, with the reason.
    shards
        In the order of their names.
    """

    config: CorpusConfig
    channels: Channels
    modality: Modality
    sources: tuple[Source, ...] = ()
    subjects: tuple[str, ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()
    held_out: frozenset[str] = frozenset()
    unused: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    def compute_digest(self) -> str:
        """Return the facts that identify samples, persons and held-out persons; sources without runs do not count."""
        return hash_json(
            {
                "config": self.config.hashed_fields(),
                "channels": [self.channels.names, self.channels.digest],
                "people": self.name_people(),
                "held_out": sorted(self.held_out),
                "unused": sorted(self.unused),
                "shards": [[shard.name, shard.values, shard.runs] for shard in self.shards],
            }
        )

    def name_people(self) -> dict[str, str]:
        """Return the person of each subject: as given, else the first of the subjects with the same recordings.

        Raises
        ------
        DataError
            If two subjects have the same recording, but a table calls them different persons.
        """
        leader = {subject: subject for subject in self.subjects}

        def find(subject: str) -> str:
            while leader[subject] != subject:
                subject = leader[subject]
            return subject

        same: dict[str, str] = {}
        pairs = [*self.links, *((s, same.setdefault(p, s)) for s, p in self.given.items() if s in leader)]
        order = {subject: number for number, subject in enumerate(self.subjects)}
        for one, other in pairs:
            first, second = sorted((find(one), find(other)), key=order.__getitem__)
            leader[second] = first
        called: dict[str, str] = {}
        for subject in self.subjects:
            person = self.given.get(subject)
            if person is not None and called.setdefault(find(subject), person) != person:
                raise DataError(
                    f"the table of people calls {subject} {person!r}, but the same recording is of "
                    f"{called[find(subject)]!r}; give both the same name, or do not add the copy."
                )
        return {subject: called.get(find(subject), find(subject)) for subject in self.subjects}

    def find_held_out(self) -> set[str]:
        """Return the held-out persons: all with a held-out recording, under any of their names."""
        people = self.name_people()
        return {people[subject] for subject in self.held_out if subject in people}


def name_subject(source: str, subject: str) -> str:
    """Return the name of a subject of a data set."""
    return f"{source}/{subject}"


def write_manifest(folder: Path, manifest: CorpusManifest) -> str:
    """Write the manifest, and keep it under its digest, which is returned."""
    digest = manifest.compute_digest()
    channels = manifest.channels
    record = {
        "format": _FORMAT, "digest": digest, "modality": manifest.modality,
        "config": manifest.config.model_dump(mode="json"),
        "channels": {
            "names": channels.names, "networks": channels.networks, "coordinates": channels.coordinates,
            "digest": channels.digest,
        },
        "sources": [vars(source) for source in manifest.sources],
        "subjects": manifest.subjects, "given": dict(manifest.given), "links": manifest.links,
        "held_out": sorted(manifest.held_out), "unused": dict(manifest.unused),
        "shards": [vars(shard) for shard in manifest.shards],
    }  # fmt: skip
    # The copy is written first: from then on the corpus can be opened by this digest.
    (folder / _EARLIER).mkdir(exist_ok=True)
    write_json(folder / _EARLIER / f"{digest}.json", record)
    write_json(folder / MANIFEST, record)
    return digest


def forget_states(folder: Path, kept: Iterable[str]) -> None:
    """Remove the intermediate states of the manifest of a command, except for some digests."""
    for path in (folder / _EARLIER).glob("*.json"):
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def list_states(folder: Path) -> set[str]:
    """Return the digests of the states to keep: those that a command left when it ended, and the present one.

    A command that was killed leaves a state for each of its shards, each as large as the manifest.
    """
    present = read_manifest(folder).compute_digest() if (folder / MANIFEST).is_file() else ""
    found = {present}
    for path in (folder / _EARLIER).glob("*.json"):
        with suppress(DataError):  # whoever needs a damaged one gets an error
            if not all(source.is_whole for source in read_manifest(folder, path.stem).sources):
                continue
        found.add(path.stem)
    return found


def read_manifest(folder: Path, digest: str | None = None) -> CorpusManifest:
    """Read the current manifest, or the earlier one with the given digest.

    Raises
    ------
    DataError
        If there is none, or it is damaged.
    """
    path = folder / MANIFEST if digest is None else folder / _EARLIER / f"{digest}.json"
    if not path.is_file():
        if digest is not None:
            raise DataError(
                f"the corpus {folder} has no state {digest}: it was rebuilt, or opened before an "
                "addition had ended; start again with the present corpus."
            )
        raise DataError(
            f"{folder} is not a corpus (no {MANIFEST}); make one with braindecode-vis corpus {folder} --add ROOT."
        )
    record = read_json(path)
    try:
        if record["format"] > _FORMAT:
            raise DataError(f"{path} was written by a later version of this package; update it.")
        manifest = _parse(record)
    except ValidationError as error:
        raise DataError(f"{path} is damaged ({describe_validation_error(error)}).") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    if manifest.compute_digest() != record["digest"] or digest not in (None, record["digest"]):
        raise DataError(
            f"{path} was changed by hand: its digest does not match its content; restore the original file."
        )
    return manifest


def _parse(record: Mapping[str, Any]) -> CorpusManifest:
    about = record["channels"]
    coordinates = about["coordinates"]
    if record["modality"] not in get_args(Modality):
        raise ValueError(f"modality {record['modality']!r}")
    return CorpusManifest(
        config=CorpusConfig.model_validate(record["config"]),
        channels=Channels(
            tuple(about["names"]), tuple(about["networks"]),
            None if coordinates is None else np.asarray(coordinates, np.float64), about["digest"],
        ),
        modality=record["modality"],
        sources=tuple(
            Source(**{**s, "names": tuple(s["names"]), "excluded": tuple(map(tuple, s["excluded"]))})
            for s in record["sources"]
        ),
        subjects=tuple(record["subjects"]), given=dict(record["given"]),
        links=tuple((one, other) for one, other in record["links"]),
        held_out=frozenset(record["held_out"]), unused=dict(record["unused"]),
        shards=tuple(Shard(**shard) for shard in record["shards"]),
    )  # fmt: skip


def find_shard(folder: Path, name: str) -> Path:
    """Return the folder of a shard."""
    return folder / "stages" / "shard" / name


def take_up_shards(folder: Path, manifest: CorpusManifest) -> CorpusManifest:
    """Return the manifest with all finished shards on disk; the process may have been killed before it listed them.

    Runs that are stored twice are left unused: of one recording that has changed, the earlier ones; of the remaining
    runs with the same or nearly the same samples, the later one, and their subjects become one person.
    """
    known = {shard.name for shard in manifest.shards}
    shards = list(manifest.shards)
    for path in (folder / "stages" / "shard").glob(f"[!.]*/{PROVENANCE}"):
        if path.parent.name not in known:
            files = read_provenance(path)["files"]
            (n_bytes, values), (_, runs) = files[VALUES], files[RUNS]
            shards.append(Shard(path.parent.name, n_bytes, values, runs))
    if len(shards) == len(known):
        return manifest
    return settle_runs(folder, replace(manifest, shards=tuple(sorted(shards, key=lambda shard: shard.name))))


def settle_runs(folder: Path, manifest: CorpusManifest) -> CorpusManifest:
    """Return the manifest with `unused`, `links` and `subjects` updated for the runs of its shards."""
    rows = read_rows(folder, manifest.shards)
    first: dict[str, dict[str, Any]] = {}
    last = {row["run_id"]: row["shard"] for row in rows}
    unused: dict[str, str] = {}
    links = dict.fromkeys(manifest.links)
    subjects = dict.fromkeys(manifest.subjects)
    nearly = find_copied_runs(rows)
    for number, row in enumerate(rows):
        place = f"{row['shard']}/{row['run_id']}"
        subject = name_subject(row["source"], row["subject"])
        subjects[subject] = None
        if last[row["run_id"]] != row["shard"]:
            unused[place] = "replaced, as its files have changed"
            continue
        known, words = first.setdefault(row["digest"], row), "the same"
        if known is row:  # a replaced run is no copy: the earlier file of it was changed
            copies = (rows[other] for other in nearly.get(number, ()))
            known = next((copy for copy in copies if last[copy["run_id"]] == copy["shard"]), row)
            words = "nearly the same"
        if known is not row:
            unused[place] = f"{words} samples as {known['run_id']}"
            other = name_subject(known["source"], known["subject"])
            if other != subject:
                links[other, subject] = None
    return replace(manifest, unused=unused, links=tuple(links), subjects=tuple(subjects))


def sketch_run(values: np.ndarray) -> list[float]:
    """Return a few values of a run by which it is known again at another gain, and with a little noise.

    Parameters
    ----------
    values : array of shape (n_times, n_present)
    """
    flat = values.reshape(-1)
    picked = np.asarray(flat[np.random.default_rng(0).integers(flat.size, size=N_SKETCHED)], dtype=np.float64)
    picked -= picked.mean()
    return [round(float(value), 4) for value in picked / max(float(np.linalg.norm(picked)), 1e-12)]


def find_copied_runs(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Return the earlier runs of which a run is a copy, by the place of both.

    Runs of one length and the same channels are compared by their sketches, which stored runs of earlier versions do
    not have.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if "sketch" in row:
            groups.setdefault((row["n_times"], *row["missing"]), []).append(number)
    found: dict[int, list[int]] = {}
    for places in groups.values():
        sketches = np.array([rows[place]["sketch"] for place in places], np.float32)
        for start in range(0, len(places), 1024):
            close = sketches[start : start + 1024] @ sketches[start:].T
            for one, other in np.argwhere(close > COPY_CORRELATION):
                if one < other:
                    found.setdefault(places[start + other], []).append(places[start + one])
    return found


def read_rows(folder: Path, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return one row per run of some shards, in their order, with the name of its shard."""
    rows: list[dict[str, Any]] = []
    for shard in shards:
        path = find_shard(folder, shard.name) / RUNS
        if not path.is_file():
            raise DataError(
                f"{path} is missing; the corpus {folder} is incomplete, so restore the file or build the "
                "corpus again."
            )
        rows += [{**row, "shard": shard.name} for row in read_json(path)]
    return rows
