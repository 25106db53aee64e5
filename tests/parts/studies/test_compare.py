"""Comparisons of several subjects: of whom a difference speaks, and what it cannot show."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.studies import compare
from braindecode_vis.scoring.crossed import crossed_interval, crossed_p, image_signs_p, subject_signs_p

N = 20


def make_items(n_subjects, gain=0.0, groups=None):
    """Return the items of a run in which every subject saw the same images."""
    rng = np.random.default_rng(int(10 * gain))
    rows = [(f"{s:02d}", f"i{i:02d}", 0) for s in range(n_subjects) for i in range(N)]
    table = pd.DataFrame(rows, columns=compare.KEYS).assign(pixcorr=rng.normal(gain, 1, n_subjects * N))
    return table if groups is None else table.assign(unit="run", cluster=groups)


def find(n_subjects, **asked):
    """Return the row of one comparison, and the table of its differences."""
    first, other = make_items(n_subjects), make_items(n_subjects, 0.5)
    (row,) = compare.compare_tables(first, other, names=("a", "b"), n_boot=2000, **asked)
    return row, (other["pixcorr"] - first["pixcorr"]).to_numpy().reshape(n_subjects, N)


@pytest.mark.parametrize(
    ("n_subjects", "population", "words", "p"),
    [
        (5, None, "5 subjects and 20 images (crossed)", crossed_p),
        (5, "both", "5 subjects and 20 images (crossed)", crossed_p),
        (5, "images", "20 images (of these 5 subjects)", lambda table: image_signs_p(table, n_draws=2000)),
        (5, "subjects", "5 subjects (t; signs of whole subjects)", subject_signs_p),
        (2, None, "20 images (of these 2 subjects)", lambda table: image_signs_p(table, n_draws=2000)),
        (
            2,
            "both",
            "no interval: 2 subjects, and an interval over subjects needs at least 3",
            lambda table: None,
        ),
        (1, "both", "images", None),
    ],
)
def test_a_difference_speaks_of_whom_it_was_asked_for(n_subjects, population, words, p):
    row, table = find(n_subjects, population=population)
    assert (row["resampled"], row["n_subjects"]) == (words, n_subjects)
    assert row["difference"] == pytest.approx(table.mean())
    if p is not None:
        assert row["p_value"] == p(table)
    assert (row["ci_low"] is None) == words.startswith("no interval")
    if words.endswith("(crossed)"):
        assert row["ci_high"] - row["difference"] == pytest.approx(crossed_interval(table).half_width)


def test_groups_that_do_not_hold_whole_images_give_way_to_images():
    """Runs are numbered within a subject, and images of one are those of the others."""
    of_subjects = [f"{s:02d}/{i % 4}" for s in range(3) for i in range(N)]
    shared = [f"g{i % 4}" for _ in range(3) for i in range(N)]
    for groups, words in (
        (of_subjects, "3 subjects and 20 images (crossed)"),
        (shared, "3 subjects and 4 runs (crossed)"),
    ):
        first, other = make_items(3, groups=groups), make_items(3, 0.5, groups=groups)
        (row,) = compare.compare_tables(first, other, names=("a", "b"), n_boot=200)
        assert row["resampled"] == words


@pytest.mark.parametrize(
    ("n_subjects", "population", "sentence"),
    [
        (5, None, ""),
        (
            2,
            None,
            "Differences apply to these 2 subjects only; with 3 or more subjects they can generalise to other "
            "subjects.",
        ),
        (8, "subjects", ""),
        (
            5,
            "subjects",
            "Signs of 5 whole subjects have no p below 0.0625, and after the correction for 1 comparisons none",
        ),
    ],
)
def test_what_a_comparison_cannot_tell(n_subjects, population, sentence):
    row, _ = find(n_subjects, population=population)
    found = compare.describe_comparison(pd.DataFrame([row]))
    assert len(found) == bool(sentence)
    assert not sentence or found[0].startswith(sentence)


def test_an_unknown_population_is_refused():
    with pytest.raises(
        ConfigError, match="population is 'people', but must be one of both, images, subjects"
    ):
        find(3, population="people")


def test_rows_without_a_p_are_not_corrected(monkeypatch, tmp_path):
    """Two subjects that are asked for others have no p, and Holm's correction counts the rows that have one."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.yaml").write_text("")
    known = dict(zip(folders, (make_items(2), make_items(2, 0.5), make_items(2)), strict=True))
    monkeypatch.setattr(compare, "read_items", known.__getitem__)
    table = compare.compare_runs(folders, population="both", n_boot=200)
    assert np.isnan(table["p_value"].astype(float)).tolist() == [True, False]
    assert np.isnan(table["p_holm"]).tolist() == [True, False]
    assert table["p_holm"].iloc[1] == 1  # a run that equals the first


def test_runs_of_several_folds_have_wider_intervals_and_nulls():
    """Folds train each other; items of earlier versions, which do not name theirs, stay as they were."""
    first, other = make_items(3), make_items(3, 0.5)
    (plain,) = compare.compare_tables(first, other, names=("a", "b"), n_boot=200)
    (one,) = compare.compare_tables(first.assign(fold=0), other, names=("a", "b"), n_boot=200)
    assert one == plain
    folds = np.arange(len(first)) % 4
    (wide,) = compare.compare_tables(
        first.assign(fold=folds), other.assign(fold=folds), names=("a", "b"), n_boot=200
    )
    assert wide["resampled"] == f"{plain['resampled']}, widened by sqrt 2 after folds"
    assert wide["ci_low"] - wide["difference"] == pytest.approx(
        2**0.5 * (plain["ci_low"] - plain["difference"])
    )
    assert wide["p_value"] > plain["p_value"]
    items = first.assign(stimulus_id=first["stimulus_id"], fold=folds).drop(columns="occurrence")
    assert compare.tabulate_items(items)["fold"].tolist() == folds.tolist()
