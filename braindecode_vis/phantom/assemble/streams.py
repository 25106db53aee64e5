"""Streams of samples and trials: recordings of many pieces, epochs cut while they pass, betas in blocks.

Every function holds a block, never a recording. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.phantom.bold_signal import simulate_betas
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.forward import Machine, make_machine
from braindecode_vis.phantom.scanner import FmriMachine

TRIALS_PER_BLOCK = 16


@lru_cache(maxsize=8)
def make_machine_at(name: str, sfreq: float) -> Machine:
    """Return a machine that samples at another rate, with the same density of sensor noise."""
    machine = make_machine(name)
    if sfreq == machine.sfreq:
        return machine
    return replace(machine, sfreq=sfreq, sensor_rms=machine.sensor_rms * np.sqrt(sfreq / machine.sfreq))


@lru_cache(maxsize=8)
def make_lowpass(sfreq: float, cutoff_hz: float, decim: int) -> np.ndarray:
    """Return a symmetric low-pass filter of about 0.1 s, half amplitude at the cutoff; gain one at 0 Hz."""
    from scipy.signal import firwin

    half = decim * round(0.05 * sfreq / decim)
    return firwin(2 * half + 1, cutoff_hz, fs=sfreq, window=("kaiser", 5.0)).astype(np.float32)


def cut_epochs(
    blocks: Iterable[np.ndarray],
    starts: np.ndarray,
    n_times: int,
    *,
    decim: int = 1,
    taps: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Cut epochs out of a stream, filtered and decimated.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n_channels, n)
        The recording.
    starts : integer array of shape (n_epochs,)
        First sample of each epoch, ascending.
    n_times
        Samples of an epoch after decimation.
    decim
        Every so many samples one is kept.
    taps : array, optional
        Symmetric filter of ``2 * k * decim + 1`` values.

    Yields
    ------
    epoch : float32 array of shape (n_channels, n_times)

    Raises
    ------
    DataError
        If an epoch, with the reach of the filter, does not lie inside the recording.
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
                lag = 2 * half // decim
                yield np.asarray(filtered[:, lag : lag + n_times], np.float32)
            number += 1
        needed = spans[number][0] if number < len(spans) else first + held.shape[1]
        passed = min(max(needed - first, 0), held.shape[1])
        held, first = held[:, passed:], first + passed
    if number < len(spans):
        raise DataError(f"{len(spans) - number} epoch(s) reach beyond the end of their recording.")


def iterate_betas(
    person: Person, machine: FmriMachine, rows: np.ndarray, seeds: np.ndarray, *, imagery: bool = False
) -> Iterator[np.ndarray]:
    """Yield noisy single-trial betas in blocks of shape (<= `TRIALS_PER_BLOCK`, n_voxels)."""
    for start in range(0, len(rows), TRIALS_PER_BLOCK):
        part = slice(start, start + TRIALS_PER_BLOCK)
        yield simulate_betas(person, machine, rows[part], seeds[part].tolist(), imagery=imagery)


def iterate_volumes(machine: FmriMachine, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each row of the blocks as a volume, zero outside the cortex."""
    for block in blocks:
        for values in block:
            yield machine.fill_volume(values)
