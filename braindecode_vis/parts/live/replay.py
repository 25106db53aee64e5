"""Sends recordings and phantoms as a stream, with the faults of real streams.

Owns what can be played (`Playback`: a recording of any format that the package reads, the recordings of a data set, or
a simulated subject who never stops looking at pictures), how a stream goes wrong (`Faults`, the same for the same
seed), and the two ways out: `ReplaySource`, a source within this process, and `play`, an outlet of the Lab Streaming
Layer with a second one for markers. No recording is made here; the phantom is simulated.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.live.sources import MARKERS_SUFFIX, describe_stream, find_triggers, load_lsl
from braindecode_vis.parts.live.stream_roles import Chunk, Marker, StreamInfo

if TYPE_CHECKING:
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart

Block = tuple[np.ndarray, list[tuple[int, str]]]
_BLOCK_S = 5.0
_EMPTY = np.empty(0)
"""What the name of a marker stream that `play` makes ends with."""
_LOOSE_V = 100e-6  # mains and noise of an electrode that has come off, beside some 10 microvolt of brain


@dataclass(frozen=True)
class Playback:
    """Something that can be played.

    Parameters
    ----------
    info
        The stream that it makes.
    ch_types
        MNE type of each channel.
    blocks
        Begins at the beginning: yields samples of shape (n_channels, n) and the markers among them, each with its
        sample counted from the first one of all.
    n_samples
        Length; None for what never ends.
    respond
        Returns what a picture evokes, from its onset on, shape (n_channels, n) in the unit of the stream, or None for
        one that is not known; for a simulated subject alone.
    """

    info: StreamInfo
    ch_types: tuple[str, ...]
    blocks: Callable[[], Iterator[Block]]
    n_samples: int | None
    respond: Callable[[str], np.ndarray | None] | None = None

    def describe(self) -> str:
        """Return what is played, in words."""
        length = (
            "endless" if self.n_samples is None else f"{self.n_samples / self.info.sfreq / 60:.1f} minutes"
        )
        return f"{len(self.info.ch_names)} channels at {self.info.sfreq:g} Hz, {length}"


@dataclass(frozen=True)
class Faults:
    """What goes wrong with a stream.

    Parameters
    ----------
    drop
        Share of the chunks that are lost.
    jitter_ms
        How late a chunk comes: the size of a normal number of this standard deviation. Chunks keep their order.
    drift_ppm
        By how many millionths the amplifier samples faster than it says.
    lose
        Channels and when their electrode comes off, in s; they carry mains and noise from then on.
    pauses
        Begin and length in s of each time for which the stream is away; its samples are lost, markers are not.
    seed
        Of all that is random.
    """

    drop: float = 0.0
    jitter_ms: float = 0.0
    drift_ppm: float = 0.0
    lose: tuple[tuple[str, float], ...] = ()
    pauses: tuple[tuple[float, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or self.jitter_ms < 0 or abs(self.drift_ppm) > 100_000:
            raise ConfigError(
                "the share of lost chunks must be between 0 and 1, jitter must not be negative and "
                f"drift must be below 100000 ppm, not {self.drop:g}, {self.jitter_ms:g} ms and "
                f"{self.drift_ppm:g} ppm."
            )


def read_faults(
    *,
    drop: float = 0.0,
    jitter: float = 0.0,
    drift: float = 0.0,
    lose: tuple[str, ...] | list[str] = (),
    pause: tuple[str, ...] | list[str] = (),
    seed: int = 0,
) -> Faults:
    """Return faults as they are written on the command line: ``CHANNEL@S`` to lose, ``SECONDS@S`` to pause."""

    def divide(text: str, option: str, form: str) -> tuple[str, float]:
        what, _, when = text.rpartition("@")
        if not what or not re.fullmatch(r"\d+(\.\d*)?", when):
            raise ConfigError(
                f"{option} is {text!r}, but must be {form}@S, with S in seconds from the start."
            )
        return what, float(when)

    pauses = []
    for text in pause:
        length, begin = divide(text, "--pause", "SECONDS")
        if not re.fullmatch(r"\d+(\.\d*)?", length):
            raise ConfigError(
                f"--pause is {text!r}, but must be SECONDS@S, for example 5@60 for five seconds after a minute."
            )
        pauses.append((begin, float(length)))
    lost = tuple(divide(text, "--lose", "CHANNEL") for text in lose)
    return Faults(drop, jitter, drift, lost, tuple(sorted(pauses)), seed)


@dataclass(frozen=True)
class Delivery:
    """One chunk on its way.

    Parameters
    ----------
    samples : array of shape (n_channels, n_samples)
        Empty if they are lost.
    times : float64 array of shape (n_samples,)
        In s from the first sample, on a clock without drift.
    markers
        That happened by then.
    due
        When it arrives, in s.
    note
        What was lost before it.
    away
        Whether the stream is away at this time.
    """

    samples: np.ndarray
    times: np.ndarray
    markers: tuple[Marker, ...]
    due: float
    note: str = ""
    away: bool = False


def deliver(
    playback: Playback, *, chunk: int = 20, faults: Faults | None = None, repeat: bool = False
) -> Iterator[Delivery]:
    """Cut what is played into chunks and let go wrong what shall go wrong.

    Parameters
    ----------
    chunk
        Samples of a chunk.
    repeat
        Whether to begin anew at the end, forever.
    """
    faults = faults or Faults()
    info = playback.info
    unknown = [name for name, _ in faults.lose if name not in info.ch_names]
    if unknown:
        raise ConfigError(
            f"the channel {unknown[0]!r} cannot be lost: the stream has {', '.join(info.ch_names)}."
        )
    if chunk < 1:
        raise ConfigError(f"a chunk needs at least one sample, not {chunk}.")
    generator = make_generator(faults.seed, "faults of a stream")
    rate = info.sfreq * (1 + faults.drift_ppm * 1e-6)
    due, n_lost, first = 0.0, 0, 0
    gone = 0.0  # how long the stream has been away
    for samples, found in _cut(playback, chunk, repeat):
        n = samples.shape[1]
        times = (first + np.arange(n)) / rate
        markers = tuple(Marker(sample / rate, value) for sample, value in found)
        # Drawn for every chunk, so that one fault does not move another.
        lost, late = generator.random() < faults.drop, abs(generator.standard_normal())
        away = any(begin <= times[0] < begin + length for begin, length in faults.pauses)
        due = max(due, float(times[-1]) + late * faults.jitter_ms / 1000)
        first += n
        if lost or away:
            n_lost, gone = n_lost + n, gone + away * n / rate
            yield Delivery(samples[:, :0], _EMPTY, markers, due, away=away)
            continue
        for name, begin in faults.lose:
            if times[-1] >= begin:
                samples = _loosen(samples, info, info.ch_names.index(name), times, begin, generator)
        yield Delivery(samples, times, markers, due, describe_loss(n_lost, info.sfreq, gone))
        n_lost, gone = 0, 0.0
    if n_lost:
        yield Delivery(
            np.empty((len(info.ch_names), 0)), _EMPTY, (), due, describe_loss(n_lost, info.sfreq, gone)
        )


def shorten(playback: Playback, duration_s: float) -> Playback:
    """Return what is played without what lies behind the first `duration_s` seconds."""
    last = max(1, round(duration_s * playback.info.sfreq))
    n_samples = last if playback.n_samples is None else min(last, playback.n_samples)

    def blocks() -> Iterator[Block]:
        start = 0
        for samples, markers in playback.blocks():
            left = n_samples - start
            yield samples[:, :left], [marker for marker in markers if marker[0] < n_samples]
            start += samples.shape[1]
            if start >= n_samples:
                return

    return replace(playback, blocks=blocks, n_samples=n_samples)


def describe_loss(n_lost: int, sfreq: float, away: float = 0.0) -> str:
    """Return the sentence on samples that never came; empty if all did."""
    if not n_lost:
        return ""
    back = f"the stream was interrupted for {away:.1f} s: " if away else ""
    return f"{back}{n_lost} samples ({n_lost / sfreq * 1000:.0f} ms) were lost."


def _cut(playback: Playback, chunk: int, repeat: bool) -> Iterator[Block]:
    """Yield chunks of equal length, and the markers of each; the last one of a recording may be shorter."""
    start = offset = 0  # first sample of the chunk, and of this turn of the recording
    while True:
        held: list[np.ndarray] = []
        waiting: list[tuple[int, str]] = []
        for samples, markers in itertools.chain(playback.blocks(), [(None, [])]):
            waiting += [(sample + offset, value) for sample, value in markers]
            if samples is not None:
                held = [*held, samples] if held and held[0].shape[1] else [samples]
            if not held:
                break
            joined = np.concatenate(held, axis=1) if len(held) > 1 else held[0]
            n_whole = joined.shape[1] // chunk * chunk if samples is not None else joined.shape[1]
            for first in range(0, n_whole, chunk):
                piece = joined[:, first : first + chunk]
                stop = start + piece.shape[1]
                yield piece, [m for m in waiting if m[0] < stop]
                waiting = [m for m in waiting if m[0] >= stop]
                start = stop
            held = [joined[:, n_whole:]]
        if not repeat or start == offset:
            return
        offset = start


def _loosen(
    samples: np.ndarray, info: StreamInfo, row: int, times: np.ndarray, begin: float, rng: np.random.Generator
) -> np.ndarray:
    size = _LOOSE_V * {"uV": 1e6}.get(info.unit, 1.0)
    if info.modality == "meg":
        size = 50 * float(np.abs(samples[row]).mean())
    noise = size * (np.sin(2 * np.pi * 50 * times) + 0.3 * rng.standard_normal(len(times)))
    spoiled = samples.copy()
    spoiled[row] = np.where(times >= begin, noise, spoiled[row])
    return spoiled


class ReplaySource:
    """A source within this process, without a network; see `StreamSource`.

    Parameters
    ----------
    playback
        What is played.
    chunk
        Samples of a chunk.
    speed
        Times the real speed; None or 0 gives chunks as fast as they are read.
    faults
        What goes wrong.
    repeat
        Whether to begin anew at the end.
    """

    def __init__(
        self,
        playback: Playback,
        *,
        chunk: int = 20,
        speed: float | None = None,
        faults: Faults | None = None,
        repeat: bool = False,
    ) -> None:
        self.playback, self.chunk, self.speed = playback, chunk, speed or None
        self.faults, self.repeat = faults, repeat
        self._shown: deque[tuple[float, np.ndarray]] = deque()  # when, and what it evokes
        self._coming: Iterator[Delivery] | None = None
        self._next: Delivery | None = None
        self._started = 0.0

    def connect(self) -> StreamInfo:
        """Begin at the beginning."""
        self._coming = deliver(self.playback, chunk=self.chunk, faults=self.faults, repeat=self.repeat)
        self._next = next(self._coming, None)  # what is slow at first is done before the clock runs
        self._started = time.perf_counter()
        return self.playback.info

    def read(self, timeout: float) -> Chunk:
        """Return the next chunk, and those that come with it."""
        empty = np.empty((len(self.playback.info.ch_names), 0))
        if self._coming is None or self._next is None:
            return Chunk(empty, _EMPTY, ended=True)
        due = self._next.due
        if self.speed is not None:
            wait = self._started + due / self.speed - time.perf_counter()
            if wait > 0:
                time.sleep(min(wait, timeout))
            if wait > timeout:
                return Chunk(empty, _EMPTY)
            due = (time.perf_counter() - self._started) * self.speed
        taken: list[Delivery] = []
        arrived = 0.0
        while self._next is not None and self._next.due <= due:
            taken.append(self._next)
            arrived = self._started + self._next.due / self.speed if self.speed else 0.0
            self._next = next(self._coming, None)
        times = np.concatenate([each.times for each in taken])
        return Chunk(
            self._add_answers(np.concatenate([each.samples for each in taken], axis=1), times),
            times,
            tuple(marker for each in taken for marker in each.markers),
            tuple(each.note for each in taken if each.note),
            arrived,
        )

    def answer(self, marker: Marker) -> None:
        """Let a simulated subject see a picture, from any thread; what was sent by then stays as it is."""
        evoked = self.playback.respond(marker.value) if self.playback.respond is not None else None
        if evoked is not None:
            self._shown.append((marker.time, evoked))

    def _add_answers(self, samples: np.ndarray, times: np.ndarray) -> np.ndarray:
        sfreq = self.playback.info.sfreq
        for when, evoked in tuple(self._shown):
            at = np.round((times - when) * sfreq).astype(int)
            within = (at >= 0) & (at < evoked.shape[1])
            samples[:, within] += evoked[:, at[within]]
            if len(at) and at[0] >= evoked.shape[1]:
                self._shown.popleft()  # the first that was shown is the first to be over
        return samples

    def close(self) -> None:
        """Let go of the recording."""
        self._coming = self._next = None


def open_playback(
    source: str | Path,
    *,
    root: Path | None = None,
    subjects: list[str] | None = None,
    overrides: list[str] | None = None,
    split: Literal["test", "train", "all"] = "test",
    recording: int | None = None,
    column: str | None = None,
) -> Playback:
    """Open something that was recorded.

    Parameters
    ----------
    source
        A file of EEG or MEG, a configuration, or the folder of a run, whose data set is played.
    root, subjects, overrides
        Of the data set of a configuration.
    split
        Which recordings of a data set: those that show images of this split.
    recording
        Which of them, from 1; all, one after the other, by default.
    column
        Of the events table beside a file: what markers say. By default the first of `MARKER_COLUMNS` that is there.

    Raises
    ------
    DataError
        If the file cannot be read, or holds nothing to play.
    """
    path = Path(source).expanduser()
    is_recording = path.is_file() and path.suffix.lower() not in (".yaml", ".yml")
    if is_recording or path.suffix == ".ds":
        if root is not None or subjects or overrides or recording is not None:
            raise ConfigError(
                f"{path} is one recording; --root, --subject, --set and --recording are for a configuration or a run."
            )
        return _open_file(path, column)
    if path.suffix.lower() in RECORDED and not path.exists():
        raise DataError(f"{path} does not exist; give a recording, a run folder or a configuration.")
    if column is not None:
        raise ConfigError(
            "the column of markers applies to a single file; a configuration already defines its images."
        )
    from braindecode_vis.config import read_config

    chosen = [f"dataset.subjects=[{', '.join(subjects)}]"] if subjects else []
    config = read_config(source, [*chosen, *(overrides or [])], root=root)
    if not hasattr(config.dataset, "open_epochs"):
        raise ConfigError(
            f"{source} is of {config.dataset.kind}, which has no continuous recordings of EEG or MEG to send."
        )
    return _open_dataset(config, str(source), split, recording)


RECORDED = (
    ".fif", ".gz", ".edf", ".bdf", ".vhdr", ".set", ".cnt", ".csv", ".ds", ".gdf", ".mff", ".sqd", ".con"
)  # fmt: skip
"""Endings of files that are taken for recordings."""
MARKER_COLUMNS = ("stimulus_id", "stim_file", "stimulus", "image", "trial_type", "value")
_JOINS = ("edge", "bad", "boundary", "new segment")


def _open_file(path: Path, column: str | None) -> Playback:
    from braindecode_vis.datasets.bids.meeg_files import RawReader, list_channels, open_recording

    if path.name.endswith((".csv", ".csv.gz")):
        from braindecode_vis.datasets import muse_n170

        if column is not None:
            raise ConfigError(
                f"{path} is a Muse recording without an events table, so it has no column to choose."
            )
        samples, onsets, codes = muse_n170.read_run(path, muse_n170.CHANNELS)
        markers = [
            (int(at), muse_n170.MARKERS[code]) for at, code in zip(onsets, codes.tolist(), strict=True)
        ]
        info = StreamInfo(path.name, "eeg", muse_n170.CHANNELS, muse_n170.SFREQ, "V", f"{path.name}, Marker0")
        return _play_arrays(
            info, ("eeg",) * 4, lambda start, stop: samples[:, start:stop], samples.shape[1], markers
        )
    raw = open_recording(path, str(path))
    kinds = ("eeg",) if "eeg" in raw.get_channel_types() else ("mag", "grad")
    names = list_channels(raw, kinds)
    if not names:
        raise DataError(
            f"{path} has no channel of EEG or MEG, but {', '.join(sorted(set(raw.get_channel_types())))}."
        )
    types = tuple(raw.get_channel_types(picks=list(names)))
    reader = RawReader(raw, np.array([raw.ch_names.index(name) for name in names]))
    markers, where = _find_markers(raw, path, column)
    modality: Literal["eeg", "meg"] = "eeg" if kinds == ("eeg",) else "meg"
    info = StreamInfo(
        path.name, modality, names, float(raw.info["sfreq"]), "V" if modality == "eeg" else "T", where
    )
    return _play_arrays(info, types, reader, int(raw.n_times), markers)


def _find_markers(raw: Any, path: Path, column: str | None) -> tuple[list[tuple[int, str]], str]:
    """Return samples and values of events: of the events table, else of annotations, else of a trigger channel."""
    sfreq = float(raw.info["sfreq"])
    table_path = path.with_name(f"{path.name.rsplit('_', 1)[0].split('_split-')[0]}_events.tsv")
    if table_path.is_file() and "_" in path.name:
        from braindecode_vis.datasets.bids.meeg_files import read_text_table

        table = read_text_table(table_path, str(path))
        chosen = column or next((name for name in MARKER_COLUMNS if name in table.columns), None)
        if "onset" not in table.columns or chosen not in table.columns:
            raise DataError(
                f"{table_path} has the columns {', '.join(table.columns)}; markers need the column onset "
                "and one with the shown image: give it with --column."
            )
        shown = table.dropna(subset=["onset", chosen])
        values = shown[chosen].str.replace("\\", "/")
        if chosen in ("stim_file", "image"):
            values = values.map(lambda name: Path(name).stem)
        found = [(round(float(at) * sfreq), value) for at, value in zip(shown["onset"], values, strict=True)]
        return sorted(found), f"{table_path.name}, {chosen}"
    if column is not None:
        raise DataError(
            f"there is no events table {table_path.name} beside {path}, so it has no column {column!r}."
        )
    notes = [
        (int(at), str(text))
        for at, text in zip(
            raw.time_as_index(raw.annotations.onset, use_rounding=True, origin=raw.annotations.orig_time),
            raw.annotations.description, strict=True,
        )
        if not text.lower().startswith(_JOINS)
    ]  # fmt: skip
    if notes:
        return sorted(notes), f"annotations of {path.name}"
    stim = [name for name, kind in zip(raw.ch_names, raw.get_channel_types(), strict=True) if kind == "stim"]
    for name in stim:
        values = raw.get_data(picks=[name])[0].astype(np.int64)
        found = find_triggers(values, 0)
        if found:
            return found, f"trigger channel {name} of {path.name}"
    return [], ""


def _play_arrays(
    info: StreamInfo,
    ch_types: tuple[str, ...],
    read: Callable[[int, int], np.ndarray],
    n_samples: int,
    markers: list[tuple[int, str]],
) -> Playback:
    size = max(1, round(_BLOCK_S * info.sfreq))
    at = np.array([sample for sample, _ in markers], int)

    def blocks() -> Iterator[Block]:
        for start in range(0, n_samples, size):
            stop = min(start + size, n_samples)
            low, high = np.searchsorted(at, (start, stop))
            yield np.asarray(read(start, stop)), markers[low:high]

    return Playback(info, ch_types, blocks, n_samples)


def _open_dataset(config: Any, source: str, split: str, recording: int | None) -> Playback:
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart

    check_option("--split", split, ("test", "train", "all"))
    opened = config.dataset.open_epochs()
    parts = [part for part in opened.parts if isinstance(part, ContinuousPart)]
    if not parts:
        raise DataError(
            f"{opened.parts[0].where} holds published epochs, which cannot be sent as a stream; give a "
            "data set of continuous recordings."
        )
    shown = [part for part in parts if split == "all" or (part.trials["split"] == split).any()]
    if not shown:
        # Where a split is drawn later, nothing says yet which trials test.
        shown = parts
    if recording is not None:
        if not 1 <= recording <= len(shown):
            raise ConfigError(
                f"there is no recording {recording}: {source} has {len(shown)} of the split {split}."
            )
        shown = [shown[recording - 1]]
    subjects = sorted({part.recording.subject for part in shown})
    if len(subjects) > 1:
        raise ConfigError(
            f"{source} has the subjects {', '.join(subjects)}; a stream has one subject: choose it with --subject."
        )
    first = shown[0]
    sensors = first.sensors or first.own_sensors
    names = tuple(sensors.ch_names)
    if any(part.all_names != names or part.sfreq != first.sfreq for part in shown):
        raise DataError(
            f"the recordings of {source} have other channels or rates; choose one with --recording."
        )
    unit = opened.unit if opened.unit in ("V", "uV", "T", "T/m") else ""
    info = StreamInfo(Path(source).name, opened.modality, names, first.sfreq, unit, "images of the data set")
    played = [_play_part(part, info) for part in shown]

    def blocks() -> Iterator[Block]:
        start = 0
        for each in played:
            for samples, markers in each.blocks():
                yield samples, [(sample + start, value) for sample, value in markers]
            start += each.n_samples or 0

    kind = "eeg" if opened.modality == "eeg" else "mag"
    return Playback(info, (kind,) * len(names), blocks, sum(each.n_samples or 0 for each in played))


def _play_part(part: ContinuousPart, info: StreamInfo) -> Playback:
    events = part.trials.sort_values("sample")
    markers = list(
        zip(events["sample"].astype(int).tolist(), events["stimulus_id"].astype(str).tolist(), strict=True)
    )
    sensors = part.sensors or part.own_sensors
    return _play_arrays(info, (), sensors.read, part.n_samples, markers)


def open_phantom(
    root: Path | None = None,
    *,
    run: Path | None = None,
    subject: int = 1,
    split: Literal["test", "train", "all"] = "test",
    soa: float | None = None,
    seed: int = 0,
) -> Playback:
    """Let a simulated subject look at pictures without end: the one whose recordings a data set of phantoms holds.

    Brain, head, sensors and ongoing activity are those of the data set, so that what was trained on it decodes the
    stream; trials and noise are new.

    Parameters
    ----------
    root
        Folder of a phantom of EEG or MEG.
    run
        A run on one, instead.
    subject
        Number of the subject, from 1.
    split
        Which pictures are shown, each once before any is shown again.
    soa
        From one picture to the next in s; by default what THINGS-EEG2 has for pictures that stay as long: twice their
        duration, at least 0.2 s. Infinity for a subject who sees only what `ReplaySource.answer` shows.
    seed
        Of order and noise.

    Raises
    ------
    DataError
        If the folder holds no phantom, or one of fMRI.
    """
    from braindecode_vis.parts.phantom.brain import RESPONSE_S, compute_time_course, draw_trials, make_person
    from braindecode_vis.parts.phantom.build import get_format
    from braindecode_vis.parts.phantom.drive import compute_drive
    from braindecode_vis.parts.phantom.meeg_signal import make_sensor_map, simulate_endless
    from braindecode_vis.parts.phantom.truth import read_truth

    truth = read_truth(_find_phantom(root, run))
    form = get_format(truth.format)
    if form.modality == "fmri":
        raise DataError(
            f"{truth.root} is a phantom of fMRI, which has volumes; a stream of samples needs a phantom "
            "of EEG or MEG."
        )
    if not 1 <= subject <= truth.size.n_subjects:
        raise ConfigError(f"{truth.root} has {truth.size.n_subjects} subject(s), not a number {subject}.")
    table = truth.read_stimuli()

    def refuse(stimuli: Any) -> np.ndarray:
        raise DataError(f"{truth.folder} is missing the arrays drive_*.npy; make the phantom again.")

    config = truth.config
    drive = compute_drive(
        table, truth.root, truth.folder, embed=refuse, n_semantic=config.n_semantic, kind=config.drive
    )
    person = make_person(truth.config, subject - 1, drive)
    system: Any = form.make_recorder(truth.size)
    rows = np.flatnonzero((table["split"] == split) | (split == "all"))
    if not len(rows):
        raise ConfigError(f"{truth.root} has no image of the split {split!r}; choose test, train or all.")
    interval = max(2 * form.duration_s, 0.2) if soa is None else soa
    if interval * system.sfreq < 1:
        raise ConfigError(f"pictures cannot follow each other every {interval:g} s.")
    ids = table["stimulus_id"].astype(str).tolist()

    def show() -> Iterator[tuple[float, int]]:
        generator, number, last = make_generator(seed, "order of a stream"), 0, -1
        while np.isinf(interval):
            yield 1e9, -1
        while True:
            order = generator.permutation(rows)
            if len(order) > 1 and order[0] == last:  # twice in a row would be one long image
                order = np.roll(order, 1)
            for row in order.tolist():
                yield 1.0 + number * interval, row
                number, last = number + 1, row

    scale, unit = (1e6, "uV") if form.modality == "eeg" else (1.0, "T")  # as amplifiers send it

    def blocks() -> Iterator[Block]:
        for samples, shown in simulate_endless(
            person, system, show(), form.duration_s, name=f"stream-{seed}"
        ):
            yield samples * np.float32(scale), [(sample, ids[row]) for sample, row in shown]

    n_answers = itertools.count()

    def respond(name: str) -> np.ndarray | None:
        if name not in ids:
            return None
        gains, delays = draw_trials(person, 1, f"stream-{seed}-answer-{next(n_answers)}")
        times = np.arange(round((form.duration_s + RESPONSE_S) * system.sfreq)) / system.sfreq - delays[0]
        courses = np.stack([compute_time_course(stage, times, form.duration_s) for stage in person.stages])
        sensors = make_sensor_map(person, system, form.duration_s)
        pattern = sensors.project(person, np.array([ids.index(name)]))[0] * gains[0][:, None]
        evoked: np.ndarray = pattern.T @ courses * scale  # (n_channels, n_times)
        return evoked

    info = StreamInfo("phantom", form.modality, system.ch_names, system.sfreq, unit, "ids of the pictures")
    return Playback(info, system.ch_types, blocks, None, respond)


def _find_phantom(root: Path | None, run: Path | None) -> Path:
    if (root is None) == (run is None):
        raise ConfigError("give either the folder of a phantom (--root) or a run on a phantom (--run).")
    if root is not None:
        return root.expanduser()
    assert run is not None
    from braindecode_vis.config import read_config

    if not (run.expanduser() / "config.yaml").is_file():
        raise DataError(f"{run} is not a run folder: it has no config.yaml.")
    config = read_config(run.expanduser())
    folder = getattr(config.dataset, "root", None)
    if folder is None or not (folder / "phantom_truth").is_dir():
        played = f"; play its recordings with: braindecode-vis stream {run}"
        raise DataError(
            f"the run {run} is not on a phantom: {folder or config.dataset.kind} has no phantom_truth"
            + (
                played
                if hasattr(config.dataset, "open_epochs")
                else ", and does not cut trials from recordings."
            )
        )
    return Path(folder)


def play(
    playback: Playback,
    name: str,
    *,
    chunk: int = 20,
    speed: float = 1.0,
    faults: Faults | None = None,
    repeat: bool = False,
    wait: bool = False,
    tell: Callable[[str], Any] = lambda sentence: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Play as a stream of the Lab Streaming Layer, with markers in a second one, until the end or `stop`.

    Time stamps are those of the samples; with jitter they are those of the sending, as of drivers that stamp what has
    arrived. At another speed they advance by the time of the recording.

    Parameters
    ----------
    name
        Of the stream; that of the markers has `MARKERS_SUFFIX` behind it.
    wait
        Whether to begin when somebody listens, so that nothing of the beginning is missed.
    tell
        Called with a sentence when something happens.
    stop
        Ends it from another thread.

    Returns
    -------
    summary
        `n_samples`, `n_markers`, `n_lost` and `late_ms`, the largest delay behind the clock.

    Raises
    ------
    DataError
        If there is a stream of that name already.
    """
    if speed <= 0:
        raise ConfigError(f"the speed must be positive, not {speed:g}.")
    lsl = load_lsl("stream")
    there = [each for each in lsl.resolve_streams(timeout=1.0) if each.name in (name, name + MARKERS_SUFFIX)]
    if there:
        raise DataError(
            f"a stream of that name already exists ({describe_stream(there[0])}); stop it, or choose another --name."
        )
    faults, stop = faults or Faults(), stop or threading.Event()
    samples_out = _open_outlet(lsl, playback, name, chunk, speed)
    described = lsl.StreamInfo(
        name + MARKERS_SUFFIX, "Markers", 1, 0.0, "string", f"braindecode-vis:{name}:markers"
    )
    markers_out = lsl.StreamOutlet(described)
    summary = {"n_samples": 0, "n_markers": 0, "n_lost": 0, "late_ms": 0.0}
    coming = deliver(playback, chunk=chunk, faults=faults, repeat=repeat)
    following = next(coming, None)  # a simulation takes a moment to begin
    try:
        while wait and not samples_out.has_consumers and not stop.is_set():
            stop.wait(0.05)
        if wait:
            stop.wait(0.2)  # who listens to samples listens to markers a moment later
        started = lsl.local_clock()
        while following is not None and not stop.is_set():
            each, following = following, next(coming, None)
            left = started + each.due / speed - lsl.local_clock()
            if left > 0 and stop.wait(left):
                break
            summary["late_ms"] = max(summary["late_ms"], -left * 1000)
            if each.away and samples_out is not None:
                tell("the stream is interrupted")
                samples_out._del()  # its listeners see the connection end
                samples_out = None
            elif samples_out is None and not each.away:
                samples_out = _open_outlet(lsl, playback, name, chunk, speed)
                tell("the stream continues")
            if n := len(each.times):
                last = each.due if faults.jitter_ms else each.times[-1]
                stamps = started + last + each.times - each.times[-1]
                # (n_channels, n) -> (n, n_channels)
                values = np.ascontiguousarray(each.samples.T, np.float32)
                if n == 1:
                    samples_out.push_sample(values[0], float(stamps[0]))
                else:
                    samples_out.push_chunk(values, stamps)
                summary["n_samples"] += n
            else:
                summary["n_lost"] += 1
            for marker in each.markers:
                markers_out.push_sample([marker.value], started + marker.time)
                summary["n_markers"] += 1
        if not stop.is_set():
            stop.wait(0.5)  # what was pushed last is still on its way
    except KeyboardInterrupt:
        tell("stopped")
    finally:
        for outlet in (samples_out, markers_out):
            if outlet is not None:
                outlet._del()
    return summary


def _open_outlet(lsl: Any, playback: Playback, name: str, chunk: int, speed: float) -> Any:
    info = playback.info
    # One id for all outlets of this name, so that listeners know the one that comes back.
    described = lsl.StreamInfo(
        name, info.modality.upper(), len(info.ch_names), info.sfreq, "float32", f"braindecode-vis:{name}"
    )
    described.set_channel_names(list(info.ch_names))
    described.set_channel_types(list(playback.ch_types))
    units = {"V": "volts", "uV": "microvolts", "T": "T", "T/m": "T/m"}
    if info.unit:
        described.set_channel_units([units[info.unit]] * len(info.ch_names))
    described.desc.append_child_value("speed", f"{speed:g}")
    return lsl.StreamOutlet(described, chunk_size=chunk)
