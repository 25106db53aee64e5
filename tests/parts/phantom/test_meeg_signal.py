import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.phantom import (
    PhantomConfig,
    compute_evoked,
    make_person,
    simulate_continuous,
    simulate_endless,
)
from braindecode_vis.parts.phantom.ceiling import (
    compute_evoked_gram,
    compute_ideal_top1,
    compute_noise_ceiling,
)
from braindecode_vis.parts.phantom.meeg_signal import find_samples
from braindecode_vis.parts.phantom.noise import CHUNK_S, compute_noise_power, simulate_noise
from braindecode_vis.parts.phantom.phantom_config import NoiseConfig

CALM = NoiseConfig(blinks_per_minute=0.0, line=0.0, drift=0.0)


def record(person, machine, onsets, rows, duration=0.1, **options):
    n_samples = round((onsets[-1] + 2.0) * machine.sfreq)
    return np.concatenate(
        list(simulate_continuous(person, machine, onsets, rows, duration, n_samples, **options)), axis=1
    )


def cut(recording, machine, onsets, tmin, tmax):
    window = np.arange(round(tmin * machine.sfreq), round(tmax * machine.sfreq))
    samples = find_samples(onsets, machine.sfreq)[:, None] + window
    return recording[:, samples].transpose(1, 0, 2), window / machine.sfreq


def find_onset(times, strength, fraction=0.02):
    """First time at which the strength of a response passes a fraction of its peak."""
    return times[np.flatnonzero(strength > fraction * strength.max())[0]]


@pytest.mark.parametrize("snr", [0.05, 0.5])
def test_snr_is_what_is_stated(drive, eeg, snr):
    """Signal: variance over images in single trials, 0 to 0.6 s. Noise: background, alpha and sensors."""
    person = make_person(PhantomConfig(snr=snr, noise=CALM), 0, drive)
    rows = np.repeat(np.arange(200), 2)
    onsets = 1.0 + 2.5 * np.arange(len(rows))  # far apart, so that responses do not overlap
    clean = record(person, eeg, onsets, rows, noise=False)
    epochs, _ = cut(clean, eeg, onsets, 0, 0.6)
    single = epochs - compute_evoked(person, eeg, np.array([-1]), tmin=0, tmax=0.6)[:, :, : epochs.shape[2]]
    power = (single**2).mean()
    noise = record(person, eeg, onsets[:60], np.full(60, -1)) - record(
        person, eeg, onsets[:60], np.full(60, -1), noise=False
    )
    # The variability of the common response adds a little to the signal, and 150 s of noise are a finite sample.
    common = (
        cut(record(person, eeg, onsets, np.full(len(rows), -1), noise=False), eeg, onsets, 0, 0.6)[0]
    ).var(axis=0)
    measured = (power - common.mean()) / noise.var(axis=1).mean()
    assert measured == pytest.approx(snr, rel=0.1)


def test_zero_snr_keeps_only_what_all_images_share(drive, eeg):
    person = make_person(PhantomConfig(snr=0.0), 0, drive)
    evoked = compute_evoked(person, eeg, np.arange(20))
    # The product of patterns and time courses rounds by row in float32.
    np.testing.assert_allclose(evoked, np.repeat(evoked[:1], 20, axis=0), atol=1e-5 * np.abs(evoked).max())
    assert np.abs(evoked).max() == pytest.approx(5e-6, rel=0.1)
    onsets = 0.5 + 0.2 * np.arange(20)
    one, other = (record(person, eeg, onsets, rows) for rows in (np.arange(20), np.arange(100, 120)))
    np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())


def test_responses_are_of_physiological_size(person, eeg, meg):
    in_eeg = compute_evoked(person, eeg, np.arange(50))
    in_meg = compute_evoked(person, meg, np.arange(50), duration_s=0.5)
    assert 2e-6 < np.abs(in_eeg.mean(axis=0)).max() < 20e-6
    assert np.abs(in_eeg).max() < 100e-6
    assert 50e-15 < np.abs(in_meg.mean(axis=0)).max() < 500e-15
    assert np.abs(in_meg).max() < 3e-12


def test_the_common_response_has_the_peak_that_is_stated(drive, eeg, meg):
    config = PhantomConfig(snr=0.0, evoked_eeg_v=2e-5, evoked_meg_t=1e-13)
    person = make_person(config, 0, drive)
    for system, peak in ((eeg, 2e-5), (meg, 1e-13)):
        evoked = compute_evoked(person, system, np.array([-1]))
        assert np.abs(evoked).max() == pytest.approx(peak, rel=0.02)  # sampled anew


