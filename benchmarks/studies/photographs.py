"""How far photographs are reconstructed at 64 pixels from spikes of macaque V4, beside the nearest training photograph.

    braindecode-vis fetch v4_photographs --root ROOT
    python benchmarks/studies/photographs.py ROOT --taesd FOLDER --out OUT --session 201025 210325

Every way of making an image is a run below OUT, five folds of the pictures of a session; what is finished is not
computed again. The diffusion prior learns from photographs of `OTHERS`, sessions that are neither decoded here nor
tested by the authors, and from no response. The table shows scores of these runs and, paired by picture, their
difference to copies of the nearest training photograph (`nearest`). Photographs stay in the run folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.base.store import read_json, write_embeddings
from braindecode_vis.config import read_config
from braindecode_vis.datasets.v4_photographs import LAYOUT
from braindecode_vis.parts.studies.compare import compare_runs
from braindecode_vis.pipeline import evaluate
from braindecode_vis.pipeline.runs import open_run

OTHERS = ("190925", "190927", "190928", "190929", "210224", "210621")
DECODED = ("201025", "210325")
SAME = 20.0  # mean squared difference of 16 x 16 pixels, below which two photographs are taken for one
LATENTS = "{{kind: taesd, weights: {taesd}, image_size: 64}}"
DIFFUSION = (
    "{{kind: diffusion, condition: simulated, images: {bank}, widths: [512, 256, 128], time_features: 64, "
    "batch_size: 256, min_steps: 2000, epochs: 1, warmup_steps: 200, dropout: 0, held_out: 0, "
    "prediction: v_prediction, betas: squaredcos_cap_v2, sampler: dpm-solver++, steps: 20, guidance: {guidance}, "
    "restandardise: false}}"
)
#: Ways of making an image, and what each changes in the shipped configuration.
WAYS = {
    "nearest": [],
    "likeliest": [
        "encoder={{kind: linear_gaussian}}",
        "prior={{kind: neighbours, compare: likelihood, n_neighbours: 1, pull: 1}}",
    ],
    "pixels": ["target={{kind: pixels, size: 64, colour: true}}", "generator={{kind: latents}}"],
    "latents": [f"target={LATENTS}", "generator={{kind: latents}}"],
    "latents spread": [f"target={LATENTS}", "generator={{kind: latents}}", "prior={{kind: spread}}"],
    "latents drawn": [f"target={LATENTS}", "generator={{kind: latents}}", f"prior={DIFFUSION}"],
    "nearest and latents": [
        f"reconstruction.low_level={{{{target: {LATENTS}, fusion: {{{{mode: pixels, weight: 0.5}}}}}}}}"
    ],
    "packaged generator": ["generator={{kind: latent_diffusion, candidates: 1}}"],
}
METRICS = ("pixcorr", "ssim", "mse", "two_way_identification", "two_way_identification@efficientnet-lite0")
METHODS = ("decoded", "nearest", "mean_image", "oracle", "shuffled")


def write_bank(root: Path, out: Path, taesd: Path) -> Path:
    """Write latents of photographs of `OTHERS`, without those that a decoded session shows too; return the folder."""
    if (out / "ids.json").is_file():
        return out

    def shrink(pictures: np.ndarray) -> np.ndarray:
        return np.stack([resize_image(picture, 16, 16).ravel() for picture in pictures]).astype(np.float32)

    target = read_config("v4_photographs_ridge", [f"target={LATENTS.format(taesd=taesd)}"]).target.build()
    known = np.concatenate([shrink(LAYOUT.read_pictures(root, "pictures", session=s)) for s in DECODED])
    vectors, ids = [], []
    for session in OTHERS:
        pictures = LAYOUT.read_pictures(root, "pictures", session=session)
        kept = []
        for number, small in enumerate(shrink(pictures)):
            if ((known - small) ** 2).mean(axis=1).min() > SAME:
                known = np.concatenate([known, small[None]])
                kept.append(number)
        vectors += [target.encode(pictures[kept[n : n + 64]]) for n in range(0, len(kept), 64)]
        ids += [f"{session}_image{number + 1:04d}" for number in kept]
    write_embeddings(out, Embeddings(np.concatenate(vectors), ids, target.space))
    print(f"{len(ids)} photographs of {len(OTHERS)} other sessions", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--taesd", type=Path, required=True, help="folder of TAESD's weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--session", nargs="+", default=list(DECODED), choices=DECODED)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    bank = options.out.resolve() / "bank"
    names = {"taesd": options.taesd.resolve(), "bank": bank, "guidance": options.guidance}
    if "latents drawn" in options.only:
        write_bank(options.root, bank, options.taesd.resolve())
    for session in options.session:
        folders = {}
        for way in options.only:
            changes = [
                f"dataset.session='{session}'", "split.n_folds=5", "evaluation.n_bootstrap=1000",
                "evaluation.n_permutations=1000", *(change.format(**names) for change in WAYS[way]),
            ]  # fmt: skip
            folders[way] = options.out / session / way.replace(" ", "-")
            run = open_run(read_config("v4_photographs_ridge", changes, root=options.root), folders[way])
            with run.hold():
                evaluate(run)
            print_scores(f"{session}, {way}", folders[way])
        if len(folders) > 1:
            print(compare_runs(list(folders.values())).to_string())


def print_scores(title: str, folder: Path) -> None:
    """Print the scores of a run, with intervals and chance."""
    print(f"\n{title}")
    for row in read_json(folder / "scores.json"):
        if row["metric"] in METRICS and row["method"] in METHODS and row["split"] == "test":
            limits = "" if row["ci_low"] is None else f" ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
            print(
                f"  {row['metric']:45s} {row['method']:12s} {row['value']:.3f}{limits}, chance {row['chance']}"
            )
    print(end="", flush=True)


if __name__ == "__main__":
    main()
