"""`compare` and the analyses resample whole groups where the trials have some, as the scores of a run do."""

import warnings

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.api.decoding_run import decode
from braindecode_vis.api.own import from_arrays
from braindecode_vis.parts.analyses.analyze import analyze, read_findings
from braindecode_vis.parts.analyses.occlusion import OcclusionConfig
from braindecode_vis.parts.studies.compare import compare_runs, read_items
from braindecode_vis.scoring.crossed import paired_difference
from braindecode_vis.scoring.units import make_labels

N_GROUPS, PER_GROUP = 16, 8
ANALYSES = ("occlusion", "hubness")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two decoders of the same trials, resampled by image and by group; in half of the groups nobody looked."""
    rng = np.random.default_rng(0)
    n = N_GROUPS * PER_GROUP
    group = np.repeat(np.arange(N_GROUPS), PER_GROUP)
    pictures = rng.random((n, 5, 5))
    awake = (group % 2)[:, None]
    weights = rng.normal(size=(25, 30))
    data = awake * (pictures.reshape(n, -1) - 0.5) @ weights + 0.3 * rng.normal(size=(n, 30))
    own = from_arrays(data, images=pictures, group=[f"block{g:02d}" for g in group])
    folder, found = tmp_path_factory.mktemp("groups"), {}
    for resample, alpha in (("image", 1.0), ("auto", 1.0), ("auto", 1e6)):
        settings = {
            "evaluation.resample": resample, "evaluation.n_bootstrap": 1000, "evaluation.n_permutations": 200,
            "analyses": [{"kind": kind} for kind in ANALYSES],
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # groups are on both sides of the folds, as they are meant to be here
            found[resample, alpha] = decode(
                own, encoder={"kind": "ridge", "alphas": [alpha]}, split=2, settings=settings,
                out=folder / f"{resample}-{alpha:g}",
            )  # fmt: skip
    return found


def test_differences_between_runs_are_resampled_by_group(runs):
    """Half of the groups gain all there is to gain, so that groups vary far more than their pictures suggest."""
    strong, weak = runs["auto", 1.0].folder, runs["auto", 1e6].folder
    by_group = compare_runs([weak, strong]).set_index("metric").loc["pixcorr"]
    items = read_items(weak).merge(read_items(strong), on="stimulus_id", suffixes=("_a", "_b"))
    by_image = paired_difference(items["pixcorr_b"].to_numpy(), items["pixcorr_a"].to_numpy())
    assert by_group["difference"] == pytest.approx(by_image.mean)
    assert by_group["resampled"] == f"{N_GROUPS} groups (t), widened by sqrt 2 after folds"
    width = by_image.interval.high - by_image.interval.low
    assert by_group["ci_high"] - by_group["ci_low"] > 1.8 * width
    assert by_group["p_value"] >= by_image.p_value
    # As in the run itself.
    row = runs["auto", 1.0].scores.query("metric == 'pixcorr' and method == 'decoded'").iloc[0]
    assert row["resampled"] == f"{N_GROUPS} groups (t), widened by sqrt 2 after folds"


def test_analyses_resample_groups_and_say_so(runs, monkeypatch):
    monkeypatch.setattr(
        OcclusionConfig, "max_columns", 2
    )  # of many columns none is missed in some groups alone
    tables = {}
    for resample in ("image", "auto"):
        artifacts, refusals = analyze(runs[resample, 1.0]._run)
        assert not refusals
        tables[resample] = {found["kind"]: found["table"] for found in map(read_findings, artifacts)}
    for kind in ANALYSES:
        by_image, by_group = (tables[resample][kind] for resample in ("image", "auto"))
        np.testing.assert_array_equal(by_image["value"], by_group["value"])
        # A row of the geometry speaks of one fold. Empty where there is no interval.
        folds = "" if kind == "hubness" else ", widened by sqrt 2 after folds"
        assert set(by_group["resampled"]) - {""} == {f"{N_GROUPS} groups (t){folds}"}
        assert set(by_image["resampled"]) - {""} == {f"images{folds}"}
    widths = [
        (table["occlusion"]["ci_high"] - table["occlusion"]["ci_low"]).mean() for table in tables.values()
    ]
    assert widths[1] > 1.15 * widths[0]  # 1.22: the loss of half of the columns differs less between groups


def test_averages_over_groups_that_share_pictures_are_one_unit_in_every_fold():
    """Groups 1 and 2 share picture a, tested in one fold, and b, tested in another: both folds name one unit."""
    trials = pd.DataFrame(
        {
            "subject": "01", "stimulus_id": list("aabbcd"), "session": "01", "run": "01",
            "group": ["1", "2", "1", "2", "3", "4"],
        }
    )  # fmt: skip
    unit, label = make_labels(trials, "auto", averaged=True)
    items = trials.drop_duplicates("stimulus_id").drop(columns="group").reset_index(drop=True)
    first, second = label(items[items["stimulus_id"].isin(["a", "c"])]), label(items.iloc[[1, 3]])
    assert unit == "group"
    assert first[0] == second[0]
    assert len({*first, *second}) == 3
    assert make_labels(trials, "image", averaged=True) is None
    assert make_labels(trials.assign(group="1"), "auto", averaged=False) is None
