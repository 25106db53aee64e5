"""The prior that forgets the brain: every sample is the mean embedding of the training images.

As a control it shows what a generator makes of no information at all. Its samples cannot be told apart, so every
identification score of it is chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.settings import Settings
from braindecode_vis.store import read_json, write_json


class MeanPriorConfig(Settings):
    """Hand the mean embedding of the training images to the generator, whatever was predicted."""

    kind: Literal["mean"] = "mean"

    needs_predictions: ClassVar[bool] = False

    def build(self, *, seed: int = 0) -> MeanPrior:
        """Return the unfitted prior; nothing in it is random."""
        return MeanPrior()

    def read(self, folder: Path) -> MeanPrior:
        """Return the prior that was written into `folder`."""
        return MeanPrior.read(folder)


class MeanPrior:
    """Returns the training mean, once per draw."""

    def __init__(self, mean: np.ndarray | None = None, space: str = "") -> None:
        self.mean = mean
        self.space = space

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
        rows = target if images is None else images
        _, first = np.unique(rows.ids.astype(str), return_index=True)
        self.mean = rows.vectors[np.sort(first)].mean(axis=0, dtype=np.float64).astype(np.float32)
        self.space = rows.space
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return the mean `n_draws` times per row, draws of one row next to each other."""
        mean = self._require_mean()
        if predicted.space != self.space or predicted.vectors.shape[1:] != mean.shape:
            raise DataError(
                f"the mean prior was fitted in the space {self.space!r} with rows of shape {mean.shape}, but got "
                f"{predicted.space!r} with {predicted.vectors.shape[1:]}."
            )
        ids = np.repeat(predicted.ids, n_draws)
        return Embeddings(np.repeat(mean[None], len(ids), axis=0), ids, self.space)

    def _require_mean(self) -> np.ndarray:
        if self.mean is None:
            raise DataError("the mean prior has not been fitted; run train first.")
        return self.mean

    def write(self, folder: Path) -> None:
        """Write the mean as safetensors and the name of the space as JSON."""
        from safetensors.numpy import save_file

        save_file({"mean": self._require_mean()}, folder / "prior.safetensors")
        write_json(folder / "prior.json", {"kind": "mean", "space": self.space})

    @classmethod
    def read(cls, folder: Path) -> MeanPrior:
        """Read what `write` wrote."""
        from safetensors.numpy import load_file

        mean = load_file(folder / "prior.safetensors")["mean"]
        return cls(mean, read_json(folder / "prior.json")["space"])
