"""One self-contained `report.html` per run: plain data in, one file out.

Owns what a report says and in which order; the looks are in `templates/`, the pictures in `figures.py` and
`gallery.py`. The page loads nothing: images and figures are embedded, and a content security policy forbids
the browser to fetch anything or to run a script other than the page's own. All text is escaped. Knows nothing
of how a number was computed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import SCORE_KEYS
from braindecode_vis.checks import DataError, check_columns
from braindecode_vis.report import figures
from braindecode_vis.report.figures import (
    DECODED,
    MetricNote,
    ScoreRow,
    describe_metric,
    format_number,
    is_missing,
)
from braindecode_vis.report.gallery import (
    PIXELATED_BELOW,
    SEEN,
    GalleryContent,
    describe_rule,
    encode_thumbnail,
    make_thumbnails,
)
from braindecode_vis.store import replace_atomically

TEMPLATES = Path(__file__).parent / "templates"
MAX_TABLE_ROWS = 200
N_CARDS = 4
_CARD_ORDER = ("top1", "two_way", "within_class", "pixcorr", "ssim", "mse", "median_rank")


@dataclass(frozen=True)
class RankContent:
    """Ranks of the seen images in an explicit gallery.

    Parameters
    ----------
    ranks : array of shape (n_queries,)
        From 1 (best) to `gallery_size`; ties may share a fractional rank.
    gallery_size
        Number of candidates.
    caption
        One or two sentences on queries and gallery.
    """

    ranks: np.ndarray
    gallery_size: int
    caption: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", figures.check_ranks(self.ranks, self.gallery_size))


@dataclass(frozen=True)
class ExtraSection:
    """A further analysis: text, a figure, a table, or all three.

    Parameters
    ----------
    title
        Heading.
    caption
        Text below the heading; it is escaped unless it is `markupsafe.Markup`.
    figure
        PNG, JPEG or WebP bytes, or SVG as text or bytes.
    figure_dark
        The same for readers in dark mode; without it the figure sits on a light sheet.
    alt
        What the figure shows, in words, for readers who do not see it.
    table
        A data frame or a list of rows (dicts); long ones are cut with a note.
    """

    title: str
    caption: str = ""
    figure: bytes | str | None = None
    figure_dark: bytes | str | None = None
    alt: str = ""
    table: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report says.

    Parameters
    ----------
    title
        Headline of the page.
    dataset
        Name of the data set.
    description
        One paragraph in plain words.
    protocol
        Data set, split, averaging and gallery: a text, or a mapping of such labels to texts.
    facts
        Label and value of what is known of the data: number of trials, voxels or channels, licence.
    scores
        Rows with the keys of `braindecode_vis.arrays.SCORE_KEYS`; ``decoded`` is the system under test.
    ranks
        Ranks of the seen images, if retrieval ran.
    gallery
        Images, if there are any.
    sections
        Further analyses, in order.
    warnings
        What a reader must know before any number, for example that the design is blocked.
    provenance
        Nested mapping: config, seed, versions, git revision, input hashes, fingerprints.
    command
        The exact command that made the report.
    headline
        Metrics of the cards on top, in order; up to four well-known ones by default.
    metric_notes
        Words for metrics, where those of `describe_metric` do not fit; by metric name.
    method_notes
        One sentence for each control whose name does not speak for itself; by method name.

    Raises
    ------
    DataError
        If a score row lacks a key or a metric of `headline` has no decoded score.
    """

    title: str
    dataset: str
    description: str = ""
    protocol: str | Mapping[str, str] = ""
    facts: Sequence[tuple[str, Any]] = ()
    scores: Sequence[ScoreRow] = ()
    ranks: RankContent | None = None
    gallery: GalleryContent | None = None
    sections: Sequence[ExtraSection] = ()
    warnings: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    headline: Sequence[str] = ()
    metric_notes: Mapping[str, MetricNote] = field(default_factory=dict)
    method_notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.scores):
            required = [key for key in SCORE_KEYS if key not in ("p_value", "fingerprint")]
            check_columns(row, required, what=f"score row {number}")
        decoded = {row["metric"] for row in self.scores if row["method"] == DECODED}
        for metric in self.headline:
            if metric not in decoded:
                raise DataError(
                    f"the headline names {metric!r}, but the decoded scores are {sorted(decoded)}."
                )


