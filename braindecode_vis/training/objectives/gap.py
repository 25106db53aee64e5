"""Alignment and uniformity on the sphere, against the gap that the contrast leaves between brain and image.

References
----------
Wang and Isola (2020), arXiv:2005.10242. Fahim, Murphy, Fyshe (2024), arXiv:2405.18570: ``L_CUA`` and ``L_CUAXU``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braindecode_vis.training.objectives.clip import compute_clip_loss, make_scale
from braindecode_vis.training.objectives.similarity import check_pair, find_same, multiply, normalise

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.structure_configs import (
        AlignmentObjectiveConfig,
        CuaObjectiveConfig,
        UniformityObjectiveConfig,
    )
    from braindecode_vis.training.outputs import Outputs


def compute_alignment(brain: Tensor, image: Tensor) -> Tensor:
    """Return the mean squared distance between the unit vectors of each pair.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)

    Examples
    --------
    >>> import torch
    >>> float(compute_alignment(torch.eye(2), torch.eye(2).flip(0)))
    2.0
    """
    check_pair(brain, image)
    return (normalise(brain) - normalise(image)).square().sum(-1).mean()


def compute_uniformity(vectors: Tensor, stimuli: Tensor | None = None, *, sharpness: float = 2.0) -> Tensor:
    """Return ``log mean_{i<j} exp(-sharpness * |x_i - x_j|^2)`` over unit vectors.

    Parameters
    ----------
    vectors : tensor of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Pairs of trials of the same image are left out; all differ if None.
    sharpness
        The paper's t.
    """
    return _compute_log_mean_kernel(vectors, vectors, stimuli, sharpness)


def compute_cross_uniformity(
    brain: Tensor, image: Tensor, stimuli: Tensor | None = None, *, sharpness: float = 2.0
) -> Tensor:
    """Return ``log mean_{i!=j} exp(-sharpness * |b_i - v_j|^2)`` over unit vectors.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Pairs that show the same image are left out; all differ if None.
    sharpness
        The paper's t.
    """
    check_pair(brain, image)
    return _compute_log_mean_kernel(brain, image, stimuli, sharpness)


def _compute_log_mean_kernel(left: Tensor, right: Tensor, stimuli: Tensor | None, sharpness: float) -> Tensor:
    # Ordered pairs: for one set of vectors every unordered pair counts twice, which the mean does not notice.
    exponents = sharpness * (2.0 * multiply(normalise(left), normalise(right)) - 2.0)
    labels = torch.arange(len(left), device=left.device) if stimuli is None else stimuli
    different = ~find_same(labels)
    total = exponents.masked_fill(~different, -math.inf).flatten().logsumexp(0)
    return total - different.sum().to(total.dtype).log()


def compute_cua_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    cross: bool = False,
    sharpness: float = 2.0,
    **clip_options: bool | str,
) -> Tensor:
    """Return ``L_CLIP + L_align + (L_unif(brain) + L_unif(image)) / 2``, plus ``L_xunif`` if `cross`.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image. With ``duplicates="negative"`` among `clip_options` repeated images count
        like any other in every term, otherwise their pairs are left out of the uniformity.
    scale
        Factor of the similarities in the contrast.
    cross
        ``L_CUAXU`` instead of ``L_CUA``.
    sharpness
        The t of the uniformity terms.
    **clip_options
        Further options of `compute_clip_loss`.
    """
    total = compute_clip_loss(brain, image, stimuli, scale=scale, **clip_options)  # type: ignore[arg-type]
    labels = None if clip_options.get("duplicates") == "negative" else stimuli
    total = total + compute_alignment(brain, image)
    total = total + compute_uniformity(brain, labels, sharpness=sharpness) / 2
    total = total + compute_uniformity(image, labels, sharpness=sharpness) / 2
    return total + compute_cross_uniformity(brain, image, labels, sharpness=sharpness) if cross else total


class AlignmentTerm(nn.Module):
    """`compute_alignment` of brain and image."""

    def __init__(self, config: AlignmentObjectiveConfig) -> None:
        super().__init__()

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_alignment(outputs.brain, outputs.image)


class UniformityTerm(nn.Module):
    """Uniformity of the chosen side or sides, or between them."""

    def __init__(self, config: UniformityObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        config = self.config
        labels = outputs.stimuli if config.duplicates == "mask" else None
        if config.between == "cross":
            return compute_cross_uniformity(outputs.brain, outputs.image, labels, sharpness=config.sharpness)
        sides = {"brain": [outputs.brain], "image": [outputs.image], "both": [outputs.brain, outputs.image]}
        terms = [
            compute_uniformity(side, labels, sharpness=config.sharpness) for side in sides[config.between]
        ]
        return torch.stack(terms).mean()


class CuaTerm(nn.Module):
    """`compute_cua_loss` with its scale."""

    def __init__(self, config: CuaObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = make_scale(config)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_cua_loss(
            outputs.brain, outputs.image, outputs.stimuli, scale=self.scale(), cross=self.config.cross,
            sharpness=self.config.sharpness, **self.config.clip_options(),
        )  # fmt: skip
