"""Writes fMRI data sets to the store, session by session: average over parcels, standardise, write.

Defines the order of the steps and the source of their statistics. A loader gives lazy parts; each is read in blocks of
trials and written to ``responses/data.npy``, and the moments of the training trials are summed at the same time. A
session is standardised in a second pass over the written file. Sessions (or runs) without a training trial are
standardised after all others of their subject. Repetitions are not averaged here; this is a later stage. The state of a
finished session is kept beside its trials until all are written, so that a killed call continues after it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import TRIAL_COLUMNS
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Progress, count_steps
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.base.store import write_json, write_stimuli
from braindecode_vis.datasets.sources.betas_source import BetasPart, BetasPlan, FmriSource, Geometry
from braindecode_vis.preprocessing.array_file import ArrayFile, KeptParts, tell_kept
from braindecode_vis.preprocessing.learnt_statistics import (
    ZSCORE_MEAN,
    ZSCORE_VARIANCE,
    LearntStatistics,
    ZScoreGroup,
)
from braindecode_vis.preprocessing.parcellation import average_parcels, place_in_parcels
from braindecode_vis.preprocessing.scaling import (
    FeatureMoments,
    FeatureStatistics,
    fit_rows,
    pool_statistics,
    split_rows,
    standardise_rows,
)
from braindecode_vis.preprocessing.signal_damage import (
    DamageWatch,
    make_watch,
    settle_blank_images,
    settle_missing,
)

Advance = Callable[[int, str], None]


@runtime_checkable
class BetasDataset(Protocol):
    """A data set configuration that opens its files lazily."""

    def open_betas(self) -> FmriSource:
        """Return the lazy source."""
        ...


def write_fmri(
    config: BetasDataset,
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
        Called with the number of trials read, the total number, and a text.
    learnt
        Means and variances of a finished run, which are applied instead of new ones.
    transductive
        Learn them from all trials, training and test.
    parts
        Keeps finished sessions on the disk of `folder`, so that a killed call can be continued; named by a digest of
        everything that determines the result, and removed by the caller. None keeps nothing.

    Returns
    -------
    summary
        `n_trials`, `n_features`, `n_bytes`, and `protocol` if the source has one.

    Raises
    ------
    DataError
        If a response is not finite, does not fit the type, or the disk is too small; the message names the file.
    """
    source, watch = config.open_betas(), make_watch(config)
    settle_missing(config, source.parts, watch)
    return write_fmri_source(
        source, folder, progress=progress, learnt=learnt, transductive=transductive, watch=watch, parts=parts
    )


def write_fmri_source(
    source: FmriSource,
    folder: Path,
    *,
    progress: Progress | None = None,
    learnt: LearntStatistics | None = None,
    transductive: bool = False,
    watch: DamageWatch | None = None,
    parts: Path | None = None,
) -> dict[str, Any]:
    """Stream a source into ``responses`` and ``stimuli`` below `folder`; see `write_fmri`."""
    if transductive:
        own = [replace(part, trials=part.trials.assign(split="train")) for part in source.parts]
        source = replace(source, parts=tuple(own))
    plan = source.plan
    geometries, left_out = place_in_parcels(
        {subject: source.find_geometry(subject) for subject in source.subjects}, plan.atlas
    )
    n_features = max(_count_features(geometry) for geometry in geometries.values())
    shape: tuple[int, ...] = (source.n_trials, n_features)
    if source.times is not None:
        shape = (*shape, len(source.times))
    responses = folder / "responses"
    responses.mkdir(parents=True, exist_ok=True)
    trials = pd.concat([part.trials for part in source.parts], ignore_index=True)
    # The columns that every store has come first.
    trials = trials[[*TRIAL_COLUMNS, *(name for name in trials.columns if name not in TRIAL_COLUMNS)]]
    scratch, watch = folder / "scratch", watch or DamageWatch()
    try:
        with ExitStack() as files:
            place, kept = parts or responses, KeptParts(parts)
            rows = files.enter_context(
                ArrayFile(place / "trials.npy", shape, np.dtype(plan.dtype), continues=True)
            )
            if not rows.is_continued:
                kept.clear()
            state = _State(rows, parts or scratch, files, watch, kept, learnt)
            scaling = _write_parts(source, geometries, state, folder, progress)
        shutil.move(rows.path, responses / "data.npy")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    trials.to_parquet(responses / "trials.parquet", index=False)
    if state.fitted:
        for name, values in (
            (ZSCORE_MEAN, [s.mean for s in state.fitted.values()]),
            (ZSCORE_VARIANCE, [s.variance for s in state.fitted.values()]),
        ):
            np.save(responses / name, np.stack(values), allow_pickle=False)  # (n_groups, n_features)
    write_images(folder / "stimuli", source, watch)
    _write_meta(responses, source, geometries, {"parcels_without_voxels": left_out, **scaling}, watch)
    n_bytes = (responses / "data.npy").stat().st_size
    summary = {"n_trials": shape[0], "n_features": n_features, "n_bytes": n_bytes}
    return summary | {key: source.notes[key] for key in ("protocol",) if key in source.notes}


