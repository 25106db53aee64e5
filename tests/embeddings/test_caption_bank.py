"""Banks of captions, and networks of a local folder that write them."""

import numpy as np
import pytest
import torch

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.embeddings import caption_bank

WORDS = ["a", "cat", "dog", "on", "the", "grass", "red", "car", "##s"]


def write_vocabulary(folder):
    from transformers import BertTokenizerFast

    folder.mkdir()
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    (folder / "vocab.txt").write_text("\n".join(vocab))
    tokenizer = (
        BertTokenizerFast(vocab=vocab) if "vocab" in BertTokenizerFast.__init__.__code__.co_varnames else None
    )
    tokenizer = tokenizer or BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer, len(vocab)


def write_git(folder):
    """Write a tiny random GIT and return its folder."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer, n_words = write_vocabulary(folder)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    config = GitConfig(
        vision_config=vision, vocab_size=n_words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GitForCausalLM(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    GitProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(
        folder
    )
    return folder


def test_git_captions_images_from_a_local_folder(tmp_path):
    folder = write_git(tmp_path / "git")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    found = caption_bank.caption_images(images, folder, max_new_tokens=4, batch_size=2, device="cpu")
    assert len(found) == 3
    assert all(isinstance(text, str) for text in found)
    assert found == caption_bank.caption_images(images, folder, max_new_tokens=4, batch_size=1, device="cpu")
    with pytest.raises(DataError, match="holds no captioning network"):
        caption_bank.caption_images(images, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="kind 'bert'"):
        caption_bank.caption_images(images, tmp_path)


def test_a_bank_lists_the_captions_of_each_image(tmp_path):
    path = tmp_path / "bank.csv"
    path.write_text('id,caption\nt2,"a dog, on the grass"\nt2,another\nt1,a cat\n')
    assert caption_bank.read_caption_bank(path) == {"t2": ["a dog, on the grass", "another"], "t1": ["a cat"]}
    path.write_text("id,text\n")
    with pytest.raises(DataError, match="is missing the column"):
        caption_bank.read_caption_bank(path)
    path.write_text("id,caption\nt1,\n")
    with pytest.raises(DataError, match="line 2"):
        caption_bank.read_caption_bank(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_banks_of_spreadsheets_are_read(tmp_path, encoding):
    """The mark that spreadsheets put first was taken for a part of the first column's name."""
    path = tmp_path / "bank.csv"
    path.write_text("id,caption\nt1,ein Kätzchen\n", encoding=encoding)
    assert caption_bank.read_caption_bank(path) == {"t1": ["ein Kätzchen"]}


@pytest.mark.parametrize(
    ("text", "encoding", "match"),
    [
        ("id,caption\nt1,a cat\nt2,ein Kätzchen\n", "latin-1", r"not encoded in UTF-8 \(line 3\)"),
        ('id,caption\nt1,"a cat\nt2,a dog\n', "utf-8", "no CSV file after line 1"),
        ("id,caption\nt1,a cat, asleep\n", "utf-8", "more fields than columns in line 2"),
    ],
)
def test_banks_that_would_be_misread_are_refused(tmp_path, text, encoding, match):
    path = tmp_path / "bank.csv"
    path.write_text(text, encoding=encoding)
    with pytest.raises(DataError, match=match):
        caption_bank.read_caption_bank(path)
