"""Scores of an entry on its track: the same ranks, chance and intervals as of a run of our own.

Owns which column an entry belongs to (clean, test-selected or transductive), the floors that are computed from an entry
alone, the mean over seeds, places in a table, and the badge "audited". Reads no files of an entry; see `entries`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.parts import ask_part
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.studies import output_signs as signs
from braindecode_vis.parts.studies.judging.entries import (
    AUDIT,
    CARD,
    SCORES,
    TrackEntry,
    check_seal,
    read_card,
)
from braindecode_vis.parts.studies.judging.tracks import Track
from braindecode_vis.scoring.crossed import paired_difference
from braindecode_vis.scoring.metrics.identification import Order, count_order, leave_out_images
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.retrieval import Retrieval, compute_ranks, compute_similarity
from braindecode_vis.scoring.score_row import POOLED, make_score

Column = Literal["clean", "test-selected", "transductive"]
COLUMNS: tuple[Column, ...] = ("clean", "test-selected", "transductive")
METRICS = ("top1", "top5", "2_way")
FEWEST_SEEDS = 5
N_BOOTSTRAP = 2000


@dataclass(frozen=True)
class EntryScores:
    """What `score_entry` found.

    Parameters
    ----------
    column
        The place of the entry in the table.
    rows
        Scores of each subject and of all together: the entry (``decoded``) and the floors that need nothing else.
    items
        Metric to one value per query, the mean over seeds, in the order of `subjects` and `ids`.
    subjects, ids
        Subject and picture of each query.
    signs
        Signs that decisions used several queries together, a sentence each.
    notes
        What a reader of the row must know.
    """

    column: Column
    rows: list[Score]
    items: Mapping[str, np.ndarray]
    subjects: list[str]
    ids: list[str]
    signs: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return everything as ``scores.json`` keeps it."""
        return {
            "column": self.column,
            "rows": [row.as_row() for row in self.rows],
            "items": {name: values.tolist() for name, values in self.items.items()},
            "subjects": self.subjects,
            "ids": self.ids,
            "signs": self.signs,
            "notes": self.notes,
        }


def score_entry(
    entry: TrackEntry, *, gallery: Embeddings | None = None, n_bootstrap: int = N_BOOTSTRAP
) -> EntryScores:
    """Score an entry: per subject, and over subjects and pictures.

    Parameters
    ----------
    entry
        A valid entry.
    gallery
        Embeddings of the candidates made by the judge; by default those that the entry gives.
    n_bootstrap
        Resamples for the intervals of single subjects.

    Returns
    -------
    EntryScores
        Values are means over seeds of what each query reached.
    """
    candidates = entry.gallery if gallery is None else _place(gallery, entry)
    subjects = [who for who, ids in entry.split.queries.items() for _ in ids]
    ids = [name for queries in entry.split.queries.values() for name in queries]
    smallest = min(len(own) for own in entry.split.galleries)
    names = [name for name in METRICS if (find_metric(name).n or 1) < smallest]
    found = [_rank(entry, candidates, predictions) for predictions in entry.predictions]
    pairs = zip(entry.predictions, found, strict=True)
    told = [*dict.fromkeys(sign for given, ranked in pairs for sign in _find_signs(given, ranked))]
    methods = {
        "decoded": found,
        "shuffled": [_rank(entry, candidates, _shuffle(entry))],
        "mean image": [_rank(entry, candidates, _predict_mean(entry, candidates))],
    }
    column: Column = "clean"
    if told or entry.card.transductive:
        column = "transductive"
    elif entry.card.chosen.on == "test":
        column = "test-selected"
    rows = [
        row
        for name in names
        for method, ranked in methods.items()
        for row in _make_rows(entry, name, method, ranked, n_bootstrap)
    ]
    items = {name: _average(entry, found, name) for name in names}
    return EntryScores(column, rows, items, subjects, ids, told, _list_notes(entry, gallery))


def _place(gallery: Embeddings, entry: TrackEntry) -> Embeddings:
    known = set(gallery.ids.astype(str).tolist())
    if missing := [name for name in entry.split.gallery if name not in known]:
        raise DataError(f"the gallery of the judge misses {len(missing)} pictures, first {missing[0]!r}.")
    if gallery.vectors.shape[1:] != entry.gallery.vectors.shape[1:]:
        raise DataError(
            f"the gallery of the judge has rows of shape {gallery.vectors.shape[1:]}, but the entry has "
            f"{entry.gallery.vectors.shape[1:]}; use the space that the entry names, {entry.card.space}."
        )
    # One space has one name here, whatever the files called it.
    return Embeddings(gallery.vectors, gallery.ids.astype(str), entry.card.space).select(entry.split.gallery)


