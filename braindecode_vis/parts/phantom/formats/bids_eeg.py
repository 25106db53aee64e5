"""A generic BIDS EEG data set from images to BrainVision recordings, and the design that it shares with BIDS fMRI.

Owns the design (every session shows all images one at a time, in its own order), ``sub-*/[ses-*]/eeg`` and the
files at the root. BrainVision consists of two text files and one flat file, so samples are written block by block; only
NumPy and pandas are needed. The name of the picture is in the column `stim_file` of the events, relative to
``stimuli``, and `stimulus_id` repeats its identity.

References
----------
.. [1] Pernet, C. R. et al. (2019). EEG-BIDS, an extension to the brain imaging data structure for
   electroencephalography. Scientific Data 6, 103. https://doi.org/10.1038/s41597-019-0104-8
.. [2] BrainVision Core Data Format 1.0. https://www.brainproducts.com/support-resources/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError, check_columns
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
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
from braindecode_vis.parts.phantom.formats.file_writers import (
    check_block,
    check_count,
    write_json_file,
    write_text,
    write_tsv,
)
from braindecode_vis.parts.phantom.forward import make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize, divide

EEG_SYSTEM, EEG_SFREQ, EEG_CHANNELS = "eeg64-biosemi", 512.0, 64
EVENT_COLUMNS = ("sample", "stimulus_id", "stim_file", "value")
# The names of BIDS-EEG for the channel types of MNE [1]_.
_TYPES = {"eeg": "EEG", "eog": "EOG", "misc": "MISC", "stim": "TRIG", "ecg": "ECG", "emg": "EMG"}


class TrialTiming(NamedTuple):
    """Times of the images, all in s: time between onsets (uniform, mean and half range), presentation, silence."""

    mean: float
    jitter: float
    stimulus: float
    first: float
    tail: float


EEG_TIMING = TrialTiming(mean=0.8, jitter=0.1, stimulus=0.3, first=2.0, tail=2.0)


def check_sessions(size: PhantomSize, *, whole: bool = True) -> None:
    """Raise `ConfigError` if the data set cannot have this size.

    Parameters
    ----------
    whole
        Every session shows the test images equally often; otherwise their repetitions are spread over the sessions.
    """
    if size.train_repetitions > 1:
        divide(size.train_repetitions, size.n_sessions, what="train_repetitions over n_sessions")
    else:
        divide(size.n_train_images, size.n_sessions, what="training images over n_sessions")
    if whole:
        divide(size.test_repetitions, size.n_sessions, what="test_repetitions over n_sessions")
    per_session = size.n_trials // size.n_sessions
    if per_session < (size.n_runs or 1):
        raise ConfigError(f"n_runs ({size.n_runs}) cannot exceed the {per_session} trials of a session.")


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``stimuli``."""
    return list_pictures(size, seed, "stimuli")


def expect_run_s(size: PhantomSize, timing: TrialTiming) -> float:
    """Return the expected length of a run in s."""
    n_trials = size.n_trials / size.n_sessions / (size.n_runs or 1)
    return n_trials * timing.mean + timing.first + timing.tail


def count_eeg(size: PhantomSize) -> Counts:
    """Return work and space of the recordings."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    run_s = expect_run_s(size, EEG_TIMING)
    # Sidecars need about 10 kB per run, the events 250 bytes per trial.
    n_bytes = (
        n_runs * (estimate_bytes(round(run_s * EEG_SFREQ), EEG_CHANNELS) + 10_000)
        + 250 * size.n_trials * size.n_subjects
    )
    return Counts(n_bytes, 0, n_runs * run_s, 2 + n_runs * run_s / 150, 1 + n_runs * max(1, round(run_s)))


@lru_cache(maxsize=4)
def make_design(job: PhantomJob, subject: int, timing: TrialTiming) -> pd.DataFrame:
    """Return every trial of a subject.

    Returns
    -------
    DataFrame
        `session`, `run` (from 1), `row` of the image, `onset` in s from the start of the run, and `repetition` of the
        image over all sessions.
    """
    size = job.size
    train, test = np.flatnonzero(job.table["split"] == "train"), job.test_rows
    order = make_generator(job.config.seed, "bids", subject).permutation(train)
    sessions = []
    for session in range(1, size.n_sessions + 1):
        generator = make_generator(job.config.seed, "bids", subject, session)
        # Images that are shown once are divided among the sessions; others are shown in each session.
        once = size.train_repetitions == 1
        shown = np.array_split(order, size.n_sessions)[session - 1] if once else train
        times = 1 if once else size.train_repetitions // size.n_sessions
        repeated = np.repeat(test, size.test_repetitions // size.n_sessions)
        if size.test_repetitions % size.n_sessions:
            repeated = np.array_split(np.tile(test, size.test_repetitions), size.n_sessions)[session - 1]
        rows = np.concatenate([np.repeat(shown, times), repeated])
        table = pd.DataFrame({"session": session, "row": generator.permutation(rows)})
        table.insert(1, "run", np.arange(len(rows)) * (size.n_runs or 1) // len(rows) + 1)
        gaps = generator.uniform(timing.mean - timing.jitter, timing.mean + timing.jitter, len(rows))
        # The first trial of each run comes after a pause at the start of the run.
        gaps[~table["run"].duplicated()] = timing.first
        # Rounded to whole ms, as in tables of events.
        table["onset"] = pd.Series(gaps).groupby(table["run"]).cumsum().round(3)
        sessions.append(table)
    design = pd.concat(sessions, ignore_index=True)
    return design.assign(repetition=design.groupby("row").cumcount())


def describe_events(job: PhantomJob, trials: pd.DataFrame) -> pd.DataFrame:
    """Return the event columns for the images of some trials; `stim_file` is relative to ``stimuli``, as in BIDS."""
    shown = job.table.iloc[trials["row"].to_numpy()]
    return pd.DataFrame(
        {
            "stimulus_id": shown["stimulus_id"].to_numpy(),
            "stim_file": shown["path"].str.removeprefix("stimuli/").to_numpy(),
            "concept": shown["concept"].to_numpy(),
            "split": shown["split"].to_numpy(),
            "repetition": trials["repetition"].to_numpy(),
        }
    )


def plan_eeg(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per recording."""
    return plan_runs(job, EEG_TIMING, write_dataset, _write_recording)


