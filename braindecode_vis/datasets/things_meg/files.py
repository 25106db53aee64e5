"""The files of THINGS-MEG: the published epochs, the raw runs, and the tables with the image of each number.

Epochs (``preprocessed_P*-epo.fif`` with its further parts): the authors filtered to 0.1-40 Hz, cut by the optical
sensor, divided by the standard deviation of the baseline (a z-score), and took every sixth sample.

Raw runs (ds004212): CTF folders are opened by MNE's CTF reader, since ``channels.tsv`` types every sensor ``OTHER``.
Leftovers of macOS (``._*``) and empty-room files are not recordings of subjects. An onset is the time at which the
optical sensor saw the picture (events table), as in the authors' own epochs, or the trigger on ``UPPT001``, which
differs by about 150 ms.

Tables: ``image_paths.csv`` and ``image_concept_index.csv`` of THINGS (no header, row = image number - 1), and
``sourcedata/sample_attributes_P*.csv``, whose columns are read by name. Concepts are names, so a table that is shifted
by a row is found by comparing the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, check_columns, is_there, refuse_damage
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.bids.meeg_files import (
    EpochReader,
    bring_recording,
    check_length,
    list_channels,
    make_part,
    open_epochs,
    open_recording,
    read_text_table,
)
from braindecode_vis.datasets.layout import File, Layout
from braindecode_vis.datasets.manifests import check_subset
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    HeldFile,
    check_published_rate,
    find_channels,
)

if TYPE_CHECKING:
    import pandas as pd

CATCH_ID = 999999
PATHS_FILE, CONCEPTS_FILE = "image_paths.csv", "image_concept_index.csv"
_NEEDED = ("trial_type", "things_image_nr", "image_path", "session_nr", "run_nr")
LAYOUT = Layout(
    epochs=File(
        "derivatives/preprocessed/preprocessed_P{subject:d}-epo.fif", "other", "the epochs of a subject", "fetch them"
    ),
    run=File(
        "sub-BIGMEG{subject:d}/ses-{session:02d}/meg/sub-BIGMEG{subject:d}_ses-{session:02d}_task-main_run-{run:02d}"
        "_meg.{form}", "other", "a raw run", "fetch it",
    ),
    attributes=File(
        "sourcedata/sample_attributes_P{subject:d}.csv", "csv", "the attributes of trials", "fetch it", columns=_NEEDED
    ),
)  # fmt: skip
"""The authors' folders; copies of the epochs and of tables may be elsewhere, too."""
# Folder of the THINGS tables on OSF, and folders in which copies were found.
_TABLE_PLACES = ("", "Metadata/Image-specific", "Metadata/Concept-specific", "THINGS/Metadata/Image-specific",
                 "THINGS/Metadata/Concept-specific", "01_image-level", "02_object-level", "metadata")  # fmt: skip


def find_attributes(root: Path, subject: int) -> pd.DataFrame | None:
    """Return the attribute table of a subject, or None if there is none."""
    path = _find_attributes(root, subject)
    return None if path is None else LAYOUT.read_table(path, "attributes")


