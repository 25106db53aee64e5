"""Scores: values per item become one row with mean, 95 % interval, chance and n.

Knows nothing of files: rows are written elsewhere. What a metric is, `metric_registry` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.crossed import NO_INTERVAL, interval_of_rows, interval_without_each
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.uncertainty import WIDENED, Labels, Statistic

#: Subject of a row on all subjects together.
POOLED = "all"


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
    """Return in words what the intervals of the decoded system resample, and of what they speak; empty if unknown.

    Examples
    --------
    >>> row = {"method": "decoded", "metric": "top1", "resampled": "12 groups (t)", "subject": "01"}
    >>> describe_resampled([row, {**row, "metric": "auc", "resampled": "6 runs (t)"}])
    'Intervals resample 12 groups (t); auc: 6 runs (t). They apply to this subject and to groups like these.'
    >>> told = describe_resampled([{**row, "subject": "all", "resampled": "5 subjects and 9 images (crossed)"}])
    >>> told.partition(". ")[2]
    'They apply to subjects and images like these.'
    """
    decoded = [row for row in rows if row["method"] == "decoded" and row.get("resampled")]
    pooled = [row for row in decoded if str(row.get("subject")) == POOLED]
    single = [row for row in decoded if str(row.get("subject")) != POOLED]
    sentences = []
    for name, chosen in (("", single), (" of all subjects", pooled)):
        words = _list_by_words([row for row in chosen if not lacks_interval(row)])
        if words:
            population = name_population(words, several=bool(pooled))
            told = f" They apply to {population}." if population else ""
            sentences.append(f"Intervals{name} resample {words}.{told}")
        if lacking := _list_by_words([row for row in chosen if lacks_interval(row)]):
            sentences.append(f"{lacking[:1].upper()}{lacking[1:]}.")
    return " ".join(dict.fromkeys(sentences))


def lacks_interval(row: Mapping[Any, Any]) -> bool:
    """Return whether a row says why it has no interval."""
    return str(row.get("resampled") or "").startswith(NO_INTERVAL)


def name_population(words: str, *, several: bool = False) -> str:
    """Return of whom and what an interval speaks, from the words on what it resampled; empty if they do not say.

    Parameters
    ----------
    words
        As in the column `resampled`.
    several
        Whether there are other subjects than the one of the row.

    Examples
    --------
    >>> name_population("images (Wilson)"), name_population("images", several=True)
    ('this subject and to images like these', 'each subject and to images like these')
    >>> name_population("5 subjects, 3 seeds and 20 images (crossed)")
    'subjects, seeds and images like these'
    >>> name_population("20 images (of these 2 subjects)"), name_population("6 subjects (t; signs of whole subjects)")
    ('these 2 subjects and to images like these', 'subjects like these and to these images')
    """
    if words.startswith(NO_INTERVAL):
        return ""
    if found := re.match(r"\d+ (\w+) \(of these (\d+ subjects)\)", words):
        return f"these {found[2]} and to {found[1]} like these"
    if found := re.match(r"\d+ (\w+)s \(t; signs of whole", words):
        return f"{found[1]}s like these and to these images"
    nouns = re.findall(r"(?:\d|own) ([a-z]+s)\b", words.partition("(")[0])
    if nouns[:1] in (["subjects"], ["seeds"]):
        *first, last = nouns
        who = "" if nouns[0] == "subjects" else "this subject and to "
        return who + (f"{', '.join(first)} and {last}" if first else last) + " like these"
    unit = re.match(r"(?:\d+ )?([a-z]+s)\b", words)
    if unit is None or unit[1] == "subjects":
        return ""
    return f"{'each' if several else 'this'} subject and to {unit[1]} like these"


def _list_by_words(rows: Sequence[Mapping[Any, Any]]) -> str:
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["metric"] not in told.setdefault(row["resampled"], []):
            told[row["resampled"]].append(row["metric"])
    if not told:
        return ""
    widened = WIDENED if all(words.endswith(WIDENED) for words in told) else ""
    told = {words.removesuffix(widened): metrics for words, metrics in told.items()}
    first, *others = sorted(told, key=lambda words: -len(told[words]))
    return "; ".join([first, *(f"{', '.join(told[words][:4])}: {words}" for words in others)]) + widened


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
    differs: bool = False,
    p_value: float | None = None,
    fingerprint: str = "",
    n_boot: int = 10_000,
    left_out: np.ndarray | None = None,
    over_folds: bool = False,
) -> Score:
    """Return the row of one metric: mean (or median) over items, 95 % interval, chance and n.

    The interval of one subject is a bootstrap over stimuli; for hits and misses of fewer than 40 independent items, or
    where all items agree, it is Wilson's; of identification among the items themselves it is the jackknife's. Groups,
    runs and sessions have Student's t with their number - 1 degrees of freedom. Several subjects have a crossed
    interval, which speaks of subjects and images like these. Where there is none, `resampled` says why: fewer than
    three subjects or groups, or one image.

    Parameters
    ----------
    values_per_item : array of shape (n_items,)
        One finite value per item.
    metric, method, protocol, subject, split, seed, noise_ceiling, gallery_size, p_value, fingerprint
        As in `braindecode_vis.base.arrays.Score`; `seed` also seeds the bootstrap.
    chance
        ``analytic`` looks the level up with `compute_chance`. For pixel and embedding metrics pass the mean of the
        permutation null, or None if no level is meaningful.
    stimulus_ids : sequence of length n_items, optional
        Stimulus of each item, or whatever else `unit` names; items of one are resampled together.
    unit
        What `stimulus_ids` are, in one word: ``image``, ``trial``, ``group``, ... With ``subject``, and `subjects`
        given, whole subjects are resampled and nothing within them.
    subjects : sequence of length n_items, optional
        Subject of each item, for a crossed interval; the value is then the mean of subject means.
    statistic
        ``mean``, or ``median`` for ranks.
    differs
        Whether the values are differences of a metric; their limits may lie beyond 0 even where none of them does.
    n_boot
        Number of resamples.
    left_out : array of shape (n_images,), optional
        Of identification, the value without each image, which leaves as query and as distractor; see
        `metrics.identification.leave_out_images`. Taken where images of one subject are resampled.
    over_folds
        Whether the items come from several folds that train each other, so that the interval is wider by sqrt 2.

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
        value = float(pd.Series(values).groupby(np.array([str(s) for s in subjects], object)).mean().mean())
    # An error that is 0 for every item is no proportion, so the name decides and not the values alone.
    counts_hits = statistic == "mean" and not differs and find_metric(metric).metric.counts_hits
    proportion = counts_hits and bool(((values >= 0) & (values <= 1)).all())
    if left_out is not None and subjects is None and unit == "image":
        found = interval_without_each(value, left_out, over_folds=over_folds)
    else:
        found = interval_of_rows(
            values, clusters=stimulus_ids, subjects=subjects, unit=unit, statistic=statistic, proportion=proportion,
            n_boot=n_boot, seed=seed, over_folds=over_folds,
        )  # fmt: skip
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
        ci_low=found.low,
        ci_high=found.high,
        noise_ceiling=noise_ceiling,
        gallery_size=gallery_size,
        p_value=p_value,
        fingerprint=fingerprint,
        resampled=found.resampled,
    )
