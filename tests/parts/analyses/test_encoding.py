"""Encoding models of runs: planted responses are found and others are not; ceilings, groups, maps and refusals."""

import json
from dataclasses import replace
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.analyses import encoding
from braindecode_vis.parts.analyses.brain_score import PENALTIES, score_groups
from braindecode_vis.parts.analyses.cuts import Window
from braindecode_vis.parts.analyses.encoding import EncodingConfig, list_groups
from braindecode_vis.preprocessing.noise_ceiling import ResponseCeiling
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import make_epochs_study, make_parcel_study, make_study

QUICK = {"n_resamples": 200}


def draw_all(findings):
    return [render_plot(plot.draw, size=plot.size) for plot in findings.plots]


def test_parcels_that_follow_the_image_are_found_and_bounded_by_their_ceiling():
    study = make_parcel_study({"Vis": 1.0, "Default": 0.0}, n_test=40, n_repetitions=4, noise=0.7)
    findings = EncodingConfig(**QUICK).compute(study)
    table = findings.table.set_index("column")
    visual = table[[name.startswith("Vis") for name in table.index]]
    rest = table[[name.startswith("Default") for name in table.index]]
    assert (visual["q_value"] <= 0.05).all()
    assert (visual["value"] > 0.7).all()
    assert (rest["q_value"] > 0.05).all()
    assert (visual["ci_low"] < visual["value"]).all()
    assert (visual["value"] < visual["ci_high"]).all()
    # Four repetitions of unit signal and noise 0.7: the ceiling is near, and values lie about it.
    assert visual["normalised"].mean() == pytest.approx(1, abs=0.1)
    assert rest["normalised"].isna().any()
    assert (visual["explained"] > 0.5).all()
    assert (rest["explained"] < 0.1).all()
    scores = {score.metric.partition("@")[2]: score for score in findings.scores}
    assert set(scores) == {"all", "Vis", "Default"}
    assert scores["Vis"].ci_low > 0.5
    assert scores["Default"].ci_low < 0 < scores["Default"].ci_high
    assert scores["Vis"].noise_ceiling > scores["Default"].noise_ceiling
    assert [plot.name for plot in findings.plots] == ["map_sub-01", "groups"]
    assert all("<svg" in svg for svg in draw_all(findings))
    assert "mean correlation" in findings.summary
    assert findings.summary.startswith("Ridge from planted to each response, fitted on training trials")


def test_a_negative_median_is_a_negative_brain_score():
    """The judge squares it, so that predictions in the wrong direction counted as good ones."""
    share, groups = np.array([0.49, 0.49, 0.49]), {"all": np.array([True, True, True])}
    above, below = (score_groups(sign * np.array([0.1, 0.35, 0.5]), share, groups)["all"] for sign in (1, -1))
    assert above.score == pytest.approx(0.25)
    assert (below.score, below.raw) == (-above.score, -0.35)


