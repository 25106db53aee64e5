"""Time of 10 000 permutations and 10 000 bootstraps for 200 queries beside a loop, in the same run.

python benchmarks/uncertainty.py

The loop runs a twentieth of the resamples and its time is scaled up.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as the numbers claim
import time

import numpy as np

from braindecode_vis.metrics.identification import make_identification_table, make_top_k_table
from braindecode_vis.metrics.uncertainty import bootstrap_interval, paired_difference, permutation_test

N_QUERIES, N_RESAMPLES = 200, 10_000


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _loop_permutation(scores, rng):
    rows = np.arange(len(scores))
    for _ in range(N_RESAMPLES // 20):
        column = scores[rows, rng.permutation(len(scores))][:, None]
        np.mean((scores < column).sum(axis=1) / (len(scores) - 1))


def _loop_bootstrap(values, rng):
    for _ in range(N_RESAMPLES // 20):
        np.mean(values[rng.integers(0, len(values), len(values))])


def main():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((N_QUERIES, N_QUERIES))
    values, other = rng.random((2, N_QUERIES))
    slow_permutation = 20 * _seconds(lambda: _loop_permutation(scores, rng))
    slow_bootstrap = 20 * _seconds(lambda: _loop_bootstrap(values, rng))
    stimuli = np.repeat(np.arange(N_QUERIES // 2), 2)
    rows = [
        (
            "permutation, two-way",
            lambda: permutation_test(make_identification_table(scores, 2)),
            slow_permutation,
        ),
        ("permutation, top-5", lambda: permutation_test(make_top_k_table(scores, 5)), slow_permutation),
        ("bootstrap, mean", lambda: bootstrap_interval(values), slow_bootstrap),
        ("bootstrap, clusters", lambda: bootstrap_interval(values, clusters=stimuli), slow_bootstrap),
        ("bootstrap, median", lambda: bootstrap_interval(values, statistic="median"), slow_bootstrap),
        ("bootstrap, subjects", lambda: bootstrap_interval(values, subjects=stimuli % 4), slow_bootstrap),
        ("paired difference", lambda: paired_difference(values, other), slow_bootstrap),
    ]
    print(f"{N_QUERIES} queries, {N_RESAMPLES} resamples, one core")
    for name, function, slow in rows:
        fast = min(_seconds(function) for _ in range(3))
        print(f"{name:22s} {fast:6.3f} s   loop {slow:6.2f} s   {slow / fast:5.1f} times faster")


if __name__ == "__main__":
    main()
