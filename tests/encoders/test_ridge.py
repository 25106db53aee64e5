import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.linear_model import Ridge

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import DataError
from braindecode_vis.encoders.ridge import RidgeConfig, compute_inner_errors, score_features
from braindecode_vis.preprocessing.splits import make_inner_folds


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


def test_inner_errors_equal_a_plain_loop():
    responses, targets = make_task()
    data, values = responses.as_matrix(), targets.flat()
    folds = make_inner_folds(responses.stimulus_ids, n_folds=4, generator=np.random.default_rng(0))
    from himalaya.backend import set_backend

    errors = compute_inner_errors(data, values, folds, [15, None], [1.0, 100.0], backend=set_backend("numpy"))
    for row, size in enumerate([15, None]):
        for column, alpha in enumerate([1.0, 100.0]):
            expected = []
            for fold in folds:
                kept = np.argsort(-score_features(data[fold.train], values[fold.train]), kind="stable")[:size]
                mean, std = data[fold.train][:, kept].mean(0), data[fold.train][:, kept].std(0)
                model = Ridge(alpha=alpha).fit((data[fold.train][:, kept] - mean) / std, values[fold.train])
                predicted = model.predict((data[fold.test][:, kept] - mean) / std)
                expected.append(((predicted - values[fold.test]) ** 2).mean())
            # z-scores are single precision in one and double in the other.
            np.testing.assert_allclose(errors[row, column], np.mean(expected), rtol=1e-5)


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
        match=r"wants 5 folds, but the training trials show only 3 images; set encoder\.n_inner_folds to 3",
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
