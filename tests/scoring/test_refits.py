"""Refits on relabelled images: the worked example of K folds, number by number, and what a slow refit gives."""

import itertools

import numpy as np
import pytest

from braindecode_vis.scoring.refits import RelabelledFold, rank_relabelled

# The example: one feature, three-dimensional targets, three folds of two, ridge with an intercept and penalty 1.
X = np.array([0.0, 1, 2, 1, 3, 5])
Y = np.array([[1.0, 0, 2], [0, 1, 1], [2, 1, 0], [1, 2, 0], [0, 2, 1], [1, 1, 3]])
FOLDS = np.array([0, 1, 2, 2, 1, 0])


def _map(x, train, test, penalty=1.0):
    centred = x[train] - x[train].mean()
    slopes = np.outer(x[test] - x[train].mean(), centred / (centred @ centred + penalty))
    weights = np.zeros((len(test), len(x)))
    weights[:, train] = slopes + 1 / len(
        train
    )  # centred features sum to zero, so that the mean is the training mean
    return weights


def _folds(*, centred, gallery):
    found = []
    for number in range(3):
        train, test = np.flatnonzero(number != FOLDS), np.flatnonzero(number == FOLDS)
        centre = (number != FOLDS) / len(train) * centred
        candidates = test if gallery == "fold" else np.arange(len(X))
        found.append(RelabelledFold(_map(X, train, test)[None], None, test, candidates, centre))
    return found


def _two_way(folds, orders):
    """Two-way identification of each refit, ties half, by correlation."""
    targets = Y - Y.mean(axis=1, keepdims=True)
    above, tied = rank_relabelled(folds, targets @ targets.T, orders)
    n_rivals = np.concatenate([np.full(len(fold.own), len(fold.gallery) - 1) for fold in folds])
    return (1 - (above + tied / 2) / n_rivals).mean(axis=1)


def test_the_prediction_of_the_example():
    train = np.flatnonzero(FOLDS != 0)
    (prediction,) = _map(X, train, np.array([0])) @ Y
    np.testing.assert_allclose(prediction, [0.866667, 1.266667, 0.266667], atol=5e-7)
    np.testing.assert_allclose(Y[train].mean(axis=0), [0.75, 1.5, 0.5])
    own = [np.corrcoef(prediction - Y[train].mean(axis=0), y - Y[train].mean(axis=0))[0, 1] for y in Y]
    np.testing.assert_allclose(own, [0.095783, -0.654654, 1, 0.277350, -1, -0.277350], atol=5e-7)


@pytest.mark.parametrize(
    ("centred", "gallery", "two_way", "null_mean", "p_value"),
    [
        (False, "all", 0.166667, 0.355278, 0.929167),
        (True, "all", 0.600000, 0.504907, 0.365278),
        (False, "fold", 0.333333, None, None),
        (True, "fold", 0.5, None, None),
    ],
)
def test_the_example_of_k_folds(centred, gallery, two_way, null_mean, p_value):
    """All 720 orders: the exact refit. Raw, noise lies far below .5; after the training mean it does not."""
    orders = np.array(list(itertools.permutations(range(6))))
    found = _two_way(_folds(centred=centred, gallery=gallery), orders)
    assert found[0] == pytest.approx(two_way, abs=5e-7)
    if null_mean is not None:
        assert found.mean() == pytest.approx(null_mean, abs=5e-7)
        assert (found >= found[0] - 1e-9).mean() == pytest.approx(p_value, abs=5e-7)
    else:  # within the fold it is .5 for whatever prediction, exactly
        assert found.mean() == pytest.approx(0.5, abs=1e-12)


def test_a_refit_chooses_its_penalty_again():
    """Ranks equal those of slow fits on permuted targets, each with the penalty of the smallest inner error."""
    rng = np.random.default_rng(0)
    n, penalties = 12, (0.1, 3.0, 100.0)
    x, y = rng.normal(size=n), rng.normal(size=(n, 5))
    x += y[:, 0]
    fold_of, inner_of = np.arange(n) % 3, np.arange(n) // 3 % 2
    folds, errors_of = [], []
    for number in range(3):
        train, test = np.flatnonzero(fold_of != number), np.flatnonzero(fold_of == number)
        weights = np.stack([_map(x, train, test, penalty) for penalty in penalties])
        rests = []
        for penalty in penalties:
            parts = []
            for part in (0, 1):
                inner, held = train[inner_of[train] != part], train[inner_of[train] == part]
                parts.append(_map(x, inner, held, penalty) - np.eye(n)[held])
            rests.append(np.concatenate(parts))
        errors_of.append(rests)
        forms = np.stack([rest.T @ rest for rest in rests])
        folds.append(RelabelledFold(weights, forms, test, np.arange(n), (fold_of != number) / len(train)))
    orders = np.stack([rng.permutation(n) for _ in range(20)])
    above, tied = rank_relabelled(folds, y @ y.T, orders)
    chosen = set()
    for order, found in zip(orders, above, strict=True):
        slow = []
        for fold, rests in zip(folds, errors_of, strict=True):
            best = int(np.argmin([np.square(rest @ y[order]).sum() for rest in rests]))
            chosen.add(best)
            mean = fold.centre @ y[order]
            predicted, candidates = fold.weights[best] @ y[order] - mean, y[order] - mean
            cosine = predicted @ candidates.T
            cosine /= np.outer(np.linalg.norm(predicted, axis=1), np.linalg.norm(candidates, axis=1))
            slow += [(row > row[own] + 1e-9).sum() for row, own in zip(cosine, fold.own, strict=True)]
        np.testing.assert_array_equal(found, slow)
    assert len(chosen) > 1
    assert not tied.any()
