"""Starts a folder of arrays: looks at what lies there, and writes the missing table, ``meta.yaml`` and a configuration.

Owns what can be told from files alone: the number of trials, pictures that are named in a table, one picture per trial
in the order of the files, names of events. Nothing that is there is changed, and what cannot be told is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.datasets.array_folder import (
    TABLES,
    find_data_file,
    find_pictures,
    read_data_file,
    read_pictures,
    read_trial_table,
)
from braindecode_vis.datasets.own_data import index_pictures, match_ids

CONFIG = "decode.yaml"
_LABELS = ("labels.npy", "y.npy", "shown.npy")
_CLASS_COLUMNS = ("concept", "label", "class", "category", "condition", "trial_type", "event")


@dataclass(frozen=True)
class StartedFolder:
    """What was written, and what was seen, filled in or left open, one sentence each."""

    written: tuple[Path, ...]
    notes: tuple[str, ...]
    complete: bool


def start_folder(root: Path) -> StartedFolder:
    """Look at a folder and write what it lacks; no file is overwritten.

    Parameters
    ----------
    root
        Holds ``data.npy`` or another array of trials; see `braindecode_vis.datasets.array_folder`.

    Raises
    ------
    DataError
        If there is no such folder, or no trials in it.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"{root} is no folder; make it and put data.npy (trials first) and images/ into it.")
    data, given = read_data_file(find_data_file(root), root)
    notes = [f"{find_data_file(root).name}: {' x '.join(map(str, data.shape))}, trials first."]
    ids = _list_pictures(root, notes)
    there = next((root / name for name in TABLES if (root / name).is_file()), None)
    written, complete = [], True
    if there is None:
        table, complete = _make_table(root, data, given, ids, notes)
        table.to_csv(root / TABLES[0], index=False)
        written.append(root / TABLES[0])
    else:
        table = read_trial_table(there)
        notes.append(
            f"{there.name} is there, with the columns {', '.join(map(str, table.columns))}; it is kept."
        )
    about = given.get("about", {})
    texts = {"meta.yaml": _write_meta(root, data, about), CONFIG: _write_config(root, table, ids)}
    for name, text in texts.items():
        path = root / name
        if path.exists():
            notes.append(f"{name} is there; it is kept.")
        else:
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return StartedFolder(tuple(written), tuple(notes), complete)


def _list_pictures(root: Path, notes: list[str]) -> list[str]:
    place = find_pictures(root, None)
    if place is None:
        notes.append("no images/ or images.npy: classes are decoded, not pictures.")
        return []
    ids = index_pictures(read_pictures(place))[2]
    notes.append(f"{place.name}: {len(ids)} pictures, first {', '.join(ids[:3])}.")
    return ids


def _make_table(
    root: Path, data: np.ndarray, given: dict[str, Any], ids: list[str], notes: list[str]
) -> tuple[pd.DataFrame, bool]:
    """Return a table of the trials, and whether it says what every trial showed."""
    n = len(data)
    candidates = [("the metadata or events of the epochs", given["trials"])] if "trials" in given else []
    for path in sorted([*root.glob("*.csv"), *root.glob("*.tsv")]):
        try:
            candidates.append((path.name, read_trial_table(path)))
        except BraindecodeVisError as error:
            notes.append(f"{path.name} was not used: {error}")
    for name in _LABELS:
        if (root / name).is_file():
            values = np.load(root / name, allow_pickle=False)
            if values.ndim == 1:
                candidates.append((name, pd.DataFrame({"label": values})))
    for name, table in candidates:
        if len(table) != n:
            notes.append(f"{name} has {len(table)} rows for {n} trials; it was not used.")
            continue
        found = _name_columns(table.reset_index(drop=True), ids)
        if found is not None:
            notes.append(f"trials.csv has what {name} says ({', '.join(map(str, found.columns))}).")
            return found, True
    if ids and len(ids) == n:
        notes.append("one picture per trial: trials.csv takes them in the order of their names; check that.")
        return pd.DataFrame({"stimulus_id": ids}), True
    column = "stimulus_id" if ids else "concept"
    what = f"which of the {len(ids)} pictures" if ids else "which class"
    notes.append(
        f"nothing tells {what} each of the {n} trials showed: fill the column {column} of trials.csv."
    )
    return pd.DataFrame({column: [""] * n, "run": ["01"] * n}), False


def _name_columns(table: pd.DataFrame, ids: list[str]) -> pd.DataFrame | None:
    """Return the table with its columns of pictures or classes named so; None where it has neither."""
    table = table.copy()
    if ids and "stimulus_id" not in table:
        for name in table.columns:
            if table[name].notna().all():
                try:
                    match_ids(table[name].astype(str).tolist(), ids)
                except DataError:
                    continue
                table = table.rename(columns={name: "stimulus_id"})
                break
    if "concept" not in table:
        lower = {str(name).lower(): name for name in table.columns if name != "stimulus_id"}
        match = next((lower[name] for name in _CLASS_COLUMNS if name in lower), None)
        if match is not None:
            table = table.rename(columns={match: "concept"})
    known = "stimulus_id" if ids else "concept"
    return table if known in table and table[known].notna().all() else None


