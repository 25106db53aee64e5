"""Scales of channels and features against numpy on the whole array, whatever the blocks in which they are read."""

import os

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.sources.cleaning_options import ScalingConfig
from braindecode_vis.preprocessing import scaling
from braindecode_vis.preprocessing.alignment import fit_zscore
from braindecode_vis.preprocessing.array_file import ArrayFile
from braindecode_vis.preprocessing.scaling import (
    FeatureMoments,
    FeatureStatistics,
    fit_channel_zscore,
    fit_robust_scaler,
    fit_rows,
    pool_statistics,
    read_rows,
    scale_trials,
    standardise_rows,
)


def make_trials(n=24):
    """Trials of two subjects and sessions that lie between each other, a third of them test trials."""
    return pd.DataFrame(
        {
            "subject": np.where(np.arange(n) % 8 < 4, "01", "02"), "session": np.where(np.arange(n) < n // 2, "a", "b"),
            "split": np.where(np.arange(n) % 3 == 2, "test", "train"),
        }
    )  # fmt: skip


def hold(path, data):
    held = ArrayFile(path, data.shape, data.dtype)
    held.write(0, data)
    return held


def test_rows_that_are_not_kept_leave_the_file(tmp_path):
    """Cleaning may drop trials at the end; NumPy reads what is left."""
    data = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    with hold(tmp_path / "held.npy", data) as held:
        held.shrink(5)
        np.testing.assert_array_equal(held.read(0, 5), data[:5])
    np.testing.assert_array_equal(np.load(tmp_path / "held.npy"), data[:5])
    assert (tmp_path / "held.npy").stat().st_size == held.offset + 5 * 3 * 4


def test_a_file_that_somebody_cut_short_is_no_endless_wait(tmp_path):
    """Reading past the end of a scratch file went on for ever."""
    with hold(tmp_path / "held.npy", np.ones((4, 3), np.float32)) as held:
        os.truncate(tmp_path / "held.npy", held.offset + 10)
        with pytest.raises(DataError, match="was cut short by another process"):
            held.read(0, 4)


@pytest.mark.parametrize("method", ["robust", "zscore"])
@pytest.mark.parametrize("per", ["subject", "session"])
def test_each_group_is_scaled_by_its_own_training_trials(tmp_path, monkeypatch, method, per):
    monkeypatch.setattr(scaling, "BLOCK_TRIALS", 3)
    trials = make_trials()
    rng = np.random.default_rng(0)
    data = rng.normal(size=(24, 3, 7)) * [[1e-6], [1.0], [50.0]] + [[2e-6], [-3.0], [1000.0]]
    data = (data * rng.uniform(0.5, 2, (24, 1, 1))).astype(np.float32)
    with (
        hold(tmp_path / "held.npy", data) as held,
        hold(tmp_path / "target.npy", np.zeros_like(data)) as target,
    ):
        found = scale_trials(held, target, trials, ScalingConfig(method=method, per=per, clamp=1.5))
        made = target.read(0, 24)
    keys = ["subject"] if per == "subject" else ["subject", "session"]
    groups = list(trials.groupby(keys, sort=False).indices.items())
    assert found.groups == tuple(tuple(g) if isinstance(g, tuple) else (g,) for g, _ in groups)
    assert found.unit == {"robust": "IQR", "zscore": "z"}[method]
    for number, (_, rows) in enumerate(groups):
        train = data[[row for row in rows if trials["split"][row] == "train"]].astype(float)
        if method == "robust":
            low, centre, high = np.percentile(train, [25, 50, 75], axis=(0, 2))
            scale = high - low
        else:
            centre, scale = train.mean(axis=(0, 2)), train.std(axis=(0, 2))
        np.testing.assert_allclose(found.centre[number], centre, rtol=1e-5)
        np.testing.assert_allclose(found.scale[number], scale, rtol=1e-5)
        expected = np.clip((data[rows] - centre[:, None]) / scale[:, None], -1.5, 1.5)
        np.testing.assert_allclose(made[rows], expected, atol=1e-3)


def test_channels_that_do_not_vary_become_zero():
    data = np.ones((5, 2, 4), np.float32) * np.array([[3.0], [1.0]], np.float32)
    data[:, 1] = np.random.default_rng(0).standard_normal((5, 4))
    for fit in (fit_robust_scaler, fit_channel_zscore):
        made = fit(data, np.arange(5)).apply(data)
        np.testing.assert_array_equal(made[:, 0], 0)
        assert made[:, 1].std() > 0.3
    # Volts are small numbers: what varies by a millionth of a volt varies.
    np.testing.assert_allclose(
        fit_channel_zscore(1e-9 * data, np.arange(5)).apply(1e-9 * data)[:, 1].std(), 1, rtol=1e-4
    )


def test_a_robust_scaler_looks_at_evenly_spaced_trials():
    """With two of five trials, the first and the last."""
    data = np.random.default_rng(0).standard_normal((9, 2, 30)).astype(np.float32)
    rows = np.array([7, 1, 3, 5, 6])  # in any order
    some = fit_robust_scaler(data, rows, max_trials=2)
    np.testing.assert_array_equal(some.centre, fit_robust_scaler(data[[1, 7]], np.arange(2)).centre)
    assert some.clamp == 20


def test_a_feature_that_rounding_alone_moves_is_constant():
    rng = np.random.default_rng(0)
    data = np.stack(
        [np.full(50, 1e4), 1e4 + 1e-9 * rng.standard_normal(50), rng.standard_normal(50), np.zeros(50)],
        axis=1,
    )
    data[:, 1] = 1e4 + 1e-10 * np.sign(rng.standard_normal(50))
    fitted = fit_zscore(data)
    np.testing.assert_array_equal(fitted.std[[0, 1, 3]], 1)
    np.testing.assert_allclose(fitted.std[2], data[:, 2].std(), rtol=1e-6)
    statistics = FeatureStatistics(
        np.array([1000.0, 1000.0, 0.0, 0.0]), np.array([1e-3, 2e-3, 1.0, 2.0]) ** 2
    )
    assert statistics.is_constant.tolist() == [True, False, False, False]
    tiny = FeatureStatistics(np.zeros(2), np.array([0.5e-12, 2e-12]) ** 2)
    assert tiny.is_constant.tolist() == [True, False]
    np.testing.assert_allclose(statistics.apply(np.full((1, 4), 2.0))[0, [0, 2, 3]], [0, 2, 1])


@pytest.mark.parametrize("shape", [(4,), (4, 6)])
def test_rows_are_standardised_alike_in_blocks_of_any_size(tmp_path, monkeypatch, shape):
    rng = np.random.default_rng(0)
    # A baseline a thousand times the variation, as raw BOLD has.
    data = (
        1000 + rng.normal(size=(20, *shape)) * np.arange(1, 5).reshape(4, *[1] * (len(shape) - 1))
    ).astype(np.float32)
    rows = np.array([2, 3, 4, 8, 9, 13])
    axes = (0, *range(2, data.ndim))
    mean, std = (getattr(data[rows].astype(float), name)(axis=axes) for name in ("mean", "std"))
    for size in (1, 3, 100):
        monkeypatch.setattr(scaling, "_BLOCK_BYTES", 4 * int(np.prod(shape)) * size)
        path = tmp_path / f"{size}.npy"
        with hold(path, data) as held, hold(tmp_path / f"to{size}.npy", np.zeros_like(data)) as target:
            seen = np.concatenate([picked for picked, _ in read_rows(held, rows)])
            np.testing.assert_array_equal(seen, rows)
            found = fit_rows(held, rows)
            np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
            np.testing.assert_allclose(np.sqrt(found.variance), std, rtol=1e-6)
            standardise_rows(found, held, 2, target, 1, rows - 2)
            made = target.read(0, 20)
        wide = (-1, *[1] * (len(shape) - 1))
        expected = np.zeros_like(data)
        expected[rows - 1] = (data[rows] - mean.reshape(wide)) / std.reshape(wide)
        np.testing.assert_allclose(made, expected, atol=1e-5)


def test_sums_count_trials_and_values_and_sessions_pool_equally():
    moments = FeatureMoments(np.zeros((2, 5)))
    moments.add(np.ones((3, 2, 5)))
    moments.add(np.full((1, 2, 5), 5.0))
    assert (moments.n_trials, moments.n) == (4, 20)
    np.testing.assert_allclose(moments.finish().mean, 2)
    np.testing.assert_allclose(moments.finish().variance, 3)
    pooled = pool_statistics(
        [FeatureStatistics(np.full(2, m), np.full(2, v)) for m, v in ((1.0, 4.0), (4.0, 1.0), (4.0, 1.0))]
    )
    np.testing.assert_allclose(pooled.mean, 3)
    np.testing.assert_allclose(pooled.variance, 2)
