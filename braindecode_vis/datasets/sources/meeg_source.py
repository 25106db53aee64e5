"""The interface from loaders of EEG or MEG to preprocessing: place of the samples, and how to read a piece of them.

Owns the subject and session of a file, the choice among layouts, the lazy parts of a data set (continuous recordings or
published epochs), the plan that turns them into trials, the refusal of cleaning options that a layout does not allow,
and a check of a few short pieces of a file. A loader fills these in and reads no samples;
`braindecode_vis.preprocessing.meeg` streams through them. Contains no file format and no signal processing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import TRIAL_COLUMNS, Modality, Recording
from braindecode_vis.base.checks import ConfigError, DataError, check_columns, suggest
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.manifests import RecordedSettings
from braindecode_vis.datasets.sources.cleaning_options import Cleaning, CleaningOptions

if TYPE_CHECKING:
    import pandas as pd

Mvnn = Literal["epochs", "time", "none"]
MvnnChannels = Literal["stored", "recorded"]
Resampling = Literal["exact", "mne"]
SampleType = Literal["float32", "float16"]


@dataclass(frozen=True)
class EpochPlan:
    """How trials are cut.

    Parameters
    ----------
    sfreq
        Sampling rate of the trials in Hz.
    tmin, tmax
        Epoch in s around the onset; its samples are at ``tmin + k / sfreq``, before `tmax`.
    window
        Part of the epoch that is kept, in s; the end is excluded.
    baseline
        Interval in s, both ends included, whose mean is subtracted from each channel; None for one end means that end
        of the epoch; None for the whole setting means no baseline.
    mvnn
        Multivariate noise normalisation: covariance of each epoch over time (``epochs``), of each time over
        repetitions (``time``), or ``none``.
    dtype
        Type of the stored numbers.
    max_dropped
        Largest share of the events of one file that may be unusable; more are an error.
    cleaning
        Cleaning of samples and trials; nothing by default.
    mvnn_channels
        Channels on which the noise is fitted: those that are ``stored``, or all that are ``recorded`` (every brain
        sensor of the file) before the stored ones are chosen. The two give different trials: UBP and NeuroBridge whiten
        all 63 channels of THINGS-EEG2 before 17 are chosen.
    resampling
        ``exact``: samples are at the times of their labels, after a short filter. ``mne``: as in `mne.Epochs.resample`
        and in the published files of THINGS-EEG2: a rectangular low-pass over the whole epoch. Its samples are shifted
        against their labels by a distance that depends on epoch and rates: 1 ms later at 250 Hz, 3.5 to 4.4 ms earlier
        in the official files of 100 Hz.
    """

    # The common preprocessing of NICE and ATM (Song et al. 2024, arXiv:2308.13234): 250 Hz, baseline before the onset.
    sfreq: float = 250.0
    tmin: float = -0.2
    tmax: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    baseline: tuple[float | None, float | None] | None = (None, 0.0)
    mvnn: Mvnn = "epochs"
    dtype: SampleType = "float32"
    # Our choice: files may have lost an event or two at their ends; one in a hundred means another release.
    max_dropped: float = 0.01
    cleaning: Cleaning = field(default_factory=Cleaning)
    mvnn_channels: MvnnChannels = "stored"
    resampling: Resampling = "exact"

    def __post_init__(self) -> None:
        if not self.tmin <= self.window[0] < self.window[1] <= self.tmax:
            raise ConfigError(
                f"the kept window {self.window} s must be ascending and inside the epoch from {self.tmin} to "
                f"{self.tmax} s."
            )
        if self.baseline is not None:
            start, stop = self.find_baseline()
            if not self.tmin <= start < stop <= self.tmax:
                raise ConfigError(
                    f"the baseline from {start} to {stop} s must be ascending and inside the epoch from "
                    f"{self.tmin} to {self.tmax} s."
                )

    def find_baseline(self) -> tuple[float, float]:
        """Return both ends of the baseline in s."""
        assert self.baseline is not None
        start, stop = self.baseline
        return (self.tmin if start is None else start), (self.tmax if stop is None else stop)

    def find_times(self) -> np.ndarray:
        """Return the times of the kept samples in s."""
        # The end is excluded, so one second at 250 Hz is 250 samples.
        first = round((self.window[0] - self.tmin) * self.sfreq)
        last = round((self.window[1] - self.tmin) * self.sfreq)
        return self.tmin + np.arange(first, last) / self.sfreq


class MeegSettings(CleaningOptions, RecordedSettings):
    """The settings of a data set of EEG or MEG: how trials are cut from its recordings and cleaned.

    Parameters
    ----------
    images
        Folder of the pictures; searched below and beside the root by default. Without it, trials are written without
        pictures.
    sfreq, tmin, tmax, window, baseline, mvnn, mvnn_channels, resampling, dtype, max_dropped
        As in `EpochPlan`.
    bads, bad_channels, reference, notch, l_freq, h_freq, ica, autoreject, scaling
        As in `CleaningOptions`. For published epochs only `scaling` is possible.
    """

    images: Path | None = None
    sfreq: float | None = Field(default=None, gt=0)
    tmin: float = -0.2
    tmax: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    baseline: tuple[float | None, float | None] | None = (None, 0.0)
    mvnn: Mvnn = "epochs"
    mvnn_channels: MvnnChannels = "stored"
    resampling: Resampling = "exact"
    dtype: SampleType = "float32"
    max_dropped: float = Field(default=0.01, ge=0, lt=1)

    # Paths and a bound for an error do not change the numbers.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images", "max_dropped"})
    hashed_if_set: ClassVar[frozenset[str]] = CleaningOptions.hashed_if_set | {"mvnn_channels", "resampling"}

    @model_validator(mode="after")
    def _check_noise(self) -> Self:
        if self.mvnn == "none":
            self.refuse_unused("mvnn_channels", because="mvnn is none")
        return self

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the active steps that are fitted on training trials before a split is drawn."""
        learnt = super().learns_before_split()
        return learnt if self.mvnn in (None, "none") else ("mvnn", *learnt)

    def make_plan(self, **chosen: Any) -> EpochPlan:
        """Return how trials are cut; `chosen` gives the values that the settings leave to the files."""
        names = [entry.name for entry in fields(EpochPlan) if entry.name != "cleaning"]
        return EpochPlan(**{**{name: getattr(self, name) for name in names}, **chosen})

    def refuse_raw_options(self, names: Sequence[str]) -> None:
        """Raise `ConfigError` if a setting of raw recordings differs from its default: published epochs were found."""
        for name in names:
            # Published epochs are never normalised here.
            default = (type(self).model_fields[name].default, *(("none",) if name == "mvnn" else ()))
            if getattr(self, name) not in default:
                raise ConfigError(
                    f"dataset.{name} applies to raw recordings, but published epochs were found; leave it out, or set "
                    "dataset.layout to raw."
                )

    def check_named_channels(self, channels: Sequence[str]) -> tuple[str, ...]:
        """Return the channels that the user named; there must be at least one, and none twice."""
        names = tuple(channels)
        if not names or len(set(names)) != len(names):
            raise ConfigError("dataset.channels must name at least one channel, and none of them twice.")
        return names


