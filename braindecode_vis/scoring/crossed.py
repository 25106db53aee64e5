"""Intervals and p-values that generalise to other subjects, seeds and images: all of them are samples.

Everything starts from a table with one row per subject and one column per image. An image that is easy for one subject
is easy for the others, so the cells of a column are not independent, nor are those of a row; the squared half-widths of
rows and columns are added instead. Knows nothing of files and rows of scores, and draws no random numbers but signs.

References
----------
Owen (2007), The pigeonhole bootstrap, doi:10.1214/07-AOAS122 (the variance of crossed samples). Banerjee (1960),
Sankhya 22, 357 (squared half-widths add). Woodruff (1952), Confidence intervals for medians,
doi:10.1080/01621459.1952.10483443. Winkler et al. (2014), Permutation inference for the general linear model,
doi:10.1016/j.neuroimage.2014.01.060 (signs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.scoring.uncertainty import (
    FOLD_FACTOR,
    WIDENED,
    Labels,
    Statistic,
    bootstrap_interval,
    compute_p_value,
    jackknife_interval,
    logit_limits,
    widen_limits,
    wilson_interval,
)

NO_INTERVAL = "no interval"  # with these words begins why there is none
JACKKNIFE = "images (jackknife)"
#: Units that are many by nature and are not counted in words: their bootstrap needs no t.
MANY = ("image", "trial")
WILSON_BELOW = 40  # fewer items than this, and the bootstrap of a proportion is too narrow
#: Two subjects, seeds or groups cover as well, but with intervals three times as wide as those of three.
FEWEST = 3
#: Fewer images, hits or misses than this, and an interval of hits is computed on the scale of their logit.
FEW_HITS = 20

Population = Literal["both", "images", "subjects"]


@dataclass(frozen=True)
class CrossedInterval:
    """A value and its limits, or why it has none.

    Parameters
    ----------
    value
        Mean of subject means, or median of all values.
    low, high
        Limits; None if there are too few subjects or images, or nothing varies.
    half_width
        What the limits were made of, on the scale of the mean; None if there is none.
    resampled
        In words, of what the limits speak: ``5 subjects and 200 images (crossed)``, or why there are none.
    """

    value: float
    low: float | None
    high: float | None
    half_width: float | None
    resampled: str


@dataclass(frozen=True)
class _Spread:
    """Squared standard errors of a mean, each with its degrees of freedom, and what their sum counts twice.

    Parameters
    ----------
    terms
        Of subjects, images and seeds.
    residual, residual_df
        Of single cells, which are in every term. Without degrees of freedom it is taken off as of many cells.
    words
        What varies.
    """

    terms: tuple[tuple[float, int], ...]
    residual: float
    residual_df: int | None
    words: str

    def half_width(self, alpha: float) -> float:
        from scipy.special import ndtri, stdtrit  # of scipy.stats, which takes a second to load

        squares = [float(stdtrit(df, alpha / 2)) ** 2 * variance for variance, df in self.terms]
        if self.residual_df is None:  # 4 at .95, which is 1.96^2 rounded up
            factor = 4 * (float(ndtri(alpha / 2)) / float(ndtri(0.025))) ** 2
        else:
            factor = float(stdtrit(self.residual_df, alpha / 2)) ** 2
        return float(np.sqrt(max(0.0, *squares, sum(squares) - factor * self.residual)))


def crossed_interval(
    table: np.ndarray,
    *,
    statistic: Statistic = "mean",
    proportion: bool = False,
    level: float = 0.95,
    row: str = "subject",
    column: str = "image",
) -> CrossedInterval:
    """Return the interval of a mean or median that speaks of subjects and images like these.

    With m the mean, A, B the squared standard errors of the means of rows and of columns and E that of single cells,
    the limits are m - h and m + h, with h^2 the largest of t(S-1)^2 A, t(I-1)^2 B and
    t(S-1)^2 A + t(I-1)^2 B - t((S-1)(I-1))^2 E, each t the quantile of Student with the degrees of freedom behind it.
    Hits of few images, or few hits or misses, use the logit of the mean; medians use order statistics (Woodruff).

    Parameters
    ----------
    table : array of shape (n_subjects, n_images), or (n_subjects, n_seeds, n_images)
        One value per cell. NaN in a table stands where a subject did not see an image: images that all subjects saw
        and images that one subject saw may be mixed, as in the Natural Scenes Dataset; in any other pattern an image
        weighs by who saw it. Seeds are a factor of their own only where one seed is the same
        for all subjects, as in a network that is trained on all of them; otherwise average over seeds first. For one
        subject with several seeds, give the seeds as rows.
    statistic
        ``mean`` (of the means of rows), or ``median`` of all cells.
    proportion
        Whether the values are hits and misses, or shares of them: limits then stay between 0 and 1.
    level
        Coverage.
    row, column
        What rows and columns are, in one word.

    Returns
    -------
    CrossedInterval
        Without limits if there are fewer than three rows (or seeds) or fewer than two columns, or if all values are
        equal; `resampled` says why.

    Raises
    ------
    DataError
        If the table has no cells, a row is empty, a value is infinite, or one of a (subject, seed, image) table is NaN.

    Examples
    --------
    >>> hits = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0]])
    >>> found = crossed_interval(hits, proportion=True)
    >>> round(found.value, 6), round(found.half_width, 6), round(found.low, 6), round(found.high, 6)
    (0.583333, 0.690642, 0.07451, 0.958501)
    >>> found.resampled
    '3 subjects and 4 images (crossed, logit)'
    >>> crossed_interval(hits[:2]).resampled
    'no interval: 2 subjects, and an interval over subjects needs at least 3'
    """
    check_option("statistic", statistic, ("mean", "median"))
    values = _check_table(table)
    if statistic == "median":
        cells = np.sort(values[np.isfinite(values)])
        median = float(np.median(cells))
        below = np.where(np.isfinite(values), values <= median, np.nan)
        return crossed_median(cells, below, level=level, row=row, column=column)
    mean = _average(values)
    if why := _find_lack(values, row, column):
        return CrossedInterval(mean, None, None, None, f"{NO_INTERVAL}: {why}")
    spread = _find_spread(values, row, column)
    half = spread.half_width(1 - level)
    n_cells = int(np.isfinite(values).sum())
    n_columns = n_cells / (len(values) * (values.shape[1] if values.ndim == 3 else 1))
    n_hits = mean * n_cells
    if proportion and min(n_columns, n_hits, n_cells - n_hits) <= FEW_HITS:
        low, high = logit_limits(mean, half, n_cells)
        return CrossedInterval(mean, low, high, half, f"{spread.words} (crossed, logit)")
    return CrossedInterval(
        mean, *_clip(mean - half, mean + half, proportion), half, f"{spread.words} (crossed)"
    )


def half_width_of_parts(
    rows: float, columns: float, cells: float, n_rows: int, n_columns: int, *, level: float = 0.95
) -> float:
    """Return h of `crossed_interval` where its parts are known, as those of a correlation are from its resamples.

    Parameters
    ----------
    rows, columns, cells
        Squared standard errors: A, B and E.
    n_rows, n_columns
        Number of subjects and of images.
    level
        Coverage.

    Examples
    --------
    >>> round(half_width_of_parts(0.00694444, 0.04398148, 0.01620370, 3, 4), 5)
    0.69064
    """
    df = (n_rows - 1) * (n_columns - 1)
    return _Spread(((rows, n_rows - 1), (columns, n_columns - 1)), cells, df, "").half_width(1 - level)


def crossed_median(
    values: np.ndarray, below: np.ndarray, *, level: float = 0.95, row: str = "subject", column: str = "image"
) -> CrossedInterval:
    """Return Woodruff's interval of a median: order statistics as far from the middle as the share below it is unsure.

    Parameters
    ----------
    values : array of shape (n_values,)
        All values, of which a cell of the table may hold several.
    below : array of shape (n_subjects, n_images)
        Share of the values of each cell that are at most the median; NaN where there is none.
    level, row, column
        As for `crossed_interval`.
    """
    ordered = np.sort(_check_finite(values))
    median = float(np.median(ordered))
    shares = _check_table(below)
    why = _find_lack(shares, row, column, varies=np.ptp(ordered) > 0)
    if why:
        return CrossedInterval(median, None, None, None, f"{NO_INTERVAL}: {why}")
    spread = _find_spread(shares, row, column)
    half = spread.half_width(1 - level)
    words = f"{spread.words} (crossed, Woodruff)"
    return CrossedInterval(median, *_find_order_statistics(ordered, half), half, words)


def images_interval(
    table: np.ndarray,
    *,
    proportion: bool = False,
    level: float = 0.95,
    row: str = "subject",
    column: str = "image",
) -> CrossedInterval:
    """Return the interval of a mean that speaks of these subjects and of images like these: m -+ t(I-1) sqrt B.

    Parameters
    ----------
    table, proportion, level, row, column
        As for `crossed_interval`, two-dimensional. Images that one subject saw count once, those of several subjects
        move together.

    Examples
    --------
    >>> table = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.3, 0.5]])
    >>> found = images_interval(table)
    >>> round(found.low, 6), round(found.high, 6), found.resampled
    (0.105116, 0.494884, '4 images (of these 2 subjects)')
    """
    from scipy.special import stdtrit

    values = _check_table(table)
    mean, n_columns = _average(values), int(np.isfinite(values).any(axis=0).sum())
    words = f"{n_columns} {column}s (of these {len(values)} {row}s)"
    if n_columns < 2:
        return CrossedInterval(mean, None, None, None, f"no interval: one {column}")
    if _is_constant(values):
        return CrossedInterval(mean, None, None, None, f"{NO_INTERVAL}: all values are equal")
    # About the mean of each subject: how much an image weighs, by who saw it, is no spread of values.
    effects = sum_images(values - np.nanmean(values, axis=1, keepdims=True))
    variance = n_columns / (n_columns - 1) * float((effects**2).sum())
    half = float(-stdtrit(n_columns - 1, (1 - level) / 2) * np.sqrt(variance))
    n_cells = int(np.isfinite(values).sum())
    if proportion and min(n_cells / len(values), mean * n_cells, (1 - mean) * n_cells) <= FEW_HITS:
        return CrossedInterval(mean, *logit_limits(mean, half, n_cells), half, words)
    low, high = mean - half, mean + half
    return CrossedInterval(
        mean, max(0.0, low) if proportion else low, min(1.0, high) if proportion else high, half, words
    )


def groups_interval(
    values: np.ndarray,
    groups: Labels,
    *,
    statistic: Statistic = "mean",
    proportion: bool = False,
    level: float = 0.95,
    unit: str = "group",
) -> CrossedInterval:
    """Return the interval of rows that come in a few groups: t with groups - 1 degrees of freedom.

    Parameters
    ----------
    values : array of shape (n_rows,)
    groups : sequence of length n_rows
        Group of each row; groups may differ in size and weigh by it.
    statistic, proportion, level
        As for `crossed_interval`.
    unit
        What the groups are, in one word.

    Examples
    --------
    >>> found = groups_interval(np.array([1.0, 2, 3, 4, 5, 6]), list("aabbcc"))
    >>> round(found.low, 6), round(found.high, 6), found.resampled
    (-1.468275, 8.468275, '3 groups (t)')
    """
    from scipy.special import stdtrit

    check_option("statistic", statistic, ("mean", "median"))
    rows = _check_finite(values)
    codes = np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
    n = int(codes.max()) + 1
    value = float(np.median(rows) if statistic == "median" else rows.mean())
    if n < FEWEST:
        words = f"{NO_INTERVAL}: {_count(n, unit)}, and an interval over {unit}s needs at least {FEWEST}"
        return CrossedInterval(value, None, None, None, words)
    if _is_constant(rows):
        return CrossedInterval(value, None, None, None, f"{NO_INTERVAL}: all values are equal")
    counted = (rows <= value).astype(float) if statistic == "median" else rows
    sums = np.bincount(codes, counted - counted.mean()) / len(rows)
    half = float(-stdtrit(n - 1, (1 - level) / 2) * np.sqrt(n / (n - 1) * (sums**2).sum()))
    if statistic == "median":
        return CrossedInterval(value, *_find_order_statistics(rows, half), half, f"{n} {unit}s (t, Woodruff)")
    if proportion and min(n, value * len(rows), (1 - value) * len(rows)) <= FEW_HITS:
        return CrossedInterval(value, *logit_limits(value, half, len(rows)), half, f"{n} {unit}s (t, logit)")
    return CrossedInterval(value, *_clip(value - half, value + half, proportion), half, f"{n} {unit}s (t)")


def bound_draws(
    values: np.ndarray,
    draws: np.ndarray,
    n_units: int,
    *,
    unit: str = "image",
    ends: tuple[float, float] = (-np.inf, np.inf),
    over_folds: bool = False,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return 95 % limits of scores of which whole units were resampled, and in words what they resample.

    Images and trials are many: the percentiles of the resamples. Groups, runs and sessions are few: Student's t with
    their number - 1 degrees of freedom, and the spread of the resamples, of which n units show sqrt((n - 1) / n) of
    what varies.

    Parameters
    ----------
    values : array of shape (n_scores,)
        Whose squared error is not a plain sum: areas, correlations, means over classes.
    draws : array of shape (n_draws, n_scores)
        The scores in resamples of the units.
    n_units, unit
        Number of units, and what they are in one word.
    ends
        Between which values a score lies at all.
    over_folds
        Whether the scores are of several folds that train each other, so that limits are wider by sqrt 2.

    Returns
    -------
    low, high : arrays of shape (n_scores,)
        NaN where there are fewer than three groups, or nothing varies.
    words
        One of each score; why there is no interval.

    Examples
    --------
    >>> low, high, words = bound_draws(np.array([0.5]), np.array([[0.4], [0.5], [0.6]]), 4, unit="run")
    >>> low.round(3).tolist(), high.round(3).tolist(), words
    ([0.2], [0.8], ['4 runs (t)'])
    """
    from scipy.special import stdtrit

    values = np.asarray(values, dtype=np.float64)
    nothing = np.full(len(values), np.nan)
    if unit in MANY:
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        varies, words = np.full(len(values), True), name_units(unit, n_units)
    elif n_units < FEWEST:
        words = (
            f"{NO_INTERVAL}: {_count(n_units, unit)}, and an interval over {unit}s needs at least {FEWEST}"
        )
        return nothing, nothing, [words] * len(values)
    else:
        spread = np.nanstd(draws, axis=0)
        half = float(-stdtrit(n_units - 1, 0.025) * np.sqrt(n_units / (n_units - 1))) * spread
        low, high = values - half, values + half
        varies, words = spread > 0, f"{n_units} {unit}s (t)"
    if over_folds:
        low, high = widen_limits(low, high, values)
        words += WIDENED
    low, high = (np.where(varies, np.clip(limit, *ends), np.nan) for limit in (low, high))
    return low, high, [words if one else f"{NO_INTERVAL}: all values are equal" for one in varies]


