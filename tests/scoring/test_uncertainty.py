"""Intervals cover, permutation tests hold their level, and both equal slow references."""

import itertools

import numpy as np
import pytest
from scipy import stats

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring import uncertainty as unc
from braindecode_vis.scoring.metrics import identification as tables
from tests import references


def _covered(n_covered, n_runs, level):
    """Say whether a coverage is within 4 standard deviations of what it should be (up to 2 points too low)."""
    sd = (level * (1 - level) / n_runs) ** 0.5
    return level - 0.02 - 4 * sd <= n_covered / n_runs <= level + 4 * sd


def test_bootstrap_equals_scipy():
    values = np.random.default_rng(0).exponential(size=80)
    for statistic, function in (("mean", np.mean), ("median", np.median)):
        ours = unc.bootstrap_interval(values, statistic=statistic, n_boot=20_000)
        theirs = stats.bootstrap(
            (values,), function, n_resamples=20_000, method="percentile", rng=1, batch=2000
        )
        # Both percentiles carry Monte-Carlo noise of about 1 % of the interval's width.
        bounds = theirs.confidence_interval
        width = bounds.high - bounds.low
        assert ours.low == pytest.approx(bounds.low, abs=0.06 * width)
        assert ours.high == pytest.approx(bounds.high, abs=0.06 * width)


def test_bootstrap_intervals_cover():
    rng = np.random.default_rng(1)
    hits = 0
    for run in range(400):
        interval = unc.bootstrap_interval(rng.standard_normal(100), n_boot=500, seed=run)
        hits += interval.low <= 0 <= interval.high
    assert _covered(hits, 400, 0.95)


def test_rows_of_one_stimulus_move_together():
    """Forty repetitions of one trial are one observation: ignoring it would shrink the interval by sqrt(40)."""
    rng = np.random.default_rng(2)
    hits, n_runs = 0, 300
    for run in range(n_runs):
        values = np.repeat(rng.standard_normal(60), 5) + 0.1 * rng.standard_normal(300)
        interval = unc.bootstrap_interval(values, clusters=np.repeat(np.arange(60), 5), n_boot=500, seed=run)
        hits += interval.low <= 0 <= interval.high
    assert _covered(hits, n_runs, 0.95)
    naive = unc.bootstrap_interval(values)
    assert interval.high - interval.low > 1.8 * (naive.high - naive.low)  # sqrt(5) = 2.2
    assert interval.n_units == 60


def test_unequal_clusters_and_their_median():
    values = np.array([1.0, 1, 1, 9, 5])
    clusters = ["a", "a", "a", "b", "c"]
    draws = list(itertools.product(range(3), repeat=3))
    rows = {0: [1, 1, 1], 1: [9], 2: [5]}
    for statistic in ("mean", "median"):
        exact = [getattr(np, statistic)(np.concatenate([rows[i] for i in draw])) for draw in draws]
        ours = unc._bootstrap_clusters(values, np.array([0, 0, 0, 1, 2]), statistic, 40_000, 0)
        # Five standard errors of 40 000 draws.
        assert abs(ours.mean() - np.mean(exact)) < 5 * np.std(exact) / 200
        assert set(np.round(ours, 9)) == set(np.round(exact, 9))
        assert unc.bootstrap_interval(values, clusters=clusters, statistic=statistic).n_units == 3


def test_permutation_p_equals_the_slow_reference():
    rng = np.random.default_rng(4)
    table = rng.standard_normal((20, 20)) + 0.35 * np.eye(20)
    slow = references.permutation_p(table, 3000, rng)
    fast = unc.permutation_test(table, n_permutations=30_000)
    # Five Monte-Carlo standard errors of 3000 shuffles.
    assert abs(fast.p_value - slow) < 5 * (slow * (1 - slow) / 3000) ** 0.5
    assert fast.observed == pytest.approx(np.diagonal(table).mean())
    assert fast.null_mean == pytest.approx(table.mean())
    assert abs(fast.null.mean() - fast.null_mean) < 5 * fast.null.std() / 30_000**0.5


def test_permutation_p_is_exact_for_small_samples():
    """Three items have six assignments; the perfect one has probability 1/6, never 0."""
    result = unc.permutation_test(np.eye(3), n_permutations=60_000)
    assert result.p_value == pytest.approx(1 / 6, abs=0.01)  # six standard errors
    assert unc.permutation_test(np.eye(12), n_permutations=999).p_value == 0.001
    assert unc.permutation_test(-np.eye(12), n_permutations=999, alternative="less").p_value == 0.001
    assert unc.permutation_test(-np.eye(12), n_permutations=999, alternative="two-sided").p_value == 0.001
    assert unc.permutation_test(np.ones((5, 5)), n_permutations=99).p_value == 1


