"""Files of EEG and MEG: recordings of any format that MNE reads, their tables, and the images that events name.

Owns the search in a BIDS tree (by mne-bids), the opener that BIDS, THINGS-EEG1 and THINGS-MEG share, the lazy part of
an open recording, the reading of pieces and of saved epochs, sensor positions, tables whose cells stay text, the count
of repetitions, and the step from shown images to a `StimulusSet`. A data set may come without its images (those of
THINGS are not published with the recordings); then the set has names and concepts, but no pixels. Contains nothing
about a particular data set.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.base.remote import RemotePath, bring, bring_all, bring_folder, find_address
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.bids.fmri_files import find_image_folder, hash_image_folder
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    Sensors,
    find_channels,
    make_template_montage,
)

if TYPE_CHECKING:
    import pandas as pd

# The formats that BIDS allows for each data type.
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

    if isinstance(root, RemotePath):
        return _find_remote(root, kinds, task)
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


def _find_remote(root: RemotePath, kinds: tuple[str, ...], task: str | None) -> list[HeldRecording]:
    """Return the recordings of a tree on a server, which mne-bids cannot list."""
    import mne_bids

    held = []
    folders = [
        folder / kind
        for pattern in ("sub-*", "sub-*/ses-*")
        for folder in root.glob(pattern)
        for kind in kinds
    ]
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        for path in folder.iterdir():
            stem, _, suffix = path.name.rpartition("_")
            if path.name.startswith(".") or not suffix.startswith(tuple(f"{kind}." for kind in kinds)):
                continue
            found = mne_bids.get_entities_from_fname(f"{stem}_{suffix.partition('.')[0]}", on_error="ignore")
            fits = path.suffix in EXTENSIONS[folder.name] and task in (None, found["task"])
            if fits and int(found["split"] or 1) == 1 and found["subject"] != "emptyroom":
                session, run, named = found["session"] or "01", found["run"] or "01", found["task"] or ""
                held.append(HeldRecording(found["subject"], session, run, named, folder.name, path, None))
    return sorted(held, key=lambda item: item.path)


def bring_recording(path: Path) -> Path:
    """Return the path of a recording on this machine, after it was downloaded with the files that MNE reads with it."""
    if not isinstance(path, RemotePath):
        return path
    if not path.is_dir():
        bring_all(list_recording_files(path, path.parent).values())
    return bring(path)


def bring_sidecars(path: Path, root: Path) -> Path:
    """Return the path of a recording of a BIDS tree on this machine, after the tables above it were downloaded too."""
    if isinstance(path, RemotePath):
        folders = [
            path.parent,
            *(folder for folder in path.parents if folder == root or root in folder.parents),
        ]
        for folder in dict.fromkeys(folders):
            bring_folder(folder, (".tsv", ".json"))
    return bring_recording(path)


MISSING = ("n/a", "N/A", "NA", "nan", "NaN", "")


def open_recording(path: Path, where: str, opener: Callable[[], Any] | None = None) -> Any:
    """Open a recording with MNE, without its samples.

    Parameters
    ----------
    path
        The data file, or the ``.ds`` folder of a CTF recording.
    where
        Subject, session and file, for messages.
    opener
        Opens the recording; by default ``mne.io.read_raw``, which detects the format.

    Raises
    ------
    DataError
        If the file is missing, damaged or in a format that MNE does not know.
    """
    import mne

    if not path.exists():
        raise DataError(f"{where} does not exist; fetch it, or leave it out.")
    with refuse_damage(f"{where} cannot be opened"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sidecars and headers; what matters is checked here
        if opener is not None:
            return opener()
        return mne.io.read_raw(bring_recording(path), preload=False, verbose="error")


@dataclass(frozen=True)
class RawReader:
    """Reads samples of an MNE recording, in volt or tesla.

    Parameters
    ----------
    raw
        The recording, not loaded.
    rows
        Channels to read, in this order.
    bridged
        First and past-the-last sample of stretches without signal, which a straight line replaces.
    """

    raw: Any
    rows: np.ndarray
    bridged: tuple[tuple[int, int], ...] = ()

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return samples `start` to `stop`, shape (n_channels, stop - start)."""
        data = self._read(start, stop)
        for first, last in self.bridged:
            low, high = max(first, start), min(last, stop)
            if low < high:
                # ends: (n_channels, 2), the samples before and after the stretch; share: (n_samples,)
                ends = np.hstack([self._read_one(first - 1), self._read_one(last)])
                share = (np.arange(low, high) - first + 1) / (last - first + 1)
                data[:, low - start : high - start] = ends[:, :1] + share * (ends[:, 1:] - ends[:, :1])
        return data

    def _read_one(self, sample: int) -> np.ndarray:
        # A stretch may touch an end of the file, beyond which there is no sample.
        at = min(max(sample, 0), self.raw.n_times - 1)
        return self._read(at, at + 1)

    def _read(self, start: int, stop: int) -> np.ndarray:
        with refuse_damage(
            f"{self.raw.filenames[0]}: samples {start} to {stop} cannot be read",
            OSError,
            ValueError,
            IndexError,
            hint="the file is cut short, copy or fetch it again",
        ):
            for name in self.raw.filenames:  # the cache of a server may have made room meanwhile
                if name is not None:
                    bring(find_address(Path(name)))
            return self.raw.get_data(picks=self.rows, start=start, stop=stop, verbose="error")


