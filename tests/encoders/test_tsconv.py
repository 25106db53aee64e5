import pytest
import torch
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.atm import ChannelGraphAttention, ChannelSelfAttention, TSConv
from braindecode_vis.encoders.atm_config import EEGProjectConfig, TSConvConfig
from braindecode_vis.encoders.signal import Signal

SUBJECT = torch.zeros(4, dtype=torch.int64)


def make_signal(n_channels=63, n_times=250, sfreq=250.0, dims=("channel", "time")):
    return Signal(dims, (n_channels, n_times), ("01",), sfreq=sfreq)


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomise_statistics(module):
    """Give batch norms statistics and scales that a wrong order of layers would not survive."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for tensor in (norm.running_mean, norm.bias, norm.weight):
                    tensor.normal_()
                norm.running_var.uniform_(0.5, 2)


def test_parameters_at_the_published_size():
    """The numbers of the papers: 63 channels x 250 samples; 768 outputs in NICE, 1024 in ATM."""
    network = TSConvConfig().build(make_signal(), 1024)
    assert count(network.convolution) == 103_680
    assert count(network.projector) == 2_527_232
    nice = TSConvConfig().build(make_signal(), 768)
    assert count(nice.projector) == (1440 * 768 + 768) + (768 * 768 + 768) + 2 * 768
    dropouts = [m.p for m in nice.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts == [0.5, 0.5]


@pytest.mark.parametrize("n_times, n_features", [(250, 1440), (200, 1040), (201, 1040), (75, 40), (80, 80)])
def test_flattened_size_follows_the_formula(n_times, n_features):
    network = TSConvConfig().build(make_signal(5, n_times), 6)
    assert network.projector.expand.in_features == n_features == 40 * ((n_times - 24 - 51) // 5 + 1)
    assert network(torch.randn(4, 5, n_times), SUBJECT).shape == (4, 6)


@pytest.mark.parametrize("training", [False, True])
def test_fused_pool_equals_the_layers_one_by_one(training):
    """The convolution and the average pool are one convolution; outputs and gradients must be those of the two."""
    layers = TSConv(make_signal(7, 131), "tsconv").double().train(training)
    layers.dropout.p = 0.0
    randomise_statistics(layers)
    data = torch.randn(4, 7, 131, dtype=torch.float64, requires_grad=True)

    maps = functional.avg_pool2d(layers.temporal(data.unsqueeze(1)), (1, 51), (1, 5))
    maps = functional.elu(layers.temporal_norm(maps))
    maps = functional.elu(layers.spatial_norm(layers.spatial(maps)))
    expected = layers.mixing(maps).squeeze(2)
    goal = torch.randn_like(expected)
    inputs = [data, layers.temporal.weight, layers.spatial.weight]
    wanted = torch.autograd.grad((expected * goal).sum(), inputs)

    found = layers(data)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for a, b in zip(torch.autograd.grad((found * goal).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9 * float(b.abs().max()), rtol=1e-9)


@torch.no_grad()
def test_initialisation_of_nice():
    network = TSConvConfig(attention="self").build(make_signal(), 1024)
    for weight in (network.convolution.spatial.weight, network.projector.expand.weight):
        assert abs(float(weight.mean())) < 0.001
        assert float(weight.std()) == pytest.approx(0.02, rel=0.02)
    scale = network.convolution.temporal_norm.weight
    assert 0.9 < float(scale.min()) < float(scale.max()) < 1.1
    assert float(scale.std()) > 0.005
    assert float(network.convolution.temporal_norm.bias.abs().max()) == 0
    assert float(network.attention.query[0].weight.std()) == pytest.approx(0.02, rel=0.1)
    plain = TSConvConfig(initialisation="torch").build(make_signal(), 1024)
    assert float(plain.convolution.temporal_norm.weight.std()) == 0


def test_self_attention_is_softmax_over_channels():
    layer = ChannelSelfAttention(5, 11, 0.0).eval()
    data = torch.randn(2, 5, 11)
    values = functional.layer_norm(data, (11,))
    expected = torch.empty_like(data)
    for trial in range(2):
        query = layer.query(values[trial].T).T
        key = layer.key(values[trial].T).T
        weights = torch.softmax(query @ key.T / 11**0.5, dim=1)
        mixed = torch.stack([sum(weights[c, m] * values[trial, m] for m in range(5)) for c in range(5)])
        expected[trial] = data[trial] + layer.mixing(mixed.T).T
    torch.testing.assert_close(layer(data), expected, atol=1e-5, rtol=1e-4)


def test_graph_attention_equals_a_loop_over_neighbours():
    layer = ChannelGraphAttention(11, 0.0).eval()
    with torch.no_grad():
        layer.bias.normal_()
    data = torch.randn(2, 5, 11)
    expected = torch.empty_like(data)
    for trial in range(2):
        nodes = data[trial] @ layer.node.weight.T
        for i in range(5):
            scores = torch.stack(
                [
                    functional.leaky_relu(layer.target[0] @ nodes[i] + layer.source[0] @ nodes[j], 0.2)
                    for j in range(5)
                ]
            )
            weights = torch.softmax(scores, dim=0)
            expected[trial, i] = data[trial, i] + sum(weights[j] * nodes[j] for j in range(5)) + layer.bias
    torch.testing.assert_close(layer(data), expected, atol=1e-5, rtol=1e-4)
    assert count(ChannelGraphAttention(250, 0.3)) == 250 * 250 + 2 * 250 + 250


@pytest.mark.parametrize("attention", ["self", "graph"])
def test_attention_lets_channels_of_every_trial_meet(attention):
    """The released attention did nothing, or nothing beyond the first trial of a batch."""
    network = TSConvConfig(attention=attention, initialisation="torch").build(make_signal(6, 90), 8).eval()
    data = torch.randn(3, 6, 90, requires_grad=True)
    attended = network.attention(data)
    for trial in range(3):
        (gradient,) = torch.autograd.grad(attended[trial, 0].square().sum(), data, retain_graph=True)
        assert (gradient[trial].abs().amax(-1) > 0).all()
        assert float(gradient[[t for t in range(3) if t != trial]].abs().max()) == 0


def test_windows_are_those_of_the_pool():
    network = TSConvConfig().build(make_signal(5, 100), 6).eval()
    randomise_statistics(network)
    data = torch.randn(4, 5, 100)
    tokens = network.forward_tokens(data, SUBJECT)
    assert tokens.shape == (4, 6, 6)
    assert network.token_step == 5
    maps = network.convolution(data)
    kept = torch.zeros_like(maps)
    kept[..., 2] = maps[..., 2]
    torch.testing.assert_close(tokens[:, 2], network.projector(kept), atol=1e-5, rtol=1e-4)


def test_bad_signals_say_what_is_needed():
    with pytest.raises(DataError, match=r"at least 75 samples \(0.75 s at 100 Hz\), but these have 60"):
        TSConvConfig().build(make_signal(5, 60, sfreq=100.0), 6)
    with pytest.raises(DataError, match="channel axis"):
        TSConvConfig().build(make_signal(5, 100, dims=("parcel", "time")), 6)


def test_eegproject_with_the_residual_block_of_lora_clip():
    """Against the formula: LayerNorm(h + W2 SiLU(W1 h)), h = W x + b, without biases in the block.

    ``main/models_brain.py:BrainMLP`` of Chikit-WONG/Human-Centered_AI_Group_Project@42821ac was given the same weights:
    the outputs are equal to 0.0, and it has 2 701 824 parameters for 17 channels, 250 samples and 512 outputs.
    """
    signal = Signal(("channel", "time"), (17, 250), ("01",))
    torch.manual_seed(0)
    network = EEGProjectConfig(residual="silu", dropout=0.1).build(signal, 512).eval()
    assert (
        sum(p.numel() for p in network.parameters()) == 4250 * 512 + 512 + 2 * 512**2 + 2 * 512 == 2_701_824
    )
    projector = network.projector
    assert float(projector.expand.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(projector.expand.bias.detach().abs().max()) == 0.0
    data = torch.randn(3, 17, 250)
    first, second = (projector.residual[i].weight for i in (0, 3))
    h = data.flatten(1) @ projector.expand.weight.T
    h = h + torch.nn.functional.silu(h @ first.T) @ second.T
    expected = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        network(data, torch.zeros(3, dtype=torch.long)), expected, atol=1e-4, rtol=1e-4
    )