def resampled_interval(
    value: float,
    draws: np.ndarray,
    n_units: int,
    *,
    unit: str = "group",
    ends: tuple[float, float] = (0.0, 1.0),
    over_folds: bool = False,
) -> CrossedInterval:
    """Return the limits of one score as `bound_draws` does; its parameters, without the axis of scores.

    Examples
    --------
    >>> found = resampled_interval(0.5, np.array([0.4, 0.5, 0.6]), 4, unit="run")
    >>> round(found.low, 3), round(found.high, 3), found.resampled
    (0.2, 0.8, '4 runs (t)')
    """
    low, high, words = bound_draws(
        np.array([value]), draws[:, None], n_units, unit=unit, ends=ends, over_folds=over_folds
    )
    if np.isnan(low[0]):
        return CrossedInterval(value, None, None, None, words[0])
    return CrossedInterval(value, float(low[0]), float(high[0]), None, words[0])


def _find_order_statistics(values: np.ndarray, half: float) -> tuple[float, float]:
    """Return the values whose places lie as far from the middle as the share below the median is unsure."""
    ordered, n = np.sort(values), len(values)
    first, last = max(0, int(np.floor((0.5 - half) * n))), min(n - 1, int(np.ceil((0.5 + half) * n)) - 1)
    return float(ordered[first]), float(ordered[last])