@dataclass(frozen=True, kw_only=True)
class HeldFile:
    """One file of a data set with its subject, and with session and run if it has them."""

    subject: int
    session: int | None = None
    run: int | None = None
    path: Path

    @property
    def where(self) -> str:
        """Subject, session, run and file, for messages."""
        labels = {"subject": self.subject, "session": self.session, "run": self.run}
        told = [f"{name} {number:02d}" for name, number in labels.items() if number is not None]
        return ", ".join([*told, f"file {self.path}"])


def choose_layout(
    there: Mapping[str, Collection[Any]], wanted: str, root: Path, *, title: str, expected: str
) -> str:
    """Return the layout to read, by default the one that exists.

    Parameters
    ----------
    there
        Files that were found of each layout.
    wanted
        A layout, or ``auto``.
    title, expected
        The data set, and the names of its files, for messages.

    Raises
    ------
    DataError
        If there is no file, or none of the requested layout.
    ConfigError
        If there are several layouts and none was chosen: they differ in filters and trials, so they cannot be mixed.
    """
    found = sorted(name for name, files in there.items() if files)
    if not found or (wanted != "auto" and wanted not in found):
        layout = "" if wanted == "auto" else f" in the layout {wanted!r}"
        raise DataError(f"no recording of {title}{layout} was found below {root}: expected {expected}.")
    if wanted == "auto" and len(found) > 1:
        raise ConfigError(
            f"{root} holds {title} in the layouts {', '.join(found)}; choose one with --set dataset.layout=..."
        )
    return found[0] if wanted == "auto" else wanted


