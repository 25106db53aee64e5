import pytest
import torch
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.atm import EncoderLayer, SubjectLinear
from braindecode_vis.encoders.atm_config import AtmEConfig, AtmSConfig
from braindecode_vis.encoders.signal import Signal


def make_signal(n_channels=6, n_times=90, subjects=("sub-03", "sub-10", "guest")):
    return Signal(("channel", "time"), (n_channels, n_times), tuple(subjects), sfreq=250.0)


def make_batch(signal, n=4):
    data = torch.randn(n, *signal.shape, generator=torch.Generator().manual_seed(0))
    return data, torch.arange(n) % (len(signal.subjects) + 1)


def count(module):
    return sum(p.numel() for p in module.parameters())


TEN = tuple(f"{i:02d}" for i in range(1, 11))


def test_parameters_of_atm_s_at_the_published_size():
    """The convolutions and the projector count as in the paper; the attention as its described layers do."""
    network = AtmSConfig().build(make_signal(63, 250, TEN), 1024)
    assert count(network.convolution) == 103_680
    assert count(network.projector) == 2_527_232
    value, tokens = 250 * 250 + 250, 10 * 250 + 250
    attention = 3 * (250 * 248 + 248) + 248 * 250 + 250
    feedforward = 250 * 256 + 256 + 256 * 250 + 250
    norms = 3 * 2 * 250
    assert value + tokens + attention + feedforward + norms == 444_500
    assert count(network) == 444_500 + 103_680 + 2_527_232 == 3_075_412


