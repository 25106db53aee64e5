"""What was shown when in THINGS-EEG1: its events tables, read by column name in every form they come in.

Two forms of ``events.tsv`` are about: one gives `onset` in milliseconds and no samples, the other in seconds with a
column `sample` at 1000 Hz; `duration` is in milliseconds in both. The form is told by `sample`, or by the pace of the
presentation, which is 10 images per second. Concepts come from the path in `stim`: `object` is -1 on test trials, and
`objectnumber` follows another order than the THINGS concept list. Does no reading of samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns
from braindecode_vis.datasets.bids.meeg_raw import read_numbers, read_text_table

CLOCK_HZ = 1000.0  # of `sample`, and of the raw recordings
SOA_S = 0.1
TEST_LIST = "test_images.csv"
_COLUMNS = ("onset", "sample", "stim", "object", "isteststim", "teststimnumber", "istarget")
_IMAGE = re.compile(r"^(?:.*/)?([^/]+)/([^/]+)\.(?:jpg|jpeg|png)$", re.IGNORECASE)


def read_events(path: Path, where: str, listed_tests: frozenset[str]) -> pd.DataFrame:
    """Return one row per presentation, in the order of time.

    Parameters
    ----------
    path
        The ``events.tsv`` of one person.
    listed_tests
        Ids of the test images, for tables that do not mark their test trials.

    Returns
    -------
    DataFrame
        `onset` (s), `stimulus_id`, `concept`, `file` (``concept/name.jpg``), `is_test` and `is_target`.

    Raises
    ------
    DataError
        If a column is missing, an image cannot be told, or the onsets fit neither unit.
    """
    table = read_text_table(path, where, _COLUMNS)
    check_columns(table.columns, ("onset", "stim"), what=str(path))
    events = pd.DataFrame({"onset": _read_onsets(table, path)})
    images = _read_images(table, path)
    events = pd.concat([events, images], axis=1)
    events["is_test"] = events["stimulus_id"].isin(listed_tests)
    for column, mark in (("isteststim", lambda v: v == 1), ("teststimnumber", lambda v: v >= 0)):
        if column in table.columns:
            events["is_test"] |= mark(read_numbers(table, column, path))
    events["is_target"] = read_numbers(table, "istarget", path) == 1 if "istarget" in table.columns else False
    _check_objects(table, events, path)
    late = np.flatnonzero(np.diff(events["onset"]) < 0)
    if len(late):
        raise DataError(f"{path} is not sorted by onset: line {late[0] + 3} lies before line {late[0] + 2}.")
    return events


def _read_onsets(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Return the onsets in s."""
    onset = read_numbers(table, "onset", path)
    step = float(np.median(np.diff(onset))) if len(onset) > 1 else np.nan
    for scale in (1.0, 1 / CLOCK_HZ):
        if abs(step * scale - SOA_S) < 0.2 * SOA_S:
            break
    else:
        raise DataError(
            f"{path} has its events {step:g} apart, where THINGS-EEG1 shows an image every 0.1 s: its onsets are "
            "neither in seconds nor in milliseconds, or the table is of another experiment (THINGS-EEG2 is not "
            "THINGS-EEG1)."
        )
    seconds = onset * scale
    if "sample" in table.columns:
        sample = read_numbers(table, "sample", path)
        apart = np.flatnonzero(np.abs(sample / CLOCK_HZ - seconds) > 1.5 / CLOCK_HZ)
        if len(apart):
            raise DataError(
                f"{path} contradicts itself in line {apart[0] + 2}: sample {sample[apart[0]]:.0f} at 1000 Hz, but "
                f"onset {onset[apart[0]]:g}; fetch it again."
            )
        return sample / CLOCK_HZ
    return seconds


def _read_images(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    stim = table["stim"].fillna("").str.replace("\\", "/", regex=False)
    parts = stim.str.extract(_IMAGE)
    bad = np.flatnonzero(parts[0].isna())
    if len(bad):
        raise DataError(
            f"{path} names no image in line {bad[0] + 2} of the column stim ({table['stim'].iloc[bad[0]]!r}), where "
            "stimuli\\concept\\name.jpg is expected."
        )
    foreign = [i for i, (c, n) in enumerate(zip(parts[0], parts[1], strict=True)) if not n.startswith(c)]
    if foreign:
        raise DataError(
            f"{path} pairs the concept {parts[0].iloc[foreign[0]]!r} with the image {parts[1].iloc[foreign[0]]!r} in "
            f"line {foreign[0] + 2} ({len(foreign)} such lines): the paths are not those of THINGS."
        )
    name = stim.str.rsplit("/", n=1).str[-1]
    return pd.DataFrame({"stimulus_id": parts[1], "concept": parts[0], "file": parts[0] + "/" + name})


def _check_objects(table: pd.DataFrame, events: pd.DataFrame, path: Path) -> None:
    """Compare the concept of each path with the column `object`, which test trials leave at -1."""
    if "object" not in table.columns:
        return
    told = table["object"].to_numpy(object)
    differs = (
        (told != "-1") & table["object"].notna().to_numpy() & (told != events["concept"].to_numpy(object))
    )
    if differs.any():
        line = int(np.flatnonzero(differs)[0])
        raise DataError(
            f"{path} names the object {told[line]!r} but shows {events['file'].iloc[line]} in line {line + 2} "
            f"({int(differs.sum())} such lines): its columns are shifted against each other."
        )


def read_test_list(root: Path) -> frozenset[str]:
    """Return the ids in ``test_images.csv`` (no header, ``concept/name.jpg``), which some copies lack."""
    path = root / TEST_LIST
    if not path.is_file():
        return frozenset()
    lines = [line.strip().strip('"').replace("\\", "/") for line in path.read_text().splitlines()]
    return frozenset(Path(line.split(",")[0]).stem for line in lines if line)


def find_test_images(tables: Iterable[Path]) -> frozenset[str]:
    """Return the test images of the first table that marks any; all people saw the same ones."""
    for path in tables:
        events = read_events(path, str(path), frozenset())
        if events["is_test"].any():
            return frozenset(events.loc[events["is_test"], "stimulus_id"])
    return frozenset()


def read_excluded(root: Path) -> dict[int, str]:
    """Return the subjects that ``participants.tsv`` advises to leave out, with the reason."""
    path = root / "participants.tsv"
    if not path.is_file():
        return dict.fromkeys((1, 6, 18, 23), "by the published list")
    table = read_text_table(path, str(path))
    if "exclude" not in table.columns:
        return dict.fromkeys((1, 6, 18, 23), "by the published list")
    out = table[table["exclude"].astype(str) == "1"]
    why = (
        out["note_IZ"].fillna("no reason given")
        if "note_IZ" in out.columns
        else ["no reason given"] * len(out)
    )
    return {
        int(re.sub(r"\D", "", name)): str(note) for name, note in zip(out["participant_id"], why, strict=True)
    }