def make_part(
    recording: Recording,
    raw: Any,
    names: tuple[str, ...],
    kinds: Sequence[str],
    where: str,
    *,
    leave_out: Sequence[str] = (),
    bridged: tuple[tuple[int, int], ...] = (),
) -> ContinuousPart:
    """Return the lazy part of an open recording.

    Parameters
    ----------
    names
        Channels to read, found by name: their order may differ between recordings of one data set.
    kinds, leave_out
        MNE types of all its sensors, and names of sensors to leave out.
    where
        Subject, session and file, for messages.
    bridged
        As in `RawReader`.
    """
    rows = find_channels(raw.ch_names, names, where)
    return ContinuousPart(
        recording, names, float(raw.info["sfreq"]), int(raw.n_times), RawReader(raw, rows, bridged),
        list_sensors(raw, kinds, leave_out, bridged), tuple(raw.info["bads"]), list_boundaries(raw),
    )  # fmt: skip


def open_epochs(path: Path, where: str, hint: str = "copy or fetch it again") -> Any:
    """Open epochs that were saved with MNE, without their samples; `hint` advises what to do if they are damaged."""
    import mne

    with refuse_damage(f"{where} cannot be opened", hint=hint), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mne.read_epochs(bring_recording(path), proj=False, preload=False, verbose="error")


@dataclass(frozen=True)
class EpochReader:
    """Reads some of the epochs of a file, in their order.

    Parameters
    ----------
    where
        Subject and file, for messages.
    epochs
        MNE epochs, not loaded.
    rows, columns
        Epochs and channels to read.
    """

    where: str
    epochs: Any
    rows: np.ndarray
    columns: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return epochs `start` to `stop`, shape (stop - start, n_channels, n_times)."""
        item = self.rows[start:stop]
        with refuse_damage(
            f"{self.where}: epochs {item[0]} to {item[-1]} cannot be read",
            OSError,
            ValueError,
            hint="a part of the file is cut short, copy or fetch it again",
        ):
            return self.epochs.get_data(picks=self.columns, item=item, copy=False, verbose="error")


def list_channels(raw: Any, kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the channels of the given MNE types (``eeg``, ``mag``, ``grad``), in the order of the file."""
    types = raw.get_channel_types()
    return tuple(name for name, kind in zip(raw.ch_names, types, strict=True) if kind in kinds)


def list_sensors(
    raw: Any, kinds: Sequence[str], leave_out: Sequence[str] = (), bridged: tuple[tuple[int, int], ...] = ()
) -> Sensors:
    """Return every sensor of the given MNE types, with positions if all are known; `bridged` as in `RawReader`."""
    names = tuple(name for name in list_channels(raw, kinds) if name not in leave_out)
    rows = np.array([raw.ch_names.index(name) for name in names], dtype=int)
    positions = find_sensor_positions(raw, names)
    # The repair of a gradiometer needs its coils; an electrode needs only a position.
    info = None if "eeg" in kinds else raw.info
    return Sensors(
        names, RawReader(raw, rows, bridged), positions if np.isfinite(positions).all() else None, info
    )


# The spellings of MNE, its FIF reader, EEGLAB and BrainVision.
_JOINS = ("edge", "bad_acq_skip", "boundary", "new segment")


def list_boundaries(raw: Any) -> tuple[int, ...]:
    """Return the first samples after the joins that a file marks, without its start."""
    marks = [text.lower().startswith(_JOINS) for text in raw.annotations.description]
    if not any(marks):
        return ()
    onsets = raw.annotations.onset[np.array(marks)]
    # Annotations count from their own origin, which may be before the first sample.
    samples = raw.time_as_index(onsets, use_rounding=True, origin=raw.annotations.orig_time)
    return tuple(sorted({int(s) for s in samples if 0 < s < raw.n_times}))


def find_sensor_positions(raw: Any, names: Sequence[str]) -> np.ndarray:
    """Return sensor positions in m, shape (n_channels, 3): from the file, else from the 10-05 system, else NaN."""
    import mne

    template = make_template_montage().get_positions()["ch_pos"]
    known = {name.lower(): np.asarray(place) for name, place in template.items()}
    out = np.full((len(names), 3), np.nan)
    for row, name in enumerate(names):
        channel = raw.info["chs"][raw.ch_names.index(name)]
        place = np.asarray(channel["loc"][:3], dtype=float)
        # Zeros mean an unknown position.
        if np.isfinite(place).all() and place.any():
            out[row] = place
        elif name.lower() in known and channel["kind"] == mne._fiff.constants.FIFF.FIFFV_EEG_CH:
            out[row] = known[name.lower()]
    return out


