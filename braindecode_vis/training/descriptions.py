"""Reads descriptions of training images from files: captions as word numbers, attributes, sentence vectors, concepts.

Owns how captions become a vocabulary and rows of numbers, and tables with one row per image that batches are filled
from. Words, values of attributes and concepts are those of the images that are learnt from: what only other images say
is no word, and is unknown. A fit keeps all three, so that weights of an objective meet the same numbers again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, Notice
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.embeddings.caption_bank import END, PAD, SPECIAL, START, read_caption_bank, split_words
from braindecode_vis.embeddings.compositions import ENGLISH, find_groups, swap_captions
from braindecode_vis.training.batches import code_trials

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import StepSizes

#: Longest caption that is read, words and signs; what is longer is cut, with a notice.
LONGEST_CAPTION = 62
#: Texts of at least this cosine are the same text: single precision tells less apart.
SAME_TEXT = 1 - 1e-6
_SWAPS = 4  # texts of an image in which words changed places, at most


@dataclass(frozen=True)
class Lexicon:
    """What a fit knows by name.

    Parameters
    ----------
    vocabulary
        Words by their numbers, `SPECIAL` first; empty without captions.
    attributes
        Values of each attribute by their numbers.
    concepts
        Concepts by their numbers, where an objective has weights of each.
    """

    vocabulary: tuple[str, ...] = ()
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "vocabulary": list(self.vocabulary),
            # pairs, since an object of JSON is sorted by its keys
            "attributes": [[name, list(values)] for name, values in self.attributes.items()],
            "concepts": list(self.concepts),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Lexicon:
        """Return what `as_json` gave."""
        attributes = {name: tuple(values) for name, values in content["attributes"]}
        return cls(tuple(content["vocabulary"]), attributes, tuple(content["concepts"]))


@dataclass(frozen=True)
class Descriptions:
    """Tables with one row per image, in the order of the ids of `code_trials`.

    Parameters
    ----------
    lexicon
        What their numbers stand for.
    sizes
        The parts of `StepSizes` that they decide.
    ids
        The images.
    tables
        By the name of the field of a batch, arrays of shape (n_images, ...): ``attributes``, ``sentences``, ``swapped``
        and ``swapped_known``.
    words : int32 array of shape (n_captions, most_words)
        All captions, those of one image next to each other.
    first, counts : int arrays of shape (n_images,)
        Row of the first caption of each image, and the number of its captions.
    concepts : int64 array of shape (n_trials,) or None
        Concept of each trial by the numbers of the lexicon; new ones follow behind it.
    neighbours : int64 array of shape (n_images,) or None
        The image of the same parts that shall be in a batch with each image, -1 where there is none.
    """

    lexicon: Lexicon
    sizes: StepSizes
    ids: tuple[str, ...] = ()
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    words: np.ndarray | None = None
    first: np.ndarray | None = None
    counts: np.ndarray | None = None
    concepts: np.ndarray | None = None
    neighbours: np.ndarray | None = None

    def draw_captions(self, stimuli: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Return the row of `words` of one caption of each image, the first one without a generator."""
        assert self.first is not None
        assert self.counts is not None
        if rng is None:
            return self.first[stimuli]
        return self.first[stimuli] + rng.integers(0, self.counts[stimuli])


