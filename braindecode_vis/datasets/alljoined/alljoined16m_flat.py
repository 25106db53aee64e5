"""Preprocessed epochs of Alljoined-1.6M: pickled dictionaries, and the tables that say what they show.

Owns which files there are, and the pairing of epochs with pictures by the authors' table of trials. Pickles are read by
the restricted reader, and their samples stay in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError, check_columns
from braindecode_vis.datasets.alljoined.alljoined16m_raw import RENAMED, list_numbered
from braindecode_vis.datasets.sources.meeg_source import EpochedPart
from braindecode_vis.datasets.sources.safe_pickle import FileArray, read_pickled_dict

_TABLES = ("experiment_metadata_categories.parquet", "experiment_metadata.parquet")


@dataclass(frozen=True)
class Flat:
    """One file of the authors' epochs.

    Parameters
    ----------
    data
        Epochs of shape (n_trials, n_channels, n_times), in the file.
    whitened
        Whether its settings name a noise normalisation; None if they are not there.
    """

    subject: int
    split: str
    path: Path
    data: FileArray | np.ndarray
    ch_names: tuple[str, ...]
    times: np.ndarray
    whitened: bool | None

    @property
    def where(self) -> str:
        """Subject and file, for messages."""
        return f"subject {self.subject:02d}, file {self.path}"

    def read(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return epochs `start` to `stop` of the given channels."""
        block = (
            self.data[start:stop] if isinstance(self.data, np.ndarray) else self.data.read_rows(start, stop)
        )
        return block[:, rows]


def find_flat(root: Path) -> list[tuple[int, str, Path]]:
    """Return subject, split and path of every ``preprocessed_eeg_*_flat.npy`` below ``preprocessed_eeg``."""
    base = root / "preprocessed_eeg" if (root / "preprocessed_eeg").is_dir() else root
    found = []
    for person, subject in list_numbered(base, "sub", []):
        for path in sorted(person.glob("*eeg_*_flat*.npy")):
            if not path.name.startswith("."):
                split = "train" if "_train" in path.name else "test" if "_test" in path.name else None
                if split is None:
                    raise DataError(f"{path} says neither train nor test in its name.")
                found.append((subject, split, path))
    return sorted(found, key=lambda item: (item[0], item[1] != "train"))


def open_flat(subject: int, split: str, path: Path) -> Flat:
    """Read everything of a preprocessed file but its epochs, without running anything that it names."""
    where = f"subject {subject:02d}, file {path}"
    content = read_pickled_dict(path)
    check_columns(content, ("preprocessed_eeg_data", "ch_names", "times"), what=where)
    data, names = content["preprocessed_eeg_data"], tuple(map(str, content["ch_names"]))
    times = np.asarray(content["times"], dtype=float)
    if len(data.shape) != 3 or data.shape[1:] != (len(names), len(times)) or data.dtype.kind != "f":
        raise DataError(
            f"{where} should hold epochs of {len(names)} channels and {len(times)} times, but holds {data.dtype} of "
            "shape "
            f"{data.shape}; it is cut short or of another release."
        )
    configs = content.get("configs")
    mvnn = configs.get("mvnn_dim") if isinstance(configs, dict) else None
    whitened = None if mvnn is None else mvnn in ("epochs", "time")
    names = tuple(RENAMED.get(name, name) for name in names)
    return Flat(subject, split, path, data, names, times, whitened)


def read_trial_table(folder: Path, subject: int) -> pd.DataFrame:
    """Return the authors' table of one person: one row per marker, with `dropped` and the picture's `image`.

    Raises
    ------
    DataError
        If there is none. ``stim_order.parquet`` alone does not do: it lacks which trials were dropped.
    """
    path = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            f"subject {subject:02d}: {folder} lacks {_TABLES[0]}, which says which picture an epoch belongs to and "
            "which "
            "were dropped; fetch it from the hub beside the epochs."
        )
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises what the damaged bytes lead it to
        raise DataError(f"{path} cannot be read ({error}); fetch it again.") from error
    check_columns(table.columns, ("session", "partition", "image_path", "dropped"), what=f"{path}")
    table["image"] = _read_numbers(table["image_path"], path)
    return table


