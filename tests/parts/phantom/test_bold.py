import numpy as np
import pytest
from nilearn.glm.first_level import make_first_level_design_matrix

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.phantom import PhantomConfig, make_person, make_scanner
from braindecode_vis.parts.phantom.bold_signal import (
    compute_betas,
    compute_voxel_snr,
    simulate_betas,
    simulate_bold,
    simulate_motion,
)
from braindecode_vis.parts.phantom.ceiling import compute_betas_gram, compute_ideal_top1
from braindecode_vis.parts.phantom.phantom_config import FmriConfig
from braindecode_vis.parts.phantom.scanner import ROIS

SILENT = FmriConfig(series_noise_percent=0, drift_percent=0, motion_percent=0)


def test_voxels_are_cortical_grey_matter(scanner):
    assert scanner.mask.sum() == scanner.n_voxels == len(scanner.regions) == len(scanner.baseline)
    assert 1000 < scanner.n_voxels < 8000
    back = np.argwhere(scanner.mask) @ scanner.affine[:3, :3].T + scanner.affine[:3, 3]
    np.testing.assert_allclose(back, scanner.positions)
    cerebellum = (scanner.positions[:, 2] < -42) & (scanner.positions[:, 1] < -45)
    assert not cerebellum.any()
    assert make_scanner(6, 2.0) is scanner
    with pytest.raises(ConfigError, match="voxel_mm"):
        make_scanner(1)


@pytest.mark.parametrize("name", ROIS)
def test_rois_are_minus_one_outside_cortex(scanner, name):
    volume = scanner.make_roi_volume(name)
    assert (volume[~scanner.mask] == -1).all()
    assert set(np.unique(volume[scanner.mask])) >= set(range(1, len(ROIS[name]) + 1))


def test_unknown_roi_is_refused(scanner):
    with pytest.raises(ConfigError, match="region of interest"):
        scanner.make_roi_volume("nsdspecific")


@pytest.mark.parametrize("snr", [0.05, 0.4])
def test_beta_snr_is_what_is_stated(drive, scanner, snr):
    person = make_person(PhantomConfig(snr=snr), 0, drive)
    rows = np.tile(np.arange(200), 3)
    betas = simulate_betas(person, scanner, rows, range(len(rows)))
    blank = simulate_betas(person, scanner, np.full(600, -1), range(len(rows)))
    active = compute_voxel_snr(person, scanner) > 0
    noise = betas[:, ~active].var(axis=0).mean()
    # Same seeds, same noise and gains: the difference of the two is the image-specific response.
    signal = (betas - blank)[:, active]
    assert (signal**2).mean() / noise == pytest.approx(snr, rel=0.1)
    assert noise == pytest.approx(1.5**2, rel=0.05)
    assert (compute_voxel_snr(person, scanner)[active] ** 2).mean() == pytest.approx(snr, rel=1e-5)


def test_betas_are_named_by_their_seeds(person, scanner):
    both = simulate_betas(person, scanner, np.array([3, 9]), [11, 12])
    np.testing.assert_allclose(simulate_betas(person, scanner, np.array([9]), [12])[0], both[1], atol=1e-5)
    assert not np.allclose(simulate_betas(person, scanner, np.array([9]), [13])[0], both[1])
    with pytest.raises(DataError, match="one per trial"):
        simulate_betas(person, scanner, np.array([9]), [1, 2])


def test_averaged_betas_approach_the_truth(person, scanner):
    truth = compute_betas(person, scanner, np.arange(10))
    mean = (
        simulate_betas(person, scanner, np.tile(np.arange(10), 100), range(1000))
        .reshape(100, 10, -1)
        .mean(axis=0)
    )
    visual = scanner.networks == "visual"
    # The mean gain of a log-normal of mean square one is exp(-sd**2 / 2).
    slope = (mean * truth)[:, visual].sum() / (truth**2)[:, visual].sum()
    assert slope == pytest.approx(np.exp(-(0.25**2) / 2), abs=0.03)
    assert np.corrcoef(mean[:, visual].ravel(), truth[:, visual].ravel())[0, 1] > 0.9


