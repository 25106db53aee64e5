"""The content of the live page, as plain values: traces, quality of channels, decisions, score, latencies, messages.

Owns how samples become traces and decisions become rows of JSON. All of it is bounded, however long a session lasts.
Knows nothing of browsers and servers.
"""

from __future__ import annotations

import base64
import re
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from braindecode_vis.parts.live.stream_roles import Chunk, Decision, StreamInfo, make_plain
from braindecode_vis.scoring.uncertainty import bootstrap_interval, wilson_interval

N_HISTORY = 200  # decisions that a browser gets which comes late
N_MESSAGES = 60
N_LATENCIES = 10_000
N_SCORED = 10_000  # decisions that the interval of the score is made of
TRACE_SECONDS = 8.0
TRACE_RATE = 60.0  # columns of minimum and maximum a second: enough for the eye
QUALITY_SECONDS = 2.0
LINK_SECONDS = 60.0  # over which recent losses are counted
EPOCH_POINTS = 120
VOLUME_SFREQ = 20.0  # slower streams are volumes: shown longer, and without a judgement of channels
MAX_IMAGES = 40  # reconstructions that are kept

#: Unit of the stream -> unit that is shown, and the factor between them.
UNITS = {"V": ("µV", 1e6), "uV": ("µV", 1.0), "T": ("fT", 1e15), "T/m": ("fT/cm", 1e13)}
LATENCY_EDGES = np.array([0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 50, 70, 100, 150, 250, 500, 1000, 2000, np.inf])


class Traces:
    """The last seconds of a stream as columns of minimum and maximum, on a fixed grid of its clock.

    Parameters
    ----------
    n_rows
        Traces that are drawn.
    sfreq
        Samples a second.
    seconds
        How much is kept.
    """

    def __init__(self, n_rows: int, sfreq: float, seconds: float = TRACE_SECONDS) -> None:
        self.rate = min(TRACE_RATE, sfreq)
        self.n_columns = max(2, round(seconds * self.rate))
        self.columns = np.full((n_rows, 2, self.n_columns), np.nan, np.float32)
        self.origin: float | None = None
        self.next = 0  # number of the first column that has not begun

    def add(self, samples: np.ndarray, times: np.ndarray) -> None:
        """Take in samples of shape (n_rows, n_samples); columns that no sample fell into stay missing."""
        if self.origin is None:
            self.origin = float(times[0]) - self.next / self.rate
        # half a column early, so that a sample on the edge of two columns falls into the same one in spite of jitter
        places = np.floor((times - self.origin) * self.rate + 0.5).astype(np.int64)
        if places[0] < self.next - 1 or places[0] >= self.next + self.n_columns:  # the clock jumped
            self.origin = float(times[0]) - self.next / self.rate
            places = np.floor((times - self.origin) * self.rate + 0.5).astype(np.int64)
        last = max(int(places[-1]) + 1, self.next)
        if places[-1] - places[0] >= self.n_columns:
            keep = places > places[-1] - self.n_columns
            samples, places = samples[:, keep], places[keep]
        fresh = np.arange(max(self.next, last - self.n_columns), last) % self.n_columns
        self.columns[:, :, fresh] = np.nan
        starts = np.flatnonzero(np.diff(places, prepend=places[0] - 1))
        at = places[starts] % self.n_columns
        low, high = np.fmin.reduceat(samples, starts, axis=1), np.fmax.reduceat(samples, starts, axis=1)
        self.columns[:, 0, at] = np.fmin(self.columns[:, 0, at], low)
        self.columns[:, 1, at] = np.fmax(self.columns[:, 1, at], high)
        self.next = last

    def view(self, since: int) -> dict[str, Any]:
        """Return the columns from `since` on, as 16-bit steps around a centre of each row; the lowest is missing."""
        first = max(since - 1, self.next - self.n_columns, 0)  # the last column may have grown
        values = self.columns[:, :, np.arange(first, self.next) % self.n_columns]
        known = np.isfinite(values)
        centre = np.zeros(len(values), np.float32)
        for row in np.flatnonzero(known.any(axis=(1, 2))):
            centre[row] = np.median(values[row][known[row]])
        apart = np.where(known, values - centre[:, None, None], 0)
        step = max(float(np.abs(apart).max(initial=0.0)) / 32_000, 1e-12)
        whole = np.where(known, np.rint(apart / step), -32_768).astype("<i2")
        return {
            "first": first, "next": self.next, "origin": self.origin, "step": step, "centre": centre.tolist(),
            "data": base64.b64encode(whole.tobytes()).decode(),
        }  # fmt: skip


