"""Trials out of lazy parts: which events can be used, and reading and cutting a few seconds at a time.

Joined recordings: no filter ever sees samples between two stretches of events, because a stretch ends where the next
event's epoch does not touch. Where the gap between two events is unusually long, jumps in most channels at once are
looked for next to the epochs; samples beyond a jump are never used, and an epoch that contains one is dropped. What is
dropped is counted, and above a bound it is an error. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import TRIAL_COLUMNS
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart, EpochPlan
from braindecode_vis.preprocessing.epochs import (
    cut_epochs,
    find_decimation,
    find_steps,
    make_antialias_filter,
)

BLOCK_TRIALS = 256
_STRETCH_S = 30.0  # longest piece of a recording that is read at once


# --- planning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What will be read from one part.

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
        ``repair(start, block)`` mends the cut trials from `start` on; None leaves them.
    notes
        What cleaning found, for the reader of the store.
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
    """Decide which trials of a part are kept; reads samples only where recordings may have been joined.

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
    bounds, seams = _find_bounds(part, plan)
    first, last = _find_extent(part, plan)
    onset = events["sample"].to_numpy()
    outside = (onset + first < 0) | (onset + last >= part.n_samples)
    crossed = ~outside & ((onset + first < bounds[:, 0]) | (onset + last >= bounds[:, 1]))
    bad = outside | crossed
    if bad.sum() > plan.max_dropped * len(events):
        worst = events.iloc[int(np.flatnonzero(bad)[0])]
        raise DataError(
            f"{part.where}: {int(bad.sum())} of {len(events)} epochs are unusable, above the bound of "
            f"{plan.max_dropped:.1%}: {int(outside.sum())} reach outside the file and {int(crossed.sum())} contain "
            f"a jump of most channels ({len(seams)} found), first at {worst['onset']:.3f} s ({worst['stimulus_id']})."
        )
    trials = _make_trials(part, events)
    reason = np.where(outside, "outside the recording", "contains a jump")
    dropped = trials.assign(reason=reason, file=part.recording.files[0].name)[bad]
    return Piece(
        part, trials[~bad].reset_index(drop=True), dropped, plan.find_times(), bounds[~bad], np.empty(0, int)
    )


def _make_trials(part: ContinuousPart, events: pd.DataFrame) -> pd.DataFrame:
    recording = part.recording
    trials = events.assign(subject=recording.subject, session=recording.session, run=recording.run)
    return trials[[*TRIAL_COLUMNS, "concept", "onset", "sample"]].reset_index(drop=True)


def _find_extent(part: ContinuousPart, plan: EpochPlan) -> tuple[int, int]:
    """Return the first and last sample that an epoch uses, relative to its onset; the filter's reach not counted."""
    rate = part.sfreq
    first = min(round(plan.tmin * rate), round(plan.window[0] * rate))
    last = round(plan.tmax * rate) - 1
    if plan.baseline is not None:
        low, high = plan.find_baseline()
        first, last = min(first, round(low * rate)), max(last, round(high * rate))
    return first, last


