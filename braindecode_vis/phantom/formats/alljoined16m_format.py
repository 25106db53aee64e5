"""Alljoined-1.6M from images to raw EDF blocks of a 32-channel headset, and the table of categories.

Owns an EDF+ writer with one-second records and annotations, the markers (``stim_train,3,-1,12``), the 19 blocks of a
session (four for testing, fifteen for training) and ``experiment_metadata_categories.parquet``. Pictures are numbered
from 0, test pictures from 16540, and the number is the file name. The headset's offset of 4 mV is kept.

References
----------
.. [1] Xu, J. et al. (2025). Alljoined-1.6M. arXiv:2508.18571
.. [2] Kemp, B., Olivan, J. (2003). European data format plus (EDF+). https://doi.org/10.1016/S1388-2457(03)00123-8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.phantom.forward import make_sensor_system
from braindecode_vis.phantom.recordings import simulate_continuous
from braindecode_vis.phantom.sizes import PhantomSize, check_numbers, divide
from braindecode_vis.phantom.stimuli.images import list_split
from braindecode_vis.seeds import make_generator
from braindecode_vis.store import replace_atomically

SFREQ = 256
SOA_S, STIMULUS_S = 0.2, 0.1  # as in THINGS-EEG2, whose design they follow [1]_
LEAD_S = 1.5
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
"""Rows of a file that are no electrodes: the first three come before them, the others after."""
_TABLE = "experiment_metadata_categories.parquet"


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if Alljoined-1.6M cannot have this size."""
    check_numbers(size, "alljoined16m", ())
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


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``images``, called by their `number`."""
    table = list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed)
    train = (table["split"] == "train").to_numpy()
    number = np.where(train, np.cumsum(train) - 1, FIRST_TEST + np.cumsum(~train) - 1)
    names = [f"{value:05d}" for value in number]
    files = [f"{name}.jpg" for name in names]
    return table.assign(
        number=number, stimulus_id=names, file_name=files, path=[f"images/{name}" for name in files]
    )


def _expect_seconds(size: PhantomSize) -> float:
    """Return the length of all blocks of a session, s."""
    return size.n_trials / size.n_sessions * SOA_S + N_BLOCKS * (2 * LEAD_S + 0.3)


def count(size: PhantomSize) -> Counts:
    """Return work and space of the blocks."""
    one, n = _expect_seconds(size), size.n_subjects * size.n_sessions
    n_rows = 32 + len(EXTRA)
    n_bytes = n * (one * (SFREQ * n_rows * 2 + 240) + N_BLOCKS * 256 * (n_rows + 2)) + size.n_subjects * 7000
    return Counts(n_bytes, 0, n * one, 3 + n * one / 100, size.n_subjects + n * N_BLOCKS)


@lru_cache(maxsize=4)
def make_session(job: PhantomJob, subject: int, session: int) -> dict[int, np.ndarray]:
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


def plan(job: PhantomJob) -> list[Unit]:
    """Return each person's table and one unit per block."""
    units = []
    for person in job.subjects:
        units.append(Unit(f"subject {person.name}, categories", 1, partial(_write_categories, job, person)))
        for session in range(1, job.size.n_sessions + 1):
            for block in range(1, N_BLOCKS + 1):
                name = f"subject {person.name}, session {session:02d}, block {block:02d}"
                units.append(Unit(name, 1, partial(_write_block, job, person, session, block)))
    return units


def _write_categories(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    table = pd.DataFrame(
        {
            "session": 1, "block_id": 1,
            "partition": np.where(job.table["split"] == "train", "stim_train", "stim_test"),
            "image_path": "/srv/eeg/" + job.table["path"], "dropped": False,
            "category_name": job.table["concept"],
        }
    )  # fmt: skip
    return [write_trial_table(job.root, person.index + 1, table)]


def write_trial_table(root: Path, subject: int, table: pd.DataFrame, name: str = _TABLE) -> Path:
    """Write a table of trials, ``preprocessed_eeg/sub-01/experiment_metadata_categories.parquet``."""
    folder = root / "preprocessed_eeg" / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    with replace_atomically(folder / name) as temporary:
        table.to_parquet(temporary)
    return folder / name


def _write_block(job: PhantomJob, person: Person, session: int, block: int, progress: Progress) -> list[Path]:
    rows = make_session(job, person.index, session)[block]
    onsets = LEAD_S + SOA_S * np.arange(len(rows))
    n_samples = int(np.ceil(onsets[-1] + LEAD_S)) * SFREQ
    name = f"session{session:02d}-block{block:02d}"
    pieces = simulate_continuous(person, job.sensors, onsets, rows, STIMULUS_S, n_samples, name=name)
    volts = np.concatenate(list(pieces), axis=1)  # a block of a few minutes
    numbers = job.table["number"].to_numpy()[rows]
    generator = make_generator(job.config.seed, "headset", person.index, name)
    data = {label: np.full(n_samples, 0.0) for label in EXTRA[:3]}
    data["Counter"] = np.arange(n_samples) % SFREQ * 1.0
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
        When (s) which picture is shown; blocks 1 to 4 mark them as test pictures.
    title
        What the file name says of itself, where it is wrong, as in some published files.
    extra
        Further annotations: onset (s) and text.
    unit
        As the header spells it.
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
    n_records, n = len(next(iter(rows.values()))) // SFREQ, len(names)
    notes = []
    for second in range(n_records):
        own = [marker for marker in markers if second <= marker[0] < second + 1]
        # Every record tells its own time first; \x14 ends a text, \x00 a list of them [2]_.
        text = f"+{second}\x14\x14\x00" + "".join(f"+{onset:.6f}\x14{label}\x14\x00" for onset, label in own)
        notes.append(text.encode())
    width = max(120, max(map(len, notes)) // 2 + 1)

    def cells(values: Sequence[object], size: int) -> bytes:
        return b"".join(str(value).ljust(size)[:size].encode("latin1") for value in values)

    header = cells(["0"], 8) + cells(["X X X X"], 80) + cells(["Startdate 25-JAN-2025 X X X"], 80)
    header += b"25.01.2515.18.28" + cells([256 * (n + 1)], 8) + cells(["EDF+C"], 44)
    header += cells([n_records], 8) + cells([1], 8) + cells([n], 4)
    header += cells(names, 16) + cells([""] * n, 80) + cells([unit] * (n - 1) + [""], 8)
    header += cells([-RANGE_UV] * (n - 1) + [-1], 8) + cells([RANGE_UV] * (n - 1) + [1], 8)
    header += cells([-32768] * n, 8) + cells([32767] * n, 8) + cells([""] * n, 80)
    header += cells([SFREQ] * (n - 1) + [width], 8) + cells([""] * n, 32)
    body = bytearray()
    for second in range(n_records):
        for values in rows.values():
            piece = np.clip(values[second * SFREQ : (second + 1) * SFREQ], -RANGE_UV, RANGE_UV)
            body += np.round((piece + RANGE_UV) / (2 * RANGE_UV) * 65535 - 32768).astype("<i2").tobytes()
        body += notes[second].ljust(2 * width, b"\x00")
    return header + bytes(body)


FORMAT = Format(
    name="alljoined16m",
    description="Alljoined-1.6M: raw EDF blocks of a 32-channel headset, table of categories",
    modality="eeg",
    uses=(),
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    make_recorder=lambda size: make_sensor_system("eeg32-emotiv"),
    plan=plan,
    n_channels=32,
)
