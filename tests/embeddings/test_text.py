import json

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.openclip import OpenClipConfig, read_description
from braindecode_vis.embeddings.text import (
    ClipText,
    ClipTextConfig,
    TextConfig,
    check_tokenizer,
    embed_text,
    make_tokenizer,
    name_concept,
    open_clip_texts,
)
from braindecode_vis.scoring.retrieval import compute_ranks

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
    with pytest.raises(ConfigError, match="text and images can be compared only at the network's own output"):
        embed_text(["cat"], middle)
    assert open_clip_texts(middle) is None
    assert open_clip_texts(CONFIG).space == CONFIG.build().space


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
    with pytest.raises(ConfigError, match=r"tokenizer timm/ViT-B-16-SigLIP of the hub: use its folder"):
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


# --- tokens as a target -------------------------------------------------------------------------------------

QUICK = OpenClipConfig(architecture="ViT-B-32-quickgelu", weights="random", model_args=TINY, device="cpu")


def make_stimuli(ids=("a", "b", "c"), concepts=("cat", "coat_rack", "bat1")):
    images = np.zeros((len(ids), 8, 8, 3), np.uint8)
    return StimulusSet.from_pixels(images, list(ids), list(concepts))


def write_bank(path, rows):
    path.write_text("id,caption\n" + "".join(f"{i},{text}\n" for i, text in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("output", ["hidden", "projected"])
def test_tokens_are_those_that_diffusion_reads(output):
    """The same weights in the class of transformers that both pipelines use, padded as their tokenizers pad."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tower = ClipText(QUICK)
    network, tokenizer = tower.load()
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, hidden_act="quick_gelu", eos_token_id=49407,
    )  # fmt: skip
    other = CLIPTextModelWithProjection(config).eval()
    own = network.state_dict()
    renamed = {
        "embeddings.token_embedding.weight": own["token_embedding.weight"],
        "embeddings.position_embedding.weight": own["positional_embedding"],
        "final_layer_norm.weight": own["ln_final.weight"], "final_layer_norm.bias": own["ln_final.bias"],
    }  # fmt: skip
    for layer in range(2):
        ours, theirs = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for part in ("weight", "bias"):
            for name, piece in zip("qkv", own[f"{ours}attn.in_proj_{part}"].chunk(3), strict=True):
                renamed[f"{theirs}self_attn.{name}_proj.{part}"] = piece
            for before, after in (
                ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ):  # fmt: skip
                renamed[f"{theirs}{after}.{part}"] = own[f"{ours}{before}.{part}"]
    other.text_model.load_state_dict(renamed)
    other.text_projection.weight.data = own["text_projection"].T
    texts = ["a photo of a cat", "coat rack"]
    ids = [[piece for piece in row if piece] for row in tokenizer(texts).tolist()]
    padded = torch.tensor([row + [49407] * (77 - len(row)) for row in ids])
    with torch.inference_mode():
        made = other(input_ids=padded)
        wanted = made.last_hidden_state
        if output == "projected":
            wanted = other.text_projection(wanted) / made.text_embeds.norm(dim=-1)[:, None, None]
    tokens = tower.encode_tokens(texts, projected=output == "projected")
    assert tokens.shape == (2, 77, 32 if output == "hidden" else 16)
    np.testing.assert_allclose(tokens, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_captions_of_an_image_are_averaged_and_concepts_take_their_place(tmp_path):
    bank = write_bank(
        tmp_path / "captions.csv", [("a", "a cat"), ("a", "a dog"), ("b", "a rack"), ("c", "a cat")]
    )
    config = ClipTextConfig(tower=QUICK, captions=bank)
    encoder = config.build()
    made = encoder.embed(make_stimuli(), [], None)
    cat, dog = encoder.encode_texts(["a cat", "a dog"])
    np.testing.assert_allclose(made.vectors[0], (cat + dog) / 2, atol=1e-6)
    np.testing.assert_allclose(made.vectors[2], cat, atol=1e-6)
    named = ClipTextConfig(tower=QUICK).build()
    assert named.find_texts(make_stimuli())[1] == ["a photo of a coat rack"]
    assert named.space != encoder.space
    assert (
        config.hashed_fields()["captions_digest"]
        != ClipTextConfig(
            tower=QUICK, captions=write_bank(tmp_path / "other.csv", [("a", "a cat")])
        ).hashed_fields()["captions_digest"]
    )


def test_a_target_of_texts_says_what_it_lacks(tmp_path):
    bank = write_bank(tmp_path / "captions.csv", [("a", "a cat")])
    with pytest.raises(DataError, match=r"has no caption for 2 of 3 images, first b"):
        ClipTextConfig(tower=QUICK, captions=bank).build().embed(make_stimuli(), [], None)
    with pytest.raises(ConfigError, match="cannot embed a picture"):
        ClipTextConfig(tower=QUICK).build().encode([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(ValueError, match="has no place for the concept"):
        ClipTextConfig(tower=QUICK, template="a photo")
    with pytest.raises(ValueError, match=r"template is .* it has no effect: captions are the texts"):
        ClipTextConfig(tower=QUICK, captions=bank, template="one {concept}")
    with pytest.raises(ValueError, match="normalise is True, but it has no effect"):
        ClipTextConfig(tower=QUICK.model_copy(update={"normalise": True}))
    with pytest.raises(DataError, match="no_captions"):
        ClipTextConfig(tower=QUICK, captions=tmp_path / "no_captions.csv").check_files()


def test_a_text_that_fills_the_window_is_told():
    text = ClipText(QUICK)
    with pytest.warns(Notice, match="1 of 2 texts reach the window of .*, 77 word pieces; the rest is cut"):
        found = text.encode(["cat " * 90, "a cat"])
    assert found.shape[0] == 2
