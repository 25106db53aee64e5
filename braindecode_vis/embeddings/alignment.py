"""Does a bank of features belong to an image list? Counts alone cannot tell.

Owns two checks of rows against stimuli: images of one concept must be more alike than any two images, and images that
are encoded again must be found in their own rows. Knows no file format.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from braindecode_vis.arrays import Embeddings, normalise_rows
from braindecode_vis.checks import DataError
from braindecode_vis.roles import ImageEncoder
from braindecode_vis.seeds import make_generator
from braindecode_vis.stimuli import StimulusSet


def check_concepts(vectors: np.ndarray, concepts: np.ndarray, path: Path) -> None:
    """Raise `DataError` if rows that the list puts into one concept are no more alike than others.

    A bank of another image list passes every count and is wrong in every row; images of one concept are alike in any
    useful space, so the list can be checked against the rows. Lists with one image per concept are not checked.

    Parameters
    ----------
    vectors : float array of shape (n_images, ...)
    concepts : sequence of length n_images
    path
        For the message.
    """
    _, codes, counts = np.unique(concepts.astype(str), return_inverse=True, return_counts=True)
    if counts.max() < 2 or len(counts) < 2:
        return
    flat = vectors.reshape(len(vectors), -1).astype(np.float64)
    flat = normalise_rows(flat - flat.mean(axis=0))
    sums = np.zeros((len(counts), flat.shape[1]))
    np.add.at(sums, codes, flat)
    # Sum over pairs within a concept = squared length of its sum minus the lengths themselves.
    within = ((sums**2).sum() - len(flat)) / (counts * (counts - 1)).sum()
    expected = ((flat.sum(axis=0) ** 2).sum() - len(flat)) / (len(flat) * (len(flat) - 1))
    n_pairs = int((counts * (counts - 1)).sum()) // 2
    # Chance alone scatters the mean over pairs by 1 / sqrt(pairs * dimensions); spaces in use have well over ten.
    if within - expected < 4 / np.sqrt(10 * n_pairs):
        raise DataError(
            f"{path} does not follow the image list: images of one concept are no more alike in it ({within:.3f}) than "
            f"any two images ({expected:.3f}); the bank was computed from another list."
        )


def check_against_encoder(
    bank: Embeddings, encoder: ImageEncoder, stimuli: StimulusSet, *, n_images: int = 8, seed: int = 0
) -> float:
    """Encode a few images and find each of them in the bank; return the mean cosine to its own row.

    Parameters
    ----------
    bank
        What was imported.
    encoder
        The network and layer that the bank is said to come from.
    stimuli
        The images.
    n_images
        How many are tried.
    seed
        Chooses them.

    Raises
    ------
    DataError
        If an image is nearer to the row of another tried image than to its own.
    """
    rng = make_generator(seed, "check imported bank")
    chosen = rng.choice(stimuli.ids, size=min(n_images, len(stimuli)), replace=False)
    ours = encoder.encode(stimuli.iterate_images(chosen)).reshape(len(chosen), -1)
    theirs = bank.select(chosen).flat()
    if ours.shape != theirs.shape:
        raise DataError(
            f"the bank has {theirs.shape[1]} features per image, {encoder.space} has {ours.shape[1]}."
        )
    similarity = normalise_rows(ours) @ normalise_rows(theirs).T
    wrong = np.flatnonzero(similarity.argmax(axis=1) != np.arange(len(chosen)))
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"the bank does not follow the image list: {chosen[first]!r} looks like the row of "
            f"{chosen[int(similarity[first].argmax())]!r} ({wrong.size} of {len(chosen)} tried images are misplaced)."
        )
    return float(np.diag(similarity).mean())
