"""Time, memory and disk of whole runs against subjects and folds; and what `plan` foretells beside what runs take.

    python benchmarks/scale_growth.py subjects folds
    python benchmarks/scale_growth.py plan
    python benchmarks/scale_growth.py shares
    python benchmarks/scale_growth.py --rehearse FOLDER things_eeg2_ridge =--root DATA =--over seed=0,1 \
        --called "THINGS-EEG2, one subject" --write docs/research/BENCHMARKS.md

Each run is a process of its own: processor time of its stages, most resident memory, bytes of its folder. An exponent
is the slope of logarithms over all sizes. `plan` measures its pieces and then runs the very thing; prints JSON, which
docs/research/CLUSTER.md quotes. `shares` trains the folds of a run by one process and by two.
`--rehearse` calls `plan` and then the command itself, a sweep as local jobs, on data as large as the real ones, and
writes what each stage took beside what `plan` said.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import describe_machine, fit_exponent, put_section

SUBJECTS, FOLDS = (1, 2, 4, 8), (2, 4, 8, 16)
N_TRIALS, N_FEATURES, SIDE = 640, 850, 64  # of a subject: 17 channels x 50 samples; pixels of a picture
#: Small runs of each kind of encoder and data that `plan` foretells.
PLANNED = {
    "ridge, synthetic digits": ["synthetic_digits", "dataset.n_train=1400", "dataset.n_test=200"],
    "network, synthetic digits": [
        "synthetic_digits", "dataset.n_train=800", "dataset.n_test=100", "encoder.kind=network", "encoder.epochs=20",
        "encoder.network.kind=residual_mlp", "encoder.network.hidden=256",
    ],
    "ridge, phantom EEG": ["things_eeg2_ridge", "--root", "PHANTOM"],
    "EEGProject, phantom EEG": [
        "things_eeg2_ridge", "--root", "PHANTOM", "encoder={kind: network, network: {kind: eegproject}, epochs: 10}",
    ],
}  # fmt: skip


def run_once(what: str, n: int, folder: Path) -> dict[str, float]:
    """Decode random trials of `n` subjects, or with `n` folds, and return what the run took."""
    import braindecode_vis as bdv
    from braindecode_vis import pipeline
    from braindecode_vis.config import validate_config
    from braindecode_vis.pipeline.runs import open_run

    n_subjects, folds = (n, None) if what == "subjects" else (1, n)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N_TRIALS, SIDE, SIDE, 3), dtype=np.uint8)
    split = np.where(np.arange(N_TRIALS) % 10, "train", "test")
    shown = np.tile(np.arange(N_TRIALS), n_subjects)
    data = bdv.from_arrays(
        rng.standard_normal((len(shown), N_FEATURES), dtype=np.float32), images=pictures, shown=shown,
        subject=np.repeat([f"{k:02d}" for k in range(n_subjects)], N_TRIALS),
        split=None if folds else np.tile(split, n_subjects),
    )  # fmt: skip
    data.save(folder / "data")
    config = {
        "name": "growth", "dataset": data.as_settings(folder / "data"), "target": {"kind": "pixels", "size": 16},
        "encoder": {"kind": "ridge"}, "generator": {"kind": "nearest"},
        "evaluation": {"n_bootstrap": 1000, "n_permutations": 1000},
        "split": {"kind": "kfold", "n_folds": folds} if folds else {"kind": "published"},
    }  # fmt: skip
    run = open_run(validate_config(config, where="growth"), folder / "run")
    found: dict[str, float] = {}
    for stage in pipeline.STAGES:
        before = sum(os.times()[:4])
        getattr(pipeline, stage)(run)
        found[stage] = sum(os.times()[:4]) - before
    found["seconds"] = sum(found.values())
    found["peak_bytes"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["disk_bytes"] = float(sum(f.stat().st_size for f in (folder / "run").rglob("*") if f.is_file()))
    return found


def measure_growth(what: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the numbers of every size, each from a process of its own, and their exponents."""
    rows: dict[int, dict[str, float]] = {}
    for n in sizes:
        command = [sys.executable, __file__, "--once", what, str(n)]
        rows[n] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(what, n, rows[n], file=sys.stderr, flush=True)
    exponents = {
        name: round(fit_exponent(list(rows), [max(row[name], 1e-3) for row in rows.values()])[0], 2)
        for name in rows[sizes[0]]
    }
    return {"rows": rows, "exponents": exponents}


