"""Noise ceilings: how well the responses to the test images could be predicted at best.

Owns the ceiling of one metric: the Pearson correlation, over test images, between any prediction of a feature's
response (that of an encoding model, or of a brain model shown a reconstruction) and the response measured. It does
not bound retrieval, identification or image metrics, which pool many features and have no ceiling in closed form.
`compute_noise_ceilings` gives it per voxel, parcel or channel of a matrix of trials; `write_epochs_ceilings` per
channel and time of EEG and MEG, and keeps it beside the trials in the store.

The ceiling describes test trials, so it may be looked at only after everything is chosen; choosing features by it
would be choosing by the test set (`braindecode_vis.preprocessing.selection` uses training trials instead).

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x: explainable variance from the signal-to-noise ratio.
Spearman (1910), doi:10.1111/j.2044-8295.1910.tb00206.x; Brown (1910), doi:10.1111/j.2044-8295.1910.tb00207.x:
reliability of the whole from that of its halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.preprocessing.reliability import compute_ncsnr, compute_split_half
from braindecode_vis.preprocessing.voxel_geometry import read_geometry

if TYPE_CHECKING:
    import pandas as pd

#: The one metric that these ceilings bound.
METRIC = "response correlation"
ARRAY, TABLE = "noise_ceiling.npy", "noise_ceiling.json"
N_HALVES = 10
MAX_IMAGES = 500
_FEWEST_IMAGES = 3  # a correlation over two images is always plus or minus one
_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class ResponseCeiling:
    """Ceiling of the correlation between predicted and measured responses of one subject.

    Parameters
    ----------
    subject
        Whose.
    per_feature : array of shape (n_features,)
        Highest expected correlation of each voxel, parcel or channel over the test images.
    source
        How it was estimated, in words.
    n_images
        Images that the estimate rests on; 0 for a published map.
    n_averaged
        Repetitions that are averaged in a measured response (harmonic mean over images).
    metric
        What is bounded.
    """

    subject: str
    per_feature: np.ndarray
    source: str
    n_images: int
    n_averaged: float
    metric: str = METRIC

    @property
    def value(self) -> float:
        """Mean over features, to stand beside a score that is the mean over the same features."""
        return float(self.per_feature.mean())


def compute_noise_ceilings(
    responses: Responses,
    rows: np.ndarray | None = None,
    *,
    averaged: bool = True,
    measure: Literal["ncsnr", "split_half", "published"] = "ncsnr",
    seed: int = 0,
) -> list[ResponseCeiling]:
    """Return the ceiling of every subject from repeated test images.

    Parameters
    ----------
    responses
        Single trials as the store holds them, dims ``trial`` and one more; padded rows of several subjects are cut to
        their own voxels.
    rows
        Test trials of the fold, numbers or a boolean mask; by default those whose `split` is ``test``.
    averaged
        Whether the scores are computed on means over the repetitions of an image, or on single trials.
    measure
        ``ncsnr``: from the variance within and between images. ``split_half``: from the correlation of halves,
        carried to the number of repetitions by the Spearman-Brown formula. ``published``: from the map ``ncsnr`` that
        came with the data set, which its authors computed from all repeated images.
    seed
        Of the split halves.

    Raises
    ------
    DataError
        If no test image is repeated, there is a time axis, or no map was published.
    """
    if responses.data.ndim != 2:
        raise DataError(f"a noise ceiling needs the dims trial and one more, not {responses.dims}.")
    chosen = (responses.trials["split"] == "test").to_numpy() if rows is None else np.asarray(rows)
    index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
    if not len(index):
        raise DataError("there are no test trials to compute a noise ceiling from.")
    subjects = responses.trials["subject"].astype(str).to_numpy()[index]
    ceilings = []
    for subject in dict.fromkeys(subjects.tolist()):
        own = _pick(responses, index[subjects == subject], count_own_voxels(responses).get(subject))
        counts = _count_showings(own)
        # Noise variances average, so the mean number of repetitions is the harmonic one.
        n_averaged = float(1 / np.mean(1 / counts)) if averaged else 1.0
        if measure == "published":
            ceiling, n_images, source = _read_published(responses, subject, n_averaged)
        else:
            ceiling, n_images, source = _estimate(own, measure, n_averaged, seed)
        ceilings.append(ResponseCeiling(subject, ceiling, source, n_images, n_averaged))
    return ceilings


def _pick(responses: Responses, rows: np.ndarray, n_own: int | None) -> Responses:
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    if "task" in trials:  # what was seen is another response than what was imagined
        trials = trials.assign(stimulus_id=trials["stimulus_id"] + "\x1f" + trials["task"].astype(str))
    data = np.asarray(responses.data[rows])[:, :n_own]
    return Responses.from_checked(data, ("trial", "voxel"), trials, responses.unit, {})


def _count_showings(own: Responses) -> np.ndarray:
    return own.trials.groupby("stimulus_id").size().to_numpy()


def _estimate(own: Responses, measure: str, n_averaged: float, seed: int) -> tuple[np.ndarray, int, str]:
    if measure == "ncsnr":
        found = compute_ncsnr(own)
        source = f"ncsnr of {found.n_images} repeated test images"
        return np.sqrt(_explainable(found.ncsnr, n_averaged)), found.n_images, source
    halves = compute_split_half(own, seed=seed)
    counts = _count_showings(own)
    n_repeated = float(counts[counts > 1].mean())
    whole = np.clip(halves.reliability, 0, 1)
    # Spearman-Brown backwards to one trial, and forwards to as many as a measured response averages.
    single = whole / np.maximum(n_repeated - (n_repeated - 1) * whole, 1e-12)
    reliability = n_averaged * single / (1 + (n_averaged - 1) * single)
    source = f"{halves.n_splits} random halves of the repetitions of {halves.n_images} test images"
    return np.sqrt(reliability), halves.n_images, source


def _explainable(ncsnr: np.ndarray, n_averaged: float) -> np.ndarray:
    """Return the share of variance that is signal when repetitions are averaged, in 0..1."""
    return ncsnr**2 / (ncsnr**2 + 1 / n_averaged)


def _read_published(responses: Responses, subject: str, n_averaged: float) -> tuple[np.ndarray, int, str]:
    several = bool(responses.coords.get("subjects"))
    geometry = read_geometry(responses, subject if several else None)
    if "ncsnr" not in geometry.maps or geometry.parcels is not None:
        raise DataError(
            "these responses carry no published map ncsnr of their features; estimate the ceiling with ncsnr or "
            "split_half."
        )
    published = np.asarray(geometry.maps["ncsnr"], np.float64)
    return np.sqrt(_explainable(published, n_averaged)), 0, "ncsnr as published"


@dataclass(frozen=True)
class EpochsCeiling:
    """The ceiling of one subject and split.

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


