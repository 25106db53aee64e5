"""Similarities and cross-entropies that the contrastive objectives are made of.

Whatever precision the network runs in, similarities and log-sum-exps are computed in single precision at least
(double stays double), outside of autocast: at a temperature of 0.004 the rounding of a bfloat16 cosine would be a
logit of one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from braindecode_vis.checks import DataError
from braindecode_vis.devices import autocast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import Duplicates


def upcast(tensor: Tensor) -> Tensor:
    """Return half precision as single precision and leave the rest as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def normalise(tensor: Tensor) -> Tensor:
    """Return vectors of unit length along the last axis, in single precision at least."""
    return functional.normalize(upcast(tensor), dim=-1)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return all inner products, shape (n_left, n_right), in single precision at least, even under autocast.

    Parameters
    ----------
    left, right : tensors of shape (n_left, d) and (n_right, d)
    """
    with autocast(left.device):
        return upcast(left) @ upcast(right).mT


def check_pair(left: Tensor, right: Tensor, *, what: str = "brain and image") -> None:
    """Raise `DataError` unless both are of the same shape (n, d)."""
    if left.shape != right.shape or left.ndim != 2:
        raise DataError(
            f"{what} outputs must both be of shape (trials, features), but are {tuple(left.shape)} and "
            f"{tuple(right.shape)}: project both sides to the same space."
        )


def find_same(labels: Tensor) -> Tensor:
    """Return the boolean matrix of shape (n, n) that says which rows carry the same label."""
    return labels[:, None] == labels[None, :]


def find_duplicates(labels: Tensor) -> Tensor:
    """Return like `find_same`, but False on the diagonal: other rows that show the same."""
    return find_same(labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def compute_soft_cross_entropy(logits: Tensor, targets: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the mean over rows of ``-sum_j targets_ij log softmax_j(logits_ij)``.

    Parameters
    ----------
    logits, targets : tensors of shape (n, n_candidates)
        Rows of `targets` need not sum to one; zero where not allowed.
    allowed : boolean tensor of shape (n, n_candidates), optional
        Candidates that take part in the softmax of each row; all if None.
    """
    normaliser = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    return (targets.sum(-1) * normaliser.logsumexp(-1) - (targets * logits).sum(-1)).mean()


def compute_paired_cross_entropy(
    logits: Tensor, labels: Tensor | None, *, duplicates: Duplicates, symmetric: bool
) -> Tensor:
    """Return the cross-entropy of a square matrix of logits whose diagonal is right.

    Parameters
    ----------
    logits : tensor of shape (n, n)
    labels : integer tensor of shape (n,), optional
        Rows of the same label show the same; all differ if None.
    duplicates
        Off the diagonal, what shows the same is ``positive`` (the target is uniform over all that are right), ``mask``
        (left out of the softmax) or ``negative`` (treated like any other).
    symmetric
        Average both directions; otherwise rows alone.
    """
    allowed = None
    picked = logits.diagonal()
    picked_columns = picked
    if labels is not None and duplicates == "mask":
        allowed = ~find_duplicates(labels)
    elif labels is not None and duplicates == "positive":
        same = find_same(labels).to(logits.dtype)
        count = same.sum(-1)
        picked = (same * logits).sum(-1) / count
        picked_columns = (same * logits).sum(0) / count
    normaliser = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    rows = (normaliser.logsumexp(1) - picked).mean()
    if not symmetric:
        return rows
    return (rows + (normaliser.logsumexp(0) - picked_columns).mean()) / 2
