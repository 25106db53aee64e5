"""LAION-fMRI from images to the files of its bucket: betas with gaps, regions, splits, pictures, embeddings, captions.

Owns the names of the pictures, which tell source and owner: most pictures are of one person, test pictures and every
third training picture are shown to everybody, and as many again are out of distribution (drawn in the same way, so that
no score differs for them). Two voxels at the edge of the mask are NaN in the last session. The reader has the paths.

The embeddings called CLIP are the features that drive the simulated higher regions, so no network is needed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import normalise_rows
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import make_captions
from braindecode_vis.datasets.laion_fmri import LAYOUT, OWNERS, find_source
from braindecode_vis.parts.phantom.bold_signal import compute_voxel_snr, iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
    list_units,
)
from braindecode_vis.parts.phantom.formats.file_writers import (
    write_csv,
    write_text,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.parts.phantom.scanner import (
    ROIS,
    Scanner,
    count_voxels,
    estimate_volume_bytes,
    iterate_volumes,
    label_visual_quadrants,
    make_scanner,
)
from braindecode_vis.parts.phantom.sizes import PhantomSize, estimate_image_bytes

T_R = 1.9
PEOPLE = ("01", "03", "05", "06", "07")
SUFFIXES = {subject: suffix for suffix, subject in OWNERS.items()}
OOD_KINDS = (
    "shape", "relations", "unusual", "cropped", "selfmade", "gaudy", "illusion-classic", "gabor", "illusion-natural",
)  # fmt: skip
SHOWN = {"4rep": 4, "12rep": 12, "Allrep": 5}
"""Repetitions of the pictures behind each published ceiling."""
_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "selectivity": {
        "laion-general": ROIS["nsdgeneral"][0],
        "laion-ventral": ("LO", "FFA", "PPA", "VWFA", "IT"),
    },
    "face": {"FFA-1": ("FFA",)},
    "place": {"PPA": ("PPA",), "OPA": ("OPA",)},
}


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with `owner` (empty if all people see it); those out of distribution are ``excluded``."""
    n_own = size.n_train_exemplars
    table = list_pictures(size.replace(n_train_exemplars=n_own * size.n_subjects), seed)
    number = pd.factorize(table["concept_index"])[0]
    owner, own = np.divmod(table["exemplar"].to_numpy(), n_own)
    is_train = (table["split"] == "train").to_numpy()
    # The first picture of two thirds of the training concepts is everybody's: that of the first person.
    is_shared = ~is_train | ((own == 0) & (number % 3 > 0))
    is_ood = is_train & is_shared & (number % 3 == 2)
    labels = []
    for n, k, who, shared, odd in zip(number, own, owner, is_shared, is_ood, strict=True):
        if odd:
            labels.append(f"shared_4rep_OOD_{OOD_KINDS[n // 3 % len(OOD_KINDS)]}_{n:03d}.png")
        elif shared:
            labels.append(
                f"shared_4rep_NSD_special1000_{n}.jpg" if n % 4 == 1 else f"shared_12rep_LAION_{n}_i0.jpg"
            )
        else:
            source = "THINGS" if n % 4 == 1 else "LAION_initial"
            labels.append(f"unique_{source}_cluster_{n}_i{k}_{SUFFIXES[PEOPLE[who]]}.jpg")
    table = table.assign(
        stimulus_id=labels, file_name=labels, split=np.where(is_ood, "excluded", table["split"]),
        owner=np.where(is_shared, "", np.array(PEOPLE)[owner % len(PEOPLE)]),
    )  # fmt: skip
    return table[~(is_train & is_shared) | (owner == 0)].reset_index(drop=True)


def count_images(size: PhantomSize) -> int:
    """Return the number of pictures: own ones of each person, and shared ones once."""
    n_shared = size.n_train_concepts - len(range(0, size.n_train_concepts, 3))
    return size.n_train_images * size.n_subjects - n_shared * (size.n_subjects - 1) + size.n_test_concepts


