"""Weights over layers: what they are, that they find the layer with the information, galleries per subject."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.training.image_config import LayerFusionConfig
from braindecode_vis.training.image_side import LayerFusion
from braindecode_vis.training.loop import compute_top_k
from tests.training.test_loop import Killed, kill_after
from tests.training.toy_task import N_TARGETS, assert_same_weights, make_config, make_task


def stack_layers(targets, places, seed=5):
    """Return three layers: noise everywhere but in the layers of `places`, which hold the share given there."""
    ids = sorted(set(targets.ids))
    row = {name: int(np.flatnonzero(targets.ids == name)[0]) for name in ids}
    noise = np.random.default_rng(seed).standard_normal((len(ids), 3, N_TARGETS)).astype(np.float32)
    for layer, share in places.items():
        own = np.stack([targets.vectors[row[name]] for name in ids])
        noise[:, layer] = share * own + (1 - share) * noise[:, layer]
    index = {name: i for i, name in enumerate(ids)}
    return Embeddings(noise[[index[i] for i in targets.ids]], targets.ids, "layers")


def split_trials(responses, targets, n_train):
    """Return training and test trials and targets, by image."""
    train = np.array([int(i[-3:]) < n_train for i in responses.stimulus_ids])
    parts = []
    for rows in (np.flatnonzero(train), np.flatnonzero(~train)):
        parts += [responses.select(rows), Embeddings(targets.vectors[rows], targets.ids[rows], targets.space)]
    return parts


def score(encoder, responses, targets, subject=None):
    predicted = encoder.predict(responses).vectors
    first = np.unique(targets.ids.astype(str), return_index=True)[1]
    gallery = encoder.map_targets(
        Embeddings(targets.vectors[first], targets.ids[first], targets.space), subject
    )
    truth = np.searchsorted(gallery.ids.astype(str), responses.stimulus_ids.astype(str))
    return compute_top_k(predicted, gallery.vectors, truth, 1)


def test_a_fused_target_is_the_weighted_sum_of_its_layers():
    stacked = torch.randn(2, 5, 3 * 4, generator=torch.Generator().manual_seed(0))
    fusion = LayerFusion(LayerFusionConfig(weights="per_subject"), (3, 4), n_subjects=2)
    tokens = stacked.reshape(2, 5, 3, 4).numpy()
    np.testing.assert_allclose(fusion(stacked).detach(), tokens.mean(axis=2), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]))
    weights = np.exp(fusion.logits.detach().numpy())
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.concatenate([weights, weights.mean(axis=0, keepdims=True)])  # unknown subjects
    subject = np.array([0, 2, 1, 1, 0])
    expected = np.zeros((2, 5, 4))
    for trial in range(5):
        for layer in range(3):
            expected[:, trial] += weights[subject[trial], layer] * tokens[:, trial, layer]
    fused = fusion(stacked, torch.from_numpy(subject)).detach()
    np.testing.assert_allclose(fused, expected, rtol=1e-5, atol=1e-6)


def describe_fusion(encoder):
    fit = encoder.require_fit()
    return fit.model.fusion.describe(fit.signal.subjects)


@pytest.mark.parametrize("projector", [None, {"size": 5}])
def test_the_layer_with_the_information_is_found_and_beats_the_last_one(projector):
    responses, targets = make_task(n_images=112, noise=1.5)
    train, known, test, unseen = split_trials(responses, stack_layers(targets, {1: 1.0, 2: 0.4}), 64)
    settings = {"epochs": 25, "normalise_targets": "l2", "projector": projector}
    fused = make_config(fusion={}, **settings).build(seed=0).fit(train, known)
    weights = describe_fusion(fused)["all"]
    assert np.argmax(weights) == 1
    assert weights[1] > 0.9
    assert weights == pytest.approx(fused.fitted.history[-1]["layer_weights"]["all"])
    last = make_config(**settings).build(seed=0)
    last.fit(train, replace(known, vectors=known.vectors[:, 2], space="last"))
    alone = score(last, test, replace(unseen, vectors=unseen.vectors[:, 2], space="last"))
    assert score(fused, test, unseen) > alone + 0.25


def test_layers_are_brought_to_one_length_each():
    """A layer of long vectors has no head start with l2; over the whole stack it would."""
    responses, targets = make_task(n_images=24)
    stacked = stack_layers(targets, {1: 1.0})
    long = stacked.vectors * np.array([1000, 1, 1], np.float32)[:, None]
    config = make_config(fusion={}, normalise_targets="l2")
    one = config.build(seed=0).fit(responses, stacked)
    two = config.build(seed=0).fit(responses, replace(stacked, vectors=long))
    assert describe_fusion(one)["all"] == pytest.approx(describe_fusion(two)["all"], abs=1e-4)


def test_subjects_have_galleries_of_their_own(tmp_path):
    responses, targets = make_task(n_images=40, subjects=("01", "02"), noise=0.5)
    stacked = stack_layers(targets, {0: 1.0})
    # Subject 02 sees what the third layer holds.
    second = responses.trials["subject"].to_numpy() == "02"
    mixing = np.random.default_rng(1).standard_normal((N_TARGETS, 64))
    data = responses.data.copy()
    data[second] = (stacked.vectors[second, 2] @ mixing).reshape(-1, 4, 16)
    responses = replace(responses, data=data)
    config = make_config(
        fusion={"weights": "per_subject"}, normalise_targets="l2", epochs=15,
        selection={"kind": "last", "hold_out": 0.2},
    )  # fmt: skip
    encoder = config.build(seed=0).fit(responses, stacked)
    assert encoder.has_subject_galleries
    weights = describe_fusion(encoder)
    assert np.argmax(weights["01"]) == 0
    assert np.argmax(weights["02"]) == 2
    assert weights["unknown"] == pytest.approx(np.mean([weights["01"], weights["02"]], axis=0))
    one, two, anyone = (encoder.map_targets(stacked, subject) for subject in ("01", "02", None))
    assert one.space == two.space == anyone.space == encoder.predict(responses).space
    assert abs(one.vectors - two.vectors).max() > 0.1
    np.testing.assert_array_equal(anyone.vectors, encoder.map_targets(stacked, "stranger").vectors)
    mine = [responses.select(np.flatnonzero(rows)) for rows in (~second, second)]
    pick = [Embeddings(stacked.vectors[r], stacked.ids[r], stacked.space) for r in (~second, second)]
    for subject, other, trials, images in zip(("01", "02"), ("02", "01"), mine, pick, strict=True):
        assert score(encoder, trials, images, subject) > score(encoder, trials, images, other) + 0.2
    encoder.write(tmp_path)
    read = config.read(tmp_path)
    assert describe_fusion(read) == weights
    assert json.loads((tmp_path / "network.json").read_text())["fusion"] == weights
    np.testing.assert_array_equal(read.map_targets(stacked, "02").vectors, two.vectors)


def test_a_new_subject_starts_from_the_known_weights():
    responses, targets = make_task(n_images=24, subjects=("01", "02"))
    stacked = stack_layers(targets, {1: 1.0})
    encoder = make_config(fusion={"weights": "per_subject"}).build(seed=0).fit(responses, stacked)
    new, new_targets = make_task(n_images=12, subjects=("09",), seed=3)
    adapted = encoder.adapt(new, stack_layers(new_targets, {1: 1.0}), trainable="subject", epochs=1)
    weights = describe_fusion(adapted)
    assert list(weights) == ["01", "02", "09", "unknown"]
    assert weights["01"] == describe_fusion(encoder)["01"]
    assert weights["09"] != weights["unknown"]


def test_regression_sees_all_layers_and_a_killed_run_continues(tmp_path):
    responses, targets = make_task(subjects=("01", "02"))
    stacked = stack_layers(targets, {1: 1.0})
    config = make_config(
        fusion={"weights": "per_subject"}, objectives=[{"kind": "clip"}, {"kind": "mse"}, {"kind": "distillation"}],
        ema=0.9, checkpoint_seconds=0.0, normalise_targets="zscore", teacher={"queue": 9},
    )  # fmt: skip
    whole = config.build(seed=0).fit(responses, stacked)
    assert whole.predict_for_generator(responses).vectors.shape == (len(stacked), 3, N_TARGETS)
    assert whole.predict_for_generator(responses).space == "layers"
    encoder = config.build(seed=0)
    encoder.workspace = tmp_path
    kill_after(encoder, 5)
    with pytest.raises(Killed):
        encoder.fit(responses, stacked)
    again = config.build(seed=0)
    again.workspace = tmp_path
    assert_same_weights(whole, again.fit(responses, stacked))


def test_what_cannot_be_fused_is_refused():
    responses, targets = make_task(n_images=8)
    with pytest.raises(DataError, match=r"one vector per image; set target\.layer"):
        make_config(fusion={}).build(seed=0).fit(responses, targets)
    with pytest.raises(ValidationError, match="text, which has no layers"):
        make_config(fusion={}, objectives=[{"kind": "clip_image_text"}])
    with pytest.raises(ValidationError, match="cannot be compared"):
        make_config(fusion={}, out_of_fold=3)


def test_the_brain_side_of_a_projector_may_have_a_width_of_its_own():
    config = make_config(projector={"size": 5, "brain_width": 9}, epochs=1)
    weights = config.build(seed=0).fit(*make_task()).fitted.model.state_dict()
    assert {(5, 9), (5, N_TARGETS)} <= {tuple(value.shape) for value in weights.values()}
