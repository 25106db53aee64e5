"""EEG and MEG data sets to the store, streamed: cut, whiten, write, never more than a few seconds in memory.

Owns the order of the steps and the bounds on what may be dropped. A loader gives lazy parts; each recording is read in
stretches of neighbouring events, cut into trials and written. With noise normalisation, the covariance of the training
trials of a session is summed on the way, and its trials are whitened in a second pass over what was written.

Joined recordings: no filter ever sees samples between two stretches of events, because a stretch ends where the next
event's epoch does not touch. Where the gap between two events is unusually long, jumps in most channels at once are
looked for next to the epochs; samples beyond a jump are never used, and an epoch that contains one is dropped.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from braindecode_vis.arrays import TRIAL_COLUMNS
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources import ContinuousPart, EpochedPart, EpochPlan, MeegSource
from braindecode_vis.preprocessing.epochs import (
    cut_epochs,
    find_decimation,
    find_steps,
    make_antialias_filter,
)
from braindecode_vis.preprocessing.whitening import (
    CovarianceSum,
    Whitener,
    compute_condition_weights,
    make_whitener,
)
from braindecode_vis.store import write_json, write_stimuli

_STRETCH_S = 30.0  # longest piece of a recording that is read at once
_BLOCK_TRIALS = 256
_FLOAT16_MAX = 65504.0
Advance = Callable[[int], Any]


@runtime_checkable
class Preparable(Protocol):
    """A data set configuration that opens its recordings lazily."""

    def prepare(self, scratch: Path | None = None) -> MeegSource:
        """Return the lazy source."""
        ...


def write_meeg(
    config: Preparable, folder: Path, *, seed: int = 0, advance: Advance | None = None
) -> dict[str, Any]:
    """Read a data set and write responses and stimuli below `folder`.

    Parameters
    ----------
    config
        Configuration of the data set.
    folder
        Where ``responses`` and ``stimuli`` are written; made if needed.
    seed
        Unused: nothing here is random.
    advance
        Called with the number of trials done since the last call.

    Returns
    -------
    summary
        Numbers of trials, of dropped events, and bytes written.
    """
    scratch = folder / "scratch"
    try:
        source = config.prepare(scratch)
        return write_source(source, folder, scratch=scratch, advance=advance)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_source(
    source: MeegSource, folder: Path, *, scratch: Path, advance: Advance | None = None
) -> dict[str, Any]:
    """Stream a source into ``responses`` and ``stimuli`` below `folder`; see `write_meeg`."""
    plan = source.plan
    pieces = [_plan_part(part, plan) for part in source.parts]
    dropped = pd.concat([piece.dropped for piece in pieces], ignore_index=True)
    trials = pd.concat([piece.trials for piece in pieces], ignore_index=True)
    times = pieces[0].times
    for piece in pieces:
        if len(piece.times) != len(times) or not np.allclose(piece.times, times, atol=5e-4):
            raise DataError(f"{piece.part.where} has other times than {pieces[0].part.where}.")
    whitens = plan.mvnn != "none" and any(isinstance(piece.part, ContinuousPart) for piece in pieces)
    if plan.dtype == "float16" and not whitens and source.unit in ("V", "T"):
        raise ConfigError(
            f"float16 cannot hold responses in {source.unit}: set dtype to float32, or whiten with mvnn."
        )
    shape = (len(trials), len(source.ch_names), len(times))
    responses = folder / "responses"
    responses.mkdir(parents=True, exist_ok=True)
    _check_space(folder, shape, plan)
    whiteners: dict[tuple[str, str], Whitener] = {}
    writer = _ArrayFile(responses / "data.npy", shape, np.dtype(plan.dtype))
    start = 0
    with writer:
        for group, members in groupby(pieces, key=lambda piece: piece.part.group):
            session = list(members)
            n = sum(len(piece.trials) for piece in session)
            if isinstance(session[0].part, ContinuousPart) and plan.mvnn != "none":
                whiteners[group] = _write_whitened(session, plan, writer, start, scratch, advance)
            else:
                _write_plain(session, plan, writer, start, advance)
            start += n
    trials.to_parquet(responses / "trials.parquet", index=False)
    _write_meta(responses, source, times, whiteners, dropped)
    write_stimuli(folder / "stimuli", source.stimuli)
    return {"n_trials": len(trials), "n_dropped": len(dropped), "n_bytes": int(writer.n_bytes)}


# --- planning ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
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
    """

    part: ContinuousPart | EpochedPart
    trials: pd.DataFrame
    dropped: pd.DataFrame
    times: np.ndarray
    bounds: np.ndarray
    keep: np.ndarray


