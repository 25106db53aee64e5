"""Verbs as jobs of a cluster: options that send a verb there, and the verbs status, cancel and collect."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    Debug,
    Json,
    RunOptions,
    make_console,
    make_table_console,
    pick,
    print_json,
    strip_words,
)

if TYPE_CHECKING:
    from braindecode_vis.config import RunConfig
    from braindecode_vis.parts.cluster.submitting import Cluster, SentJob, Task
    from braindecode_vis.parts.cluster.watching import JobState
from braindecode_vis.cli.job_options import (
    ClusterName,
    ClusterSet,
    DryRun,
    Gpus,
    Jobs,
    Nodes,
    Wait,
    refuse_alone,
)

Folder = Annotated[Path, typer.Argument(help="Folder of a run or a sweep.")]
#: Jobs that share the fits where neither the settings nor the call say how many there are.
_WORKERS = 8
#: Its own options, which the command of a job is given without, and whether a value follows.
_OWN = {
    "--cluster": True, "--cluster-set": True, "--gpus": True, "--nodes": True, "--wait": False, "--no-wait": False,
    "--dry-run": False, "--json": False,
}  # fmt: skip


def on_cluster(name: str, verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb with the options that send it as a job."""
    signature = inspect.signature(verb, eval_str=True)
    added: dict[str, Any] = {"cluster": ClusterName, "cluster_set": ClusterSet, "gpus": Gpus, "wait": Wait}
    added["dry_run"] = DryRun
    if name in ("run", "train", "pretrain"):
        added["nodes"] = Nodes
    if name == "run":
        added["n_workers"] = Jobs

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        own = {key: given.pop(key) for key in added}
        short = [f"{key}={own[key]}" for key in ("gpus", "nodes") if own.get(key) is not None]
        changes, wait, dry_run = [*(own["cluster_set"] or []), *short], own["wait"], own["dry_run"]
        more = {"n_workers": own["n_workers"]} if "n_workers" in own else {}
        if own["cluster"] is not None:
            _send_verb(name, {**given, **more}, own["cluster"], changes, wait, dry_run)
            return
        refuse_alone(changes, wait, **more, dry_run=dry_run)
        verb(**given)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=kind) for parameter in signature.parameters.values()]
    before = next((n for n, p in enumerate(parameters) if p.name == "trust_code"), len(parameters))
    parameters[before:before] = [
        inspect.Parameter(key, kind, annotation=annotation, default=False if key == "dry_run" else None)
        for key, annotation in added.items()
    ]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _send_verb(
    name: str,
    given: dict[str, Any],
    executor: str,
    changes: Sequence[str],
    wait: bool | None,
    dry_run: bool = False,
) -> None:
    """Send a verb as one job, or as shares of what is independent in it and one job that finishes."""
    from braindecode_vis.base.checks import ConfigError, DataError
    from braindecode_vis.config import check_files
    from braindecode_vis.parts.cluster.launching import SINGLE, Launch, choose_launch, refuse_processes
    from braindecode_vis.parts.cluster.submitting import Task, check_cluster, read_cluster
    from braindecode_vis.pipeline.runs import digest_config, read_scores

    if name in ("analyze", "run") and given["source"] is None:
        raise ConfigError(f"{name} needs a configuration, a run folder or a data set to run as a job.")
    settings = config = None
    if name == "predict":
        from braindecode_vis.pipeline.prediction_files import check_out

        folder = given["run"]
        if not (folder / "config.yaml").is_file():
            raise DataError(
                f"{folder} is not a run folder: it holds no config.yaml; give the folder that run printed."
            )
        check_out(given["out"])
    elif name == "pretrain" and given["source"] is None:
        if not given["corpus"] or given["out"] is None:
            raise ConfigError(
                "pretrain needs a configuration, a run folder or a data set, or --corpus DIR and --out FOLDER."
            )
        folder = given["out"]
    elif name == "train-generator":
        folder = given["out"]
    elif name == "embed" and given["images"] is not None:
        config, folder = _plan_images(given, writes=not dry_run)
        settings = config.cluster
    else:
        config, folder = pick(RunOptions, given).find()
        settings = config.cluster
    cluster = read_cluster(executor, settings, changes, where=str(given.get("source") or "the run"))
    if not dry_run:
        check_cluster(cluster)
    if config is not None and not dry_run and name in ("embed", "train", "reconstruct", "run"):
        check_files(config, "report" if name == "run" else name)
    given["out"] = folder = Path(folder).absolute()
    words = strip_words(sys.argv[1:], _OWN)
    launch = SINGLE
    if (config is None and name != "pretrain") or given.get("n_workers") is not None:
        refuse_processes(cluster.settings, f"each job of {name}")
    else:
        said = {text.partition("=")[0] for text in changes}
        launch = choose_launch(name, config, cluster.settings, executor=executor, said=said)
    phases = [[Task(name, words, folder / "jobs" / f"{name}.log", launch=launch)]]
    if (
        launch.n_processes > 1 and name == "run"
    ):  # all but the training is the work of one process, on one node
        training = Task("train", ["train", *words[1:]], folder / "jobs" / "train.log", launch=launch)
        rest = Launch(gpus=1) if cluster.settings.gpus else SINGLE
        phases = [[training], [replace(phases[0][0], launch=rest)]]
    elif (
        launch.n_processes == 1
        and config is not None
        and (name in ("run", "train", "reconstruct", "analyze") or given.get("images") is not None)
    ):
        phases = _share(name, given, words, config, cluster)
    if config is not None and given.get("images") is None:
        sent_with = digest_config(config)
        phases = [[replace(task, settings=sent_with) for task in group] for group in phases]
    if dry_run:
        print_preview(folder, phases, cluster, given["as_json"])
        return
    together = launch.n_processes > 1
    states = _send_and_wait(folder, phases, cluster, wait=wait is not False, strict=together)
    if given["as_json"]:
        scores = read_scores(folder) if name == "run" and states[-1].state == "done" else []
        print_json(
            {"run_folder": str(folder), "scores": scores, "jobs": [_as_row(state) for state in states]}
        )
    else:
        _print_states(Path(folder), states)
    failed = [state for state in states if state.is_stuck or (not state.is_active and state.state != "done")]
    if failed and states[-1].state != "done":  # the last one makes what the others left
        raise DataError(f"the job {failed[-1].job.name} {failed[-1].state}: {failed[-1].reason}")


