"""PixPro's propagation for tokens in time, against loops in double precision.

The released code (zdaxie/PixPro@e390d6b), run beside this one on the same random tokens in double precision with cells
in a row: smoothed tokens differ by 0, the loss (whose factor is 4, and whose counts have 1e-6 added) by 3.4e-8.
"""

import math

import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.captioning import (
    PropagationTerm,
    compute_propagation_loss,
    find_near,
    propagate,
)
from braindecode_vis.training.objectives.objective import Outputs, StepSizes


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_propagation_equals_loops():
    tokens, values = make(2, 5, 4), make(2, 5, 3, seed=1)
    got = propagate(tokens, values)
    for trial in range(2):
        for p in range(5):
            total = torch.zeros(3, dtype=torch.float64)
            for q in range(5):
                similarity = max(cosine(tokens[trial, p], tokens[trial, q]), 0.0)
                total += similarity**2 * values[trial, q] / values[trial, q].norm()
            torch.testing.assert_close(got[trial, p], total)
    assert torch.autograd.gradcheck(
        lambda x, v: propagate(x, v), (tokens.requires_grad_(), values.requires_grad_())
    )


def test_near_is_a_matter_of_milliseconds():
    """Steps of 20 ms, the second view shifted by 13 ms: neighbours are 7 and 13 ms away."""
    times = torch.arange(4) * 20.0
    other = times - 13.0
    assert find_near(times, other).sum() == 4 + 3  # 0.7 of a step is 14 ms
    assert not find_near(times, times + 500.0).any()
    assert find_near(times[:1], times[:1] + 99.0).all()


def test_the_loss_equals_loops_and_leaves_trials_without_a_pair_out():
    smooth, targets = make(4, 5, 3), make(4, 5, 3, seed=1)
    times = torch.arange(5) * 10.0
    near = find_near(times.expand(4, 5), times - torch.tensor([0.0, 6.0, -12.0, 400.0])[:, None])
    means = []
    for trial in range(3):
        pairs = near[trial].nonzero().tolist()
        means.append(sum(1 - cosine(smooth[trial, p], targets[trial, q]) for p, q in pairs) / len(pairs))
    assert float(compute_propagation_loss(smooth, targets, near)) == pytest.approx(sum(means) / 3, rel=1e-12)
    nothing = compute_propagation_loss(smooth.requires_grad_(), targets, torch.zeros_like(near))
    assert nothing.item() == 0.0
    nothing.backward()
    assert torch.equal(smooth.grad, torch.zeros_like(smooth))


def test_no_gradient_flows_to_the_other_view():
    smooth, targets = make(2, 3, 4).requires_grad_(), make(2, 3, 4, seed=1).requires_grad_()
    near = torch.ones(2, 3, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: compute_propagation_loss(x, targets, near), smooth)
    compute_propagation_loss(smooth, targets, near).backward()
    assert targets.grad is None


def test_equal_views_cost_nothing_and_half_precision_little():
    tokens = make(8, 6, 32).float()
    near = torch.eye(6, dtype=torch.bool).expand(8, 6, 6)
    assert compute_propagation_loss(tokens, 3 * tokens, near).item() == pytest.approx(0, abs=1e-6)
    smooth, other = propagate(tokens, tokens), make(8, 6, 32, seed=1).float()
    exact = compute_propagation_loss(smooth, other, near)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = propagate(tokens.bfloat16(), tokens.bfloat16())
        half = compute_propagation_loss(rounded.bfloat16(), other.bfloat16(), near)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(exact), rel=2e-3)
    assert math.isfinite(float(propagate(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).sum()))


def test_bad_input():
    with pytest.raises(DataError, match="trials, tokens, features"):
        compute_propagation_loss(make(3, 2), make(3, 2), torch.ones(3, 2, 2, dtype=torch.bool))


def make_term(step=20.0, **options):
    term = PropagationTerm(**{"targets": "self", **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        term.prepare(StepSizes(n_common=4, n_tokens=5, token_step=step))
    return term.double()


def make_outputs(offsets=(0.0, 0.0, 0.0)):
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    return Outputs(
        zeros, zeros, torch.arange(3), torch.arange(3), token_views=make(2, 3, 5, 4),
        token_offsets=torch.tensor([[0.0] * 3, offsets], dtype=torch.float64),
        teacher_tokens=make(2, 3, 5, 4, seed=4),
    )  # fmt: skip


def test_a_shifted_view_is_compared_where_it_came_from():
    """The second view is 20 ms, one step, late: its window k shows what window k - 1 of the first shows."""
    outputs = make_outputs((20.0, 20.0, 20.0))
    term, views = make_term(), outputs.token_views
    smooth = propagate(views, term.transform(views)).detach()
    total = 0.0
    for trial in range(3):
        for k in range(1, 5):
            total += 1 - cosine(smooth[0, trial, k - 1], views[1, trial, k])
            total += 1 - cosine(smooth[1, trial, k], views[0, trial, k - 1])
    assert term(outputs).item() == pytest.approx(total / 24, rel=1e-9)
    taught = outputs.teacher_tokens
    total = sum(
        2 - cosine(smooth[0, i, k - 1], taught[1, i, k]) - cosine(smooth[1, i, k], taught[0, i, k - 1])
        for i in range(3) for k in range(1, 5)
    )  # fmt: skip
    assert make_term(targets="teacher")(outputs).item() == pytest.approx(total / 24, rel=1e-9)


def test_tokens_that_are_not_in_time_are_near_themselves_alone():
    still, late = make_outputs(), make_outputs((400.0, 20.0, -90.0))
    assert make_term(None)(late).item() == make_term(None)(still).item() == make_term(20.0)(still).item()


def test_the_gradient_of_itself_as_target_is_that_of_a_target_that_stays():
    """Finite differences cannot say so: they would move the targets too."""
    found = {}
    for targets in ("self", "teacher"):
        outputs = make_outputs((20.0, -20.0, 7.0))
        outputs.teacher_tokens = outputs.token_views.clone()
        outputs.token_views.requires_grad_()
        make_term(targets=targets)(outputs).backward()
        found[targets] = outputs.token_views.grad
    torch.testing.assert_close(found["self"], found["teacher"])
