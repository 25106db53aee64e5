import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.phantom import PhantomConfig, make_person
from braindecode_vis.parts.phantom.brain import (
    RESPONSE_S,
    compute_time_course,
    compute_weights,
    draw_fields,
    draw_trials,
    get_features,
)
from braindecode_vis.parts.phantom.cortex import (
    REGIONS,
    compute_receptive_fields,
    find_members,
    label_networks,
    label_regions,
    make_cortex,
)
from braindecode_vis.parts.phantom.phantom_config import NETWORKS, ComponentConfig, NetworkDrive

TIMES = np.arange(-0.2, 1.0, 0.001)


def get_stage(person, name):
    return next(stage for stage in person.stages if stage.name == name)


def test_cortex_is_the_surface_of_fsaverage():
    cortex = make_cortex()
    assert cortex.positions.shape == cortex.normals.shape == (5124, 3)
    np.testing.assert_allclose(np.linalg.norm(cortex.normals, axis=1), 1)
    # Normals leave the white matter: on the whole they point away from the centre of each hemisphere.
    for half in (slice(0, 2562), slice(2562, None)):
        outward = cortex.positions[half] - cortex.positions[half].mean(axis=0)
        assert (np.einsum("ni,ni->n", outward, cortex.normals[half]) > 0).mean() > 0.6


def test_every_region_and_network_has_sources_in_its_place():
    positions = make_cortex().positions
    regions, networks = label_regions(positions), label_networks(positions)
    assert set(REGIONS) <= set(regions)
    assert set(NETWORKS) == set(networks)
    assert (networks[regions != ""] == "visual").all()
    centre = {name: positions[regions == name].mean(axis=0) for name in REGIONS}
    assert centre["V1"][1] < centre["LO"][1] < centre["FFA"][1]  # from the pole forward
    assert np.abs(positions[regions == "PPA"][:, 0]).mean() < np.abs(positions[regions == "FFA"][:, 0]).mean()
    assert (positions[regions == "VWFA"][:, 0] < 0).all()


def test_retinotopy_follows_the_textbook():
    # left hemisphere, above the calcarine, foveal; right hemisphere, below, peripheral
    fields = compute_receptive_fields(np.array([[-10.0, -98, 4], [10.0, -72, -3]]), 8)
    np.testing.assert_allclose(fields.sum(axis=(1, 2)), 1)
    rows, columns = np.meshgrid(np.arange(8) - 3.5, np.arange(8) - 3.5, indexing="ij")
    down, right = (fields * rows).sum(axis=(1, 2)), (fields * columns).sum(axis=(1, 2))
    assert right[0] > 0 > right[1]
    assert down[0] > 0 > down[1]
    assert np.hypot(down, right)[1] > 2 * np.hypot(down, right)[0]


def test_silent_before_onset_and_peak_in_time(person):
    for stage in person.stages:
        course = compute_time_course(stage, TIMES, 0.1)
        assert (course[stage.onset_s - 1e-9 > TIMES] == 0).all()
        assert abs(TIMES[np.abs(course).argmax()] - stage.peak_s) < 0.06
        assert compute_time_course(stage, np.array([0.1 + RESPONSE_S]), 0.1) == 0


def test_offset_of_a_long_presentation_is_answered(person):
    stage = get_stage(person, "striate")
    with_offset = compute_time_course(stage, TIMES, 0.5)
    unanswered = compute_time_course(type(stage)(**{**vars(stage), "offset": 0.0}), TIMES, 0.5)
    difference = with_offset - unanswered
    assert np.abs(difference[0.5 + stage.onset_s - 1e-9 > TIMES]).max() == 0
    assert abs(TIMES[difference.argmax()] - 0.5 - stage.peak_s) < 0.005
    assert difference.max() == pytest.approx(stage.offset, rel=0.01)


def test_stages_come_in_the_order_of_the_hierarchy(person):
    onsets = [get_stage(person, name).onset_s for name in ("striate", "mid-level", "ventral", "default")]
    assert onsets == sorted(onsets)
    assert person.onset_s == onsets[0]


def test_people_differ_but_share_a_part(drive):
    positions = make_cortex().positions

    def correlate(shared):
        config = PhantomConfig(shared=shared, n_subjects=2)
        people = [make_person(config, index, drive) for index in range(2)]
        maps = [compute_weights(one, get_stage(one, "ventral"), positions)[1].ravel() for one in people]
        return np.corrcoef(maps)[0, 1]

    assert correlate(1.0) == pytest.approx(1.0, abs=1e-4)
    assert 0.35 < correlate(0.5) < 0.65
    assert abs(correlate(0.0)) < 0.15
    config = PhantomConfig(n_subjects=2)
    assert make_person(config, 0, drive).onset_s != make_person(config, 1, drive).onset_s


