"""Sends a sweep as jobs, one for each run that is missing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from braindecode_vis.cli.show import (
    ConsoleListener,
    make_console,
    print_json,
)  # fmt: skip
from braindecode_vis.parts.cluster.verbs import print_preview, refuse_leaving

if TYPE_CHECKING:
    import pandas as pd


def send_sweep(
    source: str,
    axes: dict[str, list[str]],
    out: Path,
    overrides: list[str],
    root: Path | None,
    executor: str,
    changes: list[str],
    wait: bool | None,
    as_json: bool,
    dry_run: bool,
) -> pd.DataFrame | None:
    """Send a sweep; return its table, or print what was sent where nobody waits."""
    from braindecode_vis.config import read_config
    from braindecode_vis.parts.cluster.submitting import read_cluster
    from braindecode_vis.parts.cluster.sweeps import count_states, sweep_as_jobs

    # One cluster for all runs, so that the swept keys do not matter here.
    settings = read_config(source, overrides, root=root).cluster
    cluster = read_cluster(executor, settings, changes, where=source)
    if dry_run:
        from braindecode_vis.parts.cluster.sweeps import list_tasks
        from braindecode_vis.parts.studies.sweep import plan_sweep

        combinations, configs = plan_sweep(source, axes, out, overrides=overrides, root=root)
        print_preview(out, [list_tasks(combinations, configs)], cluster, as_json)
        return None
    refuse_leaving(cluster, math.prod(map(len, axes.values())), wait is not False)
    done = sweep_as_jobs(
        source,
        axes,
        out,
        cluster,
        overrides=overrides,
        root=root,
        wait=wait is not False,
        listener=ConsoleListener(),
    )
    if done.table is not None:
        return done.table
    if as_json:
        print_json(
            {"run_folder": str(out), "scores": [], "jobs": [state.job.job_id for state in done.states]}
        )
    else:
        make_console(stderr=False).print(
            f"{done.n_there} runs are there, {len(done.sent)} sent, {len(done.known)} sent before: "
            f"{count_states(done.states)}\nlook after them with braindecode-vis status {out}; the same command sends "
            "what is missing, and makes the table",
            markup=False,
        )
    return None
