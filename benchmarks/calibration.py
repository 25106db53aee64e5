"""Do intervals cover and p-values hold their level? Every kind that a page prints, simulated where the truth is known.

    python benchmarks/calibration.py                              # 1000 draws a cell, printed
    python benchmarks/calibration.py --write docs/research/BENCHMARKS.md   # the table of the docs
    python benchmarks/calibration.py --only crossed Holm --draws 200

A `Check` draws data of one kind and size, calls the function of the package that a page calls, and says what came of
it: a value with its limits, or a p-value. The truth of a value is known by formula, or is the mean of the value over
the draws. `braindecode_vis.scoring.uncertainty.KINDS` lists the kinds; `MADE_BY` names the functions that make each,
and a test compares both with the package. Exit code 1 says that a cell missed its goal.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # one core
import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import put_section

from braindecode_vis.parts.analyses import curves, hubness, rsa
from braindecode_vis.parts.analyses.regions import relabel_features
from braindecode_vis.preprocessing.reliability import SignalShare, measure_signal_share
from braindecode_vis.scoring import category_scores, crossed, label_exchange, refits
from braindecode_vis.scoring import uncertainty as unc
from braindecode_vis.scoring.metrics import brain_correlation
from braindecode_vis.scoring.metrics.identification import (
    compute_correlations,
    leave_out_images,
    make_identification_table,
)

N_DRAWS = 1000
N_BOOT, N_PERMUTED = 400, 199
COVERS = (
    0.92,
    0.99,
)  # what an interval of .95 is asked for; widths that differ from cell to cell allow no less
HOLDS = (0.0, 0.065)  # .05 and two standard errors of 1000 draws
WIDE = (0.92, 1.0)  # of too few items: too wide, never too narrow
Generator = np.random.Generator


class Ranged(NamedTuple):
    """A value and its limits; NaN where the package gives none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """One kind under one model.

    Parameters
    ----------
    kind
        Of `KINDS`.
    model
        What is drawn, in words.
    draw
        ``draw(generator, **size)`` returns a `Ranged` or a p-value (None where there is none).
    sizes
        One row each; the first is that of the tests.
    truth
        ``truth(**size)``; without it, the mean of the values.
    goal
        Share of intervals that cover, or of p <= .05; None where the row shows a limit that pages mention.
    why
        Why the goal is another than `COVERS` or `HOLDS`; stands below the table.
    times
        How many times as many draws as asked for, where they are cheap or the share lies near its bound.
    """

    kind: str
    model: str
    draw: Callable[..., Any]
    sizes: tuple[Mapping[str, Any], ...]
    truth: Callable[..., float] | None = None
    goal: tuple[float, float] | None = COVERS
    why: str = ""
    times: int = 1


class Cell(NamedTuple):
    """What came of a check at one size: share, standard error, draws that gave an interval or p, mean width."""

    share: float
    error: float
    n: int
    n_none: int
    width: float


def simulate(check: Check, size: Mapping[str, Any], n_draws: int, seed: int = 977) -> Cell:
    """Return how often the interval covers the truth, or p is at most .05."""
    found = []
    for number in range(n_draws):  # a draw does not depend on their number
        found.append(check.draw(np.random.default_rng([seed, number]), **size))
        unc._kept.clear()  # resamples of this seed, which no other draw asks for: thousands would be counted each time
    given = [one for one in found if one is not None and np.isfinite(one).all()]
    if not given:
        return Cell(np.nan, np.nan, 0, n_draws, np.nan)
    width = np.nan
    if isinstance(given[0], Ranged):
        _, low, high = np.array(given).T
        # The mean of all draws, also of those without an interval, is the truth where no formula is known.
        truth = check.truth(**size) if check.truth else np.mean([one.value for one in found])
        hits, width = (low <= truth + 1e-9) & (truth - 1e-9 <= high), float((high - low).mean())
    else:
        hits = np.array(given) <= 0.05 + 1e-12
    share = float(hits.mean())
    error = float(np.sqrt(max(share * (1 - share), 0.05 * 0.95 / 4) / len(given)))
    return Cell(share, error, len(given), n_draws - len(given), width)


def _range(found: Any, value: float | None = None) -> Ranged:
    """Return an interval of the package as limits."""
    if found is None or found.low is None:
        return Ranged(np.nan if value is None else value, np.nan, np.nan)
    return Ranged(found.value if value is None else value, found.low, found.high)


# --- one subject ------------------------------------------------------------------------------------------------


def _wilson(rng: Generator, n: int, rate: float) -> Ranged:
    hits = int(rng.binomial(n, rate))
    return _range(unc.wilson_interval(hits, n), hits / n)


def _bootstrap(rng: Generator, n: int, of: str) -> Ranged:
    if of == "hits":
        values = (rng.random(n) < 0.4).astype(float)
    elif of == "repeated":  # three trials of an image, an image weighs by all of them
        values = np.repeat(rng.standard_normal(n), 3) + 0.5 * rng.standard_normal(3 * n)
    else:
        values = np.exp(rng.standard_normal(n)) if of == "median" else rng.standard_normal(n)
    clusters = np.repeat(np.arange(n), 3) if of == "repeated" else None
    statistic = "median" if of == "median" else "mean"
    interval = unc.bootstrap_interval(
        values, clusters=clusters, statistic=statistic, n_boot=N_BOOT, seed=int(rng.integers(1 << 30))
    )
    return _range(interval, float(np.median(values) if of == "median" else values.mean()))


