"""The true candidate's entry of each table is the metric itself, ties included."""

import numpy as np
import pytest

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.metrics import pair_tables as tables
from braindecode_vis.metrics.identification import identify_from_scores
from braindecode_vis.retrieval import (
    compute_k_way_hits,
    compute_ranks,
    compute_reciprocal_ranks,
    compute_similarity,
)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_k_way_and_reciprocal_rank_equal_those_of_retrieval(k):
    rng = np.random.default_rng(0)
    vectors = rng.integers(-1, 2, (9, 3)).astype(np.float32) + 0.5  # few directions, so many ties
    ids = [f"s{n}" for n in range(9)]
    queries = Embeddings(rng.integers(-1, 2, (9, 3)).astype(np.float32) + 0.5, ids, "toy")
    gallery = Embeddings(vectors, ids, "toy")
    ranked = compute_ranks(queries, gallery, device="cpu")
    assert ranked.n_tied.any()
    scores = compute_similarity(queries, gallery)
    order = tables.count_order(np.round(scores.astype(float), 6))
    np.testing.assert_allclose(np.diagonal(tables.make_k_way_table(order, k)), compute_k_way_hits(ranked, k))
    np.testing.assert_allclose(
        np.diagonal(tables.make_reciprocal_rank_table(order)), compute_reciprocal_ranks(ranked)
    )
    # Whatever the ties, a row holds 1 / k on average: that is chance, exactly.
    np.testing.assert_allclose(tables.make_k_way_table(order, k).mean(axis=1), 1 / k)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_identification_equals_that_of_the_diagonal(n):
    scores = np.random.default_rng(1).integers(0, 4, (10, 10)).astype(float)
    groups = np.arange(10) % 2
    np.testing.assert_allclose(
        np.diagonal(tables.make_identification_table(scores, n)), identify_from_scores(scores, n)
    )
    np.testing.assert_allclose(
        np.diagonal(tables.make_identification_table(scores, n, groups=groups)),
        identify_from_scores(scores, n, groups=groups),
    )


def test_too_few_candidates_are_refused():
    with pytest.raises(DataError, match="gallery of 3"):
        tables.make_k_way_table(np.ones((2, 3)), 4)
    with pytest.raises(DataError, match="has 1 distractors, not 2"):
        tables.make_identification_table(np.ones((4, 4)), 3, groups=[0, 0, 1, 1])
    with pytest.raises(DataError, match="4 items came with 2 group labels"):
        tables.make_two_way_table(np.ones((4, 4)), groups=[0, 1])
