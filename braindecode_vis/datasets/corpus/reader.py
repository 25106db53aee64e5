"""Reading a corpus: its table of runs, and windows of them, streamed from memory maps in a shuffled order.

Owns the order of the windows (the same for any number of processes). Only a few shards are open at a time, so that
memory does not grow with the corpus.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.base.checks import NUMPY_ERRORS, DataError, Notice, check_option
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.corpus.manifest import (
    RUNS,
    VALUES,
    CorpusManifest,
    find_shard,
    name_subject,
    read_manifest,
    read_rows,
)

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["train", "held_out", "all"]
#: Shards whose windows are shuffled together, and that are open at once.
POOL_SHARDS = 8


class Corpus:
    """A prepared corpus; made by `open_corpus`.

    Attributes
    ----------
    folder : Path
        Its folder.
    manifest : Manifest
        Its settings, shards and persons.
    digest : str
        Digest of the manifest: settings, samples, persons and held-out persons.
    modality : str
        ``fmri``, ``eeg`` or ``meg``.
    channels, networks : tuple of str
        Name and network of each channel (empty text if unknown).
    coordinates : array of shape (n_channels, 3) or None
        As in `recordings.Channels`.
    interval_s : float or None
        Time between two samples (s); None if it differs between runs.
    runs : DataFrame
        One row per run: `run_id`, `source`, `subject`, `person`, `session`, `run`, `task`, `site`, `licence`,
        `n_times`, `interval_s`, `hours`, `motion_mm` (mm, NaN if unknown), `scrubbed` (share), `shard`, `start` (place
        of its first number in the shard), `missing` (tuple of channel names), `held_out` and `digest`.
    """

    def __init__(self, folder: Path, manifest: CorpusManifest) -> None:
        self.folder, self.manifest, self.config = folder, manifest, manifest.config
        self.digest = manifest.compute_digest()
        self.modality = manifest.modality
        self.channels, self.networks = manifest.channels.names, manifest.channels.networks
        self.coordinates = manifest.channels.coordinates
        self.runs = _make_table(folder, manifest)
        intervals = self.runs["interval_s"].unique()
        same = len(intervals) and np.allclose(intervals, intervals[0], rtol=1e-6)
        self.interval_s = float(intervals[0]) if same else None

    def windows(self, n_times: int, step: int | None = None, part: Part = "train") -> Windows:
        """Return the windows of the runs of a part.

        Parameters
        ----------
        n_times
            Samples of a window.
        step
            Samples from one window of a run to the next; `n_times` by default, so that none overlap.
        part
            Runs of training persons (``train``), of held-out persons (``held_out``), or ``all``.

        Raises
        ------
        DataError
            If no run is as long as a window, or no person is in this part.
        """
        check_option("part", part, ("train", "held_out", "all"))
        if n_times < 1 or (step is not None and step < 1):
            raise DataError(
                f"a window of {n_times} samples every {step} cannot be cut; both must be 1 or more."
            )
        runs = self.runs
        if part != "all":
            runs = runs[runs["held_out"] == (part == "held_out")]
        if runs.empty:
            raise DataError(
                f"the corpus {self.folder} has no run of the part {part}; hold out other persons with braindecode-vis "
                f"corpus {self.folder} --hold-out, or add more."
            )
        if runs["n_times"].max() < n_times:
            longest = runs.iloc[int(runs["n_times"].argmax())]
            raise DataError(
                f"no run of the corpus {self.folder} (part {part}) has at least {n_times} samples, the "
                "length of a window; the "
                f"longest is {longest['run_id']} with {longest['n_times']}, so take shorter windows."
            )
        return Windows(self, runs.reset_index(drop=True), n_times, step or n_times)

    def list_subjects(self, *, held_out: bool = False) -> list[dict[str, str]]:
        """Return `source`, `subject` and `person` of all training or held-out persons, with each of their names.

        A subject whose recordings are copies of another subject's has no runs, but is the same person.
        """
        there = set(self.runs["person"][self.runs["held_out"] == held_out])
        found = []
        for name, person in self.manifest.name_people().items():
            source, _, subject = name.rpartition("/")
            if person in there:
                found.append({"source": source, "subject": subject, "person": person})
        return found

    def verify(self, *, read: bool = False) -> None:
        """Raise `DataError` if the samples or tables on disk have changed since they were opened.

        Sources that were added meanwhile change none of them: the open state stays, and `open_corpus` finds it again by
        its digest. Only the states in the middle of an addition are removed at its end.

        Parameters
        ----------
        read
            Whether this process must have read all bytes itself, once; otherwise only files are read whose size, times
            or inode have changed since the last reading.
        """
        wanted: dict[str, tuple[Path, str]] = {}
        for shard in self.manifest.shards:
            place = find_shard(self.folder, shard.name)
            for name, digest in ((VALUES, shard.values), (RUNS, shard.runs)):
                wanted[f"{shard.name}/{name}"] = (place / name, digest)
        gone = [name for name, (path, _) in wanted.items() if not path.is_file()]
        found = {} if gone else digest_files({name: path for name, (path, _) in wanted.items()}, read=read)
        for name in gone or [name for name, (_, digest) in wanted.items() if found[name] != digest]:
            raise DataError(
                f"the corpus {self.folder} has changed: {name} is "
                f"{'missing' if gone else 'not as it was written'}; restore the shard, or build the corpus "
                "again and start again."
            )


class Windows:
    """Windows of a corpus; made by `Corpus.windows`.

    Attributes
    ----------
    corpus : Corpus
        Corpus from which they are read.
    n_times : int
        Samples of each window.
    person, site, run_id : arrays of text of shape (n_windows,)
        Person, site and run of each window.
    interval_s : array of shape (n_windows,)
        Time between two samples of the window (s).
    start_s : array of shape (n_windows,)
        Start of the window after the start of its run (s).
    n_short : int
        Number of runs that are shorter than a window.
    """

    def __init__(self, corpus: Corpus, runs: pd.DataFrame, n_times: int, step: int) -> None:
        self.corpus, self.n_times = corpus, n_times
        lengths = runs["n_times"].to_numpy()
        counts = np.where(lengths >= n_times, (lengths - n_times) // step + 1, 0)
        self.n_short = int((counts == 0).sum())
        self._runs = runs
        self._run = np.repeat(np.arange(len(runs), dtype=np.int32), counts)
        firsts = np.cumsum(counts) - counts
        self._start = (np.arange(counts.sum()) - firsts[self._run]) * step  # sample of the run
        self.interval_s = runs["interval_s"].to_numpy(np.float64)[self._run]
        self.start_s = self._start * self.interval_s
        self._shard_names, shard_of_run = np.unique(runs["shard"].to_numpy(str), return_inverse=True)
        self._shard_of_run = shard_of_run
        self._shard = shard_of_run[self._run]
        # Many runs share few sets of channels: (n_sets, n_channels) and the set of each run.
        sets = {missing: number for number, missing in enumerate(dict.fromkeys(runs["missing"]))}
        self._masks = np.array([[name not in set(m) for name in corpus.channels] for m in sets])
        self._mask_of_run = np.array([sets[missing] for missing in runs["missing"]])
        self._columns = [np.flatnonzero(mask) for mask in self._masks]
        self._place = runs["start"].to_numpy(np.int64)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._run)

    @cached_property
    def person(self) -> np.ndarray:
        """Person of each window."""
        return self._look_up("person")

    @cached_property
    def site(self) -> np.ndarray:
        """Site of each window."""
        return self._look_up("site")

    @cached_property
    def run_id(self) -> np.ndarray:
        """Run of each window."""
        return self._look_up("run_id")

    def _look_up(self, column: str) -> np.ndarray:
        return self._runs[column].to_numpy(object)[self._run]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return samples as float32 of shape (n_rows, n_channels, n_times); missing channels are 0.

        Raises
        ------
        DataError
            If a shard is missing or too short.
        """
        rows = np.asarray(rows)
        out = np.zeros((len(rows), len(self.corpus.channels), self.n_times), np.float32)
        runs = self._run[rows]
        starts = self._start[rows]
        # Read in the order of the files, for any requested order.
        for i in np.lexsort((starts, self._place[runs], self._shard_of_run[runs])).tolist():
            run = runs[i]
            columns = self._columns[self._mask_of_run[run]]
            first = int(self._place[run] + starts[i] * len(columns))
            block = self._map(self._shard_of_run[run])[first : first + self.n_times * len(columns)]
            if len(block) < self.n_times * len(columns):
                raise DataError(
                    f"the shard {self._shard_names[self._shard_of_run[run]]} of {self.corpus.folder} is too short for "
                    f"{self._runs['run_id'].iloc[run]}: the corpus has changed since it was opened."
                )
            series = block.reshape(self.n_times, len(columns)).T  # (n_present, n_times)
            if len(columns) == out.shape[1]:
                out[i] = series
            else:
                out[i, columns] = series
        return out

    def observed(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each channel was recorded, bool of shape (n_rows, n_channels)."""
        return self._masks[self._mask_of_run[self._run[np.asarray(rows)]]]

    def iterate(self, batch_size: int, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of an epoch: shuffled over shards, and within a pool of a few shards.

        Every process is given the same batches and takes its share of each. The last one may be smaller.

        Parameters
        ----------
        batch_size
            Windows of a batch, over all processes.
        seed, epoch
            Both determine the order.
        """
        generator = make_generator(seed, "corpus", "order", epoch)
        order = generator.permutation(len(self._shard_names))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        # After this sorting, windows of one shard are neighbours: the start of each shard.
        by_shard = np.argsort(rank[self._shard], kind="stable")
        ends = np.searchsorted(
            rank[self._shard][by_shard], np.arange(0, len(order), POOL_SHARDS) + POOL_SHARDS
        )
        left = by_shard[:0]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            # The remaining windows of a pool start the first batch of the next one.
            rows = np.concatenate([left, generator.permutation(by_shard[start:end])])
            n_whole = len(rows) if end == len(by_shard) else len(rows) // batch_size * batch_size
            for first in range(0, n_whole, batch_size):
                yield rows[first : min(first + batch_size, n_whole)]
            left = rows[n_whole:]

    def _map(self, shard: int) -> np.ndarray:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = find_shard(self.corpus.folder, str(self._shard_names[shard])) / VALUES
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, *NUMPY_ERRORS) as error:
            raise DataError(
                f"{path} cannot be read ({error}): the corpus has changed since it was opened."
            ) from error
        # A batch may reach over two pools.
        while len(self._open) > 2 * POOL_SHARDS:
            self._open.popitem(last=False)
        self._open[shard] = values
        return values


