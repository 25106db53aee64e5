"""Detects from outputs alone how they were made: joint decisions, statistics of the test rows, hubs.

Owns signs, not proofs: one sentence for each, with the figure behind it. A retrieval is made query by query; whoever
solves all queries at once as an assignment, or standardises by the test rows, uses that every image was shown as often
as any other, and reports a transductive number. How a checkpoint was chosen leaves no sign in its outputs.

References
----------
Radovanovic et al. (2010), JMLR 11 (hubness). Sinkhorn and Knopp (1967), Pacific J. Math. 21 (matrices whose rows and
columns have equal sums).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.parts.analyses.hubness import summarise_counts
from braindecode_vis.scoring.retrieval import Retrieval

#: Two images that are taken for each other never collide; three expected collisions seldom fail to come.
FEWEST_COLLISIONS = 3
FEWEST_WRONG = 3
_EQUAL = 1e-3  # relative; matrices saved in half precision are off by up to 0.0005
_MANY_ROWS = 10
_LARGEST = 50_000_000  # numbers that are looked at for sums of rows and columns
N_NEIGHBOURS = 10


def find_bijection(chosen: np.ndarray, hits: np.ndarray, n_candidates: int) -> str:
    """Return a sentence if no two queries chose the same candidate although enough choices are wrong; else nothing.

    Parameters
    ----------
    chosen : array of shape (n_queries,)
        What each query of one subject chose.
    hits : bool array of shape (n_queries,)
        Whether that was right.
    n_candidates
        Size of the gallery.

    Examples
    --------
    >>> order = np.array([1, 2, 3, 0, *range(4, 12)])
    >>> find_bijection(order, order == np.arange(12), 12)[:52]
    '12 queries chose 12 different images, 4 of them wron'
    >>> find_bijection(np.zeros(12, int), np.zeros(12, bool), 12)
    ''
    """
    n, wrong = len(chosen), int((~hits).sum())
    # A wrong choice meets one of the n - 1 others by chance.
    expected = wrong * (n - 1) / n_candidates
    if n < _MANY_ROWS or expected < FEWEST_COLLISIONS or len(set(chosen.tolist())) < n:
        return ""
    return (
        f"{n} queries chose {n} different images, {wrong} of them wrongly: of independent decisions about "
        f"{expected:.0f} would coincide, so these decisions were made together, as in an assignment of "
        "all queries (Hungarian matching)"
    )


def find_matrix_signs(matrix: np.ndarray) -> list[str]:
    """Return a sentence for each way in which a matrix of similarities was normalised or solved over all its queries.

    Parameters
    ----------
    matrix : array of shape (n_queries, n_gallery)
    """
    n_rows, n_columns = matrix.shape
    if min(matrix.shape) < _MANY_ROWS or matrix.size > _LARGEST:
        return []
    values = np.asarray(matrix, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all() and (values.sum(axis=1) == 1).all():
        # One decision per row; once per column too is the permutation matrix of a solved assignment.
        if n_rows == n_columns and (values.sum(axis=0) == 1).all():
            return [
                "the matrix holds a single 1 in every row and column, as in an assignment of all queries together"
            ]
        return []
    spread = values.std(axis=0)
    if (values >= 0).all() and _are_equal(values.sum(axis=0)):
        if _are_equal(values.sum(axis=1)):
            return [
                "rows and columns of the matrix have equal sums: it was balanced over all queries (Sinkhorn)"
            ]
        return [
            "the columns of the matrix have equal sums: it was normalised over the queries (a softmax over them)"
        ]
    if (spread > 0).all() and np.abs(values.mean(axis=0)).max() < _EQUAL * spread.mean():
        how = "standardised" if _are_equal(spread) else "centred"
        return [
            f"every column of the matrix has mean 0 over the queries: it was {how} with the test queries themselves"
        ]
    return []


def find_vector_signs(vectors: np.ndarray) -> list[str]:
    """Return a sentence if predicted embeddings were centred or standardised with the test rows themselves.

    Parameters
    ----------
    vectors : array of shape (n_rows, ...)
    """
    if len(vectors) < _MANY_ROWS or vectors.size > _LARGEST:
        return []
    flat = np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
    spread = flat.std(axis=0)
    known = spread > 0
    if not known.any() or np.abs(flat.mean(axis=0)).max() > _EQUAL * spread[known].mean():
        return []
    how = "standardised" if known.all() and _are_equal(spread) else "centred"
    return [
        f"every feature of the predictions has mean 0 over the test rows: they were {how} with these rows"
    ]


def find_balance(decided: np.ndarray, labels: np.ndarray) -> list[str]:
    """Return a sentence if classes were decided exactly as often as they occur although decisions are wrong.

    Parameters
    ----------
    decided, labels : arrays of shape (n_trials,)
    """
    names, counts = np.unique(labels.astype(str), return_counts=True)
    found, decisions = np.unique(decided.astype(str), return_counts=True)
    wrong = int((decided.astype(str) != labels.astype(str)).sum())
    # With few classes, equal counts are no surprise.
    if (
        len(names) < _MANY_ROWS
        or wrong < FEWEST_WRONG
        or names.tolist() != found.tolist()
        or (counts != decisions).any()
    ):
        return []
    return [
        f"each of {len(names)} classes was decided exactly as often as it occurs, although {wrong} of {len(labels)} "
        "decisions are wrong: the counts of the test set were used"
    ]


def describe_hubs(ranked: Retrieval) -> pd.DataFrame:
    """Return how unevenly the gallery is chosen: columns `quantity`, `value`, `meaning`.

    Parameters
    ----------
    ranked
        With at least the first candidate of each query listed.
    """
    size, k = ranked.gallery_size, min(N_NEIGHBOURS, ranked.top_indices.shape[1])
    near = np.bincount(ranked.top_indices[:, :k].ravel(), minlength=size)
    first = np.bincount(ranked.top_indices[:, 0], minlength=size)
    hubs = summarise_counts(near, ranked.n_queries, ranked.gallery_ids)
    shown = len(set(ranked.query_ids.tolist()))
    rows: list[tuple[str, float | str, str]] = [
        (f"hubness_skewness@{k}", hubs.skewness, f"of the times an image is among the {k} nearest; above 1 is strong"),
        (f"largest_share@{k}", hubs.largest_share,
         f"share of the queries near the most frequent image ({k / size:.3g} if all are equally frequent)"),
        (f"never_share@{k}", hubs.never_share, f"share of the gallery that is never among the {k} nearest"),
        ("distinct_first", int((first > 0).sum()),
         f"different images that come first, for {shown} images shown in a gallery of {size}"),
        ("largest_first", float(first.max() / ranked.n_queries),
         "share of the queries whose first choice is the most frequent one"),
        ("hub", hubs.hub_id, f"the image that is most often among the {k} nearest"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["quantity", "value", "meaning"])


def _are_equal(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _EQUAL * np.abs(values).max())
