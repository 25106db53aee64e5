"""Captioning: terms against plain loops, masks against the text, sizes that a training decides."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.training.caption_networks import compute_word_loss
from braindecode_vis.training.objectives.captioning import (
    PatchRebuilder,
    compute_masked_error,
    hide_least_alike,
)
from braindecode_vis.training.objectives.objective import Outputs, StepSizes
from braindecode_vis.training.objectives.objectives_config import CaptioningObjectiveConfig
from tests.training.toy_task import make_config, make_task

SIZES = StepSizes(n_common=6, n_outputs=6, n_tokens=3, n_words=9, max_words=5, target_shape=(4, 5))
WORDS = torch.tensor([[1, 3, 4, 2, 0], [1, 5, 2, 0, 0], [1, 6, 7, 8, 2], [1, 3, 4, 2, 0], [1, 4, 2, 0, 0]])


def make(seed=0, **settings):
    """Return the objective in double precision and without dropout, and outputs of five trials of four images."""
    objective = CaptioningObjectiveConfig(width=16, n_queries=2, **settings).build()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        objective.prepare(SIZES)
        tensors = {
            "brain": torch.randn(5, 6),
            "image": torch.randn(5, 6),
            "brain_tokens": torch.randn(5, 3, 6),
        }
        tensors["raw_target"] = torch.randn(5, 20)
    stimuli = torch.tensor([0, 1, 2, 3, 1])
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    return objective.double().eval(), Outputs(**tensors, stimuli=stimuli, concepts=stimuli, words=WORDS)


def contrast_by_loops(left, right, scale, stimuli, words):
    """The symmetric contrast, in which equal captions and other captions of the same image do not compete."""
    total = 0.0
    for one, two in ((left, right), (right, left)):
        for i in range(len(one)):
            terms = [
                math.exp(scale * float(np.dot(one[i], two[j])))
                for j in range(len(two))
                if i == j or (stimuli[i] != stimuli[j] and list(words[i]) != list(words[j]))
            ]
            own = scale * float(np.dot(one[i], two[i]))
            total += (math.log(sum(terms)) - own) / len(one) / 2
    return total


def write_by_loops(logits, words):
    """The mean over words that are no padding of the negative log-likelihood."""
    costs = []
    for row, text in zip(logits, words, strict=True):
        for scores, word in zip(row, text, strict=True):
            if word:
                costs.append(math.log(sum(math.exp(s) for s in scores)) - scores[word])
    return sum(costs) / len(costs)


@pytest.mark.parametrize("reads", ["tokens", "output"])
def test_the_loss_is_that_of_loops(reads):
    """CoCa's sum, 1 contrast and 2 captioning, from the network's parts in plain loops.

    open_clip 3.3.0 has the same two terms (``CoCaLoss`` with weights 2 and 1) where no caption is repeated; on
    features, logits and labels of 32 random rows, twenty times, it differs by 9.5e-7 at most in single precision.
    """
    objective, outputs = make(reads=reads)
    network = objective.term.network
    seen = outputs.brain_tokens if reads == "tokens" else outputs.brain[:, None]
    with torch.no_grad():
        memory, brain = network.pool(seen)
        states, text = network.read(WORDS[:, :-1])
        logits = network.write(states, memory)
    scale = float(network.log_scale.detach().exp())
    expected = contrast_by_loops(brain.numpy(), text.numpy(), scale, outputs.stimuli.tolist(), WORDS.tolist())
    expected += 2 * write_by_loops(logits.tolist(), WORDS[:, 1:].tolist())
    assert float(objective(outputs).detach()) == pytest.approx(expected, rel=1e-10)


def test_what_is_least_like_the_text_is_hidden():
    """Half of the tokens, by a sort; the words are written as if the others were not there."""
    objective, outputs = make(shown=0.67)
    network = objective.term.network
    with torch.no_grad():
        _, text = network.read(WORDS[:, :-1])
        tokens = network.place_tokens(outputs.brain_tokens)
        hidden = hide_least_alike(tokens, text, 0.67)
        assert hidden.sum(dim=1).tolist() == [1] * 5
        for row in range(5):
            alike = [float(token @ text[row]) for token in tokens[row]]
            assert hidden[row].tolist() == [place == int(np.argmin(alike)) for place in range(3)]
        memory, _ = network.pool(outputs.brain_tokens, hidden)
        alone, _ = network.pool(outputs.brain_tokens[:1, ~hidden[0]])
    torch.testing.assert_close(memory[:1], alone)


def test_hidden_patches_are_rebuilt_from_brain_and_words():
    """The error is that of the hidden half, of patches by their own mean and spread; both sides have a gradient."""
    objective, outputs = make(masked=1.0)
    bare, _ = make()
    rebuilder = objective.term.rebuilder
    bare.term.network.load_state_dict(objective.term.network.state_dict())
    outputs.brain_tokens.requires_grad_()
    added = objective(outputs) - bare(outputs)
    grad = torch.autograd.grad(added, outputs.brain_tokens)[0]
    assert float(grad.abs().max()) > 0
    patches = outputs.raw_target.reshape(5, 4, 5).numpy()
    patches = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-5)
    with torch.no_grad():
        made = torch.zeros(5, 4, 5, dtype=torch.float64)
        masked = torch.tensor([[True, False, True, False]] * 5)
        error = compute_masked_error(made, torch.from_numpy(patches), masked)
        assert float(error) == pytest.approx(float((patches[:, [0, 2]] ** 2).mean()))
        # Of the patches, the half that is hidden does not reach what is made.
        memory, padded = torch.randn(5, 6, 16).double(), torch.zeros(5, 4, dtype=torch.bool)
        text = torch.nn.functional.normalize(torch.randn(5, 16).double(), dim=-1)
        one, _ = rebuilder(outputs.raw_target, memory, padded, text)
        other, _ = rebuilder(outputs.raw_target, memory.flip(0), padded, text)
    assert float(one) != float(other)

    def compute(tokens):
        return objective(dataclasses.replace(outputs, brain_tokens=tokens))

    assert torch.autograd.gradcheck(
        compute, outputs.brain_tokens.detach().requires_grad_(), eps=1e-6, atol=1e-4, fast_mode=True
    )


def test_a_vocabulary_of_one_word_teaches_nothing_and_breaks_nothing():
    objective = CaptioningObjectiveConfig(width=8).build()
    objective.prepare(dataclasses.replace(SIZES, n_words=4, max_words=3))
    stimuli = torch.arange(4)
    outputs = Outputs(
        torch.randn(4, 6), torch.randn(4, 6), stimuli, stimuli, brain_tokens=torch.randn(4, 3, 6),
        words=torch.tensor([[1, 3, 2]] * 4),
    )  # fmt: skip
    objective(outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters())
    assert objective.term.write_words(outputs.brain_tokens).shape[1] <= 1


def test_beams_find_the_likelier_caption():
    """Of all captions of two words, beams as many as there are words find the likeliest by its mean log-likelihood."""
    objective, outputs = make(seed=3)
    term = objective.term
    tokens = outputs.brain_tokens
    sizes = dataclasses.replace(term.network.sizes, max_words=2)
    term.network.sizes = sizes
    with torch.no_grad():
        memory, _ = term.network.pool(tokens[:1])

        def score(words):
            row = torch.tensor([[1, *words]])
            logits = term.network.write(term.network.read(row[:, :-1])[0], memory)[0]
            logits[:, [0, 1]] = -math.inf
            likelihood = logits.log_softmax(-1)
            return float(sum(likelihood[place, word] for place, word in enumerate(words)) / len(words))

        captions = [[2], *([a, b] for a in range(3, 9) for b in range(2, 9))]
        best = max(captions, key=score)
    found = [word for word in term.write_words(tokens[:1], n_beams=60)[0].tolist() if word]
    assert found == best
    greedy = term.write_words(tokens)
    np.testing.assert_array_equal(greedy, term.write_words(tokens, n_beams=1))
    # A trial's caption does not depend on those beside it.
    alone = term.write_words(tokens[2:3], n_beams=3)[0]
    together = term.write_words(tokens, n_beams=3)[2]
    assert [w for w in alone.tolist() if w] == [w for w in together.tolist() if w]


def test_word_loss_of_rows_of_other_lengths():
    logits = torch.randn(2, 3, 5)
    words = torch.tensor([[3, 2, 0], [4, 3, 2]])
    expected = write_by_loops(logits.double().tolist(), words.tolist())
    assert float(compute_word_loss(logits, words)) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match=r"predicts masked patches \(masked\), but the target has 1 vector"):
        CaptioningObjectiveConfig(masked=1.0).build().prepare(dataclasses.replace(SIZES, target_shape=(20,)))
    with pytest.raises(ValueError, match="width 30 cannot be divided into four heads"):
        CaptioningObjectiveConfig(width=30)
    with pytest.raises(
        ValueError, match=r"shown is 0\.5, but it has no effect: with reads output there is one vector"
    ):
        CaptioningObjectiveConfig(reads="output", shown=0.5)
    with pytest.raises(ValueError, match="and contrast learns this similarity; give contrast a weight"):
        CaptioningObjectiveConfig(shown=0.5, contrast=0)
    assert PatchRebuilder((4, 5), 8, 2, 0.0).shape == (4, 5)


COLOURS, THINGS = ["red", "blue", "green"], ["star", "cat"]


def write_bank(path, n=24):
    """Captions of the toy images, two each: of what the signs of the first two features of an embedding say."""
    _, targets = make_task(n_images=n)
    vectors = dict(zip(targets.ids, targets.vectors, strict=True))
    lines, names = ["id,caption"], {}
    for name, vector in vectors.items():
        colour, thing = COLOURS[int(vector[0] > 0)], THINGS[int(vector[1] > 0)]
        names[name] = (colour, thing)
        lines += [f"{name},a {colour} {thing}", f'{name},"a {thing}, {colour}"']
    path.write_text("\n".join(lines))
    return names


def configure(path, objective=None, **settings):
    captioning = {
        "kind": "captioning",
        "width": 16,
        "n_queries": 2,
        "dropout": 0,
        **(objective or {}),
    }
    return make_config(
        objectives=[{"kind": "clip"}, captioning], captions=path, epochs=20, optimiser={"lr": 2e-2},
        normalise_targets="none", **settings,
    )  # fmt: skip


def test_a_fitted_encoder_writes_captions_of_trials(tmp_path, monkeypatch):
    """Read from its files, it writes the same."""
    network = {"kind": "eegproject", "width": 12}
    names = write_bank(tmp_path / "captions.csv")
    responses, targets = make_task(noise=0.1)
    encoder = configure(tmp_path / "captions.csv", network=network).build(seed=0).fit(responses, targets)
    captions = encoder.describe(responses)
    right = [
        all(w in c.split() or f"{w}," in c for w in names[i])
        for i, c in zip(responses.stimulus_ids, captions, strict=True)
    ]
    assert np.mean(right) > 0.4  # a quarter by chance
    monkeypatch.setattr("braindecode_vis.training.fitted.PREDICTED_TOGETHER", 7)
    assert encoder.describe(responses) == captions
    assert encoder.describe_mean()
    (tmp_path / "fit").mkdir()
    encoder.write(tmp_path / "fit")
    again = encoder.config.read(tmp_path / "fit")
    assert again.describe(responses, n_beams=2) == encoder.describe(responses, n_beams=2)
    assert "validation_loss" not in encoder.fitted.history[-1]  # nothing is held out


def test_captions_that_are_missing_or_nobody_learns_are_one_sentence(tmp_path):
    write_bank(tmp_path / "captions.csv", n=22)
    responses, targets = make_task()
    with pytest.raises(DataError, match="has no caption for 2 of 24 training images, first image022"):
        configure(tmp_path / "captions.csv").build(seed=0).fit(responses, targets)
    with pytest.raises(ValueError, match=r"captioning needs captions; set encoder\.captions"):
        make_config(objectives=[{"kind": "captioning"}])
    encoder = make_config(epochs=1).build(seed=0).fit(responses, targets)
    with pytest.raises(DataError, match="without the objective captioning, so it writes no captions"):
        encoder.describe(responses)