def test_brain_scores_rule_over_groups_and_subjects(tmp_path):
    """One penalty for all responses, left-out images, medians, squares, and an error over subjects.

    Brain-Score's own regression (``DualRidgeCVRegression`` of brain-score/vision@c642dbe4) was run beside
    `correlate_predictions` on 60 images of 4 and 300 features and on 100 of 1500: it chose the same penalties, and no
    correlation differs by more than 2e-15. Its ``bootstrap_error`` gives the same error of five subjects to all digits.
    It has ceilings for the mean of 12 repetitions; ours are for as many as the test trials have.
    """
    subjects = ("01", "02", "03")
    study = make_parcel_study(
        {"Vis": 1.0, "Default": 0.0}, n_test=40, n_repetitions=4, noise=0.7, subjects=subjects
    )
    findings = EncodingConfig(**QUICK, judge="brain_score").compute(study)
    (file,) = (file for file in findings.files if file.name == "brain_score.json")
    file.write(tmp_path / file.name)
    found = json.loads((tmp_path / file.name).read_text())
    trials, ceilings = study.responses.trials, findings.table.groupby("subject")["ceiling"]
    scores = {}
    for who in subjects:
        own = (trials["subject"] == who).to_numpy()
        parts = []
        for split in ("train", "test"):
            rows = np.flatnonzero(own & (trials["split"] == split).to_numpy())
            averaged = average_repetitions(study.responses, rows)
            features = study.banks[0].select(list(averaged.stimulus_ids)).vectors.astype(float)
            parts.append((features, averaged.data.astype(float)))
        (x, y), (x_test, y_test) = parts

        def predict(x, y, x_new, penalty):
            left, right = x - x.mean(0), y - y.mean(0)
            weights = np.linalg.solve(left.T @ left + penalty * np.eye(x.shape[1]), left.T @ right)
            return (x_new - x.mean(0)) @ weights + y.mean(0)

        errors = []
        for penalty in PENALTIES:
            kept = ~np.eye(len(x), dtype=bool)  # every image is left out once
            missed = [predict(x[k], y[k], x[~k], penalty) - y[~k] for k in kept]
            errors.append(np.mean(np.square(missed)))
        predicted = predict(x, y, x_test, PENALTIES[int(np.argmin(errors))])
        r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(predicted.T, y_test.T, strict=True)])
        ceiling = ceilings.get_group(who).to_numpy()
        reliable = ceiling**2 > 0.3
        scores[who] = (np.median(r[reliable]) / np.median(ceiling[reliable])) ** 2
        # Rounding of float32 features, whose sums are taken in another order.
        assert found["all"]["subjects"][who]["score"] == pytest.approx(scores[who], rel=1e-6)
    assert found["all"]["score"] == pytest.approx(np.mean(list(scores.values())), rel=1e-6)
    # For a mean, resampling gives the standard error; 200 resamples leave about 5 % of it.
    expected = np.std(list(scores.values())) / np.sqrt(3)
    assert found["all"]["error"] == pytest.approx(expected, rel=0.2)
    assert "Default" not in found or found["Default"]["n_responses"] < found["Vis"]["n_responses"]
    rows = {(row.metric, row.subject): row for row in findings.scores if row.metric.startswith("brain_score")}
    assert rows["brain_score@all", "all"].value == found["all"]["score"]
    assert rows["brain_score@all", "all"].resampled.startswith("standard error over 3 subjects 0.0")
    assert "by Brain-Score's rule 0." in findings.summary
    for change, words in (
        ({"noise_ceiling": None}, "divides by a noise ceiling, which subject 01 does not have"),
        ({}, "one image space on one split, but the run has 1 of them and 2 folds"),
    ):
        asked = (
            replace(study, folds=list(study.folds) * 2, banks=list(study.banks) * 2) if not change else study
        )
        with pytest.raises((ConfigError, DataError), match=words):
            EncodingConfig(**QUICK, judge="brain_score", **change).compute(asked)


def test_noise_is_not_encoded():
    """No signal: every score within its own chance, and no more significant responses than the rate allows."""
    study = make_parcel_study({"Vis": 0.0}, n_parcels=40, n_test=40)
    findings = EncodingConfig(**QUICK).compute(study)
    assert (findings.table["q_value"] <= 0.05).mean() <= 0.05
    assert abs(findings.table["value"].mean()) < 0.06


def test_folds_and_subjects_are_told_apart():
    study = make_parcel_study({"Vis": 1.0}, n_test=20, subjects=("01", "02"), noise=0.5)
    rows = np.arange(study.responses.n_trials)
    ids = study.responses.stimulus_ids.astype(str)
    parts = np.array_split(np.unique(ids), 4)
    folds = [Fold(rows[~np.isin(ids, part)], rows[np.isin(ids, part)]) for part in parts]
    findings = EncodingConfig(**QUICK, noise_ceiling=None).compute(
        replace(study, folds=folds, banks=list(study.banks) * 4)
    )
    assert findings.table.groupby("subject").size().to_dict() == {"01": 8, "02": 8}
    assert (findings.table["n"] == 80).all()
    assert (findings.table["value"] > 0.6).all()
    assert findings.table["ceiling"].isna().all()


