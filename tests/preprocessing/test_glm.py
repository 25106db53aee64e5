"""Single-trial least squares: equal to nilearn's models trial by trial, and exact where there is no noise."""

import numpy as np
import pandas as pd
import pytest
from nilearn.glm.first_level import make_first_level_design_matrix, run_glm

from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.glm import (
    estimate_ar1,
    fit_trials,
    fit_trials_ar1,
    make_drifts,
    make_nuisance_basis,
    make_regressors,
    remove_nuisance,
)
from tests.references import assert_close

T_R, N = 2.0, 90
TIMES = T_R * np.arange(N)
CATCH = pd.DataFrame({"onset": [40.0, 100.0], "duration": 1.0})


@pytest.fixture(scope="module")
def trials():
    return pd.DataFrame({"onset": np.arange(8) * 18.0 + 5.3, "duration": [1.0, 0.5] * 4})


@pytest.fixture(scope="module")
def motion():
    return np.cumsum(np.random.default_rng(1).standard_normal((N, 2)) * 0.01, axis=0)


@pytest.fixture(scope="module")
def series():
    return 100 + np.random.default_rng(0).standard_normal((N, 5))


def make_basis(motion):
    catch = make_regressors(CATCH, TIMES).sum(axis=1, keepdims=True)
    return make_nuisance_basis(
        np.concatenate([make_drifts(TIMES, drift="cosine", cutoff=100.0), motion, catch], axis=1)
    )


def fit_nilearn(series, events, motion, name):
    """The first-level model of nilearn: cosine drifts, confounds and every kind of event in one design."""
    design = make_first_level_design_matrix(
        TIMES, events, hrf_model="glover", drift_model="cosine", high_pass=1 / 100, add_regs=motion,
        add_reg_names=["a", "b"],
    )  # fmt: skip
    labels, results = run_glm(series, design.to_numpy(), noise_model="ols")
    theta = np.zeros(series.shape[1])
    for label in np.unique(labels):
        theta[labels == label] = results[label].theta[list(design.columns).index(name)]
    return theta


def test_lss_equals_nilearn_trial_by_trial(series, trials, motion):
    betas = fit_trials(series, make_regressors(trials, TIMES), make_basis(motion), method="lss")
    catch = CATCH.assign(trial_type="catch")
    for row in range(len(trials)):
        kinds = np.where(np.arange(len(trials)) == row, "this", "other")
        events = pd.concat([trials.assign(trial_type=kinds), catch])
        expected = fit_nilearn(series, events, motion, "this")
        np.testing.assert_allclose(betas[row], expected, rtol=1e-6, atol=1e-8)  # both in float64


