"""Rows of all processes in every process, with gradients.

A contrast over a batch that is spread over processes needs the negatives of all of them. Each process computes the
loss of the whole batch; the gradient of a gathered row is the sum of what every process derives for it, so that the
average that `DistributedDataParallel` takes over processes is the gradient of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def count_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """Return the number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(count_processes())]
        dist.all_gather(parts, rows.contiguous())
        ctx.n_rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        start = get_rank() * ctx.n_rows
        return gradient[start : start + ctx.n_rows]


def gather_rows(tensor: Tensor, *, dim: int = 0) -> Tensor:
    """Return the rows of all processes in the order of their ranks; the tensor itself in a single process.

    Parameters
    ----------
    tensor
        Same shape in every process.
    dim
        Axis of the rows.
    """
    if count_processes() == 1:
        return tensor
    moved = tensor.movedim(dim, 0)
    return _GatherRows.apply(moved).movedim(0, dim)
