"""Trials that stay in their file, against the copies that they replace."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Responses, TrialRows
from braindecode_vis.preprocessing import selection
from braindecode_vis.preprocessing.selection import average_repetitions, pick_rows


def make_responses(tmp_path, n_images=20, n_repeats=4, shape=(3, 5), dtype=np.float32):
    ids = np.tile([f"image{i:02d}" for i in range(n_images)], n_repeats)
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": ids,
         "repetition": np.repeat(np.arange(n_repeats), n_images), "split": "train"}
    )  # fmt: skip
    data = np.random.default_rng(0).standard_normal((len(ids), *shape)).astype(dtype)
    np.save(tmp_path / "data.npy", data)
    return Responses(np.load(tmp_path / "data.npy", mmap_mode="r"), ("trial", "channel", "time"), trials, "V")


@pytest.fixture
def responses(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MAX_COPIED_BYTES", 0)
    return make_responses(tmp_path)


ROWS = np.array([70, 3, 4, 5, 61, 3])


@pytest.mark.parametrize(
    "index",
    [
        0, -1, np.int64(2), slice(1, 4), slice(None, None, -2), [5, 0], np.array([1, 1]), np.array([True, False] * 3),
        Ellipsis, (slice(None), 1), (slice(2), slice(None), [0, 3]), (1, 2, 3), (Ellipsis, 0), (3, slice(1, 3)),
        (np.array([0, 2]), np.array([1, 0])), (np.array([4, 0]), slice(1, 2)), np.array([], int),
    ],
)  # fmt: skip
def test_rows_are_indexed_like_an_array(responses, index):
    lazy = pick_rows(responses, ROWS).data
    assert isinstance(lazy, TrialRows)
    expected = np.array(responses.data)[ROWS][index]
    np.testing.assert_array_equal(lazy[index], expected)
    assert np.shape(lazy[index]) == expected.shape


def test_rows_have_the_manners_of_an_array(responses):
    picked = pick_rows(responses, ROWS)
    lazy = picked.data
    whole = np.array(responses.data)[ROWS]
    assert (len(lazy), lazy.shape, lazy.ndim, lazy.dtype) == (6, (6, 3, 5), 3, np.float32)
    assert (lazy.nbytes, lazy.size) == (whole.nbytes, whole.size)
    np.testing.assert_array_equal(np.asarray(lazy), whole)
    assert np.asarray(lazy, dtype=np.float64).dtype == np.float64
    np.testing.assert_array_equal(picked.as_matrix(), whole.reshape(6, -1))
    assert picked.as_matrix().flags["C_CONTIGUOUS"]
    assert picked.stimulus_ids.tolist() == responses.stimulus_ids[ROWS].tolist()
    np.testing.assert_array_equal(picked.select([1, 0]).data, whole[[1, 0]])
    np.testing.assert_array_equal(np.asarray(pick_rows(picked, np.array([4, 1])).data), whole[[4, 1]])
    np.testing.assert_array_equal(list(lazy)[2], whole[2])
    with pytest.raises(IndexError, match="trial 6 of 6"):
        lazy[6]
    with pytest.raises(ValueError, match="without a copy"):
        np.array(lazy, copy=False)


def test_neighbouring_trials_are_a_slice_of_the_file(responses):
    picked = pick_rows(responses, np.arange(10, 30))
    assert isinstance(picked.data, np.memmap)
    assert np.shares_memory(picked.data, responses.data)
    np.testing.assert_array_equal(picked.data, responses.data[10:30])


def test_few_trials_and_arrays_in_memory_are_copied(tmp_path):
    small = make_responses(tmp_path)
    assert isinstance(pick_rows(small, ROWS).data, np.ndarray)
    held = Responses(np.array(small.data), small.dims, small.trials, "V")
    assert isinstance(pick_rows(held, ROWS).data, np.ndarray)


def test_averages_on_demand_equal_averages_in_memory(responses, monkeypatch):
    rows = np.random.default_rng(1).permutation(70)
    eager = average_repetitions(responses, rows)
    assert isinstance(eager.data, np.ndarray)
    monkeypatch.setattr(selection, "MAX_AVERAGED_BYTES", 0)
    lazy = average_repetitions(responses, rows)
    assert isinstance(lazy.data, TrialRows)
    assert lazy.data.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(lazy.data), eager.data)
    pd.testing.assert_frame_equal(lazy.trials, eager.trials)
    np.testing.assert_array_equal(lazy.data[[3, 1]], eager.data[[3, 1]])
    some = pick_rows(lazy, np.array([7, 0, 2]))
    np.testing.assert_array_equal(np.asarray(some.data), eager.data[[7, 0, 2]])
    again = average_repetitions(pick_rows(responses, rows))
    np.testing.assert_array_equal(np.asarray(again.data), eager.data)
    assert again.data.data is responses.data  # one step from the file


def test_memory_is_that_of_a_batch(tmp_path, monkeypatch):
    responses = make_responses(tmp_path, n_images=400, shape=(32, 100))  # 20 MB
    monkeypatch.setattr(selection, "MAX_COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(selection, "MAX_AVERAGED_BYTES", 1 << 20)
    order = np.random.default_rng(0).permutation(responses.n_trials)
    tracemalloc.start()
    single, averaged = pick_rows(responses, order), average_repetitions(responses, order)
    for start in range(0, 400, 50):
        assert single.data[start : start + 50].shape == averaged.data[start : start + 50].shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


def test_rows_of_a_slice_of_the_file_are_found(tmp_path):
    data = make_responses(tmp_path).data
    part = data[7:40][5:]
    np.testing.assert_array_equal(TrialRows(part, np.array([3, -1, 0]))[:], np.array(part)[[3, -1, 0]])
    flipped = data[::-1]
    np.testing.assert_array_equal(TrialRows(flipped, np.array([3, 0]))[:], np.array(flipped)[[3, 0]])
