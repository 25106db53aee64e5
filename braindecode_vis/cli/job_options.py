"""Options of verbs that can run as jobs, and the error if one is given without ``--cluster``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Run as jobs: slurm, local (processes of this machine) or debug (one after the other).",
    ),
]
ClusterSet = Annotated[
    list[str] | None,
    typer.Option("--cluster-set", help="Resource that each job requests, for example memory=16. Repeatable."),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=0,
        help="Graphics cards of each job, on each of its nodes; training takes one process for each.",
    ),
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Machines that train together (--cluster slurm).")
]
Wait = Annotated[
    bool | None,
    typer.Option("--wait/--no-wait", help="Return when the jobs have ended (default), or at once."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="With --cluster slurm: print the scripts and the jobs, and send nothing."),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="How many jobs share the fits of the folds and the images; with --cluster, one per fold by default.",
    ),
]


def refuse_alone(
    changes: Sequence[str] | None,
    wait: bool | None,
    n_workers: int | None = None,
    *,
    dry_run: bool = False,
) -> None:
    """Raise `ConfigError` for options of jobs without ``--cluster``."""
    from braindecode_vis.base.checks import ConfigError

    settings = "--cluster-set (also --gpus and --nodes)"
    given = {settings: changes, "--dry-run": dry_run, "--workers": n_workers is not None}
    if any(given.values()) or wait is not None:
        option = next((name for name, there in given.items() if there), "--wait and --no-wait")
        raise ConfigError(f"{option} applies to jobs only; add --cluster to run jobs, or leave it out.")
