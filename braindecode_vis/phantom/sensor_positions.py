"""How the stages of one person look on the sensors of one machine, before any scale is chosen.

Owns the product of tuning (`brain`) and lead field (`forward`), which both the signal (`recordings`) and the
spontaneous activity (`noise`) are built from.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from braindecode_vis.phantom.brain import Person, compute_common_amplitudes, compute_weights, get_features
from braindecode_vis.phantom.cortex import make_cortex
from braindecode_vis.phantom.forward import Machine


@lru_cache(maxsize=8)
def compute_patterns(person: Person, machine: Machine) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return the sensor pattern of every feature and of the response that all images share.

    Returns
    -------
    patterns : sequence of float32 arrays of shape (n_channels, n_features)
        One per stage, up to one common scale.
    common : float array of shape (n_stages, n_channels)
        Up to a scale of its own.
    """
    positions = make_cortex().positions
    patterns, common = [], []
    for stage in person.stages:
        members, weights = compute_weights(person, stage, positions)
        patterns.append((machine.leadfield[:, members] @ weights).astype(np.float32))
        members, amplitudes = compute_common_amplitudes(person, stage, positions)
        common.append(machine.leadfield[:, members] @ amplitudes)
    return tuple(patterns), np.stack(common)


def project_images(person: Person, patterns: tuple[np.ndarray, ...], rows: np.ndarray) -> np.ndarray:
    """Return the pattern that each image evokes in each stage, float32 (n_rows, n_stages, n_channels)."""
    shown = [
        get_features(person, stage, rows) @ pattern.T
        for stage, pattern in zip(person.stages, patterns, strict=True)
    ]
    return np.stack(shown, axis=1)


def pick_training_rows(person: Person, most: int = 2000) -> np.ndarray:
    """Return at most `most` training images, evenly spread over the drive: enough for second moments."""
    train = np.flatnonzero(person.drive.is_train)
    return train[np.linspace(0, len(train) - 1, min(len(train), most)).astype(int)]
