import math

import numpy as np
import pytest
import torch
from torch import nn

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.optimisation import MovingAverage, compute_warm_cosine, optimise, split_decayed


def test_steps_equal_a_plain_loop_whose_batches_are_taken_in_parts():
    """Parts of a batch add their gradients; rate, clipping and averages follow the written rules."""
    data = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0))
    networks = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            networks.append(nn.Linear(3, 1).double())
    (network, plain), data = networks, data.double()
    average, seen = MovingAverage(network, 0.8), []
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    optimise(
        optimiser, network.parameters(), range(6),
        lambda step: (network(part).square().mean() / 2 for part in data[step].split(4)),
        after=lambda step, losses: (average.follow(network, step), seen.append(float(sum(losses)))),
        rate=lambda step: compute_warm_cosine(step, 6, 2), clip_norm=0.1,
    )  # fmt: skip
    expected = [p.detach().clone() for p in plain.parameters()]
    for step in range(6):
        loss = plain(data[step]).square().mean()
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        rate = 0.5 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)))
        decay = min(0.8, (1 + step) / (10 + step))
        assert seen[step] == pytest.approx(float(loss.detach()), rel=1e-9)
        with torch.no_grad():
            for p, g, e in zip(plain.parameters(), gradients, expected, strict=True):
                p -= rate * g * min(1.0, 0.1 / (norm + 1e-6))  # torch adds 1e-6 to the norm
                e.mul_(decay).add_((1 - decay) * p)
    for mine, theirs, kept, e in zip(
        network.parameters(), plain.parameters(), average.model.parameters(), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kept, e, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_finite_moves_no_weight():
    network = nn.Linear(2, 1)
    before = network.weight.detach().clone()
    with pytest.raises(DataError, match="the loss is nan at step 3"):
        optimise(
            torch.optim.SGD(network.parameters(), lr=1.0), network.parameters(), [3],
            lambda step: [network.weight.sum() * float("nan")], after=lambda step, losses: None,
            describe_failure=lambda step, loss: f"the loss is {loss} at step {step}",
        )  # fmt: skip
    torch.testing.assert_close(network.weight.detach(), before)


def test_the_rate_rises_and_falls_to_zero():
    rates = [compute_warm_cosine(step, 100, 10) for step in range(100)]
    assert rates[0] == 0.1
    assert np.argmax(rates) in (9, 10)
    assert rates[-1] < 1e-3
    assert np.all(np.diff(rates[10:]) < 0)
    assert compute_warm_cosine(0, 5, 0) == 1.0


def test_decay_spares_biases_and_what_is_named():
    network = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    decayed, free = split_decayed(network.parameters(), 0.1, spared=[network[0].weight])
    assert [p.shape for p in decayed["params"]] == [(2, 2)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in free["params"]] == [(3, 2), (2,)]


def test_an_average_keeps_buffers_and_may_lose_parts():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    average = MovingAverage(network, 0.5, warm_up=False)
    average.model[1] = nn.Identity()
    network(torch.randn(8, 2))
    with torch.no_grad():
        network[0].weight.fill_(3.0)
    average.follow(network, 0)
    torch.testing.assert_close(average.model[0].running_mean, network[0].running_mean)
    torch.testing.assert_close(average.model[0].weight, torch.full((2,), 2.0))
