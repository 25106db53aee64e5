"""Cost of reading shuffled training batches from the memory-mapped store, as a share of training ATM-S on them.

python benchmarks/batch_reading.py [--trials 16540] [--threads 2]

Every trial of a store of 63 channels x 250 samples (1 GB in float32 for the 16 540 images of THINGS-EEG2) is read once,
in batches of 1024 in random order, by the feed that training reads from, with nothing kept in memory
(`max_device_bytes` 0); once after the system was asked to forget the file, and then again, when it may remember. Input
scaling is left out, as in a store that preprocessing has scaled. The training time is that of whole updates of ATM-S on
batches of 128 that lie in memory, per trial, by the library's own loop. The bar is 5 %. Training reads ahead in a
thread of its own, so that this cost is a bound on what reading adds where a core is free.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from training import make_config, make_task, time_ours

from braindecode_vis.base.store import read_responses, write_responses
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.preprocessing.alignment import InputTransform
from braindecode_vis.training.batches import make_batches
from braindecode_vis.training.feed import Extras, Feed


def forget(path: Path) -> None:
    """Ask the system to drop the file from its cache; where it cannot be asked, the first reading is a warm one."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_reading(feed: Feed, batch_size: int, epoch: int) -> tuple[float, float]:
    """Return wall and processor seconds of one shuffled epoch."""
    started = time.perf_counter(), time.process_time()
    batches = make_batches(feed.train.stimuli, batch_size, seed=0, epoch=epoch)
    for update, batch in enumerate(batches):
        job = feed.plan(feed.train, batch, update=update, part=0, rank=0, n_ranks=1)
        feed.assemble(feed.train, *feed.load_all(feed.train, job), 0.0)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16_540)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        responses, targets = make_task(options.trials, 63, 250, 1024)
        write_responses(Path(temporary), responses)
        responses = read_responses(Path(temporary))
        config = make_config("atm_s", options.batch, 1, "cpu", "fp32").model_copy(
            update={"max_device_bytes": 0}
        )
        signal, rows = describe_signal(responses), np.arange(options.trials)
        feed = Feed(
            responses, targets, transform=InputTransform(config.input_scaling, "none", signal.dims),
            signal=signal, rows=rows, held_rows=rows[:0], settings=config, needs=config.needs, extras=Extras(),
            device=torch.device("cpu"), seed=0,
        )  # fmt: skip
        forget(Path(temporary) / "data.npy")
        readings = [
            (f"{name} file", time_reading(feed, options.batch, e)) for e, name in enumerate(("cold", "warm"))
        ]
    n_trained = 512
    trained = time_ours(make_config("atm_s", 128, 3, "cpu", "fp32"), *make_task(n_trained, 63, 250, 1024))
    for name, reading in readings:
        for kind, number in (("wall", 0), ("processor", 1)):
            learning = float(np.median([epoch[number] for epoch in trained])) / n_trained * options.trials
            print(
                f"{name}, {kind} time: {reading[number]:.2f} s to read an epoch, {learning:.1f} s to train on it: "
                f"{reading[number] / learning:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
