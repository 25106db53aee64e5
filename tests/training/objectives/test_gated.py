"""Contrast in gated subspaces, against loops in double precision."""

import math

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, Notice
from braindecode_vis.training.objectives.gated import Gate, _draw, compute_gated_loss
from braindecode_vis.training.objectives.objective import Outputs, StepSizes
from braindecode_vis.training.objectives.objectives_config import HydraObjectiveConfig


def compute_by_hand(brain, image, gates, classes, partners, *, unit, temperature=0.1):
    """Return SimLAP's loss of classes (n, n) as each anchor sees them, -1 where unknown."""
    brain, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (brain, image))
    total, count = 0.0, 0
    for i, gate in enumerate(gates):
        own, partner = classes[i][i], partners[i]

        def score(j, gate=gate, i=i):
            one, two = gate * brain[i], gate * image[j]
            length = np.linalg.norm(one) * np.linalg.norm(two) if unit else 1.0
            return float(one @ two) / length / temperature

        right = [j for j, c in enumerate(classes[i]) if c == partner and c >= 0 and own >= 0]
        wrong = [j for j, c in enumerate(classes[i]) if c not in (-1, own, partner)]
        for p in right:
            total += math.log(math.exp(score(p)) + sum(math.exp(score(j)) for j in wrong)) - score(p)
            count += 1
    return total / max(count, 1)


def make(n=9, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n, d)), rng.random((n, d))


@pytest.mark.parametrize("unit", [False, True])
def test_loss_equals_loops(unit):
    """Without a second normalisation it is that of the authors' code (erow/vitookit@f6a8057, `SimLAP.disparate_loss`):
    on the same 64 rows, gates included, the two differed by 7e-7 at most over five draws in float32.
    """
    brain, image, gates = make()
    classes = np.array([0, 0, 1, 1, 2, 2, 3, -1, 0])
    partners = np.array([1, 0, 1, 3, 0, 0, 2, -1, 2])
    seen = np.tile(classes, (9, 1))
    own, known = classes[:, None], (seen >= 0) & (classes[:, None] >= 0)
    positive = known & (seen == partners[:, None])
    negative = known & (seen != own) & (seen != partners[:, None])
    loss = compute_gated_loss(
        *map(torch.from_numpy, (brain, image, gates, positive, negative)), temperature=0.1, unit=unit
    )
    assert float(loss) == pytest.approx(
        compute_by_hand(brain, image, gates, seen, partners, unit=unit), rel=1e-9
    )


def build(n_common=5, **settings):
    torch.manual_seed(0)
    objective = HydraObjectiveConfig(**settings).build()
    objective.prepare(
        StepSizes(n_common=n_common, n_concepts=4, attribute_names=("a", "b"), attribute_values=(3, 2))
    )
    return objective


def make_step(seed=3, **extra):
    brain, image, _ = make()
    concepts = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 0])  # 4 was not learnt from
    pair = torch.from_numpy(brain), torch.from_numpy(image)
    return Outputs(*pair, torch.arange(9), concepts, seed=seed, **extra)


@pytest.mark.parametrize("partner", ["identical", "distinct", "arbitrary"])
def test_term_draws_partners_from_the_batch(partner):
    """With the drawn partners read from its gates' input, the term is the loss of loops, both directions."""
    objective, outputs, met = build(partner=partner, unit=False), make_step(), []
    objective.term.gate.register_forward_hook(lambda module, given, out: met.append((*given, out)))
    loss = objective(outputs)
    own, partners, gates = (x.detach().numpy() for x in met[0])
    classes = np.where(outputs.concepts == 4, -1, outputs.concepts)
    assert own.tolist() == np.maximum(classes, 0).tolist()
    if partner == "identical":
        assert partners.tolist() == own.tolist()
    if partner == "distinct":
        assert (partners != own)[classes >= 0].all()
    assert set(partners) <= {0, 1, 2, 3}
    sides = outputs.brain.numpy(), outputs.image.numpy()
    seen = np.tile(classes, (9, 1))
    both = [compute_by_hand(one, two, gates, seen, partners, unit=False) for one, two in (sides, sides[::-1])]
    assert float(loss.detach()) == pytest.approx(sum(both) / 2, rel=1e-5)
    again = {float(objective(make_step(seed)).detach()) for seed in range(4)}
    assert len(again) == (1 if partner == "identical" else 4)


def test_attributes_are_drawn_among_known_ones():
    attributes = torch.tensor([[0, -1], [-1, 1], [0, 0], [1, 1], [2, -1], [-1, -1], [0, 1], [1, 0], [2, 1]])
    objective, met = build(classes="attributes", partner="identical"), []
    objective.term.gate.register_forward_hook(lambda module, given, out: met.append(given[0]))
    for seed in range(30):
        assert torch.isfinite(objective(make_step(seed, attributes=attributes)))
    drawn = torch.stack(met)  # classes of both attributes side by side: 0 to 2 and 3 to 4
    assert set(drawn[:, 0].tolist()) == {0}
    assert set(drawn[:, 1].tolist()) == {4}
    assert set(drawn[:, 3].tolist()) == {1, 4}


def test_nothing_to_learn_is_zero_and_told():
    outputs = make_step(attributes=torch.full((9, 2), -1))
    outputs.brain.requires_grad_()
    with pytest.warns(Notice, match="without two trials of known attributes"):
        loss = build(classes="attributes")(outputs)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(outputs.brain.grad.abs().max()) == 0
    with pytest.raises(ConfigError, match="two or more concepts"):
        HydraObjectiveConfig().build().prepare(StepSizes(n_common=5, n_concepts=1))


def test_draws_are_uniform_among_what_is_allowed():
    allowed = torch.tensor([[True, False, True, True], [False, False, False, False]]).repeat(1, 1)
    picked = [_draw(allowed, torch.tensor([u, u])).tolist() for u in np.linspace(0, 1, 300, endpoint=False)]
    first, second = zip(*picked, strict=True)
    assert [first.count(k) for k in range(4)] == [100, 0, 100, 100]
    assert set(second) == {0}


def test_gates_lie_between_zero_and_one():
    gate = Gate(4, 3)
    out = gate(torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0]))
    assert out.shape == (3, 3)
    assert 0 < float(out.detach().min()) < float(out.detach().max()) < 1
