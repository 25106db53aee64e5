"""Stimulus features that drive the simulated responses: three families of them.

Early drive is Gabor energy on a retinotopic grid (Adelson and Bergen 1985, doi:10.1364/JOSAA.2.000284), mid-level
drive is colour, contrast and curvature statistics pooled on a coarser grid (in the spirit of Portilla and Simoncelli
2000, doi:10.1023/A:1026553619983), and semantic drive is a whitened projection of the features of higher regions: the
image embeddings that the caller gives, or features that no image encoder computes (`DRIVES`). Owns the arrays
``drive_*.npy`` of the ground truth: the drive is computed once and read by later calls, so that a continued call
simulates the same brains even if the image encoder gives other values then. Brains and networks that compute embeddings
are in other modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError, check_finite, check_unique
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import replace_atomically

_BLOCK = 256  # images whose features are computed at a time
IMAGE_SIZE = 64  # images are shrunk to this side: the finest Gabor has 16 cycles, four pixels each
EARLY_GRID = 8
N_ORIENTATIONS = 4
SCALES_CYCLES = (16.0, 8.0, 4.0)  # cycles per image
MID_GRID = 4
MID_STATISTICS = (
    "luminance",
    "red-green",
    "blue-yellow",
    "saturation",
    "contrast",
    "anisotropy",
    "curvature",
)
N_EARLY = EARLY_GRID**2 * N_ORIENTATIONS * len(SCALES_CYCLES)
N_MID = MID_GRID**2 * len(MID_STATISTICS)
DRIVES = {
    "embedded": "the packaged image network, which a decoder may have as its target",
    "colours": "mean colours of an 8 x 8 layout",
    "gabor": "Gabor energies on an 8 x 8 grid, as in primary visual cortex",
    "random_network": "a convolutional network with random weights",
    "mixture": "colours, Gabor energies and the random network, each in its own regions",
}
"""Features to which the higher regions of a simulated brain respond."""
MIXED = ("colours", "gabor", "random_network")
"""Sources of a mixture: column i of its semantic drive belongs to source i modulo three."""


@dataclass(frozen=True, eq=False)
class StimulusDrive:
    """Standardised features of every image, one row per image.

    Parameters
    ----------
    ids : sequence of length n_stimuli
        Stimulus ids, unique.
    early : float32 array of shape (n_stimuli, N_EARLY)
        Gabor energy; features are ordered (grid row, grid column, scale, orientation).
    mid : float32 array of shape (n_stimuli, N_MID)
        Mid-level statistics; ordered (grid row, grid column, statistic).
    semantic : float32 array of shape (n_stimuli, n_semantic)
        Latent dimensions of the image embeddings.
    is_train : boolean array of shape (n_stimuli,)
        Images whose mean and spread are used to standardise the features and to calibrate the signal-to-noise ratio.

    Raises
    ------
    DataError
        If lengths disagree, an id repeats or a value is not finite.
    """

    ids: np.ndarray
    early: np.ndarray
    mid: np.ndarray
    semantic: np.ndarray
    is_train: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=object))
        check_unique(self.ids.tolist(), what="stimulus_id of the stimulus drive")
        for name in ("early", "mid", "semantic", "is_train"):
            value = getattr(self, name)
            if len(value) != len(self.ids):
                raise DataError(f"{name} drive has {len(value)} rows for {len(self.ids)} stimuli.")
            check_finite(value, what=f"the {name} drive", row_names=list(self.ids), unit="stimulus")
        if not self.is_train.any():
            raise DataError("the stimulus drive names no training image, so nothing can be standardised.")

    def __len__(self) -> int:
        return len(self.ids)


def make_drive(
    images: Iterable[np.ndarray],
    embeddings: np.ndarray | None,
    ids: Sequence[str],
    *,
    is_train: np.ndarray | None = None,
    n_semantic: int = 32,
    kind: str = "embedded",
) -> StimulusDrive:
    """Compute the drive of a set of images.

    Parameters
    ----------
    images : iterable of uint8 arrays of shape (height, width, 3)
        The images, in the order of `ids`; read once, in blocks.
    embeddings : array of shape (n_stimuli, n_features) or None
        One vector per image from any image encoder; used only by the kind ``embedded``.
    ids
        Stimulus ids.
    is_train : boolean array of shape (n_stimuli,), optional
        Images on which means, spreads and the projection are fitted; all of them by default.
    n_semantic
        Latent dimensions to keep; fewer if the training embeddings span fewer.
    kind
        One of `DRIVES`.
    """
    train = np.ones(len(ids), bool) if is_train is None else np.asarray(is_train, bool)
    features = (_compute_features(block, kind) for block in _iterate_blocks(images))
    return _join_features(features, embeddings, ids, train, n_semantic, kind)


def _compute_features(images: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Return the features of a block of images: early, mid, and those of each source of a kind."""
    energy = compute_gabor_energy(images)
    found = {"early": energy, "mid": compute_mid_features(images, energy)}
    for name in _list_sources(kind):
        found[name] = energy if name == "gabor" else _FOREIGN[name](images)
    return found


