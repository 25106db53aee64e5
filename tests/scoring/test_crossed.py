"""Crossed intervals and p-values equal worked examples and slow references, and speak of what they say."""

import numpy as np
import pytest
from scipy import stats

from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring import crossed

HITS = np.array([[1, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0]])
VALUES = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.3, 0.5], [0.0, 0.3, 0.4, 0.3]])
DIFFERENCES = np.array([[0.3, 0.1, -0.1, 0.4], [0.2, 0.3, 0.1, 0.2], [0.1, 0.2, -0.2, 0.5]])
RANKS = np.array([[1, 5, 2, 9], [3, 6, 2, 7], [4, 8, 1, 10]])
SIX = 6e-7  # the examples are printed with six digits


def own_images(table, n_shared):
    """Return the table in which all subjects saw the first images and the others are each subject's own."""
    n_subjects, n_images = table.shape
    wide = np.full((n_subjects, n_shared + n_subjects * (n_images - n_shared)), np.nan)
    wide[:, :n_shared] = table[:, :n_shared]
    for subject in range(n_subjects):
        start = n_shared + subject * (n_images - n_shared)
        wide[subject, start : start + n_images - n_shared] = table[subject, n_shared:]
    return wide


def make_cube():
    s, k, i = np.meshgrid(np.arange(3), np.arange(3), np.arange(4), indexing="ij")
    return (s + 2 * k + 3 * i + s * k * i) / 10


def slow_half_width(table, level=0.95):
    """The formula of topic 1, cell by cell."""
    n_subjects, n_images = table.shape
    m = table.mean()
    a = sum((table[s].mean() - m) ** 2 for s in range(n_subjects)) / (n_subjects - 1) / n_subjects
    b = sum((table[:, i].mean() - m) ** 2 for i in range(n_images)) / (n_images - 1) / n_images
    e = sum(
        (table[s, i] - table[s].mean() - table[:, i].mean() + m) ** 2
        for s in range(n_subjects) for i in range(n_images)
    ) / ((n_subjects - 1) * (n_images - 1)) / (n_subjects * n_images)  # fmt: skip
    t = {df: stats.t.ppf(0.5 + level / 2, df) ** 2 for df in (n_subjects - 1, n_images - 1)}
    both = stats.t.ppf(0.5 + level / 2, (n_subjects - 1) * (n_images - 1)) ** 2
    rows, columns = t[n_subjects - 1] * a, t[n_images - 1] * b
    return max(rows, columns, rows + columns - both * e) ** 0.5


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: crossed.crossed_interval(HITS, proportion=True).value, 0.583333),
        (lambda: crossed.crossed_interval(HITS).half_width, 0.690642),
        (lambda: crossed.crossed_interval(HITS, proportion=True).low, 0.074510),
        (lambda: crossed.crossed_interval(HITS, proportion=True).high, 0.958501),
        (lambda: crossed.crossed_interval(VALUES).half_width, 0.243810),
        (lambda: crossed.crossed_interval(own_images(VALUES, 2)).half_width, 0.648330),
        (lambda: crossed.crossed_interval(RANKS, statistic="median").value, 4.5),
        (lambda: crossed.crossed_interval(RANKS, statistic="median").half_width, 0.918693),
        (lambda: crossed.crossed_interval(RANKS, statistic="median").low, 1),
        (lambda: crossed.crossed_interval(RANKS, statistic="median").high, 10),
        (lambda: crossed.crossed_interval(make_cube()).value, 0.9),
        (lambda: crossed.crossed_interval(make_cube()).half_width, 1.340041),
        (lambda: crossed.crossed_interval(make_cube().mean(axis=1)).half_width, 1.025946),
        (lambda: crossed.image_signs_p(DIFFERENCES), 0.25),
        (lambda: crossed.subject_signs_p(DIFFERENCES), 0.25),
        (lambda: crossed.crossed_interval(DIFFERENCES).value, 0.175),
        (lambda: crossed.crossed_interval(DIFFERENCES).half_width, 0.285223),
        (lambda: crossed.crossed_p(DIFFERENCES), 0.145901),
    ],
)
def test_worked_examples_to_six_digits(found, expected):
    assert found() == pytest.approx(expected, abs=SIX)