def describe_images(
    config: Any,
    responses: Responses,
    train: np.ndarray,
    *,
    lexicon: Lexicon | None = None,
    sizes: StepSizes | None = None,
    memory: dict[str, np.ndarray] | None = None,
) -> Descriptions | None:
    """Return what the files of an encoder say of the images of these trials; None if no objective asks.

    Parameters
    ----------
    config
        The `NetworkEncoderConfig`.
    responses
        All trials.
    train
        Rows that are learnt from, whose images decide words, values and concepts.
    lexicon, sizes
        Those of an earlier fit, which are kept.
    memory
        Sentence vectors by the digest of their texts, found and kept there: refits ask for the same ones.

    Raises
    ------
    DataError
        If an image has no caption, or attributes are known of no image that is learnt from.
    """
    from braindecode_vis.training.objectives.objective import StepSizes

    needs = config.needs & {"words", "attributes", "sentences", "swapped", "concepts"}
    if not needs:
        return None
    ids, stimuli, concepts = code_trials(responses)
    learnt = np.unique(stimuli[train])  # images
    found = Descriptions(lexicon or Lexicon(), sizes or StepSizes(), ids=tuple(map(str, ids)))
    if needs & {"words", "sentences", "swapped"}:
        bank = read_caption_bank(config.captions.expanduser())
        lacking = [str(i) for i in ids if str(i) not in bank]
        if lacking:
            raise DataError(
                f"encoder.captions {config.captions} has no caption for {len(lacking)} of {len(ids)} "
                "training images, "
                f"first {lacking[0]}; add them, or leave out the objectives that need captions."
            )
        texts = [bank[str(i)] for i in ids]
        if "words" in needs:
            found = _add_words(found, texts, learnt)
        if needs & {"sentences", "swapped"}:
            found = _add_sentences(found, config, texts, memory)
        if "swapped" in needs:
            found = _add_swaps(found, config, texts, learnt, memory)
    if "attributes" in needs:
        found = _add_attributes(found, config, responses, learnt)
    if "concepts" in needs:
        found = _add_concepts(found, responses, concepts, train)
    return found


def _add_words(found: Descriptions, texts: list[list[str]], learnt: np.ndarray) -> Descriptions:
    split = [[split_words(text) for text in own] for own in texts]
    vocabulary, longest = found.lexicon.vocabulary, found.sizes.max_words - 2
    if not vocabulary:
        vocabulary = (*SPECIAL, *sorted({word for i in learnt for text in split[i] for word in text}))
    if longest < 0:
        longest = max(len(text) for i in learnt for text in split[i])
        if longest > LONGEST_CAPTION:
            told = f"some captions have up to {longest} words and signs and are cut to {LONGEST_CAPTION}."
            warnings.warn(told, Notice, stacklevel=4)
            longest = LONGEST_CAPTION
    number = {word: place for place, word in enumerate(vocabulary) if place >= len(SPECIAL)}
    counts = np.array([len(own) for own in split])
    words = np.full((int(counts.sum()), longest + 2), PAD, dtype=np.int32)
    for row, text in enumerate(text for own in split for text in own):
        # a word that no image has which is learnt from is left out
        known = [number[word] for word in text if word in number][:longest]
        words[row, : len(known) + 2] = [START, *known, END]
    return replace(
        found,
        lexicon=replace(found.lexicon, vocabulary=tuple(vocabulary)),
        sizes=replace(found.sizes, n_words=len(vocabulary), max_words=longest + 2),
        words=words, first=np.cumsum(counts) - counts, counts=counts,
    )  # fmt: skip


def _embed_texts(config: Any, texts: list[list[str]], memory: dict[str, np.ndarray] | None) -> np.ndarray:
    """Return float32 unit vectors, the mean over the texts of each entry; computed once for the same texts."""
    from braindecode_vis.base.devices import compute_once
    from braindecode_vis.embeddings.text import average_texts, make_unit

    memory, key = {} if memory is None else memory, hash_json(texts)
    if key not in memory:
        encoder = make_sentence_encoder(config)
        # One process reads the sentences for all.
        memory[key] = compute_once(lambda: make_unit(average_texts(texts, encoder.encode)).astype(np.float32))
    return memory[key]


def _add_sentences(
    found: Descriptions, config: Any, texts: list[list[str]], memory: dict[str, np.ndarray] | None
) -> Descriptions:
    vectors = _embed_texts(config, texts, memory)
    return replace(
        found,
        sizes=replace(found.sizes, n_sentence=vectors.shape[1]),
        tables={**found.tables, "sentences": vectors},
    )


