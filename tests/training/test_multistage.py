"""Further trainings whose batches lie inside one cluster of what was learnt before, and their outputs side by side."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.training.batches import gather_groups, make_grouped_batches
from braindecode_vis.training.multistage import MultistageConfig
from tests.processes import run_together
from tests.training.toy_task import assert_same_weights, get_weights, make_config, make_task

SETTINGS = {
    "network": {"kind": "eegproject", "width": 8}, "epochs": 2, "batch_size": 8, "device": "cpu",
    "optimiser": {"lr": 3e-3}, "selection": {"kind": "last", "hold_out": 0.2},
}  # fmt: skip


def make(**settings):
    return MultistageConfig.model_validate({**SETTINGS, "n_stages": 2, "stage_clusters": 2, **settings})


def test_batches_lie_inside_one_group_and_cover_all():
    stimuli = np.arange(60) // 2
    groups = np.where(stimuli < 10, 0, np.where(stimuli < 20, 1, stimuli))  # ten groups of one image each
    members = gather_groups(groups, stimuli)
    assert [len(own) for own in members] == [20, 20, 20]
    assert sorted(np.concatenate(members)) == list(range(60))
    batches = make_grouped_batches(members, stimuli, 8, seed=0, epoch=1)
    assert sorted(np.concatenate(batches)) == list(range(60))
    assert {len(batch) for batch in batches} == {6, 7}
    inside = [{min(stimuli[u] // 10, 2) for u in batch} for batch in batches]
    assert all(len(own) == 1 for own in inside)
    assert inside != sorted(inside, key=min)
    again = make_grouped_batches(members, stimuli, 8, seed=0, epoch=1)
    assert all((one == two).all() for one, two in zip(batches, again, strict=True))
    pairs = make_grouped_batches(members, stimuli, 8, seed=0, epoch=1, n_processes=2)
    assert all(len(batch) % 2 == 0 for batch in pairs)


def test_a_few_images_that_are_left_join_the_smallest_group():
    stimuli = np.arange(30)
    members = gather_groups(np.where(stimuli < 3, 7, stimuli // 15), stimuli)
    assert [len(own) for own in members] == [15, 15]
    assert set(range(3)) < set(members[1])


def test_clusters_that_are_too_small_to_fill_a_batch_are_told():
    """Three stages of 500 clusters were three plain trainings, without a word."""
    responses, targets = make_task(n_images=24)
    with pytest.warns(Notice, match="stage 2 draws its batches from all 20 training images, like the first"):
        make(stage_clusters=20, epochs=1).build(seed=0).fit(responses, targets)


@pytest.fixture(scope="module")
def fitted():
    responses, targets = make_task(n_images=40, noise=0.5)
    return make().build(seed=0).fit(responses, targets), responses, targets


def test_the_first_stage_is_the_network_alone_and_all_hold_out_the_same(fitted):
    encoder, responses, targets = fitted
    alone = make_config(**SETTINGS).build(seed=0).fit(responses, targets)
    assert_same_weights(encoder.stages[0], alone)
    assert len({stage.fitted.held_out for stage in encoder.stages}) == 1
    assert encoder.list_held_out(responses) == alone.fitted.held_out
    assert set(encoder.labels[0].values()) == {0, 1}
    batches = encoder.stages[1].groups
    assert batches == encoder.labels[0]


def test_outputs_of_stages_meet_images_side_by_side(fitted):
    """The cosine is the mean of the stages' cosines, of what each compared in training."""
    encoder, responses, targets = fitted
    rows = np.sort(np.unique(targets.ids.astype(str), return_index=True)[1])
    images = targets.vectors[rows]
    gallery = encoder.map_targets(Embeddings(images, targets.ids[rows], targets.space))
    predicted = encoder.predict(responses)
    assert predicted.space == gallery.space == encoder.comparison_space
    assert predicted.vectors.shape == (responses.n_trials, 12)
    centre = [stage.fitted.model.target_scale.centre.numpy() for stage in encoder.stages]
    raw = [stage.predict(responses).vectors for stage in encoder.stages]
    cosines = [
        normalise_rows(one - c) @ normalise_rows(images - c).T for one, c in zip(raw, centre, strict=True)
    ]
    mean = normalise_rows(predicted.vectors) @ normalise_rows(gallery.vectors).T
    np.testing.assert_allclose(mean, sum(cosines) / 2, atol=1e-5)
    module, inputs = encoder.as_module(responses)
    np.testing.assert_allclose(module(**inputs).detach().numpy(), predicted.vectors, atol=1e-5)
    generated = encoder.predict_for_generator(responses)
    np.testing.assert_array_equal(generated.vectors, raw[0])
    out = encoder.predict_out_of_fold(responses, targets)
    assert set(out.ids) == set(encoder.stages[1].fitted.held_out)
    assert out.space == targets.space


