"""The frozen model of a run: a component for each role, settings of the steps that have none, and what fits together.

Components are found by `braindecode_vis.base.registry`; a new one is one file and one line there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, suggest
from braindecode_vis.base.contracts import Dataset, EncoderSettings, GeneratorSettings, PriorSettings
from braindecode_vis.base.parts import describe_missing
from braindecode_vis.base.registry import (
    Component,
    LayerConfig,
    find_component,
    list_inside,
    list_kinds,
    validate_component,
)
from braindecode_vis.base.remote import choose_cache
from braindecode_vis.base.roles import check_settings, complete, list_encoders
from braindecode_vis.base.settings import OUTSIDE, DeviceSettings, Settings
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.embeddings.compositions import CompositionConfig
from braindecode_vis.embeddings.image_descriptions import DescriptionsConfig
from braindecode_vis.embeddings.text import ConceptTextConfig
from braindecode_vis.encoders.encoding_model import EncodingModelConfig
from braindecode_vis.encoders.parcels_config import OWN_PRETRAINING
from braindecode_vis.generation.captions_config import CaptionsConfig
from braindecode_vis.generation.image_fusion import ImageFusionConfig
from braindecode_vis.generation.priors.diffusion_config import UNTRAINED_PRIOR
from braindecode_vis.generation.priors.neighbours import UNKNOWN_LIKELIHOOD
from braindecode_vis.preprocessing.common_space import COMMON_SPACES, name_alignment
from braindecode_vis.preprocessing.selection import SelectionConfig
from braindecode_vis.scoring.caption_scores import CaptionScoresConfig
from braindecode_vis.scoring.gallery_scores import LargeGalleryConfig
from braindecode_vis.scoring.metrics.protocols import ProtocolName
from braindecode_vis.scoring.metrics.suite import MetricSuiteConfig
from braindecode_vis.scoring.response_scores import BrainScoresConfig, CeilingMeasure
from braindecode_vis.scoring.units import Resample
from braindecode_vis.training.pretraining_config import PretrainConfig


class RetrievalConfig(DeviceSettings):
    """How predictions are searched in a gallery.

    Parameters
    ----------
    gallery
        ``fold`` ranks each query among the test images of its own fold; ``all`` among the test images of all
        folds, which needs a space that the folds share. With folds of images, ``all`` holds what each fold was trained
        on, so that ranks lie below chance. ``auto`` takes ``fold`` where every fold tests five images or more, and else
        ``all`` where it can.
    centre
        What is taken off every embedding before the cosine: the ``mean`` of the training images' embeddings, their
        mean and spread (``zscore``), or nothing (``none``, as the papers do that train with the same cosine).
    n_top
        How many of the best candidates are kept per query.
    """

    gallery: Literal["auto", "fold", "all"] = "auto"
    centre: Literal["mean", "zscore", "none"] = "mean"
    n_top: int = Field(default=5, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})


class RepeatsConfig(Settings):
    """Whether the repetitions of an image are averaged before the brain encoder sees them.

    Parameters
    ----------
    train, test
        ``averaged`` gives one trial per subject and image, ``single`` keeps every trial. Categories are decoded trial
        by trial, whatever stands here.
    """

    train: Literal["averaged", "single"] = "averaged"
    test: Literal["averaged", "single"] = "averaged"


class SyntheticConfig(Settings):
    """Synthetic responses beside the real training trials: what an encoding model expects to images nobody was shown.

    The model is fitted on the training trials of the fold, without the images that a network holds out. Images that
    were shown are left out, and with them, where no tested concept is trained on, those of tested concepts.

    Parameters
    ----------
    images
        ``unseen`` for the data set's own images that no trial shows; a folder of pictures, tars, tables or HDF5 files;
        ``phantom:N`` (see ``embed --images``); or a finished bank of embeddings in the space of the target, where
        `features` is empty.
    share
        Share of synthetic trials in the training.
    noise
        ``residual`` adds noise with the covariance of what the model leaves of the training trials, ``none`` nothing.
    features
        Image encoders whose spaces the model regresses on; empty takes the target.
    model
        How spaces are put together, and penalties.
    """

    images: str = Field(min_length=1)
    share: float = Field(default=0.5, gt=0, lt=1)
    noise: Literal["residual", "none"] = "residual"
    features: tuple[LayerConfig, ...] = ()
    model: EncodingModelConfig = EncodingModelConfig()

    not_hashed: ClassVar[frozenset[str]] = frozenset({"images"})

    @field_validator("images")
    @classmethod
    def _make_absolute(cls, text: str) -> str:
        # A run folder is gone on with from anywhere.
        return (
            text if text == UNSEEN or text.startswith("phantom:") else str(Path(text).expanduser().absolute())
        )

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and a digest of the images, or the word that they are not at hand."""
        from braindecode_vis.embeddings.image_sources import digest_images

        try:
            digest = self.images if self.images == UNSEEN else digest_images(self.images)
        except DataError:  # a finished run is read without them
            digest = NOT_AT_HAND
        return {**super().hashed_fields(), "images_digest": digest}

    def check_files(self) -> None:
        """Raise `DataError` unless the images are there."""
        from braindecode_vis.embeddings.image_sources import digest_images

        if self.images != UNSEEN:
            digest_images(self.images)

    def describe(self) -> str:
        """Return in one clause what is added to the training, for the protocol."""
        source = self.images if self.images.startswith((UNSEEN, "phantom:")) else Path(self.images).name
        return (
            f"trained with {self.share:.0%} synthetic responses to images that were not shown ({source}; noise "
            f"{self.noise})"
        )


