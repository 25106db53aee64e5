"""A small linear world for the training tests: images with embeddings, and trials that mix them with noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.training.network_config import NetworkEncoderConfig

N_CHANNELS, N_TIMES, N_TARGETS = 4, 16, 6


def make_task(
    n_images: int = 24,
    n_repetitions: int = 2,
    subjects: tuple[str, ...] = ("01",),
    noise: float = 1.0,
    seed: int = 0,
    per_concept: int = 2,
) -> tuple[Responses, Embeddings]:
    """Return trials of shape (4 channels, 16 times) from -0.05 s on, and one target per trial."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n_images, N_TARGETS)).astype(np.float32)
    image, subject, repetition = (
        a.ravel()
        for a in np.meshgrid(
            np.arange(n_images), np.arange(len(subjects)), np.arange(n_repetitions), indexing="ij"
        )
    )
    mixing = np.random.default_rng(1).standard_normal((N_TARGETS, N_CHANNELS * N_TIMES))
    data = vectors[image] @ mixing + noise * rng.standard_normal((len(image), N_CHANNELS * N_TIMES))
    ids = np.array([f"image{i:03d}" for i in image], dtype=object)
    trials = pd.DataFrame(
        {
            "subject": [subjects[s] for s in subject], "session": "01", "run": "01", "stimulus_id": ids,
            "repetition": repetition, "split": "train", "concept": [f"concept{i // per_concept}" for i in image],
        }
    )  # fmt: skip
    responses = Responses(
        data.reshape(-1, N_CHANNELS, N_TIMES).astype(np.float32),
        ("trial", "channel", "time"),
        trials,
        "z",
        {"sfreq": 100.0, "times": np.arange(N_TIMES) / 100 - 0.05},
    )
    return responses, Embeddings(vectors[image], ids, "toy")


def make_config(**settings: Any) -> NetworkEncoderConfig:
    """Return a quick configuration."""
    return NetworkEncoderConfig.model_validate(
        {
            "network": {"kind": "eegproject", "width": 12}, "epochs": 3, "batch_size": 16, "device": "cpu",
            "optimiser": {"lr": 3e-3}, "selection": {"kind": "last", "hold_out": 0}, **settings,
        }
    )  # fmt: skip


def get_weights(encoder: Any) -> dict[str, np.ndarray]:
    """Return every tensor of the fitted model."""
    return {name: value.numpy() for name, value in encoder.fitted.model.state_dict().items()}


def assert_same_weights(left: Any, right: Any) -> None:
    """Compare bit by bit."""
    one, two = get_weights(left), get_weights(right)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
