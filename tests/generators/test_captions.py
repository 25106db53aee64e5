"""Captions decoded from embeddings: of the nearest training image, through GIT, and by a decoder that is learnt."""

import numpy as np
import pytest

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.generators.captions import retrieve_captions


def test_the_caption_of_the_nearest_training_image_is_found():
    bank = {"t2": ["a dog, on the grass", "another"], "t1": ["a cat"]}
    training = Embeddings(np.array([[0, 1], [1, 0], [1, 1.0]]), ["t2", "t1", "t3"], "toy")
    predicted = Embeddings(np.array([[1, 1.0], [0.1, 2]]), ["q1", "q2"], "toy")
    found = retrieve_captions(predicted, training, bank, device="cpu")
    assert found == ["a cat", "a dog, on the grass"]  # t3 has no caption; equally near images go by their ids
    with pytest.raises(DataError, match="none of the training images"):
        retrieve_captions(predicted, training, {"x": ["y"]})
