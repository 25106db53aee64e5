"""The Natural Scenes Dataset (NSD) from images to betas, as its bucket lays it out, at a volume of any size.

Owns the experimental design (``nsd_expdesign.mat``, ``nsd_stim_info_merged.csv``, ``responses.tsv``), which image has
which `nsdId`, the betas with their noise ceiling, the regions of interest, the stimulus brick and NSD-Imagery. Betas
are simulated as such (percent signal change of single trials), without time series. The stimulus list of NSD-Imagery
has the keys that readers ask for (`exps`, `cues`, `image_map`); attention trials show the same pictures as vision
trials.

Traps that are kept: betas are int16 = percent signal change x 300; ``73KID`` and everything in the .mat file
count from 1, `nsdId` from 0; regions are -1 outside the cortex.

References
----------
.. [1] Allen, E. J. et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and artificial
   intelligence. Nature Neuroscience 25, 116-126. https://doi.org/10.1038/s41593-021-00962-x
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError, check_option
from braindecode_vis.phantom.bold_signal import compute_betas, compute_voxel_snr, iterate_betas
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import TRUTH, Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.phantom.formats.file_writers import (
    check_block,
    check_count,
    write_csv,
    write_text,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.phantom.formats.pickles import split_pickle
from braindecode_vis.phantom.scanner import (
    GRIDS,
    ROIS,
    count_voxels,
    estimate_volume_bytes,
    iterate_volumes,
    label_visual_quadrants,
    make_scanner,
)
from braindecode_vis.phantom.sizes import PhantomSize, check_imagery, check_numbers, divide
from braindecode_vis.phantom.stimuli.images import list_split
from braindecode_vis.seeds import derive_seed, make_generator
from braindecode_vis.stimuli import read_image_file
from braindecode_vis.store import replace_atomically

USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions")
VERSION = "betas_fithrf_GLMdenoise_RR"
STIMULUS_S = 3.0
IMAGERY_SETS = ("A", "B", "C")
_EXPS = ("vis{}", "att{}", "img{}_1", "img{}_2")
_IMAGERY_SEED = 1 << 40  # trial names of NSD-Imagery lie beyond those of the main experiment
SCALE = 300  # int16 betas are percent signal change times this [1]_
MOST_PERCENT = np.iinfo(np.int16).max / SCALE
"""The largest signal change that the files can hold."""
T_R = 4 / 3  # of the 1.8 mm preparation, which upsampled the measured 1.6 s
SPACE = "func1pt8mm"
BETA_VERSIONS = ("betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR")
BEHAVIOUR_COLUMNS = (
    "SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID", "TIME", "ISOLD", "ISCORRECT", "RT", "CHANGEMIND",
    "MEMORYRECENT", "MEMORYFIRST", "ISOLDCURRENT", "ISCORRECTCURRENT", "TOTAL1", "TOTAL2", "BUTTON",
    "MISSINGDATA",
)  # fmt: skip
Design = dict[str, np.ndarray]


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
    """Return the number of images: those that every subject sees, and each person's own."""
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
    # Each subject's own images are exemplars of the same training concepts, a block of exemplars a subject.
    n_own = size.n_train_exemplars
    table = list_split(
        size.n_train_concepts, size.n_test_concepts, n_own * size.n_subjects, seed, f"{TRUTH}/images"
    )
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
    """Return design, stimuli, each person's tables and regions, and one unit per session of betas."""
    n_images = len(job.table)
    # Before hours of work: will the betas fit into the files?
    rows = np.unique(np.linspace(0, n_images - 1, 64).astype(int))
    for person in job.subjects:
        # Gains of single trials reach twice their mean; noise stays within six standard deviations.
        most = 2 * float(np.abs(compute_betas(person, job.scanner, rows)).max())
        most += 6 * person.config.fmri.noise_percent
        if most > MOST_PERCENT:
            raise ConfigError(
                f"at a signal-to-noise ratio of {person.config.snr:g}, trials of subject {person.name} reach about "
                f"{most:.0f} % signal change, but the int16 of NSD end at {MOST_PERCENT:.0f} %; choose a lower snr."
            )

    def write_design_files(progress: Progress) -> list[Path]:
        design = make_design(job.size, job.config.seed)
        return [
            write_expdesign(job.root, design),
            write_stim_info(job.root, make_stim_info(design, n_images)),
        ]

    def write_brick(progress: Progress) -> list[Path]:
        ordered = job.table.sort_values("nsd_id")["path"]
        images = progress.watch((read_image_file(job.root / path) for path in ordered), lambda image: 1)
        return [write_stimuli(job.root, images, n_images, size=job.size.image_size)]

    units = [
        Unit("the experimental design", 1, write_design_files),
        Unit("the stimulus brick", n_images, write_brick),
    ]
    if job.size.n_imagery:
        units.append(Unit("the imagery design", 1, lambda progress: _write_imagery_design(job)))
    per_session = job.size.n_trials // job.size.n_sessions
    for person in job.subjects:
        who = f"subject {person.name}"
        units.append(Unit(f"{who}, regions", 1, partial(_write_person, job, person)))
        for session in range(1, job.size.n_sessions + 1):
            write = partial(_write_session, job, person, session)
            units.append(Unit(f"{who}, session {session:02d}, betas", per_session, write))
        if job.size.n_imagery:
            units.append(
                Unit(f"{who}, imagery", _count_imagery(job.size), partial(_write_imagery, job, person))
            )
    return units