class _Part(NamedTuple):
    """Queries of one subject in one gallery: their ranks, and the order of their similarities."""

    retrieval: Retrieval
    order: Order


def _rank(
    entry: TrackEntry, candidates: Embeddings, predictions: Mapping[str, np.ndarray]
) -> dict[str, list[_Part]]:
    """Return the ranks of each subject in each gallery that holds pictures of its queries."""
    found = dict[str, list[_Part]]()
    for subject, ids in entry.split.queries.items():
        for own in entry.split.galleries:
            inside = set(own)
            rows = [row for row, name in enumerate(ids) if name in inside]
            if rows:
                queries = Embeddings(predictions[subject][rows], [ids[row] for row in rows], candidates.space)
                gallery = candidates.select(own)
                ranked = compute_ranks(queries, gallery, n_top=1, device="cpu")
                order = count_order(compute_similarity(queries, gallery, device="cpu"))
                found.setdefault(subject, []).append(_Part(ranked, order))
    return found


def _find_signs(predictions: Mapping[str, np.ndarray], ranked: Mapping[str, Sequence[_Part]]) -> list[str]:
    """Return signs that the predictions or decisions of one seed were made together."""
    told = []
    for subject, parts in ranked.items():
        told += [f"subject {subject}: {sign}" for sign in signs.find_vector_signs(predictions[subject])]
        for one, _ in parts:
            chosen = one.gallery_ids[one.top_indices[:, 0]]
            if sign := signs.find_bijection(chosen, one.worst_ranks == 1, one.gallery_size):
                told.append(f"subject {subject}: {sign}")
    return told


def _average(entry: TrackEntry, seeds: Sequence[Mapping[str, Sequence[_Part]]], name: str) -> np.ndarray:
    """Return one value per query, the mean over seeds, in the order of the queries of the split."""
    metric, n, *_ = find_metric(name)
    assert metric.compare is not None
    values = []
    for ranked in seeds:
        found = {
            (subject, str(i)): float(value)
            for subject, parts in ranked.items()
            for one, _ in parts
            for i, value in zip(one.query_ids, metric.compare(one, n), strict=True)
        }
        values.append([found[who, i] for who, ids in entry.split.queries.items() for i in ids])
    return np.mean(values, axis=0)


def _leave_images_out(seeds: Sequence[Mapping[str, Sequence[_Part]]], subject: str, n: int) -> np.ndarray:
    """Return the identification of a subject without each picture, which leaves as query and as candidate."""
    found = []
    for ranked in seeds:
        parts = ranked[subject]
        truths = [pd.Index(one.gallery_ids).get_indexer(pd.Index(one.query_ids)) for one, _ in parts]
        galleries = [one.gallery_ids for one, _ in parts]
        found.append(leave_out_images([order for _, order in parts], truths, galleries, n, ties="shared"))
    return np.mean(found, axis=0)


def _shuffle(entry: TrackEntry) -> dict[str, np.ndarray]:
    """Return the predictions of the first seed after one shuffle within each subject."""
    generator = make_generator(0, "track", entry.track.name, "shuffled")
    return {who: generator.permutation(array) for who, array in entry.predictions[0].items()}


def _predict_mean(entry: TrackEntry, candidates: Embeddings) -> dict[str, np.ndarray]:
    """Return the mean of the candidates as the prediction of every query; it knows nothing of the brain."""
    mean = candidates.vectors.mean(axis=0, keepdims=True)
    return {who: np.repeat(mean, len(ids), axis=0) for who, ids in entry.split.queries.items()}


def _make_rows(
    entry: TrackEntry,
    name: str,
    method: str,
    seeds: Sequence[Mapping[str, Sequence[_Part]]],
    n_bootstrap: int,
) -> list[Score]:
    """Return the row of each subject and, of several, that of all."""
    split, n = entry.split, find_metric(name).n
    values = _average(entry, seeds, name)
    whose = np.array([who for who, ids in split.queries.items() for _ in ids], dtype=object)
    names = np.array([i for ids in split.queries.values() for i in ids], dtype=object)
    sizes = {picture: len(own) for own in split.galleries for picture in own}
    chance = float(np.mean([compute_chance(name, gallery_size=sizes[picture]) for picture in names]))
    common = len(split.galleries[0]) if len(set(sizes.values())) == 1 else None
    rows = []
    for subject in [*split.queries, *([POOLED] if len(split.queries) > 1 else [])]:
        pooled = subject == POOLED
        own = np.ones(len(whose), bool) if pooled else whose == subject
        # Of identification, a picture is a query and a candidate of all others.
        left_out = _leave_images_out(seeds, subject, n) if name.endswith("_way") and not pooled else None
        rows.append(
            make_score(
                values[own], metric=name, method=method, protocol=f"track {entry.track.name}, split {split.sha256}",
                subject=subject, split="test", seed=0, chance=chance, stimulus_ids=names[own].tolist(),
                subjects=whose[own].tolist() if pooled else None, n_boot=n_bootstrap, gallery_size=common,
                over_folds=len(split.galleries) > 1, left_out=left_out,
            )
        )  # fmt: skip
    return rows


