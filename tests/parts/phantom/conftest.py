"""A small world that the tests of the phantom share: images, their drive, people and machines."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from braindecode_vis.parts.phantom import (
    PhantomConfig,
    make_drive,
    make_person,
    make_scanner,
    make_sensor_system,
)

N_STIMULI = 240


@pytest.fixture(scope="session")
def images():
    """Smooth coloured noise: every image has its own edges and colours everywhere."""
    noise = np.random.default_rng(0).standard_normal((N_STIMULI, 48, 48, 3))
    smooth = gaussian_filter(noise, (0, 2, 2, 0))
    return np.clip(128 + 400 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def embeddings():
    return np.random.default_rng(1).standard_normal((N_STIMULI, 40))


@pytest.fixture(scope="session")
def drive(images, embeddings):
    is_train = np.arange(N_STIMULI) < 200
    ids = [f"image-{number:03d}" for number in range(N_STIMULI)]
    return make_drive(images, embeddings, ids, is_train=is_train, n_semantic=16)


@pytest.fixture(scope="session")
def person(drive):
    return make_person(PhantomConfig(snr=0.1), 0, drive)


@pytest.fixture(scope="session")
def eeg():
    return make_sensor_system("eeg32-emotiv")


@pytest.fixture(scope="session")
def meg():
    return make_sensor_system("meg-ctf272")


@pytest.fixture(scope="session")
def scanner():
    return make_scanner(6, 2.0)
