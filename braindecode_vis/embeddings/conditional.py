"""Conditional targets: one token per question about an image (which colour, what shape).

Owns heads on the target side, one for each attribute, each a ridge from a base embedding to the values of its
attribute, fitted on training images alone; its outputs are one token of the target. FocalLens lets instructions enter a
vision transformer; its code and formulas are not public, and a head on a frozen embedding is our form of it. Without a
base the values of the table themselves are the target. How well values are decoded is the business of
`braindecode_vis.scoring.target_scores`.

References
----------
FocalLens (2025), arXiv:2504.08368.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.contracts import FittedImageEncoder, ImageEncoderSettings
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.registry import Component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.embeddings.attribute_table import AttributeTable, read_attributes
from braindecode_vis.embeddings.degradations import VIEWED_KINDS

FILE, RECORD = "conditional.safetensors", "conditional.json"
#: What heads can be put on: image encoders, texts, and vectors that a user holds.
BASES = (*VIEWED_KINDS, "pixels", "minilm", "imported")
#: Penalties of a head, in units of the mean variance of a base feature times the number of images (a choice of ours).
PENALTIES = tuple(10.0**e for e in np.arange(-4, 3.5, 0.5))
N_INNER = 5


class ConditionalConfig(ImageEncoderSettings):
    """One token per attribute: the value that a head predicts from the embedding of an image.

    Parameters
    ----------
    attributes
        CSV file with the column ``id`` or ``concept`` and a column for each attribute (see ``docs/WORDS.md``).
    conditions
        The attributes to use; empty takes all of the file.
    base
        The image encoder (or table) whose vectors are the input of the heads. None takes the values of the file
        themselves, which must then also contain the tested images.
    """

    kind: Literal["conditional"] = "conditional"
    attributes: Path
    conditions: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    base: Annotated[Any, Component("target", only=BASES)] | None = Field(
        default={"kind": "efficientnet-lite0"}
    )

    fitted_on_training_images: ClassVar[bool] = True
    not_hashed: ClassVar[frozenset[str]] = frozenset({"attributes"})

    def read_attributes(self) -> AttributeTable:
        """Return the attributes that are asked for, one for each token."""
        table = read_attributes(self.attributes.expanduser())
        return table.choose(self.conditions, what=str(self.attributes)) if self.conditions else table

    def check_files(self) -> None:
        """Raise `DataError` unless the attributes can be read and have what is asked for."""
        self.read_attributes()

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the attributes."""
        self.read_attributes()
        return {**super().hashed_fields(), "attributes_digest": hash_once(self.attributes.expanduser())}

    def build(self) -> ConditionalEncoder:
        """Return the unfitted encoder."""
        return ConditionalEncoder(self)


