"""Standardisation with statistics of training trials only: in memory, per channel, and for trials on disk.

Contains the z-score of features (`ZScore`), the scaling of channels of EEG and MEG (`scale_trials`), and mean and
variance of trials in an `ArrayFile`, summed block by block (`FeatureMoments`). The caller chooses the training trials.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.sources.cleaning_options import ScalingConfig
from braindecode_vis.preprocessing.array_file import ArrayFile
from braindecode_vis.preprocessing.epochs import BLOCK_TRIALS

if TYPE_CHECKING:
    import pandas as pd
from braindecode_vis.preprocessing.alignment import ZScore

# A block stays well below the memory of a laptop, and is large enough that the disk is read in long stretches.
_BLOCK_BYTES = 32 << 20
_CHANNEL_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class RobustScaler:
    """Median and interquartile range of each channel, and a limit for the scaled values.

    Parameters
    ----------
    centre, scale : float32 arrays of shape (n_channels,)
    clamp
        Scaled values are clipped at plus and minus this value; None does not clip.
    """

    centre: np.ndarray
    scale: np.ndarray
    clamp: float | None

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Return scaled float32 trials of shape (n_trials, n_channels, n_times)."""
        scaled = ((data - self.centre[:, None]) / self.scale[:, None]).astype(np.float32)
        return scaled if self.clamp is None else np.clip(scaled, -self.clamp, self.clamp, out=scaled)


def fit_robust_scaler(
    data: np.ndarray, rows: np.ndarray, *, clamp: float | None = 20.0, max_trials: int = 2000
) -> RobustScaler:
    """Fit the scaler on training trials.

    Parameters
    ----------
    data : array of shape (n_trials, n_channels, n_times)
        May be a memory map.
    rows : integer array
        Training trials.
    clamp
        20 as in Défossez et al. (2023), doi:10.1038/s42256-023-00714-5.
    max_trials
        Largest number of trials to use, evenly spaced, and at most 256 MiB.
    """
    if not len(rows):
        raise DataError("the robust scaler needs at least one training trial.")
    max_trials = max(1, min(max_trials, (256 << 20) // (4 * int(np.prod(data.shape[1:])))))
    picked = np.sort(rows)[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), max_trials)).astype(int))]
    sample = np.asarray(data[picked], dtype=np.float32)
    low, centre, high = np.percentile(sample, [25, 50, 75], axis=(0, 2))  # each (n_channels,)
    scale = np.where(high > low, high - low, 1.0)
    return RobustScaler(centre.astype(np.float32), scale.astype(np.float32), clamp)


