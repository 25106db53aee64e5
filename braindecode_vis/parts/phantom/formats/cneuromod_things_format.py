"""CNeuroMod-THINGS from images to single-trial betas, events and masks, in the layout of its DataLad collection.

Owns the order of the memory task (every image shown equally often, over all sessions), the events with the columns that
readers need, the HDF5 file of each subject (one group per session, one group per run, and the mask as an array), the
map of noise ceilings, and masks of the localiser. Test images are those of categories whose number is a multiple of
ten.

References
----------
St-Laurent et al. (2025), arXiv:2507.09024; courtois-neuromod/things.glmsingle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.cneuromod_things import (
    EVENTS_PLACES,
    GLMSINGLE_PLACES,
    IMAGE_PLACES,
    LAYOUT,
    ROI_PLACES,
)
from braindecode_vis.parts.phantom.bold_signal import compute_voxel_snr, iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
)
from braindecode_vis.parts.phantom.formats.file_writers import write_tsv, write_volume
from braindecode_vis.parts.phantom.scanner import GRIDS, Scanner, count_voxels, make_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize

USES = ("n_runs", "voxel_mm")
T_R = 1.49
STIMULUS_S, PAUSE_S = 2.98, 1.49
TEST_EVERY = 10
# Region of the simulated cortex to contrast and name of the localiser.
_ROIS = {"FFA": "face", "EBA": "body", "PPA": "scene", "OPA": "scene"}
# Numbers of the collection: the fourth subject is number 6.
PEOPLE = (1, 2, 3, 6)


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if the data set cannot have this size."""
    if size.train_repetitions != size.test_repetitions:
        raise ConfigError(
            f"CNeuroMod-THINGS shows every image equally often: train_repetitions ({size.train_repetitions}) is "
            f"test_repetitions ({size.test_repetitions})."
        )
    if size.n_trials < size.n_sessions * (size.n_runs or 1):
        raise ConfigError(
            f"{size.n_trials} trials cannot fill {size.n_sessions} sessions of {size.n_runs} runs."
        )


def count(size: PhantomSize) -> Counts:
    """Return work and space of betas, events and masks."""
    n_trials, n_voxels = size.n_subjects * size.n_trials, count_voxels(size.voxel_mm)
    # float64 as published; a row of events needs 150 bytes.
    n_bytes = n_trials * (8.0 * n_voxels + 150) + size.n_subjects * 12.0 * float(
        np.prod(GRIDS[size.voxel_mm or 0][0])
    )
    seconds = 1 + n_trials * (4e-4 + 8e-7 * n_voxels)
    return Counts(n_bytes, 0, n_trials * (STIMULUS_S + PAUSE_S), seconds, n_trials)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with the task's numbers of category and exemplar; test categories are multiples of ten."""
    table = list_pictures(size, seed, "")
    number = {"train": 0, "test": 0}
    of: dict[str, int] = {}
    for concept, split in zip(table["concept"], table["split"], strict=True):
        if concept not in of:
            # Test concepts get the multiples of ten, training concepts the numbers between.
            n = number[split] = number[split] + 1
            # 1 to 9, 11 to 19... for training.
            of[concept] = n * TEST_EVERY if split == "test" else n + (n - 1) // (TEST_EVERY - 1)
    folder = IMAGE_PLACES[0]
    names = [
        f"{concept}/{name}.jpg" for concept, name in zip(table["concept"], table["stimulus_id"], strict=True)
    ]
    return table.assign(
        category_nr=table["concept"].map(of), exemplar_nr=table["exemplar"] + 1, file_name=names,
        path=[f"{folder}/{name}" for name in names],
    )  # fmt: skip


