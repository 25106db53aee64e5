"""Ranks the test trials of one fold in the gallery, or the galleries, of its encoder.

Most encoders compare every query with the same gallery. One that has learnt a space of its own maps the gallery into
it; one that weighs image layers anew for each subject has a gallery for each of them, in which only this subject's
trials may be ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings, MappedRows, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import BrainEncoder, ImageEncoder
from braindecode_vis.base.devices import choose_device
from braindecode_vis.config import RetrievalConfig
from braindecode_vis.embeddings.image_descriptions import Description, Read, learn_texts, open_reader
from braindecode_vis.embeddings.text import average_texts, make_unit
from braindecode_vis.scoring.retrieval import Centre, Retrieval, compute_ranks, fit_centre

MOST_TEXTS = 2048  # of training images, whose mean is taken off texts: it lies within 2 % of that of all
_PER_QUERY = ("query_ids", "n_above", "n_tied", "true_similarities", "top_indices", "top_similarities")


@dataclass(frozen=True)
class GalleryPart:
    """Rows of a fold that are compared with one gallery: the rows, both sides as they were compared, and the ranks."""

    rows: np.ndarray
    queries: Embeddings
    gallery: Embeddings
    retrieval: Retrieval


@dataclass(frozen=True)
class GallerySource:
    """What the galleries of a fold are made of.

    Parameters
    ----------
    encoder
        The fitted brain encoder.
    bank
        Target embedding of every image.
    train_ids
        Distinct training images, whose embeddings give the centre.
    settings
        The run's setting of retrieval.
    """

    encoder: BrainEncoder
    bank: Embeddings
    train_ids: Sequence[str]
    settings: RetrievalConfig
    _centres: dict[str | None, Centre] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def per_subject(self) -> bool:
        """Whether every subject has a gallery of its own."""
        return self.encoder.has_subject_galleries

    def list_rows(self, subjects: np.ndarray) -> list[tuple[str | None, np.ndarray]]:
        """Return the rows of each gallery, with the subject it belongs to or None."""
        if not self.per_subject:
            return [(None, np.arange(len(subjects)))]
        return [(str(name), np.flatnonzero(subjects == name)) for name in sorted(set(subjects.tolist()))]

    def map_targets(self, targets: Embeddings, subject: str | None) -> Embeddings:
        """Bring image embeddings into the space of the encoder's predictions."""
        return self.encoder.map_targets(targets, subject)

    def fit_centre(self, subject: str | None) -> Centre:
        """Return the statistics of the training images in the space of the comparison; they are read once."""
        if subject not in self._centres:
            training = self.map_targets(self.bank.select(self.train_ids), subject)
            self._centres[subject] = fit_centre(training, self.settings.centre)
        return self._centres[subject]


def map_bank(source: GallerySource, bank: Embeddings, subject: str | None) -> Embeddings:
    """Return images of a bank as they are compared; each is read, mapped and centred when it is looked at.

    Parameters
    ----------
    source
        What the galleries of the fold are made of.
    bank
        In the target space; usually a memory map.
    subject
        Whose gallery it is, where every subject has one of its own.
    """
    centre = source.fit_centre(subject)
    spaces: list[str] = []

    def apply(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        given = Embeddings.from_checked(rows.astype(np.float32), bank.ids[numbers], bank.space)
        mapped = centre.apply(source.map_targets(given, subject))
        spaces[:] = [mapped.space]
        return np.asarray(mapped.vectors, dtype=np.float32)

    vectors = MappedRows(bank.vectors, apply)
    return Embeddings.from_checked(vectors, bank.ids, spaces[0])


def order_by_gallery(encoder: BrainEncoder, responses: Responses) -> Responses:
    """Return test trials so that those of one gallery are next to each other."""
    if not encoder.has_subject_galleries:
        return responses
    subjects = responses.trials["subject"].astype(str).to_numpy()
    # Stable, so that the trials of a subject keep their order.
    return responses.select(np.argsort(subjects, kind="stable"))


def rank_fold(
    source: GallerySource,
    predicted: Embeddings,
    subjects: np.ndarray,
    gallery_ids: Sequence[str],
    *,
    protocol: str,
) -> Retrieval:
    """Rank the true image of each prediction and return the ranks in the order of the predictions.

    Parameters
    ----------
    source
        What the galleries are made of.
    predicted
        Predictions of the test trials.
    subjects : array of shape (n_rows,)
        Subject of each of them.
    gallery_ids
        The candidates, the same for all subjects.
    protocol
        The gallery in words.
    """
    parts = []
    for subject, rows in source.list_rows(subjects):
        queries, gallery = _make_sides(source, predicted, rows, gallery_ids, subject)
        settings = source.settings
        ranked = compute_ranks(
            queries,
            gallery,
            n_top=settings.n_top,
            device=choose_device(settings.device, setting="retrieval.device"),
            protocol=protocol,
        )
        parts.append((rows, ranked))
    if len(parts) == 1:
        return parts[0][1]
    # Back from the order of subjects to that of the predictions.
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(ranked, name) for _, ranked in parts])[order] for name in _PER_QUERY
    }
    return replace(parts[0][1], **joined)


