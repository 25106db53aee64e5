"""Recordings without labels of many people at several sites: the sources of a corpus for pretraining.

Subjects rest, or watch a film of training pictures. These are the pictures of a phantom of BOLD5000 of the same size
and seed, which has other subjects, so brains, parcels and drive are those of the labelled data set. Sites differ
in layout, repetition time and noise: fMRIPrep's derivatives, the Human Connectome Project's parcellated CIFTI files
[1]_, and tables of parcels [2]_, some of which the site did not cover. One subject was scanned at two sites, another
one moves too much. Only the ground truth lists the shown pictures: ``people.tsv`` (the subject behind each label),
``runs.tsv``, the pictures of each film, and for each subject the patterns of ongoing activity and the strength with
which pictures drive each parcel.

References
----------
.. [1] Glasser, M. F. et al. (2013). The minimal preprocessing pipelines for the Human Connectome Project. NeuroImage
   80, 105-124. https://doi.org/10.1016/j.neuroimage.2013.04.127
.. [2] Mehta, K. et al. (2024). XCP-D: a robust pipeline for the post-processing of fMRI data. Imaging Neuroscience 2,
   1-26. https://doi.org/10.1162/imag_a_00257
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.parts.phantom.bold_signal import (
    compute_betas,
    get_response,
    make_noise_modes,
    make_ongoing_modes,
    simulate_motion,
    simulate_ongoing,
)
from braindecode_vis.parts.phantom.brain import Person, draw_fields
from braindecode_vis.parts.phantom.format_plan import TRUTH, Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats import bids_fmri
from braindecode_vis.parts.phantom.formats.bold5000_nod_format import list_bold5000_images
from braindecode_vis.parts.phantom.formats.file_writers import write_json_file, write_text, write_tsv
from braindecode_vis.parts.phantom.scanner import (
    count_voxels,
    estimate_volume_bytes,
    make_parcels,
    make_scanner,
)
from braindecode_vis.parts.phantom.sizes import PhantomSize

FIRST_PERSON = 100
"""No subject of a corpus is a subject of a labelled phantom, where numbers start at 0."""
TASKS = ("movie", "rest")  # runs take turns
SHOT_S = 4.0  # how long a picture of a film stays: two volumes of the slowest scanners
LAYOUTS = ("fmriprep", "hcp", "tables")
# Values of each further site of a layout; noise is a factor of everything except brain activity.
_T_R = {"fmriprep": (2.0, 1.0), "hcp": (0.72, 0.8), "tables": (1.5, 3.0)}
_NOISE = {"fmriprep": 1.0, "hcp": 1.2, "tables": 1.8}
_ONGOING_PERCENT = 0.7
_RESTLESS = 8.0  # times the motion of others: beyond any threshold for runs
_SPIKE_MM = 0.5


@dataclass(frozen=True)
class Site:
    """One scanner and the layout of its files.

    Parameters
    ----------
    index
        Number from 0, which gives the name.
    layout
        One of `LAYOUTS`.
    t_r
        Repetition time (s).
    noise
        Factor of noise, drift and motion artefacts.
    """

    index: int
    layout: str
    t_r: float
    noise: float

    @property
    def name(self) -> str:
        """Folder of the site, ``siteA``."""
        return name_site(self.index)


def name_site(index: int) -> str:
    """Return the folder of a site, ``siteA`` of number 0."""
    return f"site{chr(ord('A') + index)}"


def name_source(job: PhantomJob, index: int) -> str:
    """Return the name of the data set of a site: another seed makes other subjects, so their names must differ."""
    return f"phantom {name_site(index)} of seed {job.config.seed}"


def list_sites(size: PhantomSize) -> list[Site]:
    """Return the sites; layouts alternate."""
    sites = []
    for index in range(size.n_sites or 1):
        layout = LAYOUTS[index % len(LAYOUTS)]
        t_r = _T_R[layout][index // len(LAYOUTS) % 2]
        sites.append(Site(index, layout, t_r, _NOISE[layout]))
    return sites


def list_visits(size: PhantomSize) -> list[tuple[int, int]]:
    """Return pairs of subject and site (their indices in the job); the first subject was at two sites."""
    n_sites = size.n_sites or 1
    visits = [(person, person % n_sites) for person in range(size.n_subjects)]
    return [*visits, (0, 1)] if n_sites > 1 else visits


def _list_scans(size: PhantomSize) -> list[tuple[int, Site]]:
    sites = list_sites(size)
    return [(person, sites[index]) for person, index in list_visits(size)]


def find_restless(size: PhantomSize) -> int | None:
    """Return the index of the subject who moves too much: the second one at the first site, if it exists."""
    place = size.n_sites or 1
    return place if place < size.n_subjects else None


def label_subject(person: Person, site: Site) -> str:
    """Return the label of a subject at a site."""
    if site.layout == "hcp":
        return f"{100_000 + 13 * person.index + site.index}"
    return (
        person.name if site.layout == "fmriprep" else f"{site.name[-1]}{person.index - FIRST_PERSON + 1:03d}"
    )


def get_run_s(size: PhantomSize) -> float:
    """Return the length of a run (s)."""
    return 60.0 * (size.minutes or 0) / (size.n_sessions * (size.n_runs or 1))


LIMITS = {"train_repetitions": (1, 1), "test_repetitions": (1, 1)}
"""A corpus has no fixed number of trials: pictures are shown for the given minutes."""


def check_sites(size: PhantomSize) -> None:
    """Raise `ConfigError` if a corpus cannot have this size."""
    if (size.n_sites or 1) > min(26, size.n_subjects):
        raise ConfigError(
            f"n_sites ({size.n_sites}) must be at most 26 and at most the number of subjects ({size.n_subjects})."
        )
    if get_run_s(size) < 30:
        raise ConfigError(
            f"{size.minutes} minutes per subject in {size.n_sessions} x {size.n_runs} runs are "
            f"{get_run_s(size):.0f} s per run; a run needs at least 30 s."
        )


def count_corpus(size: PhantomSize) -> Counts:
    """Return work and space of all runs."""
    n_runs = size.n_sessions * (size.n_runs or 1)
    n_parcels, n_voxels = size.n_parcels or 28, count_voxels(size.voxel_mm)
    n_bytes = seconds = recording_s = 0.0
    visits = _list_scans(size)
    for _, site in visits:
        n_volumes = get_run_s(size) / site.t_r
        if site.layout == "fmriprep":
            each = estimate_volume_bytes(size.voxel_mm, "float32") + 720
            seconds += n_runs * (0.05 + n_volumes * (6e-4 + 3e-7 * n_voxels + each * 2.5e-8))
        else:
            each = (4 if site.layout == "hcp" else 8.5) * n_parcels + 80
            seconds += n_runs * (0.03 + n_volumes * n_parcels * 1e-6)
        n_bytes += n_runs * (n_volumes * each + 4000 + 16 * n_voxels * (site.layout == "hcp"))
        n_bytes += n_runs / 2 * (45 * get_run_s(size) / SHOT_S + 300)  # the pictures of films
        recording_s += n_runs * n_volumes * site.t_r
    seconds += 0.3 * size.n_subjects
    return Counts(
        n_bytes, 0, recording_s, seconds, len(list_sites(size)) + 1 + len(visits) * n_runs, n_trials=0
    )


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the pictures of the phantom of BOLD5000 of the same size and seed, kept with the ground truth."""
    table = list_bold5000_images(size, seed)
    return table.assign(path=[f"{TRUTH}/{path}" for path in table["path"]])


