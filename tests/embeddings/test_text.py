import json

import numpy as np
import pytest
import torch

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.embeddings.openclip import OpenClipConfig, read_description
from braindecode_vis.embeddings.text import (
    ClipText,
    TextConfig,
    check_tokenizer,
    embed_text,
    make_tokenizer,
    name_concept,
)
from braindecode_vis.retrieval import compute_ranks

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 64, "image_size": 64},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2},
}
CONFIG = OpenClipConfig(architecture="ViT-B-32", weights="random", model_args=TINY)


def test_text_agrees_with_the_library(tmp_path):
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model("ViT-B-32", **read_description(CONFIG)).eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tower = ClipText(OpenClipConfig(architecture="ViT-B-32", weights=tmp_path / "clip.pt", model_args=TINY))
    texts = ["a photo of a cat", "coat rack"]
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts)
    with torch.inference_mode():
        expected = model.encode_text(tokens).numpy()
    np.testing.assert_allclose(tower.encode(texts), expected, rtol=1e-5, atol=1e-6)


def test_concepts_become_a_gallery_in_the_space_of_the_images():
    concepts = ["cat", "coat_rack", "bat1"]
    templates = ("This is a photo of a {concept}.", "a sketch of a {concept}")
    gallery = embed_text(concepts, CONFIG, templates=templates)
    assert gallery.space == CONFIG.build().space
    np.testing.assert_allclose(np.linalg.norm(gallery.vectors, axis=1), 1, atol=1e-6)
    tower = ClipText(CONFIG)
    each = [tower.encode([t.format(concept="coat rack")])[0] for t in templates]
    mean = sum(v / np.linalg.norm(v) for v in each)
    np.testing.assert_allclose(gallery.vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert compute_ranks(gallery, gallery).ranks.tolist() == [1, 1, 1]


def test_text_does_not_meet_a_middle_layer():
    middle = CONFIG.model_copy(update={"layer": 1, "pooling": "mean"})
    with pytest.raises(ConfigError, match="text meets images only at the network's own output"):
        embed_text(["cat"], middle)


def test_wrong_prompts_are_named():
    with pytest.raises(ConfigError, match="has no place for the concept"):
        embed_text(["cat"], CONFIG, templates=("a photo",))
    with pytest.raises(ConfigError, match="at least one template"):
        embed_text(["cat"], CONFIG, templates=())
    with pytest.raises(DataError, match="must be unique"):
        embed_text(["cat", "cat"], CONFIG)
    assert [name_concept(c) for c in ("bat2", "ice_cream", "7")] == ["bat", "ice cream", "7"]


def test_a_tokenizer_of_the_hub_is_asked_for_by_name():
    siglip = OpenClipConfig(architecture="ViT-B-16-SigLIP", weights="random")
    with pytest.raises(ConfigError, match=r"tokenizer timm/ViT-B-16-SigLIP of the hub: bring its folder"):
        make_tokenizer(siglip, TextConfig())
    foreign = OpenClipConfig(architecture="roberta-ViT-B-32", weights="random")
    with pytest.raises(ConfigError, match="roberta-base of the hub"):
        ClipText(foreign).encode(["x"])


def test_a_tokenizer_without_its_vocabulary_is_found_out(tmp_path):
    """CLIPTokenizer loads from a folder that holds only its settings, knows two words and says nothing."""
    from transformers import CLIPTokenizer

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    silent = CLIPTokenizer.from_pretrained(tmp_path)

    def tokenize(texts):
        rows = silent(texts, padding="max_length", truncation=True, max_length=16)["input_ids"]
        return torch.tensor(rows)

    assert len(silent) < 5
    with pytest.raises(DataError, match=r"has no vocabulary: 3 different sentences become"):
        check_tokenizer(tokenize, str(tmp_path))


def test_the_bundled_tokenizer_passes():
    check_tokenizer(make_tokenizer(CONFIG, TextConfig()), "the bundled one")
