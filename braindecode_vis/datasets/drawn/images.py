"""Images for the phantom: concepts, exemplars, splits and files, as in THINGS.

Owns the list of concepts (a shape of one colour with one surface texture, an accent colour and a usual background), the
way from a seed to an image, and the folder layout of THINGS-EEG2. An image depends only on its seed, concept, exemplar
and size, never on the batch, the order or the process that drew it. `render` draws the pixels; brain responses are
simulated elsewhere.

References
----------
.. [1] Hebart, M. N. et al. (2019). THINGS: a database of 1,854 object concepts. PLoS ONE 14, e0223792.
   https://doi.org/10.1371/journal.pone.0223792
.. [2] Gifford, A. T. et al. (2022). A large and rich EEG dataset for modeling human visual object
   recognition. NeuroImage 264, 119754. https://doi.org/10.1016/j.neuroimage.2022.119754
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, check_columns
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.drawn.render import (
    BACKGROUNDS,
    TEXTURES,
    Look,
    draw_scene,
    render_look,
    shows_accent,
)
from braindecode_vis.datasets.drawn.scene_pairs import (
    FIRST_COMPOSED,
    count_composed,
    describe_composition,
    find_superordinate,
    render_composition,
)
from braindecode_vis.datasets.drawn.shapes import list_shapes

# Far apart in hue or in lightness, so that no two have the same common name.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.10, 0.10),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.86, 0.22),
    "green": (0.16, 0.52, 0.20),
    "lime": (0.66, 0.86, 0.22),
    "turquoise": (0.18, 0.76, 0.74),
    "blue": (0.13, 0.27, 0.80),
    "purple": (0.47, 0.18, 0.64),
    "pink": (0.96, 0.60, 0.76),
    "brown": (0.42, 0.25, 0.14),
    "white": (0.95, 0.95, 0.93),
    "black": (0.10, 0.10, 0.12),
}
# An object is never drawn on a background of its own colour, where its outline would be invisible.
_CLASHES = {
    "meadow": {"green", "lime"},
    "forest": {"green", "lime", "black"},
    "clouds": {"blue", "turquoise", "white"},
    "sea": {"blue", "turquoise"},
    "planks": {"brown", "orange"},
    "dunes": {"white", "yellow"},
    "bokeh": {"black"},
    "city": {"black", "purple"},
}
STIMULUS_COLUMNS = (
    "stimulus_id",
    "concept",
    "superordinate",
    "concept_index",
    "exemplar",
    "split",
    "file_name",
    "path",
)
ATTRIBUTES = ("shape", "colour", "texture", "accent", "background", "place", "size")
_WHERE = {
    "studio": "in a studio",
    "meadow": "on a meadow",
    "clouds": "before clouds",
    "bokeh": "before blurred lights",
    "brick": "before a brick wall",
    "planks": "before wooden planks",
    "sea": "by the sea",
    "dunes": "among dunes",
    "forest": "in a forest",
    "tiles": "on a tiled floor",
    "city": "before a city at night",
}
_SIDES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_ASIDE = 0.04  # of half the image, to be left or right of its middle: more than a quarter of the objects each
_LARGE = 0.82  # half the object's extent over half the image, the middle of the scenes' range
_FIRST_SYNSET = 1_440_000  # like WordNet offsets: eight digits with the leading zero
N_MAX_CONCEPTS = len(list_shapes()) * len(COLOURS) * len(TEXTURES)
N_MAX_COMPOSED = count_composed(COLOURS)
_CHUNK = 64  # images drawn between two steps of progress


def make_concepts(n_concepts: int, *, seed: int) -> pd.DataFrame:
    """List the first concepts of a seed, as different from each other as their number allows.

    Concept `i` of a seed is the same for every `n_concepts`. The first (number of shapes x number of colours) concepts
    all differ in shape or colour; only later ones differ in texture.

    Parameters
    ----------
    n_concepts
        Number of concepts, up to `N_MAX_CONCEPTS`.
    seed
        Root seed of the stimuli.

    Returns
    -------
    DataFrame of n_concepts rows
        Index `concept_index`; columns `concept` (a readable name such as ``red_striped_star``),
        `superordinate`, `shape`, `colour`, `texture`, `accent`, `background`.

    Raises
    ------
    ConfigError
        If `n_concepts` is larger than the number of concepts.

    Examples
    --------
    >>> make_concepts(3, seed=0)["concept"].is_unique
    True
    """
    if not 1 <= n_concepts <= N_MAX_CONCEPTS:
        raise ConfigError(
            f"n_concepts is {n_concepts}, but a seed has between 1 and {N_MAX_CONCEPTS} phantom concepts."
        )
    table = pd.DataFrame(
        [_describe_concept(concept_index, seed) for concept_index in range(n_concepts)],
        columns=["shape", "colour", "texture", "accent", "background"],
        index=pd.RangeIndex(n_concepts, name="concept_index"),
    )
    table.insert(0, "concept", table["colour"] + "_" + table["texture"] + "_" + table["shape"])
    table.insert(1, "superordinate", table["shape"].map(list_shapes()))
    return table


def render_scene(concept_index: int, exemplar: int, *, size: int, seed: int) -> np.ndarray:
    """Draw one exemplar of one concept.

    The exemplar determines place, size, rotation, mirroring, light, a small colour shift and the background.

    Parameters
    ----------
    concept_index
        Row of `make_concepts` for the same `seed`, or the number of a composed scene (see `scene_pairs`).
    exemplar
        Any non-negative integer.
    size
        Height and width in pixels, at least 16. The scene is the same at every size.
    seed
        Root seed of the stimuli.

    Returns
    -------
    uint8 array of shape (size, size, 3)
        RGB.

    Raises
    ------
    ConfigError
        If the concept, the exemplar or the size does not exist.

    Examples
    --------
    >>> render_scene(7, 0, size=64, seed=0).shape
    (64, 64, 3)
    """
    composed = FIRST_COMPOSED <= concept_index < FIRST_COMPOSED + N_MAX_COMPOSED
    if not (composed or 0 <= concept_index < N_MAX_CONCEPTS):
        raise ConfigError(f"concept_index is {concept_index}, but must be from 0 to {N_MAX_CONCEPTS - 1}.")
    if exemplar < 0 or size < 16:
        raise ConfigError(
            f"exemplar is {exemplar} and size is {size}, but must be at least 0 and 16; scenes of fewer "
            "pixels show no object."
        )
    concept_index, exemplar = int(concept_index), int(exemplar)
    if composed:
        return render_composition(concept_index, exemplar, size=size, seed=seed, colours=COLOURS)
    look, elsewhere = _find_look(concept_index, seed)
    rng = make_generator(seed, "phantom_scene", concept_index, exemplar)
    return render_look(look, size, rng, elsewhere=elsewhere)


def render_batch(
    concept_indices: Sequence[int] | np.ndarray,
    exemplars: Sequence[int] | np.ndarray,
    *,
    size: int,
    seed: int,
) -> np.ndarray:
    """Draw several scenes; equal to `render_scene` one by one.

    Parameters
    ----------
    concept_indices, exemplars : sequences of length n_images
        One pair per image.
    size
        Height and width in pixels.
    seed
        Root seed of the stimuli.

    Returns
    -------
    uint8 array of shape (n_images, size, size, 3)

    Raises
    ------
    ConfigError
        If the two sequences differ in length, or for the reasons of `render_scene`.
    """
    if len(concept_indices) != len(exemplars):
        raise ConfigError(
            f"{len(concept_indices)} concepts, but {len(exemplars)} exemplars were given; give one pair "
            f"per image."
        )
    images = np.empty((len(exemplars), size, size, 3), np.uint8)
    for row, (concept_index, exemplar) in enumerate(zip(concept_indices, exemplars, strict=True)):
        images[row] = render_scene(int(concept_index), int(exemplar), size=size, seed=seed)
    return images


def make_things_like_split(
    n_train_concepts: int = 1654,
    n_test_concepts: int = 200,
    n_train_exemplars: int = 10,
    n_test_exemplars: int = 1,
    *,
    seed: int,
    n_pairs: int = 0,
) -> pd.DataFrame:
    """List the stimuli of a THINGS-EEG2-like experiment.

    The test concepts are the first concepts of the seed, which differ most from each other; the training concepts are
    the next ones. No concept is in both splits.

    With `n_pairs`, some concepts are composed scenes (see `scene_pairs`), each with its partner: `n_pairs` pairs of
    test concepts, and the same share of the training concepts. No pair is in both splits.

    Parameters
    ----------
    n_train_concepts, n_test_concepts
        Concepts of each split; the defaults are the sizes of THINGS-EEG2 [2]_.
    n_train_exemplars, n_test_exemplars
        Images of each concept.
    seed
        Root seed of the stimuli.
    n_pairs
        Number of pairs of test concepts that differ only in the binding of their parts.

    Returns
    -------
    DataFrame of one row per image
        Columns `stimulus_id` (``red_striped_star_01b``), `concept`, `superordinate`, `concept_index`,
        `exemplar`, `split` (``train`` or ``test``), `file_name` (``red_striped_star_01b.jpg``) and `path`
        (``training_images/00001_black_checked_apple/black_checked_apple_01b.jpg``). The training images come
        first; within a split concepts are sorted by name and numbered from 1, independently of the other.

    Raises
    ------
    ConfigError
        If `n_concepts` is larger than the number of concepts.
    """
    counts = (n_train_concepts, n_test_concepts, n_train_exemplars, n_test_exemplars)
    if min(counts) < 0:
        raise ConfigError(
            f"the split needs {n_train_concepts} x {n_train_exemplars} training and {n_test_concepts} x "
            f"{n_test_exemplars} test images, but no count may be negative."
        )
    composed_train, composed_test = _count_composed(n_train_concepts, n_test_concepts, n_pairs)
    n_plain = n_train_concepts - composed_train, n_test_concepts - composed_test
    concepts = make_concepts(max(1, sum(n_plain)), seed=seed)
    train, test = concepts.iloc[n_plain[1] : sum(n_plain)], concepts.iloc[: n_plain[1]]
    if n_pairs:
        first = FIRST_COMPOSED + composed_test
        test = pd.concat([test, _list_composed(FIRST_COMPOSED, composed_test, seed)])
        train = pd.concat([train, _list_composed(first, composed_train, seed)])
    # Readers of THINGS-EEG2 count training images first.
    rows = _list_stimuli(train, n_train_exemplars, "train") + _list_stimuli(test, n_test_exemplars, "test")
    return pd.DataFrame(rows, columns=list(STIMULUS_COLUMNS))


def _count_composed(n_train: int, n_test: int, n_pairs: int) -> tuple[int, int]:
    """Return how many training and test concepts are composed scenes; both even."""
    if not n_pairs:
        return 0, 0
    n_train_pairs = round(n_train * n_pairs / max(1, n_test))
    most = N_MAX_COMPOSED // 2
    if 2 * n_pairs > n_test or n_pairs < 0 or n_pairs + n_train_pairs > most:
        raise ConfigError(
            f"n_pairs is {n_pairs}, but {n_test} test concepts have room for 0 to {n_test // 2} pairs, and a seed has "
            f"{most} pairs for training and test together."
        )
    return 2 * min(n_train_pairs, n_train // 2), 2 * n_pairs


def _list_composed(first: int, n_scenes: int, seed: int) -> pd.DataFrame:
    """Return composed scenes in the form of `make_concepts`, with the columns that a table of stimuli needs."""
    index = pd.RangeIndex(first, first + n_scenes, name="concept_index")
    scenes = [describe_composition(number, seed, COLOURS) for number in index]
    return pd.DataFrame(
        {
            "concept": [scene.concept for scene in scenes],
            "superordinate": [find_superordinate(scene) for scene in scenes],
        },
        index=index,
    )


def make_compositions(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """List the composed scenes among the images of a phantom, each with its partner.

    Parameters
    ----------
    table
        `stimulus_id`, `concept_index`, `exemplar` and `split`.
    seed
        Root seed of the stimuli.

    Returns
    -------
    DataFrame
        Columns `id`, `kind` (which parts are exchanged, see `scene_pairs`), `caption`, `swapped` (the caption of the
        other scene of the pair) and `partner` (its id); one row per composed image.

    Examples
    --------
    >>> table = make_things_like_split(0, 2, seed=0, n_pairs=1)
    >>> make_compositions(table, seed=0)["kind"].tolist()
    ['ground', 'ground']
    """
    composed = table[table["concept_index"] >= FIRST_COMPOSED]
    keys = ("concept_index", "exemplar", "split")
    id_of = {
        key: str(name)
        for *key_, name in zip(*(composed[k] for k in keys), composed["stimulus_id"], strict=True)
        for key in [tuple(key_)]
    }
    rows = []
    for (number, exemplar, split), name in id_of.items():
        scene = describe_composition(int(number), seed, COLOURS)
        # Two consecutive numbers are a pair; the first one is even.
        partner = id_of.get(
            (number + 1 if (number - FIRST_COMPOSED) % 2 == 0 else number - 1, exemplar, split), ""
        )
        rows.append((name, scene.kind, scene.caption, scene.swap().caption, partner))
    return pd.DataFrame(rows, columns=["id", "kind", "caption", "swapped", "partner"])


def write_images(table: pd.DataFrame, directory: Path, *, size: int, seed: int) -> pd.DataFrame:
    """Write the images of a split as JPEG of quality 95, in the folder layout of THINGS-EEG2.

    A file gets its name only when it is complete; an existing file is drawn again and replaced.

    Parameters
    ----------
    table
        Rows of `make_things_like_split`.
    directory
        Folder for `training_images` and `test_images`; it is made if it is missing.
    size
        Height and width in pixels; THINGS-EEG2 has 500.
    seed
        Seed that made `table`.

    Returns
    -------
    DataFrame
        `table` with `file_name` and `path` as written and the `sha256` of each file, the columns that `StimulusSet`
        needs.

    Raises
    ------
    DataError
        If a column is missing.
    """
    check_columns(
        table.columns, ("concept_index", "exemplar", "file_name", "path"), what="the stimulus table"
    )
    directory = Path(directory)
    written = table.copy()
    for column in ("file_name", "path"):
        # ImageNet writes .JPEG, and readers expect this ending.
        written[column] = [_end_in_jpg(Path(name)) for name in table[column]]
    written["sha256"] = [
        _write_image(directory / str(path), render_scene(concept_index, exemplar, size=size, seed=seed))
        for path, concept_index, exemplar in zip(
            written["path"], table["concept_index"], table["exemplar"], strict=True
        )
    ]
    return written


def make_captions(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Describe the images of a phantom in words, from the parts of their concepts.

    Parameters
    ----------
    table
        `stimulus_id`, `concept_index` and `split`; `nsd_id` if images have a number in NSD too.
    seed
        Root seed of the stimuli.

    Returns
    -------
    DataFrame
        Columns `id` and `caption`, two captions per image. Images of NSD are listed by their names there
        (``nsd02951``); test images, and images that the column `imagined` marks, also by the names of its imagery
        session.

    Examples
    --------
    >>> table = make_things_like_split(1, 1, seed=0)
    >>> make_captions(table, seed=0)["caption"].iloc[0].startswith("a")
    True
    """
    numbered = table["concept_index"][table["concept_index"] < FIRST_COMPOSED]
    concepts = make_concepts(int(numbered.max() if len(numbered) else 0) + 1, seed=seed)
    rows: list[tuple[str, str]] = []
    for names, concept in zip(_name_images(table), table["concept_index"].astype(int), strict=True):
        if concept >= FIRST_COMPOSED:
            rows += [(name, describe_composition(concept, seed, COLOURS).caption) for name in names]
            continue
        known = concepts.loc[concept]
        thing, surface = str(known["shape"]).replace("_", " "), str(known["texture"])
        patterned = surface if surface == "plain" else f"{surface} ({known['accent']})"
        captions = [
            f"{_choose_article(str(known['colour']))} {known['colour']} {surface} {thing}",
            f"{_choose_article(thing)} {thing} in {known['colour']}, {patterned}",
        ]
        rows += [(each, caption) for each in names for caption in captions]
    return pd.DataFrame(rows, columns=["id", "caption"])


