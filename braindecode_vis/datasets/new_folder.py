"""Starts a folder of arrays: reads its files, and writes the missing table, ``meta.yaml`` and a configuration.

Owns the facts that files alone can show: the number of trials, pictures that are named in a table, one picture per
trial in the order of the files, names of events. No existing file is changed, and unknown facts are reported.
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
    find_written,
    read_array_folder,
    read_data_file,
    read_pictures,
    read_trial_table,
)
from braindecode_vis.datasets.own_data import choose_split, complete_trials, index_pictures, match_ids

CONFIG = "decode.yaml"
_LABELS = ("labels.npy", "y.npy", "shown.npy")
_PICTURE_WORDS = ("stim", "pict", "image", "img", "shown", "photo", "file")
_CLASS_COLUMNS = ("concept", "label", "class", "category", "condition", "trial_type", "event")


@dataclass(frozen=True)
class StartedFolder:
    """The written files, and remarks on what was found, filled in or left open, one sentence each."""

    written: tuple[Path, ...]
    notes: tuple[str, ...]
    complete: bool


def start_folder(root: Path) -> StartedFolder:
    """Read a folder and write its missing files; no file is overwritten.

    Parameters
    ----------
    root
        Folder with ``data.npy`` or another array of trials; see `braindecode_vis.datasets.array_folder`.

    Raises
    ------
    DataError
        If there is no such folder, or no trials in it.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder; make it and put data.npy (trials first) and images/ into it."
        )
    if find_written(root) is not None:
        return _start_written(root)
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
        names = ", ".join(map(str, read_trial_table(there).columns))
        notes.append(f"{there.name} exists already, with the columns {names}; it is not changed.")
    about = given.get("about", {})
    _write(root / "meta.yaml", _write_meta(root, data, about), written, notes)
    trials, n_pictures = complete_trials(pd.DataFrame({"stimulus_id": range(len(data))}))[0], len(ids)
    if complete:
        # Read as in `run`: the split is the one that `decode` would use, and files that do not fit are an error now.
        try:
            own = read_array_folder(root)
            trials, n_pictures = own.responses.trials, len(own.stimuli) if own.knows_images else 0
        except DataError as error:
            notes.append(str(error))
            complete = False
    _write(root / CONFIG, _write_config(root, trials, n_pictures), written, notes)
    return StartedFolder(tuple(written), tuple(notes), complete)


def _start_written(root: Path) -> StartedFolder:
    """Write the configuration of a folder that `Data.save` wrote, in which nothing else is missing."""
    own = read_array_folder(root)
    shape = " x ".join(map(str, own.responses.data.shape))
    written: list[Path] = []
    notes = [f"responses: {shape}, trials first, with their table, as they were saved."]
    n_pictures = len(own.stimuli) if own.knows_images else 0
    _write(root / CONFIG, _write_config(root, own.responses.trials, n_pictures), written, notes)
    return StartedFolder(tuple(written), tuple(notes), True)


def _write(path: Path, text: str, written: list[Path], notes: list[str]) -> None:
    if path.exists():
        notes.append(f"{path.name} exists already; it is not changed.")
    else:
        path.write_text(text, encoding="utf-8")
        written.append(path)


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
    """Return a table of the trials, and whether it has the picture or class of every trial."""
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
        found = _name_columns(table.reset_index(drop=True), ids, unnamed=(root / "images.npy").is_file())
        if found is not None:
            notes.append(f"trials.csv has the columns of {name} ({', '.join(map(str, found.columns))}).")
            return found, True
    if ids and len(ids) == n:
        notes.append("one picture per trial: trials.csv lists them in the order of their names; check this.")
        return pd.DataFrame({"stimulus_id": ids}), True
    column = "stimulus_id" if ids else "concept"
    what = f"which of the {len(ids)} pictures" if ids else "which class"
    notes.append(
        f"no file says {what} each of the {n} trials showed: fill the column {column} of trials.csv."
    )
    return pd.DataFrame({column: [""] * n, "run": ["01"] * n}), False


