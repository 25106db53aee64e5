"""Caption metrics equal hand counts and slow definitions; sentence encoders run from local folders."""

import itertools

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.caption_scores import CaptionNull, score_captions
from braindecode_vis.scoring.metrics import caption_metrics
from tests.embeddings.test_caption_bank import WORDS, write_vocabulary


def slow_rouge_l(reference, candidate):
    left, right = caption_metrics.tokenize(reference), caption_metrics.tokenize(candidate)
    common = max(
        (size for size in range(len(left) + 1) for chosen in itertools.combinations(left, size)
         if any(chosen == other for other in itertools.combinations(right, size))),
        default=0,
    )  # fmt: skip
    return 0.0 if not common else 2 * common / (len(left) + len(right))


def test_words_in_common_equal_slow_definitions():
    rng = np.random.default_rng(0)
    for _ in range(60):
        left, right = (" ".join(rng.choice(WORDS[:5], rng.integers(1, 8))) for _ in range(2))
        assert caption_metrics.rouge_l(left, right) == pytest.approx(slow_rouge_l(left, right))
        a, b = caption_metrics.tokenize(left), caption_metrics.tokenize(right)
        common = sum(min(a.count(w), b.count(w)) for w in set(a))
        assert caption_metrics.rouge_1(left, right) == pytest.approx(2 * common / (len(a) + len(b)))
        n_matches, n_chunks = caption_metrics._match_runs(a, b)
        assert n_matches == common
        assert n_chunks >= min_chunks(a, b)
    assert (
        caption_metrics.rouge_1("a", "b")
        == caption_metrics.rouge_l("", "b")
        == caption_metrics.meteor_exact("a", "")
        == 0
    )


def min_chunks(left, right):
    """Return the fewest chunks over all alignments with as many matches as possible."""
    options = [[None, *[i for i, w in enumerate(left) if w == word]] for word in right]
    best = (0, 0)
    for choice in itertools.product(*options):
        used = [i for i in choice if i is not None]
        if len(set(used)) < len(used):
            continue
        places = [(i, j) for j, i in enumerate(choice) if i is not None]
        breaks = sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in itertools.pairwise(places))
        best = min(best, (-len(used), breaks + bool(places)))
    return best[1]


def test_meteor_equals_a_hand_count():
    # Five of six words match in two chunks ("on the mat", "the cat"): P = R = 5/6.
    value = caption_metrics.meteor_exact("the cat sat on the mat", "on the mat lay the cat")
    assert value == pytest.approx(5 / 6 * (1 - 0.5 * (2 / 5) ** 3))
    # Two of three candidate words, two of four reference words, one chunk: R weighs nine times P.
    precision, recall = 2 / 3, 2 / 4
    mean = 10 * precision * recall / (recall + 9 * precision)
    assert caption_metrics.meteor_exact("a red car drives", "a red bus") == pytest.approx(
        mean * (1 - 0.5 / 8)
    )


def test_the_best_reference_counts_and_chance_is_the_next_stimulus():
    references = [["a dog", "the cat"], ["a red car"]]
    values = caption_metrics.compute_caption_metrics(references, ["the cat", "a car"])
    assert values["rouge1"].tolist() == [1.0, pytest.approx(0.8)]
    rows = score_captions(
        references, ["the cat", "a car"], ["s1", "s2"], method="decoded", protocol="p", subject="1", split="test",
        seed=0, n_boot=100,
    )  # fmt: skip
    assert {row.metric for row in rows} == {"rouge1", "rougeL", "meteor_exact"}
    assert rows[0].chance == pytest.approx((caption_metrics.rouge_1("a red car", "the cat") + 0.5) / 2)
    with pytest.raises(DataError, match="every item needs at least one"):
        caption_metrics.compute_caption_metrics([["a"], []], ["a", "b"])


