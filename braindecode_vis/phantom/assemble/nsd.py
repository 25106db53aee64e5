"""NSD from images to betas, with seen and imagined pictures.

Owns which image has which `nsdId`. Betas are simulated as such (percent signal change of single trials), without time
series. The stimulus list of NSD-Imagery has the keys that readers ask for (`exps`, `cues`, `image_map`); attention
trials show the same pictures as vision trials.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.ledger import TRUTH
from braindecode_vis.phantom.assemble.sizes import PhantomSize, check_imagery, check_numbers, divide
from braindecode_vis.phantom.assemble.stimulus_files import list_split
from braindecode_vis.phantom.assemble.streams import iterate_betas, iterate_volumes
from braindecode_vis.phantom.assemble.volume_files import (
    GRIDS,
    count_voxels,
    estimate_volume_bytes,
    label_visual_quadrants,
)
from braindecode_vis.phantom.bold_signal import compute_betas, compute_voxel_snr
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.scanner import ROIS, make_fmri_machine
from braindecode_vis.phantom.writers import nsd
from braindecode_vis.phantom.writers.nifti import write_volumes
from braindecode_vis.phantom.writers.pickles import split_pickle
from braindecode_vis.phantom.writers.tables import write_tsv
from braindecode_vis.seeds import derive_seed, make_generator
from braindecode_vis.stimuli import read_image_file
from braindecode_vis.store import replace_atomically

USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions")
VERSION = "betas_fithrf_GLMdenoise_RR"
STIMULUS_S = 3.0
IMAGERY_SETS = ("A", "B", "C")
_EXPS = ("vis{}", "att{}", "img{}_1", "img{}_2")
_IMAGERY_SEED = 1 << 40  # trial names of NSD-Imagery lie beyond those of the main experiment


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if NSD cannot have this size."""
    check_numbers(size, "nsd", USES)
    check_imagery(size, "nsd")
    assert size.n_runs is not None
    if size.train_repetitions != size.test_repetitions:
        raise ConfigError(
            "every image of NSD is shown equally often: train_repetitions must be test_repetitions."
        )
    per_session = divide(size.n_trials, size.n_sessions, what="the trials of a person over n_sessions")
    if per_session < size.n_runs or size.voxel_mm not in GRIDS:
        raise ConfigError(
            f"{per_session} trials a session cannot fill {size.n_runs} runs, or voxel_mm ({size.voxel_mm}) is "
            f"not from {min(GRIDS)} to {max(GRIDS)}."
        )
    if (size.n_imagery or 0) % len(IMAGERY_SETS) or (size.imagery_repetitions or 0) % 2:
        raise ConfigError(
            f"imagined images come in three sets and two runs: n_imagery ({size.n_imagery}) must be a multiple of 3 "
            f"and imagery_repetitions ({size.imagery_repetitions}) even."
        )


def count_images(size: PhantomSize) -> int:
    """Return the number of images: those that everybody sees, and each person's own."""
    return size.n_train_images * size.n_subjects + size.n_test_concepts


def _count_imagery(size: PhantomSize) -> int:
    """Return the trials of NSD-Imagery of one person: seen, attended and imagined."""
    # Seen and attended images get half of the repetitions each.
    return (size.n_imagery or 0) * (size.imagery_repetitions or 0) * 2


