"""The settings of a diffusion prior that is trained with the brain encoder, as in MindEye2; importable without torch.

Two parts belong together. The objective `diffusion_prior` trains the prior's network beside the other objectives, one
update for both, so that its loss shapes the brain encoder too. The prior `joint_diffusion` takes that network from the
fitted encoder and samples; it learns nothing itself. Their code is in `joint`.

A prior trained so sees predictions of the very trials that the encoder learns from, which are better than those of
test trials. Priors that are trained afterwards, on predictions out of fold, are in `diffusion_config`.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207; Ramesh et al. (2022), DALL-E 2, arXiv:2204.06125.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import PriorSettings
from braindecode_vis.generation.priors.sampling import NoiseSchedule
from braindecode_vis.training.objectives.objectives_config import ObjectiveConfig

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.generation.priors.joint import JointPrior

UNTRAINED_PRIOR = (
    "prior.kind joint_diffusion samples with a network that the brain encoder trains, but this encoder "
    "trains none; add {kind: diffusion_prior} to encoder.objectives of a network, or set prior.kind to diffusion"
)


class DiffusionPriorObjectiveConfig(ObjectiveConfig):
    """The loss of MindEye2's prior: mean squared error of the clean target embedding, from a noised one.

    The condition is the regression output of the network, and the gradient flows into it: for a network with ``heads:
    two``, the output before the projector. Targets are not scaled. Steps are drawn uniformly from a cosine schedule.

    Parameters
    ----------
    weight
        30 in MindEye2, beside a contrast of weight 1.
    """

    packages: ClassVar[tuple[str, ...]] = ("diffusers",)

    kind: Literal["diffusion_prior"] = "diffusion_prior"
    weight: float = Field(default=30.0, gt=0)

    #: Layers, attention heads and features of a head (MindEye2: 6, 32 and 52 for tokens of 1664).
    depth: ClassVar[int] = 6
    heads: ClassVar[int] = 32
    head_width: ClassVar[int] = 52
    #: Steps of the schedule (100).
    timesteps: ClassVar[int] = 100
    #: Chance of each trial to lose its condition, and by another draw what was noised (0.2).
    condition_dropout: ClassVar[float] = 0.2
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "depth", "heads", "head_width", "timesteps", "condition_dropout",
    })  # fmt: skip

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return NoiseSchedule(self.timesteps, "squaredcos_cap_v2", "sample")

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss; its network is made when the shape of a target is known."""
        from braindecode_vis.generation.priors.joint import DiffusionPriorTerm

        return DiffusionPriorTerm(self)


class JointPriorConfig(PriorSettings):
    """Sample with the prior that the brain encoder has trained by its objective `diffusion_prior`, as MindEye2 does.

    DDIM with as much noise as DDPM (eta 1), without guidance; samples are used directly, without clipping or scaling.

    Parameters
    ----------
    steps
        Steps of the sampler, fewer than the schedule has (MindEye2: 20 of 100, which are 19 calls of the network).
    """

    kind: Literal["joint_diffusion"] = "joint_diffusion"
    steps: int = Field(default=20, ge=2)

    needs_predictions: ClassVar[bool] = False
    asks_trained_prior: ClassVar[bool] = True
    #: The message where the brain encoder has trained no prior.
    untrained: ClassVar[str] = UNTRAINED_PRIOR

    def build(self, *, seed: int = 0) -> JointPrior:
        """Return the prior without its network; nothing is drawn before `sample`, which has a seed of its own."""
        from braindecode_vis.generation.priors.joint import JointPrior

        return JointPrior(self)

    def read(self, folder: Path) -> JointPrior:
        """Return the prior that was written into `folder`."""
        return self.build().read(folder)
