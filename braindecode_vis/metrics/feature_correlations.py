"""Correlation of every decoded image with every seen one in the features of a network, each image encoded once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.devices import repeatable_convolutions
from braindecode_vis.metrics.feature_networks import Extract, NetworkFacts

LARGEST_IN_MEMORY = 1 << 30  # bytes of seen features; beyond, they lie in a temporary file
FEATURE_CHUNK = 1 << 14  # features that are correlated at a time in double precision
BLOCK = 256  # decoded images whose features are held at a time


def correlate_with_seen(
    images: np.ndarray,
    seen: np.ndarray,
    facts: NetworkFacts,
    extract: Extract,
    *,
    device: str = "cpu",
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, np.ndarray]:
    """Return the Pearson correlation of every image with every seen one in each space of a network.

    Every image goes through the network once. Features of the seen images are kept (in a temporary file where they
    are many), those of the others are let go batch by batch; correlations are taken in double precision.

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3)
        Distinct images.
    seen : int array of shape (n_seen,)
        Which of them were shown.
    facts, extract
        The network.
    device, batch_size
        How it runs.
    advance
        Called with the number of images done.

    Returns
    -------
    dict
        Space to a float64 array of shape (n_images, n_seen); a constant feature vector correlates 0.
    """
    others = np.setdiff1d(np.arange(len(images)), seen)
    kept: dict[str, np.ndarray] = {}
    for rows, features in _extract(images[seen], facts, extract, device, batch_size):
        for space, values in features.items():
            if space not in kept:
                kept[space] = _allocate((len(seen), values.shape[1]))
            kept[space][rows] = values
        advance(rows.stop - rows.start)
    result = {space: np.empty((len(images), len(seen))) for space in kept}
    for space, values in kept.items():
        result[space][seen] = _correlate(values, values)
    # Blocks of many batches, so that the features that are kept are read few times.
    block = max(batch_size, BLOCK)
    for start in range(0, len(others), block):
        rows_of_block = others[start : start + block]
        parts: dict[str, list[np.ndarray]] = {space: [] for space in kept}
        for rows, features in _extract(images[rows_of_block], facts, extract, device, batch_size):
            for space, values in features.items():
                parts[space].append(values)
            advance(rows.stop - rows.start)
        for space, values in kept.items():
            result[space][rows_of_block] = _correlate(np.concatenate(parts[space]), values)
    return result


def _extract(
    images: np.ndarray, facts: NetworkFacts, extract: Extract, device: str, batch_size: int
) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    import torch

    for start in range(0, len(images), batch_size):
        rows = slice(start, min(start + batch_size, len(images)))
        with (
            torch.inference_mode(),
            repeatable_convolutions(),
        ):
            features = extract(facts.prepare(images[rows], device))
        yield rows, {space: value.flatten(1).float().cpu().numpy() for space, value in features.items()}


def _allocate(shape: tuple[int, int]) -> np.ndarray:
    if shape[0] * shape[1] * 4 <= LARGEST_IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping outlives the closed, nameless file
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def _correlate(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return correlations of float32 rows, centred and multiplied in double precision, chunk by chunk of features."""
    means = [rows.mean(axis=1, dtype=np.float64)[:, None] for rows in (left, right)]
    product = np.zeros((len(left), len(right)))
    squares = [np.zeros(len(left)), np.zeros(len(right))]
    lengths = [np.zeros(len(left)), np.zeros(len(right))]
    for start in range(0, left.shape[1], FEATURE_CHUNK):
        chunk = slice(start, start + FEATURE_CHUNK)
        centred = []
        for number, rows in enumerate((left, right)):
            raw = rows[:, chunk].astype(np.float64)
            lengths[number] += np.einsum("ij,ij->i", raw, raw)
            raw -= means[number]
            squares[number] += np.einsum("ij,ij->i", raw, raw)
            centred.append(raw)
        product += centred[0] @ centred[1].T
    for number, axis in enumerate((1, 0)):
        norm = np.sqrt(squares[number])
        if not np.isfinite(norm).all():
            raise DataError("a network gave features that are not finite; check its weights and the images.")
        varied = norm > 1e-12 * np.sqrt(lengths[number])
        scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=varied)
        product *= np.expand_dims(scale, axis)
    return np.clip(product, -1.0, 1.0)
