"""Alignment, uniformity, mean discrepancy, multi-view and salient-part (contrastive PCA) objectives.

Alignment and uniformity on the sphere work against the gap that the contrast leaves between brain and image. MV-InfoNCE
and MV-DHEL contrast more than two views at once: repetition halves, the image and its degraded forms, or further
modalities of the same trial. The mean discrepancy (MMD) brings the two clouds together before pairs are contrasted, as
SAMGA does in its first stage. SepCLR splits the output in two: a common part that any stretch of the recording has, and
a salient part that only the response to an image may fill. The formula is that of the authors' released training
scripts (the kernel joint entropy variant), which we read; the paper itself we did not check it against. What is ours:
pre-stimulus data as background, repetition halves as the two views, one view of the background where theirs has two,
salient parts brought to one size (`scale`), and the default weights.

References
----------
Wang and Isola (2020), arXiv:2005.10242. Fahim, Murphy, Fyshe (2024), arXiv:2405.18570: ``L_CUA`` and ``L_CUAXU``.
Koromilas et al. (2025), A principled framework for multi-view contrastive learning; the released code
(github.com/pakoromilas/Multi-View-CL) is followed where it differs from the text beside it. Louiset et al. (2024),
Separating common from salient patterns with contrastive representation learning, ICLR. Gretton et al. (2012), JMLR 13;
SAMGA (2026), arXiv:2604.17782, ``module/loss.py`` of LinJiang8/SAMGA@1a63745.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.training.objectives.objective import (
    check_pair,
    compute_clip_loss,
    find_same,
    multiply,
    normalise,
    upcast,
)

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs

BANDWIDTHS = (0.1, 0.2, 0.5, 1.0, 2.0)  # standard deviations of the kernels of `compute_mmd` in SAMGA's code
_SHARPNESS = 2.0  # t of the papers on uniformity
_TAU = 0.5  # bandwidth of the kernel of the salient objective in the authors' scripts


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


def compute_mmd(brain: Tensor, image: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of two sets of vectors, at least zero.

    ``mean_{i!=j} k(b_i, b_j) + mean_{i!=j} k(v_i, v_j) - 2 mean_{ij} k(b_i, v_j)``, where k is the mean of
    ``exp(-|x - y|^2 / (2 s^2))`` over the `BANDWIDTHS` s. As in SAMGA's code the cross term counts pairs that belong
    together, which an unbiased estimate of two independent sets would not hold.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    """
    check_pair(brain, image)
    n = len(brain)

    def sum_kernel(left: Tensor, right: Tensor) -> Tensor:
        squares = left.square().sum(-1)[:, None] + right.square().sum(-1)[None] - 2 * multiply(left, right)
        distance = squares.clamp_min(0.0)  # rounding may fall below
        return torch.stack([(-distance / (2 * s**2)).exp() for s in BANDWIDTHS]).mean(0).sum()

    left, right = upcast(brain), upcast(image)
    # the diagonal of a set with itself is one each
    within = sum((sum_kernel(x, x) - n) / (n * (n - 1)) for x in (left, right))
    return (within - 2 * sum_kernel(left, right) / n**2).clamp_min(0.0)


class MmdTerm(nn.Module):
    """`compute_mmd` of brain and image outputs."""

    def __init__(self, *, normalise_both: bool) -> None:
        super().__init__()
        self.normalise_both = normalise_both

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        brain, image = outputs.brain, outputs.image
        if self.normalise_both:
            brain, image = normalise(brain), normalise(image)
        return compute_mmd(brain, image)


def compute_uniformity(vectors: Tensor, stimuli: Tensor | None = None) -> Tensor:
    """Return ``log mean_{i<j} exp(-2 |x_i - x_j|^2)`` over unit vectors.

    Parameters
    ----------
    vectors : tensor of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Pairs of trials of the same image are left out; all differ if None.
    """
    return _compute_log_mean_kernel(vectors, vectors, stimuli)


