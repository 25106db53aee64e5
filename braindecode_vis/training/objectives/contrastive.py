"""Contrasts of a trial with its own image against the others of the batch.

CLIP's softmax, ATM's mix of an image and a text term, SigLIP's yes-or-no question for every pair, MCL's hard negatives
(from an image's own cluster), and MindEye's soft targets and mixed trials (SoftCLIP, BiMixCo).

References
----------
Radford et al. (2021), CLIP, arXiv:2103.00020. Li et al. (2024), ATM, arXiv:2403.07721. Song et al. (2024), NICE,
arXiv:2308.13234. Benchetrit, Banville, King (2024), arXiv:2310.19812. Zhai et al. (2023), SigLIP, arXiv:2303.15343;
duplicates by cosine as in NeuralBench's image task. Zhang et al. (2024), Learning the unlearned, arXiv:2402.11816.
Scotti et al. (2023), MindEye, arXiv:2305.18274; Scotti et al. (2024), MindEye2, arXiv:2403.11207.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import (
    LogitScale,
    check_batch,
    check_pair,
    compare_pairs,
    compute_clip_loss,
    compute_phase_fraction,
    compute_soft_cross_entropy,
    find_same,
    multiply,
    normalise,
)
from braindecode_vis.training.optimisation import anneal_cosine

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs


class ClipImageTextTerm(nn.Module):
    """ATM's ``share * CLIP(brain, image) + (1 - share) * CLIP(brain, text)`` with one scale for both.

    Trials of the same concept have the same text, so that concepts play the part of stimuli in the text term.
    """

    def __init__(self, scale: LogitScale, *, image_share: float, **options: Any) -> None:
        super().__init__()
        self.scale, self.image_share, self.options = scale, image_share, options

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        # Trials of one concept share their text: a batch of one concept has no negative there.
        check_batch(outputs.concepts, what="concepts")
        # One value for both terms: a learned scale is bounded each time that it is asked.
        scale, options, share = self.scale(), self.options, self.image_share
        assert outputs.text is not None
        image = compute_clip_loss(outputs.brain, outputs.image, outputs.stimuli, scale=scale, **options)
        text = compute_clip_loss(outputs.brain, outputs.text, outputs.concepts, scale=scale, **options)
        return share * image + (1.0 - share) * text


def compute_siglip_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    duplicates: str = "positive",
    duplicate_cosine: float = 0.999,
) -> Tensor:
    """Return ``-(1/n) sum_ij log sigmoid(y_ij (scale * <b_i, v_j> + bias))``, y = 1 for pairs that match, else -1.

    Both sides are brought to unit length.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; every trial shows another one if None.
    scale, bias
        Factor and offset of the inner products.
    duplicates
        What pairs off the diagonal are that match by index, or whose images have a cosine of at least
        `duplicate_cosine`: matches, left out, or like any other pair.
    duplicate_cosine
        Images at least as similar as this are the same.
    """
    logits = scale * compare_pairs(brain, image) + bias
    n = len(logits)
    match = torch.eye(n, dtype=torch.bool, device=logits.device)
    kept = torch.ones_like(match)
    if duplicates != "negative":
        with torch.no_grad():
            # Near copies under other ids (crops, video frames) are no negatives either.
            unit = normalise(image)
            same = multiply(unit, unit) >= duplicate_cosine
            if stimuli is not None:
                same = same | find_same(stimuli)
        match, kept = (match | same, kept) if duplicates == "positive" else (match, match | ~same)
    signed = torch.where(match, logits, -logits)  # log sigmoid(y z) with y = 1 or -1
    # Divided by n and not n^2, as in SigLIP: each trial has one match whatever the batch.
    return -(functional.logsigmoid(signed) * kept).sum() / n


class SiglipTerm(nn.Module):
    """`compute_siglip_loss` with its scale and bias."""

    def __init__(self, duplicates: str) -> None:
        super().__init__()
        self.duplicates = duplicates
        self.scale = LogitScale(1.0 / 10.0, form="exp", learn=True, max_scale=math.inf)
        # -10: nearly all pairs are no matches, which the loss should not have to learn first.
        self.bias = nn.Parameter(torch.tensor(-10.0, dtype=torch.float32))

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_siglip_loss(
            outputs.brain,
            outputs.image,
            outputs.stimuli,
            scale=self.scale(),
            bias=self.bias.float(),
            duplicates=self.duplicates,
        )


def compute_within_group_loss(
    brain: Tensor,
    image: Tensor,
    groups: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    symmetric: bool = True,
    duplicates: str = "positive",
    normalise_brain: bool = True,
) -> Tensor:
    """Return the CLIP loss with each trial's negatives drawn from its own group only.

    The mean is over trials that have a negative; a batch without any gives zero, since a softmax over one candidate
    has nothing to learn. A sampler that fills batches group by group makes the objective effective.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    groups : integer tensor of shape (n,)
        Cluster of each trial's image.
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; every trial shows another one if None.
    scale, symmetric, duplicates, normalise_brain
        As in `compute_clip_loss`.
    """
    logits = scale * compare_pairs(brain, image, normalise_brain=normalise_brain)
    own = logits.new_ones(len(logits)).diag().bool()
    same = own if stimuli is None or duplicates == "negative" else find_same(stimuli)
    negative = find_same(groups) & ~same
    positive = same if duplicates == "positive" else own
    masked = logits.masked_fill(~(negative | positive), -math.inf)  # left out of the softmax altogether
    weights = positive.to(logits.dtype)
    # Everything here is symmetric in rows and columns but the logits.
    counts = negative.any(-1).to(logits.dtype)
    # Trials without a negative in the batch have nothing to learn.
    total = counts.sum().clamp_min(1.0)
    losses = []
    for axis in (1, 0) if symmetric else (1,):
        picked = (weights * logits).sum(axis) / weights.sum(axis)
        losses.append((counts * (masked.logsumexp(axis) - picked)).sum() / total)
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


class WithinGroupTerm(nn.Module):
    """`compute_within_group_loss` with its scale, over clusters."""

    def __init__(self, scale: LogitScale, **options: Any) -> None:
        super().__init__()
        self.scale, self.options = scale, options

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.clusters is not None
        return compute_within_group_loss(
            outputs.brain,
            outputs.image,
            outputs.clusters,
            outputs.stimuli,
            scale=self.scale(),
            **self.options,
        )


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
    # (n, n): how alike the images are among themselves
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
    duplicates: str = "positive",
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
    # (n, n): row i has `share` on its image and the rest on its partner's
    targets = own * share[:, None] + own[partner] * (1.0 - share)[:, None]
    allowed = None
    if stimuli is not None and duplicates == "positive":
        same = find_same(stimuli).to(logits.dtype)
        # each image's weight is spread over all rows that show it
        targets = targets @ (same / same.sum(-1, keepdim=True))
    elif stimuli is not None and duplicates == "mask":
        same = find_same(stimuli)
        mixed = (share < 1)[:, None]  # the partner's image counts only where something was mixed
        allowed = (own > 0) | (targets > 0) | ~(same | (same[partner] & mixed))
    columns = None if allowed is None else allowed.mT
    return (
        compute_soft_cross_entropy(logits, targets, allowed)
        # Columns of the same matrix need not sum to one, as in MindEye's code.
        + compute_soft_cross_entropy(logits.mT, targets.mT, columns)
    ) / 2


class SoftClipTerm(nn.Module):
    """`compute_soft_clip_loss` with MindEye's temperatures, annealed over the phase."""

    def __init__(self, phase: tuple[float, float]) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        fraction = compute_phase_fraction(self.phase, outputs.progress)
        temperature = anneal_cosine(0.004, 0.0075, fraction)
        return compute_soft_clip_loss(outputs.brain, outputs.image, temperature=temperature)


class BimixcoTerm(nn.Module):
    """`compute_bimixco_loss` of the trials that the loop has mixed, at the temperature of MindEye's code."""

    def __init__(self, duplicates: str) -> None:
        super().__init__()
        self.duplicates = duplicates

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.mix_partner is not None
        assert outputs.mix_weight is not None
        return compute_bimixco_loss(
            outputs.brain,
            outputs.image,
            outputs.mix_partner,
            outputs.mix_weight,
            outputs.stimuli,
            temperature=0.006,
            duplicates=self.duplicates,
        )
