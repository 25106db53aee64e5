"""Tables of scores put together: over seeds, and beside their noise ceilings.

A seed changes the draw of weights and batches, not the brain data, so the spread over seeds says how stable the method
is and nothing about other people or images; the interval of a single score says that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns

_KEYS = ["method", "metric", "subject", "split", "protocol"]


@dataclass(frozen=True)
class SeedSummary:
    """Mean over seeds, their standard deviation (n - 1), and the t interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    n_seeds: int


def summarise_seeds(values: np.ndarray, *, level: float = 0.95) -> SeedSummary:
    """Return mean, spread and the Student-t interval of the mean over seeds.

    Parameters
    ----------
    values : array of shape (n_seeds,)
        One number per seed, for example the mean over subjects.
    level
        Coverage, if seeds are exchangeable and their numbers normal.

    Raises
    ------
    DataError
        If there are fewer than two seeds: one seed has no spread.

    Examples
    --------
    >>> summary = summarise_seeds(np.array([0.20, 0.22, 0.24]))
    >>> round(summary.mean, 3), round(summary.sd, 3), round(summary.low, 3)
    (0.22, 0.02, 0.17)
    """
    from scipy.stats import t

    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"a spread over seeds needs at least two finite numbers, got {values.tolist()}.")
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    half = float(t.ppf(0.5 + level / 2, len(values) - 1)) * sd / np.sqrt(len(values))
    return SeedSummary(mean, sd, mean - half, mean + half, len(values))


def aggregate_seeds(tables: Sequence[pd.DataFrame], *, level: float = 0.95) -> pd.DataFrame:
    """Return one row per score and one for the mean over subjects, aggregated over the seeds of one configuration.

    Parameters
    ----------
    tables
        Score rows of each seed, with the columns of `braindecode_vis.arrays.SCORE_KEYS`; every table has the same rows.
    level
        Coverage of the interval.

    Returns
    -------
    DataFrame
        Columns `method, metric, subject, split, protocol, value, sd_seeds, ci_low, ci_high, chance, n_seeds,
        n_subjects`. With several subjects, the row of subject ``mean`` is the mean over subjects of each seed,
        and its spread that of these means. Rows that pool the subjects (``all``) do not enter it.

    Raises
    ------
    DataError
        If a seed occurs twice or the tables do not list the same scores.
    """
    if len(tables) < 2:
        raise DataError(f"seeds are aggregated over at least two tables of scores, got {len(tables)}.")
    for number, table in enumerate(tables):
        check_columns(table.columns, [*_KEYS, "value", "chance", "seed"], what=f"score table {number}")
    seeds = [int(table["seed"].iloc[0]) for table in tables]
    if len(set(seeds)) < len(seeds):
        raise DataError(f"the tables come from the seeds {seeds}, of which one repeats; run each seed once.")
    listed = [set(map(tuple, table[_KEYS].astype(str).to_numpy())) for table in tables]
    if any(keys != listed[0] for keys in listed):
        odd = next(keys ^ listed[0] for keys in listed if keys != listed[0])
        raise DataError(f"the seeds do not list the same scores, first difference {sorted(odd)[0]}.")
    rows = pd.concat(tables, ignore_index=True)
    people = rows[rows["subject"] != "all"]
    means = people.groupby([k for k in _KEYS if k != "subject"] + ["seed"], as_index=False, sort=False).agg(
        value=("value", "mean"), chance=("chance", "mean"), n_subjects=("subject", "nunique")
    )
    means = means[means["n_subjects"] > 1].assign(subject="mean")
    summaries = []
    for keys, group in pd.concat([rows.assign(n_subjects=1), means]).groupby(_KEYS, sort=False):
        found = summarise_seeds(group["value"].to_numpy(), level=level)
        chance = group["chance"].astype(float)
        summaries.append(
            {
                **dict(zip(_KEYS, keys, strict=True)), "value": found.mean, "sd_seeds": found.sd, "ci_low": found.low,
                "ci_high": found.high, "chance": None if chance.isna().any() else float(chance.mean()),
                "n_seeds": found.n_seeds, "n_subjects": int(group["n_subjects"].iloc[0]),
            }
        )  # fmt: skip
    return pd.DataFrame(summaries)


def add_ceiling_columns(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table with each score relative to its noise ceiling, NaN where none is known.

    Parameters
    ----------
    scores
        Columns `value`, `chance` and `noise_ceiling`.

    Returns
    -------
    DataFrame
        With two further columns: `of_ceiling` is value / ceiling, and `of_ceiling_above_chance` is
        (value - chance) / (ceiling - chance), which is 0 at chance and 1 at the ceiling.

    Raises
    ------
    DataError
        If a ceiling is zero or lies at its chance level.

    Examples
    --------
    >>> table = pd.DataFrame({"value": [0.5], "chance": [0.1], "noise_ceiling": [0.9]})
    >>> add_ceiling_columns(table)["of_ceiling_above_chance"].round(3).tolist()
    [0.5]
    """
    check_columns(scores.columns, ["value", "chance", "noise_ceiling"], what="the table of scores")
    value, chance, ceiling = (scores[name].astype(float) for name in ("value", "chance", "noise_ceiling"))
    if ((ceiling == 0) | (ceiling == chance)).any():
        raise DataError("a noise ceiling is zero or at chance: the recording cannot show an effect there.")
    return scores.assign(
        of_ceiling=value / ceiling, of_ceiling_above_chance=(value - chance) / (ceiling - chance)
    )
