"""Further sessions of the phantom NSD's subjects: NSD-Imagery and NSD-synthetic.

In NSD-Imagery some pictures are seen and then imagined. Its stimulus list has the keys that readers need (`exps`,
`cues`, `image_map`); attention trials show the same pictures as vision trials.

NSD-synthetic shows gratings, noise and contrast patterns, which are outside the distribution of NSD's pictures. Owns
the images (grey ones for all subjects, coloured noise for each), the design with its uneven repetitions, the table of
classes, and the responses. Early and mid-level stages of the simulated brains follow the images; the images have no
meaning, so semantic stages stay at the level of an average picture.

References
----------
Gifford, Cichy, Naselaris, Kay (2026), doi:10.1038/s41467-026-69345-9: 220 images for all and 64 for each subject, shown
two (236 of them), four (32), eight (8) or ten times (8) in 744 trials. Pixels: 714 x 1360, linear intensities.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.nsd.beta_files import BETA_VERSIONS
from braindecode_vis.datasets.nsd.imagery_dataset import BETAS_FILE, STIMULI_FILE
from braindecode_vis.datasets.nsd.synthetic_dataset import IMAGES_FOLDER, LAYOUT
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person, make_person
from braindecode_vis.parts.phantom.drive import (
    StimulusDrive,
    compute_gabor_energy,
    compute_mid_features,
    standardise,
)
from braindecode_vis.parts.phantom.format_plan import TRUTH, PhantomJob, Progress
from braindecode_vis.parts.phantom.formats.file_writers import write_csv, write_tsv
from braindecode_vis.parts.phantom.formats.nsd_files import (
    beta_folder,
    make_subject_scanner,
    write_beta_file,
    write_brick,
)
from braindecode_vis.parts.phantom.formats.pickles import split_pickle
from braindecode_vis.parts.phantom.scanner import iterate_volumes
from braindecode_vis.parts.phantom.sizes import PhantomSize

VERSION = BETA_VERSIONS[-1]
IMAGERY_SETS = ("A", "B", "C")
_EXPS = ("vis{}", "att{}", "img{}_1", "img{}_2")
_IMAGERY_SEED = 1 << 40  # trial names of NSD-Imagery lie beyond those of the main experiment


def count_imagery(size: PhantomSize) -> int:
    """Return the trials of NSD-Imagery of one subject: seen, attended and imagined."""
    # Seen and attended images get half of the repetitions each.
    return (size.n_imagery or 0) * (size.imagery_repetitions or 0) * 2


@lru_cache(maxsize=4)
def make_imagery_design(job: PhantomJob) -> pd.DataFrame:
    """Return the trials of NSD-Imagery, the same for every subject.

    As in the published order of runs: each set is seen in one run, attended in one, and imagined in two.

    Returns
    -------
    DataFrame
        `run` (from 1), `exp`, `cue`, `stimulus_id`, `row` of the image, `imagined`.
    """
    size = job.size
    rows = job.test_rows[: size.n_imagery or 0]
    sets = np.array_split(rows, len(IMAGERY_SETS))
    # Each of the two imagery runs of a set holds half of the repetitions.
    half = (size.imagery_repetitions or 0) // 2
    generator = make_generator(job.config.seed, "nsd-imagery")
    # Runs 1-3 are seen, 4-6 attended, 7-12 imagined.
    runs = [
        (form.format(name), group) for form in _EXPS for name, group in zip(IMAGERY_SETS, sets, strict=True)
    ]
    table = pd.concat(
        [
            pd.DataFrame({"run": run, "exp": exp, "row": generator.permutation(np.repeat(group, half))})
            for run, (exp, group) in enumerate(runs, start=1)
        ],
        ignore_index=True,
    )
    # One letter per picture, as on the screen; two letters after Z.
    cues = {row: chr(ord("A") + number % 26) * (number // 26 + 1) for number, row in enumerate(rows.tolist())}
    return table.assign(
        cue=table["row"].map(cues),
        stimulus_id=job.table["stimulus_id"].to_numpy()[table["row"]],
        imagined=table["exp"].str.startswith("img"),
    )


def write_imagery_design(job: PhantomJob) -> list[Path]:
    """Write ``nsdimagery_stimuli.pkl3``, the pictures with the names in it, and the same table in the ground truth."""
    design = make_imagery_design(job)
    folder = job.root / IMAGES_FOLDER.parent
    names = dict(zip(design["cue"], design["stimulus_id"], strict=True))
    content = {
        "exps": design["exp"].tolist(),
        "cues": design["cue"].tolist(),
        "image_map": {cue: names[cue] for cue in sorted(names)},
    }
    paths = [folder / STIMULI_FILE]
    with replace_atomically(paths[0]) as temporary:
        temporary.write_bytes(b"".join(split_pickle(content, container="pickle", protocol=3)))
    (folder / "nsdimagery").mkdir(exist_ok=True)
    for row in design["row"].unique():
        source = job.root / job.table["path"].iloc[row]
        paths.append(folder / "nsdimagery" / source.name)
        with replace_atomically(paths[-1]) as temporary:
            temporary.write_bytes(source.read_bytes())
    return [*paths, write_tsv(job.root / TRUTH / "nsdimagery_trials.tsv", design)]


def write_imagery(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write ``nsdimagerybetas_fithrf_GLMdenoise_RR/betas_nsdimagery.nii.gz`` of one subject."""
    design = make_imagery_design(job)
    seeds = _IMAGERY_SEED + np.arange(len(design))

    def iterate() -> Iterator[np.ndarray]:
        for imagined in (False, True):  # imagined runs come last
            part = design[design["imagined"] == imagined]
            yield from iterate_betas(
                person, job.scanner, part["row"].to_numpy(), seeds[part.index], imagery=imagined
            )

    scanner = make_subject_scanner(job.size.voxel_mm or 0, person.index + 1)
    # The writer adds the suffix of its form.
    path = beta_folder(job.root, person.index + 1, BETAS_FILE)
    path = write_beta_file(
        path.with_name(path.name.removesuffix(".nii.gz")),
        iterate_volumes(scanner, progress.watch(iterate(), len)),
        shape=scanner.mask.shape,
        n_trials=len(design),
        affine=scanner.affine,
    )
    return [path]


