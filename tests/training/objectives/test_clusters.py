"""Negatives from an image's own group, against loops in double precision."""

import math

import pytest
import torch

from braindecode_vis.training.objectives.contrastive import compute_within_group_loss
from braindecode_vis.training.objectives.objective import Outputs, compute_clip_loss
from braindecode_vis.training.objectives.objectives_config import ClusterObjectiveConfig

STIMULI = torch.tensor([0, 1, 0, 2, 3, 4, 5])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2])


def make_pair(n=7, d=5):
    generator = torch.Generator().manual_seed(6)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))


def reference(brain, image, duplicates):
    def one_way(queries, keys):
        losses = []
        for i in range(7):
            same = [j for j in range(7) if STIMULI[j] == STIMULI[i]] if duplicates != "negative" else [i]
            negatives = [j for j in range(7) if GROUPS[j] == GROUPS[i] and j not in same]
            positives = same if duplicates == "positive" else [i]
            score = {
                j: 3.0 * float(queries[i] @ keys[j] / queries[i].norm() / keys[j].norm()) for j in range(7)
            }
            normaliser = math.log(sum(math.exp(score[j]) for j in {*negatives, *positives}))
            if negatives:
                losses.append(normaliser - sum(score[j] for j in positives) / len(positives))
        return sum(losses) / len(losses)

    return (one_way(brain, image) + one_way(image, brain)) / 2


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
def test_within_group_loss_equals_loops(duplicates):
    brain, image = make_pair()
    got = compute_within_group_loss(brain, image, GROUPS, STIMULI, scale=3.0, duplicates=duplicates)
    assert float(got) == pytest.approx(reference(brain, image, duplicates), rel=1e-12)


def test_one_group_is_clip():
    brain, image = make_pair()
    for symmetric in (True, False):
        got = compute_within_group_loss(
            brain, image, torch.zeros(7), STIMULI, scale=3.0, symmetric=symmetric, normalise_brain=False
        )
        expected = compute_clip_loss(
            brain, image, STIMULI, scale=3.0, symmetric=symmetric, normalise_brain=False
        )
        assert float(got) == pytest.approx(float(expected), rel=1e-12)


def test_other_groups_do_not_matter():
    """A change of another group's images leaves a trial's loss and gradient as they are."""
    brain, image = make_pair()
    gradients = []
    for factor in (1.0, -1.0):
        changed = torch.cat([image[:3], factor * image[3:]])
        leaf = brain.clone().requires_grad_()
        compute_within_group_loss(leaf, changed, GROUPS, STIMULI, scale=3.0).backward()
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0][:3], gradients[1][:3], atol=1e-12)
    assert not torch.allclose(gradients[0][3:6], gradients[1][3:6])


def test_a_batch_without_negatives_has_nothing_to_learn():
    brain, image = make_pair()
    brain.requires_grad_()
    loss = compute_within_group_loss(brain, image, torch.arange(7), scale=3.0)
    loss.backward()
    assert loss.item() == 0.0
    assert float(brain.grad.abs().max()) == 0.0


def test_gradients():
    brain, image = make_pair()
    assert torch.autograd.gradcheck(
        lambda b, v: compute_within_group_loss(b, v, GROUPS, STIMULI, scale=2.0),
        (brain.requires_grad_(), image.requires_grad_()),
    )


def test_the_objective_takes_the_clusters_and_not_the_concepts():
    brain, image = make_pair()
    concepts = torch.tensor([0, 1, 0, 1, 2, 2, 0])
    outputs = Outputs(brain=brain, image=image, stimuli=STIMULI, concepts=concepts, clusters=GROUPS)
    expected = compute_within_group_loss(brain, image, GROUPS, STIMULI, scale=1 / 0.07)
    assert ClusterObjectiveConfig().build()(outputs).item() == pytest.approx(float(expected), rel=1e-6)
