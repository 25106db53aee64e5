"""MOSAIC from images to HDF5 files of grayordinates, lists of the split, and a table of people in several sets.

Owns three sets (NSD, BOLD5000, NOD) of which each shows its own training pictures, the first person in two of them, a
training picture of each set that no list names, and people of NOD without repeats. Grayordinates of the cortex take
the values of the voxels of a simulated scanner, left hemisphere first, in runs of equal numbers, so that files
compress. The reader defines names, shapes and folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.mosaic import (
    LAYOUT,
    LISTS,
    N_CORTEX,
    N_GRAYORDINATES,
    N_VERTICES,
    SETS,
    find_beta_type,
    name_response,
)
from braindecode_vis.parts.phantom.bold_signal import compute_voxel_snr, iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    TRUTH,
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
)
from braindecode_vis.parts.phantom.formats.file_writers import write_text, write_tsv
from braindecode_vis.parts.phantom.scanner import Scanner, count_voxels, make_parcels, make_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize

_OF = ("NSD", "BOLD5000", "NOD")
# Of vertices where the scanner of every set, or of one set, has no signal.
_GAPS = {"": range(100, 120), "NSD": range(40000, 40005), "BOLD5000": range(9000, 9002), "NOD": range(0)}
# Of a voxel in a compressed response of float64, and of float32 in the merged file; measured.
_BYTES = {False: 12.5, True: 5.5}


@dataclass(frozen=True)
class Member:
    """A person in one of the sets."""

    index: int
    of: str
    name: str


def list_members(n_people: int) -> list[Member]:
    """Return everyone in each of their sets; the first person is in two."""
    members = []
    for index in range(n_people):
        of, number = _OF[index % len(_OF)], index // len(_OF) + 1
        # Without repeats from the tenth person of NOD on.
        members.append(Member(index, of, f"sub-{number + (9 if of == 'NOD' else 0):02d}_{of}"))
    return [*members, Member(0, "NOD", "sub-01_NOD")]


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images; the last tenth of the training images are the artificial ones, which NSD alone shows."""
    table = list_pictures(size, seed, "stimuli/raw")
    rows = np.flatnonzero(table["split"] == "train")[-count_artificial(size) :]
    table.loc[table.index[rows], "split"] = "excluded"
    return table