@dataclass(frozen=True)
class Heads:
    """What was fitted on training images.

    Parameters
    ----------
    values
        Values of each attribute that training images show, in the order of the outputs of its head.
    mean : float32 array of shape (n_features,)
        Of the base vectors; empty without a base.
    weights : float32 array of shape (n_attributes, n_features, n_outputs)
        Zero where an attribute has fewer values than the widest.
    penalties
        The chosen one of each head.
    table
        Digest of the attributes.
    """

    values: dict[str, tuple[str, ...]]
    mean: np.ndarray
    weights: np.ndarray
    penalties: tuple[float, ...]
    table: str

    @property
    def n_outputs(self) -> int:
        """Values of the attribute that has most."""
        return max(len(values) for values in self.values.values())

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Return float32 tokens of shape (n_images, n_attributes, n_outputs) of base vectors."""
        centred = vectors.astype(np.float32) - self.mean
        tokens: np.ndarray = np.stack([centred @ weights for weights in self.weights], axis=1)
        return tokens


class ConditionalEncoder(FittedImageEncoder):
    """Answers to questions about an image in the place of its embedding."""

    def __init__(self, config: ConditionalConfig) -> None:
        self.config = config
        self.fitted: Heads | None = None
        self.base: Any = None if config.base is None else config.base.build()

    @property
    def space(self) -> str:
        """Name with the base, and the digest of the attributes and the heads."""
        heads, kind = self._require_fit(), "values" if self.config.base is None else self.config.base.kind
        digest = hashlib.sha256(heads.mean.tobytes() + heads.weights.tobytes())
        digest.update(heads.table.encode() + repr(heads.values).encode())
        return f"conditional/{kind}/{len(heads.values)}x{heads.n_outputs}/fit={digest.hexdigest()[:12]}"

    def fit(self, images: Iterable[np.ndarray]) -> ConditionalEncoder:
        """Refuse: pictures without their ids have no attributes; `embed` fits."""
        raise ConfigError(
            "a target of kind conditional is fitted on images whose ids are known; embed the stimuli of a run."
        )

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Callable[[Any], Embeddings]
    ) -> Embeddings:
        """Fit the heads on the training images and return the tokens of all; see `contracts.ImageEncoder.embed`.

        Raises
        ------
        DataError
            If training images are missing in the table, or show fewer than two values of an attribute; without a base
            also if any value is not known.
        """
        config, table = self.config, self.config.read_attributes()
        concepts = stimuli.concepts_of(stimuli.ids).astype(str)
        codes = table.codes_of(stimuli.ids.tolist(), concepts.tolist())
        rows = stimuli.find_rows(training_ids)
        # Of tested images nothing is learnt, so that their rows may be missing where a base speaks for them.
        asked = np.arange(len(stimuli)) if self.base is None else rows
        if missing := table.describe_missing(
            stimuli.ids[asked].tolist(),
            concepts[asked].tolist(),
            what=f"the attributes of {config.attributes}",
        ):
            raise DataError(missing)
        kept = [
            find_trained_values(table, position, codes[rows, position])
            for position in range(len(table.names))
        ]
        values = {
            name: tuple(table.values[name][code] for code in own)
            for name, own in zip(table.names, kept, strict=True)
        }
        digest = hash_once(config.attributes.expanduser())
        if self.base is None:
            vectors = _spell_values(table, codes, kept, stimuli.ids)
            none = np.zeros((len(values), 0, 0), np.float32)
            self.fitted = Heads(values, np.zeros(0, np.float32), none, (), digest)
            return Embeddings(vectors, stimuli.ids, self.space)
        bank = self.base.embed(stimuli, training_ids, embed_cached)
        self.fitted = fit_heads(bank.flat()[rows], codes[rows], kept, values, concepts[rows], digest)
        return Embeddings(self.fitted.apply(bank.flat()), stimuli.ids, self.space)

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 tokens of shape (n_images, n_attributes, n_outputs) of pictures."""
        if self.base is None:
            raise ConfigError(
                "a target of kind conditional without a base knows the images of its table only and cannot embed a "
                "picture; set target.base, or the generator to nearest."
            )
        vectors = np.asarray(self.base.encode(images))
        return self._require_fit().apply(vectors.reshape(len(vectors), -1))

    def _require_fit(self) -> Heads:
        if self.fitted is None:
            raise DataError("the heads of the conditional target have not been fitted; run embed first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write the heads as safetensors, and what their outputs mean."""
        heads = self._require_fit()
        write_tensors(folder / FILE, {"mean": heads.mean, "weights": heads.weights})
        record = {"values": heads.values, "penalties": list(heads.penalties), "table": heads.table}
        write_json(folder / RECORD, record)

    def read(self, folder: Path) -> ConditionalEncoder:
        """Read what `write` wrote."""
        tensors, record = load_tensors(folder / FILE), read_json(folder / RECORD)
        values = {name: tuple(own) for name, own in record["values"].items()}
        self.fitted = Heads(
            values, tensors["mean"], tensors["weights"], tuple(record["penalties"]), record["table"]
        )
        return self


def find_trained_values(table: AttributeTable, position: int, codes: np.ndarray) -> np.ndarray:
    """Return the codes of an attribute that at least two training images show.

    Parameters
    ----------
    table
        Names and values.
    position
        Of the attribute.
    codes : int array of shape (n_training_images,)
        -1 is unknown.

    Raises
    ------
    DataError
        If fewer than two values are left, so that there is nothing to distinguish.
    """
    name = table.names[position]
    found, counts = np.unique(codes[codes >= 0], return_counts=True)
    kept = found[counts > 1]
    if len(kept) < 2:
        seen = (
            (f"has only the value {table.values[name][kept[0]]!r}")
            if len(kept)
            else "has no value that occurs twice"
        )
        raise DataError(
            f"the attribute {name!r} {seen} among {len(codes)} training images ({int((codes < 0).sum())} of them "
            "unknown), so that it cannot be used; leave it out or fill in the table."
        )
    if len(kept) < len(found):
        rare = table.values[name][found[counts == 1][0]]
        warnings.warn(
            f"{len(found) - len(kept)} value(s) of the attribute {name!r} are shown by one training image only, such "
            f"as {rare!r}, and are not learnt.",
            Notice,
            stacklevel=3,
        )
    return kept


def _spell_values(
    table: AttributeTable, codes: np.ndarray, kept: Sequence[np.ndarray], ids: np.ndarray
) -> np.ndarray:
    """Return tokens that are 1 at the value of each attribute; a value that is never trained on is all zeros."""
    tokens = np.zeros((len(codes), len(kept), max(map(len, kept))), np.float32)
    for position, own in enumerate(kept):
        if (codes[:, position] < 0).any():
            first = ids[int(np.flatnonzero(codes[:, position] < 0)[0])]
            raise DataError(
                f"the attribute {table.names[position]!r} of {first!r} is unknown, and without target.base the values "
                "of all images are needed; fill it in or set target.base."
            )
        tokens[:, position, : len(own)] = codes[:, position, None] == own
    return tokens


def fit_heads(
    vectors: np.ndarray,
    codes: np.ndarray,
    kept: Sequence[np.ndarray],
    values: dict[str, tuple[str, ...]],
    groups: np.ndarray,
    table: str = "",
) -> Heads:
    """Fit one ridge per attribute from base vectors to centred indicators of its values.

    The penalty of each is chosen by folds that part concepts, since a value must be recognised in concepts that were
    never shown. Images whose value is unknown, or rare, are left out of its head.

    Parameters
    ----------
    vectors : array of shape (n_images, n_features)
        Base embeddings of the training images.
    codes : int array of shape (n_images, n_attributes)
    kept
        Codes that are learnt of each attribute.
    values
        Names of these, by attribute.
    groups : array of shape (n_images,)
        Concept of each image.
    table
        Digest of the attributes.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    centred = vectors.astype(np.float64) - mean
    width = max(map(len, kept))
    weights = np.zeros((len(kept), vectors.shape[1], width), np.float32)
    penalties = []
    for position, own in enumerate(kept):
        known = np.isin(codes[:, position], own)
        indicators = (codes[known, position, None] == own).astype(np.float64)
        found, penalty = fit_ridge(centred[known], indicators, groups[known])
        weights[position, :, : len(own)] = found
        penalties.append(penalty)
    return Heads(values, mean.astype(np.float32), weights, tuple(penalties), table)


def fit_ridge(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights of shape (n_features, n_outputs) and the penalty that predicts held-out groups best.

    Parameters
    ----------
    x : array of shape (n_rows, n_features)
    y : array of shape (n_rows, n_outputs)
    groups : array of shape (n_rows,)
        Rows of one are held out together.
    """
    known = np.unique(groups.astype(str))
    order = make_generator(0, "conditional heads").permutation(known)
    n_folds = min(N_INNER, len(known))
    unit = len(x) * max(float(x.var(axis=0).mean()), 1e-30)
    if n_folds < 2:
        return _solve(x, y, [unit])[0], 1.0
    errors = np.zeros(len(PENALTIES))
    for fold in range(n_folds):
        held = np.isin(groups.astype(str), order[fold::n_folds])
        mean_x, mean_y = x[~held].mean(axis=0), y[~held].mean(axis=0)
        solved = _solve(x[~held], y[~held], [unit * penalty for penalty in PENALTIES])
        for number, weights in enumerate(solved):
            errors[number] += ((y[held] - mean_y - (x[held] - mean_x) @ weights) ** 2).sum()
    best = float(PENALTIES[int(errors.argmin())])
    return _solve(x, y, [unit * best])[0], best


def _solve(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    """Return the ridge weights of each penalty, by one eigendecomposition of the smaller Gram matrix."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    if len(x) < x.shape[1]:
        values, vectors = np.linalg.eigh(x @ x.T)
        projected = vectors.T @ y
        return [x.T @ (vectors @ (projected / (np.maximum(values, 0) + p)[:, None])) for p in penalties]
    values, vectors = np.linalg.eigh(x.T @ x)
    projected = vectors.T @ (x.T @ y)
    return [vectors @ (projected / (np.maximum(values, 0) + p)[:, None]) for p in penalties]
