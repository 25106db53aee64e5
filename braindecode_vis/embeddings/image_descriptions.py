"""Maps descriptions of images (captions or attributes) into the space of their embeddings.

Owns reading the captions or attributes of a gallery, and what texts mean to a target without a text side: a ridge
regression from the words, or from the sentence vectors, of training images to the embeddings of these. Nothing of a
test image is learnt from. How texts rank as candidates is the business of `braindecode_vis.scoring.description_scores`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import DataError, check_file, check_installed
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import NeededWeights, Settings
from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.embeddings.caption_bank import read_caption_bank, read_text
from braindecode_vis.embeddings.sentence_encoder import (
    SentenceEncoder,
    find_sentence_folder,
    hash_sentence_encoder,
    list_sentence_weights,
)
from braindecode_vis.embeddings.text import average_texts, make_unit

MOST_LEARNT = 8192  # distinct descriptions that a regression learns from


class DescriptionsConfig(Settings):
    """Retrieval by description: candidates are texts instead of images, and both fused.

    Parameters
    ----------
    captions
        CSV file with the columns ``id`` and ``caption``, of all tested images; also of training images if `encoder`
        learns from texts.
    attributes
        Instead of captions: CSV file with ``id`` or ``concept`` and a column for each attribute. An empty cell is left
        out.
    encoder
        How a text is mapped into the space of the target. None takes the text encoder of the target if it has one
        (`minilm`, `clip_text`, a member of `layers`, the text tower of `openclip`), and ``words`` otherwise. ``words``
        is a ridge regression from the words (or values of attributes) of training images to their embeddings;
        ``minilm``, or the folder of another sentence encoder, the same from sentence vectors.
    weight
        Weight of texts in the fusion with images, from 0 to 1. None chooses it with the training images that the
        encoder held out, or with its out-of-fold predictions.
    """

    captions: Path | None = None
    attributes: Path | None = None
    encoder: Literal["words", "minilm"] | Path | None = Field(default=None, union_mode="left_to_right")
    weight: float | None = Field(default=None, ge=0, le=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"captions", "attributes", "encoder"})

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.captions is None) == (self.attributes is None):
            raise ValueError("descriptions are captions or attributes; name one of the two files")
        return self

    @property
    def file(self) -> Path:
        """The file that is read."""
        return (self.captions or self.attributes or Path()).expanduser()

    @property
    def folder(self) -> Path | None:
        """Folder of the sentence encoder; None without one."""
        if self.encoder is None or self.encoder == "words":
            return None
        return find_sentence_folder(self.encoder, "evaluation.descriptions.encoder")

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the texts can be read and there are weights."""
        read_captions_or_attributes(self.file, {}, attributes=self.attributes is not None)
        if self.folder is not None:
            check_installed("transformers", "evaluation.descriptions.encoder")

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder, if there is one."""
        return list_sentence_weights(None if self.encoder == "words" else self.encoder, "encoder")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields, and the digests of texts and sentence encoder."""
        folder = self.folder
        encoder = self.encoder if folder is None else hash_sentence_encoder(folder)
        what = "attributes" if self.captions is None else "captions"
        return {**super().hashed_fields(), "encoder": encoder, f"{what}_digest": hash_once(self.file)}


class Description(NamedTuple):
    """Description of an image.

    Parameters
    ----------
    texts
        Its captions, or its attributes in one sentence.
    words
        Of each text the words, or the attributes with their values.
    """

    texts: tuple[str, ...]
    words: tuple[frozenset[str], ...]


#: From descriptions to an array with a row for each of them.
Read = Callable[[Sequence[Description]], np.ndarray]


def read_captions_or_attributes(
    path: Path, concepts: Mapping[str, str], *, attributes: bool | None = None
) -> dict[str, Description]:
    """Return the description of each image that a file knows.

    Parameters
    ----------
    path
        CSV file of captions (columns ``id`` and ``caption``) or of attributes (``id`` or ``concept``, then one column
        each).
    concepts
        Concept of each image by its id, for attributes of concepts.
    attributes
        Which of the two it is; by default captions where there is a column ``caption``.

    Raises
    ------
    DataError
        If it is neither, or a caption is empty.
    """
    if attributes is None:
        check_file(path, what="the file of descriptions", hint="give a CSV file of captions or attributes")
        lines = csv.reader(io.StringIO(read_text(path, what="the file of descriptions"), newline=""))
        attributes = "caption" not in [name.strip() for name in next(lines, [])]
    if not attributes:
        return {name: describe_captions(texts) for name, texts in read_caption_bank(path).items()}
    table = read_attributes(path)
    rows = {}
    for name, row in table.rows.items():
        pairs = zip(table.names, table.codes[row].tolist(), strict=True)
        known = [(column, table.values[column][code]) for column, code in pairs if code >= 0]
        if known:  # of an image without any known attribute nothing is said
            text = ", ".join(f"{column} {value}" for column, value in known).replace("_", " ")
            rows[name] = Description((text,), (frozenset(f"{c}={v}" for c, v in known),))
    if table.key == "id":
        return rows
    return {name: rows[concept] for name, concept in concepts.items() if concept in rows}


def describe_captions(texts: Sequence[str]) -> Description:
    """Return captions as a description; words are letters that are together, in lower case."""
    return Description(tuple(texts), tuple(find_words(text) for text in texts))


