"""Results of the search for recordings: runs whose samples are not read yet, and files that were left out.

Owns the lazy description of a run and of the channels of a corpus, and the facts of a BIDS root about all its runs.
Reads no samples and computes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from braindecode_vis.base.checks import DataError, is_there, refuse_damage
from braindecode_vis.datasets.bids.fmri_files import read_table

Modality = Literal["fmri", "eeg", "meg"]


@dataclass(frozen=True)
class Channels:
    """The parcels or sensors of a corpus, in its order: every run is mapped to them.

    ``fmri_sources.read_fmri_channels(channels)`` and ``meeg_sources.read_meeg_channels(config, roots)`` return
    them when the first source is added. Sensors that were found in recordings are kept in the settings of the corpus.

    Parameters
    ----------
    names
        Name of each channel; no name occurs twice.
    networks
        Network or region of each channel, empty text if it has none.
    coordinates : array of shape (n_channels, 3), optional
        Centre of each parcel (mm, space of the atlas) or position of each sensor (m, head coordinates).
    digest
        Digest of the files that define them, such as an atlas; empty if names are sufficient.
    """

    names: tuple[str, ...]
    networks: tuple[str, ...]
    coordinates: np.ndarray | None = None
    digest: str = ""


@dataclass(frozen=True)
class SeriesRun:
    """One continuous recording of one subject; its samples are read when they are needed.

    Parameters
    ----------
    source
        Name of the data set (``Name`` in dataset_description.json, else that of the folder).
    subject, session, run, task
        Labels as in BIDS, without ``sub-`` and similar prefixes; empty text if there is none.
    site
        Place of the recording: column `site` of participants.tsv, else `source`.
    files
        All files that are read for it. Messages name the first one; digests are computed from all.
    channels
        All channels of the corpus, in its order.
    missing
        Those of them that this run does not have.
    n_times
        Samples after cleaning, before resampling to the interval of the corpus.
    interval_s
        Time between two samples (s): the repetition time, or one over the sampling rate.
    motion_mm
        Mean framewise displacement (mm), if known.
    licence
        Licence of the data set, empty text if unknown.
    read
        Returns float32 of shape (n_times, n_channels), cleaned; missing channels are NaN, all others finite.
    scrubbed
        Share of the samples that were replaced or cut for motion.
    """

    source: str
    subject: str
    session: str
    run: str
    task: str
    site: str
    files: tuple[Path, ...]
    modality: Modality
    channels: tuple[str, ...]
    missing: tuple[str, ...]
    n_times: int
    interval_s: float
    motion_mm: float | None
    licence: str
    read: Callable[[], np.ndarray] = field(repr=False)
    scrubbed: float = 0.0


@dataclass(frozen=True)
class Excluded:
    """A recording that was found and left out.

    Parameters
    ----------
    path
        Its file.
    reason
        Reason, as a text that follows "left out: ".
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class SourceCard:
    """Facts of a source folder about all its runs.

    Parameters
    ----------
    name
        ``Name`` in dataset_description.json, else that of the folder; for derivatives, the folder of the data set from
        which they were made.
    licence
        ``License`` there, empty text if it is missing.
    sites
        Site by subject (without ``sub-``), for the subjects whose site is in participants.tsv.
    """

    name: str
    licence: str
    sites: Mapping[str, str]

    def find_site(self, subject: str) -> str:
        """Return the place of a subject's recordings: the source itself unless its table names a site."""
        return self.sites.get(subject) or self.name


#: Names that pipelines give to what they make of any data set.
_OF_PIPELINES = re.compile(r"(fmriprep|smriprep|xcp[-_ ]?d\b|nibabies)", re.IGNORECASE)
_SITE_COLUMNS = ("site", "site_id", "scan_site", "institution")


def read_source_card(root: Path) -> SourceCard:
    """Read dataset_description.json and participants.tsv of a source; both are optional.

    Derivatives often do not repeat the table, so it is searched in the folder of their source data, too.

    Raises
    ------
    DataError
        If the root is no folder, or one of the files is damaged.
    """
    if not root.is_dir():
        raise DataError(f"the source {root} is not a folder; correct its path.")
    folders = [root]
    if "derivatives" in root.parts[-2:]:
        folders.append(root.parent if root.name == "derivatives" else root.parent.parent)
    described: dict[str, object] = {}
    path = root / "dataset_description.json"
    if is_there(path):
        with refuse_damage(f"{path} is not valid JSON", json.JSONDecodeError, UnicodeDecodeError):
            content = json.loads(path.read_text())
        described = content if isinstance(content, dict) else {}
    sites: dict[str, str] = {}
    table = next((f / "participants.tsv" for f in folders if is_there(f / "participants.tsv")), None)
    if table is not None:
        rows = read_table(table)
        column = next((c for c in rows.columns if c.lower() in _SITE_COLUMNS), None)
        if column is not None and "participant_id" in rows.columns:
            names = rows["participant_id"].str.removeprefix("sub-")
            sites = dict(zip(names, rows[column].str.strip(), strict=True))
    name = str(described.get("Name") or "").strip()
    if not name or _OF_PIPELINES.match(name):
        # Otherwise subjects of all data sets that one pipeline processed would belong to one data set.
        place = folders[-1].resolve()
        name = place.parent.name if _OF_PIPELINES.match(place.name) and place.parent.name else place.name
    return SourceCard(
        name,
        str(described.get("License") or "").strip(),
        sites,
    )
