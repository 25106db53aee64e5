"""The prior that changes nothing: the first stage of every comparison with a learned one."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.settings import Settings


class IdentityPriorConfig(Settings):
    """Hand the prediction to the generator as it is."""

    kind: Literal["identity"] = "identity"

    needs_predictions: ClassVar[bool] = False

    def build(self, *, seed: int = 0) -> IdentityPrior:
        """Return the prior; nothing in it is random."""
        return IdentityPrior()


class IdentityPrior:
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