def fit_channel_zscore(data: np.ndarray, rows: np.ndarray) -> ZScore:
    """Compute mean and standard deviation of each channel over training trials and times.

    Parameters
    ----------
    data : array of shape (n_trials, n_channels, n_times)
        Read in blocks, so that it may be a large memory map.
    rows : integer array
        Training trials; no other row is read.

    Returns
    -------
    ZScore
        With statistics of shape (n_channels, 1), so that it can be applied to trials directly.
    """
    rows = np.sort(rows)
    if not len(rows):
        raise DataError("the z-score needs at least one training trial.")
    # Differences from a first guess of the mean keep the sums of squares exact enough.
    guess = np.asarray(data[rows[0]], dtype=np.float64).mean(axis=-1)
    total, squares = np.zeros_like(guess), np.zeros_like(guess)
    block = max(1, _CHANNEL_BLOCK_BYTES // max(1, data[:1].nbytes))
    for start in range(0, len(rows), block):
        piece = np.asarray(data[rows[start : start + block]], dtype=np.float64) - guess[:, None]
        total += piece.sum(axis=(0, 2))
        squares += np.square(piece).sum(axis=(0, 2))
    n = len(rows) * data.shape[-1]
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    std = np.where(std > 1e-12 * np.maximum(np.abs(guess), 1e-30), std, 1.0)
    return ZScore((guess + mean)[:, None].astype(np.float32), std[:, None].astype(np.float32))


@dataclass(frozen=True)
class ChannelScales:
    """Centre and scale of the channels in each group of trials.

    Parameters
    ----------
    groups
        Subject, or subject and session.
    centre, scale : float32 arrays of shape (n_groups, n_channels)
    unit
        ``z``, or ``IQR`` (interquartile ranges).
    """

    groups: tuple[tuple[str, ...], ...]
    centre: np.ndarray
    scale: np.ndarray
    unit: str


def scale_trials(
    held: ArrayFile, target: ArrayFile, trials: pd.DataFrame, config: ScalingConfig
) -> ChannelScales:
    """Scale the trials of `held`, group by group, into the same rows of `target`, which may be the same file.

    Raises
    ------
    DataError
        If a group has no training trial.
    """
    keys = ["subject"] if config.per == "subject" else ["subject", "session"]
    is_train = trials["split"].to_numpy() == "train"
    data = np.load(held.path, mmap_mode="r", allow_pickle=False)
    groups, centres, scales = [], [], []
    for group, rows in trials.groupby(keys, sort=False).indices.items():
        name = tuple(map(str, group)) if isinstance(group, tuple) else (str(group),)
        training = rows[is_train[rows]]
        if not len(training):
            raise DataError(
                f"{' '.join(f'{k} {v}' for k, v in zip(keys, name, strict=True))} has no training trial to scale by; "
                "leave dataset.scaling out, or set dataset.scaling.per to subject."
            )
        scaler = _fit(data, np.sort(training), config)
        for start, stop in _iterate_runs(np.sort(rows)):
            target.write(start, scaler.apply(held.read(start, stop)))
        groups.append(name)
        centres.append(scaler.centre)
        scales.append(scaler.scale)
    unit = "z" if config.method == "zscore" else "IQR"
    return ChannelScales(tuple(groups), np.stack(centres), np.stack(scales), unit)


def _fit(data: np.ndarray, rows: np.ndarray, config: ScalingConfig) -> RobustScaler:
    if config.method == "robust":
        return fit_robust_scaler(data, rows, clamp=config.clamp)
    score = fit_channel_zscore(data, rows)
    return RobustScaler(score.mean[:, 0], score.std[:, 0], config.clamp)


def _iterate_runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the bounds of blocks of neighbouring rows."""
    # Rows of one session lie together, but a session may be spread over the file.
    blocks = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        first, last = int(run[0]), int(run[-1]) + 1
        blocks += [(start, min(start + BLOCK_TRIALS, last)) for start in range(first, last, BLOCK_TRIALS)]
    return blocks


def split_rows(n: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of `n` trials that hold `row` numbers each."""
    size = max(1, _BLOCK_BYTES // (4 * row))
    for first in range(0, n, size):
        yield first, min(first + size, n)


class FeatureMoments:
    """Sums over trials of each feature; with a time axis, over times too, so that a response keeps its shape."""

    def __init__(self, first: np.ndarray) -> None:
        # Raw BOLD sits on a large baseline, which would eat the digits of a sum of squares.
        self.shift = first.reshape(len(first), -1).mean(axis=1, dtype=np.float64)
        self.n_trials = self.n = 0
        self.total, self.squares = np.zeros(len(first)), np.zeros(len(first))

    def add(self, block: np.ndarray) -> None:
        """Add trials of shape (n_trials, n_features[, n_times])."""
        # (n_trials, n_features[, n_times]) -> (n_trials, n_features, n_times or 1)
        wide = block.reshape(*block.shape[:2], -1) - self.shift[:, None]
        self.n_trials += len(wide)
        self.n += wide.shape[0] * wide.shape[2]
        self.total += wide.sum(axis=(0, 2))
        self.squares += np.einsum("nft,nft->f", wide, wide)

    def finish(self) -> FeatureStatistics:
        """Return mean and variance."""
        mean = self.total / self.n
        return FeatureStatistics(mean + self.shift, np.maximum(self.squares / self.n - mean**2, 0))


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and variance of each feature, shape (n_features,)."""

    mean: np.ndarray
    variance: np.ndarray

    @property
    def is_constant(self) -> np.ndarray:
        """Features that do not vary beyond rounding, shape (n_features,)."""
        return np.sqrt(self.variance) <= 1e-6 * np.maximum(1e-6, np.abs(self.mean))

    def apply(self, block: np.ndarray) -> np.ndarray:
        """Return the standardised trials as float32; constant features become 0."""
        gain = np.where(self.is_constant, 0, 1 / np.sqrt(np.where(self.is_constant, 1, self.variance)))
        shape = (len(gain), *[1] * (block.ndim - 2))
        # Subtract in float64: the mean of raw BOLD has more digits than float32 keeps.
        return ((block - self.mean.reshape(shape)) * gain.reshape(shape)).astype(np.float32)


def pool_statistics(scales: list[FeatureStatistics]) -> FeatureStatistics:
    """Return mean and spread of a typical session: the mean over sessions, each with the same weight."""
    return FeatureStatistics(
        np.mean([s.mean for s in scales], axis=0), np.mean([s.variance for s in scales], axis=0)
    )


def fit_rows(held: ArrayFile, rows: np.ndarray) -> FeatureStatistics:
    """Return the statistics of ascending rows."""
    moments: FeatureMoments | None = None
    for _, block in read_rows(held, rows):
        moments = moments or FeatureMoments(block[0])
        moments.add(block)
    assert moments is not None
    return moments.finish()


def standardise_rows(
    scale: FeatureStatistics, held: ArrayFile, base: int, target: ArrayFile, start: int, rows: np.ndarray
) -> None:
    """Standardise `rows` of `held`, counted from `base`, into the rows of `target` counted from `start`."""
    for picked, block in read_rows(held, base + rows):
        values = scale.apply(block)
        to = picked - base + start
        # Neighbouring rows are written at once.
        for run in np.split(np.arange(len(to)), np.flatnonzero(np.diff(to) > 1) + 1):
            target.write(int(to[run[0]]), values[run])


def read_rows(held: ArrayFile, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of ascending rows: their numbers and their values."""
    low, high = int(rows[0]), int(rows[-1]) + 1
    for first, last in split_rows(high - low, int(np.prod(held.shape[1:]))):
        inside = rows[(rows >= low + first) & (rows < low + last)]
        if len(inside):
            yield inside, held.read(low + first, low + last)[inside - low - first]
