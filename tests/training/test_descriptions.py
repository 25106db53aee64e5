"""What files say of the images: words, attributes, sentences and concepts of a batch, and what a fit keeps of them."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from braindecode_vis.checks import DataError, Notice
from braindecode_vis.embeddings.captions import END, PAD, START
from braindecode_vis.training import descriptions
from braindecode_vis.training.batches import code_trials
from braindecode_vis.training.descriptions import Lexicon, describe_images
from tests.training.toy_task import make_task


def write_table(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def ask(tmp_path, *needs, captions=(), attributes=(), key="id"):
    """Return settings that name two files."""
    return SimpleNamespace(
        needs=frozenset(needs),
        captions=write_table(tmp_path / "captions.csv", ["id", "caption"], captions),
        attributes=write_table(tmp_path / "attributes.csv", [key, "colour", "place"], attributes),
        sentence_encoder=tmp_path, device="cpu",
    )  # fmt: skip


CAPTIONS = [
    ("image000", "a red star"),
    ("image000", "one star"),
    ("image001", "a blue box, here"),
    ("image002", "green"),
]


def test_words_are_those_of_images_that_are_learnt_from(tmp_path):
    responses, _ = make_task(n_images=3)
    found = describe_images(ask(tmp_path, "words", captions=CAPTIONS), responses, np.arange(4))
    vocabulary = found.lexicon.vocabulary
    assert vocabulary[:3] == ("<pad>", "<start>", "<end>")
    assert vocabulary[3:] == tuple(sorted(["a", "red", "star", "one", "blue", "box", ",", "here"]))
    assert (found.sizes.n_words, found.sizes.max_words) == (11, 7)

    def read(row):
        return [vocabulary[n] for n in found.words[row] if n not in (PAD, START, END)]

    assert [read(row) for row in range(4)] == [
        ["a", "red", "star"], ["one", "star"], ["a", "blue", "box", ",", "here"], [],
    ]  # fmt: skip
    assert found.words[3].tolist() == [START, END, PAD, PAD, PAD, PAD, PAD]
    rng = np.random.default_rng(0)
    drawn = {int(found.draw_captions(np.array([0]), rng)[0]) for _ in range(20)}
    assert drawn == {0, 1}
    assert found.draw_captions(np.array([0, 2]), None).tolist() == [0, 3]


def test_numbers_of_an_earlier_fit_stay(tmp_path):
    responses, _ = make_task(n_images=3)
    lexicon = Lexicon(
        ("<pad>", "<start>", "<end>", "star", "green"), {"place": ("sea", "wood")}, ("concept1",)
    )
    config = ask(
        tmp_path, "words", "attributes", "concepts", captions=CAPTIONS,
        attributes=[("image000", "red", "wood"), ("image002", "", "moon")],
    )  # fmt: skip
    found = describe_images(config, responses, np.arange(6), lexicon=lexicon)
    assert found.lexicon == lexicon
    assert found.words[:, 1].tolist() == [3, 3, END, 4]
    assert found.tables["attributes"].tolist() == [[1], [-1], [-1]]
    assert found.concepts.tolist() == [1, 1, 1, 1, 0, 0]  # a new concept stands behind the known ones
    assert Lexicon.from_json(lexicon.as_json()) == lexicon


def test_attributes_by_id_and_by_concept(tmp_path):
    """A value that only a held-out image has is unknown: no weight is made for it."""
    responses, _ = make_task(n_images=4)
    rows = [("image000", "red", "sea"), ("image001", "blue", ""), ("image003", "green", "sea")]
    found = describe_images(ask(tmp_path, "attributes", attributes=rows), responses, np.arange(6))
    assert found.lexicon.attributes == {"colour": ("blue", "red"), "place": ("sea",)}
    assert found.tables["attributes"].tolist() == [[1, 0], [0, -1], [-1, -1], [-1, 0]]
    assert found.sizes.attribute_values == (2, 1)
    rows = [("concept0", "red", "sea"), ("concept1", "blue", "")]
    found = describe_images(
        ask(tmp_path, "attributes", attributes=rows, key="concept"), responses, np.arange(8)
    )
    assert found.tables["attributes"].tolist() == [[1, 0], [1, 0], [0, -1], [0, -1]]


def test_sentences_are_means_over_captions_in_the_order_of_images(tmp_path, monkeypatch):
    responses, _ = make_task(n_images=3)
    config = ask(tmp_path, "sentences", captions=CAPTIONS)
    encoder = SimpleNamespace(encode=lambda texts: np.array([[len(t), 1.0] for t in texts], dtype=np.float32))
    monkeypatch.setattr(descriptions, "make_sentence_encoder", lambda config: encoder)
    found = describe_images(config, responses, np.arange(6))
    expected = np.array([[9.0, 1], [16, 1], [5, 1]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.tables["sentences"], expected, rtol=1e-6)
    assert found.sizes.n_sentence == 2


def test_bad_files_are_told_in_one_sentence(tmp_path):
    responses, _ = make_task(n_images=3)
    with pytest.raises(DataError, match="no caption of 1 of 3 training images, first image002"):
        describe_images(ask(tmp_path, "words", captions=CAPTIONS[:3]), responses, np.arange(6))
    config = ask(tmp_path, "attributes", attributes=[("other", "red", "sea")])
    with pytest.raises(DataError, match="know none of the 3 images"):
        describe_images(config, responses, np.arange(6))
    long = [(name, "word " * 70) for name, _ in CAPTIONS]
    with pytest.warns(Notice, match="up to 70 words and signs and are cut to 62"):
        found = describe_images(ask(tmp_path, "words", captions=long), responses, np.arange(6))
    assert found.words.shape == (4, 64)
    assert (found.words[:, -1] == END).all()


def test_ids_of_tables_are_those_of_batches():
    responses, _ = make_task(n_images=3)
    assert [str(i) for i in code_trials(responses)[0]] == descriptions._find_images(responses)[0]
