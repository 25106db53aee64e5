"""Ranks are exact on ties, duplicates, negatives and half precision, and do not depend on gallery order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring import retrieval as rt
from tests import references
from tests.references import CLOSE, assert_close


def _embed(vectors, ids=None):
    ids = [f"s{i:04d}" for i in range(len(vectors))] if ids is None else ids
    return Embeddings(np.asarray(vectors), np.asarray(ids, dtype=object), "toy")


def _rank(queries, gallery, **kwargs):
    return rt.compute_ranks(queries, gallery, device="cpu", **kwargs)


def _check_against_reference(queries, gallery, result):
    row = {name: i for i, name in enumerate(gallery.ids)}
    for q in range(len(queries)):
        above, tied = references.cosine_rank(queries.vectors[q], gallery.vectors, row[queries.ids[q]])
        assert (result.n_above[q], result.n_tied[q]) == (above, tied)


# Small whole numbers make exact ties, duplicates, opposite and negative vectors frequent.
whole = st.integers(-2, 2)
dtypes = st.sampled_from([np.float16, np.float32, np.float64])


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(), dtype=dtypes, n=st.integers(1, 9), d=st.integers(1, 4), scale=st.sampled_from([1.0, 0.37])
)
def test_ranks_equal_the_slow_reference_and_ignore_gallery_order(data, dtype, n, d, scale):
    gallery = data.draw(hnp.arrays(np.float64, (n, d), elements=whole)) * scale
    gallery[~gallery.any(axis=1)] = 1.0
    targets = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6))
    vectors = data.draw(hnp.arrays(np.float64, (len(targets), d), elements=whole))
    vectors[~vectors.any(axis=1)] = -1.0
    ids = np.array([f"s{i}" for i in range(n)], dtype=object)
    queries, items = _embed(vectors.astype(dtype), ids[targets]), _embed(gallery.astype(dtype), ids)
    result = _rank(queries, items, block_queries=2, block_gallery=3)
    _check_against_reference(queries, items, result)

    order = np.array(data.draw(st.permutations(range(n))))
    moved = _rank(queries, _embed(items.vectors[order], ids[order]), block_queries=4, block_gallery=5)
    np.testing.assert_array_equal(moved.ranks, result.ranks)
    np.testing.assert_array_equal(moved.gallery_ids[moved.top_indices], ids[result.top_indices])


def test_ranks_equal_the_reference_on_crowded_similarities():
    """Candidates that differ from the true item by less than single-precision rounding are still distinguished."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(64)
    gallery = (base + 1e-6 * rng.standard_normal((40, 64))).astype(np.float32)
    gallery[7] = gallery[3]
    gallery[11] = 4 * gallery[3]
    ids = np.array([f"s{i}" for i in range(40)], dtype=object)
    queries, items = (
        _embed(rng.standard_normal((20, 64)).astype(np.float32), ids[np.arange(20) % 5]),
        _embed(gallery, ids),
    )
    result = _rank(queries, items)
    _check_against_reference(queries, items, result)
    assert (result.n_tied[np.arange(20) % 5 == 3] >= 2).all()


def test_both_paths_of_close_candidates_agree(monkeypatch):
    """A crowded block is recomputed whole, a sparse one pair by pair; the counts are the same."""
    rng = np.random.default_rng(1)
    gallery = rng.standard_normal((300, 16)).astype(np.float32)
    gallery[100:110] = gallery[5]
    ids = np.array([f"s{i:03d}" for i in range(300)], dtype=object)
    targets = np.arange(60) % 12
    queries, items = (
        _embed(gallery[targets] + rng.standard_normal((60, 16)).astype(np.float32), ids[targets]),
        _embed(gallery, ids),
    )
    sparse = _rank(queries, items, block_gallery=64)
    calls = []
    double = rt._double_similarities
    monkeypatch.setattr(rt, "_double_similarities", lambda *a: calls.append(1) or double(*a))
    dense = _rank(queries, items, block_gallery=2)  # the tied ones fill their block
    assert calls
    np.testing.assert_array_equal(sparse.n_above, dense.n_above)
    np.testing.assert_array_equal(sparse.n_tied, dense.n_tied)
    _check_against_reference(queries, items, sparse)


