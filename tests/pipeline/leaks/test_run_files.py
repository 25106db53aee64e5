"""The artifacts of a run are followed from its scores; unfinished and older ones are left out."""

import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.audit.run import audit_run, check_branches, check_results
from braindecode_vis.pipeline.leaks.run_files import (
    Record,
    _follow_folds,
    drop_digests,
    list_first,
    open_audited,
)
from tests.parts.audit.small_runs import read_name, write_artifact, write_bank, write_prepared, write_trained

DATA = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
NAMES = [f"i{row:03d}" for row in range(12)]
FOLDS = [(range(4, 12), range(4)), (range(4), range(4, 12))]


def write_run(folder, *, seed=0, created="2026-01-01", low=False):
    """Write a run of two folds up to its scores; another seed writes others beside them."""
    prepared = write_prepared(folder, DATA, FOLDS, fields={"seed": seed})
    bank = write_bank(folder, prepared, NAMES, DATA)
    fits = [write_trained(folder, prepared, bank, number=n) for n in (0, 1)]
    upstream = {f"train{n}": read_name(fit) for n, fit in enumerate(fits)}
    retrieved = write_artifact(folder, "retrieve", upstream=upstream, created=created)
    more = {}
    if low:
        lows = [write_trained(folder, prepared, bank, number=n, fields={"low": True}) for n in (0, 1)]
        upstream = {f"low_level{n}": read_name(fit) for n, fit in enumerate(lows)}
        more = {"reconstruct": read_name(write_artifact(folder, "reconstruct", upstream=upstream))}
    upstream = {"retrieve": read_name(retrieved), **more}
    return write_artifact(folder, "evaluate", upstream=upstream, created=created)


def test_scores_are_followed_to_the_trials_that_they_were_made_of(tmp_path):
    """Of two evaluations the one that scores.json names, though the other is newer; without scores the newer one."""
    first = write_run(tmp_path)
    second = write_run(tmp_path, seed=1, created="2026-02-01")
    assert open_audited(tmp_path).evaluated.path == second
    store.write_json(tmp_path / "scores.json", [{"fingerprint": read_name(first)}])
    run = open_audited(tmp_path)
    assert run.evaluated.path == first
    assert run.prepared.fields == {"seed": 0}
    assert [record.fields["fold"] for record in run.trained] == [0, 1]
    assert run.missing == ()
    assert not run.thorough  # nobody asked for trainings of hours
    store.write_json(tmp_path / "scores.json", [{"fingerprint": "gone"}])
    assert open_audited(tmp_path).evaluated.path == second


def test_a_check_that_could_not_be_made_leaves_its_part_unverified(tmp_path, monkeypatch):
    """A damaged file is a finding, and what it was needed for is not called verified."""

    def check_something(run, **_):
        raise ValueError("damaged")

    monkeypatch.setattr("braindecode_vis.parts.audit.run.STATISTICS", [check_something])
    monkeypatch.setattr("braindecode_vis.parts.audit.run.STEPS", [("score", check_something)])
    monkeypatch.setattr("braindecode_vis.parts.audit.run.open_recomputed", lambda *_: None)
    write_run(tmp_path)
    audit = audit_run(tmp_path)
    unverified = {(item.part, item.what) for item in audit.verified if item.how == "not verified"}
    assert {("fit", "something"), ("score", "something")} <= unverified
    assert [item.level for item in audit.findings if item.check == "something"] == ["warning"]


def test_an_artifact_that_is_still_being_written_is_left_out(tmp_path):
    """Its folder has a hidden name, which comes before all others."""
    prepared = write_prepared(tmp_path, DATA, FOLDS)
    fit = write_trained(tmp_path, prepared, write_bank(tmp_path, prepared, NAMES, DATA))
    half = fit.with_name(".tmp-" + fit.name)
    half.mkdir()
    (half / store.PROVENANCE).write_text((fit / store.PROVENANCE).read_text())
    assert [record.path for record in open_audited(tmp_path).trained] == [fit]


