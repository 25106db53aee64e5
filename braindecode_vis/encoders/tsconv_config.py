"""NICE: temporal and spatial convolutions (TSConv) and a projector, plain or after attention over the channels.

Owns the configuration; the modules are in `tsconv_layers`, so that torch is loaded only by `build`.

References
----------
Song et al. (2024), Decoding natural images from EEG for object recognition, arXiv:2308.13234.
Velickovic et al. (2018), Graph attention networks, arXiv:1710.10903.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.encoders.signal import Signal
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from torch import nn


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


class TSConvConfig(TSConvSettings):
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
        from braindecode_vis.encoders.tsconv import TSConvNetwork

        return TSConvNetwork(self, signal, n_outputs)
