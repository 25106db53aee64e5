"""Descriptions: what files say, and what a regression makes of them, against an independent one."""

import numpy as np
import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.embeddings.image_descriptions import (
    DescriptionsConfig,
    describe_captions,
    fit_ridge,
    learn_texts,
    open_reader,
    pick_descriptions,
    read_captions_or_attributes,
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_files_of_captions_and_of_attributes_are_told_apart(tmp_path):
    captions = write(tmp_path / "captions.csv", 'id,caption\na,A red cat\na,"a cat, red"\nb,a dog\n')
    known = read_captions_or_attributes(captions, {})
    assert known["a"].texts == ("A red cat", "a cat, red")
    assert known["a"].words[0] == {"a", "red", "cat"}
    assert known["a"] == describe_captions(["A red cat", "a cat, red"])
    for encoding in ("utf-8-sig", "utf-16"):  # as spreadsheets save them, with a mark before the first name
        captions.write_text("caption,id\na cat,a\n", encoding=encoding)
        assert read_captions_or_attributes(captions, {}) == {"a": describe_captions(["a cat"])}
    by_id = write(tmp_path / "attributes.csv", "id,shape,colour\na,letter_e,red\nb,dog,\nc,,\n")
    found = read_captions_or_attributes(by_id, {})
    assert found["a"].texts == ("shape letter e, colour red",)
    assert found["b"].words == (frozenset({"shape=dog"}),)
    assert "c" not in found  # of which nothing is known
    by_concept = write(tmp_path / "concepts.csv", "concept,animacy\ncat,alive\n")
    assert set(read_captions_or_attributes(by_concept, {"a": "cat", "b": "stone"})) == {"a"}
    with pytest.raises(DataError, match=r"describes 1 of 2 tested images, and not 'z'"):
        pick_descriptions(known, ["a", "z"], path=captions, what="tested images")
    with pytest.raises(DataError, match="is missing an id or a caption in line 3"):
        DescriptionsConfig(captions=write(tmp_path / "empty.csv", "id,caption\na,a cat\nb,\n")).check_files()
    with pytest.raises(ValueError, match="captions or attributes; name one"):
        DescriptionsConfig(captions=captions, attributes=by_id)
    one, other = (DescriptionsConfig(captions=captions, encoder=e).hashed_fields() for e in (None, "words"))
    assert one != other
    assert one["captions_digest"] == other["captions_digest"]


def solve(features, vectors, asked, alpha):
    middle, mean = features.mean(axis=0), vectors.mean(axis=0)
    centred = features - middle
    weights = np.linalg.solve(
        centred.T @ centred + alpha * np.eye(features.shape[1]), centred.T @ (vectors - mean)
    )
    return mean + (asked - middle) @ weights


def test_the_penalty_is_that_of_leaving_out_one_row_after_the_other():
    """Against normal equations, which are solved anew without each row."""
    rng = np.random.default_rng(0)
    features, noise = rng.random((14, 5)), rng.normal(size=(14, 3))
    vectors = features @ rng.normal(size=(5, 3)) + 0.3 * noise
    errors = {}
    for alpha in np.geomspace(0.01, 1000, 16):
        left_out = [
            solve(np.delete(features, n, 0), np.delete(vectors, n, 0), features[n], alpha) for n in range(14)
        ]
        errors[alpha] = np.square(np.array(left_out) - vectors).mean()
    asked = rng.random((4, 5))
    wanted = solve(features, vectors, asked, min(errors, key=errors.get))
    np.testing.assert_allclose(fit_ridge(features, vectors)(asked), wanted, atol=1e-5)


def test_words_of_training_images_place_descriptions_of_others():
    rng = np.random.default_rng(0)
    meaning = {name: rng.normal(size=(2, 4)) for name in ("red", "blue", "cat", "dog", "on", "off")}
    texts = [
        f"{colour} {thing} {way}"
        for colour in ("red", "blue")
        for thing in ("cat", "dog")
        for way in ("on", "off")
    ]
    vectors = np.stack([sum(meaning[word] for word in text.split()) for text in texts])
    learnt = [describe_captions([text]) for text in texts]
    rows = [0, 1, 2, 4, 5, 6, 7]  # "red dog off" was never shown
    kept = [learnt[n] for n in rows]
    embed = learn_texts(kept, vectors[rows], open_reader("words", kept))
    made = embed([learnt[3]])
    assert made.shape == (1, 2, 4)
    distance = np.square(vectors - made).sum(axis=(1, 2))
    assert distance.argmin() == 3
    # An image that is there ten times more does not weigh more than another description.
    again = learn_texts(
        [*kept, *[kept[0]] * 9], np.concatenate([vectors[rows], vectors[[0] * 9]]), open_reader("words", kept)
    )
    np.testing.assert_allclose(again([learnt[3]]), made, atol=1e-6)
    with pytest.raises(DataError, match=r"1 of 2 descriptions share no word .* first 'eine Katze'.* minilm"):
        embed([learnt[0], describe_captions(["eine Katze"])])
