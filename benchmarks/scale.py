"""A sweep of tiny runs as an array on a real Slurm of one node: what a job costs, and what is left after kills.

    python benchmarks/scale.py --tools ../shared/tools --runs 200

The tools start Slurm on loopback (Debian: slurm-wlm, munge; as root). A fifth of the jobs is killed at random, by
scancel or with kill -9, and the controller is restarted once; then the same command is given again, and every byte that
the stages wrote is compared with serial runs of this process. Prints one JSON object; docs/SCALE.md quotes it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SMALL = [
    "evaluation.n_bootstrap=100", "evaluation.n_permutations=100", "dataset.n_train=40", "dataset.n_test=20",
    "dataset.n_voxels=50",
]  # fmt: skip


def say(text: str) -> None:
    """Print progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make_sweep(n_runs: int, out: Path, *more: str) -> list[str]:
    """Return the command of the sweep."""
    words = [
        "sweep",
        "synthetic_digits",
        "--over",
        f"seed=0..{n_runs - 1}",
        "--out",
        str(out),
        "--cluster",
        "slurm",
    ]
    for text in SMALL:
        words += ["--set", text]
    return [sys.executable, "-m", "braindecode_vis", *words, "--cluster-set", "parallel=2", *more]


def measure_overhead(folder: Path, n_jobs: int, n_parallel: int) -> dict[str, float]:
    """Return seconds that a job takes beyond its command, from an array of commands that do next to nothing."""
    from braindecode_vis.cluster.submitting import Cluster, Task, send, send_alone
    from braindecode_vis.cluster.watching import wait_for_jobs
    from braindecode_vis.config.cluster_config import ClusterConfig

    tasks = [Task(f"t{n}", ["--version"], folder / "logs" / f"{n}.log") for n in range(n_jobs)]
    cluster = Cluster("slurm", ClusterConfig(time=10, parallel=n_parallel))
    started = time.monotonic()
    with send_alone(folder, say):
        jobs = send(folder, tasks, cluster)
    sent = time.monotonic() - started
    states = wait_for_jobs(folder, jobs)
    wall = time.monotonic() - started
    assert {state.state for state in states} == {"done"}, Counter(state.state for state in states)
    notes = [json.loads((folder / "jobs" / f"{task.name}.json").read_text()) for task in tasks]
    command = sum(note["command_seconds"] for note in notes) / n_jobs
    per_job = wall * n_parallel / n_jobs
    return {
        "jobs": n_jobs, "at_once": n_parallel, "wall_s": round(wall, 1), "sending_s": round(sent, 1),
        "command_s": round(command, 2), "overhead_s": round(per_job - command, 2),
    }  # fmt: skip


def kill_some(out: Path, slurm: Path, fraction: float, chance: random.Random) -> Counter[str]:
    """End a fraction of the jobs at random moments, restart the controller once, and return what was done."""
    from braindecode_vis.cluster.submitting import read_jobs
    from braindecode_vis.cluster.watching import find_states

    jobs = read_jobs(out)
    victims = set(chance.sample([job.name for job in jobs], round(fraction * len(jobs))))
    done: Counter[str] = Counter()
    restart_at = len(jobs) // 2
    while True:
        states = find_states(out, jobs)
        if sum(not state.is_active for state in states) >= restart_at:
            restart_at = len(jobs) + 1
            os.kill(int((slurm / "ctld.pid").read_text()), signal.SIGKILL)
            time.sleep(2)
            subprocess.run(["/usr/sbin/slurmctld", "-f", str(slurm / "slurm.conf")], check=True)
            done["controller restarted"] += 1
            say("controller restarted")
        for state in states:
            if state.job.name not in victims or not state.is_active:
                continue
            if state.state == "waiting" and chance.random() < 0.02:
                subprocess.run(["scancel", state.job.job_id], check=False)
                done["scancel while waiting"] += 1
            elif state.state == "running" and chance.random() < 0.5:
                note = out / "jobs" / f"{state.job.name}.json"
                if not note.is_file():  # its process is just beginning
                    continue
                pid = json.loads(note.read_text()).get("pid", 0)
                children = subprocess.run(
                    ["pgrep", "-P", str(pid)], capture_output=True, text=True
                ).stdout.split()
                how = chance.choice(["scancel", "kill -9 the command", "kill -9 the job"])
                if how == "scancel" or not children:
                    subprocess.run(["scancel", state.job.job_id], check=False)
                    how = "scancel"
                else:
                    os.kill(int(children[0]) if "command" in how else pid, signal.SIGKILL)
                done[how] += 1
            else:
                continue
            victims.discard(state.job.name)
        if not any(state.is_active for state in states):
            done["never caught"] += len(victims)
            return done
        time.sleep(0.5)


