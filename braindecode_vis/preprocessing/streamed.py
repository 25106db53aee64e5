"""Standardising trials that lie on disk: rows in a file, and statistics summed block by block.

Owns a ``.npy`` file that is written and read in blocks of rows, and mean and variance of each feature over chosen
trials. Knows nothing of sessions or splits: which trials teach is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from braindecode_vis.checks import DataError

_BLOCK_BYTES = 32 << 20
_FLOAT16_MAX = 65504.0


class RowFile:
    """A ``.npy`` file of which only a block of rows is mapped at a time, so that it never counts as memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def write(self, start: int, values: np.ndarray) -> None:
        """Write rows from `start` on."""
        if self.dtype == np.float16 and np.abs(values).max(initial=0) > _FLOAT16_MAX:
            raise DataError("a response is too large for float16; set dataset.dtype to float32.")
        np.load(self.path, mmap_mode="r+", allow_pickle=False)[start : start + len(values)] = values

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` as float32."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[start:stop], dtype=np.float32)


def split_rows(n: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of blocks of `n` trials that hold `row` numbers each."""
    size = max(1, _BLOCK_BYTES // (4 * row))
    for first in range(0, n, size):
        yield first, min(first + size, n)


class Moments:
    """Sums over trials of each feature; with a time axis, over times too, so that a response keeps its shape."""

    def __init__(self, first: np.ndarray) -> None:
        # Raw BOLD sits on a large baseline, which would eat the digits of a sum of squares.
        self.shift = first.reshape(len(first), -1).mean(axis=1, dtype=np.float64)
        self.n_trials = self.n = 0
        self.total, self.squares = np.zeros(len(first)), np.zeros(len(first))

    def add(self, block: np.ndarray) -> None:
        """Add trials of shape (n_trials, n_features[, n_times])."""
        wide = block.reshape(*block.shape[:2], -1) - self.shift[:, None]
        self.n_trials += len(wide)
        self.n += wide.shape[0] * wide.shape[2]
        self.total += wide.sum(axis=(0, 2))
        self.squares += np.einsum("nft,nft->f", wide, wide)

    def finish(self) -> Scale:
        """Return mean and variance."""
        mean = self.total / self.n
        return Scale(mean + self.shift, np.maximum(self.squares / self.n - mean**2, 0))


@dataclass(frozen=True)
class Scale:
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
        # The mean of raw BOLD has more digits than float32 keeps.
        return ((block - self.mean.reshape(shape)) * gain.reshape(shape)).astype(np.float32)


def pool_scales(scales: list[Scale]) -> Scale:
    """Return the level and spread of an ordinary session."""
    return Scale(np.mean([s.mean for s in scales], axis=0), np.mean([s.variance for s in scales], axis=0))


def fit_rows(held: RowFile, rows: np.ndarray) -> Scale:
    """Return the statistics of ascending rows."""
    moments: Moments | None = None
    for _, block in read_rows(held, rows):
        moments = moments or Moments(block[0])
        moments.add(block)
    assert moments is not None
    return moments.finish()


def apply_scale(
    scale: Scale, held: RowFile, base: int, target: RowFile, start: int, rows: np.ndarray
) -> None:
    """Standardise `rows` of `held`, counted from `base`, into the rows of `target` counted from `start`."""
    for picked, block in read_rows(held, base + rows):
        values = scale.apply(block)
        to = picked - base + start
        for run in np.split(np.arange(len(to)), np.flatnonzero(np.diff(to) > 1) + 1):
            target.write(int(to[run[0]]), values[run])


def read_rows(held: RowFile, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of ascending rows: their numbers and their values."""
    low, high = int(rows[0]), int(rows[-1]) + 1
    for first, last in split_rows(high - low, int(np.prod(held.shape[1:]))):
        inside = rows[(rows >= low + first) & (rows < low + last)]
        if len(inside):
            yield inside, held.read(low + first, low + last)[inside - low - first]
