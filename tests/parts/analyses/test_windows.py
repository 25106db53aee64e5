from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.analyses.curves import (
    ClusterTest,
    bootstrap_curves,
    bootstrap_onset,
    cluster_over_labels,
    cluster_over_subjects,
    find_clusters,
    find_first_cluster,
)
from braindecode_vis.parts.analyses.cuts import cut_window, make_growing_windows, make_sliding_windows
from braindecode_vis.parts.analyses.generalization import TimeGeneralizationConfig
from braindecode_vis.parts.analyses.measure import FoldValues, Meter, compute_hits, measure_changes
from braindecode_vis.parts.analyses.study import rank_trials
from braindecode_vis.parts.analyses.windows import GrowingWindowConfig, SlidingWindowConfig
from braindecode_vis.report.figures import render_plot
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.retrieval import compute_similarity
from tests.parts.analyses.planted import make_epochs_study, refit_and_rank
from tests.references import assert_close

RNG = np.random.default_rng(0)


def test_windows_hold_what_they_say():
    study = make_epochs_study()
    windows = make_sliding_windows(study.responses, 0.1, 0.05, None, None)
    assert {w.last - w.first for w in windows} == {10}
    assert windows[0].start == pytest.approx(-0.1)
    assert windows[0].stop == pytest.approx(0.0)
    assert windows[-1].stop == pytest.approx(0.3)
    inside = make_sliding_windows(study.responses, 0.1, 0.05, 0.0, 0.25)
    assert inside[0].start == pytest.approx(0.0)
    assert inside[-1].stop == pytest.approx(0.25)
    grown = make_growing_windows(study.responses, 0.05, 0.0, None)
    assert [round(w.stop, 6) for w in grown] == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    cut, zero = (cut_window(study.responses, windows[1], how) for how in ("cut", "zero"))
    assert cut.data.shape[-1] == 10
    np.testing.assert_array_equal(zero.data[..., 5:15], cut.data)
    assert not zero.data[..., 15:].any()
    with pytest.raises(ConfigError, match="do not fit"):
        make_sliding_windows(study.responses, 2.0, 0.05, None, None)


def test_the_rest_set_to_zero_decodes_as_if_cut_away():
    study = make_epochs_study(noise=2.0)
    both = [
        SlidingWindowConfig(metric="two_way", step=0.15, outside=how).compute(study)
        for how in ("cut", "zero")
    ]
    assert_close(both[0].table["value"], both[1].table["value"])


@pytest.mark.parametrize("metric", ["top1", "top3", "two_way", "4_way"])
def test_metrics_agree_with_the_study_and_the_null_with_a_loop(metric):
    study = make_epochs_study(noise=6.0, averaged=False)
    test = study.pick(study.folds[0].test, "test")
    queries, gallery, retrieval = rank_trials(study, 0, test, study.trained(0))
    meter = Meter(study, metric)
    found = meter.measure_ranked(test, queries, gallery, retrieval)
    np.testing.assert_allclose(found.values, compute_hits(refit_and_rank(study)[0], metric))
    np.testing.assert_allclose(compute_hits(retrieval, metric), found.values)
    assert found.table_sum == pytest.approx(found.values.sum())
    # Slowly: reassign the image of each prediction and count again.
    ids = sorted(gallery.ids)
    known = find_metric(metric)
    table = known.metric.tabulate(compute_similarity(queries, gallery.select(ids)), known.n)
    shuffle = meter._shuffles[tuple(ids)][3]
    slow = sum(table[r, shuffle[ids.index(q)]] for r, q in enumerate(queries.ids))
    assert found.null[3] == pytest.approx(slow)
    assert found.null.mean() / len(queries) == pytest.approx(found.chance, abs=0.03)


def test_a_sliding_window_finds_the_planted_onset():
    study = make_epochs_study(onset=0.1, noise=0.7)
    found = SlidingWindowConfig(metric="two_way", width=0.05, step=0.01).compute(study)
    onset = found.table["onset"].iloc[0]
    assert abs(onset - 0.1) <= 0.02 + 1e-9
    assert found.table["onset_low"].iloc[0] <= onset <= found.table["onset_high"].iloc[0]
    before = found.table[found.table["stop"] <= 0.08 + 1e-9]
    assert not before["significant"].any()
    after = found.table[found.table["start"] >= 0.1 - 1e-9]
    assert after["significant"].all()
    assert after["value"].min() > 0.8
    assert found.table["chance"].eq(0.5).all()
    assert "significant" not in found.summary or "above chance" in found.summary
    svg = [render_plot(found.plots[0].draw, theme=theme) for theme in ("light", "dark")]
    assert svg[0] != svg[1]


