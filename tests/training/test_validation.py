"""Held-out training images."""

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.loop import compute_top_k, name_top_k
from braindecode_vis.training.network_encoder import hold_out


def test_whole_concepts_are_held_out_or_images_where_concepts_are_few():
    stimuli = np.repeat(np.arange(100), 2)
    by_concept = hold_out(stimuli, stimuli // 4, 0.2, seed=0)
    assert by_concept.by == "concept"
    assert by_concept.mask.sum() == 40
    concepts = stimuli // 4
    assert not set(concepts[by_concept.mask]) & set(concepts[~by_concept.mask])
    few = hold_out(stimuli, stimuli % 3, 0.2, seed=0)
    assert few.by == "image"
    assert not set(stimuli[few.mask]) & set(stimuli[~few.mask])
    assert (hold_out(stimuli, concepts, 0.2, seed=1).mask != by_concept.mask).any()
    assert not hold_out(stimuli, concepts, 0, seed=0).mask.any()
    images = hold_out(stimuli, concepts, 0.2, seed=0, by="image")
    assert images.by == "image"
    assert images.mask.sum() == 40
    assert set(concepts[images.mask]) & set(concepts[~images.mask])
    # NICE: 740 of 16 540 images validate
    assert (
        hold_out(np.arange(16540), np.arange(16540) // 10, 740 / 16540, seed=0, by="image").mask.sum() == 740
    )
    with pytest.raises(DataError, match="too few for a held-out set"):
        hold_out(np.arange(5), np.arange(5), 0.1, seed=0)


def test_top_k_agrees_with_sorting_and_constant_outputs_find_nothing():
    rng = np.random.default_rng(0)
    gallery, truth = rng.standard_normal((30, 8)), rng.integers(30, size=50)
    brain = gallery[truth] + 2 * rng.standard_normal((50, 8))
    similarity = np.array([[b @ g / np.linalg.norm(b) / np.linalg.norm(g) for g in gallery] for b in brain])
    for k in (1, 5):
        best = np.argsort(-similarity, axis=1)[:, :k]
        assert compute_top_k(brain, gallery, truth, k) == np.mean(
            [t in b for t, b in zip(truth, best, strict=True)]
        )
    assert compute_top_k(np.ones((5, 8)), np.ones((30, 8)), np.arange(5), 5) == 0
    assert name_top_k(20) == ("top5", 5)
    assert name_top_k(19) == ("top1", 1)
