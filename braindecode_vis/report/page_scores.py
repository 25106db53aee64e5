"""The scores of a report for its templates: rows with bars, key scores, and descriptions of both.

Owns which numbers share an axis and which score stands for a metric on top of the page. Knows nothing of how a number
was computed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

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
    is_missing,
    name_rival,
    sort_methods,
    write_within_sentence,
)
from braindecode_vis.scoring.metrics.metric_registry import LAST, find_metric
from braindecode_vis.scoring.score_row import format_p_value, lacks_interval, name_population

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
        place, decimals = make_scale(values), count_decimals(values)
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


def make_scale(values: Sequence[Any]) -> Callable[[Any], float | None]:
    """Return what places numbers on an axis that holds all of `values`."""
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
        "bar": view_bar(row, place),
        "words": _describe_bar(row, show, interval),
    }


def view_bar(row: ScoreRow, place: Callable[[Any], float | None]) -> dict[str, float | None]:
    """Return where the marks of a score lie on an axis of `make_scale`."""
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
    if not words or row["method"] == "shuffled" or lacks_interval(row):
        return words
    population = name_population(words)
    return f"resampled: {words}" + (f"; applies to {population}" if population else "")


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
    """Return the place of a metric; the best of several draws is another protocol and comes after."""
    found = find_metric(metric)
    return LAST if found.n_draws else found.metric.order


def view_cards(
    scores: Sequence[ScoreRow],
    headline: Sequence[str],
    notes: Mapping[str, MetricNote],
    differences: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Return the key scores: those of `headline` or up to four well-known ones, then every metric that does not win."""
    decoded = [row for row in scores if row["method"] == DECODED]
    known = list(dict.fromkeys(row["metric"] for row in decoded))
    known.sort(key=_get_order)
    metrics = list(headline) or known[:N_CARDS]
    cards = [_view_card(metric, scores, describe_metric(metric, notes), differences) for metric in metrics]
    others = [
        _view_card(metric, scores, describe_metric(metric, notes), differences) | {"small": True}
        for metric in known
        if metric not in metrics
    ]
    return cards + [card for card in others if card["verdict"][0] == "unsure"]


