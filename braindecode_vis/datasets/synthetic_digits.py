"""Scikit-learn's digits seen by a linear synthetic brain: the smallest data set that runs every stage.

Each voxel is a random linear mixture of the image's pixels plus Gaussian noise. The signal-to-noise ratio is
the variance of the noiseless responses over the variance of the noise, averaged over voxels, so 0 means that the
responses have no information and 1 that signal and noise are equally strong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import write_responses, write_stimuli
from braindecode_vis.datasets.manifests import CheckFinding, DatasetSettings

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class SyntheticDigitsConfig(DatasetSettings):
    """Size and noise of the synthetic recording.

    Parameters
    ----------
    n_train, n_test
        Number of images; each is shown once.
    n_voxels
        Number of responses per trial.
    snr
        Signal variance over noise variance; 0 removes the signal.
    """

    kind: Literal["synthetic_digits"] = "synthetic_digits"
    n_train: int = Field(default=400, ge=20, le=1500)
    n_test: int = Field(default=60, ge=2, le=290)
    n_voxels: int = Field(default=300, ge=2, le=100_000)
    snr: float = Field(default=1.0, ge=0.0)

    def hash_inputs(self) -> dict[str, str]:
        """Return no digest: no file is read."""
        return {}

    def check(self) -> list[CheckFinding]:
        """Report that the data are made in memory: no file can be missing."""
        return [CheckFinding("synthetic", True, "made in memory")]

    def write(self, folder: Path, *, seed: int) -> None:
        """Simulate the recording and write responses and stimuli below `folder`."""
        responses, stimuli = make_synthetic_digits(self, seed=seed)
        write_responses(folder / "responses", responses)
        write_stimuli(folder / "stimuli", stimuli)


def make_synthetic_digits(config: SyntheticDigitsConfig, *, seed: int) -> tuple[Responses, StimulusSet]:
    """Simulate responses of shape (n_train + n_test, n_voxels) in units of the noiseless signal's SD."""
    import pandas as pd
    from sklearn.datasets import load_digits

    digits = load_digits()
    n = config.n_train + config.n_test
    # One stream of random numbers for each purpose, so that the images stay the same with more voxels.
    rows = make_generator(seed, "synthetic_digits", "images").permutation(len(digits.images))[:n]
    grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    concepts = [_NAMES[label] for label in digits.target[rows]]
    splits = ["train"] * config.n_train + ["test"] * config.n_test
    ids = [f"digit_{row:04d}" for row in rows]

    flat = grey.reshape(n, -1) / 255.0
    weights = make_generator(seed, "synthetic_digits", "weights").standard_normal(
        (flat.shape[1], config.n_voxels)
    )
    signal = (flat - flat.mean(axis=0)) @ weights
    # In units of the standard deviation of the signal, the noise has the variance 1 / snr.
    signal /= signal.std()
    noise = make_generator(seed, "synthetic_digits", "noise").standard_normal(signal.shape)
    data = noise if config.snr == 0 else signal + noise / np.sqrt(config.snr)

    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "stimulus_id": ids, "repetition": 0,
            "split": splits, "concept": concepts,
        }
    )  # fmt: skip
    stimuli = StimulusSet.from_pixels(pixels, ids, concepts, source="sklearn.datasets.load_digits")
    coords = {"voxel_id": np.arange(config.n_voxels), "snr": config.snr}
    responses = Responses(data.astype(np.float32), ("trial", "voxel"), trials, "signal SD", coords)
    return responses, stimuli
