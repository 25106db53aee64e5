"""Held-out training images: who they are, and how well the network finds them.

Model selection sees training images only. Whole concepts are held out, so that what is selected for is what a
zero-shot test asks; where the data show too few concepts for that, images are held out instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.arrays import normalise_rows
from braindecode_vis.checks import DataError
from braindecode_vis.seeds import make_generator

FEWEST_HELD_OUT = 2
TOP_K = 5
SMALL_GALLERY = 4 * TOP_K


@dataclass(frozen=True)
class HeldOut:
    """Training trials that the network never learns from.

    Parameters
    ----------
    mask : boolean array of shape (n_trials,)
    by
        ``concept`` or ``image``, what was held out whole; empty if nothing was.
    """

    mask: np.ndarray
    by: str


def hold_out(stimuli: np.ndarray, concepts: np.ndarray, fraction: float, *, seed: int) -> HeldOut:
    """Choose held-out trials.

    Concepts are held out if `fraction` of them are at least two and as many remain, images otherwise.

    Parameters
    ----------
    stimuli, concepts : int arrays of shape (n_trials,)
        Image and concept of each trial.
    fraction
        Share of the concepts (or images) to hold out; 0 holds out nothing.
    seed
        Decides which.

    Raises
    ------
    DataError
        If not even two images can be held out.
    """
    if fraction == 0:
        return HeldOut(np.zeros(len(stimuli), dtype=bool), "")
    for by, groups in (("concept", concepts), ("image", stimuli)):
        names = np.unique(groups)
        n_held = round(fraction * len(names))
        if n_held >= FEWEST_HELD_OUT and len(names) - n_held >= FEWEST_HELD_OUT:
            chosen = make_generator(seed, "hold_out", by).permutation(names)[:n_held]
            return HeldOut(np.isin(groups, chosen), by)
    raise DataError(
        f"{fraction:.0%} of {len(np.unique(stimuli))} training images are too few to hold out; "
        "set encoder.selection.hold_out to 0 or higher."
    )


def name_top_k(n_gallery: int) -> tuple[str, int]:
    """Return the name and the k of the accuracy that a gallery of this size can tell: top-5, or top-1 below 20."""
    return (f"top{TOP_K}", TOP_K) if n_gallery >= SMALL_GALLERY else ("top1", 1)


def compute_top_k(brain: np.ndarray, gallery: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return how often the true image is among the `k` most similar ones by cosine.

    Ties count against the network, so that constant outputs find nothing.

    Parameters
    ----------
    brain : array of shape (n_queries, d)
    gallery : array of shape (n_gallery, d)
    truth : int array of shape (n_queries,)
        Row of the true image in the gallery.
    k
        How many candidates count.

    Examples
    --------
    >>> compute_top_k(np.eye(3), np.eye(3), np.array([0, 1, 0]), 1) == 2 / 3
    True
    """
    similarity = normalise_rows(brain) @ normalise_rows(gallery).T
    own = similarity[np.arange(len(truth)), truth]
    return float(((similarity >= own[:, None]).sum(axis=1) <= k).mean())
