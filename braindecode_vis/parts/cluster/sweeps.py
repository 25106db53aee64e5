"""Sends a sweep as one array of jobs: finds missing runs, and collects the results when the jobs have ended.

A run is missing unless it was sealed, which its job does in the end, for the same settings, inputs and stages, and what
it wrote is still there as it was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.config import RunConfig, check_files, read_config
from braindecode_vis.parts.cluster.launching import refuse_processes
from braindecode_vis.parts.cluster.submitting import (
    Cluster,
    SentJob,
    Task,
    check_cluster,
    read_jobs,
    send,
    send_alone,
)
from braindecode_vis.parts.cluster.watching import JobState, find_states, wait_for_jobs
from braindecode_vis.parts.studies.sweep import (
    NOT_YET,
    Combination,
    find_others,
    hold_sweep,
    list_consents,
    make_folders,
    plan_sweep,
    read_list,
    write_tables,
)
from braindecode_vis.pipeline.runs import (
    STAGE_VERSIONS,
    ProgressListener,
    SilentListener,
    digest_config,
    read_earlier,
)

if TYPE_CHECKING:
    import pandas as pd

#: In a run folder: what was asked for when all of it was there.
SEAL = ".sealed.json"


@dataclass(frozen=True)
class SweepJobs:
    """What became of a sweep that was sent.

    Parameters
    ----------
    sent
        Jobs of this call.
    known
        Jobs of an earlier call that may still work, and were not sent again.
    n_there
        Runs that were there.
    states
        How the jobs are.
    table
        One row per score of what is there; None if nobody waited.
    """

    sent: list[SentJob]
    known: list[SentJob]
    n_there: int
    states: list[JobState]
    table: pd.DataFrame | None


def sweep_as_jobs(
    source: str,
    axes: Mapping[str, Sequence[str]],
    out: Path,
    cluster: Cluster,
    *,
    overrides: Sequence[str] = (),
    root: Path | None = None,
    wait: bool = True,
    listener: ProgressListener | None = None,
) -> SweepJobs:
    """Send every run of a sweep that is missing as a job of one array; wait, and collect what is there.

    Parameters
    ----------
    source, axes, out, overrides, root, listener
        As for `parts.studies.sweep.sweep`.
    cluster
        Where to, and what each job asks for.
    wait
        Whether to return when all have ended; local jobs that cannot all run at once are waited for anyway.

    Raises
    ------
    ConfigError
        If any combination is not valid, the folder holds other runs, or the cluster refuses the jobs; nothing was sent
        then.
    DataError
        If every run failed.
    """
    check_cluster(cluster)
    refuse_processes(cluster.settings, "each run of a sweep")
    combinations, configs = plan_sweep(source, axes, out, overrides=overrides, root=root)

    def refuse_others() -> list[Combination]:
        return find_others(source, combinations, configs, out, list(axes), overrides=overrides, root=root)

    refuse_others()  # before anything is written
    show = listener or SilentListener()

    def tell(sentence: str) -> None:
        with show.watch("sweep:") as say:
            say(0, 0, sentence)

    with hold_sweep(out, configs, show), send_alone(out, tell):
        others = refuse_others()
        _refuse_sent(combinations, configs, out)
        make_folders(combinations, configs, others, out, list(axes))
        asked = _digest_all(configs)
        stages = _list_stages(out)
        missing = [
            (combination, config, digest)
            for combination, config, digest in zip(combinations, configs, asked, strict=True)
            if not _is_there(combination.folder, config, digest, stages)
        ]
        wanted = {combination.folder.name for combination, _, _ in missing}
        jobs = [job for job in read_jobs(out) if job.name in wanted]
        active = [state for state in find_states(out, jobs) if state.is_active]
        known = [state.job for state in active]
        if known:
            tell(_describe_known(known))
        named = {job.name for job in known}
        todo = [row for row in missing if row[0].folder.name not in named]
        tasks = [
            replace(task, seal=(row[0].folder / SEAL, json.dumps({"asked": row[2]})))
            for task, row in zip(
                list_tasks([row[0] for row in todo], [row[1] for row in todo]), todo, strict=True
            )
        ]
        for combination, config, _ in missing:
            if combination.folder.name not in named:
                check_files(config)
        n_there = len(combinations) - len(missing)
        sent = []
        if tasks:
            tell(f"{n_there} of {len(combinations)} runs are finished, {len(tasks)} are sent")
            sent = send(out, tasks, cluster, wait_for=make_room(out))
    jobs = [*known, *sent]
    if not wait and jobs:
        return SweepJobs(sent, known, n_there, find_states(out, jobs), None)
    states = wait_for_jobs(out, jobs, lambda states: tell(count_states(states))) if jobs else []
    every = [*others, *combinations]
    settings = [*(read_config(other.folder) for other in others), *configs]
    return SweepJobs(sent, known, n_there, states, _collect_runs(every, settings, out, list(axes)))


def _refuse_sent(combinations: Sequence[Combination], configs: Sequence[RunConfig], out: Path) -> None:
    """Raise `ConfigError` if a run is in the queue or at work with settings that this call would rewrite."""
    active = {state.job.name: state.job for state in find_states(out, read_jobs(out)) if state.is_active}
    for combination, config in zip(combinations, configs, strict=True):
        job = active.get(combination.folder.name)
        earlier = None if job is None else read_earlier(combination.folder)
        if job is not None and earlier is not None and digest_config(earlier) != digest_config(config):
            raise ConfigError(
                f"the job {job.job_id} of {job.user} was sent for {combination.folder} with other settings; wait for "
                f"it, or end it with braindecode-vis cancel {out}."
            )


def list_tasks(combinations: Sequence[Combination], configs: Sequence[RunConfig]) -> list[Task]:
    """Return the job of each run of a sweep, in the folder of which its configuration lies."""
    return [
        Task(
            combination.folder.name,
            ["run", str(combination.folder.absolute()), *list_consents(config)],
            combination.folder / "log.txt",
            settings=digest_config(config),
        )
        for combination, config in zip(combinations, configs, strict=True)
    ]


def make_room(folder: Path) -> Callable[[Sequence[SentJob], int], None]:
    """Return what `submitting.send` calls before a local job starts."""

    def wait(sent: Sequence[SentJob], n_left: int) -> None:
        wait_for_jobs(folder, sent, n_left=n_left)

    return wait


def count_states(states: Sequence[JobState]) -> str:
    """Return how many jobs are in each state, for example ``12 done, 2 running``."""
    order = ("done", "running", "waiting", "failed", "stopped", "lost", "elsewhere", "unknown")
    names = [state.state for state in states]
    counts = ", ".join(f"{names.count(name)} {name}" for name in order if name in names) or "no jobs"
    # Why nothing goes on is worth more than a number.
    waiting = [state for state in states if state.state == "waiting" and state.reason]
    return (
        f"{counts} ({waiting[0].job.name}: {waiting[0].reason})"
        if waiting and "running" not in names
        else counts
    )


def _describe_known(known: Sequence[SentJob]) -> str:
    first = known[0]
    return (
        f"{len(known)} of the missing runs are already waiting or running, sent by {first.user} from "
        f"{first.host}; they are not sent again"
    )


def collect_sweep(out: Path) -> pd.DataFrame:
    """Return one row per score of the runs of a sweep that are there, and write its tables; nothing is computed.

    Raises
    ------
    DataError
        If the folder holds no sweep, or none of its runs is there.
    """
    keys, combinations = read_list(out)
    configs = [read_config(combination.folder) for combination in combinations]
    return _collect_runs(combinations, configs, out, keys)


def _collect_runs(
    combinations: Sequence[Combination], configs: Sequence[RunConfig], out: Path, keys: Sequence[str]
) -> pd.DataFrame:
    jobs = {state.job.name: state for state in find_states(out, read_jobs(out))}
    failures = {}
    for combination, config in zip(combinations, configs, strict=True):
        if not _was_scored(combination.folder, config):
            state = jobs.get(combination.folder.name)
            failures[combination.folder] = (
                NOT_YET if state is None else state.reason or f"its job is {state.state}"
            )
    return write_tables(combinations, failures, out, keys)


def _was_scored(folder: Path, config: RunConfig) -> bool:
    """Say whether the scores of a run folder are of these settings, and as they were written."""
    try:
        record = store.read_provenance(folder / store.PROVENANCE)
    except (OSError, DataError):
        return False
    if record.get("config") != config.model_dump(mode="json") or not (folder / "scores.json").is_file():
        return False
    return "scores.json" not in store.find_changed_results(folder)


def _is_there(folder: Path, config: RunConfig, asked: str, stages: frozenset[str]) -> bool:
    try:
        sealed = store.read_json(folder / SEAL)["asked"] == asked
        named = store.read_provenance(folder / store.PROVENANCE)["stages"] if sealed else {}
        return (
            sealed and all(s["fingerprint"] in stages for s in named.values()) and _was_scored(folder, config)
        )
    except (OSError, DataError, KeyError, TypeError, AttributeError):
        return False


def _list_stages(out: Path) -> frozenset[str]:
    """Return the fingerprints of all artifacts of the store that the runs share."""
    return frozenset(path.parent.name[-16:] for path in out.glob(f"stages/*/[!.]*/{store.PROVENANCE}"))


def _digest_all(configs: Sequence[RunConfig]) -> list[str]:
    """Return for each run a digest of its settings, its inputs and the versions of the stages."""
    inputs: dict[str, Any] = {}
    digests = []
    for config in configs:
        data = config.dataset.model_dump_json()
        if data not in inputs:  # most sweeps have one data set
            inputs[data] = config.dataset.hash_inputs()
        digests.append(
            store.hash_json(store.json_plain([config.hashed_fields(), inputs[data], STAGE_VERSIONS]))
        )
    return digests
