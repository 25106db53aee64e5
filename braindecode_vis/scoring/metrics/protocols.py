"""Retrieval protocols of single data sets and papers, each as a function that returns one value per query.

Owns NSD's 300-way retrieval in both directions, mean average precision with several relevant items, retrieval inside
a concept, galleries of concept templates, zero-shot classification by text, and single-trial beside averaged queries.
Ranks are those of `braindecode_vis.scoring.retrieval`. One-to-one matching of all queries at once (Hungarian) is no
retrieval and is not offered.

References
----------
Lin et al. (2022), arXiv:2209.11737, and Scotti et al. (2023), arXiv:2305.18274 (300-way NSD retrieval); Song et al.
(2024), NICE, arXiv:2308.13234 (templates); Benchetrit et al. (2024), arXiv:2310.19812 (relative median rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space, normalise_rows
from braindecode_vis.base.checks import DataError, check_unique
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.scoring.metrics.identification import compute_win_probability
from braindecode_vis.scoring.retrieval import Retrieval, compute_ranks, compute_similarity
from braindecode_vis.scoring.uncertainty import Interval, bootstrap_interval

#: Names for ``evaluation.protocols``.
ProtocolName = Literal[
    "relative_median_rank", "mean_average_precision", "within_concept", "instances", "nsd_300", "zero_shot_text",
    "concept_templates", "transductive", "composition", "neuralbench",
]  # fmt: skip
BLOCK_QUERIES = 256
TIE_TOLERANCE = 1e-6  # of single-precision similarities


# --- NSD ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnRetrieval:
    """Top-1 retrieval in random subsets of a test set, in one direction.

    Parameters
    ----------
    value
        Mean over draws of the share of hits.
    draws : array of shape (n_draws,)
        Share of hits of each draw. Draws overlap, so their spread is no sampling error.
    exact : array of shape (n_items,)
        Probability of a hit of each item over all subsets that hold it, in closed form.
    interval
        Of the mean of `exact`: a bootstrap over images.
    n_items
        Size of a subset; chance is 1 / n_items.
    """

    value: float
    draws: np.ndarray
    exact: np.ndarray
    interval: Interval
    n_items: int


def retrieve_in_draws(
    brain: Embeddings,
    images: Embeddings,
    *,
    n_items: int = 300,
    n_draws: int = 30,
    seed: int = 0,
    n_boot: int = 10_000,
    device: str = "auto",
) -> dict[str, DrawnRetrieval]:
    """Return NSD's retrieval in both directions: ``image_retrieval`` (brain to image) and ``brain_retrieval``.

    Parameters
    ----------
    brain : Embeddings of n_test rows
        One prediction per test image, repetitions averaged. Token embeddings are flattened.
    images : Embeddings
        The true embeddings, at least of the same ids.
    n_items, n_draws
        Size and number of the subsets, drawn without replacement.
    seed
        Root seed of the draws and the bootstrap.
    n_boot
        Resamples of the images.
    device
        Where the similarity is computed.

    Returns
    -------
    dict
        A `DrawnRetrieval` per direction. The same subsets serve both. A tie is lost.

    Raises
    ------
    DataError
        If a stimulus has several predictions or there are fewer than `n_items`.
    """
    check_unique(list(brain.ids), what="the predictions to retrieve (average the repetitions of an image)")
    n = len(brain)
    if n_draws < 1 or not 2 <= n_items <= n:
        raise DataError(
            f"{n_draws} draw(s) of {n_items} from {n} test images are not possible; lower the number of items."
        )
    forward = compute_similarity(brain, images.select(list(brain.ids)), device=device)  # (n_test, n_test)
    generator = make_generator(seed, "retrieval", "draws")
    # The same subsets for both directions, so that their difference is not one of draws.
    subsets = [generator.permutation(n)[:n_items] for _ in range(n_draws)]
    result = {}
    for name, similarity in (("image_retrieval", forward), ("brain_retrieval", forward.T)):
        true = np.diagonal(similarity)[:, None]
        rivals = (similarity >= true - TIE_TOLERANCE) & ~np.eye(n, dtype=bool)  # who keeps item i from a hit
        draws = np.array([1 - rivals[np.ix_(rows, rows)].any(axis=1).mean() for rows in subsets])
        exact = compute_win_probability(n - 1 - rivals.sum(axis=1), np.full(n, n - 1), n_items)
        interval = bootstrap_interval(exact, n_boot=n_boot, seed=seed)
        result[name] = DrawnRetrieval(float(draws.mean()), draws, exact, interval, n_items)
    return result


# --- several relevant items -------------------------------------------------------------------------------------


def compute_average_precision(
    queries: Embeddings,
    gallery: Embeddings,
    query_labels: Sequence[object] | np.ndarray,
    gallery_labels: Sequence[object] | np.ndarray,
    *,
    device: str = "auto",
) -> np.ndarray:
    """Return the average precision of each query where every item of its label is relevant, shape (n_queries,).

    The mean over the relevant items of the precision at their rank. Among equally similar items (within 1e-6) relevant
    ones come last, so a collapsed gallery gains nothing. With one relevant item it is the reciprocal rank.

    Parameters
    ----------
    queries, gallery : Embeddings
        In one space.
    query_labels, gallery_labels
        Label of each row, for example the concept.
    device
        Where the similarity is computed.

    Raises
    ------
    DataError
        If a label has no item in the gallery.

    Examples
    --------
    >>> gallery = Embeddings(np.eye(3, dtype=np.float32), ["a", "b", "c"], "toy")
    >>> query = Embeddings(np.array([[3, 2, 1]], dtype=np.float32), ["x"], "toy")
    >>> compute_average_precision(query, gallery, ["cat"], ["cat", "dog", "cat"], device="cpu").round(3)
    array([0.833])
    """
    wanted, names = _as_labels(query_labels, queries, "query"), _as_labels(gallery_labels, gallery, "gallery")
    _check_present(wanted, names)
    values = np.empty(len(queries))
    for start in range(0, len(queries), BLOCK_QUERIES):
        rows = np.arange(start, min(start + BLOCK_QUERIES, len(queries)))
        block = queries.take(rows)
        similarity = compute_similarity(block, gallery, device=device).round(6)  # nearly equal is equal
        relevant = wanted[rows][:, None] == names[None]  # (n_block, n_gallery)
        # By similarity, and among equal ones the relevant last: a collapsed gallery gains nothing.
        order = np.lexsort((relevant, -similarity), axis=1)
        ordered = np.take_along_axis(relevant, order, axis=1)
        precision = np.cumsum(ordered, axis=1) / np.arange(1, len(gallery) + 1)
        values[rows] = (precision * ordered).sum(axis=1) / ordered.sum(axis=1)
    return values


def compute_chance_precision(n_relevant: np.ndarray, gallery_size: int) -> np.ndarray:
    """Return the expected average precision of a random order, for each number of relevant items.

    An item at place k is relevant with probability R / N, and then (k - 1) (R - 1) / (N - 1) of those before it are.

    Examples
    --------
    >>> compute_chance_precision(np.array([1, 4]), 4).round(4)
    array([0.5208, 1.    ])
    """
    place = np.arange(1, gallery_size + 1)  # (gallery_size,)
    other = (np.asarray(n_relevant) - 1)[:, None] / max(1, gallery_size - 1)
    return ((1 + (place - 1) * other) / place).mean(axis=1)


def identify_within_label(
    queries: Embeddings,
    gallery: Embeddings,
    gallery_labels: Sequence[object] | np.ndarray,
    *,
    device: str = "auto",
) -> np.ndarray:
    """Return the share of gallery items of its own label that each query's true item beats, shape (n_queries,).

    Two-way identification inside the concept: a large gallery with several images per concept (THINGS-MEG's large set)
    rewards knowing the concept, and this asks what is known beyond it. Chance is 0.5; ties share their places.

    Parameters
    ----------
    queries : Embeddings
        Their ids name the true item.
    gallery : Embeddings
        One row per stimulus.
    gallery_labels
        Concept of each row of the gallery.
    device
        Where ranks are computed.

    Raises
    ------
    DataError
        If a query's concept has one image only.
    """
    labels = _as_labels(gallery_labels, gallery, "gallery")
    label_of = dict(zip(map(str, gallery.ids), labels, strict=True))
    missing = [str(i) for i in queries.ids if str(i) not in label_of]
    if missing:
        raise DataError(
            f"{len(missing)} queries have no true item in the gallery, first {str(missing[0])!r}."
        )
    own = np.array([label_of[str(i)] for i in queries.ids])
    values = np.empty(len(queries))
    for label in np.unique(own):
        rows, items = np.flatnonzero(own == label), np.flatnonzero(labels == label)
        if len(items) < 2:
            raise DataError(
                f"{str(label)!r} has only one image in the gallery, so images within it cannot be distinguished."
            )
        found = compute_ranks(
            queries.take(rows),
            gallery.take(items),
            n_top=0, device=device,
        )  # fmt: skip
        values[rows] = 1 - (found.ranks - 1) / (len(items) - 1)
    return values


# --- other galleries ----------------------------------------------------------------------------------------------


def make_concept_templates(
    others: Embeddings, concepts: Sequence[object] | np.ndarray, test: Mapping[str, str]
) -> Embeddings:
    """Return a gallery whose item for each test image is the mean embedding of *other* images of its concept.

    NICE ranks among such templates. They are smoother than single images and give higher numbers, so results carry
    ``@concept-templates`` in their name and are never beside those of the exact images.

    Parameters
    ----------
    others : Embeddings
        Images that are not tested.
    concepts : sequence of length n_others
        Concept of each.
    test
        Concept of each test image, by its id; concepts differ.

    Returns
    -------
    Embeddings
        One row per test image, unit-length images averaged, in the space of `others`.

    Raises
    ------
    DataError
        If a test image is among the others, a concept has no other image, or two test images share a concept.
    """
    shared = sorted(set(map(str, others.ids)) & set(test))
    if shared:
        raise DataError(
            f"{len(shared)} test image(s) are in their own template, first {shared[0]!r}; leave them out."
        )
    check_unique(list(test.values()), what="concepts of a gallery of templates (they would tie)")
    labels = _as_labels(concepts, others, "image")
    missing = [concept for concept in test.values() if concept not in set(labels)]
    if missing:
        raise DataError(f"{len(missing)} test concept(s) have no other image, first {str(missing[0])!r}.")
    vectors = others.flat().astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # To length one first, so that an image with a long embedding does not outweigh the others.
    vectors = vectors / np.where(norms > 0, norms, 1.0)
    rows = np.stack([vectors[labels == concept].mean(axis=0) for concept in test.values()])
    shape = (len(test), *others.vectors.shape[1:])
    return Embeddings(rows.reshape(shape).astype(np.float32), list(test), others.space)


def classify_by_text(
    predicted: Embeddings, concepts: Sequence[object] | np.ndarray, text: Embeddings, *, device: str = "auto"
) -> Retrieval:
    """Rank the name of each prediction's concept among all concept names: zero-shot classification.

    Parameters
    ----------
    predicted : Embeddings of n_rows rows
        Predictions in the joint space of images and text, not centred by image statistics.
    concepts : sequence of length n_rows
        True concept of each.
    text : Embeddings
        One row per concept, its id; see `braindecode_vis.embeddings.text.embed_text`.
    device
        Where ranks are computed.

    Returns
    -------
    Retrieval
        Ranks of the true names; top-k and the rest follow from it.
    """
    labels = _as_labels(concepts, predicted, "prediction")
    queries = Embeddings(predicted.vectors, labels.astype(object), predicted.space)
    return compute_ranks(queries, text, device=device, protocol="zero-shot by text")


def compare_bindings(queries: Embeddings, true: Embeddings, swapped: Embeddings) -> np.ndarray:
    """Return for each query 1 if its true item is more similar than the one of the same parts, 0 if less, 0.5 if equal.

    Parameters
    ----------
    queries, true, swapped : Embeddings of n rows
        In one space, row by row.

    Returns
    -------
    array of shape (n,)

    Examples
    --------
    >>> one, other = (Embeddings(np.eye(2, dtype=np.float32)[[k]], ["a"], "toy") for k in (0, 1))
    >>> compare_bindings(one, one, other), compare_bindings(one, other, other)
    (array([1.]), array([0.5]))
    """
    check_same_space(queries, true)
    check_same_space(queries, swapped)
    units = [normalise_rows(side.flat().astype(np.float64)) for side in (queries, true, swapped)]
    difference = (units[0] * (units[1] - units[2])).sum(axis=1)
    # Items of one pair may have a cosine of 0.999 with each other: only what is equal is a tie.
    return np.where(np.abs(difference) <= 1e-9, 0.5, (difference > 0).astype(float))


def compare_parts(
    queries: Embeddings, true: Embeddings, groups: Sequence[object] | np.ndarray, pairs: Sequence[str]
) -> np.ndarray:
    """Return the share of items of other pairs of its group that each query's true item beats, NaN where none are.

    Parameters
    ----------
    queries, true : Embeddings of n rows
        In one space, row by row.
    groups, pairs : sequences of length n
        Items are compared within a group, and never with one of the same pair.
    """
    check_same_space(queries, true)
    left, right = (normalise_rows(side.flat().astype(np.float64)) for side in (queries, true))
    similarity = left @ right.T  # (n, n)
    own = np.diagonal(similarity)[:, None]
    names, labels = np.asarray(pairs, dtype=object), np.asarray(groups, dtype=object)
    rivals = (labels[:, None] == labels[None]) & (names[:, None] != names[None])
    beaten = (own > similarity) + 0.5 * (own == similarity)
    counts = rivals.sum(axis=1)
    return np.where(counts > 0, (beaten * rivals).sum(axis=1) / np.maximum(counts, 1), np.nan)


# --- queries ------------------------------------------------------------------------------------------------------


def average_predictions(
    predicted: Embeddings, subjects: Sequence[object] | np.ndarray | None = None
) -> tuple[Embeddings, np.ndarray]:
    """Return the mean prediction of each stimulus (of each subject), and the subject of each row.

    This averages what was decoded from single trials. Averaging the responses before decoding is another protocol and
    usually the better one.

    Parameters
    ----------
    predicted : Embeddings of n_trials rows
        Ids repeat with the repetitions.
    subjects : sequence of length n_trials, optional
        Subject of each trial.

    Returns
    -------
    Embeddings
        One row per stimulus and subject, in the order of first use.
    array of shape (n_rows,)
        Subject of each row.
    """
    whose = ["" for _ in predicted.ids] if subjects is None else [str(s) for s in subjects]
    if len(whose) != len(predicted):
        raise DataError(f"{len(predicted)} predictions came with {len(whose)} subjects.")
    keys = list(zip(whose, map(str, predicted.ids), strict=True))
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    codes = np.array([order[key] for key in keys])
    flat = predicted.flat().astype(np.float64)
    sums = np.zeros((len(order), flat.shape[1]))
    np.add.at(sums, codes, flat)
    means = (sums / np.bincount(codes)[:, None]).astype(np.float32)
    rows = means.reshape(len(order), *predicted.vectors.shape[1:])
    return (
        Embeddings(rows, [key[1] for key in order], predicted.space),
        np.array([key[0] for key in order], dtype=object),
    )


def merge_equal_items(gallery: Embeddings) -> tuple[Embeddings, dict[str, str]]:
    """Return a gallery in which items of equal vectors are one, and the item that each id became.

    Some benchmarks make their gallery of the distinct target vectors, so that two files of one picture are one
    candidate.

    Parameters
    ----------
    gallery : Embeddings of n_items rows
        Unique ids.

    Examples
    --------
    >>> vectors = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    >>> merged, became = merge_equal_items(Embeddings(vectors, ["a", "b", "c"], "toy"))
    >>> list(merged.ids), became["c"]
    (['a', 'b'], 'a')
    """
    _, first, place = np.unique(gallery.flat(), axis=0, return_index=True, return_inverse=True)
    became = {str(i): str(gallery.ids[first[n]]) for i, n in zip(gallery.ids, place.ravel(), strict=True)}
    return gallery.take(np.sort(first)), became


def _as_labels(labels: Sequence[object] | np.ndarray, rows: Embeddings, what: str) -> np.ndarray:
    if len(labels) != len(rows):
        raise DataError(f"{len(rows)} {what} embeddings came with {len(labels)} labels.")
    return np.array([str(label) for label in labels])


def _check_present(wanted: np.ndarray, names: np.ndarray) -> None:
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise DataError(
            f"{len(missing)} label(s) of queries have no item in the gallery, first {str(missing[0])!r}."
        )
