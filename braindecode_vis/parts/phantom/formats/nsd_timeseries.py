"""NSD's preprocessed time series: int16 volumes of every run, its design and its motion, in the folders of the bucket.

Owns ``timeseries_session01_run01.nii.gz``, ``design_...tsv`` (for each volume the 73KID that begins there, or 0) and
``motion_...tsv``. Design, pictures and regions are those of `nsd`. Runs of rest, which exist in some sessions, are left
out.

References
----------
.. [1] Allen, E. J. et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and artificial
   intelligence. Nature Neuroscience 25, 116-126. https://doi.org/10.1038/s41593-021-00962-x
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.datasets.nsd.beta_files import VOLUME_SPACE
from braindecode_vis.parts.phantom.bold_signal import simulate_motion
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.file_writers import write_text
from braindecode_vis.parts.phantom.formats.nsd_design import get_trial_images
from braindecode_vis.parts.phantom.formats.nsd_files import T_R, make_subject_scanner
from braindecode_vis.parts.phantom.formats.raw_fmri import estimate_raw_volume, estimate_seconds, write_series
from braindecode_vis.parts.phantom.sizes import PhantomSize

USES = ("n_runs", "voxel_mm")
SLOT_VOLUMES = 3  # a trial of 4 s in steps of 4/3 s [1]_
_TAIL_VOLUMES = 9


def _expect_volumes(size: PhantomSize) -> int:
    """Return the volumes of a run: its slots, blanks included, and its end."""
    # As in `make_nsd_expdesign`: twelve slots more than pictures.
    n_slots = -(-size.n_trials // (size.n_sessions * (size.runs))) + 12
    return n_slots * SLOT_VOLUMES + _TAIL_VOLUMES


def count(size: PhantomSize) -> Counts:
    """Return work and space of series, pictures and tables."""
    n_runs = size.n_subjects * size.n_sessions * (size.runs)
    n_volumes, n_images = n_runs * _expect_volumes(size), nsd_format.count_images(size)
    # A row of motion needs 150 bytes; tables of trials and pictures as in `nsd`.
    tables = 45.0 * n_images * (2 + size.n_subjects) / 2 + size.n_subjects * size.n_trials * 100
    n_bytes = (
        n_volumes * (estimate_raw_volume(size.voxel_mm) + 150) + n_images * 3.0 * size.image_size**2 + tables
    )
    seconds = 1 + estimate_seconds(size.voxel_mm, n_volumes) + n_images * 2e-3
    n_steps = 1 + n_images + size.n_subjects + n_volumes
    return Counts(n_bytes, 0, n_volumes * T_R, seconds, n_steps)


def plan(job: PhantomJob) -> list[Unit]:
    """Return design, stimuli, each subject's regions, and one unit per run."""
    units = nsd_format.plan_shared(job)
    for person in job.subjects:
        units.append(
            Unit(f"subject {person.name}, regions", 1, partial(nsd_format.write_subject, job, person))
        )
        name = "subject {person.name}, session {session:02d}, run {run:02d}"
        labels: dict[str, Any] = {
            "session": range(1, job.size.n_sessions + 1),
            "run": range(1, job.size.runs + 1),
        }
        units += list_units(job, name, _expect_volumes(job.size), _write_run, people=[person], **labels)
    return units


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    design = nsd_format.make_design(job.size, job.config.seed)
    pattern = design["stimpattern"][session - 1]
    shown = get_trial_images(design, person.index + 1, session)
    first = int(pattern[: run - 1].sum())
    own = shown[first : first + int(pattern[run - 1].sum())]
    # Rows of the drive in the order of nsdId: the inverse of the column.
    rows = np.argsort(job.table["nsd_id"].to_numpy())[own - 1]
    starts = SLOT_VOLUMES * np.flatnonzero(pattern[run - 1])
    n_volumes = _expect_volumes(job.size)
    # Each subject has a different volume, around the same voxels.
    own_job = replace(job, recorder=make_subject_scanner(job.size.voxel_mm or 0, person.index + 1))
    begins = np.zeros(n_volumes, int)
    begins[starts] = own
    base = job.root / "nsddata_timeseries" / "ppdata" / f"subj{person.index + 1:02d}" / VOLUME_SPACE
    end = f"_session{session:02d}_run{run:02d}"
    motion = simulate_motion(person, n_volumes, end)
    return [
        write_text(base / "design" / f"design{end}.tsv", "".join(f"{number}\n" for number in begins)),
        write_text(
            base / "motion" / f"motion{end}.tsv",
            "".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in motion),
        ),
        write_series(
            base / "timeseries" / f"timeseries{end}.nii.gz", own_job, person, starts * T_R, rows,
            nsd_format.STIMULUS_S, n_volumes, progress,
        ),
    ]  # fmt: skip


FORMAT = replace(
    nsd_format.FORMAT,
    name="nsd-timeseries",
    description="Natural Scenes Dataset: int16 time series of every run with design and motion, regions, stimuli",
    uses=USES,
    check=nsd_format.check_design,
    count=count,
    plan=plan,
    ongoing_percent=0.0,
)
