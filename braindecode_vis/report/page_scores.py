"""The scores of a report as its templates want them: rows with bars, key scores, and words for both.

Owns which numbers share an axis and which score stands for a metric on top of the page. Knows nothing of how a number
was computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from braindecode_vis.metrics.metric_registry import LAST, find_metric
from braindecode_vis.report.figures import compute_axis_limits
from braindecode_vis.report.words import (
    DASH,
    DECODED,
    MetricNote,
    ScoreRow,
    count_decimals,
    describe_method,
    describe_metric,
    format_number,
    format_p_value,
    is_missing,
    sort_methods,
)

N_CARDS = 4


def view_groups(scores: Sequence[ScoreRow], notes: Mapping[str, MetricNote]) -> list[dict[str, Any]]:
    """Return one table group for each metric and protocol: numbers of two protocols never share an axis."""
    keys = dict.fromkeys((row["metric"], row["protocol"]) for row in scores)
    several = len({protocol for _, protocol in keys}) > 1
    groups = []
    for metric, protocol in sorted(keys, key=lambda key: _get_order(key[0])):
        rows = [row for row in scores if (row["metric"], row["protocol"]) == (metric, protocol)]
        marks = ("value", "ci_low", "ci_high", "chance", "noise_ceiling")
        values = [row[key] for row in rows for key in marks]  # everything that is drawn shares one axis
        place, decimals = _make_scale(values), count_decimals(values)
        # Subject, split and seed are named where they differ, and not where they would repeat themselves.
        tags = {key: len({row[key] for row in rows}) > 1 for key in ("subject", "split", "seed")}
        groups.append(
            {
                "metric": metric,
                "note": describe_metric(metric, notes),
                "protocol": protocol if several else "",
                "axis": compute_axis_limits(values),
                "rows": [_view_row(row, place, decimals, tags) for row in sort_methods(rows)],
            }
        )
    return groups


def _make_scale(values: Sequence[Any]) -> Callable[[Any], float | None]:
    low, high = compute_axis_limits(values)

    def place(value: Any) -> float | None:
        """Return the position in percent of the width, with a margin for the dot."""
        return None if is_missing(value) else round(2 + 96 * (float(value) - low) / (high - low), 2)

    return place


def _view_row(
    row: ScoreRow, place: Callable[[Any], float | None], decimals: int, tags: Mapping[str, bool]
) -> dict[str, Any]:
    show = functools.partial(format_number, decimals=decimals)
    words = {"subject": "subject ", "split": "", "seed": "seed "}
    interval = _describe_interval(row, show)
    return {
        "method": row["method"],
        "decoded": row["method"] == DECODED,
        "tag": " · ".join(f"{words[key]}{row[key]}" for key, varies in tags.items() if varies),
        "value": show(_as_float(row["value"])),
        "interval": interval,
        "resampled": _describe_draws(row),
        "chance": format_number(_as_float(row["chance"])),
        "ceiling": show(_as_float(row["noise_ceiling"])),
        "n": format_number(row["n_queries"]),
        "gallery_size": format_number(row["gallery_size"]),
        "p": format_p_value(row.get("p_value")),
        "bar": _view_bar(row, place),
        "words": _describe_bar(row, show, interval),
    }


def _view_bar(row: ScoreRow, place: Callable[[Any], float | None]) -> dict[str, float | None]:
    keys = {
        "value": "value",
        "low": "ci_low",
        "high": "ci_high",
        "chance": "chance",
        "ceiling": "noise_ceiling",
    }
    return {name: place(row[key]) for name, key in keys.items()}


def _describe_interval(row: ScoreRow, show: Callable[[Any], str]) -> str:
    if is_missing(row["ci_low"]) or is_missing(row["ci_high"]):
        return DASH
    return f"{show(_as_float(row['ci_low']))} to {show(_as_float(row['ci_high']))}"


def _describe_draws(row: ScoreRow) -> str:
    words = str(row.get("resampled") or "")
    return words if not words or row["method"] == "shuffled" else f"resampled: {words}"


def _describe_bar(row: ScoreRow, show: Callable[[Any], str], interval: str) -> str:
    parts = [f"{row['method']}: {show(_as_float(row['value']))}"]
    if interval != DASH:
        parts.append(f"95 % interval {interval}")
    if not is_missing(row["chance"]):
        parts.append(f"chance {format_number(_as_float(row['chance']))}")
    if not is_missing(row["noise_ceiling"]):
        parts.append(f"noise ceiling {show(_as_float(row['noise_ceiling']))}")
    return ", ".join(parts)


def _as_float(value: Any) -> float | None:
    return None if is_missing(value) else float(value)


def view_methods(names: Sequence[str], notes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return a sentence for each of these methods that is known, methods of the same sentence together."""
    said: dict[str, list[str]] = {}
    for name in names:
        words, shown = notes.get(name) or describe_method(name), name.replace("_", " ")
        if words and shown not in said.setdefault(words, []):
            said[words].append(shown)
    return [(", ".join(shown), words) for words, shown in said.items()]