# --- NSD-synthetic ------------------------------------------------------------------------------------------------

CLASSES = ("Noise", "Contrast modulation", "Spiral gratings")
COLOUR_CLASS = "Chromatic noise"
_SYNTHETIC_SEED = 1 << 41  # trial names lie beyond those of the other sessions
# Number of training images for mean and spread of the features; with more, these hardly change.
_REFERENCE_IMAGES = 512


def count_kinds(size: PhantomSize) -> tuple[int, int]:
    """Return the numbers of grey images for all subjects and of coloured ones for each: 220 and 64 of 284."""
    n = size.n_synthetic or 0
    n_colour = round(n * 64 / 284)
    return n - n_colour, n_colour


def count_repetitions(size: PhantomSize) -> np.ndarray:
    """Return the number of presentations of each image, in the published shares, shape (n_images,)."""
    n = size.n_synthetic or 0
    # From the published counts: 8 of 284 ten times, 8 eight times, 32 four times, the others twice.
    shares = np.array([10] * round(n * 8 / 284) + [8] * round(n * 8 / 284) + [4] * round(n * 32 / 284), int)
    return np.concatenate([shares, np.full(n - len(shares), 2)])[::-1]


def check_synthetic(size: PhantomSize) -> None:
    """Raise `ConfigError` if there are images, but too few for eight runs."""
    if size.n_synthetic and size.n_synthetic < 8:
        raise ConfigError(
            f"NSD-synthetic needs at least 8 images, or none; n_synthetic is {size.n_synthetic}."
        )


def count_synthetic(size: PhantomSize) -> int:
    """Return the trials of the session of one subject."""
    return int(count_repetitions(size).sum()) if size.n_synthetic else 0


