"""The modules of EEGNet, the shallow and the deep network: feature maps over time, and a linear readout of them.

References
----------
Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.
Schirrmeister et al. (2017), doi:10.1002/hbm.23730.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.encoders.axes import count_windows, read_axes, scale_length
from braindecode_vis.encoders.compact_config import (
    DeepNetConfig,
    EEGNetConfig,
    EEGNetSettings,
    ShallowNetConfig,
)
from braindecode_vis.encoders.readout_layers import Readout
from braindecode_vis.encoders.signal import Signal

EEGNET_SFREQ = 128.0  # Hz
SCHIRRMEISTER_SFREQ = 250.0  # Hz
_MIN_POWER = 1e-6  # below it the logarithm of the shallow network is cut off


def make_eegnet(config: EEGNetConfig, signal: Signal, n_outputs: int) -> CompactNetwork:
    """Return EEGNet with its readout."""
    maps = EEGNetMaps(config, signal, "eegnet")
    return CompactNetwork(maps, Readout(maps.n_maps, maps.n_windows, n_outputs, config.readout_max_norm))


def make_shallow(config: ShallowNetConfig, signal: Signal, n_outputs: int) -> CompactNetwork:
    """Return the shallow network with its readout."""
    maps = ShallowMaps(config, signal)
    return CompactNetwork(maps, Readout(config.n_filters, maps.n_windows, n_outputs))


def make_deep(config: DeepNetConfig, signal: Signal, n_outputs: int) -> CompactNetwork:
    """Return the deep network with its readout."""
    maps = DeepMaps(config, signal)
    return CompactNetwork(maps, Readout(config.n_filters[-1], maps.n_windows, n_outputs))


class CompactNetwork(nn.Module):
    """Feature maps and their linear readout, initialised as braindecode does: Glorot uniform, biases zero.

    Parameters
    ----------
    maps
        Module from (batch, n_channels, n_times) to (batch, n_maps, n_windows).
    readout
        Over these maps.
    """

    def __init__(self, maps: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.maps = maps
        self.readout = readout
        # As a convolution over all windows its fan is that of the maps and outputs, each times the windows.
        bound = (6 / (readout.in_features + readout.out_features * readout.map_shape[1])) ** 0.5
        nn.init.uniform_(readout.weight, -bound, bound)
        nn.init.zeros_(readout.bias)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials (batch, n_channels, n_times) to (batch, n_outputs); the subject plays no part."""
        return self.readout(self.maps(data))

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each window of the last maps, shape (batch, n_windows, n_outputs)."""
        return self.readout.forward_windows(self.maps(data))


class EEGNetMaps(nn.Module):
    """EEGNet up to its readout; convolutions along time are padded by half a kernel on both sides.

    Parameters
    ----------
    config
        Sizes.
    signal
        Trials of channel x time.
    network
        Name in messages.
    """

    def __init__(self, config: EEGNetSettings, signal: Signal, network: str) -> None:
        super().__init__()
        n_channels, _ = read_axes(signal, network)
        kernel, pool_1 = config.kernel, config.pool_1
        if config.scale_to_sfreq:
            kernel, pool_1 = (scale_length(n, signal, network, EEGNET_SFREQ) for n in (kernel, pool_1))
        separable, pool_2 = config.separable_kernel, config.pool_2
        self.n_windows = count_windows(
            signal, network, lambda n: _padded(_padded(n, kernel) // pool_1, separable) // pool_2
        )
        n_spatial = config.n_filters * config.depth_multiplier
        self.n_maps = config.n_pointwise or n_spatial
        self.temporal = nn.Conv2d(1, config.n_filters, (1, kernel), padding=(0, kernel // 2), bias=False)
        self.temporal_norm = _make_norm(config.n_filters)
        self.spatial = BoundedSpatialFilters(config.n_filters, n_spatial, n_channels, config.spatial_max_norm)
        self.spatial_norm = _make_norm(n_spatial)
        self.pool_1 = nn.AvgPool2d((1, pool_1))
        self.depthwise = nn.Conv2d(
            n_spatial, n_spatial, (1, separable), padding=(0, separable // 2), groups=n_spatial, bias=False
        )
        self.pointwise = nn.Conv2d(n_spatial, self.n_maps, 1, bias=False)
        self.separable_norm = _make_norm(self.n_maps)
        self.pool_2 = nn.AvgPool2d((1, pool_2))
        self.dropout = nn.Dropout(config.dropout)
        _initialise_convolutions(self)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_maps, n_windows)."""
        maps = self.temporal_norm(self.temporal(data.unsqueeze(1)))  # batch, filters, channels, times
        maps = functional.elu(self.spatial_norm(self.spatial(maps)))  # batch, spatial filters, 1, times
        maps = self.dropout(self.pool_1(maps))
        maps = functional.elu(self.separable_norm(self.pointwise(self.depthwise(maps))))
        return self.dropout(self.pool_2(maps)).squeeze(2)


