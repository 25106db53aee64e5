"""Any BIDS fMRI data set, raw or after fMRIPrep: the shared options, and the columns of the events table.

Owns the settings of BOLD time series, the opening of a tree as lazy runs, and the options for the rows of an events
table: which of them are trials, which column names the picture, which pictures are test pictures. Reads headers and
tables, never volumes; `braindecode_vis.preprocessing.bold` processes the time series.

Examples
--------
GOD's raw data (ds001246): ``task=perception stimulus_column=stimulus_name trial_type_column=event_type
trial_types=[stimulus] test_sessions=perceptionTest.* concept_pattern=(n[0-9]+)_``.

References
----------
Esteban, O. et al. (2019). fMRIPrep: a robust preprocessing pipeline for functional MRI. Nature Methods 16, 111-116.
doi:10.1038/s41592-018-0235-4
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, check_columns, check_file, suggest
from braindecode_vis.base.digests import digest_file, digest_files
from braindecode_vis.datasets.bids.fmri_files import (
    RunFiles,
    check_no_overlap,
    find_derivatives,
    find_image_folder,
    find_masks,
    find_runs,
    find_t_r,
    hash_image_folder,
    make_named_stimuli,
    parse_entities,
    read_confounds,
    read_header,
    read_numbers,
    read_seconds,
    read_table,
)
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Label,
    check_root,
    collect_findings,
    list_recordings,
    read_manifest,
)
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    count_repetitions,
)
from braindecode_vis.datasets.sources.bold_source import (
    BoldRun,
    BoldSource,
    ConfoundsConfig,
    GlmByVoxelConfig,
    GlmConfig,
    ModelConfig,
)

if TYPE_CHECKING:
    import pandas as pd

READ_COLUMNS = ("stimulus_id", "concept", "path", "split", "trial_type")


class BoldSettings(AtlasSettings):
    """Options that all data sets of BOLD time series share.

    Parameters
    ----------
    root
        Folder of the raw data set, which contains the events.
    derivatives
        Folder of fMRIPrep; by default it is searched at and below the root.
    raw
        Read the raw images even if preprocessed ones exist. Raw images are not aligned between runs.
    space
        Space of the preprocessed images; may be left out if there is only one.
    subjects, sessions
        Labels without ``sub-`` and ``ses-``; by default all that exist.
    skip
        Runs to leave out, each by a part of its file name.
    t_r
        Repetition time in s, needed if sidecar and image disagree.
    images
        Folder of the pictures; ``stimuli`` below the root by default, if it holds all of them. Without pictures the
        data set has no pixels.
    mask
        ``brain``: voxels in fMRIPrep's mask of every run. ``varying``: voxels that vary in every run. ``epi``:
        nilearn's brain mask of the mean images. ``auto``: brain if fMRIPrep's masks exist, else epi. Or a NIfTI file.
    confounds
        Confounds that are regressed out.
    model
        How one response per trial is computed.
    pad_subjects
        As in `BetasPlan`.
    """

    derivatives: Path | None = None
    raw: bool = False
    space: str | None = None
    subjects: tuple[Label, ...] | None = None
    sessions: tuple[Label, ...] | None = None
    skip: tuple[str, ...] = ()
    t_r: float | None = Field(default=None, gt=0)
    images: Path | None = None
    mask: Literal["auto", "brain", "varying", "epi"] | Path = "auto"
    confounds: ConfoundsConfig = ConfoundsConfig()
    model: ModelConfig = GlmConfig()
    pad_subjects: bool = False

    #: As in `BoldSource`.
    max_constant: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_constant"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "derivatives", "images", "max_constant"})

    def hashed_fields(self) -> dict[str, Any]:
        """Replace a mask file by the word ``file``: its content is among the inputs."""
        fields = super().hashed_fields()
        return {**fields, "mask": "file"} if isinstance(self.mask, Path) else fields

    def learns_before_split(self) -> tuple[str, ...]:
        """Return `per_split`, which keeps the choice of a model out of declared test runs and of no others."""
        model = self.model
        return ("model.per_split",) if isinstance(model, GlmByVoxelConfig) and model.per_split else ()

    def make_recipe(self) -> FmriRecipe:
        """Return the facts that identify the data set."""
        raise NotImplementedError

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        return hash_bold_inputs(self, self.make_recipe())

    def open_bold(self) -> BoldSource:
        """Return the data set as lazy runs; see `prepare_bold`."""
        return prepare_bold(self, self.make_recipe())

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every header and table, pair events with pictures, and report what was found."""
        source = self.open_bold()
        n_subjects = len({run.subject for run in source.runs})
        text = f"{n_subjects} subject(s), {len(source.runs)} run(s), {len(source.stimuli)} images"
        yield CheckFinding("layout", True, text)
        yield from self.check_recordings(list_recordings(source.runs))
        for run in source.runs:
            counts = run.trials["split"].value_counts().to_dict()
            words = ", ".join(f"{n} {split}" for split, n in sorted(counts.items()))
            yield CheckFinding(
                run.image.name, True, f"{run.n_volumes} volumes of {run.t_r:g} s; trials: {words}"
            )