def read_text_table(path: Path, where: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a tab-separated table whose cells stay text, so that ``021.50`` is not 21.5.

    Missing cells become NaN. With `columns`, only those of them that exist are read.
    """
    import pandas as pd

    if not path.is_file():
        raise DataError(
            f"{where} has no {path.name} in its folder, which lists what was shown and when; fetch it."
        )
    with refuse_damage(
        f"{path} is not a table of tab-separated text",
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
    ):
        wanted = None if columns is None else lambda name: name in columns
        table = pd.read_csv(
            path, sep="\t", dtype=str, na_values=MISSING, keep_default_na=False, usecols=wanted
        )
    if not len(table):
        raise DataError(f"{path} lists no event; fetch it again.")
    return table


def check_length(last_s: float, raw: Any, where: str, hint: str) -> None:
    """Raise `DataError` if the last event is after the end of the recording (times in s)."""
    length = raw.n_times / float(raw.info["sfreq"])
    if last_s >= length:
        raise DataError(
            f"{where} lasts {length:.1f} s, but its last event is at {last_s:.1f} s: either it is cut short, or its "
            f"events are of another recording or in another unit; {hint}."
        )


def list_recording_files(path: Path, root: Path) -> dict[str, Path]:
    """Return the files of a recording, by their path below `root`: files that share its name, and its sidecars."""
    # BrainVision and EEGLAB store a recording in several files of one name, and sidecars change its content.
    entities = path.name.rsplit("_", 1)[0]
    beside = [p for p in path.parent.glob(f"{entities}*") if p.name != path.name and p.is_file()]
    # Electrodes are those of a session and have a space; other sidecars may leave out the run or the task.
    own = set(entities.split("_"))
    for sidecar in (p for suffix in ("tsv", "json") for p in path.parent.glob(f"*.{suffix}") if p.is_file()):
        parts = sidecar.name.split("_")[:-1]
        if sidecar not in beside and {part for part in parts if not part.startswith("space-")} <= own:
            beside.append(sidecar)
    inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {p.relative_to(root).as_posix(): p for p in sorted([*inside, *beside])}


# Where copies of the THINGS images were found beside recordings.
PLACES = ("", "images", "object_images", "stimuli", "THINGS-images", "images_THINGS/object_images")


def hash_images(named: Path | None, root: Path) -> dict[str, str]:
    """Return a digest of the available image files, so that a run prepared without them notices added files."""
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
    import pandas as pd

    columns = ["stimulus_id", "concept", "file", "split"]
    table = pd.concat([t[columns] for t in events]).drop_duplicates()
    twice = table["stimulus_id"][table["stimulus_id"].duplicated()]
    if len(twice):
        rows = table[table["stimulus_id"] == twice.iloc[0]].astype(str)
        what = next(c for c in columns[1:] if rows[c].nunique() > 1)
        raise DataError(
            f"the image {twice.iloc[0]!r} has more than one {what} "
            f"({', '.join(rows[what].unique()[:3])}): the events do not identify their images uniquely."
        )
    return table.sort_values("stimulus_id").reset_index(drop=True)


def make_stimuli(
    shown: pd.DataFrame,
    named: Path | None,
    guesses: Sequence[Path],
    candidates: Callable[[str, str], Sequence[str]],
) -> StimulusSet:
    """Return the stimulus set of the shown images, with the hash of each file if the files are available.

    Parameters
    ----------
    shown : DataFrame
        From `make_shown_table`.
    named
        Folder that the user gave; it must hold every image.
    guesses
        Folders to try otherwise; if none fits, the set has no root.
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
    # A given folder must hold all images; so must the first guessed folder that holds some.
    for root in [named.expanduser()] if named is not None else likely[:1]:
        found = [_find_one(root, candidates(*pair)) for pair in pairs]
        missing = [i for i, path in enumerate(found) if path is None]
        if missing:
            first_file, places = pairs[missing[0]][0], candidates(*pairs[missing[0]])
            sought = f" (looked for as {', '.join(places)})" if places != [first_file] else ""
            raise DataError(
                f"{len(missing)} of {len(pairs)} images are not in {root}, first {first_file}{sought}: "
                f"the folder is from another release or incomplete; give the right one with --set dataset.images=DIR."
            )
        paths = [str(path) for path in found]
        bring_all(root / path for path in paths)
        hashes = [hash_file(root / path) for path in paths]
        return StimulusSet(shown.assign(path=paths, sha256=hashes)[columns], root)
    # Without files, the first place still identifies each image, in messages and later steps.
    first = [candidates(*pair)[0] for pair in pairs]
    return StimulusSet(shown.assign(path=first, sha256="")[columns])


def _find_one(root: Path, places: Sequence[str]) -> str | None:
    if isinstance(root, RemotePath):
        return next((place for place in places if (root / place).is_file()), None)
    return next((place for place in places if os.path.isfile(f"{root}/{place}")), None)  # noqa: PTH113 (speed)


def describe_images(stimuli: StimulusSet) -> str:
    """Return a description of the place of the images."""
    if stimuli.root is None:
        return f"{len(stimuli)} images are listed, but their files are not available"
    return f"{len(stimuli)} image files in {stimuli.root}"
