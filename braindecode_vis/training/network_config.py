"""Settings of a network that is trained to find the seen image.

Owns `NetworkEncoderConfig`: which network, which objectives, how they are optimised. Imports no torch; the fitted
object, which plays the role of a `BrainEncoder`, is in `network_encoder`.

References
----------
Wu et al. (2025), UBP, arXiv:2503.04207. NeuroBridge (AAAI 2026). Li et al. (2024), ATM, arXiv:2403.07721. Scotti et al.
(2024), MindEye2, arXiv:2403.11207. Li et al. (2021), ALBEF, arXiv:2107.07651.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, Notice, check_file, check_installed
from braindecode_vis.base.contracts import EncoderSettings
from braindecode_vis.base.digests import hash_once, remember_digest
from braindecode_vis.base.registry import ByKind, Component
from braindecode_vis.base.settings import DeviceSettings, NeededWeights, Settings
from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.encoders.parcels_config import OWN_PRETRAINING
from braindecode_vis.preprocessing.alignment import InputScalingConfig
from braindecode_vis.preprocessing.common_space import SubjectAlignment
from braindecode_vis.training.image_config import ImageTowerConfig, LayerFusionConfig, ViewChoice
from braindecode_vis.training.optimisation import OptimiserConfig, ScheduleConfig

if TYPE_CHECKING:
    from braindecode_vis.training.network_encoder import NetworkEncoder


#: Objectives that learn latents with their scale, without which they are no images.
_WITH_SCALE = frozenset({"l1", "mse"})

BatchSize = Annotated[int, Field(ge=2)] | Literal["auto"]
_DIGESTS = ("captions_digest", "attributes_digest")
#: Settings that name what is said of images, and the needs of objectives that each of them answers.
_DESCRIBED_BY = {
    "captions": frozenset({"words", "sentences", "swapped"}),
    "attributes": frozenset({"attributes"}),
    "sentence_encoder": frozenset({"sentences", "swapped"}),
}
HeldOutShare = Annotated[float, Field(ge=0, le=0.5)]


class ProjectorConfig(Settings):
    """Learned maps to a common size, linear unless they have hidden units.

    Parameters
    ----------
    size
        Features of the common space; 512 in NeuroBridge.
    sides
        ``both`` (NeuroBridge); only the ``image`` side, if the network itself has `size` outputs; or only the ``brain``
        side, if `fusion` maps the images to `size` (SAMGA).
    brain_width
        Outputs of the network before the brain's map; None is the size of the target.
    shared
        One more linear map of `size` to `size`, the same for both sides, comes last (SAMGA).
    hidden
        Units of a hidden layer of each map (GELU). Larger, non-linear heads are one half of the improved baselines of
        Fini et al. (2023, arXiv:2305.08675), augmentations of both sides the other; their code has 4096
        units and 256 outputs. None is linear.
    """

    size: int = Field(default=512, ge=1)
    sides: Literal["both", "image", "brain"] = "both"
    brain_width: int | None = Field(default=None, ge=1)
    shared: bool = False
    hidden: int | None = Field(default=None, ge=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"shared", "hidden"})

    @model_validator(mode="after")
    def _check_brain_width(self) -> Self:
        if self.sides == "image":
            self.refuse_unused("brain_width", because="with sides image, the brain side has no map")
        return self


class SecondStageConfig(Settings):
    """Changes in the second stage of a training (SAMGA): a new optimiser, another learning rate, frozen maps.

    Objectives start and end by their own `phase`.

    Parameters
    ----------
    start
        Share of the epochs after which it begins, rounded to a whole epoch; a third in SAMGA.
    lr_scale
        Factor of every learning rate from then on; 0.5 in SAMGA.
    frozen
        What is frozen: the ``shared`` map of the projector, or nothing.
    """

    start: float = Field(default=1 / 3, gt=0, lt=1)
    lr_scale: float = Field(default=0.5, gt=0)
    frozen: tuple[Literal["shared"], ...] = ("shared",)


class TeacherConfig(Settings):
    """The moving-average network of momentum objectives.

    Parameters
    ----------
    decay
        Share of the teacher that stays at each update; 0.995 in ALBEF.
    queue
        Number of its earlier outputs that are kept; 65 536 in ALBEF, which saw millions of images. A smaller queue
        is our choice for some ten thousand: entries count as other images, so it must stay well below one epoch.
    """

    decay: float = Field(default=0.995, ge=0, lt=1)
    queue: int = Field(default=4096, ge=0)


class SelectionSettings(Settings):
    """What is held out while a network is trained.

    Parameters
    ----------
    hold_out
        Share of the training concepts (or images, see `hold_out_by`) that is held out: for the validation curve, and
        for the out-of-fold predictions for priors and generators. 0 trains on all.
    """

    hold_out: HeldOutShare = 0.05


class LastSelectionConfig(SelectionSettings):
    """Keep the weights of the last epoch, a number fixed beforehand (ATM, NeuroBridge, Shallow Alignment)."""

    kind: Literal["last"] = "last"


class EarlyStoppingConfig(SelectionSettings):
    """Keep the weights of the best epoch on held-out training concepts, and stop when no epoch was better for a while.

    Parameters
    ----------
    hold_out_by
        ``concept`` holds out whole concepts, like the test set (or images, if there are too few concepts). ``image``
        holds out single images, so that validation contains training concepts, as in NICE.
    patience
        The training stops after this many epochs without improvement; 10 in ATM's rewrite, 5 in NeuralBench.
    monitor
        ``accuracy`` (top-5 among the held-out images, top-1 if there are fewer than 20), or ``loss``.
    """

    kind: Literal["early_stopping"] = "early_stopping"
    hold_out: HeldOutShare = Field(default=0.1, gt=0)
    hold_out_by: Literal["concept", "image"] = "concept"
    patience: int = Field(default=10, ge=1)
    monitor: Literal["accuracy", "loss"] = "accuracy"

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"hold_out_by"})


class TrainingLossConfig(SelectionSettings):
    """Stop when the training loss no longer falls, and keep the last weights (UBP within subject).

    Held-out trials are not used for any choice, so all trials may be used for training.

    Parameters
    ----------
    patience
        The training stops after this many epochs without a lower loss; 5 in UBP.
    min_delta
        By how much the loss must be lower than the lowest earlier loss; 0.001 in UBP.
    """

    kind: Literal["training_loss"] = "training_loss"
    patience: int = Field(default=5, ge=1)
    min_delta: float = Field(default=0.001, ge=0)


class NetworkTrainingSettings(EncoderSettings, DeviceSettings):
    """A network and its training, whatever it learns.

    Parameters
    ----------
    network
        The network, by its ``kind``.
    optimiser, schedule
        See their classes.
    epochs
        Passes over the training trials (or images, see `augmentations`).
    batch_size
        Trials per batch over all processes, which is also the number of candidates of a contrast; UBP and NeuroBridge
        take 1024. ``auto`` is an eighth of the training set, a power of two from 16 to 1024, halved until it fits
        into memory (with a message; the number in use is in the log).
    augmentations
        In the order in which they are applied.
    input_scaling
        Scaling of the responses by training statistics.
    """

    network: Annotated[Any, Component("network")] = Field(default={"kind": "eegproject"})
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    epochs: int = Field(default=50, ge=1)
    batch_size: BatchSize = "auto"
    augmentations: tuple[Annotated[Any, Component("augmentation")], ...] = ()
    input_scaling: InputScalingConfig = InputScalingConfig()

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})
    trains_in_processes: ClassVar[bool] = True


class NetworkEncoderConfig(NetworkTrainingSettings):
    """A network that is trained with one or several objectives.

    Parameters
    ----------
    objectives
        The loss terms and their weights; by default one symmetric CLIP contrast.
    projector
        Learned maps to a common space; without one the network predicts the target space itself.
    fusion
        Learned weighted sum over the token axis of the targets (several layers); see its class. Comes before the
        projector. Regression objectives use all layers, concatenated.
    view_choice
        Which of the stacked views of an image is its training target: their ``mean``, a random one (``sample``), or
        less, usual or more blur depending on how well the image is matched (``uncertainty``, UBP). Held-out trials and
        galleries use the usual view with ``uncertainty``, otherwise the mean. None is for targets without views.
    image_tower
        Low-rank changes of the image network; see its class. Regression objectives use the embeddings of the frozen
        network.
    regression_head
        Where the output for regression objectives comes from: the network's own output (``shared``, as in ATM; without
        a projector only), its second head (``network``), or a linear map of its output (``linear``). ``auto`` takes the
        second head if the network has one, then ``shared``, then ``linear``.
    normalise_targets
        How target embeddings are normalised before they are compared: not at all (``none``, as in the papers), to unit
        length (``l2``), by subtracting the mean of the training images (``centre``), or by z-score. It should match
        ``retrieval.centre``: ``centre`` with ``mean``, ``none`` with ``none``. Regression objectives use targets
        without normalisation.
    second_stage
        A second stage with a new optimiser during the training; None has one stage.
    last_batch
        What happens with trials that do not fill a batch: all batches are a little smaller (``even``, 973 for 1024 of
        16 540), the last one is (``smaller``, UBP, NICE), or they are left out of the epoch (``dropped``, ATM,
        NeuroBridge, MindEye).
    trials_per_image
        Trials of one image that are together in a batch, of other subjects or repetitions; 9 in
        Neurobridge_ssl, so that a batch of 1024 has 1017 trials of 113 images. An image with more comes back in the
        epoch, one with fewer gives all. With ``last_batch: even`` a batch may end within an image. None
        draws trials whatever they show.
    clip_norm
        Largest norm of the gradient; None does not clip.
    precision
        ``fp32``, or mixed precision in ``bf16`` (GPU, and processors with AVX512-BF16 or AMX) or ``fp16`` (GPU).
        Objectives are always computed in float32.
    ema
        Decay of an average over the weights, which is then what validates and predicts; 0.999 in ATM's rewrite.
    teacher
        The moving-average network, where an objective needs it.
    selection
        Which epoch is kept, and how much is held out for it.
    hide_subject
        Chance of a training trial to be shown as one of an unknown subject, so that the token of unknown subjects
        is learnt (a choice of ours). Only with several subjects, and networks that take unknown ones.
    subject_alignment
        ``euclidean`` (R^(-1/2) of each subject) or ``zscore`` per subject, without labels. A subject outside the
        training set is aligned by the trials that are predicted, which makes that result transductive; the fitted
        encoder lists such subjects in `label_free_subjects`. ``procrustes``, ``hyperalignment``, ``shared_response``
        and ``functional_pca`` (by name, or with the settings of that kind) map the voxels, parcels or channels of every
        subject into one space of components, by training images that two subjects have seen; a subject outside the
        training set is refused. See SUBJECTS.md.
    out_of_fold
        Number of refits on concept-disjoint folds for `predict_out_of_fold`, which are made where a prior or generator
        learns from predictions; None takes the held-out trials.
    n_clusters
        Clusters of the training images for objectives that need them, by k-means of the targets.
    captions
        CSV file with the columns ``id`` and ``caption``, of every training image, for objectives that need words or
        sentences. An image with several has several rows; each batch draws one. Of captions, attributes and
        sentence_encoder those that no objective reads are left out, so that a sweep over objectives can name them once.
    captions_digest, attributes_digest
        Digests of the two files. They are filled in by themselves and kept with a run, so that a fitted run is read
        without the files; a file that changed since is refused.
    attributes
        CSV file with a column ``id`` or ``concept`` and one column per attribute, for objectives that need attributes;
        an empty field is unknown.
    sentence_encoder
        Network that makes vectors of captions, for objectives that need sentences: ``minilm`` (the extra ``text``), or
        a folder of a sentence encoder.
    log
        Trackers beside the JSONL file, which is always written; ``tensorboard`` and ``wandb`` need an extra.
    max_device_bytes
        Data up to this size are kept on the device, larger ones are read batch by batch.
    checkpoint_seconds
        Time between checkpoints, or 50 times what writing one takes if that is longer; 0 writes one after every update.
    """

    kind: Literal["network"] = "network"
    objectives: tuple[Annotated[Any, Component("objective")], ...] = Field(
        default=({"kind": "clip"},), min_length=1
    )
    projector: ProjectorConfig | None = None
    fusion: LayerFusionConfig | None = None
    view_choice: ViewChoice | None = None
    image_tower: ImageTowerConfig | None = None
    regression_head: Literal["auto", "shared", "network", "linear"] = "auto"
    normalise_targets: Literal["none", "l2", "centre", "zscore"] = "centre"
    second_stage: SecondStageConfig | None = None
    last_batch: Literal["even", "smaller", "dropped"] = "even"
    trials_per_image: int | None = Field(default=None, ge=2)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = Field(default=None, gt=0, lt=1)
    teacher: TeacherConfig = TeacherConfig()
    selection: Annotated[LastSelectionConfig | EarlyStoppingConfig | TrainingLossConfig, ByKind()] = (
        LastSelectionConfig()
    )
    hide_subject: float = Field(default=0.1, ge=0, le=1)
    subject_alignment: SubjectAlignment = "none"
    out_of_fold: int | None = Field(default=None, ge=2)
    n_clusters: int = Field(default=16, ge=2)
    captions: Path | None = None
    captions_digest: str | None = None
    attributes: Path | None = None
    attributes_digest: str | None = None
    sentence_encoder: Literal["minilm"] | Path | None = None
    log: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    max_device_bytes: int = Field(default=4 << 30, ge=0)
    checkpoint_seconds: float = Field(default=15.0, ge=0)

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {"device", "log", "max_device_bytes", "checkpoint_seconds", *_DESCRIBED_BY}
    )
    hashed_if_set: ClassVar[frozenset[str]] = frozenset(
        {"second_stage", "last_batch", "trials_per_image", *_DESCRIBED_BY, *_DIGESTS}
    )
    removed_settings: ClassVar[Mapping[str, Any]] = {"accumulation": 1, "compile": False}

    may_know_likelihood: ClassVar[bool] = False

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """Whether an objective compares with embeddings of text."""
        return "text" in self.needs

    @property
    def writes_captions(self) -> bool:  # type: ignore[override]
        """Whether an objective learns to write captions of trials."""
        return any(objective.kind == "captioning" for objective in self.objectives)

    @property
    def trains_prior(self) -> bool:  # type: ignore[override]
        """Whether an objective trains a diffusion prior beside the network."""
        return any(objective.kind == "diffusion_prior" for objective in self.objectives)

    @property
    def uses_pretraining(self) -> bool:  # type: ignore[override]
        """Whether the network starts from what the run itself pretrains."""
        return getattr(self.network, "pretrained", None) == OWN_PRETRAINING

    @property
    def needs(self) -> frozenset[str]:
        """What the objectives need beside brain and image."""
        return frozenset().union(*(objective.needs for objective in self.objectives))

    @model_validator(mode="after")
    def _check_parts_fit_together(self) -> Self:
        kinds = [augmentation.kind for augmentation in self.augmentations]
        for kind in ("trial_mixing", "subject_mixing", "repetition_averaging"):
            if kinds.count(kind) > 1:
                raise ValueError(f"augmentations name {kind} {kinds.count(kind)} times; once is enough")
        if "token_views" in self.needs and not set(kinds) - {
            "trial_mixing",
            "repetition_averaging",
            "subject_mixing",
        }:
            raise ValueError(
                "an objective compares two augmentations of a trial, but no augmentation in "
                "augmentations changes a trial; add "
                "for example {kind: time_shift} or {kind: channel_dropout}"
            )
        mixes = "trial_mixing" in kinds
        # Mixed trials under an ordinary contrast would be pulled to one of two images that they show.
        if mixes != ("mix" in self.needs):
            raise ValueError(
                "the augmentation trial_mixing and an objective for mixed trials (bimixco) need each "
                "other: use both or neither"
            )
        if (
            self.regression_head == "shared"
            and self.projector is not None
            and self.projector.sides == "image"
        ):
            raise ValueError("regression_head shared needs a network with as many outputs as the target")
        # Each refit would learn a space of its own.
        learned_space = any(p is not None for p in (self.projector, self.fusion, self.image_tower))
        if self.out_of_fold is not None and learned_space and "regression" not in self.needs:
            raise ValueError(
                "with a projector, fusion or image_tower, each out_of_fold refit learns a different "
                "space, so their predictions cannot be compared; add a regression objective (mse, l1), "
                "or remove out_of_fold or the learnt space"
            )
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        own = self.trials_per_image
        if own is None:
            return self
        if isinstance(self.batch_size, int) and self.batch_size < 2 * own:
            raise ValueError(
                f"trials_per_image is {own}, but batch_size {self.batch_size} has no room for two "
                "images; increase batch_size or lower trials_per_image"
            )
        if "swapped" in self.needs:
            raise ValueError(
                "trials_per_image and an objective that groups similar sentences both define the order "
                "of batches; leave trials_per_image out"
            )
        return self

    @model_validator(mode="after")
    def _check_stages_and_maps(self) -> Self:
        projector, fused = self.projector, None if self.fusion is None else self.fusion.size
        if projector is not None and projector.sides == "brain" and fused != projector.size:
            raise ValueError(
                f"projector.sides brain needs fusion.size to reduce the images to {projector.size} "
                f"features, but it is {fused}; set both to the same size, or projector.sides to both"
            )
        stage, has_shared = self.second_stage, projector is not None and projector.shared
        if stage is not None and stage.frozen and not has_shared:
            raise ValueError(
                "second_stage.frozen names the shared map, but projector.shared is not set; set it, or "
                "set second_stage.frozen to []"
            )
        # Rounded as the loop rounds it.
        if stage is not None and not 0 < round(stage.start * self.epochs) < self.epochs:
            raise ValueError(
                f"second_stage.start {stage.start:g} of {self.epochs} epoch(s) leaves a stage without an epoch"
            )
        return self

    @model_validator(mode="after")
    def _check_image_side(self) -> Self:
        if self.view_choice is not None and (self.fusion is not None or self.image_tower is not None):
            other = "fusion" if self.fusion is not None else "image_tower"
            raise ValueError(
                f"view_choice and {other} cannot be combined: view_choice chooses among the views in the "
                f"targets, but {other} treats them as layers or computes them again; remove one of them"
            )
        if self.view_choice == "uncertainty" and "mix" in self.needs:
            raise ValueError(
                "view_choice uncertainty needs the own trial of each image, but trial_mixing blends it "
                "with another; remove one of them"
            )
        if self.fusion is not None and "text" in self.needs:
            raise ValueError(
                "an objective compares with text, which has no layers to fuse; remove it or fusion"
            )
        if self.image_tower is not None and "image_views" in self.needs:
            raise ValueError(
                "an objective compares with views of the images, which are embedded before image_tower "
                "tunes the network; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_descriptions(self) -> Self:
        for name, answers in _DESCRIBED_BY.items():
            asking = [objective.kind for objective in self.objectives if objective.needs & answers]
            if asking and getattr(self, name) is None:
                raise ValueError(f"the objective {asking[0]} needs {name}; set encoder.{name}")
            if not asking and getattr(self, name) is not None:
                # A sweep over objectives names its tables once: they belong to those of its runs that read them.
                warnings.warn(f"no objective uses encoder.{name}, so it is ignored.", Notice, stacklevel=2)
                self.__dict__[name] = None
                if f"{name}_digest" in _DIGESTS:
                    self.__dict__[f"{name}_digest"] = None
        return self

    @model_validator(mode="after")
    def _remember_tables(self) -> Self:
        self.remember_files()
        return self

    def remember_files(self) -> None:
        """Note the digests of captions and attributes."""
        for key in _DIGESTS:
            remember_digest(self, key.removesuffix("_digest"))

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of descriptions of images."""
        fields = super().hashed_fields()
        for key in _DIGESTS:
            name = key.removesuffix("_digest")
            if getattr(self, name) is not None and getattr(self, key) is None:
                fields[key] = _hash_table(getattr(self, name), name)
        if self.sentence_encoder is not None:
            fields["sentence_encoder_digest"] = self._hash_sentence_encoder()
        return fields

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless descriptions of images can be read."""
        self.hashed_fields()
        # A file that was seen before and is gone is missed by a training alone.
        if self.captions is not None and self.captions.expanduser().exists():
            read_caption_bank(self.captions.expanduser())
        if self.attributes is not None and self.attributes.expanduser().exists():
            read_attributes(self.attributes.expanduser())
        if self.sentence_encoder is not None:
            check_installed("transformers", "encoder.sentence_encoder")

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder, if there is one."""
        from braindecode_vis.embeddings.sentence_encoder import list_sentence_weights

        return list_sentence_weights(self.sentence_encoder, "sentence_encoder")

    @property
    def sentence_space(self) -> str:
        """Name of the space of the sentence vectors that an objective learns from; empty without any."""
        if self.sentence_encoder is None:
            return ""
        from braindecode_vis.embeddings.sentence_encoder import find_sentence_folder, name_sentence_space

        return name_sentence_space(find_sentence_folder(self.sentence_encoder, "encoder.sentence_encoder"))

    def _hash_sentence_encoder(self) -> str:
        from braindecode_vis.embeddings.sentence_encoder import find_sentence_folder, hash_sentence_encoder

        assert self.sentence_encoder is not None
        return hash_sentence_encoder(find_sentence_folder(self.sentence_encoder, "encoder.sentence_encoder"))

    def check_low_level(self, n_values: int) -> None:
        """Raise `ConfigError` unless the network can predict latents of so many values that become images."""
        if self.out_of_fold is not None:
            raise ConfigError(
                f"out_of_fold is {self.out_of_fold}, but it has no effect: nothing learns from predictions of the "
                "branch; leave out_of_fold out"
            )
        kinds = [objective.kind for objective in self.objectives]
        if not _WITH_SCALE.intersection(kinds):
            raise ConfigError(
                f"objectives {', '.join(kinds)} do not fix the scale of latents, so the latents cannot "
                "be decoded; add l1 (as in ATM) or mse"
            )
        if self.network.kind == "latent_decoder":
            self.network.plan(n_values)

    def build(self, *, seed: int) -> NetworkEncoder:
        """Return the unfitted encoder."""
        from braindecode_vis.training.network_encoder import NetworkEncoder

        return NetworkEncoder(self, seed=seed)


def _hash_table(path: Path, setting: str) -> str:
    columns = {"captions": "id and caption", "attributes": "id or concept"}[setting]
    file = path.expanduser()
    check_file(
        file, what=f"the file of encoder.{setting}", hint=f"give a CSV file with the columns {columns}"
    )
    return hash_once(file)
