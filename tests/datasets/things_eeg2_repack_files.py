"""THINGS-EEG2 as UBP and NeuroBridge repack it: small files of their forms, for the readers.

UBP: Wu et al. (2025), arXiv:2503.04207. NeuroBridge ships plain arrays.
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from braindecode_vis.phantom.formats.pickles import split_pickle


def write_ubp(
    directory: Path, subject: int, partition: str, epochs, *, images, labels, texts, sessions, ch_names
) -> Path:
    """``Preprocessed_data_250Hz_whiten/sub-XX/{train,test}.pt``: a dictionary of arrays in the zip of `torch.save`.

    `epochs` has the shape (n_images, n_repetitions, n_channels, n_times) and becomes float16; what names an image is
    repeated for its repetitions. Only ``torch.load(..., weights_only=False)`` reads it.
    """
    n_repetitions = np.shape(sessions)[1]

    def repeat(values):
        return np.tile(np.asarray(values)[:, None], (1, n_repetitions))

    content = {
        "eeg": np.asarray(epochs, "<f2"),
        "label": repeat(np.asarray(labels, "<i8")),
        "img": repeat(images),
        "text": repeat(texts),
        "session": np.asarray(sessions, "<f8"),
        "ch_names": list(map(str, ch_names)),
        # Fifty samples of baseline were dropped from the data, not from the times.
        "times": np.round(np.arange(300) / 250 - 0.2, 3),
    }
    name = "train" if partition == "training" else "test"
    folder = directory / "Preprocessed_data_250Hz_whiten" / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data.pkl", b"".join(split_pickle(content, container="pickle", protocol=4)))
        archive.writestr(f"{name}/byteorder", "little")
        archive.writestr(f"{name}/version", "3\n")
    return path


def write_neurobridge(directory: Path, subject: int, partition: str, epochs: np.ndarray, *, ch_names) -> Path:
    """``preprocessed_eeg/sub-XX/{train,test}.npy``, a plain array, and ``info.json`` beside it.

    `epochs` has the shape (n_concepts, n_exemplars, n_repetitions, n_channels, n_times).
    """
    folder = directory / "preprocessed_eeg" / f"sub-{subject:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{'train' if partition == 'training' else 'test'}.npy"
    np.save(path, np.asarray(epochs, "<f4"))
    times = (np.arange(epochs.shape[-1]) / 250).tolist()
    info = {"ch_names": list(ch_names), "times": times, "sfreq": 250.0, "baseline_duration": 0.2}
    (folder / "info.json").write_text(json.dumps(info))
    return path
