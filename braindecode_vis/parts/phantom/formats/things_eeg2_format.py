"""THINGS-EEG2 from images to raw sessions, as published by its authors.

Owns the experimental design (order and times of images), ``sub-XX/ses-YY/raw_eeg_{training,test}.npy`` and
``image_metadata.npy``; the derived layouts share the design. Traps that are kept: samples inside a pickled dictionary;
codes that start at 1; 99999 for target trials; a training file that joins five recordings without a mark; training and
test folders that are numbered independently; responses that overlap, since images follow each other every 200 ms.

Memory: the pickled dictionary is written with a gap of the final size, and each block of samples is written to its
place in every channel's row. Only one block is in memory; no temporary file is needed.

References
----------
.. [1] Gifford, A. T., Dwivedi, K., Roig, G., Cichy, R. M. (2022). A large and rich EEG dataset for modeling
   human visual object recognition. NeuroImage 264, 119754. https://doi.org/10.1016/j.neuroimage.2022.119754
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError, check_columns, check_option, check_unique
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.things_eeg2.layouts import METADATA
from braindecode_vis.datasets.things_eeg2.lazy_files import TARGET_CODE
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
    list_units,
)
from braindecode_vis.parts.phantom.formats.file_writers import check_block, check_count
from braindecode_vis.parts.phantom.formats.pickles import PendingArray, split_pickle
from braindecode_vis.parts.phantom.forward import SensorSystem, make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize, divide

TARGET_FRACTION = 0.06  # of the shown images are the target that subjects look for
USES = ("n_runs", "pause_s", "n_pairs")
Partition = Literal["training", "test"]
PARTITIONS: tuple[Partition, ...] = ("training", "test")
SFREQ = 1000.0
SOA_S = 0.2  # one image every 200 ms, half of it blank [1]_
STIMULUS_S = 0.1
IMAGES_PER_SEQUENCE = 20  # then a question and a pause [1]_
LEAD_S = 2.0  # silence before the first image of a recording, and after its last
PAUSE_S = (1.5, 2.85)  # blank, response and blank: a full training session lasts as long as a real one


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-EEG2 cannot have this size."""
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
    if partition == "training":
        shown = size.n_train_images * size.train_repetitions / size.n_sessions
    else:
        shown = size.n_test_concepts * size.test_repetitions / size.n_sessions
    n_trials = shown / (1 - TARGET_FRACTION)
    n_sequences = np.ceil(n_trials / IMAGES_PER_SEQUENCE)
    n_recordings = min(size.runs if partition == "training" else 1, n_sequences)
    pauses = (n_sequences - n_recordings) * size.pause_s
    return float(n_trials * SOA_S + pauses + 2 * LEAD_S * n_recordings)


def expect_total_seconds(size: PhantomSize) -> float:
    """Return the expected recorded time of all subjects in s."""
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
    """Return the design of one subject (numbered from 0): every subject sees the images in a different order."""
    assert size.pause_s is not None
    return make_things_eeg2_design(
        size.n_train_concepts,
        size.n_train_exemplars,
        size.n_test_concepts,
        size.n_sessions,
        derive_seed(seed, "design", subject),
        train_repetitions=size.train_repetitions // (size.n_sessions // 2),
        test_repetitions=size.test_repetitions // size.n_sessions,
        n_recordings=size.runs,
        # The published range of 1.5 to 2.85 s around its mean.
        pause_s=(0.69 * size.pause_s, 1.31 * size.pause_s),
    )


def simulate_recordings(
    job: PhantomJob,
    person: Person,
    system: SensorSystem,
    partition: Partition,
    session: int,
    part: PartitionDesign,
) -> Iterator[tuple[pd.DataFrame, Iterator[np.ndarray]]]:
    """Yield events and samples of each recording of one file."""
    # Codes start at 1 in each partition; rows of the drive do not.
    offset = 0 if partition == "training" else job.size.n_train_images
    for number, (events, n_samples) in enumerate(part.iterate_recordings()):
        condition = events["condition"].to_numpy()
        yield (
            events,
            simulate_continuous(
                person,
                system,
                events["onset"].to_numpy(),
                np.where(condition >= 0, condition + offset, -1),
                STIMULUS_S,
                round(n_samples * system.sfreq / 1000),
                name=f"ses-{session:02d}_{partition}_{number}",
            ),
        )


def plan_image_list(job: PhantomJob) -> Unit:
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


def plan(job: PhantomJob) -> list[Unit]:
    """Return one unit per raw file."""
    return [
        plan_image_list(job),
        *list_units(
            job, "subject {person.name}, session {session:02d}, {partition} recording",
            lambda session, partition: count_steps(job.size, partition), _write_recording,
            session=range(1, job.size.n_sessions + 1), partition=PARTITIONS,
        ),
    ]  # fmt: skip