#: Word for the images of a data set that no trial shows, and the digest of images that are gone.
UNSEEN, NOT_AT_HAND = "unseen", "not at hand"
#: Kinds of branches that need no weights of a hub -> what they stand in for; run, rows and report say so.
STAND_INS = {
    "pca": "latents of a published autoencoder",
    "packaged_latents": "latents of a published autoencoder",
    "minilm": "image tokens of GIT",
}
#: Of branches: what is fitted again from the same pairs in a moment.
BRANCH_PRIORS = ("identity", "spread", "moments")


class LowLevelConfig(Settings):
    """A second way from brain to image, for colour and layout.

    Parameters
    ----------
    target
        What is predicted: latents of a published autoencoder (``taesd``, ``vae``), or a stand-in that needs no weights
        of a hub (``packaged_latents``; ``pca``, principal components of the training images). Run, rows and report name
        a stand-in as such.
    encoder
        The brain encoder that predicts them.
    prior
        What is done to its predictions before they are decoded.
    fusion
        How its images and those of the generator become one.
    """

    target: Annotated[
        Any, Component("target", only=("vae", "taesd", "pca", "packaged_latents"), outside=False)
    ]
    encoder: Annotated[Any, Component("encoder")] = Field(default={"kind": "ridge"})
    prior: Annotated[Any, Component("prior", only=BRANCH_PRIORS, outside=False)] = Field(
        default={"kind": "identity"}
    )
    fusion: ImageFusionConfig = ImageFusionConfig()

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields; runs that were made before there was a prior are still found."""
        fields = super().hashed_fields()
        return {
            name: value for name, value in fields.items() if name != "prior" or value != {"kind": "identity"}
        }

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        settings = complete(EncoderSettings, self.encoder)
        if settings.decodes_categories:
            raise ValueError(
                f"encoder {self.encoder.kind!r} names classes, and latents of images are wanted here"
            )
        try:
            settings.check_low_level(math.prod(self.target.build().latent_shape))
        except ConfigError as error:
            raise ValueError(f"encoder: {str(error).rstrip('.')}") from error
        return self


class TextBranchConfig(Settings):
    """A second way from brain to generator: the tokens of a text, for generators that are conditioned on two things.

    Parameters
    ----------
    target
        Tokens that are predicted: a target of kind ``clip_text``.
    encoder
        The brain encoder that predicts them.
    prior
        What is done to its predictions before the generator takes them.
    """

    target: Annotated[Any, Component("target", only=("clip_text",), outside=False)]
    encoder: Annotated[Any, Component("encoder")] = Field(default={"kind": "ridge"})
    prior: Annotated[Any, Component("prior", only=BRANCH_PRIORS, outside=False)] = Field(
        default={"kind": "identity"}
    )

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if complete(EncoderSettings, self.encoder).decodes_categories:
            raise ValueError(
                f"encoder {self.encoder.kind!r} names classes, and tokens of texts are wanted here"
            )
        return self


class ReconstructionConfig(Settings):
    """How many images are made of each trial, and from what.

    Parameters
    ----------
    n_draws
        Images per trial, each from another draw of the prior. Scores are averaged over rounds of draws, never pooled.
    low_level
        A branch for colour and layout; none by default.
    captions
        What decodes a caption of each trial: from its embedding, of the nearest training image, through GIT's image
        tokens or sentence vectors in their place, or by a decoder learnt from the captions of training images; from
        the response itself, by a brain encoder that has learnt to. They are scored where `evaluation.captions` is set.
    prompt
        The kind of `captions` whose text leads the image of its trial, for generators that read texts (ATM's caption
        branch: ``git``).
    text
        A branch for the tokens of a text, which the generator takes beside the image embedding; none by default.
    """

    n_draws: int = Field(default=1, ge=1, le=64)
    low_level: LowLevelConfig | None = None
    captions: tuple[CaptionsConfig, ...] = ()
    prompt: Literal["nearest", "git", "minilm", "coca", "brain"] | None = None
    text: TextBranchConfig | None = None

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"captions", "prompt", "text"})

    @model_validator(mode="after")
    def _check_captions(self) -> Self:
        kinds = [each.kind for each in self.captions]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"captions has the kind {twice[0]!r} more than once; keep one of each")
        if self.prompt is not None and self.prompt not in kinds:
            raise ValueError(
                f"prompt is {self.prompt}, but captions decodes {', '.join(kinds) or 'none'}; add {{kind: "
                f"{self.prompt}, ...}} to captions, or leave prompt out"
            )
        return self

    def describe_stand_ins(self) -> str:
        """Return in one clause which branches do without weights of a hub, and in whose place; empty if none does.

        >>> ReconstructionConfig().describe_stand_ins()
        ''
        """
        used = [] if self.low_level is None else [("low level", self.low_level.target.kind)]
        used += [("captions", each.kind) for each in self.captions]
        words = [
            f"{branch} by {kind} in place of {STAND_INS[kind]}" for branch, kind in used if kind in STAND_INS
        ]
        return f"stand-ins: {', '.join(words)}" if words else ""


class EvaluationConfig(Settings):
    """How scores get their intervals and nulls.

    Parameters
    ----------
    n_bootstrap
        Resamples of the stimuli behind every interval.
    resample
        What intervals speak of others of: ``image``, ``trial``, ``group``, ``run``, ``session`` or ``subject``. With
        ``auto``, groups where the trial table has a column `group`, otherwise images, and trials where classes are
        decoded. With several subjects, of subjects as well; ``subject`` looks at nothing within them.
    n_permutations
        Shuffles of the image labels behind every chance level and p-value.
    features
        Image encoder whose features are compared as well, beside the pixels; None compares pixels only.
    suite
        The networks in which published tables compare images; what lacks weights is said to be missing.
    best_of
        Score the best of several draws too, under names of its own.
    metrics
        Further metrics of images or embeddings: ``correlation_distance`` and those from outside the package.
    protocols
        Further galleries and tasks: concept templates, draws of 300, names by text and the like. ``transductive`` lets
        the unlabelled test queries of each subject correct their own similarities (centring, standardising, CSLS,
        SATTC, SCORE); its rows have names of their own and are never the result of the run.
    gallery
        A bank of many more images (``embed --images``), among which the seen image is searched too.
    composition
        Pairs of texts, and of images, that have the same parts bound otherwise: what the protocol of this name tests.
    descriptions
        Captions or attributes of the tested images as a gallery of texts, beside that of the images, and both fused.
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
    features: Annotated[Any, Component("target")] | None = None
    suite: MetricSuiteConfig | None = None
    best_of: bool = False
    resample: Resample = "auto"
    metrics: tuple[Annotated[Any, Component("metric")], ...] = ()
    protocols: tuple[ProtocolName, ...] = ()
    gallery: LargeGalleryConfig | None = None
    composition: CompositionConfig | None = None
    descriptions: DescriptionsConfig | None = None
    conditions: tuple[str, ...] = ()
    captions: CaptionScoresConfig | None = None
    brain: BrainScoresConfig | None = None
    noise_ceiling: CeilingMeasure | None = None

    hashed_if_set: ClassVar[frozenset[str]] = frozenset(
        {"gallery", "composition", "descriptions", "metrics", "resample"}
    )

    @model_validator(mode="after")
    def _check_composition(self) -> Self:
        if ("composition" in self.protocols) != (self.composition is not None):
            raise ValueError(
                "the protocol composition needs the tests that composition.file names, and these need the protocol; "
                "give both or none of evaluation.protocols: [composition] and evaluation.composition"
            )
        return self

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.features is not None and self.features.fitted_on_training_images:
            raise ValueError(
                f"evaluation.features compares images in a network of its own, and {self.features.kind} is fitted on "
                "training images; choose efficientnet-lite0 or another pretrained encoder"
            )
        return self