def measure_shares(folder: Path, n_folds: int = 8) -> dict[str, dict[str, float]]:
    """Train the folds of one run by one process, and by two that share them; starting Python is part of it."""
    data = [
        "dataset.n_train=1200", "dataset.n_voxels=1000", "split.kind=kfold", f"split.n_folds={n_folds}",
        "encoder.kind=network", "encoder.network.kind=residual_mlp", "encoder.network.hidden=512",
        "encoder.epochs=100",
    ]  # fmt: skip
    settings = [word for text in data for word in ("--set", text)]
    found: dict[str, dict[str, float]] = {}
    for n in (1, 2):
        words = ["synthetic_digits", *settings, "--out", str(folder / f"run-{n}")]
        command = [sys.executable, "-m", "braindecode_vis"]
        subprocess.run([*command, "embed", *words], check=True, stdout=subprocess.DEVNULL)
        before, began = sum(os.times()[2:4]), time.monotonic()
        shares = [["--worker", str(i), "--workers", str(n)] if n > 1 else [] for i in range(n)]
        started = [
            subprocess.Popen([*command, "train", *words, *share], stdout=subprocess.DEVNULL)
            for share in shares
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit("a training of folds failed")
        found[str(n)] = {
            "wall_s": round(time.monotonic() - began, 1), "processor_s": round(sum(os.times()[2:4]) - before, 1),
            "load": round(os.getloadavg()[0], 1),
        }  # fmt: skip
    return found


def compare_plan(words: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return estimated and true numbers of each step of a run."""
    from braindecode_vis.base import store
    from braindecode_vis.config import read_config
    from braindecode_vis.parts.studies.plan import plan_run
    from braindecode_vis.pipeline.reporting import run_all
    from braindecode_vis.pipeline.runs import open_run

    source, *rest = words
    root = Path(rest.pop(0)) if rest[:1] == ["--root"] and rest.pop(0) else None
    config = read_config(source, rest, root=root)
    planned = plan_run(config, budget=10)
    run = open_run(config, folder / "run")
    run_all(run)
    true: dict[str, list[float]] = {}
    for _, artifact in run.produced:
        record = store.read_provenance(artifact.path / store.PROVENANCE)
        found = true.setdefault(record["stage"], [0.0, 0.0, 0.0])
        size = sum(f.stat().st_size for f in artifact.path.rglob("*") if f.is_file())
        for place, value in enumerate((record["seconds"], record["profile"]["cpu_seconds"], size)):
            found[place] += value
    return [
        {
            "step": step.name, "seconds": [step.seconds, true[step.name][0]],
            "in_range": step.low <= true[step.name][0] <= step.high,
            "cpu_seconds": [step.cpu_seconds, true[step.name][1]], "disk": [step.disk, true[step.name][2]],
        }
        for step in planned.steps
        if step.name in true and step.seconds is not None and step.low is not None and step.high is not None
    ]  # fmt: skip


def rehearse(out: Path, source: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """Call `plan` and then `run`, or a sweep as local jobs, and return what each stage took beside what was said."""
    command, given = [sys.executable, "-m", "braindecode_vis"], [source, *options]
    planned = [*command, "plan", *given, "--budget", "5", "--json"]
    said = json.loads(subprocess.run(planned, check=True, stdout=subprocess.PIPE, text=True).stdout)
    call = ["sweep", "--cluster", "local"] if "--over" in options else ["run"]
    subprocess.run([*command, *call, *given, "--out", str(out)], check=True, stdout=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for plan in said["plans"]:
        for step in plan["steps"]:
            row = rows.setdefault(
                step["name"], {"said": dict.fromkeys(("cpu_seconds", "memory", "disk"), 0.0)}
            )
            times = plan["runs"] * said["counts"].get(step["name"], said["n_runs"]) / said["n_runs"]
            row["said"]["cpu_seconds"] += times * (step["cpu_seconds"] or 0.0)
            row["said"]["disk"] += times * (step["disk"] or 0.0)
            row["said"]["memory"] = max(row["said"]["memory"], step["memory"] or 0.0)
    for path in sorted(out.glob("stages/*/*/provenance.json")):
        record = json.loads(path.read_text())
        row = rows.setdefault(record["stage"], {"said": {}})
        true = row.setdefault("true", {"times": 0, "cpu_seconds": 0.0, "memory": 0.0, "disk": 0.0})
        true["times"] += 1
        true["cpu_seconds"] += record["profile"]["cpu_seconds"]
        true["memory"] = max(true["memory"], record["profile"]["peak_memory_bytes"])
        true["disk"] += sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    # What a command takes to start, such as loading libraries, falls into whichever stage comes first.
    found = [
        {"stage": name, "true": {}, **row} for name, row in rows.items() if "true" in row or name == "start"
    ]
    whole = {
        which: {
            key: (max if key == "memory" else sum)(row[which].get(key, 0.0) for row in found)
            for key in ("cpu_seconds", "memory", "disk")
        }
        for which in ("said", "true")
    }
    return [*found, {"stage": "all", **whole}]


def tell_rehearsal(called: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the section of a rehearsal: the numbers of `plan` beside those of the run."""
    lines = ["| stage | computed | " + " | ".join(
        f"{name}: run | plan | ratio" for name in ("processor time, s", "peak memory, GB", "disk, GB")
    ) + " |", "|---" * 11 + "|"]  # fmt: skip
    for row in rows:
        cells = [row["stage"], str(row["true"].get("times", ""))]
        for key, unit in (("cpu_seconds", 1.0), ("memory", 1e9), ("disk", 1e9)):
            true, said = (row[which].get(key, 0.0) / unit for which in ("true", "said"))
            cells += [
                f"{true:.3g}",
                f"{said:.3g}" if said else "-",
                f"{said / true:.2f}" if said and true else "-",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return f"## Rehearsal: {called}\n\n{describe_machine()}\n\n" + "\n".join(lines)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", choices=("subjects", "folds", "plan", "shares", []))
    parser.add_argument("--once", nargs=2)
    parser.add_argument("--compare", nargs="+")
    parser.add_argument("--rehearse", nargs="+", metavar=("OUT", "SOURCE"))
    parser.add_argument("--called", default="")
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        os.environ["BRAINDECODE_VIS_CACHE"] = str(Path(made) / "cache")
        if asked.once:
            print(json.dumps(run_once(asked.once[0], int(asked.once[1]), Path(made))))
            return
        if asked.compare:
            print(json.dumps(compare_plan([word.removeprefix("=") for word in asked.compare], Path(made))))
            return
        if asked.rehearse:
            out, source, *options = asked.rehearse
            rows = rehearse(Path(out), source, [word.removeprefix("=") for word in options])
            print(json.dumps(rows, indent=1))
            if asked.write:
                section = tell_rehearsal(asked.called, rows)
                page = put_section(asked.write.read_text(), section, f"scale_growth.py, {asked.called}")
                asked.write.write_text(page)
            return
        found: dict[str, Any] = {}
        if "plan" in asked.what:
            phantom = Path(made) / "phantom"
            words = ["phantom", "things-eeg2", "--size", "tiny", "--out", str(phantom)]
            subprocess.run([sys.executable, "-m", "braindecode_vis", *words], check=True, stdout=sys.stderr)
            for name, given in PLANNED.items():
                given = ["=" + word.replace("PHANTOM", str(phantom)) for word in given]
                command = [sys.executable, __file__, "--compare", *given]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name] = json.loads(done.stdout.splitlines()[-1])
                print(name, found[name], file=sys.stderr, flush=True)
        for what, sizes in (("subjects", SUBJECTS), ("folds", FOLDS)):
            if what in asked.what:
                found[what] = measure_growth(what, sizes)
        if "shares" in asked.what:
            found["shares"] = measure_shares(Path(made))
        found["load"] = os.getloadavg()[0]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
