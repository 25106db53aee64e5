"""Sends commands to a cluster by submitit's executors, and keeps a list of them beside the run.

Owns which settings each executor reads, what is refused before anything is sent, and ``jobs/jobs.json``: who sent what
and when. Only one process at a time sends from a folder, so that two people cannot send the same work twice.
"""

from __future__ import annotations

import atexit
import getpass
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError, check_option, require, suggest
from braindecode_vis.base.consent import ConsentError, may_run_commands
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.settings import describe_validation_error
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.config.source import read_override
from braindecode_vis.parts.cluster.job import CommandJob, identify_software
from braindecode_vis.parts.cluster.launching import SINGLE, Launch
from braindecode_vis.pipeline.together import make_command

Executor = Literal["local", "debug", "slurm"]
#: Folder of jobs in that of a run or a sweep.
JOBS = "jobs"
_LIST = "jobs.json"
#: What is looked at where there is no Slurm.
_READ_HERE = {
    "local": ("gpus", "processes", "distributed", "cpus", "time", "requeues", "parallel", "setup"),
    "debug": ("cpus",),
}
#: Before the end of its time a job is told so; half of the time where that is short.
_WARNING_S = 90


@dataclass(frozen=True)
class Cluster:
    """An executor and what each job asks for.

    Parameters
    ----------
    executor
        ``slurm``; ``local``, processes of this machine; ``debug``, one after the other, waiting for each.
    settings
        What each job asks for.
    """

    executor: Executor
    settings: ClusterConfig

    @property
    def n_parallel(self) -> int:
        """Local jobs that run at once."""
        if self.executor == "debug":
            return 1
        return self.settings.parallel or max(1, (os.cpu_count() or 1) // self.settings.cpus)


@dataclass(frozen=True)
class Task:
    """One command that becomes a job.

    Parameters
    ----------
    name
        Short, unlike that of other tasks of the folder; names files.
    words
        Of the command line, beginning with the verb.
    log
        File for what it prints.
    seal
        A file and its text, written when the command has ended well.
    settings
        Digest of the settings that the command must find, see `pipeline.runs.digest_config`; empty for any.
    launch
        Processes that the job consists of, the same for all tasks that are sent together.
    """

    name: str
    words: Sequence[str]
    log: Path
    seal: tuple[Path, str] | None = None
    settings: str = ""
    launch: Launch = SINGLE


@dataclass(frozen=True)
class SentJob:
    """One line of the list of jobs: what was sent, when and by whom.

    `after` are the names of jobs it waits for, and `folder` is that of the run or sweep, by which a copy is known.
    """

    name: str
    job_id: str
    executor: str
    ticket: str
    words: list[str]
    log: str
    sent: float
    user: str
    host: str
    time: int
    memory: float | None
    after: list[str] = field(default_factory=list)
    folder: str = ""


def read_cluster(
    executor: str, settings: ClusterConfig | None, changes: Sequence[str] = (), *, where: str = "the file"
) -> Cluster:
    """Return an executor with what jobs ask for.

    Parameters
    ----------
    executor
        ``local``, ``debug`` or ``slurm``.
    settings
        Of the configuration, which may be somebody else's.
    changes
        Texts ``key=value`` of whoever makes the call.
    where
        What the configuration is called.

    Raises
    ------
    ConfigError
        If a setting is wrong, or nothing would look at one of `changes`.
    ConsentError
        If the configuration holds shell commands or options of sbatch, and this call did not name ``cluster`` as
        trusted.
    """
    check_option("--cluster", executor, get_args(Executor))
    content = {} if settings is None else settings.model_dump(mode="json")
    said: set[str] = set()
    for text in changes:
        (key, *inner), value = read_override(text)
        if inner:
            content[key] = {**content.get(key, {}), ".".join(inner): value}
        else:
            content[key] = value
        said.add(key)
        if executor in _READ_HERE and key in ClusterConfig.model_fields and key not in _READ_HERE[executor]:
            raise ConfigError(
                f"--cluster-set {text} applies to Slurm and has no effect with --cluster {executor}; leave it out."
            )
    for key in ("setup", "extra"):
        if content.get(key) and key not in said and executor != "debug" and not may_run_commands("cluster"):
            raise ConsentError(
                f"{where} holds cluster.{key} ({str(content[key])[:200]}), which would run with your rights; read it, "
                "then pass --trust-code cluster."
            )
    try:
        return Cluster(executor, ClusterConfig.model_validate(content))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(f"{describe_validation_error(error, 'cluster')}.") from error


def check_cluster(cluster: Cluster) -> None:
    """Raise `ConfigError` where submitit, Slurm or the partition is missing, before anything is written."""
    require("submitit", "--cluster")
    if cluster.executor != "slurm":
        return
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "there is no Slurm on this machine (sbatch was not found); run the command on a login node, "
            "or with --cluster local (processes of this machine) or --cluster debug (one after the "
            "other), which give the same results."
        )
    done = ask_slurm("sinfo", "-h", "-o", "%R")
    if done.returncode:
        raise ConfigError(f"Slurm does not answer ({_quote_error(done.stderr)}); ask its administrator.")
    partitions, asked = sorted(set(done.stdout.split())), cluster.settings.partition
    if asked is not None and (missing := [name for name in asked.split(",") if name not in partitions]):
        raise ConfigError(
            f"Slurm has no partition {missing[0]}{suggest(missing[0], partitions)}; it has {', '.join(partitions)}: "
            "set cluster.partition, or --cluster-set partition=NAME."
        )


