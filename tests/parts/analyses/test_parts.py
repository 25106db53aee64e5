"""Bands, regions, networks: the planted part is found, and random parts of the same size are not mistaken for it."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.analyses import measure
from braindecode_vis.parts.analyses.bands import BandFilter, FrequencyBandsConfig, fit_bands
from braindecode_vis.parts.analyses.cuts import keep_features
from braindecode_vis.parts.analyses.generalization import TimeGeneralizationConfig
from braindecode_vis.parts.analyses.measure import Measured, Meter, add_holm, add_maximum, measure_changes
from braindecode_vis.parts.analyses.regions import (
    NetworkAblationConfig,
    RoisConfig,
    SensorRegionsConfig,
    list_rois,
    relabel_features,
)
from braindecode_vis.parts.analyses.study import rank_trials
from braindecode_vis.preprocessing.array_file import KeptParts
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.report.figures import render_plot
from braindecode_vis.report.sensor_groups import assign_regions, find_region, place_regions
from tests.constants import replace_constants
from tests.parts.analyses.planted import TEN_TWENTY, make_epochs_study, make_parcel_study, make_study


def make_rhythm_study(band=(8.0, 13.0), **options):
    """Return trials in which the embedding sets the amplitudes of a sine and a cosine within a band."""
    sfreq = 100.0
    times = np.arange(100) / sfreq

    def respond(vectors, generator):
        frequency = np.mean(band)
        waves = np.stack([np.sin(2 * np.pi * frequency * times), np.cos(2 * np.pi * frequency * times)])
        mixing = generator.standard_normal((vectors.shape[1], 4 * 2))
        return np.einsum("nf,fcw,wt->nct", vectors, mixing.reshape(-1, 4, 2), waves)

    coords = {"ch_names": ["O1", "O2", "Oz", "POz"], "times": times, "sfreq": sfreq}
    return make_study(respond, ("trial", "channel", "time"), coords, **options)


def test_the_planted_band_is_found():
    study = make_rhythm_study(noise=2.0, n_train=40)
    found = FrequencyBandsConfig(
        metric="two_way", bands={"delta": (0.5, 4.0), "alpha": (8, 13), "beta": (18, 30), "gamma": (60, 80)}
    ).compute(study)
    table = found.table.set_index(["mode", "band"])
    assert "gamma" in found.summary
    assert ("only", "gamma") not in table.index  # above half the sampling rate
    assert table.loc["only"]["value"].idxmax() == "alpha"
    assert table.loc["without"]["value"].idxmin() == "alpha"
    assert table.loc[("only", "alpha"), "value"] > 0.85
    assert table.loc[("only", "alpha"), "p_value"] < 0.01
    assert table.loc[("without", "alpha"), "difference_high"] < 0
    # Three bands competed: the smallest p counts three times.
    assert table.loc[("only", "alpha"), "p_holm"] == pytest.approx(
        3 * table.loc[("only", "alpha"), "p_value"]
    )
    lost = table.loc[("without", "alpha")]
    assert lost["p_holm"] == pytest.approx(3 * lost["p_difference"])
    assert "by Holm over 3 bands" in found.summary
    assert abs(table.loc[("only", "beta"), "value"] - 0.5) < 0.17
    assert render_plot(found.plots[0].draw)


def test_band_filters_keep_a_sine_inside_and_remove_it_outside():
    times = np.arange(200) / 100
    wave = np.sin(2 * np.pi * 10 * times)[None, None]
    trials = make_epochs_study().responses.trials.head(1)
    coords = {"times": times, "ch_names": ["Oz"]}
    response = Responses(wave.astype(np.float32), ("trial", "channel", "time"), trials, "V", coords)
    middle = slice(30, 170)
    only = BandFilter((8, 13), 100.0, "only")(response).data
    without = BandFilter((8, 13), 100.0, "without")(response).data
    other = BandFilter((20, 30), 100.0, "only")(response).data
    assert np.abs(only - wave)[..., middle].max() < 0.12  # phase and amplitude are kept
    assert np.abs(without)[..., middle].max() < 0.12
    assert np.abs(other)[..., middle].max() < 0.02
    with pytest.raises(ConfigError, match="no band"):
        fit_bands({"gamma": (60.0, 80.0)}, 100.0)
    with pytest.raises(ValueError, match="lower"):
        FrequencyBandsConfig(bands={"x": (4, 2)})


def test_sensor_names_and_positions_agree():
    assert [find_region(n) for n in ("Fp1", "FC3", "FT8", "TP9", "CPz", "PO8", "Iz", "C5")] == [
        "frontal", "central", "temporal", "temporal", "parietal", "occipital", "occipital", "central",
    ]  # fmt: skip
    assert find_region("EXG1") is None
    import mne

    places = mne.channels.make_standard_montage("biosemi64").get_positions()["ch_pos"]
    points = np.stack(list(places.values()))
    found = place_regions(points, points)
    same = [a == find_region(b) for a, b in zip(found, places, strict=True)]
    assert np.mean(same) > 0.9  # another cap than the one whose directions are compared


def test_channels_without_a_name_need_a_position():
    study = make_epochs_study()
    coords = {**study.responses.coords, "ch_names": ["E1", *TEN_TWENTY[1:]]}
    data = study.responses.data
    strange = Responses(data, study.responses.dims, study.responses.trials, "V", coords)
    with pytest.raises(DataError, match="neither a name"):
        assign_regions(strange)
    import mne

    places = mne.channels.make_standard_montage("biosemi64").get_positions()["ch_pos"]
    positions = np.stack([places["Oz"], *[places[n] for n in TEN_TWENTY[1:]]])
    placed = Responses(
        data, study.responses.dims, study.responses.trials, "V", {**coords, "ch_pos": positions}
    )
    assert assign_regions(placed)[0] == "occipital"


def test_the_planted_region_comes_first():
    study = make_epochs_study(active=(12, 13, 14, 15), onset=0.0, n_times=20)  # O1, Oz, O2, PO7
    found = SensorRegionsConfig(metric="two_way", n_random=6).compute(study)
    table = found.table.set_index(["mode", "group"])
    only, without = table.loc["only"], table.loc["without"]
    assert only["value"].idxmax() == "occipital"
    assert only.loc["occipital", "n_columns"] == 4
    assert only.loc["occipital", "versus_low"] > 0  # better than random sensors, item by item
    assert without["value"].idxmin() == "occipital"
    assert without.loc["occipital", "difference_high"] < 0
    assert abs(only.loc["frontal", "value"] - 0.5) < 0.2
    assert only.loc["occipital", "p_random"] == pytest.approx(1 / 7)
    assert {"value", "ci_low", "ci_high", "chance", "n", "p_value"} <= set(found.table.columns)
    assert render_plot(found.plots[0].draw, theme="dark")


def test_networks_are_ranked_as_planted():
    gains = {"Vis": 1.0, "DorsAttn": 0.45, "Default": 0.2, "Limbic": 0.0}
    found = NetworkAblationConfig(n_random=6).compute(
        make_parcel_study(gains, noise=2.0, n_train=100, n_test=30)
    )
    table = found.table.set_index(["mode", "group"])
    assert table.loc["only"]["value"].sort_values(ascending=False).index.tolist() == list(gains)
    assert table.loc["without"]["value"].idxmin() == "Vis"
    assert table.loc[("only", "Vis"), "versus_low"] > 0
    assert table.loc[("only", "Limbic"), "versus_high"] < 0
    assert table.loc[("only", "Limbic"), "ci_low"] < 0.5 < table.loc[("only", "Limbic"), "ci_high"]


def test_a_relabelling_moves_all_groups_together():
    """Sets drawn one by one overlap, and the best of them is no match for the best of disjoint networks."""
    groups = {"a": np.repeat([True, False, False], 4), "b": np.repeat([False, True, False], 4)}
    for draw in (1, 2):
        moved = {name: relabel_features(mask, 0, draw) for name, mask in groups.items()}
        assert [int(mask.sum()) for mask in moved.values()] == [4, 4]
        assert not (moved["a"] & moved["b"]).any()
        assert (moved["a"] != relabel_features(groups["a"], 0, 3)).any()
    assert relabel_features(groups["a"], 0, 0) is groups["a"]


def test_the_best_network_is_compared_with_the_best_of_each_relabelling():
    study, built = make_parcel_study(dict.fromkeys("abc", 1.0), noise=6.0, n_train=20), []
    study = replace(
        study, build=lambda number: built.append(number) or RidgeConfig(alphas=(10.0,)).build(seed=0)
    )
    found = NetworkAblationConfig(n_random=4).compute(study)
    assert len(built) == 1 + 3 * 2 * (1 + 4)  # everything; each network alone and left out, as drawn
    own = found.table[found.table["mode"] != "all"]
    assert set(np.round(own["p_random"] * 5, 9)) <= {1, 2, 3, 4, 5}
    for words in ("corrected for all 3 groups", "0.73 to 0.84", "In 4 relabellings of all parcels"):
        assert words in found.summary


class Stopped(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize(
    "analysis", [NetworkAblationConfig(n_random=2), TimeGeneralizationConfig(width=0.1, step=0.1)]
)
def test_a_stopped_analysis_goes_on_to_the_same_table(analysis, tmp_path):
    """An ablation with a network was up to 295 trainings, eleven hours, of which a kill left nothing."""
    is_ablation = isinstance(analysis, NetworkAblationConfig)
    options = {"n_train": 20, "n_test": 12, "n_repetitions": 1, "n_permutations": 50}
    study = (
        make_parcel_study({"a": 1.0, "b": 0.5}, **options) if is_ablation else make_epochs_study(**options)
    )
    (fold,) = study.folds
    # Two galleries: each has permutations of its own, whichever fits are skipped.
    study = replace(
        study, folds=[Fold(fold.train, fold.test[:5]), Fold(fold.train, fold.test[5:])], banks=study.banks * 2
    )
    expected, n_fits, built = analysis.compute(study).table, 0, 0

    def build(number):
        nonlocal built
        if built == n_fits:
            raise Stopped
        built += 1
        return study.build(number)

    def compute():
        return analysis.compute(replace(study, build=build, kept=KeptParts(tmp_path / "work"))).table

    for n_fits in (2, 5):  # noqa: B007 (read by `build`)
        with pytest.raises(Stopped):
            compute()
    assert built == len(list((tmp_path / "work").iterdir())) == 5
    n_fits = -1
    pd.testing.assert_frame_equal(compute(), expected, check_exact=True)
    total = built
    # One that was damaged is fitted again, and nothing else.
    next((tmp_path / "work").iterdir()).write_bytes(b"PK half a file")
    pd.testing.assert_frame_equal(compute(), expected, check_exact=True)
    assert built == total + 1


def test_a_gallery_that_is_too_large_has_no_p_value_instead_of_a_table_that_does_not_fit(monkeypatch):
    study = make_parcel_study({"a": 1.0, "b": 0.5}, n_train=20)
    assert measure_changes(study, {"all": None}, "top1")["all"].p_value is not None
    monkeypatch.setattr(measure, "LARGEST_GALLERY", 3)
    assert measure_changes(study, {"all": None}, "top1")["all"].p_value is None


def test_two_questions_of_one_analysis_are_kept_apart(tmp_path):
    """The same changes by another metric, as an analysis from outside may ask, are not answered by the first ones."""
    study = make_parcel_study({"a": 1.0, "b": 0.5}, n_train=20, noise=3.0)
    kept = replace(study, kept=KeptParts(tmp_path))
    for metric in ("top1", "two_way"):
        found, expected = (measure_changes(each, {"all": None}, metric)["all"] for each in (kept, study))
        np.testing.assert_array_equal(found.values, expected.values)


def test_the_cost_of_refits_is_told_first(tmp_path):
    """Hours of trainings began without a word; now their number and their time come first, and the bar has a total."""
    told, bars = [], []

    @contextmanager
    def progress(description, total):
        told.append("bar")
        bars.append((description, total))
        yield lambda n: None

    study = make_parcel_study({"a": 1.0, "b": 0.5}, n_train=20)
    study = replace(study, tell=told.append, progress=progress)
    NetworkAblationConfig(n_random=2).compute(study)
    assert told == ["bar"]  # less than a minute
    NetworkAblationConfig(n_random=2).compute(replace(study, fit_seconds=600.0, kept=KeptParts(tmp_path)))
    assert told[1].startswith("network ablation: 13 fits; they take about 2.2 h, at 10 min each")
    assert bars[-1] == ("network ablation", 13)
    for path in list(tmp_path.iterdir())[:2]:
        path.unlink()
    NetworkAblationConfig(n_random=2).compute(replace(study, fit_seconds=6000.0, kept=KeptParts(tmp_path)))
    assert "13 fits, of which 11 are kept from an earlier call; the others take about 3.3 h" in told[-2]
    assert bars[-1] == ("network ablation", 2)


def test_the_named_of_many_is_corrected_for_their_number():
    """The best of several rows had the p-value of a single one."""
    table = pd.DataFrame({"part": list("aaabb"), "p_value": [0.01, 0.04, np.nan, 0.03, 0.5]})
    np.testing.assert_allclose(add_holm(table, "part")["p_holm"], [0.02, 0.04, np.nan, 0.06, 0.5])
    nulls = np.array([[3.0, 2, 6], [4, 4, 7], [2, 3, 8], [5, 1, 5]])
    rows = [{"name": n, "observed": v, "null": nulls[:, n]} for n, v in enumerate((5.0, 3.0, 9.0))]
    assert add_maximum(rows) == [
        {"name": n, "p_maximum": pytest.approx(p)} for n, p in enumerate((0.6, 0.8, 0.2))
    ]
    assert np.isnan(add_maximum([{"observed": 1.0, "null": None}])[0]["p_maximum"])
    assert add_maximum([]) == []


def test_differences_draw_by_the_seed_and_the_number_of_resamples_of_the_study():
    """Another seed of the run drew the same resamples and signs."""
    rng, ids = np.random.default_rng(0), np.arange(24).astype(str)
    own, other = (
        Measured(rng.random(24) + shift, ids, np.full(24, "01"), ids, chance=0.5, observed=0.0, null=None)
        for shift in (0.2, 0.0)
    )
    study = make_parcel_study({"a": 1.0}, n_train=4, n_bootstrap=300)
    studies = [replace(study, seed=seed) for seed in (0, 1, 1)]
    rows = [own.as_row(each) | own.as_difference(each, other) for each in studies]
    assert rows[1] == rows[2]
    for name in ("ci_low", "ci_high", "difference_low", "difference_high", "p_difference"):
        assert rows[0][name] != rows[1][name], name
        assert rows[0][name] == pytest.approx(rows[1][name], abs=0.1), name
    assert all(row["p_difference"] * 301 == pytest.approx(round(row["p_difference"] * 301)) for row in rows)


@pytest.mark.slow
def test_networks_hold_their_level_without_signal():
    """Four networks in four studies of noise: more than four of 16 p-values below 0.05 come once in a thousand."""
    n_found, n_all = 0, 0
    for seed in range(4):
        study = make_parcel_study(
            dict.fromkeys("abcd", 0.0), seed=seed, n_train=30, n_permutations=200, n_bootstrap=100
        )
        table = NetworkAblationConfig(n_random=0).compute(study).table
        own = table[table["mode"] == "only"]
        n_found, n_all = n_found + int((own["p_value"] <= 0.05).sum()), n_all + len(own)
    assert n_found <= binom.ppf(0.999, n_all, 0.05)


def test_networks_need_parcels():
    with pytest.raises(DataError, match="parcels"):
        NetworkAblationConfig().compute(make_epochs_study())


def make_voxel_study(**options):
    """Return 40 voxels: the first ten are V1 and follow the embedding, ten are FFA, the rest has no name."""
    labels = np.repeat([1, 2, 0, 0], 10)

    def respond(vectors, generator):
        mixing = generator.standard_normal((vectors.shape[1], 40))
        return vectors @ mixing * (labels == 1)

    coords = {
        "voxel_id": np.arange(40),
        "roi_visual": labels.astype(np.int16),
        "roi_names": {"visual": {"1": "V1", "2": "FFA"}},
    }
    return make_study(respond, ("trial", "voxel"), coords, **options)


def test_the_planted_roi_comes_first():
    study = make_voxel_study(noise=1.5)
    assert set(list_rois(study.responses, None)) == {"V1", "FFA"}
    found = RoisConfig(metric="two_way", n_random=5).compute(study)
    table = found.table.set_index(["mode", "group"])
    assert table.loc[("only", "V1"), "value"] > 0.85
    assert abs(table.loc[("only", "FFA"), "value"] - 0.5) < 0.2
    assert table.loc[("without", "V1"), "value"] < table.loc[("without", "FFA"), "value"]
    with pytest.raises(ConfigError, match="did you mean 'FFA'"):
        RoisConfig(include=("FFa",)).compute(study)
    with pytest.raises(DataError, match="two groups"):
        RoisConfig(include=("V1",)).compute(study)


def test_padded_subjects_keep_their_own_voxels():
    """Two people with 20 and 30 voxels, padded: V1 lies elsewhere in each."""
    labels = {"a": np.repeat([1, 2], 10), "b": np.repeat([2, 1, 2], 10)}
    coords: dict = {"subjects": ["a", "b"], "n_voxels_of": {"a": 20, "b": 30}}
    for name, own in labels.items():
        coords |= {
            f"voxel_id_sub-{name}": np.arange(len(own)), f"roi_v_sub-{name}": own.astype(np.int16),
            f"roi_names_sub-{name}": {"v": {"1": "V1", "2": "FFA"}},
        }  # fmt: skip

    def respond(vectors, generator):
        out, half = np.zeros((len(vectors), 30)), len(vectors) // 2
        out[:half, :20], out[half:] = labels["a"], labels["b"]
        return out

    study = make_study(
        respond, ("trial", "voxel"), coords, subjects=("a", "b"), noise=0.0, n_train=4, n_test=2
    )
    groups = list_rois(study.responses, None)
    assert {s: int(m.sum()) for s, m in groups["V1"].items()} == {"a": 10, "b": 10}
    cut = keep_features(study.responses, groups["V1"])
    assert cut.data.shape[1] == 10
    assert (cut.data == 1).all()
    zero = keep_features(study.responses, groups["V1"], "zero")
    assert set(np.unique(zero.data)) == {0, 1}
    assert (zero.data.sum(axis=1) == 10).all()
    moved = relabel_features(groups["FFA"], 0, 1)
    assert {s: int(m.sum()) for s, m in moved.items()} == {"a": 10, "b": 20}
    assert (moved["a"] != groups["FFA"]["a"]).any()


def test_bands_can_be_kept_alone():
    bands = {"alpha": (8, 13), "beta": (18, 30)}
    table = (
        replace_constants(FrequencyBandsConfig, modes=("only",))(metric="two_way", bands=bands)
        .compute(make_rhythm_study())
        .table
    )
    assert set(table["mode"]) == {"all", "only"}


def test_small_regions_are_left_out():
    study = make_voxel_study(noise=1.5)
    with pytest.raises(DataError, match="two groups"):
        replace_constants(RoisConfig, min_voxels=1000)().compute(study)


@pytest.mark.parametrize("edges", [(0.1, 1.0), (0.5, 4.0), (1.0, 4.0)])
def test_slow_bands_are_bands(edges):
    assert FrequencyBandsConfig(bands={"x": edges}).bands == {"x": edges}


@pytest.mark.parametrize("edges", [(0.0, 4.0), (-1.0, 4.0), (4.0, 4.0), (4.0, 2.0)])
def test_what_is_no_band_is_refused(edges):
    with pytest.raises(ValueError, match="must have 0 < lower < upper edge"):
        FrequencyBandsConfig(bands={"x": edges})


def test_images_are_permuted_where_that_is_asked_for_and_there_are_several():
    study = make_parcel_study({"Vis": 1.0}, n_train=20, n_test=6, n_permutations=20)
    test = study.pick(study.folds[0].test, "test")
    meter = Meter(study, "two_way")
    ranked = rank_trials(study, 0, test, study.trained(0))
    assert len(meter.measure_ranked(test, *ranked).null) == 20
    assert meter.measure_ranked(test, *ranked, permute=False).null is None
