"""SoftCLIP and BiMixCo against loops in double precision."""

import math

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.contrastive import (
    anneal_cosine,
    compute_bimixco_loss,
    compute_clip_loss,
    compute_soft_clip_loss,
)
from braindecode_vis.training.objectives.objective import Outputs
from braindecode_vis.training.objectives.objectives_config import (
    BimixcoObjectiveConfig,
    SoftClipObjectiveConfig,
)


def make_pair(n=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def to_unit(tensor):
    rows = tensor.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference_cross_entropy(logits, targets, allowed):
    total = 0.0
    for row, target, mask in zip(logits, targets, allowed, strict=True):
        normaliser = math.log(sum(math.exp(x) for x, keep in zip(row, mask, strict=True) if keep))
        total -= sum(t * (x - normaliser) for t, x in zip(target, row, strict=True) if t > 0)
    return total / len(logits)


def test_soft_clip_equals_loops():
    brain, image = make_pair()
    b, v = to_unit(brain), to_unit(image)
    targets = np.exp(v @ v.T / 0.1)
    targets /= targets.sum(1, keepdims=True)
    everything = np.ones((6, 6), bool)
    forth = reference_cross_entropy(b @ v.T / 0.1, targets, everything)
    back = reference_cross_entropy(v @ b.T / 0.1, targets, everything)
    got = compute_soft_clip_loss(brain, image, temperature=0.1)
    assert float(got) == pytest.approx((forth + back) / 2, rel=1e-12)


def test_soft_clip_is_least_where_brain_is_image():
    """Cross-entropy with its own distribution as target is the entropy, the smallest value there is."""
    brain, image = make_pair()
    v = to_unit(image)
    targets = np.exp(v @ v.T / 0.3)
    targets /= targets.sum(1, keepdims=True)
    entropy = -(targets * np.log(targets)).sum(1).mean()
    assert float(compute_soft_clip_loss(image, image, temperature=0.3)) == pytest.approx(entropy, rel=1e-12)
    assert float(compute_soft_clip_loss(brain, image, temperature=0.3)) > entropy


def test_temperature_is_annealed_over_the_phase():
    assert anneal_cosine(0.004, 0.0075, 0.0) == pytest.approx(0.004)
    assert anneal_cosine(0.004, 0.0075, 1.0) == pytest.approx(0.0075)
    brain, image = make_pair()
    objective = SoftClipObjectiveConfig(phase=(0.5, 1.0)).build()
    labels = torch.arange(6)
    for progress, temperature in ((0.5, 0.004), (0.75, 0.00575), (1.0, 0.0075)):
        outputs = Outputs(brain=brain, image=image, stimuli=labels, concepts=labels, progress=progress)
        expected = compute_soft_clip_loss(brain, image, temperature=temperature)
        assert float(objective(outputs)) == pytest.approx(float(expected), rel=1e-9)


PARTNER = torch.tensor([2, 0, 2, 5, 1, 3])
SHARE = torch.tensor([0.3, 1.0, 0.6, 0.9, 0.2, 0.0], dtype=torch.float64)
STIMULI = torch.tensor([0, 1, 2, 1, 3, 0])


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
def test_bimixco_equals_loops(duplicates):
    brain, image = make_pair()
    logits = to_unit(brain) @ to_unit(image).T / 0.2
    targets, allowed = np.zeros((6, 6)), np.ones((6, 6), bool)
    for i in range(6):
        for part, weight in ((i, float(SHARE[i])), (int(PARTNER[i]), 1 - float(SHARE[i]))):
            same = [j for j in range(6) if STIMULI[j] == STIMULI[part]]
            if duplicates == "positive":
                targets[i, same] += weight / len(same)
            else:
                targets[i, part] += weight
            if duplicates == "mask" and (part == i or weight > 0):
                allowed[i, same] = False
        allowed[i] |= (targets[i] > 0) | (np.arange(6) == i)
    expected = reference_cross_entropy(logits, targets, allowed)
    expected += reference_cross_entropy(logits.T, targets.T, allowed.T)
    got = compute_bimixco_loss(brain, image, PARTNER, SHARE, STIMULI, temperature=0.2, duplicates=duplicates)
    assert float(got) == pytest.approx(expected / 2, rel=1e-12)


def test_bimixco_without_mixing_is_clip():
    """A trial that is its own partner must keep its whole target, whatever its share."""
    brain, image = make_pair()
    expected = compute_clip_loss(brain, image, STIMULI, scale=1 / 0.2)
    own = torch.arange(6)
    for partner, share in ((PARTNER, torch.ones(6)), (own, torch.full((6,), 0.4)), (own, torch.ones(6))):
        got = compute_bimixco_loss(brain, image, partner, share, STIMULI, temperature=0.2)
        assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_gradients():
    brain, image = make_pair()
    brain.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: compute_soft_clip_loss(b, image, temperature=0.2), brain)
    for duplicates in ("positive", "mask", "negative"):
        assert torch.autograd.gradcheck(
            lambda b, v, d=duplicates: compute_bimixco_loss(
                b, v, PARTNER, SHARE, STIMULI, temperature=0.2, duplicates=d
            ),
            (brain, image.requires_grad_()),
        )


def test_bimixco_is_over_after_the_first_third():
    config = BimixcoObjectiveConfig()
    assert config.is_active(0.0)
    assert config.is_active(0.329)
    assert not config.is_active(0.33)


def test_partners_must_fit_the_batch():
    brain, image = make_pair()
    with pytest.raises(DataError, match="one partner and one share"):
        compute_bimixco_loss(brain, image, PARTNER[:4], SHARE[:4], temperature=0.1)
