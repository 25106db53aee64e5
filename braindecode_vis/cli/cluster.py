"""Verbs as jobs of a cluster: the options that send a verb there, and the verbs that look after what was sent."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import Debug, Json, make_console, print_json

if TYPE_CHECKING:
    from braindecode_vis.cluster.submitting import Cluster, SentJob, Task
    from braindecode_vis.cluster.watching import JobState

ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Run as jobs: slurm, local (processes of this machine) or debug (one after the other).",
    ),
]
ClusterSet = Annotated[
    list[str] | None,
    typer.Option("--cluster-set", help="What each job asks for, for example memory=16. Repeatable."),
]
Wait = Annotated[
    bool | None,
    typer.Option("--wait/--no-wait", help="Return when the jobs have ended (default), or at once."),
]
Folder = Annotated[Path, typer.Argument(help="Folder of a run or a sweep.")]
#: Its own options, which the command of a job is given without, and whether a value follows.
_OWN = {"--cluster": True, "--cluster-set": True, "--wait": False, "--no-wait": False, "--json": False}


def on_cluster(name: str, verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb with the options that send it as a job."""
    signature = inspect.signature(verb, eval_str=True)
    added = {"cluster": ClusterName, "cluster_set": ClusterSet, "wait": Wait}

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        executor, changes, wait = (given.pop(key) for key in added)
        if executor is not None:
            _send_verb(name, given, executor, changes or [], wait)
            return
        refuse_alone(changes, wait)
        verb(**given)

    parameters = list(signature.parameters.values())
    before = next((n for n, p in enumerate(parameters) if p.name == "trust_code"), len(parameters))
    parameters[before:before] = [
        inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)
        for key, annotation in added.items()
    ]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def refuse_alone(changes: Sequence[str] | None, wait: bool | None) -> None:
    """Raise `ConfigError` for options of jobs without ``--cluster``."""
    from braindecode_vis.checks import ConfigError

    if changes or wait is not None:
        option = "--cluster-set" if changes else "--wait and --no-wait"
        raise ConfigError(f"{option} is for jobs; name where they run with --cluster, or leave it out.")


def _send_verb(
    name: str, given: dict[str, Any], executor: str, changes: Sequence[str], wait: bool | None
) -> None:
    """Send a verb as one job, or the images of a run as shares and one job that finishes them."""
    from braindecode_vis.checks import ConfigError, DataError
    from braindecode_vis.cluster.submitting import Task, check_cluster, read_cluster
    from braindecode_vis.config import check_files
    from braindecode_vis.pipeline.runs import read_scores

    if name == "analyze" and given["source"] is None:
        raise ConfigError("analyze needs a configuration, a run folder or a data set to be sent as a job.")
    settings = None
    if name == "predict":
        from braindecode_vis.pipeline.prediction_files import check_out

        folder = given["run"]
        if not (folder / "config.yaml").is_file():
            raise DataError(
                f"{folder} is no run folder: it holds no config.yaml; give the folder that run printed."
            )
        check_out(given["out"])
    elif name == "train-generator":
        folder = given["out"]
    else:
        from braindecode_vis.cli.show import find_run

        config, folder = find_run(
            given["source"], given["root"], given["out"], given["overrides"], given["subjects"]
        )
        settings = config.cluster
    cluster = read_cluster(executor, settings, changes, where=str(given.get("source") or "the run"))
    check_cluster(cluster)
    if name in ("embed", "train", "reconstruct", "run"):
        check_files(config, "report" if name == "run" else name)
    words = _strip_words(sys.argv[1:])
    log = Path(folder) / "jobs" / f"{name}.log"
    tasks, last = [Task(name, words, log)], None
    if name == "reconstruct" and given["n_workers"] is not None:
        tasks, last = _share_images(given, folder, words, tasks[0])
    states = _send_and_wait(Path(folder).absolute(), tasks, last, cluster, wait=wait is not False)
    if given["as_json"]:
        scores = read_scores(folder) if name == "run" and all(s.state == "done" for s in states) else []
        print_json(
            {"run_folder": str(folder), "scores": scores, "jobs": [_as_row(state) for state in states]}
        )
    else:
        _print_states(Path(folder), states)
    failed = [state for state in states if not state.is_active and state.state != "done"]
    if failed:
        raise DataError(f"the job {failed[-1].job.name} {failed[-1].state}: {failed[-1].reason}")


