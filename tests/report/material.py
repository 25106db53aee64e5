"""Made-up content of a report: figures that look like handwritten digits, scores, ranks and hostile names."""

import functools

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Score
from braindecode_vis.report import figures, gallery, page

EVIL = "<script>document.title='owned'</script>"


def draw_digits(n, side=28, seed=0):
    """Return n ring-and-stem figures, a little like handwritten sixes (even) and nines (odd)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    images = np.zeros((n, side, side), np.float64)
    for i in range(n):
        up, radius, tilt = (1 if i % 2 else -1), rng.uniform(0.25, 0.36), rng.uniform(-0.2, 0.2)
        ring = np.exp(-(((np.hypot(x, y + up * 0.3) - radius) / 0.1) ** 2))
        stem = np.exp(-(((x - up * (radius - tilt * y)) / 0.1) ** 2)) * (up * y > -0.3) * (np.abs(y) < 0.8)
        images[i] = np.clip(ring + stem, 0, 1)
    return np.repeat((images * 255).astype(np.uint8)[..., None], 3, axis=3)


def make_gallery(n=40, side=28, **changes):
    rng = np.random.default_rng(1)
    seen = draw_digits(n, side)
    noise = rng.normal(0, rng.uniform(10, 80, (n, 1, 1, 1)), (*seen.shape[:3], 1))
    rows = {
        "reconstructed": np.clip(seen * 0.8 + noise + 20, 0, 255).astype(np.uint8),
        "nearest training image": np.roll(seen, 2, axis=0),
        "class mean": np.where(np.arange(n)[:, None, None, None] % 2, seen[1::2].mean(0), seen[::2].mean(0)),
        "shuffled brain": np.roll(seen, 1, axis=0),
    }
    flat = [images.reshape(n, -1).astype(np.float32) for images in (seen, rows["reconstructed"])]
    a, b = (images - images.mean(1, keepdims=True) for images in flat)
    score = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    content = {
        "ids": [f"digit_{i:03}" for i in range(n)],
        "concepts": ["nine" if i % 2 else "six" for i in range(n)],
        "seen": seen,
        "rows": {label: images.astype(np.uint8) for label, images in rows.items()},
        "score": score,
        "metric": "pixcorr",
        "details": {
            "rank": (np.arange(n) % 10 + 1).tolist(),
            "subject": [f"sub-{i % 2 + 1:02}" for i in range(n)],
        },
        "filter_by": ["subject"],
    }
    return gallery.GalleryContent(**(content | changes))


def make_noise_gallery(n=30, side=8, **changes):
    """Return a gallery of random images, whose mean image is shared by every item."""
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    mean = np.broadcast_to(seen.mean(0).astype(np.uint8), seen.shape)
    content = {
        "ids": [f"s{i:03}" for i in range(n)],
        "concepts": [f"c{i % 3}" for i in range(n)],
        "seen": seen,
        "rows": {"reconstructed": seen[::-1].copy(), "mean image": mean},
        "score": rng.permutation(n) / n,
        "metric": "pixcorr",
    }
    return gallery.GalleryContent(**(content | changes))


def make_rich_gallery(n=40, side=64, n_draws=3, **changes):
    """Return a gallery of every kind of row: draws, a low-level branch, both fused, an oracle and controls."""
    rng = np.random.default_rng(2)
    base = make_gallery(n, side)
    tint = rng.uniform(0.3, 1, (n, 1, 1, 3))
    seen = (base.seen * tint).astype(np.uint8)
    draws = np.stack([np.roll(base.rows["reconstructed"], d, axis=2) for d in range(n_draws)], axis=1)
    draws = (draws * tint[:, None]).astype(np.uint8)
    low = np.broadcast_to(seen.mean((1, 2), keepdims=True), seen.shape).astype(np.uint8)
    rows = {
        "decoded": draws,
        "low_level": low,
        "fused": (draws[:, 0] // 2 + low // 2).astype(np.uint8),
        "oracle": seen,
        "nearest": np.roll(seen, 2, axis=0),
        "shuffled": np.roll(draws[:, 0], 1, axis=0),
    }
    score = np.round(base.score, 4)
    content = {
        "ids": base.ids,
        "concepts": [f"{'red' if i % 2 else 'blue'}_figure_{i % 7}" for i in range(n)],
        "seen": seen,
        "rows": rows,
        "score": score,
        "metric": "pixcorr",
        "metrics": {
            "pixcorr": {
                "decoded": np.clip(score[:, None] + rng.normal(0, 0.05, (n, n_draws)), -1, 1),
                "oracle": np.clip(score + 0.1, -1, 1),
                "shuffled": score * 0.1,
            },
            "mse": {"decoded": 0.1 * (1 - score), "shuffled": np.full(n, 0.2)},
            "two_way_identification@effnet-lite0": np.where(np.arange(n) % 5, 0.9, np.nan),
        },
        "captions": {
            "seen": [f"a figure with a ring, number {i}" for i in range(n)],
            "decoded": [f"something round above a long thin stem, perhaps number {i}" for i in range(n)],
        },
        "details": {"rank": list(range(1, n + 1)), "subject": [f"sub-{i % 2 + 1:02}" for i in range(n)]},
        "filter_by": ["subject"],
    }
    return gallery.GalleryContent(**(content | changes))


SCORES = {
    ("pixcorr", 0.0): [("decoded", 0.787, 0.742, 0.829), ("mean_image", 0.655, 0.61, 0.70)],
    ("mse", None): [("decoded", 0.0385, 0.031, 0.046), ("mean_image", 0.0547, 0.047, 0.062)],
    ("ssim@28", None): [("decoded", 0.536, 0.48, 0.59), ("mean_image", 0.41, 0.37, 0.45)],
    ("two_way_identification", 0.5): [("shuffled_brain", 0.51, 0.43, 0.60), ("decoded", 0.933, 0.87, 0.98)],
    ("top1", 0.1): [("decoded", 0.6, 0.3, 0.9), ("shuffled_brain", 0.1, 0.0, 0.3)],
}


def make_scores(**changes):
    rows = []
    for (metric, chance), scores in SCORES.items():
        for method, value, low, high in scores:
            score = Score(
                method=method,
                metric=metric,
                value=value,
                ci_low=low,
                ci_high=high,
                chance=chance,
                n_queries=10,
                gallery_size=10 if metric in ("top1", "two_way_identification") else None,
                noise_ceiling=0.91 if metric == "pixcorr" and method == "decoded" else None,
                protocol="digits, published split",
                subject="01",
                split="test",
                seed=0,
                p_value=0.0001 if method == "decoded" and chance is not None else None,
            )
            rows.append(score.as_row() | changes)
    return rows


@functools.cache
def make_section():
    table = pd.DataFrame({"window (ms)": ["0-100", "100-200"], "top1": [0.1, float("nan")], "n": [200, 200]})
    curve = figures.render_svg(figures.plot_top_k_curve([1, 2, 9], 10))
    return page.ExtraSection("When the image is read out", "Accuracy by window.", curve, alt="A", table=table)


def make_content(**changes):
    content = {
        "title": "Digits seen, digits decoded",
        "dataset": "synthetic digits",
        "description": "One person saw handwritten sixes and nines in the scanner. A ridge regression maps the "
        "response of visual cortex to the image, and every result below is set against simple controls.",
        "protocol": {
            "Split": "90 training and 10 test images, as published",
            "Averaging": "none, single trials",
        },
        "facts": [
            ("Trials", 100),
            ("Voxels", 3092),
            ("Images", "28 x 28 px, grey"),
            ("Licence", "none seen"),
        ],
        "scores": make_scores(),
        "ranks": page.RankContent(np.array([1, 1, 1, 2, 1, 3, 1, 2, 1, 5]), 10, "One query for each trial."),
        "gallery": make_gallery(),
        "sections": [make_section()],
        "warnings": [
            "Block design: images of a class were shown together, so drifts can look like decoding."
        ],
        "provenance": {
            "seed": 0,
            "git_revision": "0" * 40,
            "config": {"encoder": {"kind": "ridge", "alphas": [1.0, 10.0]}, "target": {"kind": "pixels"}},
            "versions": {"numpy": "2.1.0", "torch": None},
            "inputs": {"digit69_28x28.mat": "sha256:" + "ab" * 32},
        },
        "command": "braindecode-vis run configs/digits69_ridge.yaml --root data/digits69 --out runs/first",
    }
    return page.ReportContent(**(content | changes))


def make_bare_content(**changes):
    return make_content(**({"gallery": None, "ranks": None, "sections": ()} | changes))
