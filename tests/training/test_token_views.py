"""Two augmentations of each trial: where they come from, and a training whose local outputs agree between them."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training.augment import TimeShiftConfig
from braindecode_vis.training.feed import augment_and_time, augment_trials
from tests.training.toy_task import assert_same_weights, make_config, make_task

SHIFT = {"kind": "time_shift", "max_shift": 0.03}
NOISE = {"kind": "gaussian_noise", "probability": 1.0, "scale": 0.5}
NETWORK = {"kind": "eegproject", "width": 12, "dropout": 0}


def test_offsets_are_those_of_the_shift():
    responses, _ = make_task(n_images=4)
    signal, data = describe_signal(responses), torch.from_numpy(responses.data)
    augmentations = [TimeShiftConfig(max_shift=0.03)]
    make = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    moved, late = augment_and_time(data, augmentations, make(), signal)
    assert torch.equal(moved, augment_trials(data, augmentations, make(), signal))
    assert len(set(late.tolist())) > 2
    for trial, ms in enumerate(late.tolist()):
        n = round(ms / 10)  # 100 Hz
        expected = np.zeros_like(responses.data[trial])
        expected[:, max(n, 0) : 16 + min(n, 0)] = responses.data[trial][:, max(-n, 0) : 16 - max(n, 0)]
        np.testing.assert_array_equal(moved[trial], expected)


@pytest.mark.parametrize("targets", ["teacher", "self"])
def test_local_outputs_come_to_agree(targets, tmp_path):
    responses, held = make_task(n_images=32, noise=0.5)
    objectives = [{"kind": "clip"}, {"kind": "propagation", "targets": targets, "weight": 3}]
    config = make_config(
        optimiser={"lr": 1e-2},
        objectives=objectives,
        augmentations=[SHIFT, NOISE],
        network=NETWORK,
        epochs=6,
        teacher={"decay": 0.9},
    )
    encoder = config.build(seed=0).fit(responses, held)
    losses = [epoch["objectives"]["propagation"] for epoch in encoder.fitted.history]
    assert losses[-1] < 0.85 * losses[0]
    # 16 samples in five windows, at 100 Hz
    assert encoder.fitted.model.sizes.token_step == pytest.approx(32.0)
    encoder.write(tmp_path)
    assert_same_weights(config.read(tmp_path), encoder)


def test_the_second_view_moves_no_other_draw():
    """With next to no weight it leaves the training as it was."""
    responses, targets = make_task()
    options = {"augmentations": [SHIFT, NOISE], "network": NETWORK, "epochs": 1}
    plain = make_config(**options).build(seed=0).fit(responses, targets)
    objectives = [{"kind": "clip"}, {"kind": "propagation", "weight": 1e-9, "targets": "self"}]
    other = make_config(objectives=objectives, **options).build(seed=0).fit(responses, targets)
    np.testing.assert_allclose(other.predict(responses).vectors, plain.predict(responses).vectors, atol=2e-3)


def test_networks_say_how_far_their_tokens_lie_apart():
    config = make_config(
        objectives=[{"kind": "clip"}, {"kind": "propagation"}],
        network=NETWORK,
        augmentations=[SHIFT],
        epochs=1,
    )
    sizes = config.build(seed=0).fit(*make_task(n_images=6)).fitted.model.sizes
    assert (sizes.n_tokens, sizes.token_step) == (5, pytest.approx(32.0))


def test_two_views_need_an_augmentation():
    objectives = [{"kind": "clip"}, {"kind": "propagation"}]
    for augmentations in ([], [{"kind": "repetition_averaging"}]):
        with pytest.raises(ValidationError, match="no augmentation in augmentations changes a trial"):
            make_config(objectives=objectives, augmentations=augmentations)