def _add_swaps(
    found: Descriptions,
    config: Any,
    texts: list[list[str]],
    learnt: np.ndarray,
    memory: dict[str, np.ndarray] | None,
) -> Descriptions:
    asking = [o for o in config.objectives if "swapped" in o.needs]
    chosen = asking[0]
    if any((o.words, o.space) != (chosen.words, chosen.space) for o in asking):
        raise ConfigError(
            "several objectives composition have different words or space, but a batch has one set of "
            "swapped captions; set the same words and space for all."
        )
    groups = (
        ENGLISH if chosen.words == "english" else find_groups(read_attributes(config.attributes.expanduser()))
    )
    swaps = [swap_captions(own, groups, limit=_SWAPS) for own in texts]
    n_swapped = sum(bool(swaps[i]) for i in learnt)
    if not n_swapped:
        raise DataError(
            f"no caption of the {len(learnt)} training images in {config.captions} has two words that "
            f"can be exchanged (first caption: {texts[learnt[0]][0]!r}); this works for English captions "
            "with two colours or a relation. Give such captions, set words of the objective composition "
            "to attributes, or leave it out."
        )
    if n_swapped < len(learnt):
        told = (
            f"{len(learnt) - n_swapped} of {len(learnt)} training images have captions without words "
            "that can be exchanged; the objective composition does not use them."
        )
        warnings.warn(told, Notice, stacklevel=4)
    most = max(map(len, swaps))
    known = np.array([[place < len(own) for place in range(most)] for own in swaps])  # (n_images, n_swaps)
    vectors = _embed_texts(config, [list(swap.texts) for own in swaps for swap in own], memory)
    swapped = np.zeros((*known.shape, vectors.shape[1]), np.float32)
    swapped[known] = vectors
    neighbours = None
    if any(o.hard_images for o in asking):
        neighbours = find_neighbours(found.tables["sentences"], swapped, known, learnt)
    return replace(
        found, tables={**found.tables, "swapped": swapped, "swapped_known": known}, neighbours=neighbours
    )


def find_neighbours(
    sentences: np.ndarray, swapped: np.ndarray, known: np.ndarray, learnt: np.ndarray
) -> np.ndarray:
    """Return for each image that is learnt from the one whose text is most like its swapped texts, else -1.

    An image without swapped texts gets the one whose text is most like its own, among other texts.

    Parameters
    ----------
    sentences : array of shape (n_images, d)
        Unit vectors of the true texts.
    swapped, known : arrays of shape (n_images, n_swaps, d) and (n_images, n_swaps)
        Unit vectors of the swapped texts, and which exist.
    learnt : int array
        Images that may be neighbours.
    """
    neighbours = np.full(len(sentences), -1, dtype=np.int64)
    gallery = sentences[learnt]
    for start in range(0, len(learnt), 256):
        rows = learnt[start : start + 256]
        own = sentences[rows] @ gallery.T  # (n_rows, n_learnt)
        others = np.where(known[rows][..., None], swapped[rows] @ gallery.T, -2.0).max(axis=1)
        likeness = np.where(known[rows].any(axis=1, keepdims=True), others, own)
        # What says the same is no hard negative.
        likeness[own >= SAME_TEXT] = -2.0
        best = likeness.argmax(axis=1)
        neighbours[rows] = np.where(likeness.max(axis=1) > -2.0, learnt[best], -1)
    return neighbours


