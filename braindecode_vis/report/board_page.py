"""The page of many runs: a table that sorts and filters, curves over settings, pairs with a run of reference.

Owns how rows become text, bars and curves; the looks are those of the report. Like a report it loads nothing, and all
text is escaped. Knows nothing of how a run is read.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from braindecode_vis.report.figures import compute_axis_limits
from braindecode_vis.report.page_gallery import encode_thumbnail
from braindecode_vis.report.page_scores import view_bar
from braindecode_vis.report.words import (
    DASH,
    count_decimals,
    describe_metric,
    format_number,
    format_p_value,
    is_missing,
)
from braindecode_vis.store import json_plain, replace_atomically

THUMBNAIL_PX = 72
MAX_CURVES = 12
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 190, 44, 30  # of a curve, in pixels of its own


@dataclass(frozen=True)
class BoardRow:
    """One run.

    Parameters
    ----------
    name, path, link
        Name on the page, folder, and address of its report from the page (empty without one).
    trouble
        Why it has no scores, in words; empty for a finished run.
    dataset, configuration, encoder, target
        What it decoded, and with what.
    settings
        Values of the settings that differ between the runs, by dotted name.
    scores
        By metric: value, `ci_low`, `ci_high`, `chance`, `kind` and `verdict` (see `page_scores.judge`), ...
    pairs
        By metric the paired difference to the reference with its interval, or a word on why there is none.
    images : pair of uint8 arrays of shape (height, width, 3), optional
        Seen and decoded image of its best item.
    """

    name: str
    path: str
    link: str = ""
    trouble: str = ""
    dataset: str = ""
    configuration: str = ""
    encoder: str = ""
    target: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, Any]] | str = ""
    images: tuple[np.ndarray, np.ndarray] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return everything but the images, as it stands in ``experiment.json``."""
        texts = (
            "name",
            "path",
            "trouble",
            "dataset",
            "configuration",
            "encoder",
            "target",
            "settings",
            "scores",
            "pairs",
        )
        plain: dict[str, Any] = json_plain({key: getattr(self, key) for key in texts})
        return plain


@dataclass(frozen=True)
class Board:
    """All runs, the metrics and settings of the columns, and the name of the run of reference."""

    rows: Sequence[BoardRow]
    metrics: Sequence[str]
    settings: Sequence[str]
    reference: str = ""


