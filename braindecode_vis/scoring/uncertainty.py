"""Uncertainty for one subject: bootstrap and Wilson intervals, permutation tests, and corrections of many p-values.

Everything starts from one value per item, or from a table of one value per (prediction, ground truth) pair, and is
vectorised over resamples. Intervals of several subjects are in `crossed`; the p-value of their common row in retrieval
and images comes from the tests here. The unit that is resampled is the stimulus: rows of one stimulus move together.
Permutations reassign which ground truth belongs to which prediction. P-values count the observed assignment as one of
the permutations, p = (b + 1) / (m + 1), so they are valid for any number of permutations; `compute_p_value` is the only
place that counts.

scipy's resampling and permutation tests take one row per unit: they know neither stimuli with unequal numbers of rows
nor subjects.

References
----------
Phipson & Smyth (2010), Permutation p-values should never be zero, doi:10.2202/1544-6115.1585.
Wilson (1927), Probable inference, doi:10.1080/01621459.1927.10502953. Holm (1979), Scandinavian Journal of Statistics
6, 65-70. Benjamini and Hochberg (1995), doi:10.1111/j.2517-6161.1995.tb02031.x. Nichols and Holmes (2002),
doi:10.1002/hbm.1058 (maximum statistic). Arvesen (1969), Jackknifing U-statistics, doi:10.1214/aoms/1177697287.
Bengio and Grandvalet (2004), No unbiased estimator of the variance of K-fold cross-validation, JMLR 5, 1089. Nadeau and
Bengio (2003), doi:10.1023/A:1024068626366 (wider intervals after cross-validation).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_finite, check_option
from braindecode_vis.base.seeds import make_generator

Alternative = Literal["greater", "less", "two-sided"]
Statistic = Literal["mean", "median"]
Labels = Sequence[object] | np.ndarray
#: A value of a null closer to the observed one than this, relative to the larger of 1 and its size, is equal to it: far
#: above the rounding of a sum of 10^5 values (1e-12), far below what two different permutations differ by.
TIE_TOLERANCE = 1e-9
#: After K folds a score sums "A teaches, B is tested" and the reverse, nearly the same number twice: its standard error
#: is this many times that of independent items.
FOLD_FACTOR = 2**0.5
#: What the words on an interval end with that is wider for it.
WIDENED = ", widened by sqrt 2 after folds"
#: Most bytes of permutations and resamples that are kept for the next metric.
MOST_KEPT = 1 << 27
CHUNK_VALUES = 1 << 21  # numbers per chunk of resamples (16 MB in double precision)


@dataclass(frozen=True)
class Interval:
    """A confidence interval: bounds, level, how it was made and the number of independent units behind it."""

    low: float
    high: float
    level: float
    method: str
    n_units: int


@dataclass(frozen=True)
class PermutationResult:
    """An observed statistic beside its permutation null.

    Parameters
    ----------
    observed
        Mean (or median) over predictions under the true assignment.
    null_mean
        Exact mean over all admissible assignments: the chance level of this statistic on these data. Of a median, the
        mean of the null; after `move_null`, an estimate.
    null_low, null_high
        2.5 and 97.5 percentiles of the null.
    p_value
        (b + 1) / (m + 1), with b permutations at least as extreme among m.
    alternative
        ``greater``, ``less`` or ``two-sided`` (distance from `null_mean`).
    null : array of shape (n_permutations,)
        The permuted statistics.
    """

    observed: float
    null_mean: float
    null_low: float
    null_high: float
    p_value: float
    alternative: Alternative
    null: np.ndarray


def bootstrap_interval(
    values: np.ndarray,
    *,
    clusters: Labels | None = None,
    statistic: Statistic = "mean",
    n_boot: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of the mean or median of one value per row.

    For identification scores the items are resampled while the set of distractors behind each value is held
    fixed: the interval speaks of other items judged against this gallery.

    Parameters
    ----------
    values : array of shape (n_rows,)
        One finite value per row.
    clusters : sequence of length n_rows, optional
        Stimulus of each row; rows of one stimulus are resampled together. By default each row is its own.
    statistic
        ``mean`` or ``median``.
    n_boot
        Number of resamples.
    level
        Coverage.
    seed
        Root seed.

    Returns
    -------
    Interval
        Percentile interval. Of several subjects see `braindecode_vis.scoring.crossed`.

    Raises
    ------
    DataError
        If fewer than two units are there to resample, or a value is not finite.

    Examples
    --------
    >>> interval = bootstrap_interval(np.arange(100.0), n_boot=2000)
    >>> interval.low < 49.5 < interval.high
    True
    """
    check_option("statistic", statistic, ("mean", "median"))
    values = _check_values(values)
    codes = _encode(clusters, len(values), "cluster")
    n_units = int(codes.max()) + 1
    if n_units < 2:
        raise DataError("a bootstrap needs at least two stimuli to resample, got one.")
    draws = _bootstrap_clusters(values, codes, statistic, n_boot, seed)
    low, high = _percentiles(draws, level)
    return Interval(low, high, level, "bootstrap over stimuli", n_units)


