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

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.base.settings import Settings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    from torch import nn


class EEGProjectConfig(NetworkSettings):
    """Flatten, linear layer, residual block of GELU, linear layer and dropout, layer norm.

    Parameters
    ----------
    dropout
        Probability in the residual block; the published value.
    width
        Size of the layers; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    n_windows
        Number of neighbouring windows of time that get outputs of their own when an objective asks for local
        ones; no parameters belong to them (our choice). Voxels and parcels without times have one for each region of
        interest or network, whatever the number.
    residual
        The residual block: ``gelu`` as above, or ``silu``: linear, SiLU, dropout and linear without biases, as in
        LoRA-CLIP, where `dropout` is 0.1.
    """

    kind: Literal["eegproject"] = "eegproject"
    dropout: float = Field(default=0.3, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)
    n_windows: int = Field(default=5, ge=1)
    residual: Literal["gelu", "silu"] = "gelu"

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"residual"})

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network for trials of any axes; see `signal` for its interface."""
        from braindecode_vis.encoders.tsconv import EEGProject

        return EEGProject(
            signal, n_outputs, dropout=self.dropout, width=self.width, n_windows=self.n_windows,
            residual=self.residual,
        )  # fmt: skip


class TSConvSettings(Settings):
    """The convolutions: 1 x kernel, average pool, batch norm, ELU, channels x 1, batch norm, ELU, dropout, 1 x 1.

    Parameters
    ----------
    n_maps
        Feature maps of every convolution (40).
    kernel, pool, stride
        Length of the temporal kernels, and length and step of the average pool, in samples (25, 51 and 5 at
        250 Hz).
    conv_dropout
        After the spatial convolution (0.5).
    scale_to_sfreq
        Stretch the three lengths from 250 Hz to the signal's rate. The papers keep them, at 200 Hz too.
    """

    n_maps: int = Field(default=40, ge=1)
    kernel: int = Field(default=25, ge=1)
    pool: int = Field(default=51, ge=1)
    stride: int = Field(default=5, ge=1)
    conv_dropout: float = Field(default=0.5, ge=0, lt=1)
    scale_to_sfreq: bool = False


class TSConvConfig(TSConvSettings, NetworkSettings):
    """NICE, NICE-SA and NICE-GA.

    The settings of the convolutions are those of `TSConvSettings`.

    Parameters
    ----------
    attention
        What precedes the convolutions, around a residual connection: ``none``; ``self``, attention over channels
        (NICE-SA); ``graph``, a graph attention layer in which all channels are neighbours (NICE-GA). In the
        released code neither does what the paper describes: the self-attention sums its weights to one and returns
        its input, and the graph holds the channels of the first trial of each batch only. Both are implemented here
        as described; that the published accuracies would hold is unverified.
    attention_dropout
        Dropout around the attention (0.3); unused by ``attention: none``.
    projector_dropout
        In the residual block of the projector (0.5).
    width
        Size of the projector. NICE has 768, the size of its target (CLIP ViT-L/14); None takes the size of the target.
        Another size adds a last linear layer (our choice).
    initialisation
        ``nice`` draws the weights of convolutions and linear layers from N(0, 0.02) and the scales of batch norms
        from N(1, 0.02); ``torch`` leaves torch's defaults.
    """

    kind: Literal["tsconv"] = "tsconv"
    attention: Literal["none", "self", "graph"] = "none"
    attention_dropout: float = Field(default=0.3, ge=0, lt=1)
    projector_dropout: float = Field(default=0.5, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)
    initialisation: Literal["nice", "torch"] = "nice"

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
            attention = ChannelSelfAttention(n_channels, n_times, self.attention_dropout)
        elif self.attention == "graph":
            attention = ChannelGraphAttention(n_times, self.attention_dropout)
        convolution = TSConv(signal, "tsconv", self)
        projector = Projector(
            self.n_maps, convolution.n_windows, n_outputs, self.projector_dropout, self.width
        )
        return TSConvNetwork(attention, convolution, projector, as_nice=self.initialisation == "nice")
