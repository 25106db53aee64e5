"""The layouts of THINGS-EEG2 on disk: which files there are, what is in them, and lazy access to each.

Owns the recognition of a layout from the content of its files (names only tell subject, session and partition), and
the published epochs: the authors' 100 Hz dictionaries, the 250 Hz pickles of NICE and ATM, the ``.pt`` files of UBP and
the arrays of NeuroBridge. Raw sessions and BIDS have files of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.datasets.safe_pickle import FileArray, open_npy, read_pickled_dict, sniff
from braindecode_vis.datasets.sources import ContinuousPart, EpochedPart
from braindecode_vis.datasets.things_eeg2_bids import find_bids, open_bids
from braindecode_vis.datasets.things_eeg2_raw import find_channels, make_raw_part, open_raw

Layout = Literal["raw", "official", "250hz", "ubp", "neurobridge", "bids"]
_SUBJECT, _SESSION = re.compile(r"sub-?0*(\d+)$"), re.compile(r"ses-?0*(\d+)$")
_WHITENED = {
    "official": "by its authors, with the covariance of training and test trials together",
    "250hz": "by its publisher, with the covariance of the training trials of each session",
    "ubp": "by its publisher, with the covariance of the training trials of each session",
    "neurobridge": "by its publisher, with the covariance of the training trials of each session",
}


class Options(Protocol):
    """The settings that opening a file depends on."""

    trust_pickle: bool
    max_dropped: float
    sfreq: float
    event_column: str | None


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
            if path.name.startswith("."):
                continue
            item = Held("raw", subject, session, _guess_split(path), path)
            found = recognise(item)
            if layout in (None, found):
                if item.split is None:
                    raise DataError(f"{item.where} is {found}, but its name says neither training nor test.")
                yield replace(item, layout=found)


def _guess_split(path: Path) -> str | None:
    return "train" if "train" in path.stem else "test" if "test" in path.stem else None


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
    content = _read_dict(item)
    if "raw_eeg_data" in content:
        return "raw"
    if "preprocessed_eeg_data" in content:
        return "official" if kind == "npy-pickle" else "250hz"
    raise DataError(f"{item.where} holds a dictionary of {', '.join(content)}, which is no known layout.")


def _read_dict(item: Held) -> dict[str, Any]:
    try:
        return read_pickled_dict(item.path)
    except DataError as error:
        raise DataError(f"{item.where}: {error}") from error


def hash_sampled(path: Path, *, n_samples: int = 64, block_bytes: int = 4096) -> str:
    """Return a sha256 over the size of a file and evenly spaced blocks of it; small files are read whole."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= n_samples * block_bytes:
            digest.update(file.read())
        else:
            for offset in np.linspace(0, size - block_bytes, n_samples).astype(np.int64).tolist():
                file.seek(offset)
                digest.update(file.read(block_bytes))
    return digest.hexdigest()


def open_held(
    held: Sequence[Held],
    options: Options,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    scratch: Path | None,
    *,
    convert: bool = True,
) -> tuple[list[Any], dict[str, Any]]:
    """Return a lazy part for each file, and notes for the reader of the store.

    Parameters
    ----------
    images
        The image list of `read_image_list`.
    ch_names
        Channels to read, in this order.
    scratch
        Where ``.pt`` files are converted to.
    convert
        Whether to convert them; otherwise they are only found.
    """
    parts: list[Any] = []
    for item in held:
        listed = images if item.split is None else images[images["split"] == item.split]
        if item.layout == "raw":
            parts.append(_open_raw(item, options, listed, ch_names))
        elif item.layout == "bids":
            parts.append(open_bids(item.path, item.subject, item.session, options, listed, ch_names))
        elif item.layout in ("official", "250hz"):
            parts.append(_open_dict(item, options, listed, ch_names))
        elif item.layout == "neurobridge":
            parts.append(_open_neurobridge(item, options, listed, ch_names))
        elif convert:
            parts.append(_open_ubp(item, options, listed, ch_names, scratch))
    whitening = _WHITENED.get(held[0].layout)
    return parts, {"whitening": whitening} if whitening else {}


def _open_raw(item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]) -> ContinuousPart:
    raw = open_raw(item.path, _read_dict(item))
    return make_raw_part(
        raw, images, ch_names, subject=f"{item.subject:02d}", session=f"{item.session or 1:02d}",
        run="training" if item.split == "train" else "test", max_dropped=options.max_dropped,
    )  # fmt: skip


def _open_dict(item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]) -> EpochedPart:
    content = _read_dict(item)
    missing = [key for key in ("preprocessed_eeg_data", "ch_names", "times") if key not in content]
    if missing:
        raise DataError(f"{item.where} lacks {', '.join(missing)}.")
    data, times = content["preprocessed_eeg_data"], np.asarray(content["times"], dtype=float)
    return _make_part(item, options, images, ch_names, data, content["ch_names"], times)


def _open_neurobridge(
    item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str]
) -> EpochedPart:
    data = open_npy(item.path)
    info_path = item.path.parent / "info.json"
    if not info_path.is_file():
        raise DataError(f"{item.where} needs info.json beside it, which names the channels; fetch it again.")
    info = json.loads(info_path.read_text())
    data = replace(data, shape=(data.shape[0] * data.shape[1], *data.shape[2:]))
    if "times" in info:
        times = np.asarray(info["times"], dtype=float)
    else:
        times = np.arange(data.shape[-1]) / float(info["sfreq"])
    return _make_part(item, options, images, ch_names, data, info["ch_names"], times)


