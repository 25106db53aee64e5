"""The board of entries: a static site of sealed entries, and ``entries.json``.

Owns the pages: one with all tracks, one a track, one an entry, and the history. Entries are in three columns that are
never mixed, with floors in every table; published results are apart and are not sorted among measured ones. The site
loads nothing, so that it opens from a folder. How entries are scored and placed is in `entry_scores`.

::

    OUT/
      index.html          tracks, and the best clean entry of each
      TRACK.html          its tables
      entries/TRACK/TEAM--NAME.html
      history.html        every entry in the order of its seal
      entries.json        the same as data
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.parts.studies.judging.entries import IMAGES, open_picture
from braindecode_vis.parts.studies.judging.entry_scores import (
    AUDIT,
    FEWEST_SEEDS,
    METRICS,
    Column,
    TableRow,
    find_main,
    read_table,
)
from braindecode_vis.parts.studies.judging.tracks import (
    FLOORS,
    Track,
    describe_track,
    list_tracks,
    read_track,
)
from braindecode_vis.pipeline.prediction_files import check_out, publish_folder
from braindecode_vis.report.page import render_static
from braindecode_vis.report.page_gallery import encode_thumbnail
from braindecode_vis.report.page_scores import make_scale, view_bar
from braindecode_vis.report.words import DASH, describe_metric, format_number

KIND = "entries"
_NAMES = ("index.html", "history.html", "entries", "entries.json", store.PROVENANCE)
N_PICTURES = 12
PICTURE_PX = 96
COLUMN_WORDS = {
    "clean": "Nothing was chosen by the queries, and each was decided by itself.",
    "test-selected": "An epoch or a setting was chosen by a score on these queries, so the numbers are too high.",
    "transductive": "Decisions used several queries together; the task is a different one.",
}


@dataclass(frozen=True)
class TrackTables:
    """The entries of one track as they are shown."""

    track: Track
    columns: Mapping[Column, Sequence[TableRow]]
    floors: Sequence[TableRow]
    troubles: Sequence[str]
    published: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def rows(self) -> list[TableRow]:
        """All entries, column by column, and then the floors."""
        return [*(row for rows in self.columns.values() for row in rows), *self.floors]


def make_entry_board(entries: Path, out: Path) -> list[dict[str, Any]]:
    """Write the site of a folder of entries and return the content of ``entries.json``.

    Parameters
    ----------
    entries
        Folder with ``TRACK/TEAM--NAME`` folders, as ``submit`` writes them.
    out
        Folder of the site; new, or a site that is replaced.

    Raises
    ------
    DataError
        If there is no entry, a folder is no track, or `out` holds other files.
    """
    top = entries.expanduser()
    names = sorted(path.name for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    names = [name for name in names if not name.startswith(".") and top / name != out.expanduser()]
    known = set(list_tracks())
    if not names:
        raise DataError(f"{entries} holds no entries; braindecode-vis submit writes them.")
    if strange := [name for name in names if name not in known]:
        raise DataError(f"{top / strange[0]} is no folder of a track; tracks are {', '.join(sorted(known))}.")
    site = check_out(out, kind=KIND, names=(*_NAMES, *(f"{name}.html" for name in known)))
    tables = [_read_tables(read_track(name), top / name) for name in sorted(known)]
    listed = [_as_json(table, row) for table in tables for row in table.rows]
    with publish_folder(site) as temporary:
        _write(temporary / "index.html", "index", "Tracks", tables=[_view_summary(table) for table in tables])
        _write(temporary / "history.html", "history", "History", rows=_view_history(tables))
        for table in tables:
            title = table.track.title
            _write(temporary / f"{table.track.name}.html", "track", title, **_view_track(table))
            for row in table.rows:
                place = temporary / "entries" / table.track.name / f"{row.folder.name}.html"
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(
                    place,
                    "entry",
                    f"{row.card.name} by {row.card.team}",
                    up="../../",
                    **_view_entry(table, row),
                )
        store.write_json(temporary / "entries.json", store.json_plain(listed))
        record = {"kind": KIND, "fingerprint": store.hash_json(store.json_plain(listed))}
        store.write_json(temporary / store.PROVENANCE, record | store.collect_provenance())
    return listed


def _read_tables(track: Track, folder: Path) -> TrackTables:
    columns, floors, troubles = read_table(track, folder)
    return TrackTables(track, columns, floors, troubles, read_published(track.name))


def read_published(name: str) -> list[dict[str, Any]]:
    """Return published results of a track: method, metric, value in percent, column, status and note."""
    path = find_package_data("data_manifests") / "tracks" / "published" / f"{name}.yaml"
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [{"top5": "", "note": "", **row} for row in rows]


def _write(path: Path, page: str, title: str, *, up: str = "", **given: Any) -> None:
    text = render_static("entries.html.j2", page=page, title=title, up=up, dash=DASH, **given)
    path.write_text(text, encoding="utf-8")


def _as_json(table: TrackTables, row: TableRow) -> dict[str, Any]:
    return {
        "track": table.track.name,
        "split": row.seal["split"],
        "entry": row.seal["entry"],
        "sealed": row.seal["sealed"],
        "card": row.card.model_dump(mode="json"),
        "column": "floor" if row.card.floor else row.scores["column"],
        "place": row.place or None,
        "difference_to_above": row.difference,
        "audited": row.audited,
        "headline": table.track.headline,
        "scores": row.scores["rows"],
        "signs": row.scores["signs"],
        "notes": row.scores["notes"],
    }


# --- views --------------------------------------------------------------------------------------------------------


def _view_score(row: Mapping[str, Any], place: Any) -> dict[str, Any]:
    """Return a score as text, with the marks of its bar."""
    show = partial(format_number, decimals=3)
    interval = "" if row["ci_low"] is None else f"{show(row['ci_low'])} to {show(row['ci_high'])}"
    value, chance = show(row["value"]), format_number(row["chance"])
    words = f"{value}" + (f", 95 % interval {interval}" if interval else "") + f", chance {chance}"
    bar = view_bar({"noise_ceiling": None, **row}, place)
    return {"value": value, "interval": interval or DASH, "chance": chance, "bar": bar, "words": words}


def _view_summary(table: TrackTables) -> dict[str, Any]:
    best = next(iter(table.columns["clean"]), None)
    found = None
    if best is not None:
        found = _view_score(best.main, lambda value: None) | {
            "name": f"{best.card.name} by {best.card.team}",
            "href": _link(table, best),
        }
    return {
        "name": table.track.name,
        "title": table.track.title,
        "headline": describe_metric(table.track.headline).label,
        "n": len(table.rows),
        "best": found,
    }


def _link(table: TrackTables, row: TableRow) -> str:
    return f"entries/{table.track.name}/{row.folder.name}.html"


def _view_track(table: TrackTables) -> dict[str, Any]:
    floors = _list_floors(table)
    scores = [row.main for row in table.rows] + [
        floor for floor in floors.values() if isinstance(floor, Mapping)
    ]
    numbers = [row[key] for row in scores for key in ("value", "ci_low", "ci_high", "chance")]
    scale = make_scale([number for number in numbers if number is not None] or [0.0, 1.0])
    shown = [
        {
            "name": name,
            "score": _view_score(found, scale) if isinstance(found, Mapping) else None,
            "words": found if isinstance(found, str) else found.get("words", ""),
        }
        for name, found in floors.items()
    ]
    columns = [
        {
            "name": name,
            "words": COLUMN_WORDS[name],
            "rows": [
                {
                    "place": row.place,
                    "name": row.card.name,
                    "team": row.card.team,
                    "href": _link(table, row),
                    "score": _view_score(row.main, scale),
                    "difference": row.difference,
                    "seeds": _describe_seeds(len(row.card.seeds)),
                    "extra": ", ".join(row.card.extra_data),
                    "audited": row.audited,
                }
                for row in rows
            ],
        }
        for name, rows in table.columns.items()
    ]
    return {
        "facts": describe_track(table.track),
        "headline": describe_metric(table.track.headline).label,
        "columns": columns,
        "floors": shown,
        "published": table.published,
        "troubles": table.troubles,
    }


def _describe_seeds(n: int) -> str:
    return f"{n} seeds" if n >= FEWEST_SEEDS else f"{n} seed{'s' * (n > 1)}, fewer than five"


def _list_floors(table: TrackTables) -> dict[str, Mapping[str, Any] | str]:
    """Return each floor of a track as a score, or why there is none."""
    track, rows = table.track, table.rows
    found: dict[str, Mapping[str, Any] | str] = {}
    for name in FLOORS:
        known = track.floors.get(name)  # type: ignore[call-overload]
        # Anybody may call an entry a floor; a bad one must not make the table look better.
        offered = [row for row in table.floors if row.card.floor == name]
        own = max(offered, key=lambda row: float(row.main["value"]), default=None)
        if own is not None:
            found[name] = {**own.main, "words": f"{own.card.name} by {own.card.team}, an entry"}
        elif name in ("mean image", "shuffled") and rows:
            found[name] = {
                **find_main(rows[0].scores, track.headline, name),
                "words": f"computed from {rows[0].card.name} by {rows[0].card.team}",
            }
        elif known is not None:
            found[name] = {
                "value": known.value,
                "ci_low": known.ci_low,
                "ci_high": known.ci_high,
                "chance": track.chance[track.headline],
                "words": known.by,
            }
        else:
            needs = f"run --track {track.name} and submit make it" if name == "ridge" else "not measured here"
            found[name] = "no entry yet" if name in ("mean image", "shuffled") else needs
    return found


def _view_entry(table: TrackTables, row: TableRow) -> dict[str, Any]:
    card, scores = row.card, row.scores
    rows = [found for found in scores["rows"] if found["metric"] in METRICS]
    listed = []
    for metric in METRICS:
        own = [found for found in rows if found["metric"] == metric]
        if not own:
            continue
        numbers = [found[key] for found in own for key in ("value", "ci_low", "ci_high", "chance")]
        scale = make_scale([number for number in numbers if number is not None])
        listed.append(
            {
                "metric": describe_metric(metric).label,
                "rows": [
                    _view_score(found, scale)
                    | {key: found[key] for key in ("subject", "method")}
                    | {"n": format_number(found["n_queries"]), "resampled": found["resampled"]}
                    for found in own
                ],
            }
        )
    facts = {
        "Track": table.track.name,
        "Column": "floor" if card.floor else scores["column"],
        "Team": card.team,
        "Code": card.code,
        "Weights": card.weights,
        "Licence": card.licence,
        "Learnt also from": ", ".join(card.extra_data) or "nothing beside the training part",
        "Compute": f"{card.hours:g} hours, {card.hardware}",
        "Chosen on": card.chosen.on,
        "Epoch": card.chosen.epoch,
        "Settings": card.chosen.settings,
        "Seeds": f"{', '.join(map(str, card.seeds))} ({_describe_seeds(len(card.seeds))})",
        "Space": card.space,
        "Sealed": row.seal["sealed"],
        "Entry": row.seal["entry"],
        "Split": row.seal["split"],
        "Audited": _describe_audit(row),
    }
    return {
        "track": table.track.name,
        "facts": facts,
        "scores": listed,
        "notes": [*(f"Transductive: {sign}" for sign in scores["signs"]), *scores["notes"]],
        "pictures": _read_pictures(row.folder, scores),
    }


def _describe_audit(row: TableRow) -> str:
    """Return who audited an entry, and how each part of its run was verified."""
    if not row.audited:
        return "no"
    verified = dict(store.read_json(row.folder / AUDIT).get("verified", {}))
    how = ", ".join(f"{part} {words}" for part, words in verified.items())
    return f"audit --refit passed, called by {row.audited}" + (f" ({how})" if how else "")


def _read_pictures(folder: Path, scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the decoded pictures of the first queries of the first subject; which ones is decided by their order."""
    if not (folder / "images").is_dir():
        return []
    found = []
    for subject, name in list(zip(scores["subjects"], scores["ids"], strict=True))[:N_PICTURES]:
        files = [folder / "images" / subject / f"{name}{end}" for end in IMAGES]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            continue
        try:
            with refuse_damage(f"{path} cannot be shown"), open_picture(path) as picture:
                picture.thumbnail((PICTURE_PX, PICTURE_PX))
                pixels = np.asarray(picture.convert("RGB"))
        except DataError:
            continue
        found.append({"src": encode_thumbnail(pixels, PICTURE_PX), "name": f"subject {subject}, {name}"})
    return found


def _view_history(tables: Sequence[TrackTables]) -> list[dict[str, Any]]:
    """Return every entry in the order of its seal, and whether it was the best of its column at that time."""
    best = dict[tuple[str, str], float]()
    listed = []
    pairs = [(table, row) for table in tables for row in table.rows]
    for table, row in sorted(pairs, key=lambda pair: (pair[1].seal["sealed"], pair[1].folder.name)):
        column = "floor" if row.card.floor else row.scores["column"]
        key, value = (table.track.name, column), float(row.main["value"])
        leads = value > best.get(key, -np.inf)
        best[key] = max(value, best.get(key, -np.inf))
        listed.append(
            {
                "sealed": row.seal["sealed"],
                "track": table.track.name,
                "name": f"{row.card.name} by {row.card.team}",
                "href": _link(table, row),
                "column": column,
                "value": format_number(value, decimals=3),
                "leads": leads,
            }
        )
    return listed[::-1]
