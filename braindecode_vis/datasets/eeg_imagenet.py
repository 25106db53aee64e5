"""EEG-ImageNet (Zhu et al. 2024): 62-channel EEG of 16 subjects who saw ImageNet pictures of 80 categories.

Owns the configuration, the two layouts (``EEG-ImageNet_1.pth`` and ``_2.pth``, or one ``EEG-ImageNet.pth``), the
meaning of each entry, and the opening of the files. A ``.pth`` file holds a dictionary of tensors and text, so torch's
restricted reader is tried first, memory-mapped, so that a part of 4 GB needs no memory. Only a file that it refuses is
read by the full reader, in a separate process, if the user trusts it.

All 50 pictures of a category were shown in one block. Any drift over minutes therefore reveals the category, and
decoding the category does not measure vision (Li et al. 2021). Every use of the data prints a warning.

References
----------
Zhu et al. (2024), arXiv:2406.07151.
Li et al. (2021), doi:10.1109/TPAMI.2020.2973153: the confound of block designs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.digests import digest_files
from braindecode_vis.datasets.bids.fmri_files import hash_image_folder
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    RecordedSettings,
    check_subset,
    collect_findings,
    compare_facts,
    look_at,
    read_manifest,
)
from braindecode_vis.datasets.sources.cleaning_options import CleaningOptions
from braindecode_vis.datasets.sources.meeg_source import (
    EpochedPart,
    EpochPlan,
    MeegSource,
    SampleType,
    add_cleaning,
    choose_layout,
    find_picture_folder,
    find_scalp_positions,
    list_stimuli,
    sample_part,
)
from braindecode_vis.datasets.sources.safe_pickle import convert_trusted, open_npy

if TYPE_CHECKING:
    import pandas as pd

SFREQ = 1000.0
CHANNELS = (
    "Fp1", "Fpz", "Fp2", "AF3", "AF4", "F7", "F5", "F3", "F1", "Fz", "F2", "F4", "F6", "F8", "FT7", "FC5", "FC3", "FC1",
    "FCz", "FC2", "FC4", "FC6", "FT8", "T7", "C5", "C3", "C1", "Cz", "C2", "C4", "C6", "T8", "TP7", "CP5", "CP3", "CP1",
    "CPz", "CP2", "CP4", "CP6", "TP8", "P7", "P5", "P3", "P1", "Pz", "P2", "P4", "P6", "P8", "PO7", "PO5", "PO3", "POz",
    "PO4", "PO6", "PO8", "CB1", "O1", "Oz", "O2", "CB2",
)  # fmt: skip
"""The list that its authors publish beside the code, without mastoids, EOG and triggers; the files name no channels."""
# Zhu et al. (2024): 50 pictures of a category in a row, the first 30 for training.
N_PER_BLOCK = 50
N_TRAIN_PER_BLOCK = 30
WARNING = (
    "EEG-ImageNet shows all 50 pictures of a category in one block, so that any slow drift of the recording reveals "
    "the category: decoding categories, or pictures among those of several categories, does not measure vision here. "
    "Compare pictures within one category, or use a data set with a random order."
)
Granularity = Literal["all", "coarse", "fine", "fine0", "fine1", "fine2", "fine3", "fine4"]


class EegImagenetConfig(CleaningOptions, RecordedSettings):
    """Folder of the files, subjects and trials to read.

    Parameters
    ----------
    root
        Folder of the ``.pth`` files.
    images
        Folder of ImageNet pictures, ``<wnid>/<wnid>_<number>.JPEG``; found as ``imageNet_images`` below the root by
        default. The data set does not contain them, and trials can be preprocessed without them.
    layout
        ``parts`` (one or both of two), ``single``, or by default the one that exists.
    subjects
        Numbers 0 to 15 to read; by default all that exist.
    granularity
        Coarse or fine categories, all of them, or one of the five fine tasks of eight categories each.
    channels
        Names to keep, in this order; all 62 by default.
    samples
        First and past-the-last sample of an epoch that is kept; 40 to 440 as in the authors' code.
    dtype
        Type of the stored numbers.
    trust_pickle
        Open files that torch can open only by running code that they name; in a separate process. Set it with the call,
        never in a file.
    scaling
        As in `CleaningOptions`; its other options are refused, since the files hold epochs.
    """

    kind: Literal["eeg_imagenet"] = "eeg_imagenet"
    images: Path | None = None
    layout: Literal["auto", "parts", "single"] = "auto"
    subjects: tuple[int, ...] | None = None
    granularity: Granularity = "all"
    channels: tuple[str, ...] | None = None
    samples: tuple[int, int] = Field(default=(40, 440))
    dtype: SampleType = "float32"
    trust_pickle: bool = False

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images", "layout", "trust_pickle"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        images = hash_image_folder(self._find_images())
        return images | digest_files({path.name: path for path in self._find()})

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return one part per subject and category block; samples stay in the files."""
        import pandas as pd

        first, last = self.samples
        if not 0 <= first < last:
            raise ConfigError(f"dataset.samples must be an ascending pair from 0 on, not {first} and {last}.")
        channels = CHANNELS if self.channels is None else self.channels
        unknown = [name for name in channels if name not in CHANNELS]
        if unknown or not channels or len(set(channels)) != len(channels):
            raise ConfigError(
                "dataset.channels must name some of the 62 channels once each, not "
                f"{unknown[0] if unknown else channels!r}."
            )
        archives = [
            open_archive(path, trust=self.trust_pickle, scratch=scratch, n_channels=len(CHANNELS))
            for path in self._find()
        ]
        seen: dict[int, Path] = {}
        for archive in archives:
            for subject in archive.entries["subject"].unique().tolist():
                if subject in seen:
                    raise DataError(
                        f"subject {subject} is in both {seen[subject].name} and {archive.path.name}: one "
                        "of them is the other part with a wrong name; fetch it again."
                    )
                seen[subject] = archive.path
        parts, unit = self._make_parts(archives, channels)
        tmin, tmax = first / SFREQ, last / SFREQ
        # Published epochs are not changed: no baseline and no normalisation.
        plan = EpochPlan(SFREQ, tmin, tmax, (tmin, tmax), None, "none", self.dtype)
        table = pd.concat([part.trials for part in parts])[["stimulus_id", "concept", "file"]]
        notes = {
            "warnings": [WARNING],
            "design": f"blocks of {N_PER_BLOCK} pictures of one category, the first {N_TRAIN_PER_BLOCK} for training",
            "channel_names": "published list; the files name none",
            "granularity": self.granularity,
        }
        table = table.drop_duplicates("stimulus_id")
        stimuli = list_stimuli(table.assign(path=table["file"].map(_path_of)), self._find_images())
        kept = [replace(part, trials=part.trials.drop(columns="file")) for part in parts]
        positions = find_scalp_positions(channels, "EEG-ImageNet")
        source = MeegSource("eeg", tuple(kept), stimuli, plan, unit, ch_pos=positions, notes=notes)
        return add_cleaning(source, self)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file and recount every fact that the manifest declares of a complete set."""
        import pandas as pd

        yield CheckFinding("design", True, f"warning: {WARNING}")
        paths = self._find()
        archives: list[Archive] = []
        for path in paths:
            try:
                archive = open_archive(path, trust=False, scratch=None, n_channels=len(CHANNELS), read=False)
            except ConfigError as error:
                # If trust was given, a file that needs it is not a fault of the data.
                yield CheckFinding(path.name, self.trust_pickle, f"not opened: {error}")
            except DataError as error:
                yield CheckFinding(path.name, False, str(error))
            else:
                archives.append(archive)
                n_subjects = archive.entries["subject"].nunique()
                yield CheckFinding(path.name, True, f"{len(archive.entries)} epochs of {n_subjects} subjects")
        if len(archives) < len(paths):
            return
        yield from _check_facts(archives)
        yield look_at("samples", self._describe_samples)
        images = self._find_images()
        files = pd.concat([archive.entries for archive in archives])["file"].unique()
        found = 0 if images is None else sum((images / _path_of(name)).is_file() for name in files)
        text = (
            f"{found} of {len(files)} pictures are available; they come from ImageNet, not with this data set"
        )
        yield CheckFinding("images", True, text)

    def _describe_samples(self) -> str:
        parts = self.open_epochs().parts
        for part in parts:
            sample_part(part, sfreq=SFREQ)
        return f"finite and not flat in the checked pieces, {len(parts)} subjects"

    def _find(self) -> list[Path]:
        """Return the files of one layout below the root or its folder ``data``."""
        root, named = self.find_root(), dict[Path, re.Match[str]]()
        for folder in (root, root / "data"):
            files = sorted(folder.glob("*.pth")) if folder.is_dir() and not named else []
            named |= {path: match for path in files if (match := _NAME.match(path.name))}
        there = {
            "parts": [path for path, match in named.items() if match[1]],
            "single": [path for path, match in named.items() if not match[1]],
        }
        return there[choose_layout(there, self.layout, root, title="EEG-ImageNet", expected=_EXPECTED)]

    def _find_images(self) -> Path | None:
        root = self.find_root()
        return find_picture_folder(self.images, [root / PICTURES, root / "images"])

    def _make_parts(
        self, archives: list[Archive], channels: tuple[str, ...]
    ) -> tuple[list[EpochedPart], str]:
        rows = np.array([CHANNELS.index(name) for name in channels])
        first, last = self.samples
        times = np.arange(first, last) / SFREQ
        there = sorted({int(s) for archive in archives for s in archive.entries["subject"].unique()})
        names = ", ".join(archive.path.name for archive in archives)
        wanted = check_subset(self.subjects, there, what=f"in {names}, subject", option="dataset.subjects")
        parts = []
        for subject in wanted:
            archive = next(a for a in archives if subject in a.entries["subject"].to_numpy())
            trials = select_entries(archive, subject, self.granularity)
            if last > archive.n_times:
                raise ConfigError(
                    f"dataset.samples ends at {last}, but epochs of {archive.path.name} have {archive.n_times} "
                    "samples."
                )
            read = partial(_read, archive, trials["entry"].to_numpy(), rows, slice(first, last))
            parts.append(EpochedPart(trials.drop(columns="entry"), (archive.path,), channels, times, read))
        return parts, archives[0].guess_unit()


def _path_of(file: str) -> str:
    return f"{file.split('_')[0]}/{file}"


def _read(
    archive: Archive, entries: np.ndarray, rows: np.ndarray, samples: slice, start: int, stop: int
) -> np.ndarray:
    return np.stack([archive.read(int(entry))[rows, samples] for entry in entries[start:stop]])


def select_entries(archive: Archive, subject: int, granularity: Granularity) -> pd.DataFrame:
    """Return the trials of a subject: one row per entry, in the order of the file, with `entry` and `file`.

    `run` counts the blocks of the subject, `split` follows the authors: the first 30 pictures of a block are for
    training, the last 20 for testing.

    Raises
    ------
    DataError
        If no trial is left, or the pictures of a block do not belong to its category.
    """
    import pandas as pd

    table = archive.entries
    own = table[table["subject"] == subject].copy()
    # Entries are in the order of presentation, so a new label starts a block.
    block = (own["label"] != own["label"].shift()).cumsum()
    position = own.groupby(block, sort=False).cumcount()
    turns = list(
        zip(block.tolist(), (position // N_PER_BLOCK).tolist(), strict=True)
    )  # a category shown twice in a row
    own["run"] = [f"{number + 1:02d}" for number in pd.factorize(pd.Series(turns))[0]]
    own["split"] = np.where(position % N_PER_BLOCK < N_TRAIN_PER_BLOCK, "train", "test")
    if granularity in ("coarse", "fine"):
        own = own[own["granularity"] == granularity]
    elif granularity != "all":
        task = int(granularity[-1])
        # The authors' five fine tasks are consecutive groups of eight labels in the list.
        own = own[(own["granularity"] == "fine") & own["label"].isin(archive.labels[8 * task : 8 * task + 8])]
    if own.empty:
        raise DataError(
            f"{archive.path} holds no entry of granularity {granularity} of subject {subject}; it has "
            f"{', '.join(sorted(set(table['granularity'])))}: choose another with --set dataset.granularity."
        )
    own["stimulus_id"] = own["file"].str.replace(r"\.[A-Za-z]+$", "", regex=True)
    own["repetition"] = own.groupby("stimulus_id").cumcount()
    own = own.assign(subject=f"{subject:02d}", session="01", concept=own["label"], entry=own.index)
    columns = ["subject", "session", "run", "stimulus_id", "repetition", "split", "concept", "granularity"]
    return own[[*columns, "file", "entry"]].reset_index(drop=True)


def _check_facts(archives: list[Archive]) -> list[CheckFinding]:
    import pandas as pd

    table = pd.concat([archive.entries for archive in archives])
    by_kind = table.groupby("granularity")["label"].nunique()
    found = {
        "n_subjects": int(table["subject"].nunique()), "n_trials": len(table), "n_channels": len(CHANNELS),
        "n_coarse": int(by_kind.get("coarse", 0)), "n_fine": int(by_kind.get("fine", 0)),
    }  # fmt: skip
    declared = read_manifest("eeg_imagenet").facts
    if found["n_subjects"] < declared["n_subjects"]:
        text = f"{found['n_subjects']} of {declared['n_subjects']} subjects are here, so the totals are not compared"
        return [CheckFinding("n_subjects", True, text)]
    return compare_facts(found, declared, None)


PART_NAME, PICTURES = "EEG-ImageNet_{part}.pth", "imageNet_images"
_EXPECTED = f"{PART_NAME.format(part=1)} and {PART_NAME.format(part=2)}, or EEG-ImageNet.pth"
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
        The file's list of categories; the fine tasks are its groups of eight.
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
        """Return ``V``, or ``arbitrary`` if the numbers are too large for volt: the files do not give a unit."""
        # A few epochs over the whole file: one may be flat or hold a blink.
        picked = np.unique(np.linspace(0, len(self.entries) - 1, 20).astype(int)).tolist()
        typical = float(np.median([self.read(row).std(axis=1) for row in picked]))
        return "V" if typical < _VOLT_BELOW else "arbitrary"


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
        Folder for the converted copy of such a file.
    n_channels
        Rows that every epoch must have.
    read
        Whether to make a converted copy; otherwise a file that must be trusted is not opened.

    Raises
    ------
    DataError
        If it is damaged or holds something else.
    ConfigError
        If the user must trust it first.
    """
    import torch

    try:
        content = _load_restricted(path)
    except _NeedsTrustError as error:
        return _convert(path, scratch, n_channels, trust and read, str(error))
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
        # Length of the shortest epoch: all epochs have these samples.
        path,
        entries,
        labels,
        min(t.shape[1] for t in tensors),
        lambda row: tensors[row].float().numpy(),
    )


class _NeedsTrustError(Exception):
    """The restricted reader refused the file."""


def _load_restricted(path: Path) -> Any:
    import pickle

    import torch

    try:
        try:
            # Memory-mapped: a part of 4 GB needs no memory until an epoch is read.
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
    import pandas as pd

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
            raise DataError(f"{path}: entry {number} is missing {', '.join(missing)}; fetch it again.")
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
        raise DataError(
            f"{path} has entries of the category {unlisted[0]}, which is not in its list of labels."
        )
    # File names of ImageNet begin with the synset, which is the label.
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


def _convert(path: Path, scratch: Path | None, n_channels: int, trusted: bool, named: str) -> Archive:
    import pandas as pd

    why = f"{path} holds more than tensors and text ({named}), so opening it can run any code"
    folder, info = convert_trusted(_CONVERT, path, scratch, path.stem, n_channels, trusted=trusted, why=why)
    labels = info.pop("labels")
    entries = pd.DataFrame(info).rename(columns={"image": "file"})
    _check_entries(entries, labels, path)
    data = open_npy(folder / "eeg.npy")
    return Archive(path, entries, labels, data.shape[2], lambda row: data.read_rows(row, row + 1)[0])