def test_a_growing_window_finds_the_planted_onset_and_stays_up():
    study = make_epochs_study(onset=0.1, noise=0.3)
    found = GrowingWindowConfig(metric="top1", step=0.01).compute(study)
    assert abs(found.table["onset"].iloc[0] - 0.1) <= 0.02 + 1e-9
    assert found.table["significant"].to_numpy()[-10:].all()
    assert found.scores[0].metric == "top1@growing_window_peak"


def test_no_effect_without_signal():
    """Ten studies of noise: at 5 % each, four significant ones or more happen once in a thousand."""
    n_found = 0
    for seed in range(10):
        study = make_epochs_study(
            gain=0.0, seed=seed, n_train=30, n_test=12, n_permutations=200, n_bootstrap=100
        )
        found = SlidingWindowConfig(metric="two_way", width=0.1, step=0.1).compute(study)
        n_found += bool(found.table["significant"].any())
    assert binom.sf(3, 10, 0.05) < 0.0011
    assert n_found <= 3


def test_cluster_masses_against_a_loop():
    z = RNG.standard_normal((200, 15))
    threshold = np.full(15, 0.4)
    masses, onsets = find_first_cluster(z, threshold, 1.5)
    for row, (mass, onset) in enumerate(zip(masses, onsets, strict=True)):
        spans, own = find_clusters(z[row], threshold)
        assert mass == pytest.approx(max(own, default=0.0))
        large = [span[0] for span, m in zip(spans, own, strict=True) if m > 1.5]
        assert onset == (large[0] if large else -1)


def test_a_cluster_is_significant_where_its_mass_is_critical():
    """The critical mass was noticed by no test: without it, an onset is that of any blip of a resample."""
    null = RNG.standard_normal((400, 20))
    for alpha in (0.05, 0.3):
        test = cluster_over_labels(null.mean(axis=0), null, alpha=alpha)
        z = (null - null.mean(axis=0)) / null.std(axis=0)
        masses = [max(find_clusters(row, test.threshold)[1], default=0.0) for row in z]
        assert test.critical == pytest.approx(np.quantile(masses, 1 - alpha))
    low, high = (
        cluster_over_subjects(
            RNG.standard_normal((7, 20)), 0.0, seed=0, n_permutations=999, alpha=alpha
        ).critical
        for alpha in (0.3, 0.05)
    )
    assert 0 <= low < high
    # What is significant lies above the critical mass, and what is not below.
    curves = 0.3 * RNG.standard_normal((7, 20))
    curves[:, 9:15] += 1
    found = cluster_over_subjects(curves, 0.0, seed=0, n_permutations=999)
    spans, masses = find_clusters((curves.mean(axis=0) - found.centre) / found.scale, found.threshold)
    assert spans == found.spans
    for mass, p_value in zip(masses, found.p_values, strict=True):
        assert (mass > found.critical) == (p_value < 0.05)


def test_the_interval_of_an_onset_takes_clusters_of_critical_mass_alone():
    flat = np.zeros((4, 10))
    flat[:, 1] = 1.5  # a blip before the effect
    flat[0, 4:] = flat[1, 5:] = flat[2, 6:] = 2.0  # the last resample has the blip alone
    test = ClusterTest(((4, 9),), (0.01,), 6.0, "", np.zeros(10), np.ones(10), np.ones(10), 0.05)
    low, high, share = bootstrap_onset(test, flat, np.arange(10) / 10)
    assert (low, high, share) == (
        pytest.approx(np.quantile([0.4, 0.5, 0.6], 0.025)), pytest.approx(np.quantile([0.4, 0.5, 0.6], 0.975)), 0.75,
    )  # fmt: skip
    nothing = bootstrap_onset(replace(test, critical=99.0), flat, np.arange(10) / 10)
    assert np.isnan(nothing[:2]).all()
    assert nothing[2] == 0


def test_label_clusters_hold_their_level():
    """Curves that are drawn from the null itself are significant in 5 % of the cases."""
    null = RNG.standard_normal((400, 20)).cumsum(axis=1)
    curves = RNG.standard_normal((300, 20)).cumsum(axis=1)
    hits = sum(bool(cluster_over_labels(curve, null).significant) for curve in curves)
    assert (
        binom.ppf(0.0005, 300, 0.05) <= hits <= binom.ppf(0.9995, 300, 0.05) + 5
    )  # the null is a sample, too


