"""Prepares new trials in the form of the training trials of a finished run.

Owns the ways in (another root of the same data set, a folder of arrays, trials in memory), what the run has learnt in
its preprocessing and applies to them, and what is asked of them: the axes, channels, times and voxels of the run.
Nothing is learnt from the new trials, unless that is asked for and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError, check_finite, check_option
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.base.remote import as_path
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.config.source import read_override
from braindecode_vis.datasets.array_folder import find_trials, read_new_trials
from braindecode_vis.datasets.bids.live_recording import is_live_recording, make_live_dataset
from braindecode_vis.datasets.own_data import UNSTATED
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.preparing import preprocess, read_dataset, write_dataset
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.selection import pick_rows
from braindecode_vis.preprocessing.voxel_geometry import read_geometry

#: Units that mean the same, as users and files write them.
_SAME_UNITS = {"volt": "V", "volts": "V", "v": "V", "tesla": "T", "t": "T"}
_NO_UNIT = ("arbitrary", "")
_OF_ALL = "Whitening and scaling were learnt from the new trials themselves: transductive."
_OF_TRAINING = "Whitening and scaling were learnt from the new trials that are declared as train."
#: Half a millisecond is below any sample; rates like 1200 / 7 Hz round differently from file to file.
TIME_TOLERANCE = 5e-4


@dataclass(frozen=True)
class NewTrials:
    """New trials as the run's encoder takes them, before their repetitions are averaged.

    Parameters
    ----------
    responses
        In the unit and with the coordinates of the run. The column `known` of the table says which trials say what they
        showed.
    stimuli
        The pictures that the recording brings along, if it does.
    notes
        What was applied to which session, one sentence each.
    transductive
        Whether statistics were learnt from the new trials themselves.
    """

    responses: Responses
    stimuli: StimulusSet | None = None
    notes: tuple[str, ...] = field(default=())
    transductive: bool = False


def read_new(
    run: FinishedRun,
    on: Path,
    work: Path,
    *,
    whiten_new: bool = False,
    overrides: Sequence[str] = (),
    part: str | None = None,
) -> NewTrials:
    """Read new trials from files.

    Parameters
    ----------
    run
        The finished run.
    on
        A folder of arrays (see `braindecode_vis.datasets.array_folder`), a file of trials, what a live session has
        recorded, or else another root of the data set of the run.
    work
        Folder for the preprocessed trials of another root; they are read from there as long as predictions are made.
    whiten_new
        Learn whitening and scaling from the new trials, a transductive result. With `part`, from those that are
        declared as ``train``; then ``test`` is not transductive.
    overrides
        Texts ``dataset.a=value``, for another root.
    part
        ``train`` or ``test``: only the trials that the recording itself declares as such.
    """
    path = as_path(on)
    if not path.exists():
        raise DataError(f"{path} does not exist; --on takes a folder of new recordings, or a file of trials.")
    # A folder that holds trials is read as arrays even where the run decodes a public data set.
    own = run.config.dataset.kind == "arrays" and not is_live_recording(path)
    if path.is_file() or own or find_trials(path):
        if overrides:
            raise ConfigError(f"{overrides[0]!r} changes how a data set is read, and {path} holds arrays.")
        responses, stimuli = read_new_trials(path)
        return prepare_trials(run, responses, stimuli, whiten_new=whiten_new, part=part)
    # A run whose encoder or target changed would not be the finished one any more.
    for text in overrides:
        if not text.strip().startswith("dataset."):
            raise ConfigError(
                f"--set {text} would change the run itself; only dataset.* can be set for new recordings."
            )
    dataset = run.config.dataset
    if is_live_recording(path):
        choices = {".".join(key[1:]): value for key, value in map(read_override, overrides)}
        live = make_live_dataset(dataset, path, find_responses(run).coords, choices)
        return _write_anew(run, live, work, whiten_new=whiten_new, part=part)
    if "root" not in type(dataset).model_fields:
        raise DataError(
            f"{path} holds no trials, and {dataset.kind}, which the run decodes, reads no folder; --on takes a "
            "folder of arrays or a file of trials."
        )
    dataset = read_config(run.folder.path, overrides, root=path).dataset
    return read_dataset_anew(run, dataset, work, whiten_new=whiten_new, part=part)


def read_dataset_anew(
    run: FinishedRun, dataset: Any, work: Path, *, whiten_new: bool = False, part: str | None = None
) -> NewTrials:
    """Preprocess a data set of the run's kind, or one that continues it, with what was learnt; see `read_new`."""
    known = (dataset.kind, *roles.complete(Dataset, dataset).continues())
    if run.config.dataset.kind not in known:
        raise ConfigError(
            f"the run decodes {run.config.dataset.kind}, so it cannot read {dataset.kind}; give these "
            "trials as arrays instead."
        )
    return _write_anew(run, dataset, work, whiten_new=whiten_new, part=part)