def check_published_rate(sfreq: float, wanted: float | None, where: str) -> None:
    """Raise `ConfigError` unless published epochs have the requested rate (Hz): they are too short to resample."""
    if wanted is not None and not np.isclose(sfreq, wanted, rtol=1e-3):
        raise ConfigError(
            f"{where} has {sfreq:g} Hz and published epochs are not resampled; pass --set dataset.sfreq={sfreq:g} or "
            "leave it out."
        )


@dataclass(frozen=True)
class Sensors:
    """Every brain sensor of a recording, including those that are not stored: references and repairs need them.

    Parameters
    ----------
    ch_names
        Channels that `read` returns.
    read
        As in `ContinuousPart`.
    ch_pos : array of shape (n_channels, 3), optional
        Positions in m, in head coordinates; by default those of the 10-05 system.
    info
        The `mne.Info` of a MEG recording; repairs need its coils.
    """

    ch_names: tuple[str, ...]
    read: Callable[[int, int], np.ndarray]
    ch_pos: np.ndarray | None = None
    info: Any = None


@dataclass(frozen=True)
class ContinuousPart:
    """One file of continuous samples.

    Parameters
    ----------
    recording
        Subject, session and events. The events also have `sample` (index of the onset), `repetition`, `split` and
        `concept`.
    ch_names
        Channels that `read` returns.
    sfreq
        Sampling rate in Hz.
    n_samples
        Length of the file.
    read
        ``read(start, stop)`` gives the samples as (n_channels, stop - start), in volt or tesla.
    sensors
        All sensors of the file; those of `ch_names` by default.
    bads
        Channels that are bad, among all sensors.
    boundaries
        First samples after joins of recordings that the file marks.
    """

    recording: Recording
    ch_names: tuple[str, ...]
    sfreq: float
    n_samples: int
    read: Callable[[int, int], np.ndarray]
    sensors: Sensors | None = None
    bads: tuple[str, ...] = ()
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        columns = ("sample", "repetition", "split", "concept")
        check_columns(self.recording.events.columns, columns, what=f"the event table of {self.where}")

    @property
    def trials(self) -> pd.DataFrame:
        """One row per event that shows an image, as in `EpochedPart`."""
        return self.recording.events

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of the samples and events."""
        return self.recording.files

    @property
    def where(self) -> str:
        """Subject, session and file, for messages."""
        r = self.recording
        return f"subject {r.subject}, session {r.session}, file {r.files[0]}"

    @property
    def group(self) -> tuple[str, str]:
        """Subject and session; one noise covariance is fitted for each."""
        return self.recording.subject, self.recording.session

    @property
    def own_sensors(self) -> Sensors:
        """The stored channels, for files that have no others."""
        return Sensors(self.ch_names, self.read)

    @property
    def all_names(self) -> tuple[str, ...]:
        """Names of all sensors of the file."""
        return self.ch_names if self.sensors is None else self.sensors.ch_names


@dataclass(frozen=True)
class EpochedPart:
    """One file of published epochs.

    Parameters
    ----------
    trials : DataFrame
        One row per epoch, in the order of the file.
    files
        Files of the epochs.
    ch_names, times
        Axes of the result of `read`; times in s.
    read
        ``read(start, stop)`` gives the epochs as (stop - start, n_channels, n_times).
    """

    trials: pd.DataFrame
    files: tuple[Path, ...]
    ch_names: tuple[str, ...]
    times: np.ndarray
    read: Callable[[int, int], np.ndarray]

    def __post_init__(self) -> None:
        check_columns(self.trials.columns, (*TRIAL_COLUMNS, "concept"), what=f"the trials of {self.where}")

    @property
    def where(self) -> str:
        """Subject and file, for messages."""
        return f"subject {self.trials['subject'].iloc[0]}, file {self.files[0]}"

    @property
    def group(self) -> tuple[str, str]:
        """Subject and file: published epochs are not changed, one file after the other."""
        return str(self.trials["subject"].iloc[0]), str(self.files[0])


@dataclass(frozen=True)
class MeegSource:
    """A whole data set, ready to be streamed.

    Parameters
    ----------
    modality
        ``eeg`` or ``meg``.
    parts
        Files in the order of the trials; files of one subject and session are consecutive.
    stimuli
        Every image of a trial.
    plan
        How trials are cut.
    unit
        Unit of the samples.
    ch_pos : array of shape (n_channels, 3), optional
        Sensor positions in m of the stored channels; by default those of the 10-05 system.
    stored
        Channels that are stored, if the parts read more than these for the noise; None stores all.
    notes
        Remarks for readers of the store; stored in its ``meta.json``.
    """

    modality: Modality
    parts: tuple[ContinuousPart | EpochedPart, ...]
    stimuli: StimulusSet
    plan: EpochPlan
    unit: str
    ch_pos: np.ndarray | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    stored: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise DataError("no recording was found; check the root and the list of subjects.")
        first = self.parts[0]
        for part in self.parts:
            # One array holds all parts, so their channels must agree in name and order.
            if part.ch_names != first.ch_names:
                raise DataError(
                    f"{part.where} has other channels than {first.where}: {part.ch_names} and {first.ch_names}."
                )

    @property
    def ch_names(self) -> tuple[str, ...]:
        """Channels that are stored: those of every part, or the chosen ones among them."""
        return self.parts[0].ch_names if self.stored is None else self.stored

    @property
    def rows(self) -> np.ndarray | None:
        """Indices of the stored channels of the parts; None for all."""
        if self.stored is None:
            return None
        return np.array([self.parts[0].ch_names.index(name) for name in self.stored])

    @property
    def n_trials(self) -> int:
        """Number of events or epochs before any are dropped."""
        return sum(len(part.trials) for part in self.parts)


_Part = TypeVar("_Part", bound=ContinuousPart | EpochedPart)


def replace_trials(part: _Part, trials: pd.DataFrame) -> _Part:
    """Return the part with another table of as many trials."""
    if isinstance(part, EpochedPart):
        return replace(part, trials=trials)
    return replace(part, recording=replace(part.recording, events=trials))


def drop_events(part: ContinuousPart, keep: np.ndarray) -> ContinuousPart:
    """Return the part with the events that the boolean array keeps."""
    return replace_trials(part, part.trials[keep].reset_index(drop=True))


def number_repetitions(parts: Sequence[_Part]) -> list[_Part]:
    """Number the presentations of each image over all parts of a subject, from 0 in their order."""
    seen: Counter[tuple[str, str]] = Counter()
    numbered = []
    for part in parts:
        subject, counts = part.group[0], []
        for stimulus in part.trials["stimulus_id"]:
            counts.append(seen[subject, stimulus])
            seen[subject, stimulus] += 1
        table = part.trials.assign(repetition=np.array(counts, dtype=np.int64))
        numbered.append(replace_trials(part, table))
    return numbered


def find_picture_folder(named: Path | None, places: Sequence[Path]) -> Path | None:
    """Return the folder that the user named, which must exist, or else the first existing one of some places."""
    if named is None:
        return next((place for place in places if place.is_dir()), None)
    folder = named.expanduser()
    if not folder.is_dir():
        raise DataError(f"the folder of images {folder} does not exist; correct dataset.images.")
    return folder


def list_stimuli(table: pd.DataFrame, images: Path | None) -> StimulusSet:
    """Return the shown pictures, for data sets that do not contain all of them.

    Parameters
    ----------
    table : DataFrame
        One row per picture: `stimulus_id`, `concept` and `path`, relative to `images` or empty.
    images
        Folder of the pictures, if there is one.

    Returns
    -------
    stimuli : StimulusSet
        The column `hashed` says what `sha256` was computed from: the ``file``, or the ``name`` (the stimulus id) if the
        picture is not available.
    """
    at_hand = [bool(path) and images is not None and (images / path).is_file() for path in table["path"]]
    digests = [
        hash_file(images / path)
        if there and images is not None
        else hashlib.sha256(name.encode()).hexdigest()
        for there, path, name in zip(at_hand, table["path"], table["stimulus_id"], strict=True)
    ]
    columns = table[["stimulus_id", "concept", "path"]].reset_index(drop=True)
    return StimulusSet(
        columns.assign(sha256=digests, hashed=["file" if there else "name" for there in at_hand]), images
    )


_ALIASES = {"CB1": "POO7", "CB2": "POO8"}  # as MNE has them


def make_template_montage(system: str = "1005") -> Any:
    """Return MNE's template montage of the ``1005`` or the ``1020`` system."""
    import mne

    # MNE 1.13 renamed its templates; the positions are the same.
    names = (f"colin27_{system}", f"standard_{system}")
    return mne.channels.make_standard_montage(
        next(name for name in names if name in mne.channels.get_builtin_montages())
    )


