"""NOD from images to raw BIDS runs: ImageNet pictures once, COCO pictures several times.

Owns its two experiments. Sessions ``imagenet01``... show the training images once each; one session ``coco`` shows the
test images again and again, with blanks (1000) and changes of the fixation point (2000) between them. Their tables name
the picture in different columns, and the number in `trial_type` is a class in one and a picture in the other.

References
----------
.. [1] Gong, Z. et al. (2023). A large-scale fMRI dataset for the visual processing of naturalistic scenes. Scientific
   Data 10, 559. https://doi.org/10.1038/s41597-023-02471-x
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.phantom.formats.file_writers import write_json_file, write_tsv
from braindecode_vis.phantom.formats.raw_fmri import estimate_raw_volume, estimate_seconds, write_raw_run
from braindecode_vis.phantom.scanner import GRIDS, make_scanner
from braindecode_vis.phantom.sizes import PhantomSize, check_numbers
from braindecode_vis.phantom.stimuli.images import list_split, name_imagenet
from braindecode_vis.seeds import make_generator

T_R = 2.0
FIRST_S, TAIL_S = 4.0, 16.0
SOA_S = {"imagenet": 4.0, "coco": 3.0}  # [1]_
STIMULUS_S = {"imagenet": 1.0, "coco": 0.5}
BLANK, FIXATION = 1000, 2000
_BLANK_EVERY = 4  # pictures between two events without one


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if NOD cannot have this size."""
    check_numbers(size, "nod", ("n_runs", "voxel_mm"))
    runs = size.n_sessions * (size.n_runs or 1)
    n_tests = size.n_test_concepts * size.test_repetitions
    if size.train_repetitions != 1 or runs > size.n_train_images or (size.n_runs or 1) > n_tests:
        raise ConfigError(
            f"NOD shows each ImageNet picture once, in n_sessions x n_runs = {runs} runs of at least one of its "
            f"{size.n_train_images} pictures, and its test pictures in n_runs runs: train_repetitions "
            f"({size.train_repetitions}) must be 1, and there must not be more runs than pictures."
        )
    if size.voxel_mm not in GRIDS:
        raise ConfigError(f"voxel_mm ({size.voxel_mm}) must be from {min(GRIDS)} to {max(GRIDS)}.")


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images below ``stimuli``: ``imagenet/n01440037/...JPEG`` and ``coco/000000000031.jpg``."""
    table = list_split(size.n_train_concepts, size.n_test_concepts, size.n_train_exemplars, seed)
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


def _list_runs(size: PhantomSize) -> list[tuple[str, str, int]]:
    """Return session, task and number of every run of a person."""
    runs = range(1, (size.n_runs or 1) + 1)
    sessions = [(f"imagenet{n:02d}", "imagenet") for n in range(1, size.n_sessions + 1)]
    return [(session, task, run) for session, task in [*sessions, ("coco", "coco")] for run in runs]


def _expect_volumes(size: PhantomSize, task: str) -> float:
    if task == "imagenet":
        n = size.n_train_images / (size.n_sessions * (size.n_runs or 1))
    else:
        n = size.n_test_concepts * size.test_repetitions / (size.n_runs or 1) * (1 + 1 / _BLANK_EVERY)
    return (FIRST_S + (n - 1) * SOA_S[task] + TAIL_S) / T_R


def count(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    volumes = [_expect_volumes(size, task) for _, task, _ in _list_runs(size)]
    n_volumes = size.n_subjects * sum(volumes)
    n_bytes = n_volumes * estimate_raw_volume(size.voxel_mm) + size.n_subjects * (
        600 * len(volumes) + 90 * size.n_trials
    )
    n_steps = 1 + size.n_subjects * sum(max(1, round(n)) for n in volumes)
    return Counts(n_bytes, 0, n_volumes * T_R, 1 + estimate_seconds(size.voxel_mm, n_volumes), n_steps)


@lru_cache(maxsize=4)
def make_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    """Return every event of a person: `session`, `task`, `run`, `onset` (s), `row` of the image (-1: none), `kind`.

    `kind` is ``picture``, ``blank`` or ``fixation``.
    """
    size = job.size
    generator = make_generator(job.config.seed, "nod", subject)
    n_runs = size.n_runs or 1
    train = np.array_split(
        generator.permutation(np.flatnonzero(job.table["split"] == "train")), size.n_sessions * n_runs
    )
    tests = np.concatenate([generator.permutation(job.test_rows) for _ in range(size.test_repetitions)])
    pieces = iter([*train, *np.array_split(tests, n_runs)])
    parts = []
    for session, task, run in _list_runs(size):
        rows = next(pieces)
        kinds = ["picture"] * len(rows)
        if task == "coco":
            # Blanks and fixation changes take turns after every few pictures.
            for number, place in enumerate(range(_BLANK_EVERY, len(rows) + 1, _BLANK_EVERY)):
                kinds.insert(place + number, ("blank", "fixation")[number % 2])
        shown = np.full(len(kinds), -1)
        shown[[kind == "picture" for kind in kinds]] = rows
        onset = FIRST_S + SOA_S[task] * np.arange(len(kinds))
        parts.append(
            pd.DataFrame(
                {"session": session, "task": task, "run": run, "onset": onset, "row": shown, "kind": kinds}
            )
        )
    return pd.concat(parts, ignore_index=True)


def make_events(trials: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return the event table of one run, in the columns of its experiment.

    Parameters
    ----------
    trials : DataFrame
        `task`, `onset` (s), `row` of the image (-1 where there is none) and `kind`.
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
        "onset": trials["onset"].to_numpy(), "duration": STIMULUS_S[task], "trial_type": number,
        "response": 0.0, "response_time": 0.0, "stim_file" if task == "imagenet" else "condition": shown,
    }  # fmt: skip
    return pd.DataFrame(columns)


def plan(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per run."""

    def write_root(progress: Progress) -> list[Path]:
        people = pd.DataFrame({"participant_id": [f"sub-{person.name}" for person in job.subjects]})
        content = {"Name": "braindecode_vis phantom of NOD", "BIDSVersion": "1.7.0", "License": "CC0"}
        return [
            write_json_file(job.root / "dataset_description.json", content),
            write_tsv(job.root / "participants.tsv", people),
        ]

    units = [Unit("the files of the data set", 1, write_root)]
    for person in job.subjects:
        for session, task, run in _list_runs(job.size):
            n_steps = max(1, round(_expect_volumes(job.size, task)))
            name = f"subject {person.name}, session {session}, run {run:02d}"
            units.append(Unit(name, n_steps, partial(_write_run, job, person, session, run)))
    return units


def _write_run(job: PhantomJob, person: Person, session: str, run: int, progress: Progress) -> list[Path]:
    design = make_design(job, person.index)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    task = trials["task"].iloc[0]
    folder = job.root / f"sub-{person.name}" / f"ses-{session}" / "func"
    stem = f"sub-{person.name}_ses-{session}_task-{task}_run-{run:02d}"
    events = make_events(trials, job.table)
    seen = trials[trials["kind"] == "picture"]
    # The run goes on after its last event, which may be a blank.
    tail = TAIL_S + trials["onset"].iloc[-1] - seen["onset"].iloc[-1]
    return write_raw_run(folder, stem, job, person, seen, events, STIMULUS_S[task], tail, progress)


FORMAT = Format(
    name="nod",
    description="Natural Object Dataset: raw BIDS runs of its ImageNet and COCO experiments",
    modality="fmri",
    uses=("n_runs", "voxel_mm"),
    duration_s=STIMULUS_S["imagenet"],
    check=check,
    count=count,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan,
)
