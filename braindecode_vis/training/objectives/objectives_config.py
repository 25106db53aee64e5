"""Settings of every objective, one class per kind. Imports no torch; `make_term` does.

First the contrasts with a trial's own image, then regressions, then objectives beyond the pair: gap, views, teacher,
hard negatives, background.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.training.objectives.objective import LogitScale

Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
Duplicates = Literal["positive", "mask", "negative"]
View = Literal["brain", "image", "brain_views", "image_views"]


class ObjectiveConfig(Settings):
    """Settings that every objective has.

    A subclass gives its loss in `make_term`, names in `needs` the optional outputs that it uses (keys of `NEED_FIELDS`;
    read it from the instance, since settings may decide it), and says in `contrastive` whether it compares different
    images of a batch.

    Parameters
    ----------
    weight
        Factor of this objective in the sum; the module that `build` returns does not apply it.
    weight_end
        The factor at the end of the phase; it changes linearly to this value. None keeps `weight`.
    phase
        Start and end as shares of the training. The objective is used while ``start <= progress < end``; an end of 1
        includes the last step.
    """

    kind: str
    weight: float = Field(default=1.0, gt=0)
    weight_end: float | None = Field(default=None, ge=0)
    phase: tuple[Share, Share] = (0.0, 1.0)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"weight_end"})
    needs: ClassVar[frozenset[str]] = frozenset()
    contrastive: ClassVar[bool] = True

    @field_validator("phase")
    @classmethod
    def _check_phase(cls, phase: tuple[float, float]) -> tuple[float, float]:
        if phase[0] >= phase[1]:
            raise ValueError(
                f"phase must start before it ends, but is {list(phase)}; [0, 1] means the whole training"
            )
        return phase

    def is_active(self, progress: float) -> bool:
        """Return whether the objective counts at this share of the training."""
        start, end = self.phase
        return start <= progress and (progress < end or end >= 1.0)

    def weigh(self, progress: float) -> float:
        """Return the factor of this objective at this share of the training."""
        if self.weight_end is None:
            return self.weight
        start, end = self.phase
        share = min(max((progress - start) / (end - start), 0.0), 1.0)
        return self.weight + (self.weight_end - self.weight) * share

    def build(self) -> nn.Module:
        """Return the module whose ``forward(outputs)`` gives the unweighted scalar."""
        from braindecode_vis.training.objectives.objective import Objective

        return Objective(self, self.make_term())

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss; `build` puts the checks of a step and the phase around it."""
        raise NotImplementedError


class DuplicateSettings(ObjectiveConfig):
    """What contrasts have that compare all trials of a batch.

    Parameters
    ----------
    duplicates
        How other trials of the same image in a batch are treated: ``positive`` (share the target, a choice of ours),
        ``mask`` (left out) or ``negative`` (as published).
    """

    duplicates: Duplicates = "positive"


class ScaleSettings(DuplicateSettings):
    """Settings of every contrast with CLIP's logits.

    Parameters
    ----------
    scale
        How the parameter becomes the factor of the similarities: ``exp``, at most `max_scale` (CLIP, NICE, ATM), or
        ``softplus`` (UBP, NeuroBridge). The parameter starts at ``ln(1 / temperature)`` for both.
    temperature
        0.07 as in CLIP; 1 with ``exp``, not learned, means no temperature.
    learn_temperature
        Whether the parameter is trained.
    max_scale
        Limit of ``exp``; 100 as in CLIP.
    symmetric
        Use both directions; otherwise only brain to image.
    normalise_brain
        Whether the brain side is normalised to unit length; the image side always is.
    """

    scale: Literal["exp", "softplus"] = "exp"
    temperature: Temperature = 0.07
    learn_temperature: bool = True
    max_scale: float = Field(default=100.0, gt=0)
    symmetric: bool = True
    normalise_brain: bool = True

    removed_settings: ClassVar[Mapping[str, Any]] = {"normalise_image": True}

    def make_scale(self) -> LogitScale:
        """Return the factor of the similarities."""
        from braindecode_vis.training.objectives.objective import LogitScale

        return LogitScale(
            self.temperature, form=self.scale, learn=self.learn_temperature, max_scale=self.max_scale
        )

    def clip_options(self) -> dict[str, Any]:
        """Return the options that `compute_clip_loss` takes besides the scale."""
        return {
            "symmetric": self.symmetric, "duplicates": self.duplicates, "normalise_brain": self.normalise_brain
        }  # fmt: skip


