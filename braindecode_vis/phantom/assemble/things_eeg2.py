"""THINGS-EEG2 from images to raw sessions.

Owns the mapping from a size to the experimental design and which recording goes into which file; the derived layouts
share the design.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_numbers, divide
from braindecode_vis.phantom.assemble.stimulus_files import list_split
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.forward import Machine, make_machine
from braindecode_vis.phantom.recordings import simulate_continuous
from braindecode_vis.phantom.writers.things_eeg2 import (
    IMAGES_PER_SEQUENCE,
    LEAD_S,
    PARTITIONS,
    SOA_S,
    STIMULUS_S,
    Partition,
    PartitionDesign,
    SessionDesign,
    estimate_raw_bytes,
    make_image_table,
    make_things_eeg2_design,
    write_image_metadata,
    write_raw,
)
from braindecode_vis.seeds import derive_seed

TARGET_FRACTION = 0.06
USES = ("n_runs", "pause_s")


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-EEG2 cannot have this size."""
    check_numbers(size, "things-eeg2", USES)
    if size.n_sessions % 2:
        raise ConfigError(
            f"a session of THINGS-EEG2 shows one half of the training images, so n_sessions must be even, "
            f"not {size.n_sessions}."
        )
    divide(size.train_repetitions, size.n_sessions // 2, what="train_repetitions over pairs of sessions")
    divide(size.test_repetitions, size.n_sessions, what="test_repetitions over sessions")


def expect_seconds(size: PhantomSize, partition: Partition) -> float:
    """Return the expected length of one file in s."""
    assert size.pause_s is not None
    assert size.n_runs is not None
    if partition == "training":
        shown = size.n_train_images * size.train_repetitions / size.n_sessions
    else:
        shown = size.n_test_concepts * size.test_repetitions / size.n_sessions
    n_trials = shown / (1 - TARGET_FRACTION)
    n_sequences = np.ceil(n_trials / IMAGES_PER_SEQUENCE)
    n_recordings = min(size.n_runs if partition == "training" else 1, n_sequences)
    pauses = (n_sequences - n_recordings) * size.pause_s
    return float(n_trials * SOA_S + pauses + 2 * LEAD_S * n_recordings)


def expect_total_seconds(size: PhantomSize) -> float:
    """Return the expected recorded time of all people in s."""
    return size.n_subjects * size.n_sessions * sum(expect_seconds(size, part) for part in PARTITIONS)


def count_steps(size: PhantomSize, partition: Partition) -> int:
    """Return the steps of one file: its seconds."""
    return max(1, round(expect_seconds(size, partition)))


def count(size: PhantomSize) -> Counts:
    """Return work and space of the raw files."""
    total = expect_total_seconds(size)
    steps = size.n_subjects * size.n_sessions * sum(count_steps(size, part) for part in PARTITIONS)
    n_bytes = estimate_raw_bytes(1) * 1000 * total
    return Counts(n_bytes, 0, total, 4 + total / 120, 1 + steps)


@lru_cache(maxsize=4)
def make_design(size: PhantomSize, seed: int, subject: int) -> list[SessionDesign]:
    """Return the design of one person (numbered from 0): everybody sees the images in an order of their own."""
    assert size.pause_s is not None
    assert size.n_runs is not None
    return make_things_eeg2_design(
        size.n_train_concepts,
        size.n_train_exemplars,
        size.n_test_concepts,
        size.n_sessions,
        derive_seed(seed, "design", subject),
        train_repetitions=size.train_repetitions // (size.n_sessions // 2),
        test_repetitions=size.test_repetitions // size.n_sessions,
        n_recordings=size.n_runs,
        target_fraction=TARGET_FRACTION,
        pause_s=(0.69 * size.pause_s, 1.31 * size.pause_s),
    )


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images, in the order of the codes: training, then test."""
    return list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed)


def count_images(size: PhantomSize) -> int:
    """Return the number of images."""
    return size.n_train_images + size.n_test_concepts


def simulate_recordings(
    job: Job, person: Person, machine: Machine, partition: Partition, session: int, part: PartitionDesign
) -> Iterator[tuple[pd.DataFrame, Iterator[np.ndarray]]]:
    """Yield events and samples of each recording of one file."""
    offset = 0 if partition == "training" else job.size.n_train_images
    for number, (events, n_samples) in enumerate(part.iterate_recordings()):
        condition = events["condition"].to_numpy()
        yield (
            events,
            simulate_continuous(
                person,
                machine,
                events["onset"].to_numpy(),
                np.where(condition >= 0, condition + offset, -1),
                STIMULUS_S,
                round(n_samples * machine.sfreq / 1000),
                name=f"ses-{session:02d}_{partition}_{number}",
            ),
        )


def plan_image_list(job: Job) -> Unit:
    """Return the unit that writes ``image_metadata.npy``."""

    def write(progress: Progress) -> list[Path]:
        numbers = {name: i + 1 for i, name in enumerate(sorted(job.table["concept"].unique()))}
        tables = []
        for partition, split in zip(PARTITIONS, ("train", "test"), strict=True):
            concepts = sorted(job.table.loc[job.table["split"] == split, "concept"].unique())
            exemplars = job.size.n_train_exemplars if split == "train" else 1
            tables.append(make_image_table(partition, concepts, exemplars, [numbers[c] for c in concepts]))
        return [write_image_metadata(job.root, *tables)]

    return Unit("the list of images", 1, write)


def plan(job: Job) -> list[Unit]:
    """Return one unit per raw file."""
    units = [plan_image_list(job)]
    for person in job.people:
        for session in range(1, job.size.n_sessions + 1):
            units += [_plan_file(job, person, session, partition) for partition in PARTITIONS]
    return units


def _plan_file(job: Job, person: Person, session: int, partition: Partition) -> Unit:
    def write(progress: Progress) -> list[Path]:
        design = make_design(job.size, job.config.seed, person.index)[session - 1]
        part = design.training if partition == "training" else design.test
        machine = job.eeg_or_meg
        recordings = simulate_recordings(job, person, machine, partition, session, part)
        blocks = chain.from_iterable(samples for _, samples in recordings)
        path = write_raw(
            job.root,
            person.index + 1,
            session,
            partition,
            progress.watch(blocks, lambda block: block.shape[1] / machine.sfreq),
            part.events,
            n_samples=part.n_samples,
            ch_names=machine.ch_names,
            sfreq=machine.sfreq,
        )
        return [path]

    name = f"subject {person.name}, session {session:02d}, {partition} recording"
    return Unit(name, count_steps(job.size, partition), write)


FORMAT = Format(
    name="things-eeg2",
    description="THINGS-EEG2 raw sessions: 63 channels, 1000 Hz, rapid serial presentation",
    modality="eeg",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_machine("eeg63"),
    plan=plan,
)
