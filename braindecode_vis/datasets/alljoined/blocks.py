"""The recordings of Alljoined-1.6M on disk: raw blocks in EDF, and the authors' epochs in pickled dictionaries.

Owns the search for files, the header of an EDF file, the text of a marker (``label,value,deleted,orig_index``), and
the pairing of epochs with pictures by the authors' table of trials. Subjects, sessions and blocks are those of the
folder names: the files of subject 8 in sessions 1, 3 and 4 name "Subject 19". Pickles are read by the restricted
reader, and their samples stay in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, check_columns, is_there, refuse_damage
from braindecode_vis.base.remote import bring
from braindecode_vis.datasets.bids.meeg_files import RawReader
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    HeldFile,
    Sensors,
    check_published_rate,
    find_channels,
    list_scalp_positions,
)
from braindecode_vis.datasets.sources.safe_pickle import FileArray, read_pickled_dict

if TYPE_CHECKING:
    import pandas as pd

FLEX2 = (
    "Cz", "Fp1", "F7", "F3", "CP5", "CP1", "P1", "P3", "P5", "P7", "PO9", "PO7", "PO3", "O1", "O9", "Pz", "POz", "Oz",
    "O10", "O2", "PO4", "PO8", "PO10", "P8", "P6", "P4", "P2", "CP2", "CP6", "F4", "F8", "Fp2",
)  # fmt: skip
"""The montage that the publication names."""
SPLITS = {"stim_train": "train", "stim_test": "test"}
# Pictures of another task, numbered behind those of THINGS-EEG2.
ODDBALLS = range(16740, 16749)
SFREQ = 256.0
OTHER_LABELS = ("oddball", "behav", "debug")
RENAMED = {"Afz": "AFz"}  # as the recording software spells it
# As released: the folders are right, the names are not.
_MISNAMED = {(8, session): 19 for session in (1, 3, 4)}
_MAX_VOLT = 0.1  # the headset's offset is 4 mV
_NUMBER = r"[-_]?0*(\d+)$"
_TITLE = re.compile(r"Subject\s*(\d+),\s*Session\s*(\d+),\s*Block\s*(\d+)", re.IGNORECASE)
_MARKER = re.compile(r"(?:^|,)(stim_train|stim_test|oddball|behav|debug),([^,]*),([^,]*),([^,]*)$")


@dataclass(frozen=True, kw_only=True)
class RawBlock(HeldFile):
    """One EDF file with its subject and session; `run` is the block."""

    session: int

    @property
    def where(self) -> str:
        """Subject, session, block and file, for messages."""
        return super().where.replace(", run ", ", block ", 1)

    @property
    def key(self) -> str:
        """A name that does not depend on the folder of the data set."""
        return f"sub-{self.subject:02d}/session_{self.session:02d}/block_{self.run:02d}"


def find_blocks(root: Path) -> tuple[list[RawBlock], list[str]]:
    """Return the EDF files below ``raw_eeg``, and the folders whose names are not recognised.

    Raises
    ------
    DataError
        If a block has not exactly one file, or a file names another subject, session or block than its folders.
    """
    base = root / "raw_eeg" if (root / "raw_eeg").is_dir() else root
    blocks: list[RawBlock] = []
    ignored: list[str] = []
    for subject_folder, subject in list_numbered(base, "sub", []):
        for folder, session in list_numbered(subject_folder, "session", ignored):
            for place, block in list_numbered(folder, "block", ignored):
                # A Mac leaves files that begin with a point beside each of them.
                files = [p for p in sorted(place.glob("*.edf")) if not p.name.startswith(".")]
                if len(files) != 1:
                    raise DataError(
                        f"{place} should hold one EDF file, but holds {len(files)}; copy or fetch this block again."
                    )
                blocks.append(RawBlock(subject=subject, session=session, run=block, path=files[0]))
    # Titles are compared after all folders were read, so that a missing file is reported first.
    for item in blocks:
        title = _TITLE.search(item.path.name)
        if title is None:
            continue
        named = tuple(int(number) for number in title.groups())
        subject = _MISNAMED.get((item.subject, item.session), item.subject)
        if named[0] not in (item.subject, subject) or named[1:] != (item.session, item.run):
            raise DataError(
                f"{item.where} has subject {named[0]}, session {named[1]}, block {named[2]} in its name: "
                "it is in the wrong folder; copy or fetch it again."
            )
    return sorted(blocks, key=lambda b: (b.subject, b.session, b.run)), ignored


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


# --- EDF ----------------------------------------------------------------------------------------------------------


def read_labels(path: Path, where: str) -> list[str]:
    """Return the labels of the rows of an EDF file, with their spelling in the file.

    Raises
    ------
    DataError
        If it is no EDF file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        if len(head) < 256 or head[:8].strip() != b"0":
            raise DataError(f"{where} is not an EDF file; fetch it again.")
        with refuse_damage(f"{where} has a damaged EDF header", ValueError):
            # Kemp et al. (1992), doi:10.1016/0013-4694(92)90009-7: 256 bytes of head, then 256 for each row.
            n_header, n_records = int(head[184:192]), int(head[236:244])
            n_rows = int(head[252:256])
            fields = file.read(256 * n_rows)
            labels = [fields[16 * i : 16 * (i + 1)].decode("latin1").strip() for i in range(n_rows)]
            # The fields before the number of samples take 216 bytes of each row.
            start = 216 * n_rows
            n_samples = [int(fields[start + 8 * i : start + 8 * (i + 1)]) for i in range(n_rows)]
    # Samples are 16-bit integers; -1 records mean that the recording was not closed.
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


