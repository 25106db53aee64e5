"""Embedding metrics meet by id and equal scipy."""

import numpy as np
import pytest
from scipy.spatial import distance

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.embedding import correlation_distance, cosine_to_target


def test_values_equal_scipy_and_rows_meet_by_id():
    rng = np.random.default_rng(0)
    target = Embeddings(rng.standard_normal((4, 2, 5)).astype(np.float32), list("abcd"), "toy")
    predicted = Embeddings(rng.standard_normal((5, 2, 5)).astype(np.float32), list("dabca"), "toy")
    pairs = [
        (p.ravel().astype(float), target.vectors["abcd".index(i)].ravel().astype(float))
        for p, i in zip(predicted.vectors, predicted.ids, strict=True)
    ]
    # Double precision in both: rounding only.
    np.testing.assert_allclose(
        correlation_distance(predicted, target), [distance.correlation(*p) for p in pairs], atol=1e-12
    )
    np.testing.assert_allclose(
        cosine_to_target(predicted, target), [1 - distance.cosine(*p) for p in pairs], atol=1e-12
    )


def test_uninformative_and_impossible_vectors():
    target = Embeddings(np.array([[1.0, 2, 4]]), ["a"], "toy")
    assert correlation_distance(Embeddings(np.full((1, 3), 0.1), ["a"], "toy"), target)[0] == 1
    with pytest.raises(DataError, match="'a'"):
        cosine_to_target(Embeddings(np.zeros((1, 3)), ["a"], "toy"), target)
    with pytest.raises(DataError, match="cannot meet"):
        cosine_to_target(Embeddings(np.ones((1, 3)), ["a"], "other"), target)
    with pytest.raises(DataError, match="'b'"):
        cosine_to_target(Embeddings(np.ones((1, 3)), ["b"], "toy"), target)