def test_maps_have_the_strength_that_was_asked_for(person):
    positions = make_cortex().positions
    for stage in person.stages:
        members, weights = compute_weights(person, stage, positions)
        amplitudes = get_features(person, stage, np.arange(200)) @ weights.T
        np.testing.assert_array_equal(members, find_members(positions, stage.regions))
        # Features are centred on the training images up to clipping.
        assert np.sqrt(amplitudes.var(axis=0).mean()) == pytest.approx(stage.strength, rel=0.05)


def test_fields_are_smooth_and_the_same_everywhere_they_are_asked():
    points = np.random.default_rng(0).uniform(-60, 60, (300, 3))
    fields = draw_fields(points, 200, 0, "a")
    assert fields.std() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(draw_fields(points[5:6], 200, 0, "a")[0], fields[5])
    near = draw_fields(points + np.array([2.0, 0, 0]), 200, 0, "a")
    assert np.corrcoef(near.ravel(), fields.ravel())[0, 1] > 0.9
    assert abs(np.corrcoef(draw_fields(points, 200, 0, "b").ravel(), fields.ravel())[0, 1]) < 0.05


def test_trials_vary_as_configured(person):
    gains, delays = draw_trials(person, 20000, "run")
    assert (gains**2).mean() == pytest.approx(1, abs=0.02)
    assert np.log(gains).std() == pytest.approx(person.config.trial_gain_sd, rel=0.03)
    assert delays.std() == pytest.approx(person.config.trial_latency_sd_s, rel=0.05)
    np.testing.assert_array_equal(draw_trials(person, 20000, "run")[0], gains)
    assert not np.array_equal(draw_trials(person, 20000, "other")[0], gains)


def test_a_blank_has_no_features(person):
    features = get_features(person, person.stages[0], np.array([-1, 3]))
    assert (features[0] == 0).all()
    np.testing.assert_array_equal(features[1], person.drive.early[3])


def test_bad_people_are_refused(drive):
    with pytest.raises(ConfigError, match="subject index 2 does not exist"):
        make_person(PhantomConfig(n_subjects=2), 2, drive)
    stage = ComponentConfig(name="odd", regions=("V9",), feature="mid", onset_s=0.1, peak_s=0.2)
    with pytest.raises(ConfigError, match="'V9'"):
        make_person(PhantomConfig(stages=(stage,)), 0, drive)
    with pytest.raises(ValidationError, match="must be after its onset"):
        ComponentConfig(name="odd", regions=("V1",), feature="mid", onset_s=0.2, peak_s=0.2)


def test_a_network_without_drive_is_no_stage(drive):
    names = {
        stage.name for stage in make_person(PhantomConfig(networks=NetworkDrive(default=0)), 0, drive).stages
    }
    assert "default" not in names
    assert "limbic" not in names
    assert "dorsal_attention" in names


def test_networks_answer_when_they_are_told_to(drive):
    networks = NetworkDrive(dorsal_onset_s=0.2, other_onset_s=0.3, rise_s=0.05)
    person = make_person(PhantomConfig(networks=networks, latency_sd_s=0), 0, drive)
    times = {name: get_stage(person, name) for name in ("dorsal_attention", "default", "frontoparietal")}
    assert {name: stage.onset_s for name, stage in times.items()} == pytest.approx(
        {"dorsal_attention": 0.2, "default": 0.3, "frontoparietal": 0.3}
    )
    for stage in times.values():
        assert stage.peak_s - stage.onset_s == pytest.approx(0.05)


def test_a_stage_holds_its_level_while_the_image_stays(drive):
    fields = {
        "name": "one",
        "regions": ("V1",),
        "feature": "early",
        "onset_s": 0.05,
        "peak_s": 0.09,
        "offset": 0,
    }
    held, faded = (
        make_person(
            PhantomConfig(stages=(ComponentConfig(**fields, sustained=level),), latency_sd_s=0), 0, drive
        )
        for level in (0.4, 0.0)
    )
    late = np.array([0.45])  # the transient and its undershoot are the same in both
    one, other = (compute_time_course(person.stages[0], late, 0.5) for person in (held, faded))
    assert one - other == pytest.approx(0.4, abs=1e-3)
