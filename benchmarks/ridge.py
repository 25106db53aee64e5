"""Time of ridge regression beside himalaya and scikit-learn, in pairs within one run, on one core.

    python benchmarks/ridge.py            # a table of shapes; some minutes
    python benchmarks/ridge.py --quick    # small shapes
    python benchmarks/ridge.py --large    # also the size of NSD: one subject averaged, and its region of interest

Two tasks: one of eleven penalties chosen by five inner folds and fitted (himalaya's KernelRidgeCV and RidgeCV,
scikit-learn's RidgeCV by leave-one-out), and one given penalty (scikit-learn's Ridge by Cholesky). A ratio below 1 says
that ours takes less processor time than the best peer. All z-score, read single precision and solve in double, which
penalties of 10 beside eigenvalues of a million need.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # one core
import argparse
import statistics
import time
import warnings

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.encoders.ridge import RidgeConfig

ALPHAS = tuple(float(10**e) for e in np.linspace(1, 6, 11))
QUICK = [(600, 1800), (600, 500), (2000, 400)]
SHAPES = [(2000, 6000), (1500, 4250), (2000, 1250), (3000, 2000), (8000, 1000)]
LARGE = [(5400, 9000), (5400, 3145), (16_540, 1700)]


def _simulate(n_trials, n_features, n_targets):
    rng = np.random.default_rng(0)
    data = rng.standard_normal((n_trials, n_features), dtype=np.float32)
    weights = rng.standard_normal((n_features, n_targets), dtype=np.float32)
    values = data @ weights / np.sqrt(n_features) + rng.standard_normal(
        (n_trials, n_targets), dtype=np.float32
    )
    return data, values


def _fit_ours(data, values, alphas):
    ids = np.arange(len(data)).astype(str).astype(object)
    trials = pd.DataFrame({"subject": "1", "session": "1", "run": "1", "stimulus_id": ids})
    trials = trials.assign(repetition=0, split="train")
    responses = Responses.from_checked(data, ("trial", "voxel"), trials, "au", {})
    encoder = RidgeConfig(alphas=alphas).build(seed=0)
    return lambda: encoder.fit(responses, Embeddings(values, ids, "toy"))


def _list_peers(data, values, *, one):
    from himalaya.kernel_ridge import KernelRidgeCV
    from himalaya.ridge import RidgeCV as HimalayaRidgeCV
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.preprocessing import StandardScaler

    if one:
        models = {"sklearn Ridge(cholesky)": Ridge(alpha=1e3, solver="cholesky")}
    elif len(data) <= data.shape[1]:
        models = {"himalaya KernelRidgeCV": KernelRidgeCV(alphas=ALPHAS, cv=5)}
    else:
        models = {"himalaya RidgeCV": HimalayaRidgeCV(alphas=ALPHAS, cv=5)}
    if not one:
        models["sklearn RidgeCV"] = RidgeCV(alphas=ALPHAS)

    def fit(model):
        scaled = StandardScaler().fit_transform(data)
        model.fit(scaled.astype(np.float64), (values - values.mean(0)).astype(np.float64))

    return {name: lambda model=model: fit(model) for name, model in models.items()}


def _clock(act):
    start = time.process_time()
    act()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    import torch  # noqa: F401  # asked for a GPU, once a process

    warnings.simplefilter("ignore")  # himalaya advises its other solver
    shapes = QUICK if given.quick else SHAPES + LARGE * given.large
    print("trials x features -> targets      ours [s]    best peer [s]   ratio (median, range)")
    for n_trials, n_features in shapes:
        for n_targets in (1, 1024):
            data, values = _simulate(n_trials, n_features, n_targets)
            for alphas, task in ((ALPHAS, "choice"), (ALPHAS[4:5], "one penalty")):
                ours = _fit_ours(data, values, alphas)
                peers = _list_peers(data, values, one=len(alphas) == 1)
                n_repeats = 1 if (n_trials, n_features) in LARGE else given.repeats
                rows = [
                    (_clock(ours), {n: _clock(act) for n, act in peers.items()}) for _ in range(n_repeats)
                ]
                best = min(peers, key=lambda name: statistics.median(row[1][name] for row in rows))
                ratios = sorted(row[0] / row[1][best] for row in rows)
                print(
                    f"{n_trials:6d} x {n_features:5d} -> {n_targets:4d} {task:12s} "
                    f"{statistics.median(row[0] for row in rows):7.2f}   "
                    f"{statistics.median(row[1][best] for row in rows):7.2f} {best:24s} "
                    f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