def test_what_an_artifact_was_made_of_and_is_gone_is_named(tmp_path):
    evaluated = write_run(tmp_path)
    (path,) = (tmp_path / "stages" / "retrieve").iterdir()
    (path / store.PROVENANCE).unlink()
    run = open_audited(tmp_path)
    assert [text.split(",")[0] for text in run.missing] == [f"retrieve {path.name}"]
    assert run.evaluated.path == evaluated


def test_training_trials_are_those_that_no_fold_tests(tmp_path):
    """Where every trial is tested in some fold, all declared ones."""
    write_prepared(tmp_path / "one", DATA, FOLDS[:1])
    assert np.flatnonzero(open_audited(tmp_path / "one").is_training).tolist() == list(range(4, 12))
    write_prepared(tmp_path / "two", DATA, FOLDS)
    assert open_audited(tmp_path / "two").is_training.all()


def test_the_low_level_branch_is_a_run_without_a_branch_of_its_own(tmp_path):
    write_run(tmp_path, low=True)
    run = open_audited(tmp_path)
    low = run.branches["low_level"]
    assert [record.fields.get("low") for record in low.trained] == [True, True]
    assert low.retrieved is low.evaluated is None
    assert not low.branches
    assert {record.content["stage"] for record in low.chain} == {"embed", "train"}
    assert check_branches(low, []) == []


def test_a_run_without_its_settings_is_not_computed_again(tmp_path):
    """The reason is in brackets, so that it must not end as a sentence does."""
    write_run(tmp_path)
    run = open_audited(tmp_path)
    (found,) = check_results(run, [])
    assert "nothing after training could be computed again" in found.message
    told = {item.part: item for item in run.verified}
    assert set(told) == {"data", "prediction", "material", "score"}
    assert all(item.how == "not verified" and item.reason[-1] != "." for item in told.values())


@pytest.mark.parametrize("rows", [[0, 12], [-1], [[0, 1]]])
def test_folds_of_rows_that_are_not_there_are_damage(tmp_path, rows):
    artifact = write_prepared(tmp_path, DATA, FOLDS)
    content = store.read_json(artifact / "split.json")
    content["folds"][1]["test"] = rows
    store.write_json(artifact / "split.json", content)
    with pytest.raises(DataError, match=r"split\.json lists trials that are not among the 12"):
        open_audited(tmp_path)


def test_digests_beside_settings_are_dropped_at_any_depth():
    fields = {"a_sha256": 1, "b": [{"c_digest": 2, "d": 3}, 4], "e": {"f_digests": 5}}
    assert drop_digests(fields) == {"b": [{"d": 3}, 4], "e": {}}


def test_three_values_are_listed():
    assert list_first([3, 1, 2]) == "1, 2, 3"
    assert list_first(["b", "a", "d", "c"]) == "a, b, c, ..."


@pytest.mark.parametrize(
    ("units", "found", "missing"),
    [
        ({"a": "fold00", "b": "fold01"}, ["a", "b"], []),
        ({"b": "fold01", "a": "fold00", "x": "fold00"}, ["a", "b"], []),
        ({"x": "fold00", "b": "fold01"}, ["x", "b"], ["train fold00 a"]),  # another fit of that fold is there
        ({"b": "fold01"}, ["b"], ["train fold00 a"]),
        ({}, [], ["train fold00 a", "train fold01 b"]),
    ],
)
def test_the_fit_of_each_fold_is_the_one_that_was_named_or_else_another_of_it(
    tmp_path, units, found, missing
):
    scores = Record(tmp_path, {"upstream": {"train0": "a", "train1": "b", "retrieve": "z"}})
    fits = [
        Record(tmp_path / f"{unit}-{name}", {"unit": unit, "fingerprint": name, "upstream": {}})
        for name, unit in units.items()
    ]
    told = []
    assert [record.fingerprint for record in _follow_folds(scores, fits, told)] == found
    assert [text.split(",")[0] for text in told] == missing