def _clip(low: float, high: float, proportion: bool) -> tuple[float, float]:
    return (max(0.0, low), min(1.0, high)) if proportion else (low, high)


def name_units(unit: str, n: int | None = None) -> str:
    """Return what was resampled in words; units that are few by nature are counted.

    Examples
    --------
    >>> name_units("image", 200), name_units("group", 12)
    ('images', '12 groups')
    """
    counted = n is not None and unit not in MANY
    return f"{n} {unit}s" if counted else f"{unit}s"


def interval_of_rows(
    values: np.ndarray,
    *,
    clusters: Labels | None = None,
    subjects: Labels | None = None,
    unit: str = "image",
    statistic: Statistic = "mean",
    proportion: bool = False,
    level: float = 0.95,
    n_boot: int = 10_000,
    seed: int = 0,
    over_folds: bool = False,
) -> CrossedInterval:
    """Return the interval of one value per row: crossed for several subjects, over images or groups for one.

    Parameters
    ----------
    values : array of shape (n_rows,)
    clusters : sequence of length n_rows, optional
        Image of each row, or whatever else `unit` names; rows of one belong together. By default each row is its own.
    subjects : sequence of length n_rows, optional
        Subject of each row, where there are several.
    unit
        What `clusters` are, in one word. Images and trials of one subject are resampled (a bootstrap, or Wilson's
        interval of fewer than 40 hits and misses), groups get Student's t. With ``subject`` the interval speaks of
        subjects and of nothing within them.
    statistic, proportion, level
        As for `crossed_interval`.
    n_boot, seed
        Of the bootstrap.
    over_folds
        Whether the rows come from several folds that train each other: limits are then wider by sqrt 2, and `resampled`
        says so.

    Examples
    --------
    >>> values = np.array([0.1, 0.2, 0.3, 0.4, 0.2, 0.4, 0.3, 0.5, 0.0, 0.3, 0.4, 0.3])
    >>> found = interval_of_rows(values, clusters=list("abcd" * 3), subjects=list("xxxxyyyyzzzz"))
    >>> round(found.half_width, 6), found.resampled
    (0.24381, '3 subjects and 4 images (crossed)')
    """
    rows = _check_finite(values)
    found = _bound_rows(
        rows, clusters, subjects, unit, statistic, proportion=proportion, level=level, n_boot=n_boot, seed=seed
    )  # fmt: skip
    return widen_interval(found, _find_ends(rows, proportion)) if over_folds else found


