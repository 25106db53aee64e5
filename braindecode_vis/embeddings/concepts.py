"""One text embedding per image from the name of its concept, for the text term of a contrast and for zero-shot names.

Owns which tower reads the words and in which sentences; the reading itself is that of `embeddings.text`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError
from braindecode_vis.embeddings.openclip import OpenClipConfig
from braindecode_vis.embeddings.text import DEFAULT_TEMPLATES, TextConfig, embed_text
from braindecode_vis.settings import Settings
from braindecode_vis.stimuli import StimulusSet


class ConceptTextConfig(Settings):
    """How names of concepts become vectors.

    Parameters
    ----------
    tower
        The CLIP network whose text side reads; None takes the target's own.
    templates
        Sentences with ``{concept}``; their unit vectors are averaged. ATM writes "This picture is {concept}", NICE and
        UBP "This is a {concept}."
    reading
        Tokenizer and batches.
    """

    tower: OpenClipConfig | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    reading: TextConfig = TextConfig()


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
        If neither the target nor `config.tower` is a CLIP network.
    """
    tower = config.tower or target
    if not isinstance(tower, OpenClipConfig):
        raise ConfigError(
            f"texts meet images in the space of a CLIP network, but the target is {target.kind}; set target.kind to "
            "openclip, or name a network with text.tower."
        )
    names = sorted({str(name) for name in stimuli.concepts_of(stimuli.ids)})
    return embed_text(names, tower, templates=config.templates, text=config.reading)


def spread_over_images(concepts: Embeddings, stimuli: StimulusSet) -> Embeddings:
    """Return one row per image: the embedding of its concept."""
    names = [str(name) for name in stimuli.concepts_of(stimuli.ids)]
    picked = concepts.select(names)
    return Embeddings(picked.vectors, np.asarray(stimuli.ids, dtype=object), picked.space)
