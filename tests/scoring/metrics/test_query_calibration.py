"""Transductive corrections against their formulas, and what they do to queries that a subject has moved."""

import numpy as np
import pytest
from scipy.linalg import expm, polar, sqrtm

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.metrics.query_calibration import (
    calibrate,
    centre_queries,
    compute_adaptive_csls,
    compute_cosines,
    compute_csls,
    find_mutual,
    match_moments,
    rotate_onto,
    whiten,
)
from tests.references import assert_close


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((40, 16)) + 0.5
    queries = gallery + 0.6 * rng.standard_normal((40, 16))
    return queries, gallery


def embed(vectors, prefix="s"):
    return Embeddings(vectors.astype(np.float32), [f"{prefix}{i:03d}" for i in range(len(vectors))], "toy")


def find_hits(similarity):
    return float((similarity.argmax(axis=1) == np.arange(len(similarity))).mean())


def test_centring_and_moments_are_those_of_numpy(sets):
    queries, gallery = sets
    assert_close(centre_queries(queries).mean(axis=0), 0, scale=1)
    moved = match_moments(queries, gallery)
    np.testing.assert_allclose(moved.mean(axis=0), gallery.mean(axis=0))
    np.testing.assert_allclose(moved.std(axis=0), gallery.std(axis=0))
    still = match_moments(np.ones((3, 2)), gallery[:, :2])
    np.testing.assert_allclose(still, np.tile(gallery[:, :2].mean(axis=0), (3, 1)))


def test_whitening_is_the_symmetric_root_of_the_shrunk_covariance(sets):
    """SATTC's own `subject_adaptive_whiten` and `csls_adaptive` (QunjieHuang/SATTC-CVPR2026@0cdfd1b) were run on the
    same arrays of 200 x 200, 50 x 200 and 120 x 80: the largest differences were 9e-16 and 4e-15."""
    queries, _ = sets
    covariance = np.cov(queries.T)
    shrunk = 0.4 * covariance + 0.6 * np.trace(covariance) / 16 * np.eye(16)
    expected = (queries - queries.mean(axis=0)) @ np.linalg.inv(sqrtm(shrunk).real)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_close(whiten(queries, 0.6), expected)
    few = whiten(queries[:5], 0.6)  # fewer rows than dimensions
    assert np.isfinite(few).all()


def test_csls_equals_a_loop(sets):
    similarity = compute_cosines(*sets)
    found = compute_csls(similarity, k=10)
    for i in range(0, 40, 7):
        for j in range(0, 40, 5):
            rows = np.mean(sorted(similarity[i])[-10:])
            columns = np.mean(sorted(similarity[:, j])[-10:])
            assert found[i, j] == pytest.approx(2 * similarity[i, j] - rows - columns)
    assert compute_csls(similarity[:3, :4], k=10).shape == (3, 4)