def test_tokens_are_flattened_and_extreme_norms_do_not_matter():
    rng = np.random.default_rng(2)
    tokens = rng.standard_normal((6, 3, 4)).astype(np.float32)
    flat = _rank(_embed(tokens.reshape(6, -1)[::-1]), _embed(tokens.reshape(6, -1)))
    result = _rank(_embed(tokens[::-1] * np.float32(1e-35)), _embed(tokens * np.float32(1e34)))
    np.testing.assert_array_equal(result.ranks, flat.ranks)


def test_read_only_memory_maps_are_ranked(tmp_path):
    vectors = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = _embed(np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    assert (_rank(mapped, mapped).ranks == 1).all()


def test_best_candidates_are_listed_by_similarity_then_id():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    gallery = _embed(vectors, ["d", "c", "a", "b"])
    result = _rank(_embed(np.array([[1.0, 0.0]]), ["d"]), gallery, n_top=9)
    assert list(result.gallery_ids[result.top_indices[0]]) == ["a", "d", "b", "c"]
    # Double precision, printed to six digits.
    assert_close(result.top_similarities[0], [1, 1, 0.5**0.5, 0])
    assert result.n_above[0] == 0
    assert result.ranks[0] == 1.5
    assert result.worst_ranks[0] == 2
    assert _rank(_embed(vectors), _embed(vectors), n_top=0).top_indices.shape == (4, 0)


def test_best_candidates_equal_a_full_sort():
    rng = np.random.default_rng(4)
    queries, gallery = _embed(rng.standard_normal((50, 8))), _embed(rng.standard_normal((80, 8)))
    result = _rank(queries, gallery, n_top=7, block_gallery=9, block_queries=16)
    expected = np.argsort(-rt.compute_similarity(queries, gallery, device="cpu").astype(float), axis=1)[:, :7]
    np.testing.assert_array_equal(result.top_indices, expected)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 60), data=st.data())
def test_k_way_accuracy_equals_exact_binomials(size, data):
    n_above = data.draw(st.integers(0, size - 1))
    n_tied = data.draw(st.integers(0, size - 1 - n_above))
    result = _made([n_above, 0], [n_tied, 0], size)
    for k in range(2, size + 1):
        expected = references.k_way(n_above, n_tied, size, k)
        # A product of up to 60 rounded factors: 1e-12 is generous.
        assert rt.compute_k_way_hits(result, k)[0] == pytest.approx(expected, rel=CLOSE)
        against = references.k_way(n_above + n_tied, 0, size, k)
        assert rt.compute_k_way_hits(result, k, ties="against")[0] == pytest.approx(against, rel=CLOSE)


def _made(n_above, n_tied, size):
    n = len(n_above)
    return rt.Retrieval(
        np.array(["a"] * n, dtype=object), np.arange(size).astype(object), np.array(n_above), np.array(n_tied),
        np.zeros(n), np.zeros((n, 0), int), np.zeros((n, 0)), "toy",
    )  # fmt: skip


def test_all_alternatives_is_top_one_and_large_galleries_do_not_overflow():
    result = _made([0, 1, 8269, 16539], [0, 0, 0, 0], 16540)
    assert rt.compute_k_way_hits(result, 16540).mean() == rt.compute_top_k_hits(result, 1).mean() == 0.25
    assert_close(rt.compute_k_way_hits(result, 2), 1 - np.array([0, 1, 8269, 16539]) / 16539)


def test_a_collapsed_gallery_scores_at_chance():
    """Equal candidates: shared ties give exactly chance, and top-k, which counts ties against, gives nothing."""
    gallery = _embed(np.tile(np.float32([0.3, 0.1, 0.7]), (25, 1)))
    result = _rank(_embed(np.random.default_rng(5).standard_normal((25, 3))), gallery)
    assert (result.ranks == 13).all()
    assert np.median(rt.compute_relative_ranks(result)) == 0.5
    assert rt.compute_top_k_hits(result, 5).mean() == 0
    assert rt.compute_top_k_hits(result, 5, ties="shared").mean() == pytest.approx(0.2)
    for k in (2, 10, 25):
        assert rt.compute_k_way_hits(result, k).mean() == pytest.approx(1 / k)