def count(size: PhantomSize) -> Counts:
    """Return work and space of betas, regions and the stimulus brick."""
    n_volumes = size.n_subjects * (size.n_trials + _count_imagery(size))
    volume = estimate_volume_bytes(size.voxel_mm, "int16")
    n_images = count_images(size)
    tables = 45.0 * n_images * (2 + size.n_subjects) / 2 + size.n_subjects * size.n_trials * 100
    n_bytes = n_volumes * volume + n_images * 3.0 * size.image_size**2 + tables
    seconds = n_volumes * (2e-4 + 3.5e-7 * count_voxels(size.voxel_mm) + volume * 2.5e-8) + n_images * 2e-3
    steps = 1 + n_images + bool(size.n_imagery) + size.n_subjects * (1 + size.n_trials + _count_imagery(size))
    return Counts(n_bytes, 0, size.n_subjects * size.n_trials * 4.0, 1 + seconds, steps)


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with their `nsd_id`; training images carry the person (`subject`) who sees them."""
    n_own = size.n_train_exemplars
    table = list_split(
        size.n_train_concepts, size.n_test_concepts, n_own * size.n_subjects, seed, f"{TRUTH}/images"
    )
    is_train = (table["split"] == "train").to_numpy()
    owner = np.where(is_train, table["exemplar"] // n_own, -1)
    design = make_design(size, seed)
    nsd_id = np.empty(len(table), int)
    nsd_id[~is_train] = design["sharedix"][0] - 1
    for subject in range(size.n_subjects):
        nsd_id[owner == subject] = design["subjectim"][subject, size.n_test_concepts :] - 1
    return table.assign(subject=owner + 1, nsd_id=nsd_id)


@lru_cache(maxsize=4)
def make_design(size: PhantomSize, seed: int) -> nsd.Design:
    """Return the arrays of ``nsd_expdesign.mat``."""
    assert size.n_runs is not None
    return nsd.make_nsd_expdesign(
        size.n_subjects,
        size.n_sessions,
        size.n_train_images + size.n_test_concepts,
        size.n_test_concepts,
        count_images(size),
        derive_seed(seed, "design"),
        n_repetitions=size.test_repetitions,
        n_runs=size.n_runs,
    )


def plan(job: Job) -> list[Unit]:
    """Return design, stimuli, each person's tables and regions, and one unit per session of betas."""
    n_images = len(job.table)
    for person in job.people:
        _check_range(job, person)
    units = [
        Unit("the experimental design", 1, lambda progress: _write_design(job)),
        Unit("the stimulus brick", n_images, lambda progress: _write_brick(job, progress)),
    ]
    if job.size.n_imagery:
        units.append(Unit("the imagery design", 1, lambda progress: _write_imagery_design(job)))
    per_session = job.size.n_trials // job.size.n_sessions
    for person in job.people:
        units.append(
            Unit(f"subject {person.name}, regions", 1, lambda progress, p=person: _write_person(job, p))
        )
        for session in range(1, job.size.n_sessions + 1):

            def write(progress: Progress, person: Person = person, session: int = session) -> list[Path]:
                return _write_session(job, person, session, progress)

            units.append(Unit(f"subject {person.name}, session {session:02d}, betas", per_session, write))
        if job.size.n_imagery:

            def imagine(progress: Progress, person: Person = person) -> list[Path]:
                return _write_imagery(job, person, progress)

            units.append(Unit(f"subject {person.name}, imagery", _count_imagery(job.size), imagine))
    return units


def _check_range(job: Job, person: Person) -> None:
    """Raise `ConfigError` before hours of work if the betas will not fit into the files."""
    rows = np.unique(np.linspace(0, len(job.table) - 1, 64).astype(int))
    # Gains of single trials reach twice their mean; noise stays within six standard deviations.
    most = 2 * float(np.abs(compute_betas(person, job.scanner, rows)).max())
    most += 6 * person.config.fmri.noise_percent
    if most > nsd.MOST_PERCENT:
        raise ConfigError(
            f"at a signal-to-noise ratio of {person.config.snr:g}, trials of subject {person.name} reach about "
            f"{most:.0f} % signal change, but the int16 of NSD end at {nsd.MOST_PERCENT:.0f} %; choose a lower snr."
        )


def _write_design(job: Job) -> list[Path]:
    design = make_design(job.size, job.config.seed)
    table = nsd.make_stim_info(design, len(job.table))
    return [nsd.write_expdesign(job.root, design), nsd.write_stim_info(job.root, table)]


def _write_brick(job: Job, progress: Progress) -> list[Path]:
    ordered = job.table.sort_values("nsd_id")["path"]
    images = progress.watch((read_image_file(job.root / path) for path in ordered), lambda image: 1)
    return [nsd.write_stimuli(job.root, images, len(ordered), size=job.size.image_size)]


def _write_person(job: Job, person: Person) -> list[Path]:
    machine, number = job.scanner, person.index + 1
    design = make_design(job.size, job.config.seed)
    responses = nsd.make_responses(design, number, job.size.n_sessions, job.config.seed)
    paths = [nsd.write_responses(job.root, number, responses)]
    ncsnr = machine.fill_volume(compute_voxel_snr(person, machine))
    paths.append(nsd.write_ncsnr(job.root, number, ncsnr, machine.affine))
    quadrants, names = label_visual_quadrants(machine)
    regions = {"prf-visualrois": (machine.fill_volume(quadrants), names)}
    for name, groups in ROIS.items():
        if name == "nsdgeneral" or name.startswith("floc-"):
            known = {i: "_".join(group) for i, group in enumerate(groups, start=1)}
            regions[name] = (machine.make_roi_volume(name), {1: name} if name == "nsdgeneral" else known)
    for name, (labels, known) in regions.items():
        paths.append(nsd.write_roi(job.root, number, name, labels, machine.mask, machine.affine, names=known))
        paths.append(job.root / "nsddata/freesurfer" / f"subj{number:02d}" / "label" / f"{name}.mgz.ctab")
    return paths