def _list_notes(entry: TrackEntry, gallery: Embeddings | None) -> list[str]:
    n = len(entry.card.seeds)
    notes = []
    if n < FEWEST_SEEDS:
        notes.append(
            f"{n} seed{'s' * (n > 1)}: a difference may be one of seeds, of which five are asked for."
        )
    notes.append(
        "The gallery is the entry's own and was not computed again."
        if gallery is None
        else "Ranked in a gallery that the judge computed."
    )
    if entry.card.extra_data:
        notes.append(f"Learnt also from {', '.join(entry.card.extra_data)}.")
    if entry.track.ids == "data" and not entry.track.sha256:
        notes.append("The hash of the split is not known to the track; it is that of the entrant's own copy.")
    return notes


# --- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableRow:
    """One sealed entry in the table of its track.

    Parameters
    ----------
    folder, card, seal, scores
        The entry and what was stored beside it.
    main
        Its headline score over all subjects.
    place
        From 1; entries share one where the paired difference to the row above does not exclude 0.
    difference
        To the row above, in words; empty for the first.
    audited
        Who audited it, or empty.
    """

    folder: Path
    card: Any
    seal: Mapping[str, Any]
    scores: Mapping[str, Any]
    main: Mapping[str, Any]
    place: int = 0
    difference: str = ""
    audited: str = ""


def read_table(track: Track, folder: Path) -> tuple[dict[Column, list[TableRow]], list[TableRow], list[str]]:
    """Return the sealed entries of a track in their columns, best first, the floors, and what could not be read.

    Parameters
    ----------
    track
        The track.
    folder
        Its folder, with an entry in each folder below.
    """
    columns: dict[Column, list[TableRow]] = {name: [] for name in COLUMNS}
    found, floors, troubles = list[TableRow](), list[TableRow](), list[str]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or path.name.startswith("."):
            continue
        try:
            found.append(_read_row(track, path))
        except (ConfigError, DataError, KeyError, TypeError, ValueError, OSError) as error:
            troubles.append(f"{path.name}: {error}")
    splits = Counter(row.seal["split"] for row in found)
    for row in found:
        # Where the track knows no hash, most entries decide which copy of the data is meant.
        if row.seal["split"] != splits.most_common(1)[0][0]:
            troubles.append(f"{row.folder.name}: it answers another split than most entries of the track.")
            continue
        (floors if row.card.floor else columns[row.scores["column"]]).append(row)
    return {name: _give_places(track, rows) for name, rows in columns.items()}, floors, troubles


def _read_row(track: Track, path: Path) -> TableRow:
    seal, scores, card = (
        check_seal(path),
        store.read_json(path / SCORES),
        read_card(path / CARD),
    )
    if seal["track"] != track.name:
        raise DataError(f"it is sealed for the track {seal['track']}.")
    if track.sha256 and seal["split"] != track.sha256:
        raise DataError("it answers another split than the track has now.")
    if scores["column"] not in COLUMNS:
        raise DataError(f"its scores name the column {scores['column']!r}.")
    if path.name != card.folder:
        raise DataError(f"it is the entry {card.folder}; a folder has the name of its entry.")
    return TableRow(
        path, card, seal, scores, find_main(scores, track.headline), audited=_read_audit(path, card, seal)
    )


def find_main(scores: Mapping[str, Any], metric: str, method: str = "decoded") -> Mapping[str, Any]:
    """Return the score of all subjects together, or of the only one."""
    rows = [row for row in scores["rows"] if row["metric"] == metric and row["method"] == method]
    found: Mapping[str, Any] = next((row for row in rows if row["subject"] == POOLED), rows[-1])
    return found