def make_attributes(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Describe the actual content of each image of a phantom, with its own background, place and size.

    Parameters
    ----------
    table
        `stimulus_id`, `concept_index`, `exemplar` and `split`; further columns as in `make_captions`.
    seed
        Root seed of the stimuli.

    Returns
    -------
    DataFrame
        Columns `id` and `ATTRIBUTES`, one row per image and name of it. `background` is the drawn one, which is the
        usual background of the concept in about three of four images. `accent` is empty if it is not visible. `place`
        is ``left`` or ``right`` if the centre of the object is more than 2 % of the image's width beside its middle,
        and ``middle`` otherwise; `size` is ``large`` if the object covers at least 82 % of the image, and ``small``
        otherwise. For composed scenes (see `scene_pairs`) both are empty, and of two objects the left one is described.

    Examples
    --------
    >>> table = make_things_like_split(1, 1, seed=0)
    >>> set(make_attributes(table, seed=0)["place"]) <= {"left", "middle", "right"}
    True
    """
    rows = []
    numbers = (table["concept_index"].astype(int), table["exemplar"].astype(int))
    for names, concept, exemplar in zip(_name_images(table), *numbers, strict=True):
        if concept >= FIRST_COMPOSED:
            composed = describe_composition(concept, seed, COLOURS)
            rows += [(name, *composed.attributes, "", "") for name in names]
            continue
        look, elsewhere = _find_look(concept, seed)
        shape, colour, texture, accent, _ = _describe_concept(concept, seed)
        scene = draw_scene(look, make_generator(seed, "phantom_scene", concept, exemplar), elsewhere)
        aside = scene.centre[0]
        place = "middle" if abs(aside) <= _ASIDE else "left" if aside < 0 else "right"
        size = "large" if scene.scale >= _LARGE else "small"
        seen = accent if shows_accent(look) else ""
        rows += [(name, shape, colour, texture, seen, scene.background, place, size) for name in names]
    return pd.DataFrame(rows, columns=["id", *ATTRIBUTES])


def describe_attributes(attributes: pd.DataFrame) -> pd.DataFrame:
    """Return one exact sentence per image from the table of `make_attributes`: columns `id` and `caption`.

    Examples
    --------
    >>> table = make_things_like_split(1, 1, seed=0)
    >>> describe_attributes(make_attributes(table, seed=0))["caption"].iloc[0].startswith("a ")
    True
    """
    sentences = []
    for row in attributes.astype(str).to_dict("records"):
        thing = f"{row['size']} {row['colour']} {row['texture']} {row['shape'].replace('_', ' ')}"
        with_accent = f" with {row['accent']}" if row["accent"] else ""
        sentences.append(f"a {thing}{with_accent}, {_SIDES[row['place']]}, {_WHERE[row['background']]}")
    return pd.DataFrame({"id": attributes["id"], "caption": sentences})


def _name_images(table: pd.DataFrame) -> list[list[str]]:
    """Return the names of each image in a data set, including those of NSD and of imagined images."""
    numbers = table["nsd_id"].astype(int).tolist() if "nsd_id" in table else None
    imagined = table["imagined"].tolist() if "imagined" in table else [False] * len(table)
    found = []
    for row, (name, split) in enumerate(zip(table["stimulus_id"].astype(str), table["split"], strict=True)):
        names = [name, *([f"imagery_{name}"] if imagined[row] else [])]
        if numbers is not None:
            names = [f"nsd{numbers[row] + 1:05d}", *([f"imagery_{name}"] if split == "test" else [])]
        found.append(names)
    return found


def _choose_article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _end_in_jpg(path: Path) -> str:
    return str(path if path.suffix.lower() in (".jpg", ".jpeg") else path.with_suffix(".jpg"))


def _list_stimuli(concepts: pd.DataFrame, n_exemplars: int, split: str) -> list[tuple]:
    """Return one row of `STIMULUS_COLUMNS` per image of these concepts."""
    folder = {"train": "training_images", "test": "test_images"}[split]
    rows = []
    for number, row in enumerate(concepts.sort_values("concept").itertuples(), start=1):
        for exemplar in range(n_exemplars):
            # THINGS marks the first image of a concept `b` and most others `s`.
            stimulus_id = f"{row.concept}_{exemplar + 1:02d}{'s' if exemplar else 'b'}"
            file_name = f"{stimulus_id}.jpg"
            path = f"{folder}/{number:05d}_{row.concept}/{file_name}"
            identity = (stimulus_id, row.concept, row.superordinate, row.Index)
            rows.append((*identity, exemplar, split, file_name, path))
    return rows


def _write_image(path: Path, image: np.ndarray) -> str:
    """Write one image under a temporary name, rename it and return the sha256 of the file."""
    from PIL import Image

    buffer = io.BytesIO()
    # Full colour resolution: concepts differ by colour.
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


# ------------------------------------------------------------------------------- parts of a concept


@lru_cache(maxsize=8)
def _shuffle_cells(seed: int) -> np.ndarray:
    """Return the order of the shape-colour pairs of a seed, shape (n_shapes * n_colours,)."""
    order = make_generator(seed, "phantom_concepts").permutation(len(list_shapes()) * len(COLOURS))
    # Cached arrays are shared by all callers.
    order.setflags(write=False)
    return order


@lru_cache(maxsize=65536)
def _describe_concept(concept_index: int, seed: int) -> tuple[str, str, str, str, str]:
    """Return shape, colour, texture, accent and background of a concept."""
    shapes, colours, textures = list(list_shapes()), list(COLOURS), list(TEXTURES)
    cells = _shuffle_cells(seed)
    # All pairs of shape and colour first, then the same pairs with their next texture.
    layer, place = divmod(concept_index, len(cells))
    shape_number, colour_number = divmod(int(cells[place]), len(colours))
    shape, colour = shapes[shape_number], colours[colour_number]
    # The name of a random stream says what it decides, so a longer table changes no other concept.
    cell = make_generator(seed, "phantom_cell", shape, colour)
    texture = textures[int(cell.permutation(len(textures))[layer])]
    rng = make_generator(seed, "phantom_concept", shape, colour, texture)
    # The pattern must be visible on the surface, so the accent is far from the colour.
    far = [name for name in colours if math.dist(COLOURS[name], COLOURS[colour]) > 0.6]
    homes = _find_backgrounds(colour)
    return shape, colour, texture, far[int(rng.integers(len(far)))], homes[int(rng.integers(len(homes)))]


@lru_cache(maxsize=65536)
def _find_look(concept_index: int, seed: int) -> tuple[Look, tuple[str, ...]]:
    """Return the look of a concept and the backgrounds that suit it."""
    shape, colour, texture, accent, background = _describe_concept(concept_index, seed)
    rng = make_generator(seed, "phantom_look", concept_index)
    look = Look(
        shape=shape,
        texture=texture,
        background=background,
        colour=COLOURS[colour],
        accent=COLOURS[accent],
        stretch=float(rng.uniform(0.85, 1.18)),
        grain=float(rng.uniform(0.8, 1.25)),
        tilt=float(rng.choice([0.0, 0.25, 0.5, 0.75]) * np.pi),
        hue=float(rng.uniform()),
    )
    return look, _find_backgrounds(colour)


@lru_cache(maxsize=64)
def _find_backgrounds(colour: str) -> tuple[str, ...]:
    return tuple(name for name in BACKGROUNDS if colour not in _CLASHES.get(name, ()))


def name_imagenet(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return an ImageNet-like synset and image name (``n01440037_142``) for each row of a split, by its concept.

    Some image numbers end in zeros, which are lost in the numeric code of one data set.
    """
    synsets = [f"n{_FIRST_SYNSET + 37 * int(concept):08d}" for concept in table["concept_index"]]
    # Six digits at most, as in ImageNet.
    numbers = (131 * table["concept_index"] + 1010 * table["exemplar"] + 10) % 999_999 + 1
    return synsets, [f"{synset}_{number}" for synset, number in zip(synsets, numbers, strict=True)]


def match_concepts(images: pd.DataFrame, n_concepts: int, seed: int) -> pd.DataFrame:
    """Add `concept_index`, `exemplar` and `split` to a table of images that names the concepts of a seed.

    Test images are exemplars of concepts with further images, as in THINGS; these further images are ``excluded``,
    since a test of unseen concepts must not train on them.

    Parameters
    ----------
    images : DataFrame
        `concept`, `exemplar_nr` (from 1) and `is_test`.
    """
    concepts = make_concepts(n_concepts, seed=seed)
    index = pd.Series(concepts.index, index=concepts["concept"])
    tested = set(images.loc[images["is_test"], "concept"])
    table = images.assign(
        concept_index=images["concept"].map(index).astype(int), exemplar=images["exemplar_nr"] - 1
    )
    excluded = table["concept"].isin(tested)
    table["split"] = np.select([table["is_test"], excluded], ["test", "excluded"], "train")
    return table


def list_concepts_with_tests(
    n_train_concepts: int, n_test_concepts: int, n_exemplars: int, seed: int
) -> pd.DataFrame:
    """Return the images of a THINGS-EEG1 phantom, below ``object_images``: `n_exemplars` of every concept for training,
    and one more of each of the first `n_test_concepts` for testing.

    The training images of test concepts are ``excluded``; see `match_concepts`.
    """
    n_concepts = n_train_concepts + n_test_concepts
    names = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    rows = [(name, number + 1, False) for name in names for number in range(n_exemplars)]
    rows += [(name, n_exemplars + 1, True) for name in names[:n_test_concepts]]
    table = match_concepts(
        pd.DataFrame(rows, columns=["concept", "exemplar_nr", "is_test"]), n_concepts, seed
    )
    ids = [f"{name}_{number:02d}s" for name, number, _ in rows]
    files = [f"{name}.jpg" for name in ids]
    paths = [f"object_images/{row[0]}/{name}" for row, name in zip(rows, files, strict=True)]
    return table.assign(stimulus_id=ids, file_name=files, path=paths)


def write_image_files(
    table: pd.DataFrame,
    root: Path,
    *,
    size: int,
    seed: int,
    advance: Callable[[int], Any],
    spread: Callable[..., Iterable[Any]] = map,
) -> pd.DataFrame:
    """Write the images that do not exist yet and return `table` with the `sha256` of every file.

    `spread` is `map`, or that of several processes.
    """
    hashes: list[str] = []
    chunks = [table.iloc[start : start + _CHUNK] for start in range(0, len(table), _CHUNK)]
    for found in spread(partial(_write_missing, root=root, size=size, seed=seed), chunks):
        hashes += found
        advance(len(found))
    return table.assign(sha256=hashes)


def _write_missing(chunk: pd.DataFrame, root: Path, size: int, seed: int) -> list[str]:
    """Write the images of a part of a table that do not exist yet, and return the sha256 of every file."""
    missing = [not (root / path).is_file() for path in chunk["path"]]
    drawn = iter(write_images(chunk[missing], root, size=size, seed=seed)["sha256"])
    return [
        next(drawn) if absent else hash_file(root / path)
        for path, absent in zip(chunk["path"], missing, strict=True)
    ]
