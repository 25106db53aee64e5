"""EEG and MEG decoded while they arrive: samples to epochs, epochs to ranked pictures, by a finished run.

Owns what is between a stream and the parts of a run: which samples an epoch needs and when they are there, and what
becomes of a marker whose samples never come. Every step is the run's own (`cut_stretch`, `LearntStatistics`, its
encoders, centre and gallery); filters alone are causal ones (`preprocessing.causal`). Nothing is fitted but one number,
the temperature of `evidence`. Knows no source and no listener.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.cleaning_options import Cleaning
from braindecode_vis.parts.live.evidence import Evidence
from braindecode_vis.parts.live.judge import Judge, MarkerDecoder
from braindecode_vis.parts.live.signal_watch import SignalWatch, estimate_covariance
from braindecode_vis.parts.live.stream_buffer import LONGEST_STEP, Break, SampleBuffer
from braindecode_vis.parts.live.stream_channels import ChannelMap, find_factor, map_channels, read_pairs
from braindecode_vis.parts.live.stream_plan import find_stream_plan
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Marker, StreamInfo
from braindecode_vis.pipeline import new_trials
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.preprocessing.causal import CausalFilter, make_resampling
from braindecode_vis.preprocessing.epochs import cut_stretch, find_extent, make_antialias_filter

#: Seconds that are kept beyond what one epoch needs: markers may come that much after their samples.
KEPT_S = 10.0
#: Seconds by which a marker may be ahead of the samples before its clock is taken for another one.
AHEAD_S = 10.0
#: Gaps up to this long are bridged: two chunks of 20 ms, as amplifiers send them.
BRIDGE_MS = 40.0
#: Markers that are remembered, so that none is decided twice.
MOST_MARKERS = 10_000


@dataclass
class _Waiting:
    """A marker whose samples are not all there."""

    marker: Marker
    sample: int | None = None

    @property
    def time(self) -> float:
        return self.marker.time


class RunStreamDecoder(MarkerDecoder):
    """Decodes a stream of EEG or MEG with a finished run; a `StreamDecoder`.

    Parameters
    ----------
    run
        A finished run, or its folder.
    gallery
        Candidates: a folder of pictures or a ``.npy`` of them, a folder of embeddings, `Embeddings`; by default the
        pictures that the run was tested with.
    fold
        The fold that predicts; by default the only one, or the mean of all.
    subject, session
        Whose statistics are applied, where the run knows several; see `LearntStatistics`. By default the one subject of
        the run, or else an unknown one, and a session of its own.
    channels
        Names in the stream to names in the run, or a file of such pairs.
    interpolate
        Whether channels that the stream lacks are interpolated.
    unit
        Of the samples, in place of what the stream says.
    every
        Decide on a window every so many seconds, without markers; None decides on markers.
    events
        Markers that show an image, and its id: a mapping or a file of such pairs. By default every marker does, and its
        value is the id.
    n_top
        Candidates to list.
    repetitions
        Whether the evidence of markers of the same value adds up.
    forgetting
        What is left of the evidence of earlier windows at the next one, from 0 to 1.
    bridge
        Longest gap in ms that is drawn straight between its neighbours, which the decisions that hold it say in their
        notes; a longer one loses them, and with 0 each does.
    reconstruct
        Whether images are made; each comes later, as a second `Decision` of the same number.
    """

    def __init__(
        self,
        run: FinishedRun | str | Path,
        *,
        gallery: Any = None,
        fold: int | None = None,
        subject: str | None = None,
        session: str = "live",
        channels: Mapping[str, str] | str | Path | None = None,
        interpolate: bool = False,
        unit: str = "",
        every: float | None = None,
        events: Mapping[str, str] | str | Path | None = None,
        n_top: int = 5,
        repetitions: bool = False,
        forgetting: float = 0.8,
        bridge: float = BRIDGE_MS,
        reconstruct: bool = False,
    ) -> None:
        if unit and find_factor(unit) is None:
            raise ConfigError(f"the unit {unit!r} is not known; give V, mV, uV, T, pT or fT.")
        for name, value, good, must in (
            ("every", every, every is None or every > 0, "be above 0, in s"),
            ("forgetting", forgetting, 0 <= forgetting <= 1, "lie between 0 and 1"),
            ("bridge", bridge, 0 <= bridge < np.inf, "be 0 or above, in ms"),
        ):
            if not good:
                raise ConfigError(f"{name} is {value!r}, but must {must}.")
        if every is not None and (repetitions or events is not None):
            raise ConfigError("windows need no markers; leave out every, or else events and repetitions.")
        judge = Judge(run, gallery, fold, subject, session, n_top)
        super().__init__(judge, events, repetitions=repetitions, reconstruct=reconstruct)
        self.stream_plan = find_stream_plan(self.run)
        self._table = (
            channels if isinstance(channels, Mapping | None) else read_pairs(Path(channels), "channels")
        )
        self._interpolate, self._unit, self._every = interpolate, unit, every
        self._forgetting, self._bridge_ms = forgetting, bridge
        self._own = judge.own

    # --- the stream ---------------------------------------------------------------------------------------

    def open(self, info: StreamInfo) -> Sequence[str]:
        """Match the stream to the run; see `StreamDecoder`.

        Raises
        ------
        DataError
            If it lacks channels, or its rate or unit cannot be brought to those of the run.
        """
        given, plan = self.stream_plan, self.stream_plan.plan
        modality = str(self._own.coords.get("modality", info.modality))
        if info.modality == "fmri" or (info.modality != modality and modality in ("eeg", "meg")):
            raise DataError(
                f"the stream {info.name} is {info.modality.upper()}, but the run uses "
                f"{modality.upper()}; choose another stream or run."
            )
        notes = list(given.notes)
        ratio = info.sfreq / plan.sfreq
        if not ratio >= 1 - 1e-3:
            raise DataError(
                f"the stream {info.name} has {info.sfreq:g} Hz, but the run needs {plan.sfreq:g} Hz, and "
                "upsampling is not possible; set the amplifier to that rate or a multiple of it."
            )
        self._decim = round(ratio) if abs(ratio / round(ratio) - 1) < 1e-3 else None
        self._sfreq = plan.sfreq * self._decim if self._decim else info.sfreq
        if self._decim is None and plan.resampling == "mne":
            raise DataError(
                f"the run resampled as MNE does, from a rate that is a multiple of {plan.sfreq:g} Hz, and the stream "
                f"{info.name} has {info.sfreq:g} Hz; set the amplifier to such a rate."
            )
        if self._decim is None:
            notes.append(
                f"{info.sfreq:g} Hz is not a multiple of {plan.sfreq:g} Hz: epochs are interpolated "
                "between samples by a "
                "filter like that of the run."
            )
        # Windows that end before the epoch does are decided as soon as they are over.
        if plan.resampling == "exact":
            high = plan.window[1]
            if plan.baseline is not None:
                low_b, high_b = plan.find_baseline()
                plan = replace(plan, baseline=(low_b, high_b))
                high = max(high, high_b)
            plan = replace(plan, tmax=high)
        self._plan, self._info = plan, info
        dataset = self.run.config.dataset
        bads = tuple(getattr(dataset, "bads", ())) if plan.cleaning != Cleaning() else ()
        self.channel_map: ChannelMap = map_channels(
            info.ch_names, given.ch_names, plan.cleaning, stream=info.name, modality=modality, table=self._table,
            interpolate=self._interpolate, bads=bads,
        )  # fmt: skip
        notes += self.channel_map.notes
        said = self._unit or info.unit
        theirs, ours = find_factor(said), find_factor(given.unit)
        factor, stated = 1.0, ""
        if theirs is not None and ours is not None:
            factor, stated = theirs / ours, said
            if theirs != ours:
                notes.append(
                    f"The stream is in {said}, the run uses {given.unit}: samples are multiplied by {factor:g}."
                )
        self._used = np.flatnonzero(np.any(self.channel_map.matrix != 0, axis=0))
        self._mixing = self.channel_map.matrix[:, self._used] * factor
        self.filter = CausalFilter.of(plan.cleaning, self._sfreq)
        if words := self.filter.describe():
            notes.append(words)
        self._first, self._last = find_extent(self._sfreq, plan)
        self._half = len(make_antialias_filter(self._decim)) // 2 if self._decim else int(10 * ratio) + 1
        reach = self._half if plan.resampling == "exact" else 0
        self.delay_ms = 1000 * (reach + self.filter.delay) / self._sfreq
        if self._half and reach:
            notes.append(
                f"The low-pass against aliasing needs {1000 * self._half / self._sfreq:.0f} ms after the end of an "
                "epoch."
            )
        self._weights = None
        if self._decim is None:
            times = plan.find_times()
            self._weights = make_resampling(
                self._first - self._half, self._last + self._half, self._sfreq, times
            )
        capacity = self._last - self._first + 2 * self._half + round(KEPT_S * self._sfreq)
        self.buffer = SampleBuffer(len(self._mixing), capacity, self._sfreq)
        evidence = Evidence(self._forgetting if self._every is not None else 1.0)
        notes += self._begin(evidence, averages=self._every is None)
        own = estimate_covariance(
            new_trials.find_learnt(self.run), self._own, preprocess(self.run).folds[self.judge.folds[0]].train,
            (self.judge.subject, self.judge.session),
        )  # fmt: skip
        self.watch = SignalWatch(
            own,
            self.channel_map.ch_names,
            info.name,
            stated,
            looks_for_swaps=not self.channel_map.interpolated,
        )
        self._waiting: list[_Waiting] = []
        self._known: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._next_window: int | None = None
        self._last_time: float | None = None
        self._n_back = self._since_back = 0
        self._back_at = 0.0
        self._last_sample = np.empty(0)
        self._heard = -np.inf  # time of the last sample, whether it was a number or not
        self._held_times = np.empty(0)
        return notes

    def feed(self, chunk: Chunk) -> Iterable[Decision | str]:
        """Take samples in, and yield decisions and sentences; see `StreamDecoder`."""
        arrived = chunk.arrived or time.perf_counter()
        yield from self._take_finished()
        yield from self._take_samples(chunk)
        yield from self._take_markers(chunk.markers)
        yield from self._decide_ready(arrived)

    def flush(self) -> Iterable[Decision | str]:
        """Name every epoch that will never be complete; see `StreamDecoder`."""
        yield from self._decide_ready(time.perf_counter(), ended=True)
        yield from self._tell_jumps()
        for one in self._waiting:
            yield self._lose(one.marker, "end: the stream ended before the epoch was complete")
        self._waiting = []
        yield from self._finish_images()

    # --- samples ------------------------------------------------------------------------------------------

    def _take_samples(self, chunk: Chunk) -> Iterator[Decision | str]:
        samples, times = np.asarray(chunk.samples), np.asarray(chunk.times, dtype=float)
        if not len(times):
            return
        if samples.shape != (len(self._info.ch_names), len(times)):
            raise DataError(
                f"the stream {self._info.name} sent {samples.shape[0]} channels x {samples.shape[-1]} samples with "
                f"{len(times)} times, and announced {len(self._info.ch_names)} channels."
            )
        used = samples[self._used].astype(np.float64)
        if not (timed := np.isfinite(times)).all():
            yield from self._tell_once("Some samples have no time; they are left out.")
            used, times = used[:, timed], times[timed]
            if not len(times):
                return
        self._heard = float(times[-1])
        finite = np.isfinite(used).all(axis=0)
        if not finite.all():
            row = int(np.flatnonzero(~np.isfinite(used).all(axis=1))[0])
            name = self._info.ch_names[self._used[row]]
            yield from self._tell_once(
                f"The channel {name} has samples that are not numbers, first at {times[~finite][0]:.3f} s; they are "
                "left out.",
                f"nan {name}",
            )
            used, times = used[:, finite], times[finite]
            if not len(times):
                return
        steps = np.diff(times, prepend=times[0] if self._last_time is None else self._last_time)
        if self._last_time is None:
            steps[0] = 1 / self._sfreq
        broken = np.flatnonzero((steps > LONGEST_STEP / self._sfreq) | (steps <= 0))
        mixed = self._mixing @ used
        longest = (self._bridge_ms / 1000 + 0.5 / self._sfreq) if self._bridge_ms else 0.0
        for start, stop in itertools.pairwise(np.unique(np.r_[0, broken, len(times)])):
            if start in broken:
                before = float((self._last_time if start == 0 else times[start - 1]) or 0.0)
                after = float(times[start])
                if 0 < after - before - 1 / self._sfreq < longest:
                    self._draw_bridge(before, after, mixed[:, start])
                    yield from self._tell_once(
                        f"Gaps of up to {self._bridge_ms:g} ms are interpolated linearly, the first one "
                        f"at {before:.3f} s; each decision with such a gap says so.",
                        "bridge",
                    )
                else:
                    made = self.buffer.add_break(before, after)
                    self._held_times = np.empty(0)
                    self.filter.restart()
                    # A source that watches its stream has said it.
                    yield from self._settle_break(made, told=bool(chunk.notes) and after > before)
            self._append(mixed[:, start:stop], times[start:stop])
            self._last_sample = mixed[:, stop - 1]
            self._since_back += int(stop - start)
        self._last_time = float(times[-1])
        if self._n_back and self._since_back > self._sfreq:  # a second without another
            yield from self._tell_jumps()

    def _draw_bridge(self, before: float, after: float, sample: np.ndarray) -> None:
        """Take in a straight line from the last sample to the one that came next."""
        n = round((after - before) * self._sfreq) - 1
        share = np.arange(1, n + 1) / (n + 1)
        first = self.buffer.stop + len(self._held_times)
        self.buffer.add_bridge(first, first + n)
        line = self._last_sample[:, None] * (1 - share) + sample[:, None] * share
        self._append(line, before + (after - before) * share)

    def _append(self, mixed: np.ndarray, times: np.ndarray) -> None:
        if not self.filter.delay:
            self.buffer.append(self.filter.push(mixed), times)
            return
        # What comes out belongs to samples that came in before.
        waiting = np.r_[self._held_times, times]
        known = self.filter.push(mixed)
        self.buffer.append(known, waiting[: known.shape[1]])
        self._held_times = waiting[known.shape[1] :]

    def _settle_break(self, made: Break, told: bool) -> Iterator[Decision | str]:
        """Give up what was waited for and cannot come any more."""
        kept = []
        for one in self._waiting:
            gone = one.sample is None and (
                # Ahead of the old samples, its time means nothing on the new clock; or it fell into the gap.
                made.after <= made.before or one.time < made.after - 0.5 / self._sfreq
            )  # fmt: skip
            if gone and self.buffer.find_sample(one.time) is None:
                yield self._lose(one.marker, made.describe())
            else:
                kept.append(one)
        self._waiting = kept
        self._next_window = None
        if made.after <= made.before:
            self._n_back, first = self._n_back + 1, self._n_back == 0
            self._back_at, self._since_back = made.before, 0
            told = told or not first
        if not told:
            kind = made.describe()
            yield f"{kind[0].upper()}{kind[1:]}."

    def _tell_jumps(self) -> Iterator[str]:
        """Say how often the clock went back more than once, now that it runs on."""
        if self._n_back > 1:
            yield (
                f"Clock jump: the time of the stream went back {self._n_back - 1} times more, last at "
                f"{self._back_at:.3f} s."
            )
        self._n_back = 0

    # --- markers ------------------------------------------------------------------------------------------

    def _take_markers(self, markers: Sequence[Marker]) -> Iterator[Decision | str]:
        if self._every is not None:
            return
        for marker in markers:
            value = str(marker.value).strip()
            if self._events is not None and value not in self._events:
                yield from self._tell_once(
                    f"The marker {value!r} is not among the events, so it is not decoded."
                )
                continue
            if not np.isfinite(marker.time):
                yield self._lose(marker, "clock: the marker has no time")
                continue
            key = value, round(marker.time * self._sfreq)
            if any((value, key[1] + step) in self._known for step in (-1, 0, 1)):
                yield from self._tell_once(
                    f"The marker {value!r} at {marker.time:.3f} s came twice; repeated markers are decoded once."
                    , "twice")  # fmt: skip
                continue
            self._known[key] = None
            if len(self._known) > MOST_MARKERS:
                self._known.popitem(last=False)
            if self._find_shown(value) is None:
                yield from self._tell_once(
                    f"The marker {value!r} has no picture in the gallery, or one of a calibration block: "
                    "such markers are decoded, but not scored.",
                    "no picture",
                )
            newest = self._heard
            if np.isfinite(newest) and marker.time > newest + AHEAD_S:
                yield self._lose(
                    marker,
                    f"clock: the marker is {marker.time - newest:.0f} s ahead of the samples; both need one clock",
                )
                continue
            self._waiting.append(_Waiting(marker))
        self._waiting.sort(key=lambda one: one.time)

    # --- decisions ----------------------------------------------------------------------------------------

    def _decide_ready(self, arrived: float, ended: bool = False) -> Iterator[Decision | str]:
        kept = []
        for one in self._waiting:
            if one.sample is None:
                one.sample = self.buffer.find_sample(one.time)
            if one.sample is None:
                oldest = self.buffer.start
                if self.buffer.stop > oldest:
                    stretches = list(self.buffer.iterate_stretches())
                    low = min(float(self.buffer.read_times(a, a + 1)[0]) for a, _ in stretches)
                    newest = max(self.buffer.newest or 0.0, self._last_time or 0.0)
                    if one.time < newest:
                        inside = one.time >= low
                        why = "gap: the stream has no sample at the time of the marker" if inside else (
                            f"late: the marker is {newest - one.time:.1f} s older than the samples, of which "
                            f"{self.buffer.capacity / self._sfreq:.0f} s are kept" if self.buffer.start > 0 else
                            "start: the marker is older than the first sample"
                        )  # fmt: skip
                        if self._held_times.size and one.time >= self._held_times[0]:
                            kept.append(one)  # behind the low-pass
                            continue
                        yield self._lose(one.marker, why)
                        continue
                kept.append(one)
                continue
            found = self._try(one.sample, ended)
            if found is None:
                kept.append(one)
            elif isinstance(found, str):
                yield self._lose(one.marker, found)
            else:
                yield from self._decide(one.sample, found, arrived, one.marker)
        self._waiting = []
        for one in kept:
            # A channel that has no numbers any more would let markers wait without end.
            if self._heard > one.time + self._last / self._sfreq + KEPT_S:
                yield self._lose(one.marker, "gap: the samples of the epoch are not numbers")
            else:
                self._waiting.append(one)
        if self._every is not None:
            yield from self._decide_windows(arrived, ended)

    def _decide_windows(self, arrived: float, ended: bool) -> Iterator[Decision | str]:
        while self.buffer.stop > self.buffer.start:
            if self._next_window is None:
                low = next(self.buffer.iterate_stretches())[0]
                self._next_window = low - self._first
            found = self._try(self._next_window, ended)
            if found is None:
                return
            if not isinstance(found, str):
                yield from self._decide(self._next_window, found, arrived, None)
            assert self._every is not None
            self._next_window = (
                self._next_window + max(1, round(self._every * self._sfreq))
                if not isinstance(found, str)
                else None
            )
            if isinstance(found, str):
                return

    def _try(self, sample: int, ended: bool) -> tuple[int, int] | str | None:
        """Return the bounds within which an epoch may read, why it never can be, or None while samples are missing."""
        low, high = self.buffer.find_bounds(sample)
        first, last = sample + self._first, sample + self._last
        if first < low:
            for one in self.buffer.breaks:
                if one.sample == low:
                    return one.describe()
            return (
                "start: the epoch begins before the first sample"
                if low == 0
                else "late: the samples of the epoch are no longer kept"
            )
        stop = high if high is not None else self.buffer.stop
        if last < stop and (high is not None or ended or stop > last + self._half):
            return low, stop
        if high is not None:
            return next(one.describe() for one in self.buffer.breaks if one.sample == high)
        return None

    def cut(self, sample: int, bounds: tuple[int, int]) -> np.ndarray:
        """Return the epoch around a sample as the run cut its own, float32 of shape (1, n_channels, n_times)."""
        if self._weights is None:
            return cut_stretch(self.buffer.read, np.array([sample]), bounds, self._sfreq, self._plan)[0]
        start, stop = sample + self._first - self._half, sample + self._last + self._half + 1
        inside = max(start, bounds[0]), min(stop, bounds[1])
        wide = self.buffer.read(*inside)
        offset = wide[:, :1]
        # Beyond a break the signal stays at its last value, as `cut_epochs` has it.
        signal = np.pad(
            (wide - offset).astype(np.float32), ((0, 0), (inside[0] - start, stop - inside[1])), mode="edge"
        )
        block = signal @ self._weights
        if self._plan.baseline is None:
            return (block + offset.astype(np.float32))[None]
        low, high = (round(end * self._sfreq) + sample - start for end in self._plan.find_baseline())
        return (block - signal[:, low : high + 1].mean(axis=1, keepdims=True))[None]

    def _decide(
        self, sample: int, bounds: tuple[int, int], arrived: float, marker: Marker | None
    ) -> Iterator[Decision | str]:
        began = time.perf_counter()
        raw = self.cut(sample, bounds)
        flat = np.ptp(raw[0], axis=1) == 0
        if not flat.any() or flat.all():
            yield from self.watch.look(raw[0])
        if self.watch.gain != 1.0:
            raw = raw * np.float32(self.watch.gain)
        notes = []
        if flat.any():
            names_flat = [n for n, f in zip(self.channel_map.ch_names, flat, strict=True) if f]
            notes.append(f"flat in this epoch: {', '.join(names_flat[:8])}")
        if self.channel_map.interpolated:
            notes.append(f"interpolated: {', '.join(self.channel_map.interpolated[:8])}")
        # What filters spread of a bridge counts with it.
        reach = self._half + self.filter.delay
        if n_bridged := self.buffer.count_bridged(
            sample + self._first - reach, sample + self._last + reach + 1
        ):
            notes.append(f"bridged: {1000 * n_bridged / self._sfreq:.0f} ms of this epoch are missing")
        low = self.buffer.find_bounds(sample)[0]
        if (
            self.filter.settles
            and (sample + self._first - low) / self._sfreq < self.filter.settles
            and low > 0
        ):
            notes.append("the high-pass was restarted shortly before")
        onset = float(self.buffer.read_times(sample, sample + 1)[0]) if marker is None else marker.time
        yield from self._decide_trial(
            raw, marker, onset=onset, notes=notes, began=began, arrived=arrived, delay_ms=self.delay_ms
        )

    # --- what listeners show ------------------------------------------------------------------------------

    def describe(self) -> Mapping[str, Any]:
        """Return the facts of this session; see `StreamDecoder`."""
        plan = self._plan
        averaging = "single trials" if self._every is None else f"windows every {self._every:g} s"
        positions = self._own.coords.get("ch_pos")
        return {
            **self.judge.describe(averaging, named=self._every is None),
            "stream": self._info.name, "modality": self._info.modality,
            "sfreq": plan.sfreq, "stream_sfreq": self._info.sfreq,
            "tmin": plan.window[0], "tmax": plan.window[1], "n_times": self._own.data.shape[2],
            "ch_names": list(map(str, self._own.coords["ch_names"])),
            "ch_pos": None if positions is None else np.asarray(positions, float).tolist(),
            "channel_names": list(self.channel_map.ch_names), "channel_rows": self.channel_map.rows.tolist(),
            "delay_ms": self.delay_ms, "every": self._every, "repetitions": self._repetitions,
            "bridge_ms": self._bridge_ms, "reconstructs": self._reconstructor is not None,
            "interpolated": list(self.channel_map.interpolated),
        }  # fmt: skip
