"""Checks that files of recordings are complete: sizes against headers, the ends of compressed files, last blocks.

Owns one short check per format, and the reading of every byte for `check --full`. After a broken transfer, the
beginning of a file is correct, so the end is checked: the size in a header, the trailer of a gzip stream (which holds
the size before compression), the last chunk of an HDF5 file, the list of members of a zip or tar. A file counts as
damaged only if its own format shows it; other formats are left to their loader. Contains nothing about a particular
data set.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.datasets.manifests import CheckFinding
from braindecode_vis.datasets.sources.fmri_volumes import open_stream, read_volume_header

_BLOCK = 1 << 22
# A gzip stream whose trailer does not show whether it is complete is decompressed at once if it is not larger than
# this.
_SMALL_GZIP = 1 << 24
_SMALL_HDF5 = 1 << 27  # is searched for texts by the short look as well
_HDF5 = b"\x89HDF\r\n\x1a\n"
_HEAP = b"GCOL\x01\0\0\0"  # where texts of any length of an HDF5 file lie
_MGH_HEADER, _MGH_SIZES = 284, {0: 1, 1: 4, 3: 4, 4: 2}
_TEXT_END = 1 << 16
_TAR_PADDING = 1 << 20  # writers fill tars with zeros up to a multiple of their block
_AGAIN = "copy or fetch it again"

Advance = Callable[[int], Any]


def list_data_files(root: Path) -> list[Path]:
    """Return the files below a folder with a format that is known here, sorted; the truth of a phantom is left out."""
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "phantom_truth")
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        # A link whose content was not fetched is skipped; its loader says how to get it.
        found += [path for path in paths if _find_look(path) is not None and path.is_file()]
    return found


def check_data_files(
    root: Path, *, paths: Sequence[Path] | None = None, full: bool = False, advance: Advance | None = None
) -> list[CheckFinding]:
    """Check every data file below a folder, and name each damaged one.

    Parameters
    ----------
    root
        Folder of the data set.
    paths
        Files below it, from `list_data_files`; all by default.
    full
        Read every byte instead of only ends and headers.
    advance
        Called with the number of bytes read since the last call.

    Returns
    -------
    list of CheckFinding
        One for each damaged file, then one with the number of checked files and the kind of check; empty if there is no
        file of a known format, since the data set's own check reports missing files.
    """
    findings, n_bytes = [], 0
    paths = list_data_files(root) if paths is None else paths
    if not paths:
        return []
    for path in paths:
        size = path.stat().st_size
        n_bytes += size
        try:
            check_data_file(path, full=full)
        except DataError as error:
            findings.append(CheckFinding(path.relative_to(root).as_posix(), False, str(error)))
        if advance is not None:
            advance(size)
    how = (
        "every byte read, and decompressed if it is compressed"
        if full
        else "sizes compared with headers, ends and last blocks looked at; --full reads all"
    )
    about = f"{len(paths)} file{'' if len(paths) == 1 else 's'}, {n_bytes / 1e6:.1f} MB: {how}"
    if findings:
        about += f"; {len(findings)} damaged"
    return [*findings, CheckFinding("files", not findings, about)]


def check_data_file(path: Path, *, full: bool = False) -> None:
    """Raise `DataError` if a file is not complete.

    Parameters
    ----------
    full
        Read the whole file.
    """
    look = _find_look(path)
    if look is None:
        return
    if not path.stat().st_size and look is not _look_at_text:
        raise DataError(f"{path} is empty; {_AGAIN}.")
    with refuse_damage(f"{path} is damaged or cut short"):
        look(path, full)
        if full and look in _RAW:
            _read_all(path)


def _find_look(path: Path) -> Callable[[Path, bool], None] | None:
    name = path.name.lower()
    # Files of a CTF folder and files that a header names are checked with the folder or the header.
    return next((look for ending, look in _LOOKS if name.endswith(ending)), None)


def _need(path: Path, needed: int, found: int | None = None, what: str = "its header") -> None:
    found = path.stat().st_size if found is None else found
    if found < needed:
        raise DataError(
            f"{path} is truncated: {found} of the {needed} bytes that {what} announces; {_AGAIN}."
        )


def _read_all(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(_BLOCK):
            pass


# --- compressed streams and volumes -----------------------------------------------------------------------


def _count_decompressed(path: Path) -> int:
    """Return the number of bytes in a gzip stream; the reader compares its checksum at the end."""
    n = 0
    with open_stream(path) as file:
        while block := file.read(_BLOCK):
            n += len(block)
    return n


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _check_gzip(path: Path, needed: int, full: bool) -> None:
    """Compare the size of a gzip stream with the needed one; its last four bytes are enough if they agree."""
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        said = struct.unpack("<I", file.read(4))[0]
    # The trailer contains the size up to 4 GiB; if a file has several streams, only that of the last one.
    if full or said != needed % (1 << 32):
        with refuse_damage(f"{path} is truncated or damaged: its gzip stream ends early"):
            found = _count_decompressed(path)
        _need(path, needed, found)


def _look_at_gzip(path: Path, full: bool) -> None:
    if full or path.stat().st_size <= _SMALL_GZIP:
        _count_decompressed(path)


def _look_at_nifti(path: Path, full: bool) -> None:
    header = read_volume_header(path)
    needed = header.offset + prod(header.shape) * header.n_volumes * header.dtype.itemsize
    if _is_gzip(path):
        _check_gzip(path, needed, full)
    else:
        _need(path, needed)


def _look_at_mgh(path: Path, full: bool) -> None:
    with open_stream(path) as file:
        head = file.read(_MGH_HEADER)
    if len(head) < _MGH_HEADER:
        raise DataError(f"{path} is truncated: it ends in its header; {_AGAIN}.")
    version, *shape, kind = struct.unpack(">6i", head[:24])
    if version != 1 or kind not in _MGH_SIZES:
        raise DataError(f"{path} is not an MGH file; {_AGAIN}.")
    needed = _MGH_HEADER + prod(shape) * _MGH_SIZES[kind]
    if _is_gzip(path):
        # Tags of any length follow the values, so the trailer cannot show that the values are complete.
        if full or path.stat().st_size <= _SMALL_GZIP:
            _need(path, needed, _count_decompressed(path))
        return
    _need(path, needed)


# --- containers -------------------------------------------------------------------------------------------


def check_texts(path: Path) -> None:
    """Raise `DataError` if the heap of the texts of an HDF5 file has an entry without a length.

    The library would then read at the same place for ever, and cannot be stopped. Numbers are not in a heap.
    """
    if not path.is_file() or path.stat().st_size == 0:  # told by whoever opens it
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        heap = content.find(_HEAP)
        while heap >= 0:
            end = min(heap + int.from_bytes(content[heap + 8 : heap + 16], "little"), len(content))
            place = heap + 16
            while place + 16 <= end:
                number = int.from_bytes(content[place : place + 2], "little")
                length = int.from_bytes(content[place + 8 : place + 16], "little")
                if number == 0 and length == 0:
                    raise DataError(
                        f"{path} is damaged: the texts that begin at byte {heap} are overwritten; {_AGAIN}."
                    )
                # The number 0 is free space, whose length counts its own header.
                place += length if number == 0 else 16 + -(-length // 8) * 8
            heap = content.find(_HEAP, heap + 8)


def _look_at_hdf5(path: Path, full: bool) -> None:
    import h5py

    if full or path.stat().st_size < _SMALL_HDF5:
        check_texts(path)

    with h5py.File(path, "r") as file:  # the library compares the size of the file with what was written
        datasets: list[Any] = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        for dataset in datasets:
            if dataset.dtype.kind not in "fiub" or not dataset.size:
                continue
            if full:
                for rows in _list_rows(dataset):
                    dataset[rows]
            elif dataset.chunks is not None and (n := dataset.id.get_num_chunks()):
                start = dataset.id.get_chunk_info(n - 1).chunk_offset
                dataset[tuple(slice(a, a + b) for a, b in zip(start, dataset.chunks, strict=True))]
            elif dataset.ndim:
                dataset[(dataset.shape[0] - 1, *[-1] * (dataset.ndim - 1))]


def _list_rows(dataset: Any) -> Iterator[Any]:
    if not dataset.ndim:
        yield ()
        return
    whole = dataset.chunks[0] if dataset.chunks is not None else 1
    step = max(whole, _BLOCK // max(1, prod(dataset.shape[1:]) * dataset.dtype.itemsize))
    for start in range(0, dataset.shape[0], step):
        yield slice(start, start + step)


def _look_at_matlab(path: Path, full: bool) -> None:
    """MATLAB 5: a header of 128 bytes, then elements with their size; 7.3 is HDF5 after a header of 512 bytes."""
    with path.open("rb") as file:
        head = file.read(520)
        if _HDF5 in head:
            _look_at_hdf5(path, full)
            return
        if head.startswith(b"MATLAB 5.0"):
            _need(path, 128, what="its format")
        order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
        if order is None:  # MATLAB 4 has no head
            return
        size, place = path.stat().st_size, 128
        while place < size:
            file.seek(place)
            _need(path, place + 8, what="an element")
            kind, length = struct.unpack(f"{order}2I", file.read(8))
            # A small element has its bytes in the tag.
            place += 8 if kind >> 16 else 8 + length
            # Elements that are not compressed are padded to eight bytes; only the last one may have no padding.
            _need(path, place, what="an element")
            place += 0 if kind == 15 else -place % 8
    if full:
        from scipy.io import loadmat

        loadmat(path)


def _look_at_numpy(path: Path, full: bool) -> None:
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # some publishers give a pickle this name
            _look_at_pickle(path, full)
            return
        file.seek(0)
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        offset = file.tell()
    if dtype.hasobject:
        _look_at_pickle(path, full)
    else:
        _need(path, offset + prod(shape) * dtype.itemsize)


def _look_at_pickle(path: Path, full: bool) -> None:
    from braindecode_vis.datasets.sources.safe_pickle import read_pickled_dict

    # Its loader decides which names in a pickle are allowed; here it must only be complete.
    try:
        read_pickled_dict(path)
    except DataError as error:
        if "truncated" in str(error):
            raise
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b".":  # the opcode that ends every pickle
            raise DataError(f"{path} is truncated: it does not end as a pickle does; {_AGAIN}.")


def _look_at_zip(path: Path, full: bool) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # files of torch before version 1.6 are pickles in a row
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            _need(path, entry.header_offset + entry.compress_size, what="its list of members")
        # torch can write files without checksums.
        if full and path.suffix not in (".pt", ".pth") and (bad := archive.testzip()):
            raise DataError(f"{path} is damaged: the checksum of its member {bad} is wrong; {_AGAIN}.")


def _look_at_tar(path: Path, full: bool) -> None:
    with tarfile.open(path, "r:") as tar:
        check_tar_end(path, tar.getmembers())


def check_tar_end(path: Path, members: Sequence[tarfile.TarInfo]) -> None:
    """Raise `DataError` if a tar continues after its last found member, or ends before it."""
    last = max((entry.offset_data + entry.size for entry in members), default=0)
    # A truncated header looks like the end of the archive; a complete archive ends with two empty blocks.
    needed = (-(-last // tarfile.BLOCKSIZE) + 2) * tarfile.BLOCKSIZE
    _need(path, needed, what="its list of members")
    # Zeros in the middle also look like the end, and all members after them would be missing.
    with path.open("rb") as file:
        file.seek(needed)
        behind = file.read(_TAR_PADDING + 1)
    if len(behind) > _TAR_PADDING or behind.strip(b"\0"):
        raise DataError(
            f"{path} is damaged: its list of members ends at byte {needed} of {path.stat().st_size}; {_AGAIN}."
        )


def _look_at_parquet(path: Path, full: bool) -> None:
    import pyarrow.parquet

    if full:
        pyarrow.parquet.read_table(path)
    else:
        pyarrow.parquet.read_metadata(path)


# --- EEG and MEG ------------------------------------------------------------------------------------------


def _look_at_brainvision(path: Path, full: bool) -> None:
    text = path.read_bytes().decode("utf-8", errors="replace")
    values = dict(re.findall(r"^(\w+)=(.*?)\s*$", text, flags=re.MULTILINE))
    sizes = {"INT_16": 2, "UINT_16": 2, "INT_32": 4, "IEEE_FLOAT_32": 4}
    size = sizes.get(values.get("BinaryFormat", ""))
    if size is None or values.get("DataFormat", "BINARY").upper() != "BINARY":
        return
    row = size * int(values["NumberOfChannels"])
    # Renamed recordings keep the old name in the header.
    data = path.parent / values["DataFile"].replace("$b", path.stem)
    if not data.is_file():
        raise DataError(
            f"{path} refers to the samples {data.name}, which are not in its folder; fetch them too."
        )
    found = data.stat().st_size
    if "DataPoints" in values:
        _need(data, row * int(values["DataPoints"]), what=f"{path.name}")
    if found % row:
        raise DataError(
            f"{data} is truncated: its {found} bytes are not a whole number of samples of {row} bytes, "
            f"as in {path.name}; {_AGAIN}."
        )
    marks = path.parent / values.get("MarkerFile", "").replace("$b", path.stem)
    if values.get("MarkerFile") and marks.is_file():
        places = re.findall(
            r"^Mk\d+=[^,\n]*,[^,\n]*,(\d+)", marks.read_text(errors="replace"), flags=re.MULTILINE
        )
        # Positions count from 1.
        _need(data, row * max(map(int, places), default=0), what=f"the last marker of {marks.name}")
    if full:
        _read_all(data)


def _look_at_edf(path: Path, full: bool) -> None:
    with path.open("rb") as file:
        head = file.read(256)
        n = int(head[252:256])
        file.seek(256 + 216 * n)
        per_record = [int(file.read(8)) for _ in range(n)]
    size = sum(per_record) * (3 if path.suffix.lower() == ".bdf" else 2)
    # During the recording, the value in the file is -1.
    _need(path, int(head[184:192]) + max(0, int(head[236:244])) * size)


def _look_at_eeglab(path: Path, full: bool) -> None:
    _look_at_matlab(path, full)
    with path.open("rb") as file:
        if _HDF5 in file.read(520):
            return
    from scipy.io import loadmat

    names = ["EEG", "nbchan", "pnts", "trials", "data"]
    content = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=names)
    held = vars(content["EEG"]) if "EEG" in content else content
    if isinstance(held.get("data"), str):
        # A renamed set keeps the old name of its samples; readers then use the name of the set.
        places = [path.parent / str(held["data"]), path.with_suffix(".fdt")]
        data = next((place for place in places if place.is_file()), None)
        if data is None:
            raise DataError(
                f"{path} refers to the samples {places[0].name}, which are not in its folder; fetch them too."
            )
        trials = held.get("trials", 1)
        _need(data, 4 * int(held["nbchan"]) * int(held["pnts"]) * max(1, int(trials)), what=path.name)
        if full:
            _read_all(data)


def _look_at_fif(path: Path, full: bool) -> None:
    """Go from tag to tag: kind, type, size and position of the next; tags open and close blocks."""
    size, place, depth = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            _need(path, place + 16, what="a tag")
            kind, _, length, after = struct.unpack(">4i", file.read(16))
            _need(path, place + 16 + max(0, length), what="a tag")
            depth += (kind == 104) - (kind == 105)
            if after < 0:
                break
            place = after or place + 16 + length
    if depth > 0:
        raise DataError(f"{path} is truncated: {depth} of its blocks are not closed; {_AGAIN}.")


# --- tables and pictures ----------------------------------------------------------------------------------


def _look_at_text(path: Path, full: bool) -> None:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):  # two bytes a letter
            return
        file.seek(0 if full else max(0, path.stat().st_size - _TEXT_END))
        while block := file.read(_BLOCK):
            if b"\0" in block:
                raise DataError(f"{path} has zeros instead of text: a part was overwritten; {_AGAIN}.")


def _look_at_picture(path: Path, full: bool) -> None:
    if full:
        from PIL import Image

        with Image.open(path) as image:
            image.load()


_LOOKS: tuple[tuple[str, Callable[[Path, bool], None]], ...] = (
    (".nii.gz", _look_at_nifti), (".nii", _look_at_nifti), (".mgz", _look_at_mgh), (".mgh", _look_at_mgh),
    (".hdf5", _look_at_hdf5), (".h5", _look_at_hdf5), (".mat", _look_at_matlab), (".npy", _look_at_numpy),
    (".npz", _look_at_zip), (".pt", _look_at_zip), (".pth", _look_at_zip), (".pkl", _look_at_pickle),
    (".pkl3", _look_at_pickle),
    (".tar", _look_at_tar), (".parquet", _look_at_parquet), (".vhdr", _look_at_brainvision), (".edf", _look_at_edf),
    (".bdf", _look_at_edf), (".set", _look_at_eeglab), (".fif", _look_at_fif), (".gz", _look_at_gzip),
    (".tsv", _look_at_text), (".csv", _look_at_text), (".json", _look_at_text),
    (".jpg", _look_at_picture), (".jpeg", _look_at_picture), (".png", _look_at_picture),
)  # fmt: skip
# Formats with plain values: reading all of them shows a failing disk.
_RAW = (_look_at_numpy, _look_at_edf, _look_at_fif, _look_at_mgh, _look_at_nifti, _look_at_tar)
