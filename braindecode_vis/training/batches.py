"""Which trials stand in which batch, and how they get to the device.

Owns the units of training (a trial, or an image with all its repetitions), the order of every epoch as a pure function
of the seed and the number of the epoch, the draw of repetitions, and the reading: from tensors on the device where the
data fit, otherwise batch by batch in ascending row order by a thread that reads ahead. Both ways give the same numbers.

Last batch: an epoch is dealt into ``ceil(n / batch_size)`` batches whose sizes differ by one at most, so that no trial
is dropped and no batch is much smaller than the others. With several processes every batch is a multiple of their
number, which leaves out fewer trials per epoch than there are processes, others in every epoch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from braindecode_vis.checks import DataError
from braindecode_vis.seeds import make_generator

READ_AHEAD = 2  # batches that wait for the device


@dataclass(frozen=True)
class Units:
    """What the rows of a batch stand for.

    Parameters
    ----------
    trials : int array of shape (n_units, most_repetitions)
        Trials of each unit, the first `counts` entries of its row.
    counts, subjects, stimuli, concepts : int arrays of shape (n_units,)
        Number of trials, and index of the unit's subject, image and concept.
    """

    trials: np.ndarray
    counts: np.ndarray
    subjects: np.ndarray
    stimuli: np.ndarray
    concepts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)


def make_units(
    rows: np.ndarray, subjects: np.ndarray, stimuli: np.ndarray, concepts: np.ndarray, *, by_image: bool
) -> Units:
    """Return one unit per trial, or per subject and image.

    Parameters
    ----------
    rows
        Trials to use, ascending.
    subjects, stimuli, concepts : int arrays of shape (n_trials,)
        Index of each trial of the whole table.
    by_image
        Put the repetitions that one subject saw of an image together.
    """
    if not by_image:
        return Units(
            rows[:, None], np.ones(len(rows), dtype=np.int64), subjects[rows], stimuli[rows], concepts[rows]
        )
    keys = pd.MultiIndex.from_arrays([subjects[rows], stimuli[rows]])
    codes, _ = pd.factorize(keys)
    counts = np.bincount(codes)
    trials = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
    order = np.argsort(codes, kind="stable")
    starts = np.cumsum(counts) - counts
    trials[codes[order], np.arange(len(rows)) - starts[codes[order]]] = rows[order]
    first = trials[:, 0]
    return Units(trials, counts, subjects[first], stimuli[first], concepts[first])


def count_batches(n_units: int, batch_size: int, n_processes: int = 1) -> int:
    """Return the number of batches of an epoch; see `deal_epoch`."""
    return -(-(n_units // n_processes) // (batch_size // n_processes))


def deal_epoch(
    stimuli: np.ndarray, batch_size: int, *, seed: int, epoch: int, n_processes: int = 1
) -> list[np.ndarray]:
    """Return the units of each batch of one epoch, shuffled.

    A batch that would show one image alone trades a unit with another batch, since it has no negative.

    Parameters
    ----------
    stimuli : int array of shape (n_units,)
    batch_size
        Largest batch over all processes together.
    seed, epoch
        Decide the order.
    n_processes
        Each batch is a multiple of this, so that every process gets as many units.
    """
    order = make_generator(seed, "order", epoch).permutation(len(stimuli))
    n_shared = len(order) // n_processes
    parts = np.array_split(np.arange(n_shared), count_batches(len(order), batch_size, n_processes))
    batches = [order[n_processes * part[0] : n_processes * (part[-1] + 1)] for part in parts]
    for number, batch in enumerate(batches):
        if len(np.unique(stimuli[batch])) == 1 and len(batches) > 1:
            _trade(stimuli, batches, number)
    return batches


def _trade(stimuli: np.ndarray, batches: list[np.ndarray], number: int) -> None:
    lone = stimuli[batches[number][0]]
    for step in range(1, len(batches)):
        other = batches[(number + step) % len(batches)]
        different = np.flatnonzero(stimuli[other] != lone)
        if len(different):
            here = batches[number]
            here[-1], other[different[0]] = other[different[0]], here[-1]
            return


@dataclass(frozen=True)
class Draw:
    """Trials behind each row of a batch, and their weights.

    Parameters
    ----------
    trials : int array of shape (n, k)
    weights : float32 array of shape (n, k) or None
        Sum to one over each row; None where each row is one trial.
    """

    trials: np.ndarray
    weights: np.ndarray | None


def draw_all(units: Units, batch: np.ndarray) -> Draw:
    """Return the mean over all repetitions of each unit."""
    if units.trials.shape[1] == 1:
        return Draw(units.trials[batch], None)
    counts = units.counts[batch]
    inside = np.arange(units.trials.shape[1]) < counts[:, None]
    return Draw(units.trials[batch], (inside / counts[:, None]).astype(np.float32))


def draw_subset(units: Units, batch: np.ndarray, fewest: int, rng: np.random.Generator) -> Draw:
    """Return the mean over a random subset of each unit's repetitions, of uniform size from `fewest` on."""
    counts = units.counts[batch]
    low = np.minimum(fewest, counts)
    size = rng.integers(low, counts + 1)
    return Draw(units.trials[batch], _weigh(_rank_randomly(units, batch, rng), np.zeros_like(size), size))


