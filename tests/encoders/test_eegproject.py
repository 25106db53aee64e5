import dataclasses

import pytest
import torch
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders import atm
from braindecode_vis.encoders.atm_config import EEGProjectConfig
from braindecode_vis.encoders.signal import Signal

SUBJECT = torch.zeros(4, dtype=torch.int64)


def make_signal(dims, shape):
    return Signal(dims, shape, ("01",), sfreq=250.0)


def test_parameters_and_formula_at_the_published_size():
    """17 channels x 250 samples onto 1024: two linear layers and a layer norm, counted by hand."""
    network = EEGProjectConfig().build(make_signal(("channel", "time"), (17, 250)), 1024).eval()
    count = sum(p.numel() for p in network.parameters())
    assert count == (17 * 250 * 1024 + 1024) + (1024 * 1024 + 1024) + 2 * 1024 == 5_404_672
    data = torch.randn(4, 17, 250)
    first, inner, norm = network.projector.expand, network.projector.residual[1], network.projector.norm
    hidden = data.reshape(4, -1) @ first.weight.T + first.bias
    hidden = hidden + functional.gelu(hidden) @ inner.weight.T + inner.bias
    expected = functional.layer_norm(hidden, (1024,), norm.weight, norm.bias)
    torch.testing.assert_close(network(data, SUBJECT), expected)


def test_dropout_is_in_the_residual_block():
    network = EEGProjectConfig().build(make_signal(("voxel",), (9,)), 5)
    dropouts = [m for m in network.modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in dropouts] == [0.3]
    assert isinstance(network.projector.residual[2], torch.nn.Dropout)


@pytest.mark.parametrize(
    "dims, shape", [(("voxel",), (30,)), (("parcel",), (30,)), (("parcel", "time"), (6, 5))]
)
def test_flattens_any_axes_alike(dims, shape):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EEGProjectConfig().build(make_signal(dims, shape), 7).eval()
        torch.manual_seed(0)
        flat = EEGProjectConfig().build(make_signal(("voxel",), (30,)), 7).eval()
    data = torch.randn(4, *shape)
    torch.testing.assert_close(network(data, SUBJECT), flat(data.flatten(1), SUBJECT))


@pytest.mark.parametrize("n_windows", [1, 3, 10, 99])
def test_a_window_is_answered_as_if_the_rest_were_zero(n_windows, monkeypatch):
    monkeypatch.setattr(atm, "_WINDOWS", n_windows)
    config = EEGProjectConfig()
    network = config.build(make_signal(("channel", "time"), (3, 10)), 7).eval()
    data = torch.randn(4, 3, 10)
    tokens = network.forward_tokens(data, SUBJECT)
    windows = torch.arange(10).tensor_split(min(n_windows, 10))
    assert tokens.shape == (4, len(windows), 7)
    for i, window in enumerate(windows):
        alone = torch.zeros_like(data)
        alone[..., window] = data[..., window]
        torch.testing.assert_close(tokens[:, i], network(alone, SUBJECT), atol=1e-5, rtol=1e-4)


def test_width_adds_a_last_layer():
    network = EEGProjectConfig(width=6).build(make_signal(("voxel",), (9,)), 5)
    assert network.projector.norm.normalized_shape == (6,)
    assert network.projector.last.weight.shape == (5, 6)


def test_a_region_is_answered_as_if_the_rest_were_zero():
    """Regions in any order, and voxels of none."""
    names = ("V2", "V1", "", "V1", "FFA", "V2")
    signal = dataclasses.replace(make_signal(("voxel",), (6,)), networks=names)
    network = EEGProjectConfig().build(signal, 7).eval()
    data = torch.randn(4, 6)
    tokens = network.forward_tokens(data, SUBJECT)
    assert tokens.shape == (4, 3, 7)
    for i, region in enumerate(("V2", "V1", "FFA")):
        alone = data * torch.tensor([name == region for name in names])
        torch.testing.assert_close(tokens[:, i], network(alone, SUBJECT), atol=1e-5, rtol=1e-4)


def test_local_outputs_need_times_or_regions():
    network = EEGProjectConfig().build(make_signal(("voxel",), (9,)), 5)
    with pytest.raises(DataError, match="have voxel without region names"):
        network.forward_tokens(torch.randn(4, 9), SUBJECT)