def test_chance_of_two_stimuli_is_that_of_their_permutations():
    """Half of all permutations of two leave both where they are, so that p is a half at best."""
    references, found = [["the cat"], ["a red car"]], ["the cat", "a car"]
    pairs = [[caption_metrics.compute_caption_metrics([own], [text]) for own in references] for text in found]
    tables = {name: np.array([[pair[name][0] for pair in row] for row in pairs]) for name in pairs[0][0]}
    rows = score_captions(
        references, found, ["s1", "s2"], method="decoded", protocol="p", subject="1", split="test", seed=0, n_boot=100,
        null=CaptionNull(tables, np.arange(2), n_permutations=2000),
    )  # fmt: skip
    for row in rows:
        table = tables[row.metric]
        swapped = (table[0, 1] + table[1, 0]) / 2
        assert row.value == pytest.approx(np.trace(table) / 2)
        assert row.p_value == pytest.approx(0.5, abs=0.05)
        assert row.chance == pytest.approx((row.value + swapped) / 2, abs=0.03)


def test_stimuli_are_permuted_within_their_block(tmp_path):
    """Large tables hold the pairs within a block only; whatever is elsewhere must not enter chance."""
    references, found = [["a"], ["b"], ["c"], ["d"]], ["a", "x", "c", "y"]
    table = np.full((4, 4), 99.0)
    table[:2, :2], table[2:, 2:] = [[1, 0], [0.5, 0]], [[1, 0.25], [0.5, 0]]
    tables = dict.fromkeys(caption_metrics.compute_caption_metrics(references, found), table)
    rows = score_captions(
        references, found, list("abcd"), method="decoded", protocol="p", subject="1", split="test", seed=0, n_boot=100,
        null=CaptionNull(tables, np.arange(4), np.array([0, 0, 1, 1]), n_permutations=2000),
    )  # fmt: skip
    others = (0 + 0.5 + 0.25 + 0.5) / 4
    for row in rows:  # of all four, each stays where it is in a quarter of all permutations
        assert row.chance == pytest.approx(np.trace(table) / 16 + 0.75 * others)


def test_a_damaged_sentence_encoder_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be read .*; copy the whole folder again"):
        caption_metrics.SentenceEncoder(tmp_path, device="cpu").encode(["a"])


def test_sentences_are_means_over_real_tokens(tmp_path):
    from transformers import BertConfig, BertModel

    folder = tmp_path / "minilm"
    tokenizer, n_words = write_vocabulary(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=n_words, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=16)
        ).eval()  # fmt: skip
    model.save_pretrained(folder)
    texts = ["a cat", "the dog on the red grass", "cars"]
    found = caption_metrics.SentenceEncoder(folder, batch_size=2, device="cpu").encode(texts)
    for text, row in zip(texts, found, strict=True):
        with torch.inference_mode():  # alone, a sentence has no padding
            states = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(dim=0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    encoder = caption_metrics.SentenceEncoder(folder, device="cpu")
    values = caption_metrics.compute_caption_metrics(
        [["a cat", "cars"]] * 2, ["cars", "a cat"], encoder=encoder
    )
    np.testing.assert_allclose(values["sentence_similarity"], 1, atol=1e-6)
    with pytest.raises(DataError, match="holds no sentence encoder"):
        caption_metrics.SentenceEncoder(tmp_path).encode(["a"])


class Letters(caption_metrics.SentenceEncoder):
    """A sentence encoder without a network: unit counts of letters."""

    def __init__(self):
        pass

    def encode(self, texts):
        counts = np.array([[text.count(letter) for letter in "abcdeghorst"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_tables_hold_the_metric_of_every_pair():
    references = [["a cat", "a red car"], ["the dog"], ["grass on the car", "a dog", "the grass"]]
    candidates = ["a red cat", "the dog", "the dog", "grass"]
    tables = caption_metrics.tabulate_captions(references, candidates, encoder=Letters())
    for column, several in enumerate(references):
        own = caption_metrics.compute_caption_metrics([several] * 4, candidates, encoder=Letters())
        assert set(own) == set(tables)
        for name, values in own.items():
            np.testing.assert_allclose(tables[name][:, column], values, err_msg=name)
    wanted = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], bool)
    some = caption_metrics.tabulate_captions(references, candidates, wanted=wanted)
    np.testing.assert_array_equal(some["rouge1"][wanted], tables["rouge1"][wanted])
    assert some["rouge1"][0, 1] == some["rouge1"][3, 0] == 0
