"""NOD-EEG (ds005811) and NOD-MEG (ds005810): ImageNet pictures that the subjects of `nod` (fMRI) saw, too.

Owns the authors' epochs (one file per subject), the raw runs, and the tables of trials. Only
``derivatives/detailed_events`` says which picture a trial shows: ``events.tsv`` has the times of pictures
(``stim_on``) among thousands of key presses, but no names. The rows of a run in the table are its pictures in the order
in which they were shown. A picture has the same id here and in `nod`, so runs on the three sets meet by `stimulus_id`.

References
----------
Zhang, G. et al. (2025), A large-scale MEG and EEG dataset for object recognition in naturalistic scenes, Scientific
Data 12, 857. doi:10.1038/s41597-025-05174-7; code of the epochs: colehank/NOD-MEEG@4f58c7a9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, check_columns
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bids.fmri_dataset import make_stimulus_id
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.bids.meeg_files import (
    PLACES,
    EpochReader,
    check_length,
    describe_images,
    find_sensor_positions,
    hash_images,
    list_channels,
    list_recording_files,
    make_part,
    make_shown_table,
    make_stimuli,
    open_epochs,
    open_recording,
    read_text_table,
)
from braindecode_vis.datasets.layout import File, Layout
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Label,
    check_subset,
    collect_findings,
    compare_counts,
    list_recordings,
    look_at,
    refuse_other_layout,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    MeegSettings,
    MeegSource,
    Mvnn,
    add_cleaning,
    check_published_rate,
    find_channels,
    number_repetitions,
    sample_part,
)

if TYPE_CHECKING:
    import pandas as pd

LAYOUT = Layout(
    epochs=File(
        "derivatives/preprocessed/epochs/sub-{subject}_{modality}_epo.fif", "other", "the epochs of a subject",
        "fetch them",
    ),
    run=File(
        "sub-{subject}/ses-{session}/{modality}/sub-{subject}_ses-{session}_task-ImageNet_run-{run}_{modality}.{form}",
        "other", "a raw run", "fetch it",
    ),
    trials=File(
        "derivatives/detailed_events/sub-{subject}_events.csv", "csv", "the table of trials",
        "fetch it: it alone names the picture of a trial", columns=("session", "run", "image_id"),
    ),
)  # fmt: skip
FORMS = {"eeg": "set", "meg": "fif"}
PICTURE = "stim_on"
"""The events that show a picture."""
_RAW_ONLY = ("sessions", "mvnn", "mvnn_channels", "resampling", "tmin", "tmax")
_RAW_HZ = {"eeg": 250.0, "meg": 200.0}  # whole fractions of 500 and 1200 Hz


@dataclass(frozen=True)
class NodFile:
    """Epochs of a subject, or one raw run."""

    path: Path
    subject: str
    session: str = ""
    run: str = ""

    @property
    def where(self) -> str:
        """Subject and file, for messages."""
        return f"subject {self.subject}, file {self.path}"


class _NodMeegSettings(MeegSettings):
    """What EEG and MEG share; see `NodEegConfig`."""

    layout: Literal["auto", "preprocessed", "raw"] = "auto"
    subjects: tuple[Label, ...] | None = None
    sessions: tuple[str, ...] | None = None
    channels: Literal["all"] | tuple[str, ...] = "all"
    tmin: float = -0.1
    tmax: float = 0.8
    window: tuple[float, float] = (0.0, 0.8)
    mvnn: Mvnn = "none"

    modality: ClassVar[Literal["eeg", "meg"]]

    @field_validator("subjects", "sessions", mode="before")
    @classmethod
    def _as_labels(cls, value: Any) -> Any:
        labelled = [f"{item:02d}" if isinstance(item, int) else item for item in value or ()]
        return labelled if isinstance(value, list | tuple) else value

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, held = self._find()
        files: dict[str, Path] = {}
        for item in held:
            files |= list_recording_files(item.path, root)
            files[f"trials of {item.subject}"] = LAYOUT.find(root, "trials", subject=item.subject)
        return hash_images(self.images, root) | digest_files(files)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        root, held = self._find()
        raw = bool(held[0].run)
        opened = [self._open(item, root) for item in held]
        parts = number_repetitions([part for part, _ in opened])
        published = float(opened[0][1].info["sfreq"])
        sfreq = self.sfreq or _RAW_HZ[self.modality] if raw else published
        stimuli = self._find_images(parts, root)
        notes = {
            "layout": "raw" if raw else "preprocessed",
            "pictures": "derivatives/detailed_events",
            "baseline": "subtracted from the published epochs" if not raw and self.baseline else "as set",
        }
        source = MeegSource(
            self.modality, tuple(parts), stimuli, self.make_plan(sfreq=sfreq), "V" if self.modality == "eeg" else "T",
            ch_pos=find_sensor_positions(opened[0][1], parts[0].ch_names), notes=notes,
        )  # fmt: skip
        return add_cleaning(source, self)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, and pair its pictures with the table of trials."""
        root, held = self._find()
        raw = bool(held[0].run)
        yield CheckFinding("layout", True, f"{'raw' if raw else 'preprocessed'}, {len(held)} file(s)")

        def describe(item: NodFile) -> str:
            part, _ = self._open(item, root)
            sample_part(part)
            n_images = part.trials["stimulus_id"].nunique()
            return f"{len(part.ch_names)} channels, {len(part.trials)} trials of {n_images} pictures"

        for item in held:
            yield look_at(item.path.name, describe, item)
        source = self.open_epochs()
        if raw:  # some epochs are of runs whose recordings were not published
            yield from self.check_recordings(list_recordings(source.parts))
            most = max(len(part.trials) for part in source.parts)
            yield compare_counts("trials", {"trials_per_run": most}, self.manifest.facts, root)
        yield CheckFinding("images", True, describe_images(source.stimuli))

    def _find(self) -> tuple[Path, list[NodFile]]:
        root = self.find_root()
        labels = {"modality": self.modality}
        there: dict[str, list[NodFile]] = {
            name: [
                NodFile(path, found["subject"], found.get("session", ""), found.get("run", ""))
                for path, found in LAYOUT.list_files(root, key, **labels, **form)
            ]
            for name, key, form in (
                ("preprocessed", "epochs", {}),
                ("raw", "run", {"form": FORMS[self.modality]}),
            )
        }
        there["raw"] = [item for item in there["raw"] if item.subject != "emptyroom"]
        layout = self.layout
        if layout == "auto":
            layout = "preprocessed" if there["preprocessed"] else "raw"
            by_subject = {name: {item.subject for item in files} for name, files in there.items()}
            if layout == "preprocessed":
                refuse_other_layout(by_subject, self.subjects, where=root, option="dataset.layout")
        held = there[layout]
        if not held:
            places = [LAYOUT.files[key].path for key in ("epochs", "run")]
            named = [p.format(subject="01", session="ImageNet01", run="01", form=FORMS[self.modality], **labels)
                     for p in places]  # fmt: skip
            raise DataError(
                f"no{'' if self.layout == 'auto' else f' {layout}'} recording of {self.manifest.title} was found below "
                f"{root}: expected {' or '.join(named)} and their like."
            )
        if layout == "preprocessed":
            self.refuse_raw_options(_RAW_ONLY)
        for name in ("session", "subject") if layout == "raw" else ("subject",):
            known = sorted({getattr(item, name) for item in held})
            wanted = check_subset(
                getattr(self, f"{name}s"), known, what=f"below {root}, {name}", option=f"dataset.{name}s"
            )
            held = [item for label in wanted for item in held if getattr(item, name) == label]
        if not held:
            raise DataError(f"no recording below {root} is of the requested subjects and sessions.")
        return root, held

    def _open(self, item: NodFile, root: Path) -> tuple[ContinuousPart | EpochedPart, Any]:
        table = read_trials(LAYOUT.find(root, "trials", subject=item.subject))
        return self._open_run(item, table) if item.run else self._open_epochs_of(item, table)

    def _open_epochs_of(self, item: NodFile, table: pd.DataFrame) -> tuple[EpochedPart, Any]:
        epochs = open_epochs(item.path, item.where)
        check_published_rate(float(epochs.info["sfreq"]), self.sfreq, item.where)
        trials = pair_epochs(table, epochs.metadata, len(epochs.events), item.where)
        names = tuple(epochs.ch_names) if self.channels == "all" else self.check_named_channels(self.channels)
        columns = find_channels(epochs.ch_names, names, item.where)
        reader = EpochReader(item.where, epochs, np.arange(len(trials)), columns)
        reader(len(trials) - 1, len(trials))  # opening does not notice that a file is cut short
        times = np.asarray(epochs.times, float)
        trials = trials.assign(subject=item.subject, split="train", repetition=0)
        return EpochedPart(trials, (item.path,), names, times, self._subtract(reader, times)), epochs

    def _subtract(
        self, read: Callable[[int, int], np.ndarray], times: np.ndarray
    ) -> Callable[[int, int], np.ndarray]:
        """Return a reader that subtracts the baseline, which the authors left in their epochs."""
        if self.baseline is None:
            return read
        start, stop = self.make_plan().find_baseline()
        inside = (times >= start - 1e-6) & (times <= stop + 1e-6)

        def read_corrected(first: int, last: int) -> np.ndarray:
            block = read(first, last)  # (n_trials, n_channels, n_times)
            corrected: np.ndarray = block - block[..., inside].mean(axis=2, keepdims=True)
            return corrected

        return read_corrected

    def _open_run(self, item: NodFile, table: pd.DataFrame) -> tuple[ContinuousPart, Any]:
        raw = open_recording(item.path, item.where)
        kinds = ("eeg",) if self.modality == "eeg" else ("mag",)  # MNE's type of the CTF's axial gradiometers
        if self.modality == "eeg":
            _mark_eyes(raw, item)
        names = (
            list_channels(raw, kinds) if self.channels == "all" else self.check_named_channels(self.channels)
        )
        stem = item.path.name.removesuffix(f"_{self.modality}{item.path.suffix}")
        place = item.path.with_name(f"{stem}_events.tsv")
        events = read_text_table(place, item.where, ("onset", "trial_type"))
        check_columns(events.columns, ("onset", "trial_type"), what=str(place))
        events = events[events["trial_type"] == PICTURE].reset_index(drop=True)
        shown = table[(table["session"] == item.session) & (table["run"] == item.run)]
        if not len(events) or len(shown) != len(events):
            raise DataError(
                f"{item.where} shows {len(events)} pictures ({PICTURE} in {place.name}), but "
                f"derivatives/detailed_events lists {len(shown)} of session {item.session}, run {item.run}; fetch both "
                "again."
            )
        onset = read_numbers(events, "onset", place)
        check_length(float(onset.max()), raw, item.where, "fetch both again")
        sample = np.round(onset * float(raw.info["sfreq"])).astype(np.int64)
        shown = shown.reset_index(drop=True)
        shown = shown.assign(onset=onset, sample=sample, split="train", repetition=0)
        recording = Recording(item.subject, item.session, item.run, self.modality, (item.path, place), shown)
        return make_part(recording, raw, names, kinds, item.where), raw

    def _find_images(self, parts: list[Any], root: Path) -> StimulusSet:
        guesses = [base / place for base in (root, root.parent) for place in ("stimuli", *PLACES)]
        # The folder of this set, and that of `nod`.
        return make_stimuli(
            make_shown_table(part.trials for part in parts), self.images, guesses,
            lambda file, concept: (f"ImageNet/{file}", file, f"imagenet/{concept}/{file}"),
        )  # fmt: skip