def test_subjects_are_the_unit_where_there_are_six():
    curves = 0.5 + 0.05 * RNG.standard_normal((8, 20))
    assert not cluster_over_subjects(curves, 0.5, seed=0, n_permutations=200).significant
    curves[:, 8:14] += 0.15
    test = cluster_over_subjects(curves, 0.5, seed=0, n_permutations=200)
    assert len(test.significant) == 1
    first, last = test.significant[0]
    assert abs(first - 8) <= 1
    assert abs(last - 13) <= 1
    study = make_epochs_study(subjects=("1", "2", "3", "4", "5", "6"), n_train=20, n_test=8, noise=0.7)
    found = SlidingWindowConfig(metric="two_way", width=0.05, step=0.05).compute(study)
    assert "sign flips of 6 subjects" in found.summary
    assert found.table["significant"].iloc[-1]
    assert not found.table["significant"].iloc[0]


def test_bootstrap_curves_keep_images_together():
    values = np.repeat(RNG.standard_normal((40, 1)), 3, axis=0)  # three equal trials of each image
    ids, subjects = np.repeat(np.arange(40), 3).astype(object), np.full(120, "01", dtype=object)
    spread = bootstrap_curves(values, ids, subjects, n_draws=3000, seed=0).std()
    assert spread == pytest.approx(values[::3].std() / np.sqrt(40), rel=0.08)


def test_generalisation_is_a_square_for_a_stable_code_and_a_diagonal_for_a_rotating_one():
    config = TimeGeneralizationConfig(width=0.05, step=0.1)
    shapes = {}
    for rotate in (False, True):
        study = make_epochs_study(
            onset=0.1, noise=0.5, rotate=rotate, n_permutations=200, tmin=-0.15, n_times=65
        )
        found = config.compute(study)
        n = int(np.sqrt(len(found.table)))
        shapes[rotate] = found.table["value"].to_numpy().reshape(n, n), found
    early, late = slice(0, 3), slice(3, 7)  # windows up to 100 ms, and from 150 ms on
    for values, _ in shapes.values():
        assert values[late, late].diagonal().min() > 0.85
        assert abs(values[early, early].mean() - 0.5) < 0.1
        assert abs(values[early, late].mean() - 0.5) < 0.1
    stable = shapes[False][0][late, late]
    assert stable.min() > 0.85  # learnt at one time, known at all
    off = shapes[True][0][late, late][~np.eye(4, dtype=bool)]
    assert abs(off.mean() - 0.5) < 0.12
    assert shapes[False][1].table["significant"].sum() >= 16
    assert render_plot(shapes[True][1].plots[0].draw)


def test_time_is_needed():
    from tests.parts.analyses.planted import make_parcel_study

    with pytest.raises(DataError, match="time axis"):
        SlidingWindowConfig().compute(make_parcel_study({"a": 1.0, "b": 0.0}))


def test_measures_of_two_folds_are_joined():
    from dataclasses import replace

    from braindecode_vis.preprocessing.splits import Fold

    study = make_epochs_study(noise=3.0)
    fold = study.folds[0]
    half = len(fold.test) // 2
    two = replace(
        study,
        folds=[Fold(fold.train, fold.test[:half]), Fold(fold.train, fold.test[half:])],
        banks=study.banks * 2,
    )
    measured = measure_changes(two, {"all": None}, "two_way")["all"]
    assert len(measured.values) == 16
    assert measured.null.shape == (study.n_permutations,)
    assert measured.null.mean() == pytest.approx(0.5, abs=0.02)
    assert measured.observed == pytest.approx(measured.value)


def test_the_null_of_several_folds_is_wider():
    """Permutations within folds that train each other vary half as much as the score."""
    rng = np.random.default_rng(0)
    names = np.array(list("abcd"), dtype=object)
    folds = [
        FoldValues(rng.random(4), names, np.full(4, "01"), names, 0.5, 2.0, 2 + rng.normal(size=200))
        for _ in range(2)
    ]
    alone, both = Meter.join(folds[:1]), Meter.join(folds)
    np.testing.assert_allclose(alone.null, folds[0].null / 4)
    plain = (folds[0].null + folds[1].null) / 8
    assert both.null.mean() == pytest.approx(plain.mean())
    assert both.null.std() == pytest.approx(2**0.5 * plain.std())
