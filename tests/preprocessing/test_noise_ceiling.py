"""Ceilings against what the planted truth itself reaches."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.noise_ceiling import (
    METRIC,
    compute_noise_ceilings,
    describe_ceiling,
    read_epochs_ceiling,
    write_epochs_ceilings,
)

SIGNAL = np.array([0.5, 1.0, 2.0])


def make_responses(n_images=800, n_rep=4, subject="01", seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_images, len(SIGNAL))) * SIGNAL
    images = np.repeat(np.arange(n_images), n_rep)
    data = truth[images] + rng.standard_normal((len(images), len(SIGNAL)))
    trials = pd.DataFrame(
        {
            "subject": subject, "session": "01", "run": "01", "stimulus_id": [f"i{i:04d}" for i in images],
            "repetition": np.tile(np.arange(n_rep), n_images), "split": "test",
        }
    )  # fmt: skip
    coords = {"voxel_id": np.arange(3), "map_ncsnr": SIGNAL}
    return Responses(data.astype(np.float32), ("trial", "voxel"), trials, "z", coords), truth


def reach(responses, truth, averaged):
    """Correlation of the truth itself with what was measured."""
    data = responses.data.reshape(len(truth), -1, len(SIGNAL))
    measured = data.mean(axis=1) if averaged else data[:, 0]
    return np.array([np.corrcoef(measured[:, v], truth[:, v])[0, 1] for v in range(len(SIGNAL))])


@pytest.mark.parametrize("measure", ["ncsnr", "split_half", "published"])
@pytest.mark.parametrize("averaged", [True, False])
def test_the_ceiling_is_what_the_truth_reaches(measure, averaged):
    responses, truth = make_responses()
    (found,) = compute_noise_ceilings(responses, averaged=averaged, measure=measure)
    # 800 images fix a correlation of 0.5 to 0.03, and its estimate about as well.
    np.testing.assert_allclose(found.per_feature, reach(responses, truth, averaged), atol=0.06)
    assert found.value == pytest.approx(np.sqrt(found.share.mean()))
    assert found.bound(np.arange(2)) == pytest.approx(np.sqrt(found.share[:2].mean()))
    low, high = found.interval
    assert np.isnan(low) if measure != "ncsnr" else low < found.value < high
    assert (found.metric, found.n_averaged) == (METRIC, 4 if averaged else 1)


def test_noise_alone_has_no_ceiling():
    """Clipped by voxel and averaged as roots, 12 images of noise promised .23, and 200 images .14."""
    rng = np.random.default_rng(1)
    trials = make_responses(12, n_rep=3)[0].trials
    noise = rng.standard_normal((36, 500)).astype(np.float32)
    (found,) = compute_noise_ceilings(Responses(noise, ("trial", "voxel"), trials, "z"))
    assert found.low < 0 < found.high
    assert found.value < 0.15  # 500 voxels fix the share to .02, whose root is .15
    assert np.mean(found.per_feature) > 0.2  # of single voxels it is the root of chance
    assert describe_ceiling(found).startswith(f"{found.value:.3f} (0.000 to ")


def test_channels_and_times_are_features():
    responses, _ = make_responses(30)
    wide = np.repeat(responses.data[:, :, None], 2, axis=2)
    (found,) = compute_noise_ceilings(Responses(wide, ("trial", "channel", "time"), responses.trials, "z"))
    (plain,) = compute_noise_ceilings(responses)
    np.testing.assert_allclose(found.share.reshape(3, 2), np.repeat(plain.share[:, None], 2, axis=1))


def test_training_trials_do_not_count():
    responses, _ = make_responses(50)
    trials = responses.trials.copy()
    trials.loc[trials.index >= 100, "split"] = "train"
    data = responses.data.copy()
    data[100:] *= 1000
    mixed = Responses(data, responses.dims, trials, "z")
    (one,) = compute_noise_ceilings(mixed)
    (two,) = compute_noise_ceilings(responses, np.arange(100))
    np.testing.assert_array_equal(one.per_feature, two.per_feature)
    assert one.n_images == 25


def test_padded_subjects_have_ceilings_of_their_own():
    first, second = make_responses(60)[0], make_responses(60, subject="02", seed=1)[0]
    data = np.concatenate([first.data, second.data])
    data[240:, 2] = 0
    trials = pd.concat([first.trials, second.trials], ignore_index=True)
    joint = Responses(data, first.dims, trials, "z", {"n_voxels_of": {"01": 3, "02": 2}})
    one, two = compute_noise_ceilings(joint)
    assert (one.subject, two.subject, len(two.per_feature)) == ("01", "02", 2)
    np.testing.assert_allclose(one.per_feature, compute_noise_ceilings(first)[0].per_feature)


def test_images_shown_unequally_often_take_the_harmonic_mean():
    responses, _ = make_responses(40)
    keep = ~((responses.trials["repetition"] > 1) & (responses.trials["stimulus_id"] < "i0020")).to_numpy()
    (found,) = compute_noise_ceilings(responses.select(keep))
    assert found.n_averaged == pytest.approx(1 / (0.5 / 2 + 0.5 / 4))


def test_what_is_seen_is_not_a_repetition_of_what_is_imagined():
    responses, _ = make_responses(30, n_rep=2)
    trials = responses.trials.assign(task=np.tile(["vision", "imagery"], 30))
    with pytest.raises(DataError, match="is repeated"):
        compute_noise_ceilings(Responses(responses.data, responses.dims, trials, "z"))


def test_what_cannot_be_known_is_refused():
    responses, _ = make_responses(10, n_rep=1)
    with pytest.raises(DataError, match="none of the 10 images"):
        compute_noise_ceilings(responses)
    plain = Responses(responses.data, responses.dims, responses.trials, "z", {"voxel_id": np.arange(3)})
    with pytest.raises(DataError, match="no published map"):
        compute_noise_ceilings(plain, measure="published")
    train = responses.trials.assign(split="train")
    with pytest.raises(DataError, match="no test trials"):
        compute_noise_ceilings(Responses(responses.data, responses.dims, train, "z"))


def test_the_ceiling_of_epochs_looks_at_500_images_at_the_most(tmp_path):
    rng = np.random.default_rng(0)
    for n_images, n_seen in ((20, 20), (520, 500)):
        ids = np.repeat([f"i{n:03d}" for n in range(n_images)], 2)
        data = rng.normal(size=(n_images, 1, 2)).repeat(2, axis=0) + rng.normal(size=(2 * n_images, 1, 2))
        trials = pd.DataFrame(
            {"subject": "01", "session": "01", "run": "01", "stimulus_id": ids,
             "repetition": np.tile([0, 1], n_images), "split": "test"}
        )  # fmt: skip
        coords = {"ch_names": ["Oz"], "times": np.arange(2) / 100}
        write_epochs_ceilings(
            tmp_path, Responses(data.astype(np.float32), ("trial", "channel", "time"), trials, "V", coords)
        )
        found = read_epochs_ceiling(tmp_path, subject="01")
        assert (found.n_images, found.n_repetitions) == (n_seen, 2)
