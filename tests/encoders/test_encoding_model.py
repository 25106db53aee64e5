"""Encoding models: the ridge of scikit-learn for every response, spaces chosen by inner folds, residuals as noise."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders.encoding_model import (
    EncodingModelConfig,
    draw_residuals,
    fit_encoding,
    list_weightings,
)
from braindecode_vis.preprocessing.splits import make_inner_folds

N = 80
IDS = [f"i{n:02d}" for n in range(N)]


def make_space(n_features, seed, name="a"):
    vectors = np.random.default_rng(seed).normal(size=(N, n_features)).astype(np.float32)
    return Embeddings(3 * vectors + 5, IDS, name)


def respond(space, n_responses, seed, noise=1.0):
    rng = np.random.default_rng(seed)
    clean = (space.vectors - 5) @ rng.normal(size=(space.vectors.shape[1], n_responses))
    clean /= clean.std(axis=0)
    return (clean + noise * rng.normal(size=clean.shape)).astype(np.float32)


@pytest.mark.parametrize("n_features", [6, 200])
def test_every_response_is_the_ridge_of_its_own_penalty(n_features):
    space = make_space(n_features, 0)
    measured = respond(space, 9, 1)
    model = fit_encoding({"a": space}, measured, out_of_fold=True)
    assert len(set(model.alphas)) > 1
    scaled = (space.vectors - space.vectors.mean(axis=0)) / space.vectors.std(axis=0) / np.sqrt(n_features)
    folds = make_inner_folds(space.ids, n_folds=5, generator=make_generator(0, "encoding", "inner_folds"))
    predicted, alphas = model.predict({"a": space}), np.array(EncodingModelConfig().alphas)
    errors = np.zeros((len(alphas), 9))
    for row, alpha in enumerate(alphas):
        own = np.flatnonzero(model.alphas == alpha)
        np.testing.assert_allclose(
            predicted[:, own], Ridge(alpha=alpha).fit(scaled, measured).predict(scaled)[:, own], atol=2e-4
        )
        for fold in folds:
            made = Ridge(alpha=alpha).fit(scaled[fold.train], measured[fold.train]).predict(scaled[fold.test])
            errors[row] += ((made - measured[fold.test]) ** 2).sum(axis=0)
            np.testing.assert_allclose(model.out_of_fold[np.ix_(fold.test, own)], made[:, own], atol=2e-4)
    np.testing.assert_array_equal(model.alphas, alphas[errors.argmin(axis=0)])


def test_himalaya_takes_the_same_penalty_for_each_response():
    himalaya = pytest.importorskip("himalaya.ridge")
    space = make_space(200, 0)
    measured = respond(space, 40, 1)
    model = fit_encoding({"a": space}, measured)
    scaled = (space.vectors - space.vectors.mean(axis=0)) / space.vectors.std(axis=0) / np.sqrt(200)
    folds = make_inner_folds(space.ids, n_folds=5, generator=make_generator(0, "encoding", "inner_folds"))
    peer = himalaya.RidgeCV(
        alphas=EncodingModelConfig().alphas,
        fit_intercept=True,
        cv=[(fold.train, fold.test) for fold in folds],
        solver_params={"warn": False},  # that kernels would be quicker
    ).fit(scaled.astype(np.float64), measured.astype(np.float64))
    assert len(set(model.alphas)) > 1
    np.testing.assert_allclose(model.alphas, peer.best_alphas_, rtol=1e-12)  # it keeps logarithms
    predicted = peer.predict(scaled.astype(np.float64))
    # Features are z-scored in single precision here.
    np.testing.assert_allclose(model.predict({"a": space}), predicted, atol=2e-4)


def test_each_response_takes_the_space_that_drives_it():
    spaces = {"a": make_space(20, 0, "a"), "b": make_space(90, 1, "b")}
    measured = np.concatenate([respond(spaces["a"], 6, 2, 0.5), respond(spaces["b"], 6, 3, 0.1)], axis=1)
    found = {
        combine: fit_encoding(spaces, measured, config=EncodingModelConfig(combine=combine))
        for combine in ("best", "joint", "banded")
    }
    assert found["best"].shares.argmax(axis=1).tolist() == [0] * 6 + [1] * 6
    assert (found["joint"].shares == 0.5).all()
    # Both spaces alike and each alone are candidates of it, so that no response fares worse in the inner folds.
    for other in ("best", "joint"):
        assert (found["banded"].inner_explained >= found[other].inner_explained - 1e-6).all()
    for model in found.values():
        parts = model.predict_by_space(spaces)
        np.testing.assert_allclose(sum(parts) + model.mean, model.predict(spaces), atol=1e-4)
    first, second = found["best"].predict_by_space(spaces)
    assert not first[:, 6:].any()
    assert not second[:, :6].any()


def test_weightings_sum_to_one():
    drawn = list_weightings(3, EncodingModelConfig(combine="banded"), 0)
    assert drawn.shape == (24, 3)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    assert list_weightings(1, EncodingModelConfig(combine="banded"), 0).shape == (1, 1)


def test_drawn_noise_has_the_covariance_of_the_residuals():
    space = make_space(4, 0)
    rng = np.random.default_rng(5)
    mixing = rng.normal(size=(3, 3))
    measured = respond(space, 3, 1, 0.0) + (rng.normal(size=(N, 3)) @ mixing).astype(np.float32)
    model = fit_encoding({"a": space}, measured, out_of_fold=True)
    drawn = draw_residuals(model, measured, 20_000, make_generator(0, "noise"))
    residual = measured - model.out_of_fold
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(residual.T), rtol=0.1, atol=0.1)
    again = draw_residuals(model, measured, 20_000, make_generator(0, "noise"))
    np.testing.assert_array_equal(drawn, again)


def test_what_does_not_pair_is_refused():
    space = make_space(4, 0)
    with pytest.raises(DataError, match="one response vector per image"):
        fit_encoding({"a": space}, np.zeros((3, 2), np.float32))
    other = Embeddings(space.vectors, IDS[::-1], "b")
    with pytest.raises(DataError, match="in a different order"):
        fit_encoding({"a": space, "b": other}, np.zeros((N, 2), np.float32))
    model = fit_encoding({"a": space}, respond(space, 2, 1))
    with pytest.raises(DataError, match="without out_of_fold"):
        draw_residuals(model, np.zeros((N, 2), np.float32), 3, make_generator(0, "noise"))
