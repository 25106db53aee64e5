"""The verb analyze: what it leaves, what the report shows, and what happens to analyses that do not fit."""

import json

import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.checks import ConfigError
from braindecode_vis.config import read_config
from braindecode_vis.runs import open_run
from braindecode_vis.studies.analyze import analyze, read_findings

QUICK = [
    "dataset.n_train=80",
    "dataset.n_test=20",
    "evaluation.n_bootstrap=200",
    "evaluation.n_permutations=200",
    "analyses=[{kind: confusion}]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(read_config("synthetic_digits", QUICK), tmp_path_factory.mktemp("run"))


def test_an_analysis_that_does_not_fit_does_not_stop_the_others(run):
    artifacts, refusals = analyze(run, ["sliding_window", "hubness"])
    assert [read_findings(artifact)["kind"] for artifact in artifacts] == ["hubness"]
    assert list(refusals) == ["sliding_window"]
    assert "time" in refusals["sliding_window"]


def test_the_configuration_names_analyses_and_the_report_shows_them(run):
    (artifact,), refusals = analyze(run)
    assert not refusals
    found = read_findings(artifact)
    assert {"value", "ci_low", "ci_high", "chance", "n"} <= set(found["table"])
    pd.testing.assert_frame_equal(found["table"], pd.read_parquet(artifact.path / "table.parquet"))
    assert found["title"] in pipeline.report(run).read_text()
    again, _ = analyze(run)
    assert again[0].reused
    assert json.loads((artifact.path / "provenance.json").read_text())["kind"] == "confusion"


def test_unknown_analyses_are_answered_with_the_known_ones(run):
    with pytest.raises(ConfigError, match="did you mean 'hubness'"):
        analyze(run, ["hubnes"])


def test_columns_are_chosen_by_analyses_alone(tmp_path):
    chosen = [*QUICK, "selection.encoding={n_best: 5}"]
    with pytest.raises(ConfigError, match="run them without selection"):
        analyze(open_run(read_config("synthetic_digits", chosen), tmp_path))
