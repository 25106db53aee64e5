"""Any BIDS data set of EEG or MEG, read with a recipe: which column of the events table names the image, and so on.

Owns the settings, the application of the recipe to one events table, and the choice and opening of recordings. Cells
are text throughout: a stimulus called ``021.50`` stays that. `open_epochs` gives lazy parts and reads no samples.
Contains nothing about a particular data set.

References
----------
Appelhoff et al. (2019), MNE-BIDS, Journal of Open Source Software 4, 1896. doi:10.21105/joss.01896
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import field_validator, model_validator

from braindecode_vis.base.arrays import Modality, Recording
from braindecode_vis.base.checks import ConfigError, DataError, suggest
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.bids.meeg_files import (
    EXTENSIONS,
    PLACES,
    HeldRecording,
    bring_sidecars,
    check_length,
    describe_images,
    find_recordings,
    find_sensor_positions,
    hash_images,
    list_channels,
    list_recording_files,
    make_part,
    make_shown_table,
    make_stimuli,
    open_recording,
    read_text_table,
)
from braindecode_vis.datasets.manifests import CheckFinding, Label, check_subset, collect_findings, look_at
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    MeegSettings,
    MeegSource,
    Mvnn,
    add_cleaning,
    find_channels,
    number_repetitions,
    sample_part,
)

if TYPE_CHECKING:
    import pandas as pd

_ENDING = r"\.[A-Za-z]{2,4}$"
OnsetUnit = Literal["seconds", "milliseconds", "samples"]


class BidsSplitRecipe(Settings):
    """Which events are training trials and which are test trials, by one column of the events table.

    Parameters
    ----------
    column
        Column with the split.
    test
        Its values on test trials.
    train
        Its values on training trials; all others by default. If both are given, trials with other values are left out.
    """

    column: str
    test: tuple[str, ...]
    train: tuple[str, ...] | None = None

    @field_validator("test", "train", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _sides_differ(self) -> BidsSplitRecipe:
        both = sorted(set(self.test) & set(self.train or ()))
        if both:
            raise ValueError(f"{both[0]!r} is given for both training and test")
        return self


class BidsRecipe(Settings):
    """How to read the events table; see `BidsMeegConfig`, which has these settings among its own."""

    stimulus_column: str = "stim_file"
    id_from: Literal["name", "path"] = "name"
    concept_column: str | None = None
    concept_pattern: str | None = None
    trial_type_column: str = "trial_type"
    trial_types: tuple[str, ...] | None = None
    onset_column: str = "onset"
    onset_unit: OnsetUnit = "seconds"
    split: Literal["none"] | BidsSplitRecipe = "none"

    @field_validator("concept_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression ({error})") from error
            if groups < 1:
                raise ValueError(f"{value!r} needs a group in parentheses that catches the concept")
        return value

    @field_validator("trial_types", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list | tuple) else value


def apply_recipe(
    recipe: BidsRecipe, table: pd.DataFrame, path: Path, sfreq: float, max_dropped: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the events that show an image, sorted by onset, and counts of the other events.

    Parameters
    ----------
    table
        Cells as text, NaN where missing.
    path
        Path of the table, for messages.
    sfreq
        Sampling rate of the recording, in Hz.
    max_dropped
        Largest share of the chosen events that may have no onset or no image.

    Returns
    -------
    events : DataFrame
        `onset` (s), `sample`, `stimulus_id`, `concept`, `file`, `split` and `repetition` (zero for now).
    counts : dict
        Numbers of events of other types, without an image, and in no split.
    """
    import pandas as pd

    counts = {"n_other_type": 0, "n_without_image": 0, "n_of_neither_split": 0}
    if recipe.trial_types is not None:
        kinds = _column(table, recipe.trial_type_column, path, "trial_type_column")
        chosen = kinds.isin(recipe.trial_types).to_numpy()
        if not chosen.any():
            there = ", ".join(map(str, kinds.dropna().unique()[:8]))
            raise DataError(
                f"{path} has no event of the type {' or '.join(recipe.trial_types)}; its "
                f"{recipe.trial_type_column} are {there}."
            )
        counts["n_other_type"] = int((~chosen).sum())
        table = table[chosen]
    stimulus = _column(table, recipe.stimulus_column, path, "stimulus_column")
    known = stimulus.notna().to_numpy()
    counts["n_without_image"] = int((~known).sum())
    # If no types are chosen, events without an image are skipped; if types are chosen, each event must name one.
    if not known.any() or (recipe.trial_types is not None and (~known).sum() > max_dropped * len(table)):
        raise DataError(
            f"{path} has no known image in {int((~known).sum())} of {len(table)} events (column "
            f"{recipe.stimulus_column}), "
            f"above the bound of {max_dropped:.1%}; choose the events with --set dataset.trial_types=[...], or another "
            "column with --set dataset.stimulus_column=NAME."
        )
    table, stimulus = table[known], stimulus[known]
    # Experiments that ran on Windows write backslashes.
    file = stimulus.str.strip().str.replace("\\", "/", regex=False)
    name = file.str.rsplit("/", n=1).str[-1] if recipe.id_from == "name" else file
    events = pd.DataFrame({"file": file, "stimulus_id": name.str.replace(_ENDING, "", regex=True)})
    events["concept"] = _find_concepts(recipe, table, file, path)
    events["split"] = _find_split(recipe.split, table, path)
    _column(table, recipe.onset_column, path, "onset_column")
    per_second = {"seconds": 1.0, "milliseconds": 1000.0, "samples": sfreq}[recipe.onset_unit]
    events["onset"] = read_numbers(table, recipe.onset_column, path) / per_second
    events["sample"] = np.round(events["onset"] * sfreq).astype(np.int64)
    events["repetition"] = 0
    kept = events["split"].notna().to_numpy()
    counts["n_of_neither_split"] = int((~kept).sum())
    return events[kept].sort_values("sample", kind="stable").reset_index(drop=True), counts


