"""Sources of a stream over a network: the Lab Streaming Layer, a FieldTrip buffer.

Owns the two clients of a network, and the times of samples: stamps that jitter are smoothed, and gaps
stay gaps. Knows nothing of what is decoded.

References
----------
Kothe et al. (2025), The lab streaming layer for synchronized multimodal recording, doi:10.1162/IMAG.a.136.
The FieldTrip buffer: https://www.fieldtriptoolbox.org/development/realtime/buffer_protocol
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, require
from braindecode_vis.parts.live.stream_channels import UNITS
from braindecode_vis.parts.live.stream_roles import Chunk, DeviceState, Marker, StreamInfo

if TYPE_CHECKING:
    from braindecode_vis.base.arrays import Modality

MARKERS_SUFFIX = "-markers"
"""What the name of a stream of markers has behind that of its samples."""

_N_RECENT = 8


class SampleClock:
    """Gives samples their times from the stamps of a stream: jitter is smoothed, gaps and drift are kept.

    A phase-locked loop of second order: the next sample is expected one period after the last, and the difference to
    its stamp moves phase and period a little. A difference far beyond the usual jitter is a gap if it is ahead and no
    more than the time that has passed here; otherwise the clock of the sender was set, and times go on without a jump.
    The smoothing of liblsl itself counts samples, so that times behind a lost chunk are wrong for minutes.

    Parameters
    ----------
    sfreq
        Rate that the stream says, in Hz.
    speed
        How fast its stamps advance, for recordings that are played faster than they were made.
    """

    settle_s = 2.0
    """Within about this time differences of phase are gone."""
    looks_back_s = 3.0
    """Over this time phase does not move by itself as far as a loss that jitter hides moves it."""

    def __init__(self, sfreq: float, speed: float = 1.0) -> None:
        self.sfreq, self.speed = sfreq, speed
        self.period = 1 / sfreq
        self.offset = 0.0
        """What times are ahead of stamps since the clock of the sender was set."""
        self._jitter = 0.0
        self._next: float | None = None  # time of the next sample
        self._arrived = 0.0
        self._seen = 0.0
        self._recent: deque[float] = deque(maxlen=_N_RECENT)
        # What times were moved by since the start, and when, over the last `looks_back_s`.
        self._moved: deque[tuple[float, float]] = deque([(0.0, 0.0)])

    def learn(self, stamps: np.ndarray) -> None:
        """Learn the usual jitter from stamps at the start of the stream."""
        starts = np.array([first for first, _ in self._divide(stamps)], int)
        if len(starts) > 3:
            # Differences, so that a lost chunk is one of them alone.
            errors = stamps[starts] - starts * self.period
            self._jitter = float(np.median(np.abs(np.diff(errors))))

    def follow(self, stamps: np.ndarray, arrived: float) -> tuple[np.ndarray, list[str]]:
        """Return the times of samples, and sentences on what was lost.

        Parameters
        ----------
        stamps : float64 array of shape (n_samples,)
            In s on the clock of the sender.
        arrived
            When they came, in s on a clock of this machine.
        """
        times, notes = np.empty(len(stamps)), []
        for first, stop in self._divide(stamps):
            n = stop - first
            stamp = float(stamps[first]) + self.offset
            start = stamp if self._next is None else self._next
            error, span = stamp - start, n * self.period
            # So much time can have gone by without samples; a second for what may be on its way.
            possible = (arrived - self._arrived) * self.speed + 1.0
            if self._next is not None and (error < -1.0 or error > possible):
                self.offset -= error
                notes.append(
                    f"the clock of the sender was set {'ahead' if error > 0 else 'back'} by "
                    f"{abs(error):.3f} s; times continue without the jump."
                )
            elif error > max(0.5 * self.period, 8 * self._jitter):
                shift = self._skip(error, span)
                start += shift
                notes.append(f"{round(shift / self.period)} samples ({shift * 1000:.0f} ms) were lost.")
            elif self._next is not None:
                self._recent.append(error)
                # A loss no longer than chunks may be late shows when all of the last ones are, by half a chunk or more.
                late = min(self._recent) > max(self.period, 0.5 * span, 2 * self._jitter)
                if late and len(self._recent) == _N_RECENT:
                    shift = self._skip(float(np.median(self._recent)), span)
                    start += shift
                    notes.append(
                        f"{round(shift / self.period)} samples ({shift * 1000:.0f} ms) were lost a few "
                        "chunks ago and detected only now; times since then are too early by this amount."
                    )
                else:
                    step = self._approach(error, span, n)
                    start += step
                    notes += self._tell_hidden(step + (self.period - 1 / self.sfreq) * n, span)
            times[first:stop] = start + np.arange(n) * self.period
            self._next = start + n * self.period
            self._arrived = arrived
        return times, notes

    def _tell_hidden(self, step: float, span: float) -> list[str]:
        """Add a step of the times to those of the last seconds, and report their sum if it is a loss."""
        at, total = self._moved[-1]
        self._moved.append((at + span, total + step))
        while self._moved[0][0] < at + span - self.looks_back_s:
            self._moved.popleft()
        hidden = total + step - self._moved[0][1]
        if self._seen < 2 * self.settle_s + self.looks_back_s or hidden < max(0.5 * span, 2 * self.period):
            return []
        self._moved.clear()
        self._moved.append((at + span, total + step))
        return [
            f"{round(hidden * self.sfreq)} samples ({hidden * 1000:.0f} ms) fewer than expected came in the "
            f"last {self.looks_back_s:g} s; jitter hides where they were lost, and times since then are too early by "
            "up to this amount."
        ]

    def _skip(self, error: float, span: float) -> float:
        """Return how long a gap is: whole chunks, where that is what jitter lets one see, since drivers lose those."""
        self._recent.clear()
        whole = round(error / span) * span
        return (
            whole if whole > 0 and abs(error - whole) <= max(0.5 * self.period, 8 * self._jitter) else error
        )

    def _approach(self, error: float, span: float, n: int) -> float:
        """Move phase and period a little towards a stamp; returns the step of the phase."""
        self._seen += span
        # A running mean at first, since the first stamp may have been a late one.
        share = min(1.0, span / min(self.settle_s, self._seen + span))
        if self._seen > self.settle_s:
            # Clocks differ by far less than a hundredth.
            period = self.period + share**2 / 4 * error / n
            self.period = min(max(period, 0.99 / self.sfreq), 1.01 / self.sfreq)
        # Bounded, so that a few odd stamps do not make jitter of what is a loss.
        usual = min(abs(error), 3 * max(self._jitter, 0.1 * self.period))
        self._jitter += min(1.0, span / self.settle_s) * (usual - self._jitter)
        return max(share * error, -0.5 * self.period)  # times ascend whatever stamps do

    def _divide(self, stamps: np.ndarray) -> list[tuple[int, int]]:
        """Return first and past-the-last sample of each stretch that was stamped together."""
        breaks = np.flatnonzero(np.abs(np.diff(stamps) - 1 / self.sfreq) > 0.01 / self.sfreq) + 1
        edges = [0, *breaks.tolist(), len(stamps)]
        return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def find_triggers(values: np.ndarray, before: int) -> list[tuple[int, str]]:
    """Return sample and code of each trigger: where the value changes to another one that is not zero.

    Parameters
    ----------
    values : integer array of shape (n_samples,)
    before
        The value before the first sample.

    Examples
    --------
    >>> find_triggers(np.array([0, 3, 3, 0, 4, 5]), 0)
    [(1, '3'), (4, '4'), (5, '5')]
    """
    previous = np.concatenate([[before], values[:-1]])
    return [(int(at), str(int(values[at]))) for at in np.flatnonzero((values != previous) & (values != 0))]


def load_lsl(what: str) -> Any:
    """Import the Lab Streaming Layer of mne-lsl, quietly where nobody has set up its log.

    Parameters
    ----------
    what
        What needs it, for the message where it is not installed.
    """
    lsl = require("mne_lsl.lsl", what)
    places = (Path("lsl_api.cfg"), Path.home() / "lsl_api" / "lsl_api.cfg", Path("/etc/lsl_api/lsl_api.cfg"))
    if not _QUIET and not os.environ.get("LSLAPICFG") and not any(place.exists() for place in places):
        lsl.set_config_content("[log]\nlevel = -3\n")  # lost connections are told here
    _QUIET.append(True)
    return lsl


_QUIET: list[bool] = []
#: Type of a stream without samples, by which a session says that it decodes another one.
_DECODER = "braindecode-vis decoder"


def describe_stream(info: Any) -> str:
    """Return a stream of the Lab Streaming Layer in words."""
    rate = f"{info.sfreq:g} Hz" if info.sfreq else "irregular"
    return (
        f"{info.name}: {info.stype or 'no type'}, {info.n_channels} channels, {rate}, id {info.source_id or 'none'}, "
        f"on {info.hostname}"
    )


class _Inlet:
    """One stream of the Lab Streaming Layer, found by name and found again when it comes back."""

    def __init__(self, lsl: Any, name: str, buffer_s: float, patience: float) -> None:
        self.lsl, self.name, self.buffer_s, self.patience = lsl, name, buffer_s, patience
        self.source_id: str | None = None
        self.info: Any = None
        self.inlet: Any = None

    def find(self, timeout: float) -> list[Any]:
        """Return the streams of this name; ``NAME@ID`` names one of several."""
        name, _, source_id = self.name.rpartition("@")
        if name and self.source_id is None:
            found = self.lsl.resolve_streams(timeout=self.patience, name=name)
            found = [each for each in self._resolve_all(found, name) if each.source_id == source_id]
            if found:
                self.name, self.source_id = name, source_id
                return found
        return self._resolve_all(self.lsl.resolve_streams(timeout=timeout, name=self.name), self.name)

    def _resolve_all(self, found: list[Any], name: str) -> list[Any]:
        """Return all streams of a name where there is one: the first answer ends the search for it."""
        return (
            list(self.lsl.resolve_streams(timeout=self.patience / 2, name=name, minimum=8)) if found else []
        )

    def open(self, info: Any) -> None:
        """Connect to a stream."""
        self.close()
        # Not recovered by liblsl, which takes half a minute to notice that an outlet is gone.
        self.inlet = self.lsl.StreamInlet(
            info, max_buffered=int(np.ceil(self.buffer_s)), recover=False, processing_flags=["clocksync"]
        )
        self.info, self.source_id = info, info.source_id or self.source_id

    def pull(self, timeout: float, most: int) -> tuple[Any, np.ndarray]:
        """Return samples and stamps that are there, waiting for the first; `ConnectionError` if the stream is lost."""
        values: list[Any] = []
        stamps: list[np.ndarray] = []
        try:
            while True:
                some, at = self.inlet.pull_chunk(timeout=0.0, max_samples=most)
                if not len(at) and not stamps and timeout > 0:
                    some, at = self.inlet.pull_chunk(timeout=timeout, max_samples=1)
                    timeout = 0.0
                    if len(at):
                        values.append(some if isinstance(some, list) else some.copy())
                        stamps.append(at.copy())
                        time.sleep(3e-4)  # the others of its chunk are being unpacked
                        continue
                if len(at):
                    values.append(some if isinstance(some, list) else some.copy())
                    stamps.append(at.copy())
                if len(at) < most:
                    break
        except (RuntimeError, TimeoutError, OSError) as error:
            if not stamps:
                raise ConnectionError(str(error)) from error
        if not stamps:
            return [], np.empty(0)
        joined = (
            [row for each in values for row in each]
            if isinstance(values[0], list)
            else np.concatenate(values)
        )
        return joined, np.concatenate(stamps)

    def look_again(self, timeout: float) -> bool:
        """Connect again if there is a new stream of the same name; returns whether there was."""
        for each in self.lsl.resolve_streams(timeout=max(timeout, 0.05), name=self.name):
            same = not self.source_id or each.source_id == self.source_id
            if same and (self.inlet is None or each.uid != self.info.uid):
                self.open(each)
                return True
        return False

    def close(self) -> None:
        """Let go of the stream."""
        if self.inlet is not None:
            self.inlet._del()
            self.inlet = None


#: How MNE's exponents of ten stand in a description, as text.
_EXPONENTS = {"0": "v", "-3": "mv", "-6": "uv", "-9": "nv"}
_SENSORS = ("eeg", "mag", "grad", "meg")


class LslSource:
    """A stream of the Lab Streaming Layer, found by its name.

    Stamps are mapped to the clock of this machine (liblsl's clock synchronisation); what jitters is smoothed by
    `SampleClock`, and liblsl's own smoothing is left out, since it hides lost chunks. An outlet that comes back is
    connected again.

    Parameters
    ----------
    name
        Of the stream; ``NAME@ID`` where several have the same name.
    markers
        Name of a stream of markers, or of a trigger channel of the stream; by default ``NAME-markers`` if it is there.
    timeout
        How long streams are looked for, in s.
    buffer_s
        How many seconds the network keeps for a reader who is busy.
    """

    def __init__(self, name: str, *, markers: str = "", timeout: float = 5.0, buffer_s: float = 60.0) -> None:
        self.name, self.markers, self.timeout, self.buffer_s = name, markers, timeout, buffer_s
        self._patience = min(1.0, timeout)  # streams that are there answer within this
        self._lsl: Any = None
        self._samples: _Inlet | None = None
        self._events: _Inlet | None = None
        self._trigger: int | None = None
        self._code = 0
        self._notes: list[str] = []
        self._held: tuple[Any, np.ndarray] | None = None
        self._announced: Any = None
        self._silent_since = self._returned = 0.0
        self._told_silence = self._told_rate = False
        self._floor = np.inf
        self._first_stamp = 0.0
        self._n_seen = 0

    def connect(self) -> StreamInfo:
        """Find the stream and its markers."""
        self.close()
        self._trigger, self._code, self._n_seen, self._floor = None, 0, 0, np.inf
        self._told_silence = self._told_rate = False
        self._notes.clear()
        self._lsl = lsl = load_lsl("--source lsl")
        self._samples = samples = _Inlet(lsl, self.name, self.buffer_s, self._patience)
        found = self._find(samples, "stream")
        if found.sfreq == 0:
            raise DataError(
                f"the stream {found.name} has no fixed rate, so its samples are not a signal; give a "
                "stream of markers with --markers."
            )
        if found.dtype == "string":
            raise DataError(f"the stream {found.name} holds text, not samples; give a stream of EEG or MEG.")
        events = _Inlet(lsl, self.markers or samples.name + MARKERS_SUFFIX, self.buffer_s, self._patience)
        # The name may be that of a channel, so that it is not looked for long.
        first = events.name.rpartition("@")[0] or events.name
        if lsl.resolve_streams(timeout=self._patience if self.markers else self._patience / 2, name=first):
            events.open(self._find(events, "stream of markers"))
            self._events = events
        samples.open(found)
        full = self._wait_for_answers()
        info = self._describe(full)
        if self._trigger is not None:
            markers = f"trigger channel {self.markers}"
        elif self._events is not None:
            markers = f"stream {events.name}"
        elif self.markers:
            channels = ", ".join(full.get_channel_names() or []) or "without names"
            raise DataError(
                f"there is no stream of markers and no trigger channel {self.markers!r}; available "
                f"streams: {self._list_streams()}; channels of {found.name}: {channels}."
            )
        else:
            markers = ""
        self._sfreq = float(full.sfreq)
        self._most = max(64, round(self._sfreq))
        self.clock = SampleClock(self._sfreq, _read_speed(full))
        self._held = samples.pull(0.5, self._most)
        self.clock.learn(self._held[1])
        self._silent_since = self._returned = time.perf_counter()
        return replace(info, markers=markers)

    def _wait_for_answers(self) -> Any:
        """Return the description of the stream, once the clocks of both senders are known."""
        assert self._samples is not None
        inlets = [each for each in (self._events, self._samples) if each is not None]
        answer = max(self.timeout, 2.0)  # a clock is known after 0.7 s at best
        try:
            for each in inlets:
                each.inlet.pull_chunk(
                    timeout=0.0, max_samples=1
                )  # opens the stream; what comes is kept from now on
            with ThreadPoolExecutor(len(inlets) + 1) as pool:
                shared = pool.submit(self._announce)  # takes as long as the clocks do
                list(pool.map(lambda each: each.inlet.time_correction(timeout=answer), inlets))
                self._notes += shared.result()
            return self._samples.inlet.get_sinfo(timeout=answer)
        except (RuntimeError, TimeoutError, ConnectionError) as error:
            info = self._samples.info
            raise DataError(
                f"the stream {info.name} on {info.hostname} is announced, but does not answer within "
                f"{answer:g} s; check the firewall, or start it again."
            ) from error

    def _announce(self) -> list[str]:
        """Let other sessions know that this stream is decoded, and say whether one does so already."""
        assert self._samples is not None
        info = self._samples.info
        own = f"{info.name} {info.source_id or info.uid} {info.hostname}"
        there = self._lsl.resolve_streams(timeout=self._patience / 2, stype=_DECODER, source_id=own)
        self._announced = self._lsl.StreamOutlet(
            self._lsl.StreamInfo(f"{info.name}-decoder", _DECODER, 1, 0.0, "string", own)
        )
        if not there:
            return []
        return [
            f"another session on {there[0].hostname} also decodes the stream {info.name}: both get all "
            "its samples, and only one should act on its decisions."
        ]

    def _list_streams(self) -> str:
        there = [each for each in self._lsl.resolve_streams(timeout=self._patience) if each.stype != _DECODER]
        return "; ".join(sorted(describe_stream(each) for each in there)) or "none at all"

    def _find(self, inlet: _Inlet, what: str) -> Any:
        found = inlet.find(self.timeout)
        if not found:
            listed = self._list_streams()
            raise DataError(f"there is no {what} {inlet.name!r} on the network; available streams: {listed}.")
        if len(found) > 1:
            ids = ", ".join(sorted(f"{each.name}@{each.source_id} on {each.hostname}" for each in found))
            raise DataError(
                f"{len(found)} streams have the name {inlet.name!r} ({ids}); stop one of them, or add "
                f"its id: {inlet.name}@ID."
            )
        return found[0]

    def _describe(self, full: Any) -> StreamInfo:
        """Choose the channels of brain signals, and find their unit."""
        names = full.get_channel_names() or []
        types = [(each or "").lower() for each in full.get_channel_types() or [""] * full.n_channels]
        units = [(each or "").lower() for each in full.get_channel_units() or [""] * full.n_channels]
        if len(names) != full.n_channels or not all(names):
            names = [str(number) for number in range(1, full.n_channels + 1)]
            self._notes.append(
                f"the stream has no channel names; channels are called 1 to {full.n_channels} (give "
                "their names with --channels)."
            )
        if self.markers in names:
            self._trigger = names.index(self.markers)
        stype = full.stype.lower()
        known = any(kind in _SENSORS for kind in types)
        self._find_device(full, names, types, units)
        of_device = {*self._impedance_rows, self._battery_row}
        self._rows = np.array(
            [
                row for row, kind in enumerate(types)
                if row != self._trigger and row not in of_device
                and (kind in _SENSORS if known else kind not in ("stim", "misc", "eog", "ecg"))
            ],
            dtype=int,
        )  # fmt: skip
        if not len(self._rows):
            raise DataError(
                f"the stream {full.name} has no channel of EEG or MEG, but {', '.join(sorted(set(types)))}."
            )
        if (n := full.n_channels - len(self._rows) - (self._trigger is not None)) > 0:
            self._notes.append(f"{n} channels of other types than EEG and MEG are left out.")
        is_meg = stype == "meg" or any(types[row] in ("mag", "grad", "meg") for row in self._rows)
        scales = [UNITS.get(_EXPONENTS.get(units[row], units[row])) for row in self._rows]
        given = {each for each in scales if each is not None}
        self._scale = None
        if None in scales or not given:
            unit = ""
        elif given in ({("V", 1.0)}, {("V", 1e-6)}, {("T", 1.0)}, {("T/m", 1.0)}):
            ((unit, factor),) = given
            unit = "uV" if factor == 1e-6 else unit
        else:
            # Other units, or several: all are brought to SI.
            unit = next(iter(given))[0] if len(given) == 1 else "T" if is_meg else "V"
            self._scale = np.array([[each[1]] for each in scales if each is not None])
        modality: Modality = "meg" if is_meg else "eeg"
        return StreamInfo(
            full.name, modality, tuple(names[row] for row in self._rows), float(full.sfreq), unit
        )

    def _find_device(self, full: Any, names: list[str], types: list[str], units: list[str]) -> None:
        """Find what the stream says of its amplifier: channels of battery and impedance, and measured impedances."""
        self._impedance_rows: dict[int, tuple[str, float]] = {}
        self._battery_row: int | None = None
        self._battery_in_percent = False
        for row, (name, kind, unit) in enumerate(zip(names, types, units, strict=True)):
            if kind == "battery" or "battery" in name.lower():
                self._battery_row, self._battery_in_percent = row, unit.startswith(("%", "percent"))
            elif kind == "impedance" or "impedance" in name.lower():
                electrode = re.sub(r"[\W_]*impedance[\W_]*", "", name, flags=re.IGNORECASE) or name
                self._impedance_rows[row] = (electrode, 1e-3 if unit.startswith(("ohm", "Ω", "ω")) else 1.0)
        self._measured: dict[str, float] = {}
        channel = full.desc.child("channels").child("channel")
        for name in names:
            text = channel.child_value("impedance")  # in kΩ
            if re.fullmatch(r"\d+(\.\d*)?", text):
                self._measured[name] = float(text)
            channel = channel.next_sibling("channel")

    def _read_device(self, values: np.ndarray) -> DeviceState | None:
        """Return what the newest sample says of the amplifier."""
        impedance = {
            name: float(values[-1, row]) * factor for row, (name, factor) in self._impedance_rows.items()
        }
        battery = None
        if self._battery_row is not None:
            level = float(values[-1, self._battery_row])
            battery = level / 100 if self._battery_in_percent or level > 1 else level
        impedance, self._measured = {**self._measured, **impedance}, {}
        return None if battery is None and not impedance else DeviceState(battery, impedance)

    def read(self, timeout: float) -> Chunk:
        """Return what has come; see `StreamSource`."""
        if self._samples is None:
            raise DataError(f"the stream {self.name} is not connected; call connect first.")
        began = time.perf_counter()
        # What came while the reader was busy waited here; what comes while this call waits did not.
        busy = began - self._returned
        values, stamps = self._pull(timeout)
        now = time.perf_counter()
        empty = np.empty((len(self._rows), 0))
        notes = list(self._notes)
        self._notes.clear()
        if not len(stamps):
            self._watch_silence(now, timeout - (now - began), notes)
            chunk = Chunk(empty, np.empty(0), self._pull_markers(notes), tuple(notes))
            self._returned = time.perf_counter()
            return chunk
        if self._told_silence:
            notes.append(f"samples come again after {now - self._silent_since:.1f} s.")
            self._told_silence = False
        self._silent_since = now
        times, found = self.clock.follow(stamps, self._lsl.local_clock())
        if found and busy > self.buffer_s:
            notes.append(
                f"nothing was read for {busy:.0f} s, but the buffer holds {self.buffer_s:g} s: samples were lost."
            )
        notes += found
        self._check_rate(stamps, notes)
        markers = self._pull_markers(notes)
        if self._trigger is not None:
            codes = values[:, self._trigger].astype(np.int64)
            markers = tuple(Marker(float(times[at]), code) for at, code in find_triggers(codes, self._code))
            self._code = int(codes[-1])
        # (n_samples, n_channels) -> (n_channels, n_samples)
        samples = np.ascontiguousarray(values[:, self._rows].T)
        if self._scale is not None:
            samples = samples * self._scale
        age = self._lsl.local_clock() - float(stamps[-1])
        self._floor = min(self._floor + 1e-5, age)
        arrived = now - min(busy, max(0.0, age - self._floor)) if busy > 0.002 else now
        self._returned = time.perf_counter()
        return Chunk(samples, times, markers, tuple(notes), arrived, device=self._read_device(values))

    def close(self) -> None:
        """Let go of both streams."""
        for inlet in (self._samples, self._events):
            if inlet is not None:
                inlet.close()
        self._samples = self._events = self._held = self._announced = None

    def _pull(self, timeout: float) -> tuple[Any, np.ndarray]:
        assert self._samples is not None
        if self._held is not None:
            held, self._held = self._held, None
            if len(held[1]):
                return held
        if self._samples.inlet is None:
            return [], np.empty(0)
        try:
            return self._samples.pull(timeout, self._most)
        except ConnectionError:
            self._samples.close()
            return [], np.empty(0)

    def _watch_silence(self, now: float, left: float, notes: list[str]) -> None:
        """Look for the stream that is gone, and say so once."""
        assert self._samples is not None
        if now - self._silent_since < 1.0 and self._samples.inlet is not None:
            return
        if not self._told_silence:
            notes.append("no samples arrive; looking for the stream.")
            self._told_silence = True
        if self._samples.look_again(left):
            notes.append("the stream is available and connected again.")
            if self._events is not None:
                self._events.look_again(0.1)

    def _pull_markers(self, notes: list[str]) -> tuple[Marker, ...]:
        if self._events is None:
            return ()
        if self._events.inlet is None and not self._events.look_again(0.05):
            return ()
        try:
            values, stamps = self._events.pull(0.0, 64)
        except ConnectionError:
            self._events.close()
            notes.append("the stream of markers has ended; it is connected again when it comes back.")
            return ()
        texts = [_write_marker(row[0]) for row in values]
        return tuple(
            Marker(float(at) + self.clock.offset, text)
            for at, text in zip(stamps, texts, strict=True)
            if text
        )

    def _check_rate(self, stamps: np.ndarray, notes: list[str]) -> None:
        """Say once if samples come at another rate than the stream says."""
        if self._told_rate:
            return
        if not self._n_seen:
            self._first_stamp = float(stamps[0])
        self._n_seen += len(stamps)
        span = float(stamps[-1]) - self._first_stamp
        if span > 10:
            rate = (self._n_seen - 1) / span
            self._told_rate = True
            if abs(rate / self._sfreq - 1) > 0.03:
                notes.append(
                    f"{rate:.1f} samples per second arrived in the first {span:.0f} s, but the stream states "
                    f"{self._sfreq:g} Hz."
                )


def _read_speed(full: Any) -> float:
    """Return how fast the stamps of a replay advance, which it writes into its description."""
    text = full.desc.child_value("speed")
    return float(text) if re.fullmatch(r"\d+(\.\d*)?", text) and float(text) > 0 else 1.0


def _write_marker(value: Any) -> str:
    """Return a marker as text: 3 and 3.0 are the code 3."""
    if isinstance(value, str):
        return value.strip()
    return str(int(value)) if float(value).is_integer() else str(float(value))


# Commands and answers of the protocol, version 1.
_GET_HDR, _GET_DAT, _GET_EVT, _WAIT_DAT = 0x201, 0x202, 0x203, 0x402
_GET_OK, _WAIT_OK = 0x204, 0x404
_CHANNEL_NAMES, _RESOLUTIONS = 1, 3  # chunks of the header
# Number of a type -> its name in NumPy; 0 is a character.
_TYPES = ("S1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")
_MOST_BYTES = 1 << 30
_CTF_OR_NEUROMAG = re.compile(r"MEG ?\d+|M[LRZ][CFOPT]\d\d.*", re.IGNORECASE)


class _RefusedError(Exception):
    """The buffer answered that it does not have what was asked for."""


class FieldTripSource:
    """A FieldTrip buffer: samples and events in a ring buffer behind a TCP port.

    Times are sample numbers over the rate, which is the clock of the buffer. Reading begins with the newest sample.

    Parameters
    ----------
    name
        ``host:port``; the port is 1972 by default.
    markers
        Type of the events that are markers, or a trigger channel; by default all events are.
    modality
        ``eeg`` or ``meg``; by default what the names of channels look like.
    timeout
        How long a buffer may take to answer, and to have a header, in s.
    """

    def __init__(
        self, name: str, *, markers: str = "", modality: Modality | None = None, timeout: float = 5.0
    ) -> None:
        host, _, port = name.rpartition(":") if ":" in name else (name, ":", "1972")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(
                f"the address of a FieldTrip buffer is host:port, for example localhost:1972, not {name!r}."
            )
        self.name, self.host, self.port = name, host, int(port)
        self.markers, self.modality, self.timeout = markers, modality, timeout
        self._socket: socket.socket | None = None
        self._order = "<" if np.little_endian else ">"
        self._trigger: int | None = None
        self._code = 0
        self._read = self._heard = 0  # samples and events that were taken
        self._base = 0  # samples of a buffer that was emptied since
        self._gone_since = 0.0
        self._gone_sample = 0

    def connect(self) -> StreamInfo:
        """Connect, and wait for the header."""
        self.close()
        try:
            header, chunks = self._introduce()
        except BaseException:
            self.close()
            raise
        n_channels, self._read, self._heard, self._sfreq, _ = header
        self._trigger, self._code, self._base = None, 0, 0
        names = [str(number) for number in range(1, n_channels + 1)]
        if _CHANNEL_NAMES in chunks:
            given = chunks[_CHANNEL_NAMES].decode("utf-8", "replace").split("\0")[:n_channels]
            names = given if len(given) == n_channels and all(given) else names
        if self.markers in names:
            self._trigger = names.index(self.markers)
        self._rows = np.array([row for row in range(n_channels) if row != self._trigger])
        self._n_channels = n_channels
        chosen = tuple(names[row] for row in self._rows)
        n_meg = sum(bool(_CTF_OR_NEUROMAG.fullmatch(each)) for each in chosen)
        modality: Modality = self.modality or ("meg" if 2 * n_meg > len(chosen) else "eeg")
        self._scale, unit = None, ""
        if len(chunks.get(_RESOLUTIONS, b"")) == 8 * n_channels:
            self._scale = np.frombuffer(chunks[_RESOLUTIONS], f"{self._order}f8")[self._rows][:, None]
            unit = "uV" if modality == "eeg" else ""  # the protocol names microvolt, and no unit for fields
        where = f"trigger channel {self.markers}" if self._trigger is not None else "events of the buffer"
        if self.markers and self._trigger is None:
            where += f" of the type {self.markers}"
        return StreamInfo(f"{self.host}:{self.port}", modality, chosen, float(self._sfreq), unit, where)

    def read(self, timeout: float) -> Chunk:
        """Return what the buffer has beyond the last call."""
        empty, notes = Chunk(np.empty((len(self._rows), 0)), np.empty(0)), []
        try:
            if self._socket is None:
                return self._come_back(timeout)
            n_samples, n_events = self._wait(timeout)
            if n_samples < self._read or n_events < self._heard:
                notes.append("the buffer was emptied; times continue.")
                self._base, self._read, self._heard = self._base + self._read, 0, 0
            markers = self._get_markers(n_events)
            if n_samples == self._read:
                return Chunk(empty.samples, empty.times, markers, tuple(notes))
            values, first = self._get_samples(n_samples, notes)
        except _RefusedError:
            return Chunk(empty.samples, empty.times, (), (*notes, "the buffer no longer has a header."))
        except OSError as error:
            self.close()
            self._gone_since = time.perf_counter()
            note = f"the connection to the buffer ended ({error.strerror or error}); trying again."
            return Chunk(empty.samples, empty.times, (), (*notes, note))
        times = (self._base + first + np.arange(len(values))) / self._sfreq
        self._read = first + len(values)
        if self._trigger is not None:
            codes = values[:, self._trigger].astype(np.int64)
            markers = tuple(Marker(float(times[at]), code) for at, code in find_triggers(codes, self._code))
            self._code = int(codes[-1])
        # (n_samples, n_channels) -> (n_channels, n_samples)
        samples = np.ascontiguousarray(values[:, self._rows].T)
        if self._scale is not None:
            samples = samples * self._scale
        return Chunk(samples, times, markers, tuple(notes), time.perf_counter())

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _introduce(self) -> tuple[tuple[int, int, int, float, int], dict[int, bytes]]:
        """Connect, and return the header once there is one."""
        where, end = f"{self.host}:{self.port}", time.perf_counter() + self.timeout
        try:
            self._dial()
        except OSError as error:
            raise DataError(
                f"no FieldTrip buffer answers on {where} ({error.strerror or error}); start it, or give "
                "another host:port with --stream."
            ) from error
        while True:
            try:
                header, chunks = self._get_header()
            except _RefusedError:
                if time.perf_counter() > end:
                    raise DataError(
                        f"the FieldTrip buffer on {where} has no header after {self.timeout:g} s: nothing writes "
                        "into it; start the acquisition."
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                raise DataError(
                    f"the server on {where} is not a FieldTrip buffer ({error}); give another host:port."
                ) from error
            else:
                n_channels, _, _, sfreq, kind = header
                if not n_channels or not sfreq > 0 or not 0 < kind < len(_TYPES):
                    raise DataError(
                        f"the FieldTrip buffer on {where} says {n_channels} channels at {sfreq:g} Hz of "
                        f"type {kind}, which is not a signal."
                    )
                return header, chunks

    def _dial(self) -> None:
        self._socket = socket.create_connection((self.host, self.port), timeout=self.timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _come_back(self, timeout: float) -> Chunk:
        """Connect again to a buffer that was gone, or wait."""
        empty = np.empty((len(self._rows), 0))
        try:
            self._dial()
            header, _ = self._get_header()
        except (OSError, _RefusedError):
            self.close()
            time.sleep(min(timeout, 0.2))
            return Chunk(empty, np.empty(0))
        gone = time.perf_counter() - self._gone_since
        if header[0] != self._n_channels or header[3] != self._sfreq:
            self.close()
            raise DataError(
                f"the FieldTrip buffer on {self.host}:{self.port} came back with {header[0]} channels at "
                f"{header[3]:g} Hz, but before it had {self._n_channels} at {self._sfreq:g} Hz; start "
                "live decoding again."
            )
        if header[1] < self._read:
            # Another buffer counts from 0: its samples come as much later as it was away.
            self._base += self._read + round(gone * self._sfreq)
            self._read, self._heard = 0, 0
        return Chunk(empty, np.empty(0), (), (f"the buffer is available again after {gone:.1f} s.",))

    def _ask(self, command: int, content: bytes, expected: int, *, wait: float = 0.0) -> bytes:
        """Send a request and return the rest of the answer."""
        assert self._socket is not None
        self._socket.settimeout(self.timeout + wait)
        self._socket.sendall(struct.pack(f"{self._order}HHI", 1, command, len(content)) + content)
        version, answer, size = struct.unpack(f"{self._order}HHI", self._receive(8))
        if version != 1 or size > _MOST_BYTES:
            raise OSError("an answer in another format")
        rest = self._receive(size)
        if answer != expected:
            raise _RefusedError
        return rest

    def _receive(self, size: int) -> bytes:
        assert self._socket is not None
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise OSError("the other side closed it")
            parts += part
        return bytes(parts)

    def _get_header(self) -> tuple[tuple[int, int, int, float, int], dict[int, bytes]]:
        """Return channels, samples, events, rate and type, and the chunks that follow by their type."""
        content = self._ask(_GET_HDR, b"", _GET_OK)
        if len(content) < 24:
            raise OSError("a header that is cut short")
        *fixed, _ = struct.unpack_from(f"{self._order}IIIfII", content)
        chunks, at = {}, 24
        while at + 8 <= len(content):
            kind, size = struct.unpack_from(f"{self._order}II", content, at)
            chunks[kind] = content[at + 8 : at + 8 + size]
            at += 8 + size
        return (fixed[0], fixed[1], fixed[2], round(fixed[3], 4), fixed[4]), chunks

    def _wait(self, timeout: float) -> tuple[int, int]:
        """Return how many samples and events there are, once there are more than were read or time is up."""
        asked = struct.pack(f"{self._order}III", self._read, self._heard, round(timeout * 1000))
        answer = self._ask(_WAIT_DAT, asked, _WAIT_OK, wait=timeout)
        n_samples, n_events = struct.unpack(f"{self._order}II", answer)
        return n_samples, n_events

    def _get_samples(self, stop: int, notes: list[str]) -> tuple[np.ndarray, int]:
        """Return samples up to `stop`, (n_samples, n_channels), and the number of the first one."""
        start = self._read
        while True:
            try:
                content = self._ask(_GET_DAT, struct.pack(f"{self._order}II", start, stop - 1), _GET_OK)
                break
            except _RefusedError:
                # The oldest have fallen out of the ring; nothing says which, so that ever newer ones are asked for.
                if start >= stop - 1:
                    raise
                start += max(1, (stop - start) // 2)
        if start > self._read:
            notes.append(
                f"the buffer overflowed: {start - self._read} samples "
                f"({(start - self._read) / self._sfreq * 1000:.0f} ms) were lost before they were read."
            )
        n_channels, n_samples, kind, _ = struct.unpack_from(f"{self._order}IIII", content)
        if n_channels != self._n_channels or not 0 < kind < len(_TYPES):
            raise OSError(f"samples of {n_channels} channels, but the header states {self._n_channels}")
        values = np.frombuffer(content, f"{self._order}{_TYPES[kind]}", n_channels * n_samples, offset=16)
        return values.reshape(n_samples, n_channels).astype(np.float64), start

    def _get_markers(self, n_events: int) -> tuple[Marker, ...]:
        if n_events == self._heard:
            return ()
        asked = struct.pack(f"{self._order}II", self._heard, n_events - 1)
        self._heard = n_events
        if self._trigger is not None:
            return ()
        try:
            content = self._ask(_GET_EVT, asked, _GET_OK)
        except _RefusedError:
            content = self._ask(
                _GET_EVT, struct.pack(f"{self._order}II", n_events - 1, n_events - 1), _GET_OK
            )
        markers, at = [], 0
        while at + 32 <= len(content):
            kind, n_kind, type_, n_value, sample, _, _, size = struct.unpack_from(
                f"{self._order}IIIIiiiI", content, at
            )
            at += 32
            name = self._read_value(content, at, kind, n_kind)
            width = n_kind * np.dtype(_TYPES[kind]).itemsize
            value = self._read_value(content, at + width, type_, n_value)
            at += size
            if not self.markers or name == self.markers:
                markers.append(Marker((self._base + sample) / self._sfreq, value or name))
        return tuple(markers)

    def _read_value(self, content: bytes, at: int, kind: int, n: int) -> str:
        if kind >= len(_TYPES):
            raise OSError("an event of an unknown type")
        if kind == 0:
            return content[at : at + n].decode("utf-8", "replace")
        values = np.frombuffer(content, f"{self._order}{_TYPES[kind]}", n, offset=at)
        return " ".join(_write_marker(value) for value in values.tolist())
