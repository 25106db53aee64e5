"""The text side of a CLIP network: vectors of concept names and captions in the space of its images, and its tokens.

Owns which network reads the words of a run, prompt templates, tokenizers that work without a hub, and the pooled or
whole output of the text tower; the latter is what latent diffusion is conditioned on, and a target of its own.
open_clip brings its own word pieces for most networks. The others (SigLIP, the multilingual ones) need a tokenizer
folder; a folder without its vocabulary loads without complaint and knows two words, so every tokenizer is tried before
use.

References
----------
Radford et al. (2021), arXiv:2103.00020, section 3.1.4: prompt ensembles. Xu et al. (2023), Versatile Diffusion,
arXiv:2211.08332; Ozcelik and VanRullen (2023), Brain-Diffuser, arXiv:2303.05334: tokens as targets, captions averaged.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError, Notice, check_unique
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import NeededWeights, Settings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.embeddings.imported import ImportedConfig
from braindecode_vis.embeddings.layer_readout import OUTPUT
from braindecode_vis.embeddings.openclip import OpenClipConfig, read_description
from braindecode_vis.embeddings.weights import PublishedFiles, describe_snapshot, load_state, read_state

DEFAULT_TEMPLATES = ("This is a photo of a {concept}.",)
#: Sentences that any tokenizer with a vocabulary tells apart; see `check_tokenizer`.
_PROBES = ("a photo of a cat", "an espresso machine on a wooden table", "seventeen zebras")


class TextConfig(Settings):
    """Where tokens come from and how the text tower runs.

    Parameters
    ----------
    tokenizer
        Folder of a tokenizer of transformers, for networks without a tokenizer in open_clip.
    allow_download
        Allow the download of this tokenizer from the hub. Only the call can allow it, not a file.
    batch_size
        Setting of the computation that does not change its result.
    """

    tokenizer: Path | None = None
    allow_download: bool = False
    batch_size: int = Field(default=64, ge=1)

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields; whether a call may fetch changes no result, and stays as it was in earlier runs."""
        return {**super().hashed_fields(), "allow_download": False}


class ConceptTextConfig(Settings):
    """How concept names are encoded as vectors.

    Parameters
    ----------
    tower
        The CLIP network whose text encoder is used; None takes that of the target (``openclip``, ``minilm``), or the
        text features in imported files of ATM.
    templates
        Sentences with ``{concept}``; their unit vectors are averaged. ATM writes "This picture is {concept}", NICE and
        UBP "This is a {concept}."
    reading
        Tokenizer and batches.
    """

    tower: OpenClipConfig | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    reading: TextConfig = TextConfig()

    def list_weights(self) -> list[NeededWeights]:
        """Return what its own tower reads beside its weights."""
        return [] if self.tower is None else list_text_weights(self.tower, self.reading, "reading.tokenizer")


