"""A short look at the samples of a file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.sources.meeg_source import N_PIECES, ContinuousPart, EpochedPart, sample_part

NAMES = ("O1", "Oz", "O2")


def make_continuous(data, reads=None):
    events = pd.DataFrame(
        {
            "onset": [1.0],
            "sample": [100],
            "stimulus_id": ["a"],
            "concept": ["a"],
            "split": ["train"],
            "repetition": 0,
        }
    )

    def read(start, stop):
        (reads if reads is not None else []).append(stop - start)
        return data[:, start:stop]

    recording = Recording("01", "01", "01", "eeg", (Path("x.vhdr"),), events)
    return ContinuousPart(recording, NAMES, 100.0, data.shape[1], read)


def make_epoched(data, times=None):
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": "a", "repetition": range(len(data)),
         "split": "train", "concept": "a"}
    )  # fmt: skip
    times = np.arange(data.shape[2]) / 100 if times is None else times
    return EpochedPart(trials, (Path("x.npy"),), NAMES, times, lambda start, stop: data[start:stop])


def test_a_sound_file_passes_in_bounded_time():
    rng = np.random.default_rng(0)
    reads = []
    sample_part(make_continuous(rng.standard_normal((3, 500_000)), reads), sfreq=100.0)
    assert reads == [100] * N_PIECES
    sample_part(make_epoched(rng.standard_normal((50, 3, 20))), sfreq=100.0)
    sample_part(make_epoched(rng.standard_normal((1, 3, 1))))  # one sample is not called flat


@pytest.mark.parametrize("make, shape", [(make_continuous, (3, 5000)), (make_epoched, (40, 3, 20))])
def test_flat_and_damaged_channels_and_rates_are_named(make, shape):
    data = np.random.default_rng(0).standard_normal(shape)
    by_channel = data if data.ndim == 2 else np.moveaxis(data, 1, 0)
    with pytest.raises(DataError, match=r"subject 01, .*100 Hz, where 250 Hz is published"):
        sample_part(make(data), sfreq=250.0)
    by_channel[1] = 3.0
    with pytest.raises(DataError, match=r"subject 01, .*channel\(s\) Oz are flat in 4 pieces"):
        sample_part(make(data))
    by_channel[2].flat[-1] = np.nan
    with pytest.raises(DataError, match=r"1 values are not finite .*channel\(s\) O2"):
        sample_part(make(data))


def test_times_must_be_even():
    data = np.random.default_rng(0).standard_normal((4, 3, 5))
    with pytest.raises(DataError, match="not evenly spaced"):
        sample_part(make_epoched(data, np.array([0, 0.01, 0.02, 0.5, 0.51])))
