"""EEGNet, the shallow and the deep convolutional network: small convolutional encoders of EEG.

Owns their configurations; the modules are in `compact_layers`, so that torch is loaded only by `build`. They are
built as braindecode builds them (the same parameters at the published sampling rate), without its dependencies; all
of braindecode's own networks are reached through `braindecode_models`. Lengths are published in samples; here they
are stretched to the signal's rate by default, up to the first pooling, behind which the maps have the published rate.

References
----------
Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.
Schirrmeister et al. (2017), doi:10.1002/hbm.23730.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.encoders.signal import Signal
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from torch import nn


class EEGNetSettings(Settings):
    """Temporal filters, spatial filters of each, a separable convolution; batch norms, ELU and pools between.

    Parameters
    ----------
    n_filters
        Temporal filters (8).
    depth_multiplier
        Spatial filters for each temporal filter (2).
    n_pointwise
        Maps behind the separable convolution; None is `n_filters` times `depth_multiplier`, as published.
    kernel, pool_1
        Length of the temporal filters and of the first average pool, in samples at 128 Hz (64 and 4).
    separable_kernel, pool_2
        Length of the depthwise filters and of the second average pool, in samples behind the first pool (16 and 8).
    dropout
        Behind both pools: 0.25, as braindecode has it and as published across subjects; within a subject 0.5.
    spatial_max_norm
        Bound on the norm of each spatial filter (1), or None.
    scale_to_sfreq
        Stretch `kernel` and `pool_1` from 128 Hz to the signal's rate.
    """

    n_filters: int = Field(default=8, ge=1)
    depth_multiplier: int = Field(default=2, ge=1)
    n_pointwise: int | None = Field(default=None, ge=1)
    kernel: int = Field(default=64, ge=1)
    pool_1: int = Field(default=4, ge=1)
    separable_kernel: int = Field(default=16, ge=1)
    pool_2: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.25, ge=0, lt=1)
    spatial_max_norm: float | None = Field(default=1.0, gt=0)
    scale_to_sfreq: bool = True


class EEGNetConfig(EEGNetSettings):
    """EEGNet with a linear readout; the other settings are those of `EEGNetSettings`.

    Parameters
    ----------
    readout_max_norm
        Bound on the norm of the weights of each output, or None. The paper has 0.25 for classification; braindecode
        leaves it away by default, as is done here, where outputs are an embedding.
    """

    kind: Literal["eegnet"] = "eegnet"
    readout_max_norm: float | None = Field(default=None, gt=0)

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time, too short, or of unknown rate while `scale_to_sfreq` is set.
        """
        from braindecode_vis.encoders.compact import make_eegnet

        return make_eegnet(self, signal, n_outputs)


class ShallowNetConfig(Settings):
    """ShallowFBCSPNet: temporal and spatial filters, square, average pool, logarithm, linear readout.

    Parameters
    ----------
    n_filters
        Temporal filters, and as many spatial ones (40).
    kernel, pool, stride
        Length of the temporal filters, and length and step of the average pool, in samples at 250 Hz (25, 75, 15).
    dropout
        Before the readout (0.5).
    scale_to_sfreq
        Stretch the three lengths from 250 Hz to the signal's rate.
    """

    kind: Literal["shallow_fbcsp"] = "shallow_fbcsp"
    n_filters: int = Field(default=40, ge=1)
    kernel: int = Field(default=25, ge=1)
    pool: int = Field(default=75, ge=1)
    stride: int = Field(default=15, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    scale_to_sfreq: bool = True

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time, too short, or of unknown rate while `scale_to_sfreq` is set.
        """
        from braindecode_vis.encoders.compact import make_shallow

        return make_shallow(self, signal, n_outputs)


class DeepNetConfig(Settings):
    """Deep4Net: temporal and spatial filters, then blocks of convolution, batch norm, ELU and max pool.

    With the published lengths a trial needs 441 samples at 250 Hz (1.8 s). Shorten `later_kernel` or `pool` for
    shorter trials; for a second at 250 Hz, ``later_kernel: 4`` does.

    Parameters
    ----------
    n_filters
        Filters of the first block and of each later one (25, 50, 100, 200).
    kernel
        Length of the first temporal filters, in samples at 250 Hz (10).
    later_kernel
        Length of the filters of the later blocks, in samples behind the pool before (10).
    pool
        Length and step of every max pool (3); that of the first block in samples at 250 Hz.
    dropout
        Before each later block (0.5).
    scale_to_sfreq
        Stretch `kernel` and the first `pool` from 250 Hz to the signal's rate.
    """

    kind: Literal["deep4"] = "deep4"
    n_filters: tuple[int, ...] = Field(default=(25, 50, 100, 200), min_length=1)
    kernel: int = Field(default=10, ge=1)
    later_kernel: int = Field(default=10, ge=1)
    pool: int = Field(default=3, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    scale_to_sfreq: bool = True

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time, too short, or of unknown rate while `scale_to_sfreq` is set.
        """
        from braindecode_vis.encoders.compact import make_deep

        return make_deep(self, signal, n_outputs)
