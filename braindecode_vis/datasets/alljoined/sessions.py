"""The sessions of Alljoined1 on disk: recognised by the content of a file, and opened lazily.

Owns finding them, the meaning of codes and ids, and the HDF5 form: a pandas table with an array in each row. pandas and
PyTables would unpickle the column of arrays and the attributes, which may run code, and need five times the size of the
file. Here the pickle is found in the file (an HDF5 global heap), the restricted reader notes the position of each
array, and an epoch is read from there. From the name of a file, only subject and session are used.

References
----------
The HDF Group, "HDF5 File Format Specification", III.E: the global heap.
pandas, `DataFrame.to_hdf`: the fixed format.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import (
    ConfigError,
    DataError,
    check_columns,
    is_there,
    refuse_damage,
    require,
)
from braindecode_vis.base.remote import bring
from braindecode_vis.datasets.bids.meeg_files import (
    EpochReader,
    RawReader,
    list_boundaries,
    list_channels,
    open_epochs,
    open_recording,
)
from braindecode_vis.datasets.nsd.experiment_design import NsdDesign, name_image
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochedPart,
    HeldFile,
    Sensors,
    choose_layout,
    find_channels,
)
from braindecode_vis.datasets.sources.safe_pickle import FileArray, read_pickled
from braindecode_vis.datasets.things_eeg2.lazy_files import check_codes

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["raw", "epochs", "tables"]
# Xu et al. (2024): 960 of the 1000 shared images of NSD, in eight blocks.
N_IMAGES = 960
N_PER_BLOCK = 120
_NAME = re.compile(r"subj(\d+)_session(\d+)")
_TIMES = (np.arange(334) - 26) / 512.0  # -0.05 to 0.6 s as MNE rounds them; tables do not say
SPLIT_FILE, RAW_FILE = "test_indices.json", "subj{subject:02d}_session{session}_eeg.fif"


@dataclass(frozen=True, kw_only=True)
class Session(HeldFile):
    """One file with its subject and session."""

    session: int
    layout: Layout


def find_sessions(root: Path, layout: Literal["auto"] | Layout) -> list[Session]:
    """Return the sessions of one layout below `root`, down to three folders deep.

    Raises
    ------
    DataError
        If there is none, or a file is so damaged that its form cannot be recognised.
    ConfigError
        If there are several layouts and none was chosen, or a session exists twice.
    """
    paths = [
        path for depth in ("", "*/", "*/*/", "*/*/*/") for path in sorted(root.glob(f"{depth}subj*_session*"))
        if path.is_file() and path.suffix in (".fif", ".h5", ".hdf5")
    ]  # fmt: skip
    there: dict[str, list[Session]] = {}
    for path in paths:
        match = _NAME.match(path.name)
        if match and not re.search(r"-\d+\.fif$", path.name):  # later parts of a split file
            held = recognise(path)
            item = Session(subject=int(match[1]), session=int(match[2]), path=path, layout=held)
            there.setdefault(held, []).append(item)
    expected = "subj01_session1_eeg.fif, subj01_session1_epo.fif or subj01_session1.h5"
    found = there[choose_layout(there, layout, root, title="Alljoined1", expected=expected)]
    seen: dict[tuple[int, int], Session] = {}
    for item in found:
        other = seen.setdefault((item.subject, item.session), item)
        if other is not item:
            raise ConfigError(
                f"{root} holds subject {item.subject:02d}, session {item.session} twice, as {other.path} and "
                f"{item.path} (two frequency bands?); pass the folder of one of them as --root."
            )
    return found


def recognise(path: Path) -> Layout:
    """Return the layout of a file, from its content."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return "tables"
    import mne

    try:
        kind = mne.what(bring(path))
    except Exception:  # damaged bytes lead the reader anywhere
        kind = "unknown"
    if kind not in ("raw", "epochs"):
        raise DataError(f"{path} is neither raw nor epoched FIF nor HDF5, or is cut short; fetch it again.")
    return kind


def find_split(root: Path) -> Path | None:
    """Return the authors' list of test images, if it is below the root or beside it."""
    places = [root / SPLIT_FILE, root.parent / SPLIT_FILE, *sorted(root.glob(f"*/{SPLIT_FILE}"))]
    return next((path for path in places if is_there(path)), None)