def test_the_parts_of_the_examples():
    hits, cube = crossed._find_spread(HITS, "subject", "image"), make_cube()
    assert [variance for variance, _ in hits.terms] == pytest.approx([0.006944, 0.043981], abs=SIX)
    assert hits.residual == pytest.approx(0.016204, abs=SIX)
    mixed = crossed._find_spread(own_images(VALUES, 2), "subject", "image")
    assert (mixed.terms[1][0], mixed.residual) == pytest.approx((0.0025, 0.000208), abs=SIX)
    of_cube = crossed._find_spread(cube, "subject", "image")
    assert [variance for variance, _ in of_cube.terms] == pytest.approx(
        [0.020833, 0.066667, 0.040833], abs=SIX
    )
    assert of_cube.residual == pytest.approx(0.001389 + 0.0025 + 0.001389, abs=2 * SIX)


def test_signs_of_images_belong_to_columns():
    """Of a table with as many subjects as images nobody sees which of the two changes sign; here it has more images."""
    table = np.array([[1.0, 2, np.nan, 4], [3, 1, 2, 0]])
    np.testing.assert_allclose(
        crossed.sum_images(table), [1 / 6 + 3 / 8, 2 / 6 + 1 / 8, 2 / 8, 4 / 6], rtol=1e-12
    )
    # Two subjects that agree: their signs alone cannot tell more than 1/2, those of six images can.
    alike = np.tile([1.0, 2, 3, 4, 5, 6], (2, 1))
    assert crossed.image_signs_p(alike) == 2 / 64
    assert crossed.subject_signs_p(alike) == 0.5


def test_the_half_width_equals_the_formula_cell_by_cell():
    rng = np.random.default_rng(0)
    for n_subjects, n_images, level in ((3, 5, 0.95), (8, 40, 0.9), (20, 7, 0.99)):
        table = rng.standard_normal((n_subjects, 1)) + rng.standard_normal((n_subjects, n_images))
        slow = slow_half_width(table, level)
        found = crossed.crossed_interval(table, level=level).half_width
        assert found == pytest.approx(slow, rel=1e-9)  # rounding


def test_p_is_the_level_whose_interval_touches_zero():
    rng = np.random.default_rng(1)
    for table in (
        rng.normal(0.2, 1, (5, 30)),
        own_images(rng.normal(0.3, 1, (4, 20)), 8),
        rng.normal(0.1, 1, (4, 3, 9)),
    ):
        p = crossed.crossed_p(table)
        found = crossed.crossed_interval(table, level=1 - p)
        assert min(abs(found.low), abs(found.high)) < 1e-8  # bisection stops at 1e-12 of log alpha
    assert crossed.crossed_p(np.zeros((4, 5))) == 1.0
    assert crossed.crossed_p(-table) == pytest.approx(p)
    assert crossed.crossed_p(1e6 + table) < 1e-6


def test_order_does_not_matter():
    rng = np.random.default_rng(2)
    table = own_images(rng.standard_normal((5, 12)), 7)
    again = table[rng.permutation(5)][:, rng.permutation(table.shape[1])]
    found = [crossed.crossed_interval(one).half_width for one in (again, table)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert crossed.crossed_p(again) == pytest.approx(crossed.crossed_p(table), rel=1e-6)


def test_images_of_ones_own_leave_the_spread_of_subjects_alone():
    table = np.random.default_rng(3).standard_normal((6, 10))
    found = crossed.crossed_interval(own_images(table, 0))
    means = table.mean(axis=1)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 5) * means.std(ddof=1) / 6**0.5)
    assert found.resampled == "6 subjects, each with its own images (crossed)"


def test_a_pattern_with_gaps_comes_near_the_full_table():
    table = np.random.default_rng(4).standard_normal((8, 60)) + np.random.default_rng(5).standard_normal(60)
    gaps = table.copy()
    gaps[0, 3] = np.nan
    full, found = crossed.crossed_interval(table), crossed.crossed_interval(gaps)
    assert found.resampled == "8 subjects and 60 images, each seen by some (crossed)"
    assert found.half_width == pytest.approx(full.half_width, rel=0.02)  # one cell of 480
    # Of a table without gaps it is the formula itself.
    assert crossed._find_spread_of_gaps(table, "subject", "image").half_width(0.05) == pytest.approx(
        full.half_width
    )


def test_intervals_of_a_pattern_with_gaps_cover():
    rng, hits = np.random.default_rng(12), 0
    for _ in range(300):
        table = rng.normal(0, 0.2, (6, 1)) + rng.normal(0, 0.7, (1, 60)) + rng.normal(0, 1, (6, 60))
        table[rng.random((6, 60)) > 0.5] = np.nan
        found = crossed.crossed_interval(table[:, np.isfinite(table).any(axis=0)])
        hits += found.low <= 0 <= found.high
    # 1000 draws a cell gave .93 to .985; three standard errors of 300.
    assert hits / 300 >= 0.93 - 3 * 0.0147


