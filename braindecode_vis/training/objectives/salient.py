"""Common and salient parts of the response, with data from before the stimulus as background (SepCLR).

The output is split in two: a common part that any stretch of the recording has, and a salient part that only the
response to an image may fill. The formula is that of the authors' released training scripts (the kernel joint entropy
variant), which we read; the paper itself we did not check it against. What is ours: pre-stimulus data as background,
repetition halves as the two views, one view of the background where theirs has two, and the default weights.

References
----------
Louiset et al. (2024), Separating common from salient patterns with contrastive representation learning, ICLR.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.training.objectives.similarity import multiply, normalise, upcast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.structure_configs import SalientObjectiveConfig
    from braindecode_vis.training.outputs import Outputs


def compute_salient_loss(
    views: Tensor,
    background: Tensor,
    *,
    n_common: int,
    bandwidth: float = 0.5,
    salient_weight: float = 1.0,
    constant_weight: float = 100.0,
    independence_weight: float = 10.0,
) -> Tensor:
    """Return the sum of four terms over common parts c (unit length) and salient parts s (as they are).

    - common: alignment ``mean |c_1 - c_v|^2`` of the views of the responses, plus twice the uniformity of the common
      parts of responses and background together;
    - salient: the same alignment of s for the responses, plus twice the uniformity of s with the background's set to
      zero;
    - constant: mean squared length of the background's s;
    - independence: ``mean_i log mean_j k(c_i, c_j) k(s_i, s_j)`` with the background's s set to zero, the negative of
      a kernel estimate of the joint entropy.

    Uniformity is ``log mean_{i<j} k(x_i, x_j)`` and the kernel ``k(x, y) = exp(-|x - y|^2 / (2 * bandwidth))``.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
        Two or more outputs for the responses.
    background : tensor of shape (n_background, d)
        Outputs for the background.
    n_common
        How many of the d features, from the first, are common.
    bandwidth
        The paper's tau.
    salient_weight, constant_weight, independence_weight
        Factors of the terms; that of the common one is 1.
    """
    if views.ndim != 3 or len(views) < 2 or background.shape[1:] != views.shape[2:] or len(background) == 0:
        raise DataError(
            "the salient objective needs two or more views of the responses and background of as many features, but "
            f"got views of shape {tuple(views.shape)} and background of shape {tuple(background.shape)}."
        )
    if not 0 < n_common < views.shape[-1]:
        raise ConfigError(
            f"the salient objective keeps {n_common} of {views.shape[-1]} features as common: leave some for each part."
        )
    views, background = upcast(views), upcast(background)
    common, salient = normalise(views[..., :n_common]), views[..., n_common:]
    background_common, background_salient = normalise(background[:, :n_common]), background[:, n_common:]

    def average(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    aligned_common = (common[1:] - common[:1]).square().sum(-1).mean()
    aligned_salient = (salient[1:] - salient[:1]).square().sum(-1).mean()
    uniform_common, uniform_salient, joint = [], [], []
    for view_common, view_salient in zip(common, salient, strict=True):
        all_common = compute_log_kernel(torch.cat([view_common, background_common]), bandwidth)
        all_salient = compute_log_kernel(
            torch.cat([view_salient, torch.zeros_like(background_salient)]), bandwidth
        )
        uniform_common.append(_compute_log_mean_off_diagonal(all_common))
        uniform_salient.append(_compute_log_mean_off_diagonal(all_salient))
        joint.append(((all_common + all_salient).logsumexp(-1) - math.log(len(all_common))).mean())
    common_term = aligned_common + 2 * average(uniform_common)
    salient_term = aligned_salient + 2 * average(uniform_salient)
    constant_term = background_salient.square().sum(-1).mean()
    return (
        common_term
        + salient_weight * salient_term
        + constant_weight * constant_term
        + independence_weight * average(joint)
    )


def compute_log_kernel(vectors: Tensor, bandwidth: float) -> Tensor:
    """Return ``-|x_i - x_j|^2 / (2 * bandwidth)`` for all pairs, shape (n, n).

    Parameters
    ----------
    vectors : tensor of shape (n, d)
    bandwidth
        Scale of the squared distance.
    """
    # Distances do not change by centring, but their rounding does where vectors share a large offset.
    centred = vectors - vectors.mean(0)
    lengths = centred.square().sum(-1)
    distances = (lengths[:, None] + lengths[None, :] - 2 * multiply(centred, centred)).clamp_min(0.0)
    return -distances / (2 * bandwidth)


def _compute_log_mean_off_diagonal(exponents: Tensor) -> Tensor:
    n = len(exponents)
    diagonal = torch.eye(n, dtype=torch.bool, device=exponents.device)
    return exponents.masked_fill(diagonal, -math.inf).flatten().logsumexp(0) - math.log(n * (n - 1))


class SalientTerm(nn.Module):
    """`compute_salient_loss` of the trials, their other views and their background."""

    def __init__(self, config: SalientObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        config = self.config
        assert outputs.brain_views is not None
        assert outputs.background is not None
        views = torch.cat([outputs.brain[None], outputs.brain_views])
        return compute_salient_loss(
            views, outputs.background, n_common=round(config.common_share * views.shape[-1]),
            bandwidth=config.bandwidth, salient_weight=config.salient_weight,
            constant_weight=config.constant_weight, independence_weight=config.independence_weight,
        )  # fmt: skip