def _write_session(job: Job, person: Person, session: int, progress: Progress) -> list[Path]:
    shown = nsd.get_trial_images(make_design(job.size, job.config.seed), person.index + 1, session) - 1
    row_of = np.argsort(job.table["nsd_id"].to_numpy())
    seeds = (session - 1) * len(shown) + np.arange(len(shown))
    blocks = progress.watch(iterate_betas(person, job.scanner, row_of[shown], seeds), len)
    path = nsd.write_betas(
        job.root,
        person.index + 1,
        session,
        iterate_volumes(job.scanner, blocks),
        shape=job.scanner.mask.shape,
        n_trials=len(shown),
        affine=job.scanner.affine,
        version=VERSION,
    )
    return [path]


@lru_cache(maxsize=4)
def make_imagery_design(job: Job) -> pd.DataFrame:
    """Return the trials of NSD-Imagery: `run`, `exp`, `cue`, `stimulus_id`, `row`, `imagined`; alike for everybody.

    As in the published order of runs: each set is seen in one run, attended in one, and imagined in two.
    """
    size = job.size
    rows = job.test_rows[: size.n_imagery or 0]
    sets = np.array_split(rows, len(IMAGERY_SETS))
    half = (size.imagery_repetitions or 0) // 2
    generator = make_generator(job.config.seed, "nsd-imagery")
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
    cues = {row: chr(ord("A") + number % 26) * (number // 26 + 1) for number, row in enumerate(rows.tolist())}
    return table.assign(
        cue=table["row"].map(cues),
        stimulus_id=job.table["stimulus_id"].to_numpy()[table["row"]],
        imagined=table["exp"].str.startswith("img"),
    )


def _write_imagery_design(job: Job) -> list[Path]:
    """Write ``nsdimagery_stimuli.pkl3``, the pictures under the names it gives, and the same table in the truth."""
    design = make_imagery_design(job)
    folder = job.root / "nsddata_stimuli" / "stimuli"
    names = dict(zip(design["cue"], design["stimulus_id"], strict=True))
    content = {
        "exps": design["exp"].tolist(),
        "cues": design["cue"].tolist(),
        "image_map": {cue: names[cue] for cue in sorted(names)},
    }
    paths = [folder / "nsdimagery_stimuli.pkl3"]
    with replace_atomically(paths[0]) as temporary:
        temporary.write_bytes(b"".join(split_pickle(content, container="pickle", protocol=3)))
    (folder / "nsdimagery").mkdir(exist_ok=True)
    for row in design["row"].unique():
        source = job.root / job.table["path"].iloc[row]
        paths.append(folder / "nsdimagery" / source.name)
        with replace_atomically(paths[-1]) as temporary:
            temporary.write_bytes(source.read_bytes())
    return [*paths, write_tsv(job.root / TRUTH / "nsdimagery_trials.tsv", design)]


def _write_imagery(job: Job, person: Person, progress: Progress) -> list[Path]:
    design = make_imagery_design(job)
    seeds = _IMAGERY_SEED + np.arange(len(design))

    def iterate() -> Iterator[np.ndarray]:
        for imagined in (False, True):  # imagined runs come last
            part = design[design["imagined"] == imagined]
            yield from iterate_betas(
                person, job.scanner, part["row"].to_numpy(), seeds[part.index], imagery=imagined
            )

    folder = job.root / "nsddata_betas" / "ppdata" / f"subj{person.index + 1:02d}" / nsd.SPACE
    volumes = iterate_volumes(job.scanner, progress.watch(iterate(), len))
    path = write_volumes(
        folder / f"nsdimagery{VERSION}" / "betas_nsdimagery.nii.gz",
        nsd.scale_betas(volumes, job.scanner.mask.shape, "betas_nsdimagery.nii.gz"),
        shape=job.scanner.mask.shape,
        n_volumes=len(design),
        affine=job.scanner.affine,
        dtype=np.int16,
        t_r=nsd.T_R,
    )
    return [path]


FORMAT = Format(
    name="nsd",
    description="Natural Scenes Dataset: int16 betas per session, regions, design, stimulus brick, NSD-Imagery",
    modality="fmri",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images,
    make_machine=lambda size: make_fmri_machine(size.voxel_mm or 0, nsd.T_R),
    plan=plan,
    n_imagery_sets=len(IMAGERY_SETS),
)
