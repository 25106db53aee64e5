"""A space shared by subjects with voxels of their own: the encoder of MindEye2.

Owns the configuration; the modules, and the adaptation to a new subject, are in `voxel_layers`, so that torch is
loaded only by `build`.

References
----------
Scotti et al. (2024), arXiv:2403.11207 (MindEye2).
Tolstikhin et al. (2021), arXiv:2105.01601 (MLP-Mixer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.encoders.signal import Signal
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    import torch


class SharedSpaceConfig(Settings):
    """One ridge layer per subject into a shared space, residual MLP-mixer blocks, linear, projector.

    Parameters
    ----------
    shared
        Size of the shared space (MindEye2: 4096).
    n_slots
        Vectors of that size per trial, between which the mixer's second half mixes. Single-trial MindEye2 has 1;
        then there is nothing to mix between, and that half is left out. (As released, each half adds to the input of
        the *same half of the previous block*, and with one slot the second half normalises a single number, which
        is constant: the blocks drop out of the result. Here each half adds to its own input.)
    n_blocks, dropout
        Mixer blocks (4) and the dropout in each of their halves (0.15).
    heads
        ``two``: the last linear layer is the output of the regression (what a prior sees), the projector after it
        that of the contrast, as in MindEye2. ``one``: the projector's output only, or with ``projector: false`` the
        linear layer's.
    projector
        Whether the projector follows.
    n_tokens
        The outputs are this many tokens of equal size (OpenCLIP ViT-bigG: 256 x 1664); the projector works on each
        and is as wide as a token.
    ridge
        Weight decay of the subjects' layers (unverified: 0.01). With AdamW it shrinks the weights toward 0 as ridge
        does, but is not the same penalty.
    weight_decay
        Of all other matrices (unverified: 0.01); biases and norms have none.
    """

    kind: Literal["shared_space"] = "shared_space"
    shared: int = Field(default=4096, ge=1)
    n_slots: int = Field(default=1, ge=1)
    n_blocks: int = Field(default=4, ge=0)
    dropout: float = Field(default=0.15, ge=0, lt=1)
    heads: Literal["one", "two"] = "one"
    projector: bool = True
    n_tokens: int = Field(default=1, ge=1)
    ridge: float = Field(default=0.01, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)

    has_regression_head: ClassVar[bool] = True

    def build(self, signal: Signal, n_outputs: int, n_regression: int | None = None) -> torch.nn.Module:
        """Return the network; its `parameter_groups` give each parameter its weight decay.

        Parameters
        ----------
        signal
            Needs a voxel or a parcel axis. Where subjects have different numbers of voxels, the first
            ``n_voxels`` values of a row are the subject's own and the rest is padding.
        n_outputs
            Size of the contrastive output, all tokens together.
        n_regression
            Size of the regression output, by default `n_outputs`; only with ``heads: two``.

        Raises
        ------
        ConfigError, DataError
            If the outputs do not part into tokens, a regression is asked of one head, or the axes are of another
            kind.
        """
        from braindecode_vis.encoders.voxel_layers import SharedSpace

        return SharedSpace(self, signal, n_outputs, n_regression)
