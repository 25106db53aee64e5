"""Consistency of local outputs between two augmentations of one trial: PixPro's propagation, for tokens in time.

A token is smoothed by those of its own view that resemble it, and shall then point where the tokens of the other view
point that lie near it in time. Nothing here compares trials, so that no batch is too small; a contrast beside it keeps
the outputs apart.

References
----------
Xie et al. (2021), Propagate yourself, arXiv:2011.10043; zdaxie/PixPro@e390d6b.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import autocast
from braindecode_vis.training.objectives.objective import normalise, upcast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs, StepSizes

#: Share of the step from one token to the next within which two tokens show the same, as in PixPro.
NEAR = 0.7


def propagate(tokens: Tensor, values: Tensor) -> Tensor:
    """Return ``y_p = sum_q max(cos(x_p, x_q), 0)^2 * v_q / |v_q|``, the propagation of PixPro.

    Parameters
    ----------
    tokens, values : tensors of shape (..., n_tokens, d)
        The x that are compared and the v that are summed.

    Examples
    --------
    >>> import torch
    >>> propagate(torch.eye(2), 3 * torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    with autocast(tokens.device):
        unit = normalise(tokens)
        similarity = (unit @ unit.mT).clamp_min(0.0)  # (..., n_tokens, n_tokens)
        return similarity.pow(2) @ normalise(values)


def find_near(times: Tensor, other_times: Tensor) -> Tensor:
    """Return which tokens of two views are less than 0.7 of a step apart, boolean of shape (..., n_tokens, n_tokens).

    Parameters
    ----------
    times, other_times : tensors of shape (..., n_tokens)
        Time of each token in the trial that both views were made of, in ms, equally spaced.

    Examples
    --------
    >>> import torch
    >>> find_near(torch.tensor([0.0, 10.0]), torch.tensor([4.0, 14.0])).tolist()
    [[True, False], [True, True]]
    """
    distance = (times[..., :, None] - other_times[..., None, :]).abs()
    if times.shape[-1] == 1:  # of one token there is no step
        return torch.ones_like(distance, dtype=torch.bool)
    return distance < NEAR * (times[..., 1] - times[..., 0]).abs()[..., None, None]


def compute_propagation_loss(propagated: Tensor, targets: Tensor, near: Tensor) -> Tensor:
    """Return one minus the mean cosine of near pairs of tokens, the mean over trials of the mean over their pairs.

    No gradient flows through the targets. Trials without a near pair are left out, and a batch without any gives 0.

    Parameters
    ----------
    propagated : tensor of shape (n, n_tokens, d)
        Smoothed tokens of one view.
    targets : tensor of shape (n, n_tokens, d)
        Tokens of the other view.
    near : boolean tensor of shape (n, n_tokens, n_tokens)
        From `find_near`, rows for `propagated`.

    Raises
    ------
    DataError
        If the views are not of one shape (trials, tokens, features).
    """
    if propagated.ndim != 3 or propagated.shape != targets.shape:
        raise DataError(
            "the tokens of two views must both be of shape (trials, tokens, features), but are "
            f"{tuple(propagated.shape)} and {tuple(targets.shape)}."
        )
    with autocast(propagated.device):
        cosine = normalise(propagated) @ normalise(targets.detach()).mT  # (n, n_tokens, n_tokens)
        pairs = near.to(cosine.dtype)
        count = pairs.sum(dim=(1, 2))
        each = 1.0 - (cosine * pairs).sum(dim=(1, 2)) / count.clamp_min(1.0)
        some = (count > 0).to(cosine.dtype)
        return (each * some).sum() / some.sum().clamp_min(1.0)


class PropagationTerm(nn.Module):
    """The consistency of both views with each other, each smoothed once and the other's target once.

    Parameters
    ----------
    targets
        ``teacher``, the tokens of the moving-average network, or ``self``, the network's own.
    """

    transform: nn.Linear

    def __init__(self, *, targets: str) -> None:
        super().__init__()
        self.targets = targets
        self.step: float | None = None

    def prepare(self, sizes: StepSizes) -> None:
        """Make the layer whose outputs are propagated, and remember how far tokens lie apart."""
        self.step = sizes.token_step
        self.transform = nn.Linear(sizes.n_common, sizes.n_common)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.token_views is not None
        assert outputs.token_offsets is not None
        views = upcast(outputs.token_views)  # (2, n, n_tokens, d)
        wanted = views if self.targets == "self" else outputs.teacher_tokens
        assert wanted is not None
        times = torch.arange(views.shape[2], device=views.device) * (self.step or 1.0)
        times = times.expand(views.shape[:3])
        if self.step is not None:
            # A trial that is late shows at each token what was earlier; networks of parcels do not move.
            times = times - upcast(outputs.token_offsets)[..., None]
        near = find_near(times[0], times[1])  # (n, n_tokens, n_tokens)
        smooth = propagate(views, self.transform(views))
        one = compute_propagation_loss(smooth[0], wanted[1], near)
        return (one + compute_propagation_loss(smooth[1], wanted[0], near.mT)) / 2
