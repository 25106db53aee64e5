import numpy as np
import pytest

from braindecode_vis.datasets.synthetic_digits import SyntheticDigitsConfig, make_synthetic_digits


def test_the_stated_snr_is_that_of_the_recording():
    """Images shown to two synthetic people who differ only in their noise: the shared part is the signal."""
    config = SyntheticDigitsConfig(n_train=1500, n_test=200, n_voxels=200, snr=0.5)
    responses, _ = make_synthetic_digits(config, seed=0)
    clean, _ = make_synthetic_digits(config.model_copy(update={"snr": 1e9}), seed=0)
    noise = responses.data - clean.data
    assert clean.data.var() / noise.var() == pytest.approx(0.5, rel=0.02)  # 340 000 noise samples


def test_at_snr_zero_the_images_leave_no_trace():
    config = SyntheticDigitsConfig(snr=0)
    responses, stimuli = make_synthetic_digits(config, seed=0)
    flat = stimuli.pixels[..., 0].reshape(460, -1).astype(float)
    flat = flat[:, flat.std(0) > 0]
    correlation = np.corrcoef(responses.data.T, flat.T)[:300, 300:]
    assert np.abs(correlation).mean() < 0.05  # 1/sqrt(460) * sqrt(2/pi) = 0.037 for noise


def test_it_is_made_by_the_seed_alone():
    left, stimuli = make_synthetic_digits(SyntheticDigitsConfig(), seed=3)
    right, _ = make_synthetic_digits(SyntheticDigitsConfig(), seed=3)
    other, _ = make_synthetic_digits(SyntheticDigitsConfig(), seed=4)
    np.testing.assert_array_equal(left.data, right.data)
    assert not np.array_equal(left.data, other.data)
    assert stimuli.table["stimulus_id"].is_unique