def _plan_images(given: dict[str, Any], *, writes: bool) -> tuple[RunConfig, Path]:
    """Return the configuration of a bank and its folder; write its plan, so that no job has to list all images."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.cli.embed import ImageOptions, plan_images
    from braindecode_vis.config import read_config

    if given["bank"] is None:
        raise ConfigError("--images needs a folder for the embeddings; name one with --bank.")
    where = pick(RunOptions, given)
    if writes:
        plan_images(where, pick(ImageOptions, given))
    return read_config(where.source, where.list_changes(), root=where.root), given["bank"].expanduser()


def print_preview(folder: Path, groups: Sequence[Sequence[Task]], cluster: Cluster, as_json: bool) -> None:
    """Print what would be sent."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.cluster.submitting import preview

    if cluster.executor != "slurm":
        raise ConfigError(
            f"--dry-run shows scripts of sbatch, but --cluster {cluster.executor} has none; pass --cluster slurm."
        )
    text = preview(folder, groups, cluster)
    if as_json:
        jobs = [{"name": task.name, "words": list(task.words)} for group in groups for task in group]
        print_json({"run_folder": str(folder), "scores": [], "jobs": jobs, "script": text})
        return
    sys.stdout.write(f"{text}\n\nnothing was sent\n")


def _share(
    name: str, given: dict[str, Any], words: list[str], config: RunConfig, cluster: Cluster
) -> list[list[Task]]:
    """Return the jobs of a verb in groups, each of which waits for the one before: what all need, shares, the rest."""
    from braindecode_vis.base import roles
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.base.contracts import GeneratorSettings, ImageEncoderSettings
    from braindecode_vis.config.models import choose_analyses
    from braindecode_vis.parts.cluster.submitting import Task

    asked, folder = given["n_workers"], given["out"]
    if given.get("worker") is not None or (asked is not None and asked < 1):
        raise ConfigError(
            "with --cluster the shares are numbered automatically; give only --workers N, with N of at least 1."
        )
    if name == "reconstruct" and asked is not None and not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is not a run folder, so there are no images to share; train a run first, for example by "
            "braindecode-vis retrieve, then name its folder."
        )
    alone = strip_words(words, {"--workers": True})

    def make(verb: str, job: str, *more: str, without: dict[str, bool] | None = None) -> Task:
        rest = strip_words(alone[1:], without or {})
        return Task(job, [verb, *rest, *more], folder / "jobs" / f"{job}.log")

    def make_shares(verb: str, job: str, n: int, *more: str) -> list[Task]:
        return [make(verb, f"{job}-{k}", *more, "--worker", str(k), "--workers", str(n)) for k in range(n)]

    last = Task(name, alone, folder / "jobs" / f"{name}.log")
    if name in ("reconstruct", "embed"):
        return [make_shares(name, "share", asked), [last]] if asked else [[last]]
    if name == "analyze":
        n = asked or cluster.settings.parallel or len(choose_analyses(config, given["analyses"] or ()))
    else:
        n = asked or _count_fits(config) or cluster.settings.parallel or _WORKERS
    if n == 1:
        return [[last]]
    # Images of a target that is not fitted are encoded once, for all folds.
    target = roles.complete(ImageEncoderSettings, config.target)
    embeds = not config.decodes_categories and not target.fitted_on_training_images
    first = "embed" if embeds else "preprocess"
    groups = [[make(first, first, without={"--analysis": True})]]
    if config.uses_pretraining and config.pretrain is not None and config.pretrain.corpus:
        # Of corpora, what is pretrained serves all fits; of trials, each fit pretrains for itself.
        groups.append([make("pretrain", "pretrain", without={"--analysis": True})])
    if name == "analyze":
        return [*groups, make_shares(name, "share", n), [last]]
    groups.append(make_shares("train", "train", n))
    generator = roles.complete(GeneratorSettings, config.generator)
    if name == "run" and asked and not config.decodes_categories and not generator.copies_training_images:
        where = () if any(word.partition("=")[0] == "--out" for word in alone) else ("--out", str(folder))
        groups.append(make_shares("reconstruct", "images", n, *where))
    return [*groups, [last]]


