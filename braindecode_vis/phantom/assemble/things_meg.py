"""THINGS-MEG from images to raw runs and preprocessed epochs.

Owns which trials go into which file. Sessions with raw runs are cut into epochs from those very files, so that a loader
of the raw runs finds what the epochs hold; the others are recorded at the rate of the epochs. Epochs are low-passed at
40 Hz and z-scored by their baseline, as published; the 0.1 Hz high-pass is left out, since the z-score takes the
place of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_numbers, check_one_exemplar_a_session
from braindecode_vis.phantom.assemble.stimulus_files import match_concepts
from braindecode_vis.phantom.assemble.streams import cut_epochs, make_lowpass, make_machine_at
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.forward import make_machine
from braindecode_vis.phantom.recordings import simulate_continuous
from braindecode_vis.phantom.stimuli.concepts import make_concepts
from braindecode_vis.phantom.writers.things_meg import (
    DROPPED_SENSOR,
    EPOCH_N_TIMES,
    EPOCH_SFREQ,
    EPOCH_TMIN,
    LEAD_S,
    RAW_SFREQ,
    STIMULUS_S,
    TAIL_S,
    count_run_samples,
    estimate_epochs_bytes,
    estimate_raw_bytes,
    make_image_table,
    make_sample_attributes,
    make_things_meg_design,
    write_dataset,
    write_preprocessed,
    write_raw_run,
    write_sample_attributes,
)
from braindecode_vis.seeds import derive_seed

USES = ("n_runs", "n_catch", "n_raw_sessions")
CUTOFF_HZ = 40.0
MEAN_SOA_S = 1.5
MACHINE = "meg-ctf272"


def count_session_trials(size: PhantomSize) -> int:
    """Return the trials of one session, catch trials included."""
    return size.n_train_concepts + 2 * size.n_test_concepts + (size.n_catch or 0)


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-MEG cannot have this size."""
    check_numbers(size, "things-meg", USES)
    check_one_exemplar_a_session(size, "THINGS-MEG")
    assert size.n_runs is not None
    assert size.n_raw_sessions is not None
    if size.n_raw_sessions > size.n_sessions or size.n_runs > count_session_trials(size):
        raise ConfigError(
            f"n_raw_sessions ({size.n_raw_sessions}) cannot exceed n_sessions ({size.n_sessions}), nor n_runs "
            f"({size.n_runs}) the {count_session_trials(size)} trials of a session."
        )


def count(size: PhantomSize) -> Counts:
    """Return work and space of runs and epochs."""
    assert size.n_runs is not None
    assert size.n_raw_sessions is not None
    n_trials = count_session_trials(size)
    session_s = n_trials * MEAN_SOA_S + size.n_runs * (LEAD_S + TAIL_S - MEAN_SOA_S)
    raw_s = size.n_subjects * size.n_raw_sessions * session_s
    epochs_s = size.n_subjects * (size.n_sessions - size.n_raw_sessions) * session_s
    epochs = estimate_epochs_bytes(size.n_sessions * n_trials)
    n_bytes = raw_s * estimate_raw_bytes(1) * RAW_SFREQ + size.n_subjects * epochs
    scratch = 2 * epochs + estimate_raw_bytes(1) * RAW_SFREQ * session_s / size.n_runs
    seconds = 7 + raw_s / 25 + epochs_s / 120 + size.n_subjects * size.n_sessions * n_trials * 6e-3
    steps = size.n_subjects * (
        size.n_raw_sessions * size.n_runs * _count_run_steps(size) + size.n_sessions * n_trials
    )
    return Counts(n_bytes, scratch, raw_s + epochs_s, seconds, 1 + steps)


