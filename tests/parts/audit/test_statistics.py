"""Stored numbers show which trials standardising and whitening were fitted on, and which features are codes."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import TrialRows
from braindecode_vis.parts.audit import statistics
from braindecode_vis.parts.audit.statistics import (
    check_codes,
    check_components,
    check_record,
    check_scaling,
    check_standardised,
    check_whitened,
    compute_moments,
    fit_standardised,
    fit_whitened,
)
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.preprocessing.scaling import fit_robust_scaler
from braindecode_vis.preprocessing.whitening import CovarianceSum, compute_condition_weights
from tests.parts.audit.small_runs import write_prepared

N_TRAIN, N_TEST = 120, 40
ROWS = np.arange(N_TRAIN + N_TEST)
FOLDS = [(ROWS[:N_TRAIN], ROWS[N_TRAIN:])]


@pytest.fixture
def check(tmp_path):
    """Return a function that writes trials and makes one check of them, which finds one thing."""

    def write_and_check(look, data, **options):
        write_prepared(tmp_path, np.asarray(data, dtype=np.float32), options.pop("folds", FOLDS), **options)
        (found,) = look(open_audited(tmp_path))
        return found

    return write_and_check


def draw(n_features=6, n_times=None, *, seed=0):
    """Return raw trials with a mean and a spread of their own in every feature."""
    generator = np.random.default_rng(seed)
    size = (len(ROWS), n_features) if n_times is None else (len(ROWS), n_features, n_times)
    data = generator.normal(size=size)
    axes = (1, n_features) if n_times is None else (1, n_features, 1)
    return 3 * generator.random(axes) + (1 + generator.random(axes)) * data


def standardise(data, rows, groups):
    """Return data standardised feature by feature within each group, by those of its trials that are in `rows`."""
    data, axes = data.copy(), (0, *range(2, data.ndim))
    for name in np.unique(groups):
        own = np.flatnonzero(groups == name)
        fitted = data[np.intersect1d(own, rows)] if len(np.intersect1d(own, rows)) else data[own]
        data[own] = (data[own] - fitted.mean(axis=axes, keepdims=True)) / fitted.std(axis=axes, keepdims=True)
    return data


# --- mean 0, spread 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_times", [None, 5])
def test_distance_of_each_set_of_trials_is_that_of_its_means_and_spreads(n_times, monkeypatch):
    """Blocks of three trials; the third session has test trials alone."""
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 3 * 8 * 6 * (n_times or 1))
    data, is_train = draw(n_times=n_times), ROWS < N_TRAIN
    sessions = np.array(["a", "b"], dtype=object)[ROWS % 2]
    sessions[-10:] = "c"
    data[:, 2] = 7.0  # a constant feature tells nothing
    fit = fit_standardised(data, sessions, is_train, "session")

    def measure(parts):
        axes = (0, *range(2, data.ndim))
        mean, spread = (
            np.stack([getattr(part, name)(axis=axes) for part in parts]) for name in ("mean", "std")
        )
        varies = spread > 0
        return np.sqrt((np.square(mean[varies]).mean() + np.square(spread[varies] - 1).mean()) / 2)

    assert fit.train == pytest.approx(measure([data[is_train & (sessions == s)] for s in "ab"]))
    assert fit.everything == pytest.approx(measure([data[sessions == s] for s in "ab"]))
    assert fit.own == pytest.approx(measure([data[sessions == "c"]]))


def test_sums_that_do_not_fit_into_memory_are_not_made(monkeypatch):
    data, groups, is_train = draw(40), np.zeros(len(ROWS)), ROWS < N_TRAIN
    for fit, needed in ((fit_standardised, 2 * 40 * 16), (fit_whitened, 2 * 40**2 * 8)):
        monkeypatch.setattr(statistics, "_LARGEST_SUMS", needed)
        assert fit(data, groups, is_train, "everything") is not None
        assert fit(data, groups, np.zeros(len(ROWS), bool), "everything") is None  # nothing to be fitted on
        monkeypatch.setattr(statistics, "_LARGEST_SUMS", needed - 1)
        assert fit(data, groups, is_train, "everything") is None


def test_moments_are_those_of_the_chosen_trials(monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK_BYTES", 7 * 8 * 12)
    data, rows = draw(4, 3) + 1e4, np.arange(0, 100, 3)
    for held in (data, TrialRows(data, np.arange(len(data)))):  # the latter is read on demand
        mean, std = compute_moments(held, rows)
        np.testing.assert_allclose(mean, data[rows].mean(axis=0).ravel(), rtol=1e-12)
        np.testing.assert_allclose(std, data[rows].std(axis=0).ravel(), rtol=1e-9)


@pytest.mark.parametrize(
    ("rows", "by", "level", "words"),
    [
        (ROWS[:N_TRAIN], "everything", "ok", "hold over everything over training trials alone"),
        (ROWS, "everything", "leak", "training and test trials together"),
        (ROWS[:N_TRAIN], "session", "ok", "hold per session over training trials alone"),
        (ROWS, "session", "leak", "hold per session over training and test trials together"),
        ([], "", "ok", "not standardised"),
    ],
)
def test_trials_that_z_scores_were_fitted_on_are_known(check, rows, by, level, words):
    sessions = np.array(["a", "b"], dtype=object)[ROWS % 2]
    data = draw()
    data[sessions == "b"] = 2 * data[sessions == "b"] + 1
    if by:
        data = standardise(data, rows, sessions if by == "session" else np.zeros(len(ROWS)))
    found = check(check_standardised, data, columns={"session": sessions})
    assert (found.level, words in found.message) == (level, True), found.message


def test_sessions_of_test_trials_alone_are_standardised_by_themselves(check):
    sessions = np.where(ROWS < N_TRAIN, "a", "b").astype(object)
    found = check(check_standardised, standardise(draw(), ROWS, sessions), columns={"session": sessions})
    assert (found.level, "own test trials" in found.message) == ("transductive", True)
    assert "1/b" in found.message


def test_subjects_scaled_by_trials_that_other_folds_learn_from_are_transductive(check):
    who, taught = np.array(["1", "2"], dtype=object)[ROWS % 2], ROWS < N_TRAIN
    folds = [(ROWS[taught & (who != name)], ROWS[~taught & (who == name)]) for name in ("1", "2")]
    data = standardise(draw(), ROWS[taught], who)
    found = check(check_standardised, data, columns={"subject": who}, folds=folds)
    assert (found.level, found.where) == ("transductive", "fold 0")
    assert "per subject: trials outside the fold" in found.message


def test_trials_that_are_called_z_scores_and_are_none_are_a_warning(check):
    found = check(check_standardised, draw(), unit="z")
    assert (found.level, "no set of training trials" in found.message) == ("warning", True)


@pytest.mark.parametrize(
    "notes",
    [{"plan": {"zscore": "none"}}, {"plan": {"baseline": [None, 0.0]}, "cleaning": {"scaling": None}}],
)
def test_z_scores_of_volumes_or_of_a_baseline_need_no_trials_of_that_kind(check, notes):
    """THINGS-MEG's published epochs are in units of their own baselines; each audit of them had a warning."""
    assert check(check_standardised, draw(), unit="z", notes=notes).level == "ok"


