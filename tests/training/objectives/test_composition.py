"""True texts against texts in which words changed places, against loops in double precision.

NegCLIP's released loss (vinid/neg_clip@e680f8e, `ClipLoss` on 2 B images and 4 B texts) is, on the same random unit
vectors in double precision with ``duplicates: negative`` and one swap of each text, the same to 2e-15.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.scoring.metrics.protocols import compare_bindings
from braindecode_vis.training import descriptions
from braindecode_vis.training.model import Batch, build_model, make_scales
from braindecode_vis.training.network_config import NetworkEncoderConfig
from braindecode_vis.training.objectives.composition import compute_composition_loss
from braindecode_vis.training.objectives.objective import Outputs, StepSizes
from braindecode_vis.training.objectives.objectives_config import CompositionObjectiveConfig
from tests.training.test_descriptions import write_table
from tests.training.toy_task import make_config, make_task


def make(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch():
    """Return brain, text, swapped, known and stimuli of six trials: two repeat, and two show the same parts."""
    text, swapped = make(6, 4, seed=1), make(6, 2, 4, seed=2)
    stimuli = torch.tensor([0, 1, 2, 3, 4, 0])
    text[5] = text[0]
    swapped[5] = swapped[0]
    swapped[1, 0] = 3 * text[2]  # the swapped caption of image 1 is the true one of image 2
    text[4] = text[3]  # two images of one caption
    known = torch.ones(6, 2, dtype=torch.bool)
    known[2, 1] = known[4] = False
    return make(6, 4), text, swapped, known, stimuli


def reference(brain, text, swapped, known, stimuli, *, scale, duplicates, symmetric):
    """Return the loss by loops over numbers."""

    def unit(v):
        return np.asarray(v) / np.linalg.norm(v)

    b, t = [unit(v) for v in brain], [unit(v) for v in text]
    wrong = [
        unit(v) for row, has in zip(swapped, known, strict=True) for v, h in zip(row, has, strict=True) if h
    ]
    n = len(b)

    def is_same(i, j):
        if duplicates == "negative":
            return i == j
        return i == j or bool(stimuli[i] == stimuli[j]) or float(t[i] @ t[j]) > 1 - 1e-6

    def search(logits, own, hidden):
        total = math.log(sum(math.exp(x) for k, x in enumerate(logits) if k not in hidden))
        return total - sum(logits[k] for k in own) / len(own)

    rows, columns = [], []
    for i in range(n):
        same = [j for j in range(n) if is_same(i, j)]
        own = [i] if duplicates == "mask" else same
        hidden = {j for j in same if j != i} if duplicates == "mask" else set()
        logits = [scale * float(b[i] @ v) for v in (*t, *wrong)]
        true = duplicates != "negative"
        hidden |= {n + m for m, u in enumerate(wrong) if true and float(u @ t[i]) > 1 - 1e-6}
        rows.append(search(logits, own, hidden))
        columns.append(search([scale * float(v @ t[i]) for v in b], own, {j for j in hidden if j < n}))
    return (np.mean(rows) + np.mean(columns)) / 2 if symmetric else np.mean(rows)


@pytest.mark.parametrize("duplicates", ["positive", "mask", "negative"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_equals_loops(duplicates, symmetric):
    batch = make_batch()
    options = {"scale": 5.0, "duplicates": duplicates, "symmetric": symmetric}
    expected = reference(*batch, **options)
    assert float(compute_composition_loss(*batch, **options)) == pytest.approx(expected, rel=1e-12)
    brain, *rest = batch
    assert torch.autograd.gradcheck(
        lambda x: compute_composition_loss(x, *rest, **options), brain.requires_grad_()
    )


def test_with_images_of_the_same_parts_in_the_batch_it_is_the_published_loss():
    """Images and their hard neighbours are 2 B rows; texts, theirs, and a swap of each are 4 B columns."""
    n = 8
    unit = functional.normalize(make(3 * n, 5), dim=-1)
    images, texts, swaps = unit[:n], unit[n : 2 * n], unit[2 * n :]
    logits = 14.0 * images @ torch.cat([texts, swaps]).T
    labels = torch.arange(n)
    published = (
        functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T[:n], labels)
    ) / 2
    known = torch.ones(n, 1, dtype=torch.bool)
    ours = compute_composition_loss(
        images, texts, swaps[:, None], known, labels, scale=14.0, duplicates="negative"
    )
    assert float(ours) == pytest.approx(float(published), rel=1e-14)


def test_a_text_of_the_same_words_costs_more_the_more_it_is_taken_for_the_true_one():
    brain, text, swapped, known, stimuli = make_batch()
    wrong = swapped.clone()
    wrong[0, 0] = brain[0]
    values = [
        float(compute_composition_loss(brain, text, w, k, stimuli, scale=5.0))
        for w, k in ((swapped, known & False), (swapped, known), (wrong, known))
    ]
    assert values[0] < values[1] < values[2]


def test_half_precision_stays_close():
    batch = make_batch()
    exact = float(
        compute_composition_loss(*(x.float() if x.is_floating_point() else x for x in batch), scale=10.0)
    )
    rounded = [x.bfloat16() if x.is_floating_point() else x for x in batch]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compute_composition_loss(*rounded, scale=10.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(exact, rel=5e-3)


def make_outputs(n_text=3):
    brain, text, swapped, known, stimuli = make_batch()
    return Outputs(
        brain, make(6, n_text, seed=5), stimuli, stimuli, sentences=text, swapped=swapped, swapped_known=known
    )


def test_a_head_meets_sentences_beside_any_target():
    objective = CompositionObjectiveConfig(learn_temperature=False).build()
    objective.prepare(StepSizes(n_common=4, n_sentence=4))
    outputs = make_outputs()
    value = objective(outputs)
    head = objective.term.head
    expected = compute_composition_loss(
        outputs.brain @ head.weight.double().T + head.bias.double(), outputs.sentences, outputs.swapped,
        outputs.swapped_known, outputs.stimuli, scale=1 / 0.07,
    )  # fmt: skip
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    value.backward()
    assert float(head.weight.grad.abs().max()) > 0


def test_texts_that_are_no_targets_are_refused():
    objective = CompositionObjectiveConfig(space="target").build()
    with pytest.raises(DataError, match=r"swapped captions have 4 values, .* 3; set space"):
        objective(make_outputs())
    assert CompositionObjectiveConfig(space="target").needs == {"swapped"}
    assert CompositionObjectiveConfig(words="attributes").needs == {"swapped", "sentences", "attributes"}


def test_the_model_projects_swapped_captions_as_targets():
    settings = {
        "network": {"kind": "eegproject", "width": 8}, "projector": {"size": 5, "sides": "image"},
        "objectives": [{"kind": "composition", "space": "target"}], "captions": "c.csv", "sentence_encoder": "minilm",
    }  # fmt: skip
    config = NetworkEncoderConfig.model_validate(settings)
    responses, targets = make_task(n_images=4)
    vectors = targets.vectors
    scales = make_scales("centre", vectors, None)
    model = build_model(config, describe_signal(responses), vectors.shape[1:], seed=0, scales=scales)
    raw = torch.from_numpy(vectors[:4])
    batch = Batch(
        torch.from_numpy(responses.data[:4]), torch.zeros(4, dtype=torch.long), torch.arange(4), torch.arange(4), raw,
        swapped=torch.stack([raw, raw.flip(0)], dim=1), swapped_known=torch.ones(4, 2, dtype=torch.bool),
    )  # fmt: skip
    with torch.no_grad():
        outputs = model.make_outputs(batch)
    torch.testing.assert_close(outputs.swapped[:, 0], outputs.image)
    torch.testing.assert_close(outputs.swapped[:, 1], outputs.image.flip(0))


def test_an_encoder_learns_what_goes_with_what(tmp_path, monkeypatch):
    """Images of a pair have one vector of parts, and one of binding with either sign; so have their captions."""
    responses, targets = make_task(n_images=40, noise=0.3)
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ids, first = np.unique(targets.ids.astype(str), return_index=True)
    texts = [f"red {n // 2} on blue" if n % 2 else f"blue {n // 2} on red" for n in range(40)]
    mixing = np.random.default_rng(3).normal(size=(targets.vectors.shape[1], 8))
    images = targets.vectors[first] @ mixing
    parts, bound = (images[::2] + images[1::2]) / 2, (images[::2] - images[1::2]) / 8

    def encode(asked):
        pairs = [(int(text.split()[1]), 1 if text.startswith("blue") else -1) for text in asked]
        return np.array([parts[pair] + sign * bound[pair] for pair, sign in pairs], np.float32)

    monkeypatch.setattr(descriptions, "make_sentence_encoder", lambda config: SimpleNamespace(encode=encode))
    monkeypatch.setattr(descriptions, "_SWAPS", 1)
    captions = write_table(tmp_path / "captions.csv", ["id", "caption"], zip(ids, texts, strict=True))
    config = make_config(
        objectives=[{"kind": "clip"}, {"kind": "composition"}], captions=captions,
        sentence_encoder=folder, epochs=12, optimiser={"lr": 1e-2},
    )  # fmt: skip
    encoder = config.build(seed=0).fit(responses, targets)
    new, _ = make_task(n_images=40, noise=0.3)
    predicted = encoder.predict_sentences(new)
    number = {name: n for n, name in enumerate(ids)}
    own = np.array([number[name] for name in predicted.ids.astype(str)])
    # The other image of a pair has the same words, exchanged.
    true, swapped = (
        Embeddings(encode([texts[n] for n in rows]), list(predicted.ids), predicted.space)
        for rows in (own, own ^ 1)
    )
    assert compare_bindings(predicted, true, swapped).mean() > 0.75
    (tmp_path / "fit").mkdir()
    encoder.write(tmp_path / "fit")
    again = config.read(tmp_path / "fit").predict_sentences(new)
    np.testing.assert_array_equal(again.vectors, predicted.vectors)