def test_continuous_recording_is_the_superposition_of_evoked_responses(drive, eeg):
    steady = PhantomConfig(trial_gain_sd=0.0, trial_latency_sd_s=0.0)
    person = make_person(steady, 0, drive)
    rows, onsets = np.array([3, 8, 3, -1]), np.array([0.5, 0.7, 0.9, 1.1])
    recording = record(person, eeg, onsets, rows, noise=False)
    expected = np.zeros_like(recording)
    evoked = compute_evoked(person, eeg, rows, tmin=0, tmax=1.6)
    for response, start in zip(evoked, find_samples(onsets, eeg.sfreq), strict=True):
        part = response[:, : recording.shape[1] - start]
        expected[:, start : start + part.shape[1]] += part
    np.testing.assert_allclose(recording, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("noise", [True, False])
def test_planted_onset_is_recovered(drive, eeg, noise):
    person = make_person(PhantomConfig(snr=1.0, noise=CALM, trial_latency_sd_s=0.0), 0, drive)
    rows = np.tile(np.arange(10), 40)
    onsets = 1.0 + 2.0 * np.arange(len(rows))
    epochs, times = cut(record(person, eeg, onsets, rows, noise=noise), eeg, onsets, -0.2, 0.6)
    means = np.stack([epochs[rows == row].mean(axis=0) for row in range(10)])
    back = [eeg.ch_names.index(name) for name in ("O1", "Oz", "O2", "PO3", "PO4")]
    spread = means[:, back].var(axis=0).mean(axis=0)
    spread = np.clip(spread - 1.5 * spread[times < 0].max(), 0, None)
    assert find_onset(times, spread) == pytest.approx(person.onset_s, abs=0.020)


def test_occipital_channels_tell_images_apart_first(person, eeg):
    evoked = compute_evoked(person, eeg, np.arange(200), sfreq=500.0, tmin=0, tmax=0.5, common=False)
    times = np.arange(evoked.shape[2]) / 500
    power = evoked.var(axis=0)
    back = np.array([name.startswith(("O", "PO")) for name in eeg.ch_names])
    early = (times > 0.06) & (times < 0.11)
    assert power[back][:, early].mean() > 3 * power[~back][:, early].mean()
    # Early responses follow Gabor energy, late ones the embedding.
    names = [stage.name for stage in person.stages]
    assert person.stages[names.index("striate")].feature == "early"
    assert person.stages[names.index("default")].feature == "semantic"


def test_offset_is_answered(drive, meg):
    person = make_person(PhantomConfig(), 0, drive)
    evoked = compute_evoked(
        person, meg, np.arange(30), sfreq=200.0, tmin=0, tmax=1.2, duration_s=0.5, common=False
    )
    power = evoked.var(axis=0).mean(axis=0)
    times = np.arange(len(power)) / 200
    before = power[(times > 0.50) & (times < 0.54)].mean()
    assert power[(times > 0.56) & (times < 0.66)].max() > 1.2 * before


def test_block_size_does_not_matter(person, eeg):
    onsets, rows = 0.3 + 0.2 * np.arange(30), np.arange(30)
    whole = record(person, eeg, onsets, rows, block_s=100.0)
    for block_s in (0.1, 1.7, 2.0):
        np.testing.assert_array_equal(record(person, eeg, onsets, rows, block_s=block_s), whole)
    blocks = list(simulate_continuous(person, eeg, onsets, rows, 0.1, 1000, block_s=1.0))
    assert [block.shape[1] for block in blocks] == [256, 256, 256, 232]
    assert all(block.dtype == np.float32 for block in blocks)


def test_recordings_are_drawn_by_seed_name_and_person(drive, eeg):
    config = PhantomConfig(n_subjects=2)
    onsets, rows = 0.3 + 0.2 * np.arange(10), np.arange(10)
    first = record(make_person(config, 0, drive), eeg, onsets, rows, name="a")
    np.testing.assert_array_equal(record(make_person(config, 0, drive), eeg, onsets, rows, name="a"), first)
    assert not np.array_equal(record(make_person(config, 0, drive), eeg, onsets, rows, name="b"), first)
    assert not np.array_equal(record(make_person(config, 1, drive), eeg, onsets, rows, name="a"), first)
    other = PhantomConfig(n_subjects=2, seed=1)
    assert not np.array_equal(record(make_person(other, 0, drive), eeg, onsets, rows, name="a"), first)


def test_memory_does_not_grow_with_the_recording(person, eeg):
    def measure(seconds):
        onsets = np.arange(1.0, seconds - 2, 1.0)
        tracemalloc.start()
        stream = simulate_continuous(person, eeg, onsets, np.arange(len(onsets)) % 200, 0.1, seconds * 256)
        for _ in stream:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    measure(20)
    assert measure(200) < 1.2 * measure(40)


def test_people_share_part_of_their_evoked_responses(drive, eeg):
    config = PhantomConfig(n_subjects=2, gain_sd=0, latency_sd_s=0)
    one, two = (
        compute_evoked(
            make_person(config, index, drive), eeg, np.arange(60), sfreq=100.0, common=False
        ).ravel()
        for index in range(2)
    )
    assert 0.2 < np.corrcoef(one, two)[0, 1] < 0.8


def test_bad_events_are_refused(person, eeg):
    with pytest.raises(DataError, match="ascending"):
        simulate_continuous(person, eeg, np.array([2.0, 1.0]), np.array([0, 1]), 0.1, 1000)
    with pytest.raises(DataError, match="between -1 and 239"):
        simulate_continuous(person, eeg, np.array([1.0]), np.array([240]), 0.1, 1000)
    with pytest.raises(DataError, match="one row per onset is needed"):
        simulate_continuous(person, eeg, np.array([1.0]), np.array([0, 1]), 0.1, 1000)
    with pytest.raises(ConfigError, match="block_s must be positive"):
        simulate_continuous(person, eeg, np.array([1.0]), np.array([0]), 0.1, 1000, block_s=0)


def test_noise_ceiling_is_met_by_averages_of_white_trials(person, eeg):
    ceiling = compute_noise_ceiling(person, eeg, np.arange(200), 8)
    more = compute_noise_ceiling(person, eeg, np.arange(200), 40)
    assert (more["split_half"] > ceiling["split_half"]).all()
    assert ((ceiling["with_truth"] > 0) & (ceiling["with_truth"] < 1)).all()
    # Independent reference: average white noise of the stated power onto the noiseless responses, per channel.
    evoked = compute_evoked(person, eeg, np.arange(200), sfreq=200.0, tmin=0, tmax=0.6, common=False)
    signal = evoked - evoked.mean(axis=0)
    noise_sd = np.sqrt(compute_noise_power(person, eeg))[:, None]
    generator = np.random.default_rng(0)
    halves = [
        signal + noise_sd / 2 * generator.standard_normal(signal.shape) for _ in range(2)
    ]  # 4 trials each
    measured = [
        np.corrcoef(halves[0][:, c].ravel(), halves[1][:, c].ravel())[0, 1] for c in range(eeg.n_channels)
    ]
    np.testing.assert_allclose(measured, ceiling["split_half"], atol=0.05)


def test_ideal_observer_rises_with_snr_and_repetitions(drive, eeg):
    rows = np.arange(200, 240)
    grams = {
        snr: compute_evoked_gram(make_person(PhantomConfig(snr=snr), 0, drive), eeg, rows)
        for snr in (0.0, 0.0005, 0.004)
    }
    scores = {
        (snr, n): compute_ideal_top1(gram, n, n_draws=100) for snr, gram in grams.items() for n in (1, 4, 16)
    }
    for n in (1, 4, 16):
        assert scores[0.0, n] == pytest.approx(1 / 40, abs=0.01)
        assert scores[0.0, n] < scores[0.0005, n] < scores[0.004, n]
    assert scores[0.0005, 1] < scores[0.0005, 4] < scores[0.0005, 16]


def test_ideal_observer_matches_a_plain_matched_filter():
    """Score real vectors in white noise, against the simulation in the space of scores."""
    generator = np.random.default_rng(0)
    gallery = 0.5 * generator.standard_normal((12, 20))
    n_trials = 4000
    right = 0
    for shown in range(12):
        seen = gallery[shown] + generator.standard_normal((n_trials, 20)) / np.sqrt(2)
        distance = ((seen[:, None] - gallery[None]) ** 2).sum(axis=2)
        right += (distance.argmin(axis=1) == shown).sum()
    expected = compute_ideal_top1(gallery @ gallery.T, 2, n_draws=4000)
    assert right / (12 * n_trials) == pytest.approx(expected, abs=0.01)


def test_an_endless_recording_is_noise_and_the_responses_to_what_is_shown(person, eeg):
    """Responses reach from chunk to chunk, and each onset comes with the chunk that it lies in."""
    length = round(CHUNK_S * eeg.sfreq)
    quiet = person.config.model_copy(update={"trial_gain_sd": 0.0, "trial_latency_sd_s": 0.0})
    still = replace(person, config=quiet)
    onsets = 0.5 + 1.9 * np.arange(6)  # one response lies across a seam

    def show():
        yield from ((float(onset), row) for row, onset in enumerate(onsets))
        while True:
            yield 1e6, 0

    chunks = list(itertools.islice(simulate_endless(still, eeg, show(), 0.1, name="lab"), 7))
    noise = np.concatenate(list(simulate_noise(still, eeg, 7 * length, "lab")), axis=1)
    signal = np.concatenate([samples for samples, _ in chunks], axis=1) - noise
    told = [(number, *onset) for number, (_, found) in enumerate(chunks) for onset in found]
    assert [(sample, row) for _, sample, row in told] == [
        (round(at * eeg.sfreq), i) for i, at in enumerate(onsets)
    ]
    assert all(sample // length == number for number, sample, _ in told)
    evoked = compute_evoked(still, eeg, np.arange(6), tmin=0.0, tmax=1.6)
    expected = np.zeros_like(signal)
    for response, onset in zip(evoked, onsets, strict=True):
        start = round(onset * eeg.sfreq)
        expected[:, start : start + response.shape[1]] += response[:, : signal.shape[1] - start]
    # The recording is float32, and its noise is taken off again.
    assert np.abs(signal - expected).max() < 1e-4 * np.abs(noise).max()
