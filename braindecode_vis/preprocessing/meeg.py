"""Writes EEG and MEG data sets to the store: clean, cut, whiten, scale, write, with a few seconds in memory at a time.

Defines the order of the steps and the limits of dropped events. A loader gives lazy parts; each recording is read in
stretches of neighbouring events, cut into trials and written. With noise normalisation, the covariance of the training
trials of a session is summed at the same time, and its trials are whitened in a second pass over the written file; it
may use more channels than are stored. Scaling is the last pass. The noise ceiling of each subject is written beside the
trials. The state of a finished session is kept beside its trials until all are written, so that a killed call continues
after it.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Progress, count_steps
from braindecode_vis.base.store import json_plain, write_json, write_stimuli
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochPlan,
    MeegSource,
    find_channels,
    make_template_montage,
    replace_trials,
)
from braindecode_vis.preprocessing.array_file import ArrayFile, KeptParts, tell_kept
from braindecode_vis.preprocessing.epochs import BLOCK_TRIALS, Piece, iterate_trials, plan_part
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.noise_ceiling import write_epochs_ceilings
from braindecode_vis.preprocessing.scaling import ChannelScales, scale_trials
from braindecode_vis.preprocessing.signal_damage import DamageWatch, make_watch, settle_missing
from braindecode_vis.preprocessing.whitening import (
    CovarianceSum,
    Whitener,
    compute_condition_weights,
    make_whitener,
)

Advance = Callable[[int, str], None]


@runtime_checkable
class EpochsDataset(Protocol):
    """A data set configuration that opens its recordings lazily."""

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the lazy source."""
        ...