def label_images(numbers: np.ndarray, test: Path | None) -> pd.DataFrame:
    """Return `stimulus_id`, `concept` and `split` of 73KIDs, which count from 1.

    A scene has no single concept, so every image is its own concept.
    """
    import pandas as pd

    ids = [name_image(number) for number in numbers.tolist()]
    held_out: set[int] = set()
    if test is not None:
        with refuse_damage(f"{test} should be a list of numbers, but is not", ValueError, TypeError):
            # The list counts from 0, our numbers from 1.
            held_out = {int(number) + 1 for number in json.loads(test.read_text())}
    split = ["test" if number in held_out else "train" for number in numbers.tolist()]
    return pd.DataFrame({"stimulus_id": ids, "concept": ids, "split": split})


def number_blocks(codes: np.ndarray) -> list[str]:
    """Return the block of each event: a new one starts at the first code outside the 120 codes of the block.

    Examples
    --------
    >>> number_blocks(np.array([1, 120, 121, 3]))
    ['01', '01', '02', '03']
    """
    # The files do not mark blocks, but each block has codes of its own.
    eighth = (codes - 1) // N_PER_BLOCK
    return [f"{number:02d}" for number in 1 + np.r_[0, np.cumsum(np.diff(eighth) != 0)].astype(int)]


def open_raw(
    item: Session,
    channels: Sequence[str],
    design: NsdDesign,
    test: Path | None,
    average: Sequence[str] | None,
    max_dropped: float,
) -> ContinuousPart:
    """Open a raw session and pair the pulses of its Status channel with images.

    Parameters
    ----------
    average
        Channels whose mean is the reference; None keeps the recording as it is.

    Raises
    ------
    DataError
        If it is damaged, a channel is missing, or codes are not those of merged triggers.
    """
    import pandas as pd

    raw = open_recording(item.path, item.where)
    _check_rate(float(raw.info["sfreq"]), item)
    rows = find_channels(raw.ch_names, channels, item.where)
    reference = None if average is None else find_channels(raw.ch_names, average, item.where)
    stim = list_channels(raw, ("stim",))
    if len(stim) != 1:
        raise DataError(f"{item.where} should have one stimulus channel (Status), but has {len(stim)}.")
    with refuse_damage(f"{item.where} cannot be read"):
        pulses = np.round(raw.get_data(picks=list(stim))[0]).astype(np.int64)
    # A pulse lasts several samples; its first counts, also where one code follows another without a gap.
    samples = np.flatnonzero((pulses != 0) & (np.r_[0, pulses[:-1]] != pulses))
    codes = pulses[samples]
    numbers = design.shared[:N_IMAGES]
    check_codes(codes, pd.DataFrame({"number": numbers}), item.where, max_dropped)
    events = pd.DataFrame({"onset": samples / raw.info["sfreq"], "sample": samples, "repetition": 0})
    labels = label_images(numbers[codes - 1], test)
    recording = Recording(
        f"{item.subject:02d}",
        f"{item.session:02d}",
        "01",
        "eeg",
        (item.path,),
        pd.concat([events, labels], axis=1),
    )
    read = _reference(raw, rows, reference)
    eeg = list_channels(raw, ("eeg",))
    every = _reference(raw, find_channels(raw.ch_names, eeg, item.where), reference)
    return ContinuousPart(
        recording, tuple(channels), float(raw.info["sfreq"]), int(raw.n_times), read, Sensors(eeg, every),
        tuple(raw.info["bads"]), list_boundaries(raw),
    )  # fmt: skip


def _reference(raw: Any, rows: np.ndarray, reference: np.ndarray | None) -> Callable[[int, int], np.ndarray]:
    """Return the reader of samples in V, against the mean of the reference channels."""
    if reference is None:
        return RawReader(raw, rows)

    def read(start: int, stop: int) -> np.ndarray:
        # (n_rows + n_reference, n_samples)
        data = raw.get_data(start=start, stop=stop)[np.r_[rows, reference]]
        return data[: len(rows)] - data[len(rows) :].mean(axis=0)

    return read


def open_cut(item: Session, channels: Sequence[str], design: NsdDesign, test: Path | None) -> EpochedPart:
    """Open the authors' epochs of a session; they stay in the file."""
    epochs = open_epochs(item.path, item.where)
    _check_rate(float(epochs.info["sfreq"]), item)
    rows = find_channels(epochs.ch_names, channels, item.where)
    codes = epochs.events[:, 2].astype(np.int64)
    unknown = codes[(codes < 1) | (codes > N_IMAGES)]
    if len(unknown):
        raise DataError(
            f"{item.where} has {len(unknown)} epochs whose code is not an image, first code {unknown[0]}, where 1 to "
            f"{N_IMAGES} are known: its triggers were not merged, or it is another release."
        )
    labels = label_images(design.shared[codes - 1], test)
    trials = labels.assign(
        subject=f"{item.subject:02d}", session=f"{item.session:02d}", run=number_blocks(codes), repetition=0
    )

    reader = EpochReader(item.where, epochs, np.arange(len(codes)), rows)
    return EpochedPart(trials, (item.path,), tuple(channels), np.asarray(epochs.times), reader)