def _view_card(
    metric: str, scores: Sequence[ScoreRow], note: MetricNote, differences: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one key score: that of the one subject, of all subjects together, or the mean over subjects."""
    main, rivals, spread = find_main_row(metric, scores)
    scale = [main[key] for key in ("value", "ci_low", "ci_high", "chance", "noise_ceiling")]
    decimals = count_decimals(scale)
    show = functools.partial(format_number, decimals=decimals)
    interval = _describe_interval(main, show)
    verdict = judge(main, rivals, differences, note.direction)
    return {
        "metric": metric,
        "small": False,
        "note": note,
        "value": show(_as_float(main["value"])),
        "interval": interval if interval != DASH else "",
        "spread": spread or (str(main["resampled"]) if lacks_interval(main) else ""),
        "population": "" if is_missing(main["ci_low"]) else name_population(str(main.get("resampled") or "")),
        "chance": "" if is_missing(main["chance"]) else format_number(_as_float(main["chance"])),
        "verdict": (verdict.kind, _write_verdict(verdict, note)),
        "control": _find_best_control(rivals, note.direction, show),
        "n": format_number(main["n_queries"]),
        "bar": view_bar(main, make_scale(scale)),
        "words": _describe_bar(main, show, interval),
    }


def _write_verdict(verdict: Verdict, note: MetricNote) -> str:
    """Return the verdict as a sentence that names the metric where a control is as good."""
    if not verdict.words:
        return ""
    named = f" by {write_within_sentence(note.label)}" if "not " in verdict.words else ""
    return f"{verdict.words[0].upper()}{verdict.words[1:]}{named}."


def find_main_row(metric: str, scores: Sequence[ScoreRow]) -> tuple[dict[str, Any], list[ScoreRow], str]:
    """Return the decoded row that stands for a metric, its controls, and how far subjects lie apart in words.

    The row is that of the one subject, of all subjects together, or else the mean over subjects.
    """
    rows = [row for row in scores if row["metric"] == metric]
    first = next(row for row in rows if row["method"] == DECODED)
    # Numbers of two protocols or conditions never stand in one card.
    rows = [row for row in rows if all(row[key] == first[key] for key in ("protocol", "split"))]
    pooled = [row for row in rows if str(row["subject"]).lower() in ("all", "mean", "group")]
    rows = pooled or rows
    decoded = [row for row in rows if row["method"] == DECODED]
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
    return main, [row for row in rows if row["method"] != DECODED and not _is_part(row["method"])], spread


def _is_part(method: str) -> bool:
    """Return whether a row is the ceiling or a branch of the system under test, and so no rival of it."""
    return bool(re.search(r"oracle|^seen|low.?level|high.?level|fused", method.lower()))


class Verdict(NamedTuple):
    """What the rule of the page says of a score: ``clear``, ``unsure`` or nothing, and why."""

    kind: str
    words: str


def judge(
    row: Mapping[str, Any],
    rivals: Sequence[ScoreRow],
    differences: Sequence[Mapping[str, Any]],
    direction: int,
) -> Verdict:
    """Apply the rule of the page: a score must be better than chance and than every control.

    Parameters
    ----------
    row
        The decoded score.
    rivals
        Scores of the controls of the same metric and subject.
    differences
        Decoded less control with the paired 95 % interval, as in ``differences.json``. Without an entry, as in runs of
        earlier versions, the value of the control must lie outside the interval of the score.
    direction
        1 if higher is better, -1 if lower is; 0 gives no verdict.

    Examples
    --------
    >>> row = {"metric": "ssim", "subject": "01", "split": "test", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6,
    ...        "chance": 0.3}
    >>> judge(row, [{"method": "mean_image", "value": 0.45, "ci_low": 0.4, "ci_high": 0.5}], [], 1).words
    'above chance, but not above the mean image'
    """
    if not direction or any(is_missing(row[key]) for key in ("value", "ci_low", "ci_high")):
        return Verdict("", "no interval, so no verdict" if direction and lacks_interval(row) else "")
    better, sign = ("above" if direction > 0 else "better than"), direction
    worst, best = (row["ci_low"], row["ci_high"]) if sign > 0 else (-row["ci_high"], -row["ci_low"])
    if not is_missing(row["chance"]):
        chance = sign * row["chance"]
        if worst <= chance <= best:
            return Verdict("unsure", "the interval includes chance")
        if best < chance:
            return Verdict("unsure", "the interval is below chance" if sign > 0 else "worse than chance")
    keys = ("metric", "subject", "split")
    paired = {found["control"]: found for found in differences if all(found[key] == row[key] for key in keys)}
    lost = []
    for rival in rivals:
        found = paired.get(rival["method"])
        if found is not None and not is_missing(found["ci_low"]):
            wins = found["ci_low"] > 0 if sign > 0 else found["ci_high"] < 0
        elif is_missing(rival["value"]):
            continue
        elif rival["method"] == "shuffled" and not is_missing(rival["ci_high"]):
            wins = sign * row["value"] > max(sign * rival["ci_low"], sign * rival["ci_high"])
        else:
            wins = worst > sign * rival["value"]
        if not wins:
            lost.append(name_rival(str(rival["method"])))
    above = "" if is_missing(row["chance"]) else f"{better} chance"
    if lost:
        beaten_by = f"not {better} {' or '.join(dict.fromkeys(lost))}"
        return Verdict("unsure", f"{above}, but {beaten_by}" if above else beaten_by)
    if not rivals:
        return Verdict("clear" if above else "", above)
    return Verdict("clear", f"{above} and every control" if above else f"{better} every control")


def _find_best_control(rows: Sequence[ScoreRow], direction: int, show: Callable[[Any], str]) -> str:
    """Return the control that comes closest, averaged over subjects."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if not is_missing(row["value"]):
            values.setdefault(str(row["method"]), []).append(float(row["value"]))
    if not values:
        return ""
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    best = max(means, key=lambda name: means[name] * (direction or 1))
    return f"{best.replace('_', ' ')} {show(means[best])}"
