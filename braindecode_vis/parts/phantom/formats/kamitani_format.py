"""Generic Object Decoding (GOD) and Deep Image Reconstruction (Deeprecon) from images to BData tables in HDF5.

Owns ``Subject*.h5`` and ``ImageFeatures.h5`` as published by Kamitani Lab, the ImageNet-like names of the phantom's
images and the order of the samples. A BData file is one matrix, samples by fields; its metadata describe every field.
Traps that are kept: the two ways to spell the groups; `stimulus_id` as a float, which loses the zeros at its end; flags
that are 1 if they apply, otherwise 0 or NaN.

As in the published files, the voxels are only those of visual cortex. ``ImageFeatures.h5`` holds the features that
drive the phantom, with the names of the layers that they replace: Gabor energy as ``cnn1``, mid-level statistics as
``cnn4``, the semantic drive as ``cnn8``.

Deeprecon has one file per subject and experiment, with the later spelling of the groups. Training images are shown
several times, and the imagined pictures are test images. Shapes and letters are left out, since they need other
pictures.

References
----------
.. [1] Horikawa, T., Kamitani, Y. (2017). Generic decoding of seen and imagined objects using hierarchical
   visual features. Nature Communications 8, 15037. https://doi.org/10.1038/ncomms15037
.. [2] Shen, G., Horikawa, T., Majima, K., Kamitani, Y. (2019). Deep image reconstruction from human brain activity.
   PLOS Computational Biology 15, e1006633. https://doi.org/10.1371/journal.pcbi.1006633
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, check_columns, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import name_imagenet
from braindecode_vis.datasets.kamitani import deeprecon
from braindecode_vis.datasets.kamitani.bdata import GROUPS, STIMULUS_LISTS, encode_stimulus_id
from braindecode_vis.datasets.kamitani.god import TASKS, Task
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.drive import N_EARLY, N_MID
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
    list_units,
)
from braindecode_vis.parts.phantom.formats.file_writers import check_block, check_count, write_text
from braindecode_vis.parts.phantom.scanner import count_voxels, make_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images

USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions")
T_R = 3.0  # of the published recordings; samples are means over a presentation of 9 s, or of imagery
GOD_STIMULUS_S = 9.0
_VISUAL_SHARE = 0.205  # of cortical voxels; for the estimate alone
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
DATA_TYPES: dict[Task, int] = {task: code for code, task in TASKS.items()}
FEATURE_TYPES = {"training": 1, "test": 2, "category_average": 3}
Naming = Literal["dataSet", "dataset"]
DESIGN_COLUMNS = ("DataType", "stimulus_id", "Run", "Block")


def check_runs(size: PhantomSize) -> None:
    """Raise `ConfigError` if a run has no training image."""
    if (size.n_runs or 0) > size.n_train_images:
        raise ConfigError(f"n_runs ({size.n_runs}) cannot exceed the {size.n_train_images} training images.")


def _count_samples(size: PhantomSize) -> int:
    return size.n_trials + (size.n_imagery or 0) * (size.imagery_repetitions or 0)


def count_tables(size: PhantomSize, stimulus_s: float, n_files: int = 1) -> Counts:
    """Return work and space of the tables, for a number of files per subject."""
    n_samples, n_voxels = _count_samples(size), count_voxels(size.voxel_mm)
    n_visual, n_rois = round(_VISUAL_SHARE * n_voxels), len(_AREAS) + 1
    one = estimate_bytes(n_samples, n_visual, n_rois) + (n_files - 1) * estimate_bytes(0, n_visual, n_rois)
    seconds = 1 + size.n_subjects * n_samples * (2e-4 + 1.2e-7 * n_voxels) + one * 1e-8
    n_steps = size.n_subjects * n_samples
    return Counts(size.n_subjects * one, 0, n_steps * stimulus_s, seconds, n_steps)


def count_god(size: PhantomSize) -> Counts:
    """Return work and space of the tables and of the image features."""
    n_rows = count_images(size) + size.n_train_concepts + size.n_test_concepts
    tables = count_tables(size, GOD_STIMULUS_S)
    features = 8.0 * n_rows * (N_EARLY + N_MID + 32)
    return replace(tables, n_bytes=tables.n_bytes + features, n_steps=1 + tables.n_steps)


def estimate_bytes(n_samples: int, n_voxels: int, n_rois: int) -> int:
    """Return the size of one ``Subject*.h5``: the matrix and the metadata, both float64."""
    n_labels = len(DESIGN_COLUMNS)
    # 4 rows of metadata: whether it is a voxel, and its three coordinates.
    return 8 * (n_voxels + n_labels) * (n_samples + 4 + n_rois + n_labels)


def list_god_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with ImageNet-like names."""
    table = list_pictures(size, seed, "")
    synsets, names = name_imagenet(table)
    folders = np.where(table["split"] == "train", "images/training/", "images/test/")
    return table.assign(
        stimulus_id=names,
        synset=synsets,
        file_name=[f"{name}.jpg" for name in names],
        path=[f"{folder}{name}.jpg" for folder, name in zip(folders, names, strict=True)],
    )