def interval_without_each(value: float, left_out: np.ndarray, *, over_folds: bool = False) -> CrossedInterval:
    """Return the jackknife interval of identification by one subject.

    Parameters
    ----------
    value, left_out
        As for `braindecode_vis.scoring.uncertainty.jackknife_interval`.
    over_folds
        As for `interval_of_rows`.
    """
    found = jackknife_interval(value, left_out, widen=FOLD_FACTOR if over_folds else 1.0)
    if found is None:
        return CrossedInterval(value, None, None, None, f"{NO_INTERVAL}: {len(left_out)} images")
    return CrossedInterval(value, found.low, found.high, None, JACKKNIFE + WIDENED * over_folds)


def widen_interval(found: CrossedInterval, ends: tuple[float, float]) -> CrossedInterval:
    """Return an interval `FOLD_FACTOR` times as wide about its value, which says so; none stays none.

    Parameters
    ----------
    found
        Of items that were taken for independent.
    ends
        Between which values a score lies at all.
    """
    if found.low is None or found.high is None:
        return found
    low, high = widen_limits(found.low, found.high, found.value, ends)
    half = None if found.half_width is None else FOLD_FACTOR * found.half_width
    return replace(
        found, low=float(low), high=float(high), half_width=half, resampled=found.resampled + WIDENED
    )