# --- markers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Markers:
    """Events of a block, read from its annotations.

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
    import pandas as pd

    rows: list[tuple[float, int, str]] = []
    counts: dict[str, int] = {}
    seen: set[tuple[float, int]] = set()
    # A marker may be written late, so the order in the file need not be the order in time.
    for onset, text in sorted(
        zip(map(float, onsets), map(str, texts), strict=True), key=lambda pair: pair[0]
    ):
        match = _MARKER.search(text.strip())
        if match is None:
            if text.strip().startswith("stim"):
                raise DataError(
                    f"{where} has the marker {text!r} at {onset:.3f} s, but "
                    "label,value,deleted,orig_index is expected."
                )
            counts["other"] = counts.get("other", 0) + 1
            continue
        label, value, deleted, _ = match.groups()
        if label in OTHER_LABELS:
            counts[label] = counts.get(label, 0) + 1
            continue
        if not value.strip().isdigit():
            raise DataError(f"{where} has the marker {text!r} at {onset:.3f} s, which has no picture.")
        # The third field is a count or a truth value.
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
    block: RawBlock, names: tuple[str, ...], concept: Callable[[int], str]
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
        If an electrode is missing, or the file differs from the published form.
    """
    import mne

    electrodes = find_electrodes(read_labels(block.path, block.where))
    find_channels(list(electrodes), names, block.where)
    with refuse_damage(f"{block.where} cannot be read"):
        raw = mne.io.read_raw_edf(
            bring(block.path), include=list(electrodes.values()), preload=False, verbose="error"
        )
    every = np.array([raw.ch_names.index(label) for label in electrodes.values()])
    rows = np.array([raw.ch_names.index(electrodes[name]) for name in names])
    sfreq = float(raw.info["sfreq"])
    if not np.isclose(sfreq, SFREQ, rtol=1e-6):
        raise DataError(f"{block.where} has {sfreq:g} Hz, where {SFREQ:g} Hz is published.")
    markers = parse_markers(raw.annotations.onset, raw.annotations.description, block.where)
    reader = RawReader(raw, rows)
    if np.abs(reader(0, min(raw.n_times, 256))).max() > _MAX_VOLT:
        raise DataError(f"{block.where} has no scalp potentials in V: its header has another unit.")
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
        f"{block.subject:02d}", f"{block.session:02d}", f"{block.run:02d}", "eeg", (block.path,), events
    )
    sensors = Sensors(tuple(electrodes), RawReader(raw, every))
    return ContinuousPart(recording, names, sfreq, int(raw.n_times), reader, sensors), markers.counts


TABLES = ("experiment_metadata_categories.parquet", "experiment_metadata.parquet")
EPOCHS_FOLDER = "preprocessed_eeg"


