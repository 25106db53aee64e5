"""The Natural Scenes Dataset (NSD) from images to betas, in the layout of its bucket, with any voxel size.

Owns the order of its files: the experimental design, the `nsdId` of each image, the betas of each requested version
with their noise ceiling, the masks and regions, the stimulus brick, and the further sessions. Betas are simulated
directly (percent signal change of single trials), without time series. The files are written by `nsd_design`,
`nsd_files` and `nsd_further_sessions`.

References
----------
.. [1] Allen, E. J. et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and artificial
   intelligence. Nature Neuroscience 25, 116-126. https://doi.org/10.1038/s41593-021-00962-x
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, check_option
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.stimuli import read_image_file
from braindecode_vis.datasets.nsd.beta_files import LAYOUT as REGIONS
from braindecode_vis.datasets.nsd.experiment_design import LAYOUT
from braindecode_vis.parts.phantom.bold_signal import compute_betas, compute_voxel_snr, iterate_betas
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
from braindecode_vis.parts.phantom.formats.file_writers import write_csv, write_tsv
from braindecode_vis.parts.phantom.formats.nsd_design import (
    Design,
    get_trial_images,
    make_nsd_expdesign,
    make_responses,
    make_stim_info,
)
from braindecode_vis.parts.phantom.formats.nsd_files import (
    BETA_FORMS,
    BETA_VERSIONS,
    MOST_PERCENT,
    SHAPES,
    VOXEL_MM,
    make_subject_scanner,
    write_betas,
    write_brainmask,
    write_ncsnr,
    write_roi,
    write_stimuli,
)
from braindecode_vis.parts.phantom.formats.nsd_further_sessions import (
    IMAGERY_SETS,
    VERSION,
    check_synthetic,
    count_imagery,
    count_synthetic,
    estimate_synthetic_bytes,
    expect_synthetic_seconds,
    write_imagery,
    write_imagery_design,
    write_synthetic,
    write_synthetic_design,
)
from braindecode_vis.parts.phantom.scanner import (
    ROIS,
    Scanner,
    count_voxels,
    estimate_volume_bytes,
    iterate_volumes,
    label_visual_quadrants,
)
from braindecode_vis.parts.phantom.sizes import PhantomSize, divide

USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions", "n_synthetic", "beta_versions", "beta_form")
STIMULUS_S = 3.0
# Our assumption: noise that denoising and a fitted response remove, in units of the denoised noise.
_EXTRA_NOISE = {"betas_assumehrf": 0.8, "betas_fithrf": 0.5, VERSION: 0.0}


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if NSD cannot have this size."""
    check_design(size)
    check_synthetic(size)
    for version in list_versions(size):
        check_option("beta version of a phantom of NSD", version, BETA_VERSIONS)
    if size.beta_form is not None:
        check_option("form of the betas of a phantom of NSD", size.beta_form, BETA_FORMS)
    if (size.n_imagery or 0) % len(IMAGERY_SETS) or (size.imagery_repetitions or 0) % 2:
        raise ConfigError(
            f"imagined images come in three sets and two runs: n_imagery ({size.n_imagery}) must be a multiple of 3 "
            f"and imagery_repetitions ({size.imagery_repetitions}) even."
        )


def check_design(size: PhantomSize) -> None:
    """Raise `ConfigError` if the images cannot be divided among sessions and runs."""
    assert size.n_runs is not None
    if size.train_repetitions != size.test_repetitions:
        raise ConfigError(
            "every image of NSD is shown equally often: train_repetitions must be test_repetitions."
        )
    per_session = divide(size.n_trials, size.n_sessions, what="the trials of a person over n_sessions")
    if per_session < size.n_runs:
        raise ConfigError(f"{per_session} trials a session cannot fill {size.n_runs} runs.")


def count_images(size: PhantomSize) -> int:
    """Return the number of images: the shared ones, and those of only one subject."""
    return size.n_train_images * size.n_subjects + size.n_test_concepts


def list_versions(size: PhantomSize) -> tuple[str, ...]:
    """Return the versions of the betas that are written."""
    return size.beta_versions or (VERSION,)


