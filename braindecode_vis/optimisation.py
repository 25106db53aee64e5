"""The loop of steps that every training shares, the course of its learning rate, and averaged weights.

Encoder, pretraining, prior, generator and refiner all call `optimise`; each brings the function that computes the loss
of a step and what happens after one. Whatever is random in a step must be drawn from the number of the step, so that a
training that was killed goes on from a checkpoint (`braindecode_vis.checkpoints`) to the same bits as one that was not.
Knows no data, no models and no files. Imports torch inside functions only.

References
----------
Polyak, Juditsky (1992), doi:10.1137/0330046, averaging of weights. Loshchilov, Hutter (2017), arXiv:1608.03983, the
cosine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from braindecode_vis.checks import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

Model = TypeVar("Model", bound="nn.Module")


def optimise(
    optimiser: Any,
    parameters: Iterable[nn.Parameter],
    steps: Iterable[int],
    compute_losses: Callable[[int], Iterable[Tensor]],
    *,
    after: Callable[[int, list[Tensor]], None],
    rate: Callable[[int], float] | None = None,
    clip_norm: float | None = None,
    describe_failure: Callable[[int, float], str] | None = None,
    accelerator: Any = None,
) -> None:
    """Take steps down the gradient of a loss.

    Parameters
    ----------
    optimiser
        A torch optimiser; the learning rates that its groups start with are their peaks.
    parameters
        Those whose common gradient norm is clipped.
    steps
        Numbers of the steps to take, ascending.
    compute_losses
        Gives the losses of a step one by one, each of a part of its batch; their gradients add up. A loss is dropped,
        with its graph, before the next one is asked for.
    after
        Called with the number of the step and its detached losses once the weights have moved: averages, logs,
        checkpoints.
    rate
        Learning rate of a step as a share of the peak; None leaves the rates to a scheduler of the caller's.
    clip_norm
        Largest norm of the gradient.
    describe_failure
        Words for a loss that is not finite, from the number of the step and the loss; None leaves the check, which
        waits for a GPU at every step, to `after`.
    accelerator
        An `accelerate.Accelerator`; its scaler, if it has one, keeps gradients of float16 from vanishing.

    Raises
    ------
    DataError
        If a loss is not finite; no weight has moved in that step.
    """
    import torch

    parameters = list(parameters)
    for group in optimiser.param_groups:
        # Once: later calls, one per epoch, find rates that have moved.
        group.setdefault("peak_lr", group["lr"])
    # Without a scaler accelerate adds nothing to a backward pass but a search for packages each time.
    scaled = accelerator is not None and accelerator.scaler is not None
    for step in steps:
        if rate is not None:
            set_learning_rate(optimiser, rate(step))
        losses = []
        for loss in compute_losses(step):
            if describe_failure is not None and not math.isfinite(value := float(loss.detach())):
                raise DataError(describe_failure(step, value))
            if scaled:
                accelerator.backward(loss)
            else:
                loss.backward()
            losses.append(loss.detach())
        if clip_norm is not None and scaled:
            accelerator.clip_grad_norm_(parameters, clip_norm)
        elif clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()
        # None: a parameter that the next loss leaves out must not move by moments alone.
        optimiser.zero_grad(set_to_none=True)
        after(step, losses)


def set_learning_rate(optimiser: Any, share: float) -> None:
    """Set every group to a share of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * share


def anneal_cosine(start: float, end: float, fraction: float) -> float:
    """Return the value on half a cosine from `start` (fraction 0) to `end` (fraction 1).

    Examples
    --------
    >>> anneal_cosine(1.0, 3.0, 0.5)
    2.0
    """
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def compute_warm_cosine(step: int, n_steps: int, n_warm: int) -> float:
    """Return the learning rate of a step as a share of the peak: a linear rise, then half a cosine down to zero.

    Parameters
    ----------
    step
        Number of the step, from 0.
    n_steps
        Steps of the whole training.
    n_warm
        Steps of the rise; the last of them has the full rate.

    Examples
    --------
    >>> [compute_warm_cosine(step, 6, 2) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < n_warm:
        return (step + 1) / n_warm
    # over all that is left, so that zero lies one step past the end
    return anneal_cosine(1.0, 0.0, (step - n_warm) / max(1, n_steps - n_warm))


def split_decayed(
    parameters: Iterable[nn.Parameter], weight_decay: float, *, spared: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """Return two groups of an optimiser: matrices and kernels, which decay, and biases and scales, which do not.

    Parameters
    ----------
    parameters
        Those of a network.
    weight_decay
        Of the first group.
    spared
        Those that do not decay whatever their shape, such as tables of positions.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    kept = {id(parameter) for parameter in spared}
    for parameter in parameters:
        (decayed if parameter.dim() > 1 and id(parameter) not in kept else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class MovingAverage(Generic[Model]):
    """A copy of a model whose weights follow the original slowly; its buffers are those of the original.

    Parts may be taken out of the copy; the rest goes on following.

    Parameters
    ----------
    model
        The model to follow, on its device.
    decay
        Share of the average that stays at each step.
    warm_up
        Start with a smaller decay ``(1 + step) / (10 + step)``, so that the first weights are soon forgotten (the rule
        of TensorFlow's `ExponentialMovingAverage`).
    """

    def __init__(self, model: Model, decay: float, *, warm_up: bool = True) -> None:
        self.decay, self.warm_up = decay, warm_up
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    def follow(self, model: nn.Module, step: int) -> None:
        """Move toward `model` after the given number of steps."""
        import torch

        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            # In one call for all weights; a loop over tensors costs as much as the step of a small network.
            torch._foreach_lerp_(list(own.values()), [weights[name] for name in own], 1 - decay)
            for name, buffer in self.model.named_buffers():
                # Running statistics are averages already.
                buffer.copy_(buffers[name])
