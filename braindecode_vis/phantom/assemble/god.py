"""Generic Object Decoding from images to BData tables, seen and imagined.

Owns the ImageNet-like names of the phantom's images and the order of the samples. As in the published files, the voxels
are those of visual cortex alone. ``ImageFeatures.h5`` holds what drives the phantom under the names of the layers that
it stands in for: Gabor energy as ``cnn1``, mid-level statistics as ``cnn4``, the semantic drive as ``cnn8``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_imagery, check_numbers
from braindecode_vis.phantom.assemble.stimulus_files import list_split
from braindecode_vis.phantom.assemble.streams import iterate_betas
from braindecode_vis.phantom.assemble.volume_files import GRIDS, count_voxels
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.drive import N_EARLY, N_MID
from braindecode_vis.phantom.scanner import FmriMachine, make_fmri_machine
from braindecode_vis.phantom.writers import god
from braindecode_vis.phantom.writers.tables import write_text
from braindecode_vis.seeds import make_generator

USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions")
T_R = 3.0
STIMULUS_S = 9.0
_FIRST_SYNSET = 1_440_000
_VISUAL_SHARE = 0.205  # of cortical voxels
_AREAS = {
    "ROI_V1": ("V1",),
    "ROI_V2": ("V2",),
    "ROI_V3": ("V3",),
    "ROI_V4": ("hV4",),
    "ROI_LOC": ("LO",),
    "ROI_FFA": ("FFA",),
    "ROI_PPA": ("PPA",),
    "ROI_LVC": ("V1", "V2", "V3"),
    "ROI_HVC": ("LO", "FFA", "PPA", "EBA", "VWFA", "IT", "OPA"),
}


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if GOD cannot have this size."""
    check_numbers(size, "god", USES)
    check_imagery(size, "god")
    if size.n_sessions != 1 or size.train_repetitions != 1:
        raise ConfigError(
            f"GOD shows each training image once and does not tell sessions apart: n_sessions ({size.n_sessions}) and "
            f"train_repetitions ({size.train_repetitions}) must be 1."
        )
    if (size.n_runs or 0) > size.n_train_images or size.voxel_mm not in GRIDS:
        raise ConfigError(
            f"n_runs ({size.n_runs}) cannot exceed the {size.n_train_images} training images, and voxel_mm "
            f"({size.voxel_mm}) must be from {min(GRIDS)} to {max(GRIDS)}."
        )


def _count_samples(size: PhantomSize) -> int:
    return size.n_trials + (size.n_imagery or 0) * (size.imagery_repetitions or 0)


