"""From feature maps over time to one vector per trial, or to one vector per window of time.

The last layers of the convolutional encoders and of EEGProject see maps of shape (batch, n_maps, n_times) flattened
to a vector. Because their first layer is linear, the part of it that reads one window also gives that window an
output of its own, without further parameters: it is the answer to maps that are zero outside the window.

References
----------
Song et al. (2024), NICE, arXiv:2308.13234: the projector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        return functional.linear(maps.flatten(1), self._bounded_weight(), self.bias)

    def forward_windows(self, maps: Tensor, n_windows: int | None = None) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_windows, n_outputs).

        `n_windows` parts the time axis into neighbouring windows as equal as can be; None takes each sample.
        """
        weight = self._bounded_weight().unflatten(1, self.map_shape)  # outputs, maps, times
        n_windows = min(n_windows or self.map_shape[1], self.map_shape[1])
        parts = zip(maps.tensor_split(n_windows, dim=2), weight.tensor_split(n_windows, dim=2), strict=True)
        return torch.stack(
            [functional.linear(m.flatten(1), w.flatten(1), self.bias) for m, w in parts], dim=1
        )

    def _bounded_weight(self) -> Tensor:
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
        return self.last(self.norm(expanded + self.residual(expanded)))
