"""The module of EEGProject; see `eegproject`."""

from __future__ import annotations

import math

from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.encoders.eegproject_config import EEGProjectConfig
from braindecode_vis.encoders.readout_layers import Projector
from braindecode_vis.encoders.signal import Signal


class EEGProject(nn.Module):
    """A projector over all values of a trial, whatever its axes."""

    def __init__(self, config: EEGProjectConfig, signal: Signal, n_outputs: int) -> None:
        super().__init__()
        n_times = signal.shape[-1] if signal.dims[-1] == "time" else 1
        n_maps = math.prod(signal.shape) // n_times
        self.map_shape = (n_maps, n_times)
        self.dims = signal.dims
        self.n_windows = config.n_windows
        self.projector = Projector(n_maps, n_times, n_outputs, config.dropout, config.width)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials of shape (batch, *signal.shape) to (batch, n_outputs); the subject plays no part."""
        return self.projector(data.reshape(len(data), *self.map_shape))

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each window of time, shape (batch, n_windows, n_outputs).

        Raises
        ------
        DataError
            If the trials have no time axis.
        """
        if self.dims[-1] != "time":
            raise DataError(
                f"local outputs are windows of time, but these responses have {', '.join(self.dims)}; "
                "leave the local objective out."
            )
        return self.projector.forward_windows(data.reshape(len(data), *self.map_shape), self.n_windows)
