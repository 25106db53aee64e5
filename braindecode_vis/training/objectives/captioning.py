"""Objectives on local outputs: a small causal decoder of captions over them, and their consistency in time.

Owns CoCa's two terms with brain tokens in the place of image patches (a contrast with the text, and the cross-entropy
of each next word), SyCoCa's attentive mask of the tokens that words are written from, and its third term, in which
patches of the frozen target that are most like the text are hidden and rebuilt from brain and words. The decoder is a
`CaptionNetwork`; what its numbers of words stand for is known to the fit.

References
----------
Yu et al. (2022), CoCa, arXiv:2205.01917. Ma et al. (2024), SyCoCa, arXiv:2401.02137.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import autocast
from braindecode_vis.embeddings.caption_bank import PAD
from braindecode_vis.training.caption_networks import (
    MOST_SCALE,
    CaptionNetwork,
    CaptionSizes,
    compare_texts,
    compute_word_loss,
)
from braindecode_vis.training.objectives.objective import find_same, normalise, upcast

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs, StepSizes


_HEADS = 4  # of each of the decoder's two layers
FEWEST_PATCHES = 4  # of a target whose half is to be rebuilt from the other


@dataclass(frozen=True)
class CaptioningOptions:
    """Weights of the terms and sizes of the decoder; see `CaptioningObjectiveConfig`."""

    reads: str
    contrast: float
    masked: float
    shown: float
    width: int
    n_queries: int
    dropout: float


class CaptioningTerm(nn.Module):
    """The weighted sum of contrast, captioning and masked modelling; its weights are made by `prepare`."""

    network: CaptionNetwork
    rebuilder: PatchRebuilder | None

    def __init__(self, options: CaptioningOptions) -> None:
        super().__init__()
        self.options = options

    def prepare(self, sizes: StepSizes) -> None:
        """Make the decoder for the words and tokens of a training.

        Raises
        ------
        ConfigError
            If patches are to be rebuilt, and the target has none.
        """
        own = self.options
        n_tokens = (sizes.n_tokens or 1) if own.reads == "tokens" else 1
        # A row of words has room for START and END, which are no words of a caption.
        self.network = CaptionNetwork(
            CaptionSizes(
                n_tokens, sizes.n_common, sizes.n_words, sizes.max_words - 2, own.width, 2, _HEADS, own.n_queries,
                own.dropout,
            )
        )  # fmt: skip
        self.rebuilder = None
        if own.masked > 0:
            if len(sizes.target_shape) != 2 or sizes.target_shape[0] < FEWEST_PATCHES:
                raise ConfigError(
                    "the objective captioning predicts masked patches (masked), but the target has "
                    f"{sizes.target_shape[0] if len(sizes.target_shape) == 2 else 1} vector(s) per "
                    "image; use a target with patches (target.pooling patches, or target.grid of "
                    "efficientnet-lite0), or leave masked out."
                )
            self.rebuilder = PatchRebuilder(sizes.target_shape, own.width, _HEADS, own.dropout)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.words is not None
        own, words = self.options, outputs.words
        tokens = outputs.brain_tokens if own.reads == "tokens" else outputs.brain[:, None]
        assert tokens is not None
        tokens = upcast(tokens)  # (n, n_tokens, d)
        states, text = self.network.read(words[:, :-1])
        hidden = None
        if own.shown < 1 and tokens.shape[1] > 1:
            hidden = hide_least_alike(self.network.place_tokens(tokens), text, own.shown)
        memory, brain = self.network.pool(tokens, hidden)
        loss = 2.0 * compute_word_loss(self.network.write(states, memory), words[:, 1:])
        # Another caption of the same image is no negative, nor are equal captions of two images.
        same = find_same(outputs.stimuli) | (words[:, None] == words[None]).all(dim=-1)
        scale = self.network.log_scale.exp().clamp(max=MOST_SCALE)
        if own.contrast > 0:
            loss = loss + own.contrast * compare_texts(brain, text, scale, same)
        if self.rebuilder is not None:
            assert outputs.raw_target is not None
            rebuilt, image = self.rebuilder(
                upcast(outputs.raw_target), torch.cat([states, memory], dim=1), words[:, :-1] == PAD, text
            )
            # Which patches are like a text is learnt from whole images and their texts.
            loss = loss + own.masked * (rebuilt + compare_texts(image, text, scale, same))
        return loss

    def write_words(self, tokens: Tensor, n_beams: int = 1) -> np.ndarray:
        """Return numbers of words for brain tokens of shape (n, n_tokens, d), int array of shape (n, n_words)."""
        return self.network.decode(upcast(tokens), n_beams)


class PatchRebuilder(nn.Module):
    """SyCoCa's text-guided masked modelling, with the patches of the frozen target in place of pixels.

    Parameters
    ----------
    shape
        Patches of a target, and features of each.
    width, heads, dropout
        Of the layer that looks at words and brain.
    """

    def __init__(self, shape: tuple[int, ...], width: int, heads: int, dropout: float) -> None:
        super().__init__()
        n_patches, n_features = shape
        self.shape = (n_patches, n_features)
        self.project, self.compare = nn.Linear(n_features, width), nn.Linear(width, width, bias=False)
        self.places = nn.Parameter(torch.randn(n_patches, width) * 0.02)
        self.hidden_patch = nn.Parameter(torch.randn(width) * 0.02)
        self.layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.out = nn.Linear(width, n_features)

    def forward(self, targets: Tensor, memory: Tensor, padded: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the hidden patches, and a unit vector of each image that meets texts.

        Parameters
        ----------
        targets : tensor of shape (n, n_patches * n_features)
            Untouched targets.
        memory : tensor of shape (n, n_words + n_queries, width)
            Hidden states of words, and what of the brain is looked at.
        padded : bool tensor of shape (n, n_words)
            Words that are none.
        text : tensor of shape (n, width)
            Unit vectors of the texts.
        """
        # Each patch by its own mean and spread, so that the error has no unit (He et al., arXiv:2111.06377).
        patches = functional.layer_norm(targets.unflatten(1, self.shape), self.shape[1:])
        shown = self.project(patches)
        alike = functional.normalize(self.compare(shown), dim=-1)  # (n, n_patches, width)
        # The half that is most like the text is hidden, the other is seen.
        masked = ~hide_least_alike(alike, text, 0.5)
        shown = torch.where(masked[..., None], self.hidden_patch, shown) + self.places
        padded = functional.pad(padded, (0, memory.shape[1] - padded.shape[1]))
        made = self.out(self.layer(shown, memory, memory_key_padding_mask=padded))
        return compute_masked_error(made, patches, masked), functional.normalize(alike.mean(dim=1), dim=-1)


