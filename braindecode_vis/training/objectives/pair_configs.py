"""Settings of the objectives that compare a trial's output with its own target: contrasts and regressions.

Imports no torch; `build` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.training.objectives.base import Duplicates, ObjectiveConfig, Share, Temperature

if TYPE_CHECKING:
    from torch import nn


class ScaleSettings(ObjectiveConfig):
    """Settings of every contrast with CLIP's logits.

    Parameters
    ----------
    scale
        How the parameter becomes the factor of the similarities: ``exp``, at most `max_scale` (CLIP, NICE, ATM), or
        ``softplus`` (UBP, NeuroBridge). The parameter starts at ``ln(1 / temperature)`` for both.
    temperature
        0.07 as in CLIP; 1 with ``exp`` and not learned is no temperature.
    learn_temperature
        Whether the parameter is trained.
    max_scale
        Bound of ``exp``; 100 as in CLIP.
    symmetric
        Both directions; otherwise brain to image alone.
    duplicates
        What other trials of the same image in a batch are: ``positive`` (share the target, a choice of ours), ``mask``
        (left out) or ``negative`` (as published).
    normalise_brain, normalise_image
        Whether that side is brought to unit length.
    """

    scale: Literal["exp", "softplus"] = "exp"
    temperature: Temperature = 0.07
    learn_temperature: bool = True
    max_scale: float = Field(default=100.0, gt=0)
    symmetric: bool = True
    duplicates: Duplicates = "positive"
    normalise_brain: bool = True
    normalise_image: bool = True

    def clip_options(self) -> dict[str, Any]:
        """Return the options that `compute_clip_loss` takes besides the scale."""
        return {
            "symmetric": self.symmetric, "duplicates": self.duplicates,
            "normalise_brain": self.normalise_brain, "normalise_image": self.normalise_image,
        }  # fmt: skip


class ClipObjectiveConfig(ScaleSettings):
    """Contrast of brain and image; see `ScaleSettings` for the settings of the published variants."""

    kind: Literal["clip"] = "clip"

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.clip import ClipTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, ClipTerm(self))


class ClipImageTextObjectiveConfig(ScaleSettings):
    """ATM's mix of an image term and a text term with one scale; concepts play the part of stimuli in the latter.

    Parameters
    ----------
    image_share
        Weight of the image term, the text term has the rest; 0.99 in ATM's retrieval.
    """

    kind: Literal["clip_image_text"] = "clip_image_text"
    image_share: Share = 0.99

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.clip import ClipImageTextTerm
        from braindecode_vis.training.objectives.modules import Objective

        return Objective(self, ClipImageTextTerm(self))


class SiglipObjectiveConfig(ObjectiveConfig):
    """Sigmoid loss over all pairs of the batch.

    Parameters
    ----------
    scale, bias
        Start of factor (trained as its logarithm) and offset; 10 and -10 as in SigLIP.
    learn
        Whether both are trained.
    duplicates
        What further pairs of the same image are: matches, left out, or no matches.
    duplicate_cosine
        Images at least as similar as this count as the same; 0.999 as in NeuralBench. Not used for ``negative``.
    normalise_brain, normalise_image
        Whether that side is brought to unit length.
    """

    kind: Literal["siglip"] = "siglip"
    scale: float = Field(default=10.0, gt=0)
    bias: float = -10.0
    learn: bool = True
    duplicates: Duplicates = "positive"
    duplicate_cosine: float = Field(default=0.999, gt=0)
    normalise_brain: bool = True
    normalise_image: bool = True

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.siglip import SiglipTerm

        return Objective(self, SiglipTerm(self))


class MseObjectiveConfig(ObjectiveConfig):
    """Mean squared error of the regression head on the untouched target embedding."""

    kind: Literal["mse"] = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.regression import RegressionTerm

        return Objective(self, RegressionTerm(self))


class L1ObjectiveConfig(ObjectiveConfig):
    """Mean absolute error of the regression head on the untouched target embedding (ATM's low-level branch)."""

    kind: Literal["l1"] = "l1"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.regression import RegressionTerm

        return Objective(self, RegressionTerm(self))


class CosineObjectiveConfig(ObjectiveConfig):
    """One minus the cosine of the regression head's output and the untouched target embedding."""

    kind: Literal["cosine"] = "cosine"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.regression import RegressionTerm

        return Objective(self, RegressionTerm(self))


class SoftClipObjectiveConfig(ObjectiveConfig):
    """Contrast whose targets are the similarities of the images among themselves (MindEye).

    Parameters
    ----------
    temperature_start, temperature_end
        Annealed along half a cosine over the phase; 0.004 to 0.0075 as in MindEye.
    """

    kind: Literal["soft_clip"] = "soft_clip"
    temperature_start: Temperature = 0.004
    temperature_end: Temperature = 0.0075

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.soft import SoftClipTerm

        return Objective(self, SoftClipTerm(self))


class BimixcoObjectiveConfig(ObjectiveConfig):
    """Contrast of mixed trials with the images of both parts (MindEye), over the first third of the training.

    The loop mixes: half of the batch, shares from Beta(0.15, 0.15) in MindEye.

    Parameters
    ----------
    temperature
        Fixed; 0.006 as in MindEye's code.
    duplicates
        What repeated images of either part in a batch are: they share its target, are left out, or are negatives.
    """

    kind: Literal["bimixco"] = "bimixco"
    phase: tuple[Share, Share] = (0.0, 0.33)
    temperature: Temperature = 0.006
    duplicates: Duplicates = "positive"

    needs: ClassVar[frozenset[str]] = frozenset({"mix"})

    def build(self) -> nn.Module:
        """Return the module."""
        from braindecode_vis.training.objectives.modules import Objective
        from braindecode_vis.training.objectives.soft import BimixcoTerm

        return Objective(self, BimixcoTerm(self))