def write_board(path: Path, board: Board) -> Path:
    """Write the page; readers see the old file or the new one, never a part."""
    from braindecode_vis.report.page import render_template

    page = render_template(
        "board.html.j2",
        "_board_script.html.j2",
        rows=[_view_row(row, board) for row in board.rows],
        metrics=[describe_metric(metric) for metric in board.metrics],
        settings=[_name_setting(key, board.settings) for key in board.settings],
        reference=board.reference,
        curves=_view_curves(board),
        datasets=sorted({row.dataset for row in board.rows if row.dataset}),
        encoders=sorted({row.encoder for row in board.rows if row.encoder}),
        n_troubled=sum(bool(row.trouble) for row in board.rows),
        has_images=any(row.images for row in board.rows),
        dash=DASH,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _name_setting(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted name, or all of it where two end alike."""
    short = key.rsplit(".", 1)[-1]
    return key if sum(other.rsplit(".", 1)[-1] == short for other in keys) > 1 else short.replace("_", " ")


def _view_row(row: BoardRow, board: Board) -> dict[str, Any]:
    cells: list[dict[str, Any] | None] = []
    for metric in board.metrics:
        score, known = row.scores.get(metric), [r.scores[metric] for r in board.rows if metric in r.scores]
        if score is None:
            cells.append(None)
            continue
        marks = [other[key] for other in known for key in ("value", "ci_low", "ci_high", "chance")]
        show = functools.partial(format_number, decimals=count_decimals(marks))
        interval = (
            ""
            if is_missing(score["ci_low"])
            else f"{show(float(score['ci_low']))} to {show(float(score['ci_high']))}"
        )
        chance = "" if is_missing(score["chance"]) else show(float(score["chance"]))
        cells.append(
            {
                "value": DASH if is_missing(score["value"]) else show(float(score["value"])),
                "sort": "" if is_missing(score["value"]) else float(score["value"]),
                "interval": interval,
                "chance": chance,
                "kind": score["kind"],
                "verdict": score["verdict"],
                "bar": view_bar({**score, "noise_ceiling": None}, marks),
                "words": f"{show(float(score['value'])) if not is_missing(score['value']) else DASH}"
                + (f", 95 % interval {interval}" if interval else "") + (f", chance {chance}" if chance else ""),
                "pair": _describe_pair(row.pairs, metric, show),
            }
        )  # fmt: skip
    return {
        "row": row,
        "href": quote(os.fsencode(row.link)),
        "cells": cells,
        "pair": row.pairs if isinstance(row.pairs, str) else "",
        "settings": [_show(row.settings.get(key)) for key in board.settings],
        "kinds": " ".join(sorted({str(score["kind"]) for score in row.scores.values()})),
        "images": None
        if row.images is None
        else [encode_thumbnail(image, THUMBNAIL_PX) for image in row.images],
    }


def _show(value: Any) -> str:
    if isinstance(value, float) and not is_missing(value):
        return f"{value:g}"
    return DASH if value is None else str(value)


def _describe_pair(pairs: Mapping[str, Mapping[str, Any]] | str, metric: str, show: Any) -> str:
    found = None if isinstance(pairs, str) else pairs.get(metric)
    if found is None:
        return ""
    sign = "+" if found["difference"] > 0 else ""
    low, high = show(float(found["ci_low"])), show(float(found["ci_high"]))
    return f"{sign}{show(float(found['difference']))} ({low} to {high}; p {format_p_value(found['p_value'])})"


# --- curves -------------------------------------------------------------------------------------------------------


def _view_curves(board: Board) -> list[dict[str, Any]]:
    """Return a small plot for each setting and metric: value against number, or dots beside names."""
    curves = []
    for key in board.settings:
        for metric in board.metrics[:2]:
            found = [
                (row.settings.get(key), row.scores[metric]) for row in board.rows
                if metric in row.scores and not is_missing(row.scores[metric]["value"])
                and row.settings.get(key) is not None  # a component that this run does not have
            ]  # fmt: skip
            if len({str(value) for value, _ in found}) > 1:
                curves.append(_view_curve(key, metric, found))
    return curves[:MAX_CURVES]


def _view_curve(key: str, metric: str, found: Sequence[tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in found)
    names: list[Any] = sorted({value if numeric else _show(value) for value, _ in found})
    logarithmic = numeric and names[0] > 0 and names[-1] / names[0] >= 50

    def place(value: Any) -> float:
        if not numeric:
            return float(names.index(_show(value)))
        return math.log10(value) if logarithmic else float(value)

    at = [place(value) for value, _ in found]
    low, high = min(at), max(at)
    bottom, top = compute_axis_limits(
        [score[k] for _, score in found for k in ("value", "ci_low", "ci_high", "chance")]
    )

    def x(value: float) -> float:
        return round(LEFT + 14 + (WIDTH - LEFT - 34) * (value - low) / (high - low), 1)

    def y(value: float) -> float:
        return round(8 + (HEIGHT - BOTTOM - 14) * (top - value) / (top - bottom), 1)

    dots = [
        {
            "x": x(where), "y": y(score["value"]),
            "low": None if is_missing(score["ci_low"]) else y(score["ci_low"]),
            "high": None if is_missing(score["ci_high"]) else y(score["ci_high"]),
        }
        for where, (_, score) in zip(at, found, strict=True)
    ]  # fmt: skip
    means = {where: float(np.mean([s["value"] for w, (_, s) in zip(at, found, strict=True) if w == where]))
             for where in sorted(set(at))}  # fmt: skip
    chances = {score["chance"] for _, score in found if not is_missing(score["chance"])}
    ticks = names if len(names) <= 6 else [names[0], names[len(names) // 2], names[-1]]
    label, setting = describe_metric(metric).label, key
    told = "; ".join(f"{_show(name)}: {format_number(means[place(name)])}" for name in ticks)
    return {
        "title": f"{label} by {setting}",
        "words": f"{label} by {setting}, mean over runs of each value: {told}",
        "dots": dots,
        "line": " ".join(f"{x(where)},{y(value)}" for where, value in means.items()) if numeric else "",
        "chance": y(chances.pop()) if len(chances) == 1 else None,
        "ticks": [
            {
                "x": x(place(name)),
                "text": _show(name),
                "anchor": "middle" if x(place(name)) < WIDTH - 60 else "end",
            }
            for name in ticks
        ],
        "levels": [
            {"y": y(level), "text": format_number(float(level))}
            for level in (bottom, (bottom + top) / 2, top)
        ],
        "size": (WIDTH, HEIGHT, LEFT, BOTTOM),
        "logarithmic": logarithmic,
    }
