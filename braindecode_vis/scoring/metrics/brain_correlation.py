"""Brain correlation: whether a reconstruction explains the measured response.

A linear encoding model, fitted on training trials only, predicts responses from image embeddings. Applied to the
embedding of a reconstruction, its prediction is correlated with the measured test response, voxel by voxel over the
test images, and averaged within regions. A generator that paints plausible images the brain never saw scores low.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207 (with the network GNet in place of a linear model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders.ridge import RidgeConfig, RidgeEncoder
from braindecode_vis.scoring.crossed import CrossedInterval, bound_draws, resampled_interval
from braindecode_vis.scoring.uncertainty import (
    compute_p_value,
    correct_fdr,
    permutation_test,
    widen_about,
    widen_null,
)

WHOLE = "all"
BLOCK_VOXELS = 4096  # correlated at a time: 1000 resamples of them take 33 MB


@dataclass(frozen=True)
class RegionCorrelation:
    """Mean correlation over the voxels of a region, interval over images or groups, permutation p and chance."""

    value: float
    interval: CrossedInterval
    chance: float
    p_value: float
    n_voxels: int


@dataclass(frozen=True)
class BrainCorrelation:
    """Correlation of predicted with measured responses.

    Parameters
    ----------
    by_voxel : array of shape (n_voxels,)
        Over test images, the rounds averaged; 0 for a voxel that does not vary.
    regions
        Name to result; ``all`` is the mean over all voxels.
    n_images
        Number of test images.
    """

    by_voxel: np.ndarray
    regions: dict[str, RegionCorrelation]
    n_images: int


def fit_encoding_model(
    training: Embeddings, responses: np.ndarray, *, ridge: RidgeConfig | None = None, seed: int = 0
) -> RidgeEncoder:
    """Return a linear model from image embeddings to responses; penalty chosen inside the training trials.

    Parameters
    ----------
    training : Embeddings of n_trials rows
        Embedding of the image of each training trial.
    responses : array of shape (n_trials, n_voxels)
        What was measured.
    ridge
        Candidates of the penalty.
    seed
        Of the inner folds, which part stimuli.
    """
    if responses.ndim != 2 or len(responses) != len(training):
        raise DataError(
            f"an encoding model needs one response vector per embedding, got {responses.shape} for {len(training)}."
        )
    space = f"responses of {responses.shape[1]} voxels"
    targets = Embeddings(np.asarray(responses, dtype=np.float32), training.ids, space)
    return (ridge or RidgeConfig()).build(seed=seed).fit(_as_features(training), targets)


def predict_responses(model: RidgeEncoder, images: Embeddings) -> np.ndarray:
    """Return the response that the encoding model expects to each image, shape (n_images, n_voxels)."""
    return model.predict(_as_features(images)).vectors


def correlate_responses(
    predictions: Sequence[np.ndarray],
    measured: np.ndarray,
    *,
    regions: Mapping[str, np.ndarray] | None = None,
    n_boot: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    unit: str = "image",
    over_folds: bool = False,
) -> BrainCorrelation:
    """Return how well responses predicted from reconstructions fit those that were measured.

    Parameters
    ----------
    predictions : arrays of shape (n_images, n_voxels)
        From `predict_responses`, one for each round of draws; rounds are scored one at a time and averaged.
    measured : array of shape (n_images, n_voxels)
        Responses to the images that were seen, repetitions averaged, in the same order.
    regions
        Name of each region to a boolean array of shape (n_voxels,); the mean over all voxels is always given.
    n_boot, n_permutations, seed
        Resamples of the images, shuffles of the images, and their root seed.
    clusters : array of shape (n_images,), optional
        Images of one label are drawn together.
    unit
        What the clusters are, in one word. Groups have Student's t with their number - 1 degrees of freedom.
    over_folds
        Whether the predictions are of several folds that train each other: limits and nulls are wider by sqrt 2.

    Raises
    ------
    DataError
        If shapes do not fit or a region is empty.
    """
    if measured.ndim != 2 or predictions[0].shape != measured.shape or len(measured) < 3:
        raise DataError(
            f"measured responses of shape {measured.shape} do not fit predictions of {predictions[0].shape}; a "
            "correlation needs at least three images."
        )
    masks = {WHOLE: np.ones(measured.shape[1], dtype=bool), **(regions or {})}
    for name, mask in masks.items():
        if mask.shape != measured.shape[1:] or mask.dtype != bool or not mask.any():
            raise DataError(
                f"region {name!r} must be a boolean array of {measured.shape[1]} voxels that selects at least one."
            )
    n = len(measured)
    n_units = n if clusters is None else len(np.unique(clusters.astype(str)))
    # The first row is the sample itself.
    weights = np.concatenate([np.ones((1, n)), _draw_counts(n, clusters, n_boot, seed)])
    sums = {name: np.zeros(len(weights)) for name in masks}
    by_voxel = np.empty(measured.shape[1])
    tables = {name: np.zeros((n, n)) for name in masks}
    for start in range(0, measured.shape[1], BLOCK_VOXELS):
        block = slice(start, start + BLOCK_VOXELS)
        right = np.asarray(measured[:, block], dtype=np.float64)
        correlations = np.zeros((len(weights), right.shape[1]))
        for predicted in predictions:
            left = predicted[:, block].astype(np.float64)  # (n_images, n_block)
            correlations += _correlate_weighted(left, right, weights) / len(predictions)
            x, y = _standardise(left), _standardise(right)
            for name, mask in masks.items():
                inside = mask[block]  # (n_block,): the products of a region are added up over blocks
                tables[name] += x[:, inside] @ y[:, inside].T / (mask.sum() * len(predictions))
        by_voxel[block] = correlations[0]
        for name, mask in masks.items():
            sums[name] += correlations[:, mask[block]].sum(axis=1) / mask.sum()
    found = {}
    for name, mask in masks.items():
        # The correlation is the sum over images of products, so times n it is a mean that can be permuted.
        null = permutation_test(n * tables[name], n_permutations=n_permutations, seed=seed)
        null = widen_null(null) if over_folds else null
        value = float(sums[name][0])
        interval = resampled_interval(
            value, sums[name][1:], n_units, unit=unit, ends=(-1.0, 1.0), over_folds=over_folds
        )
        found[name] = RegionCorrelation(value, interval, null.null_mean, null.p_value, int(mask.sum()))
    return BrainCorrelation(by_voxel, found, n)


@dataclass(frozen=True)
class ResponseMaps:
    """How well each response (voxel, parcel, channel at a time) is predicted, arrays of shape (n_responses,).

    Parameters
    ----------
    correlation
        Of prediction and measurement over images; 0 where either does not vary.
    ci_low, ci_high
        95 % interval of it over images or groups; NaN where there is none.
    resampled
        In words, what it resamples, or why there is none.
    p_value
        One-sided, from images that were exchanged.
    q_value
        The same, corrected by the false discovery rate over all responses.
    explained
        Share of the measured variance that the prediction leaves no error of; below 0 where the mean does better.
    """

    correlation: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    resampled: np.ndarray
    p_value: np.ndarray
    q_value: np.ndarray
    explained: np.ndarray


def map_responses(
    predicted: np.ndarray,
    measured: np.ndarray,
    *,
    n_boot: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    unit: str = "image",
    over_folds: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> ResponseMaps:
    """Return how well every single response is predicted.

    Parameters
    ----------
    predicted, measured : arrays of shape (n_images, n_responses)
        Rows pair.
    n_boot, n_permutations, seed
        Resamples and shuffles of the images, and their root seed.
    clusters : array of shape (n_images,), optional
        Images of one label are drawn together.
    unit, over_folds
        As for `correlate_responses`.
    advance
        Called with the number of responses done.

    Raises
    ------
    DataError
        If shapes differ, or there are fewer than three images.

    Examples
    --------
    >>> measured = np.random.default_rng(0).normal(size=(40, 3))
    >>> map_responses(measured, measured, n_boot=99, n_permutations=99).q_value.tolist()
    [0.01, 0.01, 0.01]
    """
    if measured.ndim != 2 or predicted.shape != measured.shape or len(measured) < 3:
        raise DataError(
            f"measured responses of shape {measured.shape} do not fit predictions of {predicted.shape}; a "
            "correlation needs at least three images."
        )
    n, n_responses = measured.shape
    weights = np.concatenate([np.ones((1, n)), _draw_counts(n, clusters, n_boot, seed)])
    generator = make_generator(seed, "response-maps")
    shuffles = [generator.permutation(n) for _ in range(n_permutations)]
    n_units = n if clusters is None else len(np.unique(clusters.astype(str)))
    found, p_value = np.empty((4, n_responses)), np.empty(n_responses)
    resampled = np.empty(n_responses, dtype=object)
    # The resamples of a block are one table, so that more responses at once take more memory than time is saved.
    for start in range(0, n_responses, BLOCK_VOXELS):
        block = slice(start, start + BLOCK_VOXELS)
        left, right = (np.asarray(part[:, block], dtype=np.float64) for part in (predicted, measured))
        drawn = _correlate_weighted(left, right, weights)  # (1 + n_boot, n_block)
        low, high, words = bound_draws(
            drawn[0], drawn[1:], n_units, unit=unit, ends=(-1.0, 1.0), over_folds=over_folds
        )
        found[:3, block], resampled[block] = (drawn[0], low, high), words
        spread = ((right - right.mean(axis=0)) ** 2).sum(axis=0)
        error = ((right - left) ** 2).sum(axis=0)
        found[3, block] = np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), 0.0)
        x, y = (_standardise(part).astype(np.float32) for part in (left, right))
        null = np.stack([np.einsum("nf,nf->f", x[shuffle], y) for shuffle in shuffles])
        null = widen_about(null, null.mean(axis=0)) if over_folds else null
        # Less the rounding of single precision, so that equal values count as extreme.
        p_value[block] = compute_p_value(np.einsum("nf,nf->f", x, y) - 1e-6, null)
        advance(left.shape[1])
    return ResponseMaps(found[0], found[1], found[2], resampled, p_value, correct_fdr(p_value), found[3])


def _draw_counts(n: int, clusters: np.ndarray | None, n_boot: int, seed: int) -> np.ndarray:
    """Return how often each image is drawn in each resample, shape (n_boot, n_images)."""
    codes = np.arange(n) if clusters is None else np.unique(clusters.astype(str), return_inverse=True)[1]
    n_units = int(codes.max()) + 1
    drawn = make_generator(seed, "brain-correlation").multinomial(
        n_units, np.full(n_units, 1 / n_units), size=n_boot
    )
    return np.asarray(drawn[:, codes])


def _as_features(embeddings: Embeddings) -> Responses:
    """Return embeddings as what the ridge regresses on; the model of the brain has the two sides exchanged."""
    import pandas as pd

    trials = pd.DataFrame({"stimulus_id": embeddings.ids})
    for column in ("subject", "session", "run", "repetition", "split"):
        trials[column] = "train" if column == "split" else "1"
    return Responses(embeddings.flat(), ("trial", "feature"), trials, "arbitrary")


def _correlate_weighted(left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the correlation of each column pair under each row of weights, shape (n_weights, n_columns)."""
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)  # against cancellation
    share = weights / weights.sum(axis=1, keepdims=True)  # (n_weights, n_images)
    a, b = share @ left, share @ right
    covariance = share @ (left * right) - a * b
    spread = np.sqrt(np.maximum(share @ left**2 - a**2, 0) * np.maximum(share @ right**2 - b**2, 0))
    scale = left.std(axis=0) * right.std(axis=0)
    varied = spread > 1e-10 * scale  # a resample may draw equal rows only, whose spread is rounding
    return np.divide(covariance, spread, out=np.zeros_like(covariance), where=varied & (scale > 0))


def _standardise(columns: np.ndarray) -> np.ndarray:
    """Return columns with mean 0 and norm 1; a constant one becomes 0."""
    centred = columns - columns.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    varied = norm > 1e-12 * np.linalg.norm(columns, axis=0)
    return np.divide(centred, norm, out=np.zeros_like(centred), where=varied)