def _count_features(geometry: Geometry) -> int:
    return geometry.n_voxels if geometry.parcels is None else len(geometry.parcels.names)


def _check_space(folder: Path, shape: tuple[int, ...], source: FmriSource) -> None:
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(source.plan.dtype).itemsize
    if source.read_image is not None:
        needed += len(source.stimuli) * source.read_image(0).nbytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{shape[0]} trials of {shape[1]} features and {len(source.stimuli)} images need {needed / 1e9:.1f} GB, "
            f"but {folder} has {free / 1e9:.1f} GB free; choose another place with --out, a smaller mask or float16."
        )


# --- standardising ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Waiting:
    """Rows of one session or run without training trials, and the file that keeps them until the others are done."""

    subject: str
    name: str
    held: ArrayFile
    base: int
    start: int
    rows: np.ndarray


@dataclass
class _State:
    """Sessions that are standardised, and sessions that wait."""

    target: ArrayFile
    scratch: Path
    files: ExitStack
    watch: DamageWatch
    kept: KeptParts
    learnt: LearntStatistics | None = None
    fitted: dict[ZScoreGroup, FeatureStatistics] = field(default_factory=dict)
    scales: dict[str, list[FeatureStatistics]] = field(default_factory=dict)
    waiting: list[_Waiting] = field(default_factory=list)
    sessions: dict[int, ArrayFile] = field(default_factory=dict)  # by their first row
    transductive: list[str] = field(default_factory=list)
    constant: int = 0

    def open_session(self, start: int, n: int, *, continues: bool = False) -> ArrayFile:
        """Return the file, opened once, of the trials of a session before they are standardised and rounded."""
        if start not in self.sessions:
            path, shape = self.scratch / f"session-{start}.npy", (n, *self.target.shape[1:])
            file = ArrayFile(path, shape, np.dtype(np.float32), continues=continues)
            self.sessions[start] = self.files.enter_context(file)
        return self.sessions[start]

    def read_session(self, number: int, start: int, n_trials: int) -> Mapping[str, np.ndarray] | None:
        """Return the record of an earlier process about a session from row `start` on; None if it must be read."""
        packed = self.kept.read(f"session {number}")
        if packed is not None and packed["waiting"].size and self.target.dtype == np.float16:
            # Its trials lie in a file of their own, and zeros would stand in the place of one that was lost.
            file = self.open_session(start, n_trials, continues=True)
            if not file.is_continued:
                return None
        return packed

    def begin_session(self) -> tuple[int, int, int]:
        """Return the start of a session, for `pack_session`."""
        return len(self.fitted), len(self.waiting), len(self.transductive)

    def pack_session(self, begun: tuple[int, int, int]) -> dict[str, Any]:
        """Return the state of the session that was just written, as arrays and text."""
        fitted = list(self.fitted.items())[begun[0] :]
        waiting = self.waiting[begun[1] :]
        return {
            "groups": json.dumps([asdict(group) for group, _ in fitted]),
            **{f"mean{n}": scale.mean for n, (_, scale) in enumerate(fitted)},
            **{f"variance{n}": scale.variance for n, (_, scale) in enumerate(fitted)},
            "waiting": np.array([item.name for item in waiting], dtype=str),
            **{f"rows{n}": item.rows for n, item in enumerate(waiting)},
            "transductive": np.array(self.transductive[begun[2] :], dtype=str),
            "constant": self.constant,
            **self.watch.pack_session(),
        }

    def unpack_session(
        self, packed: Mapping[str, np.ndarray], subject: str, start: int, n_trials: int
    ) -> None:
        """Restore a session of `n_trials` from row `start` on, which an earlier process has written."""
        self.watch.unpack_session(packed)
        for n, about in enumerate(json.loads(str(packed["groups"]))):
            group, scale = ZScoreGroup(**about), FeatureStatistics(packed[f"mean{n}"], packed[f"variance{n}"])
            self.fitted[group] = scale
            if not group.own:
                self.scales.setdefault(subject, []).append(scale)
        names = packed["waiting"].tolist()
        held, base = self.target, start
        if names and self.target.dtype == np.float16:
            held, base = self.open_session(start, n_trials, continues=True), 0
        self.waiting += [
            _Waiting(subject, name, held, base, start, packed[f"rows{n}"]) for n, name in enumerate(names)
        ]
        self.transductive += packed["transductive"].tolist()
        self.constant = max(self.constant, int(packed["constant"]))


