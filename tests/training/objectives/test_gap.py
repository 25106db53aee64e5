"""Alignment and uniformity against loops, and what they say of simple arrangements."""

import math

import pytest
import torch

from braindecode_vis.training.objectives.objective import Outputs, compute_clip_loss
from braindecode_vis.training.objectives.objectives_config import UniformityObjectiveConfig
from braindecode_vis.training.objectives.structure import (
    compute_alignment,
    compute_cross_uniformity,
    compute_cua_loss,
    compute_uniformity,
)

STIMULI = torch.tensor([0, 1, 0, 2, 3])


def make_pair(n=5, d=4):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def reference_log_mean(left, right, keep):
    values = []
    for i in range(len(left)):
        for j in range(len(right)):
            if keep(i, j):
                a, b = left[i] / left[i].norm(), right[j] / right[j].norm()
                values.append(math.exp(-2 * float(((a - b) ** 2).sum())))
    return math.log(sum(values) / len(values))


def test_terms_equal_loops():
    brain, image = make_pair()
    pairs = list(zip(brain, image, strict=True))
    align = sum(float(((a / a.norm() - b / b.norm()) ** 2).sum()) for a, b in pairs) / 5
    uniform = reference_log_mean(brain, brain, lambda i, j: i < j)
    masked = reference_log_mean(brain, brain, lambda i, j: i < j and STIMULI[i] != STIMULI[j])
    cross = reference_log_mean(brain, image, lambda i, j: i != j)
    assert float(compute_alignment(brain, image)) == pytest.approx(align, rel=1e-12)
    assert float(compute_uniformity(brain)) == pytest.approx(uniform, rel=1e-12)
    assert float(compute_uniformity(brain, STIMULI)) == pytest.approx(masked, rel=1e-12)
    assert float(compute_cross_uniformity(brain, image)) == pytest.approx(cross, rel=1e-12)


def test_uniformity_equals_torch_pdist():
    brain, _ = make_pair(9, 4)
    expected = torch.pdist(torch.nn.functional.normalize(brain)).pow(2).mul(-2).exp().mean().log()
    assert float(compute_uniformity(brain)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("cross", [False, True])
def test_cua_is_the_sum_of_its_terms(cross):
    brain, image = make_pair()
    expected = compute_clip_loss(brain, image, scale=3.0) + compute_alignment(brain, image)
    expected = expected + (compute_uniformity(brain) + compute_uniformity(image)) / 2
    if cross:
        expected = expected + compute_cross_uniformity(brain, image)
    assert float(compute_cua_loss(brain, image, scale=3.0, cross=cross)) == pytest.approx(float(expected))
    ignored = compute_cua_loss(brain, image, STIMULI, scale=3.0, cross=cross, duplicates="negative")
    assert float(ignored) == pytest.approx(float(expected))


def test_gradients_also_where_vectors_coincide():
    brain, image = make_pair()
    assert torch.autograd.gradcheck(
        lambda b, v: compute_cua_loss(b, v, STIMULI, scale=2.0, cross=True),
        (brain.requires_grad_(), image.requires_grad_()),
    )
    collapsed = torch.ones(5, 4, requires_grad=True)
    compute_uniformity(collapsed).backward()
    assert torch.isfinite(collapsed.grad).all()


def test_collapse_is_the_worst_and_perfect_alignment_zero():
    image = torch.eye(6)
    assert float(compute_alignment(image, 5 * image)) == pytest.approx(0.0, abs=1e-6)
    assert float(compute_uniformity(torch.ones(6, 3))) == pytest.approx(0.0, abs=1e-6)
    assert float(compute_uniformity(image)) == pytest.approx(-4.0, rel=1e-6)


def test_uniformity_of_the_chosen_side():
    brain, image = make_pair()
    outputs = Outputs(brain=brain, image=image, stimuli=STIMULI, concepts=STIMULI)
    values = {
        side: float(UniformityObjectiveConfig(between=side).build()(outputs))
        for side in ("brain", "image", "both")
    }
    assert values["both"] == pytest.approx((values["brain"] + values["image"]) / 2)
    cross = UniformityObjectiveConfig(between="cross", duplicates="negative").build()(outputs)
    assert float(cross) == pytest.approx(float(compute_cross_uniformity(brain, image)))
