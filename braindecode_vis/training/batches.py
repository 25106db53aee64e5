"""The rows of a batch: what they stand for, in which order they come, and which trials are averaged for each.

Owns the units of training (a trial, or an image with all its repetitions), the order of every epoch, and the draw of
repetitions and of partners from another subject. Every draw is a function of the seed, the epoch and the place in it.

Last batch: by default an epoch is cut into ``ceil(n / batch_size)`` batches whose sizes differ by one at most, so that
no trial is dropped and no batch is much smaller than the others; papers have full batches, and keep or drop the rest.
With several processes every batch is a multiple of their number, which leaves out fewer trials per epoch than there
are processes, others in every epoch.

References
----------
ViktorHug0/Neurobridge_ssl@7898cf6: trials of several subjects who saw the same image, side by side in a batch
(`module/sampler.py`) and mixed (SubjectMix, `train.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.seeds import make_generator

LastBatch = Literal["even", "smaller", "dropped"]
FEWEST_IMAGES = 8  # of a group that batches are drawn in; fewer tell little apart


@dataclass(frozen=True)
class TrainingUnits:
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
) -> TrainingUnits:
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
        return TrainingUnits(
            rows[:, None], np.ones(len(rows), dtype=np.int64), subjects[rows], stimuli[rows], concepts[rows]
        )
    # A unit never crosses subjects: their responses are not averaged together.
    keys = pd.MultiIndex.from_arrays([subjects[rows], stimuli[rows]])
    codes, _ = pd.factorize(keys)
    counts = np.bincount(codes)
    # padded with trial 0, which `counts` hides
    trials = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
    order = np.argsort(codes, kind="stable")  # stable: repetitions stay ascending
    starts = np.cumsum(counts) - counts
    # place of each trial within its unit: its rank among those of the same code
    trials[codes[order], np.arange(len(rows)) - starts[codes[order]]] = rows[order]
    first = trials[:, 0]
    return TrainingUnits(trials, counts, subjects[first], stimuli[first], concepts[first])


def count_batches(n_units: int, batch_size: int, n_processes: int = 1, last: LastBatch = "even") -> int:
    """Return the number of batches of an epoch; see `make_batches`."""
    full, rest = divmod(n_units // n_processes, batch_size // n_processes)
    # a unit alone has nothing to be told apart from
    return full + (rest > 0 if last == "even" else last == "smaller" and rest * n_processes > 1)


def make_batches(
    stimuli: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    n_processes: int = 1,
    last: LastBatch = "even",
    neighbours: np.ndarray | None = None,
    per_image: int = 1,
) -> list[np.ndarray]:
    """Return the units of each batch of one epoch, shuffled.

    A batch that would show one image alone swaps a unit with another batch, since it has no negative.

    Parameters
    ----------
    stimuli : int array of shape (n_units,)
    batch_size
        Largest batch over all processes together.
    seed, epoch
        Decide the order.
    n_processes
        Each batch is a multiple of this, so that every process gets as many units.
    last
        ``even`` makes all batches of nearly one size; ``smaller`` makes full ones and one of what is left (a unit
        alone is left out); ``dropped`` leaves that out.
    neighbours : int array of shape (n_stimuli,), optional
        Image that shall be in a batch with each image, -1 if any may: see `pair_neighbours`.
    per_image
        Units of one image that come one after the other: see `gather_images`.
    """
    # One permutation per epoch, decided by its number alone: a resumed run makes the same batches.
    order = make_generator(seed, "order", epoch).permutation(len(stimuli))
    if neighbours is not None:
        order = pair_neighbours(order, stimuli, neighbours)
    if per_image > 1:
        order = gather_images(order, stimuli, per_image)
    # What is left over differs from epoch to epoch, as the order does.
    shared = np.arange(len(order) // n_processes)
    n_batches, size = count_batches(len(order), batch_size, n_processes, last), batch_size // n_processes
    if last == "even":
        parts = np.array_split(shared, n_batches)
    else:
        parts = [shared[size * k : size * (k + 1)] for k in range(n_batches)]
    batches = [order[n_processes * part[0] : n_processes * (part[-1] + 1)] for part in parts]
    for number, batch in enumerate(batches):
        # A contrast within it would be a softmax over one image.
        if len(np.unique(stimuli[batch])) == 1 and len(batches) > 1:
            _swap_unit(stimuli, batches, number)
    return batches


def gather_images(order: np.ndarray, stimuli: np.ndarray, per_image: int) -> np.ndarray:
    """Return an order in which units of one image follow each other, `per_image` at a time.

    Images, and units within an image, keep the order in which they came. An image with more units returns later, one
    with fewer has a shorter run.

    Parameters
    ----------
    order : int array of shape (n_units,)
        Units in any order.
    stimuli : int array of shape (n_units,)
    per_image
        Length of a run.

    Examples
    --------
    >>> gather_images(np.array([0, 1, 2, 3, 4]), np.array([7, 8, 7, 7, 8]), 2).tolist()
    [0, 2, 1, 4, 3]
    """
    shown = stimuli[order]
    run = pd.Series(shown).groupby(shown).cumcount().to_numpy() // per_image
    first, _ = pd.factorize(pd.MultiIndex.from_arrays([shown, run]))
    return order[np.argsort(first, kind="stable")]


def pair_neighbours(order: np.ndarray, stimuli: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return an order in which each unit is followed by one of the neighbour of its image, as long as there are some.

    Parameters
    ----------
    order : int array of shape (n_units,)
        Units in the order in which they come and look for their neighbours.
    stimuli : int array of shape (n_units,)
    neighbours : int array of shape (n_stimuli,)

    Examples
    --------
    >>> pair_neighbours(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3]), np.array([3, -1, 0, 0])).tolist()
    [0, 3, 1, 2]
    """
    waiting: dict[int, list[int]] = {}
    for unit in order[::-1].tolist():
        waiting.setdefault(int(stimuli[unit]), []).append(unit)
    taken = np.zeros(len(stimuli), dtype=bool)
    paired: list[int] = []
    for unit in order.tolist():
        if taken[unit]:
            continue
        taken[unit] = True
        paired.append(unit)
        candidates = waiting.get(int(neighbours[stimuli[unit]]), [])
        while candidates and taken[candidates[-1]]:
            candidates.pop()
        if candidates:
            taken[candidates[-1]] = True
            paired.append(candidates.pop())
    return np.array(paired)


