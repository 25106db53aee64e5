"""EEG and MEG data sets to the store, streamed: cut, whiten, write, never more than a few seconds in memory.

Owns the order of the steps and the bounds on what may be dropped. A loader gives lazy parts; each recording is read in
stretches of neighbouring events, cut into trials and written. With noise normalisation, the covariance of the training
trials of a session is summed on the way, and its trials are whitened in a second pass over what was written.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources import ContinuousPart, EpochPlan, MeegSource
from braindecode_vis.preprocessing.cutting import BLOCK_TRIALS, Piece, iterate_trials, plan_part
from braindecode_vis.preprocessing.whitening import (
    CovarianceSum,
    Whitener,
    compute_condition_weights,
    make_whitener,
)
from braindecode_vis.store import write_json, write_stimuli

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
    pieces = [plan_part(part, plan) for part in source.parts]
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
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"{self.path} could not be written ({error.strerror}); free some space."
            ) from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` as float32."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        self.file.seek(self.offset + start * self.row_bytes)
        while view:
            view = view[self.file.readinto(view) :]
        return out.astype(np.float32, copy=False)


def _write_plain(
    session: list[Piece], plan: EpochPlan, writer: _ArrayFile, start: int, advance: Advance | None
) -> None:
    for piece in session:
        for block in iterate_trials(piece, plan):
            writer.write(start, block)
            start += len(block)
            if advance is not None:
                advance(len(block))


def _write_whitened(
    session: list[Piece],
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
        for block in iterate_trials(piece, plan):
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
    for first in range(0, n, BLOCK_TRIALS):
        last = min(first + BLOCK_TRIALS, n)
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
    if source.notes.get("warnings"):
        coords["warnings"] = list(source.notes["warnings"])  # what every report on these trials must say
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
    """Return the sensor positions in m, shape (n_channels, 3), in head coordinates.

    Those of the source, or of the 10-05 system.
    """
    if source.ch_pos is not None:
        return np.asarray(source.ch_pos, dtype=np.float64)
    import mne

    # MNE 1.13 renamed the template of the 10-05 system.
    name = next(n for n in ("colin27_1005", "standard_1005") if n in mne.channels.get_builtin_montages())
    montage = mne.channels.make_standard_montage(name)
    unknown = [name for name in source.ch_names if name not in montage.ch_names]
    if unknown:
        raise DataError(
            f"the channel(s) {', '.join(unknown)} of {source.parts[0].where} are not in the 10-05 system, "
            "so their positions are unknown: the montage is another one."
        )
    info = mne.create_info(list(source.ch_names), 1.0, "eeg")
    info.set_montage(montage)  # moves the template to head coordinates
    return np.stack([channel["loc"][:3] for channel in info["chs"]])
