"""Several brain encoders as one: the weighted mean of the directions that they predict.

Owns the average and nothing of how its members learn. A linear model and a network err in different ways, so that their
mean finds more images than either. Only the direction of each prediction from the mean of the training images is used,
since encoders shrink uncertain predictions by different amounts.

References
----------
Lakshminarayanan et al. (2017), Deep ensembles, arXiv:1612.01474: averages of trainings; directions are our choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, ImageLikelihood, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import (
    BrainEncoder,
    CaptionWriter,
    Context,
    EncoderSettings,
    GeneratorView,
)
from braindecode_vis.base.registry import Component
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import read_json, write_json

MEMBERS = ("ridge", "linear_gaussian", "network")


class AverageConfig(EncoderSettings):
    """The weighted average of the predictions of several encoders.

    Parameters
    ----------
    members
        The encoders, each fitted on the same trials; several of one kind differ in their seeds. They must predict the
        target space itself and may not learn another space (``projector``, ``fusion``, ``image_tower``). The first
        member that has learnt to predict sentences or to write captions does so for the average.
    weights
        One weight per member, normalised to a sum of one; None gives all the same weight.
    for_generator
        Number of the member, from 0, whose predictions the prior and the generator get, and whose likelihood of images
        ``prior.compare: likelihood`` uses. None gives them the average.
    """

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"for_generator"})
    kind: Literal["average"] = "average"
    members: tuple[Annotated[Any, Component("encoder", only=MEMBERS)], ...] = Field(min_length=2)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    for_generator: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check_members(self) -> AverageConfig:
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(
                f"weights has {len(self.weights)} values for {len(self.members)} members; give one "
                "weight per member, or leave weights out"
            )
        if self.for_generator is not None and self.for_generator >= len(self.members):
            raise ValueError(
                f"for_generator is {self.for_generator}, and the members are numbered 0 to {len(self.members) - 1}"
            )
        for number, member in enumerate(self.members):
            own = [
                key
                for key in ("projector", "fusion", "image_tower")
                if getattr(member, key, None) is not None
            ]
            if own:
                raise ValueError(
                    f"members[{number}] learns its own space ({own[0]}), whose predictions cannot be "
                    "averaged with others; remove it"
                )
            if getattr(member, "view_choice", None) is not None:
                raise ValueError(
                    f"members[{number}].view_choice reduces the views of each image to one vector, but "
                    "the other members predict all of them; remove it"
                )
            if getattr(member, "out_of_fold", None) is not None:
                raise ValueError(
                    f"members[{number}].out_of_fold applies to one encoder, but an average is refitted "
                    "as a whole; remove it"
                )
            unmet = [key for key in ("reads_text", "uses_pretraining") if getattr(member, key)]
            if unmet:
                raise ValueError(
                    f"members[{number}] needs {unmet[0]}, which an average does not pass to its members; "
                    "train it separately"
                )
        return self

    @property
    def may_know_likelihood(self) -> bool:  # type: ignore[override]
        """Whether the member that is asked for images may say how likely they are."""
        if self.for_generator is None:
            return False
        return bool(self.members[self.for_generator].may_know_likelihood)

    @property
    def writes_captions(self) -> bool:  # type: ignore[override]
        """Whether a member learns to write captions of trials."""
        return any(member.writes_captions for member in self.members)

    @property
    def trains_prior(self) -> bool:  # type: ignore[override]
        """Whether the member that is asked for images trains a prior beside itself."""
        return self.for_generator is not None and bool(self.members[self.for_generator].trains_prior)

    def build(self, *, seed: int) -> AverageEncoder:
        """Return the unfitted encoder."""
        return AverageEncoder(self, seed=seed)


class AverageEncoder(BrainEncoder):
    """The brain encoder; see the module."""

    def __init__(self, config: AverageConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        #: The members, fitted or not.
        self.members: list[Any] = [
            roles.build(BrainEncoder, member, seed=derive_seed(seed, "average", number))
            for number, member in enumerate(config.members)
        ]
        #: Mean training embedding of shape (n_features,), typical distance of one from it, and the target's space.
        self.centre: np.ndarray | None = None
        self.length, self.space = 1.0, ""

    @property
    def label_free_subjects(self) -> tuple[str, ...]:  # type: ignore[override]
        """Subjects that a member aligned by the trials that were predicted."""
        return tuple(sorted({name for member in self.members for name in member.label_free_subjects}))

    def bind(self, context: Context) -> None:
        """Hand on what the pipeline lends, with a folder of checkpoints for each member."""
        for number, member in enumerate(self.members):
            member.bind(context.take_part(f"member{number}"))

    def fit(self, responses: Responses, targets: Embeddings) -> AverageEncoder:
        """Fit every member.

        Parameters
        ----------
        responses
            Training trials.
        targets
            One row per trial, in the order of `responses`.
        """
        for member in self.members:
            member.fit(responses, targets)
        _, first = np.unique(targets.ids.astype(str), return_index=True)  # an image counts once
        images = targets.flat()[first].astype(np.float64)
        centre = images.mean(axis=0)
        self.length = float(np.sqrt(((images - centre) ** 2).sum(axis=1).mean()))
        self.centre, self.space = centre.astype(np.float32), targets.space
        return self

    def list_held_out(self, responses: Responses) -> tuple[str, ...]:
        """Return the images that any member would hold out of these trials."""
        return tuple(sorted({str(i) for member in self.members for i in member.list_held_out(responses)}))

    def predict(self, responses: Responses) -> Embeddings:
        """Return the mean of the members' predictions by direction, shorter where they disagree."""
        if self.centre is None:
            raise DataError("the average of encoders has not been fitted; run train first.")
        total: Any = 0
        for weight, member in zip(self._weights, self.members, strict=True):
            found = member.predict(responses)
            away = found.flat() - self.centre
            total = total + weight * away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12)
        vectors = (self.centre + self.length * total).astype(np.float32)
        return Embeddings(vectors.reshape(found.vectors.shape), responses.stimulus_ids, self.space)

    @property
    def _weights(self) -> np.ndarray:
        weights = np.array(self.config.weights or [1.0] * len(self.members))
        return np.asarray(weights / weights.sum())

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `predict` as a torch module, and these trials as its inputs; every member must be one, too."""
        from braindecode_vis.encoders.linear_prediction import AveragePrediction

        found = [member.as_module(responses) for member in self.members]
        shape = self.predict(responses.select(np.arange(1))).vectors.shape[1:]
        assert self.centre is not None  # as `predict` has found
        # Networks number the same training trials' subjects in the same order.
        inputs = {name: tensor for _, own in found for name, tensor in own.items()}
        asks = [(module, "subject" in own) for module, own in found]
        module = AveragePrediction(asks, self._weights, self.centre, self.length, shape=shape)
        return module, inputs

    @property
    def generator_view(self) -> GeneratorView | None:
        """What the member that is asked for images predicts for the generator; None without one."""
        member = self._for_generator
        if member is None:
            return None
        own = member.generator_view
        prior = None if own is None else own.prior
        # Others than those that are compared, which are means over the members.
        return GeneratorView(
            member.predict_for_generator, member.map_for_generator, member.predicts_targets, False, prior
        )

    @property
    def likelihood(self) -> ImageLikelihood | None:
        """How likely images are for the member that is asked for them; None without one."""
        member = self._for_generator
        return None if member is None else member.likelihood

    @property
    def captions(self) -> CaptionWriter | None:
        """Captions by the first member that writes any."""
        return next((found for member in self.members if (found := member.captions) is not None), None)

    def describe(self, responses: Responses, n_beams: int = 1) -> list[str]:
        """Return captions by the first member that writes any."""
        return self._find_writer().write(responses, n_beams)

    def describe_mean(self, n_beams: int = 1) -> str:
        """Return that member's caption of no response in particular."""
        return self._find_writer().write_mean(n_beams)

    def _find_writer(self) -> CaptionWriter:
        if (writer := self.captions) is None:
            raise ConfigError(
                "no member of the average writes captions; add {kind: captioning} to the objectives of a network."
            )
        return writer

    def predict_sentences(self, responses: Responses) -> Embeddings | None:
        """Return sentence vectors of the first member that predicts any; None without one."""
        every = (member.predict_sentences(responses) for member in self.members)
        return next((found for found in every if found is not None), None)

    @property
    def _for_generator(self) -> BrainEncoder | None:
        number = self.config.for_generator
        return None if number is None else self.members[number]

    def write(self, folder: Path) -> None:
        """Write the members into folders of their own, and the centre."""
        if self.centre is None:
            raise DataError("the average of encoders has not been fitted; run train first.")
        for number, member in enumerate(self.members):
            own = folder / f"member{number}"
            own.mkdir(parents=True, exist_ok=True)
            member.write(own)
        np.save(folder / "centre.npy", self.centre)
        write_json(folder / "average.json", {"seed": self.seed, "length": self.length, "space": self.space})

    def read(self, folder: Path) -> AverageEncoder:
        """Read what `write` wrote."""
        about = read_json(folder / "average.json")
        self.members = [
            roles.read(BrainEncoder, member, folder / f"member{number}")
            for number, member in enumerate(self.config.members)
        ]
        self.centre = np.load(folder / "centre.npy")
        self.seed, self.length, self.space = about["seed"], about["length"], about["space"]
        return self