def _write_recording(
    job: PhantomJob, person: Person, session: int, partition: Partition, progress: Progress
) -> list[Path]:
    design = make_design(job.size, job.config.seed, person.index)[session - 1]
    part = design.training if partition == "training" else design.test
    system = job.sensors
    recordings = simulate_recordings(job, person, system, partition, session, part)
    # Joined without a mark, as in the published files: filters must not cross the joins.
    blocks = chain.from_iterable(samples for _, samples in recordings)
    path = write_raw(
        job.root,
        person.index + 1,
        session,
        partition,
        progress.watch_samples(blocks, system.sfreq),
        part.events,
        n_samples=part.n_samples,
        ch_names=system.ch_names,
        sfreq=system.sfreq,
    )
    return [path]


@dataclass(frozen=True)
class PartitionDesign:
    """Content of one raw file.

    Parameters
    ----------
    events : DataFrame, one row per shown image
        `recording`, `sequence`, `position` in the sequence, `sample` and `onset` (s) in the joined file,
        `duration` (s), `code` as in the stim channel, `condition` (row of the image list, -1 for a target),
        `repetition` of this condition over all sessions, `is_target`.
    recording_samples : tuple of int
        Length of each recording; they are one after the other in the file.
    """

    events: pd.DataFrame
    recording_samples: tuple[int, ...]

    @property
    def n_samples(self) -> int:
        """Length of the joined file."""
        return sum(self.recording_samples)

    def iterate_recordings(self) -> Iterator[tuple[pd.DataFrame, int]]:
        """Yield the events of each recording, with `sample` and `onset` from its own start, and its length."""
        start = 0
        for number, length in enumerate(self.recording_samples):
            events = self.events[self.events["recording"] == number].reset_index(drop=True)
            yield (
                events.assign(sample=events["sample"] - start, onset=(events["sample"] - start) / SFREQ),
                length,
            )
            start += length


@dataclass(frozen=True)
class SessionDesign:
    """One session: its number (from 1) and its two raw files."""

    session: int
    training: PartitionDesign
    test: PartitionDesign