def test_channels_and_times_are_mapped(tmp_path):
    study = make_epochs_study(n_times=30, onset=0.1, n_test=30, n_repetitions=4, noise=0.5)
    findings = EncodingConfig(**QUICK, width=0.05).compute(study)
    table = findings.table
    after, active = table["start"] >= 0.1 - 1e-9, table["column"].isin(["O1", "Oz", "O2", "PO7"])
    assert (table[after & active]["value"] > 0.6).all()
    assert abs(table[~after]["value"].mean()) < 0.2
    assert (table[after & active]["ceiling"] > 0.8).all()
    assert len(table) == 16 * 6
    assert {score.metric for score in findings.scores} >= {
        "encoding_correlation@all",
        "encoding_correlation@occipital",
    }
    assert [plot.name for plot in findings.plots] == ["map_sub-01", "times", "groups"]
    draw_all(findings)
    files = {file.name: file for file in findings.files}
    files["encoding_sub-01.npz"].write(tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as maps:
        assert maps["correlation"].shape == (16, 6)
        np.testing.assert_allclose(maps["correlation"].ravel(), table["value"], atol=1e-6)
    import mne

    files["encoding_sub-01-ave.fif"].write(tmp_path / "maps-ave.fif")
    evoked = mne.read_evokeds(tmp_path / "maps-ave.fif", verbose="error")[0]
    assert evoked.data.shape == (16, 6)
    assert evoked.info["sfreq"] == pytest.approx(20)


def test_voxels_become_volumes_and_spaces_are_compared(tmp_path):
    def respond(vectors, generator):
        return np.concatenate([vectors @ generator.normal(size=(4, 9)), np.zeros((len(vectors), 3))], axis=1)

    mask = np.zeros((4, 4, 4), bool)
    mask.ravel()[:12] = True
    coords = {
        "voxel_id": np.arange(12), "mask": mask, "affine": np.diag([2.0, 2.0, 2.0, 1.0]),
    }  # fmt: skip
    study = make_study(respond, ("trial", "voxel"), coords, n_test=30, noise=0.3)
    findings = EncodingConfig(**QUICK, features=({"kind": "pixels"},)).compute(study)
    assert (findings.table["value"] < 0.6).all()  # pixels of noise say nothing
    noise = Embeddings(
        np.random.default_rng(3).normal(size=study.banks[0].vectors.shape), study.banks[0].ids, "noise"
    )
    config = EncodingConfig(**QUICK)
    part = config._fit_subject(study, "01", {"noise": noise, "planted": study.banks[0]}, None, lambda n: None)
    assert (part.shares.argmax(axis=1)[:9] == 1).all()
    assert (part.added[1, :9] > 0.5).all()
    findings = config._report(study, [part], ["noise", "planted"], None)
    assert "spaces" in [plot.name for plot in findings.plots]
    assert set(findings.table["space"]) <= {"noise", "planted"}
    draw_all(findings)
    files = {file.name: file for file in findings.files}
    assert {
        f"encoding_{kind}_sub-01.nii.gz" for kind in ("correlation", "significant", "ceiling", "space")
    } <= set(files)
    files["encoding_correlation_sub-01.nii.gz"].write(tmp_path / "map.nii.gz")
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(np.asarray(image.dataobj).ravel()[:12], part.maps.correlation, atol=1e-6)
    assert not list_groups(study.responses, "01")


def test_what_has_no_meaning_is_refused():
    study = make_parcel_study({"Vis": 1.0})
    with pytest.raises(ConfigError, match="for trials with a time axis"):
        EncodingConfig(**QUICK, width=0.1).compute(study)
    with pytest.raises(DataError, match="decodes categories"):
        EncodingConfig().compute(replace(study, banks=[]))
    few = make_parcel_study({"Vis": 1.0}, n_test=2)
    with pytest.raises(DataError, match="a correlation needs three"):
        EncodingConfig().compute(few)


def test_parcels_over_time_are_mapped_as_series(tmp_path):
    networks = ["Vis", "Vis", "Default", "Default"]

    def respond(vectors, generator):
        out = np.zeros((len(vectors), 4, 3))
        out[:, :2, 1:] = (vectors @ generator.normal(size=(4, 4))).reshape(-1, 2, 2)
        return out

    labels = np.repeat([1, 2, 3, 4], 2).astype(np.int32)
    mask = np.zeros((2, 2, 2), bool) | True
    coords = {
        "parcel_names": ["a", "b", "c", "d"], "parcel_networks": networks, "times": [1.0, 3.0, 5.0],
        "voxel_id": np.arange(8), "voxel_parcel": labels, "mask": mask, "affine": np.eye(4),
    }  # fmt: skip
    study = make_study(respond, ("trial", "parcel", "time"), coords, n_test=30, n_repetitions=4, noise=0.3)
    findings = EncodingConfig(**QUICK).compute(study)
    table = findings.table.set_index(["column", "start"])["value"]
    assert (table[["a", "b"]].drop(1.0, level="start") > 0.8).all()
    assert (table["c"].abs() < 0.6).all()
    assert {score.metric.partition("@")[2] for score in findings.scores} == {"all", "Vis", "Default"}
    assert {"map_sub-01", "times", "groups"} == {plot.name for plot in findings.plots}
    draw_all(findings)
    files = {file.name: file for file in findings.files}
    files["encoding_correlation_sub-01.nii.gz"].write(tmp_path / "map.nii.gz")
    image = nibabel.load(tmp_path / "map.nii.gz")
    assert image.shape == (2, 2, 2, 3)
    np.testing.assert_allclose(np.asarray(image.dataobj)[0, 0, 0], table["a"], atol=1e-6)


def test_what_spaces_add_sums_to_what_they_explain_and_the_protocol_names_no_synthetic_training():
    """Shares of predictions with the response alone summed to more than was explained."""
    study = make_parcel_study({"Vis": 1.0}, n_test=30, noise=2.0)
    rows = np.arange(study.responses.n_trials)
    ids = study.responses.stimulus_ids.astype(str)
    parts = np.array_split(np.unique(ids), 2)
    folds = [Fold(rows[~np.isin(ids, part)], rows[np.isin(ids, part)]) for part in parts]
    study = replace(
        study, folds=folds, banks=list(study.banks) * 2, protocol="planted; trained with more",
        only_trained="trained with more",
    )  # fmt: skip
    bank = study.banks[0]
    spaces = {f"half {n}": Embeddings(bank.flat()[:, n::2], bank.ids, f"half {n}") for n in (0, 1)}
    found = EncodingConfig(**QUICK, noise_ceiling=None)._fit_subject(
        study, "01", spaces, None, lambda n: None
    )
    np.testing.assert_allclose(found.added.sum(axis=0), found.maps.explained, atol=1e-5)
    scores = EncodingConfig(**QUICK, noise_ceiling=None).compute(study).scores
    assert {score.protocol for score in scores} == {"planted"}


def test_every_window_has_a_head_of_its_own(monkeypatch):
    """Of a limited number: neighbouring windows are averaged."""
    import matplotlib.pyplot as plt

    drawn = []

    def draw(values, places, *, axes, **options):
        drawn.append((values, axes))
        return axes.scatter(places[:, 0], places[:, 1], c=values), None

    monkeypatch.setattr("mne.viz.plot_topomap", draw)
    places = np.random.default_rng(0).normal(size=(5, 2))
    windows = [Window(k, k + 1, k / 10, (k + 1) / 10) for k in range(3)]
    grid = np.arange(15.0).reshape(5, 3)
    figure = plt.figure()
    encoding._draw_heads(figure, grid=grid, windows=windows, places=places)
    assert [axes.get_title() for _, axes in drawn] == ["0 to\n100 ms", "100 to\n200 ms", "200 to\n300 ms"]
    assert len({id(axes) for _, axes in drawn}) == 3
    for column, (values, _) in enumerate(drawn):
        np.testing.assert_array_equal(values, grid[:, column])
    plt.close(figure)


def test_a_correlation_is_divided_by_a_ceiling_that_is_high_enough():
    share = np.array([0.25**2, 0.25, 1.0, 0.0, -0.5])
    ceiling = ResponseCeiling("01", share, 0.1, 0.4, "ours", 30, 3.0)
    correlation = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    for least, wanted in (
        (0.25, [0.4, 0.4, 0.3, np.nan, np.nan]),  # one that is just high enough is
        (0.3, [np.nan, 0.4, 0.3, np.nan, np.nan]),
    ):
        one = Mock(spec=encoding._Subject, ceiling=ceiling, maps=Mock(correlation=correlation))
        config = replace_constants(EncodingConfig, least_ceiling=least)()
        np.testing.assert_allclose(config._normalise(one), wanted)
