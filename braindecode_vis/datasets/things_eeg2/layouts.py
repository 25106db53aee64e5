"""Files of THINGS-EEG2 on disk: recordings in one of six layouts, and the images in the order of their codes.

Owns the recognition of a layout from the content of its files (names only give subject, session and partition),
``image_metadata.npy`` and the folders ``training_images`` and ``test_images``. Both folders have their own numbering,
so the number of a folder is not a THINGS concept number: images are keyed by file name, concepts by name. Reads no
samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_unique, is_there
from braindecode_vis.base.remote import bring_all
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.bids.fmri_files import hash_image_folder
from braindecode_vis.datasets.sources.meeg_source import HeldFile, choose_layout
from braindecode_vis.datasets.sources.safe_pickle import open_npy, read_pickled_dict, sniff

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["raw", "official", "250hz", "ubp", "neurobridge", "bids"]
_ENDINGS = (".vhdr", ".edf", ".bdf", ".set")
_SUBJECT, _SESSION = re.compile(r"sub-?0*(\d+)$"), re.compile(r"ses-?0*(\d+)$")


@dataclass(frozen=True, kw_only=True)
class LaidOutFile(HeldFile):
    """One file on disk with its layout and subject."""

    layout: Layout
    split: str | None

    @property
    def key(self) -> str:
        """A name that does not depend on the folder of the data set."""
        session = "" if self.session is None else f"ses-{self.session:02d}/"
        return f"sub-{self.subject:02d}/{session}{self.path.name}"

    @property
    def files(self) -> list[Path]:
        """The file and its companions."""
        if self.layout == "neurobridge":
            return [self.path, self.path.parent / "info.json"]
        if self.layout == "bids":
            stem = re.sub(r"_eeg\.\w+$", "", self.path.name)
            return sorted(p for p in self.path.parent.glob(f"{stem}_*") if p.suffix != ".json")
        return [self.path]


def find_held(root: Path, layout: Literal["auto"] | Layout) -> list[LaidOutFile]:
    """Return every file of one layout below `root`, or one folder deeper.

    Raises
    ------
    DataError
        If there is none, or a file cannot be recognised.
    ConfigError
        If there are several layouts and none was chosen.
    """
    there: dict[str, list[LaidOutFile]] = {}
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for folder in folders:
        # The folder of a subject is read below, and contains no further subjects.
        if _SUBJECT.match(folder.name):
            continue
        for subject_folder in sorted(p for p in folder.iterdir() if p.is_dir() and _SUBJECT.match(p.name)):
            for item in _look_into(subject_folder):
                there.setdefault(item.layout, []).append(item)
    expected = "sub-01/ses-01/raw_eeg_training.npy and its like, or one of the preprocessed forms"
    chosen = choose_layout(there, layout, root, title="THINGS-EEG2", expected=expected)
    held = there[chosen]
    # The same layout in two folders would count every subject twice.
    places = {
        item.path.parent.parent if item.session is None else item.path.parent.parent.parent for item in held
    }
    if len(places) > 1 and chosen != "bids":
        names = ", ".join(map(str, sorted(places)))
        raise ConfigError(
            f"{root} holds the layout {chosen} several times, in {names}; pass one of them as --root."
        )
    return held


def _look_into(subject_folder: Path) -> Iterator[LaidOutFile]:
    match = _SUBJECT.match(subject_folder.name)
    assert match is not None
    subject = int(match[1])
    sessions = [p for p in sorted(subject_folder.iterdir()) if p.is_dir() and _SESSION.match(p.name)]
    for folder in (subject_folder, *sessions):
        number = _SESSION.match(folder.name)
        session = int(number[1]) if number else None
        for path in find_bids(folder):
            yield LaidOutFile(subject=subject, session=session, path=path, layout="bids", split=None)
        for path in sorted([*folder.glob("*.npy"), *folder.glob("*.pt")]):
            split = "train" if "train" in path.stem else "test" if "test" in path.stem else None
            if split is None or path.name.startswith("."):
                continue  # something of the user's own, or left there by a Mac
            item = LaidOutFile(subject=subject, session=session, path=path, layout="raw", split=split)
            yield replace(item, layout=recognise(item))


def find_bids(folder: Path) -> list[Path]:
    """Return the recordings in the ``eeg`` folder of a subject or session."""
    paths = sorted((folder / "eeg").glob("*_eeg.*")) if (folder / "eeg").is_dir() else []
    return [path for path in paths if path.suffix in _ENDINGS and not path.name.startswith(".")]


def recognise(item: LaidOutFile) -> Layout:
    """Return the layout of a file, from its content."""
    kind = sniff(item.path)
    # torch.save writes zip archives; opening one may run code, so its content is not read here.
    if kind == "zip":
        return "ubp"
    if kind == "npy":
        # (n_concepts, n_images, n_repetitions, n_channels, n_times)
        if len(open_npy(item.path).shape) == 5:
            return "neurobridge"
        raise DataError(
            f"{item.where} holds an array of shape {open_npy(item.path).shape}, which is no known layout."
        )
    if kind == "unknown":
        raise DataError(f"{item.where} is neither a NumPy file, a pickle nor an archive; fetch it again.")
    content = read_dict(item)
    if "raw_eeg_data" in content:
        return "raw"
    if "preprocessed_eeg_data" in content:
        # Both hold the same keys: the authors saved with NumPy, NICE and ATM with pickle.
        return "official" if kind == "npy-pickle" else "250hz"
    raise DataError(f"{item.where} holds a dictionary of {', '.join(content)}, which is no known layout.")


def read_dict(item: LaidOutFile) -> dict[str, Any]:
    """Return the dictionary of a file; an error about damage names subject and session."""
    try:
        return read_pickled_dict(item.path)
    except DataError as error:
        raise DataError(f"{item.where}: {error}") from error


METADATA = "image_metadata.npy"
_FOLDERS = {"train": ("training_images", "train_images"), "test": ("test_images",)}
# The folder of the unpacked images has different names in different releases.
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
        f"the folders training_images and test_images of THINGS-EEG2 were not found in {where}; unpack "
        "them there or give their folder with --set dataset.images=DIR."
    )


def hash_images(images: Path) -> dict[str, str]:
    """Return one digest for each of the two folders of pictures; recordings may be beside them."""
    folders = {split: _find_partition(images, split) for split in _FOLDERS}
    return {
        f"{split}_images": hash_image_folder(folder)["images"] for split, folder in folders.items() if folder
    }


def _find_partition(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in _FOLDERS[split] if (folder / name).is_dir()), None)


def find_metadata(root: Path, images: Path) -> Path | None:
    """Return ``image_metadata.npy``, beside the images or at the root, or None."""
    places = [images / METADATA, images.parent / METADATA, root / METADATA]
    return next((path for path in places if is_there(path)), None)


def read_image_list(root: Path, images: Path) -> pd.DataFrame:
    """Return one row per image: `split`, `code` (from 1 in each split), `stimulus_id`, `concept`, `path`.

    The order is that of ``image_metadata.npy``; without it, the order of the sorted folders and files, which is the
    same in the published set.

    Raises
    ------
    DataError
        If the list and the folders disagree, or a file name does not belong to its concept.
    """
    import pandas as pd

    metadata = find_metadata(root, images)
    content = None if metadata is None else read_pickled_dict(metadata)
    tables = []
    for split in _FOLDERS:
        folder = _find_partition(images, split)
        assert folder is not None
        found = _list_folder(folder)
        # In the published set, sorted names have the order of the codes; if they differ, the list decides.
        listed = found if content is None else _list_metadata(content, split, metadata)
        table = pd.DataFrame(listed, columns=["folder", "file"])
        table["split"] = split
        table["code"] = np.arange(1, len(table) + 1)
        table["path"] = folder.name + "/" + table["folder"] + "/" + table["file"]
        table["concept"] = table["folder"].str.replace(r"^\d+_", "", regex=True)
        table["stimulus_id"] = table["file"].str.replace(r"\.[A-Za-z]+$", "", regex=True)
        # File names begin with their concept, so lists that are shifted by one are found here.
        pairs = zip(table["stimulus_id"], table["concept"], strict=True)
        wrong = [row for row, (name, concept) in enumerate(pairs) if not name.startswith(concept)]
        if wrong:
            first = table.iloc[wrong[0]]
            raise DataError(
                f"{metadata or images} pairs the file {first['file']} with the concept {first['concept']!r} "
                f"({len(wrong)} of {len(table)} such pairs): its lists are shifted against each other."
            )
        _compare(listed, found, folder, metadata)
        tables.append(table)
    images_table = pd.concat(tables, ignore_index=True)
    check_unique(images_table["stimulus_id"].tolist(), what=f"the image files of {metadata or images}")
    # The zero-shot protocol: no test concept may be used for training.
    both = sorted(set(tables[0]["concept"]) & set(tables[1]["concept"]))
    if both:
        raise DataError(
            f"{metadata or images} has {len(both)} concept(s) in both the training and the test part, first "
            f"{both[0]!r}: the published parts share none."
        )
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
        raise DataError(f"{path} is missing {', '.join(missing)}; it is not the {METADATA} of THINGS-EEG2.")
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


def make_stimuli(table: pd.DataFrame, images: Path) -> StimulusSet:
    """Return the stimulus set of the given rows of the image list; hashes every file."""
    stimuli = table[["stimulus_id", "concept", "path", "split"]].reset_index(drop=True)
    bring_all(images / path for path in stimuli["path"])
    return StimulusSet(stimuli.assign(sha256=[hash_file(images / path) for path in stimuli["path"]]), images)