def hide_least_alike(tokens: Tensor, text: Tensor, shown: float) -> Tensor:
    """Return which tokens are hidden, bool of shape (n, n_tokens): all but the share most similar to the text.

    Parameters
    ----------
    tokens : tensor of shape (n, n_tokens, width)
        Unit vectors.
    text : tensor of shape (n, width)
        Unit vectors.
    shown
        Share that is not hidden, rounded down, but at least one token.

    Examples
    --------
    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
    >>> hide_least_alike(tokens, torch.tensor([[0.0, 1.0]]), 0.67).tolist()
    [[True, False, False]]
    """
    with torch.no_grad():
        likeness = (tokens @ text[..., None])[..., 0]  # (n, n_tokens)
        kept = likeness.topk(max(1, int(shown * tokens.shape[1])), dim=1).indices
        return torch.ones_like(likeness, dtype=torch.bool).scatter(1, kept, False)


def compute_masked_error(made: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
    """Return the mean squared error over features of the masked patches.

    Parameters
    ----------
    made, patches : tensors of shape (n, n_patches, n_features)
    masked : bool tensor of shape (n, n_patches)
        As many in each row.
    """
    squares = ((made - patches) ** 2).mean(dim=-1)
    # A sum of products instead of a choice of rows, whose number an accelerator would be waited for.
    return (squares * masked).sum() / masked.sum()


# --- consistency of local outputs ------------------------------------------------------------------------------
# Consistency of local outputs between two augmentations of one trial: PixPro's propagation, for tokens in time.
#
# A token is smoothed by those of its own view that resemble it, and shall then point where the tokens of the other
# view point that lie near it in time. Nothing here compares trials, so that no batch is too small; a contrast beside
# it keeps the outputs apart.
#
# References: Xie et al. (2021), Propagate yourself, arXiv:2011.10043; zdaxie/PixPro@e390d6b.


#: Share of the step from one token to the next within which two tokens show the same, as in PixPro.
NEAR = 0.7


def propagate(tokens: Tensor, values: Tensor) -> Tensor:
    """Return ``y_p = sum_q max(cos(x_p, x_q), 0)^2 * v_q / |v_q|``, the propagation of PixPro.

    Parameters
    ----------
    tokens, values : tensors of shape (..., n_tokens, d)
        The x that are compared and the v that are summed.

    Examples
    --------
    >>> import torch
    >>> propagate(torch.eye(2), 3 * torch.eye(2)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    with autocast(tokens.device):
        unit = normalise(tokens)
        similarity = (unit @ unit.mT).clamp_min(0.0)  # (..., n_tokens, n_tokens)
        return similarity.pow(2) @ normalise(values)


def find_near(times: Tensor, other_times: Tensor) -> Tensor:
    """Return which tokens of two views are less than 0.7 of a step apart, boolean of shape (..., n_tokens, n_tokens).

    Parameters
    ----------
    times, other_times : tensors of shape (..., n_tokens)
        Time of each token in the trial that both views were made of, in ms, equally spaced.

    Examples
    --------
    >>> import torch
    >>> find_near(torch.tensor([0.0, 10.0]), torch.tensor([4.0, 14.0])).tolist()
    [[True, False], [True, True]]
    """
    distance = (times[..., :, None] - other_times[..., None, :]).abs()
    if times.shape[-1] == 1:  # of one token there is no step
        return torch.ones_like(distance, dtype=torch.bool)
    return distance < NEAR * (times[..., 1] - times[..., 0]).abs()[..., None, None]


def compute_propagation_loss(propagated: Tensor, targets: Tensor, near: Tensor) -> Tensor:
    """Return one minus the mean cosine of near pairs of tokens, the mean over trials of the mean over their pairs.

    No gradient flows through the targets. Trials without a near pair are left out, and a batch without any gives 0.

    Parameters
    ----------
    propagated : tensor of shape (n, n_tokens, d)
        Smoothed tokens of one view.
    targets : tensor of shape (n, n_tokens, d)
        Tokens of the other view.
    near : boolean tensor of shape (n, n_tokens, n_tokens)
        From `find_near`, rows for `propagated`.

    Raises
    ------
    DataError
        If the views are not of one shape (trials, tokens, features).
    """
    if propagated.ndim != 3 or propagated.shape != targets.shape:
        raise DataError(
            "the tokens of two views must both be of shape (trials, tokens, features), but are "
            f"{tuple(propagated.shape)} and {tuple(targets.shape)}."
        )
    with autocast(propagated.device):
        cosine = normalise(propagated) @ normalise(targets.detach()).mT  # (n, n_tokens, n_tokens)
        pairs = near.to(cosine.dtype)
        count = pairs.sum(dim=(1, 2))
        each = 1.0 - (cosine * pairs).sum(dim=(1, 2)) / count.clamp_min(1.0)
        some = (count > 0).to(cosine.dtype)
        return (each * some).sum() / some.sum().clamp_min(1.0)


class PropagationTerm(nn.Module):
    """The consistency of both views with each other, each smoothed once and the other's target once.

    Parameters
    ----------
    targets
        ``teacher``, the tokens of the moving-average network, or ``self``, the network's own.
    """

    transform: nn.Linear

    def __init__(self, *, targets: str) -> None:
        super().__init__()
        self.targets = targets
        self.step: float | None = None

    def prepare(self, sizes: StepSizes) -> None:
        """Make the layer whose outputs are propagated, and remember how far tokens lie apart."""
        self.step = sizes.token_step
        self.transform = nn.Linear(sizes.n_common, sizes.n_common)

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.token_views is not None
        assert outputs.token_offsets is not None
        views = upcast(outputs.token_views)  # (2, n, n_tokens, d)
        wanted = views if self.targets == "self" else outputs.teacher_tokens
        assert wanted is not None
        times = torch.arange(views.shape[2], device=views.device) * (self.step or 1.0)
        times = times.expand(views.shape[:3])
        if self.step is not None:
            # A trial that is late shows at each token what was earlier; networks of parcels do not move.
            times = times - upcast(outputs.token_offsets)[..., None]
        near = find_near(times[0], times[1])  # (n, n_tokens, n_tokens)
        smooth = propagate(views, self.transform(views))
        one = compute_propagation_loss(smooth[0], wanted[1], near)
        return (one + compute_propagation_loss(smooth[1], wanted[0], near.mT)) / 2
