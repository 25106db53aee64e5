"""Lazy access to the files of THINGS-EEG2, whatever their layout.

Owns the published epochs: the authors' 100 Hz dictionaries, the 250 Hz pickles of NICE and ATM, the ``.pt`` files of
UBP and the arrays of NeuroBridge. Raw sessions and BIDS have files of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart
from braindecode_vis.datasets.sources.safe_pickle import FileArray, open_npy
from braindecode_vis.datasets.things_eeg2.bids_layout import open_bids
from braindecode_vis.datasets.things_eeg2.layouts import Held, read_dict
from braindecode_vis.datasets.things_eeg2.raw import find_channels, make_raw_part, open_raw

_WHITENED = {
    "official": "by its authors, with the covariance of training and test trials together",
    "250hz": "by its publisher, with the covariance of the training trials of each session",
    "ubp": "by its publisher, with the covariance of the training trials of each session",
    "neurobridge": "by its publisher, with the covariance of the training trials of each session",
}


class Options(Protocol):
    """The settings that opening a file depends on."""

    trust_pickle: bool
    max_dropped: float
    sfreq: float | None
    event_column: str | None


def open_held(
    held: Sequence[Held],
    options: Options,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    scratch: Path | None,
    *,
    convert: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """Return a lazy part for each file, and notes for the reader of the store.

    Parameters
    ----------
    images
        The image list of `read_image_list`.
    ch_names
        Channels to read, in this order.
    scratch
        Where ``.pt`` files are converted to.
    convert
        Whether to convert them; otherwise they are only found.
    """
    parts: list[Any] = []
    for item in held:
        listed = images if item.split is None else images[images["split"] == item.split]
        if item.layout == "raw":
            parts.append(_open_raw(item, options, listed, ch_names))
        elif item.layout == "bids":
            parts.append(open_bids(item.path, item.subject, item.session, options, listed, ch_names))
        elif item.layout in ("official", "250hz"):
            parts.append(_open_dict(item, options, listed, ch_names))
        elif item.layout == "neurobridge":
            parts.append(_open_neurobridge(item, options, listed, ch_names))
        elif convert:
            parts.append(_open_ubp(item, options, listed, ch_names, scratch))
    whitening = _WHITENED.get(held[0].layout)
    notes: dict[str, Any] = {"whitening": whitening} if whitening else {}
    if held[0].layout == "official":
        notes["warnings"] = [
            "These THINGS-EEG2 epochs were whitened by their authors with the covariance of training and test trials "
            "together, so that no score on them is free of the test set; the raw sessions are."
        ]
    return parts, notes


def _open_raw(item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]) -> ContinuousPart:
    raw = open_raw(item.path, read_dict(item))
    return make_raw_part(
        raw, images, ch_names, subject=f"{item.subject:02d}", session=f"{item.session or 1:02d}",
        run="training" if item.split == "train" else "test", max_dropped=options.max_dropped,
    )  # fmt: skip


def _open_dict(item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]) -> EpochedPart:
    content = read_dict(item)
    missing = [key for key in ("preprocessed_eeg_data", "ch_names", "times") if key not in content]
    if missing:
        raise DataError(f"{item.where} lacks {', '.join(missing)}.")
    data, times = content["preprocessed_eeg_data"], np.asarray(content["times"], dtype=float)
    return _make_part(item, options, images, ch_names, data, content["ch_names"], times)


def _open_neurobridge(
    item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]
) -> EpochedPart:
    data = open_npy(item.path)
    info_path = item.path.parent / "info.json"
    if not info_path.is_file():
        raise DataError(f"{item.where} needs info.json beside it, which names the channels; fetch it again.")
    info = json.loads(info_path.read_text())
    data = replace(data, shape=(data.shape[0] * data.shape[1], *data.shape[2:]))
    if "times" in info:
        times = np.asarray(info["times"], dtype=float)
    else:
        times = np.arange(data.shape[-1]) / float(info["sfreq"])
    return _make_part(item, options, images, ch_names, data, info["ch_names"], times)


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
    item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str], scratch: Path | None
) -> EpochedPart:
    if not options.trust_pickle:
        raise ConfigError(
            f"{item.where} is a .pt file that can run any code when it is opened; if you trust where it comes from, "
            "pass --set dataset.trust_pickle=true, and it is converted once, in a process of its own."
        )
    if scratch is None:
        raise ConfigError(f"{item.where} must be converted before it is read; give it a scratch folder.")
    folder = scratch / f"sub-{item.subject:02d}-{item.split}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-I",
        "-W",
        "ignore",
        "-c",
        _CONVERT,
        str(item.path.absolute()),
        str(folder.absolute()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{item.where} cannot be converted ({lines[-1]}); copy or fetch it again.")
    info = json.loads((folder / "info.json").read_text())
    session = np.load(folder / "session.npy", allow_pickle=False)
    data = open_npy(folder / "eeg.npy")
    by_name = images.set_index("stimulus_id")
    names = [Path(path).stem for path in info["img"]]
    unknown = [name for name in names if name not in by_name.index]
    if unknown:
        raise DataError(
            f"{item.where} shows {len(unknown)} image(s) outside the image list, first {unknown[0]!r}: "
            "the image set belongs to another release."
        )
    shown = by_name.loc[names].reset_index()
    return _make_part(
        item, options, shown, ch_names, data, info["ch_names"], np.asarray(info["times"]), session=session
    )


def _make_part(
    item: Held,
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
            f"{item.where} should hold numbers of shape (n_images, n_repetitions, n_channels, n_times), "
            f"not {data.dtype} of shape {data.shape}."
        )
    n_images, n_repetitions, n_channels, n_times = data.shape
    if n_images != len(images):
        raise DataError(
            f"{item.where} holds {n_images} images, but the image list has {len(images)}: "
            "another release, or the training and test files are swapped."
        )
    names = list(map(str, names))
    if len(names) != n_channels:
        raise DataError(f"{item.where} has {n_channels} channels of data but names {len(names)}.")
    times = _align_times(times, n_times, item)
    sfreq = 1 / float(np.median(np.diff(times)))
    if options.sfreq is not None and not np.isclose(sfreq, options.sfreq, rtol=1e-3):
        raise ConfigError(
            f"{item.where} has {sfreq:g} Hz, but dataset.sfreq is {options.sfreq:g}; published epochs are not "
            f"resampled: pass --set dataset.sfreq={sfreq:g} or leave it out."
        )
    rows = find_channels(names, ch_names, item.where)
    trials = images.loc[images.index.repeat(n_repetitions), ["stimulus_id", "concept", "split"]]
    trials = trials.reset_index(drop=True)
    trials["subject"], trials["run"] = f"{item.subject:02d}", "n/a"
    trials["session"] = "n/a"
    if session is not None:
        trials["session"] = [f"{int(s) + 1:02d}" for s in session.ravel()]
    trials["repetition"] = np.tile(np.arange(n_repetitions), n_images)
    flat = replace(data, shape=(n_images * n_repetitions, n_channels, n_times))
    return EpochedPart(trials, (item.path,), tuple(ch_names), times, _Picked(flat, rows))


@dataclass(frozen=True)
class _SmallArray:
    """An array below the size from which arrays stay in their file; read like one of those."""

    array: np.ndarray
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.array.reshape(self.shape)[start:stop]


class _Picked:
    """Reads epochs from a file and picks channels."""

    def __init__(self, data: FileArray | _SmallArray, rows: np.ndarray) -> None:
        self.data, self.rows = data, rows

    def __call__(self, start: int, stop: int) -> np.ndarray:
        block = self.data.read_rows(start, stop)
        if np.array_equal(self.rows, np.arange(block.shape[1])):
            return block
        return block[:, self.rows]


def _align_times(times: np.ndarray, n_times: int, item: Held) -> np.ndarray:
    """Return one time per sample: the 250 Hz files dropped the baseline from the data and not from the times."""
    if len(times) == n_times:
        return times
    if len(times) > n_times and np.isclose(times[len(times) - n_times], 0, atol=1e-6):
        return times[len(times) - n_times :]
    raise DataError(
        f"{item.where} has {n_times} samples per epoch but {len(times)} times from {times[0]:g} to {times[-1]:g} s; "
        "they do not belong together."
    )
