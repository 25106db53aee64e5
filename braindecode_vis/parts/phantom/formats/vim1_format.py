"""vim-1 (Kay et al. 2008) from grey images to the MATLAB files of the CRCNS archive.

Owns ``EstimatedResponses.mat`` (MATLAB 7.3: HDF5 behind a block of 512 bytes, axes reversed), the images in
``Stimuli.mat`` (MATLAB 5) and in the files of full resolution, and the slab of occipital voxels in a volume of
64 x 64 x 18. Responses are means over presentations, z-scored for each voxel; some voxels have gaps (NaN).

References
----------
Kay, Naselaris, Prenger, Gallant (2008), doi:10.1038/nature06713.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import list_split
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import TRUTH, Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats.nsd_design import write_mat5
from braindecode_vis.parts.phantom.scanner import GRIDS, Scanner, count_voxels, crop_scanner, make_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize, check_numbers, count_images

USES = ("voxel_mm",)
SHAPE = (64, 64, 18)
CODES = {"V1": 1, "V2": 2, "V3": 3, "hV4": 6, "LO": 7}
STIMULUS_S, T_R = 1.0, 1.0
# As published: 15 files of 120 images and a rest.
_IMAGES_PER_FILE = 120
# The middle grey that stored values count from, as code that shows them adds it.
_MIDDLE = 0.55
_USERBLOCK = 512


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if vim-1 cannot have this size."""
    check_numbers(size, "vim-1", USES)
    if size.n_subjects > 2 or size.n_sessions != 1 or size.voxel_mm not in GRIDS or size.voxel_mm < 2:
        raise ConfigError(
            f"vim-1 has at most two people ({size.n_subjects}), its files no sessions (n_sessions must be 1, not "
            f"{size.n_sessions}), and voxel_mm ({size.voxel_mm}) is from 2 to {max(GRIDS)}."
        )


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
    back = whole.positions[:, 1] < -45
    mask = np.zeros(whole.mask.shape, bool)
    mask[tuple(np.argwhere(whole.mask)[back].T)] = True
    part = replace(
        whole, mask=mask, positions=whole.positions[back], regions=whole.regions[back],
        networks=whole.networks[back], baseline=whole.baseline[back],
    )  # fmt: skip
    return crop_scanner(part, SHAPE)


def plan(job: PhantomJob) -> list[Unit]:
    """Return the images and the responses, which are one file for all people."""
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
    paths = [write_mat5(job.root / "Stimuli.mat", {"stimTrn": low[train], "stimVal": low[test]})]
    for number, start in enumerate(range(0, len(train), _IMAGES_PER_FILE), start=1):
        rows = train[start : start + _IMAGES_PER_FILE]
        paths.append(write_mat73(job.root / f"Stimuli_Trn_FullRes_{number:02d}.mat", {"stimTrn": high[rows]}))
    return [*paths, write_mat73(job.root / "Stimuli_Val_FullRes.mat", {"stimVal": high[test]})]


def _write_responses(job: PhantomJob, progress: Progress) -> list[Path]:
    scanner, size, content = job.scanner, job.size, {}
    places = np.argwhere(scanner.mask)
    for person in job.subjects:
        name = f"S{person.index + 1}"
        for split, suffix, times in (
            ("train", "Trn", size.train_repetitions), ("test", "Val", size.test_repetitions),
        ):  # fmt: skip
            rows = np.flatnonzero(job.table["split"] == split)
            total = np.zeros((len(rows), scanner.n_voxels), np.float32)
            for repetition in range(times):
                total += _present(job, person, rows, repetition)
                progress.add(len(rows))
            total = (total - total.mean(axis=0)) / total.std(axis=0)
            # Some voxels were not measured in some runs.
            total[: max(1, len(rows) // 5), 13::50] = np.nan
            content[f"data{suffix}{name}"] = total.T  # voxels x images, as MATLAB has them
        codes = [CODES.get(region, 0) for region in scanner.regions]
        content[f"roi{name}"] = np.array(codes, float)[:, None]
        content[f"voxIdx{name}"] = (
            np.asarray(np.ravel_multi_index(tuple(places.T), SHAPE, order="F"))[:, None] + 1.0
        )
    return [write_mat73(job.root / "EstimatedResponses.mat", content)]


def _present(job: PhantomJob, person: Person, rows: np.ndarray, repetition: int) -> np.ndarray:
    seeds = repetition * len(job.table) + rows
    return np.concatenate(list(iterate_betas(person, job.scanner, rows, seeds)))


def write_mat73(path: Path, content: Mapping[str, np.ndarray]) -> Path:
    """Write arrays as MATLAB 7.3: HDF5 with reversed axes behind MATLAB's own 512 bytes."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        with h5py.File(temporary, "w", userblock_size=_USERBLOCK) as file:
            for name, value in content.items():
                dataset = file.create_dataset(name, data=np.asarray(value).T)
                kind = "single" if np.asarray(value).dtype == np.float32 else "double"
                dataset.attrs["MATLAB_class"] = np.bytes_(kind)
        with temporary.open("r+b") as file:
            text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, phantom HDF5 schema 1.00 ."
            # Text, then the version and the mark of the byte order, as MATLAB writes them.
            file.write(text.ljust(116) + b"\0" * 8 + b"\x00\x02IM")
    return path


FORMAT = Format(
    name="vim-1",
    description="vim-1 (Kay et al. 2008): MATLAB files of one response an image and voxel, and of grey images",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=lambda size, seed: list_split(
        size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed, f"{TRUTH}/images"
    ),
    make_recorder=lambda size: make_slab(size.voxel_mm or 0),
    plan=plan,
)
