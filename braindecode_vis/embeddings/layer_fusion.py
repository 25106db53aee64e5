"""Several image encoders side by side as one target: the token axis holds one vector per encoder.

For learned fusion of layers, see ``encoder.fusion``. Several layers of one width of one network are cheaper as that
network's own ``layer: [8, 16, 24]``, which reads them in one pass; this is for layers of different widths or networks.
Vectors of different sizes are brought to a common one by principal components of the training images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import FittedImageEncoder, ImageEncoderSettings
from braindecode_vis.base.registry import Component
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import load_tensors, write_tensors
from braindecode_vis.embeddings.degradations import VIEWED_KINDS

FILE = "layers.safetensors"
#: Kinds that can stand side by side: pretrained encoders of one network, and texts.
MEMBERS = (*VIEWED_KINDS, "minilm")


class LayersConfig(ImageEncoderSettings):
    """One vector per image from each of several encoders.

    Parameters
    ----------
    members
        The image encoders, each of one vector per image; `minilm` puts the text of an image beside them.
    size
        Number of features of each vector: the leading principal components of the training images. None keeps the
        vectors, which must then have the same size.
    weights
        Weight of each member: the root mean square length of its vectors over training images, which sets its influence
        on a cosine. None keeps the lengths; the vectors of an image network may be twenty times longer than those of a
        text.
    """

    kind: Literal["layers"] = "layers"
    members: tuple[Annotated[Any, Component("target", only=MEMBERS)], ...] = Field(min_length=2)
    size: int | None = Field(default=None, ge=1)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"weights"})

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.weights is not None and (self.size is None or len(self.weights) != len(self.members)):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.members)} members; give one for each member, and the size "
                "to which all of them are reduced"
            )
        return self

    @property
    def fitted_on_training_images(self) -> bool:  # type: ignore[override]
        """Whether the target differs from fold to fold."""
        return self.size is not None

    def build(self) -> LayersEncoder:
        """Return the unfitted encoder."""
        return LayersEncoder(self)


@dataclass(frozen=True)
class Projection:
    """Mean of shape (n_features,) and components of shape (size, n_features) of one member."""

    mean: np.ndarray
    components: np.ndarray

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Return float32 scores of shape (n_images, size)."""
        return ((vectors - self.mean) @ self.components.T).astype(np.float32)

    def weigh(self, vectors: np.ndarray, weight: float) -> Projection:
        """Return components in which these vectors have the length `weight`, as root of the mean square."""
        length = float(np.sqrt(np.square(self.apply(vectors), dtype=np.float64).sum(axis=1).mean()))
        return Projection(self.mean, self.components * np.float32(weight / max(length, 1e-12)))


