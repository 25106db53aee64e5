"""EEG-ImageNet (Zhu et al. 2024): 62-channel EEG of 16 people who saw ImageNet pictures of 80 categories.

Owns the configuration, the two layouts (``EEG-ImageNet_1.pth`` and ``_2.pth``, or one ``EEG-ImageNet.pth``), and the
meaning of each entry. What a ``.pth`` file holds is a dictionary of tensors and text, so torch opens it without
running anything; a file that needs more is opened only if the user trusts it.

All 50 pictures of a category were shown in one block. Whatever drifts over minutes therefore tells the category, and
decoding it says nothing of vision (Li et al. 2021). Every use of the data carries a warning.

References
----------
Zhu et al. (2024), arXiv:2406.07151.
Li et al. (2021), doi:10.1109/TPAMI.2020.2973153: the confound of block designs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.fmri_stimuli import hash_image_folder
from braindecode_vis.datasets.eeg_imagenet.files import Archive, find_archives, open_archive
from braindecode_vis.datasets.manifests import Finding, RecordedSettings, check_root, read_manifest
from braindecode_vis.datasets.sources.cleaning_options import CleaningOptions, add_cleaning
from braindecode_vis.datasets.sources.meeg_source import (
    EpochedPart,
    EpochPlan,
    MeegSource,
    SampleType,
    find_scalp_positions,
    list_stimuli,
)
from braindecode_vis.datasets.sources.spot_checks import sample_part
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_sampled

SFREQ = 1000.0
CHANNELS = (
    "Fp1", "Fpz", "Fp2", "AF3", "AF4", "F7", "F5", "F3", "F1", "Fz", "F2", "F4", "F6", "F8", "FT7", "FC5", "FC3", "FC1",
    "FCz", "FC2", "FC4", "FC6", "FT8", "T7", "C5", "C3", "C1", "Cz", "C2", "C4", "C6", "T8", "TP7", "CP5", "CP3", "CP1",
    "CPz", "CP2", "CP4", "CP6", "TP8", "P7", "P5", "P3", "P1", "Pz", "P2", "P4", "P6", "P8", "PO7", "PO5", "PO3", "POz",
    "PO4", "PO6", "PO8", "CB1", "O1", "Oz", "O2", "CB2",
)  # fmt: skip
"""The list that its authors publish beside the code, without mastoids, EOG and triggers; the files name no channels."""
N_PER_BLOCK = 50
N_TRAIN_PER_BLOCK = 30
WARNING = (
    "EEG-ImageNet shows all 50 pictures of a category in one block, so that any slow drift of the recording tells the "
    "category: decoding categories, or pictures among those of several categories, says nothing of vision here. "
    "Compare pictures within one category, or use a data set with a random order."
)
Granularity = Literal["all", "coarse", "fine", "fine0", "fine1", "fine2", "fine3", "fine4"]


class EegImagenetConfig(CleaningOptions, RecordedSettings):
    """Where the files lie, whom and what to read.

    Parameters
    ----------
    root
        Folder of the ``.pth`` files.
    images
        Folder of ImageNet pictures, ``<wnid>/<wnid>_<number>.JPEG``; found as ``imageNet_images`` below the root by
        default. The data set comes without them, and trials can be preprocessed without them.
    layout
        ``parts`` (one or both of two), ``single``, or whichever there is.
    subjects
        Numbers 0 to 15 to read; all that are there by default.
    granularity
        Coarse or fine categories, all of them, or one of the five fine tasks of eight categories each.
    channels
        Names to keep, in this order; all 62 by default.
    samples
        First and past-the-last sample of an epoch that is kept; 40 to 440 as in the authors' code.
    dtype
        Type of the stored numbers.
    trust_pickle
        Open files that torch would not open without running code they name; in a process of their own.
    scaling
        As in `CleaningOptions`, whose other options are refused: the files hold epochs.
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
        """Return a digest of every file: of its size and of samples of its content, since a part has 4 GB."""
        images = hash_image_folder(self._find_images())
        return images | {path.name: hash_sampled(path) for path in self._find()}

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return one part per subject and category block; samples stay in the files.

        Parameters
        ----------
        scratch
            Folder for converted copies of files that must be trusted.

        Raises
        ------
        DataError, ConfigError
            If a file is damaged, or does not hold what it should; the message names file, subject and entry.
        """
        first, last = self.samples
        if not 0 <= first < last:
            raise ConfigError(f"dataset.samples must be an ascending pair from 0 on, not {first} and {last}.")
        channels = CHANNELS if self.channels is None else self.channels
        unknown = [name for name in channels if name not in CHANNELS]
        if unknown or not channels or len(set(channels)) != len(channels):
            raise ConfigError(
                "dataset.channels must name some of the 62 channels once each, "
                f"not {unknown[0] if unknown else channels!r}."
            )
        archives = [
            open_archive(path, trust=self.trust_pickle, scratch=scratch, n_channels=len(CHANNELS))
            for path in self._find()
        ]
        check_disjoint(archives)
        parts, unit = self._make_parts(archives, channels)
        tmin, tmax = first / SFREQ, last / SFREQ
        plan = EpochPlan(SFREQ, tmin, tmax, (tmin, tmax), None, "none", self.dtype)
        table = pd.concat([part.trials for part in parts])[["stimulus_id", "concept", "file"]]
        notes = {
            "warnings": [WARNING],
            "design": f"blocks of {N_PER_BLOCK} pictures of one category, the first {N_TRAIN_PER_BLOCK} for training",
            "channel_names": "published list; the files name none",
            "granularity": self.granularity,
        }
        stimuli = self._make_stimuli(table.drop_duplicates("stimulus_id"))
        kept = [_without_file(part) for part in parts]
        positions = find_scalp_positions(channels, "EEG-ImageNet")
        source = MeegSource("eeg", tuple(kept), stimuli, plan, unit, ch_pos=positions, notes=notes)
        return add_cleaning(source, self)

    def check(self) -> list[Finding]:
        """Open every file and recount every fact that the manifest declares of a complete set."""
        findings = [Finding("design", True, f"warning: {WARNING}")]
        try:
            paths = self._find()
        except (DataError, ConfigError) as error:
            return [*findings, Finding("layout", False, str(error))]
        archives: list[Archive] = []
        for path in paths:
            try:
                archives.append(
                    open_archive(path, trust=False, scratch=None, n_channels=len(CHANNELS), read=False)
                )
                table = archives[-1].entries
                findings.append(
                    Finding(path.name, True, f"{len(table)} epochs of {table['subject'].nunique()} people")
                )
            except ConfigError as error:
                findings.append(Finding(path.name, self.trust_pickle, f"not opened: {error}"))
            except DataError as error:
                findings.append(Finding(path.name, False, str(error)))
        if len(archives) == len(paths):
            findings += [*_check_facts(archives), self._check_samples()]
            images = self._find_images()
            table = pd.concat([archive.entries for archive in archives]).drop_duplicates("file")
            found = (
                0 if images is None else sum((images / _path_of(name)).is_file() for name in table["file"])
            )
            findings.append(
                Finding(
                    "images",
                    True,
                    f"{found} of {len(table)} pictures are at hand; they come from ImageNet, not with this data set",
                )
            )
        return findings

    def _check_samples(self) -> Finding:
        try:
            parts = self.open_epochs().parts
            for part in parts:
                sample_part(part, sfreq=SFREQ)
        except (DataError, ConfigError) as error:
            return Finding("samples", False, str(error))
        return Finding("samples", True, f"finite and not flat where looked at, {len(parts)} people")

    def _find(self) -> list[Path]:
        return find_archives(check_root(self.root, read_manifest("eeg_imagenet")), self.layout)

    def _find_images(self) -> Path | None:
        if self.images is not None:
            folder = self.images.expanduser()
            if not folder.is_dir():
                raise DataError(f"the folder of images {folder} does not exist; correct dataset.images.")
            return folder
        root = check_root(self.root, read_manifest("eeg_imagenet"))
        return next((p for p in (root / "imageNet_images", root / "images") if p.is_dir()), None)

    def _make_parts(
        self, archives: list[Archive], channels: tuple[str, ...]
    ) -> tuple[list[EpochedPart], str]:
        rows = np.array([CHANNELS.index(name) for name in channels])
        first, last = self.samples
        times = np.arange(first, last) / SFREQ
        there = sorted({int(s) for archive in archives for s in archive.entries["subject"].unique()})
        wanted = there if self.subjects is None else list(self.subjects)
        absent = [subject for subject in wanted if subject not in there]
        if absent:
            raise DataError(
                f"subject {absent[0]} of EEG-ImageNet is in none of {', '.join(a.path.name for a in archives)}, "
                f"which hold {', '.join(map(str, there))}; fetch the other part, or list others with "
                "--set dataset.subjects."
            )
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

    def _make_stimuli(self, table: pd.DataFrame) -> StimulusSet:
        pictures = table.assign(path=[_path_of(name) for name in table["file"]])
        return list_stimuli(pictures, self._find_images())


def _without_file(part: EpochedPart) -> EpochedPart:
    return EpochedPart(part.trials.drop(columns="file"), part.files, part.ch_names, part.times, part.read)


def _path_of(file: str) -> str:
    return f"{file.split('_')[0]}/{file}"


def _read(
    archive: Archive, entries: np.ndarray, rows: np.ndarray, samples: slice, start: int, stop: int
) -> np.ndarray:
    return np.stack([archive.read(int(entry))[rows, samples] for entry in entries[start:stop]])


def select_entries(archive: Archive, subject: int, granularity: Granularity) -> pd.DataFrame:
    """Return the trials of a person: one row per entry, in the order of the file, with `entry` and `file`.

    `run` counts the blocks of the person, `split` follows the authors: the first 30 pictures of a block are for
    training, the last 20 for testing.

    Raises
    ------
    DataError
        If nothing is left, or the pictures of a block are not of its category.
    """
    table = archive.entries
    own = table[table["subject"] == subject].copy()
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


def check_disjoint(archives: list[Archive]) -> None:
    """Raise `DataError` if a person is in two files: the same part twice, under two names."""
    seen: dict[int, Path] = {}
    for archive in archives:
        for subject in archive.entries["subject"].unique().tolist():
            if subject in seen:
                raise DataError(
                    f"subject {subject} is in both {seen[subject].name} and {archive.path.name}: one of them is the "
                    "other part under a wrong name; fetch it again."
                )
            seen[subject] = archive.path


def _check_facts(archives: list[Archive]) -> list[Finding]:
    table = pd.concat([archive.entries for archive in archives])
    by_kind = table.groupby("granularity")["label"].nunique()
    found = {
        "n_subjects": int(table["subject"].nunique()), "n_trials": len(table), "n_channels": len(CHANNELS),
        "n_coarse": int(by_kind.get("coarse", 0)), "n_fine": int(by_kind.get("fine", 0)),
    }  # fmt: skip
    declared = read_manifest("eeg_imagenet").facts
    if found["n_subjects"] < declared["n_subjects"]:
        text = f"{found['n_subjects']} of {declared['n_subjects']} people are here, so the totals are not compared"
        return [Finding("n_subjects", True, text)]
    return [
        Finding(
            name,
            found[name] == value,
            f"{value} as declared" if found[name] == value else f"declared {value}, found {found[name]}",
        )
        for name, value in declared.items()
    ]