@dataclass(frozen=True)
class FmriRecipe:
    """What differs between BIDS data sets.

    Parameters
    ----------
    name
        Name of the manifest.
    entities
        Required values of entities other than subject and session, for example ``{"task": ("images",)}``.
    read_events
        Takes an event table as text and the files of the run, and returns the columns `READ_COLUMNS`, row by row: an
        empty `stimulus_id` if an event is no trial, and then an empty `trial_type` if no model needs it.
    finish
        Takes all trials together and returns them; sets the split if it depends on more than one run.
    notes
        Remarks for readers of the store.
    image_folders
        Folders below the root that may hold the pictures.
    """

    name: str
    entities: Mapping[str, Sequence[str] | None]
    read_events: Callable[[pd.DataFrame, RunFiles], pd.DataFrame]
    finish: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    image_folders: tuple[str, ...] = ("stimuli",)


def find_bold_files(config: BoldSettings, recipe: FmriRecipe) -> list[RunFiles]:
    """Return the files of every chosen run."""
    root = check_root(config.root, read_manifest(recipe.name))
    # Events are in the raw tree only, even if derivatives are read.
    derivatives = None if config.raw else find_derivatives(root, config.derivatives)
    wanted = {"sub": config.subjects, "ses": config.sessions, **recipe.entities}
    runs = find_runs(root, derivatives=derivatives, space=config.space, entities=wanted)
    named = [run.image.name for run in runs] + [path.name for path in _list_events(root)]
    for fragment in config.skip:
        # A misspelt fragment would silently leave nothing out.
        if not any(fragment in name for name in named):
            raise DataError(f"dataset.skip names {fragment!r}, but no run of {root} has this in its name.")
    runs = [run for run in runs if not any(fragment in run.image.name for fragment in config.skip)]
    _check_images_of_events(root, runs, config, wanted)
    return runs


def _check_images_of_events(
    root: Path, runs: Sequence[RunFiles], config: BoldSettings, wanted: Mapping[str, Sequence[str] | None]
) -> None:
    """Every run needs events, and all events of the chosen tasks need a run."""
    for run in runs:
        if run.events is None:
            raise DataError(
                f"{run.where} has no events table below {root}; fetch it, or leave the run out with --set "
                f"dataset.skip=[{run.image.name.split('_bold')[0].split('_space')[0]}]."
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
        # Otherwise a run without its image would be left out without a warning.
        if fits and path not in used and not any(fragment in path.name for fragment in config.skip):
            stem = path.name.removesuffix("_events.tsv")
            raise DataError(
                f"{path} lists the events of a run whose image is missing; fetch the image, or leave the run out with "
                f"--set dataset.skip=[{stem}]."
            )


def _list_events(root: Path) -> list[Path]:
    return sorted([*root.glob("sub-*/func/*_events.tsv"), *root.glob("sub-*/ses-*/func/*_events.tsv")])


def prepare_bold(config: BoldSettings, recipe: FmriRecipe) -> BoldSource:
    """Return the data set as lazy runs.

    Raises
    ------
    DataError, ConfigError
        If anything is missing, damaged or does not fit together; the message names subject, session, run and file.
    """
    import pandas as pd

    files = find_bold_files(config, recipe)
    tables = [_read_trials(run, recipe) for run in files]
    trials = pd.concat([t for t, _ in tables], keys=range(len(files)), names=["file"]).reset_index("file")
    if recipe.finish is not None:
        trials = recipe.finish(trials)
    # A run without trials after `finish` keeps its place here.
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
        # Raw images are not aligned between runs; readers of the scores should know this.
        "images": "preprocessed" if preprocessed else "as found",
        **recipe.notes,
    }
    geometry = find_masks(files, runs, config.mask)
    return BoldSource(runs, stimuli, config.model, config.make_plan(), geometry, config.max_constant, notes)


