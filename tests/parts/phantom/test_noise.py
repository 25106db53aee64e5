import numpy as np
import pytest
from scipy import signal

from braindecode_vis.parts.phantom import PhantomConfig, make_person
from braindecode_vis.parts.phantom.forward import compute_patterns, project_images
from braindecode_vis.parts.phantom.noise import (
    compute_noise_power,
    compute_noise_spectra,
    make_mixing,
    simulate_noise,
)
from braindecode_vis.parts.phantom.phantom_config import NoiseConfig
from tests.references import assert_close

QUIET = {"blinks_per_minute": 0.0, "line": 0.0, "drift": 0.0}


def record(person, machine, seconds, name="run"):
    return np.concatenate(list(simulate_noise(person, machine, round(seconds * machine.sfreq), name)), axis=1)


def make_noisy(drive, **noise):
    return make_person(PhantomConfig(noise=NoiseConfig(**noise)), 0, drive)


@pytest.fixture(scope="module")
def quiet(drive, eeg):
    """A person without artefacts, recorded for 200 s."""
    person = make_noisy(drive, **QUIET)
    return person, record(person, eeg, 200)


def test_power_is_the_one_that_is_stated(quiet, eeg):
    person, noise = quiet
    assert noise.dtype == np.float32
    # 200 s hold few independent samples of the slowest 0.5 Hz activity: 10 % on the mean over channels.
    assert noise.var(axis=1).mean() == pytest.approx(compute_noise_power(person, eeg).mean(), rel=0.1)
    expected = (1 + 0.5**2) * eeg.noise_rms**2 + eeg.sensor_rms**2
    assert compute_noise_power(person, eeg).mean() == pytest.approx(expected, rel=1e-6)


