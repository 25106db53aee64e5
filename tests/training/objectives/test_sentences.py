"""Sentences as a second target, against loops in double precision.

The released code of MCSE (uds-lsv/MCSE@3031426) and of Merkx and Frank (DannyMerkx/speech2image@4a79a61), run beside
this one on the same random vectors in double precision: the grounding term of MCSE differs by 0, its contrast of two
passes by 2e-15, the margin over all pairs by 1e-16, and over the two hardest by 0.
"""

import math

import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.objectives.composition import (
    compute_margin_loss,
    compute_sentence_contrast,
    find_same_sentences,
)


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


SAME = torch.eye(5, dtype=torch.bool)
SAME[0, 3] = SAME[3, 0] = True


@pytest.mark.parametrize("same", [None, SAME])
def test_the_contrast_equals_loops(same):
    predicted, sentences = make(5, 4), make(5, 4, seed=1)
    right = torch.eye(5, dtype=torch.bool) if same is None else same

    def reference(rows, columns):
        total = 0.0
        for i in range(5):
            logits = [cosine(rows[i], columns[j]) / 0.05 for j in range(5)]
            answers = [j for j in range(5) if right[i, j]]
            log_sum = math.log(sum(math.exp(s - max(logits)) for s in logits)) + max(logits)
            total -= sum(logits[j] - log_sum for j in answers) / len(answers)
        return total / 5

    expected = reference(predicted, sentences)
    found = compute_sentence_contrast(predicted, sentences, same, temperature=0.05)
    assert float(found) == pytest.approx(expected)
    assert torch.autograd.gradcheck(
        lambda x: compute_sentence_contrast(x, sentences, same, temperature=0.5),
        predicted.requires_grad_(),
    )


@pytest.mark.parametrize("same", [None, SAME])
def test_the_margin_equals_loops(same):
    predicted, sentences = make(5, 4), make(5, 4, seed=1)
    right = torch.eye(5, dtype=torch.bool) if same is None else same
    s = [[cosine(p, t) for t in sentences] for p in predicted]
    total = 0.0
    for i in range(5):
        row = [0 if right[i, j] else max(0.0, 0.2 - s[i][i] + s[i][j]) for j in range(5)]
        column = [0 if right[j, i] else max(0.0, 0.2 - s[i][i] + s[j][i]) for j in range(5)]
        total += sum(row) + sum(column)
    expected = total / 25
    got = compute_margin_loss(predicted, sentences, same)
    assert float(got) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: compute_margin_loss(x, sentences, same), predicted.requires_grad_()
    )


def test_equal_sentences_of_other_images_are_no_mistake():
    sentences = make(4, 6)
    sentences[2] = 5 * sentences[0]
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(find_same_sentences(sentences), expected)
    expected[1, 3] = expected[3, 1] = True
    assert torch.equal(find_same_sentences(sentences, torch.tensor([0, 1, 2, 1])), expected)


def test_half_precision_changes_little():
    predicted, sentences = make(64, 384).float(), make(64, 384, seed=1).float()
    predicted = sentences + predicted
    for compute in (lambda p, s: compute_sentence_contrast(p, s, temperature=0.05), compute_margin_loss):
        exact = compute(predicted, sentences)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = compute(predicted.bfloat16(), sentences.bfloat16())
        assert half.dtype == torch.float32
        assert float(half) == pytest.approx(float(exact), rel=5e-3)


def test_bad_input():
    for compute in (lambda p, s: compute_sentence_contrast(p, s, temperature=0.1), compute_margin_loss):
        with pytest.raises(DataError, match="brain and sentence outputs must both"):
            compute(make(3, 4), make(3, 5))
