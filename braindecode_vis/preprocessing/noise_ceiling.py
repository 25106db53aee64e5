"""Noise ceilings: the best possible prediction of the responses to the test images.

Computes the ceiling of one metric: the Pearson correlation, over test images, between a prediction of a feature's
response (by an encoding model, or by a brain model from a reconstruction) and the measured response. It is not a limit
for retrieval, identification or image metrics, which combine many features and have no ceiling in closed form.
`compute_noise_ceilings` gives it per voxel, parcel, or channel and time; `write_epochs_ceilings` keeps that of EEG and
MEG beside the trials in the store.

The signal share of each feature is averaged unclipped, and the root is taken last: a mean of clipped values, or of
roots, is above 0 even for pure noise. It is a limit of the root mean square correlation; that of the mean correlation
is up to 0.06 lower. Repetitions within one run share noise, which these ceilings cannot distinguish from signal.

The ceiling describes test trials, so use it only after all choices are made; a choice of features by the ceiling would
be a choice by the test set (`braindecode_vis.preprocessing.selection` uses training trials instead).

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x: explainable variance from the signal-to-noise ratio. Pospisil &
Bair (2021), doi:10.1371/journal.pcbi.1009212: unbiased estimates of it.
Spearman (1910), doi:10.1111/j.2044-8295.1910.tb00206.x; Brown (1910), doi:10.1111/j.2044-8295.1910.tb00207.x:
reliability of the whole from that of its halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.preprocessing.reliability import compute_signal_share, compute_split_half
from braindecode_vis.preprocessing.voxel_geometry import read_geometry

if TYPE_CHECKING:
    import pandas as pd

#: The one metric that these ceilings bound.
METRIC = "response correlation"
ARRAY, TABLE = "signal_share.npz", "signal_share.json"  # other names than those of earlier, clipped ceilings
MAX_IMAGES = 500
CeilingMeasure = Literal["ncsnr", "split_half", "published"]


@dataclass(frozen=True)
class ResponseCeiling:
    """Ceiling of the correlation between predicted and measured responses of one subject.

    Parameters
    ----------
    subject
        Name of the subject.
    share : array of shape (n_features,)
        Share of the variance of each voxel, parcel, or channel and time over the test images that is signal, not
        clipped: noise alone gives values about 0.
    low, high
        95 % jackknife interval over images of the mean share, not clipped; NaN where it is not known.
    source
        How it was estimated, in words.
    n_images
        Number of images in the estimate; 0 for a published map.
    n_averaged
        Number of repetitions averaged in a measured response (harmonic mean over images).
    bounds
        95 % interval of the share of each feature, not clipped, if it is known.
    metric
        The metric that the ceiling limits.
    """

    subject: str
    share: np.ndarray
    low: float
    high: float
    source: str
    n_images: int
    n_averaged: float
    bounds: tuple[np.ndarray, np.ndarray] | None = None
    metric: str = METRIC

    @property
    def per_feature(self) -> np.ndarray:
        """Highest expected correlation of each feature, 0 if its share is not above 0."""
        return find_root(self.share)

    @property
    def value(self) -> float:
        """Ceiling over all features, for comparison with a score that is the mean over the same features."""
        return self.bound()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `value`."""
        return float(find_root(self.low)), float(find_root(self.high))

    def bound(self, features: np.ndarray | slice = slice(None)) -> float:
        """Return the ceiling over some features: the root of their mean share."""
        return float(find_root(self.share[features].mean()))


def find_root(share: np.ndarray | float) -> np.ndarray:
    """Return the correlation that a share of variance allows, in 0..1; NaN stays.

    Examples
    --------
    >>> find_root(np.array([-0.1, 0.25, 1.2])).tolist()
    [0.0, 0.5, 1.0]
    """
    return np.asarray(np.sqrt(np.clip(share, 0.0, 1.0)))


def describe_ceiling(ceiling: ResponseCeiling) -> str:
    """Return the ceiling with its interval, in words."""
    low, high = ceiling.interval
    return f"{ceiling.value:.3f}" + ("" if np.isnan(low) else f" ({low:.3f} to {high:.3f})")


