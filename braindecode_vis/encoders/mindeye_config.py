"""Settings of MindEye's residual perceptron for fMRI, and of MindEye2's space that subjects share.

`residual_mlp` is one network for one set of voxels; for subjects with different voxels use `shared_space`.

References
----------
Scotti et al. (2023), arXiv:2305.18274 (MindEye); Scotti et al. (2024), arXiv:2403.11207 (MindEye2).
Tolstikhin et al. (2021), arXiv:2105.01601 (MLP-Mixer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    import torch


class ResidualMlpConfig(NetworkSettings):
    """MindEye's network for voxels: residual blocks of linear layers, and an optional projector.

    Dropout is 0.5 after the first layer and 0.15 in each block, the projector is 2048 wide, as in MindEye. Biases have
    no weight decay, everything else the optimiser's, as in MindEye's code.

    Parameters
    ----------
    hidden
        Width (MindEye: 4096).
    n_blocks
        Residual blocks (4).
    heads
        ``one``: the last linear layer is the output. ``two``: MindEye's, where the last linear layer is the output
        of the regression (the input of a prior) and a projector after it that of the contrast.
    n_tokens
        The outputs are this many tokens of equal size; the projector works on each.
    """

    kind: Literal["residual_mlp"] = "residual_mlp"
    hidden: int = Field(default=4096, ge=1)
    n_blocks: int = Field(default=4, ge=0)
    heads: Literal["one", "two"] = "one"
    n_tokens: int = Field(default=1, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "input_dropout": 0.5, "block_dropout": 0.15, "projector_hidden": 2048,
    }  # fmt: skip

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
            heads=self.heads,
            n_tokens=self.n_tokens,
        )


class SharedSpaceConfig(NetworkSettings):
    """One ridge layer per subject into a shared space, linear, projector; optionally our own blocks in between.

    MindEye2 describes four residual MLP-mixer blocks after the ridge layers. As released, each half of a block adds to
    the input of the *same half of the previous block*, and with one vector per trial the second half normalises a
    single number, which gives a constant: the blocks drop out of the result but for a learned shift. So the released
    model is the one with ``n_blocks: 0``, the default.

    Weight decay is 0.01 of the subjects' layers with their biases and of all other parameters, but biases, which have
    none. With AdamW it shrinks the weights toward 0 as ridge does, but is not the same penalty.

    Parameters
    ----------
    shared
        Size of the shared space (MindEye2: 4096).
    n_blocks
        Blocks of ours in the place of the mixer blocks: linear, GELU, dropout of 0.15 and linear after a layer norm,
        added to their input.
    heads
        ``two``: the last linear layer is the output of the regression (the input of a prior), the projector after it
        that of the contrast, as in MindEye2. ``one``: the projector's output only.
    n_tokens
        The outputs are this many tokens of equal size (OpenCLIP ViT-bigG: 256 x 1664); the projector works on each
        and is as wide as a token.
    """

    kind: Literal["shared_space"] = "shared_space"
    shared: int = Field(default=4096, ge=1)
    n_blocks: int = Field(default=0, ge=0)
    heads: Literal["one", "two"] = "one"
    n_tokens: int = Field(default=1, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "n_slots": 1, "dropout": 0.15, "projector": True, "ridge": 0.01, "weight_decay": 0.01,
    }  # fmt: skip

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
            n_blocks=self.n_blocks,
            heads=self.heads,
            n_tokens=self.n_tokens,
        )
