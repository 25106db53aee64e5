"""Settings of NICE, temporal and spatial convolutions (TSConv) and a projector, and of EEGProject, the projector alone.

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

#: The convolutions of NICE as settings of earlier versions, which ATM-S had too.
CONVOLUTION = {
    "n_maps": 40, "kernel": 25, "pool": 51, "stride": 5, "conv_dropout": 0.5, "scale_to_sfreq": False,
}  # fmt: skip
_ATTENTION_DROPOUT = 0.3  # around the attention
_PROJECTOR_DROPOUT = 0.5  # in the residual block of the projector


class EEGProjectConfig(NetworkSettings):
    """Flatten, linear layer, residual block of GELU, linear layer and dropout, layer norm.

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
        from braindecode_vis.encoders.tsconv import EEGProject

        return EEGProject(signal, n_outputs, dropout=self.dropout, width=self.width, residual=self.residual)


class TSConvConfig(NetworkSettings):
    """NICE, NICE-SA and NICE-GA.

    The convolutions have the published sizes: 40 maps, kernels of 25 samples, an average pool of 51 in steps of 5,
    whatever the sampling rate (250 Hz in the papers, 200 Hz too).

    Parameters
    ----------
    attention
        Layer before the convolutions, with a residual connection: ``none``; ``self``, attention over channels
        (NICE-SA); ``graph``, a graph attention layer in which all channels are neighbours (NICE-GA). In the
        released code neither does what the paper describes: the self-attention sums its weights to one and returns
        its input, and the graph holds the channels of the first trial of each batch only. Both are implemented here
        as described; that the published accuracies would hold is unverified.
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

        from braindecode_vis.encoders.tsconv import (
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