class ClipObjectiveConfig(ScaleSettings):
    """CLIP's contrast of brain and image over the batch."""

    kind: Literal["clip"] = "clip"

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.objective import ScaledTerm, compute_clip_loss

        return ScaledTerm(compute_clip_loss, self.make_scale(), **self.clip_options())


class ClipImageTextObjectiveConfig(ScaleSettings):
    """ATM's mix of a contrast with images and a contrast with the words of their concepts.

    Parameters
    ----------
    image_share
        Weight of the image term, the text term has the rest; 0.99 in ATM's retrieval.
    """

    kind: Literal["clip_image_text"] = "clip_image_text"
    image_share: Share = 0.99

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.contrastive import ClipImageTextTerm

        return ClipImageTextTerm(self.make_scale(), image_share=self.image_share, **self.clip_options())


class SiglipObjectiveConfig(DuplicateSettings):
    """Sigmoid loss over all pairs of the batch, with a factor and an offset that start at 10 and -10, as in SigLIP.

    Images of a cosine of at least 0.999 count as the same, as in NeuralBench.

    Parameters
    ----------
    weight
        Small if used with another contrast (our choice): it is a sum over all images of a batch and starts about three
        times as large. Use 1 if it is the only one.
    """

    kind: Literal["siglip"] = "siglip"
    weight: float = Field(default=0.1, gt=0)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "scale": 10.0, "bias": -10.0, "learn": True, "duplicate_cosine": 0.999, "normalise_brain": True,
        "normalise_image": True,
    }  # fmt: skip

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.contrastive import SiglipTerm

        return SiglipTerm(self.duplicates)


class MseObjectiveConfig(ObjectiveConfig):
    """Mean squared error of the regression head on the untouched target embedding."""

    kind: Literal["mse"] = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.regression import RegressionTerm, compute_mse

        return RegressionTerm(compute_mse)


class L1ObjectiveConfig(ObjectiveConfig):
    """Mean absolute error of the regression head on the untouched target embedding (ATM's low-level branch)."""

    kind: Literal["l1"] = "l1"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.regression import RegressionTerm, compute_l1

        return RegressionTerm(compute_l1)


class CosineObjectiveConfig(ObjectiveConfig):
    """One minus the cosine of the regression head's output and the untouched target embedding."""

    kind: Literal["cosine"] = "cosine"

    needs: ClassVar[frozenset[str]] = frozenset({"regression"})
    contrastive: ClassVar[bool] = False

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.regression import RegressionTerm, compute_cosine_distance

        return RegressionTerm(compute_cosine_distance)


class SoftClipObjectiveConfig(ObjectiveConfig):
    """Contrast whose targets are the similarities of the images among themselves (MindEye).

    Its temperature goes from 0.004 to 0.0075 along half a cosine over the phase, as in MindEye.

    Parameters
    ----------
    weight
        Small if used with another contrast (our choice); 1 in MindEye, where it is the only one of its phase. Its
        temperatures are for the flattened tokens of an image; with one vector per image the gradients are about thirty
        times CLIP's.
    """

    kind: Literal["soft_clip"] = "soft_clip"
    weight: float = Field(default=0.03, gt=0)

    removed_settings: ClassVar[Mapping[str, Any]] = {"temperature_start": 0.004, "temperature_end": 0.0075}

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.contrastive import SoftClipTerm

        return SoftClipTerm(self.phase)


