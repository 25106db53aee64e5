"""Preprocessed forms of THINGS-EEG2: the authors' 100 Hz epochs of 17 channels, and 250 Hz epochs of 63.

The same subjects see the same images in the same order as in the raw layout, but are recorded at a lower rate, so no
raw file is needed. Epochs are cut from the stream and stored in a flat temporary file; the noise covariance of a
session whitens them there (multivariate noise normalisation [3]_), as in the scripts [4]_: over training and test
trials, of each time over repetitions and baseline included, in the official files; over training trials, of each epoch
over the times after the onset, in the 250 Hz ones; both shrunk after Ledoit and Wolf. They are written as one array per
image: one image is in memory at a time. NICE and ATM publish the 250 Hz epochs as pickles, UBP as float16 in the
archives of `torch.save`, NeuroBridge as plain arrays.

References
----------
.. [1] Gifford et al. (2022). https://doi.org/10.1016/j.neuroimage.2022.119754
.. [2] Song et al. (2024). Decoding natural images from EEG for object recognition. ICLR. arXiv:2308.13234
.. [3] Guggenmos, M., Sterzer, P., Cichy, R. M. (2018). Multivariate pattern analysis for MEG: a comparison of
   dissimilarity measures. NeuroImage 173, 434-447. https://doi.org/10.1016/j.neuroimage.2018.02.044
.. [4] gifale95/eeg_encoding@f0c03bf:02_eeg_preprocessing/preprocessing_utils.py, and the copies of it at 250 Hz in
   eeyhsong/NICE-EEG@a7709d8:preprocessing and in UBP and NeuroBridge.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from braindecode_vis.base.checks import check_option
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.things_eeg2.dataset import ALL63, POSTERIOR17
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats import things_eeg2_format
from braindecode_vis.parts.phantom.formats.file_writers import check_block, check_count, write_text
from braindecode_vis.parts.phantom.formats.pickles import Container, PendingArray, split_pickle
from braindecode_vis.parts.phantom.formats.things_eeg2_format import (
    PARTITIONS,
    Partition,
    PartitionDesign,
    SessionDesign,
)
from braindecode_vis.parts.phantom.forward import make_sensor_system_at
from braindecode_vis.parts.phantom.meeg_signal import cut_epochs, make_lowpass
from braindecode_vis.parts.phantom.sizes import PhantomSize

N_BASELINE_S = 0.2  # epochs start here, and their mean up to the onset is subtracted
_CHUNK = 128  # trials whitened at a time
OFFICIAL_TIMES = np.round(np.arange(100) / 100 - 0.2, 2)
# Fifty samples of baseline were removed from the data, but not from the times.
TIMES_300 = np.round(np.arange(300) / 250 - 0.2, 3)


@dataclass(frozen=True)
class EpochLayout:
    """Preprocessing of one publisher.

    Parameters
    ----------
    sfreq, decim, cutoff_hz
        Final rate, factor between simulated and final rate, and cutoff of the low-pass.
    ch_names
        Kept channels.
    n_times, n_dropped
        Samples of an epoch from -0.2 s on, and number of samples that are removed at the start after whitening.
    whitened_by
        Partitions from whose trials the noise covariance is computed.
    over_repetitions
        Whether the covariance is that of each time over the repetitions of an image, and not of each epoch over times.
    dtype
        Type of the published numbers.
    """

    sfreq: float
    decim: int
    cutoff_hz: float
    ch_names: tuple[str, ...]
    n_times: int
    n_dropped: int
    whitened_by: tuple[Partition, ...]
    over_repetitions: bool
    dtype: str


def count(name: str, size: PhantomSize) -> Counts:
    """Return work and space of the epochs."""
    layout = LAYOUTS[name]
    total = things_eeg2_format.expect_total_seconds(size)
    n_kept = layout.n_times - layout.n_dropped
    itemsize = np.dtype(layout.dtype).itemsize
    one = estimate_epochs_bytes(size.n_trials, 1, len(layout.ch_names), n_kept, itemsize=itemsize)
    spooled = estimate_epochs_bytes(size.n_trials, 1, len(layout.ch_names), layout.n_times, itemsize=4)
    seconds = 4 + total / 150 + size.n_subjects * size.n_trials * 2e-3
    return Counts(size.n_subjects * one, spooled, total, seconds, 1 + size.n_subjects * _count_steps(size))


def _count_steps(size: PhantomSize) -> int:
    return size.n_sessions * sum(things_eeg2_format.count_steps(size, partition) for partition in PARTITIONS)


def plan(name: str, job: PhantomJob) -> list[Unit]:
    """Return one unit per subject: the two files share their noise covariance."""
    write = partial(_write_person, name)
    return [
        things_eeg2_format.plan_image_list(job),
        *list_units(job, "subject {person.name}, epochs", _count_steps(job.size), write),
    ]


def _write_person(name: str, job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    layout, size = LAYOUTS[name], job.size
    counts: dict[Partition, tuple[int, int]] = {
        "training": (size.n_train_images, size.train_repetitions),
        "test": (size.n_test_concepts, size.test_repetitions),
    }
    spools: dict[Partition, np.ndarray] = {}
    sessions = {partition: np.zeros(shape) for partition, shape in counts.items()}
    paths = {part: job.scratch / f"{name}-{person.name}-{part}.npy" for part in PARTITIONS}
    try:
        for partition, (n_images, n_repetitions) in counts.items():
            shape = (n_images * n_repetitions, len(layout.ch_names), layout.n_times)
            spools[partition] = np.lib.format.open_memmap(paths[partition], "w+", np.float32, shape)
        for design in things_eeg2_format.make_design(size, job.config.seed, person.index):
            slots = _fill_session(layout, job, person, design, spools, progress)
            for partition, places in slots.items():
                sessions[partition].flat[places] = design.session - 1
        written: list[Path] = []
        for partition, (n_images, n_repetitions) in counts.items():
            # (n_images * n_repetitions, n_channels, n_times), image by image, without the dropped samples
            trials = spools[partition][:, :, layout.n_dropped :]
            images = (trials[i * n_repetitions : (i + 1) * n_repetitions] for i in range(n_images))
            written += _write_files(name, job, person.index + 1, partition, images, sessions[partition])
        return written
    finally:
        spools.clear()
        for path in paths.values():
            path.unlink(missing_ok=True)


def _write_files(
    name: str,
    job: PhantomJob,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    sessions: np.ndarray,
) -> list[Path]:
    """Write one partition in the form of its publisher; `sessions` (from 0) has the shape (n_images, n_repetitions)."""
    ch_names, (n_images, n_repetitions) = LAYOUTS[name].ch_names, sessions.shape
    if name in ("things-eeg2-official", "things-eeg2-250hz"):
        write = write_official if name == "things-eeg2-official" else write_250hz
        counts = {"n_images": n_images, "n_repetitions": n_repetitions}
        return [write(job.root, subject, partition, epochs, **counts, ch_names=ch_names)]
    own = job.table[(job.table["split"] == "test") == (partition == "test")]
    if name == "things-eeg2-ubp":
        labels = own["concept"].rank(method="dense").astype(int) - 1
        texts = [f"This is a {concept.replace('_', ' ')}." for concept in own["concept"]]
        return [
            write_ubp(
                job.root, subject, partition, epochs, images=own["path"].tolist(), labels=labels.tolist(), texts=texts,
                sessions=sessions, ch_names=ch_names,
            )
        ]  # fmt: skip
    n_concepts = own["concept"].nunique()
    shape = (n_concepts, n_images // n_concepts, n_repetitions)
    return write_neurobridge(job.root, subject, partition, epochs, shape=shape, ch_names=ch_names)


def _fill_session(
    layout: EpochLayout,
    job: PhantomJob,
    person: Person,
    design: SessionDesign,
    spools: dict[Partition, np.ndarray],
    progress: Progress,
) -> dict[Partition, list[int]]:
    """Record one session, write its epochs to their positions, whiten them there, and return these positions."""
    rate = layout.sfreq * layout.decim
    system = make_sensor_system_at("eeg63", rate)
    picked = [system.ch_names.index(name) for name in layout.ch_names]
    taps = make_lowpass(rate, layout.cutoff_hz, layout.decim) if layout.cutoff_hz else None
    n_baseline = round(N_BASELINE_S * layout.sfreq)
    slots: dict[Partition, list[int]] = {partition: [] for partition in PARTITIONS}
    parts: dict[Partition, PartitionDesign] = {"training": design.training, "test": design.test}
    for partition, part in parts.items():
        repetitions = job.size.train_repetitions if partition == "training" else job.size.test_repetitions
        recordings = things_eeg2_format.simulate_recordings(
            job, person, system, partition, design.session, part
        )
        for events, samples in recordings:
            shown = events[~events["is_target"]]
            onsets = np.round(shown["onset"].to_numpy() * rate).astype(int)
            blocks = (block[picked] for block in progress.watch_samples(samples, system.sfreq))
            epochs = cut_epochs(
                blocks, onsets - n_baseline * layout.decim, layout.n_times, decim=layout.decim, taps=taps
            )
            # The authors' position of a trial: by image, then by repetition, not by the order of presentation.
            places = (shown["condition"] * repetitions + shown["repetition"]).to_numpy()
            for place, epoch in zip(places.tolist(), epochs, strict=True):
                epoch = epoch - epoch[:, :n_baseline].mean(axis=1, keepdims=True)
                spools[partition][place] = epoch * 1e6  # microvolt: float32 keeps its digits either way
                slots[partition].append(place)
    covariances = []
    for partition in layout.whitened_by:
        n = job.size.train_repetitions if partition == "training" else job.size.test_repetitions
        rows = np.sort(slots[partition])
        images = (
            spools[partition][same, :, layout.n_dropped :]
            for same in np.split(rows, np.flatnonzero(np.diff(rows // n)) + 1)
        )
        covariances.append(average_noise_covariance(images, over_repetitions=layout.over_repetitions))
    # Symmetric inverse square root [3]_; the two partitions of the official files have equal weight.
    values, vectors = np.linalg.eigh(np.mean(covariances, axis=0))
    whitener = ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32)
    for partition, places_of in slots.items():
        for start in range(0, len(places_of), _CHUNK):
            chunk = np.sort(places_of[start : start + _CHUNK])
            spools[partition][chunk] = whitener @ spools[partition][chunk]
    return slots


def average_noise_covariance(images: Iterable[np.ndarray], *, over_repetitions: bool) -> np.ndarray:
    """Return the shrunk noise covariance of channels, averaged within images and then over them.

    Parameters
    ----------
    images : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image.
    over_repetitions
        Whether the covariance is of each time over repetitions; otherwise of each repetition over times.

    Returns
    -------
    covariance : float64 array of shape (n_channels, n_channels)
    """
    total, n_images = 0.0, 0
    for image in images:
        # (sets, samples, channels): a set is a time or a repetition
        sets = np.asarray(image, dtype=np.float64).transpose((2, 0, 1) if over_repetitions else (0, 2, 1))
        total = total + _shrink(sets).mean(axis=0)
        n_images += 1
    return np.asarray(total / n_images)


def _shrink(sets: np.ndarray) -> np.ndarray:
    """Return the covariance of each set, (n_sets, n_samples, n_channels), shrunk on standardised channels.

    As in scikit-learn's discriminant analysis with ``shrinkage="auto"``, which the published scripts use.
    """
    n, p = sets.shape[1:]
    deviation = sets.std(axis=1, keepdims=True)  # (set, 1, channel)
    deviation[deviation == 0] = 1
    z = (sets - sets.mean(axis=1, keepdims=True)) / deviation
    covariance = z.transpose(0, 2, 1) @ z / n
    trace = np.trace(covariance, axis1=1, axis2=2) / p
    squares = np.square(covariance).sum(axis=(1, 2))
    # Ledoit and Wolf (2004): uncertainty of the covariance, relative to its distance from the identity
    uncertain = (np.square(np.square(z).sum(axis=2)).sum(axis=1) / n - squares) / (p * n)
    distance = (squares - p * trace**2) / p
    weight = np.minimum(uncertain, distance) / np.where(distance > 0, distance, 1)
    weight = np.where(distance > 0, weight, 0)[:, None, None]
    shrunk = (1 - weight) * covariance + weight * trace[:, None, None] * np.eye(p)
    return deviation.transpose(0, 2, 1) * shrunk * deviation


def _make_format(name: str, description: str) -> Format:
    return replace(
        things_eeg2_format.FORMAT,
        name=name,
        description=description,
        count=lambda size: count(name, size),
        plan=lambda job: plan(name, job),
    )


def _write_dictionary(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    n_images: int,
    n_repetitions: int,
    ch_names: Sequence[str],
    n_times: int,
    times: np.ndarray,
    container: Container,
    protocol: int,
) -> Path:
    """Write ``sub-XX/preprocessed_eeg_{training,test}.npy``: a dictionary of epochs, channels and times.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, in the order of the codes.
    times
        In s; the 250 Hz files have 300 from -0.2 s, though their data have 250 samples from 0 s.
    container, protocol
        As in `split_pickle`.
    """
    check_option("partition", partition, PARTITIONS)
    array = PendingArray((n_images, n_repetitions, len(ch_names), n_times), np.dtype("<f8"))
    content = {
        "preprocessed_eeg_data": array,
        "ch_names": list(map(str, ch_names)),
        "times": np.asarray(times, dtype="<f8"),
    }
    path = directory / f"sub-{subject:02d}" / f"preprocessed_eeg_{partition}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        parts = split_pickle(content, container=container, protocol=protocol)
        _write_parts(file, parts, array, epochs, what=path.name)
    return path


write_official = partial(_write_dictionary, n_times=100, times=OFFICIAL_TIMES, container="npy", protocol=3)
"""Write the authors' files: `numpy.save` of a dictionary."""
write_250hz = partial(_write_dictionary, n_times=250, times=TIMES_300, container="pickle", protocol=4)
"""Write the files of NICE and ATM: a pickle named ``.npy``."""


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
) -> Path:
    """Write ``Preprocessed_data_250Hz_whiten/sub-XX/{train,test}.pt``: a dictionary in the zip of `torch.save`.

    The numbers become float16. Only ``torch.load(..., weights_only=False)`` reads it.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, 0 to 1 s.
    images, labels, texts
        Path, class and caption of each image, in the order of the epochs.
    sessions : array of shape (n_images, n_repetitions)
        From 0.
    """
    check_option("partition", partition, PARTITIONS)
    n_images, n_repetitions = np.shape(sessions)
    array = PendingArray((n_images, n_repetitions, len(ch_names), 250), np.dtype("<f2"))

    def repeat(values: np.ndarray) -> np.ndarray:
        return np.tile(
            values[:, None], (1, n_repetitions)
        )  # what names an image is given for each repetition

    content = {
        "eeg": array,
        "label": repeat(np.asarray(labels, "<i8")),
        "img": repeat(np.asarray(images)),
        "text": repeat(np.asarray(texts)),
        "session": np.asarray(sessions, "<f8"),
        "ch_names": list(map(str, ch_names)),
        "times": TIMES_300,
    }
    parts = split_pickle(content, container="pickle", protocol=4)
    name = "train" if partition == "training" else "test"
    path = directory / "Preprocessed_data_250Hz_whiten" / f"sub-{subject:02d}" / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # Entries have a fixed date, so the same epochs give the same bytes.
        with archive.open(zipfile.ZipInfo(f"{name}/data.pkl"), "w", force_zip64=True) as file:
            _write_parts(file, parts, array, epochs, what=path.name)
        for entry, text in (("byteorder", "little"), ("version", "3\n")):
            archive.writestr(zipfile.ZipInfo(f"{name}/{entry}"), text)
    return path


