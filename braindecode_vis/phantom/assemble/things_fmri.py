"""THINGS-fMRI from images to response tables, volumes of betas and events.

Owns which trial goes into which file. Volumes come first, run by run, catch trials included; the response table is
read back from them, so that both hold the same numbers.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_numbers, check_one_exemplar_a_session
from braindecode_vis.phantom.assemble.stimulus_files import match_concepts
from braindecode_vis.phantom.assemble.streams import iterate_betas, iterate_volumes
from braindecode_vis.phantom.assemble.volume_files import GRIDS, count_voxels, estimate_volume_bytes
from braindecode_vis.phantom.bold_signal import compute_voxel_snr
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.scanner import FmriMachine, make_fmri_machine
from braindecode_vis.phantom.stimuli.concepts import make_concepts
from braindecode_vis.phantom.writers import things_fmri
from braindecode_vis.phantom.writers.nifti import HEADER_BYTES
from braindecode_vis.seeds import derive_seed

USES = ("n_runs", "n_catch", "voxel_mm")
_SIDED = {"EBA": "EBA", "FFA": "FFA", "PPA": "PPA", "LO": "LOC", "OPA": "TOS"}
_VOXELS_PER_BLOCK = 1024


def count_session_trials(size: PhantomSize) -> int:
    """Return the trials of one session, catch trials included."""
    return size.n_train_concepts + 2 * size.n_test_concepts + (size.n_catch or 0)


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-fMRI cannot have this size."""
    check_numbers(size, "things-fmri", USES)
    check_one_exemplar_a_session(size, "THINGS-fMRI")
    if (size.n_runs or 0) > count_session_trials(size) or size.voxel_mm not in GRIDS:
        raise ConfigError(
            f"n_runs ({size.n_runs}) cannot exceed the {count_session_trials(size)} trials of a session, and voxel_mm "
            f"({size.voxel_mm}) must be from {min(GRIDS)} to {max(GRIDS)}."
        )