def _swap_unit(stimuli: np.ndarray, batches: list[np.ndarray], number: int) -> None:
    lone = stimuli[batches[number][0]]
    for step in range(1, len(batches)):
        other = batches[(number + step) % len(batches)]
        different = np.flatnonzero(stimuli[other] != lone)
        if len(different):
            here = batches[number]
            # batches are views of `order`, so both change in place
            here[-1], other[different[0]] = other[different[0]], here[-1]
            return


@dataclass(frozen=True)
class Draw:
    """Trials behind each row of a batch, and their weights.

    Parameters
    ----------
    trials : int array of shape (n, k)
    weights : float32 array of shape (n, k) or None
        Sum to one over each row; None if each row is one trial.
    """

    trials: np.ndarray
    weights: np.ndarray | None


def draw_all(units: TrainingUnits, batch: np.ndarray) -> Draw:
    """Return the mean over all repetitions of each unit."""
    if units.trials.shape[1] == 1:
        return Draw(units.trials[batch], None)
    counts = units.counts[batch]
    inside = np.arange(units.trials.shape[1]) < counts[:, None]  # padding gets no weight
    return Draw(units.trials[batch], (inside / counts[:, None]).astype(np.float32))


def draw_subset(
    units: TrainingUnits, batch: np.ndarray, fewest: int, rng: np.random.Generator, most: int | None = None
) -> Draw:
    """Return the mean over a random subset of each unit's repetitions, of uniform size from `fewest` to `most`."""
    counts = units.counts[batch]
    # an image with fewer repetitions gives all of them
    low, high = np.minimum(fewest, counts), counts if most is None else np.minimum(most, counts)
    size = rng.integers(low, high + 1)
    return Draw(units.trials[batch], _weigh(_rank_randomly(units, batch, rng), np.zeros_like(size), size))


