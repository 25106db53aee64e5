"""A session that follows a script, for pages: simulated signals, decisions, losses and messages."""

import time
from collections import deque

import numpy as np

from braindecode_vis.parts.live.page.server import Showing
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Marker, StreamInfo

NAMES = """
    Fp1 Fp2 AF3 AF4 F7 F3 Fz F4 F8 FT9 FC5 FC1 FC2 FC6 FT10 T7 C3 Cz C4 T8 TP9 CP5 CP1 CP2 CP6 TP10 P7 P3 Pz P4 P8
    PO7 PO3 POz PO4 PO8 O1 Oz O2
""".split()  # noqa: SIM905
IDS = [f"{name}_{n:02d}s" for name in ("aardvark", "bread_bin", "canoe", "daisy", "espresso", "fire_truck", "goose",
                                       "hammock", "ice_cream", "jellyfish") for n in range(2)]  # fmt: skip
SFREQ, CHUNK = 250.0, 25
INFO = StreamInfo("phantom", "eeg", tuple(NAMES), SFREQ, "uV", "LSL stream phantom-markers")
FACTS = {
    "protocol": "single trials, causal filters", "gallery": "test images of the run", "gallery_size": len(IDS),
    "tmin": -0.2, "tmax": 0.8, "sfreq": 250.0, "delay_ms": 12.0, "temperature": 18.0,
    "probabilities": "Probabilities are fitted on predictions of 200 training trials out of fold.", "n_top": 5,
    "chance": 1 / len(IDS), "interpolated": ("TP9",),
}  # fmt: skip


def find_images(ids):
    """Draw a picture of each id: a disc of a colour on another."""
    y, x = np.mgrid[:200, :200] / 100 - 1
    pictures = []
    for name in ids:
        if name not in IDS:
            pictures.append(None)
            continue
        rng = np.random.default_rng(IDS.index(name))
        back, front = rng.integers(30, 226, (2, 3))
        inside = (x - rng.uniform(-0.3, 0.3)) ** 2 + (y * rng.uniform(0.7, 1.5)) ** 2 < rng.uniform(0.2, 0.6)
        pictures.append(np.where(inside[..., None], front, back).astype(np.uint8))
    return pictures


class Script:
    """Makes chunks and decisions one after another, as an EEG of `NAMES` with four bad channels would."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.time, self.number, self.evidence = 100.0, 0, {}
        self.level = np.zeros(len(NAMES))
        self.offsets = self.rng.normal(0, 4000, len(NAMES))  # as amplifiers have

    def make_chunk(self, n=CHUNK, *, markers=()):
        times = self.time + np.arange(n) / SFREQ
        alpha = 12 * np.sin(2 * np.pi * 10 * times) * (1 + np.sin(times))
        noise = self.rng.normal(0, 3, (len(NAMES), n))
        steps = self.rng.normal(0, 2.5, (len(NAMES), n))
        slow = np.zeros_like(steps)
        for i in range(n):
            self.level = 0.96 * self.level + steps[:, i]
            slow[:, i] = self.level
        back = np.array([1.0 if name[0] in "PO" else 0.3 for name in NAMES])
        samples = slow + noise + back[:, None] * alpha
        samples[NAMES.index("TP9")] = np.nan
        samples[NAMES.index("FT10")] = 0
        samples[NAMES.index("T8")] += self.rng.normal(0, 40, n)
        samples[NAMES.index("F7")] = np.clip(samples[NAMES.index("F7")], -4, 4)
        self.time += n / SFREQ
        return Chunk(samples + self.offsets[:, None], times, tuple(markers), arrived=time.perf_counter())

    def make_decision(self, shown=None, *, lost="", image=None, right=0.6):
        shown = IDS[int(self.rng.integers(len(IDS)))] if shown is None else shown
        onset, number = self.time - 0.9, self.number
        self.number += 1
        if lost:
            return Decision(number, onset, shown, shown, lost)
        logits = self.rng.normal(0, 1.1, len(IDS))
        logits[IDS.index(shown)] += 2.2 if self.rng.random() < right else 0.4
        seen = self.evidence.setdefault(shown, [])
        seen.append(logits)
        pooled = np.sum(seen, axis=0)
        alone, together = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (logits, pooled))
        best, best_together = np.argsort(-alone)[:5], np.argsort(-together)[:5]
        wait = float(self.rng.gamma(8, 0.7))
        t = np.linspace(-0.2, 0.8, 250)
        wave = np.exp(-(((t - 0.17) / 0.04) ** 2)) - 0.6 * np.exp(-(((t - 0.32) / 0.08) ** 2))
        back = np.array([1.0 if name[0] in "PO" else 0.25 for name in NAMES])
        epoch = back[:, None] * wave + 0.35 * self.rng.normal(size=(len(NAMES), 250))
        return Decision(
            number, onset, shown, shown, "", None, tuple(IDS[i] for i in best), alone[best], alone[best],
            tuple(IDS[i] for i in best_together), together[best_together], len(seen),
            int((alone > alone[IDS.index(shown)]).sum()) + 1,
            {"wait": wait, "preprocess": 0.2 * wait, "predict": 0.6 * wait, "rank": 0.2 * wait, "delay": 12.0},
            image, epoch,
        )  # fmt: skip

    def play(self, listener, n_decisions=12, *, speed=None):
        """Send a listener chunks and decisions; at `speed` times the real pace, or at once."""
        for n in range(n_decisions):
            for _ in range(10):
                listener.hear(self.make_chunk(markers=[Marker(self.time, "x")]))
                if speed:
                    time.sleep(CHUNK / SFREQ / speed)
            listener.decide(self.make_decision(IDS[2 * (n % 3)] if n % 4 else None))


class Block:
    """A calibration block that keeps what it gets."""

    def __init__(self, n=4, duration=0.1, pause=0.1):
        self.showings = [Showing(IDS[i % len(IDS)], duration, pause) for i in range(n)]
        self.marks, self.ended = [], []

    def list_showings(self):
        return self.showings

    def find_images(self, ids):
        return find_images(ids)

    def mark(self, stimulus_id, time, uncertainty):
        self.marks.append((stimulus_id, time, uncertainty))

    def finish(self, complete):
        self.ended.append(complete)
        return f"The encoder was adapted with {len(self.marks)} trials."


class ChunkSource:
    """Chunks in memory as a source."""

    def __init__(self, info, chunks):
        self.info, self._chunks = info, iter(chunks)

    def connect(self):
        return self.info

    def read(self, timeout):
        for chunk in self._chunks:
            return chunk
        n = len(self.info.ch_names)
        return Chunk(np.empty((n, 0)), np.empty(0), ended=True)

    def close(self):
        pass


def cut_chunks(samples, times, markers=(), *, size=20):
    """Yield samples of shape (n_channels, n_samples) chunk by chunk, each with the markers up to its last sample."""
    left = deque(sorted(markers, key=lambda marker: marker.time))
    for start in range(0, samples.shape[1], size):
        stop = min(start + size, samples.shape[1])
        now = []
        while left and (left[0].time <= times[stop - 1] or stop == samples.shape[1]):
            now.append(left.popleft())
        yield Chunk(samples[:, start:stop], times[start:stop], tuple(now))
