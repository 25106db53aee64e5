"""How far photographs are reconstructed at 64 pixels from spikes of macaque V4, beside the nearest training photograph.

    braindecode-vis fetch v4_photographs --root ROOT
    python benchmarks/studies/photographs.py ROOT --taesd FOLDER --out OUT --session 201025

One fifth of the pictures of a session, drawn by seed, is tested; pictures are brought to 64 pixels and written as
arrays. Every way of making an image is a run below OUT, up to its images; what is finished is not computed again. The
diffusion prior learns from photographs of `OTHERS`, sessions that are not decoded here, each with a prediction that is
as wrong as those of the training trials. Photographs stay below OUT. Pixels are compared at 64 x 64. Two networks
compare images too: EfficientNet-lite0, in whose space some ways choose, and TAESD's encoder. Intervals resample
pictures (bootstrap; two-way: jackknife). Differences are paired by picture, to copies of the nearest training
photograph.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.base.store import write_embeddings
from braindecode_vis.config import read_config
from braindecode_vis.datasets.v4_photographs import LAYOUT
from braindecode_vis.embeddings.autoencoders import TinyAutoencoderConfig
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.pipeline import reconstruct
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.crossed import interval_of_rows, paired_difference
from braindecode_vis.scoring.metrics.identification import compute_correlations, leave_out_images
from braindecode_vis.scoring.metrics.image import compute_image_metric
from braindecode_vis.scoring.uncertainty import jackknife_interval

SIDE = 64
OTHERS = ("190925", "190927", "190928")
LATENTS = "{{kind: taesd, weights: {taesd}, image_size: 64}}"
NETWORK = "target={{kind: efficientnet-lite0}}"
DIFFUSION = (
    "{{kind: diffusion, condition: noised_targets, images: {bank}, widths: [512, 256, 128], time_features: 128, "
    "batch_size: 128, min_steps: 4000, epochs: 1, warmup_steps: 200, dropout: 0, held_out: 0, guidance: 1, "
    "prediction: v_prediction, betas: squaredcos_cap_v2, sampler: dpm-solver++, steps: 20}}"
)
#: Ways of making an image, and the settings of each.
WAYS = {
    "nearest photograph": [NETWORK, "generator={{kind: nearest}}"],
    "likeliest photograph": [
        NETWORK,
        "generator={{kind: nearest}}",
        "encoder={{kind: linear_gaussian}}",
        "prior={{kind: neighbours, compare: likelihood, n_neighbours: 1, pull: 1}}",
    ],
    "nearest photograph, by a small network": [
        NETWORK,
        "generator={{kind: nearest}}",
        "encoder={{kind: network, network: {{kind: eegproject, width: 256}}, optimiser: {{lr: 1.0e-3}}, epochs: 20, "
        "augmentations: [{{kind: gaussian_noise}}], selection: {{kind: last, hold_out: 0}}}}",
    ],
    "pixels by ridge": ["target={{kind: pixels, colour: true}}"],
    "latents by ridge": [f"target={LATENTS}"],
    "latents by ridge, spread": [f"target={LATENTS}", "prior={{kind: spread}}"],
    "latents, mean of 16 neighbours": [f"target={LATENTS}", "prior={{kind: neighbours, pull: 1}}"],
    "latents drawn by diffusion": [f"target={LATENTS}", f"prior={DIFFUSION}"],
}


def write_session(root: Path, session: str, out: Path) -> Path:
    """Write responses and pictures of a session as arrays, a fifth of the pictures as test; return the folder."""
    if (out / "trials.csv").is_file():
        return out
    data = bdv.load("v4_photographs", root=root, session=session)
    shown = data.responses.stimulus_ids.astype(str)
    ids = list(dict.fromkeys(shown))
    tested = make_generator(0, "photographs", session).permutation(ids)[: len(ids) // 5]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, picture in zip(ids, data.stimuli.iterate_images(ids), strict=True):
        Image.fromarray(resize_image(picture, SIDE, SIDE)).save(out / "images" / f"{name}.png")
    np.save(out / "data.npy", data.responses.data)
    split = np.where(np.isin(shown, tested), "test", "train")
    pd.DataFrame({"stimulus_id": shown, "split": split}).to_csv(out / "trials.csv", index=False)
    return out


def write_bank(root: Path, out: Path, taesd: Path) -> Path:
    """Write latents of the photographs of `OTHERS`; return the folder."""
    if (out / "ids.json").is_file():
        return out
    target = TinyAutoencoderConfig(weights=taesd, image_size=SIDE).build()
    vectors, ids = [], []
    for session in OTHERS:
        pictures = LAYOUT.read_pictures(root, "pictures", session=session)
        small = np.stack([resize_image(picture, SIDE, SIDE) for picture in pictures])
        vectors += [target.encode(small[n : n + 64]) for n in range(0, len(small), 64)]
        ids += [f"{session}_image{number + 1:04d}" for number in range(len(small))]
    write_embeddings(out, Embeddings(np.concatenate(vectors), ids, target.space))
    return out


def make_images(folder: Path, way: str, out: Path, names: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the images that were seen, decoded and those of the controls, uint8 of shape (n_pictures, 64, 64, 3)."""
    changes = ["split.kind=published", *(change.format(**names) for change in WAYS[way])]
    run = open_run(
        read_config("arrays_ridge", changes, root=folder), out / way.replace(",", "").replace(" ", "-")
    )
    with run.hold():
        made = reconstruct(run)
    return {"seen": np.asarray(made.seen), **{name: np.asarray(rows) for name, rows in made.images.items()}}


