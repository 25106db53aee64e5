"""The images of THINGS-MEG by number, and the attribute tables.

Owns ``image_paths.csv`` and ``image_concept_index.csv`` of THINGS (no header, row = image number - 1), and
``sourcedata/sample_attributes_P*.csv``, whose columns are taken by name. Concepts are names: a table that is shifted by
a row is found by comparing them, not by a shape. Reads no samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns

CATCH_ID = 999999
_TABLE_PLACES = ("", "Metadata/Image-specific", "Metadata/Concept-specific", "THINGS/Metadata/Image-specific",
                 "THINGS/Metadata/Concept-specific", "01_image-level", "02_object-level", "metadata")  # fmt: skip
_NEEDED = ("trial_type", "things_image_nr", "image_path", "session_nr", "run_nr")


def find_attributes(root: Path, subject: int) -> pd.DataFrame | None:
    """Return the attribute table of a person, or None if there is none."""
    path = _find_attributes(root, subject)
    if path is None:
        return None
    table = pd.read_csv(path)
    check_columns(table.columns, _NEEDED, what=str(path))
    return table


def read_image_names(root: Path, images: Path | None, attributes: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return what each THINGS image number means: index `number`, columns `stimulus_id`, `concept`, `file`, `category`.

    Parameters
    ----------
    root, images
        Where the two THINGS tables may lie.
    attributes
        Attribute tables of the subjects; they are compared with the THINGS tables, and stand in for them.

    Raises
    ------
    DataError
        If the tables disagree, or none is there.
    """
    bases = _list_bases(root, images)
    paths = _find_table("image_paths.csv", bases)
    listed = None if paths is None else _read_paths(paths, _find_table("image_concept_index.csv", bases))
    told = _read_told(attributes)
    if listed is None and told is None:
        raise DataError(
            f"nothing near {root} says which image a number means: put image_paths.csv (THINGS, OSF jum2f, "
            "Metadata/Image-specific) or sourcedata/sample_attributes_P1.csv there."
        )
    if listed is None or told is None:
        return told if listed is None else listed  # type: ignore[return-value]
    both = told.index.intersection(listed.index)
    differs = both[told.loc[both, "stimulus_id"].to_numpy() != listed.loc[both, "stimulus_id"].to_numpy()]
    unlisted = len(told) - len(both)
    if len(differs) or unlisted:
        at = differs[0] if len(differs) else told.index.difference(listed.index)[0]
        here = listed["stimulus_id"].get(at, "nothing")
        raise DataError(
            f"{paths} and the sample attributes disagree on {len(differs) + unlisted} image number(s), first {at}: "
            f"{here!r} and {told['stimulus_id'][at]!r}; the list is shifted or of another release (it has no header; "
            "its row is the image number - 1)."
        )
    return listed


def find_name_files(root: Path, images: Path | None, subjects: Iterable[int]) -> list[Path]:
    """Return the tables that decide which image a number means, as far as they are there."""
    bases = _list_bases(root, images)
    listed = [_find_table(name, bases) for name in ("image_paths.csv", "image_concept_index.csv")]
    return [path for path in (*listed, *(_find_attributes(root, s) for s in subjects)) if path is not None]


def _list_bases(root: Path, images: Path | None) -> list[Path]:
    return [base for base in (root, root.parent, images, None if images is None else images.parent) if base]


def _find_attributes(root: Path, subject: int) -> Path | None:
    name = f"sample_attributes_P{subject}.csv"
    return next((p for p in (root / "sourcedata" / name, root / name) if p.is_file()), None)


def _find_table(name: str, bases: Iterable[Path]) -> Path | None:
    return next((b / p / name for b in bases for p in _TABLE_PLACES if (b / p / name).is_file()), None)


def _read_paths(path: Path, index: Path | None) -> pd.DataFrame:
    lines = [line.strip().strip('"').replace("\\", "/") for line in path.read_text().splitlines()]
    table = _split_paths(pd.Series([line for line in lines if line]), str(path))
    table.index = pd.RangeIndex(1, len(table) + 1, name="number")
    if index is None:
        return table.assign(category=np.nan)
    try:
        numbers = [int(float(line)) for line in index.read_text().split()]
    except ValueError as error:
        raise DataError(f"{index} must hold one concept number a line, without header ({error}).") from error
    if len(numbers) != len(table):
        raise DataError(
            f"{index} numbers {len(numbers)} images and {path} lists {len(table)}: one has a header or is of another "
            "release."
        )
    table["category"] = np.array(numbers) + (1 - min(numbers) if min(numbers) in (0, 1) else 0)
    for key, other in (("category", "concept"), ("concept", "category")):
        mixed = table.groupby(key)[other].nunique()
        if (mixed > 1).any():
            value = mixed.index[mixed > 1][0]
            raise DataError(
                f"{path} and {index} do not fit: {key} {value} has {mixed[value]} values of {other}; one of them is "
                "shifted by a row or of another release."
            )
    return table


def _read_told(attributes: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    if not attributes:
        return None
    shown = pd.concat(
        [t.loc[t["trial_type"] != "catch", ["things_image_nr", "image_path"]] for t in attributes]
    )
    shown = shown.assign(stem=shown["image_path"].map(lambda p: Path(str(p)).stem)).drop_duplicates(
        ["things_image_nr", "stem"]
    )
    twice = shown["things_image_nr"][shown["things_image_nr"].duplicated()]
    if len(twice):
        raise DataError(
            f"the sample attributes give image number {twice.iloc[0]:.0f} to several images; they are not as published."
        )
    names = shown["stem"].reset_index(drop=True)
    concepts = names.str.replace(r"_\d+[a-z]*$", "", regex=True)
    return pd.DataFrame(
        {
            "stimulus_id": names,
            "concept": concepts,
            "file": concepts + "/" + names + ".jpg",
            "category": np.nan,
        }
    ).set_index(pd.Index(shown["things_image_nr"].astype(int), name="number"))


def _split_paths(paths: pd.Series, where: str) -> pd.DataFrame:
    parts = paths.str.extract(r"(?:^|.*/)([^/]+)/([^/]+)\.(\w+)$")
    bad = np.flatnonzero(parts[0].isna())
    if len(bad):
        raise DataError(
            f"{where} has {paths.iloc[bad[0]]!r} in line {bad[0] + 1}, where concept/name.jpg must be."
        )
    return pd.DataFrame(
        {"stimulus_id": parts[1], "concept": parts[0], "file": parts[0] + "/" + parts[1] + "." + parts[2]}
    )


def name_events(numbers: np.ndarray, names: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return `stimulus_id`, `concept` and `file` of each image number; an unknown number is an error."""
    unknown = np.flatnonzero(~np.isin(numbers, names.index.to_numpy()))
    if len(unknown):
        raise DataError(
            f"{where} shows image number {numbers[unknown[0]]} in event {unknown[0] + 1}, but {len(names)} images are "
            f"named, up to number {names.index.max()}: the image list is of another release."
        )
    return names.loc[numbers, ["stimulus_id", "concept", "file"]].reset_index(drop=True)
