import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.simpleconv import (
    AffineOverTime,
    SpatialAttention,
    SubjectLayer,
    compute_fourier_code,
    project_positions,
    scale_positions,
)
from braindecode_vis.encoders.simpleconv_config import SimpleConvImageConfig
from tests.references import assert_close

TINY = {"n_virtual_channels": 6, "initial_channels": 6, "hidden": 8, "backbone_outputs": 10, "head_hidden": 9}


def make_signal(n_channels=12, n_times=20, n_subjects=3, positions=True):
    generator = np.random.default_rng(0)
    places = generator.normal(size=(n_channels, 3))
    places[:, 2] = np.abs(places[:, 2])
    places *= 0.1 / np.linalg.norm(places, axis=1, keepdims=True)
    return Signal(
        ("channel", "time"),
        (n_channels, n_times),
        tuple(f"{i:02d}" for i in range(n_subjects)),
        ch_names=tuple(f"E{i}" for i in range(n_channels)),
        ch_pos=places if positions else None,
        times=np.arange(n_times) / 100,
        sfreq=100.0,
    )


def make_batch(signal, n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(n, *signal.shape, generator=generator)
    return data, torch.arange(n) % (len(signal.subjects) + 1)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_it_gives_one_vector_per_trial_and_learns():
    signal = make_signal()
    network = SimpleConvImageConfig(**TINY).build(signal, 7)
    data, subject = make_batch(signal)
    out = network(data, subject)
    assert out.shape == (5, 7)
    assert network.forward_tokens(data, subject).shape == (5, 4, 7)
    out.square().sum().backward()
    one_head = [p for n, p in network.named_parameters() if not n.startswith("regression_head")]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in one_head)


def test_parameters_are_those_of_the_description():
    network = SimpleConvImageConfig().build(make_signal(63, 120, 10), 1024)
    merger, first, subjects = 270 * 2048, 270 * 270 + 270, 10 * 270 * 270
    convolutions = (270 * 320 * 3 + 320) + 9 * (320 * 320 * 3 + 320) + 10 * 2 * 320
    gates = 5 * (320 * 640 * 3 + 640)
    ending = (320 * 640 + 640) + (640 * 2048 + 2048) + (120 + 1)
    head = (2048 * 2048 + 2048) + 2 * 2048 + (2048 * 1024 + 1024)
    assert count(network) == merger + first + subjects + convolutions + gates + ending + 2 * head


def test_dilation_doubles_and_starts_anew_every_five_layers():
    network = SimpleConvImageConfig(**TINY).build(make_signal(), 4)
    assert [layer[0].dilation[0] for layer in network.stack.layers] == [1, 2, 4, 8, 16] * 2
    gated = [not isinstance(gate, torch.nn.Identity) for gate in network.stack.gates]
    assert gated == [False, True] * 5


def test_order_of_channels_does_not_matter():
    signal = make_signal()
    order = np.random.default_rng(1).permutation(signal.shape[0])
    moved = Signal(
        signal.dims, signal.shape, signal.subjects,
        ch_names=tuple(np.array(signal.ch_names)[order]), ch_pos=signal.ch_pos[order],
    )  # fmt: skip
    config = SimpleConvImageConfig(**TINY)
    networks = [config.build(s, 4).eval() for s in (signal, moved)]
    networks[1].load_state_dict(networks[0].state_dict())
    data, subject = make_batch(signal)
    with torch.no_grad():
        expected, found = networks[0](data, subject), networks[1](data[:, order], subject)
        assert not torch.allclose(networks[1].merger(data), networks[0].merger(data), atol=1e-2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)  # sums in another order


def test_positions_are_stretched_to_the_unit_square():
    places = np.array([[-2.0, 5.0], [0.0, 5.0], [6.0, 5.0]])  # all on one line: the other axis has no extent
    for unit in (1, 1e-3):  # whatever the positions are given in
        np.testing.assert_allclose(scale_positions(unit * places), [[0, 0.5], [0.25, 0.5], [1, 0.5]])