def _read_numbers(paths: pd.Series, source: Path) -> pd.Series:
    numbers = paths.astype(str).str.extract(r"(\d+)\.[A-Za-z]+$")[0]
    if numbers.isna().any():
        raise DataError(
            f"{source} names the picture {paths[numbers.isna()].iloc[0]!r}, which has no number; fetch it again."
        )
    return numbers.astype(int)


def read_categories(root: Path) -> dict[int, str]:
    """Return the category of each picture from whatever tables of the authors are below ``preprocessed_eeg``.

    Raises
    ------
    DataError
        If two tables disagree.
    """
    base = root / "preprocessed_eeg" if (root / "preprocessed_eeg").is_dir() else root
    known: dict[int, str] = {}
    for path in sorted(base.glob(f"sub-*/{_TABLES[0]}")):
        table = pd.read_parquet(path, columns=["image_path", "category_name"]).dropna()
        pairs = table.assign(image=_read_numbers(table["image_path"], path)).drop_duplicates(
            ["image", "category_name"]
        )
        for image, name in zip(pairs["image"].tolist(), pairs["category_name"].tolist(), strict=True):
            if known.setdefault(image, str(name)) != str(name):
                raise DataError(
                    f"{path} calls the picture {image:05d} {name!r}, where it was {known[image]!r} before: "
                    "the tables are of different releases."
                )
    return known


def label_flat(
    item: tuple[int, str, Path],
    channels: tuple[str, ...] | None,
    sfreq: float | None,
    concept: Callable[[int], str],
) -> tuple[EpochedPart, Flat]:
    """Open one preprocessed file and label its epochs.

    Parameters
    ----------
    item
        Subject, split and path, of `find_flat`.
    channels
        Names to read, in this order; all of the file by default.
    sfreq
        Sampling rate (Hz) that the epochs must have; None takes theirs.
    concept
        Gives the concept of a picture's number.

    Raises
    ------
    DataError, ConfigError
        If epochs and table do not belong together, or a channel or the rate is another.
    """
    flat = open_flat(*item)
    table = read_trial_table(flat.path.parent, flat.subject)
    own = table[(table["partition"] == f"stim_{flat.split}") & ~table["dropped"].astype(bool)]
    n_epochs = flat.data.shape[0]
    if len(own) != n_epochs:
        raise DataError(
            f"{flat.where} holds {n_epochs} epochs, but its table keeps {len(own)} {flat.split} trials: "
            "they are of different releases; fetch both from one place."
        )
    names = flat.ch_names if channels is None else channels
    missing = [name for name in names if name not in flat.ch_names]
    if missing:
        raise DataError(
            f"{flat.where} lacks the channel(s) {', '.join(missing)}; it has {', '.join(flat.ch_names)}."
        )
    held = 1 / float(np.median(np.diff(flat.times)))
    if sfreq is not None and not np.isclose(held, sfreq, rtol=1e-3):
        raise ConfigError(
            f"{flat.where} has {held:g} Hz and published epochs are not resampled; unset dataset.sfreq."
        )
    run = own["block_id"] if "block_id" in own else pd.Series("n/a", own.index)
    trials = pd.DataFrame(
        {
            "subject": f"{flat.subject:02d}",
            "session": [f"{int(session):02d}" for session in own["session"]],
            "run": [f"{int(r):02d}" if str(r).isdigit() else str(r) for r in run],
            "stimulus_id": [f"{image:05d}" for image in own["image"]],
            "repetition": own.groupby("image").cumcount().to_numpy(),
            "split": flat.split,
            "concept": [concept(image) for image in own["image"]],
        }
    )
    rows = np.array([flat.ch_names.index(name) for name in names])
    part = EpochedPart(trials, (flat.path,), names, flat.times, partial(flat.read, rows))
    return part, flat
