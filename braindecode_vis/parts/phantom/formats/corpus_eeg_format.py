"""EEG without labels of many people at several sites, in BIDS: the sources of a corpus of EEG for pretraining.

The subjects are those of `corpus_format`. They rest or watch a film of training pictures, one after the other: the same
pictures as in a phantom of ``bids-eeg`` of the same size and seed, which has other subjects. Sites differ in cap, rate
and format: BioSemi (64 electrodes, BrainVision), a dry headset (32, EDF with channel names as in hospitals), Neuroscan
(62, BrainVision, noisier, with a dead electrode that is not marked). Some electrodes are marked as bad, more than half
of those of one person. The ground truth is that of `corpus_format`, with electrodes instead of parcels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import TRUTH, Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats import bids_eeg
from braindecode_vis.parts.phantom.formats.alljoined_format import make_edf
from braindecode_vis.parts.phantom.formats.corpus_format import (
    FIRST_PERSON,
    LIMITS,
    TASKS,
    check_sites,
    find_restless,
    get_run_s,
    list_visits,
    name_site,
    name_source,
)
from braindecode_vis.parts.phantom.formats.file_writers import write_json_file, write_tsv
from braindecode_vis.parts.phantom.forward import SensorSystem, make_sensor_system
from braindecode_vis.parts.phantom.meeg_signal import simulate_continuous
from braindecode_vis.parts.phantom.noise import compute_noise_power
from braindecode_vis.parts.phantom.sizes import PhantomSize

_OLD_NAMES = {"T7": "T3", "T8": "T4", "P7": "T5", "P8": "T6"}
_BAD_SHARE = 0.04  # of the electrodes of a usual recording
_RESTLESS_SHARE = 0.6


@dataclass(frozen=True)
class EegSite:
    """One cap and the format of its files; rates are lowered online.

    Parameters
    ----------
    layout
        ``biosemi``, ``headset`` or ``neuroscan``.
    system
        As in `make_sensor_system`.
    sfreq
        Sampling rate of the files (Hz).
    noise
        Factor of the white noise of sensors.
    """

    layout: str
    system: str
    sfreq: float
    noise: float

    @property
    def n_channels(self) -> int:
        """Electrodes."""
        return int(self.system[3:5])


SITES = (
    EegSite("biosemi", "eeg64-biosemi", 256.0, 1.0),
    EegSite("headset", "eeg32-emotiv", 256.0, 1.5),
    EegSite("neuroscan", "eeg62-neuroscan", 250.0, 2.0),
)
"""Further sites of a corpus repeat these."""


@lru_cache(maxsize=len(SITES))
def make_site_system(site: EegSite) -> SensorSystem:
    """Return the recording system of a site."""
    system = make_sensor_system(site.system)
    return replace(system, sfreq=site.sfreq, sensor_rms=site.noise * system.sensor_rms)


def find_site(index: int) -> EegSite:
    """Return the site of a number from 0."""
    return SITES[index % len(SITES)]


def label_subject(person: Person, index: int) -> str:
    """Return the label of a subject at a site, ``A001``."""
    return f"{name_site(index)[-1]}{person.index - FIRST_PERSON + 1:03d}"


def count_corpus(size: PhantomSize) -> Counts:
    """Return work and space of all recordings."""
    n_runs, run_s, visits = size.n_sessions * (size.n_runs or 1), int(get_run_s(size)), list_visits(size)
    n_bytes = seconds = 0.0
    for _, index in visits:
        site = find_site(index)
        width = 2 if site.layout == "headset" else 4
        n_bytes += n_runs * (
            width * site.n_channels * site.sfreq * run_s + 240 * (site.layout == "headset") * run_s
        )
        n_bytes += n_runs * (70 * site.n_channels + 800) + n_runs / 2 * 40 * run_s / bids_eeg.EEG_TIMING.mean
        seconds += n_runs * run_s * site.n_channels * site.sfreq / 5e6
    n_bytes += 2500 * (size.n_sites or 1)
    n_steps = (size.n_sites or 1) + 1 + len(visits) * n_runs
    return Counts(n_bytes, 0, len(visits) * n_runs * run_s, 1 + seconds, n_steps, n_trials=0)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the pictures of the phantom of ``bids-eeg`` of the same size and seed, kept with the ground truth."""
    table = bids_eeg.list_images(size, seed)
    return table.assign(path=[f"{TRUTH}/{path}" for path in table["path"]])


