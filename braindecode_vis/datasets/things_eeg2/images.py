"""The images of THINGS-EEG2 and the order in which the recordings count them.

Owns ``image_metadata.npy`` and the folders ``training_images`` and ``test_images``. Both are numbered on their own, so
the number of a folder is not a THINGS concept number: images are keyed by file name, concepts by name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_unique
from braindecode_vis.datasets.sources.safe_pickle import read_pickled_dict
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file

METADATA = "image_metadata.npy"
_FOLDERS = {"train": ("training_images", "train_images"), "test": ("test_images",)}
_PLACES = ("", "images", "image_set", "Image_set", "Image_set_Resize", "stimuli", "images_set")


def find_images(root: Path, images: Path | None) -> Path:
    """Return the folder that holds the training and test images.

    Parameters
    ----------
    root
        Folder of the data set.
    images
        The folder itself, if the user named it.
    """
    if images is not None:
        candidates = [images.expanduser()]
    else:
        candidates = [base / place for base in (root, root.parent) for place in _PLACES]
    for candidate in candidates:
        if all(_find_partition(candidate, split) for split in _FOLDERS):
            return candidate
    where = images if images is not None else f"{root} (in {', '.join(p for p in _PLACES if p)} or beside it)"
    raise DataError(
        f"the folders training_images and test_images of THINGS-EEG2 were not found in {where}; "
        "unpack them there or name their folder with --set dataset.images=DIR."
    )


def _find_partition(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in _FOLDERS[split] if (folder / name).is_dir()), None)


def find_metadata(root: Path, images: Path) -> Path | None:
    """Return ``image_metadata.npy``, beside the images or at the root, or None."""
    places = [images / METADATA, images.parent / METADATA, root / METADATA]
    return next((path for path in places if path.is_file()), None)


def read_image_list(root: Path, images: Path) -> pd.DataFrame:
    """Return one row per image: `split`, `code` (from 1 in each split), `stimulus_id`, `concept`, `path`.

    The order is that of ``image_metadata.npy``; without it, that of the sorted folders and files, which is the same
    in the published set.

    Raises
    ------
    DataError
        If the list and the folders disagree, or a file name does not belong to its concept.
    """
    metadata = find_metadata(root, images)
    content = None if metadata is None else read_pickled_dict(metadata)
    tables = []
    for split in _FOLDERS:
        folder = _find_partition(images, split)
        assert folder is not None
        found = _list_folder(folder)
        listed = found if content is None else _list_metadata(content, split, metadata)
        table = pd.DataFrame(listed, columns=["folder", "file"])
        table["split"] = split
        table["code"] = np.arange(1, len(table) + 1)
        table["path"] = folder.name + "/" + table["folder"] + "/" + table["file"]
        table["concept"] = table["folder"].str.replace(r"^\d+_", "", regex=True)
        table["stimulus_id"] = table["file"].str.replace(r"\.[A-Za-z]+$", "", regex=True)
        _check_names(table, metadata or images)
        _compare(listed, found, folder, metadata)
        tables.append(table)
    images_table = pd.concat(tables, ignore_index=True)
    _check_parts(images_table, metadata or images)
    return images_table[["split", "code", "stimulus_id", "concept", "path"]]


def _list_folder(folder: Path) -> list[tuple[str, str]]:
    return [
        (concept.name, file.name)
        for concept in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        for file in sorted(concept.iterdir())
        if file.suffix.lower() in (".jpg", ".jpeg", ".png") and not file.name.startswith(".")
    ]


def _list_metadata(content: dict, split: str, path: Path | None) -> list[tuple[str, str]]:
    keys = (f"{split}_img_concepts", f"{split}_img_files")
    missing = [key for key in keys if key not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it is not the {METADATA} of THINGS-EEG2.")
    concepts, files = (list(map(str, content[key])) for key in keys)
    if len(concepts) != len(files):
        raise DataError(f"{path} lists {len(concepts)} concepts for {len(files)} files in its {split} part.")
    return list(zip(concepts, files, strict=True))


def _compare(
    listed: list[tuple[str, str]], found: list[tuple[str, str]], folder: Path, metadata: Path | None
) -> None:
    if not found:
        raise DataError(f"{folder} holds no images; unpack the image set of THINGS-EEG2 there.")
    missing = sorted(set(listed) - set(found))
    extra = sorted(set(found) - set(listed))
    if missing or extra:
        first = "/".join((missing or extra)[0])
        raise DataError(
            f"{folder} is of another release than {metadata}: {len(missing)} listed image(s) are missing and "
            f"{len(extra)} are not listed, first {first}; fetch both from the same place."
        )


def _check_names(table: pd.DataFrame, source: Path) -> None:
    pairs = zip(table["stimulus_id"], table["concept"], strict=True)
    wrong = [index for index, (name, concept) in enumerate(pairs) if not name.startswith(concept)]
    if wrong:
        row = table.iloc[wrong[0]]
        raise DataError(
            f"{source} pairs the file {Path(row['path']).name} with the concept {row['concept']!r} "
            f"({len(wrong)} of {len(table)} such pairs): its lists are shifted against each other."
        )


def _check_parts(table: pd.DataFrame, source: Path) -> None:
    check_unique(table["stimulus_id"].tolist(), what=f"the image files of {source}")
    parts = table.groupby("split")["concept"].agg(set)
    both = sorted(parts["train"] & parts["test"])
    if both:
        raise DataError(
            f"{source} has {len(both)} concept(s) in both the training and the test part, first {both[0]!r}: "
            "the published parts share none."
        )


def make_stimuli(table: pd.DataFrame, images: Path) -> StimulusSet:
    """Return the stimulus set of the given rows of the image list; hashes every file."""
    stimuli = table[["stimulus_id", "concept", "path", "split"]].reset_index(drop=True)
    return StimulusSet(stimuli.assign(sha256=[hash_file(images / path) for path in stimuli["path"]]), images)
