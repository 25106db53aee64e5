"""From feature maps over time to one vector per trial: the linear readout, NICE's projector, and EEGProject.

The last layers of the convolutional networks and of EEGProject see maps of shape (batch, n_maps, n_times) flattened
to a vector. Because their first layer is linear, the part of it that reads one window also gives that window an
output of its own, without further parameters: it is the answer to maps that are zero outside the window. EEGProject
is that projector over the raw trial, with nothing before it.

References
----------
Song et al. (2024), NICE, arXiv:2308.13234: the projector.
Wu et al. (2025), Uncertainty-aware Blur Prior, arXiv:2503.04207: EEGProject (``base/eeg_backbone.py`` of its code).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.checks import DataError
from braindecode_vis.encoders.signal import Signal


class Readout(nn.Linear):
    """One linear layer over flattened maps.

    Parameters
    ----------
    n_maps, n_times
        Shape of the maps.
    n_outputs
        Size of the output.
    max_norm
        Bound on the Euclidean norm of the weights of each output, or None.
    """

    def __init__(self, n_maps: int, n_times: int, n_outputs: int, max_norm: float | None = None) -> None:
        super().__init__(n_maps * n_times, n_outputs)
        self.map_shape = (n_maps, n_times)
        self.max_norm = max_norm

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_outputs)."""
        return functional.linear(maps.flatten(1), self._bounded_weight(), self.bias)  # maps * times in a row

    def forward_windows(self, maps: Tensor, n_windows: int | None = None) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_windows, n_outputs).

        `n_windows` parts the time axis into neighbouring windows as equal as can be; None takes each sample.
        """
        weight = self._bounded_weight().unflatten(1, self.map_shape)  # outputs, maps, times
        n_windows = min(n_windows or self.map_shape[1], self.map_shape[1])  # no window may be empty
        parts = zip(maps.tensor_split(n_windows, dim=2), weight.tensor_split(n_windows, dim=2), strict=True)
        return torch.stack(
            [functional.linear(m.flatten(1), w.flatten(1), self.bias) for m, w in parts], dim=1
        )

    def _bounded_weight(self) -> Tensor:
        # Bounded at every use instead of after every step: the optimiser needs no hook, and autograd sees the bound.
        return self.weight if self.max_norm is None else self.weight.renorm(2, 0, self.max_norm)


class Projector(nn.Module):
    """Linear layer, residual block of GELU, linear layer and dropout, then layer norm.

    Parameters
    ----------
    n_maps, n_times
        Shape of the maps.
    n_outputs
        Size of the output.
    dropout
        Probability in the residual block.
    width
        Size of the layers. None takes `n_outputs`, as published; for another size, one more linear layer follows the
        layer norm (our choice).
    """

    def __init__(
        self, n_maps: int, n_times: int, n_outputs: int, dropout: float, width: int | None = None
    ) -> None:
        super().__init__()
        width = width or n_outputs
        self.expand = Readout(n_maps, n_times, width)
        self.residual = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Identity() if width == n_outputs else nn.Linear(width, n_outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_outputs)."""
        return self._finish(self.expand(maps))

    def forward_windows(self, maps: Tensor, n_windows: int | None = None) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_windows, n_outputs); see `Readout.forward_windows`."""
        return self._finish(self.expand.forward_windows(maps, n_windows))

    def _finish(self, expanded: Tensor) -> Tensor:
        return self.last(
            self.norm(expanded + self.residual(expanded))
        )  # works on the last axis, windows or none


class EEGProject(nn.Module):
    """A projector over all values of a trial, whatever its axes.

    Parameters
    ----------
    signal
        Axes of a trial.
    n_outputs
        Size of the output.
    dropout, width, n_windows
        See `EEGProjectConfig`.
    """

    def __init__(
        self, signal: Signal, n_outputs: int, *, dropout: float, width: int | None, n_windows: int
    ) -> None:
        super().__init__()
        # Without time (voxels, parcels) every value is a map of one sample.
        n_times = signal.shape[-1] if signal.dims[-1] == "time" else 1
        n_maps = math.prod(signal.shape) // n_times
        self.map_shape = (n_maps, n_times)
        self.dims = signal.dims
        self.n_windows = n_windows
        self.projector = Projector(n_maps, n_times, n_outputs, dropout, width)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials of shape (batch, *signal.shape) to (batch, n_outputs); the subject plays no part."""
        return self.projector(data.reshape(len(data), *self.map_shape))  # batch, all other axes, times

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