@lru_cache(maxsize=1)
def list_scalp_positions() -> Mapping[str, np.ndarray]:
    """Return positions in m, in head coordinates, of all electrodes of the 10-20, 10-10 and 10-05 systems.

    Both are MNE's, on the same head; the smaller one has names (``O9``, ``O10``) that are missing in the larger one.
    """
    import mne

    points: dict[str, np.ndarray] = {}
    for system in ("1005", "1020"):
        held = make_template_montage(system).get_positions()
        # If both systems have a name, the finer one is used.
        points = {**held["ch_pos"], **points}
        frame = {key: held[key] for key in ("nasion", "lpa", "rpa", "coord_frame")}
    points |= {alias: points[name] for alias, name in _ALIASES.items() if alias not in points}
    info = mne.create_info(list(points), 1.0, "eeg")
    info.set_montage(mne.channels.make_dig_montage(points, **frame))  # moves the template to head coordinates
    return {channel["ch_name"]: channel["loc"][:3].copy() for channel in info["chs"]}


def find_scalp_positions(ch_names: Sequence[str], where: str) -> np.ndarray:
    """Return the positions of electrodes by name, in m, shape (n_channels, 3).

    Raises
    ------
    DataError
        If a name is not among `list_scalp_positions`.
    """
    known = list_scalp_positions()
    unknown = [name for name in ch_names if name not in known]
    if unknown:
        raise DataError(
            f"the channel(s) {', '.join(unknown)} of {where} are not in the 10-05 system, so their "
            "positions are unknown: this is another montage."
        )
    return np.stack([known[name] for name in ch_names])