def test_signs_drawn_agree_with_all_signs():
    sums = np.random.default_rng(6).normal(0.3, 1, 12)
    every, drawn = crossed.signs_p(sums, n_draws=4096), crossed.signs_p(sums, n_draws=4095, seed=1)
    assert drawn == pytest.approx(every, abs=4 * (every * (1 - every) / 4095) ** 0.5)  # 4 standard errors
    assert crossed.signs_p(np.ones(7)) == 2 / 2**7


def test_rows_become_cells_whose_mean_is_the_score():
    values = np.array([1.0, 0, 0, 1, 1, 0, 1])
    subjects, images = list("aaabbbb"), list("xxyxyyz")
    table = crossed.tabulate_cells(values, subjects, images)
    assert np.nanmean(table, axis=1) == pytest.approx([1 / 3, 3 / 4])
    assert np.isnan(table[0, 2])
    assert crossed.tabulate_cells(np.arange(4.0), list("bbaa"), list("xyxy")).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("table", "row", "words"),
    [
        (HITS[:1], "subject", "no interval: 1 subject, and an interval over subjects needs at least 3"),
        (HITS[:2], "subject", "no interval: 2 subjects, and an interval over subjects needs at least 3"),
        (HITS[:2], "seed", "no interval: 2 seeds, and an interval over seeds needs at least 3"),
        (make_cube()[:, :2], "subject", "no interval: 2 seeds, and an interval over seeds needs at least 3"),
        (HITS[:, :1], "subject", "no interval: one image, and an interval over images needs at least 2"),
        (np.zeros((5, 20)), "subject", "no interval: all values are equal"),
        (np.ones((5, 20)), "subject", "no interval: all values are equal"),
    ],
)
def test_what_has_no_interval_says_why(table, row, words):
    found = crossed.crossed_interval(table, row=row, proportion=True)
    assert (found.low, found.high, found.half_width, found.resampled) == (None, None, None, words)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: crossed.crossed_p(HITS[:2]), "there is no crossed p: 2 subjects, and"),
        (lambda: crossed.crossed_p(HITS[:, :1]), "there is no crossed p: one image"),
        (lambda: crossed.crossed_p(np.ones((4, 4))), "there is no crossed p: all values are equal"),
        (
            lambda: crossed.crossed_interval(np.zeros(4)),
            r"needs a table of subjects by images, got the shape \(4,\)",
        ),
        (lambda: crossed.crossed_interval(np.array([[0, np.inf]] * 3)), "holds a value that is not finite"),
        (
            lambda: crossed.crossed_interval(np.array([[0, 1], [np.nan] * 2])),
            "row 1 of a table .* holds no value",
        ),
        (
            lambda: crossed.tabulate_cells(np.zeros(3), "ab", "abc"),
            "3 values came with 2 subjects and 3 images",
        ),
        (lambda: crossed.groups_interval(np.array([np.nan]), "a"), "one finite value per row"),
    ],
)
def test_what_cannot_be_computed_is_one_sentence(call, sentence):
    with pytest.raises(DataError, match=sentence):
        call()


def test_limits_of_hits_stay_between_0_and_1():
    rng = np.random.default_rng(7)
    for rate in (0.01, 0.08, 0.5, 0.93):
        for n_images in (15, 200):
            hits = rng.random((4, n_images)) < rate
            found = crossed.crossed_interval(hits, proportion=True)
            if found.low is not None:
                assert 0 <= found.low <= found.value <= found.high <= 1
                few = min(n_images, hits.sum(), (~hits).sum()) <= 20
                assert found.resampled.endswith("(crossed, logit)" if few else "(crossed)")


def test_groups_have_t_limits():
    values, groups = np.arange(12.0), np.repeat(list("abcd"), 3)
    found = crossed.groups_interval(values, groups)
    means = values.reshape(4, 3).mean(axis=1)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 3) * means.std(ddof=1) / 2)
    two = crossed.groups_interval(values[:6], groups[:6], unit="run")
    assert (two.low, two.resampled) == (
        None,
        "no interval: 2 runs, and an interval over runs needs at least 3",
    )


