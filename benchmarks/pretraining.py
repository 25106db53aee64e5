"""What pretraining on a corpus costs beside a bare loop, and what more hours of it are worth.

    python benchmarks/pretraining.py throughput CORPUS
    python benchmarks/pretraining.py scaling CORPUS --labelled LABELLED.yaml --hours 0.5 2 6 15 --seeds 4

The corpus is that of `phantom corpus`, prepared by the verb `corpus` with persons held out; the labelled set is a
configuration of `phantom bold5000` of the same parcels. `throughput` takes the same steps by the loop of the package
and by a bare one (the same model, AdamW and clipping, batches and masks made before), which take turns; time is
processor time, so that what else runs disturbs it less. `scaling` pretrains on some of the training persons, other ones
for every seed, by the same number of steps, and asks the probes about persons that are held out of all.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from braindecode_vis.datasets.corpus.reader import open_corpus
from braindecode_vis.pipeline.preparing import read_labelled
from braindecode_vis.training.optimisation import split_decayed
from braindecode_vis.training.pretraining import Pretraining
from braindecode_vis.training.pretraining_config import PretrainConfig, ProbesConfig
from braindecode_vis.training.pretraining_data import CorpusRows
from braindecode_vis.training.pretraining_model import PretrainingBatch, draw_ranks, make_mask
from braindecode_vis.training.pretraining_probes import measure_probes

ENCODER = {
    "patch_times": 5, "width": 64, "depth": 2, "n_heads": 4, "mlp_ratio": 2, "network_embedding": False,
    "time_position": "seconds",
}  # fmt: skip


def make_config(args, **changes):
    settings = {
        "encoder": ENCODER, "corpus": [args.corpus], "window_times": args.window, "decoder_width": 64,
        "decoder_depth": 1, "mask_ratio": 0.5, "batch_size": args.batch, "learning_rate": args.rate,
        "objectives": json.loads(args.objectives), "mask": args.mask, "keep": "last",
    }  # fmt: skip
    return PretrainConfig.model_validate(settings | changes)


def measure_throughput(args):
    """Print processor time per window of the loop and of a bare one, and the share that the loop reaches."""
    config = make_config(args, encoder=ENCODER | {"width": args.width, "depth": args.depth}, n_epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(config, CorpusRows([open_corpus(args.corpus)], config, 0), Path(folder), 0)
        batches = [b for b in run.material.make_batches(args.batch, 0, 0) if len(b) == args.batch]
        encoder = run.model.encoder
        held = []
        for rows in batches[: args.steps]:
            read = run.material.read(rows)
            ranks = draw_ranks(len(rows), encoder.n_parcels, encoder.n_patches, config.mask)
            observed = None if read.observed is None else torch.from_numpy(read.observed)
            interval = torch.from_numpy(read.interval)
            held.append(
                (
                    PretrainingBatch(torch.from_numpy(read.data), interval, observed),
                    make_mask(ranks, 0.5, observed),
                )
            )
        groups = split_decayed(run.model.parameters(), 0.05)
        optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=config.betas)

        def step_bare(step):
            loss = run.model(*held[step])["masked"].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return float(loss.detach())

        def run_bare():
            for step in range(len(held)):
                step_bare(step)

        def run_ours():
            run.epoch, run.n_done = 0, 0
            run.train_epoch()

        # Only the steps: what an epoch ends with, held-out error and log, is measured by itself.
        judge, run._judge = run._judge, lambda n_batches: None
        run.material.make_batches = lambda size, seed, epoch: batches[: len(held)]
        times = {"bare": [], "ours": []}
        for _ in range(args.repeats):
            for name, work in (("bare", run_bare), ("ours", run_ours)):
                start = time.process_time()
                work()
                times[name].append((time.process_time() - start) / (len(held) * args.batch))
        start = time.process_time()
        run.epoch = 1
        judge(len(held))
        end_of_epoch = time.process_time() - start
    ratios = np.array(times["bare"][1:]) / np.array(times["ours"][1:])
    bare, ours = (1e3 * float(np.median(times[name][1:])) for name in ("bare", "ours"))
    print(
        f"{encoder.n_tokens} tokens, width {args.width}, depth {args.depth}, batch {args.batch}: bare {bare:.3f} ms a "
        f"window, loop {ours:.3f} ms ({np.median(ratios):.3f} of the bare loop's throughput, {ratios.min():.3f} to "
        f"{ratios.max():.3f} in {len(ratios)} pairs); held-out error and log {end_of_epoch:.2f} s an epoch of "
        f"{len(run.material.held_out)} held-out windows"
    )


def measure_scaling(args):
    """Print a line per training, and for each number of hours the mean and its 95 % interval over seeds."""
    config = make_config(args, probes={"labelled": args.labelled} if args.labelled else {})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        labelled = read_labelled(config, 0, Path(folder)) if args.labelled else None
        for seed in range(args.seeds):
            for hours in args.hours:
                found = train(args, hours, seed, Path(folder) / f"{hours}-{seed}", labelled)
                rows.append({"hours": hours, "seed": seed, **found})
                print(json.dumps(rows[-1]), flush=True)
    names = ["explained", "identity", "network", "top5"]
    print(f"\n| hours | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for hours in args.hours:
        cells = []
        for name in names:
            values = np.array(
                [r[name] for r in rows if r["hours"] == hours and r.get(name) is not None], float
            )
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan
            mean = values.mean() if len(values) else np.nan
            cells.append(f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})")
        print(f"| {hours:g} | {' | '.join(cells)} |")
    print("chance:", {k: v for k, v in rows[-1].items() if k.endswith(("_chance", "_n", "_persons"))})


def train(args, hours, seed, folder, labelled):
    """Pretrain on so many hours of persons drawn by the seed and return what the probes find; 0 hours: no step."""
    corpus, persons = open_corpus(args.corpus), []
    runs = corpus.runs
    learning = runs[~runs["held_out"]].groupby("person")["hours"].sum()
    for person in np.random.default_rng(seed).permutation(learning.index.to_numpy()):
        if persons and learning[persons].sum() >= hours:
            break
        persons.append(person)
    corpus.runs = runs[runs["held_out"] | runs["person"].isin(persons)].reset_index(drop=True)
    config = make_config(args)
    material = CorpusRows([corpus], config, seed)
    n_epochs = max(1, round(args.steps / len(material.make_batches(args.batch, seed, 0))))
    config = make_config(args, n_epochs=n_epochs)
    start = time.process_time()
    run = Pretraining(config, material, folder, seed, labelled)
    errors = None
    if hours > 0:
        while run.epoch < n_epochs:
            judge = run._judge
            if run.epoch < n_epochs - 1:
                run._judge = lambda n_batches: None
            run.train_epoch()
            run._judge = judge
        errors = run.measure_errors()
    probes = ProbesConfig(n_windows=args.windows)
    # One root for all: every encoder is asked about the same windows and images.
    found = measure_probes(
        run.model.written, material, probes, seed=0, batch_size=args.batch, labelled=labelled
    )
    explained = None if errors is None or run.baseline is None else 1 - errors["masked"] / run.baseline
    return {
        "persons": len(persons), "n_train": len(material.train), "epochs": n_epochs, "explained": explained, **found,
        "seconds": time.process_time() - start,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("throughput", "scaling"))
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--labelled", type=Path)
    parser.add_argument("--hours", type=float, nargs="+", default=[0, 0.5, 2, 6, 15])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--windows", type=int, default=600, help="Windows that the probes encode.")
    parser.add_argument("--objectives", default='{"masked": 1.0}')
    parser.add_argument("--mask", default="tokens")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "throughput":
        args.steps = min(args.steps, 15)
        measure_throughput(args)
    else:
        measure_scaling(args)


if __name__ == "__main__":
    main()
