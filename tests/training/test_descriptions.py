"""What files say of the images: words, attributes, sentences and concepts of a batch, and what a fit keeps of them."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.digests import hash_once
from braindecode_vis.embeddings.caption_bank import END, PAD, START
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training import descriptions
from braindecode_vis.training.batches import code_trials, pair_neighbours
from braindecode_vis.training.descriptions import Lexicon, check_text_targets, describe_images
from braindecode_vis.training.objectives.objectives_config import CompositionObjectiveConfig
from tests.training.toy_task import assert_same_weights, make_config, make_task


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
    with pytest.raises(DataError, match="no caption for 1 of 3 training images, first image002"):
        describe_images(ask(tmp_path, "words", captions=CAPTIONS[:3]), responses, np.arange(6))
    config = ask(tmp_path, "attributes", attributes=[("other", "red", "sea")])
    with pytest.raises(DataError, match="have none of the 3 images"):
        describe_images(config, responses, np.arange(6))
    long = [(name, "word " * 70) for name, _ in CAPTIONS]
    with pytest.warns(Notice, match="up to 70 words and signs and are cut to 62"):
        found = describe_images(ask(tmp_path, "words", captions=long), responses, np.arange(6))
    assert found.words.shape == (4, 64)
    assert (found.words[:, -1] == END).all()


def make_settings(tmp_path, **settings):
    rows = [(f"image{i:03d}", ("red", "blue", "")[i % 3], ("sea", "wood")[i // 4 % 2]) for i in range(24)]
    table = write_table(tmp_path / "attributes.csv", ["id", "colour", "place"], rows)
    return make_config(
        objectives=[{"kind": "clip"}] + [{"kind": "hydra", **o} for o in HYDRAS],
        attributes=table, epochs=2, batch_size=8, **settings,
    )  # fmt: skip


HYDRAS = ({}, {"classes": "attributes", "partner": "identical"})


def test_a_fit_keeps_weights_of_objectives_with_their_sizes_and_names(tmp_path):
    """Written, read and adapted to a new subject: gates come back for the concepts that they were learnt for."""
    responses, targets = make_task()
    config = make_settings(tmp_path, ema=0.9, selection={"kind": "last", "hold_out": 0.2})
    encoder = config.build(seed=0)
    encoder.fit(responses, targets)
    fit = encoder.fitted
    assert fit.attributes == {"colour": ("blue", "red"), "place": ("sea", "wood")}
    assert (fit.model.sizes.n_concepts, len(fit.lexicon.concepts)) == (10, 10)  # two of twelve are held out
    assert "validation_loss" in fit.history[-1]
    encoder.write(tmp_path)
    again = config.read(tmp_path)
    assert_same_weights(encoder, again)
    assert again.fitted.lexicon == fit.lexicon
    assert again.fitted.model.sizes == fit.model.sizes
    rows = encoder.hold_out(responses, np.arange(responses.n_trials))
    score = again.score_held_out(responses, targets, rows=rows, progress=1.0)
    assert score["validation_loss"] == pytest.approx(fit.history[-1]["validation_loss"], rel=1e-5)
    few, few_targets = make_task(n_images=8, subjects=("02",))
    other = again.adapt(few, few_targets, epochs=1)
    assert other.fitted.lexicon == fit.lexicon
    assert other.fitted.model.sizes == fit.model.sizes


def test_weights_of_objectives_are_drawn_apart_and_resumed(tmp_path, monkeypatch):
    responses, targets = make_task()
    config = make_settings(tmp_path, checkpoint_seconds=0, out_of_fold=2)
    plain = make_config(epochs=2, batch_size=8).build(seed=0)
    whole = config.build(seed=0)
    start = get_initial(whole, responses, targets)
    assert all((start[name] == value).all() for name, value in get_initial(plain, responses, targets).items())
    whole.fit(responses, targets)
    stopped = config.build(seed=0)
    stopped.workspace = tmp_path / "work"

    def stop(done, total, text):
        if done == 4:
            raise KeyboardInterrupt

    stopped.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(responses, targets)
    stopped.progress = None
    assert_same_weights(whole, stopped.fit(responses, targets))
    predicted = whole.predict_out_of_fold(responses, targets)
    assert np.isfinite(predicted.vectors).all()
    assert len(predicted) == responses.n_trials


def get_initial(encoder, responses, targets):
    rows = np.arange(responses.n_trials)
    encoder._descriptions = describe_images(encoder.config, responses, rows)
    model = encoder.build_model(describe_signal(responses), targets, rows)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_files_are_asked_for_where_an_objective_reads_them_and_only_there(tmp_path):
    table = write_table(tmp_path / "attributes.csv", ["id", "colour"], [("image000", "red")])
    hydra = [{"kind": "hydra", "classes": "attributes"}]
    with pytest.raises(
        ValidationError, match=r"the objective hydra needs attributes; set encoder\.attributes"
    ):
        make_config(objectives=hydra)
    # A sweep over objectives names its tables once, and stopped at the first run that read none.
    with pytest.warns(Notice, match=r"no objective uses encoder\.attributes, so it is ignored"):
        unread = make_config(attributes=table)
    assert unread == make_config()
    assert unread.hashed_fields() == make_config().hashed_fields()
    config = make_config(objectives=hydra, attributes=table)
    first = config.hashed_fields()
    assert not {"attributes", "captions_digest"} & first.keys()
    write_table(table, ["id", "colour"], [("image000", "blue")])
    assert make_config(objectives=hydra, attributes=table).attributes_digest != config.attributes_digest
    with pytest.raises(ValidationError, match="it is another file, or it changed"):
        make_config(**config.model_dump())
    table.unlink()  # what was fitted from it is read without it
    again = make_config(**config.model_dump())
    again.check_files()
    assert again.hashed_fields() == first
    with pytest.raises(DataError, match="table of attributes"):
        again.build(seed=0).fit(*make_task())
    with pytest.raises(DataError, match=r"encoder\.attributes"):
        make_config(objectives=hydra, attributes=table).check_files()


def test_ids_of_tables_are_those_of_batches():
    responses, _ = make_task(n_images=3)
    assert [str(i) for i in code_trials(responses)[0]] == descriptions._find_images(responses)[0]


def ask_swaps(tmp_path, monkeypatch, captions, **options):
    """Return settings of an objective that needs swapped captions, whose vectors count words and their order."""
    words = sorted({word for _, text in captions for word in text.replace("an ", "a ").split()})

    def encode(texts):
        rows = np.full((len(texts), len(words)), 0.1, dtype=np.float32)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.replace("an ", "a ").split()):
                rows[row, words.index(word)] += 1 + 0.01 * place
        return rows

    monkeypatch.setattr(descriptions, "make_sentence_encoder", lambda config: SimpleNamespace(encode=encode))
    objective = CompositionObjectiveConfig(**options)
    config = ask(tmp_path, *objective.needs, captions=captions)
    config.objectives = [objective]
    return config


BOUND = [
    ("image000", "a red cube on a blue wall"),
    ("image001", "a green star"),
    ("image002", "a blue cube on a red wall"),
    ("image003", "a green star on a blue wall"),
]


def test_swapped_captions_and_images_of_the_same_parts(tmp_path, monkeypatch):
    responses, targets = make_task(n_images=4)
    config = ask_swaps(tmp_path, monkeypatch, BOUND)
    with pytest.warns(
        Notice, match="1 of 4 training images have captions without words that can be exchanged"
    ):
        found = describe_images(config, responses, np.arange(8))
    assert found.tables["swapped_known"].tolist() == [
        [True, True],
        [False, False],
        [True, True],
        [True, True],
    ]
    # The first swapped caption of each image of the pair is the true one of the other.
    np.testing.assert_allclose(found.tables["swapped"][0, 0], found.tables["sentences"][2], atol=1e-6)
    assert found.neighbours.tolist() == [2, 3, 0, 1]
    order = pair_neighbours(np.array([5, 0, 3, 1, 2, 4]), np.array([0, 0, 1, 2, 2, 3]), found.neighbours)
    assert order.tolist() == [5, 2, 0, 3, 1, 4]

    check_text_targets(found, config, targets)  # sentences: any target will do
    config.objectives = [CompositionObjectiveConfig(space="target")]
    with pytest.raises(DataError, match=r"takes the targets for sentence vectors .* but toy holds others"):
        check_text_targets(found, config, targets)
    config.objectives.append(CompositionObjectiveConfig(words="attributes"))
    with pytest.raises(ConfigError, match="have different words or space"):
        describe_images(config, responses, np.arange(8))


def test_captions_in_which_nothing_can_change_places_are_refused(tmp_path, monkeypatch):
    responses, _ = make_task(n_images=2)
    captions = [("image000", "un chat rouge"), ("image001", "un chien bleu")]
    config = ask_swaps(tmp_path, monkeypatch, captions)
    with pytest.raises(DataError, match=r"no caption of the 2 training images .* 'un chat rouge'"):
        describe_images(config, responses, np.arange(4))


def test_words_that_change_places_may_be_values_of_attributes(tmp_path, monkeypatch):
    responses, _ = make_task(n_images=2)
    captions = [("image000", "an ink box before moss"), ("image001", "a moss box before ink")]
    config = ask_swaps(tmp_path, monkeypatch, captions, words="attributes")
    write_table(
        config.attributes,
        ["id", "colour", "place"],
        [("image000", "ink", "sea"), ("image001", "moss", "sea")],
    )
    found = describe_images(config, responses, np.arange(4))
    assert found.tables["swapped_known"].tolist() == [[True], [True]]
    np.testing.assert_allclose(found.tables["swapped"][:, 0], found.tables["sentences"][[1, 0]], atol=1e-6)
    assert found.lexicon.attributes["colour"] == ("ink", "moss")


def test_digests_are_those_of_the_files_that_are_read(tmp_path, monkeypatch):
    """A path is taken from the folder of the configuration, where another file may lie than where it was read."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, colour in ((here, "red"), (there, "blue")):
        folder.mkdir()
        write_table(folder / "attributes.csv", ["id", "colour"], [("image000", colour)])
    monkeypatch.chdir(here)
    hydra = [{"kind": "hydra", "classes": "attributes"}]
    read = make_config(objectives=hydra, attributes="attributes.csv")
    moved = read.replace_paths(lambda path: there / path)
    assert moved.attributes_digest == hash_once(there / "attributes.csv") != read.attributes_digest
    with pytest.raises(ConfigError, match="it is another file, or it changed"):
        make_config(**read.model_dump()).replace_paths(lambda path: there / path)
    (here / "attributes.csv").unlink()
    assert make_config(objectives=hydra, attributes="attributes.csv").attributes_digest is None
