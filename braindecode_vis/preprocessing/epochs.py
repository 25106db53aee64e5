"""Cuts EEG and MEG trials from lazy parts, a few seconds at a time, and decides which events are used.

The sampling rate is lowered while cutting: a short symmetric filter is evaluated only at the kept samples, which lie at
exactly the requested times, whatever the sample of an event is. The filter is finite, so it uses only half its length
around an epoch. MNE's way of resampling epochs, with its small shift, is available too, for comparison with published
files.

Joined recordings: no filter uses samples between two stretches of events, because a stretch ends before an epoch that
does not touch it. If the gap between two events is unusually long, simultaneous jumps in most channels are looked for
next to the epochs; samples beyond a jump are never used, and an epoch that contains one is dropped. Dropped events are
counted, and too many are an error. Does not depend on a file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import TRIAL_COLUMNS, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart, EpochPlan
from braindecode_vis.preprocessing.signal_damage import DamageWatch

if TYPE_CHECKING:
    import mne
    import pandas as pd

BLOCK_TRIALS = 256
_FEW_FLAT = 0.1  # more channels than this share are not left without an electrode
_LEAST_TIMES = 8  # samples below which a channel may keep its value without a fault
_STRETCH_S = 30.0  # longest piece of a recording that is read at once
_TILE = 32  # output samples per row of the decimating matrix product


# --- planning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Trials that will be read from one part.

    Parameters
    ----------
    trials, dropped : DataFrame
        Kept trials in the order of the store; dropped events with a `reason`.
    times
        Of the kept samples, in s.
    bounds : integer array of shape (n_trials, 2)
        First and past-the-last sample of the recording that a trial may use; empty for published epochs.
    keep
        Samples of published epochs that are kept.
    repair
        ``repair(start, block)`` repairs the cut trials from `start` on; None leaves them unchanged.
    notes
        Findings of the cleaning, for the reader of the store.
    """

    part: ContinuousPart | EpochedPart
    trials: pd.DataFrame
    dropped: pd.DataFrame
    times: np.ndarray
    bounds: np.ndarray
    keep: np.ndarray
    repair: Callable[[int, np.ndarray], np.ndarray] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def plan_part(part: ContinuousPart | EpochedPart, plan: EpochPlan) -> Piece:
    """Decide which trials of a part are kept; reads samples only if recordings may have been joined.

    Raises
    ------
    DataError
        If more than ``plan.max_dropped`` of the events cannot be used.
    """
    if isinstance(part, EpochedPart):
        low, high = plan.window
        keep = np.flatnonzero((part.times > low - 1e-6) & (part.times < high - 1e-6))
        if not len(keep):
            raise ConfigError(
                f"{part.where} has times from {part.times[0]:g} to {part.times[-1]:g} s, none in {plan.window}."
            )
        none = part.trials.iloc[:0].assign(reason="", file="")
        return Piece(part, part.trials, none, part.times[keep], np.empty((0, 2), int), keep)
    events = part.recording.events
    bounds, boundaries = _find_bounds(part, plan)
    first, last = find_extent(part.sfreq, plan)
    onset = events["sample"].to_numpy()
    outside = (onset + first < 0) | (onset + last >= part.n_samples)
    crossed = ~outside & ((onset + first < bounds[:, 0]) | (onset + last >= bounds[:, 1]))
    # Both are counted against one bound: it is the share of lost events that tells of a wrong file.
    bad = outside | crossed
    if bad.sum() > plan.max_dropped * len(events):
        worst = events.iloc[int(np.flatnonzero(bad)[0])]
        raise DataError(
            f"{part.where}: {int(bad.sum())} of {len(events)} epochs are unusable, above the bound of "
            f"{plan.max_dropped:.1%}: {int(outside.sum())} extend outside the file and {int(crossed.sum())} contain "
            f"a jump of most channels ({len(boundaries)} found), first at {worst['onset']:.3f} s "
            f"({worst['stimulus_id']})."
        )
    recording = part.recording
    trials = events.assign(subject=recording.subject, session=recording.session, run=recording.run)
    trials = trials[[*TRIAL_COLUMNS, "concept", "onset", "sample"]].reset_index(drop=True)
    reason = np.where(outside, "outside the recording", "contains a jump")
    dropped = trials.assign(reason=reason, file=part.recording.files[0].name)[bad]
    return Piece(
        part, trials[~bad].reset_index(drop=True), dropped, plan.find_times(), bounds[~bad], np.empty(0, int)
    )