def find_words(text: str) -> frozenset[str]:
    """Return the words of a text.

    Examples
    --------
    >>> sorted(find_words("A red cat, and a dog"))
    ['a', 'and', 'cat', 'dog', 'red']
    """
    return frozenset(re.findall(r"[^\W\d_]+", text.lower()))


def pick_descriptions(
    known: Mapping[str, Description], ids: Sequence[str], *, path: Path, what: str
) -> list[Description]:
    """Return the descriptions of some images.

    Raises
    ------
    DataError
        If one is missing.
    """
    missing = [name for name in ids if name not in known]
    if missing:
        raise DataError(
            f"{path} describes {len(ids) - len(missing)} of {len(ids)} {what}, and not {missing[0]!r}; describe all of "
            "them, since an image without a description cannot be found by one."
        )
    return [known[name] for name in ids]


def open_reader(encoder: str | Path, training: Sequence[Description]) -> Read:
    """Return what makes features of shape (n, n_features) of n descriptions.

    Parameters
    ----------
    encoder
        ``words``, ``minilm``, or the folder of a sentence encoder.
    training
        Descriptions of training images, whose words are known.
    """
    if encoder != "words":
        sentences = SentenceEncoder(find_sentence_folder(encoder, "evaluation.descriptions.encoder"))

        known: dict[str, np.ndarray] = {}  # parts of the training images are read again and again

        def encode(texts: list[str]) -> np.ndarray:
            if new := [text for text in texts if text not in known]:
                known.update(zip(new, sentences.encode(new), strict=True))
            return np.stack([known[text] for text in texts])

        def read_sentences(asked: Sequence[Description]) -> np.ndarray:
            return make_unit(average_texts([each.texts for each in asked], encode))

        return read_sentences
    every = sorted({word for each in training for words in each.words for word in words})
    place = {word: number for number, word in enumerate(every)}

    def read_words(asked: Sequence[Description]) -> np.ndarray:
        rows = np.zeros((len(asked), len(place)))
        for row, each in zip(rows, asked, strict=True):
            for words in each.words:
                row[[place[word] for word in words if word in place]] += 1 / len(each.words)
        return rows

    return read_words


def learn_texts(training: Sequence[Description], vectors: np.ndarray, read: Read) -> Read:
    """Learn by ridge regression what descriptions of training images say of the embeddings of these.

    Images of one description count once, by their mean: which images share a caption must not decide on the penalty.

    Parameters
    ----------
    training
        Descriptions of n images.
    vectors : array of shape (n, ...)
        Their embeddings.
    read
        From `open_reader`.

    Returns
    -------
    callable
        Takes descriptions of m images and returns float32 of shape (m, ...).
    """
    code_of = {each: number for number, each in enumerate(dict.fromkeys(training))}
    codes = np.array([code_of[each] for each in training])
    flat = np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
    means = np.zeros((len(code_of), flat.shape[1]))
    np.add.at(means, codes, flat)
    means /= np.bincount(codes)[:, None]
    # Evenly spaced: neighbours in a list of images are often of one concept.
    kept = slice(None, None, -(-len(code_of) // MOST_LEARNT))
    predict = fit_ridge(read(list(code_of)[kept]), means[kept])
    shape = np.shape(vectors)[1:]

    def embed(asked: Sequence[Description]) -> np.ndarray:
        rows = read(asked)
        silent = [each.texts[0] for each, row in zip(asked, rows, strict=True) if not row.any()]
        if silent:
            raise DataError(
                f"{len(silent)} of {len(asked)} descriptions share no word with those of the training "
                f"images, first {silent[0][:60]!r}; use the same words for both, or set "
                "evaluation.descriptions.encoder to minilm."
            )
        return predict(rows).reshape(len(asked), *shape)

    return embed


def fit_ridge(features: np.ndarray, vectors: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a ridge regression whose penalty has the lowest error of leaving out one row after the other.

    Parameters
    ----------
    features : array of shape (n, n_features)
    vectors : array of shape (n, n_outputs)

    Returns
    -------
    callable
        Takes features of m rows and returns float32 of shape (m, n_outputs).

    Examples
    --------
    >>> predict = fit_ridge(np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([[1.0], [0.0], [1.0]]))
    >>> red, blue = predict(np.array([[1.0, 0], [0, 1]]))
    >>> bool(red[0] > blue[0])
    True
    """
    middle, mean = features.mean(axis=0), vectors.mean(axis=0, dtype=np.float64)
    left, sizes, right = np.linalg.svd(features - middle, full_matrices=False)
    turned = left.T @ (vectors - mean)  # (n_components, n_outputs)

    def measure(alpha: float) -> float:
        shrink = sizes**2 / (sizes**2 + alpha)
        leverage = 1 / len(vectors) + (left**2) @ shrink  # of each row on its own prediction
        residual = vectors - mean - left @ (shrink[:, None] * turned)
        return float(((residual / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).mean())

    alpha = min(np.geomspace(0.01, 1000, 16), key=measure)
    weights = right.T @ ((sizes / (sizes**2 + alpha))[:, None] * turned)
    return lambda asked: (mean + (asked - middle) @ weights).astype(np.float32)