def draw_halves(units: TrainingUnits, batch: np.ndarray, rng: np.random.Generator) -> tuple[Draw, Draw]:
    """Return the means over two disjoint random halves of each unit's repetitions."""
    counts = units.counts[batch]
    # The odd repetition goes to the second half.
    rank, middle = _rank_randomly(units, batch, rng), counts // 2
    trials = units.trials[batch]
    return (
        Draw(trials, _weigh(rank, np.zeros_like(middle), middle)),
        Draw(trials, _weigh(rank, middle, counts)),
    )


@dataclass(frozen=True)
class Partners:
    """Units of other subjects who saw the same image.

    Parameters
    ----------
    units : int array of shape (n_units, most)
        Partners of each unit, the first `counts` entries of its row.
    counts : int array of shape (n_units,)
    """

    units: np.ndarray
    counts: np.ndarray

    def draw(self, batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return one partner of each unit of the batch, the unit itself where it has none."""
        place = rng.integers(0, np.maximum(self.counts[batch], 1))
        return np.where(self.counts[batch] > 0, self.units[batch, place], batch)


def find_partners(units: TrainingUnits) -> Partners:
    """Return, for each unit, those of the same image and another subject."""
    frame = pd.DataFrame({"stimulus": units.stimuli, "subject": units.subjects})
    groups = frame.groupby("stimulus").indices
    found: list[np.ndarray] = [np.empty(0, np.int64)] * len(units)
    for group in groups.values():
        who = units.subjects[group]
        for row, subject in zip(group, who, strict=True):
            found[row] = group[who != subject]
    counts = np.array([len(one) for one in found])
    table = np.zeros((len(units), max(1, int(counts.max(initial=0)))), dtype=np.int64)
    for row, one in enumerate(found):
        table[row, : len(one)] = one
    return Partners(table, counts)


def mix_draws(own: Draw, other: Draw, share: np.ndarray) -> Draw:
    """Return ``share * own + (1 - share) * other`` of each row.

    Parameters
    ----------
    own, other
        Of n rows each.
    share : float32 array of shape (n,)
    """
    parts = [
        (np.ones(draw.trials.shape, np.float32) if draw.weights is None else draw.weights) * part[:, None]
        for draw, part in ((own, share), (other, 1 - share))
    ]
    return Draw(np.concatenate([own.trials, other.trials], axis=1), np.concatenate(parts, axis=1))


def _rank_randomly(units: TrainingUnits, batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of each unit's repetitions, shape (n, most_repetitions); absent ones come last."""
    keys = rng.random((len(batch), units.trials.shape[1]))
    keys[np.arange(units.trials.shape[1]) >= units.counts[batch][:, None]] = 2.0
    # argsort of argsort is the rank of each entry
    return keys.argsort(axis=1).argsort(axis=1)


def _weigh(rank: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    inside = (rank >= start[:, None]) & (rank < stop[:, None])
    return (inside / (stop - start)[:, None]).astype(np.float32)


def code_trials(responses: Responses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of all images, and the index of each trial's image and concept.

    A trial table without a `concept` column makes every image its own concept.
    """
    stimuli, ids = pd.factorize(responses.stimulus_ids)
    if "concept" in responses.trials:
        concepts, _ = pd.factorize(responses.trials["concept"].astype(str).to_numpy(dtype=object))
    else:
        concepts = stimuli
    return np.asarray(ids, dtype=object), stimuli.astype(np.int64), concepts.astype(np.int64)
