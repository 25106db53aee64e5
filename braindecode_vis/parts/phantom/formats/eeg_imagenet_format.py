"""EEG-ImageNet from images to ``.pth`` files: epochs of 62 channels in blocks of one category.

Owns ``EEG-ImageNet_1.pth`` and ``_2.pth`` (dictionaries of tensors and text that torch reads without running code), the
block design, in which the first 30 pictures of a category are for training and the rest for testing, and the pictures
below ``imageNet_images``. All categories are fine ones; half of the real ones are coarse.

References
----------
.. [1] Zhu, S. et al. (2024). EEG-ImageNet. arXiv:2406.07151
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import make_concepts, name_imagenet
from braindecode_vis.datasets.eeg_imagenet import CHANNELS, N_TRAIN_PER_BLOCK, PART_NAME, PICTURES
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.forward import make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import cut_epochs, simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images, divide

SOA_S = 0.5  # each picture stays until the next one [1]_
N_TIMES = 501
PAUSE_S = 1.0  # before a block
SUBJECTS_PER_PART = 8


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images, category by category: those for training, then the test images of the same category."""
    n_tests = size.n_test_concepts // size.n_train_concepts
    n_each = size.n_train_exemplars + n_tests
    concepts = make_concepts(size.n_train_concepts, seed=seed)["concept"].tolist()
    table = pd.DataFrame(
        {
            "concept": np.repeat(concepts, n_each),
            "concept_index": np.repeat(np.arange(len(concepts)), n_each),
            "exemplar": np.tile(np.arange(n_each), len(concepts)),
        }
    )
    table["split"] = np.where(table["exemplar"] < size.n_train_exemplars, "train", "test")
    synsets, names = name_imagenet(table)
    files = [f"{name}.JPEG" for name in names]
    paths = [f"{PICTURES}/{synset}/{name}" for synset, name in zip(synsets, files, strict=True)]
    return table.assign(synset=synsets, stimulus_id=names, file_name=files, path=paths)


def count(size: PhantomSize) -> Counts:
    """Return work and space of the parts."""
    n = size.n_subjects * count_images(size)
    recorded = n * SOA_S + size.n_subjects * size.n_train_concepts * PAUSE_S
    spooled = min(size.n_subjects, SUBJECTS_PER_PART) * count_images(size) * len(CHANNELS) * N_TIMES * 4.0
    n_bytes = n * (len(CHANNELS) * N_TIMES * 4.0 + 330)
    return Counts(n_bytes, spooled, recorded, 4 + recorded / 60, n)


def plan(job: PhantomJob) -> list[Unit]:
    """Return one unit per part of up to eight subjects."""
    units = []
    for start in range(0, job.size.n_subjects, SUBJECTS_PER_PART):
        people = job.subjects[start : start + SUBJECTS_PER_PART]
        part = start // SUBJECTS_PER_PART + 1
        units.append(
            Unit(f"part {part}", len(people) * len(job.table), partial(_write_part, job, people, part))
        )
    return units


def _write_part(job: PhantomJob, people: Sequence[Person], part: int, progress: Progress) -> list[Path]:
    import torch

    n = len(job.table)
    spool = job.scratch / f"eeg-imagenet-{part}.npy"
    try:
        # On disk: a full part has gigabytes, and torch can write memory-mapped arrays.
        epochs = np.lib.format.open_memmap(spool, "w+", np.float32, (len(people), n, len(CHANNELS), N_TIMES))
        entries: list[dict[str, Any]] = []
        for person, own in zip(people, epochs, strict=True):
            rows = _order_images(job, person)
            for place, epoch in enumerate(
                progress.watch(_simulate_epochs(job, person, rows), lambda epoch: 1)
            ):
                own[place] = epoch
            entries += [
                {
                    "eeg_data": torch.from_numpy(own[place]), "granularity": "fine", "subject": person.index,
                    "label": job.table["synset"].iloc[row], "image": job.table["file_name"].iloc[row],
                }
                for place, row in enumerate(rows.tolist())
            ]  # fmt: skip
        return [write_part(job.root / PART_NAME.format(part=part), entries, sorted(set(job.table["synset"])))]
    finally:
        spool.unlink(missing_ok=True)


def _order_images(job: PhantomJob, person: Person) -> np.ndarray:
    """Return the images in the order of the blocks, which each subject sees in a different order."""
    generator = make_generator(job.config.seed, "eeg-imagenet", person.index)
    blocks = [np.flatnonzero(job.table["synset"] == name) for name in sorted(set(job.table["synset"]))]
    return np.concatenate([blocks[number] for number in generator.permutation(len(blocks))])


def _simulate_epochs(job: PhantomJob, person: Person, rows: np.ndarray) -> Iterator[np.ndarray]:
    system = job.sensors
    # Number of the block of each trial: it increases when the category changes.
    block = np.r_[0, np.cumsum(np.diff(job.table["concept_index"].to_numpy()[rows]) != 0)]
    onsets = PAUSE_S * (block + 1) + SOA_S * np.arange(len(rows))
    starts = np.round(onsets * system.sfreq).astype(int)
    n_samples = int(starts[-1]) + N_TIMES + round(system.sfreq)
    pieces = simulate_continuous(person, system, onsets, rows, SOA_S, n_samples, name="blocks")
    return cut_epochs(pieces, starts, N_TIMES)


def write_part(path: Path, entries: Sequence[dict[str, Any]], labels: Sequence[str]) -> Path:
    """Write one ``.pth`` file.

    Parameters
    ----------
    entries
        In the order of presentation: `eeg_data` (tensor of 62 channels x 501 samples at 1000 Hz, volts), `granularity`
        (``coarse`` or ``fine``), `subject` (from 0), `label` (synset) and `image` (``n01440037_142.JPEG``).
    labels
        Every category.
    """
    import torch

    images = sorted({entry["image"] for entry in entries})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        torch.save({"dataset": list(entries), "labels": list(labels), "images": images}, file)
    return path


FORMAT = Format(
    name="eeg-imagenet",
    description="EEG-ImageNet: epochs of 62 channels in .pth files, in blocks of one category",
    modality="eeg",
    uses=(),
    duration_s=SOA_S,
    # Every picture once, in blocks; the first pictures of a block are for training.
    limits={
        "n_train_exemplars": (N_TRAIN_PER_BLOCK, N_TRAIN_PER_BLOCK),
        "n_sessions": (1, 1),
        "train_repetitions": (1, 1),
        "test_repetitions": (1, 1),
    },
    check=lambda size: divide(
        size.n_test_concepts, size.n_train_concepts, what="test images over the categories"
    ),
    count=count,
    list_images=list_images,
    make_recorder=lambda size: make_sensor_system("eeg62-neuroscan"),
    plan=plan,
)
