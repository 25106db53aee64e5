"""The rows that pretraining reads: trials of a run, or windows of one or several corpora.

Owns which rows learn and which only measure, of whom each row is, and in what order batches come; a row is a number.
Stimuli are read to keep repetitions of an image on one side of the hold-out, and where masks are guided by what was
seen; test trials and, of a corpus, persons that it holds out are never learnt from. Knows no network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError, refuse_damage
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import open_tensors
from braindecode_vis.encoders.parcels_config import WEIGHTS, read_description
from braindecode_vis.encoders.signal import Signal, describe_signal
from braindecode_vis.training.pretraining_config import PretrainConfig

if TYPE_CHECKING:
    from braindecode_vis.datasets.corpus.reader import Corpus, Windows

NEVER_READ = ("test",)
#: Windows of a corpus that say what its mean, its deviation and its held-out error are: enough for three digits.
N_MEASURED, N_HELD_OUT = 4096, 2048


@dataclass(frozen=True)
class Rows:
    """What was read of some rows.

    Parameters
    ----------
    data : array of shape (n_rows, n_parcels) or (n_rows, n_parcels, n_times)
    interval : float32 array of shape (n_rows,) or None
        Seconds between samples; None if all have that of the signal.
    observed : boolean array of shape (n_rows, n_parcels) or None
        Which parcels have data; None if all have.
    """

    data: np.ndarray
    interval: np.ndarray | None = None
    observed: np.ndarray | None = None


class Material(Protocol):
    """What the loop asks of its data."""

    signal: Signal
    train: np.ndarray  # rows that learn, ascending
    measured: np.ndarray  # those of them that statistics are of
    held_out: np.ndarray  # rows that only measure
    person: np.ndarray  # number of the person of each row
    run: np.ndarray  # number of the run of each row

    def read(self, rows: np.ndarray) -> Rows:
        """Read some rows."""

    def list_images(self, rows: np.ndarray) -> np.ndarray:
        """Return the stimulus id of each of some rows, for masks that are guided by what was seen."""

    def make_batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Return the rows of each batch of an epoch."""

    def identify(self) -> Any:
        """Return plain values that distinguish these rows from others."""

    def describe(self) -> list[dict[str, Any]]:
        """Return what is written down about the corpora; nothing for a run."""

    def verify(self) -> None:
        """Raise `DataError` if what lies on disk has changed."""


