"""The ``.pth`` files of EEG-ImageNet: which there are, and access to their entries without reading all samples.

Owns finding and opening. torch's own restricted reader is tried first, memory-mapped, so that a part of 4 GB costs
no memory; only a file that it refuses is handed to the full one, in a process of its own, if the user trusts it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.safe_pickle import open_npy

_NAME = re.compile(r"EEG-?ImageNet(?:_(\d+))?\.pth$", re.IGNORECASE)
_KEYS = ("eeg_data", "granularity", "subject", "label", "image")
_VOLT_BELOW = 1e-2  # no scalp potential reaches 10 mV, and none is below 10 nV


@dataclass(frozen=True)
class Archive:
    """One open file.

    Parameters
    ----------
    path
        The file.
    entries : DataFrame
        One row per epoch, in the order of the file: `subject`, `label` (wnid), `granularity`, `file`.
    labels
        The file's list of categories; the fine tasks are its pieces of eight.
    n_times
        Samples of the shortest epoch.
    read
        Gives one epoch as float32 of shape (n_channels, n_times).
    """

    path: Path
    entries: pd.DataFrame
    labels: list[str]
    n_times: int
    read: Callable[[int], np.ndarray]

    def guess_unit(self) -> str:
        """Return ``V``, or ``arbitrary`` if the numbers are too large for that: the files do not say."""
        picked = np.unique(np.linspace(0, len(self.entries) - 1, 20).astype(int)).tolist()
        typical = float(np.median([self.read(row).std(axis=1) for row in picked]))
        return "V" if typical < _VOLT_BELOW else "arbitrary"


def find_archives(root: Path, layout: str) -> list[Path]:
    """Return the files of one layout below `root` or its folder ``data``.

    Raises
    ------
    DataError
        If there is none.
    ConfigError
        If both layouts are there and none was asked for.
    """
    for folder in (root, root / "data"):
        files = sorted(folder.glob("*.pth")) if folder.is_dir() else []
        named = {path: match for path in files if (match := _NAME.match(path.name))}
        if named:
            break
    else:
        raise DataError(
            f"no file of EEG-ImageNet was found in {root}: expected EEG-ImageNet_1.pth and EEG-ImageNet_2.pth, "
            "or EEG-ImageNet.pth."
        )
    parts = [path for path, match in named.items() if match[1]]
    single = [path for path, match in named.items() if not match[1]]
    if parts and single and layout == "auto":
        raise ConfigError(
            f"{folder} holds EEG-ImageNet both in parts and in one file; choose one with "
            "--set dataset.layout=parts or single."
        )
    chosen = {"parts": parts, "single": single, "auto": parts or single}[layout]
    if not chosen:
        raise DataError(f"{folder} does not hold EEG-ImageNet in the layout {layout!r}, only the other one.")
    return chosen


def open_archive(
    path: Path, *, trust: bool, scratch: Path | None, n_channels: int, read: bool = True
) -> Archive:
    """Open one file.

    Parameters
    ----------
    path
        The file.
    trust
        Whether a file that names code may be opened.
    scratch
        Where such a file is converted to.
    n_channels
        Rows that every epoch must have.
    read
        Whether a converted copy is wanted; otherwise a file that must be trusted is not opened.

    Raises
    ------
    DataError
        If it is damaged or holds something else.
    ConfigError
        If it must be trusted first.
    """
    import torch

    try:
        content = _load_restricted(path)
    except _NeedsTrustError as error:
        if not (trust and read):
            raise ConfigError(
                f"{path} holds more than tensors and text ({error}), so opening it can run any code; if you trust "
                "where it comes from, pass --set dataset.trust_pickle=true, and it is converted once, in a process of "
                "its own."
            ) from error
        return _convert(path, scratch, n_channels)
    entries, labels = _list_entries(content, path)
    tensors = [entry["eeg_data"] for entry in content["dataset"]]
    wrong = [
        row for row, t in enumerate(tensors)
        if not isinstance(t, torch.Tensor) or t.ndim != 2 or t.shape[0] != n_channels
    ]  # fmt: skip
    if wrong:
        found = tensors[wrong[0]]
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise DataError(
            f"{path}: entry {wrong[0]} (subject {entries['subject'].iloc[wrong[0]]}) should be {n_channels} channels "
            f"by time, but is {shape}; it is another montage or another data set."
        )
    return Archive(
        path, entries, labels, min(t.shape[1] for t in tensors), lambda row: tensors[row].float().numpy()
    )


class _NeedsTrustError(Exception):
    """The restricted reader refused."""


def _load_restricted(path: Path) -> Any:
    import pickle

    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # a file of torch before 1.6
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+)", str(error))
        if "weights_only" in str(error) and named:
            raise _NeedsTrustError(f"it names {named[1]}") from error
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); fetch it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is damaged or cut short ({reason}); fetch it again.") from error


def _list_entries(content: Any, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the table of entries and the list of labels, checked against each other."""
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("dataset"), list)
        or "labels" not in content
    ):
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} should be a dictionary of dataset, labels and images, but holds {keys}; it is another file."
        )
    rows = content["dataset"]
    for number, row in enumerate(rows):
        missing = [key for key in _KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{path}: entry {number} lacks {', '.join(missing)}; fetch it again.")
    if not rows:
        raise DataError(f"{path} lists no epoch; fetch it again.")
    entries = pd.DataFrame(
        {
            "subject": [int(row["subject"]) for row in rows],
            "label": [str(row["label"]) for row in rows],
            "granularity": [str(row["granularity"]) for row in rows],
            "file": [str(row["image"]) for row in rows],
        }
    )
    labels = [str(label) for label in content["labels"]]
    _check_entries(entries, labels, path)
    return entries, labels


def _check_entries(entries: pd.DataFrame, labels: list[str], path: Path) -> None:
    other = sorted(set(entries["granularity"]) - {"coarse", "fine"})
    if other:
        raise DataError(f"{path} has entries of granularity {other[0]!r}; coarse and fine are known.")
    unlisted = sorted(set(entries["label"]) - set(labels))
    if unlisted:
        raise DataError(f"{path} has entries of the category {unlisted[0]}, which its list of labels lacks.")
    shifted = entries["file"].str.split("_").str[0] != entries["label"]
    if shifted.any():
        row = int(np.flatnonzero(shifted)[0])
        raise DataError(
            f"{path}: entry {row} (subject {entries['subject'].iloc[row]}) pairs the picture "
            f"{entries['file'].iloc[row]} with the category {entries['label'].iloc[row]} "
            f"({int(shifted.sum())} of {len(entries)} such pairs): the lists are shifted against each other."
        )


_CONVERT = """
import json, pathlib, sys
import numpy, torch
content = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
folder, n_channels = pathlib.Path(sys.argv[2]), int(sys.argv[3])
rows = content["dataset"]
arrays = [numpy.asarray(row["eeg_data"]) for row in rows]
if any(a.ndim != 2 or a.shape[0] != n_channels for a in arrays):
    sys.exit("epochs of another shape than %d channels by time" % n_channels)
n_times = min(a.shape[1] for a in arrays)
out = numpy.lib.format.open_memmap(folder / "eeg.npy", "w+", "<f4", (len(arrays), n_channels, n_times))
for number, array in enumerate(arrays):
    out[number] = array[:, :n_times]
out.flush()
plain = {key: [int(row[key]) if key == "subject" else str(row[key]) for row in rows]
         for key in ("granularity", "subject", "label", "image")}
plain["labels"] = [str(label) for label in content["labels"]]
(folder / "info.json").write_text(json.dumps(plain))
"""


def _convert(path: Path, scratch: Path | None, n_channels: int) -> Archive:
    if scratch is None:
        raise ConfigError(f"{path} must be converted before it is read; give it a scratch folder.")
    folder = scratch / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-I", "-W", "ignore", "-c", _CONVERT,
        str(path.absolute()), str(folder.absolute()), str(n_channels),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{path} cannot be converted ({lines[-1]}); fetch it again.")
    info = json.loads((folder / "info.json").read_text())
    labels = info.pop("labels")
    entries = pd.DataFrame(info).rename(columns={"image": "file"})
    _check_entries(entries, labels, path)
    data = open_npy(folder / "eeg.npy")
    return Archive(path, entries, labels, data.shape[2], lambda row: data.read_rows(row, row + 1)[0])