def test_every_trial_tested_in_one_fold_or_another_has_a_part_in_statistics_of_all(check):
    halves = [(ROWS[::2], ROWS[1::2]), (ROWS[1::2], ROWS[::2])]
    found = check(check_standardised, standardise(draw(), ROWS, np.zeros(len(ROWS))), folds=halves)
    assert (found.level, found.where) == ("leak", "fold 0")


def test_moments_tell_who_taught_in_half_precision():
    generator = np.random.default_rng(3)
    data = generator.normal(3, 2, (300, 20))
    is_train, groups = np.arange(300) < 240, np.zeros(300, dtype=object)
    for taught, verdict in ((is_train, "train"), (np.ones(300, bool), "all")):
        scaled = ((data - data[taught].mean(axis=0)) / data[taught].std(axis=0)).astype(np.float16)
        assert fit_standardised(scaled, groups, is_train, "everything").verdict == verdict
    assert fit_standardised(data, groups, is_train, "everything").verdict == "none"


# --- whitening --------------------------------------------------------------------------------------------


def whiten(data, rows):
    values, vectors = np.linalg.eigh(np.cov(data[rows].T))
    return (data - data[rows].mean(axis=0)) @ (vectors / np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize(
    ("rows", "level", "words"),
    [
        (ROWS[:N_TRAIN], "ok", "hold over everything over training trials alone"),
        (ROWS, "leak", "training and test trials together"),
        (None, "ok", "not whitened"),
    ],
)
def test_trials_that_whitened_are_known(check, rows, level, words):
    data = draw() @ np.random.default_rng(1).normal(size=(6, 6))
    found = check(check_whitened, data if rows is None else whiten(data, rows))
    assert (found.check, found.level, words in found.message) == ("whitening", level, True), found.message


def test_whitening_by_the_authors_is_told(check):
    found = check(check_whitened, draw(), unit="whitened")
    assert (found.level, "before they were published" in found.message) == ("warning", True)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled afterwards"])
@pytest.mark.parametrize("variant", ["epochs", "time"])
@pytest.mark.parametrize(
    ("who", "level"),
    [("train", "ok"), ("all", "leak"), ("others", "warning")],
    ids=["train", "all", "others"],
)
def test_trials_of_a_stored_noise_covariance_are_known(check, who, level, variant, scaled):
    """Whitened by the covariance that the pipeline fits, of each of two sessions."""
    generator = np.random.default_rng(0)
    epochs = np.einsum(
        "ij,njt->nit", generator.normal(size=(4, 4)), generator.normal(size=(len(ROWS), 4, 20))
    )
    epochs[N_TRAIN:] *= 1.5  # test trials are louder
    sessions, ids = np.array(["a", "b"], dtype=object)[ROWS % 2], [f"i{row // 4:02d}" for row in ROWS]
    data, matrices = epochs.copy(), []
    for name in "ab":
        own = np.flatnonzero(sessions == name)
        rows = {"train": own[own < N_TRAIN], "all": own, "others": own[: N_TRAIN // 4]}[who]
        total = CovarianceSum(4)
        if variant == "time":
            for image in np.unique(np.array(ids)[rows]):
                total.add_condition(epochs[rows[np.array(ids)[rows] == image]])
        else:
            total.add(epochs[rows], compute_condition_weights(np.array(ids)[rows]))
        values, vectors = np.linalg.eigh(total.finish())
        matrices.append((vectors / np.sqrt(values)) @ vectors.T)
        data[own] = matrices[-1] @ epochs[own]
    coords = {"whitening": np.stack(matrices), "whitening_sessions": [["1", "a"], ["1", "b"]]}
    if scaled:
        centre, scale = generator.normal(size=(2, 4)), 1 + generator.random((2, 4))
        data = (data - centre[ROWS % 2][:, :, None]) / scale[ROWS % 2][:, :, None]
        groups = [["1", "a"], ["1", "b"]]
        coords |= {"scaling_centre": centre, "scaling_scale": scale, "scaling_groups": groups}
    notes = {"plan": {"mvnn": variant}}
    options = {"columns": {"session": sessions}, "ids": ids, "coords": coords, "notes": notes}
    found = check(lambda run: check_whitened(run)[:1], data, **options)
    assert (found.check, found.level) == ("whitening", level), found.message
    assert ("test trials" in found.message) == (level == "leak")


# --- quartiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "level"), [(ROWS[:N_TRAIN], "ok"), (ROWS, "leak"), (ROWS[:40], "warning")])
def test_trials_that_quartiles_were_fitted_on_are_known(check, rows, level):
    data = draw(4, 5).astype(np.float32)
    scaler = fit_robust_scaler(data, rows, clamp=None)
    data = (data - scaler.centre[:, None]) / scaler.scale[:, None]
    coords = {
        "scaling_centre": scaler.centre[None], "scaling_scale": scaler.scale[None], "scaling_groups": [["1"]],
    }  # fmt: skip
    found = check(check_scaling, data, unit="IQR", coords=coords)
    assert (found.check, found.level) == ("scaling", level)
    assert ("training and test trials" in found.message) == (level == "leak")


# --- components and codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "level"), [(ROWS, "leak"), (ROWS[:N_TRAIN], "ok"), (None, "ok")])
def test_components_of_all_trials_are_known(check, rows, level):
    data = draw() @ np.random.default_rng(1).normal(size=(6, 6))
    if rows is not None:
        data = (data - data[rows].mean(axis=0)) @ np.linalg.svd(data[rows] - data[rows].mean(axis=0))[2].T
    assert check(check_components, data).level == level


CONCEPTS = [f"c{row % 8}" for row in ROWS]
LABELS = pd.factorize(np.array(CONCEPTS))[0]
CODES = {
    "a label": (0.001 * np.sqrt(1 + LABELS), "has one value in all trials of one concept"),
    "a counter": (0.5 * ROWS - 3, "counts the images"),
    "two halves": (np.where(LABELS < 4, 1.0, 2.0), ""),
    "a noisy label": (LABELS + 0.1 * np.random.default_rng(0).normal(size=len(ROWS)), ""),
    "whole numbers": (np.random.default_rng(0).integers(0, 8, len(ROWS)), ""),
    "a constant": (np.full(len(ROWS), 3.0), ""),
}


@pytest.mark.parametrize("what", CODES)
@pytest.mark.parametrize("n_times", [None, 4])
def test_a_feature_that_says_what_was_shown_is_found_among_others(check, what, n_times):
    """Its values may be far smaller than those of other features."""
    data = 100 * draw(n_times=n_times)
    values, words = CODES[what]
    data[:, 3] = values if n_times is None else np.asarray(values)[:, None]
    coords = None if n_times is None else {"ch_names": list("ABCDEF")}
    found = check(check_codes, data, concepts=CONCEPTS, coords=coords)
    assert found.level == ("leak" if words else "ok"), found.message
    assert words in found.message
    assert not words or f"first {'3' if n_times is None else 'D'}, which" in found.message


# --- what only the record knows ---------------------------------------------------------------------------


def test_cleaning_that_leaves_no_trace_is_told_by_the_record(tmp_path):
    notes = {
        "cleaning": {"ica": {"n": 3}, "autoreject": {"reject": "all"}},
        "standardised": "per session, test trials included",
        "standardised_with_own_test_trials": ["b", "a"],
    }
    write_prepared(tmp_path, draw(), FOLDS, notes=notes, coords={"warnings": ["one electrode was off"]})
    told = check_record(open_audited(tmp_path))
    assert [item.level for item in told] == ["ok", "ok", *["transductive"] * 3, "warning"]
    assert "first a, b" in told[3].message
    assert "one electrode was off" in told[5].message


def test_a_group_of_one_training_sample_has_no_covariance_and_is_not_left_out():
    """Else "whitened by training trials" would be said of the groups that happen to have many."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 2))
    many, few = (whiten(part, np.arange(200)) for part in (rows[:200], rows[200:]))
    data, groups = np.concatenate([many, few])[:, :, None], np.repeat(["a", "b"], 200)
    for n_few, is_finite in ((100, True), (3, True), (1, False), (0, True)):
        is_train = np.r_[np.arange(200) < 100, np.arange(200) < n_few]
        found = statistics.fit_whitened(data, groups, is_train, "session")
        assert np.isfinite(found.train) == is_finite, n_few
        assert np.isfinite(found.everything)
        assert np.isfinite(found.own) == (n_few == 0)


@pytest.mark.parametrize(("n_values", "is_told"), [(1, False), (2, False), (3, True), (8, True)])
def test_a_feature_with_a_value_of_each_image_is_told_from_two_halves_of_anything(n_values, is_told):
    names = np.repeat([f"i{n}" for n in range(8)], 4)
    noise = np.random.default_rng(0).normal(size=32)
    coded = 5 + np.repeat(np.arange(8) % n_values, 4)
    found = statistics._find_constant(np.c_[noise, coded, noise + coded], names)
    assert found.tolist() == [1] * is_told
