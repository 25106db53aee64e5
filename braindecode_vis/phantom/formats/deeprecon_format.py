"""Deep Image Reconstruction from images to BData tables in HDF5, one for each person and experiment.

Owns ``sub-01_perceptionNaturalImageTraining_original_VC.h5`` and its siblings for test and imagery, under the later
spelling of the groups (``dataset``, ``metadata``). Training images are shown several times, and the pictures that are
imagined are test images. Shapes and letters, which need pictures of another kind, are left out.

References
----------
.. [1] Shen, G., Horikawa, T., Majima, K., Kamitani, Y. (2019). Deep image reconstruction from human brain activity.
   PLOS Computational Biology 15, e1006633. https://doi.org/10.1371/journal.pcbi.1006633
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.bold_signal import iterate_betas
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import Counts, PhantomJob, Progress, Unit
from braindecode_vis.phantom.formats import god_format
from braindecode_vis.phantom.scanner import GRIDS, count_voxels
from braindecode_vis.phantom.sizes import PhantomSize, check_imagery, check_numbers
from braindecode_vis.seeds import make_generator

STIMULUS_S = 8.0  # [1]_
VARIANT = "original_VC"
EXPERIMENTS = ("perceptionNaturalImageTraining", "perceptionNaturalImageTest", "imagery")


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if Deeprecon cannot have this size."""
    check_numbers(size, "deeprecon", god_format.USES)
    check_imagery(size, "deeprecon")
    if size.n_sessions != 1 or (size.n_runs or 0) > size.n_train_images or size.voxel_mm not in GRIDS:
        raise ConfigError(
            f"the files of Deeprecon do not tell sessions apart: n_sessions ({size.n_sessions}) must be 1; n_runs "
            f"({size.n_runs}) cannot exceed the {size.n_train_images} training images, and voxel_mm ({size.voxel_mm}) "
            f"must be from {min(GRIDS)} to {max(GRIDS)}."
        )


def _count_samples(size: PhantomSize) -> int:
    return size.n_trials + (size.n_imagery or 0) * (size.imagery_repetitions or 0)


def count(size: PhantomSize) -> Counts:
    """Return work and space of the tables."""
    n_samples, n_voxels = _count_samples(size), count_voxels(size.voxel_mm)
    one = god_format.estimate_visual_bytes(size.voxel_mm, n_samples, n_files=len(EXPERIMENTS))
    seconds = 1 + size.n_subjects * n_samples * (2e-4 + 1.2e-7 * n_voxels) + one * 1e-8
    recorded = size.n_subjects * n_samples * STIMULUS_S
    return Counts(size.n_subjects * one, 0, recorded, seconds, size.n_subjects * n_samples)


def make_trials(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return every sample of a person: `experiment`, `row` of the image, `Run`, `Block`."""
    size, tests = job.size, job.test_rows
    generator = make_generator(job.config.seed, "deeprecon", subject)
    train = np.flatnonzero(job.table["split"] == "train")
    imagined = tests[: size.n_imagery or 0]
    shown = {
        EXPERIMENTS[0]: [
            run
            for _ in range(size.train_repetitions)
            for run in np.array_split(generator.permutation(train), size.n_runs or 1)
        ],
        EXPERIMENTS[1]: [generator.permutation(tests) for _ in range(size.test_repetitions)],
        EXPERIMENTS[2]: [generator.permutation(imagined) for _ in range(size.imagery_repetitions or 0)],
    }
    parts = [
        pd.DataFrame({"experiment": name, "row": rows, "Run": number, "Block": np.arange(1, len(rows) + 1)})
        for name, runs in shown.items()
        for number, rows in enumerate(runs, start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def plan(job: PhantomJob) -> list[Unit]:
    """Return one unit per person and experiment."""
    units = []
    for person in job.subjects:
        counts = make_trials(job, person.index)["experiment"].value_counts()
        units += [
            Unit(f"subject {person.name}, {name}", int(counts[name]), partial(_write_file, job, person, name))
            for name in EXPERIMENTS
            if name in counts
        ]
    return units


def _write_file(job: PhantomJob, person: Person, experiment: str, progress: Progress) -> list[Path]:
    trials = make_trials(job, person.index)
    own = trials[trials["experiment"] == experiment]
    kept = god_format.find_visual_cortex(job.scanner)
    blocks = iterate_betas(
        person, job.scanner, own["row"].to_numpy(), own.index.to_numpy(), imagery=experiment == "imagery"
    )
    codes = np.array([god_format.encode_stimulus_id(name) for name in job.table["stimulus_id"]])
    labels = pd.DataFrame(
        {
            "DataType": EXPERIMENTS.index(experiment) + 1,
            "stimulus_id": codes[own["row"]],
            "Run": own["Run"].to_numpy(),
            "Block": own["Block"].to_numpy(),
        }
    )
    path = write_experiment(
        job.root,
        person.index + 1,
        experiment,
        (block[:, kept] for block in progress.watch(blocks, len)),
        labels,
        god_format.find_areas(job.scanner, kept),
        voxel_xyz=job.scanner.positions[kept],
    )
    return [path]


def write_experiment(
    root: Path,
    subject: int,
    experiment: str,
    samples: Iterable[np.ndarray],
    labels: pd.DataFrame,
    rois: Mapping[str, np.ndarray],
    *,
    voxel_xyz: np.ndarray,
    variant: str = VARIANT,
    dtype: str = "<f8",
) -> Path:
    """Write ``sub-01_EXPERIMENT_VARIANT.h5``; see `god_format.write_bdata`."""
    path = root / f"sub-{subject:02d}_{experiment}_{variant}.h5"
    return god_format.write_bdata(
        path, samples, labels, rois, voxel_xyz=voxel_xyz, naming="dataset", dtype=dtype
    )


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images under ImageNet-like names, as ``.JPEG`` below ``images``."""
    table = god_format.list_images(size, seed)
    return table.assign(
        **{c: [str(Path(p).with_suffix(".JPEG")) for p in table[c]] for c in ("path", "file_name")}
    )


FORMAT = replace(
    god_format.FORMAT,
    name="deeprecon",
    description="Deep Image Reconstruction: BData tables of natural images and imagery, one for each experiment",
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    plan=plan,
)