def write_neurobridge(
    directory: Path,
    subject: int,
    partition: Partition,
    epochs: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    ch_names: Sequence[str],
    n_times: int = 250,
) -> list[Path]:
    """Write ``preprocessed_eeg/sub-XX/{train,test}.npy``, a plain float32 array, and ``info.json`` beside it.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_repetitions, n_channels, n_times)
        One per image, 0 to 1 s, concept by concept.
    shape
        Concepts, images of each, and repetitions.
    """
    check_option("partition", partition, PARTITIONS)
    folder = directory / "preprocessed_eeg" / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("train.npy" if partition == "training" else "test.npy")
    n_images = shape[0] * shape[1]
    with replace_atomically(path) as temporary:
        whole = (*shape, len(ch_names), n_times)
        array = np.lib.format.open_memmap(temporary, "w+", np.dtype("<f4"), whole)
        flat, count = array.reshape(n_images, *whole[2:]), 0
        for epoch in epochs:
            row = check_block(epoch, whole[2:], what=f"the epochs of {path.name}")
            if count < n_images:
                flat[count] = row
            count += 1
        check_count(count, n_images, what=path.name, unit="images")
        array.flush()
        del array, flat
    times = (np.arange(n_times) / 250).tolist()
    info = {"ch_names": list(ch_names), "times": times, "sfreq": 250.0, "baseline_duration": 0.2}
    return [path, write_text(folder / "info.json", json.dumps(info))]


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