class TextTargetConfig(ImageEncoderSettings):
    """Settings that all targets made of texts share.

    Parameters
    ----------
    captions
        CSV file with the columns ``id`` and ``caption``, of every image of the run. None takes concepts.
    template
        Sentence with ``{concept}``, without captions.
    """

    captions: Path | None = None
    template: str = "a photo of a {concept}"

    of_texts: ClassVar[bool] = True
    not_hashed: ClassVar[frozenset[str]] = frozenset({"captions"})

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if "{concept}" not in template:
            raise ValueError(f"{template!r} has no place for the concept; write {{concept}} in it")
        return template

    @model_validator(mode="after")
    def _check_template_used(self) -> Self:
        if self.captions is not None:
            self.refuse_unused("template", because="captions are the texts")
        return self

    def check_files(self) -> None:
        """Raise `DataError` unless the captions can be read."""
        if self.captions is not None:
            read_caption_bank(self.captions.expanduser())

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the captions."""
        return super().hashed_fields() | hash_captions(self.captions)


class ClipTextConfig(TextTargetConfig):
    """Tokens of a CLIP text tower as a target: the input of latent diffusion in place of a prompt.

    The text of an image is one of its captions, or the name of its concept in a template. The tokens of several
    captions of an image are averaged (Brain-Diffuser). Images themselves are not used.

    Parameters
    ----------
    tower
        The CLIP network whose text encoder is used; Stable Diffusion 1 and Versatile Diffusion use OpenAI's ViT-L/14.
    output
        ``hidden`` are the tokens after the last norm, as Stable Diffusion reads them; ``projected`` their projections
        divided by the length of the pooled one, as Versatile Diffusion reads them.
    reading
        Tokenizer and batches.
    """

    packages: ClassVar[tuple[str, ...]] = ("open_clip",)

    kind: Literal["clip_text"] = "clip_text"
    tower: OpenClipConfig = Field(
        default_factory=lambda: OpenClipConfig(architecture="ViT-L-14-quickgelu", pretrained="openai")
    )
    output: Literal["hidden", "projected"] = "hidden"
    reading: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        self.tower.refuse_unused(
            "layer",
            "pooling",
            "project",
            "normalise",
            because="output chooses the tokens of the text encoder",
        )
        return self

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the captions can be read and there are weights."""
        super().check_files()
        self.tower.check_files()

    def list_weights(self) -> list[NeededWeights]:
        """Return what the tower reads beside its weights."""
        return list_text_weights(self.tower, self.reading, "reading.tokenizer")

    def build(self) -> ClipTextEncoder:
        """Return the encoder; the network is loaded when the first text comes."""
        return ClipTextEncoder(self)


class TextTargetEncoder(ImageEncoder):
    """Texts of stimuli in the place of images.

    Parameters
    ----------
    config
        Texts, and what reads them.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def space(self) -> str:
        """Name with what reads the texts, and the texts."""
        raise NotImplementedError

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Refuse: a picture does not say its text."""
        raise refuse_pictures(self.config.kind, "embeds captions or concepts of stimuli")

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Callable[..., Any]
    ) -> Embeddings:
        """Return what stands for the texts of each stimulus; see `contracts.ImageEncoder.embed`.

        Raises
        ------
        DataError
            If a stimulus has no caption.
        """
        vectors = self.embed_texts(self.find_texts(stimuli))
        return Embeddings(vectors, np.asarray(stimuli.ids, dtype=object), self.space)

    def find_texts(self, stimuli: StimulusSet) -> list[list[str]]:
        """Return the texts of each stimulus."""
        return find_texts(stimuli, self.config.captions, self.config.template)

    def embed_texts(self, texts: Sequence[Sequence[str]], fill: np.ndarray | None = None) -> np.ndarray:
        """Return vectors or tokens of shape (n, ...), each the mean over the texts of one image."""
        return average_texts(texts, self.encode_texts)

    def hide_texts(self, vectors: np.ndarray, fill: np.ndarray) -> None:
        """Say that nothing but texts is in these embeddings."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 of shape (n_texts, ...)."""
        raise NotImplementedError


def refuse_pictures(kind: str, what: str) -> ConfigError:
    """Return the error of a target that knows stimuli by other things than their pictures."""
    return ConfigError(
        f"a target of kind {kind} {what}, and cannot embed a picture; set the generator to nearest and leave out what "
        "encodes pictures, or choose openclip or another image encoder."
    )


