"""Starts several processes of one job that train together: for which verbs, and with which variables.

The executor starts as many tasks as there are processes (on Slurm ``srun``, over all nodes of the job), and each tells
its command by the variables of torchrun which one it is and where the first one listens. Knows no training; imports
nothing heavy, since each task starts here.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from braindecode_vis.config import RunConfig
    from braindecode_vis.config.cluster_config import ClusterConfig

#: Verbs that train in several processes.
TRAINING = ("train", "run", "pretrain")
#: Below the ports that systems hand out by themselves.
_PORTS = (12_000, 30_000)
#: What accelerate reads; ACCELERATE_USE_FSDP may be set by hand, or by ``accelerate launch``, as well.
_SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Launch:
    """Processes of one job: how many nodes, how many on each, and how they share a network.

    `gpus` are the cards of each node, where they are not those of the settings.
    """

    nodes: int = 1
    processes: int = 1
    distributed: str = "ddp"
    gpus: int | None = None

    @property
    def n_processes(self) -> int:
        """All processes of the job."""
        return self.nodes * self.processes

    def describe_slurm(self, srun_args: Sequence[str]) -> dict[str, Any]:
        """Return what changes in the parameters of submitit's Slurm executor, given the arguments of ``srun``."""
        changed: dict[str, Any] = {} if self.gpus is None else {"gpus_per_node": self.gpus}
        if self.n_processes > 1:
            # The end of one is the end of all: others would wait for it.
            args = [*srun_args, "--kill-on-bad-exit=1"]
            changed |= {"nodes": self.nodes, "ntasks_per_node": self.processes, "srun_args": args}
        return changed

    def describe_local(self) -> dict[str, Any]:
        """Return what changes in the parameters of submitit's local executor."""
        changed: dict[str, Any] = {} if self.gpus is None else {"gpus_per_node": self.gpus}
        return {**changed, "tasks_per_node": self.processes}


#: One process, as most jobs have.
SINGLE = Launch()


def choose_launch(
    verb: str,
    config: RunConfig | None,
    settings: ClusterConfig,
    *,
    executor: str,
    said: Collection[str] = (),
) -> Launch:
    """Return the processes that a verb is started with.

    Parameters
    ----------
    verb
        Of the command line.
    config
        Of the run; None for a pretraining on corpora alone.
    settings
        What each job asks for.
    executor
        ``slurm``, ``local`` or ``debug``.
    said
        Settings that were given with the command.

    Raises
    ------
    ConfigError
        If several processes are asked for, and the verb, its encoder or the executor has one.
    """
    from braindecode_vis.base import roles
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.base.contracts import EncoderSettings

    asked = _find_asked(settings)
    if verb not in TRAINING:
        # The settings of a file are for the training of the run, whichever verb comes first.
        if asked and {"nodes", "processes"} & set(said):
            raise ConfigError(
                f"{verb} works in one process, but {asked} is for train, run and pretrain; leave it out."
            )
        return SINGLE
    if (
        verb != "pretrain"
        and config is not None
        and not roles.complete(EncoderSettings, config.encoder).trains_in_processes
    ):
        if asked:
            raise ConfigError(
                f"cluster.{asked} is for encoders that train in several processes, but "
                f"{config.encoder.kind} is fitted by one; leave it out."
            )
        return SINGLE
    processes = settings.processes or settings.gpus or 1
    if executor == "debug":
        if asked:
            raise ConfigError(
                f"--cluster debug starts one process, but cluster.{asked} requests more; use --cluster "
                "local or slurm."
            )
        return SINGLE
    if executor == "local" and settings.nodes > 1:
        raise ConfigError(
            "--cluster local has one node, this machine; leave out nodes, or use --cluster slurm."
        )
    if settings.gpus and processes > settings.gpus:
        raise ConfigError(
            f"cluster.processes is {processes} on each node, and cluster.gpus {settings.gpus}: each "
            "process needs its own GPU; increase gpus, or leave processes out."
        )
    return Launch(settings.nodes, processes, settings.distributed)


def refuse_processes(settings: ClusterConfig, what: str) -> None:
    """Raise `ConfigError` where several processes are asked for by what has one."""
    from braindecode_vis.base.checks import ConfigError

    if asked := _find_asked(settings):
        raise ConfigError(f"{what} has one process, but cluster.{asked} requests more; leave it out.")


def _find_asked(settings: ClusterConfig) -> str:
    """Return the setting that asks for several processes; an empty text where none does."""
    if settings.nodes > 1:
        return "nodes"
    return "processes" if (settings.processes or 1) > 1 else ""


# --- in a task of the job -------------------------------------------------------------------------------


def find_rank() -> int:
    """Return which task of its job this process is."""
    name = "SLURM_PROCID" if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else "SUBMITIT_LOCAL_GLOBALID"
    return int(os.environ.get(name, "0"))


def describe_place(distributed: str) -> dict[str, str]:
    """Return the variables by which a command knows its place among the processes of its job.

    Raises
    ------
    OSError
        If the port that the processes meet at is taken on the first node; its text is a sentence.
    """
    from submitit import JobEnvironment

    job = JobEnvironment()
    alone = job.num_nodes == 1
    # The same in every task without a word between them; another one when the job is queued again.
    again = os.environ.get("SLURM_RESTART_COUNT", "0")
    port = random.Random(f"{job.job_id} {again}").randrange(*_PORTS)
    if job.global_rank == 0:
        _check_port(port)
    place = {
        "RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank,
        "LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes, "GROUP_RANK": job.node,
        "MASTER_ADDR": "127.0.0.1" if alone else job.hostnames[0], "MASTER_PORT": port,
    }  # fmt: skip
    return {
        **{name: str(value) for name, value in place.items()},
        **(_SHARDED if distributed == "fsdp" else {}),
    }


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        # As the process that listens there does: a connection of an earlier job that lingers does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"port {port} of {socket.gethostname()}, where the processes of the job meet, is used by "
                "another program; run the command again to use another port."
            ) from error


def find_failure(note: Path, ticket: str, since: float) -> dict[str, Any]:
    """Return what a process of a job said of its end before that of the others; nothing if none did.

    Parameters
    ----------
    note
        Of the job.
    ticket
        Of its submission.
    since
        Time from which on it counts: a job that was queued again has begun anew.
    """
    for path in (note, name_failure(note)):
        try:
            said = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(said, dict) or said.get("ticket") != ticket or said.get("state") != "failed":
            continue
        if said.get("written", 0.0) >= since and not was_left(str(said.get("sentence", ""))):
            return said
    return {}


def was_left(sentence: str) -> bool:
    """Say whether a process ended since another one had, which knows why."""
    from braindecode_vis.base.devices import LOST_PROCESS

    return LOST_PROCESS in sentence


def name_failure(note: Path) -> Path:
    """Return the file in which a process other than the first says why it ended."""
    return note.with_name(f"{note.stem}.failed.json")


def wait_to_be_ended(seconds: float = 20.0) -> None:
    """Leave the end of the job to the process that knows why, since Slurm takes that of any for the job's."""
    time.sleep(seconds)
