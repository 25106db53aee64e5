import numpy as np
import pytest

from braindecode_vis.scoring.category_scores import compute_auc
from braindecode_vis.scoring.label_exchange import (
    compare_left_pairs,
    count_arrangements,
    decide_left_out,
    list_pairs,
    make_exchange,
)

X = np.array([2, 1.5, 1, 0.2, 0.8, 0.1, -0.5, 0])
TRUTH = np.array([1, 1, 1, 1, 0, 0, 0, 0])


def fit_ridge(train, labels, test):
    """One feature, targets -1 and 1, an intercept, penalty 1."""
    x, y = X[train], 2.0 * labels - 1
    centred = x - x.mean()
    weight = (centred * (y - y.mean())).sum() / ((centred**2).sum() + 1)
    value = y.mean() + weight * (X[test] - x.mean())
    return np.stack([-value, value], axis=1)


def make(truth=TRUTH, **changes):
    options = {"refits": True, "fits_each": 8, "most": 999, "generator": np.random.default_rng(0)} | changes
    return make_exchange(truth, [np.arange(len(truth))], **options)


def test_the_example_of_eight_subjects():
    """Worked out apart from this code over all 70 label sets, to six digits."""
    exchange, owners = make(), np.arange(8)
    assert exchange.is_complete
    assert exchange.labels.shape == (35, 8)  # a set and its complement score alike
    assert exchange.smallest_p == pytest.approx(2 / 70)
    folds = [(np.delete(owners, n), np.array([n])) for n in owners]
    _, margins = decide_left_out(exchange, owners, folds, fit_ridge)
    areas = compute_auc(margins, exchange.labels)
    p, chance, null = exchange.test(areas)
    assert (areas[0], chance, p) == pytest.approx((0.75, 0.248214, 0.085714), abs=5e-7)
    assert len(null) == 69
    areas, wins = compare_left_pairs(exchange, owners, fit_ridge)
    p, chance, _ = exchange.test(areas)
    assert (areas[0], chance, p) == pytest.approx((0.9375, 0.5, 0.057143), abs=5e-7)
    assert np.nanmean(wins) == areas[0]
    assert np.isfinite(wins).sum() == 16


@pytest.mark.parametrize(
    ("truth", "refits", "smallest"),
    [
        ([0, 0, 0, 1, 1, 1], True, 2 / 20),
        ([0, 0, 0, 1, 1, 1], False, 1 / 20),  # fixed decisions: the complement is another score
        ([0, 0, 0, 1, 1, 1, 1, 1], True, 1 / 56),
        ([0, 0, 0, 0, 1, 1, 1, 1], True, 2 / 70),
        ([0, 0, 1, 1, 2, 2], True, 1 / 90),
        ([0, 1], True, 1.0),
    ],
)
def test_the_smallest_p_is_that_of_all_label_sets(truth, refits, smallest):
    exchange = make(np.array(truth), refits=refits)
    assert exchange.is_complete
    assert exchange.smallest_p == pytest.approx(smallest)
    assert exchange.labels[0].tolist() == truth
    assert exchange.weights.sum() == count_arrangements(np.array(truth))
    assert len({tuple(row) for row in exchange.labels.tolist()}) == len(exchange.labels)
    scores = np.zeros(len(exchange.labels))
    scores[0] = 1  # nothing else reaches it
    assert exchange.test(scores)[0] == pytest.approx(smallest)


def test_many_subjects_are_drawn():
    exchange = make(np.arange(30) % 2, fits_each=30)
    assert not exchange.is_complete
    assert len(exchange.labels) == 667  # 20 000 fits of 30 folds, and the observed labels
    assert exchange.smallest_p == pytest.approx(1 / 667)
    assert (exchange.labels.sum(axis=1) == 15).all()
    assert len(make(np.arange(30) % 2, fits_each=30, most=19).labels) == 20
    assert len(make(np.arange(12) % 2, fits_each=12, most=19).labels) == 20  # all would be 462
    assert len(make(np.arange(12) % 2, fits_each=12, most=9999).labels) == 462
    assert len(make(np.arange(30) % 2, refits=False, most=9999).labels) == 10_000
    assert exchange.describe("subject", refits=True) == (
        "labels of whole subjects exchanged 666 times by lot, decoders fitted again: no p below 0.0015"
    )
    assert (
        make()
        .describe("group", refits=False)
        .startswith("labels of whole groups exchanged in all 70 ways, decis")
    )
    assert len(exchange.first(200).labels) == 200
    assert exchange.first(200).smallest_p == pytest.approx(1 / 200)


def test_labels_stay_within_their_block():
    truth = np.array([0, 1, 0, 1, 1, 1])
    blocks = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    exchange = make_exchange(
        truth, blocks, refits=False, fits_each=1, most=99, generator=np.random.default_rng(0)
    )
    assert sorted(map(tuple, exchange.labels.tolist())) == sorted(
        [(*a, *b, 1, 1) for a in ((0, 1), (1, 0)) for b in ((0, 1), (1, 0))]
    )


def test_pairs_of_many_subjects_hold_the_larger_class_equally_often():
    labels = np.r_[np.ones(30, int), np.zeros(20, int)]
    pairs = list_pairs(labels, most=100)
    assert len(pairs) == len(set(pairs)) == 90
    assert set(np.bincount([high for high, _ in pairs], minlength=30).tolist()) == {3}
    assert len(list_pairs(labels, most=10_000)) == 600
