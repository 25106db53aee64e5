"""Whether synthetic responses help a decoder: phantoms of few and of more images, several seeds, with and without.

Run with ``python benchmarks/studies/synthetic_responses.py --out DIR [--seeds 3] [--concepts 12,60] [--snr 0.1]
[--network]``. For each seed and number of training concepts (five images each, averaged over three repetitions) it
simulates a subject of NSD at 6 mm, embeds 1500 phantom images once, and fits the decoder of the embedded network's
space with real trials alone and with shares of synthetic ones. The 60 test concepts, none of which is trained on, are
the same for all settings of a seed. Prints top-5 and two-way identification, the paired difference to real trials alone
over all test images of all seeds with a bootstrap interval over images, and the variance that the encoding models
explain in their inner folds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis import pipeline
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.pipeline.synthetic import synthesise
from braindecode_vis.scoring.crossed import paired_difference

#: Name to settings: share of synthetic trials and their noise.
CONDITIONS = {
    "real alone": (),
    "25 %, residual": ("synthetic.share=0.25", "synthetic.noise=residual"),
    "50 %, residual": ("synthetic.share=0.5", "synthetic.noise=residual"),
    "80 %, residual": ("synthetic.share=0.8", "synthetic.noise=residual"),
    "50 %, no noise": ("synthetic.share=0.5", "synthetic.noise=none"),
}
RIDGE = ("encoder={kind: ridge}",)
NETWORK = (
    "encoder={kind: network, network: {kind: residual_mlp, hidden: 256, n_blocks: 1}, epochs: 60, device: cpu, "
    "selection: {kind: early_stopping, patience: 10, hold_out: 0.15}}",
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concepts", default="12,60")
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--network", action="store_true", help="a network in place of ridge")
    arguments = parser.parse_args()
    rows = []
    for n_concepts in map(int, arguments.concepts.split(",")):
        for seed in range(arguments.seeds):
            encoder = NETWORK if arguments.network else RIDGE
            rows += measure(arguments.out, n_concepts, seed, arguments.snr, encoder)
            print(rows[-1]["n_concepts"], seed, "done", file=sys.stderr)
    table = pd.DataFrame(rows)
    print(
        f"{'images':>6}  {'training':16}  {'top-5':>6}  {'two-way':>7}  difference of two-way to real alone"
    )
    for (n_concepts, name), part in table.groupby(["n_concepts", "condition"], sort=False):
        real = table[(table["n_concepts"] == n_concepts) & (table["condition"] == "real alone")]
        first, second = (np.concatenate(one["two_way"].tolist()) for one in (part, real))
        told = ""
        if name != "real alone":
            found = paired_difference(first, second, n_boot=5000)
            told = f"{found.mean:+.3f} ({found.interval.low:+.3f} to {found.interval.high:+.3f})"
        top = float(np.mean(np.concatenate(part["top5"].tolist())))
        explained = part["explained"].mean()
        print(f"{5 * n_concepts:6}  {name:16}  {top:6.3f}  {first.mean():7.3f}  {told}  {explained:.3f}")


def measure(out: Path, n_concepts: int, seed: int, snr: float, encoder: tuple[str, ...]) -> list[dict]:
    """Return hits and identification of each test image under each condition."""
    data, bank = out / f"nsd-{n_concepts}-{seed}-{snr:g}", out / f"bank-{seed}"
    call = [sys.executable, "-P", "-m", "braindecode_vis"]
    if not (data / "phantom_truth").is_dir():
        asked = [
            "--size",
            "small",
            "--subjects",
            1,
            "--concepts",
            n_concepts,
            "--test-concepts",
            60,
            "--seed",
            seed,
            "--snr",
            snr,
        ]
        subprocess.run(
            [*call, "phantom", "nsd", "--out", data, *map(str, asked)], check=True, stdout=subprocess.DEVNULL
        )
    base = [*encoder, f"seed={seed}", "dataset.subjects=[1]"]
    run_folder = out / f"run-{n_concepts}-{seed}-{snr:g}"
    if not (bank / "manifest.json").is_file():
        config = read_config("nsd_ridge", base, root=data)
        pipeline.preprocess(open_run(config, run_folder))
        asked = ["--images", f"phantom:1500,size=64,seed={seed}", "--bank", bank, "--dtype", "float32"]
        subprocess.run(
            [*call, "embed", str(run_folder), *map(str, asked)], check=True, stdout=subprocess.DEVNULL
        )
    rows = []
    for name, changes in CONDITIONS.items():
        synthetic = (f"synthetic.images={bank}", *changes) if changes else ()
        run = open_run(read_config("nsd_ridge", [*base, *synthetic], root=data), run_folder)
        (fold,) = pipeline.retrieve(run).folds
        ranks, n = np.asarray(fold.retrieval.ranks, float), len(fold.retrieval.gallery_ids)
        explained = np.nan
        if changes:
            from braindecode_vis.base.store import PROVENANCE, read_provenance

            record = read_provenance(synthesise(run)[0].artifact.path / PROVENANCE)
            explained = float(np.mean(list(record["inner_explained"].values())))
        rows.append(
            {
                "n_concepts": n_concepts, "seed": seed, "condition": name, "top5": ranks <= 5,
                "two_way": 1 - (ranks - 1) / (n - 1), "explained": explained,
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
