"""What every objective shares: the outputs that it sees of a step, and the checks of that step.

The training loop fills one `Outputs` per step; an objective declares the optional parts that it needs in `needs`, so
that nothing is computed in vain and a combination that cannot work is refused. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from braindecode_vis.checks import DataError

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Duplicates = Literal["positive", "mask", "negative"]

#: Fields of `Outputs` that each need stands for; the training loop fills them if any objective names the need.
NEED_FIELDS: dict[str, tuple[str, ...]] = {
    "regression": ("regression", "raw_target"),
    "text": ("text",),
    "brain_views": ("brain_views",),
    "image_views": ("image_views",),
    "brain_tokens": ("brain_tokens",),
    "background": ("background",),
    "clusters": ("clusters",),
    "teacher": ("teacher_brain", "teacher_image", "queue_brain", "queue_image"),
    "mix": ("mix_partner", "mix_weight"),
}


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


def compute_phase_fraction(phase: tuple[float, float], progress: float) -> float:
    """Return how much of the phase is over, 0 to 1.

    Examples
    --------
    >>> compute_phase_fraction((0.5, 1.0), 0.75)
    0.5
    """
    start, end = phase
    # clipped: progress may lie outside of the phase
    return min(max((progress - start) / (end - start), 0.0), 1.0)


def check_needs(kind: str, needs: frozenset[str], outputs: Outputs) -> None:
    """Raise `DataError` naming the first output that the objective needs and the step lacks."""
    for need in sorted(needs):
        for field in NEED_FIELDS[need]:
            if getattr(outputs, field) is None:
                raise DataError(
                    f"the objective {kind!r} needs the output {field!r} (need {need!r}), which this training step does "
                    "not provide: give the network or the data that part, or remove the objective from the list."
                )


def check_batch(stimuli: Tensor, *, what: str = "images") -> None:
    """Raise `DataError` unless a batch holds at least two different images.

    The values are compared only where that costs no wait for an accelerator: a training loop that keeps the indices
    on the CPU checks them there, before the step.

    Parameters
    ----------
    stimuli : integer tensor of shape (n,)
        Index of each trial's image (or concept, see `what`).
    what
        What the indices stand for, in the message.

    Raises
    ------
    DataError
        If there is a single trial, or all trials show the same.
    """
    n_trials = len(stimuli)
    if n_trials >= 2 and (stimuli.device.type != "cpu" or bool((stimuli != stimuli[0]).any())):
        return
    raise DataError(
        f"contrastive objectives need at least two different {what} in a batch, but this one has {n_trials} trial(s) "
        f"of one and the same: raise the batch size, drop a last batch of one, or mix {what} in the sampler."
    )
