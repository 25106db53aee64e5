"""Momentum distillation and TCL's terms against loops in double precision."""

import math

import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.distillation import (
    compute_distillation_loss,
    compute_local_loss,
    compute_queue_contrast,
)
from braindecode_vis.training.objectives.objective import Outputs, compute_clip_loss
from braindecode_vis.training.objectives.objectives_config import (
    DistillationObjectiveConfig,
    TclObjectiveConfig,
)

STIMULI = torch.tensor([0, 1, 0, 2])


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def reference_contrast(vectors, teacher, queue, temperature, soft_from, alpha, stimuli, duplicates):
    candidates = [*teacher, *queue]
    total = 0.0
    for i, x in enumerate(vectors):
        same = [j for j in range(len(vectors)) if stimuli[j] == stimuli[i]]
        kept = [k for k in range(len(candidates)) if duplicates != "mask" or k == i or k not in same]
        positives = same if duplicates == "positive" else [i]
        scores = {k: cosine(x, candidates[k]) / temperature for k in kept}
        opinion = {k: math.exp(cosine(soft_from[i], candidates[k]) / temperature) for k in kept}
        for k in kept:
            q = alpha * opinion[k] / sum(opinion.values()) + (1 - alpha) * (k in positives) / len(positives)
            total -= q * (scores[k] - math.log(sum(math.exp(s) for s in scores.values())))
    return total / len(vectors)


@pytest.mark.parametrize("n_queue", [0, 3])
@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
def test_distillation_equals_loops(n_queue, duplicates):
    brain, image, t_brain, t_image = (make(4, 5, seed=s) for s in range(4))
    q_brain, q_image = make(n_queue, 5, seed=8), make(n_queue, 5, seed=9)
    args = (0.4, STIMULI.tolist(), duplicates)
    expected = reference_contrast(brain, t_image, q_image, 0.2, t_brain, *args)
    expected += reference_contrast(image, t_brain, q_brain, 0.2, t_image, *args)
    got = compute_distillation_loss(
        brain,
        image,
        t_brain,
        t_image,
        q_brain,
        q_image,
        STIMULI,
        temperature=0.2,
        alpha=0.4,
        duplicates=duplicates,
    )
    assert float(got) == pytest.approx(expected / 2, rel=1e-12)


def test_without_teacher_opinion_and_queue_it_is_clip():
    brain, image = make(4, 5), make(4, 5, seed=1)
    empty = make(0, 5)
    got = compute_distillation_loss(
        brain, image, brain, image, empty, empty, STIMULI, temperature=0.2, alpha=0.0, duplicates="mask"
    )
    expected = compute_clip_loss(brain, image, STIMULI, scale=5.0, duplicates="mask")
    assert float(got) == pytest.approx(float(expected), rel=1e-12)


def test_gradients_flow_to_the_student_only():
    brain, image, t_brain, t_image = (make(4, 5, seed=s).requires_grad_() for s in range(4))
    queue = make(2, 5, seed=8).requires_grad_()

    def loss(b, v):
        return compute_distillation_loss(
            b, v, t_brain, t_image, queue, queue, STIMULI, temperature=0.3, alpha=0.4
        )

    assert torch.autograd.gradcheck(loss, (brain, image))
    loss(brain, image).backward()
    assert brain.grad is not None
    assert t_brain.grad is None
    assert queue.grad is None


def test_a_bigger_queue_is_harder():
    brain, teacher = make(4, 5), make(4, 5)
    few = compute_queue_contrast(brain, teacher, make(2, 5, seed=5), temperature=0.5)
    many = compute_queue_contrast(brain, teacher, make(50, 5, seed=5), temperature=0.5)
    assert many > few


@pytest.mark.parametrize("stimuli", [None, STIMULI])
def test_local_loss_equals_loops(stimuli):
    tokens, vectors = make(4, 3, 5), make(4, 5, seed=1)
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if (i != j if stimuli is None else int(stimuli[i]) != int(stimuli[j]))]
        negatives = sum(math.exp(cosine(vectors[i], tokens[j, t]) / 0.3) for j in others for t in range(3))
        for t in range(3):
            positive = math.exp(cosine(vectors[i], tokens[i, t]) / 0.3)
            total -= math.log(positive / (positive + negatives)) / 12
    got = compute_local_loss(tokens, vectors, stimuli, temperature=0.3)
    assert float(got) == pytest.approx(total, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda t, v: compute_local_loss(t, v, stimuli, temperature=0.3),
        (tokens.requires_grad_(), vectors.requires_grad_()),
    )


def make_outputs(progress=0.5, n_queue=2):
    sides = [make(4, 5, seed=s) for s in range(4)]
    return Outputs(
        brain=sides[0], image=sides[1], stimuli=STIMULI, concepts=STIMULI, progress=progress,
        teacher_brain=sides[2], teacher_image=sides[3],
        queue_brain=make(n_queue, 5, seed=8), queue_image=make(n_queue, 5, seed=9), brain_tokens=make(4, 3, 5, seed=7),
    )  # fmt: skip


def test_alpha_grows_over_the_ramp():
    config = DistillationObjectiveConfig()
    for progress, alpha in ((0.0, 0.0), (0.0165, 0.2), (0.033, 0.4), (1.0, 0.4)):
        out = make_outputs(progress)
        expected = compute_distillation_loss(
            out.brain, out.image, out.teacher_brain, out.teacher_image, out.queue_brain, out.queue_image, STIMULI,
            temperature=0.07, alpha=alpha,
        )  # fmt: skip
        assert config.build()(out).item() == pytest.approx(float(expected), rel=1e-6)


def test_tcl_is_the_mean_of_five_terms():
    out = make_outputs()
    objective = TclObjectiveConfig().build()
    across = compute_distillation_loss(
        out.brain, out.image, out.teacher_brain, out.teacher_image, out.queue_brain, out.queue_image, STIMULI,
        temperature=0.07, alpha=0.4,
    )  # fmt: skip
    brain = compute_queue_contrast(out.brain, out.teacher_brain, out.queue_brain, STIMULI, temperature=0.07)
    image = compute_queue_contrast(out.image, out.teacher_image, out.queue_image, STIMULI, temperature=0.07)
    local = compute_local_loss(out.brain_tokens, out.brain, STIMULI, temperature=0.07)
    expected = (2 * across + brain + image + local) / 5
    # The learned temperature is of single precision.
    assert objective(out).item() == pytest.approx(float(expected), rel=1e-6)


def test_tokens_have_no_gradient():
    out = make_outputs()
    out.brain_tokens.requires_grad_()
    out.brain.requires_grad_()
    TclObjectiveConfig().build()(out).backward()
    assert out.brain_tokens.grad is None


def test_temperature_is_learned_within_bounds():
    objective = DistillationObjectiveConfig().build()
    with torch.no_grad():
        objective.term.temperature.raw.fill_(-3.0)
    first, second = objective(make_outputs()), objective(make_outputs())
    assert objective.term.temperature().item() == pytest.approx(0.001)
    (first + second).backward()
    assert torch.isfinite(objective.term.temperature.raw.grad)


def test_bad_input():
    with pytest.raises(DataError, match="soft_from"):
        compute_queue_contrast(make(3, 2), make(3, 2), make(0, 2), temperature=0.1, alpha=0.4)
    with pytest.raises(DataError, match="local outputs"):
        compute_local_loss(make(3, 2), make(3, 2), temperature=0.1)