def read_image_names(root: Path, images: Path | None, attributes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the image of each THINGS number: index `number`, columns `stimulus_id`, `concept`, `file`, `category`.

    Parameters
    ----------
    root, images
        Folders that may hold the two THINGS tables.
    attributes
        Attribute tables of the subjects; they are compared with the THINGS tables, and used instead if these are
        missing.

    Raises
    ------
    DataError
        If the tables disagree, or there is none.
    """
    bases = _list_bases(root, images)
    paths = _find_table(PATHS_FILE, bases)
    listed = None if paths is None else _read_paths(paths, _find_table(CONCEPTS_FILE, bases))
    told = _read_told(attributes)
    if listed is None and told is None:
        raise DataError(
            f"no file near {root} gives the images of the numbers: put image_paths.csv (THINGS, OSF jum2f, "
            "Metadata/Image-specific) or sourcedata/sample_attributes_P1.csv there."
        )
    if listed is None or told is None:
        return told if listed is None else listed  # type: ignore[return-value]
    both = told.index.intersection(listed.index)
    differs = both[told.loc[both, "stimulus_id"].to_numpy() != listed.loc[both, "stimulus_id"].to_numpy()]
    unlisted = len(told) - len(both)
    if len(differs) or unlisted:
        at = differs[0] if len(differs) else told.index.difference(listed.index)[0]
        here = listed["stimulus_id"].get(at, "nothing")
        raise DataError(
            f"{paths} and the sample attributes disagree on {len(differs) + unlisted} image number(s), first {at}: "
            f"{here!r} and {told['stimulus_id'][at]!r}; the list is shifted or of another release (it has no header; "
            "its row is the image number - 1)."
        )
    return listed


def find_name_files(root: Path, images: Path | None, subjects: Iterable[int]) -> list[Path]:
    """Return the existing tables that give the image of a number."""
    bases = _list_bases(root, images)
    listed = [_find_table(name, bases) for name in (PATHS_FILE, CONCEPTS_FILE)]
    return [path for path in (*listed, *(_find_attributes(root, s) for s in subjects)) if path is not None]


def _list_bases(root: Path, images: Path | None) -> list[Path]:
    return [base for base in (root, root.parent, images, None if images is None else images.parent) if base]


def _find_attributes(root: Path, subject: int) -> Path | None:
    path = LAYOUT.place(root, "attributes", subject=subject)
    return next((p for p in (path, root / path.name) if is_there(p)), None)


def _find_table(name: str, bases: Iterable[Path]) -> Path | None:
    return next((b / p / name for b in bases for p in _TABLE_PLACES if is_there(b / p / name)), None)


def _read_paths(path: Path, index: Path | None) -> pd.DataFrame:
    import pandas as pd

    lines = [line.strip().strip('"').replace("\\", "/") for line in path.read_text().splitlines()]
    paths = pd.Series([line for line in lines if line])
    parts = paths.str.extract(r"(?:^|.*/)([^/]+)/([^/]+)\.(\w+)$")
    bad = np.flatnonzero(parts[0].isna())
    if len(bad):
        raise DataError(
            f"{path} has {paths.iloc[bad[0]]!r} in line {bad[0] + 1}, but concept/name.jpg is expected."
        )
    table = pd.DataFrame(
        {"stimulus_id": parts[1], "concept": parts[0], "file": parts[0] + "/" + parts[1] + "." + parts[2]}
    )
    table.index = pd.RangeIndex(1, len(table) + 1, name="number")  # images are counted from 1
    if index is None:
        return table.assign(category=np.nan)
    with refuse_damage(f"{index} must hold one concept number a line, without header", ValueError, hint=""):
        numbers = [int(float(line)) for line in index.read_text().split()]
    if len(numbers) != len(table):
        raise DataError(
            f"{index} numbers {len(numbers)} images and {path} lists {len(table)}: one has a header or is of another "
            "release."
        )
    # Copies count concepts from 0 or from 1.
    table["category"] = np.array(numbers) + (1 - min(numbers) if min(numbers) in (0, 1) else 0)
    for key, other in (("category", "concept"), ("concept", "category")):
        mixed = table.groupby(key)[other].nunique()
        if (mixed > 1).any():
            value = mixed.index[mixed > 1][0]
            raise DataError(
                f"{path} and {index} do not fit: {key} {value} has {mixed[value]} values of {other}; one of them is "
                "shifted by a row or of another release."
            )
    return table


def _read_told(attributes: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    import pandas as pd

    if not attributes:
        return None
    shown = pd.concat(
        [t.loc[t["trial_type"] != "catch", ["things_image_nr", "image_path"]] for t in attributes]
    )
    numbers = pd.to_numeric(shown["things_image_nr"], errors="coerce")
    if not (numbers % 1 == 0).all():
        cell = shown["things_image_nr"][~(numbers % 1 == 0)].iloc[0]
        raise DataError(
            f"the sample attributes give an image the number {cell!r}; a whole number must be there."
        )
    shown = shown.assign(things_image_nr=numbers.astype(int))
    shown = shown.assign(stem=shown["image_path"].map(lambda p: Path(str(p)).stem)).drop_duplicates(
        ["things_image_nr", "stem"]
    )
    twice = shown["things_image_nr"][shown["things_image_nr"].duplicated()]
    if len(twice):
        raise DataError(
            f"the sample attributes give image number {twice.iloc[0]} to several images; they are not as published."
        )
    names = shown["stem"].reset_index(drop=True)
    concepts = names.str.replace(r"_\d+[a-z]*$", "", regex=True)
    return pd.DataFrame(
        {
            "stimulus_id": names,
            "concept": concepts,
            "file": concepts + "/" + names + ".jpg",
            "category": np.nan,
        }
    ).set_index(pd.Index(shown["things_image_nr"], name="number"))


def name_events(numbers: np.ndarray, names: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return `stimulus_id`, `concept` and `file` of each image number; an unknown number is an error."""
    unknown = np.flatnonzero(~np.isin(numbers, names.index.to_numpy()))
    if len(unknown):
        raise DataError(
            f"{where} shows image number {numbers[unknown[0]]} in event {unknown[0] + 1}, but {len(names)} images are "
            f"named, up to number {names.index.max()}: the image list is of another release."
        )
    return names.loc[numbers, ["stimulus_id", "concept", "file"]].reset_index(drop=True)


_NAME = re.compile(r"preprocessed_P(\d+)-epo\.fif$")
_PLACES = (
    "derivatives/preprocessed/*.fif",
    "preprocessed/*.fif",
    "*.fif",
    "*/preprocessed_P*.fif",
    "*/*/preprocessed_P*.fif",
)
_MOST_MISMATCHES = 0.1  # share of rows of the attribute table that may name another image than the epochs


@dataclass(frozen=True, kw_only=True)
class EpochFile(HeldFile):
    """The first part of one subject's epochs."""

    @property
    def files(self) -> list[Path]:
        """Every existing part."""
        stem = self.path.name.removesuffix("-epo.fif")
        return sorted(p for p in self.path.parent.glob(f"{stem}-epo*.fif") if not p.name.startswith("."))


def find_epoch_files(root: Path, subjects: Sequence[int] | None) -> list[EpochFile]:
    """Return the epochs of the chosen subjects, in their order; an empty list if there are none at all."""
    found: dict[int, EpochFile] = {}
    for pattern in _PLACES:
        for path in sorted(root.glob(pattern)):
            match = _NAME.match(path.name)
            if match:
                found.setdefault(int(match[1]), EpochFile(subject=int(match[1]), path=path))
    if not found:
        return []
    chosen = check_subset(subjects, sorted(found), what=f"below {root}, subject", option="dataset.subjects")
    return [found[s] for s in chosen]


def make_epoch_part(
    file: EpochFile,
    names: pd.DataFrame,
    attributes: pd.DataFrame | None,
    channels: tuple[str, ...] | None,
    sfreq: float,
) -> tuple[EpochedPart, dict[str, Any]]:
    """Pair every epoch with its image.

    Parameters
    ----------
    names : DataFrame
        From `read_image_names`.
    attributes
        The attribute table of this subject; metadata in the file are used first.
    channels
        Sensors to read, all by default.
    sfreq
        Rate that the epochs must have, in Hz.

    Returns
    -------
    part : EpochedPart
        Without catch trials; its trials also have `file`.
    notes
        Source of sessions and runs, and number of rows of the attributes with another image.
    """
    import pandas as pd

    hint = f"copy or fetch all of its parts ({', '.join(p.name for p in file.files)} are there)"
    epochs = open_epochs(file.path, file.where, hint)
    check_published_rate(float(epochs.info["sfreq"]), sfreq, file.where)
    chosen = tuple(epochs.ch_names) if channels is None else channels
    columns = find_channels(epochs.ch_names, chosen, file.where)
    numbers = np.asarray(epochs.events[:, 2], dtype=np.int64)
    labels, notes = _find_labels(file, epochs, attributes, numbers)
    rows = np.flatnonzero(numbers != CATCH_ID)
    if not len(rows):
        raise DataError(f"{file.where} has catch trials only.")
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
    import pandas as pd

    inside = epochs.metadata
    named = inside is not None and {"session_nr", "run_nr"} <= set(inside.columns)
    # Metadata inside the file cannot belong to another subject.
    table, source = (inside, "metadata of the epochs") if named else (attributes, "sample attributes")
    if table is None:
        none = pd.DataFrame({"session": ["00"] * len(numbers), "run": "00"})
        return none, {"sessions": "unknown: there is no sample_attributes_P*.csv"}
    if len(table) != len(numbers):
        raise DataError(
            f"{file.where} holds {len(numbers)} epochs, but the {source} list {len(table)} trials: a part of the file "
            "is missing, or the table belongs to another subject."
        )
    n_other = 0
    if "things_image_nr" in table.columns:
        # Catch trials have no image number in the table.
        told = pd.to_numeric(table["things_image_nr"], errors="coerce").fillna(CATCH_ID).to_numpy(np.int64)
        n_other = int((told != numbers).sum())
    if n_other > _MOST_MISMATCHES * len(numbers):
        raise DataError(
            f"{file.where}: {n_other} of {len(numbers)} epochs show another image than the {source} say, above the "
            f"bound of {_MOST_MISMATCHES:.0%}: the table belongs to another subject or is in another order."
        )
    labels = pd.DataFrame(
        {
            "session": [f"{int(value):02d}" for value in table["session_nr"]],
            "run": [f"{int(value):02d}" for value in table["run_nr"]],
        }
    )
    return labels, {"sessions": source, "n_attribute_mismatches": n_other}


Onset = Literal["optical", "trigger"]
DROPPED_SENSOR = "MRO11-1609"  # malfunctioned, by the authors' notes
TRIGGER_CHANNEL, STIMULUS_CODE = "UPPT001", 64
LARGEST_LAG_S = 0.5  # pictures follow each other after 1.3 s or more
# Gaps of 0.2 s in the signal (subject, session, run: start in s) that the authors replace in their preprocessing.
DROPOUTS = {(1, 11, 5): 13.4, (2, 10, 3): 59.8}


@dataclass(frozen=True, kw_only=True)
class MegRun(HeldFile):
    """One recording."""

    session: int
    run: int

    @property
    def events(self) -> Path:
        """The events table."""
        return self.path.with_name(re.sub(r"_meg\.\w+$", "_events.tsv", self.path.name))


def list_runs(root: Path) -> list[MegRun]:
    """Return all runs below `root`, complete or not."""
    return [
        MegRun(**{name: int(labels[name]) for name in ("subject", "session", "run")}, path=path)
        for path, labels in LAYOUT.list_files(root, "run")
        if labels["form"] in ("ds", "fif")
    ]


def find_runs(root: Path, subjects: Sequence[int] | None, sessions: Sequence[int] | None) -> list[MegRun]:
    """Return the runs of the chosen subjects and sessions, in their order.

    Raises
    ------
    DataError
        If a subject, session or run is missing.
    """
    found = list_runs(root)
    there = sorted({run.subject for run in found})
    if not found:
        return []
    chosen = check_subset(subjects, there, what=f"below {root}, subject", option="dataset.subjects")
    longest = sorted({run.session for run in found})
    wanted = check_subset(sessions, longest, what=f"below {root}, session", option="dataset.sessions")
    runs = []
    for subject in chosen:
        for session in wanted:
            here = [run for run in found if (run.subject, run.session) == (subject, session)]
            numbers = [run.run for run in here]
            # All sessions have the same number of runs, so the longest one shows how many there must be.
            last = max((run.run for run in found if run.session == session), default=0)
            missing = sorted(set(range(1, last + 1)) - set(numbers))
            if missing:
                raise DataError(
                    f"subject {subject:02d}, session {session:02d} of THINGS-MEG is missing run {missing[0]:02d} "
                    f"below {root} (found {len(here)} of {last}); fetch it, or list others in dataset.sessions."
                )
            runs.extend(here)
    return runs


def open_run(run: MegRun) -> Any:
    """Open a run without its samples: a CTF folder, or the same recording as FIF."""
    if run.path.suffix != ".ds":
        return open_recording(run.path, run.where)
    import mne

    return open_recording(
        run.path,
        run.where,
        lambda: mne.io.read_raw_ctf(bring_recording(run.path), preload=False, verbose="error"),
    )


def make_run_part(
    run: MegRun,
    raw: Any,
    names: pd.DataFrame,
    channels: tuple[str, ...] | None,
    onset: Onset,
    max_dropped: float,
) -> tuple[ContinuousPart, dict[str, float] | None]:
    """Pair the events of a run with the images.

    Parameters
    ----------
    names : DataFrame
        From `read_image_names`.
    channels
        Sensors to read; by default all gradiometers except the broken one.

    Returns
    -------
    part : ContinuousPart
        Without catch trials; its events also have `is_test` and `file`.
    lag : dict or None
        From `measure_lag`, if the trigger was needed.
    """
    # MNE types the axial gradiometers of a CTF as magnetometers.
    sensors = tuple(n for n in list_channels(raw, ("mag",)) if n != DROPPED_SENSOR)
    if not sensors:
        raise DataError(f"{run.where} has no MEG sensor that its reader recognises; fetch it again.")
    chosen = sensors if channels is None else channels
    find_channels(raw.ch_names, chosen, run.where)
    events = read_run_events(run, raw, names)
    sfreq = float(raw.info["sfreq"])
    lag = None
    if onset == "trigger":
        shift, lag = measure_lag(run, raw, events["sample"].to_numpy())
        lost = ~np.isfinite(shift)
        if lost.sum() > max_dropped * len(events):
            raise DataError(
                f"{run.where}: {int(lost.sum())} of {len(events)} pictures have no trigger with code {STIMULUS_CODE} "
                f"within {LARGEST_LAG_S} s; set dataset.onset to optical."
            )
        events = events[~lost].reset_index(drop=True)
        events["sample"] -= np.round(shift[~lost]).astype(np.int64)
        events["onset"] = events["sample"] / sfreq
    shown = events[~events["is_catch"]].reset_index(drop=True)
    recording = Recording(
        f"{run.subject:02d}", f"{run.session:02d}", f"{run.run:02d}", "meg", (run.path, run.events), shown
    )
    start = DROPOUTS.get((run.subject, run.session, run.run))
    gap = () if start is None else ((round(start * sfreq), round((start + 0.2) * sfreq)),)
    part = make_part(recording, raw, chosen, ("mag",), run.where, leave_out=(DROPPED_SENSOR,), bridged=gap)
    return part, lag


def read_run_events(run: MegRun, raw: Any, names: pd.DataFrame) -> pd.DataFrame:
    """Return every event of a run with its optical onset: pictures by name, catch trials marked `is_catch`."""
    import pandas as pd

    table = read_text_table(run.events, run.where)
    check_columns(table.columns, ("onset", "trial_type", "value"), what=str(run.events))
    sfreq = float(raw.info["sfreq"])
    onset = read_numbers(table, "onset", run.events)
    check_length(float(onset.max()), raw, run.where, "fetch both again")
    events = pd.DataFrame({"onset": onset, "sample": np.round(onset * sfreq).astype(np.int64)})
    # The column counts samples of the CTF files, not of a resampled copy.
    if "sample" in table.columns and sfreq == 1200:
        apart = np.abs(read_numbers(table, "sample", run.events) - events["sample"]).max()
        if apart > 1:
            raise DataError(
                f"{run.events}: onset and sample differ by up to {apart:.0f} samples; fetch it again."
            )
    is_catch = (table["trial_type"] == "catch").to_numpy(bool)
    number = pd.to_numeric(table["value"], errors="coerce").to_numpy(float)
    empty = np.flatnonzero(~is_catch & ~np.isfinite(number))
    if len(empty):
        raise DataError(
            f"{run.events} gives no image number in line {empty[0] + 2}, which is not a catch trial."
        )
    named = name_events(number[~is_catch].astype(np.int64), names, run.where)
    for column in ("stimulus_id", "concept", "file"):
        events[column] = None
        events.loc[~is_catch, column] = named[column].to_numpy()
    _check_categories(run, table[~is_catch], number[~is_catch], names)
    return events.assign(
        is_catch=is_catch, is_test=(table["trial_type"] == "test").to_numpy(bool), split="train", repetition=0
    )


def _check_categories(run: MegRun, table: pd.DataFrame, number: np.ndarray, names: pd.DataFrame) -> None:
    """Compare the concept number of each event with that of its image: a shift by one is found here."""
    import pandas as pd

    if "things_category_nr" not in table.columns or names["category"].isna().all():
        return
    told = pd.to_numeric(table["things_category_nr"], errors="coerce").to_numpy(float)
    listed = names.loc[number.astype(np.int64), "category"].to_numpy(float)
    differs = np.flatnonzero(told != listed)
    if len(differs):
        at = differs[0]
        raise DataError(
            f"{run.where}: image {number[at]:.0f} has concept number {told[at]:.0f} in its events, but "
            f"{int(listed[at])} in image_concept_index.csv ({len(differs)} of {len(told)} such events): the list is "
            "shifted or of another release."
        )


def measure_lag(run: MegRun, raw: Any, optical: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Return the samples from each trigger to its optical onset (NaN without trigger), and a summary in ms."""
    if TRIGGER_CHANNEL not in raw.ch_names:
        raise DataError(f"{run.where} has no channel {TRIGGER_CHANNEL}; set dataset.onset to optical.")
    code = np.round(raw.get_data(picks=[TRIGGER_CHANNEL], verbose="error")[0]).astype(np.int64)
    # Samples at which the channel changes to the code of a picture.
    triggers = np.flatnonzero((code[1:] == STIMULUS_CODE) & (code[:-1] != STIMULUS_CODE)) + 1
    sfreq = float(raw.info["sfreq"])
    if not len(triggers):
        raise DataError(
            f"{run.where} has no code {STIMULUS_CODE} on {TRIGGER_CHANNEL}; set dataset.onset to optical."
        )
    # The nearest trigger before or after: the sign of the lag is not known.
    right = np.clip(np.searchsorted(triggers, optical), 1, max(1, len(triggers) - 1))
    pair = triggers[np.stack([right - 1, np.minimum(right, len(triggers) - 1)])]
    nearest = np.where(np.abs(optical - pair[0]) <= np.abs(optical - pair[1]), pair[0], pair[1])
    shift = (optical - nearest).astype(float)
    shift[np.abs(shift) > LARGEST_LAG_S * sfreq] = np.nan
    known = shift[np.isfinite(shift)] / sfreq * 1000
    if not len(known):
        raise DataError(f"{run.where}: no trigger is within {LARGEST_LAG_S} s of an optical onset.")
    summary = {
        "median_ms": float(np.median(known)),
        "min_ms": float(known.min()),
        "max_ms": float(known.max()),
        "n_without_trigger": float(len(shift) - len(known)),
        "n_triggers_more": float(len(triggers) - len(known)),
    }
    return shift, summary
