"""THINGS-EEG2 (Gifford et al. 2022) in its six published forms.

Owns the configuration of the data set and the choice of its layout, which is recognised by the content of the files.
`open_epochs` gives lazy parts and reads no samples. Epochs are cut and whitened elsewhere.

References
----------
Gifford, Dwivedi, Roig, Cichy (2022), doi:10.1016/j.neuroimage.2022.119754.
Song et al. (2024), arXiv:2308.13234: the 250 Hz preprocessing that the defaults follow.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.digests import digest_files
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    check_subset,
    collect_findings,
    list_recordings,
    look_at,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    MeegSettings,
    MeegSource,
    add_cleaning,
    number_repetitions,
    sample_part,
)
from braindecode_vis.datasets.things_eeg2.layouts import (
    LaidOutFile,
    Layout,
    find_held,
    find_images,
    find_metadata,
    hash_images,
    make_stimuli,
    read_image_list,
)
from braindecode_vis.datasets.things_eeg2.lazy_files import open_held

if TYPE_CHECKING:
    import pandas as pd

ALL63 = (
    "Fp1", "Fp2", "AF7", "AF3", "AFz", "AF4", "AF8", "F7", "F5", "F3", "F1", "F2", "F4", "F6", "F8", "FT9", "FT7",
    "FC5", "FC3", "FC1", "FCz", "FC2", "FC4", "FC6", "FT8", "FT10", "T7", "C5", "C3", "C1", "Cz", "C2", "C4", "C6",
    "T8", "TP9", "TP7", "CP5", "CP3", "CP1", "CPz", "CP2", "CP4", "CP6", "TP8", "TP10", "P7", "P5", "P3", "P1", "Pz",
    "P2", "P4", "P6", "P8", "PO7", "PO3", "POz", "PO4", "PO8", "O1", "Oz", "O2",
)  # fmt: skip
"""The channels of the public files, in their order; Fz, the online reference, is absent."""
POSTERIOR17 = ALL63[-17:]
"""The parietal and occipital channels of the official preprocessing."""
SPLITS = ("train", "test")
# Gifford et al. (2022): recorded at 1000 Hz, preprocessed at 100; the others follow Song et al. (2024) at 250.
_PUBLISHED_SFREQ = {"raw": 1000.0, "official": 100.0, "250hz": 250.0, "ubp": 250.0}


class ThingsEeg2Config(MeegSettings):
    """Folder of the data set, subjects to read, and how trials are cut from raw recordings.

    Parameters
    ----------
    root
        Folder with ``sub-01``..., or a folder that contains it.
    images
        Folder of ``training_images`` and ``test_images``; found below or beside the root by default.
    layout
        Form of the files; ``auto`` recognises it by their content.
    subjects, sessions
        Numbers to read; by default all that exist. Only raw sessions and BIDS can be chosen by session.
    channels
        ``all63``, ``posterior17`` or names, in the order in which they are stored; by default the 17 of the official
        100 Hz files, and all 63 for other files.
    sfreq
        Sampling rate of the trials in Hz. By default 250 for continuous recordings, and the rate of the file for
        published epochs, which are never resampled.
    tmin, tmax, baseline, mvnn, mvnn_channels, resampling
        As in `EpochPlan`; published epochs keep the choices of their publisher: those of 250 Hz were resampled by
        ``mne`` and whitened over all 63 channels, the official ones by ``mne`` and over their 17.
    trust_pickle
        Open ``.pt`` files, which may run any code when opened. Set it with the call, never in a file.
    event_column
        BIDS only: the column of the events table that names the image; guessed by default.
    """

    kind: Literal["things_eeg2"] = "things_eeg2"
    layout: Literal["auto"] | Layout = "auto"
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    channels: Literal["auto", "all63", "posterior17"] | tuple[str, ...] = "auto"
    trust_pickle: bool = False
    event_column: str | None = None

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "max_train_repetitions": None,
        "max_test_repetitions": None,
    }

    not_hashed: ClassVar[frozenset[str]] = MeegSettings.not_hashed | {"trust_pickle"}

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, held = self._find()
        files = {Path(item.key).with_name(path.name).as_posix(): path for item in held for path in item.files}
        images = find_images(root, self.images)
        if (metadata := find_metadata(root, images)) is not None:
            files[metadata.name] = metadata
        return digest_files(files) | hash_images(images)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        root, held = self._find()
        images_root = find_images(root, self.images)
        table = read_image_list(root, images_root)
        layout = held[0].layout
        parts, notes = open_held(held, self, table, self.find_channels(layout), scratch)
        if layout in ("raw", "bids"):
            parts = number_repetitions(parts)
            _check_coverage(parts, table, self)
        shown = set().union(*(part.trials["stimulus_id"] for part in parts))
        stimuli = make_stimuli(table[table["stimulus_id"].isin(shown)], images_root)
        sfreq = 250.0  # of Song et al. (2024), for continuous recordings; published epochs keep their rate
        if isinstance(parts[0], EpochedPart):
            sfreq = round(1 / float(np.median(np.diff(parts[0].times))), 6)
        plan = self.make_plan(sfreq=self.sfreq or sfreq)
        # All published forms have noise normalisation, after which values have no unit.
        unit = "V" if layout in ("raw", "bids") else "whitened"
        source = MeegSource("eeg", tuple(parts), stimuli, plan, unit, notes={"layout": layout, **notes})
        return add_cleaning(source, self)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, and pair every event with its image."""
        root, held = self._find()
        subjects = sorted({item.subject for item in held})
        yield CheckFinding(
            "layout", True, f"{held[0].layout}, {len(subjects)} subject(s), {len(held)} file(s)"
        )
        try:
            table = read_image_list(root, find_images(root, self.images))
        except DataError as error:
            yield CheckFinding("images", False, str(error))
            return
        counts = table["split"].value_counts()
        yield CheckFinding("images", True, f"{counts['train']} training and {counts['test']} test images")

        recordings: list[tuple[str, str, str]] = []

        def describe(item: LaidOutFile) -> str:
            # For the check, a .pt file is converted, and the converted copy is removed afterwards.
            with tempfile.TemporaryDirectory() as scratch:
                parts = open_held([item], self, table, self.find_channels(item.layout), Path(scratch))[0]
                for part in parts:
                    sample_part(part, sfreq=_PUBLISHED_SFREQ.get(item.layout))
                recordings.extend(list_recordings(parts))
                return f"{sum(len(part.trials) for part in parts)} trials"

        for item in held:
            name = "/".join(item.path.parts[-3:])
            if item.layout == "ubp" and not self.trust_pickle:
                yield CheckFinding(name, True, "not opened: it needs --set dataset.trust_pickle=true")
            else:
                yield look_at(name, describe, item)
        yield from self.check_recordings(recordings)

    def find_channels(self, layout: Layout) -> tuple[str, ...]:
        """Return the channels to read from files of a layout, in their order."""
        if self.channels == "posterior17" or (self.channels == "auto" and layout == "official"):
            return POSTERIOR17
        if self.channels in ("auto", "all63"):
            return ALL63
        return self.check_named_channels(self.channels)

    def _find(self) -> tuple[Path, list[LaidOutFile]]:
        root = self.find_root()
        return root, _choose(find_held(root, self.layout), self, root)


