"""Settings of the trained image side: weights of several layers, the view of an image, a tuned network.

Imports no torch; the modules are in `fusion`, `views` and `lora`.

References
----------
Hu et al. (2022), LoRA, arXiv:2106.09685. Wu et al. (2025), UBP, arXiv:2503.04207. SAMGA (2026), arXiv:2604.17782, and
its code, LinJiang8/SAMGA@1a63745.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.registry import Component
from braindecode_vis.base.settings import Settings

ViewChoice = Literal["mean", "sample", "uncertainty"]
TunableTarget = Annotated[Any, Component("target", only=("openclip", "timm"), outside=False)]


class LayerFusionConfig(Settings):
    """A learned weighted sum over the token axis of the targets, for example the layers of an image network.

    The weights are a softmax that starts uniform, or around `centre`. A layer of long vectors outweighs the others, so
    `normalise_targets` should bring the layers to one length (``l2``, then per layer) or spread (``zscore``), unless
    each is mapped first (`size`).

    Parameters
    ----------
    weights
        One set for all (``global``), one for each training subject (``per_subject``; unknown subjects get the mean of
        the sets), or SAMGA's router (``routed``): one set for all, to which training adds the bias of a subject.
        Predictions and galleries take the set for all, so that there is one gallery.
    lr_scale
        Factor of the learning rate for the logits, which have no weight decay. Logits of a softmax need steps of whole
        numbers, network weights of thousandths; 100 is a choice of ours, SAMGA has 1.
    size
        Each layer is mapped to this size by its own linear map before it is weighted (512 in SAMGA); None weights the
        layers directly.
    hidden
        Size of a linear map before that, which all layers share (1024 in SAMGA); None for no such map.
    centre
        Number of the layer, from 0, around which the weights start: its logit is 0, and each step away lowers the logit
        by 1. None starts with uniform weights. SAMGA takes the middle one of five.
    hide_subject
        Probability that a training trial is weighted without the bias of its subject, with ``routed`` (0.3 in SAMGA).
    """

    weights: Literal["global", "per_subject", "routed"] = "global"
    lr_scale: float = Field(default=100.0, gt=0)
    size: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    centre: int | None = Field(default=None, ge=0)
    hide_subject: float = Field(default=0.3, ge=0, le=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"size", "hidden", "centre", "hide_subject"})

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.size is None:
            self.refuse_unused("hidden", because="it comes before the maps to size, but size is not set")
        if self.weights != "routed":
            self.refuse_unused("hide_subject", because="only weights: routed has this bias")
        return self


class ImageTowerConfig(Settings):
    """Low-rank changes of the image network, learnt together with the brain encoder.

    Parameters
    ----------
    target
        The image network; it must be the same as the run's target, whose vectors are the start of the training.
    rank
        Rank of the change of each weight; 32 in the reproduction of LoRA-CLIP.
    alpha
        The change is multiplied by ``alpha / rank``; None is the rank itself, thus a factor of 1 (a choice of ours).
    layers
        Numbers of the blocks that change, from the end if negative; None is every block up to the layer that is read.
    modules
        Weights that change: those of the ``attention`` of a block, those of every linear map of it (``all``), or of
        every linear map of the ``tower``, which is a block's and the output projection behind the last one. Query, key
        and value of one matrix share one change, as they do in peft; with ``tower`` each has its own, as in LoRA-CLIP,
        whose network keeps them apart.
    start
        How A is drawn, while B is zero: ``kaiming`` as in the paper's code, ``gaussian`` of deviation ``1 / rank`` as
        in LoRA-CLIP (peft's option of that name).
    lr_scale
        Factor of the learning rate; published ratios are 0.1 to 0.2.
    images_together
        Number of images that pass through the network together. For a larger batch only the results are kept and the
        rest is computed again for the gradient, so that memory does not grow with the batch; the result is the same up
        to rounding.
    """

    target: TunableTarget
    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    modules: Literal["attention", "all", "tower"] = "attention"
    start: Literal["kaiming", "gaussian"] = "kaiming"
    lr_scale: float = Field(default=0.1, gt=0)
    images_together: int = Field(default=64, ge=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"start"})

    @field_validator("target", mode="before")
    @classmethod
    def _check_is_network(cls, target: Any) -> Any:
        kind = target.get("kind") if isinstance(target, dict) else getattr(target, "kind", None)
        if kind not in ("openclip", "timm"):
            raise ValueError(
                f"the target {kind!r} has no network that can be tuned; set encoder.image_tower.target and target to "
                "an openclip or timm network, or leave out encoder.image_tower"
            )
        return target

    @property
    def scale(self) -> float:
        """Factor of the low-rank product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
