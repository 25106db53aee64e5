"""Which trials are in which batch."""

import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from braindecode_vis.training.batches import (
    count_batches,
    draw_all,
    draw_halves,
    draw_subset,
    find_partners,
    gather_images,
    make_batches,
    make_units,
    mix_draws,
)
from braindecode_vis.training.feed import RowSource, read_ahead


def test_an_epoch_holds_every_unit_once_in_batches_of_nearly_one_size():
    batches = make_batches(np.arange(103), 20, seed=0, epoch=4)
    assert sorted(np.concatenate(batches)) == list(range(103))
    assert sorted({len(b) for b in batches}) == [17, 18]
    assert (
        np.concatenate(make_batches(np.arange(103), 20, seed=0, epoch=4)) == np.concatenate(batches)
    ).all()
    assert (
        np.concatenate(make_batches(np.arange(103), 20, seed=0, epoch=5)) != np.concatenate(batches)
    ).any()


def test_processes_get_batches_of_one_size():
    batches = make_batches(np.arange(103), 20, seed=0, epoch=0, n_processes=4)
    assert all(len(batch) % 4 == 0 and len(batch) <= 20 for batch in batches)
    assert 103 - sum(map(len, batches)) < 4
    assert len(batches) == count_batches(103, 20, 4)
    batches = make_batches(np.arange(57), 18, seed=0, epoch=0, n_processes=8)  # at most 16 in a batch
    assert [len(batch) for batch in batches] == [16, 16, 16, 8]


def test_full_batches_with_a_smaller_last_one_or_without_it_as_a_data_loader_makes_them():
    """As torch makes them: the rest kept, or left out with drop_last; of 16 540 trials 16 batches of 1024 and 156."""
    for n, size in ((16540, 1024), (103, 20), (40, 20)):
        loaders = [DataLoader(range(n), size, drop_last=drop) for drop in (False, True)]
        for last, loader in zip(("smaller", "dropped"), loaders, strict=True):
            batches = make_batches(np.arange(n), size, seed=0, epoch=1, last=last)
            assert [len(batch) for batch in batches] == [len(batch) for batch in loader]
            assert len(batches) == count_batches(n, size, last=last)
            assert len(np.unique(np.concatenate(batches))) == sum(map(len, batches))
    assert [len(b) for b in make_batches(np.arange(41), 20, seed=0, epoch=0, last="smaller")] == [20, 20]
    shared = make_batches(np.arange(103), 20, seed=0, epoch=0, n_processes=4, last="smaller")
    assert [len(batch) for batch in shared] == [20] * 5
    assert {len(b) for b in make_batches(np.arange(16540), 1024, seed=0, epoch=0)} == {972, 973}


def test_trials_of_an_image_stand_together():
    """As many subjects of each image in every batch, as the sampler of Neurobridge_ssl@7898cf6 puts them there.

    Run beside it with 16 540 images of nine subjects and batches of 1024: both make 146 batches of 1017 trials, each of
    113 images with nine trials, and leave 378 of 148 860 trials out of an epoch. Trials drawn whatever they show are of
    996 images. They differ where images were seen by unlike numbers of subjects (its runs are as long as the smallest
    number, and an epoch may show a trial twice; here each trial comes once), and in the order, which is of other draws.
    """
    stimuli = np.tile(np.arange(60), 9)
    for epoch in range(3):
        batches = make_batches(stimuli, 63, seed=0, epoch=epoch, last="dropped", per_image=9)
        assert [len(batch) for batch in batches] == [63] * 8  # 7 images each, and 4 of 60 left out
        for batch in batches:
            assert np.unique(stimuli[batch], return_counts=True)[1].tolist() == [9] * 7
        assert len(np.unique(np.concatenate(batches))) == 504
    # Which images come together, and which are left out, changes from epoch to epoch.
    first, again = (
        make_batches(stimuli, 63, seed=0, epoch=epoch, last="dropped", per_image=9)[0] for epoch in (0, 1)
    )
    assert set(stimuli[first]) != set(stimuli[again])


def test_an_image_with_more_trials_returns_and_one_with_fewer_has_a_shorter_run():
    stimuli = np.array([0] * 5 + [1] * 2 + [2])
    order = gather_images(np.array([7, 0, 5, 1, 2, 6, 3, 4]), stimuli, 2)
    assert order.tolist() == [7, 0, 1, 5, 6, 2, 3, 4]
    # Every unit once an epoch, whatever is cut where batches are of nearly one size or shared by processes.
    stimuli = np.random.default_rng(0).integers(0, 30, 203)
    for how in ({"last": "even"}, {"last": "smaller"}, {"n_processes": 2}):
        batches = make_batches(stimuli, 24, seed=0, epoch=0, per_image=4, **how)
        assert len(np.unique(np.concatenate(batches))) == sum(map(len, batches)) >= 202


def test_no_batch_shows_one_image_alone():
    stimuli = np.array([0] * 30 + [1, 2, 3, 4])
    for epoch in range(30):
        batches = make_batches(stimuli, 5, seed=0, epoch=epoch)
        assert sorted(np.concatenate(batches)) == list(range(34))
        lone = sum(len(np.unique(stimuli[batch])) == 1 for batch in batches)
        # Four other images cannot serve seven batches, but none of them may be wasted.
        assert lone >= 3
    stimuli = np.array([0] * 6 + [1] * 6)
    assert all(
        len(np.unique(stimuli[batch])) == 2
        for epoch in range(50)
        for batch in make_batches(stimuli, 3, seed=0, epoch=epoch)
    )