def plan_runs(
    job: PhantomJob,
    timing: TrialTiming,
    write_root_files: Callable[[Path, pd.DataFrame], None],
    write_one: Callable[[PhantomJob, Person, int, int, Progress], list[Path]],
    step_s: float = 1.0,
) -> list[Unit]:
    """Return the unit of the root files and one unit per run, with progress in steps of `step_s`."""

    def write_root(progress: Progress) -> list[Path]:
        participants = pd.DataFrame({"participant_id": [f"sub-{person.name}" for person in job.subjects]})
        write_root_files(job.root, participants.assign(species="phantom"))
        return [job.root / "dataset_description.json", job.root / "participants.tsv", job.root / "README"]

    return [
        Unit("the files of the data set", 1, write_root),
        *list_run_units(job, timing, write_one, step_s=step_s, name=lambda person: person.name),
    ]


def list_run_units(
    job: PhantomJob,
    timing: TrialTiming,
    write_one: Callable[[PhantomJob, Person, int, int, Progress], list[Path]],
    *,
    step_s: float,
    name: Callable[[Person], str],
) -> list[Unit]:
    """Return one unit per run of every subject and session; `name` gives the name of a subject in the data set."""
    n_steps = max(1, round(expect_run_s(job.size, timing) / step_s))
    labels: dict[str, Any] = {
        "session": range(1, job.size.n_sessions + 1),
        "run": range(1, job.size.runs + 1),
    }
    units = []
    for person in job.subjects:
        text = f"subject {name(person)}, session {{session:02d}}, run {{run:02d}}"
        units += list_units(job, text, n_steps, write_one, people=[person], **labels)
    return units