def _column(table: pd.DataFrame, name: str, path: Path, option: str) -> pd.Series:
    if name not in table.columns:
        raise DataError(
            f"{path} has no column {name!r}{suggest(name, list(table.columns))}; its columns are "
            f"{', '.join(table.columns)}: set the right one with --set dataset.{option}=NAME."
        )
    return table[name]


def _find_concepts(recipe: BidsRecipe, table: pd.DataFrame, file: pd.Series, path: Path) -> pd.Series:
    """Return the concept of each event: from the column, the pattern or the folder, or the image itself."""
    import pandas as pd

    if recipe.concept_column is not None and recipe.concept_pattern is not None:
        raise ConfigError("dataset.concept_column and dataset.concept_pattern exclude each other; give one.")
    if recipe.concept_column is not None:
        concepts = _column(table, recipe.concept_column, path, "concept_column")
    elif recipe.concept_pattern is not None:
        pattern = re.compile(recipe.concept_pattern)
        matches = [pattern.search(name) for name in file]
        concepts = pd.Series([m[1] if m else None for m in matches], index=file.index, dtype=object)
    else:
        folder = file.str.extract(r"(?:^|.*/)([^/]+)/[^/]+$")[0]
        return folder.fillna(file.str.replace(_ENDING, "", regex=True))
    missing = concepts.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{path}: the concept of {int(missing.sum())} of {len(file)} images is not known, first "
            f"{file[missing].iloc[0]!r}; correct dataset.concept_column or dataset.concept_pattern."
        )
    return concepts


def _find_split(split: Any, table: pd.DataFrame, path: Path) -> np.ndarray:
    if split == "none":
        return np.full(len(table), "none", dtype=object)
    values = _column(table, split.column, path, "split.column")
    out = np.full(len(table), None if split.train is not None else "train", dtype=object)
    # An event without a value is in neither split.
    out[values.isna()] = None
    if split.train is not None:
        out[values.isin(split.train)] = "train"
    out[values.isin(split.test)] = "test"
    return out


