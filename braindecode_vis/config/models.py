"""The unions that are the registry, and the frozen model of a run over them.

A new component is one file plus one name in a union here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, TypeAdapter, model_validator

from braindecode_vis.analysis.registry import AnalysisUnion
from braindecode_vis.checks import ConfigError
from braindecode_vis.datasets.alljoined.alljoined1 import Alljoined1Config
from braindecode_vis.datasets.alljoined.alljoined16m import Alljoined16mConfig
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig
from braindecode_vis.datasets.bids.meeg_dataset import BidsMeegConfig
from braindecode_vis.datasets.bold5000.betas import Bold5000BetasConfig
from braindecode_vis.datasets.bold5000.raw import Bold5000Config
from braindecode_vis.datasets.digits69 import Digits69Config
from braindecode_vis.datasets.eeg_imagenet.dataset import EegImagenetConfig
from braindecode_vis.datasets.haxby_slices import HaxbySlicesConfig
from braindecode_vis.datasets.kamitani.deeprecon import DeepreconConfig
from braindecode_vis.datasets.kamitani.god import GodConfig
from braindecode_vis.datasets.muse_n170 import MuseN170Config
from braindecode_vis.datasets.nod import NodConfig
from braindecode_vis.datasets.nsd.dataset import NsdConfig
from braindecode_vis.datasets.nsd.imagery_dataset import NsdImageryConfig
from braindecode_vis.datasets.nsd.repacks import NsdRepackConfig
from braindecode_vis.datasets.nsd.timeseries import NsdTimeseriesConfig
from braindecode_vis.datasets.synthetic_digits import SyntheticDigitsConfig
from braindecode_vis.datasets.things_eeg1.dataset import ThingsEeg1Config
from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
from braindecode_vis.datasets.things_fmri.dataset import ThingsFmriConfig
from braindecode_vis.datasets.things_meg.dataset import ThingsMegConfig
from braindecode_vis.embeddings.concepts import ConceptTextConfig
from braindecode_vis.embeddings.degradations import ViewsConfig
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.embeddings.engineered import EngineeredConfig
from braindecode_vis.embeddings.latents import AutoencoderKLConfig, TinyAutoencoderConfig
from braindecode_vis.embeddings.layer_fusion import LayersConfig
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.pixels import PcaConfig, PixelsConfig
from braindecode_vis.embeddings.timm_models import TimmConfig
from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig
from braindecode_vis.embeddings.transformers_models import TransformersConfig
from braindecode_vis.encoders.category_decoders import LdaConfig, LogisticConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.generators.image_fusion import ImageFusionConfig
from braindecode_vis.generators.inversion import LatentsConfig
from braindecode_vis.generators.latent_diffusion import LatentDiffusionConfig
from braindecode_vis.generators.nearest import NearestConfig
from braindecode_vis.generators.refiner import RefinerConfig
from braindecode_vis.generators.sdxl_turbo import SdxlTurboConfig
from braindecode_vis.generators.token_unclip import TokenUnclipConfig
from braindecode_vis.generators.unclip import KandinskyConfig, UnclipConfig
from braindecode_vis.metrics.protocols import ProtocolName
from braindecode_vis.metrics.suite import MetricSuiteConfig
from braindecode_vis.preprocessing.selection import SelectionConfig
from braindecode_vis.preprocessing.splits import PublishedSplitConfig, SplitConfig
from braindecode_vis.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.priors.identity import IdentityPriorConfig
from braindecode_vis.priors.image_source import ImageSourceSettings
from braindecode_vis.priors.mean import MeanPriorConfig
from braindecode_vis.priors.neighbours import NeighboursPriorConfig
from braindecode_vis.priors.spread import SpreadPriorConfig
from braindecode_vis.scores.caption_scores import CaptionScoresConfig
from braindecode_vis.scores.response_scores import BrainScoresConfig, CeilingMeasure
from braindecode_vis.settings import Settings
from braindecode_vis.training.category_network import NetworkCategoriesConfig
from braindecode_vis.training.encoder import NetworkEncoderConfig
from braindecode_vis.training.pretrain import PretrainConfig

DatasetConfig = Annotated[
    Alljoined1Config
    | Alljoined16mConfig
    | BidsFmriConfig
    | BidsMeegConfig
    | Bold5000Config
    | Bold5000BetasConfig
    | DeepreconConfig
    | Digits69Config
    | EegImagenetConfig
    | GodConfig
    | HaxbySlicesConfig
    | MuseN170Config
    | NodConfig
    | NsdConfig
    | NsdImageryConfig
    | NsdRepackConfig
    | NsdTimeseriesConfig
    | SyntheticDigitsConfig
    | ThingsEeg1Config
    | ThingsEeg2Config
    | ThingsFmriConfig
    | ThingsMegConfig,
    Field(discriminator="kind"),
]
ImageEncoderConfig = Annotated[
    PixelsConfig
    | PcaConfig
    | EfficientNetConfig
    | OpenClipConfig
    | TimmConfig
    | TorchvisionConfig
    | TransformersConfig
    | EngineeredConfig
    | LayersConfig
    | AutoencoderKLConfig
    | TinyAutoencoderConfig
    | ViewsConfig,
    Field(discriminator="kind"),
]
BrainEncoderConfig = Annotated[
    RidgeConfig | NetworkEncoderConfig | LdaConfig | LogisticConfig | NetworkCategoriesConfig,
    Field(discriminator="kind"),
]
PriorConfig = Annotated[
    IdentityPriorConfig | MeanPriorConfig | SpreadPriorConfig | NeighboursPriorConfig | DiffusionPriorConfig,
    Field(discriminator="kind"),
]
CATEGORY_DECODERS = ("lda", "logistic", "network_categories")
GeneratorConfig = Annotated[
    LatentsConfig
    | NearestConfig
    | RefinerConfig
    | LatentDiffusionConfig
    | SdxlTurboConfig
    | UnclipConfig
    | KandinskyConfig
    | TokenUnclipConfig,
    Field(discriminator="kind"),
]


class RetrievalConfig(Settings):
    """How predictions are searched in a gallery.

    Parameters
    ----------
    gallery
        ``fold`` ranks each query among the test images of its own fold; ``all`` among the test images of all
        folds, which needs a space that the folds share. ``auto`` takes ``all`` where it can.
    centre
        What is taken off every embedding before the cosine: the ``mean`` of the training images' embeddings, their
        mean and spread (``zscore``), or nothing (``none``, as the papers do that train with the same cosine).
    n_top
        How many of the best candidates are kept per query.
    device
        Where the similarity runs; does not enter the fingerprint.
    """

    gallery: Literal["auto", "fold", "all"] = "auto"
    centre: Literal["mean", "zscore", "none"] = "mean"
    n_top: int = Field(default=5, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})


class RepeatsConfig(Settings):
    """Whether the repetitions of an image are averaged before the brain encoder sees them.

    Parameters
    ----------
    train, test
        ``averaged`` gives one trial per subject and image, ``single`` keeps every trial.
    """

    train: Literal["averaged", "single"] = "averaged"
    test: Literal["averaged", "single"] = "averaged"


class LowLevelConfig(Settings):
    """A second way from brain to image, for colour and layout.

    Parameters
    ----------
    target
        Latents that are predicted: a target of kind ``taesd`` or ``vae``.
    encoder
        The brain encoder that predicts them.
    fusion
        How its images and those of the generator become one.
    """

    #: Objectives that learn latents with their scale, without which they are no images.
    with_scale: ClassVar[frozenset[str]] = frozenset({"l1", "mse"})

    target: AutoencoderKLConfig | TinyAutoencoderConfig = Field(discriminator="kind")
    encoder: Annotated[RidgeConfig | NetworkEncoderConfig, Field(discriminator="kind")] = RidgeConfig()
    fusion: ImageFusionConfig = ImageFusionConfig()

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.encoder.kind == "network":
            self.encoder.refuse_unused("out_of_fold", because="nothing learns from predictions of the branch")
            kinds = [objective.kind for objective in self.encoder.objectives]
            if not self.with_scale.intersection(kinds):
                raise ValueError(
                    f"encoder.objectives {', '.join(kinds)} say nothing of the scale of latents, so that they cannot "
                    "be decoded; add l1 (as ATM does) or mse"
                )
            if self.encoder.network.kind == "latent_decoder":
                try:
                    self.encoder.network.plan(math.prod(self.target.build().latent_shape))
                except ConfigError as error:
                    raise ValueError(f"encoder: {str(error).rstrip('.')}") from error
        return self


class ReconstructionConfig(Settings):
    """How many images are made of each trial, and from what.

    Parameters
    ----------
    n_draws
        Images per trial, each from another draw of the prior. Scores are averaged over rounds of draws, never pooled.
    low_level
        A branch for colour and layout; none by default.
    """

    n_draws: int = Field(default=1, ge=1, le=64)
    low_level: LowLevelConfig | None = None


class EvaluationConfig(Settings):
    """How scores get their intervals and nulls.

    Parameters
    ----------
    n_bootstrap
        Resamples of the stimuli behind every interval.
    n_permutations
        Shuffles of the image labels behind every chance level and p-value.
    features
        Image encoder whose features are compared as well, beside the pixels; None compares pixels only.
    suite
        The networks in which published tables compare images; what lacks weights is said to be missing.
    best_of
        Score the best of several draws too, under names of its own.
    protocols
        Further galleries and tasks: concept templates, draws of 300, names by text and the like.
    conditions
        Columns of the trial table, such as ``task``, whose values are scored apart as well.
    captions
        Captions of reconstructions and of the nearest training image, compared with reference captions.
    brain
        A linear encoding model that says whether reconstructions explain the responses that were measured.
    noise_ceiling
        How the noise ceiling of the test responses is estimated, for the report and beside `brain`; None leaves it out.
    """

    n_bootstrap: int = Field(default=10_000, ge=100)
    n_permutations: int = Field(default=10_000, ge=100)
    features: ImageEncoderConfig | None = None
    suite: MetricSuiteConfig | None = None
    best_of: bool = False
    protocols: tuple[ProtocolName, ...] = ()
    conditions: tuple[str, ...] = ()
    captions: CaptionScoresConfig | None = None
    brain: BrainScoresConfig | None = None
    noise_ceiling: CeilingMeasure | None = None

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.features is not None and self.features.fitted_on_training_images:
            raise ValueError(
                f"evaluation.features compares images in a network of its own, and {self.features.kind} is fitted on "
                "training images; choose efficientnet-lite0 or another pretrained encoder"
            )
        return self


class RunConfig(Settings):
    """Everything that decides the result of a run.

    Parameters
    ----------
    name
        Name of the run; its folder is ``runs/<name>`` unless ``--out`` says otherwise.
    seed
        The one root seed.
    dataset, split, target, encoder, prior, generator
        The component of each role, by its ``kind``.
    pretrain
        How the whole-cortex encoder is pretrained without labels; only the verb ``pretrain`` looks at it.
    text
        How names of concepts become vectors, for objectives and scores that compare with text.
    selection
        Which columns of the responses the encoder sees; chosen by training trials.
    repeats, retrieval, reconstruction, evaluation
        Settings of the steps that have no components.
    analyses
        What the verb ``analyze`` does without ``--analysis``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    dataset: DatasetConfig
    split: SplitConfig = PublishedSplitConfig()
    selection: SelectionConfig = SelectionConfig()
    target: ImageEncoderConfig = PixelsConfig()
    encoder: BrainEncoderConfig = RidgeConfig()
    pretrain: PretrainConfig | None = None
    text: ConceptTextConfig = ConceptTextConfig()
    repeats: RepeatsConfig = RepeatsConfig()
    prior: PriorConfig = IdentityPriorConfig()
    generator: GeneratorConfig = LatentsConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    analyses: tuple[AnalysisUnion, ...] = ()

    @property
    def decodes_categories(self) -> bool:
        """Whether the encoder names a class instead of predicting an embedding."""
        return self.encoder.kind in CATEGORY_DECODERS

    @model_validator(mode="after")
    def _check_split_fits_encoder(self) -> Self:
        if self.decodes_categories != (self.split.kind == "leave_one_run_out"):
            raise ValueError(
                f"the encoder {self.encoder.kind!r} and the split {self.split.kind!r} do not go together: categories "
                f"are decoded by {', '.join(CATEGORY_DECODERS)} under split.kind leave_one_run_out, images by other "
                "encoders and splits"
            )
        return self

    @model_validator(mode="after")
    def _check_selection_fits_encoder(self) -> Self:
        if self.decodes_categories and not self.selection.is_empty:
            raise ValueError(
                f"selection chooses columns for encoders of images, and the encoder {self.encoder.kind!r} decodes "
                "categories from all columns; leave selection out, or choose with the settings of the data set"
            )
        return self

    @model_validator(mode="after")
    def _check_standardising_fits_split(self) -> Self:
        zscore = self.dataset.standardises()
        # Standardising precedes the split, with the trials that the data set itself declares as training.
        fits = {"kfold": ("none",), "leave_one_run_out": ("none", "run")}.get(self.split.kind, (zscore,))
        if zscore not in fits:
            raise ValueError(
                f"dataset.zscore {zscore!r} would standardise with trials that the split {self.split.kind!r} tests; "
                f"set dataset.zscore to {' or '.join(fits)}, or split.kind to published"
            )
        return self

    @model_validator(mode="after")
    def _check_whitening_fits_split(self) -> Self:
        # What is learnt before the split learns from the declared training trials.
        learnt = self.dataset.learns_before_split()
        if learnt and self.split.kind in ("kfold", "leave_one_run_out"):
            raise ValueError(
                f"dataset.{learnt[0]} would learn from trials that the split {self.split.kind!r} tests; "
                f"leave it out, or set split.kind to published"
            )
        return self

    @model_validator(mode="after")
    def _check_draws(self) -> Self:
        if self.evaluation.best_of and self.reconstruction.n_draws == 1:
            raise ValueError(
                "evaluation.best_of scores the best of several draws, and reconstruction.n_draws is 1; ask for more "
                "draws, or leave best_of out"
            )
        return self

    @model_validator(mode="after")
    def _check_low_level(self) -> Self:
        low = self.reconstruction.low_level
        if low is None:
            return self
        if self.decodes_categories:
            raise ValueError(
                f"reconstruction.low_level makes images, and the encoder {self.encoder.kind!r} decodes categories; "
                "leave it out"
            )
        try:
            low.fusion.check_generator(self.generator)
        except ConfigError as error:
            raise ValueError(f"reconstruction.{str(error).rstrip('.')}") from error
        return self

    @model_validator(mode="after")
    def _check_generator_knows_images(self) -> Self:
        wanted = isinstance(self.prior, ImageSourceSettings) and self.prior.images == "generator"
        if wanted and not getattr(self.generator, "knows_images", False):
            raise ValueError(
                f"prior.images is generator, and the generator {self.generator.kind!r} brings no images along; set "
                "prior.images to training or to a folder of embeddings, or generator.kind to latent_diffusion"
            )
        return self

    @model_validator(mode="after")
    def _check_generator_accepts_target(self) -> Self:
        if not self.generator.accepts(self.target.kind):
            raise ValueError(
                f"the generator {self.generator.kind!r} cannot turn embeddings of the target "
                f"{self.target.kind!r} into images; set generator.kind to nearest, or target.kind to pixels, pca, vae "
                "or taesd (generator latents), efficientnet-lite0 (latent_diffusion) or openclip (sdxl_turbo, unclip)"
            )
        return self


def list_kinds(role: str) -> list[str]:
    """Return the known kinds of a role (``dataset``, ``split``, ``target``, ``encoder``, ``prior``, ``generator``)."""
    annotation = RunConfig.model_fields[role].annotation
    members = get_args(annotation) or (annotation,)
    return [
        m.model_fields["kind"].default for m in members if isinstance(m, type) and issubclass(m, Settings)
    ]


def list_analyses() -> list[str]:
    """Return the known kinds of analyses."""
    return [m.model_fields["kind"].default for m in get_args(get_args(AnalysisUnion)[0])]


def make_analysis(kind: str) -> Any:
    """Return the configuration of one kind of analysis with its defaults."""
    return TypeAdapter(AnalysisUnion).validate_python({"kind": kind})