class NodEegConfig(_NodMeegSettings):
    """Folder of NOD-EEG, and how its trials are read.

    Parameters
    ----------
    root
        Folder of the data set (``sub-01``..., ``derivatives``, ``stimuli``).
    images
        Folder of the pictures, or that of `nod` (``stimuli``, which has the same ones); ``stimuli`` by default.
    layout
        ``preprocessed``: epochs of the authors (0.1 to 40 Hz, eye and muscle components removed by hand, -0.1 to 0.8
        s, whose baseline is subtracted here). ``raw``: the recordings. ``auto`` takes the epochs if they exist.
    subjects, sessions
        Labels to read (``01``; ``ImageNet01``), by default all that exist. Sessions can be chosen only in the raw
        layout.
    channels
        ``all`` brain channels, or names.
    sfreq
        Rate of the trials in Hz. By default that of the published epochs; for raw recordings 250 (EEG) or 200 (MEG).
    tmin, tmax, mvnn, mvnn_channels, resampling
        As in `EpochPlan`, for the raw layout.
    """

    kind: Literal["nod_eeg"] = "nod_eeg"
    modality: ClassVar[Literal["eeg", "meg"]] = "eeg"


class NodMegConfig(_NodMeegSettings):
    """Folder of NOD-MEG, and how its trials are read; the settings are those of `NodEegConfig`.

    Parameters
    ----------
    root, images, layout, subjects, sessions, channels, sfreq, tmin, tmax, mvnn, mvnn_channels, resampling
        As in `NodEegConfig`. The sensors are axial gradiometers; references are not read.
    reference, ica, autoreject
        As in `CleaningOptions`; only for EEG, so they are refused here.
    """

    kind: Literal["nod_meg"] = "nod_meg"
    modality: ClassVar[Literal["eeg", "meg"]] = "meg"


