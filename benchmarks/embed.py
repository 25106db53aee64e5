"""What our loop costs around a network: images decoded and prepared by threads, against the bare forward pass.

Run with ``python benchmarks/embed.py [--network openclip|timm|torchvision] [--images 64] [--batch 8]``. Weights are
random, which changes no time. On a machine without a GPU the network uses every core, so preparing an image takes time
from it; the ratio is then an upper bound.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from braindecode_vis.devices import choose_device
from braindecode_vis.embeddings.bank import embed_stimuli
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig
from braindecode_vis.embeddings.vision_network import VisionNetworkEncoder
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file

NETWORKS = {
    "openclip": OpenClipConfig(architecture="ViT-B-16", weights="random"),
    "timm": TimmConfig(architecture="vit_base_patch14_dinov2.lvd142m", image_size=224, weights="random"),
    "torchvision": TorchvisionConfig(architecture="resnet50", weights="random"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="openclip")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    changes = {"batch_size": arguments.batch, "precision": arguments.precision}
    encoder: VisionNetworkEncoder = NETWORKS[arguments.network].model_copy(update=changes).build()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (500, 500, 3), dtype=np.uint8) for _ in range(arguments.images)]
    inputs = encoder.transform.normalise(
        torch.from_numpy(
            np.stack([encoder.transform.resize_and_crop(im) for im in images[: arguments.batch]])
        )
    ).to(choose_device("auto", setting="device"))
    n_batches = arguments.images // arguments.batch

    def run_bare() -> None:
        dtype = getattr(torch, arguments.precision)
        with (
            torch.inference_mode(),
            torch.autocast(inputs.device.type, dtype, enabled=dtype is not torch.float32),
        ):
            for _ in range(n_batches):
                encoder.load().forward(inputs).float().cpu()

    def run_loop() -> None:
        encoder.encode(images[: n_batches * arguments.batch])

    run_bare()
    run_loop()
    # In turn, so that other load disturbs both.
    times = [(measure(run_bare), measure(run_loop)) for _ in range(arguments.repeats)]
    bare, loop = (min(t[column] for t in times) for column in (0, 1))
    rate = n_batches * arguments.batch / bare
    print(
        f"{encoder.config.family} on {inputs.device}, batches of {arguments.batch}: {rate:.1f} images/s bare"
    )
    print(f"  encode() takes {loop / bare:.3f} of the bare forward pass")
    with tempfile.TemporaryDirectory() as folder:
        stimuli = write_images(images[: n_batches * arguments.batch], Path(folder))
        seconds = measure(lambda: embed_stimuli(encoder, stimuli, cache=Path(folder) / "cache"))
        print(f"  from JPEG files into a bank: {seconds / bare:.3f}")
        seconds = measure(lambda: embed_stimuli(encoder, stimuli, cache=Path(folder) / "cache"))
        print(f"  reading the finished bank: {1000 * seconds:.0f} ms")
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def measure(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def write_images(images: list[np.ndarray], folder: Path) -> StimulusSet:
    rows = []
    for number, image in enumerate(images):
        path = folder / f"{number}.jpg"
        Image.fromarray(image).save(path, quality=90)
        rows.append((f"image{number}", "none", path.name, hash_file(path)))
    return StimulusSet(pd.DataFrame(rows, columns=["stimulus_id", "concept", "path", "sha256"]), folder)


if __name__ == "__main__":
    main()
