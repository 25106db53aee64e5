"""CLIP's contrast against loops in double precision, open_clip, and the published settings."""

import math

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.config import read_config
from braindecode_vis.training.objectives import objective
from braindecode_vis.training.objectives.objective import (
    LogitScale,
    Outputs,
    compute_clip_loss,
    compute_matches,
)
from braindecode_vis.training.objectives.objectives_config import (
    ClipImageTextObjectiveConfig,
    ClipObjectiveConfig,
    MseObjectiveConfig,
)
from tests.references import CLOSE


def make_pair(n=7, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) * 2 for _ in range(2))


STIMULI = torch.tensor([3, 1, 3, 0, 2, 1, 3])


def reference_clip(brain, image, stimuli, scale, symmetric, duplicates, unit_brain, unit_image):
    b = [np.asarray(x) / (np.linalg.norm(x) if unit_brain else 1) for x in brain.numpy()]
    v = [np.asarray(x) / (np.linalg.norm(x) if unit_image else 1) for x in image.numpy()]
    n = len(b)

    def one_way(queries, keys):
        total = 0.0
        for i in range(n):
            same = [j for j in range(n) if stimuli[j] == stimuli[i]]
            positives = same if duplicates == "positive" else [i]
            candidates = [j for j in range(n) if duplicates != "mask" or j == i or j not in same]
            denominator = sum(math.exp(scale * float(queries[i] @ keys[j])) for j in candidates)
            for j in positives:
                total -= math.log(math.exp(scale * float(queries[i] @ keys[j])) / denominator) / len(
                    positives
                )
        return total / n

    return (one_way(b, v) + one_way(v, b)) / 2 if symmetric else one_way(b, v)


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("units", [(True, True), (False, True), (True, False)])
def test_clip_loss_equals_loops(duplicates, symmetric, units):
    brain, image = make_pair()
    got = compute_clip_loss(
        brain, image, STIMULI, scale=3.0, symmetric=symmetric, duplicates=duplicates,
        normalise_brain=units[0], normalise_image=units[1],
    )  # fmt: skip
    expected = reference_clip(brain, image, STIMULI.tolist(), 3.0, symmetric, duplicates, *units)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_clip_loss_equals_open_clip():
    brain, image = make_pair(12, 8)
    unit = torch.nn.functional.normalize
    expected = ClipLoss()(unit(brain, dim=-1), unit(image, dim=-1), 14.3)
    assert float(compute_clip_loss(brain, image, scale=14.3)) == pytest.approx(float(expected), rel=1e-12)


def test_perfect_alignment_has_the_smallest_loss_that_duplicates_allow():
    """Two trials of one image are the same to it, so a positive pair leaves log 2 for each; a mask leaves nothing."""
    image = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    stimuli = torch.tensor([0, 0, 1, 2])
    options = {"scale": 200.0, "stimuli": stimuli}
    assert float(compute_clip_loss(image, image, duplicates="positive", **options)) == pytest.approx(
        math.log(2) / 2
    )
    assert float(compute_clip_loss(image, image, duplicates="mask", **options)) == pytest.approx(
        0.0, abs=CLOSE
    )


