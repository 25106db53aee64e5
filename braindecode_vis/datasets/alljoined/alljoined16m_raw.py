"""Raw blocks of Alljoined-1.6M: EDF files with marker annotations.

Owns which files there are, the header of an EDF file, and the text of a marker (``label,value,deleted,orig_index``).
People, sessions and blocks are told by folders: the files of subject 8 in sessions 1, 3 and 4 say "Subject 19".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Recording
from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, Sensors, list_scalp_positions

FLEX2 = (
    "Cz", "Fp1", "F7", "F3", "CP5", "CP1", "P1", "P3", "P5", "P7", "PO9", "PO7", "PO3", "O1", "O9", "Pz", "POz", "Oz",
    "O10", "O2", "PO4", "PO8", "PO10", "P8", "P6", "P4", "P2", "CP2", "CP6", "F4", "F8", "Fp2",
)  # fmt: skip
"""The montage that the publication names."""
SPLITS = {"stim_train": "train", "stim_test": "test"}
ODDBALLS = range(16740, 16749)
SFREQ = 256.0
OTHER_LABELS = ("oddball", "behav", "debug")
RENAMED = {"Afz": "AFz"}  # as the recording software spells it
_MISNAMED = {(8, session): 19 for session in (1, 3, 4)}
_MAX_VOLT = 0.1  # the headset's offset is 4 mV
_NUMBER = r"[-_]?0*(\d+)$"
_TITLE = re.compile(r"Subject\s*(\d+),\s*Session\s*(\d+),\s*Block\s*(\d+)", re.IGNORECASE)
_MARKER = re.compile(r"(?:^|,)(stim_train|stim_test|oddball|behav|debug),([^,]*),([^,]*),([^,]*)$")


@dataclass(frozen=True)
class Block:
    """One EDF file and whose it is."""

    subject: int
    session: int
    block: int
    path: Path

    @property
    def where(self) -> str:
        """Subject, session, block and file, for messages."""
        return f"subject {self.subject:02d}, session {self.session:02d}, block {self.block:02d}, file {self.path}"


def find_blocks(root: Path) -> tuple[list[Block], list[str]]:
    """Return the EDF files below ``raw_eeg``, and the folders whose names mean nothing.

    Raises
    ------
    DataError
        If a block has not exactly one file, or a file names another person, session or block than its folders.
    """
    base = root / "raw_eeg" if (root / "raw_eeg").is_dir() else root
    blocks: list[Block] = []
    ignored: list[str] = []
    for person, subject in list_numbered(base, "sub", []):
        for folder, session in list_numbered(person, "session", ignored):
            for place, block in list_numbered(folder, "block", ignored):
                files = [p for p in sorted(place.glob("*.edf")) if not p.name.startswith(".")]
                if len(files) != 1:
                    raise DataError(
                        f"{place} should hold one EDF file, but holds {len(files)}; copy or fetch this block again."
                    )
                blocks.append(Block(subject, session, block, files[0]))
    for item in blocks:
        _check_title(item)
    return sorted(blocks, key=lambda b: (b.subject, b.session, b.block)), ignored


def list_numbered(folder: Path, prefix: str, ignored: list[str]) -> list[tuple[Path, int]]:
    """Return the folders called `prefix` and a number, with the number; note the others in `ignored`."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        match = re.match(prefix + _NUMBER, path.name)
        if match:
            found.append((path, int(match[1])))
        elif path.name.startswith(prefix):
            ignored.append("/".join(path.parts[-2:]))
    return found


def _check_title(item: Block) -> None:
    title = _TITLE.search(item.path.name)
    if title is None:
        return
    named = tuple(int(number) for number in title.groups())
    subject = _MISNAMED.get((item.subject, item.session), item.subject)
    if named[0] not in (item.subject, subject) or named[1:] != (item.session, item.block):
        raise DataError(
            f"{item.where} says subject {named[0]}, session {named[1]}, block {named[2]} in its name: it lies in the "
            "wrong "
            "folder; copy or fetch it again."
        )


# --- EDF ----------------------------------------------------------------------------------------------------------


def read_labels(path: Path, where: str) -> list[str]:
    """Return the labels of the rows of an EDF file, as they are spelled there.

    Raises
    ------
    DataError
        If it is no EDF file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        if len(head) < 256 or head[:8].strip() != b"0":
            raise DataError(f"{where} is no EDF file; fetch it again.")
        try:
            n_header, n_records = int(head[184:192]), int(head[236:244])
            n_rows = int(head[252:256])
            fields = file.read(256 * n_rows)
            labels = [fields[16 * i : 16 * (i + 1)].decode("latin1").strip() for i in range(n_rows)]
            start = 216 * n_rows
            n_samples = [int(fields[start + 8 * i : start + 8 * (i + 1)]) for i in range(n_rows)]
        except ValueError as error:
            raise DataError(f"{where} has a damaged EDF header ({error}); fetch it again.") from error
    expected = n_header + 2 * sum(n_samples) * n_records
    if n_records >= 0 and size < expected:
        raise DataError(
            f"{where} is truncated: {size} of {expected} bytes are there; copy or fetch it again."
        )
    return labels


def find_electrodes(labels: Sequence[str]) -> dict[str, str]:
    """Return electrodes by name, each with its label in the file; counters, quality and motion rows are left out.

    Examples
    --------
    >>> find_electrodes(["TimestampS", "Counter", "Cz", "Afz", "CQ_Cz", "Battery"])
    {'Cz': 'Cz', 'AFz': 'Afz'}
    """
    named = {RENAMED.get(label, label): label for label in labels}
    return {name: label for name, label in named.items() if name in list_scalp_positions()}


def open_edf(path: Path, labels: Sequence[str], where: str) -> Any:
    """Open an EDF file with MNE, only the rows of the given labels, without reading samples."""
    import mne

    try:
        return mne.io.read_raw_edf(path, include=list(labels), preload=False, verbose="error")
    except Exception as error:  # a reader of damaged bytes raises what it likes
        raise DataError(
            f"{where} cannot be read ({type(error).__name__}: {error}); fetch it again."
        ) from error


@dataclass(frozen=True)
class EdfReader:
    """Reads samples of one block in V, shape (n_channels, n_samples)."""

    raw: Any
    rows: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return samples `start` to `stop`."""
        return self.raw.get_data(picks=self.rows, start=start, stop=stop)


