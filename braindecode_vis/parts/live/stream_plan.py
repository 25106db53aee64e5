"""Plans how epochs are cut from a stream like those of a finished run, with assumptions for missing information."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import read_json
from braindecode_vis.datasets.sources.cleaning_options import Cleaning
from braindecode_vis.datasets.sources.meeg_source import EpochPlan
from braindecode_vis.pipeline import new_trials
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.preparing import preprocess


@dataclass(frozen=True)
class StreamPlan:
    """How epochs are cut from a stream as those of a run were.

    Parameters
    ----------
    plan
        As the run's preprocessing had it; without cleaning where its epochs came from elsewhere.
    ch_names
        Channels that whitening takes, or else those of the trials.
    unit
        Of the samples; empty if it is not known.
    notes
        What is assumed, and what is not applied, one sentence each.
    """

    plan: EpochPlan
    ch_names: tuple[str, ...]
    unit: str
    notes: tuple[str, ...] = ()


def find_stream_plan(run: FinishedRun) -> StreamPlan:
    """Return how a stream is cut for a run.

    Raises
    ------
    DataError, ConfigError
        If the trials of the run have no channels and times, or do not say which.
    """
    prepared, learnt = preprocess(run), new_trials.find_learnt(run)
    own, coords = prepared.responses, prepared.responses.coords
    if own.dims != ("trial", "channel", "time"):
        raise ConfigError(
            f"{run.folder.path} learnt from trials of {' x '.join(own.dims[1:])}, but a stream gives "
            "channels x times; choose a run of EEG or MEG."
        )
    missing = [name for name in ("ch_names", "times") if name not in coords]
    if missing:
        raise DataError(
            f"the trials of {run.folder.path} have no {missing[0]}, so a stream cannot be cut in the "
            "same way; make the run again from data with ch_names and times (see from_arrays)."
        )
    names = tuple(map(str, learnt.noise_channels or coords["ch_names"]))
    unit = learnt.recorded_unit or ("" if own.unit in ("arbitrary", "z", "IQR", "whitened") else own.unit)
    meta = read_json(prepared.artifact.path / "responses" / "meta.json").get("provenance", {})
    times = np.asarray(coords["times"], dtype=float)
    sfreq = round(1 / float(np.median(np.diff(times))), 6) if len(times) > 1 else float(coords["sfreq"])
    kept = meta.get("plan") or {}
    # Runs of earlier versions do not say whether they cut their epochs; those of publishers keep another rate.
    if "sfreq" in kept and meta.get("continuous", abs(float(kept["sfreq"] or 0) - sfreq) < 1e-3):
        known = {entry.name for entry in fields(EpochPlan)}
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in kept.items()
            if k in known and k != "cleaning"
        }
        done: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in (meta.get("cleaning") or {}).items()
        }
        steps = ("interpolate", "reference", "notch", "l_freq", "h_freq", "causal")
        cleaning = Cleaning(**{k: done[k] for k in steps if k in done})
        values["cleaning"] = cleaning
        plan = EpochPlan(**values)
        notes = new_trials.describe_cleaning(run.config.dataset)
        return StreamPlan(plan, names, unit, (notes,) if notes else ())
    step = 1 / sfreq
    ends = float(times[0]), float(times[-1] + step)
    plan = EpochPlan(sfreq, *ends, window=ends, baseline=None, mvnn="none")
    words = (
        f"The epochs of the run were not cut by this package; those of the stream are cut at {sfreq:g} "
        f"Hz from {ends[0]:g} to "
        f"{ends[1]:g} s, without baseline, reference or filter, since the earlier processing of the "
        "run's trials is not known."
    )
    return StreamPlan(plan, names, unit, (words,))