def find_channels(available: Sequence[str], wanted: Sequence[str], where: str) -> np.ndarray:
    """Return the row of each wanted channel; channels are matched by name, never by position."""
    # A search by name would silently return the first of two channels.
    repeated = sorted({name for name in available if list(available).count(name) > 1})
    if repeated:
        raise DataError(f"{where} names the channel {repeated[0]} more than once.")
    missing = [name for name in wanted if name not in available]
    if missing:
        rest = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DataError(
            f"{where} is missing the channel(s) {', '.join(missing[:8])}{rest}; it has {', '.join(available)}: "
            "another montage, or choose others with --set dataset.channels."
        )
    return np.array([list(available).index(name) for name in wanted])


def add_cleaning(source: MeegSource, options: CleaningOptions, *, referenced: bool = False) -> MeegSource:
    """Return the source with the cleaning in its plan, and without dropped channels.

    Parameters
    ----------
    referenced
        Whether the parts have applied ``options.reference`` themselves.

    Raises
    ------
    ConfigError
        If an option cannot be applied to these files; the message lists those that can.
    """
    cleaning = options.make_cleaning()
    # A second average over fewer channels would be another reference than the first.
    if referenced:
        cleaning = replace(cleaning, reference="none")
    parts = source.parts
    if not all(isinstance(part, ContinuousPart) for part in parts):
        impossible = [name for name in options.list_changed() if name != "scaling"]
        if impossible:
            raise ConfigError(
                f"dataset.{impossible[0]} needs continuous recordings, but {parts[0].where} holds published epochs; of "
                "the cleaning options only dataset.scaling applies to them: leave the others out, or read the raw "
                "layout."
            )
        return replace(source, plan=replace(source.plan, cleaning=cleaning))
    continuous = [part for part in parts if isinstance(part, ContinuousPart)]
    _check_options(continuous, options, cleaning, source.modality)
    # A channel that is bad in one recording is dropped from all, since all must keep the same channels.
    marked = {name: None for part in continuous for name in part.bads}
    if options.bad_channels == "drop":
        source = _drop_channels(source, continuous, [*options.bads, *marked])
    elif options.bads:
        continuous = [
            replace(part, bads=tuple(dict.fromkeys([*part.bads, *options.bads]))) for part in continuous
        ]
        source = replace(source, parts=tuple(continuous))
    return replace(source, plan=replace(source.plan, cleaning=cleaning))


