"""BOLD5000 from images to raw BIDS runs, or to the single-trial betas of release 2.0.

Owns the names of its subjects (``CSI1``) and pictures (ImageNet, COCO, scenes), ``repeated_stimuli_113_list.txt``,
the event tables, whose kinds (`ImgType`) begin with ``rep_`` for the repeated pictures, and the files of the betas: a
volume a session, tables of regions over all sessions, and ``CSI1_imgnames.txt`` with the picture of every trial. The
repeated pictures are tested. One of their presentations lacks the mark ``rep_``, as in the published tables.

References
----------
.. [1] Chang, N. et al. (2019). BOLD5000, a public fMRI dataset while viewing 5000 visual images. Scientific Data 6, 49.
   https://doi.org/10.1038/s41597-019-0052-3
.. [2] Prince, J. S. et al. (2022). GLMsingle. eLife 11, e77599. https://doi.org/10.7554/eLife.77599
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.bold_signal import iterate_betas
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.phantom.formats.bids_eeg import (
    TrialTiming,
    check_size,
    expect_run_s,
    make_design,
)
from braindecode_vis.phantom.formats.file_writers import (
    write_json_file,
    write_text,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.phantom.formats.raw_fmri import estimate_raw_volume, estimate_seconds, write_raw_run
from braindecode_vis.phantom.scanner import count_voxels, estimate_volume_bytes, iterate_volumes, make_scanner
from braindecode_vis.phantom.sizes import PhantomSize
from braindecode_vis.phantom.stimuli.images import list_split, name_imagenet
from braindecode_vis.store import replace_atomically

T_R = 2.0
# A second of picture, nine of fixation [1]_.
TIMING = TrialTiming(mean=10.0, jitter=0.05, stimulus=1.0, first=6.0, tail=14.0)
TASK = "5000scenes"
LIST = "repeated_stimuli_113_list.txt"
STIMULI = "BOLD5000_Stimuli"
_PRESENTED = f"{STIMULI}/Scene_Stimuli/Presented_Stimuli"
KINDS = ("imagenet", "coco", "scenes")
_FOLDERS = {"imagenet": "ImageNet", "coco": "COCO", "scenes": "Scene"}
STEM = "GLMbetas-TYPED-FITHRF-GLMDENOISE-RR"
ROIS = {"EarlyVis": ("V1", "V2", "V3"), "LOC": ("LO",), "OPA": ("OPA",), "PPA": ("PPA",)}


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with the `kind` and the name of each; concepts take turns among the three kinds."""
    table = list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed)
    _, imagenet = name_imagenet(table)
    concept, exemplar = table["concept_index"].astype(int), table["exemplar"].astype(int)
    kinds = [KINDS[number % 3] for number in concept]
    names = {
        "imagenet": [f"{name}.JPEG" for name in imagenet],
        "coco": [f"COCO_train2014_{1000 * c + e:012d}.jpg" for c, e in zip(concept, exemplar, strict=True)],
        "scenes": [
            f"{name.replace('_', '')}{e + 1}.jpg" for name, e in zip(table["concept"], exemplar, strict=True)
        ],
    }
    files = [names[kind][row] for row, kind in enumerate(kinds)]
    return table.assign(
        kind=kinds,
        stimulus_id=[name.rpartition(".")[0] for name in files],
        file_name=files,
        path=[f"{_PRESENTED}/{_FOLDERS[kind]}/{name}" for kind, name in zip(kinds, files, strict=True)],
    )


def _write_root(job: PhantomJob, progress: Progress) -> list[Path]:
    repeated = job.table["file_name"].iloc[job.test_rows]
    text = "".join(f"{name}\n" for name in repeated)
    return [write_text(job.root / STIMULI / "Scene_Stimuli" / LIST, text)]


def name_subject(person: Person) -> str:
    """Return ``CSI1`` for the first person."""
    return f"CSI{person.index + 1}"


# --- raw ---------------------------------------------------------------------------------------------------------