def _give_places(track: Track, rows: Sequence[TableRow]) -> list[TableRow]:
    """Return rows with their places, best first; ties of the headline are in the order of their names."""
    ordered = sorted(rows, key=lambda row: (-float(row.main["value"]), row.folder.name))
    placed = list[TableRow]()
    for number, row in enumerate(ordered, 1):
        if not placed:
            placed.append(replace(row, place=1))
            continue
        above = placed[-1]
        low, high, mean = _compare(above, row, track.headline)
        if low is None or high is None:
            placed.append(replace(row, place=above.place, difference=f"{mean:+.3f}; no interval"))
            continue
        apart = low > 0 or high < 0
        words = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        placed.append(replace(row, place=number if apart else above.place, difference=words))
    return placed


def _compare(above: TableRow, row: TableRow, metric: str) -> tuple[float | None, float | None, float]:
    """Return the limits and the mean of the paired difference, row minus the one above it."""
    if (above.scores["subjects"], above.scores["ids"]) != (row.scores["subjects"], row.scores["ids"]):
        raise DataError(f"{row.folder.name} and {above.folder.name} list other queries.")
    first, second = (np.array(one.scores["items"][metric], float) for one in (row, above))
    subjects = row.scores["subjects"]
    found = paired_difference(
        first,
        second,
        clusters=row.scores["ids"],
        subjects=subjects if len(set(subjects)) > 1 else None,
        n_boot=N_BOOTSTRAP,
    )
    return found.interval.low, found.interval.high, found.mean


# --- audit --------------------------------------------------------------------------------------------------------


def audit_entry(folder: Path, auditor: str) -> dict[str, Any]:
    """Audit the run in a sealed entry, with a refit of every fold, and keep the verdict beside it.

    Parameters
    ----------
    folder
        A sealed entry with its run.
    auditor
        Who calls it; another one than the team.

    Returns
    -------
    dict
        ``auditor``, ``passed``, ``leaks``, ``entry`` and when.

    Raises
    ------
    ConfigError, DataError
        If the team audits itself, there is no run, or the run did not make the predictions.
    """
    seal, card = check_seal(folder, whole=True), read_card(folder / CARD)
    if auditor.strip().lower() == card.team.lower() or not auditor.strip():
        raise ConfigError(f"the team {card.team} cannot audit its own entry; another one must call this.")
    run = folder / "run"
    if not (run / "config.yaml").is_file():
        raise DataError(f"{folder} contains no run, so it cannot be audited; submit the run folder itself.")
    _refuse_other_run(folder, card, run, seal)
    found = ask_part("audit_run")(run, refit=True)
    verdict = {
        "auditor": auditor.strip(),
        "entry": seal["entry"],
        "passed": not found.leaks,
        "summary": found.summarise(),
        "verified": {part.part: part.how for part in found.list_status()},
        "refit": True,
        "created": store.collect_provenance()["created"],
    }
    store.write_json(folder / AUDIT, store.json_plain(verdict))
    return verdict


def _refuse_other_run(folder: Path, card: Any, run: Path, seal: Mapping[str, Any]) -> None:
    """Raise `DataError` if the predictions of an entry are not those of its run."""
    from braindecode_vis.parts.studies.judging.entry_runs import open_finished, read_run_predictions

    made, _ = read_run_predictions(open_finished(run))
    if len(card.seeds) > 1 or sorted(f"predictions/{who}.npy" for who in made) != sorted(
        name for name in seal["files"] if name.startswith("predictions/") and name.endswith(".npy")
    ):
        raise DataError(
            f"{folder} contains a run that made only a part of its predictions; the badge is for all of them."
        )
    for subject, (values, ids) in made.items():
        path = folder / "predictions" / f"{subject}.npy"
        listed = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        place = {name: row for row, name in enumerate(ids)}
        if sorted(listed) != sorted(ids) or not np.allclose(
            np.load(path, allow_pickle=False), values[[place[name] for name in listed]], rtol=1e-4, atol=1e-6
        ):
            raise DataError(
                f"{folder} contains a run whose predictions of subject {subject} differ from its own."
            )


def _read_audit(folder: Path, card: Any, seal: Mapping[str, Any]) -> str:
    """Return who audited an entry and found no leak; nothing for another entry, or the team itself."""
    if not (folder / AUDIT).is_file():
        return ""
    verdict = store.read_json(folder / AUDIT)
    holds = (
        verdict.get("passed") is True
        and verdict.get("refit") is True
        and verdict.get("entry") == seal["entry"]
    )
    auditor = str(verdict.get("auditor", ""))
    return auditor if holds and auditor.lower() != card.team.lower() else ""
