"""THINGS-EEG1 from images to raw BrainVision recordings in BIDS: rapid streams, an image every 100 ms.

Owns the design (every training image once in long sequences, then the test images many times), and the tables of
version 1.1.0: ``events.tsv`` with onsets in ms, paths with backslashes, test trials whose `object` is -1, and
``participants.tsv`` with the column `exclude`. Test images are further exemplars of concepts that are also training
concepts, as in the published set, so a zero-shot split leaves out these training images.

References
----------
.. [1] Grootswagers, T., Zhou, I., Robinson, A. K., Hebart, M. N., Carlson, T. A. (2022). Human EEG recordings for 1,854
   concepts presented in rapid serial visual presentation streams. Scientific Data 9, 3.
   https://doi.org/10.1038/s41597-021-01102-7
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.drawn.images import list_concepts_with_tests
from braindecode_vis.datasets.things_eeg1 import CLOCK_HZ, SOA_S
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats.bids_eeg import estimate_bytes, write_recording
from braindecode_vis.parts.phantom.formats.file_writers import write_json_file, write_tsv
from braindecode_vis.parts.phantom.forward import make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images_of_concepts

SYSTEM, N_CHANNELS = "eeg63-cz", 63
STIMULUS_S = 0.05  # [1]_
LEAD_S, PAUSE_S = 2.0, 1.0
PER_SEQUENCE = 309  # [1]_: 72 sequences of the 22,248 images


def count_shown(size: PhantomSize) -> int:
    """Return the presentations of one subject; they include training images of test concepts."""
    n_concepts = size.n_train_concepts + size.n_test_concepts
    return n_concepts * size.n_train_exemplars + size.n_test_concepts * size.test_repetitions


def expect_seconds(size: PhantomSize) -> float:
    """Return the length of a recording, s."""
    n = count_shown(size)
    return n * SOA_S + (n // PER_SEQUENCE + 1) * PAUSE_S + 2 * LEAD_S


def count(size: PhantomSize) -> Counts:
    """Return work and space of the recordings."""
    one = expect_seconds(size)
    total = size.n_subjects * one
    n_bytes = size.n_subjects * (
        estimate_bytes(round(one * CLOCK_HZ), N_CHANNELS) + 200 * count_shown(size) + 8000
    )
    return Counts(n_bytes, 0, total, 3 + total / 80, 1 + size.n_subjects * max(1, round(one)))


@lru_cache(maxsize=4)
def make_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return every presentation: `row` of the image, `onset` in s, `sequence`, `repetition` and `is_target`."""
    generator = make_generator(job.config.seed, "things-eeg1", subject)
    first = generator.permutation(np.flatnonzero(job.table["split"] != "test"))
    tests = np.concatenate([generator.permutation(job.test_rows) for _ in range(job.size.test_repetitions)])
    rows = np.concatenate([first, tests])
    # A sequence never mixes training and test images.
    sequence = np.concatenate(
        [
            np.arange(len(first)) // PER_SEQUENCE,
            len(first) // PER_SEQUENCE + 1 + np.arange(len(tests)) // PER_SEQUENCE,
        ]
    )
    new = np.r_[0, np.cumsum(np.diff(sequence) != 0)]
    onset = (LEAD_S + SOA_S * np.arange(len(rows)) + PAUSE_S * new).round(3)
    design = pd.DataFrame({"row": rows, "onset": onset, "sequence": sequence})
    repetition = design.groupby("row").cumcount()
    # The fixation mark sometimes changes colour, and the subject must press a button.
    return design.assign(repetition=repetition, is_target=generator.random(len(rows)) < 0.02)