class ClipTextEncoder(TextTargetEncoder):
    """Tokens of texts in the place of an image encoder's.

    Parameters
    ----------
    config
        Tower and texts.
    """

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__(config)
        self._text = ClipText(config.tower, config.reading)

    @property
    def space(self) -> str:
        """Name with architecture, weights, what the tokens are, and the texts."""
        config = self.config
        digest = config.tower.digest
        weights = digest if digest.startswith("random") else f"weights={digest[:12]}"
        texts = name_texts(config.captions, config.template)
        return f"clip_text/{config.tower.architecture}/{weights}/{config.output}/{texts}"

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 tokens of shape (n_texts, n_tokens, n_features); what exceeds the context is cut."""
        return self._text.encode_tokens(texts, projected=self.config.output == "projected")


def find_texts(stimuli: StimulusSet, captions: Path | None, template: str) -> list[list[str]]:
    """Return the texts of each stimulus: its captions in a file, or the name of its concept in the template.

    Raises
    ------
    DataError
        If a stimulus has no caption.
    """
    if captions is None:
        names = stimuli.concepts_of(stimuli.ids)
        return [[template.format(concept=name_concept(str(name)))] for name in names]
    path = captions.expanduser()
    bank = read_caption_bank(path)
    lacking = [str(i) for i in stimuli.ids if str(i) not in bank]
    if lacking:
        raise DataError(
            f"{path} has no caption for {len(lacking)} of {len(stimuli)} images, first {lacking[0]}; add them, or "
            "leave captions out to take the names of concepts."
        )
    return [bank[str(i)] for i in stimuli.ids]


def hash_captions(captions: Path | None) -> dict[str, str]:
    """Return the digest of the captions for a fingerprint; nothing where concepts are named."""
    if captions is None:
        return {}
    read_caption_bank(captions.expanduser())  # a missing one in one sentence
    return {"captions_digest": hash_once(captions.expanduser())}


def name_texts(captions: Path | None, template: str) -> str:
    """Return what the name of a space says of its texts: the digest of the captions, or of the template."""
    if captions is None:
        return f"concepts={hash_json(template)[:8]}"
    return f"captions={hash_once(captions.expanduser())[:8]}"


def average_texts(texts: Sequence[Sequence[str]], encode: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Return float32 means over the texts of each entry, of shape (n_entries, ...); equal texts are encoded once."""
    distinct = list(dict.fromkeys(text for entry in texts for text in entry))
    row_of = {text: row for row, text in enumerate(distinct)}
    rows = encode(distinct)
    # One entry at a time: captions are several times as many as images.
    means = np.empty((len(texts), *rows.shape[1:]), np.float32)
    for mean, entry in zip(means, texts, strict=True):
        mean[...] = rows[[row_of[text] for text in entry]].mean(axis=0)
    return means


def embed_concepts(config: ConceptTextConfig, target: Any, stimuli: StimulusSet) -> Embeddings:
    """Return the text embedding of each concept, ids being the concepts in alphabetical order.

    Parameters
    ----------
    config
        Tower and sentences.
    target
        Configuration of the image encoder, whose text side reads unless another tower is named.
    stimuli
        Images with their concepts.

    Raises
    ------
    ConfigError
        If the target is neither a CLIP network nor of sentences, and `config.tower` names no network.
    """
    if config.tower is None and isinstance(target, ImportedConfig):
        return target.build().embed_concepts(stimuli)
    tower, names = config.tower or target, sorted({str(name) for name in stimuli.concepts_of(stimuli.ids)})
    if not isinstance(tower, OpenClipConfig) and not _is_of_sentences(tower):
        raise ConfigError(
            "texts and images can be compared only in the space of a CLIP network or of sentences, but "
            f"the target is {target.kind}; set "
            "target.kind to openclip or minilm, or name a network with text.tower."
        )
    return embed_text(names, tower, templates=config.templates, text=config.reading)


def spread_over_images(concepts: Embeddings, stimuli: StimulusSet) -> Embeddings:
    """Return one row per image: the embedding of its concept."""
    names = [str(name) for name in stimuli.concepts_of(stimuli.ids)]
    picked = concepts.select(names)  # a concept's row for each of its images
    return Embeddings(picked.vectors, np.asarray(stimuli.ids, dtype=object), picked.space)


def open_clip_texts(target: Any, reading: TextConfig | None = None) -> ClipText | None:
    """Return the text side of a target that is a CLIP network at its joint output; None of any other target."""
    if getattr(target, "kind", "") != "openclip" or target.layers != (OUTPUT,) or target.pooling != "own":
        return None
    return ClipText(target, reading)


