"""Protocols equal their definitions, query by query, and a collapsed gallery gains nothing."""

import itertools

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics import protocols
from braindecode_vis.scoring.retrieval import compute_ranks, compute_reciprocal_ranks
from tests.references import assert_close

SPACE = "toy"


def embed(vectors, ids=None):
    ids = [f"s{i:03d}" for i in range(len(vectors))] if ids is None else ids
    return Embeddings(np.asarray(vectors, dtype=np.float32), np.asarray(ids, dtype=object), SPACE)


def make_pair(n=12, d=6, noise=1.5, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, d))
    return embed(images + noise * rng.standard_normal((n, d))), embed(images)


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_drawn_retrieval_equals_its_definition_in_both_directions():
    brain, images = make_pair()
    shuffled = images.select(list(images.ids[::-1]))
    found = protocols.retrieve_in_draws(
        brain, shuffled, n_items=5, n_draws=400, seed=3, device="cpu", n_boot=500
    )
    pairs = {
        "image_retrieval": (brain.vectors, images.vectors),
        "brain_retrieval": (images.vectors, brain.vectors),
    }
    for name, (queries, gallery) in pairs.items():
        expected = np.zeros(12)
        for i in range(12):
            others = [j for j in range(12) if j != i]
            beaten = [cosine(queries[i], gallery[j]) < cosine(queries[i], gallery[i]) for j in others]
            expected[i] = np.mean([all(c) for c in itertools.combinations(beaten, 4)])
        result = found[name]
        assert_close(result.exact, expected)
        # 400 draws of 5 hits each: a standard error of about 0.01.
        assert result.value == pytest.approx(expected.mean(), abs=0.05)
        assert result.interval.low < expected.mean() < result.interval.high
        assert len(result.draws) == 400
    again = protocols.retrieve_in_draws(
        brain, images, n_items=5, n_draws=400, seed=3, device="cpu", n_boot=500
    )
    np.testing.assert_array_equal(found["brain_retrieval"].draws, again["brain_retrieval"].draws)


def test_drawn_retrieval_of_a_collapsed_brain_is_zero_and_limits_hold():
    _, images = make_pair()
    flat = embed(np.ones((12, 6)))
    found = protocols.retrieve_in_draws(flat, images, n_items=4, n_draws=3, device="cpu", n_boot=100)
    assert found["brain_retrieval"].value == 0
    assert found["brain_retrieval"].exact.max() == 0
    with pytest.raises(DataError, match="13 from 12 test images"):
        protocols.retrieve_in_draws(flat, images, n_items=13)
    with pytest.raises(DataError, match="average the repetitions"):
        protocols.retrieve_in_draws(embed(np.ones((2, 6)), ["s000", "s000"]), images, n_items=2)


def test_average_precision_equals_its_definition_and_its_chance():
    rng = np.random.default_rng(0)
    gallery, queries = embed(rng.standard_normal((9, 4))), embed(rng.standard_normal((5, 4)))
    labels, wanted = np.array(list("aabbbcccc")), np.array(list("abcca"))
    found = protocols.compute_average_precision(queries, gallery, wanted, labels, device="cpu")
    for query, label, value in zip(queries.vectors, wanted, found, strict=True):
        order = sorted(range(9), key=lambda j: -cosine(query, gallery.vectors[j]))
        hits, precisions = 0, []
        for place, j in enumerate(order, start=1):
            if labels[j] == label:
                hits += 1
                precisions.append(hits / place)
        assert value == pytest.approx(np.mean(precisions))
    for n_relevant in (1, 2, 4):
        orders = itertools.combinations(range(1, 7), n_relevant)
        exact = np.mean([np.mean([(k + 1) / p for k, p in enumerate(places)]) for places in orders])
        assert protocols.compute_chance_precision(np.array([n_relevant]), 6)[0] == pytest.approx(exact)


def test_average_precision_of_one_relevant_item_is_the_reciprocal_rank():
    queries, gallery = make_pair()
    found = protocols.compute_average_precision(queries, gallery, queries.ids, gallery.ids, device="cpu")
    np.testing.assert_allclose(found, compute_reciprocal_ranks(compute_ranks(queries, gallery, device="cpu")))
    flat = embed(np.ones((4, 3)))
    worst = protocols.compute_average_precision(flat, flat, list("abcd"), list("abcd"), device="cpu")
    np.testing.assert_allclose(worst, 0.25)
    with pytest.raises(DataError, match="no item in the gallery, first 'z'"):
        protocols.compute_average_precision(flat, flat, list("abcz"), list("abcd"))