class BimixcoObjectiveConfig(DuplicateSettings):
    """Contrast of mixed trials with the images of both parts (MindEye), over the first third of the training.

    The loop mixes: half of the batch, shares from Beta(0.15, 0.15) in MindEye. The temperature is 0.006, as in its
    code.

    Parameters
    ----------
    weight
        Small if used with another contrast (our choice); 1 in MindEye, where it is the only one of its phase. See
        `soft_clip`.
    """

    kind: Literal["bimixco"] = "bimixco"
    weight: float = Field(default=0.03, gt=0)
    phase: tuple[Share, Share] = (0.0, 0.33)

    removed_settings: ClassVar[Mapping[str, Any]] = {"temperature": 0.006}
    needs: ClassVar[frozenset[str]] = frozenset({"mix"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.contrastive import BimixcoTerm

        return BimixcoTerm(self.duplicates)


class AlignmentObjectiveConfig(ObjectiveConfig):
    """Mean squared distance between the unit vectors of brain and image."""

    kind: Literal["alignment"] = "alignment"

    contrastive: ClassVar[bool] = False

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.structure import AlignmentTerm

        return AlignmentTerm()


class MmdObjectiveConfig(ObjectiveConfig):
    """Maximum mean discrepancy between all trials and all images of a batch, the coarse stage of SAMGA.

    It does not use which image belongs to which trial.

    Parameters
    ----------
    weight
        Large if used with a contrast (our choice): between unit vectors the discrepancy is some thousandths. SAMGA has
        0.9 to 0.5.
    normalise
        Normalise both sides to unit length first (our choice). SAMGA's code does not: if the distances are larger than
        a few bandwidths, as for vectors with the length of image embeddings, every kernel and gradient is 0.
    """

    kind: Literal["mmd"] = "mmd"
    weight: float = Field(default=10.0, gt=0)
    normalise: bool = True

    removed_settings: ClassVar[Mapping[str, Any]] = {"bandwidths": [0.1, 0.2, 0.5, 1.0, 2.0]}

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.structure import MmdTerm

        return MmdTerm(normalise_both=self.normalise)


class UniformityObjectiveConfig(ObjectiveConfig):
    """Predictions spread uniformly over the sphere.

    Parameters
    ----------
    between
        Outputs of the ``brain``, of the ``image`` side, the mean of ``both``, or ``cross`` for brain against image. A
        frozen image side has no gradient.
    duplicates
        Pairs of trials of the same image are left out (``mask``) or count like any other (``negative``).
    """

    kind: Literal["uniformity"] = "uniformity"
    between: Literal["brain", "image", "both", "cross"] = "both"
    duplicates: Literal["mask", "negative"] = "mask"

    removed_settings: ClassVar[Mapping[str, Any]] = {"sharpness": 2.0}

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.structure import UniformityTerm

        return UniformityTerm(between=self.between, duplicates=self.duplicates)


class CuaObjectiveConfig(ScaleSettings):
    """CLIP's contrast, alignment and uniformity with weights of 1 against the contrastive gap.

    Parameters
    ----------
    cross
        Add the uniformity between the sides (``L_CUAXU``).
    """

    kind: Literal["cua"] = "cua"
    cross: bool = False

    removed_settings: ClassVar[Mapping[str, Any]] = {"sharpness": 2.0}

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.objective import ScaledTerm
        from braindecode_vis.training.objectives.structure import compute_cua_loss

        return ScaledTerm(compute_cua_loss, self.make_scale(), cross=self.cross, **self.clip_options())


class MultiviewObjectiveConfig(ObjectiveConfig):
    """Contrast among all views together, at a temperature of 0.1 (our choice).

    Parameters
    ----------
    weight
        Small compared with the contrast with images (our choice): the views of one trial are more similar to each other
        than to its image, and a term of the best pair alone moves trials of different images together.
    form
        ``dhel`` (MV-DHEL, negatives within each view) or ``infonce`` (MV-InfoNCE, negatives as in the released code).
    views
        Outputs that are used as views; `needs` follows from them. None takes ``brain``, ``brain_views`` and ``image``,
        and ``brain`` and ``image`` for ``infonce``, where trials of one image are the best pair of every sum: alone it
        then never compares them with the image.
    duplicates
        Other trials of the same image are left out of the negatives (``mask``) or are ``negative``.
    """

    kind: Literal["multiview"] = "multiview"
    weight: float = Field(default=0.1, gt=0)
    form: Literal["dhel", "infonce"] = "dhel"
    views: tuple[View, ...] | None = None
    duplicates: Literal["mask", "negative"] = "mask"

    removed_settings: ClassVar[Mapping[str, Any]] = {"temperature": 0.1, "negatives": "all"}

    @field_validator("views")
    @classmethod
    def _check_views(cls, views: tuple[View, ...] | None) -> tuple[View, ...] | None:
        if views is not None and (not views or len(set(views)) < len(views)):
            raise ValueError(f"views must name at least one output, and each once, but are {list(views)}")
        return views

    @property
    def chosen_views(self) -> tuple[View, ...]:
        """The views that are compared."""
        if self.views is not None:
            return self.views
        return ("brain", "image") if self.form == "infonce" else ("brain", "brain_views", "image")

    # Which optional outputs it needs is a matter of its settings here.
    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Optional outputs among the views."""
        return frozenset(self.chosen_views) & {"brain_views", "image_views"}

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.structure import MultiviewTerm

        return MultiviewTerm(form=self.form, views=self.chosen_views, duplicates=self.duplicates)


class MomentumSettings(DuplicateSettings):
    """Settings of the objectives with a moving-average teacher; the loop owns its momentum and the queue's length.

    As in ALBEF, a learned temperature starts at 0.07 and stays within 0.001 and 0.5, and the teacher's opinion has
    a share of 0.4 in the targets, which grows from zero over the first thirtieth of the training (ALBEF: the first
    epoch).

    Parameters
    ----------
    duplicates
        What other trials of the same image in the batch are. The queue does not say what it shows: its entries
        always count as different.
    """

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "temperature": 0.07, "learn_temperature": True, "temperature_bounds": [0.001, 0.5], "alpha": 0.4,
        "alpha_ramp": 0.033,
    }  # fmt: skip


class DistillationObjectiveConfig(MomentumSettings):
    """ALBEF's contrast with momentum distillation."""

    kind: Literal["distillation"] = "distillation"

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.distillation import DistillationTerm

        return DistillationTerm(self.duplicates)


class TclObjectiveConfig(MomentumSettings):
    """ALBEF's contrast with TCL's terms within each side and TCL's local term of the brain side.

    No gradient goes through the local outputs. TCL takes them from the teacher; here they are the network's own.
    """

    kind: Literal["tcl"] = "tcl"

    removed_settings: ClassVar[Mapping[str, Any]] = {"stop_tokens": True}
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "brain_tokens"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.distillation import TclTerm

        return TclTerm(self.duplicates)


class ClusterObjectiveConfig(ScaleSettings):
    """Contrast with negatives from the image's own cluster, as in the later stages of MCL (arXiv:2402.11816)."""

    kind: Literal["within_cluster"] = "within_cluster"

    needs: ClassVar[frozenset[str]] = frozenset({"clusters"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.contrastive import WithinGroupTerm

        return WithinGroupTerm(self.make_scale(), **self.clip_options())


class HydraObjectiveConfig(ObjectiveConfig):
    """Contrast in subspaces that learned gates open for two classes (SimLAP, first named Hydra).

    For each trial a partner class is drawn. In the subspace of both classes, trials of the partner class are right
    answers, further classes wrong ones, and the trial's own class neither. The gate is made of the mean of the
    embeddings of both classes; the temperature is 0.1, as in SimLAP. Images are anchors too (ours: the paper has one
    kind of view). Gates are discarded after training.

    Parameters
    ----------
    weight
        Small compared with the contrast with images (our choice).
    classes
        ``concepts``, or the values of one of the ``attributes``, drawn for each trial among its known attributes.
    partner
        The trial's own class (``identical``, ours): what shares the class is right in the gate of that class alone.
        Or the class of any other trial of the batch (``arbitrary``, as published), or of one of another class
        (``distinct``): a gate of every pair of classes must then be learnt. A few thousand trials are too few, and the
        loss stays at that of guessing. An attribute of two values has wrong answers with ``identical`` only.
    unit
        Compare by cosine after gating (ours); without it lengths are one before gating only, as in the released code,
        and gates near a half leave a quarter of every similarity.
    """

    kind: Literal["hydra"] = "hydra"
    weight: float = Field(default=0.3, gt=0)
    classes: Literal["concepts", "attributes"] = "concepts"
    partner: Literal["arbitrary", "identical", "distinct"] = "identical"
    unit: bool = True

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "gate": "anchor", "symmetric": True, "temperature": 0.1, "width": 512, "hidden": 1024
    }  # fmt: skip

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The table of classes."""
        return frozenset({self.classes})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss; its gates are made when the number of classes is known."""
        from braindecode_vis.training.objectives.gated import HydraTerm

        return HydraTerm(classes=self.classes, partner=self.partner, unit=self.unit)


class SalientObjectiveConfig(ObjectiveConfig):
    """Separation of what the response shares with the time before the stimulus (SepCLR).

    The first half of the features is the common part, and the bandwidth of the kernel 0.5, as in the authors' scripts.

    Parameters
    ----------
    weight
        Small beside the contrast with images, whose vector the two parts share; ours.
    constant_weight, independence_weight
        Weights of the two terms beside the common and the salient one. The authors' scripts use (100, 10) for one data
        set, for outputs of a few features. 1 is ours, for salient parts of one size.
    scale
        Bring salient parts to one size: a mean squared length of one over the responses (ours). Without it, as in the
        scripts, outputs of the length of an image embedding make the loss some thousand times a contrast.
    """

    kind: Literal["salient"] = "salient"
    weight: float = Field(default=0.1, gt=0)
    constant_weight: float = Field(default=1.0, ge=0)
    independence_weight: float = Field(default=1.0, ge=0)
    scale: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"brain_views", "background"})
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "common_share": 0.5, "bandwidth": 0.5, "salient_weight": 1.0,
    }  # fmt: skip

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.structure import SalientTerm

        return SalientTerm(
            constant_weight=self.constant_weight, independence_weight=self.independence_weight, scale=self.scale
        )  # fmt: skip


