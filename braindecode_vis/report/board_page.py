"""The page of many runs: a table with sorting and filters, curves over settings, comparisons with a reference run.

Owns how rows become text, bars and curves; the looks are those of the report. Like a report it loads nothing, and all
text is escaped. Knows nothing of how a run is read.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from braindecode_vis.base.store import json_plain, replace_atomically
from braindecode_vis.report.figures import compute_axis_limits
from braindecode_vis.report.page_gallery import encode_thumbnail
from braindecode_vis.report.page_scores import make_scale, view_bar
from braindecode_vis.report.words import (
    DASH,
    count_decimals,
    describe_metric,
    format_number,
    is_missing,
)
from braindecode_vis.scoring.score_row import format_p_value

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
        """Return everything but the images, as it is in ``experiment.json``."""
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
class Validation:
    """A score of training trials that a fit has not learnt from.

    Parameters
    ----------
    name
        In words.
    value
        Mean over folds.
    direction
        1 where more is better, -1 for errors.
    basis
        What it was computed on; only scores of one basis are compared.
    n_images
        Held-out images that were distinguished; None for errors.
    """

    name: str
    value: float
    direction: int
    basis: str
    n_images: int | None = None


@dataclass(frozen=True)
class PooledSetting:
    """One setting over its subjects and seeds.

    Parameters
    ----------
    settings
        Values of the settings that differ between the runs.
    runs
        Names of its runs.
    scores
        By metric: `value`, `ci_low`, `ci_high`, `chance`, `n_subjects`, `n_seeds`, `n_items`, and `resampled` in words.
    validation
        Mean over its subjects and seeds; None if a run has none.
    """

    settings: Mapping[str, Any]
    runs: Sequence[str]
    scores: Mapping[str, Mapping[str, Any]]
    validation: Validation | None


@dataclass(frozen=True)
class SettingsTable:
    """All settings, and which of them validation chooses.

    Parameters
    ----------
    keys
        Settings that differ, besides seed and subjects.
    rows
        One per setting.
    best
        Place of the one with the best validation score; None if none is called best.
    reason
        How it was chosen, or why none was and what to do.
    """

    keys: Sequence[str]
    rows: Sequence[PooledSetting]
    best: int | None
    reason: str


@dataclass(frozen=True)
class Board:
    """All runs, the metrics and settings of the columns, the name of the run of reference, and settings pooled."""

    rows: Sequence[BoardRow]
    metrics: Sequence[str]
    settings: Sequence[str]
    reference: str = ""
    pooled: SettingsTable | None = None


def write_board(path: Path, board: Board) -> Path:
    """Write the page; readers see the old file or the new one, never a part."""
    from braindecode_vis.report.page import render_template

    columns = _make_columns(board.metrics, board.rows)
    page = render_template(
        "board.html.j2",
        "_board_script.html.j2",
        rows=[_view_row(row, board, columns) for row in board.rows],
        metrics=[describe_metric(metric) for metric in board.metrics],
        settings=[_name_setting(key, board.settings) for key in board.settings],
        reference=board.reference,
        curves=_view_curves(board),
        datasets=sorted({row.dataset for row in board.rows if row.dataset}),
        encoders=sorted({row.encoder for row in board.rows if row.encoder}),
        n_troubled=sum(bool(row.trouble) for row in board.rows),
        has_images=any(row.images for row in board.rows),
        pooled=None if board.pooled is None else _view_pooled(board.pooled, board.metrics),
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


@dataclass(frozen=True)
class _Column:
    """How all scores of one metric are written, with as many decimals, and where they lie on one axis."""

    show: Callable[[float], str]
    place: Callable[[Any], float | None]


def _make_columns(
    metrics: Sequence[str], rows: Sequence[BoardRow] | Sequence[PooledSetting]
) -> dict[str, _Column]:
    columns = {}
    for metric in metrics:
        known = [row.scores[metric] for row in rows if metric in row.scores]
        marks = [score[key] for score in known for key in ("value", "ci_low", "ci_high", "chance")]
        show = functools.partial(format_number, decimals=count_decimals(marks))
        columns[metric] = _Column(show, make_scale(marks))
    return columns


def _view_row(row: BoardRow, board: Board, columns: Mapping[str, _Column]) -> dict[str, Any]:
    cells: list[dict[str, Any] | None] = []
    for metric, column in columns.items():
        score = row.scores.get(metric)
        if score is None:
            cells.append(None)
            continue
        pair = _describe_pair(row.pairs, metric, column.show)
        cells.append(
            _view_score(score, column) | {"kind": score["kind"], "verdict": score["verdict"], "pair": pair}
        )
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
    limits, p = "no interval", format_p_value(found["p_value"], in_words=True)
    if not is_missing(found["ci_low"]):
        limits = f"{show(float(found['ci_low']))} to {show(float(found['ci_high']))}"
    return f"{sign}{show(float(found['difference']))} ({limits}; {p})"


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


@dataclass(frozen=True)
class _Spread:
    """Values along an axis, numbers by their size or its logarithm where that spans much, and others by their name."""

    names: Sequence[Any]
    numeric: bool
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Spread:
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        names: list[Any] = sorted({value if numeric else _show(value) for value in values})
        return cls(names, numeric, numeric and names[0] > 0 and names[-1] / names[0] >= 50)

    def place(self, value: Any) -> float:
        if not self.numeric:
            return float(self.names.index(_show(value)))
        return math.log10(value) if self.logarithmic else float(value)


def _view_curve(key: str, metric: str, found: Sequence[tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
    spread = _Spread.of([value for value, _ in found])
    names, place = spread.names, spread.place
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
        "line": " ".join(f"{x(where)},{y(value)}" for where, value in means.items())
        if spread.numeric
        else "",
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
        "logarithmic": spread.logarithmic,
    }


# --- settings over subjects and seeds -----------------------------------------------------------------------------

#: Height of an axis of the parallel coordinates, in pixels; they lie one below the other, so that they fit a phone.
AXIS_HEIGHT, AXIS_Y = 74, 34
MAX_SCORE_AXES = 3


def _view_pooled(table: SettingsTable, metrics: Sequence[str]) -> dict[str, Any] | None:
    """Return the table of settings and their parallel coordinates; None if no run is repeated or compared."""
    if sum(len(row.runs) for row in table.rows) < 2:
        return None
    shown = [metric for metric in metrics if any(metric in row.scores for row in table.rows)]
    validated = [row.validation for row in table.rows if row.validation is not None]
    decimals = count_decimals([one.value for one in validated])
    columns = _make_columns(shown, table.rows)
    rows = []
    for place, row in enumerate(table.rows):
        cells = [
            _view_score(row.scores[metric], column) if metric in row.scores else None
            for metric, column in columns.items()
        ]
        rows.append(
            {
                "place": place, "n_runs": len(row.runs), "best": place == table.best, "cells": cells,
                "name": ", ".join(f"{_name_setting(key, table.keys)} {_show(row.settings[key])}" for key in table.keys),
                "settings": [_show(row.settings[key]) for key in table.keys],
                "validation": None if row.validation is None else {
                    "value": format_number(row.validation.value, decimals), "name": row.validation.name,
                    "sort": row.validation.value, "n_images": row.validation.n_images,
                },
            }
        )  # fmt: skip
    return {
        "rows": rows,
        "is_chosen": table.best is not None,
        "reason": table.reason,
        "settings": [_name_setting(key, table.keys) for key in table.keys],
        "metrics": [describe_metric(metric) for metric in shown],
        "direction": validated[0].direction if len({one.direction for one in validated}) == 1 else 1,
        "parallel": _view_parallel(table, shown),
    }


def _view_score(score: Mapping[str, Any], column: _Column) -> dict[str, Any]:
    """Return a cell."""
    show = column.show
    interval = (
        "" if is_missing(score["ci_low"]) else f"{show(float(score['ci_low']))} to {show(float(score['ci_high']))}"
    )  # fmt: skip
    value = DASH if is_missing(score["value"]) else show(float(score["value"]))
    chance = "" if is_missing(score["chance"]) else show(float(score["chance"]))
    return {
        "value": value, "sort": "" if is_missing(score["value"]) else float(score["value"]), "interval": interval,
        "chance": chance, "resampled": score.get("resampled", ""),
        "bar": view_bar({**score, "noise_ceiling": None}, column.place),
        "words": value + (f", 95 % interval {interval}" if interval else "") + (f", chance {chance}" if chance else ""),
    }  # fmt: skip


def _view_parallel(table: SettingsTable, metrics: Sequence[str]) -> dict[str, Any] | None:
    """Return axes that lie one below the other, and for each setting a line through them; None of a single setting."""
    if len(table.rows) < 2 or not table.keys:
        return None
    axes = [
        _place_on_axis(_name_setting(key, table.keys), [row.settings[key] for row in table.rows])
        for key in table.keys
    ]
    scores = [metric for metric in metrics if all(metric in row.scores for row in table.rows)][
        :MAX_SCORE_AXES
    ]
    validated = [row.validation for row in table.rows if row.validation is not None]
    if len(validated) == len(table.rows) and len({one.basis for one in validated}) == 1:
        title = f"validation: {validated[0].name}"
        axes.append(_place_on_axis(title, [one.value for one in validated], validated[0].direction))
    for metric in scores:
        note = describe_metric(metric)
        values = [row.scores[metric]["value"] for row in table.rows]
        axes.append(_place_on_axis(f"test: {note.label}", values, note.direction))
    if not scores:
        return None
    shares = axes[-len(scores)]["at"]  # of the first score
    lines = [
        {
            "place": row, "best": row == table.best, "share": round(shares[row]),
            "points": " ".join(
                f"{axis['at'][row]:.1f},{AXIS_Y + number * AXIS_HEIGHT}" for number, axis in enumerate(axes)
            ),
        }
        for row in range(len(table.rows))
    ]  # fmt: skip
    lines.sort(key=lambda line: (line["best"], line["share"]))  # the better ones on top
    for number, axis in enumerate(axes):
        axis["y"] = AXIS_Y + number * AXIS_HEIGHT
    titles = ", ".join(axis["title"] for axis in axes)
    return {
        "axes": axes, "lines": lines, "height": AXIS_HEIGHT * len(axes),
        "words": f"Parallel coordinates of {len(lines)} settings over {titles}; the table below holds the numbers",
    }  # fmt: skip


def _place_on_axis(title: str, values: Sequence[Any], direction: int = 1) -> dict[str, Any]:
    """Return where values are on an axis, in percent, and its ticks; better scores are to the right."""
    spread = _Spread.of(values)
    names, low, high = spread.names, spread.place(spread.names[0]), spread.place(spread.names[-1])

    def place(value: Any) -> float:
        share = 50.0 if high == low else 100 * (spread.place(value) - low) / (high - low)
        return share if direction >= 0 else 100 - share

    inner = names[1:-1] if len(names) <= 6 else [] if spread.numeric else [names[len(names) // 2]]
    ticks = [names[0]]
    for name in [*inner, *names[-1:]] if len(names) > 1 else []:
        # Those that would run into a neighbour or the end are left out; the line crosses there all the same.
        free = min(abs(place(name) - place(other)) for other in (ticks[-1], names[-1]))
        if name == names[-1] or free > 20:
            ticks.append(name)
    most = 60 // max(1, len(ticks))  # letters, so that they do not run into each other on a phone
    texts = [format_number(name) if isinstance(name, float) else str(name) for name in ticks]
    return {
        "title": title + (", lower is better" if direction < 0 else ""),
        "at": [place(value) for value in values],
        "ticks": [
            {
                "x": place(name),
                "anchor": "start" if place(name) < 15 else "end" if place(name) > 85 else "middle",
                "text": text if len(text) <= most else f"{text[: most - 1]}…",
            }
            for name, text in zip(ticks, texts, strict=True)
        ],
    }