def _measure(size: PhantomSize) -> tuple[int, int]:
    """Return height and width of the images: 714 x 1360, if NSD's images are 425 x 425."""
    return round(714 * size.image_size / 425), round(1360 * size.image_size / 425)


def estimate_synthetic_bytes(size: PhantomSize) -> float:
    """Return the size of the bricks."""
    height, width = _measure(size)
    n_grey, n_colour = count_kinds(size)
    return 3.0 * height * width * (n_grey + n_colour * size.n_subjects)


def expect_synthetic_seconds(size: PhantomSize) -> float:
    """Return the time that a usual machine needs to draw the images: grey ones for all and again for each subject."""
    n_grey, n_colour = count_kinds(size)
    # The blur is as wide as the image is large: the third power of the side, 0.37 s at 714 x 1360 pixels.
    each = 0.37 * (size.image_size / 425) ** 3
    return each * (n_grey + size.n_subjects * (n_grey + n_colour))


def draw_images(size: PhantomSize, seed: int, subject: int, *, grey_only: bool = False) -> np.ndarray:
    """Return the shown images, uint8 (n_images, height, width, 3); the coloured ones, the last, are for one subject."""
    height, width = _measure(size)
    n_grey, n_colour = count_kinds(size)
    n_images = n_grey if grey_only else n_grey + n_colour
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) / (height / 2)
    angle = np.arctan2(y - height / 2, x - width / 2)
    images = np.empty((n_images, height, width, 3), np.uint8)
    for number in range(n_images):
        # Coloured images differ between subjects, grey ones do not.
        rng = make_generator(seed, "nsd-synthetic", number, subject if number >= n_grey else 0)
        if number >= n_grey:
            # The phases of red, green and blue differ by a third of a turn, and change from image to image.
            hue = np.cos(2 * np.pi * (np.arange(3) / 3 + (number - n_grey) / max(1, n_colour)))
            wave = 0.5 + 0.4 * _smooth(rng.standard_normal((height, width)), height / 12)[..., None] * hue
        else:
            kind, level = CLASSES[number % len(CLASSES)], number // len(CLASSES)
            if kind == "Noise":
                grey = _smooth(rng.standard_normal((height, width)), height / (6 * 2 ** (level % 4)))
            elif kind == "Contrast modulation":
                grey = np.cos(2 * np.pi * (x + level * y) * 6 / height) * (0.1 + 0.9 * (level % 5) / 4)
            else:
                grey = np.cos((2 + level) * angle + 12 * np.log(radius + 0.05) * (-1) ** level)
            wave = np.repeat((0.5 + 0.45 * grey * (radius < 1))[..., None], 3, axis=-1)
        images[number] = np.round(np.clip(wave, 0, 1) * 255)
    return images


