"""THINGS-EEG1 (Grootswagers et al. 2022): rapid streams of 22,248 images, raw or as continuous EEGLAB files.

Owns the configuration, the search for recordings, the montage, the events tables and the split. `open_epochs` gives
lazy parts and reads no samples. The stream shows an image every 100 ms, so the second after an onset holds ten
responses, and the interval before it is not rest; the baseline removes the offset of the amplifier, not activity.

Two forms of ``events.tsv`` exist: one gives `onset` in milliseconds and no samples, the other in seconds with a
column `sample` at 1000 Hz; `duration` is in milliseconds in both. The form is recognised by `sample`, or by the rate of
the presentation, which is 10 images per second. Concepts come from the path in `stim`: `object` is -1 on test trials,
and `objectnumber` follows another order than the THINGS concept list.

References
----------
Grootswagers, Zhou, Robinson, Hebart, Carlson (2022), Human EEG recordings for 1,854 concepts presented in rapid serial
visual presentation streams, Scientific Data 9, 3. doi:10.1038/s41597-021-01102-7
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, check_columns, is_there
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.bids.meeg_files import (
    PLACES,
    check_length,
    describe_images,
    hash_images,
    list_channels,
    list_recording_files,
    make_part,
    make_shown_table,
    make_stimuli,
    open_recording,
    read_text_table,
)
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    check_subset,
    collect_findings,
    compare_counts,
    look_at,
    refuse_other_layout,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    HeldFile,
    MeegSettings,
    MeegSource,
    add_cleaning,
    drop_events,
    find_channels,
    number_repetitions,
    sample_part,
)

if TYPE_CHECKING:
    import pandas as pd

_SUBJECT = re.compile(r"sub-0*(\d+)(?=[_/]|$)")
_LARGEST_MONTAGE = 64  # two subjects wore a cap for 128 electrodes, of which half were not connected


class ThingsEeg1Config(MeegSettings):
    """Folder of the data set, subjects to read, and how trials are cut.

    Parameters
    ----------
    root
        Folder of the data set (``sub-01``..., ``participants.tsv``, ``derivatives``).
    images
        Folder of the THINGS images (``concept/name.jpg``); searched below and beside the root by default.
    layout
        ``raw`` (BrainVision, 1000 Hz) or ``eeglab`` (the authors' continuous derivative); ``auto`` takes raw if it
        exists, and refuses subjects with only the derivative.
    subjects
        Numbers to read. By default all that exist, without those that ``participants.tsv`` advises to exclude.
    channels
        ``montage`` for the electrodes of all recordings (63; the reference Cz was not recorded), or names.
    zero_shot
        Leave out the training images of the test concepts (2400 of 22,248), so that no test concept is used for
        training.
    targets
        Whether to keep the trials in which the fixation mark changed colour and a button press was required.
    """

    kind: Literal["things_eeg1"] = "things_eeg1"
    layout: Literal["auto", "raw", "eeglab"] = "auto"
    subjects: tuple[int, ...] | None = None
    channels: Literal["montage"] | tuple[str, ...] = "montage"
    zero_shot: bool = True
    targets: Literal["keep", "drop"] = "keep"
    sfreq: float = Field(default=250.0, gt=0)
    tmin: float = -0.1

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, held, _ = self._find()
        files: dict[str, Path] = {}
        for item in held:
            files |= list_recording_files(item.path, root) | list_recording_files(item.events, root)
        if is_there(root / TEST_LIST):
            files[TEST_LIST] = root / TEST_LIST
        return hash_images(self.images, root) | digest_files(files)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        root, held, notes = self._find()
        raws = {item: open_recording(item.path, item.where) for item in held}
        names = self._find_channels(raws, root)
        tests = self._find_tests(root, held)
        parts = number_repetitions([_open_part(item, raws[item], names, tests) for item in held])
        _check_repetitions(parts, self.max_dropped)
        parts, counts = _make_split(parts, self, tests)
        notes |= {"layout": held[0].layout, "reference": "Cz, not recorded", "soa_s": 0.1, **counts}
        stimuli = self._find_images(parts, root)
        return add_cleaning(
            MeegSource("eeg", tuple(parts), stimuli, self.make_plan(), "V", notes=notes), self
        )

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every recording, pair its events with images, and compare with the published numbers."""
        root, held, notes = self._find()
        tests = self._find_tests(root, held)
        yield CheckFinding("layout", True, f"{held[0].layout}, {len(held)} subject(s)")
        if "excluded" in notes:
            yield CheckFinding("excluded subjects", True, notes["excluded"])
        parts: list[ContinuousPart] = []

        def describe(item: _SubjectRecording) -> str:
            raw = open_recording(item.path, item.where)
            parts.append(_open_part(item, raw, list_channels(raw, ("eeg",)), tests))
            sample_part(parts[-1], sfreq=CLOCK_HZ if item.layout == "raw" else None)
            return f"{len(parts[-1].ch_names)} channels, {len(parts[-1].trials)} presentations"

        for item in held:
            yield look_at(item.path.name, describe, item)
        if parts:
            yield look_at("images", lambda: describe_images(self._find_images(parts, root)))
        for part in parts:
            what = f"subject {part.recording.subject} counts"
            yield compare_counts(what, _count_facts(part), self.manifest.facts, root)

    def _find(self) -> tuple[Path, list[_SubjectRecording], dict[str, Any]]:
        root = self.find_root()
        found = _find_recordings(root, self.layout)
        subjects = sorted(found)
        notes: dict[str, Any] = {}
        advised = read_excluded(root) if self.subjects is None else {}
        if self.layout == "auto":
            there = {name: _list_recordings(root, name).keys() - advised.keys() for name in ("raw", "eeglab")}
            refuse_other_layout(there, self.subjects, where=root, option="dataset.layout")
        if self.subjects is None:
            excluded = {s: why for s, why in advised.items() if s in found}
            subjects = [s for s in subjects if s not in excluded]
            if excluded:
                told = "; ".join(f"subject {s:02d} ({why})" for s, why in sorted(excluded.items()))
                notes["excluded"] = (
                    f"left out, as participants.tsv recommends: {told}; list them in dataset.subjects to use them"
                )
            if not subjects:
                raise DataError(f"only excluded subjects are below {root}: {notes['excluded']}.")
        chosen = check_subset(
            self.subjects, subjects if self.subjects is None else sorted(found), what="THINGS-EEG1 subject",
            option="dataset.subjects",
        )  # fmt: skip
        return root, [found[s] for s in chosen], notes

    def _find_channels(self, raws: dict[_SubjectRecording, Any], root: Path) -> tuple[str, ...]:
        """Return the channels to read: the given ones, or the smallest montage, which all recordings must have."""
        if self.channels != "montage":
            return self.check_named_channels(self.channels)
        montages = {item: list_channels(raw, ("eeg",)) for item, raw in raws.items()}
        if min(map(len, montages.values())) > _LARGEST_MONTAGE:
            others = [
                i for s, i in sorted(_find_recordings(root, next(iter(raws)).layout).items()) if i not in raws
            ]
            for item in others:
                montage = list_channels(open_recording(item.path, item.where), ("eeg",))
                if len(montage) <= _LARGEST_MONTAGE:
                    montages[item] = montage
                    break
            else:
                item = next(iter(raws))
                raise DataError(
                    f"{item.where} has {len(montages[item])} channels, half of them not connected, and "
                    "no recording with the usual 63 is available for comparison; fetch one other "
                    "subject, or name the electrodes with "
                    "--set dataset.channels=[...]."
                )
        # There were two caps; all recordings have the channels of the smaller one.
        smallest = min(montages.values(), key=len)
        # With the restored reference the channels of an average reference would be linearly dependent.
        return tuple(name for name in smallest if name != "Cz")

    def _find_tests(self, root: Path, held: list[_SubjectRecording]) -> frozenset[str]:
        tests = read_test_list(root)
        if tests or not self.zero_shot:
            return tests
        there = [item.events for item in held]
        # All subjects saw the same test images, so any table that marks them is sufficient.
        others = sorted(p for p in root.glob("sub-*/eeg/*_task-rsvp_events.tsv") if p not in there)
        return find_test_images([*there, *others])

    def _find_images(self, parts: list[ContinuousPart], root: Path) -> StimulusSet:
        shown = make_shown_table(part.recording.events for part in parts)
        guesses = [base / place for base in (root, root.parent) for place in PLACES]
        return make_stimuli(shown, self.images, guesses, lambda file, _: (file, f"object_images/{file}"))


@dataclass(frozen=True, kw_only=True)
class _SubjectRecording(HeldFile):
    """The recording of one subject; in either layout, its events table is with the raw recording."""

    layout: Literal["raw", "eeglab"]
    events: Path


def _find_recordings(root: Path, layout: str) -> dict[int, _SubjectRecording]:
    """Return the recordings of one layout by subject; ``auto`` takes the raw ones if there are any."""
    for name in ("raw", "eeglab") if layout == "auto" else (layout,):
        if found := _list_recordings(root, name):
            return found
    raise DataError(
        f"no THINGS-EEG1 recording was found below {root}: expected sub-01/eeg/sub-01_task-rsvp_eeg.vhdr or "
        "derivatives/eeglab/sub-01_task-rsvp_continuous.set and their like; pass the folder that holds sub-01."
    )


def _list_recordings(root: Path, layout: str) -> dict[int, _SubjectRecording]:
    """Return the recordings of one layout, by subject; events tables are always with the raw recordings."""
    patterns = {
        "raw": ("sub-*/eeg/*_eeg.vhdr",),
        "eeglab": (
            "derivatives/eeglab/*_continuous.set",
            "derivatives/eeglab/*/*_continuous.set",
            "*_continuous.set",
        ),
    }
    found = {}
    for path in sorted(p for pattern in patterns[layout] for p in root.glob(pattern)):
        match = _SUBJECT.match(path.name)
        if match is None:
            continue
        label = path.name.split("_")[0]
        events = root / label / "eeg" / f"{label}_task-rsvp_events.tsv"
        found[int(match[1])] = _SubjectRecording(
            subject=int(match[1]),
            session=1,
            path=path,
            layout="raw" if layout == "raw" else "eeglab",
            events=events,
        )
    return found


def _open_part(
    item: _SubjectRecording, raw: Any, names: tuple[str, ...], tests: frozenset[str]
) -> ContinuousPart:
    find_channels(raw.ch_names, names, item.where)
    events = read_events(item.events, item.where, tests)
    check_length(float(events["onset"].iloc[-1]), raw, item.where, "fetch both again")
    sfreq = float(raw.info["sfreq"])
    events["sample"] = np.round(events["onset"] * sfreq).astype(np.int64)
    events["split"] = np.where(events["is_test"], "test", "train")
    events["repetition"] = 0
    recording = Recording(f"{item.subject:02d}", "01", "01", "eeg", (item.path, item.events), events)
    electrodes = list_channels(raw, ("eeg",))
    # Half of a large montage was not connected, and the reference may have been added as a channel of zeros.
    unused = [n for n in electrodes if n not in names and (n == "Cz" or len(electrodes) > _LARGEST_MONTAGE)]
    # The other channels are kept for references and repairs, which need more than the stored ones.
    return make_part(recording, raw, names, ("eeg",), item.where, leave_out=unused)


def _check_repetitions(parts: list[ContinuousPart], max_dropped: float) -> None:
    """Each split must show its images equally often; a subject may have stopped early."""
    for part in parts:
        for split, events in part.recording.events.groupby("split"):
            counts = events["stimulus_id"].value_counts()
            # The number of repetitions differs between the two splits, and is the same within each by design.
            usual = int(counts.mode().iloc[0])
            if (counts - usual).abs().sum() > max_dropped * len(events):
                raise DataError(
                    f"{part.where}: its {split} images are shown {counts.min()} to {counts.max()} times, most of them "
                    f"{usual} times; the events table does not belong to this recording or is cut short."
                )


def _make_split(
    parts: list[ContinuousPart], config: ThingsEeg1Config, tests: frozenset[str]
) -> tuple[list[ContinuousPart], dict[str, Any]]:
    """Leave out trials that must not be used for training; returns the other trials, and notes."""
    counts: dict[str, Any] = {"split": "test: images of the last sequences; train: all others"}
    events = [part.recording.events for part in parts]
    if config.zero_shot:
        # For all subjects together: a test concept of one subject must not be a training concept of another.
        tested = set().union(*(t.loc[t["is_test"], "concept"] for t in events))
        # A subject without test trials must not have training trials of the test concepts of others.
        tested |= {re.sub(r"_\d+[a-z]*$", "", name) for name in tests}
        if not tested:
            raise DataError(
                f"no events table near {parts[0].recording.files[1]} marks test trials, and there is no "
                "test_images.csv, so the test concepts are unknown; fetch another subject's events, or set "
                "dataset.zero_shot to false."
            )
        keep = [(t["is_test"] | ~t["concept"].isin(tested)).to_numpy() for t in events]
        parts = [drop_events(part, rows) for part, rows in zip(parts, keep, strict=True)]
        counts["split"] += f", without the images of the {len(tested)} test concepts (zero-shot)"
        counts["n_zero_shot_dropped"] = int(sum((~rows).sum() for rows in keep))
    if config.targets == "drop":
        keep = [~part.recording.events["is_target"].to_numpy(bool) for part in parts]
        parts = [drop_events(part, rows) for part, rows in zip(parts, keep, strict=True)]
        counts["n_targets_dropped"] = int(sum((~rows).sum() for rows in keep))
    if any(part.recording.events.empty for part in parts):
        raise DataError(f"{next(p for p in parts if p.recording.events.empty).where} keeps no trial.")
    return parts, counts


def _count_facts(part: ContinuousPart) -> dict[str, int]:
    """Count the declared facts, which apply to all subjects who finished the experiment."""
    train, test = (part.trials[part.trials["split"] == split] for split in ("train", "test"))
    return {
        "n_train_images": train["stimulus_id"].nunique(),
        "n_train_concepts": train["concept"].nunique(),
        "n_test_images": test["stimulus_id"].nunique(),
        "n_test_concepts": test["concept"].nunique(),
        "train_repetitions": _most(train),
        "test_repetitions": _most(test),
    }


def _most(events: pd.DataFrame) -> int:
    return int(events["stimulus_id"].value_counts().max()) if len(events) else 0


CLOCK_HZ = 1000.0  # of `sample`, and of the raw recordings
# Grootswagers et al. (2022): images follow each other every 100 ms, 50 ms of them blank.
SOA_S = 0.1
TEST_LIST = "test_images.csv"
_COLUMNS = ("onset", "sample", "stim", "object", "isteststim", "teststimnumber", "istarget")
_IMAGE = re.compile(r"^(?:.*/)?([^/]+)/([^/]+)\.(?:jpg|jpeg|png)$", re.IGNORECASE)


def read_events(path: Path, where: str, listed_tests: frozenset[str]) -> pd.DataFrame:
    """Return one row per presentation, in the order of time.

    Parameters
    ----------
    path
        The ``events.tsv`` of one subject.
    listed_tests
        Ids of the test images, for tables that do not mark their test trials.

    Returns
    -------
    DataFrame
        `onset` (s), `stimulus_id`, `concept`, `file` (``concept/name.jpg``), `is_test` and `is_target`.

    Raises
    ------
    DataError
        If a column is missing, an image cannot be identified, or the onsets fit neither unit.
    """
    import pandas as pd

    table = read_text_table(path, where, _COLUMNS)
    check_columns(table.columns, ("onset", "stim"), what=str(path))
    events = pd.DataFrame({"onset": _read_onsets(table, path)})
    images = _read_images(table, path)
    events = pd.concat([events, images], axis=1)
    events["is_test"] = events["stimulus_id"].isin(listed_tests)
    for column, mark in (("isteststim", lambda v: v == 1), ("teststimnumber", lambda v: v >= 0)):
        if column in table.columns:
            events["is_test"] |= mark(read_numbers(table, column, path))
    events["is_target"] = read_numbers(table, "istarget", path) == 1 if "istarget" in table.columns else False
    _check_objects(table, events, path)
    late = np.flatnonzero(np.diff(events["onset"]) < 0)
    if len(late):
        raise DataError(f"{path} is not sorted by onset: line {late[0] + 3} is before line {late[0] + 2}.")
    return events


def _read_onsets(table: pd.DataFrame, path: Path) -> np.ndarray:
    """Return the onsets in s."""
    onset = read_numbers(table, "onset", path)
    step = float(np.median(np.diff(onset))) if len(onset) > 1 else np.nan
    for scale in (1.0, 1 / CLOCK_HZ):
        # Seconds and milliseconds differ by a factor of 1000, so a wide tolerance cannot confuse them.
        if abs(step * scale - SOA_S) < 0.2 * SOA_S:
            break
    else:
        raise DataError(
            f"{path} has its events {step:g} apart, where THINGS-EEG1 shows an image every 0.1 s: its onsets are "
            "neither in seconds nor in milliseconds, or the table is of another experiment (THINGS-EEG2 is not "
            "THINGS-EEG1)."
        )
    seconds = onset * scale
    if "sample" in table.columns:
        sample = read_numbers(table, "sample", path)
        # One sample and a half: onsets were rounded when they were written.
        apart = np.flatnonzero(np.abs(sample / CLOCK_HZ - seconds) > 1.5 / CLOCK_HZ)
        if len(apart):
            raise DataError(
                f"{path} contradicts itself in line {apart[0] + 2}: sample {sample[apart[0]]:.0f} at 1000 Hz, but "
                f"onset {onset[apart[0]]:g}; fetch it again."
            )
        return sample / CLOCK_HZ
    return seconds


def _read_images(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    import pandas as pd

    stim = table["stim"].fillna("").str.replace("\\", "/", regex=False)
    parts = stim.str.extract(_IMAGE)
    bad = np.flatnonzero(parts[0].isna())
    if len(bad):
        raise DataError(
            f"{path} has no image in line {bad[0] + 2} of the column stim ({table['stim'].iloc[bad[0]]!r}), where "
            "stimuli\\concept\\name.jpg is expected."
        )
    foreign = [i for i, (c, n) in enumerate(zip(parts[0], parts[1], strict=True)) if not n.startswith(c)]
    if foreign:
        raise DataError(
            f"{path} pairs the concept {parts[0].iloc[foreign[0]]!r} with the image {parts[1].iloc[foreign[0]]!r} in "
            f"line {foreign[0] + 2} ({len(foreign)} such lines): the paths are not those of THINGS."
        )
    name = stim.str.rsplit("/", n=1).str[-1]
    return pd.DataFrame({"stimulus_id": parts[1], "concept": parts[0], "file": parts[0] + "/" + name})


def _check_objects(table: pd.DataFrame, events: pd.DataFrame, path: Path) -> None:
    """Compare the concept of each path with the column `object`, which is -1 in test trials."""
    # The column is missing in one of the two published forms.
    if "object" not in table.columns:
        return
    told = table["object"].to_numpy(object)
    differs = (
        (told != "-1") & table["object"].notna().to_numpy() & (told != events["concept"].to_numpy(object))
    )
    if differs.any():
        line = int(np.flatnonzero(differs)[0])
        raise DataError(
            f"{path} names the object {told[line]!r} but shows {events['file'].iloc[line]} in line {line + 2} "
            f"({int(differs.sum())} such lines): its columns are shifted against each other."
        )


def read_test_list(root: Path) -> frozenset[str]:
    """Return the ids in ``test_images.csv`` (no header, ``concept/name.jpg``); some copies do not have the file."""
    path = root / TEST_LIST
    if not path.is_file():
        return frozenset()
    lines = [line.strip().strip('"').replace("\\", "/") for line in path.read_text().splitlines()]
    return frozenset(Path(line.split(",")[0]).stem for line in lines if line)


def find_test_images(tables: Iterable[Path]) -> frozenset[str]:
    """Return the test images of the first table that marks them; all subjects saw the same ones."""
    for path in tables:
        events = read_events(path, str(path), frozenset())
        if events["is_test"].any():
            return frozenset(events.loc[events["is_test"], "stimulus_id"])
    return frozenset()


def read_excluded(root: Path) -> dict[int, str]:
    """Return the subjects that ``participants.tsv`` advises to leave out, with the reason."""
    path = root / "participants.tsv"
    # The list of ``participants.tsv``, for copies without that file.
    if not is_there(path):
        return dict.fromkeys((1, 6, 18, 23), "by the published list")
    table = read_text_table(path, str(path))
    if "exclude" not in table.columns:
        return dict.fromkeys((1, 6, 18, 23), "by the published list")
    check_columns(table.columns, ["participant_id"], what=str(path))
    # The reasons are in the next column, and the notes of a run repeat them.
    out = table[table["exclude"].astype(str) == "1"]
    names = out["participant_id"].astype(str)
    if not names.str.contains(r"[0-9]").all():
        raise DataError(
            f"{path} excludes a participant without a number; participant_id is sub-01 and so on."
        )
    why = (
        out["note_IZ"].fillna("no reason given")
        if "note_IZ" in out.columns
        else ["no reason given"] * len(out)
    )
    return {int(re.sub(r"[^0-9]", "", name)): str(note) for name, note in zip(names, why, strict=True)}
