"""Captions of images by a local captioning network: GIT or BLIP, as transformers has them.

References
----------
Wang et al. (2022), GIT, arXiv:2205.14100; Li et al. (2022), BLIP, arXiv:2201.12086.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import choose_device
from braindecode_vis.metrics.captions import load_parts
from braindecode_vis.store import read_json

KINDS = ("git", "blip")


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
        inputs = processor(images=[np.ascontiguousarray(image) for image in batch], return_tensors="pt")
        with torch.inference_mode():
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
            f"{folder} holds no captioning network; bring the whole folder of microsoft/git-large-coco or another GIT "
            "or BLIP."
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise ConfigError(
            f"{folder} holds a network of kind {kind!r}; captions come from {' or '.join(KINDS)}."
        )
    from transformers import AutoProcessor, BlipForConditionalGeneration, GitForCausalLM

    network: Any = GitForCausalLM if kind == "git" else BlipForConditionalGeneration
    processor, model = load_parts(folder, AutoProcessor, network)
    return processor, model.eval().requires_grad_(False)