def plan_corpus(job: PhantomJob) -> list[Unit]:
    """Return the files of each site, one unit per run, and the tables of the ground truth."""
    units = [
        Unit(f"the files of {site.name}", 1, partial(_write_site, job, site)) for site in list_sites(job.size)
    ]
    for place, site in _list_scans(job.size):
        for number in range(job.size.n_sessions * (job.size.n_runs or 1)):
            write = partial(_write_run, job, place, site, number)
            units.append(Unit(f"{site.name}, person {job.subjects[place].name}, run {number + 1}", 1, write))
    return [*units, Unit("who is who", 1, partial(_write_people, job))]


def plan_truth(job: PhantomJob) -> list[Unit]:
    """Return one unit per person."""
    return [
        Unit(f"subject {person.name}, ground truth", 1, partial(_write_person, job, person))
        for person in job.subjects
    ]


# --- the signal ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _make_average(job: PhantomJob) -> tuple[np.ndarray, dict[int, str]]:
    """Return the matrix that averages voxels over parcels, float32 (n_voxels, n_parcels), and the names."""
    labels, names = make_parcels(job.scanner, job.size.n_parcels)
    matrix = np.zeros((job.scanner.n_voxels, len(names)), np.float32)
    inside = labels > 0
    matrix[inside, labels[inside] - 1] = 1
    return matrix / matrix.sum(axis=0), names


