"""The images that fMRI trials name, looked up in a folder by name.

Owns one rule: an image is found at its relative path, or else by its file name anywhere below the folder (a copy with
another suffix counts), and never by position. Without a folder the set still says what was shown: its rows then carry
the sha256 of the name in place of that of the file, and no pixels.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


def find_image_folder(root: Path, places: Sequence[str]) -> Path | None:
    """Return the first of some folders below `root` that holds a picture: where people put the images by themselves."""
    folders = (root / place for place in places)
    return next((folder for folder in folders if folder.is_dir() and _list_pictures(folder)), None)


def hash_image_folder(images: Path | None, beside: Path | None = None) -> dict[str, str]:
    """Return a digest of the names and sizes of the pictures in `images`, or in `beside` without it; none if neither.

    Without it, a run that was prepared without pictures would never notice that they have come.
    """
    folder = images.expanduser() if images is not None else beside
    if folder is None:
        return {}
    listed = [
        f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in _list_pictures(folder)
    ]
    return {"images": hashlib.sha256("\n".join(listed).encode()).hexdigest()}


def make_named_stimuli(
    table: pd.DataFrame, images: Path | None, *, title: str, beside: Path | None = None
) -> StimulusSet:
    """Return one row per stimulus.

    Parameters
    ----------
    table : DataFrame
        `stimulus_id`, `concept` and `path` (relative, or a bare file name with or without its suffix; empty for what
        has no picture); repeated rows are allowed if they agree.
    images
        Folder of the pictures; None if they are not at hand.
    title
        What the set is called in messages.
    beside
        Folder that may hold the pictures if `images` is None; used if it holds all of them.

    Raises
    ------
    DataError
        If one id has two concepts or two paths, or a picture is missing or there twice.
    """
    unique = table[["stimulus_id", "concept", "path"]].drop_duplicates().reset_index(drop=True)
    twice = unique[unique["stimulus_id"].duplicated(keep=False)]
    if len(twice):
        first = twice[twice["stimulus_id"] == twice["stimulus_id"].iloc[0]]
        raise DataError(
            f"{title}: the stimulus {first['stimulus_id'].iloc[0]!r} is listed as {first['concept'].iloc[0]!r} at "
            f"{first['path'].iloc[0]!r} and as {first['concept'].iloc[1]!r} at {first['path'].iloc[1]!r}; an id must "
            "name one picture."
        )
    if images is None and beside is not None:
        try:
            return make_named_stimuli(unique, beside, title=title)
        except DataError:  # nobody asked for this folder, so its gaps are no error
            images = None
    if images is None:
        return StimulusSet(unique.assign(sha256=[hash_name(name) for name in unique["stimulus_id"]]))
    root = images.expanduser()
    if not root.is_dir():
        raise DataError(f"{title}: the folder of images {root} does not exist; correct dataset.images.")
    paths = _locate(unique["path"].tolist(), root, title)
    digests = [
        hash_file(root / path) if path else hash_name(name)
        for name, path in zip(unique["stimulus_id"], paths, strict=True)
    ]
    return StimulusSet(unique.assign(path=paths, sha256=digests), root)


def hash_name(name: str) -> str:
    """Return the sha256 of a name: the identity of a stimulus whose picture is not at hand."""
    return hashlib.sha256(name.encode()).hexdigest()


def check_no_overlap(trials: pd.DataFrame, *, title: str) -> None:
    """Raise `DataError` if a stimulus is shown in training and in test trials."""
    train = set(trials.loc[trials["split"] == "train", "stimulus_id"])
    both = sorted(train & set(trials.loc[trials["split"] == "test", "stimulus_id"]))
    if both:
        raise DataError(f"{title}: {len(both)} stimuli are both trained on and tested, first {both[0]}.")


def _locate(paths: list[str], root: Path, title: str) -> list[str]:
    index: dict[str, list[str]] = {}
    located: list[str] = []
    missing: list[str] = []
    for path in paths:
        if not path or (root / path).is_file():
            located.append(path)
            continue
        index = index or _index_folder(root)
        name = path.rsplit("/", 1)[-1].lower()
        found = index.get(name) or index.get(name + "*") or index.get(_drop_suffix(name) + "*") or []
        if len(found) > 1:
            raise DataError(
                f"{title}: {name} lies below {root} twice, as {found[0]} and {found[1]}; remove one of them."
            )
        (located if found else missing).append(found[0] if found else path)
    if missing:
        raise DataError(
            f"{title}: {len(missing)} of {len(paths)} images are not below {root}, first {missing[0]}; "
            "unpack the image set there, or leave dataset.images out to work without pixels."
        )
    return located


def _index_folder(root: Path) -> dict[str, list[str]]:
    """Return relative paths by file name, and by name without suffix followed by a star, all in lower case."""
    index: dict[str, list[str]] = defaultdict(list)
    for path in _list_pictures(root):
        relative = path.relative_to(root).as_posix()
        index[path.name.lower()].append(relative)
        index[path.stem.lower() + "*"].append(relative)
    return dict(index)


def _list_pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _drop_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix in _SUFFIXES else name
