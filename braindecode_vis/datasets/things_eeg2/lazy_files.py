"""Lazy access to the files of THINGS-EEG2 in every layout.

Owns the published epochs (the authors' 100 Hz dictionaries, the 250 Hz pickles of NICE and ATM, the ``.pt`` files of
UBP and the arrays of NeuroBridge), the raw sessions (``raw_eeg_{training,test}.npy``: channels, pulses of the stim
channel, and the image of each pulse; codes start at 1, and 99999 marks a target trial and is left out), and the
re-release in BIDS with its events table. Does no signal processing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, check_columns, refuse_damage
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.bids.meeg_files import make_part, open_recording, read_text_table
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    Sensors,
    check_published_rate,
    find_channels,
)
from braindecode_vis.datasets.sources.safe_pickle import (
    FileArray,
    convert_trusted,
    open_npy,
    read_pickled_dict,
)
from braindecode_vis.datasets.things_eeg2.layouts import LaidOutFile, read_dict

if TYPE_CHECKING:
    import pandas as pd

# The covariance that the publishers describe; ours is never fitted on test trials.
_WHITENED = {
    "official": "by its authors, with the covariance of training and test trials together",
    "250hz": "by its publisher, with the covariance of the training trials of each session",
    "ubp": "by its publisher, with the covariance of the training trials of each session",
    "neurobridge": "by its publisher, with the covariance of the training trials of each session",
}


class Options(Protocol):
    """The settings that are needed to open a file."""

    trust_pickle: bool
    max_dropped: float
    sfreq: float | None
    event_column: str | None


def open_held(
    held: Sequence[LaidOutFile],
    options: Options,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    scratch: Path | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Return a lazy part for each file, and notes for the reader of the store.

    Parameters
    ----------
    images
        The image list of `read_image_list`.
    ch_names
        Channels to read, in this order.
    scratch
        Folder for converted ``.pt`` files.
    """
    parts: list[Any] = []
    for item in held:
        listed = images if item.split is None else images[images["split"] == item.split]
        if item.layout == "raw":
            parts.append(_open_raw_part(item, options, listed, ch_names))
        elif item.layout == "bids":
            parts.append(_open_bids(item, options, listed, ch_names))
        elif item.layout in ("official", "250hz"):
            content = read_dict(item)
            check_columns(content, ("preprocessed_eeg_data", "ch_names", "times"), what=item.where)
            data, times = content["preprocessed_eeg_data"], np.asarray(content["times"], dtype=float)
            parts.append(_make_part(item, options, listed, ch_names, data, content["ch_names"], times))
        elif item.layout == "neurobridge":
            parts.append(_open_neurobridge(item, options, listed, ch_names))
        else:
            parts.append(_open_ubp(item, options, listed, ch_names, scratch))
    whitening = _WHITENED.get(held[0].layout)
    notes: dict[str, Any] = {"whitening": whitening} if whitening else {}
    if held[0].layout == "official":
        notes["warnings"] = [
            "These THINGS-EEG2 epochs were whitened by their authors with the covariance of training and test trials "
            "together, so that no score on them is free of the test set; the raw sessions are."
        ]
    return parts, notes


def _open_neurobridge(
    item: LaidOutFile, options: Options, images: pd.DataFrame, ch_names: Sequence[str]
) -> EpochedPart:
    data = open_npy(item.path)
    info_path = item.path.parent / "info.json"
    if not info_path.is_file():
        raise DataError(f"{item.where} needs info.json with the channel names in its folder; fetch it again.")
    # (n_concepts, n_images, ...) -> (n_concepts * n_images, ...); nothing is copied
    data = replace(data, shape=(data.shape[0] * data.shape[1], *data.shape[2:]))
    with refuse_damage(f"{info_path} does not give the times and channels of the epochs"):
        info = json.loads(info_path.read_text())
        if "times" in info:
            times = np.asarray(info["times"], dtype=float)
        else:
            times = np.arange(data.shape[-1]) / float(info["sfreq"])
        names = [str(name) for name in info["ch_names"]]
    return _make_part(item, options, images, ch_names, data, names, times)


_CONVERT = """
import json, pathlib, sys
import numpy, torch
content = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
folder = pathlib.Path(sys.argv[2])
for key in ("eeg", "session"):
    numpy.save(folder / (key + ".npy"), numpy.ascontiguousarray(content[key]), allow_pickle=False)
images = numpy.asarray(content["img"])
names = [str(row) for row in (images if images.ndim == 1 else images[:, 0])]
plain = {"img": names, "ch_names": [str(c) for c in content["ch_names"]],
         "times": [float(t) for t in content["times"]]}
(folder / "info.json").write_text(json.dumps(plain))
"""


