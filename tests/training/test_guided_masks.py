"""Masks that hide what matches the image or its text most."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.training.pretraining import Pretraining, open_material, pretrain
from braindecode_vis.training.pretraining_model import RIDGE, fit_match, rank_by_match, reduce_vectors
from tests.training.test_pretraining import CONFIG, change, make_responses

GUIDED = change(guide="target", n_epochs=1, mask_ratio=0.5)
TOLD = (3, 7)  # parcels that say what was seen


def make_task(n_test=0, known=30):
    """Trials of 30 images in which two of twelve parcels carry the image's vector, and vectors of the first `known`."""
    responses = make_responses(noise=1.0, n_test=n_test)
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    image = np.array([int(name[5:]) for name in responses.stimulus_ids])
    data = responses.data.copy()
    mixing = rng.normal(size=(4, len(TOLD) * data.shape[2])).astype(np.float32)
    data[:, TOLD] += 3 * (vectors[image] @ mixing).reshape(len(data), len(TOLD), -1)
    made = Responses(data, responses.dims, responses.trials, "z", responses.coords)
    return made, Embeddings(vectors[:known], np.array([f"image{i}" for i in range(known)], object), "toy")


def start(config, responses, guide, folder):
    return Pretraining(config, open_material(config, responses, 0), folder, 0, guide=guide)


def run(config, responses, guide, folder):
    (folder / "out").mkdir(parents=True)
    pretrain(config, responses, folder=folder / "out", checkpoints=folder / "state", seed=0, guide=guide)
    return (folder / "out" / "encoder.safetensors").read_bytes()


def test_the_match_equals_a_ridge_by_hand():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(40, 3, 2)) + 1, rng.normal(size=(40, 5))
    parts = [(torch.from_numpy(x[i : i + 16]), z[i : i + 16]) for i in range(0, 40, 16)]
    found = fit_match(parts, torch.device("cpu"))
    match = found.measure(torch.from_numpy(x).float(), torch.from_numpy(z).float()).numpy()
    for token in range(3):
        a, b = x[:, token] - x[:, token].mean(axis=0), z - z.mean(axis=0)
        weights = np.linalg.solve(a.T @ a + RIDGE * 40 * np.eye(2), a.T @ b)
        for trial in range(40):
            read = a[trial] @ weights
            expected = read @ z[trial] / np.linalg.norm(read) / np.linalg.norm(z[trial])
            assert match[trial, token] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("n_features", [6, 60])
def test_components_keep_the_products_of_vectors(n_features):
    vectors = np.random.default_rng(0).normal(size=(20, n_features))
    scores, centred = reduce_vectors(vectors, 100), vectors - vectors.mean(axis=0)
    np.testing.assert_allclose(scores @ scores.T, centred @ centred.T, atol=1e-4)
    assert reduce_vectors(vectors, 3).shape == (20, 3)
    with pytest.raises(DataError, match="all equal"):
        reduce_vectors(np.ones((5, 4)), 3)


def test_whole_parcels_and_times_go_together():
    match, ranks = torch.tensor([[0.1, 0.5, 0.4, 0.3]]), torch.tensor([[0.9, 0.1, 0.2, 0.3]])
    assert rank_by_match(match, ranks, 2, "tokens").argsort().tolist() == [[0, 3, 2, 1]]
    assert rank_by_match(match, ranks, 2, "parcels").argsort().tolist() == [
        [1, 0, 2, 3]
    ]  # means 0.3 and 0.35
    assert rank_by_match(match, ranks, 2, "times").argsort().tolist() == [[2, 0, 1, 3]]  # means 0.25 and 0.4