def _correlated(rng: Generator, n: int, rho: float, n_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    shared = rng.standard_normal((n, n_voxels))
    noise = rng.standard_normal((n, n_voxels))
    return shared, rho * shared + np.sqrt(1 - rho**2) * noise


def _correlation(rng: Generator, n: int, rho: float) -> Ranged:
    found = brain_correlation.map_responses(
        *_correlated(rng, n, rho, 1), n_boot=N_BOOT, n_permutations=1, seed=int(rng.integers(1 << 30))
    )
    return Ranged(float(found.correlation[0]), float(found.ci_low[0]), float(found.ci_high[0]))


def _correlation_of_groups(rng: Generator, groups: int, each: int, rho: float) -> Ranged:
    """Images of a group share half of what is measured besides the prediction."""
    predicted = rng.standard_normal((groups * each, 1))
    noise = np.repeat(rng.standard_normal((groups, 1)), each, axis=0) + rng.standard_normal(
        (groups * each, 1)
    )
    measured = rho * predicted + np.sqrt((1 - rho**2) / 2) * noise
    found = brain_correlation.map_responses(
        predicted, measured, n_boot=N_BOOT, n_permutations=1, seed=int(rng.integers(1 << 30)),
        clusters=np.repeat(np.arange(groups), each), unit="group",
    )  # fmt: skip
    return Ranged(float(found.correlation[0]), float(found.ci_low[0]), float(found.ci_high[0]))


def _draw_predictions(rng: Generator, owners: np.ndarray, spread: float) -> np.ndarray:
    """Return predictions of which those of one owner share a part."""
    common = spread * rng.standard_normal((int(owners.max()) + 1, 20))
    return common[owners] + rng.standard_normal((len(owners), 20))


def _resample_dimension(rng: Generator, vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the effective dimension in resamples of whole labels."""
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    drawn = rng.integers(0, len(members), (200, len(members)))
    return np.array(
        [
            hubness.compute_effective_dimension(vectors[np.concatenate([members[m] for m in one])])
            for one in drawn
        ]
    )


def _dimension_of_groups(rng: Generator, groups: int, each: int) -> Ranged:
    owners = np.repeat(np.arange(groups), each)
    vectors = _draw_predictions(rng, owners, 0.5)
    value = hubness.compute_effective_dimension(vectors)
    draws = _resample_dimension(rng, vectors, owners)
    return Ranged(value, *hubness.bound_geometry(value, draws, groups, "group")[:2])


def _cosine_of_subjects(rng: Generator, subjects: int, images: int) -> Ranged:
    """A quantity of several subjects from resamples; here the mean cosine to the own image."""
    table = _draw_subjects(rng, subjects, images, (0.25, 0.5))
    value = float(table.mean())
    draws = [
        table[rng.integers(0, subjects, (400, subjects))].mean(axis=(1, 2)),
        table[:, rng.integers(0, images, (400, images))].mean(axis=(0, 2)),
        table.ravel()[rng.integers(0, table.size, (400, table.size))].mean(axis=1),
    ]
    return Ranged(value, *hubness.cross_geometry(value, draws, (subjects, images), "image")[:2])


def _region(rng: Generator, n: int, rho: float) -> Ranged:
    predicted, measured = _correlated(rng, n, rho, 30)
    found = brain_correlation.correlate_responses(
        [predicted], measured, n_boot=N_BOOT, n_permutations=1, seed=int(rng.integers(1 << 30))
    ).regions["all"]
    return _range(found.interval, found.value)


def _draw_rdms(rng: Generator, n: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    points = rng.standard_normal((n, 5))
    sides = []
    for _ in range(2):
        own = shared * points + (1 - shared) * rng.standard_normal((n, 5))
        sides.append(np.linalg.norm(own[:, None] - own[None], axis=-1))
    return sides[0], sides[1]


def _geometry(rng: Generator, n: int, shared: float) -> Ranged:
    one, other = _draw_rdms(rng, n, shared)
    found = rsa.compare_rdms(
        {"01": one}, {"layer": other}, n_bootstrap=200, n_permutations=1, seed=int(rng.integers(1 << 30))
    ).layers[0]
    return Ranged(found.rho, found.ci_low, found.ci_high)


def _geometry_p(rng: Generator, n: int) -> float:
    one, other = _draw_rdms(rng, n, 0.0)
    return rsa.compare_rdms(
        {"01": one}, {"layer": other}, n_bootstrap=1, n_permutations=N_PERMUTED, seed=int(rng.integers(1 << 30))
    ).layers[0].p_value  # fmt: skip


def _draw_categories(rng: Generator, n: int, effect: float, metric: str) -> Any:
    truth = np.tile([0, 1], n // 2)
    side = rng.standard_normal(n) + effect * (truth - 0.5)
    return _score_categories(
        rng, np.column_stack([-side, side]), truth, np.repeat(np.arange(4), n // 4), metric
    )


def _score_categories(
    rng: Generator, decisions: np.ndarray, truth: np.ndarray, runs: np.ndarray, metric: str, *, over_folds: bool = False
) -> Any:  # fmt: skip
    task = category_scores.CategoryTask(
        decisions=decisions, classes=("a", "b"), labels=np.array(["a", "b"], object)[truth], runs=runs,
        subjects=np.full(len(truth), "01"), protocol="", split="test", seed=int(rng.integers(1 << 30)),
        n_bootstrap=N_BOOT, n_permutations=N_PERMUTED, over_folds=over_folds,
    )  # fmt: skip
    scores, _ = category_scores.compute_category_scores(task)
    return next(score for score in scores if (score.method, score.metric) == ("decoded", metric))


def _categories(rng: Generator, n: int, effect: float, metric: str, draw: Any = _draw_categories) -> Ranged:
    found = draw(rng, n, effect, metric)
    return Ranged(found.value, found.ci_low, found.ci_high)


def _categories_p(rng: Generator, n: int, metric: str, draw: Any = _draw_categories) -> float:
    return float(draw(rng, n, 0.0, metric).p_value)


def _permutation(rng: Generator, n: int, metric: str) -> float:
    similarity = rng.standard_normal((n, n)) + rng.standard_normal(n)  # some images are hubs
    options: dict[str, Any] = {"n_permutations": N_PERMUTED, "seed": int(rng.integers(1 << 30))}
    if metric == "median rank":
        ranks = (-similarity).argsort(axis=1).argsort(axis=1) + 1.0
        return unc.permutation_test(ranks, statistic="median", alternative="less", **options).p_value
    groups = np.arange(n) % 4 if metric == "two-way within class" else None
    table = make_identification_table(similarity, 2, groups=groups)
    return unc.permutation_test(table, groups=groups, **options).p_value


# --- subjects, seeds, images ------------------------------------------------------------------------------------


def _draw_subjects(
    rng: Generator, subjects: int, images: int, sd: tuple[float, float], hits: float | None = None
) -> np.ndarray:
    """Return a table of subjects by images; hits where an average rate is given, by a probit."""
    from scipy.stats import norm

    latent = sd[0] * rng.standard_normal((subjects, 1)) + sd[1] * rng.standard_normal((1, images))
    latent = latent + rng.standard_normal((subjects, images))
    if hits is None:
        return latent
    level = float(norm.ppf(hits)) * np.sqrt(
        1 + sd[0] ** 2 + sd[1] ** 2
    )  # so that the rate over all is `hits`
    return (latent + level > 0).astype(float)


def _crossed(
    rng: Generator, subjects: int, images: int, sd: tuple[float, float], hits: float | None
) -> Ranged:
    table = _draw_subjects(rng, subjects, images, sd, hits)
    return _range(crossed.crossed_interval(table, proportion=hits is not None))


def _crossed_truth(hits: float | None, **_: Any) -> float:
    return 0.0 if hits is None else hits


def _mixed(rng: Generator, subjects: int, shared: int, own: int) -> Ranged:
    """As in the Natural Scenes Dataset: images that all saw, and images of one subject."""
    table = np.full((subjects, shared + subjects * own), np.nan)
    sd = 0.3 * rng.standard_normal((subjects, 1))
    table[:, :shared] = sd + 0.5 * rng.standard_normal((1, shared)) + rng.standard_normal((subjects, shared))
    for who in range(subjects):
        part = slice(shared + who * own, shared + (who + 1) * own)
        table[who, part] = sd[who] + np.sqrt(1.25) * rng.standard_normal(own)
    return _range(crossed.crossed_interval(table))


def _woodruff(rng: Generator, subjects: int, images: int, sd: tuple[float, float]) -> Ranged:
    table = np.exp(_draw_subjects(rng, subjects, images, sd))
    return _range(crossed.crossed_interval(table, statistic="median"))


def _seeds(rng: Generator, subjects: int, seeds: int, images: int, sd: float) -> Ranged:
    """Seed 1 is the same in all subjects, as in a network that is trained on all of them."""
    # One subject stands for itself.
    of_subjects = 0.1 * (subjects > 1) * rng.standard_normal((subjects, 1, 1))
    table = of_subjects + sd * rng.standard_normal((1, seeds, 1))
    table = table + 0.2 * rng.standard_normal((1, 1, images))
    table = table + 0.1 * rng.standard_normal((subjects, 1, images))
    table = table + 0.4 * rng.standard_normal((subjects, seeds, images))
    return _range(crossed.crossed_interval(table if subjects > 1 else table[0], row="subject"))


def _nested_seeds(rng: Generator, subjects: int, seeds: int, images: int, sd: float) -> Ranged:
    """Each subject has seeds of its own, as in a sweep: the mean over seeds comes first."""
    table = 0.1 * rng.standard_normal((subjects, 1, 1)) + sd * rng.standard_normal((subjects, seeds, 1))
    table = table + 0.2 * rng.standard_normal((1, 1, images))
    table = table + 0.4 * rng.standard_normal((subjects, seeds, images))
    return _range(crossed.crossed_interval(table.mean(axis=1)))


def _these_subjects(rng: Generator, subjects: int, images: int, hits: float) -> Ranged:
    """The rate of each subject is fixed: only images are drawn."""
    fixed = np.linspace(-0.5, 0.5, subjects)[:, None]
    latent = fixed + 0.5 * rng.standard_normal((1, images)) + rng.standard_normal((subjects, images))
    from scipy.stats import norm

    table = (latent + norm.ppf(hits) > 0).astype(float)
    return _range(crossed.images_interval(table, proportion=True))


def _groups(rng: Generator, groups: int, each: int) -> Ranged:
    values = np.repeat(0.5 * rng.standard_normal(groups), each) + rng.standard_normal(groups * each)
    return _range(crossed.groups_interval(values, np.repeat(np.arange(groups), each)))


def _resampled_groups(rng: Generator, groups: int, each: int) -> Ranged:
    """A score of which whole groups are resampled, here a mean."""
    means = 0.5 * rng.standard_normal(groups) + rng.standard_normal((groups, each)).mean(axis=1)
    draws = means[rng.integers(0, groups, (N_BOOT, groups))].mean(axis=1)
    return _range(crossed.resampled_interval(float(means.mean()), draws, groups, ends=(-9.0, 9.0)))


def _persons(rng: Generator, persons: int, trials: int) -> Ranged:
    """Trials of a person go together."""
    from scipy.stats import norm

    rates = norm.cdf(0.4 + 0.5 * rng.standard_normal(persons))
    right = rng.binomial(trials, rates) / trials
    found = label_exchange.spread_of_owners(
        right, np.ones(persons), [np.full(persons, True)], persons * trials
    )
    return Ranged(float(right.mean()), *(found or (np.nan, np.nan)))


def _person_pairs(rng: Generator, each: int, effect: float) -> Ranged:
    high, low = effect + rng.standard_normal(each), rng.standard_normal(each)
    wins = (high[:, None] > low).astype(float)
    table = np.full((2 * each, 2 * each), np.nan)
    table[:each, each:] = wins
    return Ranged(float(wins.mean()), *(label_exchange.spread_of_pairs(table) or (np.nan, np.nan)))


def _pairs_left_out(rng: Generator, each: int, effect: float) -> Ranged:
    """Decoders that left one person of each class out, and have learnt from the persons of the other pairs."""
    n, truth = 2 * each, np.arange(2 * each) % 2
    trials = np.repeat(rng.standard_normal((n, 5)) + effect * truth[:, None] / np.sqrt(5), 3, axis=0)
    trials = trials + 0.5 * rng.standard_normal((3 * n, 5))
    observed = label_exchange.Exchange(truth[None], np.ones(1, int), True, 1.0)
    areas, wins = label_exchange.compare_left_pairs(observed, np.repeat(np.arange(n), 3), _make_ridge(trials))
    found = label_exchange.spread_of_pairs(wins, unc.FOLD_FACTOR)
    return Ranged(float(areas[0]), *(found or (np.nan, np.nan)))


def _make_ridge(trials: np.ndarray) -> label_exchange.Refit:
    """Return what fits a ridge to labels 0 and 1, and decides other trials."""
    known: dict[bytes, np.ndarray] = {}  # a decision is linear in the labels, whatever these are

    def refit(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        key = test.tobytes()  # all other trials are trained on
        if key not in known:
            mean = trials[train].mean(axis=0)
            centred = trials[train] - mean
            gram = centred.T @ centred + np.eye(trials.shape[1])
            known[key] = (trials[test] - mean) @ np.linalg.solve(gram, centred.T)
        level = labels.mean()
        side = known[key] @ (labels - level) + level - 0.5
        return np.column_stack([-side, side])

    return refit


def _draw_differences(rng: Generator, subjects: int, images: int, sd: tuple[float, float]) -> np.ndarray:
    table = sd[0] * rng.standard_normal((subjects, 1)) + sd[1] * rng.standard_normal((1, images))
    return table + 0.5 * rng.standard_normal((subjects, images))


def _crossed_p(rng: Generator, subjects: int, images: int, sd: tuple[float, float]) -> float:
    return crossed.crossed_p(_draw_differences(rng, subjects, images, sd))


def _image_signs(rng: Generator, subjects: int, images: int, sd: tuple[float, float]) -> float:
    table = _draw_differences(rng, subjects, images, sd)
    return crossed.image_signs_p(table, n_draws=N_PERMUTED, seed=int(rng.integers(1 << 30)))


def _subject_signs(rng: Generator, subjects: int, images: int, sd: tuple[float, float]) -> float:
    table = _draw_differences(rng, subjects, images, sd)
    return crossed.subject_signs_p(table, n_draws=N_PERMUTED, seed=int(rng.integers(1 << 30)))


def _paired(rng: Generator, images: int) -> float:
    first = rng.standard_normal(images)
    found = crossed.paired_difference(
        first, first + 0.5 * rng.standard_normal(images), n_boot=N_PERMUTED, seed=int(rng.integers(1 << 30))
    )
    return float(found.p_value)


# --- identification, folds --------------------------------------------------------------------------------------


def _draw_similarity(rng: Generator, n: int, signal: float) -> np.ndarray:
    truth = rng.standard_normal((n, 10))
    guess = signal * truth + rng.standard_normal((n, 10))
    return compute_correlations(guess, truth)


@cache
def _identify_truth(n: int, signal: float, k: int) -> float:
    """Return k-way identification among infinitely many images, from 20 draws of 400."""
    rng = np.random.default_rng(5)
    found = [
        np.diagonal(make_identification_table(_draw_similarity(rng, 400, signal), k)).mean()
        for _ in range(20)
    ]
    return float(np.mean(found))


def _identify(rng: Generator, n: int, signal: float, k: int) -> Ranged:
    similarity = _draw_similarity(rng, n, signal)
    value = float(np.diagonal(make_identification_table(similarity, k)).mean())
    left_out = leave_out_images([similarity], [np.arange(n)], [np.arange(n)], k)
    return _range(unc.jackknife_interval(value, left_out), value)


def _make_folds(rng: Generator, n: int, k: int, within: bool) -> tuple[np.ndarray, list[Any]]:
    """Return trials of 30 channels and, for each fold, what a ridge makes of the targets of all images."""
    x = rng.standard_normal((n, 30))
    return x, _fit_folds(x, k, within)


def _fit_folds(x: np.ndarray, k: int, within: bool, penalty: float = 30.0) -> list[Any]:
    n = len(x)
    numbers, folds = np.arange(n) % k, []
    for number in range(k):
        train, test = np.flatnonzero(numbers != number), np.flatnonzero(numbers == number)
        mean = x[train].mean(axis=0)
        centred = x[train] - mean
        gram = centred.T @ centred + penalty * np.eye(30)
        weights = np.zeros((len(test), n))
        weights[:, train] = (x[test] - mean) @ np.linalg.solve(gram, centred.T) + 1 / len(train)
        gallery = test if within else np.arange(n)
        folds.append(
            refits.RelabelledFold(weights[None], None, test, gallery, (numbers != number) / len(train))
        )
    return folds


def _draw_targets(rng: Generator, x: np.ndarray, signal: float) -> np.ndarray:
    targets = signal * x @ rng.standard_normal((x.shape[1], 20)) / np.sqrt(x.shape[1])
    targets = targets + rng.standard_normal((len(x), 20))
    return targets - targets.mean(axis=1, keepdims=True)


def _identify_folds(folds: Sequence[Any], gram: np.ndarray, orders: np.ndarray) -> np.ndarray:
    above, tied = refits.rank_relabelled(folds, gram, orders)
    rivals = np.concatenate([np.full(len(fold.own), len(fold.gallery) - 1) for fold in folds])
    found: np.ndarray = (1 - (above + tied / 2) / rivals).mean(axis=1)
    return found


def _refit(rng: Generator, n: int, k: int, within: bool) -> float:
    x, folds = _make_folds(rng, n, k, within)
    targets = _draw_targets(rng, x, 0.0)
    orders = np.stack([np.arange(n), *[rng.permutation(n) for _ in range(39)]])
    values = _identify_folds(folds, targets @ targets.T, orders)
    return float(unc.compute_p_value(float(values[0]), values[1:]))


def _compare_fold(fold: Any, targets: np.ndarray) -> np.ndarray:
    """Return centred similarities of a fold's predictions with its gallery."""
    mean = fold.centre @ targets
    return compute_correlations(fold.weights[0] @ targets - mean, targets[fold.gallery] - mean)


def _widened_p(rng: Generator, n: int, k: int) -> float:
    x, folds = _make_folds(rng, n, k, True)
    targets = _draw_targets(rng, x, 0.0)
    tables = [make_identification_table(_compare_fold(fold, targets), 2) for fold in folds]
    found = unc.permutation_test_folds(
        tables, [np.arange(len(table)) for table in tables], n_permutations=N_PERMUTED, seed=int(rng.integers(1 << 30))
    )  # fmt: skip
    return unc.widen_null(found).p_value


def _widened(rng: Generator, n: int, k: int, signal: float) -> Ranged:
    x, folds = _make_folds(rng, n, k, True)
    targets = _draw_targets(rng, x, signal)
    similarities = [_compare_fold(fold, targets) for fold in folds]
    own = np.concatenate([np.diagonal(make_identification_table(one, 2)) for one in similarities])
    left_out = leave_out_images(
        similarities, [np.arange(len(one)) for one in similarities], [fold.gallery for fold in folds], 2
    )
    found = unc.jackknife_interval(float(own.mean()), left_out, widen=unc.FOLD_FACTOR)
    return _range(found, float(own.mean()))


def _compare_ridges(rng: Generator, n: int, k: int, signal: float) -> Any:
    """Return the paired difference of two ridges on one recording, whose penalties differ."""
    x = rng.standard_normal((n, 30))
    targets = _draw_targets(rng, x, signal)
    values = []
    for penalty in (3.0, 3000.0):
        folds = _fit_folds(x, k, True, penalty)
        tables = [make_identification_table(_compare_fold(fold, targets), 2) for fold in folds]
        values.append(np.concatenate([np.diagonal(one) for one in tables]))
    return crossed.paired_difference(
        values[0], values[1], n_boot=N_PERMUTED, seed=int(rng.integers(1 << 30)), over_folds=True
    )


def _difference_after_folds(rng: Generator, n: int, k: int, signal: float) -> Ranged:
    found = _compare_ridges(rng, n, k, signal)
    return _range(found.interval, found.mean)


def _difference_after_folds_p(rng: Generator, n: int, k: int) -> float:
    return float(_compare_ridges(rng, n, k, 0.0).p_value)


def _map_folds(rng: Generator, n: int, k: int, signal: float) -> Any:
    """Return how well a ridge predicts one response, centred within each fold as in `encoding`."""
    x, folds = _make_folds(rng, n, k, True)
    weights = rng.standard_normal((30, 1))
    weights /= np.linalg.norm(weights)  # so that all draws have the same correlation
    measured = signal * x @ weights + rng.standard_normal((n, 1))
    predicted, centred = np.empty_like(measured), np.empty_like(measured)
    for fold in folds:
        for made, values in ((predicted, fold.weights[0] @ measured), (centred, measured[fold.own])):
            made[fold.own] = values - values.mean(axis=0)
    return brain_correlation.map_responses(
        predicted, centred, n_boot=N_BOOT, n_permutations=N_PERMUTED, seed=int(rng.integers(1 << 30)), over_folds=True
    )  # fmt: skip


def _correlation_after_folds(rng: Generator, n: int, k: int, signal: float) -> Ranged:
    found = _map_folds(rng, n, k, signal)
    return Ranged(float(found.correlation[0]), float(found.ci_low[0]), float(found.ci_high[0]))


def _correlation_after_folds_p(rng: Generator, n: int, k: int) -> float:
    return float(_map_folds(rng, n, k, 0.0).p_value[0])


def _categories_after_folds(rng: Generator, n: int, effect: float, metric: str) -> Any:
    """Two classes, four runs, each decided by a ridge of the others."""
    truth = np.tile([0, 1], n // 2)
    trials = rng.standard_normal((n, 20)) + effect * truth[:, None] / np.sqrt(20)
    runs, refit, decisions = np.repeat(np.arange(4), n // 4), _make_ridge(trials), np.zeros((n, 2))
    for run in range(4):
        train, test = np.flatnonzero(runs != run), np.flatnonzero(runs == run)
        decisions[test] = refit(train, truth[train].astype(float), test)
    return _score_categories(rng, decisions, truth, runs, metric, over_folds=True)


# --- labels of persons ------------------------------------------------------------------------------------------


def _exchange(rng: Generator, subjects: int, score: str) -> float:
    trials = np.repeat(rng.standard_normal((subjects, 5)), 3, axis=0) + 0.5 * rng.standard_normal(
        (3 * subjects, 5)
    )
    owners, truth = np.repeat(np.arange(subjects), 3), np.arange(subjects) % 2
    refit = _make_ridge(trials)
    exchange = label_exchange.make_exchange(
        truth, [np.arange(subjects)], refits=True, fits_each=subjects, most=199, generator=rng
    )
    if score == "pairs":
        areas, _ = label_exchange.compare_left_pairs(exchange, owners, refit)
        return exchange.test(areas)[0]
    folds = [(np.flatnonzero(owners != who), np.flatnonzero(owners == who)) for who in range(subjects)]
    decided, _ = label_exchange.decide_left_out(exchange, owners, folds, refit)
    hits = decided == exchange.labels[:, owners]
    return exchange.test(hits.mean(axis=1))[0]


# --- several tests ----------------------------------------------------------------------------------------------


def _corrected(rng: Generator, tests: int, how: str) -> float:
    correct = unc.correct_holm if how == "Holm" else unc.correct_fdr
    shared = rng.standard_normal(1)  # tests of one study go together
    from scipy.stats import norm

    p_values = norm.sf(np.sqrt(0.5) * shared + np.sqrt(0.5) * rng.standard_normal(tests))
    return float(correct(p_values).min())


def _best_network(rng: Generator, draws: int, smooth: float = 0.0) -> float:
    """Seven networks of 8 to 22 of 100 parcels on a ring, whose score is the mean of what its parcels hold."""
    from scipy.ndimage import gaussian_filter1d

    held = rng.standard_normal(100)
    if smooth:
        held = gaussian_filter1d(held, smooth, mode="wrap")
    sizes = np.array([8, 10, 12, 14, 16, 18, 22])
    members = np.repeat(np.arange(7), sizes)
    seed = int(rng.integers(1 << 30))
    drawn = [relabel_features(members, seed, draw) for draw in range(draws + 1)]
    scores = np.array([np.bincount(one, held) / sizes for one in drawn])
    return float(unc.correct_maximum(scores[0], scores[1:]).min())


def _draw_curves(rng: Generator, n: int, windows: int) -> np.ndarray:
    """Return curves whose neighbouring windows share half of their variance."""
    found = rng.standard_normal((n, windows))
    for window in range(1, windows):
        found[:, window] = 0.7 * found[:, window - 1] + np.sqrt(1 - 0.49) * found[:, window]
    return found


def _clusters_of_labels(rng: Generator, windows: int) -> float:
    drawn = _draw_curves(rng, N_PERMUTED + 1, windows)
    return min(curves.cluster_over_labels(drawn[0], drawn[1:]).p_values, default=1.0)


def _clusters_of_subjects(rng: Generator, subjects: int, windows: int) -> float:
    found = curves.cluster_over_subjects(
        _draw_curves(rng, subjects, windows), 0.0, seed=int(rng.integers(1 << 30)), n_permutations=N_PERMUTED
    )
    return min(found.p_values, default=1.0)


ONSET, PEAK, WINDOWS = 8, 12, 20


def _latency(rng: Generator, n: int, of: str, effect: float) -> Ranged:
    """Curves of single images with an effect from window 8 on that is largest at window 12; a window lasts 1."""
    at = np.arange(WINDOWS)
    shape = (at >= ONSET) * (1.0 if of == "onset" else np.exp(-((at - PEAK) ** 2) / 8))
    values = effect * shape + _draw_curves(rng, n, WINDOWS)
    seed = int(rng.integers(1 << 30))
    draws = curves.bootstrap_curves(values, np.arange(n), np.full(n, "01"), n_draws=N_BOOT, seed=seed)
    if of == "peak":
        low, high = np.quantile(draws.argmax(axis=1), [0.025, 0.975])
        return Ranged(float(values.mean(axis=0).argmax()), float(low), float(high))
    null = _draw_curves(rng, 500, WINDOWS) / np.sqrt(n)
    test = curves.cluster_over_labels(values.mean(axis=0), null)
    if test.onset is None:
        return Ranged(np.nan, np.nan, np.nan)
    low, high, _ = curves.bootstrap_onset(test, draws, at.astype(float))
    return Ranged(float(test.onset), low, high)


# --- noise ceilings ---------------------------------------------------------------------------------------------


def _draw_repeats(rng: Generator, n: int, k: int, share: float, n_voxels: int) -> np.ndarray:
    """Return trials of voxels that share half of their variance, `share` of that of the mean of k being signal."""
    signal = np.sqrt(share / (1 - share) / k) if share else 0.0
    mix = np.sqrt(0.5)
    parts = [
        mix * rng.standard_normal((rows, 1)) + mix * rng.standard_normal((rows, n_voxels))
        for rows in (n, n * k)
    ]
    found: np.ndarray = np.repeat(signal * parts[0], k, axis=0) + parts[1]
    return found


def _estimate_share(rng: Generator, n: int, k: int, share: float, n_voxels: int) -> SignalShare:
    found, left_out = measure_signal_share(_draw_repeats(rng, n, k, share, n_voxels), np.full(n, k))
    return SignalShare(
        found,
        left_out.mean(axis=1, keepdims=True),
        found.mean(keepdims=True),
        n,
        float(k),
        float(k),
        n * (k - 1),
    )


def _ceiling(rng: Generator, n: int, k: int, share: float) -> Ranged:
    found = _estimate_share(rng, n, k, share, 50)
    low, high = found.bound_mean()
    return Ranged(float(found.mean[0]), float(low[0]), float(high[0]))


def _ceiling_of_one(rng: Generator, n: int, k: int, share: float) -> Ranged:
    found = _estimate_share(rng, n, k, share, 1)
    low, high = found.bound_features()
    return Ranged(float(found.share[0]), float(low[0]), float(high[0]))


def _area(effect: float) -> float:
    from scipy.stats import norm

    return float(norm.cdf(effect / np.sqrt(2)))


def _share_truth(share: float, **_: Any) -> float:
    return share


_SD = ((0.25, 1.0), (0.1, 1.0), (0.25, 0.25))
CHECKS = (
    Check("Wilson", "hits of independent images", _wilson,
          ({"n": 20, "rate": 0.4}, {"n": 10, "rate": 0.2}, {"n": 39, "rate": 0.05}), lambda rate, **_: rate),
    Check("bootstrap over images", "one subject", _bootstrap,
          ({"n": 100, "of": "hits"}, {"n": 40, "of": "hits"}, {"n": 100, "of": "mean"},
           {"n": 50, "of": "repeated"}, {"n": 300, "of": "median"}, {"n": 100, "of": "median"}),
          lambda of, **_: {"hits": 0.4, "median": 1.0}.get(of, 0.0)),
    Check("bootstrap of correlations", "one voxel", _correlation,
          ({"n": 100, "rho": 0.3}, {"n": 30, "rho": 0.3}), lambda rho, **_: rho),
    Check("bootstrap of correlations", "mean of 30 voxels", _region, ({"n": 100, "rho": 0.3},)),
    Check("bootstrap of geometries", "two sides that share a part", _geometry, ({"n": 30, "shared": 0.6},)),
    Check("bootstrap of decisions", "two classes, four runs", _categories,
          ({"n": 80, "effect": 1.0, "metric": "balanced_accuracy"}, {"n": 80, "effect": 1.0, "metric": "auc"},
           {"n": 32, "effect": 1.0, "metric": "accuracy"})),
    Check("crossed", "continuous", _crossed,
          (*({"subjects": s, "images": 100, "sd": sd, "hits": None} for s in (3, 5, 10) for sd in _SD),
           {"subjects": 20, "images": 200, "sd": (0.25, 1.0), "hits": None}), _crossed_truth),
    Check("crossed", "hits", _crossed,
          tuple({"subjects": s, "images": 100, "sd": sd, "hits": 0.4} for s in (3, 5, 10) for sd in _SD[::2]),
          _crossed_truth),
    Check("crossed", "a quantity of subjects, resampled", _cosine_of_subjects,
          tuple({"subjects": s, "images": 60} for s in (5, 3)), lambda **_: 0.0),
    Check("crossed", "shared and own images", _mixed,
          ({"subjects": 8, "shared": 100, "own": 100}, {"subjects": 4, "shared": 50, "own": 200}), lambda **_: 0.0),
    Check("crossed, logit", "few hits or misses", _crossed,
          tuple({"subjects": s, "images": 20, "sd": (0.25, 0.5), "hits": hits}
                for s in (3, 5, 10) for hits in (0.15, 0.9)), _crossed_truth, times=4),
    Check("crossed, Woodruff", "medians of skewed values", _woodruff,
          tuple({"subjects": s, "images": 100, "sd": (0.25, 1.0)} for s in (5, 3, 10)), lambda **_: 1.0),
    Check("crossed with seeds", "seeds that all subjects share", _seeds,
          tuple({"subjects": s, "seeds": k, "images": 100, "sd": 0.05} for s, k in ((3, 3), (5, 3), (10, 5))),
          lambda **_: 0.0),
    Check("crossed with seeds", "one subject, seeds as rows", _seeds,
          tuple({"subjects": 1, "seeds": k, "images": 100, "sd": 0.05} for k in (3, 5, 10)), lambda **_: 0.0),
    Check("crossed with seeds", "seeds of each subject, averaged", _nested_seeds,
          tuple({"subjects": s, "seeds": 3, "images": 100, "sd": 0.05} for s in (3, 5, 10)), lambda **_: 0.0),
    Check("images of these subjects", "hits", _these_subjects,
          ({"subjects": 3, "images": 100, "hits": 0.4}, {"subjects": 5, "images": 20, "hits": 0.15})),
    Check("t over groups", "rows in a few groups", _groups,
          tuple({"groups": g, "each": 20} for g in (5, 3, 12)), lambda **_: 0.0),
    Check("t over resampled groups", "mean of a few groups", _resampled_groups,
          tuple({"groups": g, "each": 20} for g in (5, 3, 12)), lambda **_: 0.0),
    Check("t over resampled groups", "correlation of one voxel, images in groups", _correlation_of_groups,
          tuple({"groups": g, "each": 10, "rho": 0.3} for g in (6, 4, 12)), lambda rho, **_: rho),
    Check("t over resampled groups", "effective dimension of predictions", _dimension_of_groups,
          tuple({"groups": g, "each": 10} for g in (8, 5, 16)), None, WIDE,
          "Resamples repeat groups, which spreads a dimension twice as far as other groups do (eight: 1.05 for .48)."),
    Check("share over persons", "hits of persons who differ", _persons,
          tuple({"persons": n, "trials": 30} for n in (12, 6, 20))),
    Check("pairs of persons", "area of two groups", _person_pairs,
          tuple({"each": n, "effect": 1.0} for n in (10, 20)), lambda effect, **_: _area(effect), times=4),
    Check("pairs of persons", "area of two groups of five", _person_pairs, ({"each": 5, "effect": 1.0},),
          lambda effect, **_: _area(effect), WIDE, "The area of 25 pairs takes 26 values, and the spread of either "
          "side holds that of single pairs, so that it counts twice. Without it ten persons a side whose area is .92 "
          "cover .92 and twenty .93, so that it is kept.", times=4),
    Check("pairs of persons", "pairs left out, with refits", _pairs_left_out,
          tuple({"each": n, "effect": effect} for n, effect in ((5, 0.0), (5, 1.5), (10, 0.0), (10, 1.5)))),
    Check("jackknife of identification", "similarities of one subject", _identify,
          tuple({"n": n, "signal": signal, "k": k} for n, signal, k in
                ((40, 0.3, 2), (20, 0.3, 2), (100, 0.3, 2), (40, 1.5, 2), (40, 0.0, 10), (100, 0.0, 50))),
          _identify_truth),
    Check("jackknife of identification", "similarities of one subject, .995", _identify,
          ({"n": 100, "signal": 1.5, "k": 2},), _identify_truth, times=4),
    Check("widened after folds", "ridge, within the fold, two-way", _widened,
          tuple({"n": n, "k": k, "signal": signal} for n, k, signal in
                ((60, 5, 0.5), (20, 2, 0.5), (60, 5, 0.0), (200, 5, 0.3)))),
    Check("widened after folds", "ridge, within folds of six, two-way", _widened,
          ({"n": 60, "k": 10, "signal": 0.5}, {"n": 60, "k": 10, "signal": 0.0}), None, WIDE,
          "Six images have 30 pairs: as with pairs of persons, the jackknife counts the spread of single pairs twice."),
    Check("widened after folds", "difference of two ridges", _difference_after_folds,
          tuple({"n": n, "k": k, "signal": signal} for n, k, signal in ((60, 5, 0.5), (60, 5, 0.0), (20, 2, 0.0)))),
    Check("widened after folds", "correlation of one response", _correlation_after_folds,
          tuple({"n": n, "k": k, "signal": signal} for n, k, signal in ((60, 5, 0.5), (60, 5, 0.0), (60, 10, 0.5))),
          None, (0.9, 0.99), "Percentiles of a correlation cover .92 to .94 of one test set already. Where there is "
          "signal, encoders of other training images differ by more than both directions of a pair of folds share."),
    Check("widened after folds", "categories, four runs",
          partial(_categories, draw=_categories_after_folds),
          tuple({"n": 80, "effect": effect, "metric": metric} for metric in ("auc", "accuracy")
                for effect in (1.0, 0.0))),
    Check("latency", "onset of a step", _latency,
          ({"n": 100, "of": "onset", "effect": 0.8}, {"n": 100, "of": "onset", "effect": 0.4}),
          lambda **_: float(ONSET), None, "Latencies come in steps of a window."),
    Check("latency", "peak", _latency, ({"n": 100, "of": "peak", "effect": 0.5},), lambda **_: float(PEAK), None,
          "Latencies come in steps of a window."),
    Check("share of signal, jackknife", "50 voxels that go together", _ceiling,
          tuple({"n": n, "k": k, "share": share} for n, k, share in
                ((12, 3, 0.5), (12, 3, 0.0), (200, 4, 0.5), (200, 4, 0.0))), _share_truth),
    Check("share of signal, F", "one voxel", _ceiling_of_one,
          tuple({"n": n, "k": k, "share": share} for n, k, share in ((12, 3, 0.5), (200, 4, 0.0))), _share_truth),
    Check("permutation of images", "similarities with hubs", _permutation,
          tuple({"n": 60, "metric": metric} for metric in ("two-way", "median rank", "two-way within class")),
          goal=HOLDS),
    Check("permutation of geometries", "unrelated", _geometry_p, ({"n": 20},), goal=HOLDS),
    Check("permutation of labels", "decisions of noise, four runs", _categories_p,
          tuple({"n": 80, "metric": metric} for metric in ("auc", "balanced_accuracy")), goal=HOLDS),
    Check("exchange of whole subjects", "noise, trials of one person alike", _exchange,
          ({"subjects": 8, "score": "accuracy"}, {"subjects": 10, "score": "accuracy"},
           {"subjects": 8, "score": "pairs"}), goal=HOLDS),
    Check("refits on relabelled images", "ridge on noise, two-way", _refit,
          tuple({"n": n, "k": k, "within": within} for n, k, within in
                ((20, 5, True), (60, 5, True), (60, 5, False), (60, 10, False), (60, 2, True))), goal=HOLDS),
    Check("permutation within folds, widened", "ridge on noise, two-way", _widened_p,
          tuple({"n": n, "k": k} for n, k in ((60, 5), (20, 2), (200, 2), (60, 10))), goal=HOLDS),
    Check("permutation within folds, widened", "ridge on noise, one response", _correlation_after_folds_p,
          tuple({"n": n, "k": k} for n, k in ((60, 5), (60, 10))), goal=HOLDS),
    Check("permutation within folds, widened", "decoders of categories on noise, four runs",
          partial(_categories_p, draw=_categories_after_folds),
          tuple({"n": 80, "metric": metric} for metric in ("auc", "accuracy")), goal=HOLDS),
    Check("signs of images", "difference of 0, images differ", _image_signs,
          tuple({"subjects": s, "images": 100, "sd": (0.0, 0.3)} for s in (3, 10)), goal=HOLDS, times=4),
    Check("signs of images", "one subject", _paired, ({"images": 100},), goal=HOLDS, times=4),
    Check("signs of images", "two ridges on noise after folds, widened", _difference_after_folds_p,
          tuple({"n": n, "k": k} for n, k in ((60, 5), (20, 2))), goal=HOLDS),
    Check("signs of subjects", "difference of 0, subjects differ", _subject_signs,
          tuple({"subjects": s, "images": 100, "sd": (0.1, 0.0)} for s in (6, 10)), goal=HOLDS, times=4),
    Check("crossed p", "difference of 0", _crossed_p,
          tuple({"subjects": s, "images": 100, "sd": sd} for s in (3, 6, 10)
                for sd in ((0.0, 0.3), (0.1, 0.0), (0.1, 0.3))), goal=HOLDS),
    Check("Holm", "some p <= .05 of several, no effect", _corrected,
          tuple({"tests": n, "how": "Holm"} for n in (7, 28)), goal=HOLDS, times=4),
    Check("false discovery rate", "some q <= .05, no effect", _corrected,
          ({"tests": 200, "how": "FDR"},), goal=HOLDS),
    Check("maximum", "some network of scattered parcels, no effect", _best_network,
          tuple({"draws": n} for n in (50, 200)), goal=HOLDS),
    Check("maximum", "some contiguous network of a smooth map, no effect", _best_network,
          ({"draws": 200, "smooth": 2.0},), None, None, "Scattered parcels are no null for contiguous networks of a "
          "smooth map, as the page says."),
    Check("clusters over time, labels", "some cluster, no effect", _clusters_of_labels,
          ({"windows": 20},), goal=HOLDS),
    Check("clusters over time, subjects", "some cluster, no effect", _clusters_of_subjects,
          tuple({"subjects": s, "windows": 20} for s in (6, 12)), goal=HOLDS),
)  # fmt: skip

#: Functions of the package that make intervals and p-values, by the kind that they make. Those that call one of these
#: are not listed; see tests/test_calibration.py.
_CROSSED = "scoring.crossed:_Spread.half_width"
MADE_BY: dict[str, tuple[str, ...]] = {
    "Wilson": ("scoring.uncertainty:wilson_interval",),
    "bootstrap over images": ("scoring.uncertainty:bootstrap_interval", "scoring.crossed:bound_draws"),
    "bootstrap of correlations": ("scoring.crossed:bound_draws",),
    "bootstrap of geometries": ("parts.analyses.rsa:compare_rdms",),
    "bootstrap of decisions": ("scoring.crossed:bound_draws", "parts.analyses.window_categories:bound_areas"),
    "crossed": (_CROSSED,),
    "crossed, logit": (_CROSSED,),
    "crossed, Woodruff": (_CROSSED,),
    "crossed with seeds": (_CROSSED,),
    "images of these subjects": ("scoring.crossed:images_interval",),
    "t over groups": ("scoring.crossed:groups_interval", "parts.studies.sweep:summarise"),
    "t over resampled groups": ("scoring.crossed:bound_draws",),
    "share over persons": ("scoring.label_exchange:spread_of_owners",),
    "pairs of persons": ("scoring.label_exchange:spread_of_pairs",),
    "jackknife of identification": ("scoring.uncertainty:jackknife_interval",),
    "widened after folds": ("scoring.uncertainty:jackknife_interval",),
    "latency": (
        "parts.analyses.curves:bootstrap_onset", "parts.analyses.layer_time:LayerTimeConfig._decode",
        "parts.analyses.attributes:_measure",
    ),
    "share of signal, jackknife": ("preprocessing.reliability:SignalShare.bound_mean",),
    "share of signal, F": ("preprocessing.reliability:SignalShare.bound_features",),
    "permutation of images": (
        "scoring.uncertainty:permutation_test_folds", "parts.analyses.measure:Measured.p_value",
        "scoring.metrics.brain_correlation:map_responses",
    ),
    "permutation of geometries": ("parts.analyses.rsa:compare_rdms",),
    "permutation of labels": (
        "scoring.category_scores:_make_scores", "parts.analyses.confusion:_make_same",
        "parts.analyses.attributes:_measure",
        "parts.analyses.window_categories:TimeResolvedCategoriesConfig.compute",
    ),
    "exchange of whole subjects": ("scoring.label_exchange:Exchange.test",),
    "refits on relabelled images": ("scoring.score_table:_judge_refits",),
    "permutation within folds, widened": ("scoring.uncertainty:widen_null",),
    "signs of images": ("scoring.crossed:signs_p",),
    "signs of subjects": ("scoring.crossed:signs_p",),
    "crossed p": (_CROSSED,),
    "Holm": ("scoring.uncertainty:correct_holm",),
    "false discovery rate": ("scoring.uncertainty:correct_fdr",),
    "maximum": (
        "scoring.uncertainty:correct_maximum", "parts.analyses.patterns:_permute",
        "parts.analyses.generalization:TimeGeneralizationConfig.compute",
    ),
    "clusters over time, labels": ("parts.analyses.curves:cluster_over_labels",),
    "clusters over time, subjects": ("parts.analyses.curves:cluster_over_subjects",),
}  # fmt: skip
#: What looks like one of them and claims nothing of a truth: shares of a null that are shown as such, and whether a
#: design goes with its classes, whose permutations are those of `Exchange.test`.
NO_CLAIM = (
    "parts.analyses.regions:_make_row", "parts.audit.design:permute", "report.figures:plot_rank_histogram",
)  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------

HEAD = """\
## Intervals and p-values

Written by `{command}`; do not edit. Data are drawn of which the truth is known; the functions are those that pages
call. An interval of .95 should cover in {covers[0]:.2f} to {covers[1]:.2f} of the draws, and p <= .05 come in at most
{holds[1]:.3f} of data without an effect; **bold** misses that. Other goals have their reason below. *None*: share of
draws without an interval. The standard error near .05 and .95 is .007 with 1000 draws, .003 with 4000.

| kind | speaks of | simulated | size | covers, or p <= .05 | goal | mean width | draws | none |
|---|---|---|---|---|---|---|---|---|"""


def tabulate(cells: Sequence[tuple[Check, Mapping[str, Any], Cell]], command: str) -> str:
    """Return the section of the docs."""
    lines = [HEAD.format(command=command, covers=COVERS, holds=HOLDS)]
    for check, size, cell in cells:
        words = ", ".join(f"{key} {_show(value)}" for key, value in size.items() if value is not None)
        share = f"{cell.share:.3f}"
        goal = "-" if check.goal is None else f"{check.goal[0]:g} to {check.goal[1]:g}"
        width = "" if np.isnan(cell.width) else f"{cell.width:.3g}"
        n_draws = cell.n + cell.n_none
        none = f"{cell.n_none / n_draws:.3f}" if cell.n_none else ""
        share = share if misses(check, cell) is None else f"**{share}**"
        named = f"{check.kind} | {unc.KINDS[check.kind]} | {check.model} | {words}"
        lines.append(f"| {named} | {share} | {goal} | {width} | {n_draws} | {none} |")
    reasons = {check.model: f"- {check.kind}, {check.model}: {check.why}" for check, *_ in cells if check.why}
    return "\n".join([*lines, "", *reasons.values()])


def misses(check: Check, cell: Cell, slack: float = 0.0) -> str | None:
    """Return how a cell misses its goal, by more than `slack` standard errors; None where it does not."""
    if check.goal is None:
        return None
    low, high = check.goal
    if low - slack * cell.error <= cell.share <= high + slack * cell.error:
        return None
    return f"{check.kind} ({check.model}): {cell.share:.3f}, and {low:g} to {high:g} are wanted"


def _show(value: Any) -> str:
    return " and ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else str(value)


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=N_DRAWS, help="draws a cell")
    parser.add_argument("--only", nargs="*", default=None, help="kinds; all by default")
    parser.add_argument("--write", type=Path, help="a page whose section is replaced")
    options = parser.parse_args()
    chosen = [check for check in CHECKS if options.only is None or check.kind in options.only]
    cells, missed = [], []
    for check in chosen:
        for size in check.sizes:
            began = time.perf_counter()
            cell = simulate(check, size, options.draws * check.times)
            cells.append((check, size, cell))
            missed += [words for words in [misses(check, cell)] if words]
            words = f"{check.kind}, {check.model}, {dict(size)}: {cell.share:.3f} ({cell.n_none} without)"
            print(f"{words}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    section = tabulate(cells, "python benchmarks/calibration.py --write")
    print(section)
    if options.write:
        page = options.write.read_text(encoding="utf-8") if options.write.exists() else ""
        options.write.write_text(put_section(page, section, "calibration.py"), encoding="utf-8")
    for words in missed:
        print(words, file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
