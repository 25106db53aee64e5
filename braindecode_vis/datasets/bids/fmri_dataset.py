"""Any BIDS fMRI data set, raw or after fMRIPrep, by a recipe of column names.

Owns the options that say what the rows of an events table mean: which of them are trials, which column names the
picture, which pictures are test pictures. What is done with the time series is `braindecode_vis.preprocessing.bold`'s.

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
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from braindecode_vis.checks import ConfigError, DataError, check_columns, check_file, suggest
from braindecode_vis.datasets.bids.fmri_files import RunFiles
from braindecode_vis.datasets.bids.fmri_images import read_seconds
from braindecode_vis.datasets.bids.fmri_recipe import (
    BoldSettings,
    Recipe,
    check_bold,
    hash_bold_inputs,
    prepare_bold,
)
from braindecode_vis.datasets.bids.fmri_stimuli import check_no_overlap
from braindecode_vis.datasets.manifests import Finding
from braindecode_vis.datasets.sources.bold_source import BoldSource
from braindecode_vis.store import hash_file

_SUFFIX = re.compile(r"\.(jpe?g|png|bmp|tiff?|gif)$", re.IGNORECASE)


class BidsFmriConfig(BoldSettings):
    """Where the data set lies, and what its event tables mean; see also `BoldSettings`.

    Parameters
    ----------
    task, acq, runs
        Entities to read; all that are there by default, but several tasks must be chosen from.
    stimulus_column
        Column that names the picture; its file name without folder and suffix becomes the stimulus id.
    concept_column, concept_pattern
        Column that names the concept, or a regular expression whose first group finds it in the stimulus column.
        Without either, every picture is its own concept.
    trial_type_column
        Column that tells kinds of events apart.
    trial_types
        Kinds that are trials; by default every event that names a picture.
    ignored_types
        Kinds that no model needs to know, for example rest. Other events that are no trials are regressed out.
    test_types, test_sessions, test_list, min_test_repetitions
        Which trials are test trials: those of some kinds; of sessions whose label matches a regular expression; of
        pictures that a text file lists, one a line; or of pictures that one person saw at least so often. At most
        one of them. Without any, all are training trials, to be split later.
    """

    kind: Literal["bids_fmri"] = "bids_fmri"
    task: str | None = None
    acq: str | None = None
    runs: tuple[str, ...] | None = None
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
                raise ValueError(f"{value!r} is no regular expression ({error})") from error
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
        digests = hash_bold_inputs(self, self._make_recipe())
        return (
            digests
            if self.test_list is None
            else {**digests, "test_list": hash_file(self.test_list.expanduser())}
        )

    def open_bold(self) -> BoldSource:
        """Return the data set as lazy runs; see `prepare_bold`."""
        return prepare_bold(self, self._make_recipe())

    def check(self) -> list[Finding]:
        """Open every header and table, and pair events with pictures."""
        return check_bold(self, self._make_recipe())

    def _make_recipe(self) -> Recipe:
        entities = {
            "task": None if self.task is None else (self.task,),
            "acq": None if self.acq is None else (self.acq,),
            "run": self.runs,
        }
        return Recipe("bids_fmri", entities, self._read_events, self._finish)

    def _read_events(self, table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
        assert run.events is not None
        if self.stimulus_column not in table.columns:
            near = suggest(self.stimulus_column, list(table.columns))
            raise ConfigError(
                f"{run.events} has no column {self.stimulus_column!r}{near}; it has {', '.join(table.columns)}: set "
                "dataset.stimulus_column to the one that names the picture."
            )
        empty = pd.Series("", index=table.index)
        kinds = table.get(self.trial_type_column, empty)
        if self.trial_types is not None or self.test_types:
            check_columns(table.columns, (self.trial_type_column,), what=f"the events table {run.events}")
        shown = table[self.stimulus_column]
        is_trial = shown != ""
        if self.trial_types is not None:
            is_trial &= kinds.isin([*self.trial_types, *self.test_types])
        ids = shown.map(make_stimulus_id)
        is_test = kinds.isin(self.test_types)
        if self.test_sessions is not None and re.fullmatch(self.test_sessions, run.entities.get("ses", "")):
            is_test |= True
        modelled = kinds.where(~kinds.isin(self.ignored_types), "")
        return pd.DataFrame(
            {
                "onset": read_seconds(table, "onset", run.events),
                "duration": read_seconds(table, "duration", run.events),
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
