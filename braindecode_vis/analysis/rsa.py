"""Representational similarity: whether images that are alike in a layer are alike in the brain.

Owns dissimilarity matrices, the comparison of several layers with the brain, and the noise ceiling over subjects. It
compares geometries, so no mapping is fitted and no test image can leak into one. Runs no encoder.

References
----------
Kriegeskorte et al. (2008), Front. Syst. Neurosci. 2; Nili et al. (2014), PLOS Comput. Biol. 10 (noise ceiling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError, check_option
from braindecode_vis.metrics.uncertainty import compute_p_value
from braindecode_vis.seeds import make_generator


def compute_rdm(vectors: np.ndarray, *, metric: str = "correlation") -> np.ndarray:
    """Return the dissimilarities of all pairs of rows, shape (n_rows * (n_rows - 1) / 2,), in scipy's order.

    Parameters
    ----------
    vectors : float array of shape (n_rows, ...)
    metric
        ``correlation``, ``cosine`` or ``euclidean``.

    Raises
    ------
    DataError
        If a row is constant (correlation) or zero (cosine), naming it.
    """
    from scipy.spatial.distance import pdist

    check_option("metric", metric, ("correlation", "cosine", "euclidean"))
    flat = np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
    if len(flat) < 3:
        raise DataError("representational similarity needs at least three rows.")
    spread = {"correlation": np.ptp(flat, axis=1), "cosine": np.abs(flat).max(axis=1)}.get(metric)
    if spread is not None and (spread == 0).any():
        raise DataError(
            f"row {int(np.flatnonzero(spread == 0)[0])} is {'constant' if metric == 'correlation' else 'zero'}, so its "
            f"{metric} distance has no value; use euclidean or leave the row out."
        )
    return pdist(flat, metric)  # type: ignore[call-overload]


@dataclass(frozen=True)
class LayerMatch:
    """How well one layer's dissimilarities agree with the brain's.

    Parameters
    ----------
    layer
        Name.
    rho
        Spearman correlation of the dissimilarities, the mean over subjects.
    ci_low, ci_high
        95 % interval over resampled images.
    p_value
        One-sided, from permuted images.
    """

    layer: str
    rho: float
    ci_low: float
    ci_high: float
    p_value: float


@dataclass(frozen=True)
class BrainMatch:
    """Every layer against the brain, best first as given, with what any model could reach.

    Parameters
    ----------
    layers
        One entry per layer, in the order given.
    ceiling_low, ceiling_high
        Noise ceiling: each subject against the mean of the others, and against the mean of all. None for one subject.
    n_images, n_subjects
        What the numbers rest on.
    """

    layers: tuple[LayerMatch, ...]
    ceiling_low: float | None
    ceiling_high: float | None
    n_images: int
    n_subjects: int


def compare_layers_with_brain(
    brain: Mapping[str, Embeddings],
    layers: Mapping[str, Embeddings],
    *,
    metric: str = "correlation",
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> BrainMatch:
    """Compare the dissimilarities of images in the brain with those in each layer of a network.

    Parameters
    ----------
    brain
        Mean response pattern per image for each subject, all with the same ids (any order), one row per id.
    layers
        Embeddings of the same images by name of the layer.
    metric
        Of `compute_rdm`.
    n_bootstrap
        Resamples of the images behind the intervals. Dissimilarities keep the rank that they have among all images;
        pairs of an image with its own copy are left out.
    n_permutations
        Shuffles of the images behind the p-values.
    seed
        Root of both.

    Raises
    ------
    DataError
        If a subject or a layer lacks an image.
    """
    from scipy.spatial.distance import squareform

    if not brain or not layers:
        raise DataError("representational similarity needs at least one subject and one layer.")
    ids = list(next(iter(brain.values())).ids)
    subjects = [squareform(compute_rdm(rows.select(ids).vectors, metric=metric)) for rows in brain.values()]
    models = {
        name: squareform(compute_rdm(rows.select(ids).vectors, metric=metric))
        for name, rows in layers.items()
    }
    n = len(ids)
    pairs = np.triu_indices(n, 1)
    theirs = [_square(_rank(subject[pairs]), n) for subject in subjects]
    draws = [make_generator(seed, "rsa bootstrap", b).integers(n, size=n) for b in range(n_bootstrap)]
    draws = [draw for draw in draws if len(np.unique(draw)) > 2]
    shuffles = [make_generator(seed, "rsa permutation", p).permutation(n) for p in range(n_permutations)]
    mean_subject = np.mean(theirs, axis=0)[
        pairs
    ]  # the mean correlation is the one with the mean of the ranks
    matches = []
    for name, model in models.items():
        own = _square(_rank(model[pairs]), n)
        rho = float(mean_subject @ own[pairs])
        spread = [_resample(theirs, own, draw) for draw in draws]
        low, high = np.percentile(spread, [2.5, 97.5]) if spread else (rho, rho)
        null = np.array([mean_subject @ own[np.ix_(shuffle, shuffle)][pairs] for shuffle in shuffles])
        p_value = float(compute_p_value(rho, null))
        matches.append(LayerMatch(name, rho, float(low), float(high), p_value))
    ceiling = compute_noise_ceiling(subjects) if len(subjects) > 1 else (None, None)
    return BrainMatch(tuple(matches), *ceiling, n_images=n, n_subjects=len(subjects))


def _square(pairs: np.ndarray, n: int) -> np.ndarray:
    from scipy.spatial.distance import squareform

    assert len(pairs) == n * (n - 1) // 2
    return squareform(pairs)


def _resample(subjects: Sequence[np.ndarray], model: np.ndarray, draw: np.ndarray) -> float:
    """Return the mean correlation over subjects of the ranks among resampled images."""
    upper = np.triu_indices(len(draw), 1)
    rows, columns = draw[upper[0]], draw[upper[1]]
    distinct = rows != columns  # an image and its own copy have no dissimilarity
    rows, columns = rows[distinct], columns[distinct]
    own = _centre(model[rows, columns])
    return float(np.mean([_centre(subject[rows, columns]) @ own for subject in subjects]))


def _centre(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-12)


def _rank(values: np.ndarray) -> np.ndarray:
    """Return mean-free ranks of length one; all zeros if every value is the same."""
    from scipy.stats import rankdata

    return _centre(rankdata(values))


def compute_noise_ceiling(rdms: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the lower and upper bound of the correlation that any model can reach with these subjects.

    Parameters
    ----------
    rdms : sequence of square arrays of shape (n_images, n_images)
        One per subject, at least two.
    """
    if len(rdms) < 2:
        raise DataError("a noise ceiling needs at least two subjects.")
    upper = np.triu_indices(len(rdms[0]), 1)
    ranks = np.stack([_rank(rdm[upper]) for rdm in rdms])
    total = ranks.sum(axis=0)
    lower = float(np.mean([_rank(total - own) @ own for own in ranks]))
    return lower, float(np.mean([_rank(total) @ own for own in ranks]))
