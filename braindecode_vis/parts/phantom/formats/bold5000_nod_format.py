"""BOLD5000 and NOD from images to raw BIDS runs, and BOLD5000 to the single-trial betas of its release 2.0.

BOLD5000: owns the names of its subjects (``CSI1``) and pictures (ImageNet, COCO, scenes),
``repeated_stimuli_113_list.txt``, the event tables, whose kinds (`ImgType`) begin with ``rep_`` for the repeated
pictures, and the files of the betas: one volume file per session, tables of regions over all sessions, and
``CSI1_imgnames.txt`` with the picture of every trial. The repeated pictures are the test pictures. One of their
presentations has no mark ``rep_``, as in the published tables. A further task, ``imagery``, which the published data
set does not have, has trials in which subjects imagine test pictures from a description; its form is ours.

NOD: owns its two experiments. Sessions ``imagenet01``... show the training images once each; one session ``coco`` shows
the test images again and again, with blanks (1000) and changes of the fixation point (2000) between them. Their tables
name the picture in different columns, and the number in `trial_type` is a class in one and a picture in the other.

References
----------
.. [1] Chang, N. et al. (2019). BOLD5000, a public fMRI dataset while viewing 5000 visual images. Scientific Data 6, 49.
   https://doi.org/10.1038/s41597-019-0052-3
.. [2] Prince, J. S. et al. (2022). GLMsingle. eLife 11, e77599. https://doi.org/10.7554/eLife.77599
.. [3] Gong, Z. et al. (2023). A large-scale fMRI dataset for the visual processing of naturalistic scenes. Scientific
   Data 10, 559. https://doi.org/10.1038/s41597-023-02471-x
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.datasets.bold5000 import IMAGERY_TASK, KINDS, LAYOUT, LIST, STIMULI, VERSION
from braindecode_vis.datasets.drawn.images import name_imagenet
from braindecode_vis.parts.phantom.bold_signal import iterate_betas
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
)
from braindecode_vis.parts.phantom.formats.bids_eeg import (
    TrialTiming,
    check_sessions,
    expect_run_s,
    list_run_units,
    make_design,
)
from braindecode_vis.parts.phantom.formats.file_writers import (
    write_json_file,
    write_text,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.parts.phantom.formats.raw_fmri import (
    estimate_raw_volume,
    estimate_seconds,
    write_raw_run,
)
from braindecode_vis.parts.phantom.scanner import (
    count_voxels,
    estimate_volume_bytes,
    iterate_volumes,
    make_scanner,
)
from braindecode_vis.parts.phantom.sizes import PhantomSize

T_R = 2.0  # of both data sets [1]_ [3]_
# One second of picture, nine seconds of fixation [1]_.
TIMING = TrialTiming(mean=10.0, jitter=0.05, stimulus=1.0, first=6.0, tail=14.0)
TASK = "5000scenes"
_USES = ("n_runs", "voxel_mm", "n_imagery", "imagery_repetitions")
_PRESENTED = f"{STIMULI}/Scene_Stimuli/Presented_Stimuli"
_FOLDERS = {"imagenet": "ImageNet", "coco": "COCO", "scenes": "Scene"}
ROIS = {"EarlyVis": ("V1", "V2", "V3"), "LOC": ("LO",), "OPA": ("OPA",), "PPA": ("PPA",)}


def list_bold5000_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images with the `kind` and the name of each; concepts alternate between the three kinds."""
    table = list_pictures(size, seed, "")
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
    if size.n_imagery:
        imagined = np.flatnonzero(table["split"] == "test")[: size.n_imagery]
        table = table.assign(imagined=np.isin(np.arange(len(table)), imagined))
    return table.assign(
        kind=kinds,
        stimulus_id=[name.rpartition(".")[0] for name in files],
        file_name=files,
        path=[f"{_PRESENTED}/{_FOLDERS[kind]}/{name}" for kind, name in zip(kinds, files, strict=True)],
    )