@pytest.mark.parametrize("uneven", [False, True])
def test_adaptive_csls_equals_a_loop(sets, uneven):
    s = compute_cosines(*sets)[:, :35]
    if uneven:  # dense and sparse rows, hubs and columns that are nowhere among the first: every bound is met
        s[:8] *= np.array([0.1, 0.3, 0.5, 0.7, 1.5, 1.9, 3, 5])[:, None]
        s[:, :4] += 3
        s[:, 4:8] -= 3
    found = compute_adaptive_csls(s)
    density = np.array([np.mean(sorted(row)[-10:]) for row in s])
    middle = sorted(density)[(len(density) - 1) // 2]
    often = np.zeros(35)
    for row in s:
        often[np.argsort(row)[-20:]] += 1 / len(s)
    for i in [*range(8), *range(8, 40, 6)]:
        k = int(np.clip(round(12 * density[i] / (middle + 1e-9)), 5, 20))
        r = np.mean(sorted(s[i])[-k:])
        for j in range(0, 35, 3):
            n = int(np.clip(round(12 * (often[j] / (np.median(often) + 1e-9)) ** 1.2), 8, 24))
            assert found[i, j] == pytest.approx(2 * s[i, j] - r - np.mean(sorted(s[:, j])[-n:]))


def test_the_rotation_solves_the_weighted_problem_and_undoes_a_turn():
    rng = np.random.default_rng(1)
    gallery = rng.standard_normal((200, 24))
    turn = rng.standard_normal((24, 24))
    turned = gallery @ expm(0.12 * (turn - turn.T)) + 0.5 * rng.standard_normal((200, 24))
    before = find_hits(compute_csls(compute_cosines(turned, gallery)))
    found = rotate_onto(turned, gallery, gate=0.0)
    assert found.used
    assert find_hits(compute_csls(compute_cosines(found.queries, gallery))) > before + 0.1
    # distances among the queries stay: it is a rotation
    spread = np.linalg.norm(turned[:20, None] - turned[None, :20], axis=-1)
    assert_close(np.linalg.norm(found.queries[:20, None] - found.queries[None, :20], axis=-1), spread)
    # no orthogonal map near it has a larger weighted trace with the pulled cross product
    similarity = compute_csls(compute_cosines(turned, gallery))
    rows = find_mutual(similarity)
    assert len(rows) == found.n_landmarks
    best = similarity.argmax(axis=1)[rows]
    two = np.sort(similarity[rows], axis=1)
    weight = np.maximum(two[:, -1] - two[:, -2], 1e-6)
    weight /= weight.sum()
    # the landmarks' own mean comes to lie on that of their images, wherever it was
    assert_close(weight @ found.queries[rows], weight @ gallery[best])
    x, y = turned[rows] - weight @ turned[rows], gallery[best] - weight @ gallery[best]
    cross = x.T @ np.diag(weight) @ y
    pulled = cross + 0.1 * np.linalg.norm(cross, 2) * np.eye(24)
    rotation = np.linalg.lstsq(
        turned - weight @ turned[rows], found.queries - weight @ gallery[best], rcond=None
    )[0]
    np.testing.assert_allclose(rotation, polar(pulled)[0], atol=1e-6)
    for _ in range(20):
        small = 0.05 * rng.standard_normal((24, 24))
        other = rotation @ expm(small - small.T)
        assert np.trace(rotation.T @ pulled) >= np.trace(other.T @ pulled)


def test_wrong_landmarks_do_not_turn_anything():
    """Half of all queries have a mutual neighbour by chance, and a rotation onto them would be one onto noise."""
    rng = np.random.default_rng(2)
    queries, gallery = rng.standard_normal((2, 200, 32))
    found = rotate_onto(queries, gallery)
    assert found.n_landmarks > 60
    assert found.agreement < 0.05
    assert not found.used
    assert found.queries is queries


def test_calibration_sees_no_labels_and_helps_a_subject_who_is_elsewhere():
    rng = np.random.default_rng(3)
    gallery = rng.standard_normal((100, 32))
    shift, stretch = 6 * rng.standard_normal(32), rng.uniform(0.2, 3, 32)
    queries = (gallery + 0.9 * rng.standard_normal((100, 32))) * stretch + shift
    found = calibrate(embed(queries), embed(gallery)).similarities
    plain = find_hits(compute_cosines(queries, gallery))
    assert list(found) == ["centred", "standardised", "csls", "sattc", "score"]
    for name in ("centred", "standardised", "sattc", "score"):
        assert find_hits(found[name]) > plain + 0.2, name
    other = calibrate(embed(queries, "other"), embed(gallery)).similarities
    order = rng.permutation(100)
    moved = calibrate(embed(queries[order]), embed(gallery)).similarities
    for name, similarity in found.items():
        np.testing.assert_array_equal(other[name], similarity)
        assert_close(moved[name], similarity[order])


def test_too_few_queries_are_refused():
    with pytest.raises(DataError, match="but there are 9"):
        calibrate(embed(np.eye(9, 4)), embed(np.eye(12, 4)))