def count(size: PhantomSize) -> Counts:
    """Return work and space of betas, regions and the stimulus brick."""
    n_betas = size.n_trials * len(list_versions(size))
    n_further = count_imagery(size) + count_synthetic(size)
    n_volumes = size.n_subjects * (n_betas + n_further)
    volume = estimate_volume_bytes(size.voxel_mm, "int16")
    index_bytes, index_seconds = 0.0, 0.0
    if size.beta_form == "hdf5":
        # Every voxel of a session is a chunk of its own, as published: not compressed, with 90 bytes of index each.
        n_places = float(np.prod(SHAPES[0])) * (VOXEL_MM / (size.voxel_mm or VOXEL_MM)) ** 3
        n_chunks = (
            n_places * size.n_subjects * (size.n_sessions * len(list_versions(size)) + bool(size.n_synthetic))
        )
        volume, index_bytes, index_seconds = 2.0 * n_places, 90.0 * n_chunks, 2e-5 * n_chunks
    n_images = count_images(size)
    tables = 45.0 * n_images * (2 + size.n_subjects) / 2 + size.n_subjects * size.n_trials * 100
    n_bytes = n_volumes * volume + n_images * 3.0 * size.image_size**2 + tables
    seconds = n_volumes * (1.4e-4 + 2.4e-7 * count_voxels(size.voxel_mm) + volume * 1.7e-8) + n_images * 2e-3
    n_bytes += estimate_synthetic_bytes(size) + index_bytes
    seconds += index_seconds + expect_synthetic_seconds(size)
    n_designs = bool(size.n_imagery) + bool(size.n_synthetic)
    steps = 1 + n_images + n_designs + size.n_subjects * (1 + n_betas + n_further)
    return Counts(n_bytes, 0, size.n_subjects * size.n_trials * 4.0, 1 + seconds, steps)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with their `nsd_id`; training images have the subject (`subject`) who sees them."""
    # The images of only one subject are exemplars of the same training concepts, one block of exemplars per subject.
    n_own = size.n_train_exemplars
    table = list_pictures(size.replace(n_train_exemplars=n_own * size.n_subjects), seed)
    is_train = (table["split"] == "train").to_numpy()
    owner = np.where(is_train, table["exemplar"] // n_own, -1)
    design = make_design(size, seed)
    nsd_id = np.empty(len(table), int)
    # The .mat file counts from 1, nsdId from 0.
    nsd_id[~is_train] = design["sharedix"][0] - 1
    for subject in range(size.n_subjects):
        nsd_id[owner == subject] = design["subjectim"][subject, size.n_test_concepts :] - 1
    return table.assign(subject=owner + 1, nsd_id=nsd_id)


@lru_cache(maxsize=4)
def make_design(size: PhantomSize, seed: int) -> Design:
    """Return the arrays of ``nsd_expdesign.mat``."""
    assert size.n_runs is not None
    return make_nsd_expdesign(
        size.n_subjects,
        size.n_sessions,
        size.n_train_images + size.n_test_concepts,
        size.n_test_concepts,
        count_images(size),
        derive_seed(seed, "design"),
        n_repetitions=size.test_repetitions,
        n_runs=size.n_runs,
    )


def plan(job: PhantomJob) -> list[Unit]:
    """Return design, stimuli, each subject's tables and regions, and one unit per session of betas."""
    # Check before hours of work that the betas fit into the files.
    rows = np.unique(np.linspace(0, len(job.table) - 1, 64).astype(int))
    for person in job.subjects:
        # Gains of single trials reach twice their mean; noise stays within six standard deviations.
        most = 2 * float(np.abs(compute_betas(person, job.scanner, rows)).max())
        most += 6 * person.config.fmri.noise_percent
        if most > MOST_PERCENT:
            raise ConfigError(
                f"at a signal-to-noise ratio of {person.config.snr:g}, trials of subject {person.name} reach about "
                f"{most:.0f} % signal change, but the int16 of NSD end at {MOST_PERCENT:.0f} %; choose a lower snr."
            )

    units = plan_shared(job)
    if job.size.n_imagery:
        units.append(Unit("the imagery design", 1, lambda progress: write_imagery_design(job)))
    if job.size.n_synthetic:
        units.append(Unit("the synthetic images", 1, lambda progress: write_synthetic_design(job)))
    per_session = job.size.n_trials // job.size.n_sessions
    for person in job.subjects:
        who = f"subject {person.name}"
        units.append(Unit(f"{who}, regions", 1, partial(_write_person, job, person)))
        name = "subject {person.name}, session {session:02d}, {version}"
        labels: dict[str, Any] = {
            "version": list_versions(job.size),
            "session": range(1, job.size.n_sessions + 1),
        }
        units += list_units(job, name, per_session, _write_session, people=[person], **labels)
        if job.size.n_imagery:
            units.append(
                Unit(f"{who}, imagery", count_imagery(job.size), partial(write_imagery, job, person))
            )
        if job.size.n_synthetic:
            write_further = partial(write_synthetic, job, person)
            units.append(Unit(f"{who}, synthetic images", count_synthetic(job.size), write_further))
    return units