@pytest.mark.parametrize(
    ("kind", "alternative"),
    [("pairs", "greater"), ("pairs", "two-sided"), ("two-way", "greater"), ("top-k", "greater")],
)
def test_false_positive_rate_is_nominal(kind, alternative):
    """No effect: p <= 0.05 in about 5 % of 400 data sets (fewer where a discrete score ties)."""
    rng = np.random.default_rng(5)
    n_false = 0
    for run in range(400):
        scores = rng.standard_normal((25, 25)) + rng.standard_normal(
            25
        )  # some items are similar to everything
        table = {
            "pairs": lambda s: s,
            "two-way": lambda s: tables.make_identification_table(s, 2),
            "top-k": lambda s: tables.make_top_k_table(s, 5),
        }[kind](scores)
        n_false += (
            unc.permutation_test(table, n_permutations=199, alternative=alternative, seed=run).p_value <= 0.05
        )
    sd = (0.05 * 0.95 / 400) ** 0.5
    assert n_false / 400 < 0.05 + 3 * sd
    if kind != "top-k":
        assert n_false / 400 > 0.05 - 3.5 * sd


def test_tables_equal_the_scores_they_permute():
    rng = np.random.default_rng(6)
    scores = rng.integers(0, 6, (9, 9)).astype(np.float32)
    labels = np.arange(9) % 3
    diagonal = np.diagonal(tables.make_identification_table(scores, 2))
    others = ~np.eye(9, dtype=bool)
    np.testing.assert_allclose(diagonal, references.n_way(scores, 2, others))
    within = np.diagonal(tables.make_identification_table(scores, 2, groups=labels))
    same = labels[:, None] == labels[None]
    np.testing.assert_allclose(within, references.n_way(scores, 2, others & same))
    own = np.diagonal(scores)[:, None]
    above, tied = (scores > own).sum(axis=1), (scores == own).sum(axis=1) - 1
    np.testing.assert_array_equal(np.diagonal(tables.make_rank_table(scores)), 1 + above + tied / 2)
    np.testing.assert_array_equal(np.diagonal(tables.make_top_k_table(scores, 3)), above + tied < 3)
    with pytest.raises(DataError, match="no distractor"):
        tables.make_identification_table(scores, 2, groups=[0, 0, 0, 0, 0, 0, 0, 0, 1])


def test_permuting_within_groups_ignores_what_the_group_tells():
    """Predictions that know the class only are significant overall and never within the class."""
    labels = np.repeat([0, 1], 10)
    table = (labels[:, None] == labels[None]).astype(float)
    assert unc.permutation_test(table, n_permutations=999).p_value == 0.001
    within = unc.permutation_test(table, groups=labels, n_permutations=999)
    assert within.p_value == 1
    assert within.null_mean == within.observed == 1


