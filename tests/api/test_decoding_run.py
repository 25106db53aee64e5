"""What a run shows of itself, without any run behind it: its own scores and not those of its controls."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.api import decoding_run
from braindecode_vis.api.decoding_run import DecodingRun
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.encoders.ridge import RidgeConfig


def make_run(tmp_path, subjects):
    """Return a run that knows its scores already."""
    rows = [
        {"method": method, "metric": "top1", "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1,
         "chance": 0.25, "p_value": 0.01, "n_queries": 40, "subject": subject}
        for subject in subjects
        for method, value in (("decoded", 0.6145), ("shuffled", 0.2375))
    ]  # fmt: skip

    class Shown(DecodingRun):
        folder, hints, leaks = tmp_path, [], ()
        scores = pd.DataFrame(rows)
        decodes_categories = True  # no images

    return Shown(SimpleNamespace(config=SimpleNamespace(encoder=RidgeConfig())))


@pytest.mark.parametrize("subjects", [("01",), ("01", "02")])
def test_the_scores_of_the_decoder_are_shown_and_not_those_of_its_controls(tmp_path, subjects):
    run = make_run(tmp_path, subjects)
    html = run._repr_html_()
    assert html.count("<td>top1</td>") == html.count("<td>0.61") == len(subjects)
    assert ("<th>subject</th>" in html) == (len(subjects) > 1)
    rows = [line.split() for line in str(run).splitlines() if "top1" in line]
    assert [float(row[-6]) for row in rows] == [pytest.approx(0.6145, abs=1e-3)] * len(subjects)
    assert str(run).splitlines()[-1] == f"folder: {tmp_path}"


def test_folds_are_counted_from_0(monkeypatch):
    made = [Embeddings(np.full((1, 2), n), ["a"], "toy") for n in range(3)]
    folds = [SimpleNamespace(predicted=predicted) for predicted in made]
    monkeypatch.setattr(decoding_run.decoding, "retrieve", lambda run: SimpleNamespace(folds=folds))
    run = DecodingRun(None)
    assert [run.predictions_of_fold(n) for n in (0, 1, np.int64(2))] == made
    for number, words in (
        (-1, "not -1"),
        (3, "not 3"),
        (True, "a number from 0 to 2"),
        ("0", "a number from 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            run.predictions_of_fold(number)