def test_identification_within_a_concept_ignores_the_others():
    queries, gallery = make_pair(n=10)
    labels = np.array(list("aaaabbbbbb"))
    found = protocols.identify_within_label(queries, gallery, labels, device="cpu")
    for i in range(10):
        rivals = [j for j in range(10) if j != i and labels[j] == labels[i]]
        own = cosine(queries.vectors[i], gallery.vectors[i])
        assert found[i] == pytest.approx(
            np.mean([cosine(queries.vectors[i], gallery.vectors[j]) < own for j in rivals])
        )
    concept_only = embed(np.repeat(np.eye(2), 5, axis=0) + 1e-9)
    blind = protocols.identify_within_label(concept_only, concept_only, list("aaaaabbbbb"), device="cpu")
    np.testing.assert_allclose(blind, 0.5)  # knowing the concept alone is chance
    with pytest.raises(DataError, match="'b' has only one image"):
        protocols.identify_within_label(queries, gallery, list("aaaaaaaaab"), device="cpu")


def test_templates_are_means_of_other_images():
    others = embed([[2, 0], [0, 1], [0, 5]], ["x1", "x2", "x3"])
    gallery = protocols.make_concept_templates(others, ["cat", "cat", "dog"], {"t1": "dog", "t2": "cat"})
    np.testing.assert_allclose(gallery.vectors, [[0, 1], [0.5, 0.5]])
    assert list(gallery.ids) == ["t1", "t2"]
    for others_of, test, words in (
        (["cat", "cat", "dog"], {"x1": "cat"}, "in their own template"),
        (["cat", "cat", "dog"], {"t1": "cow"}, "no other image, first 'cow'"),
        (["cat", "cat", "dog"], {"t1": "cat", "t2": "cat"}, "they would tie"),
    ):
        with pytest.raises(DataError, match=words):
            protocols.make_concept_templates(others, others_of, test)


def test_text_classifies_by_the_name_of_the_concept():
    text = embed(np.eye(3), ["cat", "dog", "cow"])
    predicted = embed([[3, 1, 0], [3, 1, 0]], ["s1", "s2"])
    found = protocols.classify_by_text(predicted, ["cat", "cow"], text, device="cpu")
    np.testing.assert_array_equal(found.ranks, [1, 3])
    assert found.protocol == "zero-shot by text"


def test_averaged_predictions_keep_subjects_apart():
    predicted = embed([[1, 0], [3, 2], [5, 5], [7, 7]], ["a", "a", "a", "b"])
    rows, people = protocols.average_predictions(predicted, ["1", "1", "2", "1"])
    np.testing.assert_allclose(rows.vectors, [[2, 1], [5, 5], [7, 7]])
    assert list(rows.ids) == ["a", "a", "b"]
    assert list(people) == ["1", "2", "1"]
    rows, _ = protocols.average_predictions(predicted)
    np.testing.assert_allclose(rows.vectors, [[3, 7 / 3], [7, 7]], rtol=1e-6)


def test_a_binding_is_right_where_the_true_item_is_nearer_than_the_swapped_one():
    """Whatever both have in common, and however long they are."""
    angles = np.deg2rad([[10, 0, 40], [10, 40, 0], [200, 190, 160], [20, 40, 40], [5, 170, 180]])
    queries, true, swapped = (
        Embeddings(np.c_[np.cos(a), np.sin(a)] * size, list("abcde"), "toy")
        for a, size in zip(angles.T, (1.0, 4.0, 0.25), strict=True)
    )
    assert protocols.compare_bindings(queries, true, swapped).tolist() == [1.0, 0.0, 1.0, 0.5, 1.0]


def test_predictions_are_averaged_for_each_subject_and_image():
    vectors = np.arange(12.0).reshape(6, 2)
    predicted = Embeddings(vectors, list("abaabb"), "toy")
    found, whose = protocols.average_predictions(predicted, ["x", "x", "x", "y", "y", "x"])
    assert list(zip(whose, found.ids, strict=True)) == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    np.testing.assert_allclose(
        found.vectors, [vectors[[0, 2]].mean(0), vectors[[1, 5]].mean(0), vectors[3], vectors[4]]
    )
    pooled, nobody = protocols.average_predictions(predicted)
    assert (list(pooled.ids), set(nobody)) == (["a", "b"], {""})
    np.testing.assert_allclose(pooled.vectors, [vectors[[0, 2, 3]].mean(0), vectors[[1, 4, 5]].mean(0)])
