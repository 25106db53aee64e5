"""EEGNet: temporal filters, spatial filters of each, a separable convolution, and a linear readout.

Built as braindecode builds it (the same parameters at the published sampling rate), without that dependency, because
ATM-E has it inside; braindecode's other networks are reached through `braindecode_models`.

References
----------
Lawhern et al. (2018), doi:10.1088/1741-2552/aace8c.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.encoders.atm import Projector, Readout
from braindecode_vis.encoders.signal import Signal, count_windows, read_axes, scale_length

_FEATURES = 1440  # outputs of EEGNet in ATM-E, which the projector reads

EEGNET_SFREQ = 128.0  # Hz, at which the paper gives its lengths


class EEGNet(nn.Module):
    """Feature maps and their linear readout, initialised as braindecode does: Glorot uniform, biases zero.

    Parameters
    ----------
    maps
        Module from (batch, n_channels, n_times) to (batch, n_maps, n_windows).
    readout
        Over these maps.
    """

    def __init__(self, maps: EEGNetMaps, readout: Readout) -> None:
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

    @property
    def token_step(self) -> int:
        """Samples from one window to the next."""
        return self.maps.stride

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each window of the last maps, shape (batch, n_windows, n_outputs)."""
        return self.readout.forward_windows(self.maps(data))


class EEGNetMaps(nn.Module):
    """EEGNet up to its readout; convolutions along time are padded by half a kernel on both sides.

    Parameters
    ----------
    signal
        Trials of channel x time.
    network
        Name in messages.
    dropout
        Behind both pools.
    kernel, depth_multiplier
        Length of the temporal filters in samples, and spatial filters of each of them.
    scale_to_sfreq
        Whether `kernel` and the first pool are stretched from 128 Hz to the signal's rate.
    """

    def __init__(
        self,
        signal: Signal,
        network: str,
        *,
        dropout: float,
        kernel: int = 64,
        depth_multiplier: int = 2,
        scale_to_sfreq: bool = True,
    ) -> None:
        super().__init__()
        n_channels, _ = read_axes(signal, network)
        n_filters, pool_1, separable_kernel, pool_2 = 8, 4, 16, 8
        if scale_to_sfreq:
            kernel, pool_1 = (scale_length(n, signal, network, EEGNET_SFREQ) for n in (kernel, pool_1))
        self.n_windows = count_windows(
            signal, network, lambda n: _padded(_padded(n, kernel) // pool_1, separable_kernel) // pool_2
        )
        self.stride = pool_1 * pool_2  # samples from one window to the next
        n_spatial = n_filters * depth_multiplier
        self.n_maps = n_spatial
        self.temporal = nn.Conv2d(1, n_filters, (1, kernel), padding=(0, kernel // 2), bias=False)
        self.temporal_norm = _make_norm(n_filters)
        self.spatial = BoundedSpatialFilters(n_filters, n_spatial, n_channels)
        self.spatial_norm = _make_norm(n_spatial)
        self.pool_1 = nn.AvgPool2d((1, pool_1))
        # A separable convolution: filters along time for each map, then mixtures of the maps.
        self.depthwise = nn.Conv2d(
            n_spatial,
            n_spatial,
            (1, separable_kernel),
            padding=(0, separable_kernel // 2),
            groups=n_spatial,
            bias=False,
        )
        self.pointwise = nn.Conv2d(n_spatial, self.n_maps, 1, bias=False)
        self.separable_norm = _make_norm(self.n_maps)
        self.pool_2 = nn.AvgPool2d((1, pool_2))
        self.dropout = nn.Dropout(dropout)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # all of them without a bias
                nn.init.xavier_uniform_(part.weight)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_maps, n_windows)."""
        maps = self.temporal_norm(self.temporal(data.unsqueeze(1)))  # batch, filters, channels, times
        maps = functional.elu(self.spatial_norm(self.spatial(maps)))  # batch, spatial filters, 1, times
        maps = self.dropout(self.pool_1(maps))  # batch, spatial filters, 1, pooled times
        maps = functional.elu(self.separable_norm(self.pointwise(self.depthwise(maps))))
        return self.dropout(self.pool_2(maps)).squeeze(2)  # batch, maps, windows


class BoundedSpatialFilters(nn.Conv2d):
    """Filters over all channels, a group for each temporal filter, each with a norm of 1 at most."""

    def __init__(self, n_filters: int, n_spatial: int, n_channels: int) -> None:
        super().__init__(n_filters, n_spatial, (n_channels, 1), groups=n_filters, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_filters, n_channels, n_times) to (batch, n_spatial, 1, n_times)."""
        # The paper's maximum-norm constraint (its table 2), applied where the filters are used.
        return functional.conv2d(maps, self.weight.renorm(2, 0, 1.0), groups=self.groups)


def _make_norm(n_maps: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n_maps, eps=1e-3, momentum=0.01)  # Keras' values, in torch's terms


def _padded(n_times: int, kernel: int) -> int:
    """Return the length behind a convolution padded by half its kernel; one more than before if that is even."""
    return n_times + 2 * (kernel // 2) - kernel + 1


class EEGNetStage(nn.Module):
    """EEGNet over the attended channels, as ATM-E has it: its outputs are the features of the projector."""

    def __init__(self, maps: EEGNetMaps) -> None:
        super().__init__()
        self.maps = maps
        self.readout = Readout(maps.n_maps, maps.n_windows, _FEATURES)
        self.map_shape: tuple[int, int] = (_FEATURES, 1)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, 1440, 1)."""
        return self.readout(self.maps(data)).unsqueeze(
            2
        )  # one window, so that the projector reads it as maps

    @property
    def stride(self) -> int:
        """Samples from one window to the next."""
        return self.maps.stride

    def project_windows(self, data: Tensor, projector: Projector) -> Tensor:
        """Return the projection of each window of EEGNet's maps, shape (batch, n_windows, n_outputs)."""
        features = self.readout.forward_windows(self.maps(data))
        # The projector sees batch * windows rows, as if each window were a trial.
        return projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])