def write_meeg(
    config: EpochsDataset,
    folder: Path,
    *,
    progress: Progress | None = None,
    learnt: LearntStatistics | None = None,
    transductive: bool = False,
    parts: Path | None = None,
) -> dict[str, Any]:
    """Read a data set and write responses and stimuli below `folder`.

    Parameters
    ----------
    config
        Configuration of the data set.
    folder
        Folder for ``responses`` and ``stimuli``; created if needed.
    progress
        Called with the number of trials read and whitened, the total number, and a text.
    learnt
        Whitening and scaling of a finished run, which are applied instead of new ones.
    transductive
        Learn them from all trials, training and test.
    parts
        Keeps finished sessions on the disk of `folder`, so that a killed call can be continued; named by a digest of
        everything that determines the result, and removed by the caller. None keeps nothing.

    Returns
    -------
    summary
        Numbers of trials, of dropped events, and bytes written.
    """
    scratch = folder / "scratch"
    try:
        source = config.open_epochs(scratch)
        if transductive:
            own = [replace_trials(part, part.trials.assign(split="train")) for part in source.parts]
            source = replace(source, parts=tuple(own))
        watch = make_watch(config)
        settle_missing(config, source.parts, watch)
        return write_source(
            source, folder, scratch=scratch, progress=progress, learnt=learnt, watch=watch, parts=parts
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_source(
    source: MeegSource,
    folder: Path,
    *,
    scratch: Path,
    progress: Progress | None = None,
    learnt: LearntStatistics | None = None,
    watch: DamageWatch | None = None,
    parts: Path | None = None,
) -> dict[str, Any]:
    """Stream a source into ``responses`` and ``stimuli`` below `folder`; see `write_meeg`."""
    plan = source.plan
    if learnt is not None:
        if plan.cleaning.ica is not None or plan.cleaning.autoreject is not None:
            raise ConfigError(
                "components and thresholds of dataset.ica and dataset.autoreject are learnt from each session and not "
                "kept, so they cannot be applied to another recording; compute new ones from it with --whiten-new."
            )
        plan = replace(plan, mvnn="none", cleaning=replace(plan.cleaning, scaling=None))
        source = replace(source, plan=plan)
    if learnt is not None and learnt.noise_channels:
        source = read_recorded_channels(source, learnt.noise_channels)
    elif plan.mvnn != "none" and plan.mvnn_channels == "recorded":
        source = read_recorded_channels(source)
    pieces = [plan_part(part, plan) for part in source.parts]
    dropped = pd.concat([piece.dropped for piece in pieces], ignore_index=True)
    times = pieces[0].times
    # Rates like 1200 / 7 Hz round differently from file to file; half a millisecond is below any sample.
    for piece in pieces:
        if len(piece.times) != len(times) or not np.allclose(piece.times, times, atol=5e-4):
            raise DataError(f"{piece.part.where} has different times than {pieces[0].part.where}.")
    whitens = plan.mvnn != "none" and any(isinstance(piece.part, ContinuousPart) for piece in pieces)
    scaling = plan.cleaning.scaling
    unscaled = not whitens and scaling is None and (learnt is None or learnt.is_empty)
    if plan.dtype == "float16" and unscaled and source.unit in ("V", "T", "T/m"):
        raise ConfigError(
            f"float16 cannot hold responses in {source.unit}: set dtype to float32, or whiten with mvnn, or scale."
        )
    shape = (sum(len(piece.trials) for piece in pieces), len(source.ch_names), len(times))
    responses = folder / "responses"
    responses.mkdir(parents=True, exist_ok=True)
    written = _Written([], {}, dropped, watch or DamageWatch())
    sessions = [list(members) for _, members in groupby(pieces, key=lambda piece: piece.part.group)]
    # Trials in volt would lose their digits before they are scaled.
    is_rounded_later = plan.dtype == "float16" and scaling is not None
    dtype = np.dtype(np.float32 if is_rounded_later else plan.dtype)
    place = parts or (scratch if is_rounded_later else responses)
    kept = KeptParts(parts)
    with ExitStack() as files:
        held = files.enter_context(ArrayFile(place / "trials.npy", shape, dtype, continues=True))
        if not held.is_continued:
            kept.clear()
        found = [kept.read(f"session {number}") for number in range(len(sessions))]
        n_new = sum(
            sum(len(piece.trials) for piece in session)
            for session, packed in zip(sessions, found, strict=True)
            if packed is None
        )
        _check_space(folder, (n_new, *shape[1:]), plan)
        tell_kept(progress, found)
        advance = count_steps(progress, n_new * (2 if whitens else 1))
        n = 0
        for number, (session, packed) in enumerate(zip(sessions, found, strict=True)):
            written.watch.begin_session(session[0].part.group[0])
            if packed is not None:
                n += _restore_session(session, packed, written)
                continue
            drops = _write_session(session, source, held, n, scratch, advance, written, learnt)
            held.sync()
            kept.write(f"session {number}", **_pack_session(session, drops, written))
            n += sum(len(piece.trials) for piece in written.sessions[-1])
        trials = pd.concat([piece.trials for piece in written.pieces], ignore_index=True)
        writer = held
        if is_rounded_later:
            writer = files.enter_context(ArrayFile(responses / "data.npy", shape, np.dtype(plan.dtype)))
        elif scaling is not None or n < shape[0]:
            kept.clear()  # from here on the trials are no more what their sessions gave
        writer.shrink(n)  # autoreject may have left trials out
        scales = None if scaling is None else scale_trials(held, writer, trials, scaling)
    if is_rounded_later:
        held.path.unlink()
    else:
        shutil.move(held.path, responses / "data.npy")
    trials.to_parquet(responses / "trials.parquet", index=False)
    _write_meta(responses, source, times, written, scales, learnt)
    write_stimuli(folder / "stimuli", source.stimuli)
    data = np.load(responses / "data.npy", mmap_mode="r", allow_pickle=False)
    write_epochs_ceilings(
        responses, Responses.from_checked(data, ("trial", "channel", "time"), trials, source.unit, {})
    )
    return {"n_trials": n, "n_dropped": len(written.dropped), "n_bytes": int(writer.n_bytes)}


def read_recorded_channels(source: MeegSource, names: Sequence[str] | None = None) -> MeegSource:
    """Return the source with parts that read every brain sensor of their file; the stored channels do not change.

    Parameters
    ----------
    source
        Continuous parts; published epochs are not changed.
    names
        Channels to read, in this order; by default all sensors but bad ones that are not stored either.

    Raises
    ------
    DataError
        If one of `names` is missing in a file.
    """
    parts: list[Any] = []
    for part in source.parts:
        if not isinstance(part, ContinuousPart):
            return source
        sensors = part.sensors or part.own_sensors
        usable = names
        if usable is None:
            interpolated = source.plan.cleaning.interpolate
            usable = [n for n in sensors.ch_names if n in part.ch_names or interpolated or n not in part.bads]
        rows = find_channels(sensors.ch_names, usable, part.where)
        parts.append(replace(part, ch_names=tuple(usable), read=partial(_read_rows, sensors.read, rows)))
    return replace(source, parts=tuple(parts), stored=source.ch_names)


def _read_rows(read: Callable[[int, int], np.ndarray], rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    return np.asarray(read(start, stop))[rows]


# --- writing ----------------------------------------------------------------------------------------------


@dataclass
class _Written:
    """What has been written so far: pieces of each session as they are stored, whiteners, dropped events, damage."""

    sessions: list[list[Piece]]
    whiteners: dict[tuple[str, str], Whitener]
    dropped: pd.DataFrame
    watch: DamageWatch

    @property
    def pieces(self) -> list[Piece]:
        """Those of all sessions, in the order of the store."""
        return [piece for session in self.sessions for piece in session]


def _write_session(
    session: list[Piece],
    source: MeegSource,
    writer: ArrayFile,
    start: int,
    scratch: Path,
    advance: Advance,
    written: _Written,
    learnt: LearntStatistics | None,
) -> list[np.ndarray]:
    """Clean, cut and whiten one session, and write it from row `start` on; returns the bad trials of its pieces."""
    plan, group = source.plan, session[0].part.group
    drops: list[np.ndarray] = []
    is_continuous = isinstance(session[0].part, ContinuousPart)
    files: list[Path] = []
    if is_continuous and plan.cleaning.changes_samples:
        from braindecode_vis.preprocessing.cleaning import clean_pieces

        names = session[0].part.ch_names
        session, files = clean_pieces(session, plan, scratch, written.watch)
        if plan.cleaning.ica is not None:
            from braindecode_vis.preprocessing.artefacts import remove_eye_components

            session = remove_eye_components(session, names, plan, scratch)
    if is_continuous and plan.cleaning.autoreject is not None:
        from braindecode_vis.preprocessing.artefacts import leave_out, reject_trials

        session, drops = reject_trials(session, plan)
        session, rejected = leave_out(session, drops)
        written.dropped = pd.concat([written.dropped, rejected], ignore_index=True)
    if is_continuous and plan.mvnn != "none":
        written.whiteners[group] = _write_whitened(
            session, source, writer, start, scratch, advance, written.watch
        )
    else:
        row = start
        for piece in session:
            for block in iterate_trials(piece, plan, written.watch, unit=source.unit):
                writer.write(row, block if learnt is None else learnt.apply(block, *group))
                row += len(block)
                advance(len(block), f"reading {piece.part.where}")
    for path in files:
        path.unlink()
    written.sessions.append(session)
    return drops


def _pack_session(session: list[Piece], drops: list[np.ndarray], written: _Written) -> dict[str, Any]:
    """Return the state of the session that was just written, as arrays and text."""
    whitener = written.whiteners.get(session[0].part.group)
    return {
        **{f"drop{n}": drop for n, drop in enumerate(drops)},
        "notes": json.dumps(json_plain([dict(piece.notes) for piece in written.sessions[-1]])),
        **({} if whitener is None else {"covariance": whitener.covariance, "whitening": whitener.matrix}),
        **written.watch.pack_session(),
    }


def _restore_session(session: list[Piece], packed: Mapping[str, np.ndarray], written: _Written) -> int:
    """Restore a session that an earlier process has written; returns the number of its trials."""
    written.watch.unpack_session(packed)
    if "drop0" in packed:
        from braindecode_vis.preprocessing.artefacts import leave_out

        drops = [packed[f"drop{n}"] for n in range(len(session))]
        session, rejected = leave_out(session, drops)
        written.dropped = pd.concat([written.dropped, rejected], ignore_index=True)
    if "whitening" in packed:
        group = session[0].part.group
        written.whiteners[group] = Whitener(packed["covariance"], packed["whitening"])
    notes = json.loads(str(packed["notes"]))
    written.sessions.append([replace(piece, notes=own) for piece, own in zip(session, notes, strict=True)])
    return sum(len(piece.trials) for piece in session)


def _write_whitened(
    session: list[Piece],
    source: MeegSource,
    writer: ArrayFile,
    start: int,
    scratch: Path,
    advance: Advance,
    watch: DamageWatch,
) -> Whitener:
    """Cut one session, fit the noise covariance on its training trials, and whiten all of them."""
    plan, rows = source.plan, source.rows
    n_channels = len(session[0].part.ch_names)
    trials = pd.concat([piece.trials for piece in session], ignore_index=True)
    n = len(trials)
    is_train = trials["split"].to_numpy() == "train"
    if not is_train.any():
        raise DataError(
            f"{session[0].part.where} has no training trial to fit the noise on; set mvnn to none."
        )
    # Every training image weighs one, however often it was shown; test trials weigh nothing.
    weights = np.zeros(n)
    weights[is_train] = compute_condition_weights(trials["stimulus_id"].to_numpy(str)[is_train])
    held, base = writer, start
    # Trials in volt would lose their digits before they are whitened, and more channels do not fit into the store.
    if writer.dtype == np.float16 or rows is not None:
        scratch.mkdir(parents=True, exist_ok=True)
        held = ArrayFile(scratch / "session.npy", (n, n_channels, writer.shape[2]), np.dtype(np.float32))
        base = 0
    total = CovarianceSum(n_channels)
    done = 0
    for piece in session:
        for block in iterate_trials(piece, plan, watch, unit=source.unit):
            held.write(base + done, block)
            is_training = weights[done : done + len(block)] > 0
            if plan.mvnn == "epochs" and is_training.any():
                total.add(block[is_training], weights[done : done + len(block)][is_training])
            done += len(block)
            advance(len(block), f"reading {piece.part.where}")
    if plan.mvnn == "time":
        # Repetitions of an image lie anywhere in the session, so they are read back from what was written.
        rows_of = defaultdict(list)
        for row, stimulus_id in zip(
            np.flatnonzero(is_train).tolist(), trials["stimulus_id"][is_train], strict=True
        ):
            rows_of[stimulus_id].append(base + row)
        for places in rows_of.values():
            total.add_condition(np.concatenate([held.read(row, row + 1) for row in places]))
    try:
        whitener = make_whitener(total.finish())
    except DataError as error:
        raise DataError(f"{session[0].part.where}: {error}") from error
    for first in range(0, n, BLOCK_TRIALS):
        last = min(first + BLOCK_TRIALS, n)
        writer.write(start + first, whitener.apply(held.read(base + first, base + last), rows))
        advance(last - first, f"whitening {session[0].part.where}")
    if held is not writer:
        held.close()
        held.path.unlink()
    return whitener


def _check_space(folder: Path, shape: tuple[int, ...], plan: EpochPlan) -> None:
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(plan.dtype).itemsize
    if plan.dtype == "float16" and plan.cleaning.scaling is not None:
        needed *= 3  # the trials in float32 lie beside them until they are scaled
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
    written: _Written,
    scales: ChannelScales | None,
    learnt: LearntStatistics | None = None,
) -> None:
    """Write ``meta.json`` and the array coordinates, as `store.read_responses` reads them."""
    plan, whiteners = source.plan, written.whiteners
    arrays = {"times": times, "ch_pos": find_positions(source)}
    coords: dict[str, Any] = {
        "modality": source.modality,
        "ch_names": list(source.ch_names),
        # From the times themselves: published epochs know no other rate.
        "sfreq": round(1 / float(np.median(np.diff(times))), 6) if len(times) > 1 else plan.sfreq,
    }
    # What every report on these trials must say.
    if warnings := [*source.notes.get("warnings", ()), *written.watch.describe()]:
        coords["warnings"] = warnings
    if whiteners:
        arrays["whitening"] = np.stack([w.matrix for w in whiteners.values()])
        coords["whitening_sessions"] = [list(group) for group in whiteners]
        if source.stored is not None:  # the matrices are of more channels than the trials
            coords["whitening_channels"] = list(source.parts[0].ch_names)
    if scales is not None:
        arrays |= {"scaling_centre": scales.centre, "scaling_scale": scales.scale}
        coords["scaling_groups"] = [list(group) for group in scales.groups]
    for key, value in arrays.items():
        np.save(responses / f"coord_{key}.npy", value, allow_pickle=False)
    files = [path for part in source.parts for path in part.files]
    provenance = {
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "cleaning"},
        "cleaning": plan.cleaning.as_json(),
        "files": ["/".join(path.parts[-3:]) for path in files],
        "recorded_unit": source.unit,
        # Whoever decodes a stream must cut it alike, which epochs of a publisher do not tell how.
        "continuous": all(isinstance(part, ContinuousPart) for part in source.parts),
        "found": {
            piece.part.recording.files[0].name: dict(piece.notes)
            for piece in written.pieces
            if piece.notes and isinstance(piece.part, ContinuousPart)
        },
        "dropped": written.dropped[["subject", "session", "file", "stimulus_id", "reason"]].to_dict(
            "records"
        ),
        **({"damage": written.watch.as_json()} if written.watch.findings else {}),
        **source.notes,
    }
    unit = scales.unit if scales is not None else "whitened" if whiteners else source.unit
    if learnt is not None and not learnt.is_empty:
        unit = learnt.unit
    write_json(
        responses / "meta.json",
        {
            "dims": ["trial", "channel", "time"],
            "unit": unit,
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

    montage = make_template_montage()
    unknown = [name for name in source.ch_names if name not in montage.ch_names]
    if unknown:
        raise DataError(
            f"the channel(s) {', '.join(unknown)} of {source.parts[0].where} are not in the 10-05 system, "
            "so their positions are unknown: the recording used another montage."
        )
    info = mne.create_info(list(source.ch_names), 1.0, "eeg")
    info.set_montage(montage)  # moves the template to head coordinates
    return np.stack([channel["loc"][:3] for channel in info["chs"]])