def test_zero_snr_betas_hold_no_image(drive, scanner):
    person = make_person(PhantomConfig(snr=0.0), 0, drive)
    one, other = (simulate_betas(person, scanner, rows, [1, 2, 3]) for rows in ([1, 2, 3], [4, 5, 6]))
    np.testing.assert_array_equal(one, other)
    assert compute_betas(person, scanner, np.array([1]))[0, scanner.networks == "visual"].mean() > 0.2


def test_planted_networks_rank_as_configured(person, scanner):
    power = compute_voxel_snr(person, scanner) ** 2
    mean = {name: power[scanner.networks == name].mean() for name in np.unique(scanner.networks.astype(str))}
    assert mean["visual"] > mean["default"] > mean["dorsal_attention"] > mean["frontoparietal"] > 0
    assert mean["frontoparietal"] > mean["ventral_attention"] > 0
    assert mean["limbic"] == mean["somatomotor"] == 0


def test_early_areas_follow_gabor_energy_and_late_ones_the_embedding(person, scanner):
    betas = compute_betas(person, scanner, np.arange(200))

    def explain(region, features):
        """Share of the variance over images that the leading directions of the features account for."""
        shown = betas[:, scanner.regions == region]
        shown = shown - shown.mean(axis=0)
        basis = np.linalg.svd(features[:200] - features[:200].mean(axis=0), full_matrices=False)[0][:, :16]
        return ((basis.T @ shown) ** 2).sum() / (shown**2).sum()

    assert explain("FFA", person.drive.semantic) > 0.99
    assert explain("V1", person.drive.semantic) < 0.3
    assert explain("V1", person.drive.early) > 2 * explain("V1", person.drive.semantic)


def test_imagery_is_weaker_and_weakest_in_early_areas(person, scanner):
    seen, imagined = (
        compute_betas(person, scanner, np.arange(100), imagery=flag).std(axis=0) for flag in (False, True)
    )
    early, late = scanner.regions == "V1", scanner.regions == "FFA"
    assert imagined[late].mean() == pytest.approx(0.4 * seen[late].mean(), rel=1e-3)
    assert imagined[early].mean() == pytest.approx(0.12 * seen[early].mean(), rel=1e-3)
    rows = np.zeros(100, int)
    late_trials = simulate_betas(person, scanner, rows, range(100), imagery=True)[:, late]
    assert late_trials.std() < 2.5


def test_bold_recovers_betas_through_the_model_of_nilearn(drive, scanner):
    config = PhantomConfig(trial_gain_sd=0.0, fmri=SILENT)
    person = make_person(config, 0, drive)
    import pandas as pd

    onsets, rows = np.array([4.0, 40.0, 80.0]), np.array([5, 6, 7])
    bold = np.concatenate(list(simulate_bold(person, scanner, onsets, rows, 0.1, 60)))
    assert bold.shape == (60, scanner.n_voxels)
    assert bold.dtype == np.float32
    events = pd.DataFrame({"onset": onsets, "duration": 0.1, "trial_type": ["a", "b", "c"]})
    design = make_first_level_design_matrix(np.arange(60) * 2.0, events, hrf_model="spm", drift_model=None)
    regressors = design[["a", "b", "c"]].to_numpy()
    fitted = np.linalg.lstsq(regressors, bold, rcond=None)[0]
    truth = compute_betas(person, scanner, rows)
    visual = scanner.networks == "visual"
    # nilearn's regressor is not scaled to a peak of one; the pattern over voxels is what must agree.
    for trial in range(3):
        assert np.corrcoef(fitted[trial, visual], truth[trial, visual])[0, 1] > 0.999
    assert 4 <= np.abs(bold[:20, visual]).mean(axis=1).argmax() * 2.0 - 4.0 <= 7