class SentenceObjectiveConfig(ObjectiveConfig):
    """Sentences as a second target: a linear head from the brain's output into the space of a sentence encoder.

    A fitted encoder then predicts sentence vectors (`NetworkEncoder.predict_sentences`), which texts are searched by.

    Parameters
    ----------
    weight
        Small beside the contrast with images: 0.05 as the default of MCSE's code, which takes 0.01 for some data. The
        head itself learns as fast with any.
    form
        ``softmax``, the cross-entropy of MCSE at its temperature of 0.05, or ``margin``, the hinge of Merkx and Frank
        over all wrong pairs, with their margin of 0.2.
    passes
        What goes through the head: the ``trial``, or two disjoint ``halves`` of the repetitions of its image, which
        play the part of MCSE's two dropout passes.
    """

    kind: Literal["sentence_contrast"] = "sentence_contrast"
    weight: float = Field(default=0.05, gt=0)
    form: Literal["softmax", "margin"] = "softmax"
    passes: Literal["trial", "halves"] = "trial"

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "halves_weight": 0.0, "temperature": 0.05, "symmetric": False, "margin": 0.2, "hardest": None
    }  # fmt: skip

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Sentences, and with ``halves`` those of the repetitions."""
        return frozenset({"sentences", "brain_views"} if self.passes == "halves" else {"sentences"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.composition import SentenceTerm

        return SentenceTerm(form=self.form, halves=self.passes == "halves")


class CompositionObjectiveConfig(ScaleSettings):
    """NegCLIP's contrast: each response is searched among texts and texts in which words changed places.

    Texts are the captions of the encoder (`captions`), read by its `sentence_encoder`; each has up to four swapped
    ones, where NegCLIP draws one of up to five.

    Parameters
    ----------
    weight
        Small compared with the contrast with images (our choice); 1 in NegCLIP, where it is the only one.
    space
        Space in which responses and texts are compared: ``target``, if the target of the run is the sentence vector of
        the same captions (``minilm``), or ``sentences``: a linear head of this objective predicts sentence vectors,
        with any target.
    words
        Words that may be exchanged: words of short ``english`` lists (colours, sizes, people and similar), or the
        values of the encoder's ``attributes``. The two sides of a relation (``to the left of``) may always be
        exchanged.
    hard_images
        Put images of the same parts next to each other in a batch: after each image comes the one whose caption is most
        similar to its swapped captions. NegCLIP takes a neighbour by CLIP's image vectors.
    """

    kind: Literal["composition"] = "composition"
    weight: float = Field(default=0.1, gt=0)
    space: Literal["target", "sentences"] = "sentences"
    words: Literal["english", "attributes"] = "english"
    hard_images: bool = True

    removed_settings: ClassVar[Mapping[str, Any]] = {"n_swaps": 4}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Swapped captions, the captions themselves, and attributes where their values are the words."""
        needs = {"swapped"}
        if self.space == "sentences":
            needs.add("sentences")
        if self.words == "attributes":
            needs.add("attributes")
        return frozenset(needs)

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.composition import CompositionTerm

        return CompositionTerm(
            self.make_scale(), in_sentences=self.space == "sentences", **self.clip_options()
        )


