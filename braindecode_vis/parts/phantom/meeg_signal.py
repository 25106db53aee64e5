"""EEG and MEG of simulated subjects: noiseless evoked responses, and continuous recordings as a stream of blocks.

Owns the scale of the signal (the stated signal-to-noise ratio) and the superposition of overlapping responses in
ongoing noise. The response to one image is a sum over stages of a sensor pattern times a time course, so patterns are
computed once per event and multiplied with the time courses by one small matrix product. The files are written in
`formats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from sys import maxsize

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.phantom.brain import RESPONSE_S, Person, compute_time_course, draw_trials
from braindecode_vis.parts.phantom.forward import (
    SensorSystem,
    compute_patterns,
    pick_training_rows,
    project_images,
)
from braindecode_vis.parts.phantom.noise import CHUNK_S, compute_noise_power, simulate_noise

SNR_WINDOW_S = (0.0, 0.6)
"""Time window after stimulus onset in which the signal-to-noise ratio is defined."""


@dataclass(frozen=True)
class SensorMap:
    """Patterns of the stages of one subject on the sensors of one system.

    Parameters
    ----------
    patterns : sequence of float32 arrays of shape (n_channels, n_features)
        One per stage, scaled to the stated signal-to-noise ratio; in the unit of the system.
    common : float32 array of shape (n_stages, n_channels)
        Response that every image evokes.
    """

    patterns: tuple[np.ndarray, ...]
    common: np.ndarray

    def project(self, person: Person, rows: np.ndarray) -> np.ndarray:
        """Return the sensor pattern of each image in each stage, float32 (n_rows, n_stages, n_channels)."""
        return project_images(person, self.patterns, rows) + self.common


def simulate_continuous(
    person: Person,
    system: SensorSystem,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    duration_s: float,
    n_samples: int,
    *,
    name: str = "recording",
    block_s: float = 10.0,
    noise: bool = True,
) -> Iterator[np.ndarray]:
    """Yield a continuous recording block by block.

    The concatenation of the blocks depends on `name` and the seed, never on `block_s`; only one block is in memory.

    Parameters
    ----------
    person, system
        The subject and the recording system.
    onsets_s : array of shape (n_events,)
        Stimulus onsets in s from the first sample, ascending; rounded to the nearest sample.
    rows : integer array of shape (n_events,)
        Image of each event, as a row of ``person.drive``; -1 for a target or blank that evokes only the response
        common to all images.
    duration_s
        Presentation time of each image.
    n_samples
        Length of the recording, at ``system.sfreq``.
    name
        Name of the recording; recordings with different names differ in noise and in trial-to-trial variability.
    block_s
        Length of the yielded blocks in s.
    noise
        Set to False for only the signal, with its trial-to-trial variability.

    Yields
    ------
    block : float32 array of shape (n_channels, n_samples_of_block)
        In volt or tesla.

    Raises
    ------
    DataError
        If events are not sorted, or an image does not exist.
    """
    onsets_s, rows = np.asarray(onsets_s, float), np.asarray(rows, int)
    if onsets_s.ndim != 1 or onsets_s.shape != rows.shape:
        raise DataError(
            f"{onsets_s.shape} onsets were given for {rows.shape} stimulus rows: one row per onset is needed."
        )
    if (np.diff(onsets_s) < 0).any() or (onsets_s < 0).any():
        raise DataError("stimulus onsets must be ascending and not negative.")
    if len(rows) and (rows.max() >= len(person.drive) or rows.min() < -1):
        raise DataError(
            f"stimulus rows must be between -1 and {len(person.drive) - 1}, but run from {rows.min()} to "
            f"{rows.max()}."
        )
    if block_s <= 0 or n_samples < 0:
        raise ConfigError(
            f"block_s must be positive and n_samples not negative, not {block_s} and {n_samples}."
        )
    # A separate generator, so that a wrong argument is refused here and not at the first block.
    return _stream(person, system, onsets_s, rows, duration_s, n_samples, name, block_s, noise)


def simulate_endless(
    person: Person,
    system: SensorSystem,
    shown: Iterator[tuple[float, int]],
    duration_s: float,
    *,
    name: str = "stream",
) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Yield an endless recording chunk by chunk; `simulate_continuous` makes one of known length.

    Parameters
    ----------
    person, system
        The subject and the recording system.
    shown : iterator of (float, int)
        Onset in s from the first sample, ascending, and row of ``person.drive`` of every image; endless.
    duration_s
        Presentation time of each image.
    name
        Name of the recording; another name gives other noise and other variability of the trials.

    Yields
    ------
    chunk : float32 array of shape (n_channels, CHUNK_S * sfreq)
        In volt or tesla.
    onsets : list of (int, int)
        Sample, counted from the first of all, and row of each image with its onset in the chunk.
    """
    rate, sensors = system.sfreq, make_sensor_map(person, system, duration_s)
    times = np.arange(round((duration_s + RESPONSE_S) * rate)) / rate
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages])
    length, reach = round(CHUNK_S * rate), round(3 * person.config.trial_latency_sd_s * rate) + 1
    buffer = np.zeros((system.n_channels, length + 2 * reach + len(times)), np.float32)
    upcoming = next(shown)
    told: list[tuple[int, int]] = []
    for number, background in enumerate(simulate_noise(person, system, maxsize, name)):
        first, drawn = number * length, []
        # A response may be earlier than its mean latency, so images of the next chunk can affect this one.
        while round(upcoming[0] * rate) < first + length + reach:
            drawn.append((round(upcoming[0] * rate), upcoming[1]))
            upcoming = next(shown)
        gains, delays = draw_trials(person, len(drawn), f"{name}-{number}")
        patterns = sensors.project(person, np.array([row for _, row in drawn], int)) * gains[..., None]
        for (sample, _), delay, pattern in zip(drawn, delays, patterns, strict=True):
            start = max(0, sample + round(delay * rate) - first)
            buffer[:, start : start + len(times)] += pattern.T @ courses  # (n_channels, n_times)
        told += drawn
        yield buffer[:, :length] + background, [event for event in told if event[0] < first + length]
        told = [event for event in told if event[0] >= first + length]
        buffer[:, :-length] = buffer[:, length:].copy()
        buffer[:, -length:] = 0