def _write_meta(root: Path, data: np.ndarray, about: dict[str, Any]) -> str:
    def line(key: str, value: Any, example: str, why: str) -> str:
        return f"{key}: {value}  # {why}\n" if value is not None else f"# {key}: {example}  # {why}\n"

    sfreq, has_time = about.get("sfreq"), data.ndim == 3
    return "".join(
        [
            "# What the report says of the data, and what the axes of the array mean. All entries are optional.\n",
            f"title: {root.name!r}\n",
            line("modality", about.get("modality"), "eeg", "eeg, meg, fmri or other"),
            line("unit", about.get("unit"), "microvolt", "of the values, for example percent signal change"),
            line("sfreq", None if sfreq is None else f"{sfreq:g}", "250", "samples per second")
            if has_time
            else "",
            "# tmin: -0.2  # time of the first sample in s, 0 at the onset of the picture\n"
            if has_time
            else "",
            "# channels: [Oz, O1, O2]  # names of the channels\n" if has_time else "",
            "# citation: \n# licence: \n",
            "# normalised: z-scored within run  # what was done to the values, over which trials\n",
        ]
    )


def _write_config(root: Path, table: pd.DataFrame, ids: list[str]) -> str:
    split, why = _choose_split(table, ids)
    columns = set(map(str, table.columns))
    head = [
        f"# Decodes the folder {root.name}; run it with: braindecode-vis run {CONFIG} --root {root.name}",
        "# Every setting: docs/SETTINGS.md. The guide: docs/OWN_DATA.md.",
        f"name: {''.join(c if c.isalnum() or c in '_.-' else '_' for c in root.name).lstrip('_.-') or 'mine'}",
        "seed: 0",
        "dataset: {kind: arrays}",
        f"# {why}",
        f"split: {split}",
    ]
    if ids:
        head += [
            "# What is predicted of each picture: pixels, or features of a network such as efficientnet-lite0.",
            "target: {kind: pixels}",
            "# Ridge regression; its penalty is chosen inside the training trials of each fold.",
            "encoder: {kind: ridge, alphas: [1, 10, 100, 1000, 10000, 100000, 1000000]}",
            "generator: {kind: latents}",
            "# Repetitions of a picture: averaged (fewer, cleaner trials) or single. Few pictures with many",
            "# repetitions are better taught by single trials.",
            f"repeats: {{train: {_choose_repeats(table)}, test: averaged}}",
        ]
    else:
        head += ["# lda, or logistic, which chooses a penalty.", "encoder: {kind: lda}"]
    if "group" in columns:
        head += [
            "# Intervals draw whole groups (column group); image, trial, run, session and subject are the others."
        ]
        head += ["evaluation: {resample: auto}"]
    else:
        head += [
            "# A column `group` in the trial table (block, day, person) is what intervals then resample."
        ]
    return "\n".join(head) + "\n"


def _choose_repeats(table: pd.DataFrame) -> str:
    if "stimulus_id" not in table or table["stimulus_id"].eq("").any():
        return "averaged"
    counts = table["stimulus_id"].value_counts()
    return "single" if len(counts) < 100 and counts.median() >= 8 else "averaged"


def _choose_split(table: pd.DataFrame, ids: list[str]) -> tuple[str, str]:
    """Return the split that fits the table, and why, in words for a comment."""
    if "split" in table and {"train", "test"} <= set(table["split"].astype(str)):
        return "{kind: published}", "The split that the trial table declares."
    if ids:
        n = min(10, table["stimulus_id"].nunique()) if "stimulus_id" in table else 10
        n = n if n >= 2 else 10
        return (
            f"{{kind: kfold, n_folds: {n}, stratify: false}}",
            "Each picture is tested once, by a decoder that never saw it; leave_one_subject_out asks for new subjects.",
        )
    if "group" in table and table["group"].nunique() > 1:
        return (
            f"{{kind: group_kfold, n_folds: {min(5, table['group'].nunique())}}}",
            "No group (block, person) is trained on and tested.",
        )
    places = [name for name in ("subject", "session", "run") if name in table]
    if "run" in table and len(table[places].drop_duplicates()) > 1:
        return "{kind: leave_one_run_out}", "Each run is decoded by the others of its subject."
    return (
        "{kind: kfold, n_folds: 5}",
        "Trials in five folds. With runs or blocks in the table, leave_one_run_out or group_kfold are the honest ones.",
    )
