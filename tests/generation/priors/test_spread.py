"""The spread prior lengthens predictions to the images' spread and changes no rank by the cosine after the mean."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.generation.priors.closed_form import SpreadPriorConfig
from braindecode_vis.scoring.metrics.embedding import compute_mmd


def make_rows(n=200, shrinkage=0.3):
    generator = np.random.default_rng(0)
    images = 5 + generator.normal(size=(n, 4))
    predicted = images.mean(axis=0) + shrinkage * (images - images.mean(axis=0))
    ids = [f"i{k}" for k in range(n)]
    return (Embeddings(rows.astype(np.float32), ids, "toy") for rows in (predicted, images))


def test_predictions_get_the_spread_of_images_and_keep_their_directions():
    predicted, images = make_rows()
    prior = SpreadPriorConfig().build().fit(predicted, images)
    assert prior.describe()["gain"] == pytest.approx(1 / 0.3, rel=1e-4)
    drawn = prior.sample(predicted, n_draws=2, seed=0)
    assert drawn.ids[:2].tolist() == ["i0", "i0"]
    np.testing.assert_allclose(drawn.vectors[::2], images.vectors, atol=1e-4)
    assert compute_mmd(predicted, images) > 10 * abs(
        compute_mmd(prior.sample(predicted, n_draws=1, seed=0), images)
    )


def test_each_image_counts_once_and_test_rows_never(tmp_path):
    predicted, images = make_rows()
    doubled = images.select([*images.ids, *images.ids[:100]])
    prior = SpreadPriorConfig().build().fit(predicted, images, images=doubled)
    assert prior.gain == pytest.approx(1 / 0.3, rel=1e-4)
    prior.write(tmp_path)
    again = SpreadPriorConfig().read(tmp_path)
    far = Embeddings(predicted.vectors * 100, predicted.ids, "toy")
    np.testing.assert_array_equal(
        again.sample(far, n_draws=1, seed=0).vectors, prior.sample(far, n_draws=1, seed=1).vectors
    )


def test_the_mean_of_many_images_far_from_zero_is_exact():
    """Sums of ten thousand rows of one thousand have no digit behind the point left in single precision.

    Their mean is then off by several times what single precision itself can distinguish there, 6e-5.
    """
    generator = np.random.default_rng(0)
    images = (1000 + 0.05 * generator.normal(size=(20_000, 2))).astype(np.float32)
    exact = images.astype(float).mean(axis=0)
    predicted = (exact + 0.5 * (images - exact)).astype(np.float32)
    targets = [Embeddings(rows, np.arange(len(rows)).astype(str), "toy") for rows in (predicted, images)]
    prior = SpreadPriorConfig().build().fit(*targets)
    assert prior.gain == pytest.approx(2, rel=1e-3)
    np.testing.assert_allclose(prior.mean, exact, atol=1e-4, rtol=0)


def test_what_it_cannot_spread_is_refused():
    predicted, images = make_rows()
    flat = Embeddings(np.repeat(images.vectors.mean(axis=0)[None], len(images), axis=0), images.ids, "toy")
    with pytest.raises(DataError, match="no gain can scale"):
        SpreadPriorConfig().build().fit(flat, images)
    with pytest.raises(DataError, match="has not been fitted"):
        SpreadPriorConfig().build().sample(predicted, n_draws=1, seed=0)
    prior = SpreadPriorConfig().build().fit(predicted, images)
    with pytest.raises(DataError, match="but got 'elsewhere'"):
        prior.sample(Embeddings(predicted.vectors, predicted.ids, "elsewhere"), n_draws=1, seed=0)