@pytest.mark.parametrize("ar", [0.35, 0.7])
def test_bold_noise_is_autocorrelated_and_drawn_by_name(drive, scanner, ar):
    numbers = FmriConfig(drift_percent=0, motion_percent=0, ar=ar)
    person = make_person(PhantomConfig(fmri=numbers), 0, drive)

    def scan(name):
        return np.concatenate(
            list(simulate_bold(person, scanner, np.zeros(0), np.zeros(0, int), 1.0, 200, name=name))
        )

    bold = scan("a")
    np.testing.assert_array_equal(scan("a"), bold)
    assert not np.array_equal(scan("b"), bold)
    assert bold.std() == pytest.approx(numbers.series_noise_percent, rel=0.03)
    lagged = np.mean([np.corrcoef(bold[:-1, v], bold[1:, v])[0, 1] for v in range(0, 500, 5)])
    assert lagged == pytest.approx(ar, abs=0.04)


def test_drift_and_motion_have_their_size(drive, scanner):
    person = make_person(PhantomConfig(fmri=FmriConfig(series_noise_percent=0)), 0, drive)
    bold = np.concatenate(list(simulate_bold(person, scanner, np.zeros(0), np.zeros(0, int), 1.0, 300)))
    assert 0.3 < bold.std() < 2.0
    assert bold.shape[0] == 300
    motion = simulate_motion(person, 300, "run")
    assert motion.shape == (300, 6)
    assert 0.05 < np.abs(motion[:, :3]).max() < 5  # mm
    assert np.abs(motion[:, 3:]).max() < 0.05  # rad


def test_unsorted_events_are_refused(person, scanner):
    with pytest.raises(DataError, match="ascending"):
        simulate_bold(person, scanner, np.array([2.0, 1.0]), np.array([0, 1]), 1.0, 10)


def test_ideal_observer_of_betas(drive, scanner):
    rows = np.arange(200, 240)
    low, high = (
        compute_betas_gram(make_person(PhantomConfig(snr=snr), 0, drive), scanner, rows)
        for snr in (0.0005, 0.003)
    )
    assert compute_ideal_top1(low, 1, n_draws=50) < compute_ideal_top1(high, 1, n_draws=50)
    assert compute_ideal_top1(low, 1, n_draws=50) < compute_ideal_top1(low, 4, n_draws=50)


def test_sizes_of_betas_are_what_is_stated(drive, scanner):
    def make(**changes):
        return make_person(PhantomConfig(trial_gain_sd=0.0, fmri=FmriConfig(**changes)), 0, drive)

    blank, rows = np.array([-1, -1]), np.array([3, 9])
    plain, common = make(), make(common_percent=2.0)
    visual = scanner.networks == "visual"
    for person, percent in ((plain, 0.8), (common, 2.0)):
        mean = np.abs(compute_betas(person, scanner, blank[:1])[0, visual]).mean()
        assert mean == pytest.approx(percent, rel=1e-4)
    # Noise, and with it at a given ratio what tells images apart, doubles; the response to any image does not.
    quiet, loud = (
        simulate_betas(person, scanner, rows, [1, 2]) - compute_betas(person, scanner, blank)
        for person in (plain, make(noise_percent=3.0))
    )
    np.testing.assert_allclose(loud, 2 * quiet, atol=1e-4)


def test_imagery_has_the_size_and_the_error_that_are_stated(drive, scanner):
    def imagine(simulate, **changes):
        person = make_person(PhantomConfig(trial_gain_sd=0.0, fmri=FmriConfig(**changes)), 0, drive)
        seeds = () if simulate is compute_betas else (range(4),)
        return simulate(person, scanner, np.arange(4), *seeds, imagery=True)

    early, late = scanner.regions == "V1", scanner.regions == "FFA"
    plain = imagine(compute_betas)
    np.testing.assert_allclose(imagine(compute_betas, imagery_gain=0.8), 2 * plain, atol=1e-5)
    changed = imagine(compute_betas, imagery_early=0.6)
    np.testing.assert_allclose(changed[:, early], 2 * plain[:, early], atol=1e-5)
    np.testing.assert_allclose(changed[:, late], plain[:, late], atol=1e-6)
    clear, blurred, worse = (imagine(simulate_betas, imagery_jitter=size) for size in (0.0, 0.7, 1.4))
    assert np.abs(blurred - clear).max() > 0.05
    np.testing.assert_allclose(worse - clear, 2 * (blurred - clear), atol=1e-4)