def judge_channels(samples: np.ndarray, *, microvolts: bool) -> list[str]:
    """Say of each channel whether it is ``good``, ``missing``, ``flat``, ``railed`` or ``noisy``.

    Railed is a channel of which a tenth of the samples is at its extreme; noisy one whose steps from sample to
    sample are five times those of the median channel, or whose standard deviation without its slope is above 150 µV.

    Parameters
    ----------
    samples : array of shape (n_channels, n_samples)
        Of about two seconds.
    microvolts
        Whether the unit is the microvolt, so that bounds of EEG hold.

    Examples
    --------
    >>> noise = np.random.default_rng(0).normal(size=(4, 500)) * 10
    >>> noise[1], noise[2] = 0, np.clip(noise[2], -5, 5)
    >>> judge_channels(noise, microvolts=True)
    ['good', 'flat', 'railed', 'good']
    """
    known = np.isfinite(samples)
    share = known.mean(axis=1)
    filled = np.where(known, samples, 0.0)
    low = np.where(known, samples, np.inf).min(axis=1)
    high = np.where(known, samples, -np.inf).max(axis=1)
    extent = np.where(share > 0, high - low, 0.0)
    usual = float(np.median(extent[share > 0])) if (share > 0).any() else 0.0
    at_edge = (((samples == low[:, None]) | (samples == high[:, None])) & known).mean(axis=1)
    spread = measure_spread(filled)
    steps = np.diff(filled, axis=1).std(axis=1) if samples.shape[1] > 2 else np.zeros(len(samples))
    usual_step = float(np.median(steps[extent > 0])) if (extent > 0).any() else 0.0
    words = []
    for row in range(len(samples)):
        if share[row] < 0.5:
            words.append("missing")
        elif extent[row] <= (0.5 if microvolts else 1e-3 * usual):
            words.append("flat")
        elif at_edge[row] > 0.1:
            words.append("railed")
        elif (len(samples) > 2 and steps[row] > 5 * usual_step) or (microvolts and spread[row] > 150):
            words.append("noisy")
        else:
            words.append("good")
    return words