def count_raw(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    n_volumes = expect_run_s(size, TIMING) / T_R
    n_bytes = (
        n_runs * (n_volumes * estimate_raw_volume(size.voxel_mm) + 700)
        + 130 * size.n_subjects * size.n_trials
    )
    seconds = 1 + n_runs * estimate_seconds(size.voxel_mm, n_volumes)
    return Counts(n_bytes, 0, n_runs * n_volumes * T_R, seconds, 2 + n_runs * max(1, round(n_volumes)))


def plan_raw(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per run."""

    def write_description(progress: Progress) -> list[Path]:
        people = pd.DataFrame({"participant_id": [f"sub-{name_subject(person)}" for person in job.subjects]})
        content = {"Name": "braindecode_vis phantom of BOLD5000", "BIDSVersion": "1.0.2", "License": "CC0"}
        return [
            write_json_file(job.root / "dataset_description.json", content),
            write_tsv(job.root / "participants.tsv", people),
        ]

    units = [
        Unit("the files of the data set", 1, write_description),
        Unit("the list of repeated pictures", 1, partial(_write_root, job)),
    ]
    n_steps = max(1, round(expect_run_s(job.size, TIMING) / T_R))
    for person in job.subjects:
        for session in range(1, job.size.n_sessions + 1):
            for run in range(1, (job.size.n_runs or 1) + 1):
                name = f"subject {name_subject(person)}, session {session:02d}, run {run:02d}"
                units.append(Unit(name, n_steps, partial(_write_run, job, person, session, run)))
    return units


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    design = make_design(job, person.index, TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    subject = name_subject(person)
    folder = job.root / f"sub-{subject}" / f"ses-{session:02d}" / "func"
    stem = f"sub-{subject}_ses-{session:02d}_task-{TASK}_run-{run:02d}"
    events = make_events(trials, job.table, person.index + 1)
    return write_raw_run(folder, stem, job, person, trials, events, TIMING.stimulus, TIMING.tail, progress)


def make_events(trials: pd.DataFrame, table: pd.DataFrame, subject: int) -> pd.DataFrame:
    """Return the event table of one run, in the columns of the published ones.

    Parameters
    ----------
    trials : DataFrame
        `session`, `run`, `onset` (s), `row` of the image and its `repetition`.
    table : DataFrame
        The images: `file_name`, `kind` and `split`.
    """
    shown = table.iloc[trials["row"].to_numpy()]
    onset = trials["onset"].to_numpy()
    kinds = shown["kind"].to_numpy().astype(object)
    # The third presentation of a repeated picture lacks the mark, as happens in the published tables.
    marked = (shown["split"] == "test").to_numpy() & (trials["repetition"].to_numpy() != 2)
    return pd.DataFrame(
        {
            "onset": onset, "duration": TIMING.stimulus, "Subj": subject, "Sess": trials["session"].to_numpy(),
            "Run": trials["run"].to_numpy(), "Trial": np.arange(1, len(trials) + 1),
            "ImgName": shown["file_name"].to_numpy(), "ImgType": np.where(marked, "rep_" + kinds, kinds),
            "StimOn(s)": onset, "StimOff(s)": onset + TIMING.stimulus, "Response": 1, "RT": 2.5,
            "stim_file": shown["file_name"].to_numpy(),
        }
    )  # fmt: skip


# --- betas -------------------------------------------------------------------------------------------------------


def count_betas(size: PhantomSize) -> Counts:
    """Return work and space of volumes and tables."""
    n_trials = size.n_subjects * size.n_trials
    n_voxels = count_voxels(size.voxel_mm)
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    # About a tenth of the voxels is in the tables, in double precision; a name takes 25 bytes.
    n_bytes = n_trials * (volume + 0.8 * n_voxels + 25) + size.n_subjects * (0.03 * n_voxels + 500)
    seconds = 1 + n_trials * (2e-4 + 3.5e-7 * n_voxels + volume * 2.5e-8)
    return Counts(n_bytes, 0, n_trials * TIMING.mean, seconds, 1 + n_trials)


def plan_betas(job: PhantomJob) -> list[Unit]:
    """Return the list of repeated pictures, and one unit per person."""
    units = [Unit("the list of repeated pictures", 1, partial(_write_root, job))]
    for person in job.subjects:
        name = f"subject {name_subject(person)}, betas"
        units.append(Unit(name, job.size.n_trials, partial(_write_betas, job, person)))
    return units


def _write_betas(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    scanner, subject = job.scanner, name_subject(person)
    design = make_design(job, person.index, TIMING)
    shown = job.table.iloc[design["row"].to_numpy()]
    again = (shown["split"] == "test").to_numpy() & (design["repetition"].to_numpy() > 0)
    names = np.where(again, "rep_" + shown["file_name"].to_numpy().astype(object), shown["file_name"])
    members = {
        f"{side}{name}": np.flatnonzero(
            np.isin(scanner.regions, areas) & ((scanner.positions[:, 0] < 0) == left)
        )
        for side, left in (("LH", True), ("RH", False))
        for name, areas in ROIS.items()
    }
    kept: list[np.ndarray] = []
    wanted = np.concatenate(list(members.values()))

    def iterate(rows: pd.DataFrame) -> Iterator[np.ndarray]:
        for block in iterate_betas(person, scanner, rows["row"].to_numpy(), rows.index.to_numpy()):
            kept.append(block[:, wanted])
            yield block

    folder = job.root / "BOLD5000_GLMsingle_betas"
    paths = [write_text(folder / f"{subject}_imgnames.txt", "".join(f"{name}\n" for name in names))]
    paths.append(write_volume(folder / f"{subject}_brainmask.nii.gz", scanner.mask, scanner.affine))
    for _, rows in design.groupby("session"):
        blocks = progress.watch(iterate(rows), len)
        paths.append(
            write_session(
                folder, subject, int(rows["session"].iloc[0]), iterate_volumes(scanner, blocks), len(rows),
                shape=scanner.mask.shape, affine=scanner.affine,
            )
        )  # fmt: skip
    betas = np.concatenate(kept)  # (n_trials, voxels of all regions): about a tenth of the cortex
    start = 0
    for name, voxels in members.items():
        paths.append(write_region(job.root, subject, name, betas[:, start : start + len(voxels)]))
        start += len(voxels)
    return paths


def write_session(
    folder: Path,
    subject: str,
    session: int,
    volumes: Iterable[np.ndarray],
    n_volumes: int,
    *,
    shape: tuple[int, int, int],
    affine: np.ndarray,
) -> Path:
    """Write the betas of a session, ``CSI1_GLMbetas-..._ses-01.nii.gz``: a volume a trial, percent signal change."""
    path = folder / f"{subject}_{STEM}_ses-{session:02d}.nii.gz"
    return write_volumes(path, volumes, shape=shape, n_volumes=n_volumes, affine=affine)


def write_region(root: Path, subject: str, region: str, table: np.ndarray) -> Path:
    """Write the table of one region over all sessions, (n_trials, n_voxels), ``..._allses_LHEarlyVis.npy``."""
    folder = root / "BOLD5000_GLMsingle_ROI_betas" / "py"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{subject}_{STEM}_allses_{region}.npy"
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.asarray(table, float))
    return path


def _check(name: str, uses: tuple[str, ...], size: PhantomSize) -> None:
    check_size(size, name, uses, whole=False)
    if size.n_subjects > 4 or size.test_repetitions < 2:
        raise ConfigError(
            f"BOLD5000 has the subjects CSI1 to CSI4 and shows its test pictures several times: n_subjects "
            f"({size.n_subjects}) must be at most 4, and test_repetitions ({size.test_repetitions}) at least 2."
        )


RAW = Format(
    name="bold5000",
    description="BOLD5000: raw BIDS runs of whole heads, event tables, the list of repeated pictures",
    modality="fmri",
    uses=("n_runs", "voxel_mm"),
    duration_s=TIMING.stimulus,
    check=partial(_check, "bold5000", ("n_runs", "voxel_mm")),
    count=count_raw,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_raw,
)
BETAS = Format(
    name="bold5000-betas",
    description="BOLD5000 release 2.0: GLMsingle betas as volumes of sessions and tables of regions",
    modality="fmri",
    uses=("voxel_mm",),
    duration_s=TIMING.stimulus,
    check=partial(_check, "bold5000-betas", ("voxel_mm",)),
    count=count_betas,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_betas,
)