class ClipText:
    """The text tower of a CLIP network.

    Parameters
    ----------
    config
        The image encoder whose space the text shares: same architecture, same weights.
    text
        Tokenizer and batches.
    """

    def __init__(self, config: OpenClipConfig, text: TextConfig | None = None) -> None:
        self.config = config
        self.text = text or TextConfig()
        self._loaded: tuple[Any, Any] | None = None

    @property
    def space(self) -> str:
        """The space of the images, which pooled text shares.

        Raises
        ------
        ConfigError
            If the image encoder does not give the joint output of both towers.
        """
        if self.config.layers != (OUTPUT,) or self.config.pooling != "own":
            raise ConfigError(
                "text and images can be compared only at the network's own output; set target.layer to "
                "output and target.pooling to "
                f"own instead of {self.config.layer!r} and {self.config.pooling!r}."
            )
        return self.config.build().space

    def load(self) -> tuple[Any, Any]:
        """Return the network and its tokenizer, loaded once."""
        if self._loaded is None:
            tokenizer = make_tokenizer(self.config, self.text)  # cheaper than the network, so it fails first
            network = build_clip(self.config).eval().requires_grad_(False)
            self._loaded = network.to(choose_device(self.config.device, setting="target.device")), tokenizer
        return self._loaded

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 vectors of shape (n_texts, n_features), each at its own length.

        Parameters
        ----------
        texts
            Words or sentences; what exceeds the context of the network (77 word pieces) is cut, with a notice.
        """
        import torch

        network, tokenizer = self.load()
        device, rows, full = choose_device(self.config.device, setting="target.device"), [], 0
        with torch.inference_mode():
            for start in range(0, len(texts), self.text.batch_size):
                batch = list(texts[start : start + self.text.batch_size])
                tokens = tokenizer(batch)
                # The end of the text stands in the last place, and padding in none.
                ends = tokens.amax(dim=1)
                full += int(((tokens[:, -1] == ends) & (tokens[:, -2] != ends)).sum())
                rows.append(network.encode_text(tokens.to(device)).float().cpu().numpy())
        if not rows:
            raise DataError("there is no text to embed.")
        if full:
            warnings.warn(
                f"{full} of {len(texts)} texts reach the window of {self.config.architecture}, "
                f"{tokens.shape[1]} word pieces; the rest is cut.",
                Notice,
                stacklevel=2,
            )
        return np.concatenate(rows)

    def encode_tokens(self, texts: Sequence[str], *, projected: bool = False) -> np.ndarray:
        """Return float32 tokens after the last norm, of shape (n_texts, context, n_features).

        Parameters
        ----------
        texts
            Words or sentences; what exceeds the context of the network (77 word pieces) is cut.
        projected
            Project every token, and divide by the length of the projection of the end of the text.

        Raises
        ------
        ConfigError
            If the text tower is not one of CLIP's own, which reads from left to right and projects by a matrix.
        """
        import torch

        network, tokenizer = self.load()
        tower = getattr(network, "text", network)  # as open_clip keeps it in networks with a tower of its own
        parts = (
            "token_embedding",
            "positional_embedding",
            "transformer",
            "ln_final",
            "text_projection",
            "attn_mask",
        )
        if any(getattr(tower, part, None) is None for part in parts):
            raise ConfigError(
                f"the text tower of {self.config.architecture} is not CLIP's own, whose tokens are needed; choose "
                "ViT-L-14-quickgelu."
            )
        device, rows = choose_device(self.config.device, setting="target.device"), []
        with torch.inference_mode():
            for start in range(0, len(texts), self.text.batch_size):
                ids = pad_with_end(tokenizer(list(texts[start : start + self.text.batch_size]))).to(device)
                x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
                x = tower.ln_final(
                    tower.transformer(x, attn_mask=tower.attn_mask[: ids.shape[1], : ids.shape[1]])
                )
                if projected:
                    matrix = tower.text_projection
                    x = matrix(x) if isinstance(matrix, torch.nn.Module) else x @ matrix
                    ends = x[
                        torch.arange(len(ids), device=device), ids.argmax(dim=-1)
                    ]  # the first of the largest id
                    x = x / ends.norm(dim=-1)[:, None, None]
                rows.append(x.float().cpu().numpy())
        if not rows:
            raise DataError("there is no text to embed.")
        return np.concatenate(rows)


def pad_with_end(ids: Any) -> Any:
    """Return ids of word pieces in which the end of the text is repeated, where open_clip repeats zeros.

    So do the tokenizers of Stable Diffusion and Versatile Diffusion; a network that reads from left to right takes the
    padding into the tokens after the end, and diffusion reads those too.

    Parameters
    ----------
    ids : int tensor of shape (n_texts, context)
        The end has the largest id of all.
    """
    import torch

    places = torch.arange(ids.shape[1], device=ids.device)
    after = places[None] > ids.argmax(dim=-1, keepdim=True)
    return torch.where(after, ids.amax(dim=-1, keepdim=True), ids)


def _is_of_sentences(config: Any) -> bool:
    """Say whether a target reads sentences into one vector each, beside which words can lie."""
    return isinstance(config, TextTargetConfig) and not isinstance(config, ClipTextConfig)


def embed_text(
    concepts: Sequence[str],
    config: Any,
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    text: TextConfig | None = None,
) -> Embeddings:
    """Return one unit vector per concept: the mean over templates of unit vectors, brought to length one again.

    Parameters
    ----------
    concepts
        Unique names; underscores are read as spaces and a number at the end (``bat1``) is dropped from the prompt.
    config
        The target whose space the text shares: ``openclip``, or ``minilm``, whose images are texts too.
    templates
        Sentences with ``{concept}`` in them.
    text
        Tokenizer and batches.

    Returns
    -------
    Embeddings
        Ids are the concepts, the space is that of the images: a gallery for zero-shot classification.

    Raises
    ------
    ConfigError
        If a template has no place for the concept, or the network cannot read text here.
    """
    check_unique(list(concepts), what="the concepts to embed")
    for template in templates:
        if "{concept}" not in template:
            raise ConfigError(
                f"the template {template!r} has no place for the concept; write {{concept}} in it."
            )
    if not templates:
        raise ConfigError("text needs at least one template, for example 'This is a photo of a {concept}.'")
    reader: Any = config.build() if _is_of_sentences(config) else ClipText(config, text)
    space, encode = reader.space, reader.encode_texts if _is_of_sentences(config) else reader.encode
    names = [name_concept(concept) for concept in concepts]
    # Unit vectors are averaged, so that no template weighs more by its length (Radford et al.).
    total = sum(make_unit(encode([t.format(concept=name) for name in names])) for t in templates)
    return Embeddings(make_unit(np.asarray(total)), list(concepts), space)


def name_concept(concept: str) -> str:
    """Return the words of a concept id.

    Examples
    --------
    >>> name_concept("coat_rack"), name_concept("bat1")
    ('coat rack', 'bat')
    """
    return concept.rstrip("0123456789").strip("_ ").replace("_", " ") or concept


def make_unit(vectors: np.ndarray) -> np.ndarray:
    """Return float32 vectors of length one along the last axis; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)  # zeros stay zeros instead of NaN


