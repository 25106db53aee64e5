"""Noise ceilings against known signal and noise, and voxel choice that cannot see the test trials."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing import reliability as rel
from tests.references import assert_close

SIGNAL = np.array([0.0, 0.5, 1.0, 2.0, 3.0])


def make_responses(n_images=400, n_rep=3, seed=0, test_scale=1.0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_images, len(SIGNAL))) * SIGNAL
    data = np.repeat(truth, n_rep, axis=0) + rng.standard_normal((n_images * n_rep, len(SIGNAL)))
    images = np.repeat(np.arange(n_images), n_rep)
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "stimulus_id": [f"i{i:04d}" for i in images],
            "repetition": np.tile(np.arange(n_rep), n_images),
            "split": np.where(images < n_images // 4, "test", "train"),
        }
    )  # fmt: skip
    data[(trials["split"] == "test").to_numpy()] *= test_scale
    order = rng.permutation(len(data))
    data, trials = data[order].astype(np.float32), trials.iloc[order].reset_index(drop=True)
    return Responses(data, ("trial", "voxel"), trials, "z"), truth


def test_ncsnr_finds_the_ratio_that_was_put_in():
    responses, _ = make_responses(2000)
    found = rel.compute_ncsnr(responses)
    assert found.n_images == 2000
    # 2000 images fix a variance to 3 %, the smallest signal less well.
    np.testing.assert_allclose(found.ncsnr[1:], SIGNAL[1:], rtol=0.1)
    assert found.ncsnr[0] < 0.2


def test_ncsnr_against_loops():
    responses, _ = make_responses(30)
    ids = responses.stimulus_ids
    noise = np.mean([responses.data[ids == i].var(axis=0, ddof=1) for i in np.unique(ids)], axis=0)
    signal = np.maximum(responses.data.var(axis=0, ddof=1) - noise, 0)
    np.testing.assert_allclose(
        rel.compute_ncsnr(responses).ncsnr, np.sqrt(signal / noise), rtol=1e-4, atol=1e-3
    )


def test_images_that_were_shown_once_say_nothing_of_noise():
    responses, _ = make_responses(40)
    repeats = responses.trials["repetition"].to_numpy()
    ids = responses.stimulus_ids
    often = (ids >= "i0010") | (repeats == 0)  # of ten images the first repetition alone is left
    mixed, repeated = (responses.select(np.flatnonzero(rows)) for rows in (often, ids >= "i0010"))
    for compute, name in ((rel.compute_ncsnr, "ncsnr"), (rel.compute_split_half, "correlation")):
        found, expected = compute(mixed), compute(repeated)
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name))
        assert found.n_images == expected.n_images == 30


def test_split_half_bounds_what_the_truth_itself_reaches():
    responses, truth = make_responses(1000)
    found = rel.compute_split_half(responses, n_splits=5)
    # A half of three has one or two trials: the plain correlation is that of single trials with pairs.
    expected = SIGNAL**2 / np.sqrt((SIGNAL**2 + 1) * (SIGNAL**2 + 0.5))
    np.testing.assert_allclose(found.correlation, expected, atol=0.07)
    means = np.stack(
        [responses.data[responses.stimulus_ids == f"i{i:04d}"].mean(axis=0) for i in range(1000)]
    )
    reached = [np.corrcoef(means[:, v], truth[:, v])[0, 1] for v in range(1, 5)]
    np.testing.assert_allclose(found.ceiling[1:], reached, atol=0.07)
    assert (
        rel.compute_split_half(responses, n_splits=2).correlation
        == rel.compute_split_half(responses, n_splits=2).correlation
    ).all()


def test_halves_without_noise_agree_however_often_an_image_was_shown():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(40), rng.integers(2, 7, 40))
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": images.astype(str), "repetition": 0,
         "split": "train"}
    )  # fmt: skip
    data = (5 + rng.standard_normal((40, 3)))[images].astype(np.float32)
    found = rel.compute_split_half(Responses(data, ("trial", "voxel"), trials, "z"), n_splits=3)
    assert_close(found.correlation, 1, scale=1)
    assert_close(found.ceiling, 1, scale=1)


def test_encoding_scores_rank_voxels_by_what_features_explain():
    responses, truth = make_responses(200)
    ids = [f"i{i:04d}" for i in range(200)]
    rng = np.random.default_rng(1)
    features = Embeddings(
        np.concatenate([truth[:, 1:], rng.standard_normal((200, 20))], axis=1).astype(np.float32), ids, "test"
    )
    scores = rel.compute_encoding_scores(responses, features, alphas=(1.0, 100.0))
    assert abs(scores[0]) < 0.15
    assert (np.diff(scores) > 0).all()
    assert scores[4] > 0.9
    assert scores.argmax() == 4
    # The penalty with the best mean score counts, wherever it stands in the list.
    alone = [rel.compute_encoding_scores(responses, features, alphas=(alpha,)) for alpha in (1e6, 1.0)]
    assert alone[0].mean() < alone[1].mean()
    both = rel.compute_encoding_scores(responses, features, alphas=(1e6, 1.0))
    assert_close(both, alone[1])


def test_what_cannot_be_estimated_is_refused():
    responses, _ = make_responses(20, n_rep=1)
    with pytest.raises(DataError, match="none of the 20 images"):
        rel.compute_ncsnr(responses)
    repeated, _ = make_responses(20)
    with pytest.raises(DataError, match="at least three"):
        rel.compute_split_half(repeated, (repeated.stimulus_ids == "i0000"))


def test_the_share_of_signal_and_its_intervals_by_example():
    trials = np.array([[1.0, 2], [3, 4], [2, 1], [6, 5], [4, 6]])
    table = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": np.repeat(list("abcde"), 2),
         "repetition": 0, "split": "test"}
    )  # fmt: skip
    responses = Responses(trials.reshape(-1, 1), ("trial", "voxel"), table, "z")
    found = rel.compute_signal_share(responses)
    assert (found.n_images, found.n_repetitions, found.n_freedom) == (5, 2, 5)
    # Six digits are given; MB 7.1, MW .8, F 8.875.
    np.testing.assert_allclose([found.share[0], found.mean[0]], 1 - 2 / 4 / 8.875, rtol=1e-12)
    assert found.share[0] == pytest.approx(0.943662, abs=5e-7)
    np.testing.assert_allclose(np.ravel(found.bound_features()), [0.167562, 0.987968], atol=5e-7)
    np.testing.assert_allclose(np.ravel(found.bound_mean()), [0.886153, 1.001171], atol=5e-7)
    # Leaving out by the closed form, and by hand.
    for image in range(5):
        rest = np.delete(np.arange(5), image)
        alone, _ = rel.measure_signal_share(trials[rest].reshape(-1, 1), np.full(4, 2))
        assert found.left_out[image, 0] == pytest.approx(alone[0], rel=1e-9)
    # Of single trials: signal var(means) - MW / 2 keeps its size, noise has twice the variance.
    single = rel.compute_signal_share(responses, n_averaged=1.0)
    assert single.share[0] == pytest.approx(0.943662 / (0.943662 + 2 * 0.056338), abs=1e-5)
    low, high = single.bound_features()
    np.testing.assert_allclose(np.ravel([low, high]), [0.167562 / 1.832438, 0.987968 / 1.012032], atol=2e-6)


def test_the_share_of_signal_of_unequal_repetitions_without_an_image():
    rng = np.random.default_rng(4)
    counts = rng.integers(2, 6, 12)
    values = np.repeat(rng.standard_normal((12, 3)), counts, axis=0) + rng.standard_normal((counts.sum(), 3))
    _, left_out = rel.measure_signal_share(values, counts, n_averaged=2.0)
    owner = np.repeat(np.arange(12), counts)
    for image in (0, 7):
        rest = owner != image
        # How many are averaged is asked of all images, so the factor is that of all of them.
        ratio = (1 / np.mean(1 / counts)) / (1 / np.mean(1 / np.delete(counts, image)))
        alone, _ = rel.measure_signal_share(values[rest], np.delete(counts, image), n_averaged=2.0 / ratio)
        np.testing.assert_allclose(left_out[image], alone, rtol=1e-9)


def test_the_share_of_signal_is_unbiased_with_and_without_signal():
    """The root of a clipped ratio was .23 where nothing was, and .36 where .46 was right (12 images, 3 repetitions)."""
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5):
        signal = np.sqrt(share / (1 - share) / 3)
        truth = signal * rng.standard_normal((12, 4000))
        values = np.repeat(truth, 3, axis=0) + rng.standard_normal((36, 4000))
        found, _ = rel.measure_signal_share(values, np.full(12, 3))
        # 4000 voxels with a standard deviation of .45 fix the mean to .007.
        assert found.mean() == pytest.approx(share, abs=0.028)
    flat = np.column_stack([np.ones(36), np.repeat(rng.standard_normal(12), 3)])
    np.testing.assert_allclose(rel.measure_signal_share(flat, np.full(12, 3))[0], [0, 1])


def test_small_blocks_of_a_file_are_cut_from_large_ones(tmp_path, monkeypatch):
    """Eight features of 16 000 trials were read at a time, so that each trial was looked up two thousand times."""
    responses, _ = make_responses(60)
    data = np.repeat(responses.data, 9, axis=1)  # (180, 45)
    np.save(tmp_path / "data.npy", data)
    monkeypatch.setattr(rel, "_SMALL_BLOCK_BYTES", 8 * 180 * 4)
    found = []
    for held, n_bytes in ((data, 8 * 180 * 4), (np.load(tmp_path / "data.npy", mmap_mode="r"), 8 * 180 * 18)):
        monkeypatch.setattr(rel, "_BLOCK_BYTES", n_bytes)
        one = Responses.from_checked(held, ("trial", "voxel"), responses.trials, "z", {})
        blocks = [part for part, _ in rel._iterate_voxels(one, np.arange(180), 8 * 180 * 4)]
        assert [(part.start, part.stop) for part in blocks][:6] == [(n, n + 4) for n in range(0, 24, 4)]
        found.append(rel.compute_signal_share(one))
    np.testing.assert_array_equal(found[0].share, found[1].share)
    np.testing.assert_array_equal(found[0].left_out, found[1].left_out)


def test_few_rows_of_a_file_are_mapped_at_a_time(tmp_path, monkeypatch):
    """All 16 000 test trials of a subject were: a gigabyte of pages, which counted as memory of the run."""
    responses, _ = make_responses(60)
    np.save(tmp_path / "data.npy", responses.data)
    held = np.load(tmp_path / "data.npy", mmap_mode="r")
    monkeypatch.setattr(rel, "ROWS_OF_A_MAP", 50)
    released = []
    monkeypatch.setattr(rel, "release_pages", lambda array: released.append(array is held))
    one = Responses.from_checked(held, ("trial", "voxel"), responses.trials, "z", {})
    index = np.arange(0, 180, 2)[::-1]
    blocks = [block for _, block in rel._iterate_voxels(one, index)]
    assert released == [True, True]  # 90 rows
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), responses.data[index].astype(np.float64))
