"""A decision on one trial, whatever predicts and ranks."""

from unittest.mock import Mock

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.parts.live.judge import Judge, MarkerDecoder


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 3)])
def test_a_decision_keeps_the_trial_that_it_is_on(shape):
    """As channels and times, or as the voxels of its first volume."""
    values = np.random.default_rng(0).normal(size=shape)
    judge = Mock(spec=Judge, run=None, subject="01", session="01", adaptation="", statistics=Mock())
    judge.statistics.apply = lambda values, subject, session: 2 * values
    judge.predict.return_value = Embeddings(
        np.array([[1.0, 0.0], [0.0, 1.0]])[: shape[0]], list("ab")[: shape[0]], "toy"
    )
    judge.judge.return_value = Mock(unit=np.ones(2), as_fields=dict)
    judge.find_rank.return_value, judge.learn_from.return_value = 3, ""
    decoder = MarkerDecoder(judge, None, repetitions=False, reconstruct=False)
    decoder._n_decisions = 4
    (decision,) = decoder._decide_trial(values, None, onset=1.5, notes=(), began=0.0, arrived=0.0)
    assert (decision.number, decision.rank) == (4, 3)
    np.testing.assert_array_equal(decision.epoch, 2 * values[0] if len(shape) == 3 else 2 * values[:1].T)
    np.testing.assert_allclose(decision.embedding, [1, 0] if len(shape) == 3 else [0.5, 0.5])
