import numpy as np
import pytest
from scipy import stats
from scipy.special import logit

from braindecode_vis.scoring.category_scores import CategoryTask, compute_auc, compute_category_scores
from braindecode_vis.scoring.label_exchange import (
    FEWEST_DRAWS,
    MOST_FITS,
    compare_left_pairs,
    count_arrangements,
    decide_left_out,
    exchange_subjects,
    keep_decisions,
    list_pairs,
    make_exchange,
    spread_of_owners,
    spread_of_pairs,
)
from braindecode_vis.scoring.uncertainty import logit_limits

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
        ([0, 0, 1, 1, 2, 2], True, 6 / 90),  # three names change places
        ([0, 0, 1, 1, 2, 2], False, 1 / 90),
        ([0, 0, 1, 1, 2, 2, 2], True, 2 / 210),
        ([0, 1, 2], True, 1.0),
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
    # What a perfect decoder scores: 1 on the observed labels, and on the same labels under other names if it is fitted
    # again; nothing else reaches it.
    scores = [
        float(len(set(zip(labels, truth, strict=True))) == len(set(truth)) if refits else labels == truth)
        for labels in exchange.labels.tolist()
    ]
    assert exchange.test(np.array(scores))[0] == pytest.approx(smallest)


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


def score_given(truth, decisions, n_trials=5, n_classes=2, design=None):
    """Score decisions that are given, of people with one label each."""
    who = np.repeat(np.arange(len(truth)), n_trials)
    names = np.array(list("abc"), dtype=object)
    labels, subjects = names[np.asarray(truth)[who]], np.array([f"p{n}" for n in who], dtype=object)
    classes = tuple("abc"[:n_classes])
    exchanged = exchange_subjects(
        subjects, labels, classes, decisions, most=999, generator=np.random.default_rng(0)
    )
    task = CategoryTask(
        decisions=decisions, classes=classes, labels=labels, runs=subjects, subjects=subjects, protocol="toy",
        split="test", seed=0, n_bootstrap=200, n_permutations=200, exchanged=exchanged, design=design,
    )  # fmt: skip
    differences = []
    scores, _ = compute_category_scores(task, differences=differences)
    return {(s.metric, s.subject, s.method): s for s in scores}, differences, exchanged


def test_given_decisions_of_people_are_tested_over_people():
    """Three of four patients and all controls are named rightly, whoever decided; labels of all 70 sets."""
    truth, named = [0, 0, 0, 0, 1, 1, 1, 1], np.repeat([0, 0, 0, 0, 1, 1, 1, 0], 5)
    decisions = np.eye(2)[named] + 0.01 * np.random.default_rng(0).random((40, 2))
    found, differences, _ = score_given(truth, decisions, design=np.eye(2)[np.zeros(40, int)])
    row = found["accuracy", "all", "decoded"]
    assert row.value == 0.875
    # Three people are named b: the 5 label sets of 70 whose four b hold these three agree as well.
    assert row.p_value == pytest.approx(5 / 70)
    assert row.chance == pytest.approx((5 / 8 * 4 + 3 / 8 * 4) / 8)
    assert found["balanced_accuracy", "all", "decoded"].value == 0.875
    assert found["auc", "all", "decoded"].chance == pytest.approx(0.5)
    assert found["accuracy", "p7", "decoded"].value == 0
    assert found["accuracy", "all", "design"].value == 0.5
    assert found["accuracy", "all", "design"].chance == row.chance
    difference = next(d for d in differences if d["subject"] == "all" and d["metric"] == "accuracy")
    assert difference["difference"] == 0.375
    assert difference["ci_low"] <= 0.375 <= difference["ci_high"]


def test_subjects_of_both_classes_change_no_labels():
    _, _, exchanged = score_given([0, 1, 2, 0, 1, 2], np.eye(3)[np.arange(30) % 3], n_classes=3)
    assert exchanged.exchange.is_complete
    labels = np.array(list("ab") * 5, dtype=object)
    options = {"most": 99, "generator": np.random.default_rng(0)}
    assert (
        exchange_subjects(np.repeat(["x", "y"], 5), labels, ("a", "b"), np.eye(2)[[0] * 10], **options)
        is None
    )
    assert (
        exchange_subjects(
            np.repeat(["x", "y"], 5), labels[:1].repeat(10), ("a", "b"), np.eye(2)[[0] * 10], **options
        )
        is None
    )