def test_positive_duplicates_do_not_push_repetitions_apart():
    """With duplicates as negatives, the repetition's brain vector has a gradient away from its own image."""
    image = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    stimuli = torch.tensor([0, 0, 1, 2])
    pull = {}
    for duplicates in ("mask", "negative"):
        brain = (image + 0.3).requires_grad_()
        compute_clip_loss(brain, image, stimuli, scale=5.0, duplicates=duplicates).backward()
        pull[duplicates] = -float(brain.grad[0] @ image[0])
    assert pull["mask"] > pull["negative"]


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
def test_gradients_of_both_sides_and_the_scale(duplicates):
    brain, image = make_pair(5, 4)
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    stimuli = torch.tensor([0, 1, 0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda b, v, s: compute_clip_loss(b, v, stimuli, scale=s, duplicates=duplicates),
        (brain.requires_grad_(), image.requires_grad_(), scale),
    )


def test_single_precision_survives_autocast_and_extreme_scales():
    brain, image = (tensor.float() for tensor in make_pair(64, 32))
    plain = compute_clip_loss(brain, image, scale=100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compute_clip_loss(brain, image, scale=100.0), plain)
    assert torch.isfinite(compute_clip_loss(1e4 * brain, image, scale=100.0, normalise_brain=False))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1 / 0.07),  # CLIP, ATM
        ({"learn_temperature": False}, 1 / 0.07),  # NICE
        ({"scale": "softplus"}, 2.7271),  # UBP
        ({"scale": "softplus", "learn_temperature": False}, 2.7271),  # NeuroBridge
        ({"temperature": 1.0, "learn_temperature": False}, 1.0),  # Meta: no temperature
    ],
)
def test_scales_of_the_papers(options, expected):
    config = ClipObjectiveConfig(**options)
    objective = config.build()
    assert objective.term.scale().item() == pytest.approx(expected, rel=1e-4)
    assert len(list(objective.parameters())) == int(config.learn_temperature)


def test_meta_setting_equals_its_formula():
    """Brain to image alone, ``<f_i, z_j> / |z_j|`` without a temperature."""
    brain, image = make_pair(9, 6)
    config = ClipObjectiveConfig(
        temperature=1.0,
        learn_temperature=False,
        symmetric=False,
        normalise_brain=False,
        duplicates="negative",
    )
    outputs = Outputs(brain=brain, image=image, stimuli=torch.arange(9), concepts=torch.arange(9))
    logits = brain @ (image / image.norm(dim=-1, keepdim=True)).T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(9))
    assert float(config.build()(outputs)) == pytest.approx(float(expected), rel=1e-12)


def test_scale_is_bounded_and_can_come_back():
    scale = LogitScale(0.07, form="exp", learn=True)
    with torch.no_grad():
        scale.raw.fill_(9.0)
    value = scale()
    assert value.item() == pytest.approx(100.0, rel=1e-5)
    value.backward()
    assert float(scale.raw.grad) > 0  # a clamp inside the graph would give zero here


def test_scale_survives_accumulated_graphs():
    """Two forward passes before the first backward pass, as in gradient accumulation."""
    for form in ("exp", "softplus"):
        scale = LogitScale(0.07, form=form, learn=True)
        first, second = scale(), scale()
        first.backward()
        second.backward()
        assert torch.isfinite(scale.raw.grad)


def test_image_text_mix():
    brain, image = make_pair(6, 4)
    text = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    concepts = torch.tensor([0, 0, 1, 2, 2, 3])
    text = text[concepts]
    objective = ClipImageTextObjectiveConfig().build()
    outputs = Outputs(brain=brain, image=image, stimuli=torch.arange(6), concepts=concepts, text=text)
    scale = 1 / 0.07
    image_term = reference_clip(brain, image, list(range(6)), scale, True, "positive", True, True)
    text_term = reference_clip(brain, text, concepts.tolist(), scale, True, "positive", True, True)
    assert objective(outputs).item() == pytest.approx(0.99 * image_term + 0.01 * text_term, rel=1e-6)
    outputs.concepts = torch.zeros(6, dtype=torch.long)
    with pytest.raises(DataError, match="two different concepts"):
        objective(outputs)


def test_sides_of_different_size_are_refused():
    with pytest.raises(DataError, match="same space"):
        compute_clip_loss(torch.zeros(3, 4), torch.zeros(3, 5), scale=1.0)