def write_report(path: str | Path, content: ReportContent) -> Path:
    """Write the report as one HTML file; readers see the old file or the new one, never a part.

    Parameters
    ----------
    path
        The file to write; its folder is made if needed.
    content
        What to say.

    Returns
    -------
    path
        The file written.
    """
    target, page = Path(path), render_report(content)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def render_report(content: ReportContent) -> str:
    """Return the report as HTML text; the same content gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters.update(number=format_number, p_value=figures.format_p_value)
    script = env.get_template("_script.html.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    gallery = _view_gallery(content.gallery) if content.gallery is not None else None
    return env.get_template("page.html.j2").render(
        content=content,
        protocol=content.protocol if isinstance(content.protocol, Mapping) else {},
        protocol_text=content.protocol if isinstance(content.protocol, str) else "",
        cards=_view_cards(content),
        groups=_view_groups(content),
        methods=_view_methods(content),
        ranks=_view_ranks(content.ranks) if content.ranks is not None else None,
        gallery=gallery,
        sections=[_view_section(section, number) for number, section in enumerate(content.sections)],
        script=Markup(script),
        script_digest=digest,
        dash=figures.DASH,
    )


# ---- scores
def _view_groups(content: ReportContent) -> list[dict[str, Any]]:
    """Return one table group for each metric and protocol: numbers of two protocols never share an axis."""
    keys = dict.fromkeys((row["metric"], row["protocol"]) for row in content.scores)
    several = len({protocol for _, protocol in keys}) > 1
    groups = []
    for metric, protocol in sorted(keys, key=lambda key: _card_rank(key[0])):
        rows = [row for row in content.scores if (row["metric"], row["protocol"]) == (metric, protocol)]
        marks = ("value", "ci_low", "ci_high", "chance", "noise_ceiling")
        values = [row[key] for row in rows for key in marks]
        place, decimals = _make_scale(values), figures.count_decimals(values)
        tags = {key: len({row[key] for row in rows}) > 1 for key in ("subject", "split", "seed")}
        groups.append(
            {
                "metric": metric,
                "note": describe_metric(metric, content.metric_notes),
                "protocol": protocol if several else "",
                "axis": figures.compute_axis_limits(values),
                "rows": [_view_row(row, place, decimals, tags) for row in figures.sort_methods(rows)],
            }
        )
    return groups


def _make_scale(values: Sequence[Any]) -> Callable[[Any], float | None]:
    low, high = figures.compute_axis_limits(values)

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
        "chance": format_number(_as_float(row["chance"])),
        "ceiling": show(_as_float(row["noise_ceiling"])),
        "n": format_number(row["n_queries"]),
        "gallery_size": format_number(row["gallery_size"]),
        "p": figures.format_p_value(row.get("p_value")),
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
        return figures.DASH
    return f"{show(_as_float(row['ci_low']))} to {show(_as_float(row['ci_high']))}"


def _describe_bar(row: ScoreRow, show: Callable[[Any], str], interval: str) -> str:
    parts = [f"{row['method']}: {show(_as_float(row['value']))}"]
    if interval != figures.DASH:
        parts.append(f"95 % interval {interval}")
    if not is_missing(row["chance"]):
        parts.append(f"chance {format_number(_as_float(row['chance']))}")
    if not is_missing(row["noise_ceiling"]):
        parts.append(f"noise ceiling {show(_as_float(row['noise_ceiling']))}")
    return ", ".join(parts)


def _as_float(value: Any) -> float | None:
    return None if is_missing(value) else float(value)


def _view_methods(content: ReportContent) -> list[tuple[str, str]]:
    """Return a sentence for each method and gallery row that appears and is known."""
    names = [row["method"] for row in figures.sort_methods(content.scores)]
    notes = dict(content.method_notes)
    if content.gallery is not None:
        names += list(content.gallery.rows)
        notes |= content.gallery.row_notes
    said: dict[str, list[str]] = {}
    for name in names:
        words, shown = notes.get(name) or figures.describe_method(name), name.replace("_", " ")
        if words and shown not in said.setdefault(words, []):
            said[words].append(shown)
    return [(", ".join(shown), words) for words, shown in said.items()]


# ---- cards
def _card_rank(metric: str) -> int:
    base = metric.lower().replace("-", "_")
    return next((i for i, start in enumerate(_CARD_ORDER) if base.startswith(start)), len(_CARD_ORDER))


def _view_cards(content: ReportContent) -> list[dict[str, Any]]:
    decoded = [row for row in content.scores if row["method"] == DECODED]
    metrics = list(content.headline)
    if not metrics:
        known = sorted(dict.fromkeys(row["metric"] for row in decoded), key=_card_rank)
        metrics = known[:N_CARDS]
    return [_view_card(metric, content) for metric in metrics]


def _view_card(metric: str, content: ReportContent) -> dict[str, Any]:
    """Return one key score: that of the one subject, of all subjects together, or the mean over subjects."""
    rows = [row for row in content.scores if row["metric"] == metric]
    first = next(row for row in rows if row["method"] == DECODED)
    rows = [row for row in rows if all(row[key] == first[key] for key in ("protocol", "split"))]
    pooled = [row for row in rows if str(row["subject"]).lower() in ("all", "mean", "group")]
    decoded = [row for row in pooled or rows if row["method"] == DECODED]
    note = describe_metric(metric, content.metric_notes)
    main: dict[str, Any] = dict(decoded[0])
    spread = ""
    if len(decoded) > 1:
        values = [row["value"] for row in decoded if not is_missing(row["value"])]
        chances = {row["chance"] for row in decoded}
        main |= {"value": float(np.mean(values)) if values else None, "ci_low": None, "ci_high": None}
        main |= {"noise_ceiling": None, "chance": chances.pop() if len(chances) == 1 else None}
        if values:
            what = "subjects" if len({row["subject"] for row in decoded}) == len(decoded) else "scores"
            low, high = format_number(min(values)), format_number(max(values))
            spread = f"mean of {len(decoded)} {what}, range {low} to {high}"
    scale = [main[key] for key in ("value", "ci_low", "ci_high", "chance", "noise_ceiling")]
    decimals = figures.count_decimals(scale)
    show = functools.partial(format_number, decimals=decimals)
    interval = _describe_interval(main, show)
    return {
        "metric": metric,
        "note": note,
        "value": show(_as_float(main["value"])),
        "interval": interval if interval != figures.DASH else "",
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


# ---- pictures
def _embed(figure: bytes | str) -> str:
    """Return a figure as a ``data:`` address; in an image element an SVG neither runs nor loads anything."""
    data = figure.encode() if isinstance(figure, str) else bytes(figure)
    starts = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp"}
    kind = next((kind for start, kind in starts.items() if data.startswith(start)), None)
    if kind is None:
        if b"<svg" not in data[:2000]:
            raise DataError("a figure must be PNG, JPEG, WebP or SVG.")
        kind = "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _view_ranks(content: RankContent) -> dict[str, Any]:
    ranks, size = content.ranks, content.gallery_size
    first = float((ranks <= 1).mean())
    median = float(np.median(ranks))
    plots = {"histogram": figures.plot_rank_histogram, "curve": figures.plot_top_k_curve}
    drawn = {
        f"{name}_{theme}": _embed(figures.render_svg(plot(ranks, size, theme=theme)))
        for name, plot in plots.items()
        for theme in ("light", "dark")
    }
    facts = {"n": len(ranks), "size": size, "first": first, "median": median, "chance_median": (size + 1) / 2}
    return {**drawn, **facts, "caption": content.caption}


def _view_section(section: ExtraSection, number: int) -> dict[str, Any]:
    table = None if section.table is None else pd.DataFrame(section.table)
    return {
        "id": f"section-{number + 1}",
        "title": section.title,
        "caption": section.caption,
        "alt": section.alt or section.title,
        "light": None if section.figure is None else _embed(section.figure),
        "dark": None if section.figure_dark is None else _embed(section.figure_dark),
        "columns": [] if table is None else [str(column) for column in table.columns],
        "rows": [] if table is None else table.head(MAX_TABLE_ROWS).to_numpy(dtype=object).tolist(),
        "left_out": 0 if table is None else max(0, len(table) - MAX_TABLE_ROWS),
    }


def _view_gallery(gallery: GalleryContent) -> dict[str, Any]:
    names = {"best": "Best", "median": "Median", "worst": "Worst", "all": "Items"}
    rows = gallery.all_rows()
    thumbnails = make_thumbnails(gallery)
    position = {int(item): i for i, item in enumerate(thumbnails.items)}
    blocks = [
        {"name": names[name], "items": [_view_pick(gallery, rows, int(item), position) for item in items]}
        for name, items in gallery.select_items().items()
    ]
    return {
        "labels": list(rows),
        "pixelated": [max(images.shape[1:3]) < PIXELATED_BELOW for images in rows.values()],
        "blocks": blocks,
        "rule": describe_rule(gallery),
        "metric": figures.write_within_sentence(describe_metric(gallery.metric).label),
        "aspect": f"{gallery.seen.shape[2]} / {gallery.seen.shape[1]}",
        "n": len(gallery),
        "n_carried": len(thumbnails.items),
        "data": _view_browser(gallery, thumbnails.items, thumbnails.images, thumbnails.cells),
    }


def _view_pick(
    gallery: GalleryContent, rows: Mapping[str, np.ndarray], item: int, position: Mapping[int, int]
) -> dict[str, Any]:
    return {
        "id": gallery.ids[item],
        "concept": gallery.concepts[item],
        "score": gallery.format_score(item),
        "at": position[item],
        "images": [encode_thumbnail(np.asarray(images[item])) for images in rows.values()],
    }


def _view_browser(
    gallery: GalleryContent, items: np.ndarray, images: Sequence[str], cells: np.ndarray
) -> dict[str, Any]:
    """Return what the page's script needs to show, filter and sort the carried items."""
    score = gallery.score
    place = np.empty(len(gallery), dtype=int)
    place[gallery.sort_items()] = np.arange(len(gallery))
    n_scored = max(1, int(np.isfinite(score).sum()))
    return {
        "rows": [SEEN, *gallery.rows],
        "metric": describe_metric(gallery.metric).label,
        "filters": list(gallery.filter_by),
        "images": images,
        "items": [
            {
                "id": str(gallery.ids[i]),
                "concept": str(gallery.concepts[i]),
                "score": gallery.format_score(i),
                "place": int(place[i]),
                "share": None if not np.isfinite(score[i]) else round(int(place[i]) / n_scored, 4),
                "cells": cells[at].tolist(),
                "details": {str(key): format_number(column[i]) for key, column in gallery.details.items()},
            }
            for at, i in enumerate(map(int, items))
        ],
    }
