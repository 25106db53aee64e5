"""fMRI data sets to the store, streamed session by session: average over parcels, standardise, write.

Owns the order of the steps and where their statistics come from. A loader gives lazy parts; each is read in blocks of
trials and written to ``responses/data.npy``, and the moments of the training trials are summed on the way. A session is
standardised in a second pass over what was written. Sessions (or runs) without a training trial wait until all others of
their subject are done. Repetitions stay single: averaging them is a later stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from braindecode_vis.arrays import TRIAL_COLUMNS
from braindecode_vis.checks import DataError
from braindecode_vis.datasets.fmri_sources import BetasPart, BetasPlan, FmriSource, Geometry
from braindecode_vis.preprocessing.geometry import average_parcels, place_in_parcels
from braindecode_vis.stimuli import StimulusSet, hash_pixels
from braindecode_vis.store import write_json, write_stimuli

_BLOCK_BYTES = 32 << 20
_FLOAT16_MAX = 65504.0
Advance = Callable[[int], Any]


class Preparable(Protocol):
    """A data set configuration that opens its files lazily."""

    def prepare(self) -> FmriSource:
        """Return the lazy source."""
        ...


def write_fmri(
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
        `n_trials`, `n_features`, `n_bytes`, and `protocol` where the source states one.

    Raises
    ------
    DataError
        If a response is not finite, does not fit the type, or the disk is too small; the message names the file.
    """
    return write_fmri_source(config.prepare(), folder, advance=advance)


def write_fmri_source(source: FmriSource, folder: Path, *, advance: Advance | None = None) -> dict[str, Any]:
    """Stream a source into ``responses`` and ``stimuli`` below `folder`; see `write_fmri`."""
    plan = source.plan
    geometries, left_out = place_in_parcels(
        {subject: source.find_geometry(subject) for subject in source.subjects}, plan.atlas
    )
    first = geometries[source.subjects[0]]
    n_features = first.n_voxels if first.parcels is None else len(first.parcels.names)
    shape: tuple[int, ...] = (source.n_trials, n_features)
    if source.times is not None:
        shape = (*shape, len(source.times))
    responses = folder / "responses"
    responses.mkdir(parents=True, exist_ok=True)
    _check_space(folder, shape, source)
    trials = pd.concat([_order_columns(part.trials) for part in source.parts], ignore_index=True)
    rows = _Rows(responses / "data.npy", shape, np.dtype(plan.dtype))
    scratch = folder / "scratch"
    try:
        scaling = _write_parts(source, geometries, rows, scratch, advance)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    trials.to_parquet(responses / "trials.parquet", index=False)
    _write_meta(responses, source, geometries, {"parcels_without_voxels": left_out, **scaling})
    _write_images(folder / "stimuli", source)
    summary = {"n_trials": shape[0], "n_features": n_features, "n_bytes": rows.path.stat().st_size}
    return summary | {key: source.notes[key] for key in ("protocol",) if key in source.notes}


def _order_columns(trials: pd.DataFrame) -> pd.DataFrame:
    return trials[[*TRIAL_COLUMNS, *(c for c in trials.columns if c not in TRIAL_COLUMNS)]]


# --- rows on disk -----------------------------------------------------------------------------------------


class _Rows:
    """A ``.npy`` file of which only a block of rows is mapped at a time, so that it never counts as memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def write(self, start: int, values: np.ndarray) -> None:
        """Write rows from `start` on."""
        if self.dtype == np.float16 and np.abs(values).max(initial=0) > _FLOAT16_MAX:
            raise DataError("a response is too large for float16; set dataset.dtype to float32.")
        np.load(self.path, mmap_mode="r+", allow_pickle=False)[start : start + len(values)] = values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` as float32."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[start:stop], dtype=np.float32)


def _split(n: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of `n` trials that hold `row` numbers each."""
    size = max(1, _BLOCK_BYTES // (4 * row))
    for first in range(0, n, size):
        yield first, min(first + size, n)


def _check_space(folder: Path, shape: tuple[int, ...], source: FmriSource) -> None:
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(source.plan.dtype).itemsize
    if source.read_image is not None:
        needed += len(source.stimuli) * source.read_image(0).nbytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{shape[0]} trials of {shape[1]} features and {len(source.stimuli)} images need {needed / 1e9:.1f} GB, but "
            f"{folder} has {free / 1e9:.1f} GB free; choose another place with --out, a smaller mask or dtype float16."
        )


# --- standardising ----------------------------------------------------------------------------------------


class _Moments:
    """Sums over trials of each feature; with a time axis, over times too, so that a response keeps its shape."""

    def __init__(self, first: np.ndarray) -> None:
        # Raw BOLD sits on a large baseline, which would eat the digits of a sum of squares.
        self.shift = first.reshape(len(first), -1).mean(axis=1, dtype=np.float64)
        self.n_trials = self.n = 0
        self.total, self.squares = np.zeros(len(first)), np.zeros(len(first))

    def add(self, block: np.ndarray) -> None:
        """Add trials of shape (n_trials, n_features[, n_times])."""
        wide = block.reshape(*block.shape[:2], -1) - self.shift[:, None]
        self.n_trials += len(wide)
        self.n += wide.shape[0] * wide.shape[2]
        self.total += wide.sum(axis=(0, 2))
        self.squares += np.einsum("nft,nft->f", wide, wide)

    def finish(self) -> _Scale:
        """Return mean and variance."""
        mean = self.total / self.n
        return _Scale(mean + self.shift, np.maximum(self.squares / self.n - mean**2, 0))