Scores = dict[str, tuple[float, np.ndarray]]


class Judge:
    """Scores images against those that were seen, in pixels and in two networks."""

    def __init__(self, seen: np.ndarray, taesd: Path, kept: Path) -> None:
        self.networks = {
            "EfficientNet-lite0": EfficientNetConfig().build(),
            "TAESD": TinyAutoencoderConfig(weights=taesd, image_size=SIDE).build(),
        }
        self.seen, self.kept = seen, kept
        self.truth = self.embed(seen, "seen")

    def embed(self, images: np.ndarray, title: str) -> dict[str, np.ndarray]:
        """Return what identification compares, by name of the space; what was embedded before is read."""
        path = self.kept / f"{title}.npz"
        if not path.is_file():
            self.kept.mkdir(parents=True, exist_ok=True)
            made = {
                name: network.encode(images).reshape(len(images), -1)
                for name, network in self.networks.items()
            }
            np.savez(path, **made)
        return {"pixels": images.reshape(len(images), -1).astype(np.float32), **np.load(path)}

    def score(self, images: np.ndarray, title: str, *, shift: int = 0) -> Scores:
        """Return, for each metric, its value and one number a picture: its own, or the value without it.

        Each picture is compared with the image of the picture `shift` places before it.
        """
        scores = {}
        for name in ("pixcorr", "ssim", "mse"):
            items = compute_image_metric(name, self.seen, np.roll(images, shift, axis=0))
            scores[name] = float(items.mean()), items
        own = np.arange(len(images))
        for name, features in self.embed(images, title).items():
            similarity = compute_correlations(np.roll(features, shift, axis=0), self.truth[name])
            beaten = (similarity < similarity[own, own][:, None]).sum(axis=1) / (len(own) - 1)
            left = leave_out_images([similarity], [own], [[str(n) for n in own]], 2)
            scores[f"two-way, {name}"] = float(beaten.mean()), left
        return scores


def describe(name: str, found: tuple[float, np.ndarray], base: tuple[float, np.ndarray] | None) -> str:
    """Return a value with its interval, and its paired difference to the nearest photograph."""
    value, items = found
    if name.startswith("two-way"):
        own = jackknife_interval(value, items)
        limits = None if own is None else (own.low, own.high)
        if base is not None:
            n, moves = len(items), items - base[1]
            half = 1.96 * np.sqrt((n - 1) / n * ((moves - moves.mean()) ** 2).sum())
            gap, ends = value - base[0], (value - base[0] - half, value - base[0] + half)
    else:
        row = interval_of_rows(items)
        limits = (row.low, row.high)
        if base is not None:
            pair = paired_difference(items, base[1])
            gap, ends = pair.mean, (pair.interval.low, pair.interval.high)
    words = f"{value:.3f}" + ("" if limits is None else f" ({limits[0]:.3f} to {limits[1]:.3f})")
    return words if base is None else f"{words}, {gap:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--taesd", type=Path, required=True, help="folder of TAESD's weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--session", default="201025")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    if options.session in OTHERS:
        parser.error(
            f"the diffusion prior learns from the photographs of {options.session}; test another session"
        )
    out, taesd = options.out.resolve() / options.session, options.taesd.resolve()
    folder = write_session(options.root, options.session, out / "data")
    judge = base = None
    for way in dict.fromkeys(["nearest photograph", *options.only]):
        names = {"taesd": taesd, "bank": options.out.resolve() / "bank"}
        if "diffusion" in way:
            write_bank(options.root, names["bank"], taesd)
        images = make_images(folder, way, out, names)
        if judge is None:
            judge = Judge(images["seen"], taesd, out / "features")
        found = judge.score(images["decoded"], way)
        print_rows(way, found, base)
        if base is None:
            base = found
            print_rows("mean training photograph", judge.score(images["mean_image"], "mean"), base)
        print_rows(f"{way}, from another response", judge.score(images["decoded"], way, shift=1), None)
        if way == "latents by ridge":
            print_rows("true latents", judge.score(images["oracle"], "true latents"), None)


def print_rows(title: str, found: Scores, base: Scores | None) -> None:
    """Print a line for each metric."""
    print(f"\n{title}")
    for name, row in found.items():
        print(f"  {name:30s} {describe(name, row, None if base is None else base[name])}", flush=True)


if __name__ == "__main__":
    main()
