"""The recipe that tells images, concepts and splits from the events table of any BIDS data set.

Owns the settings of the recipe and their application to one table. Cells are text throughout: a stimulus called
``021.50`` stays that. Knows no recording.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import field_validator, model_validator

from braindecode_vis.checks import ConfigError, DataError, suggest
from braindecode_vis.datasets.bids.meeg_raw import read_numbers
from braindecode_vis.settings import Settings

_ENDING = r"\.[A-Za-z]{2,4}$"
OnsetUnit = Literal["seconds", "milliseconds", "samples"]


class BidsSplitRecipe(Settings):
    """Which events train and which test, by one column of the events table.

    Parameters
    ----------
    column
        Column that tells.
    test
        Its values on test trials.
    train
        Its values on training trials; all others by default. With both given, further values are left out.
    """

    column: str
    test: tuple[str, ...]
    train: tuple[str, ...] | None = None

    @field_validator("test", "train", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _sides_differ(self) -> BidsSplitRecipe:
        both = sorted(set(self.test) & set(self.train or ()))
        if both:
            raise ValueError(f"{both[0]!r} is given for both training and test")
        return self


class BidsRecipe(Settings):
    """How to read the events table; see `BidsMeegConfig`, which has these settings among its own."""

    stimulus_column: str = "stim_file"
    id_from: Literal["name", "path"] = "name"
    concept_column: str | None = None
    concept_pattern: str | None = None
    trial_type_column: str = "trial_type"
    trial_types: tuple[str, ...] | None = None
    onset_column: str = "onset"
    onset_unit: OnsetUnit = "seconds"
    split: Literal["none"] | BidsSplitRecipe = "none"

    @field_validator("concept_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error})") from error
            if groups < 1:
                raise ValueError(f"{value!r} needs a group in parentheses that catches the concept")
        return value

    @field_validator("trial_types", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list | tuple) else value


def apply_recipe(
    recipe: BidsRecipe, table: pd.DataFrame, path: Path, sfreq: float, max_dropped: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the events that show an image, sorted by onset, and how many were no such events.

    Parameters
    ----------
    table
        Cells as text, NaN where missing.
    path
        Of the table, for messages.
    sfreq
        Of the recording, in Hz.
    max_dropped
        Largest share of the chosen events that may lack an onset or an image.

    Returns
    -------
    events : DataFrame
        `onset` (s), `sample`, `stimulus_id`, `concept`, `file`, `split` and `repetition` (zero for now).
    counts : dict
        Numbers of events of other types, without an image, and of neither split.
    """
    counts = {"n_other_type": 0, "n_without_image": 0, "n_of_neither_split": 0}
    if recipe.trial_types is not None:
        kinds = _column(table, recipe.trial_type_column, path, "trial_type_column")
        chosen = kinds.isin(recipe.trial_types).to_numpy()
        if not chosen.any():
            there = ", ".join(map(str, kinds.dropna().unique()[:8]))
            raise DataError(
                f"{path} has no event of the type {' or '.join(recipe.trial_types)}; its "
                f"{recipe.trial_type_column} are {there}."
            )
        counts["n_other_type"] = int((~chosen).sum())
        table = table[chosen]
    stimulus = _column(table, recipe.stimulus_column, path, "stimulus_column")
    known = stimulus.notna().to_numpy()
    counts["n_without_image"] = int((~known).sum())
    if not known.any() or (recipe.trial_types is not None and (~known).sum() > max_dropped * len(table)):
        raise DataError(
            f"{path} names no image in {int((~known).sum())} of {len(table)} events (column {recipe.stimulus_column}), "
            f"above the bound of {max_dropped:.1%}; choose the events with --set dataset.trial_types=[...], or another "
            "column with --set dataset.stimulus_column=NAME."
        )
    table, stimulus = table[known], stimulus[known]
    file = stimulus.str.strip().str.replace("\\", "/", regex=False)
    name = file.str.rsplit("/", n=1).str[-1] if recipe.id_from == "name" else file
    events = pd.DataFrame({"file": file, "stimulus_id": name.str.replace(_ENDING, "", regex=True)})
    events["concept"] = _find_concepts(recipe, table, file, path)
    events["split"] = _find_split(recipe.split, table, path)
    events["onset"] = _find_onsets(recipe, table, path, sfreq)
    events["sample"] = np.round(events["onset"] * sfreq).astype(np.int64)
    events["repetition"] = 0
    kept = events["split"].notna().to_numpy()
    counts["n_of_neither_split"] = int((~kept).sum())
    return events[kept].sort_values("sample", kind="stable").reset_index(drop=True), counts


