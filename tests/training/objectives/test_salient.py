"""SepCLR's terms against loops in double precision."""

import math

import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.training.objectives.objectives_config import SalientObjectiveConfig
from braindecode_vis.training.objectives.structure import compute_log_kernel, compute_salient_loss


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(a, b, bandwidth=0.5):
    return math.exp(-float(((a - b) ** 2).sum()) / (2 * bandwidth))


def reference(views, background, n_common, weights):
    def split(row):
        common = row[:n_common]
        return common / common.norm(), row[n_common:]

    responses = [[split(row) for row in view] for view in views]
    rest = [split(row) for row in background]
    n_views, n = len(responses), len(responses[0])
    pairs = [(v, i) for v in range(1, n_views) for i in range(n)]
    align = [
        sum(float(((responses[0][i][p] - responses[v][i][p]) ** 2).sum()) for v, i in pairs) / len(pairs)
        for p in (0, 1)
    ]
    uniform, joint = [0.0, 0.0], 0.0
    for view in responses:
        commons = [c for c, _ in view] + [c for c, _ in rest]
        salients = [s for _, s in view] + [torch.zeros_like(s) for _, s in rest]
        m = len(commons)
        for p, rows in enumerate((commons, salients)):
            values = [kernel(rows[i], rows[j]) for i in range(m) for j in range(i)]
            uniform[p] += math.log(sum(values) / len(values)) / n_views
        for i in range(m):
            mean = (
                sum(kernel(commons[i], commons[j]) * kernel(salients[i], salients[j]) for j in range(m)) / m
            )
            joint += math.log(mean) / m / n_views
    constant = sum(float((s**2).sum()) for _, s in rest) / len(rest)
    constant_weight, independence_weight = weights
    return (
        align[0] + 2 * uniform[0] + align[1] + 2 * uniform[1]
        + constant_weight * constant + independence_weight * joint
    )  # fmt: skip


@pytest.mark.parametrize("weights", [(100.0, 10.0), (0.0, 0.0), (3.0, 0.0), (0.0, 5.0)])
def test_salient_loss_equals_loops(weights):
    views, background = make(3, 4, 6), make(5, 6, seed=1)
    got = compute_salient_loss(
        views,
        background,
        n_common=4,
        constant_weight=weights[0],
        independence_weight=weights[1],
    )
    assert float(got) == pytest.approx(reference(views, background, 4, weights), rel=1e-10)


def test_gradients():
    views, background = make(2, 4, 6), make(3, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda v, b: compute_salient_loss(v, b, n_common=3),
        (views.requires_grad_(), background.requires_grad_()),
    )


def test_kernel_keeps_small_distances_beside_a_large_offset():
    rows = make(6, 4)
    exact = compute_log_kernel(rows, 0.5)
    shifted = compute_log_kernel((rows + 1000.0).float(), 0.5)
    assert torch.allclose(shifted.double(), exact, atol=5e-3)


def test_a_salient_background_costs():
    views, background = make(2, 8, 6), make(8, 6, seed=1)
    quiet = torch.cat([background[:, :3], torch.zeros(8, 3, dtype=torch.float64)], dim=1)
    assert compute_salient_loss(views, quiet, n_common=3) < compute_salient_loss(
        views, background, n_common=3
    )


def test_independent_parts_beat_copies():
    """The joint entropy of two independent parts is larger than that of a part and its copy."""
    common, other = (torch.nn.functional.normalize(make(64, 3, seed=s), dim=-1) for s in (0, 1))
    background = torch.cat([make(64, 3, seed=2), torch.zeros(64, 3, dtype=torch.float64)], dim=1)
    losses = []
    for salient in (other, common):
        view = torch.cat([common, salient], dim=1)
        losses.append(
            compute_salient_loss(torch.stack([view, view]), background, n_common=3, independence_weight=10.0)
        )
    assert losses[0] < losses[1]


def test_bad_input():
    with pytest.raises(DataError, match="two or more views"):
        compute_salient_loss(make(1, 4, 6), make(4, 6), n_common=3)
    with pytest.raises(ConfigError, match="leave some for each part"):
        compute_salient_loss(make(2, 4, 6), make(4, 6), n_common=6)


def test_half_of_the_outputs_are_common_and_no_other_share_is_taken():
    assert SalientObjectiveConfig(common_share=0.5) == SalientObjectiveConfig()
    with pytest.raises(ValidationError, match="common_share was removed: it is always"):
        SalientObjectiveConfig(common_share=1.0)
