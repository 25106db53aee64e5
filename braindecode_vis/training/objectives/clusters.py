"""Hard negatives: the contrast within an image's own cluster or concept.

MCL trains in stages: after each, images are clustered, and the next stage takes negatives from an image's own cluster
(the product of all earlier assignments) so that it learns what the earlier ones left out. With concepts in place of
clusters the objective tells images of the same concept apart.

References
----------
Zhang et al. (2024), Learning the unlearned, arXiv:2402.11816.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from braindecode_vis.training.objectives.clip import make_scale
from braindecode_vis.training.objectives.similarity import check_pair, find_same, multiply, normalise, upcast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import Duplicates
    from braindecode_vis.training.objectives.structure_configs import (
        ClusterObjectiveConfig,
        ConceptObjectiveConfig,
    )
    from braindecode_vis.training.outputs import Outputs


def compute_within_group_loss(
    brain: Tensor,
    image: Tensor,
    groups: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    symmetric: bool = True,
    duplicates: Duplicates = "positive",
    normalise_brain: bool = True,
    normalise_image: bool = True,
) -> Tensor:
    """Return the CLIP loss with each trial's negatives drawn from its own group only.

    The mean is over trials that have a negative; a batch without any gives zero, since a softmax over one candidate
    has nothing to learn. A sampler that fills batches group by group makes the objective effective.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    groups : integer tensor of shape (n,)
        Cluster or concept of each trial's image.
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; every trial shows another one if None.
    scale, symmetric, duplicates, normalise_brain, normalise_image
        As in `compute_clip_loss`.
    """
    check_pair(brain, image)
    left = normalise(brain) if normalise_brain else upcast(brain)
    right = normalise(image) if normalise_image else upcast(image)
    logits = scale * multiply(left, right)
    own = logits.new_ones(len(logits)).diag().bool()
    same = own if stimuli is None or duplicates == "negative" else find_same(stimuli)
    negative = find_same(groups) & ~same
    positive = same if duplicates == "positive" else own
    masked = logits.masked_fill(~(negative | positive), -math.inf)
    weights = positive.to(logits.dtype)
    # Everything here is symmetric in rows and columns but the logits.
    counts = negative.any(-1).to(logits.dtype)
    total = counts.sum().clamp_min(1.0)
    losses = []
    for axis in (1, 0) if symmetric else (1,):
        picked = (weights * logits).sum(axis) / weights.sum(axis)
        losses.append((counts * (masked.logsumexp(axis) - picked)).sum() / total)
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


class WithinGroupTerm(nn.Module):
    """`compute_within_group_loss` with its scale, over clusters or over concepts."""

    def __init__(self, config: ClusterObjectiveConfig | ConceptObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = make_scale(config)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        groups = outputs.clusters if self.config.kind == "within_cluster" else outputs.concepts
        assert groups is not None
        return compute_within_group_loss(
            outputs.brain,
            outputs.image,
            groups,
            outputs.stimuli,
            scale=self.scale(),
            **self.config.clip_options(),
        )