def _open_ubp(
    item: LaidOutFile, options: Options, images: pd.DataFrame, ch_names: Sequence[str], scratch: Path | None
) -> EpochedPart:
    folder, info = convert_trusted(
        _CONVERT, item.path, scratch, f"sub-{item.subject:02d}-{item.split}", trusted=options.trust_pickle,
        why=f"{item.where} is a .pt file that can run any code when it is opened",
    )  # fmt: skip
    session = np.load(folder / "session.npy", allow_pickle=False)
    data = open_npy(folder / "eeg.npy")
    by_name = images.set_index("stimulus_id")
    names = [Path(path).stem for path in info["img"]]
    unknown = [name for name in names if name not in by_name.index]
    if unknown:
        raise DataError(
            f"{item.where} shows {len(unknown)} image(s) outside the image list, first {unknown[0]!r}: the image set "
            "belongs to another release."
        )
    shown = by_name.loc[names].reset_index()
    return _make_part(
        item, options, shown, ch_names, data, info["ch_names"], np.asarray(info["times"]), session=session
    )


def _make_part(
    item: LaidOutFile,
    options: Options,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    data: Any,
    names: Any,
    times: np.ndarray,
    session: np.ndarray | None = None,
) -> EpochedPart:
    """Label the epochs of one file; `images` has one row per image of the file, in its order."""
    if isinstance(data, np.ndarray):
        data = _SmallArray(data, data.shape)
    if len(data.shape) != 4 or data.dtype.kind != "f":
        raise DataError(
            f"{item.where} should hold numbers of shape (n_images, n_repetitions, n_channels, n_times), not "
            f"{data.dtype} of shape {data.shape}."
        )
    n_images, n_repetitions, n_channels, n_times = data.shape
    if n_images != len(images):
        raise DataError(
            f"{item.where} holds {n_images} images, but the image list has {len(images)}: another release, or the "
            "training and test files are swapped."
        )
    names = list(map(str, names))
    if len(names) != n_channels:
        raise DataError(f"{item.where} has {n_channels} channels of data but names {len(names)}.")
    times = _align_times(times, n_times, item)
    if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise DataError(f"the times of {item.where} do not increase from sample to sample; fetch them again.")
    check_published_rate(1 / float(np.median(np.diff(times))), options.sfreq, item.where)
    rows = find_channels(names, ch_names, item.where)
    trials = images.loc[images.index.repeat(n_repetitions), ["stimulus_id", "concept", "split"]]
    trials = trials.reset_index(drop=True)
    trials["subject"], trials["run"] = f"{item.subject:02d}", "n/a"
    trials["session"] = "n/a"
    if session is not None:
        # UBP counts sessions from 0.
        trials["session"] = [f"{int(s) + 1:02d}" for s in session.ravel()]
    trials["repetition"] = np.tile(np.arange(n_repetitions), n_images)
    # (n_images, n_repetitions, n_channels, n_times) -> (n_trials, n_channels, n_times)
    flat = replace(data, shape=(n_images * n_repetitions, n_channels, n_times))
    # If all channels are read, a selection would only copy each block.
    takes_all = np.array_equal(rows, np.arange(n_channels))

    def read(start: int, stop: int) -> np.ndarray:
        block = flat.read_rows(start, stop)
        return block if takes_all else block[:, rows]

    return EpochedPart(trials, (item.path,), tuple(ch_names), times, read)


@dataclass(frozen=True)
class _SmallArray:
    """A small array in memory, with the interface of an array that stays in its file."""

    array: np.ndarray
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.array.reshape(self.shape)[start:stop]


def _align_times(times: np.ndarray, n_times: int, item: LaidOutFile) -> np.ndarray:
    """Return one time per sample: in 250 Hz files, the baseline was removed from the data, not from the times."""
    if len(times) == n_times:
        return times
    if len(times) > n_times and np.isclose(times[len(times) - n_times], 0, atol=1e-6):
        return times[len(times) - n_times :]
    raise DataError(
        f"{item.where} has {n_times} samples per epoch but {len(times)} times from {times[0]:g} to "
        f"{times[-1]:g} s; they are from different releases."
    )


TARGET_CODE = 99999
_KEYS = ("raw_eeg_data", "ch_names", "sfreq")


@dataclass(frozen=True)
class RawFile:
    """Header of one raw file.

    Parameters
    ----------
    data
        Samples of shape (n_channels + 1, n_samples), in the file.
    ch_names
        EEG channels, in the order of the rows.
    stim_row
        Row of the pulses.
    sfreq
        Sampling rate in Hz.
    """

    path: Path
    data: FileArray
    ch_names: tuple[str, ...]
    stim_row: int
    sfreq: float


def open_raw(path: Path, content: dict[str, Any] | None = None) -> RawFile:
    """Read everything in a raw file except its samples.

    Raises
    ------
    DataError
        If it is damaged or is not a raw session.
    """
    content = read_pickled_dict(path) if content is None else content
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise DataError(f"{path} is not a raw THINGS-EEG2 session: it is missing {', '.join(missing)}.")
    data, names = content["raw_eeg_data"], tuple(map(str, content["ch_names"]))
    # A whole session has gigabytes, so an array small enough for memory was truncated.
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