def compute_evoked(
    person: Person,
    system: SensorSystem,
    rows: np.ndarray,
    *,
    sfreq: float | None = None,
    tmin: float = -0.2,
    tmax: float = 1.0,
    duration_s: float = 0.1,
    common: bool = True,
) -> np.ndarray:
    """Return the noiseless response to single images: the ground truth.

    Parameters
    ----------
    rows : integer array of shape (n_rows,)
        Images, as rows of ``person.drive``.
    sfreq
        Sampling rate; that of the system by default.
    tmin, tmax
        First and last time in s relative to the onset, both included.
    duration_s
        Presentation time of the image.
    common
        Set to False for the part that differs between images.

    Returns
    -------
    evoked : float32 array of shape (n_rows, n_channels, n_times)
        In volt or tesla.
    """
    rate = system.sfreq if sfreq is None else sfreq
    times = np.arange(round(tmin * rate), round(tmax * rate) + 1) / rate
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages])
    sensors = make_sensor_map(person, system, duration_s)
    patterns = sensors.project(person, rows)
    if not common:
        patterns = patterns - sensors.common
    # (row, stage, channel) x (stage, time) -> (row, channel, time)
    return np.einsum("rsc,st->rct", patterns, courses.astype(np.float32), optimize=True)


@lru_cache(maxsize=8)
def make_sensor_map(person: Person, system: SensorSystem, duration_s: float) -> SensorMap:
    """Return the sensor patterns of a subject for images shown for `duration_s`; the last few are kept.

    The image-specific patterns are scaled to the stated signal-to-noise ratio of single trials, their variability
    included, and the common ones to the stated peak.
    """
    patterns, common = compute_patterns(person, system)
    peak_wanted = person.config.evoked_eeg_v if system.modality == "eeg" else person.config.evoked_meg_t
    # The common response peaks well within the first second; 2 ms are fine enough to find it.
    times = np.arange(0, 1.0, 1 / 500)
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages])
    evoked = common * (peak_wanted / np.abs(common.T @ courses).max())
    power = _measure_signal_power(person, patterns, duration_s)
    wanted = person.config.snr * compute_noise_power(person, system).mean()
    scale = (
        np.sqrt(wanted / power) if power > 0 else 0.0
    )  # patterns are amplitudes, the ratio is one of powers
    scaled = tuple((scale * pattern).astype(np.float32) for pattern in patterns)
    return SensorMap(scaled, evoked.astype(np.float32))


def find_samples(onsets_s: np.ndarray, sfreq: float) -> np.ndarray:
    """Return the sample of each onset: the nearest one, as in every simulated recording."""
    return np.round(np.asarray(onsets_s, float) * sfreq).astype(np.int64)


def _measure_signal_power(person: Person, patterns: tuple[np.ndarray, ...], duration_s: float) -> float:
    """Return the power of differences between training images in single trials: mean over channels and window."""
    times = np.arange(SNR_WINDOW_S[0], SNR_WINDOW_S[1], 1 / 500)
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages])
    shown = project_images(person, patterns, pick_training_rows(person))
    shown = shown - shown.mean(axis=0)
    # (image, stage, channel) twice -> (stage, stage): covariance over images, averaged over channels
    between = np.einsum("rsc,rtc->st", shown, shown, optimize=True) / (shown.shape[0] * shown.shape[2])
    # Gains of two stages vary independently over trials, those of one stage have mean square one.
    gains = np.full(between.shape, np.exp(-(person.config.trial_gain_sd**2)))
    np.fill_diagonal(gains, 1.0)
    return float((between * gains * (courses @ courses.T / len(times))).sum())