def test_who_saw_an_image_is_no_spread_of_values():
    """Of two subjects an image that both saw weighs twice; adding a constant must change no width."""
    table = own_images(VALUES[:2], 2)
    found, moved = crossed.images_interval(table), crossed.images_interval(table + 5)
    assert moved.half_width == pytest.approx(found.half_width, rel=1e-9)  # rounding
    # By hand: of six images, the two shared ones move both means by a quarter of their deviation.
    deviations = VALUES[:2] - VALUES[:2].mean(axis=1, keepdims=True)
    effects = np.r_[deviations[:, :2].sum(axis=0), deviations[0, 2:], deviations[1, 2:]] / 8
    half = stats.t.ppf(0.975, 5) * (6 / 5 * (effects**2).sum()) ** 0.5
    assert found.half_width == pytest.approx(half, rel=1e-9)


def test_shares_of_subjects_stay_between_0_and_1():
    hits = np.repeat([1.0, 1, 1, 1, 0, 1], 4)
    rows = {"subjects": np.repeat(list("abcdef"), 4), "unit": "subject"}
    found, free = (
        crossed.interval_of_rows(hits, proportion=True, **rows),
        crossed.interval_of_rows(hits, **rows),
    )
    half = stats.t.ppf(0.975, 5) * np.std([1, 1, 1, 1, 0, 1], ddof=1) / 6**0.5
    assert (free.low, free.high) == pytest.approx((5 / 6 - half, 5 / 6 + half), rel=1e-9)
    assert (found.low, found.high, found.resampled) == (free.low, 1.0, "6 subjects (t)")


def test_paired_difference_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(8)
    base = rng.standard_normal(100)
    first, second = base + 0.1 + 0.05 * rng.standard_normal(100), base
    result = crossed.paired_difference(first, second, clusters=np.repeat(np.arange(50), 2))
    assert result.interval.low > 0
    assert result.p_value < 0.001
    assert result.mean == pytest.approx((first - second).mean())
    nothing = crossed.paired_difference(base, base)
    assert (nothing.mean, nothing.p_value) == (0, 1)


def test_paired_p_is_nominal():
    rng = np.random.default_rng(9)
    p = [crossed.paired_difference(*rng.random((2, 30)), n_boot=199, seed=i).p_value for i in range(300)]
    # 4 standard deviations of a binomial around 5 %.
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 4 * (0.05 * 0.95 / 300) ** 0.5


def test_paired_differences_speak_of_whom_they_are_asked_for():
    rng = np.random.default_rng(11)
    rows = {"clusters": np.tile([f"i{n:02d}" for n in range(40)], 6), "subjects": np.repeat(np.arange(6), 40)}
    first = rng.normal(0.3, 1, 240)
    second = np.zeros(240)
    both = crossed.paired_difference(first, second, **rows)
    table = first.reshape(6, 40)
    assert both.mean == pytest.approx(first.mean())
    assert both.p_value == pytest.approx(crossed.crossed_p(table))
    assert both.interval.half_width == pytest.approx(crossed.crossed_interval(table).half_width)
    images = crossed.paired_difference(first, second, **rows, population="images", seed=3)
    assert images.p_value == crossed.image_signs_p(table, seed=3)
    assert images.interval.resampled == "40 images (of these 6 subjects)"
    subjects = crossed.paired_difference(first, second, **rows, population="subjects")
    assert subjects.p_value == crossed.subject_signs_p(table) >= 2 / 2**6
    assert subjects.interval.resampled == "6 subjects (t; signs of whole subjects)"
    # Two subjects cannot speak of others.
    two = crossed.paired_difference(
        first[:80], second[:80], clusters=rows["clusters"][:80], subjects=[0] * 40 + [1] * 40
    )
    assert two.interval.resampled == "40 images (of these 2 subjects)"
    assert two.p_value == crossed.image_signs_p(table[:2])
    asked = crossed.paired_difference(
        first[:80],
        second[:80],
        clusters=rows["clusters"][:80],
        subjects=[0] * 40 + [1] * 40,
        population="both",
    )
    assert (asked.p_value, asked.interval.low) == (None, None)
    assert asked.interval.resampled.startswith("no interval: 2 subjects")
    same = crossed.paired_difference(first, first, **rows)
    assert (same.mean, same.p_value, same.interval.resampled) == (0, 1, "no interval: all values are equal")
    with pytest.raises(DataError, match="same length"):
        crossed.paired_difference(np.ones(2), np.ones(3))


