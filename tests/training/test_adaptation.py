"""Several subjects: unknown ones, and adaptation to a new one."""

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.training.fitted import grow_state
from tests.training.toy_task import assert_same_weights, get_weights, make_config, make_task

SIMPLE = {
    "kind": "simpleconv_image", "merger": "linear", "hidden": 8, "n_virtual_channels": 6, "initial_channels": 6,
    "depth": 2, "backbone_outputs": 8, "head_hidden": 8,
}  # fmt: skip
VOXELS = {"kind": "shared_space", "shared": 8, "n_blocks": 1}


def test_tables_of_subjects_grow_and_the_rest_stays():
    old = {
        "table": torch.arange(6.0).reshape(3, 2),
        "plain": torch.arange(4.0).reshape(2, 2),
        "w": torch.ones(2),
    }
    fresh = {
        "table": torch.zeros(4, 2),
        "plain": torch.zeros(3, 2),
        "w": torch.zeros(2),
        "layer.2": torch.full((1,), 9.0),
    }
    grown, owned = grow_state(old, fresh, n_subjects=2, n_new=1)
    # A third row was for unknown subjects: new ones start there, and it stays last.
    assert grown["table"].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert grown["plain"].tolist() == [[0, 1], [2, 3], [1, 2]]
    assert grown["w"].tolist() == [1, 1]
    assert grown["layer.2"].tolist() == [9]
    assert owned == {"table", "plain", "layer.2"}
    with pytest.raises(DataError, match="cannot be adapted"):
        grow_state({"w": torch.ones(2, 2)}, {"w": torch.ones(3, 3)}, n_subjects=2, n_new=1)


def test_an_unknown_subject_is_taken_or_refused_by_name():
    responses, targets = make_task(subjects=("01", "02"))
    stranger, _ = make_task(subjects=("09",))
    taken = make_config(network=SIMPLE, epochs=1).build(seed=0).fit(responses, targets)
    assert len(taken.predict(stranger).vectors) == stranger.n_trials
    flat, flat_stranger = (_as_voxels(r) for r in (responses, stranger))
    refused = make_config(network=VOXELS, epochs=1).build(seed=0).fit(flat, targets)
    with pytest.raises(DataError, match="subject 09 was not among the training subjects 01, 02"):
        refused.predict(flat_stranger)
    with pytest.raises(DataError, match="trained on trials of"):
        taken.predict(flat)


@pytest.mark.parametrize("network", [SIMPLE, VOXELS])
@pytest.mark.parametrize("trainable", ["all", "subject"])
def test_adaptation_to_a_new_subject(network, trainable):
    responses, targets = make_task(subjects=("01", "02"))
    new, new_targets = make_task(n_images=16, subjects=("09",), seed=8)
    if network is VOXELS:
        responses, new = _as_voxels(responses), _as_voxels(new)
    encoder = make_config(network=network, epochs=2).build(seed=0).fit(responses, targets)
    before = {k: v.copy() for k, v in get_weights(encoder).items()}
    adapted = encoder.adapt(new, new_targets, trainable=trainable, epochs=8, lr_scale=1.0)
    assert adapted.fitted.signal.subjects == ("01", "02", "09")
    for name, value in get_weights(encoder).items():
        np.testing.assert_array_equal(value, before[name])
    history = adapted.fitted.history
    assert trainable == "subject" or history[-1]["loss"] < history[0]["loss"]
    parameters = {n for n, _ in adapted.fitted.model.named_parameters()}
    same = {
        name
        for name, value in get_weights(adapted).items()
        if name in parameters and name in before and value.shape == before[name].shape
        and (value == before[name]).all()
    }  # fmt: skip
    others = {n for n in before if n in parameters and "subjects" not in n}
    if trainable == "subject":
        assert others <= same
        assert_old_subjects_stay(before, get_weights(adapted))
        start = encoder.adapt(new, new_targets, trainable="subject", epochs=1, lr_scale=1e-9)
        moved = [n for n, v in get_weights(start).items() if abs(v - get_weights(adapted)[n]).max() > 1e-3]
        assert any("subjects" in name for name in moved)
    else:
        assert not others <= same
    again = encoder.adapt(new, new_targets, trainable=trainable, epochs=8, lr_scale=1.0)
    assert_same_weights(adapted, again)


def assert_old_subjects_stay(before, after):
    tables = [n for n in before if "subjects" in n]
    assert tables
    for name in tables:
        kept = after[name] if after[name].shape == before[name].shape else after[name][:2]
        np.testing.assert_array_equal(kept, before[name])


def test_adaptation_refuses_what_does_not_fit():
    responses, targets = make_task()
    encoder = make_config(epochs=1).build(seed=0).fit(responses, targets)
    with pytest.raises(ConfigError, match="no weights for single subjects"):
        encoder.adapt(*make_task(subjects=("09",)), trainable="subject")
    with pytest.raises(DataError, match="cannot be adapted to 'other'"):
        encoder.adapt(responses, Embeddings(targets.vectors, targets.ids, "other"))


def test_hidden_subjects_teach_what_unknown_ones_get():
    """An unknown subject gets the mean of all matrices, so trials of hidden ones move all matrices alike."""
    responses, targets = make_task(subjects=("01", "02"), n_images=12)
    settings = {"network": SIMPLE, "epochs": 1, "optimiser": {"kind": "adam", "lr": 1e-3, "weight_decay": 0}}
    gaps = {}
    for share in (0.0, 1.0):
        encoder = make_config(**settings, hide_subject=share).build(seed=0).fit(responses, targets)
        start = encoder.build_model(encoder.fitted.signal, targets, np.arange(4)).state_dict()
        before, after = (
            start["network.subjects.weights"].numpy(),
            get_weights(encoder)["network.subjects.weights"],
        )
        gaps[share] = abs((after[0] - after[1]) - (before[0] - before[1])).max()
    assert gaps[1.0] < 1e-6 < 1e-4 < gaps[0.0]


def _as_voxels(responses):
    data = responses.data.reshape(len(responses.data), -1)
    return type(responses)(data, ("trial", "voxel"), responses.trials, "z", {})
