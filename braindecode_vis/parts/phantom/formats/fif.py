"""FIF files written from a stream, with the same bytes for the same input.

Owns the way from blocks of samples to MNE's FIF writers. Blocks go to a flat temporary file first, since MNE reads what
it writes by position; MNE then copies it in pieces. Peak memory is one block, or one part of a split epochs file. MNE
writes the time and the machine into files: these fields are set to zero.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.parts.phantom.formats.file_writers import check_block, check_count

if TYPE_CHECKING:
    import mne
    import pandas as pd

_ID_STRUCT = 31  # FIF type of the stamps


def make_meg_info(
    ch_names: Sequence[str],
    sfreq: float,
    *,
    locs: np.ndarray | None = None,
    extra: Sequence[tuple[str, str]] = (),
    line_freq: float | None = 60.0,
    dev_head: np.ndarray | None = None,
) -> mne.Info:
    """Return measurement info of CTF axial gradiometers, then `extra` channels.

    Parameters
    ----------
    locs : array of shape (n_channels, 12), optional
        Position (m) and orientation of each sensor in device coordinates, in MNE's form.
    extra
        Name and MNE type of the channels that follow.
    dev_head : array of shape (4, 4), optional
        Position of the head in the helmet; by default the two coordinate systems agree.
    """
    import mne

    names, types = [*ch_names], ["mag"] * len(ch_names)
    names += [name for name, _ in extra]
    types += [kind for _, kind in extra]
    info = mne.create_info(names, sfreq, types)
    with info._unlock():
        info["line_freq"] = line_freq
        info["dev_head_t"] = mne.Transform("meg", "head", dev_head)
        for index in range(len(ch_names)):
            info["chs"][index]["coil_type"] = mne._fiff.constants.FIFF.FIFFV_COIL_CTF_GRAD
            if locs is not None:
                info["chs"][index]["loc"] = np.asarray(locs[index], dtype=float)
    return info


def write_raw_fif(path: Path, blocks: Iterable[np.ndarray], info: mne.Info, n_samples: int) -> Path:
    """Write a continuous FIF file from blocks of shape (n_channels, n), bit-exact in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(path) as folder:
        rows = _iterate_samples(blocks, len(info["ch_names"]), n_samples, path.name)
        raw = _open_flat(_spool(folder, rows), info, n_samples)
        raw.save(folder / path.name, fmt="single", split_naming="bids", verbose="error")
        _publish(folder, path)
    return path


def write_epochs_fif(
    path: Path,
    epochs: Iterable[np.ndarray],
    info: mne.Info,
    *,
    event_ids: np.ndarray,
    tmin: float,
    n_times: int,
    split_size: str = "500MB",
    metadata: pd.DataFrame | None = None,
) -> Path:
    """Write an ``-epo.fif`` file, in several parts if it is large.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_channels, n_times)
        One per entry of `event_ids`.
    event_ids : int array of shape (n_epochs,)
        Third column of the events.
    tmin
        Time of the first sample (s).
    split_size
        Largest part. MNE holds one part in memory, as float64.
    metadata
        A row for each epoch, stored with them.
    """
    import mne

    path.parent.mkdir(parents=True, exist_ok=True)
    n_epochs, n_channels = len(event_ids), len(info["ch_names"])
    with _scratch_folder(path) as folder:
        rows = _iterate_epochs(epochs, (n_channels, n_times), n_epochs, path.name)
        raw = _open_flat(_spool(folder, rows), info, n_epochs * n_times)
        # Epochs are one after the other in the flat file; an event marks time zero of each.
        first = round(-tmin * info["sfreq"])
        events = np.zeros((n_epochs, 3), dtype=int)
        events[:, 0] = np.arange(n_epochs) * n_times + first
        events[:, 2] = event_ids
        result = mne.Epochs(
            raw,
            events,
            {str(i): int(i) for i in np.unique(event_ids)},
            tmin,
            tmin + (n_times - 1) / info["sfreq"],
            baseline=None,
            preload=False,
            proj=False,
            reject_by_annotation=False,
            metadata=metadata,
            verbose="error",
        )
        result.save(folder / path.name, split_size=split_size, fmt="single", verbose="error")
        _publish(folder, path)
    return path


def _iterate_samples(
    blocks: Iterable[np.ndarray], n_channels: int, n_samples: int, name: str
) -> Iterator[np.ndarray]:
    count = 0
    for block in blocks:
        array = check_block(block, (n_channels, None), what=f"the blocks of {name}")
        count += array.shape[1]
        yield array.T
    check_count(count, n_samples, what=name, unit="samples")


def _iterate_epochs(
    epochs: Iterable[np.ndarray], shape: tuple[int, int], n_epochs: int, name: str
) -> Iterator[np.ndarray]:
    count = 0
    for epoch in epochs:
        yield check_block(epoch, shape, what=f"the epochs of {name}").T
        count += 1
    check_count(count, n_epochs, what=name, unit="epochs")


def _spool(folder: Path, rows: Iterable[np.ndarray]) -> Path:
    """Append float32 rows of shape (n, n_channels) to one flat file."""
    path = folder / "samples.f32"
    with path.open("wb") as file:
        for block in rows:
            file.write(np.ascontiguousarray(block, dtype="<f4").data)
    return path


def _open_flat(path: Path, info: mne.Info, n_samples: int) -> Any:
    """Return a Raw that reads a flat float32 file by position. Defined here, since importing MNE is slow."""
    import mne

    class FlatRaw(mne.io.BaseRaw):
        def _read_segment_file(self, data, idx, fi, start, stop, cals, mult):  # type: ignore[no-untyped-def]
            n_channels = len(info["ch_names"])
            with path.open("rb") as file:
                file.seek(start * n_channels * 4)
                block = np.fromfile(file, "<f4", (stop - start) * n_channels)
            data[:] = block.reshape(-1, n_channels).T[idx]  # (n_times, n_channels) on disk

    return FlatRaw(info, last_samps=[n_samples - 1], filenames=[None], orig_format="single", verbose="error")


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    folder = path.parent / f".tmp-{os.getpid()}-{path.stem}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, path: Path) -> None:
    """Move the finished parts to their place; the first one, which readers open, is moved last."""
    parts = sorted(folder.glob("*.fif"), key=lambda part: (part.name == path.name, part.name))
    for part in parts:
        # Machine, second and microsecond of every id become zero; a loop over the tags of the file.
        with part.open("r+b") as file:
            position = 0
            while len(head := os.pread(file.fileno(), 16, position)) == 16:
                kind, size = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
                if kind == _ID_STRUCT:
                    # The first four bytes are the version of the file, which is kept.
                    os.pwrite(file.fileno(), b"\0" * (size - 4), position + 20)
                position += 16 + size  # kind, type, size and next, then the data
        part.replace(path.with_name(part.name))