def build_clip(config: OpenClipConfig) -> Any:
    """Return the whole network with its weights; only its text side is needed here.

    Raises
    ------
    ConfigError
        If the text tower is one that transformers would have to fetch first.
    """
    import open_clip

    path, description = config.find_weights(), read_description(config)
    if (foreign := _describe_foreign_tower(config)) is not None:
        description["text_cfg"]["hf_model_name"] = str(foreign.find(config.allow_download))
    description.pop("custom_text", None)  # create_model decides that itself
    with seeded(0), _silence():
        network = open_clip.create_model(config.architecture, pretrained_text=False, **description)
    if path is not None:
        from open_clip.convert import convert_state_dict
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_state_dict(network, read_state(path))
        if "positional_embedding" in state and not hasattr(network, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        own = network.state_dict()
        # Images are not read here, and the two scalars of the loss may have any shape.
        kept = {k: v for k, v in state.items() if not k.startswith("visual.")}
        kept |= {k: v for k, v in own.items() if k.startswith(("visual.", "logit_"))}
        load_state(
            network, kept, path=path, what=f"open_clip's {config.architecture}",
            ignore=lambda name: name.startswith("logit_") or name.endswith("position_ids"),
        )  # fmt: skip
    network.visual = None  # half of the memory
    return network


def list_text_weights(config: OpenClipConfig, text: TextConfig, setting: str) -> list[NeededWeights]:
    """Return what the text tower of a network reads beside its weights.

    Parameters
    ----------
    config
        The network.
    text
        Its tokenizer.
    setting
        The setting that names the tokenizer.
    """
    found, name = [], read_description(config)["text_cfg"].get("hf_tokenizer_name")
    if (foreign := _describe_foreign_tower(config)) is not None:
        found.append(foreign.describe(setting))
    if name or text.tokenizer is not None:
        found.append(_describe_tokenizer(config, name or "").describe(setting, text.tokenizer))
    return found


def _describe_foreign_tower(config: OpenClipConfig) -> PublishedFiles | None:
    """Return the settings of a text tower that open_clip has from transformers; None of its own ones."""
    name = read_description(config)["text_cfg"].get("hf_model_name")
    if not name:
        return None
    return describe_snapshot(
        name, ["config.json"],
        refusal=f"the text tower of {config.architecture} is {name} of the hub: choose an architecture with "
        "a text tower of its own",
        what=f"config.json of {name}",
    )  # fmt: skip


def _describe_tokenizer(config: OpenClipConfig, name: str) -> PublishedFiles:
    return describe_snapshot(
        name, ["*.json", "*.txt", "*.model"],
        refusal=f"{config.architecture} reads text with the tokenizer {name} of the hub: use its folder "
        "(tokenizer.json and tokenizer_config.json) as text.tokenizer",
        what=f"tokenizer {name}",
    )  # fmt: skip


@contextmanager
def _silence() -> Iterator[None]:
    """Keep open_clip from warning that a network has no weights yet; they are loaded right after."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def make_tokenizer(config: OpenClipConfig, text: TextConfig) -> Any:
    """Return the tokenizer of an architecture: texts to a tensor of shape (n, context_length).

    Raises
    ------
    ConfigError
        If open_clip brings no word pieces for it and no folder was given.
    DataError
        If the folder's tokenizer cannot distinguish sentences.
    """
    import open_clip

    description = read_description(config)["text_cfg"]
    name = description.get("hf_tokenizer_name")
    context = int(description.get("context_length", 77))  # CLIP's
    if not name and text.tokenizer is None:
        return open_clip.get_tokenizer(config.architecture, context_length=context)
    if text.tokenizer is None:
        source = str(_describe_tokenizer(config, name).find(text.allow_download))
    else:
        source = str(text.tokenizer.expanduser())
    # Said, or transformers asks on the terminal whether to run what the folder brings along.
    arguments = {**description.get("tokenizer_kwargs", {}), "trust_remote_code": False}
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(
            source, context_length=context, tokenizer_mode=description.get("tokenizer_mode"), **arguments
        )
    except Exception as error:  # transformers has many ways to say that a file is missing
        raise DataError(
            f"the tokenizer {source} cannot be loaded ({type(error).__name__}); use tokenizer.json and "
            "tokenizer_config.json in one folder."
        ) from error
    check_tokenizer(tokenizer, source)
    return tokenizer


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raise `DataError` unless the tokenizer distinguishes a few sentences.

    Transformers loads a folder without its vocabulary and goes on with the two special tokens, so that every text
    becomes the same row.
    """
    rows = tokenizer(list(_PROBES))
    n_different = len({tuple(row.tolist()) for row in rows})
    pieces = len({int(piece) for row in rows for piece in row})
    if n_different < len(_PROBES) or pieces < 8:
        raise DataError(
            f"the tokenizer {source} has no vocabulary: {len(_PROBES)} different sentences become {n_different} "
            f"different rows of {pieces} tokens; use the folder with tokenizer.json (or vocab.json and merges.txt)."
        )