def test_too_few_people_or_people_who_are_alike_have_no_interval():
    alike, two = np.full(4, 0.25), [np.full(2, True)]
    assert spread_of_owners(alike * 0.8, alike, [np.full(4, True)], 40) is None
    assert spread_of_owners(np.array([0.1, 0.3]), np.full(2, 0.5), two, 40) is None
    classes = [np.array([True, True, False]), np.array([False, False, True])]
    assert spread_of_owners(np.array([0.1, 0.3, 0.2]), np.full(3, 1 / 3), classes, 40) is None
    low, high = spread_of_owners(np.array([0.1, 0.2, 0.25, 0.2]), alike, [np.full(4, True)], 40)
    wide = spread_of_owners(np.array([0.1, 0.2, 0.25, 0.2]), alike, [np.full(4, True)], 40, widening=2**0.5)
    assert wide[0] < low < 0.75 < high < wide[1]
    assert spread_of_pairs(np.ones((2, 5))) is None
    assert spread_of_pairs(np.ones((3, 5))) == pytest.approx((0.025 ** (1 / 3), 1.0))
    assert spread_of_pairs(np.zeros((3, 5))) == pytest.approx((0.0, 1 - 0.025 ** (1 / 3)))
    assert spread_of_pairs(np.ones((3, 5)), 2**0.5) == pytest.approx((0.025 ** (2 / 3), 1.0))


def test_pairs_after_folds_are_wider_and_single_pairs_count_once():
    """Twice the squared error of crossed samples, A + B - E: once neither was, and .90 of intervals covered."""
    wins = (np.random.default_rng(0).normal(1, 1, (6, 1)) > np.random.default_rng(1).normal(0, 1, 5)).astype(
        float
    )
    wins[0] = [1, 0, 1, 0, 0.5]
    sides = wins.mean(axis=1), wins.mean(axis=0)
    rest = wins - sides[0][:, None] - sides[1] + wins.mean()
    a, b = (side.var(ddof=1) / len(side) for side in sides)
    variance = max(a, b, a + b - (rest**2).sum() / (5 * 4) / wins.size)
    half = stats.t.ppf(0.975, 9) * (2 * variance) ** 0.5
    assert spread_of_pairs(wins, 2**0.5) == pytest.approx(logit_limits(wins.mean(), half, wins.size))
    some = np.where(np.eye(6, 5) > 0, np.nan, wins)  # not every pair was left out
    sides = np.nanmean(some, axis=1), np.nanmean(some, axis=0)
    a, b = (side.var(ddof=1) / len(side) for side in sides)
    half = stats.t.ppf(0.975, 9) * (2 * (a + b)) ** 0.5
    assert np.subtract(*np.array([logit(x) for x in spread_of_pairs(some, 2**0.5)])) == pytest.approx(
        np.subtract(*np.array([logit(x) for x in logit_limits(np.nanmean(some), half, 25)]))
    )


def test_rows_without_an_interval_say_why():
    """Two people of each class, one of them always right: nothing varies within a class."""
    rows = score_given([0, 0, 1, 1], np.eye(2)[np.zeros(20, int)])[0]
    told = {
        metric: (row.ci_low, row.resampled)
        for (metric, subject, method), row in rows.items()
        if (subject, method) == ("all", "decoded")
    }
    assert told["balanced_accuracy"] == (None, "no interval: all subjects of a class are alike")
    assert told["auc"] == (
        None,
        "no interval: 2 subjects of a class, and an interval over subjects needs at least 3",
    )
    assert told["accuracy"][1] == "4 subjects (t)"


def score_all(by, owners, truth, who, decisions):
    """Return the rows of all people together by their metric; trials of one owner have its label."""
    exchanged = keep_decisions(
        by, owners, truth, [np.arange(len(truth))], decisions, most=99, generator=np.random.default_rng(0)
    )
    task = CategoryTask(
        decisions=decisions, classes=("a", "b"), labels=np.array(["a", "b"], dtype=object)[truth[owners]],
        runs=who.astype(object), subjects=who.astype(object), protocol="toy", split="test", seed=0, n_bootstrap=50,
        n_permutations=50, exchanged=exchanged,
    )  # fmt: skip
    rows = compute_category_scores(task)[0]
    return {row.metric: row for row in rows if (row.subject, row.method) == ("all", "decoded")}


