"""Image files of data sets whose events name them: found below a root, or left for later.

Owns the step from shown images to a `StimulusSet`. A data set may come without its images (those of THINGS are not
handed on with the recordings); then the set knows names and concepts, and no pixels. Knows no data set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.bids.fmri_stimuli import find_image_folder, hash_image_folder
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file

PLACES = ("", "images", "object_images", "stimuli", "THINGS-images", "images_THINGS/object_images")


def hash_images(named: Path | None, root: Path) -> dict[str, str]:
    """Return a digest of the image files at hand, so that a run prepared without them notices that they have come."""
    beside = [place for place in PLACES if place]
    found = find_image_folder(root, [*beside, ""])
    return hash_image_folder(named, find_image_folder(root.parent, beside) if found is None else found)


def make_shown_table(events: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return one row per image: `stimulus_id`, `concept`, `file` and `split`, sorted by id.

    Raises
    ------
    DataError
        If an image has two concepts, two files or two splits.
    """
    columns = ["stimulus_id", "concept", "file", "split"]
    table = pd.concat([t[columns] for t in events]).drop_duplicates()
    twice = table["stimulus_id"][table["stimulus_id"].duplicated()]
    if len(twice):
        rows = table[table["stimulus_id"] == twice.iloc[0]].astype(str)
        what = next(c for c in columns[1:] if rows[c].nunique() > 1)
        raise DataError(
            f"the image {twice.iloc[0]!r} has more than one {what} ({', '.join(rows[what].unique()[:3])}): the events "
            "do not name their images uniquely."
        )
    return table.sort_values("stimulus_id").reset_index(drop=True)


def make_stimuli(
    shown: pd.DataFrame,
    named: Path | None,
    guesses: Sequence[Path],
    candidates: Callable[[str, str], Sequence[str]],
    *,
    option: str = "dataset.images",
) -> StimulusSet:
    """Return the stimulus set of the shown images, with the hash of each file where the files are at hand.

    Parameters
    ----------
    shown : DataFrame
        From `make_shown_table`.
    named
        Folder that the user named; then every image must be there.
    guesses
        Folders to try otherwise; without success the set has no root.
    candidates
        ``candidates(file, concept)`` lists the places of an image below such a folder.

    Raises
    ------
    DataError
        If an image is missing from a folder that holds others.
    """
    columns = ["stimulus_id", "concept", "path", "split", "sha256"]
    pairs = list(zip(shown["file"], shown["concept"], strict=True))
    # A folder is the right one if it holds some of a few images; trying all in every folder would take minutes.
    few = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, 25).astype(int))]
    likely = [
        root
        for root in dict.fromkeys(guesses)
        if root.is_dir() and any(_find_one(root, candidates(*pair)) for pair in few)
    ]
    for root in [named.expanduser()] if named is not None else likely[:1]:
        found = [_find_one(root, candidates(*pair)) for pair in pairs]
        missing = [i for i, path in enumerate(found) if path is None]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(pairs)} images are not in {root}, first {candidates(*pairs[missing[0]])[0]}: "
                f"the folder is of another release or incomplete; name the right one with --set {option}=DIR."
            )
        paths = [str(path) for path in found]
        hashes = [hash_file(root / path) for path in paths]
        return StimulusSet(shown.assign(path=paths, sha256=hashes)[columns], root)
    first = [candidates(*pair)[0] for pair in pairs]
    return StimulusSet(shown.assign(path=first, sha256="")[columns])


def _find_one(root: Path, places: Sequence[str]) -> str | None:
    return next((place for place in places if os.path.isfile(f"{root}/{place}")), None)  # noqa: PTH113 (speed)


def describe_images(stimuli: StimulusSet) -> str:
    """Return where the images are, in words."""
    if stimuli.root is None:
        return f"{len(stimuli)} images are named, but their files are not at hand"
    return f"{len(stimuli)} image files in {stimuli.root}"