def open_tables(
    item: Session,
    channels: Sequence[str],
    recorded: Sequence[str],
    design: NsdDesign | None,
    test: Path | None,
) -> EpochedPart:
    """Open an HDF5 table; its arrays stay in the file.

    Parameters
    ----------
    recorded
        Channels in the order of the arrays, which do not name them.
    design
        To check that ids count from 0 as published; None skips the check.

    Raises
    ------
    DataError
        If columns are missing, the rows belong to another session, or ids are shifted.
    """
    table = open_table(item.path, (len(recorded), len(_TIMES)))
    numbers = table.numbers
    check_columns(numbers.columns, ("73k_id", "subject_id", "session"), what=f"the table of {item.where}")
    # Files are easily renamed; the rows contain subject and session.
    named = set(zip(numbers["subject_id"].astype(int), numbers["session"].astype(int), strict=True))
    if named != {(item.subject, item.session)}:
        raise DataError(
            f"{item.where} holds rows of subject and session {', '.join(map(str, sorted(named)))}: it was renamed, "
            "or is another release."
        )
    ids = numbers["73k_id"].to_numpy(dtype=np.int64)
    if design is not None:
        shared = set(design.shared.tolist())
        outside = [number for number in np.unique(ids).tolist() if number + 1 not in shared]
        # Shifted by one, every id would still be a valid image of NSD.
        if outside and set(ids.tolist()) <= shared:
            raise DataError(
                f"{item.where}: its 73k_id count from 1, but the published ones count from 0; subtract "
                "one, otherwise every image is confused with its neighbour."
            )
        if outside:
            raise DataError(
                f"{item.where}: {len(outside)} image(s) are not among the shared images of {design.path}, first "
                f"73k_id {outside[0]}: the table or the design is of another release."
            )
    trials = label_images(ids + 1, test).assign(
        subject=f"{item.subject:02d}", session=f"{item.session:02d}", repetition=0,
        run=[f"{int(block):02d}" for block in numbers["block"]] if "block" in numbers else "n/a",
    )  # fmt: skip
    rows = find_channels(recorded, channels, item.where)

    def read(start: int, stop: int) -> np.ndarray:
        return table.read(start, stop)[:, rows]

    return EpochedPart(trials, (item.path,), tuple(channels), _TIMES, read)


def _check_rate(sfreq: float, item: Session) -> None:
    if not np.isclose(sfreq, 512.0, rtol=1e-6):
        raise DataError(f"{item.where} has {sfreq:g} Hz, but 512 Hz is published.")


MAGIC = b"\x89HDF\r\n\x1a\n"
_ARRAY_COLUMNS = ("eeg", "EEG")
_DEFLATE, _SHUFFLE, _BLOSC = 1, 2, 32001  # registered numbers of HDF5 filters
# An epoch has tens of kilobytes and stays in the file; its description is smaller.
_SMALL_BYTES = 1024