def count(size: PhantomSize) -> Counts:
    """Return work and space of betas, regions, pictures and splits."""
    n_images, n_trials = count_images(size), size.n_subjects * size.n_trials
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    n_bytes = n_trials * (volume + 75) + n_images * (estimate_image_bytes(size.image_size) + 12 * 35 + 300)
    seconds = 1 + n_trials * (2e-4 + 3.5e-7 * count_voxels(size.voxel_mm) + volume * 2.5e-8) + n_images * 2e-3
    return Counts(n_bytes, 0, 3.0 * n_trials, seconds, 1 + size.n_subjects + n_trials)


def make_splits(job: PhantomJob, pool: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return training and test pictures of each split of a pool, ``shared`` or ``sub-01``."""
    table = job.table[job.table["owner"].isin(["", pool.removeprefix("sub-")])]
    regular = table[table["split"] != "excluded"].sort_values("stimulus_id")
    names, ood = regular["stimulus_id"].to_numpy(), table.loc[table["split"] == "excluded", "stimulus_id"]
    fold = regular["concept_index"].to_numpy() % 5
    tested = {"tau": (regular["split"] == "test").to_numpy()}
    for n in range(5):
        tested[f"cluster_k5_{n}"] = fold == n
        order = make_generator(job.config.seed, "laion-fmri", pool, n).permutation(len(names))
        tested[f"random_{n}"] = order < len(names) // 5
    found = {name: (names[~test].tolist(), names[test].tolist()) for name, test in tested.items()}
    return {**found, "ood": (names.tolist(), sorted(ood))}


def _write_shared(job: PhantomJob, progress: Progress) -> list[Path]:
    """Write splits, pictures, embeddings and captions."""
    import h5py
    from PIL import Image

    paths, labels = [], job.table["stimulus_id"].to_numpy()
    for pool in ("shared", *(f"sub-{name}" for name in PEOPLE[: job.size.n_subjects])):
        for name, (train, test) in make_splits(job, pool).items():
            variant = {"variant_id": 0, "train_ids": train, "test_ids": test}
            content = {
                "name": name,
                "pool": pool,
                "n_train": len(train),
                "n_test": len(test),
                "variants": [variant],
            }
            paths.append(
                write_text(LAYOUT.place(job.root, "split", pool=pool, split=name), json.dumps(content))
            )
    shared = job.table["owner"] == ""
    listed = pd.DataFrame(
        {
            "image_name": labels, "dataset": find_source(job.table["stimulus_id"]),
            "participant": np.where(shared, "shared", "sub-" + job.table["owner"]),
            "unique_or_shared": np.where(shared, "shared", "unique"),
        }
    )  # fmt: skip
    paths.append(write_csv(LAYOUT.place(job.root, "index"), listed))
    captions = make_captions(job.table, job.config.seed).rename(columns={"id": "image_name"})
    captions.insert(1, "caption_idx", captions.groupby("image_name").cumcount() + 1)
    paths.append(write_csv(LAYOUT.place(job.root, "captions"), captions.assign(source="human")))
    paths.append(LAYOUT.place(job.root, "pictures"))
    with replace_atomically(paths[-1]) as temporary, h5py.File(temporary, "w") as file:
        images = file.create_dataset("images", (len(labels),), h5py.vlen_dtype(np.uint8))
        for row, (path, label) in enumerate(zip(job.table["path"], labels, strict=True)):
            encoded = io.BytesIO()
            image = Image.open(job.root / path)
            image.save(encoded, "JPEG" if label.endswith(".jpg") else "PNG", quality=95)
            images[row] = np.frombuffer(encoded.getvalue(), np.uint8)
    paths.append(LAYOUT.place(job.root, "embeddings", model="CLIP"))
    with replace_atomically(paths[-1]) as temporary, h5py.File(temporary, "w") as file:
        file["embedding"] = normalise_rows(job.drive.semantic).astype(np.float16)
        file.create_dataset("image_ids", data=labels.tolist(), dtype=h5py.string_dtype())
        file["valid"] = np.ones(len(labels), bool)
    return paths


def _find_mask(scanner: Scanner) -> np.ndarray:
    return scanner.fill_volume(scanner.regions != "")


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write mask, ceilings and regions."""
    scanner, place = job.scanner, {"subject": PEOPLE[person.index]}
    paths = [write_volume(LAYOUT.place(job.root, "mask", **place), _find_mask(scanner), scanner.affine)]
    ncsnr = compute_voxel_snr(person, scanner)
    for shown, n in SHOWN.items():
        ceiling = scanner.fill_volume((100 * ncsnr**2 / (ncsnr**2 + 1 / n)).astype(np.float32))
        path = LAYOUT.place(job.root, "ceiling", shown=shown, **place)
        paths.append(write_volume(path, ceiling, scanner.affine))
    quadrants, names = label_visual_quadrants(scanner)
    regions = {("retinotopy", name): quadrants == label for label, name in names.items()}
    for group, members in _GROUPS.items():
        regions |= {(group, name): np.isin(scanner.regions, areas) for name, areas in members.items()}
    for (group, name), inside in regions.items():
        path = LAYOUT.place(job.root, "region", set=group, roi=name, **place)
        paths.append(write_volume(path, scanner.fill_volume(inside), scanner.affine))
    return paths


def _list_trials(job: PhantomJob, person: Person) -> np.ndarray:
    """Return the picture of every trial, as a row of the table."""
    seen = np.flatnonzero(job.table["owner"].isin(["", PEOPLE[person.index]]))
    return make_generator(job.config.seed, "laion-fmri", person.index).permutation(
        np.repeat(seen, job.repetitions[seen])
    )


def _write_session(job: PhantomJob, person: Person, session: int, progress: Progress) -> list[Path]:
    scanner, n_sessions, trials = job.scanner, job.size.n_sessions, _list_trials(job, person)
    own = np.array_split(np.arange(len(trials)), n_sessions)[session - 1]
    place = {"subject": PEOPLE[person.index], "session": f"{session:02d}"}
    runs = np.concatenate(
        [np.full(len(run), n) for n, run in enumerate(np.array_split(own, job.size.runs), 1)]
    )
    table = pd.DataFrame(
        {
            "session": f"ses-{session:02d}", "run": runs, "beta_index": np.arange(len(own)),
            "label": job.table["stimulus_id"].to_numpy()[trials[own]],
        }
    )  # fmt: skip
    ends = [0, -1] if session == n_sessions else []
    gaps = np.flatnonzero(_find_mask(scanner))[ends]

    def iterate() -> Iterator[np.ndarray]:
        for volume in iterate_volumes(
            scanner, progress.watch(iterate_betas(person, scanner, trials[own], own), len)
        ):
            volume.ravel()[gaps] = np.nan
            yield volume

    betas = write_volumes(
        LAYOUT.place(job.root, "betas", **place), iterate(), shape=scanner.mask.shape, n_volumes=len(own),
        affine=scanner.affine, t_r=T_R, has_gaps=True,
    )  # fmt: skip
    return [write_tsv(LAYOUT.place(job.root, "trials", **place), table), betas]


def plan(job: PhantomJob) -> list[Unit]:
    """Return the shared files, the regions of each person, and one unit per session."""
    n_steps = -(-job.size.n_trials // job.size.n_sessions)
    name = "subject {person.name}, session {session:02d}"
    return [
        Unit("splits, pictures, embeddings and captions", 1, partial(_write_shared, job)),
        *list_units(job, "subject {person.name}, regions", 1, _write_person),
        *list_units(job, name, n_steps, _write_session, session=range(1, job.size.n_sessions + 1)),
    ]


FORMAT = Format(
    name="laion-fmri",
    description="LAION-fMRI: float32 betas per session with gaps, regions, splits, pictures, embeddings and captions",
    modality="fmri",
    uses=("n_runs", "voxel_mm"),
    duration_s=2.5,
    limits={"n_subjects": (1, len(PEOPLE)), "n_sessions": (1, 30)},
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan,
)
