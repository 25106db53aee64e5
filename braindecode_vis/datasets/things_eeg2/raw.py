"""Raw sessions of THINGS-EEG2: one pickled dictionary per session and partition, read piece by piece.

Owns the reading of ``raw_eeg_{training,test}.npy``: channels, pulses of the stim channel, and which image each pulse
means. Codes start at 1; 99999 marks a target trial and is left out. Does no signal processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Recording
from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, Sensors
from braindecode_vis.datasets.sources.safe_pickle import FileArray, read_pickled_dict

TARGET_CODE = 99999
_KEYS = ("raw_eeg_data", "ch_names", "sfreq")


@dataclass(frozen=True)
class RawFile:
    """What one raw file says of itself.

    Parameters
    ----------
    data
        Samples of shape (n_channels + 1, n_samples), in the file.
    ch_names
        EEG channels, in the order of the rows.
    stim_row
        Row of the pulses.
    sfreq
        In Hz.
    """

    path: Path
    data: FileArray
    ch_names: tuple[str, ...]
    stim_row: int
    sfreq: float


def open_raw(path: Path, content: dict[str, Any] | None = None) -> RawFile:
    """Read everything of a raw file but its samples.

    Raises
    ------
    DataError
        If it is damaged or is not a raw session.
    """
    content = read_pickled_dict(path) if content is None else content
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise DataError(f"{path} is no raw THINGS-EEG2 session: it lacks {', '.join(missing)}.")
    data, names = content["raw_eeg_data"], tuple(map(str, content["ch_names"]))
    if not isinstance(data, FileArray):
        raise DataError(
            f"{path} holds only {np.size(data)} samples: it is cut short; copy or fetch it again."
        )
    if len(data.shape) != 2 or data.shape[0] != len(names) or data.dtype.kind != "f":
        raise DataError(
            f"{path} names {len(names)} channels, but its samples are {data.dtype} of shape {data.shape}."
        )
    if names.count("stim") != 1:
        raise DataError(f"{path} must have one channel called stim; its channels are {', '.join(names)}.")
    stim = names.index("stim")
    return RawFile(path, data, names[:stim] + names[stim + 1 :], stim, float(content["sfreq"]))


def read_pulses(raw: RawFile) -> tuple[np.ndarray, np.ndarray]:
    """Return the sample and the code of every pulse, targets included."""
    stim = raw.data.read_columns(np.array([raw.stim_row]), 0, raw.data.shape[1])[0]
    if not np.isfinite(stim).all():
        raise DataError(f"{raw.path} has non-finite values in its stim channel; copy or fetch it again.")
    changed = np.flatnonzero(stim)
    # A pulse longer than one sample counts once.
    is_start = np.ones(len(changed), dtype=bool)
    is_start[1:] = (np.diff(changed) > 1) | (np.diff(stim[changed]) != 0)
    samples = changed[is_start]
    return samples, stim[samples].astype(np.int64)


def make_raw_part(
    raw: RawFile,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    *,
    subject: str,
    session: str,
    run: str,
    max_dropped: float,
) -> ContinuousPart:
    """Pair the pulses of a file with the images of its partition.

    Parameters
    ----------
    images : DataFrame
        Rows of the image list that belong to this partition, in the order of their codes.
    ch_names
        Channels to read, in this order.
    max_dropped
        Largest share of events that may lack or exceed the common number of repetitions.

    Raises
    ------
    DataError
        If a channel is missing, a code means no image, or events do not match the images.
    """
    where = f"subject {subject}, session {session}, file {raw.path}"
    rows = find_channels(raw.ch_names, ch_names, where)
    rows = rows + (rows >= raw.stim_row)
    samples, codes = read_pulses(raw)
    shown = codes != TARGET_CODE
    samples, codes = samples[shown], codes[shown]
    check_codes(codes, images, where, max_dropped)
    listed = images.iloc[codes - 1]
    events = pd.DataFrame(
        {
            "onset": samples / raw.sfreq,
            "sample": samples,
            "stimulus_id": listed["stimulus_id"].to_numpy(),
            "concept": listed["concept"].to_numpy(),
            "split": listed["split"].to_numpy(),
            "repetition": 0,
        }
    )
    recording = Recording(subject, session, run, "eeg", (raw.path,), events, frozenset(images["stimulus_id"]))
    read = partial(raw.data.read_columns, rows)
    every = np.arange(len(raw.ch_names))
    sensors = Sensors(raw.ch_names, partial(raw.data.read_columns, every + (every >= raw.stim_row)))
    return ContinuousPart(recording, tuple(ch_names), raw.sfreq, raw.data.shape[1], read, sensors)


def find_channels(available: Sequence[str], wanted: Sequence[str], where: str) -> np.ndarray:
    """Return the row of each wanted channel; channels are matched by name, never by position."""
    repeated = sorted({name for name in available if list(available).count(name) > 1})
    if repeated:
        raise DataError(f"{where} names the channel {repeated[0]} more than once.")
    missing = [name for name in wanted if name not in available]
    if missing:
        rest = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"{where} lacks the channel(s) {', '.join(missing[:8])}{rest}; it has {', '.join(available)}: "
            "another montage, or choose others with --set dataset.channels."
        )
    return np.array([list(available).index(name) for name in wanted])


def check_codes(codes: np.ndarray, images: pd.DataFrame, where: str, max_dropped: float) -> None:
    """Raise `DataError` unless every code means an image and images are shown equally often."""
    if len(codes) == 0:
        raise DataError(f"{where} has no event of an image in its stim channel.")
    unknown = codes[(codes < 1) | (codes > len(images))]
    if len(unknown):
        raise DataError(
            f"{where} has {len(unknown)} event(s) that mean no image, first code {unknown[0]}, where "
            f"{len(images)} images are listed (codes from 1): the image list belongs to another release."
        )
    counts = np.bincount(codes)
    counts = counts[counts > 0]
    expected = np.bincount(counts).argmax()
    n_wrong = int(np.abs(counts - expected).sum())
    if n_wrong > max_dropped * len(codes):
        raise DataError(
            f"{where} does not match its images: {len(codes)} events show {len(counts)} images, most of them "
            f"{expected} times, but {n_wrong} event(s) are missing or too many, above the bound of {max_dropped:.1%}."
        )
