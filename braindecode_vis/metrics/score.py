"""Scores: values per item become one row with mean, 95 % interval, chance and n.

Owns the names of the metrics and their chance levels. Knows nothing of files: rows are written elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.arrays import SCORE_KEYS, Score
from braindecode_vis.checks import ConfigError, DataError, suggest
from braindecode_vis.metrics.uncertainty import (
    Interval,
    Labels,
    Statistic,
    bootstrap_interval,
    wilson_interval,
)

#: Metrics whose chance level depends on the data: pass the mean of their permutation null. Two handwritten digits
#: of different people correlate at 0.6, so the chance level of a pixel correlation is not zero.
MEASURED_CHANCE = (
    "pixcorr", "mse", "ssim", "ssim_legacy", "correlation_distance", "cosine_to_target", "accuracy",
    "lpips", "brain_correlation", "rouge1", "rougeL", "meteor_exact", "sentence_similarity",
)  # fmt: skip
#: Metrics whose chance level follows from their definition; {n} stands for a number.
ANALYTIC_CHANCE = (
    "two_way_identification", "two_way_identification_within_class", "{n}_way_identification",
    "{n}_way_identification_within_class", "top{n}", "{n}_way", "mean_rank", "median_rank",
    "relative_median_rank", "mean_reciprocal_rank",
)  # fmt: skip
WILSON_BELOW = 40  # fewer items than this, and the bootstrap of a proportion is too narrow


def compute_chance(metric: str, *, gallery_size: int | None = None) -> float:
    """Return the chance level that follows from the definition of a metric.

    Parameters
    ----------
    metric
        A name as in `ANALYTIC_CHANCE`, for example ``top5``, ``50_way`` or ``two_way_identification``; what
        follows an ``@`` names the protocol and is ignored.
    gallery_size
        Number of candidates, needed for ``top{n}`` and ranks.

    Raises
    ------
    ConfigError
        If the metric is unknown, has no analytic chance level, or needs the gallery size.

    Examples
    --------
    >>> compute_chance("top5", gallery_size=200)
    0.025
    """
    name = metric.split("@")[0]
    if name in MEASURED_CHANCE:
        raise ConfigError(
            f"the chance level of {metric!r} depends on the data: pass `chance` as the mean of its permutation "
            "null, or None where no level is meaningful."
        )
    if re.fullmatch(r"two_way_identification(_within_class)?", name):
        return 0.5
    if match := re.fullmatch(r"(\d+)_way(_identification(_within_class)?)?", name):
        return 1.0 / int(match[1])
    if name == "relative_median_rank":
        return 0.5
    top = re.fullmatch(r"top(\d+)", name)
    if not top and name not in ("mean_rank", "median_rank", "mean_reciprocal_rank"):
        known = [*MEASURED_CHANCE, *ANALYTIC_CHANCE]
        raise ConfigError(
            f"metric {metric!r} is unknown, so its chance level must be given; known are {', '.join(known)}"
            f"{suggest(name, known)}."
        )
    if gallery_size is None:
        raise ConfigError(f"the chance level of {metric!r} needs the gallery size.")
    if top:
        return min(1.0, int(top[1]) / gallery_size)
    if name == "mean_reciprocal_rank":
        return float((1.0 / np.arange(1, gallery_size + 1)).sum() / gallery_size)
    return (gallery_size + 1) / 2


def make_score(
    values_per_item: np.ndarray,
    *,
    metric: str,
    method: str,
    protocol: str,
    subject: str,
    split: str,
    seed: int,
    chance: float | Literal["analytic"] | None = "analytic",
    noise_ceiling: float | None = None,
    gallery_size: int | None = None,
    stimulus_ids: Labels | None = None,
    subjects: Labels | None = None,
    statistic: Statistic = "mean",
    p_value: float | None = None,
    fingerprint: str = "",
    n_boot: int = 10_000,
) -> Score:
    """Return the row of one metric: mean (or median) over items, 95 % interval, chance and n.

    The interval is a bootstrap over stimuli; for hits and misses of fewer than 40 independent items, or where all
    items agree, it is Wilson's. One single item that is no hit or miss has no interval.

    Parameters
    ----------
    values_per_item : array of shape (n_items,)
        One finite value per item.
    metric, method, protocol, subject, split, seed, noise_ceiling, gallery_size, p_value, fingerprint
        As in `braindecode_vis.arrays.Score`; `seed` also seeds the bootstrap.
    chance
        ``analytic`` looks the level up with `compute_chance`. For pixel and embedding metrics pass the mean of the
        permutation null, or None where no level is meaningful.
    stimulus_ids : sequence of length n_items, optional
        Stimulus of each item; items of one stimulus are resampled together.
    subjects : sequence of length n_items, optional
        Subject of each item, for a hierarchical bootstrap; the value is then the mean of subject means.
    statistic
        ``mean``, or ``median`` for ranks.
    n_boot
        Number of resamples.

    Returns
    -------
    Score
        The row.

    Raises
    ------
    DataError
        If there is no item or a value is not finite.
    ConfigError
        If no chance level is known or given.

    Examples
    --------
    >>> score = make_score(np.array([1.0, 0, 1, 1]), metric="top1", method="decoded", protocol="toy",
    ...                    subject="01", split="test", seed=0, gallery_size=4)
    >>> score.value, score.chance, score.n_queries
    (0.75, 0.25, 4)
    """
    values = np.asarray(values_per_item, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"the score {metric!r} of {method!r} needs one finite value per item, got the shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} non-finite value(s)."
        )
    if statistic == "median":
        value = float(np.median(values))
    elif subjects is None:
        value = float(values.mean())
    else:
        value = float(pd.Series(values).groupby([str(s) for s in subjects]).mean().mean())
    proportion = statistic == "mean" and _is_proportion(metric) and bool(np.isin(values, (0.0, 1.0)).all())
    interval = _make_interval(values, stimulus_ids, subjects, statistic, proportion, n_boot, seed)
    return Score(
        method=method,
        metric=metric,
        value=value,
        chance=compute_chance(metric, gallery_size=gallery_size) if chance == "analytic" else chance,
        n_queries=len(values),
        protocol=protocol,
        subject=subject,
        split=split,
        seed=seed,
        ci_low=interval.low if interval else None,
        ci_high=interval.high if interval else None,
        noise_ceiling=noise_ceiling,
        gallery_size=gallery_size,
        p_value=p_value,
        fingerprint=fingerprint,
    )


def scores_to_frame(scores: Iterable[Score]) -> pd.DataFrame:
    """Return one row per score, with the columns of `braindecode_vis.arrays.SCORE_KEYS` in that order."""
    return pd.DataFrame([score.as_row() for score in scores], columns=list(SCORE_KEYS))


def _is_proportion(metric: str) -> bool:
    """Say whether the metric counts hits; an error that is 0 for every item is no proportion."""
    return re.match(r"top\d+|.*_way|accuracy", metric) is not None


def _make_interval(
    values: np.ndarray,
    stimulus_ids: Labels | None,
    subjects: Labels | None,
    statistic: Statistic,
    proportion: bool,
    n_boot: int,
    seed: int,
) -> Interval | None:
    n_stimuli = len(values) if stimulus_ids is None else len({str(i) for i in stimulus_ids})
    independent = subjects is None and n_stimuli == len(values)
    if independent and proportion and (len(values) < WILSON_BELOW or np.ptp(values) == 0):
        return wilson_interval(int(values.sum()), len(values))
    n_units = n_stimuli if subjects is None else len({str(s) for s in subjects})
    if n_units < 2:
        return None
    return bootstrap_interval(
        values, clusters=stimulus_ids, subjects=subjects, statistic=statistic, n_boot=n_boot, seed=seed
    )