def _write_recording(
    job: PhantomJob, person: Person, session: int, run: int, progress: Progress
) -> list[Path]:
    system = job.sensors
    design = make_design(job, person.index, EEG_TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    # Onsets are moved to whole samples first, so that events and signal agree exactly.
    samples = np.round(trials["onset"].to_numpy() * system.sfreq).astype(int)
    n_samples = int(samples[-1]) + round(EEG_TIMING.tail * system.sfreq)
    blocks = simulate_continuous(
        person,
        system,
        samples / system.sfreq,
        trials["row"].to_numpy(),
        EEG_TIMING.stimulus,
        n_samples,
        name=f"ses-{session:02d}_run-{run:02d}",
    )
    events = describe_events(job, trials)
    # Two trigger bytes cannot number more images than this; `stimulus_id` identifies all.
    events.insert(0, "value", trials["row"].to_numpy() % 65535 + 1)
    events.insert(0, "sample", samples)
    path = write_recording(
        job.root,
        person.name,
        progress.watch_samples(blocks, system.sfreq),
        events,
        n_samples=n_samples,
        ch_names=system.ch_names,
        sfreq=system.sfreq,
        ch_pos=system.ch_pos,
        session=f"{session:02d}",
        run=f"{run:02d}",
        stimulus_s=EEG_TIMING.stimulus,
        line_freq=system.line_freq,
        reference=system.reference,
    )
    return sorted(path.parent.glob(f"{path.name.removesuffix('_eeg.vhdr')}_*"))


def write_dataset(
    root: Path, participants: pd.DataFrame, *, name: str = "braindecode_vis phantom EEG"
) -> None:
    """Write ``dataset_description.json``, ``participants.tsv``, ``participants.json`` and ``README``.

    Parameters
    ----------
    participants : DataFrame
        `participant_id` (``sub-01``...), then any column.
    """
    check_columns(participants.columns, ("participant_id",), what="the participants table")
    write_json_file(
        root / "dataset_description.json",
        {
            "Name": name,
            "BIDSVersion": "1.8.0",
            "DatasetType": "raw",
            "License": "CC0",
            "Authors": ["phantom"],
        },
    )
    write_tsv(root / "participants.tsv", participants)
    described = {str(column): {"Description": str(column)} for column in participants.columns[1:]}
    write_json_file(root / "participants.json", described)
    write_text(root / "README", f"{name}: simulated people with a known ground truth.\n")


def write_recording(
    root: Path,
    subject: str,
    blocks: Iterable[np.ndarray],
    events: pd.DataFrame,
    *,
    n_samples: int,
    ch_names: Sequence[str],
    sfreq: float,
    ch_pos: np.ndarray | None = None,
    ch_types: Sequence[str] | None = None,
    session: str | None = None,
    task: str = "images",
    run: str | None = None,
    stimulus_s: float = 0.1,
    line_freq: float = 50.0,
    reference: str = "average",
    table: pd.DataFrame | None = None,
) -> Path:
    """Write one recording with its sidecars and return the path of the header (``.vhdr``).

    Parameters
    ----------
    subject, session, run
        BIDS labels without their key, for example ``"01"``.
    blocks : iterable of arrays of shape (n_channels, n)
        Volts. Written as float32 microvolts.
    events : DataFrame
        `sample`, `value` (trigger code, 1 to 65535), `stimulus_id` and `stim_file`; further columns are kept.
    ch_pos : array of shape (n_channels, 3), optional
        Electrode positions (m) in head coordinates; NaN rows are written ``n/a``.
    ch_types
        MNE types; ``eeg`` by default.
    table : DataFrame, optional
        ``events.tsv`` in the spelling of another data set, instead of `events`.

    Raises
    ------
    DataError
        If an event is outside the recording, or the blocks do not fit.
    """
    check_columns(events.columns, EVENT_COLUMNS, what="the events of a BIDS recording")
    samples = events["sample"].to_numpy(int)
    if len(samples) and (samples.min() < 0 or samples.max() >= n_samples):
        raise DataError(f"an event of subject {subject} is outside the {n_samples} samples of the recording.")
    folder = root / f"sub-{subject}"
    entities = f"sub-{subject}"
    if session is not None:
        folder, entities = folder / f"ses-{session}", f"{entities}_ses-{session}"
    folder /= "eeg"
    stem = f"{entities}_task-{task}" + (f"_run-{run}" if run is not None else "")
    kinds = list(ch_types) if ch_types is not None else ["eeg"] * len(ch_names)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with replace_atomically(folder / f"{stem}_eeg.eeg") as temporary, temporary.open("wb") as file:
        for block in blocks:
            array = check_block(block, (len(ch_names), None), what=f"the blocks of {stem}_eeg.eeg")
            # Multiplexed: all channels of a sample, then the next sample; float32 microvolt [2]_.
            file.write((array.T.astype(np.float64) * 1e6).astype("<f4").tobytes())
            count += array.shape[1]
        check_count(count, n_samples, what=f"{stem}_eeg.eeg", unit="samples")
    write_text(folder / f"{stem}_eeg.vmrk", _make_markers(f"{stem}_eeg.eeg", events))
    write_json_file(
        folder / f"{stem}_eeg.json",
        {
            "TaskName": task,
            "SamplingFrequency": sfreq,
            "PowerLineFrequency": line_freq,
            "EEGReference": reference,
            "SoftwareFilters": "n/a",
            "RecordingDuration": n_samples / sfreq,
            "RecordingType": "continuous",
            "EEGChannelCount": kinds.count("eeg"),
            "EOGChannelCount": kinds.count("eog"),
            "TriggerChannelCount": kinds.count("stim"),
        },
    )
    channels = pd.DataFrame({"name": ch_names, "type": [_TYPES[kind] for kind in kinds], "units": "µV"})
    # BIDS needs the columns even if they are empty.
    channels["low_cutoff"], channels["high_cutoff"] = "n/a", "n/a"
    channels["sampling_frequency"], channels["status"] = sfreq, "good"
    write_tsv(folder / f"{stem}_channels.tsv", channels)
    if table is None:
        _write_events(folder / f"{stem}_events", events, sfreq, stimulus_s)
    else:
        write_tsv(folder / f"{stem}_events.tsv", table)
    if ch_pos is not None:
        _write_electrodes(folder, entities, ch_names, ch_pos)
    # The header is written last: if it exists, the other files exist too.
    return write_text(folder / f"{stem}_eeg.vhdr", make_header(f"{stem}_eeg", ch_names, sfreq))


def make_header(stem: str, ch_names: Sequence[str], sfreq: float) -> str:
    """Return the header of a BrainVision recording of float32 microvolts, multiplexed.

    Parameters
    ----------
    stem
        Name of its three files, without their endings.
    ch_names
        Names of the channels.
    sfreq
        Sampling rate in Hz.
    """
    # A comma separates fields, so a comma in a name is written "\1".
    channels = [
        f"Ch{index}={name.replace(',', chr(92) + '1')},,1,µV" for index, name in enumerate(ch_names, start=1)
    ]
    lines = [
        "Brain Vision Data Exchange Header File Version 1.0",
        "",
        "[Common Infos]",
        "Codepage=UTF-8",
        f"DataFile={stem}.eeg",
        f"MarkerFile={stem}.vmrk",
        "DataFormat=BINARY",
        "DataOrientation=MULTIPLEXED",
        f"NumberOfChannels={len(ch_names)}",
        f"SamplingInterval={1e6 / sfreq:.10g}",
        "",
        "[Binary Infos]",
        "BinaryFormat=IEEE_FLOAT_32",
        "",
        "[Channel Infos]",
        *channels,
        "",
    ]
    return "\n".join(lines)


def _make_markers(data_file: str, events: pd.DataFrame) -> str:
    lines = [
        "Brain Vision Data Exchange Marker File, Version 1.0",
        "",
        "[Common Infos]",
        "Codepage=UTF-8",
        f"DataFile={data_file}",
        "",
        "[Marker Infos]",
        "Mk1=New Segment,,1,1,0,00000000000000000000",
    ]
    for number, (sample, value) in enumerate(zip(events["sample"], events["value"], strict=True), start=2):
        lines.append(f"Mk{number}=Stimulus,S{int(value):3d},{int(sample) + 1},1,0")  # positions count from 1
    return "\n".join([*lines, ""])


def _write_events(stem: Path, events: pd.DataFrame, sfreq: float, stimulus_s: float) -> None:
    table = pd.DataFrame(
        {
            "onset": events["sample"] / sfreq,
            "duration": stimulus_s,
            "sample": events["sample"],
            "value": events["value"],
            "trial_type": events.get("trial_type", pd.Series("stimulus", index=events.index)),
            "stimulus_id": events["stimulus_id"],
            "stim_file": events["stim_file"],
        }
    )
    rest = [column for column in events.columns if column not in table.columns]
    write_tsv(stem.with_suffix(".tsv"), pd.concat([table, events[rest]], axis=1))
    described = {
        "stimulus_id": {"Description": "identity of the picture"},
        "stim_file": {"Description": "file of the picture, relative to the folder stimuli"},
        "value": {"Description": "trigger code"},
    }
    write_json_file(stem.with_suffix(".json"), described)


def _write_electrodes(folder: Path, entities: str, ch_names: Sequence[str], ch_pos: np.ndarray) -> None:
    if np.shape(ch_pos) != (len(ch_names), 3):
        raise DataError(f"{len(ch_names)} channels need positions of shape ({len(ch_names)}, 3).")
    table = pd.DataFrame(np.asarray(ch_pos, dtype=float), columns=["x", "y", "z"])
    table.insert(0, "name", list(ch_names))
    write_tsv(folder / f"{entities}_space-CapTrak_electrodes.tsv", table)
    write_json_file(
        folder / f"{entities}_space-CapTrak_coordsystem.json",
        {
            "EEGCoordinateSystem": "CapTrak",
            "EEGCoordinateUnits": "m",
            "EEGCoordinateSystemDescription": "RAS, origin between the ears",
            "AnatomicalLandmarkCoordinates": {"NAS": [0, 0.1, 0], "LPA": [-0.08, 0, 0], "RPA": [0.08, 0, 0]},
            "AnatomicalLandmarkCoordinateSystem": "CapTrak",
            "AnatomicalLandmarkCoordinateUnits": "m",
        },
    )


def estimate_bytes(n_samples: int, n_channels: int) -> int:
    """Return the size of one recording: float32."""
    return 4 * n_channels * n_samples


EEG = Format(
    name="bids-eeg",
    description="Generic BIDS EEG: BrainVision, 64 channels, 512 Hz",
    modality="eeg",
    uses=("n_runs", "n_pairs"),
    duration_s=EEG_TIMING.stimulus,
    check=check_sessions,
    count=count_eeg,
    list_images=list_images,
    make_recorder=lambda size: make_sensor_system(EEG_SYSTEM),
    plan=plan_eeg,
)