def _count_fits(config: RunConfig) -> int | None:
    """Return how many fits a run has, as far as its settings say; the data say it of other splits."""
    split: Any = config.split
    if split.kind == "leave_one_subject_out":
        return len(getattr(config.dataset, "subjects", None) or ()) or None
    return 1 if split.is_declared else getattr(split, "n_folds", None)


def _send_and_wait(
    folder: Path, groups: Sequence[Sequence[Task]], cluster: Cluster, *, wait: bool, strict: bool = False
) -> list[JobState]:
    """Send groups of jobs, each after the one before, and return how they are; those at work are not sent again.

    `strict` lets none begin unless those before have ended well, as one process would do the work of many.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.cluster.submitting import read_jobs, send, send_alone
    from braindecode_vis.parts.cluster.sweeps import count_states, make_room
    from braindecode_vis.parts.cluster.watching import find_states, wait_for_jobs

    console = make_console()

    def tell(sentence: str) -> None:
        console.print(f"jobs: {sentence}", markup=False)

    every = [task for group in groups for task in group]
    refuse_leaving(cluster, len(every), wait, in_order=len(groups) > 1)
    with send_alone(folder, tell):
        names = {task.name: list(task.words) for task in every}
        earlier = find_states(folder, [job for job in read_jobs(folder) if job.name in names])
        known = {state.job.name: state.job for state in earlier if state.is_active}
        ended_well = {s.job.name for s in earlier if s.state == "done" and s.job.words == names[s.job.name]}
        if every[-1].name in ended_well:  # the same again, perhaps of data that have changed since
            ended_well = set()
        for job in known.values():
            if job.words != names[job.name]:
                raise ConfigError(
                    f"the job {job.job_id} of {job.user} already works in {folder}, for another command "
                    f"({' '.join(job.words)}); wait for it, or end it with braindecode-vis cancel {folder}."
                )
        if known:
            first = next(iter(known.values()))
            tell(
                f"sent by {first.user} from {first.host} already and not sent again: "
                f"{', '.join(f'{job.name} ({job.job_id})' for job in known.values())}"
            )
        jobs: list[SentJob] = []
        before: list[SentJob] = []
        first_of_all: list[SentJob] = []  # empty where it ended well before this call
        for number, group in enumerate(groups):
            found = [known[task.name] for task in group if task.name in known]
            todo = [task for task in group if task.name not in known and task.name not in ended_well]
            if todo:
                # What all need must be there; a share that failed leaves its work to the last job.
                all_need = strict or (number == 1 and len(groups) > 2)
                if before and cluster.executor != "slurm":
                    states = wait_for_jobs(folder, before)
                    if all_need and states[0].state != "done":
                        return find_states(folder, jobs)
                needed = before if all_need else first_of_all
                found += send(
                    folder, todo, cluster, after=[job for job in before if job not in needed],
                    after_success=needed, wait_for=make_room(folder),
                )  # fmt: skip
            if not number and len(groups) > 2:
                first_of_all = found
            before = found
            jobs += found
    if not wait:
        return find_states(folder, jobs)
    return wait_for_jobs(folder, jobs, lambda states: tell(count_states(states)))


def refuse_leaving(cluster: Cluster, n_jobs: int, wait: bool, *, in_order: bool = False) -> None:
    """Raise `ConfigError` if nobody would wait for local jobs that must start one after the other."""
    from braindecode_vis.base.checks import ConfigError

    if wait or cluster.executor == "slurm":
        return
    if cluster.executor == "debug":
        raise ConfigError("--cluster debug runs each job while you wait; leave out --no-wait.")
    if in_order or n_jobs > cluster.n_parallel:
        raise ConfigError(
            f"--no-wait would start {n_jobs} jobs on this machine at the same time, but only "
            f"{cluster.n_parallel} may run; leave it out, increase parallel with --cluster-set "
            "parallel=N, or use --cluster slurm."
        )


def _as_row(state: JobState) -> dict[str, Any]:
    from braindecode_vis.parts.cluster.watching import list_stages

    return {
        "name": state.job.name, "job": state.job.job_id, "executor": state.job.executor, "state": state.state,
        "reason": state.reason, "after": state.job.after, "elapsed": state.elapsed, "left": state.left,
        "node": state.host, "stages": list_stages(state.job), "log": state.job.log, "sent_by": state.job.user,
    }  # fmt: skip


_SHOWN = 40


def _print_states(folder: Path, states: Sequence[JobState]) -> None:
    """Print jobs as a table, those that are done last and not all of many, and the tail of what went wrong."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from braindecode_vis.parts.cluster.sweeps import count_states
    from braindecode_vis.parts.cluster.watching import (
        estimate_rest,
        find_clock_differences,
        list_stages,
        read_tail,
    )

    order = {
        "failed": 0,
        "lost": 1,
        "stopped": 2,
        "elsewhere": 3,
        "running": 4,
        "unknown": 5,
        "waiting": 6,
        "done": 7,
    }
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
    console = make_table_console()
    rest = estimate_rest(states)
    console.print(
        f"{folder}: {count_states(states)}{'; ' if rest else ''}{rest}", markup=False, soft_wrap=True
    )
    console.print(table)
    if len(rows) > _SHOWN:
        console.print(f"and {len(rows) - _SHOWN} more, which --json lists")
    for sentence in find_clock_differences(folder, [state.job for state in states]):
        console.print(sentence, markup=False, soft_wrap=True)
    wrong = [state for state in rows if state.state in ("failed", "lost")]
    for state in wrong[:3]:
        lines = "".join(f"\n  {line}" for line in read_tail(folder, state.job))
        console.print(f"end of {state.job.log}:{lines or ' nothing'}", markup=False)


