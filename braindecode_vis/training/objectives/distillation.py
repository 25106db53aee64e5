"""Contrasts against a moving-average teacher and a queue of its earlier outputs: ALBEF, and TCL's further terms.

The training loop keeps teacher and queue; the queue may be empty.

References
----------
Li et al. (2021), ALBEF, arXiv:2107.07651. Yang et al. (2022), TCL, arXiv:2202.10401.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import (
    LearnedTemperature,
    check_pair,
    compute_soft_cross_entropy,
    find_duplicates,
    find_same,
    multiply,
    normalise,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs

# The teacher's share in the targets, which it reaches over this part of the training: ALBEF's first epoch of thirty.
_ALPHA, _RAMP = 0.4, 0.033


def compute_queue_contrast(
    vectors: Tensor,
    teacher: Tensor,
    queue: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float | Tensor,
    soft_from: Tensor | None = None,
    alpha: float = 0.0,
    duplicates: str = "positive",
) -> Tensor:
    """Return one direction of a contrast against the teacher's outputs for this batch and the queue.

    With candidates k = (`teacher`, `queue`), predictions ``softmax_k(<x_i, k> / t)`` and targets
    ``q = alpha * softmax_k(<s_i, k> / t) + (1 - alpha) * onehot_i`` the loss is the mean of ``-sum_k q log p``. No
    gradient flows through teacher, queue or targets.

    Parameters
    ----------
    vectors : tensor of shape (n, d)
        Outputs of the trained network.
    teacher : tensor of shape (n, d)
        The teacher's outputs on the other side (or on the same side, for TCL's contrast within it).
    queue : tensor of shape (n_queue, d)
        Earlier outputs of that kind; n_queue may be 0. Its entries count as different from the batch.
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; every trial shows another one if None.
    temperature
        The t above.
    soft_from : tensor of shape (n, d), optional
        The teacher's outputs s_i on the side of `vectors`; needed if `alpha` is above 0.
    alpha
        Share of the teacher's opinion in the target.
    duplicates
        What other trials of the same image in the batch are.
    """
    check_pair(vectors, teacher, what="student and teacher")
    if alpha > 0 and soft_from is None:
        raise DataError("soft targets need the teacher's outputs on the side of the student (soft_from).")
    with torch.no_grad():
        candidates = normalise(torch.cat([teacher, queue.to(teacher.dtype)]))  # (n + n_queue, d)
    logits = multiply(normalise(vectors), candidates) / temperature  # (n, n + n_queue)
    with torch.no_grad():
        targets = torch.zeros_like(logits)
        allowed = None
        n = len(vectors)
        # The queue's columns stay zero: whatever they show counts as another image.
        hard = torch.eye(n, dtype=logits.dtype, device=logits.device)
        if stimuli is not None and duplicates == "positive":
            hard = find_same(stimuli).to(logits.dtype)
            hard = hard / hard.sum(-1, keepdim=True)
        elif stimuli is not None and duplicates == "mask":
            allowed = torch.ones_like(logits, dtype=torch.bool)
            # the queue does not say what it shows, so nothing of it is left out
            allowed[:, :n] = ~find_duplicates(stimuli)
        targets[:, :n] = (1.0 - alpha) * hard
        if soft_from is not None and alpha > 0:
            opinion = multiply(normalise(soft_from), candidates) / temperature
            if allowed is not None:
                opinion = opinion.masked_fill(~allowed, -math.inf)
            # ALBEF's q: alpha of the teacher's softmax, the rest one-hot
            targets += alpha * opinion.softmax(-1)
    return compute_soft_cross_entropy(logits, targets, allowed)


def compute_distillation_loss(
    brain: Tensor,
    image: Tensor,
    teacher_brain: Tensor,
    teacher_image: Tensor,
    queue_brain: Tensor,
    queue_image: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float | Tensor,
    alpha: float,
    duplicates: str = "positive",
) -> Tensor:
    """Return ALBEF's image-brain contrast with momentum distillation, the mean of both directions.

    Parameters
    ----------
    brain, image, teacher_brain, teacher_image : tensors of shape (n, d)
    queue_brain, queue_image : tensors of shape (n_queue, d)
    stimuli, temperature, alpha, duplicates
        As in `compute_queue_contrast`.
    """
    to_image = compute_queue_contrast(
        brain, teacher_image, queue_image, stimuli,
        temperature=temperature, soft_from=teacher_brain, alpha=alpha, duplicates=duplicates,
    )  # fmt: skip
    to_brain = compute_queue_contrast(
        image, teacher_brain, queue_brain, stimuli,
        temperature=temperature, soft_from=teacher_image, alpha=alpha, duplicates=duplicates,
    )  # fmt: skip
    return (to_image + to_brain) / 2


def compute_local_loss(
    tokens: Tensor,
    vectors: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float | Tensor,
) -> Tensor:
    """Return TCL's contrast between each trial's global output and its own local ones.

    The mean over trials i and tokens t of ``-log [e(i, it) / (e(i, it) + sum_{j!=i, t'} e(i, jt'))]``.

    Parameters
    ----------
    tokens : tensor of shape (n, n_tokens, d)
        Local outputs, such as time windows.
    vectors : tensor of shape (n, d)
        Global outputs.
    stimuli : integer tensor of shape (n,), optional
        Tokens of other trials of the same image are no negatives; all differ if None.
    temperature
        Temperature of the cosines.
    """
    if tokens.ndim != 3 or (len(tokens), tokens.shape[-1]) != tuple(vectors.shape):
        raise DataError(
            f"local outputs must be of shape (trials, tokens, features) beside global ones of shape "
            f"(trials, features), but are {tuple(tokens.shape)} and {tuple(vectors.shape)}."
        )
    n, n_tokens, _ = tokens.shape
    logits = multiply(normalise(vectors), normalise(tokens).flatten(0, 1)) / temperature
    logits = logits.view(n, n, n_tokens)  # (trial, trial of the token, token)
    labels = torch.arange(n, device=vectors.device) if stimuli is None else stimuli
    # a trial's own tokens
    positive = logits.diagonal(dim1=0, dim2=1).mT  # (n, n_tokens)
    # tokens of other images only, (n,)
    negative = logits.masked_fill(find_same(labels)[:, :, None], -math.inf).flatten(1).logsumexp(-1)
    # -log(e^p / (e^p + e^n)) = softplus(n - p), without overflow
    return functional.softplus(negative[:, None] - positive).mean()


def compute_teacher_share(progress: float) -> float:
    """Return the teacher's share in the targets at this part of the training, 0 to 1."""
    return _ALPHA * min(1.0, progress / _RAMP)


