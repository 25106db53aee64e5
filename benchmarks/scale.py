"""A sweep of tiny runs as an array on a real Slurm of one node: what a job costs, and what is left after kills.

    python benchmarks/scale.py --tools TOOLS --runs 200

The tools start Slurm on loopback (Debian: slurm-wlm, munge; as root). A fifth of the jobs is killed at random, by
scancel or with kill -9, and the controller is restarted once; then the same command is given again, and every byte that
the stages wrote is compared with serial runs of this process. Prints one JSON object, which docs/research/CLUSTER.md
quotes.

    python benchmarks/scale.py --images 10000,100000,1000000 --folder banks

measures time, memory and disk of images instead: phantom images drawn on the fly, embedded as 1024 pixels by one
process and by two, and 200 queries searched among them, exactly and by faiss. Banks that are there are searched.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
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
    from braindecode_vis.config.cluster_config import ClusterConfig
    from braindecode_vis.parts.cluster.submitting import Cluster, Task, send, send_alone
    from braindecode_vis.parts.cluster.watching import wait_for_jobs

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
    from braindecode_vis.parts.cluster.submitting import read_jobs
    from braindecode_vis.parts.cluster.watching import find_states

    jobs = read_jobs(out)
    victims = set(chance.sample([job.name for job in jobs], round(fraction * len(jobs))))
    before = {
        name for name in victims if chance.random() < 0.3
    }  # these end while they wait, the others at work
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
            if state.state == "waiting" and state.job.name in before and chance.random() < 0.05:
                subprocess.run(["scancel", state.job.job_id], check=False)
                done["scancel while waiting"] += 1
            elif state.state == "running" and chance.random() < 0.3:
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
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--empty", type=int, default=200, help="jobs that do nothing, for the overhead")
    parser.add_argument("--killed", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", help="numbers of images to embed and search, in place of the sweep")
    parser.add_argument("--at-once", default="1,2", help="with --images: numbers of processes that embed")
    parser.add_argument(
        "--folder", type=Path, default=Path("banks"), help="with --images: where banks are kept"
    )
    parser.add_argument("--search", choices=["exact", "faiss"], help="search the bank --folder alone")
    asked = parser.parse_args()
    if asked.search is not None:
        print(json.dumps(search_bank(asked.folder, asked.search)))
        return
    if asked.images is not None:
        sizes, at_once = ([int(n) for n in text.split(",")] for text in (asked.images, asked.at_once))
        print(json.dumps(measure_images(sizes, asked.folder, at_once), indent=1))
        return
    if asked.tools is None:
        parser.error("--tools is needed to start Slurm")
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


# --- images -----------------------------------------------------------------------------------------------


def measure_command(words: Sequence[str], out: Path) -> dict[str, float]:
    """Run a command, and return its wall and processor time and its peak memory; what it prints goes into a file."""
    started = time.monotonic()
    with out.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=sys.stderr)
        _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return {
        "wall_s": round(time.monotonic() - started, 2), "processor_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_mb": round(used.ru_maxrss / 1024), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def measure_images(sizes: Sequence[int], folder: Path, n_workers: Sequence[int]) -> dict[str, object]:
    """Embed banks of several sizes by one process and several, search each, and return figures and exponents."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for n in sizes:
        rows = found[str(n)] = {}
        bank = folder / f"p{n}"
        for workers in n_workers:
            made = bank if workers == n_workers[0] else folder / f"p{n}-{workers}"
            if (made / "manifest.json").is_file():
                continue
            words = [
                sys.executable, "-P", "-m", "braindecode_vis", "embed", "synthetic_digits", "--set",
                "target.kind=pixels", "--set", "target.size=32", "--images", f"phantom:{n},size=32", "--bank",
                str(made),
            ]  # fmt: skip
            rows[f"embed, {workers} at once"] = measure_command(
                [*words, *(["--workers", str(workers)] if workers > 1 else [])], folder / "embed.txt"
            )
            say(json.dumps({str(n): rows}))
        rows["disk"] = {"mb": round(sum(file.stat().st_size for file in bank.iterdir()) / 1e6, 1)}
        for search in ("exact", "faiss"):
            words = [sys.executable, "-P", __file__, "--search", search, "--folder", str(bank)]
            rows[search] = measure_command(words, folder / "search.txt")
            rows[search] |= json.loads((folder / "search.txt").read_text())
            say(json.dumps({str(n): rows}))
    exponents = {}
    for what in found[str(sizes[0])] if len(sizes) > 1 else ():
        for key in ("processor_s", "peak_mb", "mb", "searching_s"):
            ends = [found[str(n)].get(what, {}).get(key) for n in (sizes[0], sizes[-1])]
            if all(ends):
                slope = math.log(ends[1] / ends[0]) / math.log(sizes[-1] / sizes[0])  # type: ignore[operator]
                exponents[f"{what}: {key}"] = round(slope, 2)
    return {"images": found, "exponents": exponents}