def _count_run_steps(size: PhantomSize) -> int:
    assert size.n_runs is not None
    return max(1, round(count_session_trials(size) / size.n_runs * MEAN_SOA_S))


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images in the order of their THINGS numbers."""
    n_concepts = size.n_train_concepts + size.n_test_concepts
    names = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    table = make_image_table(names, size.n_train_exemplars, size.n_test_concepts)
    table = match_concepts(table, n_concepts, seed)
    paths = "object_images/" + table["concept"] + "/" + table["stimulus_id"] + ".jpg"
    return table.assign(things_path=table["path"], path=paths, file_name=table["stimulus_id"] + ".jpg")


def count_images(size: PhantomSize) -> int:
    """Return the number of images."""
    return (size.n_train_concepts + size.n_test_concepts) * size.n_train_exemplars + size.n_test_concepts


def plan(job: Job) -> list[Unit]:
    """Return the tables, one unit per raw run, and the epochs of each person."""
    units = [Unit("the tables of the data set", 1, lambda progress: _write_tables(job))]
    assert job.size.n_raw_sessions is not None
    assert job.size.n_runs is not None
    for person in job.people:
        for session in range(1, job.size.n_sessions + 1):
            if session <= job.size.n_raw_sessions:
                units += [_plan_run(job, person, session, run) for run in range(1, job.size.n_runs + 1)]
        units.append(_plan_epochs(job, person))
    return units


@lru_cache(maxsize=4)
def _make_design(job: Job, subject: int) -> pd.DataFrame:
    assert job.size.n_runs is not None
    assert job.size.n_catch is not None
    seed = derive_seed(job.config.seed, "design", subject)
    return make_things_meg_design(
        job.table, job.size.n_sessions, job.size.n_runs, seed, n_catch=job.size.n_catch
    )


def _write_tables(job: Job) -> list[Path]:
    images = job.table.assign(path=job.table["things_path"])
    write_dataset(job.root, [person.index + 1 for person in job.people], images)
    tables = (job.root / "THINGS").rglob("*.csv")
    return [job.root / "dataset_description.json", job.root / "participants.tsv", *tables]


def _plan_run(job: Job, person: Person, session: int, run: int) -> Unit:
    def write(progress: Progress) -> list[Path]:
        design = _make_design(job, person.index)
        events = design[(design["session"] == session) & (design["run"] == run)]
        machine, info = job.eeg_or_meg, job.eeg_or_meg.make_info()
        samples = _simulate_run(job, person, machine.sfreq, session, run, events)
        path = write_raw_run(
            job.root,
            person.index + 1,
            session,
            run,
            progress.watch(samples, lambda block: block.shape[1] / machine.sfreq),
            events,
            ch_names=machine.ch_names,
            locs=np.array([channel["loc"] for channel in info["chs"]]),
            dev_head=info["dev_head_t"]["trans"],
        )
        stem = path.name.removesuffix("_meg.fif")
        return [p for p in path.parent.iterdir() if p.name.removeprefix("._").startswith(stem)]

    name = f"subject {person.name}, session {session:02d}, raw run {run:02d}"
    return Unit(name, _count_run_steps(job.size), write)


def _simulate_run(
    job: Job, person: Person, sfreq: float, session: int, run: int, events: pd.DataFrame
) -> Iterator[np.ndarray]:
    return simulate_continuous(
        person,
        make_machine_at(MACHINE, sfreq),
        events["onset"].to_numpy(),
        events["row"].to_numpy(),
        STIMULUS_S,
        round(count_run_samples(events) * sfreq / RAW_SFREQ),
        name=f"ses-{session:02d}_run-{run:02d}",
        block_s=2.0,
    )


def _plan_epochs(job: Job, person: Person) -> Unit:
    n_epochs = job.size.n_sessions * count_session_trials(job.size)

    def write(progress: Progress) -> list[Path]:
        design = _make_design(job, person.index)
        attributes = make_sample_attributes(person.index + 1, design, job.table, job.config.seed)
        info = job.eeg_or_meg.make_info()
        kept = [i for i, name in enumerate(job.eeg_or_meg.ch_names) if name != DROPPED_SENSOR]
        path = write_preprocessed(
            job.root,
            person.index + 1,
            progress.watch(_cut_sessions(job, person, design, kept), lambda epoch: 1),
            attributes,
            ch_names=[job.eeg_or_meg.ch_names[i] for i in kept],
            locs=np.array([info["chs"][i]["loc"] for i in kept]),
            dev_head=info["dev_head_t"]["trans"],
        )
        parts = path.parent.glob(f"{path.stem}*.fif")
        return [*parts, write_sample_attributes(job.root, person.index + 1, attributes)]

    return Unit(f"subject {person.name}, epochs", n_epochs, write)


def _cut_sessions(job: Job, person: Person, design: pd.DataFrame, kept: list[int]) -> Iterator[np.ndarray]:
    """Yield every epoch of a person, z-scored by its baseline."""
    n_baseline = round(-EPOCH_TMIN * EPOCH_SFREQ) + 1
    for (session, run), events in design.groupby(["session", "run"]):
        is_raw = session <= (job.size.n_raw_sessions or 0)
        sfreq = RAW_SFREQ if is_raw else EPOCH_SFREQ
        decim = round(sfreq / EPOCH_SFREQ)
        if is_raw:
            samples = _read_run(job, person, session, run)
        else:
            samples = _simulate_run(job, person, sfreq, session, run, events)
        starts = np.round((events["onset"].to_numpy() + EPOCH_TMIN) * sfreq).astype(int)
        epochs = cut_epochs(
            (block[kept] for block in samples),
            starts,
            EPOCH_N_TIMES,
            decim=decim,
            taps=make_lowpass(sfreq, CUTOFF_HZ, decim),
        )
        for epoch in epochs:
            baseline = epoch[:, :n_baseline]
            yield (epoch - baseline.mean(axis=1, keepdims=True)) / baseline.std(axis=1, keepdims=True)


def _read_run(job: Job, person: Person, session: int, run: int) -> Iterator[np.ndarray]:
    """Yield the samples of a finished raw run, 2 s at a time."""
    import mne

    entities = f"sub-BIGMEG{person.index + 1}_ses-{session:02d}"
    folder = job.root / f"sub-BIGMEG{person.index + 1}" / f"ses-{session:02d}" / "meg"
    raw = mne.io.read_raw_fif(folder / f"{entities}_task-main_run-{run:02d}_meg.fif", verbose="error")
    step = round(2 * RAW_SFREQ)
    for start in range(0, raw.n_times, step):
        stop = min(start + step, raw.n_times)
        yield raw.get_data(picks="mag", start=start, stop=stop).astype(np.float32)


FORMAT = Format(
    name="things-meg",
    description="THINGS-MEG: BIDS raw runs (FIF, 272 sensors, 1200 Hz) and preprocessed epochs",
    modality="meg",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_machine(MACHINE),
    plan=plan,
)