def _check_options(
    parts: Sequence[ContinuousPart], options: CleaningOptions, cleaning: Cleaning, modality: str
) -> None:
    known = parts[0].all_names
    named = {
        "bads": options.bads,
        "reference": () if isinstance(cleaning.reference, str) else cleaning.reference,
        "ica.eyes": (options.ica.eyes or ()) if options.ica else (),
    }
    for option, names in named.items():
        for part in parts if names else ():
            for name in names:
                if name not in part.all_names:
                    raise ConfigError(
                        f"dataset.{option} names the channel {name!r}, which {part.where} does not have"
                        f"{suggest(name, known)}; it has {', '.join(part.all_names)}."
                    )
    # Gradiometers have no common reference, and ICA has no eye electrodes.
    if modality == "meg":
        for name, used in (
            ("reference", cleaning.reference != "none"),
            ("ica", cleaning.ica is not None),
            ("autoreject", cleaning.autoreject is not None),
        ):
            if used:
                raise ConfigError(
                    f"dataset.{name} applies to EEG, but {parts[0].where} is MEG; use only filters, "
                    "bad_channels and scaling."
                )
    for part in parts:
        # Above half the sampling rate there is no signal to filter.
        above = [f for f in (options.l_freq, options.h_freq, *options.notch) if f and f >= part.sfreq / 2]
        if above:
            raise ConfigError(
                f"{part.where} has {part.sfreq:g} Hz, so filters must stay below {part.sfreq / 2:g} Hz, not "
                f"{above[0]:g}."
            )


def _drop_channels(source: MeegSource, parts: Sequence[ContinuousPart], bads: Sequence[str]) -> MeegSource:
    """Leave bad channels out of every part: out of the stored channels, and out of the references."""
    kept = [row for row, name in enumerate(source.ch_names) if name not in bads]
    if not kept:
        raise ConfigError(
            "dataset.bad_channels is drop, and every channel is bad; choose interpolate or other bads."
        )
    names = tuple(source.ch_names[row] for row in kept)
    smaller = tuple(
        replace(
            part, ch_names=names, read=partial(_read_picked, part.read, np.array(kept)),
            bads=tuple(dict.fromkeys([*part.bads, *bads])), sensors=part.sensors or part.own_sensors,
        )
        for part in parts
    )  # fmt: skip
    positions = None if source.ch_pos is None else np.asarray(source.ch_pos)[kept]
    dropped = [name for name in source.ch_names if name in bads]
    notes = {**source.notes, **({"channels_dropped": dropped} if dropped else {})}
    return replace(source, parts=smaller, ch_pos=positions, notes=notes)


