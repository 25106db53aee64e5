from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.linear_model import Ridge

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Context
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders import ridge
from braindecode_vis.encoders.ridge import (
    Backend,
    RidgeConfig,
    _count_multiplications,
    compute_fold_errors,
    compute_inverse_errors,
    make_gram,
    score_features,
    solve_ridge,
)
from braindecode_vis.preprocessing.splits import make_inner_folds
from tests.references import assert_close


def make_task(n_trials=60, n_features=200, n_informative=10, n_targets=6, seed=0, n_repeats=1):
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(n_trials, n_targets))
    data = 3 + generator.normal(size=(n_trials, n_features))
    data[:, :n_informative] += 2 * latent @ generator.normal(size=(n_targets, n_informative))
    ids = np.array([f"image{i // n_repeats:03d}" for i in range(n_trials)], dtype=object)
    latent = latent[::n_repeats][np.arange(n_trials) // n_repeats]
    trials = pd.DataFrame(
        {"subject": "01", "session": "1", "run": "1", "stimulus_id": ids, "repetition": 0, "split": "train"}
    )
    responses = Responses(data.astype(np.float32), ("trial", "voxel"), trials, "arbitrary")
    return responses, Embeddings(latent.astype(np.float32), ids, "toy")


@pytest.mark.parametrize(
    "n_features", [20, 200], ids=["more trials than features", "more features than trials"]
)
def test_one_candidate_is_ordinary_ridge(n_features):
    responses, targets = make_task(n_features=n_features)
    encoder = RidgeConfig(alphas=(50.0,)).build(seed=0).fit(responses, targets)
    data = (responses.data - responses.data.mean(0)) / responses.data.std(0)
    reference = Ridge(alpha=50.0).fit(data, targets.vectors)
    # Weights are kept in single precision, hence the tolerance.
    np.testing.assert_allclose(encoder.predict(responses).vectors, reference.predict(data), atol=2e-5)


@pytest.mark.parametrize("n_features", [20, 200], ids=["tall", "wide"])
def test_himalaya_chooses_the_same_penalty_in_the_same_folds_and_finds_the_same_weights(n_features):
    himalaya = pytest.importorskip("himalaya.ridge")
    responses, targets = make_task(n_features=n_features)
    alphas = tuple(float(alpha) for alpha in np.logspace(-2, 5, 15))
    encoder = RidgeConfig(alphas=alphas).build(seed=0).fit(responses, targets)
    folds = make_inner_folds(
        responses.stimulus_ids, n_folds=5, generator=make_generator(0, "ridge", "inner_folds")
    )
    data = responses.data.astype(np.float64)
    data, values = (data - data.mean(0)) / data.std(0), targets.vectors.astype(np.float64)
    peer = himalaya.RidgeCV(
        alphas=alphas,
        fit_intercept=True,  # in each fold, as ours
        cv=[(fold.train, fold.test) for fold in folds],
        solver_params={
            "local_alpha": False,
            "warn": False,
        },  # it would rather take kernels where features are many
    ).fit(data, values)
    assert alphas[0] < encoder.fitted.alpha < alphas[-1]
    assert encoder.fitted.alpha == pytest.approx(peer.best_alphas_[0], rel=1e-12)  # it keeps logarithms
    # Ours are kept in single precision, which has seven digits of the largest.
    atol = 1e-6 * np.abs(peer.coef_).max()
    np.testing.assert_allclose(encoder.fitted.weights, peer.coef_, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("n_targets", [1, 6, 90])
@pytest.mark.parametrize("n_features", [20, 200], ids=["tall", "wide"])
def test_errors_of_inner_folds_equal_a_plain_loop(n_features, n_targets):
    """Folds are parts of one Gram matrix, or what a subtraction leaves of it; the loop fits each anew."""
    responses, targets = make_task(n_features=n_features, n_targets=n_targets)
    data, values = responses.as_matrix().astype(np.float64), targets.flat().astype(np.float64)
    scaled = (data - data.mean(0)) / data.std(0)
    folds = make_inner_folds(responses.stimulus_ids, n_folds=4, generator=np.random.default_rng(0))
    sizes, alphas = [15, 150, None], [1.0, 100.0, 1e4]
    gram = make_gram(scaled.astype(np.float32), values.astype(np.float32), Backend(np))
    # With few penalties, from one Cholesky factor for each of them, for all folds at once.
    inverted = np.stack([compute_inverse_errors(gram, folds, a, gram.centre()) for a in alphas], axis=1)
    for number, fold in enumerate(folds):
        errors = compute_fold_errors(gram, fold, sizes, alphas)
        np.testing.assert_allclose(inverted[number], errors[-1], rtol=1e-5)
        for compute in _count_multiplications(gram, fold, len(alphas)):  # every way, not the quickest alone
            np.testing.assert_allclose(compute(gram, fold, alphas), errors[-1], rtol=1e-5)
        for row, size in enumerate(sizes):
            order = np.argsort(-score_features(scaled[fold.train], values[fold.train]), kind="stable")
            kept = slice(None) if size is None else order[:size]
            for column, alpha in enumerate(alphas):
                model = Ridge(alpha=alpha).fit(scaled[fold.train][:, kept], values[fold.train])
                predicted = model.predict(scaled[fold.test][:, kept]).reshape(len(fold.test), n_targets)
                expected = ((predicted - values[fold.test]) ** 2).mean()
                # z-scores and targets are single precision in one and double in the other.
                np.testing.assert_allclose(errors[row, column], expected, rtol=1e-5)


class Torch(Backend):
    """What runs on a GPU, with torch's functions, on the processor."""

    def take(self, array):
        return self.xp.as_tensor(np.asarray(array)).to(getattr(self.xp, self.precision))

    def solve(self, matrix, right):
        return self.xp.cholesky_solve(right, self.xp.linalg.cholesky(matrix))


def make_design(n_trials, n_features, decay, n_targets=10):
    """Return z-scored trials whose spectrum falls with a power, and targets that partly follow from them."""
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.standard_normal((n_features, n_features)))[0]
    spread = np.arange(1, n_features + 1.0) ** -decay
    data = (generator.standard_normal((n_trials, n_features)) * spread) @ turn
    data = ((data - data.mean(0)) / data.std(0)).astype(np.float32)
    values = data @ generator.standard_normal((n_features, n_targets)) / n_features
    values = values / values.std() + generator.standard_normal(values.shape)
    return data, (values - values.mean(0)).astype(np.float32)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("decay", [0, 1, 2])
@pytest.mark.parametrize(("n_trials", "n_features"), [(400, 150), (120, 500)], ids=["tall", "wide"])
def test_one_penalty_is_solved_in_single_precision_where_that_is_enough(
    n_trials, n_features, decay, library, monkeypatch
):
    data, values = make_design(n_trials, n_features, decay)
    backend = Backend(np) if library == "numpy" else Torch(pytest.importorskip("torch"))
    largest = float(np.linalg.norm(data, ord=2)) ** 2
    used, solve = [], backend.solve
    monkeypatch.setattr(
        type(backend), "solve", lambda self, *given: used.append(self.precision) or solve(*given)
    )
    # Five steps of power iteration may find a third of the largest eigenvalue where the spectrum is flat.
    for ratio, precision in [(10, "float32"), (200, "float32"), (1000, "float64"), (1e5, "float64")]:
        exact = make_gram(data, values, backend).solve(largest / ratio)
        del used[:]
        found = solve_ridge(data, values, largest / ratio, backend)
        assert used == [precision], ratio
        assert np.linalg.norm(found - exact) <= 1e-4 * np.linalg.norm(exact)  # as the docstring says
        apart = np.abs(data @ found - data @ exact).max()
        assert apart <= 1e-5 * np.abs(data @ exact).max()


@pytest.mark.parametrize("n_features", [40, 90], ids=["tall", "wide"])
def test_numpy_and_torch_agree_on_weights_folds_and_errors(n_features):
    """A GPU runs the same lines with torch's functions; here torch's processor stands for it."""
    import torch

    responses, targets = make_task(n_features=n_features)
    folds = make_inner_folds(responses.stimulus_ids, n_folds=3, generator=np.random.default_rng(0))
    grams = [make_gram(responses.data, targets.flat(), backend) for backend in (Backend(np), Torch(torch))]
    alphas = [1.0, 100.0, 1e4]
    left, right = (compute_fold_errors(gram, folds[0], [10, None], alphas) for gram in grams)
    np.testing.assert_allclose(left, right, rtol=1e-6)  # large penalties are solved in single precision
    left, right = (gram.predict_fold(folds[1], 10.0) for gram in grams)
    assert_close(left, right)
    left, right = (gram.solve(10.0) for gram in grams)
    np.testing.assert_allclose(left, right, rtol=1e-5)  # kept in single precision


def test_a_penalty_below_rounding_leaves_out_what_carries_nothing():
    """More features than trials and hardly a penalty: the matrix is singular, and Cholesky has no answer."""
    responses, targets = make_task()
    tiny = RidgeConfig(alphas=(1e-300,)).build(seed=0).fit(responses, targets).predict(responses).vectors
    np.testing.assert_allclose(tiny, targets.vectors, atol=1e-3)


@pytest.mark.parametrize(
    ("part", "function", "config"),
    [
        ("inner_fold", "compute_fold_errors", RidgeConfig(n_features=(10, None))),
        ("penalty", "compute_inverse_errors", RidgeConfig(alphas=(1, 10, 100, 1e3, 1e4))),
    ],
    ids=["fold by fold", "penalty by penalty"],
)
def test_a_killed_fit_finds_the_errors_that_it_had_and_tells_how_far_it_is(
    part, function, config, tmp_path, monkeypatch
):
    """A full-size fit took 13 minutes without a sign of life and began anew after a kill."""
    responses, targets = make_task(n_features=20)
    told = []
    context = Context(checkpoints=tmp_path / "new" / "work", progress=lambda *what: told.append(what))
    whole = config.build(seed=0).fit(responses, targets)

    def stop(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    killed = config.build(seed=0)
    killed.bind(replace(context, progress=stop))
    with pytest.raises(KeyboardInterrupt):
        killed.fit(responses, targets)
    computed, compute = [], getattr(ridge, function)
    monkeypatch.setattr(ridge, function, lambda *args: computed.append(args[1]) or compute(*args))
    (tmp_path / f"new/work/{part}1.npy").write_bytes(b"cut")
    again = config.build(seed=0)
    again.bind(context)
    again.fit(responses, targets)
    assert len(computed) == 3
    assert again.fitted.choices == whole.fitted.choices
    assert [done for done, total, _ in told] == list(range(6))
    assert {total for _, total, _ in told} == {6}


def test_features_are_scored_by_the_leading_components_of_the_targets():
    responses, targets = make_task(n_trials=50, n_targets=30)
    data, values = responses.as_matrix(), targets.flat()
    for rows in (slice(None), slice(20)):  # more trials than targets, and fewer
        left, singular, _ = np.linalg.svd(values[rows] - values[rows].mean(0), full_matrices=False)
        correlation = np.corrcoef(np.c_[data[rows], left[:, :10]].T)[:200, 200:]
        expected = correlation**2 @ singular[:10] ** 2
        np.testing.assert_allclose(score_features(data[rows], values[rows]), expected, rtol=1e-3)


def test_informative_features_score_highest():
    responses, targets = make_task(n_trials=200)
    best = np.argsort(-score_features(responses.as_matrix(), targets.flat()))[:10]
    assert set(best) == set(range(10))


def test_feature_selection_is_chosen_when_it_helps_and_survives_the_disk(tmp_path):
    responses, targets = make_task()
    config = RidgeConfig(n_features=(10, None))
    encoder = config.build(seed=0).fit(responses, targets)
    assert encoder.fitted.kept.tolist() == list(range(10))
    encoder.write(tmp_path)
    back = config.read(tmp_path)
    np.testing.assert_array_equal(back.predict(responses).vectors, encoder.predict(responses).vectors)
    assert back.fitted.choices == encoder.fitted.choices
    assert len(back.fitted.choices) == 2 * len(config.alphas)


def test_out_of_fold_predictions_are_worse_than_fitted_ones_and_never_see_their_image():
    """With noise for responses, a leak would show as predictions better than the mean."""
    responses, targets = make_task(n_trials=80, n_informative=0, n_repeats=4)
    encoder = RidgeConfig(alphas=(1.0,)).build(seed=0).fit(responses, targets)
    fitted = ((encoder.predict(responses).vectors - targets.vectors) ** 2).mean()
    honest = ((encoder.predict_out_of_fold(responses, targets).vectors - targets.vectors) ** 2).mean()
    by_mean = ((targets.vectors.mean(0) - targets.vectors) ** 2).mean()
    assert fitted < 0.1 * by_mean
    assert honest > 0.9 * by_mean


def test_fits_are_deterministic_and_token_targets_keep_their_shape():
    responses, targets = make_task()
    tokens = Embeddings(targets.vectors.reshape(60, 2, 3), targets.ids, "tokens")
    config = RidgeConfig(n_features=(10, 50))
    left = config.build(seed=1).fit(responses, tokens).predict(responses)
    right = config.build(seed=1).fit(responses, tokens).predict(responses)
    assert left.vectors.shape == (60, 2, 3)
    np.testing.assert_array_equal(left.vectors, right.vectors)


def test_misuse_is_told_in_words():
    responses, targets = make_task()
    with pytest.raises(DataError, match="in the order of the trials"):
        RidgeConfig().build(seed=0).fit(responses, Embeddings(targets.vectors, targets.ids[::-1], "toy"))
    with pytest.raises(DataError, match="has not been fitted"):
        RidgeConfig().build(seed=0).predict(responses)
    for name in ("alphas", "n_features"):
        with pytest.raises(ValidationError, match="at least 1 item"):
            RidgeConfig(**{name: ()})
    few, few_targets = make_task(n_trials=3)
    with pytest.raises(
        DataError,
        match=r"needs 5 folds, but the training trials show only 3 images; set encoder\.n_inner_folds to 3",
    ):
        RidgeConfig().build(seed=0).fit(few, few_targets)


def test_a_constant_feature_changes_nothing():
    responses, targets = make_task()
    data = np.concatenate([responses.data, np.full((60, 1), 7, np.float32)], axis=1)
    more = Responses(data, responses.dims, responses.trials, responses.unit)
    config = RidgeConfig(alphas=(10.0,))
    left = config.build(seed=0).fit(responses, targets).predict(responses).vectors
    right = config.build(seed=0).fit(more, targets).predict(more).vectors
    np.testing.assert_allclose(left, right, atol=1e-5)  # single-precision weights


def test_a_fit_does_not_depend_on_the_unit():
    """Responses of MEG in tesla were taken for constant features, so that ridge predicted the mean of the targets."""
    responses, targets = make_task()
    tesla = replace(responses, data=(responses.data * 1e-15).astype(np.float32))
    fits = [
        RidgeConfig(alphas=(50.0,)).build(seed=0).fit(each, targets).predict(each)
        for each in (responses, tesla)
    ]
    # The products with 1e-15 are rounded to single precision.
    np.testing.assert_allclose(fits[1].vectors, fits[0].vectors, atol=1e-5)


@pytest.mark.parametrize("n_features", [20, 200], ids=["tall", "wide"])
def test_weights_of_labels_are_the_fit_and_choose_its_penalty(n_features):
    """A refit on relabelled images is one product: equal to fits of the same seed, whatever the labelling."""
    responses, targets = make_task(n_features=n_features, n_repeats=2)
    train, test = np.arange(48), np.arange(48, 60)
    images = list(dict.fromkeys(responses.stimulus_ids))
    config = RidgeConfig(alphas=(1.0, 30.0, 1e5))
    known = responses.select(train), responses.select(test)
    weights, errors = config.build(seed=5).map_labels(*known, images)
    assert weights.shape == (3, 12, 30)
    of_image = targets.vectors[::2].astype(np.float64)  # each is shown twice
    chosen = set()
    for seed in range(6):
        vectors = of_image[np.random.default_rng(seed).permutation(30)] if seed else of_image
        own = Embeddings(np.repeat(vectors, 2, axis=0)[train].astype(np.float32), targets.ids[train], "toy")
        fitted = config.build(seed=5).fit(known[0], own)
        penalty = int((errors * (vectors @ vectors.T)).sum(axis=(1, 2)).argmin())
        assert config.alphas[penalty] == fitted.fitted.alpha
        chosen.add(penalty)
        # Weights are kept in single precision.
        np.testing.assert_allclose(fitted.predict(known[1]).vectors, weights[penalty] @ vectors, atol=1e-4)
        found = [choice["mse"] for choice in fitted.fitted.choices]
        np.testing.assert_allclose((errors * (vectors @ vectors.T)).sum(axis=(1, 2)) / 6, found, rtol=1e-4)
    assert len(chosen) > 1
    one, none = RidgeConfig(alphas=(30.0,)).build(seed=5).map_labels(*known, images)
    assert none is None
    np.testing.assert_allclose(one[0], weights[1], atol=1e-9)


def test_what_is_chosen_by_the_targets_is_not_linear_in_them():
    responses, _ = make_task()
    images = list(responses.stimulus_ids)
    for config in (RidgeConfig(n_features=(5, None)), RidgeConfig(subject_alignment="zscore")):
        assert config.build(seed=0).map_labels(responses, responses, images) is None