def make_things_eeg2_design(
    n_train_concepts: int = 1654,
    n_train_exemplars: int = 10,
    n_test_concepts: int = 200,
    n_sessions: int = 4,
    seed: int = 0,
    *,
    train_repetitions: int = 2,
    test_repetitions: int = 20,
    n_recordings: int = 5,
    pause_s: tuple[float, float] = PAUSE_S,
) -> list[SessionDesign]:
    """Return the order and times of images, session by session.

    A session shows one half of the training images `train_repetitions` times and every test image
    `test_repetitions` times; two sessions in a row share a division into halves, and the next two make a new
    one. With one session, half of the training images are never seen.

    Parameters
    ----------
    n_train_concepts, n_train_exemplars, n_test_concepts
        Sizes of the image set; the defaults are the full ones.
    seed
        Root of the random order and of the pauses.
    n_recordings
        Recordings that are joined in a training file.
    pause_s
        Shortest and longest blank between two sequences, in s.

    Raises
    ------
    ConfigError
        If a size is not positive.

    Examples
    --------
    >>> design = make_things_eeg2_design(4, 10, 2, n_sessions=2)
    >>> shown = design[0].training.events.query("not is_target")
    >>> len(shown), shown["condition"].nunique()
    (40, 20)
    """
    sizes = (n_train_concepts, n_train_exemplars, n_test_concepts, n_sessions, n_recordings)
    if min(*sizes, train_repetitions, test_repetitions) < 1:
        raise ConfigError(
            f"a THINGS-EEG2 design needs positive sizes, not {sizes} with {train_repetitions} and {test_repetitions} "
            "repetitions."
        )
    n_train = n_train_concepts * n_train_exemplars
    seen = np.zeros(n_train, dtype=int)
    sessions = []
    for session in range(n_sessions):
        order = make_generator(seed, "things-eeg2", "halves", session // 2).permutation(n_train)
        # A session shows half of the training images; the next one shows the other half.
        half = np.sort(np.array_split(order, 2)[session % 2])
        half = order if half.size == 0 else half  # a single image has one half only
        rng = make_generator(seed, "things-eeg2", "training", session)
        shown = _make_passes(half, train_repetitions, rng)
        training = _lay_out(shown, seen[shown] + _count_before(shown), n_recordings, pause_s, rng)
        np.add.at(seen, shown, 1)
        rng = make_generator(seed, "things-eeg2", "test", session)
        shown = _make_passes(np.arange(n_test_concepts), test_repetitions, rng)
        repetition = session * test_repetitions + _count_before(shown)
        test = _lay_out(shown, repetition, 1, pause_s, rng)
        sessions.append(SessionDesign(session + 1, training, test))
    return sessions


def _make_passes(conditions: np.ndarray, n_passes: int, rng: np.random.Generator) -> np.ndarray:
    """Return every condition once per pass, each pass in a new order, no image twice in a row."""
    passes = [rng.permutation(conditions) for _ in range(n_passes)]
    # A direct repetition would look like one long image.
    for before, after in pairwise(passes):
        if len(conditions) > 1 and before[-1] == after[0]:
            after[[0, -1]] = after[[-1, 0]]
    return np.concatenate(passes)


def _count_before(conditions: np.ndarray) -> np.ndarray:
    return pd.Series(conditions).groupby(conditions).cumcount().to_numpy()


def _lay_out(
    conditions: np.ndarray,
    repetitions: np.ndarray,
    n_recordings: int,
    pause_s: tuple[float, float],
    rng: np.random.Generator,
) -> PartitionDesign:
    """Add targets, divide the trials into sequences and recordings, and set their times."""
    # The share is of all shown images, targets included.
    n_targets = round(len(conditions) * TARGET_FRACTION / (1 - TARGET_FRACTION))
    n_trials = len(conditions) + n_targets
    is_target = np.zeros(n_trials, dtype=bool)
    is_target[rng.choice(n_trials, n_targets, replace=False)] = True
    condition = np.full(n_trials, -1)
    repetition = np.full(n_trials, -1)
    condition[~is_target], repetition[~is_target] = conditions, repetitions
    sequence = np.arange(n_trials) // IMAGES_PER_SEQUENCE
    n_sequences = int(sequence[-1]) + 1
    recording_of = np.arange(n_sequences) * min(n_recordings, n_sequences) // n_sequences
    soa, lead = round(SOA_S * SFREQ), round(LEAD_S * SFREQ)
    pauses = rng.integers(round(pause_s[0] * SFREQ), round(pause_s[1] * SFREQ), n_sequences)
    starts = np.zeros(n_sequences, dtype=np.int64)  # first sample of each sequence in the joined file
    lengths: list[int] = []
    clock, recording_start = lead, 0
    for number, size in enumerate(np.bincount(sequence)):
        if number and recording_of[number] != recording_of[number - 1]:
            # A recording ends with silence instead of the pause, and the next one begins with silence.
            clock = clock - int(pauses[number - 1]) + lead
            lengths.append(clock - recording_start)
            recording_start, clock = clock, clock + lead
        starts[number] = clock
        clock += int(size) * soa + int(pauses[number])
    lengths.append(clock - int(pauses[-1]) + lead - recording_start)
    position = np.arange(n_trials) % IMAGES_PER_SEQUENCE
    sample = starts[sequence] + position * soa
    events = pd.DataFrame(
        {
            "recording": recording_of[sequence],
            "sequence": sequence,
            "position": position,
            "sample": sample,
            "onset": sample / SFREQ,
            "duration": STIMULUS_S,
            "code": np.where(is_target, TARGET_CODE, condition + 1),
            "condition": condition,
            "repetition": repetition,
            "is_target": is_target,
        }
    )
    return PartitionDesign(events, tuple(lengths))


def make_image_table(
    partition: Partition,
    concepts: Sequence[str],
    n_exemplars: int = 1,
    things_numbers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Return one row per image of a partition, in the order of the codes.

    Columns: `stimulus_id` (file name without ending), `concept`, `code` (from 1), `folder`, `things_folder`,
    `file` and `path` below the image folder. Concepts are sorted by name, and numbered within the partition:
    the number is not a THINGS concept number.

    Parameters
    ----------
    concepts
        Unique names.
    n_exemplars
        Images per concept.
    things_numbers
        Number of each concept in the full THINGS list, in the order of `concepts`; 1, 2, 3... by default.

    Examples
    --------
    >>> make_image_table("training", ["zebra", "ant"], 2)["path"].tolist()[1:3]
    ['training_images/00001_ant/ant_02s.jpg', 'training_images/00002_zebra/zebra_01b.jpg']
    """
    check_option("partition", partition, PARTITIONS)
    check_unique(concepts, what="concept names")
    numbers = dict(zip(concepts, things_numbers or range(1, len(concepts) + 1), strict=True))
    rows: list[dict[str, object]] = []
    for index, concept in enumerate(sorted(concepts)):
        folder = f"{index + 1:05d}_{concept}"
        for exemplar in range(1, n_exemplars + 1):
            stimulus_id = f"{concept}_{exemplar:02d}{'b' if exemplar == 1 else 's'}"
            rows.append(
                {
                    "stimulus_id": stimulus_id,
                    "concept": concept,
                    "code": len(rows) + 1,
                    "folder": folder,
                    "things_folder": f"{numbers[concept]:05d}_{concept}",
                    "file": f"{stimulus_id}.jpg",
                    "path": f"{partition}_images/{folder}/{stimulus_id}.jpg",
                }
            )
    return pd.DataFrame(rows)


def write_image_metadata(directory: Path, training: pd.DataFrame, test: pd.DataFrame) -> Path:
    """Write ``image_metadata.npy``, a pickled dictionary of lists in the order of the codes.

    Parameters
    ----------
    training, test : DataFrame
        From `make_image_table`, or with its columns `folder`, `things_folder` and `file`.
    """
    content: dict[str, list[str]] = {}
    for key, table in (("train", training), ("test", test)):
        check_columns(table.columns, ("folder", "things_folder", "file"), what=f"the {key} image table")
        content[f"{key}_img_concepts"] = table["folder"].tolist()
        content[f"{key}_img_concepts_THINGS"] = table["things_folder"].tolist()
        content[f"{key}_img_files"] = table["file"].tolist()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / METADATA
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"".join(split_pickle(content, container="npy", protocol=3)))
    return path


def write_raw(
    directory: Path,
    subject: int,
    session: int,
    partition: Partition,
    blocks: Iterable[np.ndarray],
    events: pd.DataFrame,
    *,
    n_samples: int,
    ch_names: Sequence[str],
    sfreq: float = SFREQ,
) -> Path:
    """Write ``sub-XX/ses-YY/raw_eeg_{training,test}.npy``.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n_channels, n)
        Volts; all recordings of the file one after the other.
    events : DataFrame
        Columns `sample` and `code`, as in `PartitionDesign.events`.
    n_samples
        Total length; `PartitionDesign.n_samples`.
    ch_names
        Names of the EEG channels; the stim channel is added last.

    Raises
    ------
    DataError
        If the blocks do not add up to `n_samples`, have another number of channels, or are not finite, or if an event
        is outside the file or at the sample of another one.
    """
    check_option("partition", partition, PARTITIONS)
    where = f"raw {partition} EEG of subject {subject}, session {session}"
    check_columns(events.columns, ("sample", "code"), what=f"the event table of the {where}")
    pulses = events["sample"].to_numpy(dtype=np.int64)
    if len(pulses) and (pulses.min() < 0 or pulses.max() >= n_samples):
        raise DataError(f"an event of the {where} is at sample {pulses.max()}, outside its {n_samples}.")
    check_unique(pulses.tolist(), what=f"event samples of the {where}")
    content = {
        "raw_eeg_data": PendingArray((len(ch_names) + 1, n_samples), np.dtype("<f8")),
        "ch_names": [*map(str, ch_names), "stim"],
        "ch_types": ["eeg"] * len(ch_names) + ["stim"],
        "sfreq": int(sfreq) if float(sfreq).is_integer() else float(sfreq),
        "highpass": 0.01,
        "lowpass": 100.0,
    }
    head, tail = split_pickle(content, container="npy", protocol=3)
    folder = directory / f"sub-{subject:02d}" / f"ses-{session:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"raw_eeg_{partition}.npy"
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        n_bytes = content["raw_eeg_data"].n_bytes  # type: ignore[attr-defined]
        file.write(head)
        file.seek(n_bytes, os.SEEK_CUR)  # the hole reads as zeros: the stim row needs its pulses only
        file.write(tail)
        file.flush()
        # Each block is written to its place in every channel's row of the array (n_channels, n_samples), in C order.
        start = 0
        for block in blocks:
            array = check_block(block, (len(ch_names), None), what=f"the {where}")
            stop = start + array.shape[1]
            if stop > n_samples:  # it would be written over the next channel
                check_count(stop, n_samples, what=f"The {where}", unit="samples")
            rows = np.ascontiguousarray(array, dtype="<f8")
            for channel in range(len(ch_names)):
                os.pwrite(file.fileno(), rows[channel].data, len(head) + (channel * n_samples + start) * 8)
            start = stop
        check_count(start, n_samples, what=f"The {where}", unit="samples")
        stim_start = len(head) + len(ch_names) * n_samples * 8
        for sample, code in zip(pulses.tolist(), events["code"].astype(int).tolist(), strict=True):
            os.pwrite(file.fileno(), np.float64(code).astype("<f8").tobytes(), stim_start + sample * 8)
    return path


def estimate_raw_bytes(n_samples: int, n_channels: int = 63) -> int:
    """Return the size of one raw file: eight bytes per sample and channel, including the stim channel."""
    return 8 * (n_channels + 1) * n_samples


FORMAT = Format(
    name="things-eeg2",
    description="THINGS-EEG2 raw sessions: 63 channels, 1000 Hz, rapid serial presentation",
    modality="eeg",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    # In the order of the codes: training, then test.
    list_images=lambda size, seed: list_pictures(size, seed, ""),
    make_recorder=lambda size: make_sensor_system("eeg63"),
    plan=plan,
)
