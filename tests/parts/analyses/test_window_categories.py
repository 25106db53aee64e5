from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, rankdata
from sklearn.metrics import roc_auc_score

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.encoders.category_decoders import LdaConfig
from braindecode_vis.parts.analyses.cuts import make_sliding_windows
from braindecode_vis.parts.analyses.study import Study
from braindecode_vis.parts.analyses.window_categories import (
    RunDecisions,
    TimeResolvedCategoriesConfig,
    decide_windows,
    label_trials,
)
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.report.figures import render_plot


def make_category_study(
    *, classes=("face", "house"), gain=1.0, onset=0.1, n_runs=4, n_trials=40, seed=0, **options
):
    """Return runs of trials in which each class adds a pattern of its own from `onset` on, over a drift of each run."""
    generator = np.random.default_rng(seed)
    times = -0.1 + np.arange(30) / 100
    labels = np.array([classes[n % len(classes)] for n in range(n_trials)] * n_runs)
    runs = np.repeat([f"{n:02d}" for n in range(n_runs)], n_trials)
    patterns = {name: np.random.default_rng(5 + k).standard_normal((4, 1)) for k, name in enumerate(classes)}
    data = (
        generator.standard_normal((len(labels), 4, 30))
        + 3 * generator.standard_normal((n_runs, 4, 1))[np.repeat(np.arange(n_runs), n_trials)]
    )
    data[..., times >= onset - 1e-9] += gain * np.stack([patterns[name] for name in labels])
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": runs, "stimulus_id": labels, "repetition": 0, "split": "train",
         "concept": labels}
    )  # fmt: skip
    coords = {"ch_names": ["TP9", "AF7", "AF8", "TP10"], "times": times}
    responses = Responses(data.astype(np.float32), ("trial", "channel", "time"), trials, "V", coords)
    table = pd.DataFrame(
        {"stimulus_id": list(classes), "concept": list(classes), "path": "", "sha256": list(classes)}
    )
    folds = [Fold(np.flatnonzero(runs != r), np.flatnonzero(runs == r)) for r in np.unique(runs)]
    fitted = {}

    def trained(number):
        if number not in fitted:
            rows = folds[number].train
            fitted[number] = LdaConfig().build(seed=0).fit(responses.select(rows), labels[rows])
        return fitted[number]

    settings = {"n_bootstrap": 200, "n_permutations": 300} | options
    return Study(
        responses=responses, stimuli=StimulusSet(table), folds=folds, banks=[],
        pick=lambda rows, part: responses.select(rows), build=lambda number: LdaConfig().build(seed=0),
        trained=trained, centre="mean", protocol="planted categories", seed=seed, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [("face", "house"), ("a", "b", "c")])
def test_the_area_is_that_of_scikit_learn(classes):
    study = make_category_study(classes=classes, gain=0.3)
    windows = make_sliding_windows(study.responses, 0.05, 0.05, None, None)
    blocks = decide_windows(study, label_trials(study), windows)
    assert len(blocks) == 4
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((len(classes), 1, 60))
    truth = generator.integers(0, len(classes), 60)
    block = RunDecisions("01", truth, rankdata(scores, axis=-1))
    slow = np.mean([roc_auc_score(truth == c, scores[c, 0]) for c in range(len(classes))])
    assert block.areas[0] == pytest.approx(slow)
    draws = block.resample(generator, 3000)
    assert draws.mean() == pytest.approx(slow, abs=0.01)
    assert 0.01 < draws.std() < 0.1


def test_the_planted_onset_is_found_under_drift_between_runs():
    study = make_category_study(gain=1.0, n_runs=3)
    found = TimeResolvedCategoriesConfig(width=0.03, step=0.01).compute(study)
    onset = found.table["onset"].iloc[0]
    assert abs(onset - 0.1) <= 0.02 + 1e-9
    assert not found.table[found.table["stop"] <= 0.08]["significant"].any()
    after = found.table[found.table["start"] >= 0.1 - 1e-9]
    assert after["significant"].all()
    assert after["value"].min() > 0.75
    assert (
        (found.table["ci_low"] <= found.table["value"]) & (found.table["value"] <= found.table["ci_high"])
    ).all()
    assert render_plot(found.plots[0].draw)


@pytest.mark.slow
def test_no_effect_without_signal():
    """Ten studies of noise at 5 % each: four effects or more come once in a thousand."""
    n_found = 0
    for seed in range(10):
        study = make_category_study(
            gain=0.0, seed=seed, n_runs=2, n_trials=30, n_permutations=200, n_bootstrap=100
        )
        found = TimeResolvedCategoriesConfig(width=0.1, step=0.1).compute(study)
        n_found += bool(found.table["significant"].any())
    assert binom.sf(3, 10, 0.05) < 0.0011
    assert n_found <= 3


def test_one_class_in_a_run_is_no_area():
    study = make_category_study(classes=("face",))
    with pytest.raises(DataError, match="two"):
        TimeResolvedCategoriesConfig().compute(study)


@pytest.mark.shared
@pytest.mark.slow
def test_faces_and_houses_of_four_electrodes(shared: Path, tmp_path):
    """Real recordings: an effect after the onset, none before it (the baseline itself is subtracted)."""
    from braindecode_vis import pipeline
    from braindecode_vis.base.store import RunFolder
    from braindecode_vis.config import read_config
    from braindecode_vis.pipeline.runs import Run

    config = read_config("muse_n170", [], root=shared / "data" / "muse_n170")
    prepared = pipeline.preprocess(Run(config, RunFolder(tmp_path)))
    study = Study(
        responses=prepared.responses, stimuli=prepared.stimuli, folds=prepared.split.folds, banks=[],
        pick=lambda rows, part: prepared.responses.select(rows), build=lambda number: None, trained=lambda number: None,
        centre="mean", protocol="muse_n170", seed=0, n_bootstrap=1000, n_permutations=2000,
    )  # fmt: skip
    found = TimeResolvedCategoriesConfig().compute(study)
    table = found.table
    assert not table[table["stop"] <= 0.0]["significant"].any()
    peak = table.loc[table["value"].idxmax()]
    assert 0.15 < peak["start"] < 0.3
    assert peak["value"] > 0.58
    assert peak["p_cluster"] < 0.01


def test_categories_that_training_never_shows_are_refused():
    """On a zero-shot split every curve was 0.5 from first to last, with p = 1, as if something had been tested."""
    study = make_category_study(classes=("face", "house", "tool", "animal"), n_runs=2)
    concepts = study.responses.trials["concept"].isin(["face", "house"]).to_numpy()
    apart = replace(study, folds=[Fold(np.flatnonzero(concepts), np.flatnonzero(~concepts))])
    with pytest.raises(DataError, match="no category that is tested was trained on"):
        TimeResolvedCategoriesConfig().compute(apart)


def test_every_window_is_compared_with_half_of_the_area():
    study = make_category_study(n_runs=2, n_trials=12, n_permutations=40, n_bootstrap=40)
    table = TimeResolvedCategoriesConfig(width=0.1, step=0.1).compute(study).table
    assert len(table) == 3
    assert (table["chance"] == 0.5).all()
    assert (table["n"] == 24).all()
    np.testing.assert_allclose(table["start"], [-0.1, 0.0, 0.1], atol=1e-9)
    assert ((table["ci_low"] <= table["value"]) & (table["value"] <= table["ci_high"])).all()
