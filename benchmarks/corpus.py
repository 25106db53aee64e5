"""A corpus against its size: time, memory and disk of building it, of opening it, and of reading shuffled batches.

``build`` adds sources of random runs of 400 parcels (the runs are drawn when they are read, whose time is told apart),
each size in a process of its own. ``read`` opens a corpus of 10,000 hours whose shards are sparse files, so that they
take no room; their zeros change nothing of what is measured but the time that a disk would take. ``stream`` reads a
corpus that is on the disk, beside a bare loop over one memory map.

Run with ``OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/corpus.py build read stream``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from joint_memory import read_memory
from measuring import fit_exponent

from braindecode_vis.base.store import write_json
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.datasets.corpus.manifest import (
    RUNS,
    VALUES,
    CorpusManifest,
    Shard,
    find_shard,
    name_subject,
    write_manifest,
)
from braindecode_vis.datasets.corpus.reader import open_corpus
from braindecode_vis.datasets.corpus.recordings import Channels, Excluded, SeriesRun
from braindecode_vis.parts.foundation.corpus.growing import add_sources

N_PARCELS, MINUTES, T_R = 400, 15.0, 2.0
N_TIMES = round(MINUTES * 60 / T_R)
NAMES = tuple(f"7Networks_LH_Vis_{n}" for n in range(N_PARCELS))
CONFIG = CorpusConfig(shard_mb=32)


class RandomSources:
    """Roots whose name says how many runs they hold; a person has four."""

    def __init__(self) -> None:
        self.drawing_s = 0.0

    def read_channels(self, config: CorpusConfig, roots: Sequence[Path]) -> Channels:
        return Channels(NAMES, ("Vis",) * N_PARCELS)

    def find_runs(self, root: Path, config: CorpusConfig) -> tuple[list[SeriesRun], list[Excluded]]:
        return [self._open(root, number) for number in range(int(root.name.rpartition("-")[2]))], []

    def _open(self, root: Path, number: int) -> SeriesRun:
        path = root / f"run-{number}"
        if not path.exists():
            path.write_text(f"{root.name} {number}")

        def read() -> np.ndarray:
            start = time.process_time()
            rng = np.random.default_rng([zlib.crc32(root.name.encode()), number])
            drawn = rng.standard_normal((N_TIMES, N_PARCELS), dtype=np.float32)
            self.drawing_s += time.process_time() - start
            return drawn

        return SeriesRun(
            source=root.name, subject=str(number // 4), session="", run=str(number), task="rest", site=root.name,
            files=(path,), modality="fmri", channels=NAMES, missing=(), n_times=N_TIMES, interval_s=T_R,
            motion_mm=0.1, licence="CC0", read=read,
        )  # fmt: skip


def build(n_sources: int, n_runs: int) -> dict[str, float]:
    """Build a corpus and return what it took: processor time without drawing (s), peak memory (MB), bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        roots = [Path(temporary) / f"source{n}-{n_runs}" for n in range(n_sources)]
        for root in roots:
            root.mkdir()
        sources = RandomSources()
        for root in roots:
            sources.find_runs(root, CONFIG)
        time.sleep(3)  # digests of files wait until a later write must show in their times
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        done = add_sources(Path(temporary) / "corpus", roots, CONFIG, sources=sources)
        taken = time.process_time() - start - sources.drawing_s
        start = time.process_time()
        add_sources(Path(temporary) / "corpus", roots, CONFIG, sources=sources)
        return {
            "hours": done.hours, "seconds": taken, "again": time.process_time() - start, "bytes": done.n_bytes,
            "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024,
        }  # fmt: skip


def measure_building(sizes: Sequence[tuple[int, int]], what: str) -> None:
    found = []
    for size in sizes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(build, *size).result())
        row = found[-1]
        print(
            f"{size[0]} sources of {size[1]} runs, {row['hours']:.0f} h: {row['seconds']:.2f} s, "
            f"{row['memory']:.0f} MB above the start, {row['bytes'] / 1e6:.0f} MB on disk; "
            f"added again {row['again']:.2f} s",
            flush=True,
        )
    counts = [size[what == "hours"] for size in sizes]
    for name in ("seconds", "memory", "bytes", "again"):
        print(f"  exponent of {name}: {fit_exponent(counts, [row[name] for row in found])[0]:.2f}")