def search_bank(bank: Path, search: str, n_queries: int = 200) -> dict[str, object]:
    """Search queries near images that the bank does not hold; exact ranks are compared with those of plain NumPy."""
    import numpy as np

    from braindecode_vis.base.arrays import Embeddings, MappedRows, read_rows
    from braindecode_vis.embeddings.image_bank import read_image_bank
    from braindecode_vis.scoring.gallery_scores import GalleryTask, LargeGalleryConfig, score_large_gallery

    held, chance = read_image_bank(bank), np.random.default_rng(0)
    some = read_rows(held.vectors, np.sort(chance.choice(len(held), 1000, replace=False)))
    mean = some.mean(axis=0, dtype=np.float64).astype(np.float32)
    pairs = read_rows(held.vectors, np.sort(chance.choice(len(held), 2 * n_queries, replace=False)))
    pairs = pairs.astype(np.float32)
    tested = 0.7 * pairs[::2] + 0.3 * pairs[1::2] - mean
    near = tested + 6 * tested.std() * chance.standard_normal(tested.shape, dtype=np.float32)
    names = [f"tested {number}" for number in range(n_queries)]
    task = GalleryTask(
        Embeddings(near, names, "x"), Embeddings(tested, names, "x"),
        Embeddings.from_checked(MappedRows(held.vectors, lambda rows, _: rows - mean), held.ids, "x"),
    )  # fmt: skip
    started = time.monotonic()
    config = LargeGalleryConfig(bank=bank, search=search)  # type: ignore[arg-type]
    scores = score_large_gallery(
        config, [task], np.full(n_queries, "01", object), protocol="x", split="test", seed=0, n_bootstrap=100,
        device="cpu",
    )  # fmt: skip
    found: dict[str, object] = {"searching_s": round(time.monotonic() - started, 1)}
    found |= {score.metric: round(score.value, 4) for score in scores}
    if search == "exact":
        above = np.zeros(n_queries, int)
        left = near.astype(np.float64) / np.linalg.norm(near.astype(np.float64), axis=1, keepdims=True)
        right = tested.astype(np.float64) / np.linalg.norm(tested.astype(np.float64), axis=1, keepdims=True)
        own = (left * right).sum(axis=1)
        for start in (None, *range(0, len(held), 4096)):
            rows = right
            if start is not None:
                numbers = np.arange(start, min(start + 4096, len(held)))
                # Not by the pages of the map, which would count as memory.
                rows = (read_rows(held.vectors, numbers).astype(np.float32) - mean).astype(np.float64)
                rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            above += (left @ rows.T > own[:, None] + 1e-10).sum(axis=1)
        found["median rank in double precision"] = float(np.median(1 + above))
        found["top10 in double precision"] = round(float((above < 10).mean()), 4)
    return found


def count(out: Path) -> dict[str, int]:
    """Return how many jobs are in each state."""
    from braindecode_vis.parts.cluster.submitting import read_jobs
    from braindecode_vis.parts.cluster.watching import find_states

    return dict(Counter(state.state for state in find_states(out, read_jobs(out))))


if __name__ == "__main__":
    main()
