import pytest
import torch
from torch.nn import functional

from braindecode_vis.checks import DataError
from braindecode_vis.encoders.compact_config import DeepNetConfig, EEGNetConfig, ShallowNetConfig
from braindecode_vis.encoders.signal import Signal

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


def test_parameters_of_the_shallow_network():
    network = ShallowNetConfig().build(make_signal(17), 13)
    n_windows = (250 - 24 - 75) // 15 + 1
    filters = 40 * 25 + 40 + 40 * 40 * 17
    assert count(network) == filters + 2 * 40 + 40 * n_windows * 13 + 13 == 34_053


def test_parameters_of_the_deep_network():
    network = DeepNetConfig().build(make_signal(17, 500), 13)
    n_windows = 500
    for _ in range(4):
        n_windows = (n_windows - 9) // 3
    filters = 25 * 10 + 25 + 25 * 25 * 17 + 2 * 25
    blocks = sum(10 * a * b + 2 * b for a, b in ((25, 50), (50, 100), (100, 200)))
    assert count(network) == filters + blocks + 200 * n_windows * 13 + 13 == 276_763


def test_eegnet_equals_its_layers():
    network = (
        EEGNetConfig(kernel=6, separable_kernel=5, scale_to_sfreq=False).build(make_signal(5, 90), 7).eval()
    )
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
    h = functional.conv2d(h, maps.depthwise.weight, groups=16, padding=(0, 2))
    h = functional.elu(maps.separable_norm(functional.conv2d(h, maps.pointwise.weight)))
    h = functional.avg_pool2d(h, (1, 8)).flatten(1)
    expected = h @ network.readout.weight.T + network.readout.bias
    torch.testing.assert_close(network(data, SUBJECT), expected, atol=1e-5, rtol=1e-4)
    assert (maps.temporal_norm.eps, maps.temporal_norm.momentum) == (1e-3, 0.01)


def test_bounds_on_the_norms_hold_and_can_be_left_out():
    signal = make_signal()
    network = EEGNetConfig(readout_max_norm=0.25).build(signal, 7).eval()
    data = torch.randn(4, 5, 250)
    with torch.no_grad():
        network.readout.weight.mul_(100)
        network.maps.spatial.weight.mul_(100)
        bounded = network(data, SUBJECT)
        network.readout.weight.mul_(3)
        network.maps.spatial.weight.mul_(3)
        torch.testing.assert_close(network(data, SUBJECT), bounded, atol=1e-5, rtol=1e-4)
        assert network.readout._bounded_weight().norm(dim=1).max() <= 0.2501
        free = EEGNetConfig(spatial_max_norm=None).build(signal, 7).eval()
        before = free(data, SUBJECT)
        free.maps.spatial.weight.mul_(100)
        assert not torch.allclose(free(data, SUBJECT), before, atol=1e-3)


@pytest.mark.parametrize("config", [ShallowNetConfig(), DeepNetConfig(later_kernel=4)])
def test_joined_filters_equal_the_two_convolutions(config):
    filters = config.build(make_signal(), 7).maps.filters
    with torch.no_grad():
        filters.temporal.bias.normal_()
    data = torch.randn(4, 5, 250)
    expected = filters.spatial(filters.temporal(data[:, None])).squeeze(2)
    torch.testing.assert_close(filters(data), expected, atol=1e-5, rtol=1e-4)


def test_shallow_network_takes_the_logarithm_of_mean_power():
    network = ShallowNetConfig().build(make_signal(), 7).eval()
    data = torch.randn(4, 5, 250)
    data[0] = 0  # silence: the logarithm is cut off, not infinite
    h = network.maps.norm(network.maps.filters(data))
    windows = torch.stack([h[..., 15 * w : 15 * w + 75].square().mean(-1) for w in range(11)], dim=-1)
    expected = windows.clamp(min=1e-6).log()
    torch.testing.assert_close(network.maps(data), expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(network(data, SUBJECT)).all()


def test_deep_network_equals_its_layers():
    network = DeepNetConfig(n_filters=(4, 6), later_kernel=3).build(make_signal(5, 60), 7).eval()
    maps, data = network.maps, torch.randn(4, 5, 60)
    h = functional.max_pool1d(functional.elu(maps.norm(maps.filters(data))), 3)
    _, convolution, norm, _, _ = maps.blocks[0]
    h = functional.max_pool1d(functional.elu(norm(functional.conv1d(h, convolution.weight))), 3)
    expected = h.flatten(1) @ network.readout.weight.T + network.readout.bias
    torch.testing.assert_close(network(data, SUBJECT), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "config, sfreq, expected",
    [
        (EEGNetConfig(), 128.0, (64, 4)),
        (EEGNetConfig(), 250.0, (125, 8)),
        (EEGNetConfig(scale_to_sfreq=False), 250.0, (64, 4)),
        (ShallowNetConfig(), 500.0, (50, 150)),
        (DeepNetConfig(), 1000.0, (40, 12)),
    ],
)
def test_lengths_follow_the_sampling_rate(config, sfreq, expected):
    maps = config.build(make_signal(3, int(4 * sfreq), sfreq), 6).maps
    if config.kind == "eegnet":
        found = (maps.temporal.kernel_size[1], maps.pool_1.kernel_size[1])
    else:
        pool = maps.pool.kernel_size
        found = (maps.filters.temporal.kernel_size[1], pool[0] if isinstance(pool, tuple) else pool)
    assert found == expected


@torch.no_grad()
def test_initialisation_is_glorot_uniform():
    """braindecode's readout is a convolution over all windows: its bound counts the windows on both sides."""
    network = ShallowNetConfig().build(make_signal(30), 50)
    bound = (6 / (40 * 11 + 50 * 11)) ** 0.5
    assert bound * 0.99 < float(network.readout.weight.abs().max()) <= bound
    bound = (6 / (40 * 30 + 40 * 30)) ** 0.5
    assert bound * 0.99 < float(network.maps.filters.spatial.weight.abs().max()) <= bound
    assert float(network.readout.bias.abs().max()) == 0


def test_windows_of_the_readout_add_up():
    network = ShallowNetConfig().build(make_signal(), 7).eval()
    with torch.no_grad():
        network.readout.bias.normal_()
    data = torch.randn(4, 5, 250)
    bias = network.readout.bias
    parts = network.forward_tokens(data, SUBJECT) - bias
    assert parts.shape == (4, 11, 7)
    torch.testing.assert_close(parts.sum(1) + bias, network(data, SUBJECT), atol=1e-4, rtol=1e-4)


def test_bad_signals_say_what_is_needed():
    with pytest.raises(DataError, match="deep4 needs trials of at least 441 samples"):
        DeepNetConfig().build(make_signal(5, 250), 7)
    DeepNetConfig().build(make_signal(5, 441), 7)
    DeepNetConfig(later_kernel=4).build(make_signal(5, 250), 7)  # as its docstring advises
    with pytest.raises(DataError, match="shallow_fbcsp needs trials of at least 99 samples"):
        ShallowNetConfig().build(make_signal(5, 98), 7)
    with pytest.raises(DataError, match="eegnet needs trials of at least"):
        EEGNetConfig().build(make_signal(5, 20), 7)
    with pytest.raises(DataError, match="scale_to_sfreq to false"):
        EEGNetConfig().build(make_signal(sfreq=None), 7)