def find_extent(sfreq: float, plan: EpochPlan) -> tuple[int, int]:
    """Return the first and last sample of an epoch relative to its onset, without the length of the filter.

    Parameters
    ----------
    sfreq
        Of the recording, in Hz.
    plan
        How trials are cut.
    """
    first = min(round(plan.tmin * sfreq), round(plan.window[0] * sfreq))
    # MNE's epochs include their last time.
    last = round(plan.tmax * sfreq) - (plan.resampling == "exact")
    if plan.baseline is not None:
        low, high = plan.find_baseline()
        first, last = min(first, round(low * sfreq)), max(last, round(high * sfreq))
    return first, last


def _find_bounds(part: ContinuousPart, plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples that each event may use, given the visible joins of recordings."""
    onset = part.recording.events["sample"].to_numpy()
    bounds = np.tile(np.array([[0, part.n_samples]]), (len(onset), 1))
    boundaries = list(part.boundaries)
    first, last = find_extent(part.sfreq, plan)
    half = _find_reach(part.sfreq, plan)
    typical = _find_usual_steps(part) if len(onset) > 1 else np.empty(0)
    for gap in _find_pauses(onset):
        stop_after = min(onset[gap + 1], onset[gap] + last + half + 1)
        start_before = max(onset[gap], onset[gap + 1] + first - half)
        spans = [(onset[gap], stop_after), (start_before, onset[gap + 1])]
        if start_before <= stop_after:
            spans = [(onset[gap], onset[gap + 1])]
        for low, high in spans:
            boundaries.extend(_find_joins(part, int(low), int(high), typical))
    found = np.unique(np.array(boundaries, dtype=np.int64))
    if len(found):
        edges = np.r_[0, found, part.n_samples]
        at = np.searchsorted(edges, onset, side="right")
        bounds = np.stack([edges[at - 1], edges[at]], axis=1)
    return bounds, found


def find_pause_boundaries(part: ContinuousPart, plan: EpochPlan) -> np.ndarray:
    """Return the joins of recordings in whole pauses between events, and before the first and after the last.

    Filters that are longer than an epoch need these, too.
    """
    onset = part.recording.events["sample"].to_numpy()
    if len(onset) < 2:
        return np.empty(0, int)
    first, last = find_extent(part.sfreq, plan)
    typical = _find_usual_steps(part)
    spans = [(onset[gap], onset[gap + 1]) for gap in _find_pauses(onset)]
    spans = [(0, max(0, onset[0] + first)), *spans, (min(part.n_samples, onset[-1] + last), part.n_samples)]
    longest = round(_STRETCH_S * part.sfreq)
    found: list[int] = []
    for low, high in spans:
        for start in range(int(low), int(high) - 1, longest):
            # One sample more, so that a jump between two stretches is seen.
            found.extend(_find_joins(part, start, min(start + longest + 1, int(high)), typical))
    return np.unique(np.array(found, dtype=np.int64))


def _find_pauses(onset: np.ndarray) -> np.ndarray:
    """Return the events before an unusually long gap: only there may recordings have been joined."""
    if len(onset) < 2:
        return np.empty(0, int)
    gaps = np.diff(onset)
    # Pauses between sequences are longer than the usual distance of events, jittered ones are not.
    return np.flatnonzero(gaps > 1.5 * np.median(gaps))


def _find_usual_steps(part: ContinuousPart) -> np.ndarray:
    """Return the usual difference of neighbouring samples, shape (n_channels,), from ten seconds with events."""
    onset = part.recording.events["sample"].to_numpy()
    length = min(part.n_samples, onset[0] + round(10 * part.sfreq))
    start = max(0, min(onset[0], length - 2))
    return np.median(np.abs(np.diff(part.read(int(start), int(length)), axis=1)), axis=1)


def _find_joins(part: ContinuousPart, low: int, high: int, typical: np.ndarray) -> list[int]:
    signal = part.read(low, high)
    if signal.shape[1] < 2 or not len(find_steps(signal, typical)):
        return []
    # A join stands out from its surroundings too; in a noisy stretch every step is large.
    local = np.median(np.abs(np.diff(signal, axis=1)), axis=1)
    return (find_steps(signal, np.maximum(typical, local)) + low).tolist()


# --- cutting ----------------------------------------------------------------------------------------------


def iterate_trials(
    piece: Piece, plan: EpochPlan, watch: DamageWatch | None = None, *, unit: str = ""
) -> Iterator[np.ndarray]:
    """Yield the trials of a part in order, float32 blocks of shape (n, n_channels, n_times), checked to be finite.

    Parameters
    ----------
    piece, plan
        What is cut, and how.
    watch
        Checks the values while they are read; None if they are read a second time.
    unit
        Unit of the recording, for `watch`.
    """
    part, watch = piece.part, watch or DamageWatch(refuses=False)
    rows_seen = watch.open_rows(part.where, part.group[0], piece.trials["stimulus_id"].to_numpy(), unit=unit)
    held = None
    low = np.full(len(part.ch_names), np.inf)
    high = -low
    done = n_seen = 0
    if isinstance(part, EpochedPart):
        for start in range(0, len(piece.trials), BLOCK_TRIALS):
            block = part.read(start, min(start + BLOCK_TRIALS, len(piece.trials)))
            block = np.ascontiguousarray(block[..., piece.keep], dtype=np.float32)
            _check_block(block, piece, start)
            lowest, highest = block.min(axis=2), block.max(axis=2)  # (n_trials, n_channels)
            # A few digitised samples may be equal without a fault.
            flat = lowest == highest if block.shape[2] >= _LEAST_TIMES else None
            rows_seen.add(block, flat)
            low, high = np.minimum(low, lowest.min(axis=0)), np.maximum(high, highest.max(axis=0))
            n_seen += len(block) * block.shape[2]
            yield block
    else:
        for rows in _group_events(piece, plan):
            onsets, bounds = piece.trials["sample"].to_numpy()[rows], piece.bounds[rows[0]]
            ends = int(bounds[0]), int(bounds[1])
            block, signal, start = cut_stretch(part.read, onsets, ends, part.sfreq, plan)
            _check_block(block, piece, done)
            lowest, highest = watch.look_at_samples(part.where, part.ch_names, signal, start, part.sfreq)
            low, high = np.minimum(low, lowest), np.maximum(high, highest)
            n_seen += signal.shape[1]
            rows_seen.add(block)
            if piece.repair is not None:
                block = piece.repair(done, block)
            done += len(rows)
            yield block
        onset = piece.trials["sample"].to_numpy()
        first, last = find_extent(part.sfreq, plan)
        held = watch.find_held_trials(part.where, onset + first, onset + last)
        watch.settle_channels(part.where)
    # One sample of each channel says nothing of whether it varies.
    if n_seen > 1:
        _check_flat(piece, low, high)
    rows_seen.finish(partial(_name_trial, piece), held=held, ch_names=part.ch_names)


def _name_trial(piece: Piece, number: int) -> str:
    row = piece.trials.iloc[number]
    at = f" at {row['onset']:.3f} s" if "onset" in piece.trials else f", trial {number + 1} of the file"
    return f"{row['stimulus_id']}{at}"


def _check_flat(piece: Piece, low: np.ndarray, high: np.ndarray) -> None:
    """Raise `DataError` if the extremes of a channel over all trials are the same."""
    flat = [name for name, a, b in zip(piece.part.ch_names, low, high, strict=True) if a == b]
    if len(flat) > max(2, _FEW_FLAT * len(low)) and len(piece.trials):
        raise DataError(
            f"{piece.part.where}: {len(flat)} of {len(low)} channels are flat throughout ({', '.join(flat[:8])}"
            f"{', ...' if len(flat) > 8 else ''}): the file is damaged, fetch it again; or leave them out with "
            "dataset.channels if they were never recorded."
        )
    if flat and len(piece.trials):
        raise DataError(
            f"{piece.part.where}: the channel(s) {', '.join(flat)} are flat throughout; "
            "leave them out with dataset.channels."
        )


def _group_events(piece: Piece, plan: EpochPlan) -> Iterator[np.ndarray]:
    """Yield rows of neighbouring events whose epochs overlap, within one recording and about half a minute."""
    assert isinstance(piece.part, ContinuousPart)
    onset = piece.trials["sample"].to_numpy()
    first, last = find_extent(piece.part.sfreq, plan)
    breaks = (np.diff(onset) > last - first) | (np.diff(piece.bounds[:, 0]) != 0)
    longest = _STRETCH_S * piece.part.sfreq
    for rows in np.split(np.arange(len(onset)), np.flatnonzero(breaks) + 1):
        while len(rows):
            # A long stretch is cut into pieces that fit in memory, each with one event at least.
            n = max(1, int(np.searchsorted(onset[rows], onset[rows[0]] + longest)))
            yield rows[:n]
            rows = rows[n:]


def cut_stretch(
    read: Callable[[int, int], np.ndarray],
    onsets: np.ndarray,
    bounds: tuple[int, int],
    sfreq: float,
    plan: EpochPlan,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Read one stretch of a recording and cut its trials.

    Parameters
    ----------
    read
        ``read(start, stop)`` gives samples as (n_channels, stop - start).
    onsets : integer array of shape (n_trials,)
        Ascending samples.
    bounds
        First and past-the-last sample that may be read.
    sfreq
        Of the recording, in Hz.
    plan
        How trials are cut.

    Returns
    -------
    block : float32 array of shape (n_trials, n_channels, n_times)
        The trials.
    signal : array of shape (n_channels, n_samples)
        The samples without constant offsets.
    start
        Number of the first of them in the recording.
    """
    half = _find_reach(sfreq, plan)
    first, last = find_extent(sfreq, plan)
    start = int(max(bounds[0], onsets[0] + first - half))
    stop = int(min(bounds[1], onsets[-1] + last + 1 + half))
    wide = read(start, stop)
    # Constant offsets leave before the samples become float32, or they would cost digits.
    offset = wide[:, :1].astype(np.float64)
    signal = (wide - offset).astype(np.float32)
    n_times = len(plan.find_times())
    skipped = round((plan.window[0] - plan.tmin) * plan.sfreq)
    begin = round(plan.tmin * sfreq)
    if plan.resampling == "mne":
        n_samples = round(plan.tmax * sfreq) - begin + 1
        matrix = make_mne_resampling(n_samples, sfreq, plan.sfreq)[:, skipped : skipped + n_times]
        block = np.stack([signal[:, at : at + n_samples] @ matrix for at in onsets + begin - start])
    else:
        decim = find_decimation(sfreq, plan.sfreq)
        block = cut_epochs(signal, onsets + begin + skipped * decim - start, n_times=n_times, decim=decim)
    if plan.baseline is None:
        block += offset.astype(np.float32)
        return block, signal, start
    low, high = (round(end * sfreq) for end in plan.find_baseline())
    for row, at in enumerate(onsets - start):
        block[row] -= signal[:, at + low : at + high + 1].mean(axis=1, keepdims=True)
    return block, signal, start


def _check_block(block: np.ndarray, piece: Piece, start: int) -> None:
    if np.isfinite(block.sum(dtype=np.float64)):
        return
    trial, channel, _ = (int(axis[0]) for axis in np.nonzero(~np.isfinite(block)))
    row = piece.trials.iloc[start + trial]
    at = f" at {row['onset']:.3f} s" if "onset" in piece.trials else ""
    raise DataError(
        f"{piece.part.where}: channel {piece.part.ch_names[channel]} is not finite in the trial of "
        f"{row['stimulus_id']}{at}; repair the file, or leave the channel out with dataset.channels."
    )


@lru_cache(maxsize=16)
def make_antialias_filter(decim: int) -> np.ndarray:
    """Return the symmetric low-pass filter before taking every `decim`-th sample, shape (20 * decim + 1,).

    Half amplitude at the new Nyquist frequency; flat to 0.1 % up to 80 % of it, and below 0.1 % from 120 % on (a
    Kaiser window of beta 6). The gain at 0 Hz is one. From 1000 to 250 Hz: flat to 100 Hz, 81 samples long.

    Examples
    --------
    >>> make_antialias_filter(4).shape
    (81,)
    """
    from scipy.signal import firwin

    if decim == 1:
        return np.ones(1)
    # Twenty new samples long: the shortest that keeps both promises.
    return firwin(20 * decim + 1, 1 / decim, window=("kaiser", 6.0))


@lru_cache(maxsize=4)
def make_mne_resampling(n_samples: int, sfreq: float, wanted: float) -> np.ndarray:
    """Return what `mne.Epochs.resample` does to an epoch as a matrix, float32 of shape (n_samples, n_times).

    It pads with the values at both ends to a power of two, cuts the spectrum at the new Nyquist frequency and takes off
    the padding, rounded to whole new samples: 1201 samples at 1000 Hz are padded by 423 before and 106 new ones are
    taken off, so that the first sample of 250 Hz lies at the old sample 4 * 106 - 423 = 1.

    Examples
    --------
    >>> make_mne_resampling(1201, 1000.0, 250.0).shape
    (1201, 300)
    """
    import mne

    if sfreq == wanted:
        return np.eye(n_samples, dtype=np.float32)
    # Linear in the samples, so that the answers to unit pulses tell everything.
    matrix = mne.filter.resample(
        np.eye(n_samples), up=wanted, down=sfreq, npad="auto", pad="edge", verbose="error"
    )
    return matrix.astype(np.float32)


def _find_reach(sfreq: float, plan: EpochPlan) -> int:
    """Return by how many samples the filter of the resampling reaches beyond an epoch; that of MNE reaches nowhere."""
    ratio = sfreq / plan.sfreq
    if plan.resampling == "mne" and abs(ratio - round(ratio)) > 1e-6 * ratio:
        return 0
    return len(make_antialias_filter(find_decimation(sfreq, plan.sfreq))) // 2


def find_decimation(sfreq: float, wanted: float) -> int:
    """Return by how much `sfreq` must be divided to give `wanted` (both in Hz).

    Raises
    ------
    ConfigError
        If the ratio is not a whole number.

    Examples
    --------
    >>> find_decimation(1000.0, 250.0)
    4
    """
    decim = round(sfreq / wanted)
    if decim < 1 or abs(sfreq / wanted - decim) > 1e-6 * decim:
        near = sorted({sfreq / d for d in (1, 2, 3, 4, 5, 8, 10)})
        raise ConfigError(
            f"a recording of {sfreq:g} Hz cannot be resampled to {wanted:g} Hz by taking every n-th sample; "
            f"choose sfreq among {', '.join(f'{f:g}' for f in near)}, or set dataset.resampling to mne."
        )
    return decim


def cut_epochs(signal: np.ndarray, starts: np.ndarray, *, n_times: int, decim: int) -> np.ndarray:
    """Cut epochs out of a continuous signal at every `decim`-th sample, low-passed against aliasing.

    Beyond both ends the signal is extended with its last value, so that the filter does not ring there.

    Parameters
    ----------
    signal : float array of shape (n_channels, n_samples)
    starts : integer array of shape (n_epochs,)
        Sample of the first kept time of each epoch; any sample, not only multiples of `decim`.
    n_times
        Samples per epoch after decimation.
    decim
        Factor between the sampling rates.

    Returns
    -------
    epochs : float32 array of shape (n_epochs, n_channels, n_times)

    Raises
    ------
    DataError
        If an epoch does not lie inside the signal.

    Examples
    --------
    >>> cut_epochs(np.arange(12.0)[None], np.array([1, 2]), n_times=3, decim=1)[:, 0].tolist()
    [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]
    """
    starts = np.asarray(starts, dtype=np.int64)
    n_samples = signal.shape[1]
    last = starts + (n_times - 1) * decim
    if len(starts) and (starts.min() < 0 or last.max() >= n_samples):
        raise DataError(
            f"epochs from sample {starts.min()} to {last.max()} do not lie inside a signal of {n_samples} samples."
        )
    taps = make_antialias_filter(decim)
    half = len(taps) // 2
    epochs = np.empty((len(starts), signal.shape[0], n_times), dtype=np.float32)
    # Edges are held at their last value; behind them the last tile may reach past the end.
    n_before, n_after = half, half + 2 * _TILE * decim
    padded = np.empty((signal.shape[0], n_before + n_samples + n_after), dtype=np.float32)
    padded[:, :n_before] = signal[:, :1]
    padded[:, n_before : n_before + n_samples] = signal
    padded[:, n_before + n_samples :] = signal[:, -1:]
    # Epochs whose starts differ by multiples of `decim` share one decimated signal.
    for phase in np.unique(starts % decim):
        rows = np.flatnonzero(starts % decim == phase)
        n_out = int((last[rows].max() - phase) // decim) + 1
        reduced = _decimate(padded[:, phase:], taps, decim, n_out)
        for row in rows:
            first = (starts[row] - phase) // decim
            epochs[row] = reduced[:, first : first + n_times]
    return epochs


def _decimate(padded: np.ndarray, taps: np.ndarray, decim: int, n_out: int) -> np.ndarray:
    """Evaluate the filter at every `decim`-th sample, as products with a banded matrix.

    Output k needs the samples k * decim ... k * decim + len(taps) - 1. A row of `_TILE` outputs starts at a multiple
    of the row's width, and needs its own samples and the first ones of the next row.
    """
    if decim == 1:
        return padded[:, :n_out]
    own, next_ = _make_bands(decim, len(taps))
    width = _TILE * decim
    n_rows = -(-n_out // _TILE)
    needed = (n_rows + 1) * width
    if padded.shape[1] < needed:
        padded = np.pad(padded, ((0, 0), (0, needed - padded.shape[1])))
    # (channel, sample) -> (channel, row, sample in row), a view
    rows = padded[:, :needed].reshape(len(padded), n_rows + 1, width)
    reduced = np.matmul(rows[:, :-1], own)
    reduced += np.matmul(rows[:, 1:, : len(next_)], next_)
    return reduced.reshape(len(padded), -1)[:, :n_out]


@lru_cache(maxsize=16)
def _make_bands(decim: int, n_taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of the banded matrix that act on a row itself and on the start of the next row."""
    taps = make_antialias_filter(decim)
    band = np.zeros((_TILE * decim + n_taps - decim, _TILE), dtype=np.float32)
    for column in range(_TILE):
        band[column * decim : column * decim + n_taps, column] = taps
    return band[: _TILE * decim].copy(), band[_TILE * decim :].copy()


def find_steps(signal: np.ndarray, typical: np.ndarray) -> np.ndarray:
    """Return the samples at which most channels jump at once: where two recordings were joined.

    Parameters
    ----------
    signal : array of shape (n_channels, n_samples)
    typical : array of shape (n_channels,)
        Usual absolute difference between neighbouring samples; a jump is ten times as large in more than half of the
        channels.

    Returns
    -------
    steps : integer array
        First sample after each jump.

    Examples
    --------
    >>> find_steps(np.array([[0, 1, 0, 50, 51.0]]), np.array([1.0]))
    array([3])
    """
    # A join moves most channels at once; an electrode that pops moves one.
    jumps = np.abs(np.diff(signal, axis=1)) > 10 * typical[:, None]
    return np.flatnonzero(jumps.mean(axis=0) > 0.5) + 1


def export_epochs(responses: Responses) -> mne.EpochsArray:
    """Return trials as MNE epochs, with the trial table as metadata.

    All trials are loaded; `select` some first if they are many. Whitened or scaled trials keep their numbers, which
    MNE will show as volts.
    """
    import mne

    if responses.dims != ("trial", "channel", "time"):
        raise DataError(f"only trials of channels and times become MNE epochs, not {responses.dims}.")
    coords = responses.coords
    names = list(coords["ch_names"])
    kind = {"eeg": "eeg", "meg": "mag"}[str(coords.get("modality", "eeg"))]
    info = mne.create_info(names, float(coords["sfreq"]), kind)
    if "ch_pos" in coords:
        positions = np.asarray(coords["ch_pos"], dtype=float)
        if kind == "eeg":
            there = {n: p for n, p in zip(names, positions, strict=True) if np.isfinite(p).all()}
            info.set_montage(mne.channels.make_dig_montage(there, coord_frame="head"), on_missing="ignore")
    codes, event_id = np.unique(responses.stimulus_ids.astype(str), return_inverse=True)
    events = np.stack(
        [np.arange(responses.n_trials), np.zeros(responses.n_trials, int), event_id + 1], axis=1
    )
    return mne.EpochsArray(
        np.asarray(responses.data, dtype=np.float64), info, events=events, tmin=float(coords["times"][0]),
        event_id={name: row + 1 for row, name in enumerate(codes.tolist())}, metadata=responses.trials.copy(),
        verbose="error",
    )  # fmt: skip