def test_lsa_equals_nilearn(series, trials, motion):
    betas = fit_trials(series, make_regressors(trials, TIMES), make_basis(motion), method="lsa")
    names = [f"trial{row}" for row in range(len(trials))]
    events = pd.concat([trials.assign(trial_type=names), CATCH.assign(trial_type="catch")])
    for row, name in enumerate(names):
        np.testing.assert_allclose(
            betas[row], fit_nilearn(series, events, motion, name), rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize(
    "drift, options", [("cosine", {"cutoff": 60.0}), ("polynomial", {"order": 3}), ("none", {})]
)
def test_drifts_span_what_nilearn_models(drift, options):
    ours = make_nuisance_basis(make_drifts(TIMES, drift=drift, **options))
    theirs = make_first_level_design_matrix(
        TIMES, drift_model=None if drift == "none" else drift, high_pass=1 / 60, drift_order=3
    )
    basis = make_nuisance_basis(theirs.to_numpy())
    assert ours.shape == basis.shape
    np.testing.assert_allclose(ours @ ours.T, basis @ basis.T, atol=1e-8)


@pytest.mark.parametrize("start", [-1.0, 0.5, 30.0])
def test_drifts_do_not_depend_on_when_a_run_starts(start):
    """Times of a slice-time corrected run start at half a repetition; its step is a difference, not the second time."""
    for options in ({"drift": "cosine", "cutoff": 60.0}, {"drift": "polynomial", "order": 2}):
        np.testing.assert_array_equal(make_drifts(TIMES + start, **options), make_drifts(TIMES, **options))


def test_amplitudes_come_back_without_noise(trials, motion):
    amplitudes = np.random.default_rng(2).standard_normal((len(trials), 3))
    regressors = make_regressors(trials, TIMES)
    drift = np.outer(TIMES / 100, [1, -2, 0]) + 50
    series = regressors @ amplitudes + motion @ np.ones((2, 3)) + drift
    basis = make_nuisance_basis(
        np.concatenate([make_drifts(TIMES, drift="polynomial", order=1), motion], axis=1)
    )
    np.testing.assert_allclose(fit_trials(series, regressors, basis, method="lsa"), amplitudes, atol=1e-8)
    # Far apart, the two estimators agree up to the variation among the other trials.
    lss = fit_trials(series, regressors, basis, method="lss")
    assert np.corrcoef(lss.ravel(), amplitudes.ravel())[0, 1] > 0.98


def test_one_trial_needs_no_others(trials):
    regressors = make_regressors(trials.head(1), TIMES)
    basis = make_nuisance_basis(np.ones((N, 1)))
    np.testing.assert_allclose(fit_trials(3 * regressors + 7, regressors, basis), [[3.0]])


def test_scale_of_the_series_scales_the_betas(series, trials, motion):
    regressors, basis = make_regressors(trials, TIMES), make_basis(motion)
    cleaned = remove_nuisance(series, basis)
    assert_close(fit_trials(5 * cleaned, regressors, basis), 5 * fit_trials(series, regressors, basis))


def test_constant_and_repeated_nuisance_do_no_harm():
    ones = np.ones((N, 2))
    assert make_nuisance_basis(np.concatenate([ones, np.zeros((N, 1))], axis=1)).shape == (N, 1)


def test_trials_that_cannot_be_told_apart_are_named(series, trials):
    basis = make_nuisance_basis(np.ones((N, 1)))
    twice = make_regressors(trials.iloc[[0, 0, 1]], TIMES)
    with pytest.raises(DataError, match="cannot be distinguished in one model"):
        fit_trials(series, twice, basis, method="lsa")
    with pytest.raises(DataError, match="trial 0 of the run cannot be distinguished from the sum"):
        fit_trials(series, make_regressors(trials.iloc[[0, 0]], TIMES), basis)
    late = pd.DataFrame({"onset": [10.0, 60.0, N * T_R - 0.1], "duration": 0.5})
    with pytest.raises(DataError, match="trial 2 of the run leaves no trace"):
        fit_trials(series, make_regressors(late, TIMES), basis)


@pytest.fixture(scope="module")
def coloured():
    """Noise with coefficients from none to strong."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((N, 6))
    for row in range(1, N):
        noise[row] += np.array([0, 0.1, 0.3, 0.5, 0.7, -0.3]) * noise[row - 1]
    return 100 + noise


def test_ar1_equals_nilearn_where_all_trials_are_in_one_model(coloured, trials, motion):
    regressors, basis = make_regressors(trials, TIMES), make_basis(motion)
    betas = fit_trials_ar1(coloured, regressors, basis, method="lsa")
    labels, results = run_glm(coloured, np.hstack([regressors, basis]), noise_model="ar1")
    for label in np.unique(labels):
        expected = results[label].theta[: len(trials)]
        np.testing.assert_allclose(betas[:, labels == label], expected, rtol=1e-6, atol=1e-8)
    assert len(np.unique(labels)) > 3


def test_ar1_of_one_model_per_trial_is_generalised_least_squares(coloured, trials, motion):
    """Against the textbook: the inverse of the noise covariance as weight, but for its first entry."""
    regressors, basis = make_regressors(trials, TIMES), make_basis(motion)
    betas = fit_trials_ar1(coloured, regressors, basis, method="lss")
    together = np.hstack([regressors.sum(axis=1, keepdims=True), basis])
    rest = coloured - together @ np.linalg.lstsq(together, coloured, rcond=None)[0]
    for voxel, value in enumerate(estimate_ar1(rest)):
        white = np.eye(N) - value * np.eye(N, k=-1)
        for row in range(len(trials)):
            others = np.delete(regressors, row, axis=1).sum(axis=1)
            design = white @ np.column_stack([regressors[:, row], others, basis])
            expected = np.linalg.lstsq(design, white @ coloured[:, voxel], rcond=None)[0][0]
            np.testing.assert_allclose(betas[row, voxel], expected, rtol=1e-6)


def test_ar1_is_ordinary_where_noise_is_white_and_better_where_it_is_not(trials, motion):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((N, 400))
    for row in range(1, N):
        noise[row] += 0.6 * noise[row - 1]
    regressors, basis = make_regressors(trials, TIMES), make_basis(motion)
    errors = {
        fit.__name__: np.square(fit(noise, regressors, basis, method="lsa")).mean()
        for fit in (fit_trials, fit_trials_ar1)
    }
    assert errors["fit_trials_ar1"] < 0.97 * errors["fit_trials"]
    constant = np.full((N, 2), 7.0)
    assert_close(fit_trials_ar1(constant, regressors, basis), 0, scale=1)


def test_autocorrelation_has_no_unit_until_a_voxel_is_silent(coloured):
    """Only the smallest normal number bounds the power from below: volts are tiny, and tinier ones have no digits."""
    noise = coloured - coloured.mean(axis=0)
    expected = estimate_ar1(noise)
    assert (expected > 0.2).any()
    for unit in (1e-12, 1e-150, 1e120):
        np.testing.assert_array_equal(estimate_ar1(unit * noise), expected)
    assert not estimate_ar1(1e-160 * noise).any()  # the power would be a subnormal number
    assert not estimate_ar1(np.zeros((N, 2))).any()


def test_trials_at_the_end_of_a_run_are_refused_below_a_thousandth_of_the_usual_power(series):
    """A response cut short is fitted as long as a thousandth of its power is left."""
    regressors = np.zeros((N, 3))
    regressors[10:14, 0] = regressors[40:44, 1] = 1.0
    basis = make_nuisance_basis(np.ones((N, 1)))
    for power, is_seen in ((1.2e-3, True), (0.8e-3, False)):
        regressors[80, 2] = np.sqrt(4 * power)
        if is_seen:
            assert np.isfinite(fit_trials(series, regressors, basis)).all()
        else:
            with pytest.raises(DataError, match="trial 2 of the run leaves no trace"):
                fit_trials(series, regressors, basis)