def check_text_targets(found: Descriptions | None, config: Any, targets: Embeddings) -> None:
    """Raise `DataError` unless targets are the sentence vectors of the captions, where an objective takes them so."""
    asking = [o for o in config.objectives if "swapped" in o.needs and o.space == "target"]
    if found is None or not asking:
        return
    row_of = {str(name): row for row, name in reversed(list(enumerate(targets.ids)))}
    rows = np.array([row_of[name] for name in found.ids])[:256]
    shown = np.asarray(targets.vectors[rows], dtype=np.float64).reshape(len(rows), -1)
    sentences = found.tables["sentences"][: len(rows)]
    cosine = -1.0
    if shown.shape[1] == sentences.shape[1]:
        lengths = np.linalg.norm(shown, axis=1) * np.linalg.norm(sentences, axis=1)
        cosine = float(((shown * sentences).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
    if cosine < 0.99:
        raise DataError(
            f"the objective composition takes the targets for sentence vectors of encoder.captions, but "
            f"{targets.space} holds others; set target.kind to minilm with the same captions and weights, or space of "
            "the objective to sentences."
        )


def make_sentence_encoder(config: Any, space: str = "") -> Any:
    """Return the sentence encoder that the settings name; of an average, those of its member with the space `space`."""
    from braindecode_vis.embeddings.sentence_encoder import SentenceEncoder, find_sentence_folder

    if members := getattr(config, "members", ()):
        config = next(member for member in members if getattr(member, "sentence_space", "") == space)
    folder = find_sentence_folder(config.sentence_encoder, "encoder.sentence_encoder")
    return SentenceEncoder(folder, device=config.device)


def _add_attributes(
    found: Descriptions, config: Any, responses: Responses, learnt: np.ndarray
) -> Descriptions:
    table = read_attributes(config.attributes.expanduser())
    what = f"the attributes {config.attributes}"
    ids, names = _find_images(responses)
    codes = np.asarray(table.codes_of(ids, names), dtype=np.int64)  # (n_images, n_attributes)
    known = found.lexicon.attributes
    if not known:
        known = {
            name: tuple(table.values[name][code] for code in np.unique(codes[learnt, place]) if code >= 0)
            for place, name in enumerate(table.names)
        }
        if not any(known.values()):
            told = table.describe_missing(
                [ids[i] for i in learnt], names and [names[i] for i in learnt], what=what
            )
            raise DataError(
                told or f"{what} are unknown for all {len(learnt)} training images; fill them in."
            )
    recoded = np.full((len(ids), len(known)), -1, dtype=np.int64)
    for column, (name, values) in enumerate(known.items()):
        if name not in table.names:
            raise DataError(f"{what} have no column {name}, which was learnt before; use the same table.")
        number = {value: place for place, value in enumerate(values)}
        # the last entry stands for the code -1
        new = np.array([*(number.get(value, -1) for value in table.values[name]), -1])
        recoded[:, column] = new[codes[:, table.names.index(name)]]
    return replace(
        found,
        lexicon=replace(found.lexicon, attributes=known),
        sizes=replace(
            found.sizes, attribute_names=tuple(known), attribute_values=tuple(map(len, known.values()))
        ),
        tables={**found.tables, "attributes": recoded},
    )


def _find_images(responses: Responses) -> tuple[list[str], list[str] | None]:
    """Return id and concept of each image, in the order of `code_trials`; concepts may not be known."""
    ids, stimuli, _ = code_trials(responses)
    first = np.unique(stimuli, return_index=True)[1]  # one trial of each image
    named = "concept" in responses.trials
    concepts = responses.trials["concept"].astype(str).iloc[first].tolist() if named else None
    return [str(i) for i in ids], concepts


def _add_concepts(
    found: Descriptions, responses: Responses, concepts: np.ndarray, train: np.ndarray
) -> Descriptions:
    named = responses.trials["concept"] if "concept" in responses.trials else responses.trials["stimulus_id"]
    names = named.astype(str).to_numpy(dtype=object)
    known = found.lexicon.concepts or tuple(sorted({str(name) for name in names[train]}))
    number = {name: place for place, name in enumerate(known)}
    for name in sorted({str(name) for name in names}):
        number.setdefault(name, len(number))
    return replace(
        found,
        lexicon=replace(found.lexicon, concepts=known),
        sizes=replace(found.sizes, n_concepts=len(known)),
        concepts=np.array([number[str(name)] for name in names], dtype=np.int64),
    )
