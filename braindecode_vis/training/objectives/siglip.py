"""SigLIP: every pair of the batch is a yes-or-no question.

References
----------
Zhai et al. (2023), arXiv:2303.15343; duplicates by cosine as in NeuralBench's image task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.training.objectives.modules import LogitScale
from braindecode_vis.training.objectives.similarity import (
    check_pair,
    find_same,
    multiply,
    normalise,
    upcast,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.base import Duplicates
    from braindecode_vis.training.objectives.pair_configs import SiglipObjectiveConfig
    from braindecode_vis.training.outputs import Outputs


def compute_siglip_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    duplicates: Duplicates = "positive",
    duplicate_cosine: float = 0.999,
    normalise_brain: bool = True,
    normalise_image: bool = True,
) -> Tensor:
    """Return ``-(1/n) sum_ij log sigmoid(y_ij (scale * <b_i, v_j> + bias))``, y = 1 for pairs that match, else -1.

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
    normalise_brain, normalise_image
        Whether that side is brought to unit length.
    """
    check_pair(brain, image)
    left = normalise(brain) if normalise_brain else upcast(brain)
    right = normalise(image) if normalise_image else upcast(image)
    logits = scale * multiply(left, right) + bias
    n = len(logits)
    match = torch.eye(n, dtype=torch.bool, device=logits.device)
    kept = torch.ones_like(match)
    if duplicates != "negative":
        with torch.no_grad():
            unit = normalise(image)
            same = multiply(unit, unit) >= duplicate_cosine
            if stimuli is not None:
                same = same | find_same(stimuli)
        match, kept = (match | same, kept) if duplicates == "positive" else (match, match | ~same)
    signed = torch.where(match, logits, -logits)
    return -(functional.logsigmoid(signed) * kept).sum() / n


class SiglipTerm(nn.Module):
    """`compute_siglip_loss` with its scale and bias."""

    def __init__(self, config: SiglipObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = LogitScale(1.0 / config.scale, form="exp", learn=config.learn, max_scale=math.inf)
        start = torch.tensor(config.bias, dtype=torch.float32)
        if config.learn:
            self.bias = nn.Parameter(start)
        else:
            self.register_buffer("bias", start)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        config = self.config
        return compute_siglip_loss(
            outputs.brain, outputs.image, outputs.stimuli, scale=self.scale(), bias=self.bias.float(),
            duplicates=config.duplicates, duplicate_cosine=config.duplicate_cosine,
            normalise_brain=config.normalise_brain, normalise_image=config.normalise_image,
        )  # fmt: skip
