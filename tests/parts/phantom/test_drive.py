from typing import get_args

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.parts.phantom import PhantomConfig, make_person
from braindecode_vis.parts.phantom.brain import compute_weights
from braindecode_vis.parts.phantom.drive import (
    DRIVES,
    EARLY_GRID,
    MIXED,
    N_EARLY,
    N_MID,
    N_ORIENTATIONS,
    SCALES_CYCLES,
    StimulusDrive,
    compute_colours,
    compute_gabor_energy,
    compute_mid_features,
    compute_random_network,
    make_drive,
    project_embeddings,
)
from braindecode_vis.parts.phantom.phantom_config import Drive


def make_grating(angle, cycles, size=64):
    along = np.arange(size)[None] * np.cos(angle) + np.arange(size)[:, None] * np.sin(angle)
    wave = 127 * (1 + np.sin(2 * np.pi * cycles * along / size))
    return np.repeat(wave[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(N_ORIENTATIONS))
@pytest.mark.parametrize("scale", range(len(SCALES_CYCLES)))
def test_energy_prefers_the_grating_shown(orientation, scale):
    image = make_grating(np.pi * orientation / N_ORIENTATIONS, SCALES_CYCLES[scale])
    energy = compute_gabor_energy(image[None]).reshape(
        EARLY_GRID, EARLY_GRID, len(SCALES_CYCLES), N_ORIENTATIONS
    )
    centre = energy[3, 3]
    assert np.unravel_index(centre.argmax(), centre.shape) == (scale, orientation)


def test_energy_is_retinotopic():
    image = np.full((64, 64, 3), 128, np.uint8)
    image[8:16, 48:56] = make_grating(0, 8)[8:16, 48:56]
    energy = compute_gabor_energy(image[None]).reshape(EARLY_GRID, EARLY_GRID, -1).mean(axis=-1)
    assert np.unravel_index(energy.argmax(), energy.shape) == (1, 6)


def test_features_hardly_depend_on_the_size_of_the_image(images):
    large = np.repeat(np.repeat(images[:20], 2, axis=1), 2, axis=2)
    first, second = compute_gabor_energy(images[:20]), compute_gabor_energy(large)
    # Box averaging of a doubled image is exact; only the rounding of float32 is left.
    np.testing.assert_allclose(first, second, atol=1e-3)
    np.testing.assert_allclose(compute_mid_features(images[:20]), compute_mid_features(large), atol=1e-3)


def test_drive_is_standardised_by_training_images_only(images, embeddings, drive):
    assert drive.early.shape == (240, N_EARLY)
    assert drive.mid.shape == (240, N_MID)
    for features in (drive.early, drive.mid, drive.semantic):
        assert features.dtype == np.float32
        # Clipping of rare outliers at 8 standard deviations moves the moments a little.
        np.testing.assert_allclose(features[:200].mean(axis=0), 0, atol=0.02)
        np.testing.assert_allclose(features[:200].std(axis=0), 1, atol=0.05)
    poisoned = images.copy()
    poisoned[200:] = 255 - poisoned[200:] // 3
    shifted = embeddings.copy()
    shifted[200:] += 100
    again = make_drive(poisoned, shifted, drive.ids, is_train=drive.is_train, n_semantic=16)
    np.testing.assert_array_equal(again.early[:200], drive.early[:200])
    np.testing.assert_array_equal(again.mid[:200], drive.mid[:200])
    np.testing.assert_array_equal(again.semantic[:200], drive.semantic[:200])


def test_semantic_drive_is_as_wide_as_the_embeddings_allow(images):
    low_rank = np.random.default_rng(0).standard_normal((240, 3)) @ np.ones((3, 10)) * np.arange(10)
    drive = make_drive(images, low_rank, [str(i) for i in range(240)], n_semantic=32)
    assert drive.semantic.shape == (240, 1)


def test_a_foreign_drive_holds_nothing_of_an_image_encoder(images, drive):
    """What the demo decodes must not be what drives the brain: embeddings are not even asked for."""
    assert tuple(DRIVES) == get_args(Drive)
    ids, train = drive.ids, drive.is_train
    made = {
        kind: make_drive(images, None, ids, is_train=train, n_semantic=12, kind=kind)
        for kind in DRIVES
        if kind != "embedded"
    }
    sources = {
        "colours": compute_colours,
        "gabor": compute_gabor_energy,
        "random_network": compute_random_network,
    }
    for kind, compute in sources.items():
        np.testing.assert_array_equal(made[kind].early, drive.early)
        np.testing.assert_array_equal(made[kind].mid, drive.mid)
        expected = project_embeddings(compute(images), train, 12)
        # the drive rounds resampled images to 8 bits, and whitening enlarges that in the last components
        same = [np.corrcoef(made[kind].semantic[:, i], expected[:, i])[0, 1] for i in range(12)]
        assert min(same) > 0.99
    for source, kind in enumerate(MIXED):
        np.testing.assert_allclose(
            made["mixture"].semantic[:, source::3], made[kind].semantic[:, :4], atol=1e-5
        )
    with pytest.raises(DataError, match="0 embeddings"):
        make_drive(images, None, ids, is_train=train)


def test_colours_are_the_means_of_their_cells(images):
    found = compute_colours(images[:3]).reshape(3, 8, 8, 3)
    expected = images[:3].reshape(3, 8, 6, 8, 6, 3).mean(axis=(2, 4)) / 255
    # 48 pixels are first resampled to 64, which keeps the mean of a cell of 6
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_random_network_is_one_and_sees_what_is_where(images):
    first = compute_random_network(images[:20])
    assert first.shape == (20, 512)
    np.testing.assert_array_equal(compute_random_network(images[:20]), first)
    quarters = compute_random_network(images[:20, :, ::-1]).reshape(20, 2, 2, 128)
    # the kernels are not symmetric, but a mirrored image has its quarters exchanged
    same, other = (
        np.corrcoef(first.reshape(20, 2, 2, 128)[:, :, i].ravel(), quarters[:, :, 0].ravel())[0, 1]
        for i in (1, 0)
    )
    assert same > other


def test_each_higher_region_of_a_mixture_follows_one_source(images, drive):
    mixed = make_drive(images, None, drive.ids, is_train=drive.is_train, n_semantic=12, kind="mixture")
    person = make_person(PhantomConfig(drive="mixture"), 0, mixed)
    positions = np.random.default_rng(0).uniform(-60, 60, (4000, 3))
    higher = [stage for stage in person.stages if stage.feature == "semantic"]
    assert len(higher) >= 3
    for number, stage in enumerate(higher):
        _, weights = compute_weights(person, stage, positions)
        used = np.abs(weights).max(axis=0) > 0
        assert used.tolist() == [column % 3 == number % 3 for column in range(12)]
    assert PhantomConfig().hashed_fields() == PhantomConfig(drive="embedded").hashed_fields()
    assert "drive" not in PhantomConfig().hashed_fields()  # phantoms of earlier versions go on


def test_bad_drives_are_refused(drive, images, embeddings):
    with pytest.raises(DataError, match="mid drive has 5 rows for 240 stimuli"):
        StimulusDrive(drive.ids, drive.early, drive.mid[:5], drive.semantic, drive.is_train)
    with pytest.raises(DataError, match="no training image"):
        StimulusDrive(drive.ids, drive.early, drive.mid, drive.semantic, np.zeros(240, bool))
    broken = drive.semantic.copy()
    broken[7, 2] = np.nan
    with pytest.raises(DataError, match="image-007"):
        StimulusDrive(drive.ids, drive.early, drive.mid, broken, drive.is_train)
    with pytest.raises(DataError, match="239 embeddings"):
        make_drive(images, embeddings[1:], drive.ids)
    with pytest.raises(DataError, match="must be uint8"):
        compute_gabor_energy(images.astype(float))
