"""Raw runs of THINGS-MEG: which there are, their sensors, and when each picture appeared.

Owns the BIDS tree of ds004212. CTF folders are opened by MNE's CTF reader, since ``channels.tsv`` types every sensor
``OTHER``. macOS leftovers (``._*``) and the empty room are no recordings. An onset is the time at which the optical
sensor saw the picture (events table), as in the authors' own epochs, or the trigger on ``UPPT001``, which differs by
about 150 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Recording
from braindecode_vis.checks import DataError, check_columns
from braindecode_vis.datasets.bids.meeg_raw import (
    RawReader,
    check_length,
    check_subset,
    list_channels,
    list_seams,
    list_sensors,
    open_recording,
    read_numbers,
    read_text_table,
)
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart
from braindecode_vis.datasets.things_eeg2.raw import find_channels
from braindecode_vis.datasets.things_meg.tables import name_events

Onset = Literal["optical", "trigger"]
DROPPED_SENSOR = "MRO11-1609"  # malfunctioned, by the authors' notes
TRIGGER_CHANNEL, STIMULUS_CODE = "UPPT001", 64
LARGEST_LAG_S = 0.5  # pictures follow each other after 1.3 s or more
# Signal dropouts of 0.2 s (subject, session, run: start in s) that the authors replace in their preprocessing.
DROPOUTS = {(1, 11, 5): 13.4, (2, 10, 3): 59.8}
_RUN = re.compile(r"sub-BIGMEG(\d+)_ses-(\d+)_task-main_run-(\d+)_meg\.(ds|fif)$")


@dataclass(frozen=True)
class Run:
    """One recording."""

    subject: int
    session: int
    run: int
    path: Path

    @property
    def where(self) -> str:
        """Subject, session and file, for messages."""
        return f"subject {self.subject:02d}, session {self.session:02d}, run {self.run:02d}, file {self.path}"

    @property
    def events(self) -> Path:
        """The events table."""
        return self.path.with_name(re.sub(r"_meg\.\w+$", "_events.tsv", self.path.name))


def find_runs(root: Path, subjects: Sequence[int] | None, sessions: Sequence[int] | None) -> list[Run]:
    """Return the runs of the chosen subjects and sessions, in their order.

    Raises
    ------
    DataError
        If a subject, session or run is missing.
    """
    found = []
    for path in sorted(root.glob("sub-BIGMEG*/ses-*/meg/sub-BIGMEG*_meg.*")):
        match = _RUN.match(path.name)
        if match:
            found.append(Run(int(match[1]), int(match[2]), int(match[3]), path))
    there = sorted({run.subject for run in found})
    if not found:
        return []
    chosen = check_subset(subjects, there, what=f"below {root}, subject", option="dataset.subjects")
    longest = sorted({run.session for run in found})
    wanted = check_subset(sessions, longest, what=f"below {root}, session", option="dataset.sessions")
    runs = []
    for subject in chosen:
        for session in wanted:
            here = [run for run in found if (run.subject, run.session) == (subject, session)]
            numbers = [run.run for run in here]
            last = max((run.run for run in found if run.session == session), default=0)
            missing = sorted(set(range(1, last + 1)) - set(numbers))
            if missing:
                raise DataError(
                    f"subject {subject:02d}, session {session:02d} of THINGS-MEG lacks run {missing[0]:02d} "
                    f"below {root} (found {len(here)} of {last}); fetch it, or list others in dataset.sessions."
                )
            runs.extend(here)
    return runs


def open_run(run: Run) -> Any:
    """Open a run without its samples: a CTF folder, or the same recording as FIF."""
    if run.path.suffix != ".ds":
        return open_recording(run.path, run.where)
    import mne

    return open_recording(
        run.path, run.where, lambda: mne.io.read_raw_ctf(run.path, preload=False, verbose="error")
    )


def make_run_part(
    run: Run,
    raw: Any,
    names: pd.DataFrame,
    channels: tuple[str, ...] | None,
    onset: Onset,
    max_dropped: float,
) -> tuple[ContinuousPart, dict[str, float] | None]:
    """Pair the events of a run with the images.

    Parameters
    ----------
    names : DataFrame
        From `things_meg_tables.read_image_names`.
    channels
        Sensors to read; all gradiometers but the broken one by default.

    Returns
    -------
    part : ContinuousPart
        Without catch trials; its events also have `is_test` and `file`.
    lag : dict or None
        From `measure_lag`, where the trigger was needed.
    """
    sensors = tuple(n for n in list_channels(raw, ("mag",)) if n != DROPPED_SENSOR)
    if not sensors:
        raise DataError(f"{run.where} has no MEG sensor that its reader knows; fetch it again.")
    chosen = sensors if channels is None else channels
    rows = find_channels(raw.ch_names, chosen, run.where)
    events = read_run_events(run, raw, names)
    sfreq = float(raw.info["sfreq"])
    lag = None
    if onset == "trigger":
        shift, lag = measure_lag(run, raw, events["sample"].to_numpy())
        lost = ~np.isfinite(shift)
        if lost.sum() > max_dropped * len(events):
            raise DataError(
                f"{run.where}: {int(lost.sum())} of {len(events)} pictures have no trigger with code {STIMULUS_CODE} "
                f"within {LARGEST_LAG_S} s; set dataset.onset to optical."
            )
        events = events[~lost].reset_index(drop=True)
        events["sample"] -= np.round(shift[~lost]).astype(np.int64)
        events["onset"] = events["sample"] / sfreq
    shown = events[~events["is_catch"]].reset_index(drop=True)
    recording = Recording(
        f"{run.subject:02d}", f"{run.session:02d}", f"{run.run:02d}", "meg", (run.path, run.events), shown
    )
    start = DROPOUTS.get((run.subject, run.session, run.run))
    gap = () if start is None else ((round(start * sfreq), round((start + 0.2) * sfreq)),)
    every = list_sensors(raw, ("mag",), (DROPPED_SENSOR,))
    every = replace(every, read=replace(every.read, bridged=gap))
    reader = RawReader(raw, rows, gap)
    part = ContinuousPart(
        recording, chosen, sfreq, int(raw.n_times), reader, every, tuple(raw.info["bads"]), list_seams(raw)
    )
    return part, lag


def read_run_events(run: Run, raw: Any, names: pd.DataFrame) -> pd.DataFrame:
    """Return every event of a run with its optical onset: pictures by name, catch trials marked `is_catch`."""
    table = read_text_table(run.events, run.where)
    check_columns(table.columns, ("onset", "trial_type", "value"), what=str(run.events))
    sfreq = float(raw.info["sfreq"])
    onset = read_numbers(table, "onset", run.events)
    check_length(float(onset.max()), raw, run.where, "fetch both again")
    events = pd.DataFrame({"onset": onset, "sample": np.round(onset * sfreq).astype(np.int64)})
    if "sample" in table.columns and sfreq == 1200:
        apart = np.abs(read_numbers(table, "sample", run.events) - events["sample"]).max()
        if apart > 1:
            raise DataError(
                f"{run.events}: onset and sample differ by up to {apart:.0f} samples; fetch it again."
            )
    is_catch = (table["trial_type"] == "catch").to_numpy(bool)
    number = pd.to_numeric(table["value"], errors="coerce").to_numpy(float)
    empty = np.flatnonzero(~is_catch & ~np.isfinite(number))
    if len(empty):
        raise DataError(
            f"{run.events} gives no image number in line {empty[0] + 2}, which is no catch trial."
        )
    named = name_events(number[~is_catch].astype(np.int64), names, run.where)
    for column in ("stimulus_id", "concept", "file"):
        events[column] = None
        events.loc[~is_catch, column] = named[column].to_numpy()
    _check_categories(run, table[~is_catch], number[~is_catch], names)
    return events.assign(
        is_catch=is_catch, is_test=(table["trial_type"] == "test").to_numpy(bool), split="train", repetition=0
    )


def _check_categories(run: Run, table: pd.DataFrame, number: np.ndarray, names: pd.DataFrame) -> None:
    """Compare the concept number of each event with that of its image: a shift by one shows here."""
    if "things_category_nr" not in table.columns or names["category"].isna().all():
        return
    told = pd.to_numeric(table["things_category_nr"], errors="coerce").to_numpy(float)
    listed = names.loc[number.astype(np.int64), "category"].to_numpy(float)
    differs = np.flatnonzero(told != listed)
    if len(differs):
        at = differs[0]
        raise DataError(
            f"{run.where}: image {number[at]:.0f} has concept number {told[at]:.0f} in its events, but "
            f"{int(listed[at])} in image_concept_index.csv ({len(differs)} of {len(told)} such "
            "events): the list is shifted or of another release."
        )


def find_triggers(run: Run, raw: Any) -> np.ndarray:
    """Return the samples at which the trigger channel goes to the code of a picture."""
    if TRIGGER_CHANNEL not in raw.ch_names:
        raise DataError(f"{run.where} has no channel {TRIGGER_CHANNEL}; set dataset.onset to optical.")
    code = np.round(raw.get_data(picks=[TRIGGER_CHANNEL], verbose="error")[0]).astype(np.int64)
    return np.flatnonzero((code[1:] == STIMULUS_CODE) & (code[:-1] != STIMULUS_CODE)) + 1


def measure_lag(run: Run, raw: Any, optical: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Return by how many samples each optical onset follows its trigger (NaN without one), and a summary in ms."""
    triggers = find_triggers(run, raw)
    sfreq = float(raw.info["sfreq"])
    if not len(triggers):
        raise DataError(
            f"{run.where} has no code {STIMULUS_CODE} on {TRIGGER_CHANNEL}; set dataset.onset to optical."
        )
    right = np.clip(np.searchsorted(triggers, optical), 1, max(1, len(triggers) - 1))
    pair = triggers[np.stack([right - 1, np.minimum(right, len(triggers) - 1)])]
    nearest = np.where(np.abs(optical - pair[0]) <= np.abs(optical - pair[1]), pair[0], pair[1])
    shift = (optical - nearest).astype(float)
    shift[np.abs(shift) > LARGEST_LAG_S * sfreq] = np.nan
    known = shift[np.isfinite(shift)] / sfreq * 1000
    if not len(known):
        raise DataError(f"{run.where}: no trigger lies within {LARGEST_LAG_S} s of an optical onset.")
    summary = {
        "median_ms": float(np.median(known)),
        "min_ms": float(known.min()),
        "max_ms": float(known.max()),
        "n_without_trigger": float(len(shift) - len(known)),
        "n_triggers_more": float(len(triggers) - len(known)),
    }
    return shift, summary
