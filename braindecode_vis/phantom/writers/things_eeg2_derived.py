"""Preprocessed THINGS-EEG2 in the four forms that other projects ship.

Owns the official 100 Hz dictionary (17 channels), the 250 Hz dictionary of NICE and ATM (a bare pickle in a
``.npy`` file, with 300 times for 250 samples), the whitened ``.pt`` of UBP and the plain arrays of
NeuroBridge. Epochs come as one array per image and are written in turn: one image is in memory at a time.

References
----------
.. [1] Gifford et al. (2022). https://doi.org/10.1016/j.neuroimage.2022.119754
.. [2] Song et al. (2024). Decoding natural images from EEG for object recognition. ICLR. arXiv:2308.13234
.. [3] Wu et al. (2025). Bridging the vision-brain gap with an uncertainty-aware blur prior. CVPR.
   arXiv:2503.04207
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from braindecode_vis.checks import DataError, check_option
from braindecode_vis.phantom.writers.pickles import PendingArray, split_pickle
from braindecode_vis.phantom.writers.tables import check_block, check_count, write_json_file
from braindecode_vis.phantom.writers.things_eeg2 import PARTITIONS, Partition
from braindecode_vis.store import replace_atomically

OFFICIAL_TIMES = np.round(np.arange(100) / 100 - 0.2, 2)
# Fifty samples of baseline were dropped from the data, not from the times.
TIMES_300 = np.round(np.arange(300) / 250 - 0.2, 3)


def write_official(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    n_images: int,
    n_repetitions: int,
    ch_names: Sequence[str],
    times: np.ndarray = OFFICIAL_TIMES,
    dtype: str = "<f8",
) -> Path:
    """Write ``sub-XX/preprocessed_eeg_{training,test}.npy`` as the authors do: `numpy.save` of a dictionary.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, in the order of the codes.
    """
    check_option("partition", partition, PARTITIONS)
    array = PendingArray((n_images, n_repetitions, len(ch_names), len(times)), np.dtype(dtype))
    content = {
        "preprocessed_eeg_data": array,
        "ch_names": list(map(str, ch_names)),
        "times": np.asarray(times, dtype="<f8"),
    }
    path = directory / f"sub-{subject:02d}" / f"preprocessed_eeg_{partition}.npy"
    return _write_stream(path, split_pickle(content, container="npy", protocol=3), array, epochs)


def write_250hz(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    n_images: int,
    n_repetitions: int,
    ch_names: Sequence[str],
    n_times: int = 250,
    times: np.ndarray = TIMES_300,
    dtype: str = "<f8",
) -> Path:
    """Write ``sub-XX/preprocessed_eeg_{training,test}.npy`` as NICE and ATM do: a pickle named ``.npy``.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, 0 to 1 s.
    times
        300 entries from -0.2 s, though the data have 250 samples from 0 s: the published mismatch.
    """
    check_option("partition", partition, PARTITIONS)
    array = PendingArray((n_images, n_repetitions, len(ch_names), n_times), np.dtype(dtype))
    content = {
        "preprocessed_eeg_data": array,
        "ch_names": list(map(str, ch_names)),
        "times": np.asarray(times, dtype="<f8"),
    }
    path = directory / f"sub-{subject:02d}" / f"preprocessed_eeg_{partition}.npy"
    return _write_stream(path, split_pickle(content, container="pickle", protocol=4), array, epochs)


def write_ubp(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    images: Sequence[str],
    labels: Sequence[int],
    texts: Sequence[str],
    sessions: np.ndarray,
    ch_names: Sequence[str],
    n_times: int = 250,
    times: np.ndarray = TIMES_300,
) -> Path:
    """Write ``Preprocessed_data_250Hz_whiten/sub-XX/{train,test}.pt`` as UBP does.

    The published files come from `torch.save` of a dictionary of NumPy arrays.

    The samples become float16. The file is read with ``torch.load(..., weights_only=False)`` only.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image; whitened, so that float16 can hold them.
    images, labels, texts
        Path, concept number (from 0) and concept name of each image; repeated for every repetition.
    sessions : array of shape (n_images, n_repetitions)
        Session of each trial, from 0.
    """
    check_option("partition", partition, PARTITIONS)
    shape = np.shape(sessions)
    if len(shape) != 2 or len(images) != shape[0]:
        raise DataError(f"sessions must have one row per image ({len(images)}), not the shape {shape}.")
    array = PendingArray((*shape, len(ch_names), n_times), np.dtype("<f2"))
    content = {
        "eeg": array,
        "label": np.tile(np.asarray(labels, dtype="<i8")[:, None], (1, shape[1])),
        "img": np.tile(np.asarray(images)[:, None], (1, shape[1])),
        "text": np.tile(np.asarray(texts)[:, None], (1, shape[1])),
        "session": np.asarray(sessions, dtype="<f8"),
        "ch_names": list(map(str, ch_names)),
        "times": np.asarray(times, dtype="<f8"),
    }
    name = "train" if partition == "training" else "test"
    folder = directory / "Preprocessed_data_250Hz_whiten" / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    parts = split_pickle(content, container="pickle", protocol=4)
    with replace_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        large = array.n_bytes > (1 << 31) - (1 << 26)
        with archive.open(zipfile.ZipInfo(f"{name}/data.pkl"), "w", force_zip64=large) as file:
            _write_parts(file, parts, array, epochs, what=str(path.name))
        archive.writestr(zipfile.ZipInfo(f"{name}/byteorder"), "little")
        archive.writestr(zipfile.ZipInfo(f"{name}/version"), "3\n")
    return path


def write_neurobridge(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    n_concepts: int,
    n_exemplars: int,
    n_repetitions: int,
    ch_names: Sequence[str],
    n_times: int = 250,
    sfreq: float = 250.0,
    baseline_s: float = 0.2,
    dtype: str = "<f4",
) -> Path:
    """Write ``preprocessed_eeg/sub-XX/{train,test}.npy``, a plain array, and ``info.json`` beside it.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, concept by concept; the array has the shape
        (n_concepts, n_exemplars, n_repetitions, n_channels, n_times).
    baseline_s
        Written to ``info.json``, whether or not it is true of the data (for MEG it is not).
    """
    check_option("partition", partition, PARTITIONS)
    name = "train" if partition == "training" else "test"
    folder = directory / "preprocessed_eeg" / f"sub-{subject:02d}"
    shape = (n_concepts, n_exemplars, n_repetitions, len(ch_names), n_times)
    rows = PendingArray((n_concepts * n_exemplars, *shape[2:]), np.dtype(dtype))
    path = _write_stream(folder / f"{name}.npy", (_make_npy_header(shape, rows.dtype), b""), rows, epochs)
    write_json_file(
        folder / "info.json",
        {
            "ch_names": list(map(str, ch_names)),
            "times": (np.arange(n_times) / sfreq).tolist(),
            "sfreq": sfreq,
            "baseline_duration": baseline_s,
        },
    )
    return path


def write_neurobridge_features(
    directory: Path, model: str, partition: Partition, features: np.ndarray
) -> Path:
    """Write ``image_feature/<model>/image_{train,test}.npy``.

    Parameters
    ----------
    features : array of shape (n_concepts, n_exemplars, n_features)
        Written as float32.
    """
    check_option("partition", partition, PARTITIONS)
    array = np.ascontiguousarray(
        check_block(features, (None, None, None), what="image features"), dtype="<f4"
    )
    folder = directory / "image_feature" / model
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"image_{'train' if partition == 'training' else 'test'}.npy"
    with replace_atomically(path) as temporary:
        temporary.write_bytes(_make_npy_header(array.shape, array.dtype) + array.tobytes())
    return path


def _make_npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    import io

    buffer = io.BytesIO()
    description = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _write_stream(
    path: Path, parts: tuple[bytes, bytes], array: PendingArray, epochs: Iterable[np.ndarray]
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        _write_parts(file, parts, array, epochs, what=path.name)
    return path


def _write_parts(
    file: IO[bytes] | Any,
    parts: tuple[bytes, bytes],
    array: PendingArray,
    epochs: Iterable[np.ndarray],
    what: str,
) -> None:
    file.write(parts[0])
    count = 0
    for epoch in epochs:
        row = check_block(epoch, array.shape[1:], what=f"the epochs of {what}")
        row = row.astype(array.dtype.newbyteorder("<"), order="C")
        if array.dtype.itemsize == 2:
            check_block(row, array.shape[1:], what=f"the float16 epochs of {what} (whiten them first)")
        file.write(row.tobytes())
        count += 1
    check_count(count, array.shape[0], what=what, unit="images")
    file.write(parts[1])


def estimate_epochs_bytes(
    n_images: int, n_repetitions: int, n_channels: int, n_times: int, *, itemsize: int = 8
) -> int:
    """Return the size of one preprocessed file.

    Examples
    --------
    >>> round(estimate_epochs_bytes(16540, 4, 63, 250) / 1e9, 2)
    8.34
    """
    return n_images * n_repetitions * n_channels * n_times * itemsize
