"""The linear Gaussian model, beside its own equations written out, and the prior that weighs images by it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, BrainEncoder
from braindecode_vis.base.roles import build
from braindecode_vis.encoders.linear_gaussian import LinearGaussianConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.generation.priors.neighbours import NeighboursPriorConfig
from braindecode_vis.preprocessing.selection import average_repetitions

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
    return average_repetitions(responses), Embeddings(
        targets.vectors[[np.flatnonzero(targets.ids == i)[0] for i in ids]], ids, "toy"
    )


def forget(responses):
    """Return trials that do not say how many repetitions they are the mean of."""
    return responses.with_trials(responses.trials.drop(columns="n_averaged"))


def measure_error(encoder, responses, targets):
    return float(((encoder.predict(responses).vectors - targets.vectors) ** 2).mean())


@pytest.fixture(scope="module")
def training():
    return make_trials(60, 2, seed=1)


def test_averages_are_decoded_better_than_by_a_decoder_shrunk_for_single_trials(training):
    """Each trial as the mean that it is, which the encoder takes from the table of trials."""
    single = make_trials(40, 20, seed=2, first=100)
    many, targets = average(*single)
    encoder = LinearGaussianConfig().build(seed=0).fit(*training)
    ridge = RidgeConfig().build(seed=0).fit(*training)
    variance = float(targets.vectors.var(axis=0).mean())
    error = measure_error(encoder, many, targets)
    assert error < 0.5 * variance
    assert error < measure_error(encoder, forget(many), targets)
    assert error < measure_error(ridge, many, targets)
    taken_for_means = single[0].with_trials(single[0].trials.assign(n_averaged=20))
    assert measure_error(encoder, *single) < measure_error(encoder, taken_for_means, single[1])
    assert encoder.fitted.likelihood.components.shape == (N_LATENT, 8)  # the images span no more


def test_what_repetitions_say_of_an_image_adds_up(training):
    """The mean of five says of images what the five say together, where the map misses nothing."""
    encoder = LinearGaussianConfig().build(seed=0).fit(*training)
    known = encoder.likelihood
    exact = replace(known, noise=known.noise * [0, 1])
    encoder.fitted = replace(encoder.fitted, likelihood=exact)
    single, targets = make_trials(4, 5, seed=3, first=100)
    images = average(single, targets)[1].vectors

    def score(responses):
        predicted = encoder.predict(responses)
        logs = exact.score(predicted.vectors, images, predicted.n_averaged)
        return logs - logs.mean(axis=1, keepdims=True)

    together = score(single).reshape(5, 4, 4).sum(axis=0)
    mean = average_repetitions(single)
    np.testing.assert_allclose(score(mean), together, atol=1e-3 * np.abs(together).max())
    # What a session makes of the predictions of single trials, with what the map misses.
    encoder.fitted = replace(encoder.fitted, likelihood=known)
    each = encoder.predict(single).vectors.reshape(5, 4, -1).mean(axis=0)
    combined = np.stack([known.combine(row, 5) for row in each])
    np.testing.assert_allclose(combined, encoder.predict(mean).vectors, rtol=1e-3, atol=1e-4)


def test_training_on_averages_knows_the_noise_of_one_repetition(training):
    """The map is fitted to means of four, whose noise is a quarter of that of a single test trial."""
    averages = average(*make_trials(60, 4, seed=1))
    encoder = LinearGaussianConfig().build(seed=0).fit(*averages)
    assert encoder.fitted.likelihood.noise[1] == 4


def test_the_prediction_is_the_mean_of_the_posterior_that_the_likelihood_gives(training):
    """Of images dense about the training mean, weighed by likelihood and prior, the mean is what is predicted."""
    encoder = LinearGaussianConfig().build(seed=0).fit(*training)
    known, test = encoder.likelihood, average(*make_trials(4, 5, seed=3, first=100))[0]
    predicted = encoder.predict(test).vectors
    scores = np.random.default_rng(0).normal(size=(200_000, N_LATENT)) / np.sqrt(known.precision)
    images = known.mean + scores @ known.components
    logs = known.score(predicted, images, np.full(4, 5.0))
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
    np.testing.assert_array_equal(again.fitted.likelihood.noise, encoder.fitted.likelihood.noise)


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
    with pytest.raises(DataError, match="fitted on 120 features, but these responses have 6"):
        encoder.predict(replace(responses, data=np.asarray(responses.data)[:, :, :1]))


def test_the_prior_takes_the_likeliest_images(training, tmp_path):
    known = average(*make_trials(50, 1, seed=4, first=200))[1]
    seen, _ = average(*make_trials(10, 30, seed=4, first=200))  # the same latents as the first ten
    encoder = build(BrainEncoder, LinearGaussianConfig(), seed=0).fit(*training)
    config = NeighboursPriorConfig(n_neighbours=5, pull=1, compare="likelihood")
    prior = config.build()
    with pytest.raises(ConfigError, match="cannot compute the likelihood of an image"):
        prior.fit(None, training[1], images=known)
    prior.bind(replace(NOTHING_LENT, encoder=encoder))
    predicted = encoder.predict(seen)
    drawn = prior.fit(None, training[1], images=known).sample(predicted, n_draws=1, seed=0)
    logs = encoder.likelihood.score(predicted.vectors, known.vectors, predicted.n_averaged)
    for row, log in enumerate(logs):
        best = np.argsort(-log)[:5]
        near = np.average(known.vectors[best], axis=0, weights=np.exp(log[best] - log.max())) - prior.mean
        expected = prior.mean + prior.length * near / np.linalg.norm(near)
        np.testing.assert_allclose(drawn.vectors[row], expected, rtol=1e-3)
    prior.write(tmp_path)
    again = config.read(tmp_path).sample(predicted, n_draws=1, seed=0)
    np.testing.assert_array_equal(again.vectors, drawn.vectors)
    ridge = build(BrainEncoder, RidgeConfig(), seed=0)
    prior.bind(replace(NOTHING_LENT, encoder=ridge))
    with pytest.raises(ConfigError, match=r"set encoder\.kind to linear_gaussian"):
        prior.fit(None, training[1], images=known)


def test_patterns_that_the_map_misses_count_for_less(training, tmp_path):
    """The posterior beside that of the whole covariance, of means and of single trials; and kept in files."""
    config = LinearGaussianConfig(n_components=2, n_times=4, misfit=0.5)  # a third latent is left over
    encoder = config.build(seed=0).fit(*training)
    known = encoder.likelihood
    single, targets = make_trials(4, 5, seed=3, first=100)
    mean, images = average(single, targets)
    assert len(known.excess)
    assert known.excess.max() > known.noise[0]
    # Features in which noise is white: those that the map speaks to, and the patterns.
    spoken = (mean.as_matrix() - encoder.fitted.response_mean) @ encoder.fitted.weights
    gram = np.block([[known.gram, known.patterns], [known.patterns.T, np.eye(len(known.excess))]])
    features = np.linalg.pinv(gram, hermitian=True) @ spoken.T  # scores of responses in the span of both
    root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
    forward, directions = root[:2], root[2:]
    noise = known.find_noise(5.0) * np.eye(len(gram)) + (directions.T * known.excess) @ directions
    inverse = np.linalg.inv(noise)
    precision = forward @ inverse @ forward.T + np.diag(known.precision)
    expected = np.linalg.solve(precision, forward @ inverse @ root.T @ features).T
    predicted = encoder.predict(mean)
    scores = (predicted.vectors - known.mean) @ known.components.T
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    rows = (images.vectors - known.mean) @ known.components.T @ forward
    left = (features.T @ root)[:, None] - rows  # (trial, image, dimension)
    fits = np.einsum("ijk,kl,ijl->ij", left, inverse, left)
    logs = known.score(predicted.vectors, images.vectors, np.full(4, 5.0)) + fits / 2
    np.testing.assert_allclose(logs - logs.mean(axis=1, keepdims=True), 0, atol=1e-3 * fits.max())
    encoder.write(tmp_path)
    again = config.read(tmp_path)
    np.testing.assert_array_equal(again.predict(mean).vectors, predicted.vectors)
    each = encoder.predict(single).vectors.reshape(5, 4, -1).mean(axis=0)
    combined = np.stack([again.likelihood.combine(row, 5) for row in each])
    distance = np.abs(combined - predicted.vectors).max() / np.abs(predicted.vectors - known.mean).max()
    assert distance < 0.2  # near to it
