"""THINGS-EEG2 re-released in BIDS: BrainVision, EDF, BDF or EEGLAB recordings with an events table.

Owns which recordings there are and how the events table names the image. Reading is MNE's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Recording
from braindecode_vis.checks import DataError
from braindecode_vis.datasets.bids.meeg_raw import list_seams, list_sensors
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart
from braindecode_vis.datasets.things_eeg2.raw import TARGET_CODE, find_channels

_ENDINGS = (".vhdr", ".edf", ".bdf", ".set")
IMAGE_COLUMNS = ("stimulus_id", "stim_file", "image", "image_file", "stimulus", "stimulus_file", "trial_type")
"""Columns that may name the image, in the order in which they are tried."""


def find_bids(folder: Path) -> list[Path]:
    """Return the recordings in the ``eeg`` folder of a person or session."""
    paths = sorted((folder / "eeg").glob("*_eeg.*")) if (folder / "eeg").is_dir() else []
    return [path for path in paths if path.suffix in _ENDINGS and not path.name.startswith(".")]


def open_bids(
    path: Path,
    subject: int,
    session: int | None,
    options: Any,
    images: pd.DataFrame,
    ch_names: Sequence[str],
) -> ContinuousPart:
    """Open one recording and pair its events with the images.

    Parameters
    ----------
    options
        Has `event_column` (None to guess) and `max_dropped`.
    images
        The whole image list.

    Raises
    ------
    DataError
        If the events table is missing or no column names the images.
    """
    import mne

    where = f"subject {subject:02d}, session {session or 1:02d}, file {path}"
    try:
        raw = mne.io.read_raw(path, preload=False, verbose="error")
    except Exception as error:  # readers of many formats raise what they like
        raise DataError(
            f"{where} cannot be read ({type(error).__name__}: {error}); fetch it again."
        ) from error
    rows = find_channels(raw.ch_names, ch_names, where)
    table = _read_events(path, where)
    stimulus, column = _find_images(table, images, options.event_column, where)
    known = stimulus.notna()
    n_unknown = int((~known & ~_is_target(table, column)).sum())
    if n_unknown > options.max_dropped * len(table):
        first = table.loc[~known & ~_is_target(table, column), column].iloc[0]
        raise DataError(
            f"{where}: {n_unknown} of {len(table)} events name no image of the list in the column {column!r}, "
            f"first {first!r}: the image list belongs to another release."
        )
    sfreq = float(raw.info["sfreq"])
    events = table.loc[known, ["onset"]].astype(float).reset_index(drop=True)
    events["sample"] = np.round(events["onset"] * sfreq).astype(int)
    listed = images.set_index("stimulus_id").loc[stimulus[known]].reset_index()
    for name in ("stimulus_id", "concept", "split"):
        events[name] = listed[name].to_numpy()
    events["repetition"] = 0
    run = re.search(r"_run-([A-Za-z0-9]+)", path.name)
    recording = Recording(
        f"{subject:02d}", f"{session or 1:02d}", run[1] if run else "01", "eeg", (path,), events,
        frozenset(images["stimulus_id"]),
    )  # fmt: skip
    return ContinuousPart(
        recording, tuple(ch_names), sfreq, int(raw.n_times), _RawReader(raw, rows), list_sensors(raw, ("eeg",)),
        tuple(raw.info["bads"]), list_seams(raw),
    )  # fmt: skip


class _RawReader:
    """Reads samples of an MNE recording, in volt."""

    def __init__(self, raw: Any, rows: np.ndarray) -> None:
        self.raw, self.rows = raw, rows

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return self.raw.get_data(picks=self.rows, start=start, stop=stop)


def _read_events(path: Path, where: str) -> pd.DataFrame:
    events = path.with_name(re.sub(r"_eeg\.\w+$", "_events.tsv", path.name))
    if not events.is_file():
        raise DataError(f"{where} has no {events.name} beside it, which says which image was shown when.")
    table = pd.read_csv(events, sep="\t", na_values="n/a", keep_default_na=False)
    if "onset" not in table.columns:
        raise DataError(f"{events} has no column onset; its columns are {', '.join(table.columns)}.")
    return table


def _is_target(table: pd.DataFrame, column: str) -> pd.Series:
    """Return which events are no image at all: empty, or the code of a target."""
    text = table[column].astype(str).str.lower()
    is_target = table[column].isna() | text.isin(
        [str(TARGET_CODE), f"{TARGET_CODE}.0", "target", "stimulus", "nan"]
    )
    return is_target | text.str.contains("target")


def _find_images(
    table: pd.DataFrame, images: pd.DataFrame, column: str | None, where: str
) -> tuple[pd.Series, str]:
    """Return the stimulus id of each event (None where there is none) and the column that told it."""
    ids = frozenset(images["stimulus_id"])
    if column is not None and column not in table.columns:
        raise DataError(f"{where}: the events have no column {column!r}, only {', '.join(table.columns)}.")
    for name in [column] if column is not None else [c for c in IMAGE_COLUMNS if c in table.columns]:
        stems = table[name].map(lambda value: Path(str(value)).stem if pd.notna(value) else None)
        found = stems.where(stems.isin(ids), None)
        if found.notna().any():
            return found, str(name)
    raise DataError(
        f"{where}: no column of the events names an image of the list; the columns are "
        f"{', '.join(table.columns)}. Name the right one with --set dataset.event_column=NAME."
    )