def _stream(
    person: Person,
    system: SensorSystem,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    duration_s: float,
    n_samples: int,
    name: str,
    block_s: float,
    noise: bool,
) -> Iterator[np.ndarray]:
    """Cut the chunks of the simulation into blocks of the requested length."""
    size = max(1, round(block_s * system.sfreq))
    signal = _simulate_signal(person, system, onsets_s, rows, duration_s, n_samples, name)
    background = simulate_noise(person, system, n_samples, name) if noise else None
    held: list[np.ndarray] = []
    n_held = 0
    for chunk in signal:
        if background is not None:
            chunk = chunk + next(background)
        held.append(chunk)
        n_held += chunk.shape[1]
        if n_held >= size:
            joined = np.concatenate(held, axis=1)
            n_whole = n_held // size * size
            for start in range(0, n_whole, size):
                yield np.ascontiguousarray(joined[:, start : start + size])
            held, n_held = [joined[:, n_whole:]], n_held - n_whole
    if n_held:
        yield np.ascontiguousarray(np.concatenate(held, axis=1))


def _simulate_signal(
    person: Person,
    system: SensorSystem,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    duration_s: float,
    n_samples: int,
    name: str,
) -> Iterator[np.ndarray]:
    """Yield the superposed responses in chunks of the same length as the noise, (n_channels, n_samples_of_chunk)."""
    rate = system.sfreq
    times = np.arange(round((duration_s + RESPONSE_S) * rate)) / rate
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages]).astype(
        np.float32
    )
    sensors = make_sensor_map(person, system, duration_s)
    gains, delays_s = draw_trials(person, len(rows), name)
    # Trials jitter in latency by whole samples, so each response is one slice of the buffer.
    starts = np.clip(find_samples(onsets_s, rate) + find_samples(delays_s, rate), 0, None)
    order = np.argsort(starts, kind="stable")  # jitter may swap neighbours
    sorted_starts = starts[order]
    length = round(CHUNK_S * rate)
    # One chunk, and space after it for responses that are longer.
    buffer = np.zeros((system.n_channels, length + len(times)), np.float32)
    for first in range(0, n_samples, length):
        low, high = np.searchsorted(sorted_starts, (first, first + length))
        events = order[low:high]
        if len(events):
            patterns = sensors.project(person, rows[events]) * gains[events, :, None].astype(np.float32)
            for pattern, start in zip(patterns, starts[events] - first, strict=True):
                buffer[:, start : start + len(times)] += pattern.T @ courses  # (n_channels, n_times)
        yield buffer[:, : min(length, n_samples - first)].copy()
        buffer[:, : len(times)] = buffer[:, length:].copy()
        buffer[:, len(times) :] = 0


@lru_cache(maxsize=8)
def make_lowpass(sfreq: float, cutoff_hz: float, decim: int) -> np.ndarray:
    """Return a symmetric low-pass filter of about 0.1 s, half amplitude at the cutoff; gain one at 0 Hz."""
    from scipy.signal import firwin

    half = decim * round(
        0.05 * sfreq / decim
    )  # a multiple of `decim`: the middle stays on the decimated grid
    return firwin(2 * half + 1, cutoff_hz, fs=sfreq, window=("kaiser", 5.0)).astype(np.float32)


def cut_epochs(
    blocks: Iterable[np.ndarray],
    starts: np.ndarray,
    n_times: int,
    *,
    decim: int = 1,
    taps: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Cut epochs from a stream, filtered and decimated.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n_channels, n)
        The recording.
    starts : integer array of shape (n_epochs,)
        First sample of each epoch, ascending.
    n_times
        Samples of an epoch after decimation.
    decim
        One of `decim` samples is kept.
    taps : array, optional
        Symmetric filter of ``2 * k * decim + 1`` values.

    Yields
    ------
    epoch : float32 array of shape (n_channels, n_times)

    Raises
    ------
    DataError
        If an epoch, with the length of the filter, is not inside the recording.
    """
    from scipy.signal import upfirdn

    half = 0 if taps is None else len(taps) // 2
    spans = [(int(start) - half, int(start) + (n_times - 1) * decim + half + 1) for start in starts]
    if spans and spans[0][0] < 0:
        raise DataError(f"an epoch begins {-spans[0][0]} samples before its recording.")
    held: np.ndarray | None = None
    first = number = 0
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=1)
        while number < len(spans) and spans[number][1] <= first + held.shape[1]:
            piece = held[:, spans[number][0] - first : spans[number][1] - first]
            if taps is None:
                yield piece[:, ::decim].copy()
            else:
                filtered = upfirdn(taps, piece, 1, decim, axis=1)
                lag = 2 * half // decim  # outputs before the whole filter has entered the piece
                yield np.asarray(filtered[:, lag : lag + n_times], np.float32)
            number += 1
        needed = spans[number][0] if number < len(spans) else first + held.shape[1]
        # Samples that no later epoch needs are removed.
        passed = min(max(needed - first, 0), held.shape[1])
        held, first = held[:, passed:], first + passed
    if number < len(spans):
        raise DataError(f"{len(spans) - number} epoch(s) reach beyond the end of their recording.")