def _name_columns(table: pd.DataFrame, ids: list[str], *, unnamed: bool) -> pd.DataFrame | None:
    """Return the table with its columns of pictures or classes renamed; None if it has neither."""
    table = table.copy()
    if ids and "stimulus_id" not in table:
        for name in table.columns:
            if _names_pictures(table[name], str(name), ids, unnamed=unnamed):
                table = table.rename(columns={name: "stimulus_id"})
                break
    if "concept" not in table:
        lower = {str(name).lower(): name for name in table.columns if name != "stimulus_id"}
        match = next((lower[name] for name in _CLASS_COLUMNS if name in lower), None)
        if match is not None:
            table = table.rename(columns={match: "concept"})
    known = "stimulus_id" if ids else "concept"
    return table if known in table and table[known].notna().all() else None


def _names_pictures(column: pd.Series, name: str, ids: list[str], *, unnamed: bool) -> bool:
    """Whether a column identifies the picture of a trial; numbers may mean something else, such as runs or blocks."""
    if column.isna().any():
        return False
    shown = column.map(str).tolist()
    whole = all(value.isdecimal() for value in shown)
    if whole and not any(word in name.lower() for word in _PICTURE_WORDS) and len(set(shown)) < len(ids):
        return False
    if unnamed:  # numbers of any kind; ``first_id`` of ``meta.yaml`` then says where they begin
        return whole and len(set(shown)) <= len(ids)
    try:
        match_ids(shown, ids)
    except DataError:
        return False
    return True


def _write_meta(root: Path, data: np.ndarray, about: dict[str, Any]) -> str:
    def line(key: str, value: Any, example: str, why: str) -> str:
        return f"{key}: {value}  # {why}\n" if value is not None else f"# {key}: {example}  # {why}\n"

    sfreq, has_time = about.get("sfreq"), data.ndim == 3
    return "".join(
        [
            "# Facts about the data for the report, and the meaning of the axes of the array. All "
            "entries are optional.\n",
            f"title: {root.name!r}\n",
            line("modality", about.get("modality"), "eeg", "eeg, meg, fmri or other"),
            line("unit", about.get("unit"), "microvolt", "of the values, for example percent signal change"),
            line("sfreq", None if sfreq is None else f"{sfreq:g}", "250", "samples per second")
            if has_time
            else "",
            "# first_id: 1  # images.npy: the number of its first picture; the others count on\n"
            if (root / "images.npy").is_file()
            else "",
            "# tmin: -0.2  # time of the first sample in s, 0 at the onset of the picture\n"
            if has_time
            else "",
            "# channels: [Oz, O1, O2]  # names of the channels\n" if has_time else "",
            "# citation: \n# licence: \n",
            "# normalised: z-scored within run  # what was done to the values, over which trials\n",
        ]
    )


def _write_config(root: Path, table: pd.DataFrame, n_pictures: int) -> str:
    """Return a configuration with the defaults of `decode`, with comments."""
    split, why = choose_split(table, n_pictures)
    head = [
        f"# Decodes the folder {root.name}; run it with: braindecode-vis run {CONFIG} --root {root.name}",
        "# Every setting: docs/SETTINGS.md. The guide: docs/OWN_DATA.md.",
        f"name: {''.join(c if c.isalnum() or c in '_.-' else '_' for c in root.name).lstrip('_.-') or 'mine'}",
        "seed: 0",
        "dataset: {kind: arrays}",
        f"# {why}",
        f"split: {{{', '.join(f'{key}: {value}' for key, value in split.items())}}}",
    ]
    if n_pictures:
        head += [
            "# What is predicted of each picture: pixels, or features of a network such as efficientnet-lite0.",
            "target: {kind: pixels}",
            "# Ridge regression; its penalty is chosen inside the training trials of each fold, of encoder.alphas.",
            "encoder: {kind: ridge}",
            "generator: {kind: latents}",
            "# Repetitions of a picture: averaged (fewer, cleaner trials) or single. Few pictures with many",
            "# with repetitions, training on single trials is often better; the run then gives a hint.",
            "repeats: {train: averaged, test: averaged}",
        ]
    else:
        head += ["# lda, or logistic, which chooses a penalty.", "encoder: {kind: lda}"]
    if "group" in table:
        head += [
            "# Intervals draw whole groups (column group); image, trial, run, session and subject are the others."
        ]
        head += ["evaluation: {resample: auto}"]
    else:
        head += ["# If the trial table has a column `group` (block, day, person), intervals resample it."]
    return "\n".join(head) + "\n"