def split_by_gallery(
    source: GallerySource, predicted: Embeddings, subjects: np.ndarray, ranked: Retrieval
) -> list[GalleryPart]:
    """Return the parts of a ranked fold with both sides of the comparison."""
    parts = []
    for subject, rows in source.list_rows(subjects):
        queries, gallery = _make_sides(source, predicted, rows, ranked.gallery_ids, subject)
        own: dict[str, Any] = {name: getattr(ranked, name)[rows] for name in _PER_QUERY}
        parts.append(GalleryPart(rows, queries, gallery, replace(ranked, **own)))
    return parts


@dataclass(frozen=True)
class TextSide:
    """What brings descriptions into the galleries of a fold.

    Parameters
    ----------
    source
        What the galleries of the fold are made of.
    images
        The image encoder of the target.
    known
        Descriptions by image; those of training images are learnt from.
    encoder
        As in `DescriptionsConfig`.
    clip
        ``clip(texts)`` returns vectors in the space of the targets, where the target is a network of image and text.
    """

    source: GallerySource
    images: ImageEncoder
    known: Mapping[str, Description]
    encoder: Any = None
    clip: Callable[[list[str]], np.ndarray] | None = None
    _opened: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def fill(self) -> np.ndarray:
        """What is in an embedding where texts say nothing: what the centre takes off."""
        bank, names = self.source.bank, self.source.train_ids
        if self.source.settings.centre == "none":
            return np.zeros(bank.vectors.shape[1:], np.float32)
        mean: np.ndarray = np.asarray(bank.select(names).vectors).mean(axis=0, dtype=np.float64)
        return mean.astype(np.float32)

    @property
    def taught(self) -> list[str]:
        """Training images that are described."""
        return [str(name) for name in self.source.train_ids if str(name) in self.known]

    @cached_property
    def learns(self) -> bool:
        """Whether the meaning of texts is learnt from training images."""
        return self.encoder is not None or self._read_own([("a",)]) is None

    def describe(self) -> str:
        """Return in words how texts get into the space of the targets."""
        if not self.learns:
            return "by the text encoder of the target"
        what = "words" if self.encoder in (None, "words") else f"sentence vectors ({Path(self.encoder).name})"
        return f"by a regression from {what} of training images"

    def embed(self, asked: Sequence[Description], without: Sequence[str] = ()) -> np.ndarray:
        """Return vectors of descriptions in the space of the targets, of shape (n, ...).

        Parameters
        ----------
        asked
            The descriptions.
        without
            Training images that are not learnt from.

        Raises
        ------
        DataError
            If texts are learnt, and there are fewer than two descriptions of training images.
        """
        if not self.learns:
            own = self._read_own([each.texts for each in asked])
            assert own is not None
            return own
        names = self.taught
        if len({self.known[name] for name in names}) < 2:
            if len(names) > 1:
                raise DataError(
                    f"{len(names)} training images are all described as "
                    f"{self.known[names[0]].texts[0][:60]!r}, so the meaning of words cannot be learnt; "
                    "describe the differences, or predict texts (target.kind minilm)."
                )
            raise DataError(
                f"{len(names)} training images are described, too few to learn the meaning of words; "
                "describe training images too, or predict texts (target.kind minilm)."
            )
        if "read" not in self._opened:
            self._opened["read"] = open_reader(self.encoder or "words", [self.known[name] for name in names])
        key = ("learnt", tuple(sorted(without)))
        if key not in self._opened:
            left = set(without)
            kept = [name for name in names if name not in left]
            vectors = np.asarray(self.source.bank.select(kept).vectors)
            self._opened[key] = learn_texts(
                [self.known[name] for name in kept], vectors, self._opened["read"]
            )
        learnt: Read = self._opened[key]
        return learnt(asked)

    def _read_own(self, texts: Sequence[Sequence[str]]) -> np.ndarray | None:
        if self.clip is None:
            return self.images.embed_texts(texts, self.fill)
        clip = self.clip
        return average_texts(texts, lambda distinct: make_unit(clip(distinct)))

    def make_gallery(
        self,
        ids: Sequence[str],
        asked: Sequence[Description],
        subject: str | None,
        without: Sequence[str] = (),
    ) -> Embeddings:
        """Return descriptions as candidates, as they are compared; see `place`.

        Raises
        ------
        DataError
            If they say no more than the mean description, which has no direction to be compared in.
        """
        placed = self.place(ids, asked, subject, without)
        made = self.source.fit_centre(subject).apply(placed)
        # What rounding leaves of a difference of equal vectors is no direction.
        left, whole = (np.linalg.norm(each.flat(), axis=1) for each in (made, placed))
        empty = np.flatnonzero((left <= 1e-6 * whole) & (whole > 0))
        if len(empty):
            raise DataError(
                f"{len(empty)} of {len(asked)} descriptions do not distinguish their image from any "
                f"other, given the words of training images, first {asked[empty[0]].texts[0][:60]!r}; "
                "describe the differences (with words separated by spaces), or set "
                "evaluation.descriptions.encoder to minilm."
            )
        return made

    def place(
        self,
        ids: Sequence[str],
        asked: Sequence[Description],
        subject: str | None,
        without: Sequence[str] = (),
    ) -> Embeddings:
        """Return descriptions in the space of the comparison, before the centre of the images is applied.

        They are moved so that their own mean is taken off then, that of the descriptions of training images: texts lie
        apart from images in a network of both. Without such descriptions it is the mean of the candidates, and for
        targets that are made of texts that of the targets.
        """
        made = self._map(ids, self.embed(asked, without), subject)
        shift = self.source.fit_centre(subject).mean - self._fit_centre(subject, asked).mean
        return replace(made, vectors=(made.flat() + shift).reshape(made.vectors.shape))

    def _fit_centre(self, subject: str | None, asked: Sequence[Description]) -> Centre:
        centre = self.source.fit_centre(subject)
        if centre.name == "none":
            return centre
        learnt = list(dict.fromkeys(self.known[name] for name in self.taught))
        if len(learnt) < 2:
            if self.clip is None:
                return centre
            learnt = list(asked)
        if ("mean", subject) not in self._opened:
            learnt = learnt[:: -(-len(learnt) // MOST_TEXTS)]
            read = self._map([str(n) for n in range(len(learnt))], self.embed(learnt), subject)
            self._opened["mean", subject] = fit_centre(read, "mean").mean
        return replace(centre, mean=self._opened["mean", subject])

    def _map(self, ids: Sequence[str], vectors: np.ndarray, subject: str | None) -> Embeddings:
        return self.source.map_targets(Embeddings(vectors, list(ids), self.source.bank.space), subject)

    def show_images(self, ids: Sequence[str], subject: str | None) -> Embeddings | None:
        """Return images as candidates without what texts say of them; None if nothing is left."""
        bank = self.source.bank.select(list(ids))
        seen = self.images.hide_texts(np.asarray(bank.vectors), self.fill)
        if seen is None:
            return None
        return self.source.fit_centre(subject).apply(self._map(ids, seen, subject))


def _make_sides(
    source: GallerySource,
    predicted: Embeddings,
    rows: np.ndarray,
    gallery_ids: Sequence[str] | np.ndarray,
    subject: str | None,
) -> tuple[Embeddings, Embeddings]:
    # Of training images alone, so that no query moves because of what else was tested.
    centre = source.fit_centre(subject)
    queries = predicted.take(rows)
    gallery = source.map_targets(source.bank.select(list(gallery_ids)), subject)
    return centre.apply(queries), centre.apply(gallery)