@dataclass(frozen=True)
class _Scale:
    """Mean and variance of each feature, shape (n_features,)."""

    mean: np.ndarray
    variance: np.ndarray

    @property
    def is_constant(self) -> np.ndarray:
        """Features that do not vary beyond rounding, shape (n_features,)."""
        return np.sqrt(self.variance) <= 1e-6 * np.maximum(1e-6, np.abs(self.mean))

    def apply(self, block: np.ndarray) -> np.ndarray:
        """Return the standardised trials as float32; constant features become 0."""
        gain = np.where(self.is_constant, 0, 1 / np.sqrt(np.where(self.is_constant, 1, self.variance)))
        shape = (len(gain), *[1] * (block.ndim - 2))
        return (block - self.mean.astype(np.float32).reshape(shape)) * gain.astype(np.float32).reshape(shape)


def _pool(scales: list[_Scale]) -> _Scale:
    """Return the level and spread of an ordinary session."""
    return _Scale(np.mean([s.mean for s in scales], axis=0), np.mean([s.variance for s in scales], axis=0))


@dataclass(frozen=True)
class _Waiting:
    """Rows of one session or run without training trials, and where they are kept until the others are done."""

    subject: str
    name: str
    held: _Rows
    base: int
    start: int
    rows: np.ndarray


@dataclass
class _Progress:
    """What has been standardised, and what waits."""

    target: _Rows
    scratch: Path
    scales: dict[str, list[_Scale]] = field(default_factory=dict)
    waiting: list[_Waiting] = field(default_factory=list)
    transductive: list[str] = field(default_factory=list)
    constant: int = 0


def _write_parts(
    source: FmriSource, geometries: Mapping[str, Geometry], target: _Rows, scratch: Path, advance: Advance | None
) -> dict[str, Any]:
    """Write and standardise every session; return what the reader of the store should know of it."""
    progress, start = _Progress(target, scratch), 0
    for (subject, _), members in groupby(source.parts, key=lambda part: part.group):
        session = list(members)
        _write_session(session, source.plan, geometries[subject], start, progress, advance)
        start += sum(len(part.trials) for part in session)
    for item in progress.waiting:
        scales = progress.scales.get(item.subject)
        if not scales:
            raise DataError(
                f"subject {item.subject} has no training trial to standardise with; set dataset.zscore to none, "
                "or dataset.untrained to own, which uses the test trials themselves."
            )
        _apply(_pool(scales), item.held, item.base, target, item.start, item.rows)
    return {
        "standardised_with_other_sessions": [item.name for item in progress.waiting],
        "standardised_with_own_test_trials": progress.transductive,
        "constant_features": progress.constant,
    }


def _write_session(
    session: list[BetasPart],
    plan: BetasPlan,
    geometry: Geometry,
    start: int,
    progress: _Progress,
    advance: Advance | None,
) -> None:
    """Write the trials of one session from row `start` on, and standardise what has training trials."""
    trials = pd.concat([part.trials for part in session], ignore_index=True)
    target = progress.target
    held, base = target, start
    if plan.zscore != "none" and target.dtype == np.float16:  # rounded after standardising, not before
        path = progress.scratch / f"session-{start}.npy"
        held, base = _Rows(path, (len(trials), *target.shape[1:]), np.dtype(np.float32)), 0
    by_run = plan.zscore == "run"
    keys = trials["run"].to_numpy(str) if by_run else np.full(len(trials), "session")
    is_train = trials["split"].to_numpy() == "train"
    moments: dict[str, _Moments] = {}
    done = 0
    for part in session:
        for block in _iterate_blocks(part, geometry, target.shape):
            held.write(base + done, block)
            here = slice(done, done + len(block))
            if plan.zscore != "none":
                uses = is_train[here] if plan.untrained == "pooled" else np.ones(len(block), bool)
                _add(moments, block, keys[here], is_train[here])
            done += len(block)
            if advance is not None:
                advance(len(block))
    if plan.zscore == "none":
        return
    subject, name = session[0].group
    for key in dict.fromkeys(keys):
        rows = np.flatnonzero(keys == key)
        label = f"subject {subject}, session {name}" + (f", run {key}" if by_run else "")
        if key in moments and moments[key].n_trials > 1:
            scale = moments[key].finish()
            progress.scales.setdefault(subject, []).append(scale)
            progress.constant = max(progress.constant, int(scale.is_constant.sum()))
        elif plan.untrained == "own":
            scale = _fit_rows(held, base + rows)
            progress.transductive.append(label)
        else:
            progress.waiting.append(_Waiting(subject, label, held, base, start, rows))
            continue
        _apply(scale, held, base, target, start, rows)
    if held is not target and all(item.held is not held for item in progress.waiting):
        held.path.unlink()
