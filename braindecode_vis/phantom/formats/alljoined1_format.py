"""Alljoined1 from images to raw FIF sessions: 64 electrodes without a reference, events that name NSD's shared images.

Owns ``subj01_session1_eeg.fif`` with its channel `Status`, the blocks of 120 images (each shown in both halves of a
session), ``test_indices.json``, and the two files of NSD that a reader needs beside it: ``nsd_expdesign.mat`` and
``nsd_stimuli.hdf5``. All images of the phantom are shared ones.

References
----------
.. [1] Xu, J. et al. (2024). Alljoined1: a dataset for EEG-to-image decoding. arXiv:2404.05553
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.datasets.alljoined.alljoined1 import BIOSEMI64, SFREQ
from braindecode_vis.datasets.alljoined.sessions import N_IMAGES, N_PER_BLOCK
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import TRUTH, Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.phantom.formats import nsd_format
from braindecode_vis.phantom.formats.fif import write_raw_fif
from braindecode_vis.phantom.formats.file_writers import write_text
from braindecode_vis.phantom.formats.nsd_design import Design, make_nsd_expdesign, write_expdesign
from braindecode_vis.phantom.forward import make_sensor_system
from braindecode_vis.phantom.recordings import find_samples, simulate_continuous
from braindecode_vis.phantom.sizes import PhantomSize, check_numbers, count_images, divide
from braindecode_vis.phantom.stimuli.images import list_split
from braindecode_vis.seeds import derive_seed, make_generator

SOA_S, STIMULUS_S = 0.35, 0.3  # [1]_
LEAD_S, PAUSE_S = 2.0, 1.0
_OFFSET_V = 1e-3  # what all electrodes of the amplifier share, and a reference takes away


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if Alljoined1 cannot have this size."""
    check_numbers(size, "alljoined1", ())
    if (
        size.train_repetitions != size.test_repetitions
        or size.n_sessions > 2
        or count_images(size) > N_IMAGES
    ):
        raise ConfigError(
            f"Alljoined1 shows up to {N_IMAGES} images, all of them equally often, in one or two sessions: "
            f"train_repetitions ({size.train_repetitions}) must be test_repetitions ({size.test_repetitions}), "
            f"n_sessions ({size.n_sessions}) at most 2, and there are {count_images(size)} images."
        )
    divide(size.test_repetitions, 2 * size.n_sessions, what="repetitions over the halves of n_sessions")