def compute_epochs_ceiling(
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
            # The ranks of random numbers: (n_halves, n_repetitions), half of them below the middle.
            first = np.argsort(rng.random((n_halves, len(rows))), axis=1) < len(rows) // 2
            for side, member in enumerate((first, ~first)):
                weights = member / member.sum(axis=1, keepdims=True)
                halves[side, number] = weights.astype(np.float32) @ trials
        a, b = halves
        for row, product in enumerate((a, b)):
            sums[row] += product.sum(axis=0, dtype=np.float64)
        for row, (left, right) in enumerate(((a, a), (b, b), (a, b)), start=2):
            sums[row] += np.einsum("ihf,ihf->hf", left, right)
    mean_a, mean_b, square_a, square_b, both = sums / len(images)  # each (n_halves, n_features)
    spread = (square_a - mean_a**2) * (square_b - mean_b**2)
    r = (both - mean_a * mean_b) / np.sqrt(np.where(spread > 0, spread, np.inf))
    # The mean over divisions first: Spearman-Brown is not linear, and single divisions are noisy.
    mean = r.mean(axis=0)
    reliability = 2 * mean / (1 + np.maximum(mean, -0.99))
    return np.sqrt(np.clip(reliability, 0, 1)).reshape(shape)


# --- beside the trials ------------------------------------------------------------------------------------


def write_epochs_ceilings(folder: Path, trials: pd.DataFrame, shape: tuple[int, ...]) -> None:
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


def read_epochs_ceiling(folder: Path, *, subject: str | None = None, split: str = "test") -> EpochsCeiling:
    """Read the ceiling of one subject and split from the ``responses`` folder of a store.

    Parameters
    ----------
    folder
        Holds ``data.npy`` and ``noise_ceiling.npy``.
    subject
        May be left out where there is one subject only.

    Raises
    ------
    DataError
        If there is none, because no image was repeated, or the subject is unknown.
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
    return EpochsCeiling(
        ceiling, record["subject"], record["split"], record["n_images"], record["n_repetitions"]
    )