def check_split(split: Any, tables: Iterable[pd.DataFrame]) -> None:
    """Raise unless there are training and test trials, and no image is on both sides."""
    if split == "none":
        return
    shown: dict[str, set[str]] = {"train": set(), "test": set()}
    for table in tables:
        for name, events in table.groupby("split"):
            shown[str(name)] |= set(events["stimulus_id"])
    # A split by a misspelt value would leave one side empty.
    for name, images in shown.items():
        if not images:
            raise ConfigError(
                f"dataset.split finds no {'training' if name == 'train' else name} trial: no {split.column} is "
                f"{', '.join(split.test if name == 'test' else split.train or ('another value',))}."
            )
    both = sorted(shown["train"] & shown["test"])
    if both:
        raise DataError(
            f"dataset.split shows {len(both)} image(s) both in training and in test, first {both[0]!r}: split by "
            "a column that belongs to the image, or set it to none and split by image later."
        )


# MNE converts every format to SI units.
_UNITS = {"eeg": "V", "mag": "T", "grad": "T/m"}


class BidsMeegConfig(MeegSettings, BidsRecipe):
    """Folder of the data set, how its events are read, and how trials are cut.

    Parameters
    ----------
    root
        Folder of the data set (``sub-01``...).
    images
        Folder of the images; the file names in `stimulus_column` are relative to it; ``stimuli`` or a similar folder
        below the root by default.
    datatype
        ``eeg`` or ``meg``; ``auto`` takes the one that exists.
    task, subjects, sessions, runs
        BIDS labels to read; by default all that exist. ``emptyroom`` is never read.
    stimulus_column
        Column that names the image, as a file or any text. Backslashes become slashes. Rows without a value
        show no image.
    id_from
        The id of an image is its ``name`` without folder and ending, or its whole ``path`` without ending if names
        repeat in several folders.
    concept_column, concept_pattern
        Column that names the concept, or a regular expression whose first group catches it in the image's name; the
        folder of the image by default, else the image itself.
    trial_types, trial_type_column
        Values of a column that choose the events; all events by default.
    onset_column, onset_unit
        Column of the onsets, and ``seconds`` (the BIDS standard), ``milliseconds`` or ``samples``.
    split
        ``none``, or a column with its values on test (and training) trials.
    sidecars
        Apply ``channels.tsv`` and ``electrodes.tsv`` through mne-bids. If false, only the recording itself is used.
    picks
        Channels to read: ``auto`` for all of the data type, ``eeg``, ``mag``, ``grad``, or names.
    sfreq
        Rate of the trials in Hz, a whole fraction of the rate of the recordings; by default their rate.
    mvnn
        As in `EpochPlan`. It needs a split, since it is fitted on training trials.
    bads
        As in `CleaningOptions`. Channels that ``channels.tsv`` marks as bad are among the bad ones of that recording.
    ica, autoreject, scaling
        As in `CleaningOptions`. They are fitted on training trials and need a split, too.
    """

    kind: Literal["bids_meeg"] = "bids_meeg"
    datatype: Literal["auto", "eeg", "meg"] = "auto"
    task: str | None = None
    subjects: tuple[Label, ...] | None = None
    sessions: tuple[Label, ...] | None = None
    runs: tuple[Label, ...] | None = None
    sidecars: bool = True
    picks: Literal["auto", "eeg", "mag", "grad"] | tuple[str, ...] = "auto"
    mvnn: Mvnn = "none"

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, held, _ = self._find()
        files: dict[str, Path] = {}
        for item in held:
            files |= list_recording_files(item.path, root)
        return hash_images(self.images, root) | digest_files(files)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        root, held, datatype = self._find()
        # All of these are fitted on training trials only, so the recipe must define the training trials.
        learning = [name for name in ("ica", "autoreject", "scaling") if getattr(self, name) is not None]
        if self.split == "none" and (self.mvnn != "none" or learning):
            raise ConfigError(
                f"dataset.{learning[0] if learning else 'mvnn'} is fitted on training trials, but dataset.split is "
                "none; choose training trials with dataset.split, or leave it out (noise normalisation: mvnn none)."
            )
        parts: list[ContinuousPart] = []
        left_out: dict[str, Any] = {}
        bads: dict[str, Any] = {}
        for item in held:
            raw = self._open(item)
            names, kind = self._pick(raw, item, datatype)
            part, counts = self._make_part(item, raw, names, datatype)
            if not parts:
                first_kind, positions, sfreq = (
                    kind,
                    find_sensor_positions(raw, names),
                    self.sfreq or part.sfreq,
                )
            parts.append(part)
            left_out |= {item.path.name: counts} if any(counts.values()) else {}
            bads |= {item.path.name: list(raw.info["bads"])} if raw.info["bads"] else {}
        check_split(self.split, [part.recording.events for part in parts])
        plan = self.make_plan(sfreq=sfreq)
        notes: dict[str, Any] = {"stimulus_column": self.stimulus_column, "onset_unit": self.onset_unit}
        notes |= {"events_left_out": left_out} if left_out else {}
        if bads:
            kept = {"keep": "_but_kept", "drop": "_and_dropped", "interpolate": "_and_interpolated"}
            notes["channels_marked_bad" + kept[self.bad_channels]] = bads
        parts = number_repetitions(parts)
        stimuli = self._find_images(parts, root)
        modality: Modality = "eeg" if first_kind == "eeg" else "meg"
        source = MeegSource(
            modality, tuple(parts), stimuli, plan, _UNITS[first_kind], ch_pos=positions, notes=notes
        )
        return add_cleaning(source, self)

    @collect_findings("recordings")
    def check(self) -> Iterator[CheckFinding]:
        """Open every recording and apply the recipe to its events."""
        root, held, datatype = self._find()
        yield CheckFinding("recordings", True, f"{len(held)} of {datatype} below {root}")

        def describe(item: HeldRecording) -> str:
            raw = self._open(item)
            names, kind = self._pick(raw, item, datatype)
            part, counts = self._make_part(item, raw, names, datatype)
            sample_part(part)
            told = ", ".join(f"{value} {key[2:].replace('_', ' ')}" for key, value in counts.items() if value)
            n_images = part.trials["stimulus_id"].nunique()
            text = f"{len(names)} {kind} channels, {part.sfreq:g} Hz, {len(part.trials)} events of {n_images} images"
            return text + (f"; left out: {told}" if told else "")

        for item in held:
            yield look_at("/".join(item.path.relative_to(root).parts), describe, item)
        yield look_at("source", lambda: describe_images(self.open_epochs().stimuli))

    def _find(self) -> tuple[Path, list[HeldRecording], Modality]:
        root = self.find_root()
        kinds = ("eeg", "meg") if self.datatype == "auto" else (self.datatype,)
        found = find_recordings(root, kinds, self.task)
        # One array cannot hold both volt and tesla.
        kinds_there = sorted({item.datatype for item in found})
        if not found:
            task = "" if self.task is None else f" of the task {self.task}"
            raise DataError(
                f"no {' or '.join(kinds)} recording{task} was found below {root}: expected sub-01/[ses-01/]"
                f"{kinds[0]}/sub-01_..._{kinds[0]}{EXTENSIONS[kinds[0]][0]} and its like."
            )
        if len(kinds_there) > 1:
            raise ConfigError(
                f"{root} holds both EEG and MEG; choose one with --set dataset.datatype=eeg or meg."
            )
        tasks = sorted({item.task for item in found})
        if len(tasks) > 1:
            raise ConfigError(
                f"{root} holds the tasks {', '.join(tasks)}; choose one with --set dataset.task=NAME."
            )
        # The subject last: sorting is stable, so that runs stay in order within a session.
        for name in ("run", "session", "subject"):
            there = sorted({getattr(item, name) for item in found})
            wanted = check_subset(
                getattr(self, f"{name}s"), there, what=f"below {root}, {name}", option=f"dataset.{name}s"
            )
            found = [item for label in wanted for item in found if getattr(item, name) == label]
        if not found:
            raise DataError(
                f"no recording below {root} has the requested combination of subjects, sessions and runs."
            )
        return root, found, "eeg" if kinds_there[0] == "eeg" else "meg"

    def _open(self, item: HeldRecording) -> Any:
        if not self.sidecars:
            return open_recording(item.path, item.where)

        def read_with_sidecars() -> Any:
            import mne_bids

            bids = item.bids
            if bids is None:
                local = bring_sidecars(item.path, self.find_root())
                bids = mne_bids.get_bids_path_from_fname(local, verbose="error")
            return mne_bids.read_raw_bids(bids, verbose="error")

        try:
            return open_recording(item.path, item.where, read_with_sidecars)
        except DataError as error:
            raise DataError(
                f"{error} If only its sidecars are at fault, set dataset.sidecars to false."
            ) from error

    def _pick(self, raw: Any, item: HeldRecording, datatype: str) -> tuple[tuple[str, ...], str]:
        """Return the channels to read and their type."""
        types = dict(zip(raw.ch_names, raw.get_channel_types(), strict=True))
        if isinstance(self.picks, tuple):
            find_channels(raw.ch_names, self.picks, item.where)
            names = self.picks
        elif self.picks == "auto":
            names = list_channels(raw, ("eeg",) if datatype == "eeg" else ("mag", "grad"))
        else:
            names = list_channels(raw, (self.picks,))
        kinds = sorted({types[name] for name in names})
        if not names:
            hint = "; if channels.tsv is wrong, set dataset.sidecars to false" if self.sidecars else ""
            raise DataError(
                f"{item.where} has no channel for picks {self.picks!r}: its types are "
                f"{', '.join(sorted(set(types.values())))}{hint}, or name channels with --set dataset.picks=[...]."
            )
        if len(kinds) > 1 or kinds[0] not in _UNITS:
            raise ConfigError(
                f"{item.where}: the channels to read are of the types {', '.join(kinds)}, whose units differ or "
                "are not brain signals; choose with --set dataset.picks=eeg, mag, grad or names."
            )
        return names, kinds[0]

    def _make_part(
        self, item: HeldRecording, raw: Any, names: tuple[str, ...], datatype: Modality
    ) -> tuple[ContinuousPart, dict[str, int]]:
        table = read_text_table(item.events, item.where)
        sfreq = float(raw.info["sfreq"])
        events, counts = apply_recipe(self, table, item.events, sfreq, self.max_dropped)
        if events.empty:
            raise DataError(f"{item.where}: no event is left after the selection; check dataset.split.")
        hint = f"its onsets were read as {self.onset_unit}; see dataset.onset_unit (seconds, milliseconds, samples)"
        check_length(float(events["onset"].iloc[-1]), raw, item.where, hint)
        recording = Recording(
            item.subject, item.session, item.run, datatype, (item.path, item.events), events
        )
        find_channels(raw.ch_names, names, item.where)
        kinds = tuple({raw.get_channel_types(picks=[name])[0] for name in names})
        return make_part(recording, raw, names, kinds, item.where), counts

    def _find_images(self, parts: list[ContinuousPart], root: Path) -> StimulusSet:
        try:
            shown = make_shown_table(part.recording.events for part in parts)
        except DataError as error:
            raise DataError(
                f"{error} If file names are repeated in several folders, set dataset.id_from to path."
            ) from error
        guesses = [root / "stimuli", *[root / place for place in PLACES]]
        return make_stimuli(
            shown, self.images, guesses, lambda file, _: (file, file.removeprefix("stimuli/"))
        )