class RemoteConfig(Settings):
    """Where files are kept that come from an address such as ``s3://bucket/folder``; it changes no result.

    Parameters
    ----------
    cache
        Folder of the cache, which several runs may share; ``$BRAINDECODE_VIS_REMOTE_CACHE``, or ``remote`` in the
        user's cache, by default.
    limit_gib
        What the cache may hold, in GiB: the files that were used longest ago are removed for new ones.
        ``$BRAINDECODE_VIS_REMOTE_GIB``, or 50, by default.
    """

    cache: Path | None = None
    limit_gib: float | None = Field(default=None, gt=0, le=1e8)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"cache", "limit_gib"})


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
        How the whole-cortex encoder is pretrained without labels: by the verb ``pretrain``, and where
        ``encoder.network.pretrained`` is the word ``pretrain``, by the run itself before it trains.
    text
        How names of concepts become vectors, for objectives and scores that compare with text.
    selection
        Which channels, times or voxels of the responses the encoder sees; chosen by training trials.
    repeats, retrieval, reconstruction, evaluation
        Settings of the steps that have no components.
    synthetic
        Synthetic responses that are added to the training; none by default.
    analyses
        What the verb ``analyze`` does without ``--analysis``.
    encode
        How the verb ``encode`` predicts responses from images; only that verb looks at it.
    run_analyses
        Make the analyses with the run too, before its report.
    cluster
        What jobs ask for, where a verb is given ``--cluster``.
    remote
        How files on servers are kept, where a path is an address.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    dataset: Annotated[Any, Component("dataset")]
    split: Annotated[Any, Component("split")] = Field(default={"kind": "published"})
    selection: SelectionConfig = SelectionConfig()
    target: Annotated[Any, Component("target")] = Field(default={"kind": "pixels"})
    encoder: Annotated[Any, Component("encoder")] = Field(default={"kind": "ridge"})
    pretrain: PretrainConfig | None = None
    text: ConceptTextConfig = ConceptTextConfig()
    repeats: RepeatsConfig = RepeatsConfig()
    prior: Annotated[Any, Component("prior")] = Field(default={"kind": "identity"})
    generator: Annotated[Any, Component("generator")] = Field(default={"kind": "latents"})
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    synthetic: SyntheticConfig | None = None
    encode: Annotated[Any, Component("analysis", only=("encoding",), outside=False)] | None = None
    analyses: tuple[Annotated[Any, Component("analysis")], ...] = ()
    run_analyses: bool = False
    # Never written out: what a run folder holds is the same wherever it was computed.
    cluster: ClusterConfig | None = Field(default=None, exclude=True)
    remote: RemoteConfig | None = Field(default=None, exclude=True)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"run_analyses", "cluster", "remote"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"synthetic", "encode"})

    @field_validator("encode", mode="before")
    @classmethod
    def _name_encode(cls, content: Any) -> Any:
        return {"kind": "encoding", **content} if isinstance(content, Mapping) else content

    def choose_cache(self) -> None:
        """Let this process keep files of servers where these settings say, or else the environment."""
        chosen = self.remote or RemoteConfig()
        choose_cache(chosen.cache, chosen.limit_gib)

    @model_validator(mode="after")
    def _check_outside(self) -> Self:
        # first of all, since the other rules ask the components
        for key, settings in self.walk():
            if type(settings) in OUTSIDE:
                try:
                    check_settings(OUTSIDE[type(settings)].role, settings)
                except ConfigError as error:
                    raise ValueError(f"{key}: {str(error).rstrip('.')}") from error
        return self

    @property
    def decodes_categories(self) -> bool:
        """Whether the encoder names a class instead of predicting an embedding."""
        return complete(EncoderSettings, self.encoder).decodes_categories

    @model_validator(mode="after")
    def _check_analyses(self) -> Self:
        if self.run_analyses and not self.analyses:
            raise ValueError(
                "run_analyses is true, but analyses lists none; list some, or leave run_analyses out"
            )
        return self

    @property
    def uses_pretraining(self) -> bool:
        """Whether an encoder of the run starts from what the section ``pretrain`` makes."""
        return bool(self._list_pretrained())

    def _list_pretrained(self) -> dict[str, Any]:
        """Return the encoders that start from the run's own pretraining, by their keys."""
        branches = {
            f"reconstruction.{name}.encoder": getattr(self.reconstruction, name).encoder
            for name in ("low_level", "text")
            if getattr(self.reconstruction, name) is not None
        }
        found = {"encoder": self.encoder, **branches}
        return {key: one for key, one in found.items() if complete(EncoderSettings, one).uses_pretraining}

    @model_validator(mode="after")
    def _check_pretraining(self) -> Self:
        if self.decodes_categories and getattr(
            getattr(self.encoder, "network", None), "pretrained", None
        ) == (OWN_PRETRAINING):
            raise ValueError(
                "encoder.network.pretrained is pretrain, which encoders of images can start from; pretrain first "
                "(braindecode-vis pretrain), and name its folder"
            )
        for key, encoder in self._list_pretrained().items():
            if self.pretrain is None:
                raise ValueError(
                    f"{key}.network.pretrained is pretrain, but there is no section pretrain that says how; add one, "
                    "for example pretrain: {n_epochs: 100}"
                )
            if differs := self.pretrain.encoder.list_differences(encoder.network):
                raise ValueError(
                    f"{key}.network starts from the encoder of pretrain.encoder, but differs from it in "
                    f"{', '.join(differs)}; set them alike"
                )
        return self

    @model_validator(mode="after")
    def _check_split_fits_encoder(self) -> Self:
        task = "categories" if self.decodes_categories else "images"
        if task not in self.split.decodes:
            # Of the package alone: asking others would import their code for the sake of a message.
            decoders = [kind for kind in list_inside("encoder") if _names_classes(kind)]
            raise ValueError(
                f"the encoder {self.encoder.kind!r} and the split {self.split.kind!r} do not go together: the encoder "
                f"decodes {task}, and the split is for {' and '.join(self.split.decodes)}; categories are decoded by "
                f"{', '.join(decoders)}, images by other encoders, and both under split.kind kfold or published"
            )
        return self

    @model_validator(mode="after")
    def _check_selection_fits_encoder(self) -> Self:
        if self.decodes_categories and not self.selection.is_empty:
            raise ValueError(
                f"selection chooses features for encoders of images, and the encoder {self.encoder.kind!r} decodes "
                "categories from all features; leave selection out, or choose with the settings of the data set"
            )
        if self.decodes_categories and self.evaluation.metrics:
            raise ValueError(
                f"evaluation.metrics compare images or embeddings, and the encoder {self.encoder.kind!r} decodes "
                "categories; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _check_alignment_fits_split(self) -> Self:
        split: Any = self.split
        new = split.kind == "leave_one_subject_out" and not split.own_trials
        for part in list_encoders(self.encoder):
            kind = name_alignment(getattr(part, "subject_alignment", "none"))
            if kind not in COMMON_SPACES or not (new or getattr(split, "by", None) == "subject"):
                continue
            raise ValueError(
                f"encoder.subject_alignment {kind} needs training trials of every subject, and the split "
                f"{split.kind!r} has none of the tested one; set split to leave_one_subject_out with own_trials (100, "
                "for example), or compare brains by an atlas (dataset.atlas) with encoder.subject_alignment none"
            )
        return self

    @model_validator(mode="after")
    def _check_standardising_fits_split(self) -> Self:
        zscore = complete(Dataset, self.dataset).standardises()
        # Standardising precedes the split, with the trials that the data set itself declares as training.
        fits = self.split.standardising
        # Mean and spread would come from trials that are tested: a leak, though a small one.
        if fits is not None and zscore not in fits:
            raise ValueError(
                f"dataset.zscore {zscore!r} would standardise with trials that the split {self.split.kind!r} tests; "
                f"set dataset.zscore to {' or '.join(fits)}, or split.kind to published"
            )
        return self

    @model_validator(mode="after")
    def _check_whitening_fits_split(self) -> Self:
        # What is learnt before the split learns from the declared training trials.
        learnt = complete(Dataset, self.dataset).learns_before_split()
        if learnt and self.split.tests_training_trials:
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
        # Latents alone are no images of a class.
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
    def _check_captions(self) -> Self:
        if self.reconstruction.captions and self.decodes_categories:
            raise ValueError(
                f"reconstruction.captions describe what was seen, and the encoder {self.encoder.kind!r} decodes "
                "categories; leave them out"
            )
        kinds = [each.kind for each in self.reconstruction.captions]
        if "brain" in kinds and not complete(EncoderSettings, self.encoder).writes_captions:
            raise ValueError(
                "reconstruction.captions of kind brain are written by the brain encoder, and the encoder "
                f"{self.encoder.kind!r} learns no words; add {{kind: captioning}} to encoder.objectives of a network "
                "and name encoder.captions, or leave them out"
            )
        if self.reconstruction.prompt is None:
            return self
        if not complete(GeneratorSettings, self.generator).supports_prompts:
            raise ValueError(
                f"reconstruction.prompt leads images by a text, and the generator {self.generator.kind!r} reads none; "
                "leave prompt out, or set generator.kind to sdxl_turbo, sd_ip_adapter or token_unclip (refine)"
            )
        refine = getattr(self.generator, "refine", None)
        for name, settings in (("generator.prompt", self.generator), ("generator.refine.prompt", refine)):
            if not (text := getattr(settings, "prompt", "")):
                continue
            raise ValueError(
                f"{name} is {text!r}, but reconstruction.prompt gives every trial a text of its own; leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_text_branch(self) -> Self:
        text, generator = self.reconstruction.text, complete(GeneratorSettings, self.generator)
        if self.target.kind == "clip_text":
            raise ValueError(
                "target.kind clip_text embeds texts, and what is seen are images; set target.kind to openclip, and "
                "reconstruction.text to predict tokens of a text beside"
            )
        if text is None:
            if generator.needs_texts:
                raise ValueError(
                    f"the generator {self.generator.kind!r} is conditioned on tokens of a text too: set "
                    "reconstruction.text with a target of kind clip_text, or generator.text_share to 0"
                )
            return self
        if self.reconstruction.prompt is not None or bool(getattr(self.generator, "prompt", "")):
            raise ValueError(
                "reconstruction.text predicts the tokens that a prompt would give; leave reconstruction.prompt and "
                "generator.prompt out, or reconstruction.text"
            )
        if self.decodes_categories:
            raise ValueError(
                f"reconstruction.text predicts tokens, and the encoder {self.encoder.kind!r} decodes categories; "
                "leave it out"
            )
        if not generator.supports_texts:
            raise ValueError(
                f"reconstruction.text predicts tokens of a text, which the generator {self.generator.kind!r} does not "
                "take; choose sd_ip_adapter or versatile_diffusion, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_synthetic(self) -> Self:
        if self.synthetic is None:
            return self
        encoder = complete(EncoderSettings, self.encoder)
        if encoder.decodes_categories:
            raise ValueError(
                f"synthetic adds responses to images, and the encoder {self.encoder.kind!r} decodes categories; leave "
                "it out"
            )
        parts = list_encoders(self.encoder)
        if any(part.kind == "linear_gaussian" for part in parts):
            raise ValueError(
                "synthetic responses are drawn from a linear model, and the encoder linear_gaussian is that model "
                "itself, which would take their noise for that of the recording; leave synthetic out"
            )
        alignments = {getattr(part, "subject_alignment", "none") for part in parts}
        if not alignments <= {"none", "euclidean", "zscore"}:
            raise ValueError(
                "synthetic trials would take part in the alignment of subjects by images, which is of what was "
                "measured; leave synthetic or encoder.subject_alignment out"
            )
        if encoder.reads_text or getattr(self.encoder, "image_tower", None) is not None:
            raise ValueError(
                "synthetic trials have an image embedding and neither names nor pixels, and this encoder learns from "
                "texts or tunes an image network (objectives, encoder.image_tower); leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder_knows_likelihood(self) -> Self:
        if (
            complete(PriorSettings, self.prior).asks_likelihood
            and not complete(EncoderSettings, self.encoder).may_know_likelihood
        ):
            raise ValueError(UNKNOWN_LIKELIHOOD)  # before a training that would come to nothing
        return self

    @model_validator(mode="after")
    def _check_encoder_trains_prior(self) -> Self:
        asks = complete(PriorSettings, self.prior).asks_trained_prior
        if asks and not complete(EncoderSettings, self.encoder).trains_prior:
            raise ValueError(UNTRAINED_PRIOR)
        return self

    @model_validator(mode="after")
    def _check_generator_knows_images(self) -> Self:
        if (
            complete(PriorSettings, self.prior).asks_generator
            and not complete(GeneratorSettings, self.generator).knows_images
        ):
            raise ValueError(
                f"prior.images is generator, and the generator {self.generator.kind!r} has no images of its own; set "
                "prior.images to training or to a folder of embeddings, or generator.kind to latent_diffusion"
            )
        return self

    @model_validator(mode="after")
    def _check_generator_accepts_target(self) -> Self:
        if not complete(GeneratorSettings, self.generator).accepts(self.target.kind):
            raise ValueError(
                f"the generator {self.generator.kind!r} cannot turn embeddings of the target "
                f"{self.target.kind!r} into images; set generator.kind to nearest, or target.kind to pixels, pca, vae "
                "or taesd (generator latents), efficientnet-lite0 (latent_diffusion) or openclip (sdxl_turbo)"
            )
        packaged = self.generator.kind == "latent_diffusion" and self.generator.weights is None
        plain = getattr(self.target, "grid", 1) == 1 and getattr(self.target, "block", None) is None
        if packaged and not plain:
            raise ValueError(
                "the generator 'latent_diffusion' makes images from the last maps of the whole image; leave "
                "target.grid and target.block out, or set generator.kind to nearest and a prior without generator"
            )
        return self


def _names_classes(kind: str) -> bool:
    # Asked of the class: some settings, such as those of an average, say nothing without what they hold.
    return getattr(find_component("encoder", kind), "decodes_categories", False) is True


def list_analyses() -> list[str]:
    """Return the known kinds of analyses."""
    return list_kinds("analysis")


def make_analysis(kind: str) -> Any:
    """Return the configuration of one kind of analysis with its defaults."""
    return validate_component("analysis", {"kind": kind})


def choose_analyses(config: RunConfig, kinds: Sequence[str] = ()) -> list[Any]:
    """Return the settings of the analyses that are asked for; parameters and errors are those of `analyze`."""
    known = list_analyses()
    for kind in kinds:
        if kind not in known:
            if missing := describe_missing(kind):
                raise ConfigError(f"{missing}.")
            raise ConfigError(
                f"unknown analysis {kind!r}; known are {', '.join(known)}{suggest(kind, known)}."
            )
    configured = list(config.analyses)
    chosen = [c for c in configured if not kinds or c.kind in kinds]
    chosen += [make_analysis(kind) for kind in kinds if kind not in {c.kind for c in configured}]
    if not chosen:
        raise ConfigError(
            f"{config.name} sets up no analyses; name some with --analysis. Known are {', '.join(known) or 'none'}."
        )
    return chosen
