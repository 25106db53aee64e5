"""The gallery of a report as its templates and its script want it: picked items, and a bounded table of all of them.

Owns what the page carries of a gallery. The script filters, sorts and opens items from this alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from braindecode_vis.metrics.metric_registry import find_metric
from braindecode_vis.report.gallery import SEEN, GalleryContent, describe_rule
from braindecode_vis.report.thumbnails import (
    PIXELATED_BELOW,
    GalleryThumbnails,
    encode_thumbnail,
    make_thumbnails,
)
from braindecode_vis.report.words import (
    count_decimals,
    describe_metric,
    format_number,
    write_within_sentence,
)

_BLOCK_TITLES: Mapping[str, str] = {
    "best": "Best", "median": "Median", "worst": "Worst", "quantiles": "From best to worst",
    "random": "Drawn at random", "all": "Items",
}  # fmt: skip
STRIP_PX = 160


def view_gallery(gallery: GalleryContent) -> dict[str, Any]:
    """Return the picked items block by block, and what the script needs of every carried item."""
    rows = gallery.all_rows()
    thumbnails = make_thumbnails(gallery)
    position = {int(item): i for i, item in enumerate(thumbnails.items)}
    blocks = [
        {
            "name": _BLOCK_TITLES[name],
            "items": [_view_pick(gallery, rows, int(item), position) for item in items],
        }
        for name, items in gallery.select_items().items()
    ]
    return {
        "labels": list(rows),
        "pixelated": [max(images.shape[1:3]) < PIXELATED_BELOW for images in rows.values()],
        "blocks": blocks,
        "rule": describe_rule(gallery),
        "metric": write_within_sentence(describe_metric(gallery.metric).label),
        "aspect": f"{gallery.seen.shape[2]} / {gallery.seen.shape[1]}",
        "n": len(gallery),
        "n_carried": len(thumbnails.items),
        "data": view_browser(gallery, thumbnails),
    }


def _view_pick(
    gallery: GalleryContent, rows: Mapping[str, np.ndarray], item: int, position: Mapping[int, int]
) -> dict[str, Any]:
    return {
        "id": gallery.ids[item],
        "concept": gallery.concepts[item],
        "score": gallery.format_score(item),
        "at": position[item],
        "images": [encode_thumbnail(np.asarray(images[item]), STRIP_PX) for images in rows.values()],
    }


def view_browser(gallery: GalleryContent, thumbnails: GalleryThumbnails) -> dict[str, Any]:
    """Return what the page's script needs to show, filter and sort the carried items.

    Every item holds one table of numbers, a line per row of the gallery that has any and a column per metric; its
    first line is the system under test.
    """
    lines = _list_lines(gallery)
    return {
        "rows": list(gallery.all_rows()),
        "metrics": [_view_metric(gallery, metric) for metric in gallery.metrics],
        "lines": [label for label, _ in lines],
        "filters": list(gallery.filter_by),
        "images": thumbnails.images,
        "items": [
            {
                "id": str(gallery.ids[i]),
                "concept": str(gallery.concepts[i]),
                "cells": thumbnails.cells[at].tolist(),
                "values": [[_round(values[i]) for values in line] for _, line in lines],
                "captions": [gallery.find_caption(label, i) for label in gallery.all_rows()]
                if gallery.captions
                else [],
                "details": {str(key): format_number(column[i]) for key, column in gallery.details.items()},
            }
            for at, i in enumerate(map(int, thumbnails.items))
        ],
    }


def _list_lines(gallery: GalleryContent) -> list[tuple[str, Sequence[np.ndarray]]]:
    """Return label and values per metric of each line of an item's table, the system under test first."""
    first, nothing = next(iter(gallery.rows), SEEN), np.full(len(gallery), np.nan)
    draws = gallery.count_draws(first) if first in gallery.rows else 1
    label = f"{first} (mean of {draws} draws)" if draws > 1 else first
    lines: list[tuple[str, Sequence[np.ndarray]]] = [
        (label, [gallery.average_draws(metric) for metric in gallery.metrics])
    ]
    names = dict.fromkeys(name for known in gallery.metrics.values() for name in known if name != first)
    ordered = [name for name in gallery.all_rows() if name in names]
    for name in [*ordered, *[name for name in names if name not in ordered]]:
        lines.append((name, [known.get(name, nothing) for known in gallery.metrics.values()]))
    return lines


def _view_metric(gallery: GalleryContent, metric: str) -> dict[str, Any]:
    note, space = describe_metric(metric), find_metric(metric).protocol
    better = (1 if gallery.higher_is_better else -1) if metric == gallery.metric else note.direction
    known = [v for row in gallery.metrics[metric].values() for v in row[np.isfinite(row)]]
    return {
        "label": f"{note.label} ({space})" if space else note.label,
        "better": better,
        "decimals": count_decimals(known),
    }


def _round(value: float) -> float | None:
    return None if not np.isfinite(value) else float(f"{value:.5g}")
