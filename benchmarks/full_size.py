"""Images of full size through the metric suite and through `reconstruct`: processor time, and memory of the process.

``suite``: pairs of 512-pixel images, read from arrays on disk, through every row of the suite with random weights of
the published architectures. ``loop`` does the same pair by pair: each decoded image beside each seen one is read,
resized and put through the networks when that pair is compared, as a loop over pairs does that keeps nothing; the
values must agree. ``write`` writes images of 1024 pixels batch by batch as `reconstruct` does, and scores them.
Peak memory is the resident memory of the whole process, libraries included.

Run with ``OMP_NUM_THREADS=1 python benchmarks/full_size.py suite --pairs 1000 --networks alexnet lpips_alexnet``.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from braindecode_vis.base.stimuli import ImageRows
from braindecode_vis.base.store import write_json
from braindecode_vis.pipeline.image_files import DrawnImages, ImageWriter
from braindecode_vis.scoring.metrics.feature_networks import NETWORKS, Lpips, load_network
from braindecode_vis.scoring.metrics.image import compute_image_metric
from braindecode_vis.scoring.metrics.suite import MetricSuiteConfig, compute_suite

ALL = ("alexnet", "inception", "clip", "efficientnet_b1", "swav", "lpips_alexnet")
ARCHITECTURES = {
    "alexnet": "alexnet", "inception": "inception_v3", "efficientnet_b1": "efficientnet_b1", "swav": "resnet50",
}  # fmt: skip


def write_weights(folder: Path, networks: tuple[str, ...]) -> dict[str, Path]:
    """Write random weights of the published architectures, and return where they lie."""
    import torchvision

    torch.manual_seed(0)
    found = {}
    for name in sorted({"alexnet" if name == "lpips_alexnet" else name for name in networks}):
        if name == "clip":
            import open_clip

            state = open_clip.create_model("ViT-L-14-quickgelu").state_dict()
        else:
            more = {"init_weights": True} if name == "inception" else {}
            state = torchvision.models.get_model(ARCHITECTURES[name], weights=None, **more).state_dict()
        found[name] = folder / f"{name}.pt"
        torch.save(state, found[name])
    if "lpips_alexnet" in networks:
        linear = {
            f"lin{number}.model.1.weight": torch.rand(1, n, 1, 1) / n
            for number, n in enumerate((64, 192, 384, 256, 256))
        }
        found["lpips_alexnet"] = folder / "linear.pt"
        torch.save(linear, found["lpips_alexnet"])
    return found


def write_pairs(folder: Path, n: int, side: int) -> list[ImageRows]:
    """Write smooth random images and noisy ones of them, image by image, and return both as rows."""
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    files = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (n, side, side, 3))
        for name in ("seen", "made")
    ]
    for place in range(n):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        seen = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
        noise = rng.integers(-60, 61, (side, side, 1))
        files[0][place], files[1][place] = seen, np.clip(seen + noise, 0, 255).astype(np.uint8)
    for name in ("seen", "made"):
        rows.append(ImageRows.of(np.load(folder / f"{name}.npy", mmap_mode="r")))
    return rows


def loop_over_pairs(seen: ImageRows, made: ImageRows, config: MetricSuiteConfig) -> dict[str, float]:
    """Return the mean of each row, computed pair by pair."""
    n, found = len(seen), {}
    for name in ("pixcorr", "ssim"):
        values = [
            compute_image_metric(name, seen[row : row + 1], made[row : row + 1], protocol="425")[0]
            for row in range(n)
        ]
        found[f"{name}@425"] = float(np.mean(values))
    for name in config.networks:
        if name == "lpips_alexnet":
            distance = Lpips("alexnet", config.weights["alexnet"], config.weights["lpips_alexnet"])
            pair = np.array([[0, 1]])
            values = [distance.compute_pairs(np.stack([seen[row], made[row]]), pair)[0] for row in range(n)]
            found["lpips@alexnet"] = float(np.mean(values))
            continue
        facts, extract = NETWORKS[name], load_network(name, config.weights[name], "cpu")
        tables = {space: np.empty((n, n)) for space in facts.spaces}
        for row in range(n):
            for column in range(n):
                with torch.inference_mode():
                    left, right = (
                        extract(facts.prepare(image[None], "cpu")) for image in (made[row], seen[column])
                    )
                for space, table in tables.items():
                    table[row, column] = np.corrcoef(left[space].flatten(), right[space].flatten())[0, 1]
        for space, table in tables.items():
            own = np.diag(table)
            wins = (table < own[:, None]).sum(axis=1) / (n - 1)
            two_way = facts.comparison == "two_way"
            metric = "two_way_identification" if two_way else "correlation_distance"
            found[f"{metric}@{space}"] = float(np.mean(wins if two_way else 1 - own))
    return found


def write_images(folder: Path, n: int, side: int) -> list[ImageRows]:
    """Write images of a generator batch by batch, as `reconstruct` does, and return them beside others."""
    rng, writer = np.random.default_rng(0), ImageWriter(folder / "work")

    def make(rows: range) -> Mapping[str, np.ndarray]:
        return {"decoded": rng.integers(0, 256, (len(rows), side, side, 3), np.uint8)}

    writer.open("decoded", n)
    writer.draw(DrawnImages(("decoded",), n, 4, make), 0)
    writer.move(folder, {"decoded": (n,)})
    made = ImageRows.of(np.load(folder / "decoded.npy", mmap_mode="r"))
    return [made[np.roll(np.arange(n), 1)], made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("suite", "loop", "write"))
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--networks", nargs="*", choices=ALL, default=ALL)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, networks = Path(name), tuple(asked.networks)
        weights = {} if asked.what == "write" else write_weights(folder, networks)
        if asked.what == "write":
            networks = ()
            started = time.process_time()
            seen, made = write_images(folder, asked.pairs, asked.side)
            print(f"written in {time.process_time() - started:.1f} s of processor time")
        else:
            seen, made = write_pairs(folder, asked.pairs, asked.side)
        config = MetricSuiteConfig(networks=networks, weights=weights, semantic_ways=(), device="cpu")
        started = time.process_time()
        if asked.what == "loop":
            values = loop_over_pairs(seen, made, config)
        else:
            values = {
                name: float(one.mean()) for name, one in compute_suite(seen, made, config).values.items()
            }
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    about = f"{asked.pairs} pairs of {asked.side} pixels, {', '.join(networks) or 'pixels'}"
    print(f"{asked.what}, {about}: {seconds:.1f} s of processor time, {peak:.2f} GiB")
    print("  ".join(f"{name} {value:.6f}" for name, value in values.items()))
    if asked.out:
        write_json(
            asked.out, {"what": asked.what, "about": about, "seconds": seconds, "peak_gib": peak, **values}
        )


if __name__ == "__main__":
    main()
