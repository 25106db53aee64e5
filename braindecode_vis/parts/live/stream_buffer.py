"""Keeps the last seconds of a stream in bounded memory: samples, their times, and interruptions.

Samples count from the start of the session. A step in time of more than one and a half samples, or backwards, begins a
new stretch: no epoch and no filter reaches across. Samples that were made up where few were missing are counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Samples between neighbours above which some are missing.
LONGEST_STEP = 1.5


@dataclass(frozen=True)
class Break:
    """Where one stretch ended and the next began.

    Parameters
    ----------
    sample
        The first of the new stretch.
    before, after
        Times of the last sample before it and of the first one after, in s.
    """

    sample: int
    before: float
    after: float

    def describe(self) -> str:
        """Return what happened, in words that begin with the kind and a colon."""
        if self.after <= self.before:
            return (
                f"clock jump: the time of the stream went back from {self.before:.3f} to {self.after:.3f} s"
            )
        return f"gap: the stream has no samples from {self.before:.3f} to {self.after:.3f} s"


class SampleBuffer:
    """Keeps the newest samples.

    Parameters
    ----------
    n_channels
        Of the samples.
    capacity
        How many are kept at least.
    sfreq
        In Hz.
    """

    def __init__(self, n_channels: int, capacity: int, sfreq: float) -> None:
        self.sfreq, self.capacity = sfreq, capacity
        # Twice as long, so that the whole is moved once in a while and not with every chunk.
        self._data = np.empty((n_channels, 2 * capacity))
        self._times = np.empty(2 * capacity)
        self._base = 0  # number of the sample in the first column
        self._n = 0
        self.breaks: list[Break] = []
        self._bridges: list[tuple[int, int]] = []

    @property
    def start(self) -> int:
        """Number of the oldest sample that is kept."""
        return self._base

    @property
    def stop(self) -> int:
        """Number of the next sample."""
        return self._base + self._n

    @property
    def newest(self) -> float | None:
        """Time of the newest sample; None before the first."""
        return float(self._times[self._n - 1]) if self._n else None

    def append(self, samples: np.ndarray, times: np.ndarray) -> None:
        """Take in samples of shape (n_channels, n) that continue the stretch, of any length."""
        for first in range(0, samples.shape[1], self.capacity):
            part = slice(first, min(first + self.capacity, samples.shape[1]))
            n = part.stop - first
            if self._n + n > self._data.shape[1]:
                kept = slice(self._n - self.capacity, self._n)
                self._data[:, : self.capacity] = self._data[:, kept].copy()
                self._times[: self.capacity] = self._times[kept].copy()
                self._base += self._n - self.capacity
                self._n = self.capacity
                self._forget()
            self._data[:, self._n : self._n + n] = samples[:, part]
            self._times[self._n : self._n + n] = times[part]
            self._n += n

    def add_break(self, before: float, after: float) -> Break:
        """Begin a new stretch with the next sample."""
        made = Break(self.stop, before, after)
        self.breaks.append(made)
        return made

    def add_bridge(self, start: int, stop: int) -> None:
        """Remember that the samples `start` to `stop`, which may be still to come, are made up."""
        self._bridges.append((start, stop))

    def count_bridged(self, start: int, stop: int) -> int:
        """Return how many of the samples `start` to `stop` are made up."""
        return sum(max(0, min(stop, high) - max(start, low)) for low, high in self._bridges)

    def _forget(self) -> None:
        self._bridges = [one for one in self._bridges if one[1] > self._base]
        # The newest break before the buffer says where its first stretch comes from.
        while len(self.breaks) > 1 and self.breaks[1].sample <= self._base:
            del self.breaks[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the samples `start` to `stop` as (n_channels, stop - start), a view."""
        return self._data[:, start - self._base : stop - self._base]

    def read_times(self, start: int, stop: int) -> np.ndarray:
        """Return the times of the samples `start` to `stop`."""
        return self._times[start - self._base : stop - self._base]

    def find_bounds(self, sample: int) -> tuple[int, int | None]:
        """Return where the stretch of a sample begins, and where the next one does, None if none has begun."""
        marks = [one.sample for one in self.breaks]
        at = bisect_right(marks, sample)
        low = max(self.start, marks[at - 1]) if at else self.start
        return low, marks[at] if at < len(marks) else None

    def iterate_stretches(self) -> Iterator[tuple[int, int]]:
        """Yield the bounds of what is kept of each stretch, the newest first."""
        stop = self.stop
        for one in reversed(self.breaks):
            if one.sample <= self.start:
                break
            if one.sample < stop:
                yield one.sample, stop
            stop = one.sample
        if self.start < stop:
            yield self.start, stop

    def find_sample(self, time: float) -> int | None:
        """Return the sample nearest to a time, within half a sample of a stretch; None if there is none."""
        reach = 0.5 / self.sfreq + 1e-9
        for start, stop in self.iterate_stretches():
            times = self.read_times(start, stop)
            if times[0] - reach <= time <= times[-1] + reach:
                at = int(np.searchsorted(times, time))
                near = [n for n in (at - 1, at) if 0 <= n < len(times)]
                return start + min(near, key=lambda n: abs(times[n] - time))
        return None
