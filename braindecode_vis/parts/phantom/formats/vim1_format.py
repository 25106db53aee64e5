"""vim-1 (Kay et al. 2008) from grey images to the MATLAB files of the CRCNS archive.

Owns ``EstimatedResponses.mat`` (MATLAB 7.3: HDF5 after a block of 512 bytes, axes reversed), the images in
``Stimuli.mat`` (MATLAB 5) and in the files of full resolution, and the slab of occipital voxels in a volume of
64 x 64 x 18. Responses are means over presentations, z-scored for each voxel; some voxels have gaps (NaN).

References
----------
Kay, Naselaris, Prenger, Gallant (2008), doi:10.1038/nature06713.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.datasets.vim1 import LAYOUT, ROIS, SHAPE, SUFFIXES, encode_places
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.scanner import (
    Scanner,
    count_voxels,
    crop_scanner,
    make_scanner,
    pick_voxels,
)
from braindecode_vis.parts.phantom.sizes import PhantomSize, count_images

USES = ("voxel_mm",)
STIMULUS_S, T_R = 1.0, 1.0
# Published: 15 files of 120 images, the last one with the rest.
_IMAGES_PER_FILE = 120
# The middle grey from which stored values count; published code adds it before display.
_MIDDLE = 0.55
# Simulated regions, by their codes in the files.
_CODES = {{"V4": "hV4"}.get(name, name): code for code, name in ROIS.items()}


def count(size: PhantomSize) -> Counts:
    """Return work and space of responses and images."""
    n_images, n_voxels = count_images(size), 0.4 * count_voxels(size.voxel_mm)
    pixels = size.image_size**2 + shrink(size.image_size) ** 2
    n_bytes = n_images * (size.n_subjects * n_voxels * 4 + 4.0 * pixels) + 3000
    seconds = 1 + size.n_subjects * size.n_trials * (3e-4 + 4e-7 * n_voxels) + n_images * 3e-3
    n_steps = n_images + size.n_subjects * size.n_trials
    return Counts(n_bytes, 0, size.n_subjects * size.n_trials * 4.0, seconds, n_steps)


def shrink(image_size: int) -> int:
    """Return the size of the small images: 128 pixels of 500."""
    return round(image_size * 128 / 500)


@lru_cache(maxsize=4)
def make_slab(voxel_mm: float) -> Scanner:
    """Return the scanner of the back of the brain, in a volume of 64 x 64 x 18."""
    whole = make_scanner(voxel_mm, T_R)
    return crop_scanner(pick_voxels(whole, whole.positions[:, 1] < -45), SHAPE)


def plan(job: PhantomJob) -> list[Unit]:
    """Return the images and the responses, which are one file for all subjects."""
    return [
        Unit("the images", len(job.table), partial(_write_images, job)),
        Unit("the responses", job.size.n_subjects * job.size.n_trials, partial(_write_responses, job)),
    ]


def _write_images(job: PhantomJob, progress: Progress) -> list[Path]:
    from PIL import Image

    full, small = [], []
    side = shrink(job.size.image_size)
    for path in job.table["path"]:
        grey = Image.fromarray(read_image_file(job.root / path)).convert("L")
        full.append(np.asarray(grey, np.float32) / 255 - _MIDDLE)
        small.append(np.asarray(grey.resize((side, side), Image.Resampling.BOX), np.float32) / 255 - _MIDDLE)
        progress.add(1)
    split = job.table["split"].to_numpy()
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    low, high = np.stack(small), np.stack(full)
    paths = [LAYOUT.write(job.root, "low", {"stimTrn": low[train], "stimVal": low[test]})]
    for number, start in enumerate(range(0, len(train), _IMAGES_PER_FILE), start=1):
        rows = train[start : start + _IMAGES_PER_FILE]
        paths.append(LAYOUT.write(job.root, "full_train", {"stimTrn": high[rows]}, number=f"{number:02d}"))
    return [*paths, LAYOUT.write(job.root, "full_test", {"stimVal": high[test]})]


def _write_responses(job: PhantomJob, progress: Progress) -> list[Path]:
    scanner, size = job.scanner, job.size
    content: dict[str, Any] = {}
    for person in job.subjects:
        name = f"S{person.index + 1}"
        for split, times in (("train", size.train_repetitions), ("test", size.test_repetitions)):
            rows = np.flatnonzero(job.table["split"] == split)
            total = np.zeros((len(rows), scanner.n_voxels), np.float32)
            for repetition in range(times):
                total += _present(job, person, rows, repetition)
                progress.add(len(rows))
            total = (total - total.mean(axis=0)) / total.std(axis=0)
            # Some voxels were not measured in some runs.
            total[: max(1, len(rows) // 5), 13::50] = np.nan
            content[f"data{SUFFIXES[split]}{name}"] = total.T
        content[f"roi{name}"] = [_CODES.get(region, 0) for region in scanner.regions]
        content[f"voxIdx{name}"] = encode_places(np.argwhere(scanner.mask))
    return [LAYOUT.write(job.root, "responses", content)]


def _present(job: PhantomJob, person: Person, rows: np.ndarray, repetition: int) -> np.ndarray:
    seeds = repetition * len(job.table) + rows
    return np.concatenate(list(iterate_betas(person, job.scanner, rows, seeds)))


FORMAT = Format(
    name="vim-1",
    description="vim-1 (Kay et al. 2008): MATLAB files of one response an image and voxel, and of grey images",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    limits={"n_subjects": (1, 2), "n_sessions": (1, 1), "voxel_mm": (2, 12)},
    count=count,
    make_recorder=lambda size: make_slab(size.voxel_mm or 0),
    plan=plan,
)