def _read_states(folder: Path) -> list[JobState]:
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.cluster.submitting import read_jobs
    from braindecode_vis.parts.cluster.watching import find_states

    jobs = read_jobs(folder)
    if not jobs:
        raise ConfigError(f"no jobs were sent from {folder}; give the folder of a run or sweep with jobs.")
    return find_states(folder, jobs)


def status(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Show the states of the jobs of a run or a sweep.

    Shows stages, which job waits for which, and the end of a failed log.
    """
    states = _read_states(folder)
    if as_json:
        rows = [_as_row(state) for state in states]
        print_json({"run_folder": str(folder), "scores": [], "jobs": rows})
        return
    _print_states(folder, states)


def cancel(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """End the jobs of a run or a sweep.

    Ends those that wait or work. What they have finished is kept.
    """
    from braindecode_vis.base.checks import DataError
    from braindecode_vis.parts.cluster.watching import cancel_jobs

    states = _read_states(folder)
    ended = cancel_jobs(folder, states)
    left = [state.job for state in states if state.is_active and state not in ended]
    if as_json:
        ids = [state.job.job_id for state in ended]
        print_json({"run_folder": str(folder), "scores": [], "cancelled": ids})
    else:
        make_console(stderr=False).print(
            f"{len(ended)} jobs of {folder} will be ended; run the earlier command again to continue "
            "from the finished work",
            markup=False,
        )
    if left:
        raise DataError(
            f"{len(left)} jobs could not be ended, such as {left[0].name} ({left[0].job_id}), sent by {left[0].user} "
            f"from {left[0].host}; only that user can end it, on that machine."
        )


def collect(folder: Folder, as_json: Json = False, debug: Debug = False) -> None:
    """Tabulate what a sweep or a run has so far.

    Writes tables and a page of what is there, and says what the rest does. Computes nothing.
    """
    from braindecode_vis.parts.cluster.submitting import read_jobs
    from braindecode_vis.parts.cluster.sweeps import collect_sweep
    from braindecode_vis.parts.cluster.watching import find_states
    from braindecode_vis.parts.studies.board import make_board
    from braindecode_vis.parts.studies.sweep import LIST, read_list
    from braindecode_vis.parts.studies.verbs import print_sweep
    from braindecode_vis.pipeline.runs import read_scores

    page = folder / "board.html"
    if (folder / "config.yaml").is_file() and not (folder / LIST).is_file():
        (row,) = make_board([folder], page)
        states = find_states(folder, read_jobs(folder))
        if as_json:
            print_json(
                {
                    "run_folder": str(folder), "scores": read_scores(folder), "board": str(page),
                    "trouble": row.trouble, "jobs": [_as_row(state) for state in states],
                }
            )  # fmt: skip
            return
        if states:
            _print_states(folder, states)
        console = make_console(stderr=False)
        console.print(f"{folder}: {row.trouble or 'its scores are there'}\npage: {page}", markup=False)
        return
    table = collect_sweep(folder)
    make_board([folder], page)
    if as_json:
        rows = json.loads(table.to_json(orient="records"))
        failed = sorted(set(table[table["error"] != ""]["run"]))
        print_json({"run_folder": str(folder), "scores": rows, "failed": failed, "board": str(page)})
        return
    print_sweep(table, read_list(folder)[0], folder)
    make_console(stderr=False).print(f"page: {page}", markup=False)