class ResponseRows:
    """Trials of a run, possibly a memory map of which only the rows of a batch are read.

    Parameters
    ----------
    responses
        Rows whose split is ``test`` are never read.
    config
        Says what is held out.
    seed
        Root of the hold-out.
    """

    def __init__(self, responses: Responses, config: PretrainConfig, seed: int) -> None:
        self.data = responses.data
        self.train, self.held_out = split_rows(responses, config, seed)
        self.measured = self.train
        self.signal = describe_signal(responses.select(self.train[:1]))
        trials = responses.trials
        self.person = trials.groupby("subject", sort=True, dropna=False).ngroup().to_numpy()
        runs = ["subject", "session", "run"]
        self.run = trials.groupby(runs, sort=True, dropna=False).ngroup().to_numpy()
        self._images = responses.stimulus_ids

    def read(self, rows: np.ndarray) -> Rows:
        """Read some trials."""
        return Rows(np.asarray(self.data[rows]))

    def list_images(self, rows: np.ndarray) -> np.ndarray:
        """Return the stimulus id of each of some trials."""
        return np.asarray(self._images[rows])

    def make_batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Return every training trial once, in batches."""
        order = make_generator(seed, "pretrain", "order", epoch).permutation(self.train)
        # Ascending within a batch, as a memory map is read fastest.
        return [np.sort(order[i : i + size]) for i in range(0, len(order), size)]

    def identify(self) -> Any:
        """Return the rows."""
        return [self.train.tolist(), self.held_out.tolist()]

    def describe(self) -> list[dict[str, Any]]:
        """Return nothing: the run says what its data are."""
        return []

    def verify(self) -> None:
        """Do nothing: the store keeps responses as they are."""


class CorpusRows:
    """Windows of corpora; rows are counted through the training windows of all, then through the held-out ones.

    Parameters
    ----------
    corpora
        At least one; all with the same channels.
    config
        Says how long windows are and whether intervals may differ.
    seed
        Decides which windows statistics and the held-out error are of, where there are very many.

    Raises
    ------
    ConfigError, DataError
        If channels or intervals differ, a window is longer than every run, or nobody is held out.
    """

    def __init__(self, corpora: Sequence[Corpus], config: PretrainConfig, seed: int) -> None:
        self.corpora = list(corpora)
        first = self.corpora[0]
        for other in self.corpora[1:]:
            _check_same_channels(first, other)
        n_times, step = config.window_times, config.window_step
        self.parts: list[Windows] = [c.windows(n_times, step, "train") for c in self.corpora]
        self.n_learning = len(self.parts)
        for corpus in self.corpora:
            if not corpus.runs["held_out"].any():
                raise DataError(
                    f"the corpus {corpus.folder} holds no person out, so generalisation to new persons "
                    "could not be measured; hold some out with `corpus --hold-out`."
                )
        _check_held_out(self.corpora)
        self.parts += [c.windows(n_times, step, "held_out") for c in self.corpora]
        self.ends = np.cumsum([len(part) for part in self.parts])
        n_train = int(self.ends[self.n_learning - 1])
        self.train = np.arange(n_train)
        self.measured = _choose(self.train, N_MEASURED, seed, "measured")
        self.held_out = _choose(np.arange(n_train, int(self.ends[-1])), N_HELD_OUT, seed, "held_out")
        # One person in two corpora is one, by the name that the corpora give.
        self.persons, self.person = _count(np.concatenate([part.person for part in self.parts]))
        # Runs of two corpora never share a number, whatever they are called there.
        names = [
            np.char.add(f"{i % self.n_learning}/", part.run_id.astype(str))
            for i, part in enumerate(self.parts)
        ]
        self.run = _count(np.concatenate(names))[1]
        self.interval = np.concatenate([part.interval_s for part in self.parts]).astype(np.float32)
        known = {corpus.interval_s for corpus in self.corpora}
        self.told = config.encoder.time_position == "seconds"
        if not self.told and (None in known or len(known) > 1):
            low, high = float(self.interval.min()), float(self.interval.max())
            raise ConfigError(
                f"samples of these corpora lie {low:g} to {high:g} s apart; set "
                "encoder.time_position=seconds, or build a corpus with time=resample."
            )
        self.signal = _describe_corpus(first, n_times)

    def read(self, rows: np.ndarray) -> Rows:
        """Read some windows."""
        data = np.empty((len(rows), *self.signal.shape), np.float32)
        observed = np.empty((len(rows), self.signal.shape[0]), bool)
        of = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(of):
            here = of == number
            part = self.parts[number]
            own = rows[here] - (self.ends[number] - len(part))
            data[here], observed[here] = part.read(own), part.observed(own)
        interval = self.interval[rows] if self.told else None
        return Rows(data, interval, None if observed.all() else observed)

    def list_images(self, rows: np.ndarray) -> np.ndarray:
        """Raise `ConfigError`: nobody says what was seen in a window of a corpus."""
        raise ConfigError("windows of a corpus have no images; leave pretrain.guide out.")

    def make_batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Return every training window once, each batch of one corpus, batches of all corpora mixed."""
        batches: list[np.ndarray] = []
        for number, part in enumerate(self.parts[: self.n_learning]):
            start = self.ends[number] - len(part)
            batches += [start + rows for rows in part.iterate(size, seed=seed, epoch=epoch)]
        if self.n_learning == 1:
            return batches
        order = make_generator(seed, "pretrain", "order", epoch).permutation(len(batches))
        return [batches[i] for i in order]

    def identify(self) -> Any:
        """Return the digests of the corpora and the numbers of windows."""
        return [[c.digest for c in self.corpora], self.ends.tolist()]

    def describe(self) -> list[dict[str, Any]]:
        """Return of each corpus its name, digest, hours, sites, licences and who is in it, trained on and held out."""
        found = []
        for corpus in self.corpora:
            runs = corpus.runs
            out = runs["held_out"].to_numpy(bool)
            found.append(
                {
                    "name": corpus.folder.name,
                    "digest": corpus.digest,
                    "hours": round(float(runs["hours"][~out].sum()), 3),
                    "n_persons": int(runs["person"][~out].nunique()),
                    "sites": sorted({str(s) for s in runs["site"]}),
                    "sources": sorted({str(s) for s in runs["source"]}),
                    "persons": sorted({str(p) for p in runs["person"][~out]}),
                    "held_out_persons": sorted({str(p) for p in runs["person"][out]}),
                    "subjects": corpus.list_subjects(),
                }
            )
        return found

    def verify(self) -> None:
        """Raise `DataError` if a corpus on disk is no longer the one that was opened."""
        for corpus in self.corpora:
            corpus.verify()