def plan_shared(job: PhantomJob) -> list[Unit]:
    """Return the common units of all subjects: the experimental design and the stimulus brick."""
    n_images = len(job.table)

    def write_design_files(progress: Progress) -> list[Path]:
        design = make_design(job.size, job.config.seed)
        return [
            LAYOUT.write(job.root, "design", design),
            # Its first column has no name.
            write_csv(LAYOUT.place(job.root, "images"), make_stim_info(design, n_images), index=True),
        ]

    return [Unit("the experimental design", 1, write_design_files), plan_brick(job)]


def plan_brick(job: PhantomJob) -> Unit:
    """Return the unit of the stimulus brick: every image, in the order of `nsdId`."""
    n_images = len(job.table)

    def write_brick(progress: Progress) -> list[Path]:
        ordered = job.table.sort_values("nsd_id")["path"]
        images = progress.watch((read_image_file(job.root / path) for path in ordered), lambda image: 1)
        return [write_stimuli(job.root, images, n_images, size=job.size.image_size)]

    return Unit("the stimulus brick", n_images, write_brick)


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    number = person.index + 1
    scanner = make_subject_scanner(job.size.voxel_mm or 0, number)
    paths = write_subject(job, person, progress)
    snr = compute_voxel_snr(person, job.scanner)
    for version in list_versions(job.size):
        ncsnr = scanner.fill_volume(snr / np.hypot(1, _EXTRA_NOISE[version]))
        paths.append(write_ncsnr(job.root, number, ncsnr, scanner.affine, version=version))
    return paths


def write_subject(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    """Write the behaviour of a subject, the brain mask, and the regions."""
    number = person.index + 1
    design = make_design(job.size, job.config.seed)
    responses = make_responses(design, number, job.size.n_sessions, job.config.seed)
    scanner = make_subject_scanner(job.size.voxel_mm or 0, number)
    return [
        write_tsv(LAYOUT.place(job.root, "behaviour", subject=number), responses, missing="NaN"),
        *write_regions(job.root, number, scanner),
    ]


def write_regions(root: Path, number: int, scanner: Scanner) -> list[Path]:
    """Write the brain mask of a subject, from 1, and the sets of regions with their colour tables."""
    paths = [write_brainmask(root, number, scanner)]
    # The published file separates upper and lower field in V1 to V3: seven labels.
    quadrants, names = label_visual_quadrants(scanner)
    regions = {"prf-visualrois": (scanner.fill_volume(quadrants), names)}
    for name, groups in ROIS.items():
        if name == "nsdgeneral" or name.startswith("floc-"):
            known = {i: "_".join(group) for i, group in enumerate(groups, start=1)}
            regions[name] = (scanner.make_roi_volume(name), {1: name} if name == "nsdgeneral" else known)
    for name, (labels, known) in regions.items():
        paths.append(write_roi(root, number, name, labels, scanner.mask, scanner.affine, names=known))
        paths.append(REGIONS.place(root, "names", subject=number, roi=name))
    return paths


def _write_session(
    job: PhantomJob, person: Person, version: str, session: int, progress: Progress
) -> list[Path]:
    shown = get_trial_images(make_design(job.size, job.config.seed), person.index + 1, session) - 1
    # Rows of the drive in the order of nsdId: the inverse of the column.
    row_of = np.argsort(job.table["nsd_id"].to_numpy())
    # Names of trials are unique over all sessions, so a session that is written alone has the same numbers.
    seeds = (session - 1) * len(shown) + np.arange(len(shown))
    blocks = iterate_betas(person, job.scanner, row_of[shown], seeds)
    if _EXTRA_NOISE[version]:
        blocks = _add_noise(
            blocks, _EXTRA_NOISE[version] * person.config.fmri.noise_percent,
            make_generator(job.config.seed, version, person.index, session),
        )  # fmt: skip
    scanner = make_subject_scanner(job.size.voxel_mm or 0, person.index + 1)
    path = write_betas(
        job.root,
        person.index + 1,
        session,
        iterate_volumes(scanner, progress.watch(blocks, len)),
        shape=scanner.mask.shape,
        n_trials=len(shown),
        affine=scanner.affine,
        version=version,
        form=job.size.beta_form or BETA_FORMS[0],
    )
    return [path]


def _add_noise(
    blocks: Iterator[np.ndarray], size: float, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield betas of a model with less denoising."""
    for block in blocks:
        yield block + size * generator.standard_normal(block.shape, np.float32)


FORMAT = Format(
    name="nsd",
    description="Natural Scenes Dataset: int16 betas per session, regions, design, images, NSD-Imagery, NSD-synthetic",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_recorder=lambda size: make_subject_scanner(size.voxel_mm or 0, 1),
    plan=plan,
    n_imagery_sets=len(IMAGERY_SETS),
    # 2: volumes are those of the published subjects, with a brain mask, instead of MNI space.
    version=2,
)