def _list_sources(kind: str) -> tuple[str, ...]:
    """Return the sources of the features of higher regions; none if they are the given embeddings."""
    return {"embedded": (), "mixture": MIXED}.get(kind, (kind,))


def _join_features(
    blocks: Iterable[dict[str, np.ndarray]],
    embeddings: np.ndarray | None,
    ids: Sequence[str],
    train: np.ndarray,
    n_semantic: int,
    kind: str,
) -> StimulusDrive:
    """Return the drive from the features of blocks of images."""
    sources, kept = _list_sources(kind), list(blocks)
    early, mid = ([block[name] for block in kept] for name in ("early", "mid"))
    if embeddings is not None:
        n_vectors = len(embeddings)
    else:  # the kinds that have sources need none
        n_vectors = len(ids) if sources else 0
    if sum(map(len, early)) != len(ids) or n_vectors != len(ids) or len(train) != len(ids):
        raise DataError(
            f"{sum(map(len, early))} images, {n_vectors} embeddings and {len(train)} training flags were given "
            f"for {len(ids)} stimulus ids: one of each is needed per image."
        )
    if sources:
        n_each = -(-n_semantic // len(sources))
        latents = [
            project_embeddings(np.concatenate([block[name] for block in kept]), train, n_each)
            for name in sources
        ]
        n_each = min(each.shape[1] for each in latents)
        # columns alternate: (stimulus, component, source) -> (stimulus, component * source)
        semantic = np.stack([each[:, :n_each] for each in latents], axis=2).reshape(len(ids), -1)
    else:
        assert embeddings is not None
        semantic = project_embeddings(embeddings, train, n_semantic)
    return StimulusDrive(
        ids=np.asarray(ids, dtype=object),
        early=standardise(np.concatenate(early), train),
        mid=standardise(np.concatenate(mid), train),
        semantic=semantic,
        is_train=train,
    )


def compute_gabor_energy(images: np.ndarray) -> np.ndarray:
    """Return log Gabor energy pooled on a grid, float32 of shape (n_images, N_EARLY).

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3)
        Any size; resampled to 64 x 64 grey values by box averaging.

    Examples
    --------
    >>> compute_gabor_energy(np.zeros((2, 96, 96, 3), np.uint8)).shape == (2, N_EARLY)
    True
    """
    from scipy import fft

    # Luma of ITU-R BT.601; without its mean, so that the border of the image is not an edge.
    grey = _shrink(images) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = grey - grey.mean(axis=(1, 2), keepdims=True)
    spectrum = fft.fft2(grey)  # (n_images, size, size)
    bank = _make_gabor_bank()
    pooled = np.empty((len(grey), EARLY_GRID, EARLY_GRID, len(bank)), np.float32)
    for number, (kept, transfer) in enumerate(bank):
        # Coarse filters pass only low frequencies, so their output needs fewer pixels.
        response = fft.ifft2(spectrum[:, kept[:, None], kept[None]] * transfer)
        energy = response.real**2 + response.imag**2
        cell = len(kept) // EARLY_GRID
        # (image, row, row in cell, column, column in cell) -> (image, row, column)
        energy = energy.reshape(-1, EARLY_GRID, cell, EARLY_GRID, cell).mean(axis=(2, 4))
        pooled[..., number] = np.log10(energy + 1e-5)  # compression, floor near one grey level of contrast
    return pooled.reshape(len(grey), -1)  # (n_images, row * column * scale * orientation)


def compute_mid_features(images: np.ndarray, energy: np.ndarray | None = None) -> np.ndarray:
    """Return colour, contrast and curvature statistics on a 4 x 4 grid, float32 of shape (n_images, N_MID).

    Parameters
    ----------
    images : uint8 array of shape (n_images, height, width, 3)
        Any size.
    energy : float32 array of shape (n_images, N_EARLY), optional
        Result of `compute_gabor_energy` for the same images, to avoid its repetition.
    """
    small = _shrink(images)
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    grey = small.mean(axis=-1)
    planes = np.stack(
        [grey, red - green, blue - (red + green) / 2, small.max(axis=-1) - small.min(axis=-1)], axis=-1
    )
    cell = IMAGE_SIZE // MID_GRID
    # (image, row, row in cell, column, column in cell, plane) -> (image, row, column, plane)
    means = planes.reshape(-1, MID_GRID, cell, MID_GRID, cell, planes.shape[-1]).mean(axis=(2, 4))
    contrast = grey.reshape(-1, MID_GRID, cell, MID_GRID, cell).std(axis=(2, 4))
    log_energy = compute_gabor_energy(images) if energy is None else energy
    per_cell = EARLY_GRID // MID_GRID
    # row, row in cell, column, column in cell, scale, orientation
    grid = log_energy.reshape(-1, MID_GRID, per_cell, MID_GRID, per_cell, len(SCALES_CYCLES), N_ORIENTATIONS)
    anisotropy = grid.std(axis=-1).mean(axis=(2, 4, 5))
    # Curved contours change their orientation profile between neighbouring cells; straight ones do not.
    curvature = (grid - grid.mean(axis=-1, keepdims=True)).std(axis=(2, 4)).mean(axis=(3, 4))
    statistics = np.concatenate(
        [means, np.log(contrast + 1e-2)[..., None], anisotropy[..., None], curvature[..., None]], axis=-1
    )
    return statistics.reshape(len(small), -1).astype(np.float32)


def compute_colours(images: np.ndarray) -> np.ndarray:
    """Return the mean colours of an 8 x 8 layout, float32 of shape (n_images, 192)."""
    small, cell = _shrink(images), IMAGE_SIZE // EARLY_GRID
    # (image, row, row in cell, column, column in cell, colour) -> (image, row * column * colour)
    cells = small.reshape(-1, EARLY_GRID, cell, EARLY_GRID, cell, 3).mean(axis=(2, 4))
    return cells.reshape(len(small), -1)


def compute_random_network(images: np.ndarray) -> np.ndarray:
    """Return the output of a random convolutional network, float32 of shape (n_images, 512).

    Three layers of 3 x 3 kernels, stride 2, rectified, averaged over 2 x 2 quarters. The weights are drawn once (He et
    al. 2015, arXiv 1502.01852) and are the same in every simulation.
    """
    generator = make_generator(0, "random network")
    maps = _shrink(images) - 0.5
    for n_maps in (32, 64, 128):
        n_inputs = 9 * maps.shape[-1]
        weights = generator.standard_normal((n_inputs, n_maps)).astype(np.float32) * np.sqrt(2 / n_inputs)
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        # (image, row, column, map, 3, 3), every second row and column
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
        maps = np.maximum(patches.reshape(*patches.shape[:3], n_inputs) @ weights, 0)
    half = maps.shape[1] // 2
    quarters = maps.reshape(len(maps), 2, half, 2, half, -1).mean(axis=(2, 4))
    return np.log(quarters + 1e-3).reshape(len(maps), -1).astype(np.float32)


_FOREIGN = {"colours": compute_colours, "random_network": compute_random_network}


def project_embeddings(embeddings: np.ndarray, is_train: np.ndarray, n_semantic: int) -> np.ndarray:
    """Return whitened principal components of embeddings, float32 of shape (n_stimuli, <= n_semantic).

    Mean, directions and spreads come from the rows flagged in `is_train` only.
    """
    vectors = np.asarray(embeddings, np.float64).reshape(len(embeddings), -1)
    mean = vectors[is_train].mean(axis=0)
    _, sizes, directions = np.linalg.svd(vectors[is_train] - mean, full_matrices=False)
    # Directions that the training images do not span would be whitened noise.
    n_kept = max(1, min(n_semantic, int((sizes > 1e-6 * max(sizes[0], 1e-30)).sum())))
    scores = (vectors - mean) @ directions[:n_kept].T
    return standardise(scores, is_train)


def standardise(features: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Return features standardised with mean and spread of the training rows, float32, clipped at eight spreads."""
    mean, spread = features[is_train].mean(axis=0), features[is_train].std(axis=0)
    # A feature that never varies in training has no information, and would become huge on other images.
    usable = spread > 1e-4 * max(float(spread.max()), 1e-30)
    scaled = np.where(usable, (features - mean) / np.where(usable, spread, 1.0), 0.0)
    return np.clip(scaled, -8, 8).astype(np.float32)  # a single odd image must not dominate a brain


def _iterate_blocks(images: Iterable[np.ndarray], size: int = _BLOCK) -> Iterator[np.ndarray]:
    block: list[np.ndarray] = []
    for image in images:
        small = _shrink(np.asarray(image)[None])[0]
        block.append(np.round(small * 255).astype(np.uint8))
        if len(block) == size:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def _shrink(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DataError(
            f"images must be uint8 of shape (n_images, height, width, 3), not {images.dtype} {images.shape}."
        )
    shrunk = images.astype(np.float32) / 255
    for axis in (1, 2):
        weights = _make_resampling(shrunk.shape[axis])
        if weights is not None:
            shrunk = np.moveaxis(np.tensordot(shrunk, weights, axes=(axis, 1)), -1, axis)
    return shrunk


@lru_cache(maxsize=16)
def _make_resampling(length: int) -> np.ndarray | None:
    """Return the box-average weights from `length` pixels to `IMAGE_SIZE`, or None if the length is already right."""
    if length == IMAGE_SIZE:
        return None
    edges = np.linspace(0, length, IMAGE_SIZE + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)[None]
    # Share of each old pixel in each new one: exact for any size, and free of aliasing.
    overlap = np.clip(np.minimum(right, pixels + 1) - np.maximum(left, pixels), 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=1)
def _make_gabor_bank() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return the kept frequencies and the one-sided transfer function of each Gabor filter.

    One-sided, so that the output is complex and its squared modulus is the energy.
    """
    frequency = np.fft.fftfreq(IMAGE_SIZE, 1 / IMAGE_SIZE)
    bank = []
    for cycles in SCALES_CYCLES:
        size = min(IMAGE_SIZE, int(4 * cycles))
        kept = np.flatnonzero((frequency >= -size // 2) & (frequency < size // 2))
        fx, fy = np.meshgrid(frequency[kept], frequency[kept])
        for number in range(N_ORIENTATIONS):
            angle = np.pi * number / N_ORIENTATIONS
            # Rotated frequencies; only positive ones along the carrier pass.
            along = fx * np.cos(angle) + fy * np.sin(angle)
            across = -fx * np.sin(angle) + fy * np.cos(angle)
            width = cycles * 0.4  # about one octave, as in primary visual cortex
            transfer = np.exp(-((along - cycles) ** 2 + across**2) / (2 * width**2))
            transfer *= (size / IMAGE_SIZE) ** 2  # the inverse transform divides by the number of pixels
            bank.append((kept, transfer.astype(np.float32)))
    return tuple(bank)


Embed = Callable[[StimulusSet], np.ndarray]
_FEATURES = ("early", "mid", "semantic")


def compute_drive(
    table: pd.DataFrame,
    root: Path,
    truth: Path,
    *,
    embed: Embed,
    n_semantic: int,
    kind: str = "embedded",
    spread: Callable[..., Iterable[Any]] = map,
) -> StimulusDrive:
    """Return the drive of the images, from the ground truth if an earlier call has stored it there.

    `spread` is `map`, or that of several processes.

    Raises
    ------
    DataError
        If `embed` does not give one finite vector per image.
    """
    is_train = (table["split"] == "train").to_numpy()
    paths = {name: truth / f"drive_{name}.npy" for name in _FEATURES}
    if all(path.is_file() for path in paths.values()):
        kept = {name: np.load(path, allow_pickle=False) for name, path in paths.items()}
        return StimulusDrive(table["stimulus_id"].to_numpy(object), **kept, is_train=is_train)
    stimuli = StimulusSet(table.reset_index(drop=True), root)
    vectors = _embed(stimuli, embed) if kind == "embedded" else None
    parts = [table.iloc[start : start + _BLOCK] for start in range(0, len(table), _BLOCK)]
    features = spread(partial(_read_features, root=root, kind=kind), parts)
    drive = _join_features(features, vectors, table["stimulus_id"].tolist(), is_train, n_semantic, kind)
    for name, path in paths.items():
        with replace_atomically(path) as temporary:
            np.save(temporary, getattr(drive, name), allow_pickle=False)
    return drive


def _read_features(part: pd.DataFrame, root: Path, kind: str) -> dict[str, np.ndarray]:
    """Return the features of the images of a part of a table, which is one block."""
    images = StimulusSet(part.reset_index(drop=True), root).iterate_images()
    return _compute_features(next(_iterate_blocks(images)), kind)


def _embed(stimuli: StimulusSet, embed: Embed) -> np.ndarray:
    vectors = np.asarray(embed(stimuli))
    vectors = vectors.reshape(len(vectors), -1) if vectors.ndim > 2 else vectors
    if vectors.ndim != 2 or len(vectors) != len(stimuli) or not np.isfinite(vectors).all():
        raise DataError(
            f"the image encoder must give one finite vector for each of the {len(stimuli)} images of the phantom, "
            f"but gave an array of shape {vectors.shape}."
        )
    return vectors
