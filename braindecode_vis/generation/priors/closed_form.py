"""Priors without parameters to train: the prediction as it is, and the mean, spread and moments of the images.

``identity`` is the first row of every comparison with a learned prior. ``mean`` forgets the brain: as a control it
shows what a generator makes of no information at all, and every identification score of it is chance. ``spread``
gives predictions the spread of image embeddings: a ridge prediction is shrunk toward the mean, and a generator that
learnt from true embeddings takes a short one for an ordinary image. The gain that gives out-of-fold predictions the
mean squared distance of training images from their mean undoes that; directions from the mean stay as they are, so
the cosine after the training mean, and every rank by it, is the same before and after. ``moments`` gives every feature
by itself the mean and the spread of the training images (Benchetrit et al. 2023, arXiv:2310.19812), which changes
directions: a feature that is hardly predicted gets as much spread as one that is predicted well. Both measure
predictions of training trials; the public code of Brain-Diffuser takes the test predictions themselves. Nothing here is
random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Prior, PriorSettings
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.priors.image_source import keep_distinct


class IdentityPriorConfig(PriorSettings):
    """Give the prediction to the generator unchanged."""

    kind: Literal["identity"] = "identity"

    needs_predictions: ClassVar[bool] = False
    #: What leaves it are predictions, as they came.
    draws_images: ClassVar[bool] = False

    def build(self, *, seed: int = 0) -> IdentityPrior:
        """Return the prior."""
        return IdentityPrior()


class IdentityPrior(Prior):
    """Returns what it is given, once per draw."""

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> IdentityPrior:
        """Nothing is learnt."""
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return each row `n_draws` times, draws of one row next to each other."""
        vectors = np.repeat(np.asarray(predicted.vectors), n_draws, axis=0)
        return Embeddings(vectors, np.repeat(predicted.ids, n_draws), predicted.space)


class MeanPriorConfig(PriorSettings):
    """Give the generator the mean embedding of the training images, whatever the prediction is."""

    kind: Literal["mean"] = "mean"

    needs_predictions: ClassVar[bool] = False

    def build(self, *, seed: int = 0) -> MeanPrior:
        """Return the unfitted prior."""
        return MeanPrior()


class MeanPrior(Prior):
    """Returns the training mean, once per draw."""

    mean: np.ndarray | None = None
    space = ""

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> MeanPrior:
        """Average the embeddings of the training images, each image once.

        Parameters
        ----------
        predicted
            Predictions of the training trials; not looked at.
        target
            Embedding of the image of each training trial.
        images
            One row per training image; where given, it is averaged instead of `target`.
        """
        # An image that was shown in many trials counts once.
        rows = keep_distinct(target if images is None else images)
        self.mean, self.space = rows.vectors.mean(axis=0, dtype=np.float64).astype(np.float32), rows.space
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return the mean `n_draws` times per row, draws of one row next to each other."""
        mean = _require_mean("mean", self.mean, self.space, predicted)
        ids = np.repeat(predicted.ids, n_draws)
        return Embeddings(np.repeat(mean[None], len(ids), axis=0), ids, self.space)

    def write(self, folder: Path) -> None:
        """Write the mean as safetensors and the name of the space as JSON."""
        write_tensors(folder / "prior.safetensors", {"mean": _require_mean("mean", self.mean, self.space)})
        write_json(folder / "prior.json", {"kind": "mean", "space": self.space})

    def read(self, folder: Path) -> MeanPrior:
        """Read what `write` wrote."""
        self.mean = load_tensors(folder / "prior.safetensors")["mean"]
        self.space = read_json(folder / "prior.json")["space"]
        return self


class SpreadPriorConfig(PriorSettings):
    """Scale predictions away from the training mean by one gain, determined by training trials."""

    kind: Literal["spread"] = "spread"

    def build(self, *, seed: int = 0) -> SpreadPrior:
        """Return the unfitted prior."""
        return SpreadPrior()


class SpreadPrior(Prior):
    """The training mean, and the gain about it."""

    mean: np.ndarray | None = None
    gain, space = 1.0, ""

    def fit(
        self, predicted: Embeddings, target: Embeddings, *, images: Embeddings | None = None
    ) -> SpreadPrior:
        """Compare the spread of out-of-fold predictions with that of the training images.

        Parameters
        ----------
        predicted
            Out-of-fold predictions of the training trials.
        target
            Embedding of the image of each prediction.
        images
            One row per training image; where given, they are measured instead of `target`.

        Raises
        ------
        DataError
            If the spaces differ, or the predictions are all the training mean.
        """
        check_same_space(predicted, target)
        rows = keep_distinct(target if images is None else images)
        mean = rows.vectors.mean(axis=0, dtype=np.float64)
        wanted, found = (float(((v - mean) ** 2).mean()) for v in (rows.vectors, predicted.vectors))
        # What is left then is rounding, and a gain of a million would make images of it.
        if found <= 1e-12 * wanted:
            raise DataError(
                "the out-of-fold predictions are all equal to the training mean, so no gain can scale "
                "them; set prior.kind to "
                "identity and look at the encoder's scores."
            )
        self.mean, self.gain, self.space = mean.astype(np.float32), float(np.sqrt(wanted / found)), rows.space
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return the stretched prediction `n_draws` times per row, draws of one row next to each other."""
        mean = _require_mean("spread", self.mean, self.space, predicted)
        stretched = (mean + self.gain * (predicted.vectors - mean)).astype(np.float32)
        moved = Embeddings(stretched, predicted.ids, self.space)
        return IdentityPrior().sample(moved, n_draws=n_draws, seed=seed)

    def describe(self) -> dict[str, Any]:
        """Return the gain."""
        _require_mean("spread", self.mean, self.space)
        return {"gain": self.gain}

    def write(self, folder: Path) -> None:
        """Write the mean as safetensors, gain and name of the space as JSON."""
        write_tensors(folder / "prior.safetensors", {"mean": _require_mean("spread", self.mean, self.space)})
        write_json(folder / "prior.json", {"kind": "spread", "space": self.space, "gain": self.gain})

    def read(self, folder: Path) -> SpreadPrior:
        """Read what `write` wrote."""
        meta = read_json(folder / "prior.json")
        self.mean = load_tensors(folder / "prior.safetensors")["mean"]
        self.gain, self.space = float(meta["gain"]), meta["space"]
        return self