@dataclass(frozen=True)
class TableFile:
    """Content of one file.

    Parameters
    ----------
    numbers : DataFrame
        Its columns of numbers.
    arrays
        The array of each row, in the file.
    """

    path: Path
    numbers: pd.DataFrame
    arrays: list[FileArray]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the arrays of rows `start` to `stop`, stacked."""
        return np.stack([array.read_rows(0, array.shape[0]) for array in self.arrays[start:stop]])


def open_table(path: Path, shape: tuple[int, int]) -> TableFile:
    """Read the numbers of a table and find its arrays.

    Parameters
    ----------
    path
        The file.
    shape
        Channels and samples that each array must have.

    Raises
    ------
    DataError
        If the file is damaged, holds no such table, or its pickle names code to run.
    ConfigError
        If blosc2, which unpacks it, is not installed.
    """
    import h5py
    import pandas as pd

    numbers: dict[str, np.ndarray] = {}
    objects: np.ndarray | None = None
    with (
        refuse_damage(
            f"{path} is damaged or cut short",
            OSError,
            RuntimeError,
            KeyError,
            ValueError,
            AttributeError,
            struct.error,
            zlib.error,
        ),
        h5py.File(path, "r") as file,
    ):
        group = _find_frame(file, path)
        for number in range(int(group.attrs["nblocks"])):
            names = [name.decode() for name in _read_plain(group[f"block{number}_items"], path).tolist()]
            values = group[f"block{number}_values"]
            if not values.dtype.hasobject:
                numbers |= dict(zip(names, _read_plain(values, path).T, strict=True))
                continue
            found = [name for name in names if name in _ARRAY_COLUMNS]
            if found:
                content = read_pickled(path, offset=_find_bytes(values, path), large_bytes=_SMALL_BYTES)
                objects = np.asarray(content, dtype=object).reshape(-1, len(names))[:, names.index(found[0])]
    if objects is None:
        raise DataError(f"{path} has no column eeg, only {', '.join(numbers)}; it is another file.")
    for number, array in enumerate(objects):
        if not isinstance(array, FileArray) or array.shape != shape or array.dtype.kind != "f":
            has = array.shape if isinstance(array, np.ndarray | FileArray) else type(array).__name__
            raise DataError(
                f"{path}: row {number} should hold {shape[0]} channels of {shape[1]} samples, but holds {has}."
            )
    return TableFile(path, pd.DataFrame(numbers), list(objects))


def _find_frame(file: Any, path: Path) -> Any:
    groups = [group for group in file.values() if group.attrs.get("pandas_type") in ("frame", b"frame")]
    if len(groups) != 1:
        raise DataError(
            f"{path} should hold one pandas table in the fixed format, but holds {len(groups)}; it is another file."
        )
    return groups[0]


def _list_filters(dataset: Any, path: Path) -> list[int]:
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    unknown = [number for number in filters if number not in (_DEFLATE, _SHUFFLE, _BLOSC)]
    if unknown:
        raise DataError(
            f"{path} is packed with the HDF5 filter {unknown[0]}, where blosc ({_BLOSC}) is published."
        )
    return filters


def _read_chunk(dataset: Any, offset: tuple[int, ...], path: Path) -> bytes:
    """Return one chunk of a dataset after undoing its filters."""
    # h5py has no blosc, so the chunk is unpacked here: its filters are undone in reverse order.
    mask, chunk = dataset.id.read_direct_chunk(offset)
    for place, number in reversed(list(enumerate(_list_filters(dataset, path)))):
        if mask >> place & 1:  # left out for this chunk
            continue
        if number == _BLOSC:
            blosc2 = require("blosc2", f"{path}, a pandas HDF5 table packed with blosc,")
            chunk = bytes(blosc2.decompress(chunk))
        elif number == _DEFLATE:
            chunk = zlib.decompress(chunk)
        else:
            n_bytes = dataset.id.get_type().get_size()
            # The filter shuffle stores first bytes first: (n_bytes, n_values) -> (n_values, n_bytes)
            chunk = np.frombuffer(chunk, np.uint8).reshape(n_bytes, -1).T.tobytes()
    return bytes(chunk)


def _read_plain(dataset: Any, path: Path) -> np.ndarray:
    """Return a dataset of numbers or text."""
    if dataset.dtype.hasobject:
        raise DataError(
            f"{path} holds {dataset.name} in a form that published files do not have; fetch it again."
        )
    if _BLOSC not in _list_filters(dataset, path):
        return np.asarray(dataset[()])
    out = np.zeros(dataset.shape, dataset.dtype)
    for number in range(dataset.id.get_num_chunks()):
        start = dataset.id.get_chunk_info(number).chunk_offset
        block = np.frombuffer(_read_chunk(dataset, start, path), dataset.dtype).reshape(dataset.chunks)
        place = tuple(
            slice(a, min(a + c, n)) for a, c, n in zip(start, dataset.chunks, out.shape, strict=True)
        )
        out[place] = block[tuple(slice(0, s.stop - s.start) for s in place)]
    return out


def _find_bytes(dataset: Any, path: Path) -> int:
    """Return the place in the file of the only row of a dataset of variable length.

    Such a row is stored as length, address of a collection and number in it; the collection lists its objects.
    """
    # Addresses count from the end of a user block, which no published file has.
    if dataset.shape != (1,) or dataset.file.userblock_size:
        raise DataError(
            f"{path} holds {dataset.name} in a form that published files do not have; fetch it again."
        )
    _, address, wanted = struct.unpack("<IQI", _read_chunk(dataset, (0,), path)[:16])
    with path.open("rb") as file:
        file.seek(address)
        head = file.read(16)
        size = struct.unpack("<Q", head[8:])[0]
        place = address + 16
        while head[:4] == b"GCOL" and place < address + size:
            file.seek(place)
            index, _, _, n_bytes = struct.unpack("<HHIQ", file.read(16))
            if index == wanted:
                return int(place + 16)
            # Objects of the heap are padded to eight bytes behind a head of sixteen.
            place += 16 + -(-n_bytes // 8) * 8
    raise DataError(f"{path} is damaged: it is missing the bytes of {dataset.name}; fetch it again.")
