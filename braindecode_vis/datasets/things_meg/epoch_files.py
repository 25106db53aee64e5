"""The published epochs of THINGS-MEG: ``preprocessed_P*-epo.fif`` with its further parts.

Owns which files there are, and which image, session and run each epoch belongs to. The authors filtered to 0.1-40 Hz,
cut by the optical sensor, divided by the standard deviation of the baseline (a z-score), and took every sixth sample.
Only the first part of a file is named; MNE finds the others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.bids.meeg_raw import check_subset
from braindecode_vis.datasets.sources.meeg_source import EpochedPart
from braindecode_vis.datasets.things_eeg2.raw import find_channels
from braindecode_vis.datasets.things_meg.tables import CATCH_ID, name_events

_NAME = re.compile(r"preprocessed_P(\d+)-epo\.fif$")
_PLACES = (
    "derivatives/preprocessed/*.fif",
    "preprocessed/*.fif",
    "*.fif",
    "*/preprocessed_P*.fif",
    "*/*/preprocessed_P*.fif",
)
_MOST_MISMATCHES = 0.1  # share of rows of the attribute table that may name another image than the epochs


@dataclass(frozen=True)
class EpochFile:
    """The first part of one person's epochs."""

    subject: int
    path: Path

    @property
    def where(self) -> str:
        """Subject and file, for messages."""
        return f"subject {self.subject:02d}, file {self.path}"

    @property
    def files(self) -> list[Path]:
        """Every part that is there."""
        stem = self.path.name.removesuffix("-epo.fif")
        return sorted(p for p in self.path.parent.glob(f"{stem}-epo*.fif") if not p.name.startswith("."))


def find_epoch_files(root: Path, subjects: Sequence[int] | None) -> list[EpochFile]:
    """Return the epochs of the chosen subjects, in their order; an empty list if there are none at all."""
    found: dict[int, EpochFile] = {}
    for pattern in (
        "derivatives/preprocessed/*.fif",
        "preprocessed/*.fif",
        "*.fif",
        "*/preprocessed_P*.fif",
        "*/*/preprocessed_P*.fif",
    ):
        for path in sorted(root.glob(pattern)):
            match = _NAME.match(path.name)
            if match:
                found.setdefault(int(match[1]), EpochFile(int(match[1]), path))
    if not found:
        return []
    chosen = check_subset(subjects, sorted(found), what=f"below {root}, subject", option="dataset.subjects")
    return [found[s] for s in chosen]


def open_epochs(file: EpochFile) -> Any:
    """Open the epochs of a person without their samples."""
    import mne

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mne.read_epochs(file.path, proj=False, preload=False, verbose="error")
    except Exception as error:  # MNE raises what it likes on damaged or missing parts
        text = " ".join(str(error).split())
        raise DataError(
            f"{file.where} cannot be opened ({type(error).__name__}: {text}); copy or fetch all of its parts "
            f"({', '.join(p.name for p in file.files)} are there)."
        ) from error


def make_epoch_part(
    file: EpochFile,
    epochs: Any,
    names: pd.DataFrame,
    attributes: pd.DataFrame | None,
    channels: tuple[str, ...] | None,
    sfreq: float,
) -> tuple[EpochedPart, dict[str, Any]]:
    """Name the image of every epoch.

    Parameters
    ----------
    names : DataFrame
        From `things_meg_tables.read_image_names`.
    attributes
        The attribute table of this person; the metadata inside the file go first.
    channels
        Sensors to read, all by default.
    sfreq
        Rate that the epochs must have, in Hz.

    Returns
    -------
    part : EpochedPart
        Without catch trials; its trials also have `file`.
    notes
        Where sessions and runs come from, and how many rows of the attributes name another image.
    """
    if abs(float(epochs.info["sfreq"]) - sfreq) > 1e-6:
        raise DataError(
            f"{file.where} has {epochs.info['sfreq']:g} Hz; published epochs keep their rate, so set dataset.sfreq "
            "to it."
        )
    chosen = tuple(epochs.ch_names) if channels is None else channels
    columns = find_channels(epochs.ch_names, chosen, file.where)
    numbers = np.asarray(epochs.events[:, 2], dtype=np.int64)
    labels, notes = _find_labels(file, epochs, attributes, numbers)
    rows = np.flatnonzero(numbers != CATCH_ID)
    if not len(rows):
        raise DataError(f"{file.where} holds catch trials only.")
    named = name_events(numbers[rows], names, file.where)
    trials = pd.concat([named, labels.iloc[rows].reset_index(drop=True)], axis=1)
    trials["subject"], trials["split"] = f"{file.subject:02d}", "train"
    trials["repetition"] = trials.groupby("stimulus_id").cumcount()
    notes["n_catch"] = int(len(numbers) - len(rows))
    reader = EpochReader(file.where, epochs, rows, columns)
    reader(len(rows) - 1, len(rows))  # opening does not notice that a file is cut short
    part = EpochedPart(trials, tuple(file.files), chosen, np.asarray(epochs.times, float), reader)
    return part, notes


def _find_labels(
    file: EpochFile, epochs: Any, attributes: pd.DataFrame | None, numbers: np.ndarray
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return session and run of every epoch as text."""
    inside = epochs.metadata
    named = inside is not None and {"session_nr", "run_nr"} <= set(inside.columns)
    table, source = (inside, "metadata of the epochs") if named else (attributes, "sample attributes")
    if table is None:
        none = pd.DataFrame({"session": ["00"] * len(numbers), "run": "00"})
        return none, {"sessions": "unknown: there is no sample_attributes_P*.csv"}
    if len(table) != len(numbers):
        raise DataError(
            f"{file.where} holds {len(numbers)} epochs, but the {source} list {len(table)} trials: a part of the file "
            "is missing, or the table belongs to somebody else."
        )
    n_other = 0
    if "things_image_nr" in table.columns:
        told = pd.to_numeric(table["things_image_nr"], errors="coerce").fillna(CATCH_ID).to_numpy(np.int64)
        n_other = int((told != numbers).sum())
    if n_other > _MOST_MISMATCHES * len(numbers):
        raise DataError(
            f"{file.where}: {n_other} of {len(numbers)} epochs show another image than the {source} say, above the "
            f"bound of {_MOST_MISMATCHES:.0%}: the table belongs to somebody else or is in another order."
        )
    labels = pd.DataFrame(
        {
            "session": [f"{int(value):02d}" for value in table["session_nr"]],
            "run": [f"{int(value):02d}" for value in table["run_nr"]],
        }
    )
    return labels, {"sessions": source, "n_attribute_mismatches": n_other}


@dataclass(frozen=True)
class EpochReader:
    """Reads some of the epochs of a file, in their order.

    Parameters
    ----------
    where
        Subject and file, for messages.
    epochs
        MNE epochs, not loaded.
    rows, columns
        Epochs and channels to read.
    """

    where: str
    epochs: Any
    rows: np.ndarray
    columns: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return epochs `start` to `stop`, shape (stop - start, n_channels, n_times)."""
        item = self.rows[start:stop]
        try:
            return self.epochs.get_data(picks=self.columns, item=item, copy=False, verbose="error")
        except (OSError, ValueError) as error:  # what MNE meets where a file ends too early
            raise DataError(
                f"{self.where}: epochs {item[0]} to {item[-1]} cannot be read ({error}); a part of the file is cut "
                "short, copy or fetch it again."
            ) from error
