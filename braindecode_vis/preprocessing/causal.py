"""Cleaning of samples while they arrive: mixing of channels, causal filters, and epochs at any sampling rate.

Contains the causal counterparts of `braindecode_vis.preprocessing.cleaning`, with their delays. A low-pass is the same
symmetric filter as in the run, with a delay of half its length. A high-pass or notch of the run is seconds long, too
long for such a delay; a recursive filter of low order at the same frequencies replaces it and shifts the phase near
them. ``benchmarks/live.py`` measures the loss. Does not depend on streams or runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from braindecode_vis.datasets.sources.cleaning_options import Cleaning


@dataclass
class CausalFilter:
    """Notch, high-pass and low-pass of a stretch of samples, chunk by chunk.

    Parameters
    ----------
    sfreq
        Of the samples, in Hz.
    notch, l_freq, h_freq
        As in `Cleaning`.
    is_own
        Whether the run was trained with this same filter, for the description.

    Attributes
    ----------
    delay : int
        Delay of the output behind the input, in samples.
    """

    sfreq: float
    notch: Sequence[float] = ()
    l_freq: float | None = None
    h_freq: float | None = None
    is_own: bool = False
    _sections: np.ndarray | None = field(init=False, default=None)
    _taps: np.ndarray | None = field(init=False, default=None)
    _state: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        from scipy.signal import butter, iirnotch, tf2sos

        sections = []
        for frequency in self.notch:
            # MNE's notch is f / 200 wide with transitions of half a hertz, and has half amplitude in their middle.
            width = frequency / 200 + 0.5
            sections.append(tf2sos(*iirnotch(frequency, frequency / (np.sqrt(3) * width), self.sfreq)))
        if self.l_freq is not None:
            # MNE's transition ends at l_freq and is as wide as that, up to 2 Hz or a quarter of it. Of causal filters
            # the gentlest one changes epochs least: steeper ones turn the phase more (docs/research/LOG.md).
            width = min(max(0.25 * self.l_freq, 2.0), self.l_freq)
            sections.append(butter(1, self.l_freq - width / 2, "highpass", fs=self.sfreq, output="sos"))
        self._sections = np.concatenate(sections) if sections else None
        if self.h_freq is not None:
            from mne.filter import create_filter

            self._taps = np.asarray(create_filter(None, self.sfreq, None, self.h_freq, verbose="error"))

    @classmethod
    def of(cls, cleaning: Cleaning, sfreq: float) -> CausalFilter:
        """Return the causal filter that corresponds to the cleaning of a run."""
        return cls(sfreq, cleaning.notch, cleaning.l_freq, cleaning.h_freq, cleaning.causal)

    @property
    def delay(self) -> int:
        """Delay of the output behind the input, in samples: half the low-pass."""
        return 0 if self._taps is None else len(self._taps) // 2

    def describe(self) -> str:
        """Describe the filters and their delay in a sentence; empty if there are none."""
        done = []
        if self.notch:
            done.append(f"a notch at {', '.join(f'{f:g}' for f in self.notch)} Hz")
        if self.l_freq is not None:
            done.append(f"a high-pass of {self.l_freq:g} Hz")
        words = ""
        if done:
            how = "as in the run" if self.is_own else "instead of the run's filter without phase shift"
            words = f"{' and '.join(done)} by a causal filter, {how}"
        if self.h_freq is not None:
            late = 1000 * self.delay / self.sfreq
            own = f"the run's own low-pass of {self.h_freq:g} Hz, which is waited for ({late:.0f} ms)"
            words = f"{words}; {own}" if words else own
        return f"Filters: {words}." if words else ""

    @property
    def settles(self) -> float:
        """Seconds after which the start of a stretch no longer matters: two periods of the high-pass's corner."""
        return 0.0 if self.l_freq is None else 2 / self.l_freq

    def restart(self) -> None:
        """Reset the filters; the next sample begins a new stretch."""
        self._state = None

    def filter_stretch(self, samples: np.ndarray) -> np.ndarray:
        """Return a whole stretch of shape (n_channels, n_samples), filtered as if it had arrived sample by sample.

        Where a low-pass would have to wait for samples behind the end, the last one is repeated.
        """
        self.restart()
        return self.push(np.concatenate([samples, np.repeat(samples[:, -1:], self.delay, axis=1)], axis=1))

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Return the filtered samples that are complete after these new samples.

        Parameters
        ----------
        samples : float64 array of shape (n_channels, n_samples)

        Returns
        -------
        array of shape (n_channels, n_known)
            The first `delay` output samples belong before the start of the stretch and are left out.
        """
        from scipy.signal import lfilter, lfilter_zi, sosfilt, sosfilt_zi

        if not samples.shape[1] or (self._sections is None and self._taps is None):
            return samples
        if self._state is None:
            # As if the first sample had been there always, so that a constant offset does not ring.
            first = samples[:, :1]
            recursive = None
            if self._sections is not None:
                # (n_sections, 2) -> (n_sections, n_channels, 2)
                recursive = sosfilt_zi(self._sections)[:, None, :] * first[None]
                if self.l_freq is not None:
                    first = np.zeros_like(first)  # no constant passes a high-pass
            direct = None if self._taps is None else lfilter_zi(self._taps, 1.0)[None] * first
            self._state = [recursive, direct, self.delay]
        recursive, direct, ahead = self._state
        if self._sections is not None:
            samples, recursive = sosfilt(self._sections, samples, axis=1, zi=recursive)
        if self._taps is not None:
            samples, direct = lfilter(self._taps, 1.0, samples, axis=1, zi=direct)
        skipped = min(ahead, samples.shape[1])
        self._state = [recursive, direct, ahead - skipped]
        return samples[:, skipped:]


def make_resampling(first: int, last: int, sfreq: float, times: np.ndarray) -> np.ndarray:
    """Return the matrix that resamples around an event to other times, low-passed against aliasing.

    A windowed sinc like that of `make_antialias_filter` (Kaiser window of beta 6, twenty new samples long, half
    amplitude at the new Nyquist frequency), evaluated at the distance of each sample from each time. It takes any rate
    that is not below the wanted one.

    Parameters
    ----------
    first, last
        First and last available sample, relative to the event.
    sfreq
        Of these samples, in Hz.
    times : array of shape (n_times,)
        Evenly spaced, in s from the event.

    Returns
    -------
    float32 array of shape (last - first + 1, n_times)
        Every column sums to one.

    Examples
    --------
    >>> make_resampling(-30, 60, 512.0, np.arange(10) / 250).sum(axis=0).round(6).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    wanted = 1 / float(np.median(np.diff(times)))
    # (n_samples, n_times), in new samples
    distance = (np.arange(first, last + 1)[:, None] / sfreq - times[None]) * wanted
    inside = np.abs(distance) <= 10
    window = np.i0(6.0 * np.sqrt(np.where(inside, 1 - (distance / 10) ** 2, 0.0))) * inside
    weights = np.sinc(distance) * window
    return (weights / weights.sum(axis=0)).astype(np.float32)
