"""Multi-view contrasts against loops in double precision."""

import math

import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import Outputs
from braindecode_vis.training.objectives.objectives_config import MultiviewObjectiveConfig
from braindecode_vis.training.objectives.structure import compute_mv_dhel, compute_mv_infonce

STIMULI = torch.tensor([0, 1, 0, 2])


def make_views(n_views=3, n=4, d=5):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n_views, n, d, generator=generator, dtype=torch.float64)


def make_kernel(views, temperature):
    unit = views / views.norm(dim=-1, keepdim=True)
    return lambda i, k, j, m: math.exp(float(unit[k, i] @ unit[m, j]) / temperature)


def is_dropped(stimuli, i, j):
    return stimuli is not None and i != j and int(stimuli[i]) == int(stimuli[j])


@pytest.mark.parametrize("stimuli", [None, STIMULI])
def test_mv_infonce_equals_loops(stimuli):
    views = make_views()
    e, n_views, n, total = make_kernel(views, 0.5), 3, 4, 0.0
    for i in range(n):
        up = sum(e(i, k, i, m) for k in range(n_views) for m in range(n_views) if k != m)
        down = 0.0
        for k in range(n_views):
            for m in range(n_views):
                for j in range(n):
                    if (j, m) != (i, k) and not is_dropped(stimuli, i, j):
                        down += e(i, k, j, m)
        total -= math.log(up / down) / n
    got = compute_mv_infonce(views, stimuli, temperature=0.5)
    assert float(got) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("stimuli", [None, STIMULI])
def test_mv_dhel_equals_loops(stimuli):
    views = make_views()
    e, n_views, n, total = make_kernel(views, 0.5), 3, 4, 0.0
    for i in range(n):
        up = sum(e(i, k, i, m) for k in range(n_views) for m in range(k + 1, n_views))
        down = 1.0
        for k in range(n_views):
            down *= sum(e(i, k, j, k) for j in range(n) if j != i and not is_dropped(stimuli, i, j))
        total -= math.log(up / down) / n
    assert float(compute_mv_dhel(views, stimuli, temperature=0.5)) == pytest.approx(total, rel=1e-12)


def test_product_of_many_views_does_not_overflow():
    """Eight views of 64 trials at temperature 0.01: the product of sums is far beyond single precision."""
    views = make_views(8, 64, 3).float()
    assert torch.isfinite(compute_mv_dhel(views, temperature=0.01))
    assert torch.isfinite(compute_mv_infonce(views, temperature=0.01))


@pytest.mark.parametrize("compute", [compute_mv_infonce, compute_mv_dhel])
def test_order_of_views_and_gradients(compute):
    views = make_views()
    value = compute(views, STIMULI, temperature=0.3)
    assert float(compute(views.flip(0), STIMULI, temperature=0.3)) == pytest.approx(float(value), rel=1e-12)
    assert torch.autograd.gradcheck(lambda v: compute(v, STIMULI, temperature=0.3), views.requires_grad_())


@pytest.mark.parametrize("compute", [compute_mv_infonce, compute_mv_dhel])
def test_views_that_agree_score_better(compute):
    views = make_views()
    agreeing = views[:1].expand(3, -1, -1)
    mixed_up = torch.stack([views[0].roll(shift, 0) for shift in range(3)])
    assert compute(agreeing, temperature=0.2) < compute(mixed_up, temperature=0.2)


def test_settings_choose_the_views():
    views = make_views(4)
    outputs = Outputs(
        brain=views[0],
        image=views[1],
        stimuli=STIMULI,
        concepts=STIMULI,
        brain_views=views[2:3],
        image_views=views[3:],
    )
    config = MultiviewObjectiveConfig(views=("brain", "image", "brain_views", "image_views"))
    assert config.needs == {"brain_views", "image_views"}
    expected = compute_mv_dhel(views, STIMULI, temperature=0.1)
    assert float(config.build()(outputs)) == pytest.approx(float(expected), rel=1e-12)
    assert MultiviewObjectiveConfig(views=("brain", "image")).needs == frozenset()
    with pytest.raises(DataError, match="at least two views"):
        MultiviewObjectiveConfig(views=("brain",)).build()(outputs)
    outputs.brain_views = views[2:3, :, :2]
    with pytest.raises(DataError, match="same trials and features"):
        config.build()(outputs)