class BoundedSpatialFilters(nn.Conv2d):
    """Filters over all channels, a group for each temporal filter, with a bound on the norm of each or None."""

    def __init__(self, n_filters: int, n_spatial: int, n_channels: int, max_norm: float | None) -> None:
        super().__init__(n_filters, n_spatial, (n_channels, 1), groups=n_filters, bias=False)
        self.max_norm = max_norm

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_filters, n_channels, n_times) to (batch, n_spatial, 1, n_times)."""
        weight = self.weight if self.max_norm is None else self.weight.renorm(2, 0, self.max_norm)
        return functional.conv2d(maps, weight, groups=self.groups)


class SpatioTemporalFilters(nn.Module):
    """Temporal filters and spatial filters over them, without anything between.

    Two linear maps in a row are computed as the one that they are together, without the long map between them.

    Parameters
    ----------
    n_channels
        Of the trials.
    n_filters
        Temporal and spatial filters.
    kernel
        Length of the temporal filters in samples.
    """

    def __init__(self, n_channels: int, n_filters: int, kernel: int) -> None:
        super().__init__()
        self.temporal = nn.Conv2d(1, n_filters, (1, kernel))
        self.spatial = nn.Conv2d(n_filters, n_filters, (n_channels, 1), bias=False)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_filters, n_times - kernel + 1)."""
        spatial = self.spatial.weight.squeeze(-1)  # spatial filters, temporal filters, channels
        weight = torch.einsum("sfc,fk->sck", spatial, self.temporal.weight[:, 0, 0])
        bias = torch.einsum("sfc,f->s", spatial, self.temporal.bias)
        return functional.conv1d(data, weight, bias.to(weight.dtype))


class ShallowMaps(nn.Module):
    """The shallow network up to its readout: the logarithm of the mean power of each spatial filter's signal."""

    def __init__(self, config: ShallowNetConfig, signal: Signal) -> None:
        super().__init__()
        n_channels, _ = read_axes(signal, "shallow_fbcsp")
        lengths = [config.kernel, config.pool, config.stride]
        if config.scale_to_sfreq:
            lengths = [scale_length(n, signal, "shallow_fbcsp", SCHIRRMEISTER_SFREQ) for n in lengths]
        kernel, pool, stride = lengths
        self.n_windows = count_windows(
            signal, "shallow_fbcsp", lambda n: (n - kernel + 1 - pool) // stride + 1
        )
        self.filters = SpatioTemporalFilters(n_channels, config.n_filters, kernel)
        self.norm = nn.BatchNorm1d(config.n_filters)
        self.pool = nn.AvgPool1d(pool, stride)
        self.dropout = nn.Dropout(config.dropout)
        _initialise_convolutions(self)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_filters, n_windows)."""
        power = self.pool(self.norm(self.filters(data)).float().square())
        return self.dropout(power.clamp(min=_MIN_POWER).log())


class DeepMaps(nn.Module):
    """The deep network up to its readout."""

    def __init__(self, config: DeepNetConfig, signal: Signal) -> None:
        super().__init__()
        n_channels, _ = read_axes(signal, "deep4")
        kernel, pool = config.kernel, config.pool
        if config.scale_to_sfreq:
            kernel, pool = (scale_length(n, signal, "deep4", SCHIRRMEISTER_SFREQ) for n in (kernel, pool))

        def windows_of(n_times: int) -> int:
            n = (n_times - kernel + 1) // pool
            for _ in config.n_filters[1:]:
                n = (n - config.later_kernel + 1) // config.pool
            return n

        self.n_windows = count_windows(signal, "deep4", windows_of)
        self.filters = SpatioTemporalFilters(n_channels, config.n_filters[0], kernel)
        self.norm = nn.BatchNorm1d(config.n_filters[0])
        self.pool = nn.MaxPool1d(pool)
        pairs = zip(config.n_filters, config.n_filters[1:], strict=False)
        self.blocks = nn.Sequential(*(_make_block(before, after, config) for before, after in pairs))
        _initialise_convolutions(self)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_filters[-1], n_windows)."""
        return self.blocks(self.pool(functional.elu(self.norm(self.filters(data)))))


def _make_block(n_before: int, n_after: int, config: DeepNetConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Conv1d(n_before, n_after, config.later_kernel, bias=False),
        nn.BatchNorm1d(n_after),
        nn.ELU(),
        nn.MaxPool1d(config.pool),
    )


def _make_norm(n_maps: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n_maps, eps=1e-3, momentum=0.01)  # Keras' values, in torch's terms


def _padded(n_times: int, kernel: int) -> int:
    """Return the length behind a convolution padded by half its kernel; one more than before if that is even."""
    return n_times + 2 * (kernel // 2) - kernel + 1


def _initialise_convolutions(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
