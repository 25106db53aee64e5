import numpy as np
import pytest

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.contracts import Prior
from braindecode_vis.priors.closed_form import MeanPriorConfig
from braindecode_vis.registry import find_component


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
        ("diffusion", True, {}),
        ("diffusion", False, {"condition": "simulated"}), ("diffusion", True, {"condition": "noised_targets"}),
    ],
)  # fmt: skip
def test_priors_that_learn_from_predictions_say_so(kind, needs, options):
    """Where none need them, a run makes no out-of-fold predictions, which takes minutes with a network."""
    settings = find_component("prior", kind)(**options)
    assert settings.build() is not None
    assert settings.needs_predictions is needs
