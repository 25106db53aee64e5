import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Prior
from braindecode_vis.base.registry import find_component
from braindecode_vis.generation.priors.closed_form import MeanPriorConfig, MomentsPriorConfig


def test_every_sample_is_the_mean_of_distinct_images(tmp_path):
    """An image seen in three trials counts once."""
    target = Embeddings(np.array([[0.0, 0], [0, 0], [0, 0], [4, 2]]), ["a", "a", "a", "b"], "toy")
    predicted = Embeddings(np.full((4, 2), 9.0), target.ids, "toy")
    prior = MeanPriorConfig().build().fit(predicted, target)
    assert isinstance(prior, Prior)
    drawn = prior.sample(predicted, n_draws=2, seed=3)
    np.testing.assert_array_equal(drawn.vectors, np.tile([2.0, 1.0], (8, 1)))
    assert drawn.ids.tolist() == ["a"] * 6 + ["b"] * 2
    prior.write(tmp_path)
    again = MeanPriorConfig().read(tmp_path).sample(predicted, n_draws=1, seed=0)
    np.testing.assert_array_equal(again.vectors, np.tile([2.0, 1.0], (4, 1)))
    assert again.space == "toy"


def test_all_training_images_count_where_they_are_given():
    target = Embeddings(np.zeros((2, 1)), ["a", "b"], "toy")
    images = Embeddings(np.array([[0.0], [0], [6]]), ["a", "b", "c"], "toy")
    drawn = MeanPriorConfig().build().fit(target, target, images=images).sample(target, n_draws=1, seed=0)
    np.testing.assert_array_equal(drawn.vectors, [[2.0], [2.0]])


def test_misuse_is_refused():
    rows = Embeddings(np.zeros((2, 1)), ["a", "b"], "toy")
    with pytest.raises(DataError, match="has not been fitted"):
        MeanPriorConfig().build().sample(rows, n_draws=1, seed=0)
    prior = MeanPriorConfig().build().fit(rows, rows)
    with pytest.raises(DataError, match="fitted in the space 'toy'"):
        prior.sample(Embeddings(np.zeros((2, 1)), ["a", "b"], "clip"), n_draws=1, seed=0)


@pytest.mark.parametrize(
    "kind, needs, options",
    [
        ("identity", False, {}), ("mean", False, {}), ("neighbours", False, {}), ("spread", True, {}),
        ("moments", True, {}),
        ("diffusion", True, {}),
        ("diffusion", False, {"condition": "simulated"}), ("diffusion", True, {"condition": "noised_targets"}),
    ],
)  # fmt: skip
def test_priors_that_learn_from_predictions_say_so(kind, needs, options):
    """Where none need them, a run makes no out-of-fold predictions, which takes minutes with a network."""
    settings = find_component("prior", kind)(**options)
    assert settings.build() is not None
    assert settings.needs_predictions is needs


def test_moments_are_those_of_the_training_images_whatever_is_tested(tmp_path):
    """Statistics come from predictions of training trials; those of the tested ones would need all of them at once."""
    rng = np.random.default_rng(0)
    ids = [f"i{n}" for n in range(500)]
    spread = np.array([[1.0, 3.0, 0.5], [2.0, 4.0, 1.0]])
    target = Embeddings(rng.normal(size=(500, 2, 3)) * spread + 7, ids, "toy")
    shrunk = 0.1 * target.vectors + 2 + 0.01 * rng.normal(size=(500, 2, 3))
    shrunk[:, 1, 2] = 5.0  # never predicted
    prior = MomentsPriorConfig().build().fit(Embeddings(shrunk, ids, "toy"), target)
    made = prior.sample(Embeddings(shrunk, ids, "toy"), n_draws=1, seed=0).vectors
    np.testing.assert_allclose(made.mean(axis=0), target.vectors.mean(axis=0), atol=1e-3)
    known = np.array([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(made.std(axis=0)[known], target.vectors.std(axis=0)[known], rtol=1e-3)
    assert made.std(axis=0)[1, 2] == pytest.approx(0, abs=1e-3)  # of 500 equal numbers in single precision
    prior.write(tmp_path)
    one = Embeddings(shrunk[3:4], ["i3"], "toy")
    again = MomentsPriorConfig().read(tmp_path).sample(one, n_draws=2, seed=5)
    np.testing.assert_array_equal(again.vectors, np.repeat(made[3:4], 2, axis=0))  # alone as among all
    assert prior.describe()["unpredicted"] == pytest.approx(1 / 6)
    with pytest.raises(DataError, match="moments prior was fitted in the space 'toy'"):
        prior.sample(Embeddings(np.zeros((1, 2, 3)), ["a"], "clip"), n_draws=1, seed=0)