def test_families_of_several_people_are_exchanged_as_wholes():
    """The owner of a label is the family: two people each, so that the row over all people has 6 owners, not 12."""
    truth, who = np.array([0, 0, 0, 1, 1, 1]), np.repeat(np.arange(12), 3)
    decisions = np.eye(2)[truth[who // 2]] + 0.01 * np.random.default_rng(0).random((36, 2))
    rows = score_all("group", who // 2, truth, who, decisions)
    assert set(rows) == {"accuracy", "balanced_accuracy", "auc"}
    for row in rows.values():
        assert (row.value, row.p_value) == (1.0, pytest.approx(1 / 20))
        assert "whole groups" in row.protocol


def test_a_test_of_one_class_has_no_area_and_no_small_p():
    decisions = np.eye(2)[np.repeat([1, 1, 0, 1], 3)]
    who, truth = np.repeat(np.arange(4), 3), np.ones(4, int)
    rows = score_all("subject", who, truth, who, decisions)
    assert set(rows) == {"accuracy", "balanced_accuracy"}
    assert rows["accuracy"].p_value == 1
    assert "no p below 1" in rows["accuracy"].protocol


def test_people_without_an_effect_are_rarely_told_apart():
    """At most .05 of 200 groups of eight people, and three binomial standard deviations: complements tie, so fewer."""
    truth, found = np.array([0, 0, 0, 0, 1, 1, 1, 1]), []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(8, 1, 5)) + rng.normal(
            size=(8, 3, 5)
        )  # three trials of each, alike by the person
        exchange = make(truth)
        labels, means = exchange.labels, X.mean(axis=1)
        hits = np.zeros(labels.shape)
        for person in range(8):  # the nearest class mean of the others, for all label sets at once
            rest = np.arange(8) != person
            sets = labels[:, rest]
            high = sets @ means[rest] / sets.sum(axis=1, keepdims=True)
            low = (1 - sets) @ means[rest] / (1 - sets).sum(axis=1, keepdims=True)
            margin = (high - low) @ X[person].T - ((high**2).sum(axis=1) - (low**2).sum(axis=1))[:, None] / 2
            hits[:, person] = ((margin > 0) == labels[:, [person]]).mean(axis=1)
        p, chance, _ = exchange.test(hits.mean(axis=1))
        found.append((p, chance))
    rates, chances = np.array(found).T
    assert (rates <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert rates.min() >= 2 / 70 - 1e-9
    assert chances.mean() < 0.49  # who is left out leaves more of the other class


@pytest.mark.parametrize(
    ("refits", "fits_each", "most", "n_sets", "is_complete"),
    [
        # 252 ways to choose five of ten, and their complements: 126 that differ once decoders are fitted again.
        (True, 1, 999, 126, True),
        (True, MOST_FITS // 126, 999, 126, True),
        (True, MOST_FITS // 125, 999, 126, False),  # 125 draws are affordable
        (True, 10**9, 999, FEWEST_DRAWS + 1, False),
        (True, 1, 60, 61, False),
        (False, 10**9, 999, 252, True),  # no fit, no cost
    ],
)
def test_so_many_labels_are_exchanged_as_their_fits_allow(refits, fits_each, most, n_sets, is_complete):
    truth = np.repeat([0, 1], 5)
    found = make_exchange(
        truth,
        [np.arange(10)],
        refits=refits,
        fits_each=fits_each,
        most=most,
        generator=np.random.default_rng(0),
    )
    assert (len(found.labels), found.is_complete) == (n_sets, is_complete)
    np.testing.assert_array_equal(found.labels[0], truth)


@pytest.mark.parametrize(("fits_each", "is_complete"), [(0, True), (1, True), (2, False)])
def test_cheap_fits_allow_all_exchanges_of_sixteen_owners(fits_each, is_complete):
    """There are 11,440 ways to choose seven of sixteen: so many fits are affordable, but not twice as many."""
    truth = (np.arange(16) < 7).astype(int)
    found = make_exchange(
        truth,
        [np.arange(16)],
        refits=True,
        fits_each=fits_each,
        most=50_000,
        generator=np.random.default_rng(0),
    )
    assert found.is_complete == is_complete


def test_subjects_of_several_owners_are_pooled_by_the_mean_of_their_scores_and_of_their_chance():
    """Two subjects of six groups each; a subject has no area, since it is measured over all owners.

    Of all 225 ways to exchange labels the observed one is part of chance, and not of the null (`_measure_owned` of one
    subject, `_measure_all_owned` of both).
    """
    truth, groups = np.array([0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]), np.repeat(np.arange(12), 3)
    who = np.array(["p", "q"], dtype=object)[groups // 6]
    decisions = np.eye(2)[truth[groups]] + 2 * np.random.default_rng(0).random((36, 2))
    decisions[:, 1] += 0.3  # one class is named more often than the other
    exchanged = keep_decisions(
        "group",
        groups,
        truth,
        [np.arange(6), np.arange(6, 12)],
        decisions,
        most=999,
        generator=np.random.default_rng(0),
    )
    task = CategoryTask(
        decisions=decisions, classes=("a", "b"), labels=np.array(["a", "b"], dtype=object)[truth[groups]],
        runs=groups.astype(object), subjects=who, protocol="toy", split="test", seed=0, n_bootstrap=50,
        n_permutations=50, exchanged=exchanged,
    )  # fmt: skip
    rows = {(s.metric, s.subject): s for s in compute_category_scores(task)[0] if s.method == "decoded"}
    assert set(rows) == {(m, s) for m in ("accuracy", "balanced_accuracy") for s in ("p", "q", "all")}
    for metric in ("accuracy", "balanced_accuracy"):
        own, pooled = [rows[metric, name] for name in "pq"], rows[metric, "all"]
        assert pooled.value == pytest.approx(np.mean([row.value for row in own]))
        assert pooled.chance == pytest.approx(np.mean([row.chance for row in own]))
    assert rows["accuracy", "p"].chance != pytest.approx(rows["accuracy", "q"].chance)