def test_it_is_written_read_and_adapted(fitted, tmp_path):
    encoder, responses, _ = fitted
    encoder.write(tmp_path)
    again = make().read(tmp_path)
    np.testing.assert_array_equal(encoder.predict(responses).vectors, again.predict(responses).vectors)
    assert again.comparison_space == encoder.comparison_space
    assert again.labels == encoder.labels
    few, few_targets = make_task(n_images=40, n_repetitions=1, subjects=("02",))
    adapted = again.adapt(few, few_targets, epochs=1)
    assert adapted.comparison_space != encoder.comparison_space or len(adapted.predict(few)) == 40
    assert adapted.stages[1].fitted.held_out == adapted.stages[0].fitted.held_out
    with pytest.raises(DataError, match=r"2 stages, but encoder\.n_stages is 3"):
        make(n_stages=3).read(tmp_path)


def test_a_killed_training_goes_on_in_its_stage(fitted, tmp_path):
    encoder, responses, targets = fitted
    stopped, met = make(checkpoint_seconds=0).build(seed=0), []
    stopped.workspace = tmp_path

    def stop(done, total, text):
        met.append(text)
        if text.startswith("stage 2") and done == 3:
            raise KeyboardInterrupt

    stopped.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(responses, targets)
    met.clear()
    stopped.progress = lambda done, total, text: met.append((text[:7], done))
    stopped.fit(responses, targets)
    assert ("stage 1", 1) not in met
    assert ("stage 2", 2) not in met
    for one, two in zip(encoder.stages, stopped.stages, strict=True):
        assert_same_weights(one, two)


def test_labels_multiply_over_stages_and_may_come_from_learnt_images():
    responses, targets = make_task(n_images=40, n_repetitions=1, noise=0.5)
    encoder = make(
        n_stages=3,
        cluster_by="image",
        projector={"size": 5},
        epochs=1,
        selection={"kind": "last", "hold_out": 0},
    ).build(seed=0)
    encoder.fit(responses, targets)
    one, two = encoder.labels
    assert all(two[name] // 2 == one[name] for name in one)
    assert len(set(two.values())) > len(set(one.values()))
    assert encoder.predict(responses).vectors.shape == (40, 15)
    with pytest.raises(DataError, match="has not been fitted"):
        make().build(seed=0).predict(responses)


def fit_and_collect():
    responses, targets = make_task(n_images=40)
    settings = {"network": {"kind": "eegproject", "dropout": 0, "width": 8}, "hide_subject": 0}
    encoder = make(**settings).build(seed=0).fit(responses, targets)
    return encoder.labels, [get_weights(stage) for stage in encoder.stages]


def test_a_stage_may_go_on_from_the_weights_before():
    """With a rate of next to nothing, the second stage is the first."""
    responses, targets = make_task(n_images=40, n_repetitions=1)
    settings = {"optimiser": {"lr": 1e-12, "weight_decay": 0}, "epochs": 1}
    drift = {}
    for start in ("anew", "previous"):
        one, two = make(**settings, stage_start=start).build(seed=0).fit(responses, targets).stages
        other = dict(two.fitted.model.named_parameters())
        pairs = [(own, other[name]) for name, own in one.fitted.model.named_parameters()]
        drift[start] = max(float((own - other).detach().abs().max()) for own, other in pairs)
    assert drift["previous"] < 1e-5 < drift["anew"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    labels, weights = fit_and_collect()
    for found_labels, found in run_together(lambda rank: fit_and_collect(), tmp_path):
        assert found_labels == labels
        for one, two in zip(weights, found, strict=True):
            for name, value in one.items():
                np.testing.assert_allclose(two[name], value, atol=2e-4, err_msg=name)


def test_the_first_stage_writes_captions(fitted):
    encoder, responses, _ = fitted
    with pytest.raises(DataError, match="trained without the objective captioning"):
        encoder.describe(responses)
    with pytest.raises(DataError, match="trained without the objective captioning"):
        encoder.describe_mean()