def test_parameters_of_atm_e_at_the_published_size():
    network = AtmEConfig().build(make_signal(63, 250, TEN), 1024)
    temporal, spatial = 8 * 4 + 2 * 8, 160 * 63 + 2 * 160
    separable = 160 * 16 + 160 * 160 + 2 * 160
    n_windows = ((250 + 1) // 4 + 1) // 8  # each even kernel adds a sample
    readout = 160 * n_windows * 1440 + 1440
    assert count(network.convolution) == temporal + spatial + separable + readout
    assert count(network) == 444_500 + count(network.convolution) + 2_527_232


@pytest.mark.parametrize("config", [AtmSConfig(), AtmEConfig()])
def test_the_subject_token_is_dropped_and_no_channel(config):
    """The released code kept the subject token and lost the last channel: its slice was off by one."""
    signal = make_signal()
    network = config.build(signal, 8).eval()
    data, subject = make_batch(signal)
    attended = network.attend(data, subject)
    assert attended.shape == data.shape
    tokens = torch.cat(
        [network.subject_tokens(subject)[:, None], network.value_embedding(data, subject)], dim=1
    )
    torch.testing.assert_close(attended, network.norm(network.layers(tokens))[:, 1:])
    # Without attention a channel reaches the output through its own token only: the last one must.
    network.layers = torch.nn.Identity()
    data.requires_grad_()
    (gradient,) = torch.autograd.grad(network(data, subject)[:, 0].sum(), data)
    assert float(gradient.abs().amax(-1).min()) > 1e-5
    # ... and the subject through none, since its token is gone.
    torch.testing.assert_close(network(data, subject), network(data, torch.zeros_like(subject)))


def test_every_subject_has_a_token_by_its_place():
    """The tenth subject fell to the shared token in the released code, which read numbers off names."""
    signal = make_signal(subjects=TEN)
    network = AtmSConfig().build(signal, 8).eval()
    assert network.subject_tokens.weight.shape == (11, 90)
    data = make_batch(signal, 1)[0].expand(11, -1, -1)
    answers = network(data, torch.arange(11))
    assert torch.pdist(answers).min() > 1e-4
    (gradient,) = torch.autograd.grad(answers[9, 0], network.subject_tokens.weight)
    assert gradient.abs().amax(-1).nonzero().ravel().tolist() == [9]


def test_one_unknown_subject_leaves_the_others_of_the_batch_alone():
    signal = make_signal()
    network = AtmSConfig().build(signal, 8).eval()
    data, _ = make_batch(signal)
    known = network(data, torch.tensor([0, 1, 2, 0]))
    mixed = network(data, torch.tensor([0, 1, 2, signal.unknown_subject]))
    torch.testing.assert_close(mixed[:3], known[:3])
    assert not torch.allclose(mixed[3], known[3], atol=1e-4)


def test_the_unknown_token_is_trained_by_hiding_subjects():
    signal = make_signal()
    data, _ = make_batch(signal, 40)
    subject = torch.arange(40) % 3

    def unknown_gradient(network):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network(data, subject).square().sum().backward()
        return float(network.subject_tokens.weight.grad[-1].abs().max())

    assert unknown_gradient(AtmSConfig(unknown_probability=0.3, width=9).build(signal, 8)) > 0
    assert unknown_gradient(AtmSConfig(unknown_probability=0, width=9).build(signal, 8)) == 0
    assert unknown_gradient(AtmSConfig(unknown_probability=0.3, width=9).build(signal, 8).eval()) == 0


def test_a_single_subject_is_never_hidden():
    network = AtmSConfig(unknown_probability=0.9).build(make_signal(subjects=("01",)), 8).train()
    subject = torch.zeros(50, dtype=torch.int64)
    assert torch.equal(network._hide_subjects(subject), subject)


def test_share_of_hidden_subjects():
    network = AtmSConfig(unknown_probability=0.25).build(make_signal(), 8).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = network._hide_subjects(torch.ones(4000, dtype=torch.int64))
    assert set(hidden.tolist()) == {1, 3}
    assert float((hidden == 3).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_joint_embeds_each_subject_by_its_own_layer_and_the_unknown_by_their_mean():
    layer = SubjectLinear(3, 7)
    data, subject = torch.randn(6, 4, 7), torch.tensor([2, 3, 0, 2, 0, 3])
    embedded = layer(data, subject)
    weights = torch.cat([layer.weight, layer.weight.mean(0, keepdim=True)])
    biases = torch.cat([layer.bias, layer.bias.mean(0, keepdim=True)])
    for trial, index in enumerate(subject.tolist()):
        torch.testing.assert_close(embedded[trial], data[trial] @ weights[index].T + biases[index])


def test_layers_of_subjects_start_as_linear_layers_do():
    """Weights and biases are uniform between plus and minus one over the root of the number of inputs."""
    layer = SubjectLinear(40, 49)
    for values in (layer.weight, layer.bias):
        values = values.detach().flatten() * 7
        assert values.abs().max() <= 1
        assert values.mean().item() == pytest.approx(0, abs=0.05)
        assert values.std().item() == pytest.approx(3**-0.5, abs=0.03)


def test_joint_adds_one_embedding_per_further_subject():
    signal = make_signal(63, 250, TEN)
    common, joint = AtmSConfig().build(signal, 16), AtmSConfig(joint=True).build(signal, 16)
    assert count(joint) - count(common) == 9 * (250 * 250 + 250)


def test_attention_does_not_know_the_order_of_channels():
    signal = make_signal()
    data, subject = make_batch(signal)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    network = AtmSConfig().build(signal, 8).eval()
    swapped = network.attend(data[:, order], subject)
    torch.testing.assert_close(swapped, network.attend(data, subject)[:, order], atol=1e-5, rtol=1e-4)


def test_encoder_layer_equals_its_formula():
    """Post-norm, with heads of 10 // 3 features: the projections are narrower than the tokens."""
    layer = EncoderLayer(10, 3, 6, 0.25).eval()
    tokens = torch.randn(2, 5, 10)
    assert layer.query.out_features == 9
    query, key, value = layer.query(tokens), layer.key(tokens), layer.value(tokens)
    heads = []
    for h in range(3):
        part = slice(3 * h, 3 * h + 3)
        weights = torch.softmax(query[..., part] @ key[..., part].transpose(1, 2) / 3**0.5, dim=-1)
        heads.append(weights @ value[..., part])
    first = functional.layer_norm(tokens + layer.out(torch.cat(heads, -1)), (10,))
    second = functional.layer_norm(first + layer.narrow(functional.gelu(layer.widen(first))), (10,))
    torch.testing.assert_close(layer(tokens), second, atol=1e-5, rtol=1e-4)


def test_dropout_is_where_the_paper_has_it():
    network = AtmSConfig().build(make_signal(), 8)
    probabilities = sorted(m.p for m in network.modules() if isinstance(m, torch.nn.Dropout))
    assert probabilities == [0.25, 0.25, 0.5, 0.5]  # embedding, encoder layer, convolutions, projector


def test_windows_of_atm_e_are_those_of_its_maps():
    signal = make_signal()
    network = AtmEConfig().build(signal, 8).eval()
    data, subject = make_batch(signal)
    tokens = network.forward_tokens(data, subject)
    maps = network.convolution.maps(network.attend(data, subject))
    assert tokens.shape == (4, maps.shape[2], 8)
    kept = torch.zeros_like(maps)
    kept[..., 1] = maps[..., 1]
    expected = network.projector(network.convolution.readout(kept).unsqueeze(2))
    torch.testing.assert_close(tokens[:, 1], expected, atol=1e-5, rtol=1e-4)


def test_bad_input_says_what_is_needed():
    with pytest.raises(DataError, match="atm_s needs trials of at least 75 samples"):
        AtmSConfig().build(make_signal(6, 74), 8)
    with pytest.raises(DataError, match="atm_e needs trials of at least"):
        AtmEConfig().build(make_signal(6, 8), 8)
