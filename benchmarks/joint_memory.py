"""Memory of a joint data set of ten people: opened, picked, averaged and read in shuffled batches, never loaded.

The store has the shape of all ten subjects of THINGS-EEG2 (66160 training and 16000 test trials each, 63 channels, 250
times). Its file is sparse, so that it takes no room on the disk; numbers read from it are zeros, which changes nothing
of what is measured but the time that a disk would take. Anonymous memory is what a process holds; pages of the file are
a cache that the system takes back when it needs them.

Then the pictures of one subject of NSD (9000 of 425 x 425 pixels, 4.9 GB, in a sparse file too): looked up, the
training pictures picked, and the pictures of `reconstruct` made by `nearest`.

Run with ``OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/joint_memory.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.store import read_responses, read_stimuli, write_json
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.inversion import MeanImageGenerator, NearestGenerator
from braindecode_vis.preprocessing.selection import average_repetitions, pick_rows

N_CHANNELS, N_TIMES = 63, 250


def write_sparse_store(folder: Path, n_subjects: int, dtype: str) -> tuple[int, float]:
    """Write a store of the full shape; returns the number of trials and the size of the array in GB."""
    train = [f"train{n:05d}" for n in range(16540)]
    test = [f"test{n:03d}" for n in range(200)]
    tables = []
    for subject in range(1, n_subjects + 1):
        for session in range(1, 5):
            shown = np.repeat(train[(session - 1) % 2 :: 2], 2)
            asked = np.repeat(test, 20)
            ids = np.concatenate([shown, asked])
            tables.append(
                pd.DataFrame(
                    {
                        "subject": f"{subject:02d}", "session": f"{session:02d}", "run": "n/a", "stimulus_id": ids,
                        "repetition": 0, "split": np.repeat(["train", "test"], [len(shown), len(asked)]),
                    }
                )
            )  # fmt: skip
    trials = pd.concat(tables, ignore_index=True)
    trials.to_parquet(folder / "trials.parquet", index=False)
    shape = (len(trials), N_CHANNELS, N_TIMES)
    n_bytes = _write_sparse(folder / "data.npy", shape, dtype)
    meta = {"dims": ["trial", "channel", "time"], "unit": "z", "coords": {"sfreq": 250.0}, "array_coords": []}
    write_json(folder / "meta.json", meta)
    return len(trials), n_bytes / 1e9


def _write_sparse(path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Write an array of zeros that takes no room; returns its bytes."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        file.truncate(file.tell() + n_bytes)
    return n_bytes


def read_memory() -> tuple[float, float]:
    """Return anonymous and file-backed resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def report(what: str, start: float, base: float) -> None:
    anonymous, mapped = read_memory()
    print(
        f"{what}: {time.process_time() - start:.2f} s, {anonymous - base:.0f} MiB held, {mapped:.0f} MiB of file pages"
    )


def measure_pictures(folder: Path, n_pictures: int, side: int, n_shown: int = 1000) -> None:
    """Print time and memory of look-ups, of a selection and of the controls of `reconstruct`."""
    ids = [f"nsd{n:05d}" for n in range(n_pictures)]
    table = pd.DataFrame({"stimulus_id": ids, "concept": ids, "path": "pixels.npy", "sha256": ids})
    table.to_parquet(folder / "stimuli.parquet", index=False)
    write_json(folder / "stimuli.json", {"root": None})
    _write_sparse(folder / "pixels.npy", (n_pictures, side, side, 3), "uint8")
    vectors = np.random.default_rng(0).normal(size=(n_pictures, 256)).astype(np.float32)
    stimuli, embeddings = read_stimuli(folder), Embeddings(vectors, ids, "toy")
    print(f"{n_pictures} pictures of {side} x {side} pixels, {stimuli.pixels.nbytes / 1e9:.1f} GB")
    base, start = read_memory()[0], time.process_time()
    for name in ids[:1000]:
        stimuli.find_rows([name])
    report("1000 look-ups", start, base)
    start = time.process_time()
    training = stimuli.select(ids[n_shown:])
    report(f"{len(training)} training pictures picked", start, base)
    start = time.process_time()
    data = GeneratorData(None, embeddings.select(ids[n_shown:]), training)
    shown = embeddings.select(ids[:n_shown])
    for _ in data.show_images(NearestGenerator(data).find_nearest(shown)):  # read one by one
        pass
    report(f"{n_shown} nearest training pictures", start, base)
    start = time.process_time()
    MeanImageGenerator(data)
    report("mean training picture", start, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--batches", type=int, default=4, help="of 1024 trials")
    parser.add_argument("--pictures", type=int, default=9000)
    parser.add_argument("--side", type=int, default=425, help="pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure_pictures(Path(temporary), options.pictures, options.side)
    if not options.subjects:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        n_trials, size = write_sparse_store(folder, options.subjects, options.dtype)
        print(f"{options.subjects} subjects, {n_trials} trials, {size:.1f} GB in {options.dtype}")
        base = read_memory()[0]
        start = time.process_time()
        responses = read_responses(folder)
        report("opened", start, base)
        rows = np.flatnonzero((responses.trials["split"] == "train").to_numpy())
        generator = np.random.default_rng(0)
        start = time.process_time()
        single = pick_rows(responses, rows)
        report(f"{single.n_trials} single training trials picked", start, base)
        start = time.process_time()
        for _ in range(options.batches):
            np.asarray(single.data[generator.integers(0, single.n_trials, 1024)], np.float32)
        report(f"{options.batches} shuffled batches of 1024 single trials", start, base)
        start = time.process_time()
        averaged = average_repetitions(responses, rows)
        report(f"{averaged.n_trials} averages of repetitions made", start, base)
        start = time.process_time()
        for _ in range(options.batches):
            np.asarray(averaged.data[generator.integers(0, averaged.n_trials, 1024)], np.float32)
        report(f"{options.batches} shuffled batches of 1024 averages", start, base)


if __name__ == "__main__":
    main()