def _write_person(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    scanner, number = job.scanner, person.index + 1
    design = make_design(job.size, job.config.seed)
    responses = make_responses(design, number, job.size.n_sessions, job.config.seed)
    paths = [write_responses(job.root, number, responses)]
    ncsnr = scanner.fill_volume(compute_voxel_snr(person, scanner))
    paths.append(write_ncsnr(job.root, number, ncsnr, scanner.affine))
    # The published file tells upper from lower field in V1 to V3: seven labels.
    quadrants, names = label_visual_quadrants(scanner)
    regions = {"prf-visualrois": (scanner.fill_volume(quadrants), names)}
    for name, groups in ROIS.items():
        if name == "nsdgeneral" or name.startswith("floc-"):
            known = {i: "_".join(group) for i, group in enumerate(groups, start=1)}
            regions[name] = (scanner.make_roi_volume(name), {1: name} if name == "nsdgeneral" else known)
    for name, (labels, known) in regions.items():
        paths.append(write_roi(job.root, number, name, labels, scanner.mask, scanner.affine, names=known))
        paths.append(job.root / "nsddata/freesurfer" / f"subj{number:02d}" / "label" / f"{name}.mgz.ctab")
    return paths


def _write_session(job: PhantomJob, person: Person, session: int, progress: Progress) -> list[Path]:
    shown = get_trial_images(make_design(job.size, job.config.seed), person.index + 1, session) - 1
    # Rows of the drive in the order of nsdId: the inverse of the column.
    row_of = np.argsort(job.table["nsd_id"].to_numpy())
    # Trials are named over all sessions, so that a session can be written alone and gives the same numbers.
    seeds = (session - 1) * len(shown) + np.arange(len(shown))
    blocks = progress.watch(iterate_betas(person, job.scanner, row_of[shown], seeds), len)
    path = write_betas(
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
    # A letter a picture, as on the screen; doubled after Z.
    cues = {row: chr(ord("A") + number % 26) * (number // 26 + 1) for number, row in enumerate(rows.tolist())}
    return table.assign(
        cue=table["row"].map(cues),
        stimulus_id=job.table["stimulus_id"].to_numpy()[table["row"]],
        imagined=table["exp"].str.startswith("img"),
    )


def _write_imagery_design(job: PhantomJob) -> list[Path]:
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


def _write_imagery(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    design = make_imagery_design(job)
    seeds = _IMAGERY_SEED + np.arange(len(design))

    def iterate() -> Iterator[np.ndarray]:
        for imagined in (False, True):  # imagined runs come last
            part = design[design["imagined"] == imagined]
            yield from iterate_betas(
                person, job.scanner, part["row"].to_numpy(), seeds[part.index], imagery=imagined
            )

    folder = job.root / "nsddata_betas" / "ppdata" / f"subj{person.index + 1:02d}" / SPACE
    volumes = iterate_volumes(job.scanner, progress.watch(iterate(), len))
    path = write_volumes(
        folder / f"nsdimagery{VERSION}" / "betas_nsdimagery.nii.gz",
        scale_betas(volumes, job.scanner.mask.shape, "betas_nsdimagery.nii.gz"),
        shape=job.scanner.mask.shape,
        n_volumes=len(design),
        affine=job.scanner.affine,
        dtype=np.int16,
        t_r=T_R,
    )
    return [path]


def make_nsd_expdesign(
    n_subjects: int = 8,
    n_sessions: int = 40,
    images_per_subject: int = 10000,
    n_shared: int = 1000,
    n_images: int = 73000,
    seed: int = 0,
    *,
    n_repetitions: int = 3,
    n_runs: int = 12,
) -> Design:
    """Return the arrays of ``nsd_expdesign.mat``, everything counted from 1.

    `masterordering` gives for each trial the column of `subjectim`; columns 1 to `n_shared` are the same
    images in all subjects (`sharedix`, ascending), the others are each subject's own.

    Returns
    -------
    dict
        `masterordering` uint16 (1, n_trials), `subjectim` int32 (n_subjects, images_per_subject), `sharedix`
        int32 (1, n_shared), `basiccnt` uint16 (3, n_sessions): images shown once, twice, three times within a
        session, `stimpattern` uint8 (n_sessions, n_runs, n_slots): which slots hold a picture. Types and
        shapes as `scipy.io.loadmat` gives them for the published file.

    Raises
    ------
    ConfigError
        If the sizes do not fit together.

    Examples
    --------
    >>> design = make_nsd_expdesign(2, 3, images_per_subject=20, n_shared=4, n_images=40, n_runs=2)
    >>> {key: value.shape for key, value in design.items()}["masterordering"]
    (1, 60)
    """
    n_own = images_per_subject - n_shared
    n_trials = images_per_subject * n_repetitions
    if min(n_subjects, n_sessions, n_shared, n_runs) < 1 or n_own < 0 or n_trials % n_sessions:
        raise ConfigError(
            f"{images_per_subject} images x {n_repetitions} do not divide into {n_sessions} sessions, "
            f"or hold no {n_shared} shared ones."
        )
    if n_shared + n_subjects * n_own > n_images or n_trials // n_sessions < n_runs:
        raise ConfigError(
            f"{n_subjects} subjects need {n_shared + n_subjects * n_own} images, but there are {n_images}; "
            f"{n_trials // n_sessions} trials a session must fill {n_runs} runs."
        )
    rng = make_generator(seed, "nsd", "expdesign")
    ids = rng.permutation(n_images).astype(np.int32) + 1
    shared = np.sort(ids[:n_shared])
    own = ids[n_shared : n_shared + n_subjects * n_own].reshape(n_subjects, n_own)
    subjectim = np.concatenate([np.tile(shared, (n_subjects, 1)), own], axis=1).astype(np.int32)
    # Subjects see their images in one common order of places, as in the published design.
    order = _order_trials(images_per_subject, n_repetitions, n_sessions, rng)
    counts = np.zeros((3, n_sessions), dtype=np.uint16)
    for session, shown in enumerate(order.reshape(n_sessions, -1)):
        within = np.unique(shown, return_counts=True)[1]
        counts[:, session] = [(within == k).sum() for k in (1, 2, 3)]
    return {
        "masterordering": order[None].astype(np.uint16),
        "basiccnt": counts,
        "sharedix": shared[None].astype(np.int32),
        "subjectim": subjectim,
        "stimpattern": _place_blanks(n_trials // n_sessions, n_sessions, n_runs, rng),
    }


def _order_trials(n_images: int, n_repetitions: int, n_sessions: int, rng: np.random.Generator) -> np.ndarray:
    """Return the image of each trial, numbered from 1; three fifths of the showings of one lie close together.

    Share and spread (0.25 sessions) give the counts of the published design: per session 436 images shown
    once, 106 twice, 34 three times, and now and then an image that follows itself.
    """
    centre = rng.uniform(0, n_sessions, (n_images, 1))
    close = centre + rng.normal(0, 0.25, (n_images, n_repetitions))
    anywhere = rng.uniform(0, n_sessions, (n_images, n_repetitions))
    when = np.where(rng.random((n_images, n_repetitions)) < 0.6, close, anywhere) % n_sessions
    return np.repeat(np.arange(1, n_images + 1), n_repetitions)[np.argsort(when.ravel(), kind="stable")]


def _place_blanks(per_session: int, n_sessions: int, n_runs: int, rng: np.random.Generator) -> np.ndarray:
    """Return which slots hold a picture: runs start with 3 blanks, end with 4, and hold a few between."""
    # Runs of 63 and 62 trials take turns, as in the published file.
    sizes = np.diff(-(-np.arange(n_runs + 1) * per_session // n_runs))
    n_slots = int(sizes.max()) + 12
    pattern = np.zeros((n_sessions, n_runs, n_slots), dtype=np.uint8)
    for session in range(n_sessions):
        for run, size in enumerate(sizes):
            pattern[session, run, 3 + np.sort(rng.choice(n_slots - 7, size, replace=False))] = 1
    return pattern


def get_trial_images(design: Design, subject: int, session: int) -> np.ndarray:
    """Return the 1-based 73k image of each trial of a session; subject and session count from 1."""
    n_sessions = design["stimpattern"].shape[0]
    shown = design["masterordering"].reshape(n_sessions, -1)[session - 1]
    return design["subjectim"][subject - 1, shown.astype(int) - 1]


def write_expdesign(root: Path, design: Design) -> Path:
    """Write ``nsddata/experiments/nsd/nsd_expdesign.mat``, MATLAB 5."""
    from scipy.io import savemat

    path = root / "nsddata" / "experiments" / "nsd" / "nsd_expdesign.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        with temporary.open("wb") as file:
            savemat(file, design, do_compression=True)
        with temporary.open("r+b") as file:  # the free text of the header holds the time
            file.write(b"MATLAB 5.0 MAT-file, Platform: MACI64, phantom".ljust(116))
    return path


def make_stim_info(design: Design, n_images: int = 73000) -> pd.DataFrame:
    """Return the table of ``nsd_stim_info_merged.csv``: one row per image, trials counted from 1, 0 for never."""
    n_subjects = len(design["subjectim"])
    identity = np.arange(n_images)
    table = pd.DataFrame(
        {
            "cocoId": identity + 100000,  # phantom images are no COCO images: numbers of their own
            "cocoSplit": np.where(identity % 25, "train2017", "val2017"),
            "cropBox": "(0.0, 0.0, 0.0, 0.0)",
            "loss": 0.0,
            "nsdId": identity,
            "flagged": False,
            "BOLD5000": False,
            "shared1000": np.isin(identity + 1, design["sharedix"]),
        }
    )
    order = design["masterordering"][0].astype(int)
    n_repetitions = np.bincount(order).max()
    trials = pd.Series(np.arange(1, len(order) + 1)).groupby(order).agg(list)
    seen = np.zeros((n_images, n_subjects), dtype=int)
    when = np.zeros((n_images, n_subjects, n_repetitions), dtype=int)
    for subject, images in enumerate(design["subjectim"] - 1):
        seen[images, subject] = 1
        when[images, subject] = np.array(trials.tolist())
    for subject in range(n_subjects):
        table[f"subject{subject + 1}"] = seen[:, subject]
    columns = {
        f"subject{s + 1}_rep{r}": when[:, s, r] for s in range(n_subjects) for r in range(n_repetitions)
    }
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def write_stim_info(root: Path, table: pd.DataFrame) -> Path:
    """Write ``nsddata/experiments/nsd/nsd_stim_info_merged.csv``; its first column has no name."""
    return write_csv(root / "nsddata" / "experiments" / "nsd" / "nsd_stim_info_merged.csv", table, index=True)


def make_responses(design: Design, subject: int, n_sessions: int, seed: int = 0) -> pd.DataFrame:
    """Return the table of ``responses.tsv``: one row a trial, with the memory task answered at 85 %."""
    rng = make_generator(seed, "nsd", "responses", subject)
    per_session = design["masterordering"].size // design["stimpattern"].shape[0]
    n_trials = per_session * n_sessions
    order = design["masterordering"][0, :n_trials].astype(int)
    runs = design["stimpattern"][:n_sessions].sum(axis=2, dtype=np.int64)
    table = pd.DataFrame(
        {"SUBJECT": subject, "SESSION": np.repeat(np.arange(1, n_sessions + 1), per_session)}
    )
    table["RUN"] = np.concatenate([np.repeat(np.arange(1, len(row) + 1), row) for row in runs])
    table["TRIAL"] = table.groupby(["SESSION", "RUN"]).cumcount() + 1
    table["73KID"] = design["subjectim"][subject - 1, order - 1]
    table["10KID"] = order
    slots = np.concatenate(
        [np.flatnonzero(run) for session in design["stimpattern"][:n_sessions] for run in session]
    )
    # Slots of 4 s, runs of 330 s with their pause, sessions a week apart; the file counts in days.
    clock = slots * 4 + (table["RUN"] - 1) * 330 + (table["SESSION"] - 1) * 7 * 86400
    table["TIME"] = clock / 86400
    trial = pd.Series(np.arange(n_trials))
    last, first = trial.groupby(order).shift(), trial.groupby(order).transform("first")
    table["ISOLD"] = last.notna().astype(int)
    old_now = trial.groupby([order, table["SESSION"].to_numpy()]).cumcount() > 0
    # Nearly every trial is answered, and 85 % of the answers are right: our choice.
    answered = rng.random(n_trials) < 0.98
    correct = rng.random(n_trials) < 0.85
    says_old = np.where(correct, table["ISOLD"], 1 - table["ISOLD"])
    table["ISCORRECT"] = np.where(answered, correct, np.nan)
    table["RT"] = np.where(answered, rng.uniform(500, 1500, n_trials).round(2), np.nan)
    table["CHANGEMIND"] = np.where(answered, 0.0, np.nan)
    table["MEMORYRECENT"] = (trial - last - 1).where(last.notna())
    table["MEMORYFIRST"] = (trial - first - 1).where(last.notna())
    table["ISOLDCURRENT"] = old_now.astype(int)
    table["ISCORRECTCURRENT"] = np.where(answered, says_old == table["ISOLDCURRENT"], np.nan)
    table["TOTAL1"], table["TOTAL2"] = answered * (says_old == 0), answered * (says_old == 1)
    table["BUTTON"] = np.where(answered, says_old + 1, np.nan)
    table["MISSINGDATA"] = 0
    integers = ["TOTAL1", "TOTAL2"]
    table[integers] = table[integers].astype(int)
    return table[list(BEHAVIOUR_COLUMNS)]


def write_responses(root: Path, subject: int, table: pd.DataFrame) -> Path:
    """Write ``nsddata/ppdata/subjAA/behav/responses.tsv``."""
    path = root / "nsddata" / "ppdata" / f"subj{subject:02d}" / "behav" / "responses.tsv"
    return write_tsv(path, table, missing="NaN")


def write_betas(
    root: Path,
    subject: int,
    session: int,
    betas: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_trials: int,
    affine: np.ndarray,
    version: str = "betas_fithrf_GLMdenoise_RR",
) -> Path:
    """Write ``betas_sessionBB.nii.gz``, int16.

    Parameters
    ----------
    betas : iterable of arrays of shape `shape`
        Percent signal change, one volume a trial; multiplied by 300 and rounded.

    Raises
    ------
    DataError
        If a value does not fit into int16 (beyond 109 %), or the volumes do not fit.
    """
    check_option("beta version", version, BETA_VERSIONS)
    path = _beta_folder(root, subject, version) / f"betas_session{session:02d}.nii.gz"
    volumes = scale_betas(betas, shape, path.name)
    return write_volumes(
        path, volumes, shape=shape, n_volumes=n_trials, affine=affine, dtype=np.int16, t_r=T_R
    )


def _beta_folder(root: Path, subject: int, version: str) -> Path:
    return root / "nsddata_betas" / "ppdata" / f"subj{subject:02d}" / SPACE / version


def scale_betas(betas: Iterable[np.ndarray], shape: tuple[int, int, int], name: str) -> Iterator[np.ndarray]:
    """Yield volumes of percent signal change as the int16 that are stored in the file `name`.

    Raises
    ------
    DataError
        If a value does not fit into int16, which would come back as another number.
    """
    for trial, volume in enumerate(betas):
        scaled = np.rint(check_block(volume, shape, what=f"the betas of {name}") * SCALE)
        if np.abs(scaled).max() > np.iinfo(np.int16).max:
            raise DataError(
                f"trial {trial} of {name} reaches {np.abs(volume).max():.0f} % signal change; "
                f"int16 x {SCALE:g} ends at {MOST_PERCENT:.0f} %: lower the signal-to-noise ratio."
            )
        yield scaled.astype(np.int16)


def write_ncsnr(
    root: Path, subject: int, ncsnr: np.ndarray, affine: np.ndarray, *, version: str = BETA_VERSIONS[-1]
) -> Path:
    """Write ``ncsnr.nii.gz``, the noise-ceiling signal-to-noise ratio, beside the betas."""
    check_option("beta version", version, BETA_VERSIONS)
    return write_volume(
        _beta_folder(root, subject, version) / "ncsnr.nii.gz", ncsnr.astype(np.float32), affine
    )


def mark_outside(labels: np.ndarray, cortex: np.ndarray) -> np.ndarray:
    """Return float32 labels with -1 outside the cortex, as the published regions have."""
    return np.where(cortex, labels, -1).astype(np.float32)


def write_roi(
    root: Path,
    subject: int,
    name: str,
    labels: np.ndarray,
    cortex: np.ndarray,
    affine: np.ndarray,
    *,
    names: Mapping[int, str] | None = None,
) -> Path:
    """Write one region file, for example ``nsdgeneral``, ``prf-visualrois``, ``streams`` or ``floc-faces``.

    Parameters
    ----------
    labels : int array of shape (x, y, z)
        0 for no region, 1, 2, 3... for its regions.
    cortex : bool array of shape (x, y, z)
        Where the file is not -1.
    names
        What the labels mean; written to ``nsddata/freesurfer/subjAA/label/NAME.mgz.ctab``.
    """
    folder = root / "nsddata" / "ppdata" / f"subj{subject:02d}" / SPACE / "roi"
    path = write_volume(folder / f"{name}.nii.gz", mark_outside(labels, cortex), affine)
    if names is not None:
        lines = [f"{label} {region}" for label, region in sorted({0: "Unknown", **names}.items())]
        table = root / "nsddata" / "freesurfer" / f"subj{subject:02d}" / "label" / f"{name}.mgz.ctab"
        write_text(table, "\n".join(lines) + "\n")
    return path


def write_stimuli(root: Path, images: Iterable[np.ndarray], n_images: int, *, size: int = 425) -> Path:
    """Write ``nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5``, image by image.

    Parameters
    ----------
    images : iterable of uint8 arrays of shape (size, size, 3)
        In the order of `nsdId`.
    """
    import h5py

    path = root / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        brick = file.create_dataset(
            "imgBrick", (n_images, size, size, 3), np.uint8, chunks=(1, size, size, 3)
        )
        count = 0
        for image in images:
            check_block(image, (size, size, 3), what="NSD stimuli")
            if image.dtype != np.uint8:
                raise DataError(f"NSD stimuli are uint8, not {image.dtype}.")
            if count < n_images:
                brick[count] = image
            count += 1
        check_count(count, n_images, what="the stimulus brick", unit="images")
    return path


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
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan,
    n_imagery_sets=len(IMAGERY_SETS),
)
