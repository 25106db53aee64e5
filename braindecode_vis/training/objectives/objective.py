"""What every objective shares: the outputs of a step, checks and weights around a loss, similarities, CLIP's contrast.

The training loop fills one `Outputs` per step; an objective declares the optional parts that it needs in `needs`, so
that nothing is computed in vain and a combination that cannot work is refused.

Whatever precision the network runs in, similarities and log-sum-exps are computed in single precision at least
(double stays double), outside of autocast: at a temperature of 0.004 the rounding of a bfloat16 cosine would be a
logit of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import autocast

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
    "words": ("words",),
    "attributes": ("attributes",),
    "sentences": ("sentences",),
    "swapped": ("swapped", "swapped_known"),
    "token_views": ("token_views", "token_offsets"),
    # Of a network without local outputs, its whole output as the only one.
    "local_outputs": ("brain_tokens",),
    "patches": ("raw_target",),
    "teacher_tokens": ("teacher_tokens",),
    # Concepts are always there; who names them has weights of each, whose number is in `StepSizes`.
    "concepts": (),
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
        Output of the regression head and the untouched target embedding (needs ``regression``; the latter alone
        ``patches``).
    text : tensor of shape (n, d)
        Text embedding of each trial's concept on the image side (``text``).
    brain_views, image_views : tensors of shape (n_views, n, d)
        Outputs for other views of the same trials, such as repetition halves (``brain_views``), and of the
        same images, such as degraded ones (``image_views``).
    brain_tokens : tensor of shape (n, n_tokens, d)
        Local outputs, such as windows (``brain_tokens``); with ``local_outputs`` those of a network without any are its
        output alone, n_tokens = 1.
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
    words : integer tensor of shape (n, most_words)
        A caption of each trial's image, in numbers of words from START to END and then PAD (``words``).
    attributes : integer tensor of shape (n, n_attributes)
        Value of each attribute of the image, -1 where it is unknown (``attributes``).
    sentences : tensor of shape (n, d_sentence)
        Sentence vector of the image's captions, their mean brought to length one (``sentences``).
    swapped : tensor of shape (n, n_swaps, d_sentence)
        Sentence vectors of captions in which attributes changed places (``swapped``).
    swapped_known : boolean tensor of shape (n, n_swaps)
        Which of them exist (``swapped``).
    token_views : tensor of shape (2, n, n_tokens, d)
        Local outputs for two augmentations of the same trials (``token_views``).
    token_offsets : tensor of shape (2, n)
        By how many milliseconds each of them was shifted (``token_views``).
    teacher_tokens : tensor of shape (2, n, n_tokens, d)
        Local outputs of the moving-average network for the same two augmentations (``teacher_tokens``).
    seed
        For draws of an objective; it differs from step to step and is the same in all processes, which see one batch.
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
    words: Tensor | None = None
    attributes: Tensor | None = None
    sentences: Tensor | None = None
    swapped: Tensor | None = None
    swapped_known: Tensor | None = None
    token_views: Tensor | None = None
    token_offsets: Tensor | None = None
    teacher_tokens: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class StepSizes:
    """Sizes of the parts of `Outputs`, from which an objective makes weights of its own; 0 of what is not there.

    Parameters
    ----------
    n_common
        Features of the space of comparison (d of `Outputs`).
    n_outputs
        Features of the network's output, before any projector.
    n_tokens
        Local outputs of a trial; None if the network gives none.
    token_step
        Milliseconds from one local output to the next; None if they are not windows of time, or the sampling rate is
        not known.
    attribute_names
        Names of the attributes, in the order of their columns.
    attribute_values
        Number of values of each.
    n_words
        Words of the vocabulary, PAD, START and END included.
    max_words
        Length of a row of `Outputs.words`, which START and END belong to.
    n_sentence
        Features of a sentence vector.
    n_concepts
        Concepts of the training trials; those of a larger index are not known to the weights.
    target_shape
        Shape of an untouched target, before any projector: (n_features,), or (n_patches, n_features).
    """

    n_common: int = 0
    n_outputs: int = 0
    n_tokens: int | None = None
    token_step: float | None = None
    attribute_names: tuple[str, ...] = ()
    attribute_values: tuple[int, ...] = ()
    n_words: int = 0
    max_words: int = 0
    n_sentence: int = 0
    n_concepts: int = 0
    target_shape: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> StepSizes:
        """Return what `dataclasses.asdict` gave, lists as tuples."""
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**sizes)


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


def upcast(tensor: Tensor) -> Tensor:
    """Return half precision as single precision and leave the rest as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def normalise(tensor: Tensor) -> Tensor:
    """Return vectors of unit length along the last axis, in single precision at least."""
    return functional.normalize(upcast(tensor), dim=-1)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return all inner products, shape (n_left, n_right), in single precision at least, even under autocast.

    Parameters
    ----------
    left, right : tensors of shape (n_left, d) and (n_right, d)
    """
    with autocast(left.device):
        return upcast(left) @ upcast(right).mT


def check_pair(left: Tensor, right: Tensor, *, what: str = "brain and image") -> None:
    """Raise `DataError` unless both are of the same shape (n, d)."""
    if left.shape != right.shape or left.ndim != 2:
        raise DataError(
            f"{what} outputs must both be of shape (trials, features), but are {tuple(left.shape)} and "
            f"{tuple(right.shape)}: project both sides to the same space."
        )


def compare_pairs(
    brain: Tensor, image: Tensor, *, normalise_brain: bool = True, normalise_image: bool = True
) -> Tensor:
    """Return the inner products of all trials with all images, shape (n, n), the true pairs on the diagonal.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    normalise_brain, normalise_image
        Whether that side is brought to unit length.
    """
    check_pair(brain, image)
    # Dot products of unit vectors are cosines; upcast alone keeps the lengths.
    left = normalise(brain) if normalise_brain else upcast(brain)
    right = normalise(image) if normalise_image else upcast(image)
    return multiply(left, right)


def find_same(labels: Tensor) -> Tensor:
    """Return the boolean matrix of shape (n, n) that says which rows carry the same label."""
    return labels[:, None] == labels[None, :]  # (n, n)


def find_duplicates(labels: Tensor) -> Tensor:
    """Return like `find_same`, but False on the diagonal: other rows that show the same."""
    return find_same(labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)


def compute_soft_cross_entropy(logits: Tensor, targets: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the mean over rows of ``-sum_j targets_ij log softmax_j(logits_ij)``.

    Parameters
    ----------
    logits, targets : tensors of shape (n, n_candidates)
        Rows of `targets` need not sum to one; zero where not allowed.
    allowed : boolean tensor of shape (n, n_candidates), optional
        Candidates that take part in the softmax of each row; all if None.
    """
    # -inf: no part in the log-sum-exp
    normaliser = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    return (targets.sum(-1) * normaliser.logsumexp(-1) - (targets * logits).sum(-1)).mean()