# Decimation by 2 needs a low-pass below 50 Hz; at 250 Hz the simulation runs at the final rate already. In the
# published 250 Hz files the 50 baseline samples are missing, but `times` still counts them.
LAYOUTS = {
    "things-eeg2-official": EpochLayout(100.0, 2, 45.0, POSTERIOR17, 100, 0, PARTITIONS, True, "<f8"),
    "things-eeg2-250hz": EpochLayout(250.0, 1, 0.0, ALL63, 300, 50, ("training",), False, "<f8"),
    "things-eeg2-ubp": EpochLayout(250.0, 1, 0.0, ALL63, 300, 50, ("training",), False, "<f2"),
    "things-eeg2-neurobridge": EpochLayout(250.0, 1, 0.0, ALL63, 300, 50, ("training",), False, "<f4"),
}


OFFICIAL = _make_format(
    "things-eeg2-official", "THINGS-EEG2 epochs of its authors: 17 posterior channels, 100 Hz, whitened"
)
AT_250HZ = _make_format(
    "things-eeg2-250hz", "THINGS-EEG2 epochs as NICE and ATM ship them: 63 channels, 250 Hz, whitened"
)
UBP = _make_format(
    "things-eeg2-ubp", "THINGS-EEG2 epochs as UBP ships them: .pt archives, 63 channels, 250 Hz, whitened"
)
NEUROBRIDGE = _make_format(
    "things-eeg2-neurobridge",
    "THINGS-EEG2 epochs as NeuroBridge ships them: plain arrays, 63 channels, 250 Hz",
)