def make_temperature() -> LearnedTemperature:
    """Return ALBEF's learned temperature."""
    return LearnedTemperature(0.07, bounds=(0.001, 0.5))


class DistillationTerm(nn.Module):
    """`compute_distillation_loss` with its learned temperature; alpha grows during the ramp."""

    def __init__(self, duplicates: str) -> None:
        super().__init__()
        self.temperature, self.duplicates = make_temperature(), duplicates

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_distillation_loss(
            *_get_sides(outputs), outputs.stimuli,
            temperature=self.temperature(), alpha=compute_teacher_share(outputs.progress),
            duplicates=self.duplicates,
        )  # fmt: skip


class TclTerm(nn.Module):
    """The mean of TCL's terms that the outputs allow.

    Two soft contrasts across the sides, two hard ones within them against the teacher's other view, and the local one
    of the brain side. TCL has a sixth, local to the image side, for which a frozen image embedding has no tokens.
    """

    def __init__(self, duplicates: str) -> None:
        super().__init__()
        self.temperature, self.duplicates = make_temperature(), duplicates

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        brain, image, teacher_brain, teacher_image, queue_brain, queue_image = _get_sides(outputs)
        duplicates, temperature = self.duplicates, self.temperature()
        across = compute_distillation_loss(
            brain, image, teacher_brain, teacher_image, queue_brain, queue_image, outputs.stimuli,
            temperature=temperature, alpha=compute_teacher_share(outputs.progress), duplicates=duplicates,
        )  # fmt: skip
        sides = ((brain, teacher_brain, queue_brain), (image, teacher_image, queue_image))
        within = [
            compute_queue_contrast(*side, outputs.stimuli, temperature=temperature, duplicates=duplicates)
            for side in sides
        ]
        assert outputs.brain_tokens is not None
        tokens = outputs.brain_tokens.detach()
        labels = None if duplicates == "negative" else outputs.stimuli
        local = compute_local_loss(tokens, brain, labels, temperature=temperature)
        # `across` is the mean of two of the five terms.
        return (2 * across + within[0] + within[1] + local) / 5


def _get_sides(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert outputs.teacher_brain is not None
    assert outputs.teacher_image is not None
    assert outputs.queue_brain is not None
    assert outputs.queue_image is not None
    return (
        outputs.brain, outputs.image, outputs.teacher_brain, outputs.teacher_image,
        outputs.queue_brain, outputs.queue_image,
    )  # fmt: skip
