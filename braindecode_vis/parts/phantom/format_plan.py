"""Common part of all formats: the job, its units of work, and its progress.

A format plans a list of units; each writes a few files that are finished together, and is skipped if an earlier call
finished it. Contains no format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.datasets.drawn.images import make_things_like_split
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.drive import StimulusDrive
from braindecode_vis.parts.phantom.forward import SensorSystem
from braindecode_vis.parts.phantom.phantom_config import PhantomConfig
from braindecode_vis.parts.phantom.scanner import GRIDS, Scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize, check_imagery, check_numbers, count_images

Advance = Callable[[int], Any]
TRUTH = "phantom_truth"
"""Folder of the ground truth and of the ledger, below the root of a phantom."""


@dataclass(frozen=True)
class Counts:
    """Work and disk space of a size, without images and ground truth.

    Parameters
    ----------
    n_bytes, scratch_bytes
        Size of the final files, and of the largest temporary ones.
    recording_s
        Recorded time of all subjects, in s.
    seconds
        Computing time on one core, in s.
    n_steps
        Sum of the steps of all units.
    n_trials
        Presentations to all subjects, if they do not follow from the size.
    """

    n_bytes: float
    scratch_bytes: float
    recording_s: float
    seconds: float
    n_steps: int
    n_trials: int | None = None


class Progress:
    """Turns amounts of work into whole steps that add up to `n_steps`."""

    def __init__(self, n_steps: int, advance: Advance) -> None:
        self.n_steps, self.advance = n_steps, advance
        self.amount, self.told = 0.0, 0

    def add(self, amount: float) -> None:
        """Count work; report it as soon as it makes whole steps."""
        self.amount += amount
        # Amounts such as seconds of recording may add up to a little more than was estimated.
        self._tell(min(int(self.amount), self.n_steps))

    def finish(self) -> None:
        """Report the remaining steps."""
        self._tell(self.n_steps)

    def _tell(self, steps: int) -> None:
        if steps > self.told:
            self.advance(steps - self.told)
            self.told = steps

    def watch(
        self, pieces: Iterable[np.ndarray], step: Callable[[np.ndarray], float]
    ) -> Iterator[np.ndarray]:
        """Yield `pieces`, and count ``step(piece)`` for each."""
        for piece in pieces:
            # Counted after the consumer has used the piece, so that the progress bar is never ahead of the files.
            yield piece
            self.add(step(piece))

    def watch_samples(self, blocks: Iterable[np.ndarray], sfreq: float) -> Iterator[np.ndarray]:
        """Yield blocks of shape (n_channels, n) at `sfreq` Hz, and count their seconds."""
        return self.watch(blocks, lambda block: block.shape[1] / sfreq)


@dataclass(frozen=True)
class Unit:
    """Files that are finished together.

    Parameters
    ----------
    name
        Description of the files; unique in a job.
    n_steps
        Its share of the progress.
    write
        Writes the files and returns their paths.
    reads_others
        Whether it reads files of earlier units, so that it begins when those are finished.
    """

    name: str
    n_steps: int
    write: Callable[[Progress], list[Path]]
    reads_others: bool = False


@dataclass(frozen=True, eq=False)
# Compared by identity (eq=False), since lru_cache keys designs by the job, whose arrays have no hash.
class PhantomJob:
    """All inputs that a format needs to write its files.

    Parameters
    ----------
    root
        Folder of the data set.
    size, config
        The request.
    table : DataFrame of n_images rows
        The images, in the order of the rows of `drive`: `stimulus_id`, `concept`, `split` (``train``, ``test``, or
        ``excluded`` for training images of test concepts), `path` below `root`, and further columns of the format.
    drive, subjects, recorder
        The simulation.
    """

    root: Path
    size: PhantomSize
    config: PhantomConfig
    table: pd.DataFrame
    drive: StimulusDrive
    subjects: tuple[Person, ...]
    recorder: SensorSystem | Scanner

    @property
    def scratch(self) -> Path:
        """Folder for temporary files of this process; its name begins with a dot, so no reader opens it."""
        folder = self.root / f".tmp-{os.getpid()}-scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def test_rows(self) -> np.ndarray:
        """Rows of the test images."""
        return np.flatnonzero(self.table["split"] == "test")

    @property
    def repetitions(self) -> np.ndarray:
        """Number of times that a subject sees each image."""
        return np.where(
            self.table["split"] == "test", self.size.test_repetitions, self.size.train_repetitions
        )

    @property
    def sensors(self) -> SensorSystem:
        """The recording system of a format of EEG or MEG."""
        assert isinstance(self.recorder, SensorSystem)
        return self.recorder

    @property
    def scanner(self) -> Scanner:
        """The scanner of a format of fMRI."""
        assert isinstance(self.recorder, Scanner)
        return self.recorder


def list_units(
    job: PhantomJob,
    name: str,
    n_steps: int | Callable[..., int],
    write: Callable[..., list[Path]],
    *,
    people: Sequence[Person] | None = None,
    reads_others: bool = False,
    **labels: Iterable[Any],
) -> list[Unit]:
    """Return a unit for each subject and each combination of labels, such as sessions and runs, in their order.

    Parameters
    ----------
    name
        Description of the files, with the subject and the labels in braces: ``subject {person.name}, session
        {session:02d}``.
    n_steps
        Steps of each unit in the progress; a function is called with the labels.
    write
        Called with the job, the subject, the labels and the progress.
    people
        Subjects of the files; by default all subjects of the job.
    reads_others
        As in `Unit`.
    """
    units = []
    for person in job.subjects if people is None else people:
        for values in product(*labels.values()):
            text = name.format(person=person, **dict(zip(labels, values, strict=True)))
            steps = n_steps if isinstance(n_steps, int) else n_steps(*values)
            units.append(Unit(text, steps, partial(write, job, person, *values), reads_others))
    return units


def list_pictures(size: PhantomSize, seed: int, folder: str = f"{TRUTH}/images") -> pd.DataFrame:
    """Return the images of both splits; by default beside the truth, for a layout that holds no picture files."""
    counts = (size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars)
    table = make_things_like_split(*counts, seed=seed, n_pairs=size.n_pairs or 0)
    return table.assign(path=[str(Path(folder) / path) for path in table["path"]])


@dataclass(frozen=True)
class Format:
    """One public layout: its possible sizes, their cost, and how it is written.

    Parameters
    ----------
    name, description
        Name and description on the command line.
    modality
        ``eeg``, ``meg`` or ``fmri``.
    uses
        Optional fields of `PhantomSize` that have a meaning.
    duration_s
        Presentation time of an image.
    count
        Function that returns work and disk space of a size.
    make_recorder
        The simulated recording system or scanner of a size.
    plan
        The units of a job.
    list_images
        Table of the images of a size and a seed; see `PhantomJob.table`, with `concept_index` and `exemplar`.
    count_images
        Number of rows of the table of images.
    limits
        The smallest and the largest value of fields of a size.
    check
        Raises `ConfigError` for other sizes that are impossible in the design.
    n_imagery_sets
        Number of sets of equal size into which imagined images are divided.
    n_channels
        Number of channels of the recording system, for the estimate.
    plan_truth
        Units of the ground truth of each subject; by default the responses to pictures and the scores of an ideal
        observer, which only data with labels have.
    first_person
        Number of the first subject: subjects with different numbers are different, also between formats.
    ongoing_percent
        Default of the ongoing activity; None for formats without time series.
    voxel_share
        Share of the cortical voxels that are recorded, for the estimate.
    version
        Increased when the same request gives other files than before.
    """

    name: str
    description: str
    modality: Literal["eeg", "meg", "fmri"]
    uses: tuple[str, ...]
    duration_s: float
    count: Callable[[PhantomSize], Counts]
    make_recorder: Callable[[PhantomSize], SensorSystem | Scanner]
    plan: Callable[[PhantomJob], list[Unit]]
    list_images: Callable[[PhantomSize, int], pd.DataFrame] = list_pictures
    count_images: Callable[[PhantomSize], int] = count_images
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    check: Callable[[PhantomSize], Any] = lambda size: None
    n_imagery_sets: int = 1
    n_channels: int = 64
    plan_truth: Callable[[PhantomJob], list[Unit]] | None = None
    first_person: int = 0
    ongoing_percent: float | None = None
    voxel_share: float = 1.0
    version: int = 1

    def check_size(self, size: PhantomSize) -> None:
        """Raise `ConfigError` if the format cannot have this size."""
        # A volume has one of the known grids.
        grids = {"voxel_mm": (min(GRIDS), max(GRIDS))} if "voxel_mm" in self.uses else {}
        check_numbers(size, self.name, self.uses, {**grids, **self.limits})
        if grids and size.voxel_mm not in GRIDS:
            raise ConfigError(
                f"voxel_mm of a phantom is one of {', '.join(f'{mm:g}' for mm in GRIDS)}, not {size.voxel_mm}."
            )
        if "n_imagery" in self.uses:
            check_imagery(size, self.name)
        self.check(size)
