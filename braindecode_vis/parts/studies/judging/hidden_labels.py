"""Hidden labels: the public half of a test set for everybody, and the sealed half for its holder.

Owns the two halves, the commitment that is published before anybody answers, and the ledger that gives a team one score
a day. A query has a name that says nothing; which picture it showed is in the sealed half alone. Knows nothing of
how an entry is scored.

::

    OUT/public/
      split.json                names of the queries of each subject, and the gallery
      commitment.json           hash of the order and the salt
      responses/SUBJECT.npy     a row per query: the mean over the repetitions of its picture
      training/SUBJECT.npy      responses of the training trials; SUBJECT.txt has the id of each row
    OUT/sealed/
      order.json                the picture of each query, and the salt of the commitment
      ledger.json               who was scored on which day
"""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.studies.judging.entries import TrackEntry, read_entry, write_rows
from braindecode_vis.parts.studies.judging.tracks import (
    Track,
    TrackSplit,
    check_run,
    open_track_run,
    read_track,
)
from braindecode_vis.pipeline.prediction_files import publish_folder

SPLIT, COMMITMENT, ORDER, LEDGER = "split.json", "commitment.json", "order.json", "ledger.json"


def hide_labels(name: str, out: Path, root: Path | None = None) -> str:
    """Write both halves of a track's test set and return the commitment.

    Parameters
    ----------
    name
        Name of the track; it has one gallery.
    out
        Gets ``public``, ``sealed`` and the run that read the data; publish only the first.
    root
        Folder of the data set.

    Raises
    ------
    DataError
        If there are halves in `out` already, or the track has several galleries.
    """
    from braindecode_vis.pipeline.preparing import preprocess

    track = read_track(name)
    if (out / "public").exists() or (out / "sealed").exists():
        raise DataError(
            f"{out} holds a hidden test set already; a second order would not fit the published commitment."
        )
    run = open_track_run(track, out, root)
    split = check_run(run, name)
    if len(split.galleries) > 1:
        raise DataError(
            f"the track {name} has {len(split.galleries)} galleries, and labels are hidden in one."
        )
    prepared = preprocess(run)
    draw = secrets.SystemRandom()
    # An order that anybody could draw again from a seed would hide nothing.
    order = {subject: draw.sample(list(ids), len(ids)) for subject, ids in split.queries.items()}
    salt = secrets.token_hex(32)
    committed = commit(order, salt)
    trials, data = prepared.responses.trials, prepared.responses.data
    subjects = trials["subject"].astype(str).to_numpy()
    shown = trials["stimulus_id"].astype(str).to_numpy()
    tested = np.unique(np.concatenate([fold.test for fold in prepared.folds]))
    learnt = np.setdiff1d(np.flatnonzero(~np.isin(shown, split.gallery)), tested)
    with publish_folder(out / "public") as public:
        for place in ("responses", "training"):
            (public / place).mkdir()
        for subject, ids in order.items():
            own = tested[subjects[tested] == subject]
            means = [np.asarray(data[own[shown[own] == picture]]).mean(axis=0) for picture in ids]
            np.save(
                public / "responses" / f"{subject}.npy",
                np.stack(means).astype(np.float32),
                allow_pickle=False,
            )
            rows = learnt[subjects[learnt] == subject]
            write_rows(public / "training" / subject, data[rows], shown[rows])
        public_split = hide_split(order, split)
        public_split.write(public / SPLIT)
        content = {"track": name, "commitment": committed, "split": public_split.sha256}
        store.write_json(public / COMMITMENT, content)
    with publish_folder(out / "sealed") as sealed:
        sealed.chmod(0o700)
        store.write_json(
            sealed / ORDER, {"track": name, "salt": salt, "queries": order, "commitment": committed}
        )
        store.write_json(sealed / LEDGER, [])
    return committed


def commit(order: Mapping[str, Sequence[str]], salt: str) -> str:
    """Return the hash that binds the holder to an order without showing it.

    Examples
    --------
    >>> commit({"01": ["a", "b"]}, "salt") == commit({"01": ["b", "a"]}, "salt")
    False
    """
    text = json.dumps({subject: list(ids) for subject, ids in order.items()}, sort_keys=True)
    return hashlib.sha256(f"{salt}\n{text}".encode()).hexdigest()


def name_queries(n: int) -> list[str]:
    """Return names of queries that say nothing, in the order of the public rows."""
    return [f"q{number:05d}" for number in range(n)]


def read_hidden_entry(folder: Path, sealed: Path, track: Track, split: TrackSplit) -> TrackEntry:
    """Return an entry on anonymous queries with the pictures that they showed.

    Every check is made before a query gets its picture, so that no error message shows a label.

    Parameters
    ----------
    folder
        The entry; ids of its predictions are names of queries, and without ids the rows have the public order.
    sealed
        The sealed half.
    track, split
        The track and its true split.

    Raises
    ------
    DataError
        If the sealed half is of another track, does not fit its commitment, or the entry is not valid.
    """
    order = _read_order(sealed, split)
    anonymous = hide_split(order, split)
    entry = read_entry(folder, track, anonymous)
    predictions = []
    places = {subject: {name: row for row, name in enumerate(ids)} for subject, ids in order.items()}
    for found in entry.predictions:
        rows = {who: [places[who][name] for name in ids] for who, ids in split.queries.items()}
        predictions.append({who: found[who][rows[who]] for who in split.queries})
    card = entry.card.model_copy(update={"split": split.sha256})
    # A team knows its own pictures: on a page with the name of the stimulus each would show a label.
    return replace(entry, card=card, split=split, predictions=predictions, images={})


def hide_split(order: Mapping[str, Sequence[str]], split: TrackSplit) -> TrackSplit:
    """Return the split that everybody sees: names that say nothing, in the order of the public rows."""
    return TrackSplit(
        split.track, {who: name_queries(len(ids)) for who, ids in order.items()}, split.galleries, hidden=True
    )


def _read_order(sealed: Path, split: TrackSplit) -> dict[str, list[str]]:
    path = sealed / ORDER
    if not path.is_file():
        raise DataError(f"{sealed} has no {ORDER}; give the sealed half that tracks make --hide wrote.")
    secret = store.read_json(path)
    order: dict[str, list[str]] = secret["queries"]
    if secret["track"] != split.track or {s: sorted(i) for s, i in order.items()} != {
        s: sorted(i) for s, i in split.queries.items()
    }:
        raise DataError(f"{path} holds the queries of another track or split than {split.track}.")
    if commit(order, secret["salt"]) != secret["commitment"]:
        raise DataError(f"{path} does not fit its commitment: the order or the salt was changed.")
    return order


def spend_day(sealed: Path, team: str, name: str, today: str | None = None) -> None:
    """Write into the ledger that a team is scored today.

    Parameters
    ----------
    sealed
        The sealed half.
    team, name
        Who asks, and for which entry.
    today
        Date of today (UTC); by default that of the clock.

    Raises
    ------
    DataError
        If the team was scored today; the ledger then counts the attempt.
    """
    day = today or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    with FileLock(sealed / f"{LEDGER}.lock"):
        ledger: list[dict[str, Any]] = store.read_json(sealed / LEDGER)
        own = [row for row in ledger if row["team"] == team.lower() and row["day"] == day]
        scored = next((row["name"] for row in own if row["scored"]), None)
        row = {"day": day, "team": team.lower(), "name": name, "scored": scored is None}
        store.write_json(sealed / LEDGER, [*ledger, row])
    if scored is not None:
        raise DataError(
            f"the team {team} was scored today ({day}) with {scored!r}, and a team gets one score a day; send {name!r} "
            "tomorrow."
        )
