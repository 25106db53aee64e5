"""Runs as entries: the predictions of a finished run in the folder that everybody else hands in."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.studies.judging.entries import CARD, read_card, write_rows
from braindecode_vis.parts.studies.judging.tracks import check_run
from braindecode_vis.pipeline.runs import Run, open_run

TEAM = "braindecode_vis"
REPOSITORY = "https://github.com/braindecode-vis/braindecode_vis"


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run and not an entry."""
    return (folder / "config.yaml").is_file() and not (folder / CARD).is_file()


def read_run_predictions(
    run: Run,
) -> tuple[dict[str, tuple[np.ndarray, list[str]]], tuple[np.ndarray, list[str], str]]:
    """Return what a finished run predicts for each subject with the ids, and its gallery with ids and space.

    Predictions of several trials of one picture are averaged.

    Raises
    ------
    DataError
        If its folds predict in different spaces.
    """
    from braindecode_vis import pipeline

    retrieved = pipeline.retrieve(run)
    found = dict[str, dict[str, list[np.ndarray]]]()
    gallery = dict[str, np.ndarray]()
    spaces = set()
    for fold in retrieved.folds:
        for part in fold.parts:
            spaces.add(part.gallery.space)
            gallery |= dict(zip(part.gallery.ids.astype(str).tolist(), part.gallery.vectors, strict=True))
            for subject, name, row in zip(
                fold.subjects[part.rows], part.queries.ids.astype(str), part.queries.vectors, strict=True
            ):
                found.setdefault(str(subject), {}).setdefault(name, []).append(np.asarray(row))
    if len(spaces) > 1:
        raise DataError(
            f"{run.folder.path} predicts in {len(spaces)} spaces, one for each fold; an entry has one."
        )
    predictions = {
        subject: (np.stack([np.mean(rows, axis=0) for _, rows in sorted(own.items())]), sorted(own))
        for subject, own in found.items()
    }
    return predictions, (np.stack([gallery[name] for name in sorted(gallery)]), sorted(gallery), spaces.pop())


def open_finished(folder: Path) -> Run:
    """Return a finished run, of which nothing is changed."""
    from braindecode_vis.config import read_config

    return open_run(read_config(folder), folder, reading=True)


def write_run_entry(
    runs: Sequence[Path],
    out: Path,
    *,
    track: str,
    card: Path | None = None,
    split: Path | None = None,
    bring: bool = False,
) -> Path:
    """Write the entry of finished runs of one configuration into an empty folder.

    Parameters
    ----------
    runs
        Run folders, each of some subjects and one seed.
    out
        Folder of the entry.
    track, split
        Name of the track, and the file of its split if that is not shipped.
    card
        ``entry.yaml`` of another team; without it, the entry is one of this package's recipes.
    bring
        Whether the first run is copied into the entry, so that others can audit it.

    Raises
    ------
    DataError
        If a run tests other pictures than the track, two predict the same, or their galleries differ.
    """
    opened = [open_finished(folder) for folder in runs]
    if bring and len(opened) > 1:
        raise DataError(
            "only an entry of one run can contain it; submit one run, of all subjects and one seed."
        )
    for run in opened:
        check_run(run, track, split)
    seeds = sorted({run.config.seed for run in opened})
    gallery: tuple[np.ndarray, list[str], str] | None = None
    for run in opened:
        predictions, shown = read_run_predictions(run)
        place = out / "predictions" / (f"seed-{run.config.seed}" if len(seeds) > 1 else "")
        place.mkdir(parents=True, exist_ok=True)
        for subject, (values, names) in predictions.items():
            if (place / f"{subject}.npy").exists():
                raise DataError(
                    f"two of the runs predict subject {subject} with seed {run.config.seed}; give each once."
                )
            write_rows(place / subject, values, names)
        same = gallery is None or (
            shown[1:] == gallery[1:]
            and shown[0].shape == gallery[0].shape
            and np.allclose(shown[0], gallery[0], rtol=1e-3, atol=1e-5)
        )
        if not same:
            raise DataError(f"{run.folder.path} ranks in another gallery than {runs[0]}; an entry has one.")
        gallery = shown
    assert gallery is not None
    vectors, ids, space = gallery
    write_rows(out / "gallery", vectors, ids)
    config = opened[0].config
    content = {
        "name": config.name,
        "team": TEAM,
        "code": REPOSITORY,
        "weights": "none",
        "licence": "CC0-1.0",
        "extra_data": [f"the image encoder {config.target.kind}"] if config.target.kind != "pixels" else [],
        "hours": round(sum(_count_hours(run) for run in opened), 4),
        "hardware": "CPU",
        "chosen": {
            "on": "validation",
            "epoch": "as the configuration says, never by the queries of the track",
            "settings": "as the shipped configuration; penalties inside the training trials",
        },
        "floor": "ridge" if config.encoder.kind == "ridge" else "",
    } | ({} if card is None else read_card(card).model_dump(mode="json"))
    content |= {"seeds": seeds, "space": space, "split": ""}
    (out / CARD).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if bring:
        shutil.copytree(runs[0], out / "run")
    return out


def _count_hours(run: Run) -> float:
    """Return the hours of computing that the stages of a run up to its predictions recorded."""
    return sum(float(row.get("seconds") or 0) for row in run.folder.list_profiles()) / 3600
