"""Alljoined1 and Alljoined-1.6M from images to raw recordings: FIF sessions, and EDF blocks of a headset.

Alljoined1 has 64 electrodes without a reference and events that name NSD's shared images. Owns
``subj01_session1_eeg.fif`` with its channel `Status`, the blocks of 120 images (each shown in both halves of a
session), ``test_indices.json``, and the two files of NSD that a reader also needs: ``nsd_expdesign.mat`` and
``nsd_stimuli.hdf5``. All images of the phantom are shared ones.

Alljoined-1.6M has 32 channels. Owns an EDF+ writer with one-second records and annotations, the markers
(``stim_train,3,-1,12``), the 19 blocks of a session (four for testing, fifteen for training) and
``experiment_metadata_categories.parquet``. Pictures are numbered from 0, test pictures from 16540, and the number is
the file name. The offset of 4 mV of the headset is simulated too.

References
----------
.. [1] Xu, J. et al. (2024). Alljoined1: a dataset for EEG-to-image decoding. arXiv:2404.05553
.. [2] Kemp, B., Olivan, J. (2003). European data format plus (EDF+). https://doi.org/10.1016/S1388-2457(03)00123-8
.. [3] Xu, J. et al. (2025). Alljoined-1.6M. arXiv:2508.18571
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.alljoined.alljoined1 import BIOSEMI64, SFREQ
from braindecode_vis.datasets.alljoined.blocks import EPOCHS_FOLDER, SPLITS, TABLES
from braindecode_vis.datasets.alljoined.sessions import N_IMAGES, N_PER_BLOCK, RAW_FILE, SPLIT_FILE
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT
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
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.fif import write_raw_fif
from braindecode_vis.parts.phantom.formats.file_writers import write_text
from braindecode_vis.parts.phantom.formats.nsd_design import Design, make_nsd_expdesign
from braindecode_vis.parts.phantom.forward import make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import find_samples, simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images, divide

SESSION_SOA_S, SESSION_STIMULUS_S = 0.35, 0.3  # [1]_
SESSION_LEAD_S, PAUSE_S = 2.0, 1.0
_OFFSET_V = 1e-3  # what all electrodes of the amplifier share, and a reference takes away


def check_alljoined1(size: PhantomSize) -> None:
    """Raise `ConfigError` if Alljoined1 cannot have this size."""
    if size.train_repetitions != size.test_repetitions or count_images(size) > N_IMAGES:
        raise ConfigError(
            f"Alljoined1 shows up to {N_IMAGES} images, all of them equally often: train_repetitions "
            f"({size.train_repetitions}) must be test_repetitions ({size.test_repetitions}), and there are "
            f"{count_images(size)} images."
        )
    divide(size.test_repetitions, 2 * size.n_sessions, what="repetitions over the halves of n_sessions")


def _expect_session_s(size: PhantomSize) -> float:
    n_trials = size.n_trials / size.n_sessions
    n_blocks = 2 * -(-count_images(size) // N_PER_BLOCK)
    return n_trials * SESSION_SOA_S + n_blocks * PAUSE_S + 2 * SESSION_LEAD_S


def count_alljoined1(size: PhantomSize) -> Counts:
    """Return work and space of the sessions and of NSD's files."""
    one, n = _expect_session_s(size), size.n_subjects * size.n_sessions
    n_bytes = n * (one * SFREQ * 65 * 4 + 20_000) + count_images(size) * 3.0 * size.image_size**2 + 4000
    return Counts(n_bytes, 0, n * one, 3 + n * one / 190, 1 + count_images(size) + n * max(1, round(one)))


def list_shared_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with their `nsd_id` (from 0) and the `code` of their events (from 1)."""
    table = list_pictures(size, seed)
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
    # Seconds of pauses before each trial: one more for every block.
    pause = np.repeat(np.arange(len(shown)), [len(block) for block in shown]) * PAUSE_S
    sample = find_samples(SESSION_LEAD_S + pause + SESSION_SOA_S * np.arange(len(rows)), SFREQ)
    return pd.DataFrame({"row": rows, "code": table["code"].to_numpy()[rows], "sample": sample})


def plan_sessions(job: PhantomJob) -> list[Unit]:
    """Return NSD's files and one unit per session."""
    n_images = len(job.table)

    def write_shared(progress: Progress) -> list[Path]:
        tested = sorted(int(number) for number in job.table["nsd_id"].iloc[job.test_rows])
        return [
            LAYOUT.write(job.root, "design", make_design(n_images, job.config.seed)),
            write_text(job.root / SPLIT_FILE, json.dumps(tested)),
        ]

    return [
        Unit("design and split", 1, write_shared),
        nsd_format.plan_brick(job),
        *list_units(
            job, "subject {person.name}, session {session}", max(1, round(_expect_session_s(job.size))), _write_session,
            session=range(1, job.size.n_sessions + 1),
        ),
    ]  # fmt: skip


