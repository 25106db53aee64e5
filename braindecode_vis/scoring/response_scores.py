"""Scores of responses: whether reconstructions explain the measured responses.

Owns the encoding model of each fold and subject, its regions, and the noise ceilings beside it. The model is
fitted on training trials alone; test responses are opened for the comparison only. ``seen`` is the ceiling of the model
(the image that was really on the screen), ``noise_ceiling`` that of the recording. A decoded image carries the noise of
the response it was decoded from, which is the one it is compared with here, so it can score above ``seen``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses, Score, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.contracts import ImageEncoder
from braindecode_vis.base.registry import Component
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.preprocessing.noise_ceiling import (
    CeilingMeasure,
    ResponseCeiling,
    compute_noise_ceilings,
)
from braindecode_vis.preprocessing.voxel_geometry import read_geometry
from braindecode_vis.scoring.metrics.brain_correlation import (
    correlate_responses,
    fit_encoding_model,
    predict_responses,
)
from braindecode_vis.scoring.metrics.image import ImageTable, make_image_table
from braindecode_vis.scoring.units import Units


class BrainScoresConfig(Settings):
    """The encoding model that tests reconstructions, for responses of voxels or parcels.

    Parameters
    ----------
    features
        Image encoder of the model: the embedded network by default, ``pixels`` for small images.
    ridge
        Candidates for its penalty, chosen within the training trials.
    regions
        Sets of regions (names in the data set's geometry); every region gets a row.
    """

    features: Annotated[
        Any,
        Component(
            "target",
            only=("efficientnet-lite0", "pixels", "openclip", "timm", "torchvision", "transformers"),
        ),
    ] = Field(default={"kind": "efficientnet-lite0"})
    ridge: RidgeConfig = RidgeConfig()
    regions: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_ridge(self) -> Self:
        if self.ridge.n_features != (None,):
            raise ValueError("brain.ridge.n_features must stay [null]: the model regresses on all features")
        return self


@dataclass(frozen=True)
class BrainTask:
    """What is compared.

    Parameters
    ----------
    config
        The encoding model.
    folds
        Training and test trials of each fold; of the test trials one per image, repetitions averaged.
    stimuli
        All images.
    ids, subjects : arrays of shape (n_rows,)
        Stimulus and subject of each reconstruction.
    seen, images
        As in `ScoringTask`.
    ceilings
        Noise ceilings by subject, if they are known.
    protocol, split, seed, n_bootstrap, n_permutations, units
        As in `ScoringTask`.
    """

    config: BrainScoresConfig
    folds: Sequence[tuple[Responses, Responses]]
    stimuli: StimulusSet
    ids: np.ndarray
    subjects: np.ndarray
    seen: np.ndarray
    images: Mapping[str, np.ndarray]
    ceilings: Mapping[str, ResponseCeiling]
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 1000
    n_permutations: int = 10_000
    units: Units | None = None


def score_brain(task: BrainTask) -> tuple[list[Score], list[str]]:
    """Return rows ``brain_correlation@all`` (and per region) of every method, and what could not be computed.

    With several folds, predictions and responses are centred within each fold before they are correlated over all
    images, since folds have different training means.

    Raises
    ------
    ConfigError
        If the responses have no voxels, or a set of regions is unknown.
    """
    first = task.folds[0][0]
    if len(first.dims) != 2:
        raise ConfigError(
            f"evaluation.brain predicts responses of voxels or parcels, but these have the dims {first.dims}; leave it "
            "out for this data set."
        )
    # The permutation null is the shuffled control, with every shuffle in place of one.
    made = {name: stack for name, stack in task.images.items() if name != "shuffled"}
    table = make_image_table(task.seen, {"seen": task.seen, **made})
    encoder = roles.build(ImageEncoder, task.config.features)
    encoder.fit(
        iter(task.seen[:1])
    )  # the target `pixels` takes its size from it; pretrained ones learn nothing
    features = np.asarray(encoder.encode(iter(table.images)))
    # Training images in the size of the reconstructions, so that resolution does not tell them apart.
    height, width = task.seen.shape[1:3]
    ids = list(dict.fromkeys(str(i) for train, _ in task.folds for i in train.stimulus_ids))
    small = (resize_image(task.stimuli.read_image(i), height, width) for i in ids)
    training = Embeddings(np.asarray(encoder.encode(small)), ids, encoder.space)
    scores: list[Score] = []
    lacking: list[str] = []
    for who in sorted({str(s) for s in task.subjects}):
        try:
            scores += _score_subject(task, table, Features(features, training, encoder.space), who)
        except _NotComputable as error:
            lacking.append(f"brain_correlation of subject {who} not computed: {error}")
    return scores, lacking


class _NotComputable(Exception):
    """The trials of a subject do not allow the comparison."""


@dataclass(frozen=True)
class Features:
    """Features of the distinct images of the table, embeddings of the training images, and their space."""

    made: np.ndarray
    training: Embeddings
    space: str


def _score_subject(task: BrainTask, table: ImageTable, features: Features, who: str) -> Iterator[Score]:
    rows = np.flatnonzero(task.subjects.astype(str) == who)
    ids = [str(i) for i in task.ids[rows]]
    if len(set(ids)) < len(ids):
        raise _NotComputable("it needs one row per image; set repeats.test to averaged and repeat no image")
    parts = [_fit_fold(task, table, features, who, fold, rows) for fold in task.folds]
    kept = [part for part in parts if part is not None]
    order = np.concatenate([part.rows for part in kept]) if kept else np.empty(0, int)
    if len(order) < 3:
        raise _NotComputable("a correlation needs at least three test images")
    measured = np.concatenate([part.measured for part in kept])
    regions = _find_regions(task, who, measured.shape[1])
    ceiling = task.ceilings.get(who)
    units = None if task.units is None else task.units.select(order)
    for method in table.made:
        predictions = list(np.concatenate([part.predicted[method] for part in kept], axis=1))
        found = correlate_responses(
            predictions, measured, regions=regions, n_boot=task.n_bootstrap,
            n_permutations=task.n_permutations, seed=task.seed, clusters=None if units is None else units.labels,
            unit="image" if units is None else units.unit, over_folds=len(task.folds) > 1,
        )  # fmt: skip
        for name, region in found.regions.items():
            bound = None
            # Of the recording, so it bounds what predicts responses, and not how bad a control is.
            if ceiling is not None and method in ("decoded", "seen"):
                bound = ceiling.bound(regions.get(name, slice(None)))
            yield Score(
                method=method, metric=f"brain_correlation@{name}", value=region.value, chance=region.chance,
                n_queries=found.n_images, protocol=task.protocol, subject=who, split=task.split, seed=task.seed,
                ci_low=region.interval.low, ci_high=region.interval.high, p_value=region.p_value,
                noise_ceiling=bound,
                resampled=region.interval.resampled,
            )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """Rows of one fold and subject, responses to them, and what each method makes the model expect in each round."""

    rows: np.ndarray
    measured: np.ndarray
    predicted: dict[str, np.ndarray]


def _fit_fold(
    task: BrainTask,
    table: ImageTable,
    features: Features,
    who: str,
    fold: tuple[Responses, Responses],
    rows: np.ndarray,
) -> _Part | None:
    """Fit the model on one subject's training trials of a fold and apply it; None if the fold tests none."""
    train, test = (np.flatnonzero((part.trials["subject"] == who).to_numpy()) for part in fold)
    if not len(test):
        return None
    if len(train) < 2:
        raise _NotComputable("the fold has no training trials of this subject")
    n_own = count_own_voxels(fold[0]).get(who)  # None slices nothing: all subjects share the voxels
    place = {str(task.ids[row]): row for row in rows}
    names = [str(i) for i in fold[1].stimulus_ids[test]]
    if len(set(names)) < len(names) or any(name not in place for name in names):
        raise _NotComputable("test trials and reconstructions do not correspond one to one")
    own = np.array([place[name] for name in names])
    ids = [str(i) for i in fold[0].stimulus_ids[train]]
    model = fit_encoding_model(
        features.training.select(ids), np.asarray(fold[0].data[train])[:, :n_own],
        ridge=task.config.ridge, seed=task.seed,
    )  # fmt: skip
    # Every distinct image once: rows that show one image must be expected to cause exactly the same response.
    used = np.unique(np.concatenate([several[:, own].ravel() for several in table.made.values()]))
    expected = predict_responses(
        model, Embeddings(features.made[used], [str(n) for n in used], features.space)
    )
    predicted = {
        method: expected[np.searchsorted(used, several[:, own])] for method, several in table.made.items()
    }
    measured = np.asarray(fold[1].data[test], dtype=np.float64)[:, :n_own]
    if len(task.folds) > 1:  # folds have different training means, which would correlate over images
        measured = measured - measured.mean(axis=0)
        predicted = {method: stack - stack.mean(axis=1, keepdims=True) for method, stack in predicted.items()}
    return _Part(own, measured, predicted)


def _find_regions(task: BrainTask, who: str, n_columns: int) -> dict[str, np.ndarray]:
    """Return the voxels of each region of the wanted sets that has any."""
    if not task.config.regions:
        return {}
    responses = task.folds[0][0]
    try:
        geometry = read_geometry(responses, who if responses.coords.get("subjects") else None)
    except DataError as error:
        raise ConfigError(
            "evaluation.brain.regions needs responses with regions, but these have none; leave it out."
        ) from error
    found = {}
    for name in task.config.regions:
        check_option("evaluation.brain.regions", name, geometry.rois)
        roi = geometry.rois[name]
        if len(roi.labels) != n_columns:
            raise ConfigError(
                f"the regions {name!r} describe {len(roi.labels)} features, but the responses have "
                f"{n_columns}; leave evaluation.brain.regions out if features are parcels."
            )
        for label in sorted({int(v) for v in np.unique(roi.labels) if v > 0}):
            found[roi.names.get(label, f"{name}-{label}")] = roi.labels == label
    return found


# --- noise ceilings ---------------------------------------------------------------------------------------


def find_response_ceilings(
    responses: Responses, rows: np.ndarray, *, measure: CeilingMeasure, averaged: bool, seed: int
) -> tuple[dict[str, ResponseCeiling], list[str]]:
    """Return the noise ceiling of each subject's responses, or a sentence on why there is none.

    Parameters
    ----------
    responses
        Single trials.
    rows
        The test trials.
    measure, averaged, seed
        As for `compute_noise_ceilings`.
    """
    try:
        if len(responses.dims) != 2:
            raise DataError("the responses have no voxels.")
        found = compute_noise_ceilings(responses, rows, averaged=averaged, measure=measure, seed=seed)
    except DataError as error:
        return {}, [f"noise ceiling of the responses ({measure}) not computed: {error}"]
    return {ceiling.subject: ceiling for ceiling in found}, []


def tabulate_ceilings(ceilings: Mapping[str, ResponseCeiling]) -> list[dict[str, Any]]:
    """Return one row per subject: ceiling and share of signal with intervals, and the ceilings of single voxels."""
    table = []
    for who, ceiling in ceilings.items():
        single = ceiling.per_feature
        low, middle, high, top = np.quantile(single, [0.25, 0.5, 0.75, 0.95])
        known = not np.isnan(ceiling.low)  # a published map comes without its images
        table.append(
            {
                "subject": who, "columns": len(single), "ceiling": ceiling.value,
                "ceiling from": ceiling.interval[0] if known else None,
                "ceiling to": ceiling.interval[1] if known else None,
                "share of signal": float(ceiling.share.mean()), "share from": ceiling.low if known else None,
                "share to": ceiling.high if known else None, "median of columns": float(middle),
                "lower quartile": float(low), "upper quartile": float(high), "95th percentile": float(top),
                "columns above 0.3": float((single > 0.3).mean()),
                "repetitions averaged": ceiling.n_averaged, "images": ceiling.n_images, "estimated by": ceiling.source,
            }
        )  # fmt: skip
    return table
