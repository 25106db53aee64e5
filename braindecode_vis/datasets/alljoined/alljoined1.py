"""Alljoined1 (Xu et al. 2024): 64-channel EEG of eight subjects who saw the shared images of NSD.

Owns the configuration, the three forms in which a session is published (raw FIF, epochs FIF, HDF5 tables) and the
pairing of events with images. An event code counts the shared images of NSD from 1; the tables name images by 73KID
counted from 0. The pictures belong to NSD and are not part of the release. Epochs are cut elsewhere.

References
----------
Xu et al. (2024), arXiv:2404.05553.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError, is_there
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.datasets.alljoined.sessions import (
    Layout,
    Session,
    find_sessions,
    find_split,
    open_cut,
    open_raw,
    open_tables,
)
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, look_at
from braindecode_vis.datasets.nsd.experiment_design import (
    DESIGN_FILE,
    IMAGES_FILE,
    NsdDesign,
    find_images_file,
    open_images,
    read_design,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    MeegSettings,
    MeegSource,
    Mvnn,
    add_cleaning,
    check_published_rate,
    number_repetitions,
    sample_part,
)

SFREQ = 512.0
BIOSEMI64 = (
    "Fp1", "AF7", "AF3", "F1", "F3", "F5", "F7", "FT7", "FC5", "FC3", "FC1", "C1", "C3", "C5", "T7", "TP7", "CP5",
    "CP3", "CP1", "P1", "P3", "P5", "P7", "P9", "PO7", "PO3", "O1", "Iz", "Oz", "POz", "Pz", "CPz", "Fpz", "Fp2",
    "AF8", "AF4", "AFz", "Fz", "F2", "F4", "F6", "F8", "FT8", "FC6", "FC4", "FC2", "FCz", "Cz", "C2", "C4", "C6",
    "T8", "TP8", "CP6", "CP4", "CP2", "P2", "P4", "P6", "P8", "P10", "PO8", "PO4", "O2",
)  # fmt: skip
"""The channels of the amplifier, in the order of the files."""
SESSIONS = (1, 2)
BROKEN = frozenset({(2, 2), (3, 1), (7, 2), (8, 2)})
"""Subjects and sessions that are missing from the public release, or damaged in it."""


class Alljoined1Config(MeegSettings):
    """Folder of the sessions, subjects to read, and how trials are cut from raw recordings.

    Parameters
    ----------
    root
        Folder with ``subj01_session1_eeg.fif``, ``..._epo.fif`` or ``subj01_session1.h5``, directly or in subfolders.
    design
        ``nsd_expdesign.mat`` of NSD, which the FIF files need; found below or beside the root by default.
    images
        ``nsd_stimuli.hdf5`` of NSD; found below or beside the root by default. Without it, trials can be preprocessed,
        but not paired with pixels.
    image_size
        Edge of the pictures in pixels.
    layout
        ``raw``, ``epochs`` or ``tables``; by default the one that exists.
    subjects, sessions
        Numbers to read; all by default.
    broken
        Whether to ``skip`` or ``read`` the sessions that are known to be damaged, if their files exist.
    channels
        Names in the order in which they are stored; all 64 by default.
    reference
        Raw only: ``average`` over all good channels, since the amplifier records without a reference; names; or
        ``none``.
    sfreq
        Sampling rate of the trials. Raw recordings can be resampled to whole fractions of 512 Hz; epochs keep their
        rate.
    tmin, tmax, baseline, mvnn
        As in `EpochPlan`; published epochs, which were filtered to 0.5 to 125 Hz, are as their authors cut them.
    """

    kind: Literal["alljoined1"] = "alljoined1"
    design: Path | None = None
    image_size: int = Field(default=224, ge=16)
    layout: Literal["auto"] | Layout = "auto"
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    broken: Literal["skip", "read"] = "skip"
    channels: tuple[str, ...] | None = None
    reference: Literal["none", "average"] | tuple[str, ...] = "average"
    sfreq: float = Field(default=SFREQ, gt=0)
    # Xu et al. (2024) cut -0.05 to 0.6 s: the next image follows after 300 ms of picture and its pause.
    tmin: float = -0.05
    tmax: float = 0.6
    window: tuple[float, float] = (0.0, 0.6)
    mvnn: Mvnn = "none"

    not_hashed: ClassVar[frozenset[str]] = MeegSettings.not_hashed | {"design"}

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, sessions, _ = self._find()
        # Names are unique here: they contain subject and session, and no session occurs twice.
        files = {item.path.name: item.path for item in sessions}
        pictures = self._find_nsd_file(self.images, IMAGES_FILE, root)
        if pictures is not None:
            pictures = find_images_file(root, pictures)
        extra = [self._find_nsd_file(self.design, DESIGN_FILE, root), find_split(root), pictures]
        files |= {path.name: path for path in extra if path is not None and path.is_file()}
        return digest_files(files)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the sessions as lazy parts."""
        root, sessions, left_out = self._find()
        design = self._read_design(root)
        layout = sessions[0].layout
        test = find_split(root)
        parts = [self._open(item, design, test) for item in sessions]
        if layout != "raw":
            check_published_rate(SFREQ, self.sfreq, sessions[0].where)
        if layout != "raw" and self.mvnn != "none":
            raise ConfigError("dataset.mvnn needs the raw layout; published epochs are taken as they are.")
        plan = self.make_plan()
        notes: dict[str, Any] = {
            "layout": layout,
            "sessions_left_out": left_out,
            "split": "as published" if test else "none: no test_indices.json, every trial is for training",
            "processing": f"reference {self.reference}, {self.describe_filter()}" if layout == "raw"
            else "by its authors: 0.5 to 125 Hz, ICA, autoreject, average reference",
        }  # fmt: skip
        numbered = number_repetitions(parts)
        stimuli = self._make_stimuli(root, numbered, scratch)
        source = MeegSource("eeg", tuple(numbered), stimuli, plan, "V", notes=notes)
        return add_cleaning(source, self, referenced=layout == "raw" and self._reference_on_reading())

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every session, and pair every event with its image."""
        root, sessions, left_out = self._find()
        yield CheckFinding("layout", True, f"{sessions[0].layout}, {len(sessions)} session(s)")
        for text in left_out:
            yield CheckFinding(text, True, "left out: missing or damaged in the public release")
        try:
            design = self._read_design(root)
        except DataError as error:
            yield CheckFinding(DESIGN_FILE.name, False, str(error))
            return

        def describe(item: Session) -> str:
            part = self._open(item, design, find_split(root))
            sample_part(part, sfreq=SFREQ)
            return f"{len(part.trials)} trials of {part.trials['stimulus_id'].nunique()} images"

        for item in sessions:
            yield look_at(item.path.name, describe, item)

    def _find(self) -> tuple[Path, list[Session], list[str]]:
        """Return the sessions to read, and a description of those that are left out."""
        root = self.find_root()
        there = find_sessions(root, self.layout)
        subjects = sorted({item.subject for item in there}) if self.subjects is None else list(self.subjects)
        by_key = {(item.subject, item.session): item for item in there}
        chosen, left_out = [], []
        for key in ((subject, session) for subject in subjects for session in self.sessions or SESSIONS):
            name = f"subject {key[0]:02d}, session {key[1]}"
            # A session that is missing in the release must not be an error if all are requested.
            if key in BROKEN and (self.broken == "skip" or key not in by_key):
                left_out.append(name)
            elif key in by_key:
                chosen.append(by_key[key])
            else:
                raise DataError(
                    f"{name} of Alljoined1 is missing below {root}; fetch it, or list what to use with --set "
                    "dataset.subjects=[...] and dataset.sessions=[...]."
                )
        if not chosen:
            raise DataError(
                f"nothing is left to read below {root}: {'; '.join(left_out)} are missing or damaged in the public "
                "release. Choose other sessions, or set dataset.broken to read."
            )
        return root, chosen, left_out

    @staticmethod
    def _find_nsd_file(named: Path | None, file: Path, root: Path) -> Path | None:
        """Return a file of NSD: the given one, else one below or beside the root."""
        if named is not None:
            return named.expanduser()
        places = [base / name for base in (root, root.parent) for name in (file.name, file)]
        return next((path for path in places if is_there(path)), None)

    def _read_design(self, root: Path) -> NsdDesign | None:
        path = self._find_nsd_file(self.design, DESIGN_FILE, root)
        if path is not None and not path.is_file():
            raise DataError(f"the design of NSD was not found at {path}; correct dataset.design.")
        return None if path is None else read_design(path)

    def _open(
        self, item: Session, design: NsdDesign | None, test: Path | None
    ) -> ContinuousPart | EpochedPart:
        channels = BIOSEMI64 if self.channels is None else self.channels
        if item.layout == "tables":
            return open_tables(item, channels, BIOSEMI64, design, test)
        if design is None:
            raise DataError(
                f"{item.where} identifies images by their position among the shared images of NSD: put "
                f"{DESIGN_FILE.name} (from NSD's bucket; accept its terms first) beside the root, or "
                "give its path with --set dataset.design=FILE."
            )
        if item.layout == "epochs":
            return open_cut(item, channels, design, test)
        average = BIOSEMI64 if self._reference_on_reading() else None
        return open_raw(item, channels, design, test, average, self.max_dropped)

    def _reference_on_reading(self) -> bool:
        """Whether the mean of all channels is subtracted while reading: if none of them is bad or repaired first."""
        return self.reference == "average" and not self.bads and self.bad_channels == "keep"

    def _make_stimuli(self, root: Path, parts: list[Any], scratch: Path | None) -> StimulusSet:
        import pandas as pd

        ids = sorted(set().union(*(part.trials["stimulus_id"] for part in parts)))
        table = pd.DataFrame({"stimulus_id": ids, "concept": ids, "path": ""})
        # Ids carry the 73KID, from 1; the archive of pictures counts from 0.
        table["nsd_id"] = [int(name.removeprefix("nsd")) - 1 for name in ids]
        pictures = self._find_nsd_file(self.images, IMAGES_FILE, root)
        if pictures is None:
            return StimulusSet(table.assign(sha256=""))
        if scratch is None:
            raise ConfigError("copying pictures of NSD needs a scratch folder.")
        read = open_images(StimulusSet(table.assign(sha256="")), root, pictures, self.image_size)
        scratch.mkdir(parents=True, exist_ok=True)
        shape = (len(ids), self.image_size, self.image_size, 3)
        # On disk: 960 pictures of 224 pixels are 145 MB, larger ones do not fit beside the trials.
        pixels = np.lib.format.open_memmap(scratch / "pixels.npy", "w+", np.uint8, shape)
        for row in range(len(ids)):
            pixels[row] = read(row)
        hashes = [hash_pixels(image) for image in pixels]
        return StimulusSet(table.assign(path=pictures.name, sha256=hashes), pixels=pixels)
