"""Captions of images: reads a caption bank from a file, and writes captions with networks in a local folder.

Owns reading both without a hub and without running code that comes with a folder, and how a caption is parted into
words. Captioning networks are GIT and BLIP as transformers has them. What a caption is worth is the business of
`braindecode_vis.scoring.metrics.caption_metrics`, captions of embeddings that of `braindecode_vis.generation.captions`.

References
----------
Wang et al. (2022), GIT, arXiv:2205.14100; Li et al. (2022), BLIP, arXiv:2201.12086.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_columns, check_file
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.store import read_json
from braindecode_vis.embeddings.weights import check_no_kernels, loading_quietly

PAD, START, END = 0, 1, 2  # numbers of the words that are none
SPECIAL = ("<pad>", "<start>", "<end>")
CAPTIONERS = ("git", "blip")  # kinds of networks that write captions


def read_caption_bank(path: Path) -> dict[str, list[str]]:
    """Return the captions of each image from a table with the columns ``id`` (or ``image_name``) and ``caption``.

    Parameters
    ----------
    path
        CSV file in UTF-8, or in UTF-16 with its mark, as spreadsheets write them; an image with several captions has
        several rows.

    Raises
    ------
    DataError
        If the file, a column or a caption is missing, or its bytes are no such text.
    """
    check_file(path, what="the caption bank", hint="give a CSV file with the columns id and caption")
    bank: dict[str, list[str]] = {}
    reader = csv.DictReader(io.StringIO(read_text(path, what="the caption bank"), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"the caption bank {path} is no CSV file after line {reader.line_num} ({error}); close its quotes and save "
            "it again."
        ) from error
    # LAION-fMRI calls its ids so.
    key = "image_name" if "image_name" in columns and "id" not in columns else "id"
    check_columns(columns, [key, "caption"], what=f"the caption bank {path}")
    for number, row in rows:
        name, caption = (row[key] or "").strip(), (row["caption"] or "").strip()
        if not name or not caption:
            raise DataError(
                f"{path} is missing an id or a caption in line {number}; fill it in or drop the line."
            )
        if None in row:
            raise DataError(
                f"{path} has more fields than columns in line {number}; put captions with commas into quotes."
            )
        bank.setdefault(name, []).append(caption)
    if not bank:
        raise DataError(f"{path} holds no caption.")
    return bank


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a file in UTF-8 or, with its mark, UTF-16; a mark at the start is no part of the text.

    Raises
    ------
    DataError
        If its bytes are no such text; `what` names the file.
    """
    content = path.read_bytes()
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # In another encoding, a guess would put wrong letters into captions and ids.
        raise DataError(
            f"{what} {path} is not encoded in UTF-8 (line {content[: error.start].count(10) + 1}); save it "
            "as UTF-8, for example with iconv -f latin1 -t utf-8."
        ) from error


def split_words(text: str) -> list[str]:
    """Return words and signs of a caption, lower case.

    Examples
    --------
    >>> split_words("A dog's bone, red.")
    ['a', "dog's", 'bone', ',', 'red', '.']
    """
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]", text.lower())


def join_words(words: Sequence[str]) -> str:
    """Return the caption of words and signs.

    Examples
    --------
    >>> join_words(["a", "bone", ",", "red", "(", "new", ")", "."])
    'a bone, red (new).'
    """
    return re.sub(r" (?=[,.;:!?)])|(?<=\() ", "", " ".join(words))


def write_captions(words: Iterable[Sequence[int]], vocabulary: Sequence[str]) -> list[str]:
    """Return the captions of rows of numbers of words, which `SPECIAL` ones are left out of.

    Examples
    --------
    >>> write_captions([[3, 4, 2, 0]], [*SPECIAL, "a", "bone"])
    ['a bone']
    """
    return [join_words([vocabulary[number] for number in row if number >= len(SPECIAL)]) for row in words]


def caption_images(
    images: Iterable[np.ndarray],
    weights: Path,
    *,
    max_new_tokens: int = 20,
    n_beams: int = 1,
    batch_size: int = 8,
    device: str = "auto",
) -> list[str]:
    """Return one caption per image, without sampling: the same images give the same captions.

    Parameters
    ----------
    images
        uint8 arrays of shape (height, width, 3).
    weights
        Folder of transformers with configuration, ``.safetensors``, tokenizer and image processor, for example of
        ``microsoft/git-large-coco`` or ``Salesforce/blip-image-captioning-base``.
    max_new_tokens
        Longest caption, word pieces.
    n_beams
        Beams of the search; 1 is greedy.
    batch_size, device
        How it runs.

    Raises
    ------
    DataError
        If the folder holds no network.
    ConfigError
        If it is neither GIT nor BLIP.
    """
    import torch

    processor, model = load_captioner(weights)
    model.to(choose_device(device, setting="device"))
    iterator, captions = iter(images), []
    while batch := list(islice(iterator, batch_size)):
        inputs = processor(images=[np.array(image) for image in batch], return_tensors="pt")
        with torch.inference_mode():
            # Greedy or beam search, never sampling: a caption must not differ between two evaluations.
            tokens = model.generate(
                pixel_values=inputs["pixel_values"].to(model.device),
                max_new_tokens=max_new_tokens, num_beams=n_beams, do_sample=False,
            )  # fmt: skip
        captions += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return captions


def load_captioner(weights: Path) -> tuple[Any, Any]:
    """Return processor and network of a local folder, in evaluation mode."""
    folder = weights.expanduser()
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} holds no captioning network; use the whole folder of microsoft/git-large-coco or another GIT "
            "or BLIP."
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CAPTIONERS:
        raise ConfigError(
            f"{folder} holds a network of kind {kind!r}; captions can be written by {' or '.join(CAPTIONERS)}."
        )
    from transformers import AutoProcessor, BlipForConditionalGeneration, GitForCausalLM

    network: Any = GitForCausalLM if kind == "git" else BlipForConditionalGeneration
    processor, model = load_parts(folder, AutoProcessor, network)
    return processor, model.eval().requires_grad_(False)


def load_parts(folder: Path, tokenizer: Any, network: Any) -> tuple[Any, Any]:
    """Return tokenizer (or processor) and network of a folder of transformers, without fetching anything.

    Raises
    ------
    DataError
        If a file of it is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        config = folder / "config.json"
        check_no_kernels(read_json(config) if config.is_file() else {}, config)
        # Said, or transformers asks on the terminal whether to run what the folder brings along.
        options = {"local_files_only": True, "trust_remote_code": False}
        first = tokenizer.from_pretrained(folder, **options)
        with loading_quietly():
            return first, network.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder} cannot be read ({words}); copy the whole folder again.") from error
