"""Settings of EEGNet, a small convolutional encoder of EEG.

Lengths are published in samples; here they are stretched to the signal's rate, up to the first pooling, behind which
the maps have the published rate.

References
----------
Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    from torch import nn


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
        from braindecode_vis.encoders.eegnet import EEGNet, EEGNetMaps
        from braindecode_vis.encoders.tsconv import Readout

        maps = EEGNetMaps(signal, "eegnet", dropout=self.dropout)
        return EEGNet(maps, Readout(maps.n_maps, maps.n_windows, n_outputs))
