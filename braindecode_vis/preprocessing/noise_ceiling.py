"""Noise ceilings of prepared responses: how well the responses to the test images could be predicted at best.

Owns the ceiling of one metric: the Pearson correlation, over test images, between any prediction of a column's response
and the response measured, be the prediction that of an encoding model or of a brain model shown a reconstruction. It
does not bound retrieval, identification or image metrics, which pool many columns and have no ceiling in closed form.

The ceiling describes test trials, so it may be looked at only after everything is chosen; choosing columns by it would
be choosing by the test set (`braindecode_vis.preprocessing.selection` uses training trials instead).

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x: explainable variance from the signal-to-noise ratio.
Spearman (1910), Brown (1910): reliability of a mean from that of its halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from braindecode_vis.arrays import Responses
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.reliability import compute_ncsnr, compute_split_half
from braindecode_vis.preprocessing.voxel_geometry import count_own_voxels, read_geometry

#: The one metric that these ceilings bound.
METRIC = "response correlation"


@dataclass(frozen=True)
class NoiseCeiling:
    """Ceiling of the correlation between predicted and measured responses of one subject.

    Parameters
    ----------
    subject
        Whose.
    per_column : array of shape (n_columns,)
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
    per_column: np.ndarray
    source: str
    n_images: int
    n_averaged: float
    metric: str = METRIC

    @property
    def value(self) -> float:
        """Mean over columns, to stand beside a score that is the mean over the same columns."""
        return float(self.per_column.mean())


def compute_noise_ceilings(
    responses: Responses,
    rows: np.ndarray | None = None,
    *,
    averaged: bool = True,
    measure: Literal["ncsnr", "split_half", "published"] = "ncsnr",
    seed: int = 0,
) -> list[NoiseCeiling]:
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
    index = _find_test_rows(responses, rows)
    subjects = responses.trials["subject"].astype(str).to_numpy()[index]
    ceilings = []
    for subject in dict.fromkeys(subjects.tolist()):
        own = _pick(responses, index[subjects == subject], count_own_voxels(responses).get(subject))
        counts = _count_showings(own)
        n_averaged = float(1 / np.mean(1 / counts)) if averaged else 1.0
        if measure == "published":
            ceiling, n_images, source = _read_published(responses, subject, n_averaged)
        else:
            ceiling, n_images, source = _estimate(own, measure, n_averaged, seed)
        ceilings.append(NoiseCeiling(subject, ceiling, source, n_images, n_averaged))
    return ceilings


def _find_test_rows(responses: Responses, rows: np.ndarray | None) -> np.ndarray:
    chosen = (responses.trials["split"] == "test").to_numpy() if rows is None else np.asarray(rows)
    index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
    if not len(index):
        raise DataError("there are no test trials to compute a noise ceiling from.")
    return index


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
            "these responses carry no published map ncsnr of their columns; estimate the ceiling with ncsnr or "
            "split_half."
        )
    published = np.asarray(geometry.maps["ncsnr"], np.float64)
    return np.sqrt(_explainable(published, n_averaged)), 0, "ncsnr as published"
