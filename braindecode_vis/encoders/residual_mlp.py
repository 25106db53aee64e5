"""Residual multilayer perceptron for fMRI: the backbone of MindEye.

Owns the configuration; the module is in `voxel_layers`, so that torch is loaded only by `build`. One network for
one set of columns: subjects with voxels of their own belong to `shared_space`.

References
----------
Scotti et al. (2023), arXiv:2305.18274 (MindEye).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.encoders.signal import Signal
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    import torch


class ResidualMlpConfig(Settings):
    """Linear, LayerNorm, GELU, dropout; residual blocks of the same; linear; an optional projector.

    Parameters
    ----------
    hidden
        Width (MindEye: 4096).
    n_blocks
        Residual blocks (4).
    input_dropout, block_dropout
        After the first layer (0.5) and in each block (0.15).
    heads
        ``one``: the last linear layer is the output. ``two``: MindEye's, where the last linear layer is the output
        of the regression (what a prior sees) and a projector after it that of the contrast.
    n_tokens
        The outputs are this many tokens of equal size; the projector works on each.
    projector_hidden
        Width of the projector (2048).
    """

    kind: Literal["residual_mlp"] = "residual_mlp"
    hidden: int = Field(default=4096, ge=1)
    n_blocks: int = Field(default=4, ge=0)
    input_dropout: float = Field(default=0.5, ge=0, lt=1)
    block_dropout: float = Field(default=0.15, ge=0, lt=1)
    heads: Literal["one", "two"] = "one"
    n_tokens: int = Field(default=1, ge=1)
    projector_hidden: int = Field(default=2048, ge=1)

    has_regression_head: ClassVar[bool] = True

    def build(self, signal: Signal, n_outputs: int, n_regression: int | None = None) -> torch.nn.Module:
        """Return the network.

        Parameters
        ----------
        signal
            Needs a voxel or a parcel axis; a time axis after it is read as further columns.
        n_outputs
            Size of the contrastive output, all tokens together.
        n_regression
            Size of the regression output, by default `n_outputs`; only with ``heads: two``.

        Raises
        ------
        ConfigError, DataError
            If the outputs do not part into tokens, a regression is asked of one head, the axes are of another kind,
            or the subjects have voxels of their own.
        """
        from braindecode_vis.encoders.voxel_layers import ResidualMlp

        return ResidualMlp(self, signal, n_outputs, n_regression)
