"""V4 photographs (Cowley et al. 2023) from images to arrays of spike counts and archives of pictures.

Owns the neurons (positions of the simulated V4, instead of voxels), whole numbers of spikes, and the order of the
pictures, in which training and test images are mixed. An animal has one session. The reader defines the file names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.v4_photographs import LAYOUT
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.scanner import count_voxels, make_area_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images, estimate_image_bytes

SESSIONS = ("201025", "190923", "211022")
"""One session of each animal: those that the authors tested."""
_SHARE = 0.0047  # of cortical positions, for the estimate alone
_MEAN, _SPREAD = 3.0, 1.5  # spikes in 100 ms, as in the published sessions


def count(size: PhantomSize) -> Counts:
    """Return work and space of counts and pictures."""
    n_images, n_neurons = count_images(size), _SHARE * count_voxels(size.voxel_mm)
    repeats = max(size.train_repetitions, size.test_repetitions)
    picture = estimate_image_bytes(size.image_size) + 120  # of the names in a zip archive
    n_bytes = size.n_subjects * n_images * (8 * n_neurons * (repeats + 1) + picture)
    n_trials = size.n_subjects * size.n_trials
    return Counts(n_bytes, 0, 0.2 * n_trials, 1 + 4e-4 * n_trials, n_trials)


def _write_animal(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    session, n_images = SESSIONS[person.index], len(job.table)
    order = make_generator(job.config.seed, "v4-photographs", person.index).permutation(n_images)
    times = job.repetitions[order]
    picture, repeat = np.nonzero(np.arange(times.max()) < times[:, None])
    blocks = iterate_betas(person, job.scanner, order[picture], np.arange(len(picture)))
    betas = np.concatenate(list(progress.watch(blocks, len)))  # (n_trials, n_neurons)
    z = (betas - betas.mean(axis=0)) / betas.std(axis=0)
    counts = np.full((betas.shape[1], n_images, times.max()), np.nan)
    counts[:, picture, repeat] = np.rint(np.clip(_MEAN + _SPREAD * z, 0, None)).T
    pictures = [job.root / path for path in job.table["path"].iloc[order]]
    return [
        LAYOUT.write(job.root, "single", {"counts": counts}, session=session),
        LAYOUT.write(job.root, "averaged", {"counts": np.nanmean(counts, axis=2)}, session=session),
        LAYOUT.write_pictures(job.root, "pictures", pictures, session=session),
    ]


FORMAT = Format(
    name="v4-photographs",
    description="V4 photographs (Cowley et al. 2023): arrays of spike counts, zip archives of pictures",
    modality="fmri",  # neurons take the place of voxels
    uses=("voxel_mm",),
    duration_s=0.1,
    limits={"n_subjects": (1, len(SESSIONS)), "n_sessions": (1, 1), "voxel_mm": (2, 6)},
    count=count,
    make_recorder=lambda size: make_area_scanner(size.voxel_mm or 0, "hV4"),
    plan=lambda job: [
        Unit(f"session {SESSIONS[person.index]}", job.size.n_trials, partial(_write_animal, job, person))
        for person in job.subjects
    ],
    voxel_share=_SHARE,
)