def compute_noise_ceilings(
    responses: Responses,
    rows: np.ndarray | None = None,
    *,
    averaged: bool = True,
    measure: CeilingMeasure = "ncsnr",
    seed: int = 0,
) -> list[ResponseCeiling]:
    """Return the ceiling of every subject from repeated test images.

    Parameters
    ----------
    responses
        Single trials as the store holds them; padded rows of several subjects are cut to their own voxels. Channels at
        a time are features, in the order of the flattened trial.
    rows
        Test trials of the fold, numbers or a boolean mask; by default those whose `split` is ``test``.
    averaged
        Whether the scores are computed on means over the repetitions of an image, or on single trials.
    measure
        ``ncsnr``: from the variance within and between images, unbiased, with an interval. ``split_half``: from the
        correlation of halves, carried to the number of repetitions by the Spearman-Brown formula. ``published``: from
        the map ``ncsnr`` that came with the data set, which its authors computed from all repeated images.
    seed
        Of the split halves.

    Raises
    ------
    DataError
        If too few test images are repeated, or no map was published.
    """
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
            published = _read_published(responses, subject, n_averaged)
            found = ResponseCeiling(subject, published, np.nan, np.nan, "ncsnr as published", 0, n_averaged)
        elif measure == "split_half":
            found = _correlate_halves(own, subject, n_averaged, seed)
        else:
            found = _estimate_share(own, subject, n_averaged)
        ceilings.append(found)
    return ceilings


def _pick(responses: Responses, rows: np.ndarray, n_own: int | None) -> Responses:
    trials = responses.trials.iloc[rows].reset_index(drop=True)
    if "task" in trials:  # what was seen is another response than what was imagined
        trials = trials.assign(stimulus_id=trials["stimulus_id"] + "\x1f" + trials["task"].astype(str))
    data = np.asarray(responses.data[rows])[:, :n_own].reshape(len(rows), -1)
    return Responses.from_checked(data, ("trial", "voxel"), trials, responses.unit, {})


def _count_showings(own: Responses) -> np.ndarray:
    return own.trials.groupby("stimulus_id").size().to_numpy()


def _estimate_share(own: Responses, subject: str, n_averaged: float) -> ResponseCeiling:
    found = compute_signal_share(own, n_averaged=n_averaged)
    ((low,), (high,)) = found.bound_mean()
    source = f"variance within and between {found.n_images} repeated test images"
    return ResponseCeiling(
        subject,
        found.share,
        float(low),
        float(high),
        source,
        found.n_images,
        n_averaged,
        found.bound_features(),
    )


def _correlate_halves(own: Responses, subject: str, n_averaged: float, seed: int) -> ResponseCeiling:
    halves = compute_split_half(own, seed=seed)
    counts = _count_showings(own)
    n_repeated = float(counts[counts > 1].mean())
    # Spearman-Brown backwards to one trial, and forwards to as many as a measured response averages.
    whole = np.minimum(halves.reliability, 1)
    single = whole / np.maximum(n_repeated - (n_repeated - 1) * whole, 1e-12)
    share = n_averaged * single / (1 + (n_averaged - 1) * single)
    source = f"{halves.n_splits} random halves of the repetitions of {halves.n_images} test images"
    return ResponseCeiling(subject, share, np.nan, np.nan, source, halves.n_images, n_averaged)


def _read_published(responses: Responses, subject: str, n_averaged: float) -> np.ndarray:
    several = bool(responses.coords.get("subjects"))
    geometry = read_geometry(responses, subject if several else None)
    if "ncsnr" not in geometry.maps or geometry.parcels is not None:
        raise DataError(
            "these responses have no published map ncsnr of their features; estimate the ceiling with ncsnr or "
            "split_half."
        )
    ncsnr = np.asarray(geometry.maps["ncsnr"], np.float64)
    return ncsnr**2 / (ncsnr**2 + 1 / n_averaged)  # share of signal in the variance of a mean


@dataclass(frozen=True)
class EpochsCeiling:
    """The ceiling of one subject and split.

    Parameters
    ----------
    share : float32 array of shape (n_channels, n_times)
        Share of the variance of the averaged responses over images that is signal, not clipped.
    low, high : float32 arrays of shape (n_times,)
        95 % jackknife interval over images of its mean over channels; NaN for fewer than five images.
    subject, split
        Subject and split of the trials.
    n_images, n_repetitions
        Number of images used, and the harmonic mean number of their repetitions.
    """

    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    subject: str
    split: str
    n_images: int
    n_repetitions: float

    @property
    def ceiling(self) -> np.ndarray:
        """Largest correlation over images that any prediction can have, shape (n_channels, n_times)."""
        return find_root(self.share)

    @property
    def mean(self) -> np.ndarray:
        """Ceiling over all channels: the root of their mean share, shape (n_times,)."""
        return find_root(self.share.mean(axis=0))


