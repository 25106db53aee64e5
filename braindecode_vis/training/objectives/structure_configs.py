"""Settings of the objectives that shape the space beyond the pair: gap, views, teacher, hard negatives, background.

Imports no torch; `build` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.training.objectives.base import Duplicates, ObjectiveConfig, Share, Temperature
from braindecode_vis.training.objectives.pair_configs import ScaleSettings

if TYPE_CHECKING:
    from torch import nn

View = Literal["brain", "image", "brain_views", "image_views"]


class AlignmentObjectiveConfig(ObjectiveConfig):
    """Mean squared distance between the unit vectors of brain and image."""

    kind: Literal["alignment"] = "alignment"

    contrastive: ClassVar[bool] = False

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.gap import AlignmentTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, AlignmentTerm(self))


class UniformityObjectiveConfig(ObjectiveConfig):
    """Spread over the sphere.

    Parameters
    ----------
    between
        Outputs of the ``brain``, of the ``image`` side, the mean of ``both``, or ``cross`` for brain against image. A
        frozen image side has no gradient.
    sharpness
        Factor of the squared distance; 2 as in the papers.
    duplicates
        Pairs of trials of the same image are left out (``mask``) or count like any other (``negative``).
    """

    kind: Literal["uniformity"] = "uniformity"
    between: Literal["brain", "image", "both", "cross"] = "both"
    sharpness: float = Field(default=2.0, gt=0)
    duplicates: Literal["mask", "negative"] = "mask"

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.gap import UniformityTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, UniformityTerm(self))


class CuaObjectiveConfig(ScaleSettings):
    """CLIP's contrast, alignment and uniformity with weights of 1 against the contrastive gap.

    Parameters
    ----------
    cross
        Add the uniformity between the sides (``L_CUAXU``).
    sharpness
        Factor of the squared distance in the uniformity; 2 as in the paper.
    """

    kind: Literal["cua"] = "cua"
    cross: bool = False
    sharpness: float = Field(default=2.0, gt=0)

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.gap import CuaTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, CuaTerm(self))


class MultiviewObjectiveConfig(ObjectiveConfig):
    """Contrast among all views at once.

    Parameters
    ----------
    form
        ``dhel`` (MV-DHEL, negatives within each view) or ``infonce`` (MV-InfoNCE).
    views
        Outputs that serve as views; `needs` follows from them.
    temperature
        Fixed; 0.1 is a choice of ours.
    negatives
        For ``infonce``: ``all`` others as in the released code, or those of ``other_views`` as its README says.
    duplicates
        Other trials of the same image are left out of the negatives (``mask``) or are ``negative``.
    """

    kind: Literal["multiview"] = "multiview"
    form: Literal["dhel", "infonce"] = "dhel"
    views: tuple[View, ...] = ("brain", "brain_views", "image")
    temperature: Temperature = 0.1
    negatives: Literal["all", "other_views"] = "all"
    duplicates: Literal["mask", "negative"] = "mask"

    @field_validator("views")
    @classmethod
    def _check_views(cls, views: tuple[View, ...]) -> tuple[View, ...]:
        if not views or len(set(views)) < len(views):
            raise ValueError(f"views must name at least one output, and each once, but are {list(views)}")
        return views

    # Which optional outputs it needs is a matter of its settings here.
    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Optional outputs among the views."""
        return frozenset(self.views) & {"brain_views", "image_views"}

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.multiview import MultiviewTerm

        return Objective(self, MultiviewTerm(self))


class MomentumSettings(ObjectiveConfig):
    """Settings of the objectives with a moving-average teacher; the loop owns its momentum and the queue's length.

    Parameters
    ----------
    temperature, learn_temperature, temperature_bounds
        Start, whether it is trained, and bounds: 0.07 in 0.001 to 0.5 as in ALBEF.
    alpha
        Share of the teacher's opinion in the targets; 0.4 as in ALBEF.
    alpha_ramp
        Share of the training over which alpha grows from zero. ALBEF: the first epoch, here one of thirty.
    duplicates
        What other trials of the same image in the batch are. The queue does not say what it shows: its entries
        always count as different.
    """

    temperature: Temperature = 0.07
    learn_temperature: bool = True
    temperature_bounds: tuple[Temperature, Temperature] = (0.001, 0.5)
    alpha: Share = 0.4
    alpha_ramp: Share = 0.033
    duplicates: Duplicates = "positive"

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        low, high = self.temperature_bounds
        if not low < high or not low <= self.temperature <= high:
            raise ValueError(
                f"temperature {self.temperature:g} must lie within its bounds {low:g} to {high:g}"
            )
        return self


class DistillationObjectiveConfig(MomentumSettings):
    """ALBEF's contrast with momentum distillation."""

    kind: Literal["distillation"] = "distillation"

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.momentum import DistillationTerm

        return Objective(self, DistillationTerm(self))


class TclObjectiveConfig(MomentumSettings):
    """ALBEF's contrast with TCL's terms within each side and TCL's local term of the brain side.

    Parameters
    ----------
    stop_tokens
        No gradient through the local outputs. TCL takes them from the teacher; here they are the network's own.
    """

    kind: Literal["tcl"] = "tcl"
    stop_tokens: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "brain_tokens"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.momentum import TclTerm

        return Objective(self, TclTerm(self))


class ClusterObjectiveConfig(ScaleSettings):
    """Contrast with negatives from the image's own cluster, for a later stage of MCL."""

    kind: Literal["within_cluster"] = "within_cluster"

    needs: ClassVar[frozenset[str]] = frozenset({"clusters"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.clusters import WithinGroupTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, WithinGroupTerm(self))


class ConceptObjectiveConfig(ScaleSettings):
    """Contrast with negatives from the image's own concept, the hardest there are."""

    kind: Literal["within_concept"] = "within_concept"

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.clusters import WithinGroupTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, WithinGroupTerm(self))


class SalientObjectiveConfig(ObjectiveConfig):
    """Separation of what the response shares with the time before the stimulus (SepCLR).

    Parameters
    ----------
    common_share
        Share of the features, from the first, that is the common part; half as in the authors' scripts.
    bandwidth
        Of the Gaussian kernel; 0.5 as in the authors' scripts.
    salient_weight, constant_weight, independence_weight
        Weights of the terms beside the common one. The authors' scripts use (1, 100, 10) for one data set and
        (1000, 1000, 10) for another; which suits brain responses is not known.
    """

    kind: Literal["salient"] = "salient"
    common_share: float = Field(default=0.5, gt=0, lt=1)
    bandwidth: float = Field(default=0.5, gt=0)
    salient_weight: float = Field(default=1.0, ge=0)
    constant_weight: float = Field(default=100.0, ge=0)
    independence_weight: float = Field(default=10.0, ge=0)

    needs: ClassVar[frozenset[str]] = frozenset({"brain_views", "background"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.salient import SalientTerm

        return Objective(self, SalientTerm(self))
