"""Contrasts with soft targets: SoftCLIP, and BiMixCo over mixed trials.

References
----------
Scotti et al. (2023), MindEye, arXiv:2305.18274; Scotti et al. (2024), MindEye2, arXiv:2403.11207.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.optimisation import anneal_cosine
from braindecode_vis.training.objectives.base import compute_phase_fraction
from braindecode_vis.training.objectives.similarity import (
    check_pair,
    compute_soft_cross_entropy,
    find_same,
    multiply,
    normalise,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import Duplicates
    from braindecode_vis.training.objectives.pair_configs import (
        BimixcoObjectiveConfig,
        SoftClipObjectiveConfig,
    )
    from braindecode_vis.training.outputs import Outputs


def compute_soft_clip_loss(brain: Tensor, image: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy with the similarities of the images among themselves as targets.

    Targets ``softmax_j(<v_i, v_j> / t)``, predictions ``softmax_j(<b_i, v_j> / t)`` and, for the other direction,
    ``softmax_j(<v_i, b_j> / t)`` with the same targets; the mean of both. All vectors have unit length. Repeated images
    share the target by themselves. No gradient flows through the targets (a choice of ours that matters only if
    the image side is trained).

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    temperature
        Temperature of targets and predictions.
    """
    check_pair(brain, image)
    left, right = normalise(brain), normalise(image)
    targets = (multiply(right, right).detach() / temperature).softmax(-1)
    logits = multiply(left, right) / temperature
    return (compute_soft_cross_entropy(logits, targets) + compute_soft_cross_entropy(logits.mT, targets)) / 2


def compute_bimixco_loss(
    brain: Tensor,
    image: Tensor,
    partner: Tensor,
    share: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float,
    duplicates: Duplicates = "positive",
) -> Tensor:
    """Return the contrast of mixed trials with the images of both parts, in both directions.

    The target of trial i is `share` on its own image and the rest on its partner's; the target of image j is column j
    of the same matrix, which need not sum to one. A trial that is its own partner has all weight on its image.

    Parameters
    ----------
    brain : tensor of shape (n, d)
        Outputs for the mixed trials.
    image : tensor of shape (n, d)
        Outputs for the images, not mixed.
    partner : integer tensor of shape (n,)
        Row that was mixed into each trial.
    share : tensor of shape (n,)
        Share of the trial itself, 0 to 1.
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image before mixing.
    temperature
        Temperature of the softmax.
    duplicates
        What repeated images of either part are: they share its target evenly, are left out, or are negatives.
    """
    check_pair(brain, image)
    if partner.shape != share.shape or partner.shape != brain.shape[:1]:
        raise DataError(
            f"mixed trials need one partner and one share each, but {len(brain)} trials came with "
            f"{tuple(partner.shape)} partners and {tuple(share.shape)} shares."
        )
    logits = multiply(normalise(brain), normalise(image)) / temperature
    own = torch.eye(len(brain), dtype=logits.dtype, device=logits.device)
    share = share.to(logits.dtype)
    targets = own * share[:, None] + own[partner] * (1.0 - share)[:, None]
    allowed = None
    if stimuli is not None and duplicates == "positive":
        same = find_same(stimuli).to(logits.dtype)
        targets = targets @ (same / same.sum(-1, keepdim=True))
    elif stimuli is not None and duplicates == "mask":
        same = find_same(stimuli)
        mixed = (share < 1)[:, None]
        allowed = (own > 0) | (targets > 0) | ~(same | (same[partner] & mixed))
    columns = None if allowed is None else allowed.mT
    return (
        compute_soft_cross_entropy(logits, targets, allowed)
        + compute_soft_cross_entropy(logits.mT, targets.mT, columns)
    ) / 2


class SoftClipTerm(nn.Module):
    """`compute_soft_clip_loss` with its temperature annealed over the phase."""

    def __init__(self, config: SoftClipObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        config = self.config
        fraction = compute_phase_fraction(config.phase, outputs.progress)
        temperature = anneal_cosine(config.temperature_start, config.temperature_end, fraction)
        return compute_soft_clip_loss(outputs.brain, outputs.image, temperature=temperature)


class BimixcoTerm(nn.Module):
    """`compute_bimixco_loss` of the trials that the loop has mixed."""

    def __init__(self, config: BimixcoObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.mix_partner is not None
        assert outputs.mix_weight is not None
        return compute_bimixco_loss(
            outputs.brain, outputs.image, outputs.mix_partner, outputs.mix_weight, outputs.stimuli,
            temperature=self.config.temperature, duplicates=self.config.duplicates,
        )  # fmt: skip