def ask_slurm(*words: str) -> subprocess.CompletedProcess[str]:
    """Return what a command of Slurm says; one that hangs or is missing has failed."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def _quote_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("sbatch: error: ") if lines else "it says nothing"


def read_jobs(folder: Path) -> list[SentJob]:
    """Return the jobs that were sent for a run or a sweep, the last submission of each name."""
    path = folder / JOBS / _LIST
    if not path.is_file():
        return []
    try:
        jobs = [SentJob(**row) for row in store.read_json(path)]
        if strange := [job.job_id for job in jobs if not re.fullmatch(r"\w+", job.job_id)]:
            raise TypeError(
                f"{strange[0]!r} is no number of a job"
            )  # commands of Slurm would take it for an option
        return jobs
    except TypeError as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and run the command again.") from error


@contextmanager
def send_alone(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Let no other process send jobs for a folder while the context lasts."""
    jobs = folder / JOBS
    if "%" in (place := str(folder.absolute())) or not place.isprintable():
        raise ConfigError(
            f"the folder {place!r} has a % or a line break in its name, which has a special meaning for "
            "Slurm; choose another folder with --out."
        )
    try:
        jobs.mkdir(parents=True, exist_ok=True)
        with hold_folder(jobs, "jobs", tell):
            yield
    except OSError as error:
        full = store.is_disk_full(error, folder)
        raise ConfigError(
            f"the jobs of {folder} cannot be written ({'the disk is full' if full else error.strerror}); "
            "finished work is kept: make room or choose another folder with --out, then run the command again."
        ) from error