def _read_picked(
    read: Callable[[int, int], np.ndarray], rows: np.ndarray, start: int, stop: int
) -> np.ndarray:
    return np.asarray(read(start, stop))[rows]


# The check is fast for any length of the file: the whole file is read later, when trials are cut.
N_PIECES = 4
_PIECE_S = 1.0
_PIECE_TRIALS = 4


def sample_part(part: ContinuousPart | EpochedPart, *, sfreq: float | None = None) -> None:
    """Read a few evenly spaced pieces of a part.

    Parameters
    ----------
    sfreq
        The published sampling rate in Hz; None if it is unknown.

    Raises
    ------
    DataError
        If the rate is another one, the times are not evenly spaced, a value is not finite, or a channel is flat in all
        pieces; names subject, file and channels.
    """
    found = _find_rate(part)
    # Rates in headers are rounded, but by much less than a resampling would change them.
    if sfreq is not None and found is not None and abs(found / sfreq - 1) > 1e-3:
        raise DataError(
            f"{part.where} has a sampling rate of {found:g} Hz, where {sfreq:g} Hz is published: it was "
            "resampled or is from another data set; fetch it again."
        )
    # Smallest and largest value of each channel over all pieces: (n_channels,).
    low = np.full(len(part.ch_names), np.inf)
    high = -low
    n_seen = 0
    for start, stop in _choose_pieces(part):
        # (n_trials, n_channels, n_times) -> (n_channels, n_trials * n_times)
        block = np.asarray(part.read(start, stop), dtype=np.float64)
        if isinstance(part, EpochedPart):
            block = np.moveaxis(block, 1, 0).reshape(block.shape[1], -1)
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            unit = "epochs" if isinstance(part, EpochedPart) else "samples"
            raise DataError(
                f"{part.where}: {int((~np.isfinite(block)).sum())} values are not finite in the {unit} {start} to "
                f"{stop}, channel(s) {_list(part, bad)}; repair the file, or leave the channels out."
            )
        low, high = np.minimum(low, block.min(axis=1)), np.maximum(high, block.max(axis=1))
        n_seen += block.shape[1]
    flat = np.flatnonzero(low == high)
    if n_seen > 1 and len(flat):
        raise DataError(
            f"{part.where}: the channel(s) {_list(part, flat)} are flat in {N_PIECES} pieces of the file; leave them "
            "out, or drop or interpolate them (dataset.bads)."
        )


def _find_rate(part: ContinuousPart | EpochedPart) -> float | None:
    if isinstance(part, ContinuousPart):
        return part.sfreq
    if len(part.times) < 3:
        return None
    steps = np.diff(part.times)
    # Times are often rounded to milliseconds in the files.
    if steps.min() <= 0 or np.ptp(steps) > 0.01 * np.median(steps) + 2e-3:
        raise DataError(
            f"{part.where} has times that are not evenly spaced ({steps.min():g} to {steps.max():g} s apart)."
        )
    return (len(part.times) - 1) / float(part.times[-1] - part.times[0])


def _choose_pieces(part: ContinuousPart | EpochedPart) -> list[tuple[int, int]]:
    if isinstance(part, EpochedPart):
        total, length = len(part.trials), _PIECE_TRIALS
    else:
        total, length = part.n_samples, max(2, round(_PIECE_S * part.sfreq))
    # Both ends are among the pieces: the last one shows a truncated file.
    starts = np.unique(np.linspace(0, max(0, total - length), N_PIECES).astype(int))
    return [(start, min(start + length, total)) for start in starts.tolist()]


def _list(part: ContinuousPart | EpochedPart, rows: np.ndarray) -> str:
    names = [part.ch_names[row] for row in rows[:8]]
    return ", ".join(names) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
