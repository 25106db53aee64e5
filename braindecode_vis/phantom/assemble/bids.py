"""Generic BIDS data sets from images to files: EEG in BrainVision, and fMRI in the layout of fMRIPrep.

Owns their experimental design: every session shows all images, in an order of its own, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_numbers, divide
from braindecode_vis.phantom.assemble.stimulus_files import list_split
from braindecode_vis.phantom.assemble.volume_files import GRIDS, count_voxels, estimate_volume_bytes
from braindecode_vis.phantom.bold_signal import simulate_bold, simulate_motion
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.forward import make_machine
from braindecode_vis.phantom.recordings import simulate_continuous
from braindecode_vis.phantom.scanner import make_fmri_machine
from braindecode_vis.phantom.writers import bids_eeg, bids_fmri
from braindecode_vis.seeds import make_generator

EEG_MACHINE, EEG_SFREQ, EEG_CHANNELS = "eeg64-biosemi", 512.0, 64
T_R = 2.0
# Mean time between onsets, its jitter, presentation, first onset and tail; all in s.
EEG_TIMING = (0.8, 0.1, 0.3, 2.0, 2.0)
FMRI_TIMING = (4.0, 1.0, 1.0, 6.0, 14.0)


def check(size: PhantomSize, name: str, uses: tuple[str, ...]) -> None:
    """Raise `ConfigError` if the data set cannot have this size."""
    check_numbers(size, name, uses)
    divide(size.train_repetitions, size.n_sessions, what="train_repetitions over n_sessions") if (
        size.train_repetitions > 1
    ) else divide(size.n_train_images, size.n_sessions, what="training images over n_sessions")
    divide(size.test_repetitions, size.n_sessions, what="test_repetitions over n_sessions")
    per_session = size.n_trials // size.n_sessions
    if per_session < (size.n_runs or 1) or ("voxel_mm" in uses and size.voxel_mm not in GRIDS):
        raise ConfigError(
            f"n_runs ({size.n_runs}) cannot exceed the {per_session} trials of a session, and voxel_mm "
            f"({size.voxel_mm}) must be from {min(GRIDS)} to {max(GRIDS)}."
        )


def count_images(size: PhantomSize) -> int:
    """Return the number of images."""
    return size.n_train_images + size.n_test_concepts


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``stimuli``."""
    return list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed, "stimuli")


def _expect_run_s(size: PhantomSize, timing: tuple[float, ...]) -> float:
    return size.n_trials / size.n_sessions / (size.n_runs or 1) * timing[0] + timing[3] + timing[4]


