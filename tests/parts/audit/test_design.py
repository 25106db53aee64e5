"""Concepts that go together with runs, with time, or with their place in a run are distinguished from others."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from braindecode_vis.parts.audit.design import check_design, compute_cramers_v, permute
from braindecode_vis.pipeline.leaks.run_files import open_audited
from tests.parts.audit.small_runs import write_prepared

N_CONCEPTS, N_RUNS, N_EACH = 4, 6, 20
N = N_RUNS * N_EACH
RUNS = np.repeat(np.arange(N_RUNS), N_EACH)
PLACE = np.tile(np.arange(N_EACH), N_RUNS)


def test_cramers_v_is_that_of_a_table_of_counts():
    """Bergsma's correction, written out for tables of several shapes."""
    generator = np.random.default_rng(0)
    for r, k, coupling in ((3, 3, 0.5), (2, 5, 0.3), (5, 2, 0.8), (4, 6, 0.0)):
        first = generator.integers(0, r, 400)
        second = np.where(generator.random(400) < coupling, first % k, generator.integers(0, k, 400))
        table = np.array([[((first == i) & (second == j)).sum() for j in range(k)] for i in range(r)])
        chance = table.sum(axis=1)[:, None] * table.sum(axis=0) / 400
        phi = ((table - chance) ** 2 / chance).sum() / 400
        corrected = max(0, phi - (r - 1) * (k - 1) / 399)
        sides = (r - (r - 1) ** 2 / 399 - 1, k - (k - 1) ** 2 / 399 - 1)
        assert compute_cramers_v(first, second) == pytest.approx(np.sqrt(corrected / min(sides)))
        # Codes that nobody has change nothing.
        assert compute_cramers_v(2 * first, 3 * second + 1) == pytest.approx(np.sqrt(corrected / min(sides)))
    assert compute_cramers_v(np.zeros(9, int), np.arange(9)) == 0
    values = [compute_cramers_v(generator.integers(0, 9, 60), np.repeat(np.arange(6), 10)) for _ in range(50)]
    assert np.mean(values) < 0.08  # without the correction 0.36


def test_blocks_stay_whole_when_they_are_shuffled_and_stay_in_their_group():
    codes, groups = np.repeat([0, 1, 2, 3, 4, 5], 4), np.repeat([0, 0, 0, 1, 1, 1], 4)
    seen = []
    permute(lambda c: seen.append(c.copy()) or 0.0, codes, groups, 0, "name", np.repeat(np.arange(6), 4))
    assert len({tuple(c) for c in seen}) > 20
    for shuffled in seen:
        assert (shuffled.reshape(6, 4) == shuffled[::4, None]).all()
        assert set(shuffled[:12].tolist()) == {0, 1, 2}


def test_permutations_keep_their_level():
    generator = np.random.default_rng(2)
    runs = np.repeat(np.arange(4), 12)
    p = [
        permute(lambda c: compute_cramers_v(c, runs), generator.integers(0, 3, 48), 0 * runs, seed, "test").p
        for seed in range(40)
    ]
    assert np.mean(np.array(p) <= 0.2) < 0.4


def order_concepts(how):
    """Return the concept of each trial, presented run after run."""
    generator = np.random.default_rng(3)
    if how == "a run each":
        return RUNS % N_CONCEPTS
    if how == "blocks":  # of five trials, in an order of its own in each run
        return np.concatenate([np.repeat(generator.permutation(N_CONCEPTS), 5) for _ in range(N_RUNS)])
    if how == "the same place":
        return PLACE // 5
    return np.concatenate([generator.permutation(np.repeat(np.arange(N_CONCEPTS), 5)) for _ in range(N_RUNS)])