def read_trials(path: Path) -> pd.DataFrame:
    """Return the pictures of a subject, one row per trial: `session`, `run`, `stimulus_id`, `concept` and `file`."""
    return _name_pictures(LAYOUT.read_table(path, "trials", dtype=str), str(path))


def _name_pictures(table: pd.DataFrame, what: str) -> pd.DataFrame:
    import pandas as pd

    check_columns(table.columns, ("session", "run", "image_id"), what=what)
    named = table["image_id"]
    empty = np.flatnonzero((named.isna() | (named.astype(str).str.strip() == "")).to_numpy())
    if len(empty):
        raise DataError(f"{what} names no picture in row {int(empty[0]) + 2}; fetch it again.")
    ids = named.astype(str).map(make_stimulus_id).reset_index(drop=True)
    return pd.DataFrame(
        {
            "session": table["session"].astype(str).to_numpy(),
            "run": table["run"].astype(str).str.zfill(2).to_numpy(),
            "stimulus_id": ids,
            "concept": ids.str.rpartition("_")[0],  # the synset, as in `nod`
            "file": ids + ".JPEG",
        }
    )


def pair_epochs(table: pd.DataFrame, inside: pd.DataFrame | None, n_epochs: int, where: str) -> pd.DataFrame:
    """Return the trial of each epoch, from the table of the subject.

    Parameters
    ----------
    table
        From `read_trials`.
    inside
        Metadata of the epochs, which repeat their rows of the table; epochs that were left out are missing here.
    where
        Subject and file, for messages.

    Raises
    ------
    DataError
        If the epochs are not those of the table.
    """
    if inside is None:
        if n_epochs != len(table):
            raise DataError(
                f"{where} holds {n_epochs} epochs without metadata, but derivatives/detailed_events lists {len(table)} "
                "trials, so their pictures are not known; fetch both again."
            )
        return table
    rows = _name_pictures(inside, f"the metadata of {where}")
    keys = ["session", "run", "stimulus_id"]
    known = set(table[keys].itertuples(index=False, name=None))
    strange = [key for key in rows[keys].itertuples(index=False, name=None) if key not in known]
    if strange or len(rows) > len(table):
        session, run, name = strange[0] if strange else rows[keys].iloc[-1]
        raise DataError(
            f"{where}: {len(strange) or len(rows) - len(table)} of {len(rows)} epochs are not in "
            f"derivatives/detailed_events, first {name} in session {session}, run {run}: the table is of another "
            "subject or release; fetch both again."
        )
    return rows


def _mark_eyes(raw: Any, item: NodFile) -> None:
    """Type the electrodes of the eyes, which an EEGLAB file does not do, by ``channels.tsv``."""
    path = item.path.with_name(item.path.name.replace("_eeg.set", "_channels.tsv"))
    table = read_text_table(path, item.where)
    check_columns(table.columns, ("name", "type"), what=str(path))
    eyes = table.loc[table["type"] == "EOG", "name"]
    raw.set_channel_types({name: "eog" for name in eyes if name in raw.ch_names}, verbose="error")
