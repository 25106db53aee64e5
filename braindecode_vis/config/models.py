"""The frozen settings of a run: a component for each role, settings of the other steps, and which settings can be
combined.

Components are found by `braindecode_vis.base.registry`; a new one is one file and one line there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, suggest
from braindecode_vis.base.contracts import (
    Dataset,
    EncoderSettings,
    GeneratorSettings,
    NetworkSettings,
    PriorSettings,
)
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
        ``fold`` ranks each query among the test images of its own fold; ``all`` among the test images of all folds,
        which must share one space. With folds of images, the gallery of ``all`` contains training images of each fold,
        so that ranks are below chance. ``auto`` takes ``fold`` if every fold tests five images or more, and otherwise
        ``all`` if possible.
    centre
        Correction of every embedding before the cosine: subtract the ``mean`` of the training images' embeddings, also
        divide by their spread (``zscore``), or do nothing (``none``, as in papers that train with the same cosine).
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
        by trial in any case.
    """

    train: Literal["averaged", "single"] = "averaged"
    test: Literal["averaged", "single"] = "averaged"


class SyntheticConfig(Settings):
    """Synthetic responses beside the real training trials: predicted by an encoding model for images that were not
    shown.

    The model is fitted on the training trials of the fold, without the images that a network holds out. Images that
    were shown are left out. If no tested concept is in the training, other images of tested concepts are left out too.

    Parameters
    ----------
    images
        ``unseen`` for images of the data set that no trial shows; a folder of pictures, tars, tables or HDF5 files;
        ``phantom:N`` (see ``embed --images``); or a finished bank of embeddings in the space of the target, where
        `features` is empty.
    share
        Share of synthetic trials among all training trials.
    noise
        ``residual`` adds noise with the covariance of the model's residuals on the training trials, and images come
        again, with other noise, if there are too few. ``none`` adds nothing, and each image is used at most once for
        a subject.
    features
        Image encoders whose embeddings are the features of the model; empty takes the target.
    model
        How several spaces are combined, and the penalties.
    by
        ``ridge``: one linear model for each subject. ``network``: the network of the brain encoder predicts responses
        of all subjects together, if it can (``voxel_clusters``, whose universal encoder knows voxels by their codes).
        It has no residuals of trials that it has not seen, so that `noise` must be ``none``.
    """

    images: str = Field(min_length=1)
    share: float = Field(default=0.5, gt=0, lt=1)
    noise: Literal["residual", "none"] = "residual"
    by: Literal["ridge", "network"] = "ridge"
    features: tuple[LayerConfig, ...] = ()
    model: EncodingModelConfig = EncodingModelConfig()

    not_hashed: ClassVar[frozenset[str]] = frozenset({"images"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"by"})

    @model_validator(mode="after")
    def _check_by(self) -> Self:
        if self.by == "network":
            self.refuse_unused("features", "model", because="the network reads the target")
            if self.noise != "none":
                raise ValueError("noise residual needs a ridge, but by is network; set noise to none")
        return self

    @field_validator("images")
    @classmethod
    def _make_absolute(cls, text: str) -> str:
        # A run folder is gone on with from anywhere.
        return (
            text if text == UNSEEN or text.startswith("phantom:") else str(Path(text).expanduser().absolute())
        )

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and a digest of the images, or a note that they are not available."""
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
        """Return a clause for the protocol that says what is added to the training."""
        source = self.images if self.images.startswith((UNSEEN, "phantom:")) else Path(self.images).name
        return (
            f"trained with {self.share:.0%} synthetic responses to images that were not shown ({source}; "
            f"{'by the network; ' if self.by == 'network' else ''}noise {self.noise})"
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
    """A second branch from brain to image, for colour and layout.

    Parameters
    ----------
    target
        Latents to predict: of a published autoencoder (``taesd``, ``vae``), or of a substitute that needs no weights
        from a hub (``packaged_latents``; ``pca``, principal components of the training images). Run, rows and report
        name a substitute as such.
    encoder
        The brain encoder that predicts them.
    prior
        Prior that changes the predictions before they are decoded.
    fusion
        How its images are merged with those of the generator.
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
        """Return the plain fields, in a form that still finds runs from before the setting `prior` existed."""
        fields = super().hashed_fields()
        return {
            name: value for name, value in fields.items() if name != "prior" or value != {"kind": "identity"}
        }

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        settings = complete(EncoderSettings, self.encoder)
        if settings.decodes_categories:
            raise ValueError(
                f"encoder {self.encoder.kind!r} decodes classes, but latents of images are needed here"
            )
        try:
            settings.check_low_level(math.prod(self.target.build().latent_shape))
        except ConfigError as error:
            raise ValueError(f"encoder: {str(error).rstrip('.')}") from error
        return self


