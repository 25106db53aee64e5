"""The linear Gaussian model, beside its own equations written out, and the prior that weighs images by it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.contracts import NOTHING_LENT
from braindecode_vis.encoders.linear_gaussian import LinearGaussianConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.priors.neighbours import NeighboursPriorConfig
from braindecode_vis.roles import BRAIN_ENCODER, build

N_CHANNELS, N_TIMES, N_LATENT = 6, 20, 3


def make_trials(n_images, n_repeats, *, seed, noise=3.0, first=0):
    """Images of three latents, each with a channel pattern and a course of its own, in noise that is not white."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    patterns, mixing = fixed.normal(size=(N_LATENT, N_CHANNELS)), fixed.normal(size=(N_CHANNELS, N_CHANNELS))
    places = fixed.normal(size=(N_LATENT, 8))
    courses = np.sin(np.linspace(0, 3, N_TIMES) * np.arange(1, 4)[:, None])
    latent = rng.normal(size=(n_images, N_LATENT))
    row = np.tile(np.arange(n_images), n_repeats)
    signal = np.einsum("nk,kc,kt->nct", latent, patterns, courses)[row]
    walk = np.cumsum(rng.normal(size=(len(row), N_CHANNELS, N_TIMES)), axis=2) / np.sqrt(N_TIMES)
    data = (1 + signal + noise * np.einsum("cd,ndt->nct", mixing, walk)).astype(np.float32)
    ids = np.array([f"i{first + k:03d}" for k in range(n_images)], object)[row]
    trials = pd.DataFrame(
        {"subject": "01", "session": "1", "run": "1", "stimulus_id": ids, "repetition": 0, "split": "train"}
    )
    vectors = (5 + latent @ places).astype(np.float32)[row]
    return Responses(data, ("trial", "channel", "time"), trials, "z"), Embeddings(vectors, ids, "toy")


def average(responses, targets):
    ids = pd.unique(responses.stimulus_ids)
    rows = [np.flatnonzero(responses.stimulus_ids == i) for i in ids]
    first = responses.select(np.array([r[0] for r in rows]))
    data = np.stack([np.asarray(responses.data)[r].mean(axis=0) for r in rows])
    return replace(first, data=data), Embeddings(
        targets.vectors[[np.flatnonzero(targets.ids == i)[0] for i in ids]], ids, "toy"
    )


def measure_error(encoder, responses, targets):
    return float(((encoder.predict(responses).vectors - targets.vectors) ** 2).mean())


@pytest.fixture(scope="module")
def training():
    return make_trials(60, 2, seed=1)


def test_averages_are_decoded_better_than_by_a_decoder_shrunk_for_single_trials(training):
    many = average(*make_trials(40, 20, seed=2, first=100))
    known = LinearGaussianConfig(n_averaged=20).build(seed=0).fit(*training)
    single = LinearGaussianConfig().build(seed=0).fit(*training)
    ridge = RidgeConfig().build(seed=0).fit(*training)
    variance = float(many[1].vectors.var(axis=0).mean())
    error = measure_error(known, *many)
    assert error < 0.5 * variance
    assert error < measure_error(single, *many)
    assert error < measure_error(ridge, *many)
    assert known.fitted.likelihood.components.shape == (N_LATENT, 8)  # the images span no more


def test_the_prediction_is_the_mean_of_the_posterior_that_the_likelihood_gives(training):
    """Of images dense about the training mean, weighed by likelihood and prior, the mean is what is predicted."""
    encoder = LinearGaussianConfig(n_averaged=5).build(seed=0).fit(*training)
    known, test = encoder.describe_likelihood(), average(*make_trials(4, 5, seed=3, first=100))[0]
    predicted = encoder.predict(test).vectors
    spread = np.sqrt(1 / np.diag(known.evidence - known.information))
    scores = np.random.default_rng(0).normal(size=(200_000, N_LATENT)) * spread
    images = known.mean + scores @ known.components
    logs = known.score(predicted, images)
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    means = weights @ images / weights.sum(axis=1, keepdims=True)
    scale = np.abs(predicted - known.mean).max()
    np.testing.assert_allclose(means, predicted, atol=0.1 * scale)  # 200 000 samples, most of them unlikely