def compute_epochs_ceiling(
    responses: Responses, rows: np.ndarray | None = None, *, max_images: int | None = None
) -> EpochsCeiling:
    """Return how well a perfect model could correlate with the averaged responses, per channel and time.

    Parameters
    ----------
    responses : Responses of dims (trial, channel, time)
        At least two repetitions per image; images with one are left out.
    rows
        Trials of one subject and split; all by default.
    max_images
        Largest number of images to use, evenly spaced; by default all.

    Raises
    ------
    DataError
        If fewer than four images are repeated.
    """
    index = np.arange(responses.n_trials) if rows is None else rows
    repeated = find_repeated(responses.trials, index, max_images)
    chosen = np.sort(np.concatenate(repeated)) if repeated else index
    n_channels, n_times = responses.data.shape[1:]
    found = compute_signal_share(responses, chosen, over=np.tile(np.arange(n_times), n_channels))
    low, high = (bound.astype(np.float32) for bound in found.bound_mean())
    share = found.share.reshape(n_channels, n_times).astype(np.float32)
    first = responses.trials.iloc[chosen[0]]
    return EpochsCeiling(
        share, low, high, str(first["subject"]), str(first["split"]), found.n_images, found.n_repetitions
    )


def find_repeated(trials: pd.DataFrame, rows: np.ndarray, max_images: int | None) -> list[np.ndarray]:
    """Return the rows of each image that was shown twice or more, among `rows`."""
    groups = trials.iloc[rows].groupby("stimulus_id", sort=False).indices.values()
    repeated = [np.sort(rows[np.asarray(members)]) for members in groups if len(members) > 1]
    if max_images is None or len(repeated) <= max_images:
        return repeated
    return [repeated[i] for i in np.linspace(0, len(repeated) - 1, max_images).astype(int)]


# --- beside the trials ------------------------------------------------------------------------------------


def write_epochs_ceilings(folder: Path, responses: Responses) -> None:
    """Compute the ceiling of every subject and split with repetitions, and write it beside ``data.npy``.

    At most 500 evenly spaced images of each are used. If fewer than four images are repeated, nothing is written.
    """
    found = []
    for rows in _iterate_splits(responses.trials):
        try:
            found.append(compute_epochs_ceiling(responses, rows, max_images=MAX_IMAGES))
        except DataError:
            continue
    if found:
        arrays = {name: np.stack([getattr(one, name) for one in found]) for name in ("share", "low", "high")}
        np.savez(folder / ARRAY, allow_pickle=False, **arrays)
        keys = ("subject", "split", "n_images", "n_repetitions")
        entries = [{key: getattr(one, key) for key in keys} for one in found]
        write_json(folder / TABLE, {"dims": ["entry", "channel", "time"], "entries": entries})


def count_ceiling_trials(trials: pd.DataFrame) -> int:
    """Return how many trials `write_epochs_ceilings` reads."""
    repeated = [find_repeated(trials, rows, MAX_IMAGES) for rows in _iterate_splits(trials)]
    return sum(len(rows) for images in repeated for rows in images)


def _iterate_splits(trials: pd.DataFrame) -> Iterator[np.ndarray]:
    """Yield the rows of every subject and split."""
    for subject, split in trials[["subject", "split"]].drop_duplicates().itertuples(index=False):
        yield np.flatnonzero(((trials["subject"] == subject) & (trials["split"] == split)).to_numpy())


def read_epochs_ceiling(folder: Path, *, subject: str | None = None, split: str = "test") -> EpochsCeiling:
    """Read the ceiling of one subject and split from the ``responses`` folder of a store.

    Parameters
    ----------
    folder
        Holds ``data.npy`` and ``signal_share.npz``.
    subject
        May be left out if there is only one subject.

    Raises
    ------
    DataError
        If there is none, because no image was repeated, or the subject is unknown.
    """
    if not (folder / TABLE).is_file():
        raise DataError(
            f"{folder} has no noise ceiling: fewer than four images are repeated, or an older version wrote it."
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
    with np.load(folder / ARRAY, allow_pickle=False) as arrays:
        share, low, high = (arrays[name][hits[0]] for name in ("share", "low", "high"))
    return EpochsCeiling(
        share, low, high, record["subject"], record["split"], record["n_images"], record["n_repetitions"]
    )
