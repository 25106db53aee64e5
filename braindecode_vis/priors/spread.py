"""Give predictions the spread of image embeddings: one gain about the training mean, and nothing else.

A ridge prediction is shrunk toward the mean, and a generator that learnt from true embeddings takes a short one for an
ordinary image. The gain that gives out-of-fold predictions the mean squared distance of training images from their mean
undoes that. Directions from the mean stay as they are, so the cosine after the training mean, and every rank by it, is
the same before and after. Nothing is random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.arrays import Embeddings, check_same_space
from braindecode_vis.checks import DataError
from braindecode_vis.settings import Settings
from braindecode_vis.store import read_json, write_json


class SpreadPriorConfig(Settings):
    """Stretch predictions away from the training mean by one gain that training trials determine."""

    kind: Literal["spread"] = "spread"

    needs_predictions: ClassVar[bool] = True

    def build(self, *, seed: int = 0) -> SpreadPrior:
        """Return the unfitted prior; nothing in it is random."""
        return SpreadPrior()

    def read(self, folder: Path) -> SpreadPrior:
        """Return the prior that was written into `folder`."""
        return SpreadPrior.read(folder)


class SpreadPrior:
    """The training mean, and the gain about it."""

    def __init__(self, mean: np.ndarray | None = None, gain: float = 1.0, space: str = "") -> None:
        self.mean, self.gain, self.space = mean, gain, space

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
        rows = target if images is None else images
        _, first = np.unique(rows.ids.astype(str), return_index=True)
        whole = rows.vectors[np.sort(first)]
        mean = whole.mean(axis=0, dtype=np.float64)
        wanted, found = (float(((v - mean) ** 2).mean()) for v in (whole, predicted.vectors))
        if found <= 1e-12 * wanted:
            raise DataError(
                "the out-of-fold predictions are all the training mean, which no gain can spread; set prior.kind to "
                "identity and look at the encoder's scores."
            )
        self.mean, self.gain, self.space = mean.astype(np.float32), float(np.sqrt(wanted / found)), rows.space
        return self

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return the stretched prediction `n_draws` times per row, draws of one row next to each other."""
        mean = self._require_mean()
        if predicted.space != self.space or predicted.vectors.shape[1:] != mean.shape:
            raise DataError(
                f"the spread prior was fitted in the space {self.space!r} with rows of shape {mean.shape}, but got "
                f"{predicted.space!r} with {predicted.vectors.shape[1:]}."
            )
        stretched = (mean + self.gain * (predicted.vectors - mean)).astype(np.float32)
        return Embeddings(
            np.repeat(stretched, n_draws, axis=0), np.repeat(predicted.ids, n_draws), self.space
        )

    def describe(self) -> dict[str, Any]:
        """Return the gain."""
        self._require_mean()
        return {"gain": self.gain}

    def _require_mean(self) -> np.ndarray:
        if self.mean is None:
            raise DataError("the spread prior has not been fitted; run train first.")
        return self.mean

    def write(self, folder: Path) -> None:
        """Write the mean as safetensors, gain and name of the space as JSON."""
        from safetensors.numpy import save_file

        save_file({"mean": self._require_mean()}, folder / "prior.safetensors")
        write_json(folder / "prior.json", {"kind": "spread", "space": self.space, "gain": self.gain})

    @classmethod
    def read(cls, folder: Path) -> SpreadPrior:
        """Read what `write` wrote."""
        from safetensors.numpy import load_file

        meta = read_json(folder / "prior.json")
        return cls(load_file(folder / "prior.safetensors")["mean"], float(meta["gain"]), meta["space"])
