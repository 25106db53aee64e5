"""The verb ``plan``: estimates a run or a sweep before it is started or sent."""

from __future__ import annotations

import math
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.job_options import ClusterSet
from braindecode_vis.cli.show import (
    Json,
    Root,
    Set,
    Source,
    describe_missing,
    list_overrides,
    make_console,
    make_records,
    make_table_console,
    print_json,
    takes,
)

if TYPE_CHECKING:
    from braindecode_vis.base.settings import NeededWeights
    from braindecode_vis.config import RunConfig
    from braindecode_vis.parts.studies.plan import SweepPlan


@takes("trust_code", "allow_download", "debug")
def plan(
    source: Source,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", help="A setting and its values, as for sweep. Repeatable."),
    ] = None,
    root: Root = None,
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subject", help="Plan for this subject only, or for all subjects together. Repeatable."
        ),
    ] = None,
    overrides: Set = None,
    cluster_set: ClusterSet = None,
    budget: Annotated[
        float, typer.Option("--budget", min=1, help="About how many seconds to measure each piece.")
    ] = 20.0,
    as_json: Json = False,
) -> None:
    """Estimate the time, memory and disk of a run or a sweep.

    Measures small pieces on this machine, and computes GPU hours too.

    Nothing is written or sent. Without the data their published sizes are taken, of one subject unless --subject all
    asks for all, and a small simulated recording is measured; networks whose weights are missing are measured with
    random ones. --dry-run of sweep and of verbs with --cluster shows the script that they would send.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.config import list_weights, read_config
    from braindecode_vis.parts.cluster.submitting import read_cluster
    from braindecode_vis.parts.studies.plan import measure_start, plan_runs
    from braindecode_vis.parts.studies.sweep import parse_axes, plan_sweep

    started, every_subject = measure_start(), subjects == ["all"]
    changes = list_overrides(overrides, None if every_subject else subjects)
    config = read_config(source, changes, root=root)
    cluster = read_cluster("slurm", config.cluster, cluster_set or [], where=source)
    configs = [config]
    if over:
        out = Path("runs") / f"plan of {config.name}"  # never made
        configs = plan_sweep(source, parse_axes(over), out, overrides=changes, root=root)[1]
    console = make_console()
    found = plan_runs(
        configs, tell=lambda words: console.print(f"plan: {words}", markup=False), budget=budget,
        every_subject=every_subject, started=started,
    )  # fmt: skip
    needed: list[NeededWeights] = []
    with suppress(ConfigError):  # a package is not installed, as the step that needs it says
        needed = list_weights(config)
    notes = _list_notes(found, configs)
    asks: dict[str, Any] = {}
    # Nothing is advised where a step has no estimate: a job would end too early.
    if not any(plan.unknown for plan, _ in found.plans):
        asks, more = _ask(found, cluster.settings.model_dump())
        notes += more
    if as_json:
        print_json(_as_json(found, asks, notes) | {"weights": make_records(needed)})
        return
    if any(one.path is None for one in needed):
        command = shlex.join(["weights", "list", source, *(f"--set={change}" for change in overrides or ())])
        notes += [*describe_missing(needed), f"commands that fetch them: braindecode-vis {command}"]
    _print_plan(found, cluster.settings.parallel, asks, notes, swept=bool(over))


def _ask(found: SweepPlan, cluster: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a job should ask for, with room, and where the jobs of the configuration ask for too little."""
    longest = max((plan.total("high") or 0.0 for plan, _ in found.plans), default=0.0)
    memory = found.total("memory")
    asks = {
        "time": max(10, math.ceil(1.5 * longest / 60)),
        "memory": None if memory is None else max(2, math.ceil(1.3 * memory / 1e9)),
    }
    return asks, [
        f"a job requests {cluster[key]:g} {unit}, which may be too little: --cluster-set {key}={asks[key]}"
        for key, unit in (("memory", "GB"), ("time", "minutes"))
        if cluster.get(key) and asks[key] and cluster[key] < asks[key]
    ]