def get_mobility(job: PhantomJob, place: int) -> float:
    """Return the motion of a subject, as a factor."""
    generator = make_generator(job.config.seed, "mobility", job.subjects[place].index)
    usual = float(np.exp(0.3 * generator.standard_normal()))
    return _RESTLESS if place == find_restless(job.size) else usual


def draw_film(job: PhantomJob, person: Person, run_s: float, name: str) -> pd.DataFrame:
    """Return the pictures of one film: `onset`, `duration` (s), `row` in the drive and `stimulus_id`."""
    train = np.flatnonzero(job.table["split"] == "train")
    generator = make_generator(job.config.seed, "film", person.index, name)
    n_shots = int(run_s // SHOT_S)
    # All pictures are shown before any is repeated.
    rounds = [generator.permutation(train) for _ in range(-(-n_shots // len(train)))]
    rows = np.concatenate(rounds)[:n_shots]
    table = pd.DataFrame({"onset": SHOT_S * np.arange(n_shots), "duration": SHOT_S, "row": rows})
    return table.assign(stimulus_id=job.table["stimulus_id"].to_numpy()[rows])


def simulate_run(
    job: PhantomJob,
    person: Person,
    site: Site,
    n_volumes: int,
    name: str,
    *,
    film: pd.DataFrame | None,
    motion: np.ndarray,
    average: np.ndarray | None,
) -> np.ndarray:
    """Return one run, float32 (n_volumes, n_voxels), or (n_volumes, n_parcels) with `average`, percent signal change.

    The parts are linear in the voxels, so averages of patterns are equal to averages of voxels.

    Parameters
    ----------
    film
        From `draw_film`; None at rest.
    motion
        From `simulate_motion`.
    average
        From voxels to parcels, (n_voxels, n_parcels).
    """
    from scipy import signal

    numbers, scanner = person.config.fmri, job.scanner
    generator = make_generator(job.config.seed, "corpus run", person.index, site.index, name)

    def place(patterns: np.ndarray) -> np.ndarray:
        return patterns if average is None else patterns @ average

    times = np.arange(n_volumes) * site.t_r
    ongoing = simulate_ongoing(person, n_volumes, site.t_r, f"{site.index} {name}")
    total = (numbers.ongoing_percent or 0) * ongoing @ place(make_ongoing_modes(person, scanner))
    if film is not None:
        total += _respond(person, film, times) @ place(
            compute_betas(person, scanner, np.unique(film["row"].to_numpy()))
        )
    # Independent noise of voxels becomes smaller in their average; everything else is a pattern times a time course.
    size = np.ones(scanner.n_voxels) if average is None else np.sqrt((average**2).sum(axis=0))
    white = generator.standard_normal((n_volumes + 8, len(size)), dtype=np.float32)
    ar = numbers.ar ** (site.t_r / 2)  # as strong at the rate of the first site as in the other formats
    noise = signal.lfilter([np.sqrt(1 - ar**2)], [1.0, -ar], white, axis=0)[8:] * size
    modes = place(make_noise_modes(person, scanner))
    periods, phases = generator.uniform(130, 500, 3), generator.uniform(0, 2 * np.pi, 3)
    drift = np.sin(2 * np.pi * times[:, None] / periods + phases)
    weights = (generator.standard_normal((3, 1)) + modes[:3]) * np.sqrt(1 / 3)
    displacement = compute_displacement(motion)
    spikes = np.where(displacement > _SPIKE_MM, displacement, 0)
    # A volume with motion loses signal, and the next one still loses half of that.
    lost = spikes + 0.5 * np.concatenate([[0], spikes[:-1]])
    # The artefact of the scanner is the same for all subjects: a pattern of the site, which changes fast.
    field = draw_fields(scanner.positions, 1, job.config.seed, "site", site.index, length_mm=30.0)[:, 0]
    course = generator.standard_normal(n_volumes)
    artefacts = (
        numbers.series_noise_percent * noise
        + numbers.drift_percent * drift @ weights
        + numbers.motion_percent * (motion * _MM / 0.3) @ (modes[2:8] * np.sqrt(1 / 6))
        - lost[:, None] * (1 + 0.5 * modes[1])
        + 0.2 * course[:, None] * place(field[None])
    )
    return (total + site.noise * artefacts).astype(np.float32)


_MM = np.array([1, 1, 1, 50, 50, 50])  # arcs on a sphere of 50 mm (Power et al. 2012)


def compute_displacement(motion: np.ndarray) -> np.ndarray:
    """Return the framewise displacement (mm) of each volume, 0 of the first; see `bids_fmri.make_confounds`."""
    return np.concatenate([[0.0], (np.abs(np.diff(motion, axis=0)) * _MM).sum(axis=1)])


def _respond(person: Person, film: pd.DataFrame, times: np.ndarray) -> np.ndarray:
    """Return the response to each distinct picture, (n_times, n_pictures), as multiples of its beta."""
    response = get_response(SHOT_S)
    lag = times[:, None] - film["onset"].to_numpy()
    # (n_times, n_shots); the responses of repeated pictures are added
    shots = np.interp(lag, np.arange(len(response)) * 0.1, response, left=0, right=0)
    _, which = np.unique(film["row"].to_numpy(), return_inverse=True)
    design = np.zeros((len(times), which.max() + 1), np.float32)
    np.add.at(design.T, which, shots.T.astype(np.float32))
    return design


# --- files --------------------------------------------------------------------------------------------------------


def _write_site(job: PhantomJob, site: Site, progress: Progress) -> list[Path]:
    root = job.root / site.name
    people = [job.subjects[place] for place, where in _list_scans(job.size) if where == site]
    table = pd.DataFrame(
        {
            "participant_id": [f"sub-{label_subject(person, site)}" for person in people],
            "site": site.name,
        }
    )
    name = name_source(job, site.index)
    if site.layout == "fmriprep":
        bids_fmri.write_dataset(root, table, name=name)
        derived = root / "derivatives" / "fmriprep" / "dataset_description.json"
        return [root / "dataset_description.json", derived, root / "participants.tsv", root / "README"]
    # The Human Connectome Project has neither of these; people who share a copy would write them.
    content: dict[str, Any] = {"Name": name, "License": "CC0"}
    if site.layout == "tables":
        content = {
            "Name": name,
            "BIDSVersion": "1.8.0",
            "DatasetType": "derivative",
            "License": "CC0",
            "GeneratedBy": [{"Name": "XCP-D", "Version": "0", "Description": "simulated"}],
        }
    return [
        write_json_file(root / "dataset_description.json", content),
        write_tsv(root / "participants.tsv", table),
    ]


class _RunName(NamedTuple):
    """Names of a run: its task and session (may be empty), its folder, and the start of its file names."""

    task: str
    session: str
    folder: Path
    stem: str


def _name_run(job: PhantomJob, site: Site, person: Person, number: int) -> _RunName:
    n_runs = job.size.n_runs or 1
    session = f"{number // n_runs + 1:02d}" if job.size.n_sessions > 1 else ""
    task = TASKS[number % n_runs % 2]
    # Runs of a task are counted within the session.
    place = number % n_runs // 2 + 1
    label, root = label_subject(person, site), job.root / site.name
    if site.layout == "hcp":
        # Counted over all sessions, since these folders have no sessions.
        count = (number // n_runs) * -(-n_runs // 2) + place
        stem = f"{'tfMRI_MOVIE' if task == 'movie' else 'rfMRI_REST'}{count}_LR"
        return _RunName(task, "", root / label / "MNINonLinear" / "Results" / stem, stem)
    parts = [f"sub-{label}", *([f"ses-{session}"] if session else [])]
    stem = "_".join([*parts, f"task-{task}", f"run-{place:02d}"])
    return _RunName(task, session, root.joinpath(*parts, "func"), stem)


def _write_run(job: PhantomJob, place: int, site: Site, number: int, progress: Progress) -> list[Path]:
    person, run_s = job.subjects[place], get_run_s(job.size)
    own = _name_run(job, site, person, number)
    n_volumes, name = int(run_s / site.t_r), f"{number}"
    # Time steps of a volume, which are shorter for shorter volumes.
    factor = get_mobility(job, place) * np.sqrt(site.t_r / 2)
    motion = factor * simulate_motion(person, n_volumes, f"{site.index} {name}")
    film = draw_film(job, person, run_s, f"{site.index} {name}") if own.task == "movie" else None
    values = simulate_run(
        job, person, site, n_volumes, name, film=film, motion=motion,
        average=None if site.layout == "fmriprep" else _make_average(job)[0],
    )  # fmt: skip
    paths = []
    if film is not None:
        shown = film.drop(columns="row")
        paths.append(write_tsv(job.root / TRUTH / "films" / f"{site.name}_{person.name}_{number}.tsv", shown))
    write = {"fmriprep": _write_volumes, "hcp": _write_cifti, "tables": _write_table}[site.layout]
    return [*paths, *write(job, person, site, own, values, motion)]


def _write_volumes(
    job: PhantomJob, person: Person, site: Site, run: _RunName, values: np.ndarray, motion: np.ndarray
) -> list[Path]:
    scanner = job.scanner
    series = scanner.baseline * (1 + values / 100)
    signal = series.mean(axis=1)
    generator = make_generator(job.config.seed, "tissue", person.index, site.index, run.stem)
    # No ventricles and no white matter: their signals follow the global one, with their own noise.
    tissue = signal + 0.5 * signal.std() * generator.standard_normal((2, len(signal)))
    change = np.concatenate([[0.0], np.sqrt((np.diff(values, axis=0) ** 2).mean(axis=1))])
    confounds = bids_fmri.make_confounds(
        motion, global_signal=signal, csf=tissue[0], white_matter=tissue[1], dvars=change, t_r=site.t_r
    )
    path = bids_fmri.write_run(
        job.root / site.name,
        label_subject(person, site),
        (scanner.fill_volume(row) for row in series),
        None,
        confounds,
        scanner.mask,
        n_volumes=len(series),
        affine=scanner.affine,
        t_r=site.t_r,
        session=run.session or None,
        task=run.task,
        run=run.stem.rpartition("run-")[2],
    )
    return [*sorted(path.parent.glob(f"{run.stem}_*")), *sorted(run.folder.glob(f"{run.stem}_*"))]


def _write_cifti(
    job: PhantomJob, person: Person, site: Site, run: _RunName, values: np.ndarray, motion: np.ndarray
) -> list[Path]:
    """Write ``..._Atlas.ptseries.nii`` and the tables of motion: mm and degrees with their changes, and rms (mm)."""
    import nibabel

    scanner = job.scanner
    labels, names = make_parcels(scanner, job.size.n_parcels)
    voxels = np.argwhere(scanner.mask)
    parcels = nibabel.cifti2.ParcelsAxis(
        [names[label] for label in sorted(names)],
        [voxels[labels == label] for label in sorted(names)],
        [{} for _ in names],
        affine=scanner.affine,
        volume_shape=scanner.mask.shape,
    )
    series = nibabel.cifti2.SeriesAxis(0, site.t_r, len(values), unit="SECOND")
    # Runs of the project are scaled to a mean of 10 000.
    image: Any = nibabel.Cifti2Image((10_000 * (1 + values / 100)).astype(np.float32), (series, parcels))
    image.nifti_header.set_intent("NIFTI_INTENT_CONNECTIVITY_PARCELLATED_SERIES")
    run.folder.mkdir(parents=True, exist_ok=True)
    own = motion * np.array([1, 1, 1, *[180 / np.pi] * 3])
    steps = np.diff(own, axis=0, prepend=own[:1])
    rms = np.sqrt(((np.diff(motion, axis=0, prepend=motion[:1]) * _MM) ** 2).sum(axis=1))
    lines = [" ".join(f"{value:.6f}" for value in row) for row in np.concatenate([own, steps], axis=1)]
    paths = [
        write_text(run.folder / "Movement_Regressors.txt", "\n".join(lines) + "\n"),
        write_text(run.folder / "Movement_RelativeRMS.txt", "".join(f"{value:.6f}\n" for value in rms)),
        run.folder / f"{run.stem}_Atlas.ptseries.nii",
    ]
    with replace_atomically(paths[-1]) as temporary:
        temporary.write_bytes(image.to_bytes())
    return paths


def _write_table(
    job: PhantomJob, person: Person, site: Site, run: _RunName, values: np.ndarray, motion: np.ndarray
) -> list[Path]:
    """Write the table of parcels and that of motion; parcels without coverage have no column, or one of n/a."""
    absent, empty = list_uncovered(job, site, person)
    names = _make_average(job)[1]
    table = pd.DataFrame(np.round(values, 5), columns=[names[label] for label in sorted(names)])
    table[empty] = np.nan
    atlas = f"{run.stem}_seg-phantom{len(names)}"
    sidecar = {"TaskName": run.task, "RepetitionTime": site.t_r, "SamplingFrequency": 1 / site.t_r}
    moved = pd.DataFrame(np.round(motion, 6), columns=list(bids_fmri.MOTION))
    moved["framewise_displacement"] = np.round(compute_displacement(motion), 6)
    return [
        write_tsv(run.folder / f"{atlas}_stat-mean_timeseries.tsv", table.drop(columns=absent)),
        write_json_file(run.folder / f"{atlas}_stat-mean_timeseries.json", sidecar),
        write_tsv(run.folder / f"{run.stem}_motion.tsv", moved),
    ]


def list_uncovered(job: PhantomJob, site: Site, person: Person) -> tuple[list[str], list[str]]:
    """Return the parcels that a site never covers, and those that are missing in one subject, limbic ones first."""
    names = list(_make_average(job)[1].values())
    if site.layout != "tables":
        return [], []
    generator = make_generator(job.config.seed, "coverage", site.index)
    # Signal is lost at the bottom of the brain first.
    order = sorted(generator.permutation(len(names)), key=lambda number: "Limbic" not in names[number])
    n_absent = max(1, len(names) // 28)
    own = make_generator(job.config.seed, "coverage", site.index, person.index)
    others = own.permutation(order[n_absent:])[: own.integers(0, 1 + max(1, len(names) // 28))]
    return [names[number] for number in order[:n_absent]], [names[number] for number in sorted(others)]


# --- truth --------------------------------------------------------------------------------------------------------


def _write_people(job: PhantomJob, progress: Progress) -> list[Path]:
    people, runs = [], []
    for place, site in _list_scans(job.size):
        person = job.subjects[place]
        absent, empty = list_uncovered(job, site, person)
        people.append(
            {
                "person": person.name, "source": name_source(job, site.index),
                "site": site.name, "layout": site.layout, "t_r": site.t_r,
                "subject": label_subject(person, site), "restless": place == find_restless(job.size),
                "mobility": round(get_mobility(job, place), 4), "uncovered": ",".join([*absent, *empty]),
            }
        )  # fmt: skip
        for number in range(job.size.n_sessions * (job.size.n_runs or 1)):
            own = _name_run(job, site, person, number)
            film = f"films/{site.name}_{person.name}_{number}.tsv" if own.task == "movie" else None
            runs.append(
                {
                    "person": person.name, "site": site.name, "subject": label_subject(person, site),
                    "session": own.session, "task": own.task, "folder": own.folder.relative_to(job.root).as_posix(),
                    "stem": own.stem,
                    "n_times": int(get_run_s(job.size) / site.t_r), "t_r": site.t_r, "film": film,
                }
            )  # fmt: skip
    return [
        write_tsv(job.root / TRUTH / "people.tsv", pd.DataFrame(people)),
        write_tsv(job.root / TRUTH / "runs.tsv", pd.DataFrame(runs)),
    ]


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write the patterns of ongoing activity, (n_modes, n_parcels) in percent, and the drive of each parcel."""
    average, names = _make_average(job)
    folder = job.root / TRUTH
    patterns = (person.config.fmri.ongoing_percent or 0) * make_ongoing_modes(person, job.scanner) @ average
    paths = [folder / f"sub-{person.name}_ongoing.npy"]
    with replace_atomically(paths[0]) as temporary, temporary.open("wb") as file:
        np.save(file, patterns.astype(np.float32))
    train = np.flatnonzero(person.drive.is_train)
    betas = compute_betas(person, job.scanner, train[:200]) @ average
    labels, _ = make_parcels(job.scanner, job.size.n_parcels)
    table = pd.DataFrame({"parcel": [names[label] for label in sorted(names)]})
    # Computed from the voxels, since every parcel is within one network.
    first = [int(np.flatnonzero(labels == label)[0]) for label in sorted(names)]
    table["network"] = job.scanner.networks[first]
    table["n_voxels"] = np.bincount(labels, minlength=len(names) + 1)[1:]
    table["drive_percent"] = np.round(betas.std(axis=0), 5)
    table["ongoing_percent"] = np.round(np.sqrt((patterns**2).sum(axis=0)), 5)
    return [*paths, write_tsv(folder / f"sub-{person.name}_drive.tsv", table)]


CORPUS = Format(
    name="corpus",
    description="fMRI without labels of many people at several sites: films and rest in three layouts",
    modality="fmri",
    uses=("n_runs", "voxel_mm", "n_sites", "minutes"),
    duration_s=SHOT_S,
    limits=LIMITS,
    check=check_sites,
    count=count_corpus,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, 2.0),
    plan=plan_corpus,
    plan_truth=plan_truth,
    first_person=FIRST_PERSON,
    version=2,
    ongoing_percent=_ONGOING_PERCENT,
)
