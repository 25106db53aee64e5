"""Noise ceiling of EEG and MEG: how far repetitions of an image agree, per channel and time.

Owns the split-half estimate and its place beside the trials in the store. A ceiling describes the recording; nothing is
fitted or selected with that of the test trials.

References
----------
Spearman (1910), doi:10.1111/j.2044-8295.1910.tb00206.x; Brown (1910), doi:10.1111/j.2044-8295.1910.tb00207.x:
reliability of the whole from that of its halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Responses
from braindecode_vis.checks import DataError
from braindecode_vis.seeds import make_generator
from braindecode_vis.store import read_json, write_json

ARRAY, TABLE = "noise_ceiling.npy", "noise_ceiling.json"
N_HALVES = 10
MAX_IMAGES = 500
_FEWEST_IMAGES = 3
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class NoiseCeiling:
    """The ceiling of one person and split.

    Parameters
    ----------
    ceiling : float32 array of shape (n_channels, n_times)
        Largest correlation over images that any prediction can have with the averaged responses.
    subject, split
        Whose trials it is of.
    n_images, n_repetitions
        How many images were looked at, and the median number of their repetitions.
    """

    ceiling: np.ndarray
    subject: str
    split: str
    n_images: int
    n_repetitions: int


def compute_noise_ceiling(
    responses: Responses, *, n_halves: int = 20, seed: int = 0, max_images: int | None = None
) -> np.ndarray:
    """Return how well a perfect model could correlate with the averaged responses, per channel and time.

    The repetitions of each image are dealt into two random halves. The correlation of the two averages over images is
    brought to the full number of repetitions (Spearman-Brown), and its square root bounds the correlation of any
    prediction with the average. Negative reliabilities count as zero. Images are visited in blocks, so that memory
    does not grow with their number.

    Parameters
    ----------
    responses : Responses of dims (trial, channel, time)
        Of one subject, at least two repetitions per image; images with one are left out.
    n_halves
        Number of random divisions.
    max_images
        At most this many, evenly spaced ones are looked at; all by default.

    Returns
    -------
    ceiling : float array of shape (n_channels, n_times)
        Between 0 and 1.
    """
    rows = find_repeated(responses.trials, np.arange(responses.n_trials), max_images)
    if len(rows) < _FEWEST_IMAGES:
        raise DataError(
            f"a noise ceiling needs three or more images with repetitions, but there are {len(rows)}."
        )
    return _correlate_halves(responses.data, rows, n_halves, seed)


def find_repeated(trials: pd.DataFrame, rows: np.ndarray, max_images: int | None) -> list[np.ndarray]:
    """Return the rows of each image that was shown twice or more, among `rows`."""
    groups = trials.iloc[rows].groupby("stimulus_id", sort=False).indices.values()
    repeated = [np.sort(rows[np.asarray(members)]) for members in groups if len(members) > 1]
    if max_images is None or len(repeated) <= max_images:
        return repeated
    return [repeated[i] for i in np.linspace(0, len(repeated) - 1, max_images).astype(int)]


def _correlate_halves(data: np.ndarray, images: list[np.ndarray], n_halves: int, seed: int) -> np.ndarray:
    rng = make_generator(seed, "noise-ceiling")
    shape = data.shape[1:]
    n_features = int(np.prod(shape))
    # Sums over images of both halves and their products, from the first image on so that few digits are lost.
    sums = np.zeros((5, n_halves, n_features))
    origin: np.ndarray | None = None
    size = max(1, _BLOCK_BYTES // (8 * n_halves * n_features))
    for start in range(0, len(images), size):
        block = images[start : start + size]
        halves = np.empty((2, len(block), n_halves, n_features), dtype=np.float32)
        for number, rows in enumerate(block):
            trials = np.asarray(data[rows], dtype=np.float32).reshape(len(rows), -1)
            origin = trials.mean(axis=0) if origin is None else origin
            trials = trials - origin
            first = np.argsort(rng.random((n_halves, len(rows))), axis=1) < len(rows) // 2
            for side, member in enumerate((first, ~first)):
                weights = member / member.sum(axis=1, keepdims=True)
                halves[side, number] = weights.astype(np.float32) @ trials
        a, b = halves
        for row, product in enumerate((a, b)):
            sums[row] += product.sum(axis=0, dtype=np.float64)
        for row, (left, right) in enumerate(((a, a), (b, b), (a, b)), start=2):
            sums[row] += np.einsum("ihf,ihf->hf", left, right)
    mean_a, mean_b, square_a, square_b, both = sums / len(images)
    spread = (square_a - mean_a**2) * (square_b - mean_b**2)
    r = (both - mean_a * mean_b) / np.sqrt(np.where(spread > 0, spread, np.inf))
    mean = r.mean(axis=0)
    reliability = 2 * mean / (1 + np.maximum(mean, -0.99))
    return np.sqrt(np.clip(reliability, 0, 1)).reshape(shape)


# --- beside the trials ------------------------------------------------------------------------------------


def write_noise_ceiling(folder: Path, trials: pd.DataFrame, shape: tuple[int, ...]) -> None:
    """Compute the ceiling of every subject and split with repetitions, and write it beside ``data.npy``.

    Of each, at most 500 evenly spaced images and 10 random divisions are looked at. Without repetitions nothing is
    written.
    """
    data = np.load(folder / "data.npy", mmap_mode="r", allow_pickle=False)
    found, records = [], []
    for subject, split in trials[["subject", "split"]].drop_duplicates().itertuples(index=False):
        rows = np.flatnonzero(((trials["subject"] == subject) & (trials["split"] == split)).to_numpy())
        images = find_repeated(trials, rows, MAX_IMAGES)
        if len(images) < _FEWEST_IMAGES:
            continue
        found.append(_correlate_halves(data, images, N_HALVES, 0).astype(np.float32))
        records.append(
            {
                "subject": str(subject), "split": str(split), "n_images": len(images),
                "n_repetitions": int(np.median([len(members) for members in images])), "n_halves": N_HALVES,
            }
        )  # fmt: skip
    if found:
        np.save(folder / ARRAY, np.stack(found), allow_pickle=False)
        write_json(
            folder / TABLE, {"dims": ["entry", *("channel", "time")[: len(shape) - 1]], "entries": records}
        )


def read_noise_ceiling(folder: Path, *, subject: str | None = None, split: str = "test") -> NoiseCeiling:
    """Read the ceiling of one person and split from the ``responses`` folder of a store.

    Parameters
    ----------
    folder
        Holds ``data.npy`` and ``noise_ceiling.npy``.
    subject
        May be left out where there is one person only.

    Raises
    ------
    DataError
        If there is none, because no image was repeated, or the person is unknown.
    """
    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no noise ceiling: fewer than three images are repeated, or it is of an older "
            "version."
        )
    records: list[dict[str, Any]] = read_json(folder / TABLE)["entries"]
    hits = [row for row, r in enumerate(records) if r["split"] == split and subject in (None, r["subject"])]
    if len(hits) != 1:
        there = ", ".join(f"subject {r['subject']} {r['split']}" for r in records)
        wanted = f"the {split} trials of {'a subject' if subject is None else f'subject {subject}'}"
        raise DataError(
            f"{folder} has {len(hits)} noise ceilings of {wanted}; it has those of {there}: name one of them."
        )
    record = records[hits[0]]
    ceiling = np.array(np.load(folder / ARRAY, mmap_mode="r", allow_pickle=False)[hits[0]])
    return NoiseCeiling(
        ceiling, record["subject"], record["split"], record["n_images"], record["n_repetitions"]
    )
