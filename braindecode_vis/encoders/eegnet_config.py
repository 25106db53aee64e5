"""Settings of EEGNet, a small convolutional encoder of EEG, alone or inside ATM-E.

Lengths are published in samples; here they are stretched to the signal's rate by default, up to the first pooling,
behind which the maps have the published rate.

References
----------
Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.base.settings import Settings
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.encoders.eegnet import EEGNetMaps


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

    def make_maps(self, signal: Signal, network: str) -> EEGNetMaps:
        """Return EEGNet up to its readout; `network` names it in messages."""
        from braindecode_vis.encoders.eegnet import EEGNetMaps

        return EEGNetMaps(
            signal,
            network,
            n_filters=self.n_filters,
            depth_multiplier=self.depth_multiplier,
            n_pointwise=self.n_pointwise,
            kernel=self.kernel,
            pool_1=self.pool_1,
            separable_kernel=self.separable_kernel,
            pool_2=self.pool_2,
            dropout=self.dropout,
            spatial_max_norm=self.spatial_max_norm,
            scale_to_sfreq=self.scale_to_sfreq,
        )


class EEGNetConfig(EEGNetSettings, NetworkSettings):
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
        from braindecode_vis.encoders.eegnet import EEGNet
        from braindecode_vis.encoders.tsconv import Readout

        maps = self.make_maps(signal, "eegnet")
        return EEGNet(maps, Readout(maps.n_maps, maps.n_windows, n_outputs, self.readout_max_norm))
