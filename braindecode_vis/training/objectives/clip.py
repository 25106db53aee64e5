"""CLIP's contrast between brain and image, and ATM's mix of an image and a text term.

References
----------
Radford et al. (2021), CLIP, arXiv:2103.00020. Li et al. (2024), ATM, arXiv:2403.07721. Song et al. (2024), NICE,
arXiv:2308.13234. Benchetrit, Banville, King (2024), arXiv:2310.19812.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from braindecode_vis.training.objectives.base import check_batch
from braindecode_vis.training.objectives.modules import LogitScale
from braindecode_vis.training.objectives.similarity import (
    check_pair,
    compute_paired_cross_entropy,
    multiply,
    normalise,
    upcast,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import Duplicates
    from braindecode_vis.training.objectives.pair_configs import (
        ClipImageTextObjectiveConfig,
        ClipObjectiveConfig,
        ScaleSettings,
    )
    from braindecode_vis.training.outputs import Outputs


def compute_clip_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    symmetric: bool = True,
    duplicates: Duplicates = "positive",
    normalise_brain: bool = True,
    normalise_image: bool = True,
) -> Tensor:
    """Return the cross-entropy of finding each trial's image among those of the batch.

    With logits ``s_ij = scale * <b_i, v_j>`` the loss is the mean over i of ``-log softmax_j(s_ij)[i]``, averaged
    with the same over columns if `symmetric`.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; every trial shows another one if None.
    scale
        Factor of the inner products, the inverse of the temperature.
    symmetric
        Both directions; otherwise brain to image alone.
    duplicates
        What other trials of the same image are: ``positive`` (they share the target evenly), ``mask`` (left out of
        the softmax) or ``negative`` (false negatives, as in the published implementations).
    normalise_brain, normalise_image
        Whether that side is brought to unit length.

    Examples
    --------
    >>> import torch
    >>> round(float(compute_clip_loss(torch.eye(2), torch.eye(2), scale=1.0)), 4)
    0.3133
    """
    check_pair(brain, image)
    left = normalise(brain) if normalise_brain else upcast(brain)
    right = normalise(image) if normalise_image else upcast(image)
    logits = scale * multiply(left, right)
    return compute_paired_cross_entropy(logits, stimuli, duplicates=duplicates, symmetric=symmetric)


def make_scale(config: ScaleSettings) -> LogitScale:
    """Return the scale that the settings describe."""
    return LogitScale(
        config.temperature, form=config.scale, learn=config.learn_temperature, max_scale=config.max_scale
    )


class ClipTerm(nn.Module):
    """`compute_clip_loss` with its scale."""

    def __init__(self, config: ClipObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = make_scale(config)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_clip_loss(
            outputs.brain, outputs.image, outputs.stimuli, scale=self.scale(), **self.config.clip_options()
        )


class ClipImageTextTerm(nn.Module):
    """ATM's ``share * CLIP(brain, image) + (1 - share) * CLIP(brain, text)`` with one scale for both.

    Trials of the same concept have the same text, so that concepts play the part of stimuli in the text term.
    """

    def __init__(self, config: ClipImageTextObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = make_scale(config)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        check_batch(outputs.concepts, what="concepts")
        scale, options, share = self.scale(), self.config.clip_options(), self.config.image_share
        assert outputs.text is not None
        image = compute_clip_loss(outputs.brain, outputs.image, outputs.stimuli, scale=scale, **options)
        text = compute_clip_loss(outputs.brain, outputs.text, outputs.concepts, scale=scale, **options)
        return share * image + (1.0 - share) * text