def test_what_says_most_is_hidden(tmp_path):
    """Two of twelve parcels carry the image: by lot half of their tokens are hidden, guided nearly all."""
    responses, guide = make_task()
    learning = start(GUIDED, responses, guide, tmp_path)
    rows, ranks = learning.material.train, learning._draw_ranks(len(learning.material.train))
    told = {
        p * learning.model.encoder.n_patches + t
        for p in TOLD
        for t in range(learning.model.encoder.n_patches)
    }

    def hide(guided):
        mask = learning._make_view(rows, ranks, guided)[1]
        return np.mean([len(told & set(row[mask.n_visible :].tolist())) for row in mask.order]) / len(told)

    assert hide(None) == pytest.approx(0.5, abs=0.1)
    assert hide(np.ones(len(rows), bool)) > 0.95
    some = np.arange(len(rows)) % 2 == 0
    assert 0.65 < hide(some) < 0.85


def test_a_guided_run_repeats_and_differs_from_one_by_lot(tmp_path):
    responses, guide = make_task()
    first = run(GUIDED, responses, guide, tmp_path / "a")
    assert run(GUIDED, responses, guide, tmp_path / "b") == first
    assert run(change(n_epochs=1, mask_ratio=0.5), responses, None, tmp_path / "c") != first
    assert CONFIG.hashed_fields() == change(guide=None).hashed_fields()
    assert "guide" not in CONFIG.hashed_fields()


def test_nothing_of_test_trials_or_their_images_is_looked_at(tmp_path):
    """The images of tested trials may have any vector."""
    (responses, guide), (poisoned, _) = make_task(n_test=20), make_task(n_test=20)
    poisoned.data[:20] = np.nan
    vectors = guide.vectors.copy()
    vectors[:10] = 1e6
    other = Embeddings(vectors, guide.ids, guide.space)
    assert run(GUIDED, responses, guide, tmp_path / "a") == run(GUIDED, poisoned, other, tmp_path / "b")


def test_trials_without_a_vector_keep_masks_by_lot(tmp_path):
    responses, guide = make_task(known=20)
    with pytest.warns(Notice, match=r"of 48 training trials .* at random"):
        learning = start(GUIDED, responses, guide, tmp_path)
    assert 0 < np.isnan(learning.seen[learning.material.train, 0]).sum() < 48
    learning.compute_loss(learning.material.train[:16], 0).backward()
    strangers = Embeddings(guide.vectors, np.array([f"x{i}" for i in range(20)], object), "toy")
    with pytest.raises(DataError, match="for any image of the training trials"):
        start(GUIDED, responses, strangers, tmp_path)


def test_bad_settings_are_refused(tmp_path):
    for fields, words in (
        ({"captions": "captions.csv"}, "guide is not captions"),
        ({"guide": "captions"}, "no file says them"),
        ({"guide": "target", "mask": "mixed"}, "set mask to one"),
        (
            {"guide": "target", "objectives": {"run_contrast": 1.0}, "normalisation": "auto"},
            "predicts no masked part",
        ),
        ({"guide": "target", "corpus": ["somewhere"]}, "have no image"),
    ):
        with pytest.raises(ValidationError, match=words):
            change(
                **{
                    **({"decoder_width": 128, "decoder_depth": 2, "held_out": 0.1}),
                    **fields,
                }
            )
    with pytest.raises(ConfigError, match="has no image vectors"):
        run(GUIDED, make_responses(), None, tmp_path)


def test_a_run_is_read_without_the_captions_that_guided_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "braindecode_vis.embeddings.sentence_encoder.find_sentence_folder", lambda *asked: tmp_path
    )
    monkeypatch.setattr(
        "braindecode_vis.embeddings.sentence_encoder.hash_sentence_encoder", lambda folder: ""
    )
    captions = tmp_path / "captions.csv"
    captions.write_text("id,caption\nimage0,a bird\n")
    config = change(guide="captions", captions=captions)
    first = config.hashed_fields()
    assert first["captions_digest"] == config.captions_digest
    assert "captions_digest" not in CONFIG.hashed_fields()
    captions.write_text("id,caption\nimage0,a key\n")
    assert change(guide="captions", captions=captions).hashed_fields() != first
    with pytest.raises(ValidationError, match="it is another file, or it changed"):
        type(config).model_validate(config.model_dump())
    captions.unlink()
    assert type(config).model_validate(config.model_dump()).hashed_fields() == first
