"""SimpleConv: virtual channels, subject matrices, gated dilated convolutions, time aggregation.

Knows nothing of training. `SpatialAttention` and `SubjectLayer` need nothing else.

References
----------
Defossez et al. (2023), doi:10.1038/s42256-023-00714-5.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

# As published: how far the map of positions is widened on each side, so that the code's period does not join opposite
# sensors; the radius of the disc of sensors that are left out in training (each axis of the map goes from 0 to 1).
_MARGIN, _RADIUS = 0.2, 0.2
# Length of each convolution in samples; the dilation doubles and starts anew after so many; a gated linear unit comes
# after every so many and sees so many samples on each side.
_KERNEL, _PERIOD, _GATED, _CONTEXT = 3, 5, 2, 1
_WINDOWS = 4  # of `forward_tokens`, a choice of ours


class SimpleConv(nn.Module):
    """Virtual channels, subject matrices, dilated gated convolutions, one vector per trial, two heads.

    Parameters
    ----------
    merger
        From sensors to virtual channels.
    initial
        The 1x1 convolution behind them.
    subjects
        Matrices of the subjects.
    stack
        The dilated convolutions.
    final
        Last step at each sample, onto the features.
    aggregate
        From a series to one vector, by a learned weight for each sample.
    head, regression_head
        Onto the outputs.
    """

    def __init__(
        self,
        *,
        merger: nn.Module,
        initial: nn.Module,
        subjects: SubjectLayer,
        stack: ConvStack,
        final: nn.Module,
        aggregate: AffineOverTime,
        head: nn.Module,
        regression_head: nn.Module,
    ) -> None:
        super().__init__()
        self.merger = merger
        self.initial = initial
        self.subjects = subjects
        self.stack = stack
        self.final = final
        self.aggregate = aggregate
        self.head = head
        self.regression_head = regression_head

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the (contrastive) output.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
        subject : integer tensor of shape (batch,)

        Returns
        -------
        tensor of shape (batch, n_outputs)
        """
        return self.head(self.aggregate(self._encode(data, subject)))

    def forward_regression(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of the regression head, shape (batch, n_regression)."""
        return self.regression_head(self.aggregate(self._encode(data, subject)))

    def forward_heads(self, data: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        """Return both outputs from one pass through the stack, under one random disc of left-out sensors."""
        features = self.aggregate(self._encode(data, subject))
        return self.head(features), self.regression_head(features)

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the head's output for the mean over each of four equal windows, (batch, n_windows, n_outputs)."""
        series = self._encode(data, subject)  # (batch, n_features, n_times)
        windows = nn.functional.adaptive_avg_pool1d(series, _WINDOWS)
        return self.head(windows.transpose(1, 2))  # (batch, n_windows, n_outputs)

    def _encode(self, data: Tensor, subject: Tensor) -> Tensor:
        series = self.subjects(self.initial(self.merger(data)), subject)  # (batch, initial_channels, n_times)
        return self.final(self.stack(series))


class SpatialAttention(nn.Module):
    """Virtual channels: each is an average of the sensors, weighted by a learned function of their positions.

    Parameters
    ----------
    positions : array of shape (n_channels, 2) or (n_channels, 3)
        Each axis from 0 to 1.
    n_virtual
        Number of virtual channels.
    n_frequencies
        Per axis of the Fourier code of a position.
    dropout_radius
        In training, sensors within this distance of a random centre are left out.
    """

    code: Tensor
    positions: Tensor

    def __init__(
        self, positions: np.ndarray, n_virtual: int, n_frequencies: int, dropout_radius: float = _RADIUS
    ) -> None:
        super().__init__()
        places = torch.as_tensor(np.asarray(positions, float), dtype=torch.float32)
        code = compute_fourier_code(places, n_frequencies, _MARGIN)
        self.register_buffer("positions", places, persistent=False)
        self.register_buffer("code", code, persistent=False)
        self.dropout_radius = dropout_radius
        # Scores of variance one half at the start; a softmax over large ones would begin with a single sensor.
        self.heads = nn.Parameter(torch.randn(n_virtual, code.shape[1]) / math.sqrt(code.shape[1]))

    def forward(self, data: Tensor) -> Tensor:
        """Return virtual channels of shape (batch, n_virtual, n_times)."""
        return self.compute_weights() @ data  # (n_virtual, n_channels) @ (batch, n_channels, n_times)

    def compute_weights(self) -> Tensor:
        """Return the weight of each sensor in each virtual channel, shape (n_virtual, n_channels)."""
        scores = self.heads @ self.code.T  # (n_virtual, n_channels)
        if self.training:
            scores = scores.masked_fill(self._draw_disc(), -math.inf)
        return scores.softmax(dim=1)

    def _draw_disc(self) -> Tensor:
        """Return which sensors lie in a disc about a random centre; one disc per batch, as in the original."""
        centre = torch.rand(self.positions.shape[1], device=self.positions.device)
        inside = (self.positions - centre).norm(dim=1) <= self.dropout_radius
        # With very few sensors the disc can hold them all; a softmax over none would be NaN.
        return inside & ~inside.all()


class SubjectLayer(nn.Module):
    """One square matrix per subject, applied to the channels of each sample; the mean matrix for anyone else."""

    def __init__(self, n_channels: int, n_subjects: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(n_subjects, n_channels, n_channels) / math.sqrt(n_channels))

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return ``weights[subject].T @ data``, shape (batch, n_channels, n_times)."""
        if len(self.weights) == 1:  # the mean of one matrix is that matrix
            return self.weights[0].T @ data
        table = torch.cat([self.weights, self.weights.mean(dim=0, keepdim=True)])
        return table[subject].transpose(1, 2) @ data  # the last row of the table is the unknown subject's


class ConvStack(nn.Module):
    """Dilated convolutions with batch norm, GELU and skip connections, and a gated linear unit now and then.

    Parameters
    ----------
    n_inputs
        Channels of the series that comes in.
    hidden, depth
        See `SimpleConvImageConfig`.
    """

    def __init__(self, n_inputs: int, *, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.gates = nn.ModuleList()
        for number in range(depth):
            dilation = 2 ** (number % _PERIOD)
            padding = _KERNEL // 2 * dilation  # keeps the number of samples, since the kernel is odd
            convolution = nn.Conv1d(
                hidden if number else n_inputs, hidden, _KERNEL, padding=padding, dilation=dilation
            )
            self.layers.append(nn.Sequential(convolution, nn.BatchNorm1d(hidden), nn.GELU()))
            gated = (number + 1) % _GATED == 0
            self.gates.append(
                nn.Sequential(
                    nn.Conv1d(hidden, 2 * hidden, 1 + 2 * _CONTEXT, padding=_CONTEXT), nn.GLU(dim=1)
                )
                if gated
                else nn.Identity()
            )

    def forward(self, series: Tensor) -> Tensor:
        """Return a series of shape (batch, hidden, n_times)."""
        for layer, gate in zip(self.layers, self.gates, strict=True):
            out = layer(series)
            # The first convolution changes the number of channels, so that it has no skip connection.
            series = gate(out + series if out.shape == series.shape else out)
        return series


class AffineOverTime(nn.Module):
    """One learned weight per sample, shared by all features, and one bias."""

    def __init__(self, n_times: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_times, 1)

    def forward(self, series: Tensor) -> Tensor:
        """Return shape (batch, n_features)."""
        return self.linear(series).squeeze(-1)  # one number per feature


def compute_fourier_code(positions: Tensor, n_frequencies: int, margin: float) -> Tensor:
    """Return cosines and sines of all combinations of frequencies, shape (n_channels, 2 * k ** n_dims).

    The phase of the frequencies (k_1, k_2, ...) is 2 pi (k . (x + margin)) / (1 + 2 margin).
    """
    n_dims = positions.shape[1]
    steps = torch.arange(n_frequencies, dtype=positions.dtype)
    grid = torch.cartesian_prod(*[steps] * n_dims).reshape(-1, n_dims)  # (k ** n_dims, n_dims)
    # The period of the code is the map with its margins, so that opposite edges do not meet.
    phases = 2 * math.pi * (positions + margin) @ grid.T / (1 + 2 * margin)
    return torch.cat([phases.cos(), phases.sin()], dim=1)


def project_positions(positions: np.ndarray) -> np.ndarray:
    """Return the azimuthal equidistant map of sensor positions, shape (n_channels, 2).

    The angle from the vertical through the origin of the head's coordinates becomes the distance from the middle of
    the map, so sensors below the equator lie outside those above it.

    Examples
    --------
    >>> project_positions(np.array([[0.0, 0.0, 0.1], [0.1, 0.0, 0.0]])).round(3)
    array([[0.   , 0.   ],
           [1.571, 0.   ]])
    """
    x, y, z = np.asarray(positions, float).T
    polar, azimuth = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    return np.stack([polar * np.cos(azimuth), polar * np.sin(azimuth)], axis=1)


def scale_positions(positions: np.ndarray) -> np.ndarray:
    """Return positions with each axis stretched to 0 to 1; an axis without extent becomes 0.5."""
    low, span = positions.min(axis=0), np.ptp(positions, axis=0)
    return np.where(span > 0, (positions - low) / np.where(span > 0, span, 1.0), 0.5)


def make_head(n_features: int, hidden: int | None, n_outputs: int) -> nn.Module:
    """Return a linear head, or one with a hidden layer of `hidden` units."""
    if hidden is None:
        return nn.Linear(n_features, n_outputs)
    return nn.Sequential(
        nn.Linear(n_features, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, n_outputs)
    )