def _write_anew(
    run: FinishedRun, dataset: Any, work: Path, *, whiten_new: bool, part: str | None
) -> NewTrials:
    learnt = find_learnt(run)
    own = find_responses(run)
    # The mask of the run, since one found in new images would keep other voxels.
    single = "subjects" not in own.coords and "voxel_id" in own.coords
    # Without either, a data set learns from its training trials, as the run did.
    write_dataset(
        dataset, work, seed=run.config.seed, listener=run.listener,
        learnt=None if whiten_new else learnt, transductive=whiten_new and part is None,
        geometry=read_geometry(own) if single else None,
    )  # fmt: skip
    responses, stimuli = read_dataset(work)
    notes = _describe_learnt(learnt, whiten_new=whiten_new, part=part)
    responses = responses.with_trials(responses.trials.assign(known=True))
    transductive = whiten_new and part != "test"
    return NewTrials(_fit_in(run, _pick_part(responses, part)), stimuli, tuple(notes), transductive)


def _describe_learnt(learnt: LearntStatistics, *, whiten_new: bool, part: str | None) -> list[str]:
    """Return sentences on the trials from which whitening and scaling were learnt."""
    if whiten_new:
        return [_OF_ALL if part is None else _OF_TRAINING]
    return [f"{where}: {words}." for where, words in learnt.used.items()]


def prepare_trials(
    run: FinishedRun,
    responses: Responses,
    stimuli: StimulusSet | None = None,
    *,
    prepared: bool | None = None,
    whiten_new: bool = False,
    part: str | None = None,
) -> NewTrials:
    """Apply what the run has learnt to trials in memory.

    Parameters
    ----------
    run
        The finished run.
    responses
        The trials.
    stimuli
        Their pictures, where they are known.
    prepared
        Whether they are whitened, scaled or standardised already; by default their unit decides.
    whiten_new, part
        As in `read_new`.

    Raises
    ------
    DataError
        If the axes are not those of the run, or nothing says whether the trials are whitened already.
    """
    if "known" not in responses.trials:
        responses = responses.with_trials(responses.trials.assign(known=True))
    learnt, transductive, notes = find_learnt(run), False, []
    subjects = find_responses(run).trials["subject"].astype(str).unique()
    # Per-subject networks and galleries look subjects up by name, and an unnamed one would be unknown to them.
    if (responses.trials["subject"] == UNSTATED).all() and len(subjects) == 1:
        responses = responses.with_trials(responses.trials.assign(subject=subjects[0]))
        notes.append(f"No subject was given: using {subjects[0]}, the subject of the run.")
    given, responses = responses, _pick_part(responses, part)
    # Before whitening, whose matrix only says that shapes differ and not which channel is missing.
    check_axes(find_responses(run), responses)
    check_finite(responses.data, what="the new recording", row_names=responses.stimulus_ids, unit="trial")
    as_recorded = not prepared if learnt.is_empty else not _is_prepared(learnt, responses.unit, prepared)
    if as_recorded and (cleaned := describe_cleaning(run.config.dataset)):
        notes.append(cleaned)
    if not learnt.is_empty and as_recorded:
        data = np.asarray(responses.data)
        if whiten_new:
            taught = _pick_part(given, None if part is None else "train")
            learnt, transductive = learnt.learn_anew(np.asarray(taught.data), taught.trials), part != "test"
        responses = replace(responses, data=learnt.apply_to_trials(data, responses.trials), unit=learnt.unit)
        notes += _describe_learnt(learnt, whiten_new=whiten_new, part=part)
    elif whiten_new:
        raise ConfigError(
            "there is no whitening to compute: the run has no whitening or scaling, or the trials are "
            "whitened already."
        )
    return NewTrials(_fit_in(run, responses), stimuli, tuple(notes), transductive)


def describe_cleaning(dataset: Any) -> str:
    """Return a sentence on what the run removed from its own recordings and cannot remove from new trials."""
    done = [
        words
        for name, words in (("ica", "components of the eyes (ICA)"), ("autoreject", "artefacts (autoreject)"))
        if getattr(dataset, name, None) is not None  # settings of recordings of EEG and MEG alone
    ]
    if not done:
        return ""
    return (
        f"The run removed {' and '.join(done)} from its recordings, learnt from each session and not "
        "kept; these trials were not cleaned, so clean them in the same way before, or give the raw "
        "recording with --whiten-new."
    )


def find_responses(run: FinishedRun) -> Responses:
    """Return the responses that the run learnt from."""
    return preprocess(run).responses


def find_learnt(run: FinishedRun) -> LearntStatistics:
    """Return what the run's preprocessing has learnt; a data set that writes itself has learnt nothing."""
    responses = find_responses(run)
    if roles.find_source(run.config.dataset) == "write":
        return LearntStatistics(unit=responses.unit, dtype=responses.data.dtype)
    return LearntStatistics.read(preprocess(run).artifact.path / "responses")