def test_collapsed_queries_and_noise_score_near_chance():
    rng = np.random.default_rng(6)
    gallery = _embed(rng.standard_normal((200, 32)))
    same = _rank(_embed(np.tile(rng.standard_normal(32), (200, 1))), gallery)
    assert rt.compute_top_k_hits(same, 1).mean() == 1 / 200
    assert same.ranks.mean() == 100.5
    noise = _rank(_embed(rng.standard_normal((200, 32))), gallery)
    # Ten draws of 200 each: five standard deviations of the mean relative rank (0.289 / sqrt(200)).
    assert abs(rt.compute_relative_ranks(noise).mean() - 0.5) < 5 * 0.289 / 200**0.5


def test_rank_statistics():
    result = _made([0, 1, 3], [0, 1, 0], 5)  # ranks 1, 2.5, 4
    assert result.ranks.mean() == 2.5
    assert np.median(result.ranks) == 2.5
    assert rt.compute_reciprocal_ranks(result).mean() == pytest.approx((1 + 0.4 + 0.25) / 3)
    assert np.median(rt.compute_relative_ranks(result)) == 0.375
    assert np.median(rt.compute_relative_ranks(result, convention="fraction")) == 0.5
    np.testing.assert_array_equal(rt.compute_top_k_hits(result, 2), [1, 0, 0])
    np.testing.assert_array_equal(rt.compute_top_k_hits(result, 2, ties="shared"), [1, 0.5, 0])


def test_similarity_matrix_gives_equal_candidates_equal_values():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((30, 40)).astype(np.float32)
    gallery = np.concatenate([rows, rows[::-1]])
    similarity = rt.compute_similarity(_embed(rows), _embed(gallery), device="cpu")
    np.testing.assert_array_equal(similarity[:, :30], similarity[:, :29:-1])
    assert similarity.dtype == np.float32


def test_a_query_without_direction_ties_with_everything():
    ranked = _rank(_embed(np.diag([1.0, 0, 1])), _embed(np.eye(3)))
    assert ranked.ranks.tolist() == [1.0, 2.0, 1.0]
    assert rt.compute_top_k_hits(ranked, 1).mean() == pytest.approx(2 / 3)


GOOD = _embed(np.eye(3))


def _search(vectors=GOOD.vectors, ids="abc"):
    return rt.GallerySearch(Embeddings(vectors.astype(np.float32), list(ids), "toy"))


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("'s0001' occurs more than once", lambda: _rank(GOOD, _embed(np.eye(3), ["s0000", "s0001", "s0001"]))),
        (r"1 of 3 queries have no true item in the gallery of 2, first 's0002'",
         lambda: _rank(GOOD, _embed(np.eye(3)[:2]))),
        (r"1 gallery item embedding\(s\).*norm 0, first 's0001'", lambda: _rank(GOOD, _embed(np.diag([1.0, 0, 1])))),
        ("cannot be compared", lambda: _rank(GOOD, Embeddings(np.eye(3), GOOD.ids, "other"))),
        ("exceeds the gallery", lambda: _made([3], [0], 3)),
        *((f"needs queries and candidates, got {n} and {m}",
           lambda n=n, m=m: _rank(_embed(np.ones((n, 2))), _embed(np.ones((m, 2)))))
          for n, m in ((0, 3), (2, 0), (0, 0))),
        # A query with NaN once gave candidates with NaN as their similarity, and rank -1.
        *(("3 finite features", lambda ask=ask, query=query: ask(_search(), query))
          for query in (np.array([np.nan, 1, 0]), np.array([np.inf, 1, 0]), np.ones(4))
          for ask in (lambda search, q: search.find(q, 2), lambda search, q: search.count_above(q, 0))),
        ("gallery is empty", lambda: _search(np.zeros((0, 3)), "")),
        ("'b' is zero", lambda: _search(np.array([[1.0, 0], [0, 0]]), "ab")),
        ("more than once", lambda: _search(np.eye(2), "aa")),
    ],
)  # fmt: skip
def test_bad_input_is_named(words, call):
    with pytest.raises(DataError, match=words):
        call()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("must be between 2 and the gallery size 3", lambda: rt.compute_k_way_hits(_rank(GOOD, GOOD), 4)),
        ("device", lambda: rt.compute_ranks(GOOD, GOOD, device="gpu")),
        ("n_top must be 1", lambda: _search().find(np.ones(3), 0)),
    ],
)
def test_bad_settings_are_named(words, call):
    with pytest.raises(ConfigError, match=words):
        call()