def _share_images(
    given: dict[str, Any], folder: Path, words: list[str], finish: Task
) -> tuple[list[Task], Task | None]:
    from braindecode_vis.checks import ConfigError
    from braindecode_vis.cluster.submitting import Task

    n_workers = given["n_workers"]
    if given["worker"] is not None or n_workers < 1:
        raise ConfigError(
            "a cluster numbers the shares itself; give --workers N alone, with N of at least 1."
        )
    if not (Path(folder) / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is no run folder, so there are no images to share; train a run first, for example by "
            "braindecode-vis retrieve, then name its folder."
        )
    place = next(n for n, word in enumerate(words) if word.partition("=")[0] == "--workers")
    alone = words[:place] + words[place + (1 if "=" in words[place] else 2) :]
    shares = [
        Task(
            f"share-{n}",
            [*alone, "--worker", str(n), "--workers", str(n_workers)],
            finish.log.with_name(f"share-{n}.log"),
        )
        for n in range(n_workers)
    ]
    # Whichever share finds nothing missing finishes the stage; this one does where a share was stopped.
    return shares, Task("reconstruct", alone, finish.log)


def _send_and_wait(
    folder: Path, tasks: Sequence[Task], last: Task | None, cluster: Cluster, *, wait: bool
) -> list[JobState]:
    from braindecode_vis.checks import ConfigError
    from braindecode_vis.cluster.submitting import read_jobs, send, send_alone
    from braindecode_vis.cluster.sweeps import count_states, make_room
    from braindecode_vis.cluster.watching import find_states, wait_for_jobs

    console = make_console()

    def tell(sentence: str) -> None:
        console.print(f"jobs: {sentence}", markup=False)

    refuse_leaving(cluster, len(tasks) + (last is not None), wait, in_order=last is not None)
    every = [*tasks, *([last] if last else [])]
    with send_alone(folder, tell):
        names = {task.name: list(task.words) for task in every}
        jobs = [job for job in read_jobs(folder) if job.name in names]
        known = [state.job for state in find_states(folder, jobs) if state.is_active]
        for job in known:
            if job.words != names[job.name]:
                raise ConfigError(
                    f"the job {job.job_id} of {job.user} works in {folder} already, by another command "
                    f"({' '.join(job.words)}); wait for it, or end it with braindecode-vis cancel {folder}."
                )
        if known:
            tell(f"sent by {known[0].user} already and not sent again: {', '.join(j.job_id for j in known)}")
        at_work = {job.name for job in known}
        todo = [task for task in tasks if task.name not in at_work]
        sent: list[SentJob] = send(folder, todo, cluster, wait_for=make_room(folder)) if todo else []
        if last is not None and last.name not in at_work:
            if cluster.executor == "local":
                wait_for_jobs(folder, [*known, *sent])
            sent += send(folder, [last], cluster, after=[*known, *sent], wait_for=make_room(folder))
    jobs = [*known, *sent]
    if not wait:
        return find_states(folder, jobs)
    return wait_for_jobs(folder, jobs, lambda states: tell(count_states(states)))


def refuse_leaving(cluster: Cluster, n_jobs: int, wait: bool, *, in_order: bool = False) -> None:
    """Raise `ConfigError` if nobody would wait for local jobs that must start one after the other."""
    from braindecode_vis.checks import ConfigError

    if wait or cluster.executor == "slurm":
        return
    if cluster.executor == "debug":
        raise ConfigError("--cluster debug runs each job while you wait; leave out --no-wait.")
    if in_order or n_jobs > cluster.n_parallel:
        raise ConfigError(
            f"--no-wait would start {n_jobs} jobs on this machine at once, and {cluster.n_parallel} may run; leave it "
            "out, raise parallel with --cluster-set parallel=N, or use --cluster slurm."
        )