def _is_prepared(learnt: LearntStatistics, unit: str, prepared: bool | None) -> bool:
    if prepared is not None:
        return prepared
    if unit == learnt.unit:
        return True
    if unit in _NO_UNIT:
        raise DataError(
            f"the run stores its trials in the unit {learnt.unit!r}, after whitening, scaling or "
            "standardising, but it is not known whether these trials are prepared like this: state "
            f"their unit ({learnt.unit}, or the unit of the recording) in meta.yaml, or pass "
            "prepared=True or False in Python."
        )
    # Microvolts under a scaling learnt in volts would be 10^6 too large and still look whitened.
    recorded = _SAME_UNITS.get(learnt.recorded_unit.lower(), learnt.recorded_unit)
    found = _SAME_UNITS.get(unit.lower(), unit)
    if recorded and found != recorded:
        raise DataError(
            f"these trials are in {unit}, but the recordings of the run were in {recorded}; convert them."
        )
    return False


def _pick_part(responses: Responses, part: str | None) -> Responses:
    """Return the trials that the recording declares as training or test; all of them for None."""
    if part is None:
        return responses
    check_option("split", part, ("train", "test"))
    rows = np.flatnonzero((responses.trials["split"] == part).to_numpy())
    if not len(rows):
        raise DataError(f"the new recording declares no {part} trial; leave the split out to predict all.")
    return pick_rows(responses, rows)


def check_axes(expected: Responses, found: Responses) -> None:
    """Raise `DataError` unless trials have the axes, channels, times and voxels of the run.

    Parameters
    ----------
    expected
        The responses of the run.
    found
        New trials.
    """
    shapes = [
        " x ".join(f"{n} {d}s" for n, d in zip(r.data.shape[1:], r.dims[1:], strict=True))
        for r in (expected, found)
    ]
    rates = [_find_rate(r) for r in (expected, found)]
    # Rates first: other rates give other shapes, and the shape would not say why. A thousandth is rounding.
    if rates[0] and rates[1] and abs(rates[0] / rates[1] - 1) > 1e-3:
        raise DataError(
            f"these trials have a sampling rate of {rates[1]:g} Hz, but those of the run have {rates[0]:g} Hz; "
            "resample the recording first."
        )
    theirs, ours = (r.coords.get("ch_names") for r in (found, expected))
    if theirs is not None and ours is not None and list(map(str, theirs)) != list(map(str, ours)):
        missing = [str(name) for name in ours if name not in set(theirs)]
        what = (
            f"are missing {', '.join(missing[:5])}"
            if missing
            else "have additional ones"
            if len(theirs) > len(ours)
            else "have another order"
        )
        raise DataError(
            f"the channels of these trials {what}: the run has {', '.join(map(str, ours[:8]))}"
            f"{' ...' if len(ours) > 8 else ''} in this order; select them by name."
        )
    shape, own = expected.data.shape[1:], count_own_voxels(expected)
    if own and not set(found.trials["subject"].astype(str)) & set(own):
        # Rows of the run are padded to its largest subject, whose number of voxels says nothing of another person.
        shape = (found.data.shape[1], *shape[1:])
    if found.data.shape[1:] != shape or len(found.dims) != len(expected.dims):
        raise DataError(f"the trials of the run have {shapes[0]}, but these have {shapes[1]}.")
    times = [r.coords.get("times") for r in (expected, found)]
    if times[0] is not None and times[1] is not None:
        ours_s, theirs_s = (np.asarray(t, float) for t in times)
        if not np.allclose(ours_s, theirs_s, atol=TIME_TOLERANCE):
            raise DataError(
                f"these trials run from {theirs_s[0]:g} to {theirs_s[-1]:g} s, those of the run from {ours_s[0]:g} to "
                f"{ours_s[-1]:g} s from the onset of the picture; cut them in the same way."
            )
    voxels = [r.coords.get("voxel_id") for r in (expected, found)]
    if voxels[0] is not None and voxels[1] is not None and not np.array_equal(voxels[0], voxels[1]):
        raise DataError(
            "the voxels of these trials have other positions in the volume than those of the run; use "
            "the mask of the run."
        )


def _find_rate(responses: Responses) -> float | None:
    rate, times = responses.coords.get("sfreq"), responses.coords.get("times")
    if rate is None and times is not None and len(times) > 1:
        return float(1 / np.median(np.diff(np.asarray(times, float))))
    return None if rate is None else float(rate)


def _fit_in(run: FinishedRun, responses: Responses) -> Responses:
    """Return the trials with the axes and coordinates of the run, which everything fitted refers to."""
    own = find_responses(run)
    check_axes(own, responses)
    # Warnings of the run's own recordings say nothing of these trials.
    coords = {key: value for key, value in own.coords.items() if key != "warnings"}
    trials: pd.DataFrame = responses.trials
    if counts := count_own_voxels(own):
        width = responses.data.shape[1]
        new = dict.fromkeys(trials["subject"].astype(str), width) | count_own_voxels(responses)
        coords["n_voxels_of"] = new | counts
    return Responses.from_checked(responses.data, own.dims, trials, own.unit, coords)
