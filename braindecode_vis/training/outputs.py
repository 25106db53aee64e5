"""What the objectives see of one training step.

The training loop fills one `Outputs` per step; an objective declares the optional parts that it needs in `needs`,
so that the loop computes nothing in vain and refuses a combination that cannot work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Outputs:
    """Tensors of one batch of n trials; d is the size of the space in which brain and image are compared.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
        Output of the brain side and of the image side, neither normalised.
    stimuli, concepts : integer tensors of shape (n,)
        Index of each trial's image and of its concept.
    progress
        Fraction of the training that is done, 0 to 1.
    regression, raw_target : tensors of shape (n, d_raw)
        Output of the regression head and the untouched target embedding (needs ``regression``).
    text : tensor of shape (n, d)
        Text embedding of each trial's concept on the image side (``text``).
    brain_views, image_views : tensors of shape (n_views, n, d)
        Outputs for other views of the same trials, such as repetition halves (``brain_views``), and of the
        same images, such as degraded ones (``image_views``).
    brain_tokens : tensor of shape (n, n_tokens, d)
        Local outputs, such as windows (``brain_tokens``).
    background : tensor of shape (n, d)
        Output of the brain side for the pre-stimulus part of the trials (``background``).
    clusters : integer tensor of shape (n,)
        Cluster of each image, from an earlier stage (``clusters``).
    teacher_brain, teacher_image : tensors of shape (n, d)
        Outputs of the moving-average network (``teacher``).
    queue_brain, queue_image : tensors of shape (n_queue, d)
        Earlier outputs of the teacher (``teacher``); n_queue may be 0 at the start.
    mix_partner : integer tensor of shape (n,)
        Row whose trial was mixed into each trial (``mix``).
    mix_weight : tensor of shape (n,)
        Share of the trial itself in the mixture, 1 where nothing was mixed (``mix``).
    """

    brain: Tensor
    image: Tensor
    stimuli: Tensor
    concepts: Tensor
    progress: float = 0.0
    regression: Tensor | None = None
    raw_target: Tensor | None = None
    text: Tensor | None = None
    brain_views: Tensor | None = None
    image_views: Tensor | None = None
    brain_tokens: Tensor | None = None
    background: Tensor | None = None
    clusters: Tensor | None = None
    teacher_brain: Tensor | None = None
    teacher_image: Tensor | None = None
    queue_brain: Tensor | None = None
    queue_image: Tensor | None = None
    mix_partner: Tensor | None = None
    mix_weight: Tensor | None = None
