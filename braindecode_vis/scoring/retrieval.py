"""Retrieval: finds the image of a gallery that is nearest to a predicted embedding.

Owns cosine similarity, ranks with a stated tie rule and everything that follows from a rank (top-k, exact
k-way accuracy, reciprocal and median rank). Works in blocks of bounded memory on CPU or GPU. Knows nothing of
brains, images or intervals: one value per query comes out, and `braindecode_vis.scoring.score_table` adds statistics.

Similarity is compared in single precision, and every candidate that comes too close to the true item to be told
apart there is compared again in double precision. Two candidates tie if their cosines differ by less than
`TIE_TOLERANCE`. The gallery is visited in the order of its ids, so that ranks do not depend on row order.

Two tie rules, and a third for one benchmark; every function says which it uses:

- *shared*: tied candidates share their mean rank. Rank statistics and k-way accuracy use it (the expected value
  under random tie breaking), so a collapsed gallery scores exactly at chance.
- *against*: ties count against the query. Top-k uses it, so a collapsed gallery scores zero, never a lucky hit.
- *middle*: a query is a hit if the mean rank of the tied candidates is good enough. NeuralBench and the challenge
  that uses its task count top-k in this way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from braindecode_vis.base.arrays import Embeddings, MappedRows, check_same_space, normalise_rows, read_rows
from braindecode_vis.base.checks import ConfigError, DataError, check_option, check_unique
from braindecode_vis.base.devices import choose_device, full_precision_products
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.store import read_json, write_json

TieRule = Literal["shared", "against"]
HitRule = Literal["shared", "against", "middle"]

#: Cosines closer than this are tied: far above the rounding of double precision (1e-13 for 10^5 features),
#: far below what single-precision embeddings can express.
TIE_TOLERANCE = 1e-10
BLOCK_QUERIES, BLOCK_GALLERY = 1024, 4096  # 16 MB of similarities, the fastest size measured on two cores
#: Below, a candidate comes first in most queries by chance.
FEWEST_QUERIES = 8
BLOCK_VALUES = 1 << 24  # most numbers of one block of embeddings (64 MB in single precision)


@dataclass(frozen=True)
class Retrieval:
    """Where the true item of each query ranks in a gallery, and what ranks first.

    Parameters
    ----------
    query_ids : sequence of length n_queries
        Stimulus id of each query; may repeat.
    gallery_ids : sequence of length n_gallery
        Unique stimulus ids of the candidates, in the order they were given.
    n_above : int array of shape (n_queries,)
        Candidates more similar to the query than the true item.
    n_tied : int array of shape (n_queries,)
        Other candidates exactly as similar as the true item.
    true_similarities : float array of shape (n_queries,)
        Cosine similarity of each query to its true item.
    top_indices : int array of shape (n_queries, n_top)
        Rows of the gallery, most similar first; equal similarities in the order of their ids.
    top_similarities : float array of shape (n_queries, n_top)
        Cosine similarities of these rows.
    space
        Space in which the similarity was measured.
    protocol
        Data set, split, averaging and gallery, as text.
    """

    query_ids: np.ndarray
    gallery_ids: np.ndarray
    n_above: np.ndarray
    n_tied: np.ndarray
    true_similarities: np.ndarray
    top_indices: np.ndarray
    top_similarities: np.ndarray
    space: str
    protocol: str = ""

    def __post_init__(self) -> None:
        lengths = {len(self.query_ids), len(self.n_above), len(self.n_tied), len(self.true_similarities)}
        if len(lengths) != 1 or not len(self.query_ids):
            raise DataError(f"a retrieval needs one entry per query and at least one query, got {lengths}.")
        if (self.n_above + self.n_tied).max() >= len(self.gallery_ids):
            raise DataError(f"a rank exceeds the gallery of {len(self.gallery_ids)} candidates.")

    @property
    def n_queries(self) -> int:
        """Number of queries."""
        return len(self.query_ids)

    @property
    def gallery_size(self) -> int:
        """Number of candidates, the true one included."""
        return len(self.gallery_ids)

    @property
    def ranks(self) -> np.ndarray:
        """Rank of the true item, 1 is best, ties share the mean rank; shape (n_queries,)."""
        return 1.0 + self.n_above + 0.5 * self.n_tied

    @property
    def worst_ranks(self) -> np.ndarray:
        """Rank if every tie were lost; shape (n_queries,)."""
        return 1 + self.n_above + self.n_tied


@dataclass(frozen=True)
class Centre:
    """What is subtracted from, and divides, every embedding before the cosine.

    Image embeddings of one network share a large mean; a prediction shrunk towards it is nearest to whichever image
    is most ordinary. Without the mean, the cosine asks for what is particular. Both statistics come from training
    images.

    Parameters
    ----------
    mean, scale : float32 arrays of shape (n_features,)
        Of the flattened training embeddings; `scale` is one where only the mean is removed.
    name
        ``mean`` or ``zscore``; becomes part of the space's name.
    """

    mean: np.ndarray
    scale: np.ndarray
    name: str

    def apply(self, embeddings: Embeddings) -> Embeddings:
        """Return the embeddings in the centred space, flattened to (n_rows, n_features)."""
        vectors = (embeddings.flat() - self.mean) / self.scale
        return Embeddings(vectors, embeddings.ids, f"{embeddings.space}/centre={self.name}")


def fit_centre(training: Embeddings, name: str) -> Centre:
    """Compute the statistics of the training images' embeddings.

    Parameters
    ----------
    training
        One row per training image.
    name
        ``none``, ``mean`` or ``zscore``.
    """
    check_option("retrieval.centre", name, ("none", "mean", "zscore"))
    vectors = training.flat()
    n_features = vectors.shape[1]
    zero, one = np.zeros(n_features, np.float32), np.ones(n_features, np.float32)
    if name == "none":
        return Centre(zero, one, name)
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    if name == "mean":
        return Centre(mean, one, name)
    scale = vectors.std(axis=0, dtype=np.float64)
    return Centre(mean, np.where(scale > 0, scale, 1.0).astype(np.float32), name)


_RETRIEVAL_ARRAYS = ("n_above", "n_tied", "true_similarities", "top_indices", "top_similarities")


def write_retrieval(folder: Path, retrieval: Retrieval) -> None:
    """Write a retrieval as one ``.npy`` per array and ``retrieval.json``."""
    for name in _RETRIEVAL_ARRAYS:
        np.save(folder / f"{name}.npy", getattr(retrieval, name), allow_pickle=False)
    names = {"query_ids": list(retrieval.query_ids), "gallery_ids": list(retrieval.gallery_ids)}
    write_json(folder / "retrieval.json", {**names, "space": retrieval.space, "protocol": retrieval.protocol})


def read_retrieval(folder: Path) -> Retrieval:
    """Read what `write_retrieval` wrote."""
    meta = read_json(folder / "retrieval.json")
    return Retrieval(
        query_ids=np.asarray(meta["query_ids"], dtype=object),
        gallery_ids=np.asarray(meta["gallery_ids"], dtype=object),
        space=meta["space"],
        protocol=meta["protocol"],
        **{name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _RETRIEVAL_ARRAYS},
    )


def compute_ranks(
    queries: Embeddings,
    gallery: Embeddings,
    *,
    n_top: int = 10,
    device: str = "auto",
    protocol: str = "",
    block_queries: int = BLOCK_QUERIES,
    block_gallery: int = BLOCK_GALLERY,
) -> Retrieval:
    """Rank the true item of every query among all candidates by cosine similarity.

    Token embeddings are flattened and every vector is read in single precision. Memory beyond the two inputs is
    a few blocks, whatever the number of queries and candidates.

    Parameters
    ----------
    queries : Embeddings of n_queries rows
        Predicted embeddings; several may share a stimulus id.
    gallery : Embeddings of n_gallery rows
        Candidates, one per stimulus id, in the same space.
    n_top
        How many of the most similar candidates to list; 0 lists none.
    device
        ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
    protocol
        Text that travels with the result.
    block_queries, block_gallery
        Rows per block; they change the speed only. A gallery of `arrays.MappedRows` is visited in the order of its
        file: of candidates that are equal at the end of the list, others may be listed.

    Returns
    -------
    Retrieval
        Ranks, ties and the most similar candidates of every query.

    Raises
    ------
    DataError
        If the spaces differ, a gallery id repeats, a query's stimulus is not in the gallery, or a gallery vector is
        zero. A query that is zero ties with the whole gallery.

    Examples
    --------
    >>> import numpy as np
    >>> gallery = Embeddings(np.eye(3, dtype=np.float32), ["a", "b", "c"], "toy")
    >>> queries = Embeddings(np.array([[2, 1, 0], [2, 1, 0]], dtype=np.float32), ["a", "b"], "toy")
    >>> compute_ranks(queries, gallery, device="cpu").ranks
    array([1., 2.])
    """
    import torch

    check_same_space(queries, gallery)
    target = _find_targets(queries.ids, gallery.ids)
    if n_top < 0:
        raise ConfigError(f"n_top must be 0 or more, got {n_top}.")
    n_top = min(n_top, len(gallery))
    order = np.argsort(np.array([str(i) for i in gallery.ids]), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    if isinstance(gallery.vectors, MappedRows):  # in the order of its file: a disk is slow at random places
        order = np.arange(len(gallery))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))

    with torch.inference_mode(), full_precision_products():
        left = _Rows(queries, np.arange(len(queries)), choose_device(device, setting="device"), "query")
        right = _Rows(gallery, order, left.device, "gallery item")
        true = _pair_similarities(left, right, np.arange(len(queries)), position[target])
        n_above = np.zeros(len(queries), dtype=np.int64)
        n_close = np.zeros(len(queries), dtype=np.int64)
        best = _Best(len(queries), n_top)
        buffer = torch.empty(block_queries * block_gallery, device=left.device)
        for g in _blocks(len(right), block_gallery, right.n_features):
            candidates = right.unit(g)
            for q in _blocks(len(left), block_queries, left.n_features):
                similar = _multiply(left.unit(q), candidates, buffer)  # (block_queries, block_gallery)
                above, close = _count_block(similar, true[q], left, right, q, g)
                n_above[q] += above
                n_close[q] += close
                best.update(similar, q, g)
        top, top_similar = best.sort(left, right, place[order])
    return Retrieval(
        query_ids=queries.ids,
        gallery_ids=gallery.ids,
        n_above=n_above,
        n_tied=n_close - 1,  # the true item is as similar as itself
        true_similarities=true,
        top_indices=order[top],
        top_similarities=top_similar,
        space=gallery.space,
        protocol=protocol,
    )


def rank_similarities(
    similarity: np.ndarray,
    query_ids: Sequence[Any] | np.ndarray,
    gallery_ids: Sequence[Any] | np.ndarray,
    *,
    n_top: int = 10,
    space: str = "similarity",
    protocol: str = "",
) -> Retrieval:
    """Rank the true item of every query in a matrix of similarities (or logits) that was computed elsewhere.

    Equal values tie and nothing is rounded: what was computed in half precision has the ties that it was saved with.
    Rows are read block by block, so that the matrix may be a memory map.

    Parameters
    ----------
    similarity : array of shape (n_queries, n_gallery)
        Finite numbers, higher is better.
    query_ids : sequence of length n_queries
        Id of the true item of each query; may repeat.
    gallery_ids : sequence of length n_gallery
        Unique ids of the columns.
    n_top, protocol
        As for `compute_ranks`.
    space
        Name of what was measured.

    Returns
    -------
    Retrieval
        Its similarities are the values of the matrix.

    Raises
    ------
    DataError
        If a gallery id repeats, or a query's true item is not among them.

    Examples
    --------
    >>> rank_similarities(np.array([[3.0, 1.0], [2.0, 2.0]]), ["a", "b"], ["a", "b"]).ranks
    array([1. , 1.5])
    """
    shape = (len(query_ids), len(gallery_ids))
    if similarity.shape != shape:
        raise DataError(
            f"a matrix of {shape[0]} queries by {shape[1]} candidates was expected, got {similarity.shape}."
        )
    target = _find_targets(query_ids, gallery_ids)
    order = np.argsort(np.array([str(i) for i in gallery_ids]), kind="stable")
    n_top = min(n_top, shape[1])
    n_above, n_tied = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.int64)
    true, best = np.zeros(shape[0]), np.zeros((shape[0], n_top))
    top = np.zeros((shape[0], n_top), np.int64)
    for rows in _blocks(shape[0], BLOCK_QUERIES, shape[1]):
        block = np.asarray(similarity[rows])
        # Whole numbers are negated below, which unsigned ones cannot be.
        block = block if block.dtype.kind == "f" else block.astype(np.float64)
        own = np.take_along_axis(block, target[rows][:, None], axis=1)  # (n_block, 1)
        n_above[rows], n_tied[rows] = (block > own).sum(axis=1), (block == own).sum(axis=1) - 1
        true[rows] = own[:, 0]
        if n_top:
            # In the order of the ids, so that equal values do not depend on the order of the columns.
            first = np.argsort(-block[:, order], axis=1, kind="stable")[:, :n_top]
            top[rows] = order[first]
            best[rows] = np.take_along_axis(block, top[rows], axis=1)
    return Retrieval(
        query_ids=np.asarray(query_ids, dtype=object),
        gallery_ids=np.asarray(gallery_ids, dtype=object),
        n_above=n_above, n_tied=n_tied, true_similarities=true, top_indices=top, top_similarities=best, space=space,
        protocol=protocol,
    )  # fmt: skip


def describe_common_choice(
    first: Sequence[str], shown: Sequence[str | None], *, what: str = "queries"
) -> str:
    """Return a sentence if most queries name one and the same candidate first; empty otherwise, and for few of them.

    A candidate that most queries did show is a right answer: it must come first at least twice as often as it was
    shown.

    Parameters
    ----------
    first : sequence of length n_queries
        Candidate that each query names first.
    shown : sequence of length n_queries
        What each of them showed, None if that is not known.
    what
        Word for the queries.

    Examples
    --------
    >>> describe_common_choice(["a"] * 9 + ["b"], ["a", "b"] * 5)
    ''
    >>> describe_common_choice(["a"] * 9 + ["b"], list("abcdefghij"))
    "9 of 10 queries have 'a' at rank 1, but only 1 of them showed it: the predictions hardly depend on the response."
    """
    if len(first) < FEWEST_QUERIES:
        return ""
    choice, times = Counter(map(str, first)).most_common(1)[0]
    right = sum(name is not None and str(name) == choice for name in shown)
    if 2 * times <= len(first) or times < 2 * right:
        return ""
    return (
        f"{times} of {len(first)} {what} have {choice!r} at rank 1, but only {right} of them showed it: "
        "the predictions hardly depend on the response."
    )


def compute_similarity(queries: Embeddings, gallery: Embeddings, *, device: str = "auto") -> np.ndarray:
    """Return the cosine similarity of every query to every candidate.

    The whole matrix is held in memory: meant for the few hundred items of a permutation test or a figure.
    Computed in double precision and rounded once, so equal candidates have equal similarities.

    Parameters
    ----------
    queries, gallery : Embeddings of n_queries and n_gallery rows
        In the same space.
    device
        As for `compute_ranks`.

    Returns
    -------
    float32 array of shape (n_queries, n_gallery)
        Cosine similarities.

    Examples
    --------
    >>> import numpy as np
    >>> rows = Embeddings(np.array([[1, 0], [1, 1]], dtype=np.float32), ["a", "b"], "toy")
    >>> compute_similarity(rows, rows, device="cpu").round(3)
    array([[1.   , 0.707],
           [0.707, 1.   ]], dtype=float32)
    """
    import torch

    check_same_space(queries, gallery)
    check_memory(
        4.0 * len(queries) * len(gallery),
        what=f"the matrix of similarities of {len(queries)} queries to {len(gallery)} gallery items",
        reduce="the number of either",
    )
    similarity = np.empty((len(queries), len(gallery)), dtype=np.float32)
    with torch.inference_mode():
        left = _Rows(queries, np.arange(len(queries)), choose_device(device, setting="device"), "query")
        right = _Rows(gallery, np.arange(len(gallery)), left.device, "gallery item")
        for g in _blocks(len(right), BLOCK_GALLERY, right.n_features):
            for q in _blocks(len(left), BLOCK_QUERIES, left.n_features):
                similarity[q, g] = _double_similarities(left, right, q, g).float().cpu().numpy()
    return similarity


def compute_top_k_hits(retrieval: Retrieval, k: int, *, ties: HitRule = "against") -> np.ndarray:
    """Return for every query whether its true item is among the `k` best candidates.

    Parameters
    ----------
    retrieval
        From `compute_ranks`.
    k
        Between 1 and the size of the gallery.
    ties
        ``against`` (default): every tie is lost, the values are 0 or 1. ``shared``: the probability of a hit
        when ties are broken at random. ``middle``: 1 if fewer than `k` candidates come before the mean rank of the
        tied ones, so that a collapsed gallery scores 1 where it has fewer than 2k candidates and 0 otherwise.

    Returns
    -------
    float array of shape (n_queries,)
        One value per query; their mean is the top-k accuracy.
    """
    check_option("ties", ties, ("against", "shared", "middle"))
    _check_k(k, 1, retrieval.gallery_size, "top-k")
    if ties == "middle":
        return (retrieval.ranks - 1 < k).astype(float)
    if ties == "against":
        return (retrieval.worst_ranks <= k).astype(float)
    return np.clip((k - retrieval.n_above) / (1 + retrieval.n_tied), 0.0, 1.0)


def compute_k_way_hits(retrieval: Retrieval, k: int, *, ties: TieRule = "shared") -> np.ndarray:
    """Return the exact probability that each true item beats k - 1 random other candidates.

    A query of rank r among N wins with probability C(N - r, k - 1) / C(N - 1, k - 1): no draw, no sampling noise.

    Parameters
    ----------
    retrieval
        From `compute_ranks`.
    k
        Number of alternatives, between 2 and the size of the gallery.
    ties
        ``shared`` (default): the mean over all orders of the tied candidates, 1 / k for a collapsed gallery.
        ``against``: ties are lost.

    Returns
    -------
    float array of shape (n_queries,)
        One probability per query; their mean is the k-way accuracy.

    Notes
    -----
    The ratio of binomials is built as a running product over r, p(r + 1) = p(r) (N - r - k + 1) / (N - r), which
    neither overflows nor cancels.
    """
    check_option("ties", ties, ("shared", "against"))
    size = retrieval.gallery_size
    _check_k(k, 2, size, "k-way accuracy")
    rank = np.arange(1, size)
    steps = np.maximum(size - rank - k + 1, 0) / (size - rank)
    wins = np.concatenate([[1.0], np.cumprod(steps)])  # (n_gallery,), by rank
    if ties == "against" or not retrieval.n_tied.any():
        return wins[retrieval.worst_ranks - 1]
    total = np.concatenate([[0.0], np.cumsum(wins)])
    shared = (total[retrieval.worst_ranks] - total[retrieval.n_above]) / (1 + retrieval.n_tied)
    return np.where(retrieval.n_tied > 0, shared, wins[retrieval.n_above])


def compute_reciprocal_ranks(retrieval: Retrieval) -> np.ndarray:
    """Return 1 / rank of every query, ties sharing the mean rank; shape (n_queries,)."""
    return 1.0 / retrieval.ranks


def compute_relative_ranks(
    retrieval: Retrieval, *, convention: Literal["zero_to_one", "fraction"] = "zero_to_one"
) -> np.ndarray:
    """Return the rank of every query relative to the gallery; shape (n_queries,).

    Parameters
    ----------
    retrieval
        From `compute_ranks`; ties share the mean rank.
    convention
        ``zero_to_one``: (rank - 1) / (N - 1), 0 is best and 0.5 is chance. ``fraction``: rank / N.
    """
    check_option("convention", convention, ("zero_to_one", "fraction"))
    if convention == "fraction":
        return retrieval.ranks / retrieval.gallery_size
    return (retrieval.ranks - 1) / max(1, retrieval.gallery_size - 1)


#: Candidates whose rank is counted and whose vectors are kept in memory.
SCANNED = 1 << 16
_ROUNDING = 1e-5  # of cosines in single precision, with room
_FINE = 254  # steps of the second byte in one of the first
_FEW, _CACHED = 4096, 1 << 20


class GallerySearch:
    """One gallery that is searched for one prediction after the other, exactly.

    Candidates and prediction are rounded to bytes. Their product is a sum of whole numbers, four times faster than in
    single precision, and off by no more than what rounding took from both (Cauchy-Schwarz), which is known of each
    candidate. Those that may still be among the best are compared in double precision. How near the bounds are does not
    depend on the gallery: a random rotation spreads every vector evenly over its coordinates first, so that no large
    one makes the steps coarse. It takes one byte for each feature of a candidate, 1 GB for a million of 1024.

    A gallery of up to `SCANNED` candidates is kept in memory besides, with a second byte for each feature: enough to
    count how many candidates are above a given one. A larger one stays where it is, for example in a memory map.

    Parameters
    ----------
    gallery : Embeddings of n_gallery rows
        Candidates, possibly a memory map.
    centre
        Applied to each of them; None if that was done.
    scanned
        Size up to which the gallery is kept.

    Raises
    ------
    DataError
        If there is no candidate, an id repeats, or a candidate is zero.

    Examples
    --------
    >>> search = GallerySearch(Embeddings(np.eye(3, dtype=np.float32), ["a", "b", "c"], "toy"))
    >>> search.find(np.array([1.0, 2.0, 0.0]), 2)[0]
    array([1, 0])
    """

    def __init__(self, gallery: Embeddings, centre: Centre | None = None, *, scanned: int = SCANNED) -> None:
        if not len(gallery):
            raise DataError("the gallery is empty; give one with at least one candidate.")
        check_unique([str(i) for i in gallery.ids], what="stimulus ids of the gallery")
        self.ids, self.space = np.asarray(gallery.ids, dtype=object), gallery.space
        self._centre = centre
        self._raw = gallery.vectors.reshape(len(gallery), -1)
        # Equal similarities stand in the order of their ids, wherever they are in the gallery.
        order = np.argsort(np.array([str(i) for i in self.ids]), kind="stable")
        self._place = np.empty_like(order)
        self._place[order] = np.arange(len(order))
        self.is_exhaustive = len(gallery) <= scanned
        self._vectors = self._read(slice(None)) if self.is_exhaustive else None
        self._norms = np.empty(len(gallery))
        self._asked: tuple[np.ndarray, _Estimate] | None = None  # the last query, and what is known of it
        self._bytes = _Bytes(*self._raw.shape, fine=self.is_exhaustive)
        for block in _blocks(len(gallery), BLOCK_GALLERY, self._raw.shape[1]):
            vectors = self._read(block) if self._vectors is None else self._vectors[block]
            norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
            if (bad := np.flatnonzero(~(norms > 0))).size:
                name = self.ids[block.start + bad[0]]
                raise DataError(
                    f"the embedding of the candidate {name!r} is zero; leave it out of the gallery."
                )
            self._norms[block] = norms
            self._bytes.add(block, vectors / norms[:, None].astype(np.float32))

    def __len__(self) -> int:
        return len(self.ids)

    def read_units(self, rows: np.ndarray) -> np.ndarray:
        """Return candidates as they are compared, of length one, float32 of shape (n_rows, n_features)."""
        units: np.ndarray = normalise_rows(self._read(rows))
        return units

    def find(self, query: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the most similar candidates, the best first, and their cosines.

        Parameters
        ----------
        query : array of shape (n_features,)
            Of any length.
        n_top
            How many; all where there are fewer.

        Raises
        ------
        ConfigError
            If `n_top` is below 1.
        DataError
            If the query holds a number that is not finite, or another number of features than the candidates.
        """
        if n_top < 1:
            raise ConfigError(f"n_top must be 1 or more, got {n_top}.")
        unit, n_top = self._make_unit(query), min(n_top, len(self))
        known = self._estimate(unit)
        n_first = min(len(self), n_top + 64)
        first = np.argpartition(known.cosines, len(self) - n_first)[len(self) - n_first :]
        exact = self._compare(first, unit)
        least = float(np.partition(exact, n_first - n_top)[n_first - n_top]) - TIE_TOLERANCE
        others = self._narrow(known, lambda rows: known.cosines[rows] + known.slack[rows] >= least)
        others = others[~np.isin(others, first)]
        near = np.concatenate([first, others])
        exact = np.concatenate([exact, self._compare(others, unit)])
        # A softmax over the gallery is mostly these.
        known.cosines[near], known.slack[near], known.n_bytes[near] = exact, _ROUNDING, 3
        order = np.lexsort((self._place[near], -exact.round(10)))[:n_top]
        return near[order], exact[order]

    def count_above(self, query: np.ndarray, row: int) -> tuple[int, int]:
        """Return how many candidates are more similar to the query than a row, and how many others are as similar.

        Of more than `SCANNED` candidates those that are about as similar are read, which may be many.
        """
        unit = self._make_unit(query)
        own, known = self._compare(np.array([row]), unit)[0], self._estimate(unit)
        unsure = self._narrow(known, lambda rows: np.abs(known.cosines[rows] - own) <= known.slack[rows])
        sure = known.cosines > own
        sure[unsure] = False
        difference = self._compare(unsure, unit) - own
        above = int(sure.sum()) + int((difference > TIE_TOLERANCE).sum())
        return above, int((np.abs(difference) <= TIE_TOLERANCE).sum()) - 1

    def sum_exponentials(self, query: np.ndarray, scale: float) -> float:
        """Return the logarithm of the sum over all candidates of ``exp(scale * cosine)``.

        Cosines of the best candidates are exact once `find` was asked; those of the others are off by what rounding to
        bytes leaves, some 4e-4 in 1024 features and independent of each other.
        """
        values = scale * self._estimate(self._make_unit(query)).cosines
        top = float(values.max())
        return top + float(np.log(np.exp(values - top).sum(dtype=np.float64)))

    def _make_unit(self, query: np.ndarray) -> np.ndarray:
        """Return a query of length one in double precision; one that is zero stays so."""
        unit = np.asarray(query, dtype=np.float64).ravel()
        if len(unit) != self._raw.shape[1] or not np.isfinite(unit).all():
            raise DataError(
                f"a query of {self._raw.shape[1]} finite features was expected, got {len(unit)}, "
                f"{int(np.isfinite(unit).sum())} of them finite."
            )
        length = float(np.linalg.norm(unit))
        return unit / length if length else unit

    def _estimate(self, unit: np.ndarray) -> _Estimate:
        """Return what is known of the cosines of all candidates; that of the last query is remembered."""
        if self._asked is None or not np.array_equal(self._asked[0], unit):
            self._asked = unit, self._bytes.multiply(unit)
        return self._asked[1]

    def _narrow(self, known: _Estimate, is_open: Callable[[Any], np.ndarray]) -> np.ndarray:
        """Return the rows that are open by all that bytes show, asking for more of them where there are many."""
        rows = np.flatnonzero(is_open(slice(None)))
        for n_bytes in (1, 2):
            if len(rows) > 256:
                self._bytes.refine(known, rows, n_bytes)
                rows = rows[is_open(rows)]
        return rows

    def _read(self, rows: Any) -> np.ndarray:
        """Return candidates as they are compared, float32 of shape (n, n_features)."""
        if isinstance(self._raw, np.memmap):
            # Plain reads: pages of a map would stay, and be counted as memory of this process.
            rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
            block = read_rows(self._raw, rows).astype(np.float32, copy=False)
        else:
            block = np.ascontiguousarray(self._raw[rows], dtype=np.float32)
        return block if self._centre is None else (block - self._centre.mean) / self._centre.scale

    def _compare(self, rows: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """Return the double-precision cosines of some candidates."""
        found = np.empty(len(rows))
        for block in _blocks(len(rows), _FEW, self._raw.shape[1]):
            picked = rows[block]
            vectors = self._read(picked) if self._vectors is None else self._vectors[picked]
            found[block] = (vectors.astype(np.float64) @ unit) / self._norms[picked]
        return found


@dataclass
class _Estimate:
    """Cosines of a query with all candidates and how far off each may be, float32 of shape (n,)."""

    cosines: np.ndarray
    slack: np.ndarray
    n_bytes: np.ndarray  # second bytes that were brought in, int8 of shape (n,); 3 where the cosine is exact
    query: _Rounded


class _Rounded(NamedTuple):
    """Vectors of shape (n, n_features) in two bytes for each value, and what rounding to one and to both took."""

    coarse: np.ndarray  # int8 (n, n_features)
    fine: np.ndarray  # int8 (n, n_features)
    step: np.ndarray  # float32 (n,)
    rest: np.ndarray  # float32 (2, n)


class _Bytes:
    """Unit vectors that were rotated and rounded to bytes, with a bound on what that took from each."""

    def __init__(self, n: int, n_features: int, *, fine: bool) -> None:
        check_memory(
            (n_features * (1.0 + fine) + 20) * n, what=f"the index of {n} candidates", reduce="the gallery"
        )
        self.coarse = np.empty((n, n_features), np.int8)
        self.fine = np.empty((n, n_features), np.int8) if fine else None
        self._step, self._rest = np.empty(n, np.float32), np.empty((2, n), np.float32)
        # A Kronecker product of two orthogonal matrices is one, and takes a fraction of the work and memory.
        low = max(k for k in range(1, math.isqrt(n_features) + 1) if n_features % k == 0)
        draw = np.random.default_rng(0)
        self._turns = [np.linalg.qr(draw.standard_normal((k, k)))[0] for k in (low, n_features // low)]
        self._is_fast = _can_multiply_bytes(n_features)

    def add(self, block: slice, units: np.ndarray) -> None:
        """Take in unit vectors of shape (n, n_features)."""
        self.coarse[block], fine, self._step[block], self._rest[:, block] = self._round(units)
        if self.fine is not None:
            self.fine[block] = fine

    def multiply(self, unit: np.ndarray) -> _Estimate:
        """Return cosines with a query by the first byte of each value."""
        query = self._round(unit[None])
        cosines = self._multiply(self.coarse, query.coarse[0]) * (self._step * query.step)
        slack = _find_slack(self._rest[0], query.rest[0])
        return _Estimate(cosines, slack, np.zeros(len(slack), np.int8), query)

    def refine(self, known: _Estimate, rows: np.ndarray, n_bytes: int) -> None:
        """Bring in the second byte of the query (1) or that of candidates, where it is kept (2)."""
        query, kept = known.query, self.coarse if n_bytes == 1 else self.fine
        if kept is None:
            return
        rows = rows[known.n_bytes[rows] == n_bytes - 1]
        # Blocks that stay in the processor's cache.
        for block in _blocks(len(rows), max(1, _CACHED // kept.shape[1]), kept.shape[1]):
            picked = rows[block]
            values = kept[picked]
            more = self._multiply(values, query.fine[0])
            if n_bytes == 2:
                more = self._multiply(values, query.coarse[0]) + more / _FINE
            known.cosines[picked] += more * (self._step[picked] * query.step / _FINE)
        known.slack[rows] = _find_slack(self._rest[n_bytes - 1, rows], query.rest[1])
        known.n_bytes[rows] = n_bytes

    def _round(self, units: np.ndarray) -> _Rounded:
        turned = self._turn(units)
        step = np.maximum(np.abs(turned).max(axis=1, keepdims=True), 1e-30) / 127
        turned /= step
        coarse = np.rint(turned)
        turned -= coarse
        fine = np.rint(turned * _FINE)
        rest = (
            np.stack([np.linalg.norm(left, axis=1) for left in (turned, turned - fine / _FINE)]) * step[:, 0]
        )
        return _Rounded(
            coarse.astype(np.int8),
            fine.astype(np.int8),
            step[:, 0].astype(np.float32),
            rest.astype(np.float32),
        )

    def _multiply(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the products of bytes of shapes (n, n_features) and (n_features,), whole numbers as float32."""
        import torch

        if self._is_fast:
            column = torch.from_numpy(values).unsqueeze(1)
            products: np.ndarray = torch._int_mm(torch.from_numpy(rows), column).squeeze(1).float().numpy()
            return products
        found = np.empty(len(rows), np.float32)
        for block in _blocks(len(rows), BLOCK_GALLERY, len(values)):
            found[block] = rows[block].astype(np.float64) @ values.astype(np.float64)
        return found

    def _turn(self, vectors: np.ndarray) -> np.ndarray:
        left, right = (turn.astype(vectors.dtype) for turn in self._turns)
        blocks = vectors.reshape(len(vectors), len(left), len(right))
        turned: np.ndarray = (left @ (blocks @ right)).reshape(len(vectors), -1)
        return turned


def _find_slack(rest: np.ndarray, rest_query: Any) -> np.ndarray:
    """Return how far off a product of rounded unit vectors may be, by what rounding took from either."""
    slack: np.ndarray = rest + (1 + rest) * rest_query + np.float32(_ROUNDING)
    return slack


@lru_cache
def _can_multiply_bytes(n_features: int) -> bool:
    """Say whether products of bytes are fast here and right: some processors cut off intermediate sums."""
    import torch

    if not torch.backends.mkldnn.is_available() or n_features * 127**2 >= 2**31:
        return False
    signs = np.where(np.arange(n_features) // np.array([[1], [2], [n_features]]) % 2, -127, 127).astype(
        np.int8
    )
    rows = np.concatenate([signs, -signs, signs // 2])
    try:
        found = [torch._int_mm(torch.from_numpy(rows), torch.from_numpy(row).unsqueeze(1)) for row in rows]
    except (AttributeError, RuntimeError):  # no public function: another torch may lack it
        return False
    return bool((torch.cat(found, 1).numpy() == rows.astype(np.int64) @ rows.T.astype(np.int64)).all())


def _find_targets(query_ids: Any, gallery_ids: Any) -> np.ndarray:
    """Return the gallery row of each query's stimulus."""
    if not len(query_ids) or not len(gallery_ids):
        raise DataError(
            f"retrieval needs queries and candidates, got {len(query_ids)} and {len(gallery_ids)}."
        )
    names = [str(i) for i in gallery_ids]
    check_unique(names, what="stimulus ids of the gallery (keep or average one row per stimulus)")
    row = {name: index for index, name in enumerate(names)}
    missing = [str(i) for i in query_ids if str(i) not in row]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(query_ids)} queries have no true item in the gallery of {len(names)}, "
            f"first {missing[0]!r}: add its embedding to the gallery or drop the query."
        )
    return np.array([row[str(i)] for i in query_ids])


def _check_k(k: int, lowest: int, size: int, what: str) -> None:
    if not lowest <= k <= size:
        raise ConfigError(f"k of {what} is {k}, but must be between {lowest} and the gallery size {size}.")


def _blocks(n_rows: int, wanted: int, n_features: int) -> Iterator[slice]:
    rows = max(1, min(wanted, BLOCK_VALUES // n_features))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


class _Rows:
    """Rows of embeddings in a chosen order, brought to the device block by block, with their norms."""

    def __init__(self, embeddings: Embeddings, order: np.ndarray, device: str, what: str) -> None:
        import torch

        self.vectors, self.order, self.device = embeddings.vectors, order, device
        self.n_features = math.prod(embeddings.vectors.shape[1:])
        norms = [np.empty(0)]
        for block in _blocks(len(order), BLOCK_QUERIES, self.n_features):
            norm = torch.linalg.vector_norm(self.raw(block), dim=1, dtype=torch.float64)
            norms.append(norm.cpu().numpy())
        self.norms = np.concatenate(norms)
        empty = self.norms == 0
        if what == "query":
            self.norms[empty] = (
                1.0  # a query without direction is equally far from everything: all tied, at chance
            )
            empty = np.zeros(len(self.norms), dtype=bool)
        bad = np.flatnonzero(empty | ~np.isfinite(self.norms))
        if bad.size:
            name = embeddings.ids[order[bad[0]]]
            raise DataError(
                f"{bad.size} {what} embedding(s) in space {embeddings.space!r} have norm {self.norms[bad[0]]:g}, "
                f"first {name!r}: cosine similarity is not defined; centre or repair them."
            )
        # Within these bounds a norm and its inverse fit in single precision.
        self._scale_type = np.float32 if self.norms.min() > 1e-30 and self.norms.max() < 1e30 else np.float64

    def __len__(self) -> int:
        return len(self.order)

    def raw(self, rows: Any) -> Any:
        """Return the given rows (slice or index array) as a float32 tensor."""
        import torch

        block = self.vectors[
            self.order[rows]
        ]  # indexing copies, so memory maps and read-only arrays are fine
        block = np.ascontiguousarray(block.reshape(len(block), self.n_features), dtype=np.float32)
        return torch.from_numpy(block).to(self.device)

    def unit(self, rows: slice) -> Any:
        """Return the given rows, scaled to norm one, as a float32 tensor."""
        import torch

        scale = torch.from_numpy((1.0 / self.norms[rows]).astype(self._scale_type)).to(self.device)
        return (self.raw(rows) * scale[:, None]).float()


def _multiply(left: Any, right: Any, buffer: Any) -> Any:
    """Return left @ right.T in memory that is used again: fresh pages cost more than the counting."""
    import torch

    shape = (len(left), len(right))
    return torch.mm(left, right.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _count_block(
    similar: Any, true: np.ndarray, left: _Rows, right: _Rows, q: slice, g: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Count, per query of the block, the candidates above the true item and those as similar as it."""
    import torch

    # Rounding of a single-precision cosine, about twelve times the largest error seen up to 200 000 features.
    slack = 2.0**-23 * (math.sqrt(left.n_features) + 8)
    centre = torch.from_numpy(true).to(similar.device)
    sure = similar > (centre + slack).float()[:, None]
    open_ = similar >= (centre - slack).float()[:, None]
    above, close = _count(sure), np.zeros(len(true), dtype=np.int64)
    n_unsure = int(_count(open_).sum() - above.sum())
    if n_unsure == 0:
        return above, close
    if n_unsure > similar.numel() // 32:  # a nearly collapsed block: all of it again
        exact = _double_similarities(left, right, q, g)
        above = _count(exact > (centre + TIE_TOLERANCE)[:, None])
        return above, _count((exact - centre[:, None]).abs() <= TIE_TOLERANCE)
    query, item = (open_ ^ sure).nonzero().cpu().numpy().T  # pairs that single precision cannot tell apart
    difference = _pair_similarities(left, right, query + q.start, item + g.start) - true[query]
    above += np.bincount(query[difference > TIE_TOLERANCE], minlength=len(true))
    close += np.bincount(query[np.abs(difference) <= TIE_TOLERANCE], minlength=len(true))
    return above, close


def _count(mask: Any) -> np.ndarray:
    """Count the true entries of each row; bytes are summed, which is ten times faster than booleans."""
    import torch

    return mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).cpu().numpy().astype(np.int64)


def _pair_similarities(left: _Rows, right: _Rows, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the double-precision cosine of each (query, candidate) pair; shape (n_pairs,)."""
    result = np.empty(len(rows))
    for block in _blocks(len(rows), BLOCK_QUERIES // 4, left.n_features):
        a, b = left.raw(rows[block]).double(), right.raw(items[block]).double()
        dots = a.mul_(b).sum(dim=1).cpu().numpy()
        result[block] = dots / (left.norms[rows[block]] * right.norms[items[block]])
    return result


def _double_similarities(left: _Rows, right: _Rows, q: slice, g: slice) -> Any:
    """Return the double-precision cosines of a block; shape (n_queries, n_gallery)."""
    import torch

    a = left.raw(q).double().div_(torch.from_numpy(left.norms[q]).to(left.device)[:, None])
    b = right.raw(g).double().div_(torch.from_numpy(right.norms[g]).to(left.device)[:, None])
    return a @ b.T


class _Best:
    """The most similar candidates of every query so far."""

    def __init__(self, n_queries: int, n_top: int) -> None:
        self.n_top = n_top
        self.similar = np.full((n_queries, n_top), -np.inf, dtype=np.float32)
        self.items = np.zeros((n_queries, n_top), dtype=np.int64)

    def update(self, similar: Any, q: slice, g: slice) -> None:
        """Merge the similarities of one block."""
        if not self.n_top:
            return
        # Most queries find nothing better in a late block: one maximum per row is cheaper than a selection.
        rows = np.flatnonzero(similar.amax(dim=1).cpu().numpy() > self.similar[q].min(axis=1))
        if not rows.size:
            return
        chosen = similar if len(rows) == len(similar) else similar[rows]
        values, items = (t.cpu().numpy() for t in chosen.topk(min(self.n_top, chosen.shape[1]), dim=1))
        rows = rows + q.start
        values = np.concatenate([self.similar[rows], values], axis=1)
        items = np.concatenate([self.items[rows], items + g.start], axis=1)
        keep = np.argsort(-values, axis=1, kind="stable")[:, : self.n_top]
        self.similar[rows] = np.take_along_axis(values, keep, axis=1)
        self.items[rows] = np.take_along_axis(items, keep, axis=1)

    def sort(self, left: _Rows, right: _Rows, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return items and similarities, by double-precision similarity, then by their place among the ids."""
        rows = np.repeat(np.arange(len(self.items)), self.n_top)
        exact = _pair_similarities(left, right, rows, self.items.ravel()).reshape(self.items.shape)
        order = np.lexsort((place[self.items], -exact.round(10)), axis=1)
        return np.take_along_axis(self.items, order, axis=1), np.take_along_axis(exact, order, axis=1)