def plan_corpus(job: PhantomJob) -> list[Unit]:
    """Return the files of each site, one unit per recording, and the tables of the ground truth."""
    sites = range(job.size.n_sites or 1)
    units = [Unit(f"the files of {name_site(i)}", 1, partial(_write_site, job, i)) for i in sites]
    for place, index in list_visits(job.size):
        for number in range(job.size.n_sessions * (job.size.n_runs or 1)):
            name = f"{name_site(index)}, person {job.subjects[place].name}, run {number + 1}"
            units.append(Unit(name, 1, partial(_write_run, job, place, index, number)))
    return [*units, Unit("who is who", 1, partial(_write_people, job))]


def draw_film(job: PhantomJob, person: Person, run_s: float, name: str) -> pd.DataFrame:
    """Return the pictures of a film in the order of the labelled phantom: `onset`, `duration`, `row`, `stimulus_id`."""
    timing = bids_eeg.EEG_TIMING
    generator = make_generator(job.config.seed, "film", person.index, name)
    n = int((run_s - timing.first - timing.tail) / timing.mean)
    steps = timing.mean + timing.jitter * generator.uniform(-1, 1, n)
    onsets = timing.first + np.cumsum(steps) - steps[0]
    train = np.flatnonzero(job.table["split"] == "train")
    rows = np.concatenate([generator.permutation(train) for _ in range(-(-n // len(train)))])[:n]
    table = pd.DataFrame({"onset": onsets, "duration": timing.stimulus, "row": rows})
    table = table[table["onset"] < run_s - timing.tail]
    return table.assign(stimulus_id=job.table["stimulus_id"].to_numpy()[table["row"]])


def _name_run(job: PhantomJob, index: int, person: Person, number: int) -> tuple[str, str | None, str]:
    """Return task, session and run."""
    n_runs = job.size.n_runs or 1
    session = f"{number // n_runs + 1:02d}" if job.size.n_sessions > 1 else None
    return TASKS[number % n_runs % 2], session, f"{number % n_runs // 2 + 1:02d}"


def draw_bads(job: PhantomJob, place: int, index: int) -> tuple[str, ...]:
    """Return the electrodes that are marked as bad in all recordings of a person at a site."""
    names = make_site_system(find_site(index)).ch_names
    generator = make_generator(job.config.seed, "bads", job.subjects[place].index, index)
    share = _RESTLESS_SHARE if place == find_restless(job.size) else _BAD_SHARE
    return tuple(name for name, draw in zip(names, generator.random(len(names)), strict=True) if draw < share)


def _write_site(job: PhantomJob, index: int, progress: Progress) -> list[Path]:
    root = job.root / name_site(index)
    people = [job.subjects[place] for place, where in list_visits(job.size) if where == index]
    labels = [f"sub-{label_subject(person, index)}" for person in people]
    table = pd.DataFrame({"participant_id": labels, "site": name_site(index)})
    bids_eeg.write_dataset(root, table, name=name_source(job, index))
    names = ("dataset_description.json", "participants.tsv", "participants.json", "README")
    return [root / name for name in names]


def _write_run(job: PhantomJob, place: int, index: int, number: int, progress: Progress) -> list[Path]:
    site, person = find_site(index), job.subjects[place]
    system, run_s = make_site_system(site), int(get_run_s(job.size))
    task, session, run = _name_run(job, index, person, number)
    name = f"{name_site(index)} {number}"
    film = draw_film(job, person, run_s, name) if task == "movie" else None
    samples = (
        np.zeros(0, int) if film is None else np.round(film["onset"].to_numpy() * site.sfreq).astype(int)
    )
    rows = np.zeros(0, int) if film is None else film["row"].to_numpy()
    n_samples = round(run_s * site.sfreq)
    blocks = simulate_continuous(
        person, system, samples / site.sfreq, rows, bids_eeg.EEG_TIMING.stimulus, n_samples, name=name
    )
    data = np.concatenate(list(blocks), axis=1)
    bads = draw_bads(job, place, index)
    generator = make_generator(job.config.seed, "bad samples", person.index, name)
    for bad in bads:
        row = system.ch_names.index(bad)
        # An electrode without contact: it records only noise.
        data[row] = 1e-4 * generator.standard_normal(n_samples)
    if site.layout == "neuroscan":
        data[make_generator(job.config.seed, "dead", index).integers(len(data))] = 0
    paths = []
    if film is not None:
        shown = film.drop(columns="row").round({"onset": 4})
        paths.append(
            write_tsv(job.root / TRUTH / "films" / f"{name_site(index)}_{person.name}_{number}.tsv", shown)
        )
    label, root = label_subject(person, index), job.root / name_site(index)
    if site.layout == "headset":
        return [*paths, *_write_edf(root, label, session, task, run, data, system, bads)]
    events = pd.DataFrame({column: [] for column in bids_eeg.EVENT_COLUMNS})
    header = bids_eeg.write_recording(
        root, label, [data], events, n_samples=n_samples, ch_names=system.ch_names, sfreq=site.sfreq,
        ch_pos=system.ch_pos, session=session, task=task, run=run, line_freq=system.line_freq,
        reference=system.reference,
    )  # fmt: skip
    stem = header.name.removesuffix("_eeg.vhdr")
    for path in header.parent.glob(f"{stem}_events.*"):
        path.unlink()
    _mark_bads(header.with_name(f"{stem}_channels.tsv"), bads)
    return [*paths, *sorted(header.parent.glob(f"{stem}_*"))]


def _mark_bads(path: Path, bads: tuple[str, ...]) -> None:
    table = pd.read_csv(path, sep="\t", keep_default_na=False)
    write_tsv(path, table.assign(status=np.where(table["name"].isin(bads), "bad", "good")))


def _write_edf(
    root: Path,
    label: str,
    session: str | None,
    task: str,
    run: str,
    data: np.ndarray,
    system: SensorSystem,
    bads: tuple[str, ...],
) -> list[Path]:
    """Write an EDF file with names such as ``EEG T3-REF``, its channels and its sidecar."""
    spelled = {name: f"EEG {_OLD_NAMES.get(name, name)}-REF" for name in system.ch_names}
    parts = [f"sub-{label}", *([f"ses-{session}"] if session else [])]
    folder, stem = root.joinpath(*parts, "eeg"), "_".join([*parts, f"task-{task}", f"run-{run}"])
    table = pd.DataFrame({"name": list(spelled.values()), "type": "EEG", "units": "µV"})
    table["status"] = np.where([name in bads for name in system.ch_names], "bad", "good")
    sidecar = {
        "TaskName": task, "SamplingFrequency": system.sfreq, "PowerLineFrequency": system.line_freq,
        "EEGReference": system.reference, "SoftwareFilters": "n/a", "RecordingType": "continuous",
    }  # fmt: skip
    paths = [
        write_tsv(folder / f"{stem}_channels.tsv", table),
        write_json_file(folder / f"{stem}_eeg.json", sidecar),
        folder / f"{stem}_eeg.edf",
    ]
    rows = {spelled[name]: 1e6 * values for name, values in zip(system.ch_names, data, strict=True)}
    with replace_atomically(paths[-1]) as temporary:
        temporary.write_bytes(make_edf(rows, []))
    return paths


def _write_people(job: PhantomJob, progress: Progress) -> list[Path]:
    people, runs = [], []
    for place, index in list_visits(job.size):
        person, site = job.subjects[place], find_site(index)
        own = {"person": person.name, "site": name_site(index), "subject": label_subject(person, index)}
        people.append(
            {
                **own, "source": name_source(job, index),
                "layout": site.layout, "sfreq": site.sfreq, "restless": place == find_restless(job.size),
                "bads": ",".join(draw_bads(job, place, index)),
            }
        )  # fmt: skip
        for number in range(job.size.n_sessions * (job.size.n_runs or 1)):
            task, session, run = _name_run(job, index, person, number)
            film = f"films/{name_site(index)}_{person.name}_{number}.tsv" if task == "movie" else None
            runs.append({**own, "session": session, "task": task, "run": run, "film": film})
    return [
        write_tsv(job.root / TRUTH / "people.tsv", pd.DataFrame(people)),
        write_tsv(job.root / TRUTH / "runs.tsv", pd.DataFrame(runs)),
    ]


def plan_truth(job: PhantomJob) -> list[Unit]:
    """Return one unit per person."""
    return [
        Unit(f"subject {person.name}, ground truth", 1, partial(_write_person, job, person))
        for person in job.subjects
    ]


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write the strength of a subject's ongoing activity at each electrode of the first site, in volt."""
    rms = np.sqrt(compute_noise_power(person, job.sensors))
    table = pd.DataFrame({"channel": job.sensors.ch_names, "ongoing_v": [f"{value:.5g}" for value in rms]})
    return [write_tsv(job.root / TRUTH / f"sub-{person.name}_ongoing.tsv", table)]


CORPUS_EEG = Format(
    name="corpus-eeg",
    description="EEG without labels of many people at several sites: films and rest from three caps, in BIDS",
    modality="eeg",
    uses=("n_runs", "n_sites", "minutes"),
    duration_s=bids_eeg.EEG_TIMING.stimulus,
    limits=LIMITS,
    check=check_sites,
    count=count_corpus,
    list_images=list_images,
    make_recorder=lambda size: make_site_system(SITES[0]),
    plan=plan_corpus,
    plan_truth=plan_truth,
    first_person=FIRST_PERSON,
)