def _list_notes(found: SweepPlan, configs: list[RunConfig]) -> list[str]:
    """Return what a reader must know of the numbers."""
    first, notes = found.plans[0][0], []
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > cores:
        notes.append(
            f"other work shares this machine (a load of {load:.0f} on {cores} cores), so the times are "
            "those of a busy machine; the processor time is closer to the time on an idle machine"
        )
    if unknown := first.unknown:
        notes.append(
            f"no estimate of time for {', '.join(unknown)}; the sums are without {'them' if len(unknown) > 1 else 'it'}"
        )
    for plan, _ in found.plans:
        notes += [
            f"the range of {step.name} is wide, as only a small piece was measured; a larger --budget measures more"
            for step in plan.steps
            if step.low and step.high and step.high > 4.05 * step.low
        ]
    if found.count_gpu_hours() is None:
        notes.append(
            "GPU hours are not known: no step was measured on a GPU here; run the command on a machine with a GPU"
        )
    if len(found.plans) < len({id(c) for c in configs}) and len(found.plans) > 1:
        notes.append(f"{len(found.plans)} settings were measured; the other runs are assumed to be similar")
    shared = {name: n for name, n in found.counts.items() if n < found.n_runs and name != "start"}
    if shared:
        told = ", ".join(f"{name} {n} times" for name, n in shared.items())
        notes.append(f"{found.n_runs} runs compute {told}, which the others reuse")
    seeds = {config.seed for config in configs}
    if len(seeds) > 1 and found.counts.get("preprocess", 1) >= len(seeds):
        notes.append(
            "every seed repeats the preprocessing, since the split may depend on the seed: the trials "
            "are on the disk once per seed"
        )
    return notes


def _as_json(found: SweepPlan, asks: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    from dataclasses import asdict

    from braindecode_vis.base.store import json_plain

    names = ("seconds", "low", "high", "cpu_seconds", "memory", "disk")
    plans = [
        {"runs": n, "sizes": asdict(plan.sizes), "steps": [asdict(step) for step in plan.steps]}
        for plan, n in found.plans
    ]
    total = {name: found.total(name) for name in names} | {"gpu_hours": found.count_gpu_hours()}
    content: dict[str, Any] = json_plain(
        {"run_folder": None, "scores": [], "n_runs": found.n_runs, "plans": plans, "total": total,
         "counts": found.counts, "ask": asks, "notes": notes}
    )  # fmt: skip
    return content


def _print_plan(
    found: SweepPlan, parallel: int | None, asks: dict[str, Any], notes: list[str], *, swept: bool
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from braindecode_vis.base.memory import describe_bytes

    console = make_table_console()
    for number, (plan, n) in enumerate(found.plans):
        sizes = plan.sizes
        shape = " x ".join(map(str, sizes.shape))
        read = "" if sizes.input_bytes is None else f", {describe_bytes(sizes.input_bytes)} read"
        people = "1 subject" if len(sizes.subjects) == 1 else f"{len(sizes.subjects)} subjects"
        setting = f"setting {number + 1}, for {n} runs: " if len(found.plans) > 1 else ""
        trials = f"{sizes.n_stored:,} trials of {shape}, {sizes.n_images:,} images{read}"
        title = f"{setting}{people}, {trials}"
        console.print(f"{title}; sizes from {sizes.origin}", markup=False, soft_wrap=True)
        table = Table(box=SIMPLE_HEAD)
        for name in ("step", "time", "range", "processor", "memory", "disk", "how"):
            table.add_column(name, overflow="fold")
        for step in plan.steps:
            table.add_row(
                step.name, describe_seconds(step.seconds),
                "" if step.low is None else f"{describe_seconds(step.low)} to {describe_seconds(step.high)}",
                describe_seconds(step.cpu_seconds),
                *("" if value is None else describe_bytes(value) for value in (step.memory, step.disk)), step.how,
            )  # fmt: skip
        console.print(table)
    seconds, cpu, memory, disk = (found.total(key) for key in ("seconds", "cpu_seconds", "memory", "disk"))
    runs = f"{found.n_runs} runs" if found.n_runs > 1 else "one run"
    size = [
        f"{describe_bytes(value)} {where}"
        for value, where in ((memory, "of memory"), (disk, "on disk"))
        if value
    ]
    if seconds is None or cpu is None:
        lines = [", ".join([f"{runs}: no estimate of time", *size])]
    else:
        after = " one after the other" if found.n_runs > 1 else ""
        spread = f"{describe_seconds(found.total('low'))} to {describe_seconds(found.total('high'))}"
        hours = f"{cpu / 3600:.3g} CPU hours"
        lines = [", ".join([f"{runs}: {describe_seconds(seconds)}{after} ({spread})", hours, *size])]
    if (gpu := found.count_gpu_hours()) is not None:
        lines.append(f"GPU hours, on this machine's GPU: {gpu:.3g}")
    if swept and parallel and seconds is not None:
        waves = math.ceil(found.n_runs / parallel)
        lines.append(f"{parallel} at once: about {describe_seconds(seconds / found.n_runs * waves)}")
    lines += [f"note: {text}" for text in notes]
    if asked := " ".join(f"--cluster-set {key}={value}" for key, value in asks.items() if value):
        lines.append(f"a job with enough resources: --cluster slurm {asked}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def describe_seconds(seconds: float | None) -> str:
    """Return a time as people write it.

    Examples
    --------
    >>> describe_seconds(3.21), describe_seconds(150), describe_seconds(9000), describe_seconds(None)
    ('3.2 s', '2.5 min', '2.5 h', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
