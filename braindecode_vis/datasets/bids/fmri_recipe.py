"""From a BIDS tree of fMRI to lazy runs: the options that all such data sets share, and the recipe of each.

Owns the shared configuration, timing and grid of each image, confounds, masks, and the checks on event tables. A recipe
owns what a data set's events mean. Reads headers and tables, never volumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from braindecode_vis.checks import BraindecodeVisError, DataError, check_columns
from braindecode_vis.datasets.bids.fmri_files import RunFiles, find_derivatives, find_runs, parse_entities
from braindecode_vis.datasets.bids.fmri_images import (
    find_masks,
    find_t_r,
    read_confounds,
    read_header,
    read_table,
)
from braindecode_vis.datasets.bids.fmri_stimuli import (
    find_image_folder,
    hash_image_folder,
    make_named_stimuli,
)
from braindecode_vis.datasets.manifests import Finding, check_root, read_manifest
from braindecode_vis.datasets.sources.betas_source import (
    AtlasConfig,
    BetasPlan,
    FmriSettings,
    Untrained,
    count_repetitions,
)
from braindecode_vis.datasets.sources.bold_source import (
    BoldRun,
    BoldSource,
    ConfoundsConfig,
    GlmConfig,
    ModelConfig,
)
from braindecode_vis.datasets.sources.meeg_source import SampleType
from braindecode_vis.store import hash_file, hash_sampled

READ_COLUMNS = ("onset", "duration", "stimulus_id", "concept", "path", "split", "trial_type")


class BoldSettings(FmriSettings):
    """Options that all data sets of BOLD time series share.

    Parameters
    ----------
    root
        Folder of the raw data set, which holds the events.
    derivatives
        Folder of fMRIPrep; looked for at and below the root by default.
    raw
        Read the raw images even if there are preprocessed ones. They are not aligned between runs.
    space
        Space of the preprocessed images; may be left out if there is only one.
    subjects, sessions
        Labels without ``sub-`` and ``ses-``; all that are there by default.
    skip
        Runs to leave out, each by a part of its file name.
    t_r
        Repetition time in s, where sidecar and image disagree.
    images
        Folder of the pictures; ``stimuli`` below the root by default, if it holds all of them. Without pictures the
        set has no pixels.
    mask
        ``brain``: voxels in fMRIPrep's mask of every run. ``varying``: voxels that vary in every run. ``epi``:
        nilearn's brain mask of the mean images. ``auto``: brain where there is one, else epi. Or a NIfTI file.
    confounds
        What is regressed out.
    model
        How one response per trial is made.
    zscore, untrained, dtype, atlas, pad_subjects
        As in `BetasPlan`.
    max_constant
        As in `BoldSource`.
    """

    derivatives: Path | None = None
    raw: bool = False
    space: str | None = None
    subjects: tuple[str, ...] | None = None
    sessions: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    t_r: float | None = Field(default=None, gt=0)
    images: Path | None = None
    mask: Literal["auto", "brain", "varying", "epi"] | Path = "auto"
    confounds: ConfoundsConfig = ConfoundsConfig()
    model: ModelConfig = GlmConfig()
    untrained: Untrained = "pooled"
    dtype: SampleType = "float32"
    atlas: AtlasConfig | None = None
    pad_subjects: bool = False
    max_constant: float = Field(default=0.05, ge=0, lt=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "derivatives", "images", "max_constant"})

    @field_validator("subjects", "sessions", mode="before")
    @classmethod
    def _read_labels(cls, value: Any) -> Any:
        """Take labels that YAML reads as numbers."""
        return [str(item) for item in value] if isinstance(value, list | tuple) else value

    def hashed_fields(self) -> dict[str, Any]:
        """Replace a mask file by the word ``file``: its content is among the inputs."""
        fields = super().hashed_fields()
        return {**fields, "mask": "file"} if isinstance(self.mask, Path) else fields

    def make_plan(self) -> BetasPlan:
        """Return what is done to the responses."""
        return BetasPlan(self.zscore, self.untrained, self.dtype, self.atlas, self.pad_subjects)


@dataclass(frozen=True)
class Recipe:
    """What tells one BIDS data set from another.

    Parameters
    ----------
    name
        Name of the manifest.
    entities
        Wanted values of entities beside subject and session, for example ``{"task": ("images",)}``.
    read_events
        Takes an event table as text and the files of the run, and returns the columns `READ_COLUMNS`: seconds,
        an empty `stimulus_id` where an event is no trial, and then an empty `trial_type` where no model needs it.
    finish
        Takes all trials together and returns them; declares the split where it depends on more than one run.
    notes
        What a reader of the store should know.
    """

    name: str
    entities: Mapping[str, Sequence[str] | None]
    read_events: Callable[[pd.DataFrame, RunFiles], pd.DataFrame]
    finish: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def find_bold_files(config: BoldSettings, recipe: Recipe) -> list[RunFiles]:
    """Return the files of every run that is wanted."""
    root = check_root(config.root, read_manifest(recipe.name))
    derivatives = None if config.raw else find_derivatives(root, config.derivatives)
    wanted = {"sub": config.subjects, "ses": config.sessions, **recipe.entities}
    runs = find_runs(root, derivatives=derivatives, space=config.space, entities=wanted)
    named = [run.image.name for run in runs] + [path.name for path in _list_events(root)]
    for fragment in config.skip:
        if not any(fragment in name for name in named):
            raise DataError(f"dataset.skip names {fragment!r}, but no run of {root} is called so.")
    runs = [run for run in runs if not any(fragment in run.image.name for fragment in config.skip)]
    _check_images_of_events(root, runs, config, wanted)
    return runs


def _check_images_of_events(
    root: Path, runs: Sequence[RunFiles], config: BoldSettings, wanted: Mapping[str, Sequence[str] | None]
) -> None:
    """Every run needs events, and all events of the wanted tasks need a run."""
    for run in runs:
        if run.events is None:
            raise DataError(
                f"{run.where} has no events table below {root}; fetch it, or leave the run out with "
                f"--set dataset.skip=[{run.image.name.split('_bold')[0].split('_space')[0]}]."
            )
    used = {run.events for run in runs}
    tasks = {run.entities.get("task") for run in runs}
    subjects = {run.entities["sub"] for run in runs}
    sessions = {run.entities.get("ses") for run in runs}
    for path in _list_events(root):
        tags = parse_entities(path.name)
        fits = tags.get("task") in tasks and tags.get("sub") in subjects
        fits = fits and (config.sessions is None or tags.get("ses") in sessions)
        fits = fits and all(
            values is None or tags.get(key) in values
            for key, values in wanted.items()
            if key not in ("sub", "ses")
        )
        if fits and path not in used and not any(fragment in path.name for fragment in config.skip):
            stem = path.name.removesuffix("_events.tsv")
            raise DataError(
                f"{path} lists the events of a run whose image is missing; fetch the image, or leave the run out with "
                f"--set dataset.skip=[{stem}]."
            )


def _list_events(root: Path) -> list[Path]:
    return sorted([*root.glob("sub-*/func/*_events.tsv"), *root.glob("sub-*/ses-*/func/*_events.tsv")])


def prepare_bold(config: BoldSettings, recipe: Recipe) -> BoldSource:
    """Return the data set as lazy runs.

    Raises
    ------
    DataError, ConfigError
        If anything is missing, damaged or does not fit together; the message names subject, session, run and file.
    """
    files = find_bold_files(config, recipe)
    tables = [_read_trials(run, recipe) for run in files]
    trials = pd.concat([t for t, _ in tables], keys=range(len(files)), names=["file"]).reset_index("file")
    if recipe.finish is not None:
        trials = recipe.finish(trials)
    counted = count_repetitions([trials[trials["file"] == n].drop(columns="file") for n in range(len(files))])
    runs = tuple(
        _open_run(run, table.drop(columns="path").reset_index(drop=True), others, config)
        for run, table, (_, others) in zip(files, counted, tables, strict=True)
    )
    title = read_manifest(recipe.name).title
    stimuli = make_named_stimuli(trials, config.images, title=title, beside=_find_beside(config, recipe))
    preprocessed = files[0].mask is not None or files[0].confounds is not None
    notes = {
        "model": config.model.hashed_fields(),
        "confounds": config.confounds.hashed_fields(),
        "images": "preprocessed" if preprocessed else "as found",
        **recipe.notes,
    }
    geometry = find_masks(files, runs, config.mask)
    return BoldSource(runs, stimuli, config.model, config.make_plan(), geometry, config.max_constant, notes)


def _find_beside(config: BoldSettings, recipe: Recipe) -> Path | None:
    return find_image_folder(check_root(config.root, read_manifest(recipe.name)), ("stimuli",))


def _read_trials(run: RunFiles, recipe: Recipe) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and other events of a run."""
    assert run.events is not None
    table = read_table(run.events)
    check_columns(table.columns, ("onset", "duration"), what=f"the events table {run.events}")
    events = recipe.read_events(table, run)
    check_columns(events.columns, READ_COLUMNS, what=f"the events of {run.where}")
    events = events.sort_values("onset", kind="stable").reset_index(drop=True)
    is_trial = events["stimulus_id"] != ""
    if not is_trial.any():
        raise DataError(
            f"{run.events} holds {len(events)} events, but none is a trial; check the columns that name images."
        )
    entities = run.entities
    trials = events[is_trial].drop(columns="trial_type").assign(
        subject=entities["sub"], session=entities.get("ses", "01"), run=entities.get("run", "01")
    )  # fmt: skip
    others = events[~is_trial & (events["trial_type"] != "")][["onset", "duration", "trial_type"]]
    return trials, others.reset_index(drop=True)


