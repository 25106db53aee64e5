"""Copies of NSD that other groups shared: web datasets of MindEye1 and MindEye2, arrays of Brain-Diffuser.

Owns the tars (plain ones, whose members share the first part of their name), the HDF5 files
``betas_all_subj01_fp32_renorm.hdf5`` and ``coco_images_224_float16.hdf5``, and the ``.npy`` arrays of mean responses
with the design that gives the image of each row. Design and simulated responses are those of `nsd`; voxels are those of
``nsdgeneral``, standardised within a session where the authors did so, shared images included.

References
----------
.. [1] Scotti, P. S. et al. (2023). Reconstructing the mind's eye. arXiv:2305.18274
.. [2] Scotti, P. S. et al. (2024). MindEye2. arXiv:2403.11207
.. [3] Ozcelik, F., VanRullen, R. (2023). Natural scene reconstruction from fMRI signals using generative latent
   diffusion. arXiv:2303.05334
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.nsd import repack_files
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT as DESIGN
from braindecode_vis.datasets.nsd.repack_files import LAYOUT
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.nsd_design import get_trial_images
from braindecode_vis.parts.phantom.scanner import count_voxels
from braindecode_vis.parts.phantom.sizes import PhantomSize, estimate_image_bytes

Repack = Literal["mindeye1", "mindeye2", "brain-diffuser"]
USES = ("n_runs", "voxel_mm")
_PER_TAR = 500
_GENERAL_SHARE = 0.22  # of cortical voxels that nsdgeneral has, for the estimate alone


def count(kind: Repack, size: PhantomSize) -> Counts:
    """Return work and space of a copy."""
    n_images, n_trials = nsd_format.count_images(size), size.n_subjects * size.n_trials
    n_seen = size.n_subjects * (size.n_train_images + size.n_test_concepts)
    n_voxels = _GENERAL_SHARE * count_voxels(size.voxel_mm)
    jpeg = estimate_image_bytes(size.image_size)
    n_bytes = {
        # Tars pad every member to whole blocks of 512 bytes, after a header of 512.
        "mindeye1": n_seen * (12 * n_voxels + jpeg + 5600),
        "mindeye2": n_trials * (4 * n_voxels + 1600) + 3 * 2 * 224.0**2 * n_images,
        "brain-diffuser": n_seen * (8 * n_voxels + 3.0 * size.image_size**2) + 3 * n_trials,
    }[kind]
    seconds = 1 + n_trials * (2e-4 + 3.5e-7 * count_voxels(size.voxel_mm)) + 3e-3 * n_images
    extra = n_images + 1 if kind == "mindeye2" else 1 if kind == "brain-diffuser" else 0
    return Counts(n_bytes, 0, n_trials * 4.0, seconds, n_trials + extra)


@lru_cache(maxsize=4)
def make_trials(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return the trials of a subject (from 0): `nsd_id`, `row` of the image, `session` (from 1), `shared`."""
    design = nsd_format.make_design(job.size, job.config.seed)
    ids = np.concatenate(
        [get_trial_images(design, subject + 1, session) - 1 for session in range(1, job.size.n_sessions + 1)]
    )
    rows = np.argsort(job.table["nsd_id"].to_numpy())[ids]
    session = np.repeat(np.arange(1, job.size.n_sessions + 1), len(ids) // job.size.n_sessions)
    return pd.DataFrame(
        {"nsd_id": ids, "row": rows, "session": session, "shared": np.isin(ids + 1, design["sharedix"])}
    )


def simulate_general(
    job: PhantomJob, person: Person, progress: Progress, *, standardised: bool
) -> np.ndarray:
    """Return the betas of ``nsdgeneral``, float32 (n_trials, n_voxels); as in `nsd`, or z-scored by session."""
    trials = make_trials(job, person.index)
    inside = job.scanner.make_roi_volume("nsdgeneral")[job.scanner.mask] > 0
    blocks = iterate_betas(person, job.scanner, trials["row"].to_numpy(), np.arange(len(trials)))
    betas = np.concatenate([block[:, inside] for block in progress.watch(blocks, len)])
    if standardised:
        for _, own in trials.groupby("session"):
            part = betas[own.index]
            betas[own.index] = (part - part.mean(axis=0)) / part.std(axis=0)
    return betas


# --- MindEye1 ----------------------------------------------------------------------------------------------------


def plan_mindeye1(job: PhantomJob) -> list[Unit]:
    """Return one unit per subject."""
    return list_units(job, "subject {person.name}, tars", job.size.n_trials, _write_mindeye1)


def _write_mindeye1(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    betas, trials = simulate_general(job, person, progress, standardised=True), make_trials(job, person.index)
    paths = []
    for split, shared in (("train", False), ("test", True)):
        groups = list(trials[trials["shared"] == shared].groupby("nsd_id", sort=True))
        for number in range(0, len(groups), _PER_TAR):
            samples = {
                f"{split}_{place:05d}": make_mindeye1_sample(
                    read_image_file(job.root / job.table["path"].iloc[own["row"].iloc[0]]),
                    int(own["nsd_id"].iloc[0]),
                    betas[own.index],
                    own.index.to_numpy(),
                )
                for place, (_, own) in enumerate(groups[number : number + _PER_TAR], start=number)
            }
            name = f"{split}_subj{person.index + 1:02d}_{number // _PER_TAR}.tar"
            paths.append(write_tar(job.root / repack_files.MINDEYE1_FOLDER / split / name, samples))
    return paths


def make_mindeye1_sample(
    image: np.ndarray, nsd_id: int, responses: np.ndarray, trials: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the members of one image; fewer than three responses are padded with copies of the last.

    Parameters
    ----------
    image : uint8 array of shape (height, width, 3)
    nsd_id
        From 0.
    responses : array of shape (n_responses, n_voxels)
    trials : integer array of shape (n_responses,)
        Number of each trial; a repeated response has the same number.
    """
    pick = np.minimum(np.arange(3), len(responses) - 1)
    return {
        "jpg": image,
        repack_files.RESPONSES: np.asarray(responses, np.float32)[pick],
        repack_files.IMAGE: np.array([nsd_id]),
        repack_files.COUNT: np.array([len(responses)]),
        repack_files.TRIALS: np.asarray(trials)[pick],
    }


def write_tar(path: Path, samples: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Write a web dataset, from the members (ending and array) of each sample by its name; ``jpg`` is an image."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, members in samples.items():
            for end, value in members.items():
                buffer = io.BytesIO()
                if end == "jpg":
                    Image.fromarray(value).save(buffer, "JPEG", quality=95, subsampling=0)
                else:
                    np.save(buffer, value)
                info = tarfile.TarInfo(f"{name}.{end}")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return path


# --- MindEye2 ----------------------------------------------------------------------------------------------------


def plan_mindeye2(job: PhantomJob) -> list[Unit]:
    """Return the pictures, and one unit per subject."""

    def write_pictures(progress: Progress) -> list[Path]:
        return [write_coco_images(job, progress)]

    return [
        Unit("the pictures", len(job.table) + 1, write_pictures),
        *list_units(job, "subject {person.name}, betas and tars", job.size.n_trials, _write_mindeye2),
    ]


def write_coco_images(job: PhantomJob, progress: Progress) -> Path:
    """Write ``coco_images_224_float16.hdf5``: pictures in the order of `nsdId`, (3, 224, 224) in 0 to 1."""
    import h5py
    from PIL import Image

    path = LAYOUT.place(job.root, "images")
    ordered = job.table.sort_values("nsd_id")["path"]
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        images = file.create_dataset(
            "images", (len(ordered), 3, 224, 224), np.float16, chunks=(1, 3, 224, 224)
        )
        for number, name in enumerate(ordered):
            picture = Image.fromarray(read_image_file(job.root / name)).resize((224, 224))
            images[number] = (np.asarray(picture, np.float32) / 255).transpose(2, 0, 1)
            progress.add(1)
    return path


def _write_mindeye2(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    who = f"subj{person.index + 1:02d}"
    betas, trials = simulate_general(job, person, progress, standardised=True), make_trials(job, person.index)
    paths = [LAYOUT.write(job.root, "betas", {"betas": betas}, subject=person.index + 1)]
    parts = {"train": trials[~trials["shared"]], "new_test": trials[trials["shared"]]}
    for name, part in {**parts, "test": parts["new_test"]}.items():
        pairs = list(zip(part["nsd_id"].tolist(), part.index.tolist(), strict=True))
        samples = {f"sample{n:09d}": make_behaviour(*pair) for n, pair in enumerate(pairs)}
        paths.append(write_tar(job.root / repack_files.MINDEYE2_FOLDER / who / name / "0.tar", samples))
    return paths


def make_behaviour(nsd_id: int, trial: int) -> dict[str, np.ndarray]:
    """Return the members of a trial: of 17 columns the first is the picture and the sixth the trial, both from 0."""
    row = np.zeros((1, 17), np.float32)
    row[0, repack_files.BEHAVIOUR_COLUMNS] = nsd_id, trial
    return {repack_files.BEHAVIOUR: row, "past_behav.npy": np.full((15, 17), -1.0, np.float32)}


# --- Brain-Diffuser ----------------------------------------------------------------------------------------------


def plan_brain_diffuser(job: PhantomJob) -> list[Unit]:
    """Return the design that gives the image of each row, and one unit per subject."""

    def write_design(progress: Progress) -> list[Path]:
        return [DESIGN.write(job.root, "design", nsd_format.make_design(job.size, job.config.seed))]

    return [
        Unit("the experimental design", 1, write_design),
        *list_units(job, "subject {person.name}, arrays", job.size.n_trials, _write_brain_diffuser),
    ]


def _write_brain_diffuser(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    betas, trials = (
        simulate_general(job, person, progress, standardised=False),
        make_trials(job, person.index),
    )
    paths = []
    for split, shared in (("train", False), ("test", True)):
        # In the order in which images first appeared; means over their repetitions.
        groups = [own for _, own in trials[trials["shared"] == shared].groupby("nsd_id", sort=False)]
        labels = {"split": split, "subject": person.index + 1}
        means = np.stack([betas[own.index].mean(axis=0) for own in groups])
        paths.append(LAYOUT.write(job.root, "means", {"means": means}, **labels))
        rows = [own["row"].iloc[0] for own in groups]
        pixels = np.stack([read_image_file(job.root / job.table["path"].iloc[row]) for row in rows])
        paths.append(LAYOUT.write(job.root, "pixels", {"pixels": pixels}, **labels))
    return paths


def _make_format(
    name: str, kind: Repack, description: str, plan: Callable[[PhantomJob], list[Unit]]
) -> Format:
    return replace(
        nsd_format.FORMAT,
        name=name,
        description=description,
        uses=USES,
        limits={"test_repetitions": (1, 3)},
        check=nsd_format.check_design,
        count=partial(count, kind),
        plan=plan,
    )


MINDEYE1 = _make_format(
    "nsd-mindeye1",
    "mindeye1",
    "NSD as MindEye1 shared it: tars of images and z-scored responses",
    plan_mindeye1,
)
MINDEYE2 = _make_format(
    "nsd-mindeye2",
    "mindeye2",
    "NSD as MindEye2 shared it: HDF5 of z-scored betas, tars of trials",
    plan_mindeye2,
)
BRAIN_DIFFUSER = _make_format(
    "nsd-brain-diffuser",
    "brain-diffuser",
    "NSD as Brain-Diffuser prepared it: mean responses as .npy, with NSD's design",
    plan_brain_diffuser,
)
