"""Alignment of subjects and scaling."""

from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base import arrays
from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.alignment import InputScalingConfig, InputTransform
from tests.training.toy_task import make_config, make_task

DIMS = ("channel", "time")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    mixing = np.eye(4) + 0.5 * rng.standard_normal((4, 4))
    return (mixing @ rng.standard_normal((60, 4, 30)) + 1e3).astype(np.float32)


def fit(data, scaling="none", align="none", subjects=None, dims=DIMS, clamp=None, rows=None):
    subjects = np.array(["a"] * len(data), dtype=object) if subjects is None else subjects
    transform = InputTransform(InputScalingConfig(kind=scaling, clamp=clamp), align, dims)
    rows = np.arange(len(data)) if rows is None else rows
    return transform.fit(data, rows, subjects), subjects


@pytest.mark.parametrize("block", [1 << 12, 64 << 20])
def test_zscore_and_robust_agree_with_numpy_in_any_block(data, block, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", block)
    samples = data.transpose(0, 2, 1).reshape(-1, 4).astype(np.float64)
    transform, subjects = fit(data, "zscore")
    expected = (data - samples.mean(0)[:, None]) / samples.std(0)[:, None]
    np.testing.assert_allclose(
        transform.read(data, np.arange(60), subjects), expected, atol=2e-4
    )  # 1e3 in float32
    transform, subjects = fit(data, "robust", clamp=1.0)
    low, middle, high = np.percentile(samples, [25, 50, 75], axis=0)
    expected = np.clip((data - middle[:, None]) / (high - low)[:, None], -1, 1)
    np.testing.assert_allclose(transform.read(data, np.arange(60), subjects), expected, atol=2e-4)


def test_voxels_have_a_statistic_each_and_padding_stays_zero():
    data = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    data[:, 5:] = 0
    transform, subjects = fit(data, "zscore", dims=("voxel",))
    found = transform.read(data, np.arange(50), subjects)
    np.testing.assert_allclose(found[:, :5].std(axis=0), 1, rtol=1e-4)
    assert not found[:, 5:].any()


def test_euclidean_alignment_makes_the_mean_covariance_the_identity(data):
    subjects = np.array(["a"] * 30 + ["b"] * 30, dtype=object)
    data[30:] *= 7
    transform, _ = fit(data, align="euclidean", subjects=subjects)
    found = transform.read(data, np.arange(60), subjects).astype(np.float64)
    for part in (found[:30], found[30:]):
        mean = np.mean([x @ x.T for x in part], axis=0)
        np.testing.assert_allclose(mean, np.eye(4), atol=2e-2)  # a baseline of 1e3 costs digits


def test_statistics_see_training_rows_only(data):
    rows = np.arange(40)
    first, _ = fit(data, "zscore", "euclidean", rows=rows)
    data[40:] = 1e6
    second, _ = fit(data, "zscore", "euclidean", rows=rows)
    for one, two in zip(first.as_tensors().values(), second.as_tensors().values(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_euclidean_alignment_refuses_voxels_and_single_trials(data):
    with pytest.raises(DataError, match="needs channels x times"):
        fit(data[:, 0], align="euclidean", dims=("voxel",))
    with pytest.raises(DataError, match="at least two of its trials"):
        fit(data[:1], align="euclidean")


@pytest.mark.parametrize("kind", ["euclidean", "zscore"])
def test_a_new_subject_is_aligned_by_its_own_trials_and_named(kind):
    responses, targets = make_task(subjects=("01", "02"))
    encoder = make_config(subject_alignment=kind, epochs=1).build(seed=0).fit(responses, targets)
    encoder.predict(responses)
    assert encoder.label_free_subjects == ()
    stranger, _ = make_task(subjects=("09",), seed=4)
    plain = encoder.predict(stranger).vectors
    assert encoder.label_free_subjects == ("09",)
    louder = replace(stranger, data=stranger.data * 5)  # another gain is what the alignment takes off
    np.testing.assert_allclose(encoder.predict(louder).vectors, plain, atol=1e-3)
    encoder.predict(responses)
    assert encoder.label_free_subjects == ()


@pytest.mark.parametrize("align", ["zscore", "euclidean"])
@pytest.mark.parametrize("n_rows", [0, 1, 2])
def test_a_subject_is_aligned_by_two_of_its_trials_or_more(data, align, n_rows):
    transform, _ = fit(data, align=align)
    if n_rows < 2:
        with pytest.raises(
            DataError, match=f"subject b needs at least two of its trials, but there is {n_rows}"
        ):
            transform.add_subject(data, np.arange(n_rows), "b")
        return
    transform.add_subject(data, np.arange(n_rows), "b")
    read = transform.read(data, np.arange(n_rows), np.array(["b"] * n_rows, dtype=object)).astype(np.float64)
    mean = np.mean([x @ x.T for x in read], axis=0) / (1 if align == "euclidean" else read.shape[2])
    np.testing.assert_allclose(np.diag(mean), 1, rtol=2e-3)  # 1e3 in float32