def test_rows_of_one_stimulus_are_permuted_together_among_shown_stimuli():
    rng = np.random.default_rng(7)
    truth = np.array([4, 4, 1, 1, 6])
    table = rng.standard_normal((5, 8))
    result = unc.permutation_test(table, truth=truth, n_permutations=5000)
    exact = {
        round(float(np.mean([table[r, dict(zip((1, 4, 6), p, strict=True))[truth[r]]] for r in range(5)])), 9)
        for p in itertools.permutations((1, 4, 6))
    }
    assert set(np.round(result.null, 9)) == exact
    with pytest.raises(DataError, match="one of 8 columns"):
        unc.permutation_test(table, truth=truth + 2)
    with pytest.raises(DataError, match="one of 3 columns"):
        unc.permutation_test(np.ones((5, 3)))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_galleries_are_permuted_apart_and_judged_together(statistic):
    rng = np.random.default_rng(9)
    parts = [rng.standard_normal((4, 3)), rng.standard_normal((3, 3))]
    truths = [np.array([0, 1, 2, 2]), np.array([2, 0, 1])]
    found = unc.permutation_test_folds(parts, truths, statistic=statistic, n_permutations=20_000)
    compute = {"mean": np.mean, "median": np.median}[statistic]
    values = [
        compute(
            [t[r, p[c]] for t, own, p in zip(parts, truths, pair, strict=True) for r, c in enumerate(own)]
        )
        for pair in itertools.product(itertools.permutations(range(3)), repeat=2)
    ]
    assert found.observed == pytest.approx(values[0])  # the identity comes first
    expected = np.mean(
        np.array(values) >= values[0] * (1 - unc.TIE_TOLERANCE)
    )  # what rounding sets apart is equal
    assert found.p_value == pytest.approx(expected, abs=6 * (0.25 / 20_000) ** 0.5)
    assert set(np.round(found.null, 9)) == set(np.round(values, 9))
    if statistic == "mean":
        assert found.null_mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_many_rows_of_few_stimuli_keep_the_level(statistic):
    """Rows of one stimulus share its noise: permuting rows would call it an effect, permuting stimuli must not."""
    rng = np.random.default_rng(10)
    truth, n_false = np.repeat(np.arange(8), 12), 0
    for run in range(300):
        scores = rng.standard_normal((8, 8))[truth] + 0.1 * rng.standard_normal((96, 8))
        ranks = tables.make_rank_table(scores)
        result = unc.permutation_test(
            ranks, truth=truth, statistic=statistic, alternative="less", n_permutations=199, seed=run
        )
        n_false += result.p_value <= 0.05
    assert n_false / 300 < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_results_depend_on_the_seed_alone():
    values = np.random.default_rng(10).random(30)
    assert unc.bootstrap_interval(values, seed=1) == unc.bootstrap_interval(values, seed=1)
    assert unc.bootstrap_interval(values, seed=1) != unc.bootstrap_interval(values, seed=2)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="item 1"):
        unc.bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="at least two"):
        unc.bootstrap_interval(np.array([1.0]))
    with pytest.raises(DataError, match="one value per item"):
        unc.bootstrap_interval(np.ones((2, 2)))
    with pytest.raises(DataError, match="3 items came with 2 cluster labels"):
        unc.bootstrap_interval(np.ones(3), clusters=["a", "b"])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        unc.bootstrap_interval(np.ones(3), level=95.0)
    with pytest.raises(ConfigError, match="at least 1"):
        unc.bootstrap_interval(np.ones(3), n_boot=0)
    with pytest.raises(DataError, match="3 hits out of 2"):
        unc.wilson_interval(3, 2)