def _are_unique(labels: Tensor) -> bool:
    """Say whether no label occurs twice; False of a GPU, which would have to be waited for."""
    return labels.device.type == "cpu" and len(labels.unique()) == len(labels)


def compute_clip_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    symmetric: bool = True,
    duplicates: str = "positive",
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
        Use both directions; otherwise only brain to image.
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
    logits = scale * compare_pairs(
        brain, image, normalise_brain=normalise_brain, normalise_image=normalise_image
    )
    allowed = None
    picked = logits.diagonal()
    picked_columns = picked
    if stimuli is not None and duplicates == "mask":
        allowed = ~find_duplicates(stimuli)
    elif stimuli is not None and duplicates == "positive" and _are_unique(stimuli):
        # No bit changes: taken twice, gradients add up in the order that they have below.
        picked_columns = logits.diagonal()
    elif stimuli is not None and duplicates == "positive":
        same = find_same(stimuli).to(logits.dtype)
        count = same.sum(-1)
        # cross-entropy with a uniform target over all right answers: the mean of their logits
        picked = (same * logits).sum(-1) / count
        picked_columns = (same * logits).sum(0) / count
    normaliser = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
    rows = (normaliser.logsumexp(1) - picked).mean()
    if not symmetric:
        return rows
    return (rows + (normaliser.logsumexp(0) - picked_columns).mean()) / 2