def test_spectra_match_the_recording(quiet, eeg):
    person, noise = quiet
    frequencies, measured = signal.welch(noise, eeg.sfreq, nperseg=1024)
    used = (frequencies > 1) & (frequencies < 100)
    stated = compute_noise_spectra(person, eeg, frequencies[used])
    two_sided = np.einsum("fcc->f", stated)
    np.testing.assert_allclose(measured.sum(axis=0)[used] / 2, two_sided, rtol=0.35)
    assert np.median(measured.sum(axis=0)[used] / 2 / two_sided) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_background_falls_like_one_over_f(drive, eeg, exponent):
    person = make_noisy(drive, exponent=exponent, alpha=0.0, sensor=0.0, **QUIET)
    frequencies, power = signal.welch(record(person, eeg, 100), eeg.sfreq, nperseg=1024)
    used = (frequencies > 2) & (frequencies < 50)
    slope = np.polyfit(np.log(frequencies[used]), np.log(power.mean(axis=0)[used]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.2)


def test_alpha_peaks_at_the_back(quiet, eeg):
    person, noise = quiet
    frequencies, power = signal.welch(noise, eeg.sfreq, nperseg=1024)
    band = (frequencies > 9) & (frequencies < 11)
    beside = ((frequencies > 5) & (frequencies < 7)) | ((frequencies > 14) & (frequencies < 16))
    gain = power[:, band].mean(axis=1) / power[:, beside].mean(axis=1)
    names = np.array(eeg.ch_names)
    back = np.char.startswith(names.astype(str), "O") | np.char.startswith(names.astype(str), "PO")
    assert gain[back].mean() > 2
    assert make_mixing(person, eeg)[1].shape == (6, 32)


def test_mains_stand_out(drive, eeg):
    person = make_noisy(drive, blinks_per_minute=0.0)
    frequencies, power = signal.welch(record(person, eeg, 40), eeg.sfreq, nperseg=1024)
    at = np.abs(frequencies - eeg.line_freq).argmin()
    assert power.mean(axis=0)[at] > 5 * power.mean(axis=0)[at - 12 : at - 6].mean()


def test_blinks_come_at_their_rate_and_size(drive, eeg):
    calm = record(make_noisy(drive, blinks_per_minute=0.0), eeg, 240)
    blinking = record(make_noisy(drive, blinks_per_minute=15.0), eeg, 240)
    course = (blinking - calm)[eeg.ch_names.index("Fp1")]
    peaks, _ = signal.find_peaks(course, height=80e-6, distance=round(0.1 * eeg.sfreq))
    assert 35 < len(peaks) < 85  # 60 expected; Poisson, 3 standard deviations
    assert np.median(course[peaks]) == pytest.approx(200e-6, rel=0.25)


def test_neighbours_share_the_background(quiet, eeg):
    _, noise = quiet
    correlation = np.corrcoef(noise)
    near = correlation[eeg.ch_names.index("O1"), eeg.ch_names.index("Oz")]
    assert near > 0.7


def test_noise_is_drawn_by_seed_name_and_person(drive, eeg):
    config = PhantomConfig(n_subjects=2)
    one, two = (make_person(config, index, drive) for index in range(2))
    first = record(one, eeg, 5)
    np.testing.assert_array_equal(first, record(make_person(config, 0, drive), eeg, 5))
    for other in (record(one, eeg, 5, "run-2"), record(two, eeg, 5)):
        assert np.abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.3
    np.testing.assert_array_equal(record(one, eeg, 3), first[:, : 3 * 256])


def test_recordings_start_in_full_swing(drive, eeg):
    """A filter that starts from rest would make the first seconds of slow activity too quiet."""
    person = make_noisy(drive, **QUIET)
    starts = np.stack([record(person, eeg, 0.5, f"run-{number}") for number in range(60)])
    assert (starts**2).mean() == pytest.approx(compute_noise_power(person, eeg).mean(), rel=0.15)


def test_rhythm_and_blinks_are_where_and_as_large_as_stated(drive, eeg):
    frequencies = np.arange(5, 16, 0.25)
    for centre in (8.0, 12.0):
        person = make_noisy(drive, alpha=3.0, alpha_hz=centre)
        power = np.einsum("fcc->f", compute_noise_spectra(person, eeg, frequencies))
        assert frequencies[power.argmax()] == pytest.approx(centre, abs=0.5)
    calm, once, twice = (
        record(make_noisy(drive, blink_size=size), eeg, 20, "run-1") for size in (0.0, 1.0, 2.0)
    )
    assert np.abs(once - calm).max() > 80e-6
    assert_close(twice - calm, 2 * (once - calm))


def test_the_background_takes_the_patterns_of_evoked_responses_as_far_as_stated(drive, eeg):
    def measure(share):
        background, _ = make_mixing(make_noisy(drive, spontaneous=share), eeg)
        return background.T @ background

    person = make_noisy(drive)
    shown = project_images(
        person, compute_patterns(person, eeg)[0], np.arange(200)
    )  # (image, stage, channel)
    evoked = np.einsum("rsc,rsd->cd", shown, shown)
    np.testing.assert_allclose(measure(1.0) / np.trace(measure(1.0)), evoked / np.trace(evoked), atol=1e-5)
    nowhere, everywhere = measure(0.0), measure(1.0)
    mixed = 0.75 * nowhere + 0.25 * everywhere
    np.testing.assert_allclose(measure(0.25), mixed, atol=1e-6 * np.abs(mixed).max())


def test_changing_noise_keeps_its_power_and_loses_its_one_covariance(drive, eeg):
    """A linear Gaussian decoder assumes one covariance for all trials; with `changing` there is none."""
    steady, changing = (make_noisy(drive, changing=size, **QUIET) for size in (0.0, 0.5))
    np.testing.assert_array_equal(compute_noise_power(changing, eeg), compute_noise_power(steady, eeg))
    recorded = {one.config.noise.changing: record(one, eeg, 200) for one in (steady, changing)}
    # 200 s of sources whose sizes are log-normal: their mean square is known to about 10 %
    assert recorded[0.5].var() == pytest.approx(recorded[0.0].var(), rel=0.2)
    spread = {}
    for size, noise in recorded.items():
        pieces = noise[:, : 100 * round(2 * eeg.sfreq)].reshape(eeg.n_channels, 100, -1)
        spread[size] = np.log(pieces.var(axis=2)).std(axis=1).mean()
    assert spread[0.5] > 1.2 * spread[0.0]
    assert "changing" not in NoiseConfig().hashed_fields()