@pytest.fixture
def units():
    """Three images, seen 1, 2 and 4 times by one subject; the last one once by another."""
    stimuli = np.array([0, 1, 2, 2, 1, 2, 2, 2])
    subjects = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    return make_units(np.arange(8), subjects, stimuli, stimuli, by_image=True)


def test_repetitions_of_an_image_stand_together_per_subject(units):
    assert units.counts.tolist() == [1, 2, 4, 1]
    assert units.trials[2].tolist() == [2, 3, 5, 6]
    assert units.subjects.tolist() == [0, 0, 0, 1]
    assert draw_all(units, np.array([1])).trials[0, :2].tolist() == [1, 4]
    np.testing.assert_allclose(draw_all(units, np.array([1, 2])).weights, [[0.5, 0.5, 0, 0], [0.25] * 4])


def test_subsets_and_halves_weigh_only_own_trials(units):
    rng = np.random.default_rng(0)
    batch = np.array([2, 1, 0])
    sizes = set()
    for _ in range(60):
        weights = draw_subset(units, batch, 2, rng).weights
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        assert not weights[1, 2:].any()
        assert not weights[2, 1:].any()
        sizes.add(int((weights[0] > 0).sum()))
        first, second = draw_halves(units, batch[:2], rng)
        assert not (first.weights * second.weights).any()
        np.testing.assert_allclose((first.weights + second.weights)[1], [1, 1, 0, 0])
        assert (first.weights[0] > 0).sum() == 2
    assert sizes == {2, 3, 4}
    one = {tuple(draw_subset(units, batch[:1], 1, rng, 1).weights[0]) for _ in range(60)}
    assert one == {tuple(row) for row in np.eye(4)}  # MindEye: one repetition of each image at a time
    most = {int((draw_subset(units, batch, 1, rng, 3).weights[0] > 0).sum()) for _ in range(60)}
    assert most == {1, 2, 3}


@pytest.mark.parametrize("max_bytes", [0, 10**9])
def test_weighted_rows_are_the_mean_of_their_trials(max_bytes):
    array = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(np.float32)
    rows = np.array([1, 3, 4, 7])
    source = RowSource(
        lambda r: array[r], rows, row_bytes=24, device=torch.device("cpu"), max_bytes=max_bytes
    )
    assert (source.resident is None) == (max_bytes == 0)
    wanted = np.array([[7, 3], [1, 1]])
    weights = np.array([[0.25, 0.75], [1, 0]], dtype=np.float32)
    found = source.pick(*source.fetch(wanted), weights)
    np.testing.assert_allclose(found[0], 0.25 * array[7] + 0.75 * array[3], rtol=1e-6)
    np.testing.assert_array_equal(found[1], array[1])


def test_an_array_in_memory_is_used_as_it_is_where_it_can_be():
    array = np.arange(40, dtype=np.float32).reshape(10, 4)
    options = {"row_bytes": 16, "device": torch.device("cpu"), "max_bytes": 10**6}
    rows = np.arange(2, 9)
    for stored, shared in ((array, True), (array.astype(np.float64), False), (array[:, ::2], False)):
        source = RowSource(lambda r, a=stored: a[r].astype(np.float32), rows, **options, stored=stored)
        assert np.shares_memory(source.resident.numpy(), array) == shared
        found = source.pick(*source.fetch(np.array([7, 3])))
        np.testing.assert_array_equal(found, stored[[7, 3]])


def test_reading_ahead_keeps_order_raises_and_ends():
    assert list(read_ahead(range(20), lambda i: i * i, threaded=True)) == [i * i for i in range(20)]

    def fail(i):
        if i == 3:
            raise ValueError("row 3")
        return i

    ahead = read_ahead(range(10), fail, threaded=True)
    with pytest.raises(ValueError, match="row 3"):
        list(ahead)
    endless = read_ahead(iter(int, 1), lambda i: i, threaded=True)
    assert next(endless) == 0
    endless.close()
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


def test_partners_are_those_of_another_subject_and_the_same_image():
    subjects = np.array([0, 0, 0, 1, 1, 2, 2])
    stimuli = np.array([0, 1, 2, 0, 1, 0, 3])
    units = make_units(np.arange(7), subjects, stimuli, stimuli, by_image=False)
    partners = find_partners(units)
    expected = [
        {j for j in range(7) if stimuli[j] == stimuli[i] and subjects[j] != subjects[i]} for i in range(7)
    ]
    assert [set(partners.units[i, : partners.counts[i]]) for i in range(7)] == expected
    rng = np.random.default_rng(0)
    drawn = np.stack([partners.draw(np.arange(7), rng) for _ in range(50)])
    assert [set(drawn[:, i]) for i in range(7)] == [e or {i} for i, e in enumerate(expected)]


def test_a_mixed_draw_is_the_weighted_sum_of_both():
    units = make_units(
        np.arange(6), np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int), np.zeros(6, int), by_image=True
    )
    own, other = draw_all(units, np.array([0, 1])), draw_all(units, np.array([1, 0]))
    mixed = mix_draws(own, other, np.array([0.75, 1.0], np.float32))
    data = np.arange(6.0) ** 2
    found = (data[mixed.trials] * mixed.weights).sum(axis=1)
    np.testing.assert_allclose(
        found, [0.75 * data[:3].mean() + 0.25 * data[3:].mean(), data[3:].mean()], rtol=1e-6
    )
