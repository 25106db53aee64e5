"""Settings of what is learnt on the image side: the weights of several layers, the view of an image, a tuned network.

Imports no torch; the modules are in `fusion`, `views` and `lora`.

References
----------
Hu et al. (2022), LoRA, arXiv:2106.09685. Wu et al. (2025), UBP, arXiv:2503.04207.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from braindecode_vis.registry import Component
from braindecode_vis.settings import Settings

ViewChoice = Literal["mean", "sample", "uncertainty"]
TunableTarget = Annotated[Any, Component("target", only=("openclip", "timm"), outside=False)]


class LayerFusionConfig(Settings):
    """A learned weighted sum over the token axis of the targets, for example the layers of an image network.

    The weights are a softmax that starts uniform. A layer of long vectors outweighs the others, so `normalise_targets`
    should bring the layers to one length (``l2``, then per layer) or spread (``zscore``).

    Parameters
    ----------
    weights
        One set for all (``global``), or one for each training subject (``per_subject``); unknown subjects get the mean
        of the sets. Subject-aware weights are SAMGA's idea; a table of logits is our plainest form of it.
    lr_scale
        Factor of the learning rate for the logits, which are not decayed. A softmax moves by whole numbers, network
        weights by thousandths; 100 is a choice of ours.
    """

    weights: Literal["global", "per_subject"] = "global"
    lr_scale: float = Field(default=100.0, gt=0)


class ImageTowerConfig(Settings):
    """Low-rank changes of the image network, learnt together with the brain encoder.

    Parameters
    ----------
    target
        The image network; the very one that the run's target names, whose vectors are where the training starts.
    rank
        Rank of the change of each weight; 32 in the reproduction of LoRA-CLIP.
    alpha
        The change is multiplied by ``alpha / rank``; None is the rank itself, thus a factor of 1 (a choice of ours).
    layers
        Numbers of the blocks that change, from the end if negative; None is every block up to the layer that is read.
    modules
        Weights that change in a block: those of its ``attention``, or of every linear map (``all``). Query, key and
        value of one matrix share one change, as they do in peft.
    lr_scale
        Factor of the learning rate; published ratios are 0.1 to 0.2.
    images_together
        Images that pass the network at once. Of a larger batch only the results are kept and the rest is computed
        again for the gradient, so that memory does not grow with the batch; the result is the same but for rounding.
    """

    target: TunableTarget
    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    modules: Literal["attention", "all"] = "attention"
    lr_scale: float = Field(default=0.1, gt=0)
    images_together: int = Field(default=64, ge=1)

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
