"""The layouts of THINGS-EEG2 on disk: which files somebody has, and what they are.

Owns the recognition of a layout from the content of its files; names only tell subject, session and partition. Opens
nothing for reading samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.safe_pickle import open_npy, read_pickled_dict, sniff
from braindecode_vis.datasets.things_eeg2.bids_layout import find_bids

Layout = Literal["raw", "official", "250hz", "ubp", "neurobridge", "bids"]
_SUBJECT, _SESSION = re.compile(r"sub-?0*(\d+)$"), re.compile(r"ses-?0*(\d+)$")


@dataclass(frozen=True)
class Held:
    """One file that somebody has: what it is and whose."""

    layout: Layout
    subject: int
    session: int | None
    split: str | None
    path: Path

    @property
    def where(self) -> str:
        """Subject, session and file, for messages."""
        session = "" if self.session is None else f", session {self.session:02d}"
        return f"subject {self.subject:02d}{session}, file {self.path}"

    @property
    def key(self) -> str:
        """A name that does not depend on where the data set lies."""
        session = "" if self.session is None else f"ses-{self.session:02d}/"
        return f"sub-{self.subject:02d}/{session}{self.path.name}"

    @property
    def files(self) -> list[Path]:
        """The file and what belongs to it."""
        if self.layout == "neurobridge":
            return [self.path, self.path.parent / "info.json"]
        if self.layout == "bids":
            stem = re.sub(r"_eeg\.\w+$", "", self.path.name)
            return sorted(p for p in self.path.parent.glob(f"{stem}_*") if p.suffix != ".json")
        return [self.path]


def find_held(root: Path, layout: Layout | None) -> list[Held]:
    """Return every file of one layout below `root`, or one folder deeper.

    Raises
    ------
    DataError
        If there is none, or a file cannot be recognised.
    ConfigError
        If there are several layouts and none was asked for.
    """
    held: list[Held] = []
    folders = [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for folder in folders:
        if _SUBJECT.match(folder.name):
            continue
        for person in sorted(p for p in folder.iterdir() if p.is_dir() and _SUBJECT.match(p.name)):
            held.extend(_look_into(person, layout))
    found = sorted({item.layout for item in held})
    if not held:
        raise DataError(
            f"no {layout or 'THINGS-EEG2'} recording was found below {root}: expected sub-01/ses-01/"
            "raw_eeg_training.npy and its like, or one of the preprocessed forms."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{root} holds THINGS-EEG2 in the layouts {', '.join(found)}; choose one with --set dataset.layout=..."
        )
    places = {
        item.path.parent.parent if item.session is None else item.path.parent.parent.parent for item in held
    }
    if len(places) > 1 and found != ["bids"]:
        names = ", ".join(map(str, sorted(places)))
        raise ConfigError(
            f"{root} holds the layout {found[0]} several times, in {names}; pass one of them as --root."
        )
    return held


def _look_into(person: Path, layout: Layout | None) -> Iterator[Held]:
    match = _SUBJECT.match(person.name)
    assert match is not None
    subject = int(match[1])
    sessions = [p for p in sorted(person.iterdir()) if p.is_dir() and _SESSION.match(p.name)]
    for folder in (person, *sessions):
        number = _SESSION.match(folder.name)
        session = int(number[1]) if number else None
        for path in find_bids(folder):
            if layout in (None, "bids"):
                yield Held("bids", subject, session, None, path)
        for path in sorted([*folder.glob("*.npy"), *folder.glob("*.pt")]):
            split = "train" if "train" in path.stem else "test" if "test" in path.stem else None
            if split is None or path.name.startswith("."):
                continue  # something of the user's own, or left there by a Mac
            item = Held("raw", subject, session, split, path)
            found = recognise(item)
            if layout in (None, found):
                yield replace(item, layout=found)


def recognise(item: Held) -> Layout:
    """Return the layout of a file, from what is in it."""
    kind = sniff(item.path)
    if kind == "zip":
        return "ubp"
    if kind == "npy":
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
        return "official" if kind == "npy-pickle" else "250hz"
    raise DataError(f"{item.where} holds a dictionary of {', '.join(content)}, which is no known layout.")


def read_dict(item: Held) -> dict[str, Any]:
    """Return the dictionary of a file; damage is named with its subject and session."""
    try:
        return read_pickled_dict(item.path)
    except DataError as error:
        raise DataError(f"{item.where}: {error}") from error
