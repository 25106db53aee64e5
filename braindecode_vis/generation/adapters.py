"""From the target space to the space that a published generator is conditioned on: a ridge map fitted on images.

A generator whose network was trained on one encoder's embeddings can follow any target, DINOv2 for example: training
images are embedded in both spaces and a linear map between them is learnt, its penalty chosen by leave-one-out. No
brain data and no test image enter. What the target does not hold (a colour, a place), the condition cannot show; the
fraction of variance that the map explains, left out images, is in `describe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.registry import Component
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.generator_data import GeneratorData

ConditionEncoder = Annotated[
    Any, Component("target", only=("openclip", "transformers", "timm", "efficientnet-lite0"))
]


class AdapterConfig(Settings):
    """A ridge map from the target space to the condition of a generator.

    Parameters
    ----------
    encoder
        The image encoder whose embeddings the generator was trained with.
    """

    kind: Literal["ridge"] = "ridge"
    encoder: ConditionEncoder

    #: Penalties to choose from, in units of the mean eigenvalue of the targets' Gram matrix.
    alphas: ClassVar[tuple[float, ...]] = tuple(float(10**e) for e in np.linspace(-4, 3, 15))
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alphas"})

    def fit(self, data: GeneratorData) -> Adapter:
        """Embed the training images with the generator's encoder, and learn the map."""
        from braindecode_vis.base.digests import find_cache_folder
        from braindecode_vis.embeddings.bank import embed_stimuli

        encoder = self.encoder.build()
        bank = embed_stimuli(encoder, data.stimuli, cache=find_cache_folder())
        wanted = bank.select(data.embeddings.ids)
        return fit_adapter(data.embeddings, wanted, alphas=self.alphas, encoder=encoder)

    def read(self, folder: Path) -> Adapter:
        """Return the map that was written into `folder`."""
        arrays, record = load_tensors(folder / "adapter.safetensors"), read_json(folder / "adapter.json")
        return Adapter(
            arrays["weights"], arrays["target_mean"], arrays["condition_mean"], tuple(record["condition_shape"]),
            record["target_space"], record["space"], record["alpha"], record["explained"], self.encoder.build(),
        )  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A fitted map; see `fit_adapter`."""

    weights: np.ndarray
    target_mean: np.ndarray
    condition_mean: np.ndarray
    condition_shape: tuple[int, ...]
    target_space: str
    space: str
    alpha: float
    explained: float
    encoder: Any = None

    def apply(self, embeddings: Embeddings) -> np.ndarray:
        """Return conditions of shape (n_rows, *condition_shape)."""
        if embeddings.space != self.target_space:
            raise ConfigError(
                f"the adapter maps {self.target_space!r} to {self.space!r}, not {embeddings.space!r}."
            )
        rows = (embeddings.flat() - self.target_mean) @ self.weights + self.condition_mean
        # (n_rows, *condition_shape): tokens, where the generator is conditioned on tokens
        return rows.reshape(len(rows), *self.condition_shape).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        """Return the penalty and the fraction of variance explained in images left out."""
        return {"alpha": self.alpha, "explained_left_out": self.explained}

    def write(self, folder: Path) -> None:
        """Write the map as safetensors, its spaces and what was chosen as JSON."""
        arrays = {
            "weights": self.weights, "target_mean": self.target_mean, "condition_mean": self.condition_mean,
        }  # fmt: skip
        write_tensors(folder / "adapter.safetensors", {k: np.ascontiguousarray(v) for k, v in arrays.items()})
        record = {
            "condition_shape": list(self.condition_shape), "target_space": self.target_space, "space": self.space,
            "alpha": self.alpha, "explained": self.explained,
        }  # fmt: skip
        write_json(folder / "adapter.json", record)


def fit_adapter(
    target: Embeddings, condition: Embeddings, *, alphas: tuple[float, ...], encoder: Any = None
) -> Adapter:
    """Learn a ridge map from one space to another, both of the same images.

    Parameters
    ----------
    target, condition
        Row by row the same image.
    alphas
        Penalties, in units of the mean eigenvalue; the one with the least leave-one-out error is taken. The means stay
        those of all rows when a row is left out, which the error then treats as known.
    encoder
        Kept for generators that need the embedding of a grey image.
    """
    if len(target) < 3 or (target.ids != condition.ids).any():
        raise ConfigError("an adapter needs three or more images, embedded in both spaces in the same order.")
    # In double precision, since small penalties divide by small eigenvalues.
    x, y = target.flat().astype(np.float64), condition.flat().astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    # (n_images, k), (k,), (k, n_features): one decomposition serves every penalty.
    left, singular, right = np.linalg.svd(x - x_mean, full_matrices=False)
    centred = y - y_mean
    projected, unit = left.T @ centred, float((singular**2).mean())
    errors = []
    for alpha in alphas:
        shrink = singular**2 / (singular**2 + alpha * unit)
        residuals = centred - left @ (shrink[:, None] * projected)
        # The residual of an image left out is its own divided by 1 - leverage, so that nothing is fitted again.
        leverage = (left**2) @ shrink
        errors.append(float(((residuals / (1 - leverage)[:, None]) ** 2).sum()))
    best = int(np.argmin(errors))
    gain = singular / (singular**2 + alphas[best] * unit)
    weights = right.T @ (gain[:, None] * projected)
    explained = 1 - errors[best] / max(float((centred**2).sum()), np.finfo(float).tiny)
    return Adapter(
        weights.astype(np.float32), x_mean.astype(np.float32), y_mean.astype(np.float32),
        condition.vectors.shape[1:], target.space, condition.space, alphas[best], explained, encoder,
    )  # fmt: skip
