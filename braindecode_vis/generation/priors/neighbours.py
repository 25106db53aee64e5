"""Move a prediction toward its most similar images: a prior without parameters.

The images that exist, as embeddings, are the prior: Naselaris et al. weighed six million photographs by how well each
explains a response. Here the mean of the nearest images stands for the manifold of images, and the prediction is moved
part of the way to it; halfway, what distinguishes predictions is kept. Directions are compared from the
training mean, as in retrieval, so that neither a shrunk prediction nor one of unit length needs a scale of its own. A
brain encoder that knows how likely an image is can weigh the images by that instead, as Naselaris et al. did.
Nothing is random, and no prediction of training trials is needed.

References
----------
Naselaris, T. et al. (2009). Bayesian reconstruction of natural images from human brain activity. Neuron 63, 902-915.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import (
    Embeddings,
    ImageLikelihood,
    check_same_space,
    find_largest,
    normalise_rows,
)
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, Prior
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.priors.closed_form import IdentityPrior
from braindecode_vis.generation.priors.image_source import ImageSourceSettings, iterate_rows, keep_distinct
from braindecode_vis.generation.priors.scales import turn_rows

UNKNOWN_LIKELIHOOD = (
    "prior.compare is likelihood, but the brain encoder cannot compute the likelihood of an image; set "
    "encoder.kind to linear_gaussian (in an average, set encoder.for_generator to the number of such a "
    "member), or prior.compare to "
    "direction"
)


class NeighboursPriorConfig(ImageSourceSettings):
    """Move predictions toward the mean of their nearest images.

    Parameters
    ----------
    images
        Where the images come from; see `ImageSourceSettings`.
    n_neighbours
        Images that are averaged.
    pull
        How far the direction moves, from 0 (not at all) to 1 (onto the neighbours' mean).
    compare
        ``direction`` takes the nearest images with equal weights; ``likelihood`` takes the most likely images, weighted
        by their probability given the response, for a brain encoder that computes it (``linear_gaussian``).
    power
        Exponent of the probabilities: below 1 it corrects a response model that is too certain, and more images
        contribute.
    """

    kind: Literal["neighbours"] = "neighbours"
    n_neighbours: int = Field(default=16, ge=1)
    pull: float = Field(default=0.5, ge=0, le=1)
    compare: Literal["direction", "likelihood"] = "direction"
    power: float = Field(default=1, gt=0, le=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"compare", "power"})
    needs_predictions: ClassVar[bool] = False

    @property
    def asks_likelihood(self) -> bool:  # type: ignore[override]
        """Whether the brain encoder must say how likely images are."""
        return self.compare == "likelihood"

    @model_validator(mode="after")
    def _check_used(self) -> NeighboursPriorConfig:
        if self.compare == "direction":
            self.refuse_unused("power", because="compare direction weights all neighbours equally")
        return self

    def describe_choices(self) -> list[str]:
        """Return how far its embeddings lie from the predictions, where that is not the whole way."""
        return (
            [f"images from embeddings {100 * self.pull:g} % of the way to the prior's"]
            if self.pull < 1
            else []
        )

    def build(self, *, seed: int = 0) -> NeighboursPrior:
        """Return the unfitted prior; nothing in it is random."""
        return NeighboursPrior(self)


class NeighboursPrior(Prior):
    """The images, and mean and length of the training images; see the module."""

    def __init__(self, config: NeighboursPriorConfig) -> None:
        self.config, self.length, self.context = config, 1.0, NOTHING_LENT
        self.images: Embeddings | None = None
        self.mean: np.ndarray | None = None
        self.likelihood: ImageLikelihood | None = None

    def bind(self, context: Context) -> None:
        """Take the brain encoder, which is asked how likely images are where the settings say so."""
        self.context = context

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> NeighboursPrior:
        """Keep the images; nothing is learnt but the mean and the length of the training images.

        Parameters
        ----------
        predicted
            Not looked at.
        target
            Embeddings of training images. Directions are measured from their mean, and draws get their root mean
            square distance from it; each image counts once.
        images
            The images to be near to; those of `target` where they are not given.

        Raises
        ------
        DataError
            If the spaces differ.
        ConfigError
            If there are fewer images than neighbours.
        """
        distinct = keep_distinct(target)
        known = distinct if images is None else images
        check_same_space(distinct, known)
        if len(known) < self.config.n_neighbours:
            raise ConfigError(
                f"prior.n_neighbours is {self.config.n_neighbours}, more than the {len(known)} images of "
                "prior.images; set fewer neighbours, or give more images."
            )
        if self.config.compare == "likelihood":
            encoder = self.context.encoder
            self.likelihood = None if encoder is None else encoder.likelihood
            if self.likelihood is None:
                raise ConfigError(f"{UNKNOWN_LIKELIHOOD}.")
        # Of the run's own images, whatever images are known: predictions lie about their mean.
        rows = distinct.flat()
        mean = rows.mean(axis=0, dtype=np.float64)
        length = float(np.sqrt(((rows - mean) ** 2).sum(axis=1).mean()))
        self.images, self.mean, self.length = known, mean.astype(np.float32), length
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return each moved prediction `n_draws` times, draws of one row next to each other."""
        images, mean = self._require_fit()
        check_same_space(predicted, images)
        own = normalise_rows(predicted.flat() - mean)  # lengths of predictions carry nothing
        counts = np.ones(len(own)) if predicted.n_averaged is None else predicted.n_averaged
        near = self._average_neighbours(predicted.flat(), own, counts) - mean
        vectors = mean + self.length * turn_rows(own, near, self.config.pull)
        shaped = vectors.astype(np.float32).reshape(predicted.vectors.shape)
        moved = Embeddings(shaped, predicted.ids, predicted.space)
        return IdentityPrior().sample(moved, n_draws=n_draws, seed=seed)

    def _average_neighbours(
        self, predicted: np.ndarray, directions: np.ndarray, n_averaged: np.ndarray
    ) -> np.ndarray:
        """Return the mean of the images nearest to each direction, or likeliest, shape (n_rows, n_features)."""
        images, mean = self._require_fit()
        k, n = self.config.n_neighbours, len(directions)
        # The k best so far, and rows of the next part beside them: the whole table never exists.
        best, rows = np.empty((n, 0), np.float64 if self.likelihood else np.float32), np.empty((n, 0), int)
        for start, part in iterate_rows(images):
            numbers = np.broadcast_to(np.arange(start, start + len(part)), (n, len(part)))
            if self.likelihood is None:
                scores = directions @ normalise_rows(part - mean).T
            else:
                scores = self.likelihood.score(predicted, part, n_averaged)
            best = np.concatenate([best, scores], axis=1)
            rows = np.concatenate([rows, numbers], axis=1)
            # Of equal similarities the first image wins on every machine.
            kept = find_largest(best, min(k, best.shape[1]))
            best, rows = (np.take_along_axis(table, kept, axis=1) for table in (best, rows))
        weights = np.ones_like(best)
        if self.likelihood is not None:
            weights = np.exp(self.config.power * (best - best.max(axis=1, keepdims=True)))
        averages = []
        for chosen, weight in zip(rows, weights, strict=True):
            # In the order of the file, which a memory map reads faster, and which fixes the rounding of the sum.
            order = np.argsort(chosen)
            vectors = images.vectors[chosen[order]].astype(np.float32)
            averages.append(np.average(vectors, axis=0, weights=weight[order]).ravel())
        return np.stack(averages).astype(np.float32) if n else np.empty((0, len(mean)), np.float32)

    def describe(self) -> dict[str, Any]:
        """Return how many images there are."""
        images, _ = self._require_fit()
        return {"n_images": len(images)}

    def _require_fit(self) -> tuple[Embeddings, np.ndarray]:
        if self.images is None or self.mean is None:
            raise DataError("the neighbours prior has not been fitted; run train first.")
        return self.images, self.mean

    def write(self, folder: Path) -> None:
        """Write images and mean as safetensors, the rest as JSON."""
        images, mean = self._require_fit()
        vectors = np.ascontiguousarray(images.vectors)
        known = {} if self.likelihood is None else asdict(self.likelihood)
        tensors = {f"likelihood_{name}": np.ascontiguousarray(value) for name, value in known.items()}
        write_tensors(folder / "prior.safetensors", {"images": vectors, "mean": mean, **tensors})
        ids = [str(i) for i in images.ids]
        about = {"kind": "neighbours", "space": images.space, "length": self.length, "ids": ids}
        write_json(folder / "prior.json", about)

    def read(self, folder: Path) -> NeighboursPrior:
        """Read what `write` wrote."""
        meta, tensors = read_json(folder / "prior.json"), load_tensors(folder / "prior.safetensors")
        known = {
            name: tensors[f"likelihood_{name}"]
            for name in ImageLikelihood.__annotations__
            if self.config.compare == "likelihood" and f"likelihood_{name}" in tensors
        }
        self.images = Embeddings(tensors["images"], meta["ids"], meta["space"])
        self.mean, self.length = tensors["mean"], float(meta["length"])
        self.likelihood = ImageLikelihood(**known) if known else None
        return self