def digest_results(folder: Path) -> dict[str, str]:
    """Return digests of all that the stages computed; the records beside it hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("stages/*/[!.]*/**/*")
        if path.is_file() and path.name != "provenance.json"
    }


def run_alone(n_runs: int, folder: Path) -> dict[str, str]:
    """Compute every run in this process, one after the other, and return the digests."""
    from threadpoolctl import threadpool_limits

    from braindecode_vis.config import read_config
    from braindecode_vis.pipeline.ending import finish_run
    from braindecode_vis.pipeline.runs import open_run

    digests: dict[str, str] = {}
    with threadpool_limits(1):
        for seed in range(n_runs):
            out = folder / f"seed-{seed}"
            finish_run(open_run(read_config("synthetic_digits", [*SMALL, f"seed={seed}"]), out))
            digests |= digest_results(out)
            digests[f"scores of {seed}"] = hashlib.sha256((out / "scores.json").read_bytes()).hexdigest()
    return digests


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--empty", type=int, default=200, help="jobs that do nothing, for the overhead")
    parser.add_argument("--killed", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        slurm, out = top / "slurm", top / "sweep"
        os.environ["SLURM_CONF"] = str(slurm / "slurm.conf")
        os.environ.setdefault("BRAINDECODE_VIS_CACHE", str(top / "cache"))
        subprocess.run(["bash", asked.tools / "slurm_up.sh", slurm], check=True, stdout=sys.stderr)
        try:
            found: dict[str, object] = {"overhead": measure_overhead(top / "empty", asked.empty, 2)}
            say(json.dumps(found))
            started = time.monotonic()
            subprocess.run(make_sweep(asked.runs, out, "--no-wait"), check=True, stdout=sys.stderr)
            found["sent_in_s"] = round(time.monotonic() - started, 1)
            found["kills"] = dict(kill_some(out, slurm, asked.killed, random.Random(asked.seed)))
            found["first_pass_s"] = round(time.monotonic() - started, 1)
            found["after_kills"] = count(out)
            say(json.dumps(found))
            started = time.monotonic()
            subprocess.run(make_sweep(asked.runs, out), check=True, stdout=sys.stderr)
            found["second_pass_s"] = round(time.monotonic() - started, 1)
            found["after_second"] = count(out)
            started = time.monotonic()
            subprocess.run(make_sweep(asked.runs, out), check=True, stdout=subprocess.DEVNULL)
            found["no_op_s"] = round(time.monotonic() - started, 1)
            say(json.dumps(found))
            started = time.monotonic()
            expected = run_alone(asked.runs, top / "alone")
            found["serial_s"] = round(time.monotonic() - started, 1)
            got = digest_results(out)
            for seed in range(asked.runs):
                scores = out / f"seed-{seed}" / "scores.json"
                got[f"scores of {seed}"] = hashlib.sha256(scores.read_bytes()).hexdigest()
            found["files_compared"] = len(expected)
            found["files_that_differ"] = sum(got.get(name) != value for name, value in expected.items())
            found["files_beside"] = len(set(got) - set(expected))
        finally:
            subprocess.run(["scancel", "--me"], check=False)
            time.sleep(2)
            subprocess.run(["bash", asked.tools / "slurm_down.sh", slurm], check=False)
            time.sleep(2)
    print(json.dumps(found, indent=1))


def count(out: Path) -> dict[str, int]:
    """Return how many jobs are in each state."""
    from braindecode_vis.cluster.submitting import read_jobs
    from braindecode_vis.cluster.watching import find_states

    return dict(Counter(state.state for state in find_states(out, read_jobs(out))))


if __name__ == "__main__":
    main()
