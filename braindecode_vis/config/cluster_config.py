"""Resources of a cluster job: partition, memory, time and the like. They change no result and no fingerprint."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.settings import Settings


class ClusterConfig(Settings):
    """Resources that each job requests if a verb is run with ``--cluster``; ignored without it.

    Parameters
    ----------
    partition
        Partition of Slurm; None takes Slurm's default.
    account
        Account that Slurm charges; None takes the user's default.
    gpus
        GPUs of a job, on each of its nodes; 0 hides the GPUs of this machine from local jobs.
    nodes
        Number of machines of a training (`train`, `run` and `pretrain` of encoders that train in several processes).
    processes
        Processes of a training, on each node; None takes one per GPU of `gpus`, or one without GPUs.
    distributed
        How the processes of a training share a network: ``ddp``, each holds all of it, or ``fsdp``, each holds a part
        of weights, gradients and moments (what ``ACCELERATE_USE_FSDP`` asks for).
    cpus
        Processor cores of a job, or of each process of a training; also the threads of its numerical libraries.
    memory
        Memory of a job in GB, on each of its nodes; None takes Slurm's default.
    time
        Time limit of a job in minutes. A minute and a half before the limit, the job is stopped and queued again, and
        continues later.
    requeues
        How often a job that reached its time limit is queued again.
    parallel
        How many jobs of an array run at the same time. With None, Slurm decides (at most 256); on this machine it is
        the number of cores divided by `cpus`.
    setup
        Shell commands before each job, such as ``module load cuda``. Commands from a file need ``--trust-code
        cluster``.
    extra
        Further options of sbatch by their long names, such as ``qos: long``; an empty value gives the option without a
        value. Options from a file need ``--trust-code cluster`` too.
    """

    partition: str | None = None
    account: str | None = None
    gpus: int = Field(default=0, ge=0, le=1024)
    nodes: int = Field(default=1, ge=1, le=4096)
    processes: int | None = Field(default=None, ge=1, le=1024)
    distributed: Literal["ddp", "fsdp"] = "ddp"
    cpus: int = Field(default=1, ge=1, le=4096)
    memory: float | None = Field(default=None, gt=0, le=100_000)
    time: int = Field(default=120, ge=1, le=60 * 24 * 365)
    requeues: int = Field(default=3, ge=0, le=1000)
    parallel: int | None = Field(default=None, ge=1, le=10_000)
    setup: tuple[str, ...] = ()
    extra: dict[str, str] = Field(default_factory=dict)

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {
            "partition", "account", "gpus", "nodes", "processes", "distributed", "cpus", "memory", "time", "requeues",
            "parallel", "setup", "extra",
        }
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_lines(self) -> Self:
        # A line break would end the comment that sbatch reads, and the rest would run as a command.
        for name in ("partition", "account"):
            if (value := getattr(self, name)) is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
                raise ValueError(f"{name} is {value!r}, which is not a valid {name} name of Slurm")
        for key, value in self.extra.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or not value.isprintable():
                raise ValueError(
                    f"extra holds {key!r}: {value!r}; write a long option of sbatch without its dashes and a value of "
                    "one line, such as qos: long"
                )
            if key in _OWN:
                raise ValueError(
                    f"extra holds {key}, which is {_OWN[key]}; leave it out of extra"
                    if _OWN[key] != "set"
                    else f"extra holds {key}, which is set for every job; leave it out"
                )
        if lines := [line for line in self.setup if not line.isprintable() or not line.strip()]:
            raise ValueError(f"setup holds {lines[0]!r}; write each command as one line of its own")
        return self


#: Options of sbatch that have a setting of their own, or that the jobs need for themselves.
_OWN = {
    "partition": "the setting partition", "account": "the setting account", "time": "the setting time",
    "mem": "the setting memory", "cpus-per-task": "the setting cpus", "gpus-per-node": "the setting gpus",
    "nodes": "the setting nodes", "ntasks-per-node": "the setting processes", "array": "the setting parallel",
    "job-name": "set", "output": "set", "error": "set", "open-mode": "set", "signal": "set", "dependency": "set",
    "wrap": "set", "chdir": "set",
}  # fmt: skip