@pytest.mark.parametrize("split", ["within runs", "of runs"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shuffled", []),
        ("a run each", ["concept and run go together: Cramér's V 0.99"]),
        ("blocks", ["84% of neighbouring trials show one concept"]),
        (
            "the same place",
            ["84% of neighbouring trials", "concept and place in the run go together: Cramér's V 0.81"],
        ),
    ],
)
def test_what_goes_together_with_concepts_is_named(tmp_path, how, words, split):
    """Blocks are of no help to a decoder that is tested on other runs; the place in a run is, in any run."""
    concepts = order_concepts(how)
    test = PLACE % 4 == 0 if split == "within runs" else RUNS >= 4
    folds = [(np.flatnonzero(~test), np.flatnonzero(test))]
    columns = {"run": [f"{run}" for run in RUNS], "onset": PLACE.astype(float)}
    # Trials lie in the file in another order than they were presented in.
    order = np.random.default_rng(0).permutation(N)
    places = np.argsort(order)
    folds = [tuple(places[side] for side in folds[0])]
    columns = {
        name: np.asarray(values, dtype=object if name == "run" else float)[order]
        for name, values in columns.items()
    }
    names = [f"c{concept}" for concept in concepts[order]]
    write_prepared(
        tmp_path, np.random.default_rng(1).normal(size=(N, 3)), folds, concepts=names, columns=columns
    )
    found = check_design(open_audited(tmp_path))
    level = "warning" if split == "within runs" else "ok"
    told = [item for item in found if "go together" in item.message or "neighbouring" in item.message]
    assert [text in item.message for text, item in zip(words, told, strict=True)] == [True] * len(words), (
        found
    )
    assert [item.level for item in told] == [
        level if "place" not in item.message else "warning" for item in told
    ]


def test_concepts_that_one_run_alone_shows_are_named(tmp_path):
    """Three of four: the fourth is shown in two runs."""
    concepts = np.array([0, 0, 1, 2, 3, 3])[RUNS]
    concepts[RUNS == 1] = 3
    test = PLACE % 4 == 0
    folds = [(np.flatnonzero(~test), np.flatnonzero(test))]
    columns = {"run": [f"{run}" for run in RUNS]}
    write_prepared(
        tmp_path, np.random.default_rng(1).normal(size=(N, 3)), folds, concepts=[f"c{c}" for c in concepts],
        columns=columns,
    )  # fmt: skip
    found = check_design(open_audited(tmp_path))
    assert any("3 concept(s) are in one run only, first c0, c1, c2;" in item.message for item in found), found


@pytest.mark.parametrize(("within", "level"), [(True, "warning"), (False, "ok")])
def test_concepts_of_subjects_are_named(tmp_path, within, level):
    """Shuffles within subjects change nothing where a subject has one concept, and that was called clean."""
    who = np.repeat(np.arange(6), 20)
    rows = np.arange(120)
    test = rows % 4 == 0 if within else who < 2
    folds = [(rows[~test], rows[test])]
    names = [f"c{n % 2}" for n in who]
    data = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    write_prepared(tmp_path, data, folds, ids=names, concepts=names, columns={"subject": who.astype(str)})
    found = [
        item for item in check_design(open_audited(tmp_path)) if "and subject go together" in item.message
    ]
    assert [item.level for item in found] == [level]


@pytest.mark.parametrize("seed", range(4))
def test_the_association_is_that_of_pandas_and_scipy_on_rare_codes(seed):
    """Codes that occur once count, and codes that never occur leave no empty row."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 3, 40) * 2, rng.integers(0, 4, 40)
    first[0], second[1] = 7, 9
    second[2:20] = first[2:20] // 2
    table = pd.crosstab(first, second).to_numpy()
    n, (r, k) = table.sum(), table.shape
    phi = max(0, chi2_contingency(table, correction=False)[0] / n - (r - 1) * (k - 1) / (n - 1))
    smaller = min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1
    assert compute_cramers_v(first, second) == pytest.approx((phi / smaller) ** 0.5)
    assert compute_cramers_v(second, first) == pytest.approx(
        (phi / smaller) ** 0.5
    )  # whichever has fewer codes
