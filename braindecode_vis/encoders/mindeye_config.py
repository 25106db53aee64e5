"""Settings of MindEye's residual perceptron for fMRI, and of MindEye2's space that subjects share.

`residual_mlp` is one network for one set of voxels; subjects with voxels of their own belong to `shared_space`.

References
----------
Scotti et al. (2023), arXiv:2305.18274 (MindEye); Scotti et al. (2024), arXiv:2403.11207 (MindEye2).
Tolstikhin et al. (2021), arXiv:2105.01601 (MLP-Mixer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    import torch


class ResidualMlpConfig(NetworkSettings):
    """Linear, LayerNorm, GELU, dropout; residual blocks of the same; linear; an optional projector.

    Biases have no weight decay, everything else the optimiser's, as in MindEye's code.

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

    def build(self, signal: Signal, n_outputs: int, n_regression: int | None = None) -> torch.nn.Module:
        """Return the network.

        Parameters
        ----------
        signal
            Needs a voxel or a parcel axis; a time axis after it is read as further voxels.
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
        from braindecode_vis.encoders.mindeye import ResidualMlp

        return ResidualMlp(
            signal,
            n_outputs,
            n_regression,
            hidden=self.hidden,
            n_blocks=self.n_blocks,
            input_dropout=self.input_dropout,
            block_dropout=self.block_dropout,
            heads=self.heads,
            n_tokens=self.n_tokens,
            projector_hidden=self.projector_hidden,
        )


class SharedSpaceConfig(NetworkSettings):
    """One ridge layer per subject into a shared space, linear, projector; mixer blocks of ours between, if asked for.

    MindEye2 describes four residual MLP-mixer blocks after the ridge layers. As released, each half of a block adds to
    the input of the *same half of the previous block*, and with one vector per trial the second half normalises a
    single number, which gives a constant: the blocks drop out of the result but for a learned shift. So the released
    model is the one with ``n_blocks: 0``, the default.

    Parameters
    ----------
    shared
        Size of the shared space (MindEye2: 4096).
    n_slots
        Vectors of that size per trial, between which the mixer's second half mixes. MindEye2 has 1.
    n_blocks, dropout
        Mixer blocks of ours, in which each half adds to its own input, and the dropout in each of their halves (0.15).
        With one slot there is nothing to mix between, and the second half is left out.
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
        Weight decay of the subjects' layers with their biases (0.01). With AdamW it shrinks the weights toward 0 as
        ridge does, but is not the same penalty.
    weight_decay
        Of all other parameters (0.01) but biases, which have none.
    """

    kind: Literal["shared_space"] = "shared_space"
    shared: int = Field(default=4096, ge=1)
    n_slots: int = Field(default=1, ge=1)
    n_blocks: int = Field(default=0, ge=0)
    dropout: float = Field(default=0.15, ge=0, lt=1)
    heads: Literal["one", "two"] = "one"
    projector: bool = True
    n_tokens: int = Field(default=1, ge=1)
    ridge: float = Field(default=0.01, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)

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
        from braindecode_vis.encoders.mindeye import SharedSpace

        return SharedSpace(
            signal,
            n_outputs,
            n_regression,
            shared=self.shared,
            n_slots=self.n_slots,
            n_blocks=self.n_blocks,
            dropout=self.dropout,
            heads=self.heads,
            projector=self.projector,
            n_tokens=self.n_tokens,
            ridge=self.ridge,
            weight_decay=self.weight_decay,
        )
