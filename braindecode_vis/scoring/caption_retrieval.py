"""Captions of the training images nearest to predicted embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.retrieval import compute_similarity


def retrieve_nearest(
    queries: Sequence[Embeddings],
    training: Sequence[Embeddings],
    bank: Mapping[str, Sequence[str]],
    *,
    device: str,
) -> list[str]:
    """Return the caption of the training image nearest to each query, after the training mean is taken off.

    Parameters
    ----------
    queries, training : sequences of Embeddings, one entry per fold
        In one space.
    bank
        Captions by id.
    device
        Where similarities are computed.
    """
    found = []
    for asked, known in zip(queries, training, strict=True):
        # Without it, most predictions would be nearest to the same few images: those near the common mean.
        mean = known.flat().mean(axis=0)
        left, right = (Embeddings(e.flat() - mean, e.ids, f"{e.space} - mean") for e in (asked, known))
        found += retrieve_captions(left, right, bank, device=device)
    return found


def retrieve_captions(
    predicted: Embeddings,
    training: Embeddings,
    bank: Mapping[str, Sequence[str]],
    *,
    device: str = "auto",
) -> list[str]:
    """Return for each prediction the first caption of the training image nearest to it by cosine.

    Parameters
    ----------
    predicted, training : Embeddings
        In one space.
    bank
        Captions by id; training images without one are left out.
    device
        Where the similarity is computed.

    Returns
    -------
    list of length n_predictions
        Among equally near images the one whose id comes first.

    Raises
    ------
    DataError
        If no training image has a caption.
    """
    known = np.array([row for row, name in enumerate(training.ids) if str(name) in bank], dtype=np.int64)
    if not known.size:
        raise DataError(
            "the caption bank contains none of the training images; its ids belong to another data set."
        )
    # Sorted by id, so that ties do not depend on the order of the trials.
    known = known[np.argsort(training.ids[known].astype(str), kind="stable")]
    candidates = training.take(known)
    nearest = np.argmax(compute_similarity(predicted, candidates, device=device), axis=1)
    return [bank[str(candidates.ids[row])][0] for row in nearest]
