"""Settings of the networks in `atm` and `eegnet`: ATM, NICE (TSConv), EEGProject and EEGNet.

On averaged trials of 17 occipito-parietal channels EEGProject is the strongest simple encoder within a subject; across
subjects it has nothing that could adapt to one, and ignores who was recorded.

References
----------
Song et al. (2024), Decoding natural images from EEG for object recognition, arXiv:2308.13234.
Velickovic et al. (2018), Graph attention networks, arXiv:1710.10903.
Wu et al. (2025), Uncertainty-aware Blur Prior, arXiv:2503.04207 (``base/eeg_backbone.py`` of its code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.encoders.atm import Atm, TSConv
    from braindecode_vis.encoders.eegnet import EEGNetStage


#: The convolutions of NICE as settings of earlier versions, which ATM-S had too.
CONVOLUTION = {
    "n_maps": 40, "kernel": 25, "pool": 51, "stride": 5, "conv_dropout": 0.5, "scale_to_sfreq": False,
}  # fmt: skip
_ATTENTION_DROPOUT = 0.3  # around the attention
_PROJECTOR_DROPOUT = 0.5  # in the residual block of the projector


class EEGProjectConfig(NetworkSettings):
    """A small network for EEG: a linear layer over all channels and samples, one residual block, layer norm.

    Parameters
    ----------
    dropout
        Probability in the residual block; the published value.
    width
        Size of the layers; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    residual
        The residual block: ``gelu`` as above, or ``silu``: linear, SiLU, dropout and linear without biases, as in
        LoRA-CLIP, where `dropout` is 0.1.
    """

    kind: Literal["eegproject"] = "eegproject"
    dropout: float = Field(default=0.3, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)
    residual: Literal["gelu", "silu"] = "gelu"

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"residual"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"n_windows": 5}

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network for trials of any axes; see `signal` for its interface."""
        from braindecode_vis.encoders.atm import EEGProject

        return EEGProject(signal, n_outputs, dropout=self.dropout, width=self.width, residual=self.residual)