def test_ranks_of_a_given_matrix_equal_those_of_its_embeddings(tmp_path, monkeypatch):
    """Read block by block from a memory map; the order of the columns does not matter, and equal values tie."""
    rng = np.random.default_rng(0)
    queries = Embeddings(rng.standard_normal((30, 6)).astype(np.float32), np.arange(30) % 12, "toy")
    gallery = Embeddings(rng.standard_normal((12, 6)).astype(np.float32), np.arange(12), "toy")
    expected = rt.compute_ranks(queries, gallery, device="cpu", n_top=4)
    np.save(tmp_path / "s.npy", rt.compute_similarity(queries, gallery, device="cpu"))
    monkeypatch.setattr(rt, "BLOCK_QUERIES", 7)
    order = rng.permutation(12)
    matrix = np.load(tmp_path / "s.npy", mmap_mode="r")
    found = rt.rank_similarities(matrix[:, order], queries.ids, gallery.ids[order], n_top=4)
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    np.testing.assert_array_equal(found.gallery_ids[found.top_indices], gallery.ids[expected.top_indices])
    tied = rt.rank_similarities(np.zeros((3, 3), np.uint8), ["b", "a", "c"], ["a", "b", "c"])
    assert tied.ranks.tolist() == [2, 2, 2]
    assert tied.worst_ranks.tolist() == [3, 3, 3]
    assert tied.top_indices.tolist() == [[0, 1, 2]] * 3
    with pytest.raises(DataError, match="3 queries by 2 candidates was expected, got \\(2, 3\\)"):
        rt.rank_similarities(np.zeros((2, 3)), ["a", "b", "a"], ["a", "b"])


@pytest.mark.parametrize("name", ["none", "mean", "zscore"])
def test_what_is_subtracted_and_divides_is_of_the_training_images(name):
    """Deviations of 0.01 and 100, and a feature that is always 3, which is divided by nothing."""
    training = np.random.default_rng(0).normal(size=(50, 3)) * [0.01, 100, 0] + [1, 2, 3]
    asked = np.random.default_rng(1).normal(size=(4, 3)) * [0.01, 100, 1] + [1, 2, 3]
    centred = rt.fit_centre(_embed(training), name).apply(_embed(asked))
    mean = 0 if name == "none" else training.mean(axis=0)
    scale = np.array([*training.std(axis=0)[:2], 1]) if name == "zscore" else 1
    np.testing.assert_allclose(
        centred.vectors, (asked - mean) / scale, rtol=1e-4, atol=1e-4
    )  # in single precision
    assert centred.space == f"toy/centre={name}"


@pytest.mark.parametrize("power", [1.0, 0.0], ids=["decaying axes", "isotropic"])
@pytest.mark.parametrize("scanned", [1 << 16, 100], ids=["kept", "elsewhere"])
def test_a_search_of_one_prediction_is_exact_and_breaks_ties_by_id(power, scanned):
    draw = np.random.default_rng(0)
    spread = np.arange(1, 321.0) ** (-power / 2)
    gallery = (draw.standard_normal((3000, 320)) * spread).astype(np.float32)
    gallery[100:108], gallery[200] = gallery[50], 2 * gallery[50]
    ids = [f"i{n:04d}" for n in draw.permutation(3000)]
    centre = rt.Centre(gallery.mean(axis=0), np.ones(320, np.float32), "mean")
    search = rt.GallerySearch(Embeddings(gallery, ids, "toy"), centre, scanned=scanned)
    moved = gallery.astype(np.float64) - centre.mean
    place = np.argsort(np.argsort(ids))
    for row in (50, 7, 1500):
        query = moved[row] + 0.5 * spread * draw.standard_normal(320)
        cosines = moved @ query / np.linalg.norm(moved, axis=1) / np.linalg.norm(query)
        expected = np.lexsort((place, -cosines.round(9)))[:6]
        found, similar = search.find(query, 6)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(similar, cosines[expected], atol=1e-6)
        # A hundred candidates at 2e-4 each, where the best are exact.
        assert search.sum_exponentials(query, 20.0) == pytest.approx(
            np.log(np.exp(20 * cosines).sum()), abs=1e-3
        )
        for other in (int(expected[5]), 42):
            above = (cosines > cosines[other] + 1e-7).sum()
            assert search.count_above(query, other)[0] == above
    assert search.is_exhaustive == (scanned > 3000)