def _strip_words(words: Sequence[str]) -> list[str]:
    """Return a command line without the options that send it."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif (name := word.partition("=")[0]) in _OWN:
            skip = _OWN[name] and "=" not in word
        else:
            kept.append(word)
    return kept


def _as_row(state: JobState) -> dict[str, Any]:
    from braindecode_vis.cluster.watching import list_stages

    return {
        "name": state.job.name, "job": state.job.job_id, "executor": state.job.executor, "state": state.state,
        "reason": state.reason, "elapsed": state.elapsed, "left": state.left, "node": state.host,
        "stages": list_stages(state.job), "log": state.job.log, "sent_by": state.job.user,
    }  # fmt: skip


_SHOWN = 40


def _print_states(folder: Path, states: Sequence[JobState]) -> None:
    """Print jobs as a table, those that are done last and not all of many, and the tail of what went wrong."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from braindecode_vis.cluster.sweeps import count_states
    from braindecode_vis.cluster.watching import list_stages, read_tail

    order = {"failed": 0, "lost": 1, "stopped": 2, "running": 3, "unknown": 4, "waiting": 5, "done": 6}
    rows = sorted(states, key=lambda state: order[state.state])
    table = Table(box=SIMPLE_HEAD)
    for column in ("job", "name", "state", "time", "left", "node", "stages", "why"):
        table.add_column(column, overflow="fold")
    for state in rows[:_SHOWN]:
        stages = list_stages(state.job)
        table.add_row(
            state.job.job_id, state.job.name, state.state, state.elapsed, state.left, state.host,
            f"{len(stages)}, {stages[-1]}" if stages else "", state.reason,
        )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(f"{folder}: {count_states(states)}", markup=False, soft_wrap=True)
    console.print(table)
    if len(rows) > _SHOWN:
        console.print(f"and {len(rows) - _SHOWN} more, which --json lists")
    wrong = [state for state in rows if state.state in ("failed", "lost")]
    for state in wrong[:3]:
        lines = "".join(f"\n  {line}" for line in read_tail(folder, state.job))
        console.print(f"end of {state.job.log}:{lines or ' nothing'}", markup=False)


def _read_states(folder: Path) -> list[JobState]:
    from braindecode_vis.checks import ConfigError
    from braindecode_vis.cluster.submitting import read_jobs
    from braindecode_vis.cluster.watching import find_states

    jobs = read_jobs(folder)
    if not jobs:
        raise ConfigError(f"no jobs were sent from {folder}; name the folder of a run or sweep with jobs.")
    return find_states(folder, jobs)


def status(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Tell how the jobs of a run or a sweep are: states, stages, who waits for what, and the end of a failed log."""
    states = _read_states(folder)
    if as_json:
        rows = [_as_row(state) for state in states]
        print_json({"run_folder": str(folder), "scores": [], "jobs": rows})
        return
    _print_states(folder, states)


def cancel(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """End the jobs of a run or a sweep that wait or work; what they have finished is kept."""
    from braindecode_vis.cluster.watching import cancel_jobs

    ended = cancel_jobs(folder, _read_states(folder))
    if as_json:
        ids = [state.job.job_id for state in ended]
        print_json({"run_folder": str(folder), "scores": [], "cancelled": ids})
        return
    make_console(stderr=False).print(
        f"{len(ended)} jobs of {folder} are asked to end; the same command as before goes on from what is finished"
    )


def collect(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Make the tables of a sweep from the runs that are there, and say what the others do; nothing is computed."""
    from braindecode_vis.cli.studies import print_sweep
    from braindecode_vis.cluster.sweeps import collect_sweep
    from braindecode_vis.studies.sweep import read_list

    table = collect_sweep(folder)
    if as_json:
        rows = json.loads(table.to_json(orient="records"))
        failed = sorted(set(table[table["error"] != ""]["run"]))
        print_json({"run_folder": str(folder), "scores": rows, "failed": failed})
        return
    print_sweep(table, read_list(folder)[0], folder)
