"""The settings of the diffusion priors; importable without torch. The priors themselves are in `diffusion`.

A prediction that minimises a squared error is a conditional mean, shorter and smoother than any image's embedding; the
prior turns it into a draw from the images that it may stand for.

Departures from ATM's released code: the condition is dropped for every sample on its own and not for
whole batches; targets have unit variance in every dimension and not in sum; the prior learns from out-of-fold
predictions, as uncertain as those of test trials; the weights are a moving average and may be chosen on held-out
training images.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721; Ramesh et al. (2022), DALL-E 2, arXiv:2204.06125; Scotti et al. (2024),
MindEye2, arXiv:2403.11207; Salimans and Ho (2022), v-prediction, arXiv:2202.00512.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.contracts import PriorSettings
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.settings import DeviceSettings
from braindecode_vis.generation.priors.image_source import ImageSourceSettings
from braindecode_vis.generation.priors.sampling import NoiseSchedule, Prediction, Sampler, Spacing
from braindecode_vis.training.objectives.objectives_config import ObjectiveConfig

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.generation.priors.diffusion import DiffusionPrior, JointPrior


Width = Annotated[int, Field(ge=1)]


class DiffusionPriorConfig(ImageSourceSettings, DeviceSettings):
    """A diffusion model over image embeddings, conditioned on predicted ones.

    Parameters
    ----------
    images
        Where the images come from; see `ImageSourceSettings`. With ``condition: predicted`` they give only the scale.
    network
        ``mlp`` is ATM's U-Net on one vector, ``transformer`` attends over tokens; ``auto`` takes the one of these that
        the target's shape asks for. ``mindeye2`` is the transformer of MindEye2's code, of the target's own width.
    widths, time_features, dropout
        Widths of the U-Net's levels, size of the time code, dropout in the blocks but the first (ATM: 1024 to 64, 512,
        0.1).
    heads
        Attention heads of the transformer, which has 6 layers of the target's own width (MindEye2: 32).
    condition
        ``predicted`` learns from out-of-fold predictions and their targets. ``noised_targets`` learns from all training
        images, each with a simulated prediction: gains and noise are those of the out-of-fold pairs.
        ``simulated`` learns from images alone, each seen through an encoder drawn at random, and needs no predictions.
        See `simulated_predictions` for both.
    n_components
        Principal components of the images that ``simulated`` draws; the others have the value of the mean image.
    prediction, betas, timesteps
        What the network predicts, and the noise schedule (ATM: epsilon, linear, 1000; MindEye2: sample,
        squaredcos_cap_v2, 100).
    learning_rate, warmup_steps, batch_size, epochs
        Training by Adam, without weight decay, at gradients of length 1 at most (ATM: 1e-3, cosine with 500 steps of
        warm-up, 1024, 150).
    min_steps
        Minimum number of steps: small data sets with few steps per epoch are trained for more epochs. Our choice.
    ema_decay
        Decay of the moving average of the weights per step. Our choice.
    held_out
        Share of the training images kept aside; the weights of the epoch with the lowest loss on their predictions
        are taken. 0 takes the last epoch, as ATM does.
    sampler, steps, guidance
        How samples are drawn (ATM: ddpm, 50, 5; MindEye2: stochastic-ddim, 20, 1). A guidance above 1 moves samples
        toward the condition and away from the true distribution of images.
    spacing
        Which steps of the schedule are sampled: ``trailing`` begins with pure noise; ``leading`` a piece before, as ATM
        does, which takes the default scheduler of diffusers.
    clip
        Limit for the clean embedding of each step: the range of the training ``images``, or ``unit``, -1 to 1 in every
        dimension of the embedding, as in ATM by the same default.
    select, candidates
        ``none`` keeps every draw. ``best_of`` draws `candidates` for each and keeps the one whose direction is nearest
        to the prediction's, ``mean`` averages them; these are different protocols and `describe_choices` names them.
    pull
        How far a prediction's direction moves toward the sample's: 1 gives the sample itself, as ATM does. Less keeps
        more of the differences between predictions; the length is then the average length of images.
    restandardise
        Shift and scale samples so that, for out-of-fold predictions of training trials, they have the mean and spread
        of the training targets in every dimension. Test predictions never enter.
    precision
        ``bfloat16`` uses it for the training where this is safe.
    """

    packages: ClassVar[tuple[str, ...]] = ("diffusers",)

    kind: Literal["diffusion"] = "diffusion"
    network: Literal["auto", "mlp", "transformer", "mindeye2"] = "auto"
    widths: Annotated[tuple[Width, ...], Field(min_length=2)] = (1024, 512, 256, 128, 64)
    time_features: int = Field(default=512, ge=2, multiple_of=2)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    heads: int = Field(default=8, ge=1)
    condition: Literal["predicted", "noised_targets", "simulated"] = "predicted"
    n_components: int = Field(default=64, ge=1)
    prediction: Prediction = "epsilon"
    betas: Literal["linear", "squaredcos_cap_v2"] = "linear"
    timesteps: int = Field(default=1000, ge=10)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=500, ge=0)
    batch_size: int = Field(default=1024, ge=1)
    epochs: int = Field(default=150, ge=1)
    min_steps: int = Field(default=2000, ge=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    held_out: float = Field(default=0.1, ge=0, lt=1)
    sampler: Sampler = "ddpm"
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=5.0, ge=0)
    spacing: Spacing = "trailing"
    clip: Literal["images", "unit"] = "images"
    select: Literal["none", "best_of", "mean"] = "none"
    candidates: int = Field(default=16, ge=2)
    pull: float = Field(default=1.0, gt=0, le=1)
    restandardise: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"

    depth: ClassVar[int] = 6
    weight_decay: ClassVar[float] = 0.0
    gradient_clip: ClassVar[float] = 1.0
    #: Epochs between checkpoints.
    checkpoint_every: ClassVar[int] = 10
    #: Share of samples that learn without their condition (ATM 0.1, there for whole batches).
    condition_dropout: ClassVar[float] = 0.1
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "depth", "weight_decay", "gradient_clip", "checkpoint_every", "condition_dropout",
    })  # fmt: skip
    removed_settings: ClassVar[Mapping[str, Any]] = {"token_width": None}

    not_hashed: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "device"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"spacing", "clip"})

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.steps > self.timesteps:
            raise ValueError(
                f"prior.steps is {self.steps}, more than the {self.timesteps} of prior.timesteps"
            )
        return self

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.select == "none":
            self.refuse_unused("candidates", because="select none keeps every draw")
        if self.network == "mindeye2":
            unused = ("widths", "time_features", "dropout")
            self.refuse_unused(*unused, because="network mindeye2 has the width of a token and no dropout")
        if self.sampler == "stochastic-ddim":
            self.refuse_unused("spacing", because="sampler stochastic-ddim has its own steps")
            if self.steps < 2:
                raise ValueError("prior.sampler stochastic-ddim needs prior.steps of 2 or more")
        if self.clip == "unit" and self.condition == "simulated":
            raise ValueError(
                "prior.clip unit applies to single dimensions, but prior.condition simulated draws "
                "principal components; leave clip out"
            )
        if self.condition != "simulated":
            self.refuse_unused("n_components", because="only condition simulated draws components")
        return self

    def describe_choices(self) -> list[str]:
        """Return what makes its embeddings others than one draw."""
        words = []
        if self.select != "none":
            words.append(f"images from the {self.select.removesuffix('_of')} of {self.candidates} draws")
        if self.pull < 1:
            words.append(f"images from embeddings {100 * self.pull:g} % of the way to the prior's")
        return words

    @property
    def needs_predictions(self) -> bool:  # type: ignore[override]
        """Whether it learns from out-of-fold predictions."""
        return self.condition != "simulated"

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return NoiseSchedule(self.timesteps, self.betas, self.prediction, self.spacing)

    def build(self, *, seed: int = 0) -> DiffusionPrior:
        """Return the unfitted prior."""
        from braindecode_vis.generation.priors.diffusion import DiffusionPrior, Drawing
        from braindecode_vis.generation.priors.diffusion_networks import build_prior_network
        from braindecode_vis.generation.priors.prior_training import PriorRecipe

        make_network = partial(
            build_prior_network, kind=self.network, widths=self.widths, time_features=self.time_features,
            dropout=self.dropout, depth=self.depth, heads=self.heads,
        )  # fmt: skip
        recipe = PriorRecipe(
            self.schedule, self.batch_size, self.epochs, self.min_steps, self.learning_rate, self.warmup_steps,
            self.weight_decay, self.gradient_clip, self.condition_dropout, self.ema_decay,
            derive_seed(seed, "prior", "training"),
        )  # fmt: skip
        drawing = Drawing(self.sampler, self.steps, self.guidance, self.select, self.candidates, self.pull)
        return DiffusionPrior(self, make_network, recipe, drawing, seed=seed)


# --- trained with the brain encoder ----------------------------------------------------------------------------
# The settings of a diffusion prior that is trained with the brain encoder, as in MindEye2.
#
# Two parts belong together. The objective `diffusion_prior` trains the prior's network beside the other objectives,
# one update for both, so that its loss shapes the brain encoder too. The prior `joint_diffusion` takes that network
# from the fitted encoder and samples; it learns nothing itself.
#
# A prior trained so sees predictions of the very trials that the encoder learns from, which are better than those of
# test trials. Priors that are trained afterwards, on predictions out of fold, stand above.
#
# References: Scotti et al. (2024), MindEye2, arXiv:2403.11207; Ramesh et al. (2022), DALL-E 2, arXiv:2204.06125.


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
        from braindecode_vis.generation.priors.diffusion import DiffusionPriorTerm

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
        from braindecode_vis.generation.priors.diffusion import JointPrior

        return JointPrior(self)