def make_events(design: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return ``events.tsv`` of version 1.1.0.

    Parameters
    ----------
    design : DataFrame
        `row`, `onset` (s), `sequence`, `repetition` and `is_target`.
    table : DataFrame
        The images: `concept`, `file_name`, `split`.
    """
    shown = table.iloc[design["row"].to_numpy()].reset_index(drop=True)
    test = (shown["split"] == "test").to_numpy()
    # Numbers of objects have their own order, which is not that of THINGS.
    names = {name: number for number, name in enumerate(sorted(set(table["concept"])))}
    tests = {row: number for number, row in enumerate(np.flatnonzero(table["split"] == "test").tolist())}
    onset = np.rint(1000 * design["onset"].to_numpy()).astype(int)
    within = design.groupby("sequence").cumcount().to_numpy()
    return pd.DataFrame(
        {
            "onset": onset, "duration": round(1000 * STIMULUS_S), "eventnumber": np.arange(len(design)),
            "blocksequencenumber": design["sequence"].to_numpy(), "isteststim": test.astype(int),
            "object": np.where(test, "-1", shown["concept"]),
            "objectnumber": np.where(test, -1, shown["concept"].map(names)),
            "presentationnumber": np.arange(len(design)), "sequencenumber": design["sequence"].to_numpy(),
            "stim": "stimuli\\" + shown["concept"] + "\\" + shown["file_name"],
            "stimnumber": shown["exemplar"].to_numpy(),
            "teststimnumber": [tests.get(row, -1) for row in design["row"].tolist()],
            "withinsequencenumber": within, "istarget": design["is_target"].astype(int).to_numpy(),
            "stimname": shown["file_name"].to_numpy(),
        }
    )  # fmt: skip


def plan(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per subject."""

    def write_root(progress: Progress) -> list[Path]:
        content = {"Name": "braindecode_vis phantom of THINGS-EEG", "BIDSVersion": "1.4.1", "License": "CC0"}
        return [
            write_json_file(job.root / "dataset_description.json", content),
            write_participants(job.root, [person.name for person in job.subjects]),
        ]

    n_steps = max(1, round(expect_seconds(job.size)))
    return [
        Unit("the files of the data set", 1, write_root),
        *list_units(job, "subject {person.name}", n_steps, _write_person),
    ]


def write_participants(root: Path, subjects: list[str], excluded: dict[str, str] | None = None) -> Path:
    """Write ``participants.tsv``; `excluded` lists subjects to leave out, with the reason."""
    left_out = excluded or {}
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{name}" for name in subjects],
            "exclude": [int(name in left_out) for name in subjects],
            "note_IZ": [left_out.get(name, "") for name in subjects],
        }
    )
    return write_tsv(root / "participants.tsv", table)


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    system, design = job.sensors, make_design(job, person.index)
    n_samples = round((design["onset"].iloc[-1] + LEAD_S) * system.sfreq)
    blocks = simulate_continuous(
        person,
        system,
        design["onset"].to_numpy(),
        design["row"].to_numpy(),
        STIMULUS_S,
        n_samples,
        name="rsvp",
    )
    path = write_subject(
        job.root,
        person.name,
        progress.watch_samples(blocks, system.sfreq),
        make_events(design, job.table),
        n_samples=n_samples,
        ch_names=system.ch_names,
    )
    return sorted(path.parent.glob(f"{path.name.removesuffix('_eeg.vhdr')}_*"))


def write_subject(
    root: Path,
    subject: str,
    blocks: Iterable[np.ndarray],
    events: pd.DataFrame,
    *,
    n_samples: int,
    ch_names: Sequence[str],
) -> Path:
    """Write ``sub-01/eeg/sub-01_task-rsvp_eeg.vhdr`` with its data and ``events.tsv``, and return its path.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n_channels, n)
        Volts at 1000 Hz.
    events : DataFrame
        In the spelling of the published table; `onset` in ms.
    """
    onset = events["onset"].to_numpy()
    marks = pd.DataFrame(
        {"sample": onset, "value": 1, "stimulus_id": events["stim"], "stim_file": events["stim"]}
    )
    return write_recording(
        root, subject, blocks, marks, n_samples=n_samples, ch_names=ch_names, sfreq=CLOCK_HZ, task="rsvp",
        reference="Cz", table=events,
    )  # fmt: skip


FORMAT = Format(
    name="things-eeg1",
    description="THINGS-EEG1: raw BrainVision recordings of rapid streams in BIDS",
    modality="eeg",
    uses=(),
    duration_s=STIMULUS_S,
    # Each training image once, in one session.
    limits={"n_sessions": (1, 1), "train_repetitions": (1, 1)},
    count=count,
    # Below ``object_images``; training images of test concepts are ``excluded``.
    list_images=lambda size, seed: list_concepts_with_tests(
        size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed
    ),
    count_images=count_images_of_concepts,
    make_recorder=lambda size: make_sensor_system(SYSTEM),
    plan=plan,
)