def count(size: PhantomSize) -> Counts:
    """Return work and space of the tables."""
    n_samples, n_voxels = _count_samples(size), count_voxels(size.voxel_mm)
    one = god.estimate_bytes(n_samples, round(_VISUAL_SHARE * n_voxels), len(_AREAS) + 1)
    n_rows = count_images(size) + size.n_train_concepts + size.n_test_concepts
    features = 8.0 * n_rows * (N_EARLY + N_MID + 32)
    seconds = 1 + size.n_subjects * n_samples * (2e-4 + 1.2e-7 * n_voxels) + one * 1e-8
    recorded = size.n_subjects * n_samples * 9.0
    return Counts(size.n_subjects * one + features, 0, recorded, seconds, 1 + size.n_subjects * n_samples)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images under ImageNet-like names."""
    table = list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed)
    synset = _FIRST_SYNSET + 37 * table["concept_index"]
    # Some numbers end in zeros, which the code of the data set loses.
    image = (131 * table["concept_index"] + 1010 * table["exemplar"] + 10) % 999_999 + 1
    names = [f"n{s:08d}_{i}" for s, i in zip(synset, image, strict=True)]
    folders = np.where(table["split"] == "train", "images/training/", "images/test/")
    return table.assign(
        stimulus_id=names,
        synset=[f"n{s:08d}" for s in synset],
        file_name=[f"{name}.jpg" for name in names],
        path=[f"{folder}{name}.jpg" for folder, name in zip(folders, names, strict=True)],
    )


def count_images(size: PhantomSize) -> int:
    """Return the number of images."""
    return size.n_train_images + size.n_test_concepts


def make_trials(job: Job, subject: int) -> pd.DataFrame:
    """Return every sample of a person: `DataType`, `row` of the image, `Run`, `Block`.

    Training images are shown once each; each test run shows, and each imagery run imagines, every image once.
    """
    size, tests = job.size, job.test_rows
    generator = make_generator(job.config.seed, "god", subject)
    training = np.array_split(
        generator.permutation(np.flatnonzero(job.table["split"] == "train")), size.n_runs or 1
    )
    runs = [("training", rows) for rows in training]
    runs += [("test", generator.permutation(tests)) for _ in range(size.test_repetitions)]
    imagined = tests[: size.n_imagery or 0]
    runs += [("imagery", generator.permutation(imagined)) for _ in range(size.imagery_repetitions or 0)]
    parts = [
        pd.DataFrame(
            {
                "DataType": god.DATA_TYPES[kind],
                "row": rows,
                "Run": number,
                "Block": np.arange(1, len(rows) + 1),
            }
        )
        for number, (kind, rows) in enumerate(runs, start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def plan(job: Job) -> list[Unit]:
    """Return the shared tables, and one unit per person."""
    units = [Unit("image features and lists", 1, lambda progress: _write_shared(job))]
    for person in job.people:

        def write(progress: Progress, person: Person = person) -> list[Path]:
            return _write_person(job, person, progress)

        units.append(Unit(f"subject {person.name}, samples", _count_samples(job.size), write))
    return units


def _write_shared(job: Job) -> list[Path]:
    table, drive = job.table, job.drive
    paths = []
    for split, name in (("train", "Training"), ("test", "Test")):
        part = table[table["split"] == split]
        category = part["synset"].rank(method="dense").astype(int)
        codes = [f"{god.encode_stimulus_id(name)!r}" for name in part["stimulus_id"]]
        lines = zip(part["stimulus_id"], codes, category, range(1, len(part) + 1), strict=True)
        text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
        paths.append(write_text(job.root / f"stimulus_ImageNet{name}.tsv", text))
    groups = table.groupby("synset", sort=True).indices
    features = {
        layer: np.concatenate([block, [block[rows].mean(axis=0) for rows in groups.values()]])
        for layer, block in (("cnn1", drive.early), ("cnn4", drive.mid), ("cnn8", drive.semantic))
    }
    numbers = [float(int(synset[1:])) for synset in table["synset"]]
    kinds = np.where(table["split"] == "train", god.FEATURE_TYPES["training"], god.FEATURE_TYPES["test"])
    path = god.write_image_features(
        job.root / "ImageFeatures.h5",
        features,
        image_ids=np.array(
            [*map(god.encode_stimulus_id, table["stimulus_id"]), *[np.nan] * len(groups)], float
        ),
        category_ids=np.array([*numbers, *(float(int(synset[1:])) for synset in groups)]),
        feature_types=np.concatenate([kinds, np.full(len(groups), god.FEATURE_TYPES["category_average"])]),
    )
    return [*paths, path]


def _write_person(job: Job, person: Person, progress: Progress) -> list[Path]:
    trials = make_trials(job, person.index)
    codes = np.array([god.encode_stimulus_id(name) for name in job.table["stimulus_id"]])
    labels = pd.DataFrame(
        {
            "DataType": trials["DataType"],
            "stimulus_id": codes[trials["row"]],
            "Run": trials["Run"],
            "Block": trials["Block"],
        }
    )
    machine = job.scanner
    kept = find_visual_cortex(machine)
    rois = {name: np.isin(machine.regions[kept], areas) for name, areas in _AREAS.items()}
    path = god.write_bdata(
        job.root / f"Subject{person.index + 1}.h5",
        progress.watch(_iterate_samples(job, person, trials, kept), len),
        labels,
        {**rois, "ROI_VC": np.ones(len(kept), bool)},
        voxel_xyz=machine.positions[kept],
    )
    return [path]


def find_visual_cortex(machine: FmriMachine) -> np.ndarray:
    """Return the voxels of every visual region."""
    return np.flatnonzero(machine.regions != "")


def _iterate_samples(
    job: Job, person: Person, trials: pd.DataFrame, kept: np.ndarray
) -> Iterator[np.ndarray]:
    imagined = (trials["DataType"] == god.DATA_TYPES["imagery"]).to_numpy()
    rows, seeds = trials["row"].to_numpy(), trials.index.to_numpy()
    for flag in (False, True):  # imagery comes last
        part = imagined == flag
        for block in iterate_betas(person, job.scanner, rows[part], seeds[part], imagery=flag):
            yield block[:, kept]


FORMAT = Format(
    name="god",
    description="Generic Object Decoding: BData tables of visual cortex, seen and imagined, image features",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_fmri_machine(size.voxel_mm or 0, T_R),
    plan=plan,
)
