"""THINGS-EEG1 (Grootswagers et al. 2022): rapid streams of 22,248 images, raw or as continuous EEGLAB files.

Owns the configuration, which recordings there are, the montage, and the split. `prepare` gives lazy parts and reads no
samples. The stream shows an image every 100 ms, so that the second after an onset holds ten responses, and the interval
before it is no rest; the baseline removes the offset of the amplifier, not activity.

References
----------
Grootswagers, Zhou, Robinson, Hebart, Carlson (2022), Human EEG recordings for 1,854 concepts presented in rapid serial
visual presentation streams, Scientific Data 9, 3. doi:10.1038/s41597-021-01102-7
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.arrays import Recording
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.meeg_images import (
    PLACES,
    describe_images,
    hash_images,
    make_shown_table,
    make_stimuli,
)
from braindecode_vis.datasets.bids.meeg_raw import (
    RawReader,
    check_length,
    check_subset,
    drop_events,
    hash_recording,
    list_channels,
    list_seams,
    list_sensors,
    number_repetitions,
    open_recording,
)
from braindecode_vis.datasets.manifests import Finding, RecordedSettings, check_root, read_manifest
from braindecode_vis.datasets.sources.cleaning_options import CleaningOptions, add_cleaning
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochPlan,
    MeegSource,
    Mvnn,
    SampleType,
)
from braindecode_vis.datasets.sources.spot_checks import sample_part
from braindecode_vis.datasets.things_eeg1.events import (
    TEST_LIST,
    find_test_images,
    read_events,
    read_excluded,
    read_test_list,
)
from braindecode_vis.datasets.things_eeg2.raw import find_channels
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_sampled

_SUBJECT = re.compile(r"sub-0*(\d+)(?=[_/]|$)")
_LARGEST_MONTAGE = 64  # two people wore a cap for 128 electrodes, of which half were not connected


class ThingsEeg1Config(CleaningOptions, RecordedSettings):
    """Where the data set lies, whom to read, and how trials are cut.

    Parameters
    ----------
    root
        Folder of the data set (``sub-01``..., ``participants.tsv``, ``derivatives``).
    images
        Folder of the THINGS images (``concept/name.jpg``); looked for below and beside the root by default. Without
        it trials are written all the same.
    layout
        ``raw`` (BrainVision, 1000 Hz) or ``eeglab`` (the authors' continuous derivative); ``auto`` takes raw if there.
    subjects
        Numbers to read. By default all that are there, without those whom ``participants.tsv`` advises to exclude.
    channels
        ``montage`` for the electrodes that all recordings share (63; the reference Cz was not recorded), or names.
    zero_shot
        Leave out the training images of the test concepts (2400 of 22,248), so that no test concept is trained on.
    targets
        Whether to keep the trials on which the fixation mark changed colour and a button was due.
    sfreq, tmin, tmax, window, baseline, mvnn, dtype, max_dropped
        As in `EpochPlan`.
    bads, bad_channels, reference, notch, l_freq, h_freq, ica, autoreject, scaling
        As in `CleaningOptions`.
    """

    kind: Literal["things_eeg1"] = "things_eeg1"
    images: Path | None = None
    layout: Literal["auto", "raw", "eeglab"] = "auto"
    subjects: tuple[int, ...] | None = None
    channels: Literal["montage"] | tuple[str, ...] = "montage"
    zero_shot: bool = True
    targets: Literal["keep", "drop"] = "keep"
    sfreq: float = Field(default=250.0, gt=0)
    tmin: float = -0.1
    tmax: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    baseline: tuple[float | None, float | None] | None = (None, 0.0)
    mvnn: Mvnn = "epochs"
    dtype: SampleType = "float32"
    max_dropped: float = Field(default=0.01, ge=0, lt=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images", "max_dropped"})

    def hash_inputs(self) -> dict[str, str]:
        """Return a digest of every file that is read: of its size and of samples of its content."""
        root, held, _ = self._find()
        digests = hash_images(self.images, root)
        for item in held:
            digests |= hash_recording(item.path, root) | hash_recording(item.events, root)
        if (root / TEST_LIST).is_file():
            digests[TEST_LIST] = hash_sampled(root / TEST_LIST)
        return digests

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the steps in force that learn from training trials before a split is drawn."""
        return self.list_learnt(self.mvnn)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts; nothing is written, so `scratch` stays empty.

        Raises
        ------
        DataError, ConfigError
            If anything is missing, damaged or does not fit together; the message names subject and file.
        """
        root, held, notes = self._find()
        raws = {item: open_recording(item.path, item.where) for item in held}
        names = self._find_channels(raws, root)
        tests = self._find_tests(root, held)
        parts = number_repetitions([_open_part(item, raws[item], names, tests) for item in held])
        _check_repetitions(parts, self.max_dropped)
        parts, counts = _make_split(parts, self, tests)
        notes |= {"layout": held[0].layout, "reference": "Cz, not recorded", "soa_s": 0.1, **counts}
        plan = EpochPlan(
            sfreq=self.sfreq, tmin=self.tmin, tmax=self.tmax, window=self.window, baseline=self.baseline,
            mvnn=self.mvnn, dtype=self.dtype, max_dropped=self.max_dropped,
        )  # fmt: skip
        stimuli = self._find_images(parts, root)
        return add_cleaning(MeegSource("eeg", tuple(parts), stimuli, plan, "V", notes=notes), self)

    def check(self) -> list[Finding]:
        """Open every recording, pair its events with images, and compare with the published numbers."""
        try:
            root, held, notes = self._find()
            tests = self._find_tests(root, held)
        except (DataError, ConfigError) as error:
            return [Finding("layout", False, str(error))]
        findings = [Finding("layout", True, f"{held[0].layout}, {len(held)} subject(s)")]
        findings += [Finding("excluded subjects", True, notes["excluded"])] if "excluded" in notes else []
        parts = []
        for item in held:
            try:
                raw = open_recording(item.path, item.where)
                parts.append(_open_part(item, raw, list_channels(raw, ("eeg",)), tests))
                sample_part(parts[-1], sfreq=1000.0 if item.layout == "raw" else None)
            except DataError as error:
                findings.append(Finding(item.path.name, False, str(error)))
                continue
            n = len(parts[-1].recording.events)
            findings.append(
                Finding(item.path.name, True, f"{len(parts[-1].ch_names)} channels, {n} presentations")
            )
        try:
            if parts:
                stimuli = self._find_images(parts, root)
                findings.append(Finding("images", True, describe_images(stimuli)))
        except DataError as error:
            findings.append(Finding("images", False, str(error)))
        return findings + _check_facts(parts)

    def _find(self) -> tuple[Path, list[_Held], dict[str, Any]]:
        root = check_root(self.root, read_manifest("things_eeg1"))
        found = _find_recordings(root, self.layout)
        subjects = sorted(found)
        notes: dict[str, Any] = {}
        if self.subjects is None:
            excluded = {s: why for s, why in read_excluded(root).items() if s in found}
            subjects = [s for s in subjects if s not in excluded]
            if excluded:
                told = "; ".join(f"subject {s:02d} ({why})" for s, why in sorted(excluded.items()))
                notes["excluded"] = (
                    f"left out as participants.tsv advises: {told}; name them in dataset.subjects to use them"
                )
            if not subjects:
                raise DataError(f"only excluded subjects are below {root}: {notes['excluded']}.")
        chosen = check_subset(
            self.subjects, subjects if self.subjects is None else sorted(found), what="THINGS-EEG1 subject",
            option="dataset.subjects",
        )  # fmt: skip
        return root, [found[s] for s in chosen], notes

    def _find_channels(self, raws: dict[_Held, Any], root: Path) -> tuple[str, ...]:
        """Return the channels to read: those named, or the smallest montage, which all recordings must have."""
        if self.channels != "montage":
            names = tuple(self.channels)
            if not names or len(set(names)) != len(names):
                raise ConfigError("dataset.channels must name at least one channel, and none of them twice.")
            return names
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
                    f"{item.where} has {len(montages[item])} channels, half of them not connected, and no recording "
                    "with the usual 63 is at hand to tell which; fetch one other subject, or name the electrodes with "
                    "--set dataset.channels=[...]."
                )
        smallest = min(montages.values(), key=len)
        # With the restored reference the channels of an average reference would be linearly dependent.
        return tuple(name for name in smallest if name != "Cz")

    def _find_tests(self, root: Path, held: list[_Held]) -> frozenset[str]:
        tests = read_test_list(root)
        if tests or not self.zero_shot:
            return tests
        there = [item.events for item in held]
        others = sorted(p for p in root.glob("sub-*/eeg/*_task-rsvp_events.tsv") if p not in there)
        return find_test_images([*there, *others])

    def _find_images(self, parts: list[ContinuousPart], root: Path) -> StimulusSet:
        shown = make_shown_table(part.recording.events for part in parts)
        guesses = [base / place for base in (root, root.parent) for place in PLACES]
        return make_stimuli(shown, self.images, guesses, lambda file, _: (file, f"object_images/{file}"))


@dataclass(frozen=True)
class _Held:
    """The recording of one person."""

    subject: int
    layout: Literal["raw", "eeglab"]
    path: Path
    events: Path

    @property
    def where(self) -> str:
        return f"subject {self.subject:02d}, session 01, file {self.path}"


def _find_recordings(root: Path, layout: str) -> dict[int, _Held]:
    """Return the recordings of one layout by subject; events tables always lie with the raw recordings."""
    patterns = {
        "raw": ("sub-*/eeg/*_eeg.vhdr",),
        "eeglab": (
            "derivatives/eeglab/*_continuous.set",
            "derivatives/eeglab/*/*_continuous.set",
            "*_continuous.set",
        ),
    }
    for name in ("raw", "eeglab") if layout == "auto" else (layout,):
        found = {}
        for path in sorted(p for pattern in patterns[name] for p in root.glob(pattern)):
            match = _SUBJECT.match(path.name)
            if match is None:
                continue
            label = path.name.split("_")[0]
            events = root / label / "eeg" / f"{label}_task-rsvp_events.tsv"
            found[int(match[1])] = _Held(int(match[1]), "raw" if name == "raw" else "eeglab", path, events)
        if found:
            return found
    raise DataError(
        f"no THINGS-EEG1 recording was found below {root}: expected sub-01/eeg/sub-01_task-rsvp_eeg.vhdr or "
        "derivatives/eeglab/sub-01_task-rsvp_continuous.set and their like; pass the folder that holds sub-01."
    )


def _open_part(item: _Held, raw: Any, names: tuple[str, ...], tests: frozenset[str]) -> ContinuousPart:
    rows = find_channels(raw.ch_names, names, item.where)
    events = read_events(item.events, item.where, tests)
    check_length(float(events["onset"].iloc[-1]), raw, item.where, "fetch both again")
    sfreq = float(raw.info["sfreq"])
    events["sample"] = np.round(events["onset"] * sfreq).astype(np.int64)
    events["split"] = np.where(events["is_test"], "test", "train")
    events["repetition"] = 0
    recording = Recording(f"{item.subject:02d}", "01", "01", "eeg", (item.path, item.events), events)
    electrodes = list_channels(raw, ("eeg",))
    # Half of a large montage was not connected, and the reference may have been restored as a channel of zeros.
    unused = [n for n in electrodes if n not in names and (n == "Cz" or len(electrodes) > _LARGEST_MONTAGE)]
    sensors = list_sensors(raw, ("eeg",), unused)
    return ContinuousPart(
        recording, names, sfreq, int(raw.n_times), RawReader(raw, rows), sensors, tuple(raw.info["bads"]),
        list_seams(raw),
    )  # fmt: skip


def _check_repetitions(parts: list[ContinuousPart], max_dropped: float) -> None:
    """Each split must show its images equally often; a person may have stopped early."""
    for part in parts:
        for split, events in part.recording.events.groupby("split"):
            counts = events["stimulus_id"].value_counts()
            usual = int(counts.mode().iloc[0])
            if (counts - usual).abs().sum() > max_dropped * len(events):
                raise DataError(
                    f"{part.where}: its {split} images are shown {counts.min()} to {counts.max()} times, most of them "
                    f"{usual} times; the events table does not belong to this recording or is cut short."
                )


def _make_split(
    parts: list[ContinuousPart], config: ThingsEeg1Config, tests: frozenset[str]
) -> tuple[list[ContinuousPart], dict[str, Any]]:
    """Leave out what must not teach; returns what is left, and notes on it."""
    counts: dict[str, Any] = {"split": "test: images of the last sequences; train: all others"}
    events = [part.recording.events for part in parts]
    if config.zero_shot:
        tested = set().union(*(t.loc[t["is_test"], "concept"] for t in events))
        # Somebody without test trials still must not learn the concepts that others are tested on.
        tested |= {re.sub(r"_\d+[a-z]*$", "", name) for name in tests}
        if not tested:
            raise DataError(
                f"no events table near {parts[0].recording.files[1]} marks test trials, and there is no "
                "test_images.csv, so the test concepts are unknown; fetch another subject's "
                "events, or set dataset.zero_shot to false."
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


def _check_facts(parts: list[ContinuousPart]) -> list[Finding]:
    """Recompute the declared facts for everybody who finished the experiment."""
    findings = []
    declared = read_manifest("things_eeg1").facts
    for part in parts:
        events = part.recording.events
        train, test = (events[events["split"] == split] for split in ("train", "test"))
        found = {
            "n_train_images": train["stimulus_id"].nunique(),
            "n_train_concepts": train["concept"].nunique(),
            "n_test_images": test["stimulus_id"].nunique(),
            "n_test_concepts": test["concept"].nunique(),
            "train_repetitions": _most(train),
            "test_repetitions": _most(test),
        }
        off = [
            f"{key} {value} (declared {declared[key]})"
            for key, value in found.items()
            if value != declared[key]
        ]
        text = ", ".join(off) if off else "as declared"
        findings.append(Finding(f"subject {part.recording.subject} counts", not off, text))
    return findings


def _most(events: pd.DataFrame) -> int:
    return int(events["stimulus_id"].value_counts().max()) if len(events) else 0
