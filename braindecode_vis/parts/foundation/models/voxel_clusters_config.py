"""Settings of Brain-IT's transformer of voxel clusters; imports no torch.

References
----------
Brain-IT, arXiv:2510.25976.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, TrialPairs

if TYPE_CHECKING:
    import torch


class VoxelClustersConfig(NetworkSettings):
    """Brain-IT: voxels of all subjects in shared clusters, whose tokens a transformer turns into tokens of the image.

    A new subject is added by some of its trials (`NetworkEncoder.adapt`, or the method ``fine_tuned`` of ``few_shot``):
    each of its voxels takes the cluster and the code of the nearest known voxel, and then its codes alone are trained.

    Parameters
    ----------
    n_tokens
        The outputs are this many tokens of equal size: 49 of the packaged network at 7 x 7 places
        (``target.pooling: patches``), 256 of OpenCLIP ViT-bigG (the paper), 1 for a target of one vector.
    n_clusters
        Clusters that voxels of all subjects form (128).
    width
        Size of a voxel's code and of a token (512).
    depth
        Pairs of a self-attention block of the clusters and a cross-attention block of the outputs (5), after a first
        cross-attention.
    n_heads
        Heads of both (8).
    code_size, code_width
        Values of a voxel's code in the universal encoder, by which voxels are grouped (256), and size that image tokens
        are mapped to in it (128). Its time grows with the square of the latter, its memory with voxels times images.
    code_updates, new_code_updates
        Steps in which that encoder is fitted with the codes of all training subjects, and in which codes of a new
        subject's voxels are fitted to it; choices of ours, where the paper takes 30 epochs for both.
    """

    kind: Literal["voxel_clusters"] = "voxel_clusters"
    n_tokens: int = Field(default=1, ge=1)
    n_clusters: int = Field(default=128, ge=2)
    width: int = Field(default=512, ge=1)
    depth: int = Field(default=5, ge=0)
    n_heads: int = Field(default=8, ge=1)
    code_size: int = Field(default=256, ge=1)
    code_width: int = Field(default=128, ge=1)
    code_updates: int = Field(default=3000, ge=1)
    new_code_updates: int = Field(default=500, ge=1)

    preparation_steps: ClassVar[str] = "code_updates"

    @model_validator(mode="after")
    def _check_heads(self) -> VoxelClustersConfig:
        if self.width % self.n_heads:
            raise ValueError(
                f"width must be a multiple of n_heads, but {self.width} is not a multiple of {self.n_heads}"
            )
        return self

    def fit_responses(
        self, n_features: Mapping[str, int], trials: TrialPairs, seed: int, folder: Path
    ) -> Callable[[int, np.ndarray], np.ndarray]:
        """Fit the universal encoder to all subjects; see `NetworkSettings.fit_responses`."""
        from braindecode_vis.parts.foundation.models.voxel_clusters import fit_universal

        return fit_universal(
            n_features, trials, seed, folder, n_tokens=self.n_tokens, code_sizes=(self.code_size, self.code_width),
            updates=self.code_updates,
        )  # fmt: skip

    def build(self, signal: Signal, n_outputs: int) -> torch.nn.Module:
        """Return the network, whose voxels have no clusters yet.

        Parameters
        ----------
        signal
            Needs a voxel or a parcel axis. Where subjects have different numbers of voxels, the first ``n_voxels``
            values of a row are the subject's own and the rest is padding.
        n_outputs
            Size of the output, all tokens together.

        Raises
        ------
        ConfigError, DataError
            If the outputs do not part into tokens, or the axes are of another kind.
        """
        from braindecode_vis.parts.foundation.models.voxel_clusters import VoxelClusters

        return VoxelClusters(
            signal, n_outputs, n_tokens=self.n_tokens, n_clusters=self.n_clusters, width=self.width, depth=self.depth,
            n_heads=self.n_heads, code_sizes=(self.code_size, self.code_width),
            updates=(self.code_updates, self.new_code_updates),
        )  # fmt: skip