@lru_cache(maxsize=4)
def make_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return every trial of a subject: `session`, `run` (from 1), `row` of the image, `repetition`, `onset` (s)."""
    size = job.size
    generator = make_generator(job.config.seed, "cneuromod-things", subject)
    rows = generator.permutation(np.repeat(np.arange(len(job.table)), size.train_repetitions))
    n_runs = size.n_runs or 1
    pieces = np.array_split(np.arange(len(rows)), size.n_sessions * n_runs)
    run = np.concatenate([np.full(len(piece), n) for n, piece in enumerate(pieces)])
    table = pd.DataFrame({"session": run // n_runs + 1, "run": run % n_runs + 1, "row": rows})
    table["repetition"] = table.groupby("row").cumcount()
    order = table.groupby(["session", "run"]).cumcount()
    return table.assign(order=order, onset=(3.0 + order * (STIMULUS_S + PAUSE_S)).round(3))


def make_events(trials: pd.DataFrame, table: pd.DataFrame, subject: int) -> pd.DataFrame:
    """Return the events of one run, with the main columns of the published tables."""
    shown = table.iloc[trials["row"].to_numpy()]
    seen = trials["repetition"].to_numpy() > 0
    # In some trials the subject does not answer: these have no response.
    answered = trials["order"].to_numpy() % 10 != 9
    return pd.DataFrame(
        {
            "subject_id": f"sub-{subject:02d}", "session_id": trials["session"].map("ses-{:03d}".format).to_numpy(),
            "TrialNumber": trials["order"].to_numpy() + 1,
            "image_path": ("images_fmri/" + shown["file_name"]).to_numpy(),
            "condition": np.where(seen, "seen", "unseen"), "category_nr": shown["category_nr"].to_numpy(),
            "exemplar_nr": shown["exemplar_nr"].to_numpy(), "repetition": trials["repetition"].to_numpy() + 1,
            "run_id": trials["run"].to_numpy(), "onset": trials["onset"].to_numpy(), "duration": STIMULUS_S,
            "response": np.where(answered, np.where(seen, 2.0, -2.0), np.nan),
        }
    )  # fmt: skip


def plan(job: PhantomJob) -> list[Unit]:
    """Return one unit per subject."""
    return [
        Unit(f"subject {PEOPLE[person.index]:02d}", job.size.n_trials, partial(_write_person, job, person))
        for person in job.subjects
    ]


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    scanner, number = job.scanner, PEOPLE[person.index]
    design = make_design(job, person.index)
    # As in the published data, every voxel is standardised over all trials. They are simulated twice, so that none must
    # stay in memory.
    total, squares = np.zeros(scanner.n_voxels), np.zeros(scanner.n_voxels)
    for block in progress.watch(_iterate(person, scanner, design), lambda block: len(block) / 2):
        total += block.sum(axis=0, dtype=float)
        squares += (block.astype(float) ** 2).sum(axis=0)
    mean = total / len(design)
    spread = np.sqrt(squares / len(design) - mean**2)
    paths = []

    def iterate_runs() -> Iterator[tuple[str, np.ndarray]]:
        for (session, run), trials in design.groupby(["session", "run"]):
            betas = np.concatenate(list(_iterate(person, scanner, trials)))  # (n_trials, n_voxels)
            yield f"{session}/{run}/betas", (betas - mean) / spread
            progress.add(len(trials) / 2)
            path = LAYOUT.place(
                job.root / EVENTS_PLACES[0], "events", subject=number, session=session, run=run
            )
            paths.append(write_tsv(path, make_events(trials, job.table, number)))
        yield "mask_array", scanner.mask
        yield "mask_affine", scanner.affine

    betas_root, roi_root = job.root / GLMSINGLE_PLACES[0], job.root / ROI_PLACES[0]
    paths.append(LAYOUT.write(betas_root, "betas", iterate_runs(), subject=number, stat="stat"))
    power = compute_voxel_snr(person, scanner) ** 2
    ceiling = scanner.fill_volume((100 * power / (power + 1 / job.size.train_repetitions)).astype(np.float32))
    paths.append(write_volume(LAYOUT.place(betas_root, "ceiling", subject=number), ceiling, scanner.affine))
    for region, contrast in _ROIS.items():
        inside = scanner.fill_volume(scanner.regions == region)
        path = LAYOUT.place(roi_root, "roi", subject=number, contrast=contrast, roi=region)
        paths.append(write_volume(path, inside, scanner.affine))
    return paths


def _iterate(person: Person, scanner: Scanner, trials: pd.DataFrame) -> Iterator[np.ndarray]:
    return iterate_betas(person, scanner, trials["row"].to_numpy(), trials.index.to_numpy())


FORMAT = Format(
    name="cneuromod-things",
    description="CNeuroMod-THINGS: HDF5 betas of GLMsingle, BIDS events, noise ceilings, masks of a localiser",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    limits={"n_subjects": (1, len(PEOPLE))},
    check=check,
    count=count,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan,
)