def test_rows_after_folds_are_wider_by_sqrt_2_and_say_so():
    """One subject and several, groups, medians and hits: the same helper, within what a score can be."""
    rng = np.random.default_rng(0)
    rows, images, subjects = rng.random(60), np.tile(np.arange(20), 3), np.repeat(list("abc"), 20)
    cases = [
        {"clusters": images[:20]},
        {"clusters": images[:20] // 5, "unit": "group"},
        {"clusters": images, "subjects": subjects},
        {"clusters": images, "subjects": subjects, "statistic": "median"},
    ]
    for case in cases:
        values = rows[: len(case["clusters"])]
        plain = crossed.interval_of_rows(values, **case)
        wide = crossed.interval_of_rows(values, over_folds=True, **case)
        assert wide.resampled == f"{plain.resampled}, widened by sqrt 2 after folds"
        assert wide.value == plain.value
        expected = np.clip(
            plain.value + 2**0.5 * (np.array([plain.low, plain.high]) - plain.value),
            values.min(),
            values.max(),
        )
        assert (wide.low, wide.high) == pytest.approx(tuple(expected))
    hits = crossed.interval_of_rows(np.repeat([1.0, 0.0], [9, 1]), proportion=True, over_folds=True)
    assert hits.high == 1.0
    none = crossed.interval_of_rows(np.ones(4), clusters=list("aabb"), unit="group", over_folds=True)
    assert none.resampled.startswith("no interval")


@pytest.mark.parametrize("population", [None, "both", "images", "subjects"])
def test_differences_after_folds_have_a_wider_interval_and_null(population):
    """p is that of a mean sqrt 2 times nearer to 0: .17 of differences without an effect were once called one."""
    rng = np.random.default_rng(3)
    table = 0.3 + rng.normal(size=(4, 12))
    rows = {"clusters": np.tile(np.arange(12), 4)}
    if population is not None:
        rows |= {"subjects": np.repeat(list("abcd"), 12), "population": population}
    plain, wide = (
        crossed.paired_difference(table.ravel(), np.zeros(48), over_folds=over, n_boot=500, **rows)
        for over in (False, True)
    )
    assert wide.p_value > plain.p_value
    assert wide.interval.resampled.endswith(", widened by sqrt 2 after folds")
    assert wide.interval.high - wide.mean == pytest.approx(2**0.5 * (plain.interval.high - plain.mean))
    if population == "both":
        nearer = crossed.crossed_interval(table, level=1 - wide.p_value).half_width
        assert nearer == pytest.approx(abs(table.mean()) / 2**0.5)


def test_limits_of_resamples():
    """Images and trials: percentiles. Groups: Student's t, none below three. Each score for itself."""
    draws = np.column_stack([np.random.default_rng(0).normal(0.5, 0.1, 400), np.full(400, 0.5)])
    low, high, words = crossed.bound_draws(np.array([0.5, 0.5]), draws, 30)
    np.testing.assert_allclose([low, high], np.quantile(draws, [0.025, 0.975], axis=0))
    assert words == ["images"] * 2
    low, high, words = crossed.bound_draws(np.array([0.5, 0.5]), draws, 5, unit="group", over_folds=True)
    half = 2**0.5 * stats.t.ppf(0.975, 4) * draws[:, 0].std() * (5 / 4) ** 0.5
    assert (low[0], high[0]) == pytest.approx((0.5 - half, 0.5 + half))
    assert words == ["5 groups (t), widened by sqrt 2 after folds", "no interval: all values are equal"]
    assert np.isnan([low[1], high[1]]).all()
    low, _, words = crossed.bound_draws(np.array([0.5, 0.5]), draws, 2, unit="run")
    assert np.isnan(low).all()
    assert words == ["no interval: 2 runs, and an interval over runs needs at least 3"] * 2


@pytest.mark.parametrize("population", [None, "both", "images", "subjects"])
def test_limits_of_a_paired_difference_are_of_the_level_that_is_asked_for(population):
    rng = np.random.default_rng(0)
    rows = {} if population is None else {"subjects": np.repeat(list("abcdef"), 12), "population": population}
    first, second, clusters = rng.normal(0.5, 1, 72), rng.normal(0, 1, 72), np.tile(np.arange(12), 6)
    wide, narrow = (
        crossed.paired_difference(first, second, clusters=clusters, level=level, **rows)
        for level in (0.95, 0.5)
    )
    assert wide.mean == narrow.mean == pytest.approx((first - second).mean())
    assert wide.p_value == narrow.p_value
    assert wide.interval.low < narrow.interval.low < wide.mean < narrow.interval.high < wide.interval.high
