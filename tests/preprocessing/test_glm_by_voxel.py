"""Estimates whose model is chosen by voxel: known answers on simulated runs, slow references, and the package."""

import contextlib
import io
import warnings

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing import glm_by_voxel
from braindecode_vis.preprocessing.glm import fit_trials, make_drifts, make_nuisance_basis
from braindecode_vis.preprocessing.glm_by_voxel import (
    RunModel,
    VoxelChoices,
    choose_by_voxel,
    estimate_by_choices,
    find_tail,
    pair_repeats,
)

T_R, N, N_CONDITIONS, STIMULUS_S = 2.0, 120, 12, 2.0
TIMES = T_R * np.arange(N)
N_VOXELS, N_QUIET = 240, 100


class Simulation:
    """Runs of one person: voxels of known response functions, quiet voxels, and noise that voxels share."""

    def __init__(self, noise=1.0, n_runs=4, n_confounds=0, seed=0):
        rng = np.random.default_rng(seed)
        self.response = rng.integers(0, 20, N_VOXELS)
        self.patterns = 1.5 + rng.standard_normal((N_CONDITIONS, N_VOXELS))
        self.patterns[:, :N_QUIET] = 0
        level = rng.uniform(500, 1200, N_VOXELS)
        self.volumes = 2 + 4 * np.arange(27)
        self.shown, self.models, self.series, self.confounds = [], [], [], []
        drifts = make_drifts(TIMES, drift="polynomial", order=2)
        for _ in range(n_runs):
            shown = rng.permutation(np.arange(len(self.volumes)) % N_CONDITIONS)
            confounds = rng.standard_normal((N, n_confounds))
            basis = make_nuisance_basis(np.hstack([drifts, confounds]))
            events = make_events(self.volumes * T_R, shown)
            model = RunModel.make(events, TIMES, drifts, basis)
            signal = np.einsum("vtn,nv->tv", model.courses[self.response], self.patterns[shown])
            shared = np.cumsum(rng.standard_normal((N, 3)), axis=0)
            shared = (shared - shared.mean(axis=0)) / shared.std(axis=0)
            signal += noise * (1.5 * shared @ rng.standard_normal((3, N_VOXELS)))
            signal += noise * rng.standard_normal(signal.shape) + confounds @ rng.standard_normal(
                (n_confounds, N_VOXELS)
            )
            self.shown.append(shown)
            self.models.append(model)
            self.confounds.append(confounds)
            self.series.append((level * (1 + signal / 100)).astype(np.float32))
        self.mean = np.concatenate(self.series).mean(axis=0)
        self.centred = [run - run.mean(axis=0) for run in self.series]
        self.truth = self.patterns[np.concatenate(self.shown)]

    def choose(self, **options):
        return choose_by_voxel(self.models, self.load, self.mean, **options)

    def load(self, run, voxels):
        return self.centred[run][:, voxels]

    def estimate(self, choices):
        pairs = zip(self.centred, self.models, strict=True)
        return np.concatenate([estimate_by_choices(series, model, choices) for series, model in pairs])

    def correlate(self, betas):
        """Mean correlation of the estimates of active voxels with their true amplitudes."""
        voxels = range(N_QUIET, N_VOXELS)
        return np.mean([np.corrcoef(betas[:, v], self.truth[:, v])[0, 1] for v in voxels])

    def compute_reliability(self, betas):
        """Mean correlation over active voxels of the mean patterns of odd and even runs."""
        runs = np.repeat(np.arange(len(self.shown)), [len(shown) for shown in self.shown])
        conditions = np.concatenate(self.shown)
        halves = [
            np.stack(
                [betas[(runs % 2 == half) & (conditions == c)].mean(axis=0) for c in range(N_CONDITIONS)]
            )
            for half in (0, 1)
        ]
        voxels = range(N_QUIET, N_VOXELS)
        return np.mean([np.corrcoef(halves[0][:, v], halves[1][:, v])[0, 1] for v in voxels])


def make_events(onsets, shown, duration=STIMULUS_S):
    names = [f"c{number:02d}" for number in shown]
    return pd.DataFrame({"onset": onsets, "duration": duration, "stimulus_id": names, "session": "1"})


@pytest.fixture(scope="module")
def noisy():
    return Simulation()


def test_responses_peak_at_one_and_each_later_than_the_one_before():
    fine = 0.1 * np.arange(400)
    courses = glm_by_voxel.make_courses(glm_by_voxel._LIBRARY, make_events([0.0], [0]), fine)[:, :, 0]
    assert courses.shape == (20, 400)
    np.testing.assert_allclose(courses.max(axis=1), 1)
    peaks = fine[courses.argmax(axis=1)]
    # Ordered along the manifold of Allen et al. (2022), from a quick to a slow response.
    assert (np.diff(peaks) >= 0).all()
    assert 3 < peaks[0] < 5
    assert 6 < peaks[-1] < 8