def test_matches_are_the_diagonal_of_the_first_contrast():
    """What the rule of uncertainty sees: the logits of UBP's loss, cosines where no objective has a scale."""
    brain, image = torch.randn(5, 4), torch.randn(5, 4)
    outputs = Outputs(brain, image, torch.arange(5), torch.arange(5))
    clip = ClipObjectiveConfig(scale="softplus", normalise_brain=False).build()
    scale = math.log(1 + 1 / 0.07)  # softplus of ln(1 / 0.07)
    expected = scale * (brain @ functional.normalize(image).T).diagonal()
    torch.testing.assert_close(compute_matches([clip], outputs), expected)
    torch.testing.assert_close(compute_matches([], outputs), functional.cosine_similarity(brain, image))
    # The first objective that has a scale counts, whatever stands before it.
    unscaled = [MseObjectiveConfig().build(), clip, ClipObjectiveConfig(temperature=0.5).build()]
    torch.testing.assert_close(compute_matches(unscaled, outputs), expected)


@pytest.mark.parametrize("same_target", [False, True])
def test_several_subjects_of_one_image_are_positives_as_in_score(same_target):
    """SCORE's contrast: the mean of log-softmax over all positives of a row, and of a column.

    Where the target of an image does not depend on the subject, that is the pairwise contrast exactly: all positives of
    a row have one logit, and all columns of an image one softmax.
    """
    generator = torch.Generator().manual_seed(3)
    stimuli = torch.tensor([0, 1, 0, 2, 1, 0])
    brain, image = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    if same_target:
        image = image[[0, 1, 0, 3, 1, 0]]
    logits = 4.0 * torch.nn.functional.normalize(brain) @ torch.nn.functional.normalize(image).T
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    expected = 0.0
    for i in range(6):
        positives = [j for j in range(6) if stimuli[j] == stimuli[i]]
        expected -= sum(float(rows[i, j] + columns[j, i]) for j in positives) / len(positives) / 12
    found = float(compute_clip_loss(brain, image, stimuli, scale=4.0, duplicates="positive"))
    assert found == pytest.approx(expected, rel=1e-12)
    pairwise = float(compute_clip_loss(brain, image, stimuli, scale=4.0, duplicates="negative"))
    assert (pairwise == pytest.approx(found, rel=1e-12)) is same_target


def test_the_contrast_of_subjectmix_is_the_released_one():
    """All trials of an image are positives, the image side alone has unit length, the scale is fixed at 2.727.

    Neurobridge_ssl@7898cf6 (`module/loss.py`, flags `img_l2norm`, `softplus`, `multi_positive_loss`), run beside the
    settings of the configuration on the same 113 images of nine subjects: scales 2.7269187 (kept in single precision
    here), losses 10.4640786 to 4e-9, gradients of both sides to 1.2e-8. Two training steps of TSConv and both
    projectors from copied weights, without dropout: loss to 7e-8, weights to 0.3 % of their move, apart from biases
    before a batch norm, whose gradient is zero up to rounding. Both sides of unit length and 1/0.07, which stood in the
    configuration before, give 8.467.
    """
    (contrast,) = read_config("things_eeg2_loso_subjectmix_internvit").encoder.objectives
    generator = torch.Generator().manual_seed(4)
    stimuli = torch.arange(5).repeat_interleave(3)
    brain, image = (torch.randn(15, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    image = image[::3].repeat_interleave(3, dim=0)
    logits = math.log(1 + 1 / 0.07) * brain @ functional.normalize(image).T
    same = stimuli[:, None] == stimuli
    expected = -(logits.log_softmax(1)[same].mean() + logits.T.log_softmax(1)[same].mean()) / 2
    found = contrast.build()(Outputs(brain=brain, image=image, stimuli=stimuli, concepts=stimuli))
    # The scale is kept in single precision.
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_batches_without_duplicates_take_a_short_way_to_the_same_bits(monkeypatch, symmetric):
    brain, image = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for shortcut in (True, False):
        if not shortcut:
            monkeypatch.setattr(objective, "_are_unique", lambda labels: False)
        leaf = brain.clone().requires_grad_()
        loss = compute_clip_loss(leaf, image, torch.arange(32).flip(0), scale=10.0, symmetric=symmetric)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