def _find_ends(rows: np.ndarray, proportion: bool = False) -> tuple[float, float]:
    """Return what no mean of such rows leaves."""
    return (0.0, 1.0) if proportion else (float(rows.min()), float(rows.max()))


def _bound_rows(
    rows: np.ndarray,
    clusters: Labels | None,
    subjects: Labels | None,
    unit: str,
    statistic: Statistic,
    *,
    proportion: bool,
    level: float,
    n_boot: int,
    seed: int,
) -> CrossedInterval:
    units = (
        np.arange(len(rows)).astype(str) if clusters is None else np.array([str(name) for name in clusters])
    )
    if len(units) != len(rows) or (subjects is not None and len(subjects) != len(rows)):
        raise DataError(f"{len(rows)} values came with another number of {unit}s or subjects.")
    if subjects is not None:
        return _bound_subjects(rows, units, unit, subjects, statistic, proportion=proportion, level=level)
    if unit not in MANY:
        return groups_interval(
            rows, units, statistic=statistic, proportion=proportion, level=level, unit=unit
        )
    n_units, value = (
        len(set(units.tolist())),
        float(np.median(rows) if statistic == "median" else rows.mean()),
    )
    # Wilson's interval counts items as independent, which repetitions of an image are not.
    counted = proportion and bool(np.isin(rows, (0.0, 1.0)).all())
    if counted and (_is_constant(rows) or n_units == len(rows) < WILSON_BELOW):
        # Where all are alike, repetitions add nothing: each image counts once.
        wilson = wilson_interval(round(value * n_units), n_units, level=level)
        return CrossedInterval(value, wilson.low, wilson.high, None, f"{name_units(unit, n_units)} (Wilson)")
    if n_units < 2:
        return CrossedInterval(value, None, None, None, f"{NO_INTERVAL}: one {unit}")
    found = bootstrap_interval(
        rows, clusters=units, statistic=statistic, n_boot=n_boot, level=level, seed=seed
    )
    return CrossedInterval(value, found.low, found.high, None, name_units(unit, n_units))


