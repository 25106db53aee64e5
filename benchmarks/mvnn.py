"""Batched Ledoit-Wolf covariances against a loop of scikit-learn's, for both variants of noise normalisation.

Run with ``OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/mvnn.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import _cov

from braindecode_vis.preprocessing.whitening import fit_mvnn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    n = parser.parse_args().trials
    rng = np.random.default_rng(0)
    mixing = (np.eye(63) + 0.3 * rng.standard_normal((63, 63))).astype(np.float32) * 1e-5
    epochs = np.matmul(mixing, rng.standard_normal((n, 63, 250)).astype(np.float32))
    images = np.arange(n) // 2
    exact = epochs.astype(np.float64)
    fit_mvnn(epochs, images)  # the first call pays for fresh memory
    fast, ours = measure(lambda: fit_mvnn(epochs, images).covariance)
    slow, usual = measure(lambda: np.mean([_cov(epoch.T, shrinkage="auto") for epoch in exact], axis=0))
    plain, _ = measure(lambda: [LedoitWolf().fit(epoch.T) for epoch in exact])
    error = np.abs(ours - usual).max() / np.abs(usual).max()
    print(f"epochs, {n} trials: ours {fast:.3f} s, difference {error:.0e} of the largest entry")
    print(f"  published recipe {slow:.2f} s ({slow / fast:.1f} times)")
    print(f"  loop of bare LedoitWolf {plain:.2f} s ({plain / fast:.1f} times)")

    few = min(n, 40)
    fit_mvnn(epochs[:few], images[:few], variant="time")
    fast, ours = measure(lambda: fit_mvnn(epochs[:few], images[:few], variant="time").covariance)
    pairs = exact[:few].reshape(-1, 2, 63, 250)
    slow, usual = measure(
        lambda: np.mean([_cov(pair[:, :, t], shrinkage="auto") for pair in pairs for t in range(250)], axis=0)
    )
    error = np.abs(ours - usual).max() / np.abs(usual).max()
    print(f"time, {few} trials: ours {fast:.3f} s, difference {error:.0e}")
    print(f"  published recipe {slow:.2f} s ({slow / fast:.1f} times)")


def measure(compute: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = compute()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
