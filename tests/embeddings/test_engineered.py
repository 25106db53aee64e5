import numpy as np
import pytest
from skimage import data

from braindecode_vis.embeddings.pixels import (
    EngineeredConfig,
    compute_colour_histogram,
    compute_gabor_energy,
    compute_lbp,
    compute_spectrum,
)

FEATURES = ("colour", "hog", "lbp", "glcm", "gabor", "fft")


def make_grating(cycles, angle, size=64):
    y, x = np.mgrid[:size, :size] / size
    return 0.5 + 0.5 * np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)))


@pytest.mark.parametrize("feature", FEATURES)
def test_each_family_has_length_one_and_tells_photographs_apart(feature):
    encoder = EngineeredConfig(features=(feature,), size=64).build()
    vectors = encoder.encode([data.chelsea(), data.coffee(), data.astronaut()])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ vectors.T)[np.triu_indices(3, 1)].max() < 0.9999


def test_the_whole_is_the_parts_in_order():
    image = data.chelsea()
    parts = [EngineeredConfig(features=(f,), size=64).build().encode([image]) for f in FEATURES]
    whole = EngineeredConfig(features=FEATURES, size=64).build()
    np.testing.assert_allclose(whole.encode([image]), np.concatenate(parts, axis=1), atol=1e-6)
    assert whole.space == "engineered/colour+hog+lbp+glcm+gabor+fft/each-unit/centre64-lanczos"


def test_colours_are_counted():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = (255, 0, 0)
    histogram = compute_colour_histogram(image)
    assert histogram[0] == 0.5
    assert histogram[7 * 64] == 0.5
    assert histogram.sum() == 1


@pytest.mark.parametrize("step", range(6))
def test_gabor_energy_peaks_at_the_orientation_of_a_grating(step):
    energy = compute_gabor_energy(make_grating(8, np.pi * step / 6)).reshape(4, 6, 16).mean(-1)
    assert np.unravel_index(energy.argmax(), energy.shape) == (1, step)  # wavelengths 4, 8, 16, 32 per side


def test_the_spectrum_peaks_at_the_frequency_of_a_grating():
    low, high = (compute_spectrum(make_grating(c, 0.1)).reshape(8, 8).max(1).argmax() for c in (2, 20))
    assert low < high


def test_local_patterns_do_not_depend_on_contrast():
    grey = data.camera()[::8, ::8] / 255
    np.testing.assert_array_equal(compute_lbp(grey), compute_lbp(np.round(grey * 255) / 255))
    assert compute_lbp(grey).sum() == pytest.approx(32)  # two radii in sixteen fields


def test_a_blank_image_has_no_edges_and_no_nan():
    vector = EngineeredConfig(features=("hog",), size=64).build().encode([np.full((9, 9, 3), 128, np.uint8)])
    assert (vector == 0).all()