@dataclass(frozen=True, kw_only=True)
class Flat(HeldFile):
    """One file of the authors' epochs.

    Parameters
    ----------
    data
        Epochs of shape (n_trials, n_channels, n_times), in the file.
    whitened
        Whether its settings name a noise normalisation; None if the settings are missing.
    """

    split: str
    data: FileArray | np.ndarray
    ch_names: tuple[str, ...]
    times: np.ndarray
    whitened: bool | None

    def read(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return epochs `start` to `stop` of the given channels."""
        block = (
            self.data[start:stop] if isinstance(self.data, np.ndarray) else self.data.read_rows(start, stop)
        )
        return block[:, rows]


def find_flat(root: Path) -> list[tuple[int, str, Path]]:
    """Return subject, split and path of every ``preprocessed_eeg_*_flat.npy`` below ``preprocessed_eeg``."""
    base = root / EPOCHS_FOLDER if (root / EPOCHS_FOLDER).is_dir() else root
    found = []
    for subject_folder, subject in list_numbered(base, "sub", []):
        for path in sorted(subject_folder.glob("*eeg_*_flat*.npy")):
            if not path.name.startswith("."):
                split = "train" if "_train" in path.name else "test" if "_test" in path.name else None
                if split is None:
                    raise DataError(f"{path} has neither train nor test in its name.")
                found.append((subject, split, path))
    # Training before test, as in every other layout.
    return sorted(found, key=lambda item: (item[0], item[1] != "train"))


def open_flat(subject: int, split: str, path: Path) -> Flat:
    """Read everything in a preprocessed file except its epochs, without running any code that it names."""
    where = f"subject {subject:02d}, file {path}"
    content = read_pickled_dict(path)
    check_columns(content, ("preprocessed_eeg_data", "ch_names", "times"), what=where)
    data, names = content["preprocessed_eeg_data"], tuple(map(str, content["ch_names"]))
    times = np.asarray(content["times"], dtype=float)
    if len(data.shape) != 3 or data.shape[1:] != (len(names), len(times)) or data.dtype.kind != "f":
        raise DataError(
            f"{where} should hold epochs of {len(names)} channels and {len(times)} times, but holds {data.dtype} of "
            f"shape {data.shape}; it is cut short or of another release."
        )
    configs = content.get("configs")
    # The authors save the settings of their script beside the epochs.
    mvnn = configs.get("mvnn_dim") if isinstance(configs, dict) else None
    whitened = None if mvnn is None else mvnn in ("epochs", "time")
    names = tuple(RENAMED.get(name, name) for name in names)
    return Flat(
        subject=subject, path=path, split=split, data=data, ch_names=names, times=times, whitened=whitened
    )


def read_trial_table(folder: Path, subject: int) -> pd.DataFrame:
    """Return the authors' table of one subject: one row per marker, with `dropped` and the picture's `image`.

    Raises
    ------
    DataError
        If there is none. ``stim_order.parquet`` alone is not enough: it does not list the dropped trials.
    """
    import pandas as pd

    path = next((folder / name for name in TABLES if is_there(folder / name)), None)
    if path is None:
        raise DataError(
            f"subject {subject:02d}: {folder} is missing {TABLES[0]}, which lists the picture of each "
            "epoch and the dropped epochs; fetch it from the hub with the epochs."
        )
    with refuse_damage(f"{path} cannot be read"):
        table = pd.read_parquet(path)
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


def list_categories(root: Path) -> list[Path]:
    """Return the tables of the authors that `read_categories` reads."""
    base = root / EPOCHS_FOLDER if (root / EPOCHS_FOLDER).is_dir() else root
    return [folder / TABLES[0] for folder in sorted(base.glob("sub-*")) if is_there(folder / TABLES[0])]


def read_categories(root: Path) -> dict[int, str]:
    """Return the category of each picture from all tables of the authors below ``preprocessed_eeg``.

    Raises
    ------
    DataError
        If two tables disagree.
    """
    import pandas as pd

    known: dict[int, str] = {}
    for path in list_categories(root):
        with refuse_damage(f"{path} cannot be read as Parquet"):
            table = pd.read_parquet(path, columns=["image_path", "category_name"])
        # If only the schema is damaged, pandas leaves a column out without a warning.
        check_columns(table.columns, ("image_path", "category_name"), what=f"{path}")
        table = table.dropna()
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
    import pandas as pd

    flat = open_flat(*item)
    table = read_trial_table(flat.path.parent, flat.subject)
    # The table lists every marker; the file holds what was not dropped, in the same order.
    own = table[(table["partition"] == f"stim_{flat.split}") & ~table["dropped"].astype(bool)]
    n_epochs = flat.data.shape[0]
    if len(own) != n_epochs:
        raise DataError(
            f"{flat.where} holds {n_epochs} epochs, but its table keeps {len(own)} {flat.split} trials: they are of "
            "different releases; fetch both from one place."
        )
    names = flat.ch_names if channels is None else channels
    rows = find_channels(flat.ch_names, names, flat.where)
    check_published_rate(1 / float(np.median(np.diff(flat.times))), sfreq, flat.where)
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
    part = EpochedPart(trials, (flat.path,), names, flat.times, partial(flat.read, rows))
    return part, flat
