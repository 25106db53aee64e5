"""Contrast in subspaces that gates open: trials of two classes as positives by what the classes share (SimLAP, Hydra).

For each anchor a partner class is drawn from the batch. A gate, made from both classes by a small network, weighs the
features; in that subspace all trials of the partner class are right answers, trials of further classes wrong ones, and
those of the anchor's own class neither. Gates are discarded after training: concepts of a test have none.

References
----------
Wu et al. (2024), Rethinking positive pairs in contrastive learning, arXiv:2410.18200; erow/vitookit@f6a8057.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import ConfigError, Notice
from braindecode_vis.base.seeds import make_torch_generator
from braindecode_vis.training.objectives.objective import Outputs, StepSizes, multiply, normalise

_NEVER = (
    -1e30
)  # logit of what takes no part; finite, so that a row of such has a gradient of zero and not NaN


def compute_gated_loss(
    anchors: Tensor,
    keys: Tensor,
    gates: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    temperature: float,
    unit: bool,
) -> Tensor:
    """Return ``sum_i sum_{p in P_i} log(1 + sum_{n in N_i} exp(S_in - S_ip)) / sum_i |P_i|``; 0 without a positive.

    ``S_ij`` is the inner product of anchor i and key j, both of length one and then weighed by the gate of anchor i,
    over the temperature.

    Parameters
    ----------
    anchors, keys : tensors of shape (n, d) and (n_keys, d)
    gates : tensor of shape (n, d)
        Weight of each feature, 0 to 1.
    positive, negative : boolean tensors of shape (n, n_keys)
        Right and wrong answers of each anchor.
    temperature
        Divides the similarities.
    unit
        Bring both to length one again after they were weighed: a cosine in the subspace.
    """
    anchors, keys, gates = normalise(anchors), normalise(keys), gates.to(keys.dtype)
    squared = gates.square()
    logits = multiply(anchors * squared, keys)  # (n, n_keys)
    if unit:
        own = (squared * anchors.square()).sum(-1, keepdim=True)
        others = multiply(squared, keys.square())
        logits = logits * (own * others).clamp_min(1e-12).rsqrt()
    logits = logits / temperature
    wrong = logits.masked_fill(~negative, _NEVER).logsumexp(-1, keepdim=True)
    losses = functional.softplus(wrong - logits)
    return (losses * positive).sum() / positive.sum().clamp_min(1)


class Gate(nn.Module):
    """Weights of features, 0 to 1, from the embeddings of two classes.

    Parameters
    ----------
    n_classes
        Rows of the table of embeddings.
    n_features
        Weights that come out.
    """

    def __init__(self, n_classes: int, n_features: int) -> None:
        super().__init__()
        width, hidden = 512, 1024  # features of an embedding and of the hidden layer
        self.classes = nn.Embedding(n_classes, width)
        self.network = nn.Sequential(
            nn.ReLU(), nn.BatchNorm1d(width), nn.Linear(width, hidden),
            nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, n_features),
        )  # fmt: skip

    def forward(self, own: Tensor, partner: Tensor) -> Tensor:
        """Return gates of shape (n, n_features) for the numbers of two classes, shape (n,) each."""
        one, two = self.classes(own), self.classes(partner)
        weights: Tensor = self.network((one + two) / 2).sigmoid()
        return weights


class HydraTerm(nn.Module):
    """`compute_gated_loss` of brain and images with drawn partner classes.

    Parameters
    ----------
    classes, partner, unit
        See `HydraObjectiveConfig`.
    """

    gate: Gate
    starts: Tensor

    def __init__(
        self,
        *,
        classes: Literal["concepts", "attributes"],
        partner: Literal["arbitrary", "identical", "distinct"],
        unit: bool,
    ) -> None:
        super().__init__()
        self.kind, self.partner, self.unit = classes, partner, unit

    def prepare(self, sizes: StepSizes) -> None:
        """Make the gate of all concepts, or of all values of all attributes side by side."""
        counts = [sizes.n_concepts] if self.kind == "concepts" else list(sizes.attribute_values)
        if sum(counts) < 2:
            raise ConfigError(
                f"the objective hydra needs two or more {self.kind}, but the training data have {sum(counts)}."
            )
        ends = torch.tensor([0, *counts]).cumsum(0)
        self.register_buffer("starts", ends[:-1])  # number of the first class of each attribute
        self.n_classes = sum(counts)
        self.gate = Gate(self.n_classes, sizes.n_common)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        n, place = len(outputs.brain), outputs.brain.device
        # On the CPU, so that all devices and processes draw the same numbers.
        drawn = torch.rand(2, n, generator=make_torch_generator(outputs.seed, "hydra")).to(
            place, non_blocking=True
        )
        codes = self._code(outputs)  # (n, n_kinds), -1 where unknown
        column = _draw(codes >= 0, drawn[0])[:, None]  # attribute in question of each anchor
        # (n, n): class of trial j as seen by anchor i, and the anchor's own
        seen = codes.T.gather(0, column.expand(-1, n)) if codes.shape[1] > 1 else codes.T.expand(n, n)
        own = seen.diagonal()[:, None]
        known = (seen >= 0) & (own >= 0)
        partner = own
        if self.partner != "identical":
            others = known & ~torch.eye(n, dtype=torch.bool, device=place)
            if self.partner == "distinct":
                others = others & (seen != own)
            partner = seen.gather(1, _draw(others, drawn[1])[:, None])
            known = known & others.any(dim=1, keepdim=True)
        positive, negative = known & (seen == partner), known & (seen != own) & (seen != partner)
        if place.type == "cpu" and not bool(positive.any()):
            told = f"a batch without two trials of known {self.kind} gives no signal to the objective hydra"
            warnings.warn(f"{told}; increase the batch size or fill in the table.", Notice, stacklevel=2)
        gates = self.gate(own[:, 0].clamp_min(0), partner[:, 0].clamp_min(0))

        def compare(anchors: Tensor, keys: Tensor) -> Tensor:
            return compute_gated_loss(
                anchors, keys, gates, positive, negative, temperature=0.1, unit=self.unit
            )

        return (compare(outputs.brain, outputs.image) + compare(outputs.image, outputs.brain)) / 2

    def _code(self, outputs: Outputs) -> Tensor:
        if self.kind == "concepts":
            # Behind the known concepts stand those that were not learnt from.
            return outputs.concepts.masked_fill(outputs.concepts >= self.n_classes, -1)[:, None]
        assert outputs.attributes is not None
        return torch.where(outputs.attributes >= 0, outputs.attributes + self.starts, -1)


def _draw(allowed: Tensor, uniform: Tensor) -> Tensor:
    """Return the place of one allowed entry of each row, shape (n,), by numbers in [0, 1); 0 in a row without any."""
    count = allowed.cumsum(dim=1)
    # rounding of u * m must not lead past the last
    rank = torch.minimum((uniform * count[:, -1]).long(), (count[:, -1] - 1).clamp_min(0))
    return (count > rank[:, None]).int().argmax(dim=1)