def count_artificial(size: PhantomSize) -> int:
    """Return the number of artificial images."""
    return max(1, size.n_train_images // 10)


def count_shown(size: PhantomSize, member: Member) -> dict[str, tuple[int, int]]:
    """Return the number of pictures of each kind that a member sees, and how often each."""
    once = find_beta_type(member.name) == "B"
    n_train = len(range(_OF.index(member.of), size.n_train_images - count_artificial(size), len(_OF)))
    tests = 1 if once else size.test_repetitions
    return {
        "naturalistic": (size.n_test_concepts, tests),
        "train": (n_train, 1 if once else size.train_repetitions),
        "artificial": (count_artificial(size) if member.of == "NSD" else 0, tests),
    }


def make_trials(job: PhantomJob, member: Member) -> pd.DataFrame:
    """Return the responses of a member in the order of the authors: `row` of the picture, `repetition`, `kind`."""
    rows = {kind: np.flatnonzero(job.table["split"] == split) for kind, split in _SPLITS.items()}
    rows["train"] = rows["train"][_OF.index(member.of) :: len(_OF)]
    shown = count_shown(job.size, member)
    pieces = [
        pd.DataFrame(
            {"row": np.repeat(rows[kind], times), "repetition": np.tile(range(times), n), "kind": kind}
        )
        for kind, (n, times) in shown.items()
        if n
    ]
    table = pd.concat(pieces, ignore_index=True)
    pictures = job.table["path"].str.rpartition("/")[2].to_numpy()[table["row"]]
    names = [
        name_response(member.name, picture, "train" if kind == "train" else "test", repetition)
        for picture, kind, repetition in zip(pictures, table["kind"], table["repetition"], strict=True)
    ]
    return table.assign(picture=pictures, name=names)


_SPLITS = {"naturalistic": "test", "train": "train", "artificial": "excluded"}


def _count_trials(size: PhantomSize, member: Member) -> int:
    return sum(n * times for n, times in count_shown(size, member).values())


def count(size: PhantomSize, merged: bool) -> Counts:
    """Return work and space of the responses, of names in lists and files, and of the atlas."""
    members = list_members(size.n_subjects)
    n_trials = sum(_count_trials(size, member) for member in members)
    n_voxels = count_voxels(size.voxel_mm)
    n_bytes = (
        n_trials * (_BYTES[merged] * n_voxels + 1500) + len(members) * 2 * _BYTES[False] * n_voxels + 620_000
    )
    return Counts(n_bytes, 0, 4.0 * n_trials, 2 + n_trials * (8e-3 + 8e-7 * n_voxels), n_trials, n_trials)


@lru_cache(maxsize=2)
def place_grayordinates(scanner: Scanner) -> np.ndarray:
    """Return the voxel of each grayordinate of the cortex: (N_CORTEX,)."""
    left = scanner.positions[:, 0] < 0
    sides = zip(N_VERTICES, (np.flatnonzero(left), np.flatnonzero(~left)), strict=True)
    return np.concatenate([voxels[np.arange(n) * len(voxels) // n] for n, voxels in sides])


def _find_gaps(member: Member) -> np.ndarray:
    return np.array([*_GAPS[""], *_GAPS[member.of]])


def _spread(values: np.ndarray, places: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Return values of voxels (..., n_voxels) at all grayordinates, 0 below the cortex."""
    whole = np.zeros((*values.shape[:-1], N_GRAYORDINATES))
    whole[..., :N_CORTEX] = values[..., places]
    whole[..., gaps] = np.nan
    return whole


def iterate_responses(job: PhantomJob, member: Member, progress: Progress) -> Iterator[np.ndarray]:
    """Yield responses in blocks (n, N_GRAYORDINATES), standardised with the training trials of the set.

    They are simulated twice, so that none must stay in memory.
    """
    trials, person, gaps = make_trials(job, member), job.subjects[member.index], _find_gaps(member)
    seeds = np.arange(len(trials)) + 10**6 * _OF.index(member.of)
    is_train = (trials["kind"] == "train").to_numpy()

    def simulate(which: np.ndarray) -> Iterator[np.ndarray]:
        return iterate_betas(person, job.scanner, trials["row"].to_numpy()[which], seeds[which])

    total, squares = np.zeros(job.scanner.n_voxels), np.zeros(job.scanner.n_voxels)
    for block in simulate(is_train):
        total += block.sum(axis=0, dtype=float)
        squares += (block.astype(float) ** 2).sum(axis=0)
    mean = total / is_train.sum()
    spread = np.sqrt(squares / is_train.sum() - mean**2)
    for block in progress.watch(simulate(np.ones(len(trials), bool)), len):
        yield _spread((block - mean) / spread, place_grayordinates(job.scanner), gaps)


def _describe(member: Member) -> dict[str, Any]:
    """Return the attributes of a person; some values of the published files are texts of their owners."""
    return {
        "visual_angle": 8.0, "sex": "n/a", "age": "n/a", "publication_url": "n/a", "github_url": "n/a",
        "owner_name": "simulated", "owner_email": "n/a", "dataset_name": SETS[member.of],
        "subjectID": member.name.partition("_")[0], "preprocessing_pipeline": "fMRIPrepv23.2.0",
        "beta_pipeline": "GLMsinglev1.2",
    }  # fmt: skip


def _write_ceilings(group: Any, job: PhantomJob, member: Member, person: Person) -> None:
    if find_beta_type(member.name) == "B":
        return
    power = compute_voxel_snr(person, job.scanner) ** 2
    for n, times in (("1", 1), ("avg", job.size.test_repetitions)):
        percent = _spread(
            100 * power / (power + 1 / times), place_grayordinates(job.scanner), _find_gaps(member)
        )
        data = group.create_dataset(
            f"noiseceilings/{member.name}_phase-test_n-{n}_noiseceiling", data=percent, compression=1
        )
        data.attrs.update({"n": n, "phase": "test", "nan_indices": _find_gaps(member)})


def _write_member(job: PhantomJob, member: Member, progress: Progress) -> list[Path]:
    import h5py

    trials, gaps = make_trials(job, member), _find_gaps(member)
    path = LAYOUT.place(job.root, "person", folder=SETS[member.of], person=member.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update(_describe(member))
        _write_ceilings(file, job, member, job.subjects[member.index])
        betas = file.create_group("betas", track_order=True)
        rows = trials.itertuples()
        for block in iterate_responses(job, member, progress):
            for response in block:
                trial: Any = next(rows)
                data = betas.create_dataset(trial.name, data=response, compression=1)
                phase = "train" if trial.kind == "train" else "test"
                data.attrs.update({"nan_indices": gaps, "phase": phase, "repetition": trial.repetition})
                data.attrs["presented_stimulus_filename"] = trial.picture
        file["nan_indices_all"] = gaps[::-1]  # in no order, as published
    return [path]


def _write_merged(job: PhantomJob, progress: Progress) -> list[Path]:
    import h5py

    path = LAYOUT.place(job.root, "matrix")
    members = list_members(job.size.n_subjects)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        for member in members:
            trials, gaps = make_trials(job, member), _find_gaps(member)
            group = file.create_group(member.name, track_order=True)
            group.attrs.update({"source_filename": f"{member.name}.hdf5", **_describe(member)})
            shape = (len(trials), N_GRAYORDINATES)
            chunks = (min(100, len(trials)), N_GRAYORDINATES)
            betas = group.create_dataset("betas", shape, "float32", chunks=chunks, compression=1)
            first = 0
            for block in iterate_responses(job, member, progress):
                betas[first : first + len(block)] = block
                first += len(block)
            group["presented_stimulus_filename"] = trials["picture"].to_numpy(object)
            names = group.create_group("nan_indices", track_order=True)
            for name in trials["name"]:
                names[name] = gaps
            _write_ceilings(group, job, member, job.subjects[member.index])
        file["nan_indices_all"] = np.unique(np.concatenate([_find_gaps(member) for member in members]))
    return [path]


def _write_tables(job: PhantomJob, progress: Progress) -> list[Path]:
    """Write the lists of the split, the table of people in several sets, and the atlas of the grayordinates."""
    listed: dict[str, list[dict[str, list[str]]]] = {kind: [] for kind in LISTS}
    for member in list_members(job.size.n_subjects):
        trials = make_trials(job, member)
        # The first training picture of each set stands for those that resemble a test picture too much.
        near = trials.loc[trials["kind"] == "train", "picture"].iloc[0]
        for (kind, picture), names in trials[trials["picture"] != near].groupby(
            ["kind", "picture"], sort=False
        )["name"]:
            listed[str(kind)].append({f"{member.name}_stimulus-{picture}": [f"{name}.npz" for name in names]})
    paths = [
        write_text(LAYOUT.place(job.root, "list", list=name), json.dumps(listed[kind]))
        for kind, name in LISTS.items()
    ]
    shared = pd.DataFrame({"NaturalScenesDataset": ["sub-01"], "NaturalObjectDataset": ["sub-01"]})
    return [*paths, write_tsv(LAYOUT.place(job.root, "shared"), shared), write_atlas(job)]


def write_atlas(job: PhantomJob) -> Path:
    """Write the parcels of the simulated cortex as CIFTI labels; the medial wall is after the last vertex."""
    from nibabel import cifti2

    labels, names = make_parcels(job.scanner, job.size.n_parcels)
    table = {0: ("???", (0.0, 0.0, 0.0, 0.0))} | {
        n: (name, (0.5, 0.5, 0.5, 1.0)) for n, name in names.items()
    }
    sides = [
        cifti2.BrainModelAxis.from_surface(np.arange(n), 32492, f"CORTEX_{side}")
        for n, side in zip(N_VERTICES, ("LEFT", "RIGHT"), strict=True)
    ]
    values = labels[place_grayordinates(job.scanner)].astype(np.int32)[None]
    path = job.root / TRUTH / "parcels.dlabel.nii"
    image = cifti2.Cifti2Image(values, (cifti2.LabelAxis(["parcels"], [table]), sides[0] + sides[1]))
    image.to_filename(path)
    return path


def _plan(job: PhantomJob, merged: bool) -> list[Unit]:
    members = list_members(job.size.n_subjects)
    if merged:
        total = sum(_count_trials(job.size, member) for member in members)
        units = [Unit("file of all people", total, partial(_write_merged, job))]
    else:
        units = [
            Unit(member.name, _count_trials(job.size, member), partial(_write_member, job, member))
            for member in members
        ]
    return [*units, Unit("lists of the split, shared people, atlas", 0, partial(_write_tables, job))]


def _make_format(name: str, description: str, merged: bool) -> Format:
    return Format(
        name=name,
        description=f"MOSAIC: responses of 91282 grayordinates, {description}, lists of the split",
        modality="fmri",
        uses=("voxel_mm",),
        duration_s=3.0,
        limits={"n_subjects": (1, 12), "n_sessions": (1, 1), "voxel_mm": (2, 12)},
        count=partial(count, merged=merged),
        list_images=list_images,
        make_recorder=lambda size: make_scanner(size.voxel_mm or 0, 1.0),
        plan=partial(_plan, merged=merged),
    )


FORMAT = _make_format("mosaic", "an HDF5 file for each person", False)
MERGED = _make_format("mosaic-merged", "one HDF5 file of all people", True)
