"""Fronts of foundation models of fMRI: order of parcels, repetition time, cut and scaling.

Nothing here learns. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.base.devices import autocast


class ParcelFront(nn.Module):
    """Parcels in a model's order at its repetition time, scaled as it was pretrained.

    Parameters
    ----------
    rows
        Own row of each of the model's parcels.
    frames : array of shape (n_times, n_frames)
        Interpolates in time by a product from the right.
    scaling
        ``none``; ``trial`` takes mean and deviation over all values of a trial away; ``frame`` those over the parcels
        of each frame, and cuts at 3 deviations.
    divisor
        Of the values, before the scaling.
    """

    rows: Tensor
    frames: Tensor

    def __init__(self, rows: Sequence[int], frames: np.ndarray, *, scaling: str, divisor: float) -> None:
        super().__init__()
        self.register_buffer("rows", torch.as_tensor(rows, dtype=torch.long), persistent=False)
        self.register_buffer("frames", torch.as_tensor(frames, dtype=torch.float32), persistent=False)
        self.scaling, self.divisor = scaling, divisor

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_parcels, n_times) to (batch, n_model_parcels, n_frames)."""
        with autocast(data.device):
            data = data.float()[:, self.rows] @ self.frames / self.divisor
            if self.scaling == "none":
                return data
            axes = (1, 2) if self.scaling == "trial" else (1,)
            centre, spread = data.mean(dim=axes, keepdim=True), data.std(dim=axes, keepdim=True)
            data = (data - centre) / (spread + 1e-6)
            return data.clamp(-3, 3) if self.scaling == "frame" else data


class VolumeFront(nn.Module):
    """Volumes of a model from the voxels of a brain, as z-scores of each trial.

    Parameters
    ----------
    voxels : integer array of shape (x, y, z)
        Own voxel in each place of the model's volume; -1 where there is none.
    frames : array of shape (n_times, n_frames)
        Interpolates in time by a product from the right.
    """

    voxels: Tensor
    frames: Tensor

    def __init__(self, voxels: np.ndarray, frames: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("voxels", torch.as_tensor(voxels, dtype=torch.long), persistent=False)
        self.register_buffer("frames", torch.as_tensor(frames, dtype=torch.float32), persistent=False)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_voxels, n_times) to (batch, 1, x, y, z, n_frames)."""
        with autocast(data.device):
            inside = self.voxels >= 0
            brain = data.float()[:, self.voxels[inside]] @ self.frames  # (batch, n_inside, n_frames)
            centre, spread = brain.mean(dim=(1, 2), keepdim=True), brain.std(dim=(1, 2), keepdim=True)
            brain = (brain - centre) / (spread + 1e-6)
            # Around the brain stands its least value, as in the pretraining.
            low = brain.amin(dim=(1, 2))[:, None, None, None, None]
            volume = low.expand(-1, *self.voxels.shape, brain.shape[2]).clone()
            volume[:, inside] = brain
        return volume[:, None]


def find_voxels(
    ids: np.ndarray, grid: Sequence[int], affine: np.ndarray, shape: Sequence[int], target: np.ndarray
) -> np.ndarray:
    """Return the nearest own voxel of each place of a volume, -1 outside of the own voxels.

    Parameters
    ----------
    ids : integer array of shape (n_voxels,)
        Place of each own voxel in its flattened grid, C order.
    grid, affine
        Shape of the own grid, and the map from its indices to mm, shape (4, 4).
    shape, target
        The same of the volume.

    Examples
    --------
    >>> find_voxels(np.array([1, 2]), (1, 1, 3), np.eye(4), (1, 1, 2), np.eye(4)).ravel()
    array([-1,  0])
    """
    row = np.full(int(np.prod(grid)), -1)
    row[ids] = np.arange(len(ids))
    places = np.indices(shape).reshape(3, -1)
    to_own = np.linalg.inv(affine) @ target
    own = np.rint(to_own[:3, :3] @ places + to_own[:3, 3:]).astype(int)
    inside = ((own >= 0) & (own < np.reshape(grid, (3, 1)))).all(axis=0)
    flat = np.ravel_multi_index(tuple(own[:, inside]), tuple(grid))
    found = np.full(places.shape[1], -1)
    found[inside] = row[flat]
    return found.reshape(shape)
