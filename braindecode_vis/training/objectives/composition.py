"""Objectives on sentences: texts of the same words as negatives, and sentences as a second target.

NegCLIP adds captions in which words changed places, and images of the same parts, to the batch of a contrast: with
images V = [I; I_hard] and texts T = [T; T_hard; swap(T); swap(T_hard)] each image is searched among all 4 B texts, and
each of the 2 B true texts among the 2 B images. Here V are responses; I_hard is in the batch where
`CompositionObjectiveConfig.hard_images` puts images of the same parts next to each other.

References
----------
Yuksekgonul, M. et al. (2023). When and why vision-language models behave like bags-of-words, arXiv:2210.01936;
vinid/neg_clip@e680f8e.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.objective import (
    LogitScale,
    check_pair,
    compute_soft_cross_entropy,
    find_same,
    multiply,
    normalise,
    upcast,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs, StepSizes


#: Texts of at least this cosine are the same text: single precision tells less apart.
SAME_TEXT = 1 - 1e-6


def compute_composition_loss(
    brain: Tensor,
    text: Tensor,
    swapped: Tensor,
    known: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    symmetric: bool = True,
    duplicates: str = "positive",
    normalise_brain: bool = True,
) -> Tensor:
    """Return the cross-entropy of finding each trial's text among all texts and all swapped ones.

    With ``s_ij = scale * <b_i, t_j>`` and ``w_im = scale * <b_i, u_m>`` for the swapped texts u of all trials, the loss
    is the mean over i of ``-s_ii + log(sum_j exp s_ij + sum_m exp w_im)``, averaged if `symmetric` with the mean over j
    of ``-s_jj + log sum_i exp s_ij``: texts look for responses without the swapped ones, as in NegCLIP.

    Parameters
    ----------
    brain, text : tensors of shape (n, d)
    swapped : tensor of shape (n, n_swaps, d)
    known : boolean tensor of shape (n, n_swaps)
        Which of them exist.
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; texts alone say what is the same if None.
    scale
        Factor of the inner products.
    symmetric
        Both directions; otherwise brain to text alone.
    duplicates
        What other trials of the same image or the same text are: ``positive`` (they share the target evenly), ``mask``
        (left out), or ``negative`` (as published). But for ``negative``, a swapped text that says what a trial shows is
        left out of its softmax: it is the true text of an image of the same parts.
    normalise_brain
        Whether the brain side is brought to unit length; the texts always are.

    Examples
    --------
    >>> import torch
    >>> true, wrong = torch.eye(2), torch.eye(2)[[1, 0]][:, None]
    >>> known = torch.zeros(2, 1, dtype=torch.bool)
    >>> round(float(compute_composition_loss(true, true, wrong, known, scale=1.0)), 4)
    0.3133
    """
    check_pair(brain, text, what="brain and text")
    flat = swapped.flatten(0, 1)  # (n * n_swaps, d)
    left = normalise(brain) if normalise_brain else upcast(brain)
    right, wrong = (normalise(t) for t in (text, flat))
    logits, harder = scale * multiply(left, right), scale * multiply(left, wrong)
    n = len(logits)
    same = torch.eye(n, dtype=torch.bool, device=logits.device)
    refused = ~known.flatten()[None].expand(n, -1)  # (n, n * n_swaps)
    if duplicates != "negative":
        with torch.no_grad():
            unit, unit_wrong = normalise(text), normalise(flat)
            same = same | (multiply(unit, unit) >= SAME_TEXT)
            if stimuli is not None:
                same = same | find_same(stimuli)
            # True of any trial that says the same as this one, too.
            refused = refused | (multiply(unit, unit_wrong) >= SAME_TEXT)
    share = same.to(logits.dtype)
    allowed = logits
    if duplicates == "mask":
        allowed = logits.masked_fill(same & ~torch.eye(n, dtype=torch.bool, device=same.device), -math.inf)
        share = torch.eye(n, dtype=logits.dtype, device=logits.device)
    share = share / share.sum(-1, keepdim=True)
    everything = torch.cat([allowed, harder.masked_fill(refused, -math.inf)], dim=1)
    rows = (everything.logsumexp(1) - (share * logits).sum(1)).mean()
    if not symmetric:
        return rows
    # `same` is symmetric, so that the transpose shares every column evenly.
    columns = (allowed.logsumexp(0) - (share.T * logits).sum(0)).mean()
    return (rows + columns) / 2


class CompositionTerm(nn.Module):
    """`compute_composition_loss` in the space of the targets, or in that of the sentences by a head of its own.

    Parameters
    ----------
    scale
        Factor of the similarities.
    in_sentences
        Whether a linear head predicts sentence vectors; otherwise the targets are the texts.
    **options
        As of `compute_composition_loss`.
    """

    head: nn.Linear

    def __init__(self, scale: LogitScale, *, in_sentences: bool, **options: bool | str) -> None:
        super().__init__()
        self.scale, self.in_sentences, self.options = scale, in_sentences, options

    def prepare(self, sizes: StepSizes) -> None:
        """Make the head, from the space of comparison into that of the sentences."""
        if self.in_sentences:
            self.head = nn.Linear(sizes.n_common, sizes.n_sentence)

    def predict(self, brain: Tensor) -> Tensor:
        """Return predictions in the sentence space, shape (n, d_sentence), not normalised."""
        brain = upcast(brain)
        return functional.linear(brain, self.head.weight.to(brain.dtype), self.head.bias.to(brain.dtype))

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.swapped is not None
        assert outputs.swapped_known is not None
        brain, text = outputs.brain, outputs.image
        if self.in_sentences:
            assert outputs.sentences is not None
            brain, text = self.predict(brain), outputs.sentences
        if outputs.swapped.shape[-1] != text.shape[-1]:
            raise DataError(
                f"swapped captions have {outputs.swapped.shape[-1]} values, but the texts to compare "
                f"with have {text.shape[-1]}; set space of the objective composition to sentences."
            )
        return compute_composition_loss(
            brain, text, outputs.swapped, outputs.swapped_known, outputs.stimuli,
            scale=self.scale(), **self.options,  # type: ignore[arg-type]
        )  # fmt: skip


# --- sentences as a second target ------------------------------------------------------------------------------
# Sentences as a second target beside images: a head from the brain's output into the space of a sentence encoder.
#
# Two forms: the cross-entropy of MCSE, in which two repetition halves of a trial's image play the part of its two
# dropout passes, and the margin of Merkx and Frank. In both papers sentences are grounded by images; here the
# response to an image is grounded by what is said of it, and the head predicts in the sentence space, so that texts
# can be searched.
#
# References: Zhang et al. (2022), MCSE, arXiv:2204.10931; uds-lsv/MCSE@3031426. Merkx and Frank (2019), Learning
# semantic sentence representations from visually grounded language, doi:10.1017/S1351324919000196;
# DannyMerkx/speech2image@4a79a61.


#: Sentences whose vectors have at least this cosine say the same.
SAME_SENTENCE = 0.999
_MARGIN = 0.2  # how much more similar the right pair shall be, in Merkx and Frank


def find_same_sentences(sentences: Tensor, stimuli: Tensor | None = None) -> Tensor:
    """Return which trials show the same image or have the same sentence, boolean of shape (n, n).

    Parameters
    ----------
    sentences : tensor of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Index of each trial's image; sentences alone decide if None.
    """
    with torch.no_grad():
        unit = normalise(sentences)
        same = multiply(unit, unit) >= SAME_SENTENCE
        same.fill_diagonal_(True)
        return same if stimuli is None else same | find_same(stimuli)


def compute_sentence_contrast(
    predicted: Tensor,
    sentences: Tensor,
    same: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """Return the cross-entropy of finding each trial's sentence among those of the batch, MCSE's grounding term.

    Parameters
    ----------
    predicted, sentences : tensors of shape (n, d)
    same : boolean tensor of shape (n, n), optional
        Sentences that are right for a trial and share the target evenly; the diagonal alone if None.
    temperature
        Of the cosines.

    Examples
    --------
    >>> import torch
    >>> round(float(compute_sentence_contrast(torch.eye(2), torch.eye(2), temperature=1.0)), 4)
    0.3133
    """
    check_pair(predicted, sentences, what="brain and sentence")
    logits = multiply(normalise(predicted), normalise(sentences)) / temperature
    n = len(logits)
    right = torch.eye(n, dtype=logits.dtype, device=logits.device) if same is None else same.to(logits.dtype)
    return compute_soft_cross_entropy(logits, right / right.sum(-1, keepdim=True))


def compute_margin_loss(predicted: Tensor, sentences: Tensor, same: Tensor | None = None) -> Tensor:
    """Return ``sum_ij [margin - s_ii + s_ij]_+ + [margin - s_jj + s_ij]_+`` over wrong pairs, per pair of the batch.

    The form of Merkx and Frank, with their margin of 0.2. The sum is divided by n * n.

    Parameters
    ----------
    predicted, sentences : tensors of shape (n, d)
    same : boolean tensor of shape (n, n), optional
        Pairs that are not wrong; the diagonal alone if None.

    Examples
    --------
    >>> import torch
    >>> float(compute_margin_loss(torch.eye(2), torch.eye(2)))
    0.0
    """
    check_pair(predicted, sentences, what="brain and sentence")
    similarity = multiply(normalise(predicted), normalise(sentences))
    n = len(similarity)
    right = torch.eye(n, dtype=torch.bool, device=similarity.device) if same is None else same
    own = similarity.diagonal()
    rows = (_MARGIN - own[:, None] + similarity).clamp_min(0.0).masked_fill(right, 0.0)
    columns = (_MARGIN - own[None, :] + similarity).clamp_min(0.0).masked_fill(right, 0.0)
    return (rows + columns).sum() / n**2


class SentenceTerm(nn.Module):
    """The head and its loss, over one response to each image or over two halves of its repetitions.

    Parameters
    ----------
    form
        ``softmax`` or ``margin``.
    halves
        Whether the two repetition halves go through the head, as the two passes of MCSE do, or the trial itself.
    """

    head: nn.Linear

    def __init__(self, *, form: str, halves: bool) -> None:
        super().__init__()
        self.form, self.halves = form, halves

    def prepare(self, sizes: StepSizes) -> None:
        """Make the head, from the space of comparison into that of the sentences."""
        self.head = nn.Linear(sizes.n_common, sizes.n_sentence)

    def predict(self, brain: Tensor) -> Tensor:
        """Return predictions in the sentence space, shape (n, d_sentence), not normalised."""
        predicted: Tensor = self.head(upcast(brain))
        return predicted

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.sentences is not None
        sentences = outputs.sentences
        same = find_same_sentences(sentences, outputs.stimuli)
        if not self.halves:
            return self._compare(self.predict(outputs.brain), sentences, same)
        assert outputs.brain_views is not None
        views = list(outputs.brain_views)  # n_views of (n, d)
        losses = [self._compare(self.predict(view), sentences, same) for view in views]
        return torch.stack(losses).mean()

    def _compare(self, predicted: Tensor, sentences: Tensor, same: Tensor) -> Tensor:
        if self.form == "margin":
            return compute_margin_loss(predicted, sentences, same)
        return compute_sentence_contrast(predicted, sentences, same, temperature=0.05)  # as in MCSE