@lru_cache(maxsize=4)
def make_trials(job: PhantomJob, name: str, subject: int) -> pd.DataFrame:
    """Return every sample of a subject: `task`, `row` of the image, `Run`, `Block`.

    Each test run shows, and each imagery run imagines, every image once.
    """
    size, tests = job.size, job.test_rows
    train = np.flatnonzero(job.table["split"] == "train")
    generator = make_generator(job.config.seed, name, subject)
    # Training runs; then whole test runs, then whole imagery runs, in the order of the published samples.
    runs: list[tuple[Task, np.ndarray]] = [
        ("training", rows)
        for _ in range(size.train_repetitions)
        for rows in np.array_split(generator.permutation(train), size.runs)
    ]
    runs += [("test", generator.permutation(tests)) for _ in range(size.test_repetitions)]
    imagined = tests[: size.n_imagery or 0]
    runs += [("imagery", generator.permutation(imagined)) for _ in range(size.imagery_repetitions or 0)]
    parts = [
        pd.DataFrame({"task": task, "row": rows, "Run": number, "Block": np.arange(1, len(rows) + 1)})
        for number, (task, rows) in enumerate(runs, start=1)
    ]
    return pd.concat(parts, ignore_index=True)


def plan_god(job: PhantomJob) -> list[Unit]:
    """Return the shared tables, and one unit per subject."""

    def write_shared(progress: Progress) -> list[Path]:
        table, drive = job.table, job.drive
        paths = []
        for split, name in STIMULUS_LISTS.items():
            part = table[table["split"] == split]
            # Numbers in the order of the synsets, from 1.
            category = part["synset"].rank(method="dense").astype(int)
            codes = [f"{encode_stimulus_id(name)!r}" for name in part["stimulus_id"]]
            lines = zip(part["stimulus_id"], codes, category, range(1, len(part) + 1), strict=True)
            text = "".join("\t".join(map(str, line)) + "\n" for line in lines)
            paths.append(write_text(job.root / name, text))
        groups = {str(synset): rows for synset, rows in table.groupby("synset", sort=True).indices.items()}
        # Averages of a category follow the images, as in the published file: (n_images + n_categories, n_units)
        features = {
            layer: np.concatenate([block, [block[rows].mean(axis=0) for rows in groups.values()]])
            for layer, block in (("cnn1", drive.early), ("cnn4", drive.mid), ("cnn8", drive.semantic))
        }
        numbers = [float(int(synset[1:])) for synset in table["synset"]]
        kinds = np.where(table["split"] == "train", FEATURE_TYPES["training"], FEATURE_TYPES["test"])
        path = write_image_features(
            job.root / "ImageFeatures.h5",
            features,
            image_ids=np.array(
                [*map(encode_stimulus_id, table["stimulus_id"]), *[np.nan] * len(groups)], float
            ),
            category_ids=np.array([*numbers, *(float(int(synset[1:])) for synset in groups)]),
            feature_types=np.concatenate([kinds, np.full(len(groups), FEATURE_TYPES["category_average"])]),
        )
        return [*paths, path]

    def write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
        trials, path = make_trials(job, "god", person.index), job.root / f"Subject{person.index + 1}.h5"
        return _write_samples(job, person, trials, path, "dataSet", progress)

    return [
        Unit("image features and lists", 1, write_shared),
        *list_units(job, "subject {person.name}, samples", _count_samples(job.size), write_person),
    ]


