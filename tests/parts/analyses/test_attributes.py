"""Attributes against time and place: planted stages come back in their order."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.parts.analyses.attributes import AttributesConfig, find_decodable, find_rises
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import TEN_TWENTY, make_parcel_study, make_study

TIMES = -0.1 + np.arange(40) / 100
ONSETS = {"edges": 0.05, "colour": 0.1, "animacy": 0.2}


def make_staged_study(folder, *, gain=2.0, **options):
    """Return trials in which the sign of each feature is planted as an attribute from a time of its own."""

    def respond(vectors, generator):
        out = np.zeros((len(vectors), len(TEN_TWENTY), len(TIMES)))
        for number, onset in enumerate(ONSETS.values()):
            pattern = generator.standard_normal(len(TEN_TWENTY))
            active = (onset - 1e-9 <= TIMES).astype(float)
            out += gain * np.sign(vectors[:, number])[:, None, None] * pattern[:, None] * active
        return out

    coords = {"ch_names": list(TEN_TWENTY), "times": TIMES, "sfreq": 100.0}
    study = make_study(
        respond, ("trial", "channel", "time"), coords, n_train=80, n_test=40, noise=3.0, **options
    )
    signs = np.sign(study.banks[0].vectors)
    table = pd.DataFrame({name: np.where(signs[:, k] > 0, "high", "low") for k, name in enumerate(ONSETS)})
    table["nothing"] = np.where(signs[:, 3] > 0, "yes", "no")
    table["constant"] = "same"
    table.insert(0, "id", study.stimuli.ids)
    path = folder / "attributes.csv"
    table.to_csv(path, index=False)
    return study, path


def test_planted_stages_are_found_in_their_order(tmp_path):
    study, path = make_staged_study(tmp_path)
    found = replace_constants(AttributesConfig, alphas=(10.0,))(
        attributes=path, width=0.04, step=0.02
    ).compute(replace(study, n_permutations=200, n_bootstrap=100))
    first = found.table.groupby("attribute").first()
    for name, onset in ONSETS.items():
        # A window that ends at the onset holds no sample of it; the next one does.
        assert onset - 0.02 <= first.loc[name, "onset"] <= onset + 0.061
        assert abs(first.loc[name, "rise"] - onset) <= 0.041
        assert first.loc[name, "rise_low"] <= first.loc[name, "rise"] <= first.loc[name, "rise_high"]
        before = found.table[(found.table["attribute"] == name) & (found.table["stop"] <= onset + 1e-9)]
        assert not before["significant"].any()
    assert first.loc["edges", "rise"] < first.loc["colour", "rise"] < first.loc["animacy", "rise"]
    assert first.loc["nothing", "p_holm"] > 0.05
    assert np.isnan(first.loc["nothing", "onset"])
    assert "In the order of their rise: edges, colour, animacy." in found.summary
    assert "Not different from chance: nothing." in found.summary
    assert "Left out: constant (one value among training images)." in found.summary
    assert [score.metric for score in found.scores] == [f"auc@{name}_peak" for name in [*ONSETS, "nothing"]]
    assert all(render_plot(plot.draw) for plot in found.plots)


def test_the_area_of_whole_trials_is_that_of_scikit_learn(tmp_path):
    study, path = make_staged_study(tmp_path, gain=0.3)
    config = replace_constants(AttributesConfig, alphas=(100.0,))(
        attributes=path, names=("edges",), over="whole"
    )
    found = config.compute(study).table.iloc[0]
    train, test = study.pick(study.folds[0].train, "train"), study.pick(study.folds[0].test, "test")
    x, new = train.as_matrix(), test.as_matrix()
    mean, spread = x.mean(axis=0), x.std(axis=0)
    x, new = (x - mean) / spread, (new - mean) / spread
    signs = {
        name: float(v) for name, v in zip(study.stimuli.ids, study.banks[0].vectors[:, 0] > 0, strict=True)
    }
    y = np.array([signs[i] for i in train.stimulus_ids])
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    assert found["value"] == pytest.approx(
        roc_auc_score([signs[i] for i in test.stimulus_ids], new @ weights)
    )
    assert found["ci_low"] < found["value"] < found["ci_high"]


def test_repetitions_and_images_of_a_concept_are_one_item(tmp_path):
    study, path = make_staged_study(tmp_path, averaged=False)
    asked, left_out = find_decodable(study, read_attributes(path), strict=False)
    assert left_out == ["constant (one value among training images)"]
    assert not asked.shared  # images of a concept have other signs
    config = replace_constants(AttributesConfig, alphas=(10.0,))(
        attributes=path, names=("edges",), over="whole"
    )
    assert config.compute(study).table["n"].iloc[0] == 40
    concepts = ["animal_cat", "animal_dog", "tool_saw", "tool_axe"]
    path.write_text(
        "concept,alive\n" + "\n".join(f"{c},{'yes' if 'animal' in c else 'no'}" for c in concepts)
    )
    assert (
        replace_constants(AttributesConfig, alphas=(10.0,))(attributes=path, over="whole")
        .compute(study)
        .table["n"]
        .iloc[0]
        == 4
    )


def test_sensors_tell_where_and_parcels_only_as_a_whole(tmp_path):
    study, path = make_staged_study(tmp_path)
    table = (
        replace_constants(AttributesConfig, alphas=(10.0,))(attributes=path, names=("edges",), over="sensors")
        .compute(study)
        .table
    )
    assert {"occipital", "frontal", "whole trial"} <= set(table["place"])
    assert {"p_holm", "p_fdr", "significant"} <= set(table.columns)
    parcels = make_parcel_study({"visual": 1.0, "default": 0.0}, n_train=80, n_test=40)
    found = replace_constants(AttributesConfig, alphas=(10.0,))(attributes=path, names=("nothing",)).compute(
        parcels
    )
    assert found.table["place"].tolist() == ["whole trial"]


def test_what_cannot_be_decoded_is_said(tmp_path):
    study, path = make_staged_study(tmp_path)
    with pytest.raises(DataError, match=r"'constant' has only the value 'same' among 80 training images"):
        AttributesConfig(attributes=path, names=("constant",)).compute(study)
    with pytest.raises(DataError, match="no attribute 'colours'"):
        AttributesConfig(attributes=path, names=("colours",)).check_files()
    table = pd.read_csv(path)
    table["id"] = "x" + table["id"]
    table.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"have none of the 80 images .* another data set"):
        AttributesConfig(attributes=path).compute(study)
    table["id"] = study.stimuli.ids
    table.loc[0, "edges"] = "odd"
    table.to_csv(path, index=False)
    assert find_decodable(study, read_attributes(path), strict=False)[1] == [
        "1 value(s) of edges that too few training images show", "constant (one value among training images)",
    ]  # fmt: skip
    path.write_text("id,constant\n" + "\n".join(f"{i},same" for i in study.stimuli.ids))
    with pytest.raises(DataError, match=r"no attribute of the table \(constant\) has two values"):
        AttributesConfig(attributes=path).compute(study)
    with pytest.raises(DataError, match="needs to know which image was seen"):
        AttributesConfig(attributes=path).compute(replace(study, banks=[]))


def test_a_rise_lasts_for_two_windows():
    curves = np.array(
        [[0.5, 0.9, 0.4, 0.8, 1.0, 0.9], [0.5, 0.5, 0.5, 0.9, 0.5, 0.5], [0.5, 0.8, 0.9, 0.5, 0.9, 1.0]]
    )
    assert find_rises(curves).tolist() == [3, 3, 1]


@pytest.mark.slow
def test_few_attributes_are_found_where_there_is_none(tmp_path):
    """Of twenty studies of noise, with four attributes each, about one has an attribute by Holm."""
    n_found = 0
    for seed in range(20):
        study, path = make_staged_study(tmp_path, gain=0.0, seed=seed, n_permutations=200, n_bootstrap=20)
        table = (
            replace_constants(AttributesConfig, alphas=(1000.0,))(attributes=path, width=0.1, step=0.05)
            .compute(study)
            .table
        )
        n_found += bool(table["significant"].any())
    assert n_found <= 4