_CONVERT = """
import json, pathlib, sys
import numpy, torch
content = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
folder = pathlib.Path(sys.argv[2])
for key in ("eeg", "session"):
    numpy.save(folder / (key + ".npy"), numpy.ascontiguousarray(content[key]), allow_pickle=False)
images = numpy.asarray(content["img"])
names = [str(row) for row in (images if images.ndim == 1 else images[:, 0])]
plain = {"img": names, "ch_names": [str(c) for c in content["ch_names"]],
         "times": [float(t) for t in content["times"]]}
(folder / "info.json").write_text(json.dumps(plain))
"""


def _open_ubp(
    item: Held, options: Options, images: pd.DataFrame, ch_names: Sequence[str], scratch: Path | None
) -> EpochedPart:
    if not options.trust_pickle:
        raise ConfigError(
            f"{item.where} is a .pt file that can run any code when it is opened; if you trust where it comes from, "
            "pass --set dataset.trust_pickle=true, and it is converted once, in a process of its own."
        )
    if scratch is None:
        raise ConfigError(f"{item.where} must be converted before it is read; give it a scratch folder.")
    folder = scratch / f"sub-{item.subject:02d}-{item.split}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-I",
        "-W",
        "ignore",
        "-c",
        _CONVERT,
        str(item.path.absolute()),
        str(folder.absolute()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{item.where} cannot be converted ({lines[-1]}); copy or fetch it again.")
    info = json.loads((folder / "info.json").read_text())
    session = np.load(folder / "session.npy", allow_pickle=False)
    data = open_npy(folder / "eeg.npy")
    by_name = images.set_index("stimulus_id")
    names = [Path(path).stem for path in info["img"]]
    unknown = [name for name in names if name not in by_name.index]
    if unknown:
        raise DataError(
            f"{item.where} shows {len(unknown)} image(s) outside the image list, first {unknown[0]!r}: "
            "the image set belongs to another release."
        )
    shown = by_name.loc[names].reset_index()
    return _make_part(
        item, options, shown, ch_names, data, info["ch_names"], np.asarray(info["times"]), session=session
    )


def _make_part(
    item: Held,
    options: Options,
    images: pd.DataFrame,
    ch_names: Sequence[str],
    data: Any,
    names: Any,
    times: np.ndarray,
    session: np.ndarray | None = None,
) -> EpochedPart:
    """Label the epochs of one file; `images` has one row per image of the file, in its order."""
    if isinstance(data, np.ndarray):
        data = _hold(data, item)
    if len(data.shape) != 4 or data.dtype.kind != "f":
        raise DataError(
            f"{item.where} should hold numbers of shape (n_images, n_repetitions, n_channels, n_times), "
            f"not {data.dtype} of shape {data.shape}."
        )
    n_images, n_repetitions, n_channels, n_times = data.shape
    if n_images != len(images):
        raise DataError(
            f"{item.where} holds {n_images} images, but the image list has {len(images)}: "
            "another release, or the training and test files are swapped."
        )
    names = list(map(str, names))
    if len(names) != n_channels:
        raise DataError(f"{item.where} has {n_channels} channels of data but names {len(names)}.")
    times = _align_times(times, n_times, item)
    sfreq = 1 / float(np.median(np.diff(times)))
    if not np.isclose(sfreq, options.sfreq, rtol=1e-3):
        raise ConfigError(
            f"{item.where} has {sfreq:g} Hz, but dataset.sfreq is {options.sfreq:g}; published epochs are not "
            f"resampled: pass --set dataset.sfreq={sfreq:g}."
        )
    rows = find_channels(names, ch_names, item.where)
    trials = images.loc[images.index.repeat(n_repetitions), ["stimulus_id", "concept", "split"]]
    trials = trials.reset_index(drop=True)
    trials["subject"], trials["run"] = f"{item.subject:02d}", "n/a"
    trials["session"] = "n/a"
    if session is not None:
        trials["session"] = [f"{int(s) + 1:02d}" for s in session.ravel()]
    trials["repetition"] = np.tile(np.arange(n_repetitions), n_images)
    flat = replace(data, shape=(n_images * n_repetitions, n_channels, n_times))
    return EpochedPart(trials, (item.path,), tuple(ch_names), times, _Picked(flat, rows))


def _hold(data: np.ndarray, item: Held) -> FileArray:
    raise DataError(
        f"{item.where} holds only an array of shape {data.shape}: it is cut short; fetch it again."
    )


class _Picked:
    """Reads epochs from a file and picks channels."""

    def __init__(self, data: FileArray, rows: np.ndarray) -> None:
        self.data, self.rows = data, rows

    def __call__(self, start: int, stop: int) -> np.ndarray:
        block = self.data.read_rows(start, stop)
        if np.array_equal(self.rows, np.arange(block.shape[1])):
            return block
        return block[:, self.rows]


def _align_times(times: np.ndarray, n_times: int, item: Held) -> np.ndarray:
    """Return one time per sample: the 250 Hz files dropped the baseline from the data and not from the times."""
    if len(times) == n_times:
        return times
    if len(times) > n_times and np.isclose(times[len(times) - n_times], 0, atol=1e-6):
        return times[len(times) - n_times :]
    raise DataError(
        f"{item.where} has {n_times} samples per epoch but {len(times)} times from {times[0]:g} to {times[-1]:g} s; "
        "they do not belong together."
    )