def _smooth(noise: np.ndarray, width: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(noise, max(0.5, width), mode="wrap")
    return np.clip(smooth / (2 * smooth.std()), -1, 1)


def name_classes(size: PhantomSize) -> list[str]:
    """Return the class of each image."""
    n_grey, n_colour = count_kinds(size)
    return [CLASSES[n % len(CLASSES)] for n in range(n_grey)] + [COLOUR_CLASS] * n_colour


@lru_cache(maxsize=4)
def order_trials(size: PhantomSize, seed: int) -> np.ndarray:
    """Return the image of each trial, from 1; as published, the same order for every subject."""
    shown = np.repeat(np.arange(1, (size.n_synthetic or 0) + 1), count_repetitions(size))
    return make_generator(seed, "nsd-synthetic", "order").permutation(shown)


def write_synthetic_design(job: PhantomJob) -> list[Path]:
    """Write the design, the table of classes and the grey images."""
    order, size = order_trials(job.size, job.config.seed), job.size
    classes = name_classes(size)
    numbers = np.arange(1, len(classes) + 1)
    codes = {name: code for code, name in enumerate(dict.fromkeys(classes), start=1)}
    table = pd.DataFrame(
        {
            "Image number": numbers,
            "Image": [f"{name.split()[0].lower()}_{n}" for n, name in zip(numbers, classes, strict=True)],
            "Image subclass number": [codes[name] for name in classes], "Image subclass": classes,
            "Image class number": [codes[name] for name in classes], "Image class": classes,
        }
    )  # fmt: skip
    paths = [
        LAYOUT.write(job.root, "design", {"masterordering": order[None]}),
        write_csv(LAYOUT.place(job.root, "classes"), table),
        _write_images(job, "stimuli", draw_images(size, job.config.seed, 1, grey_only=True)),
    ]
    trials = pd.DataFrame({"trial": np.arange(len(order)), "synthetic_id": order - 1})
    return [*paths, write_tsv(job.root / TRUTH / "nsdsynthetic_trials.tsv", trials)]


def _write_images(job: PhantomJob, name: str, images: np.ndarray) -> Path:
    # The published files hold linear intensities, whose square root is shown. One image at a time: all of them as
    # floating-point numbers take 12 GB.
    linear = np.ceil((np.arange(256) / 255.0) ** 2 * 255).astype(np.uint8)
    path = job.root / IMAGES_FOLDER / f"nsdsynthetic_{name}.hdf5"
    return write_brick(path, (linear[image] for image in images), (len(images), *images.shape[1:3]))


def write_synthetic(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write ``nsdsyntheticbetas_fithrf_GLMdenoise_RR/betas_nsdsynthetic`` and the coloured images of one subject."""
    number = person.index + 1
    images = draw_images(job.size, job.config.seed, number)
    drive = make_synthetic_drive(job, images)
    viewer = make_person(person.config, person.index, drive)
    # In the drive of the subject, synthetic images come after NSD's pictures; trials count them from 1.
    rows = len(job.drive) + order_trials(job.size, job.config.seed) - 1
    scanner = make_subject_scanner(job.size.voxel_mm or 0, number)
    blocks = progress.watch(
        iterate_betas(viewer, job.scanner, rows, _SYNTHETIC_SEED + np.arange(len(rows))), len
    )
    folder = beta_folder(job.root, number, f"nsdsynthetic{VERSION}")
    path = write_beta_file(
        folder / "betas_nsdsynthetic", iterate_volumes(scanner, blocks), shape=scanner.mask.shape, n_trials=len(rows),
        affine=scanner.affine, form=job.size.beta_form or "nii.gz",
    )  # fmt: skip
    n_grey = count_kinds(job.size)[0]
    return [path, _write_images(job, f"colorstimuli_subj{number:02d}", images[n_grey:])]


def make_synthetic_drive(job: PhantomJob, images: np.ndarray) -> StimulusDrive:
    """Return the drive of NSD's pictures followed by that of synthetic images."""
    is_train = np.flatnonzero(job.drive.is_train)
    picked = is_train[np.unique(np.linspace(0, len(is_train) - 1, _REFERENCE_IMAGES).astype(int))]
    usual = np.stack([read_image_file(job.root / path) for path in job.table["path"].iloc[picked]])
    joined = {}
    # The middle square counts as the seen image, since NSD's pictures are cropped to it too.
    height, width = images.shape[1:3]
    left = (width - height) // 2
    square = images[:, :, left : left + height]
    for name, measure in (("early", compute_gabor_energy), ("mid", compute_mid_features)):
        measured = np.concatenate([measure(usual), measure(square)])
        own = standardise(measured, np.arange(len(measured)) < len(usual))[len(usual) :]
        joined[name] = np.concatenate([getattr(job.drive, name), own])
    nothing = np.zeros((len(images), job.drive.semantic.shape[1]), np.float32)
    ids = [f"synthetic{n + 1:03d}" for n in range(len(images))]
    return StimulusDrive(
        np.concatenate([job.drive.ids, np.asarray(ids, object)]), joined["early"], joined["mid"],
        np.concatenate([job.drive.semantic, nothing]),
        np.concatenate([job.drive.is_train, np.zeros(len(images), bool)]),
    )  # fmt: skip
