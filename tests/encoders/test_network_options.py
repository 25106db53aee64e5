"""Options of networks that no recipe sets: each changes what its description says, and nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from braindecode_vis.encoders.atm_config import AtmSConfig
from braindecode_vis.encoders.eegnet_config import EEGNetConfig
from braindecode_vis.encoders.mindeye_config import ResidualMlpConfig
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.simpleconv_config import SimpleConvConfig
from braindecode_vis.encoders.tsconv_config import TSConvConfig

ANGLE = np.linspace(0, 2, 8)
SIGNAL = Signal(
    ("channel", "time"), (8, 101), ("01", "02"), ch_names=tuple(f"E{i}" for i in range(8)),
    ch_pos=0.1 * np.stack([np.sin(ANGLE), np.cos(3 * ANGLE), np.cos(ANGLE) ** 2], 1), times=np.arange(101) / 100,
    sfreq=100.0,
)  # fmt: skip
VOXELS = Signal(("voxel",), (30,), ("01", "02"))
CHANGED = {"tsconv": {"attention": "self"}, "residual_mlp": {"hidden": 8}}
CONV = {"n_virtual_channels": 9, "initial_channels": 9, "hidden": 10, "position_features": 32, "depth": 6}


def build(config, signal=SIGNAL):
    torch.manual_seed(0)
    return config.build(signal, 16)


def run(config, *, train=False, subject=0):
    module = build(config).train(train)
    data = torch.randn(4, 8, 101, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return module(data, torch.full((4,), subject)).detach()


def list_dropouts(module):
    return [part.p for part in module.modules() if isinstance(part, nn.Dropout)]


def list_shapes(module):
    return [tuple(parameter.shape) for parameter in module.parameters()]


@pytest.mark.parametrize(
    ("config", "signal"),
    [
        (TSConvConfig(attention="self", attention_dropout=0.123), SIGNAL),
        (TSConvConfig(projector_dropout=0.123), SIGNAL),
        (AtmSConfig(projector_dropout=0.123), SIGNAL),
        (ResidualMlpConfig(hidden=8, input_dropout=0.123), VOXELS),
        (ResidualMlpConfig(hidden=8, n_blocks=3, block_dropout=0.123), VOXELS),
    ],
)
def test_dropout_has_the_probability_that_was_asked_for(config, signal):
    assert 0.123 in list_dropouts(build(config, signal))
    assert 0.123 not in list_dropouts(build(type(config)(**CHANGED.get(config.kind, {})), signal))


def test_sizes_of_the_convolutional_networks():
    assert (7, 1, 1, 25) in list_shapes(build(TSConvConfig(n_maps=7)))
    few, many = (sum(p.numel() for p in build(EEGNetConfig(pool_2=n)).parameters()) for n in (12, 2))
    assert few < many  # a longer pool leaves fewer windows to the readout


@pytest.mark.parametrize(
    ("kind", "common", "change", "sizes"),
    [
        (EEGNetConfig, {}, {"pool_1": 2}, None),
        (SimpleConvConfig, CONV, {"kernel_size": 5}, 5),
        (AtmSConfig, {}, {"feedforward": 33}, 33),
        (AtmSConfig, {}, {"convolution": {"n_maps": 7}}, 7),
    ],
)
def test_sizes_of_single_layers(kind, common, change, sizes):
    plain, changed = (list_shapes(build(kind(**common, **more))) for more in ({}, change))
    assert plain != changed
    if sizes is not None:
        assert any(sizes in shape for shape in changed)
        assert not any(sizes in shape for shape in plain)


def test_positions_of_sensors_on_a_map_or_in_space():
    flat, space = (
        SimpleConvConfig(**{**CONV, "position_features": n}, position_dims=d) for n, d in ((32, 2), (54, 3))
    )
    assert (9, 32) in list_shapes(build(flat))
    assert (9, 54) in list_shapes(build(space))
    assert not torch.equal(run(flat), run(SimpleConvConfig(**CONV, position_margin=0.5)))


def test_sensors_are_left_out_in_training_alone():
    with_dropout, without = (SimpleConvConfig(**CONV, dropout_radius=radius) for radius in (0.4, 0.0))
    assert torch.equal(run(with_dropout), run(without))
    assert not torch.equal(run(with_dropout, train=True), run(without, train=True))


def test_without_a_subject_layer_all_subjects_are_one():
    shared = SimpleConvConfig(**CONV, subject_layer=False)
    assert torch.equal(run(shared, subject=0), run(shared, subject=1))
    assert not torch.equal(run(SimpleConvConfig(**CONV), subject=0), run(SimpleConvConfig(**CONV), subject=1))


def test_dilations_start_anew_after_their_period():
    for period, expected in ((2, [1, 2, 1, 2, 1, 2]), (5, [1, 2, 4, 8, 16, 1])):
        module = build(SimpleConvConfig(**CONV, dilation_period=period, glu_every=0))
        found = [part.dilation[0] for part in module.stack.layers.modules() if isinstance(part, nn.Conv1d)]
        assert found == expected


def test_gates_come_as_often_and_see_as_far_as_asked():
    def list_gates(**options):
        module = build(SimpleConvConfig(**CONV, **options))
        return [part.kernel_size[0] for part in module.stack.gates.modules() if isinstance(part, nn.Conv1d)]

    assert list_gates(glu_every=0) == []
    assert list_gates(glu_every=3) == [3, 3]
    assert list_gates(glu_every=2, glu_context=2) == [5, 5, 5]


def test_the_attention_over_time_has_its_size():
    module = build(SimpleConvConfig(**CONV, time_aggregation="attention", attention_size=33))
    assert (33, 16) in list_shapes(module)