def _find_bounds(part: ContinuousPart, plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples that each event may use, as far as joins of recordings can be seen."""
    onset = part.recording.events["sample"].to_numpy()
    bounds = np.tile(np.array([[0, part.n_samples]]), (len(onset), 1))
    seams = list(part.seams)
    first, last = _find_extent(part, plan)
    half = len(make_antialias_filter(find_decimation(part.sfreq, plan.sfreq))) // 2
    typical = _find_usual_steps(part) if len(onset) > 1 else np.empty(0)
    for gap in _find_pauses(onset):
        stop_after = min(onset[gap + 1], onset[gap] + last + half + 1)
        start_before = max(onset[gap], onset[gap + 1] + first - half)
        spans = [(onset[gap], stop_after), (start_before, onset[gap + 1])]
        if start_before <= stop_after:
            spans = [(onset[gap], onset[gap + 1])]
        for low, high in spans:
            seams.extend(_find_joins(part, int(low), int(high), typical))
    found = np.unique(np.array(seams, dtype=np.int64))
    if len(found):
        edges = np.r_[0, found, part.n_samples]
        at = np.searchsorted(edges, onset, side="right")
        bounds = np.stack([edges[at - 1], edges[at]], axis=1)
    return bounds, found


def find_pause_seams(part: ContinuousPart, plan: EpochPlan) -> np.ndarray:
    """Return the joins of recordings in whole pauses between events, and before the first and after the last.

    Filters that are longer than an epoch must know these, too.
    """
    onset = part.recording.events["sample"].to_numpy()
    if len(onset) < 2:
        return np.empty(0, int)
    first, last = _find_extent(part, plan)
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
    """Return after which events an unusually long gap follows: only there may recordings have been joined."""
    if len(onset) < 2:
        return np.empty(0, int)
    gaps = np.diff(onset)
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


def iterate_trials(piece: Piece, plan: EpochPlan) -> Iterator[np.ndarray]:
    """Yield the trials of a part in order, float32 blocks of shape (n, n_channels, n_times), checked to be finite."""
    low = np.full(len(piece.part.ch_names), np.inf)
    high = -low
    if isinstance(piece.part, EpochedPart):
        for start in range(0, len(piece.trials), BLOCK_TRIALS):
            block = piece.part.read(start, min(start + BLOCK_TRIALS, len(piece.trials)))
            block = np.ascontiguousarray(block[..., piece.keep], dtype=np.float32)
            _check_block(block, piece, start)
            low, high = np.minimum(low, block.min(axis=(0, 2))), np.maximum(high, block.max(axis=(0, 2)))
            yield block
        # One sample of each channel says nothing of whether it varies.
        if len(piece.trials) * len(piece.keep) > 1:
            _check_flat(piece, low, high)
        return
    done = n_seen = 0
    for rows in _group_events(piece, plan):
        block, signal = _cut_stretch(piece, rows, plan)
        _check_block(block, piece, done)
        low, high = np.minimum(low, signal.min(axis=1)), np.maximum(high, signal.max(axis=1))
        n_seen += signal.shape[1]
        if piece.repair is not None:
            block = piece.repair(done, block)
        done += len(rows)
        yield block
    if n_seen > 1:
        _check_flat(piece, low, high)


def _check_flat(piece: Piece, low: np.ndarray, high: np.ndarray) -> None:
    """Raise `DataError` if the extremes of a channel over all trials are the same."""
    flat = [name for name, a, b in zip(piece.part.ch_names, low, high, strict=True) if a == b]
    if flat and len(piece.trials):
        raise DataError(
            f"{piece.part.where}: the channel(s) {', '.join(flat)} are flat throughout; "
            "leave them out with dataset.channels."
        )


def _group_events(piece: Piece, plan: EpochPlan) -> Iterator[np.ndarray]:
    """Yield rows of neighbouring events whose epochs overlap, within one recording and about half a minute."""
    assert isinstance(piece.part, ContinuousPart)
    onset = piece.trials["sample"].to_numpy()
    first, last = _find_extent(piece.part, plan)
    breaks = (np.diff(onset) > last - first) | (np.diff(piece.bounds[:, 0]) != 0)
    longest = _STRETCH_S * piece.part.sfreq
    for rows in np.split(np.arange(len(onset)), np.flatnonzero(breaks) + 1):
        while len(rows):
            n = max(1, int(np.searchsorted(onset[rows], onset[rows[0]] + longest)))
            yield rows[:n]
            rows = rows[n:]


def _cut_stretch(piece: Piece, rows: np.ndarray, plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """Read one stretch and cut its trials; returns them and the samples (n_channels, n_samples), without offset."""
    part = piece.part
    assert isinstance(part, ContinuousPart)
    decim = find_decimation(part.sfreq, plan.sfreq)
    half = len(make_antialias_filter(decim)) // 2
    onset = piece.trials["sample"].to_numpy()[rows]
    first, last = _find_extent(part, plan)
    lower, upper = piece.bounds[rows[0]]
    start = int(max(lower, onset[0] + first - half))
    stop = int(min(upper, onset[-1] + last + 1 + half))
    wide = part.read(start, stop)
    # Constant offsets leave before the samples become float32, or they would cost digits.
    offset = wide[:, :1].astype(np.float64)
    signal = (wide - offset).astype(np.float32)
    begin = round(plan.tmin * part.sfreq) + round((plan.window[0] - plan.tmin) * plan.sfreq) * decim
    block = cut_epochs(signal, onset + begin - start, n_times=len(piece.times), decim=decim)
    if plan.baseline is None:
        block += offset.astype(np.float32)
        return block, signal
    low, high = (round(end * part.sfreq) for end in plan.find_baseline())
    for row, at in enumerate(onset - start):
        block[row] -= signal[:, at + low : at + high + 1].mean(axis=1, keepdims=True)
    return block, signal


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