def _open_raw_part(
    item: LaidOutFile, options: Options, images: pd.DataFrame, ch_names: Sequence[str]
) -> ContinuousPart:
    """Pair the pulses of a file with the images of its partition, in the order of their codes."""
    import pandas as pd

    raw = open_raw(item.path, read_dict(item))
    subject, session = f"{item.subject:02d}", f"{item.session or 1:02d}"
    run = "training" if item.split == "train" else "test"
    where = f"subject {subject}, session {session}, file {raw.path}"
    rows = find_channels(raw.ch_names, ch_names, where)
    # From rows of the EEG channels to rows of the file, which also has the stim channel.
    rows = rows + (rows >= raw.stim_row)
    samples, codes = read_pulses(raw)
    # Target trials show a toy of the task and not an image of the set.
    shown = codes != TARGET_CODE
    samples, codes = samples[shown], codes[shown]
    check_codes(codes, images, where, options.max_dropped)
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


def check_codes(codes: np.ndarray, images: pd.DataFrame, where: str, max_dropped: float) -> None:
    """Raise `DataError` unless every code is that of an image and images are shown equally often."""
    if len(codes) == 0:
        raise DataError(f"{where} has no event of an image in its stim channel.")
    unknown = codes[(codes < 1) | (codes > len(images))]
    if len(unknown):
        raise DataError(
            f"{where} has {len(unknown)} event(s) whose code is not an image, first code {unknown[0]}, where "
            f"{len(images)} images are listed (codes from 1): the image list belongs to another release."
        )
    counts = np.bincount(codes)
    counts = counts[counts > 0]
    # The usual number of presentations; it differs between sessions and partitions.
    expected = np.bincount(counts).argmax()
    n_wrong = int(np.abs(counts - expected).sum())
    if n_wrong > max_dropped * len(codes):
        raise DataError(
            f"{where} does not match its images: {len(codes)} events show {len(counts)} images, most of them "
            f"{expected} times, but {n_wrong} event(s) are missing or too many, above the bound of {max_dropped:.1%}."
        )


IMAGE_COLUMNS = ("stimulus_id", "stim_file", "image", "image_file", "stimulus", "stimulus_file", "trial_type")
"""Columns that may name the image, in the order in which they are tried."""


def _open_bids(
    item: LaidOutFile, options: Options, images: pd.DataFrame, ch_names: Sequence[str]
) -> ContinuousPart:
    """Open one recording and pair its events with the images of the whole list."""
    import pandas as pd

    path, subject, session = item.path, f"{item.subject:02d}", f"{item.session or 1:02d}"
    where = f"subject {subject}, session {session}, file {path}"
    raw = open_recording(path, where)
    find_channels(raw.ch_names, ch_names, where)
    events_path = path.with_name(re.sub(r"_eeg\.\w+$", "_events.tsv", path.name))
    table = read_text_table(events_path, where)
    check_columns(table.columns, ("onset",), what=str(events_path))
    stimulus, column = _find_images(table, images, options.event_column, where)
    # Targets and pauses are also events, but without an image.
    known = stimulus.notna()
    n_unknown = int((~known & ~_is_target(table, column)).sum())
    if n_unknown > options.max_dropped * len(table):
        first = table.loc[~known & ~_is_target(table, column), column].iloc[0]
        raise DataError(
            f"{where}: {n_unknown} of {len(table)} events name no image of the list in the column {column!r}, "
            f"first {first!r}: the image list belongs to another release."
        )
    sfreq = float(raw.info["sfreq"])
    events = pd.DataFrame({"onset": read_numbers(table[known], "onset", events_path)})
    events["sample"] = np.round(events["onset"] * sfreq).astype(int)
    listed = images.set_index("stimulus_id").loc[stimulus[known]].reset_index()
    for name in ("stimulus_id", "concept", "split"):
        events[name] = listed[name].to_numpy()
    events["repetition"] = 0
    run = re.search(r"_run-([A-Za-z0-9]+)", path.name)
    recording = Recording(
        subject, session, run[1] if run else "01", "eeg", (path,), events, frozenset(images["stimulus_id"])
    )
    return make_part(recording, raw, tuple(ch_names), ("eeg",), where)


def _is_target(table: pd.DataFrame, column: str) -> pd.Series:
    """Return which events are not images: empty, or the code of a target."""
    text = table[column].astype(str).str.lower()
    is_target = table[column].isna() | text.isin(
        [str(TARGET_CODE), f"{TARGET_CODE}.0", "target", "stimulus", "nan"]
    )
    return is_target | text.str.contains("target")


def _find_images(
    table: pd.DataFrame, images: pd.DataFrame, column: str | None, where: str
) -> tuple[pd.Series, str]:
    """Return the stimulus id of each event (None if it has none) and the column that contains it."""
    import pandas as pd

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
        f"{', '.join(table.columns)}. Set the right one with --set dataset.event_column=NAME."
    )