def _choose(held: list[LaidOutFile], config: ThingsEeg2Config, root: Path) -> list[LaidOutFile]:
    """Keep the requested subjects and sessions, and check that each is complete."""
    subjects = sorted({item.subject for item in held})
    wanted = check_subset(
        config.subjects, subjects, what=f"below {root}, THINGS-EEG2 subject", option="dataset.subjects"
    )
    chosen = [item for item in held if item.subject in wanted]
    if chosen[0].session is not None:
        last = max(item.session or 0 for item in chosen)
        sessions = range(1, last + 1) if config.sessions is None else config.sessions
        for subject in wanted:
            there = sorted({item.session or 0 for item in chosen if item.subject == subject})
            for number in sessions:
                if number not in there:
                    raise DataError(
                        f"session {number:02d} of subject {subject:02d} is missing (found "
                        f"{', '.join(f'{s:02d}' for s in there)}); fetch it, or list the sessions to use with "
                        "--set dataset.sessions=[...]."
                    )
        chosen = [item for item in chosen if item.session in sessions]
    if held[0].layout == "bids":
        return chosen
    by_key = {(item.subject, item.session, item.split) for item in chosen}
    for subject, session in dict.fromkeys((item.subject, item.session) for item in chosen):
        for split in SPLITS:
            # A session without its test file would look like one with few test images.
            if (subject, session, split) not in by_key:
                folder = next(i.path.parent for i in chosen if (i.subject, i.session) == (subject, session))
                place = f"subject {subject:02d}" + (f", session {session:02d}" if session else "")
                raise DataError(
                    f"{place} is missing its {'training' if split == 'train' else 'test'} file in {folder}; copy or "
                    "fetch it again."
                )
    return sorted(
        chosen, key=lambda i: (wanted.index(i.subject), i.session or 0, SPLITS.index(i.split or "train"))
    )


def _check_coverage(parts: list[ContinuousPart], table: pd.DataFrame, config: ThingsEeg2Config) -> None:
    """Training images must be shown equally often over all sessions; otherwise a session is missing."""
    import pandas as pd

    # A choice of sessions leaves images out on purpose.
    if config.sessions is not None:
        return
    listed = table.loc[table["split"] == "train", "stimulus_id"]
    for subject in dict.fromkeys(part.recording.subject for part in parts):
        events = [p.recording.events for p in parts if p.recording.subject == subject]
        sessions = sorted({p.recording.session for p in parts if p.recording.subject == subject})
        # Images of a session that is missing count as never shown.
        counts = pd.concat(events)["stimulus_id"].value_counts().reindex(listed, fill_value=0)
        expected = counts.mode().max()
        if (counts - expected).abs().sum() > config.max_dropped * counts.sum():
            raise DataError(
                f"subject {subject} saw its training images between {counts.min()} and {counts.max()} times in the "
                f"session(s) {', '.join(sessions)}: a session is missing. To continue without it, list "
                "the sessions to use with --set "
                f"dataset.sessions=[{','.join(re.sub('^0+', '', s) for s in sessions)}]."
            )