def _expect_seconds(size: PhantomSize) -> float:
    n_trials = size.n_trials / size.n_sessions
    n_blocks = 2 * -(-count_images(size) // N_PER_BLOCK)
    return n_trials * SOA_S + n_blocks * PAUSE_S + 2 * LEAD_S


def count(size: PhantomSize) -> Counts:
    """Return work and space of the sessions and of NSD's files."""
    one, n = _expect_seconds(size), size.n_subjects * size.n_sessions
    n_bytes = n * (one * SFREQ * 65 * 4 + 20_000) + count_images(size) * 3.0 * size.image_size**2 + 4000
    return Counts(n_bytes, 0, n * one, 3 + n * one / 60, 1 + count_images(size) + n * max(1, round(one)))


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with their `nsd_id` (from 0) and the `code` of their events (from 1)."""
    table = list_split(
        size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed, f"{TRUTH}/images"
    )
    shared = make_design(len(table), seed)["sharedix"][0]
    codes = make_generator(seed, "alljoined1", "codes").permutation(len(table)) + 1
    return table.assign(code=codes, nsd_id=shared[codes - 1] - 1)


@lru_cache(maxsize=4)
def make_design(n_images: int, seed: int) -> Design:
    """Return the arrays of ``nsd_expdesign.mat`` in which every image is shared."""
    return make_nsd_expdesign(1, 1, n_images, n_images, n_images, derive_seed(seed, "design"), n_runs=1)


@lru_cache(maxsize=8)
def make_session(job: PhantomJob, subject: int, session: int) -> pd.DataFrame:
    """Return the trials of a session: `row` of the image, its `code`, and `sample` of the onset.

    Each block holds the codes of its own 120 images; all blocks are shown, then shown again [1]_.
    """
    size, table = job.size, job.table
    generator = make_generator(job.config.seed, "alljoined1", subject, session)
    times = size.test_repetitions // (2 * size.n_sessions)
    blocks = [
        np.flatnonzero((table["code"] - 1) // N_PER_BLOCK == number)
        for number in range(-(-len(table) // N_PER_BLOCK))
    ]
    shown = [generator.permutation(np.repeat(block, times)) for _ in range(2) for block in blocks]
    rows = np.concatenate(shown)
    pause = np.repeat(np.arange(len(shown)), [len(block) for block in shown]) * PAUSE_S
    sample = find_samples(LEAD_S + pause + SOA_S * np.arange(len(rows)), SFREQ)
    return pd.DataFrame({"row": rows, "code": table["code"].to_numpy()[rows], "sample": sample})


def plan(job: PhantomJob) -> list[Unit]:
    """Return NSD's files and one unit per session."""
    n_images = len(job.table)

    def write_shared(progress: Progress) -> list[Path]:
        tested = sorted(int(number) for number in job.table["nsd_id"].iloc[job.test_rows])
        return [
            write_expdesign(job.root, make_design(n_images, job.config.seed)),
            write_text(job.root / "test_indices.json", json.dumps(tested)),
        ]

    units = [Unit("design and split", 1, write_shared), nsd_format.plan_brick(job)]
    n_steps = max(1, round(_expect_seconds(job.size)))
    for person in job.subjects:
        for session in range(1, job.size.n_sessions + 1):
            name = f"subject {person.name}, session {session}"
            units.append(Unit(name, n_steps, partial(_write_session, job, person, session)))
    return units


def _write_session(job: PhantomJob, person: Person, session: int, progress: Progress) -> list[Path]:
    trials = make_session(job, person.index, session)
    onsets, rows = trials["sample"].to_numpy() / SFREQ, trials["row"].to_numpy()
    n_samples = int(trials["sample"].iloc[-1]) + round(LEAD_S * SFREQ)
    blocks = simulate_continuous(
        person, job.sensors, onsets, rows, STIMULUS_S, n_samples, name=f"session{session}"
    )
    path = write_session(
        job.root,
        person.index + 1,
        session,
        (
            block + np.float32(_OFFSET_V)
            for block in progress.watch(blocks, lambda block: block.shape[1] / SFREQ)
        ),
        trials["sample"].to_numpy(),
        trials["code"].to_numpy(),
        n_samples=n_samples,
    )
    return [path]


def write_session(
    root: Path,
    subject: int,
    session: int,
    blocks: Iterable[np.ndarray],
    samples: np.ndarray,
    codes: np.ndarray,
    *,
    n_samples: int,
) -> Path:
    """Write ``subj01_session1_eeg.fif``: 64 channels without a reference, and the merged triggers on `Status`.

    Parameters
    ----------
    blocks : iterable of arrays of shape (64, n)
        Volts at 512 Hz.
    samples, codes : integer arrays of shape (n_events,)
        When which code begins; codes count the shared images of NSD from 1.
    """
    import mne

    info = mne.create_info([*BIOSEMI64, "Status"], SFREQ, [*["eeg"] * len(BIOSEMI64), "stim"])

    def iterate() -> Iterator[np.ndarray]:
        start = 0
        for block in blocks:
            inside = (samples >= start) & (samples < start + block.shape[1])
            status = np.zeros((1, block.shape[1]), np.float32)
            status[0, samples[inside] - start] = codes[inside]
            yield np.concatenate([block, status])
            start += block.shape[1]

    return write_raw_fif(root / f"subj{subject:02d}_session{session}_eeg.fif", iterate(), info, n_samples)


FORMAT = Format(
    name="alljoined1",
    description="Alljoined1: raw FIF sessions of 64 channels, with the design and pictures of NSD beside them",
    modality="eeg",
    uses=(),
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    make_recorder=lambda size: make_sensor_system("eeg64-biosemi"),
    plan=plan,
)
