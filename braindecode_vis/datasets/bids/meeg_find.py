"""Which recordings of EEG or MEG a BIDS tree holds; the search is mne-bids'."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTENSIONS = {
    "eeg": (".vhdr", ".edf", ".bdf", ".set", ".cnt"),
    "meg": (".fif", ".ds", ".sqd", ".con", ".kdf"),
}


@dataclass(frozen=True)
class HeldRecording:
    """One recording and its BIDS entities."""

    subject: str
    session: str
    run: str
    task: str
    datatype: str
    path: Path
    bids: Any

    @property
    def where(self) -> str:
        """Subject, session and file, for messages."""
        return f"subject {self.subject}, session {self.session}, file {self.path}"

    @property
    def events(self) -> Path:
        """The events table."""
        entities = self.path.name.rsplit("_", 1)[0]
        return self.path.with_name(f"{entities.split('_split-')[0]}_events.tsv")


def find_recordings(root: Path, kinds: tuple[str, ...], task: str | None) -> list[HeldRecording]:
    """Return every recording of the given data types below `root`, sorted by path."""
    import mne_bids

    extensions = [ending for kind in kinds for ending in EXTENSIONS[kind]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matches = mne_bids.find_matching_paths(
            root,
            tasks=task,
            suffixes=list(kinds),
            datatypes=list(kinds),
            extensions=extensions,
            ignore_nosub=True,
        )
    held = {}
    for match in matches:
        path = Path(match.fpath)
        # FIF files in several parts are opened by their first; names that start with ._ are leftovers of macOS.
        is_later_part = match.split is not None and int(match.split) > 1
        if path.exists() and not is_later_part and match.subject != "emptyroom":
            held[path] = HeldRecording(
                match.subject,
                match.session or "01",
                match.run or "01",
                match.task or "",
                match.datatype,
                path,
                match,
            )
    return [held[path] for path in sorted(held)]