def _write_session(job: PhantomJob, person: Person, session: int, progress: Progress) -> list[Path]:
    trials = make_session(job, person.index, session)
    onsets, rows = trials["sample"].to_numpy() / SFREQ, trials["row"].to_numpy()
    n_samples = int(trials["sample"].iloc[-1]) + round(SESSION_LEAD_S * SFREQ)
    blocks = simulate_continuous(
        person, job.sensors, onsets, rows, SESSION_STIMULUS_S, n_samples, name=f"session{session}"
    )
    path = write_session(
        job.root,
        person.index + 1,
        session,
        (block + np.float32(_OFFSET_V) for block in progress.watch_samples(blocks, SFREQ)),
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
        Onset and value of each code; codes count the shared images of NSD from 1.
    """
    import mne

    info = mne.create_info([*BIOSEMI64, "Status"], SFREQ, [*["eeg"] * len(BIOSEMI64), "stim"])

    def iterate() -> Iterator[np.ndarray]:
        start = 0
        for block in blocks:
            inside = (samples >= start) & (samples < start + block.shape[1])
            status = np.zeros((1, block.shape[1]), np.float32)
            # A code is in one sample only, with 0 between codes.
            status[0, samples[inside] - start] = codes[inside]
            yield np.concatenate([block, status])
            start += block.shape[1]

    path = root / RAW_FILE.format(subject=subject, session=session)
    return write_raw_fif(path, iterate(), info, n_samples)


ALLJOINED1 = Format(
    name="alljoined1",
    description="Alljoined1: raw FIF sessions of 64 channels, with the design and pictures of NSD beside them",
    modality="eeg",
    uses=(),
    duration_s=SESSION_STIMULUS_S,
    limits={"n_sessions": (1, 2)},
    check=check_alljoined1,
    count=count_alljoined1,
    list_images=list_shared_images,
    make_recorder=lambda size: make_sensor_system("eeg64-biosemi"),
    plan=plan_sessions,
)


# --- Alljoined-1.6M -----------------------------------------------------------------------------------------------

HEADSET_SFREQ = 256
BLOCK_SOA_S, BLOCK_STIMULUS_S = 0.2, 0.1  # as in THINGS-EEG2, whose design they follow [3]_
BLOCK_LEAD_S = 1.5
N_TEST_BLOCKS, N_BLOCKS = 4, 19
FIRST_TEST = 16540
OFFSET_UV = 4200.0
RANGE_UV = 8000  # of the 16 bits
EXTRA = (
    "TimestampS",
    "Counter",
    "Interpolated",
    "BatteryPercent",
    "MarkerHardware",
    "CQ_Cz",
    "EQ_Cz",
    "MOT_Q0",
)
"""Rows of a file that are not electrodes: the first three come before the electrodes, the others after."""


def check_alljoined16m(size: PhantomSize) -> None:
    """Raise `ConfigError` if Alljoined-1.6M cannot have this size."""
    divide(size.train_repetitions, size.n_sessions, what="train_repetitions over n_sessions")
    per_session = divide(size.test_repetitions, size.n_sessions, what="test_repetitions over n_sessions")
    n_train = N_BLOCKS - N_TEST_BLOCKS
    if size.n_train_images < n_train or per_session * size.n_test_concepts < N_TEST_BLOCKS:
        raise ConfigError(
            f"a session of Alljoined-1.6M has {n_train} training and {N_TEST_BLOCKS} test blocks, which "
            f"{size.n_train_images} training images and {per_session} x {size.n_test_concepts} test trials cannot fill."
        )
    if size.n_train_images > FIRST_TEST:
        raise ConfigError(
            f"training pictures are numbered below {FIRST_TEST}, but there are {size.n_train_images}."
        )


def list_numbered_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``images``, with `number` as their name."""
    table = list_pictures(size, seed, "")
    train = (table["split"] == "train").to_numpy()
    number = np.where(train, np.cumsum(train) - 1, FIRST_TEST + np.cumsum(~train) - 1)
    names = [f"{value:05d}" for value in number]
    files = [f"{name}.jpg" for name in names]
    return table.assign(
        number=number, stimulus_id=names, file_name=files, path=[f"images/{name}" for name in files]
    )


def _expect_blocks_s(size: PhantomSize) -> float:
    """Return the length of all blocks of a session, s."""
    return size.n_trials / size.n_sessions * BLOCK_SOA_S + N_BLOCKS * (2 * BLOCK_LEAD_S + 0.3)


def count_alljoined16m(size: PhantomSize) -> Counts:
    """Return work and space of the blocks."""
    one, n = _expect_blocks_s(size), size.n_subjects * size.n_sessions
    n_rows = 32 + len(EXTRA)
    n_bytes = (
        n * (one * (HEADSET_SFREQ * n_rows * 2 + 240) + N_BLOCKS * 256 * (n_rows + 2))
        + size.n_subjects * 7000
    )
    return Counts(n_bytes, 0, n * one, 3 + n * one / 100, size.n_subjects + n * N_BLOCKS)


@lru_cache(maxsize=4)
def make_blocks(job: PhantomJob, subject: int, session: int) -> dict[int, np.ndarray]:
    """Return the rows of the images of each block, in their order."""
    size = job.size
    generator = make_generator(job.config.seed, "alljoined16m", subject, session)
    train = np.flatnonzero(job.table["split"] == "train")
    tests = np.repeat(job.test_rows, size.test_repetitions // size.n_sessions)
    shown = np.repeat(train, size.train_repetitions // size.n_sessions)
    blocks = [
        *np.array_split(generator.permutation(tests), N_TEST_BLOCKS),
        *np.array_split(generator.permutation(shown), N_BLOCKS - N_TEST_BLOCKS),
    ]
    return dict(enumerate(blocks, start=1))


def plan_blocks(job: PhantomJob) -> list[Unit]:
    """Return each subject's table and one unit per block."""
    units = []
    for person in job.subjects:
        labels: dict[str, Any] = {
            "session": range(1, job.size.n_sessions + 1),
            "block": range(1, N_BLOCKS + 1),
        }
        name = "subject {person.name}, session {session:02d}, block {block:02d}"
        units.append(Unit(f"subject {person.name}, categories", 1, partial(_write_categories, job, person)))
        units += list_units(job, name, 1, _write_block, people=[person], **labels)
    return units


def _write_categories(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    table = pd.DataFrame(
        {
            "session": 1, "block_id": 1,
            "partition": job.table["split"].map({split: name for name, split in SPLITS.items()}),
            "image_path": "/srv/eeg/" + job.table["path"], "dropped": False,
            "category_name": job.table["concept"],
        }
    )  # fmt: skip
    return [write_trial_table(job.root, person.index + 1, table)]


def write_trial_table(root: Path, subject: int, table: pd.DataFrame, name: str = TABLES[0]) -> Path:
    """Write a table of trials, ``preprocessed_eeg/sub-01/experiment_metadata_categories.parquet``."""
    folder = root / EPOCHS_FOLDER / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / name) as temporary:
        table.to_parquet(temporary)
    return folder / name


def _write_block(job: PhantomJob, person: Person, session: int, block: int, progress: Progress) -> list[Path]:
    rows = make_blocks(job, person.index, session)[block]
    onsets = BLOCK_LEAD_S + BLOCK_SOA_S * np.arange(len(rows))
    n_samples = int(np.ceil(onsets[-1] + BLOCK_LEAD_S)) * HEADSET_SFREQ
    name = f"session{session:02d}-block{block:02d}"
    pieces = simulate_continuous(person, job.sensors, onsets, rows, BLOCK_STIMULUS_S, n_samples, name=name)
    volts = np.concatenate(list(pieces), axis=1)  # a block of a few minutes
    numbers = job.table["number"].to_numpy()[rows]
    generator = make_generator(job.config.seed, "headset", person.index, name)
    data = {label: np.full(n_samples, 0.0) for label in EXTRA[:3]}
    data["Counter"] = np.arange(n_samples) % HEADSET_SFREQ * 1.0
    data |= dict(zip(job.sensors.ch_names, OFFSET_UV + 1e6 * volts.astype(float), strict=True))
    data |= {label: generator.integers(0, 100, n_samples).astype(float) for label in EXTRA[3:]}
    return [write_block(job.root, person.index + 1, session, block, data, onsets, numbers)]


def write_block(
    root: Path,
    subject: int,
    session: int,
    block: int,
    rows: Mapping[str, np.ndarray],
    onsets: Sequence[float] | np.ndarray,
    numbers: Sequence[int] | np.ndarray,
    *,
    title: str | None = None,
    extra: Sequence[tuple[float, str]] = (),
    unit: str = "uV",
) -> Path:
    """Write ``raw_eeg/sub-01/session_01/block_01/... .edf`` and return its path.

    Parameters
    ----------
    rows : mapping of label to array of shape (n_samples,)
        Microvolts at 256 Hz, whole seconds.
    onsets, numbers
        Onset (s) and number of each picture; blocks 1 to 4 mark them as test pictures.
    title
        Subject, session and block in the file name, if they are wrong, as in some published files.
    extra
        Further annotations: onset (s) and text.
    unit
        Unit, with the spelling of the header.
    """
    folder = root / "raw_eeg" / f"sub-{subject:02d}" / f"session_{session:02d}" / f"block_{block:02d}"
    label = "stim_test" if block <= N_TEST_BLOCKS else "stim_train"
    shown = [
        (float(onset), f"{label},{number},-1,{place}")
        for place, (onset, number) in enumerate(zip(onsets, numbers, strict=True), start=1)
    ]
    name = title or f"Subject {subject}, Session {session}, Block {block}"
    path = folder / f"{name} Recording_FLEX2_213075_2025.01.25T15.18.28.08.00.md.edf"
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(make_edf(rows, [*shown, *extra], unit=unit))
    return path


def make_edf(
    rows: Mapping[str, np.ndarray], markers: Sequence[tuple[float, str]], *, unit: str = "uV"
) -> bytes:
    """Return an EDF+ file [2]_ of one-second records with time-stamped annotations.

    Parameters
    ----------
    rows : mapping of label to array of shape (n_samples,)
        Microvolts at 256 Hz; clipped to plus and minus 8000.
    markers
        Onset (s) and text of each annotation.
    """
    names = [*rows, "EDF Annotations"]
    n_records, n = len(next(iter(rows.values()))) // HEADSET_SFREQ, len(names)
    notes = []
    for second in range(n_records):
        own = [marker for marker in markers if second <= marker[0] < second + 1]
        # Every record begins with its own time; \x14 ends a text, \x00 a list of them [2]_.
        text = f"+{second}\x14\x14\x00" + "".join(f"+{onset:.6f}\x14{label}\x14\x00" for onset, label in own)
        notes.append(text.encode())
    # Samples of two bytes; every record has space for the longest notes [2]_.
    width = max(120, max(map(len, notes)) // 2 + 1)

    def cells(values: Sequence[object], size: int) -> bytes:
        return b"".join(str(value).ljust(size)[:size].encode("latin1") for value in values)

    header = cells(["0"], 8) + cells(["X X X X"], 80) + cells(["Startdate 25-JAN-2025 X X X"], 80)
    header += b"25.01.2515.18.28" + cells([256 * (n + 1)], 8) + cells(["EDF+C"], 44)
    header += cells([n_records], 8) + cells([1], 8) + cells([n], 4)
    # The fields of all signals come one after the other: labels, transducers, units, then their limits [2]_.
    header += cells(names, 16) + cells([""] * n, 80) + cells([unit] * (n - 1) + [""], 8)
    header += cells([-RANGE_UV] * (n - 1) + [-1], 8) + cells([RANGE_UV] * (n - 1) + [1], 8)
    header += cells([-32768] * n, 8) + cells([32767] * n, 8) + cells([""] * n, 80)
    header += cells([HEADSET_SFREQ] * (n - 1) + [width], 8) + cells([""] * n, 32)
    body = bytearray()
    for second in range(n_records):
        for values in rows.values():
            piece = np.clip(
                values[second * HEADSET_SFREQ : (second + 1) * HEADSET_SFREQ], -RANGE_UV, RANGE_UV
            )
            body += np.round((piece + RANGE_UV) / (2 * RANGE_UV) * 65535 - 32768).astype("<i2").tobytes()
        body += notes[second].ljust(2 * width, b"\x00")
    return header + bytes(body)


ALLJOINED16M = Format(
    name="alljoined16m",
    description="Alljoined-1.6M: raw EDF blocks of a 32-channel headset, table of categories",
    modality="eeg",
    uses=(),
    duration_s=BLOCK_STIMULUS_S,
    check=check_alljoined16m,
    count=count_alljoined16m,
    list_images=list_numbered_images,
    make_recorder=lambda size: make_sensor_system("eeg32-emotiv"),
    plan=plan_blocks,
    n_channels=32,
)