class CaptioningObjectiveConfig(ObjectiveConfig):
    """A small decoder that writes the image's caption from the network's local outputs (CoCa), beside a contrast.

    Terms, with numbers of words from ``encoder.captions``: the symmetric contrast of brain and text, ``contrast``; the
    mean cross-entropy of each next word; and with ``masked`` SyCoCa's text-guided masked modelling. The
    decoder looks at what queries take from the local outputs; a network without any gives its output as the only one.
    A fit with this objective writes captions of new trials (``reconstruction.captions`` of kind ``brain``).

    Parameters
    ----------
    weight
        Small compared with the contrast with images (our choice): the decoder learns to write equally fast with any
        weight, since only the brain encoder is shared, and with 1 top-1 falls by a fifth.
    reads
        The network's local outputs (``tokens``) or its whole ``output``, which is also compared with images.
    contrast
        Weight of the contrast with the caption; the weight of writing is 2, as in CoCa.
    masked
        Weight of the third term, for targets with patches; 1 in SyCoCa. The half of the patches that is most similar to
        the caption is hidden, and rebuilt from the others, the words and the brain. 0 leaves it out.
    shown
        Share of the local outputs from which words are written in training, those most similar to the caption (SyCoCa's
        attentive mask, there half); 1 uses all.
    width
        Width of the decoder, which has two layers of four heads: one uses only words, the other also the brain.
    n_queries
        Number of vectors into which local outputs are pooled (CoCa: 256, of the patches of an image).
    dropout
        Dropout in the decoder.
    """

    kind: Literal["captioning"] = "captioning"
    weight: float = Field(default=0.1, gt=0)
    reads: Literal["tokens", "output"] = "tokens"
    contrast: float = Field(default=1.0, ge=0)
    masked: float = Field(default=0.0, ge=0)
    shown: float = Field(default=1.0, gt=0, le=1)
    width: int = Field(default=128, ge=8)
    n_queries: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {"captioning": 2.0, "depth": 2, "heads": 4}

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.width % 4:
            raise ValueError(f"width {self.width} cannot be divided into four heads; make it a multiple of 4")
        if self.reads == "output":
            self.refuse_unused(
                "shown", because="with reads output there is one vector, which cannot be masked"
            )
        if self.shown < 1 and not self.contrast:
            raise ValueError(
                "shown below 1 masks the parts that are least similar to the caption, and contrast "
                "learns this similarity; give contrast a weight"
            )
        return self

    # Which optional outputs it needs is a matter of its settings here.
    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Words, and what they are written from."""
        tokens = {"local_outputs"} if self.reads == "tokens" else set()
        return frozenset({"words", *tokens, *({"patches"} if self.masked else ())})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.captioning import CaptioningOptions, CaptioningTerm

        return CaptioningTerm(
            CaptioningOptions(
                self.reads, self.contrast, self.masked, self.shown, self.width, self.n_queries, self.dropout
            )
        )  # fmt: skip


class PropagationObjectiveConfig(ObjectiveConfig):
    """Local outputs of two augmentations of a trial agree where they lie near each other in time (PixPro).

    Windows whose middles are nearer than 0.7 of the step from one to the next show the same, as in PixPro; of local
    outputs that are not windows, each is near itself alone. Beside a contrast: alone it is also met by outputs that
    are all alike. Needs augmentations, of which ``time_shift`` moves the windows of one view against those of the
    other, and a network with local outputs.

    Parameters
    ----------
    targets
        Comparison for the smoothed outputs of a view: outputs of the moving-average network (``teacher``, whose
        decay is `encoder.teacher.decay`), as in PixPro, or the network's own without gradient (``self``).
    """

    kind: Literal["propagation"] = "propagation"
    targets: Literal["teacher", "self"] = "teacher"

    removed_settings: ClassVar[Mapping[str, Any]] = {"reach_ms": None, "sharpness": 2.0}

    contrastive: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Views of local outputs, and those of the teacher where it gives the targets."""
        return frozenset({"token_views", "teacher_tokens"} if self.targets == "teacher" else {"token_views"})

    def make_term(self) -> nn.Module:
        """Return the module that computes the loss."""
        from braindecode_vis.training.objectives.captioning import PropagationTerm

        return PropagationTerm(targets=self.targets)
