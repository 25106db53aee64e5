"""An encoder that learns sentences beside images predicts in the space of the sentence encoder."""

from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.roles import complete
from braindecode_vis.embeddings.sentence_encoder import name_sentence_space
from braindecode_vis.training import descriptions
from tests.training.test_descriptions import write_table
from tests.training.toy_task import make_config, make_task

SIZE = 6


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Return settings whose sentences are a linear map of the images, and the vectors of their texts."""
    responses, targets = make_task(n_images=40, noise=0.3)
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ids, first = np.unique(targets.ids.astype(str), return_index=True)
    mixing = np.random.default_rng(3).normal(size=(targets.vectors.shape[1], SIZE))
    vectors = dict(zip(ids, targets.vectors[first] @ mixing, strict=True))
    encoder = SimpleNamespace(encode=lambda texts: np.array([vectors[t] for t in texts], np.float32))
    monkeypatch.setattr(descriptions, "make_sentence_encoder", lambda config: encoder)
    captions = write_table(tmp_path / "captions.csv", ["id", "caption"], [(i, i) for i in ids])
    settings = {"captions": captions, "sentence_encoder": folder, "epochs": 12, "optimiser": {"lr": 1e-2}}
    return responses, targets, settings, vectors


@pytest.mark.parametrize("options", [{}, {"form": "margin"}, {"passes": "halves"}])
def test_new_trials_find_their_sentence(said, options, tmp_path):
    responses, targets, settings, vectors = said
    config = make_config(
        objectives=[{"kind": "clip"}, {"kind": "sentence_contrast", "weight": 1, **options}], **settings
    )
    encoder = config.build(seed=0).fit(responses, targets)
    new, _ = make_task(n_images=40, noise=0.3)
    predicted = encoder.predict_sentences(new)
    assert predicted.space == name_sentence_space(settings["sentence_encoder"]) == config.sentence_space
    assert predicted.space.startswith("sentences/weights=")
    gallery = np.stack(list(vectors.values()))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    nearest = np.argmax(predicted.vectors @ gallery.T, axis=1)
    found = np.mean(np.array(list(vectors))[nearest] == predicted.ids.astype(str))
    assert found > 0.15  # chance 0.025
    (tmp_path / "fit").mkdir()
    encoder.write(tmp_path / "fit")
    again = config.read(tmp_path / "fit").predict_sentences(new)
    np.testing.assert_array_equal(again.vectors, predicted.vectors)
    assert again.space == predicted.space


def test_without_the_objective_there_are_no_sentences(said):
    responses, targets, settings, _ = said
    encoder = make_config(epochs=1).build(seed=0).fit(responses, targets)
    assert encoder.predict_sentences(responses) is None
    bare = SimpleNamespace(fit=None, predict=None, write=None, read=None)
    assert complete(BrainEncoder, bare).predict_sentences(responses) is None
    for fields, words in (
        ({"objectives": [{"kind": "sentence_contrast"}], "sentence_encoder": "minilm"}, "needs captions"),
        (
            {"objectives": [{"kind": "sentence_contrast"}], "captions": settings["captions"]},
            "needs sentence_encoder",
        ),
    ):
        with pytest.raises(ValidationError, match=words):
            make_config(**fields)


def test_a_small_weight_leaves_the_rest_nearly_as_it_was(said):
    """Other weights start from the same draws: the head has one of its own."""
    responses, targets, settings, _ = said
    settings["epochs"] = 1
    kinds = [{"kind": "clip"}]
    plain = (
        make_config(objectives=kinds, epochs=1, optimiser={"lr": 1e-2}).build(seed=0).fit(responses, targets)
    )
    small = {"kind": "sentence_contrast", "weight": 1e-9}
    beside = make_config(objectives=[*kinds, small], **settings).build(seed=0).fit(responses, targets)
    np.testing.assert_allclose(beside.predict(responses).vectors, plain.predict(responses).vectors, atol=2e-3)
