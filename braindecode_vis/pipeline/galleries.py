"""Rank the test trials of one fold in the gallery, or the galleries, that its encoder asks for.

Most encoders compare every query with the same gallery. One that has learnt a space of its own maps the gallery into
it; one that weighs image layers anew for each subject has a gallery for each of them, in which only this subject's
trials may be ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings, MappedRows, Responses
from braindecode_vis.config import RetrievalConfig
from braindecode_vis.contracts import WholeBrainEncoder
from braindecode_vis.devices import choose_device
from braindecode_vis.retrieval import Centre, Retrieval, compute_ranks, fit_centre

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

    encoder: WholeBrainEncoder
    bank: Embeddings
    train_ids: Sequence[str]
    settings: RetrievalConfig

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
        """Return the statistics of the training images in the space of the comparison."""
        return fit_centre(self.map_targets(self.bank.select(self.train_ids), subject), self.settings.centre)


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


def order_by_gallery(encoder: WholeBrainEncoder, responses: Responses) -> Responses:
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


def _make_sides(
    source: GallerySource,
    predicted: Embeddings,
    rows: np.ndarray,
    gallery_ids: Sequence[str] | np.ndarray,
    subject: str | None,
) -> tuple[Embeddings, Embeddings]:
    # Of training images alone, so that no query moves because of what else was tested.
    centre = source.fit_centre(subject)
    queries = Embeddings(predicted.vectors[rows], predicted.ids[rows], predicted.space)
    gallery = source.map_targets(source.bank.select(list(gallery_ids)), subject)
    return centre.apply(queries), centre.apply(gallery)