def _write_samples(
    job: PhantomJob, person: Person, trials: pd.DataFrame, path: Path, naming: Naming, progress: Progress
) -> list[Path]:
    """Write some samples of a subject, from `make_trials`, in the voxels of every visual region."""
    scanner = job.scanner
    kept = np.flatnonzero(scanner.regions != "")
    # Areas overlap: V1 is part of the lower visual cortex.
    areas = {name: np.isin(scanner.regions[kept], regions) for name, regions in _AREAS.items()}
    # As floats: the zeros at the end of an image number are lost, as in the published files.
    codes = np.array([encode_stimulus_id(name) for name in job.table["stimulus_id"]])
    labels = trials[["Run", "Block"]].reset_index(drop=True)
    labels.insert(0, "DataType", trials["task"].map(DATA_TYPES).to_numpy())
    labels.insert(1, "stimulus_id", codes[trials["row"]])

    def iterate() -> Iterator[np.ndarray]:
        for imagined in (False, True):  # imagery comes last
            part = trials[(trials["task"] == "imagery") == imagined]
            rows, seeds = part["row"].to_numpy(), part.index.to_numpy()
            for block in iterate_betas(person, scanner, rows, seeds, imagery=imagined):
                yield block[:, kept]

    rois = {**areas, "ROI_VC": np.ones(len(kept), bool)}
    samples = progress.watch(iterate(), len)
    return [write_bdata(path, samples, labels, rois, voxel_xyz=scanner.positions[kept], naming=naming)]


def write_bdata(
    path: Path,
    samples: Iterable[np.ndarray],
    labels: pd.DataFrame,
    rois: Mapping[str, np.ndarray],
    *,
    voxel_xyz: np.ndarray,
    naming: Naming = "dataSet",
    dtype: str = "<f8",
) -> Path:
    """Write one subject's ``Subject*.h5``.

    Parameters
    ----------
    samples : iterable of arrays of shape (n, n_voxels)
        Voxel values of n samples, in the order of `labels`.
    labels : DataFrame, one row per sample
        Numbers; `DataType` (1 training, 2 test, 3 imagery), `stimulus_id`, `Run` and `Block` are required, and
        further columns are kept.
    rois : mapping of name to bool array of shape (n_voxels,)
        For example ``{"ROI_V1": ...}``.
    voxel_xyz : array of shape (n_voxels, 3)
        Coordinates (mm).
    naming
        ``dataSet`` with ``metaData``, as the published files, or ``dataset`` with ``metadata``, as later ones.
    """
    check_columns(labels.columns, DESIGN_COLUMNS, what="the label table of a BData file")
    n_voxels = len(voxel_xyz)
    n_columns = n_voxels + labels.shape[1]
    entries: list[tuple[str, str, np.ndarray]] = [("VoxelData", "1 = voxel data", np.ones(n_voxels))]
    for axis, name in enumerate(("voxel_x", "voxel_y", "voxel_z")):
        entries.append((name, f"Voxel {name[-1]} coordinate", np.asarray(voxel_xyz)[:, axis]))
    for name, flag in rois.items():
        check_block(flag, (n_voxels,), what=f"the flags of {name}")
        entries.append((name, f"1 = {name}", np.asarray(flag, dtype=float)))
    metadata = [(key, text, _pad(value, 0, n_columns)) for key, text, value in entries]
    for index, name in enumerate(labels.columns):
        metadata.append((str(name), f"1 = {name}", _pad(np.ones(1), n_voxels + index, n_columns)))
    return _write(path, samples, labels.to_numpy(float), metadata, n_voxels, naming, dtype)


def write_image_features(
    path: Path,
    features: Mapping[str, np.ndarray],
    *,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    feature_types: np.ndarray,
) -> Path:
    """Write ``ImageFeatures.h5``.

    Parameters
    ----------
    features : mapping of name to array of shape (n_rows, n_units)
        For example ``{"cnn1": ..., "gist": ...}``.
    image_ids, category_ids : arrays of shape (n_rows,)
        As `encode_stimulus_id` gives them; NaN for the image of a category average.
    feature_types : int array of shape (n_rows,)
        1 training image, 2 test image, 3 average of a category.
    """
    blocks = [np.asarray(block, dtype=float) for block in features.values()]
    widths = [block.shape[1] for block in blocks]
    n_units, starts = sum(widths), np.cumsum([0, *widths])
    labels = np.column_stack([image_ids, category_ids, feature_types]).astype(float)
    n_columns = n_units + labels.shape[1]
    metadata = [
        (name, f"1 = {name}", _pad(np.ones(width), start, n_columns))
        for name, width, start in zip(features, widths, starts, strict=False)
    ]
    for index, name in enumerate(("ImageID", "CatID", "FeatureType")):
        metadata.append((name, f"1 = {name}", _pad(np.ones(1), n_units + index, n_columns)))
    return _write(path, [np.concatenate(blocks, axis=1)], labels, metadata, n_units, "dataSet", "<f8")