class TSConvConfig(NetworkSettings):
    """TSConv of NICE: convolutions over time, then over channels; with attention, NICE-SA and NICE-GA.

    The convolutions have the published sizes: 40 maps, kernels of 25 samples, an average pool of 51 in steps of 5,
    whatever the sampling rate (250 Hz in the papers, 200 Hz too).

    Parameters
    ----------
    attention
        Layer before the convolutions, with a residual connection: ``none``; ``self``, attention over channels
        (NICE-SA); ``graph``, a graph attention layer in which all channels are neighbours (NICE-GA). In the
        released code neither does what the paper describes: the self-attention multiplies its input by one, so that
        only the projection after it acts, and the edges of the graph hold the channels of the first trial of each batch
        only. Both are implemented here as described; that the published accuracies would hold is unverified.
    width
        Size of the projector. NICE has 768, the size of its target (CLIP ViT-L/14); None takes the size of the target.
        Another size adds a last linear layer (our choice).
    initialisation
        ``nice`` draws the weights of convolutions and linear layers from N(0, 0.02) and the scales of batch norms
        from N(1, 0.02); ``torch`` leaves torch's defaults.
    """

    kind: Literal["tsconv"] = "tsconv"
    attention: Literal["none", "self", "graph"] = "none"
    width: int | None = Field(default=None, ge=1)
    initialisation: Literal["nice", "torch"] = "nice"

    removed_settings: ClassVar[Mapping[str, Any]] = {
        **CONVOLUTION, "attention_dropout": 0.3, "projector_dropout": 0.5,
    }  # fmt: skip

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time, or too short.
        """
        from torch import nn

        from braindecode_vis.encoders.atm import (
            ChannelGraphAttention,
            ChannelSelfAttention,
            Projector,
            TSConv,
            TSConvNetwork,
        )

        n_channels, n_times = read_axes(signal, "tsconv")
        # Built in this order, the parts draw the same weights from a seed as they did when results were published.
        attention: nn.Module = nn.Identity()
        if self.attention == "self":
            attention = ChannelSelfAttention(n_channels, n_times, _ATTENTION_DROPOUT)
        elif self.attention == "graph":
            attention = ChannelGraphAttention(n_times, _ATTENTION_DROPOUT)
        convolution = TSConv(signal, "tsconv")
        projector = Projector(*convolution.map_shape, n_outputs, _PROJECTOR_DROPOUT, self.width)
        return TSConvNetwork(attention, convolution, projector, as_nice=self.initialisation == "nice")


# --- ATM -------------------------------------------------------------------------------------------------------
# ATM: each channel is a token that attends to the others, then convolutions and a projector.
#
# Settings of ATM-S (with the convolutions of NICE) and ATM-E (with EEGNet in their place). A subject token tells the
# attention who is recorded; it is what is dropped afterwards, so that every channel reaches the convolutions.
# Subjects are known by their place in the training set, whatever their names.
#
# References: Li et al. (2024), Visual decoding and reconstruction via EEG embeddings with guided diffusion,
# arXiv:2403.07721. Liu et al. (2024), iTransformer, arXiv:2310.06625: the encoder layer.


class AtmSettings(NetworkSettings):
    """Settings that both variants share; with 63 channels, 250 samples and 10 subjects this part has 444 500
    parameters.

    The paper's table counts 553 078 for its attention, which does not follow from the layers that it describes; with
    the convolutions (103 680) and the projector onto 1024 outputs (2 527 232), ATM-S as described has 3 075 412.

    Parameters
    ----------
    joint
        One value embedding per subject instead of a common one. A subject never trained on gets the mean of all
        (our choice; the released code cannot embed one).
    unknown_probability
        Share of the training trials whose subject is hidden, so that the token of unknown subjects (and the mean
        embedding of `joint`) is trained for subjects never seen. Acts on training sets of several subjects only.
        Our choice; in the released code that token is never trained alongside the others.
    width
        Size of the projector; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    """

    joint: bool = False
    unknown_probability: float = Field(default=0.1, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "n_layers": 1, "n_heads": 4, "feedforward": 256, "dropout": 0.25, "position": "none", "projector_dropout": 0.5,
    }  # fmt: skip

    def assemble(self, signal: Signal, n_outputs: int, stage: TSConv | EEGNetStage) -> Atm:
        """Return the network around the stage that follows its attention."""
        from braindecode_vis.encoders.atm import Atm

        return Atm(
            signal,
            n_outputs,
            stage,
            joint=self.joint,
            unknown_probability=self.unknown_probability,
            width=self.width,
        )


class AtmSConfig(AtmSettings):
    """ATM-S, with the convolutions of NICE; the settings are those of `AtmSettings`."""

    kind: Literal["atm_s"] = "atm_s"

    removed_settings: ClassVar[Mapping[str, Any]] = {"convolution": CONVOLUTION}

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.atm import TSConv

        return self.assemble(signal, n_outputs, TSConv(signal, "atm_s"))


class AtmEConfig(AtmSettings):
    """ATM-E, with EEGNet in the place of the convolutions; the settings are those of `AtmSettings`.

    The attention is that of ATM-S, as the paper describes it. The released script (``Retrieval/ATME_retrieval.py``) has
    another: one layer of torch's transformer encoder over time points with a sinusoidal code (one head, feed-forward
    2048, model size 63 channels), then a linear map over time, and no subject token.

    EEGNet has the sizes of the released script: 8 temporal filters of 4 samples, 20 spatial filters of each, dropout
    0.25, lengths in samples whatever the sampling rate, and 1440 outputs for the projector.
    """

    kind: Literal["atm_e"] = "atm_e"

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "convolution": {
            "n_filters": 8, "depth_multiplier": 20, "n_pointwise": None, "kernel": 4, "pool_1": 4,
            "separable_kernel": 16, "pool_2": 8, "dropout": 0.25, "spatial_max_norm": 1.0, "scale_to_sfreq": False,
        },
        "n_features": 1440,
    }  # fmt: skip

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.eegnet import EEGNetMaps, EEGNetStage

        maps = EEGNetMaps(signal, "atm_e", dropout=0.25, kernel=4, depth_multiplier=20, scale_to_sfreq=False)
        return self.assemble(signal, n_outputs, EEGNetStage(maps))


# --- EEGNet ----------------------------------------------------------------------------------------------------
# Settings of EEGNet, a small convolutional encoder of EEG.
#
# Lengths are published in samples; here they are stretched to the signal's rate, up to the first pooling, behind
# which the maps have the published rate.
#
# References: Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.


class EEGNetConfig(NetworkSettings):
    """EEGNet: temporal filters, spatial filters of each, a separable convolution, and a linear readout.

    Sizes are published: 8 temporal filters of 64 samples at 128 Hz, 2 spatial filters of each (of norm 1 at most), an
    average pool of 4, filters of 16 samples behind it, a pool of 8. The readout has no bound on its norm, as in
    braindecode, because its outputs are an embedding; the paper has 0.25 for classification.

    Parameters
    ----------
    dropout
        Behind both pools: 0.25, as braindecode has it and as published across subjects; within a subject 0.5.
    """

    kind: Literal["eegnet"] = "eegnet"
    dropout: float = Field(default=0.25, ge=0, lt=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "n_filters": 8, "depth_multiplier": 2, "n_pointwise": None, "kernel": 64, "pool_1": 4, "separable_kernel": 16,
        "pool_2": 8, "spatial_max_norm": 1.0, "scale_to_sfreq": True, "readout_max_norm": None,
    }  # fmt: skip

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time, too short, or of unknown rate.
        """
        from braindecode_vis.encoders.atm import Readout
        from braindecode_vis.encoders.eegnet import EEGNet, EEGNetMaps

        maps = EEGNetMaps(signal, "eegnet", dropout=self.dropout)
        return EEGNet(maps, Readout(maps.n_maps, maps.n_windows, n_outputs))