class MomentsPriorConfig(PriorSettings):
    """Give every feature of the predictions its mean and spread over the training images."""

    kind: Literal["moments"] = "moments"

    def build(self, *, seed: int = 0) -> MomentsPrior:
        """Return the unfitted prior."""
        return MomentsPrior()


class MomentsPrior(Prior):
    """One gain and one offset per feature, of the shape of an embedding: x becomes gain * x + mean."""

    gain: np.ndarray | None = None
    mean: np.ndarray | None = None
    space = ""

    def fit(
        self, predicted: Embeddings, target: Embeddings, *, images: Embeddings | None = None
    ) -> MomentsPrior:
        """Compare means and deviations of out-of-fold predictions with those of the training images.

        Parameters
        ----------
        predicted
            Out-of-fold predictions of the training trials.
        target
            Embedding of the image of each prediction.
        images
            One row per training image; where given, they are measured instead of `target`.
        """
        check_same_space(predicted, target)
        rows = keep_distinct(target if images is None else images)
        (mean, std), (centre, found) = (_measure_moments(v) for v in (rows.vectors, predicted.vectors))
        # A feature that is never predicted stays at the mean of the images: any gain would make an image of rounding.
        gain = np.where(found > 1e-6 * std, std / np.maximum(found, np.finfo(np.float32).tiny), 0)
        self.gain = gain.astype(np.float32)
        self.mean, self.space = (mean - gain * centre).astype(np.float32), rows.space
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return the rescaled prediction `n_draws` times per row, draws of one row next to each other."""
        mean = _require_mean("moments", self.mean, self.space, predicted)
        rescaled = (self.gain * predicted.vectors + mean).astype(np.float32)
        moved = Embeddings(rescaled, predicted.ids, self.space)
        return IdentityPrior().sample(moved, n_draws=n_draws, seed=seed)

    def describe(self) -> dict[str, Any]:
        """Return the median gain, and the share of the features that are never predicted."""
        _require_mean("moments", self.mean, self.space)
        assert self.gain is not None
        return {"median_gain": float(np.median(self.gain)), "unpredicted": float((self.gain == 0).mean())}

    def write(self, folder: Path) -> None:
        """Write gains and offsets as safetensors, and the name of the space as JSON."""
        mean = _require_mean("moments", self.mean, self.space)
        assert self.gain is not None
        write_tensors(folder / "prior.safetensors", {"mean": mean, "gain": self.gain})
        write_json(folder / "prior.json", {"kind": "moments", "space": self.space})

    def read(self, folder: Path) -> MomentsPrior:
        """Read what `write` wrote."""
        arrays = load_tensors(folder / "prior.safetensors")
        self.gain, self.mean = arrays["gain"], arrays["mean"]
        self.space = read_json(folder / "prior.json")["space"]
        return self


def _measure_moments(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of each feature in double precision, a few features of all rows at a time."""
    flat = vectors.reshape(len(vectors), -1)
    moments = np.empty((2, flat.shape[1]))
    for start in range(0, flat.shape[1], 4096):  # 257 x 768 tokens of all images need no second copy
        part = flat[:, start : start + 4096].astype(np.float64)
        moments[:, start : start + 4096] = part.mean(axis=0), part.std(axis=0)
    return moments[0].reshape(vectors.shape[1:]), moments[1].reshape(vectors.shape[1:])


def _require_mean(
    kind: str, mean: np.ndarray | None, space: str, predicted: Embeddings | None = None
) -> np.ndarray:
    """Return the mean of a fitted prior, which must be of the shape and space of the predictions that it meets."""
    if mean is None:
        raise DataError(f"the {kind} prior has not been fitted; run train first.")
    if predicted is not None and (predicted.space != space or predicted.vectors.shape[1:] != mean.shape):
        raise DataError(
            f"the {kind} prior was fitted in the space {space!r} with rows of shape {mean.shape}, but got "
            f"{predicted.space!r} with {predicted.vectors.shape[1:]}."
        )
    return mean