def _find_beside(config: BoldSettings, recipe: FmriRecipe) -> Path | None:
    return find_image_folder(check_root(config.root, read_manifest(recipe.name)), recipe.image_folders)


def _read_trials(run: RunFiles, recipe: FmriRecipe) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return trials and other events of a run."""
    assert run.events is not None
    table = read_table(run.events)
    check_columns(table.columns, ("onset", "duration"), what=f"the events table {run.events}")
    events = recipe.read_events(table, run)
    check_columns(events.columns, READ_COLUMNS, what=f"the events of {run.where}")
    for column in ("onset", "duration"):
        events[column] = read_numbers(table, column, run.events)
    # Repetitions are counted in the order of presentation, and tables need not be sorted.
    events = events.sort_values("onset", kind="stable").reset_index(drop=True)
    is_trial = events["stimulus_id"] != ""
    # A wrong column would give a run without trials, and a smaller data set without a warning.
    if not is_trial.any():
        raise DataError(
            f"{run.events} holds {len(events)} events, but none is a trial; check the columns that name images."
        )
    entities = run.entities
    trials = events[is_trial].drop(columns="trial_type").assign(
        subject=entities["sub"], session=entities.get("ses", "01"), run=entities.get("run", "01")
    )  # fmt: skip
    # Other stimuli change the signal too, so a model must include them.
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
    # fMRIPrep writes it after correcting slice times: samples then belong to a time within the volume, not to its
    # start.
    start_s = (
        read_seconds(run, "StartTime", hint="correct it, or take it away if slices were not corrected") or 0.0
    )
    files = (run.image, run.events, *paths)
    return BoldRun(trials, others, header, t_r, start_s, confounds, files)


def hash_bold_inputs(config: BoldSettings, recipe: FmriRecipe) -> dict[str, str]:
    """Return the digest of every file that is read, by its name."""
    files: dict[str, Path] = {}
    for run in find_bold_files(config, recipe):
        files[run.image.name] = run.image
        for path in (run.events, run.mask if config.mask in ("auto", "brain") else None):
            if path is not None:
                files[path.name] = path
        if run.confounds is not None and (config.confounds.strategy or config.confounds.columns):
            files[run.confounds.name] = run.confounds
    if isinstance(config.mask, Path):
        files["mask"] = config.mask.expanduser()
    return (
        digest_files(files)
        | hash_image_folder(config.images, _find_beside(config, recipe))
        | config.hash_atlas()
    )


# GOD writes ``.JPEG``, NOD ``.jpg``, and lists of pictures may leave it out.
_SUFFIX = re.compile(r"\.(jpe?g|png|bmp|tiff?|gif)$", re.IGNORECASE)


class BidsFmriConfig(BoldSettings):
    """Folder of the data set, and the meaning of its event tables; see also `BoldSettings`.

    Parameters
    ----------
    task, acq, runs
        Entities to read; by default all that exist. If there are several tasks, choose one.
    stimulus_column
        Column that names the picture; its file name without folder and suffix becomes the stimulus id.
    concept_column, concept_pattern
        Column that names the concept, or a regular expression whose first group finds it in the stimulus column.
        With neither of them, every picture is its own concept.
    trial_type_column
        Column with the kind of an event.
    trial_types
        Kinds that are trials; by default every event with a picture.
    ignored_types
        Kinds that models leave out, for example rest. All other events that are not trials are regressed out.
    test_types, test_sessions, test_list, min_test_repetitions
        Which trials are test trials: those of some kinds; of sessions whose label matches a regular expression; of
        pictures in a text file, one per line; or of pictures that one subject saw at least so many times. Give at most
        one of them. With none, all are training trials, to be split later.
    """

    kind: Literal["bids_fmri"] = "bids_fmri"
    task: str | None = None
    acq: str | None = None
    runs: tuple[Label, ...] | None = None
    stimulus_column: str = "stim_file"
    concept_column: str | None = None
    concept_pattern: str | None = None
    trial_type_column: str = "trial_type"
    trial_types: tuple[str, ...] | None = None
    ignored_types: tuple[str, ...] = ("rest", "n/a")
    test_types: tuple[str, ...] = ()
    test_sessions: str | None = None
    test_list: Path | None = None
    min_test_repetitions: int | None = Field(default=None, ge=2)

    not_hashed: ClassVar[frozenset[str]] = BoldSettings.not_hashed | {"test_list"}

    @field_validator("concept_pattern", "test_sessions")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression ({error})") from error
        return value

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        given = [self.test_types, self.test_sessions, self.test_list, self.min_test_repetitions]
        if sum(bool(item) for item in given) > 1:
            raise ValueError("give one of test_types, test_sessions, test_list and min_test_repetitions")
        if self.concept_column is not None and self.concept_pattern is not None:
            raise ValueError("give concept_column or concept_pattern, not both")
        if self.concept_pattern is not None and re.compile(self.concept_pattern).groups < 1:
            raise ValueError(f"concept_pattern {self.concept_pattern!r} needs a group in parentheses")
        return self

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        digests = super().hash_inputs()
        if self.test_list is not None:
            digests["test_list"] = digest_file(self.test_list.expanduser())
        return digests

    def make_recipe(self) -> FmriRecipe:
        """Return the entities that are read, and the meaning of the columns."""
        entities = {
            "task": None if self.task is None else (self.task,),
            "acq": None if self.acq is None else (self.acq,),
            "run": self.runs,
        }
        return FmriRecipe("bids_fmri", entities, self._read_events, self._finish)

    def _read_events(self, table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
        import pandas as pd

        assert run.events is not None
        if self.stimulus_column not in table.columns:
            near = suggest(self.stimulus_column, list(table.columns))
            raise ConfigError(
                f"{run.events} has no column {self.stimulus_column!r}{near}; it has "
                f"{', '.join(table.columns)}: set dataset.stimulus_column to the column with the picture."
            )
        empty = pd.Series("", index=table.index)
        kinds = table.get(self.trial_type_column, empty)
        if self.trial_types is not None or self.test_types:
            check_columns(table.columns, (self.trial_type_column,), what=f"the events table {run.events}")
        shown = table[self.stimulus_column]
        is_trial = shown != ""
        if self.trial_types is not None:
            # Test kinds are trials too, even if trial_types does not name them.
            is_trial &= kinds.isin([*self.trial_types, *self.test_types])
        ids = shown.map(make_stimulus_id)
        is_test = kinds.isin(self.test_types)
        # GOD marks its test runs only by the session.
        if self.test_sessions is not None and re.fullmatch(self.test_sessions, run.entities.get("ses", "")):
            is_test |= True
        modelled = kinds.where(~kinds.isin(self.ignored_types), "")
        return pd.DataFrame(
            {
                "stimulus_id": ids.where(is_trial, ""),
                "concept": self._find_concepts(table, shown, ids, is_trial, run.events),
                "path": shown,
                "split": np.where(is_test, "test", "train"),
                "trial_type": modelled,
            }
        )

    def _find_concepts(
        self, table: pd.DataFrame, shown: pd.Series, ids: pd.Series, is_trial: pd.Series, path: Path
    ) -> pd.Series:
        if self.concept_column is not None:
            check_columns(table.columns, (self.concept_column,), what=f"the events table {path}")
            return table[self.concept_column]
        if self.concept_pattern is None:
            return ids
        found = shown.str.extract(self.concept_pattern, expand=True)[0]
        missing = is_trial & found.isna()
        if missing.any():
            raise ConfigError(
                f"dataset.concept_pattern {self.concept_pattern!r} finds no concept in "
                f"{shown[missing].iloc[0]!r} of {path}."
            )
        return found.fillna("")

    def _finish(self, trials: pd.DataFrame) -> pd.DataFrame:
        tested: set[str] | None = None
        if self.test_list is not None:
            path = check_file(self.test_list.expanduser(), what="dataset.test_list", hint="correct the path")
            tested = {make_stimulus_id(line) for line in path.read_text().split("\n") if line.strip()}
            if not tested & set(trials["stimulus_id"]):
                raise DataError(
                    f"none of the {len(tested)} pictures that {path} lists was shown; it is another list."
                )
        if self.min_test_repetitions is not None:
            # The largest count of one subject: views by different subjects are not repetitions.
            counts = trials.groupby(["subject", "stimulus_id"]).size().groupby("stimulus_id").max()
            tested = set(counts.index[counts >= self.min_test_repetitions])
        if tested is not None:
            trials = trials.assign(split=np.where(trials["stimulus_id"].isin(tested), "test", "train"))
        check_no_overlap(trials, title="the data set")
        return trials


def make_stimulus_id(value: str) -> str:
    """Return the name of a picture: its file name without folder and suffix.

    Examples
    --------
    >>> make_stimulus_id("imagenet/n03131574/n03131574_8247.JPEG"), make_stimulus_id("face")
    ('n03131574_8247', 'face')
    """
    return _SUFFIX.sub("", re.split(r"[/\\]", value.strip())[-1])
