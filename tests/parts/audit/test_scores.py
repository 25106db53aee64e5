"""Scores of a run beside scores that were computed again: which difference is tampering, and what is not compared."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Score
from braindecode_vis.parts.audit import scores as judging
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.pipeline.leaks.run_files import AuditedRun

ITEMS = pd.DataFrame({"stimulus_id": list("abc"), "top1": [1.0, 0.0, 1.0]})


@dataclass
class Task:
    suite: object = None
    feature_encoder: object = None
    metrics: tuple = ("mine",)
    pair_nulls: bool = True
    n_permutations: int = 10_000


def make_score(metric="top1", method="decoded", **changes):
    changes = {"value": 0.5, "chance": 0.25, "p_value": 0.04, "gallery_size": 4} | changes
    return Score(
        method=method, metric=metric, n_queries=3, protocol="toy", subject="01", split="test", seed=0,
        ci_low=0.1, ci_high=0.9, **changes,
    )  # fmt: skip


def make_run(folder, rows, *, thorough=False, ceilings=None):
    """Return a run whose scores are these rows."""
    (folder / "evaluate").mkdir()
    store.write_json(folder / "evaluate" / "scores.json", rows)
    ITEMS.to_parquet(folder / "evaluate" / "items.parquet")
    stated = []
    evaluated = SimpleNamespace(path=folder / "evaluate", fields={"ceilings": ceilings or {}})
    run = Mock(spec=AuditedRun, folder=folder, evaluated=evaluated, thorough=thorough)
    run.state = lambda *what: stated.append(what)
    again = Mock(spec=RecomputedRun)
    again.config = SimpleNamespace(decodes_categories=False)
    again.compute = lambda stage, step: {"": folder / "evaluate"}
    return run, again, stated


@pytest.mark.parametrize(
    ("metric", "is_measured"),
    [
        ("brain_correlation", True),
        ("brain_correlation@V1", True),
        ("brain_correlation@ventral@7t", True),
        ("top1", False),
        ("top1@brain_correlation", False),
    ],
)
def test_a_ceiling_is_that_of_the_settings_unless_it_is_measured(tmp_path, metric, is_measured):
    run, again, _ = make_run(tmp_path, [make_score(metric, noise_ceiling=0.7).as_row()], thorough=True)
    (found,) = judging.check_scores(run, again)
    assert found.level == ("ok" if is_measured else "leak")
    assert is_measured or f"the ceiling of {metric} is 0.7, but None in the settings" in found.message
    if not is_measured:
        run.evaluated.fields["ceilings"][metric] = 0.7
        assert [item.level for item in judging.check_scores(run, again)] == ["ok"]


@contextmanager
def recompute(monkeypatch, scores, *, many=False, asked=None):
    monkeypatch.setattr(judging.scoring, "make_scoring_task", lambda again: (Task(), None))
    monkeypatch.setattr(judging, "_has_many_pairs", lambda again: many)
    monkeypatch.setattr(
        "braindecode_vis.scoring.score_table.compute_scores",
        lambda task: (asked.append(task) if asked is not None else None) or (scores, ITEMS),
    )
    yield


@pytest.mark.parametrize(
    ("told", "made", "many", "words"),
    [
        ({}, {}, False, ""),
        ({"value": 0.75}, {}, False, "top1 (decoded): value is 0.75, but 0.5 is computed"),
        ({"p_value": 0.001}, {}, False, "p_value is 0.001"),
        ({"p_value": 0.001}, {}, True, ""),  # of fewer permutations
        ({"chance": 0.3}, {}, True, "chance is 0.3"),  # known exactly from the gallery
        ({"chance": 0.3, "gallery_size": None}, {"gallery_size": None}, True, ""),
        ({"chance": 0.3, "gallery_size": None}, {"gallery_size": None}, False, "chance is 0.3"),
        ({"noise_ceiling": 0.9}, {}, False, ""),  # read beside the data set
        ({"resampled": "other words"}, {}, False, ""),
        ({"metric": "top5"}, {}, False, "there is no score of top1 (decoded)"),
        ({"subject": "02"}, {}, False, "there is no score of top1 (decoded)"),
    ],
)
def test_what_is_cheap_is_compared_number_by_number(tmp_path, monkeypatch, told, made, many, words):
    score, asked = make_score(**made), []
    run, again, stated = make_run(tmp_path, [score.as_row() | told, make_score("fid").as_row()])
    with recompute(monkeypatch, [score], many=many, asked=asked):
        text = judging._compare_cheap_scores(run, again, store.read_json(run.evaluated.path / "scores.json"))
    assert words in text
    assert bool(text) == bool(words)
    (task,) = asked  # nothing that is dear
    assert task == replace(Task(), metrics=(), pair_nulls=not many, n_permutations=10 if many else 10_000)
    if not words:
        assert ("score", "recomputed", "1 scores") in stated
        assert ("score", "by record", "scores of 1 metric(s): fid", "expensive; add --refit") in stated


def test_items_of_the_run_are_compared_with_those_that_are_computed(tmp_path, monkeypatch):
    run, again, _ = make_run(tmp_path, [make_score().as_row()])
    with recompute(monkeypatch, [make_score()]):
        ITEMS.assign(top1=0.0).to_parquet(run.evaluated.path / "items.parquet")
        assert "top1" in judging._compare_cheap_scores(run, again, [make_score().as_row()])
        ITEMS.to_parquet(run.evaluated.path / "items.parquet")
        assert judging._compare_cheap_scores(run, again, [make_score().as_row()]) == ""


def test_shuffles_of_many_images_are_left_to_the_record(tmp_path, monkeypatch):
    shuffled = make_score(method="shuffled")
    run, again, stated = make_run(tmp_path, [shuffled.as_row() | {"value": 0.1}])
    for many in (True, False):
        with recompute(monkeypatch, [shuffled], many=many):
            text = judging._compare_cheap_scores(run, again, [shuffled.as_row() | {"value": 0.1}])
        assert bool(text) != many
    assert not any("metric(s)" in words for what in stated for words in what)


@pytest.mark.parametrize(
    ("told", "made", "words"),
    [
        ("", "<p>1</p>", "the page has no section scores"),
        ("<p>top1 0.5</p>", "<p>top1 0.6</p>", "says '0.5', but the scores say '0.6'"),
        (
            "<p>top1</p><img a>",
            "<p>top1</p><img b>",
            "the pictures in the section scores of the page are not those",
        ),
    ],
)
def test_what_differs_in_a_section_of_the_page_is_named(told, made, words):
    assert words in judging._find_other_words("scores", told, made)
