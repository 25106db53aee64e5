"""Sentences as a second target beside images: a head from the brain's output into the space of a sentence encoder.

Two forms: the cross-entropy of MCSE, in which two repetition halves of a trial's image play the part of its two dropout
passes, and the margin of Merkx and Frank. In both papers sentences are grounded by images; here the response to an
image is grounded by what is said of it, and the head predicts in the sentence space, so that texts can be searched.

References
----------
Zhang et al. (2022), MCSE, arXiv:2204.10931; uds-lsv/MCSE@3031426. Merkx and Frank (2019), Learning semantic sentence
representations from visually grounded language, doi:10.1017/S1351324919000196; DannyMerkx/speech2image@4a79a61.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from braindecode_vis.training.objectives.objective import (
    check_pair,
    compute_soft_cross_entropy,
    find_same,
    multiply,
    normalise,
    upcast,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs, StepSizes

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
