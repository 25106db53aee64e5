"""Regression of the untouched target embedding by a head of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import normalise, upcast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs


def compute_mse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over trials and features.

    Parameters
    ----------
    predicted, target : tensors of shape (n, ...)

    Examples
    --------
    >>> import torch
    >>> float(compute_mse(torch.zeros(2, 3), torch.full((2, 3), 2.0)))
    4.0
    """
    _check_same(predicted, target)
    return functional.mse_loss(upcast(predicted), upcast(target))


def compute_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error over trials and features.

    Parameters
    ----------
    predicted, target : tensors of shape (n, ...)

    Examples
    --------
    >>> import torch
    >>> float(compute_l1(torch.zeros(2, 3), torch.full((2, 3), -2.0)))
    2.0
    """
    _check_same(predicted, target)
    return functional.l1_loss(upcast(predicted), upcast(target))


def compute_cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Return one minus the mean cosine between each trial's prediction and its target, flattened.

    Parameters
    ----------
    predicted, target : tensors of shape (n, ...)
    """
    _check_same(predicted, target)
    return 1.0 - (normalise(predicted.flatten(1)) * normalise(target.flatten(1))).sum(-1).mean()


def _check_same(predicted: Tensor, target: Tensor) -> None:
    # Broadcasting would silently score the wrong thing.
    if predicted.shape != target.shape:
        raise DataError(
            f"the regression head gives {tuple(predicted.shape)}, but the target embedding is {tuple(target.shape)}: "
            "give the head as many outputs as the target has features."
        )


class RegressionTerm(nn.Module):
    """`compute_mse`, `compute_l1` or `compute_cosine_distance` of the regression head."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.regression is not None
        assert outputs.raw_target is not None
        return self.compute(outputs.regression, outputs.raw_target)