def _bound_subjects(
    rows: np.ndarray,
    units: np.ndarray,
    unit: str,
    subjects: Labels,
    statistic: Statistic,
    *,
    proportion: bool,
    level: float,
) -> CrossedInterval:
    whose = np.array([str(name) for name in subjects])
    if unit == "subject":
        # Whole subjects alone: the mean of each counts once, whatever its number of rows.
        names = np.unique(whose)
        means = np.array([rows[whose == name].mean() for name in names])
        found = groups_interval(means, names, statistic=statistic, level=level, unit="subject")
        if found.low is not None and found.high is not None:
            low, high = _clip(found.low, found.high, proportion)
            found = replace(found, low=low, high=high)
        return found
    if statistic == "median":
        below = tabulate_cells((rows <= np.median(rows)).astype(float), whose, units)
        return crossed_median(rows, below, level=level, column=unit)
    table = tabulate_cells(rows, whose, units)
    return crossed_interval(table, proportion=proportion, level=level, column=unit)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of first - second over the same items, its interval and a two-sided p-value; None if there is none."""

    mean: float
    interval: CrossedInterval
    p_value: float | None


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    clusters: Labels | None = None,
    subjects: Labels | None = None,
    unit: str = "image",
    population: Population | None = None,
    n_boot: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    over_folds: bool = False,
) -> PairedDifference:
    """Compare two methods on the same rows, in the same order.

    Parameters
    ----------
    first, second : arrays of shape (n_rows,)
        One value per row, for example a hit per trial.
    clusters, subjects, unit, n_boot, level, seed, over_folds
        As for `interval_of_rows`; after folds p is that of a null which is wider by sqrt 2.
    population
        Of whom and what interval and p speak, where there are several subjects. ``both``: of subjects and images like
        these, by the crossed interval and its p, from three subjects on. ``images``: of these subjects and of other
        images, by one sign per image in all subjects. ``subjects``: of other subjects and of these images, by the signs
        of whole subjects, which reach .05 with six. By default the first if there are three subjects, else the second.

    Returns
    -------
    PairedDifference
        Of one subject, p is by one sign per image or group.

    Examples
    --------
    >>> first = np.array([0.3, 0.1, -0.1, 0.4, 0.2, 0.3, 0.1, 0.2, 0.1, 0.2, -0.2, 0.5])
    >>> rows = {"clusters": list("abcd" * 3), "subjects": list("xxxxyyyyzzzz")}
    >>> found = paired_difference(first, np.zeros(12), **rows)
    >>> round(found.p_value, 6), found.interval.resampled
    (0.145901, '3 subjects and 4 images (crossed)')
    >>> paired_difference(first, np.zeros(12), **rows, population="images").p_value
    0.25
    """
    first, second = _check_finite(first), _check_finite(second)
    if len(first) != len(second):
        raise DataError(f"paired values must have the same length, got {len(first)} and {len(second)}.")
    difference, widen = first - second, FOLD_FACTOR if over_folds else 1.0
    whose = None if subjects is None else np.array([str(name) for name in subjects])
    if whose is None or len(set(whose.tolist())) < 2:
        found = interval_of_rows(
            difference,
            clusters=clusters,
            unit=unit,
            level=level,
            n_boot=n_boot,
            seed=seed,
            over_folds=over_folds,
        )
        units = np.arange(len(difference)) if clusters is None else np.array([str(name) for name in clusters])
        codes = np.unique(units, return_inverse=True)[1]
        sums = np.bincount(codes, difference / len(difference))  # the sign of an image flips for all its rows
        return PairedDifference(found.value, found, signs_p(sums, n_draws=n_boot, seed=seed, widen=widen))
    enough = len(set(whose.tolist())) >= FEWEST
    chosen = population or ("subjects" if unit == "subject" else "both" if enough else "images")
    columns = np.arange(len(difference)) if clusters is None or unit == "subject" else clusters
    table = tabulate_cells(difference, whose, columns)
    if chosen == "subjects":
        means = np.nanmean(table, axis=1)
        found = groups_interval(means, np.arange(len(means)), level=level, unit="subject")
        if found.low is not None:
            words = found.resampled.replace("(t)", "(t; signs of whole subjects)")
            found = replace(found, resampled=words)
        p_value: float | None = subject_signs_p(table, n_draws=n_boot, seed=seed, widen=widen)
    elif chosen == "images":
        found = images_interval(table, level=level, column=unit)
        p_value = image_signs_p(table, n_draws=n_boot, seed=seed, widen=widen)
    else:
        found = crossed_interval(table, level=level, column=unit)
        no_p = found.half_width is None and not (found.value == 0 and _is_constant(table))
        p_value = None if no_p else crossed_p(table, widen=widen)
    if over_folds:
        found = widen_interval(found, _find_ends(difference))
    return PairedDifference(found.value, found, p_value)


def crossed_p(table: np.ndarray, *, widen: float = 1.0) -> float:
    """Return the two-sided p of a mean of 0 for subjects and images like these: the alpha at which h(alpha) = |m|.

    Parameters
    ----------
    table : array of shape (n_subjects, n_images), or (n_subjects, n_seeds, n_images)
        Paired differences, as for `crossed_interval`.
    widen
        Factor of the standard error; `FOLD_FACTOR` after K folds.

    Raises
    ------
    DataError
        If there are fewer than three subjects (or seeds) or one image. Without any variation p is 1 if the mean is 0;
        otherwise there is none.

    Examples
    --------
    >>> table = np.array([[0.3, 0.1, -0.1, 0.4], [0.2, 0.3, 0.1, 0.2], [0.1, 0.2, -0.2, 0.5]])
    >>> round(crossed_p(table), 6)
    0.145901
    """
    from scipy.optimize import brentq

    values = _check_table(table)
    mean = _average(values)
    if mean == 0 and _is_constant(values):
        return 1.0
    if why := _find_lack(values, "subject", "image"):
        raise DataError(f"there is no crossed p: {why}.")
    spread, size = _find_spread(values, "subject", "image"), abs(mean) / widen

    def excess(log_alpha: float) -> float:
        return spread.half_width(float(np.exp(log_alpha))) - size

    smallest = np.log(1e-12)
    if excess(smallest) <= 0:
        return 1e-12
    # At alpha = 1 the half-width is 0: either the mean is 0 as well, or the two cross in between.
    return 1.0 if excess(0.0) >= 0 else float(np.exp(brentq(excess, smallest, 0.0, xtol=1e-12)))


def image_signs_p(table: np.ndarray, *, n_draws: int = 10_000, seed: int = 0, widen: float = 1.0) -> float:
    """Return the two-sided p of a mean of 0 for these subjects: one sign per image, the same in all subjects.

    Parameters
    ----------
    table : array of shape (n_subjects, n_images)
        Paired differences; NaN where a subject did not see an image.
    n_draws
        Draws of signs. If there are no more signs than that, all of them are taken.
    seed
        Root seed.
    widen
        Factor by which the null is wider; `FOLD_FACTOR` after K folds.

    Examples
    --------
    >>> table = np.array([[0.3, 0.1, -0.1, 0.4], [0.2, 0.3, 0.1, 0.2], [0.1, 0.2, -0.2, 0.5]])
    >>> image_signs_p(table), subject_signs_p(table)
    (0.25, 0.25)
    """
    return signs_p(sum_images(_check_table(table)), n_draws=n_draws, seed=seed, widen=widen)


def subject_signs_p(table: np.ndarray, *, n_draws: int = 10_000, seed: int = 0, widen: float = 1.0) -> float:
    """Return the two-sided p of a mean of 0 for subjects like these and these images: one sign per subject.

    Its smallest value is 2^(1 - n_subjects), so that .05 needs six subjects (see `smallest_subject_p`).

    Parameters
    ----------
    table, n_draws, seed, widen
        As for `image_signs_p`.
    """
    return signs_p(np.nanmean(_check_table(table), axis=1), n_draws=n_draws, seed=seed, widen=widen)


def smallest_subject_p(n_subjects: int) -> float:
    """Return the smallest p that signs of whole subjects can have.

    Examples
    --------
    >>> smallest_subject_p(5), smallest_subject_p(6)
    (0.0625, 0.03125)
    """
    return float(2.0 ** (1 - n_subjects))


def signs_p(sums: np.ndarray, *, n_draws: int = 10_000, seed: int = 0, widen: float = 1.0) -> float:
    """Return the share of signs with which a sum is at least as far from 0 as the observed one, which is included.

    Parameters
    ----------
    sums : array of shape (n_units,)
        What each unit adds; symmetric about 0 if there is no difference.
    n_draws, seed, widen
        As for `image_signs_p`.
    """
    n, observed = len(sums), float(sums.sum()) / widen
    if 2**n <= n_draws:
        signs = 1.0 - 2.0 * (
            (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        )  # (2^n, n), the observed one first
        return float(compute_p_value(observed, (signs @ sums)[1:], alternative="two-sided"))
    generator = make_generator(seed, "sign-flip")
    step = max(1, (1 << 21) // n)
    null = [
        (generator.integers(0, 2, (min(step, n_draws - start), n), dtype=np.int8) * 2.0 - 1.0) @ sums
        for start in range(0, n_draws, step)
    ]
    return float(compute_p_value(observed, np.concatenate(null), alternative="two-sided"))


def tabulate_cells(values: np.ndarray, subjects: Labels, images: Labels) -> np.ndarray:
    """Return the table of one value per row, shape (n_subjects, n_images), both in the order of their names.

    Rows of one cell are averaged. If some images of a subject have more rows than others, cells are moved so that the
    mean of a table's row is the mean of the subject's rows, as in its score: an image then weighs by its rows.

    Parameters
    ----------
    values : array of shape (n_rows,)
    subjects, images : sequences of length n_rows

    Examples
    --------
    >>> tabulate_cells(np.array([1.0, 0, 1, 0]), list("aabb"), list("xyxx"))
    array([[1. , 0. ],
           [0.5, nan]])
    """
    rows = _check_finite(values)
    whose = np.unique(np.array([str(name) for name in subjects]), return_inverse=True)[1]
    which = np.unique(np.array([str(name) for name in images]), return_inverse=True)[1]
    if not len(whose) == len(which) == len(rows):
        raise DataError(f"{len(rows)} values came with {len(whose)} subjects and {len(which)} images.")
    shape = int(whose.max()) + 1, int(which.max()) + 1
    cells = whose * shape[1] + which
    counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    sums = np.bincount(cells, rows, minlength=shape[0] * shape[1]).reshape(shape)
    with np.errstate(invalid="ignore"):
        table: np.ndarray = sums / counts
    n_seen = (counts > 0).sum(axis=1, keepdims=True)
    usual = counts.sum(axis=1, keepdims=True) / n_seen
    if (counts[counts > 0] != np.broadcast_to(usual, shape)[counts > 0]).any():
        means = sums.sum(axis=1, keepdims=True) / counts.sum(axis=1, keepdims=True)
        table = means + (table - means) * counts / usual
    return table


def sum_images(values: np.ndarray) -> np.ndarray:
    """Return what each image adds to the mean of subject means, shape (n_images,)."""
    seen = np.isfinite(values)
    weights = seen / (seen.sum(axis=1, keepdims=True) * len(values))
    return np.where(seen, values * weights, 0.0).sum(axis=0)


def _find_lack(values: np.ndarray, row: str, column: str, *, varies: bool | None = None) -> str:
    """Return why a table has no interval, or an empty text."""
    factors = [(len(values), row), *([(values.shape[1], "seed")] if values.ndim == 3 else [])]
    for n, name in factors:
        if n < FEWEST:
            return f"{_count(n, name)}, and an interval over {name}s needs at least {FEWEST}"
    if values.shape[-1] < 2:
        return f"one {column}, and an interval over {column}s needs at least 2"
    if not (varies if varies is not None else not _is_constant(values)):
        return "all values are equal"
    return ""


def _find_spread(values: np.ndarray, row: str, column: str) -> _Spread:
    if values.ndim == 3:
        return _find_spread_of_cube(values, row, column)
    n_rows, n_columns = values.shape
    seen = np.isfinite(values)
    means, times = np.nanmean(values, axis=1), seen.sum(axis=0)
    rows = float(means.var(ddof=1)) / n_rows
    shared, own = times == n_rows, times == 1
    if not (shared | own).all():
        return _find_spread_of_gaps(values, row, column)
    n_shared = int(shared.sum())
    if n_shared < 2:
        words = f"{n_rows} {row}s, each with its own {column}s"
        return _Spread(((rows, n_rows - 1),), 0.0, 1, words)
    columns, cells, df = _split_variance(values[:, shared])
    words = f"{n_rows} {row}s and {n_columns} {column}s"
    weight = float((n_shared / seen.sum(axis=1)).mean()) ** 2
    if n_shared < n_columns:
        words += f", {n_shared} of them shared by all"
    return _Spread(((rows, n_rows - 1), (weight * columns, n_shared - 1)), weight * cells, df, words)


def _split_variance(table: np.ndarray) -> tuple[float, float, int]:
    """Return the squared standard error of column means and of cells, and the degrees of freedom of the latter."""
    n_rows, n_columns = table.shape
    rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    df = (n_rows - 1) * (n_columns - 1)
    return float(table.mean(axis=0).var(ddof=1)) / n_columns, float((rest**2).sum()) / df / table.size, df


def _find_spread_of_cube(cube: np.ndarray, row: str, column: str) -> _Spread:
    n_rows, n_seeds, n_columns = cube.shape
    terms = tuple(
        (float(cube.mean(axis=others).var(ddof=1)) / n, n - 1)
        for n, others in ((n_rows, (1, 2)), (n_columns, (0, 1)), (n_seeds, (0, 2)))
    )
    residual = sum(_split_variance(cube.mean(axis=axis))[1] for axis in range(3))
    return _Spread(terms, residual, None, f"{n_rows} {row}s, {n_seeds} seeds and {n_columns} {column}s")


def _find_spread_of_gaps(values: np.ndarray, row: str, column: str) -> _Spread:
    """Return the spread of a table of any pattern, in which an image weighs by who saw it.

    Of a full table these are the formulas of `crossed_interval`. Images that few rows share are in the means of rows
    as well, so that the interval is a little wide where there are many of them.
    """
    seen = np.isfinite(values)
    n_rows, n_columns = values.shape
    counts = seen.sum(axis=1, keepdims=True)
    means = np.nanmean(values, axis=1, keepdims=True)
    weights = seen / (n_rows * counts)
    rows = float(means.var(ddof=1)) / n_rows
    effects = np.where(seen, (values - means) * weights, 0.0).sum(axis=0)  # (n_columns,), their sum is 0
    columns = n_columns / (n_columns - 1) * float((effects**2).sum())
    rest = np.where(seen, values - means, 0.0)
    for _ in range(30):  # rows and columns by turns, which ends at what both together leave
        rest = np.where(seen, rest - rest.sum(axis=0) / seen.sum(axis=0), 0.0)
        rest = np.where(seen, rest - rest.sum(axis=1, keepdims=True) / counts, 0.0)
    df = int(seen.sum()) - n_rows - n_columns + 1
    cells = float((rest**2).sum()) / df * float((weights**2).sum()) if df > 0 else 0.0
    words = f"{n_rows} {row}s and {n_columns} {column}s, each seen by some"
    return _Spread(((rows, n_rows - 1), (columns, n_columns - 1)), cells, max(df, 1), words)


def _average(values: np.ndarray) -> float:
    return float(np.nanmean(values, axis=-1).mean())


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.nanmax(values) - np.nanmin(values) == 0)


def _check_table(table: np.ndarray) -> np.ndarray:
    values = np.asarray(table, dtype=np.float64)
    if values.ndim not in (2, 3) or not values.size:
        raise DataError(
            f"a crossed interval needs a table of subjects by images, got the shape {values.shape}."
        )
    if np.isinf(values).any() or (values.ndim == 3 and np.isnan(values).any()):
        raise DataError("a table of subjects by images holds a value that is not finite.")
    if not np.isfinite(values).any(axis=-1).all():
        place = int(np.flatnonzero(~np.isfinite(values).any(axis=-1).ravel())[0])
        raise DataError(f"row {place} of a table of subjects by images holds no value.")
    return values


def _check_finite(values: np.ndarray) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or not len(rows) or not np.isfinite(rows).all():
        raise DataError(f"an interval needs one finite value per row, got an array of shape {rows.shape}.")
    return rows


def _count(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"