class TextBranchConfig(Settings):
    """A second branch from brain to generator: tokens of a text, for generators with two conditions.

    Parameters
    ----------
    target
        Tokens to predict: a target of kind ``clip_text``.
    encoder
        The brain encoder that predicts them.
    prior
        Prior that changes the predictions before the generator gets them.
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
                f"encoder {self.encoder.kind!r} decodes classes, but tokens of texts are needed here"
            )
        return self


class ReconstructionConfig(Settings):
    """How many images are made for each trial, and from which inputs.

    Parameters
    ----------
    n_draws
        Images per trial, each from a different draw of the prior. Scores are computed per draw and then averaged.
    low_level
        A branch for colour and layout; none by default.
    captions
        Caption decoders. From the embedding of a trial: the caption of the nearest training image, GIT with predicted
        image tokens or sentence vectors, or a decoder learnt from captions of training images. From the response
        itself: a brain encoder that has learnt captioning. Captions are scored if `evaluation.captions` is set.
    prompt
        The kind of `captions` whose text guides the image of its trial, for generators that read texts (ATM's caption
        branch: ``git``).
    text
        A branch that predicts tokens of a text, which the generator uses together with the image embedding; none by
        default.
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
        """Return a clause that names the branches with a substitute for weights of a hub; empty if there is none.

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
    """How scores are computed, with their intervals and null distributions.

    Parameters
    ----------
    n_bootstrap
        Resamples of the stimuli behind every interval.
    resample
        What intervals resample: ``image``, ``trial``, ``group``, ``run``, ``session`` or ``subject``. ``auto`` takes
        groups if the trial table has a column `group`, otherwise images, or trials if classes are decoded. With several
        subjects, subjects are resampled too; ``subject`` resamples subjects only.
    n_permutations
        Shuffles of the image labels behind every chance level and p-value.
    features
        Image encoder whose features are compared in addition to the pixels; None compares pixels only.
    suite
        The networks with which published tables compare images; networks without weights are reported as missing.
    best_of
        Score the best of several draws too, under separate names.
    metrics
        Further metrics of images or embeddings: ``correlation_distance`` and those from outside the package.
    protocols
        Further galleries and tasks: concept templates, draws of 300, names by text and the like. ``transductive``
        corrects similarities with the unlabelled test queries of each subject (centring, standardising, CSLS, SATTC,
        SCORE); its rows have separate names and are never the result of the run. ``neuralbench`` adds the scores of
        that benchmark under its names, with its tie rule; it needs ``repeats.test: single`` for its rows of epochs.
    gallery
        A bank of many more images (``embed --images``), in which the seen image is searched too.
    composition
        Pairs of texts, and of images, with the same parts in another combination, for the protocol of this name.
    descriptions
        Captions or attributes of the tested images: a gallery of texts, beside the gallery of images and their fusion.
    conditions
        Columns of the trial table, such as ``task``, whose values are also scored separately.
    captions
        Captions of reconstructions and of the nearest training image, compared with reference captions.
    brain
        A linear encoding model that tests whether reconstructions explain the measured responses.
    noise_ceiling
        How the noise ceiling of the test responses is estimated, for the report and beside `brain`; None leaves it out.
    """

    n_bootstrap: int = Field(default=10_000, ge=100, le=1_000_000)
    n_permutations: int = Field(default=10_000, ge=100, le=1_000_000)
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
                "the protocol composition and the setting evaluation.composition need each other; give "
                "both evaluation.protocols: [composition] and evaluation.composition, or neither"
            )
        return self

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.features is not None and self.features.fitted_on_training_images:
            raise ValueError(
                f"evaluation.features needs a pretrained network, but {self.features.kind} is fitted on "
                "training images; choose efficientnet-lite0 or another pretrained encoder"
            )
        return self


class RemoteConfig(Settings):
    """Cache of files from an address such as ``s3://bucket/folder``; it changes no result.

    Parameters
    ----------
    cache
        Folder of the cache, which several runs may share; ``$BRAINDECODE_VIS_REMOTE_CACHE``, or ``remote`` in the
        user's cache, by default.
    limit_gib
        Size limit of the cache in GiB: the files that were not used for the longest time are removed for new ones.
        ``$BRAINDECODE_VIS_REMOTE_GIB``, or 50, by default.
    """

    cache: Path | None = None
    limit_gib: float | None = Field(default=None, gt=0, le=1e8)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"cache", "limit_gib"})


class RunConfig(Settings):
    """All settings that determine the result of a run.

    Parameters
    ----------
    name
        Name of the run; its folder is ``runs/<name>`` unless ``--out`` says otherwise.
    seed
        Root seed of all random numbers.
    dataset, split, target, encoder, prior, generator
        The component of each role, by its ``kind``.
    pretrain
        How the whole-cortex encoder is pretrained without labels: by the verb ``pretrain``, or, if
        ``encoder.network.pretrained`` is the word ``pretrain``, by the run itself before it trains.
    text
        How concept names are encoded as vectors, for objectives and scores that compare with text.
    selection
        Which channels, times or voxels of the responses the encoder sees; chosen by training trials.
    repeats, retrieval, reconstruction, evaluation
        Settings of the steps that have no components.
    synthetic
        Synthetic responses that are added to the training; none by default.
    analyses
        Analyses that the verb ``analyze`` makes without ``--analysis``.
    encode
        How the verb ``encode`` predicts responses from images; no other verb uses it.
    run_analyses
        Whether the verb ``run`` also makes the analyses, before its report.
    cluster
        Resources of jobs, if a verb is run with ``--cluster``.
    remote
        Cache of files on servers, if a path is an address.
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
        """Set the cache for files of servers from these settings, or else from the environment."""
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
        """Whether the encoder decodes a class instead of predicting an embedding."""
        return complete(EncoderSettings, self.encoder).decodes_categories

    @model_validator(mode="after")
    def _check_analyses(self) -> Self:
        if self.run_analyses and not self.analyses:
            raise ValueError(
                "run_analyses is true, but analyses is empty; list analyses, or leave run_analyses out"
            )
        return self

    @property
    def uses_pretraining(self) -> bool:
        """Whether an encoder of the run starts from the pretraining of the section ``pretrain``."""
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
                "encoder.network.pretrained is pretrain, which only encoders of images can start from; "
                "pretrain first "
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
                    f"{', '.join(differs)}; set them to the same values"
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
                f"decodes {task}, and the split is for {' and '.join(self.split.decodes)}; "
                f"{', '.join(decoders)} decode categories, other encoders decode images, and split.kind "
                "kfold or published works for both"
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
                f"encoder.subject_alignment {kind} needs training trials of every subject, but with the split "
                f"{split.kind!r} the tested subject has none; set split to leave_one_subject_out with own_trials (100, "
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
                "evaluation.best_of scores the best of several draws, but reconstruction.n_draws is 1; "
                "set more draws, or leave best_of out"
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
                "reconstruction.prompt guides images by a text, but the generator "
                f"{self.generator.kind!r} reads no text; leave prompt out, or set generator.kind to "
                "sdxl_turbo, sd_ip_adapter or token_unclip (refine)"
            )
        refine = getattr(self.generator, "refine", None)
        for name, settings in (("generator.prompt", self.generator), ("generator.refine.prompt", refine)):
            if not (text := getattr(settings, "prompt", "")):
                continue
            raise ValueError(
                f"{name} is {text!r}, but reconstruction.prompt gives every trial its own text; leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_text_branch(self) -> Self:
        text, generator = self.reconstruction.text, complete(GeneratorSettings, self.generator)
        if self.target.kind == "clip_text":
            raise ValueError(
                "target.kind clip_text embeds texts, but the stimuli are images; set target.kind to "
                "openclip, and use reconstruction.text to predict tokens of a text as well"
            )
        if text is None:
            if generator.needs_texts:
                raise ValueError(
                    f"the generator {self.generator.kind!r} also needs tokens of a text: set "
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
                "synthetic responses are drawn from a linear model, and the encoder linear_gaussian is "
                "the same model, which would treat their noise as noise of the recording; leave synthetic out"
            )
        alignments = {getattr(part, "subject_alignment", "none") for part in parts}
        if not alignments <= {"none", "euclidean", "zscore"}:
            raise ValueError(
                "synthetic trials would take part in the alignment of subjects by images, which must use "
                "measured trials only; leave synthetic or encoder.subject_alignment out"
            )
        if encoder.reads_text or getattr(self.encoder, "image_tower", None) is not None:
            raise ValueError(
                "synthetic trials have an image embedding and neither names nor pixels, and this encoder learns from "
                "texts or tunes an image network (objectives, encoder.image_tower); leave one of the two out"
            )
        network = getattr(self.encoder, "network", None)
        if self.synthetic.by == "network" and (
            network is None or complete(NetworkSettings, network).fit_responses is None
        ):
            raise ValueError(
                "synthetic.by is network, but the encoder has no network that predicts responses; set "
                "encoder.network.kind to voxel_clusters, or leave synthetic.by out"
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
    """Return the settings of the requested analyses; parameters and errors are those of `analyze`."""
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
            f"{config.name} lists no analyses; choose some with --analysis. Known are {', '.join(known) or 'none'}."
        )
    return chosen