def send(
    folder: Path,
    tasks: Sequence[Task],
    cluster: Cluster,
    *,
    after: Sequence[SentJob] = (),
    after_success: Sequence[SentJob] = (),
    wait_for: Callable[[Sequence[SentJob], int], None] | None = None,
) -> list[SentJob]:
    """Send tasks as jobs, those of Slurm as one array, and add them to the list of the folder.

    Parameters
    ----------
    folder
        Of the run or sweep; see `send_alone`, which must hold it.
    tasks
        At least one.
    cluster
        Where to, and what each asks for; see `check_cluster`.
    after
        Jobs that must have ended, well or not, before these begin; Slurm sees to it, and elsewhere whoever calls.
    after_success
        Jobs that must have ended well; otherwise Slurm cancels these.
    wait_for
        Called before a local job starts, with those sent before and how many may run meanwhile; returns once they are
        that few. None starts all at once.
    """
    jobs = (folder / JOBS).absolute()
    software = identify_software() if cluster.executor == "slurm" else {}
    settings = cluster.settings
    calls = [
        CommandJob(
            name=task.name,
            command=make_command(task.words),
            cwd=str(Path.cwd()),
            log=str(task.log.absolute()),
            note=str(jobs / f"{task.name}.json"),
            ticket=uuid.uuid4().hex,
            executor=cluster.executor,
            threads=settings.cpus,
            asked={"memory": settings.memory, "time": settings.time, "requeues": settings.requeues},
            software=software,
            settings=task.settings,
            seal=[] if task.seal is None else [str(task.seal[0].absolute()), task.seal[1]],
            n_processes=task.launch.n_processes,
            distributed=task.launch.distributed,
        )
        for task in tasks
    ]
    sent: list[SentJob] = []
    waits_for = list(dict.fromkeys(job.name for job in (*after_success, *after)))

    def note(numbers: Sequence[int], ids: Sequence[str]) -> None:
        rows = [
            SentJob(
                calls[n].name, job_id, cluster.executor, calls[n].ticket, list(tasks[n].words), calls[n].log,
                time.time(), _find_user(), platform.node(), settings.time, settings.memory, waits_for,
                str(folder.absolute()),
            )
            for n, job_id in zip(numbers, ids, strict=True)
        ]  # fmt: skip
        sent.extend(rows)
        names = {row.name for row in rows}
        kept = [row for row in read_jobs(folder) if row.name not in names]
        store.write_json(jobs / _LIST, [asdict(row) for row in [*kept, *rows]])

    for task in tasks:  # what an earlier job said belongs to that one
        with suppress(OSError):
            (jobs / f"{task.name}.json").unlink()
        task.log.parent.mkdir(parents=True, exist_ok=True)
        task.log.write_text("")
    with _find_package():
        if cluster.executor == "slurm":
            # Slurm refuses arrays that are longer; most clusters let them have a thousand jobs.
            longest = _find_longest_array()
            for start in range(0, len(calls), longest):
                numbers = range(start, min(start + longest, len(calls)))
                asked = describe_slurm(settings, after, after_success, launch=tasks[start].launch)
                note(numbers, _send_to_slurm(jobs, [calls[n] for n in numbers], settings, asked))
        else:
            for n, call in enumerate(calls):
                if wait_for is not None:
                    wait_for(sent, cluster.n_parallel - 1)
                note([n], [_start_here(jobs, call, cluster, tasks[n].launch)])
    return sent


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@contextmanager
def _find_package() -> Iterator[None]:
    """Let Python find this package on the nodes, also where it runs from a checkout, and nothing of the current folder.

    Executors hand the environment on to their jobs.
    """
    changes = {"PYTHONSAFEPATH": "1"}
    top = Path(__file__).resolve().parents[3]
    if top != Path(sysconfig.get_path("purelib")).resolve():
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, [str(top), os.environ.get("PYTHONPATH")]))
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def describe_slurm(
    settings: ClusterConfig,
    after: Sequence[SentJob] = (),
    after_success: Sequence[SentJob] = (),
    *,
    launch: Launch = SINGLE,
) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor."""
    more: dict[str, Any] = {key: value or True for key, value in settings.extra.items()}
    conditions = [
        ":".join([word, *dict.fromkeys(job.job_id.partition("_")[0] for job in jobs)])
        for word, jobs in (("afterok", after_success), ("afterany", after))
        if jobs
    ]
    if after_success:  # else they would wait forever
        more["kill-on-invalid-dep"] = "yes"
    asked: dict[str, Any] = {
        "job_name": "braindecode-vis", "time": settings.time, "cpus_per_task": settings.cpus,
        "signal_delay_s": _warn_before(settings), "partition": settings.partition, "account": settings.account,
        "gpus_per_node": settings.gpus or None, "array_parallelism": settings.parallel,
        "mem": None if settings.memory is None else f"{round(settings.memory * 1024)}M",
        "setup": list(settings.setup) or None,
        "additional_parameters": more or None, "dependency": ",".join(conditions) or None,
        # srun does not take it from the job any more, and would bind all threads to one core.
        "srun_args": [f"--cpus-per-task={settings.cpus}"],
    }  # fmt: skip
    given = {key: value for key, value in asked.items() if value is not None}
    return given | launch.describe_slurm(given["srun_args"])


def preview(folder: Path, groups: Sequence[Sequence[Task]], cluster: Cluster) -> str:
    """Return the scripts that sbatch would get, by submitit's own maker, and the jobs of each; nothing is sent.

    Parameters
    ----------
    folder
        Of the run or sweep.
    groups
        Tasks, each group waiting for the one before.
    cluster
        Slurm, which need not be on this machine.
    """
    require("submitit", "--dry-run")
    from submitit.slurm.slurm import _make_sbatch_string

    jobs, longest = (folder / JOBS).absolute(), _find_longest_array()
    command = f"{shlex.quote(sys.executable)} -P -u -m submitit.core._submit {shlex.quote(str(jobs))}"
    told, number = [], len(groups)
    for place, group in enumerate(groups):
        asked = describe_slurm(cluster.settings, launch=group[0].launch)
        for start in range(0, len(group), longest):
            part = group[start : start + longest]
            after = "" if place == 0 else f", after those of submission {place}"
            more: dict[str, Any] = {} if place == 0 else {"dependency": f"afterany:JOB_OF_SUBMISSION_{place}"}
            script = _make_sbatch_string(
                command=command, folder=jobs, map_count=len(part) if len(part) > 1 else None, **asked, **more
            )
            shown = part if len(part) <= _SHOWN else [*part[: _SHOWN - 1], part[-1]]
            lines = [f"  {task.name}: braindecode-vis {shlex.join(task.words)}" for task in shown]
            if len(shown) < len(part):
                lines.insert(-1, f"  ... {len(part) - len(shown)} more")
            jobs_of = "1 job" if len(part) == 1 else f"{len(part)} jobs as an array"
            told.append(
                f"# submission {place + 1} of {number}: {jobs_of}{after}\n{script}\n" + "\n".join(lines)
            )
    return "\n\n".join(told)


#: Jobs of an array that a preview names.
_SHOWN = 20


def _warn_before(settings: ClusterConfig) -> int:
    return min(_WARNING_S, settings.time * 30)


def _find_longest_array() -> int:
    shown = ask_slurm("scontrol", "show", "config").stdout
    found = [line.partition("=")[2].strip() for line in shown.splitlines() if line.startswith("MaxArraySize")]
    return max(1, min(1000, int(found[0]) - 1)) if found and found[0].isdigit() else 1000


def _send_to_slurm(
    jobs: Path, calls: Sequence[CommandJob], settings: ClusterConfig, asked: Mapping[str, Any]
) -> list[str]:
    submitit = require("submitit", "--cluster slurm")
    # -P: no file of the current folder takes the place of a module
    executor = submitit.SlurmExecutor(
        jobs, max_num_timeout=settings.requeues, python=f"{shlex.quote(sys.executable)} -P"
    )
    executor.update_parameters(**asked)
    try:
        with redirect_stderr(io.StringIO()), executor.batch():  # submitit repeats there what the error says
            made = [executor.submit(call) for call in calls]
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"Slurm refused the jobs: {_quote_error(str(error))}; change the requested resources with --cluster-set."
        ) from error
    return [job.job_id for job in made]


#: Processes of this one, which are asked for so that none is left as a zombie.
STARTED: dict[str, Any] = {}
# While submitit can still answer what such an object asks when it goes.
atexit.register(STARTED.clear)


@contextmanager
def _without_output() -> Iterator[None]:
    """Let a process that is started meanwhile inherit no output: whoever reads that of a command waits for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nothing, number)
        yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        os.close(nothing)


def _start_here(jobs: Path, call: CommandJob, cluster: Cluster, launch: Launch) -> str:
    submitit = require("submitit", f"--cluster {cluster.executor}")
    if cluster.executor == "debug":
        job = submitit.DebugExecutor(jobs).submit(call)
        job.result()
        return str(job.job_id)
    settings = cluster.settings
    executor = submitit.LocalExecutor(jobs, max_num_timeout=settings.requeues)
    here = {
        "timeout_min": settings.time, "signal_delay_s": _warn_before(settings), "gpus_per_node": settings.gpus,
        "setup": list(settings.setup),
    }  # fmt: skip
    executor.update_parameters(**{**here, **launch.describe_local()})
    with _without_output():
        job = executor.submit(call)
    STARTED[str(job.job_id)] = job
    return str(job.job_id)
