"""The ground truth beside the data: simulated effects, noiseless responses, and scores of an ideal observer.

Owns the folder ``phantom_truth``. Rows of ``sub-*_evoked.npy`` and ``sub-*_betas.npy`` are named by the column
`truth_row` of ``stimuli.tsv``: all images if they are few, the test images otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import collect_versions, read_json, replace_atomically, write_json
from braindecode_vis.datasets.drawn.images import (
    describe_attributes,
    make_attributes,
    make_captions,
    make_compositions,
)
from braindecode_vis.parts.phantom.bold_signal import compute_betas, compute_voxel_snr
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.ceiling import (
    compute_betas_gram,
    compute_evoked_gram,
    compute_ideal_top1,
    compute_noise_ceiling,
)
from braindecode_vis.parts.phantom.drive import N_EARLY, N_MID
from braindecode_vis.parts.phantom.format_plan import TRUTH, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats.file_writers import write_csv, write_text, write_tsv, write_volume
from braindecode_vis.parts.phantom.meeg_signal import compute_evoked
from braindecode_vis.parts.phantom.phantom_config import PhantomConfig
from braindecode_vis.parts.phantom.scanner import count_voxels, describe_voxels, make_parcels
from braindecode_vis.parts.phantom.sizes import PhantomSize

SMALL_BYTES = 16 << 20
"""Noiseless responses to all images are stored up to this size per subject; above it, only those to the test images."""
SFREQ, TMIN, TMAX = 200.0, -0.1, 1.0  # of the noiseless responses that are kept
_N_TIMES = round((TMAX - TMIN) * SFREQ) + 1
_ROWS_PER_BLOCK = 32


@dataclass(frozen=True)
class PhantomTruth:
    """Ground truth of a phantom.

    Parameters
    ----------
    root, folder
        The data set, and its ``phantom_truth``.
    format, size, config
        The request.
    n_test, chance
        Size of the gallery of test images, and the accuracy of guessing.
    subjects
        For each subject: `subject`, `onset_s` (earliest latency), `stages` (simulated latencies and sizes),
        `ideal_top1` (accuracy of the ideal observer by number of averaged trials, an upper bound; empty without
        labels).
    networks
        Simulated size of the semantic drive of each network beyond the visual hierarchy.
    """

    root: Path
    folder: Path
    format: str
    size: PhantomSize
    config: PhantomConfig
    n_test: int
    chance: float
    subjects: tuple[dict[str, Any], ...]
    networks: dict[str, float]

    def read_people(self) -> pd.DataFrame:
        """Return the table of subjects and sites of a phantom without labels, one row per subject and site."""
        return pd.read_csv(self.folder / "people.tsv", sep="\t", dtype={"person": str, "subject": str})

    def read_stimuli(self) -> pd.DataFrame:
        """Return the table of images; `truth_row` is the row of the noiseless responses, or -1."""
        return pd.read_csv(self.folder / "stimuli.tsv", sep="\t")


def read_truth(root: Path) -> PhantomTruth:
    """Read the ground truth of a finished phantom.

    Raises
    ------
    DataError
        If the folder has no ground truth.
    """
    folder = root / TRUTH
    if not (folder / "phantom.json").is_file():
        raise DataError(f"{root} holds no finished phantom: {folder / 'phantom.json'} is missing.")
    content = read_json(folder / "phantom.json")
    return PhantomTruth(
        root=root,
        folder=folder,
        format=content["format"],
        size=PhantomSize(**content["size"]),
        config=PhantomConfig.model_validate(content["config"]),
        n_test=content["n_test"],
        chance=content["chance"],
        subjects=tuple(content["people"]),
        networks=content["networks"],
    )


def count_bytes(form: Format, size: PhantomSize, n_images: int) -> float:
    """Return the size of the ground truth."""
    if form.plan_truth is not None:
        shared = 4.0 * n_images * (N_EARLY + N_MID + 32) + 530 * n_images + 1300 * size.n_subjects + 6000
        if form.modality != "fmri":
            return shared
        # For each subject, the patterns of about 35 modes and a table of parcels.
        return shared + size.n_subjects * (size.n_parcels or 28) * 190.0 + 47.0 * count_voxels(size.voxel_mm)
    if form.modality == "fmri":
        n_voxels = form.voxel_share * count_voxels(size.voxel_mm)
        one = 4.0 * n_voxels
        extra = 45.0 * n_voxels + 8.0 * n_voxels * size.n_subjects
        n_imagined = size.n_imagery or 0
    else:
        one, extra, n_imagined = 4.0 * form.n_channels * _N_TIMES, 0.0, 0
    n_rows = n_images if n_images * one <= SMALL_BYTES else size.n_test_concepts
    drive = 4.0 * n_images * (N_EARLY + N_MID + 32)  # at most 32 semantic dimensions by default
    return drive + 450 * n_images + size.n_subjects * (n_rows + n_imagined) * one + extra + 40_000


def choose_rows(form: Format, job: PhantomJob) -> np.ndarray:
    """Return the images whose noiseless responses are stored."""
    one = 4.0 * (job.scanner.n_voxels if form.modality == "fmri" else job.sensors.n_channels * _N_TIMES)
    return np.arange(len(job.table)) if len(job.table) * one <= SMALL_BYTES else job.test_rows


def plan_truth(form: Format, job: PhantomJob) -> list[Unit]:
    """Return one unit per subject."""
    if form.plan_truth is not None:
        return form.plan_truth(job)
    write = _write_betas if form.modality == "fmri" else _write_evoked
    units = []
    for person in job.subjects:

        def write_one(progress: Progress, person: Person = person) -> list[Path]:
            return write(form, job, person)

        units.append(Unit(f"subject {person.name}, ground truth", 1, write_one))
    return units


def write_summary(form: Format, job: PhantomJob) -> PhantomTruth:
    """Write the common files of all subjects, and ``phantom.json``, which marks the phantom as complete."""
    folder = job.root / TRUTH
    truth_row = np.full(len(job.table), -1)
    if form.plan_truth is None:
        rows = choose_rows(form, job)
        # -1 if the noiseless response is not stored.
        truth_row[rows] = np.arange(len(rows))
    write_tsv(folder / "stimuli.tsv", job.table.assign(truth_row=truth_row))
    write_words(job)
    if form.modality == "fmri":
        write_tsv(folder / "voxels.tsv", describe_voxels(job.scanner))
        networks = job.scanner.make_roi_volume("networks")
        write_volume(folder / "networks.nii.gz", networks, job.scanner.affine)
        labels, names = make_parcels(job.scanner, job.size.n_parcels)
        write_volume(folder / "parcels.nii.gz", job.scanner.fill_volume(labels), job.scanner.affine)
        write_text(folder / "parcels.txt", "".join(f"{n} {name}\n" for n, name in names.items()))
    n_test = len(job.test_rows)
    write_json(
        folder / "phantom.json",
        {
            "format": form.name,
            "size": {
                name: value
                for name, value in dataclasses.asdict(job.size).items()
                if name != "n_pairs" or value is not None
            },
            "config": job.config.model_dump(mode="json"),
            "versions": collect_versions(),
            "n_test": n_test,
            "chance": 1 / n_test,
            "people": [_describe_person(form, job, person) for person in job.subjects],
            "networks": {
                name: value
                for name, value in job.config.networks.model_dump().items()
                if not name.endswith("_s")
            },
            "responses": {
                "sfreq": SFREQ,
                "tmin": TMIN,
                "unit": "percent" if form.modality == "fmri" else job.sensors.unit,
            },
        },
    )
    return read_truth(job.root)


def write_words(job: PhantomJob) -> None:
    """Write descriptions of the images: captions of concepts, and attributes and a sentence of each image.

    For composed scenes, also write the pairs.
    """
    folder, seed = job.root / TRUTH, job.config.seed
    attributes, captions = make_attributes(job.table, seed), make_captions(job.table, seed)
    write_csv(folder / "captions.csv", captions)
    write_csv(folder / "attributes.csv", attributes)
    # The caption of a composed scene, which has no place and size, is already its exact sentence.
    plain = attributes[attributes["place"] != ""]
    composed = captions[~captions["id"].isin(plain["id"])]
    write_csv(
        folder / "descriptions.csv", pd.concat([describe_attributes(plain), composed], ignore_index=True)
    )
    if job.size.n_pairs:
        write_csv(folder / "composition.csv", make_compositions(job.table, seed))


def _write_evoked(form: Format, job: PhantomJob, person: Person) -> list[Path]:
    system, folder = job.sensors, job.root / TRUTH
    rows = choose_rows(form, job)

    def iterate() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _ROWS_PER_BLOCK):
            yield compute_evoked(
                person,
                system,
                rows[start : start + _ROWS_PER_BLOCK],
                sfreq=SFREQ,
                tmin=TMIN,
                tmax=TMAX,
                duration_s=form.duration_s,
            )

    path = folder / f"sub-{person.name}_evoked.npy"
    _write_array(path, (len(rows), system.n_channels, _N_TIMES), iterate())
    times = max(2, job.size.test_repetitions)  # a split into halves needs two
    ceiling = compute_noise_ceiling(person, system, job.test_rows, times, duration_s=form.duration_s)
    table = pd.DataFrame({"channel": system.ch_names, **ceiling})
    ceilings = write_tsv(folder / f"sub-{person.name}_noise_ceiling.tsv", table)
    gram = compute_evoked_gram(person, system, job.test_rows, duration_s=form.duration_s)
    return [path, ceilings, _write_person(job, person, lambda n: _score(job, gram, n))]


def _write_betas(form: Format, job: PhantomJob, person: Person) -> list[Path]:
    scanner, folder = job.scanner, job.root / TRUTH
    rows = choose_rows(form, job)

    def iterate(picked: np.ndarray, imagery: bool) -> Iterator[np.ndarray]:
        for start in range(0, len(picked), _ROWS_PER_BLOCK):
            yield compute_betas(person, scanner, picked[start : start + _ROWS_PER_BLOCK], imagery=imagery)

    paths = [folder / f"sub-{person.name}_betas.npy", folder / f"sub-{person.name}_ncsnr.npy"]
    _write_array(paths[0], (len(rows), scanner.n_voxels), iterate(rows, False))
    _write_array(paths[1], (scanner.n_voxels,), iter([compute_voxel_snr(person, scanner)]))
    if job.size.n_imagery:
        imagined = job.test_rows[: job.size.n_imagery]
        paths.append(folder / f"sub-{person.name}_betas_imagery.npy")
        _write_array(paths[-1], (len(imagined), scanner.n_voxels), iterate(imagined, True))
    gram = compute_betas_gram(person, scanner, job.test_rows)
    return [*paths, _write_person(job, person, lambda n: _score(job, gram, n))]


def _score(job: PhantomJob, gram: np.ndarray, n_repetitions: int) -> float:
    # About 40 000 simulated queries give a standard error of at most 0.25 % in the accuracy.
    n_draws = int(np.clip(40_000 // len(gram), 10, 200))
    return compute_ideal_top1(gram, n_repetitions, n_draws=n_draws, seed=job.config.seed)


def _write_person(job: PhantomJob, person: Person, score: Callable[[int], float]) -> Path:
    path = job.root / TRUTH / f"sub-{person.name}_truth.json"
    # Single trials, and the mean of all repetitions of a test image.
    ideal = {str(n): score(n) for n in sorted({1, job.size.test_repetitions})}
    write_json(path, {**_plant(person), "ideal_top1": ideal})
    return path


def _plant(person: Person) -> dict[str, Any]:
    stages = [stage.model_dump() for stage in person.stages]
    return {"subject": person.name, "onset_s": person.onset_s, "stages": stages}


def _describe_person(form: Format, job: PhantomJob, person: Person) -> dict[str, Any]:
    if form.plan_truth is None:
        return dict(read_json(job.root / TRUTH / f"sub-{person.name}_truth.json"))
    # Without labels there is no ideal observer.
    return {**_plant(person), "ideal_top1": {}}


def _write_array(path: Path, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
    """Write float32 blocks of rows as one ``.npy``."""
    with replace_atomically(path) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        start = 0
        for block in blocks:
            array[start : start + len(block)] = block
            start += len(block)
        array.flush()
        del array