def _column(table: pd.DataFrame, name: str, path: Path, option: str) -> pd.Series:
    if name not in table.columns:
        raise DataError(
            f"{path} has no column {name!r}{suggest(name, list(table.columns))}; its columns are "
            f"{', '.join(table.columns)}: name the right one with --set dataset.{option}=NAME."
        )
    return table[name]


def _find_concepts(recipe: BidsRecipe, table: pd.DataFrame, file: pd.Series, path: Path) -> pd.Series:
    """Return the concept of each event: of the column, of the pattern, of the folder, or the image itself."""
    if recipe.concept_column is not None and recipe.concept_pattern is not None:
        raise ConfigError("dataset.concept_column and dataset.concept_pattern exclude each other; give one.")
    if recipe.concept_column is not None:
        concepts = _column(table, recipe.concept_column, path, "concept_column")
    elif recipe.concept_pattern is not None:
        pattern = re.compile(recipe.concept_pattern)
        matches = [pattern.search(name) for name in file]
        concepts = pd.Series([m[1] if m else None for m in matches], index=file.index, dtype=object)
    else:
        folder = file.str.extract(r"(?:^|.*/)([^/]+)/[^/]+$")[0]
        return folder.fillna(file.str.replace(_ENDING, "", regex=True))
    missing = concepts.isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{path}: the concept of {int(missing.sum())} of {len(file)} images cannot be told, first "
            f"{file[missing].iloc[0]!r}; correct dataset.concept_column or dataset.concept_pattern."
        )
    return concepts


def _find_split(split: Any, table: pd.DataFrame, path: Path) -> np.ndarray:
    if split == "none":
        return np.full(len(table), "none", dtype=object)
    values = _column(table, split.column, path, "split.column")
    out = np.full(len(table), None if split.train is not None else "train", dtype=object)
    out[values.isna()] = None
    if split.train is not None:
        out[values.isin(split.train)] = "train"
    out[values.isin(split.test)] = "test"
    return out


def _find_onsets(recipe: BidsRecipe, table: pd.DataFrame, path: Path, sfreq: float) -> np.ndarray:
    """Return the onsets in s."""
    _column(table, recipe.onset_column, path, "onset_column")
    numbers = read_numbers(table, recipe.onset_column, path)
    return numbers / {"seconds": 1.0, "milliseconds": 1000.0, "samples": sfreq}[recipe.onset_unit]


def check_split(split: Any, tables: Iterable[pd.DataFrame]) -> None:
    """Raise unless there are training and test trials, and no image is on both sides."""
    if split == "none":
        return
    shown: dict[str, set[str]] = {"train": set(), "test": set()}
    for table in tables:
        for name, events in table.groupby("split"):
            shown[str(name)] |= set(events["stimulus_id"])
    for name, images in shown.items():
        if not images:
            raise ConfigError(
                f"dataset.split finds no {'training' if name == 'train' else name} trial: no "
                f"{split.column} is {', '.join(split.test if name == 'test' else split.train or ('another value',))}."
            )
    both = sorted(shown["train"] & shown["test"])
    if both:
        raise DataError(
            f"dataset.split shows {len(both)} image(s) both in training and in test, first {both[0]!r}: split by "
            "a column that belongs to the image, or set it to none and split by image later."
        )