def test_a_longer_stimulus_and_a_later_onset_move_the_response():
    events = make_events([0.0, 0.0, 3.3], [0, 1, 2]).assign(duration=[0.0, 4.0, 0.0])
    fine = 0.1 * np.arange(400)
    courses = glm_by_voxel.make_courses(glm_by_voxel._LIBRARY[:1], events, fine)[0]
    assert courses[:, 1].argmax() > courses[:, 0].argmax() + 10
    np.testing.assert_allclose(
        courses[33:, 2], courses[:-33, 0], atol=1e-6
    )  # between samples it is interpolated


def test_the_response_function_of_every_voxel_is_found_without_noise():
    quiet = Simulation(noise=0.02)
    found = quiet.choose(denoise=False, ridge=False)
    active = np.arange(N_VOXELS) >= N_QUIET
    np.testing.assert_array_equal(found.response[active], quiet.response[active])
    betas = quiet.estimate(found)
    # Noise of a few hundredths of a percent, which estimates of overlapping trials enlarge.
    np.testing.assert_allclose(betas[:, active], quiet.truth[:, active], atol=0.5)
    assert quiet.correlate(betas) > 0.99


def test_without_components_and_penalty_it_is_ordinary_least_squares(noisy):
    choices = noisy.choose(denoise=False, ridge=False)
    betas = noisy.estimate(choices).reshape(4, 27, N_VOXELS)
    for voxel in (0, 120, 200):
        for run, model in enumerate(noisy.models):
            course = model.courses[choices.response[voxel]].astype(float)
            expected = fit_trials(noisy.centred[run][:, [voxel]], course, model.basis, method="lsa")[:, 0]
            # The series are single precision.
            np.testing.assert_allclose(
                betas[run, :, voxel], 100 * expected / noisy.mean[voxel], rtol=1e-3, atol=1e-3
            )


def test_the_more_is_chosen_the_better_estimates_repeat(noisy):
    """Types B, C and D of GLMsingle.

    Of seeds 0 to 4, reliability was .25 to .37, .53 to .61 and .55 to .63, the correlation with the true amplitudes .20
    to .28, .38 to .47 and .40 to .48, and each seed was in this order.
    """
    kinds = ({"denoise": False, "ridge": False}, {"ridge": False}, {})
    betas = [noisy.estimate(noisy.choose(**kind)) for kind in kinds]
    b, c, d = (noisy.compute_reliability(one) for one in betas)
    assert d >= c >= b
    assert c > b + 0.05
    b, c, d = (noisy.correlate(one) for one in betas)
    assert d >= c >= b


def test_confounds_join_every_model():
    moved = Simulation(n_confounds=2)
    betas = moved.estimate(moved.choose())
    assert moved.correlate(betas) > moved.correlate(moved.estimate(moved.choose(denoise=False, ridge=False)))


def test_pairs_and_badness_equal_loops(noisy):
    rng = np.random.default_rng(0)
    names = np.concatenate([m.conditions for m in noisy.models])
    runs = np.repeat(np.arange(4), 27)
    sessions = np.where(runs < 2, "1", "2")
    plain, other = rng.standard_normal((2, 108, 3)).astype(np.float32)
    units = {s: (plain[sessions == s].mean(axis=0), plain[sessions == s].std(axis=0, ddof=1)) for s in "12"}
    standard = [
        np.stack([(one[n] - units[s][0]) / units[s][1] for n, s in enumerate(sessions)])
        for one in (plain, other)
    ]
    expected = np.zeros(3)
    for test in range(108):
        for train in range(108):
            if runs[test] != runs[train] and names[test] == names[train]:
                expected += (standard[1][train] - standard[0][test]) ** 2
    error = glm_by_voxel._Badness(pair_repeats(noisy.models), sessions)
    error.measure(plain)
    np.testing.assert_allclose(error.measure(other), expected, rtol=1e-4)  # single precision


def test_fractions_are_lengths_of_the_estimates(noisy):
    choices = noisy.choose(denoise=False)
    assert len(np.unique(choices.fraction)) > 3
    bare = VoxelChoices(**{**vars(choices), "scale": np.ones(N_VOXELS), "shift": np.zeros(N_VOXELS)})
    none = VoxelChoices(**{**vars(bare), "penalty": np.zeros(N_VOXELS, np.float32)})
    lengths = [np.linalg.norm(noisy.estimate(one), axis=0) for one in (bare, none)]
    # Between penalties of the grid, a fifth of a decade apart, a length is interpolated.
    np.testing.assert_allclose(lengths[0] / lengths[1], choices.fraction, rtol=0.05)


