"""Time of batched SSIM and pixel correlation beside scikit-image and numpy, pair by pair, in the same run.

python benchmarks/metrics.py
"""

import time

import numpy as np
from skimage.metrics import structural_similarity

from braindecode_vis.metrics.image import pixcorr, ssim


def _slow_ssim(truth, decoded):
    return [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        for a, b in zip(truth, decoded, strict=True)
    ]


def _slow_pixcorr(truth, decoded):
    return [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(truth, decoded, strict=True)]


def _compare(name, slow, fast, truth, decoded, n_repeats=3):
    seconds = np.full((n_repeats, 2), np.inf)
    for repeat in range(n_repeats):
        for which, function in enumerate((slow, fast)):
            start = time.perf_counter()
            values = function(truth, decoded)
            seconds[repeat, which] = time.perf_counter() - start
            reference = values if which == 0 else reference
    error = np.abs(np.asarray(reference) - values).max()
    best = seconds.min(axis=0)
    n, size = truth.shape[:2]
    print(
        f"{name:8s} {n:5d} pairs of {size:3d} x {size:<3d}  pair by pair {best[0]:7.3f} s  batched {best[1]:7.3f} s  "
        f"{best[0] / best[1]:5.1f} times faster, largest difference {error:.1e}"
    )


def main():
    rng = np.random.default_rng(0)
    for n, size in ((1000, 28), (1000, 64), (20, 425)):
        truth, decoded = rng.random((2, n, size, size))
        _compare("ssim", _slow_ssim, ssim, truth, decoded)
        _compare("pixcorr", _slow_pixcorr, pixcorr, truth, decoded)


if __name__ == "__main__":
    main()