def _pad(values: np.ndarray, start: int, n_columns: int) -> np.ndarray:
    row = np.full(n_columns, np.nan)  # metadata are NaN where they do not apply
    row[start : start + len(values)] = values
    return row


def _write(
    path: Path,
    samples: Iterable[np.ndarray],
    labels: np.ndarray,
    metadata: Sequence[tuple[str, str, np.ndarray]],
    n_left: int,
    naming: Naming,
    dtype: str,
) -> Path:
    import h5py

    check_option("naming", naming, GROUPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = h5py.string_dtype("utf-8")
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        # Labels are columns of the same matrix, to the right of the voxels.
        matrix = file.create_dataset(naming, (len(labels), n_left + labels.shape[1]), dtype)
        matrix[:, n_left:] = labels
        start = 0
        for block in samples:
            array = check_block(block, (None, n_left), what=f"the samples of {path.name}")
            if start + len(array) <= len(labels):
                matrix[start : start + len(array), :n_left] = array
            start += len(array)
        check_count(start, len(labels), what=path.name, unit="samples")
        group = file.create_group(GROUPS[naming])
        group.create_dataset("key", data=[key for key, _, _ in metadata], dtype=text)
        group.create_dataset("description", data=[entry for _, entry, _ in metadata], dtype=text)
        group.create_dataset("value", data=np.stack([value for _, _, value in metadata]))
    return path


GOD = Format(
    name="god",
    description="Generic Object Decoding: BData tables of visual cortex, seen and imagined, image features",
    modality="fmri",
    uses=USES,
    duration_s=GOD_STIMULUS_S,
    # Each training image is shown once, and the files do not distinguish sessions.
    limits={"n_sessions": (1, 1), "train_repetitions": (1, 1)},
    check=check_runs,
    count=count_god,
    list_images=list_god_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_god,
)


# --- Deeprecon ----------------------------------------------------------------------------------------------------

DEEPRECON_STIMULUS_S = 8.0  # [2]_
VARIANT = "original_VC"
# The spelling of the published files; shapes and letters need other pictures.
EXPERIMENTS: dict[Task, str] = {
    "training": "perceptionNaturalImageTraining",
    "test": "perceptionNaturalImageTest",
    "imagery": "imagery",
}


def plan_deeprecon(job: PhantomJob) -> list[Unit]:
    """Return one unit per subject and experiment."""
    units = []
    for person in job.subjects:
        trials = make_trials(job, "deeprecon", person.index)
        for task, experiment in EXPERIMENTS.items():
            own = trials[trials["task"] == task]
            if own.empty:
                continue
            # Runs are counted within a file.
            own = own.assign(Run=own["Run"] - own["Run"].min() + 1)
            labels = {"subject": person.index + 1, "experiment": experiment, "variant": VARIANT}
            path = job.root / deeprecon.FILE_NAME.format(**labels)
            write = partial(_write_samples, job, person, own, path, "dataset")
            units.append(Unit(f"subject {person.name}, {experiment}", len(own), write))
    return units


def list_deeprecon_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with ImageNet-like names, as ``.JPEG`` below ``images``."""
    table = list_god_images(size, seed)
    return table.assign(
        **{c: [str(Path(p).with_suffix(".JPEG")) for p in table[c]] for c in ("path", "file_name")}
    )


DEEPRECON = replace(
    GOD,
    name="deeprecon",
    description="Deep Image Reconstruction: BData tables of natural images and imagery, one for each experiment",
    duration_s=DEEPRECON_STIMULUS_S,
    limits={"n_sessions": (1, 1)},
    count=partial(count_tables, stimulus_s=DEEPRECON_STIMULUS_S, n_files=len(EXPERIMENTS)),
    list_images=list_deeprecon_images,
    plan=plan_deeprecon,
)
