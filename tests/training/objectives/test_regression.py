"""Regression of the target by loops."""

import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import Outputs
from braindecode_vis.training.objectives.regression import (
    RegressionTerm,
    compute_cosine_distance,
    compute_l1,
    compute_mse,
)
from tests.references import CLOSE


def make_pair(shape=(4, 3, 2)):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_mse_and_cosine_equal_loops():
    predicted, target = make_pair()
    rows = list(zip(predicted.flatten(1), target.flatten(1), strict=True))
    squares = sum(float(((a - b) ** 2).sum()) for a, b in rows) / predicted.numel()
    cosine = sum(float(a @ b / a.norm() / b.norm()) for a, b in rows) / len(rows)
    absolutes = sum(abs(float(x - y)) for a, b in rows for x, y in zip(a, b, strict=True)) / predicted.numel()
    assert float(compute_mse(predicted, target)) == pytest.approx(squares, rel=1e-12)
    assert float(compute_l1(predicted, target)) == pytest.approx(absolutes, rel=1e-12)
    assert float(compute_cosine_distance(predicted, target)) == pytest.approx(1 - cosine, rel=1e-12)


@pytest.mark.parametrize("compute", [compute_mse, compute_l1, compute_cosine_distance])
def test_perfect_prediction_and_gradients(compute):
    predicted, target = make_pair()
    assert float(compute(target, target)) == pytest.approx(0.0, abs=CLOSE)
    assert torch.autograd.gradcheck(compute, (predicted.requires_grad_(), target.requires_grad_()))


@pytest.mark.parametrize("compute", [compute_mse, compute_l1, compute_cosine_distance])
def test_shapes_are_not_broadcast(compute):
    with pytest.raises(DataError, match="as many outputs"):
        compute(torch.zeros(4, 1), torch.zeros(4, 3))


@pytest.mark.parametrize("compute", [compute_mse, compute_l1, compute_cosine_distance])
def test_the_regression_head_is_compared_with_the_untouched_target(compute):
    """And not with what the image side makes of it."""
    brain, made, raw = (torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    numbers = torch.arange(6)
    outputs = Outputs(brain, brain, numbers, numbers, 0.5, regression=made, raw_target=raw)
    assert RegressionTerm(compute)(outputs) == pytest.approx(float(compute(made, raw)), rel=CLOSE)