def test_sensors_in_the_disc_are_left_out_in_training_only():
    places = scale_positions(project_positions(make_signal(40).ch_pos))
    attention = SpatialAttention(places, 5, 4, 0.3)
    data = torch.randn(2, 40, 9)
    attention.eval()
    assert torch.equal(attention(data), attention(data))
    assert (attention.compute_weights() > 0).all()
    attention.train()
    discs = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(20):
            weights = attention.compute_weights()
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
            out = (weights == 0).all(dim=0)
            assert torch.equal(out, (weights == 0).any(dim=0))  # one disc for all heads
            inside = places[out.numpy()]
            if len(inside) > 1:  # no two sensors of a disc are further apart than its diameter
                assert np.linalg.norm(inside[:, None] - inside[None], axis=-1).max() <= 0.6 + 1e-6
            discs.append(out)
    assert any(d.any() for d in discs)
    assert any(not torch.equal(a, discs[0]) for a in discs)


def test_a_disc_over_every_sensor_bans_none():
    attention = SpatialAttention(np.full((3, 2), 0.5), 2, 3, 0.9)
    for _ in range(5):
        assert torch.isfinite(attention(torch.randn(1, 3, 4))).all()


def test_fourier_code_equals_a_plain_loop():
    places = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    code = compute_fourier_code(places, 3, 0.2)
    phases = [
        [
            2 * math.pi * (i * (float(x) + 0.2) + j * (float(y) + 0.2)) / 1.4
            for i in range(3)
            for j in range(3)
        ]
        for x, y in places
    ]
    reference = torch.tensor([[*map(math.cos, p), *map(math.sin, p)] for p in phases], dtype=torch.float64)
    torch.testing.assert_close(code, reference)


def test_map_keeps_the_angle_from_the_vertex():
    angles = np.deg2rad([0, 30, 90, 120])
    places = 0.09 * np.stack([np.zeros(4), np.sin(angles), np.cos(angles)], axis=1)
    assert_close(project_positions(places), np.stack([np.zeros(4), angles], axis=1))


def test_each_subject_has_its_own_matrix_and_others_the_mean():
    layer = SubjectLayer(4, 3)
    data = torch.randn(4, 4, 6)
    out = layer(data, torch.tensor([2, 0, 1, 3]))
    for row, matrix in enumerate(
        [layer.weights[2], layer.weights[0], layer.weights[1], layer.weights.mean(0)]
    ):
        torch.testing.assert_close(out[row], torch.einsum("ct,cd->dt", data[row], matrix))
    layer(data[:1], torch.tensor([1])).sum().backward()
    assert layer.weights.grad[1].abs().sum() > 0
    assert layer.weights.grad[[0, 2]].abs().sum() == 0


def test_subject_matrices_start_with_variance_one_over_channels():
    weights = SubjectLayer(100, 20).weights
    assert weights.var().item() == pytest.approx(1 / 100, rel=0.02)


def test_a_single_subject_and_an_unknown_one_share_the_matrix():
    signal = make_signal(n_subjects=1)
    network = SimpleConvImageConfig(**TINY).build(signal, 4).eval()
    data, _ = make_batch(signal)
    known, unknown = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    assert torch.equal(network(data, known), network(data, unknown))


def test_the_affine_aggregation_equals_its_formula():
    series = torch.randn(2, 3, 5)
    affine = AffineOverTime(5)
    torch.testing.assert_close(affine(series), series @ affine.linear.weight[0] + affine.linear.bias)


def test_two_heads_are_two_outputs_of_one_pass():
    signal = make_signal()
    network = SimpleConvImageConfig(**TINY).build(signal, 4, 6).eval()
    data, subject = make_batch(signal)
    clip, mse = network.forward_heads(data, subject)
    assert (clip.shape, mse.shape) == ((5, 4), (5, 6))
    assert torch.equal(clip, network(data, subject))
    assert torch.equal(mse, network.forward_regression(data, subject))
    assert not set(network.head.parameters()) & set(network.regression_head.parameters())


def test_missing_positions_name_the_alternative_which_works():
    signal = make_signal(positions=False)
    with pytest.raises(DataError, match="merger=linear"):
        SimpleConvImageConfig(**TINY).build(signal, 4)
    network = SimpleConvImageConfig(**TINY, merger="linear").build(signal, 4)
    assert network(*make_batch(signal)).shape == (5, 4)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="position_dims was removed: it is always 2, not 3"):
        SimpleConvImageConfig(position_dims=3)
    with pytest.raises(DataError, match="channel"):
        SimpleConvImageConfig(**TINY).build(Signal(("voxel",), (30,), ("01",)), 4)