def measure_spread(samples: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each channel without its slope, of samples of shape (n_channels, n_samples).

    Examples
    --------
    >>> measure_spread(np.array([[0.0, 1, 2, 3], [1, -1, -1, 1]])).round(3).tolist()
    [0.0, 1.0]
    """
    slope = np.linspace(-1, 1, samples.shape[1])
    level = samples - samples.mean(axis=1, keepdims=True)
    found: np.ndarray = (level - np.outer(level @ slope / (slope @ slope), slope)).std(axis=1)
    return found


def place_on_head(
    names: Sequence[str], positions: Mapping[str, Sequence[float]] | None = None
) -> list[list[float] | None]:
    """Return where each sensor lies on a disc seen from above: x to the right, y to the nose, 1 at the ears.

    Parameters
    ----------
    names
        Of the sensors.
    positions
        Of each in m; by default those of the 10-5 system.
    """
    from braindecode_vis.datasets.sources.meeg_source import make_template_montage

    if positions is None:
        positions = make_template_montage().get_positions()["ch_pos"]
    known = {name.upper(): np.asarray(at, float) for name, at in positions.items()}
    places: list[list[float] | None] = []
    for name in names:
        at = known.get(name.upper())
        if at is None or not np.isfinite(at).all() or not at.any():
            places.append(None)
            continue
        x, y, z = at - np.array([0.0, -0.01, 0.035])  # the middle of the head of the template, in m
        angle = np.arccos(z / np.linalg.norm((x, y, z)))
        flat = angle / (np.pi / 2) / max(np.hypot(x, y), 1e-9)
        places.append([round(float(x * flat), 3), round(float(y * flat), 3)])
    return places


def group_channels(names: Sequence[str], regions: Mapping[str, Sequence[Any]] | None) -> dict[str, list[int]]:
    """Return the rows of each region: those that are given by name or number, else by the names of sensors."""
    from braindecode_vis.report.sensor_groups import REGIONS, find_region

    place = {name: n for n, name in enumerate(names)}
    if regions:
        rows = {
            region: [n if isinstance(n, int | np.integer) else place.get(str(n), -1) for n in members]
            for region, members in regions.items()
        }
        return {region: [int(n) for n in members if n >= 0] for region, members in rows.items()}
    groups: dict[str, list[int]] = {region: [] for region in REGIONS}
    for name, n in place.items():
        if found := find_region(name):
            groups[found].append(n)
    return {region: members for region, members in groups.items() if members}


class PageState:
    """All that a browser needs to show a session, from what a listener hears; used by one thread."""

    def __init__(self) -> None:
        self.stream: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.summary: dict[str, Any] | None = None
        self.decisions: dict[int, dict[str, Any]] = {}  # by number, the latest N_HISTORY
        self.messages: deque[dict[str, Any]] = deque(maxlen=N_MESSAGES)
        self.images: dict[int, np.ndarray] = {}
        self.traces: Traces | None = None
        self.quality: list[str] = []
        self.amplitude: list[
            float | None
        ] = []  # of each channel over the last seconds, in the unit that is shown
        self.device: dict[str, Any] = {}  # what the amplifier reports: battery, and impedance of each channel
        self.heard = 0.0  # when samples came last, of time.perf_counter
        self._work: tuple[str, float, int, int | None] | None = None
        self.recording: dict[str, Any] | None = None
        self._newest: float | None = None  # time of the last sample, on the clock of the stream
        self._losses: deque[tuple[float, int]] = deque(
            maxlen=10_000
        )  # time and number of samples that are missing
        self._n_samples = self._n_missing = 0
        self._recent: deque[np.ndarray] = deque()
        self._waits: deque[float] = deque(maxlen=N_LATENCIES)
        self._hits: deque[tuple[str, bool]] = deque(maxlen=N_SCORED)
        self._reasons: Counter[str] = Counter()
        self._example: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._groups: dict[str, list[int]] = {}
        self._rows: list[list[int]] | None = None  # of voxels: the regions whose means are drawn
        self._scale = 1.0

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Take in what is known of a stream once it is connected."""
        unit, self._scale = UNITS.get(info.unit, (info.unit, 1.0))
        self._groups = group_channels(facts.get("ch_names", info.ch_names), facts.get("regions"))
        names, self._rows = list(info.ch_names), None
        if not names:
            names, self._rows = list(self._groups) or ["mean of all voxels"], list(self._groups.values())
        slow = info.sfreq < VOLUME_SFREQ
        placed: dict[str, Any] | None = None
        if info.modality == "meg" and facts.get("ch_pos"):
            placed = dict(zip(facts["ch_names"], facts["ch_pos"], strict=True))
        self.traces = Traces(len(names), info.sfreq, 200 / info.sfreq if slow else TRACE_SECONDS)
        self.quality, self.amplitude, self.device, self.summary = [], [], {}, None
        self._newest, self._n_samples, self._n_missing = None, 0, 0
        self._losses.clear()
        self._recent.clear()
        self.stream = {
            "name": info.name, "modality": info.modality, "channels": names, "sfreq": info.sfreq, "unit": unit,
            "markers": info.markers, "places": place_on_head(names, placed) if info.modality == "eeg" or placed else [],
            "rate": self.traces.rate, "columns": self.traces.n_columns, "judged": not slow,
        }  # fmt: skip
        self.facts = make_plain(
            {name: value for name, value in facts.items() if name not in ("regions", "ch_names", "ch_pos")}
        )
        self._example = {}
        return {"type": "begin", "stream": self.stream, "facts": self.facts}

    def hear(self, chunk: Chunk, arrived: float) -> None:
        """Take in samples."""
        if self.traces is None or not len(chunk.times):
            return
        self.heard = arrived
        self._watch_link(chunk)
        samples = np.asarray(chunk.samples)
        if self._rows is not None:
            rows = [samples[members].mean(axis=0) for members in self._rows if members]
            samples = np.stack(rows) if rows else samples.mean(axis=0, keepdims=True)
        samples = samples * self._scale
        self.traces.add(samples, np.asarray(chunk.times))
        if self.stream["judged"]:
            self._recent.append(samples)
            wanted = QUALITY_SECONDS * self.stream["sfreq"]
            while sum(part.shape[1] for part in self._recent) - self._recent[0].shape[1] >= wanted:
                self._recent.popleft()

    def _watch_link(self, chunk: Chunk) -> None:
        """Count the samples that are missing between the times of others, and keep what the amplifier reports."""
        times, sfreq = np.asarray(chunk.times, float), self.stream["sfreq"]
        steps = np.diff(times, prepend=times[0] - 1 / sfreq if self._newest is None else self._newest)
        missing = int(np.maximum(np.rint(steps * sfreq) - 1, 0).sum())
        self._newest, self._n_samples = float(times[-1]), self._n_samples + len(times)
        if missing:
            self._n_missing += missing
            self._losses.append((self._newest, missing))
        if chunk.device is not None:
            if chunk.device.battery is not None and np.isfinite(chunk.device.battery):
                self.device["battery"] = round(min(max(chunk.device.battery, 0.0), 1.0), 3)
            if known := chunk.device.impedance:
                before = self.device.get("impedance") or [None] * len(self.stream["channels"])
                names = zip(self.stream["channels"], before, strict=True)
                self.device["impedance"] = [make_plain(known.get(name, value)) for name, value in names]

    def view_link(self) -> dict[str, Any]:
        """Return how many samples did not arrive, in all and in the last minute, and what the amplifier reports."""
        since = (self._newest or 0.0) - LINK_SECONDS
        recent = sum(n for at, n in self._losses if at >= since)
        return {"samples": self._n_samples, "missing": self._n_missing, "recent": recent, **self.device}

    def work(self, what: str, began: float, done: int, total: int | None) -> dict[str, Any]:
        """Take in what takes long just now, and since when on `time.perf_counter`; an empty text if nothing does."""
        self._work = (what, began, done, total) if what else None
        return {"type": "work", "work": self._view_work()}

    def _view_work(self) -> dict[str, Any] | None:
        if self._work is None:
            return None
        what, began, done, total = self._work
        return {"what": what, "seconds": round(time.perf_counter() - began, 1), "done": done, "total": total}

    def record(self, recording: Mapping[str, Any]) -> dict[str, Any]:
        """Take in whether the session is recorded, and where."""
        self.recording = dict(recording)
        return {"type": "recording", "recording": self.recording}

    def judge(self) -> list[str]:
        """Judge the channels anew by the last two seconds; empty until there are some."""
        if sum(part.shape[1] for part in self._recent) >= 0.5 * QUALITY_SECONDS * self.stream.get(
            "sfreq", np.inf
        ):
            samples = np.concatenate(list(self._recent), axis=1)
            self.quality = judge_channels(samples, microvolts=self.stream["unit"] == "µV")
            spread = measure_spread(np.where(np.isfinite(samples), samples, 0.0))
            self.amplitude = [make_plain(float(f"{value:.3g}")) for value in spread]
        return self.quality

    def decide(self, decision: Decision) -> dict[str, Any]:
        """Take in a decision; a second one of the same number only brings the image that was reconstructed."""
        known = self.decisions.get(decision.number)
        if decision.image is not None:
            self.images[decision.number] = decision.image
            while len(self.images) > MAX_IMAGES:
                del self.images[next(iter(self.images))]
        if known is not None:
            known["image"] = known["image"] or decision.image is not None
            return {"type": "decision", "decision": known, "again": True}
        right = None if decision.rank is None else decision.rank == 1
        row: dict[str, Any] = {
            "number": decision.number, "onset": make_plain(float(decision.onset)), "marker": decision.marker,
            "shown": decision.shown, "lost": decision.lost, "rank": decision.rank, "right": right,
            "top": _pair(decision.top, decision.probability),
            "posterior": _pair(decision.posterior_top, decision.posterior),
            "n_evidence": decision.n_evidence, "image": decision.image is not None,
            "latency": {name: make_plain(round(float(value), 3)) for name, value in decision.latency.items()},
            "epoch": self._average(decision.epoch), "notes": list(decision.notes),
        }  # fmt: skip
        for earlier in list(self.decisions.values())[-1:]:
            earlier["epoch"] = {}  # only the last one is drawn
        self.decisions[decision.number] = row
        if len(self.decisions) > N_HISTORY:
            del self.decisions[next(iter(self.decisions))]
        if decision.lost:
            self._counts["lost"] += 1
            kind = re.sub(r"\d+(\.\d+)?", "…", decision.lost)
            if kind in self._reasons or len(self._reasons) < 20:
                self._reasons[kind] += 1
                self._example[kind] = decision.lost
            else:
                self._reasons["for further reasons"] += 1
        else:
            self._counts["decided"] += 1
            if np.isfinite(decision.latency.get("wait", np.nan)):
                self._waits.append(float(decision.latency["wait"]))
            if decision.rank is not None:
                self._counts["scored"] += 1
                self._hits.append((str(decision.shown), decision.rank == 1))
                self._counts["top1"] += decision.rank == 1
                self._counts["top5"] += decision.rank <= 5
                if decision.posterior_top:
                    self._counts["pooled"] += 1
                    self._counts["pooled1"] += decision.posterior_top[0] == decision.shown
        return {"type": "decision", "decision": row}

    def _average(self, epoch: np.ndarray | None) -> dict[str, list[float]]:
        """Return the mean of each region over time, with at most `EPOCH_POINTS` points."""
        if epoch is None or epoch.ndim != 2 or not epoch.size:
            return {}
        points = min(EPOCH_POINTS, epoch.shape[1])
        starts = np.linspace(0, epoch.shape[1], points, endpoint=False).astype(int)
        widths = np.diff(starts, append=epoch.shape[1])
        fits = all(max(members) < len(epoch) for members in self._groups.values() if members)
        groups = self._groups if self._groups and fits else {"all": list(range(len(epoch)))}
        drawn = {}
        for region, members in groups.items():
            if members:
                mean = np.add.reduceat(epoch[members].mean(axis=0), starts) / widths
                drawn[region] = np.nan_to_num(mean, posinf=0, neginf=0).astype(float).round(4).tolist()
        return drawn

    def tell(self, sentence: str, level: str, at: float) -> dict[str, Any]:
        """Take in a message; `at` is in s since 1970."""
        message = {"sentence": sentence, "level": level, "at": at}
        self.messages.append(message)
        return {"type": "message", "message": message}

    def end(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Take in that the session is over."""
        self.summary = make_plain(summary)
        return {"type": "end", "summary": self.summary}

    def count(self) -> dict[str, Any]:
        """Return the score so far, the latencies, and what was lost for which reason; takes a few ms."""
        counts = {
            name: self._counts[name]
            for name in ("decided", "lost", "scored", "top1", "top5", "pooled", "pooled1")
        }
        size = self.facts.get("gallery_size")
        chance = 1 / size if isinstance(size, int) and size > 0 else None
        score = {**counts, "chance": chance, "interval": self._bound_score()}
        waits = np.asarray(self._waits)
        latency = {
            "edges": LATENCY_EDGES[:-1].tolist(), "counts": np.histogram(waits, LATENCY_EDGES)[0].tolist(),
            "p50": float(np.percentile(waits, 50)) if len(waits) else None,
            "p99": float(np.percentile(waits, 99)) if len(waits) else None, "n": len(waits),
        }  # fmt: skip
        lost = [{"reason": self._example.get(kind, kind), "n": n} for kind, n in self._reasons.most_common()]
        return {"type": "count", "score": score, "latency": latency, "lost": lost}

    def _bound_score(self) -> list[float] | None:
        """Return the wider of Wilson's interval and a bootstrap over pictures.

        The first is right for few decisions, the second for few pictures that are shown often. None for one picture.
        """
        ids, hits = [name for name, _ in self._hits], np.array([hit for _, hit in self._hits], float)
        if len(set(ids)) < 2:
            return None
        drawn, counted = (
            bootstrap_interval(hits, clusters=ids, n_boot=1000),
            wilson_interval(int(hits.sum()), len(hits)),
        )
        return [min(drawn.low, counted.low), max(drawn.high, counted.high)]

    def view(self) -> dict[str, Any]:
        """Return all of it, for a browser that comes late or again."""
        return {
            **self.count(), "type": "state", "stream": self.stream, "facts": self.facts,
            "decisions": list(self.decisions.values()), "messages": list(self.messages), "summary": self.summary,
            "work": self._view_work(), "recording": self.recording,
        }  # fmt: skip


def _pair(ids: Sequence[str], probabilities: np.ndarray) -> list[list[Any]]:
    values = np.asarray(probabilities, float)
    return [[str(name), make_plain(values[n]) if n < len(values) else None] for n, name in enumerate(ids)]