def write_sparse_corpus(folder: Path, hours: float) -> None:
    """Write a corpus of zeros of the full size."""
    n_runs, per_shard = round(hours * 60 / MINUTES), round(128e6 / (N_TIMES * N_PARCELS * 2))
    manifest = CorpusManifest(CONFIG, Channels(NAMES, ("Vis",) * N_PARCELS), "fmri")
    shards, subjects = [], []
    for number, first in enumerate(range(0, n_runs, per_shard)):
        rows = []
        for n in range(first, min(first + per_shard, n_runs)):
            source, subject = f"source{n % 50}", f"{n // 200}"
            subjects.append(name_subject(source, subject))
            rows.append(
                {
                    "run_id": f"{source}/{subject}/sub-{subject}_task-rest_run-{n}_bold.nii.gz", "source": source,
                    "subject": subject, "session": "", "run": str(n), "task": "rest", "site": source, "licence": "CC0",
                    "n_times": N_TIMES, "interval_s": T_R, "motion_mm": 0.1, "scrubbed": 0.0,
                    "start": (n - first) * N_TIMES * N_PARCELS, "missing": [], "files": f"{n:016x}",
                    "digest": f"{n:032x}",
                }
            )  # fmt: skip
        place = find_shard(folder, f"{number:05d}-{number:016x}")
        place.mkdir(parents=True)
        write_json(place / RUNS, rows)
        with (place / VALUES).open("wb") as file:
            shape = (len(rows) * N_TIMES * N_PARCELS,)
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
            )
            n_bytes = file.tell() + 2 * shape[0]
            file.truncate(n_bytes)
        shards.append(Shard(place.name, n_bytes, f"{number:032x}", f"{number:032x}"))
    known = tuple(dict.fromkeys(subjects))
    write_manifest(
        folder, replace(manifest, shards=tuple(shards), subjects=known, held_out=frozenset(known[::20]))
    )


def measure_reading(hours: float, n_times: int, n_batches: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_sparse_corpus(folder, hours)
        base, start = read_memory()[0], time.process_time()
        corpus = open_corpus(folder)
        n_bytes = sum(shard.n_bytes for shard in corpus.manifest.shards)
        print(
            f"{len(corpus.runs)} runs, {hours:g} h, {n_bytes / 1e9:.1f} GB, {len(corpus.manifest.shards)} shards"
        )
        _tell("opened", start, base)
        start = time.process_time()
        windows = corpus.windows(n_times)
        _tell(f"{len(windows)} windows of {n_times}", start, base)
        start = time.process_time()
        order = windows.iterate(128, seed=0, epoch=0)
        for _ in range(n_batches):
            windows.read(next(order))
        _tell(f"{n_batches} batches of 128", start, base)


def _tell(what: str, start: float, base: float) -> None:
    anonymous, mapped = read_memory()
    taken = time.process_time() - start
    print(f"{what}: {taken:.2f} s, {anonymous - base:.0f} MiB held, {mapped:.0f} MiB of file pages")


def measure_stream(n_runs: int, n_times: int) -> None:
    """Compare an epoch of shuffled batches with the same windows taken from one memory map by a bare loop."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / f"source-{n_runs}"
        root.mkdir()
        add_sources(Path(temporary) / "corpus", [root], CONFIG, sources=RandomSources())
        windows = open_corpus(Path(temporary) / "corpus").windows(n_times)
        batches = list(windows.iterate(128, seed=0, epoch=0))
        paths = sorted((Path(temporary) / "corpus").glob("stages/shard/*/values.npy"))
        series = np.concatenate([np.load(path, mmap_mode="r") for path in paths]).reshape(-1, N_PARCELS)
        np.save(Path(temporary) / "one.npy", series)
        one = np.load(Path(temporary) / "one.npy", mmap_mode="r")
        starts = np.random.default_rng(0).permutation(len(one) // n_times - 1) * n_times

        def read_ours() -> int:
            return sum(len(windows.read(rows)) for rows in batches)

        def read_bare() -> int:
            n = 0
            for first in range(0, len(windows), 128):
                mine = np.resize(starts, len(windows))[first : first + 128]
                out = np.empty((len(mine), N_PARCELS, n_times), np.float32)
                for i, start in enumerate(mine.tolist()):
                    out[i] = one[start : start + n_times].T
                n += len(out)
            return n

        ratios = []
        for _ in range(5):
            taken = []
            for read in (read_ours, read_bare):
                start = time.process_time()
                n = read()
                taken.append(time.process_time() - start)
            ratios.append(taken[0] / taken[1])
        print(f"{n} windows: {n / taken[0]:.0f} a second, {np.median(ratios):.2f} times the bare loop's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=("build", "read", "stream"))
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    parser.add_argument("--hours", type=float, default=10_000)
    options = parser.parse_args()
    if "build" in options.what:
        measure_building([(n, 4) for n in ((1, 2, 4) if options.quick else (4, 16, 64, 256))], "sources")
        measure_building([(1, n) for n in ((4, 8, 16) if options.quick else (64, 256, 1024))], "hours")
    if "read" in options.what:
        measure_reading(50 if options.quick else options.hours, 30, 2 if options.quick else 200)
    if "stream" in options.what:
        measure_stream(8 if options.quick else 200, 30)


if __name__ == "__main__":
    main()