def wilson_interval(n_hits: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the Wilson interval of a proportion, which holds for small counts and for 0 or n hits.

    Examples
    --------
    >>> interval = wilson_interval(9, 10)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.596, 0.982)
    """
    from scipy.special import ndtri  # scipy.stats, which has this interval, takes a second to load

    if not 0 <= n_hits <= n or n < 1:
        raise DataError(f"{n_hits} hits out of {n} is not a proportion.")
    share, z = n_hits / n, float(ndtri(0.5 + level / 2))
    whole = 2 * (n + z**2)
    middle, half = (2 * n * share + z**2) / whole, z / whole * math.sqrt(4 * n * share * (1 - share) + z**2)
    low, high = middle - half if n_hits else 0.0, middle + half if n_hits < n else 1.0
    return Interval(low, high, level, "wilson", n)


def logit_limits(mean: float, half_width: float, n: int) -> tuple[float, float]:
    """Return limits of a proportion between 0 and 1 from a half-width on its own scale.

    Parameters
    ----------
    mean
        Share of hits.
    half_width
        On the scale of the share.
    n
        Number of hits and misses; half a hit and half a miss are added, which moves the middle away from 0 and 1. The
        limits are moved as far as needed to hold `mean`.
    """
    from scipy.special import expit, logit

    share = (mean * n + 0.5) / (n + 1)
    wide = half_width / (share * (1 - share))
    low, high = float(expit(logit(share) - wide)), float(expit(logit(share) + wide))
    return min(low, mean), max(high, mean)


def jackknife_interval(
    value: float, left_out: np.ndarray, *, level: float = 0.95, widen: float = 1.0
) -> Interval | None:
    """Return the jackknife interval of a proportion on the logit scale, from its values without each item.

    Parameters
    ----------
    value
        The proportion, such as two-way identification.
    left_out : array of shape (n_items,)
        The same without each item in turn; see `metrics.identification.leave_out_images`.
    level
        Coverage.
    widen
        Factor of the standard error; `FOLD_FACTOR` after K folds.

    Returns
    -------
    Interval or None
        Between 0 and 1; of no width where no item changes anything, as with one prediction for all items, which is
        right half of the time exactly. None for fewer than three items.

    Examples
    --------
    >>> found = jackknife_interval(5 / 6, np.array([2 / 3, 1, 5 / 6, 5 / 6]))
    >>> round(found.low, 6), round(found.high, 6)
    (0.044456, 0.998142)
    """
    from scipy.special import expit, logit, stdtrit

    n, tail = len(left_out), 0.5 - level / 2
    if n < 3 or not np.isfinite(left_out).all():
        return None
    if not 0 < value < 1:
        # All hits: the highest rate of misses that n items (fewer, where they are not independent) still hide.
        bound = float(tail ** (widen**2 / n))
        low, high = (bound, 1.0) if value >= 1 else (0.0, 1 - bound)
        return Interval(low, high, level, "jackknife", n)
    error = widen * np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    half = stdtrit(n - 1, 1 - tail) * error / (value * (1 - value))
    low, high = expit(logit(value) - half), expit(logit(value) + half)
    return Interval(float(low), float(high), level, "jackknife", n)


def widen_about(values: np.ndarray | float, centre: np.ndarray | float) -> np.ndarray:
    """Return values `FOLD_FACTOR` times as far from the centre: limits about a score, or a null about its mean."""
    return np.asarray(centre + FOLD_FACTOR * (np.asarray(values) - centre))


def widen_limits(
    low: np.ndarray | float,
    high: np.ndarray | float,
    value: np.ndarray | float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[np.ndarray, np.ndarray]:
    """Return limits `FOLD_FACTOR` times as wide about their scores, for scores after K folds.

    Parameters
    ----------
    low, high : arrays of any shape
        Of items that were taken for independent.
    value
        The scores.
    bounds
        Least and largest value that a score can have.

    Examples
    --------
    >>> low, high = widen_limits(0.4, 0.8, 0.6, (0.0, 1.0))
    >>> low.round(3).item(), high.round(3).item()
    (0.317, 0.883)
    """
    wide_low, wide_high = (np.asarray(np.clip(widen_about(limit, value), *bounds)) for limit in (low, high))
    return wide_low, wide_high


def widen_null(found: PermutationResult) -> PermutationResult:
    """Return a permutation test with the p-value that its null gives `FOLD_FACTOR` times as wide about its mean.

    For scores after K folds whose predictions were not fitted again on permuted images: such a null has half the
    variance of a score that sums "A teaches, B is tested" and the reverse, where these are the same number. They never
    differ less, so that p is conservative where a decoder treats A and B unlike each other. The null itself stays as it
    is, since it is that of the shuffles.

    Examples
    --------
    >>> narrow = permutation_test(np.eye(8), n_permutations=999)
    >>> widen_null(narrow).p_value >= narrow.p_value
    True
    """
    wide = widen_about(found.null, found.null_mean)
    p_value = compute_p_value(found.observed, wide, alternative=found.alternative, centre=found.null_mean)
    return replace(found, p_value=float(p_value))


def compute_p_value(
    observed: np.ndarray | float,
    null: np.ndarray,
    *,
    alternative: Alternative = "greater",
    centre: float = 0.0,
) -> np.ndarray:
    """Return the share of permutations at least as extreme as what was observed, which counts as one of them.

    Parameters
    ----------
    observed : float or array of shape (n_tests,)
        One statistic, or one per test.
    null : array of shape (n_permutations,) or (n_permutations, n_tests)
        The statistics under permutations. Several tests against one null, that of the most extreme of them in each
        permutation, are corrected for their number by the maximum statistic.
    alternative
        ``greater`` where high values are good, ``less``, or ``two-sided`` (distance from `centre`).
    centre
        Middle of the null.

    Returns
    -------
    float array of the shape of `observed`
        (b + 1) / (m + 1). Equal values count as extreme; see `TIE_TOLERANCE`.

    Examples
    --------
    >>> float(compute_p_value(3.0, np.array([1.0, 2.0, 3.0])))
    0.5
    >>> compute_p_value(np.array([3.0, 1.5]), np.array([1.0, 2.0, 1.0])).tolist()
    [0.25, 0.5]
    """
    values = np.asarray(observed, dtype=np.float64)
    slack = TIE_TOLERANCE * np.maximum(1.0, np.abs(values))
    if alternative == "less":
        values, null = -values, -null
    elif alternative == "two-sided":
        values, null = np.abs(values - centre), np.abs(null - centre)
    if null.ndim == 1:  # sorted once, so that many tests do not make a table of tests by permutations
        n_extreme = len(null) - np.searchsorted(np.sort(null), values - slack, side="left")
    else:
        n_extreme = (null >= values - slack).sum(axis=0)
    return np.asarray((1 + n_extreme) / (1 + len(null)))


def permute_within(
    labels: np.ndarray, blocks: Sequence[np.ndarray], n: int, generator: np.random.Generator
) -> np.ndarray:
    """Return labels permuted among the entries of each block, shape (n, n_labels).

    Parameters
    ----------
    labels : array of shape (n_labels,)
    blocks : sequence of int arrays
        Entries that are exchanged among each other; every entry is in one block.
    n
        Number of permutations.
    generator
        Where they come from, block by block.
    """
    permuted = np.empty((n, len(labels)), dtype=labels.dtype)
    for block in blocks:
        permuted[:, block] = generator.permuted(np.tile(labels[block], (n, 1)), axis=1)
    return permuted


def correct_holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, which bound the chance of a single false claim; shape (n_tests,).

    Parameters
    ----------
    p_values : array of shape (n_tests,)

    Examples
    --------
    >>> correct_holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError("p-values to correct must be one number between 0 and 1 per test.")
    order = np.argsort(values, kind="stable")
    scaled = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def correct_fdr(p_values: np.ndarray) -> np.ndarray:
    """Return Benjamini and Hochberg's adjusted p-values, shape (n_tests,).

    Calling all tests up to q significant leaves an expected share of at most q of false ones among them, for tests that
    are independent or positively dependent, as neighbouring voxels and times are.

    Parameters
    ----------
    p_values : array of shape (n_tests,)

    Examples
    --------
    >>> correct_fdr(np.array([0.01, 0.04, 0.03, 0.5])).round(3).tolist()
    [0.04, 0.053, 0.053, 0.5]
    """
    values = np.asarray(p_values, dtype=float)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError("p-values to correct must be one number between 0 and 1 per test.")
    order = np.argsort(values, kind="stable")
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    return np.minimum(adjusted, 1.0)


def correct_maximum(
    observed: np.ndarray, null: np.ndarray, *, alternative: Alternative = "greater"
) -> np.ndarray:
    """Return p-values of the best of many: how often the largest of all tests comes as far as each by chance.

    Each test is standardised by what was observed and drawn together, so that no test is largest because its null is
    wide.

    Parameters
    ----------
    observed : array of shape (n_tests,)
        One statistic per test.
    null : array of shape (n_draws, n_tests)
        The same statistics of all tests in each draw; a draw changes all of them together.
    alternative
        As for `compute_p_value`; distances are from the mean of each test.

    Returns
    -------
    array of shape (n_tests,)
        Corrected for the number of tests; the smallest possible one is 1 / (n_draws + 1).

    Examples
    --------
    >>> null = np.array([[3.0, 2, 6], [4, 4, 7], [2, 3, 8], [5, 1, 5]])
    >>> correct_maximum(np.array([5.0, 3, 9]), null).tolist()
    [0.6, 0.8, 0.2]
    """
    rows = np.concatenate([np.asarray(observed, dtype=np.float64)[None], np.asarray(null, dtype=np.float64)])
    centred, spread = rows - rows.mean(axis=0), rows.std(axis=0)
    # A test that no draw changes says nothing, and its spread is rounding.
    varied = spread > TIE_TOLERANCE * np.maximum(1.0, np.abs(rows).max(axis=0))
    z = np.divide(centred, spread, out=np.zeros_like(centred), where=varied)
    z = {"greater": z, "less": -z, "two-sided": np.abs(z)}[alternative]
    return compute_p_value(z[0], z[1:].max(axis=1))


def permutation_test(
    table: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    groups: Labels | None = None,
    statistic: Statistic = "mean",
    alternative: Alternative = "greater",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PermutationResult:
    """Test whether predictions fit their own ground truth better than they fit permuted ones.

    Parameters
    ----------
    table : array of shape (n_predictions, n_stimuli)
        Value of each prediction (row) if each stimulus (column) were its ground truth: any per-item metric such
        as pixcorr, or a table of `braindecode_vis.scoring.metrics.identification`.
    truth : int array of shape (n_predictions,), optional
        True column of each row, by default the diagonal. Rows of one stimulus are permuted together; columns that
        no row names (further gallery items) take no part in the permutation.
    groups : sequence of length n_stimuli, optional
        Class of each column; stimuli are then permuted within their class only, as a within-class score needs.
    statistic
        Of the values of all predictions: ``mean`` or ``median``.
    alternative
        ``greater`` where high values are good, ``less`` for errors and ranks, or ``two-sided``.
    n_permutations
        At least 10 000 where a p-value is quoted.
    seed
        Root seed.

    Returns
    -------
    PermutationResult
        Observed statistic, null and p-value.

    Examples
    --------
    >>> permutation_test(np.eye(8), n_permutations=999).p_value
    0.001
    """
    truth = np.arange(len(table)) if truth is None else truth
    return permutation_test_folds(
        [table], [truth], groups=[groups], statistic=statistic, alternative=alternative,
        n_permutations=n_permutations, seed=seed,
    )  # fmt: skip


def move_null(
    found: PermutationResult, table: np.ndarray, truth: np.ndarray, blocks: Labels, classes: Labels | None
) -> PermutationResult:
    """Move a null of permutations within random blocks to the mean that permutations within classes have.

    In a block of n, a permutation leaves one stimulus in n beside its own prediction, so that a null of small blocks
    is nearer to the observed value than one of all stimuli. The mean is estimated from the pairs within blocks; the
    p-value is valid and stays, and so does the spread, which is that of the blocks.

    Parameters
    ----------
    found
        From `permutation_test` with the blocks as groups.
    table, truth
        As for `permutation_test`; of the table only what lies within blocks is read.
    blocks, classes : sequences of length n_stimuli
        Block and class of each column, blocks within classes; None is one class.
    """
    part, whole = (_Permuted.make(table, truth, groups) for groups in (blocks, classes))
    own = part.own
    others, sizes = np.full(len(own), np.nan), np.ones(len(own))
    for block in part.blocks:
        rows = np.flatnonzero(np.isin(part.slot, block))
        if len(block) > 1:
            others[rows] = (part.table[np.ix_(rows, part.shown[block])].sum(axis=1) - own[rows]) / (
                len(block) - 1
            )
    for block in whole.blocks:
        sizes[np.isin(whole.slot, block)] = len(block)
    # A stimulus that is alone in its block, as a subject's may be, has no pair: others stand for it.
    others = np.where(np.isnan(others), own if np.isnan(others).all() else np.nanmean(others), others)
    level = float((own / sizes + others * (1 - 1 / sizes)).mean())
    by = level - found.null_mean
    return replace(
        found,
        null=found.null + by,
        null_mean=level,
        null_low=found.null_low + by,
        null_high=found.null_high + by,
    )


def permutation_test_folds(
    tables: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    *,
    groups: Sequence[Labels | None] | None = None,
    statistic: Statistic = "mean",
    alternative: Alternative = "greater",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PermutationResult:
    """Test the statistic of all predictions of several galleries, each permuted within its own.

    Parameters
    ----------
    tables, truths, groups
        One per gallery, as for `permutation_test`.
    statistic, alternative, n_permutations, seed
        As for `permutation_test`; the permutations of the galleries are independent of each other.
    """
    check_option("alternative", alternative, ("greater", "less", "two-sided"))
    check_option("statistic", statistic, ("mean", "median"))
    listed = [None] * len(tables) if groups is None else list(groups)
    parts = [_Permuted.make(*part) for part in zip(tables, truths, listed, strict=True)]
    own = np.concatenate([part.own for part in parts])
    n_rows = len(own)
    width = sum(len(part.shown) for part in parts)
    sizes = list(_chunks(n_permutations, width if statistic == "mean" else max(n_rows, width)))
    nulls = []
    # Every metric of a run is tested by the same permutations, with classes kept and without.
    drawn = [part.draw(sizes, seed + number, keep=statistic == "mean") for number, part in enumerate(parts)]
    for size, blocks in zip(sizes, zip(*drawn, strict=True), strict=True):
        if statistic == "mean":
            total = np.zeros(size)
            for part, assigned in zip(parts, blocks, strict=True):
                part.add_sums(total, assigned)
            nulls.append(total / n_rows)
        else:
            values = [part.look_up(assigned) for part, assigned in zip(parts, blocks, strict=True)]
            nulls.append(np.median(np.concatenate(values), axis=0))
    null = np.concatenate(nulls)
    if statistic == "mean":
        observed, null_mean = float(own.mean()), sum(part.cell_sum for part in parts) / n_rows
    else:
        observed, null_mean = float(np.median(own)), float(null.mean())
    low, high = _percentiles(null, 0.95)
    p_value = float(compute_p_value(observed, null, alternative=alternative, centre=null_mean))
    return PermutationResult(observed, null_mean, low, high, p_value, alternative, null)


@dataclass(frozen=True)
class _Permuted:
    """A table whose shown columns are permuted within blocks.

    Parameters
    ----------
    table : array of shape (n_rows, n_columns)
    shown : int array of shape (n_shown,)
        Columns that are some row's own.
    slot : int array of shape (n_rows,)
        Entry of `shown` that is the row's own.
    blocks
        Entries of `shown` that are permuted among each other.
    """

    table: np.ndarray
    shown: np.ndarray
    slot: np.ndarray
    blocks: list[np.ndarray]

    @classmethod
    def make(cls, table: np.ndarray, truth: np.ndarray, groups: Labels | None) -> _Permuted:
        check_finite(table, what="the table to permute", row_names=range(len(table)), unit="prediction")
        n_rows, n_columns = table.shape
        truth = np.asarray(truth)
        if len(truth) != n_rows or truth.min() < 0 or truth.max() >= n_columns:
            raise DataError(f"`truth` must name one of {n_columns} columns for each of {n_rows} predictions.")
        shown, slot = np.unique(truth, return_inverse=True)
        labels = (
            _encode(groups, n_columns, "group")[shown] if groups is not None else np.zeros(len(shown), int)
        )
        blocks = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return cls(np.asarray(table, dtype=np.float64), shown, slot, blocks)

    @property
    def own(self) -> np.ndarray:
        """Value of each row against its own column."""
        return self.table[np.arange(len(self.table)), self.shown[self.slot]]

    @property
    def cell_sum(self) -> float:
        """Sum over rows of their mean over admissible columns: the mean over all permutations, exactly."""
        total = 0.0
        for block in self.blocks:
            rows = np.flatnonzero(np.isin(self.slot, block))
            total += float(self.table[np.ix_(rows, self.shown[block])].mean(axis=1).sum())
        return total

    @cached_property
    def sums(self) -> np.ndarray:
        """Values of each shown stimulus, summed over its rows, beside each shown stimulus: (n_shown, n_shown)."""
        table = self.table if len(self.shown) == self.table.shape[1] else self.table[:, self.shown]
        if np.array_equal(self.slot, np.arange(len(self.shown))):
            return np.ascontiguousarray(table)
        sums = np.zeros((len(self.shown), len(self.shown)))
        np.add.at(sums, self.slot, table)
        return sums

    def draw(self, sizes: Sequence[int], seed: int, *, keep: bool) -> Iterable[np.ndarray]:
        """Yield which shown stimulus each gets under permutations, (n_shown, size)."""
        n_shown = len(self.shown)
        block_of = np.empty(n_shown, np.int64)
        for number, block in enumerate(self.blocks):
            block_of[block] = number
        key = (block_of.tobytes(), tuple(sizes), seed)
        # Transposed: what is looked up one after the other then stands in one row of the table.
        drawn = (np.ascontiguousarray(assigned.T, np.intp) for assigned in _draw_permutations(*key))
        if not keep:
            return drawn
        return _keep_draws(("permutation", *key), sum(sizes) * n_shown, n_shown, drawn, np.intp)

    def add_sums(self, total: np.ndarray, assigned: np.ndarray) -> None:
        """Add to `total`, (size,), what all rows together would be worth beside the stimuli that they got."""
        # Rows of one stimulus move together, so a mean needs their sum only. Stimulus by stimulus, so that a row of the
        # table and the total stay in the cache, and the null is the same to the bit whatever the number of draws.
        for values, places in zip(self.sums, assigned, strict=True):
            total += values.take(places)

    def look_up(self, assigned: np.ndarray) -> np.ndarray:
        """Return what each row would be worth beside the stimulus that it got, (n_rows, size)."""
        table = self.table[:, self.shown]
        return np.take_along_axis(table, assigned[self.slot], axis=1)


def _draw_permutations(block_of: bytes, sizes: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """Yield permutations of the entries of each block, (size, n_entries); `block_of` is the block of each as int64."""
    labels = np.frombuffer(block_of, np.int64)
    blocks = [np.flatnonzero(labels == number) for number in range(labels.max() + 1)]
    generator = make_generator(seed, "permutation")
    for size in sizes:
        yield permute_within(np.arange(len(labels)), blocks, size, generator)


_kept: OrderedDict[Hashable, list[np.ndarray]] = OrderedDict()  # the latest last


def _keep_draws(
    key: Hashable, n_entries: int, most: int, draws: Iterable[np.ndarray], kind: type[np.generic]
) -> Iterable[np.ndarray]:
    """Return the draws that `key` stands for, which cost more to make than to use; together up to `MOST_KEPT`.

    `most` is the largest of the entries: they are kept in the smallest type that holds it, and given as `kind`.
    """
    compact = np.min_scalar_type(most)
    if n_entries * compact.itemsize > MOST_KEPT:
        return (drawn.astype(kind, copy=False) for drawn in draws)
    found = _kept.pop(key, None)
    if found is None:
        found = [drawn.astype(compact) for drawn in draws]
    while _kept and sum(drawn.nbytes for draws in (found, *_kept.values()) for drawn in draws) > MOST_KEPT:
        _kept.popitem(last=False)  # the one that was not used for longest
    _kept[key] = found
    return (drawn.astype(kind) for drawn in found)


def _bootstrap_clusters(
    values: np.ndarray, codes: np.ndarray, statistic: str, n_boot: int, seed: int
) -> np.ndarray:
    """Return the statistic of each resample."""
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    n = len(sums)
    order = np.argsort(values, kind="stable")  # sorted once: a median of a resample is a place in this order
    sizes = tuple(_chunks(n_boot, max(n, len(values))))
    generator = make_generator(seed, "bootstrap")
    drawn = (_count_draws(generator.integers(0, n, (size, n)), n) for size in sizes)
    parts = []
    for times in _keep_draws(("bootstrap", seed, n, sizes), n_boot * n, n, drawn, np.float64):
        if statistic == "mean":
            parts.append((times @ sums) / (times @ counts))
            continue
        seen = 2 * np.cumsum(times[:, codes[order]], axis=1)  # (size, n_rows)
        half = seen[:, -1:] / 2
        lower, upper = (seen >= half).argmax(axis=1), (seen > half).argmax(axis=1)
        parts.append((values[order][lower] + values[order][upper]) / 2)
    return np.concatenate(parts)


def _count_draws(drawn: np.ndarray, n: int) -> np.ndarray:
    """Return how often each of `n` clusters is in each resample, (size, n), of their numbers, (size, n_draws)."""
    flat = (drawn + n * np.arange(len(drawn))[:, None]).ravel()
    return np.bincount(flat, minlength=len(drawn) * n).reshape(len(drawn), n)


def _chunks(n: int, width: int) -> Iterator[int]:
    if n < 1:
        raise ConfigError(f"the number of resamples must be at least 1, got {n}.")
    step = max(1, CHUNK_VALUES // width)  # the draws of a chunk do not depend on its size
    for start in range(0, n, step):
        yield min(step, n - start)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval must lie between 0 and 1, got {level}.")
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _check_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise DataError(f"statistics need one value per item, got an array of shape {values.shape}.")
    check_finite(values, what="the values per item", row_names=range(len(values)), unit="item")
    return values


def _encode(labels: Labels | None, n: int, what: str) -> np.ndarray:
    """Return labels as integers 0 ... n_labels - 1."""
    if labels is None:
        return np.arange(n)
    if len(labels) != n:
        raise DataError(f"{n} items came with {len(labels)} {what} labels.")
    return np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]


#: Every kind of interval and p-value that pages print, and what it speaks of. `benchmarks/calibration.py` simulates
#: each; a test fails for a kind without a row there, and for a function that makes intervals or p-values of no kind.
KINDS = {
    "Wilson": "hits of few independent images",
    "bootstrap over images": "mean or median of one subject",
    "bootstrap of correlations": "correlation over images",
    "bootstrap of geometries": "correlation of dissimilarities",
    "bootstrap of decisions": "accuracy and area of categories",
    "crossed": "subjects and images like these",
    "crossed, logit": "the same, few hits or misses",
    "crossed, Woodruff": "medians of subjects and images like these",
    "crossed with seeds": "subjects, seeds and images like these",
    "images of these subjects": "these subjects, images like these",
    "t over groups": "groups like these",
    "t over resampled groups": "groups like these, areas and means over classes",
    "share over persons": "persons like these, labels of persons",
    "pairs of persons": "persons like these, area of labels of persons",
    "jackknife of identification": "images as queries and as distractors",
    "widened after folds": "scores after K folds",
    "latency": "onset, peak or rise over time",
    "share of signal, jackknife": "noise ceiling over voxels",
    "share of signal, F": "noise ceiling of one voxel",
    "permutation of images": "no relation of predictions and images",
    "permutation of geometries": "no relation of dissimilarities",
    "permutation of labels": "no relation of decisions and classes",
    "exchange of whole subjects": "labels of persons, with refits",
    "refits on relabelled images": "scores after K folds",
    "permutation within folds, widened": "scores after K folds, without refits",
    "signs of images": "no difference for these subjects",
    "signs of subjects": "no difference for these images",
    "crossed p": "no difference for subjects and images like these",
    "Holm": "several differences",
    "false discovery rate": "maps",
    "maximum": "the best of many",
    "clusters over time, labels": "curves of these subjects",
    "clusters over time, subjects": "curves of subjects like these",
}