class LayersEncoder(FittedImageEncoder):
    """Several image encoders whose vectors are stacked."""

    def __init__(self, config: LayersConfig) -> None:
        self.config = config
        self.fitted: tuple[Projection, ...] = ()
        self.members: list[Any] = [member.build() for member in config.members]

    @property
    def space(self) -> str:
        """Names of the members' spaces, with the digest of the components where there are any."""
        # The members' names are long; their digest tells spaces apart as well.
        names = hashlib.sha256("\n".join(member.space for member in self.members).encode())
        kinds = "+".join(member.kind for member in self.config.members)
        if self.config.size is None:
            return f"layers/{kinds}/{names.hexdigest()[:12]}"
        for projection in self._require_fit():
            names.update(projection.mean.tobytes() + projection.components.tobytes())
        return f"layers/{kinds}/pca{self.config.size}/fit={names.hexdigest()[:12]}"

    def fit(self, images: Iterable[np.ndarray]) -> LayersEncoder:
        """Compute the components of the training images, if `size` asks for them."""
        if self.config.size is not None:
            listed = list(images)
            self.fit_vectors([member.encode(listed) for member in self.members])
        return self

    def fit_vectors(self, vectors: Sequence[np.ndarray]) -> None:
        """Compute the components from each member's vectors of the training images, (n_images, n_features) each."""
        size = self.config.size
        if size is None:
            return
        fitted = []
        for member, found in zip(self.config.members, vectors, strict=True):
            most = min(len(found) - 1, found.shape[-1])  # the mean takes one dimension
            if size > most:
                raise DataError(
                    f"target.size is {size}, but {len(found)} training images of {found.shape[-1]} features "
                    f"({member.kind}) have {most} components; set it to {most} or less."
                )
            fitted.append(_fit_components(np.asarray(found, dtype=np.float64), size))
        if self.config.weights is not None:
            fitted = [
                projection.weigh(found, weight)
                for projection, found, weight in zip(fitted, vectors, self.config.weights, strict=True)
            ]
        self.fitted = tuple(fitted)

    def stack(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_members, size) from each member's own vectors.

        Raises
        ------
        DataError
            If a member gives tokens, or sizes differ and `size` is None.
        """
        for member, found in zip(self.config.members, vectors, strict=True):
            if found.ndim != 2:
                raise DataError(
                    f"a member of target.members ({member.kind}) gives {found.shape[1]} tokens per "
                    "image; pool them, and list each layer as a separate member."
                )
        if self.config.size is not None:
            parts = zip(self._require_fit(), vectors, strict=True)
            return np.stack(
                [projection.apply(found) for projection, found in parts], axis=1
            )  # images, members, size
        sizes = [found.shape[1] for found in vectors]
        if len(set(sizes)) > 1:
            raise DataError(
                f"the members of the target have {', '.join(map(str, sizes))} features; set target.size to reduce them "
                "to a common size."
            )
        return np.stack([np.asarray(found, dtype=np.float32) for found in vectors], axis=1)

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_members, size)."""
        listed = list(images)
        return self.stack([member.encode(listed) for member in self.members])

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Callable[[Any], Embeddings]
    ) -> Embeddings:
        """Fit on training images and encode all, each member once.

        Parameters
        ----------
        stimuli
            All images.
        training_ids
            Those that components are computed from.
        embed_cached
            Returns a member's embeddings of all stimuli in their order, from a bank where there is one.
        """
        # Texts have their own way, since there is no picture that they could be kept under.
        banks = [member.embed(stimuli, training_ids, embed_cached) for member in self.members]
        rows = stimuli.find_rows(training_ids)
        self.fit_vectors([bank.vectors[rows] for bank in banks])
        return Embeddings(self.stack([bank.vectors for bank in banks]), stimuli.ids, self.space)

    def embed_texts(self, texts: Sequence[Sequence[str]], fill: np.ndarray) -> np.ndarray | None:
        """Return vectors in which the members that read texts have read these, and the others are `fill`."""
        vectors = np.repeat(np.asarray(fill, dtype=np.float32)[None], len(texts), axis=0)
        for place in self._text_places:
            found = self.members[place].embed_texts(texts)
            vectors[:, place] = found if self.config.size is None else self._require_fit()[place].apply(found)
        return vectors if self._text_places else None

    def hide_texts(self, vectors: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """Return embeddings in which the members that read texts are `fill`."""
        if not self._text_places:
            return vectors
        hidden = np.array(vectors, dtype=np.float32)
        hidden[:, self._text_places] = fill[self._text_places]
        return hidden

    @property
    def _text_places(self) -> list[int]:
        return [place for place, member in enumerate(self.config.members) if member.of_texts]

    def _require_fit(self) -> tuple[Projection, ...]:
        if not self.fitted:
            raise DataError("the components of the layers have not been fitted; run embed first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write means and components as safetensors, nothing if there are none."""
        tensors = {}
        for number, projection in enumerate(self.fitted):
            tensors[f"{number}.mean"] = projection.mean
            tensors[f"{number}.components"] = projection.components
        if tensors:
            write_tensors(folder / FILE, tensors)

    def read(self, folder: Path) -> LayersEncoder:
        """Read what `write` wrote."""
        if self.config.size is not None:
            tensors, numbers = load_tensors(folder / FILE), range(len(self.config.members))
            self.fitted = tuple(Projection(tensors[f"{n}.mean"], tensors[f"{n}.components"]) for n in numbers)
        return self


def _fit_components(vectors: np.ndarray, size: int) -> Projection:
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    # The smaller of the two Gram matrices; the larger one may not fit into memory.
    if len(vectors) < vectors.shape[1]:
        values, left = np.linalg.eigh(centred @ centred.T)  # ascending, so that the last are the leading ones
        components = (centred.T @ left[:, ::-1][:, :size]).T
        # Their length is the singular value; zero for images that are all alike.
        components /= np.maximum(np.sqrt(np.maximum(values[::-1][:size], 0)), 1e-12)[:, None]
    else:
        components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :size].T
    # The sign is arbitrary; the largest entry is made positive.
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(size), largest])[:, None]
    return Projection(mean.astype(np.float32), np.ascontiguousarray(components, dtype=np.float32))
