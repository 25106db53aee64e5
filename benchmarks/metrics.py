"""Time of batched metrics beside scikit-image and numpy, pair by pair, in the same run.

    python benchmarks/metrics.py                   # pixels, and AlexNet rows of 100 pairs
    python benchmarks/metrics.py --pairs 1000      # AlexNet rows of the size of NSD's test set; minutes on one core

Seconds are of processor time. AlexNet has random weights, which cost as much as real ones. Pair by pair means what
published evaluation code does in a loop: images go through the network one at a time, and every decoded image is
correlated with every seen one by itself. Each image is encoded once there, too. Of that loop a part is timed and
scaled up.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from braindecode_vis.metrics.image import compute_image_metric


def _slow_ssim(truth, decoded):
    return [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        for a, b in zip(truth, decoded, strict=True)
    ]


def _slow_pixcorr(truth, decoded):
    return [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(truth, decoded, strict=True)]


def _resize(images):
    import torch
    from torchvision.transforms.functional import resize

    planes = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255)
    for size in (256, 425):
        planes = resize(planes, [size, size], antialias=True)
    return planes.numpy().transpose(0, 2, 3, 1)


def _slow_published(truth, decoded):
    """Return PixCorr and SSIM of colour images as published code computes them, pair by pair."""
    values = []
    for one, other in zip(truth, decoded, strict=True):
        a, b = _resize(one[None]), _resize(other[None])
        values.append(_slow_pixcorr(a, b) + _slow_ssim(rgb2gray(a), rgb2gray(b)))
    return values


def _published(truth, decoded):
    return np.stack(
        [compute_image_metric(name, truth, decoded, protocol="425") for name in ("pixcorr", "ssim")], axis=1
    )


def _compare(name, slow, fast, truth, decoded, n_repeats=3):
    seconds = np.full((n_repeats, 2), np.inf)
    for repeat in range(n_repeats):
        values = []
        for which, function in enumerate((slow, fast)):
            start = time.process_time()
            values.append(np.asarray(function(truth, decoded)))
            seconds[repeat, which] = time.process_time() - start
    error = np.abs(values[0] - values[1]).max()
    best = seconds.min(axis=0)
    n, size = truth.shape[:2]
    print(
        f"{name:8s} {n:5d} pairs of {size:3d} x {size:<3d}  pair by pair {best[0]:7.3f} s  batched {best[1]:7.3f} s  "
        f"({1e3 * best[1] / n:.2f} ms a pair), {best[0] / best[1]:5.1f} times faster, largest difference {error:.1e}"
    )


def _compare_suite(n_pairs, n_timed=10):
    import torch
    import torchvision

    from braindecode_vis.metrics.feature_networks import NETWORKS
    from braindecode_vis.metrics.suite import MetricSuiteConfig, compute_suite

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    truth, decoded = rng.integers(0, 256, (2, n_pairs, 64, 64, 3), dtype=np.uint8)
    decoded = (0.3 * truth + 0.7 * decoded).astype(np.uint8)
    network = torchvision.models.alexnet().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alexnet.pth"
        torch.save(network.state_dict(), path)
        config = MetricSuiteConfig(
            networks=("alexnet",), weights={"alexnet": path}, pixels=False, semantic_ways=(), device="cpu"
        )
        start, used = time.perf_counter(), time.process_time()
        values = compute_suite(truth, decoded, config).values
        fast, cpu = time.perf_counter() - start, time.process_time() - used

    def read(images):
        rows = []
        with torch.inference_mode():
            for image in images:
                second = network.features[:5](NETWORKS["alexnet"].prepare(image[None], "cpu"))
                fifth = network.features[5:12](second)
                rows.append([second.numpy().ravel(), fifth.numpy().ravel()])
        return rows

    start, used = time.perf_counter(), time.process_time()
    seen, made = read(truth[:n_timed]), read(decoded[:n_timed])
    encode, encode_cpu = (time.perf_counter() - start), (time.process_time() - used)
    start, used = time.perf_counter(), time.process_time()
    for layer in (0, 1):
        for a in seen:
            for b in made:
                np.corrcoef(a[layer], b[layer])
    pairs, pairs_cpu = (time.perf_counter() - start), (time.process_time() - used)
    slow = encode * n_pairs / n_timed + pairs * (n_pairs / n_timed) ** 2
    slow_cpu = encode_cpu * n_pairs / n_timed + pairs_cpu * (n_pairs / n_timed) ** 2
    two_way = values["two_way_identification@alexnet-2"].mean()
    print(
        f"alexnet-2 and alexnet-5, {n_pairs} pairs: one at a time {slow:.0f} s (CPU {slow_cpu:.0f} s), suite "
        f"{fast:.1f} s (CPU {cpu:.1f} s), {slow_cpu / cpu:.1f} times less CPU; two-way {two_way:.3f}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100, help="images of the comparison in AlexNet")
    parser.add_argument("--no-pixels", action="store_true", help="only the comparison in AlexNet")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for n, size in () if args.no_pixels else ((1000, 28), (1000, 64), (20, 425)):
        truth, decoded = rng.random((2, n, size, size))
        _compare("ssim", _slow_ssim, partial(compute_image_metric, "ssim"), truth, decoded)
        _compare("pixcorr", _slow_pixcorr, partial(compute_image_metric, "pixcorr"), truth, decoded)
    for size in () if args.no_pixels else (128, 425):
        truth, decoded = rng.integers(0, 256, (2, 20, size, size, 3), dtype=np.uint8)
        truth = gaussian_filter(truth, (0, 4, 4, 0))  # with edges and surfaces, as pictures have them
        _compare(
            "both@425", _slow_published, _published, truth, (0.7 * truth + 0.3 * decoded).astype(np.uint8)
        )
    _compare_suite(args.pairs)


if __name__ == "__main__":
    main()
