"""SigLIP against loops in double precision."""

import math

import pytest
import torch

from braindecode_vis.training.objectives.contrastive import compute_siglip_loss
from braindecode_vis.training.objectives.objectives_config import SiglipObjectiveConfig


def make_batch():
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    image[4] = 3 * image[1]  # cosine 1, another index
    brain = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return brain, image, torch.tensor([0, 1, 2, 0, 3, 4])


SAME = {(0, 3), (3, 0), (1, 4), (4, 1)}


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
def test_siglip_equals_loops(duplicates):
    brain, image, stimuli = make_batch()
    total = 0.0
    for i in range(6):
        for j in range(6):
            cosine = float(brain[i] @ image[j] / brain[i].norm() / image[j].norm())
            if duplicates == "mask" and (i, j) in SAME:
                continue
            match = i == j or (duplicates == "positive" and (i, j) in SAME)
            total += math.log1p(math.exp(-(1 if match else -1) * (4.0 * cosine - 2.0)))
    got = compute_siglip_loss(brain, image, stimuli, scale=4.0, bias=-2.0, duplicates=duplicates)
    assert float(got) == pytest.approx(total / 6, rel=1e-12)


def test_gradients():
    brain, image, stimuli = make_batch()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -1.0))
    assert torch.autograd.gradcheck(
        lambda b, v, s, o: compute_siglip_loss(b, v, stimuli, scale=s, bias=o, duplicate_cosine=2.0),
        (brain.requires_grad_(), image.requires_grad_(), scale, bias),
    )


def test_perfect_alignment_beats_a_shuffle():
    image = torch.eye(5)
    right = compute_siglip_loss(image, image, scale=10.0, bias=-5.0)
    wrong = compute_siglip_loss(image.roll(1, 0), image, scale=10.0, bias=-5.0)
    assert float(right) == pytest.approx(5 * math.log1p(math.exp(-5)), rel=1e-5)
    assert wrong > right + 1


def test_start_values_and_parameters():
    learned = SiglipObjectiveConfig().build()
    assert learned.term.scale().item() == pytest.approx(10.0)
    assert learned.term.bias.item() == -10.0
    assert len(list(learned.parameters())) == 2