# --- markers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Markers:
    """What the annotations of a block say.

    Parameters
    ----------
    events : DataFrame
        One row per picture shown: `onset` (s), `image` (its number) and `split`.
    counts
        How many annotations were left out, by reason.
    """

    events: pd.DataFrame
    counts: dict[str, int]


def parse_markers(onsets: Sequence[float], texts: Sequence[str], where: str) -> Markers:
    """Read the markers of one block.

    Oddballs, responses and debug markers are no pictures of the data set; markers flagged as deleted (a third field
    above 0) were withdrawn during the recording; a repeated marker at the same time counts once.

    Raises
    ------
    DataError
        If a picture marker has no number, or there is none at all.
    """
    rows: list[tuple[float, int, str]] = []
    counts: dict[str, int] = {}
    seen: set[tuple[float, int]] = set()
    for onset, text in sorted(
        zip(map(float, onsets), map(str, texts), strict=True), key=lambda pair: pair[0]
    ):
        match = _MARKER.search(text.strip())
        if match is None:
            if text.strip().startswith("stim"):
                raise DataError(
                    f"{where} has the marker {text!r} at {onset:.3f} s, where label,value,deleted,orig_index is "
                    "expected."
                )
            counts["other"] = counts.get("other", 0) + 1
            continue
        label, value, deleted, _ = match.groups()
        if label in OTHER_LABELS:
            counts[label] = counts.get(label, 0) + 1
            continue
        if not value.strip().isdigit():
            raise DataError(f"{where} has the marker {text!r} at {onset:.3f} s, which names no picture.")
        if deleted.strip().lower() == "true" or (deleted.strip().isdigit() and int(deleted) > 0):
            counts["deleted"] = counts.get("deleted", 0) + 1
        elif (onset, int(value)) in seen:
            counts["repeated"] = counts.get("repeated", 0) + 1
        else:
            seen.add((onset, int(value)))
            rows.append((onset, int(value), SPLITS[label]))
    if not rows:
        raise DataError(
            f"{where} has {len(texts)} annotations, none of which is a stim_train or stim_test marker."
        )
    return Markers(pd.DataFrame(rows, columns=["onset", "image", "split"]), counts)


def open_block(
    block: Block, names: tuple[str, ...], concept: Callable[[int], str]
) -> tuple[ContinuousPart, dict[str, int]]:
    """Open one block as a lazy part, and say how many markers were left out.

    Parameters
    ----------
    names
        Electrodes to read, in this order.
    concept
        Gives the concept of a picture's number.

    Raises
    ------
    DataError
        If an electrode is missing, or the file is not what it should be.
    """
    electrodes = find_electrodes(read_labels(block.path, block.where))
    missing = [name for name in names if name not in electrodes]
    if missing:
        raise DataError(
            f"{block.where} lacks the channel(s) {', '.join(missing)}; it has {', '.join(electrodes)}: another "
            "montage, "
            "or choose those that all have with --set dataset.channels=[...]."
        )
    raw = open_edf(block.path, list(electrodes.values()), block.where)
    every = np.array([raw.ch_names.index(label) for label in electrodes.values()])
    rows = np.array([raw.ch_names.index(electrodes[name]) for name in names])
    sfreq = float(raw.info["sfreq"])
    if not np.isclose(sfreq, SFREQ, rtol=1e-6):
        raise DataError(f"{block.where} has {sfreq:g} Hz, where {SFREQ:g} Hz is published.")
    markers = parse_markers(raw.annotations.onset, raw.annotations.description, block.where)
    reader = EdfReader(raw, rows)
    if np.abs(reader(0, min(raw.n_times, 256))).max() > _MAX_VOLT:
        raise DataError(f"{block.where} has no scalp potentials in V: its header names another unit.")
    events = markers.events
    catch = events["image"].isin(ODDBALLS)
    if catch.any():
        raise DataError(
            f"{block.where} marks the oddball {events.loc[catch, 'image'].iloc[0]} as a picture: numbers and pictures "
            "are shifted against each other."
        )
    events = events.assign(
        sample=np.round(events["onset"] * sfreq).astype(int), repetition=0,
        stimulus_id=[f"{image:05d}" for image in events["image"]],
        concept=[concept(image) for image in events["image"]],
    ).drop(columns="image")  # fmt: skip
    recording = Recording(
        f"{block.subject:02d}", f"{block.session:02d}", f"{block.block:02d}", "eeg", (block.path,), events
    )
    sensors = Sensors(tuple(electrodes), EdfReader(raw, every))
    return ContinuousPart(recording, names, sfreq, int(raw.n_times), reader, sensors), markers.counts