def compute_cross_uniformity(brain: Tensor, image: Tensor, stimuli: Tensor | None = None) -> Tensor:
    """Return ``log mean_{i!=j} exp(-2 |b_i - v_j|^2)`` over unit vectors.

    Parameters
    ----------
    brain, image : tensors of shape (n, d)
    stimuli : integer tensor of shape (n,), optional
        Pairs that show the same image are left out; all differ if None.
    """
    check_pair(brain, image)
    return _compute_log_mean_kernel(brain, image, stimuli)


def _compute_log_mean_kernel(left: Tensor, right: Tensor, stimuli: Tensor | None) -> Tensor:
    # Ordered pairs: for one set of vectors every unordered pair counts twice, which the mean does not notice.
    exponents = _SHARPNESS * (2.0 * multiply(normalise(left), normalise(right)) - 2.0)
    labels = torch.arange(len(left), device=left.device) if stimuli is None else stimuli
    # A pair of the same image should not be pushed apart.
    different = ~find_same(labels)
    total = exponents.masked_fill(~different, -math.inf).flatten().logsumexp(0)
    # log of a mean: the sum less the logarithm of how many
    return total - different.sum().to(total.dtype).log()


def compute_cua_loss(
    brain: Tensor,
    image: Tensor,
    stimuli: Tensor | None = None,
    *,
    scale: float | Tensor,
    cross: bool = False,
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
    **clip_options
        Further options of `compute_clip_loss`.
    """
    total = compute_clip_loss(brain, image, stimuli, scale=scale, **clip_options)  # type: ignore[arg-type]
    labels = None if clip_options.get("duplicates") == "negative" else stimuli
    total = total + compute_alignment(brain, image)
    # Weights of 1 for each part, as in L_CUA of the paper.
    total = total + compute_uniformity(brain, labels) / 2
    total = total + compute_uniformity(image, labels) / 2
    return total + compute_cross_uniformity(brain, image, labels) if cross else total


class AlignmentTerm(nn.Module):
    """`compute_alignment` of brain and image."""

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        return compute_alignment(outputs.brain, outputs.image)


class UniformityTerm(nn.Module):
    """Uniformity of the chosen side or sides, or between them."""

    def __init__(self, *, between: str, duplicates: str) -> None:
        super().__init__()
        self.between, self.duplicates = between, duplicates

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        labels = outputs.stimuli if self.duplicates == "mask" else None
        if self.between == "cross":
            return compute_cross_uniformity(outputs.brain, outputs.image, labels)
        sides = {"brain": [outputs.brain], "image": [outputs.image], "both": [outputs.brain, outputs.image]}
        terms = [compute_uniformity(side, labels) for side in sides[self.between]]
        return torch.stack(terms).mean()


def compute_mv_infonce(
    views: Tensor,
    stimuli: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """Return ``-(1/n) sum_i log [sum_{l!=m} e(il, im) / sum_l sum_{(j, m)} e(il, jm)]``, ``e = exp(cosine / t)``.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
    stimuli : integer tensor of shape (n,), optional
        Other trials of the same image are left out of the denominator; all differ if None.
    temperature
        The t above.

    Notes
    -----
    The inner sum of the denominator runs over every (j, m) but (i, l) itself, as in the released code; its README has
    views m other than l alone.
    """
    _check_views(views)
    n_views, n, _ = views.shape
    flat = normalise(views).flatten(0, 1)  # (n_views * n, d)
    same = torch.eye(n, dtype=torch.bool, device=views.device)
    # other trials of the same image, which are no negatives
    others = torch.zeros_like(same) if stimuli is None else find_same(stimuli) & ~same
    same_view = torch.eye(n_views, dtype=torch.bool, device=views.device)
    # (l, i, m, j): what is left out of the denominator
    dropped = others[None, :, None, :].expand(n_views, n, n_views, n)
    own = same_view[:, None, :, None]
    dropped = dropped | (own & same[None, :, None, :])
    # (n_views, n, n_views, n)
    exponents = (multiply(flat, flat) / temperature).view(n_views, n, n_views, n)
    # over all (view, trial) but what is dropped
    rows = exponents.masked_fill(dropped, -math.inf).flatten(2).logsumexp(-1)  # (n_views, n)
    return (rows.logsumexp(0) - _compute_positive(views, temperature, ordered=True)).mean()


def compute_mv_dhel(views: Tensor, stimuli: Tensor | None = None, *, temperature: float) -> Tensor:
    """Return ``-(1/n) sum_i log [sum_{l<m} e(il, im) / prod_l sum_{j!=i} e(il, jl)]``, ``e = exp(cosine / t)``.

    Negatives come from the same view only, which parts alignment from uniformity. The product is a sum of logarithms.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
    stimuli : integer tensor of shape (n,), optional
        Other trials of the same image are no negatives; all differ if None.
    temperature
        The t above.
    """
    _check_views(views)
    labels = torch.arange(views.shape[1], device=views.device) if stimuli is None else stimuli
    same = find_same(labels)
    unit = normalise(views)
    exponents = multiply(unit, unit) / temperature  # (n_views, n, n)
    # the product over views is a sum of logarithms, (n,)
    spread = exponents.masked_fill(same, -math.inf).logsumexp(-1).sum(0)
    return (spread - _compute_positive(views, temperature, ordered=False)).mean()


def _compute_positive(views: Tensor, temperature: float, *, ordered: bool) -> Tensor:
    """Return the logarithm of the sum over pairs of views, shape (n,); ordered pairs count each twice."""
    unit = normalise(views).transpose(0, 1)  # (n, n_views, d)
    exponents = multiply(unit, unit) / temperature  # (n, n_views, n_views)
    # pairs of views, each once
    first, second = torch.triu_indices(len(views), len(views), offset=1, device=views.device)
    total = exponents[:, first, second].logsumexp(-1)
    return total + math.log(2.0) if ordered else total


def _check_views(views: Tensor) -> None:
    if views.ndim != 3 or len(views) < 2:
        raise DataError(
            "a multi-view objective needs at least two views of shape (trials, features), but got "
            f"{tuple(views.shape)}: name more of brain, image, brain_views, image_views in its option 'views'."
        )


class MultiviewTerm(nn.Module):
    """`compute_mv_infonce` or `compute_mv_dhel` of the views that the settings name."""

    def __init__(
        self,
        *,
        form: Literal["dhel", "infonce"],
        views: tuple[str, ...],
        duplicates: Literal["mask", "negative"],
    ) -> None:
        super().__init__()
        self.form, self.views, self.duplicates = form, views, duplicates

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        chosen = [getattr(outputs, name) for name in self.views]
        parts = [part if part.ndim == 3 else part[None] for part in chosen]
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"views must all be of the same trials and features, but are of shapes {sorted(shapes)}."
            )
        views = torch.cat([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])
        stimuli = outputs.stimuli if self.duplicates == "mask" else None
        compute = compute_mv_dhel if self.form == "dhel" else compute_mv_infonce
        return compute(views, stimuli, temperature=0.1)


def compute_salient_loss(
    views: Tensor,
    background: Tensor,
    *,
    n_common: int,
    constant_weight: float = 1.0,
    independence_weight: float = 1.0,
    scale: bool = False,
) -> Tensor:
    """Return the sum of four terms over common parts c (unit length) and salient parts s (as they are).

    - common: alignment ``mean |c_1 - c_v|^2`` of the views of the responses, plus twice the uniformity of the common
      parts of responses and background together;
    - salient: the same alignment of s for the responses, plus twice the uniformity of s with the background's set to
      zero;
    - constant: mean squared length of the background's s;
    - independence: ``mean_i log mean_j k(c_i, c_j) k(s_i, s_j)`` with the background's s set to zero, the negative of
      a kernel estimate of the joint entropy.

    Uniformity is ``log mean_{i<j} k(x_i, x_j)`` and the kernel ``k(x, y) = exp(-|x - y|^2 / (2 * 0.5))``.

    Parameters
    ----------
    views : tensor of shape (n_views, n, d)
        Two or more outputs for the responses.
    background : tensor of shape (n_background, d)
        Outputs for the background.
    n_common
        How many of the d features, from the first, are common.
    constant_weight, independence_weight
        Factors of the last two terms; those of the first two are 1.
    scale
        Divide the salient parts of responses and background by the root mean square length of those of the responses,
        which has no gradient: the bandwidth and the weights then mean the same for outputs of any size.
    """
    if views.ndim != 3 or len(views) < 2 or background.shape[1:] != views.shape[2:] or len(background) == 0:
        raise DataError(
            "the salient objective needs two or more views of the responses and background of as many features, but "
            f"got views of shape {tuple(views.shape)} and background of shape {tuple(background.shape)}."
        )
    if not 0 < n_common < views.shape[-1]:
        raise ConfigError(
            f"the salient objective uses {n_common} of {views.shape[-1]} features as common features: "
            "leave some for each part."
        )
    views, background = upcast(views), upcast(background)
    common, salient = normalise(views[..., :n_common]), views[..., n_common:]
    background_common, background_salient = normalise(background[:, :n_common]), background[:, n_common:]
    if scale:
        length = salient.detach().square().sum(-1).mean().sqrt().clamp_min(1e-6)
        salient, background_salient = salient / length, background_salient / length

    def average(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    aligned_common = (common[1:] - common[:1]).square().sum(-1).mean()  # views against the first
    aligned_salient = (salient[1:] - salient[:1]).square().sum(-1).mean()
    # Terms of each view of the responses with the background; averaged below.
    uniform_common, uniform_salient, joint = [], [], []
    for view_common, view_salient in zip(common, salient, strict=True):
        all_common = compute_log_kernel(torch.cat([view_common, background_common]), _TAU)
        all_salient = compute_log_kernel(
            torch.cat([view_salient, torch.zeros_like(background_salient)]), _TAU
        )
        uniform_common.append(_compute_log_mean_off_diagonal(all_common))
        uniform_salient.append(_compute_log_mean_off_diagonal(all_salient))
        joint.append(((all_common + all_salient).logsumexp(-1) - math.log(len(all_common))).mean())
    common_term = aligned_common + 2 * average(uniform_common)
    salient_term = aligned_salient + 2 * average(uniform_salient)
    # Before the stimulus nothing is salient: those outputs should be zero.
    constant_term = background_salient.square().sum(-1).mean()
    return common_term + salient_term + constant_weight * constant_term + independence_weight * average(joint)


def compute_log_kernel(vectors: Tensor, bandwidth: float) -> Tensor:
    """Return ``-|x_i - x_j|^2 / (2 * bandwidth)`` for all pairs, shape (n, n).

    Parameters
    ----------
    vectors : tensor of shape (n, d)
    bandwidth
        Scale of the squared distance.
    """
    # Distances do not change by centring, but their rounding does where vectors share a large offset.
    centred = vectors - vectors.mean(0)
    lengths = centred.square().sum(-1)
    distances = (lengths[:, None] + lengths[None, :] - 2 * multiply(centred, centred)).clamp_min(0.0)
    return -distances / (2 * bandwidth)


def _compute_log_mean_off_diagonal(exponents: Tensor) -> Tensor:
    n = len(exponents)
    diagonal = torch.eye(n, dtype=torch.bool, device=exponents.device)
    return exponents.masked_fill(diagonal, -math.inf).flatten().logsumexp(0) - math.log(n * (n - 1))


class SalientTerm(nn.Module):
    """`compute_salient_loss` of the trials, their other views and their background."""

    def __init__(self, **options: float | bool) -> None:
        super().__init__()
        self.options = options

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step."""
        assert outputs.brain_views is not None
        assert outputs.background is not None
        views = torch.cat([outputs.brain[None], outputs.brain_views])  # (n_views, n, d)
        n_common = round(0.5 * views.shape[-1])
        return compute_salient_loss(views, outputs.background, n_common=n_common, **self.options)  # type: ignore[arg-type]