def open_corpus(folder: Path, digest: str | None = None) -> Corpus:
    """Open a corpus.

    Parameters
    ----------
    folder
        Its folder.
    digest
        Digest of an earlier state, before sources were added; by default the current state.

    Raises
    ------
    DataError
        If there is no corpus, it is damaged, or nothing was added yet.

    Warns
    -----
    Notice
        If an addition was stopped before its end.
    """
    folder = folder.expanduser().absolute()
    manifest = read_manifest(folder, digest)
    corpus = Corpus(folder, manifest)
    if corpus.runs.empty:
        raise DataError(
            f"the corpus {folder} holds no run; add a source with braindecode-vis corpus {folder} --add ROOT."
        )
    if stopped := [source.root for source in manifest.sources if not source.is_whole]:
        warnings.warn(
            f"the corpus {folder} is not complete: the addition of {stopped[0]} was stopped, or is at work; give the "
            "command that adds it again.",
            Notice,
            stacklevel=2,
        )
    return corpus


_TEXTS = ("run_id", "source", "subject", "session", "run", "task", "site", "licence", "shard", "digest")


def _make_table(folder: Path, manifest: CorpusManifest) -> pd.DataFrame:
    import pandas as pd

    people, held = manifest.name_people(), manifest.find_held_out()
    rows = [
        row
        for row in read_rows(folder, manifest.shards)
        if f"{row['shard']}/{row['run_id']}" not in manifest.unused
    ]
    table = pd.DataFrame({name: np.array([row[name] for row in rows], object) for name in _TEXTS})
    for name in ("n_times", "start"):
        table[name] = np.array([row[name] for row in rows], np.int64)
    for name in ("interval_s", "motion_mm", "scrubbed"):
        table[name] = np.array([np.nan if row[name] is None else row[name] for row in rows], np.float64)
    table["missing"] = [tuple(row["missing"]) for row in rows]
    table["hours"] = table["n_times"] * table["interval_s"] / 3600
    table["person"] = [people[name_subject(row["source"], row["subject"])] for row in rows]
    table["held_out"] = [person in held for person in table["person"]]
    return table