def _plan_part(part: ContinuousPart | EpochedPart, plan: EpochPlan) -> _Piece:
    if isinstance(part, EpochedPart):
        low, high = plan.window
        keep = np.flatnonzero((part.times > low - 1e-6) & (part.times < high - 1e-6))
        if not len(keep):
            raise ConfigError(
                f"{part.where} has times from {part.times[0]:g} to {part.times[-1]:g} s, none in {plan.window}."
            )
        none = part.trials.iloc[:0].assign(reason="", file="")
        return _Piece(part, part.trials, none, part.times[keep], np.empty((0, 2), int), keep)
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
    return _Piece(
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
    if len(onset) < 2:
        return bounds, np.empty(0, int)
    gaps = np.diff(onset)
    long = np.flatnonzero(gaps > 1.5 * np.median(gaps))
    first, last = _find_extent(part, plan)
    half = len(make_antialias_filter(find_decimation(part.sfreq, plan.sfreq))) // 2
    length = min(part.n_samples, onset[0] + round(10 * part.sfreq))
    start = max(0, min(onset[0], length - 2))
    typical = np.median(np.abs(np.diff(part.read(int(start), int(length)), axis=1)), axis=1)
    seams = []
    for gap in long:
        stop_after = min(onset[gap + 1], onset[gap] + last + half + 1)
        start_before = max(onset[gap], onset[gap + 1] + first - half)
        spans = [(onset[gap], stop_after), (start_before, onset[gap + 1])]
        if start_before <= stop_after:
            spans = [(onset[gap], onset[gap + 1])]
        for low, high in spans:
            signal = part.read(int(low), int(high))
            if len(find_steps(signal, typical)):
                # A join stands out from its surroundings too; in a noisy stretch every step is large.
                local = np.median(np.abs(np.diff(signal, axis=1)), axis=1)
                seams.extend((find_steps(signal, np.maximum(typical, local)) + low).tolist())
    found = np.unique(np.array(seams, dtype=np.int64))
    if len(found):
        edges = np.r_[0, found, part.n_samples]
        at = np.searchsorted(edges, onset, side="right")
        bounds = np.stack([edges[at - 1], edges[at]], axis=1)
    return bounds, found


# --- cutting ----------------------------------------------------------------------------------------------


def _iterate_trials(piece: _Piece, plan: EpochPlan) -> Iterator[np.ndarray]:
    """Yield the trials of a part in order, float32 blocks of shape (n, n_channels, n_times), checked to be finite."""
    if isinstance(piece.part, EpochedPart):
        for start in range(0, len(piece.trials), _BLOCK_TRIALS):
            block = piece.part.read(start, min(start + _BLOCK_TRIALS, len(piece.trials)))
            block = np.ascontiguousarray(block[..., piece.keep], dtype=np.float32)
            _check_block(block, piece, start)
            yield block
        return
    part, done = piece.part, 0
    low, high = np.full(len(part.ch_names), np.inf), np.full(len(part.ch_names), -np.inf)
    for rows in _group_events(piece, plan):
        block, signal = _cut_stretch(piece, rows, plan)
        _check_block(block, piece, done)
        low, high = np.minimum(low, signal.min(axis=1)), np.maximum(high, signal.max(axis=1))
        done += len(rows)
        yield block
    flat = [name for name, a, b in zip(part.ch_names, low, high, strict=True) if a == b]
    if flat:
        raise DataError(
            f"{part.where}: the channel(s) {', '.join(flat)} are flat throughout; leave them out with dataset.channels."
        )


def _group_events(piece: _Piece, plan: EpochPlan) -> Iterator[np.ndarray]:
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


def _cut_stretch(piece: _Piece, rows: np.ndarray, plan: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
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


def _check_block(block: np.ndarray, piece: _Piece, start: int) -> None:
    if np.isfinite(block.sum(dtype=np.float64)):
        return
    trial, channel, _ = (int(axis[0]) for axis in np.nonzero(~np.isfinite(block)))
    row = piece.trials.iloc[start + trial]
    at = f" at {row['onset']:.3f} s" if "onset" in piece.trials else ""
    raise DataError(
        f"{piece.part.where}: channel {piece.part.ch_names[channel]} is not finite in the trial of "
        f"{row['stimulus_id']}{at}; repair the file, or leave the channel out with dataset.channels."
    )


# --- writing ----------------------------------------------------------------------------------------------


class _ArrayFile:
    """A ``.npy`` file that is written and read row by row, without a memory map that would count as memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.file = path.open("w+b", buffering=0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        self.offset = self.file.tell()
        self.row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        self.n_bytes = self.offset + shape[0] * self.row_bytes
        self.file.truncate(self.n_bytes)

    def __enter__(self) -> _ArrayFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, start: int, block: np.ndarray) -> None:
        """Write rows from `start` on."""
        if self.dtype == np.float16 and (np.abs(block).max(initial=0) > _FLOAT16_MAX):
            raise DataError("a response is too large for float16; set dtype to float32.")
        self.file.seek(self.offset + start * self.row_bytes)
        rest = np.ascontiguousarray(block, dtype=self.dtype).reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[self.file.write(rest) :]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` as float32."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        self.file.seek(self.offset + start * self.row_bytes)
        while view:
            view = view[self.file.readinto(view) :]
        return out.astype(np.float32, copy=False)


def _write_plain(
    session: list[_Piece], plan: EpochPlan, writer: _ArrayFile, start: int, advance: Advance | None
) -> None:
    for piece in session:
        for block in _iterate_trials(piece, plan):
            writer.write(start, block)
            start += len(block)
            if advance is not None:
                advance(len(block))


def _write_whitened(
    session: list[_Piece],
    plan: EpochPlan,
    writer: _ArrayFile,
    start: int,
    scratch: Path,
    advance: Advance | None,
) -> Whitener:
    """Cut one session, fit the noise covariance on its training trials, and whiten all of them."""
    trials = pd.concat([piece.trials for piece in session], ignore_index=True)
    n = len(trials)
    is_train = trials["split"].to_numpy() == "train"
    if not is_train.any():
        raise DataError(
            f"{session[0].part.where} has no training trial to fit the noise on; set mvnn to none."
        )
    weights = np.zeros(n)
    weights[is_train] = compute_condition_weights(trials["stimulus_id"].to_numpy(str)[is_train])
    held, base = writer, start
    if writer.dtype == np.float16:  # trials in volt would lose their digits before they are whitened
        scratch.mkdir(parents=True, exist_ok=True)
        held, base = _ArrayFile(scratch / "session.npy", (n, *writer.shape[1:]), np.dtype(np.float32)), 0
    total = CovarianceSum(writer.shape[1])
    done = 0
    for piece in session:
        for block in _iterate_trials(piece, plan):
            held.write(base + done, block)
            teaches = weights[done : done + len(block)] > 0
            if plan.mvnn == "epochs" and teaches.any():
                total.add(block[teaches], weights[done : done + len(block)][teaches])
            done += len(block)
    if plan.mvnn == "time":
        _add_conditions(total, held, base, trials["stimulus_id"].to_numpy(str), is_train)
    try:
        whitener = make_whitener(total.finish())
    except DataError as error:
        raise DataError(f"{session[0].part.where}: {error}") from error
    for first in range(0, n, _BLOCK_TRIALS):
        last = min(first + _BLOCK_TRIALS, n)
        writer.write(start + first, whitener.apply(held.read(base + first, base + last)))
        if advance is not None:
            advance(last - first)
    if held is not writer:
        held.file.close()
        held.path.unlink()
    return whitener


def _add_conditions(
    total: CovarianceSum, held: _ArrayFile, base: int, ids: np.ndarray, is_train: np.ndarray
) -> None:
    rows_of = defaultdict(list)
    for row in np.flatnonzero(is_train):
        rows_of[ids[row]].append(base + int(row))
    for rows in rows_of.values():
        total.add_condition(np.concatenate([held.read(row, row + 1) for row in rows]))


def _check_space(folder: Path, shape: tuple[int, ...], plan: EpochPlan) -> None:
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(plan.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{shape[0]} trials need {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; choose another "
            "place with --out, fewer subjects or channels, or dtype float16."
        )


def _write_meta(
    responses: Path,
    source: MeegSource,
    times: np.ndarray,
    whiteners: dict[tuple[str, str], Whitener],
    dropped: pd.DataFrame,
) -> None:
    """Write ``meta.json`` and the array coordinates, as `store.read_responses` reads them."""
    plan = source.plan
    arrays = {"times": times, "ch_pos": find_positions(source)}
    coords: dict[str, Any] = {
        "modality": source.modality,
        "ch_names": list(source.ch_names),
        "sfreq": round(1 / float(np.median(np.diff(times))), 6) if len(times) > 1 else plan.sfreq,
    }
    if whiteners:
        arrays["whitening"] = np.stack([w.matrix for w in whiteners.values()])
        coords["whitening_sessions"] = [list(group) for group in whiteners]
    for key, value in arrays.items():
        np.save(responses / f"coord_{key}.npy", value, allow_pickle=False)
    files = [
        path
        for part in source.parts
        for path in (part.recording if isinstance(part, ContinuousPart) else part).files
    ]
    provenance = {
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
        "files": ["/".join(path.parts[-3:]) for path in files],
        "dropped": dropped[["subject", "session", "file", "stimulus_id", "reason"]].to_dict("records"),
        **source.notes,
    }
    write_json(
        responses / "meta.json",
        {
            "dims": ["trial", "channel", "time"],
            "unit": "whitened" if whiteners else source.unit,
            "coords": coords,
            "array_coords": list(arrays),
            "provenance": provenance,
        },
    )


def find_positions(source: MeegSource) -> np.ndarray:
    """Return the sensor positions (m), shape (n_channels, 3): those of the source, or of the 10-05 system."""
    if source.ch_pos is not None:
        return np.asarray(source.ch_pos, dtype=np.float64)
    import mne

    # MNE 1.13 renamed the template of the 10-05 system.
    name = next(n for n in ("colin27_1005", "standard_1005") if n in mne.channels.get_builtin_montages())
    known = mne.channels.make_standard_montage(name).get_positions()["ch_pos"]
    unknown = [name for name in source.ch_names if name not in known]
    if unknown:
        raise DataError(
            f"the channel(s) {', '.join(unknown)} of {source.parts[0].where} are not in the 10-05 system, "
            "so their positions are unknown: the montage is another one."
        )
    return np.stack([known[name] for name in source.ch_names])