def count(size: PhantomSize) -> Counts:
    """Return work and space of volumes and tables."""
    n_trials = size.n_sessions * count_session_trials(size)
    n_kept = size.n_sessions * (count_session_trials(size) - (size.n_catch or 0))
    n_voxels = count_voxels(size.voxel_mm)
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    table = 4.0 * n_voxels * n_kept
    n_bytes = n_trials * (volume + 200) + table + 120 * n_voxels
    seconds = n_trials * (2e-4 + 3.5e-7 * n_voxels + volume * 2.5e-8) + table * 1e-8 + n_voxels * 1e-5
    steps = 1 + size.n_subjects * (n_trials + n_kept)
    seconds_recorded = size.n_subjects * n_trials * things_fmri.SOA_S
    return Counts(size.n_subjects * n_bytes, table, seconds_recorded, 1 + size.n_subjects * seconds, steps)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images, sorted by concept."""
    n_concepts = size.n_train_concepts + size.n_test_concepts
    names = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    table = things_fmri.make_image_table(names, size.n_train_exemplars, size.n_test_concepts)
    table = match_concepts(table, n_concepts, seed)
    names_on_disk = table["stimulus_id"] + ".jpg"
    return table.assign(
        path="object_images/" + table["concept"] + "/" + names_on_disk, file_name=names_on_disk
    )


def count_images(size: PhantomSize) -> int:
    """Return the number of images."""
    return (size.n_train_concepts + size.n_test_concepts) * size.n_train_exemplars + size.n_test_concepts


@lru_cache(maxsize=4)
def _make_design(job: Job, subject: int) -> pd.DataFrame:
    assert job.size.n_runs is not None
    assert job.size.n_catch is not None
    seed = derive_seed(job.config.seed, "design", subject)
    return things_fmri.make_things_fmri_design(
        job.table, job.size.n_sessions, job.size.n_runs, seed, n_catch=job.size.n_catch
    )


def plan(job: Job) -> list[Unit]:
    """Return the masks, one unit per run of volumes, and the response table of each person."""
    n_trials = count_session_trials(job.size)
    numbers = (
        np.arange(n_trials) * (job.size.n_runs or 1) // n_trials + 1
    )  # the run of each trial of a session
    units = [Unit("the brain masks", 1, lambda progress: _write_masks(job))]
    for person in job.people:
        for session in range(1, job.size.n_sessions + 1):
            for run, n_run_trials in enumerate(np.bincount(numbers)[1:].tolist(), start=1):

                def write(
                    progress: Progress, person: Person = person, session: int = session, run: int = run
                ) -> list[Path]:
                    return _write_run(job, person, session, run, progress)

                name = f"subject {person.name}, session {session:02d}, run {run:02d}"
                units.append(Unit(name, n_run_trials, write))

        def tabulate(progress: Progress, person: Person = person) -> list[Path]:
            return _write_table(job, person, progress)

        n_kept = job.size.n_sessions * (n_trials - (job.size.n_catch or 0))
        units.append(Unit(f"subject {person.name}, response table", n_kept, tabulate))
    return units


def _write_masks(job: Job) -> list[Path]:
    machine = job.scanner
    return [
        things_fmri.write_brainmask(job.root, person.index + 1, machine.mask, machine.affine)
        for person in job.people
    ]


def _write_run(job: Job, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    design = _make_design(job, person.index)
    rows = design[(design["session"] == session) & (design["run"] == run)]
    blocks = progress.watch(
        iterate_betas(person, job.scanner, rows["row"].to_numpy(), rows.index.to_numpy()), len
    )
    number = person.index + 1
    path = things_fmri.write_volume_betas(
        job.root,
        number,
        session,
        run,
        iterate_volumes(job.scanner, blocks),
        shape=job.scanner.mask.shape,
        affine=job.scanner.affine,
        design=design,
        images=job.table,
    )
    events = things_fmri.write_events(job.root, number, session, run, design, job.table, job.config.seed)
    return [path, path.with_name(path.name.replace("betas.nii.gz", "conditions.tsv")), events]


def _write_table(job: Job, person: Person, progress: Progress) -> list[Path]:
    design, machine, number = _make_design(job, person.index), job.scanner, person.index + 1
    stimuli = things_fmri.make_stimulus_metadata(design, job.table, number)
    spool_path = job.scratch / f"things-fmri-{person.name}.npy"
    shape = (len(stimuli), machine.n_voxels)
    try:
        spool = np.lib.format.open_memmap(spool_path, "w+", np.float32, shape)
        for row, values in enumerate(_read_trials(job, person, design)):
            spool[row] = values
            progress.add(1)
        starts = range(0, machine.n_voxels, _VOXELS_PER_BLOCK)
        path = things_fmri.write_response_table(
            job.root,
            number,
            (np.ascontiguousarray(spool[:, start : start + _VOXELS_PER_BLOCK].T) for start in starts),
            n_voxels=machine.n_voxels,
            stimuli=stimuli,
            voxels=_make_voxel_table(job, person),
        )
        del spool
    finally:
        spool_path.unlink(missing_ok=True)
    stem = f"sub-{number:02d}"
    return [path, *(path.with_name(f"{stem}_{kind}Metadata.csv") for kind in ("Stimulus", "Voxel"))]


def _read_trials(job: Job, person: Person, design: pd.DataFrame) -> Iterator[np.ndarray]:
    """Yield the voxels of every trial but catch trials, from the finished volumes."""
    machine, number = job.scanner, person.index + 1
    n_bytes = 4 * machine.mask.size
    for (session, run), rows in design.groupby(["session", "run"]):
        stem = f"sub-{number:02d}_ses-things{session:02d}_task-things_run-{run:02d}_betas.nii.gz"
        folder = job.root / "betas_vol" / f"sub-{number:02d}" / f"ses-things{session:02d}"
        with gzip.open(folder / stem) as file:
            file.read(HEADER_BYTES)
            for kind in rows["trial_type"]:
                volume = np.frombuffer(file.read(n_bytes), "<f4").reshape(machine.mask.shape, order="F")
                if kind != "catch":
                    yield volume[machine.mask]


def _make_voxel_table(job: Job, person: Person) -> pd.DataFrame:
    machine = job.scanner
    power = compute_voxel_snr(person, machine) ** 2
    half = job.size.n_sessions / 2
    split = power / (power + 1 / half)
    return things_fmri.make_voxel_metadata(
        person.index + 1,
        np.argwhere(machine.mask),
        _flag_regions(machine),
        nc_singletrial=100 * power / (power + 1),
        nc_testset=100 * power / (power + 1 / job.size.n_sessions),
        splithalf_uncorrected=split,
        splithalf_corrected=2 * split / (1 + split),
    )


def _flag_regions(machine: FmriMachine) -> pd.DataFrame:
    left = machine.positions[:, 0] < 0
    flags = {name: machine.regions == name for name in ("V1", "V2", "V3", "hV4")}
    for region, name in _SIDED.items():
        flags[f"l{name}"] = (machine.regions == region) & left
        flags[f"r{name}"] = (machine.regions == region) & ~left
    return pd.DataFrame({**flags, "IT": machine.regions == "IT"})


FORMAT = Format(
    name="things-fmri",
    description="THINGS-fMRI: response tables (HDF5), volumes of single-trial betas, events",
    modality="fmri",
    uses=USES,
    duration_s=things_fmri.STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_fmri_machine(size.voxel_mm or 0, things_fmri.T_R),
    plan=plan,
)
