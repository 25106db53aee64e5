"""Multistage contrastive learning: further trainings whose negatives share what the earlier ones have learnt (MCL).

Owns the settings, the stages one after another, and the fitted encoder that puts their outputs side by side. After a
stage the training images are clustered by what it has learnt, and the labels of all stages so far are multiplied; the
next stage draws each batch inside one label, where those features tell nothing any more, so that others are learnt.
Each stage is a `NetworkEncoder`, which knows nothing of the others but the labels.

Predictions and images are compared in the concatenation of the stages' spaces, each brought to unit length: the mean of
the stages' cosines. What a prior or a generator learns from is the first stage's, whose negatives are all images.

References
----------
Zhang et al. (2024), Learning the Unlearned, arXiv:2402.11816; MajorDavidZhang/MCL@cab98c1 (cluster.py, data.py).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.base.contracts import (
    BrainEncoder,
    CaptionWriter,
    Context,
    FewTrialAdaptation,
    GeneratorView,
)
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import read_json, write_json
from braindecode_vis.training.network_config import NetworkEncoderConfig

if TYPE_CHECKING:
    from braindecode_vis.training.fitted import NetworkFit
    from braindecode_vis.training.network_encoder import NetworkEncoder

_FILE = "multistage.json"


class MultistageConfig(NetworkEncoderConfig):
    """Several trainings of one network; from the second on, batches are drawn inside one cluster (MCL).

    All settings of `NetworkEncoderConfig` hold for every stage; the first stage is what they would train alone, and all
    hold out the same images.

    Parameters
    ----------
    n_stages
        Trainings in all.
    stage_start
        Where the weights of a further stage begin: ``anew``, from a draw of their own, or where the ``previous`` one
        ended, as MCL's code begins with a trained CLIP.
    stage_clusters
        Clusters that each label is multiplied by after a stage; 10 in MCL. Labels of fewer than eight images are put
        together, where MCL's code leaves out those that fill no batch.
    cluster_by
        What images are clustered by: their mean predicted embedding (``brain``, a choice of ours: the image side is
        frozen here, and would give the same clusters after every stage), or their ``image`` side, as in MCL, where it
        is learnt (projector, fusion, image_tower).
    """

    kind: Literal["multistage"] = "multistage"  # type: ignore[assignment]
    n_stages: int = Field(default=2, ge=2)
    stage_clusters: int = Field(default=10, ge=2)
    stage_start: Literal["anew", "previous"] = "anew"
    cluster_by: Literal["brain", "image"] = "brain"

    trains_in_processes: ClassVar[bool] = True

    def make_stage(self) -> NetworkEncoderConfig:
        """Return the settings of one training."""
        names = [name for name in NetworkEncoderConfig.model_fields if name != "kind"]
        return NetworkEncoderConfig.model_validate({name: getattr(self, name) for name in names})

    def build(self, *, seed: int) -> MultistageEncoder:  # type: ignore[override]
        """Return the unfitted encoder."""
        return MultistageEncoder(self, seed=seed)

    def read(self, folder: Path) -> MultistageEncoder:  # type: ignore[override]
        """Return the fitted encoder that was written into `folder`."""
        return MultistageEncoder.read(self, folder)


class MultistageEncoder(BrainEncoder):
    """Networks of several stages in the role of one `BrainEncoder`.

    Parameters
    ----------
    config
        The settings.
    seed
        Root of all draws; the first stage is a `NetworkEncoder` of this seed.

    Attributes
    ----------
    stages : list of NetworkEncoder
        Fitted ones, in the order of training.
    labels : list of dict
        Label of each training image, in which the batches of each further stage were drawn.
    workspace, progress
        As of a `NetworkEncoder`.
    """

    def __init__(self, config: MultistageConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.stages: list[NetworkEncoder] = []
        self.labels: list[dict[str, int]] = []
        self.workspace: Path | None = None
        self.progress: Callable[[int, int, str], None] | None = None
        self._context: Context | None = None

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends to each stage."""
        self._context = context
        self.workspace, self.progress = context.checkpoints, context.progress
        for number, stage in enumerate(self.stages):
            self._lend(stage, number)

    def _lend(self, stage: NetworkEncoder, number: int) -> None:
        if self._context is not None:
            stage.bind(self._context)
        stage.workspace = None if self.workspace is None else self.workspace / f"stage{number}"
        told = self.progress
        if told is not None:
            name = f"stage {number + 1} of {self.config.n_stages}"
            stage.progress = lambda done, total, text: told(done, total, f"{name}, {text}")

    # --- training -----------------------------------------------------------------------------------------

    def fit(self, responses: Responses, targets: Embeddings) -> MultistageEncoder:
        """Train the stages one after another; checkpoints of a killed training are continued.

        Parameters
        ----------
        responses, targets
            As for `NetworkEncoder.fit`.
        """
        from braindecode_vis.base.devices import compute_once
        from braindecode_vis.training.network_encoder import NetworkEncoder

        self.stages, self.labels = [], []
        for number in range(self.config.n_stages):
            # Weights and batches of its own, but the same images held out: no stage learns what another is judged by.
            seed = self.seed if not number else derive_seed(self.seed, "stage", number)
            stage = NetworkEncoder(self.config.make_stage(), seed=seed)
            stage.hold_out_seed = self.seed
            stage.groups = self.labels[-1] if self.labels else None
            if self.stages:
                stage.sentence_memory = self.first.sentence_memory
            if self.stages and self.config.stage_start == "previous":
                weights = self.stages[-1].require_fit().model.state_dict()
                stage.start = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self._lend(stage, number)
            self.stages.append(stage.fit(responses, targets))
            if len(self.stages) < self.config.n_stages:
                # One process divides for all: rounding could part them.
                self.labels.append(compute_once(lambda: self._divide(responses, targets)))
        return self

    def _divide(self, responses: Responses, targets: Embeddings) -> dict[str, int]:
        """Return the label of each image after the last stage: that before it, times the clusters of what it learnt."""
        from braindecode_vis.training.batches import code_trials, gather_groups
        from braindecode_vis.training.image_side import cluster_images

        stage, n_clusters = self.stages[-1], self.config.stage_clusters
        ids, stimuli, _ = code_trials(responses)
        if self.config.cluster_by == "brain":
            vectors = _make_unit(stage.require_fit(), stage.predict(responses))
        else:
            vectors = _make_unit(stage.require_fit(), stage.map_targets(targets))
        means = np.zeros((len(ids), vectors.shape[1]), dtype=np.float64)
        np.add.at(means, stimuli, vectors)
        names = [str(name) for name in ids]
        learnt = np.flatnonzero(~np.isin(names, stage.require_fit().held_out))
        seed = derive_seed(self.seed, "stage clusters", len(self.stages))
        # Directions alone are compared: a sum is as good as a mean.
        clusters = cluster_images(means.astype(np.float32), learnt, n_clusters, seed=seed)
        before = self.labels[-1] if self.labels else dict.fromkeys(names, 0)
        labels = {name: before[name] * n_clusters + int(c) for name, c in zip(names, clusters, strict=True)}
        if len(gather_groups(np.array([labels[names[i]] for i in learnt]), learnt)) < 2:
            warnings.warn(
                f"stage {len(self.stages) + 1} draws its batches from all {len(learnt)} training images, "
                "like the first stage, since few clusters have eight images; lower encoder.stage_clusters.",
                Notice,
                stacklevel=4,
            )
        return labels

    def list_held_out(self, responses: Responses) -> tuple[str, ...]:
        """Return the images that `fit` would hold out of these trials."""
        from braindecode_vis.training.network_encoder import NetworkEncoder

        return NetworkEncoder(self.config.make_stage(), seed=self.seed).list_held_out(responses)

    def adapt(self, responses: Responses, targets: Embeddings, **options: Any) -> MultistageEncoder:
        """Return an encoder each of whose stages goes on learning from a few trials; see `NetworkEncoder.adapt`."""
        self.first.require_fit()
        other = self._copy()
        other.stages = [stage.adapt(responses, targets, **options) for stage in self.stages]
        return other

    def align_subjects(self, responses: Responses) -> MultistageEncoder:
        """Return an encoder that also knows the alignment of new subjects; see `NetworkEncoder.align_subjects`."""
        other = self._copy()
        other.stages = [stage.align_subjects(responses) for stage in self.stages]
        return other

    def _copy(self) -> MultistageEncoder:
        other = MultistageEncoder(self.config, seed=self.seed)
        other.labels, other._context = self.labels, self._context
        other.workspace, other.progress = self.workspace, self.progress
        return other

    # --- prediction ---------------------------------------------------------------------------------------

    def predict(self, responses: Responses) -> Embeddings:
        """Return the stages' outputs side by side, one row per trial, each part of unit length."""
        self.require_fit()
        parts = [_make_unit(stage.require_fit(), stage.predict(responses)) for stage in self.stages]
        return Embeddings(np.concatenate(parts, axis=1), responses.stimulus_ids, self.comparison_space)

    def map_targets(self, embeddings: Embeddings, subject: str | None = None) -> Embeddings:
        """Return image embeddings in the space of `predict`; see `NetworkEncoder.map_targets`."""
        self.require_fit()
        parts = [_make_unit(s.require_fit(), s.map_targets(embeddings, subject)) for s in self.stages]
        return Embeddings(np.concatenate(parts, axis=1), embeddings.ids, self.comparison_space)

    @property
    def comparison_space(self) -> str:
        """Name of the space of `predict`, by the spaces of the stages and how they scale targets."""
        digest = hashlib.sha256()
        for stage in self.stages:
            digest.update(stage.comparison_space.encode())
            for name, value in sorted(stage.require_fit().model.target_scale.state_dict().items()):
                digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return f"{self.require_fit().space}/multistage-{len(self.stages)}-{digest.hexdigest()[:12]}"

    @property
    def generator_view(self) -> GeneratorView:
        """The first stage's prediction of the targets."""
        own = self.first.generator_view
        return GeneratorView(own.predict, own.map_targets, own.predicts_targets)

    @property
    def adaptation(self) -> FewTrialAdaptation:
        """See `adapt`."""
        return FewTrialAdaptation(self.adapt)

    @property
    def captions(self) -> CaptionWriter | None:
        """Captions that the first stage writes."""
        return self.first.captions

    def describe(self, responses: Responses, n_beams: int = 1) -> list[str]:
        """Return the captions that the first stage writes; see `NetworkEncoder.describe`."""
        return self.first.describe(responses, n_beams)

    def describe_mean(self, n_beams: int = 1) -> str:
        """Return the first stage's caption of no response in particular."""
        return self.first.describe_mean(n_beams)

    def predict_sentences(self, responses: Responses) -> Embeddings | None:
        """Return the first stage's sentence vectors; None without a head."""
        return self.first.predict_sentences(responses)

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict training trials by networks that have not learnt from their images.

        In the space of the targets where the first stage predicts it, by its refits or its held-out trials; else the
        held-out trials in the space of `predict`, since all stages hold out the same.
        """
        if self.predicts_targets:
            return self.first.predict_out_of_fold(responses, targets)
        held = np.isin(responses.stimulus_ids.astype(str), self.require_fit().held_out)
        return self.predict(responses.select(np.flatnonzero(held)))

    @property
    def first(self) -> NetworkEncoder:
        """The first stage, whose negatives were all images."""
        if not self.stages:
            raise DataError("the multistage encoder has not been fitted; run train first.")
        return self.stages[0]

    def require_fit(self) -> NetworkFit:
        """Return the fit of the first stage, or raise `DataError` before there is one."""
        return self.first.require_fit()

    @property
    def has_subject_galleries(self) -> bool:  # type: ignore[override]
        """Whether each subject's predictions must be searched in a gallery of its own."""
        return self.first.has_subject_galleries

    @property
    def label_free_subjects(self) -> tuple[str, ...]:  # type: ignore[override]
        """Subjects whose alignment was computed from the trials that were predicted."""
        return self.first.label_free_subjects

    @property
    def messages(self) -> list[str]:
        """What a reader of the results should know, of all stages."""
        return list(dict.fromkeys(message for stage in self.stages for message in stage.messages))

    def hold_out(self, responses: Responses, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
        """Return rows to learn from, rows held out and what was held out whole; the same in every stage."""
        return self.first.hold_out(responses, rows)

    def score_held_out(self, responses: Responses, targets: Embeddings, **options: Any) -> dict[str, Any]:
        """Return what the first stage scores on held-out trials; see `NetworkEncoder.score_held_out`."""
        return self.first.score_held_out(responses, targets, **options)

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `predict` as a torch module, and these trials as its inputs."""
        from braindecode_vis.training.fitted import StackedPrediction, take_inputs

        fits = [stage.require_fit() for stage in self.stages]
        return StackedPrediction(fits).eval(), take_inputs(fits[0], responses)

    # --- files --------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write the first stage as a network of its own, the others into folders beside it."""
        self.first.write(folder)
        for number, stage in enumerate(self.stages[1:], start=1):
            (folder / f"stage{number}").mkdir(exist_ok=True)
            stage.write(folder / f"stage{number}")
        labels = [{"ids": list(own), "labels": list(own.values())} for own in self.labels]
        write_json(folder / _FILE, {"n_stages": len(self.stages), "seed": self.seed, "labels": labels})

    @classmethod
    def read(cls, config: MultistageConfig, folder: Path) -> MultistageEncoder:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If it was written with other settings.
        """
        from braindecode_vis.training.network_encoder import NetworkEncoder

        record, settings = read_json(folder / _FILE), config.make_stage()
        if record["n_stages"] != config.n_stages:
            raise DataError(
                f"{folder} holds {record['n_stages']} stages, but encoder.n_stages is {config.n_stages}; "
                "set it to the trained number, or train again."
            )
        encoder = cls(config, seed=record["seed"])
        for number in range(config.n_stages):
            stage = NetworkEncoder.read(settings, folder / f"stage{number}" if number else folder)
            stage.hold_out_seed = encoder.seed
            encoder.stages.append(stage)
        encoder.labels = [dict(zip(own["ids"], own["labels"], strict=True)) for own in record["labels"]]
        for stage, labels in zip(encoder.stages[1:], encoder.labels, strict=True):
            stage.groups = labels
        return encoder


def _make_unit(fit: NetworkFit, embeddings: Embeddings) -> np.ndarray:
    """Return what a stage compares, float32 of shape (n, d) and unit length, of its outputs or mapped images."""
    import torch

    flat = embeddings.flat()
    if not fit.model.learns_space:
        # Back from the units of the targets to the scaled ones of the training.
        place = next(fit.model.parameters()).device
        with torch.inference_mode():
            flat = fit.model.target_scale(torch.from_numpy(np.array(flat)).to(place)).cpu().numpy()
    return normalise_rows(flat)
