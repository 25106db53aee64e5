"""Contrast among more than two views at once: MV-InfoNCE and MV-DHEL.

Views are repetition halves, the image and its degraded forms, or further modalities of the same trial.

References
----------
Koromilas et al. (2025), A principled framework for multi-view contrastive learning; the released code
(github.com/pakoromilas/Multi-View-CL) is followed where it differs from the text beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.training.objectives.similarity import find_same, multiply, normalise

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.structure_configs import MultiviewObjectiveConfig
    from braindecode_vis.training.outputs import Outputs


def compute_mv_infonce(
    views: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float,
    negatives: Literal["all", "other_views"] = "all",
) -> Tensor:
    """Return ``-(1/n) sum_i log [sum_{l!=m} e(il, im) / sum_l sum_{(j, m)} e(il, jm)]``, ``e = exp(cosine / t)``.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
    stimuli : integer tensor of shape (n,), optional
        Other trials of the same image are left out of the denominator; all differ if None.
    temperature
        The t above.
    negatives
        The inner sum of the denominator runs over every (j, m) but (i, l) itself (``all``, the released code), or only
        over views m other than l (``other_views``, its README).
    """
    _check_views(views)
    n_views, n, _ = views.shape
    flat = normalise(views).flatten(0, 1)  # (n_views * n, d)
    same = torch.eye(n, dtype=torch.bool, device=views.device)
    others = torch.zeros_like(same) if stimuli is None else find_same(stimuli) & ~same
    same_view = torch.eye(n_views, dtype=torch.bool, device=views.device)
    # (l, i, m, j): what is left out of the denominator
    dropped = others[None, :, None, :].expand(n_views, n, n_views, n)
    own = same_view[:, None, :, None]
    dropped = dropped | (own if negatives == "other_views" else own & same[None, :, None, :])
    exponents = (multiply(flat, flat) / temperature).view(n_views, n, n_views, n)
    rows = exponents.masked_fill(dropped, -math.inf).flatten(2).logsumexp(-1)  # (n_views, n)
    return (rows.logsumexp(0) - _compute_positive(views, temperature, ordered=True)).mean()


def compute_mv_dhel(views: Tensor, stimuli: Tensor | None = None, *, temperature: float) -> Tensor:
    """Return ``-(1/n) sum_i log [sum_{l<m} e(il, im) / prod_l sum_{j!=i} e(il, jl)]``, ``e = exp(cosine / t)``.

    Negatives come from the same view only, which parts alignment from uniformity. The product is a sum of logarithms.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
    stimuli : integer tensor of shape (n,), optional
        Other trials of the same image are no negatives; all differ if None.
    temperature
        The t above.
    """
    _check_views(views)
    labels = torch.arange(views.shape[1], device=views.device) if stimuli is None else stimuli
    same = find_same(labels)
    unit = normalise(views)
    exponents = multiply(unit, unit) / temperature  # (n_views, n, n)
    spread = exponents.masked_fill(same, -math.inf).logsumexp(-1).sum(0)
    return (spread - _compute_positive(views, temperature, ordered=False)).mean()


def _compute_positive(views: Tensor, temperature: float, *, ordered: bool) -> Tensor:
    """Return the logarithm of the sum over pairs of views, shape (n,); ordered pairs count each twice."""
    unit = normalise(views).transpose(0, 1)  # (n, n_views, d)
    exponents = multiply(unit, unit) / temperature  # (n, n_views, n_views)
    first, second = torch.triu_indices(len(views), len(views), offset=1, device=views.device)
    total = exponents[:, first, second].logsumexp(-1)
    return total + math.log(2.0) if ordered else total


def _check_views(views: Tensor) -> None:
    if views.ndim != 3 or len(views) < 2:
        raise DataError(
            "a multi-view objective needs at least two views of shape (trials, features), but got "
            f"{tuple(views.shape)}: name more of brain, image, brain_views, image_views in its option 'views'."
        )


class MultiviewTerm(nn.Module):
    """`compute_mv_infonce` or `compute_mv_dhel` of the views that the settings name."""

    def __init__(self, config: MultiviewObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        config = self.config
        chosen = [getattr(outputs, name) for name in config.views]
        parts = [part if part.ndim == 3 else part[None] for part in chosen]
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"views must all be of the same trials and features, but are of shapes {sorted(shapes)}."
            )
        views = torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])
        stimuli = outputs.stimuli if config.duplicates == "mask" else None
        if config.form == "dhel":
            return compute_mv_dhel(views, stimuli, temperature=config.temperature)
        return compute_mv_infonce(views, stimuli, temperature=config.temperature, negatives=config.negatives)
