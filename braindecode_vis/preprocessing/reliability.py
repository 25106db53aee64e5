"""How reliable a voxel's response to an image is: signal-to-noise, split halves, encoding scores.

Computes the signal-to-noise ratio of NSD, the unbiased signal share, split-half reliability, and cross-validated
encoding scores. The caller chooses the trials: `selection` passes training trials, `noise_ceiling` test trials.

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x: ncsnr and the noise ceiling from repeated images.
Pospisil & Bair (2021), doi:10.1371/journal.pcbi.1009212: unbiased estimates of explainable variance.
Spearman (1910), Brown (1910): reliability of the whole from that of its halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.memory import ROWS_OF_A_MAP, release_pages
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.preprocessing.splits import make_inner_folds

_BLOCK_BYTES = 64 << 20
_SMALL_BLOCK_BYTES = 1 << 20  # of the share of signal, which holds some copies of a block
_FEWEST_LEFT_OUT = 4  # images: of three, the mean of 1 / F is infinite
Measure = Literal["ncsnr", "split_half"]


@dataclass(frozen=True)
class SignalToNoise:
    """Spread of the response to images against that between repetitions.

    Parameters
    ----------
    ncsnr : array of shape (n_voxels,)
        Standard deviation of the signal over that of the noise.
    n_images
        Number of repeated images in the estimate.
    """

    ncsnr: np.ndarray
    n_images: int


def compute_ncsnr(responses: Responses, rows: np.ndarray | None = None) -> SignalToNoise:
    """Estimate signal and noise from images that were shown at least twice.

    Parameters
    ----------
    responses
        Single trials, dims ``trial, voxel`` or ``trial, parcel``.
    rows
        Trials to use: row numbers or a boolean mask; all by default.

    Returns
    -------
    SignalToNoise
        The noise variance is the mean variance between repetitions of an image; the signal variance is the variance of
        all trials minus the noise variance, not below 0.

    Raises
    ------
    DataError
        If no image is repeated.
    """
    index, groups, counts = _group_repeats(responses, rows)
    freedom = int((counts - 1).sum())  # one mean is estimated per image
    ncsnr = np.empty(responses.data.shape[1])
    for voxels, block in _iterate_voxels(responses, index):
        means = _sum_groups(block, counts) / counts[:, None]
        within = block - np.repeat(means, counts, axis=0)
        noise = np.einsum("nv,nv->v", within, within) / freedom
        # Variances of signal and noise add up; an estimate below zero is no signal (Allen et al. 2022).
        signal = np.maximum(block.var(axis=0, ddof=1) - noise, 0)
        ncsnr[voxels] = np.sqrt(np.divide(signal, noise, out=np.zeros_like(noise), where=noise > 0))
    return SignalToNoise(ncsnr, len(groups))


@dataclass(frozen=True)
class SignalShare:
    """Share of the variance between images that is signal, in the mean over repetitions.

    Parameters
    ----------
    share : array of shape (n_features,)
        Unbiased for normal noise, so that it can be averaged; not clipped, and below 0 in about half of the cases
        without signal.
    left_out : array of shape (n_images, n_means)
        Means of `share` over features, each image left out in turn.
    mean : array of shape (n_means,)
        The same means of all images.
    n_images, n_repetitions
        Number of images, and harmonic mean number of their repetitions.
    n_averaged
        Number of repetitions in the mean to which the share applies.
    n_freedom
        Degrees of freedom of the noise.
    """

    share: np.ndarray
    left_out: np.ndarray
    mean: np.ndarray
    n_images: int
    n_repetitions: float
    n_averaged: float
    n_freedom: int

    def bound_mean(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the jackknife interval of `mean`, not clipped; NaN for fewer than five images."""
        from scipy.special import stdtrit  # of scipy.stats, which takes a second to load

        n = self.n_images
        if n < _FEWEST_LEFT_OUT + 1:  # without one image, too few are left for a share
            nothing = np.full(self.mean.shape, np.nan)
            return nothing, nothing
        error = np.sqrt((n - 1) / n * ((self.left_out - self.left_out.mean(axis=0)) ** 2).sum(axis=0))
        half = stdtrit(n - 1, 0.5 + level / 2) * error
        return self.mean - half, self.mean + half

    def bound_features(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of each feature's share by the F distribution, not clipped."""
        from scipy.special import fdtri

        factor = self.n_repetitions / self.n_averaged
        whole = _average_more(self.share, 1 / factor)  # the share of all repetitions, to which F belongs
        ratio = (self.n_images - 3) / (self.n_images - 1) / np.maximum(1 - whole, 1e-12)
        quantiles = fdtri(self.n_images - 1, self.n_freedom, [0.5 + level / 2, 0.5 - level / 2])
        low, high = (_average_more(1 - quantile / ratio, factor) for quantile in quantiles)
        return low, high


def compute_signal_share(
    responses: Responses,
    rows: np.ndarray | None = None,
    *,
    n_averaged: float | None = None,
    over: np.ndarray | None = None,
) -> SignalShare:
    """Estimate the share of signal of every feature from images that were shown at least twice.

    Parameters
    ----------
    responses, rows
        As for `compute_ncsnr`; channels and times are features too.
    n_averaged
        Number of averaged repetitions to which the share applies; by default the number in the data.
    over : int array of shape (n_features,), optional
        Which mean each feature belongs to; by default one mean over all of them.

    Raises
    ------
    DataError
        If fewer than four images are repeated.
    """
    index, groups, counts = _group_repeats(responses, rows, any_dims=True)
    n_images = len(groups)
    if n_images < _FEWEST_LEFT_OUT:
        raise DataError(
            f"the share of signal needs {_FEWEST_LEFT_OUT} or more images with repetitions, but there are {n_images}."
        )
    n_features = int(np.prod(responses.data.shape[1:]))
    over = np.zeros(n_features, int) if over is None else over
    sizes = np.bincount(over)
    share, sums = np.empty(n_features), np.zeros((n_images, len(sizes)))
    for part, block in _iterate_voxels(responses, index, _SMALL_BLOCK_BYTES):
        share[part], left_out = measure_signal_share(block, counts, n_averaged=n_averaged)
        for number in np.unique(over[part]):
            sums[:, number] += left_out[:, over[part] == number].sum(axis=1)
    n_repetitions = float(1 / np.mean(1 / counts))
    return SignalShare(
        share, sums / sizes, np.bincount(over, share) / sizes, n_images, n_repetitions,
        n_repetitions if n_averaged is None else n_averaged, int((counts - 1).sum()),
    )  # fmt: skip


def measure_signal_share(
    values: np.ndarray, counts: np.ndarray, *, n_averaged: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of the variance of image means that is signal, and the same without each image.

    With F the variance between images over that within them, it is 1 - (n - 3) / (n - 1) / F: the mean of 1 / F is not
    1 over the mean of F. It is not clipped, since a mean of values clipped at 0 is above 0 even without signal.

    Parameters
    ----------
    values : array of shape (n_rows, n_features)
        Single trials; trials of one image are in neighbouring rows.
    counts : int array of shape (n_images,)
        Repetitions of each image, at least two.
    n_averaged
        As for `compute_signal_share`.

    Returns
    -------
    share : array of shape (n_features,)
        0 if image means do not differ, 1 if repetitions do not differ.
    left_out : array of shape (n_images, n_features)
        NaN for fewer than five images.

    Examples
    --------
    >>> trials = np.array([[1.0, 2], [3, 4], [2, 1], [6, 5], [4, 6]])
    >>> share, _ = measure_signal_share(trials.reshape(-1, 1), np.full(5, 2))
    >>> share.round(6).tolist()
    [0.943662]
    """
    n = len(counts)
    means = _sum_groups(values, counts) / counts[:, None]  # (n_images, n_features)
    squares = _sum_groups((values - np.repeat(means, counts, axis=0)) ** 2, counts)
    means = means - means.mean(axis=0)  # against cancellation
    total, inverse, freedom = (means**2).sum(axis=0), (1 / counts).sum(), (counts - 1).sum()
    factor = 1.0 if n_averaged is None else n / inverse / n_averaged

    def share_of(between: np.ndarray, within: np.ndarray, n_images: int) -> np.ndarray:
        # Image means that are equal to rounding have no variance to share out.
        varied = between > 1e-24 * np.maximum(np.abs(values).max(axis=0) ** 2, 1e-300)
        noise = np.divide(within, between, out=np.ones_like(between), where=varied)
        found = np.where(varied, 1 - (n_images - 3) / (n_images - 1) * noise, 0.0)
        return _average_more(found, factor)

    # 1 / F is the noise of an image mean over the variance of image means.
    share = share_of(total / (n - 1), squares.sum(axis=0) / freedom * inverse / n, n)
    if n < _FEWEST_LEFT_OUT + 1:
        return share, np.full(means.shape, np.nan)
    # Without an image, the mean moves: the squares about it fall by n / (n - 1) times its own.
    between = np.maximum(total - n / (n - 1) * means**2, 0) / (n - 2)
    within = (squares.sum(axis=0) - squares) / (freedom - (counts - 1))[:, None]
    within = within * ((inverse - 1 / counts) / (n - 1))[:, None]
    return share, share_of(between, within, n - 1)


def _average_more(share: np.ndarray, factor: float) -> np.ndarray:
    """Return the signal share if the noise variance is `factor` times as large; the sign does not change."""
    return share / (share + factor * (1 - share))


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of the mean responses of two random halves of the repetitions, over images.

    Parameters
    ----------
    correlation : array of shape (n_voxels,)
        Pearson correlation of the halves, mean over splits.
    reliability : array of shape (n_voxels,)
        Of the mean over all repetitions, by the Spearman-Brown formula.
    n_images, n_splits
        Number of images and of random splits.
    """

    correlation: np.ndarray
    reliability: np.ndarray
    n_images: int
    n_splits: int

    @property
    def ceiling(self) -> np.ndarray:
        """Largest correlation that a perfect prediction can reach with the mean response, shape (n_voxels,)."""
        return np.sqrt(np.maximum(self.reliability, 0))


def compute_split_half(
    responses: Responses, rows: np.ndarray | None = None, *, n_splits: int = 20, seed: int = 0
) -> SplitHalf:
    """Correlate the two halves of the repetitions of each image; parameters as for `compute_ncsnr`.

    Parameters
    ----------
    n_splits
        Number of random splits to average; with an odd number of repetitions, one half has one more.
    seed
        Of the splits.

    Raises
    ------
    DataError
        If fewer than three images are repeated.
    """
    index, groups, counts = _group_repeats(responses, rows)
    if len(groups) < 3:
        raise DataError(f"split halves need at least three repeated images, but there are {len(groups)}.")
    rng = make_generator(seed, "split half")
    starts = np.cumsum(counts) - counts
    # All divisions are drawn before the first block of voxels, so that every voxel is divided alike.
    orders = [
        np.concatenate([start + rng.permutation(count) for start, count in zip(starts, counts, strict=True)])
        for _ in range(n_splits)
    ]
    # Which half is the larger one is drawn too.
    sizes = [np.where(rng.random(len(counts)) < 0.5, counts // 2, (counts + 1) // 2) for _ in range(n_splits)]
    place = np.arange(len(index)) - np.repeat(starts, counts)
    total = np.zeros(responses.data.shape[1])
    for voxels, block in _iterate_voxels(responses, index):
        for order, size in zip(orders, sizes, strict=True):
            shuffled = block[order]
            first = place < np.repeat(size, counts)
            halves = [
                _sum_groups(shuffled * chosen[:, None], counts) / n[:, None]
                for chosen, n in ((first, size), (~first, counts - size))
            ]
            total[voxels] += _correlate(*halves)
    correlation = total / n_splits
    # Spearman-Brown: the whole has twice the repetitions of a half.
    reliability = boost_correlation(correlation)
    return SplitHalf(correlation, reliability, len(groups), n_splits)


def boost_correlation(correlation: np.ndarray) -> np.ndarray:
    """Return the reliability of the whole from the correlation of its halves (Spearman-Brown), not clipped.

    Below 0 the formula would go to minus infinity, so it is continued as a straight line there.
    """
    boosted: np.ndarray = 2 * correlation / (1 + np.maximum(correlation, 0))
    return boosted


def compute_encoding_scores(
    responses: Responses,
    features: Embeddings,
    rows: np.ndarray | None = None,
    *,
    alphas: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4, 1e5),
    n_folds: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Predict each voxel from image features by ridge regression, out of fold.

    Parameters
    ----------
    responses, rows
        As for `compute_ncsnr`; no image falls into two folds.
    features
        One vector per image.
    alphas
        Penalties; the one with the best mean score over voxels is used.
    n_folds, seed
        Folds over images.

    Returns
    -------
    array of shape (n_voxels,)
        Correlation of prediction and response over the trials.
    """
    index = _find_rows(responses, rows)
    ids = responses.stimulus_ids[index]
    x = np.asarray(features.select(list(ids)).vectors, np.float64).reshape(len(ids), -1)
    folds = make_inner_folds(ids, n_folds=n_folds, generator=make_generator(seed, "encoding scores"))
    solved = []
    for fold in folds:
        mean, std = x[fold.train].mean(axis=0), x[fold.train].std(axis=0)
        std[std == 0] = 1
        # One decomposition a fold serves all penalties and all voxels.
        u, s, vt = np.linalg.svd((x[fold.train] - mean) / std, full_matrices=False)
        solved.append((fold, u.T, s, ((x[fold.test] - mean) / std) @ vt.T))
    scores = np.zeros((len(alphas), responses.data.shape[1]))
    for voxels, block in _iterate_voxels(responses, index):
        predicted = np.zeros((len(alphas), *block.shape))
        for fold, ut, s, projected in solved:
            mean = block[fold.train].mean(axis=0)
            rotated = ut @ (block[fold.train] - mean)
            for number, alpha in enumerate(alphas):
                gain = s / (s**2 + alpha)  # ridge in the basis of the singular vectors
                predicted[number, fold.test] = projected @ (gain[:, None] * rotated) + mean
        for number in range(len(alphas)):
            scores[number, voxels] = _correlate(predicted[number], block)
    # One penalty for all voxels: one per voxel, chosen by the same folds, would favour noisy voxels.
    return scores[int(scores.mean(axis=1).argmax())]


# --- repetitions ------------------------------------------------------------------------------------------


def _find_rows(responses: Responses, rows: np.ndarray | None, any_dims: bool = False) -> np.ndarray:
    if responses.data.ndim != 2 and not any_dims:
        raise DataError(f"reliability needs the dims trial and voxel, not {responses.dims}.")
    if rows is None:
        return np.arange(responses.n_trials)
    rows = np.asarray(rows)
    return np.flatnonzero(rows) if rows.dtype == bool else rows


def _group_repeats(
    responses: Responses, rows: np.ndarray | None, any_dims: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of repeated images, image by image, the images, and the number of repetitions of each."""
    index = _find_rows(responses, rows, any_dims)
    table = responses.trials.iloc[index]
    # A picture shown to two subjects is not repeated; the separator occurs in no id.
    keys = table["subject"].astype(str) + "\x1f" + table["stimulus_id"].astype(str)
    names, codes, counts = np.unique(keys.to_numpy(str), return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    keep = counts[codes[order]] > 1
    if not keep.any():
        raise DataError(
            f"none of the {len(names)} images in these {len(index)} trials is repeated; noise is unknown."
        )
    return index[order[keep]], names[counts > 1], counts[counts > 1]


def _iterate_voxels(
    responses: Responses, index: np.ndarray, n_bytes: int = _BLOCK_BYTES
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of voxels (or of channels and times) as float64, so that a memory map is never read whole."""
    width = max(1, n_bytes // (8 * len(index)))
    # Small blocks are cut from a large one: of a file, each row costs a page, however little of it is needed.
    n_read = max(width, _BLOCK_BYTES // (8 * len(index)) // width * width)
    data = responses.data
    flat = data if data.ndim == 2 else data.reshape(len(data), -1)
    for start in range(0, flat.shape[1], n_read):
        read = np.empty((len(index), min(n_read, flat.shape[1] - start)), flat.dtype)
        for rows in range(0, len(index), ROWS_OF_A_MAP):
            read[rows : rows + ROWS_OF_A_MAP] = flat[
                index[rows : rows + ROWS_OF_A_MAP], start : start + n_read
            ]
            release_pages(data)
        for first in range(0, read.shape[1], width):
            place = start + first
            yield slice(place, place + width), read[:, first : first + width].astype(np.float64)


def _sum_groups(block: np.ndarray, counts: np.ndarray) -> np.ndarray:
    # Rows of an image lie together: (n_rows, n_voxels) -> (n_images, n_voxels)
    return np.add.reduceat(block, np.cumsum(counts) - counts, axis=0)


def _correlate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlation of each voxel; 0 where one is constant."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)