# ---- cards
def _get_order(metric: str) -> int:
    """Return the place of a metric; the best of several draws is another protocol and stands behind."""
    found = find_metric(metric)
    return LAST if found.n_draws else found.metric.order


def view_cards(
    scores: Sequence[ScoreRow], headline: Sequence[str], notes: Mapping[str, MetricNote]
) -> list[dict[str, Any]]:
    """Return the key scores: those of `headline`, or up to four well-known ones."""
    decoded = [row for row in scores if row["method"] == DECODED]
    metrics = list(headline)
    if not metrics:
        known = sorted(dict.fromkeys(row["metric"] for row in decoded), key=_get_order)
        metrics = known[:N_CARDS]
    return [_view_card(metric, scores, describe_metric(metric, notes)) for metric in metrics]


def _view_card(metric: str, scores: Sequence[ScoreRow], note: MetricNote) -> dict[str, Any]:
    """Return one key score: that of the one subject, of all subjects together, or the mean over subjects."""
    rows = [row for row in scores if row["metric"] == metric]
    first = next(row for row in rows if row["method"] == DECODED)
    # Numbers of two protocols or conditions never stand in one card.
    rows = [row for row in rows if all(row[key] == first[key] for key in ("protocol", "split"))]
    pooled = [row for row in rows if str(row["subject"]).lower() in ("all", "mean", "group")]
    decoded = [row for row in pooled or rows if row["method"] == DECODED]
    main: dict[str, Any] = dict(decoded[0])
    spread = ""
    if len(decoded) > 1:
        values = [row["value"] for row in decoded if not is_missing(row["value"])]
        # The mean over subjects has no interval here: theirs speak of single subjects.
        chances = {row["chance"] for row in decoded}
        main |= {"value": float(np.mean(values)) if values else None, "ci_low": None, "ci_high": None}
        main |= {"noise_ceiling": None, "chance": chances.pop() if len(chances) == 1 else None}
        if values:
            what = "subjects" if len({row["subject"] for row in decoded}) == len(decoded) else "scores"
            low, high = format_number(min(values)), format_number(max(values))
            spread = f"mean of {len(decoded)} {what}, range {low} to {high}"
    scale = [main[key] for key in ("value", "ci_low", "ci_high", "chance", "noise_ceiling")]
    decimals = count_decimals(scale)
    show = functools.partial(format_number, decimals=decimals)
    interval = _describe_interval(main, show)
    return {
        "metric": metric,
        "space": find_metric(metric).protocol,
        "note": note,
        "value": show(_as_float(main["value"])),
        "interval": interval if interval != DASH else "",
        "spread": spread,
        "chance": "" if is_missing(main["chance"]) else format_number(_as_float(main["chance"])),
        "verdict": _describe_verdict(main, note.direction),
        "control": _find_best_control(pooled or rows, note.direction, show),
        "n": format_number(main["n_queries"]),
        "bar": _view_bar(main, _make_scale(scale)),
        "words": _describe_bar(main, show, interval),
    }


def _describe_verdict(row: Mapping[str, Any], direction: int) -> tuple[str, str]:
    """Return a class name and words on where the 95 % interval lies relative to chance."""
    if any(is_missing(row[key]) for key in ("chance", "ci_low", "ci_high")):
        return "", ""
    if row["ci_low"] <= row["chance"] <= row["ci_high"]:
        return "unsure", "interval includes chance"
    above = row["ci_low"] > row["chance"]
    good = {1: above, -1: not above, 0: True}[direction]
    # The interval may lie on the wrong side of chance, which is no success.
    if direction == -1:
        return ("clear", "better than chance") if good else ("unsure", "worse than chance")
    return ("clear" if good else "unsure"), f"interval {'above' if above else 'below'} chance"


def _find_best_control(rows: Sequence[ScoreRow], direction: int, show: Callable[[Any], str]) -> str:
    """Return the control that comes closest, the oracle (a ceiling) left out, averaged over subjects."""
    values: dict[str, list[float]] = {}
    for row in rows:
        name = str(row["method"])
        if name != DECODED and "oracle" not in name.lower() and not is_missing(row["value"]):
            values.setdefault(name, []).append(float(row["value"]))
    if not values:
        return ""
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    best = max(means, key=lambda name: means[name] * (direction or 1))
    return f"{best.replace('_', ' ')} {show(means[best])}"
