import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.atm import Readout
from braindecode_vis.encoders.atm_config import EEGNetConfig
from braindecode_vis.encoders.eegnet import BoundedSpatialFilters, EEGNet, EEGNetMaps
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training.network_config import NetworkEncoderConfig

SUBJECT = torch.zeros(4, dtype=torch.int64)


def make_signal(n_channels=5, n_times=250, sfreq=250.0):
    return Signal(("channel", "time"), (n_channels, n_times), ("01",), sfreq=sfreq)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_eegnet():
    """At 128 Hz the published lengths; an even kernel with half of it as padding on both sides adds a sample."""
    network = EEGNetConfig().build(make_signal(17, 200, 128.0), 13)
    n_windows = ((200 + 1) // 4 + 1) // 8
    temporal, spatial = 8 * 64 + 2 * 8, 16 * 17 + 2 * 16
    separable = 16 * 16 + 16 * 16 + 2 * 16
    assert count(network) == temporal + spatial + separable + 16 * n_windows * 13 + 13 == 2637


def test_eegnet_equals_its_layers():
    signal = make_signal(5, 90)
    maps = EEGNetMaps(signal, "eegnet", dropout=0.25, kernel=6, scale_to_sfreq=False)
    network = EEGNet(maps, Readout(maps.n_maps, maps.n_windows, 7)).eval()
    maps, data = network.maps, torch.randn(4, 5, 90)
    h = functional.conv2d(data[:, None], maps.temporal.weight, padding=(0, 3))
    h = maps.temporal_norm(h)
    filters = maps.spatial.weight
    norms = filters.flatten(1).norm(dim=1)
    filters = filters * torch.where(norms > 1, 1 / norms, 1.0)[:, None, None, None]
    spatial = torch.stack(
        [sum(filters[s, 0, c, 0] * h[:, s // 2, c] for c in range(5)) for s in range(16)], dim=1
    )
    h = functional.elu(maps.spatial_norm(spatial[:, :, None]))
    h = functional.avg_pool2d(h, (1, 4))
    h = functional.conv2d(h, maps.depthwise.weight, groups=16, padding=(0, 8))
    h = functional.elu(maps.separable_norm(functional.conv2d(h, maps.pointwise.weight)))
    h = functional.avg_pool2d(h, (1, 8)).flatten(1)
    expected = h @ network.readout.weight.T + network.readout.bias
    torch.testing.assert_close(network(data, SUBJECT), expected, atol=1e-5, rtol=1e-4)
    assert (maps.temporal_norm.eps, maps.temporal_norm.momentum) == (1e-3, 0.01)


def test_the_length_of_each_spatial_filter_is_bounded():
    """The Euclidean one over the channels: longer filters are shortened to the bound, shorter ones are left alone."""
    filters = BoundedSpatialFilters(n_filters=2, n_spatial=6, n_channels=5)
    with torch.no_grad():
        filters.weight.normal_().mul_(torch.tensor([0.1, 0.3, 0.6, 1.0, 2.0, 5.0])[:, None, None, None])
    maps = torch.randn(3, 2, 5, 7)
    weights = filters.weight.detach().reshape(6, 5)
    lengths = (weights**2).sum(dim=1).sqrt()
    assert 0 < (lengths > 1).sum() < 6
    weights = weights * (1 / lengths).clamp(max=1)[:, None]
    # The first three spatial filters belong to the first temporal one.
    expected = [
        torch.einsum("bct,c->bt", maps[:, number // 3], weight) for number, weight in enumerate(weights)
    ]
    torch.testing.assert_close(filters(maps), torch.stack(expected, dim=1)[:, :, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sfreq, expected", [(128.0, (64, 4)), (250.0, (125, 8))])
def test_lengths_follow_the_sampling_rate(sfreq, expected):
    maps = EEGNetConfig().build(make_signal(3, int(4 * sfreq), sfreq), 6).maps
    assert (maps.temporal.kernel_size[1], maps.pool_1.kernel_size[1]) == expected


@torch.no_grad()
def test_initialisation_is_glorot_uniform():
    """braindecode's readout is a convolution over all windows: its bound counts the windows on both sides."""
    network = EEGNetConfig().build(make_signal(30, 1000), 50)
    n_windows = network.maps.n_windows
    bound = (6 / (16 * n_windows + 50 * n_windows)) ** 0.5
    assert bound * 0.99 < float(network.readout.weight.abs().max()) <= bound
    pointwise = network.maps.pointwise.weight  # 16 maps in, 16 out, one sample
    bound = (6 / (16 + 16)) ** 0.5
    assert bound * 0.9 < float(pointwise.abs().max()) <= bound
    assert float(network.readout.bias.abs().max()) == 0


def test_windows_of_the_readout_add_up():
    network = EEGNetConfig().build(make_signal(), 7).eval()
    with torch.no_grad():
        network.readout.bias.normal_()
    data = torch.randn(4, 5, 250)
    bias = network.readout.bias
    parts = network.forward_tokens(data, SUBJECT) - bias
    assert parts.shape == (4, network.maps.n_windows, 7)
    torch.testing.assert_close(parts.sum(1) + bias, network(data, SUBJECT), atol=1e-4, rtol=1e-4)


def test_bad_signals_say_what_is_needed():
    with pytest.raises(DataError, match="eegnet needs trials of at least"):
        EEGNetConfig().build(make_signal(5, 20), 7)
    with pytest.raises(DataError, match="give the sampling rate of the data set"):
        EEGNetConfig().build(make_signal(sfreq=None), 7)


@pytest.mark.parametrize("kind, model", [("shallow_fbcsp", "ShallowFBCSPNet"), ("deep4", "Deep4Net")])
def test_the_networks_that_braindecode_has_say_where_they_are(kind, model):
    advice = f"'{kind}' is no longer a kind of network: write {{kind: braindecode, model: {model}}}"
    with pytest.raises(ValidationError, match=advice):
        NetworkEncoderConfig(network={"kind": kind})