def _write_parts(
    source: FmriSource,
    geometries: Mapping[str, Geometry],
    state: _State,
    folder: Path,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write and standardise every session; return notes for the reader of the store."""
    sessions = [list(members) for _, members in groupby(source.parts, key=lambda part: part.group)]
    sizes = [sum(len(part.trials) for part in session) for session in sessions]
    starts = np.cumsum([0, *sizes])
    found = [
        state.read_session(number, int(first), size)
        for number, (first, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    n_new = sum(size for size, packed in zip(sizes, found, strict=True) if packed is None)
    _check_space(folder, (n_new, *state.target.shape[1:]), source)
    tell_kept(progress, found)
    advance, start = count_steps(progress, n_new), 0
    constant = source.notes.get("constant_voxels_by_run", {})  # of time series: filled when they are read
    for number, (session, size, packed) in enumerate(zip(sessions, sizes, found, strict=True)):
        subject = session[0].group[0]
        state.watch.begin_session(subject)
        if packed is None:
            known = set(constant)
            begun = state.begin_session()
            _write_session(session, source.plan, geometries[subject], start, state, advance)
            for file in (state.target, *(item.held for item in state.waiting[begun[1] :])):
                file.sync()
            new = {name: n for name, n in constant.items() if name not in known}
            state.kept.write(
                f"session {number}", constant_by_run=json.dumps(new), **state.pack_session(begun)
            )
        else:
            constant |= json.loads(str(packed["constant_by_run"]))
            state.unpack_session(packed, subject, start, size)
        start += size
    for subject in source.subjects:
        state.watch.settle_features(subject)
    if any(item.held is state.target for item in state.waiting):
        state.kept.clear()  # from here on the trials are no more what their sessions gave
    # Only now are all sessions of a subject known: the order of the files must not matter.
    for item in state.waiting:
        scales = state.scales.get(item.subject)
        if not scales:
            raise DataError(
                f"subject {item.subject} has no training trial to standardise with; set dataset.zscore to none, "
                "or dataset.untrained to own, which uses the test trials themselves."
            )
        standardise_rows(pool_statistics(scales), item.held, item.base, state.target, item.start, item.rows)
    return {
        "standardised_with_other_sessions": [item.name for item in state.waiting],
        "standardised_with_own_test_trials": state.transductive,
        "constant_features": state.constant,
        **({"standardised_groups": [asdict(group) for group in state.fitted]} if state.fitted else {}),
    }


def _write_session(
    session: list[BetasPart],
    plan: BetasPlan,
    geometry: Geometry,
    start: int,
    state: _State,
    advance: Advance,
) -> None:
    """Write the trials of one session from row `start` on, and standardise what has training trials."""
    trials = pd.concat([part.trials for part in session], ignore_index=True)
    target, learnt = state.target, state.learnt
    subject, name = session[0].group
    if learnt is not None:
        done = start
        for part in session:
            runs, first = part.trials["run"].to_numpy(str), 0
            for block in _iterate_blocks(part, geometry, target.shape, state.watch):
                of_run = runs[first : first + len(block)]
                values = np.empty(block.shape, target.dtype)
                for key in dict.fromkeys(of_run):
                    values[of_run == key] = learnt.apply(block[of_run == key], subject, name, key)
                target.write(done + first, values)
                first += len(block)
                advance(len(block), f"reading {part.where}")
            done += first
        return
    held, base = target, start
    if plan.zscore != "none" and target.dtype == np.float16:  # rounded after standardising, not before
        held, base = state.open_session(start, len(trials)), 0
    by_run = plan.zscore == "run"
    keys = trials["run"].to_numpy(str) if by_run else np.full(len(trials), "session")
    is_train = trials["split"].to_numpy() == "train"
    moments: dict[str, FeatureMoments] = {}
    done = 0
    for part in session:
        for block in _iterate_blocks(part, geometry, target.shape, state.watch):
            held.write(base + done, block)
            here = slice(done, done + len(block))
            if plan.zscore != "none":
                for key in dict.fromkeys(keys[here][is_train[here]]):
                    picked = block[is_train[here] & (keys[here] == key)]
                    moments.setdefault(key, FeatureMoments(picked[0])).add(picked)
            done += len(block)
            advance(len(block), f"reading {part.where}")
    if plan.zscore == "none":
        return
    for key in dict.fromkeys(keys):
        rows = np.flatnonzero(keys == key)
        label = f"subject {subject}, session {name}" + (f", run {key}" if by_run else "")
        if key in moments and moments[key].n_trials > 1:  # one trial has no spread
            scale = moments[key].finish()
            state.scales.setdefault(subject, []).append(scale)
            state.fitted[ZScoreGroup(subject, name, key if by_run else "")] = scale
            own = scale.is_constant[: _count_features(geometry)]
            state.constant = max(state.constant, int(own.sum()))
        elif plan.untrained == "own":
            scale = fit_rows(held, base + rows)
            state.transductive.append(label)
            state.fitted[ZScoreGroup(subject, name, key if by_run else "", own=True)] = scale
        else:
            state.waiting.append(_Waiting(subject, label, held, base, start, rows))
            continue
        standardise_rows(scale, held, base, target, start, rows)
    if held is not target and all(item.held is not held for item in state.waiting):
        held.close()
        held.path.unlink()


def read_blocks(part: BetasPart, rest: tuple[int, ...], watch: DamageWatch) -> Iterator[np.ndarray]:
    """Yield the trials of a part as they are stored, as many at a time as fill a block, and checked.

    Parameters
    ----------
    part
        What is read.
    rest
        Sizes of the axes behind the voxels: none, or the number of times.
    watch
        Checks the values while they are read.

    Raises
    ------
    DataError
        If a value is not finite, an array has another shape, or the file is damaged.
    """
    shown = part.trials["stimulus_id"].to_numpy()
    seen = (
        None
        if part.is_computed
        else watch.open_rows(part.where, part.group[0], shown, compares_features=True)
    )
    # (n_trials, n_voxels[, n_times]), as many trials at a time as fill a block
    for first, last in split_rows(len(part.trials), part.n_voxels * int(np.prod(rest))):
        block = np.asarray(part.read(first, last))
        if block.shape != (last - first, part.n_voxels, *rest):
            raise DataError(
                f"{part.where} gave an array of shape {block.shape} for its trials {first} to {last - 1}; "
                f"{(last - first, part.n_voxels, *rest)} was expected."
            )
        finite = np.isfinite(block)
        if not finite.all():
            row = int(np.flatnonzero(~finite.reshape(len(block), -1).all(axis=1))[0])
            raise DataError(
                f"{part.where}: trial {first + row} holds {int((~finite[row]).sum())} non-finite responses; "
                "leave these voxels out of the mask, or fetch the file again."
            )
        if seen is not None:
            seen.add(block)
        yield block
    if seen is not None:
        seen.finish(lambda row: f"{shown[row]}, trial {row + 1} of the file")


def _iterate_blocks(
    part: BetasPart, geometry: Geometry, shape: tuple[int, ...], watch: DamageWatch
) -> Iterator[np.ndarray]:
    """Yield the trials of a part as float32, averaged over parcels or filled up with zeros, and checked."""
    missing = shape[1] - _count_features(geometry)
    for block in read_blocks(part, shape[2:], watch):
        # Averages before the z-score: a parcel is standardised as one feature.
        if geometry.parcels is not None:
            block = average_parcels(block, geometry.parcels)
        yield np.pad(block, [(0, 0), (0, missing), *[(0, 0)] * (block.ndim - 2)]) if missing else block


# --- what travels along -----------------------------------------------------------------------------------


def _write_meta(
    responses: Path,
    source: FmriSource,
    geometries: Mapping[str, Geometry],
    remarks: Mapping[str, Any],
    watch: DamageWatch,
) -> None:
    """Write ``meta.json`` and the array coordinates, as `store.read_responses` reads them."""
    plan, subjects = source.plan, source.subjects
    first = geometries[subjects[0]]
    dims = ["trial", "voxel" if first.parcels is None else "parcel"]
    coords: dict[str, Any] = {"modality": source.modality}
    if isinstance(source.geometry, Geometry) or len(subjects) == 1:
        coords |= first.as_coords()
    else:  # every subject has a mask of its own; only the parcels are common
        coords |= {"subjects": list(subjects)}
        for subject in subjects:
            for key, value in geometries[subject].as_coords().items():
                common = key in ("parcel_names", "parcel_networks")
                coords[key if common else f"{key}_sub-{subject}"] = value
        if source.is_padded:
            coords["n_voxels_of"] = {subject: geometries[subject].n_voxels for subject in subjects}
    if source.times is not None:
        dims.append("time")
        coords["times"] = np.asarray(source.times, float)
    # What every report on these trials must say.
    if warnings := [*source.notes.get("warnings", ()), *watch.describe()]:
        coords["warnings"] = warnings
    arrays = [key for key, value in coords.items() if isinstance(value, np.ndarray)]
    for key in arrays:
        np.save(responses / f"coord_{key}.npy", coords[key], allow_pickle=False)
    provenance = {
        "plan": {
            "zscore": plan.zscore, "untrained": plan.untrained, "dtype": plan.dtype,
            "atlas": None if plan.atlas is None else plan.atlas.hashed_fields(),
        },
        "files": ["/".join(path.parts[-3:]) for part in source.parts for path in part.files],
        **({"damage": watch.as_json()} if watch.findings else {}), **remarks, **source.notes,
    }  # fmt: skip
    write_json(
        responses / "meta.json",
        {
            "dims": dims,
            "unit": source.unit if plan.zscore == "none" else "z",
            "coords": {key: value for key, value in coords.items() if key not in arrays},
            "array_coords": arrays,
            "provenance": provenance,
        },
    )


def write_images(folder: Path, source: FmriSource, watch: DamageWatch | None = None) -> None:
    """Write the stimulus table, and copy the images one by one if the run must contain them."""
    if source.read_image is None:
        write_stimuli(folder, source.stimuli)
        return
    first = source.read_image(0)
    pixels = _PixelFile(folder / "pixels.npy", len(source.stimuli), first)
    digests, colours = [], []
    for row in range(len(source.stimuli)):
        image = first if row == 0 else source.read_image(row)
        pixels.write(row, image)
        digests.append(hash_pixels(image))
        if image.min() == image.max():
            colours.append(int(image.flat[0]))
    settle_blank_images(colours, len(digests), watch or DamageWatch())
    write_stimuli(folder, StimulusSet(source.stimuli.table.assign(sha256=digests)))


class _PixelFile:
    """A ``.npy`` of images that all have the size of the first, written one at a time."""

    def __init__(self, path: Path, n: int, first: np.ndarray) -> None:
        if first.dtype != np.uint8 or first.ndim != 3 or first.shape[-1] != 3:
            raise DataError(
                f"images must be uint8 of shape (height, width, 3), not {first.dtype} {first.shape}."
            )
        self.path, self.shape = path, first.shape
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *first.shape))

    def write(self, row: int, image: np.ndarray) -> None:
        if image.shape != self.shape:
            raise DataError(f"image {row} has the shape {image.shape}, the first one {self.shape}.")
        np.load(self.path, mmap_mode="r+", allow_pickle=False)[row] = image
