"""Confusions, geometry, failures, repetitions and similarity of geometries."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import write_responses
from braindecode_vis.parts.analyses.confusion import ConfusionConfig, decide, tabulate_confusions
from braindecode_vis.parts.analyses.failures import FailuresConfig
from braindecode_vis.parts.analyses.hubness import HubnessConfig
from braindecode_vis.parts.analyses.repetitions import RepetitionsConfig
from braindecode_vis.parts.analyses.rsa import RsaConfig, find_responses
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import make_epochs_study, make_parcel_study, make_study
from tests.parts.analyses.test_window_categories import make_category_study


def make_concept_study(**options):
    """Return a study in which the two animals have nearly one embedding, and so have the two tools."""
    study = make_parcel_study({"Vis": 1.0}, n_test=24, **options)
    bank = study.banks[0]
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((2, bank.vectors.shape[1])) * 3
    category = np.array([n % 4 // 2 for n in range(len(bank))])
    vectors = (centres[category] + bank.vectors).astype(np.float32)
    mixing = generator.standard_normal((bank.vectors.shape[1], 8))
    bank = replace(bank, vectors=vectors)
    clean = bank.select(list(study.responses.stimulus_ids)).vectors @ mixing
    noise = np.random.default_rng(4).standard_normal(clean.shape)
    data = (clean + 5.0 * noise).astype(np.float32)
    responses = Responses(data, study.responses.dims, study.responses.trials, "z", {})
    encoder = study.build(0).fit(
        responses.select(study.folds[0].train),
        bank.select(list(responses.stimulus_ids[study.folds[0].train])),
    )
    return replace(
        study,
        responses=responses,
        banks=[bank],
        pick=lambda rows, part: responses.select(rows),
        trained=lambda number: encoder,
    )


def test_confusions_stay_within_the_planted_categories(tmp_path):
    study = make_concept_study()
    path = tmp_path / "categories.csv"
    rows = pd.DataFrame(
        {
            "concept": ["animal_cat", "animal_dog", "tool_saw", "tool_axe"],
            "category": ["animal", "animal", "tool", "tool"],
        }
    )
    rows.to_csv(path, index=False)
    same = ConfusionConfig(categories=path)
    found = same.compute(study)
    table = found.table.set_index(["seen", "decoded"])
    assert table.loc[("all", "same"), "value"] > 0.9
    assert table.loc[("all", "same"), "p_value"] < 0.01
    assert table.loc[("animal", "animal"), "value"] > 0.85
    concepts = ConfusionConfig().compute(study).table.set_index(["seen", "decoded"])
    assert (
        concepts.loc[("animal_cat", "animal_dog"), "value"]
        > concepts.loc[("animal_cat", "tool_saw"), "value"] + 0.1
    )
    assert same.hashed_fields()["categories_sha256"]
    rows.head(3).to_csv(path, index=False)
    with pytest.raises(DataError, match="tool_axe"):
        ConfusionConfig(categories=path).compute(study)
    with pytest.raises(ConfigError, match="no column"):
        ConfusionConfig(column="kind").compute(study)
    assert render_plot(found.plots[0].draw)


def test_confusions_of_a_category_decoder():
    study = make_category_study(classes=("a", "b", "c"), gain=2.0, n_runs=3, n_trials=30)
    found = ConfusionConfig().compute(study)
    decided = decide(study)
    cells = found.table[found.table["decoded"] != "same"].pivot(
        index="seen", columns="decoded", values="count"
    )
    pd.testing.assert_frame_equal(
        cells, pd.crosstab(decided["seen"], decided["decoded"]), check_names=False, check_like=True
    )
    overall = found.table[found.table["seen"] == "all"].iloc[0]
    assert overall["value"] > 0.6
    assert overall["chance"] == pytest.approx(1 / 3, abs=0.02)
    assert overall["p_value"] < 0.01


def test_labels_that_say_nothing_have_large_p_values():
    study = make_parcel_study({"Vis": 1.0})
    generator = np.random.default_rng(0)
    p_values = []
    for _ in range(20):
        decided = pd.DataFrame(
            {
                "id": [str(n) for n in range(40)],
                "cluster": [str(n) for n in range(40)],
                "subject": "1",
                "seen": generator.permutation(list("ab") * 20),
                "decoded": generator.permutation(list("ab") * 20),
                "block": "1",
            }
        )
        p_values.append(tabulate_confusions(study, decided, ["a", "b"])[1]["p_value"])
    assert sum(p <= 0.05 for p in p_values) <= 5  # once in four thousand by chance
    assert np.mean(p_values) > 0.3


def test_good_predictions_have_the_geometry_of_the_targets():
    good, weak = (
        make_parcel_study({"Vis": 1.0}, noise=noise, n_test=40, n_features=8) for noise in (0.1, 8.0)
    )
    tables = [
        replace_constants(HubnessConfig, k=5, n_resamples=50)().compute(s).table.set_index("quantity")
        for s in (good, weak)
    ]
    assert tables[0].loc["matching_cosine", "value"] > 0.9 > tables[1].loc["matching_cosine", "value"]
    assert tables[0].loc["effective_dimension", "value"] == pytest.approx(
        tables[0].loc["effective_dimension", "reference"], rel=0.3
    )
    own = tables[0].loc["matching_cosine"]
    assert own["ci_low"] <= own["value"] <= own["ci_high"]
    assert own["reference"] == pytest.approx(1)
    assert tables[0].loc["largest_share", "reference"] >= 1 / 40
    assert render_plot(replace_constants(HubnessConfig, k=5, n_resamples=50)().compute(good).plots[0].draw)


def test_the_planted_failure_is_the_worst():
    study = make_parcel_study({"Vis": 1.0}, noise=0.3, n_test=12)
    data = np.array(study.responses.data)
    ids = study.responses.stimulus_ids
    data[ids == "test005"] = data[ids == "test007"]  # shown the one, responded to the other
    broken = Responses(data, study.responses.dims, study.responses.trials, "z", {})
    found = replace_constants(FailuresConfig, n_shown=3)().compute(
        replace(study, responses=broken, pick=lambda rows, part: broken.select(rows))
    )
    worst = found.table.iloc[0]
    assert worst["stimulus_id"] == "test005"
    assert worst["taken_for"] == "test007"
    assert worst["n"] == 2
    named = found.table.set_index("stimulus_id")["named_wrongly"]
    assert named["test007"] == 2
    assert render_plot(found.plots[0].draw)
    blind = StimulusSet(study.stimuli.table.assign(path="nowhere.png"))
    assert render_plot(FailuresConfig().compute(replace(study, stimuli=blind)).plots[0].draw)


def test_more_repetitions_decode_better_and_all_are_the_average():
    study = make_parcel_study({"Vis": 1.0}, noise=4.0, n_repetitions=8, n_train=100, n_test=20)
    found = replace_constants(RepetitionsConfig, n_draws=6)(metric="two_way").compute(study)
    assert found.table["repetitions"].tolist() == [1, 2, 4, 8]
    assert found.table["value"].is_monotonic_increasing
    from braindecode_vis.parts.analyses.measure import Meter

    whole = Meter(study, "two_way").measure_fold(0, study.pick(study.folds[0].test, "test"), study.trained(0))
    assert found.table["value"].iloc[-1] == pytest.approx(whole.values.mean())
    assert found.table["n_draws"].tolist() == [6, 6, 6, 1]
    with pytest.raises(DataError, match="shown only once"):
        RepetitionsConfig().compute(make_parcel_study({"Vis": 1.0}, n_repetitions=1))


def make_pair_study(noise=(0.3, 0.3, 6.0)):
    """Return three people who share a geometry, the last one under much noise."""

    def respond(vectors, generator):
        own = np.concatenate(
            [part @ generator.standard_normal((4, 12)) for part in np.array_split(vectors, 3)]
        )
        scale = np.repeat(noise, len(vectors) // 3)[:, None]
        return own + scale * np.random.default_rng(9).standard_normal(own.shape)

    return make_study(respond, ("trial", "voxel"), {}, noise=0.0, subjects=("a", "b", "c"), n_test=20)


def test_subjects_and_models_share_the_planted_geometry(tmp_path):
    study = make_pair_study()
    found = replace_constants(RsaConfig, n_resamples=100)(distance="euclidean").compute(study)
    pairs = found.table[found.table["first"] != "all subjects"].set_index(["first", "second"])
    assert pairs["value"].idxmax() == ("subject a", "subject b")
    assert pairs.loc[("subject a", "subject b"), "p_value"] < 0.02
    model = found.table[found.table["second"] == "model planted"].iloc[0]
    assert model["value"] > 0.3
    assert model["ceiling_low"] <= model["ceiling_high"]
    assert render_plot(found.plots[0].draw)
    # Another recording of the same images, in another modality.
    other = make_parcel_study({"Vis": 1.0}, noise=0.3, n_test=20)
    write_responses(tmp_path / "preprocess" / "responses", other.responses)
    config = replace_constants(RsaConfig, n_resamples=100)(distance="euclidean", other=tmp_path)
    fused = config.compute(study).table
    assert fused.loc[fused["second"] == "other 01", "value"].item() > 0.3
    assert "other_sha256" in config.hashed_fields()
    assert list(config.other) == [tmp_path]
    with pytest.raises(DataError, match="0 folders"):
        find_responses(tmp_path / "nothing")


def test_several_recordings_are_compared_in_the_same_windows_and_region_by_region(tmp_path):
    """EEG, MEG and fMRI of one person: both follow the planted geometry from 0.1 s on, of fMRI one network does."""
    study = make_epochs_study(n_test=24, noise=0.3)
    meg = make_epochs_study(n_test=24, noise=0.3, sfreq=50.0, n_times=20, active=(1, 2, 3))
    fmri = make_parcel_study({"Vis": 1.0, "Limbic": 0.0}, noise=0.3, n_test=24)
    for name, other in (("meg", meg), ("fmri", fmri)):
        write_responses(tmp_path / name / "responses", other.responses)
    kind = replace_constants(RsaConfig, n_resamples=100)
    config = kind(
        distance="euclidean", other=(tmp_path / "meg", tmp_path / "fmri"), regions=True, width=0.1, step=0.1
    )
    found = config.compute(study)
    table = found.table.set_index(["second", "start"])["value"]
    for name in ("other meg 01", "other fmri 01 Vis"):
        early, late = (table[name][np.isclose(table[name].index, start)].item() for start in (-0.1, 0.2))
        assert late > 0.4 > 0.2 > abs(early)
    assert table["other fmri 01 Limbic"].abs().max() < 0.3
    assert render_plot(found.plots[0].draw)
    assert len(config.hashed_fields()["other_sha256"]) == 2
    with pytest.raises(ValidationError, match="name its folder in other"):
        RsaConfig(regions=True)
    with pytest.raises(DataError, match="two of the other runs"):
        kind(other=(tmp_path / "meg", tmp_path / "meg")).compute(study)


def test_the_matrix_shows_the_most_frequent_classes():
    found = replace_constants(ConfusionConfig, max_classes=2)().compute(make_concept_study())
    assert found.plots
    assert len(set(found.table["seen"]) - {"all"}) >= 2
    assert (
        replace_constants(ConfusionConfig, max_classes=2)().hashed_fields()
        == ConfusionConfig().hashed_fields()
    )