@pytest.mark.parametrize("n", [1, 7, 40, 500])
def test_wilson_equals_its_formula(n):
    z = stats.norm.ppf(0.975)
    for hits in {0, 1, n // 2, n - 1, n}:
        p = hits / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        found = unc.wilson_interval(hits, n)
        assert (found.low, found.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
        assert (found.low, found.high) == pytest.approx(
            stats.binomtest(hits, n).proportion_ci(method="wilson")
        )
    assert unc.wilson_interval(0, n).low == 0
    assert unc.wilson_interval(n, n).high == 1


@pytest.mark.parametrize("mean", [0.0, 0.003, 0.5, 0.997, 1.0])
def test_limits_of_a_proportion_hold_it(mean):
    """Half a hit and half a miss moved the middle of 0.997 so far that the upper limit was 0.989."""
    low, high = unc.logit_limits(mean, 0.001, 40)
    assert 0 <= low <= mean <= high <= 1


def test_a_p_value_counts_what_is_as_extreme():
    null = np.array([0.1, 0.3, 0.3, 0.6])
    assert unc.compute_p_value(0.3, null) == 4 / 5
    assert unc.compute_p_value(0.3, null, alternative="less") == 4 / 5
    assert unc.compute_p_value(0.6, null, alternative="two-sided", centre=0.3) == 2 / 5
    # The same sum in another order is no other value, and one further away is.
    assert (
        unc.compute_p_value(0.1 + 0.2, np.array([0.3]))
        == unc.compute_p_value(0.3, np.array([0.1 + 0.2]))
        == 1
    )
    assert unc.compute_p_value(0.3 + 1e-6, np.array([0.3])) == 1 / 2
    columns = np.stack([null, null[::-1] * 2], axis=1)
    expected = [unc.compute_p_value(v, columns[:, c]) for c, v in enumerate((0.6, 0.6))]
    np.testing.assert_array_equal(unc.compute_p_value(np.array([0.6, 0.6]), columns), expected)


def test_the_maximum_bounds_any_false_claim():
    rng = np.random.default_rng(1)
    shared = 0.7  # correlated tests, as time points are
    claims = 0
    for _ in range(400):
        common, own = rng.standard_normal((200, 1)), rng.standard_normal((200, 8))
        draw = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
        claims += unc.compute_p_value(draw[0], draw[1:].max(axis=1)).min() <= 0.05
    # 400 runs at 5 %: four standard errors are 0.044.
    assert 0.01 < claims / 400 < 0.05 + 0.044


def test_permutations_stay_within_their_block():
    labels, blocks = np.array(list("aabbb")), [np.array([0, 2, 4]), np.array([1, 3])]
    found = unc.permute_within(labels, blocks, 50, np.random.default_rng(0))
    for block in blocks:
        assert (np.sort(found[:, block], axis=1) == np.sort(labels[block])).all()
    assert len({"".join(row) for row in found}) > 4


def test_holm_equals_the_definition_test_by_test():
    p = np.random.default_rng(0).uniform(0, 0.2, 9)
    found = unc.correct_holm(p)
    for i in range(9):
        smaller = [j for j in range(9) if p[j] <= p[i]]
        expected = max(min(1, p[j] * sum(p[k] >= p[j] for k in range(9))) for j in smaller)
        assert found[i] == pytest.approx(expected)
    assert (found >= p).all()
    for wrong in (np.array([0.1, 1.2]), np.array([0.1, np.nan]), np.zeros((2, 2))):
        with pytest.raises(DataError, match="between 0 and 1"):
            unc.correct_holm(wrong)


def test_numbers_do_not_depend_on_draws_that_were_kept(monkeypatch):
    """Draws are kept for the next metric; a limit of none, a new process and a filled store give the same numbers."""
    rng = np.random.default_rng(5)
    table, other, values = rng.normal(size=(40, 20)), rng.normal(size=(40, 20)), rng.normal(size=40)
    truth, stimuli = np.repeat(np.arange(20), 2), np.repeat(np.arange(20), 2)

    def measure():
        nulls = [
            unc.permutation_test(one, truth=truth, groups=groups, n_permutations=500, seed=3).null
            for one in (table, other)
            for groups in (None, np.arange(20) % 2)
        ]
        intervals = [
            unc.bootstrap_interval(values, clusters=clusters, statistic=statistic, n_boot=500, seed=3)
            for clusters in (stimuli, None)
            for statistic in ("mean", "median")
        ]
        return np.concatenate(nulls), [(interval.low, interval.high) for interval in intervals]

    unc._kept.clear()
    first, second = measure(), measure()
    assert len(unc._kept) == 4  # permutations with and without classes, resamples of 20 and of 40 units
    monkeypatch.setattr(unc, "MOST_KEPT", 0)
    never = measure()
    monkeypatch.setattr(unc, "MOST_KEPT", 15_000)  # room for one or two at a time
    seldom = measure()
    for found in (second, never, seldom):
        np.testing.assert_array_equal(found[0], first[0])
        assert found[1] == first[1]
    assert sum(drawn.nbytes for draws in unc._kept.values() for drawn in draws) <= 15_000


def test_the_best_of_many_is_compared_with_the_best_of_each_draw():
    """Each against its own sets called something better in .30 of ablations without any effect."""
    observed, null = (
        np.array([5.0, 3, 9]),
        np.array([[3.0, 2, 6], [4, 4, 7], [2, 3, 8], [5, 1, 5]]),
    )
    rows = np.concatenate([observed[None], null])
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    np.testing.assert_allclose(z[0], [1.028992, 0.392232, 1.414214], atol=5e-7)  # six digits are given
    np.testing.assert_allclose(unc.correct_maximum(observed, null), [0.6, 0.8, 0.2])
    np.testing.assert_allclose(unc.correct_maximum(-observed, -null, alternative="less"), [0.6, 0.8, 0.2])
    # A test that never varies is beaten by everybody, and beats nobody.
    constant = np.column_stack([null, np.full(4, 1 / 3)])
    np.testing.assert_allclose(unc.correct_maximum(np.array([5, 3, 9, 1 / 3]), constant), [0.6, 0.8, 0.2, 1])
    # Two-sided: far below counts as far above.
    low = unc.correct_maximum(np.array([-50.0, 0, 0]), null - null.mean(axis=0), alternative="two-sided")
    assert low[0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("n", "value", "low", "high"), [(2, 0.833333, 0.044456, 0.998142), (3, 0.666667, 0.005747, 0.998557)]
)
def test_the_jackknife_interval_of_the_worked_example(n, value, low, high):
    scores = np.array(
        [[0.9, 0.2, 0.4, 0.1], [0.3, 0.5, 0.6, 0.2], [0.1, 0.4, 0.7, 0.3], [0.2, 0.5, 0.1, 0.4]]
    )
    own = np.diagonal(tables.make_identification_table(scores, n)).mean()
    left_out = tables.leave_out_images([scores], [np.arange(4)], [list("abcd")], n)
    found = unc.jackknife_interval(own, left_out)
    assert own == pytest.approx(value, abs=5e-7)  # six decimals are given
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-7)


def test_the_jackknife_at_the_ends_and_where_it_knows_nothing():
    """No hit and no miss have the exact bound of n items; two images have no interval, one for all no width."""
    ones = unc.jackknife_interval(1.0, np.ones(20))
    assert (ones.low, ones.high) == pytest.approx((0.025 ** (1 / 20), 1.0))
    none = unc.jackknife_interval(0.0, np.zeros(20))
    assert (none.low, none.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    wide = unc.jackknife_interval(1.0, np.ones(20), widen=unc.FOLD_FACTOR)
    assert wide.low == pytest.approx(0.025 ** (2 / 20))  # as of half as many images
    assert unc.jackknife_interval(0.5, np.array([0.0, 1.0])) is None
    same = tables.leave_out_images([np.tile(np.arange(6.0), (6, 1))], [np.arange(6)], [list("abcdef")], 2)
    flat = unc.jackknife_interval(0.5, same)
    assert (flat.low, flat.high) == pytest.approx((0.5, 0.5))
    assert unc.jackknife_interval(0.5, np.array([0.5, np.nan, 0.4])) is None


def test_what_is_wider_after_folds():
    """The interval about its value, the jackknife by its standard error, the null about its mean."""
    left_out = np.random.default_rng(0).normal(0.7, 0.01, 30)
    narrow, wide = (unc.jackknife_interval(0.7, left_out, widen=w) for w in (1.0, unc.FOLD_FACTOR))
    logits = [stats.logistic.ppf([found.low, found.high]) for found in (narrow, wide)]
    assert np.ptp(logits[1]) == pytest.approx(2**0.5 * np.ptp(logits[0]))
    low, high = unc.widen_limits(np.array([0.1, 0.0]), np.array([0.4, 0.4]), np.array([0.2, 0.1]), (0.0, 1.0))
    assert (low[0], high[0]) == pytest.approx((0.2 - 2**0.5 * 0.1, 0.2 + 2**0.5 * 0.2))
    assert low[1] == 0
    plain = unc.permutation_test(np.random.default_rng(1).random((9, 9)), n_permutations=500)
    widened = unc.widen_null(plain)
    expected = (1 + (plain.null_mean + 2**0.5 * (plain.null - plain.null_mean) >= plain.observed).sum()) / 501
    assert widened.p_value == pytest.approx(expected)
    np.testing.assert_array_equal(widened.null, plain.null)


def test_a_widened_null_keeps_the_level_after_two_folds():
    """Noise of two folds whose scores are one number twice, as those of a linear decoder are: .12 becomes .05.

    400 runs: the standard error of .05 is .011.
    """
    rng = np.random.default_rng(4)
    plain, wide = [], []
    for seed in range(400):
        fold = rng.normal(size=(8, 8))
        found = unc.permutation_test_folds([fold, fold.T], [np.arange(8)] * 2, n_permutations=199, seed=seed)
        plain.append(found.p_value)
        wide.append(unc.widen_null(found).p_value)
    assert np.mean(np.array(plain) <= 0.05) > 0.085
    assert 0.02 < np.mean(np.array(wide) <= 0.05) < 0.08


@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_a_wider_null_keeps_its_side(alternative):
    """Ranks are better where they are low, after folds too."""
    table = 1.0 + 9 * (1 - np.eye(10)) if alternative == "less" else np.eye(10)
    found = unc.permutation_test(table, alternative=alternative, n_permutations=199)
    assert found.p_value == unc.widen_null(found).p_value == 0.005
    worst = unc.permutation_test(1 - table, alternative=alternative, n_permutations=199)
    assert unc.widen_null(worst).p_value > 0.5


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("kind", ["one class", "classes", "some shown, two rows each"])
def test_a_null_of_small_blocks_is_moved_to_the_mean_of_all_permutations(size, kind):
    """Blocks of two left half of the images beside themselves: chance was half-way to the score.

    Every stimulus is .6 beside its own prediction and .2 beside any other, so that the estimate has no error.
    """
    n = 40
    truth = np.repeat(np.flatnonzero(np.arange(n) % 3), 2) if "shown" in kind else np.arange(n)
    table = np.where(truth[:, None] == np.arange(n), 0.6, 0.2)
    classes = np.arange(n) // 20 if kind == "classes" else None
    blocks = np.arange(n) // size
    whole = unc.permutation_test(table, truth=truth, groups=classes, n_permutations=500)
    parted = unc.permutation_test(table, truth=truth, groups=blocks, n_permutations=500)
    moved = unc.move_null(
        parted, np.where(blocks[truth][:, None] == blocks, table, 9.0), truth, blocks, classes
    )
    assert moved.null_mean == pytest.approx(whole.null_mean)
    assert moved.p_value == parted.p_value
    assert moved.null_low - parted.null_low == pytest.approx(moved.null_mean - parted.null_mean)
