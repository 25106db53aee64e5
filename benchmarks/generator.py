"""What the embedded generator reaches from the true embeddings of concepts that it never saw, and how fast.

Run with ``python benchmarks/generator.py [--weights FILE] [--concepts validation|demo]``. Concepts 0 to 39 of seed 0
are the test concepts of the demo: look at them once, at the end. Concepts 40 to 79 are for choices. Neither they
nor any other concept of their combination of shape and colour are in the training images. Scores from decoded
embeddings are those of ``braindecode-vis demo``.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.datasets.drawn.images import make_concepts, render_batch
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig, EfficientNetEncoder
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.latent_diffusion_config import LatentDiffusionConfig
from braindecode_vis.generation.latent_diffusion_networks import reconstruct_images
from braindecode_vis.generation.weights_file import load_model
from braindecode_vis.scoring.metrics.identification import (
    compute_correlations,
    leave_out_images,
    n_way_identification,
    two_way_identification,
)
from braindecode_vis.scoring.uncertainty import jackknife_interval

FIRST = {"demo": 0, "validation": 40}
N = 40
SIDE = 112  # pixels, of the pictures of the demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--concepts", choices=FIRST, default="validation")
    parser.add_argument("--exemplar", type=int, default=0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sampler", default="dpm-solver++")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="writes a PNG: seen, autoencoder, oracle, decoded")
    arguments = parser.parse_args()

    encoder = EfficientNetConfig().build()
    rows = np.arange(FIRST[arguments.concepts], FIRST[arguments.concepts] + N)
    names = make_concepts(int(rows[-1]) + 1, seed=0)["concept"].iloc[rows].tolist()
    seen = render_batch(rows, np.full(N, arguments.exemplar), size=SIDE, seed=0)
    truth = Embeddings(encoder.encode(seen), names, encoder.space)
    shown = {"seen": seen}

    data = GeneratorData(encoder, truth, StimulusSet.from_pixels(seen, names))
    for guidance, candidates in product(arguments.guidance, arguments.candidates):
        config = LatentDiffusionConfig(
            weights=arguments.weights,
            guidance=guidance,
            steps=arguments.steps,
            sampler=arguments.sampler,
            candidates=candidates,
        )
        generator = config.build(data)
        if "autoencoder" not in shown:
            side = generator.header.image_size
            small = np.stack([resize_image(image, side, side) for image in seen])
            shown["autoencoder"] = enlarge(
                reconstruct_images(load_model(generator.path, "cpu").autoencoder, small)
            )
            print_scores("autoencoder", shown["autoencoder"], truth, encoder)
        print(f"guidance {guidance:g}, {arguments.sampler}, {arguments.steps} steps, best of {candidates}")
        generator.generate(Embeddings(truth.vectors[:1], names[:1], truth.space), seed=arguments.seed)
        begun = time.perf_counter()
        shown["oracle"] = enlarge(generator.generate(truth, seed=arguments.seed))
        print(f"sampling {N} images: {time.perf_counter() - begun:.1f} s")
        print_scores("oracle", shown["oracle"], truth, encoder)
        print_scores("shuffled", np.roll(shown["oracle"], 7, axis=0), truth, encoder)
    if arguments.grid is not None:
        write_grid(arguments.grid, list(shown.values()))


def enlarge(images: np.ndarray) -> np.ndarray:
    """Return images at the size of the demo's pictures, as the pipeline compares them."""
    return np.stack([resize_image(image, SIDE, SIDE) for image in images])


def print_scores(name: str, images: np.ndarray, truth: Embeddings, encoder: EfficientNetEncoder) -> None:
    made = encoder.encode(images)
    similarity = compute_correlations(made, truth.vectors)
    two_way, many = (
        two_way_identification(truth.vectors, made),
        n_way_identification(truth.vectors, made, N),
    )
    left_out = leave_out_images([similarity], [np.arange(N)], [list(truth.ids)], 2)
    limits = jackknife_interval(float(two_way.mean()), left_out)
    print(
        f"{name:>12}: two-way {two_way.mean():.3f} [{limits.low:.3f}, {limits.high:.3f}], {N}-way {many.mean():.3f}",
        flush=True,
    )


def write_grid(path: Path, stacks: list[np.ndarray], per_row: int = 10) -> None:
    """Write images of several stacks below each other, `per_row` items a band."""
    bands = []
    for start in range(0, N, per_row):
        bands += [np.concatenate(list(stack[start : start + per_row]), axis=1) for stack in stacks]
        bands.append(np.full((6, SIDE * per_row, 3), 255, np.uint8))
    Image.fromarray(np.concatenate(bands)).save(path)


if __name__ == "__main__":
    main()
