"""What it costs that every byte of inputs and artifacts is hashed, and how fast a later run decides to reuse them.

Files of random bytes stand for the recordings of a data set, or for the arrays of a store. Printed are the time of the
first reading, of the decision in a process that remembers nothing but the cache, and, beside it, the time of the
cheapest thing that a run does with the same bytes: mean and spread of every channel, as standardising asks for.

Run with ``OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/integrity.py --gigabytes 10``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from braindecode_vis.base import digests

FILE_BYTES = 250_000_000  # about a session of raw EEG
N_CHANNELS = 64


def write_files(folder: Path, gigabytes: float) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    size = min(FILE_BYTES, max(1, int(gigabytes * 1e9 / 4)))
    block = rng.standard_normal((size // (4 * N_CHANNELS), N_CHANNELS), dtype=np.float32)
    files = {}
    for number in range(max(1, round(gigabytes * 1e9 / size))):
        block[0] = number
        files[str(number)] = folder / f"{number:03d}.npy"
        np.save(files[str(number)], block)
    return files


def measure(files: dict[str, Path]) -> float:
    started = time.perf_counter()
    digests.digest_files(files)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["BRAINDECODE_VIS_CACHE"] = str(Path(folder) / "cache")
        files = write_files(Path(folder), options.gigabytes)
        total = sum(path.stat().st_size for path in files.values()) / 1e9
        first = measure(files)
        digests._KNOWN.clear()  # as in the process of the next run
        decision = measure(files)
        started = time.perf_counter()
        for path in files.values():
            data = np.load(path, mmap_mode="r")
            data.mean(axis=0), data.std(axis=0)
        statistics = time.perf_counter() - started
    print(f"{total:.1f} GB in {len(files)} files")
    print(f"hashed for the first time   {first:8.2f} s   {total / first:.1f} GB/s")
    print(f"decided to be unchanged     {decision:8.4f} s")
    print(f"mean and SD of the channels {statistics:8.2f} s   hashing is {first / statistics:.0%} of it")


if __name__ == "__main__":
    main()
