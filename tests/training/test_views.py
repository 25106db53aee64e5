"""Views of an image as targets: settled ones, random ones, and the rule of uncertainty."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.training.fitted import reduce_views
from braindecode_vis.training.image_side import ViewChooser
from tests.training.test_loop import Killed, kill_after
from tests.training.toy_task import N_TARGETS, assert_same_weights, get_weights, make_config, make_task


def stack_views(targets, spread=0.3):
    """Return three views: the target itself in the middle, less and more of a fixed pattern around it."""
    pattern = np.random.default_rng(2).standard_normal(N_TARGETS).astype(np.float32)
    offsets = spread * pattern * np.array([1, 0, -2], np.float32)[:, None]
    return Embeddings(targets.vectors[:, None] + offsets, targets.ids, "views")


def test_settled_views_are_the_mean_or_the_usual_one():
    _, targets = make_task(n_images=8)
    stacked = stack_views(targets)
    usual = reduce_views(stacked, "uncertainty")
    np.testing.assert_array_equal(usual.vectors, targets.vectors)
    assert usual.space == "views/usual-view"
    mean = reduce_views(stacked, "sample")
    np.testing.assert_allclose(mean.vectors, stacked.vectors.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert mean.space == "views/mean-view" == reduce_views(stacked, "mean").space
    assert reduce_views(targets, None) is targets


def test_a_random_view_is_one_of_the_three_and_depends_on_its_place_only():
    flat = torch.arange(24.0).reshape(4, 6)
    chooser = ViewChooser("sample", 3, np.array(list("abcd"), dtype=object), seed=1)
    seen = set()
    for update in range(30):
        chosen = chooser.choose(flat, np.arange(4), (update, 0, 0))
        again = chooser.choose(flat, np.arange(4), (update, 0, 0))
        assert torch.equal(chosen, again)
        for row in range(4):
            views = flat[row].reshape(3, 2).tolist()
            seen.add((row, views.index(chosen[row].tolist())))
    assert len(seen) == 12


def test_the_rule_gives_the_easy_less_blur_and_the_hard_more():
    """Forty images of alike similarity, one far above and one far below, over two batches."""
    ids = np.array([f"i{n}" for n in range(42)], dtype=object)
    chooser = ViewChooser("uncertainty", 3, ids, seed=0)
    stacked = torch.arange(3.0).repeat(42, 1)
    assert chooser.choose(stacked, np.arange(42), (0, 0, 0)).flatten().tolist() == [1.0] * 42
    similarity = np.r_[np.tile([0.98, 1.02], 20), 3.0, -1.0]
    chooser.learn(np.arange(42), similarity)
    views = chooser.choose(stacked, np.arange(42), (1, 0, 0)).flatten().tolist()
    assert views == [1.0] * 40 + [0.0, 2.0]
    assert chooser.count() == [1, 40, 1]
    chooser.learn(np.array([0, 0, 1]), np.array([0.2, 0.4, 0.5]))  # two trials of one image count once
    # from 1 at the start, as in UBP
    assert chooser.rule.average["i0"] == pytest.approx(0.7 * (0.7 + 0.3 * 0.98) + 0.3 * 0.3)
    other = ViewChooser("uncertainty", 3, ids, seed=0)
    other.load_tensors(chooser.as_tensors())
    assert other.rule.average == chooser.rule.average
    assert other.rule.view == chooser.rule.view


def test_averaged_views_train_as_their_mean_does():
    responses, targets = make_task()
    stacked = stack_views(targets)
    mean = Embeddings(stacked.vectors.mean(axis=1), targets.ids, "mean")
    settings = {"selection": {"kind": "last", "hold_out": 0.2}, "normalise_targets": "zscore"}
    one = make_config(view_choice="mean", **settings).build(seed=0).fit(responses, stacked)
    two = make_config(**settings).build(seed=0).fit(responses, mean)
    for name, value in get_weights(one).items():
        np.testing.assert_allclose(value, get_weights(two)[name], rtol=1e-3, atol=1e-4)
    assert one.fitted.history[-1]["validation_top1"] == two.fitted.history[-1]["validation_top1"]


@pytest.mark.parametrize("choice", ["sample", "uncertainty"])
def test_predictions_and_galleries_meet_in_the_settled_space(choice, tmp_path):
    responses, targets = make_task(n_images=60, noise=0.5)
    stacked = stack_views(targets)
    config = make_config(view_choice=choice, epochs=12, objectives=[{"kind": "clip"}, {"kind": "mse"}])
    encoder = config.build(seed=0).fit(responses, stacked)
    predicted, gallery = encoder.predict(responses), encoder.map_targets(stacked)
    assert predicted.space == gallery.space == reduce_views(stacked, choice).space
    assert predicted.vectors.shape == gallery.vectors.shape == (len(stacked), N_TARGETS)
    np.testing.assert_array_equal(gallery.vectors, reduce_views(stacked, choice).vectors)
    np.testing.assert_array_equal(encoder.map_targets(gallery).vectors, gallery.vectors)
    settled = encoder.map_for_generator(stacked)
    assert (
        settled.space
        == encoder.map_for_generator(settled).space
        == encoder.predict_for_generator(responses).space
    )
    cosine = np.sum(predicted.vectors * gallery.vectors, axis=1)
    cosine /= np.linalg.norm(predicted.vectors, axis=1) * np.linalg.norm(gallery.vectors, axis=1)
    assert cosine.mean() > 0.5
    encoder.write(tmp_path)
    read = config.read(tmp_path)
    np.testing.assert_array_equal(read.map_targets(stacked).vectors, gallery.vectors)
    learned = make_config(view_choice=choice, projector={"size": 4}, epochs=1).build(seed=0)
    learned.fit(responses, stacked)
    assert learned.map_targets(stacked).space == learned.predict(responses).space == learned.comparison_space


def test_the_rule_chooses_during_training_and_a_killed_run_continues(tmp_path):
    responses, targets = make_task(n_images=48, n_repetitions=1)
    # One image is answered by noise, so that it stays far below the others.
    data = responses.data.copy()
    data[responses.stimulus_ids == "image007"] *= -1
    responses, stacked = replace(responses, data=data), stack_views(targets)
    config = make_config(view_choice="uncertainty", epochs=12, checkpoint_seconds=0.0, batch_size=48)
    whole = config.build(seed=0).fit(responses, stacked)
    counts = np.array([record["view_counts"] for record in whole.fitted.history])
    assert (counts.sum(axis=1) == 48).all()
    assert (counts[5:, 1] > 40).all()  # averages that start at 1 need some batches to reach the logits
    assert counts[-1, 2] >= 1  # hard ones see more blur
    usual = make_config(epochs=12, batch_size=48).build(seed=0).fit(responses, targets)
    assert any((a != get_weights(usual)[k]).any() for k, a in get_weights(whole).items())
    encoder = config.build(seed=0)
    encoder.workspace = tmp_path
    kill_after(encoder, 9)
    with pytest.raises(Killed):
        encoder.fit(responses, stacked)
    again = config.build(seed=0)
    again.workspace = tmp_path
    assert_same_weights(whole, again.fit(responses, stacked))
    assert [r["view_counts"] for r in again.fitted.history] == counts.tolist()


def test_what_has_no_views_is_refused():
    responses, targets = make_task(n_images=8)
    with pytest.raises(DataError, match="views with combine stacked"):
        make_config(view_choice="sample").build(seed=0).fit(responses, targets)
    two = replace(stack_views(targets), vectors=stack_views(targets).vectors[:, :2])
    with pytest.raises(DataError, match="needs three views"):
        make_config(view_choice="uncertainty").build(seed=0).fit(responses, two)
    with pytest.raises(ValidationError, match="view_choice and fusion cannot be combined"):
        make_config(view_choice="mean", fusion={})
    mixing = {"augmentations": [{"kind": "trial_mixing"}], "objectives": [{"kind": "bimixco"}]}
    with pytest.raises(ValidationError, match="blends it with another"):
        make_config(view_choice="uncertainty", **mixing)