def _open_run(run: RunFiles, trials: pd.DataFrame, others: pd.DataFrame, config: BoldSettings) -> BoldRun:
    header = read_header(run.image)
    t_r = find_t_r(run, header.t_r, config.t_r)
    confounds, paths = read_confounds(run, config.confounds)
    if confounds is None:
        confounds = np.zeros((header.n_volumes, 0))
    assert run.events is not None
    trials = trials[[*(c for c in trials.columns if c not in ("onset", "duration")), "onset", "duration"]]
    start_s = float(run.sidecar.get("StartTime", 0.0) or 0.0)
    files = (run.image, run.events, *paths)
    return BoldRun(trials, others, header, t_r, start_s, confounds, files)


def hash_bold_inputs(config: BoldSettings, recipe: Recipe) -> dict[str, str]:
    """Return the digest of every file that is read, by its name; images by samples of their bytes."""
    digests: dict[str, str] = {}
    for run in find_bold_files(config, recipe):
        digests[run.image.name] = hash_sampled(run.image)
        for path in (run.events, run.mask if config.mask in ("auto", "brain") else None):
            if path is not None:
                digests[path.name] = hash_file(path)
        if run.confounds is not None and (config.confounds.strategy or config.confounds.columns):
            digests[run.confounds.name] = hash_file(run.confounds)
    if isinstance(config.mask, Path):
        digests["mask"] = hash_file(config.mask.expanduser())
    digests |= hash_image_folder(config.images, _find_beside(config, recipe))
    return digests if config.atlas is None else {**digests, **config.atlas.hash_inputs()}


def check_bold(config: BoldSettings, recipe: Recipe) -> list[Finding]:
    """Open every header and table, pair events with images, and say what was found."""
    try:
        source = prepare_bold(config, recipe)
    except BraindecodeVisError as error:
        return [Finding("layout", False, str(error))]
    subjects = {str(run.trials["subject"].iloc[0]) for run in source.runs}
    text = f"{len(subjects)} subject(s), {len(source.runs)} run(s), {len(source.stimuli)} images"
    findings = [Finding("layout", True, text)]
    for run in source.runs:
        counts = run.trials["split"].value_counts().to_dict()
        words = ", ".join(f"{n} {split}" for split, n in sorted(counts.items()))
        findings.append(
            Finding(run.image.name, True, f"{run.n_volumes} volumes of {run.t_r:g} s; trials: {words}")
        )
    return findings