def test_noise_is_no_signal():
    responses, targets = make_trials(60, 2, seed=1)
    lone = replace(responses, data=make_trials(60, 2, seed=7, noise=100.0)[0].data)
    encoder = LinearGaussianConfig().build(seed=0).fit(lone, targets)
    spread = encoder.predict(lone).vectors.var(axis=0).mean() / targets.vectors.var(axis=0).mean()
    assert spread < 0.2


@pytest.mark.parametrize("n_repeats, dims", [(1, ("trial", "channel", "time")), (2, ("trial", "voxel"))])
def test_images_shown_once_and_voxels_will_do(n_repeats, dims, tmp_path):
    responses, targets = make_trials(60, n_repeats, seed=1, noise=0.3)
    data = np.asarray(responses.data)
    data = data if len(dims) == 3 else data[:, :, 10]
    responses = Responses(data, dims, responses.trials, "z")
    config = LinearGaussianConfig(n_components=2)
    encoder = config.build(seed=0).fit(responses, targets)
    assert measure_error(encoder, responses, targets) < targets.vectors.var(axis=0).mean()
    encoder.write(tmp_path)
    again = config.read(tmp_path)
    np.testing.assert_array_equal(again.predict(responses).vectors, encoder.predict(responses).vectors)
    np.testing.assert_array_equal(again.fitted.likelihood.evidence, encoder.fitted.likelihood.evidence)


def test_what_cannot_be_is_refused(training):
    responses, targets = training
    config = LinearGaussianConfig()
    with pytest.raises(DataError, match="one target per trial, in the order of the trials"):
        config.build(seed=0).fit(responses, Embeddings(targets.vectors, targets.ids[::-1], "toy"))
    with pytest.raises(DataError, match="has not been fitted"):
        config.build(seed=0).predict(responses)
    with pytest.raises(DataError, match="at least two training images"):
        config.build(seed=0).fit(
            responses.select(np.array([0, 60])),
            Embeddings(targets.vectors[[0, 60]], targets.ids[[0, 60]], "toy"),
        )
    encoder = config.build(seed=0).fit(responses, targets)
    with pytest.raises(DataError, match="fitted on 120 features, and these responses have 6"):
        encoder.predict(replace(responses, data=np.asarray(responses.data)[:, :, :1]))


def test_the_prior_takes_the_likeliest_images(training, tmp_path):
    known = average(*make_trials(50, 1, seed=4, first=200))[1]
    seen, _ = average(*make_trials(10, 30, seed=4, first=200))  # the same latents as the first ten
    encoder = build(BRAIN_ENCODER, LinearGaussianConfig(n_averaged=30), seed=0).fit(*training)
    config = NeighboursPriorConfig(n_neighbours=5, pull=1, compare="likelihood")
    prior = config.build()
    with pytest.raises(ConfigError, match="cannot say how likely an image is"):
        prior.fit(None, training[1], images=known)
    prior.bind(replace(NOTHING_LENT, encoder=encoder))
    predicted = encoder.predict(seen)
    drawn = prior.fit(None, training[1], images=known).sample(predicted, n_draws=1, seed=0)
    logs = encoder.describe_likelihood().score(predicted.vectors, known.vectors)
    for row, log in enumerate(logs):
        best = np.argsort(-log)[:5]
        near = np.average(known.vectors[best], axis=0, weights=np.exp(log[best] - log.max())) - prior.mean
        expected = prior.mean + prior.length * near / np.linalg.norm(near)
        np.testing.assert_allclose(drawn.vectors[row], expected, rtol=1e-3)
    prior.write(tmp_path)
    again = config.read(tmp_path).sample(predicted, n_draws=1, seed=0)
    np.testing.assert_array_equal(again.vectors, drawn.vectors)
    ridge = build(BRAIN_ENCODER, RidgeConfig(), seed=0)
    prior.bind(replace(NOTHING_LENT, encoder=ridge))
    with pytest.raises(ConfigError, match=r"set encoder\.kind to linear_gaussian"):
        prior.fit(None, training[1], images=known)