def draw_halves(units: Units, batch: np.ndarray, rng: np.random.Generator) -> tuple[Draw, Draw]:
    """Return the means over two disjoint random halves of each unit's repetitions."""
    counts = units.counts[batch]
    rank, middle = _rank_randomly(units, batch, rng), counts // 2
    trials = units.trials[batch]
    return (
        Draw(trials, _weigh(rank, np.zeros_like(middle), middle)),
        Draw(trials, _weigh(rank, middle, counts)),
    )


def _rank_randomly(units: Units, batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of each unit's repetitions, shape (n, most_repetitions); absent ones come last."""
    keys = rng.random((len(batch), units.trials.shape[1]))
    keys[np.arange(units.trials.shape[1]) >= units.counts[batch][:, None]] = 2.0
    return keys.argsort(axis=1).argsort(axis=1)


def _weigh(rank: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    inside = (rank >= start[:, None]) & (rank < stop[:, None])
    return (inside / (stop - start)[:, None]).astype(np.float32)


class RowSource:
    """Rows of an array: on the device if they fit, otherwise read where they lie.

    Parameters
    ----------
    read
        Returns rows for ascending row numbers.
    rows
        Row numbers that may be asked for, ascending.
    row_bytes
        Size of a row.
    device
        Where rows go.
    max_bytes
        Most bytes that may stay on the device.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        rows: np.ndarray,
        *,
        row_bytes: int,
        device: torch.device,
        max_bytes: int,
    ) -> None:
        self.read, self.rows, self.device = read, rows, device
        self.resident: Tensor | None = None
        self.n_bytes = row_bytes * len(rows)
        if self.n_bytes <= max_bytes:
            self.resident = self._load_all(max(1, (64 << 20) // max(1, row_bytes)))

    def _load_all(self, size: int) -> Tensor:
        whole: Tensor | None = None
        for start in range(0, len(self.rows), size):
            block = torch.from_numpy(np.ascontiguousarray(self.read(self.rows[start : start + size])))
            if whole is None:
                whole = torch.empty((len(self.rows), *block.shape[1:]), dtype=block.dtype, device=self.device)
            whole[start : start + len(block)] = block.to(self.device)
        assert whole is not None
        return whole

    def fetch(self, wanted: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return a block of rows and the place of each wanted row in it; the block may be in host memory."""
        if self.resident is not None:
            return self.resident, np.searchsorted(self.rows, wanted)
        needed, places = np.unique(wanted, return_inverse=True)
        block = torch.from_numpy(np.ascontiguousarray(self.read(needed)))
        if self.device.type == "cuda":
            block = block.pin_memory()
        return block, places.reshape(np.shape(wanted))

    def pick(self, block: Tensor, places: np.ndarray, weights: np.ndarray | None = None) -> Tensor:
        """Return rows of the block on the device; with `weights` the weighted mean over the last axis of `places`."""
        block = block.to(self.device, non_blocking=True)
        index = torch.from_numpy(np.ascontiguousarray(places)).to(self.device, non_blocking=True)
        if weights is None:
            return block.index_select(0, index.reshape(-1))
        share = torch.from_numpy(weights).to(self.device)
        shape = (-1, *[1] * (block.ndim - 1))
        total = block.index_select(0, index[:, 0]) * share[:, 0].reshape(shape)
        for k in range(1, index.shape[1]):  # one repetition at a time, never (n, k, ...) at once
            total += block.index_select(0, index[:, k]) * share[:, k].reshape(shape)
        return total


def read_ahead(
    jobs: Iterable[Any], load: Callable[[Any], Any], *, threaded: bool
) -> Generator[Any, None, None]:
    """Yield ``load(job)`` in order; if `threaded`, a thread works a few jobs ahead.

    An exception of `load` is raised here. The thread ends when the iteration does, whatever the reason.
    """
    if not threaded:
        for job in jobs:
            yield load(job)
        return
    ready: queue.Queue[Any] = queue.Queue(maxsize=READ_AHEAD)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for job in jobs:
                if not put(("value", load(job))):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()


def check_enough_images(stimuli: np.ndarray, *, where: str) -> None:
    """Raise `DataError` unless there are two images to tell apart."""
    n_images = len(np.unique(stimuli))
    if n_images < 2:
        raise DataError(
            f"{where} {len(stimuli)} trial(s) of {n_images} image(s): a contrast needs at least two different images; "
            "use more training data or hold out less."
        )
