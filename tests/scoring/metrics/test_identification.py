"""Identification equals an enumeration of distractor sets, loses ties and averages draws as rounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics import identification as idn
from braindecode_vis.scoring.retrieval import (
    compute_k_way_hits,
    compute_ranks,
    compute_reciprocal_ranks,
    compute_similarity,
)
from tests import references

ROUNDING = 1e-12  # relative: sums of a few dozen products round to about 1e-15 of their size, in any order
SIX_DECIMALS = 5e-7  # worked examples are given to six decimals


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_items=st.integers(3, 7), n=st.integers(2, 4), grouped=st.booleans())
def test_n_way_equals_enumeration(seed, n_items, n, grouped):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (n_items, n_items)).astype(float)  # few values: many ties
    groups = rng.permutation(np.arange(2 * n_items) % 2)[:n_items] if grouped else np.zeros(n_items, int)
    allowed = (groups[:, None] == groups[None]) & ~np.eye(n_items, dtype=bool)
    labels = groups if grouped else None
    if allowed.sum(axis=1).min() < n - 1:
        with pytest.raises(DataError, match="distractor"):
            idn.make_identification_table(scores, n, groups=labels)
    else:
        expected = references.n_way(scores, n, allowed)
        found = np.diagonal(idn.make_identification_table(scores, n, groups=labels))
        np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_two_way_equals_the_definition():
    rng = np.random.default_rng(0)
    truth = rng.random((12, 6, 5))
    decoded = truth + rng.random((12, 6, 5))
    correlation = np.array([[references.pearson(d, t) for t in truth] for d in decoded])
    expected = [
        np.mean([correlation[j, i] < correlation[j, j] for i in range(12) if i != j]) for j in range(12)
    ]
    np.testing.assert_allclose(idn.two_way_identification(truth, decoded), expected)
    # A correlation near 0 is a difference of products of the size of 1.
    np.testing.assert_allclose(
        idn.compute_correlations(decoded, truth),
        correlation,
        rtol=ROUNDING,
        atol=ROUNDING * np.abs(correlation).max(),
    )


def test_rounding_makes_no_correlation_larger_than_one():
    """Rows against themselves and their negatives: about half of the products round to beyond 1."""
    rows = np.random.default_rng(3).random((60, 40))
    for other in (rows, -rows):
        assert np.abs(idn.compute_correlations(rows, other)).max() <= 1


def test_ties_are_failures():
    """A repeated ground truth and a constant prediction win nothing, whatever the rounding."""
    rng = np.random.default_rng(1)
    truth = rng.random((4, 50))
    truth[3] = truth[0]
    np.testing.assert_allclose(idn.two_way_identification(truth, truth), [2 / 3, 1, 1, 2 / 3])
    assert (idn.two_way_identification(truth, np.full((4, 50), 0.1)) == 0).all()


def test_draws_are_rounds_and_not_pooled():
    rng = np.random.default_rng(2)
    truth = rng.random((6, 20))
    draws = truth[:, None] + rng.standard_normal((6, 3, 20))
    rounds = [idn.two_way_identification(truth, draws[:, k]) for k in range(3)]
    np.testing.assert_allclose(idn.two_way_identification(truth, draws), np.mean(rounds, axis=0))


def test_within_class_ignores_what_the_class_tells():
    """Decoded class means identify the class perfectly and the item within its class never."""
    rng = np.random.default_rng(3)
    labels = np.repeat(["six", "nine"], 10)
    truth = np.repeat(rng.random((2, 1, 40)), 10, axis=1).reshape(20, 40) + 0.1 * rng.random((20, 40))
    means = np.stack([truth[labels == label].mean(axis=0) for label in labels])
    assert idn.two_way_identification(truth, means).mean() > 0.7
    # The class mean is one fixed prediction: each item beats those less typical, on average exactly half.
    within = idn.two_way_identification(truth, means, groups=labels)
    assert within.mean() == pytest.approx(0.5)


def test_noise_is_at_chance():
    rng = np.random.default_rng(5)
    truth, noise = rng.random((300, 64)), rng.random((300, 64))
    for n in (2, 10):
        values = idn.n_way_identification(truth, noise, n)
        # Five standard errors.
        assert abs(values.mean() - 1 / n) < 5 * values.std() / 300**0.5


def test_hits_of_classes():
    np.testing.assert_array_equal(idn.classification_accuracy(["a", "c"], ["a", "b"]), [1, 0])


ROWS = np.random.default_rng(6).random((4, 5))
INFINITE = np.where(np.arange(20).reshape(4, 5) == 11, np.inf, ROWS)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("item 2", lambda: idn.two_way_identification(ROWS, INFINITE)),
        ("cannot be paired", lambda: idn.two_way_identification(ROWS, ROWS[:3])),
        ("second dimension", lambda: idn.two_way_identification(ROWS, ROWS[:, None, None])),
        ("has 3 distractors, not 4", lambda: idn.n_way_identification(ROWS, ROWS, 5)),
        ("4 items came with 3 group labels",
         lambda: idn.two_way_identification(ROWS, ROWS, groups=["a", "b", "c"])),
        ("gallery of 3", lambda: idn.make_k_way_table(np.ones((2, 3)), 4)),
        ("has 1 distractors, not 2",
         lambda: idn.make_identification_table(np.ones((4, 4)), 3, groups=[0, 0, 1, 1])),
        ("4 items came with 2 group labels",
         lambda: idn.make_identification_table(np.ones((4, 4)), 2, groups=[0, 1])),
        ("cannot be compared", lambda: idn.classification_accuracy(["a"], ["a", "b"])),
    ],
)  # fmt: skip
def test_bad_input_is_named(words, call):
    with pytest.raises(DataError, match=words):
        call()


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
    order = idn.count_order(np.round(scores.astype(float), 6))
    np.testing.assert_allclose(np.diagonal(idn.make_k_way_table(order, k)), compute_k_way_hits(ranked, k))
    np.testing.assert_allclose(
        np.diagonal(idn.make_reciprocal_rank_table(order)), compute_reciprocal_ranks(ranked)
    )
    # Whatever the ties, a row holds 1 / k on average: that is chance, exactly.
    np.testing.assert_allclose(idn.make_k_way_table(order, k).mean(axis=1), 1 / k)


def test_the_order_counts_all_pairs_whether_a_row_has_ties_or_not():
    """Rows without ties are read off their sorted order; one whose cells lie about as close as the tolerance is not."""
    rng = np.random.default_rng(0)
    scores = rng.random((6, 40))
    scores[1, :9] = 0.5
    scores[2, 1::2] = scores[2, ::2] + rng.uniform(0, 4e-10, 20)
    scores[3] = 0.25
    scores[4, [2, 5]] = -np.inf
    found = idn.count_order(scores)
    with np.errstate(invalid="ignore"):
        ahead = scores[:, :, None] - scores[:, None]  # (row, cell, beaten cell)
    np.testing.assert_array_equal(found.n_below, (ahead > idn.TIE_TOLERANCE).sum(axis=2))
    np.testing.assert_array_equal(found.n_above, (ahead < -idn.TIE_TOLERANCE).sum(axis=2))


SIMILARITY = np.array(
    [[0.9, 0.2, 0.4, 0.1], [0.3, 0.5, 0.6, 0.2], [0.1, 0.4, 0.7, 0.3], [0.2, 0.5, 0.1, 0.4]]
)


@pytest.mark.parametrize(("n", "error"), [(2, 0.204124), (3, 0.408248)])
def test_the_worked_example_of_the_jackknife(n, error):
    left_out = idn.leave_out_images([SIMILARITY], [np.arange(4)], [list("abcd")], n)
    if n == 2:
        np.testing.assert_allclose(left_out, [0.666667, 1, 0.833333, 0.833333], atol=SIX_DECIMALS)
    spread = np.sqrt(3 / 4 * np.square(left_out - left_out.mean()).sum())
    assert spread == pytest.approx(error, abs=SIX_DECIMALS)


@pytest.mark.parametrize("ties", ["shared", "against"])
@pytest.mark.parametrize("n", [2, 3])
def test_leaving_an_image_out_equals_scoring_without_it(n, ties):
    """Several rows of an image, classes, ties, two galleries that share an image: computed again without each image."""
    rng = np.random.default_rng(n)
    galleries = [(list("abcdefg"), list("xxxxyyy")), (list("ghijk"), ["x"] * 5)]
    scores = [rng.integers(0, 4, (9, 7)).astype(float), rng.random((4, 5))]
    truths = [np.array([0, 0, 1, 2, 3, 4, 5, 6, 6]), np.array([0, 1, 2, 3])]
    names, classes = zip(*galleries, strict=True)

    def score(without):
        values = []
        for table, truth, own, groups in zip(scores, truths, names, classes, strict=True):
            kept = [column for column, name in enumerate(own) if name != without]
            for row, column in enumerate(truth):
                rivals = [c for c in kept if groups[c] == groups[column] and c != column]
                if own[column] == without or len(rivals) < n - 1:
                    continue
                cells = table[row, [column, *rivals]][None]
                make = idn.make_k_way_table if ties == "shared" else idn.make_identification_table
                values.append(make(cells, n)[0, 0])
        return np.mean(values)

    shown = sorted({own[column] for own, truth in zip(names, truths, strict=True) for column in truth})
    expected = [score(name) for name in shown]
    for tables in (scores, [idn.count_order(one) for one in scores]):
        found = idn.leave_out_images(tables, truths, names, n, groups=classes, ties=ties)
        np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_an_image_whose_leaving_takes_the_last_rival_away():
    assert np.isnan(idn.leave_out_images([np.eye(2)], [np.arange(2)], [list("ab")], 2)).all()
