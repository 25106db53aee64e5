"""The modules that every objective is made of: the frame around a term, and its learned scale or temperature."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.devices import autocast
from braindecode_vis.training.objectives.base import check_batch, check_needs

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import ObjectiveConfig
    from braindecode_vis.training.outputs import Outputs


class Objective(nn.Module):
    """One term of the training objective: checks the step, leaves autocast, and hands over to `term`.

    Outside its phase it returns a zero that still depends on every parameter, so that distributed training sees
    no unused one.
    """

    def __init__(self, config: ObjectiveConfig, term: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.term = term

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the unweighted scalar for one step."""
        if not self.config.is_active(outputs.progress):
            zero = outputs.brain.float().sum() * 0.0
            return zero + sum(parameter.float().sum() * 0.0 for parameter in self.parameters())
        check_needs(self.config.kind, self.config.needs, outputs)
        if self.config.contrastive:
            check_batch(outputs.stimuli)
        with autocast(outputs.brain.device):
            return self.term(outputs)


class LogitScale(nn.Module):
    """The factor of the similarities, learned or fixed.

    Parameters
    ----------
    temperature
        The parameter starts at ``ln(1 / temperature)``.
    form
        ``exp`` makes the factor ``1 / temperature`` at the start; ``softplus`` applies softplus to the same
        parameter, as UBP and NeuroBridge do, which for 0.07 gives 2.73 and not 14.3.
    learn
        Whether the parameter is trained.
    max_scale
        The parameter of ``exp`` is kept at or below the logarithm of this.
    """

    def __init__(
        self, temperature: float, *, form: Literal["exp", "softplus"], learn: bool, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.form = form
        self.limit = math.log(max_scale)
        start = torch.tensor(math.log(1.0 / temperature), dtype=torch.float32)
        if learn:
            self.raw = nn.Parameter(start)
        else:
            self.register_buffer("raw", start)

    def forward(self) -> Tensor:
        """Return the factor, a scalar tensor."""
        if self.form == "softplus":
            return functional.softplus(self.raw.float())
        return _bound(self.raw, None, self.limit).exp()


class LearnedTemperature(nn.Module):
    """A temperature that is trained itself and kept inside bounds, as in ALBEF."""

    def __init__(self, start: float, *, bounds: tuple[float, float], learn: bool) -> None:
        super().__init__()
        self.bounds = bounds
        if learn:
            self.raw = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        else:
            self.register_buffer("raw", torch.tensor(start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the temperature, a scalar tensor."""
        return _bound(self.raw, *self.bounds)


def _bound(parameter: Tensor, low: float | None, high: float) -> Tensor:
    # The parameter itself is clamped: a clamp inside the graph would have no gradient beyond the bound and
    # leave the parameter stuck there. The copy keeps graphs of earlier micro-batches valid.
    if parameter.requires_grad:
        with torch.no_grad():
            parameter.clamp_(min=low, max=high)
    return parameter.float().clone()