def _write_repeated_list(job: PhantomJob, progress: Progress) -> list[Path]:
    repeated = job.table["file_name"].iloc[job.test_rows]
    text = "".join(f"{name}\n" for name in repeated)
    return [write_text(job.root / STIMULI / "Scene_Stimuli" / LIST, text)]


def name_subject(person: Person) -> str:
    """Return ``CSI1`` for the first subject."""
    return f"CSI{person.index + 1}"


def _write_description(
    job: PhantomJob, title: str, version: str, names: Sequence[str], progress: Progress
) -> list[Path]:
    people = pd.DataFrame({"participant_id": [f"sub-{name}" for name in names]})
    content = {"Name": f"braindecode_vis phantom of {title}", "BIDSVersion": version, "License": "CC0"}
    return [
        write_json_file(job.root / "dataset_description.json", content),
        write_tsv(job.root / "participants.tsv", people),
    ]


# --- BOLD5000: raw -------------------------------------------------------------------------------------------------


def count_bold5000_raw(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    n_volumes = expect_run_s(size, TIMING) / T_R
    n_bytes = (
        n_runs * (n_volumes * estimate_raw_volume(size.voxel_mm) + 700)
        + 130 * size.n_subjects * size.n_trials
    )
    seconds = 1 + n_runs * estimate_seconds(size.voxel_mm, n_volumes)
    n_steps = 2 + n_runs * max(1, round(n_volumes))
    # One run of imagery for each repetition of all imagined pictures.
    n_times = size.n_subjects * (size.imagery_repetitions or 0)
    n_more = n_times * _count_imagery_volumes(size)
    n_bytes += n_more * estimate_raw_volume(size.voxel_mm) + 130 * n_times * (size.n_imagery or 0)
    seconds += n_times * estimate_seconds(size.voxel_mm, n_more / max(1, n_times))
    return Counts(n_bytes, 0, (n_runs * n_volumes + n_more) * T_R, seconds, n_steps + round(n_more))


def plan_bold5000_raw(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per run."""
    names = [name_subject(person) for person in job.subjects]
    return [
        Unit("the files of the data set", 1, partial(_write_description, job, "BOLD5000", "1.0.2", names)),
        Unit("the list of repeated pictures", 1, partial(_write_repeated_list, job)),
        *list_run_units(job, TIMING, _write_bold5000_run, step_s=T_R, name=name_subject),
        *[
            Unit(
                f"subject {name_subject(person)}, imagery run {run:02d}", round(_count_imagery_volumes(job.size)),
                partial(_write_imagery_run, job, person, run),
            )
            for person in job.subjects
            for run in range(1, (job.size.imagery_repetitions or 0) + 1)
        ],
    ]  # fmt: skip


def _count_imagery_volumes(size: PhantomSize) -> float:
    n_imagery = size.n_imagery or 0
    return (TIMING.first + (n_imagery - 1) * TIMING.mean + TIMING.tail) / T_R if n_imagery else 0.0


def _write_imagery_run(job: PhantomJob, person: Person, run: int, progress: Progress) -> list[Path]:
    """Write a run in which every imagined picture is imagined once, in a session after the others."""
    generator = make_generator(job.config.seed, "bold5000 imagery", person.index, run)
    rows = generator.permutation(np.flatnonzero(job.table["imagined"]))
    onset = TIMING.first + TIMING.mean * np.arange(len(rows))
    trials = pd.DataFrame({"onset": onset, "row": rows})
    place = (name_subject(person), f"{job.size.n_sessions + 1:02d}", IMAGERY_TASK, run)
    events = pd.DataFrame(
        {
            "onset": onset, "duration": TIMING.stimulus, "ImgName": job.table["file_name"].to_numpy()[rows],
            "ImgType": IMAGERY_TASK,
        }
    )  # fmt: skip
    return write_raw_run(
        job, person, place, trials, events, TIMING.stimulus, TIMING.tail, progress, imagery=True
    )


def _write_bold5000_run(
    job: PhantomJob, person: Person, session: int, run: int, progress: Progress
) -> list[Path]:
    design = make_design(job, person.index, TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    place = (name_subject(person), f"{session:02d}", TASK, run)
    shown = job.table.iloc[trials["row"].to_numpy()]
    onset = trials["onset"].to_numpy()
    kinds = shown["kind"].to_numpy().astype(object)
    # The third presentation of a repeated picture has no mark, as in some published tables.
    marked = (shown["split"] == "test").to_numpy() & (trials["repetition"].to_numpy() != 2)
    events = pd.DataFrame(
        {
            "onset": onset, "duration": TIMING.stimulus, "Subj": person.index + 1, "Sess": trials["session"].to_numpy(),
            "Run": trials["run"].to_numpy(), "Trial": np.arange(1, len(trials) + 1),
            "ImgName": shown["file_name"].to_numpy(), "ImgType": np.where(marked, "rep_" + kinds, kinds),
            "StimOn(s)": onset, "StimOff(s)": onset + TIMING.stimulus, "Response": 1, "RT": 2.5,
            "stim_file": shown["file_name"].to_numpy(),
        }
    )  # fmt: skip
    return write_raw_run(job, person, place, trials, events, TIMING.stimulus, TIMING.tail, progress)


# --- BOLD5000: betas -----------------------------------------------------------------------------------------------


def count_bold5000_betas(size: PhantomSize) -> Counts:
    """Return work and space of volumes and tables."""
    n_trials = size.n_subjects * size.n_trials
    n_voxels = count_voxels(size.voxel_mm)
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    # About a tenth of the voxels is in the tables, in double precision; a name needs 25 bytes.
    n_bytes = n_trials * (volume + 0.8 * n_voxels + 25) + size.n_subjects * (0.03 * n_voxels + 500)
    seconds = 1 + n_trials * (2e-4 + 3.5e-7 * n_voxels + volume * 2.5e-8)
    return Counts(n_bytes, 0, n_trials * TIMING.mean, seconds, 1 + n_trials)


def plan_bold5000_betas(job: PhantomJob) -> list[Unit]:
    """Return the list of repeated pictures, and one unit per subject."""
    units = [Unit("the list of repeated pictures", 1, partial(_write_repeated_list, job))]
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
            # The tables of regions are written in the same pass as the volumes.
            kept.append(block[:, wanted])
            yield block

    folder = job.root / "BOLD5000_GLMsingle_betas"
    listed = "".join(f"{name}\n" for name in names)
    paths = [write_text(LAYOUT.place(folder, "names", subject=subject), listed)]
    paths.append(write_volume(LAYOUT.place(folder, "mask", subject=subject), scanner.mask, scanner.affine))
    for _, rows in design.groupby("session"):
        blocks = progress.watch(iterate(rows), len)
        labels = {"subject": subject, "betas": VERSION, "session": int(rows["session"].iloc[0])}
        path = LAYOUT.place(folder, "volumes", **labels)
        volumes = iterate_volumes(scanner, blocks)
        write_volumes(path, volumes, shape=scanner.mask.shape, n_volumes=len(rows), affine=scanner.affine)
        paths.append(path)
    betas = np.concatenate(kept)  # (n_trials, voxels of all regions): about a tenth of the cortex
    folder, start = job.root / "BOLD5000_GLMsingle_ROI_betas" / "py", 0
    for name, voxels in members.items():
        table = betas[:, start : start + len(voxels)]
        paths.append(LAYOUT.write(folder, "rois", {"betas": table}, subject=subject, betas=VERSION, roi=name))
        start += len(voxels)
    return paths


# CSI1 to CSI4, and test pictures that are shown several times.
_LIMITS = {"n_subjects": (1, 4), "test_repetitions": (2, np.inf)}
BOLD5000_RAW = Format(
    name="bold5000",
    description="BOLD5000: raw BIDS runs of whole heads, event tables, the list of repeated pictures",
    modality="fmri",
    uses=_USES,
    duration_s=TIMING.stimulus,
    limits=_LIMITS,
    check=partial(check_sessions, whole=False),
    count=count_bold5000_raw,
    list_images=list_bold5000_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_bold5000_raw,
    ongoing_percent=0.0,
)
BOLD5000_BETAS = Format(
    name="bold5000-betas",
    description="BOLD5000 release 2.0: GLMsingle betas as volumes of sessions and tables of regions",
    modality="fmri",
    uses=("voxel_mm",),
    duration_s=TIMING.stimulus,
    limits=_LIMITS,
    check=partial(check_sessions, whole=False),
    count=count_bold5000_betas,
    list_images=list_bold5000_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_bold5000_betas,
)


# --- NOD ----------------------------------------------------------------------------------------------------------

NOD_FIRST_S, NOD_TAIL_S = 4.0, 16.0
NOD_SOA_S = {"imagenet": 4.0, "coco": 3.0}  # [3]_
NOD_STIMULUS_S = {"imagenet": 1.0, "coco": 0.5}
BLANK, FIXATION = 1000, 2000
_BLANK_EVERY = 4  # pictures between two events without one


def check_nod(size: PhantomSize) -> None:
    """Raise `ConfigError` if NOD cannot have this size."""
    runs = size.n_sessions * (size.n_runs or 1)
    n_tests = size.n_test_concepts * size.test_repetitions
    if runs > size.n_train_images or (size.n_runs or 1) > n_tests:
        raise ConfigError(
            f"NOD shows its {size.n_train_images} ImageNet pictures in n_sessions x n_runs = {runs} runs, and its test "
            "pictures in n_runs runs: there must not be more runs than pictures."
        )


def list_nod_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``stimuli``: ``imagenet/n01440037/...JPEG`` and ``coco/000000000031.jpg``."""
    table = list_pictures(size, seed, "")
    synsets, names = name_imagenet(table)
    numbers = [f"{31 * int(concept) + 31:012d}" for concept in table["concept_index"]]
    train = (table["split"] == "train").to_numpy()
    shown = [
        f"imagenet/{synset}/{name}.JPEG" if is_train else f"coco/{number}.jpg"
        for is_train, synset, name, number in zip(train, synsets, names, numbers, strict=True)
    ]
    return table.assign(
        shown=shown,
        stimulus_id=np.where(train, names, numbers),
        file_name=[name.rpartition("/")[2] for name in shown],
        path=[f"stimuli/{name}" for name in shown],
    )


def _list_nod_runs(size: PhantomSize) -> list[tuple[str, str, int]]:
    """Return session, task and number of every run of a subject."""
    runs = range(1, (size.n_runs or 1) + 1)
    sessions = [(f"imagenet{n:02d}", "imagenet") for n in range(1, size.n_sessions + 1)]
    return [(session, task, run) for session, task in [*sessions, ("coco", "coco")] for run in runs]


def _expect_nod_volumes(size: PhantomSize, task: str) -> float:
    if task == "imagenet":
        n = size.n_train_images / (size.n_sessions * (size.n_runs or 1))
    else:
        n = size.n_test_concepts * size.test_repetitions / (size.n_runs or 1) * (1 + 1 / _BLANK_EVERY)
    return (NOD_FIRST_S + (n - 1) * NOD_SOA_S[task] + NOD_TAIL_S) / T_R


def count_nod(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    volumes = [_expect_nod_volumes(size, task) for _, task, _ in _list_nod_runs(size)]
    n_volumes = size.n_subjects * sum(volumes)
    n_bytes = n_volumes * estimate_raw_volume(size.voxel_mm) + size.n_subjects * (
        600 * len(volumes) + 90 * size.n_trials
    )
    n_steps = 1 + size.n_subjects * sum(max(1, round(n)) for n in volumes)
    return Counts(n_bytes, 0, n_volumes * T_R, 1 + estimate_seconds(size.voxel_mm, n_volumes), n_steps)


@lru_cache(maxsize=4)
def make_nod_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return every event of a subject: `session`, `task`, `run`, `onset` (s), `row` of the image (-1: none), `kind`.

    `kind` is ``picture``, ``blank`` or ``fixation``.
    """
    size = job.size
    generator = make_generator(job.config.seed, "nod", subject)
    n_runs = size.n_runs or 1
    train = np.array_split(
        generator.permutation(np.flatnonzero(job.table["split"] == "train")), size.n_sessions * n_runs
    )
    # All test pictures are shown once before any is repeated.
    tests = np.concatenate([generator.permutation(job.test_rows) for _ in range(size.test_repetitions)])
    pieces = iter([*train, *np.array_split(tests, n_runs)])
    parts = []
    for session, task, run in _list_nod_runs(size):
        rows = next(pieces)
        kinds = ["picture"] * len(rows)
        if task == "coco":
            # Blanks and fixation changes alternate after every few pictures.
            for number, place in enumerate(range(_BLANK_EVERY, len(rows) + 1, _BLANK_EVERY)):
                # Each insertion moves the later positions by one.
                kinds.insert(place + number, ("blank", "fixation")[number % 2])
        shown = np.full(len(kinds), -1)
        shown[[kind == "picture" for kind in kinds]] = rows
        onset = NOD_FIRST_S + NOD_SOA_S[task] * np.arange(len(kinds))
        parts.append(
            pd.DataFrame(
                {"session": session, "task": task, "run": run, "onset": onset, "row": shown, "kind": kinds}
            )
        )
    return pd.concat(parts, ignore_index=True)


def make_nod_events(trials: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return the event table of one run, in the columns of its experiment.

    Parameters
    ----------
    trials : DataFrame
        `task`, `onset` (s), `row` of the image (-1 if there is none) and `kind`.
    table : DataFrame
        The images: `shown`, their paths below ``stimuli``, and `concept_index`.
    """
    task = trials["task"].iloc[0]
    rows = trials["row"].to_numpy()
    there = rows >= 0
    shown = np.where(there, table["shown"].to_numpy(object)[rows], None)
    first = table["concept_index"].to_numpy(float) + 1
    number = np.select(
        [there, (trials["kind"] == "blank").to_numpy()], [first[rows], BLANK], FIXATION
    ).astype(float)
    columns = {
        "onset": trials["onset"].to_numpy(), "duration": NOD_STIMULUS_S[task], "trial_type": number,
        "response": 0.0, "response_time": 0.0, "stim_file" if task == "imagenet" else "condition": shown,
    }  # fmt: skip
    return pd.DataFrame(columns)


def plan_nod(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per run."""
    names = [person.name for person in job.subjects]
    units = [Unit("the files of the data set", 1, partial(_write_description, job, "NOD", "1.7.0", names))]
    for person in job.subjects:
        for session, task, run in _list_nod_runs(job.size):
            n_steps = max(1, round(_expect_nod_volumes(job.size, task)))
            name = f"subject {person.name}, session {session}, run {run:02d}"
            units.append(Unit(name, n_steps, partial(_write_nod_run, job, person, session, run)))
    return units


def _write_nod_run(job: PhantomJob, person: Person, session: str, run: int, progress: Progress) -> list[Path]:
    design = make_nod_design(job, person.index)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    task = trials["task"].iloc[0]
    place = (person.name, session, task, run)
    events = make_nod_events(trials, job.table)
    seen = trials[trials["kind"] == "picture"]
    # The run continues after its last event, which may be a blank.
    tail = NOD_TAIL_S + trials["onset"].iloc[-1] - seen["onset"].iloc[-1]
    return write_raw_run(job, person, place, seen, events, NOD_STIMULUS_S[task], tail, progress)


NOD = Format(
    name="nod",
    description="Natural Object Dataset: raw BIDS runs of its ImageNet and COCO experiments",
    modality="fmri",
    uses=("n_runs", "voxel_mm"),
    duration_s=NOD_STIMULUS_S["imagenet"],
    limits={"train_repetitions": (1, 1)},
    check=check_nod,
    count=count_nod,
    list_images=list_nod_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_nod,
    ongoing_percent=0.0,
)
