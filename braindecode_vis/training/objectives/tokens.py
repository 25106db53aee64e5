"""Consistency of local outputs between two augmentations of one trial: PixPro's propagation, for tokens in time.

A token is smoothed by those of its own view that resemble it, and shall then point where the tokens of the other view
point that lie near it in time. Nothing here compares trials, so that no batch is too small; a contrast beside it keeps
the outputs apart.

References
----------
Xie et al. (2021), Propagate yourself, arXiv:2011.10043; zdaxie/PixPro@e390d6b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braindecode_vis.checks import DataError
from braindecode_vis.devices import autocast
from braindecode_vis.training.objectives.objective import normalise

#: Share of the step from one token to the next within which two tokens show the same, as in PixPro.
NEAR = 0.7


def propagate(tokens: Tensor, values: Tensor, *, sharpness: float = 2.0) -> Tensor:
    """Return ``y_p = sum_q max(cos(x_p, x_q), 0)^sharpness * v_q / |v_q|``, the propagation of PixPro.

    Parameters
    ----------
    tokens, values : tensors of shape (..., n_tokens, d)
        The x that are compared and the v that are summed.
    sharpness
        Exponent of the similarities, at least 1; 2 in PixPro.

    Examples
    --------
    >>> import torch
    >>> propagate(torch.eye(2), 3 * torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    with autocast(tokens.device):
        unit = normalise(tokens)
        similarity = (unit @ unit.mT).clamp_min(0.0)  # (..., n_tokens, n_tokens)
        return similarity.pow(sharpness) @ normalise(values)


def find_near(times: Tensor, other_times: Tensor, reach: float | None = None) -> Tensor:
    """Return which tokens of two views lie near each other, boolean of shape (..., n_tokens, n_tokens).

    Parameters
    ----------
    times, other_times : tensors of shape (..., n_tokens)
        Time of each token in the trial that both views were made of, in ms, equally spaced.
    reach
        Pairs nearer than this many ms are near. None takes 0.7 of the step from one token to the next.

    Examples
    --------
    >>> import torch
    >>> find_near(torch.tensor([0.0, 10.0]), torch.tensor([4.0, 14.0])).tolist()
    [[True, False], [True, True]]
    """
    distance = (times[..., :, None] - other_times[..., None, :]).abs()
    if reach is not None:
        return distance < reach
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