def test_choices_of_some_runs_serve_another_run_and_are_kept(noisy, tmp_path):
    few = choose_by_voxel(noisy.models[:3], noisy.load, noisy.mean)
    few.write(tmp_path / "choices.npz")
    again = VoxelChoices.read(tmp_path / "choices.npz")
    betas = [estimate_by_choices(noisy.centred[3], noisy.models[3], one) for one in (few, again)]
    np.testing.assert_array_equal(betas[0], betas[1])
    found = [
        np.corrcoef(betas[0][:, v], noisy.patterns[noisy.shown[3], v])[0, 1] for v in range(N_QUIET, N_VOXELS)
    ]
    plain = noisy.estimate(noisy.choose(denoise=False, ridge=False))[81:]
    before = [
        np.corrcoef(plain[:, v], noisy.patterns[noisy.shown[3], v])[0, 1] for v in range(N_QUIET, N_VOXELS)
    ]
    assert np.mean(found) > np.mean(before)


def test_the_tail_of_two_gaussians_is_between_them():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(1, 0.5, 3000), rng.normal(6, 1.5, 600)])
    # 3000 of N(1, 0.5) and 600 of N(6, 1.5) are equally dense at 2.62; parameters are estimated, a step is 0.02.
    assert abs(find_tail(values) - 2.62) < 0.08
    assert find_tail(np.zeros(5)) == np.inf


def test_trials_whose_late_response_is_cut_off_are_zero():
    onsets = np.array([10.0, 40.0, 80.0, 120.0, 160.0, 234.0])
    drifts = make_drifts(TIMES, drift="polynomial", order=2)
    model = RunModel.make(make_events(onsets, range(6)), TIMES, drifts, make_nuisance_basis(drifts))
    series = np.random.default_rng(0).standard_normal((N, 2)).astype(np.float32)
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    choices = VoxelChoices(np.array([0, 19]), 100 * one, zero > 0, 0, one, zero, one, zero)
    betas = estimate_by_choices(series, model, choices)
    assert np.isfinite(betas).all()
    assert betas[5, 1] == 0 != betas[5, 0]


def test_too_few_quiet_voxels_are_told(noisy):
    active = np.arange(N_QUIET, N_QUIET + 12)

    def load(run, voxels):
        return noisy.centred[run][:, active[voxels]]

    with pytest.raises(DataError, match=r"of 12 voxels are bright .*dataset\.model\.denoise=false"):
        choose_by_voxel(noisy.models, load, noisy.mean[active])


def test_equal_to_the_package(tmp_path, monkeypatch):
    """GLMsingle 1.2 (commit 1ab54a65) with fracridge 2.0, on four runs of 400 voxels, without and with two confounds.

    Response functions, noise pool, number of components and fractions were the same in every voxel. The estimates of a
    voxel differed by at most 1.4e-5 of their length for type B, 1.7e-5 for C and 1.6e-5 for D (median 5e-6): the
    package computes in single precision, and its table of response functions has five digits. It took 8 to 10 s of one
    core, and this code 0.3 s. Its mixture of Gaussians has no seed, so both get the same cut here.
    """
    package = pytest.importorskip(
        "glmsingle.glmsingle", reason="GLMsingle is not installed; docs/INSTALL.md says how"
    )
    for n_confounds in (0, 2):
        one = Simulation(n_confounds=n_confounds)
        designs = [np.zeros((N, N_CONDITIONS)) for _ in one.shown]
        for design, shown in zip(designs, one.shown, strict=True):
            design[one.volumes, shown] = 1
        options = {"wantfileoutputs": [0] * 4, "wantmemoryoutputs": [1] * 4}
        _, explained = glm_by_voxel._choose_responses(one.models, one.load, np.arange(N_VOXELS))
        options["brainR2"] = options["pcR2cutoff"] = find_tail(explained)
        if n_confounds:
            options["extra_regressors"] = one.confounds
        monkeypatch.chdir(tmp_path)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found = package.GLM_single(options).fit(
                designs, [run.T.copy() for run in one.series], STIMULUS_S, T_R, str(tmp_path / "out")
            )
        choices = one.choose()
        np.testing.assert_array_equal(choices.response, found["typeb"]["HRFindex"].ravel())
        np.testing.assert_allclose(
            found["typea"]["onoffR2"].ravel(), explained, atol=0.2
        )  # percent; see _AVERAGE
        assert (
            choices.pool == found["typed"]["noisepool"].ravel()
        ).mean() > 0.98  # none near the cut, or a few
        assert choices.n_components == found["typed"]["pcnum"]
        assert np.isclose(choices.fraction, found["typed"]["FRACvalue"].ravel()).mean() > 0.98
        kinds = {"typeb": {"denoise": False, "ridge": False}, "typec": {"ridge": False}, "typed": {}}
        for name, kind in kinds.items():
            expected = found[name]["betasmd"].reshape(N_VOXELS, -1).T
            off = np.linalg.norm(one.estimate(one.choose(**kind)) - expected, axis=0)
            assert np.median(off / np.linalg.norm(expected, axis=0)) < 1e-4