class Objective(nn.Module):
    """One term of the training objective: checks the step, leaves autocast, and hands over to `term`.

    Outside its phase it returns a zero that still depends on every parameter, so that distributed training sees
    no unused one.

    Parameters
    ----------
    config
        Its `ObjectiveConfig`: kind, weight, phase and needs.
    term
        ``forward(outputs)`` gives the loss.
    """

    def __init__(self, config: Any, term: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.term = term

    @property
    def has_sizes(self) -> bool:
        """Whether the term makes weights once the sizes of a step are known."""
        return getattr(self.term, "prepare", None) is not None

    def prepare(self, sizes: StepSizes) -> None:
        """Let the term make its weights, once and before the first step."""
        if self.has_sizes:
            cast(Any, self.term).prepare(sizes)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the unweighted scalar for one step."""
        if not self.config.is_active(outputs.progress):
            zero = outputs.brain.float().sum() * 0.0
            return zero + sum(parameter.float().sum() * 0.0 for parameter in self.parameters())
        # Only in its phase: what an objective needs may not be there before.
        check_needs(self.config.kind, self.config.needs, outputs)
        if self.config.contrastive:
            check_batch(outputs.stimuli)
        with autocast(outputs.brain.device):
            return self.term(outputs)


class LogitScale(nn.Module):
    """The factor of the similarities, learned or fixed.

    Parameters
    ----------
    temperature
        The parameter starts at ``ln(1 / temperature)``.
    form
        ``exp`` makes the factor ``1 / temperature`` at the start; ``softplus`` applies softplus to the same
        parameter, as UBP and NeuroBridge do, which for 0.07 gives 2.73 and not 14.3.
    learn
        Whether the parameter is trained.
    max_scale
        The parameter of ``exp`` is kept at or below the logarithm of this.
    """

    def __init__(
        self, temperature: float, *, form: Literal["exp", "softplus"], learn: bool, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        self.form = form
        self.limit = math.log(max_scale)
        # CLIP's parametrisation: a step changes the factor by a share, and it stays positive.
        start = torch.tensor(math.log(1.0 / temperature), dtype=torch.float32)
        if learn:
            self.raw = nn.Parameter(start)
        else:
            self.register_buffer("raw", start)

    def forward(self) -> Tensor:
        """Return the factor, a scalar tensor."""
        if self.form == "softplus":
            return functional.softplus(self.raw.float())
        return _bound(self.raw, None, self.limit).exp()


class LearnedTemperature(nn.Module):
    """A temperature that is trained itself and kept inside bounds, as in ALBEF."""

    def __init__(self, start: float, *, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.bounds = bounds
        self.raw = nn.Parameter(torch.tensor(start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the temperature, a scalar tensor."""
        return _bound(self.raw, *self.bounds)


def _bound(parameter: Tensor, low: float | None, high: float) -> Tensor:
    # The parameter itself is clamped: a clamp inside the graph would have no gradient beyond the bound and
    # leave the parameter stuck there. The copy keeps graphs of earlier micro-batches valid.
    if parameter.requires_grad:
        with torch.no_grad():
            parameter.clamp_(min=low, max=high)
    return parameter.float().clone()


class ScaledTerm(nn.Module):
    """A loss of brain and image outputs and the image of each trial, with its scale.

    Parameters
    ----------
    compute
        ``compute(brain, image, stimuli, scale=..., **options)`` gives the loss.
    scale
        Factor of the similarities.
    **options
        Further arguments of `compute`.
    """

    def __init__(self, compute: Callable[..., Tensor], scale: LogitScale, **options: Any) -> None:
        super().__init__()
        self.compute, self.scale, self.options = compute, scale, options

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return self.compute(outputs.brain, outputs.image, outputs.stimuli, scale=self.scale(), **self.options)


@torch.no_grad()
def compute_matches(objectives: Iterable[Any], outputs: Outputs) -> Tensor:
    """Return how similar each trial is to its own image, float32 of shape (n,), on the scale of the logits.

    That is ``scale * <b_i, v_i>`` with the scale and the normalisation of the first objective that has both; the cosine
    where none has, as with regressions alone.
    """
    terms = [o.term for o in objectives if isinstance(o.term, ScaledTerm)]
    scale = terms[0].scale() if terms else 1.0
    options = terms[0].options if terms else {}
    brain = normalise(outputs.brain) if options.get("normalise_brain", True) else upcast(outputs.brain)
    image = normalise(outputs.image) if options.get("normalise_image", True) else upcast(outputs.image)
    return scale * (brain * image).sum(dim=-1).float()