@pytest.mark.parametrize("fast", [True, False], ids=["whole numbers", "without them"])
def test_rounding_to_bytes_takes_no_more_than_it_says(fast, monkeypatch):
    """Also of vectors with one feature far above the others, as CLIP's have, and of galleries that are all alike."""
    if not fast:
        monkeypatch.setattr(rt, "_can_multiply_bytes", lambda n_features: False)
    draw = np.random.default_rng(0)
    even = draw.standard_normal((600, 96)).astype(np.float32)
    outlier = even + 200 * (np.arange(96) == 5).astype(np.float32)
    alike = (1 + 1e-3 * even).astype(np.float32)
    for gallery in (even, outlier, alike, even[:, :1], even[:, :7]):
        search = rt.GallerySearch(Embeddings(gallery, np.arange(600), "toy"))
        unit = gallery[3].astype(np.float64) + 0.3 * draw.standard_normal(gallery.shape[1])
        unit /= np.linalg.norm(unit)
        exact = gallery @ unit / np.linalg.norm(gallery.astype(np.float64), axis=1)
        known = search._estimate(unit)
        rough = known.slack.mean()
        assert (np.abs(known.cosines - exact) <= known.slack).all()
        for n_bytes in (1, 2, 2):
            search._bytes.refine(known, np.arange(600), n_bytes)
            assert (np.abs(known.cosines - exact) <= known.slack).all()
        assert known.slack.mean() < max(rough / 20, 3e-5)
        assert rough < 0.04
    assert search.find(np.zeros(7), 2)[1].tolist() == [0, 0]


def test_a_torch_without_products_of_bytes_is_searched_all_the_same(monkeypatch):
    """The product is no public function of torch, and the search asked for it by name alone."""
    import torch

    monkeypatch.delattr(torch, "_int_mm")
    rt._can_multiply_bytes.cache_clear()
    try:
        search = rt.GallerySearch(Embeddings(np.eye(11, dtype=np.float32), np.arange(11), "toy"))
        assert search.find(np.arange(11.0), 2)[0].tolist() == [10, 9]
    finally:
        rt._can_multiply_bytes.cache_clear()


@pytest.mark.parametrize(
    ("first", "shown", "said"),
    [
        ("a" * 30, "b" * 30, "30 of 30 queries have 'a' at rank 1, but only 0 of them showed"),
        ("a" * 9 + "b", "abcdefghij", "9 of 10 queries have 'a' at rank 1, but only 1 of them showed"),
        ("a" * 12 + "bcdefgh", "abcdefghijklmnopqrs", "12 of 19"),
        ("a" * 12 + "bcdefgh", "a" * 6 + "bcdefghijklmn", "12 of 19"),  # twice as often as it was shown
        ("a" * 12 + "bcdefgh", "a" * 7 + "bcdefghijklm", ""),
        ("a" * 10, "a" * 8 + "bb", ""),  # most showed it
        ("a" * 10 + "bcdefghijk", "abcdefghijklmnopqrst", ""),  # just half of all
        ("a" * 11 + "bcdefghij", "abcdefghijklmnopqrst", "11 of 20"),
        ("a" * 5 + "b" * 5, "abcdefghij", ""),
        ("aaa", "bcd", ""),  # too few
        ("a" * 12 + "bcdefgh", [None] * 19, "12 of 19"),  # nothing is known of what they showed
    ],
)
def test_a_common_choice_is_named_when_most_queries_name_it_without_having_shown_it(first, shown, said):
    """30 of 30 decisions named one picture, and nothing said so."""
    sentence = rt.describe_common_choice(list(first), list(shown))
    assert said in sentence
    assert bool(said) == bool(sentence)