def count_eeg(size: PhantomSize) -> Counts:
    """Return work and space of the recordings."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    run_s = _expect_run_s(size, EEG_TIMING)
    n_bytes = (
        n_runs * (bids_eeg.estimate_bytes(round(run_s * EEG_SFREQ), EEG_CHANNELS) + 10_000)
        + 250 * size.n_trials * size.n_subjects
    )
    return Counts(n_bytes, 0, n_runs * run_s, 2 + n_runs * run_s / 150, 1 + n_runs * max(1, round(run_s)))


def count_fmri(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    run_s = _expect_run_s(size, FMRI_TIMING)
    n_volumes = run_s / T_R
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    n_bytes = n_runs * (n_volumes * (volume + 700) + 20_000)
    seconds = n_runs * n_volumes * (6e-4 + 1.5e-7 * count_voxels(size.voxel_mm) + volume * 2.5e-8)
    return Counts(n_bytes, 0, n_runs * run_s, 1 + seconds, 1 + n_runs * max(1, round(n_volumes)))


@lru_cache(maxsize=4)
def make_design(job: Job, subject: int, timing: tuple[float, ...]) -> pd.DataFrame:
    """Return every trial of a person.

    Returns
    -------
    DataFrame
        `session`, `run` (from 1), `row` of the image, `onset` in s from the start of the run, and `repetition` of the
        image over all sessions.
    """
    size = job.size
    mean, jitter, _, first, _ = timing
    train, test = np.flatnonzero(job.table["split"] == "train"), job.test_rows
    order = make_generator(job.config.seed, "bids", subject).permutation(train)
    sessions = []
    for session in range(1, size.n_sessions + 1):
        generator = make_generator(job.config.seed, "bids", subject, session)
        # Images that are shown once are dealt out to the sessions; others are shown in each of them.
        once = size.train_repetitions == 1
        shown = np.array_split(order, size.n_sessions)[session - 1] if once else train
        times = 1 if once else size.train_repetitions // size.n_sessions
        rows = np.concatenate(
            [np.repeat(shown, times), np.repeat(test, size.test_repetitions // size.n_sessions)]
        )
        table = pd.DataFrame({"session": session, "row": generator.permutation(rows)})
        table.insert(1, "run", np.arange(len(rows)) * (size.n_runs or 1) // len(rows) + 1)
        gaps = generator.uniform(mean - jitter, mean + jitter, len(rows))
        gaps[~table["run"].duplicated()] = first
        table["onset"] = pd.Series(gaps).groupby(table["run"]).cumsum().round(3)
        sessions.append(table)
    design = pd.concat(sessions, ignore_index=True)
    return design.assign(repetition=design.groupby("row").cumcount())


def _describe_events(job: Job, trials: pd.DataFrame) -> pd.DataFrame:
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


def plan_eeg(job: Job) -> list[Unit]:
    """Return the root files and one unit per recording."""
    return _plan(job, EEG_TIMING, bids_eeg.write_dataset, _write_recording, lambda seconds: seconds)


def plan_fmri(job: Job) -> list[Unit]:
    """Return the root files and one unit per run."""
    return _plan(job, FMRI_TIMING, bids_fmri.write_dataset, _write_run, lambda seconds: seconds / T_R)


def _plan(job: Job, timing: tuple[float, ...], write_dataset, write_one, steps) -> list[Unit]:  # type: ignore[no-untyped-def]
    def write_root(progress: Progress) -> list[Path]:
        people = pd.DataFrame({"participant_id": [f"sub-{person.name}" for person in job.people]})
        write_dataset(job.root, people.assign(species="phantom"))
        return [job.root / "dataset_description.json", job.root / "participants.tsv", job.root / "README"]

    units = [Unit("the files of the data set", 1, write_root)]
    n_steps = max(1, round(steps(_expect_run_s(job.size, timing))))
    for person in job.people:
        for session in range(1, job.size.n_sessions + 1):
            for run in range(1, (job.size.n_runs or 1) + 1):
                name = f"subject {person.name}, session {session:02d}, run {run:02d}"
                units.append(Unit(name, n_steps, partial(write_one, job, person, session, run)))
    return units


def _write_recording(job: Job, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    machine = job.eeg_or_meg
    design = make_design(job, person.index, EEG_TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    _, _, duration_s, _, tail_s = EEG_TIMING
    samples = np.round(trials["onset"].to_numpy() * machine.sfreq).astype(int)
    n_samples = int(samples[-1]) + round(tail_s * machine.sfreq)
    blocks = simulate_continuous(
        person,
        machine,
        samples / machine.sfreq,
        trials["row"].to_numpy(),
        duration_s,
        n_samples,
        name=f"ses-{session:02d}_run-{run:02d}",
    )
    events = _describe_events(job, trials)
    events.insert(0, "value", trials["row"].to_numpy() % 65535 + 1)
    events.insert(0, "sample", samples)
    path = bids_eeg.write_recording(
        job.root,
        person.name,
        progress.watch(blocks, lambda block: block.shape[1] / machine.sfreq),
        events,
        n_samples=n_samples,
        ch_names=machine.ch_names,
        sfreq=machine.sfreq,
        ch_pos=machine.ch_pos,
        session=f"{session:02d}",
        run=f"{run:02d}",
        stimulus_s=duration_s,
        line_freq=machine.line_freq,
        reference=machine.reference,
    )
    return sorted(path.parent.glob(f"{path.name.removesuffix('_eeg.vhdr')}_*"))


def _write_run(job: Job, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    machine = job.scanner
    design = make_design(job, person.index, FMRI_TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    _, _, duration_s, _, tail_s = FMRI_TIMING
    n_volumes = int(np.ceil((trials["onset"].max() + tail_s) / machine.t_r))
    name = f"ses-{session:02d}_run-{run:02d}"

    def simulate() -> Iterator[np.ndarray]:
        onsets, rows = trials["onset"].to_numpy(), trials["row"].to_numpy()
        return simulate_bold(person, machine, onsets, rows, duration_s, n_volumes, name=name)

    events = _describe_events(job, trials)
    events.insert(0, "trial_type", "stimulus")
    events.insert(0, "duration", duration_s)
    events.insert(0, "onset", trials["onset"].to_numpy())
    path = bids_fmri.write_run(
        job.root,
        person.name,
        (
            machine.fill_volume(machine.baseline * (1 + row / 100))
            for block in progress.watch(simulate(), len)
            for row in block
        ),
        events,
        _make_confounds(job, person, simulate(), n_volumes, name),
        machine.mask,
        n_volumes=n_volumes,
        affine=machine.affine,
        t_r=machine.t_r,
        session=f"{session:02d}",
        run=f"{run:02d}",
    )
    stem = path.name.split("_space-")[0]
    folder = job.root / f"sub-{person.name}" / f"ses-{session:02d}" / "func"
    return [*sorted(path.parent.glob(f"{stem}_*")), *sorted(folder.glob(f"{stem}_*"))]


def _make_confounds(
    job: Job, person: Person, blocks: Iterator[np.ndarray], n_volumes: int, name: str
) -> pd.DataFrame:
    """Return the confounds of a run from a first pass over its volumes.

    The phantom has no ventricles and no white matter; their signals follow the global one, with noise of their own.
    """
    machine = job.scanner
    means: list[float] = []
    changes: list[float] = []
    last: np.ndarray | None = None
    for block in blocks:
        for row in block:
            means.append(float((machine.baseline * (1 + row / 100)).mean()))
            changes.append(0.0 if last is None else float(np.sqrt(((row - last) ** 2).mean())))
            last = row
    signal = np.array(means)
    generator = make_generator(job.config.seed, "tissue", person.index, name)
    tissue = signal + 0.5 * signal.std() * generator.standard_normal((2, n_volumes))
    return bids_fmri.make_confounds(
        simulate_motion(person, n_volumes, name),
        global_signal=signal,
        csf=tissue[0],
        white_matter=tissue[1],
        dvars=np.array(changes),
        t_r=machine.t_r,
    )


EEG = Format(
    name="bids-eeg",
    description="Generic BIDS EEG: BrainVision, 64 channels, 512 Hz",
    modality="eeg",
    uses=("n_runs",),
    duration_s=EEG_TIMING[2],
    check=lambda size: check(size, "bids-eeg", ("n_runs",)),
    count=count_eeg,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_machine(EEG_MACHINE),
    plan=plan_eeg,
)
FMRI = Format(
    name="bids-fmri",
    description="Generic BIDS fMRI with derivatives as fMRIPrep writes them",
    modality="fmri",
    uses=("n_runs", "voxel_mm"),
    duration_s=FMRI_TIMING[2],
    check=lambda size: check(size, "bids-fmri", ("n_runs", "voxel_mm")),
    count=count_fmri,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_fmri_machine(size.voxel_mm or 0, T_R),
    plan=plan_fmri,
)
