"""Scores: values per item become one row with mean, 95 % interval, chance and n.

Knows nothing of files: rows are written elsewhere. What a metric is stands in `metric_registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.uncertainty import (
    Interval,
    Labels,
    Statistic,
    bootstrap_interval,
    wilson_interval,
)

WILSON_BELOW = 40  # fewer items than this, and the bootstrap of a proportion is too narrow


def name_units(unit: str, n: int | None = None) -> str:
    """Return what was resampled in words; units that are few by nature are counted.

    Examples
    --------
    >>> name_units("image", 200), name_units("group", 12)
    ('images', '12 groups')
    """
    counted = n is not None and unit not in ("image", "trial")
    return f"{n} {unit}s" if counted else f"{unit}s"


def format_p_value(value: Any, *, in_words: bool = False) -> str:
    """Return a p-value as text, never as zero: no number of permutations shows that it is.

    Whatever prints a p-value, in a terminal, on a page or in Python, does it by this.

    Parameters
    ----------
    value
        None and NaN where there is none.
    in_words
        For sentences: with ``p =`` or ``p <`` before it.

    Examples
    --------
    >>> format_p_value(0.0001), format_p_value(0.0123), format_p_value(None)
    ('< 0.001', '0.012', '–')
    >>> format_p_value(0.0001, in_words=True), format_p_value(0.5, in_words=True)
    ('p < 0.001', 'p = 0.50')
    """
    if value is None or np.isnan(value):
        return "no p" if in_words else "–"
    if value < 0.001:
        return "p < 0.001" if in_words else "< 0.001"
    text = f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
    return f"p = {text}" if in_words else text


def describe_resampled(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Return one sentence on what the intervals of the decoded system resampled; empty where no row says it.

    Examples
    --------
    >>> row = {"method": "decoded", "metric": "top1", "resampled": "12 groups"}
    >>> describe_resampled([row, {**row, "metric": "auc", "resampled": "6 runs"}, {**row, "metric": "top5"}])
    'Intervals resample 12 groups (auc: 6 runs).'
    """
    told: dict[str, list[str]] = {}
    for row in rows:
        words = row.get("resampled") or ""
        if row["method"] == "decoded" and words and row["metric"] not in told.setdefault(words, []):
            told[words].append(row["metric"])
    if not told:
        return ""
    first, *others = sorted(told, key=lambda words: -len(told[words]))
    rest = "; ".join(f"{', '.join(told[words][:4])}: {words}" for words in others)
    return f"Intervals resample {first}{f' ({rest})' if rest else ''}."


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
    unit: str = "image",
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
        As in `braindecode_vis.base.arrays.Score`; `seed` also seeds the bootstrap.
    chance
        ``analytic`` looks the level up with `compute_chance`. For pixel and embedding metrics pass the mean of the
        permutation null, or None where no level is meaningful.
    stimulus_ids : sequence of length n_items, optional
        Stimulus of each item, or whatever else `unit` names; items of one are resampled together.
    unit
        What `stimulus_ids` are, in one word: ``image``, ``trial``, ``group``, ... With ``subject``, and `subjects`
        given, whole subjects are resampled and nothing within them.
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
    import pandas as pd

    values = np.asarray(values_per_item, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"the score {metric!r} of {method!r} needs one finite value per item, got the shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} non-finite value(s)."
        )
    # With several subjects each weighs the same, however many trials it has.
    if statistic == "median":
        value = float(np.median(values))
    elif subjects is None:
        value = float(values.mean())
    else:
        value = float(pd.Series(values).groupby([str(s) for s in subjects]).mean().mean())
    # An error that is 0 for every item is no proportion, so the name decides and not the values alone.
    counts_hits = statistic == "mean" and find_metric(metric).metric.counts_hits
    proportion = counts_hits and bool(np.isin(values, (0.0, 1.0)).all())
    n_stimuli = len(values) if stimulus_ids is None else len({str(i) for i in stimulus_ids})
    # Wilson's interval counts items as independent, which repetitions of a stimulus are not.
    independent = subjects is None and n_stimuli == len(values)
    interval: Interval | None = None
    resampled = ""
    if independent and proportion and (len(values) < WILSON_BELOW or np.ptp(values) == 0):
        interval = wilson_interval(int(values.sum()), len(values))
        resampled = f"{name_units(unit, n_stimuli)} (Wilson)"
    elif unit == "subject" and subjects is not None:
        means = pd.Series(values).groupby([str(s) for s in subjects]).mean().to_numpy()
        if len(means) > 1:
            interval = bootstrap_interval(means, statistic=statistic, n_boot=n_boot, seed=seed)
            resampled = name_units(unit, len(means))
    elif (n_stimuli if subjects is None else len({str(s) for s in subjects})) > 1:
        resampled = name_units(unit, n_stimuli) if subjects is None else f"subjects, then {name_units(unit)}"
        interval = bootstrap_interval(
            values, clusters=stimulus_ids, subjects=subjects, statistic=statistic, n_boot=n_boot, seed=seed
        )
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
        resampled=resampled,
    )
