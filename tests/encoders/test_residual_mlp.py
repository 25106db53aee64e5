import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.mindeye_config import ResidualMlpConfig
from braindecode_vis.encoders.signal import Signal

NOBODY = torch.zeros(3, dtype=torch.int64)


def make_signal(dims=("voxel",), shape=(20,), **more):
    return Signal(dims, shape, ("01",), **more)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        network = ResidualMlpConfig(heads="two", n_tokens=257).build(make_signal(shape=(15724,)), 257 * 768)
    first = 15724 * 4096 + 4096 + 2 * 4096
    blocks = 4 * (4096 * 4096 + 4096 + 2 * 4096)
    last = 4096 * 257 * 768 + 257 * 768
    projector = 2 * 768 + 768 * 2048 + 2048 + 2 * 4096 + 2048 * 2048 + 2048 + 2048 * 768 + 768
    assert count(network) == first + blocks + last + projector


def test_forward_is_the_formula():
    network = ResidualMlpConfig(hidden=8, n_blocks=2).build(make_signal(), 5).eval()
    data = torch.randn(3, 20)

    def layer(module, x):
        x = x @ module[0].weight.T + module[0].bias
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))  # the norm's scale and shift are 1 and 0 at the start

    hidden = layer(network.first, data)
    for block in network.blocks:
        hidden = hidden + layer(block, hidden)
    expected = hidden @ network.last.weight.T + network.last.bias
    torch.testing.assert_close(network(data, NOBODY), expected, atol=1e-5, rtol=1e-4)


def test_biases_have_no_weight_decay_and_everything_else_the_optimisers():
    network = ResidualMlpConfig(hidden=8, n_blocks=1, heads="two").build(make_signal(), 5)
    (group,) = network.parameter_groups()
    assert group["weight_decay"] == 0.0
    spared = {id(p) for p in group["params"]}
    assert spared == {id(p) for name, p in network.named_parameters() if name.endswith("bias")}


def test_parcels_with_times_are_flattened():
    network = ResidualMlpConfig(hidden=8).build(make_signal(("parcel", "time"), (6, 4)), 5)
    assert network.first[0].in_features == 24
    assert network(torch.randn(3, 6, 4), NOBODY).shape == (3, 5)


def test_the_projector_works_on_each_token():
    config = ResidualMlpConfig(hidden=8, heads="two", n_tokens=3)
    network = config.build(make_signal(), 12, 15).eval()
    contrast, regression = network.forward_heads(data := torch.randn(3, 20), NOBODY)
    assert (contrast.shape, regression.shape) == ((3, 12), (3, 15))
    torch.testing.assert_close(network(data, NOBODY), contrast)
    torch.testing.assert_close(contrast[:, 4:8], network.projector(regression[:, 5:10]))


def test_bad_input_says_what_to_do():
    with pytest.raises(DataError, match="shared_space"):
        ResidualMlpConfig().build(Signal(("voxel",), (20,), ("01", "02"), n_voxels=(20, 18)), 4)
    with pytest.raises(DataError, match="voxels or parcels"):
        ResidualMlpConfig().build(make_signal(("channel", "time"), (4, 5)), 4)
    with pytest.raises(ConfigError, match="3 tokens"):
        ResidualMlpConfig(hidden=8, n_tokens=3).build(make_signal(), 4)
    with pytest.raises(ConfigError, match="heads=two"):
        ResidualMlpConfig(hidden=8).build(make_signal(), 4, 4)
    with pytest.raises(DataError, match="heads=two"):
        ResidualMlpConfig(hidden=8).build(make_signal(), 4).forward_regression(torch.zeros(3, 20), NOBODY)