def open_material(config: PretrainConfig, responses: Responses | None, seed: int) -> Material:
    """Return the windows of the corpora that the settings name, or the trials of a run where they name none."""
    if config.corpus:
        from braindecode_vis.datasets.corpus.reader import open_corpus

        # As they were when the settings were read: they may have grown since. The reader says which folder is none.
        digests = config.corpus_digests or (None,) * len(config.corpus)
        pairs = zip(config.corpus, digests, strict=True)
        return CorpusRows([open_corpus(Path(folder), digest) for folder, digest in pairs], config, seed)
    assert responses is not None
    return ResponseRows(responses, config, seed)


def split_rows(responses: Responses, config: PretrainConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that train and those that are held out, ascending; a group is never on both sides.

    Raises
    ------
    DataError
        If there are no rows outside the test split, or fewer than two groups.
    """
    trials = responses.trials
    # By the column, before anything of these rows is read.
    allowed = np.flatnonzero(~trials["split"].isin(NEVER_READ).to_numpy())
    if not len(allowed):
        raise DataError(
            "every trial belongs to the test split; pretraining needs training trials or unlabelled runs."
        )
    # Neighbouring windows of a run resemble each other, as repetitions of an image do: groups stay whole.
    columns = {"stimulus": ["stimulus_id"], "run": ["subject", "session", "run"]}.get(config.hold_out_by)
    group: np.ndarray
    if columns is None:
        group = np.arange(len(allowed))
    else:
        group = trials.iloc[allowed].groupby(columns, sort=True, dropna=False).ngroup().to_numpy()
    n_groups = int(group.max()) + 1
    n_held_out = max(1, round(config.held_out * n_groups))
    if n_held_out >= n_groups:
        raise DataError(
            f"the training trials fall into {n_groups} group(s) by {config.hold_out_by}, so none would "
            "be left for the training; lower pretrain.held_out or set pretrain.hold_out_by=trial."
        )
    chosen = make_generator(seed, "pretrain", "held_out").permutation(n_groups)[:n_held_out]
    is_out = np.isin(group, chosen)
    return allowed[~is_out], allowed[is_out]


class WindowPartners:
    """For each window another one of the same person, of another run where there is one.

    Parameters
    ----------
    rows : integer array
        Among which partners are looked for.
    person, run : integer arrays
        Of every row there is, by its number.
    """

    def __init__(self, rows: np.ndarray, person: np.ndarray, run: np.ndarray) -> None:
        order = np.lexsort((rows, run[rows], person[rows]))
        self.sorted = rows[order]
        self.person, self.run = person[self.sorted], run[self.sorted]
        self._all_person, self._all_run = person, run

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return a partner of each of some rows, all among those of the constructor."""
        person, run = self._all_person[rows], self._all_run[rows]
        low, high = (np.searchsorted(self.person, person, side=side) for side in ("left", "right"))
        # Within a person rows lie run by run, and runs are numbered once for all persons.
        key = self.person.astype(np.int64) * (int(self.run.max()) + 1) + self.run
        wanted = person.astype(np.int64) * (int(self.run.max()) + 1) + run
        first, last = (np.searchsorted(key, wanted, side=side) for side in ("left", "right"))
        others = (high - low) - (last - first)
        share = generator.random(len(rows))
        place = low + np.floor(share * np.maximum(others, 1)).astype(np.int64)
        place = np.where(place >= first, place + (last - first), place)  # pass over the own run
        # A person with one run: another window of it, or, if it has but one, the same window with another mask.
        n_own = last - first
        own = first + np.floor(share * np.maximum(n_own - 1, 1)).astype(np.int64)
        is_self = (self.sorted[np.minimum(own, last - 1)] == rows) & (n_own > 1)
        own = np.minimum(np.where(is_self, last - 1, own), last - 1)
        return self.sorted[np.where(others > 0, place, own)]


def _check_same_channels(one: Corpus, other: Corpus) -> None:
    if one.channels == other.channels:
        return
    if len(one.channels) != len(other.channels):
        difference = f"{len(one.channels)} and {len(other.channels)}"
    else:
        place = next(
            i for i, pair in enumerate(zip(one.channels, other.channels, strict=True)) if len({*pair}) > 1
        )
        difference = f"number {place} is {one.channels[place]} and {other.channels[place]}"
    raise ConfigError(
        f"the corpora {one.folder} and {other.folder} have different channels ({difference}); pretrain "
        "on corpora with the same channels."
    )


def _check_held_out(corpora: Sequence[Corpus]) -> None:
    """Raise `ConfigError` if a person or a recording that one corpus holds out is trained on in another."""
    for one in corpora:
        held = one.list_subjects(held_out=True)
        names = {row["person"] for row in held} | {f"{row['source']}/{row['subject']}" for row in held}
        samples = set(one.runs["digest"][one.runs["held_out"].to_numpy(bool)])
        for other in corpora:
            if other is one:
                continue
            same = other.runs["digest"].isin(samples) & ~other.runs["held_out"].to_numpy(bool)
            persons = set(other.runs["person"][same])
            for row in other.list_subjects():
                name = f"{row['source']}/{row['subject']}"
                if row["person"] in persons or {row["person"], name} & names:
                    raise ConfigError(
                        f"the corpus {one.folder} holds {row['person']} out, but {other.folder} trains on recordings "
                        f"of that person; hold out there too (corpus {other.folder} --hold-out {name})."
                    )


def read_start(start: Path) -> dict[str, Any]:
    """Return what is known of an earlier encoder: ``encoder.json``, or the state of a checkpoint.

    Parameters
    ----------
    start
        Folder of an earlier pretraining, or its file of weights or checkpoint.
    """
    file = start.expanduser()
    known = read_description(file)
    # A torch file, which is somebody else's, names nobody.
    if file.suffix == ".safetensors" and file.name != WEIGHTS and file.is_file():
        with refuse_damage(f"{file} cannot be read"), open_tensors(file) as opened:
            known = json.loads((opened.metadata() or {}).get("state", "{}"))
    return known


def read_learnt(start: Path) -> list[dict[str, Any]]:
    """Return what is known of the corpora that an earlier encoder learnt from, those before it included."""
    known = read_start(start)
    return [*known.get("corpora", []), *known.get("earlier_corpora", [])]


def _describe_corpus(corpus: Corpus, n_times: int) -> Signal:
    networks = corpus.networks if all(corpus.networks) else ()
    names: dict[str, Any] = {"ch_pos": corpus.coordinates, "networks": tuple(networks)}
    names["parcels" if corpus.modality == "fmri" else "ch_names"] = tuple(corpus.channels)
    return Signal(
        dims=("parcel" if corpus.modality == "fmri" else "channel", "time"),
        shape=(len(corpus.channels), n_times),
        subjects=(),
        sfreq=None if corpus.interval_s is None else 1 / corpus.interval_s,
        **names,
    )


def _choose(rows: np.ndarray, n: int, seed: int, name: str) -> np.ndarray:
    if len(rows) <= n:
        return rows
    return np.sort(make_generator(seed, "pretrain", name).choice(rows, n, replace=False))


def _count(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different names, ascending, and the number of each entry's."""
    unique, number = np.unique(names, return_inverse=True)
    return unique, number
